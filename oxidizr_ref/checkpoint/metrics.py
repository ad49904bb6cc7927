"""metrics.jsonl: one JSON object a logged step, which a resumed run continues as if it had never stopped."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oxidizr_ref.checkpoint import disk


class MetricsLog:
    """The metrics of one checkpoint directory. All methods raise OSError when the disk refuses.

    A line that could not be written is kept, and written with the next one. One thread may log while another one flushes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: Held-out losses by step, of the lines in the file: what `keep_best` goes by.
        self.eval_losses: dict[int, float] = {}
        self._pending: list[str] = []
        self._size: int | None = None  # of the file after the last whole append
        self._doubtful = False  # whether a flush failed: what is on the disk is then unknown, for ever
        self._one_writer = threading.Lock()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with self._one_writer:
            self._note(record)
            self._pending.append(line)
            self._write_pending()

    def flush(self) -> None:
        """Bring all lines so far to the disk."""
        with self._one_writer:
            self._write_pending()
            if self._doubtful and disk.exists(self.path):
                # A new file, because flushing the old one again proves nothing.
                disk.replace(self.path, disk.read(self.path))
                self._doubtful = False
                return
        if disk.exists(self.path):
            self._doubtful = True
            disk.flush_with_name(self.path)
            self._doubtful = False

    def _write_pending(self) -> None:
        if self._pending:
            if self._size is None:
                self._size = disk.file_size(self.path)
            self._size = disk.append(self.path, "".join(self._pending).encode(), self._size)
            self._pending.clear()

    def _note(self, record: Mapping[str, Any]) -> None:
        loss = record.get("eval_loss")
        if isinstance(loss, float):
            self.eval_losses[record["step"]] = loss

    def cut(self, step: int, beyond: Path | None) -> None:
        """Keep the lines up to ``step``; put the later ones into the file ``beyond``, or drop them without one.

        Half a line, left by a kill or a power cut, is dropped. A line marked ``final`` says how a run ended, and goes when
        the run goes on. A file that needs no cut is not touched.
        """
        self.eval_losses.clear()
        self._size = None
        if not disk.exists(self.path):
            return
        kept: list[bytes] = []
        later: list[bytes] = []
        text = disk.read(self.path)
        for line in text.splitlines(keepends=True):
            try:
                record = json.loads(line)
                past = record["step"] > step or bool(record.get("final"))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            (later if past else kept).append(line if line.endswith(b"\n") else line + b"\n")
            if not past:
                self._note(record)
        if later and beyond is not None:
            disk.replace(beyond, b"".join(later))
        if b"".join(kept) != text:
            disk.replace(self.path, b"".join(kept))
