"""Reading a config file: strict YAML, with the line every key stood on.

YAML is read by the rules of version 1.2 (yaml.org, "core schema"), as oxidizr's own parser does: ``3e-4`` is a number,
``yes`` is text and ``010`` is ten, where PyYAML's 1.1 would say text, true and eight. What a config never needs and
what has hurt others is refused: keys given twice, anchors and aliases (a few lines of them expand to gigabytes), tags,
deep nesting, large files. `config.py` decides what the keys mean.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from oxidizr_ref.errors import ConfigError

MAX_BYTES = 1 << 20
_MAX_DEPTH = 16
_MAX_NODES = 20_000
_SHOWN_CHARACTERS = 80

Location = tuple[str | int, ...]  # ("model", "mamba_layers", 3): the keys and list positions that lead to a value

_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", ".Inf", "+.Inf", ".INF", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
# Forty digits are far above any valid value; Python itself refuses to read integers of more than 4,300.
_INTEGER = re.compile(r"[-+]?[0-9]{1,40}")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class Place(NamedTuple):
    """Where a value was written: a file and a line, or (line 0) a whole origin such as ``--set KEY=VALUE``."""

    origin: str
    line: int

    def __str__(self) -> str:
        return f"{self.origin}:{self.line}" if self.line else self.origin


@dataclass
class Document:
    """Plain data (dict, list, str, int, float, bool, None), where each part of it stood, and what was wrong so far."""

    data: Any
    places: dict[Location, Place]
    problems: list[tuple[Location, str]] = field(default_factory=list)

    def place(self, location: Location) -> Place:
        """The place of a value, or of the nearest thing around it that has one (a missing key has none itself)."""
        while location not in self.places:
            location = location[:-1]
        return self.places[location]

    def override(self, section: str, key: str, value: Any, place: Place) -> None:
        """Set ``data[section][key]`` and forget what the file said there, its problems included."""
        target = (section, key)
        if self.data.get(section) is None:
            self.data[section] = {}
        if not isinstance(self.data[section], dict):
            return  # the section itself is wrong in the file, and is reported for that
        self.data[section][key] = value
        self.problems = [problem for problem in self.problems if problem[0][:2] != target]
        self.places = {known: at for known, at in self.places.items() if known[:2] != target}
        self.places[target] = place


def read_text(path: Path) -> str:
    """The text of a config file.

    Raises ConfigError when it is a directory, cannot be read, is larger than 1 MiB or is not UTF-8.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; expected a YAML config file")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than 1 MiB, so no config file; is it a data file or a checkpoint?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte 0x{byte:02x}); expected a YAML config file") from error


def read_yaml(text: str, origin: str, numbered: bool = True) -> Document:
    """Parse one YAML document. ``origin`` names it in messages, with line numbers unless ``numbered`` is false.

    Raises ConfigError when the text is not YAML or uses what is refused here. Keys given twice are no exception but
    entries of ``problems``, so that they are reported together with all else that is wrong.
    """
    try:
        node = _StrictLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        what = str(error.problem) if isinstance(error, _RefusedError) else f"not valid YAML: {error.problem}"
        raise ConfigError(f"{Place(origin, line if numbered else 0)}: {one_line(what)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"not a text file (character {error.character!r} is not allowed in YAML)"
        raise ConfigError(f"{Place(origin, line if numbered else 0)}: {what}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: nested too deeply") from error
    document = Document(data=None, places={(): Place(origin, 1 if numbered else 0)})
    if node is not None:
        document.data = _plain(node, (), document, numbered)
    return document


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes only; `_plain` makes values of them, so that no YAML constructor ever runs."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self._nodes += 1
        tag = getattr(event, "tag", None)
        if getattr(event, "anchor", None) is not None:  # an alias is an event with an anchor and nothing else
            raise _refused("anchors (&) and aliases (*) are not used in configs; write the value out", event)
        if tag is not None:
            raise _refused(f"tags are not used in configs; remove {tag}", event)
        if self._depth >= _MAX_DEPTH:
            raise _refused(f"nested more than {_MAX_DEPTH} levels deep", event)
        if self._nodes > _MAX_NODES:
            raise _refused(f"more than {_MAX_NODES} values; this is no config file", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _RefusedError(yaml.MarkedYAMLError):
    """Valid YAML that no config needs."""


def _refused(problem: str, event: yaml.Event) -> _RefusedError:
    return _RefusedError(problem=problem, problem_mark=cast(yaml.Mark, event.start_mark))


def _plain(node: yaml.Node, location: Location, document: Document, numbered: bool) -> Any:
    """The plain value of a node; records the places of all that lies inside it."""
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.places[(*location, index)] = _place(item, document, numbered)
        return [_plain(item, (*location, index), document, numbered) for index, item in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = _place(key_node, document, numbered)
        if not isinstance(key_node, yaml.ScalarNode):
            document.places[(*location, "?")] = place
            document.problems.append(((*location, "?"), "a key must be a plain word"))
            continue
        key = str(key_node.value)
        inner = (*location, key)
        if key in mapping:
            lines = f"lines {document.places[inner].line} and {place.line}"
            document.problems.append((inner, f"given twice{f', on {lines}' if numbered else ''}; keep one"))
            continue
        document.places[inner] = place
        mapping[key] = _plain(value_node, inner, document, numbered)
    return mapping


def _place(node: yaml.Node, document: Document, numbered: bool) -> Place:
    return Place(document.places[()].origin, node.start_mark.line + 1 if numbered else 0)


def scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted YAML scalar: null, a boolean, a number (``3e-4`` too), else text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    return text


def one_line(text: str) -> str:
    """Text from a file or a command line, made safe to show inside a one-line message: escaped and shortened."""
    shown = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 3] + "..."


def found(value: Any) -> str:
    """How a message names a value that was read: ``512.0``, ``text "512"``, ``true``, ``a list``."""
    if isinstance(value, str):
        return f'text "{one_line(value)}"'
    if isinstance(value, dict):
        return "a mapping of keys"
    if isinstance(value, list | tuple):
        return "a list"
    return one_line(json.dumps(value))
