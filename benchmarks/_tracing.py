"""Memory without a GPU: the bytes of all storages that are alive, and stand-ins for linear layers in 4 bits."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.total = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is released."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live[key] = size
        self.total += size
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self.release, key)

    def release(self, key: int) -> None:
        """A storage is gone."""
        self.total -= self.live.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result

    @contextmanager
    def phase(self, name: str, peaks: dict[str, float]) -> Iterator[None]:
        """Note a phase's own peak, in GiB."""
        gc.collect()
        self.peak = self.total
        with self:
            yield
        peaks[name] = self.peak / GIB


class FourBitProduct(torch.autograd.Function):
    """x W^T with weights that are there for the product only."""

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """As `nn.functional.linear`."""
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """The input's gradient."""
        return gradient @ gradient.new_empty(ctx.shape), None


class FourBitLinear(nn.Module):
    """The storage of a linear layer in 4 bits: two weights a byte, a byte of scale a block, a float for 256 blocks."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.shape, n_weights = tuple(layer.weight.shape), layer.weight.numel()
        self.register_buffer("weight", torch.empty(n_weights // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(n_weights // 64, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(n_weights // 64 // 256 + 1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """The product, in half precision."""
        return FourBitProduct.apply(x.half(), self.shape)
