"""The ledger: every measurement, kept in one SQLite file, as evidence for the next plan.

Several processes may write at once (write-ahead log, a busy timeout); only one at a time makes the file or sets it
aside, which a lock file sees to. A file that is damaged, or that a newer version wrote, is set aside under another name
with a message; nothing is ever deleted because it could not be read. What is no file, or another program's database, is
left where it is.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, VramplanError
from ..planner.evidence import Evidence, Residual
from ..units import parse_time

if TYPE_CHECKING:
    from .measurement import Measurement  # whose import takes longer than a plan's whole search

SCHEMA = 1
MAGIC = b"SQLite format 3\0"
SUFFIXES = (".sqlite", ".sqlite3", ".db")
BUSY_SECONDS = 30.0
ENVIRONMENT = "VRAMPLAN_LEDGER"

_CREATE = """
create table if not exists measurements (
    id text primary key, time text not null, device text not null, architecture text not null,
    workload text not null, mode text not null, configuration text not null, outcome text not null,
    residual real, at_least integer not null, expected_bytes integer not null, measurement text not null
)
"""
_COLUMNS = (
    "id, time, device, architecture, workload, mode, configuration, outcome, residual, at_least, expected_bytes, "
    "measurement"
)

_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT}
"""Result codes that speak of the file's content; the others (busy, full, not writable) of the moment or the place."""

_LARGEST_RESIDUAL = 1e6
"""Beyond it a figure is not an estimate's error but damage."""

OnNote = Callable[[str], None]


def default_path() -> Path:
    """Where the ledger is unless somebody says otherwise: ``$VRAMPLAN_LEDGER``, or the user's data directory."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return Path(os.path.expanduser(given))  # unlike Path.expanduser silent about a user it does not know
    import platformdirs

    return Path(platformdirs.user_data_dir("vramplan", appauthor=False)) / "ledger.sqlite"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import brought: measurements that are new, that were there already, and lines that could not be read."""

    added: int
    known: int
    refused: tuple[str, ...]


class Ledger:
    """Measurements in a SQLite file, which is made when the first one is added. Use as a context manager."""

    def __init__(self, path: str | Path | None = None, on_note: OnNote = lambda note: None) -> None:
        """Open the file if it exists. Raises VramplanError when it cannot be used at all."""
        self.path = Path(path) if path is not None else default_path()
        self._on_note = on_note
        self._connection: sqlite3.Connection | None = None
        if self._exists():
            self._open()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # ---------------------------------------------------------------- writing

    def add(self, measurements: Iterable[Measurement]) -> int:
        """Keep measurements; those that are there already are passed over. Returns how many were new."""
        if self._connection is None:
            self._open()
        with self._usable() as connection:
            before = connection.total_changes
            with connection:
                connection.executemany(
                    f"insert or ignore into measurements ({_COLUMNS}) values ({', '.join('?' * 12)})",
                    [_row(m) for m in measurements],
                )
            return connection.total_changes - before

    def import_lines(self, lines: Iterable[str]) -> Imported:
        """Add what another ledger exported, a JSON object a line; every line that cannot be read is named."""
        from .measurement import Measurement

        found, refused = [], []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    found.append(Measurement.read(line, f"line {number}"))
                except ConfigError as error:
                    refused.append(str(error))
        added = self.add(found) if found else 0
        return Imported(added, len(found) - added, tuple(refused))

    def prune(self, *, before: str | None = None, outcome: str | None = None) -> int:
        """Delete measurements older than ``before`` (ISO date) and of ``outcome``; with neither, none."""
        clauses, values = _where({"time <": before, "outcome =": outcome})
        if not clauses or self._connection is None:
            return 0
        with self._usable() as connection, connection:
            return int(connection.execute(f"delete from measurements{clauses}", values).rowcount)

    # ---------------------------------------------------------------- reading

    def measurements(self, *, identifier: str | None = None, outcome: str | None = None) -> Iterator[Measurement]:
        """Those whose id begins with ``identifier``, of ``outcome``; oldest first. What cannot be read is noted."""
        from .measurement import Measurement

        clauses, values = _where({"id glob": None if identifier is None else f"{identifier}*", "outcome =": outcome})
        rows = self._rows(
            f"select rowid, cast(measurement as blob) from measurements{clauses} order by time, rowid", values
        )
        for number, text in rows:
            try:
                found = Measurement.read(text, f"{self.path}, row {number}")
            except ConfigError as error:
                self._on_note(f"Passed over: {error}")
                continue
            yield found

    def evidence(self, architecture: str) -> Evidence:
        """The residuals of one architecture, of each configuration the worst."""
        rows = self._rows(
            "select workload, mode, max(residual), expected_bytes, at_least from measurements "
            "where architecture = ? and typeof(residual) = 'real' and residual between -1 and ? "
            "and typeof(expected_bytes) = 'integer' group by workload, mode, configuration",
            (architecture, _LARGEST_RESIDUAL),
        )
        return Evidence(
            tuple(Residual(work, mode, error, size, bool(at_least)) for work, mode, error, size, at_least in rows)
        )

    def __len__(self) -> int:
        return next((int(n) for (n,) in self._rows("select count(*) from measurements")), 0)

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        if self._connection is None:
            return []
        with self._usable() as connection:
            return connection.execute(query, values).fetchall()

    # ---------------------------------------------------------------- the file

    def _exists(self) -> bool:
        try:
            self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise self._unusable(error) from None
        return True

    def _open(self) -> None:
        """Connect; where there is no sound ledger make one, and set aside what is in its place."""
        try:
            with contextlib.suppress(FileNotFoundError, _UnsoundError):
                self._connection = self._connect()
                return
            import filelock

            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{self.path}.lock", timeout=BUSY_SECONDS):
                self._connection = self._renew()
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def _connect(self) -> sqlite3.Connection:
        """A connection to a sound ledger. Raises FileNotFoundError, _UnsoundError, OSError, sqlite3.Error."""
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise self._unusable("it is no file")
        if not status.st_size:  # of which SQLite would make an empty database, and delete its log
            raise _UnsoundError("damaged", "is empty")
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS)
        try:
            self._check(connection)
            connection.execute("pragma synchronous = normal")
        except sqlite3.DatabaseError as error:
            connection.close()
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _DAMAGE:
                raise _UnsoundError("damaged", f"is damaged ({error})") from None
            raise
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        """Raises _UnsoundError, sqlite3.Error, or VramplanError for another program's database."""
        (schema,) = connection.execute("pragma user_version").fetchone()
        tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        if tables and "measurements" not in tables:
            raise self._unusable("it is another program's database")
        if schema > SCHEMA:
            why = f"was written by a newer vramplan (schema {schema}, this one has {SCHEMA})"
            raise _UnsoundError(f"schema-{schema}", why)
        (sound,) = connection.execute("pragma quick_check(1)").fetchone()
        if sound != "ok":
            raise sqlite3.DatabaseError(sound)
        if not tables:
            raise _UnsoundError("", "was never finished")
        connection.execute(f"select {_COLUMNS} from measurements limit 1")

    def _renew(self) -> sqlite3.Connection:
        """Make the file, while the lock is held; another process may just have done so."""
        try:
            return self._connect()
        except FileNotFoundError:
            pass
        except _UnsoundError as error:
            if error.word and not self._looks_like_ours():
                raise self._unusable(f"it {error.why}, and nothing says that it ever was one") from None
            if error.word:
                self._set_aside(error.word, error.why)
        with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as connection:
            connection.execute("pragma journal_mode = wal")
            with connection:
                connection.execute("begin immediate")
                connection.execute(_CREATE)
                connection.execute(f"pragma user_version = {SCHEMA}")
        return self._connect()

    def _looks_like_ours(self) -> bool:
        """Whether what is here may be renamed: by its place, its name or its first bytes it is a database."""
        if self.path == default_path() or self.path.suffix in SUFFIXES:
            return True
        with self.path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def _set_aside(self, word: str, why: str) -> None:
        """Rename the file, with its log."""
        names = (f"{self.path.name}.{word}{f'-{n}' if n else ''}" for n in itertools.count())
        aside = next(path for path in map(self.path.with_name, names) if not os.path.lexists(path))
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).replace(aside.with_name(aside.name + suffix))
        self._on_note(f"The ledger {self.path} {why}. It is kept as {aside}; a new one is begun.")

    @contextlib.contextmanager
    def _usable(self) -> Iterator[sqlite3.Connection]:
        """The connection; what goes wrong with it becomes one message."""
        if self._connection is None:
            raise VramplanError(f"the ledger {self.path} is closed")
        try:
            yield self._connection
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception | str) -> VramplanError:
        reason = getattr(error, "strerror", None) or error
        remedy = f"name another with --ledger FILE or ${ENVIRONMENT}"
        return VramplanError(f"the ledger {self.path} cannot be used ({reason}); {remedy}")


class _UnsoundError(Exception):
    """The file is no ledger that can be worked with: a word for its new name (none: it may stay), and why."""

    def __init__(self, word: str, why: str) -> None:
        self.word, self.why = word, why
        super().__init__(why)


def _row(m: Measurement) -> tuple[object, ...]:
    residual = m.residual
    expected = m.expected_allocated_bytes if m.architecture == "cpu" else m.expected_process_bytes
    return (
        m.id, utc_text(m.when), m.device, m.architecture, m.step.workload, m.mode, m.configuration, m.outcome, residual,
        m.ran_out_unexpectedly, expected, m.model_dump_json(),
    )  # fmt: skip


def _where(conditions: dict[str, str | None]) -> tuple[str, list[str]]:
    given = {clause: value for clause, value in conditions.items() if value is not None}
    text = " and ".join(f"{clause} ?" for clause in given)
    return (f" where {text}" if text else ""), list(given.values())


def utc_text(text: str, field: str = "when") -> str:
    """``2026-11-21`` or a whole time stamp, as the ledger's times are compared. Raises ConfigError."""
    return parse_time(text, field).isoformat(timespec="seconds")
