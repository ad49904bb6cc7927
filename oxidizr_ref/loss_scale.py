"""Dynamic loss scaling (Micikevicius et al. 2018, "Mixed precision training", section 3.2), for f16 on a device.

There products read gradients in f16, whose smallest number is 6e-8: the loss is multiplied by a scale before the backward
pass, and the gradients are divided by it before they are used. Where they overflow, the update is skipped and the scale
halved; after `GROWTH_INTERVAL` updates in a row it is doubled. All of it is decided on the device, and nobody waits for the
decision. (On the host f16 is computed in float32, and needs none of this.)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from oxidizr_ref.backend import Array, module_of
from oxidizr_ref.kernels import Kernel

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


class LossScale:
    """The scale, and what it depends on. All on the device."""

    def __init__(self) -> None:
        xp = module_of("gpu")
        self.scale = xp.full((), INITIAL_SCALE, dtype=np.float64)
        self.good_steps = xp.zeros((), dtype=np.int64)  # updates since the scale was changed
        self.skipped = xp.zeros((), dtype=np.int64)  # updates that came to nothing, in all

    def seed(self) -> Array:
        """The gradient of the loss that a backward pass begins with, float32 ``[]``."""
        return self.scale.astype(np.float32)

    def update(self, norm: Array) -> None:
        """Another step is done, with gradients of this norm (float64 ``[]``), finite or not."""
        _UPDATE.threads(1, norm, self.scale, self.good_steps, self.skipped, GROWTH_INTERVAL)

    def state(self) -> dict[str, Any]:
        """For a checkpoint. Waits for the device."""
        return {
            "scale": float(self.scale.item()),
            "good_steps": int(self.good_steps.item()),
            "skipped": int(self.skipped.item()),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.scale.fill(state["scale"])
        self.good_steps.fill(state["good_steps"])
        self.skipped.fill(state["skipped"])


_UPDATE = Kernel("""
__global__ void update_scale(const T* norm, T* scale, long long* good_steps, long long* skipped, long long growth_interval) {
    if (THREAD > 0) return;
    if (!isfinite(norm[0])) {
        scale[0] /= 2;
        good_steps[0] = 0;
        skipped[0]++;
    } else if (++good_steps[0] == growth_interval) {
        scale[0] *= 2;
        good_steps[0] = 0;
    }
}
""")
