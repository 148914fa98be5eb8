"""A training loss for any decoder-only model, with logits computed only where a token is to be predicted."""

import functools
import inspect

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from errors import InputError

IGNORED = -100


class AnswerLoss:
    """A mixin in front of a causal language model of Transformers: the same loss for less memory.

    An answer has a few tokens after a prompt of hundreds, and each position's logits span the vocabulary. Here the
    stock forward, with whatever scaling or soft-capping it has, computes logits only from the position before the
    batch's first label onwards (`logits_to_keep`). Padding is not counted as positions, as in generation, although
    some stock classes (GPT-2's, XGLM's) count it in training. Without labels (in generation) this is the stock class.
    """

    takes_positions: bool  # whether the stock forward has `position_ids`

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        answer_length: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute the loss of token ids; arguments not listed here are the stock class's.

        Args:
            input_ids, attention_mask: (batch, length).
            labels: (batch, length), the inputs' own tokens; -100 where none is to be predicted.
            answer_length: how many of the last columns hold all labels. By default it is read from the labels, for
                which the CPU has to wait for the GPU.
            num_items_in_batch: tokens to average over, which the Trainer counts over all micro-batches of a step;
                by default those of this batch.
            logits_to_keep: without labels, as in the stock class. If `forward` names this argument, `generate` asks for
                the last position alone.

        Returns:
            With labels: `loss`, 0 if no token is to be predicted, and `logits` (batch, answer_length, vocabulary), of
            the positions that predict the last columns. A mixture of experts adds its balance loss as the stock class
            does. Without labels: the stock output.

        Raises:
            ValueError: the labels do not have the shape of the inputs.
        """
        if labels is None and getattr(self.config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", False)  # its loss fails where the mask also covers a cache
        if labels is not None and attention_mask is not None and self.takes_positions:
            kwargs.setdefault("position_ids", (attention_mask.cumsum(1) - 1).clamp(min=0))
        stock = functools.partial(super().forward, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is None:
            return stock(logits_to_keep=logits_to_keep)
        shape = (kwargs["inputs_embeds"] if input_ids is None else input_ids).shape[:2]
        if labels.shape != shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)}; {tuple(shape)} is needed")
        # Position t predicts token t + 1, so the last position predicts nothing.
        targets, length = labels[:, 1:], shape[1] - 1
        if answer_length is None:
            scored = (targets != IGNORED).any(0)
            answer_length = int((scored * torch.arange(length, 0, -1, device=labels.device)).amax())
        kept = torch.arange(length - answer_length, length, device=labels.device)
        outputs = stock(logits_to_keep=kept)
        logits, targets = outputs.logits, targets[:, kept].flatten().to(outputs.logits.device)
        total = cross_entropy(logits.float().flatten(0, 1), targets, reduction="none", ignore_index=IGNORED).sum()
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
        # Without a target this is an empty sum over one token: 0 with a graph, not 0 / 0.
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if (balance := getattr(outputs, "aux_loss", None)) is not None:
            weight = "router_aux_loss_coef" if hasattr(self, "router_aux_loss_coef") else "aux_loss_coef"  # JetMoE's
            loss = loss + getattr(self, weight) * balance
        return type(outputs)(**{**outputs, "loss": loss, "logits": logits})


def causal_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """Transformers' decoder-only class for `config`, with `AnswerLoss` in front of it, under the stock name.

    Raises InputError if there is no such class, or if its forward always computes the logits of every position.
    """
    found = f"{name}/config.json: found model_type {config.model_type!r}"
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder or type(config) not in kinds or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise InputError(f"{found}; allowed: decoder-only models (llama, qwen3, mistral, ...) and encoder-decoder "
                         "models (t5, mt5, bart, ...)")  # fmt: skip
    stock = kinds[type(config)]
    parameters = inspect.signature(stock.forward).parameters
    if "logits_to_keep" not in parameters:
        raise InputError(f"{found}, whose {stock.__name__} cannot compute the logits of some positions alone; "
                         "docs/MODELS.md lists models that can")  # fmt: skip
    own = {"__module__": stock.__module__, "__doc__": stock.__doc__, "takes_positions": "position_ids" in parameters}
    return type(stock.__name__, (AnswerLoss, stock), own)


@torch.no_grad()
def check_loss(model: PreTrainedModel, name: str) -> None:
    """Reject a model whose loss on two left-padded examples differs from the stock class's on each of them alone."""
    ids = torch.linspace(0, model.get_input_embeddings().num_embeddings - 1, 24, device=model.device).long().view(2, 12)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :4], labels[:, :8] = 0, IGNORED
    ours = model(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
    forward = super(AnswerLoss, model).forward
    alone = [forward(input_ids=ids[None, cut:], labels=wanted[None, cut:]).loss.item()
             for ids, wanted, cut in zip(ids, labels, (0, 4))]  # fmt: skip
    stock, tolerance = sum(alone) / 2, 1e-4 if model.dtype == torch.float32 else 3e-2
    if not abs(ours - stock) <= tolerance * max(1, abs(stock)):
        raise InputError(f"{name}: a left-padded batch has a loss of {ours:.4f}, but without padding the stock "
                         f"{type(model).__name__} has {stock:.4f}; docs/MODELS.md lists models where they are equal")
