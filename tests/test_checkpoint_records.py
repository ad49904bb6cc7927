"""What is read of a metrics.jsonl that anybody may have written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from oxidizr_ref.checkpoint.records import curve, number, read_records

LINES = (
    b'{"step": 2, "loss": 5.5}\n{"step": 1, "loss": 6.0}\n\n{"step": 2, "eval_loss": 5.0, "loss": 5.25}\n'
    b'{"step": 3, "loss": "low"}\n{"step": true}\n{"loss": 1}\n[1]\n\xff\n'
    b'{"step": 9007199254740992}\n{"step": -1}\n{"step": 4, "lo'
)


def test_lines_of_one_step_are_one_record_in_the_order_of_steps_and_what_is_none_is_counted(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(LINES)
    records, broken = read_records(tmp_path / "m")
    assert records == [{"step": 1, "loss": 6.0}, {"step": 2, "loss": 5.25, "eval_loss": 5.0}, {"step": 3, "loss": "low"}]
    assert broken == 7
    assert curve(records, "loss") == [(1, 6.0), (2, 5.25)]
    assert curve(records, "eval_loss") == [(2, 5.0)]


def test_without_the_file_there_are_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "m") == ([], 0)


@pytest.mark.parametrize("value", [None, True, "1", [1], float("nan"), float("inf"), 10**400])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert number(value) is None


def test_whole_numbers_are_numbers() -> None:
    assert number(3) == 3.0
