"""Files of the repository as pages: a link to one leads to its text, with a number and an anchor for every line.

A link to a directory leads to its files. What the API reference describes links to the line where it is written.
"""

from __future__ import annotations

import html
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

FOLDER = "files"


def _page(app: Sphinx, docname: str, path: Path) -> str:
    """Ask for the page of a file. Returns its address as seen from a document."""
    name = f"{FOLDER}/{path.resolve().relative_to(app.srcdir).as_posix()}"
    pages: dict[str, set[str]] = app.env.repository_files  # type: ignore[attr-defined]
    pages.setdefault(docname, set()).add(name)
    return app.builder.get_relative_uri(docname, name)


def _start(_app: Sphinx, env: BuildEnvironment, _docnames: list[str]) -> None:
    if not hasattr(env, "repository_files"):
        env.repository_files = {}  # type: ignore[attr-defined]


def _purge(_app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    getattr(env, "repository_files", {}).pop(docname, None)


def _link(app: Sphinx, doctree: nodes.document) -> None:
    if app.builder.format != "html":
        return
    docname = app.env.docname
    for node in [*doctree.findall(addnodes.download_reference), *doctree.findall(addnodes.pending_xref)]:
        path = Path(app.env.relfn2path(node["reftarget"], docname)[1])
        if isinstance(node, addnodes.download_reference) or (node["reftype"] == "myst" and path.is_dir()):
            link = nodes.reference("", "", *node.children, internal=True, refuri=_page(app, docname, path))
            node.replace_self(link)
    for described in doctree.findall(addnodes.desc):
        for line in described.findall(addnodes.desc_signature) if described.get("domain") == "py" else ():
            if line.parent is described and (place := _written_at(line.get("module", ""), line.get("fullname", ""))):
                refuri = f"{_page(app, docname, place[0])}#L-{place[1]}"
                text = nodes.inline("", "[source]", classes=["viewcode-link"])
                line += nodes.reference("", "", text, internal=True, refuri=refuri)


def _written_at(module: str, name: str) -> tuple[Path, int] | None:
    """File and line of what a name stands for. None for what has no line of its own, such as a number."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    found = found.fget if isinstance(found, property) else inspect.unwrap(found) if callable(found) else found
    try:
        file, (_, line) = inspect.getsourcefile(found), inspect.getsourcelines(found)
    except (TypeError, OSError):
        return None
    return (Path(file), line) if file else None


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    pages: dict[str, set[str]] = app.env.repository_files  # type: ignore[attr-defined]
    coming = sorted(set().union(*pages.values()), reverse=True)
    made = set()
    while coming:
        name = coming.pop()
        path = app.srcdir / name.removeprefix(f"{FOLDER}/")
        if name not in made and path.is_dir():
            files = [f"{name}/{file.name}" for file in sorted(path.iterdir()) if file.suffix in _SHOWN]
            coming += files
            links = (f'<li><a href="{path.name}/{Path(file).name}.html">{Path(file).name}</a></li>' for file in files)
            yield name, _context(app, path, f"<ul>{''.join(links)}</ul>"), "page.html"
        elif name not in made:
            yield name, _context(app, path, _text(path)), "page.html"
        made.add(name)


_SHOWN = {".c", ".css", ".h", ".js", ".json", ".md", ".py", ".rs", ".txt", ".yaml"}


def _context(app: Sphinx, path: Path, body: str) -> dict[str, Any]:
    title = html.escape(path.relative_to(app.srcdir).as_posix())
    return {"title": title, "body": f"<h1>{title}</h1>\n{body}", "parents": [], "display_toc": False}


def _text(path: Path) -> str:
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = TextLexer()
    form: Any = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True)
    marked: str = highlight(path.read_text(encoding="utf-8"), lexer, form)
    return marked


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("env-before-read-docs", _start)
    app.connect("env-purge-doc", _purge)
    app.connect("doctree-read", _link, priority=100)  # before Sphinx copies what is linked as a download
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
