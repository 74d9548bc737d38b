"""Shared by all tests: those marked `gpu` are skipped where there is none."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# For the benchmarks. At the end of the path, so that an installed para_kernels stays the one that is tested.
sys.path.append(str(Path(__file__).resolve().parent.parent))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
