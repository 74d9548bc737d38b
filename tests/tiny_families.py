"""Pipelines of every family with random weights, but HunyuanVideo's of tiny_hunyuan: the real pipeline and transformer
classes, only small.

They are called with embedded prompts and return latents, so they need no text encoders, and a VAE only for images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TEXT = 16  # channels of the text
POOLED = 8


@dataclass(frozen=True)
class Tiny:
    """How a family's pipeline is built and called.

    Attributes:
        pipeline, transformer: names of the classes.
        config: of the transformer.
        arguments: of the pipeline's constructor beside transformers, scheduler and parts.
        parts: other components of the pipeline: what makes each.
        components: what the pipeline calls its transformers.
        call: arguments of a call.
        tokens: of the text.
        masked: what the prompts' mask is called; "" for none.
        pooled: whether there are pooled prompts.
        guided: arguments of a call with classifier-free guidance, the others are without; None without such.
        scheduler: name of its class.
        frames: what the output is called.
        second: tokens of a second text, which has a mask, as `prompt_embeds_2`; 0 for none.
        image: which arguments of a call hold an image or its mask, (1, channels, height, width).
        image_each: whether there is an image for each prompt.
        picture: size of a PIL image as argument `image`; None for no such.
    """

    pipeline: str
    transformer: str
    config: dict[str, Any]
    arguments: dict[str, Any]
    call: dict[str, Any]
    tokens: int = 11
    masked: str = ""
    pooled: bool = False
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 4.0})
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    frames: str = "frames"
    second: int = 0
    image: dict[str, int] = field(default_factory=dict)
    image_each: bool = False
    picture: tuple[int, int] | None = None
    parts: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    components: tuple[str, ...] = ("transformer",)


def _vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=2, shift_factor=0.1
    ).eval()


def _wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def _hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def _hunyuan_15_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    ).eval()


def _cogvideox_vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def _flux_2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=2,
    ).eval()  # fmt: skip


def _guider(scale: float = 1.0) -> Any:
    return diffusers.ClassifierFreeGuidance(guidance_scale=scale)


def _vision_encoder() -> Any:
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return SiglipVisionModel(config).eval()


def _feature_extractor() -> Any:
    return SiglipImageProcessor(size={"height": 8, "width": 8})


def _image_encoder() -> Any:
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return CLIPVisionModel(config).eval()


def _image_processor() -> Any:
    return CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_rescale=False)


_FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "axes_dims_rope": (4, 6, 6),
}
_FLUX_2 = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT,
    "pooled_projection_dim": POOLED,
    "rope_axes_dim": (4, 6, 6),
}
_HUNYUAN_15 = {
    "in_channels": 9,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT,
    "text_embed_2_dim": TEXT,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
    "target_size": 64,
}
_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
_COGVIDEOX = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT,
    "num_layers": 3,
    "sample_width": 4,
    "sample_height": 6,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 11,
}
_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 48,
    "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 8,
}
_NO_TEXT = {"text_encoder": None, "tokenizer": None}
_NO_VAE = {"vae": None, **_NO_TEXT}
_NO_FLUX = {**_NO_VAE, "text_encoder_2": None, "tokenizer_2": None}
_NO_SD3 = {**_NO_FLUX, "text_encoder_3": None, "tokenizer_3": None}
_NO_HUNYUAN = {**_NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
_IMAGE = {"height": 64, "width": 48}
_VIDEO = {**_IMAGE, "num_frames": 9}
_WAN_CALL = {**_VIDEO, "guidance_scale": 1.0}
_SPLIT = {"true_cfg_scale": 3.0}

TINY = {
    "FLUX.1-dev": Tiny(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {**_FLUX, "guidance_embeds": True},
        _NO_FLUX,
        _IMAGE,
        pooled=True,
        guided=_SPLIT,
        frames="images",
    ),
    "FLUX.1-schnell": Tiny(
        "FluxPipeline", "FluxTransformer2DModel", _FLUX, _NO_FLUX, _IMAGE, pooled=True, guided=_SPLIT, frames="images"
    ),
    "FLUX.1-Kontext": Tiny(
        "FluxKontextPipeline",
        "FluxTransformer2DModel",
        {**_FLUX, "guidance_embeds": True},
        _NO_FLUX,
        {"height": 16, "width": 12, "max_area": 192, "_auto_resize": False},
        pooled=True,
        guided=_SPLIT,
        frames="images",
        image={"image": 3},
        parts={"vae": _vae},
    ),
    "FLUX.1-Fill": Tiny(
        "FluxFillPipeline",
        "FluxTransformer2DModel",
        {**_FLUX, "in_channels": 36, "out_channels": 16, "guidance_embeds": True},
        _NO_FLUX,
        {"height": 16, "width": 12},
        pooled=True,
        guided={},
        frames="images",
        image={"image": 3, "mask_image": 1},
        parts={"vae": _vae},
    ),
    "FLUX.2-dev": Tiny(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        _FLUX_2,
        _NO_TEXT,
        {"height": 32, "width": 24},
        guided={},
        frames="images",
        parts={"vae": _flux_2_vae},
    ),
    "FLUX.2-dev with an image": Tiny(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        _FLUX_2,
        _NO_TEXT,
        {"height": 32, "width": 24},
        guided={},
        frames="images",
        parts={"vae": _flux_2_vae},
        picture=(64, 64),
    ),
    "FLUX.2-klein": Tiny(
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        {**_FLUX_2, "guidance_embeds": False},
        _NO_TEXT,
        {"height": 32, "width": 24, "guidance_scale": 1.0},
        frames="images",
        parts={"vae": _flux_2_vae},
    ),
    "HunyuanVideo image to video, beside the latents": Tiny(
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "in_channels": 9, "image_condition_type": "latent_concat"},
        {**_NO_HUNYUAN, "image_processor": None},
        _VIDEO,
        masked="prompt_attention_mask",
        pooled=True,
        guided=_SPLIT,
        image={"image": 3},
        image_each=True,
        parts={"vae": _hunyuan_vae},
    ),
    "HunyuanVideo image to video, as the first frame": Tiny(
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "image_condition_type": "token_replace"},
        {**_NO_HUNYUAN, "image_processor": None},
        _VIDEO,
        masked="prompt_attention_mask",
        pooled=True,
        guided=_SPLIT,
        image={"image": 3},
        image_each=True,
        parts={"vae": _hunyuan_vae},
    ),
    "HunyuanVideo 1.5": Tiny(
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN_15,
        _NO_HUNYUAN,
        _VIDEO,
        masked="prompt_embeds_mask",
        second=7,
        guided={},
        parts={"vae": _hunyuan_15_vae, "guider": _guider},
    ),
    "HunyuanVideo 1.5 image to video": Tiny(
        "HunyuanVideo15ImageToVideoPipeline",
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN_15,
        _NO_HUNYUAN,
        {"num_frames": 9},
        masked="prompt_embeds_mask",
        second=7,
        guided={},
        parts={
            "vae": _hunyuan_15_vae,
            "guider": _guider,
            "image_encoder": _vision_encoder,
            "feature_extractor": _feature_extractor,
        },
        picture=(48, 64),
    ),
    "Wan 2.1": Tiny("WanPipeline", "WanTransformer3DModel", _WAN, _NO_VAE, _WAN_CALL),
    "Wan 2.1 image to video": Tiny(
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        {**_WAN, "in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 48},
        _NO_TEXT,
        _WAN_CALL,
        tokens=512,
        image={"image": 3},
        parts={"vae": _wan_vae, "image_encoder": _image_encoder, "image_processor": _image_processor},
    ),
    "Wan 2.1 first and last frame": Tiny(
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        {**_WAN, "in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 48, "pos_embed_seq_len": 10},
        _NO_TEXT,
        _WAN_CALL,
        tokens=512,
        image={"image": 3, "last_image": 3},
        parts={"vae": _wan_vae, "image_encoder": _image_encoder, "image_processor": _image_processor},
    ),
    "Wan 2.2 A14B": Tiny(
        "WanPipeline",
        "WanTransformer3DModel",
        _WAN,
        {**_NO_VAE, "boundary_ratio": 0.6},
        _WAN_CALL,
        guided={"guidance_scale": 4.0, "guidance_scale_2": 3.0},
        components=("transformer", "transformer_2"),
    ),
    "Wan 2.2 A14B image to video": Tiny(
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        {**_WAN, "in_channels": 36},
        {**_NO_TEXT, "boundary_ratio": 0.6},
        _WAN_CALL,
        image={"image": 3},
        parts={"vae": _wan_vae},
        components=("transformer", "transformer_2"),
    ),
    "Wan 2.2 5B": Tiny("WanPipeline", "WanTransformer3DModel", _WAN, {**_NO_VAE, "expand_timesteps": True}, _WAN_CALL),
    "Wan 2.2 5B image to video": Tiny(
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        _WAN,
        {**_NO_TEXT, "expand_timesteps": True},
        _WAN_CALL,
        image={"image": 3},
        parts={"vae": _wan_vae},
    ),
    "CogVideoX-2b": Tiny(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        _COGVIDEOX,
        _NO_VAE,
        {"height": 48, "width": 32, "num_frames": 9, "guidance_scale": 1.0},
        scheduler="CogVideoXDDIMScheduler",
    ),
    "CogVideoX-5b": Tiny(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {**_COGVIDEOX, "use_rotary_positional_embeddings": True},
        _NO_VAE,
        {"height": 48, "width": 32, "num_frames": 9, "guidance_scale": 1.0},
        scheduler="CogVideoXDDIMScheduler",
    ),
    "CogVideoX-5b image to video": Tiny(
        "CogVideoXImageToVideoPipeline",
        "CogVideoXTransformer3DModel",
        {
            **_COGVIDEOX,
            "in_channels": 8,
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
        },
        _NO_TEXT,
        {"height": 48, "width": 32, "num_frames": 9, "guidance_scale": 1.0},
        scheduler="CogVideoXDDIMScheduler",
        image={"image": 3},
        image_each=True,
        parts={"vae": _cogvideox_vae},
    ),
    "CogVideoX1.5-5b image to video": Tiny(
        "CogVideoXImageToVideoPipeline",
        "CogVideoXTransformer3DModel",
        {
            **_COGVIDEOX,
            "in_channels": 8,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "ofs_embed_dim": 8,
        },
        _NO_TEXT,
        {"height": 48, "width": 32, "num_frames": 9, "guidance_scale": 1.0},
        scheduler="CogVideoXDDIMScheduler",
        image={"image": 3},
        image_each=True,
        parts={"vae": _cogvideox_vae},
    ),
    "Mochi": Tiny(
        "MochiPipeline",
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "in_channels": 12,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "max_sequence_length": 11,
        },
        {**_NO_VAE, "force_zeros_for_empty_prompt": False},
        {**_IMAGE, "num_frames": 7, "guidance_scale": 1.0},
        masked="prompt_attention_mask",
    ),
    "Stable Diffusion 3": Tiny(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        _SD3,
        _NO_SD3,
        {**_IMAGE, "guidance_scale": 1.0},
        pooled=True,
        frames="images",
    ),
    "Stable Diffusion 3.5 medium": Tiny(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        _NO_SD3,
        {**_IMAGE, "guidance_scale": 1.0},
        pooled=True,
        frames="images",
    ),
}


# Some came with later versions of diffusers.
TINY = {name: tiny for name, tiny in TINY.items() if hasattr(diffusers, tiny.pipeline)}


def tiny_family(name: str) -> Any:
    """The pipeline, with weights that are the same every time."""
    tiny = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {component: _transformer(tiny) for component in tiny.components}
        parts = {part: make() for part, make in tiny.parts.items()}
        scheduler = getattr(diffusers, tiny.scheduler)()
        pipe = getattr(diffusers, tiny.pipeline)(**made, scheduler=scheduler, **tiny.arguments | parts)
    if hasattr(pipe, "vision_num_semantic_tokens"):
        pipe.vision_num_semantic_tokens = 4  # of 729: an image's tokens, which text to video pads
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _transformer(tiny: Tiny) -> Any:
    transformer = getattr(diffusers, tiny.transformer)(**tiny.config).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm_q" in name or "norm_k" in name or "norm_added" in name:
                parameter.uniform_(1.0, 3.0)  # As drawn, attention would be nearly uniform and hide mistakes.
    return transformer


def generate_family(
    name: str, pipe: Any, *, guided: bool = False, prompts: int = 2, steps: int = 4, **arguments: Any
) -> Tensor:
    """Latents of one call with different prompts, each with noise from a seed of its own."""
    tiny = TINY[name]
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(i) for i in range(prompts)],
        "output_type": "latent",
        **tiny.call,
        **_prompts(tiny, prompts, seed=1),
    }
    generator = torch.Generator().manual_seed(3)
    for argument, channels in tiny.image.items():
        shape = (prompts if tiny.image_each else 1, channels, tiny.call["height"], tiny.call["width"])
        settings[argument] = torch.rand(shape, generator=generator)
    if tiny.picture is not None:
        colours = torch.randint(256, (tiny.picture[1], tiny.picture[0], 3), generator=generator, dtype=torch.uint8)
        settings["image"] = Image.fromarray(colours.numpy())
    if "guider" in tiny.parts:
        pipe.guider = _guider(4.0 if guided else 1.0)
    if guided and (tiny.guided or "guider" in tiny.parts):
        negative = {f"negative_{key}": value for key, value in _prompts(tiny, prompts, seed=2).items()}
        settings |= tiny.guided | negative
    return pipe(**settings | arguments)[tiny.frames]


def _prompts(tiny: Tiny, prompts: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {"prompt_embeds": torch.randn(prompts, tiny.tokens, TEXT, generator=generator)}
    if tiny.pooled:
        made["pooled_prompt_embeds"] = torch.randn(prompts, POOLED, generator=generator)
    if tiny.masked:
        lengths = torch.tensor([5, 9, 11])[:prompts]
        made[tiny.masked] = torch.arange(tiny.tokens)[None] < lengths[:, None]
    if tiny.second:
        lengths = torch.tensor([3, 0, 7])[:prompts]
        made["prompt_embeds_2"] = torch.randn(prompts, tiny.second, TEXT, generator=generator)
        made["prompt_embeds_mask_2"] = torch.arange(tiny.second)[None] < lengths[:, None]
    return made
