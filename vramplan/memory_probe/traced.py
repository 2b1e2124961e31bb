"""What this machine traced compiled steps to keep, in a file beside the ledger: no torch is needed to read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import write_text
from ..planner.partitions import Partition, Row, Traced, product
from ..planner.shape import Shape
from ..planner.step import StepConfig
from .ledger import default_path

FORMAT = 1
LARGEST_COUNT = 10_000
_ANY = Shape(n_layer=1, n_head=1, n_embd=8), StepConfig()


def traced_path() -> Path:
    """Beside the ledger."""
    return default_path().with_name("partitions.json")


def read_traced(path: Path | None = None, on_note: Callable[[str], None] = lambda note: None) -> Traced:
    """Every trace that was kept. A file that cannot be read is said with ``on_note``, and is as good as none."""
    path = path or traced_path()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        on_note(f"{path} cannot be read ({type(error).__name__}); planned without it")
        return {}
    try:
        return _checked(data)
    except (AttributeError, KeyError, TypeError, ValueError):
        on_note(f"{path} is no file of traces of format {FORMAT}; planned without it")
        return {}


def keep_traced(release: str, family: str, found: Partition, path: Path | None = None) -> Path:
    """Add one trace, in place of an older one of the same release and family. Raises ConfigError."""
    path = path or traced_path()
    known = {**read_traced(path), (release, family): found}
    entries = [
        {"torch": version, "family": name, "layer": kept.layer, "outside": kept.outside}
        for (version, name), kept in sorted(known.items(), key=lambda item: item[0])
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n ".join(json.dumps(entry) for entry in entries)
    write_text(path, f'{{"format": {FORMAT}, "traced": [\n {lines}\n]}}\n', "--keep")
    return path


def _checked(data: Any) -> Traced:
    if data["format"] != FORMAT:
        raise ValueError("another format")
    return {
        (str(entry["torch"]), str(entry["family"])): Partition(_rows(entry["layer"]), _rows(entry["outside"]))
        for entry in data["traced"]
    }


def _rows(rows: Any) -> tuple[Row, ...]:
    return tuple(_row(*row) for row in rows)


def _row(n: Any, elements: Any, width: Any, name: Any) -> Row:
    known = type(n) is int and abs(n) <= LARGEST_COUNT and type(elements) is type(name) is str
    if not known or width not in (1, 2, 4, 8):
        raise ValueError("no row of a trace")
    product(elements, *_ANY)
    return n, elements, width, name
