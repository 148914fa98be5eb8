"""Fixtures that several test files share; their other helpers are in helpers.py."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers import DECODERS, ENCODER_DECODERS, ENTRY, ROOT

hypothesis.settings.register_profile("patient", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("patient")
LONGEST = [f"test_{name}.py" for name in (
    "recipe", "two_ranks", "every_method", "methods", "run", "run_order", "resume", "scripts", "library_options",
    "bad_input", "generate", "export", "examples", "own_tasks", "models", "gpu_benchmark", "continual",
)]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first: with two workers, the last one to begin should be a short one."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def shared_memory() -> set[Path]:
    """What DeepSpeed leaves for each rank on a CPU, 67 MB."""
    return set(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"))


def pytest_sessionstart(session):
    session.config.shared_memory = shared_memory()
    assert not torch.cuda.is_available(), "helpers.py hides every GPU"


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # another worker's ranks may be about to open theirs
        for path in shared_memory() - session.config.shared_memory:
            path.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def no_log_of_an_earlier_test():
    """A run logs to its test's standard output, which is closed when the test ends."""
    yield
    for log in map(logging.getLogger, ("gorp", "gorp.detail")):
        log.handlers.clear()
        log.propagate = True
        log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def mini_benchmark(tmp_path_factory) -> Path:
    """The generated mini benchmark (all 15 datasets)."""
    folder = tmp_path_factory.mktemp("mini") / "benchmark"
    subprocess.run([sys.executable, "data/mini_benchmark.py", "--out", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def tokenizers():
    return {build: build() for build in {*ENCODER_DECODERS, *DECODERS}}


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the real scripts, a stand-in for the entry, and nothing to install."""
    root = tmp_path / "checkout"
    for folder in ("scripts", "scripts_llama", "configs/order1_configs"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "src" / "report").mkdir(parents=True)
    (root / "src" / "run_order.py").write_text(ENTRY)
    (root / "src" / "report" / "__main__.py").write_text("import sys; print('table of', sys.argv[1])")
    for name in ("requirements.txt", "requirements-deepspeed.txt", "requirements.lock"):
        (root / name).write_text("")
    (root / "data" / "mini_benchmark").mkdir(parents=True)
    return root
