"""A HunyuanVideoPipeline with random weights that runs a step in milliseconds: the real classes, only small."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

WORDS = [
    "a",
    "handwritten",
    "digit",
    "two",
    "three",
    "moves",
    "to",
    "the",
    "left",
    "right",
    "up",
    "down",
    "slowly",
    "and",
    "back",
]
PROMPTS = [
    "a digit moves",
    "a handwritten three moves slowly to the left and back to the right",
    "two moves up and down and up and down",
]
NUM_BLOCKS = 5
HEADS = 3
HEAD_DIM = 16
TEXT_TOKENS = 24


def tiny_pipeline(seed: int = 0, dtype: torch.dtype = torch.float32, **transformer_config: Any) -> HunyuanVideoPipeline:
    """The pipeline with 2 dual-stream and 3 single-stream blocks, weights drawn from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = HunyuanVideoPipeline(
            text_encoder=_llama(),
            tokenizer=word_tokenizer(),  # type: ignore[arg-type]
            transformer=tiny_transformer(**transformer_config),
            vae=_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=_clip(),
            tokenizer_2=word_tokenizer(),  # type: ignore[arg-type]
        )
    if dtype != torch.float32:
        pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_transformer(**config: Any) -> HunyuanVideoTransformer3DModel:
    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": 2,
        "num_single_layers": 3,
        "num_refiner_layers": 2,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    transformer = HunyuanVideoTransformer3DModel(**(settings | config)).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm_q" in name or "norm_k" in name or "norm_added" in name:
                parameter.uniform_(1.0, 3.0)  # As drawn, attention would be nearly uniform and hide a wrong mask.
    return transformer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word between <s> and </s>, padded on the right."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[misc]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[misc]
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="right",
    )


def generate(pipe: HunyuanVideoPipeline, prompts: list[str] | None = None, steps: int = 4, **arguments: Any) -> Tensor:
    """Latents (B, 4, 3, 6, 4) of one call. Each sample's noise has a seed of its own, so that batches can be split."""
    prompts = PROMPTS if prompts is None else prompts
    settings: dict[str, Any] = {
        "prompt": prompts,
        "prompt_template": {"template": "{}", "crop_start": 0},
        "max_sequence_length": TEXT_TOKENS,
        "height": 48,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(len(prompt)) for prompt in prompts],
        "output_type": "latent",
    }
    output: Any = pipe(**(settings | arguments))
    return output.frames


def transformer_inputs(batch: int = 2, lengths: tuple[int, ...] = (5, 11), seed: int = 0) -> dict[str, Tensor]:
    """Random arguments for the transformer itself: (B, 4, 3, 6, 4) latents and text of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(TEXT_TOKENS)[None, :] < torch.tensor(lengths)[:, None]
    return {
        "hidden_states": torch.randn(batch, 4, 3, 6, 4, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 16, generator=generator),
        "encoder_attention_mask": mask.float(),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "guidance": torch.full((batch,), 6000.0),
    }


def _llama() -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    ).eval()


def _clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=8,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    ).eval()


def _vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),  # type: ignore[arg-type]  # annotated as a tuple of one
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
