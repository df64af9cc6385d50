"""What a forward pass gives back: hidden states, logits, and the loss of its supervised tokens."""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def states_at(decoder: nn.Module, depths: list[int], **inputs: Any) -> list[Tensor]:
    """The hidden states that `output_hidden_states=True` has at these depths, without keeping the others.

    Args:
        decoder: a Hugging Face decoder without its head.
        depths: rising; k is what layer k (from 0) gets, and the last is what the decoder returns, normed.
        inputs: for the decoder.

    Returns:
        A tensor `(B, L, D)` per depth.
    """
    stacks = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    layers = next(stack for stack in stacks if len(stack) == depths[-1])
    states: list[Tensor] = []
    hooks = [layers[k].register_forward_pre_hook(lambda _, given: states.append(given[0])) for k in depths[:-1]]
    try:
        last = decoder(**inputs).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, last]


def supervised_columns(labels: Tensor | None) -> int:
    """How many of the last columns need logits: from the one before the first label; 0, which means all, without."""
    if labels is None:
        return 0
    return labels.shape[1] - max(1, int((labels != -100).any(0).int().argmax())) + 1


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
