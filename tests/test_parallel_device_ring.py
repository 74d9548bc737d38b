"""The protocol of the transports `peer` and `host`, in real processes on a driver without a GPU (fake_ring.py)."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from reference import Made, attention_batch, error, lse_error

pytest.importorskip("para_kernels._C")
nvidia = pytest.importorskip("triton.backends.nvidia.driver")
if torch.cuda.is_available():
    pytest.skip("the fake driver cannot stand beside a real one", allow_module_level=True)

from fake_cuda import build_library  # noqa: E402
from fake_ring import FAKES, FakeDevice  # noqa: E402

from para_kernels.parallel import control, device_ring, host, peer  # noqa: E402
from para_kernels.parallel.device_ring import Place, Shape  # noqa: E402
from para_kernels.parallel.failure import RankFailure, deadline, set_layer  # noqa: E402
from para_kernels.parallel.progress import raise_on_failure  # noqa: E402

NAMES = tuple(FAKES)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_library(tmp_path_factory.mktemp("cuda")))


def make(name: str, library: str, delay_us: int = 0) -> FakeDevice:
    """A transport with copies small enough that tiny pieces have several groups and chunks."""
    host.CHUNK_BYTES = 700
    group = dist.group.WORLD
    assert group is not None
    FAKES[name]._copy_bytes = 3000
    return FAKES[name](group, library, delay_us)


# (lengths for up to three ranks, batch, heads, key heads, head dim, kv_lens, q_lens)
CASES = (
    ((7, 9, 5), 1, 2, 2, 8, None, None),
    ((12, 0, 3), 2, 4, 2, 16, [11, 3], [9, 15]),
    ((1, 30, 2), 2, 3, 3, 24, [0, 31], None),
    ((40, 41, 39), 1, 5, 5, 40, None, None),  # larger than all before: the buffers grow
    ((0, 0, 0), 1, 2, 2, 8, None, None),
    ((7, 9, 5), 1, 2, 2, 8, None, None),
)


def differences(rank: int, world: int, name: str, library: str, delay_us: int, layers: int) -> list[float]:
    """The worst error of each case; layers alternate between cases without any pause."""
    torch.manual_seed(0)
    random.seed(rank)
    transport = make(name, library, delay_us)
    worst = [0.0] * len(CASES)
    seen = []
    for layer in range(layers):
        # Two layers of a case, so that both slots are used, in an order that is the same on all ranks.
        index = layer // 2 % len(CASES)
        lengths, batch, heads, kv_heads, dim, kv_lens, q_lens = CASES[index]
        lengths = lengths[:world]
        total, start = sum(lengths), sum(lengths[:rank])
        q, k, v = (torch.randn(batch, total, h, dim) for h in (heads, kv_heads, kv_heads))
        kv_lens, q_lens = (None if x is None else [min(y, total) for y in x] for x in (kv_lens, q_lens))
        lens = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in (kv_lens, q_lens)]
        mine = slice(start, start + lengths[rank])
        if random.random() < 0.3:
            time.sleep(random.random() * 0.02)
        own, source = [q[:, mine], k[:, mine], v[:, mine]], None
        if layer % 4 >= 2:  # to be made in the ring's main stream, keys and values in its buffer
            source = Made(*own)
            own = source.outlines
        out, lse = transport.ring(*own, lengths=lengths, kv_lens=lens[0], q_lens=lens[1], scale=None, source=source)
        expected, expected_lse = attention_batch(q, k, v, kv_lens, q_lens)
        seen.append((index, out, lse, expected[:, mine], expected_lse[:, :, mine]))
    assert transport.memory_bytes > 0
    transport.close()
    raise_on_failure()
    for index, out, lse, expected, expected_lse in seen:
        worst[index] = max(worst[index], error(out, expected), lse_error(lse, expected_lse))
    return worst


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world", "delay_us"), [(2, 0), (2, 300), (3, 100)])
def test_attends_the_whole_sequence(name: str, world: int, delay_us: int, library: str) -> None:
    """Fresh data in every layer, ranks that run apart, steps that take random times, shapes that change."""
    for result in launch(world, differences, name, library, delay_us, 48):
        assert isinstance(result, list), result
        assert max(result) <= 1e-5, result


# Bytes of up to three ranks: next to nothing, none, more than all before (the buffers grow).
SIZES = ((5, 2000, 1024), (0, 3000, 1), (0, 0, 0), (4096, 0, 70000), (5, 2000, 1024))


def bytes_of_others(rank: int, world: int, name: str, library: str, delay_us: int, layers: int) -> list[str]:
    """What is wrong with the bytes that go round, in layers between which the ranks run apart."""
    random.seed(rank)
    transport = make(name, library, delay_us)
    wrong: list[str] = []

    def content(layer: int, owner: int, size: int) -> torch.Tensor:
        return torch.randint(256, (size,), generator=torch.Generator().manual_seed(100 * layer + owner)).byte()

    def one(layer: int, sizes: tuple[int, ...]) -> None:
        used: list[int] = []

        def fill(memory: torch.Tensor) -> None:
            transport._launch(lambda: memory.copy_(content(layer, rank, sizes[rank])))

        def use(owner: int, memory: torch.Tensor) -> None:
            used.append(owner)
            transport._launch(lambda: compare(owner, memory))

        def compare(owner: int, memory: torch.Tensor) -> None:
            if not torch.equal(memory, content(layer, owner, sizes[owner])):
                wrong.append(f"layer {layer}: the bytes of rank {owner}")

        transport.circulate(sizes, fill, use)
        there = [(rank + t) % world for t in range(world) if sizes[(rank + t) % world]]
        if used != there:
            wrong.append(f"layer {layer}: {used}, not {there}")

    for layer in range(layers):
        one(layer, SIZES[layer // 2 % len(SIZES)][:world])
        if layer % 5 == 4:  # attention in 16 bits between them, by the same buffers
            q = torch.randn(1, 4 * world, 2, 8, generator=torch.Generator().manual_seed(layer))
            mine = slice(4 * rank, 4 * rank + 4)
            out, _ = transport.ring(
                q[:, mine], q[:, mine], q[:, mine], lengths=(4,) * world, kv_lens=None, q_lens=None, scale=None
            )
            transport._synchronize()
            if error(out, attention_batch(q, q, q)[0][:, mine]) > 1e-5:
                wrong.append(f"layer {layer}: attention")
        if random.random() < 0.3:
            time.sleep(random.random() * 0.02)
    transport.close()
    raise_on_failure()
    return wrong


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world", "delay_us"), [(2, 0), (3, 100)])
def test_brings_the_bytes_of_every_rank(name: str, world: int, delay_us: int, library: str) -> None:
    assert launch(world, bytes_of_others, name, library, delay_us, 30) == [[]] * world


def ahead(rank: int, world: int, name: str, library: str) -> float:
    """Rank 0 needs no keys of the others, which are slow: nothing but their credits keeps it from its slots."""
    torch.manual_seed(0)
    transport = make(name, library, 3000 if rank else 0)
    seen = []
    for _ in range(12):
        q, k, v = (torch.randn(1, 5 * world, 2, 64) for _ in range(3))
        mine = slice(5 * rank, 5 * rank + 5)
        kv_lens = torch.tensor([5], dtype=torch.int32)
        out, _ = transport.ring(
            q[:, mine], k[:, mine], v[:, mine], lengths=(5,) * world, kv_lens=kv_lens, q_lens=None, scale=None
        )
        seen.append((out, attention_batch(q, k, v, [5])[0][:, mine]))
    transport.close()
    return max(error(out, expected) for out, expected in seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_runs_ahead_waits_for_its_slots(name: str, library: str) -> None:
    results = launch(2, ahead, name, library)
    assert max(results) <= 1e-5


def lone(rank: int, world: int, name: str, library: str, way: str, kind: str) -> tuple[str, float]:
    """Rank 1 takes part in two layers, then does not come, or dies; what rank 0 is told, and how long that took."""
    transport = make(name, library)
    q = torch.ones(1, 4, 2, 8)
    started = time.monotonic()
    try:
        for layer in range(6):
            if rank == 1 and layer == 2:
                if way == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(30 if way == "sleeps" else 0)
            set_layer(layer)
            started = time.monotonic()
            with deadline(1.5 if way == "sleeps" else 60.0):
                if kind == "attention":
                    transport.ring(q, q, q, lengths=(4,) * world, kv_lens=None, q_lens=None, scale=None)
                else:
                    transport.circulate((4,) * world, lambda memory: None, lambda owner, memory: None)
                transport._synchronize()
                transport.check()
    except RankFailure as failure:
        with pytest.raises(RankFailure):
            raise_on_failure()
        return str(failure), time.monotonic() - started
    return "nothing", 0.0


@pytest.mark.parametrize("kind", ["attention", "bytes"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_does_not_come_is_named(name: str, kind: str, library: str) -> None:
    message, seconds = launch(2, lone, name, library, "sleeps", kind, lost=1)[0]
    assert message.startswith("rank 0 waited 1.")
    assert "K and V of rank 1 in layer 2" in message
    assert 1.4 <= seconds < 10


@pytest.mark.parametrize("kind", ["attention", "bytes"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_died_is_noticed_before_the_timeout(name: str, kind: str, library: str) -> None:
    message, seconds = launch(2, lone, name, library, "dies", kind, lost=1)[0]
    assert message.startswith("rank 0 lost rank 1, whose process has ended")
    assert "layer 2" in message
    assert seconds < 10


def obstacles(rank: int, world: int) -> list[str | None]:
    group = dist.group.WORLD
    assert group is not None
    return [module.unavailable(group, torch.device("cpu")) for module in (peer, host)]


@pytest.mark.parametrize("world", [1, 2])
def test_why_there_is_none(world: int) -> None:
    why = "needs CUDA" if world == 2 else "there is one rank"
    assert launch(world, obstacles) == [[why, why]] * world


def refused(rank: int, world: int, name: str, library: str) -> str:
    """The driver refuses from the second layer on."""
    transport = make(name, library)
    q = torch.ones(1, 4, 2, 8)
    for layer in range(2):
        if layer == 1:
            transport._synchronize()
            ctypes.c_int.in_dll(transport.fake, "result").value = 801
        try:
            transport.ring(q, q, q, lengths=(4,) * world, kv_lens=None, q_lens=None, scale=None)
        except RuntimeError as failure:
            return str(failure)
    return "nothing"


class WithoutKeys(Made):
    def write_keys(self, k: torch.Tensor, v: torch.Tensor) -> None:
        raise ValueError("for this test")


class WithoutQueries(Made):
    def write_queries(self, q: torch.Tensor) -> None:
        raise ValueError("for this test")


def unprepared_in_time(rank: int, world: int, name: str, library: str, broken: type[Made]) -> tuple[str, float]:
    """Rank 0 cannot prepare what is its own in the second layer: before it has announced its keys, or behind."""
    transport = make(name, library)
    if rank == 0:  # in place of the fake's, which prepares in a thread
        transport._prepare = lambda write, *targets: write(*targets)
    q = torch.ones(1, 4, 2, 8)
    began = time.monotonic()
    for layer in range(2):
        transport._synchronize()
        source = broken(q, q, q) if (rank, layer) == (0, 1) else Made(q, q, q)
        try:
            transport.ring(*source.outlines, lengths=(4,) * world, kv_lens=None, q_lens=None, scale=None, source=source)
            if layer:
                transport._synchronize()
                transport.check()
        except (ValueError, RankFailure) as failure:
            return f"{type(failure).__name__}: {failure}", time.monotonic() - began
    return "nothing", time.monotonic() - began


@pytest.mark.parametrize("broken", [WithoutKeys, WithoutQueries])
@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_prepare_ends_the_others(name: str, broken: type[Made], library: str) -> None:
    (first, _), (second, seconds) = launch(2, unprepared_in_time, name, library, broken)
    assert first == "ValueError: for this test"
    assert "was ended by rank 0" in second
    assert seconds < 20


@pytest.mark.parametrize("name", NAMES)
def test_what_the_driver_refuses_is_raised(name: str, library: str) -> None:
    """On the rank that meets it first; the other one meets it too, or is ended by the first."""
    messages = launch(2, refused, name, library)
    said = [message.startswith("cuStreamWaitValue32: CUDA_ERROR_FAKE (801)") for message in messages]
    ended = ["was ended by rank" in message for message in messages]
    assert any(said)
    assert all(a or b for a, b in zip(said, ended, strict=True))


def order(rank: int, world: int, name: str, library: str, launches_block: bool) -> list[bool]:
    """For each layer, whether attention was launched before the side streams were given anything of it. What follows
    the kernel comes behind that in any case: it may wait for the kernel, and the kernel for the transfers."""
    transport = make(name, library)
    transport._launches_block = launches_block
    attend, seen, behind = transport._attend, [], []

    def given() -> int:
        return sum(transport.fake.steps_enqueued(stream) for stream in transport._sides)

    def attended(*arguments: Any) -> Callable[[], None]:
        seen.append(given() == before)
        finish = attend(*arguments)

        def finished() -> None:
            behind.append(given() > before)
            finish()

        return finished

    transport._attend = attended
    q = torch.ones(1, 4, 2, 8)
    for _ in range(3):
        before = given()
        transport.ring(q, q, q, lengths=(4,) * world, kv_lens=None, q_lens=None, scale=None)
        assert given() > before
    transport.close()
    assert behind == [True] * 3
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("launches_block", [False, True])
def test_attention_is_launched_before_the_transfers_unless_that_blocks(
    name: str, library: str, launches_block: bool
) -> None:
    assert launch(2, order, name, library, launches_block) == [[not launches_block] * 3] * 2


def broken(rank: int, world: int, name: str, library: str, driver_too: bool) -> tuple[str, str, float, float]:
    """Rank 1 fails between the launch of its kernel and the transfers: what a rank is told, and how its kernel ends."""
    transport = make(name, library)
    q = torch.ones(1, 4, 2, 8)

    def layer() -> torch.Tensor:
        return transport.ring(q, q, q, lengths=(4,) * world, kv_lens=None, q_lens=None, scale=None)[0]

    layer()
    transport._synchronize()
    dist.barrier()
    outs, attend = [], transport._attend

    def attended(*arguments: Any) -> Callable[[], None]:
        outs.append(arguments[4])
        return attend(*arguments)

    class Refused:
        def run(self, streams: list[int], epoch: int) -> None:
            if driver_too:
                ctypes.c_int.in_dll(transport.fake, "result").value = 801
            raise RuntimeError("refused")

    transport._attend = attended
    if rank == 1:
        for shape, known in transport._layouts.items():
            transport._layouts[shape] = dataclasses.replace(known, transfers=(Refused(), Refused()))
    said, told = "", ""
    started = time.monotonic()
    with deadline(2.0 if driver_too else 60.0):
        try:
            layer()
        except RuntimeError as failed:
            said = str(failed)
    transport._synchronize()
    seconds = time.monotonic() - started
    try:
        while time.monotonic() < started + 10:
            transport.check()
            time.sleep(0.01)
    except RankFailure as failed:
        told = str(failed)
    return said, told, seconds, float(outs[0].sum()) if outs else 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("driver_too", [False, True])
def test_a_host_that_fails_behind_the_launch_ends_its_kernel_and_the_others(
    name: str, library: str, driver_too: bool
) -> None:
    """By flags without copies, at once; or, where the driver takes no more, by the kernel's bounded wait."""
    other, (said, told, seconds, total) = launch(2, broken, name, library, driver_too)
    assert said == "refused"
    assert told.startswith("rank 1 failed in an earlier call: RuntimeError: refused")
    if driver_too:
        assert 1.9 <= seconds < 10
        assert total != total  # NaN: what waited in vain must not look like a result
    else:
        assert seconds < 5
    assert "was ended by rank 1" in other[1]
    assert other[2] < 10


def closing(rank: int, world: int, name: str, library: str) -> tuple[float, int, int]:
    """Rank 0 closes as soon as its own device is done; rank 1's copies take their time. Then both begin anew."""
    torch.manual_seed(0)
    worst, held = 0.0, 0
    library_itself = ctypes.CDLL(library)
    for _ in range(2):
        transport = make(name, library, 20_000 if rank else 0)
        q, k, v = (torch.randn(1, 5 * world, 2, 64) for _ in range(3))
        mine = slice(5 * rank, 5 * rank + 5)
        out, _ = transport.ring(
            q[:, mine], k[:, mine], v[:, mine], lengths=(5,) * world, kv_lens=None, q_lens=None, scale=None
        )
        transport.close()
        worst = max(worst, error(out, attention_batch(q, k, v)[0][:, mine]))
        held += transport.memory_bytes
    raise_on_failure()
    return worst, held, ctypes.c_uint.in_dll(library_itself, "registered").value


@pytest.mark.parametrize("name", NAMES)
def test_closing_waits_for_those_who_still_read_and_gives_all_back(name: str, library: str) -> None:
    for worst, held, registered in launch(2, closing, name, library):
        assert worst <= 1e-5
        assert held == 0
        assert registered == 0


def closing_alone(rank: int, world: int, name: str, library: str) -> float:
    """Rank 1 dies in the second layer; rank 0 has been told, and closes: seconds that took."""
    transport = make(name, library)
    q = torch.ones(1, 4, 2, 8)
    try:
        for layer in range(2):
            if rank == 1 and layer == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            transport.ring(q, q, q, lengths=(4,) * world, kv_lens=None, q_lens=None, scale=None)
            transport._synchronize()
            transport.check()
    except RankFailure:
        started = time.monotonic()
        transport.close()
        return time.monotonic() - started
    return -1.0


@pytest.mark.parametrize("name", NAMES)
def test_closing_does_not_wait_for_a_rank_that_died(name: str, library: str) -> None:
    assert 0 <= launch(2, closing_alone, name, library, lost=1)[0] < 8


def test_slots_never_overlap_and_start_at_rows() -> None:
    for dim, dtype in ((8, torch.float32), (24, torch.bfloat16), (200, torch.float32), (128, torch.float16)):
        shape = Shape((11, 13), 2, 3, dim, dtype)
        capacity = 2**21
        place = Place(shape, capacity)
        for index in range(3):
            assert place.offset(index) % shape.row_bytes == 0
            assert index * capacity <= place.offset(index) < index * capacity + shape.row_bytes
        assert shape.row_bytes <= device_ring._ALIGNMENT


@pytest.mark.parametrize("rows", [1, 1000, 60_000, 500_000])
def test_chunks_cover_a_piece_and_have_flags(rows: int) -> None:
    shape = Shape((rows, rows // 2), 1, 24, 128, torch.bfloat16)
    size = host._chunk_bytes(shape)
    for owner in (0, 1):
        chunks = host._chunks(shape, owner, size)
        assert len(chunks) <= device_ring.MAX_CHUNKS
        reached = 0
        for start, count in chunks:
            assert start == reached
            assert count > 0
            reached += count
        assert reached == 24 * shape.head_bytes(owner)


def test_groups_of_heads_are_as_large_as_a_copy_pays() -> None:
    """Over NVLink a copy of some heads costs as much as three of theirs."""
    flux = ((2304, 2304), 1, 24, 128, torch.bfloat16)
    assert Shape(*flux).groups() == [(first, 3) for first in range(0, 24, 3)]
    assert Shape(*flux, peer.PeerTransport._copy_bytes).groups() == [(0, 5), (5, 5), (10, 5), (15, 5), (20, 4)]
    four_ranks = ((1152,) * 4, *flux[1:])
    assert Shape(*four_ranks, peer.PeerTransport._copy_bytes).groups() == [(0, 8), (8, 8), (16, 8)]
    assert Shape((100, 100), *flux[1:], peer.PeerTransport._copy_bytes).groups() == [(0, 24)]
    assert Shape((60_000, 1), 1, 3, 128, torch.bfloat16, peer.PeerTransport._copy_bytes).heads_per_flag == 1


def test_words_are_signed() -> None:
    assert [control.signed(x) for x in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32)] == [0, 2**31 - 1, -(2**31), -1, 0]
