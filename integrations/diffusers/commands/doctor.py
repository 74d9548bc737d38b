"""``para-kernels doctor``: what this machine has and will use."""

from __future__ import annotations

import argparse

from .options import add_command

DESCRIPTION = """\
Print the versions of what is installed, whether the C++ extension is built, every GPU, which attention kernel runs for
which dtype and head dimension and why, and what is missing and how to get it. Sends nothing anywhere.
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "doctor", "what this machine has and will use", DESCRIPTION, "")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from ..doctor import report

    print(report())
