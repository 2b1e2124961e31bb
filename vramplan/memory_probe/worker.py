"""The child's side of a probe: run the steps that a request file asks for, and write what happened to a report file.

    python -m vramplan.memory_probe.worker REQUEST.json REPORT.jsonl

Reports are JSON objects, a line each: ``doing`` what comes next, then ``measured`` with the figures or ``failed`` with
the error's types and text. Whatever ends this process, it takes nobody with it: see :mod:`child`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

TEXT_LIMIT = 100_000
"""Characters of an error's text that are reported."""


class Report:
    """Appends to the report file; every line is there as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Write one line."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")
        self._file.flush()

    def doing(self, what: str) -> None:
        """Say what comes next."""
        self.write("doing", doing=what)


def main(argv: list[str] | None = None) -> int:
    """Run the request of ``argv``; 0 when it was measured, 1 when it failed."""
    asked, told = map(Path, argv if argv is not None else sys.argv[1:3])
    _go_with_the_parent(asked, told)
    report = Report(told)
    try:
        request = json.loads(asked.read_text(encoding="utf-8"))
        report.doing("loading torch")
        report.write("measured", **measure(request, report))
    except BaseException as error:
        types = [kind.__name__ for kind in type(error).__mro__]
        report.write("failed", types=types, text=str(error)[:TEXT_LIMIT])
        if not isinstance(error, Exception):
            raise
        return 1
    return 0


def measure(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """The figures of one configuration, as :class:`~vramplan.memory_probe.measurement.Measurement` names them."""
    from ..planner.shape import Shape
    from ..planner.step import StepConfig

    shape, step = Shape(**request["shape"]), StepConfig(**request["step"])
    warnings.simplefilter("ignore")  # torch's and inductor's own; nobody reads them here
    import torch

    if step.device == "cuda":
        return _on_card(shape, step, request, report, torch)
    if request["host_bytes"] is not None:
        _limit_data(request["host_bytes"])
    return _on_cpu(shape, step, request, report, torch)


def _on_card(shape: Any, step: Any, request: dict[str, Any], report: Report, torch: Any) -> dict[str, Any]:
    from .card import measure_card

    device = torch.device("cuda", torch.cuda.current_device())
    found = measure_card(
        shape, step, device, steps=request["steps"], cap_bytes=request["cap_bytes"], everything=request["everything"],
        seconds=request["timed_seconds"], doing=report.doing,
    )  # fmt: skip
    if found.error:
        report.write("partly", allocated_bytes=found.allocated_bytes, reserved_bytes=found.reserved_bytes)
        raise torch.OutOfMemoryError(found.error)
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "method": "allocator statistics", "device": torch.cuda.get_device_name(device),
        "architecture": f"{major}.{minor}", "total_bytes": torch.cuda.get_device_properties(device).total_memory,
        "torch": torch.__version__, "allocated_bytes": found.allocated_bytes, "reserved_bytes": found.reserved_bytes,
        "context_bytes": found.context_bytes, "process_bytes": found.process_bytes, "retries": found.retries,
        "phase_peaks": found.phase_peaks, **_timing(found),
    }  # fmt: skip


def _on_cpu(shape: Any, step: Any, request: dict[str, Any], report: Report, torch: Any) -> dict[str, Any]:
    from .card import measure_card
    from .cpu import measure_cpu_step, random_batches, trainer

    if step.compile:
        from .cpu_events import allocator_peak

        def begin() -> Any:
            train = trainer(shape, step)
            train.allocate()
            train(random_batches(shape, step), 1e-3)
            return lambda: train(random_batches(shape, step), 1e-3)

        report.doing("compiling, and watching the allocator over two steps")
        counted: dict[str, Any] = {"method": "allocator events", "allocated_bytes": allocator_peak(begin)}
    else:
        report.doing("counting the tensors of three steps")
        metered = measure_cpu_step((shape, step), resume=request["everything"])
        peaks = metered.phase_peaks
        in_step = {k: v for k, v in peaks.items() if k not in ("evaluation", "checkpoint save", "resume")}
        counted = {
            "method": "tensors counted", "allocated_bytes": max(in_step.values()),
            "phase_peaks": peaks if request["everything"] else in_step,
        }  # fmt: skip
    timed = measure_card(
        shape, step, torch.device("cpu"), steps=request["steps"], seconds=request["timed_seconds"], doing=report.doing
    )
    if timed.error:
        raise MemoryError(timed.error)
    return {
        "device": _cpu_name(), "architecture": "cpu", "torch": torch.__version__, "process_bytes": _most_resident(),
        **counted, **_timing(timed),
    }  # fmt: skip


def _timing(found: Any) -> dict[str, Any]:
    return {
        "step_seconds": list(found.seconds), "tokens_per_second": found.tokens_per_second, "loss": found.loss,
        "reference_ratio": found.reference_ratio,
        "first_step_seconds": found.first_step_seconds, "first_step_peak_bytes": found.first_step_peak_bytes,
    }  # fmt: skip


def _cpu_name() -> str:
    import platform

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _most_resident() -> int | None:
    """Largest resident memory of this process so far."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _limit_data(host_bytes: int) -> None:
    """Let this process's private memory grow to ``host_bytes`` in all; beyond it allocations fail (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import resource

    sizes = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if ":" in line
    )
    resident, data = (int(sizes[name].split()[0]) * 1024 for name in ("VmRSS", "VmData"))
    limit = data + max(0, host_bytes - resident)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _go_with_the_parent(*files: Path) -> None:
    """When standard input ends, the parent is gone: remove the files it cannot any more, with their folder, and end
    this process and what it started."""

    def wait() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 1024):
                pass
        with contextlib.suppress(OSError):
            for file in files:
                file.unlink(missing_ok=True)
            for folder in {file.parent for file in files}:
                folder.rmdir()
        if hasattr(os, "killpg"):
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # taking a loaded torch apart takes a while and says nothing
