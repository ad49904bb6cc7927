"""What a training step costs on a CUDA device: `waits`, `memory`, and its `speed` beside a PyTorch twin.

docs/scripts/gpu.py calls the three. Pairs are measured as in `peers.py`, but for what a device changes: a turn is several
steps, asked for one after another; the clock stops when the device has done them all, and neither side fetches a loss on the
way. TF32 is off on both sides. With bf16 the twin is what ``model.to(torch.bfloat16)`` makes of it: its weights, gradients
and moments have 16 bits. Ours has float32 gradients and moments.

A contestant's process is ``python -m bench.cuda_peers WHO CONFIG FILE [KEY=VALUE …]``, run in ``tests/``. It speaks as those
of `process.py` do.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from oxidizr_ref.backend import module_of
from oxidizr_ref.config import Config, ModelConfig, load_config

from . import peers
from .contestants import Array, Eager, Ours
from .peers import CONFIGS, OURS, TESTS, PeerError, quartiles
from .process import WARM_UP, Shared, write_shared

EAGER = "eager"
#: A turn takes about so many seconds, but has so many steps at least and at most.
TURN, FEWEST, MOST = 0.5, 3, 200
#: The first losses may be so far apart, relatively. PyTorch rounds a bf16 loss to 8 bits, by up to 0.2%.
SAME = {"f32": 1e-4, "bf16": 2e-2}


# --- the contestants --------------------------------------------------------------------------------------------------


class OursOnDevice(Ours):
    """oxidizr_ref on the device."""

    def __init__(self, config: Config, weights: Mapping[str, Array]) -> None:
        from oxidizr_ref.model import LanguageModel

        self.config = config
        self.model = LanguageModel(config.model, config.trainer.seed, "gpu")
        self.model.load_state_dict(weights)

    def step(self, tokens: Array, targets: Array) -> None:  # type: ignore[override]
        """Ask for a step on int ``[B,T]``."""
        self.trainer.train_step(iter([self.batch(tokens, targets)]))

    def last_loss(self) -> float:
        """That of the last step. Waits for it."""
        loss: float = self.trainer.metrics.look()["loss"]
        return loss

    @staticmethod
    def wait() -> None:
        """Until the device has done all it was asked."""
        from oxidizr_ref.transfers import synchronize

        synchronize("gpu")

    @staticmethod
    def memory() -> int:
        """The most bytes that were taken of the device for arrays."""
        from oxidizr_ref.transfers import device_bytes

        return device_bytes()[1]


class EagerOnDevice(Eager):
    """The PyTorch twin on the device: fused AdamW, clipping of all gradients in one go."""

    device = "cuda"

    def build(self, config: ModelConfig) -> Any:
        """The model, with any weights."""
        import torch

        from . import state_space_twins, twins

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        state_space_twins.decay_within = decay_within
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
        return twins.LanguageModel(config.model_copy(update={"dtype": "f32"})).to(self.device, dtype)

    def loss(self, tokens: Any, targets: Any) -> Any:
        """The loss of int64 tensors ``[B,T]``."""
        return super().loss(*(ids.to(self.device, non_blocking=True) for ids in (tokens, targets)))

    def step(self, tokens: Array, targets: Array) -> None:  # type: ignore[override]
        """Ask for a step on int ``[B,T]``."""
        import torch

        loss = self.loss(torch.from_numpy(tokens), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.trainer.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._last = loss.detach()

    def last_loss(self) -> float:
        """That of the last step. Waits for it."""
        return float(self._last.item())

    @classmethod
    def wait(cls) -> None:
        """Until the device has done all it was asked."""
        import torch

        if cls.device == "cuda":
            torch.cuda.synchronize()

    @classmethod
    def memory(cls) -> int:
        """The most bytes that were taken of the device for arrays."""
        import torch

        return torch.cuda.max_memory_reserved() if cls.device == "cuda" else 0


def decay_within(a: Any) -> Any:
    """`state_space_twins.decay_within`, its mask made where ``a`` lives. a: ``[…,Q]``. Returns ``[…,Q,Q]``."""
    import torch

    total = a.cumsum(dim=-1)
    future = torch.ones(a.shape[-1], a.shape[-1], dtype=torch.bool, device=a.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(future, -math.inf).exp()


CONTESTANTS: dict[str, type[OursOnDevice] | type[EagerOnDevice]] = {OURS: OursOnDevice, EAGER: EagerOnDevice}


# --- a contestant's process -------------------------------------------------------------------------------------------


def warm_up(contestant: Any, batches: Iterator[tuple[Array, Array]]) -> list[float]:
    """The first steps, in which everything is compiled. Returns their losses."""
    losses = []
    for _ in range(WARM_UP):
        contestant.step(*next(batches))
        losses.append(contestant.last_loss())
    return losses


def turn(contestant: Any, batches: Iterator[tuple[Array, Array]], steps: int) -> float:
    """So many steps. Returns the seconds of one."""
    contestant.wait()
    began = time.perf_counter()
    for _ in range(steps):
        contestant.step(*next(batches))
    contestant.wait()
    return (time.perf_counter() - began) / steps


def steps_of_a_turn(seconds: float) -> int:
    """How many steps of so many seconds a turn has."""
    return min(MOST, max(FEWEST, math.ceil(TURN / seconds)))


def main(who: str, config: str, file: str, *overrides: str) -> None:
    """Build, warm up, then do as the controller says."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no part of the conversation

    def say(what: Mapping[str, Any]) -> None:
        print(json.dumps(what), file=out, flush=True)

    shared = Shared(Path(file), "model")
    contestant, batches = CONTESTANTS[who](load_config(config, overrides), shared), shared.batches()
    contestant.begin()
    losses = warm_up(contestant, batches)
    steps = steps_of_a_turn(turn(contestant, batches, FEWEST))
    say({"losses": losses, "facts": {"steps": steps}})
    for line in sys.stdin:
        if line.strip() == "end":
            break
        say({"seconds": turn(contestant, batches, steps)})
    say({"memory": contestant.memory()})


# --- the controller ---------------------------------------------------------------------------------------------------


class Contestant(peers.Contestant):
    """A process that trains on the device when it is its turn."""

    def __init__(self, who: str, config: str, shared: Path, overrides: Sequence[str]) -> None:
        self.who, self.seconds = who, list[float]()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in __exit__
        paths = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUPY_TF32": "0"}
        command = [sys.executable, "-m", "bench.cuda_peers", who, config, str(shared), *overrides]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, cwd=TESTS, env=env, stdin=pipe, stdout=pipe, stderr=self._errors, encoding="utf-8"
        )
        try:
            self.losses: list[float] = self._hear()["losses"]
        except BaseException:
            self.__exit__()
            raise


def compare(config: str, overrides: Sequence[str], pairs: int, against: Sequence[str] = (EAGER,)) -> dict[str, Any]:
    """Ours and ``against`` (one or nobody) in turn, ``pairs`` times: seconds of a step, and ours over theirs.

    Raises PeerError when a contestant ends early, or when its first losses are not ours.
    """
    loaded = load_config(config, overrides)
    with ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shared.safetensors"
        in_float32 = loaded.model.model_copy(update={"dtype": "f32"})  # each side rounds the weights itself, to nearest
        write_shared(loaded.model_copy(update={"model": in_float32}), shared)
        ours, *others = (stack.enter_context(Contestant(who, config, shared, overrides)) for who in (OURS, *against))
        for other in others:
            must_be_the_same(ours.losses, other.losses, SAME[loaded.model.dtype])
        for _ in range(pairs):
            for contestant in (ours, *others):
                contestant.turn()
        tokens = loaded.trainer.batch_size * loaded.trainer.gradient_accumulation * loaded.model.max_seq_len
        return {"pairs": pairs, "tokens": tokens, **told(ours.seconds, ours.end(), [(o.seconds, o.end()) for o in others])}


def must_be_the_same(ours: Sequence[float], theirs: Sequence[float], bound: float) -> None:
    """Raises PeerError where the losses of the first steps are farther apart than ``bound``, relatively."""
    if not all(abs(a / b - 1) < bound for a, b in zip(ours, theirs, strict=True)):  # NaN is not less
        raise PeerError(f"the twin is another model: losses {theirs}, ours {ours}")


def told(ours: Sequence[float], memory: int, others: Sequence[tuple[Sequence[float], int]]) -> dict[str, Any]:
    """What follows from the turns' seconds and the bytes, ours and those of one other or nobody."""
    said: dict[str, Any] = {"seconds": statistics.median(ours), "memory": memory}
    for theirs, their_memory in others:
        lower, middle, upper = quartiles([a / b for a, b in zip(ours, theirs, strict=True)])
        said |= {"ratio": middle, "quartiles": [lower, upper]}
        said |= {"their_seconds": statistics.median(theirs), "their_memory": their_memory}
    return said


# --- what a step costs ------------------------------------------------------------------------------------------------

#: By name: the config, and what is set otherwise.
BENCHMARKS: dict[str, tuple[Path, tuple[str, ...]]] = {
    **{path.stem: (path, ()) for path in sorted(CONFIGS.glob("*.yaml"))},
    "nano": (CONFIGS / "nano.yaml", ("trainer.batch_size=4",)),
    "llama350m": (CONFIGS / "gpu" / "llama350m.yaml", ()),
}
_FETCHING = ("get", "item", "tolist", "__float__", "__int__", "__bool__")


def benchmark(name: str, dtype: str) -> tuple[str, list[str]]:
    """The config of a benchmark, or of a bundled model, and what to set in it: random tokens, and no step is logged."""
    source, overrides = BENCHMARKS.get(name, (name, ()))
    return str(source), [*overrides, f"model.dtype={dtype}", "data.path=random", "trainer.log_interval=1000000"]


def trainer_of(name: str, dtype: str) -> Any:
    """A `Trainer` of a benchmark on the device."""
    from oxidizr_ref.model import LanguageModel
    from oxidizr_ref.trainer import Trainer

    config = load_config(*benchmark(name, dtype))
    return Trainer(config, LanguageModel(config.model, config.trainer.seed, "gpu"))


def waits(name: str) -> dict[str, Any]:
    """How often the host waits in a step that is not logged, as far as Python asks for it."""
    trainer, steps = trainer_of(name, "f32"), 10
    batches = trainer.batches()
    for _ in range(WARM_UP):
        trainer.train_step(batches)
    with counted_waits() as count:
        for _ in range(steps):
            trainer.train_step(batches)
    return {kind: number / steps for kind, number in count.items()}


@contextmanager
def counted_waits() -> Iterator[dict[str, int]]:
    """Counts arrays fetched, for which the host waits, and events waited for."""
    gpu, count, inside = module_of("gpu"), {"fetched": 0, "events": 0}, list[None]()

    def counting(kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[kind] += not inside and kwargs.get("blocking", True)
            inside.append(None)  # `item` may call `get`
            try:
                return method(*args, **kwargs)
            finally:
                inside.pop()

        return call

    found = [("fetched", gpu.ndarray, name) for name in _FETCHING if hasattr(gpu.ndarray, name)]
    with ExitStack() as stack:
        for kind, owner, name in [*found, ("events", gpu.cuda.Event, "synchronize")]:
            stack.enter_context(mock.patch.object(owner, name, counting(kind, getattr(owner, name))))
        yield count


def memory(name: str, dtype: str) -> dict[str, int]:
    """The estimate, the most bytes that arrays held at a time, and what CuPy's pool took for them, in four steps."""
    from oxidizr_ref.memory import estimate_memory

    gpu = module_of("gpu")
    pool = gpu.get_default_memory_pool()
    pool.free_all_blocks()

    class Most(gpu.cuda.MemoryHook):  # type: ignore[misc]
        name, now, most = "Most", 0, 0

        def malloc_postprocess(self, *, mem_size: int, mem_ptr: int, **_: Any) -> None:
            if mem_ptr:
                self.now += mem_size
                self.most = max(self.most, self.now)

        def free_postprocess(self, *, mem_size: int, **_: Any) -> None:
            self.now -= mem_size

    with Most() as hook:
        trainer = trainer_of(name, dtype)
        batches = trainer.batches()
        for _ in range(4):
            trainer.train_step(batches)
        trainer.metrics.look()
    return {"estimate": estimate_memory(trainer.config, "gpu").total, "used": hook.most, "pool": pool.total_bytes()}


def speed(name: str, dtype: str, pairs: int, alone: bool) -> dict[str, Any]:
    """A training step, beside PyTorch's unless ``alone``. Raises PeerError."""
    from oxidizr_ref.model import LanguageModel

    config = load_config(*benchmark(name, dtype))
    parameters = LanguageModel(config.model, seed=None).num_parameters()
    found = compare(*benchmark(name, dtype), pairs, () if alone else (EAGER,))
    return {"parameters": parameters, "operations": operations_a_token(config), **found}


def operations_a_token(config: Config) -> int:
    """Floating-point operations of a training step for one token: products with weights, and causal attention.

    A multiplication and an addition for each weight that a token meets, in the forward pass and twice in the backward pass:
    6N, N without the rows of an embedding, which are only looked up. Attention likewise: scores (as wide as a key) and
    values with half of the tokens, on average. Scans, convolutions and elementwise work are not counted.
    """
    from oxidizr_ref.memory import model_parts

    m, parts = config.model, model_parts(config)
    met = sum(part.active for part in parts) - (0 if m.tie_word_embeddings else parts[0].active)
    widths = m.num_heads * (2 * m.head_dim + (m.d_rope if m.uses_mla else 0))
    return 6 * met + 3 * m.max_seq_len * widths * m.layer_kinds.count("attention")


if __name__ == "__main__":
    main(*sys.argv[1:])
