"""The preparation kernel against float64, in the interpreter.

float32 and float16: the interpreter's bfloat16 is truncated where the hardware rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import piece_of, prepared
from torch import Tensor

from para_kernels import ops
from para_kernels.preparation import Norm, Stream, prepare_attention, prepare_projection, unprepared
from para_kernels.triton_kernels.prepare import HEADS, TILE, prepare_forward

TOLERANCES = {torch.float32: 1e-6, torch.float16: 1.5e-3}


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions run the kernel, whose outputs hold NaN before."""

    def prepare(projections: list[Tensor], *arguments: Any) -> list[Tensor]:
        outputs = ops.prepared_outputs(projections, len(arguments[4]))
        for out in outputs:
            out.fill_(float("nan"))
        prepare_forward(projections, outputs, *arguments)
        return outputs

    monkeypatch.setattr("para_kernels.sources._prepare", prepare)


@dataclass(frozen=True)
class Case:
    """Rows around a tile's and heads around a program's; head dimensions that are and are not powers of 2."""

    tokens: tuple[int, ...] = (5, 3)
    heads: int = 2
    head_dim: int = 16
    batch: int = 2
    dtype: torch.dtype = torch.float32
    form: Any = "interleaved"
    angles: str = "D"
    kind: Any = "rms"
    over: Any = "head"
    bias: bool = False
    round_first: bool = False
    fused: bool = True
    alike: bool = False

    def streams(self) -> list[Stream]:
        """The first with RoPE, or `alike` all of them. `fused`: thirds of one projection; else with odd strides, for
        narrow accesses.
        """
        seed = torch.Generator().manual_seed(0)
        result = []
        for i, tokens in enumerate(self.tokens):
            extra = 0 if self.fused else 3
            shape = (self.batch, tokens, 3, self.heads, self.head_dim + extra)
            parts = torch.randn(shape, generator=seed).to(self.dtype)[..., : self.head_dim]
            rotary = None if i and not self.alike else self.rotary(tokens, seed)
            result.append(Stream(*parts.unbind(2), self.norm(seed), self.norm(seed), rotary))
        return result

    def norm(self, seed: torch.Generator) -> Norm | None:
        if self.kind is None:
            return None
        channels = self.head_dim * (self.heads if self.over == "heads" else 1)
        weight, bias = (torch.randn(channels, generator=seed).to(self.dtype) for _ in range(2))
        return Norm(self.kind, weight, bias if self.bias else None, 1e-5, self.over, self.round_first)

    def rotary(self, tokens: int, seed: torch.Generator) -> tuple[Tensor, Tensor] | None:
        if self.angles == "none":
            return None
        per_head = (self.heads,) if self.angles == "H, D/2" else ()
        angle = torch.randn(tokens, *per_head, self.head_dim // 2, generator=seed) * 10
        if self.angles == "D":
            angle = torch.cat([angle, angle], -1) if self.form == "half" else angle.repeat_interleave(2, -1)
        return angle.cos(), angle.sin()


CASES = {
    "rms, interleaved": Case(),
    "rms, half": Case(form="half"),
    "rows of several tiles, heads of several programs": Case(
        tokens=(TILE // 128 + 1, 2), heads=HEADS + 1, head_dim=128, batch=1, dtype=torch.float16, round_first=True
    ),
    "d24, layer with bias, half": Case(head_dim=24, kind="layer", bias=True, form="half"),
    "d24, layer with bias": Case(head_dim=24, kind="layer", bias=True),
    "d7, layer": Case(head_dim=7, kind="layer", angles="none"),
    "d7, half, no RoPE": Case(head_dim=7, form="half", angles="none"),
    "d1": Case(head_dim=1, angles="none", kind=None),
    "over all heads": Case(heads=HEADS + 1, over="heads", bias=True),
    "over all heads, half": Case(heads=3, over="heads", form="half"),
    "one value a pair": Case(angles="D/2"),
    "one value a pair, half": Case(angles="D/2", form="half"),
    "angles of each head": Case(angles="H, D/2", head_dim=24),
    "bias and two roundings": Case(dtype=torch.float16, round_first=True, bias=True),
    "one rounding": Case(dtype=torch.float16),
    "odd strides": Case(fused=False),
    "no norm": Case(kind=None, dtype=torch.float16),
    "an empty stream": Case(tokens=(0, 4)),
    "one token": Case(tokens=(1,), heads=1, batch=1),
    "nothing": Case(tokens=(0,)),
    "two of one kind": Case(tokens=(5, 11), alike=True),
    "two of one kind, several tiles": Case(
        tokens=(TILE // 128 + 1, 2 * TILE // 128), heads=HEADS + 1, head_dim=128, dtype=torch.float16, alike=True,
        round_first=True,
    ),
    "two of one kind, layer with bias": Case(kind="layer", bias=True, form="half", alike=True),
    "two of one kind, over all heads": Case(heads=HEADS + 1, over="heads", angles="H, D/2", alike=True),
    "five of one kind, two empty": Case(tokens=(4, 0, 2, 3, 0), alike=True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case: Case) -> None:
    streams = case.streams()
    outputs = prepare_attention(streams, rotary_form=case.form)
    for out, reference in zip(outputs, prepared(streams, half=case.form == "half"), strict=True):
        assert out.shape == reference.shape
        if out.numel():
            assert (out - reference).abs().max() <= TOLERANCES[case.dtype] * reference.abs().max()


def test_large_means_and_values() -> None:
    """The variance is that of the distances from the mean, and squares do not overflow in half precision."""
    streams = Case(kind="layer", angles="none", tokens=(4,)).streams()
    streams = [stream._replace(query=stream.query + 1000, key=stream.key * 1000) for stream in streams]
    for out, reference in zip(prepare_attention(streams), prepared(streams, half=False), strict=True):
        assert (out - reference).abs().max() <= 2e-4 * reference.abs().max()  # 1000 + x has lost 10 bits of x
    half = [stream._replace(query=stream.query.half() * 3000) for stream in Case(tokens=(4,), angles="none").streams()]
    out = prepare_projection(half[0].query, Norm("rms"))
    assert (out - prepared([half[0]._replace(norm_query=Norm("rms"))], half=False)[0]).abs().max() <= 4e-3


@pytest.mark.parametrize("turned", [0, 1])
def test_angles_that_are_the_same_for_all_rows(turned: int) -> None:
    """Their strides are those of none."""
    streams = Case(angles="none").streams()
    angle = torch.randn(1, streams[turned].query.shape[3])
    rotary = tuple(x.expand(streams[turned].query.shape[1], -1) for x in (angle.cos(), angle.sin()))
    streams[turned] = streams[turned]._replace(rotary=rotary)
    for out, reference in zip(prepare_attention(streams), prepared(streams, half=False), strict=True):
        assert (out - reference).abs().max() <= 1e-6 * reference.abs().max()


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_into_the_piece_of_a_ring(case: Case, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare_into(outputs: list[Tensor], *arguments: Any, first_part: int = 0) -> None:
        prepare_forward(arguments[0], outputs, *arguments[1:], first_part)

    monkeypatch.setattr(ops, "prepare_into", prepare_into)
    streams = case.streams()
    expected = prepare_attention(streams, rotary_form=case.form)
    value = None
    if joined:
        value = torch.cat([stream.value for stream in streams if stream.value is not None], dim=1)
        streams = [stream._replace(value=None) for stream in streams]
    later = unprepared(streams, value=value, rotary_form=case.form)
    q = torch.full_like(expected[0], float("nan"))
    k, v = piece_of(q, q.shape)
    later.write_keys(k, v)
    later.write_queries(q)
    for out, wanted in zip((q, k, v), expected, strict=True):
        assert torch.equal(out, wanted)


def test_one_projection_alone() -> None:
    stream = Case(tokens=(6,)).streams()[0]
    q, k, _ = prepare_attention([stream])
    assert torch.equal(prepare_projection(stream.query, stream.norm_query, stream.rotary), q)
    assert torch.equal(prepare_projection(stream.key, stream.norm_key, stream.rotary), k)
