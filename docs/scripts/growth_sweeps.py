"""What `growth` measures: which size of which model grows, what stays, and what theory says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

#: What every model of a sweep has unless the sweep changes it.
BASE = {"hidden_size": 128, "num_layers": 2, "vocab_size": 256, "batch_size": 4, "max_seq_len": 128}
LLAMA, MAMBA1, MAMBA2, MAMBA3 = "tiny-llama", "tiny-mamba1", "tiny-mamba2", "tiny-mamba3"
BOTH = {"Llama": LLAMA, "Mamba2": MAMBA2}


def sizes_that_follow(bundled: str, width: int, layers: int) -> dict[str, Any]:
    """The sizes of a model's parts for its width: heads of 64 channels, or of 32 with 32 states."""
    if bundled == LLAMA:
        return {"num_heads": width // 64, "kv_heads": width // 64, "intermediate_size": 4 * width}
    mamba = {"mamba_layers": list(range(layers)), "mamba_d_state": 16}
    heads = {"mamba2_num_heads": width // 16, "mamba2_head_dim": 32, "mamba2_state_size": 32, "mamba2_chunk_size": 64}
    return mamba if bundled == MAMBA1 else {**mamba, **heads}


@dataclass(frozen=True)
class Sweep:
    """One size that grows. models: bundled config by the name that is shown. limits: exponents of time and memory."""

    title: str
    what: str
    sizes: tuple[int, ...]
    models: Mapping[str, str]
    change: Callable[[int], dict[str, int]]
    limits: Mapping[str, tuple[str, str]]

    def changes(self, bundled: str, size: int) -> list[str]:
        """The overrides of a bundled config that make the model of this size."""
        keys: dict[str, Any] = {**BASE, **self.change(size)}
        keys |= sizes_that_follow(bundled, keys["hidden_size"], keys["num_layers"])
        return [f"{key}={value}" for key, value in keys.items()]


def doubling(first: int, last: int) -> tuple[int, ...]:
    """``first``, twice that, … up to ``last``."""
    return tuple(first << i for i in range((last // first).bit_length()))


SWEEPS = {
    "length": Sweep(
        "Sequence length",
        "tokens in a sequence",
        doubling(64, 16384),
        {"Llama": LLAMA, "Mamba1": MAMBA1, "Mamba2": MAMBA2, "Mamba3": MAMBA3},
        lambda size: {"max_seq_len": size, "batch_size": 1},
        {"Llama": ("2", "1"), "Mamba1": ("1", "1"), "Mamba2": ("1", "1"), "Mamba3": ("1", "1")},
    ),
    "width": Sweep(
        "Width",
        "hidden size",
        doubling(64, 2048),
        BOTH,
        lambda size: {"hidden_size": size},
        {"Llama": ("2", "2"), "Mamba2": ("2", "2")},
    ),
    "layers": Sweep(
        "Layers",
        "layers",
        doubling(1, 32),
        BOTH,
        lambda size: {"num_layers": size},
        {"Llama": ("1", "1"), "Mamba2": ("1", "1")},
    ),
    "batch": Sweep(
        "Batch",
        "sequences in a batch",
        doubling(1, 128),
        BOTH,
        lambda size: {"batch_size": size},
        {"Llama": ("1", "1"), "Mamba2": ("1", "1")},
    ),
    "vocabulary": Sweep(
        "Vocabulary",
        "vocabulary",
        doubling(256, 131072),
        {"Llama": LLAMA},
        lambda size: {"vocab_size": size},
        {"Llama": ("1", "1")},
    ),
}

#: Width of the cross-entropy measured alone.
WIDTH = 64
#: Its vocabularies and tokens.
GRID = [(vocabulary, tokens) for vocabulary in (1024, 8192, 65536, 131072, 262144) for tokens in (256, 1024, 4096, 16384)]
QUICK_GRID = [(1024, 256), (1024, 1024), (8192, 256), (8192, 1024)]
