"""Children that hang, die, scream, fork or eat memory: the parent returns in bounded time with the right class."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from vramplan.memory_probe import child as module
from vramplan.memory_probe.child import OUTPUT_TAIL, ChildEnd, Limits, run_child
from vramplan.memory_probe.outcome import ending
from vramplan.units import MIB

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

PRELUDE = """
import json, os, signal, subprocess, sys, time
request = json.load(open(sys.argv[1]))
def tell(**report):
    with open(sys.argv[2], "a") as f:
        f.write(json.dumps(report) + "\\n")
"""


USUAL = Limits(20.0)


def run(body: str, limits: Limits = USUAL, **options: Any) -> ChildEnd:
    return run_child([sys.executable, "-c", PRELUDE + textwrap.dedent(body)], {"n": 7}, limits, **options)


def gone(pid: int) -> bool:
    """Whether a process is no more (a zombie that nobody has waited for counts as gone)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_what_it_reports_arrives_in_order_and_as_it_happens() -> None:
    seen: list[Any] = []
    end = run(
        "tell(kind='doing', doing='a'); time.sleep(0.3); tell(kind='measured', n=request['n'])", on_report=seen.append
    )
    assert (end.returncode, end.stopped_by) == (0, "")
    assert [r["kind"] for r in end.reports] == ["doing", "measured"]
    assert seen[0] == {"kind": "doing", "doing": "a"}
    assert end.reports[1]["n"] == 7
    assert ending(end).outcome == "fits"


def test_a_child_that_hangs_is_ended_in_time() -> None:
    start = time.monotonic()
    end = run("tell(kind='doing', doing='step 2'); time.sleep(600)", Limits(1.0))
    assert time.monotonic() - start < 10
    assert end.stopped_by == "timeout"
    assert (ending(end).outcome, "step 2" in ending(end).reason) == ("timed_out", True)


def test_a_child_that_ignores_signals_is_ended_all_the_same() -> None:
    end = run("[signal.signal(s, signal.SIG_IGN) for s in (signal.SIGTERM, signal.SIGINT)]; time.sleep(600)", Limits(1))
    assert end.stopped_by == "timeout"


@linux_only
def test_nothing_it_started_is_left(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    end = run(
        f"""
        p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(note)!r}, "w").write(str(p.pid))
        tell(kind="measured")
        """
    )
    assert end.returncode == 0
    time.sleep(0.2)
    assert gone(int(note.read_text()))


@linux_only
def test_what_left_its_group_is_ended_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    end = run(
        f"""
        p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        open({str(note)!r}, "w").write(str(p.pid))
        time.sleep(0.5)
        tell(kind="measured")
        """
    )
    assert end.returncode == 0
    assert end.seconds < 4
    time.sleep(0.2)
    assert gone(int(note.read_text()))


@linux_only
def test_pages_that_forks_share_count_once() -> None:
    end = run(
        """
        held = bytearray(os.urandom(1 << 20)) * 200
        for _ in range(6):
            if not os.fork():
                time.sleep(600)
        time.sleep(1.5)
        """,
        Limits(20.0, 500 * MIB),
    )
    assert (end.stopped_by, end.returncode) == ("", 0)


@linux_only
def test_it_goes_when_its_parent_is_killed(tmp_path: Path) -> None:
    """A parent that is killed cannot clean up: the real worker notices that its standard input has ended."""
    note = tmp_path / "pid"
    worker = PRELUDE + textwrap.dedent(
        f"""
        from pathlib import Path
        from vramplan.memory_probe.worker import _go_with_the_parent
        files = [Path(name) for name in sys.argv[-2:]]
        _go_with_the_parent(*files)
        open({str(note)!r}, "w").write(f"{{os.getpid()}} {{files[0].parent}}")
        time.sleep(600)
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", "import sys; from vramplan.memory_probe.child import *;"
         "run_child([sys.executable, '-c', sys.argv[1]], {}, Limits(600))", worker]
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid, folder = note.read_text().split()
    assert not gone(int(pid))
    assert Path(folder).is_dir()
    parent.kill()
    parent.wait()
    while not gone(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(int(pid))
    assert not Path(folder).exists()


def test_floods_of_garbage_neither_block_nor_fill_the_memory() -> None:
    end = run(
        r"""
        for _ in range(300):
            os.write(1, b"\xff\x00garbage\n" * 20000)
        os.write(2, b"the end")
        with open(sys.argv[2], "ab") as f:
            f.write(b"\x80not json\n[1, 2]\n{\"kind\": \n")
        tell(kind="measured", allocated_bytes="many")
        """
    )
    assert (end.returncode, [r["kind"] for r in end.reports]) == (0, ["measured"])
    assert len(end.output) <= OUTPUT_TAIL
    assert end.output.endswith("the end")


def test_a_report_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_REPORT", 10_000)
    end = run("[tell(kind='doing', doing=str(i)) for i in range(2000)]")
    assert 0 < len(end.reports) < 500


@linux_only
def test_a_child_that_eats_host_memory_is_ended_before_the_machine_suffers() -> None:
    end = run("held = [bytearray(16 << 20) for _ in range(400) if not time.sleep(0.02)]", Limits(60, 300 * MIB))
    assert end.stopped_by == "host memory"
    assert 300 * MIB < end.resident_bytes < 3000 * MIB
    assert ending(end).outcome == "out_of_memory"


@linux_only
def test_a_real_limit_of_the_system_is_an_out_of_memory() -> None:
    end = run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
        try:
            bytearray(1 << 30)
        except MemoryError as error:
            tell(kind="failed", types=[k.__name__ for k in type(error).__mro__], text=str(error))
            raise SystemExit(1)
        """
    )
    assert ending(end).outcome == "out_of_memory"


@pytest.mark.parametrize(
    ("body", "outcome", "word"),
    [
        ("tell(kind='doing', doing='step 3'); os.kill(os.getpid(), signal.SIGKILL)", "killed", "step 3"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "killed", "SIGTERM"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "not_memory", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGABRT)", "not_memory", "SIGABRT"),
        ("sys.exit(3)", "not_memory", "code 3"),
        ("pass", "not_memory", "no result"),
        ("print('oh dear'); sys.exit(1)", "not_memory", "oh dear"),
        ("import no_such_module_at_all", "not_memory", "not installed"),
        ("print(\"terminate called after throwing 'std::bad_alloc'\", flush=True); os.abort()", "out_of_memory", "bad"),
        ("print('nothing')\nraise SystemExit(0)", "not_memory", "nothing"),
        ("os.kill(os.getpid(), signal.SIGHUP)", "killed", "SIGHUP"),
        ("print('retrying after CUDA out of memory', flush=True); os.kill(os.getpid(), 11)", "not_memory", "SIGSEGV"),
        ("print(\"No module named 'triton'\\nstd::bad_alloc\", flush=True); os.abort()", "out_of_memory", "bad_alloc"),
    ],
)
def test_every_way_to_die_has_its_class(body: str, outcome: str, word: str) -> None:
    found = ending(run(body))
    assert (found.outcome, word in found.reason) == (outcome, True), found


def test_the_kernels_kill_for_want_of_memory_is_told_from_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([4, 5])
    monkeypatch.setattr(module, "_oom_kills", lambda: next(counts))
    found = ending(run("os.kill(os.getpid(), signal.SIGKILL)"))
    assert (found.outcome, "kernel" in found.reason) == ("out_of_memory", True)


@linux_only
def test_the_counter_of_the_control_group_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/a/b\n")
    (tmp_path / "groups" / "a" / "b").mkdir(parents=True)
    (tmp_path / "groups" / "a" / "b" / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    monkeypatch.setattr(module, "PROC", tmp_path / "proc")
    monkeypatch.setattr(module, "CGROUPS", tmp_path / "groups")
    assert module._oom_kills() == 2
    monkeypatch.setattr(module, "CGROUPS", tmp_path / "nowhere")
    assert module._oom_kills() == 0


def test_ctrl_c_takes_the_child_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"

    def interrupt(report: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            f"open({str(note)!r}, 'w').write(str(os.getpid())); tell(kind='doing', doing='x'); time.sleep(600)",
            on_report=interrupt,
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), signal.SIGCONT if os.name != "nt" else 0)
