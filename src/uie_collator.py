"""Examples -> batches, for encoder-decoder and decoder-only models.

The prompt and the answer are tokenised apart and joined as ids, so the border between what is masked from the loss
and what is learnt is where it was put, whatever the tokenizer would merge. Only the sentence is ever cut.

A text is tokenised once in a process: later epochs and later tasks find its ids kept (`token_ids.py`).
"""

import bisect
import json
import os
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from errors import InputError
from token_ids import KeptIds, shared_ids
from uie_dataset_lora import ANSWER_CUE, prompt_parts


@dataclass
class DataCollatorForUIE:
    """Turns a list of examples (rows of `load_uie_dataset`) into tensors, n rows to a batch.

    Every batch has `input_ids`, `attention_mask` (n, source) and `labels` (n, target):

    * encoder-decoder: prompts padded on the right; labels are the answer and EOS, padded on the right. The model
      shifts them itself.
    * decoder-only, training: prompt, answer, EOS, padded on the left; labels of the same shape, masked on prompt and
      padding.
    * decoder-only, dev and test: the prompt alone, padded on the left, to generate from; labels are the answer and
      EOS, padded on the right to a width of their own.

    One rule says how an answer continues a decoder's prompt, in training as in the labels of an evaluation: its ids
    are those that follow the cue in "Answer: <label>". So it begins with a space (sentencepiece `▁Good`, byte-level
    BPE `ĠGood`), which whoever decodes a generated answer strips. BOS stands once, in front, if the tokenizer puts one
    in front of text. Special tokens spelt out in the data (`<s>`, a tag in web pages) are not parsed as such; where a
    tokenizer does so all the same (T5's), a prompt may hold one, and an answer that spells one is refused.

    A prompt longer than `max_source_length` loses the right ends of its sentence's longest lines: of a MultiRC row
    the paragraph, never the question. An answer has at most `max_target_length` ids, EOS included, and is never cut.

    Args:
        decoder_only: whether the model is a decoder only; the tokenizer cannot tell.
        add_task_name, add_dataset_name: prompt prefixes, see `prompt_parts`.
        pad_to_multiple_of: round every width up to a multiple, with padding on the side that is padded anyway.
        label_pad_token_id: the label that the loss leaves out.
        name_rows: add the rows' names to a training batch, as a list `rows` of strings.
        input_record_file: append each batch to this file, a JSON object {"source", "label"} a line; rank 0 only.

    Attributes:
        kept: the ids of the texts tokenised so far, shared by collators of the same tokenizer and cut.

    Raises:
        InputError: a tokenizer without EOS; a row (named) whose prompt without its sentence, or whose answer, is too
            long, or whose answer spells a special token; a record file that cannot be written.
    """

    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    decoder_only: bool
    max_source_length: int
    max_target_length: int
    add_task_name: bool = False
    add_dataset_name: bool = False
    pad_to_multiple_of: int | None = None
    label_pad_token_id: int = -100
    name_rows: bool = False
    input_record_file: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise InputError("--model_name_or_path: a tokenizer without an EOS token; allowed: one that has it")
        self._eos = [self.tokenizer.eos_token_id]
        self._special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        bos = self.tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and self.tokenizer(ANSWER_CUE).input_ids[0] == bos else []
        self.kept = self._kept_ids()
        self._record([], [])

    def check(self, examples: Iterable[dict]) -> None:
        """Raise now what a batch of these examples would raise later: one example for each prompt head and answer."""
        distinct = {}
        for example in examples:
            instance = example["Instance"]
            key = (example["Dataset"], instance["instruction"], instance["label"], str(example["Samples"]))
            distinct.setdefault(key, example)
        for example in distinct.values():
            head, _, tail = self._parts(example)
            self._check_room(head + tail, example)
        self._answers(list(distinct.values()))

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        prompts, inputs = self._prompts(examples)
        labels = self._answers(examples)
        self._record(prompts, examples)
        answer_in_input = self.decoder_only and _are_training(examples)
        if answer_in_input:
            masks = [[self.label_pad_token_id] * len(prompt) for prompt in inputs]
            inputs = [prompt + answer for prompt, answer in zip(inputs, labels)]
            labels = [mask + answer for mask, answer in zip(masks, labels)]
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        batch = {
            "input_ids": self._pad(inputs, pad, left=self.decoder_only),
            "attention_mask": self._pad([[1] * len(ids) for ids in inputs], 0, left=self.decoder_only),
            "labels": self._pad(labels, self.label_pad_token_id, left=answer_in_input),
        }
        if self.name_rows and _are_training(examples):
            batch["rows"] = [_name(example) for example in examples]
        return batch

    def lengths(self, examples: list[dict]) -> list[tuple[int, int]]:
        """Numbers of ids of each example's prompt, as cut, and of its answer, EOS included."""
        _, prompts = self._prompts(examples)
        return [(len(prompt), len(answer)) for prompt, answer in zip(prompts, self._answers(examples))]

    def _prompts(self, examples: list[dict]) -> tuple[list[str], list[list[int]]]:
        """Each example's prompt, cut where it must be, as text and as ids."""
        parts = [self._parts(example) for example in examples]
        prompts = ["".join(pieces) for pieces in parts]

        def encode(indices: list[int]) -> list[list[int]]:
            sources = self._source_ids([prompts[index] for index in indices])
            for place, index in enumerate(indices):
                if len(sources[place]) > self.max_source_length:
                    prompts[index] = self._cut(parts[index], examples[index])
                    [sources[place]] = self._source_ids([prompts[index]])
            return sources

        return prompts, self.kept.look_up([f"prompt {prompt}" for prompt in prompts], encode)

    def _parts(self, example: dict) -> tuple[str, str, str]:
        return prompt_parts(example, add_task_name=self.add_task_name, add_dataset_name=self.add_dataset_name)

    def _check_room(self, prompt: str, example: dict) -> None:
        needed = len(self._source_ids([prompt])[0])
        if needed > self.max_source_length:
            raise InputError(
                f"{_name(example)}: the prompt without its sentence needs {needed} tokens; "
                f"allowed: --max_source_length {self.max_source_length}"
            )

    def _cut(self, parts: tuple[str, str, str], example: dict) -> str:
        """The prompt with the sentence's lines cut to the greatest common width (characters) at which it fits."""
        head, sentence, tail = parts
        lines = sentence.split("\n")

        def prompt(width: int) -> str:
            return head + "\n".join(line[:width] for line in lines) + tail

        def needed(width: int) -> int:
            return len(self._source_ids([prompt(width)])[0])

        self._check_room(prompt(0), example)
        # The width before bisect's answer was seen to fit, also where the count of tokens does not grow steadily.
        widths = range(max(map(len, lines)))
        return prompt(bisect.bisect_right(widths, self.max_source_length, lo=1, key=needed) - 1)

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
            return [ids if ids[-1:] == self._eos else ids + self._eos for ids in answers]

        answers = self.kept.look_up([f"answer {label}" for label in labels], encode)
        for ids, label, example in zip(answers, labels, examples):
            if spelt := self._special.intersection(ids[:-1]):  # generation would stop inside such an answer
                token = self.tokenizer.convert_ids_to_tokens(min(spelt))
                raise InputError(
                    f"{_name(example)}: the answer {label!r} spells {token}; allowed: labels without special tokens"
                )
            if len(ids) > self.max_target_length:
                raise InputError(
                    f"{_name(example)}: the answer {label!r} needs {len(ids)} tokens; "
                    f"allowed: --max_target_length {self.max_target_length}"
                )
        return answers

    def _continuations(self, labels: list[str]) -> list[list[int]]:
        """Ids of each label as it follows the cue.

        A tokenizer that merges across the space after the cue has no such ids; then those of " <label>" stand in.
        """
        [cue] = self._encode([ANSWER_CUE], add_special_tokens=False)
        joined = self._encode([f"{ANSWER_CUE} {label}" for label in labels], add_special_tokens=False)
        alone = self._encode([f" {label}" for label in labels], add_special_tokens=False)
        return [ids[len(cue) :] if ids[: len(cue)] == cue else own for ids, own in zip(joined, alone)]

    def _encode(self, texts: list[str] | None = None, **kwargs) -> list[list[int]]:
        return self.tokenizer(texts, split_special_tokens=True, verbose=False, **kwargs).input_ids

    def _kept_ids(self) -> KeptIds:
        """What collators of the same tokenizer and cut share, whichever task they serve."""
        if self.input_record_file is not None:
            return KeptIds(0)  # the record wants a cut prompt's text, which is not kept
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:  # a tokenizer in plain Python, whose rules cannot be compared
            return KeptIds()
        special = str(self.tokenizer.special_tokens_map)
        return shared_ids((backend.to_str(), special, self.decoder_only, self.max_source_length))

    def _pad(self, rows: list[list[int]], value: int, *, left: bool) -> torch.Tensor:
        """(n, width) tensor of the rows, width being the longest row's, rounded up to `pad_to_multiple_of`."""
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(map(len, rows)) // multiple) * multiple
        fill = [[value] * (width - len(row)) for row in rows]
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, fill)])

    def _record(self, prompts: list[str], examples: list[dict]) -> None:
        if self.input_record_file is None or os.environ.get("RANK", "0") != "0":
            return
        pairs = [
            {"source": prompt, "label": example["Instance"]["label"]} for prompt, example in zip(prompts, examples)
        ]
        try:
            with open(self.input_record_file, "a", encoding="utf-8") as record:
                record.write("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
        except OSError as error:
            raise InputError(
                f"--input_record_file {self.input_record_file}: cannot be written ({error.strerror}); "
                "allowed: a file in a folder that exists"
            ) from None


def _are_training(examples: list[dict]) -> bool:
    """Whether the rows come from a train split; a batch of both kinds would have labels of two shapes."""
    kinds = {example["subset"] == "train" for example in examples}
    if len(kinds) > 1:
        raise ValueError("a batch mixes rows of train with rows of dev or test; allowed: either")
    return kinds.pop()


def _name(example: dict) -> str:
    return f"{example['Dataset']}, {example['subset']} row {example['Instance']['id']}"
