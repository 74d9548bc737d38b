"""The benchmark of cache policies: its arithmetic against numbers worked out by hand, its run on a tiny pipeline."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from tiny_hunyuan import NUM_BLOCKS, PROMPTS, tiny_pipeline

from benchmarks import policies, record, render_tables, trade_off
from benchmarks.policies import Batch, Call, Curve, Setting, Size, Tally
from benchmarks.trade_off import Comparison
from para_kernels import AdaCache, FirstBlockCache, TeaCache
from para_kernels.cache import StepRecord, fit_rescale
from para_kernels.integrations.diffusers import accelerate
from para_kernels.integrations.diffusers.cache import transformer_blocks
from para_kernels.integrations.diffusers.generate import Request, generate
from para_kernels.integrations.diffusers.models import HUNYUAN_VIDEO
from para_kernels.integrations.diffusers.toy.evaluate import Reading
from para_kernels.integrations.diffusers.toy.prompts import Scene

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = Size(height=48, width=32, num_frames=5, steps=7)
SCENES = [Scene(digit, "left") for digit in (2, 3, 4)]
PAIRS = list(zip(SCENES, PROMPTS, strict=True))


# --- one quality on a curve -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "value"),
    [
        ([(40.0, 1.5), (20.0, 2.5)], 2.0),
        ([(40.0, 1.5), (32.0, 2.0), (28.0, 3.0), (20.0, 3.5)], 2.5),
        ([(35.0, 1.0), (30.0, 2.0), (25.0, 3.0)], 2.0),
        ([(40.0, 1.0), (20.0, 2.0), (40.0, 3.0)], 2.5),  # two crossings: the faster one
        ([(30.0, 1.7)], 1.7),
        ([(40.0, 1.0), (30.1, 2.0)], None),
        ([(29.0, 2.0), (20.0, 3.0)], None),
        ([(math.inf, 1.0)], None),
        ([], None),
    ],
)
def test_a_curve_at_30_db(curve: list[trade_off.Point], value: float | None) -> None:
    assert trade_off.at_quality(curve, 30.0) == (None if value is None else pytest.approx(value))


@given(
    slope=st.floats(-2.0, -0.01),
    offset=st.floats(-5.0, 5.0),
    qualities=st.lists(st.integers(1, 59), min_size=2, unique=True),
)
def test_a_straight_line_is_met_exactly(slope: float, offset: float, qualities: list[int]) -> None:
    curve = [(float(quality), slope * quality + offset) for quality in sorted(qualities, reverse=True)]
    found = trade_off.at_quality(curve, 30.0)
    if min(qualities) <= 30 <= max(qualities):
        assert found == pytest.approx(slope * 30.0 + offset, abs=1e-9)
    else:
        assert found is None


CURVES = {
    "First Block Cache": [(40.0, 1.0), (20.0, 3.0)],
    "fast": [(40.0, 1.5), (20.0, 3.5)],
    "slow": [(40.0, 0.5), (20.0, 2.5)],
    "far": [(28.0, 9.0), (20.0, 9.5)],
}


def test_policies_are_compared_at_one_quality() -> None:
    assert trade_off.compared(CURVES) == [
        Comparison("fast", 2.5, pytest.approx(0.2)),
        Comparison("First Block Cache", 2.0, 0.0),
        Comparison("slow", 1.5, pytest.approx(-1 / 3)),
        Comparison("far", None, None),
    ]
    with pytest.raises(ValueError, match="baseline: got 'none', allowed is one of First Block Cache, fast, slow, far"):
        trade_off.compared(CURVES, baseline="none")


@pytest.mark.parametrize(
    ("curves", "said"),
    [
        (CURVES, "By wall time, at 30 dB fast is the fastest: 2.50x against 2.00x of First Block Cache, 20.0% less time. The 15% that a policy is asked to save are reached."),
        (CURVES | {"fast": [(30.0, 2.2)]}, "By wall time, at 30 dB fast is the fastest: 2.20x against 2.00x of First Block Cache, 9.1% less time. The 15% that a policy is asked to save are not reached."),
        (CURVES | {"fast": [(30.0, 1.9)]}, "By wall time, at 30 dB no policy is faster than First Block Cache (2.00x)."),
        (CURVES | {"First Block Cache": [(40.0, 1.0)]}, "First Block Cache has no setting on either side of 30 dB: nothing can be said."),
    ],
    ids=["reached", "not reached", "slower", "no baseline"],
)  # fmt: skip
def test_the_verdict_is_what_the_numbers_say(curves: dict[str, list[trade_off.Point]], said: str) -> None:
    assert trade_off.verdict(trade_off.compared(curves)) == said


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_grid_has_every_policy_at_a_range_of_thresholds() -> None:
    curves = policies.curves((1.0, 0.0))
    assert [curve.name for curve in curves].count(trade_off.BASELINE) == 1
    assert len({curve.name for curve in curves}) == len(curves)
    for curve in curves:
        assert list(curve.values) == sorted(set(curve.values))
        assert len(curve.values) >= 2
    made = [setting.policy for setting in policies.settings(curves) if setting.policy]
    assert len(made) == len(set(made)) == sum(len(curve.values) for curve in curves)
    assert {type(policy) for policy in made} == {FirstBlockCache, TeaCache, AdaCache}
    assert {policy.taylor_order for policy in made if isinstance(policy, FirstBlockCache)} == {0, 1, 2}
    assert any(policy.last_blocks for policy in made)
    assert any(policy.max_accumulated_error for policy in made)
    assert {policy.rescale for policy in made if isinstance(policy, TeaCache)} == {(1.0, 0.0)}


def test_settings_are_the_points_of_the_curves_in_order() -> None:
    curves = [Curve("a", FirstBlockCache, (0.1, 0.2)), Curve("b", AdaCache, (1.0,))]
    assert policies.settings(curves) == [
        Setting("a", 0.1, FirstBlockCache(0.1)),
        Setting("a", 0.2, FirstBlockCache(0.2)),
        Setting("b", 1.0, AdaCache(1.0)),
    ]


@pytest.mark.parametrize("count", [1, 3])
def test_every_turn_has_everything_and_begins_with_another(count: int) -> None:
    turns = [list(policies.in_turn(count, turn)) for turn in range(2 * count)]
    assert all(sorted(turn) == list(range(count)) for turn in turns)
    assert [turn[0] for turn in turns] == [*range(count), *range(count)]


@pytest.mark.parametrize("arguments", [["--prompts", "0"], ["--steps", "5"], ["--batch", "0"], ["--dtype", "fp8"]])
def test_bad_options_are_named(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policies, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["policies", *arguments])
    with pytest.raises(SystemExit):
        policies.main()
    assert arguments[0] in capsys.readouterr().err


# --- what is noted ----------------------------------------------------------------------------------------------------


def test_the_times_of_a_record_are_those_of_the_median_batch() -> None:
    tally = Tally(Setting("a", 0.1, FirstBlockCache(0.1)), wall_ms=[10.0, 20.0, 5.0], uncached_ms=[30.0, 40.0, 20.0])
    assert tally.speed_ups == [3.0, 2.0, 4.0]
    assert tally.median_batch() == 0
    tally.wall_ms.append(10.0)
    tally.uncached_ms.append(25.0)
    assert tally.median_batch() == 3  # 2.5 and 3 are in the middle: the lower
    assert policies.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert policies.quartiles([1.5]) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("policy", "reused", "share"),
    [
        (None, 0, 1.0),
        (FirstBlockCache(0.1), 0, 1.0),
        (FirstBlockCache(0.1), 10, 1 / 9),
        (FirstBlockCache(0.1, last_blocks=2), 5, (5 * 9 + 5 * 3) / 90),
        (AdaCache(0.1), 10, 0.0),
    ],
)
def test_the_share_of_computed_blocks(policy: Any, reused: int, share: float) -> None:
    tally = Tally(Setting("a", None, policy), reused=reused, steps=10)
    assert tally.computed_blocks(9) == pytest.approx(share)


def test_a_tally_compares_each_video_with_the_uncached_one() -> None:
    reference = np.full((2, 3, 8, 8, 3), 0.5, np.float32)
    videos = reference + np.array([0.1, 0.01], np.float32)[:, None, None, None, None]
    steps = [StepRecord(0, "cond", None, False), StepRecord(1, "cond", 0.1, True)]
    tally = Tally(Setting("a", 0.1, FirstBlockCache(0.1)))
    batch = Batch(SCENES[:2], {}, [0, 1])
    reading = Reading(2, "left", "white", "black", [2], (-1.0, 0.0))
    tally.add(batch, Call(videos, steps, 10.0, 0.01), Call(reference, steps, 40.0, 0.04), [reading] * 2)
    assert tally.psnr == pytest.approx([20.0, 40.0], abs=1e-3)
    assert len(tally.ssim) == 2
    assert (tally.reused, tally.steps, tally.speed_ups) == (1, 2, [4.0])
    uncached = Tally(policies.NO_CACHE)
    uncached.add(batch, Call(reference, steps[:1], 40.0, 0.04), Call(reference, steps[:1], 40.0, 0.04), [reading] * 2)
    first, second = policies.records([uncached, tally], SIZE, 2, "float32", 9, {"run_s": 1.0})
    assert (first.kernel, first.ratio, first.notes["psnr"], first.notes["run_s"]) == ("no cache", 1.0, None, 1.0)
    assert (second.ratio, second.notes["speed_up_cpu"], second.notes["psnr"]) == (
        4.0,
        4.0,
        pytest.approx(30.0, abs=1e-3),
    )
    assert (second.notes["digit"], second.notes["computed_blocks"]) == (0.5, pytest.approx(1 - 0.5 * 8 / 9))
    assert second.notes["policy"] == "First Block Cache, threshold 0.1"


# --- a run ------------------------------------------------------------------------------------------------------------


class Fixed:
    """A reader that sees the same everywhere."""

    def read(self, videos: np.ndarray) -> list[Reading]:
        assert videos.dtype == np.uint8
        return [Reading(3, "left", "white", "black", [3], (-1.0, 0.0))] * len(videos)


def test_batches_are_of_about_one_length_and_keep_each_prompts_noise() -> None:
    pipe = tiny_pipeline()
    first, second = policies.batches(pipe, PAIRS, 2, first_seed=100)
    lengths = [pipe.encode_prompt([prompt])[2].sum().item() for prompt in PROMPTS]
    order = sorted(range(3), key=lengths.__getitem__)
    assert [*first.seeds, *second.seeds] == [100 + number for number in order]
    assert [*first.scenes, *second.scenes] == [SCENES[number] for number in order]
    assert [batch.text["prompt_embeds"].shape[:2] for batch in (first, second)] == [
        (2, lengths[order[1]]),
        (1, lengths[order[2]]),
    ]


def test_a_call_makes_the_pipelines_own_video() -> None:
    pipe = tiny_pipeline()
    (batch,) = policies.batches(pipe, PAIRS, 8, first_seed=0)
    made = policies.call(pipe, batch, FirstBlockCache(1e9), SIZE)
    accelerate(pipe, cache=FirstBlockCache(1e9))
    for video, number in zip(made.videos, batch.seeds, strict=True):
        request = Request((PROMPTS[number],), 48, 32, 5, SIZE.steps, SIZE.guidance, seed=number)
        np.testing.assert_allclose(video, generate(pipe, request).videos[0], atol=2e-5)
    assert [step.reused for step in made.records] == [False, *[True] * 6]
    assert made.wall_ms > 0
    assert made.cpu_s > 0


@pytest.mark.parametrize("policy", [FirstBlockCache(1e9, last_blocks=1), TeaCache(1e9, rescale=(1.0, 0.0))])
def test_the_share_is_that_of_the_blocks_that_ran(policy: Any) -> None:
    pipe, ran = tiny_pipeline(), []
    for block in transformer_blocks(pipe.transformer, HUNYUAN_VIDEO):
        block.attn.register_forward_pre_hook(lambda *_: ran.append(1))
    (batch,) = policies.batches(pipe, PAIRS[:1], 1, first_seed=0)
    made = policies.call(pipe, batch, policy, SIZE)
    tally = Tally(Setting("a", None, policy), steps=len(made.records), reused=sum(r.reused for r in made.records))
    assert tally.computed_blocks(NUM_BLOCKS) == pytest.approx(len(ran) / (SIZE.steps * NUM_BLOCKS))


def test_a_small_run_leaves_record_table_and_picture(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    asked = policies.batches(pipe, PAIRS, 2, first_seed=0)
    rescale = policies.calibrated(pipe, asked[:1], SIZE)
    assert len(rescale) == len(fit_rescale([(1.0, 1.0)] * 6))
    curves = [
        Curve(trade_off.BASELINE, FirstBlockCache, (1e-9, 1e9)),
        Curve("TeaCache", lambda x: TeaCache(x, rescale=rescale), (1e9,)),
    ]
    tallies = policies.measure(pipe, asked, policies.settings(curves), SIZE, Fixed())
    assert [len(tally.psnr) for tally in tallies] == [3, 3, 3, 3]
    assert [tally.reused for tally in tallies] == [0, 0, 12, 12]
    assert {tally.steps for tally in tallies} == {14}
    rows = policies.records(tallies, SIZE, 2, "float32", NUM_BLOCKS, {"run_s": 300.0, "run_cpu_s": 120.0})
    assert [row.notes["psnr"] for row in rows[:2]] == [None, None]
    assert [row.notes["digit"] for row in rows] == pytest.approx([1 / 3] * 4, abs=1e-4)
    record.write_records(policies.NAME, rows, tmp_path)
    text = render_tables.render(
        "".join(f"<!-- table: {name} -->\n<!-- /table -->\n" for name in ("policies", "policies-compared")), tmp_path
    )
    assert "3 prompts in batches of 2, 7 steps, float32: 2 minutes of one core" in text
    assert "| no cache |  | 1.00x |" in text
    assert "| First Block Cache | 1e+09 |" in text
    assert "nothing can be said" in text
    policies.draw(tallies, tmp_path / "p.png", "tiny")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_comparison_is_rendered_from_the_record(tmp_path: Path) -> None:
    notes = {"value": 0.1, "speed_up_low": 1.0, "speed_up_high": 2.0, "psnr_worst": 20.0, "ssim": 0.9, "digit": 0.98}
    rows = [
        record.Record(
            op="cache_policy", shape={"prompts": 3}, dtype="float32", kernel=name, median_ms=1.0, peer="no cache", peer_ms=speed,
            notes=notes | {"psnr": psnr, "speed_up_cpu": speed + 1, "computed_blocks": share},
        )
        for name, psnr, speed, share in [
            ("no cache", None, 1.0, 1.0),
            ("First Block Cache", 40.0, 1.0, 0.6), ("First Block Cache", 20.0, 3.0, 0.4),
            ("TeaCache", 40.0, 1.5, 0.4), ("TeaCache", 20.0, 3.5, 0.2),
            ("AdaCache", 25.0, 3.0, 0.2),
        ]
    ]  # fmt: skip
    record.write_records("policies-cpu", rows, tmp_path)
    text = render_tables.render("<!-- table: policies-compared -->\n<!-- /table -->", tmp_path)
    assert (
        "By wall time, at 30 dB TeaCache is the fastest: 2.50x against 2.00x of First Block Cache, 20.0% less" in text
    )
    assert (
        "By processor time, at 30 dB TeaCache is the fastest: 3.50x against 3.00x of First Block Cache, 14.3%" in text
    )
    assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
        "| TeaCache | 2.50x | +20.0% | 3.50x | 30.0% |",
        "| First Block Cache | 2.00x | +0.0% | 3.00x | 50.0% |",
        "| AdaCache | not reached |  |  |  |",
    ]
