"""Every family: exact attention, the cache, and removal, on the real pipeline classes."""

from __future__ import annotations

from typing import Any

import family_ranks
import pytest
import ranks
import torch
from tiny_families import TINY, generate_family, tiny_family

from para_kernels import FirstBlockCache
from para_kernels.integrations.diffusers import accelerate, apply_cache_on_pipe
from para_kernels.integrations.diffusers.processor_swap import attn_processors

ERROR = 1e-5  # float32, over all steps, of the largest latent: sums in another order


@pytest.fixture(scope="module", params=TINY)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_family(request.param)


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
    branches = {record.branch: [] for record in handle.records}
    for record in handle.records:
        branches[record.branch].append(record.reused)
    assert all(decided == [False] + [True] * (len(decided) - 1) for decided in branches.values())
    assert len(handle.records) == 4 * len(branches) / len(TINY[name].components)
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
    return ranks.once(folder, f"families {world}", lambda: ranks.launch(world, family_ranks.run, timeout=240.0))


@pytest.mark.parametrize("name", TINY)
def test_ranks_equal_one(spread: list[Any], name: str) -> None:
    for seen in spread:
        if isinstance(seen, Exception):
            raise seen
        difference, alone, decided = seen[name]
        assert difference <= ERROR
        assert decided == alone


@torch.no_grad()
def test_wan_looks_at_an_image() -> None:
    """Image to video has keys of an image before the 512 of the text, with projections of their own."""
    pipe = tiny_family("Wan 2.1")
    config = dict(TINY["Wan 2.1"].config, image_dim=8, added_kv_proj_dim=48)
    torch.manual_seed(0)
    pipe.transformer = type(pipe.transformer)(**config).eval()
    inputs = {
        "hidden_states": torch.randn(2, 16, 3, 6, 4),
        "timestep": torch.full((2,), 500.0),
        "encoder_hidden_states": torch.randn(2, 512, 16),
        "encoder_hidden_states_image": torch.randn(2, 5, 8),
    }
    stock = pipe.transformer(**inputs).sample
    other = pipe.transformer(**inputs | {"encoder_hidden_states_image": torch.randn(2, 5, 8)}).sample
    handle = accelerate(pipe)
    assert (pipe.transformer(**inputs).sample - stock).abs().max() <= ERROR * stock.abs().max()
    assert (other - stock).abs().max() > 100 * ERROR * stock.abs().max()
    handle.remove()
