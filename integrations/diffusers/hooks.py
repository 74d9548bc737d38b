"""Putting diffusers hooks on modules so that they can be taken off without a trace, and finding arguments by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from torch import nn

DEFAULT_BRANCH = "default"


def add_hook(undo: ExitStack, module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on `module`; closing `undo` takes it off again, with all that came with it."""
    if not hasattr(module, "_diffusers_hook"):
        undo.callback(_drop_empty_registry, module)
    undo.callback(_drop_plain_forward, module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook, name)
    undo.callback(registry.remove_hook, name, recurse=False)


def forget_child_registries(root: nn.Module) -> None:
    """Make diffusers look for hooks anew.

    Later versions keep the list of registries that they once found below a module; a hook that came after would
    neither be reset nor told its context.
    """
    for module in root.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and hasattr(registry, "_child_registries_cache"):
            registry._child_registries_cache = None


def _drop_empty_registry(module: Any) -> None:
    if not module._diffusers_hook.hooks:
        del module._diffusers_hook


def _drop_plain_forward(module: nn.Module) -> None:
    """A registry leaves `forward` behind as an attribute of the instance. Where it is the class's own, delete it."""
    forward = module.__dict__.get("forward")
    if inspect.ismethod(forward) and forward.__self__ is module and forward.__func__ is type(module).forward:
        del module.forward


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
    """Which of the calls of one step is running: the name that the pipeline gives it by `cache_context` (`"cond"`,
    `"uncond"`, ...); where it gives none, the step's first call is `"default"`, its second `"default 2"`, and so on.

    diffusers announces the name to every `StateManager` that it finds on a stateful hook: as a string in 0.36, later as
    an object with a name.

    Args:
        of: what the name is of, where it is not clear.
    """

    def __init__(self, of: str = "") -> None:
        super().__init__(state_cls=object)  # type: ignore[arg-type]  # Never asked for a state: only the name is of interest.
        self._suffix = f" of {of}" if of else ""
        self.reset()

    @property
    def name(self) -> str:
        number = f" {self._calls}" if self._calls > 1 else ""
        return (self._announced or DEFAULT_BRANCH + number) + self._suffix

    def begin_forward(self, step: object) -> None:
        """A call begins; `step` differs from step to step, None where that is not known."""
        self._calls = self._calls + 1 if step is not None and step == self._step else 1
        self._step = step

    def set_context(self, context: Any) -> None:
        self._announced = None if context is None else getattr(context, "name", context)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self._announced: str | None = None
        self._step: object = None
        self._calls = 0


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
