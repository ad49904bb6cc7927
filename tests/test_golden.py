"""Against files that other implementations wrote: every architecture's numbers in float64, and a checkpoint of version 1.

``tests/golden/`` holds the files and their writers, which share no code with this package.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from architectures import everywhere
from devices import host
from golden import write_format_v1

from oxidizr_ref import LanguageModel, no_grad, reference
from oxidizr_ref.checkpoint import format, header, state
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.optim import AdamW, clip_factor, global_norm

FOLDER = Path(__file__).with_name("golden")
FORMAT_V1 = FOLDER / "format_v1.safetensors"
FORMAT_V1_SHA256 = "6aab84b3828b86b0f2f80a3399a979ea8265a9e52e647c484a2c240ddf7623bc"

#: A file each: Hugging Face's numbers, or where it has no such model those of a plain PyTorch one.
GOLDEN = ["llama", "mamba1", "mamba2", "mla", "moe", "mamba3", "mamba3_mimo", "hybrid"]

# --- architectures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """What a file of one architecture holds; `golden/recording.py` says what each name means."""

    tensors: dict[str, np.ndarray[Any, Any]]
    metadata: dict[str, str]

    def word(self, key: str) -> Any:
        return json.loads(self.metadata[key])

    def under(self, prefix: str) -> dict[str, np.ndarray[Any, Any]]:
        return {name.removeprefix(prefix): array for name, array in self.tensors.items() if name.startswith(prefix)}

    @property
    def alpha(self) -> float:
        """How much of the balance loss is in the losses. The file of the Llama, which has no router, does not say."""
        return float(self.metadata.get("load_balance_alpha", "0"))


@pytest.fixture(scope="module", params=GOLDEN)
def golden(request: pytest.FixtureRequest) -> Golden:
    """The numbers that PyTorch computed."""
    path = FOLDER / f"{request.param}.safetensors"
    with safetensors.safe_open(path, framework="numpy") as file:
        return Golden(safetensors.numpy.load_file(path), file.metadata())


@pytest.fixture(params=["fused", "reference"])
def model(request: pytest.FixtureRequest, golden: Golden, device: str) -> Iterator[LanguageModel]:
    """Our model with the golden weights, its fused side or its plain one, on the host or on a device."""
    model = LanguageModel(ModelConfig(name="golden", dtype="f64", **golden.word("sizes")), seed=0, device=device)
    model.load_state_dict(golden.under("start."))
    with reference() if request.param == "reference" else contextlib.nullcontext():
        yield model


def relative_error(found: Any, wanted: np.ndarray[Any, Any]) -> float:
    found = host(found)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == np.float64
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_the_golden_numbers_were_made_by_pytorch_in_a_script_that_imports_nothing_of_this_package(golden: Golden) -> None:
    assert "torch" in golden.word("versions")
    scripts = [Path(__file__).parent.parent / golden.metadata["made_by"]]
    for script in scripts:  # which grows by what each imports
        for name in imported(script):
            assert name.split(".")[0] != "oxidizr_ref", script.name
            path = script.parent.parent / f"{name.replace('.', '/')}.py"
            scripts += [path] if path.exists() and path not in scripts else []
    assert FOLDER / "recording.py" in scripts, "nothing was followed"


def imported(script: Path) -> list[str]:
    """Every module a script may import, and every name it takes from one, which may be a module too."""
    found = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_logits_equal_the_golden_ones(model: LanguageModel, golden: Golden) -> None:
    with no_grad():
        logits = model(golden.tensors["tokens"][0]).data
    assert relative_error(logits, golden.tensors["logits"]) < 1e-10


def test_logits_of_decoding_token_by_token_equal_the_golden_ones(model: LanguageModel, golden: Golden) -> None:
    tokens = golden.tensors["tokens"][0]
    cache = model.new_cache(len(tokens))
    for t in range(tokens.shape[1]):
        assert relative_error(model.step(tokens[:, t], cache).data, golden.tensors["logits"][:, t]) < 1e-10, t


def test_loss_and_every_gradient_equal_the_golden_ones(model: LanguageModel, golden: Golden) -> None:
    loss = model.loss(golden.tensors["tokens"][0], golden.tensors["targets"][0], load_balance_alpha=golden.alpha)
    loss.backward()
    assert loss.item() == pytest.approx(golden.tensors["losses"][0], rel=1e-10)
    gradients, wanted = {name: p.grad for name, p in model.named_parameters()}, golden.under("gradient.")
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted[name]) < 1e-7, name


@everywhere("model", ["fused", "reference"], ["fused"], fixtures=["model"])
def test_losses_norms_and_weights_of_clipped_adamw_steps_equal_the_golden_ones(model: LanguageModel, golden: Golden) -> None:
    keys = golden.word("optimizer")
    max_norm = keys.pop("max_grad_norm")
    optimizer = AdamW(model.state_dict(), keys["lr"], tuple(keys["betas"]), keys["eps"], keys["weight_decay"])
    for step, (tokens, targets) in enumerate(zip(golden.tensors["tokens"], golden.tensors["targets"], strict=True)):
        loss = model.loss(tokens, targets, load_balance_alpha=golden.alpha)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        norm = global_norm(gradients)
        assert clip_factor(norm, max_norm) < 1  # otherwise clipping would not be compared
        optimizer.step(gradients, gradient_scale=clip_factor(norm, max_norm))
        model.zero_grad()
        assert loss.item() == pytest.approx(golden.tensors["losses"][step], rel=1e-10)
        assert float(norm) == pytest.approx(golden.tensors["gradient_norms"][step], rel=1e-10)
    for name, wanted in golden.under("end.").items():
        assert relative_error(model.state_dict()[name], wanted) < 1e-10, name
        assert relative_error(golden.tensors["start." + name], wanted) > 1e-3, f"{name} hardly moved: nothing was compared"


# --- format version 1 -------------------------------------------------------------------------------------------------


def test_the_golden_file_of_format_version_1_is_the_first_one_ever_written() -> None:
    raw = FORMAT_V1.read_bytes()
    assert hashlib.sha256(raw).hexdigest() == FORMAT_V1_SHA256, "it must never be written again: old files load for ever"
    assert write_format_v1.file_bytes(write_format_v1.tensors(), write_format_v1.metadata()) == raw


def test_a_file_of_format_version_1_loads_bit_for_bit() -> None:
    loaded, wanted = format.load(FORMAT_V1), write_format_v1.tensors()
    assert loaded.metadata == write_format_v1.metadata() == format.read_header(FORMAT_V1).metadata
    assert loaded.tensors.keys() == wanted.keys()
    assert {array.dtype for array in wanted.values()} == {np.dtype(dtype) for dtype in write_format_v1.DTYPES.values()}
    for name, array in wanted.items():
        found = loaded.tensors[name]
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
    assert loaded.tensors["embed_tokens.weight"][0, 1] == np.float32(-1.5)
    assert loaded.tensors["Z"].tolist() == [-(2**63), 2**63 - 1, -1]


def test_a_file_of_format_version_1_holds_the_training_state_that_was_written() -> None:
    found = state.from_file(format.load(FORMAT_V1), FORMAT_V1)
    assert (found.step, found.cursor, found.windows_an_epoch) == (12, 96, 40)
    assert found.progress() == {"step": 12, "cursor": 96, "windows_an_epoch": 40, "epoch": 2, "tokens_seen": 768}
    assert found.optimizer.keys() == {"exp_avg.embed_tokens.weight", "exp_avg_sq.embed_tokens.weight"}
    assert {"embed_tokens.weight", "norm.weight"} <= found.weights.keys()
    assert found.tokenizer["vocabulary"] == "aé🦀"
    assert found.config["device"] == "cpu" and found.config["data"] == {"tokenizer": "char"}
    assert found.config["model"]["max_seq_len"] == 8 and found.config["trainer"]["learning_rate"] == 3e-4
    assert [line["step"] for line in found.lineage] == [4]


@pytest.mark.skipif(header.FORMAT_VERSION != 1, reason="this package writes a later version")
def test_this_package_writes_the_bytes_of_the_independent_writer(tmp_path: Path) -> None:
    format.save(tmp_path / "again.safetensors", write_format_v1.tensors(), write_format_v1.metadata())
    assert (tmp_path / "again.safetensors").read_bytes() == FORMAT_V1.read_bytes()


def test_stock_safetensors_reads_the_file_of_format_version_1() -> None:
    loaded = safetensors.numpy.load_file(FORMAT_V1)
    assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in loaded.items()} == {
        name: (array.dtype, array.shape, array.tobytes()) for name, array in write_format_v1.tensors().items()
    }
    with safetensors.safe_open(FORMAT_V1, framework="numpy") as file:
        assert write_format_v1.metadata().items() <= file.metadata().items()
