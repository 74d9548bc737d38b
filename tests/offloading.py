"""Offloading with the CPU as the device that computes, in which weights that are not loaded are lost or NaN."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import nn

CPU = torch.device("cpu")
GROUP = "group_offloading"


def model(pipe: Any) -> None:
    """Whole models, loaded when they are called: the forward is unwrapped and wrapped anew after each call."""
    pipe.enable_model_cpu_offload(device="cpu")


def sequential(pipe: Any) -> None:
    """Single modules of the transformer, as `enable_sequential_cpu_offload` has them of all models: what is not loaded is
    on the meta device. (With the CPU as the device that computes, accelerate itself fails on some text encoders.)"""
    cpu_offload(pipe.transformer, CPU, offload_buffers=bool(pipe.transformer._parameters))


def group(pipe: Any, offload_type: str, blocks: int | None = None, spoil: bool = True) -> None:
    """Groups of blocks, or single layers, of the transformer; with `spoil`, NaN while they are not loaded."""
    arguments: dict[str, Any] = {"onload_device": CPU, "offload_device": CPU, "offload_type": offload_type}
    # diffusers 0.36 asks for the accelerator, of which there is none, for streams that are not used.
    with patch.object(torch.accelerator, "current_accelerator", return_value=CPU):
        apply_group_offloading(pipe.transformer, **arguments, num_blocks_per_group=blocks)
    for loaded in groups(pipe.transformer) if spoil else []:
        Poisoned(loaded)


WAYS: dict[str, Callable[[Any], None]] = {
    "model": model,
    "sequential": sequential,
    "group of one": partial(group, offload_type="block_level", blocks=1),
    "group of two": partial(group, offload_type="block_level", blocks=2),
    "group of layers": partial(group, offload_type="leaf_level"),
}
# Offloaded weights can be read where offloading keeps them.
READABLE = {
    name: partial(way, spoil=False) if isinstance(way, partial) else way  # type: ignore[call-arg]
    for name, way in WAYS.items()
}


class Poisoned:
    """One of diffusers' groups whose weights are NaN while they are not loaded."""

    def __init__(self, group: Any) -> None:
        modules = [parameter for module in group.modules for parameter in module.parameters()]
        self._weights = {parameter: parameter.data for parameter in [*modules, *group.parameters]}
        group.onload_, group.offload_ = self.load, self.spoil
        self.spoil()

    def load(self) -> None:
        for parameter, data in self._weights.items():
            parameter.data = data

    def spoil(self) -> None:
        for parameter, data in self._weights.items():
            parameter.data = torch.full_like(data, torch.nan)


def groups(root: nn.Module) -> list[Any]:
    """diffusers' groups below `root`, each once."""
    registries = [getattr(module, "_diffusers_hook", None) for module in root.modules()]
    hooks = [registry.get_hook(GROUP) for registry in registries if registry is not None]
    return list({id(hook.group): hook.group for hook in hooks if hook is not None}.values())


def hooks_of_offloading(root: nn.Module) -> list[str]:
    """Where offloading has hooks."""
    return [path for path, module in root.named_modules() if hasattr(module, "_hf_hook") or _grouped(module)]


def _grouped(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(GROUP) is not None


def take_off(pipe: Any) -> None:
    """No offloading any more, by accelerate's and by diffusers' own means."""
    for loaded in groups(pipe.transformer):
        loaded.onload_()
    pipe.remove_all_hooks()
    remove_hook_from_module(pipe.transformer, recurse=True)
    for module in pipe.transformer.modules():
        if _grouped(module):
            module._diffusers_hook.remove_hook(GROUP, recurse=False)
