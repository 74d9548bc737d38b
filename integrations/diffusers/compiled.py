"""Compiled blocks: `torch.compile(fullgraph=True)` of each kind of block, once for all blocks of the kind.

What is compiled stands below every hook: it takes the place of the class's own forward (own_forward.py), where a hook
would otherwise call that. So the hooks stay in Python. Which blocks a cache skips and how a sequence is cut is decided
between the blocks, and no graph knows of it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionLengths
from .hooks import Argument
from .own_forward import Forward, has_own_forward, replace_own_forward

DEFAULT_BACKEND = "inductor"


class CompiledBlocks:
    """What the compiled blocks of one transformer share: what they read, and one function for each kind.

    Args:
        lengths: what the blocks' attention processors read.
        streams: names of the blocks' arguments that are (B, rows, C).
        backend: of `torch.compile`.
    """

    def __init__(self, lengths: AttentionLengths, streams: Sequence[str], backend: str) -> None:
        self.lengths = lengths
        self.streams = streams
        self._backend = backend
        self._functions: dict[tuple[type[nn.Module], bool | None], Forward] = {}

    def retune(self, backend: str) -> None:
        """Go on with another backend: blocks are compiled anew."""
        if backend != self._backend:
            self._backend = backend
            self._functions.clear()

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's forward, compiled when its kind first runs, with and without modulations that others made."""
        kind, made = type(block), self.lengths.modulations
        key = (kind, None if made is None else bool(made))
        if key not in self._functions:
            self._functions[key] = _compiled(kind, self._backend)
        return self._functions[key](self.lengths, kind.forward, block, *args, **kwargs)

    def add_to(self, blocks: Sequence[nn.Module], undo: ExitStack) -> None:
        """Put the compiled forward under the blocks, which `check_compilable` has passed; closing `undo` takes it off
        again.
        """
        for block in blocks:
            replace_own_forward(undo, block, functools.partial(CompiledForward, block, self))


class CompiledForward:
    """In the place of one block's own forward, `original`."""

    def __init__(self, block: nn.Module, compiled: CompiledBlocks, original: Forward) -> None:
        functools.update_wrapper(self, original)  # hooks ask a forward for its signature
        self._block = block
        self._compiled = compiled
        self._streams = [Argument.of(block, name) for name in compiled.streams]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for stream in self._streams:
            if (value := stream.get(args, kwargs)) is not None:  # None where another argument has all streams.
                args, kwargs = stream.replaced(args, kwargs, laid_out(value))
        return self._compiled.run(self._block, args, kwargs)


def laid_out(stream: Tensor) -> Tensor:
    """The same rows, contiguous, to the strides of dimensions that do not matter, and no view of another tensor.

    A graph holds for one layout. The embedders' output is transposed, what a block or a rank cuts is a view: without
    this the first blocks, and what follows in their layout, would be graphs of their own. Most often nothing is copied.
    """
    return stream.contiguous().view(-1).view(stream.shape).detach()


def _compiled(kind: type[nn.Module], backend: str) -> Forward:
    """A function that runs the blocks of a kind.

    Dynamo keeps at most eight graphs for one code object, and fails where a ninth is needed. Each kind, and each
    installation, has a code object of its own: other models in the process do not count.
    """
    name = f"compiled_{kind.__name__}"
    function = FunctionType(_run.__code__.replace(co_name=name), _run.__globals__, name)
    # Every number is dynamic from the start: else the second resolution would be compiled anew, and the third.
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def _run(lengths: AttentionLengths, forward: Forward, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The block's own `forward`; this is what is traced.

    The lengths come as an argument, although the block's processor holds the same object: numbers and tensors that
    Dynamo finds by way of a module are constants to it, those of an argument may change from call to call. It takes
    the object for what it saw first, and so it has to see this one first.
    """
    lengths.shard  # noqa: B018
    return forward(block, *args, **kwargs)


def check_compilable(blocks: Sequence[nn.Module], backend: str, installed: bool) -> None:
    """Find out whether the blocks can be compiled, on which this has been `installed` already or not.

    Raises:
        ValueError: for an unknown backend, or if a block is compiled already, has a forward of its own, or has hooks
            in its inside.
    """
    known = torch.compiler.list_backends(exclude_tags=None)  # type: ignore[arg-type]
    if backend not in known:
        raise ValueError(f"compile: got the backend {backend!r}, allowed is one of {known}")
    check_no_hooks_inside(blocks)
    for block in [] if installed else blocks:
        if getattr(block, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"compile: a {type(block).__name__} is compiled already, hooks included; allowed is one that is not"
            )
        if not has_own_forward(block):
            raise ValueError(
                f"compile: the forward of a {type(block).__name__} has been replaced, allowed is that of its class"
            )


def check_no_hooks_inside(blocks: Sequence[nn.Module]) -> None:
    """Raise a ValueError if a hook stands inside of a block: of offloading single layers, of casting them, of a cache
    of attention. It would have to run in the middle of a graph.
    """
    for block in blocks:
        for path, module in block.named_modules():
            if path and (hook := hook_of(module)) is not None:
                raise ValueError(
                    f"compile: a {type(hook).__name__} stands on {path!r}, inside of a {type(block).__name__}; allowed"
                    " are hooks on whole blocks or the whole transformer: pipe.enable_model_cpu_offload(), or"
                    ' enable_group_offload(offload_type="block_level"); else compile=False'
                )


def hook_of(module: nn.Module) -> object | None:
    """One of accelerate's or diffusers' hooks on the module, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    hooks = [] if registry is None else list(registry.hooks.values())
    return getattr(module, "_hf_hook", None) or next(iter(hooks), None)


def kinds(blocks: Sequence[nn.Module]) -> str:
    """As in "20 x DualBlock, 40 x SingleBlock"."""
    return ", ".join(f"{count} x {name}" for name, count in Counter(type(block).__name__ for block in blocks).items())
