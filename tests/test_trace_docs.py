"""The pages about traces say what the code does: names, numbers of the golden set, links to what is shipped."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from oxidizr_ref.trace.golden_set import CASES, published
from oxidizr_ref.trace.mapping import load_map, shipped_maps

DOCS = Path(__file__).parents[1] / "docs"


def script(name: str) -> ModuleType:
    """A script of docs/scripts as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_names_is_what_recorded_steps_hold() -> None:
    names = script("trace_names")
    assert names.PAGE.read_text(encoding="utf-8") == names.page()


def test_the_guide_names_every_shipped_map() -> None:
    guide = (DOCS / "traces.md").read_text(encoding="utf-8")
    for name in shipped_maps():
        assert f"`{name}`" in guide
        load_map(name)


def test_the_guide_s_own_map_can_be_loaded(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(names:.*?)```", (DOCS / "traces.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block, encoding="utf-8")
    assert load_map(tmp_path / "mine.yaml")["layers.3.self_attn.q"].name == "blocks.3.attn.q_rot"


@pytest.mark.parametrize("name", CASES)
def test_the_index_of_the_golden_set_has_the_published_numbers(name: str) -> None:
    page = (DOCS / "golden_traces.md").read_text(encoding="utf-8")
    numbers, digits = published()["numbers"][name], 10 if name.endswith("f64") else 5
    row = next(
        line for line in page.splitlines() if line.startswith(f"| `{name}` | ") and "tiny-" not in line[len(name) + 4 :]
    )
    assert f"{numbers['loss']:.{digits}g}" in row and f"{numbers['step.2.grad_norm']:.{digits}g}" in row
