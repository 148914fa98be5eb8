"""The collator: what the model reads, what the loss sees, and that the answer survives every cut."""

import json
import re

import pytest
import torch
from tokenizers import processors

from compute_metrics import exact_match
from errors import InputError
from helpers import (
    DECODERS,
    ENCODER_DECODERS,
    GOLDEN,
    IGNORED,
    REAL_BENCHMARK,
    Benchmark,
    byt5,
    collator,
    example,
    gpt2,
    kept,
    llama,
    llama_of_the_hub,
    merging,
    t5,
    text,
)
from token_ids import KeptIds, shared_ids
from uie_dataset_lora import prompt_parts


@pytest.fixture(scope="session")
def golden_rows(tmp_path_factory):
    """(task, dataset) -> its one row, for each split of the golden benchmark."""
    benchmark = Benchmark(tmp_path_factory.mktemp("golden"))
    for (task, dataset), (labels, sentence, label, _) in GOLDEN.items():
        benchmark.add(task, dataset, labels, [{"label": label, "sentence": sentence}])
    loaded = benchmark.load()
    return {split: {(row["Task"], row["Dataset"]): row for row in rows} for split, rows in loaded.items()}


def prompt_of(row):
    return "".join(prompt_parts(row, add_task_name=True, add_dataset_name=True))


# The golden cases


@pytest.mark.parametrize("build", ENCODER_DECODERS)
@pytest.mark.parametrize("key", GOLDEN, ids="/".join)
def test_encoder_decoder_golden(tokenizers, golden_rows, build, key):
    tokenizer = tokenizers[build]
    _, _, label, prompt = GOLDEN[key]
    other = example("short", "A")
    batch = collator(tokenizer, False)([other, golden_rows["train"][key]])
    source = kept(batch["input_ids"][1], batch["attention_mask"][1])
    target = batch["labels"][1][batch["labels"][1] != IGNORED].tolist()
    expected = " ".join(prompt.split()) if build is t5 else prompt  # T5 has no piece for a newline
    assert text(tokenizer, source) == expected
    assert text(tokenizer, target) == label
    assert source.count(tokenizer.eos_token_id) == target.count(tokenizer.eos_token_id) == 1
    assert source[-1] == target[-1] == tokenizer.eos_token_id
    assert batch["labels"].shape == (2, len(target)) and batch["input_ids"].shape == (2, len(source))


@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.parametrize("key", GOLDEN, ids="/".join)
def test_decoder_training_golden(tokenizers, golden_rows, build, key):
    tokenizer = tokenizers[build]
    _, _, label, prompt = GOLDEN[key]
    batch = collator(tokenizer, True)([example("short", "A"), golden_rows["train"][key]])
    length = batch.pop("answer_length")
    row = {name: values[1] for name, values in batch.items()}
    masked = kept(row["input_ids"], row["attention_mask"].bool() & (row["labels"] == IGNORED))
    learnt = kept(row["input_ids"], row["labels"] != IGNORED)
    assert text(tokenizer, masked) == prompt
    assert text(tokenizer, learnt).removeprefix(" ") == label
    assert learnt[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in learnt[:-1]
    assert row["labels"][row["labels"] != IGNORED].tolist() == learnt
    assert row["input_ids"][-len(learnt) :].tolist() == learnt
    assert batch["labels"].shape == batch["input_ids"].shape == (2, len(masked) + len(learnt))
    assert (batch["labels"] != IGNORED).sum(1).max() == length


@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_decoder_evaluation_golden(tokenizers, golden_rows, build, split):
    tokenizer = tokenizers[build]
    rows = [golden_rows[split][key] for key in GOLDEN]
    batch = collator(tokenizer, True)(rows)
    for index, (_, _, label, prompt) in enumerate(GOLDEN.values()):
        source = kept(batch["input_ids"][index], batch["attention_mask"][index])
        target = batch["labels"][index]
        assert text(tokenizer, source) == prompt
        assert batch["input_ids"][index][-len(source) :].tolist() == source
        assert text(tokenizer, target[target != IGNORED].tolist()).removeprefix(" ") == label
        assert (target != IGNORED).tolist() == sorted((target != IGNORED).tolist(), reverse=True)
    assert batch["labels"].shape[1] == (batch["labels"] != IGNORED).sum(1).max() < batch["input_ids"].shape[1]


@pytest.mark.parametrize("build", DECODERS)
def test_decoder_generates_from_what_it_was_trained_on(tokenizers, golden_rows, build):
    collate = collator(tokenizers[build], True)
    for key in GOLDEN:
        train, test = (collate([golden_rows[split][key]]) for split in ("train", "test"))
        prompt, answer = test["input_ids"][0].tolist(), test["labels"][0].tolist()
        assert train["input_ids"][0].tolist() == prompt + answer
        assert train["labels"][0].tolist() == [IGNORED] * len(prompt) + answer


@pytest.mark.parametrize("build, space", [(llama, "▁"), (llama_of_the_hub, "▁"), (gpt2, "Ġ")])
def test_an_answer_begins_with_one_space(tokenizers, build, space):
    tokenizer = tokenizers[build]
    batch = collator(tokenizer, True)([example("text", "positive", subset="test")])
    assert "".join(tokenizer.convert_ids_to_tokens(batch["labels"][0].tolist()[:-1])) == f"{space}positive"


def test_the_merging_tokenizer_does_merge_across_the_cue(tokenizers):
    tokenizer = tokenizers[merging]
    cue, joined = (tokenizer(text, add_special_tokens=False).input_ids for text in ("\nAnswer:", "\nAnswer: A"))
    assert joined[: len(cue)] != cue


@pytest.mark.parametrize("build, count", [(llama, 1), (llama_of_the_hub, 1), (gpt2, 0)])
@pytest.mark.parametrize("subset", ["train", "test"])
def test_bos_stands_once_if_the_tokenizer_adds_it(tokenizers, build, count, subset):
    tokenizer = tokenizers[build]
    spelt_out = f"a {tokenizer.bos_token} b {tokenizer.eos_token}"
    batch = collator(tokenizer, True)([example(spelt_out, subset=subset), example("longer " * 9, subset=subset)])
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        source = kept(ids, mask)
        if subset == "train":
            assert source.pop() == tokenizer.eos_token_id
        assert source.count(tokenizer.bos_token_id) == count
        assert (source[0] == tokenizer.bos_token_id) == bool(count)
        assert source.count(tokenizer.eos_token_id) == 0


def test_all_that_the_tokenizer_puts_in_front_of_a_text_is_kept():
    """As GLM's [gMASK]<sop>; an EOS behind the text is not."""
    tokenizer = llama_of_the_hub()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> <s> $A </s>", special_tokens=[("<unk>", 0), ("<s>", 1), ("</s>", 2)])
    [ids] = collator(tokenizer, True)([example("a", subset="test")])["input_ids"].tolist()
    whole = tokenizer(prompt_of(example("a"))).input_ids
    assert ids[:2] == [0, 1] and ids == whole[:-1]


@pytest.mark.parametrize("subset", ["train", "test"])
def test_no_result_depends_on_the_choice_of_padding(subset):
    tokenizer = llama()
    rows = [example("short", "A", subset=subset), example("longer " * 9, subset=subset)]
    batches = []
    for pad in (None, "<s>", "</s>", "<unk>"):
        tokenizer.pad_token = pad
        batches.append(collator(tokenizer, True)(rows))
    for batch in batches[1:]:
        for name in ("attention_mask", "labels"):
            assert torch.equal(batch[name], batches[0][name])
        real = batch["attention_mask"].bool()
        assert torch.equal(batch["input_ids"][real], batches[0]["input_ids"][real])


FAMILIES = [(t5, False, "train"), (t5, False, "test"), (llama, True, "train"), (llama, True, "test")]
PAIR = [("short", "A"), ("longer " * 9, "very negative")]


@pytest.mark.parametrize("build, decoder_only, subset", FAMILIES)
def test_padding_side(tokenizers, build, decoder_only, subset):
    batch = collator(tokenizers[build], decoder_only)([example(*pair, subset=subset) for pair in PAIR])
    mask, learnt = batch["attention_mask"][0].tolist(), (batch["labels"][0] != IGNORED).tolist()
    assert mask == sorted(mask, reverse=not decoder_only) and set(mask) == {0, 1}
    answer_in_input = decoder_only and subset == "train"
    assert learnt == sorted(learnt, reverse=not answer_in_input) and set(learnt) == {False, True}


@pytest.mark.parametrize("build, decoder_only, subset", FAMILIES)
@pytest.mark.parametrize("multiple", [8, 7, 64])
def test_pad_to_multiple_of_moves_nothing(tokenizers, build, decoder_only, subset, multiple):
    rows = [example(*pair, subset=subset) for pair in PAIR]
    plain = collator(tokenizers[build], decoder_only)(rows)
    padded = collator(tokenizers[build], decoder_only, pad_to_multiple_of=multiple)(rows)
    for name, fill in (("input_ids", tokenizers[build].pad_token_id), ("attention_mask", 0), ("labels", IGNORED)):
        extra = padded[name].shape[1] - plain[name].shape[1]
        on_left = decoder_only and (name != "labels" or subset == "train")
        kept_part = padded[name][:, extra:] if on_left else padded[name][:, : plain[name].shape[1]]
        assert padded[name].shape[1] % multiple == 0 and 0 <= extra < multiple
        assert torch.equal(kept_part, plain[name])
        assert fill is None or (padded[name] == fill).sum() - (plain[name] == fill).sum() == 2 * extra


# Truncation


LONG = "paragraph: " + "the river is wide and slow here, " * 40
MULTIRC = f"{LONG}\nquestion: How wide is it?\ncandidate answer: very"


@pytest.mark.parametrize("build, decoder_only", [(t5, False), (byt5, False), (llama, True), (gpt2, True)])
@pytest.mark.parametrize("subset", ["train", "test"])
def test_only_the_right_end_of_the_longest_line_is_cut(tokenizers, build, decoder_only, subset):
    tokenizer, limit, row = tokenizers[build], 300, example(MULTIRC, subset=subset)
    assert len(tokenizer(prompt_of(row)).input_ids) > limit
    batch = collator(tokenizer, decoder_only, max_source_length=limit)([row])
    in_prompt = batch["attention_mask"][0].bool()
    if decoder_only and subset == "train":
        in_prompt &= batch["labels"][0] == IGNORED
    ids = kept(batch["input_ids"][0], in_prompt)
    head, _, tail = prompt_parts(row, add_task_name=True, add_dataset_name=True)
    before, after = head, f"\nquestion: How wide is it?\ncandidate answer: very{tail}"
    found = text(tokenizer, ids)
    if build is t5:
        before, after = " ".join(head.split()), after.replace("\n", " ")
        found = re.sub(r"\s+", " ", found)
    assert found.startswith(before) and found.endswith(after)
    paragraph = found.removeprefix(before).removesuffix(after).strip()
    assert LONG.startswith(paragraph) and len(paragraph) > 100
    assert limit - 12 < len(ids) <= limit  # the width is the greatest: less than one more word of room is left
    labels = batch["labels"][0]
    assert text(tokenizer, labels[labels != IGNORED].tolist()).removeprefix(" ") == "very negative"


def test_lines_of_like_length_are_cut_alike(tokenizers):
    sentence = "sentence 1: " + "a" * 200 + "\nsentence 2: " + "b" * 150 + "\nkept whole"
    batch = collator(tokenizers[byt5], False, max_source_length=200)([example(sentence)])
    lines = text(tokenizers[byt5], kept(batch["input_ids"][0], batch["attention_mask"][0])).split("\n")
    first, second, third, cue = lines[-4:]
    assert len(first) == len(second) < 150 and (third, cue) == ("kept whole", "Answer:")
    assert first == sentence[: len(first)] and second.startswith("sentence 2: bbb")
    assert batch["input_ids"].shape[1] in (199, 200)


@pytest.mark.parametrize("build, decoder_only", [(t5, False), (byt5, False), (llama, True)])
@pytest.mark.parametrize("lines", [60, 150, 300])
def test_of_many_short_lines_the_first_stay_as_they_are(tokenizers, build, decoder_only, lines):
    sentence = "\n".join(["the river is wide and slow here"] * lines)
    row = example(sentence, subset="test")
    made = collator(tokenizers[build], decoder_only, max_source_length=400)
    batch = made([row])
    found = " ".join(text(tokenizers[build], kept(batch["input_ids"][0], batch["attention_mask"][0])).split())
    uncut = " ".join(sentence.split())
    start = found.index("the river is wide")
    left = found[start:].removesuffix("Answer:").rstrip()
    assert uncut.startswith(left) and len(left) > 250 and batch["input_ids"].shape[1] > 380


def test_prompts_that_do_not_fit_are_counted_again_in_a_later_task(tokenizers):
    rows = [example(MULTIRC), example("short"), example(MULTIRC, subset="test")]
    for _ in ("first task", "later task, whose collator finds the ids kept"):
        assert collator(tokenizers[llama], True, max_source_length=300).count_cut(rows) == 2
    assert collator(tokenizers[llama], True, max_source_length=2000).count_cut(rows) == 0


@pytest.mark.parametrize("decoder_only", [False, True])
def test_of_more_lines_than_tokens_the_first_stay(tokenizers, decoder_only):
    sentence = "\n".join(f"line {number}" for number in range(300))
    made = collator(tokenizers[byt5], decoder_only, max_source_length=200)
    made.check([example(sentence)])
    batch = made([example(sentence, subset="test")])
    found = text(tokenizers[byt5], kept(batch["input_ids"][0], batch["attention_mask"][0]))
    assert "line 0\nline 1\nline 2" in found and found.endswith("\nAnswer:")
    assert batch["input_ids"].shape[1] in (199, 200)


def test_training_has_room_for_a_full_prompt_and_a_full_answer(tokenizers):
    tokenizer = tokenizers[byt5]
    batch = collator(tokenizer, True, max_source_length=100, max_target_length=30)([example("x" * 500, "y" * 28)])
    assert batch["input_ids"].shape[1] == 100 + 30
    assert (batch["labels"] != IGNORED).sum() == 30


# Bad input


@pytest.mark.parametrize("build, decoder_only", [(byt5, False), (byt5, True)])
def test_a_head_that_does_not_fit(tokenizers, build, decoder_only):
    row = example("some text", head="h" * 100 + "\n")
    prompt = prompt_of(example("", head="h" * 100 + "\n"))
    needed = len(prompt) + (not decoder_only)  # EOS
    with pytest.raises(InputError) as error:
        collator(tokenizers[build], decoder_only, max_source_length=needed - 1)([row])
    assert str(error.value) == (
        f"mine, train example 7: the prompt without its sentence needs {needed} tokens; "
        f"allowed: --max_source_length {needed - 1}"
    )
    assert collator(tokenizers[build], decoder_only, max_source_length=needed)([row])


@pytest.mark.parametrize("decoder_only, needed", [(False, 11), (True, 12)])
def test_an_answer_that_does_not_fit(tokenizers, decoder_only, needed):
    with pytest.raises(InputError) as error:
        collator(tokenizers[byt5], decoder_only, max_target_length=needed - 1)(
            [example("x", "0123456789", subset="dev")]
        )
    assert str(error.value) == (
        f"mine, dev example 7: the answer '0123456789' needs {needed} tokens; allowed: --max_target_length {needed - 1}"
    )
    assert collator(tokenizers[byt5], decoder_only, max_target_length=needed)([example("x", "0123456789")])


def test_a_tokenizer_without_eos():
    tokenizer = gpt2()
    tokenizer.eos_token = None
    with pytest.raises(InputError) as error:
        collator(tokenizer, True)
    assert str(error.value) == "--model_name_or_path: found a tokenizer without an EOS token; allowed: one with it"


# The record


def test_every_batch_is_recorded_as_read(tokenizers, tmp_path, monkeypatch):
    path = tmp_path / "record.jsonl"
    collate = collator(tokenizers[byt5], False, max_source_length=100, input_record_file=path)
    rows = [example("naïve\nlines"), example("y" * 300, "A")]
    collate(rows)
    collate(rows[:1])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == ["very negative", "A", "very negative"]
    assert lines[0] == lines[2] == {"source": prompt_of(rows[0]), "label": "very negative"}
    assert len(lines[1]["source"]) == 99 and lines[1]["source"].endswith("yyy\nAnswer:")
    assert "naïve" in path.read_text(encoding="utf-8")
    monkeypatch.setenv("RANK", "1")  # left over from something else
    collate(rows)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5
    monkeypatch.setenv("LOCAL_RANK", "1")
    collate(rows)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5


def test_a_record_that_cannot_be_written(tokenizers, tmp_path):
    path = tmp_path / "missing" / "record.jsonl"
    with pytest.raises(InputError) as error:
        collator(tokenizers[byt5], False, input_record_file=path)
    assert str(error.value) == (
        f"--input_record_file {path}: cannot be written (No such file or directory); "
        "allowed: a file in an existing folder"
    )


# Real data


@pytest.mark.skipif(not REAL_BENCHMARK.is_dir(), reason="the small real benchmark is not here")
@pytest.mark.parametrize("build, decoder_only", [(t5, False), (llama, True)])
def test_rows_of_the_small_benchmark_get_through(tokenizers, tmp_path, build, decoder_only):
    benchmark = Benchmark(tmp_path)
    benchmark.data = REAL_BENCHMARK
    for labels in REAL_BENCHMARK.glob("*/*/labels.json"):
        for listed in benchmark.listed.values():
            listed[labels.parts[-3]].append({"dataset name": labels.parts[-2]})
    benchmark.configure()
    tokenizer = tokenizers[build]
    collate = collator(tokenizer, decoder_only, max_source_length=1024, max_target_length=50)
    for rows in benchmark.load().values():
        for batch in rows.shard(4, 0).iter(64):  # every fourth row: all of them take half a minute
            examples = [{name: values[index] for name, values in batch.items()} for index in range(len(batch["Task"]))]
            collated = collate(examples)
            for index, row in enumerate(examples):
                labels = collated["labels"][index]
                answer = text(tokenizer, labels[labels != IGNORED].tolist())
                assert answer.removeprefix(" ") == row["Instance"]["label"]


# What is kept


class Counted:
    """A tokenizer that counts the texts it is given."""

    def __init__(self, tokenizer):
        self.texts, self._tokenizer = 0, tokenizer

    def __call__(self, texts=None, *args, **kwargs):
        self.texts += 1 if isinstance(texts, str) else len(texts or kwargs["text_target"])
        return self._tokenizer(texts, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("build, decoder_only", [(t5, False), (llama, True), (byt5, False)])
@pytest.mark.parametrize("subset", ["train", "test"])
def test_a_row_met_again_is_not_tokenised_again_and_is_the_same(tokenizers, build, decoder_only, subset):
    shared_ids.cache_clear()
    rows = [example("short", "A", subset=subset), example("cut " * 400, "B", subset=subset)]
    counted = Counted(tokenizers[build])
    collate = collator(counted, decoder_only, max_source_length=200)
    first, met = collate(rows), counted.texts
    lengths = collate.lengths(rows)
    again = collate(rows[::-1])
    assert counted.texts == met
    assert lengths == [
        (prompt, len(answer))
        for prompt, answer in zip((collate([row])["attention_mask"].sum().item() - decoder_only * (subset == "train")
                                   * len(answer) for row, answer in zip(rows, collate._answers(rows))),
                                  collate._answers(rows))
    ]  # fmt: skip
    assert first.pop("answer_length", None) == again.pop("answer_length", None)
    for name, tensor in first.items():
        assert torch.equal(again[name], tensor.flip(0))


def test_what_is_kept_serves_the_collator_of_the_next_task_but_no_other_rules(tokenizers):
    shared_ids.cache_clear()
    rows = [example("short"), example("cut " * 400)]
    first = collator(tokenizers[llama], True, max_source_length=200)(rows)
    counted = Counted(llama())  # built anew, as the next task does
    again = collator(counted, True, max_source_length=200)
    before = counted.texts
    assert torch.equal(again(rows)["input_ids"], first["input_ids"]) and counted.texts == before
    for rules in ((tokenizers[llama], True, 150), (tokenizers[t5], False, 200)):
        with_kept = collator(*rules[:2], max_source_length=rules[2])(rows)["input_ids"]
        shared_ids.cache_clear()
        alone = collator(*rules[:2], max_source_length=rules[2])(rows)["input_ids"]
        assert torch.equal(with_kept, alone) and alone.shape != first["input_ids"].shape


def test_what_is_kept_is_bounded(tokenizers):
    kept_ids = KeptIds(most=10)
    asked = []

    def encode(indices):
        asked.append(indices)
        return [[index] * 4 for index in indices]

    texts = ["a", "b", "c"]
    assert kept_ids.look_up(texts, encode) == kept_ids.look_up(texts, encode) == [[0] * 4, [1] * 4, [2] * 4]
    assert asked == [[0, 1, 2], [2]]
    kept_ids.look_up(texts, encode)[0].append(9)
    assert kept_ids.look_up(["a"], encode) == [[0] * 4]  # a caller's list is its own


# Answers that the tokenizer cannot write

WRITABLE = ["very negative", "Science & Mathematics", "A. first", "a-b", "a , b", "do n't", "C++", "<b>", "{x}", "a  b"]
UNWRITABLE = ["½", "①", "ﬁne", "naïve", "x²", "Ａ", "中", "é", "e\u0301", "10 €", "~", "^", "Σ", "+", "ß", "İ"]
"""With a vocabulary of English pieces and without bytes for the rest."""


@pytest.mark.parametrize("build", [t5, *DECODERS], ids=lambda build: build.__name__)
def test_an_answer_is_accepted_only_if_it_can_be_scored_correct(build, tokenizers):
    collate, accepted = collator(tokenizers[build], build is not t5), []
    for label in WRITABLE + UNWRITABLE:
        try:
            collate.check([example("text", label)])
            accepted.append(label)
        except InputError as error:
            assert f"the answer {label!r} becomes " in str(error)
    assert accepted == (WRITABLE if build is t5 else WRITABLE + UNWRITABLE)
    for label in accepted:  # as evaluation reads an answer: with its end, and padding behind it
        batch = collate([example("text", label, subset="test")])["labels"]
        written = collate.decode(torch.where(batch == IGNORED, tokenizers[build].pad_token_id or 0, batch))
        assert exact_match(written[0], label)


def test_free_text_that_the_tokenizer_changes_is_counted(tokenizers, caplog):
    rows = [example("text", answer) | {"Metric": "rougeL"} for answer in ("naïve", "中文", "中文", "plain words")]
    collator(tokenizers[t5], False).check(rows)
    assert "mine: the tokenizer does not reproduce 2 different answers" in caplog.text
    caplog.clear()
    collator(tokenizers[byt5], False).check(rows)
    assert caplog.text == ""
