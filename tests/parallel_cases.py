"""What the ranks of the tests of context parallelism run: cases of attention, refusals, failures."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from reference import Made, attention_batch, error, lse_error
from torch import Tensor

from para_kernels import flash_attention
from para_kernels.parallel import (
    RankFailure,
    Shards,
    agreement,
    check_agreement,
    collective,
    context_parallel_attention,
    deadline,
    ring_attention,
    set_layer,
    ulysses_attention,
)
from para_kernels.parallel.agreement import exchange
from para_kernels.parallel.collective import all_to_all, broadcast, gather_rows, sum_over_ranks
from para_kernels.parallel.mesh import build_mesh, group_of, init_context_parallel_mesh, mesh_groups
from para_kernels.parallel.split import measure_links
from para_kernels.parallel.transport import close_transports, selection


@dataclass(frozen=True)
class Case:
    """One attention over a whole sequence of `rows`, cut as `lengths` says or evenly."""

    name: str
    rows: int
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    kv_lens: tuple[int, ...] | None = None
    q_lens: tuple[int, ...] | None = None
    uneven: bool = False
    strided: bool = False
    scale: float | None = None
    asked: bool = False


CASES = (
    Case("even", 24),
    Case("odd", 37),
    Case("one row", 1),
    Case("no row", 0),
    Case("fewer rows than ranks", 3, batch=2, kv_lens=(2, 3)),
    Case("heads that do not divide", 29, heads=5, kv_heads=5),
    Case("more ranks than heads", 29, heads=1, kv_heads=1),
    Case("grouped heads", 31, heads=6, kv_heads=2),
    Case("grouped heads that do not divide", 31, heads=9, kv_heads=3),
    Case("one key head", 31, heads=6, kv_heads=1),
    Case("lengths", 43, batch=4, kv_lens=(43, 17, 0, 1)),
    Case("padding over two ranks", 40, batch=2, kv_lens=(9, 40)),
    Case("lengths of queries", 43, batch=3, kv_lens=(43, 17, 22), q_lens=(43, 0, 21)),
    Case("no keys at all", 12, batch=2, kv_lens=(0, 0)),
    Case("uneven pieces", 43, batch=2, kv_lens=(40, 13), uneven=True),
    Case("strided", 37, batch=2, kv_lens=(30, 37), strided=True),
    Case("scale", 37, scale=0.7),
    Case("lengths asked for", 37, batch=2, kv_lens=(30, 5), asked=True),
    Case("bfloat16", 150, batch=2, heads=6, kv_heads=3, head_dim=64, dtype=torch.bfloat16, kv_lens=(150, 61)),
    Case("float16", 150, heads=3, kv_heads=3, head_dim=64, dtype=torch.float16),
)


def shards_of(case: Case, world: int) -> Shards:
    if not case.uneven:
        return Shards.of(case.rows, world)
    # The first rank next to nothing, the last but one (which may be the same) nothing, the last the rest.
    return Shards((*([2] * (world > 2)), *([3] * (world - 3)), 0, case.rows - 2 * (world > 2) - 3 * max(0, world - 3)))


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the whole sequence, the same on every rank; keys past kv_lens are huge."""
    generator = torch.Generator().manual_seed(len(case.name) + case.rows)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    shapes = [(case.batch, case.rows, h, case.head_dim) for h in heads]
    if case.strided:
        shapes = [(batch, h, rows, 2 * dim) for batch, rows, h, dim in shapes]
    q, k, v = (torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes)
    if case.strided:
        q, k, v = (x[..., : case.head_dim].transpose(1, 2) for x in (q, k, v))
    for b, length in enumerate(case.kv_lens or ()):
        k[b, length:], v[b, length:] = 1e4, float("nan")
    return q, k, v


def int32(values: tuple[int, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32)


def meshes(world: int) -> dict[str, Callable[..., Any]]:
    """Every way to attend with `world` ranks."""
    found: dict[str, Callable[..., Any]] = {}
    for ulysses in range(1, world + 1):
        if world % ulysses == 0:
            mesh = build_mesh(1, world // ulysses, ulysses, "cpu")

            def hybrid(*qkv: Tensor, mesh: Any = mesh, **settings: Any) -> Any:
                if not settings.get("return_lse"):  # the same, made only when the ring asks for it
                    settings["source"] = Made(*qkv)
                    return context_parallel_attention(*settings["source"].outlines, mesh=mesh, **settings)
                return context_parallel_attention(*qkv, mesh=mesh, **settings)

            found[f"ring {world // ulysses} x ulysses {ulysses}"] = hybrid
    whole = build_mesh(1, 1, world, "cpu")["ulysses"]
    found["ring"] = lambda *qkv, **settings: ring_attention(*qkv, mesh=dist.group.WORLD, **settings)
    found["ulysses"] = lambda *qkv, **settings: ulysses_attention(*qkv, mesh=whole, **settings)
    return found


def attention_cases(rank: int, world: int, **how: str) -> dict[tuple[str, str], tuple[float, float, list]]:
    """Per way and case: errors of out and lse against float64 on the whole sequence, and what is wrong else."""
    results = {}
    for way, attend in meshes(world).items():
        for case in CASES:
            results[way, case.name] = attention_case(rank, world, case, functools.partial(attend, **how))
    return results


def attention8_cases(rank: int, world: int) -> dict[tuple[str, str], tuple[float, float, list]]:
    return attention_cases(rank, world, attention="int8")


def attention_case(rank: int, world: int, case: Case, attend: Callable[..., Any]) -> tuple[float, float, list]:
    shards = shards_of(case, world)
    q, k, v = inputs(case)
    local = [shards.shard(x, rank) for x in (q, k, v)]
    before = [x.clone() for x in local]
    lens = {"kv_lens": int32(case.kv_lens), "q_lens": int32(case.q_lens), "scale": case.scale}
    lengths = None if case.asked else shards.sizes
    out, lse = attend(*local, lengths=lengths, return_lse=True, **lens)
    alone = attend(*local, lengths=lengths, **lens)
    ref, ref_lse = attention_batch(
        q, k, v, case.kv_lens and list(case.kv_lens), case.q_lens and list(case.q_lens), case.scale
    )
    ref, ref_lse = shards.shard(ref, rank), shards.shard(ref_lse, rank, 2)
    wrong = [
        what
        for what, good in {
            "out is not like q": out.shape == local[0].shape and out.dtype == case.dtype and out.is_contiguous(),
            "lse is not float32 (B, H, S)": lse.dtype == torch.float32 and lse.is_contiguous(),
            "return_lse changes out": torch.equal(out, alone),
            "inputs were changed": all(
                torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(local, before, strict=True)
            ),
        }.items()
        if not good
    ]
    return error(out, ref), lse_error(lse, ref_lse), wrong


def rounding_case(rank: int, world: int) -> tuple[float, float]:
    """bfloat16 with very different weights of pieces: error of the ring, and of attention in one piece."""
    torch.manual_seed(5)
    q, k, v = (torch.randn(1, 512, 4, 64) for _ in range(3))
    k[:, ::7] *= 2
    q, k, v = (x.bfloat16() for x in (q, k, v))
    ref, _ = attention_batch(q, k, v)
    shards = Shards.of(512, world)
    out = ring_attention(*(shards.shard(x, rank) for x in (q, k, v)), mesh=dist.group.WORLD, lengths=shards.sizes)
    whole = gather_rows(out, shards, dist.group.WORLD)
    return error(whole, ref), error(flash_attention(q, k, v), ref)


def order_case(rank: int, world: int) -> list[str]:
    """What a ring does one after the other; in this process alone the calls are noted down."""
    noted: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            noted.append(name)
            return function(*arguments, **settings)

        return call

    collective.dist.batch_isend_irecv = noting("post", collective.dist.batch_isend_irecv)
    collective.flash_attention = noting("attend", collective.flash_attention)
    q = torch.randn(1, 4, 2, 8)
    ring_attention(q, q, q, mesh=dist.group.WORLD, lengths=[4] * world)
    return noted


def again_case(rank: int, world: int) -> list[bool]:
    """A mesh of the same layout after the groups have been destroyed and made anew."""
    same = []
    q = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(rank))
    for turn in range(2):
        mesh = build_mesh(1, 2, world // 2, "cpu")
        groups = mesh_groups(mesh)
        whole = gather_rows(q, Shards((4,) * world), dist.group.WORLD)
        given = torch.empty_like(q) if turn else None
        out = context_parallel_attention(q, q, q, mesh=mesh, lengths=[4] * world, out=given)
        same.append(error(out, flash_attention(q, whole, whole)) < 1e-6 and groups.ring is mesh.get_group("ring"))
        same.append(given is None or out is given)
        store = dist.group.WORLD.get_group_store().underlying_store
        dist.destroy_process_group()
        if not turn:
            dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=world)
    return same


def compiled_case(rank: int, world: int) -> tuple[bool, int]:
    """Under torch.compile: whether the result is the same, and how many graphs there are."""
    q = torch.randn(1, 8, 2, 8)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def function(q: Tensor) -> Tensor:
        return 2 * ring_attention(q + 1, q, q, mesh=dist.group.WORLD, lengths=[8] * world)

    with torch.no_grad():
        same = torch.equal(torch.compile(function, backend=backend)(q), function(q))
    return same, len(graphs)


# --- refusals ---------------------------------------------------------------------------------------------------------


def told(function: Callable[[], object]) -> str:
    """What a ValueError says."""
    try:
        function()
    except ValueError as problem:
        return str(problem)
    return "no ValueError"


def refusals(rank: int, world: int) -> dict[str, str]:
    """Settings of rank 1 that differ or are wrong: what each rank is told. Afterwards attention still works."""
    odd = rank == 1
    world_group = dist.group.WORLD
    q = torch.randn(1, 4, 2, 8)
    sizes = [4] * world

    def ring(q: Tensor = q, k: Tensor | None = None, **settings: Any) -> Callable[[], object]:
        k = q if k is None else k
        return lambda: ring_attention(q, k, k, **{"mesh": world_group, "lengths": sizes, **settings})

    lens = torch.tensor([3], dtype=torch.int32)
    with torch.no_grad():
        results = {
            "dtype": told(ring(q.bfloat16() if odd else q)),
            "heads": told(ring(q[:, :, :1] if odd else q)),
            "samples": told(ring(q.repeat(2, 1, 1, 1) if odd else q)),
            "scale": told(ring(scale=0.5 if odd else 0.25)),
            "lengths": told(ring(q[:, :3] if odd else q, lengths=[4, 3] + [4] * (world - 2) if odd else sizes)),
            "kv_lens": told(ring(kv_lens=lens if odd else None)),
            "rows": told(ring(q[:, :3] if odd else q)),
            "rows of k": told(ring(q, q[:, :3] if odd else q)),
            "too few lengths": told(ring(lengths=sizes[1:])),
            "asked dtype": told(ring(q.bfloat16() if odd else q, lengths=None)),
            "float64": told(ring(q.double() if odd else q, lengths=None)),
            "grad": "",
            "range": told(ring(kv_lens=torch.tensor([4 * world + 1], dtype=torch.int32))),
            "mesh": told(ring(mesh="all")),
            "mesh of two dims": told(ring(mesh=build_mesh(1, 1, world, "cpu"))),
            "hybrid without dims": told(
                lambda: context_parallel_attention(q, q, q, mesh=build_mesh(1, 1, world, "cpu")["ulysses"])
            ),
            "function": told(
                (lambda: ulysses_attention(q, q, q, mesh=world_group, lengths=sizes, scale=2.0))
                if odd
                else ring(scale=2.0)
            ),
            "transport": told(ring(transport="tcp")),
            "attention": told(ring(attention="int4")),
            "attention of one": told(ring(attention="int8" if odd else "exact")),
            **{
                name: told(
                    lambda out=out: context_parallel_attention(
                        q, q, q, mesh=build_mesh(1, 1, world, "cpu"), lengths=sizes, out=out
                    )
                )
                for name, out in (
                    ("out", q.transpose(1, 2)),
                    ("out, misaligned", torch.empty(q.numel() + 1)[1:].view(q.shape)),
                    ("out, shared", q),
                )
            },
        }
    results["grad"] = told(ring(q.clone().requires_grad_() if odd else q, scale=3.0))
    results["afterwards"] = told(ring())
    return results


def other_collectives(rank: int, world: int) -> dict[str, object]:
    group = dist.group.WORLD
    shards = Shards(tuple(range(world)))  # The first rank has no rows.
    whole = torch.arange(2 * shards.total * 3.0).view(2, shards.total, 3)
    uneven = gather_rows(shards.shard(whole, rank), shards, group)
    first = gather_rows(shards.shard(whole.transpose(0, 1), rank, 0), shards, group, dim=0)
    single = gather_rows(whole[:, :0], Shards((0,) * world), group)
    exchanged = all_to_all(torch.full((world,), float(rank)), [1] * world, [1] * world, group, "ranks")
    mesh = init_context_parallel_mesh("cpu", max_ring_dim_size=2)
    groups = mesh_groups(mesh)
    for turn in range(5):
        assert exchange(group, [turn, rank]) == [[turn, r] for r in range(world)]
    chosen = selection(group, torch.device("cpu"), "peer")
    close_transports(group)
    return {
        "gathered": torch.equal(uneven, whole)
        and torch.equal(first, whole.transpose(0, 1))
        and single.shape == (2, 0, 3),
        "sum": sum_over_ranks(torch.tensor([1.0, rank]), group).tolist(),
        "broadcast": broadcast(torch.tensor([rank]), group, source=1).item(),
        "exchanged": exchanged.tolist(),
        "mesh": (tuple(mesh.mesh.shape), mesh.mesh_dim_names),
        "piece": (groups.piece, groups.pieces, dist.get_process_group_ranks(groups.sequence)),
        "order": groups.sequence.rank() == groups.piece,
        "cached": mesh_groups(mesh) is groups and group_of(group) is group,
        "transport": (chosen.transport.name, chosen.reason),
        "agreement": check_agreement(group, {"a": 1}, own=rank),
        "told": told(lambda: check_agreement(group, {"a": 1, "b": rank // (world - 1)})),
        "problem": told(lambda: check_agreement(group, {"a": 1}, problem="bad" if rank == 0 else None)),
        "links": exchange(group, str(measure_links(group, torch.device("cpu"), world, 4096))),
        "sizes": told(lambda: build_mesh(1, world, 2)),
    }


# --- failures ---------------------------------------------------------------------------------------------------------


def failing(rank: int, world: int, way: str, how: str, seconds: float) -> tuple[str, float]:
    """Rank 1 leaves before layer 3, in the way that `how` names: what the others are told, and after how long."""
    mesh = build_mesh(1, world, 1, "cpu") if way == "ring" else build_mesh(1, 1, world, "cpu")
    q = torch.randn(2, 5, 4, 8)
    started = time.monotonic()
    try:
        for layer in range(6):
            set_layer(layer)
            if layer == 3 and rank == 1:
                leave(how)
            started = time.monotonic()
            # The first layer also waits for processes to start.
            with deadline(seconds if layer else 30.0), torch.no_grad():
                if way == "exchange":
                    exchange(dist.group.WORLD, layer)
                else:
                    context_parallel_attention(q, q, q, mesh=mesh, lengths=[5] * world)
    except RankFailure as lost:
        return str(lost), time.monotonic() - started
    return "no failure", time.monotonic() - started


def leave(how: str) -> None:
    time.sleep(0.3)  # Others may still be reading what this rank has written.
    if how == "sleeps":
        time.sleep(60)
    os.kill(os.getpid(), {"dies": signal.SIGKILL, "stops": signal.SIGSTOP}[how])
    time.sleep(60)


def leave_at_once(rank: int, world: int) -> None:
    if rank == 1:
        leave("dies")


def refused_by_the_host(rank: int, world: int) -> str:
    """Rank 0, which hosts the store, ends as soon as it is refused, and rank 2 is slow to read why."""
    await_keys = agreement._await_keys

    def slowly(*arguments: Any) -> None:
        await_keys(*arguments)
        time.sleep(0.5 * (rank == 2))

    agreement._await_keys = slowly
    return told(lambda: check_agreement(dist.group.WORLD, {"a": rank}))
