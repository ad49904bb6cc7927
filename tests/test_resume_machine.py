"""Bit-exact resume, searched: whatever is done to a run between its steps, its files are those of a run left alone.

Hypothesis makes up a small run and a history, and `histories` says what must come of it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import forge
import pytest
import tiny
from histories import HANDS, KILLS, SAVES, STOPS, Action, Bits, Manner, World
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

pytestmark = forge.needs_fork


def _shallow(keys: dict[str, Any]) -> dict[str, Any]:
    """The same kind of model with one layer of each kind: histories are many, and depth is nothing to them."""
    mambas, layers = keys.get("mamba_layers", ()), keys["num_layers"]
    if not mambas:
        return {**keys, "num_layers": 1}
    return {**keys, "num_layers": 1 if len(mambas) == layers else 2, "mamba_layers": [0]}


#: Every kind of model that can be built: the small ones, in the sizes of `tiny.MODEL`, and what else there is to choose.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: _shallow(keys) for name, keys in architectures.ARCHITECTURES.items()},
    "one key/value head a query head": {"kv_heads": 2},
    "tied embeddings": {"tie_word_embeddings": True},
    "two layers": {"num_layers": 2},
}


# --- what is made up --------------------------------------------------------------------------------------------------

DTYPES = ("f32", "bf16", "f16", "f64")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
BEGINNINGS = ("auto", "auto", "older step", "older step", "copy, same directory", "copy, new directory", "overwrite")


class Deck:
    """Deals architectures and dtypes in turn, so that a search of few histories meets each of them as often.

    Drawn by Hypothesis, which likes to change one thing at a time, half of them would hardly come. The same history always
    has the same model; once one has failed, all others get its model, so that the smallest history that fails is found.
    """

    def __init__(self) -> None:
        self.dealt: dict[str, tuple[str, str]] = {}
        self.stuck: tuple[str, str] | None = None

    def complete(self, bits: Bits, history: Sequence[Action]) -> Bits:
        """The bits with a model."""
        names, turn = sorted(ARCHITECTURES), len(self.dealt)
        card = self.stuck or (names[turn % len(names)], DTYPES[turn % len(DTYPES)])
        name, dtype = self.dealt.setdefault(repr((bits, history)), card)
        return replace(bits, architecture=name, model={**ARCHITECTURES[name], "dtype": dtype})


@st.composite
def all_bits(draw: st.DrawFn, apart: bool) -> Bits:
    """All but the model, which is dealt."""
    accumulation = draw(st.integers(1, 3))
    trainer: dict[str, Any] = {
        "gradient_accumulation": accumulation,
        "lr_schedule": draw(st.sampled_from(SCHEDULES)),
        "warmup_steps": draw(st.sampled_from([0, 3])),
        "min_lr_ratio": draw(st.sampled_from([0.0, 0.1])),
        "max_grad_norm": draw(st.sampled_from([0.05, 0.0, 1e6])),  # far below the norm; off; far above it
        "shuffle": draw(st.booleans()),
        "seed": draw(st.sampled_from([0, 2**63 + 1])),
        "eval_fraction": draw(st.sampled_from([0.0, 0.25])),
        "load_balance_alpha": draw(st.sampled_from([0.1, 0.0])),
    }
    if draw(st.booleans()):
        trainer |= {"max_steps": draw(st.integers(5, 8)), "batch_size": draw(st.integers(1, 2))}
    else:  # as many steps as the epochs give: about one for two windows
        trainer |= {"max_steps": 0, "num_epochs": accumulation, "batch_size": 2}
    characters, by_itself = draw(st.integers(110, 150)), apart and draw(st.integers(0, 4)) == 0
    return Bits("", {}, trainer, characters, by_itself)


@st.composite
def manners(draw: st.DrawFn) -> Manner:
    return Manner(
        threads=draw(st.integers(1, 3)),
        prefetch=draw(st.integers(0, 2)),
        async_save=draw(st.booleans()),
        save_interval=draw(st.sampled_from([2, 1, 3, 4])),
        log_interval=draw(st.sampled_from([1, 1, 2, 3])),
        eval_interval=draw(st.sampled_from([0, 1, 2])),
        max_checkpoints=draw(st.integers(0, 3)),
        keep_every=draw(st.sampled_from([0, 2, 3])),
        keep_best=draw(st.integers(0, 2)),
    )


def actions() -> st.SearchStrategy[list[Action]]:
    """A process that does not run to its end, and then whatever comes: most often more processes."""
    number = st.integers(0, 30)
    early = st.sampled_from((*KILLS, *STOPS))
    first = st.builds(Action, st.just("auto"), early, number, number, manners())
    ends = st.sampled_from(("left alone", *KILLS, *STOPS, *SAVES))
    process = st.builds(Action, st.sampled_from(BEGINNINGS), ends, number, number, manners())
    hand = st.builds(Action, st.sampled_from(HANDS), which=number)
    rest = st.lists(st.one_of(process, process, process, hand), min_size=1, max_size=3)
    return st.tuples(first, rest).map(lambda parts: [parts[0], *parts[1]])


# --- the search -------------------------------------------------------------------------------------------------------

_SLOWLY = Manner(threads=3, prefetch=2, async_save=True, save_interval=2, eval_interval=1, max_checkpoints=1, keep_best=1)
_TRAINER = {
    "max_steps": 8,
    "gradient_accumulation": 2,
    "max_grad_norm": 0.05,
    "eval_fraction": 0.25,
    "lr_schedule": "cosine",
}
_BITS = [
    Bits("llama", {**ARCHITECTURES["llama"], "dtype": "f32"}, _TRAINER, 150),
    Bits("hybrid", {**ARCHITECTURES["hybrid"], "dtype": "f32"}, {**_TRAINER, "load_balance_alpha": 0.1}, 150),
]
#: Histories that every search begins with, each with bits of `_BITS`: what must not be left to chance.
KNOWN: dict[str, list[Action]] = {
    "killed before a branch is noted, while it is moved, and when it has begun": [
        Action("auto", "logged", moment=5),
        Action("older step", "replacing", which=1, moment=1),
        Action("older step", "replacing", which=1, moment=2),
        Action("older step", "replacing", which=1, moment=3),
        Action("auto", "accumulating", moment=3, manner=Manner(log_interval=3)),
        Action("auto", "renaming", manner=_SLOWLY),
    ],
    "copies that begin branches, and people who delete": [
        Action("auto", "SIGTERM", moment=4),
        Action("copy a file", which=1),
        Action("copy, same directory", "replacing", which=1, moment=2),
        Action("delete a file", which=1),
        Action("copy, new directory", "writing", which=1, moment=1),
        Action("auto", "writing", which=1, moment=9, manner=_SLOWLY),
        Action("auto", "SAVE", manner=Manner(save_interval=4)),
        Action("look"),
        Action("overwrite", "SIGTERM-within", moment=4, manner=_SLOWLY),
    ],
}
#: What a search must have met, at least so often.
WANTED: Mapping[str, int] = {
    "killed": 20,
    **{f"killed: {kill}": 1 for kill in KILLS},
    **dict.fromkeys((*DTYPES, *SCHEDULES), 3),
    **dict.fromkeys(ARCHITECTURES, 2),
    "experts are balanced": 2,
    "killed, saving in the background": 3,
    "saved in the background": 10,
    "stopped by a signal": 5,
    "saved when asked": 1,
    "branch": 3,
    "resumed from a copy": 3,
    "overwrite": 1,
    "delete a file": 1,
    "look": 1,
    "retention let files go": 5,
    "epoch crossed": 10,
    "resumed in a later epoch": 3,
    "clipped": 3,
    "not clipped": 3,
}


def live_through(root: Path, bits: Bits, history: Sequence[Action], seen: Counter[str]) -> None:
    seen["examples"] += 1
    folder = root / str(seen["examples"])
    world = World(folder, bits, seen)
    for action in (*history, Action("auto")):
        world.do(action)
    assert max(tiny.steps_in(world.place.directory)) == world.total, "and in the end it is done"
    shutil.rmtree(folder)


def search(root: Path, examples: int, derandomize: bool, apart: bool) -> None:
    seen: Counter[str] = Counter()
    deck = Deck()

    @settings(max_examples=examples, derandomize=derandomize, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bits=all_bits(apart), history=actions())
    def whatever_happens(bits: Bits, history: list[Action]) -> None:
        before, bits = seen.copy(), deck.complete(bits, history)
        note(f"the model: {bits.architecture}, {bits.model}")
        try:
            live_through(root, bits, history, seen)
        except BaseException:
            deck.stuck = bits.architecture, bits.model["dtype"]
            raise
        for what in seen - before:
            event(what)

    for bits, history in zip(_BITS, KNOWN.values(), strict=True):
        live_through(root, bits, history, seen)
    whatever_happens()
    print(dict(sorted(seen.items())))
    assert {what: seen[what] for what, count in WANTED.items() if seen[what] < count} == {}


@pytest.mark.thorough
def test_whatever_happens_to_a_run_its_files_and_metrics_are_those_of_a_run_left_alone(tmp_path: Path) -> None:
    search(tmp_path, 60, derandomize=True, apart=False)


@pytest.mark.long
def test_whatever_happens_to_a_run_a_thousand_times_also_in_interpreters_of_its_own(tmp_path: Path) -> None:
    search(tmp_path, 1000, derandomize=False, apart=True)


# --- the forge itself -------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_forged_process_does_what_an_interpreter_of_its_own_does(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, {"dtype": "bf16"}, {"max_steps": 4, "save_interval": 2}, characters=150)
    forged = forge.run(run.into("forged").argv(), tmp_path, small_tiles=False)
    apart = forge.run_apart(run.into("apart").argv(), tmp_path)
    assert (forged.code, forged.records) == (apart.code, apart.records) == (0, forged.records)
    assert tiny.step_files(tmp_path / "forged") == tiny.step_files(tmp_path / "apart") != {}
    for start in (forge.run, forge.run_apart):
        assert start(run.argv("--max-steps", 0.5), tmp_path).code == 2
        assert start(run.into(start.__name__).argv(), tmp_path, moments="logged:3").code == -9
        assert tiny.steps_in(tmp_path / start.__name__) == [2]


def test_nothing_of_one_forged_process_reaches_the_next(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 3, "save_interval": 1}, characters=150)
    first = forge.run(run.argv("--threads", 3), tmp_path, moments="SIGTERM:1", env={"FORGED": "1"}, small_tiles=False)
    assert first.code == 143 and tiny.steps_in(run.directory) == [1]
    second = forge.run(run.argv("--overwrite"), tmp_path)
    assert second.code == 0 and len(second.records) == 3
    assert tiny.sha256(run.path(1)) != tiny.sha256(run.directory / "superseded/1/step_1.safetensors"), "other tiles"


def test_a_forged_process_that_takes_too_long_and_a_forge_that_died_are_told(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 1_000_000}, characters=150)
    with pytest.raises(forge.ForgeError, match="killed after"):
        forge.run(run.argv(), tmp_path, seconds=0.3)
    assert forge.run(["--version"], tmp_path).code == 0, "it goes on"
    dead = forge.Forge()
    dead.process.kill()
    with pytest.raises(forge.ForgeError, match="dead"):
        dead.run(["--version"], tmp_path)
    dead.close()
