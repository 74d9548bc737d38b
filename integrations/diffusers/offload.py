"""The weights of modules that are offloaded: read and replaced where they are kept, loaded where that was left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_GROUP_HOOK = "group_offloading"  # diffusers' name of it


def check_replaceable(root: nn.Module, argument: str) -> None:
    """Raise a ValueError that names `argument` if weights of `root` are kept where they cannot be exchanged."""
    for module in root.modules():
        for group in _groups(module):
            if group.stream is not None or group.offload_to_disk_path is not None:
                kept = "with a stream" if group.stream is not None else "to disk"
                raise ValueError(
                    f"{argument}: the {type(root).__name__} is group offloaded {kept}, whose copies of the weights"
                    " cannot be exchanged; call accelerate first, then offload"
                )


def stored_weight(module: nn.Module) -> Tensor:
    """The module's weight itself, also where accelerate's sequential offloading leaves only its shape in the module."""
    kept = _kept_by_accelerate(module)
    return module._parameters["weight"] if kept is None else kept[0][kept[1]]  # type: ignore[return-value]


def store_weight(module: nn.Module, weight: nn.Parameter) -> None:
    """Put `weight` in the place of the module's, wherever that is kept."""
    kept = _kept_by_accelerate(module)
    if kept is not None:
        tensors, name = kept
        tensors[name] = weight.detach()
        weight = nn.Parameter(weight.detach().to("meta"), requires_grad=weight.requires_grad)
    module.register_parameter("weight", weight)


def load_left_out(block: nn.Module) -> None:
    """Before `block` runs after blocks that were skipped: load its weights if one of those would have.

    diffusers loads a group of blocks when its first one is called, and with a stream the next group meanwhile. What a
    skipped last block of a group would have unloaded stays until the next step.
    """
    for group in _groups(block):
        loads_itself = group.onload_leader is block and group.onload_self
        if not loads_itself and _device(block) == group.offload_device:
            group.onload_()
            if group.stream is not None:
                group.stream.synchronize()


def _device(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


def _kept_by_accelerate(module: nn.Module) -> tuple[dict[str, Tensor], str] | None:
    """Where accelerate keeps the weights of an offloaded module, and the name of this one there."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):
        tensors = getattr(each, "weights_map", None)
        if getattr(each, "offload", False) and tensors is not None:
            prefix = getattr(tensors, "prefix", "")
            return getattr(tensors, "dataset", tensors), f"{prefix}weight"
    return None


def _groups(module: nn.Module) -> Iterator[Any]:
    """diffusers' groups of modules that are loaded together."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(_GROUP_HOOK)
    if hook is not None:
        yield hook.group
