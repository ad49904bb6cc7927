"""Models of every kind and of sizes drawn at random, with lively weights and batches: for comparisons by the hundred."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from architectures import enliven

from oxidizr_ref import LanguageModel
from oxidizr_ref.config import Config, ModelConfig, TrainerConfig

STEPS = 2
Arrays = dict[str, np.ndarray[Any, Any]]


class Drawn(NamedTuple):
    """A float64 config, weights that float32 holds exactly, and a batch for each of `STEPS`."""

    config: Config
    weights: Arrays
    batches: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]

    def in_dtype(self, dtype: str) -> Config:
        """The same config, parameters stored otherwise."""
        return self.config.model_copy(update={"model": self.config.model.model_copy(update={"dtype": dtype})})


def draw(seed: int) -> Drawn:
    """Model number ``seed``: its kind goes round, so that ten in a row hold all of them."""
    drawn = np.random.default_rng(seed)
    keys = _sizes(drawn, seed)
    trainer = TrainerConfig(
        learning_rate=float(10 ** drawn.uniform(-4, -2)),
        batch_size=int(drawn.integers(1, 4)),
        weight_decay=float(drawn.choice([0.0, 0.01, 0.1])),
        load_balance_alpha=float(drawn.choice([0.0, 0.01, 0.1])),
        max_grad_norm=float(drawn.choice([0.5, 1.0, 100.0])),
        max_steps=STEPS,
    )
    config = Config(model=ModelConfig(**keys), trainer=trainer)
    model = LanguageModel(config.model, seed)
    enliven(model, seed)
    weights = {name: np.asarray(array, np.float32).astype(np.float64) for name, array in model.state_dict().items()}
    shape = (STEPS, trainer.batch_size, keys["max_seq_len"] + 1)
    ids = drawn.integers(0, keys["vocab_size"], shape)
    return Drawn(config, weights, [(step[:, :-1].copy(), step[:, 1:].copy()) for step in ids])


def _sizes(drawn: np.random.Generator, seed: int) -> dict[str, Any]:
    heads, head_dim = int(drawn.choice([1, 2, 4, 6])), int(drawn.choice([4, 6, 8]))
    hidden = heads * head_dim
    layers = int(drawn.integers(1, 4))
    keys: dict[str, Any] = {
        "name": f"random{seed}",
        "dtype": "f64",
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "kv_heads": int(drawn.choice([k for k in (1, 2, 3, 4, 6) if heads % k == 0])),
        "intermediate_size": int(drawn.integers(3, 40)),
        "vocab_size": int(drawn.integers(5, 80)),
        "max_seq_len": int(drawn.integers(2, 24)),
        "rope_theta": float(drawn.choice([100.0, 10000.0])),
        "tie_word_embeddings": bool(drawn.integers(2)),
    }
    kind = ("gqa", "mla", "moe", "mla-moe", "mamba1", "mamba2", "mamba3", "mamba3-mimo", "hybrid2", "hybrid3")[seed % 10]
    if kind.startswith("mamba"):
        keys["mamba_layers"] = list(range(layers))
    elif kind.startswith("hybrid"):
        keys["num_layers"] = max(2, layers)
        keys["mamba_layers"] = [int(drawn.integers(keys["num_layers"]))]
    if "mla" in kind or kind == "hybrid2":
        keys |= {name: int(drawn.integers(3, 12)) for name in ("kv_latent_dim", "q_latent_dim")}
        keys |= {"d_rope": 2 * int(drawn.integers(1, 4)), "mla_latent_norm": bool(drawn.integers(2))}
    if "moe" in kind or kind == "hybrid3":
        experts = int(drawn.integers(2, 6))
        keys |= {"num_experts": experts, "experts_per_tok": int(drawn.integers(1, experts + 1))}
        keys["shared_expert_enabled"] = bool(drawn.integers(2))
    if kind == "mamba1":
        keys |= {"mamba_d_state": int(drawn.integers(1, 9)), "mamba_d_conv": int(drawn.integers(1, 5))}
    elif "mamba" in kind or "hybrid" in kind:
        keys |= _of_mamba2(drawn, hidden)
    if kind in ("mamba3", "mamba3-mimo", "hybrid3"):
        keys |= {
            "mamba3_enabled": True,
            "mamba3_complex_rope": bool(drawn.integers(4)),
            "mamba3_use_conv": bool(drawn.integers(2)),
        }
        keys["mamba3_rope_fraction"] = float(drawn.choice([0.5, 1.0]))
    if kind == "mamba3-mimo":
        keys["mamba3_mimo_rank"] = int(drawn.integers(1, 4))
    return keys


def _of_mamba2(drawn: np.random.Generator, hidden: int) -> dict[str, Any]:
    heads = int(drawn.choice([h for h in (1, 2, 3, 4, 6) if 2 * hidden % h == 0]))
    return {
        "mamba2_num_heads": heads,
        "mamba2_n_groups": int(drawn.choice([g for g in (1, 2, 3) if heads % g == 0])),
        "mamba2_state_size": 4 * int(drawn.integers(1, 4)),
        "mamba2_chunk_size": int(drawn.integers(1, 12)),
        "mamba2_conv_kernel": int(drawn.integers(1, 5)),
    }
