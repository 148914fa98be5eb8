"""GaLore in sequence (Zhao et al., ICML 2024): full-rank weights by a low-rank gradient projection, and nothing else.

`ProjAdamW`, with the `galore_` options, trains the weights named by `--optim_target_modules`, from task to task,
without a LoRA and without a protected space. The paper trains every other parameter too, by plain Adam; here they
stay frozen, so that the weights are those that GORP changes.
"""

from dataclasses import dataclass

from errors import InputError
from methods.base import FullRankMethod
from methods.base_options import ProjectionArguments
from module_matching import check_rank
from Proj_torch.adamw import ProjAdamW
from Proj_torch.engine import report_line


@dataclass
class GaloreArguments(ProjectionArguments):
    def unread(self):
        return ("learning_rate",)


class Galore(FullRankMethod):
    Arguments = GaloreArguments

    def prepare(self, model, previous, *, decoder_only, sharded=False):
        if self.options.galore_engine == "cores":
            raise InputError("--galore_engine: found cores; allowed: auto or dense with --method galore")
        model = super().prepare(model, previous, decoder_only=decoder_only)
        check_rank(self.targets, self.options.galore_rank, "--galore_rank")
        for layer in self.targets.values():
            layer.weight.requires_grad_(True)
        return model

    def create_optimizer(self, **adam):
        weights = {"params": [layer.weight for layer in self.targets.values()], "param_names": list(self.targets)}
        # A schedule takes an absolute minimum as a share of the optimizer's own learning rate.
        self.optimizer = ProjAdamW([weights | self.options.projection()], **adam | {"lr": self.options.galore_lr})
        return self.optimizer

    def closing_summary(self) -> list[str]:
        return [report_line(self.optimizer.projection_report())]
