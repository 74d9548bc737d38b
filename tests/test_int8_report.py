"""The 8-bit report, small and on the CPU: a wrong variant is found and not timed, records make the tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import int8_report, record, render_tables

CPU = torch.device("cpu")
CASE = int8_report.Case(40, 60, lens=True)


def wrong(*arguments: object) -> tuple[Tensor, Tensor]:
    out, lse = int8_report._shipped(*arguments)  # type: ignore[arg-type]
    return out * 1.1, lse


def test_a_wrong_variant_fails_its_checks() -> None:
    torch.manual_seed(0)
    assert int8_report._check("right", "lengths", CASE, int8_report._shipped, CPU).passed
    check = int8_report._check("wrong", "lengths", CASE, wrong, CPU)
    assert not check.passed
    assert check.worst == pytest.approx(0.1, rel=0.3)


def test_rows_past_the_queries_must_be_zero() -> None:
    def careless(q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        out, lse = int8_report._shipped(q, k, v, *others)  # type: ignore[arg-type]
        return out + 1e-6, lse

    assert not int8_report._check("careless", "lengths", CASE, careless, CPU).passed


def test_only_known_kernels_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"--only: got \['late'\], allowed are \['reference'\]"):
        int8_report.kernels_for(CPU, ["late"])


def test_records_make_the_tables(tmp_path: Path) -> None:
    speed = int8_report.speed(int8_report.kernels_for(CPU), CPU)
    record.write_records("int8-speed", speed, tmp_path)
    record.write_records("int8-checks", [int8_report._check("x", "lengths", CASE, wrong, CPU)], tmp_path)
    text = "".join(f"<!-- table: {name} -->\n<!-- /table -->\n" for name in ("int8-speed", "int8-checks"))
    tables = render_tables.render(text, tmp_path)
    assert "| reference | 130 |" in tables
    assert "against bfloat16" in tables
    assert "| x | lengths | bfloat16 |" in tables
    assert "**no**" in tables
