"""Run one task of an order: arguments -> data -> model -> method -> training -> saving -> evaluation.

`command_line.py` has an example; `run_order.py` chains the tasks of an order. Lines that begin with `[gorp]` report
what the run trains, projects and protects, and its scores.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import datasets
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import TrainerState, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from arguments import DataArguments, ModelArguments, UIETrainingArguments, check_data_arguments
from checkpoints import is_complete, latest_complete
from command_line import parse_arguments
from compute_metrics import accuracy_line, gpt2_folder, score_key
from errors import InputError, RunStopped, first_line, is_disk_full
from files import atomic_file, atomic_folder, read_json, write_json
from loranew.adapter import CONFIG_FILE
from methods import Method, find_method
from methods.base_modules import choose_modules
from methods.base_options import MethodArguments
from model.loading import LoadedModel, cast_parameters
from order_config import order_name
from prompts import save_card, save_prompts
from ranks import check_shared, disconnect, of_first_rank
from report.matrix import accuracy_matrix, average_performance, backward_transfer
from run_record import ADAPTERS, PARTS, Progress, begin, complete, find_adapter, find_progress, make_record
from task_examples import first_examples_of_each, place_in_order
from task_setup import build_trainer, input_files, load_examples, load_model
from uie_trainer_lora import UIETrainer

logger, detail = logging.getLogger("gorp"), logging.getLogger("gorp.detail")

# Options that the report shows at their defaults too, and those that do not make a run another one.
SHOWN = ("learning_rate", "max_steps", "num_train_epochs", "lr_scheduler_type", "max_train_samples",
         "max_predict_samples")
APART = ("seed", "data_seed", "ranks", "model_name_or_path", "do_train", "do_eval", "do_predict", "predict_tasks",
         "zero_shot", "unseen_config_dir", "use_cpu", "accelerator_config", "include_for_metrics", "predict_loss")
VALIDATION = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "denser_evaluation", "max_eval_samples",
              "metric_for_best_model")  # where no validation chooses the model
SMALLER = ("Training takes less with a smaller --per_device_train_batch_size and more --gradient_accumulation_steps, "
           "evaluation with a smaller --per_device_eval_batch_size or --eval_batch_tokens; change them")


def main(argv: list[str] | None = None) -> int:
    """Run one task; returns 0, or, after one printed line, 2 for bad input, 1 for a stopped run, 130 for Ctrl-C."""
    try:
        groups = parse_arguments(argv)
        if groups[-1].deepspeed and not torch.distributed.is_initialized():
            raise InputError(f"--deepspeed: found {groups[-1].deepspeed} without a launcher; allowed: with NPROC= or "
                             "DS_CONFIG= in front of a script, or under `deepspeed` or `torchrun`")
        with only_run_in(Path(groups[-1].output_dir)):
            run(*groups)
        return 0
    except InputError as error:
        status, line = 2, f"error: {error}"
    except RunStopped as error:
        status, line = 1, f"error: {error}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted; the same command resumes"  # 130 as in a shell
    except torch.OutOfMemoryError as error:
        status, line = 1, f"error: {first_line(error)} {SMALLER}, and the same command resumes"
    except Exception as error:
        if not is_disk_full(error):
            raise
        status = 1
        line = f"error: a disk is full ({first_line(error)}); finished results are kept, the same command resumes"
    tqdm.write(line, file=sys.stderr)  # on a line of its own, even beside a progress bar
    return status


def run(model_args: ModelArguments, data_args: DataArguments, method_args: MethodArguments,
        training_args: UIETrainingArguments) -> None:
    """Train and evaluate one task, resuming an earlier run with the same record.

    Anything that a user can fix raises InputError, before training where possible and before earlier results change.
    """
    started = time.monotonic()
    set_up_logging(training_args)
    report_settings(model_args, data_args, training_args)
    check_data_arguments(data_args)
    if data_args.multilingual:
        of_first_rank(gpt2_folder)  # before training: it may have to be fetched
    method, output_dir = find_method(method_args.method)(method_args), Path(training_args.output_dir)
    run_record, progress, trained = of_first_rank(
        functools.partial(compare_with_earlier, model_args, data_args, method, training_args)
    )
    if progress is Progress.COMPLETED:
        logger.info("%s: finished before with the same settings, data and code; nothing to do", output_dir)
        return
    if progress is Progress.TRAINED:
        logger.info("%s: trained before; only the evaluation runs", output_dir)
        training_args.do_train = data_args.zero_shot = False
        model_args.model_name_or_path = str(trained)
    method.trains = training_args.do_train
    set_seed(training_args.seed)
    examples = load_examples(data_args, training_args, method)
    loaded, model = load_and_attach(model_args, data_args, training_args, method)
    trainer = build_trainer(model, method, loaded, examples, data_args, training_args)
    run_record["report"] = describe_run(trainer, loaded.base_name, data_args, run_record["configuration"])
    trains = training_args.do_train and len(examples["train"]) > 0
    if training_args.do_train and not trains and loaded.previous is None:
        raise InputError(f"--method {method.full_name}: chose no training examples for the first task, which has no "
                         "earlier result to keep; at least one is needed")
    checkpoint = of_first_rank(lambda: find_checkpoint(trainer, progress)) if trains else None
    zero_shot = {}
    if "zero_shot" in examples and (trains or not training_args.do_train):  # multitask's later tasks have no such score
        with torch.random.fork_rng():  # so that evaluation does not change training
            zero_shot = score(trainer, examples["zero_shot"], "zero_shot")
    claim = functools.partial(claim_output_dir, trainer, run_record, progress, zero_shot)
    if trains:
        trainer.when_prepared = claim  # no earlier: a run that cannot begin must not delete results
    else:
        claim()
    if training_args.do_train:
        report_method(method, data_args.task_config_dir)
        adapter = output_dir / ADAPTERS[loaded.decoder_only]
        if trains:
            train(trainer, checkpoint)
            dataset = Path(data_args.task_config_dir).name  # the task's own
            save_task(trainer, adapter, loaded, examples, dataset)  # from here on the task counts as trained
        else:
            write_results(trainer, "train", {"train_samples": 0, "train_runtime": 0.0})
            copy_previous(trainer, loaded.previous, adapter)
    elif progress is Progress.TRAINED:
        trainer.state = TrainerState.load_from_json(str(output_dir / "trainer_state.json"))
    evaluate(trainer, examples, data_args.task_config_dir, started)
    if trainer.is_world_process_zero():
        complete(output_dir)
    trainer.release()


def report_settings(model_args: ModelArguments, data_args: DataArguments, training_args: UIETrainingArguments) -> None:
    """Report GPUs that stay idle, bf16 that is emulated, and flags that are ignored whatever the method."""
    if idle := training_args.idle_gpus():
        logger.info("one process uses one GPU: %d more are idle; NPROC=N in front of a script starts N processes", idle)
    if training_args.bf16 and training_args.device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            logger.warning("%s emulates bf16, slowly; --bf16 False trains in float32", torch.cuda.get_device_name())
    ignored = [*training_args.ignored(), *["use_fast_tokenizer"] * (not model_args.use_fast_tokenizer),
               *["overwrite_cache"] * data_args.overwrite_cache]
    if ignored:
        logger.info("ignored: %s", ", ".join(f"--{name}" for name in ignored))


def compare_with_earlier(model_args: ModelArguments, data_args: DataArguments, method: Method,
                         training_args: UIETrainingArguments) -> tuple[dict, Progress, Path | None]:
    """This run's record, how far an earlier run with the same record got, and the adapter folder that it saved."""
    output_dir = Path(training_args.output_dir)
    index, order = place_in_order(data_args.task_config_dir)
    place = f"{index + 1} of {len(order)}" if method.counts_tasks else None
    files = input_files(data_args, training_args, method)
    found = make_record(files, model_args, data_args, method, training_args, place)
    progress = find_progress(output_dir, found, start_over=training_args.overwrite_output_dir)
    return found, progress, find_adapter(output_dir)


def report_method(method: Method, task_config_dir: str) -> None:
    """Report what trains and is protected; what is the same for every task, on the terminal only in the first."""
    first, *others = method.summary()
    logger.info(first)
    later_task = place_in_order(task_config_dir)[0] > 0
    for line in others:
        (detail if later_task else logger).info(line)


def evaluate(trainer: UIETrainer, examples: datasets.DatasetDict, task_config_dir: str, started: float) -> None:
    """Score what the flags ask for: the validation examples, the test examples so far, the unseen datasets."""
    if trainer.args.do_eval:
        write_results(trainer, "eval", trainer.evaluate())
    if trainer.args.do_predict:
        predict(trainer, examples["test"], task_config_dir, started)
    if "unseen" in examples:
        write_results(trainer, "unseen", score(trainer, examples["unseen"], "unseen"))


def load_and_attach(model_args: ModelArguments, data_args: DataArguments, training_args: UIETrainingArguments,
                    method: Method) -> tuple[LoadedModel, torch.nn.Module]:
    """Load the base model and attach the method to it; returns what was loaded, and the model that trains."""
    # ZeRO-3 must shard the model only when training begins, after the method is attached, not while it is read.
    unset_hf_deepspeed_config()
    how = {"dtype": base_dtype(training_args, method)}
    if model_args.load_in_4bit:  # the weights that change must be known before any are read
        choose_modules(method.options, load_model(model_args, data_args, weights=False).model)
        how["not_in_4bit"] = method.options.changed_base()
    loaded = load_model(model_args, data_args, **how)
    if how["dtype"] == torch.float16:
        cast_parameters(loaded.model, torch.float16)  # even what the class keeps in float32, such as T5's wo
    if method.zero_stage is None and not model_args.load_in_4bit:
        loaded.model.to(training_args.device)  # before `prepare`, where OSF computes an SVD of each weight
    sharded = bool(training_args.deepspeed) and training_args.do_train
    model = method.prepare(loaded.model, loaded.previous, decoder_only=loaded.decoder_only, sharded=sharded)
    if training_args.deepspeed:
        set_hf_deepspeed_config(training_args.hf_deepspeed_config)
    return loaded, model


def base_dtype(training_args: UIETrainingArguments, method: Method) -> torch.dtype:
    """The dtype in which the base model is read; trainable parameters are float32 all the same."""
    if method.float32_base:
        return torch.float32
    if training_args.fp16 and training_args.deepspeed:
        return torch.float16  # DeepSpeed's cast of a float32 base would round earlier tasks' changes away
    return torch.bfloat16 if training_args.bf16 else torch.float32


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock the output folder, so that a process that outlived its script does not write alongside a later one."""
    with contextlib.ExitStack() as held:
        of_first_rank(lambda: bool(held.enter_context(lock(folder))))  # the lock itself cannot be broadcast
        check_shared(folder)
        yield


def lock(folder: Path) -> contextlib.AbstractContextManager:
    """The acquired lock of an output folder; InputError if another run holds it."""
    try:
        return FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise InputError(f"--output_dir: another run is writing to {folder}; wait for it, or stop it. If there is "
                         f"none, the lock of a killed run was left behind: remove {folder / '.lock'}") from None
    except OSError as error:  # the file may be another user's
        raise InputError(f"{folder / '.lock'}: cannot be locked ({error.strerror})") from None


def find_checkpoint(trainer: UIETrainer, progress: Progress) -> Path | None:
    """The checkpoint to resume from: the last complete one of the same run, or that of `--resume_from_checkpoint`
    ("True" means the last one in the output folder); None if there is none."""
    named, most = trainer.args.resume_from_checkpoint, trainer.args.max_steps
    if named in ("True", "true") or (named is None and progress is Progress.BEGUN):
        return latest_complete(Path(trainer.args.output_dir))
    if named is None:
        return None
    if not is_complete(Path(named)):
        raise InputError(f"--resume_from_checkpoint: {named} is not a complete checkpoint; allowed: checkpoint-N")
    step = TrainerState.load_from_json(str(Path(named) / "trainer_state.json")).global_step
    if 0 < most < step:
        raise InputError(f"--resume_from_checkpoint: {named} is of step {step}; allowed: at most {most}, --max_steps")
    return Path(named)


def train(trainer: UIETrainer, checkpoint: Path | None) -> None:
    """Train the task, from a checkpoint if there is one; its `train_runtime` includes the method's own passes."""
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    started = time.monotonic()
    trainer.method.begin_task(trainer.model, trainer.shown_batches())
    metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    trainer.method.revisit(trainer.model_wrapped, trainer.shown_batches())
    trainer.method.end_task()
    sums = {"train_samples": len(trainer.train_dataset), "train_runtime": round(time.monotonic() - started, 4)}
    write_results(trainer, "train", metrics | sums)


def save_task(trainer: UIETrainer, adapter: Path, loaded: LoadedModel, examples: datasets.DatasetDict,
              dataset: str) -> None:
    """Write the complete adapter folder; the prompt of `dataset` comes last."""
    for line in trainer.method.closing_summary():
        detail.info(line)
    if trainer.is_world_process_zero():
        with atomic_folder(adapter) as partial:
            trainer.method.save(partial)
            if origin := {name: value for name, value in loaded.origin.items() if value is not None}:
                write_json(partial / CONFIG_FILE, read_json(partial / CONFIG_FILE) | origin, indent=2)
            loaded.tokenizer.save_pretrained(partial)
            shown = [first_examples_of_each(examples[split], 1) for split in ("test", "train")]
            own_last = sorted(chain(*shown), key=lambda example: example["Dataset"] == dataset)
            save_prompts(partial, loaded.previous, own_last, trainer.data_collator)
            save_card(partial, trainer.method.full_name, loaded.base_name)
    trainer.accelerator.wait_for_everyone()


def copy_previous(trainer: UIETrainer, previous: Path, adapter: Path) -> None:
    """Copy the previous task's adapter folder, for a task in which the method trains nothing."""
    logger.info("nothing trains in this task: %s is copied", previous)
    if trainer.is_world_process_zero():
        with atomic_folder(adapter) as partial:
            shutil.copytree(previous, partial, dirs_exist_ok=True)
    trainer.accelerator.wait_for_everyone()


def predict(trainer: UIETrainer, examples: datasets.Dataset, config_dir: str, started: float) -> None:
    """Answer the test examples of every task so far; write predictions as JSON lines, and the scores."""
    output_dir = Path(trainer.args.output_dir)
    output = trainer.predict(examples, metric_key_prefix="predict")
    if trainer.is_world_process_zero():
        file = output_dir / "predict_eval_predictions.jsonl"
        with atomic_file(file) as partial, open(partial, "w", encoding="utf-8") as lines:
            for example, prediction in zip(examples, output.predictions):
                kept = {key: example[key] for key in ("Task", "Dataset", "Metric", "Instance")}
                lines.write(json.dumps(kept | {"Prediction": prediction}, ensure_ascii=False) + "\n")
    metrics = output.metrics | {"predict_samples": len(examples), "predict_global_step": trainer.state.global_step}
    index, order = place_in_order(config_dir)
    tested = sorted(dict.fromkeys(examples["Dataset"]), key=[*order, *examples["Dataset"]].index)
    write_results(trainer, "predict", metrics)
    if trainer.is_world_process_zero():
        track(trainer, metrics, tested, index + 1)
    logger.info(accuracy_line(metrics, tested, f"{output_dir.name} ({time.monotonic() - started:.0f} s)", "predict_"))


def track(trainer: UIETrainer, metrics: dict, tested: list[str], task: int) -> None:
    """Send the accuracies of all tasks so far, AP and BWT to the trackers of `--report_to`, and end their runs: each
    task is a run of its own."""
    args = trainer.args
    scores = {f"test_accuracy_{dataset}": metrics[score_key(metrics, dataset, "predict_")] for dataset in tested}
    with contextlib.suppress(InputError):  # the output folder is not in an order's
        _, matrix = accuracy_matrix(Path(args.output_dir).resolve().parent.parent)
        measures = {"AP": average_performance(matrix), "BWT": backward_transfer(matrix)}
        scores |= {f"test_{name}": value for name, value in measures.items() if value is not None}
    mlflow = sys.modules["mlflow"] if "mlflow" in args.report_to else None
    if mlflow and mlflow.active_run() is None and mlflow.last_active_run():  # the callback ended it with training
        mlflow.start_run(run_id=mlflow.last_active_run().info.run_id)
    trainer.log(scores | {"test_task": task})
    if mlflow:
        mlflow.end_run()
    if "wandb" in args.report_to:
        sys.modules["wandb"].finish()


def score(trainer: UIETrainer, examples: datasets.Dataset, part: str) -> dict:
    """The scores on examples beyond those of the tasks so far; predictions are not saved."""
    datasets_tested = list(dict.fromkeys(examples["Dataset"]))
    counted = {f"{part}_samples": len(examples), f"{part}_datasets": datasets_tested}
    metrics = trainer.predict(examples, metric_key_prefix=part).metrics | counted
    logger.info("%s: %s", part.replace("_", "-"), accuracy_line(metrics, datasets_tested, prefix=f"{part}_"))
    return metrics


def describe_run(trainer: UIETrainer, base_name: str, data_args: DataArguments, configuration: dict) -> dict:
    """What a report shows of a run besides its scores; part of its record, of which `configuration` is another."""
    args, options, config = trainer.args, trainer.method.effective_options(), Path(data_args.task_config_dir)
    total, trained = trainer.method.sizes()
    groups, elsewhere = (args, data_args, ModelArguments), {*vars(trainer.method.options), *APART}
    elsewhere |= set() if args.load_best_model_at_end else set(VALIDATION)
    elsewhere |= {*trainer.method.options.unread()}
    defaults = {option.name: option.default for group in groups for option in dataclasses.fields(group)}
    shared = {name: value for name, value in configuration.items() if name not in elsewhere
              and (name in SHOWN or (value or None) != (defaults.get(name) or None))}  # fmt: skip
    return {
        "method": trainer.method.full_name,
        "seed": args.seed,
        "base_model": base_name,
        "order": order_name(config.resolve().parent),
        "dataset": config.name,
        "processes": args.world_size,
        "values": total,
        "trained_values": trained,
        "options": options | shared,
    }


def write_results(trainer: UIETrainer, part: str, metrics: dict) -> None:
    """Write `<part>_results.json`, and update all_results.json and trainer_state.json."""
    if not trainer.is_world_process_zero():
        return
    output_dir, together = Path(trainer.args.output_dir), {}
    write_json(output_dir / f"{part}_results.json", metrics, sort_keys=True)
    for path in (output_dir / f"{each}_results.json" for each in PARTS):
        together |= read_json(path) if path.exists() else {}
    write_json(output_dir / "all_results.json", together, sort_keys=True)
    with atomic_file(output_dir / "trainer_state.json") as partial:
        trainer.state.save_to_json(str(partial))


def claim_output_dir(trainer: UIETrainer, run_record: dict, progress: Progress, zero_shot: dict) -> None:
    """Claim the output folder for this run, once all of its input is checked; collective."""
    trainer.accelerator.wait_for_everyone()  # before the first rank removes what the others read
    if trainer.is_world_process_zero():
        keep = trainer.args.resume_from_checkpoint is not None
        begin(Path(trainer.args.output_dir), run_record, progress, keep_checkpoints=keep)
    trainer.accelerator.wait_for_everyone()
    if zero_shot:
        write_results(trainer, "zero_shot", zero_shot)


def set_up_logging(training_args: UIETrainingArguments) -> None:
    """Log the run's lines, which begin with `[gorp]`, and its details, which do not, on the first rank."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name, form in (("gorp", "[gorp] %(message)s"), ("gorp.detail", "%(message)s")):
        own = logging.getLogger(name)
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(form))
        own.handlers = [handler]
        own.propagate = False
        own.setLevel(logging.INFO if training_args.process_index == 0 else logging.ERROR)
    datasets.disable_progress_bars()


if __name__ == "__main__":
    status = main()
    if status == 0:  # after an error of one rank alone, the others may be waiting for it in a collective
        disconnect()
    sys.exit(status)
