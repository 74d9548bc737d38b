"""The ``para-kernels`` command: arguments in, one call out.

What a command needs is imported after parsing: a mistyped option is answered before any model code is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from .generate import Request
    from .loading import GenerationDefaults

RANK_FAILED = 1
USER_ERROR = 2

DESCRIPTION = """\
Text to video with diffusers, on exact variable-length attention and First Block Cache.

Five commands:
  generate   a prompt goes in, an mp4 comes out
  demo       the same prompts through stock diffusers, exact attention and the cache: videos, pictures, a table
  tune       which cache policy, at which threshold, is fastest without falling below a quality
  quality    what every setting that changes the output does to the videos and to each attention layer
  doctor     what this machine has and which kernels will run on it
"""

EXAMPLES = """\
examples:
  para-kernels generate "a handwritten 7 moving to the left"
  para-kernels generate "a 3 moving up" "a handwritten 8 moving to the right" --cache 0.1 --output digits.mp4
  para-kernels generate "a cat walks on the grass, realistic" --model hunyuanvideo-community/HunyuanVideo --cache auto
  torchrun --nproc-per-node 2 -m para_kernels generate "a handwritten 7 moving to the left"
  para-kernels demo --out demo-output
  para-kernels tune --metric psnr --floor 30
  para-kernels quality --quick
  para-kernels doctor
"""

GENERATE_DESCRIPTION = """\
Generate one video per prompt and print what every denoising step did.

Several prompts run as one batch; padded text is never computed, and prompt i starts from the noise of seed + i, so
that each video is the one it would be alone. The default model is the small one that ships with the package: it draws
the digits 0 to 9 moving in eight directions or standing still, in 64 x 64 pixels, in seconds on a CPU.
"""

GENERATE_EXAMPLES = """\
examples:
  para-kernels generate "a handwritten 7 moving to the left"
      exact attention, no cache: the video that stock diffusers makes
  para-kernels generate "a 3 moving up" "a 5 moving down" --cache 0.1 --output digits.mp4
      two videos, digits-1.mp4 and digits-2.mp4, reusing steps that change little
  para-kernels generate "a cat walks on the grass" --model hunyuanvideo-community/HunyuanVideo \\
      --height 544 --width 960 --frames 61 --steps 30 --cache auto
      the real model, from the Hugging Face hub or from a directory
  para-kernels generate "a 7 moving to the left" --attention stock --output stock.npy
      diffusers' own attention, and the very numbers of its frames, to compare with
  para-kernels generate "a 7 moving to the left" --attention int8
      attention in 8 bits: faster on large models, slightly another video
  para-kernels generate "a cat walks on the grass" --model hunyuanvideo-community/HunyuanVideo --linears fp8
      matrix products in FP8: half the memory for the weights; changes the video slightly
  torchrun --nproc-per-node 2 -m para_kernels generate "a 7 moving to the left"
      the same video on two GPUs, or two processes; --ring, --ulysses and --batch say how it is split

--cache THRESHOLD: a step is reused while the first block's output changed by less than THRESHOLD (relative) since the
last computed step. Higher is faster and further from the uncached video; 0 never reuses; auto is the model's default.
"""

DEMO_DESCRIPTION = """\
Run the same prompts, as one batch, through stock diffusers, through exact attention, in one process and with the
sequence shared out over two, and with First Block Cache at several thresholds. Writes videos/*.mp4, contact-sheet.png,
threshold.png and demo.json to --out, and prints the table of seconds, speed-up, reused steps, and PSNR, SSIM and
largest difference to the stock videos.
"""

DEMO_EXAMPLES = """\
examples:
  para-kernels demo
  para-kernels demo --quick                      two prompts, two thresholds, fewer steps
  para-kernels demo --rounds 3 --out measured    each setting timed three times, the fastest counts
  para-kernels demo --thresholds 0.05 0.1 0.2 --prompts "a 3 moving up" "a handwritten 8 moving down"
"""

TUNE_DESCRIPTION = """\
Search every cache policy for the highest threshold that keeps a quality, on your prompts, and say which one is fastest:
First Block Cache, TeaCache (its polynomial is fitted on the same prompts) and AdaCache, with and without Taylor
extrapolation. Prints a table and the line of Python to use; writes pareto.png and tune.json to --out.
"""

TUNE_EXAMPLES = """\
examples:
  para-kernels tune                                   PSNR of at least 30 dB to the uncached videos
  para-kernels tune --metric ssim --floor 0.97
  para-kernels tune --model hunyuanvideo-community/HunyuanVideo --height 544 --width 960 --frames 61 --batch 1 \\
      --prompts "a cat walks on the grass, realistic" "rain on a tin roof, close up"
"""

QUALITY_DESCRIPTION = """\
Run the same prompts from the same noise under every setting that changes the output (the cache at several thresholds,
linears in FP8 where torchao is installed, 8-bit attention where there is one), and under diffusers' own attention, and
compare with exact attention. Prints a table, and writes quality.md, quality.json, quality.png and contact-sheet.png to
--out.
"""

QUALITY_EXAMPLES = """\
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

DOCTOR_DESCRIPTION = """\
Print the versions of what is installed, whether the C++ extension is built, every GPU, which attention kernel runs for
which dtype and head dimension and why, and what is missing and how to get it. Sends nothing anywhere.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 1 another rank failed, 2 bad input, 130 interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError) as error:
        return _said(options.command, error, USER_ERROR)
    except RuntimeError as error:
        from para_kernels.parallel import RankFailure

        if not isinstance(error, RankFailure):
            raise
        return _said(options.command, error, RANK_FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _said(command: str, error: Exception, code: int) -> int:
    """The error in one line; returns the exit code."""
    print(f"{_rank()}para-kernels {command}: error: {_one_line(error)}", file=sys.stderr, flush=True)
    return code


def _rank() -> str:
    """Under torchrun, which rank speaks."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"[rank {os.environ.get('RANK', '?')}] " if several else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Parser(argparse.ArgumentParser):
    """Errors are one line; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="para-kernels",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands)
    _add_demo(commands)
    _add_tune(commands)
    _add_quality(commands)
    _add_doctor(commands)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "generate", "make videos from prompts", GENERATE_DESCRIPTION, GENERATE_EXAMPLES)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to show; several make a batch")
    _add_model(parser)
    _add_sampling(parser)
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show; takes effect with --cfg above 1")
    parser.add_argument(
        "--cfg",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="true classifier-free guidance, two passes per step (default: 1, off)",
    )
    parser.add_argument(
        "--cache", type=_cache, default=None, metavar="THRESHOLD|auto|off", help="First Block Cache (default: off)"
    )
    parser.add_argument(
        "--warmup-steps", type=int, default=0, metavar="N", help="always compute the first N steps (default: 0)"
    )
    parser.add_argument(
        "--max-consecutive-hits",
        type=int,
        metavar="N",
        help="compute after N reused steps in a row (default: no limit)",
    )
    parser.add_argument(
        "--attention",
        choices=("exact", "int8", "stock"),
        default="exact",
        help="this package's attention, in 16 or in 8 bits, or diffusers' own (default: exact)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the transformer's blocks, once for every size of video"
    )
    parser.add_argument(
        "--graphs", action="store_true", help="record forwards as CUDA graphs: a GPU does not wait for Python"
    )
    parser.add_argument(
        "--linears",
        choices=("fp8", "fp8-weight-only"),
        help="linears in FP8, for speed and memory or for memory alone; needs torchao (default: the model's own dtype)",
    )
    _add_parallel(parser)
    parser.add_argument("--one-by-one", action="store_true", help="a call per prompt instead of one batch")
    _add_video(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("video.mp4"),
        metavar="NAME.mp4|NAME.npy",
        help="video to write (default: video.mp4); npy: the very frames, float32 in [0, 1], neither zoomed nor coded",
    )
    parser.set_defaults(run=_generate)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "demo", "compare stock, exact and cached", DEMO_DESCRIPTION, DEMO_EXAMPLES)
    _add_model(parser)
    _add_sampling(parser)
    parser.add_argument("--prompts", nargs="+", metavar="PROMPT", help="instead of the four that the demo brings")
    parser.add_argument("--thresholds", nargs="+", type=float, metavar="X", help="cache thresholds to compare")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="time each setting N times (default: 1)")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="of the row that spreads the work; 1: none (default: 2)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two prompts, two thresholds, 10 steps: a look, not a measure"
    )
    _add_video(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), metavar="DIR", help="folder to write (default: demo-output)"
    )
    parser.set_defaults(run=_demo)


def _add_tune(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "tune", "find the fastest cache for a quality", TUNE_DESCRIPTION, TUNE_EXAMPLES)
    _add_model(parser)
    _add_sampling(parser)
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
    parser.set_defaults(run=_tune)


def _add_quality(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "quality", "what each setting costs in quality", QUALITY_DESCRIPTION, QUALITY_EXAMPLES)
    _add_model(parser)
    _add_sampling(parser)
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
    parser.set_defaults(run=_quality)


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "doctor", "what this machine has and will use", DOCTOR_DESCRIPTION, "")
    parser.set_defaults(run=_doctor)


def _command(
    commands: argparse._SubParsersAction, name: str, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="toy", metavar="PATH_OR_ID", help="a pipeline's directory or Hugging Face id (default: toy)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hugging Face hub")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: bf16 on a GPU, else fp32"
    )


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("under torchrun", "how the work is split; ring x ulysses x batch is all ranks")
    group.add_argument("--parallel", choices=("auto",), help="chosen from the model and the video's size (the default)")
    group.add_argument("--ring", type=int, metavar="N", help="N ranks share a sequence, keys and values go round")
    group.add_argument("--ulysses", type=int, metavar="N", help="N ranks share a sequence and exchange heads for rows")
    group.add_argument("--batch", type=int, metavar="N", help="N groups of ranks share out the prompts of a batch")
    group.add_argument(
        "--transport",
        choices=("auto", "peer", "host", "collective"),
        help="how keys and values travel (default: auto, the fastest there is)",
    )
    group.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="of waiting for another rank before all end (default: 120)"
    )
    group.add_argument(
        "--no-parallel-vae",
        action="store_true",
        help="every rank decodes the whole video; sharing it out tiles it, which changes it slightly",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: toy 30, others 50)")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="multiple of 16 (default: toy 64, others 720)")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="multiple of 16 (default: toy 64, others 1280)")
    parser.add_argument("--frames", type=int, metavar="N", help="multiple of 4 plus 1 (default: toy 17, others 129)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="embedded guidance (default: 6)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first prompt's noise (default: 0)")


def _add_video(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fps", type=int, metavar="N", help="frames per second (default: toy 8, others 24)")
    parser.add_argument("--zoom", type=int, metavar="N", help="enlarge each pixel N times (default: toy 4, others 1)")


def _cache(text: str) -> float | bool | None:
    """``off`` -> None, ``auto`` -> True (the model's default threshold), a number -> itself."""
    if text in ("off", "auto"):
        return True if text == "auto" else None
    try:
        threshold = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; must be a threshold of at least 0, auto or off") from None
    if not 0.0 <= threshold < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; must be a threshold of at least 0, auto or off")
    return threshold


def _generate(options: argparse.Namespace) -> None:
    from . import generate, processes
    from .loading import defaults_for, resolve_device, resolve_dtype

    defaults = defaults_for(options.model)
    parallel = processes.parallel_options(
        options.parallel, options.batch, options.ring, options.ulysses, options.transport, options.timeout
    )
    if parallel is None and options.no_parallel_vae:
        raise ValueError("--no-parallel-vae: has no effect in one process; start the command with torchrun")
    device = processes.own_device(resolve_device(options.device))
    generate.run(
        generate.GenerateJob(
            model=options.model,
            revision=options.revision,
            device=device,
            dtype=resolve_dtype(options.dtype, device),
            request=generate.Request(
                prompts=tuple(options.prompts),
                height=_given(options.height, defaults.height),
                width=_given(options.width, defaults.width),
                num_frames=_given(options.frames, defaults.num_frames),
                steps=_given(options.steps, defaults.steps),
                guidance=_given(options.guidance, defaults.guidance),
                seed=options.seed,
                negative_prompt=options.negative_prompt,
                true_cfg_scale=options.cfg,
            ),
            acceleration=generate.Acceleration(
                attention=options.attention,
                cache=options.cache,
                warmup_steps=options.warmup_steps,
                max_consecutive_hits=options.max_consecutive_hits,
                parallel=parallel,
                parallel_vae=not options.no_parallel_vae,
                compile=options.compile,
                linears=options.linears,
                graphs=options.graphs,
            ),
            batched=not options.one_by_one,
            output=options.output,
            fps=_given(options.fps, defaults.fps),
            zoom=_given(options.zoom, defaults.zoom),
        )
    )


def _demo(options: argparse.Namespace) -> None:
    from . import demo
    from .loading import defaults_for, resolve_device, resolve_dtype

    defaults = defaults_for(options.model)
    device = resolve_device(options.device)
    prompts = demo.QUICK_PROMPTS if options.quick else demo.PROMPTS
    thresholds = demo.QUICK_THRESHOLDS if options.quick else demo.THRESHOLDS
    steps = demo.QUICK_STEPS if options.quick else defaults.steps
    demo.run(
        demo.DemoJob(
            model=options.model,
            revision=options.revision,
            device=device,
            dtype=resolve_dtype(options.dtype, device),
            request=_request(options, defaults, prompts, steps),
            thresholds=tuple(_given(options.thresholds, thresholds)),
            rounds=options.rounds,
            out=options.out,
            fps=_given(options.fps, defaults.fps),
            zoom=_given(options.zoom, defaults.zoom),
            processes=options.processes,
        )
    )


def _tune(options: argparse.Namespace) -> None:
    from . import demo, tune
    from .loading import defaults_for, resolve_device, resolve_dtype

    defaults = defaults_for(options.model)
    device = resolve_device(options.device)
    tune.run(
        tune.TuneJob(
            model=options.model,
            revision=options.revision,
            device=device,
            dtype=resolve_dtype(options.dtype, device),
            request=_request(options, defaults, demo.PROMPTS, defaults.steps),
            metric=options.metric,
            floor=_given(options.floor, 30.0 if options.metric == "psnr" else 0.97),
            evaluations=options.evaluations,
            rounds=options.rounds,
            batch=options.batch,
            out=options.out,
        )
    )


def _quality(options: argparse.Namespace) -> None:
    from . import demo, quality_report
    from .loading import defaults_for, resolve_device, resolve_dtype

    defaults = defaults_for(options.model)
    device = resolve_device(options.device)
    prompts = demo.QUICK_PROMPTS if options.quick else demo.PROMPTS
    thresholds = quality_report.THRESHOLDS[-1:] if options.quick else quality_report.THRESHOLDS
    steps = quality_report.QUICK_STEPS if options.quick else defaults.steps
    quality_report.run(
        quality_report.QualityJob(
            model=options.model,
            revision=options.revision,
            device=device,
            dtype=resolve_dtype(options.dtype, device),
            request=_request(options, defaults, prompts, steps),
            thresholds=tuple(_given(options.thresholds, thresholds)),
            batch=options.batch,
            out=options.out,
        )
    )


def _doctor(options: argparse.Namespace) -> None:
    from .doctor import report

    print(report())


def _request(options: argparse.Namespace, defaults: GenerationDefaults, prompts: Sequence[str], steps: int) -> Request:
    """Of a command that makes many videos: what is not given is `prompts`, `steps`, or the model's default."""
    from .generate import Request

    return Request(
        prompts=tuple(_given(options.prompts, prompts)),
        height=_given(options.height, defaults.height),
        width=_given(options.width, defaults.width),
        num_frames=_given(options.frames, defaults.num_frames),
        steps=_given(options.steps, steps),
        guidance=_given(options.guidance, defaults.guidance),
        seed=options.seed,
    )


def _given(value, default):
    """The user's value where there is one (0 is one: it must reach the checks)."""
    return default if value is None else value
