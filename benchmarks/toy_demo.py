"""The demo on the shipped pipeline, kept: its pictures go to ``docs/images/``, its numbers to ``benchmarks/results/``.

python -m benchmarks.toy_demo --rounds 2
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from para_kernels.integrations.diffusers import demo
from para_kernels.integrations.diffusers.generate import Request
from para_kernels.integrations.diffusers.loading import TOY, TOY_DEFAULTS

from .record import REPOSITORY, RESULTS, Record, write_records

IMAGES = REPOSITORY / "docs" / "images"
NAME = "toy_demo"


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), options.rounds, options.steps)
        rows = demo.run(job)
        write_records(NAME, [_record(job, row, rows[0]) for row in rows], options.results)
        options.images.mkdir(parents=True, exist_ok=True)
        shutil.copy(job.out / "contact-sheet.png", options.images / "demo.png")
        shutil.copy(job.out / "threshold.png", options.images / "threshold.png")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="timed calls of each setting (default: 2)")
    parser.add_argument("--steps", type=int, default=TOY_DEFAULTS.steps, help=f"(default: {TOY_DEFAULTS.steps})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the record")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder for the pictures")
    return parser.parse_args()


def _job(out: Path, rounds: int, steps: int) -> demo.DemoJob:
    return demo.DemoJob(
        model=TOY,
        revision=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        request=toy_request(steps),
        thresholds=demo.THRESHOLDS,
        rounds=rounds,
        out=out,
        fps=TOY_DEFAULTS.fps,
        zoom=TOY_DEFAULTS.zoom,
    )


def toy_request(steps: int) -> Request:
    """The demo's prompts, at the size that the shipped pipeline was trained for."""
    return Request(
        prompts=demo.PROMPTS,
        height=TOY_DEFAULTS.height,
        width=TOY_DEFAULTS.width,
        num_frames=TOY_DEFAULTS.num_frames,
        steps=steps,
        guidance=TOY_DEFAULTS.guidance,
    )


def _record(job: demo.DemoJob, row: demo.Row, stock: demo.Row) -> Record:
    numbers = demo.json_row(row)
    request = job.request
    return Record(
        op=NAME,
        shape={
            "prompts": len(request.prompts),
            "height": request.height,
            "width": request.width,
            "frames": request.num_frames,
            "steps": request.steps,
        },
        dtype=str(job.dtype).removeprefix("torch."),
        kernel=row.setting,
        median_ms=row.seconds * 1e3,
        peer=stock.setting,
        peer_ms=stock.seconds * 1e3,
        notes={
            key: numbers[key]
            for key in ("threshold", "speed_up_over_exact", "hits", "psnr", "psnr_worst", "ssim", "max_abs_diff")
        },
    )


if __name__ == "__main__":
    sys.exit(main())
