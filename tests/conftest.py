"""Fixtures that several test files share: the mini benchmark, and a two-task order over it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_BENCHMARK = ROOT.parent / "shared" / "cl_benchmark_small"


LONGEST = ("test_recipe.py", "test_two_ranks.py", "test_resume.py", "test_zero_core.py")


def pytest_collection_modifyitems(items):
    """The longest files first: with two workers, the last one to begin should be a short one."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def mini_benchmark(tmp_path_factory) -> Path:
    """The generated mini benchmark (all 15 datasets)."""
    folder = tmp_path_factory.mktemp("mini") / "benchmark"
    subprocess.run([sys.executable, "data/mini_benchmark.py", "--out", str(folder)], cwd=ROOT, check=True)
    return folder
