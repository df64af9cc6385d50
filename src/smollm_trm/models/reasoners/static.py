"""Control: learned latents that are the same for every problem, a soft prompt. They ask nothing of the prompt."""

from typing import Any

import torch
from torch import Tensor, nn

from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.reasoner import LatentScale, Reasoner, ScaleSettings, Thought


class StaticLatents(Reasoner):
    """M learned latents."""

    def __init__(self, settings: ScaleSettings, *, num_latents: int, hidden_size: int, depth: int) -> None:
        super().__init__(settings, num_latents=num_latents, hidden_size=hidden_size, depth=depth)
        self.num_latents = num_latents
        self.scale = LatentScale(hidden_size=hidden_size, gain=settings.gain)
        self.states = nn.Parameter(torch.randn(num_latents, hidden_size))

    def think(self, prompt: Prompt, **options: Any) -> list[Thought]:
        return [Thought(self.scale(self.states).expand(len(prompt.mask), self.num_latents, -1))]

    def logs(self, thought: Thought) -> dict[str, Tensor]:
        """Nothing: the latents are meant to be the same everywhere."""
        return {}


class PauseTokens(StaticLatents):
    """One learned embedding, M times (pause tokens, Goyal et al. 2024): room to compute, no content."""

    def __init__(self, settings: ScaleSettings, *, num_latents: int, hidden_size: int, depth: int) -> None:
        super().__init__(settings, num_latents=1, hidden_size=hidden_size, depth=depth)
        self.num_latents = num_latents
