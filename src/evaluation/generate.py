"""Answers to the rows of a test set, and the loss of their reference answers: one plain loop over batches.

What a loop in file order wastes is left out. Rows of like length share a batch, so little is padding. Generation stops
when a batch has ended. And since one row that rambles would keep its whole batch going, a batch first gets as many
tokens as the longest reference answer of its datasets has; rows that have not ended there are collected and generated
again, in batches of their own, with all the tokens they may have. Greedy search chooses a row's next token from that
row alone, so every row gets the answer that it would have had in any batch. Prompts of a dataset begin alike (task,
instruction, options), so where the model continues its prompt, rows of one dataset share a batch, and the keys and
values of that beginning are computed once a batch, for one row (a prefix cache).

Each of W ranks takes every W-th row. ZeRO-3 gathers weights in each forward pass, so all ranks must call the model
equally often: a rank that has no batch left runs one more, and its result counts nowhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from uie_collator import DataCollatorForUIE

TOKENISED_AT_ONCE = 1000
TWICE_AT_MOST = 1 / 4  # share of the rows, a batch aside, that may be generated again before batches go without a bound


@dataclass
class Prediction:
    """One evaluation of `rows`. All ranks make it, call the same methods, and get the same results.

    Args:
        model: in evaluation mode, on the accelerator's device.
        generation: arguments of `generate`; `max_new_tokens` is what a row may have at most.
        most_rows: of a batch.
        most_tokens: of a batch's prompts, padding included; a prompt above it has a batch of its own.
        bounded: whether the longest reference answer is tried as the first bound.
        shares_beginnings: whether what all prompts of a batch begin with is computed once; decoder-only models alone
            can, and not under ZeRO-3 (one rank's batch may begin alike, another's not).
        show_progress: whether a bar counts the rows.
    """

    model: nn.Module
    collator: DataCollatorForUIE
    rows: Dataset
    accelerator: Accelerator
    generation: dict
    most_rows: int
    most_tokens: int
    bounded: bool = True
    shares_beginnings: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.longest_answer = self.generation["max_new_tokens"]
        self.prompt_lengths: dict[int, int] = {}  # of this rank's rows, by their place in `rows`
        self.bounds: dict[str, int] = {}  # of each dataset: the length of its longest reference answer, EOS included
        mine = range(self.rank, len(self.rows), self.ranks)
        for start in range(0, len(mine), TOKENISED_AT_ONCE):
            places = mine[start : start + TOKENISED_AT_ONCE]
            examples = [self.rows[place] for place in places]
            for place, example, (prompt, answer) in zip(places, examples, self.collator.lengths(examples)):
                self.prompt_lengths[place] = prompt
                self.bounds[example["Dataset"]] = max(answer, self.bounds.get(example["Dataset"], 1))
        self.shares_beginnings = self.shares_beginnings and self.generation.get("num_beams", 1) == 1
        self.bounded = self.bounded and not _end_depends_on_bound(self.model, self.generation)

    @torch.no_grad()
    def answers(self) -> torch.Tensor:
        """Generated ids (len(rows), max_new_tokens) in the order of the rows, padded after each one's end."""
        share = ceil(len(self.rows) / self.ranks)
        answers = torch.full((share, self.longest_answer), self.collator.tokenizer.pad_token_id)
        with tqdm(total=len(self.prompt_lengths), desc="predict", disable=not self.show_progress) as bar:
            cut = self._answer(list(self.prompt_lengths), answers, bar, bounded=self.bounded)
            self._answer(cut, answers, bar, bounded=False)
        # (rank, its rows) -> (its rows, rank): row r was dealt to rank r % ranks.
        gathered = self.accelerator.gather(answers.to(self.accelerator.device)).cpu()
        return gathered.view(self.ranks, share, -1).transpose(0, 1).flatten(0, 1)[: len(self.rows)]

    def _answer(self, places: list[int], answers: torch.Tensor, bar: tqdm, *, bounded: bool) -> list[int]:
        """Fill in the answers of the rows at `places`; the places of those that had not ended at their bound."""
        cut, tried = [], 0
        for batch, counts in self._batches(places):
            examples = [self.rows[place] for place in batch]
            bound = self.longest_answer
            if bounded and TWICE_AT_MOST * tried >= len(cut):  # where most rows ramble, a bound only costs
                bound = min(bound, max(self.bounds.get(example["Dataset"], bound) for example in examples))
            tokens = self._generate(examples, bound).cpu()
            if not counts:
                continue
            ends = tokens == self.collator.tokenizer.eos_token_id
            tokens[ends.cumsum(1) > ends] = self.collator.tokenizer.pad_token_id  # beams leave other ids there
            ended = ends.any(1) | (bound == self.longest_answer)
            cut += [place for place, has_ended in zip(batch, ended.tolist()) if not has_ended]
            tried += len(batch)
            answers[[place // self.ranks for place in batch], : tokens.shape[1]] = tokens
            bar.update(int(ended.sum()))
        return cut

    def _generate(self, examples: list[dict], bound: int) -> torch.Tensor:
        """Ids (n, at most `bound`) that follow the prompt, or the decoder's start."""
        batch = self._on_device(self.collator(examples))
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.shares_beginnings:
            prompts = self._after_common_beginning(**prompts)
        generated = self.model.generate(**prompts, **self.generation | {"max_new_tokens": bound})
        return generated[:, prompts["input_ids"].shape[1] if self.collator.decoder_only else 1 :]

    def _after_common_beginning(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict:
        """Left-padded prompts (n, length) with a cache of the tokens that all of them begin with, computed once.

        The padding moves behind that beginning, and positions are counted without it, so that nothing else changes.
        """
        padding = (attention_mask == 0).sum(1, keepdim=True)
        place, length = torch.arange(input_ids.shape[1], device=input_ids.device), input_ids.shape[1]
        leading = input_ids.gather(1, (place + padding).clamp(max=length - 1))  # right padded with the last token
        alike = (leading == leading[0]).all(0)[: length - int(padding.max()) - 1]  # each row keeps a token of its own
        common = int(alike.long().cumprod(0).sum())
        if not common:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        cache = self.model(input_ids=leading[:1, :common], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(input_ids))
        behind = torch.where(place < common + padding, place - common, place)  # first the padding, then the rest
        source = torch.where(place < common, place + padding, behind)
        mask = attention_mask.gather(1, source)
        return {
            "input_ids": input_ids.gather(1, source),
            "attention_mask": mask,
            "position_ids": mask.cumsum(1) - 1,
            "past_key_values": cache,
        }

    @torch.no_grad()
    def loss(self) -> float:
        """Cross entropy of the reference answers, the mean over all their tokens."""
        total = torch.zeros(2, device=self.accelerator.device)
        for batch, counts in self._batches(list(self.prompt_lengths)):
            inputs = self._on_device(self.collator([self.rows[place] for place in batch]))
            if self.collator.decoder_only:
                inputs = self._answers_after_prompts(inputs)
            tokens = (inputs["labels"] != self.collator.label_pad_token_id).sum()
            mean = self.model(**inputs, use_cache=False).loss.float()
            if counts:
                total += torch.stack([mean * tokens, tokens.float()])
        loss, tokens = self.accelerator.gather(total).view(-1, 2).sum(0).tolist()
        return loss / tokens

    def _answers_after_prompts(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Prompts (left padded) joined with their answers (right padded with -100): a batch that has a loss."""
        prompts, answers, ignored = inputs["input_ids"], inputs["labels"], self.collator.label_pad_token_id
        present = answers != ignored
        filled = answers.masked_fill(~present, self.collator.tokenizer.pad_token_id)
        return {
            "input_ids": torch.cat([prompts, filled], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], present.to(inputs["attention_mask"])], 1),
            "labels": torch.cat([torch.full_like(prompts, ignored), answers], 1),
        }

    def _batches(self, places: list[int]) -> Iterator[tuple[list[int], bool]]:
        """Batches of places in `rows`, as many on every rank, each with whether its result counts."""
        groups: dict[str, list[int]] = {}
        for place in places:
            groups.setdefault(self.rows[place]["Dataset"] if self.shares_beginnings else "", []).append(place)
        batches = []
        for group in groups.values():
            lengths = [self.prompt_lengths[place] for place in group]
            planned = plan_batches(lengths, self.most_rows, self.most_tokens)
            batches += [[group[index] for index in batch] for batch in planned]
        batches.sort(key=lambda batch: self.prompt_lengths[batch[0]], reverse=True)
        calls = torch.tensor([len(batches)], device=self.accelerator.device)
        for number in range(int(self.accelerator.gather(calls).max())):
            yield (batches[number], True) if number < len(batches) else ([0], False)

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}


def plan_batches(lengths: Sequence[int], most_rows: int, most_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in batches of like length, longest first, so that too little memory shows at once.

    A batch has at most `most_rows` rows and, padded to its longest row, `most_tokens` tokens, or else a single row.
    """
    batches: list[list[int]] = []
    room = 0  # rows that still fit into the last batch
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not room:
            batches.append([])
            room = max(1, min(most_rows, most_tokens // max(1, lengths[index])))
        batches[-1].append(index)
        room -= 1
    return batches


def _end_depends_on_bound(model: nn.Module, generation: dict) -> bool:
    """Whether an answer could be another under a smaller bound: a beam is ranked, or the end forced, at the bound."""
    return generation.get("num_beams", 1) > 1 or model.generation_config.forced_eos_token_id is not None
