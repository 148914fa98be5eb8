"""A decoder-only class with `AnswerLoss` in front computes the stock loss on fewer logits."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from model.answer_loss import causal_class

VOCABULARY = 40


@pytest.fixture(scope="module")
def models():
    """The same weights in the stock class and in ours."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = LlamaForCausalLM(config)
    ours = causal_class(config, "llama")(config)
    ours.load_state_dict(stock.state_dict())
    return SimpleNamespace(stock=stock.eval(), ours=ours.eval())


def make_batch(*answers: int, length: int = 9) -> dict[str, torch.Tensor]:
    """Left-padded rows; row i is two shorter than the row before and has answers[i] label tokens at its end."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(answers), length))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row, count in enumerate(answers):
        mask[row, : 2 * row] = 0
        labels[row, length - count :] = ids[row, length - count :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["batch mean", "number", "tensor"])
def test_loss_and_gradients_equal_the_stock_class(models, items):
    batch = make_batch(3, 1, 2)
    options = {} if items is None else {"num_items_in_batch": items}
    ours, stock = models.ours(**batch, **options), models.stock(**batch, **options)
    torch.testing.assert_close(ours.loss, stock.loss, atol=1e-6, rtol=0)
    expected = gradients(models.stock, stock.loss)
    for name, gradient in gradients(models.ours, ours.loss).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [{}, {"answer_length": 3}], ids=["read from the labels", "given"])
def test_logits_are_those_of_the_positions_that_predict_the_answers_columns(models, length):
    batch = make_batch(3, 1)
    ours, stock = models.ours(**batch, **length), models.stock(**batch)
    torch.testing.assert_close(ours.logits, stock.logits[:, 5:8])
    torch.testing.assert_close(ours.loss, stock.loss)


@pytest.mark.parametrize("items", [None, 0])
def test_no_target_is_a_loss_of_zero_with_a_graph(models, items):
    batch = make_batch(0, 0)
    loss = models.ours(**batch, num_items_in_batch=items).loss
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(models.ours, loss).values())


def test_without_labels_it_is_the_stock_class(models):
    batch = make_batch(1, 1)
    del batch["labels"]
    with torch.no_grad():
        assert torch.equal(models.ours(**batch).logits, models.stock(**batch).logits)
        assert isinstance(models.ours(**batch, return_dict=False), tuple)
    for options in ({}, {"num_beams": 2}):
        ours = models.ours.generate(**batch, max_new_tokens=6, **options)
        assert torch.equal(ours, models.stock.generate(**batch, max_new_tokens=6, **options))


def test_labels_of_another_width_are_refused(models):
    batch = make_batch(1)
    with pytest.raises(ValueError, match=r"\(1, 3\); \(1, 9\) is needed"):
        models.ours(**batch | {"labels": batch["labels"][:, -3:]})


def test_trainer_averages_over_all_tokens_of_an_accumulated_step(models, tmp_path):
    """Two micro-batches of 1 and 5 tokens give the gradient of one batch of 6, not the mean of two means."""
    rows = [{key: value[0] for key, value in make_batch(count).items()} for count in (1, 5)]
    steps = {}
    for size, accumulation in ((2, 1), (1, 2)):
        model = type(models.ours)(models.stock.config)
        model.load_state_dict(models.stock.state_dict())
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        steps[size] = model.state_dict()
    for name, value in steps[2].items():
        torch.testing.assert_close(value, steps[1][name], atol=1e-6, rtol=0)


def test_in_16_bits_the_loss_is_computed_in_float32(models):
    assert copy.deepcopy(models.ours).bfloat16()(**make_batch(3, 1, 2)).loss.dtype == torch.float32
