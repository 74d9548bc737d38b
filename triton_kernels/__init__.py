"""Triton kernels, one file each: the kernel, then its launcher. They import torch and triton only."""

if __name__ != "para_kernels.triton_kernels":
    raise ImportError(
        f"these kernels were imported as {__name__!r}; import them as 'para_kernels.triton_kernels' "
        "(another package owns the top-level name 'triton_kernels')",
        name=__name__,
    )
