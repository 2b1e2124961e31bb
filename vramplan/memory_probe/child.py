"""A child process that may crash, hang, print anything or eat the machine's memory: its parent goes on.

The child is the leader of a process group of its own, which is killed as a whole when it is over. It is told to go when
the parent does: its standard input is a pipe that nobody writes to and that ends with the parent. What it has to say it
writes, one JSON object a line, into a file; what it prints is read, and all but the end thrown away.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

OUTPUT_TAIL = 16 * 1024
"""Bytes of what the child printed last that are kept."""
MOST_REPORT = 4 * 2**20
"""Bytes of reports that are read; a child that writes more has gone mad."""
POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 5.0
"""How long its end, and its output, are waited for once it has been killed."""
GONE = -9
"""Return code of a child that did not even die when it was killed."""

StoppedBy = Literal["", "timeout", "host memory"]
OnReport = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may take: seconds in all, and resident host memory in bytes (on Linux; None: any)."""

    seconds: float
    host_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How a child ended. ``returncode`` is negative for a signal. ``oom_killed``: the kernel killed for want of memory
    in our control group meanwhile. ``resident_bytes`` is the most that was seen."""

    returncode: int
    stopped_by: StoppedBy
    reports: tuple[dict[str, Any], ...]
    output: str
    seconds: float
    resident_bytes: int
    oom_killed: bool


def run_child(
    argv: Sequence[str],
    request: dict[str, Any],
    limits: Limits,
    *,
    on_report: OnReport | None = None,
    env: dict[str, str] | None = None,
) -> ChildEnd:
    """Start ``argv`` with the paths of a request and a report file added, and wait until it is over.

    Returns within ``limits.seconds`` and a few more, whatever the child does. When this is interrupted the child is
    killed first.
    """
    with tempfile.TemporaryDirectory(prefix="vramplan-probe-", ignore_cleanup_errors=True) as folder:
        asked, told = Path(folder) / "request.json", Path(folder) / "report.jsonl"
        asked.write_text(json.dumps(request), encoding="utf-8")
        told.touch()
        kills, start = _oom_kills(), time.monotonic()
        process = subprocess.Popen(
            [*argv, str(asked), str(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            **_own_group(),
        )
        tail = _Tail(process.stdout)
        reports = _Reports(told, on_report)
        family = _Family(process.pid)
        try:
            stopped_by, resident = _watch(process, limits, reports, family, start)
        finally:
            _kill(process)
            family.kill()
            output = tail.finish()
        return ChildEnd(
            returncode=GONE if process.returncode is None else process.returncode,
            stopped_by=stopped_by,
            reports=reports.finish(),
            output=output,
            seconds=time.monotonic() - start,
            resident_bytes=resident,
            oom_killed=_oom_kills() > kills,
        )


def python_child(module: str) -> list[str]:
    """The command that runs a module of this package in a child, with this interpreter."""
    return [sys.executable, "-u", "-m", module]


def _own_group() -> dict[str, Any]:
    if os.name == "nt":
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


def _watch(
    process: subprocess.Popen[bytes], limits: Limits, reports: _Reports, family: _Family, start: float
) -> tuple[StoppedBy, int]:
    most = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
            return "", most
        reports.read()
        resident = family.resident_bytes()
        if limits.host_bytes is not None and resident > limits.host_bytes:
            resident = family.resident_bytes(shared_once=True)
        most = max(most, resident)
        if time.monotonic() - start > limits.seconds:
            return "timeout", most
        if limits.host_bytes is not None and resident > limits.host_bytes:
            return "host memory", most


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the child's group, and the child."""
    if os.name != "nt":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
    with contextlib.suppress(OSError):
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver that hangs may keep it from dying
        process.wait(LAST_WORDS_SECONDS)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


class _Tail:
    """Reads a pipe to its end on a thread and keeps the last of it."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        self._pipe, self._kept = pipe, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        if self._pipe is None:
            return
        with contextlib.suppress(OSError, ValueError):
            while piece := os.read(self._pipe.fileno(), 65536):
                self._kept = (self._kept + piece)[-OUTPUT_TAIL:]

    def finish(self) -> str:
        self._thread.join(LAST_WORDS_SECONDS)
        if self._pipe is not None and not self._thread.is_alive():
            self._pipe.close()
        return self._kept.decode("utf-8", "replace")


class _Reports:
    """The JSON lines of a file that another process is writing; anything else in it is passed over."""

    def __init__(self, path: Path, on_report: OnReport | None) -> None:
        self._path, self._on_report = path, on_report
        self._read_bytes, self._rest = 0, b""
        self._found: list[dict[str, Any]] = []

    def read(self) -> None:
        """Take what has been written since; nothing when the child has taken the file away."""
        if self._read_bytes >= MOST_REPORT:
            return
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                piece = file.read(MOST_REPORT - self._read_bytes)
        except OSError:
            return
        self._read_bytes += len(piece)
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(report, dict):
            self._found.append(report)
            if self._on_report is not None:
                self._on_report(report)

    def finish(self) -> tuple[dict[str, Any], ...]:
        self.read()
        self._take(self._rest)
        return tuple(self._found)


class _Family:
    """A process and its descendants, also those that have left its group, as far as /proc tells."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: dict[int, str] = {}

    def resident_bytes(self, *, shared_once: bool = False) -> int:
        """Resident memory of all; 0 where /proc does not tell. ``shared_once``: pages that forks share count once."""
        total, waiting = 0, [self._pid]
        while waiting:
            pid = waiting.pop()
            folder = PROC / str(pid)
            try:
                total += _proportional_bytes(folder) if shared_once else _resident_bytes(folder)
                self._seen[pid] = _started(folder)
                for task in (folder / "task").iterdir():
                    waiting += map(int, (task / "children").read_text(encoding="ascii").split())
            except (OSError, ValueError, IndexError, AttributeError):
                continue
        return total

    def kill(self) -> None:
        """End every descendant that was seen and is still the same process."""
        for pid, started in self._seen.items():
            with contextlib.suppress(OSError, IndexError):
                if pid != self._pid and _started(PROC / str(pid)) == started:
                    os.kill(pid, signal.SIGKILL)


def _resident_bytes(folder: Path) -> int:
    return int((folder / "statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _proportional_bytes(folder: Path) -> int:
    """What a process holds, a page that n processes share as an n-th."""
    for line in (folder / "smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return _resident_bytes(folder)


def _started(folder: Path) -> str:
    """When a process began: with its number this names it for good."""
    return (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]


def _oom_kills() -> int:
    """How often the kernel has killed in our control group for want of memory; 0 where it does not say."""
    try:
        inside = (PROC / "self" / "cgroup").read_text(encoding="utf-8").rpartition("::")[2].strip().strip("/")
        text = (CGROUPS / inside / "memory.events").read_text(encoding="ascii")
    except (OSError, ValueError):
        return 0
    counts = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    return int(counts.get("oom_kill", 0))
