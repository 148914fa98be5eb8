"""The pictures of README and docs: the results as `benchmarks/figures.py` draws them, and what holds for every SVG."""

import dataclasses
import itertools
import json
from xml.etree import ElementTree

import pytest

from benchmarks.outcomes import Outcome, Trial
from errors import InputError
from benchmarks.figures import LABEL, LETTER, Costs, Panel, complete_runs, draw, main, performance, place_names, points
from helpers import ROOT

PICTURES = sorted((ROOT / "docs" / "images").glob("*.svg"))
PANEL = Panel("small", "Small", ("A", "B"), 2)
SVG = "{http://www.w3.org/2000/svg}"


def outcome(method, order, seed, right, split="test", seconds=1.0, stored=1):
    return Outcome(Trial(method, order, seed, split=split), [[0.0]], right, seconds, 1, stored, None)


def trials(method, right, seeds=(1, 2)):
    return [outcome(method, order, seed, right) for order in "AB" for seed in seeds]


def test_interval_is_around_the_average_performance():
    found = performance(complete_runs(trials("gorp", {"one": "1100", "two": "1111"}), PANEL))["gorp"]
    assert found.mean == 75
    assert found.low < 75 < found.high
    assert (found.runs, found.seeds) == (4, 2)


def test_only_methods_with_every_run_are_drawn():
    right = {"one": "1100"}
    one_seed, one_order = trials("olora", right, seeds=(1,)), [outcome("nlora", "A", seed, right) for seed in (1, 2)]
    dev = [outcome("osf", order, seed, right, split="dev") for order in "AB" for seed in (1, 2)]
    assert complete_runs([*trials("sgorp", right), *one_seed, *one_order, *dev], PANEL).keys() == {"sgorp"}


def test_a_seed_that_one_order_lacks_is_left_out_of_the_others():
    alone = outcome("gorp", "A", 3, {"one": "0000"})
    found = performance(complete_runs([*trials("gorp", {"one": "1110"}), alone], PANEL))["gorp"]
    assert (found.mean, found.runs, found.seeds) == (75, 4, 2)


def test_trials_with_several_settings_are_not_mixed():
    runs = trials("gorp", {"one": "1100"})
    runs[0] = dataclasses.replace(runs[0], trial=dataclasses.replace(runs[0].trial, settings="--learning_rate 1"))
    with pytest.raises(InputError, match="small: gorp has trials with 2 settings; a picture has one"):
        complete_runs(runs, PANEL)


def test_every_method_has_one_row_best_first():
    runs = [*trials("olora", {"one": "1000"}), *trials("gorp --preset released", {"one": "1100"})]
    picture = ElementTree.fromstring(draw([(PANEL, performance(complete_runs(runs, PANEL)))]))
    texts = ["".join(text.itertext()) for text in picture.iter(SVG + "text")]
    assert [text for text in texts if text in ("olora", "gorp", "--preset released")] == [
        "gorp", "--preset released", "olora",
    ]  # fmt: skip
    assert len(list(picture.iter(SVG + "circle"))) == 2


def test_a_panel_names_its_orders_and_numbers_of_seeds():
    assert PANEL.subtitle({3, 1, 2}) == "orders A and B, 1, 2 or 3 seeds"
    assert Panel("small", "Small", ("A",), 1).subtitle({1}) == "order A, 1 seed"


def test_an_unknown_method_is_rejected(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--methods", "nothing"])
    assert stop.value.code == 2
    assert "--methods: found 'nothing'; allowed: the complete ones, " in capsys.readouterr().err


def test_costs_are_megabytes_or_times_of_one_lora():
    panel = Panel("small", "Small", ("A",), 1)
    stored = {"small": [
        outcome(method, "A", 1, {"one": "11"}, seconds=seconds, stored=size)
        for method, seconds, size in (("seqlora", 4.0, 2_000_000), ("gorp", 6.0, 8_000_000))
    ]}  # fmt: skip
    in_bytes, in_time = (points(Costs(panel, "", in_time), stored) for in_time in (False, True))
    assert {method: cost for method, (cost, _) in in_bytes.items()} == {"seqlora": 2, "gorp": 8}
    assert {method: cost for method, (cost, _) in in_time.items()} == {"seqlora": 1, "gorp": 1.5}
    assert points(Costs(panel, "", in_time=True), {"small": stored["small"][1:]}) == {}, "a multiple of what?"


def test_costs_and_performance_are_of_the_same_runs():
    runs = [outcome("gorp", order, 1, {"one": "11"}, stored=2_000_000) for order in "AB"]
    alone = outcome("gorp", "A", 2, {"one": "00"}, stored=9_000_000)
    (cost, interval), = points(Costs(Panel("small", "Small", ("A", "B"), 1), ""), {"small": [*runs, alone]}).values()
    assert (cost, interval.mean) == (2, 100)


def test_a_single_method_at_a_multiple_of_five_is_drawn(tmp_path):
    folder = tmp_path / "results" / "smollm2-135m"
    folder.mkdir(parents=True)
    lines = [json.dumps(dataclasses.asdict(outcome("gorp", order, 1, {"one": "11"}))) for order in "AB"]
    (folder / "outcomes.jsonl").write_text("\n".join(lines))
    assert main(["--results", str(folder.parent), "--out", str(tmp_path / "new" / "folder")]) == 0
    for name in ("results.svg", "costs.svg"):
        assert ">gorp<" in (tmp_path / "new" / "folder" / name).read_text()


def test_names_of_neighbours_do_not_overlap():
    crowd = {"olora": (50.0, 40.0), "nlora": (50.0, 41.0), "inclora": (52.0, 40.0), "gorp": (90.0, 90.0)}
    places = place_names(crowd, 0, 160)
    boxes = [(start, start + LETTER * len(name), line) for name, (start, line) in places.items()]
    for (start, end, line), (begin, stop, other) in itertools.combinations(boxes, 2):
        assert end <= begin or stop <= start or abs(line - other) >= LABEL
    assert all(0 <= start and end <= 160 for start, end, _ in boxes)
    assert places["gorp"] == (99, 90), "a name stays beside its point where there is room"


def test_command_draws_the_stored_outcomes_and_prints_the_paths_alone(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 0
    pictures = [tmp_path / "results.svg", tmp_path / "costs.svg"]
    assert capsys.readouterr().out == "".join(f"{picture}\n" for picture in pictures)
    drawn = pictures[0].read_text(encoding="utf-8")
    assert all(f">{name}<" in drawn for name in ("olora", "inflora", "multitask"))
    assert ">sgorp<" in pictures[1].read_text(encoding="utf-8")


def test_the_pictures_in_the_docs_are_those_of_the_stored_trials(tmp_path):
    main(["--out", str(tmp_path)])
    for picture in tmp_path.iterdir():
        assert (ROOT / "docs" / "images" / picture.name).read_bytes() == picture.read_bytes(), picture.name


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
