"""AdamW, the global gradient norm, and learning-rate schedules, over dictionaries of named arrays.

Glossary: ``exp_avg``, ``exp_avg_sq`` are the moments m and v of the paper; ``n`` counts updates from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from oxidizr_ref import parallel, rng
from oxidizr_ref.backend import Array, assign, compute_dtype, on_device, to_compute, to_host, xp_of
from oxidizr_ref.errors import CheckpointError
from oxidizr_ref.optim_kernels import ADAMW_NUMBERS, adamw_kernel, norm_on_device

#: Names ending so are not pulled towards zero: norms, biases, and the decay and skip parameters of state space models.
NO_DECAY = ("norm.weight", "layernorm.weight", "bias", "A_log", ".D")

_F16, _BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


Gradients: TypeAlias = dict[str, Array]


def add_gradients(a: Gradients, b: Gradients) -> Gradients:
    """Sums of gradients of equal name, in place of the first: both are the caller's own."""
    names = sorted(a)

    def add(index: int) -> None:
        total = a[names[index]]
        total += b[names[index]]

    parallel.for_each(len(names), add, like=a[names[0]])
    return dict(a)


def decays(name: str) -> bool:
    """Whether weight decay acts on the parameter of this name."""
    return not name.endswith(NO_DECAY)


def global_norm(gradients: Mapping[str, Array]) -> float | Array:
    """The Euclidean norm of all gradients together: squares over fixed tiles, one tree, parameters in name order.

    A number; of gradients on a device, an array there, float64 ``[]``: nobody waits for it.
    """
    pieces = _pieces(gradients)
    if pieces and on_device(gradients[pieces[0][0]]):
        return norm_on_device(gradients)
    squares = [0.0] * len(pieces)

    def square(index: int) -> None:
        name, i, j = pieces[index]
        tile = gradients[name].reshape(-1)[i:j].astype(np.float64)
        squares[index] = float(np.dot(tile, tile))

    _for_pieces(pieces, square)
    return math.sqrt(parallel.tree_sum(squares)) if squares else 0.0


def clip_factor(norm: float | Array, max_norm: float) -> float | Array:
    """What gradients of this norm are multiplied by: ``min(1, max_norm / (norm + 1e-6))``; 1 where max_norm is 0.

    On a device NaN for a norm that is not finite: a factor with which `AdamW.step` does nothing.
    """
    if isinstance(norm, float):
        return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
    xp = xp_of(norm)
    factor = xp.minimum(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else xp.ones_like(norm)
    return xp.where(xp.isfinite(norm), factor, np.nan)


def learning_rate(n: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int, min_lr_ratio: float) -> float:
    """The learning rate of update ``n`` (1, 2, …, total_steps).

    It rises linearly to ``peak`` over ``warmup_steps``, then: ``constant`` stays; ``linear`` and ``cosine`` (Loshchilov &
    Hutter 2017) fall towards ``min_lr_ratio * peak``; ``wsd`` (warmup-stable-decay, Hu et al. 2024) stays and falls linearly
    over the last fifth of all steps. As in Hugging Face's schedules the end would be reached one update after the last,
    so that no update is wasted at a rate of 0; the first one is not either, since warm-up begins at 1/``warmup_steps``.
    """
    if n <= warmup_steps:
        return peak * n / warmup_steps
    if schedule == "constant":
        return peak
    begin = warmup_steps if schedule != "wsd" else max(warmup_steps, total_steps - total_steps // 5)
    done = min(1.0, max(0.0, (n - 1 - begin) / max(1, total_steps - begin)))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * shape)


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).

    ``arrays`` are the live parameters by name, changed in place. The moments are kept in the compute dtype, or in
    ``slot_dtype``, bf16. What is stored in 16 bits is updated in float32 and rounded stochastically: rounding to nearest
    would lose every update below half a unit in the last place (Zamirai et al. 2020), and with them the decay of the second
    moment; the random bits are addressed by (seed, slot, name, update, element).
    """

    SLOTS = ("exp_avg", "exp_avg_sq")
    #: The streams of random bits for what is stored: the parameter and its slots.
    _ROUNDING = ("rounding", "rounding.exp_avg", "rounding.exp_avg_sq")

    def __init__(
        self,
        arrays: Mapping[str, Array],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
        slot_dtype: np.dtype[Any] | None = None,
    ) -> None:
        for name, array in arrays.items():
            if not array.flags.c_contiguous:
                raise ValueError(f"{name} does not lie in C order, so it cannot be updated in place")
        self.arrays, self.lr, self.betas, self.eps, self.weight_decay, self.seed = arrays, lr, betas, eps, weight_decay, seed
        self.updates = 0
        self.slots = {slot: {name: _zeros_like(array, slot_dtype) for name, array in arrays.items()} for slot in self.SLOTS}
        self._pieces = _pieces(arrays)

    def step(
        self,
        gradients: Mapping[str, Array],
        lr: float | None = None,
        gradient_scale: float | Array = 1.0,
        skipped: Array | None = None,
    ) -> None:
        """One update of every parameter, with ``gradients * gradient_scale`` and learning rate ``lr`` (default: the own).

        On a device ``gradient_scale`` may be an array there, float64 ``[]``; if it is NaN, nothing is updated. ``skipped``:
        how many updates came to nothing in this way, int64 ``[]`` there, for the bias corrections.
        """
        if gradients.keys() != self.arrays.keys():
            raise KeyError(f"gradients and parameters differ in {sorted(gradients.keys() ^ self.arrays.keys())[:3]}")
        self.updates += 1
        rate = self.lr if lr is None else lr
        if any(on_device(array) for array in self.arrays.values()):
            self._update_on_device(gradients, rate, gradient_scale, skipped)
            return

        def update(index: int) -> None:
            self._update(*self._pieces[index], gradients, rate, float(gradient_scale))

        _for_pieces(self._pieces, update)

    def _update(self, name: str, i: int, j: int, gradients: Mapping[str, Array], lr: float, scale: float) -> None:
        """Elements i … j-1 of one parameter, all steps of the algorithm in one pass through the cache."""
        (beta1, beta2), n = self.betas, self.updates
        stored = [array.reshape(-1)[i:j] for array in self._stored(name)]
        # In the compute dtype of the parameter: an array that is stored in it is changed in place.
        p, m, v = (array.astype(compute_dtype(stored[0].dtype), copy=False) for array in stored)
        # m = β1 m + (1 - β1) g;  v = β2 v + (1 - β2) g²
        g = gradients[name].reshape(-1)[i:j] * ((1 - beta1) * scale)
        m *= beta1
        m += g
        g *= g
        g *= (1 - beta2) / (1 - beta1) ** 2
        v *= beta2
        v += g
        # p = p - lr wd p - lr m̂ / (sqrt(v̂) + eps),  m̂ = m / (1 - β1ⁿ),  v̂ = v / (1 - β2ⁿ) = v / root²
        root = math.sqrt(1 - beta2**n)
        denominator = np.sqrt(v, out=g)
        denominator += self.eps * root
        update = np.divide(m, denominator, out=g)
        update *= lr * root / (1 - beta1**n)
        if decays(name):
            p *= 1 - lr * self.weight_decay
        p -= update
        for array, exact, stream in zip(stored, (p, m, v), self._ROUNDING, strict=True):
            if exact is not array:
                words = rng.words(self.seed, stream, name, n, -(-len(exact) // 4), i // 4)
                array[...] = _ROUND[array.dtype](exact, words.view("<u2")[: len(exact)])

    def _stored(self, name: str) -> tuple[Array, Array, Array]:
        """A parameter and its slots."""
        return self.arrays[name], self.slots["exp_avg"][name], self.slots["exp_avg_sq"][name]

    def _update_on_device(
        self, gradients: Mapping[str, Array], lr: float, scale: float | Array, skipped: Array | None
    ) -> None:
        """The same as kernels: one for the numbers that all parameters share, one for each parameter."""
        (beta1, beta2), first = self.betas, next(iter(self.arrays.values()))
        xp = xp_of(first)
        scale = scale if isinstance(scale, xp.ndarray) else xp.full((), scale, dtype=np.float64)
        skipped = xp.zeros((), dtype=np.int64) if skipped is None else skipped
        shared = xp.empty(4, dtype=np.float64)
        ADAMW_NUMBERS.threads(1, scale, skipped, shared, self.updates, lr, beta1, beta2, self.eps)
        for name in sorted(self.arrays):
            p, m, v = self._stored(name)
            keep = 1 - lr * self.weight_decay if decays(name) else 1.0
            keys = [word for stream in self._ROUNDING for word in rng.key(self.seed, stream, name)]
            kernel = adamw_kernel(p.dtype, m.dtype)
            kernel.threads(
                -(-p.size // 4), gradients[name], p, m, v, shared, p.size, beta1, beta2, keep, self.updates, *keys
            )

    def state_dict(self) -> dict[str, Array]:
        """The live arrays of all slots, named ``<slot>.<parameter>``."""
        return {f"{slot}.{name}": array for slot in self.SLOTS for name, array in self.slots[slot].items()}

    def load_state_dict(self, arrays: Mapping[str, Array], updates: int) -> None:
        """Copy the slots and say how many updates they have seen.

        Raises CheckpointError for a slot that is missing, unknown or of another shape; then nothing was changed.
        """
        slots = self.state_dict()
        for name in sorted(slots.keys() | arrays.keys()):
            if name not in slots or name not in arrays or arrays[name].shape != slots[name].shape:
                raise CheckpointError(f"the optimizer slot {name} is missing, unknown, or of another shape")
        for name, slot in slots.items():
            assign(slot, arrays[name])
        self.updates = updates


def _round_to_bf16(p: Array, random: Array) -> Array:
    """Float32 to bf16, of expectation ``p``: add 16 random bits below the last one kept, then cut."""
    return ((p.astype(np.float32, copy=False).view(np.uint32) + random) >> 16).astype(np.uint16).view(_BF16)


def _round_to_f16(p: Array, random: Array) -> Array:
    """Float32 to f16, of expectation ``p``: 13 random bits likewise; below 2⁻¹⁴ f16 numbers are 2⁻²⁴ apart."""
    cut = ((p.view(np.uint32) + (random >> 3)) & np.uint32(0xFFFFE000)).view(np.float32)
    shaken = p.astype(np.float64) + ((random + 0.5) * 2.0**-16 - 0.5) * 2.0**-24  # never a tie
    return np.where(abs(p) < 2.0**-14, shaken, cut).astype(np.float16)


_ROUND = {_BF16: _round_to_bf16, _F16: _round_to_f16}


def first_not_finite(arrays: Mapping[str, Array]) -> str | None:
    """The first name, in name order, whose array holds a NaN or an infinity; None where all are finite.

    On a device this waits for it, once.
    """
    if any(on_device(array) for array in arrays.values()):
        names, xp = sorted(arrays), xp_of(next(iter(arrays.values())))
        whole = to_host(xp.stack([xp.isfinite(to_compute(arrays[name])).all() for name in names]))
        return next((name for name, fine in zip(names, whole, strict=True) if not fine), None)
    pieces = _pieces(arrays)
    finite = [True] * len(pieces)

    def check(index: int) -> None:
        name, i, j = pieces[index]
        tile = arrays[name].reshape(-1)[i:j]
        finite[index] = bool(np.isfinite(tile).all())

    _for_pieces(pieces, check)
    return next((pieces[index][0] for index, whole in enumerate(finite) if not whole), None)


def _zeros_like(array: Array, dtype: np.dtype[Any] | None) -> Array:
    return xp_of(array).zeros(array.shape, dtype=dtype or compute_dtype(array.dtype))


Piece = tuple[str, int, int]


def _pieces(arrays: Mapping[str, Any]) -> list[Piece]:
    """All arrays, in name order, cut into pieces: (name, start, stop) over the flattened array."""
    return [(name, i, j) for name in sorted(arrays) for i, j in parallel.tiles(arrays[name].size, parallel.ELEMENTS)]


def _for_pieces(pieces: Sequence[Piece], work: Callable[[int], None]) -> None:
    """Call ``work(index)`` for every piece. Small ones (norms, biases) share a tile: alone they are not worth a thread."""
    tiles: list[list[int]] = []
    room = 0
    for index, (_, i, j) in enumerate(pieces):
        if room < j - i:
            tiles.append([])
            room = 2 * parallel.ELEMENTS
        tiles[-1].append(index)
        room -= j - i

    def tile(number: int) -> None:
        for index in tiles[number]:
            work(index)

    parallel.for_each(len(tiles), tile)
