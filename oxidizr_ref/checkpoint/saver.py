"""Handing checkpoints to the store: at once, or in the background while training goes on.

In the background the bytes are the same: what is written is a copy, made between two steps. (From a device it is a copy
anyway, and the next step does not wait for it.) One save is under way at a time; the next one waits for it, and none is ever
skipped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.checkpoint.format import HostArray
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.errors import SaveError
from oxidizr_ref.transfers import HostCopies


@dataclass(frozen=True)
class Save:
    """How the save of a step ended: with a file, or (``error``) without; and how long it took."""

    step: int
    path: Path
    seconds: float
    error: SaveError | None = None


class Saver:
    """Saves into ``store``. Ask `finished` for what became of it."""

    def __init__(self, store: CheckpointStore, background: bool = False) -> None:
        self._store, self._background = store, background
        self._copies: dict[str, HostArray] = {}
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._finished: list[Save | BaseException] = []

    def save(self, step: int, tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> None:
        """Save, or begin to: then what ``tensors`` are copies of may be changed as soon as this returns."""
        self._join()
        if not self._background:
            self._write(step, tensors, metadata)
            return
        private = isinstance(tensors, HostCopies) and tensors.private
        copies, frozen = tensors if private else self._copy(tensors), dict(metadata)
        self._thread = threading.Thread(
            target=self._write_in_background, args=(step, copies, frozen), name=f"save-{step}", daemon=False
        )
        self._thread.start()

    def finished(self, wait: bool = False) -> list[Save]:
        """The saves that ended since the last call, in order; with ``wait``, the one under way as well.

        What is not the disk's fault (determinism that broke) is raised.
        """
        if wait:
            self._join()
        ended, self._finished = self._finished, []
        for save in ended:
            if isinstance(save, BaseException):
                raise save
        return [save for save in ended if isinstance(save, Save)]

    def _join(self) -> None:
        if self._thread is not None:
            self._hurry.set()
            self._thread.join()
            self._hurry.clear()
            self._thread = None

    def _copy(self, tensors: Mapping[str, HostArray]) -> dict[str, HostArray]:
        """A copy between two steps, into the memory of the copy before it."""
        names = sorted(tensors)
        for name in names:
            if name not in self._copies:
                self._copies[name] = np.empty(tensors[name].shape, dtype=tensors[name].dtype)
        parallel.for_each(len(names), lambda index: np.copyto(self._copies[names[index]], tensors[names[index]]))
        return self._copies

    def _write_in_background(self, step: int, tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> None:
        with parallel.unhurried(self._hurry):
            try:
                self._write(step, tensors, metadata)
            except BaseException as error:  # raised where somebody hears it, by `finished`
                self._finished.append(error)

    def _write(self, step: int, tensors: Mapping[str, HostArray], metadata: Mapping[str, str]) -> None:
        began, error = time.perf_counter(), None
        if isinstance(tensors, HostCopies):
            tensors.wait()
        try:
            self._store.save(step, tensors, metadata)
        except SaveError as refused:
            error = refused
        self._finished.append(Save(step, self._store.path(step), time.perf_counter() - began, error))
