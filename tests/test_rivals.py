"""Rival methods: each has the property that defines it. tests/test_every_method.py runs them through the entry."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from errors import InputError
from helpers import ADAM, ROOT, batches, begin, finish, fit, method_of, tiny_t5, train
from loranew import loranew_layers
from subspace import see_inputs
from task_examples import OrderExamples

STAGE_2 = str(ROOT / "configs" / "ds_configs" / "stage2.config")
FULL_RANK = "full_rank_weights.safetensors"


def covariances(model, layers, task: int) -> dict[str, torch.Tensor]:
    """sum x x^T of what each layer sees of a task, in float64."""
    seen = {name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
            for name, layer in layers.items()}
    see_inputs(model, layers, batches(task),
               lambda name, _, inputs: [seen[name].add_(X.double().T @ X.double()) for X in inputs])  # fmt: skip
    return seen


@pytest.mark.parametrize("name, computed", [
    ("inflora", lambda method, model, shown: method.covariances(model, shown)),
    ("ewc", lambda method, model, shown: method.revisit(model, shown) or method.fisher),
])  # fmt: skip
def test_what_two_ranks_compute_on_their_shares_adds_up_to_all(name, computed, tmp_path, monkeypatch):
    method, sums = method_of(name, folder=tmp_path), []
    model = begin(method, None)

    def one_after_the_other(*tensors: torch.Tensor) -> None:
        """The first rank leaves its tensors, to which the second adds."""
        for tensor in tensors:
            tensor += next(of_first)
            sums.append(tensor.clone())

    alone = computed(method, model, iter(batches()))
    for shown in (batches()[:1], batches()[1:]):
        of_first, sums = iter(sums or [0] * 99), []
        method.fisher = {}
        monkeypatch.setattr(f"methods.{name}.sum_over_ranks", one_after_the_other)
        together = computed(method, model, iter(shown))
    assert together.keys() == alone.keys()
    for layer, value in together.items():
        torch.testing.assert_close(value, alone[layer], rtol=1e-5, atol=1e-6 * value.abs().max().item())


# InfLoRA


def test_inflora_trains_b_alone_in_new_directions_of_the_inputs(tmp_path):
    train(method_of("inflora", folder=tmp_path), None, tmp_path / "1")
    second = method_of("inflora", folder=tmp_path)
    model = begin(second, tmp_path / "1", task=1)
    C = covariances(model, second.layers, task=1)
    chosen = {name: A.clone() for name, A in second.A.items()}
    for name, A in chosen.items():
        M = second.space.get(name).double()
        assert (A @ M.float()).abs().max() < 1e-5
        found = min(8, int(torch.linalg.matrix_rank(residual := C[name] - M @ (M.T @ C[name]), rtol=1e-5)))
        assert found == 8 or "decoder" in name  # which sees fewer tokens
        torch.testing.assert_close(3 * A @ A.T, (torch.arange(8) < found).diag().float(), rtol=0, atol=1e-5)
        held = (math.sqrt(3) * A.double() @ residual).square().sum()
        best = torch.linalg.svdvals(residual)[:8].square().sum()
        assert held > 0.999 * best
    fit(second, model, task=1)
    for name, layer in second.layers.items():
        assert torch.equal(second.A[name], chosen[name])
        change = layer.get_delta_weight("default") - layer.scaling["default"] * (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        assert change.norm() > 1e-2 and (change @ second.space.get(name)).norm() < 1e-4 * change.norm()


def test_inflora_keeps_the_energy_that_the_order_asks_for(tmp_path):
    """eps_t = eps + (1 - eps) t / T: 0.8, 0.85 and 0.9 after the first three of order 1's four tasks."""
    previous, before = None, {}
    for task, dataset in enumerate(("dbpedia", "amazon", "yahoo")):
        method = method_of("inflora", "--inflora_energy", "0.8", folder=tmp_path)
        order = OrderExamples(ROOT / "configs" / "order1_configs" / dataset, None, seed=0, fixed_steps=True, reads="no")
        method.training_examples(None, order)
        model = begin(method, previous, task)
        fit(method, model, task)
        C = covariances(model, method.layers, task)
        previous = finish(method, model, tmp_path / str(task), task)
        wanted = 0.8 + 0.05 * task
        for name, matrix in C.items():
            M = method.space.get(name).double()
            if name in before:
                assert M.shape[1] > (count := before[name].shape[1]) and torch.equal(M[:, :count], before[name])
            shares = [(M[:, :count].T @ matrix).square().sum() / matrix.square().sum() for count in (M.shape[1], -1)]
            assert shares[0] >= wanted - 1e-5 > shares[1]
            before[name] = M


@pytest.mark.parametrize("kept, found", [  # columns of M, and how many directions of C are outside it
    ([0, 1, 2, 3], 2), ([], 3), ([0, 1, 2, 3, 4, 5], 0),
])  # fmt: skip
def test_inflora_has_zero_rows_where_no_direction_is_left(kept, found):
    from methods.inflora import directions

    Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    C = (Q[:, :6] * torch.tensor([50.0, 40, 30, 20, 2, 1])) @ Q[:, :6].T  # nothing in the last two directions
    rows = directions(C, Q[:, kept], 3)
    assert ((rows @ Q[:, kept]).abs() < 1e-5).all()
    assert (rows @ Q[:, 6:]).abs().max() < 1e-4
    torch.testing.assert_close(rows[:found] @ rows[:found].T, torch.eye(found))
    assert not rows[found:].any() and not directions(torch.zeros(8, 8), None, 3).any()


def test_inflora_uses_directions_far_above_rounding_errors():
    """A few large entries among the inputs, as some layers of LLMs have them, hide none of the others."""
    from methods.inflora import directions

    X = torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    X[::100, 7] = 3000
    rows = directions(X.T @ X, None, 8)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=1e-4, rtol=0)


def test_layers_that_no_example_reaches_stop_no_task(tmp_path, monkeypatch):
    """An expert of a mixture, for instance."""
    name = "decoder.block.1.layer.0.SelfAttention.v"
    for kind in ("ewc", "inflora", "sgorp"):
        method = method_of(kind, folder=tmp_path)
        model = method.prepare(tiny_t5(), None, decoder_only=False)
        layer = model.get_base_model().get_submodule(name)
        layer.forward = lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)
        hooks = layer.register_forward_pre_hook
        monkeypatch.setattr(layer, "register_forward_pre_hook", lambda hook: hooks(lambda *_: None))
        method.begin_task(model, iter(batches()))
        model.train()
        fit(method, model)
        finish(method, model, tmp_path / kind)
        if kind == "inflora":
            assert not method.A[name].any() and all(A.any() for other, A in method.A.items() if other != name)
        elif kind == "ewc":
            assert not any(F.any() for factor, F in method.fisher.items() if name in factor)
        else:
            assert method.space.get(f"{name}.loranew_A") is None


@pytest.mark.parametrize("first, second", [("gorp", "gorp"), ("sgorp", "sgorp"), ("sgorp", "gorp")])
def test_a_task_without_protection_passes_the_space_on(first, second, tmp_path):
    train(method_of(first, folder=tmp_path), None, tmp_path / "1")
    train(method_of(second, "--protect", "none", folder=tmp_path), tmp_path / "1", tmp_path / "2", task=1)
    before, after = ((tmp_path / task / "gradient_space.safetensors").read_bytes() for task in "12")
    assert before == after and load_file(tmp_path / "1" / "gradient_space.safetensors")


def test_sgorp_without_protected_factors_leaves_them_their_whole_input(tmp_path):
    train(method_of("sgorp", folder=tmp_path), None, tmp_path / "1")
    model = begin(method_of("sgorp", "--proj_lora_modules", "none", folder=tmp_path), tmp_path / "1", task=1)
    assert all(layer.loranew_A["default"].space is None for layer in loranew_layers(model).values())


def test_inflora_refuses_a_task_that_would_train_nothing(tmp_path):
    first = train(method_of("inflora", folder=tmp_path), None, tmp_path / "1")
    bases = {name: torch.eye(len(S)) for name, S in load_file(first / "input_space.safetensors").items()}
    about = {"format": "gorp-gradient-space", "version": "1", "side": "input"}
    save_file(bases, first / "input_space.safetensors", about)
    with pytest.raises(InputError, match="--method inflora: earlier tasks' inputs leave this task no direction"):
        begin(method_of("inflora", folder=tmp_path), first, task=1)
    broken = method_of("inflora", folder=tmp_path)
    model = broken.prepare(tiny_t5(), None, decoder_only=False)
    torch.nn.init.constant_(model.get_input_embeddings().weight, math.nan)
    with pytest.raises(InputError, match="--method inflora: the inputs of .* are not finite"):
        broken.begin_task(model, iter(batches()))


# ELLA


def overlap(method) -> torch.Tensor:
    """||dW * W_past||_F^2 over all layers, from the definition."""
    total = 0
    for layer in loranew_layers(method.model).values():
        s, pairs = layer.scaling["default"], (layer.loranew_B, layer.loranew_A, layer.lora_B, layer.lora_A)
        B, A, B_old, A_old = (pair["default"].weight for pair in pairs)
        total = total + ((s * B @ A) * (s * B_old @ A_old)).square().sum()
    return total


def test_ella_penalty_and_gradient_are_those_of_the_elementwise_product(tmp_path, monkeypatch):
    monkeypatch.setattr("methods.ella.BLOCK", 48)  # does not divide a weight's 128 rows
    first = method_of("ella", "--ella_lamda", "3", folder=tmp_path)
    model = begin(first, None)
    assert first.penalty() is None
    fit(first, model)
    finish(first, model, tmp_path / "1")
    second = method_of("ella", "--ella_lamda", "3", folder=tmp_path)
    begin(second, tmp_path / "1")
    assert second.penalty() == 0
    factors = [factor for _, factor in second.factors()]
    for factor in factors:
        torch.nn.init.normal_(factor)
    wanted = 3 * overlap(second)
    torch.testing.assert_close(second.penalty(), wanted)
    gradients = [torch.autograd.grad(value, factors) for value in (second.penalty(), wanted)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_ella_shrinks_each_entry_by_what_earlier_tasks_did_to_it():
    """Of min ||B A - T||^2 + lambda ||B A * W_past||^2 at full rank, the solution is T / (1 + lambda W_past^2)."""
    from methods.ella import Overlap

    torch.manual_seed(0)
    A_old, B_old, T = torch.randn(2, 6), torch.randn(6, 2), torch.randn(6, 6)
    A, B = torch.randn(6, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    optimizer = torch.optim.LBFGS([A, B], max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (B @ A - T).square().sum() + 5 * Overlap.apply(A, B, A_old, B_old)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close((B @ A).detach(), T / (1 + 5 * (B_old @ A_old).square()), rtol=0, atol=1e-2)


def test_penalties_neither_under_nor_overflow_in_fp16(tmp_path):
    """DeepSpeed's fp16 keeps the factors in 16 bits and multiplies the loss by 2^16 at first."""
    from methods.ella import Overlap

    generator = torch.Generator().manual_seed(0)
    factors = [0.02 * torch.randn(shape, generator=generator) for shape in ((8, 96), (96, 8), (8, 96), (96, 8))]
    values, gradients = [], []
    for dtype in (torch.float32, torch.float16):
        narrow = [factor.half().to(dtype) for factor in factors]
        new = [factor.requires_grad_() for factor in narrow[:2]]
        value = Overlap.apply(*new, *narrow[2:])
        values.append(value.detach())
        gradients.append([gradient.float() for gradient in torch.autograd.grad(2**16 * 1000 * value, new)])
    assert 0 < values[0] == values[1]
    for exact, narrow in zip(*gradients):
        assert exact.any()
        torch.testing.assert_close(narrow, exact, rtol=1e-2, atol=1e-3 * exact.abs().max().item())
    method = method_of("nlora", "--nlora_lamda", "1", folder=tmp_path)
    model = begin(method, None).half()
    for _, factor in method.factors():
        torch.nn.init.ones_(factor)
    layers = loranew_layers(model).values()
    assert method.penalty() == sum(8 * layer.in_features * layer.out_features for layer in layers) > 65504


@pytest.mark.parametrize("name, kind", [("ella", "lora_B"), ("olora", "lora_A")])
def test_every_earlier_task_counts_in_a_penalty(name, kind, tmp_path):
    previous = None
    for task in range(2):
        previous = train(method_of(name, folder=tmp_path), previous, tmp_path / str(task), task)
    method = method_of(name, folder=tmp_path)
    begin(method, previous, task=2)
    for _, factor in method.factors():
        torch.nn.init.normal_(factor)
    whole = method.penalty().item()
    parts = []
    for cleared in (slice(None, 8), slice(8, None)):  # the first task's, the second's
        kept = {layer: getattr(layer, kind)["default"].weight for layer in loranew_layers(method.model).values()}
        old = {layer: weight.detach().clone() for layer, weight in kept.items()}
        for weight in kept.values():
            (weight.data if kind == "lora_A" else weight.data.T)[cleared] = 0
        parts.append(method.penalty().item())
        for layer, weight in kept.items():
            weight.data.copy_(old[layer])
    assert all(0 < part < 0.999 * whole for part in parts)


# SLAO


def test_slao_starts_from_orthonormal_rows_of_the_last_fine_tuned_factor_and_merges_b_alone(tmp_path):
    previous, fine_tuned, merged = None, {}, {}
    for task in range(3):
        method = method_of("slao", folder=tmp_path)
        model = begin(method, previous, task)
        for name, factor in method.factors() if task else ():
            last = fine_tuned[name]
            if ".loranew_B." in name:
                assert torch.equal(factor, last)
                continue
            torch.testing.assert_close(factor @ factor.T, torch.eye(8), rtol=0, atol=1e-5)
            R = factor @ last.T  # A^T = Q R
            torch.testing.assert_close(R.T @ factor, last, rtol=1e-4, atol=1e-5)
            assert (R.tril(-1).abs() < 1e-5).all() and (R.diagonal() > 0).all()
        fit(method, model, task)
        fine_tuned = {name: factor.detach().clone() for name, factor in method.factors()}
        for name, factor in fine_tuned.items():
            step = 1 if ".loranew_A." in name else 1 / math.sqrt(task + 1)
            merged[name] = merged.get(name, factor) + step * (factor - merged.get(name, factor))
        previous = finish(method, model, tmp_path / str(task), task)
        reloaded = method_of("slao", folder=tmp_path)
        reloaded.prepare(tiny_t5(), previous, decoder_only=False)
        for name, factor in reloaded.factors():
            torch.testing.assert_close(factor.detach(), merged[name])
    assert any(not torch.allclose(merged[name], fine_tuned[name], atol=1e-3) for name in merged)


# MagMax


@pytest.mark.parametrize("rule", ["max", "ties"])
def test_magmax_evaluates_the_merged_changes_and_trains_on_from_the_unmerged_ones(rule, tmp_path):
    base, previous, taus = dict(tiny_t5().named_parameters()), None, {}
    for task in range(3):
        method = method_of("magmax", "--magmax_merge", rule, "--magmax_scale", "0.3", folder=tmp_path)
        model = begin(method, previous, task)
        for name, layer in loranew_layers(model).items():
            assert torch.equal(layer.get_base_layer().weight, base[f"{name}.weight"])
            if task:
                torch.testing.assert_close(layer.get_delta_weight("default"), taus[name][-1])
        fit(method, model, task)
        for name, layer in loranew_layers(model).items():
            taus.setdefault(name, []).append(layer.get_delta_weight("default").detach())
        previous = finish(method, model, tmp_path / str(task), task)
        reloaded = method_of("magmax", folder=tmp_path).prepare(tiny_t5(), previous, decoder_only=False)
        sizes = [torch.cat([of[number].abs().flatten() for of in taus.values()]) for number in range(task + 1)]
        bound = torch.stack([of.sort().values[-int(0.2 * len(of)) - 1] for of in sizes])[:, None, None]
        for name, layer in loranew_layers(reloaded).items():
            stacked = torch.stack(taus[name])
            if rule == "max":
                merged = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
            else:
                kept = torch.where(stacked.abs() > bound, stacked, 0)
                agree = kept * kept.sum(0).sign() > 0
                merged = (kept * agree).sum(0) / agree.sum(0).clamp_min(1)
            assert not layer.get_delta_weight("default").any()
            change = layer.get_base_layer().weight - base[f"{name}.weight"]
            torch.testing.assert_close(change, 0.3 * merged, rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match="holds changed full-rank weights; allowed: --as model"):
        export.write_adapter(previous, tmp_path / "adapter")


def test_magmax_merges_into_the_exact_base_where_deepspeed_holds_it_in_16_bits(tmp_path):
    """These changes are smaller than what 16 bits round away of a weight."""
    small = ("magmax", "--magmax_scale", "0.001")
    torch.manual_seed(0)
    whole = load_file(train(method_of(*small, folder=tmp_path), None, tmp_path / "1") / FULL_RANK)
    torch.manual_seed(0)
    method = method_of(*small, folder=tmp_path)
    model = method.prepare(tiny_t5(), None, decoder_only=False, sharded=True)
    method.begin_task(model, iter(()))
    fit(method, model.train())
    for layer in loranew_layers(model).values():
        layer.get_base_layer().bfloat16()
    narrow = load_file(finish(method, model, tmp_path / "2") / FULL_RANK)
    base = dict(tiny_t5().named_parameters())
    for name, weight in whole.items():
        change = weight - base[name].detach()
        assert (weight.bfloat16() - weight).norm() > change.norm()
        assert (narrow[name] - weight).norm() < 0.05 * change.norm()


def test_ties_trims_elects_and_averages():
    """Of each task the largest 20 % of all entries, which lie in one layer here, keep their values."""
    from methods.magmax import limit, ties

    changes = [torch.tensor([[9.0, 8, 3, 3, 1]]), torch.tensor([[-5.0, 4, 3, 3, 1]])]
    elsewhere = torch.ones(1, 5)
    pairs = [[(change, torch.ones(1, 1)) for change in of] for of in (changes, [elsewhere] * 2)]  # of two layers
    limits = [limit(of_task) for of_task in zip(*pairs)]
    assert limits == pytest.approx([3, 3], rel=1e-6)
    assert torch.equal(ties(pairs[0], limits), torch.tensor([[9.0, 6, 0, 0, 0]]))
    assert not ties(pairs[1], limits).any()


# EWC


def test_ewc_holds_the_mean_squared_gradient_of_each_row_over_tasks(tmp_path):
    expected = {}
    for task, decay in enumerate((1, 0.5)):
        method = method_of("ewc", "--ewc_decay", "0.5", folder=tmp_path)
        model = begin(method, tmp_path / "0" if task else None, task)
        fit(method, model, task)
        model.eval()
        expected = {name: decay * F for name, F in expected.items()}
        for batch in batches(task):
            for row in range(2):
                one = {key: value[row : row + 1] for key, value in batch.items()}
                answer = one["labels"][one["labels"] != -100]
                logits = model(**one).logits[0, : len(answer)]
                likelihood = logits.log_softmax(-1).gather(-1, answer[:, None]).sum()
                likelihood.backward()
                for name, factor in method.factors():
                    expected[name] = expected.get(name, 0) + factor.grad.square() / 6
                model.zero_grad()
        finish(method, model, tmp_path / str(task), task)
        saved = load_file(tmp_path / str(task) / "fisher.safetensors")
        assert saved.keys() == expected.keys()
        for name, F in saved.items():
            torch.testing.assert_close(F, expected[name], rtol=1e-3, atol=1e-6 * F.max().item())


def test_ewc_takes_gradients_without_dropout(tmp_path):
    method = method_of("ewc", "--lora_dropout", "0.5", folder=tmp_path)
    model = begin(method, None)
    fit(method, model)
    found = []
    for _ in range(2):
        method.fisher = {}
        method.revisit(model, iter(batches()))
        found.append(method.fisher)
    assert model.training and all(torch.equal(F, found[1][name]) for name, F in found[0].items())


@pytest.mark.parametrize("name", ["slao", "magmax", "ewc"])
def test_what_a_method_needs_beside_the_lora_must_be_there_and_fit(name, tmp_path):
    first = train(method_of(name, folder=tmp_path), None, tmp_path / "1")
    plain = ("adapter_model.safetensors", FULL_RANK)
    (beside,) = [path for path in first.glob("*.safetensors") if path.name not in plain]
    tensors = load_file(beside)
    for damaged in ({key: tensor[..., :-1].contiguous() for key, tensor in tensors.items()}, {}):
        save_file(damaged, beside, {"tasks": "1"})
        with pytest.raises(InputError, match=f"{beside.name}: its tensors do not fit the LoRA beside it"):
            method_of(name, folder=tmp_path).prepare(tiny_t5(), first, decoder_only=False)
    beside.unlink()
    with pytest.raises(InputError, match=f"{beside.name}: no such file"):
        method_of(name, folder=tmp_path).prepare(tiny_t5(), first, decoder_only=False)


def test_ewc_penalty_does_not_overflow_under_a_loss_scale(tmp_path):
    """fp16's: F lambda / 2 times 2^16 overflows, its product with theta - theta* does not."""
    train(method_of("ewc", folder=tmp_path), None, tmp_path / "1")
    method = method_of("ewc", "--ewc_lamda", "100", folder=tmp_path)
    begin(method, tmp_path / "1", 1)
    for name, factor in method.factors():
        factor.data = factor.data.half()
        method.start[name] -= 1e-3
        method.fisher[name] = torch.ones_like(method.start[name])
    method.begin_training()
    (method.penalty() * 2**16).backward()
    assert all(factor.grad.isfinite().all() and factor.grad.any() for _, factor in method.factors())


def test_ewc_penalty_is_half_the_weighted_distance_to_the_last_task(tmp_path):
    train(method_of("ewc", folder=tmp_path), None, tmp_path / "1")
    method = method_of("ewc", "--ewc_lamda", "7", "--ewc_decay", "0.8", folder=tmp_path)
    begin(method, tmp_path / "1")
    assert method.penalty() == 0
    F = load_file(tmp_path / "1" / "fisher.safetensors")
    with torch.no_grad():
        for _, factor in method.factors():
            factor += 0.1
    torch.testing.assert_close(method.penalty(), 0.5 * 7 * 0.8 * 0.01 * sum(value.sum() for value in F.values()))
    assert method_of("ewc", "--ewc_lamda", "0", folder=tmp_path).penalty() is None


# N-LoRA's two forms


def test_nlora_forms_are_the_papers_product_and_the_released_codes(tmp_path):
    for form in ("product", "factors"):
        method = method_of("nlora", "--nlora_lamda", "0.5", "--nlora_form", form, folder=tmp_path)
        begin(method, None)
        assert method.penalty() == 0
        factors = dict(method.factors())
        for factor in factors.values():
            torch.nn.init.normal_(factor)
        pairs = [(A, factors[name.replace("_A", "_B")]) for name, A in factors.items() if "_A" in name]
        wanted = sum((B @ A if form == "product" else A @ B).abs().sum() for A, B in pairs)
        torch.testing.assert_close(method.penalty(), 0.5 * wanted)
    assert method_of("nlora", "--nlora_lamda", "0", folder=tmp_path).penalty() is None


def test_nlora_weighs_each_form_by_its_own_default(tmp_path):
    of_form = {form: method_of("nlora", "--nlora_form", form, folder=tmp_path).options.nlora_lamda
               for form in ("product", "factors")}  # fmt: skip
    assert of_form == {"product": 1e-5, "factors": 0.4}


def test_nlora_factors_need_square_weights(tmp_path):
    method = method_of("nlora", "--nlora_form", "factors", "--lora_modules", ".*wi.*", folder=tmp_path)
    with pytest.raises(InputError, match="--nlora_form: found factors; allowed: product for .*wi"):
        method.prepare(tiny_t5(), None, decoder_only=False)


# Muon


@pytest.mark.parametrize("name", ["seqlora", "inclora"])
def test_a_muon_step_moves_every_direction_of_a_factor_alike_and_by_adamws_size(name, tmp_path):
    method = method_of(name, "--lora_optimizer", "muon", folder=tmp_path)
    begin(method, None)
    optimizer = method.create_optimizer(**ADAM)
    before = {key: factor.detach().clone() for key, factor in method.factors()}
    torch.manual_seed(0)
    for _, factor in method.factors():
        factor.grad = torch.randn(factor.shape)
    optimizer.step()
    for key, factor in method.factors():
        change = factor.detach() - before[key]
        spread = torch.linalg.svdvals(change)
        assert spread.max() < 1.8 * spread.min()
        assert change.square().mean().sqrt() == pytest.approx(0.2 * ADAM["lr"], rel=0.25)
    plain = method_of(name, folder=tmp_path)
    begin(plain, None)
    assert type(plain.create_optimizer(**ADAM)) is torch.optim.AdamW


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_decays_as_told(decay, tmp_path):
    method = method_of("seqlora", "--lora_optimizer", "muon", folder=tmp_path)
    begin(method, None)
    optimizer = method.create_optimizer(**ADAM | {"weight_decay": decay})
    before = {name: factor.detach().clone() for name, factor in method.factors()}
    for _, factor in method.factors():
        factor.grad = torch.zeros_like(factor)
    optimizer.step()
    for name, factor in method.factors():
        torch.testing.assert_close(factor.detach(), before[name] * (1 - ADAM["lr"] * decay))


def test_muon_is_refused_under_deepspeed(tmp_path):
    with pytest.raises(InputError, match="--lora_optimizer: found muon; allowed: adamw under DeepSpeed"):
        method_of("seqlora", "--lora_optimizer", "muon", "--deepspeed", STAGE_2, folder=tmp_path)


# SGORP


@pytest.mark.parametrize("energy", [0.6, 0.9])
def test_sgorp_protects_the_share_of_the_inputs_energy_that_is_asked_for(energy, tmp_path):
    method = method_of("sgorp", "--space_energy", str(energy), folder=tmp_path)
    model = begin(method, None)
    fit(method, model)
    names = {*method.targets, *(name.removesuffix(".loranew_A.weight") for name in method.protected)}
    C = covariances(model, {name: model.get_base_model().get_submodule(name) for name in names}, task=0)
    finish(method, model, tmp_path / "1")
    for name in (*method.targets, *method.protected):
        S, seen = method.space.get(name).double(), C[name.removesuffix(".loranew_A.weight")]
        shares = [torch.trace(S[:, :count].T @ seen @ S[:, :count]) / torch.trace(seen) for count in (S.shape[1], -1)]
        assert shares[0] >= energy - 1e-5 > shares[1]


# SGORP, protected after each step


@pytest.mark.parametrize("engine", ["dense", "cores"])
def test_sgorp_step_keeps_the_new_factor_clear_of_the_space_after_every_step(engine, tmp_path):
    # With bases on the other side, removing S from the gradient alone would not keep full-rank weights clear of it.
    flags = ["--protect", "step", "--galore_engine", engine, "--galore_proj_type", "reverse_std"]
    train(method_of("sgorp", *flags, folder=tmp_path), None, tmp_path / "1")
    method = method_of("sgorp", *flags, folder=tmp_path)
    model = begin(method, tmp_path / "1", task=1)
    seen = []
    optimizer = method.create_optimizer(**ADAM)
    optimizer.register_step_post_hook(lambda *_: seen.append(
        max((A @ method.space.get(name)).norm() / A.norm() for name, A in method.protected.items())))
    method.create_optimizer = lambda **_: optimizer
    start = {name: A.detach().clone() for name, A in method.protected.items()}
    assert max((A @ method.space.get(name)).norm() for name, A in start.items()) < 1e-5
    fit(method, model, task=1)
    assert len(seen) == 3 and max(seen) < 1e-5
    assert all((A - start[name]).norm() > 1e-3 for name, A in method.protected.items())
    assert all(layer.loranew_A["default"].space is None for layer in loranew_layers(model).values())
    finish(method, model, tmp_path / "2", task=1)
    space = load_file(tmp_path / "1" / "gradient_space.safetensors")
    before, after = (load_file(tmp_path / task / FULL_RANK) for task in "12")
    for name, weight in before.items():
        change = after[name] - weight
        assert change.norm() > 1e-3
        assert (change @ space[name.removesuffix(".weight")]).norm() < 1e-4 * change.norm()


def test_sgorp_step_protects_the_input_side_in_one_process(tmp_path):
    output = ["--protect_side", "output", "--space_from", "moments"]
    for flags, fault in ((output, "--protect step: found --protect_side output"),
                         (["--deepspeed", STAGE_2], "--protect: found step; allowed: structural under DeepSpeed")):
        with pytest.raises(InputError, match=fault):
            method_of("sgorp", "--protect", "step", *flags, folder=tmp_path)
