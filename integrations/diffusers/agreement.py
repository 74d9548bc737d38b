"""What the ranks of a parallel pipeline have in common: inputs and settings, the noise, one progress bar."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from para_kernels.parallel.agreement import check_agreement, exchange
from para_kernels.parallel.collective import broadcast
from para_kernels.parallel.failure import global_rank

SAMPLED = 64  # elements of each tensor that are compared: two noises or two prompts never agree in all of them
SAME = 0.05  # of the largest sampled element: far above the rounding of one kernel or another, far below other noise


def agree(group: ProcessGroup, settings: Mapping[str, str], tensors: Mapping[str, Tensor | None]) -> None:
    """Find out whether all ranks of `group` have the same settings and were given the same tensors.

    Shapes and dtypes are compared exactly, values by a sample of them and loosely: other hardware rounds otherwise.
    Between hosts, with one read of the device for each tensor: meant for once per call.

    Raises:
        ValueError: on every rank, if anything differs; it names what, on which rank, and what it is there.
        RankFailure: if a rank does not come.
    """
    layouts = {name: _layout(tensor) for name, tensor in tensors.items()}
    check_agreement(group, dict(settings) | layouts, what="settings and inputs")
    values = {name: _sample(tensor) for name, tensor in tensors.items() if tensor is not None}
    first, *others = exchange(group, values, "inputs")
    for rank, theirs in enumerate(others, start=1):
        for name, expected in first.items():
            if not _alike(expected, theirs[name]):
                raise ValueError(
                    f"{name}: got other values on rank {global_rank(group, rank)} than on rank {global_rank(group, 0)};"
                    " every rank must be given the same prompts, generator or latents, and arguments"
                )


def _layout(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].float().tolist()


def _alike(expected: Sequence[float], got: Sequence[float]) -> bool:
    """Close; values that are not finite have to be the same."""
    allowed = SAME * max((abs(value) for value in expected if math.isfinite(value)), default=0.0)
    return all(
        abs(a - b) <= allowed if math.isfinite(a) and math.isfinite(b) else str(a) == str(b)
        for a, b in zip(expected, got, strict=True)
    )


def share_noise(undo: ExitStack, pipe: Any, method: str, from_first_rank: Callable[[Tensor, str], Tensor]) -> None:
    """Let every rank start from rank 0's noise: whatever generator, seed or latents it was given, or none.

    The noise itself is sent, once per call, not a seed: the pipeline draws from the generator that the user gave or
    from the global one, and neither is touched.

    Args:
        method: name of the pipe's method that returns the noise.
        from_first_rank: takes a tensor and its name, returns what rank 0 has.
    """
    known, own = weakref.ref(pipe), pipe.__dict__.get(method)
    function = getattr(type(pipe), method)

    @wraps(function)
    def noise(*args: Any, **kwargs: Any) -> Any:
        _check_scheduler(known())
        latents = own(*args, **kwargs) if own is not None else function(known(), *args, **kwargs)
        if isinstance(latents, tuple):  # the noise, and what the pipeline has made of images
            return tuple(from_first_rank(x, "latents") if isinstance(x, Tensor) else x for x in latents)
        return from_first_rank(latents, "latents")

    _set(undo, pipe, method, noise)


def _check_scheduler(pipe: Any) -> None:
    """A scheduler that draws noise of its own at every step would draw another on every rank."""
    if getattr(pipe.scheduler.config, "stochastic_sampling", False):
        raise ValueError("pipe: its scheduler has stochastic_sampling=True, allowed over several ranks is False")


def from_first(tensor: Tensor, name: str, group: ProcessGroup) -> Tensor:
    """The tensor that the first rank of `group` has.

    Raises:
        ValueError: on every rank, if its shape or dtype differs between ranks.
        RankFailure: if a rank does not come.
    """
    check_agreement(group, {name: _layout(tensor)}, what=name)
    own = tensor.clone(memory_format=torch.contiguous_format)  # What was given may be the user's.
    return broadcast(own, group, what=name)


def quiet_progress(undo: ExitStack, pipe: Any) -> None:
    """No progress bar, whatever else the user has configured for it."""
    config = dict(getattr(pipe, "_progress_bar_config", {}))
    _set(undo, pipe, "_progress_bar_config", config | {"disable": True})


def _set(undo: ExitStack, pipe: Any, name: str, value: Any) -> None:
    """Set an attribute of this one pipe; closing `undo` gives back what was there, unless somebody has set another."""
    had, before = name in pipe.__dict__, pipe.__dict__.get(name)
    setattr(pipe, name, value)
    undo.callback(_give_back, weakref.ref(pipe), name, value, had, before)


def _give_back(known: Callable[[], Any], name: str, ours: Any, had: bool, before: Any) -> None:
    pipe = known()
    if pipe is None or pipe.__dict__.get(name) is not ours:
        return
    if had:
        setattr(pipe, name, before)
    else:
        delattr(pipe, name)
