"""A ledger loses nothing: not to other writers, to a kill, to damage, nor to a line that somebody else wrote."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.errors import ConfigError, VramplanError
from vramplan.memory_probe import ledger as module
from vramplan.memory_probe.ledger import SCHEMA, Imported, Ledger, default_path, utc_text
from vramplan.memory_probe.measurement import Measurement

posix_only = pytest.mark.skipif(os.name == "nt", reason="signals and owners")


def made(**changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "id": uuid.uuid4().hex, "when": "2026-05-01T10:00:00+00:00", "version": "0.1.0", "outcome": "fits",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 64}, "step": {"batch_size": 4}, "architecture": "8.9",
        "device": "NVIDIA GeForce RTX 4070", "process_bytes": 101, "expected_process_bytes": 100,
    }  # fmt: skip
    return Measurement.model_validate(values | changes)


def filled(path: Path, n: int = 8) -> list[Measurement]:
    measurements = [made() for _ in range(n)]
    with Ledger(path) as ledger:
        assert ledger.add(measurements) == n
    return measurements


def contents(path: Path, notes: list[str]) -> list[Measurement]:
    with Ledger(path, on_note=notes.append) as ledger:
        return list(ledger.measurements())


def beside(path: Path) -> set[str]:
    """Names in the ledger's folder, without the lock and the log that two may leave who close it at once."""
    return {p.name for p in path.parent.iterdir() if not p.name.endswith((".lock", "sqlite-wal", "sqlite-shm"))}


# ------------------------------------------------------------------- what it holds


def test_without_a_file_there_is_nothing_and_nothing_is_made(tmp_path: Path) -> None:
    with Ledger(tmp_path / "none" / "ledger.sqlite") as ledger:
        assert len(ledger) == 0
        assert list(ledger.measurements()) == []
        assert ledger.evidence("8.9").residuals == ()
        assert ledger.prune(outcome="fits") == 0
        assert ledger.import_lines(["", " \n"]) == Imported(0, 0, ())
    assert list(tmp_path.iterdir()) == []


def test_measurements_come_back_as_they_were_oldest_first(tmp_path: Path) -> None:
    late, early = made(when="2026-05-02T00:30:00+02:00"), made(when="2026-05-01T22:00:00+00:00")
    with Ledger(tmp_path / "deep" / "er" / "l.sqlite") as ledger:
        assert ledger.add([late, early]) == 2
        assert ledger.add([late, made(id=early.id, reason="another")]) == 0
    with Ledger(tmp_path / "deep" / "er" / "l.sqlite") as ledger:
        assert list(ledger.measurements()) == [early, late]
        assert list(ledger.measurements(identifier=late.id[:10])) == [late]
        assert list(ledger.measurements(outcome="killed")) == []


def test_it_is_kept_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VRAMPLAN_LEDGER", str(tmp_path / "mine"))
    assert default_path() == Ledger().path == tmp_path / "mine"
    monkeypatch.setenv("VRAMPLAN_LEDGER", "~nobody-of-this-name/ledger")
    assert len(Ledger()) == 0
    monkeypatch.setenv("VRAMPLAN_LEDGER", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_path().name == "ledger.sqlite"
    assert "vramplan" in default_path().parts


def test_evidence_is_the_worst_of_each_configuration_of_one_architecture(tmp_path: Path) -> None:
    other = {"n_layer": 3, "n_head": 2, "n_embd": 64}
    with Ledger(tmp_path / "l") as ledger:
        ledger.add([made(process_bytes=n) for n in (99, 103, 101)])
        ledger.add([made(model=other, process_bytes=98), made(model=other, step={"batch_size": 4, "compile": True})])
        ledger.add([made(architecture="8.6", process_bytes=150), made(outcome="out_of_memory", process_bytes=190)])
        ledger.add([made(architecture="cpu", allocated_bytes=20, expected_allocated_bytes=10)])
        found = ledger.evidence("8.9")
        assert sorted(r.error for r in found.of("vramplan", "eager")) == pytest.approx([-0.02, 0.03])
        assert [r.error for r in found.of("vramplan", "compiled")] == pytest.approx([0.01])
        assert {r.expected_bytes for r in found.residuals} == {100}
        assert [r.error for r in ledger.evidence("cpu").residuals] == [1.0]


@pytest.mark.parametrize(
    ("limit", "expected", "residual"),
    [(110, 100, 0.1), (100, 100, 0.0), (99, 100, None), (None, 100, None)],
)
def test_running_out_counts_where_the_estimate_had_let_it_in(
    limit: int | None, expected: int, residual: float | None, tmp_path: Path
) -> None:
    ran_out = {"outcome": "out_of_memory", "process_bytes": None, "expected_process_bytes": expected}
    with Ledger(tmp_path / "l") as ledger:
        ledger.add([made(**ran_out, limit_bytes=limit)])
        found = [(r.error, r.at_least) for r in ledger.evidence("8.9").residuals]
        assert found == ([] if residual is None else [(pytest.approx(residual), True)])
        ledger.add([made(**ran_out, limit_bytes=limit, architecture="cpu")])
        assert ledger.evidence("cpu").residuals == ()


@pytest.mark.parametrize("name", ["run.toml", "notes", "data.parquet"])
@pytest.mark.parametrize("text", [b"[model]\nn_layer = 12\n", b""])
def test_a_file_that_never_was_a_ledger_stays_where_it_is(name: str, text: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text)
    with pytest.raises(VramplanError, match="nothing says that it ever was one"):
        Ledger(path)
    assert path.read_bytes() == text
    assert not list(tmp_path.glob("*.damaged*"))


@pytest.mark.parametrize("value", ["9e999", "1e300", "-2", "'abc'", "x'00'"])
def test_a_figure_that_cannot_be_is_no_evidence(value: str, tmp_path: Path) -> None:
    filled(tmp_path / "l", 3)
    with contextlib.closing(sqlite3.connect(tmp_path / "l")) as connection, connection:
        connection.execute(f"update measurements set residual = {value} where rowid = 1")
        connection.execute("update measurements set expected_bytes = 'many' where rowid = 2")
    with Ledger(tmp_path / "l") as ledger:
        assert [r.error for r in ledger.evidence("8.9").residuals] == [pytest.approx(0.01)]


def test_prune_deletes_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    old, odd, edge, new = (
        made(when="2026-05-31T23:59:59+00:00", outcome="killed"),
        made(when="2026-06-01T01:00:00+02:00"),  # an hour before midnight in UTC
        made(when="2026-06-01"),
        made(when="2026-06-02T00:00:00+00:00", outcome="killed"),
    )
    with Ledger(tmp_path / "l") as ledger:
        ledger.add([old, odd, edge, new])
        assert ledger.prune() == 0
        assert ledger.prune(before=utc_text("2026-06-01"), outcome="timed_out") == 0
        assert ledger.prune(before=utc_text("2026-06-01"), outcome="killed") == 1
        assert list(ledger.measurements()) == [odd, edge, new]
        assert ledger.prune(before=utc_text("2026-06-01T00:00:00+00:00")) == 1
        assert ledger.prune(outcome="killed") == 1
        assert list(ledger.measurements()) == [edge]


# ------------------------------------------------------------------- export and import

figures = st.floats(min_value=5e-324, allow_infinity=False, allow_nan=False)
sizes = st.integers(0, 2**63 - 1)


@given(
    st.lists(figures, min_size=1, max_size=5), st.lists(sizes, min_size=3, max_size=3),
    st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_infinity=False, allow_nan=False),
)  # fmt: skip
def test_what_is_exported_is_read_back_exactly(
    seconds: list[float], n_bytes: list[int], text: str, loss: float
) -> None:
    measured = made(
        step_seconds=tuple(seconds), tokens_per_second=seconds[0], wall_seconds=seconds[-1], loss=loss, reason=text,
        device=text, allocated_bytes=n_bytes[0], expected_process_bytes=n_bytes[1], phase_peaks={text: n_bytes[2]},
    )  # fmt: skip
    line = measured.line()
    assert (line.isascii(), "\n" in line) == (True, False)
    again = Measurement.read(line)
    assert again == measured
    assert again.residual == measured.residual
    assert again.line() == line


def test_import_is_idempotent_and_names_what_it_refuses(tmp_path: Path) -> None:
    good = [made(reason="a\u2028b\x85c\x1b[2J") for _ in range(3)]
    future = json.loads(good[0].line()) | {"id": "ab" * 16, "a_later_field": 1}
    bad: dict[int, tuple[str, str]] = {
        2: ("not json", "JSON"),
        3: ("[1, 2]", "object"),
        5: (json.dumps(json.loads(good[0].line()) | {"allocated_bytes": -1}), "allocated_bytes"),
        6: (json.dumps(json.loads(good[0].line()) | {"when": "yesterday"}), "should be a time"),
        7: (json.dumps(json.loads(good[0].line()) | {"model": {"n_layer": 2, "n_head": 3, "n_embd": 64}}), "n_head"),
        9: (good[2].line()[:-9], "JSON"),
        10: ('{"a":' * 100_000, "recursion"),
        11: (good[0].line().replace('"wall_seconds": 0.0', '"wall_seconds": 1e999'), "wall_seconds"),
    }
    lines = {1: good[0].line(), 4: good[1].line() + "\r", 8: "", 12: json.dumps(future), 13: good[0].line()}
    lines |= {number: text for number, (text, _) in bad.items()}
    with Ledger(tmp_path / "l") as ledger:
        found = ledger.import_lines(lines[n] for n in sorted(lines))
        assert (found.added, found.known) == (3, 1)
        assert [reason.partition(":")[0] for reason in found.refused] == [f"line {n}" for n in bad]
        for reason, (_, word) in zip(found.refused, bad.values(), strict=True):
            assert word in reason
        again = ledger.import_lines(lines[n] for n in sorted(lines))
        assert (again.added, again.known) == (0, 4)
        assert {m.id for m in ledger.measurements()} == {good[0].id, good[1].id, "ab" * 16}


@pytest.mark.parametrize("when", ["", "yesterday", "2026-13-01", "0001-01-01T00:00:00+14:00", "[/red]"])
def test_a_time_that_is_none_is_refused(when: str) -> None:
    with pytest.raises(ValueError, match="should be a time"):
        made(when=when)
    with pytest.raises(ConfigError, match="is not a date: write it as"):
        utc_text(when, "--before")


def test_a_row_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    kept = filled(tmp_path / "l", 5)
    with contextlib.closing(sqlite3.connect(tmp_path / "l")) as connection, connection:
        connection.execute("update measurements set measurement = '{}' where rowid = 2")
        connection.execute("update measurements set measurement = cast(x'7bff7d' as text) where rowid = 4")
        connection.execute("update measurements set measurement = null where rowid = 99")
    notes: list[str] = []
    assert contents(tmp_path / "l", notes) == [kept[i] for i in (0, 2, 4)]
    assert ["row 2" in notes[0], "row 4" in notes[1], len(notes)] == [True, True, 2]


# ------------------------------------------------------------------- several processes

WRITERS = """
import multiprocessing, sys
from test_ledger import made
from vramplan.memory_probe.ledger import Ledger

def write(barrier, paths, n, results):
    for path in paths:
        barrier.wait(60)
        notes = []
        try:
            for m in [made() for _ in range(n if path == paths[0] else 1)]:
                with Ledger(path, on_note=notes.append) as ledger:
                    ledger.add([m])
        except BaseException as error:
            notes.append(f"FAILED {error!r}")
        results.put(notes)

if __name__ == "__main__":
    n, *paths = sys.argv[1:]
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    writers = [context.Process(target=write, args=(barrier, paths, int(n), results)) for _ in range(4)]
    [w.start() for w in writers]
    for _ in range(4 * len(paths)):
        for note in results.get(timeout=90):
            print(note)
    [w.join() for w in writers]
"""


def four_writers(folder: Path, n: int, paths: list[Path]) -> str:
    """Four processes add ``n`` measurements each to the first path, then one to every other; what they were told.

    They begin with each path at the same moment.
    """
    script = folder / "writers.py"
    script.write_text(WRITERS)
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(module.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, str(script), str(n), *map(str, paths)],
        capture_output=True, text=True, check=True, timeout=100, env={**os.environ, "PYTHONPATH": here},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


def test_four_processes_write_at_once_and_make_the_file_at_the_same_moment(tmp_path: Path) -> None:
    many = tmp_path / "many" / "l.sqlite"
    once = [tmp_path / f"new{i}" / "l.sqlite" for i in range(40)]
    assert four_writers(tmp_path, 50, [many, *once]) == ""
    for path, n in [(many, 200), *((path, 4) for path in once)]:
        with Ledger(path) as ledger:
            assert len({m.id for m in ledger.measurements()}) == n
        assert beside(path) == {"l.sqlite"}


def test_four_processes_that_meet_damage_set_it_aside_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"d{i}" / "l.sqlite" for i in range(12)]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"garbage" * 1000)
    said = four_writers(tmp_path, 1, paths)
    assert (said.count("is damaged"), said.count("FAILED")) == (len(paths), 0), said
    for path in paths:
        assert beside(path) == {"l.sqlite", "l.sqlite.damaged"}
        assert len(Ledger(path)) == 4


@posix_only
def test_a_writer_that_is_killed_leaves_a_sound_ledger(tmp_path: Path) -> None:
    path, certain = tmp_path / "l.sqlite", 0
    program = """
        import sys
        from test_ledger import made
        from vramplan.memory_probe.ledger import Ledger
        while True:
            with Ledger(sys.argv[1]) as ledger:
                for _ in range(7):
                    ledger.add([made(reason="x" * 20000) for _ in range(5)])
                    print(5, flush=True)
    """
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(module.__file__).parents[2])])
    for seed in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(path)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": here},
        )  # fmt: skip
        assert writer.stdout is not None
        certain += int(writer.stdout.readline())
        time.sleep(random.Random(seed).random() / 5)
        writer.send_signal(signal.SIGKILL)
        certain += sum(map(int, writer.stdout.read().split()))
        writer.stdout.close()
        assert writer.wait() == -signal.SIGKILL
        notes: list[str] = []
        found = contents(path, notes)
        assert notes == []
        assert len(found) >= certain  # what was begun and not yet said may be there
        assert len(found) % 5 == 0
        certain = len(found)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("pragma integrity_check").fetchall() == [("ok",)]


# ------------------------------------------------------------------- damage

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut to a page": lambda data: data[:4096],
    "cut within a page": lambda data: data[: len(data) // 2 + 100],
    "cut within the header": lambda data: data[:50],
    "empty": lambda data: b"",
    "garbage at the beginning": lambda data: random.Random(1).randbytes(200) + data[200:],
    "garbage in the middle": lambda data: data[:8192] + random.Random(2).randbytes(4096) + data[12288:],
    "text": lambda data: b"n_layer = 12\n",
    "an older format number": lambda data: data[:44] + b"\0\0\0\x09" + data[48:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_set_aside_and_work_goes_on(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    filled(path, 20)
    for n, aside in enumerate([tmp_path / "l.sqlite.damaged", tmp_path / "l.sqlite.damaged-1"]):
        damaged = DAMAGE[kind](path.read_bytes())
        path.write_bytes(damaged)
        notes: list[str] = []
        with Ledger(path, on_note=notes.append) as ledger:
            assert ledger.evidence("8.9").residuals == ()
        assert aside.read_bytes() == damaged
        assert len(notes) == 1
        assert str(aside) in notes[0]
        kept = filled(path, 20)
        assert contents(path, notes) == kept
        assert len(notes) == 1
        assert len(beside(path)) == n + 2
    assert len(Ledger(path)) == 20


def test_a_newer_schema_is_set_aside_untouched(tmp_path: Path) -> None:
    path, notes = tmp_path / "l.sqlite", list[str]()
    kept = filled(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"pragma user_version = {SCHEMA + 1}")
    assert contents(path, notes) == []
    assert f"newer vramplan (schema {SCHEMA + 1}" in notes[0]
    aside = tmp_path / f"l.sqlite.schema-{SCHEMA + 1}"
    with contextlib.closing(sqlite3.connect(aside)) as connection:
        assert connection.execute("pragma user_version").fetchone() == (SCHEMA + 1,)
        connection.execute(f"pragma user_version = {SCHEMA}")
    assert contents(aside, notes) == kept
    assert len(notes) == 1


def test_the_log_of_an_empty_file_is_kept_with_it(tmp_path: Path) -> None:
    """SQLite would delete it without a word."""
    path = tmp_path / "l.sqlite"
    path.touch()
    (tmp_path / "l.sqlite-wal").write_bytes(b"all that is left")
    assert contents(path, []) == []
    assert (tmp_path / "l.sqlite.damaged-wal").read_bytes() == b"all that is left"


def test_one_whose_maker_was_killed_is_finished(tmp_path: Path) -> None:
    path, notes = tmp_path / "l.sqlite", list[str]()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma journal_mode = wal")
    assert contents(path, notes) == []
    assert (len(filled(path)), notes, beside(path)) == (8, [], {"l.sqlite"})


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_damaged_nothing_worse_than_a_message_comes_of_it(seed: int, tmp_path: Path) -> None:
    path, draw = tmp_path / "l.sqlite", random.Random(seed)
    filled(path, 30)
    data = bytearray(path.read_bytes())
    start, n = draw.randrange(len(data)), draw.randrange(1, 6000)
    if seed % 3 == 0:
        for _ in range(draw.randrange(1, 20)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif seed % 3 == 1:
        data[start : start + n] = draw.randbytes(n) if seed % 2 else bytes(n)
    else:
        del data[start:]
    path.write_bytes(data)
    notes: list[str] = []
    for use in (lambda x: x.evidence("8.9").of("vramplan", "eager"), lambda x: list(x.measurements()), len):
        with contextlib.suppress(VramplanError), Ledger(path, on_note=notes.append) as ledger:
            use(ledger)
    aside = tmp_path / "l.sqlite.damaged"
    assert (aside if aside.exists() else path).read_bytes() == bytes(data)


def test_what_is_not_a_ledger_but_sound_stays_where_it_is(tmp_path: Path) -> None:
    """A folder, or the database of another program, that somebody named by mistake."""
    with contextlib.closing(sqlite3.connect(tmp_path / "other")) as connection, connection:
        connection.execute("create table bookmarks (url)")
        connection.execute("pragma user_version = 77")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("three years of work")
    before = (tmp_path / "other").read_bytes()
    for name, words in (("other", "another program's"), ("folder", "is no file"), ("folder/..", "is no file")):
        with pytest.raises(VramplanError, match=words):
            Ledger(tmp_path / name)
    assert (tmp_path / "other").read_bytes() == before
    assert {p.name for p in tmp_path.rglob("*")} == {"other", "folder", "thesis.tex"}
    if os.name != "nt":
        with pytest.raises(VramplanError, match="is no file"):
            Ledger("/dev/null")


# ------------------------------------------------------------------- locked, and places that cannot be used


def test_a_file_that_is_locked_for_a_while_is_waited_for(tmp_path: Path) -> None:
    path, notes = tmp_path / "l.sqlite", list[str]()
    filled(path)
    holder = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    holder.execute("pragma locking_mode = exclusive")
    holder.execute("begin exclusive")
    release = threading.Timer(0.7, holder.close)
    release.start()
    with Ledger(path, on_note=notes.append) as ledger:
        ledger.add([made()])
        assert len(ledger) == 9
    release.join()
    assert (notes, beside(path)) == ([], {"l.sqlite"})


def test_a_file_that_stays_locked_is_not_taken_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.2)
    path = tmp_path / "l.sqlite"
    filled(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("begin immediate")
        with Ledger(path) as ledger:
            assert len(ledger) == 8  # readers do not wait
            with pytest.raises(VramplanError, match="database is locked"):
                ledger.add([made()])
        holder.execute("rollback")
        holder.execute("pragma locking_mode = exclusive")
        holder.execute("begin exclusive")
        with pytest.raises(VramplanError, match="locked"):
            Ledger(path)
    with filelock.FileLock(tmp_path / "new.lock"), pytest.raises(VramplanError, match=r"new\.lock"):
        Ledger(tmp_path / "new").add([made()])
    assert beside(path) == {"l.sqlite"}
    assert len(Ledger(path)) == 8


def test_places_that_cannot_be_used_are_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / ("a" * 300), tmp_path / "file" / "l.sqlite"):
        with pytest.raises(VramplanError, match=r"the ledger .* cannot be used \(.*\); name another"):
            Ledger(place).add([made()])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Without the superuser's right to read and write everything, where the tests have it."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@posix_only
def test_places_without_permission_are_one_clear_message() -> None:
    folder = Path(tempfile.mkdtemp())  # not pytest's own, whose parents nobody else may enter
    try:
        filled(folder / "l.sqlite")
        (folder / "damaged").write_bytes(b"garbage" * 1000)
        (folder / "closed").mkdir()
        filled(folder / "closed" / "l.sqlite")
        (folder / "closed").chmod(0)
        folder.chmod(0o555)
        before = {p.name for p in folder.iterdir()}
        with somebody_else():
            for name in ("l.sqlite", "damaged", "new", "closed/l.sqlite", "closed/deep/l.sqlite"):
                with pytest.raises(VramplanError, match=r"the ledger .* cannot be used \(.*\); name another"):
                    Ledger(folder / name).add([made()])
        assert {p.name for p in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)
        (folder / "closed").chmod(0o755)
        shutil.rmtree(folder)


@posix_only
def test_a_full_disk_takes_nothing_that_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    path = tmp_path / "l.sqlite"
    filled(path)
    program = """
        import resource, sys
        from test_ledger import made
        from vramplan.errors import VramplanError
        from vramplan.memory_probe.ledger import Ledger
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            with Ledger(sys.argv[1]) as ledger:
                ledger.add([made(reason="x" * 10_000) for _ in range(100)])
        except VramplanError as error:
            print(error)
    """
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(module.__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(path)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": here},
    )  # fmt: skip
    assert "cannot be used" in done.stdout
    notes: list[str] = []
    assert len(contents(path, notes)) == 8
    assert notes == []
