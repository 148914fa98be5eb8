"""Answers to the examples of a test set, and the loss of their reference answers.

Three things make the loop faster than one in file order. Examples of similar length share a batch, so there is little
padding. A batch first generates as many tokens as the longest reference answer of its datasets has, since one long
answer would keep the complete batch going; unfinished answers are collected and generated again, up to the full limit.
The prompts of a dataset begin alike (task, instruction, options), so for a decoder-only model the examples of a batch
are of one dataset, and the keys and values of their common prefix are computed once (a prefix cache), unless a sliding
window is too short for it or the model is recurrent. With greedy search an example's answer does not depend on what
shares its batch, except for near ties in 16 bits.

Each of W ranks takes every W-th example. ZeRO-3 gathers weights in each forward pass, so all ranks must call the model
equally often: a rank without batches left runs one more and discards its result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from uie_collator import DataCollatorForUIE

TOKENISED_AT_ONCE = 1000
TWICE_AT_MOST = 1 / 4  # if a larger share of the examples is generated twice, batches have no first bound


@dataclass
class Prediction:
    """One evaluation of `examples`. All ranks create it, call the same methods and get the same results."""

    model: nn.Module  # in evaluation mode, on the accelerator's device
    collator: DataCollatorForUIE
    examples: Dataset
    accelerator: Accelerator
    generation: dict  # arguments of `generate`; `max_new_tokens` is the limit of an answer
    batch_size: int  # examples in a batch
    most_tokens: int  # prompt tokens in a batch, padding included; a longer prompt is a batch of its own
    # Whether to compute a batch's common prefix once. Only decoder-only models have one, and under ZeRO-3 all ranks
    # would need one in the same batches.
    shares_prefix: bool = False
    name: str = "predict"  # of the progress bar
    show_progress: bool = False

    def __post_init__(self) -> None:
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.longest_answer = self.generation["max_new_tokens"]
        self.prompt_lengths: dict[int, int] = {}  # of this rank's examples, by their index in `examples`
        self.bounds: dict[str, int] = {}  # of each dataset: the length of its longest reference answer, EOS included
        mine = range(self.rank, len(self.examples), self.ranks)
        for start in range(0, len(mine), TOKENISED_AT_ONCE):
            places = mine[start : start + TOKENISED_AT_ONCE]
            examples = [self.examples[place] for place in places]
            for place, example, (prompt, answer) in zip(places, examples, self.collator.lengths(examples)):
                self.prompt_lengths[place] = prompt
                self.bounds[example["Dataset"]] = max(answer, self.bounds.get(example["Dataset"], 1))
        greedy = self.generation.get("num_beams", 1) == 1
        self.shares_prefix = self.shares_prefix and greedy
        self.bounded = greedy  # beams are ranked at the bound, so another bound could change the answer

    @torch.no_grad()
    def answers(self) -> torch.Tensor:
        """Generated ids (len(examples), max_new_tokens) in the order of `examples`, padded after each answer's end."""
        share = ceil(len(self.examples) / self.ranks)
        answers = torch.full((share, self.longest_answer), self.collator.tokenizer.pad_token_id)
        with tqdm(total=len(self.prompt_lengths), desc=self.name, disable=not self.show_progress) as bar:
            cut = self._answer(list(self.prompt_lengths), answers, bar, bounded=self.bounded)
            self._answer(cut, answers, bar, bounded=False)
        # (rank, its examples) -> (its examples, rank): example r went to rank r % ranks.
        gathered = self.accelerator.gather(answers.to(self.accelerator.device)).cpu()
        return gathered.view(self.ranks, share, -1).transpose(0, 1).flatten(0, 1)[: len(self.examples)]

    def _answer(self, places: list[int], answers: torch.Tensor, bar: tqdm, *, bounded: bool) -> list[int]:
        """Fill in the answers of the examples at `places`; returns the places of those unfinished at their bound."""
        cut, tried = [], 0
        for batch, is_real in self._batches(places):
            examples = [self.examples[place] for place in batch]
            bound = self.longest_answer
            if bounded and TWICE_AT_MOST * tried >= len(cut):  # otherwise a bound only costs
                bound = min(bound, max(self.bounds.get(example["Dataset"], bound) for example in examples))
            tokens = self._generate(examples, bound).cpu()
            if not is_real:
                continue
            ends = torch.isin(tokens, torch.tensor(self.model.generation_config.eos_token_id))
            tokens[ends.cumsum(1) > ends] = self.collator.tokenizer.pad_token_id  # beam search pads differently
            ended = ends.any(1) | (bound == self.longest_answer)
            cut += [place for place, has_ended in zip(batch, ended.tolist()) if not has_ended]
            tried += len(batch)
            answers[[place // self.ranks for place in batch], : tokens.shape[1]] = tokens
            bar.update(int(ended.sum()))
        return cut

    def _generate(self, examples: list[dict], bound: int) -> torch.Tensor:
        """Ids (n, at most `bound`) after the prompt, or after the decoder's start token."""
        batch = send_to_device(self.collator(examples), self.accelerator.device)
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.shares_prefix and self._sees_all(prompts["input_ids"].shape[1] + bound):
            prompts = self._after_common_prefix(**prompts)
        generated = self.model.generate(**prompts, **self.generation | {"max_new_tokens": bound})
        return generated[:, prompts["input_ids"].shape[1] if self.collator.decoder_only else 1 :]

    def _sees_all(self, length: int) -> bool:
        """Whether padding may follow a cached prefix: a sliding window and MPT's distances count it, and a recurrent
        state absorbs it."""
        return self.model.config.model_type != "mpt" and all(
            type(layer) is DynamicLayer or type(layer) is DynamicSlidingWindowLayer and length < layer.sliding_window
            for layer in DynamicCache(config=self.model.config).layers
        )

    def _after_common_prefix(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict:
        """Replace the common prefix of left-padded prompts (n, length) by a cache of its keys and values.

        The padding moves behind the prefix: `_ _ P P a` becomes `P P _ _ a`, where `P P` is cached. Position ids do not
        count padding, so the answers stay the same.
        """
        length = input_ids.shape[1]
        column = torch.arange(length, device=input_ids.device)
        padded = (attention_mask == 0).sum(1, keepdim=True)  # (n, 1), columns of padding
        left_aligned = input_ids.gather(1, (column + padded).clamp(max=length - 1))  # arbitrary beyond a prompt's end
        same_in_all = (left_aligned == left_aligned[0]).all(0)[: length - int(padded.max()) - 1]  # one token stays
        common = int(same_in_all.long().cumprod(0).sum())
        if not common:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        cache = self.model(input_ids=left_aligned[:1, :common], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(input_ids))
        after_prefix = torch.where(column < common + padded, column - common, column)  # the padding, then the rest
        source_column = torch.where(column < common, column + padded, after_prefix)
        mask = attention_mask.gather(1, source_column)
        return {
            "input_ids": input_ids.gather(1, source_column),
            "attention_mask": mask,
            "position_ids": mask.cumsum(1) - 1,
            "past_key_values": cache,
        }

    @torch.no_grad()
    def loss(self) -> float:
        """Cross entropy of the reference answers, averaged over their tokens."""
        total = torch.zeros(2, device=self.accelerator.device)
        # A mixture's balance is no part of an answer's loss, and depends on what shares a batch.
        balance = {"output_router_logits": False} if hasattr(self.model.config, "output_router_logits") else {}
        for batch, is_real in self._batches(list(self.prompt_lengths)):
            # Prompt and answer, as in training.
            examples = [self.examples[place] | {"subset": "train"} for place in batch]
            inputs = send_to_device(self.collator(examples), self.accelerator.device)
            inputs.pop("examples", None)
            tokens = (inputs["labels"] != -100).sum()
            mean = self.model(**inputs, use_cache=False, **balance).loss.float()
            if is_real:
                total += torch.stack([mean * tokens, tokens.float()])
        loss, tokens = self.accelerator.gather(total).view(-1, 2).sum(0).tolist()
        return loss / tokens

    def _batches(self, places: list[int]) -> Iterator[tuple[list[int], bool]]:
        """Yield equally many batches of indices in `examples` on every rank; with each, False if it is filler."""
        groups: dict[str, list[int]] = {}
        for place in places:
            groups.setdefault(self.examples[place]["Dataset"] if self.shares_prefix else "", []).append(place)
        batches = []
        for group in groups.values():
            lengths = [self.prompt_lengths[place] for place in group]
            planned = plan_batches(lengths, self.batch_size, self.most_tokens)
            batches += [[group[index] for index in batch] for batch in planned]
        batches.sort(key=lambda batch: self.prompt_lengths[batch[0]], reverse=True)
        calls = torch.tensor([len(batches)], device=self.accelerator.device)
        for number in range(int(self.accelerator.gather(calls).max())):
            yield (batches[number], True) if number < len(batches) else ([0], False)


def plan_batches(lengths: Sequence[int], batch_size: int, most_tokens: int) -> list[list[int]]:
    """Group the indices of `lengths` by length, longest first, so that a lack of memory shows immediately.

    A batch has at most `batch_size` indices and, padded to its longest, `most_tokens` tokens, or else one index.
    """
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batches, start = [], 0
    while start < len(lengths):
        size = max(1, min(batch_size, most_tokens // max(1, lengths[longest_first[start]])))
        batches.append(longest_first[start : start + size])
        start += size
    return batches
