"""Where a module's own forward is held, below the hooks of accelerate and diffusers, and putting another in its place.

What takes its place runs under every hook, of whatever origin, and in whatever order all of them came.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from .hooks import drop_plain_forward

Forward = Callable[..., Any]


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward of the module's class still runs below whatever hooks there are."""
    return any(_is_own(module, getattr(holder, name)) for holder, name in _forwards(module))


def replace_own_forward(undo: ExitStack, module: nn.Module, make: Callable[[Forward], Forward]) -> None:
    """Put `make(forward)` in the place of the own `forward` of the module; closing `undo` takes it off again."""
    original = type(module).forward.__get__(module)
    forward = make(original)
    undo.callback(drop_plain_forward, module)
    undo.callback(_replace, module, lambda found: found is forward, original)
    _replace(module, functools.partial(_is_own, module), forward)


def _forwards(module: nn.Module) -> Iterator[tuple[object, str]]:
    """Every place, as object and attribute, in which a forward of the module is kept: by the module itself, and below
    hooks of accelerate's and of diffusers'.
    """
    yield module, "forward"
    if "_old_forward" in module.__dict__:
        yield module, "_old_forward"
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def _is_own(module: nn.Module, forward: object) -> bool:
    """Whether it is the forward of the module's class, bound to the module."""
    return inspect.ismethod(forward) and forward.__self__ is module and forward.__func__ is type(module).forward


def _replace(module: nn.Module, is_meant: Callable[[object], bool], forward: Forward) -> None:
    for holder, name in _forwards(module):
        if is_meant(getattr(holder, name)):
            setattr(holder, name, forward)
