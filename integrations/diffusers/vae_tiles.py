"""The tiles of one call of a VAE: found by a stand-in for its decoder or encoder, computed by the real one, and given
to diffusers' code by a stand-in again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .tile_exchange import Tile
from .vae_models import Direction, VaeFamily


class Tiles:
    """Of a VAE and a direction.

    Where a tile is one call, the whole chain of submodules stands for it. Where it is several, one for a few frames
    each, it is the submodule with the memory alone: what is before it or behind it is a convolution of latents, which
    every rank does for itself.

    Attributes:
        tiles: those of a call, once it has run where they are `noted`; in pieces where they have a memory.
        computed: the submodules that stand-ins stand for, and that a tile goes through.
    """

    def __init__(self, vae: Any, family: VaeFamily, direction: Direction) -> None:
        self.tiles: list[Tile] = []
        self._vae = vae
        self._family = family
        self._direction = direction
        self._memory = family.memory
        self._names = direction.chain if self._memory is None else (direction.carries,)
        self.computed = list(self._submodules(self._names).values())

    @property
    def weights(self) -> list[Tensor]:
        """Of all submodules that are part of it."""
        modules = self._submodules(self._direction.chain).values()
        return [tensor for module in modules for tensor in module.state_dict().values()]

    @contextmanager
    def noted(self, dtype: torch.dtype) -> Iterator[None]:
        """Within, diffusers' code adds to `tiles`, and gets tensors of `dtype` without data."""
        memory: Any = _CARRIED  # nobody's

        def note(source: Tensor, options: Mapping[str, Any]) -> Tensor:
            nonlocal memory
            begins, memory = self._begins(options, memory)
            assert begins or self.tiles, "a tile begins with its first piece"
            shape = self._direction.made_shape(self._family, self._vae, source.shape, begins)
            self.tiles.append(Tile(source, shape, begins, options))
            return torch.empty(shape, dtype=dtype, device="meta")

        # What is behind would be given tensors without data. What is before runs: it makes the sources.
        behind = self._direction.chain[self._direction.chain.index(self._names[0]) + 1 :]
        with self._stand_ins(note, self._names[:1] + behind):
            yield

    @contextmanager
    def given_by(self, take: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within, diffusers' code gets what `take` gives for a source."""
        with self._stand_ins(lambda source, options: take(source), self._names):
            yield

    def compute(self, tile: Tile, memory: Any) -> tuple[Tensor, Any]:
        """What the real submodules make of a tile, and the memory that this leaves for the next piece; None where there
        is none. Of the memory that was noted only the length counts.
        """
        kind, options = self._memory, dict(tile.options)
        if kind is None:
            first, *others = self.computed
            made = first(tile.source, **options)
            for module in others:
                made = module(made)
            return made, None
        (module,) = self.computed
        if kind.returned:
            return module(tile.source, **(options | {kind.argument: None if tile.begins else memory}))
        memory = [None] * len(options[kind.argument]) if tile.begins else memory
        if kind.counter is not None:
            options[kind.counter] = [0]
        return module(tile.source, **(options | {kind.argument: memory})), memory

    def _begins(self, options: Mapping[str, Any], before: Any) -> tuple[bool, Any]:
        """Whether a call begins a tile, and the memory that it was given; `before` was given to the call before it."""
        if self._memory is None:
            return True, None
        given = options.get(self._memory.argument)
        return (given is None if self._memory.returned else given is not before), given

    @contextmanager
    def _stand_ins(self, make: Callable[[Tensor, Mapping[str, Any]], Tensor], names: tuple[str, ...]) -> Iterator[None]:
        """Within, the first of the submodules of these names is `make`, and the others return what they are given."""
        real = self._submodules(names)
        returns_memory = self._memory is not None and self._memory.returned
        try:
            for index, (name, module) in enumerate(real.items()):
                stand_in = _StandIn(module, make, returns_memory) if index == 0 else _StandIn(module, _as_it_is, False)
                self._vae._modules[name] = stand_in
            yield
        finally:
            self._vae._modules.update(real)

    def _submodules(self, names: tuple[str, ...]) -> dict[str, nn.Module]:
        """Those that there are, in order. Some VAEs have None instead of a convolution."""
        return {name: module for name in names if (module := self._vae._modules.get(name)) is not None}


_CARRIED = object()
"""What a stand-in returns for a memory: anything but None, so that the next call goes on with the tile."""


def _as_it_is(tensor: Tensor, options: Mapping[str, Any]) -> Tensor:
    assert not options, "what is behind the first submodule takes a tensor alone"
    return tensor


class _StandIn(nn.Module):
    """Stands where `real` stood, which stays below it: whoever moves the VAE now, such as CPU offload, moves it too."""

    def __init__(
        self, real: nn.Module, make: Callable[[Tensor, Mapping[str, Any]], Tensor], returns_memory: bool
    ) -> None:
        super().__init__()
        self.real = real
        self._make = make
        self._returns_memory = returns_memory

    def forward(self, tensor: Tensor, **options: Any) -> Any:
        made = self._make(tensor, options)
        return (made, _CARRIED) if self._returns_memory else made
