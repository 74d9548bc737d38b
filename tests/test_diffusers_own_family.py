"""A transformer that the package has never seen, registered with one row: docs/your_own_family.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from para_kernels import FirstBlockCache
from para_kernels.integrations.diffusers import (
    Conditioning,
    Family,
    Passes,
    Processor,
    ShardPlan,
    accelerate,
    known_families,
    register_family,
)


class NovelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_qkv, self.to_out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.processor: Any = stock_processor

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def stock_processor(attn: Any, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in attn.to_qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return attn.to_out((weights @ v).transpose(1, 2).flatten(2))


class NovelBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = NovelAttention()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return x + self.attention(x * emb[:, None])


class NovelTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=2, attention_head_dim=8)
        self.layers = nn.ModuleList(NovelBlock() for _ in range(3))
        self.head = nn.Linear(16, 16)

    def forward(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor]:
        emb = torch.cos(timestep[:, None] * torch.arange(16))
        for layer in self.layers:
            latents = layer(latents, emb)
        return (self.head(latents),)


class NovelPipeline:
    def __init__(self) -> None:
        self.transformer = NovelTransformer().eval()
        self.scheduler = SimpleNamespace(timesteps=None)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        latents = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
        self.scheduler.timesteps = torch.linspace(1.0, 0.1, 4)
        for timestep in self.scheduler.timesteps:
            latents = latents - 0.1 * self.transformer(latents, timestep.expand(2))[0]
        return latents


class NovelProcessor(Processor):
    def __call__(self, attn: Any, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in attn.to_qkv(x).chunk(3, dim=-1))
        return attn.to_out(self.shard(x.shape[1]).attend(q, k, v, None).flatten(2))


NOVEL = Family(
    name="Novel",
    pipelines=("NovelPipeline",),
    transformers=("NovelTransformer",),
    processor=NovelProcessor,
    block_lists=("layers",),
    block_arguments=("x",),
    block_returns=("x",),
    reused_streams=("x",),
    cache_threshold=0.05,
    shards=ShardPlan(samples=("latents", "timestep"), text=None, patch=((1, 1),), sequence=("x",), gathered_at="head"),
)


@pytest.fixture
def pipe() -> Iterator[NovelPipeline]:
    torch.manual_seed(0)
    forget = register_family(NOVEL)
    yield NovelPipeline()
    forget()
    forget()


def test_accelerated_and_removed(pipe: NovelPipeline) -> None:
    stock = pipe()
    handle = accelerate(pipe)
    assert handle.processors == 3
    torch.testing.assert_close(pipe(), stock, rtol=1e-5, atol=1e-5)
    accelerate(pipe, cache=1e6)
    pipe()
    assert [record.reused for record in handle.records] == [False, True, True, True]
    handle.remove()
    assert pipe().equal(stock)


def test_unknown_before_and_after() -> None:
    with pytest.raises(ValueError, match="pipe: got a NovelPipeline, supported: "):
        accelerate(NovelPipeline())
    register_family(NOVEL)()
    with pytest.raises(ValueError, match="pipe: got a NovelPipeline, supported: "):
        accelerate(NovelPipeline())


def test_a_row_instead_of_another(pipe: NovelPipeline) -> None:
    rows = known_families()
    first = replace(NOVEL, cache_threshold=0.2)
    forget_first = register_family(first, instead_of=NOVEL)
    forget_second = register_family(replace(NOVEL, cache_threshold=0.3), instead_of=first)
    assert known_families()[:-1] == rows[:-1]
    handle = accelerate(pipe, cache=True)
    assert handle.settings.cache == FirstBlockCache(0.3)
    handle.remove()
    forget_second()
    assert known_families() == (*rows[:-1], first)
    forget_first()
    assert known_families() == rows


def test_a_row_of_the_package_can_be_otherwise() -> None:
    rows = known_families()
    forget = register_family(replace(rows[0], cache_threshold=0.5), instead_of=rows[0])
    assert known_families() == (replace(rows[0], cache_threshold=0.5), *rows[1:])
    forget()
    assert known_families() == rows
    assert known_families()[0] is rows[0]


def test_a_row_outlives_what_it_stood_for() -> None:
    rows = known_families()
    forget = register_family(NOVEL)
    forget_other = register_family(replace(NOVEL, cache_threshold=0.2), instead_of=NOVEL)
    forget()
    assert known_families() == (*rows, replace(NOVEL, cache_threshold=0.2))
    forget_other()
    assert known_families() == rows


def test_a_row_stands_instead_of_a_known_one_alone() -> None:
    with pytest.raises(ValueError, match=r"instead_of: got Family.*, allowed is one of known_families"):
        register_family(NOVEL, instead_of=replace(NOVEL, cache_threshold=0.2))
    with pytest.raises(ValueError, match="belong to"):
        register_family(replace(NOVEL, pipelines=("FluxPipeline",)), instead_of=known_families()[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipelines": ("FluxPipeline",)}, r"pipelines: \['FluxPipeline'\] belong to 'FLUX"),
        ({"pipelines": "NovelPipeline"}, "pipelines: got 'NovelPipeline', allowed is a tuple"),
        ({"block_arguments": ()}, r"block_arguments: got \(\), allowed is a tuple"),
        ({"block_returns": ("y",)}, r"block_returns: got \['y'\], allowed are the block_arguments \['x'\]"),
        ({"reused_streams": ("y",)}, "reused_streams: got"),
        ({"cache_threshold": -1.0}, "cache_threshold"),
        ({"processor": None}, "processor: got None"),
        ({"passes": Passes(("cond",), "text")}, "passes.prompts: got 'text', allowed is a tuple"),  # type: ignore[arg-type]
        ({"shards": replace(NOVEL.shards, sequence=("y",))}, "shards.sequence: got"),
        ({"shards": replace(NOVEL.shards, text_cost=0.0)}, "shards.text_cost: got 0.0, allowed is a finite number > 0"),
        ({"shards": replace(NOVEL.shards, text_cost=True)}, "shards.text_cost: got True, allowed is a finite number"),
        ({"shards": replace(NOVEL.shards, text_cost="1")}, "shards.text_cost: got '1', allowed is a finite number"),  # type: ignore[arg-type]
        ({"components": "transformer"}, "components: got 'transformer', allowed is a tuple"),
        ({"joined": "layers"}, "joined: got 'layers', allowed is a tuple"),
        ({"shards": replace(NOVEL.shards, rows="timestep")}, "shards.rows: got 'timestep', allowed is a tuple"),
        (
            {"joined": ("layers",)},
            r"joined: got \('layers',\), allowed are the last of the block_lists, but not the first",
        ),
        (
            {
                "block_lists": ("layers", "more"),
                "joined": ("more",),
                "block_arguments": ("x", "y"),
                "shards": replace(NOVEL.shards, sequence=("x", "y")),
            },
            "joined: allowed only where 'x' is the last of shards.sequence",
        ),
        (
            {"block_arguments": ("x", "y"), "shards": replace(NOVEL.shards, sequence=("x", "y"), rows=("timestep",))},
            r"shards.rows: got \('timestep',\), allowed where shards.sequence is \('x',\) alone",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_family(replace(NOVEL, **changes))
    with pytest.raises(ValueError, match="supported: "):
        accelerate(NovelPipeline())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_lists": ("blocks",)}, "block_lists: NovelTransformer has no nn.ModuleList 'blocks'"),
        ({"passes": Passes(("cond", "uncond"), ("text",))}, "NovelTransformer.forward has no argument 'text'"),
        ({"head_dim": "dim"}, "the config of NovelTransformer has no entry 'dim'"),
        ({"shards": replace(NOVEL.shards, gathered_at="tail")}, "NovelTransformer has no submodule 'tail'"),
        (
            {"shards": replace(NOVEL.shards, rows=("time",))},
            "shards.rows: NovelTransformer.forward has no argument 'time'",
        ),
        (
            {"conditioning": Conditioning("time", ("norm.linear",))},
            "conditioning.embedder: NovelTransformer has no submodule 'time'",
        ),
        (
            {"conditioning": Conditioning("head", ("norm.linear",))},
            r"conditioning.linears: no block of NovelTransformer has one of \('norm.linear',\)",
        ),
        (
            {"conditioning": Conditioning("head", ("attention.to_out",))},
            "conditioning.argument: NovelBlock.forward has no argument 'temb'",
        ),
    ],
)
def test_names_that_are_not_there_are_refused(changes: dict[str, Any], message: str) -> None:
    pipe = NovelPipeline()
    forget = register_family(replace(NOVEL, **changes))
    try:
        with pytest.raises(ValueError, match=message):
            accelerate(pipe)
        assert not pipe.transformer._forward_pre_hooks
    finally:
        forget()
