"""The 8-bit kernels compile for sm80, sm89 and sm90 with no GPU, without spills and with what they were written for."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")
import triton
from test_triton_compile import POINTER_TYPES, SHARED_MEMORY, Usage, compile_kernel
from triton.experimental.gluon import language as gl

from para_kernels.triton_kernels import attention_int8, format8, hopper_attention_int8, quantize_int8

VALUE_TYPES = {torch.float8_e4m3fn: "fp8e4nv", torch.float16: "fp16"}
SCALES = ("q_scales", "k_scales", "v_scales", "means_of_scores")
# D = 256 does not fit the registers: the queries, and the accumulators of 64 x 256. Else, what is needed only after the
# loop over keys.
SPILLS = {((8, 0), 256): 292, ((8, 9), 256): 260, ((9, 0), 256): 260, ((8, 9), 128): 4}
# By Triton 3.9: of the Hopper kernel between a program's tiles, of quantisation on sm80.
SPILLS_ELSEWHERE = 0
if not triton.__version__.startswith("3.6."):
    SPILLS_ELSEWHERE = 12
    SPILLS |= {((8, 9), 64): 16, ((8, 9), 128): 16}  # 16 and 12 bytes by Triton 3.9


def compile_attention(capability: tuple[int, int], block_d: int) -> Usage:
    values = attention_int8.value_type(capability)
    config = attention_int8.int8_config(values, block_d)
    signature = {
        "q_ptr": "*i8",
        "k_ptr": "*i8",
        "v_ptr": f"*{VALUE_TYPES[values]}",
        "out_ptr": "*bf16",
        "lse_ptr": "*fp32",
    }
    signature |= dict.fromkeys(SCALES, "*fp32") | {"q_lens": "*i32", "kv_lens": "*i32", "scale_log2": "fp32"}
    constants: dict[str, object] = {
        "D": block_d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d, "STAGES": config.num_stages
    }  # fmt: skip
    return compile_kernel(attention_int8._attention_int8_fwd, signature, constants, capability, config.num_warps)


@pytest.mark.parametrize("block_d", [64, 128, 256])
@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_portable_attention(capability: tuple[int, int], block_d: int) -> None:
    usage = compile_attention(capability, block_d)
    assert usage.shared <= SHARED_MEMORY[capability]
    assert usage.spilled_bytes <= SPILLS.get((capability, block_d), 0)
    if capability == (9, 0):
        assert re.search(r"wgmma\S*\.s32\.s8\.s8", usage.ptx)
        assert re.search(r"wgmma\S*\.f32\.e4m3\.e4m3", usage.ptx)
    else:
        assert re.search(r"mma\.sync\S*\.s32\.s8\.s8\.s32", usage.ptx)
        weights = "e4m3.e4m3" if capability == (8, 9) else "f16.f16"
        assert re.search(rf"mma\.sync\S*\.f32\.{weights}\.f32", usage.ptx)


def compile_quantisation(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> dict[str, Usage]:
    """Every kernel of quantisation, by name."""
    q8 = quantize_int8
    values, source = VALUE_TYPES[attention_int8.value_type(capability)], f"*{POINTER_TYPES[dtype]}"
    width: dict[str, object] = {"WIDTH": format8.rotation_width(head_dim)}
    d: dict[str, object] = {"BLOCK_D": head_dim}
    shape = d | {"D": head_dim, "VEC": 16 // dtype.itemsize}
    loop: dict[str, object] = {"BLOCKS": q8.BLOCKS_OF_PROGRAM, "STAGES": q8.stages_of_loads(head_dim)}
    numbers = (*SCALES, "partial", "k_means", "v_means", "v_errors", "norms")
    types = dict.fromkeys(("q", "k", "v"), source) | dict.fromkeys(numbers, "*fp32") | {"scale": "fp32"}
    types |= {"q_out": "*i8", "k_out": "*i8", "v_out": f"*{values}", "q_lens": "*i32", "kv_lens": "*i32"}
    matrix: dict[str, object] = {}
    if dtype == torch.float32:
        matrix = {"matrix": None}
    else:
        types["matrix"] = source
    finishing = {"COLUMNS": q8._FINISHED_COLUMNS, "MOST_CHUNKS": q8._MOST_CHUNKS}
    mending = {"COLUMNS": q8._MENDED_COLUMNS, "CHUNKS": q8._MENDED_CHUNKS, "BLOCKS": q8.BLOCKS_OF_PROGRAM}
    of_keys, of_queries = (q8.rotating_warps(rows, head_dim) for rows in (q8.K_BLOCK, q8.Q_BLOCK))
    permuted = {"PERMUTED": capability == (9, 0)}
    kernels: dict[str, tuple[object, dict[str, object], int]] = {
        "sums": (q8._sums, shape, q8._WARPS),
        "finish": (q8._finish, d | width | finishing | matrix, q8._WARPS),
        "keys": (q8._quantise_keys, shape | width | loop | matrix, of_keys),
        "queries": (q8._quantise_queries, shape | width | loop | matrix, of_queries),
        "values": (q8._quantise_values, shape | loop | permuted, q8.rounding_warps(head_dim)),
        "mend": (q8._mend_means, d | mending, q8._WARPS),
        "largest": (q8._round_largest, shape | width | permuted | matrix | {"NORMS": q8._NORMS}, max(8, of_keys)),
    }
    if values == "fp8e4nv":
        tried = {"SAMPLE": q8.SCALES_FROM, "TRIED": q8.SCALES_TRIED}
        sizes = {"COLUMNS": q8._CHOSEN_COLUMNS, "ROWS": q8._CHOSEN_ROWS}
        kernels["choose"] = (q8._choose_scales, shape | sizes | tried, q8._CHOSEN_WARPS)
    return {
        name: compile_kernel(kernel, types, constants, capability, warps)
        for name, (kernel, constants, warps) in kernels.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_quantisation(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """Of D = 256, whose blocks of 128 keys do not fit the registers, only the size of the shared memory is asked."""
    kernels = compile_quantisation(capability, head_dim, dtype)
    for name, usage in kernels.items():
        assert usage.shared <= SHARED_MEMORY[capability], name
        assert head_dim == 256 or usage.spilled_bytes <= SPILLS_ELSEWHERE, name
    if dtype == torch.bfloat16 and head_dim <= 128:
        assert "ld.global.v4.b32" in kernels["sums"].ptx, "16-byte loads"
        assert "st.global.v4.b32" in kernels["largest"].ptx, "16-byte stores"
        for name in ("keys", "values", "queries"):
            ptx = kernels[name].ptx
            assert re.search(r"cp.async.cg.shared.global \[[^]]*\], \[[^]]*\], 0x10,", ptx), f"16-byte copies: {name}"
            assert "st.global.v4.b32" in ptx, f"16-byte stores: {name}"


def compile_hopper_attention(head_dim: int, dtype: torch.dtype) -> Usage:
    def descriptor(kind: str, rows: int, columns: int, element: gl.dtype) -> str:
        block = [1, 1, rows, columns]
        return f"tensordesc<{kind}{block},{gl.NVMMASharedLayout.get_default_for(block, element)!r}>"

    signature = {
        "q": descriptor("i8", 64, head_dim, gl.int8),
        "k": descriptor("i8", quantize_int8.K_BLOCK, head_dim, gl.int8),
        "v": descriptor("fp8e4nv", head_dim, quantize_int8.K_BLOCK, gl.float8e4nv),
    }
    signature |= dict.fromkeys((*SCALES, "lse"), "*fp32") | {"scale_log2": "fp32"}
    signature |= {"out": f"*{POINTER_TYPES[dtype]}", "q_lens": "*i32", "kv_lens": "*i32"}
    constants = hopper_attention_int8.constants(head_dim)
    return compile_kernel(hopper_attention_int8._hopper_attention_int8, signature, constants, (9, 0), num_warps=4)


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)], ids=str)
def test_hopper_attention(head_dim: int, dtype: torch.dtype) -> None:
    """Nothing of the loop spills, nothing serialises the products (`assemble` looks), and P reaches them without rearranging."""
    usage = compile_hopper_attention(head_dim, dtype)
    assert usage.spilled_bytes <= SPILLS_ELSEWHERE
    assert usage.shared <= SHARED_MEMORY[9, 0]
    assert usage.registers * 128 * (hopper_attention_int8.CONSUMERS + 1) <= 65536
    assert re.search(r"wgmma\S*\.s32\.s8\.s8", usage.ptx)
    assert re.search(r"wgmma\S*\.f32\.e4m3\.e4m3", usage.ptx)
    assert "cvt.rn.satfinite.e4m3x2.f32" in usage.ptx
    assert "prmt" not in usage.ptx, "weights are packed as they are converted"
    assert "cp.async.bulk.tensor.4d" in usage.ptx
