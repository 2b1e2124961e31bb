"""Reading token shards: training blocks in a seeded order that one integer resumes, and fixed evaluation blocks."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import DataError, Problem

Tokens = npt.NDArray[Any]


class TokenArray:
    """The memory-mapped shards of one split as one read-only array. ``files``: name and tokens of each."""

    def __init__(self, directory: Path, files: Sequence[tuple[str, int]], dtype: str) -> None:
        self._maps = [np.memmap(directory / name, dtype=dtype, mode="r") for name, _ in files]
        self._ends = list(itertools.accumulate(tokens for _, tokens in files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, length: int) -> Tokens:
        """``length`` tokens from ``start`` on, across shard borders, as int64."""
        parts, shard = [], bisect.bisect_right(self._ends, start)
        while length > 0:
            first = start - (self._ends[shard - 1] if shard else 0)
            part = self._maps[shard][first : first + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)


class TokenStream:
    """Training blocks in a seeded order, epoch after epoch. Its whole state is one integer: the next block's number.

    The order is a property of seed and data alone: however the sequences are split into micro-batches, the n-th
    sequence is always the same.
    """

    def __init__(self, array: TokenArray, tokens: int, block_size: int, seed: int, fingerprint: str) -> None:
        self._array, self.block_size, self.seed, self.fingerprint = array, block_size, seed, fingerprint
        self.blocks_per_epoch = (tokens - 1) // block_size
        self.position = 0

    @property
    def unique_tokens(self) -> int:
        """Tokens that one epoch trains on: blocks per epoch x block size."""
        return self.blocks_per_epoch * self.block_size

    @property
    def epoch(self) -> float:
        """Epochs served so far."""
        return self.position / self.blocks_per_epoch

    def batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The next ``batch_size`` blocks: tokens and targets, each (B, T) int64 on the CPU."""
        rows = [self._block(self.position + i) for i in range(batch_size)]
        self.position += batch_size
        return _tokens_and_targets(rows)

    def _block(self, position: int) -> Tokens:
        epoch, index = divmod(position, self.blocks_per_epoch)
        block = permuted(index, self.blocks_per_epoch, self.seed, epoch)
        return self._array.read(block * self.block_size, self.block_size + 1)

    def state_dict(self) -> dict[str, Any]:
        """Position, and what it is a position in."""
        names = ("position", "block_size", "seed", "fingerprint")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position; at the beginning when nothing has been read, as of an imported run.

        Raises DataError when it belongs to other data, block size or seed.
        """
        if not state:
            self.position = 0
            return
        problems = [
            Problem(f"data.{name}", getattr(self, name), f"is not the checkpoint's {state[name]}", "use the same data")
            for name in ("fingerprint", "block_size", "seed")
            if state[name] != getattr(self, name)
        ]
        if problems:
            raise DataError(problems)
        self.position = int(state["position"])


class Evaluation:
    """Fixed batches of blocks; iterating yields (tokens, targets), each (B, T) int64. All batches have equal size.

    Of the blocks available, at most ``batch_size x batches`` are used, evenly spread. A remainder that would not fill
    a batch is left out, so the mean over batches is the mean over blocks; fewer blocks than that make one short batch.
    """

    def __init__(
        self, array: TokenArray, start: int, tokens: int, block_size: int, batch_size: int, batches: int
    ) -> None:
        self._array, self._start, self.block_size = array, start, block_size
        self.blocks_available = (tokens - 1) // block_size
        self.batch_size = min(batch_size, self.blocks_available)
        self.batches = min(batches, self.blocks_available // self.batch_size)

    @property
    def blocks(self) -> int:
        """Blocks in one evaluation."""
        return self.batch_size * self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.in_batches_of(self.batch_size)

    def in_batches_of(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same blocks in the same order, ``batch_size`` at a time; the last batch may be shorter."""
        for start in range(0, self.blocks, batch_size):
            numbers = range(start, min(start + batch_size, self.blocks))
            yield _tokens_and_targets([self._block(n * self.blocks_available // self.blocks) for n in numbers])

    def _block(self, block: int) -> Tokens:
        return self._array.read(self._start + block * self.block_size, self.block_size + 1)


def _tokens_and_targets(rows: list[Tokens]) -> tuple[Tensor, Tensor]:
    block = torch.from_numpy(np.stack(rows))
    return block[:, :-1].contiguous(), block[:, 1:].contiguous()


def permuted(index: int, n: int, seed: int, epoch: int, rounds: int = 6) -> int:
    """Where position ``index`` of an epoch lands among ``n`` blocks: a bijection of range(n) for each (seed, epoch).

    A Feistel network over the smallest even number of bits that holds ``n``, walked until it falls below ``n``
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). No array of ``n`` indices, and no dependence on
    a random generator whose stream may change between library versions, so a resumed run keeps its order.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = (seed % 2**64).to_bytes(8, "little") + epoch.to_bytes(8, "little")
    while True:
        left, right = index >> half, index & mask
        for number in range(rounds):
            message = number.to_bytes(1, "little") + right.to_bytes(8, "little")
            mixed = int.from_bytes(hashlib.blake2b(message, key=key, digest_size=8).digest(), "little")
            left, right = right, left ^ (mixed & mask)
        index = left << half | right
        if index < n:
            return index
