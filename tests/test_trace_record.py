"""trace/record.py, recorder.py: a trace holds the numbers of training, each under its name, and what came from what.

Traces here are of two steps (or one: `ONCE`) of two short sequences each, in float64 at lively weights, unless a test says
otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from architectures import NAMES, enliven, model_config
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import LanguageModel, Tensor, parallel
from oxidizr_ref.autograd import no_grad
from oxidizr_ref.batch_loader import BatchLoader
from oxidizr_ref.checkpoint import format
from oxidizr_ref.config import Config, TrainerConfig
from oxidizr_ref.config_keys import DataConfig
from oxidizr_ref.data import Batch
from oxidizr_ref.errors import DataError, TraceError, TrainingError
from oxidizr_ref.fused.register import reference
from oxidizr_ref.nn import Module, Parameter, constant
from oxidizr_ref.optim import clip_factor
from oxidizr_ref.trace import Record, Trace, record
from oxidizr_ref.trace.file import role_of
from oxidizr_ref.trace.names import END_MEANINGS, MEANINGS, TOP_K, Name, layer_of, meaning, parse
from oxidizr_ref.trace.precision import Probe
from oxidizr_ref.trace.record import read_batches, read_weights, recorded, repeat
from oxidizr_ref.trace.recorder import Recorder
from oxidizr_ref.trainer import Trainer
from oxidizr_ref.watch import Part, Watcher, named, watched

Array = np.ndarray[Any, Any]

BATCH, LENGTH, STEPS, ALPHA = 2, 5, 2, 0.1
#: Those of which one step must do: a second one is recorded by the same code whatever is in the model.
ONCE = ("mla", "moe", "mamba2", "mamba2_groups", "mamba3", "mamba3_no_rotation", "mamba3_conv", "hybrid_mamba3", "mla_norm")
#: What `architectures.ARCHITECTURES` does not have.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "mamba3_conv": ("mamba3", {"mamba3_use_conv": True}),
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
    lively = LanguageModel(config.model.model_copy(update={"dtype": "f64"}))
    enliven(lively)
    model = LanguageModel(config.model)
    model.load_state_dict(lively.state_dict())
    return model


def record_of(path: Path, config: Config, steps: int = STEPS, **options: Any) -> Trace:
    """A trace of a config at lively weights."""
    record(config, path, steps, **{"weights": model_of(config).state_dict(), **options})
    return Trace(path)


@pytest.fixture(scope="module")
def trace_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trace]:
    """The trace of an architecture or variant, recorded when it is first asked for."""
    folder = tmp_path_factory.mktemp("traces")
    return functools.cache(lambda name: record_of(folder / name, config_of(name), 1 if name in ONCE else STEPS))


def same(a: Array, b: Array) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class Bent(Watcher):
    """Keeps every named value of a forward pass, after bending those that it is told to.

    bends: by name, what to add to it; of integers, how many of them there are: each becomes the next one.
    """

    def __init__(self, model: LanguageModel, bends: Mapping[str, Any]) -> None:
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.bends, self.scopes, self.found = bends, [""], dict[str, list[Array]]()

    def enter(self, module: Any) -> None:
        self.scopes.append(self.modules[id(module)])

    def leave(self, module: Any) -> None:  # noqa: ARG002
        self.scopes.pop()

    def named(self, name: str, x: Any, part: Part | None, also: tuple[str, ...]) -> Any:  # noqa: ARG002
        full = f"{self.scopes[-1]}.{name}".removeprefix(".")
        bend = self.bends.get(full)
        if bend is not None and isinstance(x, Tensor):
            x = x + Tensor(bend if part is None else bend[part.at])
        elif bend is not None:
            x = (x + 1) % bend
        self.found.setdefault(full, []).append(x.data if isinstance(x, Tensor) else x)
        return x


def bent(model: LanguageModel, trace: Trace, bends: Mapping[str, Any]) -> tuple[float, dict[str, list[Array]]]:
    """The loss of the trace's first batch, and all values, where some of these, or of the parameters, are bent."""
    weights, watcher = model.state_dict(), Bent(model, bends)
    before = {name: weights[name].copy() for name in bends.keys() & weights.keys()}
    for name in before:
        weights[name] += bends[name]
    tokens, targets = (trace.array(name).astype(np.int64) for name in ("tokens", "targets"))
    with reference(), no_grad(), watched(watcher):
        loss = model.loss(tokens, targets, load_balance_alpha=ALPHA)
    for name, array in before.items():
        weights[name][...] = array
    return loss.item(), watcher.found


class Kept:
    """A sink that keeps copies of all arrays, as they come, and their records; of several parts the last one's."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self.records: dict[str, Record] = {}

    def add(self, record: Record, array: Array, times: float = 1.0) -> None:
        assert record.name not in self.arrays
        self.arrays[record.name] = np.array(array if times == 1.0 else array * times)
        self.records[record.name] = record

    def add_part(self, record: Record, array: Array, at: int, length: int) -> None:
        self.arrays.setdefault(record.name, np.full((length, *array.shape), np.nan))[at] = array
        self.records[record.name] = record


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
    for full, one in trace.records.items():
        found = meaning(full)
        assert (found is None) == (one.role == "parameter"), full
        assert one.role == "parameter" or one.role == role_of(full)
        assert one.layer == layer_of(full)
        if found is None or found.shape == "its own":
            continue
        assert one.op == found.op
        # "[E,N]; Mamba2: [H]": any of them. A letter that is not above, and what is made of several, may be any length.
        shapes = [shape.split(",") if shape else [] for shape in re.findall(r"\[(.*?)\]", found.shape)]
        fits = (
            len(letters) == len(one.shape)
            and all(sizes.get(letter, n) == n for letter, n in zip(letters, one.shape, strict=True))
            for letters in (_stretched(shape, len(one.shape)) for shape in shapes)
        )
        assert any(fits), (full, one.shape, found.shape)


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
    for step in range(1, int(trace.metadata["steps"]) + 1):
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
        assert f"{before}loss.grad" in backward[:2]  # without a balance loss it is the cross-entropy's too
    assert at == len(names)


# --- the numbers are those of training --------------------------------------------------------------------------------


class Straight:
    """A config's training that nobody watches."""

    def __init__(self, config: Config, fused: bool = False) -> None:
        self.model, self.fused = model_of(config), fused
        self.trainer = Trainer(config, self.model)
        self.batches = BatchLoader(self.trainer.windows, 0, config.trainer.batch_size)

    def side(self) -> AbstractContextManager[None]:
        """Where the numbers are computed."""
        return nullcontext() if self.fused else reference()

    def batch(self) -> Batch:
        """The first micro-batch of the next step."""
        return self.trainer.windows.batch(self.trainer.cursor, self.trainer.config.trainer.batch_size)

    def loss_and_gradients(self) -> tuple[float, dict[str, Array]]:
        """Those of the first micro-batch of the next step, which is not done by this."""
        with self.side():
            loss = self.model.loss(
                *self.batch()[:2], self.trainer.tokens_a_step, self.trainer.config.trainer.load_balance_alpha
            )
            loss.backward()
        parameters = dict(self.model.named_parameters())
        found = {name: np.zeros(p.shape, loss.dtype) if p.grad is None else p.grad for name, p in parameters.items()}
        self.model.zero_grad()
        return loss.item(), found

    def step(self) -> dict[str, Any]:
        """Do the next step. Returns what the trainer tells of it."""
        with self.side():
            return self.trainer.train_step(self.batches)


def must_be_of_training(trace: Trace, straight: Straight) -> None:
    """Every number of a trace that can be had without watching has the bits it has then."""
    wide = np.float64 if trace.precision == "f64" else np.float32
    model, trainer = straight.model, straight.trainer

    def check(name: str, array: Any) -> None:
        assert same(trace.array(name), np.asarray(array).astype(wide)), name

    for name, array in model.state_dict().items():
        check(name, array)
    for step in range(1, int(trace.metadata["steps"]) + 1):
        at = f"step.{step}." if step > 1 else ""
        tokens, targets, _ = straight.batch()
        assert np.array_equal(trace.array(f"{at}tokens"), tokens) and np.array_equal(trace.array(f"{at}targets"), targets)
        with straight.side(), no_grad():
            check(f"{at}cross_entropy", model.loss(tokens, targets).data)
            if not straight.fused:
                check(f"{at}logits", model(tokens).data)
        loss, gradients = straight.loss_and_gradients()
        check(f"{at}loss", loss)
        told = straight.step()
        factor = clip_factor(told["grad_norm"], trainer.config.trainer.max_grad_norm)
        assert 0 < factor < 1, "these steps are clipped"
        check(f"{at}grad_norm", told["grad_norm"])
        check(f"{at}clip_factor", factor)
        check(f"{at}learning_rate", trainer.learning_rate(step))
        for name, gradient in gradients.items():
            check(f"{at}{name}.grad", gradient)
            check(f"{at}{name}.grad.clipped", gradient * factor)
        for name, array in model.state_dict().items():
            check(f"{at}{name}.after", array)
        for name, array in trainer.optimizer.state_dict().items():
            check(f"{at}optimizer.{name}", array)


@pytest.mark.parametrize("name", ALL)
def test_all_numbers_are_those_of_training_that_nobody_watches(name: str, trace_of: Callable[[str], Trace]) -> None:
    must_be_of_training(trace_of(name), Straight(config_of(name)))


@pytest.mark.parametrize("name", ["hybrid", "mamba3_mimo"])
def test_so_are_those_of_the_fused_side_which_has_fewer_names(
    name: str, trace_of: Callable[[str], Trace], tmp_path: Path
) -> None:
    trace, whole = record_of(tmp_path / "x", config_of(name), fused=True), trace_of(name)
    must_be_of_training(trace, Straight(config_of(name), fused=True))
    assert (trace.metadata["side"], whole.metadata["side"]) == ("fused", "reference")
    assert trace.records.keys() < whole.records.keys()
    assert not {"logits", "token_losses"} & trace.records.keys()
    assert len(trace.records) < 0.95 * len(whole.records)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_so_are_those_of_other_dtypes_which_are_stored_in_float32(dtype: str, tmp_path: Path) -> None:
    config = config_of("moe_top1", dtype=dtype)
    trace = record_of(tmp_path / "x", config)
    must_be_of_training(trace, Straight(config))
    assert trace.precision == dtype
    assert {str(trace.array(name).dtype) for name in trace.records} == {"float32", "uint32"}


# --- gradients of values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_gradients_of_values_are_the_slope_of_the_loss(name: str, trace_of: Callable[[str], Trace]) -> None:
    trace, model, random = trace_of(name), model_of(config_of(name)), np.random.default_rng(0)
    values = [full for full in trace.records if not full.startswith("step.") and f"{full}.grad" in trace.records]
    kinds = {meaning(full): full for full in random.permutation(values).tolist() if trace.records[full].size}
    kinds.pop(None)  # of the parameters
    assert len(kinds) >= 15
    for full in sorted(kinds.values())[ALL.index(name) % 4 :: 4]:  # all of them, by several architectures
        gradient = trace.array(f"{full}.grad")
        size = float(np.linalg.norm(gradient)) or 1.0
        direction = gradient / size + random.standard_normal(gradient.shape) / gradient.size**0.5
        step = 1e-5 / float(np.linalg.norm(direction))
        up, down = (bent(model, trace, {full: sign * step * direction})[0] for sign in (1, -1))
        slope, expected = (up - down) / (2 * step), float((gradient * direction).sum())
        assert abs(slope - expected) <= 1e-6 * size + 1e-9, (full, slope, expected)


# --- what was computed from what --------------------------------------------------------------------------------------

#: What a step is given, or begins with.
WITHOUT_INPUTS = ("loss.grad", "learning_rate")


@pytest.mark.parametrize("name", ALL)
def test_all_inputs_were_recorded_before_and_only_what_comes_from_outside_has_none(
    name: str, trace_of: Callable[[str], Trace]
) -> None:
    before = set[str]()
    for full, one in trace_of(name).records.items():
        assert before.issuperset(one.inputs), full
        assert len(set(one.inputs)) == len(one.inputs)
        outside = one.role in ("input", "parameter") or full.removeprefix("step.2.") in WITHOUT_INPUTS
        assert bool(one.inputs) != outside, full
        before.add(full)


def forward_of(trace: Trace) -> dict[str, Record]:
    """Parameters and values of the first step, up to its loss."""
    records = {name: r for name, r in trace.records.items() if r.role in ("parameter", "output")}
    names = list(records)
    return {name: records[name] for name in names[: names.index("loss") + 1]}


@pytest.mark.parametrize("name", ["llama_tied", "mla_norm_shared", "moe_top1", "hybrid", "hybrid_mamba1", "mamba3_mimo"])
def test_a_value_that_is_bent_changes_what_it_is_an_input_of_and_nothing_that_does_not_come_from_it(
    name: str, trace_of: Callable[[str], Trace]
) -> None:
    trace, model, random = trace_of(name), model_of(config_of(name)), np.random.default_rng(0)
    records, experts = forward_of(trace), config_of(name).model.num_experts
    straight = bent(model, trace, {})[1]
    for full, one in list(records.items())[::4]:
        if not one.size:
            continue
        bend = experts if one.op == TOP_K else random.standard_normal(one.shape)
        found = bent(model, trace, {full: bend})[1]
        changed = {other for other in found if not all(map(same, found[other], straight[other]))} - {full}
        readers = {other for other, reader in records.items() if full in reader.inputs}
        descendants = {full}
        for other, reader in records.items():
            if descendants.intersection(reader.inputs):
                descendants.add(other)
        whole = {other for other in readers if records[other].op != TOP_K and records[other].size}
        assert whole <= changed, f"{full} is no input of {sorted(whole - changed)}"
        assert changed <= descendants, f"{full} is an input of {sorted(changed - descendants)[:3]} too"


def _changes_inflow(answer: float) -> bool:
    """Whether ``inflow`` is another one when a watcher answers ``diagonal`` with something added to it."""
    model = model_of(config_of("mamba3"))
    added = np.full((BATCH, LENGTH, 4), answer)
    found = []
    for bends in ({}, {"layers.0.mamba3.mixer.diagonal": added}):
        watcher = Bent(model, bends)
        with reference(), no_grad(), watched(watcher):
            model(np.zeros((BATCH, LENGTH), np.int64))
        found.append(watcher.found["layers.0.mamba3.mixer.inflow"][0])
    return not same(*found)


def test_the_inflow_of_mamba3_comes_from_the_diagonal_that_a_watcher_answers() -> None:
    assert _changes_inflow(0.5)


def test_the_embedding_comes_from_the_tokens_and_the_losses_from_the_targets(trace_of: Callable[[str], Trace]) -> None:
    records = trace_of("llama").records
    assert "tokens" in records["embed_tokens.output"].inputs and "targets" in records["token_losses"].inputs


def test_the_inputs_of_a_few_values_one_by_one(trace_of: Callable[[str], Trace]) -> None:
    attention = "layers.1.self_attn"
    expected = {
        "layers.0.input_layernorm.rms": ["embed_tokens.output"],
        "layers.0.input_layernorm.output": [
            "embed_tokens.output",
            "layers.0.input_layernorm.rms",
            "layers.0.input_layernorm.weight",
        ],
        f"{attention}.scores": [f"{attention}.q", f"{attention}.k"],
        f"{attention}.masked_scores": [f"{attention}.scores"],
        f"{attention}.context": [f"{attention}.probs", f"{attention}.v_proj.output"],
        "layers.1.after_attention": ["layers.0.output", f"{attention}.o_proj.output"],
        "layers.1.moe.router.ids": ["layers.1.moe.router.gate.output"],
        "layers.1.moe.router.weights": ["layers.1.moe.router.gate.output", "layers.1.moe.router.ids"],
        "layers.1.moe.experts.2.input": ["layers.1.post_attention_layernorm.output", "layers.1.moe.router.ids"],
        "loss": ["cross_entropy", "layers.0.moe.router.balance", "layers.1.moe.router.balance"],
        f"{attention}.masked_scores.grad": [
            *(f"{attention}.probs.grad", f"{attention}.masked_scores", f"{attention}.probs"),
        ],
        "lm_head.weight.grad": ["logits.grad", "norm.output", "lm_head.weight", "logits"],
        "clip_factor": ["grad_norm"],
        "lm_head.weight.grad.clipped": ["lm_head.weight.grad", "clip_factor"],
        "optimizer.exp_avg.lm_head.weight": ["lm_head.weight.grad.clipped"],
        "lm_head.weight.after": [
            *("lm_head.weight", "optimizer.exp_avg.lm_head.weight", "optimizer.exp_avg_sq.lm_head.weight", "learning_rate"),
        ],
    }
    records = trace_of("moe").records
    assert {name: sorted(records[name].inputs) for name in expected} == {n: sorted(i) for n, i in expected.items()}
    parameters = [name for name, r in records.items() if r.role == "parameter"]
    assert records["grad_norm"].inputs == tuple(f"{name}.grad" for name in parameters)
    assert records[f"{attention}.masked_scores.grad"].op == "backward of softmax"


class Toy(Module):
    """Values that no model of the package has: parts of different origin, and one value of three names."""

    def __init__(self) -> None:
        self.a, self.b = Parameter((2,), constant(3.0)), Parameter((2,), constant(5.0))

    def __call__(self) -> Tensor:
        x, y = named("x", self.a * 2.0), named("y", self.b * self.a)
        parts = named("parts", x + 1.0, Part(1, 2)), named("parts", y + 1.0, Part(0, 2))
        return named("third", named("second", named("first", (parts[0] * parts[1]).sum())))


def test_parts_come_from_what_any_of_them_comes_from_and_a_second_name_from_the_first() -> None:
    toy, sink = Toy(), Kept()
    toy.initialize(0, np.dtype(np.float64))
    with watched(Recorder(toy, sink)):  # type: ignore[arg-type]
        toy().backward()
    inputs = {name: one.inputs for name, one in sink.records.items() if not name.endswith(".grad")}
    assert inputs == {
        "a": (),
        "b": (),
        "x": ("a",),
        "y": ("b", "a"),
        "parts": ("x", "y"),
        "first": ("parts",),
        "second": ("first",),
        "third": ("second",),
    }
    assert sink.arrays["parts"].tolist() == [[16, 16], [7, 7]]
    assert sink.arrays["parts.grad"].tolist() == [[7, 7], [16, 16]]
    assert sink.arrays["x.grad"].tolist() == [16, 16]
    assert sink.arrays["first.grad"] == sink.arrays["third.grad"] == 1


def test_later_steps_read_what_the_steps_before_left(tmp_path: Path) -> None:
    trace = record_of(tmp_path / "x", config_of("llama_tied"), steps=3)
    steps = {step: [name for name in trace.records if parse(name).step == step] for step in (1, 2, 3)}
    weight, slot = "embed_tokens.weight", "optimizer.exp_avg.embed_tokens.weight"
    own = [name for name in steps[1] if trace.records[name].role != "parameter"]
    for step, before in ((2, ""), (3, "step.2.")):
        here = f"step.{step}."
        assert steps[step] == [here + name for name in own]
        for name in ("embed_tokens.output", "logits", f"{weight}.after"):
            assert f"{before}{weight}.after" in trace.records[here + name].inputs
        assert trace.records[here + slot].inputs == (f"{here}{weight}.grad.clipped", before + slot)
        inputs = {parse(name) for record in map(trace.records.get, steps[step]) if record for name in record.inputs}
        earlier = {name for name in inputs if name.step != step}
        assert earlier and all(n.step == step - 1 and (n.end == ".after" or n.end.startswith("optimizer.")) for n in earlier)


# --- a part of it -----------------------------------------------------------------------------------------------------


def looked_through(whole: Trace, kept: Trace, names: tuple[str, ...]) -> list[str]:
    """These names of the whole trace, those that the other lacks replaced by what they were computed from."""
    found: dict[str, None] = {}

    def visit(name: str, seen: set[str]) -> None:
        if name in kept.records:
            found[name] = None
        elif name not in seen:
            seen.add(name)
            for other in whole.records[name].inputs:
                visit(other, seen)

    seen = set[str]()
    for name in names:
        visit(name, seen)
    return list(found)


@pytest.mark.parametrize(
    "options, roles, kept_layers",
    [
        ({"what": ["forward"]}, {"output"}, {0, 1, 2}),
        ({"what": ("backward",)}, {"gradient"}, {0, 1, 2}),
        ({"what": ("optimizer",)}, {"gradient", "output", "optimizer", "parameter_after"}, {0, 1, 2}),
        ({"what": ()}, set[str](), set[int]()),
        ({"layers": [1]}, {"output", "gradient", "optimizer", "parameter_after"}, {1}),
        ({"layers": [2, 0]}, {"output", "gradient", "optimizer", "parameter_after"}, {0, 2}),
        ({"layers": []}, {"output", "gradient", "optimizer", "parameter_after"}, set[int]()),
        ({"what": ("forward", "backward"), "layers": [1]}, {"output", "gradient"}, {1}),
    ],
)
def test_a_part_has_the_numbers_of_the_whole_and_inputs_that_look_through_what_is_left_out(
    options: dict[str, Any], roles: set[str], kept_layers: set[int], trace_of: Callable[[str], Trace], tmp_path: Path
) -> None:
    whole, part = trace_of("hybrid_mamba1"), record_of(tmp_path / "x", config_of("hybrid_mamba1"), **options)
    what = options.get("what", ("forward", "backward", "optimizer"))
    expected = []
    for name, one in whole.records.items():
        of_step = ("grad_norm", "clip_factor", "learning_rate")
        kind = "forward" if one.role == "output" else "backward" if one.role == "gradient" else "optimizer"
        kind = "optimizer" if name.endswith((".clipped", *of_step)) else kind
        layer = one.layer is None or one.layer in options.get("layers", (0, 1, 2))
        if one.role in ("input", "parameter") or (kind in what and layer):
            expected.append(name)
    assert list(part.records) == expected
    assert {r.role for r in part.records.values()} == {"input", "parameter", *roles}
    layers = {r.layer for r in part.records.values() if r.role not in ("input", "parameter")} - {None}
    assert layers == kept_layers
    for name, one in part.records.items():
        assert same(part.array(name), whole.array(name))
        full = whole.records[name]
        assert (one.op, one.shape, one.layer) == (full.op, full.shape, full.layer)
        assert sorted(one.inputs) == sorted(looked_through(whole, part, full.inputs)), name


def test_a_sample_has_numbers_of_the_whole_and_its_digests(trace_of: Callable[[str], Trace], tmp_path: Path) -> None:
    whole, part = trace_of("hybrid_mamba1"), record_of(tmp_path / "x", config_of("hybrid_mamba1"), sample=50)
    assert list(part.records) == list(whole.records)
    kinds = set[tuple[bool, bool]]()
    for name, one in part.records.items():
        array, indices = whole.array(name), part.indices(name)
        assert one.inputs == whole.records[name].inputs and one.shape == array.shape
        kinds.add((indices is not None, one.parts > 0))
        if indices is None:
            assert same(part.array(name), array) and (array.size <= 50 or one.role in ("input", "parameter"))
            continue
        assert same(part.array(name), array.reshape(-1)[indices]) and len(indices) == 50
        pieces = [hashlib.sha256(piece.tobytes()) for piece in (array if one.parts else [array])]
        together = hashlib.sha256(b"".join(piece.digest() for piece in pieces))
        assert one.digest == (together if one.parts else pieces[0]).hexdigest()
        assert one.parts in (0, LENGTH) and (one.parts > 0) == (".state" in name)
    assert kinds == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("layers, named_", [([3], 3), ([-1], -1), ([0, 7, 9], 7)])
def test_layers_that_the_model_does_not_have_are_refused(layers: list[int], named_: int, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=rf"^layer {named_}: the model has layers 0 to 2$"):
        record_of(tmp_path / "x", config_of("hybrid"), layers=layers)
    assert list(tmp_path.iterdir()) == []


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mamba1"])
def test_two_micro_batches_are_one_step_of_twice_the_batch(name: str, tmp_path: Path) -> None:
    together = record_of(tmp_path / "x", config_of(name, {"batch_size": 2 * BATCH}))
    apart = record_of(tmp_path / "y", config_of(name, {"gradient_accumulation": 2}))
    assert [full for full in apart.records if parse(full).micro == 1] == list(together.records)
    seconds = [full for full in apart.records if parse(full).micro == 2]
    assert all("micro.2." in full for full in seconds)
    firsts = [full for full, record in together.records.items() if _of_a_micro_batch(full, record, together)]
    assert seconds == [str(parse(full)._replace(micro=2)) for full in firsts]
    for full in together.records:
        whole, found = together.array(full), apart.array(full)
        if full in firsts:
            more, last = apart.array(str(parse(full)._replace(micro=2))), parse(full).path.rpartition(".")[2]
            if last in ("loss", "cross_entropy"):
                found = found if full.endswith(".grad") else found + more
            elif last == "A" and more.shape == whole.shape:  # of parameters alone
                found = found + more if full.endswith(".grad") else more
            else:
                found = np.concatenate((found, more), axis=1 if last == "state" else 0)
        largest = np.abs(whole[np.isfinite(whole)]).max(initial=0.0)
        np.testing.assert_allclose(found, whole, rtol=0, atol=1e-12 * float(largest), err_msg=full)


def _of_a_micro_batch(name: str, record: Record, trace: Trace) -> bool:
    """Whether this is a batch, a value or a value's gradient, not of a parameter or of the step as a whole."""
    if name.rpartition(".")[2] in ("grad_norm", "clip_factor", "learning_rate"):
        return False
    of = name.removesuffix(".grad")
    value = of in trace.records and trace.records[of].role == "output"
    return record.role in ("input", "output") or (record.role == "gradient" and value)


# --- batches ----------------------------------------------------------------------------------------------------------


def ids(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 61, shape)


def saved(path: Path, **tensors: Array) -> Path:
    """A plain safetensors file; ``__`` in names stands for a dot."""
    path.write_bytes(safetensors.numpy.save({name.replace("__", "."): np.array(array) for name, array in tensors.items()}))
    return path


def must_be(found: list[Batch], expected: list[tuple[Array, Array]]) -> None:
    assert len(found) == len(expected)
    for pair, expected_pair in zip(found, expected, strict=True):
        assert all(same(a, b.astype(np.int64)) for a, b in zip(pair[:2], expected_pair[:2], strict=True))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, np.uint8])
def test_batches_in_a_file_are_one_or_several_and_have_their_targets_or_make_them(dtype: Any, tmp_path: Path) -> None:
    one, several = ids(2, 5).astype(dtype), ids(3, 2, 5).astype(dtype)
    path = tmp_path / "x"
    must_be(read_batches(saved(path, tokens=one, targets=one + 1)), [(one, one + 1)])
    must_be(read_batches(saved(path, tokens=several, targets=several + 1)), [(a, a + 1) for a in several])
    must_be(read_batches(saved(path, tokens=one)), [(one[:, :-1], one[:, 1:])])
    must_be(read_batches(saved(path, tokens=several)), [(a[:, :-1], a[:, 1:]) for a in several])


def test_batches_in_a_trace_are_those_of_all_its_steps_and_micro_batches_in_order(tmp_path: Path) -> None:
    config = config_of("llama", {"gradient_accumulation": 2})
    trace = record_of(tmp_path / "x", config)
    windows = Trainer(config, LanguageModel(config.model)).windows
    must_be(read_batches(tmp_path / "x"), [windows.batch(cursor, BATCH) for cursor in (0, 2, 4, 6)])
    again = record_of(tmp_path / "y", config, batches=read_batches(tmp_path / "x"))
    assert all(same(again.array(name), trace.array(name)) for name in trace.records)


@pytest.mark.parametrize(
    "tensors, why",
    [
        ({"ids": ids(2, 5)}, "holds no tensor `tokens`; a batch file has `tokens` and `targets`, integers [batch, time]"),
        ({"tokens": ids(2, 5) + 0.5}, "tokens holds float64, not integers"),
        ({"tokens": ids(2, 5), "targets": ids(2, 5).astype(np.float32)}, "targets holds float32, not integers"),
        ({"tokens": ids(2, 5) > 9}, "tokens holds bool, not integers"),
        ({"tokens": ids(5)}, "tokens [4] and its targets [4] are not [batch, time]"),
        ({"tokens": ids()}, "tokens [] and its targets [] are not [batch, time]"),
        ({"tokens": ids(1, 1, 2, 5)}, "tokens [1, 1, 2, 4] and its targets [1, 1, 2, 4] are not [batch, time]"),
        ({"tokens": ids(2, 1)}, "tokens [2, 0] and its targets [2, 0] are not [batch, time]"),
        ({"tokens": ids(0, 5)}, "tokens [0, 4] and its targets [0, 4] are not [batch, time]"),
        ({"tokens": ids(2, 5), "targets": ids(3, 5)}, "tokens [2, 5] and its targets [3, 5] are not [batch, time]"),
        ({"tokens": ids(2, 5), "targets": ids(2, 4)}, "tokens [2, 5] and its targets [2, 4] are not [batch, time]"),
        ({"tokens": ids(2, 5), "targets": ids()}, "tokens [2, 5] and its targets [] are not [batch, time]"),
        ({"tokens": ids(2, 5), "step__2__tokens": ids(2, 6)}, "its batches have different shapes"),
    ],
)
def test_what_is_no_batch_is_refused(tensors: dict[str, Array], why: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_batches(saved(tmp_path / "x", **tensors))
    assert str(caught.value) == f"{tmp_path / 'x'}: {why}"


def test_a_file_that_is_none_holds_no_batches(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_batches(tmp_path / "absent")


def test_the_sizes_are_those_of_the_batches_and_the_last_ones_come_again(tmp_path: Path) -> None:
    batches = [(ids(3, 4, seed=1), ids(3, 4, seed=2)), (ids(3, 4, seed=3), ids(3, 4, seed=4))]
    trace = record_of(tmp_path / "x", config_of("llama", {"batch_size": 1}), steps=3, batches=batches)
    for step, (tokens, targets) in enumerate([*batches, batches[-1]], start=1):
        at = f"step.{step}." if step > 1 else ""
        assert np.array_equal(trace.array(f"{at}tokens"), tokens) and np.array_equal(trace.array(f"{at}targets"), targets)
    config = recorded(trace).config
    assert (config.model.max_seq_len, config.trainer.batch_size) == (4, 3)
    assert trace.records["step.3.logits"].shape == (3, 4, 61)


def test_tokens_outside_the_vocabulary_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    for batch in ((ids(2, 5) + 61, ids(2, 5)), (ids(2, 5), ids(2, 5) - 61)):
        with pytest.raises(DataError, match="outside the vocabulary of 61"):
            record_of(tmp_path / "x", config_of("llama"), batches=[batch])
    assert list(tmp_path.iterdir()) == []


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_come_from_a_checkpoint_a_plain_file_and_a_trace(tmp_path: Path) -> None:
    config = config_of("llama", {"checkpoint_dir": str(tmp_path / "run"), "max_steps": 1})
    Trainer(config, LanguageModel(config.model)).fit()
    checkpoint = tmp_path / "run" / "step_1.safetensors"
    expected = {name: format.load(checkpoint).tensors[name] for name in LanguageModel(config.model).state_dict()}
    saved(tmp_path / "plain", **{**expected, "of.somebody.else": np.zeros(3)})
    first = record_of(tmp_path / "x", config, steps=1, weights=read_weights(checkpoint))
    assert all(same(first.array(name), array) for name, array in expected.items())
    for source in (tmp_path / "plain", tmp_path / "x"):
        record_of(tmp_path / "y", config, steps=1, weights=read_weights(source))
        assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_weights_in_other_dtypes_are_rounded_to_the_config_s(tmp_path: Path) -> None:
    config = config_of("llama", dtype="bf16")
    weights = model_of(config_of("llama")).state_dict()
    saved(tmp_path / "x", **weights)
    trace = record_of(tmp_path / "y", config, weights=read_weights(tmp_path / "x"))
    rounded = {name: array.astype(model_of(config).state_dict()[name].dtype) for name, array in weights.items()}
    assert all(same(trace.array(name), array.astype(np.float32)) for name, array in rounded.items())


def test_weights_are_all_arrays_of_floating_point_numbers_and_no_others(tmp_path: Path) -> None:
    saved(tmp_path / "x", a=np.zeros(2, np.float16), b=np.zeros(2, bool), c__grad=np.zeros(2), d=np.zeros(2, np.int32))
    assert list(read_weights(tmp_path / "x")) == ["a"]
    with pytest.raises(TraceError, match="no such file"):
        read_weights(tmp_path / "absent")


def test_weights_of_another_model_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    config, folder = config_of("llama"), tmp_path / "empty"
    folder.mkdir()
    weights = model_of(config).state_dict()
    for wrong, why in (
        ({name: array for name, array in weights.items() if name != "norm.weight"}, "norm.weight is missing"),
        ({**weights, "norm.weight": np.zeros(3)}, r"norm.weight has shape \[3\], the model needs \[32\]"),
    ):
        with pytest.raises(DataError, match=why):
            record_of(folder / "x", config, weights=wrong)
    assert list(folder.iterdir()) == []


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"an older file"])
@pytest.mark.parametrize("step, trainer, weight", [(1, {}, np.nan), (2, {"learning_rate": 1e300}, 0.0)])
def test_a_step_that_diverges_is_told_and_leaves_no_file(
    step: int, trainer: dict[str, Any], weight: float, before: bytes | None, tmp_path: Path
) -> None:
    config = config_of("llama", {"lr_schedule": "constant", "warmup_steps": 0, **trainer})
    weights = model_of(config).state_dict()
    weights["norm.weight"][0] += weight
    if before is not None:
        (tmp_path / "x").write_bytes(before)
    with pytest.raises(TrainingError, match=rf"^step {step}: the (loss|gradient norm) is (nan|inf)"):
        record_of(tmp_path / "x", config, weights=weights)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({} if before is None else {"x": before})


def test_a_place_where_no_file_can_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot be written \(No such file or directory\)"):
        record_of(tmp_path / "absent" / "x", config_of("llama"))


# --- again ------------------------------------------------------------------------------------------------------------

AGAIN = """
import sys
from oxidizr_ref.trace import Trace, record
from oxidizr_ref.trace.record import recorded
again = recorded(Trace(sys.argv[1]))
record(again.config, sys.argv[2], again.steps, again.batches, again.weights, sample=100)
"""


def test_it_is_the_same_byte_by_byte_whenever_with_any_number_of_threads_and_from_a_trace_elsewhere(tmp_path: Path) -> None:
    for number, threads in enumerate((1, 3)):
        parallel.set_threads(threads)
        record_of(tmp_path / str(number), config_of("hybrid", dtype="f32"), sample=100)
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path / "0"), str(tmp_path / "x")], check=True, env=environment)
    first, *others = (path.read_bytes() for path in sorted(tmp_path.iterdir()))
    assert others == [first] * 2


@pytest.mark.parametrize("name", ["hybrid", "moe_top1", "mamba3_mimo"])
def test_from_a_trace_its_steps_can_be_done_again_in_every_bit(name: str, trace_of: Callable[[str], Trace]) -> None:
    trace, sink = trace_of(name), Kept()
    source = recorded(trace)
    assert source.config.canonical() == config_of(name).canonical()
    assert (source.steps, source.total_steps, len(source.batches)) == (STEPS, 10, STEPS)
    repeat(source, sink, Probe("f64"))
    assert list(sink.arrays) == list(trace.records)
    for full, array in sink.arrays.items():
        assert np.array_equal(trace.array(full), array), full


def test_steps_done_again_have_the_learning_rates_of_the_run_that_was_recorded(tmp_path: Path) -> None:
    config = config_of("llama", {"max_steps": None, "num_epochs": 1, "warmup_steps": 0})
    trace, sink = record_of(tmp_path / "x", config), Kept()
    assert recorded(trace).total_steps > 1000
    repeat(recorded(trace), sink, Probe("f64"))
    for name in ("learning_rate", "step.2.learning_rate"):
        assert 0.009 < sink.arrays[name] == trace.array(name)


def test_a_step_done_again_takes_the_experts_that_the_trace_chose(trace_of: Callable[[str], Trace]) -> None:
    trace, sink = trace_of("moe"), Kept()
    source, name = recorded(trace), "layers.0.moe.router.ids"
    assert sorted(source.experts) == sorted(full for full in trace.records if full.endswith("router.ids"))
    assert same(source.experts[name], trace.array(name))
    given_ = (source.experts[name] + 1) % 4
    repeat(source._replace(experts={**source.experts, name: given_}), sink, Probe("f64"))
    assert np.array_equal(sink.arrays[name], trace.array(name)), "recorded is what was computed"
    counts = [len(sink.arrays[f"layers.0.moe.experts.{e}.input"]) for e in range(4)]
    assert counts == np.bincount(given_.reshape(-1), minlength=4).tolist()


@pytest.mark.parametrize("lacking", ["config", "steps", "total_steps"])
def test_a_trace_that_does_not_say_how_it_was_made_cannot_be_done_again(lacking: str, tmp_path: Path) -> None:
    said = {"config": "{}", "steps": "1", "total_steps": "1"}
    del said[lacking]
    (tmp_path / "x").write_bytes(safetensors.numpy.save({"tokens": ids(2, 5)}, said))
    with pytest.raises(TraceError, match=f"x: does not say {lacking}, so its steps cannot be done again"):
        recorded(Trace(tmp_path / "x"))


def test_what_a_trace_says_of_itself(trace_of: Callable[[str], Trace]) -> None:
    trace = trace_of("llama")
    assert trace.metadata["made_by"].startswith("oxidizr_ref")
    said = {key: trace.metadata[key] for key in ("trace_version", "precision", "side", "steps", "total_steps")}
    assert said == {"trace_version": "1", "precision": "f64", "side": "reference", "steps": "2", "total_steps": "10"}
