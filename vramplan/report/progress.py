"""The trainer's events as lines and a progress bar."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..errors import command
from ..planner.plan import FAR_FROM_TARGET
from ..runconfig import RunConfig
from ..trainer import events
from ..units import count, duration, gib
from .console import PatientConsole, printable


class TrainingView:
    """Callable for ``on_event``. On a terminal a bar runs below the lines; elsewhere only lines are printed.

    When the terminal or the reader of the output goes away, it falls silent and the run goes on. ``card_bytes`` is what
    the card has, for a run whose plan does not say how much it may take.
    """

    def __init__(
        self, config: RunConfig, *, quiet: bool = False, to_stderr: bool = False, card_bytes: int | None = None
    ) -> None:
        self.config, self.quiet = config, quiet
        self.most_bytes = config.plan.budget_bytes or config.plan.total_bytes or card_bytes
        self._since: tuple[int, float] | None = None
        self.out = PatientConsole(stderr=to_stderr)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, event: events.Event) -> None:
        """Render one event."""
        kind = events.GuardEvent if isinstance(event, events.GuardEvent) else type(event)
        handler = getattr(self, f"_on_{kind.__name__}", None)
        if handler is not None:
            try:
                handler(event)
            except OSError:  # a terminal that was closed
                self.out.fall_silent()

    def _say(self, text: str, *, always: bool = False) -> None:
        if always or not self.quiet:
            (self._bar.console if self._bar else self.out).print(text, markup=False)

    def _warn(self, text: str, indent: str = "") -> None:
        (self._bar.console if self._bar else self.out).print(Text.assemble(indent, ("warning", "yellow"), f": {text}"))

    def _open(self, total: float, text: str, *columns: ProgressColumn) -> None:
        self._close()
        if self.out.is_terminal and not self.quiet:
            first = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._bar = Progress(*first, *columns, TextColumn("{task.fields[info]}"), console=self.out)
            self._bar.start()
            self._task = self._bar.add_task(text, total=total, info="")

    def _advance(self, done: float, info: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, info=info)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    # ---------------------------------------------------------------- data

    def _on_PreparationStarted(self, e: events.PreparationStarted) -> None:  # noqa: N802
        why = f" ({e.reason})" if e.reason else ""
        self._say(f"Tokenising {e.files} file(s), {e.rows:,} documents, {gib(e.size_bytes)}, into {e.directory}{why}")
        self._say(f"  tokenizer: {e.tokenizer_source}")
        self._open(e.rows, "tokens", TimeRemainingColumn())

    def _on_PreparationWaiting(self, e: events.PreparationWaiting) -> None:  # noqa: N802
        self._say(f"Waiting: another process is writing {e.directory}", always=True)

    def _on_PreparationProgress(self, e: events.PreparationProgress) -> None:  # noqa: N802
        self._advance(e.rows, f"{count(e.tokens)} tokens")

    def _on_Prepared(self, e: events.Prepared) -> None:  # noqa: N802
        self._close()
        verb = "Using" if e.reused else "Prepared"
        self._say(f"{verb} {e.directory}: {e.train_tokens:,} training and {e.val_tokens:,} validation tokens")
        for note in e.notes:
            self._say(f"  note: {note}")

    # ---------------------------------------------------------------- the run

    def _on_RunStarted(self, e: events.RunStarted) -> None:  # noqa: N802
        self._say(f"\nRun {e.run_dir} on {e.device}")
        self._say(f"  parameters   {e.parameters:,} ({e.parameters / 1e6:.1f}M)")
        target = self.config.plan.target_parameters
        if target and abs(e.parameters / target - 1) > FAR_FROM_TARGET:
            self._warn(f"that is far from the {count(target)} asked for", indent="  ")
        product = f"batch_size {e.batch_size} x grad_accum {e.grad_accum} x block_size {e.block_size}"
        self._say(f"  per step     {product} = {e.tokens_per_step:,} tokens")
        self._say(f"  length       {e.total_steps:,} steps = {e.token_budget:,} tokens "
                  f"({e.token_budget / e.parameters:.1f} per parameter)")  # fmt: skip
        self._say(f"  data         {e.unique_tokens:,} unique tokens: {e.epochs:.2f} epochs")
        if e.epochs > 1:
            text = f"the data is shorter than the token budget: every token is read {e.epochs:.1f} times"
            self._warn(text, indent="  ")
        peak = f"{e.peak_flops / 1e12:.1f} TFLOPS" if e.peak_flops else "unknown: MFU is n/a"
        self._say(f"  peak         {peak}")
        if e.start_step == 0:
            self._say(f"  first loss   about {e.first_loss_expected:.2f} is expected (ln of the vocabulary)")
        for note in e.notes:
            self._say(f"  note: {note}")
        self._open(e.total_steps, "training")
        self._advance(e.start_step, "")

    def _on_CheckpointSkipped(self, e: events.CheckpointSkipped) -> None:  # noqa: N802
        self._warn(f"skipped {e.path}: {e.reason}")

    def _on_Resumed(self, e: events.Resumed) -> None:  # noqa: N802
        source = e.checkpoint or "the start (no checkpoint yet)"
        self._say(f"Resumed at step {e.step:,} ({e.tokens_seen:,} tokens) from {source}")

    def _on_StepLogged(self, e: events.StepLogged) -> None:  # noqa: N802
        rate = f"{e.tokens_per_second:,.0f} tokens/s" if e.tokens_per_second else "warming up"
        used = f"MFU {e.mfu:.1%}" if e.mfu is not None else "MFU n/a"
        rest = "".join(f"  {words}" for words in (rate, used, self._memory(e), self._time_left(e)) if words)
        self._advance(e.step, f"loss {e.loss:.4f}{rest}")
        self._say(
            f"step {e.step:>6,}/{e.total_steps:,}  loss {e.loss:.4f}  lr {e.learning_rate:.2e}  "
            f"grad norm {e.grad_norm:.2f}{rest}"
        )

    def _memory(self, e: events.StepLogged) -> str:
        """What the process has reserved of what it may take, and how often the allocator had to give back and retry."""
        if e.peak_reserved_bytes is None:
            return ""
        most = f" of {gib(self.most_bytes)}" if self.most_bytes else ""
        retries = f" ({e.alloc_retries:,} allocator retries)" if e.alloc_retries else ""
        return f"memory {gib(e.peak_reserved_bytes)}{most}{retries}"

    def _time_left(self, e: events.StepLogged) -> str:
        """At the pace of this session, with evaluating and saving; nothing for its first line, which has no pace."""
        now = time.monotonic()
        first_step, start = self._since = self._since or (e.step, now)
        if e.step == first_step:
            return ""
        left = (e.total_steps - e.step) * (now - start) / (e.step - first_step)
        hours = self.config.train.max_hours
        if hours is not None and hours * 3600 - e.run_seconds < left:
            return f"{duration(max(0.0, hours * 3600 - e.run_seconds))} left of {hours:g} h"
        return f"{duration(left)} left"

    def _on_SpikeSeen(self, e: events.SpikeSeen) -> None:  # noqa: N802
        what = "the loss" if e.what == "loss" else "the gradient norm"
        self._warn(f"step {e.step:,}: {what} is {e.value:.4g}, {e.times:.3g} times its usual {e.usual:.4g}")

    def _on_TrackingStarted(self, e: events.TrackingStarted) -> None:  # noqa: N802
        self._say(f"Curves in {e.tracker}: {e.where}")

    def _on_TrackingStopped(self, e: events.TrackingStopped) -> None:  # noqa: N802
        self._warn(f"{e.tracker} is switched off: {printable(e.reason)}. metrics.jsonl has every line.")

    def _on_GuardEvent(self, e: events.GuardEvent) -> None:  # noqa: N802
        if isinstance(e, events.CompileSwitched):
            self._say(f"step {e.step:>6,}  {e.words}")
        else:
            self._warn(f"step {e.step:,}: {e.words}")

    def note(self, text: str) -> None:
        """Say something that is no event of the run."""
        self._say(f"  note: {text}", always=True)

    def _on_Evaluated(self, e: events.Evaluated) -> None:  # noqa: N802
        best = " (best)" if e.val_loss <= e.best_val_loss else f" (best {e.best_val_loss:.4f})"
        self._say(f"step {e.step:>6,}  validation loss {e.val_loss:.4f}{best}, perplexity {e.perplexity:,.1f}")

    def _on_CheckpointSaved(self, e: events.CheckpointSaved) -> None:  # noqa: N802
        self._say(f"step {e.step:>6,}  saved {e.path} ({gib(e.size_bytes)}, {duration(e.seconds)})")

    def _on_StopRequested(self, e: events.StopRequested) -> None:  # noqa: N802
        self._say(f"{e.signal_name}: finishing this step, then saving. Once more stops at once.", always=True)

    def _on_Interrupted(self, e: events.Interrupted) -> None:  # noqa: N802
        self._close()
        self._say(
            f"Stopped by {e.signal_name} after step {e.step:,} of {e.total_steps:,}; saved {e.checkpoint}.", always=True
        )
        self._say(f"Resume with: {command(*e.resume_command)}", always=True)

    def _on_HoursUsed(self, e: events.HoursUsed) -> None:  # noqa: N802
        self._close()
        loss = f", validation loss {e.val_loss:.4f}" if e.val_loss is not None else ""
        self._say(
            f"The {e.max_hours:g} h of --max-hours are over after step {e.step:,} of {e.total_steps:,}{loss}; saved "
            f"{e.checkpoint}.",
            always=True,
        )
        self._say(f"Go on with: {command(*e.resume_command)}", always=True)

    def _on_AlreadyFinished(self, e: events.AlreadyFinished) -> None:  # noqa: N802
        self._say(f"{e.run_dir} is already finished: {e.step:,} steps.", always=True)
        if self.config.train.schedule == "constant":
            longer = command("vramplan", "train", "--resume", e.run_dir, "--max-steps", 2 * e.step)
            self._say(f"Go on with: {longer}", always=True)
        else:
            self._say("Its learning rate has come down: a longer run is a new one, with more --max-steps.", always=True)

    def _on_Finished(self, e: events.Finished) -> None:  # noqa: N802
        self._close()
        losses = [
            f"{name} {value:.4f}" for name, value in (("last loss", e.last_loss), ("validation", e.val_loss)) if value
        ]
        self._say(
            f"Finished {e.step:,} steps, {e.tokens:,} tokens, in {duration(e.seconds)}: {', '.join(losses)}.",
            always=True,
        )
        sample, report = (command("vramplan", word, e.run_dir) for word in ("sample", "report"))
        self._say(f"Next: {sample}   or   {report}", always=True)
