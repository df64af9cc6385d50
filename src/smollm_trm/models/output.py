"""What a forward pass gives back, and the loss of its supervised tokens."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per position in fp32, 0 where the label is -100.

    Args:
        logits: `(B, K, V)`.
        labels: `(B, K)`, aligned with the logits.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view_as(labels)


@dataclass
class ReasoningOutput:
    """What `SmolLMv3WithTRM.forward` returns."""

    logits: Tensor
    """`(B, K, V)`: the last K columns, all of them without labels."""
    labels: Tensor | None
    """`(B, K)`: the labels those logits are to predict, already shifted; -100 where there is none."""
    latents: Tensor | None
    """`(B, M, D)` as put into the slots."""
    halting_logit: Tensor | None
    """`(B,)` of the supervision step in use."""

    @property
    def loss(self) -> Tensor | None:
        """Mean cross-entropy over supervised tokens, nats, computed when asked for; None without labels."""
        if self.labels is None:
            return None
        return token_losses(self.logits, self.labels).sum() / (self.labels != -100).sum().clamp_min(1)
