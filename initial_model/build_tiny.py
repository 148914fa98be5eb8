"""Build the repository's tiny models, tiny-t5/ and tiny-llama/, from scratch: tokenizer, weights, pretraining.

    python initial_model/build_tiny.py [t5] [llama] [--steps 2600] [--seed 1]

They have in miniature what a large pretrained model brings to the benchmark: they have read text about the mini
benchmark's subjects, and can read a prompt with options and answer with one of them. The exercises use the mini
benchmark's makers with other random numbers, none of its examples, other dataset names, and never a real label as the
name of its class. Instead, an option names a class by words that belong to it ("jazz singer" for Artist), so that the
meaning of a label is left for fine-tuning. Real labels occur only as strings to be copied.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE.parent / "data")]

import mini_benchmark as mini  # noqa: E402
from files import read_json  # noqa: E402

PIECES = 1800
SENTINELS = 8
BATCH = 32
PEAK_RATE = 1e-3
EMBEDDING_RATES = {"t5": 3, "llama": 1}  # T5's embeddings are initialised fifty times as large as LLaMA's
COPYING_STEPS = 400  # at twice PEAK_RATE, T5 does not learn to copy within them
PROMPT_WEIGHT = 0.2  # of the loss on the prompt, relative to that on the answer, for the decoder-only model

# What an option may say in place of a class's label: words that belong to the class.
STAND_INS = {
    "dbpedia": {label: entity["kinds"][:3] for label, entity in mini.LEXICON["entities"].items()},
    "agnews": {label: topic["nouns"][:3] for label, topic in mini.LEXICON["news"].items()},
    "yahoo": {label: topic["nouns"][:3] for label, topic in mini.LEXICON["questions"].items()},
    **dict.fromkeys(
        ["yelp", "amazon"], {label: level["words"][:3] for label, level in mini.LEXICON["opinions"].items()}
    ),
    **dict.fromkeys(["IMDB", "SST-2"], {
        "Good": [word for level in mini.LEVELS[3:] for word in mini.LEXICON["opinions"][level]["words"][:3]],
        "Bad": [word for level in mini.LEVELS[:2] for word in mini.LEXICON["opinions"][level]["words"][:3]],
    }),
    **dict.fromkeys(["MNLI", "CB"], {"entailment": ["follows", "certain"], "contradiction": ["denied", "wrong"],
                                     "neutral": ["unknown", "open"]}),
    "RTE": {"entailment": ["follows", "certain"], "contradiction": ["denied", "wrong"]},
    **dict.fromkeys(["QQP", "BoolQA", "MultiRC", "WiC"], {"True": ["yes", "same"], "False": ["no", "different"]}),
}
RELATED = {
    "dbpedia": {label: entity["kinds"] + entity["facts"] for label, entity in mini.LEXICON["entities"].items()},
    "agnews": {label: topic["nouns"] + topic["events"] for label, topic in mini.LEXICON["news"].items()},
    "yahoo": {label: topic["nouns"] + topic["deeds"] for label, topic in mini.LEXICON["questions"].items()},
    "amazon": {label: level["words"] + level["verdicts"] for label, level in mini.LEXICON["opinions"].items()},
}
DATASET_NAMES = ["notes", "archive", "clippings"]


def prompt_of(task: str, dataset: str, instruction: str, options: list[str], sentence: str) -> str:
    """The benchmark's prompt (task and dataset name, instruction, options, sentence)."""
    return f"Task:{task}\nDataset:{dataset}\n{instruction}Option: {', '.join(options)} \n{sentence}\nAnswer:"


class Exercises:
    """An endless, seeded source of (prompt, answer) pairs, without any example of the mini benchmark."""

    def __init__(self, seed: int):
        self.rng = random.Random(f"pretraining {seed}")
        self.instructions = read_json(HERE.parent / "configs" / "instruction_config.json")
        self.labels = {dataset: read_json(HERE.parent / "CL_Benchmark" / task / dataset / "labels.json")
                       for task, dataset in mini.DATASETS}
        stand_ins = {word for words in STAND_INS.values() for choices in words.values() for word in choices}
        self.strings = sorted({label for labels in self.labels.values() for label in labels} | stand_ins)
        self.sources = [(task, dataset) for task, dataset in mini.DATASETS if dataset in STAND_INS]
        self.held_out = benchmark_sentences()

    def sentence(self, task: str, dataset: str, label: str) -> str:
        while (text := mini.DATASETS[task, dataset][0](label, self.rng)) in self.held_out:
            pass
        return text

    def instruction(self, task: str) -> str:
        zero_shot = [entry for entry in self.instructions[task] if entry["instruction_type"] == "zero-shot"]
        return self.rng.choice(zero_shot)["instruction"]

    def choose(self) -> tuple[str, str]:
        """Which of the options fits the text: one stands for its class, the others for other ones, in random order."""
        rng = self.rng
        task, dataset = rng.choices(self.sources, [len(STAND_INS[dataset]) for _, dataset in self.sources])[0]
        variant = rng.randrange(len(DATASET_NAMES))
        options = {label: words[variant % len(words)] for label, words in STAND_INS[dataset].items()}
        label = rng.choice(list(options))
        shown = {label, *rng.sample(list(options), rng.randint(1, len(options)))}
        order = rng.sample(sorted(shown), len(shown))
        prompt = prompt_of(task, DATASET_NAMES[variant], self.instruction(task), [options[name] for name in order],
                           self.sentence(task, dataset, label))
        return prompt, options[label]

    def spot(self) -> tuple[str, str]:
        """Which of the options occurs in a list: labels of all datasets and stand-ins, so that any can be copied."""
        options = self.rng.sample(self.strings, self.rng.randint(2, 5))
        answer = self.rng.choice(options)
        shown = [answer, *self.rng.sample([string for string in self.strings if string not in options], 2)]
        self.rng.shuffle(shown)
        return f"Option: {', '.join(options)} \nText: {' and '.join(shown)}\nAnswer:", answer

    def relate(self) -> tuple[str, str]:
        """Which of the options belongs with the phrases of the text, all of one class."""
        rng = self.rng
        dataset, related = rng.choice(list(RELATED.items()))
        classes = rng.sample(list(related), rng.randint(2, min(len(related), 6)))
        label = rng.choice(classes)
        options = [rng.choice(STAND_INS[dataset][name]) for name in classes]
        answer = options[classes.index(label)]
        shown = rng.sample([phrase for phrase in related[label] if phrase != answer], rng.randint(1, 3))
        return f"Option: {', '.join(options)} \nText: {' and '.join(shown)}\nAnswer:", answer

    def name(self) -> tuple[str, str]:
        """What the text is about, without options: the first word that stands for its class."""
        rng = self.rng
        task, dataset = rng.choices(self.sources, [len(STAND_INS[dataset]) for _, dataset in self.sources])[0]
        words = STAND_INS[dataset]
        label = rng.choice(list(words))
        prompt = f"Task:{task}\nDataset:{DATASET_NAMES[0]}\n{self.sentence(task, dataset, label)}\nAnswer:"
        return prompt, words[label][0]

    def batch(self, kinds: list[str]) -> list[tuple[str, str]]:
        return [getattr(self, self.rng.choice(kinds))() for _ in range(BATCH)]


def benchmark_sentences() -> set[str]:
    """Every sentence of the mini benchmark as `--tiny` generates it, to be kept out of pretraining."""
    seen: set[str] = set()
    for (task, dataset), (make, train_rows) in mini.DATASETS.items():
        labels = read_json(HERE.parent / "CL_Benchmark" / task / dataset / "labels.json")
        rng, own = random.Random(f"42 {dataset}"), set()
        for count in (train_rows, mini.EVAL_ROWS, mini.EVAL_ROWS):
            mini.make_rows(make, labels, count, rng, own)
        seen |= own
    return seen


def tokenizer_text(exercises: Exercises) -> Iterator[str]:
    """Text with every word that prompts can contain, real dataset names included."""
    for _ in range(3000):
        prompt, answer = exercises.choose()
        yield f"{prompt} {answer}"
        yield exercises.spot()[0]
    for (task, dataset), labels in zip(mini.DATASETS, exercises.labels.values()):
        for _ in range(30):
            yield f"Task:{task}\nDataset:{dataset}\n{', '.join(labels)}"


def train_pieces(texts: list[str], special: list[str], count: int = PIECES) -> Tokenizer:
    """Byte-pair merges that stay within words, as in LLaMA's vocabulary; a line break is a piece by itself."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation()])
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=count, special_tokens=special, show_progress=False))
    return trained


def llama_tokenizer(texts: Iterable[str]) -> LlamaTokenizer:
    model = json.loads(train_pieces(list(texts), ["<unk>", "<s>", "</s>"]).to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def t5_tokenizer(texts: Iterable[str], pieces: int = PIECES) -> T5Tokenizer:
    """A unigram vocabulary as T5 has it: the pieces from byte-pair merges, scored by their frequency.

    The library's own unigram trainer starts from substrings that several words share, so in text of few distinct words
    it splits most of them.
    """
    special = ["<pad>", "</s>", "<unk>"]
    texts = [" ".join(text.split()) for text in texts]  # to T5 a line break is a space
    trained = train_pieces(texts, special, pieces)
    counts = Counter(piece for text in texts for piece in trained.encode(text).tokens)
    learned = sorted(trained.get_vocab(), key=trained.token_to_id)[len(special):]
    vocab = [(piece, 0.0) for piece in special]
    vocab += [(piece, math.log((counts[piece] + 0.1) / counts.total())) for piece in learned]
    vocab += [(f"<extra_id_{index}>", 0.0) for index in reversed(range(SENTINELS))]
    return T5Tokenizer(vocab=vocab, extra_ids=SENTINELS)


def t5_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[tuple[str, str]]) -> torch.Tensor:
    """Mean over the exercises of the mean loss over an answer's tokens: long answers count no more than short ones."""
    inputs = tokenizer([prompt for prompt, _ in batch], padding=True, return_tensors="pt")
    answers = tokenizer([answer for _, answer in batch], padding=True, return_tensors="pt")
    logits = model(**inputs, labels=answers.input_ids).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), answers.input_ids, reduction="none")
    mask = answers.attention_mask
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def llama_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[tuple[str, str]]
) -> torch.Tensor:
    prompts = tokenizer([prompt for prompt, _ in batch]).input_ids
    answers = tokenizer([answer for _, answer in batch], add_special_tokens=False).input_ids
    rows = [prompt + answer + [tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers)]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.eos_token_id)
    weights = torch.zeros(ids.shape)
    for row, (prompt, tokens) in enumerate(zip(prompts, rows)):
        ids[row, :len(tokens)] = torch.tensor(tokens)
        weights[row, :len(prompt)] = PROMPT_WEIGHT / sum(map(len, prompts))
        weights[row, len(prompt):len(tokens)] = 1 / sum(map(len, answers))
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum()


def new_t5(tokenizer: T5Tokenizer) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, num_heads=4, d_ff=384, num_layers=2, num_decoder_layers=2,
        dropout_rate=0.0, feed_forward_proj="relu", tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0))


def new_llama(tokenizer: LlamaTokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2))


KINDS = {
    "t5": (t5_tokenizer, new_t5, t5_loss, 2600, ["choose"] * 4 + ["name", "spot"]),
    "llama": (llama_tokenizer, new_llama, llama_loss, 2400, ["choose"] * 5 + ["spot", "relate"]),
}


def pretrain(kind: str, steps: int | None, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    make_tokenizer, make_model, loss_of, usual_steps, exercise_kinds = KINDS[kind]
    steps = steps or usual_steps
    torch.manual_seed(seed)
    exercises = Exercises(seed)
    tokenizer = make_tokenizer(tokenizer_text(exercises))
    model = make_model(tokenizer)

    def next_batch(step: int) -> list[tuple[str, str]]:
        # Copying comes first: a model that cannot yet copy an option learns nothing from choosing one.
        return exercises.batch(["spot"] if step < COPYING_STEPS else exercise_kinds)

    fit(model, lambda batch: loss_of(model, tokenizer, batch), next_batch, steps, EMBEDDING_RATES[kind])
    return model, tokenizer


def fit(
    model: PreTrainedModel, loss_of: Callable, next_batch: Callable[[int], list], steps: int, embedding_rate: float
) -> None:
    """Train on `next_batch(step)`, embeddings `embedding_rate` times as fast as the rest; end in evaluation mode."""
    model.train()
    embeddings = model.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not embeddings]
    groups = [{"params": others}, {"params": [embeddings], "lr": PEAK_RATE * embedding_rate}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps))))
    start = time.time()
    for step in range(steps):
        loss = loss_of(next_batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(type(model).__name__, step, round(loss.item(), 3), f"{time.time() - start:.0f} s", flush=True)
    model.eval()


def save(model, tokenizer, folder: Path) -> None:
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--steps", type=int, help="instead of each kind's own number")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        save(*pretrain(kind, arguments.steps, arguments.seed), arguments.out / f"tiny-{kind}")


if __name__ == "__main__":
    main()
