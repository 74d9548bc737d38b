"""``para-kernels demo``: the same prompts through stock diffusers, exact attention and the cache."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_command, add_model, add_sampling, add_video, given, model_of, request_of

DESCRIPTION = """\
Run the same prompts, as one batch, through stock diffusers, through exact attention, in one process and with the
sequence shared out over two, and with First Block Cache at several thresholds. Writes videos/*.mp4, contact-sheet.png,
threshold.png and demo.json to --out, and prints the table of seconds, speed-up, reused steps, and PSNR, SSIM and
largest difference to the stock videos.
"""

EXAMPLES = """\
examples:
  para-kernels demo
  para-kernels demo --quick                      two prompts, two thresholds, fewer steps
  para-kernels demo --rounds 3 --out measured    each setting timed three times, the fastest counts
  para-kernels demo --thresholds 0.05 0.1 0.2 --prompts "a 3 moving up" "a handwritten 8 moving down"
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "demo", "compare stock, exact and cached", DESCRIPTION, EXAMPLES)
    add_model(parser)
    add_sampling(parser)
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="instead of the four that the demo brings")
    parser.add_argument("--thresholds", nargs="+", type=float, metavar="X", help="cache thresholds to compare")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="time each setting N times (default: 1)")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="of the row that spreads the work; 1: none (default: 2)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two prompts, two thresholds, 10 steps: a look, not a measure"
    )
    add_video(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), metavar="DIR", help="folder to write (default: demo-output)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from .. import demo
    from ..loading import defaults_for, resolve_device

    defaults = defaults_for(options.model)
    prompts = demo.QUICK_PROMPTS if options.quick else demo.PROMPTS
    thresholds = demo.QUICK_THRESHOLDS if options.quick else demo.THRESHOLDS
    steps = demo.QUICK_STEPS if options.quick else defaults.steps
    demo.run(
        demo.DemoJob(
            **model_of(options, resolve_device(options.device)),
            request=request_of(options, defaults, prompts, steps),
            thresholds=tuple(given(options.thresholds, thresholds)),
            rounds=options.rounds,
            out=options.out,
            fps=given(options.fps, defaults.fps),
            zoom=given(options.zoom, defaults.zoom),
            processes=options.processes,
        )
    )
