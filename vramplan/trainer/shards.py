"""Token shards on disk, and the streams of blocks that training and evaluation read from them.

    DIR/manifest.json       what the shards hold and where it came from; written last, so its presence means complete
    DIR/train-00000.bin     token ids, little-endian uint16 (uint32 beyond 65,536 ids), one document after the other
    DIR/val-00000.bin       the held-out documents

The training shards are one long stream of N tokens, cut into (N - 1) // T blocks of T tokens, each with the same
tokens moved by one as targets. An epoch visits each block once, in an order that depends only on seed and epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from ..errors import DataError, Problem
from .stream import Evaluation, TokenArray, Tokens, TokenStream

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")


def token_dtype(n_vocab: int) -> str:
    """``<u2`` when every id below ``n_vocab`` fits into two bytes, else ``<u4``."""
    return "<u2" if n_vocab <= 2**16 else "<u4"


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard file: its split, name, number of tokens and SHA-256."""

    split: Literal["train", "val"]
    file: Annotated[str, Field(pattern=r"^(train|val)-\d{5,}\.bin$")]
    tokens: Annotated[int, Field(ge=1)]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a shard directory holds. ``settings`` is all that decided its content: equal settings, equal shards.

    ``source`` is the file, folder or pattern that was tokenised, as an absolute path; empty when that is not known.
    """

    settings: dict[str, Any]
    n_vocab: Annotated[int, Field(ge=1)]
    documents: dict[str, int]
    shards: tuple[ShardInfo, ...]
    adjusted_for_block: int | None = None
    source: str = ""
    format: int = FORMAT

    def tokens(self, split: str) -> int:
        """Tokens of a split."""
        return sum(s.tokens for s in self.shards if s.split == split)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' own: equal exactly when the tokens are."""
        return hashlib.sha256("".join(f"{s.split}{s.sha256}" for s in self.shards).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write ``manifest.json`` atomically."""
        temporary = directory / f".{MANIFEST}.tmp"
        with temporary.open("w", encoding="utf-8") as f:
            json.dump(asdict(self), f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(directory / MANIFEST)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read ``manifest.json``. Raises DataError when it is missing, unreadable or of another format."""
        path, remedy = directory / MANIFEST, "prepare the data again"
        try:
            manifest = TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError:
            raise DataError(Problem("shards", str(directory), f"holds no {MANIFEST}", remedy)) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            rule = f"cannot be read ({f'{where}: ' if where else ''}{first['msg']})"
            raise DataError(Problem("shards", str(path), rule, remedy)) from None
        except OSError as error:
            raise DataError(Problem("shards", str(path), f"cannot be read ({error.strerror})", remedy)) from None
        if manifest.format != FORMAT:
            raise DataError(Problem("shards", str(path), f"has format {manifest.format}, not {FORMAT}", remedy))
        return manifest

    @property
    def files(self) -> list[tuple[str, int, int]]:
        """Name, bytes and rows of each Parquet file; empty when the manifest does not say."""
        try:
            return [(s["name"], s["size_bytes"], s["rows"]) for s in self.settings["sources"]]
        except (KeyError, TypeError):
            return []


class ShardWriter:
    """Writes one split as shards of at most ``shard_tokens`` tokens. A context manager; ``shards`` is what it wrote."""

    def __init__(self, directory: Path, split: Literal["train", "val"], dtype: str, shard_tokens: int) -> None:
        self.directory, self.dtype, self.shard_tokens = directory, np.dtype(dtype), shard_tokens
        self.split: Literal["train", "val"] = split
        self.shards: list[ShardInfo] = []
        self._file: Any = None
        self._digest: Any = None
        self._in_shard = 0

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return sum(s.tokens for s in self.shards) + self._in_shard

    def add(self, tokens: Tokens) -> None:
        """Append token ids, starting a new shard whenever one is full."""
        tokens = tokens.astype(self.dtype, copy=False)
        while len(tokens):
            if self._file is None:
                self._file = (self.directory / self._name).open("wb")
                self._digest, self._in_shard = hashlib.sha256(), 0
            part = tokens[: self.shard_tokens - self._in_shard]
            data = part.tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._in_shard += len(part)
            tokens = tokens[len(part) :]
            if self._in_shard == self.shard_tokens:
                self._finish_shard()

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self.shards):05d}.bin"

    def _finish_shard(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.shards.append(ShardInfo(self.split, self._name, self._in_shard, self._digest.hexdigest()))
        self._file, self._in_shard = None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        if kind is None:
            self._finish_shard()
        else:
            self._file.close()


class ShardSet:
    """A complete shard directory, memory-mapped."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        dtype = token_dtype(manifest.n_vocab)
        self._arrays = {
            split: TokenArray(directory, [(s.file, s.tokens) for s in manifest.shards if s.split == split], dtype)
            for split in SPLITS
        }

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Open a prepared directory. Raises DataError for a missing manifest and for missing or cut-off shards."""
        directory = Path(directory)
        manifest = Manifest.load(directory)
        width = np.dtype(token_dtype(manifest.n_vocab)).itemsize
        problems = []
        for shard in manifest.shards:
            path = directory / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.tokens * width:
                rule = "is missing" if size is None else f"has {size} bytes, not the {shard.tokens * width} it should"
                problems.append(Problem("shards", str(path), rule, "prepare the data again"))
        if problems:
            raise DataError(problems)
        return cls(directory, manifest)

    def verify(self) -> list[Problem]:
        """Read every shard and compare its SHA-256 with the manifest. Empty when all is as it was written."""
        problems = []
        for shard in self.manifest.shards:
            path = self.directory / shard.file
            with path.open("rb") as f:
                actual = hashlib.file_digest(f, "sha256").hexdigest()
            if actual != shard.sha256:
                problems.append(Problem("shards", str(path), "is damaged: its sha256 is not the one in the manifest"))
        return problems

    @property
    def train_tokens(self) -> int:
        """Tokens of the training split."""
        return len(self._arrays["train"])

    @property
    def val_tokens(self) -> int:
        """Tokens of the held-out documents."""
        return len(self._arrays["val"])

    @property
    def documents(self) -> dict[str, int]:
        """Documents per split (``train``, ``val``), and those left out (``null``, ``empty``)."""
        return self.manifest.documents

    def held_out(self, block_size: int) -> bool:
        """Whether the held-out documents fill at least one block. If not, evaluation borrows the end of training's."""
        return self.val_tokens > block_size

    def train_stream(self, block_size: int, seed: int) -> TokenStream:
        """The training blocks in epochs. Raises DataError when there are too few tokens for one block."""
        tokens = self.train_tokens - (0 if self.held_out(block_size) else block_size + 1)
        if tokens <= block_size:
            raise DataError(too_few_tokens(str(self.directory), self.train_tokens + self.val_tokens, block_size))
        return TokenStream(self._arrays["train"], tokens, block_size, seed, self.manifest.fingerprint)

    def evaluation(self, block_size: int, batch_size: int, batches: int) -> Evaluation:
        """Fixed evaluation batches from the held-out documents, spread evenly over them.

        When those are shorter than a block, the last ``block_size + 1`` tokens of the training split serve instead;
        :meth:`train_stream` leaves exactly these out. Raises DataError when even that is impossible.
        """
        if self.held_out(block_size):
            return Evaluation(self._arrays["val"], 0, self.val_tokens, block_size, batch_size, batches)
        if self.train_tokens < 2 * (block_size + 1):
            raise DataError(too_few_tokens(str(self.directory), self.train_tokens + self.val_tokens, block_size))
        start = self.train_tokens - block_size - 1
        return Evaluation(self._arrays["train"], start, block_size + 1, block_size, batch_size, batches)


def too_few_tokens(source: str, tokens: int, block_size: int) -> Problem:
    """The problem of a text that does not fill one block for training and one for evaluation."""
    rule = (
        f"holds {tokens:,} tokens; training needs one block of block_size+1 = {block_size + 1:,} and evaluation another"
    )
    fits = tokens // 2 - 1
    remedy = f"give more text, or use block_size={fits} or less" if fits >= 1 else "give more text"
    return Problem("data", source, rule, remedy)
