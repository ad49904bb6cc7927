"""The peers that ours is measured against are the same models, trained in the same way: in float64, where it can be seen.

Each is the very contestant of the benchmark, in small. Bounds: float32 twins were found up to 230 roundings from the exact
gradients, where the contributions of all tokens nearly cancel (`test_mamba3_oracle.py`); in float64 that is 3e-14 of the
largest element. AdamW's first update ``lr g / (|g| + 1e-8)`` turns an error of a tiny gradient into one up to 1e8 times as
large: of 1e-16 times 1e8 times the learning rate, 3e-11 of a weight, of which a loss feels a part. A term that is wrong,
decay of a norm that should have none, or clipping left out, changes them by 1e-5 and more.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'oracle'")
pytest.importorskip("transformers", reason="needs the extra 'oracle'")

from bench import peers
from bench.contestants import CONTESTANTS, Ours
from golden.write_mamba1 import nothing_narrowed
from oracle.measuring import random_batches, randomize, relative_error

from oxidizr_ref.config import Config, DataConfig, ModelConfig, TrainerConfig, load_config
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.optim import global_norm

pytestmark = pytest.mark.oracle

GRADIENTS, LOSSES, STEPS = 1e-11, 1e-10, 3
VOCAB, BATCH, LENGTH = 61, 2, 23  # tokens: four chunks of 5 and a rest
COMMON: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "vocab_size": VOCAB, "max_seq_len": LENGTH, "dtype": "f64"}
LLAMA = {**COMMON, "num_heads": 4, "kv_heads": 2, "intermediate_size": 40}
LATENT = {"num_heads": 4, "intermediate_size": 20, "kv_latent_dim": 12, "q_latent_dim": 10, "d_rope": 4}
EXPERTS = {"num_experts": 4, "experts_per_tok": 2, "shared_expert_enabled": True}
STATES = {"mamba2_num_heads": 6, "mamba2_head_dim": 8, "mamba2_state_size": 8, "mamba2_chunk_size": 5}
MAMBA2 = {**COMMON, **STATES, "mamba_layers": [0, 1]}
#: nano in small: Mamba, latent attention and experts, Mamba.
NANO = {**COMMON, **STATES, **LATENT, **EXPERTS, "num_layers": 3, "mamba_layers": [0, 2]}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama tied": {**LLAMA, "tie_word_embeddings": True},
    "latent attention": {**COMMON, **LATENT},
    "experts": {**LLAMA, **EXPERTS, "shared_expert_enabled": False},
    "mamba1": {**COMMON, "mamba_layers": [0, 1], "mamba_d_state": 5},
    "mamba2": MAMBA2,
    "mamba2 groups": {**MAMBA2, "mamba2_n_groups": 3},
    "mamba2 whole chunks": {**MAMBA2, "max_seq_len": 20},
    "mamba3": {**MAMBA2, "mamba3_enabled": True, "mamba2_n_groups": 2},
    "mamba3 all turn": {**MAMBA2, "mamba3_enabled": True, "mamba3_rope_fraction": 1.0},
    "mamba3 none turns": {**MAMBA2, "mamba3_enabled": True, "mamba3_complex_rope": False},
    "nano": NANO,
    "nano mamba3": {**NANO, "mamba3_enabled": True},
}
PAIRS = [
    (who, model)
    for model in MODELS
    for who in ("eager", "hf", "jax")
    if CONTESTANTS[who].suits(ModelConfig(**MODELS[model]))
]
NO_COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
PARAMETERS = [*PAIRS, pytest.param("compile", "llama", marks=NO_COMPILER)]


def config_of(model: str) -> Config:
    trainer = TrainerConfig(learning_rate=3e-3, batch_size=BATCH, weight_decay=0.1, load_balance_alpha=0.1)
    return Config(model=ModelConfig(**MODELS[model]), trainer=trainer, data=DataConfig(path=("random",)))


@contextlib.contextmanager
def in_float64(who: str) -> Iterator[None]:
    """JAX computes in float32 unless told, and Hugging Face narrows here and there whatever it is told."""
    if who == "jax":
        jax = pytest.importorskip("jax", reason="needs jax")
        before = jax.config.jax_enable_x64
        jax.config.update("jax_enable_x64", True)
        try:
            yield
        finally:
            jax.config.update("jax_enable_x64", before)
    else:
        with nothing_narrowed() if who == "hf" else contextlib.nullcontext():
            yield


def contestants(who: str, model: str) -> tuple[Ours, Any]:
    """Ours and a peer with the same random weights, none of whose effects is negligible."""
    config = config_of(model)
    drawn = LanguageModel(config.model)
    randomize(drawn)
    weights = {name: array.copy() for name, array in drawn.state_dict().items()}
    return Ours(config, weights), CONTESTANTS[who](config, weights)


# What the compiler imports warns of its own parts.
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize(("who", "model"), PARAMETERS)
def test_loss_gradients_and_losses_after_three_clipped_adamw_steps_are_ours(who: str, model: str) -> None:
    with in_float64(who):
        ours, peer = contestants(who, model)
        length = ours.config.model.max_seq_len
        batches = random_batches(VOCAB, BATCH, length, STEPS + 1)
        mine, theirs = ours.gradients(*batches[0]), peer.gradients(*batches[0])
        assert mine.keys() == theirs.keys() and global_norm(mine) > ours.config.trainer.max_grad_norm
        worst = max((relative_error(mine[name], theirs[name]), name) for name in mine)
        ours.begin()
        peer.begin()
        # The last loss is that after three steps.
        losses = [(ours.step(*batch), peer.step(*batch)) for batch in batches]
    apart = max(abs(a / b - 1) for a, b in losses)
    print(who, model, worst, apart)
    assert worst[0] < GRADIENTS, worst
    assert apart < LOSSES and len({round(a, 6) for a, _ in losses}) == len(losses)


def test_two_pairs_of_tiny_are_measured_beside_a_pytorch_twin_in_processes_of_their_own() -> None:
    found = peers.compare(str(peers.CONFIGS / "tiny.yaml"), ["eager"], pairs=2, threads=2)
    ours, eager = found["ours"], found["eager"]
    assert len(ours.seconds) == len(eager.seconds) == len(eager.ratios) == 2
    assert list(eager.ratios) == [a / b for a, b in zip(ours.seconds, eager.seconds, strict=True)]
    assert all(0 < seconds < 10 for seconds in (*ours.seconds, *eager.seconds))
    assert "torch" in eager.facts and "torch" not in ours.facts and ours.facts["blas"]
    told = peers.report("tiny", 2, found)
    assert told["contestants"]["eager"]["ratio"] == pytest.approx(np.median(eager.ratios))
    assert "eager" in peers.table(told)


def test_the_peers_know_the_models_that_their_benchmarks_ask_for() -> None:
    able = {
        path.stem: [who for who in CONTESTANTS if CONTESTANTS[who].suits(load_config(path).model)]
        for path in Path(peers.CONFIGS).glob("*.yaml")
    }
    llama = ["ours", "eager", "compile", "jax"]
    assert {name: able[name] for name in ("tiny", "char", "llama8m", "llama39m")} == dict.fromkeys(
        able.keys() & {"tiny", "char", "llama8m", "llama39m"}, llama
    )
    assert all(able[name] == ["ours", "eager", "compile", "hf"] for name in ("mamba1", "mamba2"))
    assert all(able[name] == ["ours", "eager", "compile"] for name in ("nano", "nano-full", "mamba3"))
