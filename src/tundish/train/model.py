"""LLM Foundry's `hf_causal_lm`, with packed samples kept apart, and a loss of 0 for batches without targets."""

from collections.abc import Mapping
from typing import Any

import torch
from llmfoundry.models import ComposerHFCausalLM
from torch.nn.functional import cross_entropy

from tundish.train.attention import attention_mask
from tundish.train.loader import IGNORE_INDEX


def target_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the targets, in float32 and nats; 0 where there are none.

    Args:
        logits: [B, T, vocabulary]; position t predicts token t+1.
        labels: int64 [B, T], -100 where a token is not a target.
    """
    # The labels are shifted, not the logits: slicing those copies them, which takes gigabytes at a full context.
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).reshape(-1)
    scores = logits.reshape(-1, logits.shape[-1]).float()
    total = cross_entropy(scores, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    # A rank whose part of the last batch is all fillers takes part in the step: a mean over nothing is NaN, and
    # NaN times its weight of 0 is NaN.
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


class CausalLM(ComposerHFCausalLM):
    """Registered with LLM Foundry as the model `tundish_causal_lm`."""

    # Not LLM Foundry's other defaults: they follow from the loss, see `LossGuard`.
    default_train_metrics: tuple[str, ...] = ("token_accuracy",)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """The Hugging Face model's output, with `loss` where the batch has labels."""
        labels, segment_ids = batch.get("labels"), batch.get("segment_ids")
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if segment_ids is not None:
            window = getattr(self.config, "sliding_window", None)
            attention = self.config._attn_implementation  # pyright: ignore[reportPrivateUsage]  transformers' own name
            mask = attention_mask(segment_ids, attention, window)
            inputs |= {} if mask is None else {"attention_mask": mask}
        outputs = super().forward(inputs)
        if labels is not None:
            outputs["loss"] = target_loss(outputs["logits"], labels)
        return outputs
