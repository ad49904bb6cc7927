"""docs/performance.md: the table of peers is made of the stored numbers, which have every benchmark and every goal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "docs" / "scripts"))

import against_peers  # noqa: E402 - lives beside the documentation


@pytest.fixture(scope="module")
def numbers() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(against_peers.NUMBERS.read_text(encoding="utf-8"))
    return stored


def test_the_table_of_the_page_is_made_of_the_stored_numbers(numbers: Mapping[str, Any], tmp_path: Path) -> None:
    page, text = tmp_path / "performance.md", against_peers.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    against_peers.insert(numbers, page)
    assert page.read_text(encoding="utf-8") == text


def test_every_benchmark_was_measured_against_every_peer_in_at_least_ten_pairs(numbers: Mapping[str, Any]) -> None:
    assert {path.stem for path in against_peers.CONFIGS.glob("*.yaml")} == set(against_peers.BENCHMARKS) == set(numbers)
    for name, peers in against_peers.BENCHMARKS.items():
        assert set(numbers[name]["peers"]) == set(peers.split(","))
        assert numbers[name]["pairs"] >= 10


def test_a_number_that_misses_its_goal_is_in_italics(numbers: Mapping[str, Any]) -> None:
    eager = {"ratio": 0.7, "quartiles": [0.6, 0.8], "memory_ratio": 0.4}
    of = {**numbers["tiny"], "peers": {"eager": eager, "hf": {**eager, "ratio": 0.021}}, "threads": 1.7, "floor": 1.2}
    assert against_peers.cell(of, "eager", 0.65) == "*0.70* (0.60–0.80) ≤ 0.65"
    assert against_peers.cell(of, "eager", 0.75) == "0.70 (0.60–0.80) ≤ 0.75"
    assert against_peers.cell(of, "memory", 0.5) == "0.40 ≤ 0.5"
    assert against_peers.cell(of, "threads", 1.8) == "*1.70* ≥ 1.8"
    assert against_peers.cell(of, "floor", None) == "1.20"
    assert against_peers.cell(of, "hf", 0.03) == "0.021 (0.60–0.80) ≤ 0.03"
    assert against_peers.cell(of, "jax", None) == ""
