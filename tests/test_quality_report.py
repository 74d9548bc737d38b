"""The `quality` command: what it measures, what it leaves out, what it writes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline
from PIL import Image
from tiny_hunyuan import PROMPTS, tiny_pipeline, transformer_inputs

from para_kernels.integrations.diffusers import accelerate, cli, quality_report
from para_kernels.integrations.diffusers.figures import settings_plot
from para_kernels.integrations.diffusers.generate import Request
from para_kernels.integrations.diffusers.handle import Handle
from para_kernels.integrations.diffusers.layer_errors import LayerReferences
from para_kernels.integrations.diffusers.models import HUNYUAN_VIDEO
from para_kernels.integrations.diffusers.quality_report import Measuring, Setting, settings

pytestmark = pytest.mark.usefixtures("one_thread")

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
REQUEST = Request(prompts=tuple(PROMPTS[:2]), height=48, width=32, num_frames=5, steps=3, guidance=6.0)
FP8_ROWS = ["linears fp8", "linears fp8-weight-only"]


@pytest.fixture
def pipe() -> HunyuanVideoPipeline:
    return tiny_pipeline()


# --- layers -----------------------------------------------------------------------------------------------------------


def test_the_error_of_every_layer_is_what_was_added_to_it(pipe: HunyuanVideoPipeline) -> None:
    """Each layer's output is made larger by a known factor: the error is that."""
    transformer: Any = pipe.transformer
    references = LayerReferences.of(transformer, HUNYUAN_VIDEO)
    assert list(references.layers) == [
        *[f"transformer_blocks.{i}.attn" for i in range(2)],
        *[f"single_transformer_blocks.{i}.attn" for i in range(3)],
    ]
    accelerate(pipe)
    added = [0.0, 1e-3, 0.0, 0.5, 1e-2]
    for path, factor in zip(references.layers, added, strict=True):
        transformer.get_submodule(path).register_forward_hook(
            lambda module, args, output, factor=factor: (output[0] * (1 + factor), output[1])
        )
    with references.watching(transformer) as found, torch.no_grad():
        transformer(**transformer_inputs())
    assert [layer.layer for layer in found] == list(references.layers)
    assert [layer.error for layer in found] == pytest.approx(added, rel=1e-2, abs=2e-6)  # float32
    with torch.no_grad():
        transformer(**transformer_inputs())
    assert len(found) == 5  # nobody listens any more


def test_long_sequences_are_left_out(pipe: HunyuanVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("para_kernels.integrations.diffusers.layer_errors.MOST_TOKENS", 17)  # there are 18 of video
    references = LayerReferences.of(pipe.transformer, HUNYUAN_VIDEO)
    with references.watching(pipe.transformer) as found, torch.no_grad():
        pipe.transformer(**transformer_inputs())
    assert found == []


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_settings_come_from_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_report, "ATTENTION", ("exact", "int8"))
    names = [setting.name for setting in settings([0.1, 0.2])]
    assert names == ["exact", "stock diffusers", "cache 0.1", "cache 0.2", *FP8_ROWS, "attention int8"]


def test_a_setting_is_compared_with_exact_and_taken_off(pipe: HunyuanVideoPipeline) -> None:
    measuring = Measuring(pipe, [REQUEST])
    exact = measuring.run(Setting("exact", {}))
    stock = measuring.run(Setting("stock diffusers", None))
    cached = measuring.run(Setting("cache", {"cache": 100.0}))
    assert exact is not None
    assert stock is not None
    assert cached is not None
    assert exact.quality.psnr == math.inf
    assert 80 < stock.quality.psnr < math.inf
    assert cached.quality.psnr < stock.quality.psnr
    assert [(one.reused, one.steps) for one in (exact, stock, cached)] == [(0, 3), (0, 3), (2, 3)]
    for one in (exact, stock, cached):
        assert len(one.layers) == 5
        assert one.errors is not None
        assert one.errors[0] <= one.errors[1] < 5e-6
    assert Handle.on(pipe.transformer) is None
    again = measuring.run(Setting("exact", {}))
    assert again is not None
    assert again.quality.psnr == math.inf


def test_a_setting_that_cannot_be_is_left_out_with_the_reason(pipe: HunyuanVideoPipeline) -> None:
    measuring = Measuring(pipe, [REQUEST])
    assert measuring.run(Setting("attention int1", {"attention": "int1"})) is None
    assert "attention: got 'int1', allowed is one of" in measuring.left_out["attention int1"]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out") / "new"
    tiny_pipeline().save_pretrained(model)
    size = ["--height", "48", "--width", "32", "--frames", "5", "--steps", "3"]
    command = ["quality", "--model", str(model), *size, "--prompts", *PROMPTS[:2], "--thresholds", "100"]
    assert cli.main([*command, "--out", str(out)]) == 0
    return out


def test_the_numbers(written: Path) -> None:
    report = json.loads((written / "quality.json").read_text())
    rows = {row["setting"]: row for row in report["settings"]}
    ran = FP8_ROWS if HAS_TORCHAO else []
    assert [name for name in rows if not name.startswith("attention")] == [
        "exact",
        "stock diffusers",
        "cache 100",
        *ran,
    ]
    assert rows["exact"]["psnr"] is None
    assert rows["cache 100"]["reused"] == 2
    assert report["steps"] == 3
    assert all(len(row["layers"]) == 5 for row in rows.values())
    if HAS_TORCHAO:
        assert 1e-3 < max(rows["linears fp8"]["layers"].values()) < 0.1
        assert rows["linears fp8"]["psnr"] < rows["stock diffusers"]["psnr"]
    else:
        assert "pip install para-kernels[fp8]" in report["left_out"]["linears fp8"]


def test_the_table_and_the_pictures(written: Path) -> None:
    report = json.loads((written / "quality.json").read_text())
    text = (written / "quality.md").read_text()
    for row in report["settings"]:
        psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f}"
        cells = next(line for line in text.splitlines() if line.startswith(f"| {row['setting']} "))
        assert psnr in cells
    for name in report["left_out"]:
        assert f"Left out: {name}. " in text
    for picture in ("quality.png", "contact-sheet.png"):
        assert np.asarray(Image.open(written / picture)).std() > 0


def test_the_plot_draws_points_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    layers = {"exact": [1e-7, 2e-7, 1e-7], "fp8": [1e-2, 2e-2, 3e-2]}
    settings_plot(path, ["stock", "fp8"], [math.inf, 35.0], [1.0, 0.97], layers, "2 prompts")
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's own blue and orange
        assert (np.abs(image - colour).sum(-1) < 12).sum() > 100, colour


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thresholds", "0"], "thresholds: [0.0]; each must be above 0"),
        (["--thresholds", "0.1", "0.1"], "thresholds: [0.1, 0.1]; each may stand there once"),
        (["--batch", "0"], "batch: 0; must be at least 1"),
        (["--steps", "0"], "steps: 0; must be at least 1"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["quality", *arguments, "--out", str(out)]) == cli.USER_ERROR
    assert f"para-kernels quality: error: {message}" in capsys.readouterr().err
    assert not out.exists()
