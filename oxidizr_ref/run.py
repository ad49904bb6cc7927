"""A run from outside: how it is to be carried out, what it tells while it goes on, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oxidizr_ref.backend import Array
from oxidizr_ref.checkpoint.records import Record

if TYPE_CHECKING:
    from oxidizr_ref.trainer import Trainer


@dataclass(frozen=True)
class FirstWeights:
    """What a fresh run starts with instead of its config's first weights: by name, from where, and with which lineage."""

    weights: Mapping[str, Array]
    what: str
    lineage: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out. Nothing here but ``init_from`` changes a bit of a checkpoint.

    resume: a path, ``auto``, or None for a fresh start. init_from: another model's weights for a fresh run.
    time_limit: seconds, counted from ``began`` (of `time.monotonic`; None: when `fit` is called), within which the run saves
    and ends. See the command line's help for the others.
    """

    resume: str | None = None
    init_from: FirstWeights | None = None
    overwrite: bool = False
    allow_mismatch: frozenset[str] = frozenset()
    strict: bool = False
    prefetch: int = 0
    time_limit: float | None = None
    began: float | None = None


class Reporter:
    """What a run tells while it goes on. This one keeps silent; the command line's draw a bar or print JSON."""

    def notice(self, text: str) -> None:
        """Something the user should know, in one line."""

    def begin(self, trainer: Trainer) -> None:
        """Training starts, or continues, at ``trainer.step``."""

    def step(self, record: Record, logged: bool) -> None:
        """A step was done; ``logged``: it is one that goes to the metrics."""

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""

    def end(self) -> None:
        """The run is over, well or not."""


class Witness:
    """Shown the numbers of every step, so that they can be recorded. This one looks away; `trace` has one that records.

    None of the arrays may be kept or changed: they are the live ones.
    """

    def batch(self, step: int, micro: int, tokens: Array, targets: Array) -> None:
        """A micro-batch (counted from 1) of a step (counted from 1) is about to be computed: int ``[B,T]`` each."""

    def gradients(self, summed: Mapping[str, Array], norm: float, clip_factor: float, learning_rate: float) -> None:
        """The step's whole gradient by parameter, before it is multiplied by ``clip_factor``."""

    def updated(self, weights: Mapping[str, Array], optimizer: Mapping[str, Array]) -> None:
        """The step is done: parameters by name, optimizer slots as ``<slot>.<parameter>``."""


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.fit` ended: the signal that stopped it (None: by itself) and the held-out loss (None: none held out)."""

    stopped_by: int | None = None
    eval_loss: float | None = None
