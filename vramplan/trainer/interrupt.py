"""Ctrl-C, SIGTERM and SIGHUP as a request instead of an exception: a run stops at the next safe point."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Windows has no SIGHUP, which elsewhere says that the terminal was closed."""


class StopAtOnce(BaseException):
    """A second signal. No ``except Exception`` on its way may hold it up."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignal:
    """While active, the first signal sets ``number``; a second one raises StopAtOnce wherever the program is.

    The handlers that were there before come back on leaving. A signal that was ignored stays ignored (``nohup``).
    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.number is not None

    @property
    def name(self) -> str:
        """``SIGINT``, ``SIGTERM``, ``SIGHUP``, or an empty string."""
        return signal.Signals(self.number).name if self.number is not None else ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise StopAtOnce(number)
        self.number = number

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
