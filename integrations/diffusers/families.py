"""The families there are: those of models.py, and those that have been registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from para_kernels.cache import check_threshold
from para_kernels.cache.policy import is_finite_number

from .models import FAMILIES, Conditioning, Family


@dataclass(frozen=True, eq=False)
class _Registered:
    family: Family
    instead_of: Family | None


_registered: list[_Registered] = []


def register_family(family: Family, *, instead_of: Family | None = None) -> Callable[[], None]:
    """Let `accelerate` and its like know a model that this package has never seen. docs/your_own_family.md has a
    worked example.

    Args:
        family: its row. Its pipelines and those of the other rows must have different class names.
        instead_of: one of `known_families()`, in whose place the row stands until it is forgotten: for a row of the
            package that you want otherwise, `dataclasses.replace(row, ...)`.

    Returns:
        A function that forgets the family again; what is installed on pipelines stays. A second call does nothing.

    Raises:
        ValueError: if the row contradicts itself, names a pipeline that another row has, or is to stand instead of one
            that is not known.
    """
    known = known_families()
    if instead_of is not None and not any(row is instead_of for row in known):
        raise ValueError(f"instead_of: got {instead_of!r}, allowed is one of known_families()")
    _check(family, [row for row in known if row is not instead_of])
    entry = _Registered(family, instead_of)
    _registered.append(entry)

    def forget() -> None:
        _registered[:] = [known for known in _registered if known is not entry]

    return forget


def known_families() -> tuple[Family, ...]:
    """Every row, the package's own first, or what stands in their place."""
    rows = list(FAMILIES)
    for entry in _registered:
        places = [place for place, row in enumerate(rows) if row is entry.instead_of]
        place = places[0] if places else len(rows)
        rows[place : place + 1] = [entry.family]
    return tuple(rows)


def family_of(pipe: Any) -> Family:
    """The row of a pipeline.

    Raises:
        ValueError: if there is none.
    """
    names = class_names(pipe)
    for family in known_families():
        if names & set(family.pipelines):
            return family
    supported = ", ".join(f"{' or '.join(family.pipelines)} [{family.name}]" for family in known_families())
    raise ValueError(f"pipe: got a {type(pipe).__name__}, supported: {supported}")


def class_names(thing: object) -> set[str]:
    """Recognising by name spares importing every model of diffusers; subclasses are recognised too."""
    return {cls.__name__ for cls in type(thing).__mro__}


def check_transformer(family: Family, transformer: nn.Module) -> None:
    """Raise a ValueError if what the row names is not in the transformer."""
    kind = type(transformer).__name__
    for name in family.block_lists:
        if not isinstance(getattr(transformer, name, None), nn.ModuleList):
            raise ValueError(f"block_lists: {kind} has no nn.ModuleList {name!r}")
    modules = dict(transformer.named_modules())
    for path in (family.shards.gathered_at, *filter(None, [family.refiner])):
        if path not in modules:
            raise ValueError(f"gathered_at, refiner: {kind} has no submodule {path!r}")
    if family.conditioning is not None and family.conditioning.embedder not in modules:
        raise ValueError(f"conditioning.embedder: {kind} has no submodule {family.conditioning.embedder!r}")
    if family.conditioning is not None:
        _check_conditioning(family, family.conditioning, transformer)
    arguments = inspect.signature(type(transformer).forward).parameters
    if unknown := [name for name in family.shards.rows if name not in arguments]:
        raise ValueError(f"shards.rows: {kind}.forward has no argument {unknown[0]!r}")
    config = getattr(transformer, "config", None)
    for entry in (family.head_dim, family.shards.heads):
        if not hasattr(config, entry):
            raise ValueError(f"head_dim, heads: the config of {kind} has no entry {entry!r}")


def _check_conditioning(family: Family, where: Conditioning, transformer: Any) -> None:
    blocks = [block for name in family.block_lists for block in getattr(transformer, name)]
    if not any(name in dict(block.named_modules()) for block in blocks for name in where.linears):
        raise ValueError(f"conditioning.linears: no block of {type(transformer).__name__} has one of {where.linears}")
    for kind in {type(block) for block in blocks}:
        if where.argument not in inspect.signature(kind.forward).parameters:
            raise ValueError(f"conditioning.argument: {kind.__name__}.forward has no argument {where.argument!r}")


def _check(family: Family, others: Sequence[Family]) -> None:
    if not isinstance(family, Family):
        raise ValueError(f"family: got {family!r}, allowed is a Family")
    for name in (
        "pipelines",
        "transformers",
        "components",
        "block_lists",
        "block_arguments",
        "block_returns",
        "reused_streams",
        "kept_linears",
    ):
        _check_names(name, getattr(family, name))
    for name in ("samples", "sequence"):
        _check_names(f"shards.{name}", getattr(family.shards, name))
    for name, value in (("joined", family.joined), ("shards.rows", family.shards.rows)):
        if value != ():
            _check_names(name, value)
    if family.passes is not None:
        _check_names("passes.names", family.passes.names)
        _check_names("passes.prompts", family.passes.prompts)
    if family.conditioning is not None:
        _check_names("conditioning.linears", family.conditioning.linears)
    check_threshold("cache_threshold", family.cache_threshold)
    if not callable(family.processor):
        raise ValueError(f"processor: got {family.processor!r}, allowed is a function of AttentionLengths")
    streams = family.block_arguments
    _check_within("block_returns", family.block_returns, streams)
    _check_within("reused_streams", family.reused_streams, streams)
    _check_within("shards.sequence", family.shards.sequence, streams)
    if streams[0] not in family.shards.sequence:
        raise ValueError(f"shards.sequence: got {family.shards.sequence}, must hold the video stream {streams[0]!r}")
    joined = len(family.joined)
    if family.joined != family.block_lists[1:][-joined:] and joined:
        raise ValueError(f"joined: got {family.joined}, allowed are the last of the block_lists, but not the first")
    if joined and family.shards.sequence[-1] != streams[0]:
        raise ValueError(f"joined: allowed only where {streams[0]!r} is the last of shards.sequence")
    if not is_finite_number(family.shards.text_cost) or family.shards.text_cost <= 0:
        raise ValueError(f"shards.text_cost: got {family.shards.text_cost!r}, allowed is a finite number > 0")
    if family.shards.rows and family.shards.sequence != streams[:1]:
        raise ValueError(f"shards.rows: got {family.shards.rows}, allowed where shards.sequence is {streams[:1]} alone")
    for known in others:
        if both := set(known.pipelines) & set(family.pipelines):
            raise ValueError(f"pipelines: {sorted(both)} belong to {known.name!r} already")


def _check_names(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not value or not all(isinstance(x, str) for x in value):
        raise ValueError(f"{name}: got {value!r}, allowed is a tuple of one or more names")


def _check_within(name: str, names: tuple[str, ...], streams: tuple[str, ...]) -> None:
    if unknown := set(names) - set(streams):
        raise ValueError(f"{name}: got {sorted(unknown)}, allowed are the block_arguments {list(streams)}")
