"""What this machine traced compiled steps to keep: a file for each release and family, in a folder beside the ledger.

No torch is needed to read them. A file of its own for each trace, because several processes may write at once; one that
is damaged costs the others nothing, and is only replaced by the trace that belongs there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem
from ..files import write_text
from ..planner.partitions import Partition, Row, Traced, product, short
from ..planner.shape import Shape
from ..planner.step import StepConfig
from .ledger import default_path

FORMAT = 1
LARGEST_COUNT = 10_000
LARGEST_ELEMENTS = 2**31
LARGEST_FILE = 1 << 20
_ONE = Shape(n_layer=1, n_head=1, n_embd=1, vocab_size=1, block_size=1, n_kv_head=1), StepConfig()
"""All named dimensions of it are small: what is left of a product are its numbers."""

OnNote = Callable[[str], None]


def traced_folder() -> Path:
    """Beside the ledger."""
    return default_path().with_name("traced")


def read_traced(folder: Path | None = None, on_note: OnNote = lambda note: None) -> Traced:
    """Every trace that was kept. A file that cannot be read is said with ``on_note``, and is as good as none."""
    known: dict[tuple[str, str], Partition] = {}
    for path in sorted((folder or traced_folder()).glob("*.json")):
        try:
            if not path.is_file() or path.stat().st_size > LARGEST_FILE:
                raise ValueError("no file of ours")
            release, family, found = _checked(json.loads(path.read_text(encoding="utf-8")))
            if path.name != _name(release, family):
                raise ValueError("a copy, which no later trace would replace")
        except OSError as error:
            on_note(f"{path} cannot be read ({error.strerror}); planned without it")
        except (AttributeError, ConfigError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            on_note(f"{path} is no trace of format {FORMAT}; planned without it")
        else:
            known[release, family] = found
    return known


def keep_traced(release: str, family: str, found: Partition, folder: Path | None = None) -> Path:
    """Keep one trace, in place of an older one of the same release and family. Raises ConfigError."""
    path = made_folder(folder) / _name(release, family)
    entry = {"format": FORMAT, "torch": release, "family": family, "layer": found.layer, "outside": found.outside}
    write_text(path, json.dumps(entry, indent=1) + "\n", "traces")
    return path


def made_folder(folder: Path | None = None) -> Path:
    """The folder, made if need be. Raises ConfigError where that is impossible."""
    folder = folder or traced_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be made ({error.strerror})"
        raise ConfigError(Problem("traces", str(folder), rule, "name another place with VRAMPLAN_LEDGER")) from None
    return folder


def _name(release: str, family: str) -> str:
    return f"{release}-{hashlib.sha256(family.encode()).hexdigest()[:16]}.json"


def _checked(entry: Any) -> tuple[str, str, Partition]:
    release, family = entry["torch"], entry["family"]
    if type(entry["format"]) is not int or entry["format"] != FORMAT or not (type(release) is type(family) is str):
        raise ValueError("another format")
    if short(release) != release:
        raise ValueError("no release")
    layer, outside = (tuple(_row(*row) for row in entry[name]) for name in ("layer", "outside"))
    if not layer or min(n for n, *_ in layer) < 1:
        raise ValueError("every layer keeps something")
    return release, family, Partition(layer, outside)


def _row(n: Any, elements: Any, width: Any, name: Any) -> Row:
    if type(n) is not int or abs(n) > LARGEST_COUNT or type(elements) is not str or type(name) is not str:
        raise ValueError("no row of a trace")
    if type(width) is not int or width not in (1, 2, 4, 8) or not 0 < product(elements, *_ONE) <= LARGEST_ELEMENTS:
        raise ValueError("no size of a tensor")
    return n, elements, width, name
