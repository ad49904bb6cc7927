"""The guard against slowing down: what it calls a loss, and which losses count. Nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench import guard
from bench.guard import MEMORY, OVER_FLOOR, OVER_TWIN, STEP_LEVEL, THREADS

OP = "backward SwiGLU / floor"
STORED = {OVER_TWIN: 0.95, OVER_FLOOR: 2.5, THREADS: 1.8, MEMORY: 6.4, OP: 0.99}
HERE = {"cpu": "this one", "blas": "openblas Haswell", "numpy": "2.4.6", "threads": 2}


def with_loss(name: str, loss: float) -> dict[str, float]:
    """The stored ratios, one of them worse by a share: more time or memory, or so much less gained by the second thread."""
    return {**STORED, name: STORED[name] / (1 + loss) if name == THREADS else STORED[name] * (1 + loss)}


def marks(now: dict[str, float]) -> dict[str, str]:
    return {row.name: row.mark for row in guard.compare(STORED, now) if row.mark}


@pytest.mark.parametrize("name", STORED)
def test_a_loss_of_a_tenth_is_marked_and_nothing_else_is(name: str) -> None:
    assert marks(with_loss(name, 0.10)) == {name: "LARGER" if name == MEMORY else "SLOWER"}


@pytest.mark.parametrize("stored", [0.0123, 0.1, 0.7, 1.23, 3.0, 7.77, 129.0])
def test_a_tenth_is_a_tenth_however_the_division_rounds(stored: float) -> None:
    assert guard.Row(OVER_FLOOR, stored, stored * 1.1).lost and guard.Row(THREADS, stored * 1.1, stored).lost


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("loss", [0.09, 0.0, -0.3])
def test_a_smaller_loss_none_and_a_gain_are_not_marked(name: str, loss: float) -> None:
    assert marks(with_loss(name, loss)) == {}


def test_the_second_thread_s_worth_falls_when_it_is_lost_not_when_it_is_gained() -> None:
    assert marks({**STORED, THREADS: 1.62}) == {THREADS: "SLOWER"}
    assert marks({**STORED, THREADS: 2.0}) == {}


def test_only_losses_of_the_whole_step_decide() -> None:
    for name in STORED:
        lost = guard.decisive_losses(guard.compare(STORED, with_loss(name, 0.5)))
        assert [row.name for row in lost] == ([name] if name in STEP_LEVEL else [])


def test_a_loss_that_a_second_look_does_not_find_is_none() -> None:
    first = guard.compare(STORED, {**with_loss(OVER_FLOOR, 0.2), MEMORY: 6.5})
    (row,) = (row for row in guard.confirmed(first, guard.compare(STORED, STORED)) if row.name == OVER_FLOOR)
    assert (row.now, row.mark) == (2.5, "")


def test_a_loss_that_a_second_look_finds_too_stays_with_the_better_number() -> None:
    first, second = (guard.compare(STORED, with_loss(OVER_FLOOR, loss)) for loss in (0.2, 0.3))
    for rows in (guard.confirmed(first, second), guard.confirmed(second, first)):
        (row,) = (row for row in rows if row.lost)
        assert row.name == OVER_FLOOR and row.now == pytest.approx(3.0)


def test_a_second_look_finds_no_loss_where_the_first_found_none() -> None:
    first, second = guard.compare(STORED, STORED), guard.compare(STORED, with_loss(THREADS, 0.4))
    assert guard.confirmed(first, second) == first


def test_what_is_recorded_is_the_step_and_its_heaviest_ops_in_three_digits() -> None:
    ops = {f"forward {name} / floor": 0.123456 / (i + 1) for i, name in enumerate("ABCDEFGHIJKL")}
    stored = guard.to_record({**ops, OVER_TWIN: 0.98765, OVER_FLOOR: 2.34567, THREADS: 1.0, MEMORY: 12.3456})
    assert list(stored) == [*STEP_LEVEL, *list(ops)[: guard.HEAVIEST]] and stored[OVER_TWIN] == 0.988
    assert stored[OVER_FLOOR] == 2.35 and stored[MEMORY] == 12.3 and stored["forward A / floor"] == 0.123


def test_without_pytorch_its_ratio_is_neither_recorded_nor_lost() -> None:
    now = {name: value for name, value in STORED.items() if name != OVER_TWIN}
    assert OVER_TWIN not in guard.to_record(now)
    (row,) = (row for row in guard.compare(STORED, now) if row.name == OVER_TWIN)
    assert (row.stored, row.now, row.mark) == (0.95, None, "")


def test_an_op_that_is_gone_and_one_that_was_not_recorded_are_no_losses() -> None:
    now = {**{name: value for name, value in STORED.items() if name != OP}, "forward New / floor": 9.0}
    rows = guard.compare(STORED, now)
    assert [(row.name, row.now, row.mark) for row in rows if row.name not in STEP_LEVEL] == [(OP, None, "")]
    assert "forward New" not in guard.table("tiny", rows)


def test_a_record_renews_its_models_and_keeps_the_others_of_the_same_machine_only() -> None:
    stored = {"machine": HERE, "models": {"tiny": STORED, "nano": STORED}}
    new = {"tiny": {OVER_FLOOR: 1.0}}
    assert guard.merged(stored, HERE, new)["models"] == {**new, "nano": STORED}
    assert guard.merged(stored, {**HERE, "threads": 4}, new)["models"] == new
    assert guard.merged({}, HERE, new) == {"machine": HERE, "models": new}


# --- the command, its measurements replaced ---------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, float]]:
    """A machine whose next looks are the items of the returned list."""
    found: list[dict[str, float]] = []
    asked: list[int] = []

    def measure(_config: str, rounds: int) -> dict[str, float]:
        asked.append(rounds)
        assert rounds == 10 * len(asked), "a second look takes twice the rounds"
        return found[len(asked) - 1]

    monkeypatch.setattr(guard, "measure", measure)
    monkeypatch.setattr(guard, "machine", lambda: HERE)
    monkeypatch.setattr(guard, "RATIOS", tmp_path / "ratios.json")
    return found


def store(machine: dict[str, Any]) -> None:
    guard.write({"machine": machine, "models": {"tiny": STORED}})


@pytest.mark.parametrize(
    ("name", "losses", "code", "word"),
    [
        (OVER_FLOOR, (0.11, 0.12), 1, "SLOWER"),
        (OVER_TWIN, (0.10, 0.10), 1, "SLOWER"),
        (MEMORY, (0.5, 0.5), 1, "LARGER"),
        (THREADS, (0.11, 0.09), 0, ""),
        (OVER_FLOOR, (0.09,), 0, ""),
        (OP, (0.5, 0.5), 0, "SLOWER"),
    ],
)
def test_the_exit_code_is_1_when_a_step_level_loss_is_found_twice(
    looks: list[dict[str, float]],
    capsys: pytest.CaptureFixture[str],
    name: str,
    losses: tuple[float, ...],
    code: int,
    word: str,
) -> None:
    store(HERE)
    looks += [with_loss(name, loss) for loss in losses]
    assert guard.check({"tiny": "tiny.yaml"}, 10) == code
    out = capsys.readouterr().out
    assert word in out and ("SLOWER" in out or "LARGER" in out) == bool(word)
    assert (f"lost a tenth or more, twice: tiny, {name}" in out) == bool(code)


def test_on_another_machine_the_table_is_printed_and_nothing_is_decided(
    looks: list[dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    store({**HERE, "cpu": "another one"})
    looks.append(with_loss(OVER_FLOOR, 0.5))
    assert guard.check({"tiny": "tiny.yaml"}, 10) == 0
    out = capsys.readouterr().out
    assert "+50.0%" in out and "of another machine" in out and "another one" in out


def test_a_model_without_stored_ratios_is_named_and_costs_nothing(
    looks: list[dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert guard.check({"tiny": "tiny.yaml"}, 10) == 0 and looks == []
    assert "tiny: no ratio is stored" in capsys.readouterr().out


def test_a_record_is_what_the_next_comparison_reads(looks: list[dict[str, float]]) -> None:
    looks.append(STORED)
    assert guard.record({"tiny": "tiny.yaml"}, 10) == 0
    assert json.loads(guard.RATIOS.read_text(encoding="utf-8")) == {"machine": HERE, "models": {"tiny": STORED}}
    assert guard.read()["models"]["tiny"] == STORED


def test_the_machine_is_told_without_its_name_or_place() -> None:
    found = guard.machine()
    assert set(found) == set(HERE) and found["threads"] >= 1 and all(found.values())
