"""The run's curves in TensorBoard, Weights & Biases or Trackio, beside ``metrics.jsonl``, which always has them all.

A tracker works on a thread of its own behind a bounded queue: a full disk, a slow network or a missing server can
neither stop nor delay a step. What fails is switched off, and :class:`~.events.TrackingStopped` says so once.
"""

from __future__ import annotations

import importlib
import math
import queue
import re
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ..errors import Collector, ConfigError, Problem, Stopped
from ..files import write_text
from ..runconfig import RunConfig
from .events import Evaluated, Event, OnEvent, RunStarted, SpikeSeen, StepLogged, TrackingStarted, TrackingStopped

Values = dict[str, float]

DEFAULT_PROJECT = "vramplan"
QUEUED = 10_000
"""Lines that may wait for a tracker; one that is further behind is switched off."""
FINISH_SECONDS = 30.0
"""How long the end of a run waits for what its trackers still have to send."""


class Tracker(Protocol):
    """Where curves are shown. It may raise anything and block for as long as it likes."""

    name: str

    def start(self, config: RunConfig, run_dir: Path, resume_step: int) -> str:
        """Begin, or go on after ``resume_step`` steps of an earlier session; say where the curves can be seen."""
        ...

    def log(self, step: int, values: Values) -> None:
        """Take in numbers of the state after ``step`` steps."""
        ...

    def finish(self) -> None:
        """Write or send what is left."""
        ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``. A resumed run hides what it had written beyond its checkpoint."""

    name = "tensorboard"

    def __init__(self, project: str = "") -> None:
        self._module = importlib.import_module("torch.utils.tensorboard")
        self._writer: Any = None

    def start(self, config: RunConfig, run_dir: Path, resume_step: int) -> str:
        """Open a further event file."""
        folder = run_dir / self.name
        old = any(folder.glob("events.*"))
        purge = resume_step + 1 if old else None
        self._writer = self._module.SummaryWriter(str(folder), purge_step=purge, flush_secs=10)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in config.to_toml().splitlines()), resume_step)
        return f"tensorboard --logdir {folder}"

    def log(self, step: int, values: Values) -> None:
        """Append scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, online or as WANDB_MODE says. Its id is kept in ``RUN/wandb-id``.

    The steps are a value of each line and the x axis, because W&B's own step counter cannot go back to a checkpoint.
    """

    name = "wandb"

    def __init__(self, project: str = "") -> None:
        self._module = importlib.import_module("wandb")
        self.project, self._run = project or DEFAULT_PROJECT, None
        settings = self._module.setup(settings=self._module.Settings(silent=True)).settings
        if settings.mode == "online" and not self._module.login(prompt=False, verify=False):
            remedy = "run `wandb login`, or set WANDB_MODE=offline and send it later with `wandb sync`"
            raise ConfigError(Problem("train.track", self.name, "finds no API key", remedy))

    def start(self, config: RunConfig, run_dir: Path, resume_step: int) -> str:
        """Create the run, or go on with it."""
        run: Any = self._module.init(
            project=self.project,
            name=run_dir.resolve().name,
            id=_kept_id(run_dir / f"{self.name}-id"),
            resume="allow",
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            settings=self._module.Settings(silent=True, console="off"),
        )
        run.define_metric("*", step_metric="step")
        self._run = run
        return str(run.url or f"wandb sync {Path(run.dir).parent}")

    def log(self, step: int, values: Values) -> None:
        """Hand a line to W&B's own process."""
        self._run.log({"step": step, **values})  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()  # type: ignore[attr-defined]


class Trackio:
    """A run in Trackio's local database, or where TRACKIO_SPACE_ID says. Its name is kept in ``RUN/trackio-id``."""

    name = "trackio"

    def __init__(self, project: str = "") -> None:
        self._module = importlib.import_module("trackio")
        self.project, self._run = project or DEFAULT_PROJECT, None

    def start(self, config: RunConfig, run_dir: Path, resume_step: int) -> str:
        """Create the run, or go on with it."""
        self._run = self._module.init(
            project=self.project,
            name=f"{run_dir.resolve().name}-{_kept_id(run_dir / f'{self.name}-id')}",
            resume="allow",
            config=config.model_dump(mode="json"),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return f"trackio show --project {self.project}"

    def log(self, step: int, values: Values) -> None:
        """Hand a line to Trackio's own thread."""
        self._run.log(values, step=step)  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Wait until everything is stored."""
        self._run.finish()  # type: ignore[attr-defined]


_KINDS: dict[str, type[TensorBoard] | type[Wandb] | type[Trackio]] = {
    kind.name: kind for kind in (TensorBoard, Wandb, Trackio)
}


def build_trackers(track: Iterable[str]) -> list[Tracker]:
    """The trackers of ``[train] track``; imports their packages, and no other's.

    Raises ConfigError with every one that cannot be used here.
    """
    collect, trackers = Collector(), list[Tracker]()
    for entry in track:
        name, _, project = entry.partition(":")
        with collect:
            try:
                trackers.append(_KINDS[name](project))
            except ConfigError:
                raise
            except Exception as error:
                rule = f"cannot be used ({_words(error)})"
                remedy = f'pip install "vramplan[{name}]", or go without it'
                raise ConfigError(Problem("train.track", entry, rule, remedy)) from None
    collect.finish()
    return trackers


class Tracking:
    """An ``on_event`` that passes every event on and gives its numbers to trackers. A context manager: leaving ends it.

    Trackers begin with the first numbers of a run, so a start that fails leaves nothing of theirs behind.
    """

    def __init__(self, trackers: Sequence[Tracker], config: RunConfig, on_event: OnEvent) -> None:
        self._on_event, self._config = on_event, config
        self._waiting, self._workers = list(trackers), list[_Worker]()
        self._run_dir, self._resume_step = Path(), 0

    def __call__(self, event: Event) -> None:
        """Pass ``event`` on; never blocks."""
        self._on_event(event)
        if isinstance(event, RunStarted):
            self._run_dir, self._resume_step = event.run_dir, event.start_step
        step, values = _numbers(event)
        if values:
            while self._waiting:
                self._workers.append(_Worker(self._waiting.pop(0), self._config, self._run_dir, self._resume_step))
            for worker in self._workers:
                worker.put((step, values))
        self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        at_once = isinstance(error, Stopped | KeyboardInterrupt)
        deadline = time.monotonic() + (1.0 if at_once else FINISH_SECONDS)
        for worker in self._workers:
            worker.put(None)
        self._tell()
        for worker in self._workers:
            worker.finish(deadline)
        self._tell()

    def _tell(self) -> None:
        """Report what happened on the trackers' threads, from this one."""
        for worker in self._workers:
            for event in worker.news():
                self._on_event(event)


class _Worker:
    """One tracker on its thread. Everything but :meth:`_work` belongs to the thread that trains."""

    def __init__(self, tracker: Tracker, config: RunConfig, run_dir: Path, resume_step: int) -> None:
        self.name, self._failed = tracker.name, False
        self._lines: queue.Queue[tuple[int, Values] | None] = queue.Queue(QUEUED)
        self._news: queue.SimpleQueue[Event] = queue.SimpleQueue()
        arguments = (tracker, config, run_dir, resume_step)
        self._thread = threading.Thread(target=self._work, args=arguments, name=self.name, daemon=True)
        self._thread.start()

    def _work(self, tracker: Tracker, config: RunConfig, run_dir: Path, resume_step: int) -> None:
        try:
            where = tracker.start(config, run_dir, resume_step)
            self._news.put(TrackingStarted(tracker=self.name, where=where))
            while (line := self._lines.get()) is not None:
                tracker.log(*line)
            tracker.finish()
        except BaseException as error:
            self._news.put(TrackingStopped(tracker=self.name, reason=_words(error)))

    def put(self, line: tuple[int, Values] | None) -> None:
        """Give it a line, or None to end; a tracker with too many lines before it is given up."""
        if self._failed:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._news.put(TrackingStopped(tracker=self.name, reason=f"it is {QUEUED:,} lines behind"))

    def finish(self, deadline: float) -> None:
        """Wait until it has ended, but not beyond ``deadline`` (monotonic seconds)."""
        if not self._failed:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                reason = "it was still busy when the run was over; its last lines may be missing"
                self._news.put(TrackingStopped(tracker=self.name, reason=reason))

    def news(self) -> Iterable[Event]:
        """What happened since it was last asked; nothing more once it has failed."""
        while not self._failed and not self._news.empty():
            event = self._news.get()
            self._failed = isinstance(event, TrackingStopped)
            yield event


def _numbers(event: Event) -> tuple[int, Values]:
    """The step of an event and what is drawn of it; no values for most events."""
    named: dict[str, float | None] = {}
    step = 0
    if isinstance(event, StepLogged):
        step = event.step
        named = {f"train/{name}": getattr(event, name) for name in ("loss", "learning_rate", "grad_norm", "epoch")}
        named |= {f"speed/{name}": getattr(event, name) for name in ("tokens_per_second", "step_seconds", "mfu")}
        for name in ("allocated", "reserved"):
            held = getattr(event, f"peak_{name}_bytes")
            named[f"memory/peak_{name}_gib"] = None if held is None else held / 2**30
        named |= {"memory/alloc_retries": event.alloc_retries, "train/tokens": event.tokens}
    elif isinstance(event, Evaluated):
        step, named = event.step, {"validation/loss": event.val_loss, "validation/perplexity": event.perplexity}
    elif isinstance(event, SpikeSeen):
        step, named = event.step, {f"spike/{event.what}": event.value}
    return step, {name: float(v) for name, v in named.items() if v is not None and math.isfinite(v)}


def _kept_id(path: Path) -> str:
    """The name by which a service knows this run, made at its first session."""
    try:
        kept = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        kept = ""
    if not re.fullmatch(r"[0-9a-f]{8,32}", kept):
        kept = uuid.uuid4().hex[:12]
        write_text(path, kept + "\n", "train.track")
    return kept


def _words(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
