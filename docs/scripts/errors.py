"""Writes docs/guides/troubleshooting.md, all error messages, from the package's source: ``python docs/scripts/errors.py``.

With ``--check`` it writes nothing and ends with 1 if the page is not what it would write. A message is the text that a type
of errors.py is called with; what is filled in when it is raised is shown as ``…``. What many messages have in common is made
by a few functions, and the parts they are given (`PARTS`) are listed like messages.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import errors_advice

from oxidizr_ref import errors

PACKAGE = Path(inspect.getfile(errors)).parent
PAGE = Path(__file__).parents[1] / "guides" / "troubleshooting.md"

#: The types that are raised, in the order of the page.
TYPES: dict[str, type[errors.OxidizrError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.OxidizrError) and kind.__module__ == errors.__name__
}

#: Parts of messages: file and function that they are given to, the argument that has the text, and the message around it.
PARTS: dict[tuple[str, str], tuple[int, str, str]] = {
    ("checkpoint/format.py", "damaged"): (2, "DamagedError", "…: damaged at or after byte …: {}"),
    ("checkpoint/header.py", "_Malformed"): (1, "DamagedError", "…: damaged at or after byte …: {}"),
    ("checkpoint/state.py", "ValueError"): (0, "CheckpointError", "…: holds no training state of this format ({})"),
    ("config.py", "problems.append"): (0, "ConfigError", "…: …: {}"),
    ("config_keys.py", "ValueError"): (0, "ConfigError", "…: …: {}"),
    ("config_keys.py", "Violation"): (1, "ConfigError", "…: …: {}"),
    ("config_yaml.py", "_refused"): (0, "ConfigError", "…: {}"),
    ("config_yaml.py", "document.problems.append"): (0, "ConfigError", "…: …: {}"),
    ("interop/package_check.py", "ValueError"): (0, "CheckpointError", "…: {}"),
    ("interop/package_check.py", "problems.append"): (0, "CheckpointError", "{}"),
    ("prepare/inputs.py", "_damaged"): (
        1,
        "DataError",
        "…: cannot be decompressed ({}); it is cut short or damaged: get it anew",
    ),
    ("trace/file.py", "ValueError"): (0, "TraceError", "…: its records cannot be understood ({})"),
    ("trace/mapping.py", "ValueError"): (0, "TraceError", "… (…): {}"),
}


class Message(NamedTuple):
    """A message that an error may have, and the file that raises it."""

    kind: str
    text: str
    file: str


def messages() -> list[Message]:
    """All messages of the package, without repetitions, in the order of files and lines."""
    found: dict[Message, None] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope in scopes(_Filled(_constants(tree)).visit(tree)):
            for call in calls(scope):
                found.update(dict.fromkeys(messages_of(call, [scope, tree], file)))
    return list(found)


class _Filled(ast.NodeTransformer):
    """Puts a module's own constant texts into the texts they are filled into."""

    def __init__(self, constants: dict[str, ast.Constant]) -> None:
        self.constants = constants

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.expr:
        return self.constants.get(ast.unparse(node.value), node)


def _constants(tree: ast.Module) -> dict[str, ast.Constant]:
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found[ast.unparse(node.targets[0])] = node.value
    return found


def scopes(tree: ast.Module) -> Iterator[ast.AST]:
    """A module and every function in it."""
    yield tree
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def calls(scope: ast.AST) -> Iterator[ast.Call]:
    """The calls of a scope in the order of lines, those of functions inside it left out."""
    for child in ast.iter_child_nodes(scope):
        if not isinstance(child, ast.FunctionDef):
            if isinstance(child, ast.Call):
                yield child
            yield from calls(child)


def messages_of(call: ast.Call, around: list[ast.AST], file: str) -> Iterator[Message]:
    """The messages that a call may make, with the texts assigned in its function and its file; none if all is filled in."""
    name = ast.unparse(call.func)
    if name in TYPES and call.args:
        yield from (Message(name, text, file) for text in _texts(call.args[0], around))
    elif (file, name) in PARTS:
        place, kind, message = PARTS[file, name]
        given = call.args[place]
        given = given.elts[-1] if isinstance(given, ast.Tuple) else given
        yield from (Message(kind, message.format(text), file) for text in _texts(given, around))


def _texts(node: ast.expr, around: list[ast.AST]) -> Iterator[str]:
    """What an expression may read as; nothing if all of it is filled in."""
    if isinstance(node, ast.Name):
        for assigned in _assigned(node.id, around):
            yield from _texts(assigned, around)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        for table in _assigned(node.value.id, around):
            for value in table.values if isinstance(table, ast.Dict) else ():
                yield from _texts(value, around)
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body, around)
        yield from _texts(node.orelse, around)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
        if "".join(parts).strip("…:;, ()"):
            yield "".join(parts)
        elif isinstance(last := node.values[-1], ast.FormattedValue):
            inner = last.value.args[0] if isinstance(last.value, ast.Call) and last.value.args else last.value
            yield from ("".join([*parts[:-1], text]) for text in _texts(inner, around))


def _assigned(name: str, around: list[ast.AST]) -> list[ast.expr]:
    """What is assigned to a name in the innermost of these scopes that assigns to it."""
    for scope in around:
        nodes = [node for node in ast.walk(scope) if isinstance(node, ast.Assign)]
        if found := [node.value for node in nodes if any(ast.unparse(target) == name for target in node.targets)]:
            return found
    return []


def page() -> str:
    """The whole page."""
    lines, known = [errors_advice.HEAD.rstrip()], messages()
    unused = set(errors_advice.ADVICE)
    for name, kind in TYPES.items():
        own = [message for message in known if message.kind == name]
        if not own:
            continue
        doc = " ".join((inspect.getdoc(kind) or "").replace("``", "`").split())
        if kind is errors.OxidizrError:
            doc = "What fits none of the types below: a service, a disk, or this machine did not do what was needed."
        lines += ["", f"## `{name}`", "", f"{doc} Exit code {kind.exit_code}."]
        for title, (_, where) in errors_advice.AREAS.items():
            here = sorted({message.text for message in own if _area(message.file) == title}, key=_in_words)
            if here:
                lines += ["", f"### {title}: `{name}`", "", where, ""]
            for text in here:
                told = [advice for advice in errors_advice.ADVICE if advice in text]
                unused -= set(told)
                lines.append(f"- {_code(text)}" + "".join(f"  \n  {errors_advice.ADVICE[advice]}" for advice in told))
    assert not unused, f"no message has {sorted(unused)} in it"
    return "\n".join(lines) + "\n"


def _area(file: str) -> str:
    return next(title for title, (beginnings, _) in errors_advice.AREAS.items() if file.startswith(beginnings))


def _in_words(text: str) -> str:
    """By the first word that is always the same, since what is filled in comes first in most messages."""
    return text.strip("…:;,()- ").lower()


def _code(text: str) -> str:
    mark = "``" if "`" in text else "`"
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{mark}{space}{text}{space}{mark}".replace("\n", " ")


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
