"""Signals become wishes, which the trainer grants between micro-batches."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self


class Signals:
    """Inside this context SIGINT and SIGTERM ask to stop, and SIGUSR1 asks for a checkpoint.

    A second SIGINT or SIGTERM ends the process at once. Outside the main thread Python delivers no signals, and nothing is
    changed. Windows has no SIGUSR1.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name, handler in (("SIGINT", self._stop), ("SIGTERM", self._stop), ("SIGUSR1", self._save)):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.stop is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop = number

    def _save(self, *_: object) -> None:
        self.save = True
