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

def checked_attention(
    q: object, k: object, v: object, kv_lens: object, q_lens: object, scale: object, /
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The operator flash_attention, or None where the arguments are not known to be good."""

def checked_varlen(
    q: object,
    k: object,
    v: object,
    cu_seqlens_q: object,
    cu_seqlens_k: object,
    max_seqlen_q: object,
    max_seqlen_k: object,
    scale: object,
    /,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The operator flash_attention_varlen, or None where the arguments are not known to be good."""

def cuda_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    scale: float,
    packed_max_q: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What both operators run on CUDA."""

Source = tuple[Sequence[int], Sequence[int]] | None

def keep_attention_plan(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_lens: torch.Tensor | None,
    kv_lens: torch.Tensor | None,
    packed_max_q: int | None,
    launch: Launch,
    grid: tuple[int, int, int],
    sources: tuple[Source, Source, Source],
    has_scratch: bool,
    lens_are_pointers: bool,
    integers: Sequence[int],
    merge: tuple[Launch, tuple[int, int, int], Sequence[int], int] | None = None,
) -> None:
    """Launch calls like this one, whatever their addresses, lengths and scale, without Python from now on."""

def signature(*tensors: torch.Tensor | None) -> bytes | None:
    """Shapes, strides, dtypes, devices, need of a gradient. None for a subclass and where a shape is not known."""

def keep_cudnn_plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Leave calls like this one, without lengths, to cuDNN from now on."""

def forget_attention_plans() -> None: ...
def use_stream_for(stream_for: Callable[[int], int | None]) -> None:
    """How a launch learns its stream from the index of its device; None: Triton has to launch."""

def use_attention_forward(forward: Callable[..., None]) -> None:
    """What launches (q, k, v, out, lse, q_lens, kv_lens, scale, packed_max_q) where there is no plan."""

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

class StreamStep:
    """One operation of a StreamProgram, in the stream whose place among those of a run is given.

    Values are added to the run's epoch; words count modulo 2**32.
    """

    @staticmethod
    def wait(stream: int, address: int, value: int = 0) -> StreamStep:
        """Until the word at `address` has reached the epoch plus `value`."""

    @staticmethod
    def write(stream: int, address: int, value: int = 0) -> StreamStep:
        """The epoch plus `value`, after all that stands before it in the stream."""

    @staticmethod
    def copy(stream: int, target: int, source: int, size: int) -> StreamStep:
        """Device, peer or registered host memory on either side."""

    @staticmethod
    def record(stream: int, event: int) -> StreamStep: ...
    @staticmethod
    def wait_record(stream: int, event: int) -> StreamStep: ...

class StreamProgram:
    """A fixed list of steps for the context that is current, run once per layer with another epoch.

    Raises:
        ValueError: for a step with a stream or an event that there is not.
        RuntimeError: the driver is missing, lacks a function, or no context is current.
    """

    def __init__(
        self, steps: Sequence[StreamStep], streams: int, events: int, library: str = "libcuda.so.1"
    ) -> None: ...
    def run(self, streams: Sequence[int], epoch: int) -> None:
        """Enqueue all steps. RuntimeError: the driver refused one; those before it are enqueued."""

    def __len__(self) -> int: ...

class RegisteredMemory:
    """`size` bytes of this process's memory at `address`, pinned and mapped for the devices while it lives.

    Raises:
        RuntimeError: the driver refuses.
    """

    def __init__(self, address: int, size: int, library: str = "libcuda.so.1") -> None: ...
    @property
    def device_address(self) -> int: ...

def view_of_memory(address: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous tensor over memory that a device reaches at `address` and that someone else keeps."""
