"""Caches of denoising steps: when a step may reuse what an earlier one computed, and what is added then.

One file per policy, all on the base in `policy.py`. Every policy can always compute its first and last blocks,
extrapolate what it reuses (`taylor.py`), and bound the error that it accumulates.
"""

from para_kernels.cache.adacache import AdaCache
from para_kernels.cache.first_block import FirstBlockCache
from para_kernels.cache.policy import CacheState, Policy, StepRecord, check_threshold
from para_kernels.cache.teacache import Calibration, TeaCache, fit_rescale

__all__ = [
    "AdaCache",
    "CacheState",
    "Calibration",
    "FirstBlockCache",
    "Policy",
    "StepRecord",
    "TeaCache",
    "check_threshold",
    "fit_rescale",
]
