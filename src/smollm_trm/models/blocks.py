"""The small network that a recursion calls again and again.

Two post-norm transformer layers, as in "Less is More: Recursive Reasoning with Tiny Networks" (section 3 and the
official code): attention with rotary positions, SwiGLU, root-mean-square norm without weights, no biases. The norm
*after* each residual keeps the size of a state fixed however often the network is applied; with a norm before it the
state grows without limit (rms 30, 1e3, 4e4 over the supervision steps).
"""

import math
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smollm_trm.records import UserMistake, check_range

WIDEST = 65_536
"""What no size of a reasoner is above."""


def refuse_too_large(what: str, module: nn.Module, *, copies: int = 1) -> None:
    """Refuse a module (it may be on the meta device) that does not fit in this machine's memory so many times."""
    asked = copies * sum(p.numel() * p.element_size() for p in module.parameters()) / 2**30
    on_gpu = torch.cuda.is_available()
    has = (torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total) / 2**30
    if asked > has:
        raise UserMistake(f"{what} is too large: it takes {asked:,.0f} GiB, there are {has:,.0f}; choose smaller sizes")


def rms_norm(states: Tensor) -> Tensor:
    """Scale the last dimension of `(..., D)` to root mean square 1, computed in fp32, without a weight."""
    return F.rms_norm(states.float(), states.shape[-1:], eps=1e-5).to(states.dtype)


def truncated_normal(*shape: int, std: float = 1.0) -> Tensor:
    """A tensor from a normal cut at two deviations, with this standard deviation after the cut."""
    wide = std / 0.87962566  # what cutting leaves of the spread
    return nn.init.trunc_normal_(torch.empty(*shape), std=wide, a=-2 * wide, b=2 * wide)


def lecun_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear map without bias, weights from a truncated normal of variance `1 / in_features`."""
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight = nn.Parameter(truncated_normal(out_features, in_features, std=1 / math.sqrt(in_features)))
    return linear


def rotary_tables(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(T, head_dim)` of the rotary position embedding, on the device and in the dtype of `like`."""
    steps = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), 10_000.0**-steps)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_positions(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply `rotary_tables` to queries or keys `(B, H, T, head_dim)`."""
    cos, sin = rotary
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


class SelfAttention(nn.Module):
    """Bidirectional self-attention with rotary positions and no biases."""

    def __init__(self, *, dim: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % n_heads or dim // n_heads % 2:
            raise UserMistake(
                f"n_heads={n_heads} must divide the width {dim} into heads of even size: choose another n_heads or dim"
            )
        self.n_heads = n_heads
        self.dropout = dropout
        self.qkv = lecun_linear(dim, 3 * dim)
        self.out = lecun_linear(dim, dim)

    def forward(
        self, states: Tensor, mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        batch, length, dim = states.shape
        heads = self.qkv(states).view(batch, length, 3, self.n_heads, dim // self.n_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, head_dim)
        rotary = rotary or rotary_tables(length, query.shape[-1], query)
        attended = F.scaled_dot_product_attention(
            rotate_positions(query, rotary),
            rotate_positions(key, rotary),
            value,
            attn_mask=None if mask is None else mask[:, None, None, :].bool(),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(attended.transpose(1, 2).reshape(batch, length, dim))


class SwiGLU(nn.Module):
    """Gated feed-forward layer, `down(silu(gate(x)) * up(x))`; its width is 8D/3 rounded up, unless it is given."""

    def __init__(self, *, dim: int, width: int | None = None) -> None:
        super().__init__()
        multiple = 256 if dim >= 256 else 64  # the paper's would make a small layer several times as wide as meant
        width = width or -(-round(8 * dim / 3) // multiple) * multiple
        self.gate_up = lecun_linear(dim, 2 * width)
        self.down = lecun_linear(width, dim)

    def forward(self, states: Tensor) -> Tensor:
        gate, up = self.gate_up(states).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """One post-norm layer: `u = rms(u + attention(u)); u = rms(u + swiglu(u))`.

    `branch_scale` is the size that each residual branch is brought to, relative to the state. None leaves it free, as
    in the paper; a branch that may grow can drown the state, whatever the question was.
    """

    def __init__(self, *, dim: int, n_heads: int, dropout: float = 0.0, branch_scale: float | None = None) -> None:
        super().__init__()
        self.attention = SelfAttention(dim=dim, n_heads=n_heads, dropout=dropout)
        self.mlp = SwiGLU(dim=dim)
        self.dropout = nn.Dropout(dropout)
        self.branch_scale = branch_scale

    def forward(
        self, states: Tensor, mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Args: states `(B, T, D)`; mask `(B, T)`, True = real; rotary, from `rotary_tables`. Returns `(B, T, D)`."""
        states = self.add(states, self.attention(states, mask, rotary))
        return self.add(states, self.mlp(states))

    def add(self, states: Tensor, branch: Tensor) -> Tensor:
        if self.branch_scale is not None:
            branch = self.branch_scale * rms_norm(branch)
        return rms_norm(states + self.dropout(branch))


class TinyRecursiveNetwork(nn.Module):
    """The network of the recursion: a short stack of `TransformerBlock` (the paper found 2 better than 4)."""

    def __init__(self, *, dim: int, n_layers: int = 2, n_heads: int = 8, **block: Any) -> None:
        super().__init__()
        check_range(1, WIDEST, n_layers=n_layers)
        self.dim = dim
        self.layers = nn.ModuleList(TransformerBlock(dim=dim, n_heads=n_heads, **block) for _ in range(n_layers))

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Args: states `(B, T, D)`; mask `(B, T)`, True = real. Returns `(B, T, D)`."""
        rotary = rotary_tables(states.shape[1], self.dim // self.layers[0].attention.n_heads, states)
        for layer in self.layers:
            states = layer(states, mask, rotary)
        return states
