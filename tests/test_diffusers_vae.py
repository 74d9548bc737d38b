"""Parallel VAE: real processes must give, bit for bit, what diffusers' own tiling gives in one.

One launch per world size runs all cases; what it found, per rank and case, is then looked at by the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from para_kernels.integrations.diffusers import parallelize_vae
from para_kernels.integrations.diffusers.peers import PeerError
from para_kernels.integrations.diffusers.tile_exchange import TILES_PER_ROUND, assign, rounds
from para_kernels.integrations.diffusers.vae import ParallelVae, checksum

WORLDS = (2, 3, 4)
LOST_AFTER = 3.0  # seconds
pytestmark = pytest.mark.usefixtures("one_thread")


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
}  # fmt: skip


# --- in the ranks -----------------------------------------------------------------------------------------------------


def rank_main(rank: int, world: int, folder: Path) -> None:
    """What each process of a launch does: every case, then what is no case; the findings go to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world) if world == 3 else None
    address = {} if store else {"init_method": f"tcp://127.0.0.1:{os.environ['PORT']}"}
    dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=60), **address)
    found: dict[str, Any] = {name: run_case(case) for name, case in CASES.items()}
    for special in SPECIALS:
        found[special.__name__] = special(rank, world)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if world == 4:
        last_call(rank, folder)
    dist.barrier() if world < 4 else None
    os._exit(0)  # rank 1 of 4 is gone, which a destructor of the group might wait for


def run_case(case: Case) -> dict[str, Any]:
    vae, before = case.set_up(), None
    before = dict(vae.__dict__)
    handle = parallelize_vae(vae)
    output, again = case.run(vae), case.run(vae)
    alone = case.alone()
    work = handle.work()
    use_tiling = vae.use_tiling
    handle.remove()
    return {
        "equal": output.dtype == alone.dtype and torch.equal(output, alone),
        "equal again": torch.equal(again, alone),
        "tiles": [row.tiles for row in work],
        "seconds": [row.seconds for row in work],
        "tiling kept": use_tiling == case.settings.get("use_tiling", False),
        "untouched": list(vae.__dict__) == list(before) and all(vae.__dict__[name] is before[name] for name in before),
    }


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
    parallelize_vae(vae)
    if rank == 0:
        vae.decoder.forward = broken
    own = MemoryError if rank == 0 else PeerError
    text = message(lambda: vae.decode(torch.zeros(1, 4, 1, 9, 9)), own)
    assert not isinstance(vae.decoder.__dict__.get("forward"), type(None)) or rank != 0
    assert type(vae.decoder).__name__ == "HunyuanVideoDecoder3D" and vae.use_tiling is False
    return text


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
    one_rank_fails,
]


def last_call(rank: int, folder: Path) -> None:
    """Rank 1 of 4 dies without a word on its first tile. The others must end with its name."""
    vae = CASES["video"].set_up()
    parallelize_vae(vae, timeout=LOST_AFTER)
    if rank == 1:
        vae.decoder.forward = lambda *_: os._exit(1)
    text = message(lambda: CASES["video"].run(vae), PeerError)
    missing = message(lambda: CASES["video"].run(vae), PeerError)  # the dead rank does not come to the next call
    (folder / f"{rank}-last.json").write_text(json.dumps([text, missing]))


# --- launching --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=WORLDS)
def launched(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The findings of every rank of a launch."""
    return launch(request.param)[0]


_launches: dict[int, tuple[list[dict[str, Any]], Path]] = {}


def launch(world: int) -> tuple[list[dict[str, Any]], Path]:
    if world not in _launches:
        folder = Path(tempfile.mkdtemp(prefix="parallel-vae-"))
        environment = os.environ | {"PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        processes = [
            subprocess.Popen([*command, str(rank), str(world), str(folder)], env=environment, stderr=subprocess.PIPE)
            for rank in range(world)
        ]
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
        found = [folder / f"{rank}.json" for rank in range(world)]
        assert all(path.is_file() for path in found), "\n".join(errors)
        _launches[world] = [json.loads(path.read_text()) for path in found], folder
    return _launches[world]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_equals_tiling_in_one_process(launched: list[dict[str, Any]], name: str) -> None:
    for found in launched:
        assert found[name]["equal"]
        assert found[name]["equal again"]


@pytest.mark.parametrize("name", CASES)
def test_tiles_are_shared_out(launched: list[dict[str, Any]], name: str) -> None:
    world, count = len(launched), CASES[name].tiles
    for found in launched:
        tiles = found[name]["tiles"]
        assert found[name]["tiles"] == launched[0][name]["tiles"]
        assert sum(tiles) == count
        assert sum(number > 0 for number in tiles) == min(world, count)
        assert all((seconds > 0) == (number > 0) for seconds, number in zip(found[name]["seconds"], tiles, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind(launched: list[dict[str, Any]], name: str) -> None:
    for found in launched:
        assert found[name]["tiling kept"]
        assert found[name]["untouched"]


@pytest.mark.parametrize(
    ("special", "words"),
    [
        ("different_shapes", ["z: ", "shape of z", "rank {last} has [1, 4, 2, 9, 9]"]),
        ("different_values", ["z: ", "checksum of z", "rank 1 has"]),
        ("different_dtypes", ["z: ", "dtype of z", "bfloat16", "float32"]),
        ("different_settings", ["vae.tile_sample_stride_width", "8", "12"]),
        ("different_weights", ["checksum of the weights", "rank 1 has"]),
        ("different_methods", ["method", "encode", "decode"]),
        ("requires_grad", ["z: requires grad"]),
    ],
)
def test_different_ranks_are_found_out(launched: list[dict[str, Any]], special: str, words: list[str]) -> None:
    for found in launched:
        for word in words:
            assert word.format(last=len(launched) - 1) in found[special]


def test_a_mistake_can_be_mended(launched: list[dict[str, Any]]) -> None:
    assert all(found["works_after_a_mistake"] for found in launched)


def test_a_failing_rank_tells_the_others(launched: list[dict[str, Any]]) -> None:
    first, *others = launched
    assert first["one_rank_fails"] == "no room"
    assert all("rank 0 gave up: MemoryError: no room" in found["one_rank_fails"] for found in others)


def test_calling_again_re_tunes(launched: list[dict[str, Any]]) -> None:
    for found in launched:
        assert found["re_tuned"] == [list(range(len(launched))), True, True, True]


def test_device_mesh(launched: list[dict[str, Any]]) -> None:
    for found in launched:
        equal, summary, flat = found["device_mesh"]
        assert equal
        assert f"tiles on {len(launched)} rank(s)" in summary
        assert "mesh: got 2 dimensions, must be 1" in flat


def test_ranks_outside_the_group(launched: list[dict[str, Any]]) -> None:
    member, *others = launched
    assert member["not_a_member"] == "member"
    assert all(found["not_a_member"].startswith("mesh: got") for found in others)


def test_encode_and_decode_in_a_row(launched: list[dict[str, Any]]) -> None:
    assert all(found["both_ways"] for found in launched)


def test_a_dead_rank_ends_the_others() -> None:
    _, folder = launch(4)
    for rank in (0, 2, 3):
        during, after = json.loads((folder / f"{rank}-last.json").read_text())
        assert "rank 1" in during
        assert "rank 1" in after
    assert not (folder / "1-last.json").exists()


# --- in one process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="mesh: got None, but torch.distributed is not initialized"):
        parallelize_vae(video_vae())


@pytest.mark.usefixtures("group_of_one")
class TestAlone:
    def test_one_rank(self) -> None:
        for case in (CASES["video"], CASES["encode image"]):
            vae = case.set_up()
            handle = parallelize_vae(vae)
            assert torch.equal(case.run(vae), case.alone())
            assert [row.tiles for row in handle.work()] == [case.tiles]

    def test_work_before_a_call(self) -> None:
        handle = parallelize_vae(video_vae())
        assert handle.work() == ()
        assert handle.summary() == "AutoencoderKLHunyuanVideo, tiles on 1 rank(s)"

    def test_remove_twice(self) -> None:
        vae = video_vae()
        handle = parallelize_vae(vae)
        handle.remove()
        handle.remove()
        assert not handle.installed
        assert ParallelVae.on(vae) is None
        assert handle.summary() == "removed"
        assert parallelize_vae(vae) is not handle

    def test_wrapped_by_somebody_else_and_removed(self) -> None:
        vae = SMALL.set_up()
        handle = parallelize_vae(vae)
        ours = vae.decode
        vae.decode = theirs = lambda z: ours(z)
        handle.remove()
        assert vae.decode is theirs
        assert torch.equal(SMALL.run(vae), SMALL.alone())

    def test_other_instances_are_not_touched(self) -> None:
        vae, other = video_vae(), video_vae()
        parallelize_vae(vae)
        assert "decode" not in other.__dict__
        assert ParallelVae.on(other) is None

    def test_compiled_vae_is_unwrapped(self) -> None:
        vae = SMALL.set_up()
        assert parallelize_vae(torch.compile(vae)).vae is vae

    def test_weights_offloaded_by_accelerate(self) -> None:
        from accelerate import cpu_offload

        vae = SMALL.set_up()
        cpu_offload(vae, execution_device=torch.device("cpu"))
        parallelize_vae(vae)
        assert torch.equal(SMALL.run(vae), SMALL.alone())

    def test_result_forms(self) -> None:
        vae = SMALL.set_up()
        parallelize_vae(vae)
        (sample,) = vae.decode(SMALL.inputs(), return_dict=False)
        assert torch.equal(sample, SMALL.alone())
        assert torch.equal(vae.decode(z=SMALL.inputs()).sample, sample)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"vae": torch.nn.Linear(1, 1)}, "vae: got a Linear, supported: AutoencoderKLHunyuanVideo, AutoencoderKL"),
            ({"mesh": "all"}, "mesh: got 'all', allowed is"),
            ({"timeout": 0}, "timeout: got 0, must be"),
            ({"timeout": True}, "timeout: got True, must be"),
            ({"timeout": "long"}, "timeout: got 'long', must be"),
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, Any], words: str) -> None:
        vae = video_vae()
        before = list(vae.__dict__)
        with pytest.raises(ValueError, match=words):
            parallelize_vae(**({"vae": vae} | arguments))
        assert list(vae.__dict__) == before

    def test_other_vaes(self) -> None:
        with pytest.raises(ValueError, match="vae: got a AutoencoderKLWan, supported"):
            parallelize_vae(AutoencoderKLWan.__new__(AutoencoderKLWan))

    def test_replaced_decode(self) -> None:
        vae = video_vae()
        vae.decode = lambda z: z
        with pytest.raises(ValueError, match="vae: its 'decode' has been replaced"):
            parallelize_vae(vae)

    def test_not_a_tensor(self) -> None:
        vae = video_vae()
        parallelize_vae(vae)
        with pytest.raises(ValueError, match="z: got a list, must be a tensor"):
            vae.decode([1.0])
        assert vae.use_tiling is False


# --- sharing out ------------------------------------------------------------------------------------------------------

costs = st.lists(st.integers(1, 100), min_size=1, max_size=200)


@given(costs, st.integers(1, 9))
def test_no_rank_has_a_tile_more_than_another(costs: list[int], world: int) -> None:
    owners = assign(costs, world)
    for end in [tiles.stop for tiles in rounds(len(costs), world)]:
        loads = [sum(costs[tile] for tile in range(end) if owners[tile] == rank) for rank in range(world)]
        assert max(loads) - min(loads) <= max(costs[:end])


@given(costs, st.integers(1, 9))
def test_rounds_hold_every_tile_once(costs: list[int], world: int) -> None:
    parts = rounds(len(costs), world)
    assert [tile for part in parts for tile in part] == list(range(len(costs)))
    assert all(len(part) <= TILES_PER_ROUND * world for part in parts)


def test_720p_video_is_balanced() -> None:
    sizes = [
        min(5, 33 - t) * min(32, 90 - y) * min(32, 160 - x)
        for t in range(0, 33, 3)
        for y in range(0, 90, 24)
        for x in range(0, 160, 24)
    ]
    for world in (2, 4, 8):
        owners = assign(sizes, world)
        loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(world)]
        assert sum(sizes) / world / max(loads) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64, torch.uint8])
def test_checksum_sees_values_and_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    changed = tensor.clone()
    changed[1, 2, 3] += 1
    sums = {checksum([other]) for other in (tensor, changed, tensor.flip(0), tensor.flip(1))}
    assert len(sums) == 4
    assert checksum([tensor.transpose(1, 2).contiguous().transpose(1, 2)]) == checksum([tensor])
    assert checksum([torch.empty(2, device="meta")]) == checksum([])


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
