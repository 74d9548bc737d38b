"""What ranks tell each other on the host, before anything is launched: values, obstacles, settings that must agree."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from para_kernels.parallel.failure import (
    LOOK_INTERVAL,
    RankFailure,
    current_timeout,
    deadline,
    global_rank,
    grace,
    in_thread,
    late,
    lost,
    named,
    other_ranks,
    raise_given_up,
    roll_call,
)

_rounds: dict[str, int] = {}


def exchange(group: ProcessGroup, value: object, what: str = "settings") -> list:
    """Every rank's `value`, in rank order, over the group's key-value store: between hosts, past all devices.

    Args:
        value: anything that JSON holds.
        what: what is waited for, for the message.

    Raises:
        RankFailure: if a rank does not come within the current timeout, naming all that did not.
    """
    if group.size() == 1:
        return [json.loads(json.dumps(value))]
    message = json.dumps(value)
    # The thread bounds itself, by all but a store that stopped, and can name who is missing.
    limit = current_timeout() + grace() + 1.0
    try:
        return in_thread(lambda: _exchange(group, message, what), limit)
    except TimeoutError:
        text = late(group, f"the store, for the {what} of {named(other_ranks(group))}", limit)
    except dist.DistError:
        text = lost(group, f"the {what} of {named(other_ranks(group))}")
    raise RankFailure(text + roll_call())


def _exchange(group: ProcessGroup, message: str, what: str) -> list:
    rank = group.rank()
    store = dist.PrefixStore("para_kernels", group.get_group_store())
    name = f"{group.group_name}:{','.join(str(r) for r in dist.get_process_group_ranks(group))}"
    turn = _rounds[name] = _rounds.get(name, -1) + 1
    keys = [f"{name}:{turn}:{r}" for r in range(group.size())]
    store.set(keys[rank], message)
    _await_keys(store, keys, group, what)
    values = [json.loads(store.get(key)) for key in keys]
    # All ranks have written this turn, so all have read the one before.
    if turn:
        with contextlib.suppress(dist.DistError):  # Whoever hosts the store may have gone, this turn is complete.
            store.delete_key(f"{name}:{turn - 1}:{rank}")
    return values


def _await_keys(store: dist.Store, keys: list[str], group: ProcessGroup, what: str) -> None:
    """Look, rather than wait: a wait would keep the store from other threads, such as NCCL's watchdog."""
    timeout, started, pause = current_timeout(), time.monotonic(), 1e-4
    look = LOOK_INTERVAL
    while not store.check(keys):
        waited = time.monotonic() - started
        if waited > look:
            look = waited + LOOK_INTERVAL
            raise_given_up(group)
        absent = [] if waited < timeout else [rank for rank, key in enumerate(keys) if not store.check([key])]
        if absent:
            names = named([global_rank(group, rank) for rank in absent])
            raise RankFailure(late(group, f"the {what} of {names}", waited) + roll_call())
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def raise_obstacles(group: ProcessGroup, obstacle: str | None, what: str) -> None:
    """Make what stands in the way of one rank the error of all, so that none waits for it.

    Raises:
        RuntimeError: on every rank, with the first obstacle and its rank.
        RankFailure: if a rank does not come.
    """
    for rank, theirs in enumerate(exchange(group, obstacle, what)):
        if theirs is not None:
            raise RuntimeError(f"{what}: rank {global_rank(group, rank)}: {theirs}")


def check_agreement(
    group: ProcessGroup,
    settings: Mapping[str, object],
    *,
    problem: str | None = None,
    own: object = None,
    what: str = "settings",
) -> list:
    """Make sure that all ranks have the same `settings` (names to values that JSON holds), before anything is launched.

    Args:
        problem: what is wrong on this rank already, so that no other rank waits for it.
        own: something that may differ between ranks.

    Returns:
        What every rank gave as `own`, in rank order.

    Raises:
        ValueError: on every rank, for the problem of a rank, or naming the first setting that differs, its values, and
            the ranks that differ from the majority (of equals, from the one that the lowest rank belongs to).
        RankFailure: if a rank does not come.
    """
    everyone = exchange(group, [dict(settings), problem, own], what)
    try:
        _raise_problems(group, [theirs for _, theirs, _ in everyone])
        _raise_differences(group, [theirs for theirs, _, _ in everyone])
    except ValueError:
        # A rank that ends now may host the store that others are still to read the reason from.
        with contextlib.suppress(RankFailure), deadline(min(5.0, current_timeout())):
            exchange(group, None, what)
        raise
    return [theirs for _, _, theirs in everyone]


def _raise_problems(group: ProcessGroup, problems: Sequence[str | None]) -> None:
    mine = problems[group.rank()]
    if mine is not None:
        raise ValueError(mine)
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise ValueError(f"{problem} (on rank {global_rank(group, rank)})")


def _raise_differences(group: ProcessGroup, everyone: Sequence[Mapping[str, object]]) -> None:
    for name in dict.fromkeys(name for one in everyone for name in one):
        values = [json.dumps(one.get(name)) for one in everyone]
        usual = max(values, key=values.count)  # The first of equals: of the lowest rank.
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            theirs = ", ".join(f"{values[rank]} on rank {global_rank(group, rank)}" for rank in odd)
            raise ValueError(f"{name}: got {theirs}, must be {usual} as on the other ranks")
