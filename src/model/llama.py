"""LLaMA with a training loss that computes logits only for the tokens to predict."""

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

IGNORED = -100


class LlamaForCausalLM_with_lossmask(LlamaForCausalLM):
    """`LlamaForCausalLM` with the same loss for less memory.

    An answer is a few tokens of a prompt of hundreds, and each position's logits span the vocabulary: the head runs
    only on the positions that predict a label. Without labels (generation) this is the stock class.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Hidden states to loss; every other argument is the stock class's.

        Args:
            input_ids, attention_mask: (batch, length).
            labels: (batch, length), the inputs' own tokens; -100 where none is to be predicted.
            loss_mask: (batch, length), weight of the loss at each *predicting* position, one before its label; 1 by
                default. Positions of weight 0 are not scored.
            num_items_in_batch: tokens to average over, which the Trainer counts over all micro-batches of a step;
                by default the scored tokens of this batch.
            logits_to_keep: without labels, number of last positions to compute logits for; 0 means all. `generate`
                asks for the last one only if `forward` names this argument.

        Returns:
            With labels: `loss`, 0 if nothing is scored, and `logits` (scored tokens, vocabulary), in the order of the
            batch. Without: the stock class's output.

        Raises:
            ValueError: labels of another shape than the inputs.
        """
        if labels is None:
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep, **kwargs
            )
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = outputs.last_hidden_state
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels of shape {tuple(labels.shape)}; {tuple(hidden.shape[:2])} is needed")
        # Position t predicts token t + 1, so the last position predicts nothing.
        targets = labels[:, 1:].to(hidden.device)
        scored = targets != IGNORED
        if loss_mask is not None:
            weights = loss_mask[:, :-1].to(hidden.device)
            scored &= weights != 0
        logits = self.lm_head(hidden[:, :-1][scored])
        losses = cross_entropy(logits.float(), targets[scored], reduction="none")
        if loss_mask is not None:
            losses = losses * weights[scored]
        count = num_items_in_batch if num_items_in_batch is not None else scored.sum()
        # Without a target: an empty sum over one token, which is 0 with a graph, not 0 / 0.
        loss = losses.sum() / torch.as_tensor(count, device=losses.device).clamp(min=1)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
