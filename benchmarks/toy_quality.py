"""What every setting costs in quality on the shipped pipeline, kept: `para-kernels quality` with its own prompts. The
pictures go to ``docs/images/``, the numbers to ``benchmarks/results/``.

    python -m benchmarks.toy_quality

8-bit attention must keep 35 dB against exact attention, FP8 linears 30 dB; the exit code is 1 where one does not.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from para_kernels.integrations.diffusers import demo, quality_report
from para_kernels.integrations.diffusers.generate import Request
from para_kernels.integrations.diffusers.loading import TOY, TOY_DEFAULTS

from .record import RESULTS, Check, write_records
from .toy_demo import IMAGES

NAME = "toy_quality-cpu"
FLOORS = {"attention int8": 35.0, "linears fp8": 30.0, "linears fp8-weight-only": 30.0}  # dB


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), options.steps)
        checks = [_check(job, result) for result in quality_report.run(job)]
        write_records(NAME, checks, options.results)
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
    request = Request(
        prompts=demo.PROMPTS,
        height=TOY_DEFAULTS.height,
        width=TOY_DEFAULTS.width,
        num_frames=TOY_DEFAULTS.num_frames,
        steps=steps,
        guidance=TOY_DEFAULTS.guidance,
    )
    return quality_report.QualityJob(
        TOY, None, torch.device("cpu"), torch.float32, request, quality_report.THRESHOLDS, batch=8, out=out
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


if __name__ == "__main__":
    sys.exit(main())
