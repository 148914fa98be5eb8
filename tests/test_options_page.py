"""docs/OPTIONS.md names every flag of this project."""

import dataclasses
import re
from pathlib import Path

from arguments import IGNORED, REJECTED, TRACKIO, DataArguments, ModelArguments, UIETrainingArguments
from methods import find_method, method_names
from transformers import Seq2SeqTrainingArguments

PAGE = Path(__file__).resolve().parent.parent / "docs" / "OPTIONS.md"


def own_flags() -> set[str]:
    groups = [ModelArguments, DataArguments, *(find_method(name).Arguments for name in method_names())]
    flags = {option.name for group in groups for option in dataclasses.fields(group) if option.init}
    inherited = {option.name for option in dataclasses.fields(Seq2SeqTrainingArguments)}
    return flags | {option.name for option in dataclasses.fields(UIETrainingArguments)} - inherited


def test_every_flag_has_a_line():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    named = {flag for line in lines for flag in re.findall(r"`--(\w+)`", line.split(" | ")[0])}
    assert own_flags() - named == set()


def test_the_defaults_on_the_page_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8").split("\n## Method\n")[1].split("Those that matter most")[0]
    stated = dict(re.findall(r"^\| `--(\w+)` \|.* \| ([\d.e-]+) \|$", page, flags=re.M))
    groups = [ModelArguments, DataArguments, UIETrainingArguments,
              *(find_method(name).Arguments for name in method_names())]
    options = [option for group in groups for option in dataclasses.fields(group) if option.name in stated]
    assert len(stated) > 20 and {option.name for option in options} == stated.keys()
    for option in options:
        assert option.default == float(stated[option.name]), option.name


def test_what_is_rejected_or_ignored_stands_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    for reason, names in REJECTED.items():
        assert f"| {', '.join(f'`--{name}`' for name in names.split())} | {reason} |" in page
    assert f"gets one reports it: {', '.join(f'`--{name}`' for name in IGNORED + TRACKIO)}." in " ".join(page.split())
