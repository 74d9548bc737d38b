"""Attention's input from the projections' output in one pass: norm of queries and keys, RoPE, joining of streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from para_kernels import ops
from para_kernels.checks import (
    check_contiguous_last,
    check_device,
    check_device_type,
    check_dims,
    check_dtype,
    check_inference,
    check_shape,
)
from para_kernels.sources import Unprepared

PREPARED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What has passed the checks: they take 135 of a call's 165 microseconds on the host, and a model's calls are alike.
_known_good: set[tuple[object, ...]] = set()
_MOST_KNOWN = 4096

Rotary = tuple[Tensor, Tensor]
"""RoPE's cos and sin, float32: (S, D) with the value of a pair at both of its channels, (S, D / 2) with one value for a
pair, or (S, H, D / 2) with angles that differ between heads."""


class Norm(NamedTuple):
    """What is done to every query or key before RoPE.

    Attributes:
        kind: "rms": x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467, section 4); "layer":
            (x - mean(x)) / sqrt(var(x) + eps) (Ba et al. 2016, arXiv 1607.06450, section 3.1).
        weight: factors, (D,) or for `over` "heads" (H * D,); None: ones.
        bias: added after the weight, of the same shape; None: nothing.
        eps: as in the formulas.
        over: "head": means run over the D channels of each head; "heads": over all H * D channels of a token ("rms"
            only).
        round_first: round to the projection's dtype between normalisation and weight, as diffusers' RMSNorm does in
            half precision.
    """

    kind: Literal["rms", "layer"]
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    over: Literal["head", "heads"] = "head"
    round_first: bool = False


class Stream(NamedTuple):
    """Consecutive tokens that are treated alike: the video's or the text's, with the projections of their own or as
    a slice of a common one.

    Attributes:
        query: (B, S, H, D), any strides whose D is contiguous.
        key: like query.
        value: like query; None where `prepare_attention` is given the values already joined.
        norm_query: of the queries, or None.
        norm_key: of the keys, or None.
        rotary: RoPE's (cos, sin) for all S tokens, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None = None
    norm_query: Norm | None = None
    norm_key: Norm | None = None
    rotary: Rotary | None = None


RotaryForm = Literal["interleaved", "half"]


def prepare_attention(
    streams: Sequence[Stream], *, value: Tensor | None = None, rotary_form: RotaryForm = "interleaved"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that attention can take: normed, rotated, and one stream behind the other.

    Every projection is read once and written once. Rounding is that of the unfused expressions in diffusers: after the
    norm (and before its weight where `round_first` says so) and after RoPE, which runs in float32 (RoFormer, Su et al.
    2021, arXiv 2104.09864, section 3.4.2).

    Args:
        streams: one or more of the same B, H, D, dtype (float32, bfloat16, float16) and device; S may differ and be 0.
        value: the values of all streams, (B, sum of S, H, D), where they lie in one tensor already: returned as they
            are, and no stream may have its own.
        rotary_form: which channels make a pair: "interleaved" 2i and 2i + 1, "half" i and i + D / 2.

    Returns:
        (q, k, v), each (B, sum of S, H, D) and stored head-major, (B, H, sum of S, D), but for a given `value`.

    Raises:
        ValueError: for another dtype, or tensors that do not fit together.
    """
    return unprepared(streams, value=value, rotary_form=rotary_form).made()


def unprepared(
    streams: Sequence[Stream], *, value: Tensor | None = None, rotary_form: RotaryForm = "interleaved"
) -> Unprepared:
    """What `prepare_attention` does but the work. Arguments and errors as there."""
    key = _key(streams, value, rotary_form)
    if key is None or key not in _known_good:
        _check(streams, value, rotary_form)
        _remember(key)
    parts = [[(s.query, s.norm_query), (s.key, s.norm_key)] for s in streams]
    if value is None:
        for part, stream in zip(parts, streams, strict=True):
            assert stream.value is not None
            part.append((stream.value, None))
    return _unprepared(parts, streams, rotary_form)._replace(value=value)


def prepare_projection(
    projection: Tensor, norm: Norm | None, rotary: Rotary | None = None, *, rotary_form: RotaryForm = "interleaved"
) -> Tensor:
    """One projection alone, (B, S, H, D), normed and rotated as by `prepare_attention`: for cross attention, whose
    queries and keys differ in number. Returns (B, S, H, D), stored head-major.

    Raises:
        ValueError: for another dtype, or tensors that do not fit together.
    """
    alone = Stream(projection, projection, norm_query=norm, rotary=rotary)
    key = _key([alone], None, rotary_form)
    key = None if key is None else ("projection", *key)
    if key is None or key not in _known_good:
        _check_form(rotary_form)
        _check_projection("projection", projection, projection)
        _check_norm("norm", norm, projection)
        _check_rotary("rotary", rotary, projection)
        _remember(key)
    (out,) = _unprepared([[(projection, norm)]], [alone], rotary_form).outputs()
    return out


def _unprepared(
    parts: Sequence[Sequence[tuple[Tensor, Norm | None]]], streams: Sequence[Stream], rotary_form: RotaryForm
) -> Unprepared:
    flat = [part for of_stream in parts for part in of_stream]
    norms = [norm for _, norm in flat]
    return Unprepared(
        [x for x, _ in flat],
        [None if norm is None else norm.weight for norm in norms],
        [None if norm is None else norm.bias for norm in norms],
        [_code(norm) for norm in norms],
        [0.0 if norm is None else norm.eps for norm in norms],
        [None if stream.rotary is None else stream.rotary[0] for stream in streams],
        [None if stream.rotary is None else stream.rotary[1] for stream in streams],
        rotary_form == "half",
    )


def _code(norm: Norm | None) -> int:
    """The operator's number for what a norm does: para_kernels/triton_kernels/prepare.py lists them."""
    if norm is None:
        return 0
    if norm.kind == "layer":
        return 2
    return 1 + 2 * (norm.over == "heads") + 4 * norm.round_first


def _key(streams: Sequence[Stream], value: Tensor | None, rotary_form: str) -> tuple[object, ...] | None:
    """All that the checks look at; None where it is not known: in compiling, for subclasses, without the extension."""
    if ops._C is None or torch.compiler.is_compiling():
        return None
    tensors: list[Tensor | None] = [value]
    kinds: list[object] = [rotary_form]
    for stream in streams:
        tensors += (stream.query, stream.key, stream.value, *(stream.rotary or (None, None)))
        for norm in (stream.norm_query, stream.norm_key):
            tensors += (None, None) if norm is None else (norm.weight, norm.bias)
            kinds.append(None if norm is None else (norm.kind, norm.over, norm.round_first))
    signature = ops._C.signature(*tensors)
    return None if signature is None else (signature, *kinds)


def _remember(key: tuple[object, ...] | None) -> None:
    if key is not None:
        if len(_known_good) >= _MOST_KNOWN:
            _known_good.clear()
        _known_good.add(key)


def _check(streams: Sequence[Stream], value: Tensor | None, rotary_form: str) -> None:
    if not streams:
        raise ValueError("streams: got none, must be at least one")
    _check_form(rotary_form)
    first = streams[0].query
    for i, stream in enumerate(streams):
        _check_stream(f"streams[{i}]", stream, first)
        _check_values(f"streams[{i}]", stream, value)
    if value is not None:
        batch, _, heads, head_dim = first.shape
        tokens = sum(stream.query.shape[1] for stream in streams)
        check_shape("value", value, (batch, tokens, heads, head_dim), "B, sum of S, H, D")
        check_device("value", value, first.device)
        check_dtype("value", value, (first.dtype,))
        check_contiguous_last("value", value)
        check_inference(value=value)


def _check_form(rotary_form: str) -> None:
    if rotary_form not in ("interleaved", "half"):
        raise ValueError(f'rotary_form: got {rotary_form!r}, allowed are "interleaved" and "half"')


def _check_stream(name: str, stream: Stream, first: Tensor) -> None:
    _check_projection(f"{name}.query", stream.query, first)
    _check_projection(f"{name}.key", stream.key, first)
    check_shape(f"{name}.key", stream.key, stream.query.shape, "the shape of query")
    _check_norm(f"{name}.norm_query", stream.norm_query, stream.query)
    _check_norm(f"{name}.norm_key", stream.norm_key, stream.key)
    _check_rotary(f"{name}.rotary", stream.rotary, stream.query)


def _check_values(name: str, stream: Stream, joined: Tensor | None) -> None:
    if joined is not None:
        if stream.value is not None:
            raise ValueError(f"{name}.value: must be None where the joined value is given")
        return
    if stream.value is None:
        raise ValueError(f"{name}.value: got None, allowed only where the joined value is given")
    _check_projection(f"{name}.value", stream.value, stream.query)
    check_shape(f"{name}.value", stream.value, stream.query.shape, "the shape of query")


def _check_projection(name: str, x: Tensor, first: Tensor) -> None:
    check_dims(name, x, "B, S, H, D")
    check_dtype(name, x, PREPARED_DTYPES)
    check_dtype(name, x, (first.dtype,))
    check_device_type(name, x)
    check_device(name, x, first.device)
    batch, _, heads, head_dim = first.shape
    check_shape(name, x, (batch, x.shape[1], heads, head_dim), "B, S, H, D")
    if head_dim < 1:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, D must be at least 1")
    check_contiguous_last(name, x)
    check_inference(**{name: x})


def _check_norm(name: str, norm: Norm | None, x: Tensor) -> None:
    if norm is None:
        return
    if norm.kind not in ("rms", "layer"):
        raise ValueError(f'{name}.kind: got {norm.kind!r}, allowed are "rms" and "layer"')
    if norm.over not in (("head", "heads") if norm.kind == "rms" else ("head",)):
        raise ValueError(f'{name}.over: got {norm.over!r}, allowed are "head", and "heads" for kind "rms"')
    if norm.round_first and norm.kind != "rms":
        raise ValueError(f'{name}.round_first: allowed for kind "rms" only')
    channels = x.shape[3] * (x.shape[2] if norm.over == "heads" else 1)
    for part, tensor in (("weight", norm.weight), ("bias", norm.bias)):
        if tensor is not None:
            check_dtype(f"{name}.{part}", tensor, PREPARED_DTYPES)
            check_device(f"{name}.{part}", tensor, x.device)
            check_shape(f"{name}.{part}", tensor, (channels,), "channels of the norm")
            check_contiguous_last(f"{name}.{part}", tensor)


def _check_rotary(name: str, rotary: Rotary | None, x: Tensor) -> None:
    if rotary is None:
        return
    _, tokens, heads, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"{name}: allowed for an even head dimension only, got {head_dim}")
    allowed = ((tokens, head_dim), (tokens, head_dim // 2), (tokens, heads, head_dim // 2))
    for part, angle in zip(("cos", "sin"), rotary, strict=True):
        check_dtype(f"{name}.{part}", angle, (torch.float32,))
        check_device(f"{name}.{part}", angle, x.device)
        if tuple(angle.shape) not in allowed:
            raise ValueError(
                f"{name}.{part}: got shape {tuple(angle.shape)}, allowed are"
                f" {', '.join(map(str, allowed))} = (S, D), (S, D / 2), (S, H, D / 2)"
            )
        check_contiguous_last(f"{name}.{part}", angle)
    if rotary[0].shape != rotary[1].shape or rotary[0].stride() != rotary[1].stride():
        raise ValueError(f"{name}.sin: must have the shape and strides of cos")
