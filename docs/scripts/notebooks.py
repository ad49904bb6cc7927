"""Executes the notebooks of the course and writes them with their outputs: ``notebooks/NN_slug.py`` to ``NN_slug.ipynb``.

``python docs/scripts/notebooks.py`` does all of them, ``… 03 07`` those whose names begin so. With ``--check`` nothing is
written: it fails, naming notebook and cell, where a text that is computed now differs from the one in the .ipynb, where a
picture is missing, where the two files of a pair do not say the same, and where a notebook takes more than a minute. Cells
whose output varies (times, machine facts) carry the tag ``varies``; of these only the kinds of output are compared.

The .py is the source. What is written depends on it and on what it computes alone: no times, no versions, cell ids from the
cells' own text. Needs ``pip install -e ".[notebooks]"``.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SLOW, TOO_SLOW = 45.0, 60.0  # seconds
VARIES = "varies"
_METADATA = {
    "jupytext": {"formats": "ipynb,py:percent"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_KEPT = ("tags", "jupyter")  # of a cell's metadata
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class CellFailedError(Exception):
    """A cell of a notebook raised an error."""


def sources(names: list[str] | None = None) -> list[Path]:
    """The notebooks' .py files in order: all, or those that begin with one of ``names``. SystemExit for a name of none."""
    found = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
    if not names:
        return found
    wanted = [Path(name).name.removesuffix(".py").removesuffix(".ipynb") for name in names]
    if odd := [name for name in wanted if not any(path.name.startswith(name) for path in found)]:
        sys.exit(f"{odd[0]}: no notebook of this name in {NOTEBOOKS.name}/")
    return [path for path in found if path.name.startswith(tuple(wanted))]


def from_source(path: Path) -> Any:
    """The notebook that a .py file describes, without outputs."""
    return _normalized(jupytext.read(path))


def from_pair(path: Path) -> Any:
    """The .ipynb beside a .py file, with its outputs."""
    return nbformat.read(path.with_suffix(".ipynb"), as_version=4)


def execute(notebook: Any) -> float:
    """Run all cells in a fresh kernel, which works in notebooks/. Returns seconds. Raises CellFailedError."""
    from nbclient import NotebookClient  # here: the tests read notebooks and run none
    from nbclient.exceptions import CellExecutionError

    began = time.monotonic()
    place = {"metadata": {"path": str(NOTEBOOKS)}}
    quiet = ["--IPKernelApp.log_level=ERROR"]
    client = NotebookClient(notebook, timeout=600, resources=place, coalesce_streams=True, extra_arguments=quiet)
    try:
        client.execute()
    except CellExecutionError as error:
        failed = next(i for i, cell in enumerate(notebook.cells) if "error" in dict(texts(cell)))
        raise CellFailedError(f"{cell_name(notebook, failed)} failed\n{_COLORS.sub('', str(error))}") from None
    _normalized(notebook)
    return time.monotonic() - began


def _normalized(notebook: Any) -> Any:
    """The same notebook with nothing in it that depends on when and where it was made."""
    notebook.metadata = nbformat.from_dict(_METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in _KEPT if key in cell.metadata})
    return notebook


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def cell_name(notebook: Any, index: int) -> str:
    """A cell in words, as people count: its number, and its first line."""
    source = notebook.cells[index].source.strip()
    return f"cell {index + 1} ({source.splitlines()[0][:60] if source else 'empty'})"


def texts(cell: Any) -> list[tuple[str, str]]:
    """What a code cell put out, to be compared: streams by name, texts by their type, pictures by their type alone."""
    found = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            found.append((output.name, output.text))
        elif output.output_type == "error":
            found.append(("error", f"{output.ename}: {output.evalue}"))
        elif pictures := sorted(kind for kind in output.data if kind.startswith("image/")):
            found.extend((kind, "") for kind in pictures)
        else:
            found.extend((kind, str(output.data[kind])) for kind in sorted(output.data) if kind.startswith("text/"))
    return found


def different_sources(source: Any, pair: Any) -> list[str]:
    """Where the two files of a pair do not say the same: one line a difference, none if they agree."""
    if len(source.cells) != len(pair.cells):
        return [f"the .py has {len(source.cells)} cells, the .ipynb {len(pair.cells)}"]
    return [
        f"{cell_name(source, index)}: the .py and the .ipynb differ"
        for index, (a, b) in enumerate(zip(source.cells, pair.cells, strict=True))
        if (a.cell_type, a.source, a.id, a.metadata) != (b.cell_type, b.source, b.id, b.metadata)
    ]


def different_outputs(fresh: Any, pair: Any) -> list[str]:
    """Where what was computed now differs from what is in the .ipynb: one line a cell."""
    found = []
    for index, (now, then) in enumerate(zip(fresh.cells, pair.cells, strict=True)):
        a, b = texts(now), texts(then)
        if VARIES in tags(now):
            a, b = ([(kind, "") for kind, _ in side] for side in (a, b))
        if a != b:
            found.append(f"{cell_name(fresh, index)}: {_first_difference(a, b)}")
    return found


def _first_difference(now: list[tuple[str, str]], then: list[tuple[str, str]]) -> str:
    kinds = [kind for kind, _ in now], [kind for kind, _ in then]
    if kinds[0] != kinds[1]:
        return f"puts out {kinds[0]} now, the file has {kinds[1]}"
    text, before = next((x, y) for (_, x), (_, y) in zip(now, then, strict=True) if x != y)
    a, b = text.splitlines(), before.splitlines()
    for line, (x, y) in enumerate(zip(a, b, strict=False), 1):
        if x != y:
            return f"line {line} is now {x!r}, the file has {y!r}"
    return f"{len(a)} lines now, the file has {len(b)}"


def check(path: Path) -> list[str]:
    """What is wrong with a pair, one line each."""
    if not path.with_suffix(".ipynb").exists():
        return [f"there is no {path.stem}.ipynb; make it with `python docs/scripts/notebooks.py {path.stem}`"]
    notebook, pair = from_source(path), from_pair(path)
    if problems := different_sources(notebook, pair):
        return problems
    seconds = execute(notebook)
    problems = different_outputs(notebook, pair)
    if seconds > TOO_SLOW:
        problems.append(f"took {seconds:.0f} s; a notebook may take {TOO_SLOW:.0f}")
    _tell(path, seconds)
    return problems


def write(path: Path) -> None:
    """Execute a notebook and write its .ipynb."""
    notebook = from_source(path)
    seconds = execute(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook) + "\n"
    path.with_suffix(".ipynb").write_text(text, encoding="utf-8")
    _tell(path, seconds, f", {len(text) / 1000:,.0f} kB")


def _tell(path: Path, seconds: float, more: str = "") -> None:
    print(f"{path.stem}: {seconds:.1f} s{more}{'  SLOW' if seconds > SLOW else ''}", flush=True)


def main() -> None:
    """What the command line asks for. Ends with 1 if a check found something or a cell failed."""
    parser = argparse.ArgumentParser(description="execute the notebooks of the course")
    parser.add_argument("names", nargs="*", help="the notebooks, by the beginning of their names; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with what is there")
    options = parser.parse_args()

    failed = False
    for path in sources(options.names):
        problems: list[str] = []
        try:
            if options.check:
                problems = check(path)
            else:
                write(path)
        except CellFailedError as error:
            problems = [str(error)]
        for problem in problems:
            print(f"{path.stem}: {problem}", file=sys.stderr, flush=True)
        failed = failed or bool(problems)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
