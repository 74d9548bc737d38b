"""The toy pipeline's modules: their settings, how they start, how a pipeline directory is written and read."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoResnetBlockCausal3D
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, LlamaTokenizerFast

if __package__:
    from .prompts import sample_prompts
    from .text import build_clip, build_clip_tokenizer, build_llama, build_llama_tokenizer
else:  # beside a script
    from prompts import sample_prompts
    from text import build_clip, build_clip_tokenizer, build_llama, build_llama_tokenizer

LATENT_CHANNELS = 16
TEXT_WIDTH = 64
SHIFT = 3.0
"""Timestep shift of the scheduler: the clip's content is settled early, at high noise, and gets more of the steps."""


def build_vae() -> AutoencoderKLHunyuanVideo:
    """A VAE of 8 x 8 x 4 compression with only 8 channels at full resolution, so that decoding is cheap.

    Three blocks with a spatial ratio of 8 make each of them halve the picture, the last one behind its own layers.
    """
    channels = (8, 24, 32)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * len(channels),
        up_block_types=("HunyuanVideoUpBlock3D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=False,
    )
    _start_vae(vae)
    return vae


def _start_vae(vae: AutoencoderKLHunyuanVideo) -> None:
    """Initial values under which the VAE learns from its first steps.

    Convolutions keep their input's scale and every residual branch starts at zero. The posterior starts narrow: at the
    usual start its noise is four times its mean, and nothing is learnt for hundreds of steps.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    for module in vae.modules():
        if isinstance(module, HunyuanVideoResnetBlockCausal3D):
            nn.init.zeros_(module.conv2.conv.weight)
            nn.init.zeros_(module.conv2.conv.bias)
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight.mul_(0.3)
    nn.init.zeros_(vae.quant_conv.weight[LATENT_CHANNELS:])
    assert vae.quant_conv.bias is not None
    nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -5.0)


def build_transformer() -> HunyuanVideoTransformer3DModel:
    """Two dual-stream and seven single-stream blocks, three heads of 64; every modulation starts as the identity."""
    model = HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=3,
        attention_head_dim=64,
        num_layers=2,
        num_single_layers=7,
        num_refiner_layers=2,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(16, 24, 24),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith(("norm.linear", "norm1.linear", "norm1_context.linear"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


@dataclass
class Parts:
    """The modules of a pipeline in the making."""

    vae: AutoencoderKLHunyuanVideo
    transformer: HunyuanVideoTransformer3DModel
    llama: LlamaModel
    clip: CLIPTextModel
    llama_tokenizer: LlamaTokenizerFast
    clip_tokenizer: CLIPTokenizer

    def to(self, device: torch.device) -> None:
        for module in (self.vae, self.transformer, self.llama, self.clip):
            module.to(device)

    def save(self, folder: Path) -> None:
        """Write the pipeline directory: VAE and transformer in float16, the text encoders in float32.

        The directory is written beside `folder` and then moved over it, so that a kill leaves the old one or the new.
        """
        pipe = HunyuanVideoPipeline(
            text_encoder=copy.deepcopy(self.llama).cpu().float(),
            tokenizer=self.llama_tokenizer,
            transformer=copy.deepcopy(self.transformer).cpu().half(),
            vae=copy.deepcopy(self.vae).cpu().half(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            text_encoder_2=copy.deepcopy(self.clip).cpu().float(),
            tokenizer_2=self.clip_tokenizer,
        )
        for module in (pipe.transformer, pipe.vae):
            module.register_to_config(_name_or_path="")  # not the folder that it was once read from
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        pipe.save_pretrained(fresh)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def new_parts(scratch: Path) -> Parts:
    """Untrained modules. The vocabularies are learnt from 20,000 training prompts."""
    corpus = sorted({text for _, text in sample_prompts(20_000, seed=0)})
    llama_tokenizer = build_llama_tokenizer(corpus, scratch / "tokenizer")
    clip_tokenizer = build_clip_tokenizer(corpus, scratch / "tokenizer_2")
    shutil.rmtree(scratch)
    return Parts(
        build_vae(),
        build_transformer(),
        build_llama(llama_tokenizer, TEXT_WIDTH),
        build_clip(clip_tokenizer, TEXT_WIDTH),
        llama_tokenizer,
        clip_tokenizer,
    )


def load_parts(folder: Path) -> Parts:
    """The modules of a saved pipeline, in float32."""
    pipe = HunyuanVideoPipeline.from_pretrained(folder)
    return Parts(pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.tokenizer, pipe.tokenizer_2)
