"""Every kernel compiles for sm80, sm89 and sm90 with no GPU: registers, spills and shared memory are read from the assembler."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from para_kernels.triton_kernels import (  # noqa: E402
    attention,
    hopper_attention,
    hopper_choice,
    hopper_ring_attention,
    merge_states,
    prepare,
    residual_diff,
    ring_attention,
)
from para_kernels.triton_kernels.hopper_choice import HopperConfig  # noqa: E402

# Shared memory that one program may use, in bytes (CUDA C++ programming guide, table of compute capabilities).
# Of each multiprocessor, in bytes, without what the system takes for the first program.
SHARED_MEMORY = {(8, 0): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}
# Once per tile or piece, outside of the loops over blocks of keys; none under Triton 3.6, so many under 3.9.
HOPPER_RING_SPILLS = {(128, torch.bfloat16): 128}
SHARED_MEMORY_OF_A_PROGRAM = 1024  # what the system takes for each
# Bytes that may spill. D = 256 does not fit the registers of sm80 and sm89, which hold q and the accumulators; on sm90
# at D = 128 two programs share a multiprocessor, each at the limit of 255 registers, with a few spilled bytes.
SPILLS = {((8, 0), 256): 768, ((8, 9), 256): 768, ((9, 0), 128): 48}
# The loop over pieces keeps more alive; what spills does so around the tails of pieces, and in part of the main loop.
RING_SPILLS = {((8, 0), 64): 32, ((8, 0), 256): 768, ((8, 9), 256): 768, ((9, 0), 128): 400, ((9, 0), 256): 768}
# A parameter, which each partition reads back once.
HOPPER_SPILLS = {(128, torch.float16, 3): 4}
# The Hopper kernel's largest variant holds descriptors in registers that do not all fit from Triton 3.7 on.
HOPPER_SPILLS_OF_NEWER_TRITON = {(128, torch.bfloat16, 3): 96}
POINTER_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class Usage:
    registers: int
    spilled_bytes: int
    shared: int
    ptx: str


def compile_kernel(kernel, signature: dict[str, str], constants: dict[str, object], capability: tuple[int, int],
num_warps: int, maxnreg: int | None = None) -> Usage:  # fmt: skip
    """Compile with 16-byte aligned pointers, as launches have them, and assemble with the ptxas that comes with Triton."""
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if full[name].startswith("*")}
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(
        kernel, full, constexprs={(names.index(name),): value for name, value in constants.items()}, attrs=aligned
    )
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, "maxnreg": maxnreg})
    return assemble(compiled.asm["ptx"], compiled.metadata.shared)


def assemble(ptx: str, shared: int) -> Usage:
    arch = re.search(r"\.target (sm_(\d+)\w*)", ptx)
    assert arch is not None
    command = [get_ptxas(int(arch[2])).path, "-v", f"-arch={arch[1]}", "-o", "/dev/null", "/dev/stdin"]
    report = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    serialised = re.findall(r"C75\d\d", report)
    assert not serialised, report
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    assert registers is not None and spilled is not None, report  # noqa: PT018
    return Usage(int(registers[1]), int(spilled[1]), shared, ptx)


def compile_attention(capability: tuple[int, int], head_dim: int, dtype: torch.dtype, packed: bool) -> Usage:
    tma = attention.uses_tma(capability, dtype, head_dim)
    config = attention.attention_config(capability, head_dim, dtype, tma)
    kind = POINTER_TYPES[dtype]
    block_d = max(16, triton.next_power_of_2(head_dim))
    source = f"tensordesc<{kind}[{config.block_n}, {block_d}]>" if tma else f"*{kind}"
    signature = {"q_ptr": f"*{kind}", "k": source, "v": source, "out_ptr": f"*{kind}", "lse_ptr": "*fp32"}
    signature |= {"q_lens": "*i32", "kv_lens": "*i32", "scale_log2": "fp32"}
    constants = {
        "D": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d, "STAGES": config.num_stages,
        "VEC": 16 // dtype.itemsize, "USE_TMA": tma, "PACKED": packed,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return compile_kernel(attention._attention_fwd, signature, constants, capability, config.num_warps)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [(capability, head_dim, torch.bfloat16) for capability in SHARED_MEMORY for head_dim in (64, 96, 128, 256)]
    + [((9, 0), 128, torch.float16)],
    ids=str,
)
def test_attention(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    usage = compile_attention(capability, head_dim, dtype, packed=False)
    assert usage.shared <= SHARED_MEMORY[capability]
    assert "mma" in usage.ptx
    assert ("cp.async.bulk.tensor" in usage.ptx) == attention.uses_tma(capability, dtype, head_dim)
    assert usage.spilled_bytes <= SPILLS.get((capability, head_dim), 0)


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_packed_attention(capability: tuple[int, int]) -> None:
    usage = compile_attention(capability, 128, torch.bfloat16, packed=True)
    assert usage.shared <= SHARED_MEMORY[capability]
    assert usage.spilled_bytes <= SPILLS.get((capability, 128), 0)


def test_float32_attention_stays_off_the_tensor_cores() -> None:
    usage = compile_attention((9, 0), 64, torch.float32, packed=False)
    assert not re.search(r"\bw?g?mma\.", usage.ptx)


def compile_ring_attention(capability: tuple[int, int], head_dim: int, dtype: torch.dtype, lens: bool) -> Usage:
    tma = attention.uses_tma(capability, dtype, head_dim)
    config = attention.attention_config(capability, head_dim, dtype, tma)
    kind = POINTER_TYPES[dtype]
    block_d = max(16, triton.next_power_of_2(head_dim))
    memory = f"tensordesc<{kind}[{config.block_n}, {block_d}]>" if tma else f"*{kind}"
    signature = {"q_ptr": f"*{kind}", "memory": memory, "out_ptr": f"*{kind}", "lse_ptr": "*fp32", "scale_log2": "fp32"}
    signature |= dict.fromkeys(("table", "flags", "error"), "*i32")
    constants: dict[str, object] = {
        "D": head_dim, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d, "STAGES": config.num_stages,
        "VEC": 16 // dtype.itemsize, "USE_TMA": tma, "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "ASM": True,
    }  # fmt: skip
    if lens:
        signature |= {"q_lens": "*i32", "kv_lens": "*i32"}
    else:
        constants |= {"q_lens": None, "kv_lens": None}
    return compile_kernel(ring_attention._ring_attention_fwd, signature, constants, capability, config.num_warps)


@pytest.mark.parametrize(
    ("capability", "head_dim", "lens"),
    [(capability, head_dim, True) for capability in SHARED_MEMORY for head_dim in (64, 96, 128, 256)]
    + [((9, 0), 128, False)],
    ids=str,
)
def test_ring_attention(capability: tuple[int, int], head_dim: int, lens: bool) -> None:
    """Flags are acquired at system scope, and before TMA reads what has arrived comes a fence of its proxy."""
    usage = compile_ring_attention(capability, head_dim, torch.bfloat16, lens)
    assert usage.shared <= SHARED_MEMORY[capability]
    assert usage.spilled_bytes <= RING_SPILLS.get((capability, head_dim), 0)
    assert re.search(r"\.(sys\.acquire|acquire\.sys)\b", usage.ptx)
    assert "nanosleep" in usage.ptx
    if attention.uses_tma(capability, torch.bfloat16, head_dim):
        last_look = usage.ptx.rindex("acquire")
        fence = usage.ptx.index("fence.proxy.async.global")
        assert last_look < fence
        assert "cp.async.bulk.tensor" in usage.ptx[fence:]
        assert "cp.async.bulk.tensor" not in usage.ptx[:last_look]


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_pack(capability: tuple[int, int]) -> None:
    signature = dict.fromkeys(("k_ptr", "v_ptr", "memory"), "*bf16")
    usage = compile_kernel(
        ring_attention._pack, signature, {"D": 128, "BLOCK_R": 64, "BLOCK_D": 128, "VEC": 8}, capability, num_warps=4
    )  # fmt: skip
    assert usage.spilled_bytes == 0
    assert "ld.global.v4.b32" in usage.ptx, "16-byte loads"
    assert "st.global.v4.b32" in usage.ptx, "16-byte stores"


def compile_hopper_attention(config: HopperConfig, head_dim: int, dtype: torch.dtype) -> Usage:
    kind = POINTER_TYPES[dtype]
    block = [1, 1, 64, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)
    signature = dict.fromkeys(("q", "k", "v"), f"tensordesc<{kind}{block},{layout!r}>")
    signature |= {"out": f"*{kind}", "lse": "*fp32", "scratch": "*fp32", "scale_log2": "fp32"}
    signature |= {"q_lens": "*i32", "kv_lens": "*i32"}
    constants = {
        "CONSUMERS": config.consumers, "D": head_dim, "STAGES": config.stages, "Q_STAGES": config.query_stages,
        "ONLINE": dtype == torch.float16,
    }  # fmt: skip
    kernel = hopper_attention._hopper_attention
    return compile_kernel(kernel, signature, constants, (9, 0), num_warps=4, maxnreg=config.max_registers)


def compile_hopper_ring_attention(head_dim: int, dtype: torch.dtype) -> Usage:
    kind = POINTER_TYPES[dtype]
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16

    def descriptor(block: list[int]) -> str:
        return f"tensordesc<{kind}{block},{gl.NVMMASharedLayout.get_default_for(block, element)!r}>"

    signature = {"q": descriptor([1, 1, 64, head_dim]), "memory": descriptor([64, head_dim])}
    signature |= {"out": f"*{kind}", "lse": "*fp32", "scratch": "*fp32", "scale_log2": "fp32"}
    signature |= dict.fromkeys(("q_lens", "kv_lens", "table", "arrivals", "error"), "*i32")
    config = hopper_choice.CONFIGS[head_dim]
    constants = {
        "CONSUMERS": config.consumers, "D": head_dim, "STAGES": config.stages, "Q_STAGES": config.query_stages,
        "ONLINE": dtype == torch.float16,
    }  # fmt: skip
    kernel = hopper_ring_attention._hopper_ring_attention
    return compile_kernel(kernel, signature, constants, (9, 0), num_warps=4)


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)], ids=str)
def test_hopper_ring_attention(head_dim: int, dtype: torch.dtype) -> None:
    """A flag's acquire comes before the fence between the proxies, and that before the copies of what has arrived."""
    usage = compile_hopper_ring_attention(head_dim, dtype)
    assert usage.spilled_bytes <= HOPPER_RING_SPILLS.get((head_dim, dtype), 0)
    assert usage.shared <= SHARED_MEMORY[9, 0]
    assert usage.registers * 512 <= 65536
    acquire = re.search(r"(?:ld|atom)\.\S*acquire\S*", usage.ptx)
    assert acquire is not None
    assert "sys" in acquire[0]
    fence = usage.ptx.index("fence.proxy.async.global", acquire.end())
    assert usage.ptx.index("cp.async.bulk.tensor.2d", fence) > fence


@pytest.mark.parametrize("configs", [hopper_choice.CONFIGS, hopper_choice.SMALL_CONFIGS], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_attention(head_dim: int, dtype: torch.dtype, configs: dict[int, HopperConfig]) -> None:
    """Next to nothing spills under Triton 3.6; tiles come by TMA and are multiplied by wgmma, which nothing serialises (`assemble` looks)."""
    config = configs[head_dim]
    usage = compile_hopper_attention(config, head_dim, dtype)
    is_newer = not triton.__version__.startswith("3.6.")
    spills = HOPPER_SPILLS | (HOPPER_SPILLS_OF_NEWER_TRITON if is_newer else {})
    assert usage.spilled_bytes <= spills.get((head_dim, dtype, config.consumers), 0)
    programs = config.residents
    assert (usage.shared + SHARED_MEMORY_OF_A_PROGRAM) * programs <= SHARED_MEMORY[9, 0] + SHARED_MEMORY_OF_A_PROGRAM
    warps = 4 * (config.consumers + 1)
    assert usage.registers * warps * 32 * programs <= 65536
    assert "wgmma.mma_async" in usage.ptx
    assert "cp.async.bulk.tensor.4d" in usage.ptx
    assert "setmaxnreg" in usage.ptx
    # The barriers 8 and 9 are the kernel's own; Triton numbers its own from 0, one or two for each partition.
    others = {int(number) for number in re.findall(r"bar(?:rier)?(?:\.cta)?\.sync(?:\.aligned)?\s+(\d+)", usage.ptx)}
    assert max(others - {8}) < 8


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_residual_diff(capability: tuple[int, int]) -> None:
    signature = dict.fromkeys(("hidden_in", "hidden_out", "previous", "residual"), "*bf16") | {"partial_sums": "*fp32"}
    constants: dict[str, object] = {"BLOCK_R": 8, "BLOCK_C": 1024, "TILES": 4, "VEC": 8}
    usage = compile_kernel(residual_diff._residual_diff, signature, constants, capability, residual_diff._NUM_WARPS)
    assert usage.spilled_bytes == 0
    assert "ld.global.v4.b32" in usage.ptx, "16-byte loads"
    sums = compile_kernel(
        residual_diff._add_partial_sums, {"partial_sums": "*fp32", "sums": "*fp32"}, {"BLOCK": 2048}, capability,
        num_warps=8
    )  # fmt: skip
    assert sums.spilled_bytes == 0


@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda c: f"sm{c[0]}{c[1]}")
def test_merge_states(capability: tuple[int, int]) -> None:
    signature = dict.fromkeys(("out_a", "out_b", "out"), "*bf16") | dict.fromkeys(("lse_a", "lse_b", "lse"), "*fp32")
    usage = compile_kernel(
        merge_states._merge_states, signature, {"D": 128, "BLOCK_S": 32, "BLOCK_D": 128}, capability, num_warps=4
    )  # fmt: skip
    assert usage.spilled_bytes == 0


PREPARATIONS: dict[str, dict[str, object]] = {
    "rms, interleaved": {},
    "rms, half": {"HALF": True},
    "layer with bias": {"Q_NORM": 2, "K_NORM": 2},
    "rms over heads": {"Q_NORM": 3, "K_NORM": 3},
    "angles of each head": {"PAIRED": True, "OF_HEADS": True},
    "no RoPE": {"cos": None, "sin": None},
    "without values": {"COUNT": 2, "v": None, "v_out": None},
    "keys and values": {
        "FIRST": 1,
        "COUNT": 2,
        "q": None,
        "q_out": None,
        "q_weight": None,
        "q_bias": None,
        "Q_NORM": 0,
    },
    "queries": {
        "COUNT": 1,
        "K_NORM": 0,
        "k": None,
        "k_out": None,
        "k_weight": None,
        "k_bias": None,
        "v": None,
        "v_out": None,
    },
}


def compile_prepare(capability: tuple[int, int], head_dim: int, kind: str, variant: dict[str, object]) -> Usage:
    width = 4 if kind == "fp32" else 8
    constants: dict[str, object] = {
        "D": head_dim, "BLOCK_S": prepare.TILE // head_dim, "BLOCK_D": head_dim, "HALF": False, "Q_NORM": 5, "K_NORM": 5,
        "PAIRED": False, "OF_HEADS": False, "FIRST": 0, "COUNT": 3, "VEC": width, "ANGLE_VEC": 4,
    } | variant  # fmt: skip
    if constants["Q_NORM"] != 2:
        constants |= {"q_bias": None, "k_bias": None}
    of_stream = ("q", "k", "v", "q_weight", "k_weight", "q_bias", "k_bias")
    constants |= {f"{name}_2": None for name in (*of_stream, "cos", "sin") if name in constants}
    of_both = [name + second for name in of_stream for second in ("", "_2")]
    signature = {name: f"*{kind}" for name in (*of_both, "q_out", "k_out", "v_out") if name not in constants}
    signature |= {name: "*fp32" for name in ("cos", "sin", "cos_2", "sin_2") if name not in constants}
    signature |= dict.fromkeys(("q_eps", "k_eps", "q_eps_2", "k_eps_2"), "fp32")
    return compile_kernel(prepare._prepare, signature, constants, capability, prepare.WARPS)


@pytest.mark.parametrize("variant", PREPARATIONS.values(), ids=PREPARATIONS.keys())
def test_prepare(variant: dict[str, object]) -> None:
    """Few enough registers for eight programs on a multiprocessor, whose loads in flight hide the memory's latency."""
    usage = compile_prepare((9, 0), 128, "bf16", variant)
    assert usage.spilled_bytes == 0
    assert usage.registers <= 80
    assert "ld.global.v4.b32" in usage.ptx, "16-byte loads"
    assert "st.global.v4.b32" in usage.ptx, "16-byte stores"
    assert not re.search(r"st\.global\.(?!v4)", usage.ptx), "16-byte stores only"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)], ids=lambda c: f"sm{c[0]}{c[1]}")
@pytest.mark.parametrize(("head_dim", "kind"), [(64, "bf16"), (128, "fp16"), (128, "fp32")])
def test_prepare_for_other_chips_and_dtypes(capability: tuple[int, int], head_dim: int, kind: str) -> None:
    assert compile_prepare(capability, head_dim, kind, {}).spilled_bytes == 0
