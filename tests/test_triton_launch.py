"""Launches from C++: byte for byte those of Triton's own launcher, on a CUDA driver that only takes notes."""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
_C = pytest.importorskip("para_kernels._C")
if torch.cuda.is_available():
    pytest.skip("the fake driver cannot stand beside a real one", allow_module_level=True)

import triton.language as tl  # noqa: E402
from fake_cuda import CONTEXT, STREAM, FakeCuda, Launch, parameter_sizes, use_in_triton  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma  # noqa: E402
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: E402

from para_kernels import ops  # noqa: E402
from para_kernels.triton_kernels import (  # noqa: E402
    attention,
    dispatch,
    hopper_attention,
    hopper_ring_attention,
    launch,
    merge_states,
    residual_diff,
    ring_attention,
    tail,
)
from para_kernels.triton_kernels.launch import Launcher, declared_sizes  # noqa: E402

CPU = torch.device("cpu")
OTHER_CONTEXT = 0x5000
PROPERTIES = SimpleNamespace(multi_processor_count=132)
# Its name up to Triton 3.7, and the one since.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCuda]:
    fake = FakeCuda(tmp_path_factory.mktemp("cuda"))
    use_in_triton(fake)
    yield fake
    triton.runtime.driver._active = None


@pytest.fixture(autouse=True)
def fresh(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The extension in use, and no launch prepared yet."""
    monkeypatch.setattr(launch, "_current_stream", lambda index: STREAM)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    launch.use_extension(_C, str(fake.path))
    for module in (attention, hopper_attention, hopper_ring_attention, merge_states, residual_diff, ring_attention):
        module._plan.cache_clear()
    for launchers in (
        attention._launcher,
        merge_states._launcher,
        residual_diff._launcher,
        residual_diff._sums_launcher,
        ring_attention._launcher,
        hopper_ring_attention._launcher,
        ring_attention._packer,
        tail._launcher,
    ):
        launchers.cache_clear()
    hopper_attention._launchers.cache_clear()
    hopper_attention._compiled.clear()
    yield
    launch.use_extension(None)
    fake.set_context(CONTEXT)
    fake.fail_with(0)


# --- the same bytes as through Triton ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=("narrow", "wide"))
def _numbers(out, narrow, wide, real, absent, N: tl.constexpr):
    if absent is not None:
        real += 1.0
    tl.store(out + tl.arange(0, N), (narrow + wide).to(tl.float32) + real)


@gluon.jit
def _copy(source, row, tile, ready):
    mbarrier.expect(ready, source.block_type.nbytes)
    load_tile(source, [0, 0, row, 0], ready, tile)


@gluon.jit
def _wait(out, row, ready):
    mbarrier.wait(ready, 0)
    gl.store(out, row)


@gluon.jit(do_not_specialize=("row",))
def _specialised_warps(source, out, row, num_warps: gl.constexpr):
    tile = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    gl.warp_specialize([(_wait, (out, row, ready)), (_copy, (source, row, tile, ready))], [1], [24])


def tensors(*shape: int, count: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(*shape).to(dtype) for _ in range(count)]


def attend(**changes: Any) -> Callable[[], None]:
    """Attention over (2, 40, 4, 64), with other arguments in `changes`."""
    q, k, v, out = tensors(2, 40, 4, 64, count=4)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "out": out, "lse": torch.empty(2, 4, 40), "capability": (9, 0)}
    arguments |= {"q_lens": None, "kv_lens": None, "scale": 0.125} | changes
    return lambda: attention.attention_forward(**arguments)


def attend_on_hopper(q_lens: Tensor | None = None, kv_lens: Tensor | None = None) -> Callable[[], bool]:
    q, k, v, out = tensors(2, 40, 4, 64, count=4)
    lse = torch.empty(2, 4, 40)
    return lambda: hopper_attention.hopper_attention_forward(q, k, v, out, lse, q_lens, kv_lens, 0.125)


def attend_packed() -> Callable[[], None]:
    q, k, v, out = tensors(40, 4, 64, count=4)
    starts, lse = torch.tensor([0, 30, 40], dtype=torch.int32), torch.empty(4, 40)
    return lambda: attention.attention_forward(
        q, k, v, out, lse, starts, starts, 0.125, packed_max_q=30, capability=(9, 0)
    )


def attend_in_pieces(kv_lens: Tensor | None = None, **changes: Any) -> Callable[[], None]:
    """Epoch 5 of a ring of two: pieces of 40 and 30 rows."""
    q, out = tensors(2, 40, 4, 64, count=2)
    (memory,) = tensors(1200, 64)
    table = torch.tensor([[3, 0, 40], [700, 40, 30]], dtype=torch.int32)
    flags, error = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    pieces = ring_attention.Pieces(memory, table, flags, 2, 5, error, 1.0)
    arguments: dict[str, Any] = {"kv_heads": 4, "own_start": 0, "capability": (9, 0)} | changes
    lse = torch.empty(2, 4, 40)
    if arguments.pop("hopper", False):
        return lambda: dispatch.ring_attention_forward(q, pieces, 70, out, lse, None, kv_lens, 0.125, **arguments)()
    return lambda: ring_attention.ring_attention_forward(q, pieces, out, lse, None, kv_lens, 0.125, **arguments)


def pack() -> Callable[[], None]:
    k, v = tensors(2, 40, 4, 64, count=2)
    (memory,) = tensors(1200, 64)
    return lambda: ring_attention.pack_piece(k, v, memory, 7)


def specialised_warps() -> Callable[[], None]:
    (source,) = tensors(2, 100, 4, 64)
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, 32, 64], gl.bfloat16)
    launcher = Launcher(
        _specialised_warps, CPU, {"source": lambda *x: TensorDescriptor(*x, [1, 1, 32, 64], layout)}, num_warps=4
    )
    out = torch.zeros(1, dtype=torch.int32)
    shape, strides = (2, 4, 100, 64), (100 * 256, 64, 256, 1)
    return lambda: launcher((3, 2, 1), (source, shape, strides), out, 7)


def numbers(narrow: object = -3, wide: object = 2**40, real: object = 0.1, absent: object = None) -> Callable[[], None]:
    out = torch.empty(8)
    launcher = Launcher(_numbers, CPU, N=8, num_warps=1)
    return lambda: launcher((1, 1, 1), out, narrow, wide, real, absent)


LENS = torch.tensor([40, 7], dtype=torch.int32)
STORED_BY_HEAD = tensors(2, 4, 40, 64)[0].transpose(1, 2)
CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "attention": attend,
    "attention, lengths": lambda: attend(q_lens=LENS, kv_lens=LENS),
    "attention, one length": lambda: attend(kv_lens=LENS),
    "attention, pointers": lambda: attend(capability=(8, 0)),
    "attention, keys by head": lambda: attend(k=STORED_BY_HEAD),
    "attention, not aligned": lambda: attend(v=tensors(2 * 40 * 4 * 64 + 1)[0][1:].view(2, 40, 4, 64)),
    "attention, packed": attend_packed,
    "hopper attention": attend_on_hopper,
    "hopper attention, lengths": lambda: attend_on_hopper(q_lens=LENS, kv_lens=LENS),
    "attention in pieces": attend_in_pieces,
    "attention in pieces, Hopper": lambda: attend_in_pieces(LENS, hopper=True),
    "attention in pieces, lengths": lambda: attend_in_pieces(LENS),
    "attention in pieces, pointers": lambda: attend_in_pieces(LENS, capability=(8, 0)),
    "a piece": pack,
    "gluon, four dimensions": specialised_warps,
    "numbers": numbers,
    "numbers, an optional tensor": lambda: numbers(absent=torch.empty(1)),
}


@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_same_launch_as_triton(fake: FakeCuda, make: Callable[[], Callable[[], object]]) -> None:
    call = make()
    (by_triton,) = fake.launches_of(call)
    (direct,) = fake.launches_of(call)
    assert (by_triton.by_triton, direct.by_triton) == (True, False)
    by_triton.by_triton = False
    assert direct == by_triton
    assert len(direct.parameters) > 3


def address(parameter: bytes) -> int:
    (pointer,) = struct.unpack("Q", parameter)
    return pointer


def test_same_launches_of_residual_diff(fake: FakeCuda) -> None:
    hidden = tensors(2, 40, 96, count=3)
    kept = []
    by_triton = fake.launches_of(lambda: kept.append(residual_diff.residual_diff_forward(*hidden)))
    direct = fake.launches_of(lambda: kept.append(residual_diff.residual_diff_forward(*hidden)))
    assert [launch.by_triton for launch in (*by_triton, *direct)] == [True, True, False, False]
    for launches, (residual, sums) in zip((by_triton, direct), kept, strict=True):
        difference, total = launches
        assert [address(p) for p in difference.parameters[:4]] == [x.data_ptr() for x in (*hidden, residual)]
        assert address(total.parameters[1]) == sums.data_ptr()
    for one, other in zip(by_triton, direct, strict=True):
        assert (one.function, one.grid, one.block, one.shared_bytes) == (
            other.function,
            other.grid,
            other.block,
            other.shared_bytes,
        )
        assert [p for p in one.parameters if len(p) < 8] == [p for p in other.parameters if len(p) < 8]


@pytest.mark.parametrize("shape", [(2, 40, 3, 64), (40, 3, 64)], ids=["batch", "packed"])
def test_same_launch_of_merge_states(fake: FakeCuda, shape: tuple[int, ...]) -> None:
    states = [*tensors(*shape, count=2), *tensors(*shape[:-3], 3, 40, count=2, dtype=torch.float32)]
    out_a, out_b, lse_a, lse_b = states
    kept = []
    call = lambda: kept.append(merge_states.merge_states_forward(out_a, lse_a, out_b, lse_b))  # noqa: E731
    (by_triton,), (direct,) = fake.launches_of(call), fake.launches_of(call)
    assert (by_triton.by_triton, direct.by_triton) == (True, False)
    for one, outputs in zip((by_triton, direct), kept, strict=True):
        expected = [x.data_ptr() for x in (out_a, lse_a, out_b, lse_b, *outputs)]
        assert [address(p) for p in one.parameters[:6]] == expected
    assert (direct.grid, direct.parameters[6:]) == (by_triton.grid, by_triton.parameters[6:])


def test_the_assembly_declares_what_the_binary_holds(fake: FakeCuda) -> None:
    for make in (attend, specialised_warps, numbers):
        make()()
    for kernel in (attention._attention_fwd, _specialised_warps, _numbers):
        compiled = next(iter(kernel.device_caches[0][0].values()))
        assert declared_sizes(compiled.asm["ptx"]) == parameter_sizes(compiled.asm["cubin"])


# --- attention without Python between the operator and the driver -----------------------------------------------------


class Attention:
    """What the operators run on CUDA, on tensors of the CPU, and the calls that Python got to see."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.in_python = 0
        self.capability = capability

    def forward(self, *arguments: Any) -> None:
        self.in_python += 1
        *tensors, packed_max_q = arguments
        dispatch.attention_forward(*tensors, packed_max_q=packed_max_q, capability=self.capability)

    def __call__(self, *arguments: Any, packed_max_q: int | None = None) -> tuple[Tensor, Tensor]:
        return _C.cuda_attention(*arguments, 0.125, packed_max_q)


@pytest.fixture(params=[(9, 0), (8, 0)], ids=["hopper", "portable"])
def attention_op(request: pytest.FixtureRequest) -> Iterator[Attention]:
    op = Attention(request.param)
    _C.use_attention_forward(op.forward)
    yield op
    _C.use_attention_forward(ops._attention_forward)


STARTS = torch.tensor([0, 30, 40], dtype=torch.int32)
PROBLEMS: dict[str, Callable[[], tuple[tuple[Any, ...], int | None]]] = {
    "no lengths": lambda: ((*tensors(2, 40, 4, 64, count=3), None, None), None),
    "one length": lambda: ((*tensors(2, 40, 4, 64, count=3), None, LENS), None),
    "other length": lambda: ((*tensors(2, 40, 4, 64, count=3), LENS, None), None),
    "lengths": lambda: ((*tensors(2, 40, 4, 64, count=3), LENS, LENS), None),
    "by head": lambda: ((*(x.transpose(1, 2) for x in tensors(2, 4, 40, 64, count=3)), None, None), None),
    "packed": lambda: ((*tensors(40, 4, 64, count=3), STARTS, STARTS), 30),
    "not aligned": lambda: (
        (*(x[1:].view(2, 40, 4, 64) for x in tensors(2 * 40 * 4 * 64 + 1, count=3)), None, None),
        None,
    ),
    "float32": lambda: ((*tensors(2, 40, 4, 64, count=3, dtype=torch.float32), None, None), None),
    "a head dim without a kernel of its own": lambda: ((*tensors(2, 40, 4, 40, count=3), None, LENS), None),
}


def without_outputs(launched: Launch, out: Tensor, lse: Tensor) -> list[object]:
    """A launch with names for the addresses of its outputs."""
    names = {struct.pack("Q", out.data_ptr()): "out", struct.pack("Q", lse.data_ptr()): "lse"}
    parameters = [names.get(p, p) for p in launched.parameters]
    return [launched.function, launched.stream, launched.grid, launched.block, launched.shared_bytes, *parameters]


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_planned_launches_are_those_of_triton(
    fake: FakeCuda, attention_op: Attention, problem: Callable[[], tuple[tuple[Any, ...], int | None]]
) -> None:
    first, packed_max_q = problem()
    second, _ = problem()  # other tensors, at other addresses
    kept = []
    launches = [
        fake.launches_of(lambda arguments=arguments: kept.append(attention_op(*arguments, packed_max_q=packed_max_q)))
        for arguments in (first, second, first)
    ]
    assert attention_op.in_python == 1
    assert [launched.by_triton for (launched,) in launches] == [True, False, False]
    by_triton, other, direct = (without_outputs(launched, *kept[i]) for i, (launched,) in enumerate(launches))
    assert direct == by_triton
    assert "out" in direct
    assert "lse" in direct
    assert other != direct
    out, lse = kept[1]
    assert (out.shape, out.dtype, lse.dtype) == (first[0].shape, first[0].dtype, torch.float32)
    if packed_max_q is not None:
        assert not out.any()
        assert (lse == float("-inf")).all()


def test_planned_launches_of_cut_tiles_are_those_of_triton(fake: FakeCuda) -> None:
    """Two kernels, and between them memory that is another one in each call."""
    op = Attention((9, 0))
    _C.use_attention_forward(op.forward)
    arguments = (*tensors(1, 700, 4, 64), *tensors(1, 3000, 4, 64, count=2), None, None)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        calls = [fake.launches_of(lambda: kept.append(op(*arguments))) for _ in range(3)]
    finally:
        _C.use_attention_forward(ops._attention_forward)
    assert op.in_python == 1
    assert [[launched.by_triton for launched in launches] for launches in calls] == [[True] * 2] + [[False] * 2] * 2
    named = []
    for (attended, merged), (out, lse) in zip(calls, kept, strict=True):
        scratch = merged.parameters[0]
        assert attended.parameters.count(scratch) == 1
        assert [address(p) for p in merged.parameters[1:3]] == [out.data_ptr(), lse.data_ptr()]
        kernels = (without_outputs(attended, out, lse), without_outputs(merged, out, lse))
        named.append([["scratch" if p == scratch else p for p in kernel] for kernel in kernels])
    assert named[1] == named[0]
    assert named[2] == named[0]


def test_a_cut_that_triton_has_to_merge_leaves_no_plan(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    op = Attention((9, 0))
    _C.use_attention_forward(op.forward)
    direct = launch._direct_launch
    refused: list[str] = []

    def without_merging(compiled: Any, device: torch.device) -> Any:
        if "merge" in compiled.metadata.name:
            refused.append(compiled.metadata.name)
            return "for this test"
        return direct(compiled, device)

    monkeypatch.setattr(launch, "_direct_launch", without_merging)
    arguments = (*tensors(1, 700, 4, 64), *tensors(1, 3000, 4, 64, count=2), None, None)
    try:
        for calls in (1, 2):
            assert len(fake.launches_of(lambda: op(*arguments))) == 2
            assert op.in_python == calls
    finally:
        _C.use_attention_forward(ops._attention_forward)
    assert refused


def test_calls_unlike_the_planned_ones_go_through_python(fake: FakeCuda, attention_op: Attention) -> None:
    """Each property that a launch depends on, changed alone: one call in Python per kind, and none for the same again."""
    q, k, v = tensors(2, 40, 4, 64, count=3)
    odd = tensors(2 * 40 * 4 * 64 + 1)[0][1:].view(2, 40, 4, 64)
    by_head = tensors(2, 4, 40, 64)[0].transpose(1, 2)
    kinds: list[tuple[Any, ...]] = [
        (q, k, v, None, None), (q, k, v, LENS, None), (q, k, v, None, LENS), (q, k, v, LENS, LENS),
        (odd, k, v, None, None), (q, odd, v, None, None), (q, k, odd, None, None),
        (by_head, k, v, None, None), (q, by_head, v, None, None), (q, k, by_head, None, None),
        (q[:, :39], k, v, None, None), (q, k[:, :39], v[:, :39], None, None), (q[:1], k[:1], v[:1], None, None),
        (q, k[:, :, :2], v[:, :, :2], None, None), (q.half(), k.half(), v.half(), None, None),
        (q[..., :32], k[..., :32], v[..., :32], None, None),
    ]  # fmt: skip
    for _ in range(2):
        for arguments in kinds:
            assert len(fake.launches_of(lambda arguments=arguments: attention_op(*arguments))) == 1
        assert attention_op.in_python == len(kinds)


def test_planned_launches_stop_for_hooks_and_other_extensions(fake: FakeCuda, attention_op: Attention) -> None:
    arguments = (*tensors(2, 40, 4, 64, count=3), None, None)
    call = lambda: attention_op(*arguments)  # noqa: E731
    call()
    assert not fake.launches_of(call)[0].by_triton
    told: list[object] = []
    triton.knobs.runtime.launch_exit_hook.add(told.append)
    try:
        assert fake.launches_of(call)[0].by_triton
    finally:
        triton.knobs.runtime.launch_exit_hook.remove(told.append)
    assert len(told) == 1
    assert not fake.launches_of(call)[0].by_triton
    assert attention_op.in_python == 2
    launch.use_extension(None)
    call()
    assert attention_op.in_python == 3


def test_a_kernel_called_by_itself_leaves_no_plan(fake: FakeCuda, attention_op: Attention) -> None:
    """Or the operator would launch it from then on, whatever `dispatch` says."""
    q, k, v = tensors(2, 40, 4, 64, count=3)
    out, lse = torch.empty_like(q), torch.empty(2, 4, 40)
    attention.attention_forward(q, k, v, out, lse, None, None, 0.125, capability=(9, 0))
    assert fake.launches_of(lambda: attention_op(q, k, v, None, None))
    assert attention_op.in_python == 1


def test_new_numbers_of_rows_share_a_compiled_residual_diff() -> None:
    plans = [
        residual_diff._plan((1, rows, 64), ((64 * rows, 64, 1),) * 3, torch.float32, CPU) for rows in (1, 3, 8, 1000)
    ]
    assert len({plan.launcher for plan in plans}) == 1


def test_a_plan_needs_a_launch_of_the_extension() -> None:
    (q,) = tensors(2, 40, 4, 64)
    plan = {
        "grid": (1, 1, 1),
        "sources": (None, None, None),
        "has_scratch": False,
        "lens_are_pointers": False,
        "integers": (),
    }
    with pytest.raises(TypeError, match="launch: must come from kernel_launcher"):
        _C.keep_attention_plan(
            q=q, k=q, v=q, q_lens=None, kv_lens=None, packed_max_q=None, launch=lambda *arguments: True, **plan
        )


# --- what must not be launched directly -------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Tensor], dict[str, object]]] = {
    "dtype": lambda x: {"out": x.half()},
    "alignment": lambda x: {"out": torch.empty(9)[1:]},
    "an integer of 64 bits": lambda x: {"narrow": 2**40},
    "an integer of 32 bits": lambda x: {"wide": 2},
    "a tensor where none was": lambda x: {"absent": x},
    "an integer for a float": lambda x: {"real": 2},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_another_variant_goes_through_triton(fake: FakeCuda, change: Callable[[Tensor], dict[str, object]]) -> None:
    out = torch.empty(8)
    usual: dict[str, object] = {"out": out, "narrow": 3, "wide": 2**40, "real": 0.5, "absent": None}
    launcher = Launcher(_numbers, CPU, N=8, num_warps=1)
    for arguments, by_triton in ((usual, [True, False]), (usual | change(out), [True])):
        for expected in by_triton:
            (launched,) = fake.launches_of(lambda arguments=arguments: launcher((1, 1, 1), *arguments.values()))
            assert launched.by_triton == expected
    first, second = (compiled.src for compiled in launcher._launches)
    assert (first.signature, first.attrs) != (second.signature, second.attrs)


def test_after_another_variant_both_are_launched_directly(fake: FakeCuda) -> None:
    launcher = Launcher(_numbers, CPU, N=8, num_warps=1)
    calls = [
        lambda out=out: launcher((1, 1, 1), out, 1, 2**40, 0.5, None) for out in (torch.empty(8), torch.empty(8).half())
    ]
    kinds = [[fake.launches_of(call)[0].by_triton for _ in range(2)] for call in (*calls, *calls)]
    # The variant in use changes through Triton, which knows both by now.
    assert kinds == [[True, False]] * 4
    assert len(launcher._launches) == 2


@pytest.mark.parametrize(
    "source",
    [
        lambda x: (x, (2, 4, 100, 64), (100 * 256, 64, 252, 1)),
        lambda x: (x.flatten()[1:], (1, 4, 10, 64), (100 * 256, 64, 256, 1)),
        lambda x: (x, (2, 4, 0, 64), (100 * 256, 64, 256, 1)),
        lambda x: (x, (2, 4, 100, 32), (100 * 256, 64, 256, 2)),
    ],
    ids=["stride", "start", "empty", "innermost stride"],
)
def test_descriptors_that_the_copy_engine_cannot_use_are_refused(
    fake: FakeCuda, source: Callable[[Tensor], object]
) -> None:
    (x,) = tensors(2, 100, 4, 64)
    layout = gl.NVMMASharedLayout.get_default_for([1, 1, 32, 64], gl.bfloat16)
    make = {"source": lambda *arguments: TensorDescriptor(*arguments, [1, 1, 32, 64], layout)}
    launcher = Launcher(_specialised_warps, CPU, make, num_warps=4)
    out = torch.zeros(1, dtype=torch.int32)
    launcher((1, 1, 1), (x, (2, 4, 100, 64), (100 * 256, 64, 256, 1)), out, 0)
    assert launcher.not_direct is None
    with pytest.raises(AssertionError):  # Triton's, in words of its own
        launcher((1, 1, 1), source(x), out, 0)


def test_lengths_may_start_anywhere(fake: FakeCuda, attention_op: Attention) -> None:
    """A slice of the lengths of a larger batch compiles nothing, and is launched as directly as the others."""
    q, k, v = tensors(2, 40, 4, 64, count=3)
    lens = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32)
    kinds, compiled = [], []
    for first in (0, 1, 2):
        part = lens[first : first + 2]
        (launched,) = fake.launches_of(lambda part=part: attention_op(q, k, v, part, part))
        kinds.append(launched.by_triton)
        compiled.append(dispatch.compile_count())
    assert kinds == [True, False, False]
    assert len(set(compiled)) == 1


def test_tensors_of_another_device_are_not_launched(fake: FakeCuda) -> None:
    launcher = Launcher(_numbers, CPU, N=8, num_warps=1)
    launcher((1, 1, 1), torch.empty(8), 1, 2**40, 0.5, None)
    direct = launcher._direct
    assert direct is not None
    elsewhere = torch.empty(8, device="meta")
    assert fake.launches_of(lambda: direct((1, 1, 1), STREAM, (elsewhere, 1, 2**40, 0.5, None))) == []


def options(**changes: object) -> SimpleNamespace:
    """Metadata of a kernel that can be launched directly, with `changes`."""
    plain: dict[str, object] = dict.fromkeys(("launch_cooperative_grid", "launch_pdl"), False)
    plain |= {"num_ctas": 1, "global_scratch_size": 0, "profile_scratch_size": 0, "tensordesc_meta": []}
    plain["target"] = SimpleNamespace(backend="cuda", arch=90)
    return SimpleNamespace(**(plain | changes))


NEEDS: list[tuple[dict[str, object], str]] = [
    ({"num_ctas": 2}, "launch attributes"),
    ({"launch_cooperative_grid": True}, "launch attributes"),
    ({"launch_pdl": True}, "launch attributes"),
    ({"global_scratch_size": 8}, "scratch memory"),
    ({"profile_scratch_size": 8}, "scratch memory"),
    ({"target": SimpleNamespace(backend="hip", arch=90)}, "hip"),
    ({"target": SimpleNamespace(backend="cuda", arch=100), "tensordesc_meta": [{}]}, "tensor maps"),
]


@pytest.mark.parametrize(("changes", "reason"), NEEDS, ids=[next(iter(changes)) for changes, _ in NEEDS])
def test_kernels_with_needs_are_left_to_triton(changes: dict[str, object], reason: str) -> None:
    launch._check_options(options())
    with pytest.raises(launch.NotDirectError, match=reason):
        launch._check_options(options(**changes))


@triton.jit
def _specialised(out, count, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), count)


@pytest.mark.parametrize("count", [1, 16, 2**63], ids=["is one", "divisible by 16", "unsigned"])
def test_specialised_integers_are_left_to_triton(fake: FakeCuda, count: int) -> None:
    launcher = Launcher(_specialised, CPU, N=8)
    for _ in range(2):
        assert fake.launches_of(lambda: launcher((1, 1, 1), torch.empty(8), count))[0].by_triton
    assert launcher.not_direct is not None
    assert launcher.not_direct.startswith("the argument count is")


def test_a_layout_unlike_the_assembly_is_refused(fake: FakeCuda) -> None:
    plain = {"function": 1, "threads": 32, "shared_bytes": 0, "device": CPU, "library": str(fake.path)}
    parameters = [_C.Parameter.pointer(torch.float32, aligned=True), _C.Parameter.int32()]
    _C.kernel_launcher(parameters=parameters, declared=[8, 4, 8, 8], **plain)
    for declared in ([8, 8, 8, 8], [4, 8, 8, 8], [8, 4, 8], [8, 4, 4, 8, 8]):
        with pytest.raises(ValueError, match=r"declared: got parameters of \[.*\] bytes, must be \[8, 4, 8, 8\]"):
            _C.kernel_launcher(parameters=parameters, declared=declared, **plain)
    with pytest.raises(ValueError, match="parameters: got 202 of 1616 bytes"):
        _C.kernel_launcher(parameters=[_C.Parameter.int64()] * 200, declared=[8] * 202, **plain)
    with pytest.raises(ValueError, match="got a descriptor of Int with 2 dimensions"):
        _C.kernel_launcher(parameters=[_C.Parameter.descriptor(torch.int32, [8, 8], 0)], declared=[], **plain)


def test_without_assembly_triton_launches(fake: FakeCuda) -> None:
    call = numbers()
    call()
    compiled = next(iter(_numbers.device_caches[0][0].values()))
    without = SimpleNamespace(metadata=compiled.metadata, src=compiled.src, function=1, asm={})
    assert launch._direct_launch(without, CPU) == "no assembly to compare with"


def test_without_the_extension_triton_launches(fake: FakeCuda) -> None:
    launch.use_extension(None)
    assert [fake.launches_of(call)[0].by_triton for call in [attend()] * 2] == [True, True]


def test_without_a_driver_triton_launches(fake: FakeCuda) -> None:
    launch.use_extension(_C, "libcuda_that_is_not_there.so")
    launcher = Launcher(_numbers, CPU, N=8, num_warps=1)
    for _ in range(2):
        assert fake.launches_of(lambda: launcher((1, 1, 1), torch.empty(8), 1, 2**40, 0.5, None))[0].by_triton
    assert launcher.not_direct is not None
    assert "cannot open the CUDA driver" in launcher.not_direct


def test_launch_hooks_are_called(fake: FakeCuda) -> None:
    call, told = attend(), []
    hooks = triton.knobs.runtime.launch_exit_hook
    fake.launches_of(call)
    hooks.add(told.append)
    try:
        (launched,) = fake.launches_of(call)
    finally:
        hooks.remove(told.append)
    assert launched.by_triton
    assert len(told) == 1


# --- contexts, failures, messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("current", [0, OTHER_CONTEXT], ids=["a new thread", "another device"])
def test_the_context_of_the_kernel_is_current_for_maps_and_launch(fake: FakeCuda, current: int) -> None:
    call = attend()
    call()
    pushed, popped = fake.pushed_and_popped
    fake.set_context(current)
    (launched,) = fake.launches_of(call)
    assert launched.context == CONTEXT
    assert not launched.by_triton
    now_pushed, now_popped = fake.pushed_and_popped
    assert now_pushed - pushed == now_popped - popped > 0


def test_a_failed_launch_raises(fake: FakeCuda) -> None:
    call = attend()
    call()
    fake.fail_with(701)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel: CUDA_ERROR_FAKE \(701\), a fake failure"):
        call()


def test_a_bad_grid_is_refused(fake: FakeCuda) -> None:
    launcher = Launcher(_numbers, CPU, N=8, num_warps=1)
    arguments = (torch.empty(8), 1, 2**40, 0.5, None)
    launcher((1, 1, 1), *arguments)
    for grid in ((-1, 1, 1), (2**31, 1, 1), (1.5, 1, 1)):
        with pytest.raises(ValueError, match="grid: a dimension must lie in"):
            launcher(grid, *arguments)
    assert fake.launches_of(lambda: launcher((0, 1, 1), *arguments)) == []


def test_a_long_first_call_says_what_it_does(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(launch, "_SECONDS_IN_SILENCE", 0.0)
    with caplog.at_level(logging.WARNING, "para_kernels"), launch._announced("_some_kernel"):
        deadline = time.monotonic() + 30
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages == ["compiling the kernel some_kernel, once; it is kept on disk"]


def test_a_short_first_call_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "para_kernels"), launch._announced("_some_kernel"):
        pass
    assert not caplog.messages


@pytest.mark.parametrize(("pieces", "takes"), [(32, True), (33, False)])
def test_the_hopper_ring_takes_so_many_pieces(pieces: int, takes: bool) -> None:
    """More ranks than its memory has places for go to the other kernel."""
    shape, stride = (1, 64, 2, 128), (64 * 256, 256, 128, 1)
    plan = hopper_ring_attention._plan(
        shape, stride, 64 * pieces, pieces, 2, 0, 0, torch.bfloat16, torch.device("cuda", 0)
    )
    assert (plan is not None) == takes
