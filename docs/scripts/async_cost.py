"""What saving in the background costs: ``python docs/scripts/async_cost.py``.

Trains the same model twice in turn, never saving and saving so often that writing takes half of the time between two saves,
and compares the seconds of the same steps. The interval follows from a measured save; no time reaches a file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from oxidizr_ref.checkpoint.records import Record
from oxidizr_ref.config import load_config
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import Reporter
from oxidizr_ref.trainer import Trainer

SETTINGS = ("trainer.eval_fraction=0", "trainer.max_checkpoints=2", "trainer.target_device=cpu", "trainer.num_epochs=1000")


class Clock(Reporter):
    """Notes when each step ended and each file was reported."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.files = 0

    def step(self, _record: Record, _logged: bool) -> None:
        self.steps.append(time.perf_counter())

    def saved(self, _path: Path) -> None:
        self.files += 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="llama-start")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--intervals", type=int, default=6, help="saves a measurement")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        clock = run(options, directory / "trial", steps=12, interval=1000, background=False)
        step = statistics.median(b - a for a, b in zip(clock.steps[2:], clock.steps[3:], strict=False))
        writing = seconds_of_a_background_save(options, directory / "trial2")
        interval = max(1, round(2 * writing / step))
        print(
            f"a step takes {step * 1e3:.0f} ms, a save in the background {writing * 1e3:.0f} ms: one every {interval} steps"
        )
        ratios = []
        for number in range(options.rounds):
            seconds = {}
            for every in (10**6, interval):
                steps = interval * options.intervals + 1
                clock = run(options, directory / f"{number}-{every}", steps, every, background=True)
                seconds[every] = clock.steps[-1] - clock.steps[0]
            ratios.append(seconds[interval] / seconds[10**6])
            print(f"round {number}: never {seconds[10**6]:.2f} s, saving {seconds[interval]:.2f} s: {ratios[-1]:.3f}")
        print(f"median {statistics.median(ratios):.3f}")


def make(options: argparse.Namespace, directory: Path, steps: int, interval: int, background: bool) -> tuple[Trainer, Clock]:
    """A trainer, and the clock it reports to."""
    own = (f"trainer.checkpoint_dir={directory}", f"trainer.max_steps={steps}", f"trainer.save_interval={interval}")
    config = load_config(options.config, [*SETTINGS, *own, f"trainer.async_save={str(background).lower()}", *options.set])
    clock = Clock()
    return Trainer(config, LanguageModel(config.model, config.trainer.seed), reporter=clock), clock


def run(options: argparse.Namespace, directory: Path, steps: int, interval: int, background: bool) -> Clock:
    """Train; the last step's file is written after the last step was reported."""
    trainer, clock = make(options, directory, steps, interval, background)
    trainer.fit()
    return clock


def seconds_of_a_background_save(options: argparse.Namespace, directory: Path) -> float:
    """How long a save takes while training goes on: between the steps around it in a run of its own."""
    trainer, clock = make(options, directory, 40, 10, background=True)
    spans: list[float] = []
    write = trainer.saver._write

    def timed(*arguments: object) -> None:
        began = time.perf_counter()
        write(*arguments)  # type: ignore[arg-type]
        spans.append(time.perf_counter() - began)

    trainer.saver._write = timed  # type: ignore[method-assign]
    trainer.fit()
    assert clock.files == 4
    return statistics.median(spans[:-1])


if __name__ == "__main__":
    main()
