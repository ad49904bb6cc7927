"""The documentation says what the code does, as far as that can be checked in seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("notebooks/*.md")]


def test_the_page_of_config_keys_is_what_its_script_writes():
    script = REPOSITORY / "docs" / "scripts" / "configuration.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


def test_the_page_of_precisions_is_what_its_script_makes_of_its_numbers_and_these_hold_what_is_promised():
    sys.path.insert(0, str(REPOSITORY / "docs" / "scripts"))
    try:
        import precision
    finally:
        sys.path.pop(0)
    numbers = json.loads(precision.NUMBERS.read_text(encoding="utf-8"))
    assert precision.PAGE.read_text(encoding="utf-8") == precision.page(numbers)
    runs = {tuple(run[key] for key in ("dtype", "moments", "rounding", "learning_rate")): run for run in numbers["runs"]}
    assert list(runs) == precision.WAYS
    for (dtype, moments, rounding, rate), run in runs.items():
        base = runs["f32", "f32", "none", rate]
        if rounding == "stochastic":
            assert abs(run["loss"] / base["loss"] - 1) <= 0.01
        elif rounding == "nearest" and rate == precision.SMALL:
            assert run["loss"] / base["loss"] - 1 > 0.1
        if dtype == "bf16":
            assert run["bytes"] <= {"f32": 0.85, "bf16": 0.55}[moments] * base["bytes"]
    assert all(step["ratio"] <= 1.3 for step in numbers["steps"] if step["dtype"] != "f64")
    peaks = {(step["dtype"], step["moments"]): step["peak"] for step in numbers["steps"]}
    assert peaks["bf16", "bf16"] < peaks["bf16", "f32"] < peaks["f32", "f32"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_path_of_the_readmes_tree_exists():
    tree = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("```text\noxidizr_ref/")[2].partition("```")[0]
    names = re.findall(r"^(\s*)((?:[\w*]+(?:/|\.py) ?)+)", tree, flags=re.MULTILINE)
    found = [(REPOSITORY / ("oxidizr_ref" if indent else "."), name) for indent, group in names for name in group.split()]
    assert len(found) > 25
    assert [name for base, name in found if not list(base.glob(name.rstrip("/")))] == []
