"""The attention processors of a transformer, read and replaced; also where the model itself has no methods for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def attn_processors(transformer: nn.Module) -> dict[str, Any]:
    """The processor of every attention module, by the module's path."""
    return {path: module.processor for path, module in _attentions(transformer).items()}


def set_attn_processors(transformer: nn.Module, processors: Mapping[str, Any]) -> None:
    """Give every attention module that is named the processor that is given for it."""
    modules = _attentions(transformer)
    for path, processor in processors.items():
        set_processor = getattr(modules[path], "set_processor", None)
        if set_processor is None:  # Mochi's attention
            modules[path].processor = processor
        else:
            set_processor(processor)


def _attentions(transformer: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in transformer.named_modules() if hasattr(module, "processor")}
