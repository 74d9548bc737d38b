"""Where the time of a step goes, the preparation in it, and the picture of the ring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_records import rows_of
from torch import Tensor

from benchmarks import record, ring_timeline, step_profile
from benchmarks.record import OURS, Record
from benchmarks.step_profile import Launch

CPU = torch.device("cpu")


# --- the preparation --------------------------------------------------------------------------------------------------


def test_the_preparation_as_tables(tmp_path: Path) -> None:
    notes = {"unfused": 1e-7, "equal": 0.75}
    check = record.Check("preparation, rms, half", 1, 0, "float32", 2e-7, 1e-6, notes)
    record.write_records("prepare-checks", [check], tmp_path)
    assert rows_of("prepare-checks", tmp_path)[2:] == ["| rms, half, float32 | 2e-07 | 1e-06 | 1e-07 | 75.00% |"]
    speeds = [
        Record(
            "prepare_attention", {"S": 4608}, "bfloat16", OURS, 0.5, "eager", 2.0, gbps=1500.0,
            notes={"block": "dual", "of_copy": 0.9, "host_us": 410.2, "compiled_ms": compiled},
        )
        for compiled in (1.0, None)  # no compiler on a CPU
    ]  # fmt: skip
    record.write_records("prepare-speed", speeds, tmp_path)
    assert rows_of("prepare-speed", tmp_path)[2:] == [
        "| dual, 4,608 tokens | 0.500 | 1,500 | 90% | 2.000 (4.0x) | 1.000 (2.0x) | 410 |",
        "| dual, 4,608 tokens | 0.500 | 1,500 | 90% | 2.000 (4.0x) |  | 410 |",
    ]


# --- the profile of a step --------------------------------------------------------------------------------------------

# Names as torch.profiler gives them on an H100: (kernel, operator, innermost module, category).
KERNELS = [
    ("_attention_fwd", "para_kernels::flash_attention", "Attention", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "aten::_scaled_dot_product_cudnn_attention", "Attention", "attention"),
    ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT", "aten::addmm", "Linear", "linear"),
    ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "aten::cudnn_convolution", "Conv3d", "linear"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<...>", "aten::cat", "Attention", "copy, cast, cat"),
    ("void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda", "aten::copy_", "Attention", "copy, cast, cat"),
    ("Memcpy DtoD (Device -> Device)", "aten::copy_", "Attention", "copy, cast, cat"),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>", "aten::native_layer_norm", "LayerNorm", "norm"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, MulFunctor>>", "aten::mul", "RMSNorm", "norm"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>", "aten::mean", "RMSNorm", "norm"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float, float, float, MulFunctor>>", "aten::mul", "Attention", "RoPE"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "aten::gelu", "GELU", "activation"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "aten::add", "HunyuanVideoSingleTransformerBlock", "gates and residuals"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::sin_kernel_cuda>", "aten::sin", "Timesteps", "other"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "operator", "module", "category"), KERNELS)
def test_kernels_are_told_apart(kernel: str, operator: str, module: str, category: str) -> None:
    assert step_profile.category(Launch(kernel, operator, module, 1.0)) == category


@pytest.mark.parametrize(
    ("intervals", "span", "idle"),
    [
        ([], 0.0, 0.0),
        ([(10.0, 20.0), (30.0, 40.0)], 30e-6, 10e-6),
        ([(30.0, 40.0), (10.0, 35.0), (12.0, 14.0)], 30e-6, 0.0),  # two streams at once, and not in order
    ],
)
def test_gaps_are_what_no_kernel_covers(intervals: list[tuple[float, float]], span: float, idle: float) -> None:
    assert step_profile._span(intervals) == pytest.approx((span, idle))


class Gated(torch.nn.Module):
    """A gate around a projection and a norm: something of most kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.projection = torch.nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.projection(self.norm(x)) * x.sigmoid()


def trace_event(category: str, name: str, start: float, duration: float, identity: int | None = None) -> dict[str, Any]:
    arguments = {} if identity is None else {"External id": identity}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": arguments}


def test_each_kernel_of_a_trace_counts_once_and_for_the_innermost_module() -> None:
    mark = step_profile.MARK
    found = step_profile.of_trace(
        [
            {"ph": "M", "name": "process_name"},
            trace_event("user_annotation", f"{mark}Block", 0, 100, 7),
            trace_event("user_annotation", f"{mark}Linear", 10, 20, 8),
            trace_event("gpu_user_annotation", f"{mark}Linear", 500, 90, 8),
            trace_event("cpu_op", "aten::addmm", 12, 5, 1),
            trace_event("cuda_runtime", "cudaLaunchKernel", 13, 1, 1),
            trace_event("overhead", "Command Buffer Full", 13, 1),
            trace_event("cpu_op", "aten::mul", 40, 5, 2),
            trace_event("kernel", "gemm", 500, 30, 1),
            trace_event("kernel", "multiply", 540, 10, 2),
            trace_event("gpu_memcpy", "Memcpy", 560, 5, None),
        ]
    )
    assert found.launches == [
        Launch("gemm", "aten::addmm", "Linear", 30),
        Launch("multiply", "aten::mul", "Block", 10),
        Launch("Memcpy", "", "", 5),
    ]
    assert (found.span, found.idle) == (pytest.approx(65e-6), pytest.approx(20e-6))


def test_work_is_found_under_the_module_that_did_it() -> None:
    model = Gated().requires_grad_(False)
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    found = step_profile.profiled(model, lambda: model(torch.randn(16, 32)), CPU)
    launched = {(launch.operator, launch.module) for launch in found.launches}
    expected = {("aten::addmm", "Linear"), ("aten::native_layer_norm", "LayerNorm"), ("aten::sigmoid", "Gated")}
    assert expected <= launched
    assert ("aten::randn", "") in launched  # outside of every module
    assert 0 < sum(launch.microseconds for launch in found.launches) <= found.span * 1e6
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def test_the_profiled_step_prepares_as_the_timed_one_does() -> None:
    """No norm is called that the preparation takes over; others are, and are marked."""
    pytest.importorskip("diffusers")
    from tiny_hunyuan import tiny_pipeline, transformer_inputs

    from para_kernels.integrations.diffusers import accelerate

    pipe, called = tiny_pipeline(), []
    accelerate(pipe)
    norms = {name: module for name, module in pipe.transformer.named_modules() if type(module).__name__ == "RMSNorm"}
    assert norms
    for name, norm in norms.items():
        norm.forward = lambda x, name=name, forward=norm.forward: called.append(name) or forward(x)
    inputs = transformer_inputs()
    with torch.no_grad():
        found = step_profile.profiled(pipe.transformer, lambda: pipe.transformer(**inputs), CPU)
    assert called == []
    assert {"Attention", "LayerNorm", "HunyuanVideoTransformer3DModel"} <= {launch.module for launch in found.launches}


def test_the_profile_as_records_and_tables(tmp_path: Path) -> None:
    launches = [Launch("gemm", "aten::addmm", "Linear", 3000.0)] * 2 + [Launch("exp", "aten::exp", "GELU", 1000.0)]
    found = step_profile.Profile(launches, span=8e-3, idle=1e-3)
    records = step_profile.records(found, {"S": 8}, "bfloat16", OURS)
    record.write_records("hunyuan_step_profile", records, tmp_path)
    assert rows_of("step-profile", tmp_path) == [
        "| work | ms | share | kernels |",
        "| --- | ---: | ---: | ---: |",
        "| linear | 6.0 | 75.0% | 2 |",
        "| activation | 1.0 | 12.5% | 1 |",
        "| gaps between kernels | 1.0 | 12.5% | 0 |",
    ]
    assert rows_of("step-kernels", tmp_path)[2:] == [
        "| `gemm` | linear | Linear | 6.0 | 75.0% | 2 |",
        "| `exp` | activation | GELU | 1.0 | 12.5% | 1 |",
    ]


def test_a_profile_of_seconds_is_in_seconds(tmp_path: Path) -> None:
    found = step_profile.Profile([Launch("gemm", "aten::addmm", "Linear", 2e6)], span=2.5, idle=0.5)
    record.write_records("hunyuan_step_profile", step_profile.records(found, {"S": 8}, "bfloat16", OURS), tmp_path)
    assert rows_of("step-profile", tmp_path)[0] == "| work | s | share | kernels |"
    assert rows_of("step-profile", tmp_path)[2] == "| linear | 2.00 | 80.0% | 1 |"


# --- the ring's picture -----------------------------------------------------------------------------------------------


def ring_trace(layers: int) -> list[dict[str, Any]]:
    events = [trace_event("cpu_op", "aten::empty", 0, 1, 1)]
    for layer in range(layers):
        start = 1000.0 * layer
        events += [
            trace_event("kernel", "_pack", start, 20),
            trace_event("kernel", "_hopper_ring_attention", start + 22, 900),
            trace_event("gpu_memcpy", "Memcpy PtoP (Device -> Device)", start + 40, 15),
            trace_event("kernel", "something_else", start + 950, 5),
        ]
    return events


def test_the_picture_of_the_ring_shows_its_last_two_layers(tmp_path: Path) -> None:
    found = ring_timeline.bars(ring_trace(4))
    assert [(row, start) for row, start, _, _ in found] == [
        ("packing", 0.0), ("attention", 22.0), ("copies from the peer", 40.0),
        ("packing", 1000.0), ("attention", 1022.0), ("copies from the peer", 1040.0),
    ]  # fmt: skip
    ring_timeline.draw({"peer-8192": found}, tmp_path / "ring.png")
    assert (tmp_path / "ring.png").stat().st_size > 1000


def test_a_trace_of_one_layer_makes_no_picture() -> None:
    with pytest.raises(ValueError, match="a trace of 1 layers"):
        ring_timeline.bars(ring_trace(1))
