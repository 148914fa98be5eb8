"""Online EWC (Schwarz et al., ICML 2018, https://arxiv.org/abs/1805.06370) on one LoRA that all tasks train.

    loss += 1/2 lambda sum decay F (theta - theta*)^2

theta* is the LoRA as the previous task saved it, F the diagonal of the empirical Fisher information: after a task,
F <- decay F + the mean over the task's examples of the squared gradient of log p(answer | prompt), taken one example at
a time without dropout. EWC (Kirkpatrick et al., PNAS 2017) keeps theta* and F of every task; here one of each suffices.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.hf_argparser import HfArg

from errors import check, check_number
from files import read_tensors
from methods.base_options import LoraArguments
from methods.seqlora import Seqlora
from ranks import sum_over_ranks

FISHER_FILE = "fisher.safetensors"


@dataclass
class EwcArguments(LoraArguments):
    ewc_lamda: float = HfArg(default=100.0, help="Weight lambda of the penalty; 0: off.")
    ewc_decay: float = HfArg(default=1.0, help="Factor on earlier tasks' F.")

    def __post_init__(self):
        super().__post_init__()
        check_number(self, "ewc_lamda", least=0)
        check(0 < self.ewc_decay <= 1, "ewc_decay", self.ewc_decay, "above 0, at most 1")


class Ewc(Seqlora):
    Arguments = EwcArguments
    shown_examples, shares_examples = None, True

    def prepare(self, model, previous: Path | None, **kind):
        model = super().prepare(model, previous, **kind)
        self.fisher, self.start = {}, {}
        if previous is not None:
            self.fisher, _ = read_tensors(previous / FISHER_FILE)
            self.check_like_factors(self.fisher, previous / FISHER_FILE)
        return model

    def begin_task(self, model, batches):
        self.start = {name: factor.detach().to(torch.float32, copy=True) for name, factor in self.factors()
                      if name in self.fisher}  # fmt: skip

    def begin_training(self, deepspeed=None):
        super().begin_training(deepspeed)
        for name, factor in self.factors() if self.fisher else ():  # DeepSpeed has moved them to their device by now
            self.fisher[name] = self.fisher[name].to(factor.device)
            self.start[name] = self.start[name].to(factor.device)

    def penalty(self):
        if not self.options.ewc_lamda or not self.fisher:
            return None
        weight = 0.5 * self.options.ewc_lamda * self.options.ewc_decay
        # In float32: lamda F times fp16's loss scale may overflow before the small theta - theta* is applied.
        changes = {name: factor.float() - self.start[name] for name, factor in self.factors()}
        terms = [(self.fisher[name] * change.square()).sum() for name, change in changes.items()]
        return weight * torch.stack(terms).sum()

    def revisit(self, model, batches):
        model = self.model  # not DeepSpeed's engine, which would take these gradients for a training step's
        names, factors = zip(*self.factors())
        sums = [torch.zeros_like(factor, dtype=torch.float32) for factor in factors]
        rows = torch.zeros((), device=factors[0].device)
        training = model.training
        model.eval()
        for batch in batches:
            for row in range(len(batch["labels"])):
                one = {key: of[row : row + 1] if torch.is_tensor(of) else of for key, of in batch.items()}
                answer = (one["labels"] != -100).sum()
                loss = model(**one, use_cache=False).loss * answer
                gradients = torch.autograd.grad(loss, factors, allow_unused=True)  # an expert that the row misses
                for total, gradient in zip(sums, gradients):
                    total += 0 if gradient is None else gradient.float().square()
                rows += 1
        model.train(training)
        sum_over_ranks(*sums, rows)
        old = {name: self.options.ewc_decay * F for name, F in self.fisher.items()}
        self.fisher = {name: total / rows + old.get(name, 0) for name, total in zip(names, sums)}

    def save(self, folder: Path):
        super().save(folder)
        save_file({name: F.cpu() for name, F in self.fisher.items()}, folder / FISHER_FILE)

    def describe(self):
        return (f"{super().describe()}; {'regularised by' if self.fisher and self.options.ewc_lamda else 'no'} Fisher "
                "information of earlier tasks")
