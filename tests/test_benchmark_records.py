"""Records of benchmarks and the tables made of them; and that those in the documents are up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from benchmark_records import one_record, rows_of

from benchmarks import gpu_report, record, render_tables
from benchmarks.record import Check

ROOT = record.REPOSITORY
CPU = torch.device("cpu")


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_says_what_ran_against_what_and_where(tmp_path: Path) -> None:
    record.write_records("name", [one_record(), one_record(peer=None, peer_ms=None)], tmp_path)
    with_peer, alone = record.read_records("name", tmp_path)
    fields = ("op", "shape", "dtype", "kernel", "peer", "median_ms", "peer_ms", "tflops", "gbps", "ratio", "notes")
    environment = ("gpu", "driver", "cpu", "torch", "triton", "commit", "date", "command")
    assert set(with_peer) == {*fields, *environment}
    assert with_peer["ratio"] == 1.5  # the peer took 3 ms, this package 2 ms
    assert alone["ratio"] is None
    assert with_peer["torch"] == torch.__version__


def test_a_check_says_on_how_much_it_was_tried_and_whether_it_held(tmp_path: Path) -> None:
    checks = [Check("holds", cases=3, worst=1e-3, allowed=2e-3), Check("fails", cases=3, failures=1, dtype="float16")]
    record.write_records("name", checks, tmp_path)
    holds, fails = record.read_records("name", tmp_path)
    assert {"check", "cases", "failures", "dtype", "worst", "allowed", "notes", "passed", "commit"} <= set(holds)
    assert (holds["passed"], fails["passed"]) == (True, False)


def test_a_record_holds_nobodys_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = record.REPOSITORY / "benchmarks" / "gpu_report.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path / "here"), "--only", "varlen"])
    assert record.environment()["command"] == "python -m benchmarks.gpu_report --out here --only varlen"
    monkeypatch.setattr(sys, "argv", [str(script), "--only", "exact compiled", "a, b"])
    assert record.environment()["command"] == "python -m benchmarks.gpu_report --only 'exact compiled' 'a, b'"
    monkeypatch.setattr(sys, "argv", ["/usr/lib/python3/pytest/__main__.py", "benchmarks/bench_attention.py"])
    assert record.environment()["command"] == "python -m pytest benchmarks/bench_attention.py"


@pytest.mark.parametrize("name", ["", "a/b", "../up", "with space"])
def test_a_records_name_is_a_file_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: "):
        record.write_records(name, [one_record()], tmp_path)


def test_an_empty_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="records: empty"):
        record.write_records("name", [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_never_reaches_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        record.write_records("name", [one_record(median_ms=float("nan"))], tmp_path)
    assert not list(tmp_path.iterdir())


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_tables_in_the_documents_are_those_of_the_records() -> None:
    stale = render_tables.update(render_tables.documents(ROOT), record.RESULTS, write=False)
    assert not stale, "run: python -m benchmarks.render_tables"


@pytest.fixture
def document(tmp_path: Path) -> Path:
    record.write_records("gpu-attention", [one_record(), one_record(peer="SDPA flash", peer_ms=4.0)], tmp_path)
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- table: attention -->\nold\n<!-- /table -->\nafter\n")
    return path


def test_a_stale_table_is_found_and_rewritten_between_its_marks(document: Path) -> None:
    results = document.parent
    assert render_tables.update([document], results, write=False) == [document]
    assert "old" in document.read_text()
    assert render_tables.update([document], results, write=True) == [document]
    text = document.read_text()
    assert text.startswith("before\n<!-- table: attention -->\n")
    assert text.endswith("<!-- /table -->\nafter\n")
    assert "| tokens | TFLOP/s | against cuDNN | against SDPA flash |" in text
    assert "| 4,096 | 600 | 1.50x | 2.00x |" in text
    assert render_tables.update([document], results, write=False) == []


def test_a_changed_record_makes_the_table_stale(document: Path) -> None:
    render_tables.update([document], document.parent, write=True)
    record.write_records("gpu-attention", [one_record(peer_ms=5.0)], document.parent)
    assert render_tables.update([document], document.parent, write=False) == [document]


def test_text_outside_the_marks_is_left_alone(tmp_path: Path) -> None:
    text = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert render_tables.render(text, tmp_path) == text


def test_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown"):
        render_tables.render("<!-- table: no-such -->\n<!-- /table -->", tmp_path)


def test_a_table_without_its_records_says_which_are_missing(tmp_path: Path) -> None:
    both = "<!-- table: memory-bound -->\n<!-- /table -->"
    assert "*No record yet: `benchmarks/results/gpu-residual_diff.json`, `benchmarks/results/gpu-merge" in (
        render_tables.render(both, tmp_path)
    )
    row = one_record(op="merge_states", gbps=2000.0, notes={"of_copy": 0.9})
    record.write_records("gpu-merge_states", [row], tmp_path)
    text = render_tables.render(both, tmp_path)
    assert "| `merge_states` |" in text
    assert "*No record yet: `benchmarks/results/gpu-residual_diff.json`.*" in text


def test_check_exits_1_on_a_stale_table(
    document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render_tables, "REPOSITORY", document.parent)
    monkeypatch.setattr(render_tables, "RESULTS", document.parent)
    monkeypatch.setattr(sys, "argv", ["render_tables", "--check"])
    assert render_tables.main() == 1
    assert "README.md: out of date" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["render_tables"])
    assert render_tables.main() == 0
    monkeypatch.setattr(sys, "argv", ["render_tables", "--check"])
    assert render_tables.main() == 0


SECTION_TABLES = {
    "attention": ("attention", "attention-all"),
    "hard_values": ("hard-values",),
    "masked": ("masked",),
    "varlen": ("varlen",),
    "small": ("small",),
    "host_overhead": ("host",),
    "repeatable": ("checks",),
    "random_shapes": ("checks",),
}


@pytest.mark.parametrize("section", SECTION_TABLES)
def test_every_table_renders_from_what_its_section_writes(section: str, tmp_path: Path) -> None:
    _, records = gpu_report.SECTIONS[section](CPU)
    record.write_records(f"gpu-{section}", records, tmp_path)
    for table in SECTION_TABLES[section]:
        rows = rows_of(table, tmp_path)
        assert len(rows) >= 3, table
        assert len({row.count("|") for row in rows}) == 1, table


def test_the_memory_bound_table_renders_from_both_its_sections(tmp_path: Path) -> None:
    for section in ("residual_diff", "merge_states"):
        _, records = gpu_report.SECTIONS[section](CPU)
        record.write_records(f"gpu-{section}", records, tmp_path)
    assert len(rows_of("memory-bound", tmp_path)) == 2 + 3


def test_clocks_and_power_are_shown_for_this_package_and_each_peer(tmp_path: Path) -> None:
    ours = {"sustained_ms": 240.0, "clock_mhz": 1500.0, "power_w": 690.0}
    theirs = {"peer_sustained_ms": 250.0, "peer_clock_mhz": None, "peer_power_w": 700.0}
    record.write_records("gpu-attention", [one_record(), one_record(notes={**ours, **theirs})], tmp_path)
    assert rows_of("power", tmp_path)[2:] == [
        "| para_kernels | 240.0 | 1500 | 690 |",
        "| cuDNN | 250.0 | unknown | 700 |",
    ]


def test_the_share_of_the_dense_rate_is_the_noted_one(tmp_path: Path) -> None:
    shape = {"B": 1, "S": 512, "valid": 312, "H": 2, "D": 64}
    ratios = {"dense": 2.02, "FlashAttention-3 padded": 2.2}
    notes = {"of_dense_rate": 0.99}
    records = [one_record(op="varlen_one", shape=shape, peer=p, peer_ms=ms, notes=notes) for p, ms in ratios.items()]
    record.write_records("gpu-varlen", records, tmp_path)
    assert rows_of("varlen", tmp_path)[2:] == ["| one length | 312 | 2.00 | 0.990 | 1.10x |"]
