"""The files of ``models/``: each loads, has the parameters that arithmetic says, trains, and the small ones learn."""

from __future__ import annotations

import json
import math
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml

from oxidizr_ref import LanguageModel, Trainer, load_config
from oxidizr_ref.data import bundled_corpus

MODELS = {path.stem: path for path in sorted((tiny.REPOSITORY / "models").glob("*.yaml"))}
TINY = [name for name in MODELS if name.startswith("tiny-")]
#: Those that are trained in full every day; the others in the long tests.
QUICK = ("tiny-llama", "tiny-hybrid", "tiny-mamba3-mimo")
#: Those of a vocabulary of 128,354: slow at their full size.
LARGE = ["baseline", "nano", "nano_mamba2", "nano_mamba3", "nano_mamba3_hybrid", "nano_mamba3_mimo"]

#: What the formulas below give, written out: a changed file cannot change its formula's number unnoticed.
PARAMETERS = {
    "baseline": 162_900_480,
    "llama-start": 1_050_752,
    "nano": 123_142_368,
    "nano-start": 1_051_216,
    "nano_mamba2": 106_241_024,
    "nano_mamba3": 106_592_896,
    "nano_mamba3_hybrid": 119_867_328,
    "nano_mamba3_mimo": 107_993_728,
    "shakespeare-char": 808_320,
    "tiny-hybrid": 59_832,
    "tiny-llama": 41_376,
    "tiny-mamba1": 33_504,
    "tiny-mamba2": 32_720,
    "tiny-mamba3": 33_472,
    "tiny-mamba3-mimo": 36_800,
    "tiny-mla-moe": 86_944,
}


# --- parameters by hand, from the YAML itself -------------------------------------------------------------------------


def by_hand(m: dict[str, Any]) -> int:
    """Embedding, layers, last norm and output of a model section. Letters as in equations.md."""
    D, V = m["hidden_size"], m["vocab_size"]
    in_mamba = m.get("mamba_layers") or []
    mamba = mamba3 if m.get("mamba3_enabled") else mamba2 if m.get("mamba2_num_heads") else mamba1
    layers = sum(mamba(m) if layer in in_mamba else attention_layer(m) for layer in range(m["num_layers"]))
    return V * D + layers + D + D * V


def attention_layer(m: dict[str, Any]) -> int:
    D, H = m["hidden_size"], m["num_heads"]
    swiglu = 3 * D * m["intermediate_size"]
    if m.get("kv_latent_dim"):
        L, Q, R = m["kv_latent_dim"], m["q_latent_dim"], m["d_rope"]
        down, up, rotated = D * L + D * Q, Q * D + 2 * L * D, D * H * R + D * R  # w_dkv w_dq, w_uq w_uk w_uv, w_qr w_kr
        attention = down + up + rotated + D * D
    else:
        K = (m.get("kv_heads") or H) * D // H
        attention = 2 * D * D + 2 * D * K  # q o, k v
    if m.get("num_experts"):
        E, shared = m["num_experts"], bool(m.get("shared_expert_enabled"))
        return D + attention + D + (E + shared) * swiglu + E * D  # the router
    return D + attention + D + swiglu


def mamba1(m: dict[str, Any]) -> int:
    D, N, K = m["hidden_size"], m["mamba_d_state"], m["mamba_d_conv"]
    E, r = m["mamba_expand"] * D, -(-D // 16)
    conv, x_proj, dt_proj = E * K + E, E * (r + 2 * N), r * E + E
    return D + D * 2 * E + conv + x_proj + dt_proj + E * N + E + E * D  # …, A_log, D, out_proj


def mamba2(m: dict[str, Any]) -> int:
    D, H, P, N, G = (m[key] for key in ("hidden_size", "mamba2_num_heads", "mamba2_head_dim", *_STATES))
    E, BC = H * P, 2 * G * N
    conv = (E + BC) * (m["mamba2_conv_kernel"] + 1)
    return D + D * (2 * E + BC + H) + conv + 3 * H + E + E * D  # …, dt_bias A_log D, the gated norm, out_proj


def mamba3(m: dict[str, Any]) -> int:
    D, H, P, N, G = (m[key] for key in ("hidden_size", "mamba2_num_heads", "mamba2_head_dim", *_STATES))
    rank, E = m.get("mamba3_mimo_rank") or 0, H * P
    R, S = max(1, rank), N // 4  # half of the states are rotated, in pairs
    in_proj = D * (2 * E + 2 * R * G * N + 3 * H + S)
    return D + in_proj + H + 2 * H * R * N + 2 * N + H + 3 * H * rank * P + E * D  # …, dt_bias, biases, norms, D, mimo_*


_STATES = ("mamba2_state_size", "mamba2_n_groups")


def model_section(name: str) -> dict[str, Any]:
    section: dict[str, Any] = yaml.safe_load(MODELS[name].read_text(encoding="utf-8"))["model"]
    return section


@pytest.mark.parametrize("name", MODELS)
def test_every_file_loads_and_has_the_parameters_that_a_formula_by_hand_gives(name: str) -> None:
    config = load_config(MODELS[name])
    assert config.model.name == name and config.trainer.checkpoint_dir == f"./checkpoints/{name}"
    assert LanguageModel(config.model, seed=None).num_parameters() == by_hand(model_section(name)) == PARAMETERS[name]


def test_every_file_is_listed_and_every_one_begins_with_a_comment_that_says_what_it_is() -> None:
    assert MODELS.keys() == PARAMETERS.keys()
    for name, path in MODELS.items():
        assert path.read_text(encoding="utf-8").startswith(f"# {name}: ")


# --- documented values ------------------------------------------------------------------------------------------------

HYBRID = [0, 1, 2, 4, 5, 6]
#: The table of oxidizr's example models: kv/q latents and rotated width; experts (number, top-k, inner, shared); Mamba
#: layers; the rank of Mamba3; batches a step; steps between files.
NANO = {
    "nano": ((192, 192, 16), (4, 2, 1536, True), HYBRID, None, 2, 100),
    "nano_mamba2": (None, None, [*range(8)], None, 1, 500),
    "nano_mamba3": (None, None, [*range(8)], 0, 1, 500),
    "nano_mamba3_hybrid": ((192, 192, 16), (4, 2, 1536, False), HYBRID, 0, 1, 500),
    "nano_mamba3_mimo": (None, None, [*range(8)], 4, 1, 500),
}


@pytest.mark.parametrize("name", NANO)
def test_the_nano_files_hold_the_documented_values(name: str) -> None:
    latents, experts, mamba_layers, rank, accumulation, save_interval = NANO[name]
    config = load_config(name)
    m, t = config.model, config.trainer
    assert (m.hidden_size, m.num_layers, m.num_heads, m.vocab_size, m.max_seq_len, m.rope_theta) == (
        384,
        8,
        6,
        128354,
        512,
        1e4,
    )
    assert ((m.kv_latent_dim, m.q_latent_dim, m.d_rope) if m.uses_mla else None) == latents
    of_experts = (m.num_experts, m.experts_per_tok, m.intermediate_size, m.shared_expert_enabled)
    assert (of_experts if m.uses_moe else None) == experts
    assert list(m.mamba_layers) == mamba_layers
    assert (m.mamba3_mimo_rank if m.mamba3_enabled else None) == rank
    assert (m.mamba2_num_heads, m.mamba2_head_dim, m.mamba2_state_size, m.mamba2_chunk_size) == (48, 16, 64, 64)
    assert (m.mamba2_n_groups, m.mamba2_conv_kernel, m.mamba2_expand) == (1, 4, 2)
    assert (t.batch_size, t.gradient_accumulation, t.save_interval) == (4, accumulation, save_interval)
    assert (t.learning_rate, t.lr_schedule, t.max_steps, t.num_epochs, t.log_interval) == (3e-4, "constant", 0, 2, 10)
    assert (t.load_balance_alpha, t.group_size, t.beta_kl) == (0.01 if experts else 0.0, 4, 0.04)


def test_nano_start_is_the_documented_hybrid_at_byte_vocabulary() -> None:
    m, t = load_config("nano-start").model, load_config("nano-start").trainer
    assert (m.hidden_size, m.num_layers, m.num_heads, m.max_seq_len, m.vocab_size) == (128, 4, 4, 64, 260)
    assert (m.kv_latent_dim, m.q_latent_dim, m.d_rope, m.intermediate_size) == (64, 64, 8, 512)
    assert (m.num_experts, m.experts_per_tok, m.shared_expert_enabled) == (2, 1, True)
    assert m.layer_kinds == ("mamba2", "mamba2", "mamba2", "attention")
    assert (m.mamba2_num_heads, m.mamba2_head_dim, m.mamba2_state_size, m.mamba2_chunk_size) == (16, 16, 32, 32)
    assert (m.mamba2_n_groups, m.mamba2_conv_kernel, m.mamba2_expand, t.load_balance_alpha) == (1, 4, 2, 0.01)


# --- they train -------------------------------------------------------------------------------------------------------


def trained(directory: Path, *argv: object) -> list[float]:
    """The losses of a run of the command line in this process, a step file of whose end is there."""
    run = ("--headless", "--target-device", "cpu", "--checkpoint-dir", directory, "--set", "log_interval=1")
    assert tiny.cli("train", *argv, *run) == 0
    losses = [line["loss"] for line in tiny.metrics_of(directory) if "loss" in line]
    assert tiny.steps_in(directory)[-1] == len(losses)
    return losses


def steps_on_random_tokens(name: str) -> list[object]:
    return ["-f", name, "--max-steps", 3, "--batch-size", 1, "--seq-len", 128, "-d", "random"]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*LARGE, "shakespeare-char")])
def test_every_small_file_trains_on_random_tokens_for_three_steps(tmp_path: Path, name: str) -> None:
    losses = trained(tmp_path, *steps_on_random_tokens(name), "--set", "eval_fraction=0")
    # Before anything is learned every token is about as likely as any other.
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(260), abs=0.1)


@pytest.mark.thorough
@pytest.mark.parametrize("name", LARGE)
def test_the_first_half_of_every_large_file_trains_a_step_at_a_small_vocabulary(tmp_path: Path, name: str) -> None:
    mamba_layers = [layer for layer in model_section(name).get("mamba_layers") or [] if layer < 4]
    changes = [
        "num_layers=4",
        f"mamba_layers={mamba_layers}",
        "vocab_size=512",
        "max_seq_len=64",
        "batch_size=1",
        "gradient_accumulation=1",
        "data.path=random",
    ]
    config = load_config(name, [*changes, f"trainer.checkpoint_dir={tmp_path}"])
    model = LanguageModel(config.model)
    trainer = Trainer(config, model)
    before = {key: array.copy() for key, array in model.state_dict().items()}
    record = trainer.train_step(iter([trainer.windows.batch(0, 1)]))
    assert record["loss"] == pytest.approx(math.log(512), abs=0.5)
    assert [key for key, array in model.state_dict().items() if np.array_equal(array, before[key])] == []


#: As many characters as shakespeare-char has tokens.
CHARACTERS = string.ascii_letters + string.digits + " .\n"


def steps_on_characters(tmp_path: Path, text: str, *more: object) -> list[float]:
    (tmp_path / "text.txt").write_text(text)
    sizes = ("--max-steps", 3, "--batch-size", 1, "--seq-len", 128, *more)
    return trained(tmp_path / "run", "-f", "shakespeare-char", "-d", tmp_path / "text.txt", *sizes)


def test_shakespeare_char_trains_on_a_text_of_its_65_characters(tmp_path: Path) -> None:
    losses = steps_on_characters(tmp_path, CHARACTERS * 40)
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(65), abs=0.1)


def test_a_text_of_one_line_is_trained_on_to_the_end_with_its_characters_as_tokens(tmp_path: Path) -> None:
    assert len(steps_on_characters(tmp_path, CHARACTERS[:-1] * 40, "--set", "vocab_size=64")) == 3


def test_a_vocabulary_larger_than_the_tokenizer_s_trains_to_the_end(tmp_path: Path) -> None:
    assert len(steps_on_characters(tmp_path, "abc\n" * 500)) == 3


CHILD = """
import sys
from oxidizr_ref.cli.main import _run
code = _run(sys.argv[1:])
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
sys.exit(code)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", LARGE)
def test_every_large_file_trains_at_its_full_vocabulary(tmp_path: Path, name: str) -> None:
    argv = [*map(str, steps_on_random_tokens(name)), "--headless"]
    began = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, "train", *argv], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    *lines, peak = child.stdout.splitlines()
    print(f"{name}: {time.monotonic() - began:.0f} s, peak {int(peak) * 1024 / 1e9:.2f} GB")
    assert json.loads(lines[0])["loss"] == pytest.approx(math.log(128354), abs=0.5)
    assert tiny.steps_in(tmp_path / "checkpoints" / name) == [3]


def entropy_of_bytes() -> float:
    """Nats a byte of the bundled text for a reader who knows how common each byte is, and nothing of what came before."""
    counts = np.bincount(np.frombuffer(bundled_corpus().read_bytes(), dtype=np.uint8))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.thorough
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in TINY])
def test_a_tiny_model_soon_knows_more_than_how_common_each_byte_is(tmp_path: Path, name: str) -> None:
    losses = trained(tmp_path, "-f", name, "--max-steps", 50)
    assert losses[0] > 5.4 and np.mean(losses[-5:]) < entropy_of_bytes()


@pytest.mark.long
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_trains_within_15_seconds_and_half_a_nat_beyond_the_bytes(tmp_path: Path, name: str) -> None:
    began = time.monotonic()
    process = tiny.start(["train", "-f", name, "--headless"], cwd=tmp_path)
    out, _ = tiny.finish(process)
    seconds = time.monotonic() - began
    last = json.loads(out.splitlines()[-1])
    print(f"{name}: {seconds:.1f} s, loss {last['loss']:.3f}")
    assert seconds < 15 and last["step"] == 150
    assert last["loss"] < entropy_of_bytes() - 0.5
