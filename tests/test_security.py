"""Nothing that a file brings is run: no forbidden call in the tree, and the attacks that could make one happen.

Refusals of pickles, links and names that leave their folder are in test_bad_input.py with all other bad input; here
each attack carries a payload that leaves a mark, and the mark must not appear.
"""

import ast
import json
import pickle
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import order_config
from errors import InputError
from helpers import ROOT, T5, bash, order_1, put
from loranew import load_loranew
from model.loading import load_model_and_tokenizer
from order_config import check_name, read_order
from subspace import GradientSpace
from uie_dataset_lora import ExampleOptions, read_examples

SOURCES = sorted(path for folder in ("src", "scripts", "data", "initial_model", "benchmarks", "examples")
                 for path in ROOT.joinpath(folder).rglob("*.py"))  # fmt: skip

# --- what the tree may not hold ---

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "yaml.load", "joblib.load",
    "torch.load", "torch.save", "subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path",
    "tempfile.mktemp",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
REQUIRED = {"numpy.load": ("allow_pickle", False)}
NEVER_TRUE = {"shell", "trust_remote_code", "allow_pickle"}


def imported(tree: ast.AST) -> dict[str, str]:
    """Names in a file -> what they were imported as: `np` -> `numpy`, `load` -> `torch.load`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`a.b.c` of a chain of attributes, empty for anything else; `names` as `imported` returns them."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def forbidden(source: str) -> list[str]:
    """What a source file does that none here may do."""
    found, tree = [], ast.parse(source)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"import {name}" for name in modules if name and name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        given = {word.arg: word.value for word in node.keywords}
        for more in (word.value for word in node.keywords if word.arg is None and isinstance(word.value, ast.Dict)):
            given |= {getattr(key, "value", None): value for key, value in zip(more.keys, more.values)}
        if name in FORBIDDEN:
            found.append(name)
        if name in REQUIRED:
            key, value = REQUIRED[name]
            if getattr(given.get(key), "value", None) is not value:
                found.append(f"{name} without {key}={value}")
        for key in NEVER_TRUE & given.keys():
            if getattr(given[key], "value", None) is not False:
                found.append(f"{name}({key}=...)")
        if name.endswith("from_pretrained") and "use_safetensors" in given:
            if getattr(given.get("use_safetensors"), "value", None) is not True:
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tree_makes_no_forbidden_call(path):
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "eval(text)", "exec(text)", "import os\nos.system('ls')", "import pickle", "from pickle import load",
    "torch.load(path)", "torch.load(path, weights_only=True)", "import numpy as np\nnp.load(path)", "yaml.load(text)",
    "subprocess.run('ls', shell=True)", "subprocess.run('ls', shell=wanted)", "torch.save(state, path)",
    "from torch import load\nload(path)", "import torch as t\nt.load(path)", "from os import system\nsystem('ls')",
    "subprocess.run('ls', **{'shell': True})",
    "AutoModel.from_pretrained(name, trust_remote_code=True)", "M.from_pretrained(name, use_safetensors=False)",
])  # fmt: skip
def test_the_search_finds_what_it_looks_for(source):
    assert forbidden(source)


def test_what_is_good_is_not_found():
    assert not forbidden("model.eval(); subprocess.run(['ls']); re.compile('x')")


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts*/*.sh")), ids=lambda path: path.name)
def test_no_script_builds_a_command_from_text(script):
    code = "\n".join(line.split("#")[0] for line in script.read_text(encoding="utf-8").splitlines())
    assert "eval " not in code and "bash -c" not in code and "sh -c" not in code


# --- payloads ---


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that a payload would make."""
    return tmp_path / "mark"


class Payload:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def write_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Payload(mark)}))


def write_checkpoint(path: Path, mark: Path) -> None:
    torch.save({"a": Payload(mark)}, path)


def write_zip(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"../../{mark.name}", "out")


WRITERS = [write_pickle, write_checkpoint, write_zip]


def test_the_payloads_would_work(mark, tmp_path):
    write_pickle(tmp_path / "file", mark)
    pickle.loads((tmp_path / "file").read_bytes())
    assert mark.exists()


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(T5, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path) -> None:
    """Load a model, whether it is refused or not."""
    try:
        load_model_and_tokenizer(str(folder))
    except InputError:
        pass


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "training_args.bin", "spiece.model"])
def test_no_file_of_a_model_is_unpickled(model, mark, name, write):
    if name.startswith("pytorch"):
        (model / "model.safetensors").unlink()
    write(model / name, mark)
    load(model)
    assert not mark.exists() and not (model.parent.parent / mark.name).exists()


@pytest.mark.parametrize("write", WRITERS)
def test_no_piece_of_a_model_is_unpickled(model, mark, write):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    write(model / "pytorch_model.bin", mark)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    put(model / "model.safetensors.index.json", index)
    load(model)
    assert not mark.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_nothing_of_an_adapter_is_unpickled(tmp_path, mark, write):
    adapter = tmp_path / "t5_adapter"
    put(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 8, "target_modules": "q"})
    for name in ("adapter_model.bin", "adapter_model.safetensors"):
        write(adapter / name, mark)
        with pytest.raises(InputError):
            load_loranew(torch.nn.Module(), adapter)
    write(adapter / "gradient_space.safetensors", mark)
    with pytest.raises(InputError):
        GradientSpace().load(adapter / "gradient_space.safetensors", {})
    assert not mark.exists()


OWN_CODE = {
    "a config class": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}),
    "a model class": ("config.json", {"auto_map": {"AutoModelForSeq2SeqLM": "code.Own", "AutoConfig": "code.Own"}}),
    "a tokenizer class": ("tokenizer_config.json", {
        "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}),
    "a generation function": ("generation_config.json", {"custom_generate": "code"}),
    "attention kernels": ("config.json", {"_attn_implementation": "someone/kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("what", OWN_CODE)
def test_code_that_comes_with_a_model_is_not_run(model, mark, what, monkeypatch):
    file, values = OWN_CODE[what]
    path = model / file
    put(path, (json.loads(path.read_text()) if path.exists() else {}) | values)
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n"
    (model / "code.py").write_text(code)
    put(model / "custom_generate" / "generate.py", code)
    monkeypatch.syspath_prepend(model)
    load(model)
    assert not mark.exists()


def test_an_adapter_cannot_have_a_module_imported(tmp_path, mark, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = tmp_path / "t5_adapter"
    for extra in ({"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
                  {"auto_mapping": {"parent_library": "evil_module", "base_model_class": "Own"}},
                  {"task_type": "evil_module"}, {"runtime_config": {"a": "evil_module"}}):  # fmt: skip
        put(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 8, "target_modules": "q", **extra})
        with pytest.raises(InputError):
            load_loranew(torch.nn.Module(), adapter)
    assert not mark.exists()


# --- out of the data folder ---

NAMES = ["..", ".", "", "../x", "/etc", "a/b", "a\\b", "C:\\x", "~", "~root", "-rf", "_x", "$(touch mark)",
         "`touch mark`", "a;b", "a b", "a\nb", "a\0b", "a*", "..\u2215x", "\u202etxt", "\ud800",
         "x" * 5000]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_cannot_leave_its_folder(name):
    with pytest.raises(InputError):
        check_name(name, "a name")


@pytest.fixture
def step(tmp_path) -> Path:
    """A step over TC/mine, whose benchmark folder lies beside a file that is none of its own."""
    rows = [{"sentence": "private", "label": "A"}]
    for place in ("benchmark/TC/mine", "private"):
        for name in ("train", "dev", "test"):
            put(tmp_path / place / f"{name}.json", rows)
        put(tmp_path / place / "labels.json", ["A", "B"])
    order_config.write_order(tmp_path / "mine_configs", [("TC", "mine")])
    return tmp_path / "mine_configs" / "mine"


def read(root: Path) -> list[dict]:
    options = ExampleOptions(root / "benchmark", ROOT / "configs" / "instruction_config.json")
    return list(read_examples([root / "mine_configs" / "mine"], options))


@pytest.mark.parametrize("link", ["benchmark/TC/mine/train.json", "benchmark/TC/mine/labels.json", "benchmark/TC/mine",
                                  "benchmark/TC"])  # fmt: skip
def test_a_link_cannot_leave_the_benchmark(step, tmp_path, link):
    assert read(tmp_path)
    path, outside = tmp_path / link, tmp_path / "private"
    if path.is_dir():
        shutil.rmtree(path)
        target = outside if path.name == "mine" else outside.parent / "tasks"
        if target != outside:
            target.mkdir()
            outside.rename(target / "mine")
    else:
        path.unlink()
        target = outside / path.name
    path.symlink_to(target)
    with pytest.raises(InputError, match="a link to .*; allowed: files inside"):
        read(tmp_path)


def test_a_benchmark_may_itself_be_a_link(step, tmp_path):
    (tmp_path / "benchmark").rename(tmp_path / "disk")
    (tmp_path / "benchmark").symlink_to(tmp_path / "disk")
    assert read(tmp_path)


# --- through the shell ---

SHELL = ["$(touch {mark})", "`touch {mark}`", "; touch {mark}", "&& touch {mark}", "| touch {mark}", "> {mark}",
         "x'; touch {mark}; '", 'x"; touch {mark}; "', "x\ntouch {mark}\n", "<(touch {mark})", "${{IFS}}touch"]


@pytest.mark.parametrize("text", SHELL, ids=ascii)
def test_an_order_name_is_no_command(text, mark):
    done = bash("scripts/order.sh", text.format(mark=mark))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert not mark.exists()


@pytest.mark.parametrize("text", SHELL, ids=ascii)
def test_a_variable_that_is_checked_is_no_command(text, mark):
    for name in ("NPROC", "DS_CONFIG", "DATA_DIR"):
        assert bash("scripts/order_1.sh", DRY_RUN="1", **{name: text.format(mark=mark)}).returncode == 2
    assert not mark.exists()


def test_a_variable_that_is_passed_on_is_no_command(checkout, mark):  # noqa: F811
    attack = "\n".join(SHELL).format(mark=mark)
    done = order_1(checkout, OUTPUT=f"out {attack.replace('/', '_')}"[:200], EXTRA=attack, **dict.fromkeys(
        ("MODEL", "METHOD", "SEED"), attack))  # fmt: skip
    assert done.returncode == 0, done.stderr
    [results] = checkout.glob("out*/order_1/outputs/command.json")
    command = json.loads(results.read_text())
    for flag in ("--model_name_or_path", "--method", "--seed"):
        assert command[command.index(flag) + 1] == attack
    words = shlex.split(attack)
    assert command[-len(words) :] == words  # of EXTRA, nothing expanded
    assert not mark.exists() and not list(checkout.rglob("mark"))


def test_a_config_is_no_command(tmp_path, mark):
    root = tmp_path / "checkout"
    for folder in ("scripts", "configs/order1_configs"):
        shutil.copytree(ROOT / folder, root / folder)
    for name in ("requirements.txt", "requirements.lock"):
        (root / name).write_text("")
    path = root / "configs" / "order1_configs" / "dbpedia" / "train_tasks.json"
    for text in SHELL:
        put(path, {"TC": [{"dataset name": text.format(mark=mark)}]})
        done = bash("scripts/order_1.sh", cwd=root, DRY_RUN="1")
        assert done.returncode == 0 and text.format(mark=mark) not in done.stdout
        with pytest.raises(InputError, match="order1_configs/dbpedia/train_tasks.json"):
            read_order(path.parent.parent)
    assert not mark.exists()


def test_what_a_file_holds_cannot_act_on_the_terminal():
    line = str(InputError("found '\x1b[2J\x07\u202e\ud800' and \u00e9\u4e2d"))
    assert line == "found '\\x1b[2J\\x07\\u202e\\ud800' and \u00e9\u4e2d"
