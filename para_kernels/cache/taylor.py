"""Extrapolation of what a reused step adds, from what the last computed ones added.

TaylorSeer (Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", arXiv 2503.06923,
section 3) predicts a feature k steps after the last computed one from its finite differences over the computed steps,
N apart. Its sum of `differences * (k / N)^i / i!` takes a backward difference for the derivative at the last computed
step, which is wrong by half an interval from order 2 on. Newton's form of the same polynomial costs the same and passes
through every computed step, so it stands here, as Lagrange weights: orders 0 and 1 are the paper's, order 2 is exact
where the paper's is not, and computed steps need not be evenly spaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ORDER = 2


@dataclass(frozen=True)
class _Node:
    """What a computed step added to each stream."""

    step: int
    tails: tuple[Tensor, ...]


class Trajectory:
    """What the last computed steps added, as a polynomial in the step number.

    Keeps `order` + 1 tensors of each reused stream's size; while a step is computed, `order`.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._nodes: list[_Node] = []

    def make_room(self) -> None:
        """A step is about to be computed: let go of what the polynomial will not need any more."""
        self._nodes = self._nodes[len(self._nodes) - self._order :] if len(self._nodes) > self._order else self._nodes

    def add(self, step: int, tails: tuple[Tensor, ...]) -> None:
        """The step has been computed, and this is what it added."""
        self.make_room()
        self._nodes.append(_Node(step, tails))

    def applied(self, streams: Sequence[Tensor], step: int) -> tuple[Tensor, ...]:
        """The streams with what step number `step` is expected to add. Reads nothing on the host.

        With fewer computed steps than `order` + 1 the order is what they allow.
        """
        weights = lagrange_weights([node.step for node in self._nodes], step)
        return tuple(self._added(stream, index, weights) for index, stream in enumerate(streams))

    def _added(self, stream: Tensor, index: int, weights: Sequence[float]) -> Tensor:
        # The newest first: a single node has the weight 1.0, and the sum is then the plain one, to the bit.
        (node, weight), *others = list(zip(self._nodes, weights, strict=True))[::-1]
        result = torch.add(stream, node.tails[index], alpha=weight)
        for node, weight in others:
            result = torch.add(result, node.tails[index], alpha=weight)
        return result


def lagrange_weights(nodes: Sequence[int], at: int) -> list[float]:
    """Weights of the values at `nodes` in the value at `at` of the polynomial through them."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            if other != node:
                weight *= (at - other) / (node - other)
        weights.append(weight)
    return weights
