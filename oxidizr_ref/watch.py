"""Watching a computation from outside: names for what passes, and a place to look at it, or to bend it.

Model code says ``scores = named("scores", …)`` where a quantity has a name in the literature. Unless somebody watches, that
costs one look-up and does nothing. Whoever watches (`trace`) is told of every op, of every named value and of its gradient.
This is also how another precision is imitated: a watcher may return other numbers than it was shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from oxidizr_ref.backend import Array

T = TypeVar("T")


class Part(NamedTuple):
    """Place ``at``, of ``length`` places, along a new first axis (time, for the states of a recurrence)."""

    at: int
    length: int


class Watcher:
    """Told of everything that happens inside `watched`. This one lets all of it pass; nodes are `autograd.Function`."""

    def enter(self, module: Any) -> None:
        """A module is called."""

    def leave(self, module: Any) -> None:
        """The call is over."""

    def operands(self, node: Any, arrays: list[Array]) -> list[Array]:  # noqa: ARG002
        """What an op is about to read."""
        return arrays

    def result(self, node: Any, y: Array) -> Array:  # noqa: ARG002
        """What it computed."""
        return y

    def named(self, name: str, x: Any, part: Part | None, also: tuple[str, ...]) -> Any:  # noqa: ARG002
        """A value has a name: a `Tensor`, or an array of integers. Returns what to go on with. See `named`."""
        return x

    def gradient(self, node: Any, dy: Array) -> Array:  # noqa: ARG002
        """The whole gradient of an op's result, before it goes on to the op's operands."""
        return dy

    def walked(self) -> None:
        """The backward pass is over."""


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)

#: The watcher of this context, or None.
watching = _watcher.get


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside this context ``watcher`` is told of everything."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def named(name: str, x: T, part: Part | None = None, also: tuple[str, ...] = ()) -> T:
    """Tell whoever watches that ``x`` (a tensor, or an array of integers) is what is called ``name`` in this module.

    part: ``x`` is one of several that together carry the name. also: names in this module that ``x`` depends on by another
    way than the tape, such as the integers it was looked up by. Returns ``x``, or what the watcher puts in its place.
    """
    watcher = _watcher.get()
    return x if watcher is None else watcher.named(name, x, part, also)
