"""How fast text is generated: ``python docs/scripts/generation.py`` writes docs/generation.json and the tables of the page.

Beside `generate` of transformers with its cache, the same weights, float32, greedily, every contestant in a process of its
own on all cores, one generation each in turn. Then milliseconds a token at positions far into a text. ``--rounds`` and
``--tokens`` make it shorter, ``--page-only`` measures nothing. Needs the extra ``oracle``; nobody else should use the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from oxidizr_ref import parallel
from oxidizr_ref.config import load_config
from oxidizr_ref.generation import generate
from oxidizr_ref.interop.hugging_face import write_pretrained
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.sampling import Sampling

DOCS = Path(__file__).resolve().parent.parent
NUMBERS, PAGE = DOCS / "generation.json", DOCS / "generation.md"
BEGIN, END = "<!-- generation:begin -->", "<!-- generation:end -->"
CONFIGS = DOCS.parent / "tests" / "bench" / "configs"

MODELS, BATCHES, PROMPT = ("llama8m", "llama39m"), (1, 8), 32
#: Ourselves, then transformers with each of its ways to attend.
CONTESTANTS = ("ours", "sdpa", "eager")
POSITIONS = (100, 1_000, 10_000, 30_000)
#: Steps at each position, of which the median is told.
STEPS = 40


def prompts(vocab_size: int, batch: int) -> np.ndarray[Any, Any]:
    """Random tokens, int64 ``[batch, PROMPT]``."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, PROMPT))


# --- a contestant in its process --------------------------------------------------------------------------------------


def ours(directory: Path, batch: int, count: int) -> Callable[[], object]:
    """Generates so many tokens after each prompt."""
    model = open_model(directory).model()
    ids = [*prompts(model.config.vocab_size, batch)]
    return lambda: generate(model, ids, Sampling(count, temperature=0))


def theirs(directory: Path, batch: int, count: int, attention: str) -> Callable[[], object]:
    """The same by transformers."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)
    model.eval().generation_config.eos_token_id = None
    ids = torch.from_numpy(prompts(model.config.vocab_size, batch))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return lambda: model.generate(ids, max_new_tokens=count, **options)


def compete(who: str, directory: Path, batch: int, count: int) -> None:
    """Print the seconds of a generation for every line on stdin, after one that is not counted."""
    run = ours(directory, batch, count) if who == "ours" else theirs(directory, batch, count, who)
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(time.perf_counter() - began, flush=True)


# --- all of them ------------------------------------------------------------------------------------------------------


def race(directory: Path, batch: int, count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant's generations, one each in turn."""
    processes = {
        who: subprocess.Popen(
            [sys.executable, __file__, "--compete", who, str(directory), str(batch), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for who in CONTESTANTS
    }
    seconds: dict[str, list[float]] = {who: [] for who in CONTESTANTS}
    for process in processes.values():
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(rounds):
        for who, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[who].append(float(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    return seconds


def measure_speed(count: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of every contestant, and the median of our speed over each of theirs, round by round."""
    rows = []
    for name in MODELS:
        config = load_config(CONFIGS / f"{name}.yaml").model
        with tempfile.TemporaryDirectory() as directory:
            write_pretrained(Path(directory), config, LanguageModel(config).state_dict())
            for batch in BATCHES:
                seconds = race(Path(directory), batch, count, rounds)
                speed = {who: batch * count / statistics.median(own) for who, own in seconds.items()}
                ratios = {
                    who: statistics.median(b / a for a, b in zip(seconds["ours"], seconds[who], strict=True))
                    for who in CONTESTANTS[1:]
                }
                rows.append({"model": name, "batch": batch, "tokens a second": speed, "ratios": ratios})
                print(rows[-1], file=sys.stderr)
    return rows


def measure_positions(name: str, positions: tuple[int, ...]) -> list[dict[str, Any]]:
    """Milliseconds of a step at these positions, and the bytes of the cache that belong to the tokens before it."""
    config = load_config(CONFIGS / f"{name}.yaml").model.model_copy(update={"max_seq_len": max(positions) + STEPS})
    model, rows = LanguageModel(config), []
    for position in positions:
        cache = model.new_cache(1)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, position))
        if "attention" in config.layer_kinds:
            for layer in cache:
                layer.length = position  # what the keys are does not matter to the time
        else:
            model.prefill(tokens, cache)
        seconds = []
        for step in range(STEPS):
            began = time.perf_counter()
            model.step(tokens[:, step], cache)
            seconds.append(time.perf_counter() - began)
        rows.append({"position": position, "ms": 1e3 * statistics.median(seconds), "bytes": _bytes_of(cache, position)})
        print(name, rows[-1], file=sys.stderr)
    return rows


def _bytes_of(cache: list[Any], position: int) -> int:
    used = 0
    for layer in cache:
        if hasattr(layer, "arrays"):
            used += sum(array.nbytes // layer.capacity * position for array in layer.arrays)
        else:
            used += sum(value.nbytes for value in vars(layer).values() if hasattr(value, "nbytes"))
    return used


# --- the page ---------------------------------------------------------------------------------------------------------


def tables(numbers: Mapping[str, Any]) -> str:
    """What stands between the markers."""
    versions = ", ".join(
        f"{name} {numbers[key]}"
        for name, key in {"Python": "python", "NumPy": "numpy", "PyTorch": "torch", "transformers": "transformers"}.items()
    )
    lines = [
        f"Llamas of 8 and 39 million parameters, {PROMPT} tokens given and {numbers['tokens']} drawn, float32, greedily:",
        "tokens a second of all sequences together, and our speed as a multiple of each of theirs (the median of "
        f"{numbers['rounds']} rounds, in turn).",
        f"{numbers['threads']} threads, {numbers['machine']}, {versions}.",
        "",
        "| model | sequences | oxidizr_ref | transformers, SDPA | transformers, eager |",
        "|---|---|---|---|---|",
    ]
    for row in numbers["speed"]:
        speed, ratios = row["tokens a second"], row["ratios"]
        cells = [f"{speed[who]:.0f} ({ratios[who]:.2f})" for who in CONTESTANTS[1:]]
        lines.append(f"| {row['model']} | {row['batch']} | {speed['ours']:.0f} | {' | '.join(cells)} |")
    lines += [
        "",
        "Milliseconds a token far into a text, and what the cache holds of the tokens before it. The Mamba2 is that of",
        "[performance.md](performance.md), the Llama that of 8 million parameters with a longer `max_seq_len`.",
        "",
        "| position | Mamba2, ms | cache | Llama, ms | cache |",
        "|---|---|---|---|---|",
    ]
    for mamba, llama in zip(numbers["mamba2"], numbers["llama8m"], strict=True):
        cells = [f"{row['ms']:.2f} | {row['bytes'] / 1e6:.1f} MB" for row in (mamba, llama)]
        lines.append(f"| {mamba['position']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def insert(numbers: Mapping[str, Any], page: Path) -> None:
    """Put the tables between the markers."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{page}: lacks {BEGIN} or {END}"
    page.write_text(f"{before}{BEGIN}\n\n{tables(numbers)}\n\n{END}{after}", encoding="utf-8")


def measure(count: int, rounds: int) -> dict[str, Any]:
    """Everything the tables say."""
    import torch
    import transformers

    about = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__.partition("+")[0]}
    about |= {"transformers": transformers.__version__, "threads": parallel.get_threads(), "machine": _machine()}
    positions = {name: measure_positions(name, POSITIONS) for name in ("mamba2", "llama8m")}
    return {**about, "tokens": count, "rounds": rounds, "speed": measure_speed(count, rounds), **positions}


def _machine() -> str:
    """The processor, as Linux calls it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure, or compete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page-only", action="store_true")
    parser.add_argument("--compete", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compete:
        who, directory, batch, count = options.compete
        compete(who, Path(directory), int(batch), int(count))
        return
    if options.page_only:
        numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    else:
        numbers = measure(options.tokens, options.rounds)
    NUMBERS.write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    insert(numbers, PAGE)


if __name__ == "__main__":
    main()
