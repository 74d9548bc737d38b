"""Which call of a pipeline, and which of its steps, a forward belongs to: learnt from the pipelines' schedulers."""

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
        self._idle: tuple[Any, ...] = ()  # the schedules of calls that are over
        self._over = True

    @property
    def pipes(self) -> list[Any]:
        """Those that are still there."""
        return [pipe for known in self._pipes if (pipe := known()) is not None]

    def watch(self, pipe: Any) -> None:
        """Learn from `pipe` too; it is not in a call."""
        if all(known is not pipe for known in self.pipes):
            self._pipes.append(weakref.ref(pipe))
            self._idle = (*self._idle, _timesteps(pipe))

    def begin_forward(self) -> bool:
        """Whether the forward that begins is the first one of a call."""
        schedules = self._all_timesteps()
        is_new = self._over or len(schedules) != len(self._schedules) or not _within(schedules, self._schedules)
        self._schedules, self._over = schedules, False
        return is_new

    def end(self) -> None:
        """The call is over."""
        self._over = True
        self._idle = self._all_timesteps()

    @property
    def step(self) -> tuple[int | None, ...] | None:
        """Differs from step to step of the running call; None outside of one, and where schedulers do not tell."""
        schedulers = [pipe.scheduler for pipe in self.pipes]
        if _within(self._all_timesteps(), self._idle) or not all(hasattr(known, "step_index") for known in schedulers):
            return None
        return tuple(known.step_index for known in schedulers)

    def _all_timesteps(self) -> tuple[Any, ...]:
        return tuple(map(_timesteps, self.pipes))


def _timesteps(pipe: Any) -> Any:
    return getattr(pipe.scheduler, "timesteps", None)


def _within(schedules: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    """Whether each is one of those known, the very object."""
    return all(any(schedule is other for other in known) for schedule in schedules)
