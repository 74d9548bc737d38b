"""What every setting costs in quality on the shipped pipeline, kept: `para-kernels quality` with its own prompts. The
pictures go to ``docs/images/``, the numbers to ``benchmarks/results/``.

    python -m benchmarks.toy_quality

Then how many steps a cache reuses where the rest is rounded. 8-bit attention must keep 35 dB against exact attention,
FP8 linears 30 dB; the exit code is 1 where one does not.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from para_kernels.integrations.diffusers import accelerate, quality_report
from para_kernels.integrations.diffusers.generate import generate
from para_kernels.integrations.diffusers.linears import Fp8Linears
from para_kernels.integrations.diffusers.loading import TOY, TOY_DEFAULTS, load_pipeline

from .record import RESULTS, Check, write_records
from .toy_demo import IMAGES, toy_request

NAME, CACHE_NAME = "toy_quality-cpu", "toy_quality_cache-cpu"
FLOORS = {"attention int8": 35.0, "linears fp8": 30.0, "linears fp8-weight-only": 30.0}  # dB

_FP8 = {"linears": Fp8Linears(keep_originals=True)}
ROUNDED: dict[str, dict[str, Any]] = {  # arguments of `accelerate` beside a cache
    "exact": {},
    "attention int8": {"attention": "int8"},
    "linears fp8": _FP8,
    "both": {"attention": "int8", **_FP8},
}


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), options.steps)
        checks = [_check(job, result) for result in quality_report.run(job)]
        write_records(NAME, checks, options.results)
        write_records(CACHE_NAME, _beside_a_cache(job), options.results)
        options.images.mkdir(parents=True, exist_ok=True)
        shutil.copy(job.out / "quality.png", options.images / "quality.png")
        shutil.copy(job.out / "contact-sheet.png", options.images / "quality-frames.png")
    return int(not all(check.passed for check in checks))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=TOY_DEFAULTS.steps, help=f"(default: {TOY_DEFAULTS.steps})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the record")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the pictures")
    return parser.parse_args()


def _job(out: Path, steps: int) -> quality_report.QualityJob:
    return quality_report.QualityJob(
        TOY, None, torch.device("cpu"), torch.float32, toy_request(steps), quality_report.THRESHOLDS, batch=8, out=out
    )


def _check(job: quality_report.QualityJob, result: quality_report.Result) -> Check:
    """Of one setting: whether it keeps its floor, and all that was seen."""
    quality, floor = result.quality, FLOORS.get(result.setting)
    median_error, largest_error = result.errors or (None, None)
    return Check(
        f"quality, {result.setting}",
        cases=len(job.request.prompts),
        failures=int(floor is not None and quality.psnr < floor),
        dtype=str(job.dtype).removeprefix("torch."),
        notes={
            "floor": floor,
            "psnr": quality.psnr if math.isfinite(quality.psnr) else None,
            "psnr_worst": quality.psnr_worst if math.isfinite(quality.psnr_worst) else None,
            "ssim": quality.ssim,
            "reused": result.reused,
            "steps": result.steps,
            "layer_error_median": median_error,
            "layer_error_largest": largest_error,
        },
    )


def _beside_a_cache(job: quality_report.QualityJob) -> list[Check]:
    """What rounding does to a cache's decisions, which look at differences that it adds to."""
    pipe = load_pipeline(job.model, job.device, job.dtype, job.revision)
    pipe.set_progress_bar_config(disable=True)
    checks = []
    for name, arguments in ROUNDED.items():
        for threshold in job.thresholds:
            handle = accelerate(pipe, cache=threshold, **arguments)
            generate(pipe, job.request)
            records = handle.records
            handle.remove()
            notes = {"rounded": name, "threshold": threshold, "reused": sum(record.reused for record in records)}
            what = f"cache {threshold:g} beside {name}"
            checks.append(Check(what, cases=len(job.request.prompts), notes={**notes, "steps": len(records)}))
    return checks


if __name__ == "__main__":
    sys.exit(main())
