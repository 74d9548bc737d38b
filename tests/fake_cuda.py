"""A CUDA driver without a GPU, for Triton and for the launcher: what they launch can be compared byte for byte."""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

CONTEXT = 0x1000
STREAM = 0x4000
_FIRST_FUNCTION = 0x3000
_MAX_LAUNCHES = 16


class _Launch(ctypes.Structure):
    """As in fake_cuda.c."""

    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("extended", ctypes.c_uint),
        ("bytes", ctypes.c_uint),
        ("parameters", ctypes.c_ubyte * 4096),
    )


class _Function(ctypes.Structure):
    _fields_ = (("count", ctypes.c_uint), ("sizes", ctypes.c_uint * 128))


@dataclass
class Launch:
    """One launch: `parameters` holds the bytes of each; `by_triton` tells which of the driver's functions was called."""

    function: int
    stream: int
    context: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    by_triton: bool
    parameters: list[bytes]


def build_library(folder: Path) -> Path:
    """Compile the fake driver into `folder`."""
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_suffix(".c")
    headers = Path(nvidia.dirname) / "include"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-pthread", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    subprocess.run([*command, "-o", str(path), str(source)], check=True)
    return path


class FakeCuda:
    """The fake driver library, built into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = build_library(folder)
        # Triton's own modules ask for libcuda.so.1, and find the one that is already loaded.
        self._library = ctypes.CDLL(str(self.path), ctypes.RTLD_GLOBAL)

    def _number(self, name: str, kind: Any = ctypes.c_uint) -> Any:
        return kind.in_dll(self._library, name)

    @property
    def pushed_and_popped(self) -> tuple[int, int]:
        return self._number("pushed").value, self._number("popped").value

    def set_context(self, handle: int) -> None:
        self._number("context", ctypes.c_uint64).value = handle

    def fail_with(self, result: int) -> None:
        """What every launch from now on returns; 0 is success."""
        self._number("result").value = result

    def expect(self, function: int, sizes: list[int]) -> None:
        """How many bytes each parameter of a function has."""
        known = (_Function * 64).in_dll(self._library, "functions")[function - _FIRST_FUNCTION]
        known.count = len(sizes)
        known.sizes[: len(sizes)] = sizes

    def launches_of(self, call: Any) -> list[Launch]:
        """What `call()` launches, in order."""
        before = self._number("launches").value
        call()
        after = self._number("launches").value
        assert after - before <= _MAX_LAUNCHES
        ring = (_Launch * _MAX_LAUNCHES).in_dll(self._library, "launched")
        return [self._read(ring[i % _MAX_LAUNCHES]) for i in range(before, after)]

    def _read(self, noted: _Launch) -> Launch:
        known = (_Function * 64).in_dll(self._library, "functions")[noted.function - _FIRST_FUNCTION]
        rest = bytes(noted.parameters[: noted.bytes])
        parameters = []
        for size in known.sizes[: known.count]:
            parameters.append(rest[:size])
            rest = rest[size:]
        return Launch(
            noted.function, noted.stream, noted.context, tuple(noted.grid), tuple(noted.block), noted.shared_bytes,
            bool(noted.extended), parameters,
        )  # fmt: skip


def parameter_sizes(cubin: bytes) -> list[int]:
    """Bytes of each parameter of the only kernel of a binary, from where a driver reads them."""
    tool = Path(nvidia.dirname) / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([tool, "-elf", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"EIATTR_KPARAM_INFO\s.*?Ordinal\s*:\s*(\w+)\s+Offset\s*:\s*\w+\s+Size\s*:\s*(\w+)", dump, re.S)
    return [int(size, 16) for _, size in sorted((int(ordinal, 16), size) for ordinal, size in found)]


class FakeDriver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA GPUs, as it is, on a device that only the fake library knows."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.get_device_capability = lambda device=None: (9, 0)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: STREAM
        load = self.utils.load_binary

        def load_binary(name: str, binary: bytes, *rest: Any) -> Any:
            loaded = load(name, binary, *rest)
            fake.expect(loaded[1], parameter_sizes(binary))
            return loaded

        self.utils = SimpleNamespace(**(vars(self.utils) | {"load_binary": load_binary}))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def use_in_triton(fake: FakeCuda) -> None:
    """Let Triton compile for sm90, and load into and launch on the fake."""
    with triton.knobs.nvidia.scope():
        triton.knobs.nvidia.libcuda_path = str(fake.path.parent)
        triton.runtime.driver.set_active(FakeDriver(fake))
