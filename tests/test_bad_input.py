"""Bad input, as one table: what is wrong, and the one line that says so. docs/BAD_INPUT.md is written from it.

Every case goes through `src/check.py` and, where one step can meet it, through `src/run_uie_lora.py`; both must say
the same line and end with exit code 2, with the results of an earlier run where they were.

    python tests/test_bad_input.py > docs/BAD_INPUT.md
"""

import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers import LLAMA, LLAMA_MODULES, ROOT, T5, edit, put
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, Gemma3Config, T5Config, T5ForConditionalGeneration

DOCS = ROOT / "docs" / "BAD_INPUT.md"
MODULES = [
    "--lora_modules", ".*SelfAttention.(q|v)", "--optim_target_modules", ".*EncDecAttention.(q|v)",
    "--proj_lora_modules", ".*SelfAttention.(q|v).loranew_A.*",
]  # fmt: skip
KEY = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"
FULL = "decoder.block.0.layer.1.EncDecAttention.q"
LETTERS = ["Alpha", "Beta", "Gamma"]


@dataclass
class Place:
    """A benchmark of two small datasets, an order over them, instructions, and the flags of a run."""

    folder: Path
    adapter_made: Path
    flags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from order_config import write_order

        for name in ("TC/dbpedia", "SC/amazon"):
            rows = [{"sentence": f"text {index}", "label": LETTERS[index % 3]} for index in range(6)]
            for file, content in (("train", rows), ("dev", rows[:3]), ("test", rows[:3]), ("labels", LETTERS)):
                put(self.folder / "benchmark" / name / f"{file}.json", content)
        write_order(self.order, [("TC", "dbpedia"), ("SC", "amazon")])
        shutil.copy(ROOT / "configs" / "instruction_config.json", self.folder / "instructions.json")
        put(self.results / "predict_results.json", {"of": "an earlier run"})

    @property
    def order(self) -> Path:
        return self.folder / "mine_configs"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def model(self) -> Path:
        """A copy of the tiny T5, which the run then starts from."""
        folder = self.folder / "model"
        if not folder.exists():
            shutil.copytree(T5, folder)
            self.flags += ["--model_name_or_path", str(folder)]
        return folder

    @property
    def adapter(self) -> Path:
        """A copy of what one task has left, which the run then starts from."""
        folder = self.folder / "t5_adapter"
        if not folder.exists():
            shutil.copytree(self.adapter_made, folder)
            self.flags += ["--model_name_or_path", str(folder)]
        return folder

    def command(self) -> list[str]:
        return [
            "--model_name_or_path", str(T5), "--data_dir", str(self.folder / "benchmark"),
            "--instruction_file", str(self.folder / "instructions.json"), "--use_cpu", "--report_to", "none",
            "--predict_with_generate", "--lamda_1", "0", "--max_source_length", "128", *MODULES, *self.flags,
        ]  # fmt: skip

    def run(self) -> list[str]:
        step = ["--task_config_dir", str(self.order / "dbpedia"), "--output_dir", str(self.results)]
        return [*step, "--overwrite_output_dir", "--do_train", "--do_predict", "--max_steps", "2", *self.command()]


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Attributes:
        what: the fault, in words. says: a part of the line that names it; " ... " stands for what it leaves out.
        damage: does it to a `Place`.
        by: "check" where one step alone cannot see it, "run" where the check does not come so far, else "both".
        needs_model: whether the run can see it only once the model is there.
    """

    what: str
    damage: Callable[[Place], object]
    says: str
    by: str = "both"
    needs_model: bool = False


# What is done to a place


def train(content: object):
    return lambda place: put(place.folder / "benchmark/TC/dbpedia/train.json", content)


def row(**values: object):
    return train([{"sentence": "fine", "label": "Alpha"}, values])


def labels(*names: object):
    return lambda place: put(place.folder / "benchmark/TC/dbpedia/labels.json", list(names))


def long_label(name: str):
    """A label that the rows use: it must fit as an answer and among the options."""
    return lambda place: (labels(name, *LETTERS)(place), row(sentence="x", label=name)(place))


def lost(*parts: str):
    return lambda place: (place.folder.joinpath(*parts)).unlink()


def linked(place: Place) -> None:
    inside = place.folder / "benchmark/TC/dbpedia/train.json"
    inside.rename(place.folder / "elsewhere.json")
    inside.symlink_to(place.folder / "elsewhere.json")


def tasks(subset: str, change: Callable, step: str = "dbpedia"):
    """Edit a task file in place: `change` gets the object of task -> entries."""
    return lambda place: edit(place.order / step / f"{subset}_tasks.json", lambda content: change(content) or content)


def named(name: object):
    return tasks("train", lambda content: content.update(TC=[{"dataset name": name, "sampling strategy": "full"}]))


def instructions(content: object):
    return lambda place: put(place.folder / "instructions.json", content)


def instruction(**entry: str):
    return instructions({task: [entry] for task in ("TC", "SC")})


def flags(*words: str):
    return lambda place: place.flags.extend(words)


def resumed(*words: str):
    """From a checkpoint of the run that made the adapter."""
    return lambda place: place.flags.extend(
        ["--resume_from_checkpoint", str(place.adapter_made.parent / "checkpoint-2"), *words]
    )


def deepspeed(content: object, *words: str):
    def damage(place: Place) -> None:
        put(place.folder / "ds.json", content)
        place.flags += ["--deepspeed", str(place.folder / "ds.json"), *words]

    return damage


def padding_ends(place: Place) -> None:
    shutil.copytree(LLAMA, place.folder / "llama")
    edit(place.folder / "llama" / "tokenizer_config.json", lambda content: content | {"pad_token": "</s>"})
    place.flags += ["--model_name_or_path", str(place.folder / "llama"), *LLAMA_MODULES, "--repetition_penalty", "1.3"]


def unwritable(place: Place) -> None:
    put(place.folder / "file", "")
    place.flags += ["--output_dir", str(place.folder / "file" / "out")]


def config(**values: object):
    return lambda place: edit(place.model / "config.json", lambda content: content | values)


def pickled(name: str):
    """The model's weights as a pickle of that name, and no others."""

    def damage(place: Place) -> None:
        (place.model / "model.safetensors").unlink()
        put(place.model / name, pickle.dumps({"shared.weight": [0.0]}))

    return damage


def tensors(owner: str, name: str, change: Callable):
    """Apply `change` to the tensors of a safetensors file of the `owner` ("model" or "adapter"); its metadata stays."""

    def damage(place: Place) -> None:
        path = getattr(place, owner) / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        content = load_file(path)
        change(content)
        save_file(content, path, metadata)

    return damage


def cut(owner: str, name: str, bytes_kept: int = 100):
    def damage(place: Place) -> None:
        path = getattr(place, owner) / name
        put(path, path.read_bytes()[:bytes_kept])

    return damage


def pieces(file: str):
    """The model in pieces whose index leads to `file`."""
    return lambda place: put(place.model / "model.safetensors.index.json", {"weight_map": {"shared.weight": file}})


def adapter_config(**values: object):
    return lambda place: edit(place.adapter / "adapter_config.json", lambda content: content | values)


def narrow_base(place: Place) -> None:
    """Let the adapter's base be a T5 of half the width."""
    base = place.folder / "narrow"
    T5ForConditionalGeneration(T5Config.from_pretrained(T5, d_model=64)).save_pretrained(base)
    for path in T5.glob("tokenizer*"):
        shutil.copy(path, base)
    adapter_config(base_model_name_or_path=str(base))(place)


def base_is_an_adapter(place: Place) -> None:
    shutil.copy(T5 / "config.json", place.adapter)
    adapter_config(base_model_name_or_path=str(place.adapter))(place)


def adapter_as_pickle(place: Place) -> None:
    (place.adapter / "adapter_model.safetensors").unlink()
    put(place.adapter / "adapter_model.bin", pickle.dumps({}))


def first(content: dict[str, torch.Tensor]) -> str:
    return sorted(content)[0]


ROW = "allowed: an object of exactly 'sentence' and 'label', both non-blank strings"
INSTRUCTION = "allowed: an object of exactly 'instruction_type' and 'instruction', both non-blank strings"
CASES: dict[str, list[Case]] = {
    "Benchmark files": [
        Case("the dataset's folder is not there", lambda place: shutil.rmtree(place.folder / "benchmark/TC/dbpedia"),
             "TC/dbpedia is not in ... ; allowed: SC/amazon"),
        Case("`train.json` is missing", lost("benchmark/TC/dbpedia/train.json"),
             "train.json: no such file; data/prepare_benchmark.py fills"),
        Case("`test.json` is missing", lost("benchmark/TC/dbpedia/test.json"), "test.json: no such file"),
        Case("`labels.json` is missing", lost("benchmark/TC/dbpedia/labels.json"),
             "labels.json: no such file; data/generate_labels.py writes it"),
        Case("a file of a later step is missing", lost("benchmark/SC/amazon/test.json"),
             "amazon/test.json: no such file", by="check"),
        Case("a link leads out of the benchmark", linked, "elsewhere.json; allowed: files inside"),
        Case("not JSON", train('[{"sentence": "x",\n "label" "Alpha"}]'),
             "train.json, line 2, column 10: not JSON (Expecting ':' delimiter)"),
        Case("an empty file", train(""), "train.json, line 1, column 1: not JSON"),
        Case("a byte order mark", train("\ufeff[]"), "train.json, line 1, column 1: not JSON (Unexpected UTF-8 BOM"),
        Case("not UTF-8", train(b'[{"sentence": "caf\xe9"}]'), "train.json: not UTF-8 (byte 18)"),
        Case("an object in place of the examples", train({"a": 1}),
             "found object; allowed: a non-empty array of examples"),
        Case("null in place of the examples", train(None), "found null; allowed: a non-empty array of examples"),
        Case("no examples", train([]), "train.json: found empty array; allowed: a non-empty array of examples"),
        Case("an example that is not an object", train(["x"]), f"train.json, example 0: found string; {ROW}"),
        Case("an empty object as example", train([{}]), f"train.json, example 0: keys none; {ROW}"),
        Case("an example without label", row(sentence="x"), f"train.json, example 1: keys 'sentence'; {ROW}"),
        Case("an example without sentence", row(label="Beta"), f"train.json, example 1: keys 'label'; {ROW}"),
        Case("an example with another key", row(sentence="x", label="Beta", id=3),
             "example 1: keys 'sentence', 'label', 'id'; allowed: an object of exactly"),
        Case("a sentence that is a number", row(sentence=3, label="Beta"),
             "example 1: sentence is number; allowed: an object of exactly"),
        Case("a label that is null", row(sentence="x", label=None),
             "example 1: label is null; allowed: an object of exactly"),
        Case("an empty string as label", row(sentence="x", label=""),
             "example 1: label is blank; allowed: an object of exactly"),
        Case("a key twice in an example", train('[{"sentence": "x", "label": "Alpha", "label": "Beta"}]'),
             "key 'label' occurs 2 times in one object; allowed: once"),
        Case("arrays nested 100,000 deep", train("[" * 100_000), "train.json: nested too deeply"),
        Case("a number of 5,000 digits", train(f"[{'9' * 5000}]"), "train.json: cannot be read (Exceeds the limit"),
    ],
    "Labels": [
        Case("a label that is not in `labels.json`", row(sentence="x", label="Delta"),
             "example 1: label 'Delta'; allowed: Alpha, Beta, Gamma"),
        Case("a training example labelled '-', as those without a label in `dev.json` and `test.json` are",
             row(sentence="x", label="-"), "train.json, example 1: label '-'; allowed: Alpha, Beta, Gamma"),
        Case("an object in place of the array", lambda place: put(
            place.folder / "benchmark/TC/dbpedia/labels.json", {"a": 1}),
            "labels.json: found object; allowed: a non-empty array of strings"),
        Case("no labels", labels(), "labels.json: found empty array; allowed: a non-empty array of strings"),
        Case("a label that is not a string", labels(*LETTERS, 4),
             "labels.json, entry 3: found 4; allowed: distinct, non-blank strings"),
        Case("an empty label", labels(*LETTERS, ""), "labels.json, entry 3: found ''; allowed: distinct, non-blank"),
        Case("a label of spaces", labels(*LETTERS, " \t"), "labels.json, entry 3: found ' \\t'"),
        Case("a label twice", labels(*LETTERS, "Beta"), "labels.json, entry 3: found 'Beta'; allowed: distinct"),
        Case("labels that differ only in case", labels(*LETTERS, "beta"), "entry 3: found 'beta' beside 'Beta'"),
        Case("labels that differ only in spaces", labels(*LETTERS, " Beta "), "entry 3: found ' Beta ' beside 'Beta'"),
        Case("labels that differ only in punctuation", labels(*LETTERS, "Beta!"), "found 'Beta!' beside 'Beta'"),
        Case("labels that differ only in how Unicode composes a character", labels("Caf\u00e9", "Cafe\u0301"),
             "found 'Cafe\\u0301' beside 'Caf\\xe9'; allowed: labels that differ in more than"),
        Case("no test example has a label", lambda place: put(place.folder / "benchmark/TC/dbpedia/test.json", [
            {"sentence": "x", "label": "-"}]), "1 examples, all labelled '-'; at least one needs a label"),
        Case("a lone surrogate in a label", train('[{"sentence": "x", "label": "Al\\ud800"}]'),
             "half of a surrogate pair, '\\ud800'"),
        Case("a label longer than an answer may be", long_label("word " * 60), "allowed: --max_target_length 50",
             needs_model=True),
        Case("a label that spells a special token", long_label("a</s>b"), "the answer 'a</s>b' spells </s>; allowed",
             needs_model=True),
        Case("a label in a script that the tokenizer lacks", long_label("\u8d1f\u9762"),
             "the answer '\u8d1f\u9762' becomes '' in the tokenizer", needs_model=True),
        Case("a label with a character that the tokenizer lacks", long_label("naïve"),
             "the answer 'naïve' becomes 'nave' in the tokenizer", needs_model=True),
        Case("a label of a megabyte", long_label("x" * 1_000_000), "allowed: --max_source_length 128",
             needs_model=True),
    ],
    "Text": [
        Case("an empty sentence", row(sentence="", label="Beta"), "example 1: sentence is blank"),
        Case("a sentence of white space", row(sentence=" \n\u2003", label="Beta"), "example 1: sentence is blank"),
        Case("a lone surrogate in a sentence", train('[{"sentence": "ab\\udfff", "label": "Beta"}]'),
             "train.json: found half of a surrogate pair, '\\udfff', after"),
    ],
    "Order": [
        Case("the order does not exist", lambda place: place.order.rename(place.order.with_name("other_configs")),
             "mine_configs: no such order folder; in ... : other_configs", by="check"),
        Case("an order without steps", lambda place: [shutil.rmtree(path) for path in place.order.iterdir()],
             "mine_configs: no steps; allowed: one folder per dataset", by="check"),
        Case("a task file is missing", lost("mine_configs/dbpedia/dev_tasks.json"), "dev_tasks.json: no such file"),
        Case("a task file is not an object", lambda place: put(place.order / "dbpedia/test_tasks.json", []),
             "test_tasks.json: found empty array; allowed: an object"),
        Case("a task that leaves the benchmark", tasks("train", lambda content: content.update({"../NER": []})),
             "train_tasks.json, task: found '../NER'; allowed: letters"),
        Case("a task twice", lambda place: put(place.order / "dbpedia/train_tasks.json", '{"TC": [], "TC": []}'),
             "train_tasks.json: key 'TC' occurs 2 times"),
        Case("a task's datasets are not an array", tasks("train", lambda content: content.update(TC={})),
             "train_tasks.json, TC: found empty object; allowed: an array"),
        Case("a dataset name that is not a string", named(7),
             "train_tasks.json, TC[0]: found ... ; allowed: an object with a string under 'dataset name'"),
        Case("a dataset name that leaves the benchmark", named("../../etc"), "'dataset name': found '../../etc'"),
        Case("a dataset name that is a path from the root", named("/etc"), "'dataset name': found '/etc'; allowed"),
        Case("a dataset name of 5,000 letters", named("x" * 5000), "starting with a letter or digit, at most 100"),
        Case("an unknown sampling strategy", tasks("test", lambda content: content["TC"][0].update(
            {"sampling strategy": "half"})), "'sampling strategy' is 'half'; allowed: random, full"),
        Case("a misspelt key", tasks("test", lambda content: content["TC"][0].update({"sampling_strategy": "full"})),
             "test_tasks.json, TC[0]: unknown key 'sampling_strategy'; allowed: sampling strategy, dataset name; did"),
        Case("an extra key", tasks("test", lambda content: content["TC"][0].update({"limit": 3})),
             "test_tasks.json, TC[0]: unknown key 'limit'; allowed: sampling strategy, dataset name"),
        Case("a misspelt task", tasks("train", lambda content: content.update(Multirc=[])),
             "unknown task 'Multirc'; allowed: the published ones, and those in"),
        Case("a dataset twice", tasks("test", lambda content: content["TC"].append(content["TC"][0])),
             "dataset 'dbpedia' is listed 2 times; allowed: once"),
        Case("a step that trains two datasets", tasks("train", lambda content: content["SC"].append(
            {"dataset name": "amazon"})), "train_tasks.json: found 2 datasets; allowed: exactly one", by="check"),
        Case("a step that trains none", tasks("train", lambda content: content.update(TC=[])),
             "train_tasks.json: found 0 datasets; allowed: exactly one", by="check"),
        Case("a folder of another name than its dataset", lambda place: (place.order / "amazon").rename(
            place.order / "second"),
            "second/train_tasks.json: trains 'amazon'; allowed: 'second', the name", by="check"),
        Case("a step that does not test what it trains", tasks("test", lambda content: content.update(TC=[])),
             "test_tasks.json: lacks TC/dbpedia, which train_tasks.json trains", by="check"),
        Case("two steps with equally long test lists", tasks("test", lambda content: content.update(TC=[]), "amazon"),
             "both list 1 datasets, so which step comes first is not clear", by="check"),
        Case("a step that tests a dataset not trained yet", tasks("test", lambda content: content["TC"].append(
            {"dataset name": "agnews"}), "amazon"),
            "lists TC/agnews, which no step up to this one trains; allowed: SC/amazon, TC/dbpedia", by="check"),
    ],
    "Instructions": [
        Case("the file is missing", lost("instructions.json"), "instructions.json: no such file"),
        Case("the file is not an object", instructions([]), "found empty array; allowed: an object of task"),
        Case("a task's instructions are not an array", instructions({"TC": "x"}),
             "TC: found string; allowed: an array of instructions"),
        Case("an instruction that is not an object", instructions({"TC": ["x"]}),
             f"TC, entry 0: found string; {INSTRUCTION}"),
        Case("no instruction for a task", instructions({"QQP": []}), "no zero-shot instruction for task"),
        Case("an unknown instruction type", instruction(instruction_type="one-shot", instruction="x"),
             "entry 0: instruction_type 'one-shot'; allowed: zero-shot, few-shot"),
        Case("an entry without text", instruction(instruction_type="zero-shot"),
             f"entry 0: keys 'instruction_type'; {INSTRUCTION}"),
        Case("a blank text", instruction(instruction_type="zero-shot", instruction=" "), "instruction is blank"),
    ],
    "Flags": [
        Case("an unknown flag", flags("--lamda_4", "1"), "--lamda_4: no such flag; did you mean '--lamda_"),
        Case("a misspelt flag with its value", flags("--galore_rnk=4"),
             "--galore_rnk: no such flag; did you mean '--galore_rank'?"),
        Case("a stray word", flags("--galore_rank", "4", "5"), "5: found where a flag belongs"),
        Case("a repetition penalty where a LLaMA's padding is its end token", padding_ends,
             "--repetition_penalty: found 1.3; allowed: 1.0 for this model, whose padding is its end token",
             needs_model=True),
        Case("the beginning of a flag", flags("--galore_r", "4"), "--galore_r: no such flag; did you mean"),
        Case("a flag without its value", flags("--galore_rank"), "--galore-rank: expected one argument"),
        Case("a word where a number belongs", flags("--galore_rank", "four"), "--galore-rank: invalid int value: 'fo"),
        Case("a JSON file of flags that is not an object", lambda place: put(place.folder / "flags.json", []),
             "flags.json: found empty array; allowed: an object", by="run"),
        Case("`--lora_dim` below 1", flags("--lora_dim", "0"), "--lora_dim: found 0; allowed: a number above 0"),
        Case("a penalty below 0", flags("--lamda_1", "-1"), "--lamda_1: found -1.0; allowed: 0 or more"),
        Case("NaN", flags("--galore_lr", "nan"), "--galore_lr: found nan; allowed: 0 or more"),
        Case("infinity", flags("--galore_scale", "inf"), "--galore_scale: found inf; allowed: a number above 0"),
        Case("`--learning_rate` below 0", flags("--learning_rate", "-1"), "learning_rate: found -1.0; allowed: 0 or"),
        Case("an empty batch", flags("--per_device_train_batch_size", "0"), "batch_size: found 0; allowed: a number"),
        Case("zero epochs", flags("--num_train_epochs", "0", "--max_steps", "-1"), "--num_train_epochs: found 0.0"),
        Case("zero steps", flags("--max_steps", "0"), "--max_steps: found 0; allowed: a number above 0, or -1 for"),
        Case("a seed of 33 bits", flags("--seed", "4294967296"), "--seed: found 4294967296; allowed: less than 2^32"),
        Case("a seed below 0", flags("--seed", "-1"), "--seed: found -1; allowed: 0 or more"),
        Case("dropout of 1", flags("--lora_dropout", "1"), "--lora_dropout: found 1.0; allowed: 0 up to, not incl"),
        Case("an energy above 1", flags("--space_energy", "1.1"), "space_energy: found 1.1; allowed: above 0, at most"),
        Case("zero examples", flags("--max_num_instances_per_task", "0"), "allowed: a number above 0, or -1 for all"),
        Case("an unknown choice", flags("--galore_proj_type", "up"),
             "--galore-proj-type: invalid choice: 'up' (choose"),
        Case("an unknown method", flags("--method", "magic"), "--method: found magic; allowed: ella, ewc, galore"),
        Case("an unknown strategy", flags("--instruction_strategy", "both"), "'both'; allowed: single, multiple"),
        Case("a logger that is not installed", flags("--report_to", "nowhere"), "to: found nowhere; allowed: none,"),
        Case("both 16-bit precisions", flags("--bf16", "--fp16"), "At most one of fp16 and bf16 can be True"),
        Case("structural protection of the output side", flags("--method", "sgorp", "--protect_side", "output",
                                                               "--space_from", "moments"), "--protect_side input"),
        Case("a space from inputs on the output side", flags("--space_from", "inputs"), "--space_from inputs: found"),
        Case("an unknown preset", flags("--preset", "best"), "--preset: found best; allowed: released"),
        Case("a preset of another method", flags("--method", "olora", "--preset", "released"),
             "--preset: found released; allowed: none with this method; --method gorp has released"),
        Case("the preset of `gorp` with its variant", flags("--method", "sgorp", "--preset", "released"),
             "--preset: found released; allowed: none with this method; --method gorp has released"),
        Case("a flag that contradicts the preset", flags("--preset", "released", "--galore_svd", "lowrank"),
             "--galore_svd: found lowrank; allowed: exact with --preset released"),
        Case("the preset with a penalty", flags("--preset", "released", "--lamda_1", "0.5"),
             "--lamda_1: found 0.5; allowed: 0.0 with --preset released"),
        Case("the preset with clipping", flags("--preset", "released", "--max_grad_norm", "1"),
             "--max_grad_norm: found 1.0; allowed: 0.0 with --preset released"),
        Case("the preset in 16 bits", flags("--preset", "released", "--bf16"),
             "--bf16: found True; allowed: False with --preset released"),
        Case("a penalty on cores with PyTorch's default recomputation",
             flags("--lamda_3", "1", "--galore_engine", "cores", "--gradient_checkpointing",
                   "--gradient_checkpointing_kwargs", '{"preserve_rng_state": false}'),
             "--lamda_3: found 1.0 with reentrant"),
        Case("a penalty on cores with reentrant recomputation",
             flags("--lamda_3", "0.1", "--galore_engine", "cores", "--gradient_checkpointing",
                   "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'),
             "--lamda_3: found 0.1 with reentrant"),
        Case("S removed from the first moment of cores", flags("--protect", "gp_second", "--galore_engine", "cores"),
             "--protect: found gp_second with --galore_engine cores"),
        Case("S removed from the first moment of a two-sided core",
             flags("--protect", "gp_second", "--galore_proj_type", "full"),
             "--protect: found gp_second with --galore_proj_type full"),
        Case("full-rank training of no weight", flags("--method", "galore", "--optim_target_modules", "none"),
             "--optim_target_modules is missing", needs_model=True),
        Case("replay of nothing", flags("--method", "replay", "--replay_rows", "0"), "--replay_rows: found 0"),
        Case("EWC without earlier tasks", flags("--method", "ewc", "--ewc_decay", "0"), "--ewc_decay: found 0.0"),
        Case("an infinite penalty", flags("--method", "nlora", "--nlora_lamda", "inf"), "--nlora_lamda: found inf"),
        Case("a penalty of a method below 0", flags("--method", "nlora", "--nlora_lamda", "-1"),
             "--nlora_lamda: found -1.0"),
        Case("every direction preserved", flags("--method", "osf", "--osf_preserved", "1"),
             "--osf_preserved: found 1.0"),
        Case("less than one direction preserved", flags("--method", "osf", "--osf_preserved", "0.001"),
             "less than one direction of", needs_model=True),
        Case("a sketch without DeepSpeed", flags("--galore_svd", "sketch"), "sketch without --deepspeed",
             needs_model=True),
        Case("the old LoRA merged in 16 bits", flags("--merge_old", "--bf16"),
             "--merge_old: found true with --bf16; allowed: only in fp32"),
        Case("4 bits with a method that has no LoRA", flags("--load_in_4bit", "--method", "galore"),
             "--load_in_4bit: found true with --method galore; allowed: a method with a LoRA"),
        Case("the old LoRA merged into a full-rank weight",
             flags("--merge_old", "--optim_target_modules", ".*SelfAttention.q"),
             "SelfAttention.q with a LoRA and as a full-rank weight", needs_model=True),
        Case("zero tokens in an evaluation batch", flags("--eval_batch_tokens", "0"),
             "--eval_batch_tokens: found 0; allowed: a number above 0"),
        Case("more shown examples than there are", lambda place: (instruction(
            instruction_type="few-shot", instruction="x")(place), place.flags.extend(["--num_examples", "6"])),
            "--num_examples: 6; allowed: at most 5, the other examples"),
        Case("the benchmark does not exist", flags("--data_dir", "nowhere"), "dir: found nowhere; allowed: an exist"),
        Case("a results folder that cannot be written", unwritable, "out: cannot be written (Not a directory)"),
        Case("checkpoints without the optimizer", flags("--save_only_model", "True"),
             "--save_only_model: found True; allowed: only the default, as no run could resume"),
        Case("an upload", flags("--push_to_hub", "True"), "allowed: only the default, as src/export.py writes"),
        Case("a secret", flags("--hub_token", "hf_abc"), "--hub_token: found a secret; allowed: only the default"),
        Case("another optimizer", flags("--optim", "sgd"),
             "--optim: found sgd; allowed: only the default, as the method brings its own optimizer"),
        Case("beams by Hugging Face's flag", flags("--generation_num_beams", "4"),
             "--generation_num_beams: found 4; allowed: only the default, as evaluation generates; see --num_beams"),
        Case("no predictions", flags("--prediction_loss_only", "True"),
             "--prediction_loss_only: found True; allowed: only the default, as predictions are always scored"),
        Case("a package that is not installed", flags("--use_liger_kernel", "True"),
             "--use_liger_kernel: found True; allowed: only the default"),
        Case("batches grouped by length", flags("--train_sampling_strategy", "group_by_length"),
             "--train_sampling_strategy: found group_by_length; allowed: random or sequential"),
        Case("a schedule that lacks a setting", flags("--lr_scheduler_type", "warmup_stable_decay"),
             "warmup_stable_decay, --lr_scheduler_kwargs, --learning_rate 5e-05: get_wsd_schedule() missing 1"),
        Case("a setting that the schedule does not have", flags("--lr_scheduler_kwargs", '{"cycles": 2}'),
             "linear, --lr_scheduler_kwargs, --learning_rate 5e-05: get_linear_schedule_with_warmup() got"),
        Case("a setting for a constant schedule", flags("--lr_scheduler_type", "constant", "--lr_scheduler_kwargs",
                                                        '{"a": 2}'), "none with --lr_scheduler_type constant"),
        Case("warm-up of a constant schedule", flags("--lr_scheduler_type", "constant", "--warmup_steps", "9"),
             "--warmup_steps: found 9.0; allowed: 0 with --lr_scheduler_type constant, which has none; constant_with"),
        Case("warm-up of a schedule that waits for a plateau",
             flags("--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch", "--warmup_steps", "9"),
             "allowed: 0 with --lr_scheduler_type reduce_lr_on_plateau, which has none"),
        Case("a greedy schedule with its own minimum",
             flags("--lr_scheduler_type", "greedy", "--eval_strategy", "epoch"),
             "--lr_scheduler_kwargs: found None; allowed: min_lr and more with --lr_scheduler_type greedy"),
        Case("starting over from one's own checkpoint",
             flags("--overwrite_output_dir", "--resume_from_checkpoint", "true"),
             "--resume_from_checkpoint: found true with --overwrite_output_dir; allowed: one of the two"),
        Case("over-sampling without a limit", flags("--over_sampling", "--max_num_instances_per_task", "-1"),
             "--max_num_instances_per_task: found -1 with --over_sampling; allowed: the number of examples to reach"),
        Case("answers cut short", flags("--generation_max_length", "2"),
             "--generation_max_length: found 2; allowed: 50, as --max_target_length, or the flag left out"),
        Case("nothing to do", flags("--do_train", "False", "--do_predict", "False"),
             "--do_train, --do_eval, --do_predict: found none of them; allowed: one or more"),
        Case("no complete batch", flags("--dataloader_drop_last", "--per_device_train_batch_size", "64"),
             "--dataloader_drop_last: found true, with which 6 examples make no batch of 64", by="run",
             needs_model=True),
        Case("a backend in one process", flags("--ddp_backend", "gloo"), "backend: found gloo; allowed: none in one"),
        Case("16-bit evaluation before training", flags("--zero_shot", "--bf16_full_eval"),
             "--zero_shot: found true with 16-bit evaluation; allowed: one of the two"),
        Case("workers that stay, without workers", flags("--dataloader_persistent_workers"),
             "--dataloader_num_workers 0: persistent_workers option needs num_workers > 0"),
        Case("a setting that recomputation does not have", flags("--gradient_checkpointing_kwargs", '{"a": 1}'),
             "--activation_checkpointing_kwargs: Unexpected keyword arguments: a"),
        Case("settings that are not JSON", flags("--lr_scheduler_kwargs", "{a"),
             "--lr_scheduler_kwargs: found {a, which is not a JSON object: Expecting property name"),
        Case("the best checkpoint, without an evaluation that says which it is",
             flags("--save_strategy", "best", "--metric_for_best_model", "loss"),
             "--save_strategy: found best; allowed: best with --metric_for_best_model and --eval_strategy"),
        Case("a metric that no evaluation has", flags("--metric_for_best_model", "f1"),
             "best_model: found f1; allowed: loss, gen_len, exact_match, rouge1, rougeL, and METRIC", by="run"),
        Case("a checkpoint that does not exist", flags("--resume_from_checkpoint", "checkpoint-9"),
             "--resume_from_checkpoint: checkpoint-9 is not a complete checkpoint", by="run", needs_model=True),
        Case("a checkpoint of more steps", resumed("--max_steps", "1"), "is of step 2; allowed: at most 1",
             by="run", needs_model=True),
        Case("a checkpoint of a different run", resumed("--lora_dim", "4"), "a checkpoint of a different run (base_mod",
             by="run", needs_model=True),
        Case("checkpoints that validation cannot choose from", flags("--load_best_model_at_end"),
             "command line: --load_best_model_at_end requires"),
        Case("an invalid expression", flags("--lora_modules", "("), "--lora_modules: '(' is not a regular expres",
             needs_model=True),
        Case("an expression that matches nothing", flags("--lora_modules", ".*nothing"), "matches no module; linear",
             needs_model=True),
        Case("an expression that matches no linear layer", flags("--optim_target_modules", ".*layer_norm"),
             "allowed: only linear layers", needs_model=True),
        Case("an expression that matches no factor", flags("--proj_lora_modules", ".*lora_Z"), "matches no factor",
             needs_model=True),
        Case("a LoRA above the rank of its weight", flags("--lora_dim", "999"), "--lora_dim: found 999; allowed: at",
             needs_model=True),
        Case("a projection above the rank of its weight", flags("--galore_rank", "999"),
             "--galore_rank: found 999; allowed: at most", needs_model=True),
        Case("prompts too long even without their sentence", flags("--max_source_length", "5"),
             "the prompt without its sentence needs", needs_model=True),
        Case("prompts that leave too little room for a long sentence", lambda place: (
            flags("--max_source_length", "40")(place), row(sentence="many words " * 50, label="Alpha")(place)),
            "leaves 8 tokens for the sentence, beside the rest of the prompt; allowed: at least 16", needs_model=True),
    ],
    "DeepSpeed": [
        Case("the file is missing", flags("--deepspeed", "none.json"), "none.json: no such file"),
        Case("no launcher", flags("--deepspeed", str(ROOT / "configs" / "ds_configs" / "stage2.config")),
             "stage2.config without a launcher; allowed: with NPROC= or DS_CONFIG= in front of a script", by="run"),
        Case("not JSON", deepspeed("{"), "ds.json, line 1, column 2: not JSON"),
        Case("not an object", deepspeed([]), "ds.json: found empty array; allowed: a DeepSpeed config, an object"),
        Case("a section `optimizer`", deepspeed({"optimizer": {}}), "found a section 'optimizer'"),
        Case("a section `scheduler`", deepspeed({"scheduler": {}}), "found a section 'scheduler'"),
        Case("another precision than the command line", deepspeed({"fp16": {"enabled": True}}, "--bf16"),
             "ds.json, key bf16.enabled: found false against --bf16 on the command line"),
        Case("a precision that is not an object", deepspeed({"bf16": True}), "ds.json, key bf16.enabled: found null"),
        Case("a misspelt section", deepspeed({"zero_optimisation": {"stage": 2}}),
             "ds.json: unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        Case("stage 4", deepspeed({"zero_optimization": {"stage": 4}}), "stage: found 4; allowed: 0, 1, 2, 3"),
        Case("offload with DeepSpeed's own optimizer",
             deepspeed({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
             "key zero_force_ds_cpu_optimizer: found true with offload_optimizer; allowed: false"),
        Case("a file that would clip at another norm",
             deepspeed({"zero_optimization": {"stage": 2}}, "--max_grad_norm", "0.1"),
             'found no key gradient_clipping, beside --max_grad_norm 0.1; allowed: "auto"'),
        Case("a stage that is a string", deepspeed({"zero_optimization": {"stage": "2"}}), 'found "2"; allowed: 0, 1'),
        Case("another accumulation than the command line", deepspeed({"gradient_accumulation_steps": 7}),
             "key gradient_accumulation_steps: found 7 against 1 on the command line"),
        Case("a fixed batch of all processes", deepspeed({"train_batch_size": 64}),
             'key train_batch_size: found 64; allowed: "auto", as the flags and the number of processes decide it'),
        Case("16-bit evaluation without 16-bit training", deepspeed(
            {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}, "--bf16_full_eval"),
             "ds.json; allowed: only with --bf16, as training would use 16 bits too"),
        Case("a penalty at stage 3", deepspeed({"zero_optimization": {"stage": 3}}, "--lamda_3", "0.1"),
             "--lamda_3: found 0.1; allowed: only 0 at ZeRO stage 3"),
        Case("a method that does not run under DeepSpeed",
             deepspeed({"zero_optimization": {"stage": 2}}, "--method", "galore"), "method galore: found --deepspeed"),
        Case("`osf` under DeepSpeed", deepspeed({"zero_optimization": {"stage": 2}}, "--method", "osf"),
             "--method osf: found --deepspeed"),
        Case("`multitask` under DeepSpeed", deepspeed({"zero_optimization": {"stage": 2}}, "--method", "multitask"),
             "--method multitask: found --deepspeed"),
        Case("a method that does not run at stage 3",
             deepspeed({"zero_optimization": {"stage": 3}}, "--method", "seqlora"),
             "--method seqlora: found ZeRO stage 3"),
        Case("the released preset under DeepSpeed",
             deepspeed({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}, "--preset", "released"),
             "--deepspeed: found ... ds.json; allowed: None with --preset released"),
        Case("a sketch without DeepSpeed", flags("--galore_svd", "sketch"), "--galore_svd: found sketch without"),
        Case("dense gradients under DeepSpeed",
             deepspeed({"zero_optimization": {"stage": 2}}, "--galore_engine", "dense"),
             "--galore_engine: found dense"),
        Case("cores with a method that has none", flags("--galore_engine", "cores", "--method", "galore"),
             "--galore_engine: found cores; allowed: auto or dense with --method galore", needs_model=True),
        Case("fp16 at stage 0", deepspeed({"zero_optimization": {"stage": 0}, "fp16": {"enabled": True}}, "--fp16"),
             "key zero_optimization.stage: found 0 with --fp16", by="run"),
        Case("S removed from the first moment under DeepSpeed",
             deepspeed({"zero_optimization": {"stage": 2}}, "--protect", "gp_second"),
             "--protect: found gp_second with DeepSpeed; allowed: only in one process"),
    ],
    "Model folder": [
        Case("the folder does not exist", flags("--model_name_or_path", "initial_model/none"),
             "initial_model/none does not exist",
             needs_model=True),
        Case("no `config.json`", lambda place: (place.model / "config.json").unlink(), "model has no config.json",
             needs_model=True),
        Case("`config.json` is not JSON", lambda place: put(place.model / "config.json", "{"),
             "model: the config cannot be loaded",
             needs_model=True),
        Case("an architecture that is not supported", lambda place: put(
            place.model / "config.json", BertConfig().to_json_string()),
             "found model_type 'bert'; allowed: decoder-only", needs_model=True),
        Case("a vision-language model", lambda place: put(
            place.model / "config.json", Gemma3Config().to_json_string()), "'gemma3', a vision-language model; allowed",
            needs_model=True),
        Case("a decoder-only model where a script is for encoder-decoders, or the reverse",
             flags("--family", "decoder-only"), "and this command is for decoder-only models; use scripts/",
             needs_model=True),
        Case("weights in 4 or 8 bits", config(quantization_config={"quant_method": "bitsandbytes"}),
             "found weights quantised by bitsandbytes; allowed: weights in 16 or 32 bits", needs_model=True),
        Case("a smaller vocabulary than the tokenizer's", config(vocab_size=100),
             "config.json says vocab_size 100, so they belong to different models", needs_model=True),
        Case("a model that comes with its own code", config(model_type="own", auto_map={"AutoConfig": "code.Config"}),
             "found model_type 'own'; allowed: the types of this Transformers version (the code that comes with the "
             "model is not run)", needs_model=True),
        Case("attention kernels from the hub", config(_attn_implementation="someone/kernel"),
             "config.json: found attention code from 'someone/kernel'", needs_model=True),
        Case("no weights", lambda place: (place.model / "model.safetensors").unlink(), "holds no weights",
             needs_model=True),
        Case("a pickle", pickled("pytorch_model.bin"), "pytorch_model.bin: a pickle, which is not loaded",
             needs_model=True),
        Case("a pickle under the name of safetensors", pickled("model.safetensors"), "the model cannot be loaded",
             needs_model=True),
        Case("an index that leads to a pickle", pieces("pytorch_model.bin"),
             "found 'pytorch_model.bin'; allowed: a safetensors", needs_model=True),
        Case("an index that leaves the folder", pieces("../model.safetensors"), "found '../model.safetensors'",
             needs_model=True),
        Case("an index to a file that is not there", pieces("model-2.safetensors"), "there is no model-2.safetensors",
             needs_model=True),
        Case("truncated weights", cut("model", "model.safetensors", 10_000), "model: the model cannot be loaded",
             needs_model=True),
        Case("a weight is missing", tensors("model", "model", lambda content: content.pop(f"{FULL}.weight")),
             f"1 weights are missing from the checkpoint, such as {FULL}.weight", needs_model=True),
        Case("a weight of another shape", tensors("model", "model", lambda content: content.update(
            {f"{FULL}.weight": torch.zeros(3, 5)})), f"{FULL}.weight is (3, 5); (128, 128) is needed",
            needs_model=True),
        Case("a damaged tokenizer", cut("model", "tokenizer.json"), "model: the tokenizer cannot be loaded",
             needs_model=True),
    ],
    "Adapter folder": [
        Case("no `adapter_config.json`", lambda place: (place.adapter / "adapter_config.json").unlink(),
             "t5_adapter has no adapter_config.json", needs_model=True),
        Case("`adapter_config.json` is not JSON", lambda place: put(place.adapter / "adapter_config.json", "{"),
             "adapter_config.json, line 1, column 2: not JSON", needs_model=True),
        Case("its base model is missing", adapter_config(base_model_name_or_path="initial_model/gone"),
             "base_model_name_or_path is initial_model/gone, where there is no model", needs_model=True),
        Case("its base model is an adapter", base_is_an_adapter, "itself an adapter; allowed: a base model",
             needs_model=True),
        Case("its base model has another shape", narrow_base, "the base model's is (128, 64)", needs_model=True),
        Case("another kind of adapter", adapter_config(peft_type="IA3"), "found peft_type IA3; allowed: LORA",
             needs_model=True),
        Case("a kind of LoRA that is not supported", adapter_config(use_dora=True), "use_dora: found True",
             needs_model=True),
        Case("a module to import", adapter_config(megatron_config={"a": 1}, megatron_core="code"), "megatron_config",
             needs_model=True),
        Case("another rank than its tensors", adapter_config(r_sum=4), "(8, 128), (4, 128) is needed",
             needs_model=True),
        Case("a rank that is not a number", adapter_config(r_sum="8"), "r_sum: found '8'; allowed: a number of at",
             needs_model=True),
        Case("a tensor is missing", tensors("adapter", "adapter_model", lambda content: content.pop(KEY)),
             f"{KEY} is missing, (8, 128) is needed", needs_model=True),
        Case("an extra tensor", tensors("adapter", "adapter_model", lambda content: content.update(
            {"stray.weight": torch.zeros(2)})), "found stray.weight, which the model does not have",
            needs_model=True),
        Case("a tensor of integers", tensors("adapter", "adapter_model", lambda content: content.update(
            {KEY: content[KEY].to(torch.int32)})), f"{KEY} holds torch.int32; floating-point values are needed",
            needs_model=True),
        Case("a tensor that is not finite", tensors("adapter", "adapter_model", lambda content: content[KEY].fill_(
            torch.nan)), f"{KEY} holds values that are not finite", needs_model=True),
        Case("a pickle", adapter_as_pickle, "adapter_model.bin: a pickle, which is not loaded", needs_model=True),
        Case("truncated factors", cut("adapter", "adapter_model.safetensors"), "not a readable safetensors file",
             needs_model=True),
        Case("truncated full-rank weights", cut("adapter", "full_rank_weights.safetensors"),
             "not a readable safetensors file", needs_model=True),
        Case("a full-rank weight that the model lacks", tensors("adapter", "full_rank_weights", lambda content:
             content.update({"stray.weight": torch.zeros(2, 2)})), "holds stray.weight; the base model has no linear",
             needs_model=True),
        Case("a full-rank weight of integers", tensors("adapter", "full_rank_weights", lambda content: content.update(
            {f"{FULL}.weight": torch.zeros(128, 128, dtype=torch.int8)})), f"{FULL}.weight holds torch.int8",
            needs_model=True),
        Case("a truncated space", cut("adapter", "gradient_space.safetensors"), "not a readable safetensors file",
             needs_model=True),
        Case("a space that is not a basis", tensors("adapter", "gradient_space", lambda content: content[
            first(content)].mul_(2)), "from orthonormal; allowed: at most 1e-3", needs_model=True),
        Case("a space of another weight", tensors("adapter", "gradient_space", lambda content: content.update(
            {FULL: torch.eye(7, 2)})), f"{FULL}: shape (7, 2); allowed: (128, c)", needs_model=True),
        Case("a space of the other side",
             lambda place: (place.adapter, place.flags.extend(["--protect_side", "input"])),
             "--protect_side: found input;", needs_model=True),
    ],
}  # fmt: skip
ALL = [pytest.param(case, id=f"{area}: {case.what}") for area, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The adapter folder that one task leaves."""
    import run_uie_lora

    folder = tmp_path_factory.mktemp("made")
    place = Place(folder, folder)
    place.flags = ["--save_steps", "1"]
    assert run_uie_lora.main(place.run()) == 0
    return place.results / "t5_adapter"


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Place:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Place(tmp_path, made)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file that a user would look for, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path: path.read_bytes() for path in files}


def errors_of(main: Callable, command: list[str], capfd) -> list[str]:
    """The lines `error: ...` of a command that ends with exit code 2."""
    assert main(command) == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return [line for line in captured.err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("case", ALL)
def test_bad_input_is_one_line_and_costs_nothing(case, place, capfd, monkeypatch):
    import check
    import run_uie_lora

    load_model, loads = run_uie_lora.load_model, []
    monkeypatch.setattr(run_uie_lora, "load_model", lambda *args, **how: loads.append(1) or load_model(*args, **how))
    case.damage(place)
    before = contents(place.folder)
    said = []
    if case.by != "run":
        said.append(errors_of(check.main, [str(place.order), *place.command()], capfd))
    if case.by != "check":
        file = place.folder / "flags.json"
        command = [str(file)] if file.exists() else place.run()
        said.append(errors_of(run_uie_lora.main, command, capfd))
        assert case.needs_model or not loads
    assert contents(place.folder) == before
    assert all(lines == said[0] for lines in said), said
    [line] = said[0]
    assert all(part in line for part in case.says.split(" ... ")) and line.isprintable() and len(line) < 2100


# Text that looks odd and is none the less good


GOOD = {
    "a NUL": "one\0two",
    "control characters": "bell\x07 escape\x1b[31m delete\x7f",
    "right to left": "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u202eabc",
    "characters outside the basic plane": "\U0001f600 \U00020000",
    "combining marks": "e\u0301" * 50,
    "special tokens spelt out": "</s> <pad> <extra_id_0> Answer: Beta",
    "one letter": "x",
    "a line of a megabyte": "word " * 200_000,
    "a word of a megabyte": "x" * 1_000_000,
}


@pytest.mark.parametrize("what", GOOD)
def test_odd_text_is_good_input(what, place, capfd):
    import check

    row(sentence=GOOD[what], label="Beta")(place)
    assert check.main([str(place.order), *place.command()]) == 0
    assert capfd.readouterr().out == f"[gorp] {place.order}: valid, 2 tasks, 14 examples\n"


def test_adapter_of_another_precision_is_good_input(place, capfd):
    import check

    tensors("adapter", "adapter_model", lambda content: content.update(
        {name: tensor.half() for name, tensor in content.items()}))(place)  # fmt: skip
    assert check.main([str(place.order), *place.command()]) == 0


# The check as a command


def test_all_orders_are_checked_and_each_bad_one_is_said(place, capfd, monkeypatch):
    import check

    monkeypatch.chdir(place.folder)
    shutil.copytree(place.order, "configs/one_configs")
    shutil.copytree(place.order, "configs/two_configs")
    (place.folder / "configs/ds_configs").mkdir()
    flags = ["--data_dir", "benchmark", "--instruction_file", "instructions.json"]
    assert check.main(flags) == 0
    assert [line.split(":")[0] for line in capfd.readouterr().out.splitlines()] == [
        "[gorp] configs/one_configs", "[gorp] configs/two_configs"]  # fmt: skip
    (place.folder / "configs/one_configs/amazon/test_tasks.json").unlink()
    assert check.main(flags) == 2
    captured = capfd.readouterr()
    assert captured.out == "[gorp] configs/two_configs: valid, 2 tasks, 18 examples\n"
    assert captured.err.startswith("error: configs/one_configs/amazon/test_tasks.json: no such file")


def test_the_check_reads_no_weights(place, capfd, monkeypatch):
    import check

    load_model, loaded = check.load_model, []
    monkeypatch.setattr(check, "load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[0])
    assert check.main([str(place.order), *place.command()]) == 0
    assert all(parameter.is_meta for parameter in loaded[0].model.parameters())


# The list in the docs


def documentation() -> str:
    lines = [
        "# Bad input",
        "",
        "This page lists what is rejected, with part of the one-line error. Each case ends the run with exit code 2",
        "and leaves earlier results untouched. `python src/check.py` finds all of them in seconds, except those marked",
        "*, which are found when their task begins. The page is generated from the table in `tests/test_bad_input.py`,",
        "which tests every case.",
    ]
    for area, cases in CASES.items():
        lines += ["", f"## {area}", "", "| input | the error contains |", "|---|---|"]
        for case in cases:
            says = case.says.replace("|", "\\|")
            mark = " *" if case.by == "run" else ""
            lines.append(f"| {case.what}{mark} | `` {says} `` |")
    lines += ["", "## Odd but valid", "", "An adapter in another floating-point type, and sentences with:"]
    lines += ["", *(f"* {what}" for what in GOOD)]
    return "\n".join(lines) + "\n"


def test_the_docs_list_the_table():
    assert DOCS.read_text(encoding="utf-8") == documentation()
    assert sum(map(len, CASES.values())) >= 40


if __name__ == "__main__":
    sys.stdout.write(documentation())
