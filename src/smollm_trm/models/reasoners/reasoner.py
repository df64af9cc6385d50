"""The one seam: a reasoner is asked once per prompt and fills the latent span behind it.

    class MyReasoner(Reasoner):
        def __init__(self, settings, *, num_latents, hidden_size, depth): ...
        def think(self, prompt, *, n_steps=None, gradient_at_every_step=False):
            return [Thought(latents)]                                                  # (B, M, D)

Nothing outside `models/reasoners` knows a reasoner's name or attributes: it brings its settings, its parameter groups
and what is worth logging about it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from smollm_trm.models.prompt import Prompt
from smollm_trm.records import UserMistake


class Thought(NamedTuple):
    """What one supervision step of a reasoner leaves."""

    latents: Tensor
    """`(B, M, D)`, in the scale of the base's embedding table. A row with fewer slots takes the first of them."""
    halting_logit: Tensor | None = None
    """`(B,)`, above 0: further steps are not expected to help; None where a reasoner has no such head."""
    cache: Cache | None = None
    """What the base has read, from which the answering pass goes on; None where the reasoner read nothing."""
    n_cached: int = 0
    """How many of the latents the cache holds behind the prompt."""
    free: Tensor | None = None
    """`(B, M, D)`, where latents are mixtures of words: the free latents that chose them, which `words` reads."""


class ParameterGroup(NamedTuple):
    """Parameters that share a learning rate."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float  # peak of the schedule


@dataclass(frozen=True, kw_only=True)
class ScaleSettings:
    """What every reasoner with learned latents can be told."""

    gain: float = 1.0
    """Size of the reasoner's part of a latent at the start, relative to the embedding table's rms."""

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise UserMistake(f"gain={self.gain}: must be above 0, or no gradient reaches the reasoner")


class Reasoner(nn.Module, ABC):
    """Fills a latent span.

    Made with an object of its `Settings`, M (`num_latents`), and the base's `hidden_size` D and number of layers.
    """

    Settings: ClassVar[type] = ScaleSettings
    """A frozen dataclass; what a user may set."""
    n_supervision_steps: int = 1
    read_depths: Sequence[int] = ()
    """Layers of the base whose hidden states `think` reads; none where it reads nothing."""
    repeats_last: bool = False
    """Whether latents that are asked for results say the last one again where steps are fewer than they."""
    wants_fp32_base: ClassVar[bool] = False
    """Whether the base's weights have to be fp32, under autocast where training is to be in half precision."""

    def __init__(self, settings: object, *, num_latents: int, hidden_size: int, depth: int) -> None:
        super().__init__()

    @abstractmethod
    def think(
        self, prompt: Prompt, *, n_steps: int | None = None, gradient_at_every_step: bool = False
    ) -> list[Thought]:
        """One `Thought` per supervision step.

        Args:
            n_steps: supervision steps to make; all when None.
            gradient_at_every_step: False lets only the last step carry gradients.
        """

    def start_near(self, table: Tensor, anchor: Tensor) -> None:
        """Start close to a base, given its embedding table `(V, D)` and the embedding `(D,)` of a token that says
        nothing in this place; called once on a fresh model."""
        for module in self.modules():
            if isinstance(module, LatentScale):
                module.match(table, anchor)

    def fit(self, prompt: Prompt) -> None:
        """Look at some prompts before training, for statistics that are then kept."""

    def words(self, latents: Tensor, head: nn.Module) -> Tensor | None:
        """Latents `(..., D)` in the base's own words: logits `(..., V)` of its head, for training them on the
        results of a solution's steps. None where latents are not meant to be read so."""
        return None

    def parameter_groups(self, learning_rate: float) -> list[ParameterGroup]:
        """What is trained, at which learning rate."""
        return [ParameterGroup("reasoner", list(self.parameters()), learning_rate)]

    def logs(self, thought: Thought) -> dict[str, Tensor]:
        """Scalars worth logging; `latent_variation` near 0 means that every problem gets the same latents."""
        return {"latent_variation": latent_variation(thought.latents)}


class LatentScale(nn.Module):
    """Bring states of root mean square 1 to the scale of the embedding table: `anchor + gain * table_rms * state`.

    States of a normed module are far larger than token embeddings, and all-zero latents are not neutral either (they
    take attention away): the anchor is the embedding of a token that changes little where it stands.
    """

    def __init__(self, *, hidden_size: int, gain: float) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(hidden_size))
        self.register_buffer("table_rms", torch.ones(()))
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    @torch.no_grad()
    def match(self, table: Tensor, anchor: Tensor) -> None:
        """Take size and anchor from an embedding table, see `Reasoner.start_near`."""
        self.anchor.copy_(anchor)
        self.table_rms.copy_(table[:4096].float().square().mean().sqrt())

    def forward(self, states: Tensor) -> Tensor:
        return self.anchor + self.gain * self.table_rms * states

    def words(self, latents: Tensor, head: nn.Linear | nn.Embedding) -> Tensor:
        """Logits `(..., V)` of the states behind latents, of deviation 4 where they point to no word."""
        states = (latents - self.anchor) / (self.gain * self.table_rms)
        return F.linear((4 * states / (self.table_rms * states.shape[-1] ** 0.5)).to(head.weight.dtype), head.weight)

    def soft_words(self, latents: Tensor, table: nn.Embedding) -> Tensor:
        """The embeddings `(..., D)` of what latents say, each word by its probability."""
        said = self.words(latents, table).float().softmax(-1)
        return (said.to(table.weight.dtype) @ table.weight).to(latents.dtype)


def latent_variation(latents: Tensor) -> Tensor:
    """How much latents `(B, M, D)` differ between problems, std over the batch divided by their rms: at 0 they are a
    soft prompt, whatever was trained."""
    wide = latents.detach().float()
    return wide.std(0, correction=0).square().mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-12)
