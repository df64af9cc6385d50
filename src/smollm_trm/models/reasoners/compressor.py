"""Control "compressor only": the question as M latents without recursion; also the front and back of the TRM.

The hidden states of a real base have *massive activations*: of SmolLM2's layer 20, five of 576 dimensions hold 99% of
the energy, the first token's above all. A root-mean-square norm would leave the compressor mostly that constant, so
every dimension is standardised by its own statistics (measured over real tokens without the first, kept with the
model), and clamped.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smollm_trm.models.blocks import WIDEST, lecun_linear, rms_norm
from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.reasoner import LatentScale, ParameterGroup, Reasoner, ScaleSettings, Thought
from smollm_trm.records import UserMistake, check_range, picked

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
        check_range(1, WIDEST, **picked(self, "compression_heads", "dim", "n_read_layers"))


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


class LatentAttentionCompressor(nn.Module):
    """Masked cross-attention of M learned queries over any number of states (Perceiver, section 3.1).

    What was attended dominates: the queries themselves enter the output at a tenth of its size, just enough to tell the
    latents apart. At full size they drown the content, and what follows learns to ignore it.
    """

    query_scale = 0.1

    def __init__(self, *, input_dim: int, dim: int, num_latents: int, n_heads: int = 8) -> None:
        super().__init__()
        check_range(1, WIDEST, num_latents=num_latents)
        if dim % n_heads:
            raise UserMistake(f"compression_heads={n_heads} must divide the latent width {dim}")
        self.num_latents = num_latents
        self.n_heads = n_heads
        self.queries = nn.Parameter(torch.randn(num_latents, dim))
        self.to_query = lecun_linear(dim, dim)
        self.to_key_value = lecun_linear(input_dim, 2 * dim)
        self.out = lecun_linear(dim, dim)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compress `(B, L, input_dim)` to `(B, M, d)`, each latent of root mean square 1."""
        key, value = self.to_key_value(states).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(
            self._heads(self.to_query(self.queries).expand(states.shape[0], -1, -1)),
            self._heads(key),
            self._heads(value),
            attn_mask=None if mask is None else mask[:, None, None, :].bool(),
        )  # (B, H, M, head_dim)
        content = rms_norm(self.out(attended.transpose(1, 2).flatten(2)))
        return rms_norm(content + self.query_scale * self.queries)

    def attention(self, states: Tensor, mask: Tensor) -> Tensor:
        """Where each latent looks, `(B, M, L)`: shares of the attention, the mean over heads."""
        query = self._heads(self.to_query(self.queries).expand(states.shape[0], -1, -1))
        key = self._heads(self.to_key_value(states).chunk(2, dim=-1)[0])
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5  # (B, H, M, L)
        return scores.masked_fill(~mask[:, None, None, :].bool(), float("-inf")).softmax(-1).mean(1)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


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
        """The learning rate is that of a reasoner at most 128 wide; a wider one moves as far at less of it: Adam moves
        every weight alike, so a sum over twice as many of them moves twice as far."""
        return super().parameter_groups(learning_rate / max(1.0, self.dim / TUNED_WIDTH))

    def to_latents(self, states: Tensor) -> Tensor:
        """Map `(B, M, d)` to latents `(B, M, D)`."""
        return self.scale(rms_norm(self.to_embedding(states)))

    def words(self, latents: Tensor, head: nn.Module) -> Tensor:
        return self.scale.words(latents, head)

    def reason(self, hidden_states: list[Tensor], mask: Tensor, **options: Any) -> list[Thought]:
        """From the layers read, each `(B, L, D)`, to thoughts: here the compressed question itself."""
        return [Thought(self.to_latents(self.compress(hidden_states, mask)))]

    def think(self, prompt: Prompt, **options: Any) -> list[Thought]:
        thoughts = self.reason(prompt.hidden_states(self.read_depths), prompt.mask, **options)
        thoughts = [thought._replace(cache=prompt.cache) for thought in thoughts]
        if not self.soft_words or prompt.n_slots is None:
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
