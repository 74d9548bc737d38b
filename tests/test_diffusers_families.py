"""Every family: exact attention, the cache, and removal, on the real pipeline classes."""

from __future__ import annotations

from typing import Any

import family_ranks
import numpy as np
import pytest
import ranks
import torch
from tiny_families import TINY, generate_family, tiny_family
from torch import Tensor

from para_kernels import FirstBlockCache, TeaCache
from para_kernels.integrations.diffusers import Handle, accelerate, apply_cache_on_pipe
from para_kernels.integrations.diffusers.models import FLUX
from para_kernels.integrations.diffusers.processor_swap import attn_processors

ranks.preload("family_ranks")
ERROR = 1e-5  # float32, over all steps, of the largest latent: sums in another order


@pytest.fixture(scope="module", params=TINY)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_family(request.param)


def branches(handle: Handle) -> list[str]:
    return list(dict.fromkeys(record.branch for record in handle.records))


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_exact_and_removed(family: tuple[str, Any], guided: bool) -> None:
    name, pipe = family
    stock = generate_family(name, pipe, guided=guided)
    assert stock.isfinite().all()
    handle = accelerate(pipe)
    assert len(handle.transformers) == len(TINY[name].components)
    assert handle.processors == sum(len(attn_processors(known)) for known in handle.transformers) >= 3
    exact = generate_family(name, pipe, guided=guided)
    assert (exact - stock).abs().max() <= ERROR * stock.abs().max()
    handle.remove()
    assert generate_family(name, pipe, guided=guided).equal(stock)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_cache(family: tuple[str, Any], guided: bool) -> None:
    name, pipe = family
    stock = generate_family(name, pipe, guided=guided)
    handle = apply_cache_on_pipe(pipe, 0.0)
    assert generate_family(name, pipe, guided=guided).equal(stock)
    apply_cache_on_pipe(pipe, 1e-12)  # computes every step, through the hooks
    assert generate_family(name, pipe, guided=guided).equal(stock)
    assert not any(record.reused for record in handle.records)
    apply_cache_on_pipe(pipe, 1e6)
    reused = generate_family(name, pipe, guided=guided)
    decided = {branch: [r.reused for r in handle.records if r.branch == branch] for branch in branches(handle)}
    assert all(of_branch == [False] + [True] * (len(of_branch) - 1) for of_branch in decided.values())
    assert len(handle.records) == 4 * len(decided) / len(TINY[name].components)
    assert reused.isfinite().all()
    assert not reused.equal(stock)
    handle.remove()
    assert generate_family(name, pipe, guided=guided).equal(stock)


def test_default_threshold(family: tuple[str, Any]) -> None:
    _, pipe = family
    handle = accelerate(pipe, cache=True)
    assert handle.settings.cache == FirstBlockCache(handle.family.cache_threshold)
    handle.remove()


def test_parts_that_are_not_supported_are_refused() -> None:
    pipe = tiny_family("FLUX.1-dev")
    pipe.transformer.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"pipe: its transformer.encoder_hid_proj is a Identity"):
        accelerate(pipe)
    assert not pipe.transformer._forward_pre_hooks


@pytest.fixture(scope="session", params=family_ranks.WAYS, ids=["2 ranks", "3 ranks"])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    world = request.param
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if hasattr(request.config, "workerinput") else folder
    return ranks.once(folder, f"families {world}", lambda: ranks.launch(world, family_ranks.run, timeout=480.0))


@pytest.mark.parametrize("name", TINY)
def test_ranks_equal_one(spread: list[Any], name: str) -> None:
    expected, alone, _ = family_ranks.made(name)
    for got, measured, _ in outcomes(spread, name):
        assert np.abs(got - expected).max() <= ERROR * np.abs(expected).max()
        assert measured.keys() == alone.keys()
        assert measured == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("name", TINY)
def test_a_rank_has_fewer_rows_where_they_cost_more(spread: list[Any], name: str) -> None:
    rows = [here for *_, here in outcomes(spread, name)]
    assert sum(rows) == family_ranks.made(name)[2]
    if name.startswith("FLUX.1"):  # whose text comes first
        assert rows[0] < rows[-1]
    else:
        assert max(rows) - min(rows) <= 1


def outcomes(spread: list[Any], name: str) -> list[family_ranks.Outcome]:
    """What every rank has made, or what has befallen one."""
    for seen in spread:
        if isinstance(seen, Exception):
            raise seen
    return [seen[name] for seen in spread]


# --- pipelines with two transformers ----------------------------------------------------------------------------------


def is_untouched(transformer: Any) -> bool:
    return not transformer._forward_pre_hooks and not hasattr(transformer.blocks[0], "_diffusers_hook")


def test_the_steps_of_two_transformers_are_told_apart() -> None:
    pipe = tiny_family("Wan 2.2 A14B")
    handle = accelerate(pipe, cache=FirstBlockCache(1e6, warmup_steps=2))
    generate_family("Wan 2.2 A14B", pipe, guided=True, steps=6)
    assert branches(handle) == ["cond", "uncond", "cond of transformer_2", "uncond of transformer_2"]
    assert [(r.step, r.reused) for r in handle.records if r.branch == "cond"] == [(0, False), (1, False), (2, True)]
    assert [r.step for r in handle.records if r.branch == "cond of transformer_2"] == [0, 1, 2]
    assert "12 of 12 processors swapped" in handle.summary()
    handle.remove()
    assert is_untouched(pipe.transformer)
    assert is_untouched(pipe.transformer_2)


def test_the_second_transformer_alone() -> None:
    pipe = tiny_family("Wan 2.2 A14B")
    alone = type(pipe)(**pipe.components | {"transformer": None}, boundary_ratio=1.1)
    handle = accelerate(alone, cache=0.1)
    assert handle.transformers == [pipe.transformer_2]
    assert is_untouched(pipe.transformer)
    alone.transformer_2 = None
    with pytest.raises(
        ValueError, match="pipe: its transformer and transformer_2 is None, allowed is WanTransformer3D"
    ):
        accelerate(alone)


def test_a_pipe_with_one_more_transformer_widens_the_installation() -> None:
    both = tiny_family("Wan 2.2 A14B")
    first = type(both)(**both.components | {"transformer_2": None})
    handle = accelerate(first, cache=0.1)
    assert accelerate(both) is handle
    assert handle.transformers == [both.transformer, both.transformer_2]
    assert handle.processors == 12
    accelerate(first, cache=None)
    assert all(installation.cache is None for installation in handle._installations)
    handle.remove()
    assert is_untouched(both.transformer_2)


def test_transformers_of_two_installations_are_refused() -> None:
    both = tiny_family("Wan 2.2 A14B")
    first = accelerate(type(both)(**both.components | {"transformer_2": None}))
    second = accelerate(type(both)(**both.components | {"transformer": None}))
    with pytest.raises(ValueError, match=r"pipe: its transformer and transformer_2 have been accelerated as those of"):
        accelerate(both, cache=0.1)
    assert first.settings.cache is None
    second.remove()
    assert accelerate(both, cache=0.1) is first


def test_what_the_second_transformer_cannot_do_changes_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_family("Wan 2.2 A14B")
    blocks = pipe.transformer_2.blocks
    pipe.transformer_2.blocks = blocks[:1]
    with pytest.raises(ValueError, match=r"cache: the transformer has 1 block\(s\)"):
        accelerate(pipe, cache=0.1)
    pipe.transformer_2.blocks = blocks
    processors = attn_processors(pipe.transformer)

    def full(_: Any) -> None:
        raise TypeError

    monkeypatch.setattr(pipe.transformer_2.blocks[2].attn1, "set_processor", full)
    with pytest.raises(TypeError):
        accelerate(pipe, cache=0.1)
    assert is_untouched(pipe.transformer)
    assert is_untouched(pipe.transformer_2)
    assert attn_processors(pipe.transformer) == processors


# --- blocks to which all streams are one ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.skipif("FLUX.2-dev" not in TINY, reason="FLUX.2 came with a later diffusers")
@pytest.mark.parametrize(("first", "last"), [(1, 0), (2, 0), (3, 0), (3, 1), (1, 2), (1, 3)])
def test_a_reused_step_on_the_same_input_is_the_computed_one(first: int, last: int) -> None:
    """Wherever the skipped blocks begin and end: in blocks of two streams, or in those where text and image are one."""
    pipe = tiny_family("FLUX.2-dev")
    inputs = flux_inputs(pipe.transformer)
    inputs |= {"img_ids": torch.arange(24).view(6, 4), "txt_ids": torch.zeros(5, 4, dtype=torch.int64)}
    del inputs["pooled_projections"]
    stock = pipe.transformer(**inputs).sample
    handle = accelerate(pipe, cache=FirstBlockCache(1e6, first_blocks=first, last_blocks=last))
    for _ in range(2):
        assert (pipe.transformer(**inputs).sample - stock).abs().max() <= ERROR * stock.abs().max()
    assert [record.reused for record in handle.records] == [False, True]


# --- TeaCache ---------------------------------------------------------------------------------------------------------


def test_teacache_on_flux() -> None:
    """The published polynomial; and the modulated input, computed from the first block's own parts."""
    pipe = tiny_family("FLUX.1-dev")
    block = pipe.transformer.transformer_blocks[0]
    handle = accelerate(pipe, cache=TeaCache(0.1))
    assert handle.settings.cache == TeaCache(0.1, rescale=FLUX.teacache_rescale)
    given: list[dict[str, Any]] = []
    inputs = flux_inputs(pipe.transformer)
    block.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    accelerate(pipe, cache=TeaCache(1e-6, rescale=(2.0, 0.0)))
    with torch.no_grad():
        for timestep in (0.5, 0.4):
            pipe.transformer(**inputs | {"timestep": torch.full((2,), timestep)})
        seen = []
        for arguments in given:
            shift, scale, *_ = block.norm1.linear(torch.nn.functional.silu(arguments["temb"])).chunk(6, dim=1)
            hidden = arguments["hidden_states"]
            normal = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
            seen.append((normal * (1 + scale[:, None]) + shift[:, None]).double())
    expected = 2 * (seen[0] - seen[1]).abs().sum() / seen[0].abs().sum()
    assert handle.records[-1].diff == pytest.approx(float(expected), rel=1e-4)


def flux_inputs(transformer: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 6, transformer.config.in_channels, generator=generator),
        "timestep": torch.full((2,), 0.5),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
        "pooled_projections": torch.randn(2, 8, generator=generator),
        "img_ids": torch.arange(18.0).view(6, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.full((2,), 3.5),
    }
