"""docs/RECIPES.md: every recipe that is not said to be untested runs in a copy of the repository, with fewer steps."""

import re
import shutil
import subprocess

import pytest
from helpers import ENVIRONMENT, ROOT

SECTIONS = re.split(r"^## ", (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8"), flags=re.M)[1:]
SHORT = "--max_steps 2 --max_predict_samples 4"
COPIED = ("configs", "CL_Benchmark", "data", "initial_model/tiny-t5", "scripts", "src", "requirements.txt",
          "requirements-deepspeed.txt", "requirements.lock")


def script(section: str) -> str:
    """The commands of a recipe, each with fewer steps."""
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```", section, flags=re.M | re.S))
    return re.sub(r'EXTRA="', f'EXTRA="{SHORT} ', text)


def test_what_is_not_run_is_said_to_be_untested():
    assert sum(bool(script(section)) for section in SECTIONS) == 6
    assert all(bool(script(section)) is not section.startswith("Not tested") for section in SECTIONS)


@pytest.mark.recipe
@pytest.mark.parametrize("section", [one for one in SECTIONS if script(one)], ids=lambda one: one.splitlines()[0])
def test_recipe(section, tmp_path):
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    done = subprocess.run(["bash", "-euc", script(section)], cwd=tmp_path, env=ENVIRONMENT | {"EXTRA": SHORT},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if "src/report" in section:
        [report] = tmp_path.rglob("report.html")
        assert "average performance" in report.read_text(encoding="utf-8")
