"""``para-kernels quality``: what every setting that changes the output does to it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_command, add_model, add_sampling, given, model_of, request_of

DESCRIPTION = """\
Run the same prompts from the same noise under every setting that changes the output (the cache at several thresholds,
linears in FP8 where torchao is installed, 8-bit attention where there is one), and under diffusers' own attention, and
compare with exact attention. Prints a table, and writes quality.md, quality.json, quality.png and contact-sheet.png to
--out.
"""

EXAMPLES = """\
how to read it:
  PSNR, dB      higher is nearer to the exact video. 10 dB more is a tenth of the squared error; from about 40 dB on,
                differences are hard to see in two videos side by side, below 25 dB things may be somewhere else
  worst video   a mean hides the one prompt that came out differently
  SSIM          1 for equal frames; falls with lost or moved structure rather than with a change of brightness
  layer error   of each attention layer against float64, on the input that it really gets, at the first step. It tells
                rounding (a setting's own, spread over all layers) from a layer that goes wrong (one that stands out).
                One rounding to bfloat16 errs by up to 0.4 %, to e4m3 by up to 6 %; sums of many average it
  None of them says which of two videos is the better one: look at contact-sheet.png.

examples:
  para-kernels quality                                the model that ships with the package
  para-kernels quality --quick                        two prompts, few steps: a look, not a measure
  para-kernels quality --thresholds 0.04 0.08 --prompts "a 3 moving up" "a handwritten 8 moving down"
  para-kernels quality --model hunyuanvideo-community/HunyuanVideo --height 320 --width 512 --frames 17 --batch 1 \\
      --prompts "a cat walks on the grass, realistic"
      layers are measured up to 4,096 tokens of video, which this size keeps below
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "quality", "what each setting costs in quality", DESCRIPTION, EXAMPLES)
    add_model(parser)
    add_sampling(parser)
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="yours, instead of the demo's four")
    parser.add_argument("--thresholds", nargs="*", type=float, metavar="X", help="of the cache; none: without it")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="prompts in a call (default: 8)")
    parser.add_argument("--quick", action="store_true", help="two prompts, one threshold, 6 steps")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quality-output"),
        metavar="DIR",
        help="folder to write (default: quality-output)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from .. import demo, quality_report
    from ..loading import defaults_for, resolve_device

    defaults = defaults_for(options.model)
    prompts = demo.QUICK_PROMPTS if options.quick else demo.PROMPTS
    thresholds = quality_report.THRESHOLDS[-1:] if options.quick else quality_report.THRESHOLDS
    steps = quality_report.QUICK_STEPS if options.quick else defaults.steps
    quality_report.run(
        quality_report.QualityJob(
            **model_of(options, resolve_device(options.device)),
            request=request_of(options, defaults, prompts, steps),
            thresholds=tuple(given(options.thresholds, thresholds)),
            batch=options.batch,
            out=options.out,
        )
    )
