"""Build a task's examples, model, collator and trainer from the groups of arguments.

`run_uie_lora.py` trains with these functions and `check.py` checks with them.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Container
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import PreTrainedConfig

from arguments import DataArguments, ModelArguments, UIETrainingArguments
from compute_metrics import MEASURED
from errors import InputError, check
from methods import Method
from model.loading import LoadedModel, load_model_and_tokenizer
from order_config import read_order
from task_examples import OrderExamples, first_examples, first_examples_of_each, place_in_order
from uie_collator import DataCollatorForUIE
from uie_dataset_lora import SPLITS, ExampleOptions, data_files, load_uie_dataset
from uie_trainer_lora import DenserEvaluation, UIETrainer

logger = logging.getLogger("gorp")


def example_options(data_args: DataArguments, training_args: UIETrainingArguments) -> ExampleOptions:
    """The example options, from the flags of the same names."""
    given = vars(data_args) | {"seed": training_args.seed}
    return ExampleOptions(**{option.name: given[option.name] for option in dataclasses.fields(ExampleOptions)})


def input_files(data_args: DataArguments, training_args: UIETrainingArguments, method: Method) -> dict[str, Path]:
    """Every file that `load_examples` reads, other tasks' included, by name."""
    options, own = example_options(data_args, training_args), Path(data_args.task_config_dir)
    files, others, reads = data_files(own, options), [], method.reads if training_args.do_train else "no"
    if reads != "no" or data_args.zero_shot:
        steps = [step.folder for step in read_order(own.parent)]
        read = {"no": [], "earlier": itertools.takewhile(lambda step: step.name != own.name, steps), "all": steps}
        others += [(step, "train") for step in read[reads]] + [(steps[-1], "test")] * data_args.zero_shot
    if data_args.unseen_config_dir:
        others.append((data_args.unseen_config_dir, "test"))
    for number, (step, subset) in enumerate(others, 1):
        found = data_files(step, options, [subset])
        files |= {f"{number}/{name}" if name.endswith("_tasks.json") else name: path for name, path in found.items()}
    return files


def load_examples(data_args: DataArguments, training_args: UIETrainingArguments, method: Method) -> DatasetDict:
    """The task's examples within the limits; InputError if a split that the run needs has none.

    The method chooses the training examples, and its step factor multiplies `--max_steps`.
    """
    options, own = example_options(data_args, training_args), data_args.task_config_dir
    limits = {"train": data_args.max_train_samples, "dev": data_args.max_eval_samples,
              "test": data_args.max_predict_samples}  # fmt: skip

    def read(config_dir, subset: str) -> Dataset:
        [examples] = load_uie_dataset(config_dir, options, [subset]).values()
        kept = (first_examples_of_each if subset == "test" else first_examples)(examples, limits[subset])
        if subset != "dev" or training_args.do_eval:
            warn_of_lost_labels(examples, kept, subset)
        return kept

    examples = DatasetDict({split: read(own, subset) for subset, split in SPLITS.items()})
    needed = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    for split, is_needed in needed.items():
        if is_needed and len(examples[split]) == 0:
            raise InputError(f"--task_config_dir: {own} has no {split} dataset; one is needed")
    fixed_steps = training_args.max_steps > 0
    order = OrderExamples(own, lambda step: read(step, "train"), seed=training_args.seed, fixed_steps=fixed_steps,
                          reads=method.reads)  # fmt: skip
    if data_args.predict_tasks == "ends" and order.index() + 1 < len(order.steps()):
        examples["test"] = _of_datasets(examples["test"], [order.steps()[order.index()].dataset])
    if data_args.zero_shot:
        waiting = [step.dataset for step in order.steps()[order.index() :]]
        examples["zero_shot"] = _of_datasets(read(order.steps()[-1].folder, "test"), waiting)
    if data_args.unseen_config_dir:
        tests, trained = read(data_args.unseen_config_dir, "test"), {step.dataset for step in order.steps()}
        examples["unseen"] = _of_datasets(tests, set(tests["Dataset"]) - trained)
        if len(examples["unseen"]) == 0:
            raise InputError(f"--unseen_config_dir: {data_args.unseen_config_dir} tests only what this order trains")
    check_best_metric(examples["validation"], training_args)
    if training_args.do_train:
        examples["train"] = method.training_examples(examples["train"], order)
        found, batch = len(examples["train"]), training_args.train_batch_size * training_args.world_size
        if training_args.dataloader_drop_last and 0 < found < batch:
            raise InputError(f"--dataloader_drop_last: found true, with which {found} examples make no batch of "
                             f"{batch}; allowed: false, or a smaller batch")
        if fixed_steps:
            training_args.max_steps *= method.step_factor
    return examples


def warn_of_lost_labels(examples: Dataset, kept: Dataset, subset: str) -> None:
    """Warn where a limit leaves out all examples of a label, as it does in a file that is sorted by label."""
    if len(kept) == len(examples):
        return
    labels: dict[str, list[set[str]]] = {}
    for place, those in enumerate((examples, kept)):
        table = those.with_format("arrow")[:]
        answers = table["Instance"].combine_chunks().field("label")
        found = set(zip(*(column.to_pylist() for column in (table["Dataset"], table["Metric"], answers))))
        for dataset, _, label in (one for one in found if one[1] != "rougeL"):
            labels.setdefault(dataset, [set(), set()])[place].add(label)
    for dataset, (every, left) in labels.items():
        if lost := sorted(every - left):
            _warn_once(f"{dataset}: the first {subset} examples, which a limit keeps, lack {len(lost)} of {len(every)} "
                       f"labels, such as {lost[0]!r}; shuffle the file if it is sorted")


@functools.cache
def _warn_once(text: str) -> None:
    """Later tasks of an order read the same test sets again."""
    logger.warning(text)


def _of_datasets(examples: Dataset, wanted: Container[str]) -> Dataset:
    return examples.select([index for index, dataset in enumerate(examples["Dataset"]) if dataset in wanted])


def check_best_metric(validation: Dataset, training_args: UIETrainingArguments) -> None:
    """Reject a `--metric_for_best_model` that an evaluation of these examples does not compute."""
    groups = dict.fromkeys([*validation["Dataset"], *validation["Task"]])
    metrics = [*MEASURED, *["score"] * ("rougeL" in validation["Metric"])]
    known = ["loss", "gen_len", *metrics, *(f"{metric}_for_{group}" for metric in metrics for group in groups)]
    name = (training_args.metric_for_best_model or "loss").removeprefix("eval_")
    check(name in known, "metric_for_best_model", name,
          f"loss, gen_len, {', '.join(metrics)}, and METRIC_for_DATASET or METRIC_for_TASK of these")


def load_model(model_args: ModelArguments, data_args: DataArguments, **how) -> LoadedModel:
    """Load the model that the arguments name; `how` passes `weights`, `dtype` and `not_in_4bit` to the loading."""
    same = ("cache_dir", "config_name", "tokenizer_name", "resize_position_embeddings", "family")
    return load_model_and_tokenizer(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        token=True if model_args.use_auth_token else None,
        max_source_length=data_args.max_source_length,
        max_target_length=data_args.max_target_length,
        **{name: getattr(model_args, name) for name in same},
        **how,
    )


def build_collator(loaded: LoadedModel, data_args: DataArguments,
                   training_args: UIETrainingArguments) -> DataCollatorForUIE:
    """The collator for this model's tokenizer; InputError for options that its batches rule out."""
    padding_ends = loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    check(not (loaded.decoder_only and padding_ends) or data_args.repetition_penalty == 1, "repetition_penalty",
          data_args.repetition_penalty, "1.0 for this model, whose padding is its end token: the penalty on "
          "ending would depend on an example's batch")
    smoothing = training_args.label_smoothing_factor
    check(not (loaded.decoder_only and smoothing), "label_smoothing_factor", smoothing,
          "0 for a decoder-only model, whose logits exist only where there is a target")
    same = ("max_source_length", "max_target_length", "add_task_name", "add_dataset_name", "input_record_file")
    return DataCollatorForUIE(
        loaded.tokenizer,
        decoder_only=loaded.decoder_only,
        pad_to_multiple_of=8 if training_args.fp16 or training_args.bf16 else None,
        name_examples=True,
        **{name: getattr(data_args, name) for name in same},
    )


def report_cut(examples: DatasetDict, collator: DataCollatorForUIE, training_args: UIETrainingArguments) -> None:
    """Report how many prompts of the splits that the run uses do not fit, and so are cut."""
    uses = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    counts = {split: collator.count_cut(examples[split]) for split in examples if uses.get(split, True)}
    if found := [f"{count:,} of {len(examples[split]):,} in {split}" for split, count in counts.items() if count]:
        logger.info("--max_source_length %d cuts prompts: %s", collator.max_source_length, ", ".join(found))


def check_layer_drop(config: PreTrainedConfig, training_args: UIETrainingArguments) -> None:
    """Reject LayerDrop on several ranks: those that skip different layers would pair the collectives of different
    weights, which are matched by order alone."""
    dropped = [name for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop") if getattr(config, name, 0)]
    alike = training_args.world_size == 1 or not training_args.do_train
    check(not dropped or alike, "model_name_or_path", f"a model with {' and '.join(dropped)} above 0 on several "
          "processes", "0 in its config.json, or one process")


def build_trainer(model, method: Method, loaded: LoadedModel, examples: DatasetDict, data_args: DataArguments,
                  training_args: UIETrainingArguments) -> UIETrainer:
    """The trainer of this task, with its collator, generation settings and callbacks."""
    collator = build_collator(loaded, data_args, training_args)
    for split, of_split in examples.items():
        if split != "validation" or training_args.do_eval:
            collator.check(of_split)
    report_cut(examples, collator, training_args)
    check_layer_drop(model.config, training_args)
    index, order = place_in_order(data_args.task_config_dir)
    return UIETrainer(
        model=model,
        args=training_args,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        processing_class=loaded.tokenizer,
        data_collator=collator,
        callbacks=[DenserEvaluation()] if training_args.denser_evaluation else None,
        method=method,
        multilingual=data_args.multilingual,
        name=f"task {index + 1} of {len(order)}: {order[index]}",
        tasks_left=len(order) - 1 - index,
        generation={
            "max_new_tokens": data_args.max_target_length,
            "num_beams": data_args.num_beams,
            "repetition_penalty": data_args.repetition_penalty,
            "do_sample": False,
            "use_cache": True,
        },
    )
