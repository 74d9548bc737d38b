"""Shards, meshes, splits, transports, and what watches over them."""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import parallel_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import launch

import para_kernels
from para_kernels import ContextParallel
from para_kernels.parallel import Shards, deadline, init_context_parallel_mesh, transport
from para_kernels.parallel.failure import RankFailure
from para_kernels.parallel.mesh import MESH_DIMS, mesh_sizes
from para_kernels.parallel.progress import ProgressWatch
from para_kernels.parallel.split import (
    FLOPS,
    NVLINK,
    PCIE,
    SOCKETS,
    Links,
    Workload,
    assumed_links,
    choose_split,
    modelled,
    resolve_split,
)

# --- shards -----------------------------------------------------------------------------------------------------------

TOTALS, RANKS = st.integers(0, 300), st.integers(1, 9)


@given(total=TOTALS, world=RANKS)
def test_pieces_make_up_the_sequence_and_differ_by_one(total: int, world: int) -> None:
    shards = Shards.of(total, world)
    rows = [row for rank in range(world) for row in range(total)[shards.piece(rank)]]
    assert rows == list(range(total))
    assert max(shards.sizes) - min(shards.sizes) <= 1
    assert (shards.total, shards.world) == (total, world)


@given(
    streams=st.lists(st.tuples(st.integers(0, 300), st.sampled_from((0.25, 1.0, 1.16, 3.0))), max_size=4), world=RANKS
)
def test_pieces_cost_the_same(streams: list[tuple[int, float]], world: int) -> None:
    costs = [cost for rows, cost in streams for _ in range(rows)]
    shards = Shards.of_equal_cost(streams, world)
    assert (shards.total, shards.world) == (len(costs), world)
    dearest, mean = max((cost for _, cost in streams), default=0.0), sum(costs) / world
    for rank in range(world):
        assert abs(sum(costs[shards.piece(rank)]) - mean) <= (dearest + mean / 8) * (1 + 1e-9)


@given(rows=st.lists(st.integers(0, 300), min_size=1, max_size=4), cost=st.sampled_from((1.0, 1.16)), world=RANKS)
def test_rows_of_one_cost_are_cut_into_pieces_of_equal_size(rows: list[int], cost: float, world: int) -> None:
    streams = [(0, 3.0), *((count, cost) for count in rows)]
    assert Shards.of_equal_cost(streams, world) == Shards.of(sum(rows), world)


@pytest.mark.parametrize(
    ("streams", "sizes"),
    [
        ([(512, 1.16), (4096, 1.0)], (2263, 2345)),
        ([(4096, 1.0), (512, 1.16)], (2345, 2263)),
        ([(100, 10.0), (100, 1.0)], (28, 27, 27, 118)),
        ([(4, 2.0), (100, 1.0)], (50, 54)),
    ],
)
def test_the_rank_with_the_dearer_rows_has_fewer(streams: list[tuple[int, float]], sizes: tuple[int, ...]) -> None:
    assert Shards.of_equal_cost(streams, len(sizes)).sizes == sizes


def test_no_rank_is_left_a_few_rows_of_a_stream() -> None:
    shards = Shards.of_equal_cost([(512, 1.16), (4096, 1.0)], 8)  # 505 rows of text cost as much as an eighth of all
    assert shards.stream(0, 512).sizes == (512, *[0] * 7)
    shards = Shards.of_equal_cost([(4096, 1.0), (512, 1.16)], 8)
    assert shards.stream(4096, 512).sizes == (*[0] * 7, 512)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), streams=st.lists(st.integers(0, 60), max_size=4))
def test_parts_of_streams_make_up_streams_and_pieces(sizes: list[int], streams: list[int]) -> None:
    total = sum(sizes)
    shards = Shards(tuple(sizes))
    streams = [*(min(rows, total // len(streams)) for rows in streams)]
    streams.append(total - sum(streams))
    joint = torch.arange(total)
    pieces: list[list[int]] = [[] for _ in sizes]
    start = 0
    for rows in streams:
        stream = joint[start : start + rows]
        seen: list[int] = []
        for rank in range(shards.world):
            part = stream[shards.part_of_stream(start, rows, rank)]
            assert part.equal(shards.shard(joint, rank, 0)[shards.part_of_piece(start, rows, rank)])
            assert shards.stream(start, rows).sizes[rank] == part.numel()
            seen += part.tolist()
            pieces[rank] += part.tolist()
        assert seen == stream.tolist()
        start += rows
    assert pieces == [shards.shard(joint, rank, 0).tolist() for rank in range(shards.world)]


@given(total=TOTALS, world=RANKS, lens=st.lists(st.integers(0, 300), min_size=1, max_size=4))
def test_local_lens_count_the_rows_that_exist(total: int, world: int, lens: list[int]) -> None:
    shards = Shards.of(total, world)
    whole = torch.tensor([min(length, total) for length in lens], dtype=torch.int32)
    local = torch.stack([shards.local_lens(whole, rank) for rank in range(world)])
    assert local.dtype == torch.int32
    assert torch.equal(local.sum(0, dtype=torch.int32), whole)
    for rank, size in enumerate(shards.sizes):
        exists = torch.arange(total)[shards.piece(rank)][None] < whole[:, None]
        assert exists.sum(1).tolist() == local[rank].tolist()
        assert local[rank].max() <= size


@given(total=TOTALS, ring=st.integers(1, 4), ulysses=st.integers(1, 4))
def test_merged_pieces_are_those_of_the_ring(total: int, ring: int, ulysses: int) -> None:
    shards = Shards.of(total, ring * ulysses)
    merged = shards.merged(ulysses)
    assert merged.world == ring
    assert merged.starts == shards.starts[::ulysses]
    assert merged.total == total


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shards(()), "sizes: got ()"),
        (lambda: Shards((1, -1)), "sizes: got (1, -1)"),
        (lambda: Shards((True,)), "sizes: got (True,)"),
        (lambda: Shards.of(-1, 2), "total: got -1"),
        (lambda: Shards.of(1, 0), "world: got 0"),
        (lambda: Shards.of(1.0, 2), "total: got 1.0"),
        (lambda: Shards.of_equal_cost([(1, 1.0)], 0), "world: got 0"),
        (lambda: Shards.of_equal_cost([(4, 1.0), (-1, 1.0)], 2), "streams: got [(4, 1.0), (-1, 1.0)]"),
        (lambda: Shards.of_equal_cost([(4, 1.0), (4, 0.0)], 2), "streams: got [(4, 1.0), (4, 0.0)]"),
        (lambda: Shards.of_equal_cost([(4, math.nan)], 2), "streams: got [(4, nan)]"),
        (lambda: Shards.of(8, 4).merged(3), "count: got 3, must divide the 4 ranks"),
        (lambda: Shards.of(8, 4).shard(torch.zeros(1, 7), 0), "tensor: got (1, 7)"),
        (lambda: Shards.of(8, 4).part_of_stream(3, 6, 0), "stream: got 6 rows from 3 on, must lie within 8 rows"),
        (lambda: Shards.of(8, 4).stream(-1, 6), "stream: got 6 rows from -1 on"),
    ],
)
def test_shards_refuse(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match="got") as refused:
        make()
    assert message in str(refused.value)


# --- settings and meshes ----------------------------------------------------------------------------------------------


def test_context_parallel_is_exported_and_says_its_world() -> None:
    parallel = para_kernels.ContextParallel(batch=2, ring=3, ulysses=4)
    assert parallel.world == 24
    assert parallel.sizes == (2, 3, 4)
    assert parallel == ContextParallel(batch=2, ring=3, ulysses=4)
    assert ContextParallel("auto", batch=2).resolved(batch=2, ring=2, ulysses=1).sizes == (2, 2, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "best"}, "split: got 'best'"),
        ({"ring": 0}, "ring: got 0"),
        ({"ulysses": 2.0}, "ulysses: got 2.0"),
        ({"batch": True}, "batch: got True"),
        ({"split": "auto", "ring": 2}, "split: got 'auto' beside ring=2"),
        ({"transport": "nvlink"}, "transport: got 'nvlink', allowed are 'auto', 'peer', 'host', 'collective'"),
        ({"timeout": 0}, "timeout: got 0"),
        ({"timeout": float("inf")}, "timeout: got inf"),
        ({"timeout": "2"}, "timeout: got '2'"),
    ],
)
def test_context_parallel_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="got") as refused:
        ContextParallel(**settings)
    assert message in str(refused.value)


def test_auto_has_no_sizes_before_it_is_resolved() -> None:
    with pytest.raises(ValueError, match="split: got 'auto'"):
        ContextParallel("auto").world  # noqa: B018


def test_without_torch_distributed_there_is_no_mesh() -> None:
    with pytest.raises(ValueError, match="not initialised; start with torchrun"):
        init_context_parallel_mesh()


@pytest.mark.parametrize(
    ("world", "node", "maxima", "sizes"),
    [
        (8, 8, (None, None, None), (1, 1, 8)),
        (16, 8, (None, None, None), (1, 2, 8)),  # ulysses fills a node, the ring crosses nodes
        (16, 8, (2, None, None), (2, 1, 8)),
        (8, 8, (2, None, None), (2, 1, 4)),
        (8, 8, (2, 2, None), (2, 2, 2)),
        (8, 8, (None, None, 2), (1, 4, 2)),
        (6, 6, (4, None, None), (3, 1, 2)),  # the largest divisor, not a common one
        (8, 8, (2, 4, 4), (2, 1, 4)),
        (8, 8, (None, 4, 2), (1, 4, 2)),
        (1, 1, (2, 2, 2), (1, 1, 1)),
        (7, 7, (2, 3, None), (1, 1, 7)),
    ],
)
def test_mesh_sizes(world: int, node: int, maxima: tuple, sizes: tuple) -> None:
    assert mesh_sizes(world, node, *maxima) == sizes


def test_mesh_sizes_refuse_maxima_that_cannot_be_met() -> None:
    with pytest.raises(ValueError, match="max_ring_dim_size, max_ulysses_dim_size: got 2 and 2"):
        mesh_sizes(8, 8, None, 2, 2)


# --- in real processes --------------------------------------------------------------------------------------------------


@functools.cache
def others(world: int) -> list[Any]:
    found = launch(world, parallel_cases.other_collectives)
    for outcome in found:
        if isinstance(outcome, Exception):
            raise outcome
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_collectives_and_meshes(world: int) -> None:
    ring, ulysses = 2, world // 2
    for rank, found in enumerate(others(world)):
        assert found["gathered"] is True
        assert found["sum"] == [world, sum(range(world))]
        assert found["broadcast"] == 1
        assert found["exchanged"] == list(range(world))
        assert found["mesh"] == ((1, ring, ulysses), MESH_DIMS)
        assert found["piece"] == (rank, world, list(range(world)))
        assert found["order"]
        assert found["cached"]
        assert found["agreement"] == list(range(world))
        assert found["told"] == f"b: got 1 on rank {world - 1}, must be 0 as on the other ranks"
        assert found["problem"] == ("bad" if rank == 0 else "bad (on rank 0)")
        assert found["sizes"].endswith(f"must make up the world of {world}")


def test_on_the_cpu_the_transport_is_torch_distributed() -> None:
    for found in others(2):
        assert found["transport"] == ("collective", "CPU tensors travel by torch.distributed")


@pytest.mark.parametrize("world", [2, 4])
def test_measured_links_are_the_same_everywhere(world: int) -> None:
    measured = [found["links"] for found in others(world)]
    assert len({link for links in measured for link in links}) == 1
    assert "source='measured'" in measured[0][0]


def test_the_environment_forces_a_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    assert transport._forced("auto") == ("auto", "the argument transport")
    monkeypatch.setenv(transport.ENVIRONMENT, "host")
    assert transport._forced("auto") == ("host", "PARA_KERNELS_TRANSPORT")
    assert transport._forced("peer") == ("peer", "the argument transport")
    monkeypatch.setenv(transport.ENVIRONMENT, "pigeon")
    with pytest.raises(ValueError, match="transport: got 'pigeon' by PARA_KERNELS_TRANSPORT"):
        transport._forced("auto")


# --- progress of a device ---------------------------------------------------------------------------------------------


def test_a_mark_that_is_never_reached_is_named_once() -> None:
    failures: list[str] = []
    watch = ProgressWatch(failures.append, interval=0.01)
    reached = [True, False]
    watch.mark(lambda: reached[0], "first", 0.1)
    watch.mark(lambda: reached[1], "second", 0.1)
    end = time.monotonic() + 20
    while watch.failure is None and time.monotonic() < end:
        time.sleep(0.01)
    assert watch.failure == "second"
    assert failures == ["second"]


def test_marks_far_ahead_are_no_failure_while_there_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[str] = []
    now = [0.0]
    monkeypatch.setattr("para_kernels.parallel.progress.time.monotonic", lambda: now[0])
    watch = ProgressWatch(failures.append, interval=3600.0)
    done = [False] * 10
    for index in range(10):
        watch.mark(lambda index=index: done[index], str(index), 1.0)
    for index in range(9):  # Each within a second of the one before; the last is marked nine seconds before its turn.
        now[0] += 0.9
        done[index] = True
        watch.look()
    assert not failures
    now[0] += 1.1
    watch.look()
    assert failures == ["9"]
    watch.close()


def test_deadline_refuses() -> None:
    with pytest.raises(ValueError, match="timeout: got -1"), deadline(-1):
        pass


def test_a_failure_of_a_rank_is_a_runtime_error() -> None:
    assert issubclass(RankFailure, RuntimeError)


# --- the choice of a split --------------------------------------------------------------------------------------------

HUNYUAN = Workload(heads=24, kv_heads=24, head_dim=128, rows=119_056, flops=650e12)


def test_the_model_counts_attention_and_transfer() -> None:
    links = Links(node=100e9, network=10e9, latency=1e-5, source="assumed")
    one = modelled(HUNYUAN, 1, 1, 8, links)
    assert one.attention == pytest.approx(4 * 119_056**2 * 24 * 128 / 650e12)
    assert one.exposed == 0
    ring = modelled(HUNYUAN, 2, 1, 8, links)
    assert ring.attention == pytest.approx(one.attention / 2)
    assert ring.exposed == pytest.approx(1e-5)  # 1.46 GB / 100 GB/s hides behind 67 ms
    ulysses = modelled(HUNYUAN, 1, 2, 8, links)
    # Half of this rank's q, k, v, and as much of what comes back as goes: 4 x 59,528 x 12 x 128 x 2 bytes.
    moved = 4 * 59_528 * 12 * 128 * 2
    assert ulysses.exposed == pytest.approx(moved / 100e9 + 2 * moved / links.ordering + 2e-5)
    assert modelled(HUNYUAN, 1, 5, 8, links).attention == pytest.approx(one.attention * 5 / 24, rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "world", "node", "links", "expected"),
    [
        (119_056, 2, 2, NVLINK, (2, 1)),  # long: everything hides
        (119_056, 8, 8, PCIE, (2, 4)),  # a hop takes four times what attention could hide
        (8_192, 8, 8, NVLINK, (1, 8)),  # short: seven hops take longer to start than to exchange heads once
        (119_056, 1, 1, NVLINK, (1, 1)),
    ],
)
def test_the_choice(rows: int, world: int, node: int, links: Links, expected: tuple[int, int]) -> None:
    work = Workload(24, 24, 128, rows, flops=650e12)
    split, reason = choose_split(work, world, node, links)
    assert (split.ring, split.ulysses) == expected
    assert reason.startswith(f"{split}: ")
    assert links.source in reason


def test_the_model_agrees_with_what_was_measured() -> None:
    """Two GPUs with NVLink: within 7 %, and the faster of the two is chosen."""
    rows = json.loads((Path(__file__).parent.parent / "benchmarks/results/ring-speed.json").read_text())
    ms = {(row["shape"]["S"], row["kernel"]): row["median_ms"] for row in rows}
    for total in {total for total, _ in ms}:
        work = Workload(24, 24, 128, total, flops=FLOPS[9, 0])
        ring, ulysses = modelled(work, 2, 1, 2, NVLINK), modelled(work, 1, 2, 2, NVLINK)
        assert ring.seconds * 1e3 == pytest.approx(ms[total, "peer"], rel=0.07)
        assert ulysses.seconds * 1e3 == pytest.approx(ms[total, "ulysses"], rel=0.07)
        chosen, _ = choose_split(work, 2, 2, NVLINK)
        assert (chosen.ring == 2) == (ms[total, "peer"] < ms[total, "ulysses"])


def test_ulysses_stays_inside_a_node_with_slow_networks() -> None:
    slow = Links(node=150e9, network=1e9, latency=40e-6, source="assumed")
    split, _ = choose_split(Workload(24, 24, 128, 32_768), 16, 8, slow)
    assert split.ulysses <= 8


def test_auto_resolves_to_sizes_and_takes_whole_samples_first() -> None:
    resolved, reason = resolve_split(ContextParallel("auto", transport="host"), HUNYUAN, 4, 4, NVLINK, samples=2)
    assert resolved.batch == 2
    assert resolved.world == 4
    assert resolved.transport == "host"
    assert reason.startswith("batch 2, and ring")
    fixed = ContextParallel(ring=2)
    assert resolve_split(fixed, HUNYUAN, 4, 4, NVLINK) == (fixed, "as set")
    with pytest.raises(ValueError, match="batch: got 3, must divide the world of 4"):
        resolve_split(ContextParallel("auto", batch=3), HUNYUAN, 4, 4, NVLINK)


def test_assumed_links_of_the_cpu() -> None:
    assert assumed_links(torch.device("cpu")) is SOCKETS
