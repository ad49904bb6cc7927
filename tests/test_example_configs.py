"""Configs as oxidizr's documentation writes them load, build and train unmodified; broken ones are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from oxidizr_ref import load_config

# --- what loads -------------------------------------------------------------------------------------------------------

#: Every documented key, as its example files write them: what a model does not use is null.
ALL_NULL = {
    "kv_heads": None,
    "kv_latent_dim": None,
    "q_latent_dim": None,
    "d_rope": None,
    "num_experts": None,
    "experts_per_tok": None,
    "shared_expert_enabled": None,
    "intermediate_size": None,
    "mamba_layers": None,
    "mamba_d_state": None,
    "mamba_d_conv": None,
    "mamba_expand": None,
    "mamba2_num_heads": None,
    "mamba2_head_dim": None,
    "mamba2_state_size": None,
    "mamba2_chunk_size": None,
    "mamba2_n_groups": None,
    "mamba2_conv_kernel": None,
    "mamba2_expand": None,
    "mamba3_enabled": None,
    "mamba3_complex_rope": None,
    "mamba3_mimo_rank": None,
    "mamba3_use_conv": None,
}
SIZES = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "vocab_size": 300, "max_seq_len": 24, "rope_theta": 10000.0}
TRAINER = {
    "target_device": "gpu",
    "learning_rate": 0.002,
    "max_steps": 1,
    "num_epochs": 2,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "checkpoint_dir": "./checkpoints/example",
    "log_interval": 10,
    "save_interval": 100,
    "max_checkpoints": None,
    "load_balance_alpha": 0.01,
    "group_size": 4,
    "beta_kl": 0.04,
}
MLA = {"kv_latent_dim": 16, "q_latent_dim": 16, "d_rope": 4}
MOE = {"num_experts": 4, "experts_per_tok": 2, "shared_expert_enabled": True, "intermediate_size": 48}
MAMBA1 = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = {
    "mamba2_num_heads": 8,
    "mamba2_head_dim": 8,
    "mamba2_state_size": 16,
    "mamba2_chunk_size": 8,
    "mamba2_n_groups": 1,
    "mamba2_conv_kernel": 4,
    "mamba2_expand": 2,
}
MAMBA3 = {**MAMBA2, "mamba3_enabled": True, "mamba3_complex_rope": True, "mamba3_mimo_rank": 0, "mamba3_use_conv": False}
EXAMPLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": ({"kv_heads": 2, "intermediate_size": 64}, ("attention",) * 3),
    "mla": ({**MLA, "intermediate_size": 64}, ("attention",) * 3),
    "gqa and experts": ({**MOE, "kv_heads": 2}, ("attention",) * 3),
    "mamba1": ({**MAMBA1, "mamba_layers": [0, 1, 2]}, ("mamba1",) * 3),
    "mamba2": ({**MAMBA2, "mamba_layers": [0, 1, 2]}, ("mamba2",) * 3),
    "mamba3": ({**MAMBA3, "mamba_layers": [0, 1, 2]}, ("mamba3",) * 3),
    "mamba3, rank 2": ({**MAMBA3, "mamba_layers": [0, 1, 2], "mamba3_mimo_rank": 2}, ("mamba3",) * 3),
    "nano": ({**MLA, **MOE, **MAMBA2, "mamba_layers": [0, 2]}, ("mamba2", "attention", "mamba2")),
    "nano of mamba3": ({**MLA, **MOE, **MAMBA3, "mamba_layers": [0, 2]}, ("mamba3", "attention", "mamba3")),
    # Keys of layers that are not there: a Llama with all of Mamba's sizes, and a Mamba1 with those of attention and Mamba3.
    "llama among unused keys": ({**MAMBA1, **MAMBA3, "kv_heads": 2, "intermediate_size": 64}, ("attention",) * 3),
    "mamba1 among unused keys": (
        {**MAMBA1, **MLA, **MOE, "mamba_layers": [0, 1, 2], "mamba2_state_size": 3, "mamba3_mimo_rank": 4},
        ("mamba1",) * 3,
    ),
}


def written(path: Path, model: dict[str, Any], trainer: dict[str, Any]) -> Path:
    """A config in block style, a key a line, null where there is None."""
    lines = []
    for name, section in {"model": model, "trainer": trainer}.items():
        lines += [f"{name}:", *(f"  {key}: {json.dumps(value)}" for key, value in section.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def trains_one_step(path: Path, directory: Path) -> None:
    """A step of `train` on random tokens, saved where the config says or by default."""
    assert tiny.cli("train", "-f", path, "-d", "random", "--max-steps", 1, "--headless") == 0
    assert tiny.steps_in(directory) == [1]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_with_every_documented_key_loads_builds_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model, kinds = EXAMPLES[name]
    path = written(tmp_path / "example.yaml", {**SIZES, **ALL_NULL, **model}, TRAINER)
    config = load_config(path)
    assert config.model.layer_kinds == kinds
    assert config.model.uses_mla == ("kv_latent_dim" in model) and config.model.uses_moe == ("num_experts" in model)
    trains_one_step(path, tmp_path / "checkpoints" / "example")


SHORT = {"learning_rate": 0.002, "batch_size": 2}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_short_example_without_optional_keys_is_the_same_model_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without load_balance_alpha, group_size, beta_kl and nulls; and for pure Mamba models without num_heads."""
    monkeypatch.chdir(tmp_path)
    model, kinds = EXAMPLES[name]
    sizes = {key: value for key, value in SIZES.items() if key != "num_heads" or "attention" in kinds}
    path = written(tmp_path / "short.yaml", {**sizes, **model}, SHORT)
    whole = load_config(written(tmp_path / "whole.yaml", {**SIZES, **ALL_NULL, **model}, TRAINER))
    heads = ("num_heads", "kv_heads", "name")  # what no layer of a pure Mamba model reads
    short = load_config(path).model.model_dump()
    unread = heads if "attention" not in kinds else ("name",)
    assert {k: v for k, v in short.items() if k not in unread} == {
        k: v for k, v in whole.model.model_dump().items() if k not in unread
    }
    assert load_config(path).trainer.load_balance_alpha == 0.0
    trains_one_step(path, tmp_path / "checkpoints")


# --- what is refused --------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "a quarter of an odd state": (
        {**MAMBA3, "mamba_layers": [0], "mamba2_state_size": 6},
        "mamba2_state_size",
        "mamba2_state_size * mamba3_rope_fraction = 3 states are rotated in pairs: it must be even",
    ),
    "half of an odd state": (
        {**MAMBA3, "mamba_layers": [0], "mamba2_state_size": 15},
        "mamba2_state_size",
        "mamba2_state_size * mamba3_rope_fraction = 7.5 states are rotated in pairs: it must be even",
    ),
    "more experts a token than there are": (
        {**MOE, "experts_per_tok": 5},
        "experts_per_tok",
        "expected at most num_experts = 4, found 5",
    ),
    "no expert a token": ({**MOE, "experts_per_tok": 0}, "experts_per_tok", "expected a value >= 1, found 0"),
    "a layer beyond the last": (
        {**MAMBA2, "mamba_layers": [0, 3]},
        "mamba_layers",
        "expected layers 0 to 2 (num_layers is 3), found 3",
    ),
    "a layer before the first": ({"mamba_layers": [-1]}, "mamba_layers[0]", "expected a value >= 0, found -1"),
    "heads that do not fill the width": (
        {**MAMBA2, "mamba_layers": [0], "mamba2_head_dim": 16},
        "mamba2_num_heads",
        "hidden_size * mamba2_expand = 32 * 2 = 64 must equal mamba2_num_heads * mamba2_head_dim = 8 * 16 = 128",
    ),
    "heads of Mamba3 that do not fill the width": (
        {**MAMBA3, "mamba_layers": [0], "mamba2_expand": 1},
        "mamba2_num_heads",
        "hidden_size * mamba2_expand = 32 * 1 = 32 must equal mamba2_num_heads * mamba2_head_dim = 8 * 8 = 64",
    ),
    "rotation from a latent that is not there": (
        {"kv_latent_dim": 16, "d_rope": 4, "mla_q_rope_from": "latent"},
        "mla_q_rope_from",
        "expected hidden: without q_latent_dim there is no latent of queries",
    ),
    "rotation without latents": (
        {"d_rope": 4},
        "d_rope",
        "MLA needs kv_latent_dim and d_rope together; missing: kv_latent_dim",
    ),
    "an odd number to rotate": ({**MLA, "d_rope": 5}, "d_rope", "RoPE rotates pairs, so it must be even; found 5"),
    "Mamba3 without heads": (
        {"mamba_layers": [0], "mamba3_enabled": True},
        "mamba3_enabled",
        "Mamba3 needs mamba2_num_heads; it is absent",
    ),
    "groups that do not divide the heads": (
        {**MAMBA2, "mamba_layers": [0], "mamba2_n_groups": 3},
        "mamba2_n_groups",
        "mamba2_num_heads 8 is not divisible by mamba2_n_groups 3",
    ),
    "a rotation of a third": (
        {**MAMBA3, "mamba_layers": [0], "mamba3_rope_fraction": 0.33},
        "mamba3_rope_fraction",
        "expected 0.5 or 1, found 0.33",
    ),
}


@pytest.mark.parametrize("command", ["train", "inspect"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_is_one_line_with_file_line_and_key_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    changes, key, message = BROKEN[case]
    path = written(tmp_path / "broken.yaml", {**SIZES, "name": "broken", **changes}, TRAINER)
    lines = path.read_text(encoding="utf-8").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.strip().startswith(f"{key.partition('[')[0]}:"))
    before = tiny.snapshot(tmp_path)
    assert tiny.cli(command, "-f", path) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: {path}:{number}: model.{key}: {message}\n"
    assert tiny.snapshot(tmp_path) == before


def test_a_broken_setting_is_named_as_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "nano.yaml", {**SIZES, **EXAMPLES["nano"][0]}, TRAINER)
    for setting, message in {
        "experts_per_tok=9": "model.experts_per_tok: expected at most num_experts = 4, found 9",
        "mamba2_n_groups=3": "model.mamba2_n_groups: mamba2_num_heads 8 is not divisible by mamba2_n_groups 3",
        "d_rope=3": "model.d_rope: RoPE rotates pairs, so it must be even; found 3",
    }.items():
        assert tiny.cli("train", "-f", path, "--set", setting) == 2
        assert capsys.readouterr().err == f"error: --set {setting}: {message}\n"
