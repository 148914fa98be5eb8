"""What trains a method's full-rank weights and protected LoRA factors: two engines behind one interface.

* `DenseEngine`, the reference: `ProjAdamW` on complete weights, in one process.
* `CoreEngine` (`zero_core.py`): small trainable cores beside frozen weights, which DeepSpeed can shard. It must equal
  the reference, and the tests check that it does.

A method describes in a `Plan` what trains and is protected, and does not ask which engine it gets. Calls in order:

    engine = make_engine(model, plan, cores=...)
    optimizer = engine.create_optimizer(factors, lr=..., betas=..., eps=..., weight_decay=...)
    engine.begin_training(optimizer, deepspeed)        # DeepSpeed's engine, or None
    engine.begin_micro_batch(is_last)                  # before each forward pass; is_last: the optimizer steps after it
    engine.effective_weights()                         # by name, (out, in), differentiable: in a penalty
    engine.state_dict(), engine.load_state_dict(state) # between two steps
    engine.first_moments()                             # after the last step; by name, one matrix or two to multiply
    engine.report()                                    # see `ProjAdamW.projection_report`
    engine.finish(partitioned)                         # the targets hold what was trained, see `exact_weight`
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from errors import InputError
from Proj_torch.adamw import ProjAdamW
from Proj_torch.plan import Plan
from Proj_torch.zero_core import CoreEngine


def make_engine(
    model: nn.Module, plan: Plan, *, cores: bool, eps_before_correction: bool = False
) -> "DenseEngine | CoreEngine":
    """The engine that trains `plan.targets` of `model`: a `CoreEngine`, as DeepSpeed needs, if `cores`.

    `eps_before_correction`, as in `ProjAdamW`, is for `DenseEngine` only. Raises InputError where a rank, a setting or
    a space does not fit, and with cores for `gp_second` or a target that is no plain linear layer.
    """
    if not cores:
        return DenseEngine(plan, eps_before_correction)
    if plan.way == "gp_second":
        raise InputError("--protect: found gp_second with cores; allowed: --galore_engine dense in one process")
    both = sorted(name for name in plan.targets if type(model.get_submodule(name)) is not nn.Linear)
    if both:  # a core takes the layer's place
        raise InputError(f"--optim_target_modules: matches {both[0]}, a {type(model.get_submodule(both[0])).__name__}; "
                         "with cores, which --bf16 and DeepSpeed choose, only an nn.Linear without a LoRA is allowed; "
                         "in one process --bf16 False --galore_engine dense trains it")
    return CoreEngine(model, plan)


def report_line(report: Mapping[str, Mapping[str, float]]) -> str:
    """An engine's `report()` in one line."""
    if not report:
        return "projection: no weight"
    keys = ("steps", "refreshes", "energy")
    steps, refreshes, energies = ([weight[key] for weight in report.values()] for key in keys)
    return (
        f"projection: {len(report)} weights, {sum(steps)} steps, {sum(refreshes)} refreshes, last bases held "
        f"{min(energies):.0%} to {max(energies):.0%} of the gradient's energy"
    )


class DenseEngine:
    """`ProjAdamW` on complete weights; its methods are described at the head of this file.

    Attributes:
        own_state: whether it trains other parameters than the model's own, which need `state_dict` in a checkpoint.
    """

    name = "ProjAdamW"
    own_state = False

    def __init__(self, plan: Plan, eps_before_correction: bool = False):
        self.plan = plan
        self.eps_before_correction = eps_before_correction
        self.weights = {name: layer.weight for name, layer in plan.targets.items()}
        for weight in self.weights.values():
            weight.requires_grad_(True)

    def create_optimizer(self, factors: Mapping[str, nn.Parameter], **adam: Any) -> ProjAdamW:
        free = {name: factor for name, factor in factors.items() if name not in self.plan.factors}
        projected = self._protected(self.weights) | self.plan.projection
        groups = [group for group in (_group(free), self._protected(self.plan.factors), projected) if group["params"]]
        self.optimizer = ProjAdamW(groups, **adam, eps_before_correction=self.eps_before_correction)
        return self.optimizer

    def _protected(self, params: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        spaces = [self.plan.spaces.get(name) for name in params]
        if all(S is None for S in spaces):
            return _group(params)
        return _group(params) | {"scale_mats": spaces, "protect_side": self.plan.side, self.plan.way: True}

    def _nothing(self, *_: Any) -> None:
        """Do nothing: these calls have no work to do where the optimizer updates complete weights."""

    begin_training = begin_micro_batch = load_state_dict = finish = _nothing

    def effective_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()

    def first_moments(self) -> dict[str, tuple[Tensor, ...]]:
        params = {**self.plan.factors, **self.weights}
        return {name: self.optimizer.first_moment_factors(param) for name, param in params.items()}

    def report(self) -> dict[str, dict[str, float]]:
        return self.optimizer.projection_report()

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def _group(params: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    return {"params": list(params.values()), "param_names": list(params)}
