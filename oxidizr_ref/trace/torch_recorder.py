"""A trace of a PyTorch model, under the names of this package: hooks on its modules, notes inside them.

Nothing here imports PyTorch; what it is handed behaves as tensors, modules and optimizers do there. A step reads::

    with TorchRecorder("theirs.safetensors", precision="f32") as recorder:
        recorder.watch(model)                       # the result of every module, as MODULE.output
        recorder.inputs(tokens, targets)
        recorder.parameters(model.named_parameters())
        loss = …                                    # inside it: recorder.note("layers.0.self_attn.scores", scores)
        loss.backward()
        recorder.gradients(model.named_parameters())
        norm = clip_grad_norm_(model.parameters(), 1.0)
        recorder.clipped(model.named_parameters(), norm)
        optimizer.step()
        recorder.updated(model.named_parameters(), optimizer)
        recorder.next_step()                        # and so on; zero_grad as usual

All but ``watch`` and ``note`` may be left out: a comparison takes what is there. Names that are not this package's are
translated when traces are compared, or here by ``rename``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from oxidizr_ref.trace.writer import TraceWriter

Named = Iterable[tuple[str, Any]]


class TorchRecorder:
    """Writes what a PyTorch model computes to a trace; see the top of this file.

    precision: what it computes in: ``f64``, ``f32``, ``tf32``, ``bf16`` or ``f16``. rename: their names to ours.
    """

    def __init__(self, path: str | Path, precision: str = "f32", rename: Callable[[str], str] | None = None) -> None:
        self._writer = TraceWriter(path, precision, {"made_by": "PyTorch"})
        self._rename = rename or (lambda name: name)
        self._step, self._micro = 1, 1
        self._hooks: list[Any] = []
        self._waiting: dict[
            str, tuple[tuple[int, ...], tuple[int, int] | None]
        ] = {}  # values whose gradient did not come yet

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._waiting.clear()  # gradients that come later belong to nobody
        self._writer.__exit__(kind, error, trace)

    # --- values and their gradients -----------------------------------------------------------------------------------

    def watch(self, model: Any) -> None:
        """From now on record the result of every module as ``MODULE.output``; of several results, ``MODULE.output.0``, ….

        Of a module called again in the same micro-batch (an activation that experts share, a layer that gradient
        checkpointing computes again) the first call counts.
        """
        for name, module in model.named_modules():
            if name:
                self._hooks.append(module.register_forward_hook(self._after(f"{name}.output")))

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            several = output if isinstance(output, tuple | list) else [output]
            for i, value in enumerate(several):
                full = name if len(several) == 1 else f"{name}.{i}"
                if hasattr(value, "detach") and self._full(self._rename(full)) not in self._writer:
                    self.note(full, value)

        return hook

    def note(self, name: str, tensor: Any, part: tuple[int, int] | None = None) -> Any:
        """Record ``tensor`` now and its gradient when that comes. part: place and length of a new first axis, such as time.

        Returns ``tensor``.
        """
        name = self._full(self._rename(name))
        shape = self._write(name, tensor, part)
        if getattr(tensor, "requires_grad", False):
            key = name if part is None else f"{name}[{part[0]}]"
            self._waiting[key] = shape, part
            tensor.register_hook(lambda gradient: self._arrived(name, key, gradient, part))
        return tensor

    def _arrived(self, name: str, key: str, gradient: Any, part: tuple[int, int] | None) -> None:
        if self._waiting.pop(key, None) is not None:
            self._write(f"{name}.grad", gradient, part)

    # --- the step -----------------------------------------------------------------------------------------------------

    def inputs(self, tokens: Any, targets: Any) -> None:
        """The batch, integers ``[batch, time]`` each."""
        self._write(self._full("tokens"), tokens)
        self._write(self._full("targets"), targets)

    def parameters(self, named: Named) -> None:
        """The parameters before the first step."""
        for name, parameter in named:
            self._write(self._rename(name), parameter)

    def next_batch(self) -> None:
        """What follows belongs to the next micro-batch of the same step."""
        self._micro += 1

    def gradients(self, named: Named) -> None:
        """The step's whole gradients, before clipping. One that does not exist counts as zero, of noted values too."""
        for key, (shape, part) in self._waiting.items():
            name = key if part is None else key.rpartition("[")[0]
            self._write(f"{name}.grad", np.zeros(shape), part)
        self._waiting.clear()
        self._micro = 1
        for name, parameter in named:
            self._write(self._full(f"{self._rename(name)}.grad"), _gradient_of(parameter))

    def clipped(self, named: Named, norm: Any = None, factor: Any = None, learning_rate: Any = None) -> None:
        """The gradients as the optimizer is to see them; their norm before clipping, their factor, the optimizer's rate."""
        numbers = {"grad_norm": norm, "clip_factor": factor, "learning_rate": learning_rate}
        for name, number in numbers.items():
            if number is not None:
                self._write(self._full(name), number)
        for name, parameter in named:
            self._write(self._full(f"{self._rename(name)}.grad.clipped"), _gradient_of(parameter))

    def updated(self, named: Named, optimizer: Any = None) -> None:
        """The parameters after the step, and what the optimizer keeps of each."""
        for name, parameter in named:
            ours = self._rename(name)
            self._write(self._full(f"{ours}.after"), parameter)
            for slot, value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).items():
                if tuple(getattr(value, "shape", ())) == tuple(parameter.shape) and slot != "step":
                    self._write(self._full(f"optimizer.{slot}.{ours}"), value)

    def next_step(self) -> None:
        """What follows belongs to the next step."""
        self._step, self._micro = self._step + 1, 1

    def _full(self, name: str) -> str:
        step = f"step.{self._step}." if self._step > 1 else ""
        return f"{step}micro.{self._micro}.{name}" if self._micro > 1 else f"{step}{name}"

    def _write(self, name: str, tensor: Any, part: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Returns the shape of what is written."""
        array = as_numpy(tensor)
        if part is None:
            self._writer.add(name, array)
        else:
            self._writer.add_part(name, array, *part)
        return tuple(array.shape)


def _gradient_of(parameter: Any) -> Any:
    return parameter.grad if parameter.grad is not None else np.zeros(tuple(parameter.shape))


def as_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    """A tensor of PyTorch as a NumPy array; dtypes that NumPy does not have as float32, which holds them exactly.

    Complex numbers come out as a last axis of real and imaginary part: a trace holds real ones only.
    """
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        tensor = tensor.float() if str(tensor.dtype) in ("torch.bfloat16", "torch.float16") else tensor
    array = np.asarray(tensor)
    return np.stack((array.real, array.imag), axis=-1) if array.dtype.kind == "c" else array
