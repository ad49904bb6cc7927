"""docs/generation.md: its tables are made of the stored numbers, which hold what is promised, and its Python runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

sys.path.append(str(tiny.REPOSITORY / "docs" / "scripts"))

import generation as script


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(script.NUMBERS.read_text(encoding="utf-8"))
    return stored


def test_the_tables_of_the_page_are_made_of_the_stored_numbers(numbers: dict[str, Any], tmp_path: Path) -> None:
    page, text = tmp_path / "generation.md", script.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    script.insert(numbers, page)
    assert page.read_text(encoding="utf-8") == text


def test_the_numbers_hold_what_is_promised(numbers: dict[str, Any]) -> None:
    assert [(row["model"], row["batch"]) for row in numbers["speed"]] == [
        (model, batch) for model in script.MODELS for batch in script.BATCHES
    ]
    for row in numbers["speed"]:
        assert set(row["tokens a second"]) == set(script.CONTESTANTS) and min(row["ratios"].values()) >= 0.9
    assert [row["position"] for row in numbers["mamba2"]] == [*script.POSITIONS]
    assert len({row["bytes"] for row in numbers["mamba2"]}) == 1
    per_token = {row["bytes"] / row["position"] for row in numbers["llama8m"]}
    assert per_token == {6 * 2 * 4 * 32 * 4}, "layers, keys and values, heads, width, bytes"


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", script.PAGE.read_text(encoding="utf-8"), re.DOTALL)
    run = tiny.make_run(tmp_path, trainer={"max_steps": 1, "save_interval": 1})
    assert run.into("checkpoints/nano-start").train() == 0
    monkeypatch.chdir(tmp_path)
    exec(code, {})
