"""Launches from C++ on a GPU: the results of Triton's own launches, in the right stream, on the right device, in graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
_C = pytest.importorskip("para_kernels._C")

from para_kernels import flash_attention, flash_attention_varlen, merge_states, residual_diff  # noqa: E402
from para_kernels.triton_kernels import launch  # noqa: E402

pytestmark = pytest.mark.gpu


class Counter:
    """How many launches went through Triton."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        through_triton = launch.Launcher._launch_through_triton

        def counted(launcher: launch.Launcher, grid: launch.Grid, arguments: tuple) -> None:
            self.count += 1
            through_triton(launcher, grid, arguments)

        monkeypatch.setattr(launch.Launcher, "_launch_through_triton", counted)


@pytest.fixture
def through_triton(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def tensors(device: str, *shape: int, count: int) -> list[Tensor]:
    """The same on every device."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).bfloat16().to(device) for _ in range(count)]


def calls(device: str) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Every operator, on tensors made anew by each call."""
    q, k, v = tensors(device, 2, 300, 4, 128, count=3)
    lens = torch.tensor([300, 7], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 200, 300], dtype=torch.int32, device=device)
    (lse,) = (x.float() for x in tensors(device, 2, 4, 300, count=1))
    hidden = tensors(device, 2, 100, 96, count=3)
    long_k, long_v = tensors(device, 1, 3000, 4, 128, count=2)  # so few queries that all tiles are cut along the keys
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    return {
        "attention": lambda: flash_attention(q, k, v, return_lse=True),
        "attention, lengths": lambda: flash_attention(q, k, v, kv_lens=lens, q_lens=lens, return_lse=True),
        "attention, by head": lambda: flash_attention(*by_head, return_lse=True),
        "attention, cut": lambda: flash_attention(q[:1], long_k, long_v, return_lse=True),
        "attention, float32": lambda: flash_attention(q.float(), k.float(), v.float(), return_lse=True),
        "packed": lambda: flash_attention_varlen(q[0], k[0], v[0], starts, starts, 200, 200, return_lse=True),
        "merge_states": lambda: merge_states(q, lse, k, lse.flip(0)),
        "residual_diff": lambda: residual_diff(*hidden),
        "residual_diff, first": lambda: residual_diff(hidden[0], hidden[1]),
    }


@pytest.mark.parametrize("name", calls("cpu"))
def test_same_result_as_launched_by_triton(name: str, through_triton: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    call = calls("cuda")[name]
    call()
    through_triton.count = 0
    direct = call()
    assert through_triton.count == 0
    monkeypatch.setattr(launch, "_launch_hooks", lambda: True)
    by_triton = call()
    assert through_triton.count > 0
    for ours, theirs in zip(direct, by_triton, strict=True):
        assert torch.equal(ours, theirs)


def test_work_is_in_the_current_stream(through_triton: Counter) -> None:
    """A stream that is kept busy: what runs in another one would not see the inputs that come after."""
    q, k, v = tensors("cuda", 1, 256, 2, 64, count=3)
    expected = flash_attention(q, k, v)
    late = [torch.zeros_like(x) for x in (q, k, v)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    through_triton.count = 0
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for target, source in zip(late, (q, k, v), strict=True):
            target.copy_(source)
        out = flash_attention(*late)
    stream.synchronize()
    assert through_triton.count == 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", calls("cpu"))
def test_replays_in_a_graph(name: str, through_triton: Counter) -> None:
    call = calls("cuda")[name]
    expected = call()
    through_triton.count = 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for out in captured:
        out.zero_()
    graph.replay()
    assert through_triton.count == 0
    for out, wanted in zip(captured, expected, strict=True):
        assert torch.equal(out, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", calls("cpu"))
def test_runs_on_the_device_of_its_tensors(name: str) -> None:
    """The first device stays current; the second call of each is direct."""
    results = {}
    for device in ("cuda:0", "cuda:1"):
        call = calls(device)[name]
        call()
        results[device] = call()
        assert torch.cuda.current_device() == 0
    for one, other in zip(*results.values(), strict=True):
        assert one.device.index == 0
        assert other.device.index == 1
        torch.testing.assert_close(one, other, check_device=False)
