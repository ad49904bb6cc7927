"""Modules: named trees of parameters, and the three small ones every architecture uses.

A parameter is created with a recipe for its first value and filled later, once its full name is known: the random words
behind it are addressed by that name, so no parameter's value depends on how many others were drawn before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from oxidizr_ref import ops, rng
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import Array, assign, place, to_host
from oxidizr_ref.errors import DataError
from oxidizr_ref.fused.linear import linear
from oxidizr_ref.fused.rms_norm import rms_norm
from oxidizr_ref.watch import named, watching

#: (seed, full parameter name, shape) -> first value, float32.
Recipe: TypeAlias = Callable[[int, str, tuple[int, ...]], np.ndarray[Any, Any]]


def normal(std: float) -> Recipe:
    """Normal numbers of standard deviation ``std``."""
    return lambda seed, name, shape: rng.normal(seed, "init", name, shape, std)


def constant(value: float) -> Recipe:
    """The same number everywhere."""
    return lambda seed, name, shape: np.full(shape, value, dtype=np.float32)


def uniform(bound: float) -> Recipe:
    """Uniform numbers in [-bound, bound)."""

    def recipe(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        drawn = rng.uniform(seed, "init", name, 0, int(np.prod(shape, dtype=np.int64)))
        return ((2 * drawn - 1) * bound).astype(np.float32).reshape(shape)

    return recipe


class Parameter(Tensor):
    """A tensor that training changes. Empty until `Module.initialize` or `Module.load_state_dict` fills it."""

    __slots__ = ("full_shape", "recipe")

    def __init__(self, shape: tuple[int, ...], recipe: Recipe) -> None:
        super().__init__(np.empty(0, dtype=np.float32), requires_grad=True)
        self.full_shape, self.recipe = shape, recipe


class Module:
    """A part of a model. Its parameters and sub-modules are the attributes that hold them, named as they are.

    For whoever watches, each call of a module is a scope: what is named inside it has the module's name before its own.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        call = vars(cls).get("__call__")
        if call is not None:
            setattr(cls, "__call__", _as_scope(call))  # noqa: B010 - the type checker knows the methods as they are written

    def children(self) -> Iterator[tuple[str, Parameter | Module]]:
        """The parameters and sub-modules directly in this one, in the order they were created, by name."""
        for name, value in vars(self).items():
            if isinstance(value, Parameter | Module):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{index}", item) for index, item in enumerate(value))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module, its sub-modules and theirs, each with its full dotted name (of this one: "")."""
        yield prefix, self
        for name, child in self.children():
            if isinstance(child, Module):
                yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters with their full dotted names, in the order they were created."""
        for prefix, module in self.named_modules():
            for name, child in module.children():
                if isinstance(child, Parameter):
                    yield f"{prefix}.{name}" if prefix else name, child

    def num_parameters(self) -> int:
        """How many numbers training changes."""
        return sum(int(np.prod(p.full_shape, dtype=np.int64)) for _, p in self.named_parameters())

    def initialize(self, seed: int, dtype: np.dtype[Any], device: str = "cpu") -> None:
        """Fill every parameter by its recipe, stored as ``dtype`` on ``device``."""
        for name, parameter in self.named_parameters():
            parameter.data = place(parameter.recipe(seed, name, parameter.full_shape).astype(dtype, copy=False), device)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for _, parameter in self.named_parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Array]:
        """The live arrays of all parameters by name, not copies."""
        return {name: parameter.data for name, parameter in self.named_parameters()}

    def load_state_dict(self, arrays: Mapping[str, Array]) -> None:
        """Copy ``arrays`` (from any device) into the parameters' own arrays, converting to their dtype.

        Raises DataError naming the first name or shape that does not fit; then nothing was changed.
        """
        parameters = dict(self.named_parameters())
        odd = sorted(parameters.keys() ^ arrays.keys())
        if odd:
            where = "missing from the arrays" if odd[0] in parameters else "not a parameter of this model"
            raise DataError(f"load_state_dict: {odd[0]} is {where} ({len(odd)} such names)")
        for name, parameter in parameters.items():
            if arrays[name].shape != parameter.full_shape:
                found, wanted = list(arrays[name].shape), list(parameter.full_shape)
                raise DataError(f"load_state_dict: {name} has shape {found}, the model needs {wanted}")
        for name, parameter in parameters.items():
            assign(parameter.data, arrays[name])


def _as_scope(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def scoped(self: Module, *args: Any, **kwargs: Any) -> Any:
        watcher = watching()
        if watcher is None:
            return call(self, *args, **kwargs)
        watcher.enter(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            watcher.leave(self)

    return scoped


class Linear(Module):
    """``y = x Wᵀ``, weight ``[out, in]``, no bias."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.weight = Parameter((outputs, inputs), normal(std))

    def __call__(self, x: Tensor) -> Tensor:
        return named("output", linear(x, self.weight))


def host_ids(ids: Any) -> np.ndarray[Any, Any]:
    """``ids`` (an array anywhere, or lists) as an array on the host."""
    return to_host(ids) if hasattr(ids, "dtype") else np.asarray(ids)


def checked_ids(ids: Any, vocab_size: int, what: str) -> np.ndarray[Any, Any]:
    """`host_ids`, checked. Raises DataError naming an id outside [0, vocab_size).

    Nothing else checks them: a device would silently read something else instead.
    """
    checked = host_ids(ids)
    if checked.size and not (0 <= checked.min() and checked.max() < vocab_size):
        worst = int(checked.min()) if checked.min() < 0 else int(checked.max())
        raise DataError(f"{what} id {worst} is outside the vocabulary of {vocab_size} (ids 0 to {vocab_size - 1})")
    return checked


class Embedding(Module):
    """A row of numbers for every token id, weight ``[vocab, width]``."""

    def __init__(self, vocab_size: int, width: int, std: float) -> None:
        self.weight = Parameter((vocab_size, width), normal(std))

    def __call__(self, ids: Array) -> Tensor:
        """ids: int ``[...]``. Returns ``[..., width]``. Raises DataError for an id outside the vocabulary."""
        ids = checked_ids(ids, self.weight.shape[0], "token")
        return named("output", ops.lookup(self.weight, ids=ids), also=("tokens",))


class RMSNorm(Module):
    """Root-mean-square normalization of the last axis, or of each of ``groups`` parts of it. Weight ``[width]``."""

    def __init__(self, width: int, eps: float, groups: int = 1) -> None:
        self.weight, self.eps, self.groups = Parameter((width,), constant(1.0)), eps, groups

    def __call__(self, x: Tensor) -> Tensor:
        return named("output", rms_norm(x, self.weight, self.eps, self.groups))
