"""Files that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from .errors import ConfigError, Problem


def check_not_over(path: Path, field: str, sources: Iterable[Path]) -> None:
    """Raise ConfigError if writing ``path`` would replace one of ``sources``, or a file in one of them."""
    target = path.resolve()
    for source in sources:
        kept = source.resolve()
        if source.exists() and (target == kept or (kept.is_dir() and target.is_relative_to(kept) and target.exists())):
            raise ConfigError(Problem(field, str(path), "is what it is made from", "name another file"))


def write_text(path: str | Path, text: str, field: str) -> None:
    """Write UTF-8 text through a temporary file beside ``path``, flushed, then renamed.

    A link is followed; a device or pipe such as ``/dev/stdout`` is written to. Raises ConfigError naming ``field`` when
    writing is impossible; nothing is left behind then.
    """
    path = Path(path)
    special = path.exists() and not (path.is_file() or path.is_dir())
    path = path if special else path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if special:
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        with temporary.open("w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(Problem(field, str(path), f"cannot be written ({error.strerror})")) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
