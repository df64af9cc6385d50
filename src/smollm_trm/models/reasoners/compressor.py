"""Control "compressor only": the question as M latents without recursion; also the front and back of the TRM.

The hidden states of a real base have *massive activations*: of SmolLM2's layer 20, five of 576 dimensions hold 99% of
the energy, the first token's above all. A root-mean-square norm would leave the compressor mostly that constant, so
every dimension is standardised by its own statistics (measured over real tokens without the first, kept with the
model), and clamped.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smollm_trm.models.blocks import check_counts, lecun_linear, rms_norm
from smollm_trm.models.compression import LatentAttentionCompressor
from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.reasoner import LatentScale, ParameterGroup, Reasoner, ScaleSettings, Thought

CLAMPED_AT = 5.0
TUNED_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class CompressorSettings(ScaleSettings):
    """How the question is read and compressed."""

    compression_heads: int = 8
    """Attention heads of the compressor."""
    dim: int | None = None
    """Width of the latents inside the reasoner; None takes the base's hidden size, at most 512."""
    n_read_layers: int = 3
    """Layers of the base that are read, evenly spaced and ending at the last."""
    soft_words: bool = False
    """Latents as mixtures of the base's token embeddings, by what they say, in place of free vectors: what a base knows
    to read, where latents are asked for results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(compression_heads=self.compression_heads, dim=self.dim, n_read_layers=self.n_read_layers)


class StateStandardizer(nn.Module):
    """Hidden states of several layers side by side, every dimension with mean 0 and deviation 1."""

    def __init__(self, *, n_layers: int, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_layers, hidden_size))
        self.register_buffer("deviation", torch.ones(n_layers, hidden_size))

    @torch.no_grad()
    def fit(self, layers: list[Tensor], mask: Tensor) -> None:
        """Measure over the real tokens, each row's first (an attention sink) left out."""
        counted = mask & (mask.cumsum(1) > 1)
        tokens = torch.stack([layer[counted].float() for layer in layers])  # (n, T, D)
        if tokens.shape[1] > 1:
            self.mean.copy_(tokens.mean(1))
            self.deviation.copy_(tokens.std(1).clamp_min(1e-6))

    def forward(self, layers: list[Tensor]) -> Tensor:
        """Map n tensors `(B, L, D)` to one `(B, L, n * D)`."""
        parts = [
            ((layer.float() - mean) / deviation).clamp(-CLAMPED_AT, CLAMPED_AT)
            for layer, mean, deviation in zip(layers, self.mean.float(), self.deviation.float(), strict=True)
        ]
        return torch.cat(parts, dim=-1)


class CompressedReader(Reasoner):
    """Read the question, compress it to M latents, hand them back."""

    Settings = CompressorSettings

    def __init__(self, settings: CompressorSettings, *, num_latents: int, hidden_size: int, depth: int) -> None:
        super().__init__(settings, num_latents=num_latents, hidden_size=hidden_size, depth=depth)
        n_read = min(settings.n_read_layers, depth)
        self.read_depths = [round(depth * (index + 1) / n_read) for index in range(n_read)]
        self.dim = settings.dim or min(512, hidden_size)
        self.standardize = StateStandardizer(n_layers=n_read, hidden_size=hidden_size)
        self.compressor = LatentAttentionCompressor(
            input_dim=n_read * hidden_size, dim=self.dim, num_latents=num_latents, n_heads=settings.compression_heads
        )
        self.to_embedding = lecun_linear(self.dim, hidden_size)
        self.scale = LatentScale(hidden_size=hidden_size, gain=settings.gain)
        self.soft_words = self.repeats_last = settings.soft_words  # a mixture of words always says something

    def fit(self, prompt: Prompt) -> None:
        """Measure the statistics of the states that will be read."""
        self.standardize.fit(prompt.hidden_states(self.read_depths), prompt.mask)

    def compress(self, hidden_states: list[Tensor], mask: Tensor) -> Tensor:
        """The question as M latents of the reasoner's width, `(B, M, d)`."""
        return self.compressor(self.standardize(hidden_states).to(self.to_embedding.weight.dtype), mask)

    @torch.no_grad()
    def attention(self, prompt: Prompt) -> Tensor:
        """Which tokens of the question each latent reads, `(B, M, L)`."""
        states = self.standardize(prompt.hidden_states(self.read_depths))
        return self.compressor.attention(states.to(self.to_embedding.weight.dtype), prompt.mask)

    def parameter_groups(self, learning_rate: float) -> list[ParameterGroup]:
        """The learning rate is that of a reasoner at most 128 wide; a wider one moves as far at less of it.

        Adam moves every weight alike, so a sum over twice as many of them moves twice as far.
        """
        return super().parameter_groups(learning_rate / max(1.0, self.dim / TUNED_WIDTH))

    def to_latents(self, states: Tensor) -> Tensor:
        """Map `(B, M, d)` to latents `(B, M, D)`."""
        return self.scale(rms_norm(self.to_embedding(states)))

    def words(self, latents: Tensor, head: nn.Module) -> Tensor:
        """What latents say, see `LatentScale.words`."""
        return self.scale.words(latents, head)

    def reason(self, hidden_states: list[Tensor], mask: Tensor, **options: Any) -> list[Thought]:
        """From the layers read, each `(B, L, D)`, to thoughts: here the compressed question itself."""
        return [Thought(self.to_latents(self.compress(hidden_states, mask)))]

    def think(self, prompt: Prompt, **options: Any) -> list[Thought]:
        """One read pass of the base, then `reason`."""
        thoughts = self.reason(prompt.hidden_states(self.read_depths), prompt.mask, **options)
        thoughts = [thought._replace(cache=prompt.cache) for thought in thoughts]
        if not self.soft_words:
            return thoughts
        table = prompt.decoder.get_input_embeddings()
        return [one._replace(latents=self.scale.soft_words(one.latents, table), free=one.latents) for one in thoughts]

    def forward(
        self, hidden_states: Tensor | list[Tensor], mask: Tensor, *, return_all_steps: bool = False
    ) -> Tensor | list[Tensor]:
        """Free latents `(B, M, D)` of the last step, or of every one; from layers read, `(B, L, D)`, mask `(B, L)`."""
        layers = [hidden_states] if isinstance(hidden_states, Tensor) else hidden_states
        thoughts = self.reason(layers, mask.bool(), gradient_at_every_step=return_all_steps)
        return [thought.latents for thought in thoughts] if return_all_steps else thoughts[-1].latents
