"""What a shell offers when somebody presses Tab. Where nothing fits, it offers files, as shells do."""

from __future__ import annotations

from pathlib import Path

import typer

from oxidizr_ref.backend import STORAGE_DTYPES
from oxidizr_ref.checkpoint.store import CheckpointStore
from oxidizr_ref.config import bundled_config_names
from oxidizr_ref.errors import OxidizrError
from oxidizr_ref.tokenizer_libraries import SPLINTR_NAMES


def configs() -> list[str]:
    """The bundled models, for ``-f``."""
    return list(bundled_config_names())


def tokenizers() -> list[str]:
    """Those that are known by a name."""
    return ["byte", "char", *SPLINTR_NAMES]


def dtypes() -> list[str]:
    """How weights can be stored."""
    return sorted(STORAGE_DTYPES)


def resume_words() -> list[str]:
    """What ``--resume`` takes beside files."""
    return ["auto"]


def checkpoints(ctx: typer.Context) -> list[str]:
    """What ``-c`` can choose in the directory of ``--checkpoint-dir``: its steps, and the words for two of them."""
    directory = ctx.params.get("checkpoint_dir") or Path("checkpoints")
    try:
        return ["latest", "final", *map(str, CheckpointStore(Path(directory)).steps())]
    except (OxidizrError, OSError):
        return ["latest", "final"]
