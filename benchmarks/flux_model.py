"""The FLUX.1-dev transformer that steps are measured with: random weights, the inputs of a step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from .step_model import with_random_weights

TEXT_TOKENS = 512
PIXELS_PER_TOKEN = 16  # along each side: the VAE's 8, and patches of two

# Of FLUX.1-dev, where it differs from diffusers' defaults.
CONFIG = {"guidance_embeds": True}
SMALL_CONFIG = CONFIG | {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 14, 14),
}


def build_transformer(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer with random weights."""
    return with_random_weights(FluxTransformer2DModel, config, device, dtype)


def step_inputs(transformer: Any, height: int, width: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that the pipeline gives the transformer in one step, for one prompt. Drawn from one seed."""
    config = transformer.config
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    generator = torch.Generator(device).manual_seed(1)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    places = torch.zeros(rows, columns, 3, device=device, dtype=dtype)
    places[..., 1] += torch.arange(rows, device=device)[:, None]
    places[..., 2] += torch.arange(columns, device=device)[None, :]
    return {
        "hidden_states": normal(1, rows * columns, config.in_channels),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 3.5, device=device, dtype=torch.float32),
        "img_ids": places.reshape(-1, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device, dtype=dtype),
        "return_dict": False,
    }


def pipeline_around(transformer: Any) -> Any:
    """The pipeline around `transformer` alone, for `accelerate`."""
    make: Any = FluxPipeline  # its annotations do not say that parts may be missing
    return make(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
