"""The attention swap: the same video as stock diffusers, for any mix of prompt lengths, without a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from tiny_hunyuan import PROMPTS, TEXT_TOKENS, generate, tiny_pipeline, transformer_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from para_kernels.integrations.diffusers import ParaAttnProcessor, accelerate
from para_kernels.integrations.diffusers import attention as attention_module
from para_kernels.integrations.diffusers.attention import AttentionLengths

# Attention sums in another order than SDPA with a mask does. One key too many or too few shows at 4e-3.
EXACT = 1e-5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pipe() -> HunyuanVideoPipeline:
    return tiny_pipeline()


def forward(transformer: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def largest_error(result: Tensor, reference: Tensor) -> float:
    return (result - reference).abs().max().item()


# --- the same result ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["accelerate", "processor"])
def test_equals_stock_for_a_batch_of_prompts_of_different_lengths(pipe: HunyuanVideoPipeline, how: str) -> None:
    stock = generate(pipe)
    if how == "accelerate":
        accelerate(pipe)
    else:
        pipe.transformer.set_attn_processor(ParaAttnProcessor())
    assert largest_error(generate(pipe), stock) <= EXACT


@pytest.mark.parametrize("how", ["accelerate", "processor"])
def test_a_batch_equals_its_prompts_one_by_one(pipe: HunyuanVideoPipeline, how: str) -> None:
    if how == "accelerate":
        accelerate(pipe)
    else:
        pipe.transformer.set_attn_processor(ParaAttnProcessor())
    one_by_one = torch.cat([generate(pipe, [prompt]) for prompt in PROMPTS])
    assert largest_error(generate(pipe), one_by_one) <= EXACT


def test_equals_stock_in_the_decoded_frames_and_under_true_guidance(pipe: HunyuanVideoPipeline) -> None:
    arguments = {"true_cfg_scale": 3.0, "negative_prompt": ["slowly", "up and down", "a"], "output_type": "pt"}
    stock = generate(pipe, steps=2, **arguments)
    accelerate(pipe)
    assert largest_error(generate(pipe, steps=2, **arguments), stock) <= EXACT


@pytest.mark.parametrize("lengths", [(1, TEXT_TOKENS), (TEXT_TOKENS, TEXT_TOKENS), (2, 3)])
def test_equals_stock_at_the_ends_of_the_range_of_lengths(pipe: HunyuanVideoPipeline, lengths: tuple[int, int]) -> None:
    inputs = transformer_inputs(lengths=lengths)
    stock = forward(pipe.transformer, inputs)
    accelerate(pipe)
    assert largest_error(forward(pipe.transformer, inputs), stock) <= EXACT


def test_a_prompt_without_tokens_spoils_nothing(pipe: HunyuanVideoPipeline) -> None:
    """diffusers averages the text over its length: 0 / 0. Stock attention spreads that NaN, ours never reads it."""
    inputs = transformer_inputs(lengths=(0, 7))
    stock = forward(pipe.transformer, inputs)
    accelerate(pipe)
    ours = forward(pipe.transformer, inputs)
    assert ours.isfinite().all()
    assert largest_error(ours[1], stock[1]) <= EXACT


def test_one_key_too_many_would_show(pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance above is worth something: a length that is off by one exceeds it by far."""
    stock = generate(pipe)
    accelerate(pipe)
    monkeypatch.setattr(AttentionLengths, "begin", lambda self, mask: setattr(self, "of_text", mask.sum(1).int() + 1))
    assert largest_error(generate(pipe), stock) > 100 * EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_stock(dtype: torch.dtype) -> None:
    inputs = transformer_inputs()
    reference = forward(tiny_pipeline().transformer, inputs)
    half = tiny_pipeline(dtype=dtype)
    inputs = {name: value if name == "timestep" else value.to(dtype) for name, value in inputs.items()}
    stock = forward(half.transformer, inputs)
    accelerate(half)
    ours = forward(half.transformer, inputs)
    assert ours.dtype == dtype
    assert (ours - reference).norm() <= 1.1 * (stock - reference).norm()


# --- no mask, no padding --------------------------------------------------------------------------------------------


class BooleansInAttention(TorchDispatchMode):
    """Collects the shape of every boolean tensor that an operator inside an `Attention` module takes or gives."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        for module in transformer.modules():
            if type(module).__name__ == "Attention":
                module.register_forward_pre_hook(lambda *_: self._begin())
                module.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self.__enter__()

    def _end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.dtype == torch.bool:
                self.shapes.append(tuple(value.shape))
        return result


def test_no_mask_is_built_or_read_in_attention(pipe: HunyuanVideoPipeline) -> None:
    inputs = transformer_inputs()
    stock = BooleansInAttention(pipe.transformer)
    forward(pipe.transformer, inputs)
    assert (2, 1, TEXT_TOKENS, TEXT_TOKENS) in stock.shapes  # What is looked for can be seen.

    accelerated = tiny_pipeline()
    accelerate(accelerated)
    ours = BooleansInAttention(accelerated.transformer)
    forward(accelerated.transformer, inputs)
    assert ours.shapes == []


def test_the_refiners_square_mask_is_never_built(pipe: HunyuanVideoPipeline) -> None:
    masks = []
    block = pipe.transformer.context_embedder.token_refiner.refiner_blocks[0]
    block.register_forward_pre_hook(lambda module, args: masks.append(args[2]))
    forward(pipe.transformer, transformer_inputs())
    accelerate(pipe)
    forward(pipe.transformer, transformer_inputs())
    assert masks[0].shape == (2, 1, TEXT_TOKENS, TEXT_TOKENS)
    assert masks[1] is None


def test_padded_text_is_never_read(pipe: HunyuanVideoPipeline) -> None:
    """Whatever the refiner leaves in padded rows, NaN included, the video's bits are the same."""
    inputs = transformer_inputs()
    accelerate(pipe)
    clean = forward(pipe.transformer, inputs)

    def poison(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.masked_fill(inputs["encoder_attention_mask"][:, :, None] == 0, float("nan"))

    pipe.transformer.context_embedder.register_forward_hook(poison)
    assert torch.equal(forward(pipe.transformer, inputs), clean)


# --- the processor alone --------------------------------------------------------------------------------------------


def test_the_processor_alone_reads_each_mask_once(pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def spy(mask: Tensor) -> Tensor:
        shapes.append(tuple(mask.shape))
        return original(mask)

    original = attention_module._key_lengths
    monkeypatch.setattr(attention_module, "_key_lengths", spy)
    pipe.transformer.set_attn_processor(ParaAttnProcessor())
    inputs = transformer_inputs()
    forward(pipe.transformer, inputs)
    tokens = 3 * 3 * 2 + TEXT_TOKENS
    assert shapes == [(2, 1, TEXT_TOKENS, TEXT_TOKENS), (2, 1, 1, tokens)]
    forward(pipe.transformer, inputs)
    assert len(shapes) == 4  # New masks, new lengths.


def test_the_processor_alone_follows_each_call_and_pipe() -> None:
    """One processor object for two pipelines with different lengths in turn: nothing is carried over."""
    processor = ParaAttnProcessor()
    pipes = [tiny_pipeline(), tiny_pipeline(seed=1)]
    inputs = [transformer_inputs(lengths=(3, 20)), transformer_inputs(lengths=(17, 4))]
    stock = [forward(pipe.transformer, given) for pipe in pipes for given in inputs]
    for pipe in pipes:
        pipe.transformer.set_attn_processor(processor)
    ours = [forward(pipe.transformer, given) for pipe in pipes for given in inputs]
    assert max(largest_error(a, b) for a, b in zip(ours, stock, strict=True)) <= EXACT


def test_without_a_mask_every_token_counts(pipe: HunyuanVideoPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    block = pipe.transformer.transformer_blocks[0]
    video, text, temb = (torch.randn(2, *shape, generator=generator) for shape in [(18, 48), (5, 48), (48,)])
    with torch.no_grad():
        stock = block(video, text, temb)
        pipe.transformer.set_attn_processor(ParaAttnProcessor())
        ours = block(video, text, temb)
    assert max(largest_error(a, b) for a, b in zip(ours, stock, strict=True)) <= EXACT


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 23, dtype=torch.bool), torch.ones(2, 1, 1, 23), torch.ones(2, 3, 1, 23, dtype=torch.bool)]
)
def test_a_mask_of_another_kind_is_refused(pipe: HunyuanVideoPipeline, mask: Tensor) -> None:
    pipe.transformer.set_attn_processor(ParaAttnProcessor())
    block = pipe.transformer.transformer_blocks[0]
    message = r"attention_mask: got torch\.\w+ \(2, .*\), allowed is a boolean \(B, 1, 1, N\) or \(B, 1, S, S\)"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        block(torch.zeros(2, 18, 48), torch.zeros(2, 5, 48), torch.zeros(2, 48), mask)


# --- lengths belong to one forward ----------------------------------------------------------------------------------


def test_arguments_may_be_positional(pipe: HunyuanVideoPipeline) -> None:
    inputs = transformer_inputs()
    stock = forward(pipe.transformer, inputs)
    accelerate(pipe)
    with torch.no_grad():
        assert largest_error(pipe.transformer(*inputs.values()).sample, stock) <= EXACT


@pytest.mark.parametrize("failing", [False, True])
def test_a_block_called_by_itself_takes_its_own_mask(pipe: HunyuanVideoPipeline, failing: bool) -> None:
    """After a forward, also one that failed, its lengths are forgotten."""
    generator = torch.Generator().manual_seed(0)
    block = pipe.transformer.transformer_blocks[0]
    video, text, temb = (torch.randn(2, *shape, generator=generator) for shape in [(18, 48), (5, 48), (48,)])
    mask = (torch.arange(23)[None, :] < torch.tensor([[20], [22]]))[:, None, None, :]
    with torch.no_grad():
        stock = block(video, text, temb, mask)
    accelerate(pipe)
    if failing:
        hook = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(pipe.transformer, transformer_inputs())
        hook.remove()
    else:
        forward(pipe.transformer, transformer_inputs())
    with torch.no_grad():
        ours = block(video, text, temb, mask)
    rows = torch.arange(5)[None, :] < torch.tensor([[2], [4]])  # The text's padded rows are nobody's business.
    assert largest_error(ours[0], stock[0]) <= EXACT
    assert largest_error(ours[1][rows], stock[1][rows]) <= EXACT


def test_runs_in_inference_mode(pipe: HunyuanVideoPipeline) -> None:
    inputs = transformer_inputs()
    stock = forward(pipe.transformer, inputs)
    for install in (lambda: accelerate(pipe).remove, lambda: pipe.transformer.set_attn_processor(ParaAttnProcessor())):
        remove = install()
        with torch.inference_mode():
            ours = pipe.transformer(**inputs, return_dict=False)[0]
        assert largest_error(ours.clone(), stock) <= EXACT
        if remove is not None:
            remove()
