"""One process at a time: a lock file that the system itself releases when its holder ends, however that happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

LOCK = ".lock"
POLL_SECONDS = 0.2


def in_use(directory: Path) -> bool:
    """Whether another process holds ``directory`` right now. Creates nothing."""
    path = directory / LOCK
    if not path.is_file():
        return False
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:
        return False  # not ours to write: whoever needs to write will say so


@contextlib.contextmanager
def locked(directory: Path, on_busy: Callable[[], None]) -> Iterator[None]:
    """Hold ``directory``, which is created if need be, for the duration of the block.

    While another process holds it, ``on_busy`` is called again and again; it raises to give up. A directory in which
    nothing was left keeps no lock file either. Raises OSError where the lock file cannot be written.
    """
    lock = filelock.FileLock(directory / LOCK, timeout=0)
    while True:
        directory.mkdir(parents=True, exist_ok=True)  # its last holder may have cleared it away
        try:
            lock.acquire()
            break
        except filelock.Timeout:
            on_busy()
            time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if [path.name for path in directory.iterdir()] == [LOCK]:
                (directory / LOCK).unlink()  # while it is held: afterwards it might be another's
        lock.release()
