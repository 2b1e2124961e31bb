"""Write a small Parquet file with FineWeb's columns, from text that ships with CPython: no download needed.

    python examples/demo_corpus.py demo.parquet

The documents are the language reference topics of ``pydoc`` and the docstrings of the standard library, one document
per topic and per module. The sources are parsed, never imported, so nothing runs. The order is fixed: the same Python
gives the same file.
"""

from __future__ import annotations

import ast
import importlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string()),
        pa.field("id", pa.string()),
        pa.field("dump", pa.string()),
        pa.field("url", pa.string()),
        pa.field("date", pa.string()),
        pa.field("file_path", pa.string()),
        pa.field("language", pa.string()),
        pa.field("language_score", pa.float64()),
        pa.field("token_count", pa.int64()),
    ]
)
"""The columns of a FineWeb file."""

LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "__pycache__"}
"""Folders of the standard library without prose worth reading."""

SHORTEST_DOCUMENT = 200
"""Characters; shorter modules are left out."""


def write_corpus(path: str | Path) -> dict[str, Any]:
    """Write the corpus to ``path``. Returns its ``path``, ``documents``, ``characters`` and ``size_bytes``."""
    path = Path(path)
    rows = [_row(kind, name, text) for kind, name, text in documents()]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd", row_group_size=256)
    characters = sum(len(row["text"]) for row in rows)
    return {"path": str(path), "documents": len(rows), "characters": characters, "size_bytes": path.stat().st_size}


def documents() -> Iterator[tuple[str, str, str]]:
    """(kind, name, text) of every document: first the topics by name, then the modules by name."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield "topics", name, topics[name].strip()
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).parts):
        relative = source.relative_to(library)
        if LEFT_OUT.isdisjoint(relative.parts) and not relative.parts[0].startswith("config-"):
            text = "\n\n".join(docstrings(source))
            if len(text) >= SHORTEST_DOCUMENT:
                yield "library", ".".join(relative.with_suffix("").parts), text


def docstrings(source: Path) -> Iterator[str]:
    """The docstrings of a module, its classes and functions, each under the name it documents, in source order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in other people's string literals
        try:
            tree = ast.parse(source.read_bytes())
        except SyntaxError:  # template files that are not meant to be parsed
            return
    for node in _definitions(tree):
        text = ast.get_docstring(node)
        if text:
            yield text if isinstance(node, ast.Module) else f"{node.name}\n{text}"


Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(node: ast.AST) -> Iterator[Definition]:
    if isinstance(node, Definition):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from _definitions(child)


def _row(kind: str, name: str, text: str) -> dict[str, Any]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {
        "text": text.encode("utf-8", errors="replace").decode("utf-8"),
        "id": f"<urn:python:{version}:{kind}:{name}>",
        "dump": f"PYTHON-{version}",
        "url": f"https://docs.python.org/{version}/",
        "date": "",
        "file_path": f"python{version}/{kind}/{name}",
        "language": "en",
        "language_score": 1.0,
        "token_count": len(text) // 4,
    }


def main() -> None:
    """Command line: the path to write to."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/demo_corpus.py FILE.parquet")
    facts = write_corpus(sys.argv[1])
    print(f"{facts['path']}: {facts['documents']} documents, {facts['characters'] / 1e6:.1f}M characters")


if __name__ == "__main__":
    main()
