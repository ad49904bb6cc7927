"""The machine class: everything besides config, seed and data that can change a bit of a result.

Two processes of equal fingerprint compute equal bytes. It is stored in every checkpoint, so that a run which continues on
another kind of machine is told so.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
from typing import Any

import ml_dtypes
import numpy as np

from oxidizr_ref import parallel, rng
from oxidizr_ref.backend import module_of, to_host
from oxidizr_ref.version import NUMERICS_VERSION


@functools.cache
def fingerprint(device: str = "cpu") -> dict[str, Any]:
    """The machine class of this process, as JSON-able values."""
    facts = {
        "numerics": NUMERICS_VERSION,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        "blas": sorted(_describe(library) for library in parallel.blas_info()),
        "cpu_features": _cpu_features(),
        "device": device,
        "probe": _probe(np),
    }
    return facts | (_gpu() if device == "gpu" else {})


def _gpu() -> dict[str, Any]:
    """The device, and the libraries whose kernels run on it."""
    gpu = module_of("gpu")
    properties = gpu.cuda.runtime.getDeviceProperties(gpu.cuda.runtime.getDevice())
    name = properties["name"]
    return {
        "gpu": name.decode() if isinstance(name, bytes) else name,
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "cupy_version": gpu.__version__,
        "cuda": gpu.cuda.runtime.runtimeGetVersion(),
        "tf32": os.environ.get("CUPY_TF32", "0"),
        "gpu_probe": _probe(gpu),
    }


def _describe(library: dict[str, Any]) -> str:
    """Implementation, version and the *effective* core (an environment variable can select another than the CPU's)."""
    return " ".join(str(library.get(key)) for key in ("internal_api", "version", "architecture"))


def _cpu_features() -> str:
    """The instruction sets NumPy's own loops use here, those switched off by the environment left out."""
    features = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    return " ".join(sorted(name for name, present in features.items() if present))


def _probe(xp: Any) -> str:
    """A digest of small results from every kind of arithmetic used: products, reductions, ufuncs, the C library."""
    digest = hashlib.sha256()
    for dtype in (np.float32, np.float64):
        a: Any
        b: Any
        a, b = (xp.asarray(rng.normal(0, "probe", name, (67, 129)).astype(dtype)) for name in "ab")
        results = [xp.matmul(a, b.T), xp.matmul(a.T, b), a.sum(axis=1), a.sum(axis=0), a / b]
        if xp is np:
            results.append(np.add.reduceat(a, [0, 5, 40], axis=0))
        results += [function(xp.abs(a) + 1) for function in (xp.exp, xp.log, xp.sqrt, xp.tanh, xp.sin, xp.cos, xp.log1p)]
        for result in results:
            digest.update(np.ascontiguousarray(to_host(result)).tobytes())
    digest.update(repr([math.cos(0.3), 0.999**7, 1e4**0.125]).encode())
    return digest.hexdigest()
