"""The command line, end to end on a tiny pipeline in a directory: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from tiny_hunyuan import PROMPTS, tiny_pipeline

from para_kernels.attention import selected_kernel
from para_kernels.integrations.diffusers import Fp8Linears, cli, demo, doctor, loading
from para_kernels.integrations.diffusers import generate as generating
from para_kernels.integrations.diffusers.generate import Acceleration, Request, generate
from para_kernels.integrations.diffusers.handle import Handle
from para_kernels.integrations.diffusers.toy import TOY_PIPELINE

SIZE = ["--height", "48", "--width", "32", "--frames", "5", "--steps", "3"]
REQUEST = Request(prompts=tuple(PROMPTS), height=48, width=32, num_frames=5, steps=3, guidance=6.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pipeline's directory, as a user would have one."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


def read_mp4(path: Path) -> tuple[int, tuple[int, int]]:
    """(frames, (width, height)) as ffmpeg decodes them."""
    reader = imageio_ffmpeg.read_frames(str(path))
    size = next(reader)["size"]
    return sum(1 for _ in reader), size


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_writes_one_video_per_prompt_and_the_summary(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "digits.mp4"
    code = cli.main(
        ["generate", *PROMPTS, "--model", model, *SIZE, "--cache", "1e9", "--zoom", "3", "--output", str(output)]
    )
    printed = capsys.readouterr().out
    assert code == 0
    assert [path.name for path in sorted(output.parent.iterdir())] == [f"digits-{i}.mp4" for i in (1, 2, 3)]
    for path, prompt in zip(sorted(output.parent.iterdir()), PROMPTS, strict=True):
        assert read_mp4(path) == (5, (96, 144))
        assert f"{path}  {prompt!r}" in printed
    # With a threshold that everything passes, all steps after the first are reused, and the table says so.
    assert "3: 1 computed, 2 reused" in printed


def test_generate_takes_the_output_name_as_it_is_for_one_prompt(model: str, tmp_path: Path) -> None:
    output = tmp_path / "one.mp4"
    assert cli.main(["generate", PROMPTS[0], "--model", model, *SIZE, "--zoom", "1", "--output", str(output)]) == 0
    assert read_mp4(output) == (5, (32, 48))


def test_generate_writes_the_exact_frames(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def noted(pipe: Any, request: Any) -> Any:
        made.append(kept(pipe, request))
        return made[-1]

    kept = generating.generate
    monkeypatch.setattr(generating, "generate", noted)
    assert cli.main(["generate", *PROMPTS, "--model", model, *SIZE, "--output", str(tmp_path / "v.npy")]) == 0
    for i, expected in enumerate(made[0].videos, start=1):
        np.testing.assert_array_equal(np.load(tmp_path / f"v-{i}.npy"), expected.astype(np.float32))
    assert len(list(tmp_path.iterdir())) == len(PROMPTS)


def test_one_by_one_makes_a_call_per_prompt(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", *PROMPTS, "--model", model, *SIZE, "--one-by-one", "--output", str(tmp_path / "v.mp4")]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("for 1 video(s), 3 steps") == len(PROMPTS)


def test_a_prompt_gives_the_same_video_alone_and_in_a_batch(pipe: Any) -> None:
    Acceleration().install(pipe)
    together = generate(pipe, REQUEST).videos
    for i, prompt in enumerate(PROMPTS):
        alone = generate(pipe, replace(REQUEST, prompts=(prompt,), seed=i)).videos
        np.testing.assert_allclose(alone[0], together[i], atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2  # other noise and other words: another video


def test_exact_is_stock_and_threshold_zero_is_no_cache(pipe: Any) -> None:
    stock = generate(pipe, REQUEST).videos
    Acceleration().install(pipe)
    exact = generate(pipe, REQUEST).videos
    Acceleration(cache=0.0).install(pipe)
    never = generate(pipe, REQUEST).videos
    np.testing.assert_allclose(exact, stock, atol=1e-5)
    np.testing.assert_array_equal(never, exact)


@pytest.mark.parametrize(
    ("acceleration", "attention", "threshold"),
    [
        (Acceleration(), "exact", None),
        (Acceleration(cache=0.2), "exact", 0.2),
        (Acceleration(cache=True), "exact", 0.06),  # HunyuanVideo's default
        (Acceleration(attention="stock"), "stock", None),
        (Acceleration(attention="stock", cache=0.3), "stock", 0.3),
    ],
)
def test_acceleration_installs_what_it_says(
    pipe: Any, acceleration: Acceleration, attention: str, threshold: float | None
) -> None:
    settings = acceleration.install(pipe).settings
    assert settings.attention == attention
    assert (settings.cache.threshold if settings.cache else None) == threshold


def test_linears_reach_the_pipe(pipe: Any) -> None:
    pytest.importorskip("torchao")
    handle = Acceleration(linears="fp8", cache=0.2).install(pipe)
    assert handle.settings.linears == Fp8Linears()
    assert handle.settings.cache is not None


@pytest.mark.parametrize(
    ("acceleration", "message"),
    [
        (Acceleration(linears="int4"), "linears: 'int4'; must be one of fp8, fp8-weight-only"),
        (Acceleration(linears="fp8", attention="stock"), "attention: 'stock'; must be exact or int8 with linears fp8"),
    ],
)
def test_linears_that_cannot_be_are_refused(acceleration: Acceleration, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acceleration.check()


def test_cache_options_reach_the_policy(pipe: Any) -> None:
    cache = Acceleration(cache=1e9, warmup_steps=1, max_consecutive_hits=2).install(pipe).settings.cache
    assert (cache.warmup_steps, cache.max_consecutive_hits) == (1, 2)


def test_classifier_free_guidance_runs_both_branches(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", *PROMPTS[:2], "--model", model, *SIZE, "--cfg", "3", "--negative-prompt", "slowly"]
    assert cli.main([*arguments, "--output", str(tmp_path / "v.mp4")]) == 0
    assert "[uncond]" in capsys.readouterr().out


# --- what is refused --------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "height": ["x", "--height", "65"],
    "width": ["x", "--width", "0"],
    "frames": ["x", "--frames", "16"],
    "steps": ["x", "--steps", "0"],
    "seed": ["x", "--seed", "-1"],
    "guidance": ["x", "--guidance", "nan"],
    "prompt": ["x", " "],
    "negative-prompt": ["x", "--negative-prompt", "y"],
    "--cache": ["x", "--cache", "-0.1"],
    "--cache ": ["x", "--cache", "sometimes"],
    "threshold": ["x", "--cache", "0.1", "--warmup-steps", "1", "--max-consecutive-hits", "0"],
    "warmup-steps": ["x", "--warmup-steps", "2"],
    "warmup_steps": ["x", "--cache", "0.1", "--warmup-steps", "-2"],
    "--attention": ["x", "--attention", "fast"],
    "device": ["x", "--device", "tpu"],
    "CUDA devices": ["x", "--device", "cuda:99"],
    "--dtype": ["x", "--dtype", "fp64"],
    "fps": ["x", "--fps", "0"],
    "zoom": ["x", "--zoom", "0"],
    ".mp4": ["x", "--output", "video.avi"],
    "model": ["x", "--model", "no-such-model"],
    "model_index.json": ["x", "--model", "."],
    "PROMPT": [],
}
BAD_INPUT["max_consecutive_hits"] = BAD_INPUT.pop("threshold")


@pytest.mark.parametrize("named", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        loading.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded")
    )
    try:
        code = cli.main(["generate", *BAD_INPUT[named]])
    except SystemExit as exit_:  # argparse's own refusals
        code = exit_.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("para-kernels generate: error: ")
    assert named.strip() in printed.err


def test_the_readme_shows_the_error_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = (Path(__file__).resolve().parent.parent / "README.md").read_text().splitlines()
    (shown,) = (i for i, line in enumerate(lines) if line.startswith("    $ para-kernels "))
    arguments = shlex.split(lines[shown].strip().removeprefix("$ para-kernels "))
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.strip() == lines[shown + 1].strip()


def test_a_folder_that_cannot_be_written_is_refused_before_generating(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["generate", "x", "--model", model, "--output", str(tmp_path / "file" / "v.mp4")]) == 2
    assert "cannot be created" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["index", "weights"])
def test_a_broken_model_directory_is_one_line(
    broken: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    if broken == "index":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "NoSuchModel"]}))
    else:
        (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    assert cli.main(["generate", "x", "--model", str(folder), "--output", str(tmp_path / "v.mp4")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"para-kernels generate: error: model: {str(folder)!r} could not be loaded: ")


def test_an_unsupported_pipeline_is_refused_by_name(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other:
        def to(self, *_: object) -> Other:
            return self

    monkeypatch.setattr(loading.DiffusionPipeline, "from_pretrained", lambda *_, **__: Other())
    assert cli.main(["generate", "x", "--model", model, "--output", str(tmp_path / "v.mp4")]) == 2
    assert "HunyuanVideoPipeline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--thresholds", "0.1", "-0.2"], "thresholds"),
        (["--thresholds", "0.1", "0.1"], "thresholds"),
        (["--rounds", "0"], "rounds"),
        (["--height", "63"], "height"),
    ],
)
def test_demo_refuses_bad_input(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert f"para-kernels demo: error: {named}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- loading ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_toys_for_the_toy_and_hunyuan_videos_for_others(tmp_path: Path) -> None:
    toy, other = loading.defaults_for("toy"), loading.defaults_for("hunyuanvideo-community/HunyuanVideo")
    assert (toy.height, toy.width, toy.num_frames, toy.steps) == (64, 64, 17, 30)
    assert (other.height, other.width, other.num_frames, other.steps) == (720, 1280, 129, 50)
    if TOY_PIPELINE.is_dir():
        assert loading.defaults_for(str(TOY_PIPELINE)) == toy
    assert loading.defaults_for(str(tmp_path)) == other


def test_dtype_and_device_names() -> None:
    cpu = torch.device("cpu")
    assert loading.resolve_device("cpu") == cpu
    assert loading.resolve_dtype("auto", cpu) == torch.float32
    assert loading.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert loading.resolve_dtype("fp16", cpu) == torch.float16
    with pytest.raises(ValueError, match="dtype: 'fp8'"):
        loading.resolve_dtype("fp8", cpu)


def test_a_directory_has_no_revision(model: str) -> None:
    with pytest.raises(ValueError, match="revision: 'main'"):
        loading.model_source(model, "main")
    assert loading.model_source("owner/name", "main") == "owner/name"


# --- demo -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "output"
    arguments = [
        "demo",
        "--model",
        model,
        *SIZE,
        "--prompts",
        *PROMPTS[:2],
        "--thresholds",
        "1e9",
        "1e-9",
        "--out",
        str(out),
    ]
    assert cli.main(arguments) == 0
    return out


def test_demo_writes_every_video_and_picture(demo_folder: Path) -> None:
    settings = ("stock", "exact", "processes-2", "cache-1e-09", "cache-1e+09")
    assert {path.name for path in (demo_folder / "videos").iterdir()} == {
        f"{name}-{i}.mp4" for name in settings for i in (1, 2)
    }
    for picture in ("contact-sheet.png", "threshold.png"):
        assert (demo_folder / picture).read_bytes().startswith(b"\x89PNG")


def test_demo_numbers_are_those_of_the_settings(demo_folder: Path) -> None:
    report = json.loads((demo_folder / "demo.json").read_text())
    stock, exact, spread, never, always = report["rows"]
    assert [row["hits"] for row in report["rows"]] == [0, 0, 0, 0, 2]
    assert (stock["psnr"], stock["ssim"], stock["max_abs_diff"]) == (None, 1.0, 0.0)
    assert exact["max_abs_diff"] < 1e-5
    assert spread["setting"] == "2 processes"
    assert spread["max_abs_diff"] < 1e-5
    # A threshold that nothing passes is the exact run; one that everything passes is another video.
    assert (never["psnr"], never["max_abs_diff"]) == (exact["psnr"], exact["max_abs_diff"])
    assert always["psnr"] < exact["psnr"]
    for row in report["rows"]:
        assert row["speed_up"] == pytest.approx(stock["seconds"] / row["seconds"])
        assert row["speed_up_over_exact"] == pytest.approx(exact["seconds"] / row["seconds"])
    assert report["prompts"] == PROMPTS[:2]


def test_measuring_leaves_the_pipe_as_it_was_and_times_every_round(pipe: Any) -> None:
    processors = dict(pipe.transformer.attn_processors)
    measurements = demo.measure(pipe, replace(REQUEST, prompts=tuple(PROMPTS[:1])), demo.settings([0.1]), rounds=2)
    assert [len(measurement.seconds) for measurement in measurements] == [2, 2, 2]
    assert pipe.transformer.attn_processors == processors
    assert Handle.on(pipe.transformer) is None


def test_the_demos_own_prompts_differ_in_length() -> None:
    lengths = [len(prompt.split()) for prompt in demo.PROMPTS]
    assert len(lengths) >= 4
    assert len(set(lengths)) == len(lengths)


# --- doctor and help --------------------------------------------------------------------------------------------------


def test_doctor_reports_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for package in ("torch", "diffusers", "transformers"):
        assert f"{package} {metadata.version(package)}" in printed
    assert selected_kernel("cpu", torch.float32, 128) in printed
    if not torch.cuda.is_available():
        assert "GPU\n  none: " in printed


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "matplotlib":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    def import_module(name: str) -> Any:
        raise ImportError("no such file")

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    report = doctor.report()
    assert "matplotlib MISSING: pip install 'para-kernels[diffusers]'" in report
    assert "extension: not built (no such file)" in report
    assert "pip install --no-build-isolation ." in report


@pytest.mark.parametrize("command", ["generate", "demo", "quality", "doctor"])
def test_help_describes_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0
    assert f"usage: para-kernels {command}" in printed
    assert command == "doctor" or "examples:" in printed


@pytest.mark.parametrize("command", ["generate", "demo", "quality"])
def test_every_option_has_a_help_text(command: str) -> None:
    commands = next(action for action in cli._parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    for action in commands.choices[command]._actions:
        assert action.help, action.dest
