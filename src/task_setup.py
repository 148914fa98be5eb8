"""Build a task's examples, model, collator and trainer from the groups of arguments.

`run_uie_lora.py` trains with these functions and `check.py` checks with them.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset, DatasetDict

from arguments import DataArguments, ModelArguments, UIETrainingArguments, check
from compute_metrics import MEASURED
from errors import InputError
from methods import Method
from model.loading import LoadedModel, load_model_and_tokenizer
from order_config import SUBSETS
from task_examples import OrderExamples, first_examples, first_examples_of_each, place_in_order
from uie_collator import DataCollatorForUIE
from uie_dataset_lora import ExampleOptions, load_uie_dataset
from uie_trainer_lora import DenserEvaluation, UIETrainer


def example_options(data_args: DataArguments, training_args: UIETrainingArguments) -> ExampleOptions:
    """The example options, from the flags of the same names."""
    given = vars(data_args) | {"seed": training_args.seed}
    return ExampleOptions(**{option.name: given[option.name] for option in dataclasses.fields(ExampleOptions)})


def load_examples(data_args: DataArguments, training_args: UIETrainingArguments, method: Method) -> DatasetDict:
    """The task's examples within the limits, with some in every split that the run needs.

    The method chooses the training examples, and its step factor multiplies `--max_steps`.
    """
    examples = read_task(data_args.task_config_dir, data_args, training_args)
    needed = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    for split, is_needed in needed.items():
        if is_needed and len(examples[split]) == 0:
            raise InputError(f"--task_config_dir: {data_args.task_config_dir} has no {split} dataset; one is needed")
    examples["validation"] = first_examples(examples["validation"], data_args.max_eval_samples)
    examples["test"] = first_examples_of_each(examples["test"], data_args.max_predict_samples)
    order = OrderExamples(
        data_args.task_config_dir,
        lambda folder: read_task(folder, data_args, training_args, ["train"])["train"],
        seed=training_args.seed,
        fixed_steps=training_args.max_steps > 0,
    )
    if data_args.predict_tasks == "ends" and order.index() + 1 < len(order.steps()):
        own = order.steps()[order.index()].dataset
        examples["test"] = _of_datasets(examples["test"], own.__eq__)
    if data_args.zero_shot:
        waiting = {step.dataset for step in order.steps()[order.index() :]}
        examples["zero_shot"] = read_tests(order.steps()[-1].folder, waiting.__contains__, data_args, training_args)
    if data_args.unseen_config_dir:
        trained = {step.dataset for step in order.steps()}
        examples["unseen"] = read_tests(
            data_args.unseen_config_dir, lambda dataset: dataset not in trained, data_args, training_args
        )
        if len(examples["unseen"]) == 0:
            raise InputError(f"--unseen_config_dir: {data_args.unseen_config_dir} tests only what this order trains")
    check_best_metric(examples["validation"], training_args)
    if training_args.do_train:
        examples["train"] = method.training_rows(examples["train"], order)
        if training_args.max_steps > 0:
            training_args.max_steps *= method.step_factor
    return examples


def check_best_metric(validation: Dataset, training_args: UIETrainingArguments) -> None:
    """Reject a `--metric_for_best_model` that an evaluation of these examples does not have."""
    groups = dict.fromkeys([*validation["Dataset"], *validation["Task"]])
    metrics = [*MEASURED, *["score"] * ("rougeL" in validation["Metric"])]
    known = ["loss", "gen_len", *metrics, *(f"{metric}_for_{group}" for metric in metrics for group in groups)]
    name = (training_args.metric_for_best_model or "loss").removeprefix("eval_")
    check(name in known, "metric_for_best_model", name,
          f"loss, gen_len, {', '.join(metrics)}, and METRIC_for_DATASET or METRIC_for_TASK of these")


def read_task(config_dir, data_args: DataArguments, training_args: UIETrainingArguments,
              subsets: Sequence[str] = SUBSETS) -> DatasetDict:
    """The examples of the task of `config_dir`, with at most `--max_train_samples` to train on."""
    examples = load_uie_dataset(config_dir, example_options(data_args, training_args), subsets)
    if "train" in examples:
        examples["train"] = first_examples(examples["train"], data_args.max_train_samples)
    return examples


def read_tests(config_dir, wanted: Callable[[str], bool], data_args: DataArguments,
               training_args: UIETrainingArguments) -> Dataset:
    """The test examples of a task from the wanted datasets, up to `--max_predict_samples` each."""
    tests = _of_datasets(read_task(config_dir, data_args, training_args, ["test"])["test"], wanted)
    return first_examples_of_each(tests, data_args.max_predict_samples)


def _of_datasets(examples: Dataset, wanted: Callable[[str], bool]) -> Dataset:
    return examples.select([index for index, dataset in enumerate(examples["Dataset"]) if wanted(dataset)])


def load_model(model_args: ModelArguments, data_args: DataArguments, *, weights: bool = True,
               dtype: torch.dtype = torch.float32, not_in_4bit: Sequence[str] | None = None) -> LoadedModel:
    """The model that the arguments name; without `weights` only its shapes, for checks."""
    return load_model_and_tokenizer(
        model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
        token=True if model_args.use_auth_token else None,
        config_name=model_args.config_name,
        tokenizer_name=model_args.tokenizer_name,
        use_fast_tokenizer=model_args.use_fast_tokenizer,
        resize_position_embeddings=model_args.resize_position_embeddings,
        max_source_length=data_args.max_source_length,
        family=model_args.family,
        weights=weights,
        dtype=dtype,
        not_in_4bit=not_in_4bit,
    )


def build_collator(loaded: LoadedModel, data_args: DataArguments,
                   training_args: UIETrainingArguments) -> DataCollatorForUIE:
    """The collator for this model's tokenizer."""
    return DataCollatorForUIE(
        loaded.tokenizer,
        decoder_only=loaded.decoder_only,
        max_source_length=data_args.max_source_length,
        max_target_length=data_args.max_target_length,
        add_task_name=data_args.add_task_name,
        add_dataset_name=data_args.add_dataset_name,
        pad_to_multiple_of=8 if training_args.fp16 or training_args.bf16 else None,
        input_record_file=data_args.input_record_file,
        name_rows=True,
    )


def check_generation(loaded: LoadedModel, data_args: DataArguments) -> None:
    """Reject a repetition penalty where padding counts as end tokens, so that it would depend on the batch."""
    padding_ends = loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    if loaded.decoder_only and padding_ends and data_args.repetition_penalty != 1:
        raise InputError(
            f"--repetition_penalty: found {data_args.repetition_penalty}; allowed: 1.0 for this model, whose padding "
            "is its end token: the penalty on ending would depend on an example's batch"
        )


def build_trainer(model, method: Method, loaded: LoadedModel, examples: DatasetDict, data_args: DataArguments,
                  training_args: UIETrainingArguments) -> UIETrainer:
    """The trainer of this task, with its collator, generation settings and callbacks."""
    collator = build_collator(loaded, data_args, training_args)
    check_generation(loaded, data_args)
    index, order = place_in_order(data_args.task_config_dir)
    for split, of_split in examples.items():
        if split != "validation" or training_args.do_eval:
            collator.check(of_split)
    return UIETrainer(
        model=model,
        args=training_args,
        train_dataset=examples["train"],
        eval_dataset=examples["validation"],
        processing_class=loaded.tokenizer,
        data_collator=collator,
        callbacks=[DenserEvaluation()] if training_args.denser_evaluation else None,
        method=method,
        decoder_only=loaded.decoder_only,
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
