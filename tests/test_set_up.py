"""Set-up by `scripts/lib.sh`: when it makes or mends `.venv`, and which environments it leaves alone."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers import bash, order_1, put

SET_UP = "source scripts/lib.sh; set_up requirements.txt; echo $PYTHON"
OLD = "gorp-test-package 1.0 (at least 1.1)"


@pytest.fixture
def needs_a_package(checkout):
    """The checkout, requiring a package that no environment holds, and pip options that find it in a local folder."""
    require(checkout, "1.0  # and a comment here")
    wheels = checkout.parent / "wheels"
    wheels.mkdir()
    info = "gorp_test_package-1.0.dist-info"
    with zipfile.ZipFile(wheels / "gorp_test_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("gorp_test_package.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gorp-test-package\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return checkout, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}


def require(checkout: Path, locked: str, least: str = "1.0") -> None:
    (checkout / "requirements.txt").write_text(f"# a comment\ngorp-test-package>={least}\n")
    (checkout / "requirements.lock").write_text(f"gorp-test-package=={locked}\n")


def test_set_up_installs_once_mends_what_was_interrupted_and_says_what_failed(needs_a_package):
    checkout, pip = needs_a_package
    first = bash("-c", SET_UP, cwd=checkout, **pip)
    assert first.returncode == 0, first.stderr
    python = str(checkout / ".venv" / "bin" / "python")
    assert first.stdout.splitlines() == [  # pip is quiet
        "[gorp] setting up .venv from requirements.txt (once; some minutes)", python]
    nothing_to_install = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    assert bash("-c", SET_UP, cwd=checkout, **nothing_to_install).stdout == f"{python}\n"
    active = {"VIRTUAL_ENV": str(checkout / ".venv"), **nothing_to_install}
    assert bash("-c", SET_UP, cwd=checkout, **active).stdout == f"{python}\n"

    path = f"{checkout}/.venv/bin{os.pathsep}{os.environ['PATH']}"
    inside = bash("-c", f"PATH={shlex.quote(path)}; {SET_UP}", cwd=checkout, GORP_ENV="active", **active)
    assert inside.stdout == f"{python}\n", inside.stderr  # nothing differs, nothing is said

    next((checkout / ".venv").rglob("gorp_test_package-1.0.dist-info/INSTALLER")).unlink()
    again = bash("-c", SET_UP, cwd=checkout, **pip)
    assert again.returncode == 0, again.stderr
    assert "[gorp] setting up .venv" in again.stdout and again.stdout.endswith(f"{python}\n")

    require(checkout, "2.0")
    inside = bash("-c", f"PATH={shlex.quote(path)}; {SET_UP}", cwd=checkout, GORP_ENV="active", **active)
    assert inside.returncode == 0, inside.stderr
    assert inside.stdout.splitlines() == [
        f"[gorp] GORP_ENV=active: {python} is used as it is, with gorp-test-package 1.0 (requirements.lock: 2.0)",
        python]
    require(checkout, "2.0", least="1.1")
    inside = bash("-c", f"PATH={shlex.quote(path)}; {SET_UP}", cwd=checkout, GORP_ENV="active", **active)
    assert (inside.returncode, inside.stderr) == (
        2, f"error: GORP_ENV=active: {python} has {OLD}\n")

    active["PATH"] = path
    assert f"the active environment has {OLD}, so .venv is used" in bash("-c", SET_UP, cwd=checkout, **active).stdout
    done = bash("-c", SET_UP, cwd=checkout, **pip)
    assert done.returncode == 2 and "\nERROR: " in done.stderr
    assert done.stderr.endswith("error: .venv: pip could not install requirements.txt; the reason is above\n")


def test_packages_that_pythonpath_puts_first_are_named(needs_a_package, tmp_path):
    checkout, pip = needs_a_package
    info = tmp_path / "modules" / "gorp_test_package-0.9.dist-info"
    put(info / "METADATA", "Metadata-Version: 2.1\nName: gorp-test-package\nVersion: 0.9\n")
    put(info / "INSTALLER", "pip\n")
    done = bash("-c", SET_UP, cwd=checkout, PYTHONPATH=str(info.parent), **pip)
    assert (done.returncode, done.stderr) == (
        2, f"error: PYTHONPATH={info.parent}: hides packages of .venv; unset it\n")


@pytest.mark.parametrize("made", ["venv", "venv without pip", "link", "file", "link to nothing"])
def test_an_environment_that_others_made_is_left_alone(made, needs_a_package):
    checkout, pip = needs_a_package
    place = checkout.parent / "elsewhere" if made == "link" else checkout / ".venv"
    if made.startswith("venv") or made == "link":
        clear = ["--clear"] * (made == "link")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", *clear, place], check=True)
        (place / "mine").touch()
    if made == "venv":
        (place / "bin" / "pip").touch()
    if made == "file":
        place.touch()
    if made.startswith("link"):
        (checkout / ".venv").symlink_to(place if made == "link" else "nowhere")
    done = bash("-c", SET_UP, cwd=checkout, **pip)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: .venv: lacks packages of the requirements files and was not made by these")
    assert not (made == "link" or made.startswith("venv")) or (place / "mine").exists()


@pytest.mark.parametrize("version", ["python3.12", "python3.13"])
def test_a_newer_python_is_found(version, needs_a_package, tmp_path):
    checkout, pip = needs_a_package
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "grep", "sed", "xargs"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / version).symlink_to(sys.executable)
    done = bash("-c", f"PATH={tools}; source scripts/lib.sh; find_python; echo $PYTHON", cwd=checkout, **pip)
    assert (done.returncode, done.stdout) == (0, f"{version}\n"), done.stderr


def test_deepspeed_is_asked_for_only_where_it_runs(checkout):
    (checkout / "requirements-deepspeed.txt").write_text("no-such-package>=1.0\n")
    (checkout / "requirements.lock").write_text("no-such-package==1.0\n")
    no_index = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    assert order_1(checkout, **no_index).returncode == 0
    (checkout / "stage.config").write_text("{}")
    for variables in ({"NPROC": "2"}, {"DS_CONFIG": "stage.config"}):
        done = order_1(checkout, **variables, **no_index)
        assert done.returncode == 2
        assert "pip could not install requirements.txt requirements-deepspeed.txt" in done.stderr
        shutil.rmtree(checkout / ".venv")


def test_without_a_python_that_is_new_enough(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "printf", "xargs"):
        (tools / tool).symlink_to(shutil.which(tool))
    for name in ("python", "python3"):
        (tools / name).write_text("#!/bin/bash\nexit 1\n")
        (tools / name).chmod(0o755)
    done = order_1(checkout, PATH=str(tools))
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python: found no version 3.11 or newer") and done.stderr.count("\n") == 1
