"""The documentation names what exists: files, functions, paths in backticks, links and pictures."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md",
                ROOT / "configs" / "ds_configs" / "README.md", ROOT / "initial_model" / "README.md"])  # fmt: skip
NAMED = re.compile(r"`([\w/]+\.py): ([\w.]+)`")
# What a run, a download or a reader makes.
MADE = ("initial_model/t5-large", "initial_model/llama", "initial_model/smollm2-135m", "initial_model/small-t5",
        "data/mini_benchmark", "configs/mine_configs", "configs/NAME_configs", "src/methods/pull.py")  # fmt: skip
FOLDERS = "src|docs|tests|scripts|scripts_llama|configs|benchmarks|data|initial_model|examples"
PATH = re.compile(rf"(?:{FOLDERS})/[\w./*-]*")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def names_of(tree: ast.AST, before: str = "") -> Iterator[str]:
    """The classes, functions and constants of a module; of a class, `Class.method`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield before + node.name
            if isinstance(node, ast.ClassDef):
                yield from names_of(node, f"{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (before + target.id for target in node.targets if isinstance(target, ast.Name))


def test_every_name_of_the_architecture_exists():
    named = NAMED.findall(text_of(ROOT / "docs" / "ARCHITECTURE.md"))
    assert len(named) > 30
    missing = [f"{path}: {name}" for path, name in named
               if not (ROOT / path).exists() or name not in set(names_of(ast.parse(text_of(ROOT / path))))]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_in_backticks_exists(page):
    """Paths from the repository's root; a glob must match something."""
    quoted = [quote.split(":")[0] for quote in re.findall(r"`([^`\n]+)`", text_of(page))]
    paths = [quote for quote in quoted if PATH.fullmatch(quote) and not quote.startswith(MADE)]
    assert not [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_resolves(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if not link.startswith(("http", "#"))]
    assert not [link for link in links if not (page.parent / link.split("#")[0]).exists()]
