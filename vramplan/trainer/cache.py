"""Keys and values of the tokens that a sampler has already seen, so that each new token costs one token's work."""

from __future__ import annotations

import torch
from torch import Tensor

from ..planner.shape import Shape


class LayerCache:
    """One layer's keys and values: buffers (B, positions, kv heads, head_dim) that fill up from the front."""

    def __init__(self, shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (batch_size, shape.block_size, shape.kv_width // shape.head_dim, shape.head_dim)
        self.keys, self.values = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, T, kv heads, head_dim) each; everything so far."""
        end = self.length + k.shape[1]
        self.keys[:, self.length : end], self.values[:, self.length : end] = k, v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """The caches of all layers, for ``batch_size`` sequences of up to ``block_size`` tokens."""

    def __init__(self, shape: Shape, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers = [LayerCache(shape, batch_size, dtype, device) for _ in range(shape.n_layer)]

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.layers[0].length
