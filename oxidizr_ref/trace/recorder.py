"""What happens in a training step, as a stream of records: the watcher of the ops and the witness of the trainer in one.

Every value with a name is passed on as it is computed, every gradient as the backward pass reaches it, so nothing is kept.
From the tape the recorder reads which named values each was computed from: that is what lets a comparison say that an op is
wrong although its inputs are right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import Witness
from oxidizr_ref.trace.file import Record, role_of
from oxidizr_ref.trace.names import PARAMETER, layer_of, meaning, nearest, parse
from oxidizr_ref.trace.precision import Arithmetic
from oxidizr_ref.watch import Part, Watcher

WHAT = ("forward", "backward", "optimizer")


class Sink(Protocol):
    """Where records go: a file, or a comparison."""

    def add(self, record: Record, array: Array, times: float = 1.0) -> None:
        """A whole array, to be multiplied by ``times``. Not to be kept: it is a live one."""

    def add_part(self, record: Record, array: Array, at: int, length: int) -> None:
        """Place ``at`` of ``length`` along a first axis that ``array`` does not have."""


class Recorder(Watcher, Witness):
    """Passes on what ``model`` computes while it is watched and its trainer has this as its witness.

    what: some of `WHAT`. layers: only of these, and what belongs to none; None: of all. arithmetic: another precision to
    imitate. given: integers to go on with in place of those computed, by name: the experts another run chose. The tokens
    and the parameters of the first step always come, so that anybody can do the step again.
    """

    def __init__(
        self,
        model: LanguageModel,
        sink: Sink,
        what: Collection[str] = WHAT,
        layers: Collection[int] | None = None,
        arithmetic: Arithmetic | None = None,
        given: Mapping[str, Array] = MappingProxyType({}),
    ) -> None:
        self.sink, self.what, self.layers, self.given = sink, what, layers, given
        self.arithmetic = arithmetic or Arithmetic()
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._scopes = [""]
        self._step, self._micro = 1, 1
        self._names: WeakKeyDictionary[Function, list[tuple[str, Part | None]]] = WeakKeyDictionary()
        self._inputs: dict[str, tuple[str, ...]] = {}  # of every name there is, passed on or not
        self._passed: set[str] = set()
        self._readers: dict[str, list[str]] = {}  # of every name, the values computed from it
        for name, array in model.state_dict().items():
            self._pass(Record(name, "parameter", array.shape, op=PARAMETER.op, layer=layer_of(name)), array)

    # --- forward ------------------------------------------------------------------------------------------------------

    def enter(self, module: Any) -> None:
        self._scopes.append(self._modules.get(id(module), self._scopes[-1]))

    def leave(self, module: Any) -> None:  # noqa: ARG002
        self._scopes.pop()

    def operands(self, node: Any, arrays: list[Array]) -> list[Array]:
        return self.arithmetic.operands(node, arrays)

    def result(self, node: Any, y: Array) -> Array:
        return self.arithmetic.result(node, y)

    def named(self, name: str, x: Any, part: Part | None, also: tuple[str, ...]) -> Any:
        scope = self._scopes[-1]
        full = self._full(f"{scope}.{name}" if scope else name)
        node = x.node if isinstance(x, Tensor) else None
        inputs = dict.fromkeys(self._read_by(node)) if node is not None else {}
        inputs |= dict.fromkeys(filter(None, (self._resolve(scope, other) for other in also)))
        inputs.pop(full, None)  # of a recurrence: an earlier place of the same
        for other in inputs:
            readers = self._readers.setdefault(other, [])
            if full not in readers:
                readers.append(full)
        self._inputs[full] = tuple(dict.fromkeys((*self._inputs.get(full, ()), *inputs)))
        if node is not None:
            self._names.setdefault(node, []).append((full, part))
        if "forward" in self.what:
            self._pass(self._record(full), x.data if isinstance(x, Tensor) else x, part)
        return self.given.get(full, x)

    def _full(self, name: str) -> str:
        step = f"step.{self._step}." if self._step > 1 else ""
        return f"{step}micro.{self._micro}.{name}" if self._micro > 1 else f"{step}{name}"

    def _resolve(self, scope: str, name: str) -> str | None:
        """The value called ``name`` in this module, or in the nearest one around it that has such a value."""
        while True:
            full = self._full(f"{scope}.{name}" if scope else name)
            if full in self._inputs:
                return full
            if not scope:
                return None
            scope = scope.rpartition(".")[0]

    def _read_by(self, node: Function) -> Iterator[str]:
        """The names that a value was computed from: up the tape, no further than to the next named value."""
        if node in self._names:  # one value of two names
            yield self._names[node][-1][0]
            return
        seen, stack = {node}, [node]
        while stack:
            for parent in stack.pop().living_parents():
                if isinstance(parent, Tensor):
                    if id(parent) in self._parameters:
                        yield self._now(self._parameters[id(parent)])
                elif parent is not None and parent not in seen:
                    seen.add(parent)
                    if parent in self._names:
                        yield self._names[parent][-1][0]
                    else:
                        stack.append(parent)

    def _now(self, parameter: str) -> str:
        """The name of a parameter as this step finds it: as it began, or as the step before left it."""
        before = f"step.{self._step - 1}." if self._step > 2 else ""
        return parameter if self._step == 1 else f"{before}{parameter}.after"

    # --- backward -----------------------------------------------------------------------------------------------------

    def gradient(self, node: Any, dy: Array) -> Array:
        dy = self.arithmetic.gradient(node, dy)
        for name, part in reversed(self._names.get(node, [])):
            self._gradient_of(name, dy, part)
        return dy

    def _gradient_of(self, name: str, array: Array, part: Part | None = None) -> None:
        grad = self._ended(name, ".grad")
        if grad not in self._inputs:
            read = [self._ended(reader, ".grad") for reader in self._readers.get(name, ())]
            read = [gradient for gradient in read if gradient in self._inputs]
            forward = [other for reader in self._readers.get(name, ()) for other in (*self._inputs[reader], reader)]
            self._inputs[grad] = tuple(dict.fromkeys((*read, *forward)))
        if "backward" in self.what:
            readers = dict.fromkeys(_op(reader) for reader in self._readers.get(name, ()))
            self._pass(replace(self._record(grad), op=f"backward of {', '.join(readers) or 'nothing'}"), array, part)

    def _ended(self, name: str, end: str) -> str:
        """``name``, or of a parameter that a step before left, its own name in this step, with another end."""
        if not name.endswith(".after"):
            return name + end
        return (f"step.{self._step}." if self._step > 1 else "") + parse(name).path + end

    # --- the step, from the trainer -----------------------------------------------------------------------------------

    def batch(self, step: int, micro: int, tokens: Array, targets: Array) -> None:
        self._step, self._micro = step, micro
        for name, ids in (("tokens", tokens), ("targets", targets)):
            full = self._full(name)
            self._inputs[full] = ()
            self._pass(self._record(full), ids)

    def gradients(self, summed: Mapping[str, Array], norm: float, clip_factor: float, learning_rate: float) -> None:
        self._micro = 1
        for name, array in summed.items():
            self._gradient_of(self._now(name), array)
        grads = {name: self._full(f"{name}.grad") for name in summed}
        norm_, factor, rate = (self._full(name) for name in ("grad_norm", "clip_factor", "learning_rate"))
        self._inputs |= {norm_: tuple(grads.values()), factor: (norm_,), rate: ()}
        self._inputs |= {f"{grad}.clipped": (grad, factor) for grad in grads.values()}
        if "optimizer" not in self.what:
            return
        for name, number in ((norm_, norm), (factor, clip_factor), (rate, learning_rate)):
            self._pass(self._record(name), np.asarray(number))
        for name, array in summed.items():
            self._pass(self._record(f"{grads[name]}.clipped"), array, times=clip_factor)

    def updated(self, weights: Mapping[str, Array], optimizer: Mapping[str, Array]) -> None:
        step, rate = self._step, self._full("learning_rate")
        slots: dict[str, list[str]] = {}
        for key, array in optimizer.items():
            parameter = key.partition(".")[2]
            name = self._full(f"optimizer.{key}")
            before = f"step.{step - 1}.optimizer.{key}" if step > 2 else f"optimizer.{key}"
            self._inputs[name] = (self._full(f"{parameter}.grad.clipped"), *((before,) if step > 1 else ()))
            slots.setdefault(parameter, []).append(name)
            if "optimizer" in self.what:
                self._pass(self._record(name), array)
        for parameter, array in weights.items():
            after = self._full(f"{parameter}.after")
            self._inputs[after] = (self._now(parameter), *slots.get(parameter, ()), rate)
            if "optimizer" in self.what:
                self._pass(self._record(after), array)

    # --- passing on ---------------------------------------------------------------------------------------------------

    def _record(self, name: str) -> Record:
        inputs = nearest(self._inputs[name], self._passed, lambda other: self._inputs.get(other, ()))
        return Record(name, role_of(name), (), inputs, _op(name), layer_of(name))

    def _pass(self, record: Record, array: Array, part: Part | None = None, times: float = 1.0) -> None:
        always = record.role in ("input", "parameter")
        if self.layers is not None and record.layer is not None and record.layer not in self.layers and not always:
            return
        self._inputs.setdefault(record.name, ())
        self._passed.add(record.name)
        if part is None:
            self.sink.add(record, array, times)
        else:
            self.sink.add_part(record, array, part.at, part.length)


def _op(name: str) -> str:
    found = meaning(name)
    return found.op if found else ""
