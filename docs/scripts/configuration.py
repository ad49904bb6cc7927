"""Writes docs/configuration.md from the config's own definition: ``python docs/scripts/configuration.py``.

With ``--check`` it writes nothing and ends with 1 if the page is not what it would write.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from pydantic_core import PydanticUndefined

from oxidizr_ref import config_keys
from oxidizr_ref.config import OPERATIONAL_KEYS

PAGE = Path(__file__).parents[1] / "configuration.md"

HEAD = """# Configuration

A config is a YAML file with the sections `model`, `trainer` and `data`. `-f` takes its path or a bundled name; any key can
be overridden with `--set SECTION.KEY=VALUE`. `null` means absent. Unknown keys, wrong types and broken constraints are
reported all at once, with file, line and the nearest valid key. `data.path` is relative to the config file,
`checkpoint_dir` to the current directory.

Keys marked *operational* change no bit of a checkpoint. This page is made by `docs/scripts/configuration.py`.
"""


def page() -> str:
    """The whole page."""
    sections = (("model", config_keys.ModelConfig), ("trainer", config_keys.TrainerConfig), ("data", config_keys.DataConfig))
    parts = [HEAD]
    for name, section in sections:
        comments = _comments(section)
        parts.append(f"\n## `{name}`\n\n{inspect.getdoc(section)}\n\n| key | default | notes |\n|---|---|---|\n")
        for key, info in section.model_fields.items():
            default = "required" if info.default is PydanticUndefined else f"`{_yaml(info.default)}`"
            notes = [comments.get(key, ""), "*operational*" if name == "trainer" and key in OPERATIONAL_KEYS else ""]
            parts.append(f"| `{key}` | {default} | {'; '.join(note for note in notes if note)} |\n")
    return "".join(parts)


def _comments(section: type) -> dict[str, str]:
    """The remark behind each key's line in the source."""
    pattern = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(section)))


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
