"""The ``para-kernels`` command: arguments in, one call out.

What a command needs is imported after parsing: a mistyped option is answered before any model code is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .commands import demo, doctor, generate, quality, tune

RANK_FAILED = 1
USER_ERROR = 2
COMMANDS = (generate, demo, tune, quality, doctor)

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
    for command in COMMANDS:
        command.add_to(commands)
    return parser
