"""First Block Cache: the first block's residual tells whether the others may be skipped.

The idea is ParaAttention's First Block Cache (https://github.com/chengzeyi/ParaAttention), a simplification of
TeaCache (Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", arXiv 2411.19108,
section 3): how much the first transformer block changes its input tells how much the whole stack will. With
`first_blocks` and `last_blocks` it is the dual block cache of cache-dit (https://github.com/vipshop/cache-dit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from para_kernels.cache.policy import CacheState, Policy, Seen, check_count
from para_kernels.residual import residual_diff


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(Policy):
    """First Block Cache.

    A step reuses if `diff < threshold`, where `diff` = mean|previous - current| / mean|previous| over the first
    blocks' residual of the video stream. `previous` is the residual of the last *computed* step: it is refreshed on a
    miss only. Were it refreshed on every step, many small changes in a row would each pass the threshold and their
    sum would never be noticed; measured against the last computed step, the drift of a run of reused steps is bounded
    by the threshold.

    Args:
        threshold and the others of `Policy`; `first_blocks` >= 1, by default 1.
        downsample_factor: compare every n-th token only, >= 1.

    Memory, beside that of `Policy`: one video stream (an n-th of it), for each branch.

    Raises:
        ValueError: if an argument has another type or lies outside its range.
    """

    title: ClassVar[str] = "First Block Cache"

    first_blocks: int = 1
    downsample_factor: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first_blocks", self.first_blocks, least=1)
        check_count("downsample_factor", self.downsample_factor, least=1)

    def new_state(self, branch: str = "default") -> CacheState:
        return _FirstBlockState(self, branch)


class _FirstBlockState(CacheState):
    policy: FirstBlockCache

    def reset(self) -> None:
        super().reset()
        self._reference: Tensor | None = None
        self._residual: Tensor | None = None

    def _change(self, seen: Seen, comparable: bool) -> float | None:
        tokens = seen.every(self.policy.downsample_factor)
        self._residual, sums = residual_diff(
            seen.hidden_in[:, tokens], seen.hidden_out[:, tokens], self._reference if comparable else None
        )
        return seen.change(sums) if comparable else None

    def _decided(self, reused: bool) -> None:
        if not reused:
            self._reference = self._residual
        self._residual = None
