"""Everything that can fill a latent span: one small interface and the reasoners that implement it.

A reasoner is asked once per prompt. It gets the base model's hidden states of the prompt, up to and including
`<think>`, and gives back M latents for the slots that follow. `HiddenStateTRM` is the one that matters; static latents
and "compressor only" are the controls without which a gain means nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smollm_trm.models.blocks import TinyRecursiveNetwork, lecun_linear, rms_norm
from smollm_trm.models.compression import LatentAttentionCompressor
from smollm_trm.models.recursion import RecursiveReasoningBase, check_recursion_counts


@dataclass(frozen=True, kw_only=True)
class TRMSettings:
    """How a `HiddenStateTRM` is built; also read, as far as they apply, by the controls."""

    n_layers: int = 2
    """Transformer blocks of the recursive network."""
    n_heads: int = 8
    """Attention heads of each block."""
    n_latent_steps: int = 4
    """n: updates of the latent before the answer is updated (the paper: 6)."""
    n_deep_recursions: int = 2
    """T: rounds of a supervision step, all but the last without gradient (the paper: 3)."""
    n_supervision_steps: int = 4
    """Steps after which latents may be read off (the paper: 16)."""
    compression_heads: int = 8
    """Attention heads of the compressor."""
    dropout: float = 0.0
    """Dropout probability inside the recursive network."""
    dim: int | None = None
    """Width of the recursion; None takes the base's hidden size, at most 512."""
    n_read_layers: int = 3
    """Layers of the base that are read, evenly spaced and ending at the last."""
    gain: float = 1.0
    """Size of the reasoner's part of a latent at the start, relative to the embedding table's rms."""
    branch_scale: float | None = 0.3
    """Size of the recursion's residual branches, relative to its state; None leaves them free, as in the paper."""
    start: str = "question"
    """What the recursion's answer and latent start as: "question" (the compressed question) or "fixed" (the paper's
    constants y0 and z0)."""

    def __post_init__(self) -> None:
        check_recursion_counts(self.n_latent_steps, self.n_deep_recursions, self.n_supervision_steps)
        if self.start not in ("question", "fixed"):
            raise ValueError(f"start={self.start!r}: choose 'question' or 'fixed'")
        if self.n_layers < 1:
            raise ValueError(f"n_layers={self.n_layers}: must be at least 1")
        if self.n_read_layers < 1:
            raise ValueError(f"n_read_layers={self.n_read_layers}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")


class Thought(NamedTuple):
    """What one supervision step of a reasoner leaves."""

    latents: Tensor
    """`(B, M, D)`, in the scale of the base's embedding table."""
    halting_logit: Tensor | None = None
    """`(B,)`, above 0: further steps are not expected to help; None where a reasoner has no such head."""


class Reasoner(nn.Module, ABC):
    """Hidden states of the prompt in, latents out."""

    num_latents: int
    n_supervision_steps: int = 1

    @abstractmethod
    def think(
        self,
        hidden_states: list[Tensor],
        mask: Tensor,
        *,
        n_steps: int | None = None,
        gradient_at_every_step: bool = False,
    ) -> list[Thought]:
        """One `Thought` per supervision step.

        Args:
            hidden_states: the layers read, each `(B, L, D)`.
            mask: `(B, L)`, True = real.
            n_steps: supervision steps to make; all when None.
            gradient_at_every_step: False lets only the last step carry gradients.
        """

    def forward(
        self, hidden_states: list[Tensor] | Tensor, mask: Tensor, *, return_all_steps: bool = False
    ) -> Tensor | list[Tensor]:
        """Latents `(B, M, D)` of the last supervision step, or those of every step."""
        layers = [hidden_states] if isinstance(hidden_states, Tensor) else hidden_states
        thoughts = self.think(layers, mask, gradient_at_every_step=return_all_steps)
        return [thought.latents for thought in thoughts] if return_all_steps else thoughts[-1].latents


class LatentScale(nn.Module):
    """Bring states of root mean square 1 to the scale of the embedding table, near a neutral anchor.

    `latent = anchor + gain * table_rms * state`. States of a normed module are far larger than token embeddings, and
    all-zero latents are not neutral either (they take attention away): the anchor is the embedding of a token that the
    base knows in this place, `</think>`.

    Args:
        anchor: embedding of the neutral token, `(D,)`.
        table_rms: root mean square of the embedding table.
        gain: the start value of the (learned) gain.
    """

    def __init__(self, *, anchor: Tensor, table_rms: float, gain: float) -> None:
        super().__init__()
        self.register_buffer("anchor", anchor.detach().clone().float())
        self.register_buffer("table_rms", torch.tensor(float(table_rms)))
        self.gain = nn.Parameter(torch.tensor(float(gain)))

    def forward(self, states: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D)`."""
        return self.anchor + self.gain * self.table_rms * states


class StaticLatents(Reasoner):
    """Control: M learned latents, the same for every problem (a soft prompt)."""

    def __init__(self, *, num_latents: int, scale: LatentScale) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.scale = scale
        self.states = nn.Parameter(torch.randn(num_latents, scale.anchor.shape[0]))

    def think(
        self,
        hidden_states: list[Tensor],
        mask: Tensor,
        *,
        n_steps: int | None = None,
        gradient_at_every_step: bool = False,
    ) -> list[Thought]:
        """The same latents for every row."""
        return [Thought(self.scale(self.states).expand(mask.shape[0], -1, -1))]


class CompressedReader(Reasoner):
    """Control "compressor only", and the front and back that `HiddenStateTRM` shares with it.

    Args:
        compressor: reads the concatenated layers.
        scale: brings the output to the embedding table's scale.
    """

    def __init__(self, *, compressor: LatentAttentionCompressor, scale: LatentScale) -> None:
        super().__init__()
        self.num_latents = compressor.num_latents
        self.compressor = compressor
        self.scale = scale
        self.to_embedding = lecun_linear(compressor.queries.shape[-1], scale.anchor.shape[0])

    def compress(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        """The question as M latents of the reasoner's width, `(B, M, d)`. Layers are brought to one size first."""
        return self.compressor(torch.cat([rms_norm(layer.float()) for layer in hidden_states], dim=-1), mask)

    def to_latents(self, states: Tensor) -> Tensor:
        """Map `(B, M, d)` to latents `(B, M, D)`."""
        return self.scale(rms_norm(self.to_embedding(states)))

    def think(
        self,
        hidden_states: list[Tensor],
        mask: Tensor,
        *,
        n_steps: int | None = None,
        gradient_at_every_step: bool = False,
    ) -> list[Thought]:
        """The compressed question itself."""
        return [Thought(self.to_latents(self.compress(hidden_states, mask)))]


class HiddenStateTRM(CompressedReader):
    """Compress the question to M latents, refine them recursively, hand them back.

    Args:
        compressor: any length to M latents, `(B, M, d)`.
        recursion: refines the compressed question.
        scale: brings the output to the embedding table's scale.
    """

    def __init__(
        self,
        *,
        compressor: LatentAttentionCompressor,
        recursion: RecursiveReasoningBase,
        scale: LatentScale,
    ) -> None:
        super().__init__(compressor=compressor, scale=scale)
        self.recursion = recursion
        self.n_supervision_steps = recursion.n_supervision_steps
        self.halting_head = nn.Linear(recursion.network.dim, 1)
        nn.init.zeros_(self.halting_head.weight)
        nn.init.constant_(self.halting_head.bias, -5.0)

    def think(
        self,
        hidden_states: list[Tensor],
        mask: Tensor,
        *,
        n_steps: int | None = None,
        gradient_at_every_step: bool = False,
    ) -> list[Thought]:
        """Latents and halting logit after each supervision step."""
        question = self.compress(hidden_states, mask)
        answers = self.recursion(question, n_supervision_steps=n_steps, gradient_at_every_step=gradient_at_every_step)
        return [Thought(self.to_latents(answer), self.halting_head(answer[:, 0]).squeeze(-1)) for answer in answers]


def build_reasoner(
    kind: str,
    *,
    num_latents: int,
    hidden_size: int,
    settings: TRMSettings,
    anchor: Tensor,
    table_rms: float,
) -> Reasoner:
    """A reasoner by name: "trm", "compressor" or "static".

    Args:
        kind: the reasoner's name.
        num_latents: M.
        hidden_size: D of the base, from its configuration.
        settings: shared by the TRM and, where they apply, the controls.
        anchor: `(D,)`, see `LatentScale`.
        table_rms: see `LatentScale`.
    """
    if num_latents < 1:
        raise ValueError(f"num_latents={num_latents}: must be at least 1; for no latents at all set use_trm=False")
    scale = LatentScale(anchor=anchor, table_rms=table_rms, gain=settings.gain)
    if kind == "static":
        return StaticLatents(num_latents=num_latents, scale=scale)
    dim = settings.dim or min(512, hidden_size)
    compressor = LatentAttentionCompressor(
        input_dim=settings.n_read_layers * hidden_size,
        dim=dim,
        num_latents=num_latents,
        n_heads=settings.compression_heads,
    )
    if kind == "compressor":
        return CompressedReader(compressor=compressor, scale=scale)
    if kind == "trm":
        network = TinyRecursiveNetwork(
            dim=dim,
            n_layers=settings.n_layers,
            n_heads=settings.n_heads,
            dropout=settings.dropout,
            branch_scale=settings.branch_scale,
        )
        recursion = RecursiveReasoningBase(
            network=network,
            n_latent_steps=settings.n_latent_steps,
            n_deep_recursions=settings.n_deep_recursions,
            n_supervision_steps=settings.n_supervision_steps,
            from_question=settings.start == "question",
        )
        return HiddenStateTRM(
            compressor=compressor,
            recursion=recursion,
            scale=scale,
        )
    raise ValueError(f"reasoner={kind!r}: choose 'trm', 'compressor' or 'static'")
