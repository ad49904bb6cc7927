"""The notebooks of the course have the form they promise, and the two files of each say the same. Nothing is executed here:
``python docs/scripts/notebooks.py --check`` does that.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbformat", reason="notebooks are read with nbformat: pip install '.[notebooks]'")
pytest.importorskip("jupytext", reason="their sources are read with jupytext: pip install '.[notebooks]'")

REPOSITORY = Path(__file__).parents[1]
sys.path.append(str(REPOSITORY / "docs" / "scripts"))

import notebooks  # noqa: E402 - lives beside the documentation

SOURCES = notebooks.sources()
LARGEST = 1_000_000  # bytes of an .ipynb
FORBIDDEN = {"torch", "transformers", "jax", "tensorflow"}
PATHS = re.compile(r"(?<![\w.:/])/(?:root|home|tmp|work|usr|var|opt|private|Users|mnt)/|[A-Z]:\\\\")
WARNINGS = re.compile(r"Warning\b:|DeprecationWarning|RuntimeWarning")

each = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


@cache
def source_of(path: Path) -> Any:
    return notebooks.from_source(path)


@cache
def pair_of(path: Path) -> Any:
    assert path.with_suffix(".ipynb").exists(), f"make it: python docs/scripts/notebooks.py {path.stem}"
    return notebooks.from_pair(path)


def cells(path: Path, kind: str) -> list[Any]:
    return [cell for cell in source_of(path).cells if cell.cell_type == kind]


def outputs_of(path: Path) -> list[tuple[str, str, str]]:
    """(cell, kind, text) of everything that the cells put out."""
    pair = pair_of(path)
    return [(notebooks.cell_name(pair, i), *text) for i, cell in enumerate(pair.cells) for text in notebooks.texts(cell)]


def tree_of(cell: Any) -> ast.Module:
    """A code cell as Python, without IPython's own commands."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))))


def test_every_notebook_file_belongs_to_a_pair():
    assert {path.stem for path in notebooks.NOTEBOOKS.glob("*.ipynb")} == {path.stem for path in SOURCES}


def test_the_list_of_the_course_is_complete():
    listed = re.findall(r"\]\((\d\d_\w+)\.ipynb\)", (notebooks.NOTEBOOKS / "README.md").read_text(encoding="utf-8"))
    assert listed == [path.stem for path in SOURCES]


@each
def test_the_source_and_the_notebook_say_the_same(path: Path):
    assert notebooks.different_sources(source_of(path), pair_of(path)) == []


@each
def test_every_cell_was_executed_in_order_and_none_failed(path: Path):
    code = [cell for cell in pair_of(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs_of(path) if output[1] == "error"]


@each
def test_it_is_small_and_names_no_machine_and_shows_no_warning(path: Path):
    assert path.with_suffix(".ipynb").stat().st_size < LARGEST
    assert not PATHS.search(path.read_text(encoding="utf-8"))
    for cell, kind, text in outputs_of(path):
        assert not PATHS.search(text), (cell, text)
        assert kind != "stderr" and not WARNINGS.search(text), (cell, text)


@each
def test_it_needs_no_other_framework(path: Path):
    for cell in cells(path, "code"):
        for node in ast.walk(tree_of(cell)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & FORBIDDEN, names


@each
def test_it_says_what_one_can_do_after_it_and_where_to_read_on(path: Path):
    first, last = cells(path, "markdown")[0].source, cells(path, "markdown")[-1].source
    assert first.startswith("# ") and "After this you can" in first
    goals = first.partition("After this you can")[2].partition("\n\n**")[0]
    assert 3 <= len(re.findall(r"^[-*] ", goals, re.MULTILINE)) <= 5, goals
    assert re.search(r"\bneeds?\b", first, re.IGNORECASE) and re.search(r"\btime\b|\bminutes\b", first, re.IGNORECASE)
    assert "Where to read on" in last


@each
def test_it_has_exercises_whose_solutions_are_hidden_and_checked(path: Path):
    assert any(re.search(r"^#+ Exercises", cell.source, re.MULTILINE) for cell in cells(path, "markdown"))
    statement, exercises = "", 0
    for cell in source_of(path).cells:
        if cell.cell_type == "markdown":
            statement = cell.source
        elif "solution" in notebooks.tags(cell):
            exercises += bool(statement)
            assert not statement or "assert" in statement, statement  # for a reader to paste
            statement = ""
            assert "hide-cell" in notebooks.tags(cell) and cell.metadata["jupyter"]["source_hidden"] is True
            assert any(isinstance(node, ast.Assert) for node in ast.walk(tree_of(cell))), cell.source
    assert 3 <= exercises <= 5


@each
def test_every_figure_labels_its_axes_or_has_none(path: Path):
    drawing = set()  # functions of the notebook that label axes
    for cell in pair_of(path).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(tree_of(cell)):
            if isinstance(node, ast.FunctionDef) and _labels(ast.unparse(node)):
                drawing.add(node.name)
        if any(kind.startswith("image/") for kind, _ in notebooks.texts(cell)):
            called = {node.id for node in ast.walk(tree_of(cell)) if isinstance(node, ast.Name)}
            assert _labels(cell.source) or called & drawing, cell.source


def _labels(source: str) -> bool:
    return ("xlabel" in source and "ylabel" in source) or re.search(r"""axis\(["']off["']\)""", source) is not None


def test_a_difference_between_source_and_notebook_is_told_by_its_cell():
    import nbformat

    def notebook(*sources: str, outputs: tuple[str, ...] = (), tags: tuple[str, ...] = ()) -> Any:
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        for cell, text in zip(made.cells, outputs, strict=False):
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        for cell in made.cells:
            cell.id, cell.metadata["tags"] = "same", list(tags)
        return made

    a = notebook("x = 1", "print(x)", outputs=("", "1\n"))
    assert notebooks.different_sources(a, a) == [] == notebooks.different_outputs(a, a)
    assert notebooks.different_sources(notebook("x = 1"), a) == ["the .py has 1 cells, the .ipynb 2"]
    assert notebooks.different_sources(notebook("x = 1", "print(2)"), a) == [
        "cell 2 (print(2)): the .py and the .ipynb differ"
    ]
    b = notebook("x = 1", "print(x)", outputs=("", "2\n"))
    assert notebooks.different_outputs(b, a) == ["cell 2 (print(x)): line 1 is now '2', the file has '1'"]
    assert (
        notebooks.different_outputs(*(notebook("t()", outputs=(text,), tags=("varies",)) for text in ("1\n", "2\n"))) == []
    )
