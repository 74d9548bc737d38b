"""The CogVideoX-5b transformer that steps are measured with: random weights, the inputs of a step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from .step_model import with_random_weights

SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION = 8, 4

# Of CogVideoX-5b, where it differs from diffusers' defaults.
CONFIG = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
SMALL_CONFIG = CONFIG | {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "text_embed_dim": 64,
    "time_embed_dim": 32,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 16,
}


def build_transformer(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer with random weights."""
    return with_random_weights(CogVideoXTransformer3DModel, config, device, dtype)


def step_inputs(
    transformer: Any, height: int, width: int, frames: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments that the pipeline gives the transformer in one step, for one prompt without guidance."""
    config = transformer.config
    latent_frames = (frames - 1) // TEMPORAL_COMPRESSION + 1
    sides = height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION
    generator = torch.Generator(device).manual_seed(1)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    pipe = pipeline_around(transformer)
    return {
        "hidden_states": normal(1, latent_frames, config.in_channels, *sides),
        "encoder_hidden_states": normal(1, config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.full((1,), 500, device=device),
        "image_rotary_emb": pipe._prepare_rotary_positional_embeddings(height, width, latent_frames, device),
        "return_dict": False,
    }


def tokens(transformer: Any, inputs: dict[str, Any]) -> int:
    """Of the video and the text together."""
    _, frames, _, height, width = inputs["hidden_states"].shape
    patch = transformer.config.patch_size
    return frames * (height // patch) * (width // patch) + inputs["encoder_hidden_states"].shape[1]


def pipeline_around(transformer: Any) -> Any:
    """The pipeline around `transformer` alone, for `accelerate`."""
    make: Any = CogVideoXPipeline  # its annotations do not say that parts may be missing
    return make(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
    )
