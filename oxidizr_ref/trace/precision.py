"""Other precisions, imitated: what an op reads and gives, rounded, cut or shaken as it passes.

``bf16`` and ``f16`` round every result (as a framework does that stores every array so), ``tf32`` the operands of products
alone (as tensor cores do: 10 bits of mantissa). Shaking moves every number by a unit in its last place at random; where
other correct programs round in another way or add in another order, their errors are of the size this leads to (Parker
1997, "Monte Carlo Arithmetic"; the idea is also that of CESTAC, Vignes 1993).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from oxidizr_ref import ops
from oxidizr_ref.backend import STORAGE_DTYPES, Array, xp_of
from oxidizr_ref.errors import TraceError

#: Ops that move numbers and never round any.
_MOVING = (ops.Reshape, ops.Transpose, ops.BroadcastTo, ops.GetItem, ops.Pad, ops.Concatenate, ops.Whole, ops.Part)
_EXACT = (*_MOVING, ops.Lookup, ops.TakeAlong, ops.Where, ops.Max)
#: Ops that add up many products or numbers: their error is that of the terms.
_SUMMING = (ops.MatMul, ops.Sum, ops.CumSum)


class Arithmetic:
    """What stands between ops. This one changes nothing."""

    def operands(self, node: Any, arrays: list[Array]) -> list[Array]:  # noqa: ARG002
        """What ``node`` reads instead of ``arrays``."""
        return arrays

    def result(self, node: Any, y: Array) -> Array:  # noqa: ARG002
        """What others read instead of ``y``, the result of ``node``."""
        return y

    def gradient(self, node: Any, dy: Array) -> Array:  # noqa: ARG002
        """What ``node`` reads instead of the gradient ``dy`` of its result."""
        return dy


class Rounded(Arithmetic):
    """Every result and every gradient rounded to ``bf16`` or ``f16``."""

    def __init__(self, dtype: str) -> None:
        self.dtype = STORAGE_DTYPES[dtype]

    def result(self, node: Any, y: Array) -> Array:
        return y if isinstance(node, _EXACT) else self._round(y)

    def gradient(self, node: Any, dy: Array) -> Array:  # noqa: ARG002
        return self._round(dy)

    def _round(self, x: Array) -> Array:
        return x.astype(self.dtype).astype(x.dtype)


class TensorFloat32(Arithmetic):
    """Operands of products rounded to the 10 bits of mantissa that NVIDIA's tensor cores read; all else as it is."""

    def operands(self, node: Any, arrays: list[Array]) -> list[Array]:
        return [self._round(x) for x in arrays] if isinstance(node, ops.MatMul) else arrays

    def gradient(self, node: Any, dy: Array) -> Array:
        return self._round(dy) if isinstance(node, ops.MatMul) else dy

    @staticmethod
    def _round(x: Array) -> Array:
        """To nearest, ties to even: adding half of what is cut, less a bit where the last bit kept is 0, then cutting."""
        xp = xp_of(x)
        bits = xp.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        cut = ((bits + (0xFFF + ((bits >> 13) & 1))) & np.uint32(0xFFFFE000)).view(np.float32).astype(x.dtype, copy=False)
        return xp.where(xp.isnan(x), x, cut)  # the bits of a NaN may become those of an infinity, or of 0


class Shaken(Arithmetic):
    """Every result, every gradient and every term of a sum moved by up to ``size`` of itself; on the host only."""

    def __init__(self, size: float, seed: int) -> None:
        self.size, self._random = size, np.random.Generator(np.random.Philox(key=seed))

    def operands(self, node: Any, arrays: list[Array]) -> list[Array]:
        return [self._shake(x) for x in arrays] if isinstance(node, _SUMMING) else arrays

    def result(self, node: Any, y: Array) -> Array:
        return y if isinstance(node, _EXACT) else self._shake(y)

    def gradient(self, node: Any, dy: Array) -> Array:
        return dy if isinstance(node, _MOVING) else self._shake(dy)

    def _shake(self, x: Array) -> Array:
        if x.dtype.kind != "f":
            return x
        drawn = self._random.random(x.shape, dtype=x.dtype)
        drawn *= 2 * self.size
        drawn += 1 - self.size
        drawn *= x
        return drawn


class Probe(NamedTuple):
    """A way to do a step in some precision: how parameters are stored, on the fused side or not, and what is imitated."""

    dtype: str
    fused: bool = False
    arithmetic: Arithmetic | None = None


def probes(precision: str, fused: bool = True) -> list[Probe]:
    """Ways to do the same step in a precision, whose errors show what that precision allows. Fresh ones at every call.

    Without ``fused`` one more that is shaken stands in for the fused side: of a tensor of a single number, two errors may
    both be small by chance. Raises TraceError where there is no such precision.
    """
    if precision not in PRECISIONS:
        raise TraceError(f"precision {precision}: expected one of {', '.join(PRECISIONS)}")
    if precision in ("f64", "f32"):
        unit = {"f64": 2.0**-52, "f32": 2.0**-23}[precision]
        other = Probe(precision, fused=True) if fused else Probe(precision, arithmetic=Shaken(unit, 3))
        plain = Probe("f32") if precision == "f32" else Probe("f64", arithmetic=Shaken(unit, 2))
        return [plain, other, Probe(precision, arithmetic=Shaken(unit, 1))]
    if precision == "tf32":
        return [Probe("f32", arithmetic=TensorFloat32()), Probe("f32", arithmetic=Shaken(2.0**-11, 1))]
    digits = {"bf16": 2.0**-8, "f16": 2.0**-11}[precision]
    return [Probe(precision, arithmetic=Rounded(precision)), Probe(precision, arithmetic=Shaken(digits, 1))]


PRECISIONS = ("f64", "f32", "tf32", "bf16", "f16")
EPS = {"f64": 2.0**-52, "f32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7, "f16": 2.0**-10}
