"""What a run depends on and how far it got: the files that let an order resume.

In a task's output folder,

* `run_record.json` is written before training: every option that can change a result, digests of the data, the model
  and the code, and the packages' versions; also, not compared, the git revision, the machine, and what a report needs.
* The adapter folder appears, complete, when training is done.
* `completed.json` is written last.

A run that is started again resumes if its record equals the one in the folder; otherwise it is rejected, with an error
that lists what has changed.
"""

import ast
import enum
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from modulefinder import ModuleFinder
from pathlib import Path

import torch

from checkpoints import checkpoint_folders, is_complete
from errors import InputError
from files import digest, read_json, write_json
from methods import Method
from model.loading import model_files

logger = logging.getLogger("gorp")

RECORD = "run_record.json"
COMPLETED = "completed.json"
ADAPTERS = ("t5_adapter", "llama_adapter")  # of an encoder-decoder, of a decoder-only model
PARTS = ("zero_shot", "train", "eval", "predict", "unseen")  # of a task, each with a results file
RESULT_FILES = (*(f"{part}_results.json" for part in PARTS), "all_results.json", "predict_eval_predictions.jsonl",
                "trainer_state.json")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "datasets", "numpy")
SOURCE = Path(__file__).resolve().parent

# Options that change no result: paths (whose files' contents are compared), logging, saving, evaluation batches.
NOT_COMPARED = {
    "output_dir", "run_name", "data_dir", "task_config_dir", "instruction_file", "cache_dir", "deepspeed",
    "input_record_file", "use_auth_token", "overwrite_output_dir", "overwrite_cache", "resume_from_checkpoint",
    "local_rank", "disable_tqdm", "report_to", "project", "push_to_hub", "ddp_timeout", "debug", "skip_memory_metrics",
    "max_non_finite_steps", "per_device_eval_batch_size", "eval_batch_tokens",
}
NOT_COMPARED_PREFIXES = ("save_", "logging_", "log_", "hub_", "trackio_", "dataloader_pin", "dataloader_persistent",
                         "dataloader_prefetch", "dataloader_num")
COMPARED = ("configuration", "data", "model", "code", "versions")
SHOWN = 3  # differences that an error lists


class Progress(enum.Enum):
    """How far the run in an output folder got."""

    NEW = "no results yet"
    BEGUN = "training has begun"
    TRAINED = "training is done, evaluation is not"
    COMPLETED = "everything is done"


def make_record(data: Mapping[str, Path], model_args, data_args, method: Method, training_args,
                place: str | None = None) -> dict:
    """The record of the run that these arguments describe, with the data files of `input_files`; `place`: the task's
    place in the order, where the result depends on it."""
    options = training_args.to_dict() | vars(method.options) | vars(data_args) | vars(model_args)
    if not method.averages_micro_batches:
        options["per_device_train_batch_size x gradient_accumulation_steps"] = (  # less memory, the same step
            options.pop("per_device_train_batch_size") * options.pop("gradient_accumulation_steps")
        )
    if training_args.dataloader_drop_last:  # which examples are left out depends on the micro-batch
        options["per_device_train_batch_size"] = training_args.per_device_train_batch_size
    prefixes = NOT_COMPARED_PREFIXES
    if training_args.load_best_model_at_end:  # one of those saved
        prefixes = tuple(prefix for prefix in prefixes if prefix != "save_")
    packages = PACKAGES
    if training_args.deepspeed:
        data = {**data, "DeepSpeed config": Path(training_args.deepspeed)}
        packages += ("deepspeed",)
    model = model_files(model_args.model_name_or_path)
    if model or os.path.exists(model_args.model_name_or_path):
        options.pop("model_name_or_path")
    for flag in ("config_name", "tokenizer_name"):
        folder = getattr(model_args, flag)
        files = model_files(folder).values() if folder else ()
        model |= {f"{flag}/{path.name}": path for path in files if path.suffix != ".safetensors"}
    compared = {
        "configuration": {
            name: value for name, value in sorted(options.items())
            if name not in NOT_COMPARED and not name.startswith(prefixes)
        } | {"ranks": training_args.world_size},
        "data": {name: digest(path) for name, path in data.items()} | ({"place in the order": place} if place else {}),
        "model": {name: digest(path) for name, path in model.items()},
        "code": code_digests(method.options.method),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
    }
    device = torch.cuda.get_device_name() if training_args.device.type == "cuda" else platform.machine()
    machine = {"device": device, "threads": torch.get_num_threads()}
    shown = {"git_revision": _git_revision(), "machine": machine}
    return json.loads(json.dumps(compared | shown, default=str))


def find_progress(output_dir: Path, record: dict, *, start_over: bool) -> Progress:
    """How far an earlier run with the same record got. Changes nothing, so that all ranks find the same.

    Raises:
        InputError: the folder holds results of a run with another record, or with none, unless `start_over`.
    """
    kept = _kept(output_dir)
    if start_over or not kept:
        return Progress.NEW
    hint = "use another folder, or start over with --overwrite_output_dir (--fresh of the scripts)"
    if not (output_dir / RECORD).exists():
        raise InputError(f"--output_dir: {output_dir} holds {kept[0].name} but no {RECORD}; {hint}")
    earlier, completed = read_json(output_dir / RECORD), (output_dir / COMPLETED).exists()
    if completed:  # a start that `--drop_weights` has removed decides nothing any more
        model = earlier.get("model", {})
        earlier["model"] = {name: value for name, value in model.items() if name in record["model"]}
    if changes := differences(earlier, record):
        more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise InputError(f"--output_dir: {output_dir} holds a run that differs: {'; '.join(changes[:SHOWN])}{more}; "
                         f"undo these changes, {hint}")
    if completed:
        return Progress.COMPLETED
    return Progress.BEGUN if find_adapter(output_dir) is None else Progress.TRAINED


def differences(before: dict, now: dict) -> list[str]:
    """The changes between two records, one entry for each option, file or package."""
    changes = []
    for section in COMPARED:
        old, new = (record.get(section, {}) for record in (before, now))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                changes.append(_change(section, name, old.get(name), new.get(name)))
    return changes


def begin(output_dir: Path, record: dict, progress: Progress, *, keep_checkpoints: bool) -> None:
    """Remove what does not belong to the run, and write its record; on one rank only."""
    new = progress is Progress.NEW
    removed = _kept(output_dir, checkpoints=False) if new else []
    if not keep_checkpoints:  # a complete one of another run would be taken for this run's when it resumes
        removed += [folder for folder in checkpoint_folders(output_dir) if new or not is_complete(folder)]
    for path in [*removed, *output_dir.glob(".*.partial")]:
        if path.name.startswith("checkpoint-") and is_complete(path):
            logger.warning("%s: removed, a checkpoint of an earlier run", path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if new:
        write_json(output_dir / RECORD, record)


def complete(output_dir: Path) -> None:
    """Mark the run as done."""
    write_json(output_dir / COMPLETED, {})


def find_adapter(output_dir: Path) -> Path | None:
    """The adapter folder that a finished training saved."""
    return next((output_dir / name for name in ADAPTERS if (output_dir / name).is_dir()), None)


def _kept(output_dir: Path, *, checkpoints: bool = True) -> list[Path]:
    """What an earlier run saved and a new one would replace, the mark of its completion first."""
    kept = [output_dir / name for name in (COMPLETED, *RESULT_FILES, *ADAPTERS)]
    if checkpoints and (output_dir / RECORD).exists():
        kept += filter(is_complete, checkpoint_folders(output_dir))
    return [path for path in kept if path.exists()]


def _change(section: str, name: str, before, now) -> str:
    if section in ("configuration", "versions"):
        return f"{'--' if section == 'configuration' else ''}{name} was {before}, is {now}"
    return f"{name} " + ("is new" if before is None else "is gone" if now is None else "has changed")


@functools.cache  # once for all tasks of an order, as what a process runs is what it imported
def code_digests(method: str) -> dict[str, str]:
    """Digests of the files in src/ that a run of this method imports, without comments and docstrings."""
    finder = ModuleFinder(path=[str(SOURCE)])  # reads code and runs none
    finder.run_script(str(SOURCE / "run_uie_lora.py"))
    own = SOURCE / "methods" / f"{method}.py"
    finder.load_file(str(own if own.exists() else find_spec(f"methods.{method}").origin))
    digests = {}
    for path in (Path(module.__file__) for module in finder.modules.values() if module.__file__):
        name = f"src/{path.relative_to(SOURCE)}" if path.is_relative_to(SOURCE) else path.name
        tree = _WithoutDocstrings().visit(ast.parse(path.read_bytes()))
        digests[name] = hashlib.sha256(ast.dump(tree).encode()).hexdigest()
    return dict(sorted(digests.items()))


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


@functools.cache
def _git_revision() -> str | None:
    """The commit of the code, with `-dirty` if files differ from it; None outside this project's repository, which is
    recognised by its scripts: a copy of src/ in another repository lacks them."""
    if _git("ls-files", "--full-name", "run_record.py", "../scripts/lib.sh") != "scripts/lib.sh\nsrc/run_record.py":
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*command: str) -> str | None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # they may name another
    try:
        done = subprocess.run(["git", "-c", "safe.directory=*", "-C", str(SOURCE), *command],  # also another user's
                              capture_output=True, text=True, timeout=20, env=own)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
