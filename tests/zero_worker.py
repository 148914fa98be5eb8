"""One rank of a training run with the core engine; `torchrun` starts it, `test_zero_core.py` reads what it writes.

    torchrun --nproc_per_node 2 tests/zero_worker.py CASES.json RESULTS.pt

CASES.json is a list of keyword arguments of `Case`; every case is trained from scratch in this one launch, on the
global batches that `dense` takes in one process.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from full_rank import exact_weight  # noqa: E402
from non_finite import NonFiniteGuard  # noqa: E402
from Proj_torch.adamw import ProjAdamW  # noqa: E402
from Proj_torch.optimizer_state import MOMENTS, start_moments  # noqa: E402
from Proj_torch.plan import Plan  # noqa: E402
from Proj_torch.proj_projector import product  # noqa: E402
from Proj_torch.zero_core import CoreEngine  # noqa: E402
from ranks import disconnect  # noqa: E402

TARGETS = {
    "net": ("first", "second", "third"),
    "t5": tuple(f"decoder.block.{layer}.layer.1.EncDecAttention.{part}" for layer in (0, 1) for part in "qv"),
    "llama": tuple(f"model.layers.{layer}.mlp.gate_proj" for layer in (0, 1)),
}
LR, ROWS = 5e-3, 8


@dataclass(frozen=True)
class Case:
    """A run: `stage` None is plain PyTorch, "ddp" DistributedDataParallel, a number DeepSpeed's ZeRO stage."""

    name: str
    stage: int | str | None = None
    model: str = "net"
    proj_type: str = "std"
    refresh: str = "exact"
    accumulation: int = 1
    recompute: str = ""  # gradient checkpointing: "reentrant" or "saved tensors"
    weight_decay: float = 0.0
    scale: float = 0.5
    gap: int = 4
    rank: int = 3
    steps: int = 16
    side: str = ""  # protected side, "" for no protected space
    way: str = "gp_first"  # in which S acts on the targets; from a factor's gradient it is removed
    precision: str = "fp32"
    stop_at: int = 0  # save after this many steps and go on from the file in a new model
    bad_steps: tuple[int, ...] = ()  # whose loss is infinite on one rank, so that they are left out
    zero_steps: tuple[int, ...] = ()  # whose gradients are zero, so that a refresh finds no basis
    eps: float = 1e-8
    penalty: float = 0.0  # on the change of a weight
    factor: bool = False  # the head's weight is protected too, as a LoRA factor is


class Net(nn.Module):
    """Tall, wide and square targets, with and without bias, and a layer that trains in the ordinary way."""

    def __init__(self, recompute: str = ""):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(10, 16)
        self.second = nn.Linear(16, 12, bias=False)
        self.third = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 5)
        self.recompute = recompute

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.third(torch.tanh(self.second(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        x = checkpoint(self.body, x, use_reentrant=self.recompute == "reentrant") if self.recompute else self.body(x)
        return self.head(x)


def build(case: Case) -> nn.Module:
    """The model, in which the targets train and, in the ordinary way, everything else of `Net` or the norms."""
    if case.model == "net":
        return Net(case.recompute)
    import transformers

    torch.manual_seed(0)
    if case.model == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    for name, param in model.named_parameters():
        param.requires_grad_("norm" in name or name.removesuffix(".weight") in TARGETS[case.model])
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": case.recompute == "reentrant"})
    return model.train()


def loss_of(case: Case, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if case.model == "net":
        return (model(x) - y).float().square().mean()
    return model(input_ids=x, labels=y).loss


def batch(step: int, model: str = "net") -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, (ROWS, 7, 10) and (ROWS, 7, 5), or tokens and labels (ROWS, 7)."""
    generator = torch.Generator().manual_seed(100 + step)
    if model != "net":
        x = torch.randint(2, 32, (ROWS, 7), generator=generator)
        return x, x if model == "llama" else x.flip(1)
    x = torch.randn(ROWS, 7, 10, generator=generator)
    teacher = torch.randn(10, 5, generator=torch.Generator().manual_seed(7))
    return x, torch.tanh(x @ teacher)


def rate(step: int) -> float:
    return 1.0 - 0.03 * step


def spaces(case: Case, net: nn.Module) -> dict[str, torch.Tensor]:
    if not case.side:
        return {}
    generator = torch.Generator().manual_seed(3)
    sizes = {name: net.get_submodule(name).weight.shape[case.side == "input"] for name in TARGETS[case.model]}
    return {name: torch.linalg.qr(torch.randn(n, 2, generator=generator)).Q for name, n in sizes.items()}


def factor_space(case: Case) -> torch.Tensor:
    size = {"output": 5, "input": 12}[case.side]
    return torch.linalg.qr(torch.randn(size, 2, generator=torch.Generator().manual_seed(4))).Q


def penalty(case: Case, weights: list[torch.Tensor], starts: list[torch.Tensor]) -> torch.Tensor | float:
    """A penalty on the change of the first target, zero nowhere near the start."""
    return case.penalty * (weights[0] - starts[0] + 0.1).square().sum() if case.penalty else 0.0


def dense(case: Case) -> dict:
    """The reference: one process, ProjAdamW on the whole batch."""
    net = build(case)
    weights = [net.get_submodule(name).weight for name in TARGETS[case.model]]
    others = [p for p in net.parameters() if p.requires_grad and all(p is not w for w in weights)]
    group = {"params": weights, "lr": LR, "weight_decay": case.weight_decay, "rank": case.rank, "scale": case.scale,
             "update_proj_gap": case.gap, "proj_type": case.proj_type,
             "svd": "lowrank" if case.refresh == "lowrank" else "exact"}
    if case.side:
        group |= {"scale_mats": list(spaces(case, net).values()), "protect_side": case.side,
                  case.way: True}
    groups = [group, {"params": others, "lr": LR}]
    if case.factor:
        groups[1]["params"] = [p for p in others if p is not net.head.weight]
        groups.append({"params": [net.head.weight], "lr": LR, "scale_mats": [factor_space(case)],
                       "protect_side": case.side, "gp_first": True})
    optimizer = ProjAdamW(groups, lr=LR, eps=case.eps)
    starts = [w.detach().clone() for w in weights]
    losses = []
    for step in range(case.steps):
        if step in case.bad_steps:
            continue
        for group in optimizer.param_groups:
            group["lr"] = LR * rate(step)
        x, y = batch(step, case.model)
        loss = loss_of(case, net, x, y) + penalty(case, weights, starts)
        optimizer.zero_grad()
        (loss * 0.0 if step in case.zero_steps else loss).backward()
        optimizer.step()
        losses.append(loss.item())
    refreshes = optimizer.projection_report()["0.0"]["refreshes"]
    columns = {"weights": [w.detach() for w in weights], "starts": starts,
               "moments": [optimizer.get_first_moment(w) for w in weights]}
    by_name = {key: dict(zip(TARGETS[case.model], column, strict=True)) for key, column in columns.items()}
    return {"losses": losses, "refreshes": refreshes} | by_name


class Run:
    """A model, its core engine and optimizer, and the way they step."""

    def __init__(self, case: Case):
        self.case = case
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.net = build(case)
        if case.stage is None and case.precision != "fp32":
            self.net.to(torch.bfloat16)
        targets = {name: self.net.get_submodule(name) for name in TARGETS[case.model]}
        factors = {"head": self.net.head.weight} if case.factor else {}
        plan = Plan(
            targets, {"rank": case.rank, "update_proj_gap": case.gap, "scale": case.scale, "svd": case.refresh,
                      "proj_type": case.proj_type, "lr": LR},
            factors, spaces(case, self.net) | ({"head": factor_space(case)} if case.factor else {}),
            case.side or "output", case.way,
        )  # fmt: skip
        self.cores = CoreEngine(self.net, plan)
        cores = {layer.core for layer in self.cores.layers.values()}
        others = [p for p in self.net.parameters() if p.requires_grad and p not in cores]
        groups = [{"params": others, "lr": LR, "weight_decay": 0.0},
                  *self.cores.core_groups(case.weight_decay)]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, eps=case.eps)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.model, self.engine = self.net, None
        if case.stage == "ddp":
            self.model = nn.parallel.DistributedDataParallel(self.net)
        elif case.stage is not None:
            self._deepspeed()
        self.cores.begin_training(self.optimizer, self.engine)
        self.starts = [w.detach().clone() for _, w in self.cores.effective_weights()] if case.penalty else []
        self.guard = NonFiniteGuard(limit=99, watch_gradients=case.precision != "fp16")
        self.guard.watch(self.optimizer, (*others, *cores))

    def _deepspeed(self) -> None:
        import deepspeed

        case = self.case
        config = {
            "train_micro_batch_size_per_gpu": ROWS // self.world // case.accumulation,
            "gradient_accumulation_steps": case.accumulation,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
        }
        if case.precision == "bf16":
            config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        elif case.precision == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
        self.engine, *_ = deepspeed.initialize(model=self.net, optimizer=self.optimizer, config=config)
        self.model = self.engine

    def micro_batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = (t[self.rank :: self.world].contiguous() for t in batch(step, self.case.model))
        return list(zip(*(t.chunk(self.case.accumulation) for t in own), strict=True))

    def train(self, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = lr * rate(step)
            total = torch.zeros(())
            pairs = self.micro_batches(step)
            for number, (x, y) in enumerate(pairs, 1):
                self.cores.begin_micro_batch(is_last=number == len(pairs))
                loss = loss_of(self.case, self.model, x, y)
                if self.case.penalty:
                    weights = [weight for _, weight in self.cores.effective_weights()]
                    assert step > 0 or all(torch.equal(*pair) for pair in zip(weights, self.starts))  # no change yet
                    loss = loss + penalty(self.case, weights, self.starts)
                total += loss.detach() / len(pairs)
                if step in self.case.bad_steps and self.rank == self.world - 1:
                    loss = loss * torch.inf
                if step in self.case.zero_steps:
                    loss = loss * 0.0
                self.guard.note_micro_batch(step + 1, loss, [])
                self.backward(loss / len(pairs) if self.engine is None else loss, number == len(pairs))
            if step in self.case.bad_steps:
                continue
            if dist.is_initialized():
                dist.all_reduce(total)
            losses.append(total.item() / self.world)
        return losses

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        if self.engine is not None:
            self.engine.backward(loss)
            self.engine.step()
            return
        loss.backward()
        if is_last:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self) -> dict[str, torch.Tensor]:
        state = self.cores.state_dict()
        cores = {layer.core for layer in self.cores.layers.values()}
        for name, param in self.net.named_parameters():
            if param.requires_grad and param not in cores:
                state[f"rest.{name}"] = self.cores.optimizer_state.read_master(param).clone()
                for key in MOMENTS:
                    state[f"rest.{name}.{key}"] = self.cores.optimizer_state.read_moment(param, key).clone()
        return state

    def load(self, state: dict[str, torch.Tensor]) -> None:
        if self.engine is not None:
            x, y = self.micro_batches(0)[0]
            start_moments(self.engine, self.optimizer, lambda: loss_of(self.case, self.model, x, y))
        moments = {}
        for name, param in self.net.named_parameters():
            if f"rest.{name}" in state:
                self.cores.optimizer_state.write_master(param, state[f"rest.{name}"])
                moments[param] = {key: state[f"rest.{name}.{key}"] for key in MOMENTS}
        self.cores.optimizer_state.write_moments(moments, int(state["step"]))
        self.cores.load_state_dict(state)

    def result(self, losses: list[float]) -> dict:
        moments = {name: product(factors) for name, factors in self.cores.first_moments().items()}
        result = {"losses": losses, "moments": moments}
        self.cores.finish(partitioned=True)
        return result | {"weights": self.trained_weights(), "report": self.cores.report()}

    def trained_weights(self) -> dict[str, torch.Tensor]:
        weights = {}
        for name, layer in self.cores.plan.targets.items():
            with self.cores.optimizer_state.gathered([layer.weight]):
                weights[name] = exact_weight(layer).detach().to("cpu", copy=True)
        return weights


def run(case: Case) -> dict:
    one, state = Run(case), {}
    losses = one.train(0, case.stop_at)
    if case.stop_at:
        state = one.save()
        one = Run(case)
        one.load(state)
    return one.result(losses + one.train(case.stop_at, case.steps)) | {"state": state}


def allow_fp16_on_a_cpu() -> None:
    """DeepSpeed refuses fp16 on a CPU without fast kernels for it; PyTorch computes it on any, slowly."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class AnyCPU(CPU_Accelerator):
        def is_fp16_supported(self) -> bool:
            return True

    set_accelerator(AnyCPU())


def main() -> None:
    torch.set_num_threads(1)
    allow_fp16_on_a_cpu()
    cases = [Case(**fields) for fields in json.loads(Path(sys.argv[1]).read_text())]
    if any(isinstance(case.stage, int) for case in cases):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    results = {case.name: run(case) for case in cases}
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[2])  # nested dictionaries of tensors and numbers
    disconnect()


if __name__ == "__main__":
    main()
