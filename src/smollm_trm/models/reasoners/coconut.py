"""Coconut, chain of continuous thought (Hao et al. 2024): slot t holds the base's own final hidden state at t - 1.

The latents are computed one by one over a growing cache, all with gradient; nothing of the reasoner itself is trained.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.reasoner import ParameterGroup, Reasoner, Thought


@dataclass(frozen=True, kw_only=True)
class CoconutSettings:
    """Coconut has none."""


class Coconut(Reasoner):
    """As many continuous thoughts as a row has slots."""

    Settings = CoconutSettings

    def think(self, prompt: Prompt, **options: Any) -> list[Thought]:
        """One latent after the other; `(B, M, D)` with M the most slots of a row."""
        thought, past = prompt.extend()
        latents: list[Tensor] = [thought]
        for _ in range(int(prompt.n_slots.max()) - 1):
            thought, past = prompt.extend(thought, past)
            latents.append(thought)
        return [Thought(torch.cat(latents, dim=1))]

    def parameter_groups(self, learning_rate: float) -> list[ParameterGroup]:
        """Nothing of its own is trained."""
        return []
