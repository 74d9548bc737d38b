"""When a call of a pipeline begins: learnt from the pipelines' schedulers."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any


class Calls:
    """The calls of all pipelines that have the same transformers.

    Each call sets its scheduler's timesteps anew: so a new call shows even if the one before was interrupted.
    """

    def __init__(self) -> None:
        self._known: list[_Known] = []
        self._over = True

    @property
    def pipes(self) -> list[Any]:
        """Those that are still there."""
        return [pipe for known in self._known if (pipe := known.pipe()) is not None]

    def watch(self, pipe: Any) -> None:
        """Learn from `pipe` too."""
        if all(known is not pipe for known in self.pipes):
            self._known.append(_Known(weakref.ref(pipe)))

    def begin_forward(self) -> bool:
        """Whether the forward that begins is the first one of a call. A pipe that is gone begins none."""
        is_new, self._over = self._over, False
        self._known = [known for known in self._known if known.pipe() is not None]
        for known in self._known:
            now = getattr(getattr(known.pipe(), "scheduler", None), "timesteps", None)
            is_new |= now is not known.timesteps
            known.timesteps = now
        return is_new

    def end(self) -> None:
        """The call is over."""
        self._over = True


@dataclass
class _Known:
    """A pipe, and the timesteps that its scheduler had at the last forward."""

    pipe: weakref.ref[Any]
    timesteps: Any = None
