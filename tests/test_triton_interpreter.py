"""Run tests/interpreter in a process of its own: Triton decides at import whether it interprets or compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
INTERPRETER_TESTS = Path(__file__).parent / "interpreter"


@pytest.mark.parametrize("path", sorted(INTERPRETER_TESTS.glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout, result.stdout[-2000:]
