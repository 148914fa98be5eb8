"""The files of configs/ and CL_Benchmark/ that the repository ships, read by the code that uses them."""

from types import SimpleNamespace

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from helpers import ROOT
from order_config import TASKS, benchmark_datasets
from uie_dataset_lora import read_instructions, read_labels

DS_CONFIGS = ROOT / "configs/ds_configs"

STAGES = {
    "stage0": 0,
    "stage1": 1,
    "stage2": 2,
    "stage2_llama": 2,
    "stage2_without_offload": 2,
    "stage2_offload": 2,
    "stage3": 3,
    "eval": 3,
}

LABELS = {
    "SC/yelp": "very negative, negative, neutral, positive, very positive",
    "SC/amazon": "very negative, negative, neutral, positive, very positive",
    "SC/IMDB": "Good, Bad",
    "SC/SST-2": "Good, Bad",
    "TC/dbpedia": "Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, Building, "
    "Natural Place, Village, Animal, Plant, Album, Film, Written Work",
    "TC/agnews": "World, Sports, Business, Science or Technology",
    "TC/yahoo": "Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & Internet, "
    "Sports, Business & Finance, Entertainment & Music, Family & Relationships, Politics & Government",
    "NLI/MNLI": "neutral, entailment, contradiction",
    "NLI/CB": "entailment, contradiction, neutral",
    "NLI/RTE": "contradiction, entailment",
    "QQP/QQP": "False, True",
    "BoolQA/BoolQA": "True, False",
    "MultiRC/MultiRC": "False, True",
    "COPA/COPA": "A, B",
    "WiC/WiC": "True, False",
}


def training_arguments(precision: str) -> SimpleNamespace:
    """The fields of TrainingArguments that end up in a DeepSpeed configuration."""
    return SimpleNamespace(
        world_size=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        save_on_each_node=False,
        fp16=precision == "fp16",
        fp16_full_eval=False,
        bf16=precision == "bf16",
        bf16_full_eval=False,
    )


def test_every_deepspeed_file_is_tested():
    assert {path.stem for path in DS_CONFIGS.glob("*.config")} == set(STAGES)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_takes_the_file_and_the_command_line_decides(name, precision):
    filled = HfTrainerDeepSpeedConfig(str(DS_CONFIGS / f"{name}.config"))
    filled.trainer_config_process(training_arguments(precision))
    assert not filled.mismatches
    assert "auto" not in str(filled.config)  # nothing is left that only the model's hidden size could fill
    parsed = DeepSpeedConfig(filled.config)
    assert parsed.zero_config.stage == STAGES[name]
    assert (parsed.bfloat16_config.enabled, parsed.float16_config.enabled) == (precision == "bf16", precision == "fp16")
    assert (parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps) == (4, 2)
    assert parsed.gradient_clipping == 1.0
    assert name == "eval" or parsed.zero_config.reduce_bucket_size == 2e8


@pytest.mark.parametrize("name", STAGES)
def test_the_trainer_keeps_its_own_optimizer_and_schedule(name):
    config = HfTrainerDeepSpeedConfig(str(DS_CONFIGS / f"{name}.config"))
    assert "optimizer" not in config.config and "scheduler" not in config.config
    assert config.config["zero_allow_untested_optimizer"] is True
    assert config.is_offload() == (name == "stage2_offload")
    if config.is_offload():  # true, which is the default, would swap the optimizer for DeepSpeed's CPU Adam
        assert config.config["zero_force_ds_cpu_optimizer"] is False


def test_instructions():
    instructions = read_instructions(ROOT / "configs/instruction_config.json")
    assert set(instructions) == set(TASKS) - {"COPA"}
    for kinds in instructions.values():
        assert kinds["zero-shot"] and kinds["few-shot"]
        for text in kinds["zero-shot"] + kinds["few-shot"]:
            assert text.endswith(".\n") and text.count("\n") == 1


def test_labels():
    assert set(benchmark_datasets(ROOT / "CL_Benchmark")) >= set(LABELS)
    for name, labels in LABELS.items():
        assert read_labels(ROOT / "CL_Benchmark" / name / "labels.json") == labels.split(", ")
