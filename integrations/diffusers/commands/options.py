"""What several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

    from ..generate import Request
    from ..loading import GenerationDefaults

T = TypeVar("T")


def add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, description: str, epilog: str
) -> argparse.ArgumentParser:
    """The command's own parser; `epilog` are its examples."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which pipeline, where, and in what precision."""
    parser.add_argument(
        "--model", default="toy", metavar="PATH_OR_ID", help="a pipeline's directory or Hugging Face id (default: toy)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hugging Face hub")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]", help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: bf16 on a GPU, else fp32"
    )


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """How the work is split over ranks."""
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


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """What is made, and in how many steps."""
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: toy 30, others 50)")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="multiple of 16 (default: toy 64, others 720)")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="multiple of 16 (default: toy 64, others 1280)")
    parser.add_argument("--frames", type=int, metavar="N", help="multiple of 4 plus 1 (default: toy 17, others 129)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="embedded guidance (default: 6)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first prompt's noise (default: 0)")


def add_video(parser: argparse.ArgumentParser) -> None:
    """How a video is written."""
    parser.add_argument("--fps", type=int, metavar="N", help="frames per second (default: toy 8, others 24)")
    parser.add_argument("--zoom", type=int, metavar="N", help="enlarge each pixel N times (default: toy 4, others 1)")


def model_of(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What `add_model` asks for, as every command's job takes it."""
    from ..loading import resolve_dtype

    dtype = resolve_dtype(options.dtype, device)
    return {"model": options.model, "revision": options.revision, "device": device, "dtype": dtype}


def request_of(
    options: argparse.Namespace, defaults: GenerationDefaults, prompts: Sequence[str], steps: int
) -> Request:
    """Of a command that makes many videos: what is not given is `prompts`, `steps`, or the model's default."""
    from ..generate import Request

    return Request(
        prompts=tuple(given(options.prompts, prompts)),
        height=given(options.height, defaults.height),
        width=given(options.width, defaults.width),
        num_frames=given(options.frames, defaults.num_frames),
        steps=given(options.steps, steps),
        guidance=given(options.guidance, defaults.guidance),
        seed=options.seed,
    )


def given(value: T | None, default: T) -> T:
    """The user's value where there is one (0 is one: it must reach the checks)."""
    return default if value is None else value
