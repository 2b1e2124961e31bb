"""From Parquet text to token shards, once: tokenise, hold documents out for validation, write a manifest.

Each document becomes the end-of-text token followed by its tokens, as in GPT-2's own training data. A document is held
out when the hash of its text falls below ``validation_fraction``: the choice survives reordering of the files, and
copies of a document never land on both sides of the split.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import ConfigError, DataError, Problem, Stopped
from ..files import write_text
from ..runconfig import DataSection
from .events import OnEvent, PreparationProgress, PreparationStarted, PreparationWaiting, Prepared, ignore
from .interrupt import StopAtOnce, StopSignal
from .lock import LOCK, locked
from .parquet import Source, find_sources, read_texts
from .shards import MANIFEST, SPLITS, Manifest, ShardSet, ShardWriter, token_dtype, too_few_tokens
from .stream import TokenStream

__all__ = ["ShardSet", "TextEncoder", "TokenStream", "prepare"]

_BUILDING = ".building"
_MARK = ".vramplan.json"
"""Says for which settings a folder was begun: only what this program began there is ever replaced."""
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
    fill one block. Memory stays bounded by a batch of documents. When another process is writing into ``out_dir``, this
    one waits and takes what that one made, if it is what was wanted.

    Raises DataError for files that cannot be used (all problems at once), for a text too short for ``block_size``, for
    an ``out_dir`` that cannot be written, and for one that holds other shards, which some run may need; Stopped on
    SIGINT, SIGTERM and SIGHUP, after which the shards are there whole or not at all.
    """
    sources = check_data(paths, data.text_column, tokenizer.n_vocab, vocab_size)
    out_dir, source = Path(out_dir), os.path.abspath(os.path.expanduser(paths))
    settings = _settings(sources, tokenizer, data)
    shards, reason = _reusable(out_dir, settings, block_size)
    reused = shards is not None
    if shards is None:
        with StopSignal() as stop, _writable(out_dir):
            try:
                with locked(out_dir, _patience(out_dir, on_event, stop)):
                    shards, reason = _reusable(out_dir, settings, block_size)
                    reused = shards is not None
                    if shards is None:
                        write_text(out_dir / _MARK, json.dumps(settings), "shards")
                        on_event(_started(sources, out_dir, tokenizer, reason))
                        builder = _Builder(sources, out_dir, tokenizer, data, on_event, stop)
                        shards = builder.build(settings, source, block_size)
            except StopAtOnce as error:
                raise _stopped(error.number, str(error)) from None
        if stop.number is not None:  # it came when there was little left to do
            message = f"stopped by {stop.name}. The data is prepared in {out_dir}: run the same command again to go on."
            raise Stopped(message, stop.number)
    on_event(_prepared(shards, reused, block_size))
    return shards


def default_folder(paths: str, run_dir: Path, tokenizer: TextEncoder, data: DataSection, block_size: int) -> Path:
    """Beside the run, so that its neighbours share them: one folder for each content, so that none replaces another's.

    A short text has its validation split chosen for one ``block_size``; shards for another one get their own folder.
    Raises DataError for files that cannot be used.
    """
    identity = json.dumps(_settings(find_sources(paths, data.text_column), tokenizer, data), sort_keys=True)
    name = re.sub(r"[^\w.-]+", "-", Path(paths).stem.replace("*", "all"))[:60] or "all"
    folder = run_dir.parent / "shards" / f"{name}-{zlib.crc32(identity.encode()):08x}"
    try:
        suits = not _unsuitable_split(Manifest.load(folder), block_size)
    except DataError:
        suits = True  # nothing there yet, or nothing of use
    return folder if suits else folder.with_name(f"{folder.name}-block{block_size}")


def check_data(paths: str, column: str, n_vocab: int, vocab_size: int) -> list[Source]:
    """The Parquet files that ``paths`` means, once they and the vocabulary are known to be usable; nothing is written.

    Raises DataError with every problem found.
    """
    problems = []
    if vocab_size < n_vocab:
        rule = f"is smaller than the tokenizer's {n_vocab}"
        problems.append(Problem("vocab_size", vocab_size, rule, f"use {-(-n_vocab // 64) * 64}"))
    sources: list[Source] = []
    try:
        sources = find_sources(paths, column)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise DataError(problems)
    return sources


@contextlib.contextmanager
def _writable(out_dir: Path) -> Iterator[None]:
    """Create the folder; on failure remove it again, if it was not there before, and name it in the error."""
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        if not isinstance(error, OSError):
            raise
        rule = f"cannot be written ({error.strerror or error})"
        raise DataError(Problem("shards", str(out_dir), rule, "free some space, or name another folder")) from None


def _patience(out_dir: Path, on_event: OnEvent, stop: StopSignal) -> Callable[[], None]:
    """What to do while another process writes the shards: say so once, and go on waiting until a signal comes."""
    told: list[bool] = []

    def wait() -> None:
        if not told:
            on_event(PreparationWaiting(directory=out_dir))
            told.append(True)
        if stop.number is not None:
            raise _stopped(stop.number, stop.name)

    return wait


def _stopped(number: int, name: str) -> Stopped:
    message = f"stopped by {name} before the data was prepared. Nothing is kept of it: run the same command again."
    return Stopped(message, number)


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
    """The shards already in ``out_dir`` if they are the ones wanted; else what is wrong with them, or nothing.

    Raises DataError when it holds others, which may belong to a run, or files that this program did not write.
    """
    if not out_dir.is_dir():
        return None, ""
    begun = _begun(out_dir) == json.loads(json.dumps(settings))
    try:
        manifest = Manifest.load(out_dir)
    except DataError as error:
        if begun:
            return None, str(error) if (out_dir / MANIFEST).exists() else ""
        if foreign := sorted(path.name for path in out_dir.iterdir() if path.name != LOCK):
            rule = f"holds other files ({', '.join(foreign[:3])})"
            raise DataError(Problem("shards", str(out_dir), rule, "name an empty or new folder")) from None
        return None, ""
    different = [name for name, value in settings.items() if manifest.settings.get(name) != value]
    other = f"other {' and '.join(different)}" if different else _unsuitable_split(manifest, block_size)
    if other:
        rule = f"holds shards made for another purpose: {other}"
        raise DataError(Problem("shards", str(out_dir), rule, "name another folder, or delete this one"))
    try:
        shards = ShardSet.open(out_dir)
    except DataError as error:
        return None, str(error)
    damaged = shards.verify()
    return (None, "; ".join(map(str, damaged))) if damaged else (shards, "")


def _begun(out_dir: Path) -> Any:
    """The settings for which this program began to write into the folder; None when it did not."""
    try:
        return json.loads((out_dir / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _unsuitable_split(manifest: Manifest, block_size: int) -> str:
    """Why the split into training and validation does not serve this ``block_size``; empty when it does."""
    if manifest.adjusted_for_block not in (None, block_size):
        return f"the validation split was chosen for blocks of {manifest.adjusted_for_block}"
    if manifest.adjusted_for_block is None and min(manifest.tokens("train"), manifest.tokens("val")) <= block_size:
        return f"a split is shorter than a block of {block_size}"
    return ""


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


@dataclass(frozen=True, slots=True)
class _Builder:
    """Tokenises into a folder beside the final place and moves the shards there; whoever calls it holds the lock."""

    sources: list[Source]
    out_dir: Path
    tokenizer: TextEncoder
    data: DataSection
    on_event: OnEvent
    stop: StopSignal

    @property
    def building(self) -> Path:
        return self.out_dir / _BUILDING

    def build(self, settings: dict[str, Any], source: str, block_size: int) -> ShardSet:
        """Write the shards and install them; the manifest comes last."""
        fraction = self.data.validation_fraction
        try:
            result = self._write_pass(range(int(fraction * 2**64)))
            _check_amount(self.sources, result, block_size)
            adjusted = None
            if min(result.tokens.values()) <= block_size:
                adjusted = block_size
                wanted = int(fraction * result.total)
                chosen = choose_held_out(result.candidates, block_size + 1, wanted, result.total)
                if chosen or result.tokens["val"]:
                    result = self._write_pass(chosen)
            manifest = Manifest(
                settings=settings,
                n_vocab=self.tokenizer.n_vocab,
                documents=result.documents,
                shards=result.shards,
                adjusted_for_block=adjusted,
                source=source,
            )
            _install(self.building, self.out_dir, manifest)
        finally:
            shutil.rmtree(self.building, ignore_errors=True)
            if not (self.out_dir / MANIFEST).exists() and not any(_shard_files(self.out_dir)):
                (self.out_dir / _MARK).unlink(missing_ok=True)
        return ShardSet.open(self.out_dir)

    def _write_pass(self, held_out: range | frozenset[int]) -> _Pass:
        """Tokenise everything; documents whose hash is in ``held_out`` go to the val split."""
        shutil.rmtree(self.building, ignore_errors=True)
        self.building.mkdir()
        result, rows, rows_total = _Pass(), 0, sum(s.rows for s in self.sources)
        dtype, length = token_dtype(self.tokenizer.n_vocab), self.data.shard_tokens
        with (
            ShardWriter(self.building, "train", dtype, length) as train,
            ShardWriter(self.building, "val", dtype, length) as val,
        ):
            for source in self.sources:
                for batch in read_texts(source, self.data.text_column):
                    if self.stop.number is not None:
                        raise _stopped(self.stop.number, self.stop.name)
                    texts = [text for text in batch if text]
                    result.documents["null"] += batch.count(None)
                    result.documents["empty"] += batch.count("")
                    for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
                        key = document_hash(text)
                        split = val if key in held_out else train
                        split.add(np.array([self.tokenizer.eot, *ids], dtype=dtype))
                        result.documents[split.split] += 1
                        if len(result.candidates) < _CANDIDATES:
                            result.candidates[key] = result.candidates.get(key, 0) + len(ids) + 1
                    rows += len(batch)
                    done = train.tokens + val.tokens
                    self.on_event(PreparationProgress(rows=rows, rows_total=rows_total, tokens=done))
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


def _shard_files(directory: Path) -> list[Path]:
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
    left_out = [f"{shards.documents[kind]:,} {kind}" for kind in ("null", "empty") if shards.documents.get(kind)]
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
