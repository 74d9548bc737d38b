"""When a call of a pipeline begins: learnt from the pipelines' schedulers."""

from __future__ import annotations

import weakref
from typing import Any


class Calls:
    """The calls of all pipelines that have the same transformers.

    Each call sets its scheduler's timesteps anew: so a new call shows even if the one before was interrupted.
    """

    def __init__(self) -> None:
        self._pipes: list[weakref.ref[Any]] = []
        self._schedules: tuple[Any, ...] = ()
        self._over = True

    @property
    def pipes(self) -> list[Any]:
        """Those that are still there."""
        return [pipe for known in self._pipes if (pipe := known()) is not None]

    def watch(self, pipe: Any) -> None:
        """Learn from `pipe` too."""
        if all(known is not pipe for known in self.pipes):
            self._pipes.append(weakref.ref(pipe))

    def begin_forward(self) -> bool:
        """Whether the forward that begins is the first one of a call."""
        schedules = tuple(getattr(pipe.scheduler, "timesteps", None) for pipe in self.pipes)
        same = len(schedules) == len(self._schedules) and all(
            now is before for now, before in zip(schedules, self._schedules, strict=True)
        )
        is_new = self._over or not same
        self._schedules, self._over = schedules, False
        return is_new

    def end(self) -> None:
        """The call is over."""
        self._over = True
