"""Compress the hidden states of a question, however long, to a fixed number of latents.

Learned queries attend over the states (Perceiver, "General Perception with Iterative Attention", section 3.1). What
was attended dominates: the queries themselves enter the output at a tenth of its size, just enough to tell the
latents apart. At full size they drown the content, and what follows learns to ignore it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smollm_trm.models.blocks import lecun_linear, rms_norm


class LatentAttentionCompressor(nn.Module):
    """Masked cross-attention of M learned queries over any number of states.

    Args:
        input_dim: width of the states.
        dim: width d of the latents.
        num_latents: M.
        n_heads: attention heads; must divide `dim`.
        query_scale: size of the queries in the output, relative to the attended content.
    """

    def __init__(
        self, *, input_dim: int, dim: int, num_latents: int, n_heads: int = 8, query_scale: float = 0.1
    ) -> None:
        super().__init__()
        if num_latents < 1:
            raise ValueError(f"num_latents={num_latents}: must be at least 1")
        if dim % n_heads:
            raise ValueError(f"compression_heads={n_heads} must divide the latent width {dim}")
        self.num_latents = num_latents
        self.n_heads = n_heads
        self.query_scale = query_scale
        self.queries = nn.Parameter(torch.randn(num_latents, dim))
        self.to_query = lecun_linear(dim, dim)
        self.to_key_value = lecun_linear(input_dim, 2 * dim)
        self.out = lecun_linear(dim, dim)

    def project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, H, L, head_dim)` of the states `(B, L, input_dim)`, for any number of readings."""
        key, value = self.to_key_value(states).chunk(2, dim=-1)
        return self._heads(key), self._heads(value)

    def attend(self, queries: Tensor, key_value: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """What queries `(B, M, d)` find in the states: `(B, M, d)`, each of root mean square 1.

        Args:
            queries: `(B, M, d)`.
            key_value: from `project`.
            mask: `(B, L)`, True = real; padding is never attended to.
        """
        attended = F.scaled_dot_product_attention(
            self._heads(self.to_query(queries)),
            *key_value,
            attn_mask=None if mask is None else mask[:, None, None, :].bool(),
        )  # (B, H, M, head_dim)
        return rms_norm(self.out(attended.transpose(1, 2).flatten(2)))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compress `(B, L, input_dim)` to `(B, M, d)`, each latent of root mean square 1.

        Args:
            states: `(B, L, input_dim)`.
            mask: `(B, L)`, True = real; padding is never attended to.
        """
        queries = self.queries.expand(states.shape[0], -1, -1)
        return rms_norm(self.attend(queries, self.project(states), mask) + self.query_scale * queries)

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
