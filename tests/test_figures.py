"""The pictures of README and docs: the results as `benchmarks/figures.py` draws them, and what holds for every SVG."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.outcomes import Outcome, Trial
from benchmarks.figures import Panel, complete_methods, draw, main

ROOT = Path(__file__).resolve().parent.parent
PICTURES = sorted((ROOT / "docs" / "images").glob("*.svg"))
PANEL = Panel("small", "Small", ("A", "B"), 2)
SVG = "{http://www.w3.org/2000/svg}"


def outcome(method, order, seed, right, split="test"):
    return Outcome(Trial(method, order, seed, split=split), [[0.0]], right, 1.0, 1, 1, None)


def trials(method, right, seeds=(1, 2)):
    return [outcome(method, order, seed, right) for order in "AB" for seed in seeds]


def test_interval_is_around_the_average_performance():
    found = complete_methods(trials("gorp", {"one": "1100", "two": "1111"}), PANEL)["gorp"]
    assert found.mean == 75
    assert found.low < 75 < found.high
    assert (found.runs, found.seeds) == (4, 2)


def test_only_complete_methods_are_drawn():
    right = {"one": "1100"}
    one_seed, one_order = trials("olora", right, seeds=(1,)), [outcome("nlora", "A", seed, right) for seed in (1, 2)]
    dev = [outcome("osf", order, seed, right, split="dev") for order in "AB" for seed in (1, 2)]
    assert complete_methods([*trials("sgorp", right), *one_seed, *one_order, *dev], PANEL).keys() == {"sgorp"}


def test_a_former_default_stands_for_the_method_until_it_has_trials_of_its_own():
    former = trials("sgorp --galore_svd exact", {"one": "1110"})
    assert complete_methods(former, PANEL)["sgorp"].mean == 75
    found = complete_methods([*former, *trials("sgorp", {"one": "1000"})], PANEL)
    assert {method: interval.mean for method, interval in found.items()} == {"sgorp": 25}


def test_every_method_has_one_row_best_first():
    runs = [*trials("olora", {"one": "1000"}), *trials("gorp --preset released", {"one": "1100"})]
    picture = ElementTree.fromstring(draw([(PANEL, complete_methods(runs, PANEL))]))
    texts = ["".join(text.itertext()) for text in picture.iter(SVG + "text")]
    assert [text for text in texts if text in ("olora", "gorp", "--preset released")] == [
        "gorp", "--preset released", "olora",
    ]  # fmt: skip
    assert len(list(picture.iter(SVG + "circle"))) == 2


def test_an_unknown_method_is_rejected(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--methods", "nothing"])
    assert stop.value.code == 2
    assert "--methods: found 'nothing'; complete are " in capsys.readouterr().err


def test_command_draws_the_stored_outcomes_and_prints_the_path_alone(tmp_path, capsys):
    picture = tmp_path / "results.svg"
    assert main(["--out", str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    drawn = picture.read_text(encoding="utf-8")
    assert all(f">{name}<" in drawn for name in ("olora", "nlora", "multitask"))


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_pictures_are_accessible_and_stand_alone(picture):
    root = ElementTree.parse(picture).getroot()
    for name in ("title", "desc"):
        (found,) = root.iter(SVG + name)
        assert found.text.strip()
    assert {element.tag for element in root.iter()}.isdisjoint({SVG + "script", SVG + "image", SVG + "foreignObject"})
    style = "".join(element.text for element in root.iter(SVG + "style"))
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style and "@import" not in style
