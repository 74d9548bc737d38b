"""Builds the extension module `para_kernels._C`; everything else about the package stands in pyproject.toml.

Environment:
    PARA_KERNELS_SKIP_EXT=1  build a pure Python wheel; the CPU ops then run on torch's own.
    PARA_KERNELS_NATIVE=1    tune for the processor of the building machine; such a wheel may not run elsewhere.
"""

import os
import platform
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cuda_attention.cpp",
    "csrc/cuda_driver.cpp",
    "csrc/kernel_table.cpp",
    "csrc/launcher.cpp",
    "csrc/merge_states.cpp",
    "csrc/residual_diff.cpp",
    "csrc/transport/stream_program.cpp",
]
KERNELS = ["csrc/kernels/merge_states.cpp", "csrc/kernels/residual_diff.cpp"]
# at::parallel_for is serial unless compiled with OpenMP. The runtime is not linked but the one that torch has loaded: a
# second one would bring its own threads.
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]

# Every kernel is compiled once per capability, and csrc/kernel_table.cpp chooses at run time. The names are ATen's.
CAPABILITY_FLAGS: dict[str, list[str]] = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITY_FLAGS["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]


def flag_is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def extension_arguments() -> dict[str, Any]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Compiles the kernels per capability, and links them after the objects that run on every processor.

        The order matters: of an inline function that several objects hold, the linker keeps the first, and that one
        must not use instructions which the processor may lack.
        """

        def build_extension(self, ext) -> None:
            for capability, flags in CAPABILITY_FLAGS.items():
                defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
                ext.extra_objects += self.compiler.compile(
                    KERNELS,
                    output_dir=str(Path(self.build_temp, capability)),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*ext.extra_compile_args["cxx"], *flags, *defines],
                    depends=ext.depends,
                )
            super().build_extension(ext)

    defines = [f"-DPARA_KERNELS_WITH_{capability}" for capability in CAPABILITY_FLAGS]
    native = ["-march=native"] if flag_is_set("PARA_KERNELS_NATIVE") else []
    extension = CppExtension(
        name="para_kernels._C",
        sources=SOURCES,
        depends=[*map(str, Path("csrc").rglob("*.h")), "setup.py"],
        extra_compile_args={"cxx": [*FLAGS, *native, *defines]},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


setup(**({} if flag_is_set("PARA_KERNELS_SKIP_EXT") else extension_arguments()))
