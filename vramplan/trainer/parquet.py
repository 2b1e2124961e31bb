"""Finding, checking and reading the Parquet files that hold the text: FineWeb's schema, of which one column is read."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, Problem, did_you_mean

ROWS_PER_BATCH = 1024
"""Documents tokenised at a time: about 3 MB of web text, enough to keep every core busy."""

_READ_BUFFER_BYTES = 8 * 2**20
_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class Source:
    """One readable Parquet file. Name, size and time of change identify it when it is met again."""

    path: Path
    size_bytes: int
    modified_ns: int
    rows: int


def find_sources(paths: str, column: str) -> list[Source]:
    """The Parquet files that ``paths`` (a file, a folder searched recursively, or a glob) means, in sorted order.

    Raises DataError with every problem of every file: missing, empty, not Parquet, truncated, without ``column`` or
    with a column that holds no text.
    """
    try:
        files = _find(paths)
    except OSError as error:
        raise DataError(Problem("data", paths, f"cannot be read ({error.strerror})")) from None
    sources, problems = [], []
    for file in files:
        found = _check(file, column)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            sources.append(found)
    if problems:
        raise DataError(problems)
    return sources


def read_texts(source: Source, column: str) -> Iterator[list[str | None]]:
    """The text column, a batch of documents at a time; memory stays bounded by the batch, not by the file.

    Raises DataError where the file turns out to be damaged inside.
    """
    rows = 0
    try:
        with _open(source.path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=[column]):
                texts: list[str | None] = batch.column(0).to_pylist()
                rows += len(texts)
                yield texts
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        rule = f"is damaged after row {rows} of {source.rows} ({_first_line(error)})"
        raise DataError(Problem("data", str(source.path), rule, "download the file again")) from None
    if rows != source.rows:
        rule = f"gave {rows} rows, but its footer promises {source.rows}"
        raise DataError(Problem("data", str(source.path), rule, "download the file again"))


def _find(paths: str) -> list[Path]:
    if not paths.strip():
        raise DataError(Problem("data", paths, "is empty", "name the Parquet files"))
    path = Path(os.path.expanduser(paths))
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.parquet") if p.is_file() and not _hidden(p.relative_to(path)))
        if not files:
            problem = Problem("data", paths, "is a folder without .parquet files", "name the folder that holds them")
            raise DataError(problem)
        return files
    if path.exists():
        return [path]
    if glob.has_magic(str(path)):
        matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not matches:
            raise DataError(Problem("data", paths, "matches no file", "quote the pattern and check the folder"))
        return matches
    raise DataError(Problem("data", paths, "does not exist", _nearby(path)))


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _nearby(path: Path) -> str:
    """What to use instead of a path that does not exist."""
    if path.parent.is_dir():
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix == ".parquet" or p.is_dir())[:20]
        if names:
            return did_you_mean(path.name, names)
    return "name a .parquet file, a folder of them, or a pattern such as 'data/*.parquet'"


def _check(path: Path, column: str) -> Source | Problem:
    """What is wrong with a file as a source of text, or the file as a source."""
    try:
        status = path.stat()
        with path.open("rb") as f:
            head = f.read(64)
        if not head:
            return Problem("data", str(path), "is an empty file", "download it again")
        with _open(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        return Problem("data", str(path), *_why_unreadable(path, error))
    if column not in schema.names:
        columns = ", ".join(schema.names) or "none"
        return Problem("data.text_column", column, f"is not a column of {path}", _which_column(column, schema, columns))
    if (times := schema.names.count(column)) > 1:
        return Problem("data.text_column", column, f"is the name of {times} columns of {path}", "rename all but one")
    kind = schema.field(column).type
    if not _holds_text(kind):
        return Problem("data.text_column", column, f"holds {kind} in {path}, not text", _text_columns(schema))
    return Source(path, status.st_size, status.st_mtime_ns, rows)


def _why_unreadable(path: Path, error: Exception) -> tuple[str, str]:
    """Rule and remedy for a file that pyarrow cannot open."""
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError:
        return f"cannot be read ({_first_line(error)})", "check the path and its permissions"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself", "run git lfs pull, or download the file"
    if head.startswith(_MAGIC):
        return "is truncated or damaged: its Parquet footer cannot be read", "download it again"
    return f"is not a Parquet file (it begins with {head[:8]!r})", "name a .parquet file"


def _open(path: Path) -> Any:
    """Open for streaming: no read-ahead of whole row groups, page checksums verified where the file has them."""
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES, page_checksum_verification=True)


def _holds_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _which_column(column: str, schema: pa.Schema, columns: str) -> str:
    guess = did_you_mean(column, schema.names) if schema.names else ""
    return guess if guess.startswith("known") else f"{guess} (columns: {columns})"


def _text_columns(schema: pa.Schema) -> str:
    names: Sequence[str] = [field.name for field in schema if _holds_text(field.type)]
    return f"use one of its text columns: {', '.join(names)}" if names else "the file has no text column"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
