"""Settings of whoever publishes: HF_USERNAME and HF_TOKEN, from the environment or from a file ``.env``.

No message here shows a value: it may be a secret.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from oxidizr_ref.checkpoint import disk
from oxidizr_ref.errors import UsageError

MAX_BYTES = 1 << 20

_SETTING = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""(?:'([^']*)'|"((?:[^"\\]|\\.)*)")(?:[ \t]+#.*)?""", re.DOTALL)
_COMMENT = re.compile(r"[ \t]#")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}  # any other character stands for itself


def setting(key: str, dotenv: Path = Path(".env")) -> str | None:
    """The value of ``key``: of the environment, else of the file; None where both lack it or leave it empty.

    Raises UsageError when the file has to be read and cannot be (see `read_dotenv`).
    """
    return os.environ.get(key) or (read_dotenv(dotenv).get(key) if dotenv.is_file() else None) or None


def read_dotenv(path: Path) -> dict[str, str]:
    """The settings of a file of lines ``KEY=VALUE``; of a key given twice, the last one.

    ``export`` may stand before a key, a comment (``#``) on a line of its own or after white space behind a value. A value
    may be in single quotes, which keep it as it is, or in double quotes, where ``\\n``, ``\\r`` and ``\\t`` mean what they
    mean elsewhere and ``\\`` before any other character means that character. Nothing is substituted. A byte-order mark
    and Windows' ends of lines are accepted.

    Raises UsageError (file and line, never the value) for any other line, and for a file that is no UTF-8 text.
    """
    try:
        raw = disk.read(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MAX_BYTES or b"\0" in raw:
        raise UsageError(f"{path}: no file of settings; expected lines KEY=VALUE")
    settings: dict[str, str] = {}
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        setting = _setting(line.strip())
        if setting is None:
            what = "expected KEY=VALUE, a comment after #, or nothing; quote a value that holds quotes"
            raise UsageError(f"{path}:{number}: {what} (the line is not shown, it may be secret)")
        settings |= setting
    return settings


def _setting(line: bytes) -> dict[str, str] | None:
    """What a line says: a setting, nothing (a comment), or None: it is malformed."""
    if not line or line.startswith(b"#"):
        return {}
    try:
        setting = _SETTING.fullmatch(line.decode())
    except UnicodeDecodeError:
        return None
    if setting is None:
        return None
    key, rest = setting.groups()
    if quoted := _QUOTED.fullmatch(rest.lstrip()):
        single, double = quoted.groups()
        return {key: single if double is None else _ESCAPE.sub(lambda match: _ESCAPES.get(match[1], match[1]), double)}
    value = _COMMENT.split(rest, maxsplit=1)[0].strip()
    return None if value.startswith("#") or "'" in value or '"' in value else {key: value}
