"""`--preset released` against an independent reference of the authors' released code (`released_reference.py`).

A toy model in float64 trains two tasks under the real trainer. The reference gets its base weights, the LoRA factors
that each task started from and the batches that the trainer asked for; everything else it computes itself.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from command_line import parse_arguments
from loranew import loranew_layers
from methods import find_method
from Proj_torch import ProjAdamW
from released_reference import Adam, Rules, space, train_tasks
from uie_trainer_lora import UIETrainer

LORA = ["attn.q", "attn.v"]
FULL_RANK = ["cross.tall", "cross.wide", "cross.square"]
RANK, ALPHA, GAP, SCALE, LR, GALORE_LR = 2, 5.0, 4, 0.7, 2e-2, 1e-2
STEPS, ACCUMULATION, ROWS, PLACES, VOCABULARY = 12, 2, 3, 6, 11
FLAGS = [
    "--lora_modules", "attn[.](q|v)", "--optim_target_modules", "cross[.].*", "--lora_dim", str(RANK),
    "--lora_alpha", str(ALPHA), "--galore_rank", str(RANK), "--galore_update_proj_gap", str(GAP),
    "--galore_scale", str(SCALE), "--learning_rate", str(LR), "--galore_lr", str(GALORE_LR),
    "--max_steps", str(STEPS), "--gradient_accumulation_steps", str(ACCUMULATION),
    "--per_device_train_batch_size", str(ROWS), "--lr_scheduler_type", "constant", "--do_train", "--use_cpu",
    "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True", "--model_name_or_path", "toy",
]  # fmt: skip
RELEASED = ["--preset", "released", "--lora_dropout", "0"]
PLAIN = ["--lora_dropout", "0", "--lamda_1", "0", "--galore_svd", "exact", "--galore_engine", "dense"]
SETTINGS = {"lora_scale": ALPHA / RANK, "lr": LR, "galore_lr": GALORE_LR,
            "projection": {"rank": RANK, "gap": GAP, "scale": SCALE}}  # fmt: skip


# The toy


class ToyConfig(PreTrainedConfig):
    model_type = "toy"


class Toy(PreTrainedModel, GenerationMixin):  # PEFT asks for the latter
    """A token's label from its embedding: two LoRA layers and three full-rank ones, square, tall and wide.

    Embedding columns of very different size give Adam gradients down to the size of eps; the large logits give ones
    that clipping at 1 would cut.
    """

    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.attn = nn.ModuleDict({"q": linear(6, 6), "v": linear(6, 8)})
        self.cross = nn.ModuleDict({"tall": linear(8, 10), "wide": linear(10, 5), "square": linear(5, 5)})
        self.head = linear(5, VOCABULARY)

    def forward(self, input_ids=None, labels=None, **kwargs):
        x = self.embedding(input_ids)
        x = self.attn["v"](x + torch.tanh(self.attn["q"](x)))
        x = torch.tanh(self.cross["tall"](torch.tanh(x)))
        x = self.head(torch.tanh(self.cross["square"](torch.tanh(self.cross["wide"](x)))))
        loss = nn.functional.cross_entropy(8 * x.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return SimpleNamespace(loss=loss, logits=x)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def toy() -> Toy:
    model = Toy(ToyConfig()).double()
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    model.embedding.weight.data *= 10.0 ** -torch.arange(6)
    return model


TOY = toy()
BASE = {name.removesuffix(".weight"): value for name, value in TOY.state_dict().items()}


def loss(weights: dict, batch: dict) -> torch.Tensor:
    named = {f"{name}.weight": weight for name, weight in weights.items()}
    return torch.func.functional_call(TOY, named, kwargs=batch).loss


def rows(task: int) -> list[dict]:
    """Sentences whose labels are shifted tokens; the share of places with a label differs much between them."""
    draw = torch.Generator().manual_seed(task)
    made = []
    for number in range(30):
        tokens = torch.randint(VOCABULARY, (PLACES,), generator=draw)
        labels = (tokens * (task + 1) + task) % VOCABULARY
        labels[torch.randperm(PLACES, generator=draw)[: PLACES - 1 if number % 3 else 0]] = -100
        made.append({"input_ids": tokens, "labels": labels})
    return made


class RecordingCollator:
    """Makes batches and keeps them in the order in which the trainer asked for them."""

    def __init__(self):
        self.batches = []

    def __call__(self, examples: list[dict]) -> dict:
        batch = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
        self.batches.append(batch)
        return dict(batch)


# Runs of this project


@dataclass
class TaskEnd:
    """What a task started from, what it met, and what it left in memory and in its folder."""

    started: dict
    steps: list[list[dict]]
    start_weights: dict
    moments: dict
    factors: dict
    weights: dict
    folder: object


def method_of(folder, *flags: str):
    _, _, options, training = parse_arguments([*FLAGS, "--output_dir", str(folder / "out"), "--method", "gorp", *flags])
    return find_method("gorp")(options), training


def run_task(folder, task: int, previous, *flags: str) -> TaskEnd:
    method, training = method_of(folder, *flags)
    torch.manual_seed(task)
    model = method.prepare(toy(), previous, decoder_only=False)
    started = {name: (copy(layer.loranew_A["default"].weight), copy(layer.loranew_B["default"].weight))
               for name, layer in loranew_layers(model).items()}
    start_weights = full_rank_weights(model)
    collator = RecordingCollator()
    trainer = UIETrainer(model=model, args=training, train_dataset=rows(task), eval_dataset=None, processing_class=None,
                         data_collator=collator, method=method, generation={})
    trainer.train()
    assert trainer.state.global_step == STEPS
    met = collator.batches[: STEPS * ACCUMULATION]
    steps = [met[start : start + ACCUMULATION] for start in range(0, len(met), ACCUMULATION)]
    moments = {clean(name): method.optimizer.get_first_moment(parameter)
               for name, parameter in model.named_parameters() if parameter.requires_grad}
    method.end_task()
    left = folder / "adapter"
    left.mkdir(parents=True)
    method.save(left)
    factors = {name: (copy(layer.lora_A["default"].weight), copy(layer.lora_B["default"].weight))
               for name, layer in loranew_layers(model).items()}
    return TaskEnd(started, steps, start_weights, moments, factors, full_rank_weights(model), left)


def run_two_tasks(folder, *flags: str) -> list[TaskEnd]:
    first = run_task(folder / "1", 1, None, *flags)
    return [first, run_task(folder / "2", 2, first.folder, *flags)]


def copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone()


def clean(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")


def full_rank_weights(model) -> dict:
    return {clean(name): copy(value) for name, value in model.named_parameters() if clean(name) in FULL_RANK}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> list[TaskEnd]:
    return run_two_tasks(tmp_path_factory.mktemp("released"), *RELEASED)


def reference(run: list[TaskEnd], rules: Rules = Rules(), **settings):
    """What the reference ends the tasks of a run with, see `train_tasks`."""
    tasks = [(end.started, end.steps) for end in run]
    return train_tasks(loss, BASE, tasks, FULL_RANK, rules, **SETTINGS, **settings)


def difference(run: list[TaskEnd], expected) -> float:
    """The largest, over both tasks, of LoRA factors and full-rank weights."""
    differences = []
    for end, (factors, weights) in zip(run, expected, strict=True):
        assert end.factors.keys() == factors.keys() and end.weights.keys() == set(FULL_RANK)
        pairs = [pair for name in LORA for pair in zip(end.factors[name], factors[name], strict=True)]
        pairs += [(end.weights[name], weights[name]) for name in FULL_RANK]
        assert all(ours.shape == theirs.shape and ours.dtype == torch.float64 for ours, theirs in pairs)
        differences += [(ours - theirs).abs().max().item() for ours, theirs in pairs]
    return max(differences)


# The preset against the reference


def test_released_ends_two_tasks_with_the_factors_and_weights_of_the_reference(released):
    assert difference(released, reference(released)) < 1e-6
    for end in released:  # the comparison is of weights that moved
        assert all((end.weights[name] - BASE[name]).abs().max() > 1e-2 for name in FULL_RANK)
        assert all(B[:, -RANK:].abs().max() > 1e-2 for _, B in end.factors.values())


@pytest.mark.parametrize(
    "altered",
    [{"eps_before_correction": False}, {"mean_of_means": False}, {"keeps_change": True}, {"clip": 1.0}],
    ids=lambda altered: next(iter(altered)),
)
def test_the_comparison_notices_each_point_in_which_the_released_code_is_unusual(altered, released):
    assert difference(released, reference(released, Rules(**altered))) > 1e-4


def test_micro_batches_have_different_numbers_of_answer_tokens(released):
    counts = [[(batch["labels"] != -100).sum().item() for batch in step] for end in released for step in end.steps]
    assert sum(first != second for first, second in counts) > STEPS


def test_full_rank_changes_of_a_released_task_are_gone_in_the_next_one(released):
    first, second = released
    for name in FULL_RANK:
        assert torch.equal(first.start_weights[name], BASE[name])
        assert not torch.equal(first.weights[name], BASE[name])  # there while this task is evaluated
        assert torch.equal(second.start_weights[name], BASE[name])


def test_lora_factors_of_released_tasks_are_stacked(released):
    first, second = released
    for name in LORA:
        for task, end in enumerate(released, 1):
            A, B = end.factors[name]
            assert len(A) == B.shape[1] == task * RANK
        assert torch.equal(second.factors[name][0][:RANK], first.factors[name][0])
        assert torch.equal(second.factors[name][1][:, :RANK], first.factors[name][1])


# Dropout


def trained_layer(folder, previous, *flags: str):
    """A LoRA layer with an old branch and a new one whose B is zero, as it trains."""
    method, _ = method_of(folder, *flags, "--lora_dropout", "0.5")
    return loranew_layers(method.prepare(toy(), previous, decoder_only=False).train())["attn.v"]


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def with_dropout(released, tmp_path):
    """Folder of a first task that trained with dropout: later tasks keep the first one's."""
    return run_task(tmp_path / "first", 1, None, "--preset", "released", "--lora_dropout", "0.5").folder


def test_dropout_of_the_released_mode_is_one_mask_for_both_branches(with_dropout, inputs, tmp_path):
    layer = trained_layer(tmp_path, with_dropout, "--preset", "released")
    assert not torch.equal(layer(inputs), layer(inputs))  # B_new is zero: only the old branch can be noisy
    layer.loranew_A["default"].weight.data = copy(layer.lora_A["default"].weight)
    layer.loranew_B["default"].weight.data = -copy(layer.lora_B["default"].weight)
    torch.testing.assert_close(layer(inputs), layer.get_base_layer()(inputs))  # the same mask: the two cancel


def test_dropout_of_the_released_mode_is_off_in_evaluation(with_dropout, inputs, tmp_path):
    layer = trained_layer(tmp_path, with_dropout, "--preset", "released").eval()
    assert torch.equal(layer(inputs), layer(inputs))


def test_the_old_branch_of_plain_gorp_has_no_dropout(inputs, tmp_path):
    folder = run_task(tmp_path / "first", 1, None, *PLAIN, "--lora_dropout", "0.5").folder
    layer = trained_layer(tmp_path, folder, *PLAIN)
    trained = layer(inputs)
    assert layer.lora_B["default"].weight.abs().max() > 1e-2
    assert torch.equal(trained, layer.eval()(inputs))


# Plain gorp against the same formulas

USUAL = Rules(eps_before_correction=False, mean_of_means=False, keeps_change=True, clip=1.0)
FACTORS = {f"{name}.loranew_A": (name, 0) for name in LORA}  # protected: name of its space -> key of the reference


@pytest.fixture(scope="module")
def protected(tmp_path_factory) -> list[TaskEnd]:
    """Plain gorp with everything protected that can be."""
    return run_two_tasks(tmp_path_factory.mktemp("gorp"), *PLAIN, "--proj_lora_modules", "attn[.](q|v)[.]loranew_A.*")


def spaces_after(run: list[TaskEnd]) -> list[dict]:
    """The shared spaces as each task ends, by the rule of section 10.3 with the exact count."""
    spaces, ends = {}, []
    for end in run:
        spaces = {name: space(spaces.get(name), end.moments[name]) for name in [*FULL_RANK, *FACTORS]}
        ends.append(spaces)
    return ends


def test_plain_gorp_without_protection_is_the_reference_with_every_unusual_point_taken_back(tmp_path):
    run = run_two_tasks(tmp_path, *PLAIN, "--protect", "none")
    assert difference(run, reference(run, USUAL, eps=1e-8)) < 1e-6


def test_plain_gorp_protects_the_space_of_the_first_task_in_the_second(protected):
    first, _ = spaces_after(protected)
    to_protect = {FACTORS.get(name, name): S for name, S in first.items()}
    assert difference(protected, reference(protected, USUAL, eps=1e-8, spaces=[{}, to_protect])) < 1e-6
    assert difference(protected, reference(protected, USUAL, eps=1e-8)) > 1e-3
    early = replace(USUAL, basis_of_whole_gradient=False)
    assert difference(protected, reference(protected, early, eps=1e-8, spaces=[{}, to_protect])) > 1e-3


def test_the_shared_space_of_plain_gorp_is_that_of_the_rule(protected):
    for end, expected in zip(protected, spaces_after(protected), strict=True):
        found = load_file(end.folder / "gradient_space.safetensors")
        assert found.keys() == expected.keys()
        for name, S in expected.items():
            ours = found[name].double()
            assert ours.shape == S.shape, name
            torch.testing.assert_close(ours @ ours.mT, S @ S.mT, rtol=0, atol=1e-5)
    first, second = ({name: S.shape[1] for name, S in ends.items()} for ends in spaces_after(protected))
    assert sum(first.values()) < sum(second.values())
    assert all(0 < first[name] < len(BASE[name]) for name in FULL_RANK)


# ProjAdamW with a protected space, without a trainer


PROTECTIONS = [{"gp_first": True}, {"gp_second": True}, {"gp_first": True, "gp_second": True}]


def protected_steps(shape, rank, protection: dict, *, released_eps: bool, rules: Rules = Rules()) -> float:
    """The largest difference from the reference over ten steps, whose gradients are drawn and shrink to eps."""
    draw = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))
    theirs, largest, eps = copy(weight), 0.0, 1e-4
    S = torch.linalg.qr(torch.randn(shape[0], 2, generator=draw, dtype=torch.float64)).Q
    projected = {} if rank is None else {"rank": rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"}
    group = {"params": [weight], "scale_mats": [S]} | protection | projected
    optimizer = ProjAdamW([group], lr=LR, eps=eps, eps_before_correction=released_eps)
    rules = replace(rules, eps_before_correction=released_eps)
    adam = Adam(LR, eps, rank, GAP, SCALE, S, rules=rules, **protection)
    lean = torch.randn(shape, generator=draw, dtype=torch.float64)  # so that moments and bases have something to hold
    for step in range(1, 11):
        G = (lean + torch.randn(shape, generator=draw, dtype=torch.float64)) * 10 ** (-step / 3)
        weight.grad = copy(G)
        optimizer.step()
        theirs += adam.change(G)
        largest = max(largest, (weight - theirs).abs().max().item())
    assert (weight - theirs).isfinite().all()
    return largest


@pytest.mark.parametrize("released_eps", [False, True])
@pytest.mark.parametrize("protection", PROTECTIONS, ids=" and ".join)
@pytest.mark.parametrize("shape", [(7, 7), (10, 6)], ids=["square", "tall"])
def test_a_protected_projection_follows_the_released_rule_over_three_refreshes(shape, protection, released_eps):
    assert protected_steps(shape, 3, protection, released_eps=released_eps) < 1e-6


@pytest.mark.parametrize("protection", PROTECTIONS, ids=" and ".join)
@pytest.mark.parametrize("shape", [(7, 7), (10, 6), (4, 9)], ids=["square", "tall", "wide"])
def test_a_protected_factor_follows_the_released_rule(shape, protection):
    assert protected_steps(shape, None, protection, released_eps=False) < 1e-6


@pytest.mark.parametrize("shape", [(7, 7), (10, 6)], ids=["square", "tall"])
def test_the_comparison_notices_a_basis_from_the_gradient_without_the_space(shape):
    rules = Rules(basis_of_whole_gradient=False)
    assert protected_steps(shape, 3, {"gp_first": True}, released_eps=False, rules=rules) > 1e-3


@pytest.mark.parametrize("rank", [None, 3])
def test_the_comparison_notices_the_eps_rule(rank):
    one, other = (Adam(LR, 1e-4, rank, GAP, SCALE, rules=Rules(eps_before_correction=before)) for before in (0, 1))
    G = 1e-3 * torch.randn(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert (one.change(G) - other.change(G)).abs().max() > 1e-4
