"""What is known about a run while it goes on: throughput, MFU, memory, losses; each as an event and a metrics line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import perf_counter as clock
from types import TracebackType
from typing import Any, Self

from ..runconfig import RunConfig
from .checkpoint import Checkpoint
from .events import Evaluated, OnEvent, SpikeSeen, StepLogged
from .metrics import Line, MetricsLog, drop_after, read_metrics
from .phase_peaks import PhasePeaks
from .step import StepResult
from .watch import Spike, SpikeWatch


class Recorder:
    """Turns finished steps and evaluations into ``metrics.jsonl`` and events. A context manager around the file.

    Throughput covers what it is told of: the seconds of training steps, so neither evaluations nor checkpoints. Every
    line has ``run_seconds``, and they say how long the sessions before have worked.
    """

    def __init__(
        self, config: RunConfig, path: Path, peaks: PhasePeaks, peak_flops: float | None, on_event: OnEvent
    ) -> None:
        self.config, self.path, self.peaks = config, path, peaks
        self._peaks_written: dict[str, int] = {}
        self.peak_flops, self.emit = peak_flops, on_event
        self.last_loss: float | None = None
        self.val_loss: float | None = None
        self.best_val_loss: float | None = None
        self.evaluated_step: int | None = None
        self._watches = SpikeWatch("loss"), SpikeWatch("grad_norm")
        self._warm = False
        self._steps, self._seconds = 0, 0.0
        self._before, self._since = 0.0, clock()
        self._log: MetricsLog | None = None

    def __enter__(self) -> Self:
        self._log = MetricsLog(self.path)
        self._since = clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.__exit__(kind, error, trace)
            self._log = None

    @property
    def run_seconds(self) -> float:
        """Seconds of training, evaluating and saving in all sessions of the run, without the time between them.

        A session that was killed counts up to its last line, also with the steps that were lost with it.
        """
        return self._before + clock() - self._since

    @property
    def hours_used(self) -> bool:
        """Whether the run has worked for ``max_hours``."""
        most = self.config.train.max_hours
        return most is not None and self.run_seconds >= most * 3600

    def restore(self, step: int, checkpoint: Checkpoint | None, blocks: int) -> int:
        """Go back to ``step``: drop the lines beyond it (returns how many) and recall the last losses.

        The best validation loss is that of the lines that evaluated as many ``blocks`` as are evaluated now; the
        checkpoint's serves where there are no lines.
        """
        self._before = max((line.get("run_seconds") or 0.0 for line in read_metrics(self.path)), default=0.0)
        dropped = drop_after(self.path, step)
        lines = read_metrics(self.path)
        evaluations = [line for line in lines if line["kind"] == "evaluation"]
        for line in evaluations:
            self.evaluated_step, self.val_loss = line["step"], line["val_loss"]
        self.last_loss = checkpoint.last_loss if checkpoint else None
        found = [line["val_loss"] for line in evaluations if line.get("blocks") in (None, blocks)]
        comparable = [loss for loss in found if loss is not None]
        kept = checkpoint.best_val_loss if checkpoint else None
        self.best_val_loss = min(comparable, default=None) if evaluations else kept
        return dropped

    def last_checkpoint(self) -> str | None:
        """The file name of the last checkpoint that was saved according to the metrics."""
        saved = [str(line["file"]) for line in read_metrics(self.path) if line["kind"] == "checkpoint"]
        return saved[-1] if saved else None

    def saved(self, step: int, file: str) -> None:
        """Record that a checkpoint was saved."""
        self._write("checkpoint", {"step": step, "file": file})

    def step_done(self, step: int, result: StepResult, learning_rate: float, seconds: float, epoch: float) -> None:
        """Count a finished step; log it when a line is due: the first, the last and every ``log_interval``-th."""
        self.last_loss = result.loss
        for watch, value in zip(self._watches, (result.loss, result.grad_norm), strict=True):
            spike = watch.see(value)
            if spike is not None:
                self._spike(step, spike)
        if self._warm:  # a process's first step compiles and fills caches: its time says nothing of the others
            self._steps += 1
            self._seconds += seconds
        self._warm = True
        total = self.config.total_steps
        if step != 1 and step != total and step % self.config.train.log_interval:
            return
        if self._steps:
            seconds = self._seconds / self._steps
        per_second = self.config.tokens_per_step / seconds if self._steps else None
        self._steps, self._seconds = 0, 0.0
        event = StepLogged(
            step=step,
            total_steps=total,
            tokens=step * self.config.tokens_per_step,
            loss=result.loss,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            tokens_per_second=per_second,
            step_seconds=seconds,
            mfu=self._mfu(per_second),
            epoch=epoch,
            run_seconds=self.run_seconds,
            **self._memory(),
        )
        line = asdict(event)
        del line["total_steps"]  # the same in every line
        self._write("step", line)
        if self.peaks.found != self._peaks_written:
            self._peaks_written = dict(self.peaks.found)
            self._write("memory", {"step": step, **self._peaks_written})
        self.emit(event)

    def evaluated(self, step: int, loss: float, blocks: int, seconds: float) -> None:
        """Record an evaluation of ``blocks`` blocks after ``step`` steps."""
        self.val_loss, self.evaluated_step = loss, step
        best = loss if self.best_val_loss is None else min(loss, self.best_val_loss)
        self.best_val_loss = best
        event = Evaluated(step=step, val_loss=loss, best_val_loss=best, blocks=blocks, seconds=seconds)
        tokens = step * self.config.tokens_per_step
        self._write("evaluation", {**asdict(event), "train_loss": self.last_loss, "tokens": tokens})
        self.emit(event)

    def guarded(self, step: int, reason: str, batch_size: int, grad_accum: int) -> None:
        """Record what was done so that the run could go on, and the split from here on."""
        values = {"step": step, "reason": reason, "batch_size": batch_size, "grad_accum": grad_accum}
        self._write("guard", values)

    def stopped(self, step: int, reason: str) -> None:
        """Record why a run cannot go on."""
        self._write("stopped", {"step": step, "reason": reason})

    def _spike(self, step: int, spike: Spike) -> None:
        event = SpikeSeen(step=step, what=spike.what, value=spike.value, usual=spike.usual, times=spike.times)
        self._write("spike", asdict(event))
        self.emit(event)

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None or self.peak_flops is None:
            return None
        return float(self.config.shape.flops_per_token * tokens_per_second / self.peak_flops)

    def _memory(self) -> dict[str, int | None]:
        """Peak allocated and reserved bytes, and allocator retries, since the process began; None on a CPU."""
        return {
            "peak_allocated_bytes": self.peaks.allocated,
            "peak_reserved_bytes": self.peaks.reserved,
            "alloc_retries": self.peaks.retries,
        }

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        if self._log is None:
            raise RuntimeError("a Recorder writes only inside its with-block")
        self._log.append(kind, values | {"run_seconds": round(self.run_seconds, 3)})


def last_evaluation(path: Path) -> Line | None:
    """The last evaluation line of a metrics file, if there is one."""
    return next((line for line in reversed(read_metrics(path)) if line["kind"] == "evaluation"), None)
