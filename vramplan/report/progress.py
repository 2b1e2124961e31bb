"""The trainer's events as lines and a progress bar."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..errors import command
from ..planner.plan import FAR_FROM_TARGET
from ..runconfig import RunConfig
from ..trainer import events
from ..units import count, duration, gib
from .console import PatientConsole


class TrainingView:
    """Callable for ``on_event``. On a terminal a bar runs below the lines; elsewhere only lines are printed.

    When the terminal or the reader of the output goes away, it falls silent and the run goes on.
    """

    def __init__(self, config: RunConfig, *, quiet: bool = False, to_stderr: bool = False) -> None:
        self.config, self.quiet = config, quiet
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

    def _open(self, total: float, text: str) -> None:
        self._close()
        if self.out.is_terminal and not self.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[info]}"), console=self.out)
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
        self._open(e.rows, "tokens")

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
        memory = ""
        if e.peak_allocated_bytes is not None:
            planned = self.config.plan.peak_allocated_bytes
            memory = f"  {gib(e.peak_allocated_bytes)}" + (f" of {gib(planned)} planned" if planned else "")
        info = f"loss {e.loss:.4f}  {rate}  {used}{memory}"
        self._advance(e.step, info)
        self._say(
            f"step {e.step:>6,}/{e.total_steps:,}  loss {e.loss:.4f}  lr {e.learning_rate:.2e}  "
            f"grad norm {e.grad_norm:.2f}  {rate}  {used}{memory}"
        )

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

    def _on_AlreadyFinished(self, e: events.AlreadyFinished) -> None:  # noqa: N802
        self._say(
            f"{e.run_dir} is already finished: {e.step:,} steps. Raise --max-steps in a new run to go on.", always=True
        )

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
