"""How much memory a run needs, before it starts, and how much there is."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from oxidizr_ref.backend import STORAGE_DTYPES, compute_dtype
from oxidizr_ref.config import Config
from oxidizr_ref.fused.linear_cross_entropy import FEWEST_TOKENS, LOGITS
from oxidizr_ref.model import LanguageModel

#: What Python, NumPy and BLAS take before the first array (measured: 60 to 90 MB).
_INTERPRETER_BYTES = 80_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for."""

    parameters: int
    gradients: int
    moments: int
    activations: int
    logits: int
    snapshot: int

    @property
    def total(self) -> int:
        """All of it, the interpreter included."""
        parts = self.parameters + self.gradients + self.moments + self.activations + self.logits
        return parts + self.snapshot + _INTERPRETER_BYTES


def estimate_memory(config: Config) -> MemoryEstimate:
    """The peak memory of a training step, in bytes, from shapes alone: nothing is allocated."""
    m, t = config.model, config.trainer
    storage = STORAGE_DTYPES[m.dtype]
    compute_bytes = compute_dtype(storage).itemsize
    count = LanguageModel(m, seed=None).num_parameters()
    # While a micro-batch runs, the gradient tree holds a partial sum for every set bit of the number already done.
    partial_sums = max(done.bit_count() for done in range(t.gradient_accumulation))
    tokens = t.batch_size * m.max_seq_len
    logits = min(tokens, max(FEWEST_TOKENS, LOGITS // m.vocab_size)) * m.vocab_size
    saved = count * (storage.itemsize + 2 * compute_bytes)
    return MemoryEstimate(
        parameters=count * storage.itemsize,
        gradients=count * compute_bytes * (1 + partial_sums),
        moments=2 * count * compute_bytes,
        activations=tokens * compute_bytes * (m.num_layers * _kept_a_token(config) + _passing_a_token(config)),
        logits=logits * compute_bytes,
        snapshot=saved if t.async_save else 0,
    )


def _kept_a_token(config: Config) -> int:
    """Numbers a layer keeps a token for its backward pass: see what each `Function` of `fused` puts on ``self``."""
    m = config.model
    norms = 2 * 2 * m.hidden_size  # the input of each norm, and its output, which the next product needs
    queries_keys = (m.num_heads + m.kv_heads) * m.head_dim
    values_outputs = (m.num_heads + m.kv_heads) * m.head_dim
    return norms + queries_keys + values_outputs + m.num_heads + 2 * m.intermediate_size


def _passing_a_token(config: Config) -> int:
    """Numbers a token that exist for a moment in the backward pass: SwiGLU's activation and a few hidden states."""
    return config.model.intermediate_size + 6 * config.model.hidden_size


def available_bytes() -> int | None:
    """Memory this process could still get, in bytes, where the system tells (Linux), else None."""
    limits: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        control_group = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if control_group.isdigit():
            limits.append(int(control_group))
    except OSError:
        pass
    return min(limits, default=None)


def resident_bytes() -> int:
    """Memory this process holds now, in bytes (where only the peak is known: the peak; 0 where nothing is)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_bytes()
    import resource

    return pages * resource.getpagesize()


def peak_bytes() -> int:
    """The most memory this process ever held, in bytes; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
