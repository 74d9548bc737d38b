"""What is left to cuDNN: at which sizes, and that its results are handed on. A stand-in plays cuDNN on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
_C = pytest.importorskip("para_kernels._C")

from para_kernels import flash_attention  # noqa: E402
from para_kernels.triton_kernels import cudnn_attention, dispatch, hopper_choice, launch  # noqa: E402
from tests.reference import TOLERANCES, attention_batch, error  # noqa: E402

SCALE = 0.3
SHAPE = (2, 128, 350, 128)  # 700 tiles of 128 rows: 5.3 times 132 multiprocessors


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "samples", "expected"),
    [
        (512, 512, 24, 4, True),
        (512, 512, 24, 3, False),
        (512, 512, 24, 1, False),
        (512, 512, 24, 8, False),
        (384, 384, 24, 4, False),
        (128, 128, 24, 4, False),
        (2048, 2048, 24, 1, False),
        (4096, 128, 24, 1, True),
        (8192, 128, 24, 1, True),
        (2048, 128, 24, 1, False),
        (4096, 256, 24, 1, False),
        (4096, 64, 24, 1, False),
    ],
)
def test_the_sizes(queries: int, keys: int, heads: int, samples: int, expected: bool) -> None:
    assert hopper_choice.is_cudnn_faster(128, queries, keys, heads, samples, 132) is expected
    assert not hopper_choice.is_cudnn_faster(64, queries, keys, heads, samples, 132)


PROPERTIES = SimpleNamespace(multi_processor_count=132)


class Stand:
    """In for `aten::_scaled_dot_product_cudnn_attention` on the CPU: exact, and laid out like q, as cuDNN's."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: object, with_lse: bool, *rest: object, scale: float):
        assert bias is None and with_lse and not any(rest)  # noqa: PT018
        self.calls += 1
        scores = q.float() @ k.float().transpose(2, 3) * scale
        out = torch.empty_like(q)
        out.copy_(scores.softmax(-1) @ v.float())
        lse = scores.logsumexp(-1, keepdim=True)
        none = torch.empty(0)
        return out, lse, none, none, q.shape[2], k.shape[2], none, none, none


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    launch.use_extension(_C)
    cudnn_attention._is_planned.cache_clear()
    stand = Stand()
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention", stand, "CPU")
    yield stand
    library._destroy()
    launch.use_extension(None)
    cudnn_attention._is_planned.cache_clear()


def inputs(*shape: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator).bfloat16() for _ in range(3))


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    dispatch.attention_forward(q, k, v, out, lse, None, None, SCALE, capability=(9, 0))
    return out, lse


def test_the_first_call_and_those_that_follow(stand: Stand) -> None:
    q, k, v = inputs(*SHAPE)
    first = forward(q, k, v)
    assert stand.calls == 1
    expected, expected_lse = attention_batch(q, k, v, scale=SCALE)
    assert error(first[0], expected) < TOLERANCES[torch.bfloat16]
    assert error(first[1], expected_lse) < 1e-5
    later = _C.cuda_attention(q, k, v, None, None, SCALE)
    assert stand.calls == 2
    for ours, theirs in zip(later, first, strict=True):
        assert ours.equal(theirs)
        assert ours.is_contiguous()
    _, other = _C.cuda_attention(q, k, v, None, None, 2 * SCALE)
    assert error(other, attention_batch(q, k, v, scale=2 * SCALE)[1]) < 1e-5


def test_calls_that_are_like_it_but_for_lengths_or_strides_are_not_left_to_it(stand: Stand) -> None:
    q, k, v = inputs(*SHAPE)
    forward(q, k, v)
    passed_on: list[bool] = []
    _C.use_attention_forward(lambda *arguments: passed_on.append(True))
    try:
        lens = torch.full((SHAPE[0],), 7, dtype=torch.int32)
        _C.cuda_attention(q, k, v, None, lens, SCALE)
        _C.cuda_attention(q, k, v, lens, None, SCALE)
        _C.cuda_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, None, None, SCALE)
        _C.forget_attention_plans()
        _C.cuda_attention(q, k, v, None, None, SCALE)
    finally:
        from para_kernels import ops

        _C.use_attention_forward(ops._attention_forward)
    assert len(passed_on) == 4
    assert stand.calls == 1


def test_what_it_refuses_is_left_to_the_other_kernels(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("cuDNN: no engine")

    monkeypatch.setattr(Stand, "__call__", refuse)
    q, k, v = inputs(*SHAPE)
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    assert not cudnn_attention.cudnn_attention_forward(q, k, v, out, lse, SCALE)
    by_head = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not cudnn_attention.cudnn_attention_forward(by_head, k, v, out, lse, SCALE)


def test_without_the_extension_it_is_never_asked(stand: Stand) -> None:
    launch.use_extension(None)
    q, k, v = inputs(*SHAPE)
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    assert not cudnn_attention.cudnn_attention_forward(q, k, v, out, lse, SCALE)
    assert stand.calls == 0


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(*SHAPE, device="cuda").to(dtype) for _ in range(3))
    results = [flash_attention(q, k, v, scale=SCALE, return_lse=True) for _ in range(3)]
    expected, expected_lse = attention_batch(q, k, v, scale=SCALE)
    for out, lse in results:
        assert error(out, expected) < TOLERANCES[dtype]
        assert error(lse, expected_lse) < 1e-4
        assert out.equal(results[0][0])
        assert out.is_contiguous()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        captured = flash_attention(q, k, v, scale=SCALE)
    q.copy_(q.flip(0))
    graph.replay()
    assert captured.equal(flash_attention(q, k, v, scale=SCALE))
