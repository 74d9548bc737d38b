"""The protocol of the transports `peer` and `host`, in real processes on a driver without a GPU (fake_ring.py)."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from reference import attention_batch, error, lse_error

pytest.importorskip("para_kernels._C")
nvidia = pytest.importorskip("triton.backends.nvidia.driver")
if torch.cuda.is_available():
    pytest.skip("the fake driver cannot stand beside a real one", allow_module_level=True)

from fake_cuda import build_library  # noqa: E402
from fake_ring import FAKES, FakeDevice  # noqa: E402

from para_kernels.parallel import control, device_ring, host, peer  # noqa: E402
from para_kernels.parallel.device_ring import Place, Shape  # noqa: E402
from para_kernels.parallel.failure import RankFailure, deadline, raise_on_failure, set_layer  # noqa: E402

NAMES = tuple(FAKES)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_library(tmp_path_factory.mktemp("cuda")))


def make(name: str, library: str, delay_us: int = 0) -> FakeDevice:
    """A transport with copies small enough that tiny pieces have several groups and chunks."""
    device_ring.COPY_BYTES, host.CHUNK_BYTES = 3000, 700
    group = dist.group.WORLD
    assert group is not None
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
        out, lse = transport.ring(
            q[:, mine], k[:, mine], v[:, mine], lengths=lengths, kv_lens=lens[0], q_lens=lens[1], scale=None
        )
        expected, expected_lse = attention_batch(q, k, v, kv_lens, q_lens)
        worst[index] = max(worst[index], error(out, expected[:, mine]), lse_error(lse, expected_lse[:, :, mine]))
    raise_on_failure()
    assert transport.memory_bytes > 0
    dist.barrier()
    transport.close()
    return worst


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world", "delay_us"), [(2, 0), (2, 300), (3, 100)])
def test_attends_the_whole_sequence(name: str, world: int, delay_us: int, library: str) -> None:
    """Fresh data in every layer, ranks that run apart, steps that take random times, shapes that change."""
    for result in launch(world, differences, name, library, delay_us, 48):
        assert isinstance(result, list), result
        assert max(result) <= 1e-5, result


def ahead(rank: int, world: int, name: str, library: str) -> float:
    """Rank 0 needs no keys of the others, which are slow: nothing but their credits keeps it from its slots."""
    torch.manual_seed(0)
    transport = make(name, library, 3000 if rank else 0)
    worst = 0.0
    for _ in range(12):
        q, k, v = (torch.randn(1, 5 * world, 2, 64) for _ in range(3))
        mine = slice(5 * rank, 5 * rank + 5)
        kv_lens = torch.tensor([5], dtype=torch.int32)
        out, _ = transport.ring(
            q[:, mine], k[:, mine], v[:, mine], lengths=(5,) * world, kv_lens=kv_lens, q_lens=None, scale=None
        )
        worst = max(worst, error(out, attention_batch(q, k, v, [5])[0][:, mine]))
    dist.barrier()
    transport.close()
    return worst


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_runs_ahead_waits_for_its_slots(name: str, library: str) -> None:
    results = launch(2, ahead, name, library)
    assert max(results) <= 1e-5


def lone(rank: int, world: int, name: str, library: str, way: str) -> tuple[str, float]:
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
                transport.ring(q, q, q, lengths=(4,) * world, kv_lens=None, q_lens=None, scale=None)
                transport._synchronize()
                transport.check()
    except RankFailure as failure:
        with pytest.raises(RankFailure):
            raise_on_failure()
        return str(failure), time.monotonic() - started
    return "nothing", 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_does_not_come_is_named(name: str, library: str) -> None:
    message, seconds = launch(2, lone, name, library, "sleeps", lost=1)[0]
    assert message.startswith("rank 0 waited 1.")
    assert "K and V of rank 1 in layer 2" in message
    assert 1.4 <= seconds < 10


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_died_is_noticed_before_the_timeout(name: str, library: str) -> None:
    message, seconds = launch(2, lone, name, library, "dies", lost=1)[0]
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


@pytest.mark.parametrize("name", NAMES)
def test_what_the_driver_refuses_is_raised(name: str, library: str) -> None:
    """On the rank that meets it first; the other one meets it too, or is ended by the first."""
    messages = launch(2, refused, name, library)
    said = [message.startswith("cuStreamWaitValue32: CUDA_ERROR_FAKE (801)") for message in messages]
    ended = ["was ended by rank" in message for message in messages]
    assert any(said)
    assert all(a or b for a, b in zip(said, ended, strict=True))


def test_slots_never_overlap_and_start_at_rows() -> None:
    for dim, dtype in ((8, torch.float32), (24, torch.bfloat16), (200, torch.float32), (128, torch.float16)):
        shape = Shape((11, 13), 2, 3, dim, dtype)
        capacity = 2**21
        place = Place(shape, capacity)
        for index in range(3):
            assert place.offset(index) % shape.row_bytes == 0
            assert index * capacity <= place.offset(index) < index * capacity + shape.row_bytes
        assert shape.row_bytes <= device_ring._ALIGNMENT


def early_heads(shape: Shape) -> int:
    transport = object.__new__(peer.PeerTransport)
    return transport._early_heads(shape)


@pytest.mark.parametrize("rows", [1, 1000, 4096, 16_384, 60_000])
def test_the_heads_that_are_announced_early_are_whole_groups_and_aligned(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for heads, dim in ((24, 128), (5, 64), (3, 24), (1, 128), (7, 5)):
        shape = Shape((rows, rows), 2, heads, dim, torch.bfloat16)
        early = early_heads(shape)
        assert early == 0 or early in [first for first, _ in shape.groups()]
        assert early * shape.row_bytes % 16 == 0
    assert early_heads(Shape((4096, 4096), 1, 24, 128, torch.bfloat16)) == 6
    assert early_heads(Shape((64, 64), 1, 24, 128, torch.bfloat16)) == 0  # one group: nothing comes after it
    monkeypatch.setattr(peer, "EARLY_PART", 0)
    assert early_heads(Shape((4096, 4096), 1, 24, 128, torch.bfloat16)) == 0


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


def test_words_are_signed() -> None:
    assert [control.signed(x) for x in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32)] == [0, 2**31 - 1, -(2**31), -1, 0]
