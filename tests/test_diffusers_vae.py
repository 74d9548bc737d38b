"""Parallel VAE: real processes must give, bit for bit, what diffusers' own tiling gives in one.

One launch per world size runs all cases; what it found, per rank and case, is then looked at by the tests.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderTiny
from hypothesis import given
from hypothesis import strategies as st
from vae_ranks import BF16, CASES, SMALL, rank_main, video_vae

from para_kernels.integrations.diffusers import parallelize_vae
from para_kernels.integrations.diffusers.tile_exchange import TILES_PER_ROUND, Tile, assign, rounds, wholes
from para_kernels.integrations.diffusers.vae import ParallelVae, checksum

WORLDS = (2, 3)
pytestmark = pytest.mark.usefixtures("one_thread")


# --- launching --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Runs a world once, for all workers of this run of the tests, and returns the folder with what its ranks found.
    Processes are forked from one that has imported everything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vae_ranks"])
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(world: int) -> Path:
        folder = shared / f"vae-{world}"
        with (shared / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                folder.mkdir()
                port = free_port()
                ranks = [context.Process(target=rank_main, args=(rank, world, port, folder)) for rank in range(world)]
                for process in ranks:
                    process.start()
                for process in ranks:
                    process.join(120)
                    process.kill()
        return folder

    return folder_of


@pytest.fixture(scope="module", params=WORLDS)
def launched(launch: Callable[[int], Path], request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The findings of every rank of a launch."""
    return [json.loads((launch(request.param) / f"{rank}.json").read_text()) for rank in range(request.param)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_equals_tiling_in_one_process(launched: list[dict[str, Any]], name: str) -> None:
    alone = launched[0][name]["alone"]
    assert [found[name]["together"] for found in launched] == [alone] * len(launched)


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_shared_out(launched: list[dict[str, Any]], name: str) -> None:
    world, count = len(launched), CASES[name].tiles
    for found in launched:
        tiles = found[name]["tiles"]
        assert found[name]["tiles"] == launched[0][name]["tiles"]
        assert sum(tiles) == count
        assert sum(number > 0 for number in tiles) == min(world, count)
        assert all((seconds > 0) == (number > 0) for seconds, number in zip(found[name]["seconds"], tiles, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind(launched: list[dict[str, Any]], name: str) -> None:
    for found in launched:
        assert found[name]["tiling kept"]
        assert found[name]["untouched"]


@pytest.mark.parametrize(
    ("special", "words"),
    [
        ("different_shapes", ["shape of z: got [1, 4, 2, 9, 9] on rank {last}, must be [1, 4, 1, 9, 9]"]),
        ("different_values", ["checksum of z: got ", " on rank 1, must be "]),
        ("different_dtypes", ["dtype of z: got ", "bfloat16", "float32"]),
        ("different_settings", ["vae.tile_sample_stride_width", "8", "12"]),
        ("different_weights", ["checksum of the weights: got ", " on rank 1, must be "]),
        ("different_methods", ["method", "encode", "decode"]),
        ("requires_grad", ["z: requires grad"]),
        ("one_rank_is_wrong", ["z: got a str, must be a tensor"]),
    ],
)
def test_different_ranks_are_found_out(launched: list[dict[str, Any]], special: str, words: list[str]) -> None:
    for found in launched:
        for word in words:
            assert word.format(last=len(launched) - 1) in found[special]


def test_a_mistake_can_be_mended(launched: list[dict[str, Any]]) -> None:
    assert all(found["works_after_a_mistake"] for found in launched)


def test_a_failing_rank_tells_the_others(launched: list[dict[str, Any]]) -> None:
    first, *others = launched
    assert first["one_rank_fails"] == "no room"
    assert all("rank 0 gave up: MemoryError: no room" in found["one_rank_fails"] for found in others)


def test_a_rank_that_never_arrives(launched: list[dict[str, Any]]) -> None:
    _, *others = launched
    for rank, found in enumerate(others, start=1):
        words = rf"rank {rank} waited 1\.?\d* s for the decode call of rank 0; no sign of rank 0"
        assert re.fullmatch(words, found["one_rank_never_arrives"])


def test_calling_again_re_tunes(launched: list[dict[str, Any]]) -> None:
    for found in launched:
        assert found["re_tuned"] == [list(range(len(launched))), True, True, True]


def test_device_mesh(launched: list[dict[str, Any]]) -> None:
    for found in launched:
        equal, summary, flat = found["device_mesh"]
        assert equal
        assert f"tiles on {len(launched)} rank(s)" in summary
        assert "mesh: got 2 dimensions, must be 1" in flat


def test_ranks_outside_the_group(launched: list[dict[str, Any]]) -> None:
    member, *others = launched
    assert member["not_a_member"] == "member"
    assert all(found["not_a_member"].startswith("mesh: got") for found in others)


def test_encode_and_decode_in_a_row(launched: list[dict[str, Any]]) -> None:
    assert all(found["both_ways"] for found in launched)


def test_a_dead_rank_ends_the_others(launch: Callable[[int], Path]) -> None:
    folder = launch(4)  # whose ranks do nothing else
    for rank in (0, 2, 3):
        # On a busy machine a living rank may answer the roll call too late, and is named beside the dead one.
        assert re.search(r"no sign of ranks? .*\b1\b", (folder / f"{rank}-last.txt").read_text())
    assert not (folder / "1-last.txt").exists()


# --- in one process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"mesh: got None, but torch\.distributed is not initialized"):
        parallelize_vae(video_vae())


@pytest.mark.usefixtures("group_of_one")
class TestAlone:
    def test_one_rank(self) -> None:
        for case in (CASES["video"], CASES["encode image"]):
            vae = case.set_up()
            handle = parallelize_vae(vae)
            assert torch.equal(case.run(vae), case.alone())
            assert [row.tiles for row in handle.work()] == [case.tiles]

    def test_work_before_a_call(self) -> None:
        handle = parallelize_vae(video_vae())
        assert handle.work() == ()
        assert handle.summary() == "AutoencoderKLHunyuanVideo, tiles on 1 rank(s)"

    def test_remove_twice(self) -> None:
        vae = video_vae()
        handle = parallelize_vae(vae)
        handle.remove()
        handle.remove()
        assert not handle.installed
        assert ParallelVae.on(vae) is None
        assert handle.summary() == "removed"
        assert parallelize_vae(vae) is not handle

    def test_wrapped_by_somebody_else_and_removed(self) -> None:
        vae = SMALL.set_up()
        handle = parallelize_vae(vae)
        ours = vae.decode
        vae.decode = theirs = lambda z: ours(z)
        handle.remove()
        assert vae.decode is theirs
        assert torch.equal(SMALL.run(vae), SMALL.alone())

    def test_other_instances_are_not_touched(self) -> None:
        vae, other = video_vae(), video_vae()
        parallelize_vae(vae)
        assert "decode" not in other.__dict__
        assert ParallelVae.on(other) is None

    def test_compiled_vae_is_unwrapped(self) -> None:
        vae = SMALL.set_up()
        assert parallelize_vae(torch.compile(vae)).vae is vae

    def test_weights_offloaded_by_accelerate(self) -> None:
        from accelerate import cpu_offload

        vae = SMALL.set_up()
        cpu_offload(vae, execution_device=torch.device("cpu"))
        parallelize_vae(vae)
        assert torch.equal(SMALL.run(vae), SMALL.alone())

    def test_result_forms(self) -> None:
        vae = SMALL.set_up()
        parallelize_vae(vae)
        (sample,) = vae.decode(SMALL.inputs(), return_dict=False)
        assert torch.equal(sample, SMALL.alone())
        assert torch.equal(vae.decode(z=SMALL.inputs()).sample, sample)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"vae": torch.nn.Linear(1, 1)}, "vae: got a Linear, supported: AutoencoderKLHunyuanVideo, AutoencoderKL"),
            ({"mesh": "all"}, "mesh: got 'all', allowed is"),
            ({"timeout": 0}, "timeout: got 0, must be"),
            ({"timeout": True}, "timeout: got True, must be"),
            ({"timeout": "long"}, "timeout: got 'long', must be"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, Any], words: str) -> None:
        vae = video_vae()
        before = list(vae.__dict__)
        with pytest.raises(ValueError, match=words):
            parallelize_vae(**({"vae": vae} | arguments))
        assert list(vae.__dict__) == before

    def test_other_vaes(self) -> None:
        with pytest.raises(ValueError, match="vae: got a AutoencoderTiny, supported"):
            parallelize_vae(AutoencoderTiny.__new__(AutoencoderTiny))

    def test_replaced_decode(self) -> None:
        vae = video_vae()
        vae.decode = lambda z: z
        with pytest.raises(ValueError, match="vae: its 'decode' has been replaced"):
            parallelize_vae(vae)

    def test_not_a_tensor(self) -> None:
        vae = video_vae()
        parallelize_vae(vae)
        with pytest.raises(ValueError, match="z: got a list, must be a tensor"):
            vae.decode([1.0])
        assert vae.use_tiling is False


# --- sharing out ------------------------------------------------------------------------------------------------------

costs = st.lists(st.integers(1, 100), min_size=1, max_size=200)


@given(costs, st.integers(1, 9))
def test_no_rank_has_a_tile_more_than_another(costs: list[int], world: int) -> None:
    owners = assign(costs, world)
    for end in [tiles.stop for tiles in rounds(len(costs), world)]:
        loads = [sum(costs[tile] for tile in range(end) if owners[tile] == rank) for rank in range(world)]
        assert max(loads) - min(loads) <= max(costs[:end])


@given(costs, st.integers(1, 9))
def test_rounds_hold_every_tile_once(costs: list[int], world: int) -> None:
    parts = rounds(len(costs), world)
    assert [tile for part in parts for tile in part] == list(range(len(costs)))
    assert all(len(part) <= TILES_PER_ROUND * world for part in parts)


@given(st.lists(st.integers(1, 5), max_size=9))
def test_pieces_are_put_together(lengths: list[int]) -> None:
    nothing = torch.empty(0)
    pieces = [Tile(nothing, (), begins=piece == 0) for length in lengths for piece in range(length)]
    found = wholes(pieces)
    assert [len(whole) for whole in found] == lengths
    assert [index for whole in found for index in whole] == list(range(len(pieces)))


def test_720p_video_is_balanced() -> None:
    sizes = [
        min(5, 33 - t) * min(32, 90 - y) * min(32, 160 - x)
        for t in range(0, 33, 3)
        for y in range(0, 90, 24)
        for x in range(0, 160, 24)
    ]
    for world in (2, 4, 8):
        owners = assign(sizes, world)
        loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(world)]
        assert sum(sizes) / world / max(loads) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64, torch.uint8])
def test_checksum_sees_values_and_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    changed = tensor.clone()
    changed[1, 2, 3] += 1
    sums = {checksum([other]) for other in (tensor, changed, tensor.flip(0), tensor.flip(1))}
    assert len(sums) == 4
    assert checksum([tensor.transpose(1, 2).contiguous().transpose(1, 2)]) == checksum([tensor])
    assert checksum([torch.empty(2, device="meta")]) == checksum([])
