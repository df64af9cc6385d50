"""Coconut, chain of continuous thought (Hao et al. 2024): slot t holds the base's own final hidden state at t - 1.

The latents are computed one by one over a growing cache, all with gradient; nothing of the reasoner itself is trained.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.reasoner import ParameterGroup, Reasoner, Thought

coconut_log = logging.getLogger("smollm_trm.models.reasoners.coconut")


@dataclass(frozen=True, kw_only=True)
class CoconutSettings:
    """Coconut has none."""


class Coconut(Reasoner):
    """As many continuous thoughts as a row has slots."""

    Settings = CoconutSettings
    wants_fp32_base = True
    warned = False

    def think(self, prompt: Prompt, **options: Any) -> list[Thought]:
        if prompt.embeddings.dtype != torch.float32 and not self.warned:
            self.warned = True
            told = "reasoner 'coconut' on a base in %s weights: they hurt it; take dtype='float32' and autocast"
            coconut_log.warning(told, str(prompt.embeddings.dtype).removeprefix("torch."))
        thought, past = prompt.extend()
        latents: list[Tensor] = [thought]
        for _ in range(int(prompt.n_slots.max()) - 1):
            thought, past = prompt.extend(thought, past)
            latents.append(thought)
        cache = past if isinstance(past, Cache) else None
        return [Thought(torch.cat(latents, dim=1), cache=cache, n_cached=len(latents) - 1)]

    def parameter_groups(self, learning_rate: float) -> list[ParameterGroup]:
        return []
