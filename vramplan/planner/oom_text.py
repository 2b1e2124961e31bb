"""An out-of-memory text read: what ran out, with which figures, why, and at which moment.

Nothing is derived or invented: a figure is what the text says, or None. Of several failures the last one counts, unless
it only followed from one of memory: then that does, and the answer says so. Where a run went on after an out-of-memory
error that somebody caught, and then died of something else, that something else is the answer.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .oom_cause import Cause, judge, own_process
from .oom_events import line_at, lowered, memory_events, other_failures
from .oom_fields import ABSURD_BYTES, Figures, Process
from .oom_report import Event, Other, framework_of
from .oom_trace import Moment, Trace, trace_before

TextKind = Literal["cuda_oom", "hip_oom", "host_oom", "not_memory"]

_FIELDS = (
    "requested_bytes", "total_bytes", "free_bytes", "process_bytes", "allocated_bytes", "reserved_bytes",
    "reserved_unallocated_bytes", "private_pool_bytes", "limit_bytes", "gpu_index",
)  # fmt: skip

_PROGRESS = re.compile(
    r"(?i)\b(?:iter(?:ation)?|step|epoch|batch)\b\D{0,12}\d[^\n]{0,100}?\bloss\b\W{0,4}\d|['\"]loss['\"]: ?\d"
)
"""A line of a run that goes on. (A progress bar is drawn once more when a run has died.)"""

_RAISED = re.compile(r"^(?:[\w.]{1,80}\.)?(\w{0,60}(?:Error|Exception|Interrupt|Failure))\b(?::|$)")
_CONSEQUENCE = re.compile(
    r"(?i)ChildFailed|ProcessExited|ProcessRaised|NCCL|Broken ?Pipe|ConnectionReset|EOFError|Engine ?core|DistBackend|"
    r"CalledProcess|SystemExit|watchdog|waited for others|wandb|BrokenProcessPool"
)
_ADVICE = re.compile(
    r"If reserved (?:memory is >> allocated|but unallocated memory is large)|max_split_size_mb|ALLOC_CONF"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OomText:
    """What a text says about a failure. Sizes in bytes, None where it does not say.

    ``sentence`` says what it is, ``reason`` why that cause; ``line`` is the telling line; ``buffer`` the name of a
    compiled graph's buffer; ``moment`` the phase that the traceback shows, ``operation`` its last telling
    name; ``notes`` are sentences about the text.
    """

    kind: TextKind
    cause: Cause
    sentence: str
    reason: str
    line: str = ""
    figures: Figures = Figures()  # noqa: RUF009 - frozen
    processes: tuple[Process, ...] = ()
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    buffer: str | None = None
    moment: Moment | None = None
    operation: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_memory(self) -> bool:
        """Whether memory of torch's card or of the host ran out."""
        return self.kind != "not_memory"

    @property
    def reserved_bytes(self) -> int | None:
        """What torch's allocator held in all; of a torch before 1.4 what it called cached, which was the idle part."""
        found = self.figures.reserved_bytes
        return self.figures.cached_bytes if found is None else found

    def as_dict(self) -> dict[str, Any]:
        """The fields of ``explain --json`` that come from the text alone; a size that is nonsense is none."""
        return {
            "kind": self.kind,
            "cause": self.cause,
            **{name: _sane(getattr(self.figures, name)) for name in _FIELDS},
            "reserved_bytes": _sane(self.reserved_bytes),
            "shape": None if self.shape is None else list(self.shape),
            "dtype": self.dtype,
            "processes": [process.as_dict() for process in self.processes],
            "sentence": self.sentence,
            "reason": self.reason,
            "line": self.line or None,
            "buffer": self.buffer,
            "moment": self.moment,
            "notes": list(self.notes),
        }


def _sane(n_bytes: int | None) -> int | None:
    """None for a size that no machine has: it is not one."""
    return n_bytes if n_bytes is not None and 0 <= n_bytes < ABSURD_BYTES else None


def read_oom(text: str) -> OomText:
    """Read a pasted traceback or a log of any length."""
    text = _cleaned(text)
    events = memory_events(text)
    if not events:
        return _not_memory(text)
    event = _decisive(text, events)
    if event.weight == "killed" and (said := _stronger(text, event)) is not None:
        return _other(said, ())
    after, went_on = _afterwards(text, event)
    if went_on and after is not None and not _CONSEQUENCE.search(after.line + after.reason):
        note = f"Memory ran out earlier ({_short(event.line)}), and the run went on after it."
        return _other(after, (note,))
    return _memory(text, event, after, went_on)


def _cleaned(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\x1b" in text:
        text = re.sub(r"\x1b\[[0-9;]{0,20}[A-Za-z]", "", text)
    return html.unescape(text) if "&" in text else text


# -------------------------------------------------------------------- which failure


def _decisive(text: str, events: Sequence[Event]) -> Event:
    """The last failure; of what is said of it, what has most figures: a summary's echo may be cut off."""
    last = events[-1]
    family = [last]
    for event in reversed(events[:-1]):
        if _PROGRESS.search(text, event.end, family[-1].start):
            break
        family.append(event)
    told = [event for event in family if event.weight != "killed"]
    if not told:
        return next((event for event in family if event.limited), last)
    newest = told[0]
    if newest.weight == "figures" and not newest.warning:
        asked = newest.figures.requested_bytes
        echoes = [e for e in told if e.kind == newest.kind and asked is not None and e.figures.requested_bytes == asked]
        return max(echoes, key=lambda e: e.figures.said) if echoes else newest
    same = [e for e in told if (e.kind == "host_oom") == (newest.kind == "host_oom") and e.weight == "figures"]
    return next((e for e in same if not e.warning), same[0] if same else newest)


def _stronger(text: str, event: Event) -> Other | None:
    """Another failure that explains a kill: named before it, with nothing going on in between."""
    for other in other_failures(text):
        if other.start < event.start and not _PROGRESS.search(text, other.start, event.start):
            return other
    return None


def _afterwards(text: str, event: Event) -> tuple[Other | None, bool]:
    """What failed after the event, last, and whether the run went on before that."""
    last: Other | None = next(other_failures(text, event.end), None)
    end = len(text)
    for _ in range(4000):
        start = max(text.rfind("\n", event.end, end - 1) + 1, event.end) if end > event.end else end
        if start >= end or (last is not None and start <= last.start):
            break
        line = text[start : min(end, start + 500)].strip()
        if (found := _RAISED.match(line)) and "OutOfMemory" not in line and found[1] != "MemoryError":
            last = Other(start, f"it ended with {found[1]}", line)
            break
        end = start
    went_on = _PROGRESS.search(text, event.end, last.start if last else len(text)) is not None
    return last, went_on


# -------------------------------------------------------------------- answers


_WHAT = {
    "cuda_oom": "CUDA ran out of memory",
    "hip_oom": "ROCm (HIP) ran out of memory",
    "host_oom": "The host's memory ran out, not the card's",
}


def _memory(text: str, event: Event, after: Other | None, went_on: bool) -> OomText:
    figures = own_process(event.figures)
    judged = judge(event)
    trace = trace_before(text, event.start) if event.kind != "host_oom" or event.weight != "killed" else Trace()
    notes = [*_strange(event.figures)]
    if event.warning:
        notes.append("This line is a warning: torch's allocator gives back its cache and tries again after it.")
    if went_on:
        notes.append("The run went on after it.")
    elif after is not None:
        notes.append(f"What comes after it followed from it, or came up while it was handled: {_short(after.line)}")
    card = event.kind != "host_oom"
    return OomText(
        kind=event.kind, cause=judged.cause, sentence=f"{_WHAT[event.kind]}: {event.says}.", reason=judged.reason,
        line=_short(event.line), figures=figures, processes=figures.processes,
        shape=event.shape if event.shape is not None else trace.shape if card else None,
        dtype=event.dtype if event.dtype is not None else trace.dtype if card else None,
        buffer=trace.buffer if card else None, moment=trace.moment, operation=trace.operation, notes=tuple(notes),
    )  # fmt: skip


def _strange(figures: Figures) -> list[str]:
    """Notes on sizes that no machine has."""
    notes = []
    asked = figures.requested_bytes
    if asked is not None and _sane(asked) is None:
        notes.append(f"The text says that {asked / 2**30:.2f} GiB were asked for, which is no size.")
    if figures.process_bytes is not None and figures.process_bytes >= ABSURD_BYTES:
        notes.append("What this process is said to hold is 2**64: the driver could not tell (WSL, containers).")
    if figures.limit_bytes is not None and figures.limit_bytes >= ABSURD_BYTES:
        notes.append("The limit of 2**64 bytes is none: no memory fraction was set.")
    return notes


def _other(found: Other, notes: tuple[str, ...], head: str = "Not a memory failure") -> OomText:
    sentence = f"{head}: {found.reason}."
    return OomText(kind="not_memory", cause="unknown", sentence=sentence, reason=found.reason, line=_short(found.line),
                   notes=notes)  # fmt: skip


def _not_memory(text: str) -> OomText:
    if (elsewhere := _elsewhere(text)) is not None:
        return _other(elsewhere, (), "Not a failure of torch's memory on CUDA, ROCm or the host")
    if (failed := next(other_failures(text), None)) is not None:
        return _other(failed, ())
    for line in reversed(text[-200_000:].splitlines()):
        if found := _RAISED.match(line.strip()):
            return _other(Other(0, f"it ended with {found[1]}", line.strip()), ())
    if _ADVICE.search(text[-200_000:]):
        reason = "there is advice on the allocator here, and no failed allocation"
    else:
        reason = "nothing here says that an allocation failed" if text.strip() else "there is no text"
    return _other(Other(0, reason, ""), ())


def _elsewhere(text: str) -> Other | None:
    """Another framework's or device's memory."""
    lower = lowered(text)
    for needle in ("out of memory", "out_of_memory", "resource_exhausted", "oom when alloc", "outofmemory", "alloc"):
        at = lower.rfind(needle)
        if at < 0:
            continue
        first, last = line_at(text, at, at)
        name = framework_of(text[max(0, first - 300) : last + 300])
        if name is not None:
            return Other(first, f"{name} ran out of memory, which this program does not explain", text[first:last])
    return None


def _short(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= 300 else line[:297] + "..."
