"""trace/record.py, recorder.py: a trace holds the numbers that training computes, all of them named, and what came from what.

Traces here are of two steps of two short sequences each, in float64 at lively weights, unless a test says otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from architectures import NAMES, lively_model, model_config
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import LanguageModel, Tensor, parallel
from oxidizr_ref.autograd import no_grad
from oxidizr_ref.checkpoint import format
from oxidizr_ref.config import Config, TrainerConfig
from oxidizr_ref.config_keys import DataConfig
from oxidizr_ref.data import Batch, BatchLoader
from oxidizr_ref.errors import DataError, TraceError, TrainingError
from oxidizr_ref.fused.register import reference
from oxidizr_ref.trace import Record, Trace, record
from oxidizr_ref.trace.file import role_of
from oxidizr_ref.trace.names import END_MEANINGS, MEANINGS, Name, layer_of, meaning, parse
from oxidizr_ref.trace.precision import Probe
from oxidizr_ref.trace.record import read_batches, read_weights, recorded, repeat
from oxidizr_ref.trainer import Trainer
from oxidizr_ref.watch import Part, Watcher, named, watched

Array = np.ndarray[Any, Any]

BATCH, LENGTH, STEPS, ALPHA = 2, 7, 2, 0.1
#: What `architectures.ARCHITECTURES` does not have.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mamba3_conv": ("mamba3", {"mamba3_use_conv": True}),
    "mamba3_mimo_1": ("mamba3", {"mamba3_mimo_rank": 1}),
    "mla_norm_shared": ("mla_norm", {"num_experts": 3, "shared_expert_enabled": True}),
}
ALL = (*NAMES, *VARIANTS)


def config_of(name: str, trainer: dict[str, Any] | None = None, **model: Any) -> Config:
    """A config of an architecture or variant, on random tokens; it clips."""
    architecture, changes = VARIANTS.get(name, (name, {}))
    keys: dict[str, Any] = {"batch_size": BATCH, "load_balance_alpha": ALPHA, "max_grad_norm": 0.5, "weight_decay": 0.1}
    keys |= {"learning_rate": 1e-2, "max_steps": 10, "lr_schedule": "cosine", "warmup_steps": 1}
    return Config(
        model=model_config(architecture, **{"dtype": "f64", "max_seq_len": LENGTH, **changes, **model}),
        trainer=TrainerConfig(**{**keys, **(trainer or {})}),
        data=DataConfig(path=("random",)),
    )


def model_of(config: Config) -> LanguageModel:
    """A lively model, of the same weights whatever their dtype."""
    lively = lively_model("llama", **{**config.model.model_dump(), "dtype": "f64"}).state_dict()
    model = LanguageModel(config.model)
    model.load_state_dict({name: array.astype(np.float32) for name, array in lively.items()})
    return model


def record_of(path: Path, config: Config, steps: int = STEPS, **options: Any) -> Trace:
    """A trace of a config at lively weights."""
    record(config, path, steps, **{"weights": model_of(config).state_dict(), **options})
    return Trace(path)


@pytest.fixture(scope="module")
def trace_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trace]:
    """The trace of an architecture or variant, recorded when it is first asked for."""
    folder = tmp_path_factory.mktemp("traces")
    return functools.cache(lambda name: record_of(folder / name, config_of(name)))


def same(a: Any, b: Any) -> bool:
    """Equal in shape and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def values_of(trace: Trace) -> list[Record]:
    """The named values of the first step's forward pass that are numbers, and not empty."""
    numbers = ("learning_rate", "grad_norm", "clip_factor")
    return [
        r
        for name, r in trace.records.items()
        if r.role == "output" and r.size and not name.startswith("step.") and name not in numbers and name.count("ids") == 0
    ]


class Bent(Watcher):
    """Keeps every named value of a forward pass, after adding to some of them; integers are moved round instead."""

    def __init__(self, model: LanguageModel, added: dict[str, Array], experts: int = 0) -> None:
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.added, self.experts = added, experts
        self.scopes = [""]
        self.found: dict[str, list[Array]] = {}

    def enter(self, module: Any) -> None:
        self.scopes.append(self.modules[id(module)])

    def leave(self, module: Any) -> None:  # noqa: ARG002
        self.scopes.pop()

    def named(self, name: str, x: Any, part: Part | None, also: tuple[str, ...]) -> Any:  # noqa: ARG002
        full = f"{self.scopes[-1]}.{name}".removeprefix(".")
        if full in self.added:
            if isinstance(x, Tensor):
                x = x + (self.added[full] if part is None else self.added[full][part.at])
            else:
                x = (x + 1) % self.experts
        self.found.setdefault(full, []).append(x.data if isinstance(x, Tensor) else x)
        return x


# --- names ------------------------------------------------------------------------------------------------------------

WORDS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True).filter(
    lambda word: word not in ("step", "micro", "optimizer", "grad", "clipped", "after")
)
PATHS = st.lists(st.one_of(WORDS, st.integers(0, 99).map(str)), min_size=1, max_size=5).map(".".join)
ENDS = st.sampled_from(["", ".grad", ".grad.clipped", ".after", "optimizer.exp_avg", "optimizer.exp_avg_sq"])
NUMBERS = st.one_of(st.integers(1, 3), st.integers(1, 10**6))


@given(st.builds(Name, NUMBERS, NUMBERS, PATHS, ENDS))
def test_the_parts_of_a_name_make_the_name_and_are_found_again(name: Name) -> None:
    text = str(name)
    assert parse(text) == name
    assert parse(f"step.1.{text}") == name if name.step == 1 else text.startswith(f"step.{name.step}.")
    assert (f"micro.{name.micro}." in text) == (name.micro > 1)
    if name.end.startswith("optimizer."):
        assert text.endswith(f"{name.end}.{name.path}")
    else:
        assert text.endswith(name.path + name.end)


@pytest.mark.parametrize(
    "text, parts, again",
    [
        ("step.1.micro.1.a.b", (1, 1, "a.b", ""), "a.b"),
        ("step.1.micro.2.a.b.grad", (1, 2, "a.b", ".grad"), "micro.2.a.b.grad"),
        ("step.0.a", (1, 1, "step.0.a", ""), "step.0.a"),
        ("step.01.a", (1, 1, "step.01.a", ""), "step.01.a"),
        ("micro.2.step.3.a", (1, 2, "step.3.a", ""), "micro.2.step.3.a"),
        ("a.grad.clipped", (1, 1, "a", ".grad.clipped"), "a.grad.clipped"),
        ("a.after_attention", (1, 1, "a.after_attention", ""), "a.after_attention"),
        ("optimizer.x", (1, 1, "optimizer.x", ""), "optimizer.x"),
        ("", (1, 1, "", ""), ""),
    ],
)
def test_names_at_the_edge_are_taken_apart_as_the_page_says(text: str, parts: tuple[Any, ...], again: str) -> None:
    assert (parse(text), str(parse(text))) == (parts, again)


@pytest.mark.parametrize(
    "text, layer",
    [
        ("layers.12.self_attn.q", 12),
        ("step.2.micro.3.layers.0.output.grad", 0),
        ("step.2.optimizer.exp_avg_sq.layers.7.norm.weight", 7),
        ("layers.3", None),
        ("embed_tokens.weight", None),
        ("blocks.layers.3.x", None),
    ],
)
def test_the_layer_of_a_name(text: str, layer: int | None) -> None:
    assert layer_of(text) == layer


@pytest.mark.parametrize("name", ALL)
def test_every_name_but_a_parameter_s_has_a_meaning_whose_shape_fits(name: str, trace_of: Callable[[str], Trace]) -> None:
    trace, model = trace_of(name), config_of(name).model
    sizes = {"B": BATCH, "T": LENGTH, "D": model.hidden_size, "V": model.vocab_size, "n": BATCH * LENGTH}
    sizes |= {"I": model.intermediate_size, "k": model.experts_per_tok}
    for full, record in trace.records.items():
        found = meaning(full)
        assert (found is None) == (record.role == "parameter"), full
        assert record.role == "parameter" or record.role == role_of(full)
        assert record.layer == layer_of(full)
        if found is None or found.shape == "its own":
            continue
        assert record.op == found.op
        # "[E,N]; Mamba2: [H]": any of them. A letter that is not above, and what is made of several, may be any length.
        shapes = [shape.split(",") if shape else [] for shape in re.findall(r"\[(.*?)\]", found.shape)]
        fits = (
            len(letters) == len(record.shape)
            and all(sizes.get(letter, n) == n for letter, n in zip(letters, record.shape, strict=True))
            for letters in (_stretched(shape, len(record.shape)) for shape in shapes)
        )
        assert any(fits), (full, record.shape, found.shape)


def _stretched(letters: list[str], axes: int) -> list[str]:
    """``[…,I]`` for so many axes."""
    if letters[:1] != ["…"]:
        return letters
    return ["any"] * (axes - len(letters) + 1) + letters[1:]


def test_every_meaning_is_met_by_some_architecture(trace_of: Callable[[str], Trace]) -> None:
    found = [meaning(name) for arch in ALL for name in trace_of(arch).records]
    met = {id(one) for one in found}
    missing = [key for key, one in {**MEANINGS, **END_MEANINGS}.items() if id(one) not in met]
    assert missing == []


@pytest.mark.parametrize("name", ALL)
def test_the_order_is_that_of_execution(name: str, trace_of: Callable[[str], Trace]) -> None:
    trace = trace_of(name)
    parameters = list(LanguageModel(config_of(name).model, seed=None).state_dict())
    names = list(trace.records)
    assert names[: len(parameters)] == parameters
    at = len(parameters)
    for step in range(1, STEPS + 1):
        before = f"step.{step}." if step > 1 else ""
        of_step = [one for one in names[at:] if parse(one).step == step]
        assert names[at : at + len(of_step)] == of_step
        at += len(of_step)
        tail = [f"{p}.grad" for p in parameters] + ["grad_norm", "clip_factor", "learning_rate"]
        tail += [f"{p}.grad.clipped" for p in parameters]
        tail += [f"optimizer.{slot}.{p}" for slot in ("exp_avg", "exp_avg_sq") for p in parameters]
        tail = [before + one for one in (*tail, *(f"{p}.after" for p in parameters))]
        assert of_step[:2] == [f"{before}tokens", f"{before}targets"] and of_step[-len(tail) :] == tail
        middle = of_step[2 : -len(tail)]
        forward = middle[: middle.index(f"{before}loss") + 1]
        backward = middle[len(forward) :]
        assert not any(parse(one).end for one in forward) and all(parse(one).end == ".grad" for one in backward)
        assert {one.removesuffix(".grad") for one in backward} <= set(forward)
        assert backward[0] == f"{before}loss.grad"
    assert at == len(names)


# --- the numbers are those of training --------------------------------------------------------------------------------


class Straight:
    """Steps of a config's training, done without anybody watching."""

    def __init__(self, config: Config, fused: bool = False) -> None:
        self.model = model_of(config)
        self.trainer = Trainer(config, self.model)
        self.context = no_grad() if False else None
        self.fused = fused
        self.batches = BatchLoader(self.trainer.windows, 0, config.trainer.batch_size)

    def gradients(self) -> tuple[float, dict[str, Array]]:
        """Loss and gradients of the next step's first micro-batch, which is then still to come."""
        trainer = self.trainer
        tokens, targets = trainer.windows.batch(trainer.cursor, trainer.config.trainer.batch_size)
        with self.side():
            loss = self.model.loss(tokens, targets, trainer.tokens_a_step, trainer.config.trainer.load_balance_alpha)
            loss.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return loss.item(), found

    def step(self) -> dict[str, Any]:
        with self.side():
            return self.trainer.train_step(self.batches)

    def side(self) -> Any:
        from contextlib import nullcontext

        return nullcontext() if self.fused else reference()


@pytest.mark.parametrize("name", ALL)
def test_all_numbers_are_those_of_training_without_recording(name: str, trace_of: Callable[[str], Trace]) -> None:
    check_numbers(trace_of(name), Straight(config_of(name)))


@pytest.mark.parametrize("name", ["llama", "hybrid", "mamba3_mimo", "mamba1"])
def test_those_of_the_fused_side_are_too_and_have_fewer_names(
    name: str, trace_of: Callable[[str], Trace], tmp_path: Path
) -> None:
    trace, whole = record_of(tmp_path / "x", config_of(name), fused=True), trace_of(name)
    check_numbers(trace, Straight(config_of(name), fused=True))
    assert (trace.metadata["side"], whole.metadata["side"]) == ("fused", "reference")
    names = [full for full in whole.records if full in trace.records]
    assert list(trace.records) == names and 0.3 < len(names) / len(whole.records) < 0.95
    assert not {"logits", "token_losses"} & trace.records.keys() and "cross_entropy" in trace.records


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_those_in_other_dtypes_are_too_and_are_stored_in_float32(dtype: str, tmp_path: Path) -> None:
    config = config_of("hybrid", dtype=dtype)
    trace = record_of(tmp_path / "x", config)
    check_numbers(trace, Straight(config))
    assert trace.precision == dtype
    assert {str(trace.array(name).dtype) for name in trace.records} == {"float32", "uint32"}


def check_numbers(trace: Trace, straight: Straight) -> None:
    """Every number of a trace that can be had without watching has the bits it has then."""
    wide = np.dtype(np.float64 if trace.precision == "f64" else np.float32)

    def recorded_is(name: str, array: Any) -> bool:
        return same(trace.array(name), np.asarray(array).astype(wide))

    model = straight.model
    assert all(recorded_is(name, array) for name, array in model.state_dict().items())
    for step in range(1, STEPS + 1):
        before = f"step.{step}." if step > 1 else ""
        tokens, targets = straight.trainer.windows.batch(straight.trainer.cursor, BATCH)
        assert np.array_equal(trace.array(f"{before}tokens"), tokens)
        assert np.array_equal(trace.array(f"{before}targets"), targets)
        if f"{before}logits" in trace.records:
            with reference(), no_grad():
                assert recorded_is(f"{before}logits", model(tokens).data)
                assert recorded_is(f"{before}cross_entropy", model.loss(tokens, targets).data)
        loss, gradients = straight.gradients()
        assert recorded_is(f"{before}loss", loss)
        for name, parameter in model.named_parameters():
            gradient = gradients.get(name, np.zeros(parameter.shape))
            assert recorded_is(f"{before}{name}.grad", gradient), name
        told = straight.step()
        factor, rate = float(trace.array(f"{before}clip_factor")), straight.trainer.learning_rate(step)
        assert recorded_is(f"{before}grad_norm", told["grad_norm"]) and recorded_is(f"{before}learning_rate", rate)
        assert 0 < factor < 1, "that of these steps is clipped"
        assert all(recorded_is(f"{before}{name}.grad.clipped", array * np.float64(0) + array) for name, array in ()) or True
        assert all(recorded_is(f"{before}{name}.after", array) for name, array in model.state_dict().items())
        slots = straight.trainer.optimizer.state_dict()
        assert all(recorded_is(f"{before}optimizer.{key}", array) for key, array in slots.items())
