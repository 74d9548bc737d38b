"""Write the tables of README.md and docs/*.md from the records in ``benchmarks/results/``.

    python -m benchmarks.render_tables            rewrite the tables
    python -m benchmarks.render_tables --check    exit 1 if a table is not what the records say

A table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- /table -->``; NAME is one of TABLES below.
Where a record is missing, it says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .record import REPOSITORY, RESULTS, read_records
from .tables import attention, checks, int8, policies, prepare, quality, ranks, steps
from .tables.markdown import Row

MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    options = parser.parse_args()
    try:
        stale = update(documents(REPOSITORY), RESULTS, write=not options.check)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path.relative_to(REPOSITORY)}: {'out of date' if options.check else 'rewritten'}")
    return 1 if stale and options.check else 0


def documents(repository: Path) -> list[Path]:
    """The files that may hold tables."""
    return [path for path in [repository / "README.md", *sorted((repository / "docs").rglob("*.md"))] if path.is_file()]


def update(paths: Iterable[Path], results: Path, write: bool) -> list[Path]:
    """Render every table in `paths`; returns the files whose text was not what the records say.

    Raises:
        ValueError: a table that is not in TABLES.
    """
    stale = []
    for path in paths:
        before = path.read_text()
        after = render(before, results)
        if after != before:
            stale.append(path)
            if write:
                path.write_text(after)
    return stale


def render(text: str, results: Path) -> str:
    """`text` with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"table {name!r} is unknown; there are: {', '.join(TABLES)}")
        files, make = TABLES[name]
        missing = [file for file in files if not (results / f"{file}.json").is_file()]
        rows = [row for file in files if file not in missing for row in read_records(file, results)]
        body = f"{make(rows)}\n" if rows else "\n"
        return f"{match[1]}{body}{_no_record(missing)}{match[3]}"

    return MARKED.sub(table, text)


def _no_record(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return f"*No record yet: {', '.join(f'`benchmarks/results/{file}.json`' for file in missing)}.*\n\n"


# name of the table: (records that it is made from, how)
TABLES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Row]], str]]] = {
    "attention": (("gpu-attention",), attention.fastest),
    "attention-all": (("gpu-attention",), attention.all_lengths),
    "power": (("gpu-attention",), attention.power),
    "hard-values": (("gpu-hard_values",), attention.hard_values),
    "masked": (("gpu-masked",), attention.masked),
    "varlen": (("gpu-varlen",), attention.varlen),
    "small": (("gpu-small",), attention.small),
    "host": (("gpu-host_overhead",), attention.host),
    "first-calls": (("gpu-compile",), attention.first_calls),
    "checks": (
        (
            "gpu-correctness",
            "gpu-random_shapes",
            "gpu-repeatable",
            "gpu-no_sync",
            "gpu-compile_count",
            "gpu-cuda_graph",
            "gpu-sanitize",
        ),
        checks.what_holds,
    ),
    "tail": (("hopper-tail",), attention.tail),
    "step-profile": (("hunyuan_step_profile",), steps.where),
    "step-kernels": (("hunyuan_step_profile",), steps.kernels),
    "prepare-checks": (("prepare-checks",), prepare.checks),
    "prepare-speed": (("prepare-speed",), prepare.speed),
    "memory-bound": (("gpu-residual_diff", "gpu-merge_states"), attention.memory_bound),
    "step": (("hunyuan_step",), steps.step),
    "step-settings": (("hunyuan_step_settings",), steps.settings),
    "flux-settings": (("flux_step_settings",), steps.settings),
    "flux-settings-512": (("flux_step_settings-512",), steps.settings),
    "flux-ranks-profile": (("flux_graphs_profile",), ranks.where),
    "flux-tail": (("flux_tail",), ranks.attention_of_steps),
    "flux-copies": (("flux_copies",), ranks.attention_of_steps),
    "flux-ranks-other": (("flux_step_ranks-other",), ranks.ranks_of_steps),
    "flux-pieces": (("flux_pieces",), ranks.variants),
    "flux-rows": (("flux_rows",), ranks.products),
    "flux-variants": (("flux_variants",), ranks.variants),
    "flux-ring-kernel": (("flux_ring_kernel",), ranks.ring_kernel),
    "flux-ranks": (("flux_step_ranks",), ranks.ranks_of_steps),
    "cogvideox-ranks": (("cogvideox_step_ranks",), ranks.ranks_of_steps),
    "cogvideox-half": (("cogvideox_half",), ranks.variants),
    "vae": (("vae_parallel",), ranks.vae),
    "ring": (("ring-speed",), ranks.ring),
    "ring-int8": (("ring-int8",), ranks.ring),
    "ring-without-p2p": (("ring-without_p2p",), ranks.ring),
    "ring-checks": (("ring-correctness", "ring-stress"), checks.what_holds),
    "step-parallel": (("hunyuan_step_parallel",), ranks.step_parallel),
    "scaling-predicted": (("scaling-predicted",), ranks.predicted),
    "scaling-validation": (("scaling-validation",), ranks.model_error),
    "toy-ranks": (("toy-ranks-cpu",), checks.what_holds),
    "demo": (("toy_demo",), quality.demo),
    "quality": (("toy_quality-cpu",), quality.settings),
    "quality-cache": (("toy_quality_cache-cpu",), quality.cache),
    "int8-checks": (("int8-checks",), int8.checks),
    "int8-speed": (("int8-speed",), int8.speed),
    "int8-late": (("int8-speed-late",), int8.speed),
    "int8-first": (("int8-speed-first",), int8.speed),
    "int8-turns": (("int8-speed-turns",), int8.speed),
    "int8-clocks": (("int8-clocks",), int8.clocks),
    "int8-power": (("int8-speed",), int8.power),
    "int8-largest": (("int8-largest",), int8.largest),
    "int8-issue": (("int8-issue",), int8.issue),
    "int8-slots": (("int8-slots",), int8.slots),
    "int8-quantisation": (("int8-quantisation",), int8.quantisation),
    "policies": (("policies-cpu",), policies.settings),
    "policies-compared": (("policies-cpu",), policies.compared_policies),
    "cpu": (
        (
            "flash_attention_kv_lens-cpu",
            "flash_attention_varlen-cpu",
            "residual_diff-cpu",
            "residual_diff_first-cpu",
            "merge_states-cpu",
        ),
        attention.micro,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
