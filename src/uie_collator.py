"""Turn examples into batches, for encoder-decoder and decoder-only models.

Prompt and answer are tokenised separately and joined as ids, so that the loss mask ends exactly where the answer
begins. Only the sentence is ever cut. Later epochs and tasks reuse the ids of texts seen before (`token_ids.py`).
"""

import bisect
import collections
import itertools
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from compute_metrics import exact_match
from errors import InputError
from ranks import is_first
from token_ids import KeptIds, shared_ids
from uie_dataset_lora import ANSWER_CUE, prompt_parts

logger = logging.getLogger("gorp")
NARROWEST = 20
"""To how many characters a sentence's lines may be cut."""
LEAST_ROOM = 16
"""To how many tokens a sentence may be cut."""


@dataclass
class DataCollatorForUIE:
    """Turn a list of n examples of `load_uie_dataset` into tensors.

    Every batch has `input_ids`, `attention_mask` (n, source) and `labels` (n, target):

    * encoder-decoder: prompts and labels (answer and EOS) padded on the right.
    * decoder-only, training: prompt, answer and EOS, padded on the left; labels of the same shape, masked on prompt
      and padding, and `answer_length`, the width of the columns at the right that hold all answers.
    * decoder-only, dev and test: the prompt, padded on the left; labels (answer and EOS) padded on the right to their
      own width.

    In a decoder-only model the answer's ids are always those that follow the cue in "Answer: <label>", so the answer
    begins with a space (`▁Good` in sentencepiece, `ĠGood` in byte-level BPE), which decoding strips. BOS occurs once,
    in front, if the tokenizer adds it to text. Special tokens spelled out in the data (`<s>`, a tag in web pages) are
    not parsed. T5's tokenizer parses them anyway; an answer that spells one is rejected.

    A prompt longer than `max_source_length` loses the right ends of its sentence's longest lines (in MultiRC that is
    the paragraph, never the question) or, where that would leave less than `NARROWEST` of them, the sentence's end. An
    answer has at most `max_target_length` ids, EOS included, and is never cut.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    decoder_only: bool
    max_source_length: int
    max_target_length: int
    add_task_name: bool = False  # in front of the prompt, see `prompt_parts`
    add_dataset_name: bool = False
    pad_to_multiple_of: int | None = None  # every width is rounded up to a multiple
    name_examples: bool = False  # whether a training batch has its examples' names, as the list `examples`
    input_record_file: str | os.PathLike | None = None  # gets a line {"source": ..., "label": ...} per example

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise InputError("--model_name_or_path: found a tokenizer without an EOS token; allowed: one with it")
        self._eos = [self.tokenizer.eos_token_id]
        # What the tokenizer of an encoder-decoder puts around an answer: BART's <s> and </s>, or a language and </s>.
        around = [] if self.decoder_only else self._encode(text_target=[""])[0]
        end = around.index(self._eos[0]) if self._eos[0] in around else len(around)
        self._before, self._after, self._added = end, max(1, len(around) - end), self._eos[len(around) - end :]
        self._special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        bare, [whole] = self._encode([ANSWER_CUE], add_special_tokens=False)[0], self._encode([ANSWER_CUE])
        starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
        self._bos = whole[: next(starts, 0)]  # or a longer prefix, such as GLM's [gMASK]<sop>
        self.kept = self._kept_ids()
        self._record([], [])

    def check(self, examples: Iterable[dict]) -> None:
        """Raise what batches of these examples would raise, after trying one of each prompt head and answer.

        Also rejects a sentence that would have to be cut to almost nothing, and a label that the tokenizer does not
        reproduce, so that no prediction could equal it; free-text answers of this kind are counted in a warning.
        """
        distinct, rooms, changed = {}, {}, collections.Counter()
        for example in examples:
            head, sentence, tail = self.parts(example)
            if (head, tail) not in rooms:
                rooms[head, tail] = self._room(head + tail, example)
            if rooms[head, tail] < LEAST_ROOM:
                self._check_uncut(head + sentence + tail, rooms[head, tail], example)
            distinct.setdefault((example["Dataset"], head, tail, example["Instance"]["label"]), example)
        tokens = self._answers(list(distinct.values()))
        for example, written in zip(distinct.values(), self.decode(tokens)):
            label, name = example["Instance"]["label"], self.tokenizer.name_or_path
            if exact_match(written, label):
                continue
            if example.get("Metric") != "rougeL":
                raise InputError(f"{_name(example)}: the answer {label!r} becomes {written!r} in the tokenizer {name}; "
                                 "allowed: answers that it reproduces, except for case, spaces and punctuation, which "
                                 "the score ignores")
            changed[example["Dataset"]] += 1
        for dataset, count in changed.items():
            logger.warning("%s: the tokenizer does not reproduce %d different answers, so that no prediction can equal "
                           "them", dataset, count)

    def decode(self, tokens) -> list[str]:
        """The texts that answers' ids stand for, without special tokens: what evaluation scores."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        prompts, inputs = self._prompts(examples)
        labels = answers = self._answers(examples)
        self._record(prompts, examples)
        training = examples[0]["subset"] == "train"  # no batch mixes its examples with those of dev or test
        answer_in_input = self.decoder_only and training
        if answer_in_input:
            masks = [[-100] * len(prompt) for prompt in inputs]  # labels that the loss ignores
            inputs = [prompt + answer for prompt, answer in zip(inputs, answers)]
            labels = [mask + answer for mask, answer in zip(masks, answers)]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        batch = {
            "input_ids": self._pad(inputs, pad, left=self.decoder_only),
            "attention_mask": self._pad([[1] * len(ids) for ids in inputs], 0, left=self.decoder_only),
            "labels": self._pad(labels, -100, left=answer_in_input),
        }
        if answer_in_input:
            batch["answer_length"] = max(map(len, answers))
        if self.name_examples and training:
            batch["examples"] = [_name(example) for example in examples]
        return batch

    def lengths(self, examples: list[dict]) -> list[tuple[int, int]]:
        """The number of ids in each example's prompt, after cutting, and in its answer, EOS included."""
        _, prompts = self._prompts(examples)
        return [(len(prompt), len(answer)) for prompt, answer in zip(prompts, self._answers(examples))]

    def count_cut(self, examples: Iterable[dict]) -> int:
        """The number of examples whose prompts are cut. The ids are kept for training and evaluation."""
        remaining, count = iter(examples), 0
        while some := list(itertools.islice(remaining, 1000)):
            self._prompts(some)
            count += sum(hash("".join(self.parts(example))) in self.kept.cut for example in some)
        return count

    def _prompts(self, examples: list[dict]) -> tuple[list[str], list[list[int]]]:
        """Each example's prompt, cut where necessary, as text and as ids."""
        parts = [self.parts(example) for example in examples]
        prompts = ["".join(pieces) for pieces in parts]

        def encode(indices: list[int]) -> list[list[int]]:
            sources = self._source_ids([prompts[index] for index in indices])
            for place, index in enumerate(indices):
                if len(sources[place]) > self.max_source_length:
                    self.kept.cut.add(hash(prompts[index]))
                    prompts[index] = self._cut(parts[index], examples[index])
                    [sources[place]] = self._source_ids([prompts[index]])
            return sources

        return prompts, self.kept.look_up([f"prompt {prompt}" for prompt in prompts], encode)

    def parts(self, example: dict) -> tuple[str, str, str]:
        """`prompt_parts` with the names that this collator's prompts have."""
        return prompt_parts(example, add_task_name=self.add_task_name, add_dataset_name=self.add_dataset_name)

    def _room(self, prompt: str, example: dict) -> int:
        """The number of tokens left for the sentence beside the rest of its prompt, which must fit."""
        needed = len(self._source_ids([prompt])[0])
        self._check_length("the prompt without its sentence", needed, "max_source_length", example)
        return self.max_source_length - needed

    def _check_uncut(self, prompt: str, room: int, example: dict) -> None:
        """Reject a sentence that would have to be cut to less than `LEAST_ROOM` tokens."""
        if (needed := len(self._source_ids([prompt])[0])) > self.max_source_length:
            raise InputError(f"{_name(example)}: --max_source_length {self.max_source_length} leaves {room} tokens for "
                             f"the sentence, beside the rest of the prompt; allowed: at least {LEAST_ROOM}, or the "
                             f"{needed} of the complete prompt")

    def _check_length(self, what: str, needed: int, flag: str, example: dict) -> None:
        if needed > getattr(self, flag):
            raise InputError(f"{_name(example)}: {what} needs {needed} tokens; allowed: --{flag} {getattr(self, flag)}")

    def _cut(self, parts: tuple[str, str, str], example: dict) -> str:
        """The prompt with the sentence's lines, or else the sentence, cut to the greatest width that fits."""
        head, sentence, tail = parts
        lines = sentence.split("\n")

        def prompt(width: int) -> str:  # in characters
            return head + "\n".join(line[:width] for line in lines) + tail

        def needed(width: int) -> int:
            return len(self._source_ids([prompt(width)])[0])

        def greatest() -> int:
            # The width before bisect's answer was seen to fit, even if the count of tokens is not monotonic.
            widths = range(max(map(len, lines)))
            return bisect.bisect_right(widths, self.max_source_length, key=needed) - 1

        width = greatest()
        if width < NARROWEST:  # a table, a program: many short lines, of which nothing readable would be left
            lines = [sentence]
            self._room(prompt(0), example)
            width = greatest()
        return prompt(width)

    def _source_ids(self, prompts: list[str]) -> list[list[int]]:
        if self.decoder_only:
            return [self._bos + ids for ids in self._encode(prompts, add_special_tokens=False)]
        return self._encode(prompts)

    def _answers(self, examples: list[dict]) -> list[list[int]]:
        """Each example's answer as ids, EOS included."""
        labels = [example["Instance"]["label"] for example in examples]

        def encode(indices: list[int]) -> list[list[int]]:
            fresh = [labels[index] for index in indices]
            answers = self._continuations(fresh) if self.decoder_only else self._encode(text_target=fresh)
            return [ids + self._added for ids in answers]

        answers = self.kept.look_up([f"answer {label}" for label in labels], encode)
        for ids, label, example in zip(answers, labels, examples):
            # Generation would stop inside an answer with a special token.
            if spelled := self._special.intersection(ids[self._before : -self._after]):
                token = self.tokenizer.convert_ids_to_tokens(min(spelled))
                raise InputError(f"{_name(example)}: the answer {label!r} spells {token}; allowed: labels without "
                                 "special tokens")
            self._check_length(f"the answer {label!r}", len(ids), "max_target_length", example)
        return answers

    def _continuations(self, labels: list[str]) -> list[list[int]]:
        """The ids of each label after the cue; of " <label>" alone if the tokenizer merges across the cue's end."""
        [cue] = self._encode([ANSWER_CUE], add_special_tokens=False)
        joined = self._encode([f"{ANSWER_CUE} {label}" for label in labels], add_special_tokens=False)
        alone = self._encode([f" {label}" for label in labels], add_special_tokens=False)
        return [ids[len(cue) :] if ids[: len(cue)] == cue else own for ids, own in zip(joined, alone)]

    def _encode(self, texts: list[str] | None = None, **kwargs) -> list[list[int]]:
        return self.tokenizer(texts, split_special_tokens=True, verbose=False, **kwargs).input_ids

    def _kept_ids(self) -> KeptIds:
        """The store that collators of the same tokenizer and lengths share, in every task."""
        if self.input_record_file is not None:
            return KeptIds(0)  # the record needs the text of cut prompts, which is not kept
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer in pure Python, whose rules cannot be compared
            return KeptIds()
        special = str(self.tokenizer.special_tokens_map)
        return shared_ids((backend.to_str(), special, self.decoder_only, self.max_source_length))

    def _pad(self, rows: list[list[int]], value: int, *, left: bool) -> torch.Tensor:
        """Pad n rows to a tensor (n, width): the longest row's width, rounded up to `pad_to_multiple_of`."""
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(map(len, rows)) // multiple) * multiple
        fill = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill)])

    def _record(self, prompts: list[str], examples: list[dict]) -> None:
        if self.input_record_file is None or not is_first():
            return
        try:
            with open(self.input_record_file, "a", encoding="utf-8") as record:
                for prompt, example in zip(prompts, examples):
                    pair = {"source": prompt, "label": example["Instance"]["label"]}
                    record.write(json.dumps(pair, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"--input_record_file {self.input_record_file}: cannot be written ({error.strerror}); "
                             "allowed: a file in an existing folder") from None


def _name(example: dict) -> str:
    return f"{example['Dataset']}, {example['subset']} example {example['Instance']['id']}"
