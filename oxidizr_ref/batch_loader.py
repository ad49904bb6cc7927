"""Batches one after the other, read ahead by a thread if asked."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from oxidizr_ref.data import Batch, Windows

_CLOSE_SECONDS = 0.5  # a read that hangs on a dead disk must not keep the program from ending


class BatchLoader:
    """Iterates over ``windows.batch`` from ``cursor`` on, without end; with ``prefetch`` > 0 a thread reads ahead.

    What is seen is the same for every ``prefetch``. ``cursor`` counts the windows handed out, not those read ahead. An
    error met while reading ahead is raised when its batch is asked for. Close it, or use it in a ``with`` statement.
    """

    def __init__(self, windows: Windows, cursor: int, batch_size: int, prefetch: int = 0) -> None:
        if batch_size < 1 or prefetch < 0:
            raise ValueError(f"batch_size {batch_size} must be at least 1 and prefetch {prefetch} at least 0")
        self.cursor = cursor
        self._windows = windows
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._ready: deque[Batch | BaseException] = deque()
        self._changed = threading.Condition()  # guards _ready and _closed
        self._closed = False
        self._thread = threading.Thread(target=self._read_ahead, args=(cursor,), name="prefetch", daemon=True)
        if prefetch:
            self._thread.start()

    def _read_ahead(self, cursor: int) -> None:
        while True:
            item: Batch | BaseException
            try:
                item = self._windows.batch(cursor, self._batch_size)
            except BaseException as error:  # whatever it is, it belongs to the consumer
                item = error
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._prefetch)
                if self._closed:
                    return
                self._ready.append(item)
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
            cursor += self._batch_size

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready or not self._prefetch)
            if self._closed:
                raise RuntimeError("this BatchLoader is closed")
            item = self._ready[0] if self._prefetch else self._windows.batch(self.cursor, self._batch_size)
            if isinstance(item, BaseException):
                raise item  # it stays in front: asking again gets it again, as without prefetch
            if self._prefetch:
                self._ready.popleft()
                self._changed.notify_all()
            self.cursor += self._batch_size
            return item

    def close(self) -> None:
        """Stop reading ahead and drop what was read; may be called again. A full queue does not hold it up."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._prefetch:
            self._thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
