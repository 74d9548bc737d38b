"""Real processes that talk over gloo: started once for a number of ranks, they run many cases."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Processes are forked from one that has imported what all need, and has started no thread.
_processes = multiprocessing.get_context("forkserver")
_preloaded = ["torch", "torch.distributed.device_mesh", "para_kernels.parallel", "reference"]
_processes.set_forkserver_preload(_preloaded)


def preload(*modules: str) -> None:
    """Have more modules imported before processes are forked. In vain once the first has been."""
    _preloaded.extend(modules)
    _processes.set_forkserver_preload(_preloaded)


class DeadError(RuntimeError):
    """A rank that ended without a result."""


def launch(
    world: int,
    target: Callable[..., Any],
    *arguments: object,
    timeout: float = 60.0,
    lost: int | None = None,
    host: int | None = None,
) -> list[Any]:
    """`target(rank, world, *arguments)` in `world` processes of one gloo group: what each returned, or raised.

    The parent hosts the store, as torchrun does. A rank that ended without a result counts as `DeadError`; one that has
    not ended after `timeout` seconds is killed, and a TimeoutError raised. Nobody waits for the rank `lost`.
    Where `host` is a rank, it hosts the store.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [_processes.Pipe(duplex=False) for _ in range(world)]
    started = [
        _processes.Process(target=_run, args=(rank, world, store.port, host, pipe, target, arguments), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, pipe) in zip(started, pipes, strict=True):
        process.start()
        pipe.close()
    end = time.monotonic() + timeout
    try:
        results = []
        for rank, (process, (pipe, _)) in enumerate(zip(started, pipes, strict=True)):
            results.append(None if rank == lost else _result(process, pipe, end))
        return results
    finally:
        for process in started:
            process.kill()
            process.join()


def once(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns. The first of all workers of a run of the tests who asks for `name` makes it, for all."""
    known = folder / f"{name}.pickle"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not known.exists():
            known.write_bytes(pickle.dumps(make()))
    return pickle.loads(known.read_bytes())


def results_of_all(own: Path, name: str, world: int, target: Callable[..., Any], timeout: float) -> list[Any]:
    """What `target` returns on every rank, run once for all workers; `own` is this worker's folder. The first error of
    a rank is raised.
    """
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    results = once(folder, name, lambda: launch(world, target, timeout=timeout))
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _result(process: Any, pipe: Any, end: float) -> Any:
    if not pipe.poll(max(0.0, end - time.monotonic())):
        raise TimeoutError(f"{process.name} has not ended")
    try:
        return pipe.recv()
    except EOFError:
        return DeadError(f"{process.name} ended without a result")


def _hosted(first: dist.TCPStore, is_host: bool) -> dist.TCPStore:
    """A store of a rank's own, whose port the others learn from the first one."""
    if is_host:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        first.set("port", str(store.port))
        return store
    return dist.TCPStore("127.0.0.1", int(first.get("port")), is_master=False)


def _join(store: dist.Store, rank: int, world: int) -> None:
    """Join the group. Where a connection is refused, as gloo's now and then is while many groups form, all try again."""
    for attempt in range(3):
        own = dist.PrefixStore(str(attempt), store)
        refused = None
        try:
            dist.init_process_group("gloo", store=own, rank=rank, world_size=world)
        except RuntimeError as error:
            refused = error
        own.set(f"said by {rank}", "refused" if refused else "joined")
        if all(own.get(f"said by {other}") == b"joined" for other in range(world)):
            return
        if refused is None:
            dist.destroy_process_group()
    raise RuntimeError("the ranks could not connect")


def _run(
    rank: int, world: int, port: int, host: int | None, pipe: Any, target: Callable[..., Any], arguments: tuple
) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    if host is not None:
        store = _hosted(store, rank == host)
    _join(store, rank, world)
    try:
        result = target(rank, world, *arguments)
    except Exception as error:
        error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
        result = error
    pipe.send(result)
