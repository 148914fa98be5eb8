"""docs/OPTIONS.md names every flag of this project."""

import dataclasses
import pkgutil
import re
from pathlib import Path

import methods
from arguments import DataArguments, ModelArguments, UIETrainingArguments
from methods import find_method
from transformers import Seq2SeqTrainingArguments

PAGE = Path(__file__).resolve().parent.parent / "docs" / "OPTIONS.md"


def own_flags() -> set[str]:
    names = {name for _, name, _ in pkgutil.iter_modules(methods.__path__) if not name.startswith("base")}
    groups = [ModelArguments, DataArguments, *(find_method(name).Arguments for name in sorted(names))]
    flags = {option.name for group in groups for option in dataclasses.fields(group) if option.init}
    inherited = {option.name for option in dataclasses.fields(Seq2SeqTrainingArguments)}
    return flags | {option.name for option in dataclasses.fields(UIETrainingArguments)} - inherited


def test_every_flag_has_a_line():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    named = {flag for line in lines for flag in re.findall(r"`--(\w+)`", line.split(" | ")[0])}
    assert own_flags() - named == set()
