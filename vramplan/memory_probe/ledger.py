"""The ledger: every measurement, kept in one SQLite file, as evidence for the next plan.

Several processes may write at once (write-ahead log, a busy timeout). A file that is damaged, or that a newer version
wrote, is set aside under another name with a message; nothing is ever deleted because it could not be read.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Problem, VramplanError
from ..planner.evidence import Evidence, Residual

if TYPE_CHECKING:
    from .measurement import Measurement  # whose import takes longer than a plan's whole search

SCHEMA = 1
BUSY_SECONDS = 30.0
ENVIRONMENT = "VRAMPLAN_LEDGER"

_CREATE = """
create table if not exists measurements (
    id text primary key, time text not null, device text not null, architecture text not null,
    workload text not null, mode text not null, configuration text not null, outcome text not null,
    residual real, expected_bytes integer not null, measurement text not null
)
"""
_COLUMNS = (
    "id, time, device, architecture, workload, mode, configuration, outcome, residual, expected_bytes, measurement"
)

OnNote = Callable[[str], None]


def default_path() -> Path:
    """Where the ledger is unless somebody says otherwise: ``$VRAMPLAN_LEDGER``, or the user's data directory."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return Path(given).expanduser()
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
        if self.path.exists():
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
                    f"insert or ignore into measurements ({_COLUMNS}) values ({', '.join('?' * 11)})",
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
        """Those whose id begins with ``identifier``, of ``outcome``; oldest first."""
        from .measurement import Measurement

        clauses, values = _where({"id glob": None if identifier is None else f"{identifier}*", "outcome =": outcome})
        for (text,) in self._rows(f"select measurement from measurements{clauses} order by time, rowid", values):
            yield Measurement.read(text, str(self.path))

    def evidence(self, architecture: str) -> Evidence:
        """The residuals of one architecture, of each configuration the worst."""
        rows = self._rows(
            "select workload, mode, max(residual), expected_bytes from measurements "
            "where architecture = ? and residual is not null group by workload, mode, configuration",
            (architecture,),
        )
        return Evidence(tuple(Residual(*row) for row in rows))

    def __len__(self) -> int:
        return next((int(n) for (n,) in self._rows("select count(*) from measurements")), 0)

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        if self._connection is None:
            return []
        with self._usable() as connection:
            return connection.execute(query, values).fetchall()

    # ---------------------------------------------------------------- the file

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connect()
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None
        except sqlite3.DatabaseError as error:
            self._set_aside("damaged", f"is damaged ({error})")
        except _NewerSchemaError as error:
            self._set_aside(
                f"schema-{error}", f"was written by a newer vramplan (schema {error}, this one has {SCHEMA})"
            )
        except OSError as error:
            raise self._unusable(error) from None

    def _connect(self) -> None:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS)
        try:
            (schema,) = connection.execute("pragma user_version").fetchone()
            if schema > SCHEMA:
                raise _NewerSchemaError(str(schema))
            (sound,) = connection.execute("pragma quick_check(1)").fetchone()
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
            if schema < SCHEMA:
                connection.execute("pragma journal_mode = wal")
                with connection:
                    connection.execute(_CREATE)
                    connection.execute(f"pragma user_version = {SCHEMA}")
            connection.execute("pragma synchronous = normal")
            connection.execute(f"select {_COLUMNS} from measurements limit 1")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _set_aside(self, word: str, why: str) -> None:
        """Rename the file (with its log) and begin a new one."""
        names = (f"{self.path.name}.{word}{f'-{n}' if n else ''}" for n in itertools.count())
        aside = next(p for p in map(self.path.with_name, names) if not p.exists())
        try:
            self.path.replace(aside)
            for suffix in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + suffix).replace(aside.with_name(aside.name + suffix))
            self._on_note(f"The ledger {self.path} {why}. It is kept as {aside}; a new one is begun.")
            self._connect()
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    @contextlib.contextmanager
    def _usable(self) -> Iterator[sqlite3.Connection]:
        """The connection; what goes wrong with it becomes one message."""
        if self._connection is None:
            raise VramplanError(f"the ledger {self.path} is closed")
        try:
            yield self._connection
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> VramplanError:
        return VramplanError(f"the ledger {self.path} cannot be used ({error}); name another with --ledger FILE")


class _NewerSchemaError(Exception):
    """The file's schema number is beyond ours."""


def _row(m: Measurement) -> tuple[object, ...]:
    residual = m.residual
    expected = m.expected_allocated_bytes if m.architecture == "cpu" else m.expected_process_bytes
    return (
        m.id, m.when, m.device, m.architecture, m.step.workload, m.mode, m.configuration, m.outcome, residual,
        expected, m.model_dump_json(),
    )  # fmt: skip


def _where(conditions: dict[str, str | None]) -> tuple[str, list[str]]:
    given = {clause: value for clause, value in conditions.items() if value is not None}
    text = " and ".join(f"{clause} ?" for clause in given)
    return (f" where {text}" if text else ""), list(given.values())


def iso_date(text: str, field: str) -> str:
    """``2026-11-21`` or a whole time stamp, as the ledger's times are compared. Raises ConfigError."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(Problem(field, text, "is not a date", "write it as 2026-11-21")) from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC).isoformat(timespec="seconds")
