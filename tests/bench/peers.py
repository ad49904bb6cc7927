"""Ours and its peers, side by side: ``python -m tests.bench.peers NAME [--against eager,compile,hf,jax] [--pairs N]``.

NAME is a file of ``configs/`` without its ``.yaml``, or a bundled model. Every contestant has a process of its own, the same
first weights and the same random tokens, and warms up. Then they take turns, ours and a peer, ours and the next peer, with a
rest between, in which threads that wait for work by spinning give up. A turn is one step, or as many as a quarter of a
second has room for, of which the median counts: the first one finds its caches full of another's numbers, which happens to
nobody who trains. A machine that changes its speed changes both of a pair, so what counts are the ratios of pairs: their
median and quartiles. Memory is the peak of a step beyond the weights.

Contestants: ``eager``, a PyTorch twin; ``compile``, the same under torch.compile; ``hf``, the Mamba or Mamba2 of
transformers without kernels; ``jax``, the Llama under jit; ``ours`` against itself shows what the method's noise is. Without
``--against``: all that have the model and are installed (``pip install -e ".[oracle]"`` brings them). Run it at the root of
the repository. ``compile`` needs a C++ compiler. ``hf mamba1`` loops over tokens, 20 seconds a step and more: compare it
alone, ``mamba1 --against hf --pairs 1``.

Peers run with glibc's allocator set to keep what is freed for the next step, as PyTorch's tuning guide advises (by another
allocator) and as oxidizr_ref does by itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oxidizr_ref.config import bundled_config_path, load_config

from .contestants import CONTESTANTS
from .process import WARM_UP, write_shared

HERE = Path(__file__).resolve().parent
TESTS, CONFIGS = HERE.parent, HERE / "configs"
OURS, REST = "ours", 0.05  # seconds
#: Losses of the first steps may be so far apart in float32, relatively; other weights, tokens or models are farther.
SAME = 1e-4
#: Environment of the peers; glibc alone reads it. What is freed is never given back; nothing is too large for the heap;
#: there is one heap, as those of other threads are given back all the same (a quarter of JAX's step); and it is of huge
#: pages where the system lets a process ask for them, as NumPy does.
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


class PeerError(Exception):
    """A contestant ended early, or computes something else than ours."""


# --- the processes ----------------------------------------------------------------------------------------------------


class Contestant:
    """A process that trains when it is its turn. A context manager: at its end the process is gone."""

    def __init__(self, who: str, config: str, shared: Path, threads: int) -> None:
        self.who, self.seconds = who, list[float]()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in __exit__
        paths = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(KEEP_MEMORY if who != OURS else {})}
        command = [sys.executable, "-m", "bench.process", who, config, str(shared), str(threads)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=TESTS, env=env, stdin=pipe, stdout=pipe, stderr=self._errors, encoding="utf-8"
        )
        try:
            ready = self._hear()
        except BaseException:
            self.__exit__()
            raise
        self.losses: list[float] = ready["losses"]
        self.facts: dict[str, Any] = ready["facts"]

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def turn(self) -> float:
        """A turn. Returns the seconds of its step, or the median of them."""
        self._tell("turn")
        self.seconds.append(self._hear()["seconds"])
        return self.seconds[-1]

    def end(self) -> int:
        """The bytes of its memory. It makes no more steps."""
        self._tell("end")
        memory: int = self._hear()["memory"]
        return memory

    def _tell(self, what: str) -> None:
        assert self._process.stdin is not None
        try:
            print(what, file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._died() from error

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        said: dict[str, Any] = json.loads(line)
        return said

    def _died(self) -> PeerError:
        code = self._process.wait()
        self._errors.seek(0)
        return PeerError(f"{self.who} ended with {code}:\n{self._errors.read()[-2000:]}")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What `compare` found of one contestant. ratios: ours over it, pair by pair; empty for ours itself."""

    facts: Mapping[str, Any]
    seconds: Sequence[float]
    memory: int  # bytes
    ratios: Sequence[float] = field(default=())

    def as_json(self, ours: Result) -> dict[str, Any]:
        """All of it, times in seconds, memory in bytes, with what follows from it."""
        said: dict[str, Any] = {
            "facts": dict(self.facts),
            "seconds": list(self.seconds),
            "median": statistics.median(self.seconds),
            "memory": self.memory,
        }
        if self.ratios:
            lower, middle, upper = quartiles(self.ratios)
            said |= {"ratios": list(self.ratios), "ratio": middle, "ratio_quartiles": [lower, upper]}
            said["memory_ratio"] = ours.memory / self.memory if self.memory else None
        return said


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower one, the median and the upper one; of a single value itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, middle, upper


def compare(config: str, against: Sequence[str], pairs: int, threads: int) -> dict[str, Result]:
    """Ours and each peer in turn, ``pairs`` times. Returns what was found, ours first; ours as a peer is ``ours again``.

    Raises PeerError when a contestant ends early, or when its first losses are not ours.
    """
    with ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shared.safetensors"
        write_shared(load_config(config), shared)
        ours, *peers = (stack.enter_context(Contestant(who, config, shared, threads)) for who in (OURS, *against))
        for peer in peers:
            apart = max(abs(a / b - 1) for a, b in zip(ours.losses[:WARM_UP], peer.losses[:WARM_UP], strict=True))
            if not apart < SAME:
                raise PeerError(f"{peer.who} is another model: losses {peer.losses}, ours {ours.losses}")
        ratios: dict[str, list[float]] = {peer.who: [] for peer in peers}
        for _ in range(pairs):
            for peer in peers:
                first, second = _rested_turn(ours), _rested_turn(peer)
                ratios[peer.who].append(first / second)
        found = {OURS: Result(ours.facts, ours.seconds, ours.end())}
        for peer in peers:
            name = peer.who if peer.who != OURS else f"{OURS} again"
            found[name] = Result(peer.facts, peer.seconds, peer.end(), ratios[peer.who])
        return found


def _rested_turn(contestant: Contestant) -> float:
    time.sleep(REST)
    return contestant.turn()


# --- telling ----------------------------------------------------------------------------------------------------------


def cpu_model() -> str:
    """As Linux names it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def report(name: str, threads: int, found: Mapping[str, Result]) -> dict[str, Any]:
    """What ``--json`` writes."""
    contestants = {who: result.as_json(found[OURS]) for who, result in found.items()}
    return {"benchmark": name, "threads": threads, "cpu": cpu_model(), "contestants": contestants}


def table(told: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [f"{told['benchmark']}, {told['threads']} threads; {told['cpu']}"]
    for who, of in told["contestants"].items():
        lines.append(f"  {who:12s}" + ", ".join(f"{key} {value}" for key, value in of["facts"].items()))
    lines.append(f"  {'':12s}{'ms a step':>12s}{'ours/peer':>12s}{'quartiles':>18s}{'MiB':>10s}{'ours/peer':>12s}")
    for who, of in told["contestants"].items():
        row = f"  {who:12s}{of['median'] * 1e3:12.1f}"
        if "ratio" in of:
            lower, upper = of["ratio_quartiles"]
            share = "-" if of["memory_ratio"] is None else f"{of['memory_ratio']:.2f}"
            row += f"{of['ratio']:12.3f}{f'{lower:.3f} to {upper:.3f}':>18s}{of['memory'] / 2**20:10.1f}{share:>12s}"
        else:
            row += f"{'':30s}{of['memory'] / 2**20:10.1f}"
        lines.append(row)
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure and tell. Returns the exit code: 1 when a contestant failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", metavar="NAME", help="a config of tests/bench/configs, or a bundled model")
    parser.add_argument("--against", metavar="WHO,…", help=f"of {', '.join(CONTESTANTS)}; default: all that can")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="turns of each peer beside ours (10)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads, and cores, of everybody (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers")
    options = parser.parse_args()
    if options.pairs < 1 or options.threads < 1:
        parser.error("--pairs and --threads must be at least 1")
    config = config_of(options.name, parser)
    against = opponents(config, options.against, parser)
    try:
        told = report(options.name, options.threads, compare(config, against, options.pairs, options.threads))
    except PeerError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(told), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0


def config_of(name: str, parser: argparse.ArgumentParser) -> str:
    """The config that a name means; ends the program if it means none."""
    path = CONFIGS / f"{name}.yaml"
    bundled = path if path.exists() else bundled_config_path(name)
    if bundled is None:
        there = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        parser.error(f"{name}: neither in {CONFIGS.name}/ (there are: {there}) nor a bundled model")
    return str(bundled)


def opponents(config: str, asked: str | None, parser: argparse.ArgumentParser) -> list[str]:
    """Who is compared with; ends the program where one that was asked for cannot be."""
    model = load_config(config).model
    if asked is None:
        able = [who for who, kind in CONTESTANTS.items() if who != OURS and kind.suits(model) and not missing(who)]
        return able or parser.error("no peer has this model and is installed")
    names = list(dict.fromkeys(asked.split(",")))
    for who in names:
        if who not in CONTESTANTS:
            parser.error(f"--against {who}: expected some of {', '.join(CONTESTANTS)}")
        if not CONTESTANTS[who].suits(model):
            parser.error(f"--against {who}: it has no such model")
        if missing(who):
            parser.error(f"--against {who}: needs {', '.join(missing(who))}")
    return names


def missing(who: str) -> list[str]:
    """The packages that a contestant needs and that are not installed."""
    return [package for package in CONTESTANTS[who].needs if importlib.util.find_spec(package) is None]


if __name__ == "__main__":
    sys.exit(main())
