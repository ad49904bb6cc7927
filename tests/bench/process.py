"""One contestant in a process of its own: ``python -m bench.process WHO CONFIG FILE THREADS``, run in ``tests/``.

It speaks JSON, a line each: once it is warm, what it is and its first losses; for every line ``turn`` the seconds of a step,
the median of those of a turn (`peers.py`); for ``end`` the bytes of its memory, which is the end.

FILE has the weights and tokens that all contestants share (`write_shared`). Memory is what training adds to the weights: the
peak of the steps after the warm ones, less what was resident before the first, when weights were there but no moments. What
a compiler keeps for itself is in it; what it freed is given back to the system before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from oxidizr_ref.config import Config, ModelConfig, TrainerConfig, load_config

from .contestants import CONTESTANTS, Array, Compiled, Eager

#: Steps that are not counted; one that compiles goes on until a step compiled nothing, but not for ever.
WARM_UP, MOST_WARM_UP = 3, 12
#: A turn ends with the first step after so many seconds.
TURN = 0.25
#: So many different batches there are; then they begin anew.
BATCHES = 16
#: A step of this makes libraries load and threads start before memory is counted.
REHEARSAL = Config(
    model=ModelConfig(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, vocab_size=16, max_seq_len=8),
    trainer=TrainerConfig(learning_rate=1e-3, batch_size=1),
)


# --- what all share ---------------------------------------------------------------------------------------------------


def write_shared(config: Config, path: Path) -> None:
    """Write the first weights and the random tokens of a config, and what the rehearsal needs."""
    from safetensors.numpy import save_file

    from oxidizr_ref.batch_loader import BatchLoader
    from oxidizr_ref.data import open_data
    from oxidizr_ref.model import LanguageModel

    arrays: dict[str, Array] = {}
    for prefix, part in (("model", config), ("rehearsal", REHEARSAL)):
        windows = open_data(part.model_copy(update={"data": part.data.model_copy(update={"path": ("random",)})})).windows
        loader = BatchLoader(windows, 0, part.trainer.batch_size)
        for index in range(BATCHES):
            arrays[f"{prefix}.tokens.{index}"], arrays[f"{prefix}.targets.{index}"], _ = next(loader)
        weights = LanguageModel(part.model, part.trainer.seed).state_dict()
        arrays |= {f"{prefix}.weights.{name}": array for name, array in weights.items()}
    save_file(arrays, path)


class Shared(Mapping[str, Array]):
    """The weights in the file by name, read one by one, so that no second copy of the model is ever in memory."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        with safe_open(path, framework="numpy") as file:
            keys = list(file.keys())
        self._names = [key.removeprefix(f"{prefix}.weights.") for key in keys if key.startswith(f"{prefix}.weights.")]

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._read(f"weights.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def batches(self) -> Iterator[tuple[Array, Array]]:
        """Tokens and targets, int64 ``[B,T]`` each, over and over."""
        every = [(self._read(f"tokens.{index}"), self._read(f"targets.{index}")) for index in range(BATCHES)]
        while True:
            yield from every

    def _read(self, name: str) -> Array:
        with safe_open(self._path, framework="numpy") as file:
            found: Array = file.get_tensor(f"{self._prefix}.{name}")
        return found


# --- memory -----------------------------------------------------------------------------------------------------------


def settled_bytes() -> int:
    """What is resident once all that was freed was given back to the system."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    return _status("VmRSS")


def forget_peak() -> None:
    """From now on the peak is counted anew."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`."""
    return _status("VmHWM")


def _status(key: str) -> int:
    """A line of the process's status, in bytes; 0 where the system has none: then memory is not measured."""
    if sys.platform != "linux":
        return 0
    text = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


# --- the process ------------------------------------------------------------------------------------------------------


def limit_cores(threads: int) -> None:
    """Keep to as many cores as there may be threads: XLA asks nothing else, and so nobody has more."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def rehearse(kind: type[Any], path: Path) -> None:
    """One step of nearly nothing. Whoever is made of PyTorch does it eagerly."""
    shared = Shared(path, "rehearsal")
    contestant = (Eager if issubclass(kind, Eager) else kind)(REHEARSAL, shared)
    contestant.begin()
    contestant.step(*next(shared.batches()))
    if kind is Compiled:
        Compiled.load_compiler()


def warm_up(contestant: Any, batches: Iterator[tuple[Array, Array]]) -> list[float]:
    """The first steps. Returns their losses."""
    losses: list[float] = []
    while len(losses) < MOST_WARM_UP:
        before = contestant.compiled()
        losses.append(contestant.step(*next(batches)))
        if len(losses) >= WARM_UP and contestant.compiled() == before:
            break
    return losses


def turn(contestant: Any, batches: Iterator[tuple[Array, Array]]) -> list[float]:
    """The steps of a turn. Returns their seconds."""
    seconds: list[float] = []
    while sum(seconds) < TURN:
        tokens, targets = next(batches)
        began = time.perf_counter()
        contestant.step(tokens, targets)
        seconds.append(time.perf_counter() - began)
    return seconds


def main(who: str, config_name: str, file: str, threads: str) -> None:
    """Build, warm up, then do as the controller says."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no part of the conversation

    def say(what: Mapping[str, Any]) -> None:
        print(json.dumps(what), file=out, flush=True)

    limit_cores(int(threads))
    kind, path = CONTESTANTS[who], Path(file)
    kind.use_threads(int(threads))
    rehearse(kind, path)
    shared = Shared(path, "model")
    batches, contestant = shared.batches(), kind(load_config(config_name), shared)
    resident = settled_bytes()
    contestant.begin()
    losses = warm_up(contestant, batches)
    settled_bytes()
    forget_peak()
    contestant.step(*next(batches))  # which takes again what was given back
    say({"losses": losses, "facts": contestant.facts()})
    for line in sys.stdin:
        if line.strip() == "end":
            break
        say({"seconds": statistics.median(turn(contestant, batches))})
    say({"memory": max(0, peak_bytes() - resident)})


if __name__ == "__main__":
    main(*sys.argv[1:])
