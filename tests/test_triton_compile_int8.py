"""The 8-bit kernels compile for sm80, sm89 and sm90 with no GPU, without spills and with what they were written for."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")
import triton
from test_triton_compile import POINTER_TYPES, SHARED_MEMORY, Usage, compile_kernel
from triton.experimental.gluon import language as gl

from para_kernels.triton_kernels import attention_int8, hopper_attention_int8, quantize_int8

VALUE_TYPES = {torch.float8_e4m3fn: "fp8e4nv", torch.float16: "fp16"}
SCALES = ("q_scales", "k_scales", "v_scales", "means_of_scores")
# D = 256 does not fit the registers: the queries, and the accumulators of 64 x 256.
SPILLS = {((8, 0), 256): 288, ((8, 9), 256): 256, ((9, 0), 256): 256}
if not triton.__version__.startswith("3.6."):
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


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_quantisation(capability: tuple[int, int], head_dim: int) -> None:
    """D = 256, whose blocks of 128 keys do not fit the registers, spills as the attention does."""
    values = VALUE_TYPES[attention_int8.value_type(capability)]
    shape: dict[str, object] = {"D": head_dim, "BLOCK_D": head_dim, "VEC": 8}
    width: dict[str, object] = {"WIDTH": head_dim}
    blocks: dict[str, object] = {"BLOCKS": quantize_int8.BLOCKS_OF_PROGRAM}
    lens = dict.fromkeys(("q_lens", "kv_lens"), "*i32")
    sources = dict.fromkeys(("q", "k", "v", "matrix"), "*bf16")
    sums = compile_kernel(
        quantize_int8._sums, sources | lens | {"partial": "*fp32"}, shape, capability, quantize_int8._WARPS
    )
    finish = compile_kernel(
        quantize_int8._finish, dict.fromkeys(("partial", "k_means", "v_scales"), "*fp32") | lens | {"matrix": "*bf16"},
        width | {"BLOCK_D": head_dim, "COLUMNS": quantize_int8._FINISHED_COLUMNS, "MOST_CHUNKS": quantize_int8._MOST_CHUNKS},
        capability, quantize_int8._WARPS,
    )  # fmt: skip
    outputs = {
        "q_out": "*i8",
        "k_out": "*i8",
        "v_out": f"*{values}",
        "k_means": "*fp32",
        "v_errors": "*fp32",
        "scale": "fp32",
    }
    types = sources | lens | outputs | dict.fromkeys(SCALES, "*fp32")
    permuted = {"PERMUTED": capability == (9, 0)}
    warps = quantize_int8._WARPS
    keys, queries = (
        compile_kernel(kernel, types, shape | width | blocks, capability, quantize_int8.rotating_warps(rows, head_dim))
        for kernel, rows in (
            (quantize_int8._quantise_keys, quantize_int8.K_BLOCK),
            (quantize_int8._quantise_queries, quantize_int8.Q_BLOCK),
        )
    )
    of_values = compile_kernel(quantize_int8._quantise_values, types, shape | permuted | blocks, capability, warps)
    mend = compile_kernel(
        quantize_int8._mend_means, {"v_errors": "*fp32", "v_scales": "*fp32"} | lens,
        blocks | {"BLOCK_D": head_dim, "COLUMNS": quantize_int8._MENDED_COLUMNS, "CHUNKS": quantize_int8._MENDED_CHUNKS},
        capability, quantize_int8._WARPS,
    )  # fmt: skip
    if values == "fp8e4nv":
        sizes = {"COLUMNS": quantize_int8._CHOSEN_COLUMNS, "ROWS": quantize_int8._CHOSEN_ROWS}
        tried = {"SAMPLE": quantize_int8.SCALES_FROM, "TRIED": quantize_int8.SCALES_TRIED}
        choose = compile_kernel(
            quantize_int8._choose_scales, {"v": "*bf16", "v_scales": "*fp32"} | lens, shape | sizes | tried, capability,
            quantize_int8._CHOSEN_WARPS,
        )  # fmt: skip
        assert choose.spilled_bytes == 0
    for usage in (sums, finish, keys, of_values, mend, queries):
        assert usage.spilled_bytes == 0
    assert "ld.global.v4.b32" in sums.ptx, "16-byte loads"
    for usage in (keys, of_values, queries):
        assert re.search(r"cp.async.cg.shared.global \[[^]]*\], \[[^]]*\], 0x10,", usage.ptx), "16-byte copies"
        assert "st.global.v4.b32" in usage.ptx, "16-byte stores"


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
    """Nothing spills, nothing serialises the products (`assemble` looks), and P reaches them without rearranging."""
    usage = compile_hopper_attention(head_dim, dtype)
    assert usage.spilled_bytes == 0
    assert usage.shared <= SHARED_MEMORY[9, 0]
    assert usage.registers * 128 * (hopper_attention_int8.CONSUMERS + 1) <= 65536
    assert re.search(r"wgmma\S*\.s32\.s8\.s8", usage.ptx)
    assert re.search(r"wgmma\S*\.f32\.e4m3\.e4m3", usage.ptx)
    assert "cvt.rn.satfinite.e4m3x2.f32" in usage.ptx
    assert "prmt" not in usage.ptx, "weights are packed as they are converted"
    assert "cp.async.bulk.tensor.4d" in usage.ptx
