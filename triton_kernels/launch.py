"""Launching a Triton kernel in a few microseconds of host time.

`kernel[grid](...)` matches every argument against the compiled variants in Python, and makes tensor maps from Python
objects: 60 microseconds and more for an attention kernel. Here Triton compiles and makes the first launch; the launches
that follow go from C++ to the CUDA driver, after the arguments have been compared with what that variant was compiled
for. Whatever differs goes through Triton again, which finds or compiles the variant that fits.

The C++ part is not imported but handed over by `use_extension`, since this package imports torch and triton only.
Without it, and for kernels that it cannot launch, every launch goes through Triton.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from triton import knobs

_logger = logging.getLogger("para_kernels")

Grid = tuple[int, int, int]
Launch = Callable[[Grid, int, tuple[object, ...]], bool]
# (tensor, shape, strides in elements) -> Triton's or Gluon's TensorDescriptor
MakeDescriptor = Callable[[torch.Tensor, list[int], list[int]], Any]

_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i32": torch.int32, "i8": torch.int8,
    "fp8e4nv": torch.float8_e4m3fn,
}  # fmt: skip
_NUMBERS = {"i32": "int32", "i64": "int64", "fp32": "float32"}
_SECONDS_IN_SILENCE = 1.0


@dataclass
class _Extension:
    """`para_kernels._C`, and the CUDA driver that it opens."""

    module: ModuleType
    library: str


_extension: _Extension | None = None


def use_extension(module: ModuleType | None, library: str = "libcuda.so.1") -> None:
    """Launch through this extension module from now on; None: through Triton. `library` is the CUDA driver."""
    global _extension
    if _extension is not None:
        _extension.module.forget_attention_plans()
    if module is not None:
        module.use_stream_for(_stream_for)
    _extension = None if module is None else _Extension(module, library)


def keeps_plans() -> bool:
    """Whether C++ can be told how later calls are to be made."""
    return _extension is not None


def keep_cudnn_plan(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Let C++ leave calls of attention like this one, without lengths, to cuDNN."""
    assert _extension is not None
    _extension.module.keep_cudnn_plan(q, k, v)


class NotDirectError(Exception):
    """Why a compiled kernel has to be launched by Triton."""


class Launcher:
    """One kernel with its compile-time constants, on one device.

    Args:
        kernel: of `triton.jit` or `gluon.jit`; its integers are `do_not_specialize`, its constants come last.
        device: where all tensors of a launch lie.
        descriptors: by parameter, what makes Triton's tensor descriptor of (tensor, shape, strides); needed only for
            the launches that go through Triton.
        constants: values of the constexpr parameters, and options such as num_warps.

    Attributes:
        not_direct: why the last launch through Triton will not be followed by direct ones, or None.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        descriptors: Mapping[str, MakeDescriptor] | None = None,
        **constants: Any,
    ) -> None:
        self._kernel = kernel
        self._device = device
        self._device_index = device.index
        self._constants = constants
        self._descriptors = {kernel.arg_names.index(name): make for name, make in (descriptors or {}).items()}
        self._launches: dict[Any, Launch | str] = {}
        self._direct: Launch | None = None
        self.not_direct: str | None = None

    def __call__(self, grid: Grid, *arguments: object) -> None:
        """Launch in the device's current stream.

        Args:
            grid: numbers of programs (x, y, z).
            arguments: those of the kernel in order, without constants: tensors, None, int, float, and for a descriptor
                the tuple (tensor, shape, strides), outermost dimension first, strides in elements.
        """
        direct = self._direct
        if direct is None or _launch_hooks() or not direct(grid, _current_stream(self._device_index), arguments):
            self._launch_through_triton(grid, arguments)

    def keep_attention_plan(self, merge: Merge | None = None, **plan: object) -> None:
        """Let C++ make calls like the last one, `plan`, alone: for a kernel of attention, and for one that merges what
        the first one has left in scratch memory."""
        if _extension is None or self._direct is None or (merge is not None and merge.launcher._direct is None):
            return
        second = None if merge is None else (merge.launcher._direct, *merge[1:])
        _extension.module.keep_attention_plan(launch=self._direct, merge=second, **plan)

    def compile(self, *arguments: object) -> None:
        """Compile the variant that such arguments take, or load it from the disk, and launch nothing."""
        with self._on_device(), _announced(self._kernel.__name__):
            self._kernel.warmup(*self._prepared(arguments), grid=(1, 1, 1), enable_fp_fusion=True, **self._constants)

    def _prepared(self, arguments: tuple[Any, ...]) -> list[Any]:
        return [
            self._descriptors[i](x[0], list(x[1]), list(x[2])) if i in self._descriptors else x
            for i, x in enumerate(arguments)
        ]

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _launch_through_triton(self, grid: Grid, arguments: tuple[Any, ...]) -> None:
        first = nullcontext() if self._launches else _announced(self._kernel.__name__)
        with self._on_device(), first:
            # A product and a sum in one instruction: the default up to Triton 3.9, and off from 3.10 on.
            compiled = self._kernel[grid](*self._prepared(arguments), enable_fp_fusion=True, **self._constants)
            if compiled not in self._launches:
                self._launches[compiled] = _direct_launch(compiled, self._device)
        launch = self._launches[compiled]
        self._direct, self.not_direct = (None, launch) if isinstance(launch, str) else (launch, None)


class Merge(NamedTuple):
    """The launch behind an attention kernel, of (scratch, out, lse, integers); the scratch has so many `elements`."""

    launcher: Launcher
    grid: Grid
    integers: tuple[int, ...]
    elements: int


def _launch_hooks() -> bool:
    """Whether someone (a profiler) has asked Triton to be told of every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# torch built without CUDA has no streams; then kernels run in Triton's interpreter.
_current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def _stream_for(device_index: int) -> int | None:
    """The stream for a launch from C++; None where it has to go through Triton."""
    return None if _launch_hooks() else _current_stream(device_index)


@contextmanager
def _announced(name: str) -> Iterator[None]:
    """Say what is going on if it takes long."""
    timer = threading.Timer(
        _SECONDS_IN_SILENCE, _logger.warning, ("compiling the kernel %s, once; it is kept on disk", name.lstrip("_"))
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- what was compiled ------------------------------------------------------------------------------------------------


def _direct_launch(compiled: Any, device: torch.device) -> Launch | str:
    """The launch of a kernel that Triton has compiled and loaded, or why there is none."""
    if _extension is None:
        return "the extension is not built"
    if compiled is None:
        return "Triton gave no compiled kernel"
    try:
        _check_options(compiled.metadata)
        return _extension.module.kernel_launcher(
            function=compiled.function,
            threads=compiled.metadata.num_warps * 32,
            shared_bytes=compiled.metadata.shared,
            parameters=parameters(compiled),
            declared=declared_sizes(compiled.asm.get("ptx", "")),
            device=device,
            library=_extension.library,
        )
    except (NotDirectError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as reason:
        # The last three where another Triton's metadata have other names.
        _logger.debug("%s is launched by Triton: %s", compiled.metadata.name, reason)
        return str(reason)


def _check_options(metadata: Any) -> None:
    """Refuse what a plain cuLaunchKernel with empty scratch memory does not give."""
    if metadata.target.backend != "cuda":
        raise NotDirectError(f"compiled for {metadata.target.backend}")
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl:
        raise NotDirectError("needs launch attributes")
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise NotDirectError("needs scratch memory")
    # For small tensors the driver encodes maps that Blackwell misreads (release notes of driver 595.71.05, known
    # issues); Triton mends them.
    if metadata.tensordesc_meta and metadata.target.arch // 10 != 9:
        raise NotDirectError("tensor maps outside Hopper")


def parameters(compiled: Any) -> list[Any]:
    """What a compiled kernel takes: a `_C.Parameter` for each argument that is not a constant.

    Raises:
        NotDirectError: for an argument that only Triton can pass.
    """
    assert _extension is not None
    source = compiled.src
    descriptors = iter(compiled.metadata.tensordesc_meta or ())
    result = []
    for i, (of_kernel, kind) in enumerate(zip(source.fn.params, source.signature.values(), strict=True)):
        if of_kernel.is_constexpr:
            continue
        attributes = source.attrs.get((i,), [])
        meta = next(descriptors, None) if kind.startswith("tensordesc") else None
        result.append(_parameter(of_kernel, kind, source.constants.get((i,)), attributes, meta))
    return result


def _parameter(
    of_kernel: Any, kind: str, constant: object, attributes: list[Any], meta: Mapping[str, Any] | None
) -> Any:  # fmt: skip
    assert _extension is not None
    make = _extension.module.Parameter
    any_address = of_kernel.do_not_specialize or of_kernel.do_not_specialize_on_alignment
    match = re.match(r"(?:tensordesc<)?\*?k?(\w+)", kind)
    dtype = _DTYPES.get(match[1]) if match else None
    if kind == "constexpr" and constant is None:
        return make.absent()
    if kind.startswith("*") and dtype is not None:
        aligned = ["tt.divisibility", 16] in attributes
        return make.any_pointer(dtype) if any_address else make.pointer(dtype, aligned)
    if meta is not None and dtype is not None and not meta["fp4_padded"] and not meta.get("is_im2col"):
        return make.descriptor(dtype, box=meta["block_size"], swizzle=meta["swizzle"])
    if kind in _NUMBERS and not attributes:
        return getattr(make, _NUMBERS[kind])()
    raise NotDirectError(f"the argument {of_kernel.name} is {kind} {attributes or ''}".rstrip())


def declared_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter that a kernel's assembly declares.

    Raises:
        NotDirectError: where there is no kernel.
    """
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    if entry is None:
        raise NotDirectError("no assembly to compare with")
    # .param .u64 .ptr .global .align 1 name, or .param .align 64 .b8 name[128]
    declarations = re.findall(r"\.param\b[^,]*?\s\.[a-z]+(\d+)\b[^,\[]*(?:\[(\d+)\])?", entry[1])
    return [int(bits) // 8 * int(count or 1) for bits, count in declarations]
