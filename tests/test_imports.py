"""The modules of src/ import in one direction: no circle, nothing from above, and only one that asks for an engine."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
MODULES = {".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
           for path in SRC.rglob("*.py")}  # fmt: skip

# From the top: a layer imports from itself or from layers below it.
LAYERS = [
    {"run_order", "export", "answer", "plan_memory", "report.__main__"},
    {"run_uie_lora", "check"},
    {"task_setup", "report"},
    {"uie_trainer_lora", "command_line"},
    {"methods", "run_record", "evaluation"},
    {"Proj_torch", "loranew", "subspace", "model", "uie_collator", "uie_dataset_lora", "checkpoints", "full_rank",
     "compute_metrics", "non_finite", "token_ids", "task_examples", "prompts"},
    {"arguments", "module_matching", "order_config"},
    {"files", "ranks"},
    {"errors"},
]


def imports(name: str) -> set[str]:
    """The modules of src/ that a module imports anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys() - {name}


def layer_of(name: str) -> int:
    """Index in LAYERS of a module, by its own name or by its package's."""
    for index, layer in enumerate(LAYERS):
        if name in layer:
            return index
    return next(index for index, layer in enumerate(LAYERS) if name.split(".")[0] in layer)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_from_its_own_layer_or_from_below(name):
    above = {other for other in imports(name) if layer_of(other) < layer_of(name)}
    assert not above, f"{name} imports {', '.join(sorted(above))}, which stands above it"


def test_no_imports_form_a_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name):], name])}"
        if name not in done:
            for other in imports(name):
                package = other.split(".")[0]
                if other != package or package != name.split(".")[0]:  # a package names its own modules
                    visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_one_place_asks_for_an_engine():
    asking = [name for name, path in MODULES.items() if "make_engine(" in path.read_text(encoding="utf-8")]
    assert sorted(asking) == ["Proj_torch.engine", "methods.gorp"]
