"""Where a test computes: tests that take the fixture `device` run on NumPy, on a stand-in for CUDA, and on CuPy.

What such a test hands to the package goes through `place`, what it gets back through `host`. On NumPy both are nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cuda_on_host
import numpy as np
import pytest
import stand_in

from oxidizr_ref import backend

_current = "cpu"


@contextmanager
def computing_on(where: str, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Inside this context `place` leads to ``numpy``, ``stand-in`` or ``cupy``. Gives cpu or gpu.

    Skips the test where that cannot be had.
    """
    global _current
    if where == "stand-in":
        if not cuda_on_host.available():
            pytest.skip("no g++ here, which compiles the CUDA kernels for the stand-in")
        stand_in.install(patch)
    elif where == "cupy":
        why = backend._why_no_gpu()
        if why is not None:
            pytest.skip(f"no CUDA device to run on: {why}")
    _current = "cpu" if where == "numpy" else "gpu"
    try:
        yield _current
    finally:
        _current = "cpu"


def current() -> str:
    """``"cpu"`` or ``"gpu"``: where `place` leads."""
    return _current


def place(x: Any) -> Any:
    """An array (or a number) where the test computes: a NumPy array as it is, or a copy on the device."""
    x = np.asarray(x)
    return x if _current == "cpu" else backend.module_of("gpu").asarray(x)


def host(x: Any) -> np.ndarray[Any, Any]:
    """What was computed, as a NumPy array."""
    return backend.to_host(x)
