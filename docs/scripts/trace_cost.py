"""What recording costs: time and memory of a recorded step beside those of the same step on the plain side.

``python docs/scripts/trace_cost.py [ROUNDS]``. Plain and recorded steps take turns, each in a fresh process; times are those
of the second step, memory is the process's peak. Prints a table.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: Name, bundled model, changes.
MODELS = [
    ("llama8m", "llama-start", "hidden_size=256 num_layers=6 num_heads=8 kv_heads=4 intermediate_size=1024 vocab_size=4096"),
    ("nano, V4096", "nano", "vocab_size=4096"),
    ("nano_mamba3, V4096", "nano_mamba3", "vocab_size=4096"),  # its plain scan is slow: fewer tokens
]
SHAPES = {
    "llama-start": "batch_size=8 max_seq_len=256",
    "nano": "batch_size=1 max_seq_len=512",
    "nano_mamba3": "batch_size=1 max_seq_len=128",
}
SIZES = "gradient_accumulation=1 model.dtype=f32"


def step(model: str, changes: list[str], recorded: bool) -> None:
    """Do two steps and print what they took."""
    from contextlib import nullcontext

    from oxidizr_ref.config import load_config
    from oxidizr_ref.fused.register import reference
    from oxidizr_ref.model import LanguageModel
    from oxidizr_ref.trace.recorder import Recorder
    from oxidizr_ref.trace.writer import TraceWriter
    from oxidizr_ref.trainer import Trainer
    from oxidizr_ref.watch import watched

    config = load_config(model, changes)
    language_model = LanguageModel(config.model, 0)
    trainer = Trainer(config, language_model)
    seconds = []
    with tempfile.TemporaryDirectory() as name, reference():
        for number in range(2):
            batches = iter([trainer.windows.batch(number, config.trainer.batch_size)])
            path = Path(name, f"{number}.safetensors")
            began = time.perf_counter()
            with TraceWriter(path, "f32") if recorded else nullcontext() as writer:
                if writer is not None:
                    trainer.witness = recorder = Recorder(language_model, writer)
                with watched(recorder) if writer is not None else nullcontext():
                    trainer.train_step(batches)
            seconds.append(time.perf_counter() - began)
        size = path.stat().st_size if recorded else 0
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds[-1], "peak": peak / 1024, "size": size / 2**20}))


def main(rounds: int) -> None:
    """Print the table."""
    print(
        "| model | plain step | recorded | ratio (range) | peak MiB, plain | recorded | more | trace MiB |\n|" + "---|" * 8
    )
    for name, model, changes in MODELS:
        batch = SHAPES[model]
        command = [sys.executable, __file__, "step", model, *SIZES.split(), *batch.split(), *changes.split()]
        found = []
        for _ in range(rounds):
            pair = [json.loads(subprocess.check_output([*command, kind], text=True)) for kind in ("plain", "recorded")]
            found.append(pair)
        ratios = sorted(b["seconds"] / a["seconds"] for a, b in found)
        plain, recorded = (statistics.median(pair[i]["seconds"] for pair in found) for i in (0, 1))
        peaks = [max(pair[i]["peak"] for pair in found) for i in (0, 1)]
        times = f"{plain:.2f} s | {recorded:.2f} s | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        memory = f"{peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[1] - peaks[0]:+.0f} | {found[0][1]['size']:.0f}"
        print(f"| {name} | {times} | {memory} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(sys.argv[2], sys.argv[3:-1], sys.argv[-1] == "recorded")
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 3)
