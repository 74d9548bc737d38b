"""The search for a cache: by a fake evaluation whose answer is known, by real runs of a tiny pipeline, by the command."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")
pytest.importorskip("skimage")

from PIL import Image
from rich.console import Console
from tiny_hunyuan import PROMPTS, tiny_pipeline

from para_kernels import AdaCache, FirstBlockCache, TeaCache
from para_kernels.cache import Policy, fit_rescale
from para_kernels.integrations.diffusers import Handle, accelerate, cli, pareto, tune
from para_kernels.integrations.diffusers.generate import Request, generate
from para_kernels.integrations.diffusers.quality import Quality
from para_kernels.integrations.diffusers.tune import Candidate, Trial, TuneJob

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CANDIDATE = Candidate("First Block Cache", FirstBlockCache(1.0), 0.01, 1.0)
REQUEST = Request(prompts=tuple(PROMPTS), height=48, width=32, num_frames=5, steps=7, guidance=6.0)


def quality(psnr: float, ssim: float = 0.9) -> Quality:
    return Quality(psnr=psnr, psnr_worst=psnr, ssim=ssim, max_abs_diff=0.0)


def trial(psnr: float, seconds: float, *, candidate: str = "a", threshold: float = 0.1, reused: int = 5) -> Trial:
    """Against an uncached run of 10 seconds."""
    return Trial(candidate, FirstBlockCache(threshold), quality(psnr), seconds, 10.0 / seconds, reused, steps=10)


def job(**changes: Any) -> TuneJob:
    given_: dict[str, Any] = {
        "model": "toy", "revision": None, "device": CPU, "dtype": torch.float32, "request": REQUEST, "metric": "psnr",
        "floor": 30.0, "evaluations": 6, "rounds": 1, "batch": 8, "out": Path("out"),
    }  # fmt: skip
    return TuneJob(**(given_ | changes))


def keeps_30_db(found: Quality) -> bool:
    return found.psnr >= 30.0


# --- the search -------------------------------------------------------------------------------------------------------


class Fake:
    """Instead of `Trials`: quality falls and speed rises with the threshold, and at `limit` the PSNR is 30 dB."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.asked: list[float] = []

    def run(self, candidate: Candidate, threshold: float) -> tuple[Trial, np.ndarray]:
        self.asked.append(threshold)
        psnr = 30.0 - 20.0 * math.log10(threshold / self.limit)
        found = trial(psnr, 10.0 / (1.1 + threshold), candidate=candidate.name, threshold=threshold)
        return replace(found, policy=candidate.at(threshold)), np.empty(0)


@settings(max_examples=50, deadline=None)
@given(limit=st.floats(0.011, 0.99))
def test_the_search_finds_the_highest_threshold_that_keeps_the_quality(limit: float) -> None:
    fake = Fake(limit)
    tried = tune.search(fake, CANDIDATE, keeps_30_db, evaluations=10)
    chosen = tune.best(tried, keeps_30_db)
    assert len(tried) == len(fake.asked) == 10
    assert chosen.policy.threshold == max(x for x in fake.asked if x <= limit)
    # Ten halvings of two decades, and three digits of the threshold.
    assert limit / 1.02 <= chosen.policy.threshold <= limit


def test_each_threshold_halves_what_is_left() -> None:
    fake = Fake(0.05)
    tune.search(fake, CANDIDATE, keeps_30_db, evaluations=4)
    assert fake.asked == [0.1, 0.0316, 0.0562, 0.0421]


@pytest.mark.parametrize(("limit", "end"), [(1e-9, CANDIDATE.low), (1e9, CANDIDATE.high)])
def test_the_search_goes_to_the_end_of_the_range_and_not_beyond(limit: float, end: float) -> None:
    fake = Fake(limit)
    tune.search(fake, CANDIDATE, keeps_30_db, evaluations=9)
    assert fake.asked[-1] == pytest.approx(end, rel=0.02)
    assert all(CANDIDATE.low <= threshold <= CANDIDATE.high for threshold in fake.asked)


def test_the_best_is_the_fastest_of_those_that_keep_the_quality() -> None:
    slow, fast, bad = trial(40.0, 5.0), trial(31.0, 4.0), trial(29.9, 1.0)
    assert tune.best([slow, fast, bad], keeps_30_db) is fast
    assert tune.best([bad], keeps_30_db) is None
    assert tune.best([], keeps_30_db) is None


@pytest.mark.parametrize(
    "useless",
    [trial(math.inf, 9.9, reused=0), trial(40.0, 10.1), trial(40.0, 10.0), trial(math.nan, 1.0)],
    ids=["nothing reused", "slower than no cache", "as slow as no cache", "no quality"],
)
def test_what_is_no_better_than_no_cache_is_not_recommended(useless: Trial) -> None:
    assert tune.best([useless], job().keeps) is None
    kept = trial(31.0, 9.95)
    assert tune.best([useless, kept], job().keeps) is kept


# --- candidates -------------------------------------------------------------------------------------------------------


def test_without_a_polynomial_there_is_no_teacache() -> None:
    with_it, without = tune.candidates((1.0, 0.0)), tune.candidates(None)
    assert [c for c in with_it if not isinstance(c.policy, TeaCache)] == without
    assert {c.policy.rescale for c in with_it if isinstance(c.policy, TeaCache)} == {(1.0, 0.0)}
    assert {type(c.policy) for c in with_it} == {FirstBlockCache, AdaCache, TeaCache}
    assert len({c.name for c in with_it}) == len(with_it)


@pytest.mark.parametrize("candidate", tune.candidates((0.5, 1.0, 0.0)), ids=lambda candidate: candidate.name)
def test_a_candidate_differs_in_its_threshold_alone(candidate: Candidate) -> None:
    assert candidate.at(candidate.policy.threshold) == candidate.policy
    found = candidate.thresholds(5)
    assert found == sorted(set(found))
    assert (len(found), found[0], found[-1]) == (5, candidate.low, candidate.high)
    for threshold in found:
        assert candidate.at(threshold).threshold == threshold


@pytest.mark.parametrize(
    "policy",
    [
        FirstBlockCache(0.06),
        FirstBlockCache(1 / 3, taylor_order=2, last_blocks=1, max_accumulated_error=0.5),
        TeaCache(0.1, rescale=(1e-7, -2.5, 1 / 3), warmup_steps=2),
        AdaCache(1, codebook=((0.5, 2),)),
    ],
    ids=lambda policy: policy.title,
)
def test_the_line_of_python_is_the_policy(policy: Policy) -> None:
    names = {"FirstBlockCache": FirstBlockCache, "TeaCache": TeaCache, "AdaCache": AdaCache}
    line = tune.python_line(policy)
    assert eval(line, names | {"accelerate": lambda pipe, cache: cache, "pipe": None}) == policy


def test_a_line_of_python_says_only_what_is_not_usual() -> None:
    assert tune.python_line(FirstBlockCache(0.06)) == "accelerate(pipe, cache=FirstBlockCache(0.06))"
    assert tune.python_line(AdaCache(0.5, taylor_order=1)) == "accelerate(pipe, cache=AdaCache(0.5, taylor_order=1))"


def test_batches_hold_every_prompt_with_its_own_seed() -> None:
    request = replace(REQUEST, prompts=("a", "b", "c", "d", "e"), seed=7)
    found = tune.batches(request, 2)
    assert [(part.prompts, part.seed) for part in found] == [(("a", "b"), 7), (("c", "d"), 9), (("e",), 11)]
    assert tune.batches(request, 5) == [request]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "lpips"}, r"metric: 'lpips'; must be one of psnr, ssim"),
        ({"floor": 0.0}, r"floor: 0\.0; must be above 0 and below inf for psnr"),
        ({"floor": math.nan}, r"floor: nan"),
        ({"floor": math.inf}, r"floor: inf"),
        ({"metric": "ssim", "floor": 1.0}, r"floor: 1\.0; must be above 0 and below 1 for ssim"),
        ({"metric": "ssim", "floor": -0.5}, r"floor: -0\.5"),
        ({"evaluations": 0}, r"evaluations: 0; must be at least 1"),
        ({"rounds": 0}, r"rounds: 0; must be at least 1"),
        ({"batch": -1}, r"batch: -1; must be at least 1"),
        ({"request": replace(REQUEST, steps=0)}, r"steps: 0"),
        ({"request": replace(REQUEST, prompts=())}, r"prompt: \[\]"),
    ],
)
def test_bad_input_is_named_before_anything_is_done(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        tune.run(job(out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--floor", "-3"], ["--metric", "ssim", "--floor", "30"], ["--evaluations", "0"], ["--batch", "0"]],
    ids=lambda arguments: arguments[-2],
)
def test_the_command_refuses_bad_input_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"para-kernels tune: error: {arguments[-2].removeprefix('--')}: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- the picture ------------------------------------------------------------------------------------------------------

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(points=POINTS)
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in points)

    assert pareto.pareto_front(points) == sorted({point for point in points if not beaten(point)})


def test_the_picture_shows_every_series_the_floor_and_the_choice(tmp_path: Path) -> None:
    series = {"one": [(42.0, 1.2), (28.0, 2.1)], "other": [(math.inf, 1.0), (31.0, 1.9)]}
    path = tmp_path / "pareto.png"
    pareto.pareto_plot(path, series, metric="psnr", floor=30.0, title="2 prompts", chosen=(31.0, 1.9))
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue, orange, grey, black = (31, 119, 180), (255, 127, 14), (128, 128, 128), (0, 0, 0)
    for colour in (blue, orange, grey, black):
        assert (np.abs(image - colour).sum(-1) < 90).sum() > 100, colour


def test_a_floor_that_only_equal_videos_keep_is_drawn(tmp_path: Path) -> None:
    pareto.pareto_plot(tmp_path / "p.png", {"one": [(math.inf, 1.0)]}, metric="psnr", floor=90.0, title="")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("series", [{}, {"one": []}])
def test_a_picture_of_nothing_is_refused(series: dict[str, list[pareto.Point]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="series: got"):
        pareto.pareto_plot(tmp_path / "p.png", series, metric="psnr", floor=30.0, title="")
    assert not list(tmp_path.iterdir())


# --- the table and the report -----------------------------------------------------------------------------------------

TRIED = [
    trial(45.0, 8.0, candidate="a", threshold=0.05),
    trial(32.0, 5.0, candidate="a", threshold=0.2),
    trial(20.0, 4.0, candidate="a", threshold=0.4),
    trial(10.0, 2.0, candidate="b"),
]
UNCACHED = tune.Trials(pipe=None, requests=[], seconds=10.0)


def printed(found: object) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(found)
    return console.file.getvalue()


def test_the_table_has_the_best_of_every_candidate() -> None:
    text = printed(tune.table(job(), UNCACHED, TRIED, TRIED[1]))
    assert "fastest with PSNR >= 30; uncached 10.00 s" in text
    rows = {line.split()[1]: line.split() for line in text.splitlines() if line.split()[1:2] in (["a"], ["b"])}
    assert [cell for cell in rows["a"] if cell != "│"] == [
        "a",
        "0.2",
        "5.00",
        "2.00x",
        "5/10",
        "32.0",
        "32.0",
        "0.9000",
    ]
    assert [cell for cell in rows["b"] if cell != "│"] == ["b", *["-"] * 7]


def test_the_conclusion_is_the_line_or_no_cache() -> None:
    said = tune.conclusion(job(), TRIED[1])
    assert said.split("\n")[1:] == [
        "from para_kernels import FirstBlockCache",
        "accelerate(pipe, cache=FirstBlockCache(0.2))",
    ]
    assert "PSNR 30" in tune.conclusion(job(), None)
    assert "use none" in tune.conclusion(job(), None)


def test_the_report_is_json_without_infinities() -> None:
    tried = [trial(math.inf, 9.0), *TRIED]
    report = json.loads(json.dumps(tune.report(job(), UNCACHED, tried, tried[2]), allow_nan=False))
    assert [row["psnr"] for row in report["trials"]] == [None, 45.0, 32.0, 20.0, 10.0]
    assert report["python"] == "accelerate(pipe, cache=FirstBlockCache(0.2))"
    assert (report["uncached_seconds"], report["floor"], report["prompts"]) == (10.0, 30.0, PROMPTS)
    assert tune.report(job(), UNCACHED, tried, None)["python"] is None


# --- real runs --------------------------------------------------------------------------------------------------------


def test_trials_compare_with_the_uncached_videos_of_the_same_prompts() -> None:
    pipe, calls = tiny_pipeline(), []
    trials = tune.Trials(pipe, tune.batches(REQUEST, 2), rounds=2, on_call=lambda: calls.append(1))
    trials.run_reference()
    assert (trials.calls, len(calls)) == (4, 4)
    never, same = trials.run(CANDIDATE, 1e-9)
    always, other = trials.run(CANDIDATE, 1e9)
    assert (never.reused, never.steps, never.quality.psnr) == (0, 14, math.inf)
    assert (always.reused, always.steps) == (12, 14)
    assert always.quality.psnr < 60.0
    assert np.array_equal(same, trials.reference)
    assert len(calls) == 12
    accelerate(pipe, cache=FirstBlockCache(1e9))
    parts = [generate(pipe, request).videos for request in tune.batches(REQUEST, 2)]
    assert np.array_equal(other, np.concatenate(parts))
    for found in (never, always):
        assert found.speed_up == pytest.approx(trials.seconds / found.seconds)


def test_the_fastest_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seconds = tiny_pipeline(), iter([9.0, 3.0, 4.0, 1.0, 2.0, 3.0])

    def timed(pipe: Any, request: Request) -> Any:
        return replace(generate(pipe, request), seconds=next(seconds))

    trials = tune.Trials(pipe, [replace(REQUEST, prompts=("two",), steps=1)], rounds=2)
    monkeypatch.setattr(tune, "generate", timed)
    trials.run_reference()  # one call to warm up, then two
    assert trials.seconds == 3.0
    assert trials.run(CANDIDATE, 1.0)[0].seconds == 1.0


def test_calibration_fits_the_polynomial_of_the_pipe() -> None:
    pipe = tiny_pipeline()
    trials = tune.Trials(pipe, [REQUEST])
    trials.calibrate([REQUEST])
    policy = Handle.on(pipe.transformer).settings.cache
    assert len(policy.pairs) == REQUEST.steps - 1
    assert trials.rescale == fit_rescale(policy.pairs)
    assert trials.without_teacache is None


@pytest.mark.parametrize(
    ("pipe", "steps", "reason"),
    [
        (lambda: tiny_pipeline(), 3, "pairs: got 2 that are finite, allowed are 5 or more"),
        (lambda: tiny_pipeline(num_layers=0), 7, "looks at the first block's modulated input"),
    ],
    ids=["few steps", "no modulated input"],
)
def test_where_there_is_no_polynomial_it_says_why(pipe: Callable[[], Any], steps: int, reason: str) -> None:
    trials = tune.Trials(pipe(), [REQUEST])
    trials.calibrate([replace(REQUEST, steps=steps, prompts=("two",))])
    assert trials.rescale is None
    assert reason in (trials.without_teacache or "")


def test_a_call_that_fails_while_calibrating_is_not_hidden() -> None:
    trials = tune.Trials(tiny_pipeline(), [REQUEST])
    with pytest.raises(ValueError, match="height: 47"):
        trials.calibrate([replace(REQUEST, height=47)])


# --- the command ------------------------------------------------------------------------------------------------------


def test_help_describes_the_command_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["tune", "--help"])
    shown = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "usage: para-kernels tune" in shown
    assert "examples:" in shown
    commands = next(action for action in cli._parser()._actions if action.dest == "command")
    assert isinstance(commands.choices, dict)
    assert all(action.help for action in commands.choices["tune"]._actions)


def tuned(out: Path, *arguments: str) -> dict[str, Any]:
    assert cli.main(["tune", "--out", str(out), "--device", "cpu", *arguments]) == 0
    assert {path.name for path in out.iterdir()} == {"pareto.png", "tune.json"}
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "tune.json").read_text())


def test_the_command_on_the_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a handwritten 7 moving to the left", "a 3 moving up"]
    small = ["--steps", "3", "--height", "32", "--width", "32", "--frames", "5", "--evaluations", "1"]
    report = tuned(tmp_path / "out", "--prompts", *prompts, *small, "--floor", "5")
    shown = capsys.readouterr().out
    assert report["prompts"] == prompts
    assert (report["metric"], report["floor"], report["steps"], report["rescale"]) == ("psnr", 5.0, 3, None)
    assert [row["candidate"] for row in report["trials"]] == [c.name for c in tune.candidates(None)]
    assert all(row["steps"] == 3 and row["seconds"] > 0 for row in report["trials"])
    assert "TeaCache was not tried: pairs: got 2" in shown
    assert (report["python"] or "use none") in shown


def test_the_command_tries_teacache_with_the_polynomial_it_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    size = ["--height", "48", "--width", "32", "--frames", "5", "--steps", "6", "--evaluations", "1", "--batch", "1"]
    options = ["--model", str(tmp_path / "model"), "--prompts", *PROMPTS[:2], "--metric", "ssim", *size]
    report = tuned(tmp_path / "out", *options)
    wanted = tune.candidates(tuple(report["rescale"]))
    assert [row["candidate"] for row in report["trials"]] == [c.name for c in wanted]
    assert report["floor"] == 0.97
    assert all(row["steps"] == 2 * 6 for row in report["trials"])
    assert "TeaCache was not tried" not in capsys.readouterr().out
