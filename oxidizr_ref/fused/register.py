"""The pairing of every fused operation with its plain reference, and the switch between the two."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Pair(NamedTuple):
    """A fused operation and the composition it must agree with: same signature, same result, same gradients."""

    fused: Callable[..., object]
    reference: Callable[..., object]


#: Every fused operation by name. Tests walk it.
REGISTER: dict[str, Pair] = {}

_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def reference() -> Iterator[None]:
    """Inside this context every operation runs as its plain composition: slower, and every intermediate exists."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def fused(plain: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a fused operation with its reference: ``@fused(rms_norm_ref)``. Callers need not know which one runs."""

    def pair(fast: Callable[P, R]) -> Callable[P, R]:
        name = fast.__name__
        assert plain.__name__ == f"{name}_ref" and name not in REGISTER, name
        REGISTER[name] = Pair(fast, plain)

        @functools.wraps(fast)
        def either(*args: P.args, **kwargs: P.kwargs) -> R:
            return plain(*args, **kwargs) if _plain.get() else fast(*args, **kwargs)

        return either

    return pair
