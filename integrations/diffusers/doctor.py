"""What this machine has, which kernels will run on it and why, and what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata

import torch

from para_kernels import attention

PACKAGES = ("para-kernels", "torch", "triton", "diffusers", "transformers", "accelerate", "imageio-ffmpeg")
DEMO_PACKAGES = ("scikit-image", "matplotlib")
FP8_PACKAGES = ("torchao",)
HEAD_DIMS = (64, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_TRITON_CAPABILITY = (8, 0)
TMA_CAPABILITY = (9, 0)


def report() -> str:
    """The whole report as plain text."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "Packages"
    yield f"  python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in (*PACKAGES, *DEMO_PACKAGES, *FP8_PACKAGES):
        yield f"  {_package(name)}"
    yield ""
    yield "CPU"
    yield f"  {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()} in torch"
    yield f"  extension: {_extension()}"
    yield from _kernels(torch.device("cpu"))
    yield ""
    yield from _gpus()


def _package(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} MISSING: {_remedy(name)}"


def _remedy(name: str) -> str:
    if name == "triton":
        return "needed on a GPU only; comes with torch's CUDA wheels on Linux, else pip install 'triton>=3.6'"
    if name == "torchao":
        return "needed for linears in FP8 only; pip install 'para-kernels[fp8]'"
    if name == "para-kernels":
        return "imported from a source tree; pip install --no-build-isolation . to install it"
    return "pip install 'para-kernels[diffusers]'"


def _extension() -> str:
    try:
        extension = importlib.import_module("para_kernels._C")
    except ImportError as error:
        return (
            f"not built ({error}); the CPU ops run on torch instead, slower. To build it: a C++ compiler, then "
            "pip install --no-build-isolation ."
        )
    info = extension.build_info()
    return f"built by {info['compiler']} against torch {info['torch']}; uses {info['cpu_capability']} on this CPU"


def _kernels(device: torch.device) -> Iterator[str]:
    """One line per group of (dtype, head dim) that gets the same kernel, with selected_kernel's own reason."""
    cases: dict[str, list[str]] = {}
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            kernel = attention.selected_kernel(device, dtype, head_dim)
            cases.setdefault(kernel, []).append(f"{str(dtype).removeprefix('torch.')} D={head_dim}")
    for kernel, uses in cases.items():
        everything = len(uses) == len(DTYPES) * len(HEAD_DIMS)
        yield f"  attention: {kernel}"
        yield f"    for {'every dtype and head dim' if everything else ', '.join(uses)}"


def _gpus() -> Iterator[str]:
    count = torch.cuda.device_count()
    yield "GPU"
    if count == 0:
        yield f"  none: {_no_gpu_reason()}"
        return
    yield f"  driver {_driver()}, CUDA {torch.version.cuda} in torch"
    for index in range(count):
        yield from _gpu(index)
    if count > 1:
        yield ""
        yield "GPU pairs (peer-to-peer access)"
        for a in range(count):
            for b in range(a + 1, count):
                both = torch.cuda.can_device_access_peer(a, b) and torch.cuda.can_device_access_peer(b, a)
                way = "yes; transport 'peer'" if both else "no; transport 'host', through pinned memory"
                yield f"  {a} <-> {b}: {way}"


def _no_gpu_reason() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA; everything runs on the CPU. For a GPU install a CUDA build of torch"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver found (no nvidia-smi); everything runs on the CPU"
    return "the driver shows no device to this process (see nvidia-smi and CUDA_VISIBLE_DEVICES)"


def _gpu(index: int) -> Iterator[str]:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    memory = properties.total_memory / 2**30
    yield f"  {index}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    if capability < OLDEST_TRITON_CAPABILITY:
        yield "    too old for the Triton kernels, which need sm_80 or later"
        return
    has_tma = capability >= TMA_CAPABILITY
    yield f"    TMA (bulk tensor copies): {'yes' if has_tma else 'no, needs sm_90 or later'}"
    if importlib.util.find_spec("triton") is None:
        yield "    no kernels: Triton is not installed (pip install triton)"
        return
    yield from (f"  {line}" for line in _kernels(torch.device("cuda", index)))


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "version unknown (nvidia-smi did not answer)"
    return output.splitlines()[0].strip()
