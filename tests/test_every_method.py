"""Methods through the entry: a second task resumes to the same bits and exports what it predicts; all train in 16 bits.

What defines a method is tested in test_methods.py and test_rivals.py.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import export
import run_uie_lora
from helpers import PREFIX, arguments, predictions
from methods import method_names

SHORT = ["--max_steps", "4", "--max_predict_samples", "4", "--max_train_samples", "16"]
RIVALS = ["inflora", "ella", "slao", "magmax", "magmax --magmax_merge ties", "ewc", "nlora --nlora_form factors",
          "inclora --lora_optimizer muon", "seqlora --lora_optimizer muon", "sgorp", "sgorp --protect step", "galore",
          "osf"]


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("family", PREFIX)
def test_a_second_task_resumes_to_the_same_bits_and_exports_the_same(name, family, mini_benchmark, tmp_path, capfd):
    model, modules = PREFIX[family]
    flags = ["--method", *name.split(), *SHORT, "--save_strategy", "steps", "--save_steps", "2"]

    def run(folder: str, dataset: str, start: Path, *extra: str) -> Path:
        words = arguments(mini_benchmark, tmp_path / folder, dataset, start, modules, *flags, *extra)
        assert run_uie_lora.main(words) == 0
        return tmp_path / folder

    first = run("first", "dbpedia", model)
    whole = run("whole", "amazon", first / family)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    cut = run("cut", "amazon", first / family, "--resume_from_checkpoint", "True")
    assert "resuming from" in capfd.readouterr().out
    assert predictions(cut) == predictions(whole)
    for path in (whole / family).glob("*.safetensors"):
        once, again = load_file(path), load_file(cut / family / path.name)
        assert once.keys() == again.keys() and all(torch.equal(once[key], again[key]) for key in once)
    assert export.main([str(whole), "--to", str(tmp_path / "model")]) == 0
    words = arguments(mini_benchmark, tmp_path / "again", "amazon", tmp_path / "model", modules, "--method", "inclora",
                      *SHORT)  # fmt: skip
    words.remove("--do_train")
    assert run_uie_lora.main(words) == 0
    assert predictions(tmp_path / "again") == predictions(whole)


@pytest.mark.parametrize("name", sorted({*method_names(), *RIVALS}))
def test_two_tasks_in_16_bits(name, mini_benchmark, tmp_path):
    model, modules = PREFIX["t5_adapter"]
    for dataset in ("dbpedia", "amazon"):
        small = ["--per_device_train_batch_size", "2", "--max_predict_samples", "1"]
        flags = ["--method", *name.split(), "--bf16", "True", *SHORT, *small]
        words = arguments(mini_benchmark, tmp_path / dataset, dataset, model, modules, *flags)
        assert run_uie_lora.main(words) == 0
        model = tmp_path / dataset / "t5_adapter"
        tensors = [tensor for path in model.glob("*.safetensors") for tensor in load_file(path).values()]
        assert tensors and all(tensor.isfinite().all() for tensor in tensors)
