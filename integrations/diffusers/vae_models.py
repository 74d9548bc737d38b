"""What differs between VAEs, as data, one row each, and between decoding and encoding. No other code knows a VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Frames = Callable[[int, int, bool], int]
"""From frames per latent, the number of latents, and whether they begin a tile, to how many frames a decoder makes."""


def first_alone(scale: int, latents: int, begins: bool) -> int:
    """The first latent makes one frame."""
    return scale * (latents - 1) + 1


def first_of_a_tile_alone(scale: int, latents: int, begins: bool) -> int:
    """The same, where a tile begins."""
    return first_alone(scale, latents, begins) if begins else scale * latents


def first_of_an_odd_number_alone(scale: int, latents: int, begins: bool) -> int:
    """The same, of an odd number of latents."""
    return first_alone(scale, latents, begins) if latents % 2 else scale * latents


def all_alike(scale: int, latents: int, begins: bool) -> int:
    """Every latent makes as many frames."""
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
        rounds_up: for every dimension (time, height, width; of pictures the last two), whether a sample size that its
            scale does not divide gives one latent more.
        frames: where the first dimension is time, how many a decoder makes; None for pictures.
        blends: names of the methods that blend two tiles and return the second one.
        settings: names of the attributes that decide about tiles; all ranks must agree on them.
        latent_channels: name of the config entry.
        memory: None where every tile is one call.
    """

    name: str
    scales: Callable[[Any], tuple[int, ...]]
    rounds_up: tuple[bool, ...]
    settings: tuple[str, ...]
    frames: Frames | None = None
    blends: tuple[str, ...] = ("blend_v", "blend_h")
    latent_channels: str = "latent_channels"
    memory: Memory | None = None

    def sample_size(self, vae: Any, latent: Sequence[int], begins: bool) -> tuple[int, ...]:
        """Sizes after the channels of what the decoder makes of a latent with the sizes `latent`."""
        scales = self.scales(vae)
        sizes = [size * scale for size, scale in zip(latent, scales, strict=True)]
        if self.frames is not None:
            sizes[0] = self.frames(scales[0], latent[0], begins)
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
        rounds_up=(True, True, True),
        frames=first_alone,
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
        rounds_up=(True, True, True),
        frames=first_alone,
        settings=("use_slicing", *_MIN, *_LATENT_MIN, "tile_overlap_factor"),
    ),
    VaeFamily(
        name="AutoencoderKLWan",
        # Of what is between patchify and unpatchify, where there are these.
        scales=lambda vae: (
            2 ** sum(vae.config.temperal_downsample),
            *[2 ** (len(vae.config.dim_mult) - 1)] * 2,
        ),
        frames=first_of_a_tile_alone,
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
        frames=first_of_an_odd_number_alone,
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
        rounds_up=(True, False, False),
        frames=all_alike,
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
