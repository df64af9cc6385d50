"""Compress the hidden states of a question, however long, to a fixed number of latents.

Learned queries attend over the states (Perceiver, "General Perception with Iterative Attention", section 3.1). What
was attended dominates: the queries themselves enter the output at a tenth of its size, just enough to tell the
latents apart. At full size they drown the content, and what follows learns to ignore it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smollm_trm.models.blocks import check_counts, lecun_linear, rms_norm
from smollm_trm.records import UserMistake


class LatentAttentionCompressor(nn.Module):
    """Masked cross-attention of M learned queries over any number of states."""

    def __init__(
        self, *, input_dim: int, dim: int, num_latents: int, n_heads: int = 8, query_scale: float = 0.1
    ) -> None:
        super().__init__()
        check_counts(num_latents=num_latents)
        if dim % n_heads:
            raise UserMistake(f"compression_heads={n_heads} must divide the latent width {dim}")
        self.num_latents = num_latents
        self.n_heads = n_heads
        self.query_scale = query_scale
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
