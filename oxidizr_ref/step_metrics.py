"""The numbers of training steps: asked for when a step is, looked at when they are here.

On the host they are here at once. A device computes a step while the next one is being asked for: its numbers are looked
at a step late, so that it never waits; those of a step that is logged are waited for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oxidizr_ref.backend import Array
from oxidizr_ref.checkpoint.records import Record
from oxidizr_ref.layers.feed_forward import Routing, router_metrics
from oxidizr_ref.transfers import Reading


@dataclass(frozen=True)
class StepNumbers:
    """What a step is told by: on a device its arrays hold one element each.

    n: counted from 1. loss, norm (of the gradients): float64. loss_scale: only for f16 on a device. routed: what the routers
    did, of every micro-batch.
    """

    n: int
    loss: Array
    norm: float | Array
    loss_scale: Array | None
    learning_rate: float
    epoch: float
    routed: Sequence[Sequence[Routing]]


class StepMetrics:
    """Steps whose numbers were not looked at, and the metrics of the newest one whose were.

    ``must_be_finite(n, what, value)`` raises TrainingError for a value that is not.
    """

    def __init__(self, must_be_finite: Callable[[int, str, float], None]) -> None:
        self._must_be_finite = must_be_finite
        self._unread: deque[tuple[StepNumbers, Reading]] = deque()  # oldest first
        self._newest: Record = {}

    def add(self, step: StepNumbers) -> None:
        """Ask for the numbers of a step; where they are here at once, look at them. Raises TrainingError as `look`."""
        scale = [] if step.loss_scale is None else [step.loss_scale]
        balances = [routing.balance.data for batch in step.routed for routing in batch]
        reading = Reading([step.loss, step.norm, *scale, *balances])
        self._unread.append((step, reading))
        if reading.at_once:
            self.look()

    def look(self, wait: bool = True) -> Record:
        """Look at the numbers of the steps; without ``wait``, of all but the last one (unless no other was ever looked at).

        Returns the metrics of the newest. Raises TrainingError for a step that went wrong.
        """
        while len(self._unread) > (0 if wait or not self._newest else 1):
            self._newest = self._metrics(*self._unread.popleft())
        return dict(self._newest)

    def _metrics(self, step: StepNumbers, reading: Reading) -> Record:
        loss, norm, *rest = reading.numbers()
        self._must_be_finite(step.n, "the loss", loss)
        scaling = {} if step.loss_scale is None else {"loss_scale": rest.pop(0)}
        if scaling.get("loss_scale", 0.0) < 1:  # with a scale, gradients that overflow are skipped; below 1, it is no help
            self._must_be_finite(step.n, "the gradient norm", norm)
        return {
            "step": step.n,
            "loss": loss,
            "grad_norm": norm if math.isfinite(norm) else None,  # JSON has no infinity
            "learning_rate": step.learning_rate,
            "epoch": step.epoch,
            **scaling,
            **router_metrics(step.routed, rest),
        }
