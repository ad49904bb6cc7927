"""How fast checkpoints are written, proved and read, against the disk itself: ``python docs/scripts/checkpoint_speed.py``.

In one run, in turn: a plain sequential write and fsync of the same bytes; `checkpoint.save` (its writing with hashing, and
its reading back from the disk, timed apart); `checkpoint.load` from the page cache. And the memory a save needs beyond what
was there. Ratios are those of neighbours in time; the median of ``--rounds`` is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from oxidizr_ref import checkpoint
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.memory_now import peak_bytes, resident_bytes

CHUNK = 4 << 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default=None, help="on the disk to measure (default: the temporary directory)")
    parser.add_argument("--gigabytes", type=float, default=1.1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tensors = make_tensors(int(options.gigabytes * 1e9))
    size = sum(array.nbytes for array in tensors.values())
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        print(f"{size / 1e9:.2f} GB in {len(tensors)} tensors; memory a save needs: {memory_of_a_save(directory, tensors)}")
        rounds = [one_round(directory, tensors) for _ in range(options.rounds)]
    for what in rounds[0]:
        speeds = [size / 1e9 / seconds[what] for seconds in rounds]
        print(f"{what:<28} {statistics.median(speeds):5.2f} GB/s   ({min(speeds):.2f} to {max(speeds):.2f})")
    ratios = [seconds["raw write + fsync"] / seconds["write + hash + fsync"] for seconds in rounds]
    print(f"write + hash against raw     {statistics.median(ratios):5.0%}        ({min(ratios):.0%} to {max(ratios):.0%})")


def make_tensors(size: int) -> dict[str, np.ndarray]:
    """Weights and moments of equal sizes, like those of a model: some large, some small."""
    count = size // 3 // 4
    shapes = {"embed_tokens.weight": count // 4, "norm.weight": 4096}
    shapes |= {f"layers.{i}.mlp.up_proj.weight": count // 16 for i in range(12)}
    random = np.random.default_rng(0)
    prefixes = ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
    return {p + name: random.random(n, dtype=np.float32) for p in prefixes for name, n in shapes.items()}


def memory_of_a_save(directory: Path, tensors: dict[str, np.ndarray]) -> str:
    """How much the peak of this process rises. Run before anything else, while the peak is what there is now."""
    checkpoint.save(directory / "warm.safetensors", {"x": np.zeros(1 << 20)}, {})
    before, peak = resident_bytes(), peak_bytes()
    checkpoint.save(directory / "memory.safetensors", tensors, {})
    os.unlink(directory / "memory.safetensors")
    return f"{(peak_bytes() - max(before, peak)) / 2**20:.1f} MiB beyond the {before / 2**20:.0f} MiB in use"


def one_round(directory: Path, tensors: dict[str, np.ndarray]) -> dict[str, float]:
    """Seconds by what was done."""
    seconds = {"raw write + fsync": raw_write(directory / "raw", tensors)}
    flushed: list[float] = []
    flush = disk.flush

    def note(descriptor: int) -> None:
        flush(descriptor)
        flushed.append(time.perf_counter())

    path = directory / "saved.safetensors"
    with mock.patch.object(disk, "flush", note):
        began = time.perf_counter()
        checkpoint.save(path, tensors, {})
        ended = time.perf_counter()
    seconds["write + hash + fsync"] = flushed[0] - began
    seconds["read back from disk + verify"] = ended - flushed[0]
    checkpoint.verify(path)  # brings it into the page cache
    began = time.perf_counter()
    loaded = checkpoint.load(path)
    seconds["load + verify from page cache"] = time.perf_counter() - began
    if any(not np.array_equal(loaded.tensors[name], array) for name, array in tensors.items()):
        sys.exit("what was loaded is not what was saved")
    os.unlink(path)
    return seconds


def raw_write(path: Path, tensors: dict[str, np.ndarray]) -> float:
    """The same bytes, one after another, and one fsync."""
    began = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for array in tensors.values():
        data = array.view(np.uint8).data
        for start in range(0, len(data), CHUNK):
            os.write(descriptor, data[start : start + CHUNK])
    os.fsync(descriptor)
    seconds = time.perf_counter() - began
    os.close(descriptor)
    os.unlink(path)
    return seconds


if __name__ == "__main__":
    main()
