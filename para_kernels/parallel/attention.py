"""Attention over a sequence that is spread over ranks: ring, ulysses, and both at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from para_kernels.attention import check_attention, flash_attention, softmax_scale
from para_kernels.attention8 import flash_attention_int8, selected_kernel_int8
from para_kernels.parallel.agreement import check_agreement
from para_kernels.parallel.failure import RankFailure, current_timeout, deadline, give_up
from para_kernels.parallel.mesh import group_of, mesh_groups
from para_kernels.parallel.ring8 import ring_int8
from para_kernels.parallel.sharding import Shards
from para_kernels.parallel.transport import give_up_transports, select_transport
from para_kernels.parallel.ulysses import heads_for_rows, rows_for_heads
from para_kernels.sources import Source


@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | ProcessGroup,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    transport: str = "auto",
    attention: str = "exact",
) -> Tensor: ...
@overload
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | ProcessGroup,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    transport: str = "auto",
    attention: str = "exact",
) -> tuple[Tensor, Tensor]: ...
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | ProcessGroup,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    transport: str = "auto",
    attention: str = "exact",
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` over a sequence in pieces, one to a rank: keys and values go round, queries stay.

    Method: Liu et al. 2023, Ring Attention, arXiv 2310.01889; partial results are weighed by their log-sum-exp. Exact
    unless `attention` says otherwise, for any lengths; the next piece travels while one is attended. To be called by
    all ranks of `mesh` alike.

    Args:
        q: (B, S_r, H, D), this rank's rows: the `lengths[r]` rows of the whole sequence that follow those of the ranks
            before it; 0 rows are allowed. dtypes and strides as for `flash_attention`.
        k, v: (B, S_r, Hk, D).
        mesh: the ranks, in the order of their pieces: a DeviceMesh of one dim, or a ProcessGroup.
        lengths: rows of every rank, the same on all. None: they are asked for at every call, between the hosts.
        kv_lens: int32 (B,) of the *whole* sequence, the same on every rank: keys at or past kv_lens[b] do not exist.
            None: there are none of these. Range as for `flash_attention`, 0 ... sum(lengths).
        q_lens: int32 (B,) of the whole sequence: rows at or past q_lens[b] come back as zeros, with an lse of -inf.
        scale: factor on the scores, at least 0, default D ** -0.5.
        return_lse: also return the log-sum-exp of the scaled scores.
        transport: "auto", "peer", "host" or "collective" (`select_transport`).
        attention: "exact"; or "int8", `flash_attention_int8`, within a few percent: keys and values travel in 8 bits,
            each rank's with a mean and scales of its own.

    Returns:
        out (B, S_r, H, D): this rank's rows of `flash_attention` over the gathered sequence, contiguous, in q's dtype;
        with `return_lse` also lse (B, H, S_r), float32, natural logarithm.

    Raises:
        ValueError: for what `flash_attention` refuses, other rows than `lengths` says, or settings that differ between
            ranks: on every rank, naming what differs where.
        RankFailure: if a rank does not come in time, naming it and the layer.
    """
    group = group_of(mesh)
    call = _Call(q, k, v, lengths, kv_lens, q_lens, scale, transport, attention)
    out, lse = _attention("ring", call, group, group, None, return_lse)
    return _returned(out, lse, return_lse)


@overload
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | ProcessGroup,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    attention: str = "exact",
) -> Tensor: ...
@overload
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | ProcessGroup,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    attention: str = "exact",
) -> tuple[Tensor, Tensor]: ...
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | ProcessGroup,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    attention: str = "exact",
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attention` over a sequence in pieces: ranks exchange rows for heads, attend, and exchange back.

    Method: Jacobs et al. 2023, DeepSpeed Ulysses, arXiv 2309.14509. Heads need not divide: their numbers differ by at
    most one, and ranks past the number of heads attend none. Arguments, result and errors as for `ring_attention`.
    """
    group = group_of(mesh)
    call = _Call(q, k, v, lengths, kv_lens, q_lens, scale, "auto", attention)
    out, lse = _attention("ulysses", call, group, None, group, return_lse)
    return _returned(out, lse, return_lse)


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    transport: str = "auto",
    attention: str = "exact",
    out: Tensor | None = None,
    source: Source | None = None,
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    transport: str = "auto",
    attention: str = "exact",
    out: Tensor | None = None,
    source: Source | None = None,
) -> tuple[Tensor, Tensor]: ...
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    lengths: Sequence[int] | None = None,
    kv_lens: Tensor | None = None,
    q_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    transport: str = "auto",
    attention: str = "exact",
    out: Tensor | None = None,
    source: Source | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Ring and ulysses at once: heads are exchanged inside a ulysses group, keys and values go round between them.

    Method: Fang and Zhao 2024, USP, arXiv 2405.07719. Arguments, result and errors as for `ring_attention`, except for:

    Args:
        mesh: a DeviceMesh with dims "ring" and "ulysses", and perhaps "batch" before them, which takes no part. Piece
            ring_rank * ulysses + ulysses_rank of the sequence belongs to a rank.
        lengths: rows of every piece, in this order.
        out: contiguous memory like q, which the result is written to and which is returned; it starts at a multiple of
            16 bytes and shares nothing with q, k and v. None: new memory.
        source: what q, k and v are still to be made of (`para_kernels.preparation.unprepared`), if they can in a ring's
            own buffer. Then of q, k and v only shape, dtype and device count: they may be outlines. None: q, k and v
            are there.
    """
    groups = mesh_groups(mesh)
    call = _Call(q, k, v, lengths, kv_lens, q_lens, scale, transport, attention, out, source)
    result, lse = _attention("context_parallel", call, groups.sequence, groups.ring, groups.ulysses, return_lse)
    if out is not None and result is not out:
        result = out.copy_(result)
    return _returned(result, lse, return_lse)


# --- the parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """The arguments of this rank."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Sequence[int] | None
    kv_lens: Tensor | None
    q_lens: Tensor | None
    scale: float | None
    transport: str
    attention: str
    out: Tensor | None = None
    source: Source | None = None

    def made(self) -> _Call:
        """With q, k and v, where they are still to be made."""
        if self.source is None:
            return self
        q, k, v = self.source.prepared()
        return replace(self, q=q, k=k, v=v, source=None)


def _attention(
    function: str,
    call: _Call,
    everyone: ProcessGroup,
    ring: ProcessGroup | None,
    ulysses: ProcessGroup | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the pieces of `everyone`: of the groups that it is made of, None stands for one rank."""
    if torch.compiler.is_compiling():
        return _untraced_attention(function, call, everyone, ring, ulysses, return_lse)
    shards = _agree(function, everyone, ring, call)
    if ulysses is None or ulysses.size() == 1:
        return _attend(call, ring, shards)
    width = ulysses.size()
    first = 0 if ring is None else ring.rank() * width
    neighbours = Shards(shards.sizes[first : first + width])
    call = call.made()
    q, k, v = heads_for_rows(call.q, call.k, call.v, neighbours, ulysses)
    out, lse = _attend(replace(call, q=q, k=k, v=v, out=None), ring, shards.merged(width))
    heads, kv_heads = call.q.shape[2], call.k.shape[2]
    out = rows_for_heads(out, heads, kv_heads, neighbours, ulysses)
    if not return_lse:
        return out, None
    lse = rows_for_heads(lse.transpose(1, 2), heads, kv_heads, neighbours, ulysses)
    return out, lse.transpose(1, 2).contiguous()


# Compiled code breaks once, here, rather than at each of the calls inside. torch.compiler.disable would import the
# compiler for everybody, some seconds in which other ranks would wait.
_untraced_attention = torch._disable_dynamo(_attention)


def _attend(call: _Call, ring: ProcessGroup | None, shards: Shards) -> tuple[Tensor, Tensor]:
    """Around the ring, or at once where it is of one rank; a rank may hold no heads, and then its ring holds none."""
    alone = ring is None or ring.size() == 1
    if alone or call.attention == "int8":
        call = call.made()
    q, k, v, lens = call.q, call.k, call.v, {"kv_lens": call.kv_lens, "q_lens": call.q_lens}
    if not q.shape[2]:
        return q.new_empty(q.shape), q.new_empty((q.shape[0], 0, q.shape[1]), dtype=torch.float32)
    if ring is None or ring.size() == 1:
        return _HERE[call.attention](q, k, v, scale=call.scale, return_lse=True, **lens)
    transport = select_transport(ring, q.device, call.transport)
    how = {"lengths": shards.sizes, "scale": call.scale, **lens}
    if call.attention == "int8":
        return ring_int8(q, k, v, transport=transport, rank=ring.rank(), **how)
    return transport.ring(q, k, v, out=call.out, source=call.source, **how)


# By what is asked for as `attention`: that of a whole sequence.
_HERE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"exact": flash_attention, "int8": flash_attention_int8}


def _returned(out: Tensor, lse: Tensor | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


_ALIGNMENT = 16  # bytes, of what kernels write

# --- checks -----------------------------------------------------------------------------------------------------------

_agreed: WeakKeyDictionary[ProcessGroup, set[tuple]] = WeakKeyDictionary()


def _agree(function: str, group: ProcessGroup, ring: ProcessGroup | None, call: _Call) -> Shards:
    """Check the arguments here and against the other ranks, who all learn of what is wrong; the rows of every rank.

    Ranks talk at the first call with new settings, or if lengths are to be asked for.
    """
    q, k = call.q, call.k
    sizes = None if call.lengths is None else tuple(call.lengths)
    dims = (q.shape[0], *q.shape[2:], *k.shape[2:]) if q.dim() == k.dim() == 4 else (*q.shape, *k.shape)
    given = (call.kv_lens is None, call.q_lens is None)
    settings = (function, dims, str(q.dtype), sizes, call.scale, *given, call.transport, call.attention)
    problem = _problem(call, sizes, group)
    settings = (*settings, _format(call) if problem is None else "")
    known = _agreed.setdefault(group, set())
    if problem is not None and known:
        _raise_problem(problem, group, ring)
    if sizes is None or problem is not None or settings not in known:
        rows = q.shape[1] if q.dim() == 4 else 0
        named: dict[str, object] = dict(zip(_NAMES, settings, strict=True))
        asked = check_agreement(group, named, problem=problem, own=rows, what="settings of attention")
        known.add(settings)
        sizes = tuple(asked) if sizes is None else sizes
    shards = Shards(sizes)
    if q.device.type == "cpu":
        _check_range("kv_lens", call.kv_lens, shards.total)
        _check_range("q_lens", call.q_lens, shards.total)
    return shards


# Ranks that all see a problem come to compare it at about the same time.
_SECONDS_TO_COMPARE = 5.0


def _raise_problem(problem: str, group: ProcessGroup, ring: ProcessGroup | None) -> None:
    """A problem on a rank whose peers may not look for one: settings have been agreed on before, theirs may be these.

    If all ranks compare theirs, all raise the ValueError and may go on. If not, the others have begun without this
    rank: they are told why it does not come.
    """
    error = ValueError(problem)
    try:
        with deadline(min(_SECONDS_TO_COMPARE, current_timeout())):
            check_agreement(group, {}, problem=problem, what="settings of attention")
    except RankFailure:
        give_up(group, error)
        if ring is not None:
            give_up_transports(ring, error)
            if ring is not group:
                give_up(ring, error)
        raise error from None


_NAMES = (
    "function", "B, H, D, Hk, D", "dtype", "lengths", "scale", "kv_lens is None", "q_lens is None", "transport",
    "attention", "kernel of 8 bits",
)  # fmt: skip


def _format(call: _Call) -> str:
    """What the bytes of pieces in 8 bits are made for: ranks with unlike GPUs would not understand each other's."""
    return "" if call.attention == "exact" else selected_kernel_int8(call.q.device, call.q.dtype, call.q.shape[3])


def _problem(call: _Call, lengths: tuple[int, ...] | None, group: ProcessGroup) -> str | None:
    """What is wrong with this rank's arguments."""
    q, k = call.q, call.k
    try:
        check_attention(q, k, call.v, call.kv_lens, call.q_lens)
        softmax_scale(call.scale, q.shape[3])
        if call.attention not in _HERE:
            raise ValueError(f"attention: got {call.attention!r}, allowed is one of {list(_HERE)}")
        if call.out is not None:
            _check_out(call.out, q, k, call.v)
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"k: got {k.shape[1]} rows, must be the {q.shape[1]} of q")
        if lengths is not None:
            _check_lengths(Shards(lengths), q, group)
    except ValueError as error:
        return str(error)
    return None


def _check_lengths(shards: Shards, q: Tensor, group: ProcessGroup) -> None:
    if shards.world != group.size():
        raise ValueError(f"lengths: got {shards.world} of them, must be one for each of {group.size()} ranks")
    if shards.sizes[group.rank()] != q.shape[1]:
        raise ValueError(
            f"q: got {q.shape[1]} rows, must be {shards.sizes[group.rank()]}, what lengths says of this rank"
        )


def _check_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
        layout = "contiguous" if out.is_contiguous() else "not contiguous"
        raise ValueError(
            f"out: got {out.dtype} {tuple(out.shape)} on {out.device}, {layout}, must be like q:"
            f" {q.dtype} {tuple(q.shape)} on {q.device}, contiguous"
        )
    if out.data_ptr() % _ALIGNMENT:
        raise ValueError(f"out: starts at {out.data_ptr():#x}, must be a multiple of {_ALIGNMENT} bytes")
    first, end = _span(out)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if out.numel() and x.numel() and first < _span(x)[1] and _span(x)[0] < end:
            raise ValueError(f"out: shares memory with {name}, which is still read when the first rows are written")


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor lies."""
    extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + extent * x.element_size()


def _check_range(name: str, lens: Tensor | None, total: int) -> None:
    values = [] if lens is None else lens.tolist()
    if any(not 0 <= value <= total for value in values):
        raise ValueError(f"{name}: got {values}, every length must lie in 0 ... {total}, the rows of all ranks")
