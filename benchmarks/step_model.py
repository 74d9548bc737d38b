"""The HunyuanVideo transformer that steps are measured with: random weights, the inputs of a step, one forward."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from torch import Tensor

TEXT_TOKENS = 256
SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION = 8, 4

SMALL_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 64,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (4, 14, 14),
}


def build_transformer(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """The transformer with random weights, of diffusers' default configuration but for `config`."""
    return with_random_weights(HunyuanVideoTransformer3DModel, config, device, dtype)


def with_random_weights(kind: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A model of diffusers with random weights, made on `device`: nothing passes through the host."""
    with torch.device("meta"):
        transformer: Any = kind(**config)
    transformer = transformer.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            # Vectors are biases or the scales of normalisations.
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    assert not list(transformer.buffers()), "a buffer would be left without values"
    return transformer


def step_inputs(
    transformer: Any, height: int, width: int, frames: int, text: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The arguments that the pipeline gives the transformer in one step, for one prompt of `text` tokens.

    Drawn from one seed: on GPUs of one kind, the same on all of them.
    """
    config = transformer.config
    latent = (
        config.in_channels,
        (frames - 1) // TEMPORAL_COMPRESSION + 1,
        height // SPATIAL_COMPRESSION,
        width // SPATIAL_COMPRESSION,
    )
    mask = (torch.arange(TEXT_TOKENS, device=device) < text)[None].to(dtype)
    generator = torch.Generator(device).manual_seed(1)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    return {
        "hidden_states": normal(1, *latent),
        "timestep": torch.full((1,), 500.0, device=device),
        "encoder_hidden_states": normal(1, TEXT_TOKENS, config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype),
        "return_dict": False,
    }


def pipeline_around(transformer: Any) -> Any:
    """The pipeline around `transformer` alone, for `accelerate`."""
    make: Any = HunyuanVideoPipeline  # its annotations do not say that parts may be missing
    return make(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def timed_forward(transformer: Any, inputs: dict[str, Any], device: torch.device) -> tuple[float, float, Tensor]:
    """(seconds, peak GiB, output on the host) of one forward."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = forward(transformer, inputs)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0
    return seconds, peak, result.float().cpu()


def forward(transformer: Any, inputs: dict[str, Any]) -> Tensor:
    """What the transformer makes of `inputs`."""
    with torch.no_grad(), transformer.cache_context("cond"):
        return transformer(**inputs)[0]


def video_tokens(transformer: Any, inputs: dict[str, Any]) -> int:
    """How many tokens the transformer makes of the latents."""
    _, _, frames, height, width = inputs["hidden_states"].shape
    config = transformer.config
    return frames // config.patch_size_t * (height // config.patch_size) * (width // config.patch_size)
