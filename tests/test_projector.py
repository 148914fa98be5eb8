"""The projectors' mathematics: bases, projection, removal of a protected space, and gradients that are no use."""

import logging

import pytest
import torch

from errors import InputError
from Proj_torch import svd as svd_module
from Proj_torch.proj_projector import (
    PROJ_TYPES,
    SIDES,
    ProjProjector,
    back_factors,
    mode_ranks,
    product,
    project,
    remove,
)
from Proj_torch.svd import SVD_METHODS, truncated_svd
from Proj_torch.proj_projector_tensor import ProjProjectorTensor, mode_products, tucker_ranks, unfold

SHAPES = [(12, 7), (7, 12), (9, 9)]


def orthonormal(size: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, columns, generator=torch.Generator().manual_seed(seed))).Q


def assert_orthonormal(basis: torch.Tensor) -> None:
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", SIDES)
def test_what_removes_s_computes_in_float32_under_autocast(side):
    S, X = orthonormal(64, 8), torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = remove(X, S, side)
    assert found.dtype == torch.float32 and torch.equal(found, remove(X, S, side))


@pytest.mark.parametrize("svd", SVD_METHODS)
def test_bases_lie_in_memory_as_a_checkpoint_restores_them(svd):
    left, _, right = truncated_svd(torch.randn(60, 50, generator=torch.Generator().manual_seed(1)), 3, svd)
    assert left.is_contiguous() and right.is_contiguous()
    assert left.untyped_storage().nbytes() == 4 * 60 * 3  # and hold nothing else


@pytest.mark.parametrize("svd", SVD_METHODS)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bases_are_orthonormal_and_projection_is_idempotent(shape, proj_type, svd):
    torch.manual_seed(1)
    projector = ProjProjector(3, proj_type=proj_type, svd=svd)
    G = torch.randn(shape)
    projector.refresh(G)
    for basis in projector.bases:
        if basis is not None:
            assert_orthonormal(basis)
    once = projector.project_back(projector.project(G))
    twice = projector.project_back(projector.project(once))
    torch.testing.assert_close(twice, once, atol=1e-5, rtol=1e-5)
    assert 0.1 < once.norm() / G.norm() < 0.99  # it is a projection, and not the identity


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_at_full_rank(shape, proj_type):
    torch.manual_seed(2)
    projector, G = ProjProjector(min(shape), proj_type=proj_type), torch.randn(shape)
    projector.refresh(G)
    torch.testing.assert_close(projector.project_back(projector.project(G)), G, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "proj_type, shape, expected",
    [
        ("std", (12, 7), (None, 3)),
        ("std", (9, 9), (None, 3)),
        ("std", (7, 12), (3, None)),
        ("reverse_std", (12, 7), (3, None)),
        ("reverse_std", (7, 12), (None, 3)),
        ("left", (12, 7), (3, None)),
        ("right", (7, 12), (None, 3)),
        ("full", (7, 12), (3, 3)),
        ("full", (3, 12), (None, 3)),  # the side of dimension 3 is whole already
    ],
)
def test_which_side_is_projected(proj_type, shape, expected):
    assert mode_ranks(shape, 3, proj_type) == expected


@pytest.mark.parametrize("svd", SVD_METHODS)
def test_left_projection_keeps_the_most_energy(svd):
    """Eckart-Young: no rank-k projection holds more than the k largest squared singular values."""
    torch.manual_seed(3)
    decaying = torch.randn(60, 40) * torch.logspace(0, -2, 40)
    best = torch.linalg.svdvals(decaying)[:4].square().sum()
    left, _, right = truncated_svd(decaying, 4, svd)
    for bases in ((left, None), (None, right)):
        assert 0.99 * best < project(decaying, *bases).square().sum() < 1.0001 * best


@pytest.mark.parametrize("spectrum", [torch.ones(40), torch.logspace(0, -6, 40), torch.linspace(1, 0, 40)])
def test_lowrank_svd_is_near_the_optimum_for_any_spectrum(spectrum):
    M = orthonormal(64, 40, 1) * spectrum @ orthonormal(40, 40, 2).T
    s = truncated_svd(M, 8, "lowrank")[1]
    assert s.square().sum() > 0.93 * torch.linalg.svdvals(M)[:8].square().sum()


@pytest.mark.parametrize("svd", SVD_METHODS)
def test_svd_is_bitwise_repeatable_and_leaves_the_global_generator_alone(svd):
    M = torch.randn(50, 30)
    torch.manual_seed(5)
    first, drawn = truncated_svd(M, 4, svd), torch.rand(3)
    torch.manual_seed(6)
    second = truncated_svd(M, 4, svd)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_removal_in_projected_coordinates_equals_removal_in_full_ones(shape, proj_type, side):
    torch.manual_seed(7)
    G, S = torch.randn(shape), orthonormal(shape[SIDES.index(side)], 2)
    cleared = remove(G, S, side)
    component = S.T @ cleared if side == "output" else cleared @ S
    assert component.abs().max() < 1e-5
    projector = ProjProjector(3, proj_type=proj_type)
    projector.refresh(G)
    R = projector.project(G)
    torch.testing.assert_close(projector.project(G, S, side), projector.project(cleared), atol=1e-5, rtol=1e-5)
    whole = remove(projector.project_back(R), S, side)
    torch.testing.assert_close(projector.project_back(R, S, side), whole, atol=1e-5, rtol=1e-5)
    W = torch.zeros(shape)
    projector.scale = 0.5
    projector.add_back_(W, -2.0 * R, S, side)
    torch.testing.assert_close(W, -whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("useless", [0.0, float("nan"), float("inf")])
def test_a_useless_gradient_keeps_the_basis(useless):
    projector, useless_gradient = ProjProjector(2, proj_type="full"), torch.full((8, 5), useless)
    assert not projector.refresh(useless_gradient)
    for basis in projector.bases:
        assert_orthonormal(basis)
    assert projector.refresh(torch.randn(8, 5))
    known = projector.bases
    assert not projector.refresh(useless_gradient) and projector.bases is known


@pytest.mark.parametrize("svd", SVD_METHODS)
@pytest.mark.parametrize("size", [1e-38, 1e30])
def test_tiny_huge_and_ill_conditioned_gradients_give_the_leading_direction(size, svd):
    u, v = orthonormal(20, 2, 3), orthonormal(10, 2, 4)
    G = size * (u[:, :1] @ v[:, :1].T + 1e-7 * u[:, 1:] @ v[:, 1:].T)
    projector = ProjProjector(2, proj_type="full", svd=svd)
    projector.refresh(G)
    left, right = projector.bases
    assert_orthonormal(left)
    assert_orthonormal(right)
    assert (left[:, 0] @ u[:, 0]).abs() > 0.99 and (right[:, 0] @ v[:, 0]).abs() > 0.99


def test_where_the_svd_does_not_converge_the_old_basis_stays_with_a_warning(monkeypatch, caplog):
    def diverge(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    svd_module.warn_once.cache_clear()
    projector = ProjProjector(2)
    projector.refresh(torch.randn(8, 5))
    known = projector.bases
    monkeypatch.setattr(torch.linalg, "svd", diverge)
    with caplog.at_level(logging.WARNING, logger="gorp"):
        for _ in range(2):
            assert not projector.refresh(torch.randn(8, 5)) and projector.bases is known
    assert caplog.text.count("the previous basis stays") == 1


@pytest.mark.parametrize(
    "shape, rank, proj_type, words",
    [
        ((8, 12), 9, "std", "rank 9 does not fit shape (8, 12); allowed: 1 to 8"),
        ((8, 12), 0, "std", "rank 0"),
        ((96,), 2, "std", "not a matrix"),
    ],
)
def test_impossible_projections_are_refused(shape, rank, proj_type, words):
    with pytest.raises(InputError) as refused:
        mode_ranks(shape, rank, proj_type)
    assert words in str(refused.value)


# ------------------------------------------------------------------------------ more than two dimensions


def tucker_tensor(shape: tuple[int, ...], rank: int, noise: float) -> torch.Tensor:
    torch.manual_seed(9)
    core = torch.randn([rank] * len(shape))
    T = mode_products(core, (orthonormal(size, rank, mode) for mode, size in enumerate(shape)))
    return T + noise * torch.randn(shape)


@pytest.mark.parametrize("svd", SVD_METHODS)
def test_tucker_projection_is_an_orthogonal_projection(svd):
    G = tucker_tensor((8, 6, 5), 2, noise=0.05)
    projector = ProjProjectorTensor(2, svd=svd)
    projector.refresh(G)
    for basis in projector.bases:
        assert_orthonormal(basis)
    core = projector.project(G)
    assert core.shape == (2, 2, 2)
    once = projector.project_back(core)
    torch.testing.assert_close(projector.project_back(projector.project(once)), once, atol=1e-5, rtol=1e-5)
    assert once.norm() ** 2 > 0.9 * G.norm() ** 2
    # De Lathauwer et al. 2000, property 10: the error is at most the energy cut from all modes together
    cut = sum(torch.linalg.svdvals(unfold(G, mode))[2:].square().sum() for mode in range(3))
    assert (G - once).square().sum() <= 1.05 * cut


def test_tucker_projection_of_a_tensor_of_that_rank_is_exact():
    G = tucker_tensor((7, 6, 5, 4), 2, noise=0.0)
    projector = ProjProjectorTensor(2)
    projector.refresh(G)
    torch.testing.assert_close(projector.project_back(projector.project(G)), G, atol=1e-5, rtol=1e-5)


def test_tucker_ranks_follow_each_mode():
    assert tucker_ranks((64, 16, 3, 3), 8) == (8, 8, None, None)  # a convolution: its small modes stay whole
    assert tucker_ranks((64, 2, 2), 8) == (4, None, None)  # the first unfolding has only four columns
    for rank in (9, 0):
        with pytest.raises(InputError):
            tucker_ranks((8, 6, 5), rank)


def test_removal_needs_no_projection():
    G, S = torch.randn(6, 4), orthonormal(6, 2)
    torch.testing.assert_close(project(G, S=S), remove(G, S, "output"))
    torch.testing.assert_close(product(back_factors(G, None, None, S)), remove(G, S, "output"))
