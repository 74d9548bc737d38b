"""Putting diffusers hooks on modules so that they can be taken off without a trace, and finding arguments by name."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from torch import nn

DEFAULT_BRANCH = "default"
_ACCELERATE = ("accelerate.hooks",)  # the modules whose functions wrap forwards for offloading


def add_hook(undo: ExitStack, module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on `module`; closing `undo` takes it off again, with all that came with it."""
    if not hasattr(module, "_diffusers_hook"):
        undo.callback(_drop_empty_registry, module)
    undo.callback(drop_plain_forward, module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    undo.callback(_remove_hook, module, name)


def forget_child_registries(root: nn.Module) -> None:
    """Make diffusers look for hooks anew.

    Later versions keep the list of registries that they once found below a module; a hook that came after would
    neither be reset nor told its context.
    """
    for module in root.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and hasattr(registry, "_child_registries_cache"):
            registry._child_registries_cache = None


def _remove_hook(module: Any, name: str) -> None:
    """Where accelerate has wrapped the forward that the registry had made, what is inside its wrapper is replaced: the
    registry itself would put the forward of the hook's time over it, and nobody would load the module's weights."""
    outer = module.__dict__.get("forward")
    is_wrapped = "_old_forward" in module.__dict__ and getattr(outer, "func", _remove_hook).__module__ in _ACCELERATE
    if is_wrapped:
        module.forward = module._old_forward
    module._diffusers_hook.remove_hook(name, recurse=False)
    if is_wrapped:
        module._old_forward, module.forward = module.forward, outer


def _drop_empty_registry(module: Any) -> None:
    if not module._diffusers_hook.hooks:
        del module._diffusers_hook


def hook_again(module: Any, hook: ModelHook, name: str) -> bool:
    """Put a hook on again that is registered on `module` and yet no longer in its forward: accelerate gives a module
    back the forward that it had found, when its own hook is removed. Returns whether that was so."""
    if "forward" in module.__dict__ and not _is_plain(module):
        return False
    registry = module._diffusers_hook
    hook.fn_ref.original_forward = module.forward
    registry.remove_hook(name, recurse=False)
    registry.register_hook(hook, name)
    return True


def drop_plain_forward(module: nn.Module) -> None:
    """A registry leaves `forward` behind as an attribute of the instance. Where it is the class's own, delete it."""
    if _is_plain(module):
        del module.forward


def _is_plain(module: nn.Module) -> bool:
    """Whether the instance's own forward is its class's."""
    forward = module.__dict__.get("forward")
    return inspect.ismethod(forward) and forward.__self__ is module and forward.__func__ is type(module).forward


@dataclass(frozen=True)
class Argument:
    """One argument of a module's forward, wherever the caller put it."""

    name: str
    position: int

    @staticmethod
    def of(module: nn.Module, name: str) -> Argument:
        """Look `name` up in the signature of the class's forward, which no hook has wrapped."""
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        if name not in parameters:
            raise ValueError(f"pipe: {type(module).__name__}.forward has no argument {name!r}, it has {parameters}")
        return Argument(name, parameters.index(name))

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument's value; None if it was not given."""
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position < len(args) else None

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another value for this one."""
        if self.position < len(args):
            return (*args[: self.position], value, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


class BranchName(StateManager):
    """The name of the running call among those of one step: `"cond"`, `"uncond"`, ...

    The pipeline gives it by `cache_context`, which diffusers announces to every `StateManager` that it finds on a
    stateful hook: as a string in 0.36, later as an object with a name. Calls without one are told apart by their
    prompts, which are the same objects from step to step: no value of theirs is looked at, so the device is not read.

    Args:
        passes: names for calls that are not announced, in the order of their first appearance; () if all are one.
        of: what the name is of, where it is not clear.
    """

    def __init__(self, passes: tuple[str, ...] = (), of: str = "") -> None:
        super().__init__(state_cls=object)  # type: ignore[arg-type]  # Never asked for a state: only the name is of interest.
        self._suffix = f" of {of}" if of else ""
        self._passes = tuple(name + self._suffix for name in passes)
        self.reset()

    def set_context(self, context: Any) -> None:
        self._announced = context is not None
        self.name = (DEFAULT_BRANCH if context is None else getattr(context, "name", context)) + self._suffix

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.set_context(None)
        self.end_call()

    def end_call(self) -> None:
        """Let go of the prompts: the next call has others."""
        self._prompts: dict[str, tuple[Any, ...]] = {}  # of each pass, the one that ran longest ago first

    @torch._disable_dynamo  # Compiled code would be compiled anew for other objects.
    def begin(self, prompts: tuple[Any, ...]) -> bool:
        """A call begins: name it, if nobody has. Prompts that are new when all names are taken get the name of those
        that ran longest ago, so that no more is kept than there are names.

        Args:
            prompts: what tells the call apart; held until the call's end, so that no other object gets its identity.

        Returns:
            Whether what is known of the name's earlier calls belongs to other prompts.
        """
        if self._announced or not self._passes:
            return False
        known = [name for name, theirs in self._prompts.items() if all(map(operator.is_, prompts, theirs))]
        free = [name for name in self._passes if name not in self._prompts]
        self.name = [*known, *free, *self._prompts][0]
        self._prompts.pop(self.name, None)
        self._prompts[self.name] = prompts
        return not known


class CallHook(ModelHook):
    """Keeps the branch's name and tells when the pipeline ends a call. For a module that is never called itself."""

    _is_stateful = True

    def __init__(self, branch: BranchName, on_reset: Callable[[], None]) -> None:
        super().__init__()
        self.branch = branch
        self._on_reset = on_reset

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.branch.reset()
        self._on_reset()
        return module


class DropArgumentHook(ModelHook):
    """Calls the module with one argument replaced by None."""

    def __init__(self, argument: Argument) -> None:
        super().__init__()
        self._argument = argument

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._argument.replaced(args, kwargs, None)
