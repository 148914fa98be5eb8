"""The evaluation loop against the plainest one, a row at a time: the same answers, whatever shares a batch."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, MixtralConfig, MptConfig

from evaluation.generate import Prediction, plan_batches
from helpers import ROOT
from model.answer_loss import causal_class
from model.loading import load_model_and_tokenizer
from uie_collator import DataCollatorForUIE
from uie_dataset_lora import ExampleOptions, load_uie_dataset

MOST = 12
GREEDY = {"max_new_tokens": MOST, "num_beams": 1, "repetition_penalty": 1.0, "do_sample": False}
FAMILIES = ["tiny-t5", "tiny-llama"]


@pytest.fixture(scope="module", params=FAMILIES)
def taught(request, mini_benchmark):
    """A tiny model that has learned to answer two datasets, and test rows of four in file order.

    The labels of agnews and yahoo are replaced by shorter ones, so that their rows' answers go past the bound.
    """
    config = ROOT / "configs" / "order1_configs"
    options = ExampleOptions(mini_benchmark, ROOT / "configs" / "instruction_config.json")

    def rows(dataset: str, split: str, count: int) -> list[dict]:
        loaded = load_uie_dataset(config / dataset, options)[split]
        return [row for row in loaded if row["Dataset"] == dataset][:count]

    loaded = load_model_and_tokenizer(str(ROOT / "initial_model" / request.param))
    collator = DataCollatorForUIE(
        loaded.tokenizer, decoder_only=loaded.decoder_only, max_source_length=512, max_target_length=50
    )
    teach(loaded.model, collator, rows("dbpedia", "train", 160) + rows("agnews", "train", 160))
    test = [row for name in ("dbpedia", "agnews", "yahoo", "amazon") for row in rows(name, "test", 12)]
    for row in test:
        if row["Dataset"] in ("agnews", "yahoo"):
            row["Instance"]["label"] = "a"
    return SimpleNamespace(model=loaded.model.eval(), collator=collator, rows=test)


def teach(model, collator, rows) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        picked = torch.randint(len(rows), (16,)).tolist()
        model(**collator([rows[index] for index in picked])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def prediction(taught, rows=None, **options) -> Prediction:
    settings = {"generation": GREEDY, "batch_size": 16, "most_tokens": 2000, "accelerator": Accelerator(cpu=True),
                "shares_prefix": taught.collator.decoder_only}  # fmt: skip
    return Prediction(taught.model, taught.collator, taught.rows if rows is None else rows, **settings | options)


def plain(taught, generation=GREEDY) -> torch.Tensor:
    """Ids (rows, MOST) of every row's answer, each from a call of its own with the full bound."""
    pad = taught.collator.tokenizer.pad_token_id
    answers = torch.full((len(taught.rows), MOST), pad)
    for row, answer in zip(taught.rows, answers):
        batch = taught.collator([row])
        prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
        generated = taught.model.generate(**prompt, **generation)[0]
        new = generated[prompt["input_ids"].shape[1] if taught.collator.decoder_only else 1 :].tolist()
        end = taught.collator.tokenizer.eos_token_id
        new = new[: new.index(end) + 1] if end in new else new
        answer[: len(new)] = torch.tensor(new)
    return answers


class Calls:
    """Records the batches that a prediction generates: (rows, bound) each."""

    def __init__(self, prediction: Prediction):
        self.made, self._generate = [], prediction._generate
        prediction._generate = self

    def __call__(self, examples, bound):
        self.made.append((len(examples), bound))
        return self._generate(examples, bound)


def test_answers_are_those_of_a_row_alone_also_past_the_bound(taught):
    evaluated = prediction(taught)
    calls = Calls(evaluated)
    found, expected = evaluated.answers(), plain(taught)
    assert torch.equal(found, expected)
    again = sum(rows for rows, bound in calls.made if bound == MOST)
    assert any(bound < MOST for _, bound in calls.made)
    assert 0 < again < len(taught.rows), "some rows must go past the bound and some must not"
    assert sum(rows for rows, _ in calls.made) <= len(taught.rows) + again  # none is generated a third time
    ended = (expected == taught.collator.tokenizer.eos_token_id).any(1)
    assert ended.any() and len({tuple(row) for row in expected.tolist()}) > 3  # something was learned


def test_shorter_prompts_of_a_batch_attend_to_the_common_prefix():
    """The arguments for `generate`, token by token: prefix, padding, rest."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    evaluated = SimpleNamespace(model=causal_class(config, "llama")(config))
    found = Prediction._after_common_prefix(
        evaluated, torch.tensor([[5, 6, 7, 8], [0, 0, 5, 9]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    )
    assert found["past_key_values"].get_seq_length() == 1
    assert found["input_ids"].tolist() == [[5, 6, 7, 8], [5, 0, 0, 9]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 1]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


@pytest.mark.parametrize("config, expected", [(LlamaConfig(), True), (MptConfig(), False)])
def test_distances_that_count_padding_allow_no_cached_prefix(config, expected):
    assert Prediction._sees_all(SimpleNamespace(model=SimpleNamespace(config=config)), 9) is expected


def test_the_common_prefix_is_computed_once_a_batch(taught):
    """That answers stay the same, `test_answers_are_those_of_a_row_alone_also_past_the_bound` shows."""
    if not taught.collator.decoder_only:
        pytest.skip("an encoder reads the whole prompt")
    tokens = {}
    for shares in (False, True):
        seen = tokens[shares] = []
        hook = taught.model.get_input_embeddings().register_forward_hook(
            lambda _, ids, __, seen=seen: seen.append(tuple(ids[0].shape))
        )
        prediction(taught, shares_prefix=shares, batch_size=12).answers()
        hook.remove()
    prompts = [(rows, length) for rows, length in tokens[True] if length > 1]
    beginnings, rests = prompts[::2], prompts[1::2]
    assert all(rows == 1 and length > 10 for rows, length in beginnings) and all(rows > 1 for rows, _ in rests)
    assert sum(map(numpy.prod, tokens[True])) < 0.9 * sum(map(numpy.prod, tokens[False]))


def test_answers_under_a_repetition_penalty(taught):
    generation = GREEDY | {"repetition_penalty": 1.3}
    assert torch.equal(prediction(taught, generation=generation).answers(), plain(taught, generation))


def test_no_bound_where_it_could_change_an_answer(taught):
    generation = GREEDY | {"num_beams": 2}
    evaluated = prediction(taught, generation=generation)
    calls = Calls(evaluated)
    assert torch.equal(evaluated.answers(), plain(taught, generation))
    assert {bound for _, bound in calls.made} == {MOST}


def test_where_every_row_rambles_few_are_generated_twice(taught):
    rows = [row for row in taught.rows if row["Dataset"] in ("agnews", "yahoo")] * 2
    evaluated = prediction(taught, rows, batch_size=4)
    evaluated.bounds = dict.fromkeys(evaluated.bounds, 1)
    calls = Calls(evaluated)
    evaluated.answers()
    assert 0 < sum(rows for rows, bound in calls.made if bound == 1) <= len(rows) / 4 + 4


@pytest.mark.parametrize("batch_size, most_tokens", [(1, 10_000), (5, 10_000), (64, 300)])
def test_answers_and_loss_do_not_depend_on_the_batches(taught, batch_size, most_tokens):
    other = prediction(taught, batch_size=batch_size, most_tokens=most_tokens)
    whole = prediction(taught, batch_size=len(taught.rows), most_tokens=10**6)
    assert torch.equal(other.answers(), whole.answers())
    assert other.loss() == pytest.approx(whole.loss(), rel=1e-5)


def test_a_mixtures_balance_is_no_part_of_the_loss(taught):
    config = MixtralConfig(vocab_size=len(taught.collator.tokenizer), hidden_size=16, intermediate_size=24,
                           num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
                           output_router_logits=True, router_aux_loss_coef=1.0)  # fmt: skip
    torch.manual_seed(0)
    experts = causal_class(config, "mixtral")(config).eval()
    collator = copy.copy(taught.collator)
    collator.decoder_only = True
    one = SimpleNamespace(model=experts, collator=collator, rows=taught.rows[:12])
    losses = [prediction(one, batch_size=size).loss() for size in (1, 12)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_are_tokenised_in_portions_without_a_gap(taught, monkeypatch):
    whole = prediction(taught)
    monkeypatch.setattr("evaluation.generate.TOKENISED_AT_ONCE", 5)  # does not divide the number of rows
    parts = prediction(taught)
    assert list(parts.prompt_lengths) == list(range(len(taught.rows)))
    assert (parts.prompt_lengths, parts.bounds) == (whole.prompt_lengths, whole.bounds)


def test_an_evaluation_keeps_no_graph(taught):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(1), lambda kept: kept):
        evaluated = prediction(taught)
        evaluated.loss(), evaluated.answers()
    assert not kept


def test_loss_weighs_every_answer_token_alike(taught):
    total = tokens = 0
    for row in taught.rows:
        alone = prediction(taught, [row])
        count = (taught.collator([row])["labels"] != -100).sum().item()
        total, tokens = total + alone.loss() * count, tokens + count
    assert prediction(taught).loss() == pytest.approx(total / tokens, rel=1e-5)


def test_batches_are_sorted_full_and_within_both_limits():
    lengths = [5, 90, 7, 300, 6, 88, 5, 5, 91, 1000]
    batches = plan_batches(lengths, batch_size=3, most_tokens=280)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches] == [1, 1, 3, 3, 2]  # a row above the limit goes alone
    assert plan_batches([], 3, 280) == []


@pytest.mark.parametrize("ranks", [2, 3, 50])
def test_ranks_share_the_rows_and_call_the_model_equally_often(taught, ranks):
    """Ranks as threads that meet wherever they gather; 50 ranks are more than there are rows."""
    gathering = Gathering(ranks)
    parts = [prediction(taught, accelerator=gathering.accelerator(rank)) for rank in range(ranks)]
    calls = [Calls(part) for part in parts]
    with ThreadPoolExecutor(ranks) as threads:
        answers = list(threads.map(Prediction.answers, parts))
        losses = list(threads.map(Prediction.loss, parts))
    alone = prediction(taught)
    expected = alone.answers()
    assert all(torch.equal(found, expected) for found in answers)
    assert losses == pytest.approx([alone.loss()] * ranks, rel=1e-5)
    assert len({len(call.made) for call in calls}) == 1


class Gathering:
    """Stands in for the collective of `ranks` threads."""

    def __init__(self, ranks: int):
        self.tensors = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)

    def accelerator(self, rank: int) -> SimpleNamespace:
        def gather(tensor):
            self.tensors[rank] = tensor
            self.barrier.wait()
            together = torch.cat(self.tensors)
            self.barrier.wait()
            return together

        return SimpleNamespace(
            process_index=rank, num_processes=len(self.tensors), device=torch.device("cpu"), gather=gather
        )
