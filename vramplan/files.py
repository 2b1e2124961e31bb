"""Files that are either written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .errors import ConfigError, Problem


def write_text(path: str | Path, text: str, field: str) -> None:
    """Write UTF-8 text through a temporary file beside ``path``, flushed, then renamed.

    Raises ConfigError naming ``field`` when that is impossible; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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
