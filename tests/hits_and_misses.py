"""Policies that reuse some steps of the tiny pipeline and compute others, and which they were."""

from __future__ import annotations

from para_kernels import AdaCache, FirstBlockCache, TeaCache
from para_kernels.cache import Policy
from para_kernels.integrations.diffusers import Handle

STEPS = 8
PLAIN = (1.0, 0.0)
# Thresholds that give hits and misses in turn on random weights, whose streams change by tens of per cent a step.
POLICIES: dict[str, Policy] = {
    "teacache": TeaCache(0.6, rescale=PLAIN),
    "adacache": AdaCache(1.0, codebook=((0.3, 3), (1.0, 2))),
    "two first blocks": FirstBlockCache(0.3, first_blocks=2),
    "first and last blocks": FirstBlockCache(0.32, first_blocks=1, last_blocks=2),
    "taylor": FirstBlockCache(0.32, taylor_order=1),
    "teacache, last block": TeaCache(0.6, rescale=PLAIN, last_blocks=1, taylor_order=2),
    "adacache, first and last block": AdaCache(1.0, codebook=((1.0, 3),), first_blocks=1, last_blocks=1),
    "bounded": FirstBlockCache(9.0, max_accumulated_error=0.6),
}


def pattern(handle: Handle, branch: str = "cond") -> str:
    """One letter per step of a branch: (c)omputed or (r)eused."""
    return "".join("r" if record.reused else "c" for record in handle.records if record.branch == branch)
