"""The published set: small traces of every architecture, in float64 and float32, that anybody can make with one command.

The files are not in the repository; their digests are, by machine class, since another BLAS or another CPU rounds otherwise.
What holds everywhere is there too: the losses and gradient norms of the float64 traces, to nine digits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oxidizr_ref import rng
from oxidizr_ref.config import bundled_config_names, canonical_json, load_config
from oxidizr_ref.errors import TraceError
from oxidizr_ref.fingerprint import fingerprint
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.trace.file import Trace
from oxidizr_ref.trace.record import record

#: Sizes of a trace: micro-batches of 2 × 20 tokens (more than one chunk of every Mamba, the last not full), two steps.
SIZES = ("batch_size=2", "gradient_accumulation=1", "max_seq_len=20", "max_grad_norm=1.0")
STEPS = 2
#: Relative difference allowed to the numbers that hold everywhere.
SAME = {"f64": 1e-9, "f32": 1e-4}

#: By name, the bundled model and the precision.
CASES = {
    f"{model}-{dtype}": (model, dtype)
    for model in bundled_config_names()
    if model.startswith("tiny-")
    for dtype in ("f64", "f32")
}


class Made(NamedTuple):
    """One file of the set. known: digests of this machine class are; same: digest, or else numbers, are as published."""

    name: str
    path: Path
    digest: str
    known: bool
    same: bool


def lively_weights(model: LanguageModel, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Weights at which no part of a model is negligible, float32: first weights are so small that a mistake may hide.

    Normal numbers of deviation 0.25 around 1 (norms, D, MIMO weights) or 0; time steps around softplus(0), rates of decay
    around 1.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        ones = name.endswith(("norm.weight", ".D", "mimo_x", "mimo_z", "mimo_o", "B_bias", "C_bias"))
        weights[name] = rng.normal(seed, "lively", name, parameter.full_shape, 0.25) + np.float32(1.0 if ones else 0.0)
    return weights


def make(directory: Path, names: Iterable[str]) -> Iterator[Made]:
    """Write these files of the set to ``directory``, one after the other. Raises TraceError where that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceError(f"{directory}: cannot be made a directory ({error.strerror}); choose another place") from error
    for name in names:
        model, dtype = CASES[name]
        config = load_config(model, [*SIZES, f"model.dtype={dtype}"])
        path = directory / f"{name}.safetensors"
        record(config, path, STEPS, weights=lively_weights(LanguageModel(config.model, seed=None)))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = published()
        here = expected["digests"].get(machine_class(), {})
        numbers, wanted = numbers_of(Trace(path)), expected["numbers"].get(name, {})
        close = numbers.keys() == wanted.keys() and all(
            math.isclose(numbers[key], wanted[key], rel_tol=SAME[dtype]) for key in wanted
        )
        yield Made(name, path, digest, name in here, close and here.get(name, digest) == digest)


def numbers_of(trace: Trace) -> dict[str, float]:
    """The losses and gradient norms of a trace."""
    wanted = ("loss", "cross_entropy", "grad_norm")
    return {name: float(trace.array(name)) for name in trace.records if name.rpartition(".")[2] in wanted}


def machine_class() -> str:
    """What the bits of a trace depend on besides this package, in 16 digits: NumPy, BLAS, CPU features, what they give."""
    found = fingerprint()
    parts = {key: found[key] for key in ("numpy", "blas", "cpu_features", "probe")}
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def published() -> dict[str, Any]:
    """The digests of the set by machine class and name, and the numbers that hold on all of them."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("golden_set.json").read_text(encoding="utf-8"))
    return data


def publish(made: Iterable[Made]) -> str:
    """The text of ``golden_set.json`` with this machine's digests in it; those of other classes stay."""
    data, made = published(), list(made)
    data["digests"][machine_class()] = {one.name: one.digest for one in made}
    data["numbers"] |= {one.name: numbers_of(Trace(one.path)) for one in made}
    return json.dumps(data, indent=1, sort_keys=True) + "\n"
