"""The log of nanoGPT's train.py as a :class:`Record`, whatever else is in it.

    step 500: train loss 5.8600, val loss 5.8600                an evaluation after 500 steps
    iter 500: loss 5.8581, time 3839.02ms, mfu 12.70%           the next step

The time of an iteration that evaluates includes the evaluation; ``mfu`` is over an A100's 312 TFLOPS, of one process,
a moving average (0.9 old, 0.1 new) of all logged iterations from the sixth on, and -100 % before that.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from ..errors import ConfigError, Problem
from ..planner.nanogpt_config import assignments, overrides_in
from .run_record import Curve, loss_of

CHUNK_BYTES, LONGEST_LINE, LARGEST_LOG_BYTES = 2**20, 2**20, 2**30
"""Read piece by piece; a line that does not end is cut; what does not end at all is refused."""

_N = r"(-?(?:\d{1,12}(?:\.\d{0,20})?(?:[eE][+-]?\d{1,3})?|nan|inf))"
_ITERATION = re.compile(
    rf"(?<![\w.])iter[ \t]{{1,8}}(\d{{1,12}})[ \t]?:[ \t]{{0,8}}loss[ \t]{{1,4}}{_N}"
    rf"(?:[^:\n]{{0,60}}?time[ \t]{{1,4}}{_N}[ \t]?ms)?(?:[^:\n]{{0,60}}?mfu[ \t]{{1,4}}{_N}[ \t]?%)?",
    re.IGNORECASE,
)
_EVALUATION = re.compile(
    rf"(?<![\w.])step[ \t]{{1,8}}(\d{{1,12}})[ \t]?:[ \t]{{0,8}}train loss[ \t]{{1,4}}{_N}[^:\n]{{0,60}}?"
    rf"val loss[ \t]{{1,4}}{_N}",
    re.IGNORECASE,
)
_PARAMETERS = re.compile(r"number of parameters: (\d{1,9}(?:\.\d{1,9})?)M")
_TOKENS = re.compile(r"(?:tokens per iteration will be|total number of tokens per iteration): ?([\d,]{1,20})")
_VOCABULARY = re.compile(r"(?:found vocab_size = |defaulting to vocab_size of GPT-2 to )(\d{1,9})")
_ECHO = re.compile(r"Overriding config with (\S.{0,500}):")
_HEAD = re.compile(r"Overriding|tokens per iteration|found vocab_size|Initializing|Resuming|number of parameters")
_ANSI = re.compile(r"\x1b\[[0-9;:?]{0,30}[@-~]|\x1b[@-Z\\-_]")
_HEADS = ("parameters", "Overriding", "per iteration", "vocab_size", "Initializing", "Resuming")
_TELLING = ("loss", *_HEADS)
SHORTEST_MS, LONGEST_MS, LARGEST_MFU = 1e-3, 1e9, 1e3
"""Of an iteration, and in percent: what is beyond is not a measurement."""
_MOST_ASSIGNMENTS = 200


class NanoGPTLog:
    """What the lines of a log say. Later lines of a step win; a log that goes back drops what it had beyond.

    ``times`` are (milliseconds, printed MFU or None) of iterations. ``stated`` is the configuration that the log
    repeats, ``scratch`` whether the weights were new. ``returns`` are (step that was reached, step it went back to).
    """

    def __init__(self) -> None:
        self.losses: dict[int, float | None] = {}
        self.evaluations: dict[int, tuple[float | None, float | None]] = {}
        self.times: dict[int, tuple[float, float | None]] = {}
        self.first_of_process: set[int] = set()
        self.stated: dict[str, Any] = {}
        self.parameters: int | None = None
        self.tokens_per_step: int | None = None
        self.vocab_size: int | None = None
        self.scratch: bool | None = None
        self.returns: list[tuple[int, int]] = []
        self.cut_off = False
        self._new_process, self._data_since_head = True, False
        self._echo: list[str] | None = None
        self._decimals = {_ITERATION: 4, _EVALUATION: 4}

    @property
    def empty(self) -> bool:
        """Whether not one loss was found."""
        return not (self.losses or self.evaluations)

    @property
    def steps_done(self) -> int:
        """The last step that is mentioned: nanoGPT counts from 0, so that evaluation N comes after N steps."""
        return max(_last(self.losses), _last(self.evaluations), 0)

    def curve(self, which: int) -> Curve:
        """Training (0) or validation (1) losses of the evaluations."""
        return tuple((step, self.evaluations[step][which]) for step in sorted(self.evaluations))

    def see(self, line: str, *, ended: bool = True) -> None:
        """Take in one line; ``ended`` says that nothing of it is missing."""
        if self._echo is None and not any(word in line for word in _TELLING):
            return
        if "\x1b" in line:
            line = _ANSI.sub("", line)
        if self._echo is not None or any(word in line for word in _HEADS):
            self._see_head(line)
        found = False
        for pattern, word in ((_EVALUATION, "tep"), (_ITERATION, "ter")):
            if word not in line:
                continue
            for match in pattern.finditer(line):
                found = True
                if ended or self._whole(pattern, match):
                    self._decimals[pattern] = _decimals(match[2])
                    self._evaluated(match) if pattern is _EVALUATION else self._iterated(match)
                else:
                    self.cut_off = True
        self._data_since_head |= found

    def _whole(self, pattern: re.Pattern[str], match: re.Match[str]) -> bool:
        """Whether the last number of a log that just stops has as many digits as those before it."""
        if match.end() < len(match.string) or match.string[-1] in "%s":
            return True
        return _decimals(match[3] if pattern is _EVALUATION else match[2]) >= self._decimals[pattern]

    # ---------------------------------------------------------------- losses

    def _evaluated(self, match: re.Match[str]) -> None:
        step, values = int(match[1]), (loss_of(float(match[2])), loss_of(float(match[3])))
        if self.evaluations.get(step) == values:
            return  # printed twice, or repeated by a logger
        if step <= _last(self.evaluations) or step < _last(self.losses):
            self._go_back(step, step)
        self.evaluations[step] = values

    def _iterated(self, match: re.Match[str]) -> None:
        step, loss = int(match[1]), loss_of(float(match[2]))
        if step in self.losses and self.losses[step] == loss:
            return
        if step <= _last(self.losses):
            self._go_back(step, step + 1)
        self.losses[step] = loss
        if match[3] and SHORTEST_MS <= float(match[3]) < LONGEST_MS:
            printed = float(match[4]) if match[4] else -1.0
            self.times[step] = float(match[3]), printed if 0 <= printed < LARGEST_MFU else None
        self.first_of_process.discard(step)
        if self._new_process:
            self.first_of_process.add(step)
        self._new_process = False

    def _go_back(self, step: int, evaluation: int) -> None:
        """A process began again at ``step``: what came later belongs to weights that are lost."""
        self.returns.append((self.steps_done, step))
        self._new_process = True
        _drop(self.losses, step)
        _drop(self.times, step)
        _drop(self.evaluations, evaluation)

    # ---------------------------------------------------------------- what it says of itself

    def _see_head(self, line: str) -> None:
        head = _HEAD.search(line) is not None
        if head and self._data_since_head:
            self._data_since_head, self._new_process = False, True
            self.stated, self._echo = {}, None
        if self._echo is not None:
            self._repeat(line, over=head)
        if not head and "number" not in line and "vocab" not in line and "tokens per" not in line:
            return
        if _ECHO.search(line):
            self._echo = []
        self.stated |= overrides_in(line[:2000])
        if found := _PARAMETERS.search(line):
            self.parameters = round(float(found[1]) * 1e6)
        if (found := _TOKENS.search(line)) and (digits := found[1].replace(",", "")):
            self.tokens_per_step = int(digits) or None
        if found := _VOCABULARY.search(line):
            self.vocab_size = int(found[1]) or None
        if "Initializing a new model from scratch" in line:
            self.scratch = True
        elif "Resuming training from" in line or "Initializing from OpenAI GPT-2 weights" in line:
            self.scratch = False

    def _repeat(self, line: str, *, over: bool) -> None:
        """nanoGPT prints the configuration file that it executes; what it assigns is read line by line."""
        if over or len(self._echo or ()) > _MOST_ASSIGNMENTS:
            self._echo = None
            return
        if self._echo is not None and "=" in line:
            self._echo.append(line[:500])
            try:
                found = assignments("\n".join(self._echo), "the log")
            except ConfigError:
                self._echo.pop()
                return
            self.stated |= found


def read_log(file: BinaryIO, name: str) -> NanoGPTLog:
    """Everything a log says. Raises ConfigError when it holds no loss, has no end, or cannot be read."""
    log = NanoGPTLog()
    try:
        for line, ended in _lines(file, name):
            log.see(line, ended=ended)
    except OSError as error:
        raise ConfigError(Problem("log", name, f"cannot be read ({error.strerror or error})")) from None
    if log.empty:
        remedy = "name a run directory, or the log of nanoGPT's train.py"
        raise ConfigError(Problem("log", name, "has no line such as `iter 10: loss 9.8` or `step 0: ...`", remedy))
    return log


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[str, bool]]:
    """(line, whether it ended) of a file in UTF-8, or in UTF-16 where its first bytes say so (PowerShell's ``>``)."""
    first = file.read(CHUNK_BYTES)
    wide = first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8-sig")(errors="replace")
    rest, size, chunk = "", 0, first
    while chunk:
        size += len(chunk)
        if size > LARGEST_LOG_BYTES:
            raise ConfigError(Problem("log", name, f"is longer than {LARGEST_LOG_BYTES:,} bytes", "cut it"))
        *lines, rest = re.split(r"[\r\n]", rest + decoder.decode(chunk))
        for line in lines:
            yield line, True
        if len(rest) > LONGEST_LINE:
            yield rest, True
            rest = ""
        chunk = file.read(CHUNK_BYTES)
    rest += decoder.decode(b"", final=True)
    yield rest, False


def _last(table: dict[int, Any]) -> int:
    """The last step of a table whose steps ascend; -1 for an empty one."""
    return next(reversed(table), -1)


def _drop(table: dict[int, Any], step: int) -> None:
    """Remove ``step`` and what is beyond it."""
    while _last(table) >= step:
        table.popitem()


def _decimals(number: str) -> int:
    """Digits after the point; a number without one (nan) is always whole."""
    return len(number.partition(".")[2]) if "." in number else 4 if number[-1].isalpha() else 0
