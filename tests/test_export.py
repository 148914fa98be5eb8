"""Exported models and adapters against the runs that they come from, read by transformers and peft alone."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PegasusConfig, PegasusForConditionalGeneration,
)  # fmt: skip

import answer
import export
import run_uie_lora
from arguments import DataArguments, ModelArguments
from helpers import PREFIX, ROOT, arguments, predictions
from methods import make_method
from model.loading import load_model_and_tokenizer
from prompts import read_prompts, save_prompts
from task_setup import load_model

SHORT = ["--max_steps", "6", "--max_predict_samples", "6"]
KIND = {"t5_adapter": AutoModelForSeq2SeqLM, "llama_adapter": AutoModelForCausalLM}


@pytest.fixture(scope="module", params=[(family, method) for family in PREFIX for method in ("gorp", "inclora",
                                                                                             "seqlora", "osf")])
def run(request, mini_benchmark, tmp_path_factory):
    """Two tasks by one method: (family, method, the second task's folder)."""
    family, method = request.param
    model, modules = PREFIX[family]
    root = tmp_path_factory.mktemp(f"{family}-{method}")
    for dataset in ("dbpedia", "amazon"):
        flags = ["--method", method, *SHORT]
        assert run_uie_lora.main(arguments(mini_benchmark, root / dataset, dataset, model, modules, *flags)) == 0
        model = root / dataset / family
    return family, method, root / "amazon"


def logits(model, tokenizer) -> torch.Tensor:
    batch = tokenizer("Task:SC\nThe film was dull.\nAnswer:", return_tensors="pt")
    labels = {"labels": batch["input_ids"][:, :4].contiguous()} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], **labels).logits


def test_exported_model_predicts_what_the_run_did(run, mini_benchmark, tmp_path):
    family, method, folder = run
    assert export.main([str(folder), "--to", str(tmp_path / "model")]) == 0
    assert "lora" not in "".join(path.name for path in (tmp_path / "model").iterdir())
    command = arguments(mini_benchmark, tmp_path / "again", "amazon", tmp_path / "model", PREFIX[family][1],
                        "--method", "inclora", *SHORT)  # fmt: skip
    command.remove("--do_train")
    assert run_uie_lora.main(command) == 0
    assert predictions(tmp_path / "again") == predictions(folder)
    base = KIND[family].from_pretrained(PREFIX[family][0], dtype=torch.float32)
    stock = KIND[family].from_pretrained(tmp_path / "model")
    assert type(stock) is type(base) and stock.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (logits(stock, tokenizer) - logits(base, tokenizer)).abs().max() > 1e-2


def test_a_finished_model_has_the_revision_and_the_tokenizer_that_it_was_trained_with(
    mini_benchmark, tmp_path, monkeypatch
):
    """The base is a hub repository of two revisions in a cache; the weights of `main` are doubled."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache, (base, modules) = tmp_path / "cache", PREFIX["t5_adapter"]
    place = cache / "models--someone--t5"
    for revision, commit in (("main", "a" * 40), ("early", "b" * 40)):
        shutil.copytree(base, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
    doubled = place / "snapshots" / ("a" * 40) / "model.safetensors"
    save_file({name: 2 * value for name, value in load_file(doubled).items()}, doubled, {"format": "pt"})
    shutil.copytree(base, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    flags = ["--model_revision", "early", "--cache_dir", str(cache), "--tokenizer_name", str(tmp_path / "tokenizer")]
    command = arguments(mini_benchmark, tmp_path / "run", "dbpedia", "someone/t5", modules, "--method", "seqlora",
                        *SHORT, *flags)  # fmt: skip
    assert run_uie_lora.main(command) == 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder, loaded = export.load_finished(tmp_path / "run")
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == loaded.origin["revision"] == "b" * 40
    assert loaded.tokenizer.name_or_path == str(folder)
    wanted = KIND["t5_adapter"].from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(loaded.model.get_input_embeddings().weight, wanted)
    again = load_model(ModelArguments(model_name_or_path=str(folder)), DataArguments())  # a next task
    assert torch.equal(again.model.get_input_embeddings().weight, wanted)
    assert export.main([str(folder), "--to", str(tmp_path / "adapter"), "--as", "adapter"]) == 0
    exported = export.load_finished(tmp_path / "adapter")[1]
    assert torch.equal(exported.model.get_input_embeddings().weight, wanted)
    assert exported.tokenizer.name_or_path == str(tmp_path / "adapter")


def test_another_config_is_remembered_by_the_folder(mini_benchmark, tmp_path):
    base, modules = PREFIX["llama_adapter"]
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    command = arguments(mini_benchmark, tmp_path / "run", "dbpedia", base, modules, "--method", "seqlora", *SHORT,
                        "--config_name", str(tmp_path / "config"))  # fmt: skip
    assert run_uie_lora.main(command) == 0
    assert export.load_finished(tmp_path / "run")[1].model.config.rms_norm_eps == 0.5
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rms_norm_eps"] == 0.5


def test_exported_adapter_is_a_plain_lora_that_equals_the_model(run, tmp_path, capfd):
    family, method, folder = run
    done = export.main([str(folder / family), "--to", str(tmp_path / "adapter"), "--as", "adapter"])
    if method in ("gorp", "osf"):
        assert done == 2 and "holds changed full-rank weights" in capfd.readouterr().err
        assert not (tmp_path / "adapter").exists()
        return
    assert done == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == {"inclora": 16, "seqlora": 8}[method] and "r_sum" not in config
    assert config["lora_alpha"] / config["r"] == 4
    assert export.main([str(folder), "--to", str(tmp_path / "model")]) == 0
    base = KIND[family].from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    merged = KIND[family].from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(adapted, tokenizer), logits(merged, tokenizer), rtol=1e-4, atol=1e-4)


def test_an_adapter_folder_says_what_it_is_and_plain_peft_loads_no_incomplete_one(run, tmp_path):
    family, method, folder = run
    card = (folder / family / "README.md").read_text()
    prompts = json.loads((folder / family / "prompts.json").read_text())
    assert list(prompts["heads"]) == ["TC/dbpedia", "SC/amazon"]
    assert f"method {method}, on {PREFIX[family][0]}" in card and "More Information Needed" not in card
    assert f"{prompts['heads']['SC/amazon']}TEXT{prompts['tail']}" in card
    base = KIND[family].from_pretrained(PREFIX[family][0])
    assert ("weights of the base model that changed" in card) == (method in ("gorp", "osf"))
    assert ("factors `loranew_A` and `loranew_B`, which PEFT alone leaves out" in card) == (method == "seqlora")
    if method in ("gorp", "seqlora"):
        with pytest.raises(KeyError, match="LORA that PEFT cannot load completely, see README.md"):
            PeftModel.from_pretrained(base, folder / family)


def test_answers_are_those_of_the_run(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(answer, "BATCH_SIZE", 3)  # the fourth text is alone in its batch
    family, _, folder = run
    rows = [row for row in predictions(folder) if row["Dataset"] == "amazon"][:4]
    texts = [row["Instance"]["sentence"] for row in rows]
    (tmp_path / "texts").write_text("\n".join(text.replace("\n", "\\n") for text in texts))
    assert answer.main([str(folder / family), "--dataset", "SC/amazon", "--file", str(tmp_path / "texts")]) == 0
    assert capfd.readouterr().out.splitlines()[-4:] == [row["Prediction"] for row in rows]


def test_a_text_that_is_cut_is_said(run, caplog):
    family, _, folder = run
    answer.answers(folder / family, "SC/amazon", ["short", "long " * 3000])
    assert "1 of 2 texts are cut to fit a prompt of" in caplog.text


def test_a_file_of_texts_has_line_breaks_and_backslashes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(answer, "answers", lambda folder, dataset, texts, dtype: asked.extend(texts) or [])
    (tmp_path / "texts").write_text("\ufeffone\\ntwo\nthe area.\\\\n\\\\nStaff \\x\n", encoding="utf-8")
    assert answer.main([str(tmp_path), "--dataset", "SC/yelp", "--file", str(tmp_path / "texts")]) == 0
    assert asked == ["one\ntwo", "the area.\\n\\nStaff \\x"]


def test_a_model_too_large_for_the_gpu_is_one_line(tmp_path, monkeypatch, capfd):
    def no_memory(folder, dataset, texts, dtype):
        raise torch.OutOfMemoryError(f"out of memory in {dtype}")

    monkeypatch.setattr(answer, "answers", no_memory)
    assert answer.main([str(tmp_path), "--dataset", "SC/yelp", "--text", "x"]) == 2
    assert capfd.readouterr().err.startswith("error: --dtype: found float32, in which the model does not fit")


def test_prompts_of_earlier_tasks_stay_where_only_the_last_is_tested(tmp_path):
    collator = SimpleNamespace(parts=lambda example: (f"head of {example['Dataset']}", "", ""), max_source_length=9,
                               max_target_length=3)  # fmt: skip
    previous = None
    for name in ("dbpedia", "amazon", "dbpedia"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_prompts(folder, previous, [{"Task": "X", "Dataset": name}], collator)
        previous = folder
    assert list(read_prompts(tmp_path / "1")["heads"]) == ["X/dbpedia", "X/amazon"]
    assert list(read_prompts(previous)["heads"]) == ["X/amazon", "X/dbpedia"]  # the last task's own prompt comes last


@pytest.mark.parametrize("words, fault", [
    (["--dataset", "TC/cnn", "--text", "x"], "--dataset: found TC/cnn; allowed: TC/dbpedia, SC/amazon"),
    (["--dataset", "SC/amazon", "--text", " "], "--text or --file: found no text"),
    (["--dataset", "SC/amazon", "--file", "nowhere"], "nowhere: no such file"),
    (["--dataset", "SC/amazon", "--file", os.devnull], "--text or --file: found no text in line 1"),
    (["--dataset", "SC/amazon", "--file", str(ROOT / "LICENSE")], "--text or --file: found no text in line 2"),
])
def test_what_cannot_be_asked_is_refused(words, fault, tmp_path, capfd):
    shutil.copytree(PREFIX["t5_adapter"][0], tmp_path / "model")
    heads = dict.fromkeys(["TC/dbpedia", "SC/amazon"], "Option: a, b \n")
    lengths = {"max_source_length": 64, "max_target_length": 8}
    (tmp_path / "model" / "prompts.json").write_text(json.dumps({"heads": heads, "tail": "\nAnswer:"} | lengths))
    assert answer.main([str(tmp_path / "model"), *words]) == 2
    assert fault in capfd.readouterr().err


@pytest.mark.parametrize("words, fault", [
    (["README.md", "--to", "new"], "found 0 folders with adapter_config.json"),
    (["initial_model/tiny-t5", "--to", "new"], "found 0 folders with adapter_config.json"),
])
def test_what_cannot_be_exported_is_refused(words, fault, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main([str(ROOT / words[0]), *words[1:]]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and fault in said and not list(tmp_path.iterdir())


def test_a_model_of_few_positions_is_exported_as_it_is(mini_benchmark, tmp_path):
    base, modules = PREFIX["llama_adapter"]
    small = tmp_path / "small"
    shutil.copytree(base, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    lengths = ["--max_source_length", "128", "--max_target_length", "16", "--generation_max_length", "16"]
    flags = ["--method", "inclora", *SHORT, *lengths]
    command = arguments(mini_benchmark, tmp_path / "run", "dbpedia", small, modules, *flags)
    assert run_uie_lora.main(command) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["max_position_embeddings"] == 256


def test_positions_that_grew_for_the_run_grow_for_its_result(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(PREFIX["t5_adapter"][0])
    config = PegasusConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64,
    )  # fmt: skip
    PegasusForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    method = make_method("inclora", lora_modules=".*self_attn.(q_proj|v_proj)")
    method.prepare(load_model_and_tokenizer(str(tmp_path / "base")).model, None, decoder_only=False)
    method.end_task()
    (tmp_path / "adapter").mkdir()
    method.save(tmp_path / "adapter")
    lengths = {"max_source_length": 80, "max_target_length": 8, "heads": {}, "tail": ""}
    (tmp_path / "adapter" / "prompts.json").write_text(json.dumps(lengths))
    assert export.load_finished(tmp_path / "adapter")[1].model.config.max_position_embeddings == 80


def test_a_base_whose_generation_config_contradicts_itself_is_exported_with_every_eos(mini_benchmark, tmp_path):
    base, modules = PREFIX["llama_adapter"]
    odd = tmp_path / "odd"
    shutil.copytree(base, odd)
    given = {"eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (odd / "generation_config.json").write_text(json.dumps(given))
    command = arguments(mini_benchmark, tmp_path / "run", "dbpedia", odd, modules, "--method", "inclora", *SHORT)
    assert run_uie_lora.main(command) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    exported = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [2, 1] and "temperature" not in exported
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "adapter"), "--as", "adapter"]) == 0
    assert (tmp_path / "adapter" / "prompts.json").is_file()


def test_an_adapter_keeps_its_precision(tmp_path, capfd):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert export.main([str(tmp_path), "--to", str(tmp_path / "new"), "--as", "adapter", "--dtype", "bfloat16"]) == 2
    assert "error: --dtype: " in capfd.readouterr().err


def test_a_half_written_adapter_is_not_exported(tmp_path, capfd):
    (tmp_path / ".t5_adapter.1.partial").mkdir()
    (tmp_path / ".t5_adapter.1.partial" / "adapter_config.json").write_text("{}")
    assert export.main([str(tmp_path), "--to", str(tmp_path / "new")]) == 2
    assert "found 0 folders" in capfd.readouterr().err


def test_an_export_replaces_nothing(tmp_path, capfd):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "there").mkdir()
    assert export.main([str(tmp_path), "--to", str(tmp_path / "there")]) == 2
    assert "exists already" in capfd.readouterr().err
