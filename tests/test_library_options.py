"""Every option that Transformers brings along: what it does here, or that it is rejected or reported as ignored.

A new version of Transformers with another option fails here until the option has a place in these tables.
"""

import dataclasses
import functools
import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import T5, T5_MODULES, Benchmark
from transformers import GenerationConfig, SchedulerType, Seq2SeqTrainingArguments
from transformers.utils import logging as hf_logging

import run_uie_lora
from arguments import IGNORED, REJECTED, TRACKIO, UIETrainingArguments
from command_line import parse_arguments
from errors import InputError
from model.loading import NO_SETTINGS, load_model_and_tokenizer
from uie_collator import DataCollatorForUIE

# The base model's generation settings, of which none may reach an answer

EVALUATION = {"max_new_tokens": 12, "num_beams": 1, "repetition_penalty": 1.0, "do_sample": False, "use_cache": True}
SETTINGS = {  # each with the value that a base's generation_config.json then has
    "max_length": 3, "max_new_tokens": 1, "min_length": 8, "min_new_tokens": 8, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["a"], "do_sample": True, "num_beams": 4, "use_mtp": True, "use_cache": False,
    "cache_implementation": "static", "cache_config": {"a": 1}, "max_cache_len": 4, "temperature": 0.1, "top_k": 3,
    "top_p": 0.1, "min_p": 0.9, "top_h": 0.5, "typical_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1,
    "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0, "length_penalty": -3.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[934]], "renormalize_logits": True, "forced_bos_token_id": 7,
    "forced_eos_token_id": 1, "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 50.0],
    "suppress_tokens": list(range(2, 900)), "begin_suppress_tokens": [934], "sequence_bias": [[[7], 50.0]],
    "token_healing": True, "guidance_scale": 3.0, "watermarking_config": {"bias": 9.0}, "num_return_sequences": 2,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.9, "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2, "assistant_early_exit": 1, "assistant_lookbehind": 3, "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5, "speculation_type": "a", "compile_config": {"mode": "a"},
    "disable_compile": True, "continuous_batching_config": {"a": 1}, "low_memory": True, "penalty_alpha": 0.6,
    "dola_layers": "low", "diversity_penalty": 1.0, "num_beam_groups": 2, "constraints": [1], "force_words_ids": [[7]],
    "prefill_chunk_size": 1,
}  # fmt: skip
TOKENS = {"bos_token_id": 9, "eos_token_id": [1, 9], "pad_token_id": 9, "decoder_start_token_id": 9}
NOT_LOADED = ("num_return_sequences", "compile_config")  # with these values Transformers itself loads no model
WITH_EFFECT = ("min_length", "min_new_tokens", "max_time", "forced_bos_token_id", "encoder_no_repeat_ngram_size",
               "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias")


def t5_with(folder, file: str, **settings):
    """A copy of the tiny T5 with these settings in one of its files."""
    shutil.copytree(T5, folder)
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    content = json.loads((T5 / file).read_text(encoding="utf-8")) | settings
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plain():
    return load_model_and_tokenizer(str(T5))


def answers(loaded, **changes) -> torch.Tensor:
    prompts = loaded.tokenizer(["What is it about? Company, Film\nA film.\nAnswer:", "Good or Bad?"], padding=True,
                               return_tensors="pt")  # fmt: skip
    return loaded.model.generate(**prompts, **EVALUATION | changes)


def test_the_table_has_every_generation_setting():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert set(SETTINGS | TOKENS) == fields and set(TOKENS) <= set(NO_SETTINGS)


CASES = [("generation_config.json", name) for name in SETTINGS | TOKENS] + [("config.json", name) for name in SETTINGS]


@pytest.mark.parametrize("file, name", CASES)
def test_a_generation_setting_of_the_base_changes_no_answer(file, name, plain, tmp_path, caplog):
    folder = t5_with(tmp_path / "t5", file, **{name: (SETTINGS | TOKENS)[name]})
    if name in NOT_LOADED:
        with pytest.raises(InputError, match=f"the model cannot be loaded: .*{name}"):
            load_model_and_tokenizer(str(folder))
        return
    with caplog.at_level(logging.INFO, "gorp"):
        loaded = load_model_and_tokenizer(str(folder))
    assert loaded.model.generation_config.to_dict() == plain.model.generation_config.to_dict()
    assert torch.equal(answers(loaded), answers(plain))
    if file == "generation_config.json" and name in SETTINGS:
        assert f"t5: its generation settings are ignored: {name} " in caplog.text


@pytest.mark.parametrize("name", WITH_EFFECT)
def test_the_setting_would_change_answers(name, plain):
    assert not torch.equal(answers(plain, **{name: SETTINGS[name]}), answers(plain))


# Hugging Face's training arguments

SMALL = [
    "--model_name_or_path", str(T5), "--do_train", "--do_predict", "--max_steps", "2", "--logging_steps", "1",
    "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--learning_rate", "1e-3",
    "--lr_scheduler_type", "constant", "--max_source_length", "128", "--max_target_length", "8", "--save_strategy",
    "no", "--report_to", "none", "--use_cpu", "--lora_dropout", "0", *T5_MODULES,
]  # fmt: skip
TASK = [{"sentence": f"{'long ' * one} text {one}", "label": ["Alpha", "Beta"][one % 2]} for one in range(9)]
RUNS = {
    "plain": "",
    "steps": "--max_steps 8 --learning_rate 3e-3 --lr_scheduler_type cosine_with_restarts --warmup_steps 2 "
             "--lr_scheduler_kwargs {\"num_cycles\":3} --weight_decay 0.1 --adam_beta1 0.8 --adam_beta2 0.99 "
             "--adam_epsilon 1e-6 --max_grad_norm 0.001",
    "batches": "--max_steps -1 --num_train_epochs 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 "
               "--per_device_eval_batch_size 2 --dataloader_drop_last --train_sampling_strategy sequential "
               "--logging_steps 3 --logging_first_step",
    "workers": "--dataloader_num_workers 1 --dataloader_prefetch_factor 3 --dataloader_persistent_workers "
               "--dataloader_multiprocessing_context fork --dataloader_in_order False "
               "--include_num_input_tokens_seen --skip_memory_metrics False --disable_tqdm True",
    "loss": "--label_smoothing_factor 0.5",
    "bf16": "--bf16 --logging_strategy epoch",
    "bf16_full_eval": "--bf16_full_eval",
    "fp16_full_eval": "--fp16_full_eval",
    "memory": "--gradient_checkpointing True --gradient_checkpointing_kwargs {\"use_reentrant\":true} "
              "--torch_empty_cache_steps 1 --full_determinism",
    "new names": "--activation_checkpointing True --activation_checkpointing_kwargs {\"use_reentrant\":true}",
    "seed": "--seed 7 --lora_dropout 0.5", "data_seed": "--data_seed 7",
    "logs": "--log_level error --report_to tensorboard --run_name mine",
    "evaluation": "--max_steps 4 --eval_strategy steps --eval_steps 2 --eval_delay 3 --eval_on_start",
    "checkpoints": "--max_steps 4 --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 "
                   "--save_total_limit 2 --load_best_model_at_end --metric_for_best_model eval_gen_len "
                   "--greater_is_better False",
    "resumed": "--max_steps 4 --resume_from_checkpoint CHECKPOINTS/checkpoint-1 --ignore_data_skip",
    "several processes": "--ddp_find_unused_parameters False --ddp_bucket_cap_mb 3 --ddp_broadcast_buffers True "
                         "--ddp_static_graph True --ddp_timeout 99",
    "evaluation alone": "--do_train False --do_eval",
    "training alone": "--do_predict False",
}  # fmt: skip


def restarts() -> list[float]:
    """Cosine with three restarts over six steps after two of warm-up, at 3e-3."""
    return [0.0, 1.5e-3] + [1.5e-3 * (1 + math.cos(math.pi * (3 * step / 6 % 1))) for step in range(6)]


def group(seen) -> dict:
    return seen.trainer.method.optimizer.param_groups[0]


def loader(seen):
    return seen.trainer.get_train_dataloader()


def evaluated(seen) -> list[int]:
    return [line["step"] for line in seen.state.log_history if "eval_loss" in line]


def checkpoints(seen) -> set[str]:
    return {path.name for path in seen.folder.glob("checkpoint-*")}


def recomputes(seen) -> bool:
    blocks = [module for module in seen.trainer.model.modules() if getattr(module, "gradient_checkpointing", False)]
    return bool(blocks) and blocks[0]._gradient_checkpointing_func.keywords == {"use_reentrant": True}


WORKS = {  # field -> a run of `RUNS` with it, and what shows there that it works; in the plain run that does not hold
    "max_steps": ("steps", lambda seen: seen.state.global_step == 8),
    "learning_rate": ("steps", lambda seen: max(seen.logged("learning_rate")) == 3e-3),
    "lr_scheduler_type": ("steps", lambda seen: seen.logged("learning_rate") == pytest.approx(restarts())),
    "lr_scheduler_kwargs": ("steps", lambda seen: seen.logged("learning_rate") == pytest.approx(restarts())),
    "warmup_steps": ("steps", lambda seen: seen.logged("learning_rate")[:2] == [0, 1.5e-3]),
    "weight_decay": ("steps", lambda seen: group(seen)["weight_decay"] == 0.1),
    "adam_beta1": ("steps", lambda seen: group(seen)["betas"][0] == 0.8),
    "adam_beta2": ("steps", lambda seen: group(seen)["betas"][1] == 0.99),
    "adam_epsilon": ("steps", lambda seen: group(seen)["eps"] == 1e-6),
    "max_grad_norm": ("steps", lambda seen: set(seen.clipped) == {0.001}),
    "num_train_epochs": ("batches", lambda seen: seen.state.epoch == 2),
    "per_device_train_batch_size": ("batches", lambda seen: max(map(len, seen.batches["train"])) == 2),
    "gradient_accumulation_steps": ("batches", lambda seen: 2 * seen.state.global_step == len(seen.batches["train"])),
    "per_device_eval_batch_size": ("batches", lambda seen: max(map(len, seen.batches["test"])) == 2),
    "dataloader_drop_last": ("batches", lambda seen: {len(batch) for batch in seen.batches["train"]} == {2}),
    "train_sampling_strategy": ("batches", lambda seen: seen.batches["train"][:2] == [[0, 1], [2, 3]]),
    "logging_steps": ("batches", lambda seen: 3 in seen.steps("loss") and 2 not in seen.steps("loss")),
    "logging_first_step": ("batches", lambda seen: seen.steps("loss")[:2] == [1, 3]),
    "dataloader_num_workers": ("workers", lambda seen: loader(seen).num_workers == 1 and not seen.batches["train"]),
    "dataloader_prefetch_factor": ("workers", lambda seen: loader(seen).prefetch_factor == 3),
    "dataloader_persistent_workers": ("workers", lambda seen: loader(seen).persistent_workers),
    "dataloader_multiprocessing_context": ("workers", lambda seen: loader(seen).multiprocessing_context is not None),
    "dataloader_in_order": ("workers", lambda seen: not loader(seen).in_order),
    "include_num_input_tokens_seen": ("workers", lambda seen: sum(seen.logged("num_input_tokens_seen")) > 0),
    "skip_memory_metrics": ("workers", lambda seen: "train_mem_cpu_alloc_delta" in seen.results()),
    "disable_tqdm": ("workers", lambda seen: "PrinterCallback" in seen.trainer.callback_handler.callback_list),
    "label_smoothing_factor": ("loss", lambda seen: seen.logged("loss")[0] > 9),
    "bf16": ("bf16", lambda seen: seen.precision == "bf16"),
    "logging_strategy": ("bf16", lambda seen: len(seen.logged("loss")) == 1),
    "bf16_full_eval": ("bf16_full_eval", lambda seen: seen.trainer.model.dtype == torch.bfloat16),
    "fp16_full_eval": ("fp16_full_eval", lambda seen: seen.trainer.model.dtype == torch.float16),
    "activation_checkpointing": ("new names", recomputes),
    "activation_checkpointing_kwargs": ("new names", recomputes),
    "torch_empty_cache_steps": ("memory", lambda seen: seen.emptied == 2),
    "full_determinism": ("memory", lambda seen: seen.deterministic),
    "gradient_checkpointing": ("memory", recomputes),
    "gradient_checkpointing_kwargs": ("memory", recomputes),
    "seed": ("seed", lambda seen: seen.batches["train"][0] == [0, 5, 8, 1]),
    "data_seed": ("data_seed", lambda seen: seen.batches["train"][0] == [0, 5, 8, 1] and seen.args.seed == 42),
    "log_level": ("logs", lambda seen: seen.verbosity == logging.ERROR),
    "report_to": ("logs", lambda seen: seen.events() != b""),
    "run_name": ("logs", lambda seen: b'"run_name": "mine"' in seen.events()),
    "eval_strategy": ("evaluation", lambda seen: 4 in evaluated(seen)),
    "eval_steps": ("evaluation", lambda seen: 4 in evaluated(seen) and 3 not in evaluated(seen)),
    "eval_delay": ("evaluation", lambda seen: evaluated(seen)[-1:] == [4] and 2 not in evaluated(seen)),
    "eval_on_start": ("evaluation", lambda seen: evaluated(seen)[:1] == [0]),
    "save_strategy": ("checkpoints", lambda seen: checkpoints(seen) != set()),
    "save_steps": ("checkpoints", lambda seen: "checkpoint-1" in checkpoints(seen)),
    "save_total_limit": ("checkpoints", lambda seen: checkpoints(seen) == {"checkpoint-1", "checkpoint-4"}),
    "metric_for_best_model": ("checkpoints", lambda seen: seen.state.best_metric == 2),
    "greater_is_better": ("checkpoints", lambda seen: seen.state.best_global_step == 1),
    "load_best_model_at_end": ("checkpoints", lambda seen: seen.loses_again(0)),
    "resume_from_checkpoint": ("resumed", lambda seen: seen.state.global_step == 4 and len(seen.batches["train"]) == 3),
    "ignore_data_skip": ("resumed", lambda seen: seen.state.global_step == 4 and 6 in seen.batches["train"][0]),
    "ddp_find_unused_parameters": ("several processes", lambda seen: not seen.ddp().find_unused_parameters),
    "ddp_bucket_cap_mb": ("several processes", lambda seen: seen.ddp().bucket_cap_mb == 3),
    "ddp_broadcast_buffers": ("several processes", lambda seen: seen.ddp().broadcast_buffers),
    "ddp_static_graph": ("several processes", lambda seen: seen.ddp().static_graph),
    "ddp_timeout": ("several processes", lambda seen: seen.args.ddp_timeout_delta.seconds == 99),
    "do_train": ("evaluation alone", lambda seen: "train_loss" not in seen.results()),
    "do_eval": ("evaluation alone", lambda seen: "eval_loss" in seen.results()),
    "do_predict": ("training alone", lambda seen: "predict_exact_match" not in seen.results()),
}
ELSEWHERE = {  # field -> the test that shows it, or why none can here
    "output_dir": "every run here", "use_cpu": "every run here", "optim_target_modules": "test_methods.py",
    "deepspeed": "test_zero_core.py, test_two_ranks.py", "local_rank": "a launcher's",
    "ddp_backend": "test_bad_input.py: only under a launcher",
    "fp16": "test_what_a_cpu_lacks_is_said", "tf32": "test_what_a_cpu_lacks_is_said",
    "generation_max_length": "test_bad_input.py: one length with --max_target_length",
    "dataloader_pin_memory": "test_what_only_the_arguments_show", "log_level_replica": "the same",
    "log_on_each_node": "the same",
}


FIELDS = {option.name for option in dataclasses.fields(Seq2SeqTrainingArguments)}
NEW = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # the oldest supported version lacks them


def test_every_training_argument_works_is_rejected_or_is_reported():
    kinds = [set(WORKS), set(ELSEWHERE), {name for names in REJECTED.values() for name in names.split()},
             {*IGNORED, *TRACKIO}]  # fmt: skip
    placed = set().union(*kinds)
    assert sum(map(len, kinds)) == len(placed), "a field has one place"
    assert FIELDS <= placed <= FIELDS | NEW


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> what a run with the flags of `RUNS` shows; each is made once, when a test asks for it."""
    folder = tmp_path_factory.mktemp("runs")
    benchmark = Benchmark(folder)
    benchmark.add("TC", "dbpedia", ["Alpha", "Beta"], TASK)

    @functools.cache
    def run(name: str) -> Run:
        flags = RUNS[name].replace("CHECKPOINTS", str(folder / "checkpoints"))
        if "CHECKPOINTS" in RUNS[name]:
            run("checkpoints")
        return Run(name, [*SMALL, "--data_dir", str(benchmark.data), "--task_config_dir", str(benchmark.configs),
                          "--instruction_file", str(benchmark.instructions), "--output_dir", str(folder / name),
                          *flags.split()])  # fmt: skip

    return run


class Run:
    """One run of the entry, watched: its trainer, its files, and the examples of every training and test batch."""

    def __init__(self, name: str, command: list[str]):
        self.folder = Path(command[command.index("--output_dir") + 1])
        self.batches, self.emptied, self.clipped = {"train": [], "dev": [], "test": []}, 0, []
        build, collate = run_uie_lora.build_trainer, DataCollatorForUIE.__call__

        def build_trainer(*args):
            self.trainer = build(*args)
            return self.trainer

        def collate_and_note(collator, examples):
            self.batches[examples[0]["subset"]].append([int(one["Instance"]["id"]) for one in examples])
            return collate(collator, examples)

        def note_emptied(*args, **kwargs):
            self.emptied += 1

        clip = Accelerator.clip_grad_norm_

        def note_clipped(accelerator, parameters, most, *rest):
            self.clipped.append(most)
            return clip(accelerator, parameters, most, *rest)

        before = hf_logging.get_verbosity()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_uie_lora, "build_trainer", build_trainer)
            patch.setattr(DataCollatorForUIE, "__call__", collate_and_note)
            patch.setattr("transformers.trainer.clear_device_cache", note_emptied)
            patch.setattr(Accelerator, "clip_grad_norm_", note_clipped)
            assert run_uie_lora.main(command) == 0, name
        self.args, self.state = self.trainer.args, self.trainer.state
        self.precision = self.trainer.accelerator.mixed_precision
        self.verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity(before)
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        answers = self.folder / "predict_eval_predictions.jsonl"
        self.predictions = answers.read_text(encoding="utf-8") if answers.exists() else None

    def logged(self, key: str) -> list:
        return [line[key] for line in self.state.log_history if key in line]


    def steps(self, key: str) -> list[int]:
        return [line["step"] for line in self.state.log_history if key in line]

    def loses_again(self, evaluation: int) -> bool:
        """Whether the last evaluation is of the model of an earlier one."""
        losses = self.logged("eval_loss")
        return len(losses) > 1 and losses[-1] == losses[evaluation]

    def results(self) -> dict:
        return json.loads((self.folder / "all_results.json").read_text(encoding="utf-8"))

    def events(self) -> bytes:
        """What TensorBoard would read."""
        return b"".join(path.read_bytes() for path in self.folder.rglob("events.out.*"))

    def ddp(self):
        return self.trainer.accelerator.ddp_handler


@pytest.mark.parametrize("name", [name for name in WORKS if name in FIELDS])
def test_a_training_argument_does_what_its_documentation_says(name, runs):
    of_run, shows = WORKS[name]
    assert shows(runs(of_run)) and not shows(runs("plain"))


def arguments(*flags: str):
    return parse_arguments(["--output_dir", "out", *SMALL, *flags])[-1]


def test_this_projects_flags_reach_prompts_and_answers(runs):
    RUNS["own"] = "--add_task_name True --add_dataset_name True --num_beams 3 --repetition_penalty 1.5"
    trainer = runs("own").trainer
    assert trainer.data_collator.parts(trainer.train_dataset[0])[0].startswith("Task:TC\nDataset:dbpedia\n")
    assert trainer.generation.items() >= {"max_new_tokens": 8, "num_beams": 3, "repetition_penalty": 1.5}.items()


def other_than_default(name: str) -> str:
    """A value of a flag, as text, that is not its default."""
    default = UIETrainingArguments.__dataclass_fields__[name].default
    special = {"optim": "sgd", "hub_strategy": "end", "neftune_noise_alpha": "5", "generation_num_beams": "4",
               "eval_accumulation_steps": "3", "hub_private_repo": "True", "debug": "underflow_overflow",
               "fsdp_config": "{\"a\":1}", "liger_kernel_config": "{\"a\":1}"}
    return special.get(name) or (str(not default) if isinstance(default, bool) else "something")


REJECTED_NAMES = [name for names in REJECTED.values() for name in names.split()]


@pytest.mark.parametrize("name", REJECTED_NAMES)
def test_a_training_argument_without_a_place_here_is_rejected_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"--{name}\b"):
        arguments(f"--{name}", other_than_default(name))


def test_a_training_argument_that_decides_nothing_is_reported_and_changes_no_byte(runs, capfd):
    RUNS["ignored"] = " ".join(f"--{name} {other_than_default(name)}" for name in IGNORED + TRACKIO)
    seen, plain = runs("ignored"), runs("plain")
    assert f"[gorp] ignored: {', '.join(f'--{name}' for name in IGNORED + TRACKIO)}\n" in capfd.readouterr().out
    assert seen.predictions == plain.predictions and seen.logged("loss") == plain.logged("loss")


@pytest.mark.parametrize("name, value", [
    ("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"), ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
])  # fmt: skip
def test_what_accelerate_would_do_without_our_checks_is_rejected(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}: found {value}"):
        arguments()


def test_a_precision_that_accelerate_and_a_flag_agree_on_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments("--bf16").mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert arguments().mixed_precision == "no"


def test_what_a_cpu_lacks_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("--fp16", "--tf32"):
        with pytest.raises(InputError, match=flag):
            arguments(flag, "True")


def test_what_only_the_arguments_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments("--use_cpu", "False", "--dataloader_pin_memory", "False", "--log_level_replica", "error",
                     "--log_on_each_node", "False")  # fmt: skip
    plain = arguments("--use_cpu", "False")
    hf_logging.set_verbosity_warning()
    assert not args.dataloader_pin_memory and plain.dataloader_pin_memory
    monkeypatch.setattr(UIETrainingArguments, "process_index", 1)  # the first process of a second machine
    monkeypatch.setattr(UIETrainingArguments, "local_process_index", 0)
    assert plain.should_log and not args.should_log
    assert args.get_process_log_level() == logging.ERROR and plain.get_process_log_level() != logging.ERROR


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_trains_or_is_rejected_before_the_model_is_read(kind, runs):
    needed = {"cosine_with_min_lr": {"min_lr": 1e-4}, "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
              "warmup_stable_decay": {"num_decay_steps": 1}, "greedy": {"min_lr": 1e-5}}  # fmt: skip
    RUNS[kind] = f"--lr_scheduler_type {kind} --eval_strategy steps --eval_steps 1 --max_steps 3 "
    if kind in needed:
        with pytest.raises(InputError, match=f"--lr_scheduler_type {kind}"):
            arguments("--lr_scheduler_type", kind, "--eval_strategy", "steps", "--eval_steps", "1")
        RUNS[kind] += "--lr_scheduler_kwargs " + json.dumps(needed[kind], separators=(",", ":"))
    assert runs(kind).state.global_step == 3


def test_a_schedule_that_waits_for_a_plateau_knows_what_is_better(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plateau = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps", "--eval_steps", "1"]
    assert arguments(*plateau).lr_scheduler_kwargs == {"mode": "min"}
    plateau += ["--metric_for_best_model", "exact_match", "--lr_scheduler_kwargs", '{"patience":3}']
    of_accuracy = arguments(*plateau)
    assert of_accuracy.lr_scheduler_kwargs == {"mode": "max", "patience": 3}


@pytest.mark.parametrize("kind", ["constant", "reduce_lr_on_plateau", "greedy"])
def test_warm_up_is_rejected_where_the_schedule_has_none(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--warmup_steps: found 9.0; allowed: 0 with"):
        arguments("--lr_scheduler_type", kind, "--eval_strategy", "steps", "--eval_steps", "1", "--warmup_steps", "9")


@pytest.mark.parametrize("steps, warned", [("2", True), ("1", False), ("0.5", False)])
def test_a_warm_up_as_long_as_the_task_is_said(steps, warned, runs, capfd):
    RUNS[f"warm-up {steps}"] = f"--lr_scheduler_type linear --warmup_steps {steps}"
    runs(f"warm-up {steps}")
    assert ("covers all 2 steps of this task" in capfd.readouterr().out) is warned


def test_flags_that_count_beside_another_flag_are_reported_without_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments("--logging_strategy", "epoch").ignored() == ["logging_steps"]  # of `SMALL`
    needing = {"save_steps": ("7", ["--save_strategy", "steps"]),
               "save_total_limit": ("7", ["--save_strategy", "epoch"]),
               "eval_steps": ("7", ["--eval_strategy", "steps"]), "eval_delay": ("7", ["--eval_strategy", "epoch"]),
               "gradient_checkpointing_kwargs": ('{"use_reentrant":false}', ["--gradient_checkpointing"])}  # fmt: skip
    for name, (value, other) in needing.items():
        assert arguments(f"--{name}", value).ignored() == [name]
        assert arguments(f"--{name}", value, *other).ignored() == []


def test_transformers_own_settings_of_recomputation_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = '{"every_n_layers":2,"offload":false}'
    args = arguments("--gradient_checkpointing", "--gradient_checkpointing_kwargs", settings)
    assert args.gradient_checkpointing_kwargs["every_n_layers"] == 2


def test_denser_evaluation_saves_what_may_be_the_best_and_waits_as_told(runs):
    RUNS["denser"] = ("--max_steps 4 --eval_strategy steps --eval_steps 4 --save_strategy steps --save_steps 4 "
                      "--load_best_model_at_end --metric_for_best_model eval_loss --denser_evaluation")  # fmt: skip
    RUNS["denser, later"] = RUNS["denser"] + " --eval_delay 2"
    assert set(evaluated(runs("denser"))) == {1, 4}
    assert checkpoints(runs("denser")) == {"checkpoint-1", "checkpoint-4"}
    assert set(evaluated(runs("denser, later"))) == {4}
    assert checkpoints(runs("denser, later")) == {"checkpoint-4"}


@pytest.mark.parametrize("flags, unread", [
    (["--method", "galore", "--optim_target_modules", "auto", "--galore_lr", "1e-4"], ["learning_rate"]),
    (["--method", "seqlora", "--lora_optimizer", "muon", "--adam_beta1", "0.8"], ["adam_beta1"]),
    (["--method", "seqlora", "--adam_beta1", "0.8"], []),
])  # fmt: skip
def test_training_arguments_that_the_optimizer_does_not_read_are_reported(flags, unread, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = parse_arguments(["--output_dir", "out", *SMALL, *flags])[2]
    assert [name for name in method.ignored if name in ("learning_rate", "adam_beta1")] == unread
