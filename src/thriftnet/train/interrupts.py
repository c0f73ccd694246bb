"""Signals that ask a training to stop: the first one where nothing is lost, a second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """The training was stopped; the message says where, and what is kept."""


class Interrupts:
    """While it is active, the first signal is noted inside `waiting`, and raises elsewhere; a second one always raises.

    Signals that were ignored before stay ignored, as under ``nohup``.
    """

    def __init__(self) -> None:
        self.seen = False
        self.describe: Callable[[], str] = lambda: "before the training began"  # where it is, and what is kept
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note the first signal only: whoever is inside looks at ``seen``, and calls `stop`."""
        self._waiting = True
        try:
            if self.seen:  # raised where Python drops exceptions, as in a callback
                self.stop()
            yield
        finally:
            self._waiting = False

    def stop(self) -> None:
        """Raise `Interrupted`."""
        raise Interrupted(f"stopped {self.describe()}. The same command goes on from there")

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.seen = not self.seen, True
        if not first:
            self._restore()  # a third one ends the process as if nothing were here
        if not (first and self._waiting):
            self.stop()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
