"""GORP (Wang et al., ACL 2025, https://doi.org/10.18653/v1/2025.acl-long.721): the paper's method.

For each task:

1. A new LoRA trains on `--lora_modules`, and the weights of `--optim_target_modules` train at full rank, their
   gradients G projected to rank k by bases taken from G at every `--galore_update_proj_gap`-th step.
2. S is the shared gradient space of earlier tasks, one orthonormal basis for each protected LoRA factor and full-rank
   weight. A (projected) gradient R becomes R - S S^T R before Adam.
3. M is Adam's first moment when the task ends. S grows by the fewest leading left singular vectors of M - S S^T M that
   make it hold a share `--space_energy` of M's energy. The new LoRA joins the old one, which is frozen.

Points 1 and 2 are the engine's work (`Proj_torch/engine.py`, `Proj_torch/adamw.py`), point 3 that of `subspace.py` and
`loranew`. The paper, the code that its authors released and this project differ in places: docs/DEVIATIONS.md.
`--preset released` computes what the released scripts compute; `sgorp.py` is this project's variant.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from errors import InputError, check
from loranew import loranew_layers
from methods.base import LoraMethod
from methods.base_modules import choose_modules
from methods.base_options import ChangePenaltyArguments, LoraArguments, ProjectionArguments, SpaceArguments
from module_matching import check_float32, check_rank, holds_small_changes, match_linear, match_names
from Proj_torch.engine import Plan, make_engine, report_line
from subspace import GradientSpace, layer_inputs

logger, detail = logging.getLogger("gorp"), logging.getLogger("gorp.detail")
SPACE_FILE = "gradient_space.safetensors"

# What a clean run of the released scripts computes, whatever flags it passes: options of the method and Hugging Face's.
RELEASED = {
    "protect": "none", "lamda_1": 0.0, "lamda_2": 0.0, "lamda_3": 0.0,
    "galore_svd": "exact", "galore_engine": "dense", "merge_old": False,
    "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "weight_decay": 0.0, "label_smoothing_factor": 0.0,
    "bf16": False, "fp16": False, "gradient_checkpointing": False, "deepspeed": None,
}  # fmt: skip

NOT_REPRODUCED = (
    "preset released computes what the released scripts compute: no protection, no penalty, full-rank changes "
    "discarded after each task; not reproduced: ranks that train separately, data loading, evaluation "
    "(docs/DEVIATIONS.md)"
)


@dataclass
class GorpArguments(ChangePenaltyArguments, SpaceArguments, ProjectionArguments, LoraArguments):
    def settle(self, training, zero_stage):
        if self.galore_engine == "auto" and training.do_train and training.bf16 and zero_stage is None:
            # 16-bit weights beside small cores; dense gradients need float32 weights.
            self.galore_engine = "dense" if self.protect == "gp_second" else "cores"
        super().settle(training, zero_stage)
        if self.protect == "gp_second" and (zero_stage is not None or self.galore_engine == "cores"):
            engine = "--galore_engine cores" if zero_stage is None else "DeepSpeed"
            raise InputError(f"--protect: found gp_second with {engine}; allowed: only in one process without cores")
        check(self.protect != "gp_second" or self.galore_proj_type != "full", "protect",
              "gp_second with --galore_proj_type full", "gp_first, none, or another projection")
        cores = zero_stage is not None or self.galore_engine == "cores"
        # PyTorch recomputes reentrantly by default; the Trainer changes that only if no settings are given.
        settings = training.gradient_checkpointing and training.gradient_checkpointing_kwargs
        reentrant = bool(settings) and settings.get("use_reentrant", True)
        check(not (self.lamda_3 and cores and reentrant), "lamda_3", f"{self.lamda_3} with reentrant checkpointing",
              "0, or use_reentrant false (else a core's gradient arrives in two parts)")


class Gorp(LoraMethod):
    """The paper's method; with `--preset released`, what the released scripts compute."""

    Arguments = GorpArguments
    presets = {"released": RELEASED}

    def __init__(self, options):
        super().__init__(options)
        self.float32_base = options.galore_engine == "dense"
        self.released = self.averages_micro_batches = options.preset == "released"
        self.protects = options.protect != "none"
        self.idle = {name for name in vars(options) if self.released and name in RELEASED}
        self.idle |= set() if self.protects else options.of_space()

    def keeps_changes(self):
        # The released code saves the LoRA alone: the next task starts from the base's full-rank weights again.
        return not (self.released and self.trains)

    def prepare(self, model, previous: Path | None, *, decoder_only: bool, sharded: bool = False):
        options = self.options
        choose_modules(options, model)
        self.targets = match_linear(model, options.optim_target_modules, "--optim_target_modules")
        check_rank(self.targets, options.galore_rank, "--galore_rank")
        self.idle |= set() if self.targets else {*options.of_projection(), "lamda_3"}
        self.changed |= self.targets
        model = super().prepare(model, previous, decoder_only=decoder_only)
        for layer in loranew_layers(model).values():
            layer.shared_dropout = self.released
        factors, ending = dict(self.factors()), ".loranew_A.weight" if self.protects_A_alone() else ""
        named = match_names(factors, options.proj_lora_modules, "--proj_lora_modules", ending)
        self.protected = {name: factors[name] for name in named}
        if not self.targets and not self.protected:
            raise InputError(f"--method {options.method}: neither --optim_target_modules nor --proj_lora_modules is "
                             "given, so nothing would be projected or protected; give one, or use --method inclora")
        weights = {**self.protected, **{name: layer.weight for name, layer in self.targets.items()}}
        self.space = GradientSpace(options.protect_side, options.space_energy)
        if self.protects and previous is not None:
            if (previous / SPACE_FILE).exists():
                self.space.load(previous / SPACE_FILE, weights)
            else:
                logger.warning("%s: has no %s, so nothing of earlier tasks is protected", previous, SPACE_FILE)
        plan = Plan(self.targets, options.projection(), self.protected, self.spaces(weights), options.protect_side,
                    self.way())  # fmt: skip
        self.engine = make_engine(model.get_base_model(), plan, cores=sharded or self.needs_cores(),
                                  eps_before_correction=self.released)  # fmt: skip
        self.own_state = self.engine.own_state
        return model

    def needs_cores(self) -> bool:
        """Whether small cores train in one process: as told, or by default beside weights in 16 bits.

        Raises:
            InputError: dense gradients of weights in 16 bits.
        """
        engine = self.options.galore_engine
        exact = all(map(holds_small_changes, self.targets.values()))
        if engine == "cores" or exact or not self.trains:
            return engine == "cores"
        if engine == "dense" or self.options.protect == "gp_second":
            check_float32(self.targets, f"--method {self.full_name} with dense gradients")
        return True

    def spaces(self, names) -> dict[str, torch.Tensor]:
        """S of each of the named factors and weights that has one."""
        return {name: S for name in names if (S := self.space.get(name)) is not None}

    def way(self) -> str:
        """How S acts, in ProjAdamW's terms."""
        return self.options.protect

    def protects_A_alone(self) -> bool:
        """Whether A, which sees the layer's input, is the only factor that can be protected."""
        return self.options.space_from == "inputs"

    # Training

    def create_optimizer(self, **adam):
        self.optimizer = self.engine.create_optimizer(dict(self.factors()), **adam)
        return self.optimizer

    def begin_training(self, deepspeed=None) -> None:
        super().begin_training(deepspeed)
        self.engine.begin_training(self.optimizer, deepspeed)
        weights = self.engine.effective_weights() if self.options.lamda_3 else ()
        self.start = {name: weight.detach().clone() for name, weight in weights}

    def begin_micro_batch(self, is_last: bool) -> None:
        self.engine.begin_micro_batch(is_last)

    def penalty(self):
        terms = self.lora_penalties()
        for name, weight in self.engine.effective_weights() if self.options.lamda_3 else ():
            change = weight - self.start[name]
            distance = torch.linalg.norm(change @ change.T - torch.eye(len(change), device=change.device))
            terms.append(self.options.lamda_3 * distance)
        return torch.stack(terms).sum() if terms else None

    def training_state(self):
        state = {f"cores.{name}": value for name, value in self.engine.state_dict().items()}
        return super().training_state() | state

    def load_training_state(self, saved):
        mine = {name: value for name, value in saved.items() if name.startswith("cores.")}
        super().load_training_state({name: value for name, value in saved.items() if name not in mine})
        self.engine.load_state_dict({name.removeprefix("cores."): value for name, value in mine.items()})

    # Finishing

    def revisit(self, model, batches) -> None:
        if self.protects and self.options.space_from == "inputs":
            layers = {name: name for name in self.targets}
            layers |= {name: name.removesuffix(".loranew_A.weight") for name in self.protected}
            base = self.model.get_base_model()
            self.needed = layer_inputs(model, {name: base.get_submodule(at) for name, at in layers.items()}, batches)

    def end_task(self) -> None:
        self.projection = self.engine.report()
        if self.protects:
            self.space.extend(self.needed if self.options.space_from == "inputs" else self.engine.first_moments())
        for line in self.space.describe():
            detail.info(line)
        self.needed, self.start = {}, {}  # evaluation needs their memory
        self.engine.finish(self.partitioned)
        super().end_task()

    def save(self, folder: Path) -> None:
        super().save(folder)
        if not self.protects and self.previous is not None and (self.previous / SPACE_FILE).exists():
            shutil.copy(self.previous / SPACE_FILE, folder)  # a later task may protect again
        else:
            self.space.save(folder / SPACE_FILE)

    def summary(self) -> list[str]:
        options = self.options
        how = (f"full-rank weights: projection {options.galore_proj_type}, new bases every "
               f"{options.galore_update_proj_gap} steps, learning rate {options.galore_lr}, engine {self.engine.name}; "
               f"shared space of {len(self.protected)} LoRA factors and {len(self.targets)} full-rank weights: "
               f"{options.protect} on the {options.protect_side} side, from {options.space_from}")
        return [*super().summary(), how, *([NOT_REPRODUCED] if self.released else [])]

    def sizes(self):
        total, trained = super().sizes()
        if self.engine.own_state:  # a core stands for the weight that it trains
            cores = sum(layer.core.numel() for layer in self.engine.layers.values())
            total, trained = total - cores, trained - cores + self.projected_values()
        return total, trained

    def projected_values(self) -> int:
        """How many values the full-rank weights have."""
        return sum(layer.weight.numel() for layer in self.targets.values())

    def describe(self) -> str:
        space = f"{self.space.total()} directions of earlier tasks protected" if self.protects else "nothing protected"
        if full := sum(S is not None and S.shape[0] == S.shape[1] for S in map(self.space.get, self.protected)):
            space += f"; {full} of {len(self.protected)} protected factors do not train: S holds all their directions"
        return (f"{super().describe()}, {self.projected_values():,} in {len(self.targets)} full-rank weights "
                f"(gradients projected to rank {self.options.galore_rank}); {space}")

    def closing_summary(self) -> list[str]:
        return [report_line(self.projection), *([self.space.line()] if self.protects else [])]
