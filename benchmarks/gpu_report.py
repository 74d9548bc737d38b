"""Everything about the operations on one GPU in one run: first whether they are right, then how fast they are.

    python -m benchmarks.gpu_report --out /tmp/report
    python -m benchmarks.gpu_report --out /tmp/report --only correctness,attention
    python -m benchmarks.gpu_report --out /tmp/report --skip random_shapes

Writes one JSON file of records per section to --out and prints a table. A section that fails is reported and does not
stop the others; the exit code is then 1. On a machine without CUDA the sections that need none run small.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from . import first_calls, random_shapes, report_attention, report_checks, report_speed
from .record import Check, Record, environment, write_records
from .section import CheckFailedError, Section, SectionSkippedError


@dataclass
class Outcome:
    """What one section gave: lines to print, records to write, and the failure if it raised or a check did not hold."""

    lines: list[str]
    records: list[Record | Check]
    failure: str | None
    skipped: str | None
    seconds: float


SECTIONS: dict[str, Section] = {
    "correctness": report_checks.correctness,
    "no_sync": report_checks.no_sync,
    "compile_count": report_checks.compile_count,
    "cuda_graph": report_checks.cuda_graph,
    "repeatable": report_checks.repeatable,
    "random_shapes": random_shapes.random_shapes,
    "compile": first_calls.compile_time,
    "attention": report_attention.attention,
    "hard_values": report_attention.hard_values,
    "masked": report_attention.masked,
    "varlen": report_attention.varlen,
    "small": report_attention.small,
    "residual_diff": report_speed.residual_diff_speed,
    "merge_states": report_speed.merge_states_speed,
    "host_overhead": report_speed.host_overhead,
}
FLEX_SECTION: dict[str, Section] = {"flex_attention": report_attention.flex_attention}


def main() -> int:
    options = _options()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    print(", ".join(f"{key} {value}" for key, value in environment().items() if value), flush=True)
    outcomes: dict[str, Outcome] = {}
    for name in options.only:
        if name in options.skip:
            continue
        print(f"\n== {name}", flush=True)
        outcomes[name] = _run({**SECTIONS, **FLEX_SECTION}[name], device)
        _print(name, outcomes[name])
        if outcomes[name].records:
            write_records(f"gpu-{name}", outcomes[name].records, options.out)
    failed = [name for name, outcome in outcomes.items() if outcome.failure]
    total = sum(outcome.seconds for outcome in outcomes.values())
    print(f"\n{len(outcomes)} sections in {total:.0f} s; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the JSON records")
    parser.add_argument(
        "--only",
        type=_section_names,
        default=list(SECTIONS),
        metavar="A,B",
        help=f"sections to run: {', '.join([*SECTIONS, *FLEX_SECTION])} (default: all but flex_attention)",
    )
    parser.add_argument("--skip", type=_section_names, default=[], metavar="A,B", help="sections to leave out")
    return parser.parse_args()


def _section_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in {**SECTIONS, **FLEX_SECTION}]
    if unknown:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}")
    return names


def _run(section: Section, device: torch.device) -> Outcome:
    start = time.perf_counter()
    failure = skipped = None
    lines: list[str] = []
    records: list[Record | Check] = []
    try:
        lines, records = section(device)
        failure = _failed_checks(records)
    except SectionSkippedError as reason:
        skipped = str(reason)
    except CheckFailedError as error:
        failure = str(error)
    except Exception:  # One broken section must not cost the others their results.
        failure = traceback.format_exc()
    finally:
        torch.cuda.empty_cache()
    return Outcome(lines, records, failure, skipped, time.perf_counter() - start)


def _failed_checks(records: list[Record | Check]) -> str | None:
    """The checks among `records` that did not hold; None if all did."""
    failed = [record for record in records if isinstance(record, Check) and not record.passed]
    lines = [
        f"{check.check}, {check.dtype}: {check.failures} of {check.cases} failed, worst {check.worst},"
        f" allowed {check.allowed}"
        for check in failed
    ]
    return "\n".join(lines) or None


def _print(name: str, outcome: Outcome) -> None:
    for line in outcome.lines:
        print(f"  {line}")
    if outcome.failure:
        print(outcome.failure)
    verdict = "FAILED" if outcome.failure else f"skipped: {outcome.skipped}" if outcome.skipped else "done"
    print(f"-- {name} {verdict} ({outcome.seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
