"""What several test files share; the fixtures among it are in conftest.py.

The project's own modules are imported where they are needed: test_bad_input.py also runs where they are not on the
path, to write docs/BAD_INPUT.md.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSeq2SeqLM, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, T5Tokenizer

ROOT = Path(__file__).resolve().parent.parent
REAL_BENCHMARK = ROOT.parent / "shared" / "cl_benchmark_small"

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; benchmarks/gpu.sh is for a GPU
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "VIRTUAL_ENV": sys.prefix,
}


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def edit(path: Path, change: Callable) -> None:
    """Replace a JSON file's value by what `change` makes of it."""
    put(path, change(json.loads(path.read_text(encoding="utf-8"))))


def renew_loranew(model) -> None:
    """Give every LoRA layer a fresh pair after folding, as the next task gets one from its folder."""
    from loranew import loranew_layers

    for layer in loranew_layers(model).values():
        layer.renew(model.active_adapter)


class HostReads(TorchDispatchMode):
    """Counts the values that the host reads from tensors, for each of which it would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


# Runs of the entry on the embedded models

T5 = ROOT / "initial_model" / "tiny-t5"
LLAMA = ROOT / "initial_model" / "tiny-llama"
T5_MODULES = [
    "--lora_modules", ".*SelfAttention.(q|v).*",
    "--optim_target_modules", ".*EncDecAttention.(q|v).*",
    "--proj_lora_modules", ".*SelfAttention.(q|v).loranew_A.*",
]
LLAMA_MODULES = [
    "--lora_modules", ".*self_attn.(q_proj|v_proj).*",
    "--optim_target_modules", ".*mlp.gate_proj.*",
    "--proj_lora_modules", ".*self_attn.(q_proj|v_proj).loranew_A.*",
]
PREFIX = {"t5_adapter": (T5, T5_MODULES), "llama_adapter": (LLAMA, LLAMA_MODULES)}


def arguments(benchmark: Path, output: Path, dataset: str, model: Path, modules: list[str], *extra: str) -> list[str]:
    return [
        "--model_name_or_path", str(model),
        "--data_dir", str(benchmark),
        "--task_config_dir", str(ROOT / "configs" / "order1_configs" / dataset),
        "--instruction_file", str(ROOT / "configs" / "instruction_config.json"),
        "--output_dir", str(output),
        "--add_task_name", "True", "--add_dataset_name", "True",
        "--do_train", "--do_predict", "--predict_with_generate",
        "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "32",
        "--max_steps", "12", "--logging_steps", "4",
        "--learning_rate", "1e-2", "--galore_lr", "1e-2", "--lamda_1", "0.01",
        "--lr_scheduler_type", "constant", "--galore_update_proj_gap", "4", "--space_energy", "0.5",
        "--max_predict_samples", "12", "--report_to", "none", "--use_cpu", "--save_strategy", "no",
        *modules, *extra,
    ]  # fmt: skip


def predictions(folder: Path) -> list[dict]:
    lines = (folder / "predict_eval_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


# A method's life on the embedded T5, without the entry

ADAM = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def method_of(name: str, *extra: str, folder: Path, modules: list[str] = T5_MODULES):
    """An instance of a method with the options of a command line, without dropout."""
    from command_line import parse_arguments
    from methods import find_method

    flags = ["--method", name, "--lora_dropout", "0", *extra]
    command = arguments(folder, folder / "out", "dbpedia", T5, modules, *flags)
    return find_method(name)(parse_arguments(command)[2])


def tiny_t5():
    return AutoModelForSeq2SeqLM.from_pretrained(T5, dtype=torch.float32)


def batches(task: int = 0) -> list[dict[str, torch.Tensor]]:
    """Three batches of a made-up task."""
    generator = torch.Generator().manual_seed(task)
    tokens = [torch.randint(5, 200, (2, 8), generator=generator) for _ in range(3)]
    labels = [ids[:, :3].clone() for ids in tokens]
    for each in labels:
        each[0, 1:] = -100  # the first answer is one token, the second three
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": each}
            for ids, each in zip(tokens, labels)]


def begin(method, previous: Path | None, task: int = 0):
    model = method.prepare(tiny_t5(), previous, decoder_only=False)
    method.begin_task(model, iter(batches(task)))
    return model.train()


def fit(method, model, task: int = 0, steps: int = 3) -> None:
    optimizer = method.create_optimizer(**ADAM)
    method.begin_training(None)
    for step in range(steps):
        method.begin_micro_batch(True)
        loss, penalty = model(**batches(task)[step % 3]).loss, method.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()


def finish(method, model, folder: Path, task: int = 0) -> Path:
    method.revisit(model, iter(batches(task)))
    method.end_task()
    folder.mkdir()
    method.save(folder)
    return folder


def train(method, previous: Path | None, folder: Path, task: int = 0, steps: int = 3) -> Path:
    """One task of a method's life without the entry; the folder that it saves."""
    model = begin(method, previous, task)
    fit(method, model, task, steps)
    return finish(method, model, folder, task)


# The scripts, in a checkout of their own whose entry is a stand-in

VARIABLES = ("MODEL", "DATA_DIR", "METHOD", "NPROC", "DS_CONFIG", "SEED", "OUTPUT", "EXTRA", "SAVE_STEPS",
             "DRY_RUN", "GORP_ENV", "VIRTUAL_ENV", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE")
ENTRY = """
import json, os, pathlib, sys
order = pathlib.Path(sys.argv[1])
outputs = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
print("a library's line", file=sys.stderr)
print("[gorp] began", *sys.argv)
for number, dataset in enumerate(("dbpedia", "amazon", "yahoo", "agnews"), 1):
    if dataset == os.environ.get("FAIL_AT"):
        print("error: --flag: bad")
        sys.exit(int(os.environ["FAIL_WITH"]))
    folder = outputs / f"{number}-{dataset}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "completed.json").touch()
(outputs / "command.json").write_text(json.dumps(sys.argv))
"""


def bash(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run bash without a GPU, with this interpreter's environment first on PATH and, of the scripts' variables, only
    `variables`.
    """
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(["bash", *command], cwd=cwd, env=environment | variables, capture_output=True, text=True)


def order_1(checkout: Path, **variables: str) -> subprocess.CompletedProcess:
    return bash("scripts/order_1.sh", "--tiny", cwd=checkout, **variables)


# Benchmarks of a few rows, and each dataset's exact prompt

INSTRUCTIONS = {
    "SC": "How does the writer feel? Choose one option.\n",
    "TC": "What is the text about? Choose one option.\n",
    "NLI": "How are the two sentences related? Choose one option.\n",
    "QQP": "Do both questions mean the same? Choose one option.\n",
    "WiC": "Has the word one meaning in both sentences? Choose one option.\n",
    "MultiRC": "Does the answer fit the paragraph and the question? Choose one option.\n",
    "BoolQA": "Does the passage say yes? Choose one option.\n",
}
STARS = ["very negative", "negative", "neutral", "positive", "very positive"]

# (task, dataset): labels, sentence, label, and the whole prompt with both names in front.
GOLDEN = {
    ("SC", "yelp"): (
        STARS,
        "Text: The soup was cold.\\nThe waiter {smiled} anyway.\n",
        "negative",
        "Task:SC\nDataset:yelp\nHow does the writer feel? Choose one option.\n"
        "Option: very negative, negative, neutral, positive, very positive \n"
        "Text: The soup was cold.\\nThe waiter {smiled} anyway.\n\nAnswer:",
    ),
    ("SC", "amazon"): (
        STARS,
        "Title: Good lamp\nText: It lights my desk and {0} never flickers.\n",
        "very positive",
        "Task:SC\nDataset:amazon\nHow does the writer feel? Choose one option.\n"
        "Option: very negative, negative, neutral, positive, very positive \n"
        "Title: Good lamp\nText: It lights my desk and {0} never flickers.\n\nAnswer:",
    ),
    ("SC", "IMDB"): (
        ["Good", "Bad"],
        "Two hours of fog.<br /><br />Then the credits.",
        "Bad",
        "Task:SC\nDataset:IMDB\nHow does the writer feel? Choose one option.\nOption: Good, Bad \n"
        "Two hours of fog.<br /><br />Then the credits.\nAnswer:",
    ),
    ("SC", "SST-2"): (
        ["Good", "Bad"],
        "Text: a warm and clever film ",
        "Good",
        "Task:SC\nDataset:SST-2\nHow does the writer feel? Choose one option.\nOption: Good, Bad \n"
        "Text: a warm and clever film \nAnswer:",
    ),
    ("TC", "dbpedia"): (
        ("Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, Building, "
         "Natural Place, Village, Animal, Plant, Album, Film, Written Work").split(", "),
        "Title: MV Tern\nText: The MV Tern is a ferry that serves two small islands.\n",
        "Mean of Transportation",
        "Task:TC\nDataset:dbpedia\nWhat is the text about? Choose one option.\n"
        "Option: Company, Educational Institution, Artist, Athlete, Office Holder, Mean of Transportation, "
        "Building, Natural Place, Village, Animal, Plant, Album, Film, Written Work \n"
        "Title: MV Tern\nText: The MV Tern is a ferry that serves two small islands.\n\nAnswer:",
    ),
    ("TC", "agnews"): (
        ["World", "Sports", "Business", "Science or Technology"],
        "Title: Comet seen\nText: A new comet was found by two students.\n",
        "Science or Technology",
        "Task:TC\nDataset:agnews\nWhat is the text about? Choose one option.\n"
        "Option: World, Sports, Business, Science or Technology \n"
        "Title: Comet seen\nText: A new comet was found by two students.\n\nAnswer:",
    ),
    ("TC", "yahoo"): (
        ("Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & Internet, Sports, "
         "Business & Finance, Entertainment & Music, Family & Relationships, Politics & Government").split(", "),
        "Title: Cold\nQuestion: How long does a cold last?\nAnswer: About a week.\n",
        "Health",
        "Task:TC\nDataset:yahoo\nWhat is the text about? Choose one option.\n"
        "Option: Society & Culture, Science & Mathematics, Health, Education & Reference, Computers & Internet, "
        "Sports, Business & Finance, Entertainment & Music, Family & Relationships, Politics & Government \n"
        "Title: Cold\nQuestion: How long does a cold last?\nAnswer: About a week.\n\nAnswer:",
    ),
    ("NLI", "MNLI"): (
        ["neutral", "entailment", "contradiction"],
        "sentence 1: The dog sleeps on the mat.\nsentence 2: The dog is awake.",
        "contradiction",
        "Task:NLI\nDataset:MNLI\nHow are the two sentences related? Choose one option.\n"
        "Option: neutral, entailment, contradiction \n"
        "sentence 1: The dog sleeps on the mat.\nsentence 2: The dog is awake.\nAnswer:",
    ),
    ("NLI", "CB"): (
        ["entailment", "contradiction", "neutral"],
        "sentence 1: I think she left. Did she?\nsentence 2: she left",
        "neutral",
        "Task:NLI\nDataset:CB\nHow are the two sentences related? Choose one option.\n"
        "Option: entailment, contradiction, neutral \n"
        "sentence 1: I think she left. Did she?\nsentence 2: she left\nAnswer:",
    ),
    ("NLI", "RTE"): (
        ["contradiction", "entailment"],
        "sentence 1: Oslo is the capital of Norway.\nsentence 2: Norway has a capital.",
        "entailment",
        "Task:NLI\nDataset:RTE\nHow are the two sentences related? Choose one option.\n"
        "Option: contradiction, entailment \n"
        "sentence 1: Oslo is the capital of Norway.\nsentence 2: Norway has a capital.\nAnswer:",
    ),
    ("QQP", "QQP"): (
        ["False", "True"],
        "first sentence: How do I boil rice?\nsecond sentence: How is rice boiled?",
        "True",
        "Task:QQP\nDataset:QQP\nDo both questions mean the same? Choose one option.\nOption: False, True \n"
        "first sentence: How do I boil rice?\nsecond sentence: How is rice boiled?\nAnswer:",
    ),
    ("BoolQA", "BoolQA"): (
        ["True", "False"],
        "question: is salt a mineral\npassage: Salt -- Salt is a mineral made of two elements.",
        "True",
        "Task:BoolQA\nDataset:BoolQA\nDoes the passage say yes? Choose one option.\nOption: True, False \n"
        "question: is salt a mineral\npassage: Salt -- Salt is a mineral made of two elements.\nAnswer:",
    ),
    ("MultiRC", "MultiRC"): (
        ["False", "True"],
        "paragraph: Ada had two cats. One of them was old.\nquestion: How many cats?\ncandidate answer: three",
        "False",
        "Task:MultiRC\nDataset:MultiRC\nDoes the answer fit the paragraph and the question? Choose one option.\n"
        "Option: False, True \n"
        "paragraph: Ada had two cats. One of them was old.\nquestion: How many cats?\ncandidate answer: three\nAnswer:",
    ),
    ("COPA", "COPA"): (
        ["A", "B"],
        'What caused "The cup fell."? Pick A or B.\nA: The table shook.\nB: The tea was hot.',
        "A",
        "Task:COPA\nDataset:COPA\n"
        'What caused "The cup fell."? Pick A or B.\nA: The table shook.\nB: The tea was hot.\nAnswer:',
    ),
    ("WiC", "WiC"): (
        ["True", "False"],
        "word: bank\nWe sat on the bank of the river.\nThe bank lent us money.",
        "False",
        "Task:WiC\nDataset:WiC\nHas the word one meaning in both sentences? Choose one option.\n"
        "Option: True, False \n"
        "word: bank\nWe sat on the bank of the river.\nThe bank lent us money.\nAnswer:",
    ),
}


class Benchmark:
    """A benchmark of one dataset or more in a temporary folder, with a step's configs and instructions."""

    def __init__(self, folder):
        from order_config import TASKS

        self.folder = folder
        self.data, self.configs, self.instructions = folder / "data", folder / "step", folder / "instructions.json"
        self.listed = {subset: {task: [] for task in TASKS} for subset in ("train", "dev", "test")}
        self.instruct({task: [("zero-shot", text)] for task, text in INSTRUCTIONS.items()})
        self.configure()

    def add(self, task, dataset, labels, rows, *, subsets=("train", "dev", "test"), **entry):
        put(self.data / task / dataset / "labels.json", labels)
        for subset in ("train", "dev", "test"):
            put(self.data / task / dataset / f"{subset}.json", rows)
        for subset in subsets:
            self.listed[subset][task].append({"dataset name": dataset, **entry})
        self.configure()
        return self.data / task / dataset

    def configure(self):
        for subset, listed in self.listed.items():
            put(self.configs / f"{subset}_tasks.json", listed)

    def instruct(self, texts):
        entries = {
            task: [{"instruction_type": kind, "instruction": text} for kind, text in pairs]
            for task, pairs in texts.items()
        }
        put(self.instructions, entries)

    def load(self, **options):
        from uie_dataset_lora import ExampleOptions, load_uie_dataset

        return load_uie_dataset(self.configs, ExampleOptions(self.data, self.instructions, **options))


# Tokenizers, one of each kind that a model may bring

IGNORED = -100
CORPUS = [f"{prompt} {label}" for _, _, label, prompt in GOLDEN.values()] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>"]


def _trained(model, trainer, pre_tokenizer=None):
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _llama_model():
    """Vocabulary and merges in the manner of sentencepiece BPE: words begin with ▁, unknown characters are bytes."""
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=LLAMA_SPECIALS + BYTES, show_progress=False)
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained = _trained(models.BPE(byte_fallback=True, unk_token="<unk>"), trainer, metaspace)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def t5():
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False)
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    vocabulary = json.loads(_trained(models.Unigram(), trainer, words).to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(piece) for piece in vocabulary], extra_ids=0)


def byt5():
    """A slow tokenizer (plain Python, one id a byte), which keeps every character."""
    return ByT5Tokenizer()


def llama():
    vocabulary, merges = _llama_model()
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def llama_of_the_hub():
    """As LLaMA-2's tokenizer.json has it: the prefix space comes from a normaliser, also before a space."""
    vocabulary, merges = _llama_model()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _byte_level(*, by_words, **specials):
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", **specials)


def gpt2():
    """Byte-level BPE whose BOS is its EOS and is never added."""
    return _byte_level(by_words=True, bos_token="<|endoftext|>")


def merging():
    """Byte-level BPE without a word rule: the cue, the space and the answer may become one token."""
    return _byte_level(by_words=False)


ENCODER_DECODERS = [t5, byt5]
DECODERS = [llama, llama_of_the_hub, gpt2, merging, byt5]


# Examples and batches

def example(sentence, label="very negative", *, subset="train", head="Choose one.\nOption: a, b \n"):
    instance = {"id": "7", "sentence": sentence, "label": label, "ground_truth": label, "instruction": head}
    return {"Task": "SC", "Dataset": "mine", "subset": subset, "Samples": [], "Instance": instance}


def collator(tokenizer, decoder_only, **changes):
    from uie_collator import DataCollatorForUIE

    options = {"max_source_length": 2048, "max_target_length": 200, "add_task_name": True, "add_dataset_name": True}
    return DataCollatorForUIE(tokenizer, decoder_only=decoder_only, **{**options, **changes})


def kept(values, mask):
    return values[mask.bool()].tolist()


def text(tokenizer, ids):
    return tokenizer.decode([one for one in ids if one not in tokenizer.all_special_ids])
