from collections.abc import Callable, Sequence
from typing import TypedDict

import torch

class BuildInfo(TypedDict):
    compiler: str
    cpu_capability: str
    openmp: bool
    torch: str

def build_info() -> BuildInfo:
    """Compiler, CPU capability chosen at run time, whether the ops are parallel, and the torch compiled against."""

def attention_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty and contiguous (out, lse): like q (B, S, H, D) and float32 (B, H, S); packed (T, H, D) and (H, T)."""

class Parameter:
    """What a kernel was compiled to take for one argument."""

    @staticmethod
    def absent() -> Parameter: ...
    @staticmethod
    def int32() -> Parameter: ...
    @staticmethod
    def int64() -> Parameter: ...
    @staticmethod
    def float32() -> Parameter: ...
    @staticmethod
    def pointer(dtype: torch.dtype, aligned: bool) -> Parameter:
        """Compiled for multiples of 16 bytes, or for all other addresses."""

    @staticmethod
    def any_pointer(dtype: torch.dtype) -> Parameter: ...
    @staticmethod
    def descriptor(dtype: torch.dtype, box: Sequence[int], swizzle: int) -> Parameter: ...

Launch = Callable[[tuple[int, int, int], int, tuple[object, ...]], bool]

def kernel_launcher(
    function: int,
    threads: int,
    shared_bytes: int,
    parameters: Sequence[Parameter],
    declared: Sequence[int],
    device: torch.device,
    library: str = "libcuda.so.1",
) -> Launch:
    """launch(grid, stream, arguments) for a CUfunction of the current context.

    launch returns False, and does nothing, if an argument is not what the kernel was compiled for.

    Raises:
        ValueError: `declared`, the sizes of the parameters in the kernel's assembly, are not those of `parameters`.
        RuntimeError: the driver is missing, or no context is current; from launch: the driver refused.
    """
