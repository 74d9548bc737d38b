"""What differs between VAEs, as data: one row each; and between decoding and encoding. No code here knows a VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

FirstFrame = Callable[[int, int, bool], int]
"""Frames that a decoder makes: of the frames per latent, the number of latents, and whether they begin a tile."""


def alone(scale: int, latents: int, begins: bool) -> int:
    """The first latent makes one frame."""
    return scale * (latents - 1) + 1


def alone_where_a_tile_begins(scale: int, latents: int, begins: bool) -> int:
    return alone(scale, latents, begins) if begins else scale * latents


def alone_among_an_odd_number(scale: int, latents: int, begins: bool) -> int:
    return alone(scale, latents, begins) if latents % 2 else scale * latents


def like_the_others(scale: int, latents: int, begins: bool) -> int:
    return scale * latents


@dataclass(frozen=True)
class Memory:
    """What a decoder or an encoder that is given a few frames at a time carries on to the next ones of the same tile.

    Attributes:
        argument: the one in which it is given.
        returned: whether it is returned, behind the result, and None begins a tile; else it is a list that is filled in
            place, a new one for each tile.
        counter: another argument, a list with a 0 in it, in which the module counts; None if there is none.
    """

    argument: str
    returned: bool
    counter: str | None = None


@dataclass(frozen=True)
class VaeFamily:
    """One row: how a VAE is recognised and what its tiled code needs to know.

    Attributes:
        name: class name; subclasses are recognised too.
        scales: samples per latent in every dimension after the channels.
        first_frame: where the first dimension is time, what its first latent makes; None for pictures.
        rounds_up: for every dimension, whether a sample size that its scale does not divide gives one latent more.
        blends: names of the methods that blend two tiles and return the second one.
        settings: names of the attributes that decide about tiles; all ranks must agree on them.
        latent_channels: name of the config entry.
        memory: None where every tile is one call.
    """

    name: str
    scales: Callable[[Any], tuple[int, ...]]
    settings: tuple[str, ...]
    first_frame: FirstFrame | None = None
    rounds_up: tuple[bool, ...] = (True, True, True)
    blends: tuple[str, ...] = ("blend_v", "blend_h")
    latent_channels: str = "latent_channels"
    memory: Memory | None = None

    def sample_size(self, vae: Any, latent: Sequence[int], begins: bool) -> tuple[int, ...]:
        """Sizes after the channels of what the decoder makes of a latent with the sizes `latent`."""
        scales = self.scales(vae)
        sizes = [size * scale for size, scale in zip(latent, scales, strict=True)]
        if self.first_frame is not None:
            sizes[0] = self.first_frame(scales[0], latent[0], begins)
        return tuple(sizes)

    def latent_size(self, vae: Any, sample: Sequence[int]) -> tuple[int, ...]:
        """Sizes after the channels of what the encoder makes of a sample with the sizes `sample`."""
        dimensions = zip(sample, self.scales(vae), self.rounds_up, strict=True)
        return tuple((size + (scale - 1 if up else 0)) // scale for size, scale, up in dimensions)


_PICTURE = VaeFamily(
    name="AutoencoderKL",
    scales=lambda vae: (2 ** (len(vae.config.block_out_channels) - 1),) * 2,
    rounds_up=(False, False),
    settings=("use_slicing", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"),
)
_MIN = ("tile_sample_min_height", "tile_sample_min_width")
_STRIDE = ("tile_sample_stride_height", "tile_sample_stride_width")
_LATENT_MIN = ("tile_latent_min_height", "tile_latent_min_width")
_FRAMES_AT_A_TIME = ("num_latent_frames_batch_size", "num_sample_frames_batch_size")
_FRAMEWISE = ("use_framewise_encoding", "use_framewise_decoding")

FAMILIES = (
    VaeFamily(
        name="AutoencoderKLHunyuanVideo",
        scales=lambda vae: (vae.temporal_compression_ratio, *[vae.spatial_compression_ratio] * 2),
        first_frame=alone,
        blends=("blend_v", "blend_h", "blend_t"),
        settings=(
            "use_slicing",
            *_FRAMEWISE,
            *_MIN,
            "tile_sample_min_num_frames",
            *_STRIDE,
            "tile_sample_stride_num_frames",
        ),
    ),
    VaeFamily(
        name="AutoencoderKLHunyuanVideo15",
        scales=lambda vae: (vae.temporal_compression_ratio, *[vae.spatial_compression_ratio] * 2),
        first_frame=alone,
        settings=("use_slicing", *_MIN, *_LATENT_MIN, "tile_overlap_factor"),
    ),
    VaeFamily(
        name="AutoencoderKLWan",
        # Of what is between patchify and unpatchify, where there are these.
        scales=lambda vae: (
            2 ** sum(vae.config.temperal_downsample),
            *[vae.spatial_compression_ratio // (vae.config.patch_size or 1)] * 2,
        ),
        first_frame=alone_where_a_tile_begins,
        rounds_up=(True, False, False),
        settings=("use_slicing", *_MIN, *_STRIDE),
        latent_channels="z_dim",
        memory=Memory("feat_cache", returned=False, counter="feat_idx"),
    ),
    VaeFamily(
        name="AutoencoderKLCogVideoX",
        scales=lambda vae: (
            int(vae.config.temporal_compression_ratio),
            *[2 ** (len(vae.config.block_out_channels) - 1)] * 2,
        ),
        first_frame=alone_among_an_odd_number,
        rounds_up=(True, False, False),
        settings=(
            "use_slicing",
            *_FRAMES_AT_A_TIME,
            *_MIN,
            *_LATENT_MIN,
            "tile_overlap_factor_height",
            "tile_overlap_factor_width",
        ),
        memory=Memory("conv_cache", returned=True),
    ),
    VaeFamily(
        name="AutoencoderKLMochi",
        scales=lambda vae: (vae.temporal_compression_ratio, *[vae.spatial_compression_ratio] * 2),
        first_frame=like_the_others,
        settings=("use_slicing", *_FRAMEWISE, *_FRAMES_AT_A_TIME, "drop_last_temporal_frames", *_MIN, *_STRIDE),
        memory=Memory("conv_cache", returned=True),
    ),
    _PICTURE,
    replace(_PICTURE, name="AutoencoderKLFlux2"),
)


@dataclass(frozen=True)
class Direction:
    """`decode` or `encode`, as a row.

    Attributes:
        name: of the method.
        argument: name of its tensor argument.
        chain: names of the submodules that a tile goes through, one after another; one of two may be None.
        carries: which of them has a memory, if the family's have one.
        made_shape: the shape of what the chain makes of a tensor of a given shape, which begins a tile or not.
    """

    name: str
    argument: str
    chain: tuple[str, ...]
    carries: str
    made_shape: Callable[[VaeFamily, Any, Sequence[int], bool], tuple[int, ...]]


DIRECTIONS = (
    Direction(
        name="decode",
        argument="z",
        chain=("post_quant_conv", "decoder"),
        carries="decoder",
        made_shape=lambda family, vae, shape, begins: (
            shape[0],
            vae.config.out_channels,
            *family.sample_size(vae, shape[2:], begins),
        ),
    ),
    Direction(
        name="encode",
        argument="x",
        chain=("encoder", "quant_conv"),
        carries="encoder",
        made_shape=lambda family, vae, shape, begins: (
            shape[0],
            2 * vae.config[family.latent_channels],
            *family.latent_size(vae, shape[2:]),
        ),
    ),
)
