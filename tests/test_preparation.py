"""The preparation of attention's input: against float64, and to the bit against the expressions of diffusers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import FP32LayerNorm, MochiRMSNorm, RMSNorm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import piece_of, prepared
from torch import Tensor, nn

from para_kernels import ops, preparation
from para_kernels.integrations.diffusers.norms import left_to_norm
from para_kernels.preparation import (
    Norm,
    Stream,
    prepare_attention,
    prepare_projection,
    unprepared,
)
from para_kernels.sources import as_they_are

# One rounding of each step, of which the norm has up to three: diffusers' own expressions come as near.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
DTYPES = list(TOLERANCES)

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """Streams of S tokens; which of them have RoPE; their norms."""

    tokens: tuple[int, ...] = (5, 3)
    heads: int = 3
    head_dim: int = 16
    batch: int = 2
    dtype: torch.dtype = torch.float32
    form: Any = "interleaved"
    angles: str = "D"
    rotated: tuple[bool, ...] = (True, False)
    kind: Any = "rms"
    over: Any = "head"
    bias: bool = False

    def norm(self, seed: torch.Generator) -> Norm | None:
        if self.kind is None:
            return None
        channels = self.head_dim * (self.heads if self.over == "heads" else 1)
        weight, bias = (torch.randn(channels, generator=seed).to(self.dtype) for _ in range(2))
        return Norm(self.kind, weight, bias if self.bias else None, 1e-5, self.over)

    def rotary(self, tokens: int, seed: torch.Generator) -> tuple[Tensor, Tensor]:
        per_head = (self.heads,) if self.angles == "H, D/2" else ()
        angle = torch.randn(tokens, *per_head, self.head_dim // 2, generator=seed) * 10
        if self.angles == "D":
            angle = torch.cat([angle, angle], -1) if self.form == "half" else angle.repeat_interleave(2, -1)
        return angle.cos(), angle.sin()

    def streams(self) -> list[Stream]:
        """Thirds of fused projections: D is contiguous, tokens are not."""
        seed = torch.Generator().manual_seed(0)
        result = []
        for tokens, rotated in zip(self.tokens, self.rotated, strict=False):
            fused = torch.randn(self.batch, tokens, 3, self.heads, self.head_dim, generator=seed).to(self.dtype)
            rotary = self.rotary(tokens, seed) if rotated else None
            result.append(Stream(*fused.unbind(2), self.norm(seed), self.norm(seed), rotary))
        return result


def check(case: Case) -> None:
    streams = case.streams()
    outputs = prepare_attention(streams, rotary_form=case.form)
    references = prepared(streams, half=case.form == "half")
    for out, reference in zip(outputs, references, strict=True):
        assert out.shape == (case.batch, sum(case.tokens), case.heads, case.head_dim)
        assert out.dtype == case.dtype
        assert out.transpose(1, 2).is_contiguous(), "stored head-major"
        if out.numel():
            assert (out - reference).abs().max() <= TOLERANCES[case.dtype] * reference.abs().max()


CASES = {
    "rms, interleaved": Case(),
    "rms, half": Case(form="half"),
    "layer with bias, half": Case(kind="layer", bias=True, form="half", rotated=(False, True)),
    "layer, odd D, no RoPE": Case(kind="layer", head_dim=7, rotated=(False, False)),
    "odd D, half, no RoPE": Case(head_dim=7, rotated=(False, False), form="half"),
    "over all heads": Case(over="heads", tokens=(6,)),
    "over all heads with bias": Case(over="heads", bias=True, tokens=(6,)),
    "one value a pair": Case(angles="D/2"),
    "one value a pair, half": Case(angles="D/2", form="half"),
    "angles of each head": Case(angles="H, D/2", head_dim=24),
    "no norm": Case(kind=None, rotated=(True, True)),
    "one token": Case(tokens=(1,), batch=1, heads=1),
    "an empty stream": Case(tokens=(4, 0)),
    "nothing": Case(tokens=(0, 0)),
    "no sample": Case(batch=0),
    "three streams": Case(tokens=(2, 3, 1), rotated=(False, True, False)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer", None])
def test_matches_float64_in_every_dtype(dtype: torch.dtype, kind: str | None) -> None:
    check(Case(dtype=dtype, kind=kind, tokens=(33, 7), head_dim=64))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    heads=st.integers(1, 4),
    pairs=st.integers(1, 20),
    batch=st.integers(0, 3),
    form=st.sampled_from(["interleaved", "half"]),
    angles=st.sampled_from(["D", "D/2", "H, D/2"]),
    kind=st.sampled_from(["rms", "layer", None]),
    bias=st.booleans(),
)
def test_matches_float64_for_any_shape(tokens: Any, pairs: int, **others: Any) -> None:
    # The deviation of few channels can be so small that the mean's last bit decides.
    assume(others["kind"] != "layer" or pairs >= 4)
    check(Case(tokens=tokens, head_dim=2 * pairs, **others))


# --- the bits of diffusers ------------------------------------------------------------------------------------------


def modules(heads: int, head_dim: int) -> dict[str, nn.Module]:
    across = RMSNorm(heads * head_dim, eps=1e-5)
    return {
        "RMSNorm": RMSNorm(head_dim, eps=1e-6),
        "RMSNorm with bias": RMSNorm(head_dim, eps=1e-6, bias=True),
        "RMSNorm without weight": RMSNorm(head_dim, eps=1e-6, elementwise_affine=False),
        "RMSNorm across heads": across,
        "MochiRMSNorm": MochiRMSNorm(head_dim, eps=1e-5),
        "torch's RMSNorm": nn.RMSNorm(head_dim, eps=1e-6),
        "torch's RMSNorm without weight": nn.RMSNorm(head_dim, eps=1e-6, elementwise_affine=False),
        "torch's RMSNorm across heads": nn.RMSNorm(heads * head_dim, eps=1e-5),
        "LayerNorm": nn.LayerNorm(head_dim, eps=1e-6),
        "FP32LayerNorm": FP32LayerNorm(head_dim, eps=1e-6, elementwise_affine=False),
    }


def test_a_weight_that_is_no_parameter_counts() -> None:
    """As where a wrapper of the model keeps the parameters and leaves views of them behind."""
    module = nn.RMSNorm(16, eps=1e-6)
    weight = torch.randn(16)
    del module.weight
    module.weight = weight  # type: ignore[assignment]
    _, norm = left_to_norm(module, torch.randn(1, 2, 3, 16))
    assert norm is not None
    assert norm.weight is weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", modules(1, 1))
def test_norms_and_rope_have_the_bits_of_diffusers(name: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, kind=None, tokens=(11,), rotated=(True,))
    (stream,) = case.streams()
    module = modules(case.heads, case.head_dim)[name]
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    module.to(dtype).requires_grad_(False)
    x, norm = left_to_norm(module, stream.query)
    assert norm is not None
    q, _, _ = prepare_attention([stream._replace(query=x, norm_query=norm)])
    rows = stream.query.flatten(2) if norm.over == "heads" else stream.query
    stock = module(rows).view(stream.query.shape)
    assert torch.equal(q, apply_rotary_emb(stock, stream.rotary, sequence_dim=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_form_has_the_bits_of_diffusers(dtype: torch.dtype) -> None:
    (stream,) = Case(dtype=dtype, kind=None, tokens=(11,), rotated=(True,), form="half").streams()
    q, _, _ = prepare_attention([stream], rotary_form="half")
    stock = apply_rotary_emb(stream.query, stream.rotary, use_real_unbind_dim=-2, sequence_dim=1)  # type: ignore[arg-type]
    assert torch.equal(q, stock)


def test_a_norm_that_does_more_is_called_itself() -> None:
    x = torch.randn(2, 3, 4, 8)

    class Unknown(nn.RMSNorm):
        pass

    unknown = Unknown(8, eps=1e-6).requires_grad_(False)
    unsaid = nn.RMSNorm(8).requires_grad_(False)
    hooked = RMSNorm(8, eps=1e-6).requires_grad_(False)
    hooked.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0] + 1,))
    across = nn.LayerNorm(32, eps=1e-6).requires_grad_(False)
    stock = {unknown: unknown(x), unsaid: unsaid(x), hooked: hooked(x), across: across(x.flatten(2)).view(x.shape)}
    for module, expected in stock.items():
        normed, norm = left_to_norm(module, x)
        assert norm is None
        assert torch.equal(normed, expected)


# --- one projection, given values, compilation ----------------------------------------------------------------------


def test_one_projection_alone() -> None:
    stream = Case(tokens=(6,)).streams()[0]
    q, k, _ = prepare_attention([stream])
    assert torch.equal(prepare_projection(stream.query, stream.norm_query, stream.rotary), q)
    assert torch.equal(prepare_projection(stream.key, stream.norm_key, stream.rotary), k)


def test_values_that_are_joined_already_are_not_copied() -> None:
    streams = Case().streams()
    q, k, v = prepare_attention(streams)
    without = [stream._replace(value=None) for stream in streams]
    q2, k2, v2 = prepare_attention(without, value=v)
    assert v2 is v
    assert torch.equal(q, q2)
    assert torch.equal(k, k2)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_written_to_memory_of_the_callers(name: str, joined: bool) -> None:
    """As in a ring's buffer; and of other tensors, as a graph's replay has them."""
    streams = CASES[name].streams()
    expected = prepare_attention(streams, rotary_form=CASES[name].form)
    value = None
    if joined:
        value = torch.cat([stream.value for stream in streams if stream.value is not None], dim=1)
        streams = [stream._replace(value=None) for stream in streams]
    later = unprepared(streams, value=value, rotary_form=CASES[name].form)
    later = later.without_tensors().with_tensors(later.tensors)
    q = torch.empty_like(expected[0])
    assert later.new_result().shape == later.outline.shape == q.shape
    k, v = piece_of(q, q.shape)
    later.write_keys(k, v)
    later.write_queries(q)
    for out, wanted in zip((q, k, v), expected, strict=True):
        assert torch.equal(out, wanted)
    for out, wanted in zip(later.prepared(), expected, strict=True):
        assert torch.equal(out, wanted)


def test_what_nothing_is_to_be_done_to_is_returned() -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 16).unbind()
    streams = as_they_are(q, k, v)
    assert streams.is_prepared
    assert all(one is other for one, other in zip(streams.prepared(), (q, k, v), strict=True))
    assert not unprepared([Stream(q, k, v)]).is_prepared
    assert not unprepared([Stream(q, k, norm_key=Norm("rms"))], value=v).is_prepared
    assert prepare_attention([Stream(q, k)], value=v)[0] is not q


@pytest.mark.parametrize("name", ["rms, half", "layer with bias, half", "over all heads", "an empty stream", "no norm"])
def test_opcheck(name: str) -> None:
    streams = CASES[name].streams()
    parts = [(x, n) for s in streams for x, n in ((s.query, s.norm_query), (s.key, s.norm_key), (s.value, None))]
    codes = {("rms", "head"): 1, ("rms", "heads"): 3, ("layer", "head"): 2}
    torch.library.opcheck(
        torch.ops.para_kernels.prepare.default,
        (
            [x for x, _ in parts],
            [n and n.weight for _, n in parts],
            [n and n.bias for _, n in parts],
            [codes[n.kind, n.over] if n else 0 for _, n in parts],
            [n.eps if n else 0.0 for _, n in parts],
            [s.rotary and s.rotary[0] for s in streams],
            [s.rotary and s.rotary[1] for s in streams],
            CASES[name].form == "half",
        ),
    )


@pytest.mark.parametrize("angles", ["D", "D/2", "H, D/2"])
def test_compiles_without_breaks_and_once_for_any_length(angles: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(prepare_attention, fullgraph=True, backend="aot_eager", dynamic=True)

    def check_compiled(tokens: tuple[int, int]) -> None:
        streams = Case(tokens=tokens, angles=angles).streams()
        for out, reference in zip(compiled(streams), prepare_attention(streams), strict=True):
            assert torch.equal(out, reference)
            assert out.stride() == reference.stride()

    check_compiled((5, 6))  # no size like another one, which the compiler would take for the same
    with torch.compiler.set_stance("fail_on_recompile"):
        check_compiled((9, 4))
        check_compiled((12, 7))


# --- bad input ------------------------------------------------------------------------------------------------------


def bad_inputs() -> dict[str, tuple[Any, ...]]:
    good, other = Case().streams()
    weight = torch.ones(16)
    cos = torch.ones(5, 16)
    return {
        "streams: got none": ([],),
        r"streams\[0\].query: got shape": ([good._replace(query=torch.ones(2, 5, 48))],),
        r"streams\[0\].query: got dtype": ([good._replace(query=good.query.double())],),
        r"streams\[0\].key: got dtype": ([good._replace(key=good.key.bfloat16())],),
        r"streams\[0\].key: got shape": ([good._replace(key=good.key[:, :4])],),
        r"streams\[0\].value: got shape": ([good._replace(value=good.key[:, :4])],),
        r"streams\[0\].value: got None": ([good._replace(value=None)],),
        r"streams\[1\].query: got shape": ([good, other._replace(query=torch.ones(2, 3, 3, 8))],),
        r"streams\[0\].query: got strides": ([good._replace(query=torch.ones(2, 5, 16, 3).transpose(2, 3))],),
        r"norm_query.kind": ([good._replace(norm_query=Norm("batch"))],),  # type: ignore[arg-type]
        r"norm_query.over": ([good._replace(norm_query=Norm("layer", over="heads"))],),
        r"norm_query.round_first": ([good._replace(norm_query=Norm("layer", round_first=True))],),
        r"norm_key.weight: got shape": ([good._replace(norm_key=Norm("rms", weight[:8]))],),
        r"norm_key.bias: got dtype": ([good._replace(norm_key=Norm("rms", weight, weight.double()))],),
        r"rotary.cos: got dtype": ([good._replace(rotary=(cos.half(), cos))],),
        r"rotary.sin: got shape": ([good._replace(rotary=(cos, cos[:4]))],),
        r"rotary.sin: must have": ([good._replace(rotary=(cos, cos[:, :8]))],),
    }


@pytest.mark.parametrize("message", bad_inputs())
def test_bad_streams_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_attention(*bad_inputs()[message])


def test_joined_values_are_checked_as_streams_are() -> None:
    streams = [Case(tokens=(5,)).streams()[0]._replace(value=None)]
    for value, message in (
        (torch.ones(2, 5, 16, 3).transpose(2, 3), "value: got strides"),
        (torch.ones(2, 5, 3, 16, requires_grad=True), "value"),
        (torch.ones(2, 4, 3, 16), "value: got shape"),
        (torch.ones(2, 5, 3, 16).half(), "value: got dtype"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            unprepared(streams, value=value)


def test_bad_arguments_are_refused() -> None:
    streams = Case().streams()
    without = [stream._replace(value=None) for stream in streams]
    value = torch.ones(2, 8, 3, 16)
    with pytest.raises(ValueError, match="rotary_form"):
        prepare_attention(streams, rotary_form="full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"streams\[0\].value: must be None"):
        prepare_attention(streams, value=value)
    with pytest.raises(ValueError, match="value: got shape"):
        prepare_attention(without, value=value[:, 1:])
    with pytest.raises(ValueError, match="value: got dtype"):
        prepare_attention(without, value=value.half())
    with pytest.raises(ValueError, match="even head dimension"):
        prepare_projection(torch.ones(1, 2, 1, 7), None, (torch.ones(2, 7), torch.ones(2, 7)))
    with pytest.raises(ValueError, match=r"projection.*grad"):
        prepare_projection(torch.ones(1, 2, 1, 8, requires_grad=True), Norm("rms"))


def test_nothing_is_written_to_what_went_in() -> None:
    for case, form in itertools.product((Case(), Case(kind=None)), ("interleaved", "half")):
        streams = replace(case, form=form).streams()
        before = [stream.query.clone() for stream in streams]
        prepare_attention(streams, rotary_form=form)  # type: ignore[arg-type]
        assert all(torch.equal(stream.query, query) for stream, query in zip(streams, before, strict=True))


needs_extension = pytest.mark.skipif(ops._C is None, reason="without the extension every call is checked")


@needs_extension
def test_calls_alike_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(preparation, "_known_good", set())
    monkeypatch.setattr(preparation, "_check_form", checked.append)
    for _ in range(2):
        prepare_attention(Case().streams())
        prepare_projection(Case().streams()[0].query, None)
        prepare_attention([x._replace(value=None) for x in Case().streams()], value=torch.ones(2, 8, 3, 16))
    assert len(checked) == 3


@needs_extension
@pytest.mark.parametrize("message", bad_inputs())
def test_what_is_like_no_good_call_is_checked(message: str) -> None:
    prepare_attention(Case().streams())
    for _ in range(2):  # a refused call is not remembered either
        with pytest.raises(ValueError, match=message):
            prepare_attention(*bad_inputs()[message])


@needs_extension
def test_a_signature_tells_apart_what_checks_tell_apart() -> None:
    assert ops._C is not None
    x = torch.randn(2, 3, 4)
    others = (
        torch.randn(2, 4, 3),
        torch.randn(3, 2, 4).transpose(0, 1),
        x.half(),
        torch.randn(2, 3, 4, device="meta"),
        x.clone().requires_grad_(),
        torch.randn(24),
        None,
    )
    signatures = {ops._C.signature(y) for y in (x, *others)}
    assert len(signatures) == 1 + len(others)
    assert ops._C.signature(x, None) not in {ops._C.signature(x), ops._C.signature(None, x)}
    assert ops._C.signature(x) == ops._C.signature(torch.randn(2, 3, 4))
    with torch.no_grad():
        assert ops._C.signature(others[4]) == ops._C.signature(x)
    assert ops._C.signature(nn.Parameter(x, requires_grad=False)) == ops._C.signature(x)
    assert ops._C.signature(x.to_sparse()) is None
    assert ops._C.signature(x.as_subclass(Other)) is None


class Other(Tensor):
    """A subclass, whose checks may mean something else."""
