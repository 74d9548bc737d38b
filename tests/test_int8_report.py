"""The 8-bit report, small and on the CPU: a wrong kernel is found and not timed, records make the tables."""

from __future__ import annotations

import dataclasses
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


def test_a_peer_is_shown_and_its_failures_cost_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FlashAttention-3 in fp8: right here, not finite there, and refusing elsewhere."""
    calls = 0

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("no kernel image")
        q, k, v = (x.float() for x in (q, k, v))
        out = torch.einsum(
            "bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5).softmax(-1), v
        )
        return out * float("nan") if calls == 3 else out

    cases = {name: dataclasses.replace(CASE, lens=False, head_dim=128) for name in ("right", "refused", "not finite")}
    monkeypatch.setattr(int8_report, "fa3_fp8", lambda device: peer)
    monkeypatch.setattr(int8_report, "_cases", lambda full: cases | {"with lengths": CASE})
    shown = int8_report.peer_errors(CPU)
    assert [(check.check, check.passed) for check in shown] == [
        ("8-bit attention, right", True), ("8-bit attention, not finite", True)
    ]  # fmt: skip
    assert 1e-3 < (shown[0].worst or 0) < 0.2
    assert shown[1].worst is None
    record.write_records("int8-checks", shown, tmp_path)
    table = render_tables.render("<!-- table: int8-checks -->\n<!-- /table -->\n", tmp_path)
    assert "| FlashAttention-3 fp8 | not finite | bfloat16 |  |  |  |" in table
