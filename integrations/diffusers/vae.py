"""Parallel VAE: `parallelize_vae(vae)` has the tiles of diffusers' tiled decode and encode computed by all ranks.

Blending stays diffusers' own code, which runs unchanged on every rank. A first, dry pass through it finds out which
tiles there are: a stand-in for the decoder notes its inputs and returns tensors without data. Then all ranks compute
the tiles, and a second pass gets them, one by one in its own order, from a stand-in that waits for whoever made them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from para_kernels.checks import check_inference
from para_kernels.parallel.agreement import check_agreement, exchange
from para_kernels.parallel.failure import DEFAULT_TIMEOUT, check_timeout, deadline, give_up

from .tile_exchange import TileExchange
from .vae_models import DIRECTIONS, FAMILIES, Direction, VaeFamily
from .vae_tiles import Tiles

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parallelize_vae(
    vae: Any, *, mesh: DeviceMesh | dist.ProcessGroup | None = None, timeout: float = DEFAULT_TIMEOUT
) -> ParallelVae:
    """Let all ranks of a group decode and encode together. Every rank must call this, and then decode the same latents.

    Tiles are computed by the ranks in parallel, balanced by their size; each is sent to all others by the rank that
    made it, while that computes its next one; and every rank ends with the whole result. That is bit for bit what
    `vae.enable_tiling()` and `vae.decode(z)` give in one process (GPUs of one kind and, as is torch's default, no
    `cudnn.benchmark`). Tiling is on for the duration of the call: where it had been off, the result differs slightly
    from the untiled one. An input no larger than a tile is one tile, with nothing to share out.

    Each rank holds, beyond what diffusers' tiled code holds anyway, at most four tiles per rank: 6.7 MB each in a 720p
    HunyuanVideo in bfloat16, that is 0.2 GB on 8 ranks; of VAEs that go through a tile a few frames at a time (Wan,
    CogVideoX, Mochi) a tile is all frames. Where the VAE is given patches of the pixels (Wan 2.2 5B), it also holds
    those of the whole video once more while it encodes. Inference only. Works on the instance alone; called again it
    re-tunes. `vae.tiled_decode` and the like, called directly, stay as they are.

    Args:
        vae: one of a class in vae_models.py, with the same weights and settings on every rank.
        mesh: the ranks, a one-dimensional `DeviceMesh` (`mesh._flatten()` makes one) or a process group; None for all.
        timeout: seconds of waiting for a tile after which its rank counts as lost; more than four tiles take.

    Returns:
        The handle of the installation: `work()`, `summary()`, `remove()`. The same one every time until it is removed.

    Raises:
        ValueError: an argument is not allowed; the VAE is then as it was. From `decode` and `encode`: ranks differ in
            what they are given or how they are set, found before the first tile.
        RankFailure: from `decode` and `encode`: another rank failed, died or never arrived. It names the rank.
    """
    vae = getattr(vae, "_orig_mod", vae)
    family = _family(vae)
    check_timeout(timeout)
    group = _group(mesh)
    handle = ParallelVae.on(vae)
    if handle is None:
        _check_own_methods(vae)
        handle = ParallelVae(vae, family)
    handle._install(group, float(timeout))
    return handle


def _family(vae: Any) -> VaeFamily:
    names = {cls.__name__ for cls in type(vae).__mro__}
    for family in FAMILIES:
        if family.name in names:
            return family
    raise ValueError(f"vae: got a {type(vae).__name__}, supported: {', '.join(family.name for family in FAMILIES)}")


def _group(mesh: Any) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ValueError(f"mesh: got {mesh!r}, but torch.distributed is not initialized; run under torchrun")
    if mesh is None:
        mesh = dist.group.WORLD
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh: got {mesh.ndim} dimensions, must be 1; pass mesh._flatten()")
        if mesh.get_coordinate() is None:
            raise ValueError(f"mesh: got one without this process, which is rank {dist.get_rank()}")
        mesh = mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise ValueError(
            f"mesh: got {mesh!r}, allowed is a DeviceMesh or ProcessGroup with this process in it, or None"
        )
    if dist.get_rank(mesh) < 0:
        raise ValueError(f"mesh: got a group without this process, which is rank {dist.get_rank()}")
    return mesh


def _check_own_methods(vae: Any) -> None:
    for direction in DIRECTIONS:
        if direction.name in vae.__dict__:
            raise ValueError(
                f"vae: its {direction.name!r} has been replaced on the instance, allowed is the class's own; to"
                " compile, compile vae.decoder and vae.encoder instead"
            )


@dataclass(frozen=True)
class RankWork:
    """What one rank did in a call: how many tiles it computed, and the seconds its device spent on them."""

    rank: int
    tiles: int
    seconds: float


class ParallelVae:
    """The installation on one VAE, made by `parallelize_vae`: its `decode` and `encode`, as attributes of the instance.

    The submodules are replaced only while one of the two runs, and what runs then are the real ones: hooks, offloading
    and `torch.compile` of `vae.decoder` work as ever.
    """

    def __init__(self, vae: Any, family: VaeFamily) -> None:
        self._vae = vae
        self._family = family
        self._entries: dict[str, Callable[..., Any]] = {}
        self._group: dist.ProcessGroup | None = None
        self._timeout = DEFAULT_TIMEOUT
        self._last: str | None = None
        self._work: tuple[RankWork, ...] = ()

    @staticmethod
    def on(vae: Any) -> ParallelVae | None:
        """The handle that is installed on `vae`; None if there is none."""
        for direction in DIRECTIONS:
            entry = vae.__dict__.get(direction.name)
            if (handle := getattr(entry, "parallel_vae", None)) is not None and handle.installed:
                return handle
        return None

    # --- for the user -----------------------------------------------------------------------------------------------

    @property
    def vae(self) -> Any:
        """The VAE that this is about."""
        return self._vae

    @property
    def installed(self) -> bool:
        """False after `remove`."""
        return bool(self._entries)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that share the work, as the world counts them; empty after `remove`."""
        return tuple(dist.get_process_group_ranks(self._group)) if self._group else ()

    def work(self) -> tuple[RankWork, ...]:
        """What each rank did in the last call, in rank order; empty before the first."""
        return self._work

    def summary(self) -> str:
        """What is installed and what the last call did, in plain text."""
        lines = [f"{type(self._vae).__name__}, tiles on {len(self.ranks)} rank(s)" if self.installed else "removed"]
        if work := self.work():
            lines.append(f"last call: {self._last}, {sum(row.tiles for row in work)} tile(s)")
            lines += [f"  rank {row.rank}: {row.tiles:4d} tile(s), {row.seconds:8.3f} s" for row in work]
        return "\n".join(lines)

    def remove(self) -> None:
        """Take everything off again. A second time does nothing."""
        for name, entry in self._entries.items():
            if self._vae.__dict__.get(name) is entry:  # else somebody wrapped it, and it just passes calls on
                del self._vae.__dict__[name]
        self._entries = {}
        self._group = self._last = None
        self._work = ()

    # --- installation -----------------------------------------------------------------------------------------------

    def _install(self, group: dist.ProcessGroup, timeout: float) -> None:
        self._group, self._timeout = group, timeout
        self._last, self._work = None, ()
        for direction in DIRECTIONS:
            if direction.name not in self._entries:
                self._entries[direction.name] = self._vae.__dict__[direction.name] = self._entry(direction)

    def _entry(self, direction: Direction) -> Callable[..., Any]:
        original = getattr(type(self._vae), direction.name).__get__(self._vae)

        @functools.wraps(original)
        def entry(*args: Any, **kwargs: Any) -> Any:
            if not self.installed:
                return original(*args, **kwargs)
            return self._call(direction, functools.partial(original, *args, **kwargs))

        entry.parallel_vae = self  # type: ignore[attr-defined]
        return entry

    # --- a call -----------------------------------------------------------------------------------------------------

    def _call(self, direction: Direction, original: functools.partial[Any]) -> Any:
        group = self._group
        assert group is not None
        self._last, self._work = None, ()
        with deadline(self._timeout), ExitStack() as undo:
            _set_for_now(undo, self._vae, "use_tiling", True)
            found = Tiles(self._vae, self._family, direction)
            dtype = self._agreed(found, direction, original, group)
            undo.enter_context(torch.no_grad())
            try:
                shared = TileExchange(found.tiles, found.compute, dtype, group, direction.name)
                with found.given_by(shared.take):
                    output = original()
                if not shared.done:
                    raise RuntimeError(
                        f"{direction.name}: diffusers asks for fewer tiles the second time; please report this"
                    )
                told = exchange(group, [shared.own, shared.seconds()], f"end of the {direction.name}")
            except BaseException as error:
                give_up(group, error)
                raise
        self._work = tuple(RankWork(rank, *work) for rank, work in zip(self.ranks, told, strict=True))
        self._last = direction.name
        return output

    def _agreed(
        self, found: Tiles, direction: Direction, original: functools.partial[Any], group: dist.ProcessGroup
    ) -> torch.dtype:
        """The dtype of what comes out of the tiles, which are found here, once all ranks have the same."""
        what = f"{direction.name} call"
        try:
            given = _given(direction, original)
            check_inference(**{direction.argument: given})
            _check_backend(direction, given, group)
            dtype = _made_dtype(found.computed, given)
            with torch.no_grad():
                self._find(found, original, dtype)
                facts = self._facts(direction, given, dtype, found.weights)
        except Exception as error:
            with suppress(ValueError):  # for the others; here its own error is raised
                check_agreement(group, {}, problem=str(error), what=what)
            raise
        check_agreement(group, facts, what=what)
        return dtype

    def _find(self, found: Tiles, original: Callable[[], Any], dtype: torch.dtype) -> None:
        """Have `found` note the tiles of the call, in the order in which diffusers makes them; none is computed."""
        with ExitStack() as undo:
            for blend in self._family.blends:
                _set_for_now(undo, self._vae, blend, lambda first, second, extent: second)
            undo.enter_context(found.noted(dtype))
            original()

    def _facts(
        self, direction: Direction, given: Tensor, dtype: torch.dtype, weights: Sequence[Tensor]
    ) -> dict[str, Any]:
        """What must be equal on all ranks, by the name that it has in messages."""
        return {
            "method": direction.name,
            "class of the vae": type(self._vae).__name__,
            f"shape of {direction.argument}": list(given.shape),
            f"dtype of {direction.argument}": str(given.dtype),
            "dtype of the result": str(dtype),
            **{f"vae.{name}": getattr(self._vae, name) for name in self._family.settings},
            "checksum of the weights": checksum(weights),
            f"checksum of {direction.argument}": checksum([given]),
        }


def _given(direction: Direction, original: functools.partial[Any]) -> Tensor:
    """The tensor, first or by name; older diffusers' wrappers of the methods do not tell their signature."""
    given = original.args[0] if original.args else original.keywords.get(direction.argument)
    if not isinstance(given, Tensor):
        raise ValueError(f"{direction.argument}: got a {type(given).__name__}, must be a tensor")
    return given


def _check_backend(direction: Direction, given: Tensor, group: dist.ProcessGroup) -> None:
    backends = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    devices = [pair.split(":")[0] for pair in backends.split(",")]
    if given.device.type not in devices and group.size() > 1:
        raise ValueError(
            f"{direction.argument}: got device {given.device}, but the group's backends are {backends}; allowed are"
            f" {' and '.join(devices)}"
        )


def _made_dtype(chain: Sequence[nn.Module], given: Tensor) -> torch.dtype:
    """What the chain's last layer returns: weights are in a dtype to compute in, or are cast from one to keep."""
    if torch.is_autocast_enabled(given.device.type):
        return torch.get_autocast_dtype(given.device.type)
    dtype = list(chain[-1].parameters())[-1].dtype
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) else given.dtype


def checksum(tensors: Sequence[Tensor]) -> str:
    """Of all bits of the tensors and, row by row, their order; one pass over the data and one host read."""
    total: Tensor | None = None
    for tensor in tensors:
        if tensor.device.type == "meta":  # offloaded, to be loaded when it is used
            continue
        rows = tensor.detach().view(_BITS[tensor.element_size()]).sum(-1, dtype=torch.int64).flatten()
        mixed = (rows * torch.arange(1, rows.numel() + 1, device=rows.device)).sum()
        total = mixed if total is None else total * 31 + mixed.to(total.device)
    return f"{0 if total is None else int(total) % 2**64:016x}"


def _set_for_now(undo: ExitStack, vae: Any, name: str, value: Any) -> None:
    """Set an attribute of the instance; closing `undo` restores it, or takes it away if there was none."""
    attributes = vae.__dict__
    if name in attributes:
        undo.callback(attributes.__setitem__, name, attributes[name])
    else:
        undo.callback(attributes.pop, name, None)
    attributes[name] = value
