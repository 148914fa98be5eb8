"""Train two tasks, one after the other, with a method of src/methods in a plain PyTorch loop.

    [ -d data/mini_benchmark ] || python data/mini_benchmark.py
    PYTHONPATH=src python examples/loop.py [METHOD]
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from methods import make_method
from task_examples import sample_places

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "initial_model" / "tiny-t5"
TASKS = {"TC/dbpedia": "Which topic does this text belong to? Answer with one of the options.\n",
         "SC/amazon": "Which sentiment does this text express? Answer with one of the options.\n"}  # fmt: skip
# See docs/OPTIONS.md; a method ignores those that only others read.
OPTIONS = {"lora_modules": ".*SelfAttention.(q|v).*", "optim_target_modules": ".*EncDecAttention.(q|v).*",
           "lora_dropout": 0.0, "galore_rank": 16, "galore_lr": 3e-3}  # fmt: skip
SEED, BATCH, LEARNING_RATE = 42, 8, 3e-3
tokenizer = AutoTokenizer.from_pretrained(BASE)


def read(data, task, split):
    """Pairs of a prompt and its answer."""
    rows, labels = (json.loads((data / task / f"{name}.json").read_text()) for name in (split, "labels"))
    return [(f"{TASKS[task]}Option: {', '.join(labels)} \n{row['sentence']}\nAnswer:", row["label"]) for row in rows]


def collate(pairs):
    prompts, answers = map(list, zip(*pairs))
    batch = tokenizer(prompts, text_target=answers, padding=True, return_tensors="pt")
    batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
    return batch


def train(method, previous, pairs, epochs):
    base = AutoModelForSeq2SeqLM.from_pretrained(BASE, dtype=torch.float32)
    model = method.prepare(base, previous, decoder_only=False).train()
    rows = [pairs[place] for place in sample_places(len(pairs), method.shown_examples)]
    shown = [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    method.begin_task(model, iter(shown))
    optimizer = method.create_optimizer(lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    method.begin_training()
    for epoch in range(epochs):
        for chosen in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SEED + epoch)).split(BATCH):
            method.begin_micro_batch(is_last=True)  # an optimizer step follows every batch
            loss, penalty = model(**collate([pairs[index] for index in chosen])).loss, method.penalty()
            (loss if penalty is None else loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    method.revisit(model, iter(shown))
    method.end_task()
    return model.eval(), loss.item()


def accuracy(model, pairs):
    prompts = tokenizer([prompt for prompt, _ in pairs], padding=True, return_tensors="pt")
    texts = tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=20), skip_special_tokens=True)
    return sum(text.strip() == answer for text, (_, answer) in zip(texts, pairs)) / len(pairs)


def main(name="sgorp", data=ROOT / "data/mini_benchmark", out=ROOT / "logs_and_outputs/loop", epochs=10, most=400):
    previous = None
    for task in TASKS:
        set_seed(SEED)
        method = make_method(name, **OPTIONS)
        assert method.reads == "no", f"{name} reads other tasks' files"
        model, loss = train(method, previous, read(data, task, "train")[:most], epochs)
        method.save(previous := out / name / task)
        print(f"{task}: loss {loss:.3f}, accuracy", {each: accuracy(model, read(data, each, "test")) for each in TASKS})


if __name__ == "__main__":
    print(__doc__) if {"-h", "--help"} & {*sys.argv} else main(*sys.argv[1:2])
