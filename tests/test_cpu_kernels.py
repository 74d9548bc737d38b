"""The C++ CPU kernels against float64, over shapes, dtypes and strides, called at the operators."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from para_kernels import ops

pytestmark = pytest.mark.skipif(
    not ops.EXTENSION_AVAILABLE, reason="built without the extension (PARA_KERNELS_SKIP_EXT)"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# csrc/kernels/residual_diff.cpp bounds the accumulation by 15 * 2^-24; each difference and the result round once more.
SUM_TOLERANCE = 17 * 2**-24
# norm(out - ref) / norm(ref): half an ulp for the output's own rounding; float32 and float64 also round the weights.
MERGE_TOLERANCES = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-15}
# lse is float32: its rounding is relative to its size, here below 64.
LSE_TOLERANCE = 64 * 2**-24
NO_KEYS = float("-inf")

# Both sides of a vector (4 to 16 elements), of a block of 16 vectors and of the shortest row taken without a copy.
LENGTHS = (1, 3, 7, 8, 9, 16, 31, 32, 33, 127, 128, 129, 500)

residual_diff = torch.ops.para_kernels.residual_diff
merge_states = torch.ops.para_kernels.merge_states


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- tensors of every layout ------------------------------------------------------------------------------------------


def strided(shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """A random tensor of `shape` whose memory is laid out as `layout` says; what lies between its elements is NaN."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "contiguous":
        return values
    if layout == "every second row":
        room = torch.full((shape[0], 2 * shape[1], *shape[2:]), float("nan"), dtype=dtype)
        view = room[:, ::2]
    elif layout == "part of a wider row":
        room = torch.full((*shape[:-1], shape[-1] + 5), float("nan"), dtype=dtype)
        view = room[..., 2 : 2 + shape[-1]]
    elif layout == "transposed rows":
        view = torch.full((shape[1], shape[0], *shape[2:]), float("nan"), dtype=dtype).transpose(0, 1)
    elif layout == "strided elements":
        room = torch.full((*shape[:-1], 2 * shape[-1]), float("nan"), dtype=dtype)
        view = room[..., ::2]
    else:
        raise ValueError(f"layout: got {layout!r}")
    return view.copy_(values)


LAYOUTS = ("contiguous", "every second row", "part of a wider row", "transposed rows", "strided elements")


def relative_error(actual: float, expected: float) -> float:
    return abs(actual - expected) / expected if expected else abs(actual)


# --- residual_diff ----------------------------------------------------------------------------------------------------


def check_residual_diff(hidden_in: Tensor, hidden_out: Tensor, previous: Tensor) -> None:
    residual, sums = residual_diff(hidden_in, hidden_out, previous)
    # The difference of two numbers of these dtypes, rounded once: what float64 (or the dtype itself) gives.
    expected = hidden_out - hidden_in if hidden_in.dtype == torch.float64 else hidden_out.double() - hidden_in.double()
    assert torch.equal(residual, expected.to(hidden_in.dtype))
    assert residual.is_contiguous()
    change = (previous.double() - residual.double()).abs().sum().item()
    reference = previous.double().abs().sum().item()
    assert sums.dtype == torch.float32
    assert relative_error(sums[0].item(), change) <= SUM_TOLERANCE
    assert relative_error(sums[1].item(), reference) <= SUM_TOLERANCE


@settings(deadline=None, max_examples=150)
@given(
    leading=st.tuples(st.integers(1, 3), st.integers(1, 70)),
    row=st.sampled_from(LENGTHS),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    seed=st.integers(0, 2**31),
)
def test_residual_diff_equals_float64(
    leading: tuple[int, int], row: int, dtype: torch.dtype, layouts: tuple[str, str, str], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden_in, hidden_out, previous = (strided((*leading, row), dtype, layout, generator) for layout in layouts)
    check_residual_diff(hidden_in, hidden_out, previous)


@pytest.mark.parametrize("shape", [(), (5,), (40_000,), (2, 3, 4, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_diff_takes_any_number_of_dimensions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_in, hidden_out, previous = (strided(shape, dtype, "contiguous", generator) for _ in range(3))
    check_residual_diff(hidden_in, hidden_out, previous)


def test_residual_diff_reads_expanded_tensors() -> None:
    row = torch.randn(1, 1, 100)
    check_residual_diff(row.expand(3, 50, 100), torch.randn(3, 50, 100), row.expand(3, 50, 100))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-20, 1e30])
def test_residual_diff_sums_do_not_drift(value: float) -> None:
    """Equal numbers round the same way at every addition: one float32 accumulator would be off by 1e-3 here."""
    previous = torch.full((3000, 1111), value)
    _, sums = residual_diff(torch.zeros_like(previous), torch.zeros_like(previous), previous)
    expected = previous.double().sum().item()
    assert relative_error(sums[0].item(), expected) <= SUM_TOLERANCE
    assert relative_error(sums[1].item(), expected) <= SUM_TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_diff_without_previous(dtype: torch.dtype) -> None:
    hidden_in, hidden_out = torch.randn(2, 33, 65).to(dtype), torch.randn(2, 33, 65).to(dtype)
    residual, sums = residual_diff(hidden_in, hidden_out, None)
    assert torch.equal(residual, residual_diff(hidden_in, hidden_out, hidden_in)[0])
    assert sums.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(0,), (0, 7, 3), (2, 0, 64), (2, 7, 0)], ids=str)
def test_residual_diff_of_nothing(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    residual, sums = residual_diff(empty, empty, empty)
    assert residual.shape == shape
    assert sums.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_residual_diff_shows_what_is_not_finite(bad: float) -> None:
    """A broken step must never look like an unchanged one."""
    hidden_in, hidden_out, previous = torch.zeros(300), torch.zeros(300), torch.ones(300)
    hidden_out[299] = bad
    residual, sums = residual_diff(hidden_in, hidden_out, previous)
    assert not torch.isfinite(residual[299])
    assert not torch.isfinite(sums[0])
    assert sums[1].item() == 300.0


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_diff_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [strided((3, 701, 333), dtype, "every second row", generator) for _ in range(3)]
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(residual_diff(*inputs))
    for residual, sums in results[1:]:
        assert torch.equal(residual, results[0][0])
        assert torch.equal(sums, results[0][1])


ROW = torch.zeros(2, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROW.int(), ROW.int(), None), "hidden_in: got dtype Int, allowed are Float"),
        ((ROW, ROW.half(), None), "hidden_out: got dtype Half, must be that of hidden_in, Float"),
        ((ROW, ROW[:, :39], None), r"hidden_out: got shape \[2, 39\], must be that of hidden_in, \[2, 40\]"),
        ((ROW, ROW, ROW.double()), "previous: got dtype Double, must be that of hidden_in, Float"),
        ((ROW, ROW, ROW[:1]), r"previous: got shape \[1, 40\], must be that of hidden_in, \[2, 40\]"),
    ],
)
def test_residual_diff_refuses(arguments: tuple[Tensor, Tensor, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_diff(*arguments)


# --- merge_states -----------------------------------------------------------------------------------------------------


def merged_in_float64(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """softmax over the two states, through torch.softmax of the stacked lse; states without keys weigh nothing."""
    lse = torch.stack([lse_a, lse_b]).double()
    weights = torch.softmax(lse, 0).nan_to_num(0.0).transpose(-1, -2).unsqueeze(-1)
    outs = torch.stack([out_a, out_b]).double()
    return torch.where(weights > 0, outs * weights, 0.0).sum(0), torch.logsumexp(lse, 0)


def check_merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    expected, expected_lse = merged_in_float64(out_a, lse_a, out_b, lse_b)
    assert out.dtype == out_a.dtype
    assert lse.dtype == lse_a.dtype
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert torch.isfinite(out).all()
    assert (out.double() - expected).norm() <= MERGE_TOLERANCES[out.dtype] * expected.norm()
    no_keys = expected_lse == NO_KEYS
    assert torch.equal(lse == NO_KEYS, no_keys)
    assert ((lse.double() - expected_lse)[~no_keys].abs() <= LSE_TOLERANCE).all()


@settings(deadline=None, max_examples=150)
@given(
    batch=st.sampled_from([None, 1, 2]),
    length=st.integers(1, 40),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([1, 7, 8, 33, 64, 96, 128]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    lse_transposed=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_merge_states_equals_float64(
    batch: int | None,
    length: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    layouts: tuple[str, str],
    lse_transposed: bool,
    spread: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    leading = () if batch is None else (batch,)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = []
    for layout in layouts:
        out = strided((*leading, length, heads, head_dim), dtype, layout, generator)
        lse = torch.randn(*leading, heads, length, generator=generator, dtype=lse_dtype) * spread
        lse[torch.rand(lse.shape, generator=generator) < 0.2] = NO_KEYS
        # Rows without keys are never read, so that what stands in them cannot matter.
        out[(lse == NO_KEYS).transpose(-1, -2)] = float("nan")
        if lse_transposed:
            lse = lse.transpose(-1, -2).contiguous().transpose(-1, -2)
        arguments += [out, lse]
    check_merge_states(*arguments)


def test_merge_states_without_keys_on_both_sides() -> None:
    out, lse = torch.full((1, 3, 2, 64), float("nan")), torch.full((1, 2, 3), NO_KEYS)
    merged, merged_lse = merge_states(out, lse, out, lse)
    assert torch.equal(merged, torch.zeros_like(out))
    assert torch.equal(merged_lse, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_states_with_one_empty_side_is_the_other_bit_for_bit(dtype: torch.dtype) -> None:
    out, lse = torch.randn(1, 9, 2, 65).to(dtype), torch.randn(1, 2, 9) * 30
    empty, empty_lse = torch.zeros_like(out), torch.full_like(lse, NO_KEYS)
    for merged, merged_lse in (merge_states(out, lse, empty, empty_lse), merge_states(empty, empty_lse, out, lse)):
        assert torch.equal(merged, out)
        assert torch.equal(merged_lse, lse)


def test_merge_states_does_not_overflow() -> None:
    """exp(1000) is no number in float32; the difference of the two lse is all that counts."""
    out_a, out_b = torch.full((2, 1, 40), 1.0), torch.full((2, 1, 40), 3.0)
    lse = torch.tensor([[1000.0, -1000.0]])
    merged, merged_lse = merge_states(out_a, lse, out_b, lse)
    assert torch.equal(merged, torch.full((2, 1, 40), 2.0))
    torch.testing.assert_close(merged_lse, lse + torch.tensor(2.0).log(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("shape", [(0, 5, 2, 64), (2, 0, 2, 64), (2, 5, 0, 64), (2, 5, 2, 0), (0, 2, 64)], ids=str)
def test_merge_states_of_nothing(shape: tuple[int, ...]) -> None:
    out, lse = torch.empty(shape), torch.zeros(*shape[:-3], shape[-2], shape[-3])
    merged, merged_lse = merge_states(out, lse, out, lse)
    assert merged.shape == shape
    assert merged_lse.shape == lse.shape


@pytest.mark.usefixtures("threads")
def test_merge_states_does_not_depend_on_threads() -> None:
    arguments = [torch.randn(2, 301, 3, 64), torch.randn(2, 3, 301), torch.randn(2, 301, 3, 64), torch.randn(2, 3, 301)]
    torch.set_num_threads(1)
    alone = merge_states(*arguments)
    torch.set_num_threads(4)
    together = merge_states(*arguments)
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


OUT, LSE = torch.zeros(2, 5, 3, 8), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((OUT.int(), LSE, OUT, LSE), "out_a: got dtype Int, allowed are Float"),
        ((OUT[0, 0], LSE, OUT, LSE), r"out_a: got shape \[3, 8\], must be \(B, S, H, D\) or \(T, H, D\)"),
        ((OUT, LSE, OUT.half(), LSE), "out_b: got dtype Half, must be that of out_a, Float"),
        ((OUT, LSE, OUT[:, :4], LSE), r"out_b: got shape \[2, 4, 3, 8\], must be that of out_a"),
        ((OUT, LSE.half(), OUT, LSE), "lse_a: got dtype Half, must be Float"),
        ((OUT, LSE, OUT, LSE.double()), "lse_b: got dtype Double, must be Float"),
        ((OUT, LSE.mT, OUT, LSE), r"lse_a: got shape \[2, 5, 3\], must be \[2, 3, 5\]"),
        ((OUT[0], LSE[0], OUT[0], LSE), r"lse_b: got shape \[2, 3, 5\], must be \[3, 5\]"),
    ],
)
def test_merge_states_refuses(arguments: tuple[Tensor, Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_states(*arguments)


def test_build_info_names_the_torch_that_runs() -> None:
    """Another torch than the one compiled against may lay out its tensors differently."""
    from para_kernels import _C

    info = _C.build_info()
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["cpu_capability"] in ("DEFAULT", "AVX2")
    assert re.match(r"(gcc|clang) \d+", info["compiler"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads the libraries of an ELF file")
def test_the_threads_are_those_of_torch() -> None:
    """Parallel, and in torch's OpenMP runtime: one of its own would start as many threads again."""
    from para_kernels import _C

    assert _C.build_info()["openmp"]
    needed = subprocess.run(["ldd", str(_C.__file__)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert not re.search(r"lib(g|i)?omp", needed)


# --- the kernels for a processor without AVX2 -------------------------------------------------------------------------

RUN_PORTABLE = """
import json, torch
from para_kernels import _C, ops
# Integers, because torch.randn itself draws other numbers with other instructions.
def draw(*shape):
    return torch.randint(-999, 1000, shape, generator=generator) / 256

generator = torch.Generator().manual_seed(2)
answers = {"capability": _C.build_info()["cpu_capability"]}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    a, b, c = (draw(3, 40, 77).to(dtype) for _ in range(3))
    lse_a, lse_b = draw(40, 3), draw(40, 3)
    residual, sums = torch.ops.para_kernels.residual_diff(a, b, c)
    out, lse = torch.ops.para_kernels.merge_states(a, lse_a, b, lse_b)
    answers[str(dtype)] = [residual.double().tolist(), sums.tolist(), out.double().tolist(), lse.tolist()]
print(json.dumps(answers))
"""


def run_with_capability(capability: str | None) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    command = [sys.executable, "-c", RUN_PORTABLE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_every_capability_gives_the_same_answers() -> None:
    """The kernels for the oldest processor, which no test machine chooses by itself, against those for this one."""
    from para_kernels import _C

    portable, chosen = run_with_capability("default"), run_with_capability(None)
    assert portable.pop("capability") == "DEFAULT"
    assert chosen.pop("capability") == _C.build_info()["cpu_capability"]
    for dtype, (residual, sums, out, lse) in chosen.items():
        portable_residual, portable_sums, portable_out, portable_lse = (torch.tensor(x) for x in portable[dtype])
        assert torch.equal(portable_residual, torch.tensor(residual))
        torch.testing.assert_close(portable_sums, torch.tensor(sums), rtol=2 * SUM_TOLERANCE, atol=0)
        tolerance = 2 * MERGE_TOLERANCES[getattr(torch, dtype.removeprefix("torch."))]
        torch.testing.assert_close(portable_out, torch.tensor(out), rtol=tolerance, atol=tolerance)
        assert torch.equal(portable_lse, torch.tensor(lse))
