"""The page docs/what_a_trace_shows.md: oxidizr's Mamba2 is found wrong at the scan, and nothing else of it is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra 'oracle'")

SCRIPTS = Path(__file__).parents[2] / "docs" / "scripts"

pytestmark = pytest.mark.oracle


def without_digits(text: str) -> str:
    """What another machine, which rounds otherwise, prints as well."""
    text = re.sub(r";\s+\S+\s+uses\s+most\s+of\s+it,\s+\S+", "", text)
    return re.sub(r"-?[0-9.]+(?:e-?[0-9]+)?|\s+", " ", text)


def test_lines_may_end_elsewhere_on_another_machine() -> None:
    """The tensor that uses most is another one there, with a longer name or a shorter one."""
    found = [
        without_digits(f"agrees: within its error budget;{name}\n```\n\nThe rest")
        for name in (
            " norm.rms uses most of it, 9%",
            " layers.0.mamba2.mixer.y uses\n           most of it, 10%",
            "\n           layers.1.mamba2.mixer.norm.weight.grad uses most of it, 10%",
            "\n           step.2.layers.1.mamba2.mixer.norm.output.grad uses most of\n           it, 10%",
        )
    ]
    assert set(found) == {"agrees: within its error budget ``` The rest"}


def test_the_page_is_what_its_script_finds_save_for_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import what_a_trace_shows

    made = what_a_trace_shows.page()
    assert without_digits(made) == without_digits(what_a_trace_shows.PAGE.read_text(encoding="utf-8"))
    first = re.findall(r"DIFFERS first at (\S+) +\(layer 0\)\n  op +(\S+):", made)
    assert first == [("layers.0.mamba2.mixer.y", "scan")] * 2
    assert "agrees: every tensor is within its error budget" in made
