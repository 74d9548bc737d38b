"""Attention kernels for diffusion transformers: exact variable-length attention, fused residual differences."""

from para_kernels.attention import flash_attention, flash_attention_varlen, merge_states
from para_kernels.cache import AdaCache, FirstBlockCache, TeaCache
from para_kernels.parallel.mesh import ContextParallel
from para_kernels.residual import residual_diff

__version__ = "0.1.0"

__all__ = [
    "AdaCache",
    "ContextParallel",
    "FirstBlockCache",
    "TeaCache",
    "flash_attention",
    "flash_attention_varlen",
    "merge_states",
    "residual_diff",
]
