"""What a training step costs: its time, where that goes, its memory, and the floor below which nothing can bring it.

The floor is the time of the step's matrix products alone: same shapes and layouts, same BLAS, same threads, with nothing in
between. Steps and floors take turns, so that a machine that changes its speed changes both.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from oxidizr_ref import parallel, rng
from oxidizr_ref.autograd import Function
from oxidizr_ref.backend import Array
from oxidizr_ref.config import Config
from oxidizr_ref.memory_now import peak_bytes, resident_bytes
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.run import Witness
from oxidizr_ref.trainer import Trainer
from oxidizr_ref.watch import Watcher, watched

#: Steps that are not counted: the first ones make buffers and wake threads.
WARM_UP = 2

Stack = tuple[str, ...]


@dataclass(frozen=True)
class Spread:
    """Seconds of one thing, measured several times."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, float]:
        """Median, least and most."""
        return {"median": self.median, "min": min(self.seconds), "max": max(self.seconds)}


@dataclass(frozen=True)
class Measured:
    """What `measure` found. step, floor: seconds of each round; over_floor: the median of their ratios, round by round.

    stacks: seconds of one step by phase, module and op: forward or backward of an op, or what is between them. products:
    how many matrix products a step has, and their floating-point operations. memory: bytes of the peak beyond what was
    resident before the first step.
    """

    threads: int
    tokens: int  # a step
    parameters: int
    step: Spread
    floor: Spread
    stacks: Mapping[Stack, float]
    products: int
    operations: int
    memory: int

    @property
    def over_floor(self) -> float:
        """How many times as long as its matrix products a step takes."""
        return statistics.median(a / b for a, b in zip(self.step.seconds, self.floor.seconds, strict=True))

    def by(self, key: Callable[[Stack], str]) -> dict[str, float]:
        """Seconds of one step summed by a part of the stacks, the largest first."""
        sums: Counter[str] = Counter()
        for stack, seconds in self.stacks.items():
            sums[key(stack)] += seconds  # type: ignore[assignment]
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def folded(self) -> str:
        """Stacks and microseconds, a line each: what flame-graph programs read."""
        return "".join(f"{';'.join(stack)} {round(seconds * 1e6)}\n" for stack, seconds in sorted(self.stacks.items()))

    def as_json(self) -> dict[str, Any]:
        """All of it: what ``bench --json`` prints. Times in seconds, memory in bytes."""
        return {
            "threads": self.threads,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "rounds": len(self.step.seconds),
            "step": self.step.as_json(),
            "floor": self.floor.as_json(),
            "over_floor": self.over_floor,
            "tokens/s": self.tokens / self.step.median,
            "products": self.products,
            "operations": self.operations,
            "memory": self.memory,
            "phases": self.by(lambda stack: stack[0]),
            "ops": self.by(lambda stack: f"{stack[0]} {stack[-1]}"),
        }


def measure(config: Config, rounds: int = 10) -> Measured:
    """Measure ``rounds`` training steps of a config on random tokens, each beside its floor, after two to warm up.

    Raises ConfigError, DataError or TrainingError.
    """
    data = config.data.model_copy(update={"path": ("random",)})
    trainer = Trainer(config.model_copy(update={"data": data}), LanguageModel(config.model, config.trainer.seed))
    batches = trainer.batches()
    before = resident_bytes()
    for _ in range(WARM_UP):
        trainer.train_step(batches)
    with _recorded_products() as products:
        trainer.train_step(batches)
    memory = max(0, peak_bytes() - before)
    floor = _Floor(products)
    steps, floors = [], []
    for _ in range(rounds):
        steps.append(_seconds(lambda: trainer.train_step(batches)))
        floors.append(_seconds(floor.run))
    return Measured(
        threads=parallel.get_threads(),
        tokens=trainer.tokens_a_step,
        parameters=trainer.model.num_parameters(),
        step=Spread(tuple(steps)),
        floor=Spread(tuple(floors)),
        stacks=_watched_step(trainer, batches),
        products=len(products),
        operations=sum(product.operations for product in products),
        memory=memory,
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- the floor --------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """One matrix product: shapes of its operands, whether each lies transposed, the dtype."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    a_transposed: bool
    b_transposed: bool
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return (*np.broadcast_shapes(self.a[:-2], self.b[:-2]), self.a[-2], self.b[-1])

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * int(np.prod(self.shape, dtype=np.int64)) * self.a[-1]


@contextmanager
def _recorded_products() -> Iterator[list[Product]]:
    """The products of everything computed inside, on any thread."""
    found: list[Product] = []
    matmul = np.matmul

    def recording(a: Array, b: Array, *args: Any, **kwargs: Any) -> Array:
        found.append(Product(a.shape, b.shape, _lies_transposed(a), _lies_transposed(b), a.dtype.name))
        return matmul(a, b, *args, **kwargs)

    np.matmul = recording  # type: ignore[assignment]
    try:
        yield found
    finally:
        np.matmul = matmul


def _lies_transposed(x: Array) -> bool:
    return bool(x.strides[-2] == x.itemsize and x.strides[-1] != x.itemsize)


class _Floor:
    """The same products once more, on operands of their own, in the order in which they were recorded."""

    def __init__(self, products: list[Product]) -> None:
        self.products = products
        self._operands = {product: self._make(product) for product in dict.fromkeys(products)}
        self._results = threading.local()  # a thread's own, by product

    def _make(self, product: Product) -> tuple[Array, Array]:
        def array(shape: tuple[int, ...], transposed: bool) -> Array:
            stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
            drawn = rng.normal(0, "bench", str(stored), stored).astype(product.dtype)
            return drawn.swapaxes(-1, -2) if transposed else drawn

        return array(product.a, product.a_transposed), array(product.b, product.b_transposed)

    def run(self) -> None:
        """All of them, spread over the threads."""
        parallel.for_each(len(self.products), self._one)

    def _one(self, index: int) -> None:
        product = self.products[index]
        results: dict[Product, Array] = self._results.__dict__.setdefault("by_product", {})
        if product not in results:
            results[product] = np.empty(product.shape, dtype=product.dtype)
        a, b = self._operands[product]
        np.matmul(a, b, out=results[product])


# --- where the time goes ----------------------------------------------------------------------------------------------


def _watched_step(trainer: Trainer, batches: Iterator[Any]) -> dict[Stack, float]:
    clock = _Clock(trainer.model)
    trainer.witness = clock
    with watched(clock):
        trainer.train_step(batches)
    trainer.witness = Witness()
    return dict(clock.stacks)


@dataclass
class _Clock(Watcher, Witness):
    """Charges every moment of a step to a phase, a module and an op."""

    model: LanguageModel
    stacks: Counter[Stack] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._scopes: list[str] = [""]
        self._made_in: WeakKeyDictionary[Function, str] = WeakKeyDictionary()
        self._since, self._now = time.perf_counter(), Stack(("forward", "between ops"))

    def _next(self, *stack: str) -> None:
        """What was being done until now is over; what follows is charged to ``stack``."""
        now = time.perf_counter()
        self.stacks[self._now] += now - self._since  # type: ignore[assignment]
        self._since, self._now = now, tuple(filter(None, stack))

    def enter(self, module: Any) -> None:
        self._scopes.append(self._names.get(id(module), self._scopes[-1]))

    def leave(self, module: Any) -> None:  # noqa: ARG002
        self._scopes.pop()

    def operands(self, node: Any, arrays: list[Array]) -> list[Array]:
        self._next("forward", self._scopes[-1], type(node).__name__)
        return arrays

    def result(self, node: Any, y: Array) -> Array:
        self._made_in[node] = self._scopes[-1]
        self._next("forward", "between ops")
        return y

    def gradient(self, node: Any, dy: Array) -> Array:
        self._next("backward", self._made_in.get(node, ""), type(node).__name__)
        return dy

    def walked(self) -> None:
        self._next("gradients", "sum, norm and clip")

    def batch(self, step: int, micro: int, tokens: Array, targets: Array) -> None:  # noqa: ARG002
        self._next("forward", "between ops")

    def gradients(self, summed: Any, norm: float, clip_factor: float, learning_rate: float) -> None:  # noqa: ARG002
        self._next("optimizer", "AdamW")

    def updated(self, weights: Any, optimizer: Any) -> None:  # noqa: ARG002
        self._next("after the step")
