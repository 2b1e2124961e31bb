"""The training loop: steps, metrics, checkpoints and evaluations in an order that loses nothing.

After each step come, in this order: the metrics line, the checkpoint if one is due, the evaluation if one is due. A run
that dies in an evaluation has therefore already been saved. Nothing is printed: typed events say what happens.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, Problem, VramplanError
from ..runconfig import RunConfig
from .checkpoint import (
    Checkpoint,
    CheckpointFolder,
    all_finite,
    fitting,
    plain_state_dict,
    rng_state,
    set_rng_state,
)
from .endings import explained, saved
from .events import (
    EVALUATION,
    TRAINING,
    AlreadyFinished,
    CheckpointSaved,
    Finished,
    GuardEvent,
    HoursUsed,
    Interrupted,
    MicroBatchReduced,
    OnEvent,
    Resumed,
    StopRequested,
    ignore,
)
from .guard import Guard, SpillCheck
from .interrupt import StopSignal
from .memory_errors import out_of_memory
from .model import GPT
from .opening import opening
from .optimizer import build_optimizer
from .phase_peaks import PhasePeaks
from .recorder import Recorder
from .rehearsal import rehearse
from .resuming import TrainResult, finished_before, newest_of_run
from .rundir import RunDirectory, describe_session, session_notes
from .schedule import schedule_of
from .shards import ShardSet
from .split import Split
from .step import StepResult, TrainStep


class _StopEvaluation(BaseException):  # control flow, never seen outside this module
    """A signal arrived during an evaluation, whose half result is of no use."""


def train(
    config: RunConfig,
    shards: ShardSet,
    run_dir: str | Path,
    *,
    device: torch.device,
    on_event: OnEvent = ignore,
    resume: bool = False,
    grow: bool = False,
    peak_flops: float | None = None,
    spilled: SpillCheck | None = None,
) -> TrainResult:
    """Train until ``config.total_steps``, or until SIGINT, SIGTERM or SIGHUP: then the step is finished and saved.
    So it is when ``max_hours`` are over.

    When memory runs out in a step or an evaluation it is done again in smaller micro-batches (:mod:`.guard`); ``grow``
    tells a resumed run to go back to those of its configuration. ``spilled`` looks for memory that went to the host.

    ``peak_flops`` is the device's dense FLOP/s at this dtype, for MFU. With ``resume`` the newest good checkpoint is
    continued: same data order and learning rates, and on a CPU, eager, with the same number of threads the same bits.
    The steps may then be split differently into micro-batches (see :data:`~vramplan.trainer.rundir.SPLIT`).
    Compiled on several CPU threads even two uninterrupted runs differ in their last digits: 20 gave 4 different curves
    (torch 2.13, 2 threads), but one curve under ``torch.use_deterministic_algorithms(True)`` or on a single thread.

    Raises DataError for a run directory that cannot be used, other data or another configuration on resume; ConfigError
    for a vocabulary smaller than the data's; VramplanError when loss or weights are no longer finite, memory runs out
    or a file cannot be written; Stopped on a second signal.
    """
    needed, given = shards.manifest.n_vocab, config.model.vocab_size
    if given < needed:
        raise ConfigError(Problem("model.vocab_size", given, "is smaller than the data's", f"use at least {needed}"))
    run = RunDirectory(run_dir)
    folder = CheckpointFolder(run.checkpoints, config.train.keep_checkpoints)
    with explained(run, folder, config), StopSignal() as stop, run.claimed(config, resume=resume):
        found = newest_of_run(folder, config, on_event)
        finished = finished_before(config, run, found[1]) if found else None
        if finished:
            on_event(AlreadyFinished(run_dir=run.path, step=finished.step, best_val_loss=finished.best_val_loss))
            return finished
        trainer = _Trainer(config, shards, run, folder, device, on_event, peak_flops, spilled, stop)
        if resume:
            trainer.restore(found, grow=grow)
        del found  # three times the weights: not to be kept through the run
        return trainer.run()


class _Trainer:
    """One session of a run."""

    def __init__(
        self,
        config: RunConfig,
        shards: ShardSet,
        run: RunDirectory,
        folder: CheckpointFolder,
        device: torch.device,
        on_event: OnEvent,
        peak_flops: float | None,
        spilled: SpillCheck | None,
        stop: StopSignal,
    ) -> None:
        self.config, self.shards, self.dir, self.folder = config, shards, run, folder
        self.device, self.emit, self.peak_flops, self.stop = device, on_event, peak_flops, stop
        t, step, block_size = config.train, config.step_config, config.model.block_size
        self.total_steps, self.learning_rate = config.total_steps, schedule_of(config)
        self.stream = shards.train_stream(block_size, t.seed)
        self.evaluation = shards.evaluation(block_size, config.step.batch_size, t.eval_batches)
        torch.manual_seed(t.seed)
        self.model = GPT(config.shape, step, seed=t.seed).to(device)
        self.optimizer = build_optimizer(
            self.model,
            step,
            learning_rate=t.learning_rate,
            weight_decay=t.weight_decay,
            betas=(t.beta1, t.beta2),
        )
        self.train_step = TrainStep(self.model, self.optimizer, step, grad_clip=t.grad_clip, device=device)
        self.guard = Guard(config.shape, self.train_step, device, self._guarded, enabled=t.guard, spilled=spilled)
        self.splits: list[tuple[int, Split]] = []
        self.compile_at = t.compile_after
        self.best_saved: tuple[float, int] | None = None
        self.peaks = PhasePeaks.of(device)
        self.train_step.on_phase = self.peaks.enter
        self.recorder = Recorder(config, run.metrics, self.peaks, peak_flops, on_event)
        self.step = 0
        self.saved_step: int | None = None
        self._stop_announced = False

    @property
    def tokens_seen(self) -> int:
        return self.step * self.config.tokens_per_step

    def restore(self, found: tuple[Path, Checkpoint] | None, *, grow: bool) -> None:
        """Continue from a checkpoint; from the very beginning when the run never reached its first one."""
        path, checkpoint = found or (None, None)
        if path is not None and checkpoint is not None:
            with fitting(path):
                self.stream.load_state_dict(checkpoint.data)
                self.model.load_state_dict(checkpoint.model)
                self.optimizer.load_state_dict(checkpoint.optimizer)
                self.train_step.load_scaler_state(checkpoint.scaler)
                set_rng_state(checkpoint.rng)
            self.step = self.saved_step = checkpoint.step
        elif lost := self.recorder.last_checkpoint():
            rule = f"holds no checkpoint, but {lost} was saved"
            remedy = "bring it back, or start a new run in another directory"
            raise DataError(Problem("run_dir", str(self.folder.directory), rule, remedy))
        if not grow:
            self.splits = self.dir.splits(self.config)
        dropped = self.recorder.restore(self.step, checkpoint, self.evaluation.blocks)
        self.best_saved = self.dir.best_saved(self.evaluation.blocks)
        self.emit(Resumed(checkpoint=path, step=self.step, tokens_seen=self.tokens_seen, dropped_lines=dropped))

    def run(self) -> TrainResult:
        """Train to the end, or to a signal."""
        self.train_step.allocate()
        if self.saved_step is None:
            rehearse(self.train_step, self.folder)
        session = describe_session(self.config, self.device, self.shards, self.step, self.evaluation.blocks)
        notes = session_notes(self.dir.sessions(), session)
        self.dir.add_session(session | {"splits": self._splits_as_json()})
        self._use_split()
        self.emit(
            opening(
                self.config,
                self.shards,
                self.stream,
                self.guard.split,
                run_dir=self.dir.path,
                device=self.device,
                start_step=self.step,
                evaluation_blocks=self.evaluation.blocks,
                parameters=self.model.parameter_count(),
                peak_flops=self.peak_flops,
                notes=notes,
            )
        )
        start = time.perf_counter()
        with self.recorder:
            try:
                self._evaluate_if_due()
                while self.step < self.total_steps and not self.stop.requested and not self.recorder.hours_used:
                    self._compile_if_due()
                    self._use_split()
                    self._one_step()
                    if self._checkpoint_due():
                        self._save()
                    self._evaluate_if_due()
                if self.step < self.total_steps and not self.stop.requested:
                    return self._out_of_hours()
            except _StopEvaluation:
                pass  # handled below, like a signal that arrives during a step
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error):
                    self._save_what_there_is()
                raise
            if self.step < self.total_steps or self.recorder.evaluated_step != self.step:
                return self._interrupted()
        self._announce_finish(time.perf_counter() - start)
        return self._result()

    def _one_step(self) -> None:
        rate = self.learning_rate(self.step)
        position = self.stream.position

        def attempt() -> tuple[StepResult, float]:
            start = time.perf_counter()
            return self.train_step(self._micro_batches(), rate), time.perf_counter() - start

        def undo() -> None:
            self.stream.position = position

        result, seconds = self.guard.protect(self.step, TRAINING, attempt, undo)
        self.step += 1
        self._stop_unless_finite(result, rate)
        self.recorder.step_done(self.step, result, rate, seconds, self.stream.epoch)
        self.guard.after_step(self.step, self.config.tokens_per_step, seconds)

    def _compile_if_due(self) -> None:
        if self.compile_at is not None and self.step >= self.compile_at:
            self.compile_at = None
            self.guard.try_compiled(self.step)

    def _use_split(self) -> None:
        """Divide steps as memory made the interrupted session do from this step on: the same sums, the same bits."""
        split = next((split for step, split in reversed(self.splits) if step <= self.step), self.guard.split)
        if split.batch_size < self.guard.split.batch_size:
            self.guard.use(split)

    def _splits_as_json(self) -> list[list[int]]:
        return [[step, split.batch_size, split.grad_accum] for step, split in self.splits]

    def _guarded(self, event: GuardEvent) -> None:
        """What the guard did: for the next session, for the metrics, and for whoever listens."""
        split = self.guard.split
        if isinstance(event, MicroBatchReduced):
            self.splits = [*(entry for entry in self.splits if entry[0] <= event.step), (event.step, split)]
            self.dir.amend_session(splits=self._splits_as_json())
        self.recorder.guarded(event.step, event.words, split.batch_size, split.grad_accum)
        self.emit(event)

    def _micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        split = self.guard.split
        for _ in range(split.grad_accum):
            self._announce_stop()
            tokens, targets = self.stream.batch(split.batch_size)
            if self.device.type == "cuda":  # pinned, so that the copy does not wait for the GPU's queue
                tokens, targets = tokens.pin_memory(), targets.pin_memory()
            yield tokens, targets
        self._announce_stop()

    def _announce_stop(self) -> None:
        """Report a signal soon after it came. Not from its handler, which may interrupt a line being printed."""
        if self.stop.requested and not self._stop_announced:
            self._stop_announced = True
            self.emit(StopRequested(signal_name=self.stop.name))

    def _checkpoint_due(self) -> bool:
        last = self.step >= self.total_steps or self.recorder.hours_used
        return last or self.step % self.config.train.checkpoint_interval == 0

    def _save(self) -> Path:
        start = time.perf_counter()
        self.peaks.enter("checkpoint save")
        if not all_finite(self.model):
            self._fail(f"the weights are no longer numbers after step {self.step}")
        path = self.folder.save(
            Checkpoint(
                step=self.step,
                tokens_seen=self.tokens_seen,
                model=plain_state_dict(self.model),
                optimizer=self.optimizer.state_dict(),
                scaler=self.train_step.scaler_state(),
                data=self.stream.state_dict(),
                rng=rng_state(),
                config_toml=self.config.to_toml(),
                last_loss=self.recorder.last_loss,
                best_val_loss=self.recorder.best_val_loss,
            ),
            best_step=self.best_saved[1] if self.best_saved else None,
        )
        self.saved_step = self.step
        seconds = time.perf_counter() - start
        self.recorder.saved(self.step, path.name)
        self.emit(CheckpointSaved(path=path, step=self.step, size_bytes=path.stat().st_size, seconds=seconds))
        return path

    def _save_what_there_is(self) -> None:
        """A step for which memory did not suffice has changed nothing, unless it updates weights in its backward."""
        if self.step in (0, self.saved_step) or self.config.step.optimizer == "adamw-in-backward":
            return
        with contextlib.suppress(VramplanError, RuntimeError, MemoryError):
            self._save()

    def _evaluate_if_due(self) -> None:
        """Evaluate at every ``eval_interval``, at step 0 and at the end, once. Step 0 shows early that it fits."""
        due = self.step % self.config.train.eval_interval == 0 or self.step >= self.total_steps
        due = due or (self.recorder.hours_used and self.saved_step == self.step)
        if not due or self.recorder.evaluated_step == self.step:
            return
        start = time.perf_counter()
        self.peaks.enter(EVALUATION)
        loss = self.guard.protect(
            self.step, EVALUATION, lambda: self.train_step.evaluate(self._evaluation_batches()), lambda: None
        )
        if not math.isfinite(loss):
            self._fail(f"the validation loss is {loss} after step {self.step}")
        self.recorder.evaluated(self.step, loss, self.evaluation.blocks, time.perf_counter() - start)
        if self.saved_step == self.step and (self.best_saved is None or loss < self.best_saved[0]):
            self.best_saved = loss, self.step

    def _evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.evaluation.in_batches_of(self.guard.split.batch_size):
            if self.stop.requested:
                raise _StopEvaluation
            yield batch

    def _stop_unless_finite(self, result: StepResult, rate: float) -> None:
        # With float16 an infinite norm is ordinary: the scaler skips that step and lowers its scale.
        dtype = self.config.step.dtype
        if not math.isfinite(result.loss):
            what = f"loss is {result.loss}"
        elif not math.isfinite(result.grad_norm) and dtype != "float16":
            what = f"gradient norm is {result.grad_norm}"
        else:
            return
        self._fail(f"the {what} at step {self.step} (learning rate {rate:.3g}, {dtype})")

    def _fail(self, reason: str) -> None:
        self.recorder.stopped(self.step, reason)
        remedy = "Start a new run with a lower learning_rate or a longer warm-up."
        raise VramplanError(f"{reason}. {saved(self.folder)} {remedy}")

    def _interrupted(self) -> TrainResult:
        self._announce_stop()
        newest = self.folder.paths()[0] if self.saved_step == self.step else self._save()
        number = self.stop.number or 0
        self.emit(
            Interrupted(
                run_dir=self.dir.path,
                checkpoint=newest,
                step=self.step,
                total_steps=self.total_steps,
                signal_name=self.stop.name,
                signal_number=number,
            )
        )
        return self._result(interrupted=True, signal_number=number)

    def _out_of_hours(self) -> TrainResult:
        """Save and evaluate: ``max_hours`` are over, and the run can be resumed with more."""
        newest = self.folder.paths()[0] if self.saved_step == self.step else self._save()
        self._evaluate_if_due()
        self.emit(
            HoursUsed(
                run_dir=self.dir.path,
                checkpoint=newest,
                step=self.step,
                total_steps=self.total_steps,
                max_hours=self.config.train.max_hours or 0.0,
                val_loss=self.recorder.val_loss,
            )
        )
        return self._result()

    def _announce_finish(self, seconds: float) -> None:
        self.emit(
            Finished(
                run_dir=self.dir.path,
                step=self.step,
                tokens=self.tokens_seen,
                last_loss=self.recorder.last_loss,
                val_loss=self.recorder.val_loss,
                best_val_loss=self.recorder.best_val_loss,
                seconds=seconds,
            )
        )

    def _result(self, *, interrupted: bool = False, signal_number: int | None = None) -> TrainResult:
        return TrainResult(
            run_dir=self.dir.path,
            step=self.step,
            total_steps=self.total_steps,
            tokens_seen=self.tokens_seen,
            last_loss=self.recorder.last_loss,
            best_val_loss=self.recorder.best_val_loss,
            interrupted=interrupted,
            signal_number=signal_number,
        )
