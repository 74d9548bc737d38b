"""How far every attention layer of a running transformer is from float64, on the inputs that it really gets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .models import Family

MOST_TOKENS = 4096  # of a sequence: float64 has no flash attention, the scores of all heads are stored at once


@dataclass(frozen=True)
class LayerError:
    """norm(output - reference) / norm(reference) of one attention layer's video stream, in one call."""

    layer: str
    error: float


@dataclass
class LayerReferences:
    """The attention layers of a transformer's blocks as they were: with their own processors and weights.

    A layer is its projections, norms, rotary embedding, attention and output projection. Its reference is the same in
    float64 by diffusers' own code, which keeps norms and rotary embedding in float32: differences below about 1e-6 are
    its own. Copies stay in the model's dtype, on the CPU, one at a time is converted.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)

    @staticmethod
    def of(transformer: nn.Module, family: Family) -> LayerReferences:
        """Of a transformer on which nothing is installed."""
        layers = dict(_attention_layers(transformer, family))
        return LayerReferences({path: copy.deepcopy(layer).to("cpu") for path, layer in layers.items()})

    @contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[list[LayerError]]:
        """Measure every call of a layer, in the order of the calls; longer sequences than MOST_TOKENS are left out."""
        found: list[LayerError] = []
        with ExitStack() as undo:
            for path in self.layers:
                layer = transformer.get_submodule(path)
                undo.callback(layer.register_forward_hook(self._compare(path, found), with_kwargs=True).remove)
            yield found

    def _compare(self, path: str, found: list[LayerError]) -> Callable[..., None]:
        def compare(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            got = _video(output)
            if got.shape[1] <= MOST_TOKENS:
                found.append(LayerError(path, self._error(path, args, kwargs, got)))

        return compare

    @torch.no_grad()
    def _error(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], got: Tensor) -> float:
        reference = copy.deepcopy(self.layers[path]).to(got.device, torch.float64)
        expected = _video(reference(*_in_float64(args), **_in_float64(kwargs)))
        return float((got.double() - expected).norm() / expected.norm())


def _attention_layers(transformer: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    for name in family.block_lists:
        for path, module in getattr(transformer, name).named_modules(prefix=name):
            if hasattr(module, "processor"):
                yield path, module


def _video(output: Any) -> Tensor:
    """The first stream. The text behind it may be padded, and what stands there is nobody's business."""
    return output[0] if isinstance(output, tuple) else output


def _in_float64(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_in_float64(item) for item in value)
    if isinstance(value, dict):
        return {key: _in_float64(item) for key, item in value.items()}
    return value
