"""Entry: one task of an order. Arguments -> data -> model -> method -> training -> what it leaves -> evaluation.

    python src/run_uie_lora.py --model_name_or_path initial_model/t5-large --task_config_dir
        configs/order1_configs/dbpedia --output_dir logs_and_outputs/order_1/outputs/1-dbpedia ...

The scripts in `scripts/` and `scripts_llama/` chain the tasks of an order. Lines that begin with `[gorp]` are the
run's own account of what it trains, projects and protects, and of how well it then does.
"""

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from transformers import set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from arguments import (
    DataArguments,
    MethodArguments,
    ModelArguments,
    UIETrainingArguments,
    check_data_arguments,
    parse_arguments,
)
from compute_metrics import accuracy_line
from errors import InputError
from files import whole_file, whole_folder, write_json
from methods import Method, find_method
from model.loading import load_model_and_tokenizer
from order_rows import OrderRows
from uie_collator import DataCollatorForUIE
from uie_dataset_lora import load_uie_dataset
from uie_trainer_lora import DenserEvaluation, UIETrainer

logger = logging.getLogger("gorp")
PARTS = ("zero_shot", "train", "eval", "predict", "unseen")
RESULT_FILES = (*(f"{part}_results.json" for part in PARTS), "all_results.json", "predict_eval_predictions.jsonl",
                "trainer_state.json", "run.json")


def main(argv: list[str] | None = None) -> int:
    """Run one task; 0, or 2 after one line about bad input."""
    try:
        run(*parse_arguments(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(model_args: ModelArguments, data_args: DataArguments, method_args: MethodArguments,
        training_args: UIETrainingArguments) -> None:
    """Train and evaluate as the arguments say.

    Raises:
        InputError: anything a user can mend; before training wherever it can be known.
    """
    set_up_logging(training_args)
    check_data_arguments(data_args)
    method = find_method(method_args.method)(method_args)
    set_seed(training_args.seed)
    rows = load_rows(data_args, training_args, method)
    output_dir = claim_output_dir(training_args)

    # ZeRO-3 would cut the model up while it is read; it is cut up when training begins, after the method is attached.
    unset_hf_deepspeed_config()
    loaded = load_model_and_tokenizer(
        model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
        token=True if model_args.use_auth_token else None,
        config_name=model_args.config_name,
        tokenizer_name=model_args.tokenizer_name,
        use_fast_tokenizer=model_args.use_fast_tokenizer,
        resize_position_embeddings=model_args.resize_position_embeddings,
        max_source_length=data_args.max_source_length,
    )
    sharded = bool(training_args.deepspeed) and training_args.do_train
    model = method.prepare(loaded.model, loaded.previous, decoder_only=loaded.decoder_only, sharded=sharded)
    if training_args.deepspeed:
        set_hf_deepspeed_config(training_args.hf_deepspeed_config)
    trainer = build_trainer(model, method, loaded, rows, data_args, training_args)

    describe_run(output_dir, trainer, loaded.base_name, data_args)
    if "zero_shot" in rows:
        with torch.random.fork_rng():  # what is measured must not change what is trained
            score(trainer, rows["zero_shot"], output_dir, "zero_shot")
    if training_args.do_train:
        for line in method.summary():
            logger.info(line)
        adapter = output_dir / ("llama_adapter" if loaded.decoder_only else "t5_adapter")
        if len(rows["train"]):
            metrics = train(trainer, len(rows["train"]))
            leave_behind(trainer, adapter, loaded.tokenizer)
        else:
            metrics = pass_on(trainer, loaded.previous, adapter)
        record(output_dir, "train", metrics | stored_bytes(adapter), trainer)
    if training_args.do_eval:
        record(output_dir, "eval", trainer.evaluate(), trainer)
    if training_args.do_predict:
        predict(trainer, rows["test"], output_dir)
    if "unseen" in rows:
        score(trainer, rows["unseen"], output_dir, "unseen")


def load_rows(data_args: DataArguments, training_args: UIETrainingArguments, method: Method) -> datasets.DatasetDict:
    """The step's examples, cut to the sample limits; every split that the run needs has rows.

    The training rows are those that the method chooses, and `--max_steps` becomes the number of steps that it takes.
    """
    rows = read_step(data_args.task_config_dir, data_args, training_args)
    needed = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    for split, is_needed in needed.items():
        if is_needed and len(rows[split]) == 0:
            raise InputError(f"--task_config_dir: {data_args.task_config_dir} has no dataset for {split}; one at least")
    rows["validation"] = first_rows(rows["validation"], data_args.max_eval_samples)
    rows["test"] = first_rows_of_each(rows["test"], data_args.max_predict_samples)
    order = OrderRows(
        data_args.task_config_dir,
        lambda folder: read_step(folder, data_args, training_args)["train"],
        seed=training_args.seed,
        fixed_steps=training_args.max_steps > 0,
    )
    if data_args.zero_shot:
        waiting = {step.dataset for step in order.steps()[order.index() :]}
        rows["zero_shot"] = read_test_rows(order.steps()[-1].folder, waiting.__contains__, data_args, training_args)
    if data_args.unseen_config_dir:
        trained = {step.dataset for step in order.steps()}
        rows["unseen"] = read_test_rows(
            data_args.unseen_config_dir, lambda dataset: dataset not in trained, data_args, training_args
        )
        if len(rows["unseen"]) == 0:
            raise InputError(f"--unseen_config_dir: {data_args.unseen_config_dir} tests only what this order trains")
    if training_args.do_train:
        rows["train"] = method.training_rows(rows["train"], order)
        if training_args.max_steps > 0:
            training_args.max_steps *= method.step_factor
    return rows


def read_step(config_dir, data_args: DataArguments, training_args: UIETrainingArguments) -> datasets.DatasetDict:
    """The examples of the step of `config_dir`, its training rows cut to `--max_train_samples`."""
    rows = load_uie_dataset(
        data_args.data_dir,
        config_dir,
        data_args.instruction_file,
        instruction_strategy=data_args.instruction_strategy,
        max_num_instances_per_task=data_args.max_num_instances_per_task,
        max_num_instances_per_eval_task=data_args.max_num_instances_per_eval_task,
        num_examples=data_args.num_examples,
        over_sampling=data_args.over_sampling,
        seed=training_args.seed,
        overwrite_cache=data_args.overwrite_cache,
    )
    rows["train"] = first_rows(rows["train"], data_args.max_train_samples)
    return rows


def read_test_rows(config_dir, wanted: Callable[[str], bool], data_args: DataArguments,
                   training_args: UIETrainingArguments) -> datasets.Dataset:
    """The test rows of the step of `config_dir`, of the datasets that are wanted, cut to `--max_predict_samples`."""
    rows = read_step(config_dir, data_args, training_args)["test"]
    rows = rows.select([index for index, dataset in enumerate(rows["Dataset"]) if wanted(dataset)])
    return first_rows_of_each(rows, data_args.max_predict_samples)


def first_rows(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """At most `limit` rows, the first ones."""
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def first_rows_of_each(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """At most `limit` rows of each dataset, the first ones: a limit must not drop whole tasks of the past."""
    if limit is None:
        return rows
    seen: dict[str, int] = {}
    kept = []
    for index, dataset in enumerate(rows["Dataset"]):
        seen[dataset] = seen.get(dataset, 0) + 1
        if seen[dataset] <= limit:
            kept.append(index)
    return rows.select(kept)


def build_trainer(model, method, loaded, rows, data_args: DataArguments,
                  training_args: UIETrainingArguments) -> UIETrainer:
    """The trainer of this task, with its collator, generation settings and callbacks."""
    collator = DataCollatorForUIE(
        loaded.tokenizer,
        decoder_only=loaded.decoder_only,
        max_source_length=data_args.max_source_length,
        max_target_length=data_args.max_target_length,
        add_task_name=data_args.add_task_name,
        add_dataset_name=data_args.add_dataset_name,
        pad_to_multiple_of=8 if training_args.fp16 or training_args.bf16 else None,
        input_record_file=data_args.input_record_file,
    )
    for split in rows.keys() - {"validation"}:
        if len(rows[split]):  # there is nothing to train where a method passes on what it has
            collator.check(rows[split])
    return UIETrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=loaded.tokenizer,
        data_collator=collator,
        callbacks=[DenserEvaluation()] if training_args.denser_evaluation else None,
        method=method,
        decoder_only=loaded.decoder_only,
        multilingual=data_args.multilingual,
        generation={
            "max_new_tokens": training_args.generation_max_length or data_args.max_target_length,
            "num_beams": data_args.num_beams,
            "repetition_penalty": data_args.repetition_penalty,
            "do_sample": False,
            "use_cache": True,
        },
    )


def train(trainer: UIETrainer, samples: int) -> dict:
    """Train the task, going on from `--resume_from_checkpoint` only where it is asked for."""
    wanted = trainer.args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(trainer.args.output_dir) if wanted in ("True", "true") else wanted
    return trainer.train(resume_from_checkpoint=checkpoint).metrics | {"train_samples": samples}


def leave_behind(trainer: UIETrainer, adapter: Path, tokenizer) -> None:
    """Turn the task into memory and write the adapter folder, whole or not at all."""
    trainer.method.end_task()
    for line in trainer.method.closing_summary():
        logger.info(line)
    if trainer.is_world_process_zero():
        with whole_folder(adapter) as partial:
            trainer.method.save(partial)
            tokenizer.save_pretrained(partial)
    trainer.accelerator.wait_for_everyone()


def pass_on(trainer: UIETrainer, previous: Path, adapter: Path) -> dict:
    """The folder that the task before left, for a task in which the method trains nothing."""
    logger.info("nothing trains in this task: %s is passed on", previous)
    if trainer.is_world_process_zero():
        with whole_folder(adapter) as partial:
            shutil.copytree(previous, partial, dirs_exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    return {"train_samples": 0, "train_runtime": 0.0}


def predict(trainer: UIETrainer, rows: datasets.Dataset, output_dir: Path) -> None:
    """Answer the test rows of every task so far; predictions as JSON lines, then the scores."""
    output = trainer.predict(rows, metric_key_prefix="predict")
    if trainer.is_world_process_zero():
        with whole_file(output_dir / "predict_eval_predictions.jsonl") as partial, open(
            partial, "w", encoding="utf-8"
        ) as lines:
            for row, prediction in zip(rows, output.predictions):
                kept = {key: row[key] for key in ("Task", "Dataset", "Instance")}
                lines.write(json.dumps(kept | {"Prediction": prediction}, ensure_ascii=False) + "\n")
    metrics = output.metrics | {"predict_samples": len(rows), "predict_global_step": trainer.state.global_step}
    record(output_dir, "predict", metrics, trainer)
    logger.info(accuracy_line(metrics, list(dict.fromkeys(rows["Dataset"])), output_dir.name, prefix="predict_"))


def score(trainer: UIETrainer, rows: datasets.Dataset, output_dir: Path, part: str) -> None:
    """Test on rows beyond those of the tasks so far: the scores only."""
    datasets_tested = list(dict.fromkeys(rows["Dataset"]))
    counted = {f"{part}_samples": len(rows), f"{part}_datasets": datasets_tested}
    metrics = trainer.predict(rows, metric_key_prefix=part).metrics | counted
    record(output_dir, part, metrics, trainer)
    logger.info("%s: %s", part.replace("_", "-"), accuracy_line(metrics, datasets_tested, prefix=f"{part}_"))


def describe_run(output_dir: Path, trainer: UIETrainer, base_name: str, data_args: DataArguments) -> None:
    """Write `run.json`: what a report needs to know about the run beside its scores."""
    if not trainer.is_world_process_zero():
        return
    args, options, config = trainer.args, dataclasses.asdict(trainer.method.options), Path(data_args.task_config_dir)
    parameters = list(trainer.model.parameters())
    settings = ("learning_rate", "max_steps", "num_train_epochs", "lr_scheduler_type", "per_device_train_batch_size",
                "gradient_accumulation_steps")
    content = {
        "method": options.pop("method"),
        "seed": args.seed,
        "base_model": base_name,
        "order": config.resolve().parent.name.removesuffix("_configs"),
        "dataset": config.name,
        "processes": args.world_size,
        "values": sum(parameter.numel() for parameter in parameters),
        "trained_values": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "options": options | {name: getattr(args, name) for name in settings} | {
            name: getattr(data_args, name) for name in ("data_dir", "max_train_samples", "max_predict_samples")
        },
    }
    write_json(output_dir / "run.json", content)


def stored_bytes(adapter: Path) -> dict:
    """Size of what the task leaves for the next one, without the tokenizer's files."""
    return {"stored_bytes": sum(path.stat().st_size for path in adapter.glob("*.safetensors"))}


def record(output_dir: Path, split: str, metrics: dict, trainer: UIETrainer) -> None:
    """Write `<split>_results.json`, bring all_results.json and trainer_state.json up to date."""
    if not trainer.is_world_process_zero():
        return
    write_json(output_dir / f"{split}_results.json", metrics, sort_keys=True)
    together = {}
    for part in PARTS:
        path = output_dir / f"{part}_results.json"
        if path.exists():
            together |= json.loads(path.read_text(encoding="utf-8"))
    write_json(output_dir / "all_results.json", together, sort_keys=True)
    with whole_file(output_dir / "trainer_state.json") as partial:
        trainer.state.save_to_json(str(partial))


def claim_output_dir(training_args: UIETrainingArguments) -> Path:
    """The results folder, without results of an earlier run.

    Raises:
        InputError: it holds results and `--overwrite_output_dir` is not given.
    """
    output_dir = Path(training_args.output_dir)
    stale = [output_dir / name for name in RESULT_FILES if (output_dir / name).exists()]
    if stale and not training_args.overwrite_output_dir:
        raise InputError(f"--output_dir: {output_dir} holds {stale[0].name}; another folder, or --overwrite_output_dir")
    if training_args.process_index == 0:
        for path in stale:
            path.unlink()
    return output_dir


def set_up_logging(training_args: UIETrainingArguments) -> None:
    """The run's own lines begin with `[gorp]`, its details do not (they are for the log); both from the first rank."""
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
    sys.exit(main())
