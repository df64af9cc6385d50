"""Compress hidden states in width, `(B, L, D) -> (B, L, D') -> (B, L, D)`: one linear map, and its transpose back.

With the weights tied and the mean taken off first, the best such map for the squared error is known: the principal
components of the states (PCA). They follow from sums over the states, D x D numbers however many states there are, so
the compressor starts there, and its reports name PCA's error beside its own.
"""

import hashlib

import torch
from torch import Tensor, nn

from smollm_trm.records import UserMistake, check_range


class DimensionCompressor(nn.Module):
    """A weight-tied linear compressor around the states' mean."""

    def __init__(self, *, hidden_size: int, d_compressed: int) -> None:
        super().__init__()
        check_range(d_compressed=d_compressed)
        if d_compressed > hidden_size:
            raise UserMistake(f"d_compressed={d_compressed}: the states have only {hidden_size} dimensions")
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(d_compressed, hidden_size)))
        self.register_buffer("mean", torch.zeros(hidden_size))

    def compress(self, states: Tensor) -> Tensor:
        """Map `(..., D)` to `(..., D')`."""
        return (states.to(self.weight.dtype) - self.mean) @ self.weight.T

    def decompress(self, compressed: Tensor) -> Tensor:
        return compressed @ self.weight + self.mean

    def forward(self, states: Tensor) -> Tensor:
        """What is left of `(..., D)`."""
        return self.decompress(self.compress(states))


class StateMoments:
    """Number, sum and products of states seen so far: all that PCA needs, in D x D memory."""

    def __init__(self, hidden_size: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.shift = torch.zeros(hidden_size)  # near the mean, or fp32 products would lose what is around it
        self.total = torch.zeros(hidden_size, dtype=torch.float64)
        self.products = torch.zeros(hidden_size, hidden_size, dtype=torch.float64)

    @torch.no_grad()
    def add(self, states: Tensor) -> None:
        if self.count == 0 and len(states):
            self.shift = states.float().mean(0).cpu()
        wide = states.float() - self.shift.to(states.device)
        self.count += len(wide)
        self.total += wide.sum(0).cpu()
        self.products += (wide.T @ wide).cpu()

    @property
    def mean(self) -> Tensor:
        return self.shift + self.total / self.count

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """The covariance's eigenvalues, largest first, and their directions as rows `(D, D)`."""
        off = self.total / self.count
        values, vectors = torch.linalg.eigh(self.products / self.count - torch.outer(off, off))
        return values.flip(0).clamp_min(0), vectors.flip(1).T

    def principal(self, d_compressed: int) -> DimensionCompressor:
        """PCA: the compressor with the least squared error on the states seen."""
        compressor = DimensionCompressor(hidden_size=len(self.total), d_compressed=d_compressed)
        with torch.no_grad():
            compressor.weight.copy_(self.spectrum()[1][:d_compressed])
            compressor.mean.copy_(self.mean)
        return compressor


def base_fingerprint(decoder: nn.Module) -> str:
    """What tells two bases apart, whatever their dtype, their adapter or the rows added to their table."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.named_parameters()):
        if "lora_" not in name:
            first = tensor.detach().reshape(-1)[:64].to("cpu", torch.bfloat16).float()
            digest.update(f"{name.replace('.base_layer.', '.')} {tuple(tensor.shape[1:])} {first.tolist()}".encode())
    return digest.hexdigest()[:32]
