"""What the README's first screen shows: trains ``nano-start`` as the README's command does, compares its held-out loss with
a trigram model counted here on the same text, draws the loss curve, and prints a sample.

Run from a checkout with the extra ``docs`` installed: ``python docs/scripts/first_screen.py`` (``--no-picture`` needs no
matplotlib). Takes about two minutes. Ends with 0 if the model beats the trigram.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from trigram import trigram_loss

from oxidizr_ref.config import load_config
from oxidizr_ref.data import open_data

PICTURE = Path(__file__).parents[1] / "images" / "nano-start-loss.png"


def main() -> None:
    """Train, count, compare, draw."""
    config = load_config("nano-start")
    data = open_data(config)
    ids = data.stream.read(0, len(data.stream)).astype(np.int64)
    held_out = int(len(ids) * config.trainer.eval_fraction)
    scored = data.windows.eval_windows * data.windows.seq_len  # the ragged tail is scored by neither
    # The two tokens before the first held-out target are its context, so that both models score the same tokens.
    trigram = trigram_loss(ids[:-held_out], ids[len(ids) - held_out - 1 :][: scored + 2], config.model.vocab_size)

    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        command = [sys.executable, "-m", "oxidizr_ref", "train", "-f", "nano-start", "--checkpoint-dir", directory]
        subprocess.run(command, check=True)
        seconds = time.monotonic() - began
        records = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text().splitlines()]
    final = records[-1]["eval_loss"]
    print(f"trained in {seconds:.0f} s")
    print(f"held-out loss, nats a token: nano-start {final:.4f}, interpolated trigram {trigram:.4f}")
    if "--no-picture" not in sys.argv:
        _draw(records, trigram)
    sys.exit(0 if final < trigram else 1)


def _draw(records: list[dict[str, float]], trigram: float) -> None:
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="0.65", linewidth=1, label="training batch")
    axes.plot(*zip(*held_out, strict=True), color="C0", marker="o", markersize=3, label="held-out text")
    axes.axhline(trigram, color="C1", linestyle="--", linewidth=1, label=f"interpolated trigram ({trigram:.2f})")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", ylim=(1, 4))
    axes.set_title("oxidizr-ref train -f nano-start", fontsize=10, family="monospace")
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
