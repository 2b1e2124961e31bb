"""From Parquet text to token shards, once: tokenise, hold documents out for validation, write a manifest.

Each document becomes the end-of-text token followed by its tokens, as in GPT-2's own training data. A document is held
out when the hash of its text falls below ``validation_fraction``: the choice survives reordering of the files, and
copies of a document never land on both sides of the split.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, DataError, Problem
from ..runconfig import DataSection
from .events import OnEvent, PreparationProgress, PreparationStarted, Prepared, ignore
from .parquet import Source, find_sources, read_texts
from .shards import MANIFEST, SPLITS, Manifest, ShardSet, ShardWriter, token_dtype, too_few_tokens
from .stream import TokenStream

__all__ = ["ShardSet", "TextEncoder", "TokenStream", "prepare"]

_BUILDING = ".building"
_CANDIDATES = 100_000
"""Documents remembered in case the hash alone holds out too little. Only a small text needs them."""


class TextEncoder(Protocol):
    """What :func:`prepare` needs of a tokenizer; :class:`~vramplan.trainer.tokenizer.Tokenizer` has it."""

    name: str
    source: str
    ranks_sha256: str
    n_vocab: int
    eot: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""


def prepare(
    paths: str,
    out_dir: str | Path,
    tokenizer: TextEncoder,
    data: DataSection,
    vocab_size: int,
    *,
    block_size: int = 1024,
    on_event: OnEvent = ignore,
) -> ShardSet:
    """Tokenise the Parquet files that ``paths`` (file, folder or glob) means into ``out_dir``, or reuse what is there.

    Shards are reused when their manifest names the same files (name, size, time of change, rows) and settings, and
    their hashes still hold. ``block_size`` matters only for a text so short that the validation split must be chosen to
    fill one block. Memory stays bounded by a batch of documents.

    Raises DataError for files that cannot be used (all problems at once), for a text too short for ``block_size``, and
    for an ``out_dir`` that cannot be written.
    """
    problems = _vocabulary_problems(tokenizer, vocab_size)
    sources: list[Source] = []
    try:
        sources = find_sources(paths, data.text_column)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise DataError(problems)
    out_dir = Path(out_dir)
    settings = _settings(sources, tokenizer, data)
    shards, reason = _reusable(out_dir, settings, block_size)
    reused = shards is not None
    if shards is None:
        on_event(_started(sources, out_dir, tokenizer, reason))
        try:
            shards = _build(sources, out_dir, tokenizer, data, settings, block_size, on_event)
        except OSError as error:
            rule = f"cannot be written ({error.strerror or error})"
            raise DataError(Problem("shards", str(out_dir), rule, "free some space, or name another folder")) from None
    on_event(_prepared(shards, reused, block_size))
    return shards


def _vocabulary_problems(tokenizer: TextEncoder, vocab_size: int) -> list[Problem]:
    if vocab_size >= tokenizer.n_vocab:
        return []
    padded = -(-tokenizer.n_vocab // 64) * 64
    rule = f"is smaller than the tokenizer's {tokenizer.n_vocab}"
    return [Problem("vocab_size", vocab_size, rule, f"use {padded}")]


def _settings(sources: list[Source], tokenizer: TextEncoder, data: DataSection) -> dict[str, Any]:
    """Everything that decides the content of the shards."""
    return {
        "sources": [
            {"name": s.path.name, "size_bytes": s.size_bytes, "modified_ns": s.modified_ns, "rows": s.rows}
            for s in sources
        ],
        "tokenizer": {"name": tokenizer.name, "ranks_sha256": tokenizer.ranks_sha256, "n_vocab": tokenizer.n_vocab},
        "dtype": token_dtype(tokenizer.n_vocab),
        **data.model_dump(),
    }


def _reusable(out_dir: Path, settings: dict[str, Any], block_size: int) -> tuple[ShardSet | None, str]:
    """The shards already in ``out_dir`` if they are the ones wanted; else why not (empty when there are none)."""
    if not (out_dir / MANIFEST).exists():
        return None, ""
    try:
        shards = ShardSet.open(out_dir)
        damaged = [] if shards.manifest.settings != settings else shards.verify()
    except DataError as error:
        return None, str(error)
    manifest = shards.manifest
    different = [name for name, value in settings.items() if manifest.settings.get(name) != value]
    if different:
        return None, f"other {' and '.join(different)} than before"
    if damaged:
        return None, "; ".join(map(str, damaged))
    if manifest.adjusted_for_block not in (None, block_size):
        return None, f"the validation split was chosen for blocks of {manifest.adjusted_for_block}"
    minimum = block_size + 1
    if manifest.adjusted_for_block is None and min(manifest.tokens("train"), manifest.tokens("val")) < minimum:
        return None, f"a split is shorter than a block of {block_size}"
    return shards, ""


@dataclass(slots=True)
class _Pass:
    """One pass over all documents: what it wrote, and the hashes and lengths from which a better split is chosen."""

    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*SPLITS, "null", "empty"), 0))
    shards: tuple[Any, ...] = ()
    tokens: dict[str, int] = field(default_factory=dict)
    candidates: dict[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.tokens.values())


def _build(
    sources: list[Source],
    out_dir: Path,
    tokenizer: TextEncoder,
    data: DataSection,
    settings: dict[str, Any],
    block_size: int,
    on_event: OnEvent,
) -> ShardSet:
    """Write the shards beside the final place and move them there; the manifest comes last."""
    building = out_dir / _BUILDING
    below = int(data.validation_fraction * 2**64)
    try:
        result = _write_pass(sources, building, tokenizer, data, range(below), on_event)
        _check_amount(sources, result, block_size)
        adjusted = None
        if min(result.tokens.values()) <= block_size:
            adjusted = block_size
            wanted = int(data.validation_fraction * result.total)
            chosen = choose_held_out(result.candidates, block_size + 1, wanted, result.total)
            if chosen or result.tokens["val"]:
                result = _write_pass(sources, building, tokenizer, data, chosen, on_event)
        manifest = Manifest(
            settings=settings,
            n_vocab=tokenizer.n_vocab,
            documents=result.documents,
            shards=result.shards,
            adjusted_for_block=adjusted,
        )
        _install(building, out_dir, manifest)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return ShardSet.open(out_dir)


def _write_pass(
    sources: list[Source],
    building: Path,
    tokenizer: TextEncoder,
    data: DataSection,
    held_out: range | frozenset[int],
    on_event: OnEvent,
) -> _Pass:
    """Tokenise everything into ``building``; documents whose hash is in ``held_out`` go to the val split."""
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    result, rows, rows_total = _Pass(), 0, sum(s.rows for s in sources)
    dtype = token_dtype(tokenizer.n_vocab)
    with (
        ShardWriter(building, "train", dtype, data.shard_tokens) as train,
        ShardWriter(building, "val", dtype, data.shard_tokens) as val,
    ):
        for source in sources:
            for batch in read_texts(source, data.text_column):
                texts = [text for text in batch if text]
                result.documents["null"] += batch.count(None)
                result.documents["empty"] += batch.count("")
                for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                    key = document_hash(text)
                    split = val if key in held_out else train
                    split.add(np.array([tokenizer.eot, *ids], dtype=dtype))
                    result.documents[split.split] += 1
                    if len(result.candidates) < _CANDIDATES:
                        result.candidates[key] = result.candidates.get(key, 0) + len(ids) + 1
                rows += len(batch)
                done = train.tokens + val.tokens
                on_event(PreparationProgress(rows=rows, rows_total=rows_total, tokens=done))
    result.shards = (*train.shards, *val.shards)
    result.tokens = {"train": train.tokens, "val": val.tokens}
    return result


def document_hash(text: str) -> int:
    """64 uniform bits of a document's text."""
    content = text.encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def choose_held_out(candidates: dict[int, int], minimum: int, wanted: int, total: int) -> frozenset[int]:
    """Hashes of the documents to hold out: ``wanted`` tokens, at least ``minimum``, and no more than half of all.

    ``candidates`` maps document hashes to tokens. Taken in the order of their hashes. Empty when no choice reaches the
    minimum: fewer tokens would be lost to training without making an evaluation possible.
    """
    chosen: set[int] = set()
    tokens = 0
    for key in sorted(candidates):
        if tokens >= max(minimum, wanted):
            break
        if tokens + candidates[key] <= total // 2:
            chosen.add(key)
            tokens += candidates[key]
    return frozenset(chosen) if tokens >= minimum else frozenset()


def _check_amount(sources: Sequence[Source], result: _Pass, block_size: int) -> None:
    names = ", ".join(str(s.path) for s in sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
    if result.total == 0:
        counts = f"{result.documents['null']} null and {result.documents['empty']} empty rows"
        raise DataError(Problem("data", names, f"holds no document ({counts})", "name a file with text in it"))
    if result.total < 2 * (block_size + 1):
        raise DataError(too_few_tokens(names, result.total, block_size))


def _install(building: Path, out_dir: Path, manifest: Manifest) -> None:
    """Replace whatever shards ``out_dir`` holds. Without its manifest a half-replaced directory counts as empty."""
    (out_dir / MANIFEST).unlink(missing_ok=True)
    for old in _shard_files(out_dir):
        old.unlink()
    for shard in manifest.shards:
        (building / shard.file).rename(out_dir / shard.file)
    manifest.save(out_dir)


def _shard_files(directory: Path) -> Iterable[Path]:
    digits = "[0-9]" * 5
    return [path for split in SPLITS for path in directory.glob(f"{split}-{digits}.bin")]


def _started(sources: list[Source], out_dir: Path, tokenizer: TextEncoder, reason: str) -> PreparationStarted:
    return PreparationStarted(
        files=len(sources),
        rows=sum(s.rows for s in sources),
        size_bytes=sum(s.size_bytes for s in sources),
        directory=out_dir,
        tokenizer_source=tokenizer.source,
        reason=reason,
    )


def _prepared(shards: ShardSet, reused: bool, block_size: int) -> Prepared:
    notes = []
    left_out = [f"{shards.documents[kind]:,} {kind}" for kind in ("null", "empty") if shards.documents[kind]]
    if left_out:
        notes.append(f"{' and '.join(left_out)} documents were left out")
    if not shards.held_out(block_size):
        notes.append(
            f"no whole document could be held out: the last {block_size + 1:,} tokens of the text serve for "
            "evaluation and are not trained on"
        )
    elif shards.manifest.adjusted_for_block:
        share = shards.val_tokens / (shards.val_tokens + shards.train_tokens)
        notes.append(f"{share:.1%} of the tokens are held out, chosen so that they fill a block of {block_size}")
    return Prepared(
        directory=shards.directory,
        reused=reused,
        documents=shards.documents,
        train_tokens=shards.train_tokens,
        val_tokens=shards.val_tokens,
        notes=tuple(notes),
    )
