"""``para-kernels tune``: the fastest cache that keeps a quality."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_command, add_model, add_sampling, given, model_of, request_of

DESCRIPTION = """\
Search every cache policy for the highest threshold that keeps a quality, on your prompts, and say which one is fastest:
First Block Cache, TeaCache (its polynomial is fitted on the same prompts) and AdaCache, with and without Taylor
extrapolation. Prints a table and the line of Python to use; writes pareto.png and tune.json to --out.
"""

EXAMPLES = """\
examples:
  para-kernels tune                                   PSNR of at least 30 dB to the uncached videos
  para-kernels tune --metric ssim --floor 0.97
  para-kernels tune --model hunyuanvideo-community/HunyuanVideo --height 544 --width 960 --frames 61 --batch 1 \\
      --prompts "a cat walks on the grass, realistic" "rain on a tin roof, close up"
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "tune", "find the fastest cache for a quality", DESCRIPTION, EXAMPLES)
    add_model(parser)
    add_sampling(parser)
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="yours, instead of the demo's four")
    parser.add_argument(
        "--metric", choices=("psnr", "ssim"), default="psnr", help="against the uncached videos (default: psnr)"
    )
    parser.add_argument("--floor", type=float, metavar="X", help="quality to keep (default: psnr 30, ssim 0.97)")
    parser.add_argument(
        "--evaluations", type=int, default=6, metavar="N", help="thresholds tried for each policy (default: 6)"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="time each N times, the fastest counts (default: 1)"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts in a call (default: 8)")
    parser.add_argument(
        "--out", type=Path, default=Path("tune-output"), metavar="DIR", help="folder to write (default: tune-output)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from .. import demo, tune
    from ..loading import defaults_for, resolve_device

    defaults = defaults_for(options.model)
    tune.run(
        tune.TuneJob(
            **model_of(options, resolve_device(options.device)),
            request=request_of(options, defaults, demo.PROMPTS, defaults.steps),
            metric=options.metric,
            floor=given(options.floor, 30.0 if options.metric == "psnr" else 0.97),
            evaluations=options.evaluations,
            rounds=options.rounds,
            batch=options.batch,
            out=options.out,
        )
    )
