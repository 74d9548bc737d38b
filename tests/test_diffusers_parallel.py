"""A pipeline spread over 2, 3 and 4 real processes gives what one process gives, whatever is put on in which order."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("diffusers")

import diffusers_ranks
import ranks
from diffusers_ranks import EQUAL, OTHERS, STRADDLED, STRADDLING
from tiny_hunyuan import PROMPTS, tiny_pipeline

from para_kernels import ContextParallel
from para_kernels.integrations.diffusers import accelerate, cli, generate, parallelize_pipe, processes
from para_kernels.integrations.diffusers.generate import Acceleration
from para_kernels.parallel import RankFailure

ranks.preload("diffusers_ranks")

TOLERANCE = 1e-5  # float32, of the largest value; seen are 3e-7
Seen = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run of the tests have in common."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def seen(shared: Path, world: int, name: str) -> Seen:
    """What each rank saw of a case. The first who asks runs all cases of this world size, for all workers."""
    results = shared / f"diffusers-parallel-{world}.json"
    with (shared / f"{results.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            outcomes = ranks.launch(world, diffusers_ranks.run, timeout=300.0)
            results.write_text(json.dumps([str(one) if isinstance(one, Exception) else one for one in outcomes]))
    everyone = json.loads(results.read_text())
    for rank, one in enumerate(everyone):
        assert isinstance(one, dict), f"rank {rank}: {one}"
        assert name in one, f"rank {rank} stopped before: {list(one.items())[-1]}"
        assert "error" not in one[name], f"rank {rank}: {one[name]['error']}"
    return [one[name] for one in everyone]


def same(everyone: Seen, what: str) -> Any:
    """What all ranks saw alike."""
    first, *others = (one[what] for one in everyone)
    assert all(other == first for other in others), f"{what} differs between ranks"
    return first


def reused(decisions: list[Any]) -> list[tuple[str, int, bool]]:
    return [(branch, step, hit) for branch, step, hit, _ in decisions]


# --- equal to one process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, cases in EQUAL.items() for name in cases])
def test_every_rank_returns_what_one_process_makes(shared: Path, world: int, name: str) -> None:
    everyone = seen(shared, world, name)
    same(everyone, "output")
    assert all(one["difference"] <= TOLERANCE for one in everyone)
    decided, alone = same(everyone, "decisions"), everyone[0]["alone"]
    assert reused(decided) == reused(alone)
    for (*_, got), (*_, expected) in zip(decided, alone, strict=True):
        assert got == (None if expected is None else pytest.approx(expected, rel=1e-4))
    if EQUAL[world][name].cache is not None:
        assert {hit for _, _, hit in reused(decided)} == {True, False}


@pytest.mark.parametrize(
    ("world", "name", "line"),
    [
        (2, "ring", "2 ranks: batch 1 x ring 2 x ulysses 1; the sizes were given"),
        (2, "ring", "transport   collective; CPU tensors"),
        (2, "ulysses", "transport   all-to-all"),
        (2, "auto batch", "2 ranks: batch 2 x ring 1 x ulysses 1; batch 2, and"),
        (2, "cache first", "2 ranks: batch 1 x ring 2 x ulysses 1; the mesh was given"),
        (4, "hybrid", "4 ranks: batch 1 x ring 2 x ulysses 2"),
    ],
)
def test_the_summary_names_split_and_transport_and_why(shared: Path, world: int, name: str, line: str) -> None:
    for one in seen(shared, world, name):
        assert line in one["summary"]


def test_the_shipped_pipeline_makes_the_video_of_one_process(shared: Path) -> None:
    everyone = seen(shared, 2, "toy")
    same(everyone, "output")
    assert max(one["difference"] for one in everyone) <= TOLERANCE
    assert reused(same(everyone, "decisions")) == reused(everyone[0]["alone"])
    assert {hit for _, _, hit in reused(everyone[0]["decisions"])} == {True, False}


def test_calls_of_other_shapes_follow_each_other(shared: Path) -> None:
    everyone = seen(shared, 3, "shapes")
    same(everyone, "outputs")
    assert all(difference <= TOLERANCE for one in everyone for difference in one["differences"])


# --- one decision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", STRADDLING)
@pytest.mark.parametrize("name", STRADDLED)
def test_ranks_that_would_decide_otherwise_decide_alike(shared: Path, world: int, name: str) -> None:
    everyone = seen(shared, world, name)
    assert {one["would have reused"] for one in everyone} == {True, False}
    assert reused(same(everyone, "decisions")) == reused(everyone[0]["alone"])
    same(everyone, "output")
    assert all(one["difference"] <= TOLERANCE for one in everyone)


# --- one noise, one progress bar ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_start_from_the_noise_of_the_first(shared: Path, world: int) -> None:
    everyone = seen(shared, world, "noise")
    same(everyone, "output")
    assert all(one["difference"] <= TOLERANCE for one in everyone)
    assert [one["given"] for one in everyone] == list(range(world))  # Latents that a user gives stay what they are.


def test_the_first_rank_alone_shows_progress(shared: Path) -> None:
    everyone = seen(shared, 2, "progress")
    assert [one["quiet"] for one in everyone] == [False, True]
    assert [one["after"] for one in everyone] == [False, False]


# --- taking off, calling again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_remove_leaves_nothing_behind(shared: Path, world: int) -> None:
    for one in seen(shared, world, "remove"):
        assert one["same"]
        assert one["equal"]
        assert all(one["kept"])
        assert all(one["given back"])
        assert one["again"]


def test_remove_gives_back_the_buffers_of_the_ring(tmp_path: Path) -> None:
    pytest.importorskip("para_kernels._C")
    pytest.importorskip("triton.backends.nvidia.driver")
    if torch.cuda.is_available():
        pytest.skip("the fake driver cannot stand beside a real one")
    from fake_cuda import build_library

    for one in ranks.launch(2, diffusers_ranks.buffers, str(build_library(tmp_path))):
        assert isinstance(one, dict), one
        assert max(one["differences"]) <= TOLERANCE
        assert [bool(held) for held in one["held"]] == [True, False] * 2
        assert one["registered"] == 0
        assert one["watches"] == []
        assert one["equal"]


def test_calling_again_changes_the_mesh_and_none_takes_it_off(shared: Path) -> None:
    for one in seen(shared, 2, "retune"):
        assert max(one["differences"]) <= TOLERANCE
        assert one["differences"][-1] == 0.0
        assert "parallel" not in one["summary"]


def test_a_failed_forward_and_a_second_pipe_leave_nothing_behind(shared: Path) -> None:
    for one in seen(shared, 2, "after_failure"):
        assert max(one["differences"]) <= TOLERANCE
        assert one["clean"]


# --- what is refused, and what fails ----------------------------------------------------------------------------------

REFUSED = {
    "sizes": "3 ranks, must make up the world of 2",
    "mesh": "mesh: got dims ('tp',), must be",
    "type": "parallel: got 2, allowed is a ContextParallel or None",
    "transport": "transport: got 'pigeon', allowed are",
    "timeout": "timeout: got 0, must be",
    "pipe": "pipe: got a object",
    "other sizes": 'parallel: got "ContextParallel(split=None, batch=1, ring=1, ulysses=2',
    "too few samples": "the batch has 1 sample(s), allowed is batch <= samples",
    "stochastic": "its scheduler has stochastic_sampling=True",
    "other prompts": "encoder_hidden_states: got other values on rank 1 than on rank 0",
    "other shapes": 'latents: got "(2, 4, 3, 8, 4) torch.float32" on rank 1, must be "(2, 4, 3, 6, 4)',
    "other cache": 'cache: got "FirstBlockCache(threshold=0.2',
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_on_every_rank(shared: Path, name: str) -> None:
    for one in seen(shared, 2, "refused"):
        assert REFUSED[name] in one["messages"][name]


def test_what_is_refused_changes_nothing(shared: Path) -> None:
    everyone = seen(shared, 2, "refused")
    assert all(one["unchanged"] and one["same"] for one in everyone)
    same(everyone, "works")


def test_without_other_processes_the_pipe_stays_as_it_was() -> None:
    pipe = tiny_pipeline()
    for call in (parallelize_pipe, lambda pipe: accelerate(pipe, parallel=ContextParallel(ring=2))):
        with pytest.raises(ValueError, match="is not initialised"):
            call(pipe)
    assert not pipe.transformer._forward_pre_hooks
    assert "prepare_latents" not in vars(pipe)


def test_a_rank_that_dies_ends_the_others_with_its_name() -> None:
    message, _ = ranks.launch(2, diffusers_ranks.death, lost=1)
    assert "rank 0" in message
    assert "rank 1" in message
    assert "layer" in message


# --- the command ------------------------------------------------------------------------------------------------------


def test_generate_under_torchrun_writes_once(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    size = ["--height", "48", "--width", "32", "--frames", "5", "--steps", "2", "--cache", "0.5", "--ring", "2"]
    command = ["generate", *PROMPTS[:2], "--model", str(tmp_path / "model"), *size, "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "para_kernels", *command, "--output", str(tmp_path / "out" / "v.mp4")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["v-1.mp4", "v-2.mp4"]
    assert done.stdout.count("para-kernels on HunyuanVideo") == 1
    assert "2 ranks: batch 1 x ring 2 x ulysses 1" in done.stdout
    assert "AutoencoderKLHunyuanVideo, tiles on 2 rank(s)\nlast call: decode, " in done.stdout


def test_the_vae_is_shared_out_unless_told_not_to() -> None:
    pipe = tiny_pipeline()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert Acceleration().install_vae(pipe) is None
        assert Acceleration(parallel=ContextParallel(), parallel_vae=False).install_vae(pipe) is None
        acceleration = Acceleration(parallel=ContextParallel(timeout=9.0))
        handle, vae = acceleration.install(pipe), acceleration.install_vae(pipe)
        assert vae is not None
        handle.remove()
        assert vae.installed
        acceleration.install(pipe)
        vae.remove()
        assert "decode" not in vars(pipe.vae)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_failed_rank_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    def fails(job: object) -> None:
        raise RankFailure("rank 1 waited 3 s for K and V of rank 0 in layer 7;\nno sign of rank 0")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(generate, "run", fails)
    assert cli.main(["generate", "a 7", "--device", "cpu"]) == 1
    words = "rank 1 waited 3 s for K and V of rank 0 in layer 7; no sign of rank 0"
    assert capsys.readouterr().err == f"[rank {rank}] para-kernels generate: error: {words}\n"


def test_other_failures_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(job: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(generate, "run", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(["generate", "a 7", "--device", "cpu"])
    assert cli.main(["generate", "a 7", "--no-parallel-vae"]) == 2


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        (1, {"ring": 2}, "--ring: has no effect in one process"),
        (1, {"split": "auto"}, "--parallel: has no effect in one process"),
        (2, {"ring": 3}, "make up 3 rank"),
        (2, {"ring": 2, "split": "auto"}, "give one or the other"),
        (2, {"ring": 0}, "ring: got 0"),
    ],
)
def test_options_that_do_not_fit_the_processes(
    monkeypatch: pytest.MonkeyPatch, world: int, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    nothing: dict[str, Any] = dict.fromkeys(("split", "batch", "ring", "ulysses", "transport", "timeout"))
    with pytest.raises(ValueError, match=message):
        processes.parallel_options(**(nothing | options))


def test_options_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("split", "batch", "ring", "ulysses", "transport", "timeout"))
    assert processes.parallel_options(**nothing) is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.parallel_options(**nothing) == ContextParallel("auto")
    assert processes.parallel_options(**(nothing | {"ring": 2, "batch": 2, "timeout": 9.0})) == ContextParallel(
        batch=2, ring=2, timeout=9.0
    )


@pytest.mark.parametrize(
    ("environment", "device", "own"),
    [
        ({}, "cuda", "cuda"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "cuda", "cuda:0"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "cuda:1", "cuda:1"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda", "cuda:1"),
        ({"WORLD_SIZE": "2"}, "cuda", "cuda:0"),  # who starts processes otherwise shows each its GPU alone
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cpu", "cpu"),
    ],
)
def test_the_device_of_a_process(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], device: str, own: str
) -> None:
    set_environment(monkeypatch, environment)
    assert str(processes.own_device(torch.device(device))) == own


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda:0", "device: 'cuda:0'; must be auto, cpu or cuda"),
        ({"WORLD_SIZE": "3", "LOCAL_RANK": "2"}, "cuda", "too few for local rank 2"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "2"}, "cuda", "too few for local rank 2"),
    ],
)
def test_a_device_that_a_process_cannot_have(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], device: str, message: str
) -> None:
    set_environment(monkeypatch, environment)
    with pytest.raises(ValueError, match=message):
        processes.own_device(torch.device(device))


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """That of one process on a machine with two GPUs."""
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_every_case_is_looked_at() -> None:
    text = Path(__file__).read_text()
    for cases in OTHERS.values():
        assert all(f'"{case.__name__}"' in text for case in cases)
