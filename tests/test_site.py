"""The documentation site: its links lead somewhere, it needs nothing from elsewhere, and its commands do what they say.

``python docs/scripts/build_site.py`` builds it; ``pytest -m docs`` looks at what was built, and runs every block of Bash and
Python as it is printed. Comments in the pages say what cannot be seen there: ``<!-- not run: why -->`` before a block that
cannot run here, ``<!-- file: NAME -->`` before one that shows a file, and ``<!-- first: … -->``, lines of Bash that come
before what follows. How it looks in a browser is in tests/browser.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
import tiny

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "docs" / "scripts"
HTML = REPOSITORY / "docs" / "_build" / "html"
PAGES = sorted(path for path in (REPOSITORY / "docs").rglob("*.md") if "_build" not in path.parts)

# ------------------------------------------------------------------------------------------------- blocks of the pages

_PIECE = re.compile(
    r"^<!-- first:\s+(?P<first>.*?)\s*-->$"
    r"|^(?:<!-- (?P<mark>not run|file): (?P<note>.*?) -->\n+)?```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Something a page says is to be run: where it stands, in what language, and what the comment before it says."""

    line: int
    language: str
    text: str
    mark: str | None = None
    note: str = ""


def blocks_of(page: Path) -> list[Block]:
    """All blocks of Bash and Python of a page, what comes first, and the files it shows, in order."""
    source, found = page.read_text(encoding="utf-8"), []
    for piece in _PIECE.finditer(source):
        line = source.count("\n", 0, piece.start()) + 1
        if piece["first"]:
            found.append(Block(line, "bash", piece["first"]))
        elif piece["mark"] or piece["language"] in ("bash", "python"):
            found.append(Block(line, piece["language"], piece["text"], piece["mark"], piece["note"] or ""))
    assert len(found) >= len(re.findall(r"^\s*```(?:bash|python)", source, re.MULTILINE)), f"{page.name}: an indented block"
    return found


def _name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


RUN = [page for page in PAGES if any(block.mark is None for block in blocks_of(page))]
NOT_RUN = [
    pytest.param(block.note, id=f"{_name(page)}:{block.line}")
    for page in PAGES
    for block in blocks_of(page)
    if block.mark == "not run"
]
NOT_RUN.append(pytest.param("starts Jupyter", id="notebooks/README.md"))


@pytest.mark.docs
@pytest.mark.parametrize("page", RUN, ids=_name)
def test_every_block_of_a_page_runs_as_it_is_printed_in_order(page, tmp_path):
    programs = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-W", "error", "-c"]}
    environment = tiny.environment(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / ".cache"), COLUMNS="100")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for block in blocks_of(page):
        if block.mark == "file":
            (tmp_path / block.note).write_text(block.text, encoding="utf-8")
        elif block.mark is None:
            command = [*programs[block.language], block.text]
            given = {"cwd": tmp_path, "env": environment, "timeout": 120, "stdin": subprocess.DEVNULL}
            done = subprocess.run(command, capture_output=True, text=True, **given)
            said = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert done.returncode == 0, f"{_name(page)}:{block.line}\n{block.text}\n{said}"


@pytest.mark.docs
@pytest.mark.parametrize("reason", NOT_RUN)
def test_a_block_that_is_not_run_says_why(reason):
    assert reason
    pytest.skip(reason)


# ----------------------------------------------------------------------------------------------------- what was built


class _Page(HTMLParser):
    """What a page of the site has: the ids of its elements, its links, and the files that it is drawn with."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.files = set[str](), list[str](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids |= {value for key in ("id", "name") if (value := found.get(key))}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in ("link", "script", "img", "iframe", "source") and found.get("rel") not in ("canonical",):
            self.files += [value for key in ("href", "src") if (value := found.get(key))]


@pytest.fixture(scope="module")
def pages() -> dict[Path, _Page]:
    if not (HTML / "index.html").exists():
        pytest.skip("the site is not built: python docs/scripts/build_site.py")
    return {path.resolve(): _Page(path) for path in sorted(HTML.rglob("*.html"))}


def _target(page: Path, link: str) -> tuple[Path, str]:
    """The file and the anchor that a link of a page means."""
    parts = urlsplit(link)
    return ((page.parent / unquote(parts.path)).resolve() if parts.path else page), unquote(parts.fragment)


@pytest.mark.docs
def test_every_link_and_anchor_leads_somewhere(pages):
    lost = []
    for page, found in pages.items():
        for link in found.links:
            if not urlsplit(link).scheme:
                file, anchor = _target(page, link)
                known = pages.get(file)
                if not file.is_file() or (anchor and known and anchor not in known.ids):
                    lost.append(f"{page.relative_to(HTML)}: {link}")
    assert lost == []


@pytest.mark.docs
def test_it_needs_nothing_from_elsewhere(pages):
    for page, found in pages.items():
        for file in found.files:
            assert not urlsplit(file).netloc, f"{page.relative_to(HTML)} asks for {file}"
            if not urlsplit(file).scheme:
                assert _target(page, file)[0].is_file(), f"{page.relative_to(HTML)} lacks {file}"
    styles = "".join(path.read_text(encoding="utf-8") for path in HTML.glob("_static/**/*.css"))
    assert re.findall(r"url\(['\"]?https?:", styles) == []


@pytest.mark.docs
def test_every_page_and_notebook_is_on_it(pages):
    sources = [*PAGES, *(REPOSITORY / "notebooks").glob("[0-9]*.ipynb")]
    for source in sources:
        if source != REPOSITORY / "docs" / "README.md":
            assert HTML / source.relative_to(REPOSITORY).with_suffix(".html") in pages, source


def test_the_first_page_and_the_list_of_decisions_leave_no_page_out():
    lists = {"index.md": ("*.md", "guides/*.md", "layers/*.md"), "decisions/index.md": ("*.md",)}
    for name, patterns in lists.items():
        page = REPOSITORY / "docs" / name
        linked = {
            (page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+\.md)", page.read_text(encoding="utf-8"))
        }
        there = {path for pattern in patterns for path in page.parent.glob(pattern)}
        assert there - linked == {page, page.parent / "README.md"} & there


# ------------------------------------------------------------------------------------------------------ error messages


def _errors_script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import errors
    finally:
        sys.path.pop(0)
    return errors


def test_the_page_of_error_messages_is_what_its_script_reads_from_the_source():
    script = _errors_script()
    assert script.PAGE.read_text(encoding="utf-8") == script.page()


#: Errors whose whole text is another message of the page, or a list of such, with a file or line before it.
_MADE_OF_OTHERS = [
    "config.py",  # all problems of a config, a line each
    *("interop/conversion.py", "interop/hugging_face.py"),  # why a model has no layout of Hugging Face's: docs/convert.md
    *("interop/opened.py", "interop/package_check.py", "interop/tokenizer_files.py", "tokenizer_libraries.py"),
    *("trace/mapping.py", "trace/mapping.py"),
]


def test_every_error_that_is_raised_has_its_message_there_but_those_made_of_others():
    script = _errors_script()
    silent = []
    for path in sorted(script.PACKAGE.rglob("*.py")):
        file, tree = path.relative_to(script.PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
        for scope in script.scopes(tree):
            raised = [call for call in script.calls(scope) if ast.unparse(call.func).rpartition(".")[2] in script.TYPES]
            silent += [file for call in raised if not list(script.messages_of(call, [scope, tree], file))]
    assert silent == _MADE_OF_OTHERS
