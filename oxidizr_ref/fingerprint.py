"""The machine class: everything besides config, seed and data that can change a bit of a result.

Two processes of equal fingerprint compute equal bytes. It is stored in every checkpoint, so that a run which continues on
another kind of machine is told so.
"""

from __future__ import annotations

import functools
import hashlib
import math
import platform
from typing import Any

import ml_dtypes
import numpy as np

from oxidizr_ref import parallel, rng
from oxidizr_ref.version import NUMERICS_VERSION


@functools.cache
def fingerprint(device: str = "cpu") -> dict[str, Any]:
    """The machine class of this process, as JSON-able values."""
    return {
        "numerics": NUMERICS_VERSION,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        "blas": sorted(_describe(library) for library in parallel.blas_info()),
        "cpu_features": _cpu_features(),
        "device": device,
        "probe": _probe(),
    }


def _describe(library: dict[str, Any]) -> str:
    """Implementation, version and the *effective* core (an environment variable can select another than the CPU's)."""
    return " ".join(str(library.get(key)) for key in ("internal_api", "version", "architecture"))


def _cpu_features() -> str:
    """The instruction sets NumPy's own loops use here, those switched off by the environment left out."""
    features = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    return " ".join(sorted(name for name, present in features.items() if present))


def _probe() -> str:
    """A digest of small results from every kind of arithmetic used: products, reductions, ufuncs, the C library."""
    digest = hashlib.sha256()
    for dtype in (np.float32, np.float64):
        a: Any
        b: Any
        a, b = (rng.normal(0, "probe", name, (67, 129)).astype(dtype) for name in "ab")
        results = [a @ b.T, a.T @ b, a.sum(axis=1), a.sum(axis=0), a / b, np.add.reduceat(a, [0, 5, 40], axis=0)]
        results += [function(np.abs(a) + 1) for function in (np.exp, np.log, np.sqrt, np.tanh, np.sin, np.cos, np.log1p)]
        for result in results:
            digest.update(np.ascontiguousarray(result).tobytes())
    digest.update(repr([math.cos(0.3), 0.999**7, 1e4**0.125]).encode())
    return digest.hexdigest()
