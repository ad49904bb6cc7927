"""oxidizr_ref: a language-model trainer from scratch on NumPy, whose training resumes to the same bits.

The public names are loaded on first use, so that ``import oxidizr_ref`` itself costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from oxidizr_ref import pictured
from oxidizr_ref.version import __version__

if TYPE_CHECKING:
    from oxidizr_ref import checkpoint, trace
    from oxidizr_ref.autograd import Tensor, no_grad
    from oxidizr_ref.config import load_config
    from oxidizr_ref.fused.register import reference
    from oxidizr_ref.model import LanguageModel
    from oxidizr_ref.optim import AdamW
    from oxidizr_ref.report.graph import draw_graph
    from oxidizr_ref.trainer import Trainer

__all__ = [
    "AdamW",
    "LanguageModel",
    "Tensor",
    "Trainer",
    "__version__",
    "checkpoint",
    "draw_graph",
    "load_config",
    "no_grad",
    "reference",
    "trace",
]

_HOME = {
    "AdamW": "optim",
    "LanguageModel": "model",
    "Tensor": "ops",  # which attaches the operators
    "Trainer": "trainer",
    "draw_graph": "report.graph",
    "load_config": "config",
    "no_grad": "autograd",
    "reference": "fused.register",
}

# The one place above all floors says who draws the pictures of values below; see `pictured`.
pictured.artist = lambda: importlib.import_module("oxidizr_ref.report.pictures")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"oxidizr_ref.{_HOME[name]}"), name)
    if name in ("checkpoint", "trace"):
        return importlib.import_module(f"oxidizr_ref.{name}")
    raise AttributeError(f"module 'oxidizr_ref' has no attribute {name!r}")
