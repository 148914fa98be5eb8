"""Train two tasks of custom prompts and answers with `sgorp` and with `olora`, under Hugging Face's stock Trainer.

    PYTHONPATH=src python examples/own_trainer.py

With TRL: `class MethodSFTTrainer(MethodHooks, SFTTrainer)`, see docs/METHODS.md.
"""

import math
import sys
from itertools import islice
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from transformers import Trainer, TrainingArguments, set_seed

from methods import make_method

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "initial_model" / "tiny-llama"
OPTIONS = {  # see docs/OPTIONS.md; a method ignores those that only others read
    "lora_modules": ".*self_attn.(q_proj|v_proj).*", "optim_target_modules": ".*mlp.gate_proj.*", "lora_dropout": 0.0,
    "galore_rank": 16, "galore_lr": 3e-3,
}  # fmt: skip
TASKS = {  # prompts and answers
    "living": [(f"Is {thing} an animal or a plant?\nAnswer:", answer) for thing, answer in (
        ("a dog", "animal"), ("a rose", "plant"), ("a horse", "animal"), ("a tree", "plant"), ("a bird", "animal"))],
    "edible": [(f"Can one eat {thing}?\nAnswer:", answer) for thing, answer in (
        ("bread", "yes"), ("stone", "no"), ("cheese", "yes"), ("glass", "no"), ("rice", "yes"))],
}  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(BASE, pad_token="</s>")


class MethodHooks:
    """Make a trainer call the hooks of `method`, which has prepared the trainer's model."""

    def __init__(self, *args, method, **kwargs):
        self.method = method
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model=None):
        args = self.args
        self.method.begin_task(self.model, self.shown_batches())
        self.optimizer = self.method.create_optimizer(lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                                                      eps=args.adam_epsilon, weight_decay=args.weight_decay)
        self.method.begin_training()
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.method.begin_micro_batch(is_last=self.accelerator.sync_gradients)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and (penalty := self.method.penalty()) is not None:
            # Counts once per optimizer step. If the Trainer does not count answer tokens, it divides the sum itself.
            loss = loss + penalty / (self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1)
        return (loss, outputs) if return_outputs else loss

    def shown_batches(self):
        rows = self.method.shown_examples  # the first ones, so the dataset should be shuffled; None: all
        most = rows and math.ceil(rows / self.args.eval_batch_size)
        return islice(self.get_eval_dataloader(self.train_dataset), most)

    def end_task(self, folder):
        self.method.revisit(self.model, self.shown_batches())
        self.method.end_task()
        self.method.save(folder)


class MethodTrainer(MethodHooks, Trainer):
    """Hugging Face's Trainer, with a method."""


def encode(prompt, answer):
    start = tokenizer(prompt).input_ids
    end = tokenizer(f" {answer}", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return {"input_ids": start + end, "labels": [-100] * len(start) + end}


def main(name, out=ROOT / "logs_and_outputs" / "own_trainer", epochs=20):
    rows = {task: [encode(*pair) for pair in pairs] for task, pairs in TASKS.items()}
    previous = None
    for task in TASKS:
        set_seed(42)
        method = make_method(name, **OPTIONS)
        model = method.prepare(AutoModelForCausalLM.from_pretrained(BASE, dtype="float32"), previous, decoder_only=True)
        args = TrainingArguments(out, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=3e-3,
                                 num_train_epochs=epochs, save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = MethodTrainer(model, args, DataCollatorForSeq2Seq(tokenizer), rows[task], method=method)
        trainer.train()
        trainer.end_task(previous := out / name / task)
        print(f"{name} after {task}: loss", {each: trainer.evaluate(rows[each])["eval_loss"] for each in TASKS})


if __name__ == "__main__":
    print(__doc__) if sys.argv[1:] else (main("sgorp"), main("olora"))
