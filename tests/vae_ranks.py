"""Parallel VAE in the ranks: tiny VAEs, the cases, and what each process of a launch does and finds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from para_kernels.integrations.diffusers import parallelize_vae
from para_kernels.parallel import RankFailure

LOST_AFTER = 3.0  # seconds


def video_vae(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """2 x 2 pixels and 4 frames to a latent, tiles of 16 x 16 pixels and 9 frames with strides of 12 and 6."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 3,
            up_block_types=("HunyuanVideoUpBlock3D",) * 3,
            block_out_channels=(4, 4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            spatial_compression_ratio=2,
        )
    vae.tile_sample_min_height = vae.tile_sample_min_width = 16
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 12
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 8, 4
    return vae.eval().requires_grad_(False).to(dtype)


def image_vae(dtype: torch.dtype = torch.float32, quant_convs: bool = True) -> Any:
    """4 x 4 pixels to a latent, tiles of 32 x 32 pixels with a stride of 24."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 4, 8),
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
            use_quant_conv=quant_convs,
            use_post_quant_conv=quant_convs,
        )
    return vae.eval().requires_grad_(False).to(dtype)


def wan_vae(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """8 x 8 pixels and 4 frames to a latent, tiles of 32 x 32 pixels with strides of 24."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        vae = diffusers.AutoencoderKLWan(**(small | config))
    return small_tiles(vae, dtype, _sample_min=32, _sample_stride=24)


def wan_5b_vae(dtype: torch.dtype = torch.float32) -> Any:
    """16 x 16 pixels to a latent, of which the VAE itself is given patches of 2 x 2 as channels."""
    pixels = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    return wan_vae(dtype, base_dim=4, decoder_base_dim=8, is_residual=True, **pixels)


def small_wan_vae(dtype: torch.dtype = torch.float32) -> Any:
    """4 x 4 pixels to a latent, while tiles are cut as if it were 8 x 8: as many latents, half as many pixels."""
    return wan_vae(dtype, dim_mult=[1, 1, 1], temperal_downsample=[True, True])


def cogvideox_vae(dtype: torch.dtype = torch.float32) -> Any:
    """8 x 8 pixels and 4 frames to a latent, tiles of 32 x 32 pixels with strides of 24, and two latents at a time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
    vae.tile_overlap_factor_height = vae.tile_overlap_factor_width = 0.25
    return small_tiles(vae, dtype, _sample_min=32, _latent_min=4)


def mochi_vae(dtype: torch.dtype = torch.float32) -> Any:
    """8 x 8 pixels and 6 frames to a latent, tiles of 32 x 32 pixels with strides of 24."""
    channels = (32, 32, 32, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            latent_channels=4,
            layers_per_block=(1, 1, 1, 1, 1),
            add_attention_block=(False,) * 5,
        )
    return small_tiles(vae, dtype, _sample_min=32, _sample_stride=24)


def hunyuan_15_vae(dtype: torch.dtype = torch.float32) -> Any:
    """16 x 16 pixels and 4 frames to a latent, tiles of 64 x 64 pixels with strides of 48."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
        )
    return small_tiles(vae, dtype, _sample_min=64, _latent_min=4)


def flux_2_vae(dtype: torch.dtype = torch.float32) -> Any:
    """4 x 4 pixels to a latent, tiles of 32 x 32 pixels with a stride of 24."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 4, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=32,
        )
    return vae.eval().requires_grad_(False).to(dtype)


def small_tiles(vae: Any, dtype: torch.dtype, **sizes: int) -> Any:
    """With settings `tile_sample_min_height` and the like of these sizes."""
    for name, size in sizes.items():
        for side in ("height", "width"):
            assert hasattr(vae, f"tile{name}_{side}")
            setattr(vae, f"tile{name}_{side}", size)
    return vae.eval().requires_grad_(False).to(dtype)


@dataclass(frozen=True)
class Case:
    """One call: of which VAE, in which direction, of what shape, and how it is set."""

    make: Callable[..., Any]
    direction: str
    shape: tuple[int, ...]
    tiles: int  # counted by hand
    dtype: torch.dtype = torch.float32
    settings: dict[str, Any] = field(default_factory=dict)
    autocast: bool = False

    def inputs(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).to(self.dtype)

    def run(self, vae: Any) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            output = getattr(vae, self.direction)(self.inputs())
        return output.sample if self.direction == "decode" else output.latent_dist.parameters

    def alone(self) -> Tensor:
        vae = self.set_up()
        vae.enable_tiling()
        return self.run(vae)

    def set_up(self) -> Any:
        vae = self.make(self.dtype)
        for name, value in self.settings.items():
            setattr(vae, name, value)
        return vae


def image_vae_without_quant_convs(dtype: torch.dtype) -> Any:
    return image_vae(dtype, quant_convs=False)


BF16 = torch.bfloat16
CASES = {
    "video": Case(video_vae, "decode", (1, 4, 5, 14, 20), 5 * 3 * 4),
    "video, odd sizes": Case(video_vae, "decode", (1, 4, 4, 11, 9), 4 * 2 * 2),
    "video, bf16": Case(video_vae, "decode", (1, 4, 4, 9, 13), 4 * 2 * 3, BF16),
    "video, autocast": Case(video_vae, "decode", (1, 4, 4, 9, 6), 4 * 2 * 1, autocast=True),
    "video, slices": Case(video_vae, "decode", (2, 4, 1, 9, 13), 2 * 2 * 3, settings={"use_slicing": True}),
    "video, batch": Case(video_vae, "decode", (2, 4, 1, 9, 13), 2 * 3),
    "video, frames only": Case(video_vae, "decode", (1, 4, 5, 8, 8), 5),
    "video, tiling on": Case(video_vae, "decode", (1, 4, 1, 9, 7), 2 * 2, settings={"use_tiling": True}),
    "video, no frames": Case(video_vae, "decode", (1, 4, 4, 9, 7), 2 * 2, settings={"use_framewise_decoding": False}),
    "video, one tile": Case(video_vae, "decode", (1, 4, 1, 8, 8), 1),
    "video, two tiles": Case(video_vae, "decode", (1, 4, 1, 9, 4), 2 * 1),
    "encode video": Case(video_vae, "encode", (1, 3, 13, 29, 26), 4 * 3 * 3),
    "encode video, bf16": Case(video_vae, "encode", (1, 3, 11, 17, 20), 3 * 2 * 2, BF16),
    "encode video, one tile": Case(video_vae, "encode", (1, 3, 5, 15, 16), 1),
    "encode video, slices": Case(video_vae, "encode", (2, 3, 1, 20, 17), 2 * 2 * 2, settings={"use_slicing": True}),
    "image": Case(image_vae, "decode", (2, 4, 19, 22), 4 * 4),
    "image, bf16": Case(image_vae, "decode", (1, 4, 13, 9), 3 * 2, BF16),
    "image, no quant_conv": Case(image_vae_without_quant_convs, "decode", (1, 4, 9, 8), 2 * 2),
    "image, one tile": Case(image_vae, "decode", (1, 4, 7, 8), 1),
    "encode image": Case(image_vae, "encode", (1, 3, 57, 70), 3 * 3),
    "encode image, no quant_conv": Case(image_vae_without_quant_convs, "encode", (1, 3, 40, 33), 2 * 2),
    "encode image, slices": Case(image_vae, "encode", (3, 3, 36, 32), 3 * 2 * 2, settings={"use_slicing": True}),
    "Wan": Case(wan_vae, "decode", (1, 4, 3, 7, 8), 3 * 3),
    "Wan, bf16, batch": Case(wan_vae, "decode", (2, 4, 2, 4, 5), 2 * 2, BF16),
    "Wan, slices": Case(wan_vae, "decode", (2, 4, 2, 4, 5), 2 * 2 * 2, settings={"use_slicing": True}),
    "Wan, autocast": Case(wan_vae, "decode", (1, 4, 2, 4, 5), 2 * 2, autocast=True),
    "Wan, 4 x 4 pixels": Case(small_wan_vae, "decode", (1, 4, 2, 9, 7), 3 * 3),
    "Wan, one tile": Case(wan_vae, "decode", (1, 4, 3, 4, 4), 1),
    "encode Wan": Case(wan_vae, "encode", (1, 3, 9, 56, 40), 3 * 2),
    "encode Wan, one tile": Case(wan_vae, "encode", (1, 3, 5, 32, 32), 1),
    "Wan 2.2 5B": Case(wan_5b_vae, "decode", (1, 4, 2, 3, 5), 3 * 5),
    "encode Wan 2.2 5B": Case(wan_5b_vae, "encode", (1, 3, 5, 48, 80), 1 * 2),
    "CogVideoX": Case(cogvideox_vae, "decode", (1, 4, 5, 7, 5), 3 * 2),
    "CogVideoX, even": Case(cogvideox_vae, "decode", (1, 4, 4, 4, 5), 2 * 2),
    "CogVideoX, three at a time": Case(
        cogvideox_vae, "decode", (1, 4, 7, 4, 5), 2 * 2, settings={"num_latent_frames_batch_size": 3}
    ),
    "CogVideoX, one frame": Case(cogvideox_vae, "decode", (1, 4, 1, 4, 5), 2 * 2),
    "CogVideoX, one tile": Case(cogvideox_vae, "decode", (1, 4, 5, 4, 4), 1),
    "encode CogVideoX": Case(cogvideox_vae, "encode", (1, 3, 17, 40, 56), 2 * 3),
    "Mochi": Case(mochi_vae, "decode", (1, 4, 3, 5, 7), 2 * 3),
    "Mochi, framewise": Case(mochi_vae, "decode", (1, 4, 3, 5, 7), 2 * 3, settings={"use_framewise_decoding": True}),
    "encode Mochi": Case(mochi_vae, "encode", (1, 3, 7, 40, 56), 2 * 3),
    "encode Mochi, odd sizes": Case(mochi_vae, "encode", (1, 3, 9, 44, 36), 2 * 2),
} | (
    {
        "HunyuanVideo 1.5": Case(hunyuan_15_vae, "decode", (1, 4, 3, 7, 5), 3 * 2),
        "encode HunyuanVideo 1.5": Case(hunyuan_15_vae, "encode", (1, 3, 5, 112, 80), 3 * 2),
    }
    if hasattr(diffusers, "AutoencoderKLHunyuanVideo15")
    else {}
) | (
    {
        "FLUX.2": Case(flux_2_vae, "decode", (1, 4, 13, 9), 3 * 2),
        "encode FLUX.2": Case(flux_2_vae, "encode", (1, 3, 57, 40), 3 * 2),
    }
    if hasattr(diffusers, "AutoencoderKLFlux2")
    else {}
)  # fmt: skip


def rank_main(rank: int, world: int, port: int, folder: Path) -> None:
    """What each process of a launch does: every case, then what is no case; of four, one dies. Findings go to files."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world) if world == 3 else None
    address = {} if store else {"init_method": f"tcp://127.0.0.1:{port}"}
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=60), **address)
    if world == 4:
        dead_rank(rank, folder)
    else:
        found: dict[str, Any] = {name: run_case(case) for name, case in CASES.items()}
        found |= {special.__name__: special(rank, world) for special in SPECIALS}
        (folder / f"{rank}.json").write_text(json.dumps(found))
    # Rank 0 may keep the store of all. No barrier: after a failure the group is of no use.
    end = distributed_c10d._get_default_store()
    end.set(f"end/{rank}", "")
    if rank == 0:
        end.wait([f"end/{other}" for other in range(world) if (other, world) != (1, 4)], timedelta(seconds=30))
    os._exit(0)  # the group's destructor might wait for a rank that is gone


def run_case(case: Case) -> dict[str, Any]:
    vae = case.set_up()
    before = attributes(vae)
    handle = parallelize_vae(vae)
    together = digest(case.run(vae))
    work = handle.work()
    use_tiling = vae.use_tiling
    handle.remove()
    return {
        "together": together,
        "alone": digest(case.alone()) if dist.get_rank() == 0 else None,
        "tiles": [row.tiles for row in work],
        "seconds": [row.seconds for row in work],
        "tiling kept": use_tiling == case.settings.get("use_tiling", False),
        "untouched": list(attributes(vae)) == list(before)
        and all(vae.__dict__[name] is before[name] for name in before),
    }


def attributes(vae: Any) -> dict[str, Any]:
    """But those that Wan's own code sets in every call."""
    own = ("_conv_num", "_conv_idx", "_feat_map", "_enc_conv_num", "_enc_conv_idx", "_enc_feat_map")
    return {name: value for name, value in vae.__dict__.items() if name not in own}


def digest(tensor: Tensor) -> str:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data).hexdigest()}"


SMALL = CASES["video, tiling on"]


def message(call: Callable[[], object], error: type[Exception] = ValueError) -> str:
    try:
        call()
    except error as raised:
        return str(raised)
    return "nothing was raised"


def different_shapes(rank: int, world: int) -> str:
    vae = video_vae()
    parallelize_vae(vae)
    frames = 2 if rank == world - 1 else 1
    return message(lambda: vae.decode(torch.zeros(1, 4, frames, 9, 9)))


def different_values(rank: int, world: int) -> str:
    vae = video_vae()
    parallelize_vae(vae)
    latents = torch.ones(1, 4, 1, 9, 9)
    latents[0, 0, 0, 0, 0] += rank == 1
    return message(lambda: vae.decode(latents))


def different_dtypes(rank: int, world: int) -> str:
    dtype = BF16 if rank == 0 else torch.float32
    vae = video_vae(dtype)
    parallelize_vae(vae)
    return message(lambda: vae.decode(torch.zeros(1, 4, 1, 9, 9, dtype=dtype)))


def different_settings(rank: int, world: int) -> str:
    vae = video_vae()
    parallelize_vae(vae)
    vae.tile_sample_stride_width = 12 if rank else 8
    return message(lambda: vae.decode(torch.zeros(1, 4, 1, 9, 9)))


def different_weights(rank: int, world: int) -> str:
    vae = video_vae(seed=rank == 1)
    parallelize_vae(vae)
    return message(lambda: vae.decode(torch.zeros(1, 4, 1, 9, 9)))


def different_methods(rank: int, world: int) -> str:
    vae = video_vae()
    parallelize_vae(vae)
    return message(lambda: vae.encode(torch.zeros(1, 3, 1, 8, 8)) if rank else vae.decode(torch.zeros(1, 4, 1, 8, 8)))


def works_after_a_mistake(rank: int, world: int) -> bool:
    vae = SMALL.set_up()
    parallelize_vae(vae)
    message(lambda: vae.decode(torch.zeros(1, 4, 1, 9, 9 + rank)))
    return torch.equal(SMALL.run(vae), SMALL.alone())


def one_rank_fails(rank: int, world: int) -> str:
    """The first rank's decoder breaks on its first tile: it raises its own error, the others hear of it at once."""
    vae = video_vae()
    parallelize_vae(vae, mesh=dist.new_group())
    if rank == 0:
        vae.decoder.forward = broken
    own = MemoryError if rank == 0 else RankFailure
    text = message(lambda: vae.decode(torch.zeros(1, 4, 1, 9, 9)), own)
    assert type(vae.decoder).__name__ == "HunyuanVideoDecoder3D"
    assert vae.use_tiling is False
    return text


def one_rank_never_arrives(rank: int, world: int) -> str:
    vae = video_vae()
    parallelize_vae(vae, mesh=dist.new_group(), timeout=1.0)
    if rank == 0:
        return ""
    return message(lambda: vae.decode(torch.zeros(1, 4, 1, 9, 9)), RankFailure)


def broken(*args: object) -> None:
    raise MemoryError("no room")


def re_tuned(rank: int, world: int) -> list[Any]:
    """Called again: the same handle, and now on a mesh of the first two ranks, the others on one of their own."""
    vae = SMALL.set_up()
    handle = parallelize_vae(vae)
    first = handle.ranks
    members = [range(2), range(2, world)]
    groups = [dist.new_group(list(ranks)) for ranks in members if len(ranks)]
    again = parallelize_vae(vae, mesh=groups[rank // 2], timeout=20.0)
    equal = torch.equal(SMALL.run(vae), SMALL.alone())
    handle.remove()
    return [first, again is handle, tuple(members[rank // 2]) == again.ranks or again.ranks == (), equal]


def device_mesh(rank: int, world: int) -> list[Any]:
    vae = SMALL.set_up()
    handle = parallelize_vae(vae, mesh=init_device_mesh("cpu", (world,)))
    flat = message(lambda: parallelize_vae(vae, mesh=init_device_mesh("cpu", (1, world))))
    return [torch.equal(SMALL.run(vae), SMALL.alone()), handle.summary(), flat]


def not_a_member(rank: int, world: int) -> str:
    group = dist.new_group([0])
    return message(lambda: parallelize_vae(video_vae(), mesh=group)) if rank else "member"


def requires_grad(rank: int, world: int) -> str:
    vae = video_vae()
    parallelize_vae(vae)
    return message(lambda: vae.decode(torch.zeros(1, 4, 1, 9, 9, requires_grad=True)))


def one_rank_is_wrong(rank: int, world: int) -> str:
    vae = video_vae()
    parallelize_vae(vae)
    given: Any = "latents" if rank == 1 else torch.zeros(1, 4, 1, 9, 9)
    return message(lambda: vae.decode(given))


def both_ways(rank: int, world: int) -> bool:
    """`forward` is encode and decode in a row, with one rank late."""
    vae, sample = video_vae(), torch.randn(1, 3, 9, 20, 17, generator=torch.Generator().manual_seed(2))
    parallelize_vae(vae)
    together = vae(sample).sample
    alone = video_vae()
    alone.enable_tiling()
    return torch.equal(together, alone(sample).sample)


SPECIALS = [
    different_shapes,
    different_values,
    different_dtypes,
    different_settings,
    different_weights,
    different_methods,
    works_after_a_mistake,
    re_tuned,
    device_mesh,
    not_a_member,
    requires_grad,
    both_ways,
    one_rank_is_wrong,
    one_rank_fails,
    one_rank_never_arrives,
]


def dead_rank(rank: int, folder: Path) -> None:
    """Rank 1 of 4 dies without a word on its first tile. The others must end with its name."""
    vae = CASES["video"].set_up()
    parallelize_vae(vae, timeout=LOST_AFTER)
    if rank == 1:
        vae.decoder.forward = lambda *_: os._exit(1)
    text = message(lambda: CASES["video"].run(vae), RankFailure)
    (folder / f"{rank}-last.txt").write_text(text)
