"""The shared gradient space: the energy rule, growth over many tasks, and the file it travels in."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from errors import InputError
from helpers import ROOT
from Proj_torch.proj_projector import remove
from subspace import SAMPLE, GradientSpace, extend_basis, layer_inputs


def matrix(spectrum: list[float], rows: int = 8, columns: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix with these singular values, and its left singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, len(spectrum), generator=generator)).Q for size in (rows, columns))
    return U * torch.tensor(spectrum) @ V.T, U


def share(S: torch.Tensor, M: torch.Tensor) -> float:
    return ((S.T @ M).square().sum() / M.square().sum()).item()


@pytest.mark.parametrize("energy, count", [(0.5, 1), (0.63, 1), (0.65, 2), (0.9, 2), (0.98, 3), (1.0, 4)])
def test_first_task_takes_the_fewest_leading_vectors(energy, count):
    M, U = matrix([0.8, 0.53, 0.26, 0.11])  # energies 0.64, 0.28, 0.07, 0.01
    S = extend_basis(None, M, energy)
    assert S.shape == (8, count)
    assert share(S, M) >= energy - 1e-3
    assert count == 1 or share(S[:, :-1], M) < energy
    torch.testing.assert_close(S @ S.T, U[:, :count] @ U[:, :count].T, atol=1e-5, rtol=0)


def test_extension_counts_what_is_held_already():
    M, U = matrix([0.8, 0.53, 0.26, 0.11])
    S = extend_basis(U[:, 1:2].clone(), M, 0.9)  # 0.28 held; the first vector brings it to 0.92
    assert S.shape[1] == 2
    assert torch.equal(S[:, :1], U[:, 1:2])
    assert (S[:, 1] @ U[:, 0]).abs() > 0.999


def test_nothing_is_appended_where_the_energy_is_held():
    M, U = matrix([0.8, 0.53, 0.26, 0.11])
    assert torch.equal(extend_basis(U[:, :2].clone(), M, 0.9), U[:, :2])


def test_a_moment_outside_the_space_is_added_whole():
    M, _ = matrix([3.0, 2.0], seed=1)
    S = extend_basis(None, M, 0.999)
    other = torch.randn(8, 12)
    other -= S @ (S.T @ other)
    assert share(extend_basis(S, other, 0.9), other) >= 0.9 > share(S, other)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_scale_does_not_matter(scale):
    M, _ = matrix([0.8, 0.53, 0.26, 0.11])
    torch.testing.assert_close(extend_basis(None, M * scale, 0.9), extend_basis(None, M, 0.9), atol=1e-4, rtol=0)


def test_stays_orthonormal_over_fifteen_tasks():
    torch.manual_seed(3)
    S, widths = None, []
    shared = torch.randn(96, 40)
    for task in range(15):
        # nearly the same moment each time: residuals are small, the worst case for orthogonality
        S = extend_basis(S, shared + 0.02 * torch.randn(96, 40) + (task % 3) * torch.randn(96, 1), 0.9995)
        widths.append(S.shape[1])
        assert (S.T @ S - torch.eye(S.shape[1])).abs().max() < 1e-6
    assert widths == sorted(widths) and widths[0] < widths[-1] <= 96


def test_is_capped_at_the_dimension():
    torch.manual_seed(4)
    M = torch.randn(4, 30)
    S = extend_basis(None, M, 1.0)
    assert S.shape == (4, 4)
    assert torch.equal(extend_basis(S, torch.randn(4, 30), 1.0), S)
    assert extend_basis(None, torch.randn(30, 4), 1.0).shape == (30, 4)


def test_input_side_holds_the_columns():
    M, _ = matrix([0.8, 0.53, 0.26, 0.11])
    space = GradientSpace(side="input")
    space.extend({"q": M})
    S = space.get("q")
    assert S.shape == (12, 2)
    assert (M @ S).square().sum() >= 0.9 * M.square().sum()
    assert space.get("absent") is None and list(space.bases) == ["q"]


def test_neighbours_with_the_same_inputs_and_space_share_one_svd(monkeypatch, tmp_path):
    seen, others = (torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    counted, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda M, **options: counted.append(M.shape) or svd(M, **options))
    space, alone = GradientSpace("input", 0.5), GradientSpace("input", 0.5)
    space.extend({"q": seen, "v": seen.clone(), "up": others})
    alone.extend({"v": seen})
    assert len(counted) == 2 + 1
    assert space.get("q").equal(space.get("v")) and space.get("v").equal(alone.get("v"))
    assert not space.get("up").equal(space.get("v"))
    space.save(tmp_path / "space.safetensors")  # rejects tensors that share their memory
    counted.clear()
    space.bases["v"] = space.get("up")  # the same inputs, another space
    space.extend({"q": others, "v": others})
    assert len(counted) == 1 and not space.get("q").equal(space.get("v")), "v's space held them already"


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_moment_of_two_thin_factors_needs_no_svd_of_the_product(side, monkeypatch):
    A, B = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) for shape in ((40, 3), (3, 60)))
    whole, thin = GradientSpace(side), GradientSpace(side)
    start = torch.linalg.qr(torch.randn(40 if side == "output" else 60, 4)).Q
    whole.bases["q"], thin.bases["q"] = start, start
    whole.extend({"q": A @ B})
    shapes, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda M, **options: shapes.append(M.shape) or svd(M, **options))
    thin.extend({"q": (A, B)})
    assert [shape[1] for shape in shapes] == [3]
    (S, T), new = (space.get("q") for space in (whole, thin)), slice(4, None)
    assert S.shape == T.shape and S.shape[1] > 4
    torch.testing.assert_close(S[:, new] @ S[:, new].T, T[:, new] @ T[:, new].T, atol=1e-5, rtol=0)


def test_useless_moments_are_left_out_with_a_line(caplog):
    space = GradientSpace()
    good, _ = matrix([1.0, 0.1])
    space.extend({"a": good})
    before = space.get("a").clone()
    with caplog.at_level(logging.INFO, logger="gorp"):
        space.extend({"a": torch.full((8, 12), torch.nan), "b": torch.zeros(8, 12)})
    assert torch.equal(space.get("a"), before) and space.get("b") is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["a", "b"]


class Model(nn.Module):
    """A model of one layer, of any kind."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, attention_mask, labels):
        return self.layer(x)


def test_layer_inputs_are_what_the_layers_see_without_padding():
    torch.manual_seed(0)
    model = Model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))).train()
    first, second = model.layer
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batches = [{"x": torch.randn(2, 3, 4), "attention_mask": mask, "labels": torch.zeros(2, 5)} for _ in range(2)]
    seen = layer_inputs(model, {"a": first, "b": second}, batches)
    real = torch.cat([batch["x"][mask.bool()] for batch in batches])
    for found, expected in ((seen["a"], real), (seen["b"], first(real).detach())):
        assert found.shape == expected.shape
        assert torch.allclose(found.sort(0).values, expected.sort(0).values)
    assert model.training and not first._forward_pre_hooks
    space = GradientSpace("input", energy=1.0)
    space.extend({"b": seen["b"]})
    assert torch.allclose(remove(seen["b"], space.get("b"), "input"), torch.zeros(6, 6), atol=1e-5)


def test_a_sample_of_layer_inputs_is_drawn_from_the_whole_example():
    model, x = Model(nn.Linear(1, 2)), torch.arange(80.0).view(2, 40, 1)  # each position by its number
    batch = {"x": x, "attention_mask": torch.ones(2, 40), "labels": torch.zeros(2, 3)}
    seen = layer_inputs(model, {"layer": model.layer}, [batch])["layer"].view(2, SAMPLE) - torch.tensor([[0], [40]])
    first, second = map(set, seen.tolist())
    assert all(len(places) == SAMPLE and min(places) < 5 and max(places) > 35 for places in (first, second))
    assert first != second


def test_layer_inputs_are_those_of_evaluation():
    model, x = Model(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 6))).train(), torch.randn(2, 3, 4)
    batch = {"x": x, "attention_mask": torch.ones(2, 3), "labels": torch.zeros(2, 5)}
    seen = layer_inputs(model, {"linear": model.layer[1]}, [batch])["linear"]
    assert model.training and torch.equal(seen.sort(0).values, x.flatten(0, 1).sort(0).values)


@pytest.mark.parametrize("most", [2, 40])  # positions; more than a sample takes
def test_a_layer_that_sees_examples_end_to_end_is_sampled_like_another(most):
    """Some models (OPT, Qwen2-MoE) give a linear layer (examples * positions, in)."""
    linear, flat = nn.Linear(4, 4), nn.Linear(4, 6)
    model, mask = Model(nn.Sequential(linear, nn.Flatten(0, 1), flat)), torch.tensor([[1] * most, [1, 0] * (most // 2)])
    batch = {"x": torch.randn(2, most, 4), "attention_mask": mask, "labels": torch.zeros(2, 1)}
    seen = layer_inputs(model, {"linear": linear, "flat": flat}, [batch])
    torch.testing.assert_close(linear(seen["linear"]).detach(), seen["flat"])


def test_a_sample_of_layer_inputs_does_not_depend_on_the_batches():
    model, x = Model(nn.Linear(4, 6)), torch.randn(6, 40, 4)
    lengths = torch.tensor([40, 7, 33, 20, 40, 1])
    mask = (torch.arange(40) < lengths[:, None]).long()

    def sample(size):
        batches = [{"x": x[i:i + size], "attention_mask": mask[i:i + size], "labels": torch.zeros(size, 3)}
                   for i in range(0, 6, size)]
        return layer_inputs(model, {"layer": model.layer}, batches)["layer"]

    assert torch.equal(sample(1), sample(3)) and torch.equal(sample(2), sample(6))
    assert len(sample(3)) == lengths.clamp(max=SAMPLE).sum()


def test_a_decoders_places_are_told_from_an_encoders_where_prompts_and_answers_are_as_long():
    model = AutoModelForSeq2SeqLM.from_pretrained(ROOT / "initial_model" / "tiny-t5", dtype=torch.float32)
    layers = {f"{stack}.block.0.layer.0.SelfAttention.q": None for stack in ("encoder", "decoder")}
    layers = {name: model.get_submodule(name) for name in layers}
    labels = torch.tensor([[7, 8, 9, 1, -100, -100], [7, 1, -100, -100, -100, -100]])
    mask = torch.tensor([[1] * 6, [1] * 5 + [0]])
    seen = layer_inputs(model, layers, [{"input_ids": torch.full((2, 6), 5), "attention_mask": mask, "labels": labels}])
    assert [len(vectors) for vectors in seen.values()] == [11, 6]
    start = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)], dim=1)  # as collators may add
    given = {"input_ids": torch.full((2, 6), 5), "attention_mask": mask, "labels": labels, "decoder_input_ids": start}
    again = layer_inputs(model, layers, [given])
    assert all(torch.equal(again[name], vectors) for name, vectors in seen.items())
    unused = layers | {"an expert": torch.nn.Linear(2, 2)}
    assert layer_inputs(model, unused, [given]).keys() == layers.keys()


def test_describe_says_how_full():
    space = GradientSpace(energy=1.0)
    space.extend({"q": matrix([1.0, 1.0])[0], "v": torch.randn(3, 9)})
    assert space.describe() == ["q: 2 of 8 directions", "v: 3 of 3 directions"]


def loaded_from(path, side: str, weights: dict[str, torch.Tensor] | None = None) -> GradientSpace:
    space = GradientSpace(side)
    space.load(path, weights or {})
    return space


def test_save_and_load(tmp_path):
    path = tmp_path / "space.safetensors"
    space = GradientSpace("input", 0.95)
    space.extend({"q": torch.randn(8, 12), "v": torch.randn(8, 12)})
    space.save(path)
    loaded = loaded_from(path, "input", {"q.weight": torch.zeros(8, 12)})
    assert list(loaded.bases) == list(space.bases)
    assert all(torch.equal(loaded.get(name), space.get(name)) for name in space.bases)
    with pytest.raises(InputError, match=r"space.safetensors: q: shape \(12, .\); allowed: \(9, c\)"):
        loaded_from(path, "input", {"q.weight": torch.zeros(8, 9)})
    GradientSpace().save(path)
    assert loaded_from(path, "output").describe() == []


def test_bad_files_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "space.safetensors"
    with pytest.raises(InputError, match="space.safetensors: no such file"):
        loaded_from(path, "output")
    space = GradientSpace()
    space.extend({"q": torch.randn(8, 12)})
    space.save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-9], b"\xff" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="space.safetensors: not a readable safetensors file"):
            loaded_from(path, "output")
    save_file({"q": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match="not a gradient space"):
        loaded_from(path, "output")
    save_file({}, path, {"format": "gorp-gradient-space", "version": "1", "side": "above", "energy": "0.9"})
    with pytest.raises(InputError, match="found output; allowed: above, for which .*space.safetensors"):
        loaded_from(path, "output")
