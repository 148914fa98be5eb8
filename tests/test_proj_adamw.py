"""ProjAdamW: what it equals, what it keeps clear of, and that it repeats, resumes and survives bad gradients."""

import copy
import io

import pytest
import torch
from torch import nn

from errors import InputError
from Proj_torch import ProjAdamW
from Proj_torch.engine import report_line
from Proj_torch.proj_projector import PROJ_TYPES, SIDES, remove
from Proj_torch.svd import SVD_METHODS

PROJECTION = {"rank": 3, "update_proj_gap": 4, "scale": 0.5, "proj_type": "std"}
SHAPES = [(12, 7), (7, 12), (9, 9)]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter((0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype))


def gradient(p: torch.Tensor, step: int) -> torch.Tensor:
    """Of a bowl around zero, with noise that depends on the step alone."""
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 + step))
    return (p.detach().float() + 0.5 * noise).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = gradient(p, step)
        optimizer.step()


def orthonormal(size: int, columns: int = 2) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, columns, generator=torch.Generator().manual_seed(77))).Q


def protected(p: nn.Parameter, side: str, **settings) -> dict:
    S = orthonormal(p.shape[SIDES.index(side)])
    return {"params": [p], "scale_mats": [S], "protect_side": side} | settings


def share_in(change: torch.Tensor, S: torch.Tensor, side: str) -> float:
    """Part of a change's norm that lies in the protected space."""
    return ((change - remove(change, S, side)).norm() / change.norm()).item()


# ------------------------------------------------------------------------------------------- what it equals


def test_a_group_without_projection_is_torch_adamw_bitwise():
    ours, theirs = parameter(6, 5), parameter(6, 5)
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    train(ProjAdamW([ours], **settings), 30)
    train(torch.optim.AdamW([theirs], **settings), 30)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "proj_type, shape",
    [("std", shape) for shape in SHAPES]
    + [("right", (12, 7)), ("left", (7, 12))]
    + [(proj_type, (9, 9)) for proj_type in PROJ_TYPES],
)
def test_equals_torch_adamw_at_full_rank(proj_type, shape):
    ours, theirs = parameter(*shape), parameter(*shape)
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    group = {"params": [ours], "rank": min(shape), "update_proj_gap": 4, "scale": 1.0, "proj_type": proj_type}
    ours_optimizer, theirs_optimizer = ProjAdamW([group], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(20):
        train(ours_optimizer, range(step, step + 1))
        train(theirs_optimizer, range(step, step + 1))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours_optimizer.get_first_moment(ours), theirs_optimizer.state[theirs]["exp_avg"])


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_equals_galore_step_by_step(proj_type, shape):
    """GaLore adds eps before the bias correction of the second moment, which is this eps after it, and decays the
    weight after the update; without decay the two formulas agree."""
    galore_torch = pytest.importorskip("galore_torch")
    settings, eps = PROJECTION | {"proj_type": proj_type}, 1e-4
    ours, theirs = parameter(*shape), parameter(*shape)
    ours_optimizer = ProjAdamW([{"params": [ours]} | settings], lr=1e-2)
    theirs_optimizer = galore_torch.GaLoreAdamW(
        [{"params": [theirs]} | settings], lr=1e-2, eps=eps, no_deprecation_warning=True
    )
    start = ours.detach().clone()
    for step in range(20):
        ours.grad = gradient(theirs, step)  # the same for both: rounding may turn the sign of a singular vector
        theirs.grad = ours.grad.clone()
        ours_optimizer.param_groups[0]["eps"] = eps / (1 - 0.999 ** (step + 1)) ** 0.5
        ours_optimizer.step()
        theirs_optimizer.step()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert (ours - start).norm() > 0.02


# ------------------------------------------------------------------------------------ what it keeps clear of


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("proj_type", [None, *PROJ_TYPES])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_keeps_the_change_orthogonal_to_the_space(shape, proj_type, side):
    p = parameter(*shape)
    group = protected(p, side, orthogonal=True) | (PROJECTION | {"proj_type": proj_type} if proj_type else {})
    S, start = group["scale_mats"][0], p.detach().clone()
    train(ProjAdamW([group], lr=1e-2), 20)
    change = p.detach() - start
    assert change.norm() > 0.02
    component = S.T @ change if side == "output" else change @ S
    assert component.abs().max() < 1e-6


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("proj_type", [None, *PROJ_TYPES])
def test_how_far_gp_first_is_from_orthogonal(proj_type, side):
    """Adam's elementwise division brings S back, by 5 to 60 % of the change here, unless the protected side is
    projected: then the basis, taken from a gradient without S, is orthogonal to S, and so is every change."""
    p = parameter(9, 9)
    group = protected(p, side, gp_first=True) | (PROJECTION | {"proj_type": proj_type} if proj_type else {})
    S, start = group["scale_mats"][0], p.detach().clone()
    optimizer = ProjAdamW([group], lr=1e-2)
    train(optimizer, 20)
    share = share_in(p.detach() - start, S, side)
    assert optimizer.get_first_moment(p).norm() > 0.01
    assert share_in(optimizer.get_first_moment(p), S, side) < 1e-5  # the gradient is clear of S all the same
    if f"basis_{SIDES.index(side)}" in optimizer.state[p]:
        assert share < 1e-5, f"{share:.2g} of the change lies in S"
    else:
        assert 0.05 < share < 0.6, f"{share:.2g} of the change lies in S"


@pytest.mark.parametrize("proj_type, side", [("left", "output"), ("right", "input")])
def test_gp_second_removes_the_space_from_a_projected_moment(proj_type, side):
    """By one step's formulas; where the protected side is projected, m is L^T (L m - S S^T L m) or its mirror image."""
    p = parameter(9, 9)
    group = protected(p, side, gp_second=True) | PROJECTION | {"proj_type": proj_type}
    S, start, optimizer = group["scale_mats"][0], p.detach().clone(), ProjAdamW([group], lr=1e-2)
    train(optimizer, 1)
    state = optimizer.state[p]
    L, R = (torch.eye(9) if state.get(key) is None else state[key] for key in ("basis_0", "basis_1"))
    m = L.T @ remove(L @ (state["exp_avg"] / 0.1) @ R.T, S, side) @ R
    core = m / ((state["exp_avg_sq"] / 0.001).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach() - start, -1e-2 * 0.5 * L @ core @ R.T, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("when", ["gp_first", "gp_second", "orthogonal"])
@pytest.mark.parametrize("projection", [{}, PROJECTION])
def test_a_full_space_stops_every_change(projection, when):
    """Rounding noise of the removal must not become whole Adam steps."""
    p = parameter(12, 7)
    start = p.detach().clone()
    train(ProjAdamW([{"params": [p], "scale_mats": [orthonormal(12, 12)], when: True} | projection], lr=1e-2), 6)
    assert torch.equal(p, start)


def test_an_empty_space_changes_nothing():
    free, unprotected = parameter(12, 7), parameter(12, 7)
    train(ProjAdamW([{"params": [free]} | PROJECTION]), 10)
    train(ProjAdamW([{"params": [unprotected], "scale_mats": [None], "gp_first": True} | PROJECTION]), 10)
    assert torch.equal(free, unprotected)


# ------------------------------------------------------------------------------------- repeats and resumes


def every_kind(dtype: torch.dtype, svd: str) -> ProjAdamW:
    """An optimizer with a plain, a protected, and projected groups for matrices and a tensor."""
    groups = [
        {"params": [parameter(6, dtype=dtype)]},
        protected(parameter(8, 12, dtype=dtype), "output", gp_first=True),
        protected(parameter(10, 8, dtype=dtype), "input", orthogonal=True, svd=svd, **PROJECTION),
        {"params": [parameter(6, 5, 4, dtype=dtype), parameter(7, 9, dtype=dtype)], "svd": svd}
        | PROJECTION
        | {"proj_type": "full"},
    ]
    return ProjAdamW(groups, lr=1e-2, weight_decay=0.01)


def weights(optimizer: ProjAdamW) -> list[torch.Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def assert_bitwise(first: ProjAdamW, second: ProjAdamW) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))


@pytest.mark.parametrize("svd", SVD_METHODS)
def test_repeats_bitwise_whatever_the_global_seed(svd):
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(every_kind(torch.float32, svd))
        train(runs[-1], 12)
    assert_bitwise(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [6, 8])  # between two refreshes and at one
def test_resumes_bitwise_through_a_file(stop, dtype):
    whole = every_kind(dtype, "lowrank")
    train(whole, 14)

    stopped = every_kind(dtype, "lowrank")
    train(stopped, stop)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = every_kind(dtype, "lowrank")
    for group, old in zip(resumed.param_groups, stopped.param_groups, strict=True):
        for p, value in zip(group["params"], old["params"], strict=True):
            p.data.copy_(value)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, range(stop, 14))
    assert_bitwise(whole, resumed)
    assert resumed.projection_report() == whole.projection_report()


def test_a_deep_copy_is_an_optimizer_of_its_own():
    original = every_kind(torch.float32, "exact")
    train(original, 5)
    copied, untouched = copy.deepcopy(original), every_kind(torch.float32, "exact")
    train(untouched, 5)
    train(copied, 2)
    assert not torch.equal(weights(copied)[0], weights(original)[0])
    assert_bitwise(original, untouched)


# -------------------------------------------------------------------------------- dtypes and more dimensions


def test_bfloat16_weights_have_float32_state():
    optimizer = every_kind(torch.bfloat16, "exact")
    before = weights(optimizer)
    train(optimizer, 5)
    for p, start in zip([p for group in optimizer.param_groups for p in group["params"]], before, strict=True):
        assert p.dtype == torch.bfloat16 and not torch.equal(p, start)
        assert all(value.dtype == torch.float32 for key, value in optimizer.state[p].items() if "exp_avg" in key)
        moment = optimizer.get_first_moment(p)
        assert moment.dtype == torch.float32 and moment.shape == p.shape


@pytest.mark.parametrize("svd", SVD_METHODS)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_trains_a_small_network(proj_type, svd):
    torch.manual_seed(0)
    x = torch.randn(64, 3, 10)
    network = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 2))
    teacher = copy.deepcopy(network)
    for p in teacher.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    target = teacher(x).detach()
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    projection = PROJECTION | {"rank": 2, "proj_type": proj_type, "svd": svd, "scale": 1.0}
    optimizer = ProjAdamW([{"params": matrices} | projection, {"params": vectors}], lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (network(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ------------------------------------------------------------------------------------------ zero gradients


def test_zero_gradients_go_on():
    p = parameter(12, 7)
    start = p.detach().clone()
    optimizer = ProjAdamW([{"params": [p]} | PROJECTION], lr=1e-2)
    for _ in range(5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, start)
    train(optimizer, range(5, 12))
    assert p.isfinite().all() and not torch.equal(p, start)


@pytest.mark.parametrize("size, moves", [(1e-35, False), (1e15, True)])
def test_gradients_of_extreme_size_go_on(size, moves):
    p = parameter(12, 7)
    start = p.detach().clone()
    optimizer = ProjAdamW([{"params": [p]} | PROJECTION], lr=1e-2)
    for step in range(6):
        p.grad = gradient(p, step) * size
        optimizer.step()
    assert p.isfinite().all()
    assert ((p - start).norm() > 1e-3) == moves


# --------------------------------------------------------------------------------- moments and the report


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_first_moment_is_the_projected_gradient_in_full_coordinates(proj_type):
    p = parameter(12, 7)
    optimizer = ProjAdamW([{"params": [p]} | PROJECTION | {"proj_type": proj_type}], betas=(0.9, 0.999))
    assert torch.equal(optimizer.get_first_moment(p), torch.zeros(12, 7))
    train(optimizer, 1)
    U, s, Vh = torch.linalg.svd(p.grad)
    leading = U[:, :3] * s[:3] @ Vh[:3]  # projecting a gradient on its own leading vectors truncates its SVD
    torch.testing.assert_close(optimizer.get_first_moment(p), 0.1 * leading, atol=1e-5, rtol=1e-5)
    optimizer.get_first_moment(p).zero_()
    assert optimizer.get_first_moment(p).any()
    with pytest.raises(InputError):
        optimizer.get_first_moment(parameter(12, 7))


def test_report_counts_refreshes_and_measures_energy():
    p = parameter(12, 7)
    optimizer = ProjAdamW([{"params": [("q.weight", p)]} | PROJECTION])
    train(optimizer, 9)  # refreshed at steps 0, 4 and 8
    report = optimizer.projection_report()
    weight = report["q.weight"]
    assert (weight["steps"], weight["refreshes"]) == (9, 3)
    squares = torch.linalg.svdvals(p.grad).square()
    assert weight["energy"] == pytest.approx((squares[:3].sum() / squares.sum()).item(), rel=1e-5)
    assert "1 weights, 9 steps, 3 refreshes" in report_line(report)
    assert "no weight" in report_line(ProjAdamW([parameter(3)]).projection_report())


def test_learning_rate_schedules_and_closures_work():
    p = parameter(12, 7)
    optimizer = ProjAdamW([{"params": [p]} | PROJECTION], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    schedule.step()
    still = p.detach().clone()
    assert optimizer.step(closure) < first
    assert torch.equal(p, still)


# ------------------------------------------------------------------------------------------- refused groups


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rnak": 3}, "key 'rnak' is unknown; allowed: params"),
        ({"rank": 3}, "update_proj_gap, scale, proj_type missing"),
        (PROJECTION | {"rank": 8}, "parameter q.weight: rank 8 does not fit shape (12, 7); allowed: 1 to 7"),
        (PROJECTION | {"rank": 2.5}, "rank is 2.5; allowed: a whole number"),
        (PROJECTION | {"rank": "8"}, "rank is '8'"),
        (PROJECTION | {"update_proj_gap": 0}, "update_proj_gap is 0"),
        (PROJECTION | {"scale": 0}, "scale is 0"),
        (PROJECTION | {"proj_type": "diagonal"}, "proj_type is 'diagonal'; allowed: std"),
        (PROJECTION | {"svd": "fast"}, "svd is 'fast'; allowed: exact, lowrank"),
        ({"gp_first": True}, "scale_mats missing"),
        ({"scale_mats": [], "gp_first": True}, "0 entries for 1 parameters"),
        ({"scale_mats": [orthonormal(12)]}, "gp_first, gp_second, orthogonal are all off"),
        (PROJECTION | {"proj_type": "full", "scale_mats": [None], "gp_second": True}, "gp_second with proj_type"),
        ({"scale_mats": [orthonormal(7)], "gp_first": True}, "q.weight: shape (7, 2); allowed: (12, c)"),
        ({"scale_mats": [2 * orthonormal(12)], "gp_first": True}, "q.weight: columns 3 from orthonormal"),
        ({"scale_mats": [None], "gp_first": True, "protect_side": "top"}, "protect_side is 'top'; allowed: output"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is (0.9, 1.0)"),
    ],
)
def test_bad_groups_are_refused_in_one_line(change, words):
    with pytest.raises(InputError) as refused:
        ProjAdamW([{"params": [("q.weight", parameter(12, 7))]} | change])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    first, second = parameter(12, 7), parameter(5, 9)
    optimizer = ProjAdamW([{"params": [first]} | PROJECTION], lr=1e-2)
    with pytest.raises(InputError, match="allowed: 1 to 5"):
        optimizer.add_param_group({"params": [second]} | PROJECTION | {"rank": 8})
    assert [group["params"] for group in optimizer.param_groups] == [[first]]
    optimizer.add_param_group({"params": [second]} | PROJECTION | {"rank": 5})
    assert [group["rank"] for group in optimizer.param_groups] == [PROJECTION["rank"], 5]


def test_a_flat_piece_of_a_weight_is_refused():
    """What a ZeRO optimizer would hand over: training it without the projection must not start."""
    with pytest.raises(InputError, match="not a matrix"):
        ProjAdamW([{"params": [parameter(84)]} | PROJECTION])
    with pytest.raises(InputError, match="only a matrix can be protected"):
        ProjAdamW([{"params": [parameter(84)], "scale_mats": [orthonormal(84)], "gp_second": True}])
