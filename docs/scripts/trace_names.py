"""Write docs/trace_names.md: every name in a trace, by layer type, read from recorded steps of small models.

``python docs/scripts/trace_names.py``. A test makes the page again and compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from oxidizr_ref.config import load_config
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.trace.file import Record
from oxidizr_ref.trace.names import END_MEANINGS, meaning
from oxidizr_ref.trace.precision import Probe
from oxidizr_ref.trace.record import Recorded, repeat
from oxidizr_ref.trainer import Trainer

PAGE = Path(__file__).parent.parent / "trace_names.md"

#: Headline, bundled model, changes to it, and where in the model the names of the table begin.
TABLES: list[tuple[str, str, Sequence[str], str]] = [
    ("The model", "tiny-hybrid", (), ""),
    ("A layer of attention and feed-forward", "tiny-llama", (), "layers.1."),
    ("GQA", "tiny-llama", (), "layers.1.self_attn."),
    ("MLA", "tiny-mla-moe", ("mla_latent_norm=true",), "layers.1.self_attn."),
    ("SwiGLU", "tiny-llama", (), "layers.1.mlp."),
    ("Mixture of experts", "tiny-mla-moe", ("shared_expert_enabled=true",), "layers.1.moe."),
    ("Mamba1", "tiny-mamba1", (), "layers.1."),
    ("Mamba2", "tiny-mamba2", (), "layers.1."),
    ("Mamba3", "tiny-mamba3-mimo", ("mamba3_use_conv=true",), "layers.1."),
]

HEAD = """# The names in a trace

Made by [docs/scripts/trace_names.py](scripts/trace_names.py) from recorded steps; see
[trace_format.md](trace_format.md) for how a file is put together, and for the letters.

Each table lists a part of a model in the order of execution: parameters first (as the step begins), then every value that
has a name. `{i}` is the number of a layer, `{e}` of an expert. Each name stands for several tensors, of which a trace holds
those that exist:

| name | what |
|---|---|
| `NAME` | the value, or a parameter before the step |
"""


class _Names:
    """A sink that keeps records and no numbers."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def add(self, record: Record, *_: object) -> None:
        self.records.append(record)

    def add_part(self, record: Record, *_: object) -> None:
        if record.name not in {known.name for known in self.records}:
            self.records.append(record)


def records_of(model: str, changes: Sequence[str] = ()) -> list[Record]:
    """All records of one step of a bundled model."""
    config = load_config(model, [*changes, "batch_size=1", "max_seq_len=4", "model.dtype=f32"])
    batch = Trainer(config, LanguageModel(config.model)).windows.batch(0, 1)
    sink = _Names()
    weights = LanguageModel(config.model, seed=0).state_dict()
    repeat(Recorded(config, [batch], weights, 1, 1, {}), sink, Probe("f32"))
    return sink.records


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip()]
    for end, what in END_MEANINGS.items():
        name = f"{end}.NAME" if end.startswith("optimizer") else f"NAME{end}"
        lines.append(f"| `{name}` | {what.equation} |")
    for headline, model, changes, begin in TABLES:
        general = re.sub(r"\.1\.", ".{i}.", begin)
        where = f"All begin with `{general}`." if begin else "Outside the layers."
        lines += ["", f"## {headline}", "", f"{where} Shapes of parameters are those of `{model}`.", ""]
        lines += ["| name | shape | op | equation |", "|---|---|---|---|"]
        lines += dict.fromkeys(_rows(records_of(model, changes), begin))
    return "\n".join(lines) + "\n"


def _rows(records: list[Record], begin: str) -> Iterator[str]:
    parts = {".".join(begin.split(".")[:2]) + ".", *(t[3] for t in TABLES if t[3].startswith(begin) and t[3] != begin)}
    for record in records:
        name = record.name
        if record.role not in ("parameter", "input", "output") or not name.startswith(begin):
            continue
        if not begin and name.startswith("layers."):
            continue
        if begin == "layers.1." and any(name.startswith(part) for part in parts - {begin}):
            continue
        shown = re.sub(r"experts\.[0-9]+", "experts.{e}", name.removeprefix(begin))
        found = meaning(name)
        if found is None:
            yield f"| `{shown}` | `{list(record.shape) or ''}` | parameter | as the step begins |"
        else:
            yield f"| `{shown}` | `{found.shape}` | {found.op} | {found.equation.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
