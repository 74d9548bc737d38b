"""``para-kernels generate``: a prompt goes in, an mp4 comes out."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_command, add_model, add_parallel, add_sampling, add_video, given, model_of

DESCRIPTION = """\
Generate one video per prompt and print what every denoising step did.

Several prompts run as one batch; padded text is never computed, and prompt i starts from the noise of seed + i, so
that each video is the one it would be alone. The default model is the small one that ships with the package: it draws
the digits 0 to 9 moving in eight directions or standing still, in 64 x 64 pixels, in seconds on a CPU.
"""

EXAMPLES = """\
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


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "generate", "make videos from prompts", DESCRIPTION, EXAMPLES)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to show; several make a batch")
    add_model(parser)
    add_sampling(parser)
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
    add_parallel(parser)
    parser.add_argument("--one-by-one", action="store_true", help="a call per prompt instead of one batch")
    add_video(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("video.mp4"),
        metavar="NAME.mp4|NAME.npy",
        help="video to write (default: video.mp4); npy: the very frames, float32 in [0, 1], neither zoomed nor coded",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from .. import generate, processes
    from ..loading import defaults_for, resolve_device

    defaults = defaults_for(options.model)
    parallel = processes.parallel_options(
        options.parallel, options.batch, options.ring, options.ulysses, options.transport, options.timeout
    )
    if parallel is None and options.no_parallel_vae:
        raise ValueError("--no-parallel-vae: has no effect in one process; start the command with torchrun")
    generate.run(
        generate.GenerateJob(
            **model_of(options, processes.own_device(resolve_device(options.device))),
            request=generate.Request(
                prompts=tuple(options.prompts),
                height=given(options.height, defaults.height),
                width=given(options.width, defaults.width),
                num_frames=given(options.frames, defaults.num_frames),
                steps=given(options.steps, defaults.steps),
                guidance=given(options.guidance, defaults.guidance),
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
            fps=given(options.fps, defaults.fps),
            zoom=given(options.zoom, defaults.zoom),
        )
    )


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
