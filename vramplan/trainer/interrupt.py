"""Ctrl-C, SIGTERM and SIGHUP as a request instead of an exception: a run stops at the next safe point."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Windows has no SIGHUP, which elsewhere says that the terminal was closed."""


ONE_STOP_SECONDS = 1.0
"""Signals closer together than this are one wish: a closing terminal or a service manager sends several at once."""


class StopAtOnce(BaseException):
    """A second signal. No ``except Exception`` on its way may hold it up."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignal:
    """While active, the first signal sets ``number``; a second one raises StopAtOnce wherever the program is.

    A second one is somebody's impatience: not what comes within ONE_STOP_SECONDS of the first, and never SIGHUP.
    The handlers that were there before come back on leaving. A signal that was ignored stays ignored (``nohup``).
    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
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
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        elif signal.Signals(number).name != "SIGHUP" and time.monotonic() - self._since > ONE_STOP_SECONDS:
            raise StopAtOnce(number)

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
