"""Against files that other implementations wrote: Llama's numbers in float64, and a checkpoint of format version 1.

``tests/golden/`` holds the files and their writers, which share no code with this package.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from golden import write_format_v1

from oxidizr_ref import LanguageModel, no_grad, reference
from oxidizr_ref.checkpoint import format, header, state
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.optim import AdamW, clip_factor, global_norm

GOLDEN = Path(__file__).with_name("golden")
LLAMA, FORMAT_V1 = GOLDEN / "llama.safetensors", GOLDEN / "format_v1.safetensors"
FORMAT_V1_SHA256 = "6aab84b3828b86b0f2f80a3399a979ea8265a9e52e647c484a2c240ddf7623bc"

# --- Llama ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray[Any, Any]]:
    """The numbers PyTorch and Hugging Face computed."""
    return safetensors.numpy.load_file(LLAMA)


@pytest.fixture(params=["fused", "reference"])
def model(request: pytest.FixtureRequest, golden: dict[str, np.ndarray[Any, Any]]) -> Iterator[LanguageModel]:
    """Our model with the golden weights, its fused side or its plain one."""
    model = LanguageModel(ModelConfig(name="golden", dtype="f64", **words("sizes")), seed=0)
    model.load_state_dict(under("start.", golden))
    with reference() if request.param == "reference" else contextlib.nullcontext():
        yield model


def words(key: str) -> dict[str, Any]:
    with safetensors.safe_open(LLAMA, framework="numpy") as file:
        found: dict[str, Any] = json.loads(file.metadata()[key])
    return found


def under(prefix: str, golden: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    return {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}


def relative_error(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == np.float64
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_the_golden_llama_was_made_by_pytorch_and_hugging_face() -> None:
    assert {"torch", "transformers"} <= words("versions").keys()


def test_logits_equal_the_golden_ones(model: LanguageModel, golden: dict[str, np.ndarray[Any, Any]]) -> None:
    with no_grad():
        logits = model(golden["tokens"][0]).data
    assert relative_error(logits, golden["logits"]) < 1e-10


def test_loss_and_every_gradient_equal_the_golden_ones(
    model: LanguageModel, golden: dict[str, np.ndarray[Any, Any]]
) -> None:
    loss = model.loss(golden["tokens"][0], golden["targets"][0])
    loss.backward()
    assert loss.item() == pytest.approx(golden["losses"][0], rel=1e-10)
    gradients, wanted = {name: p.grad for name, p in model.named_parameters()}, under("gradient.", golden)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted[name]) < 1e-7, name


def test_losses_norms_and_weights_of_clipped_adamw_steps_equal_the_golden_ones(
    model: LanguageModel, golden: dict[str, np.ndarray[Any, Any]]
) -> None:
    keys = words("optimizer")
    max_norm = keys.pop("max_grad_norm")
    optimizer = AdamW(model.state_dict(), keys["lr"], tuple(keys["betas"]), keys["eps"], keys["weight_decay"])
    for step, (tokens, targets) in enumerate(zip(golden["tokens"], golden["targets"], strict=True)):
        loss = model.loss(tokens, targets)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        norm = global_norm(gradients)
        assert clip_factor(norm, max_norm) < 1  # otherwise clipping would not be compared
        optimizer.step(gradients, gradient_scale=clip_factor(norm, max_norm))
        model.zero_grad()
        assert loss.item() == pytest.approx(golden["losses"][step], rel=1e-10)
        assert norm == pytest.approx(golden["gradient_norms"][step], rel=1e-10)
    for name, wanted in under("end.", golden).items():
        assert relative_error(model.state_dict()[name], wanted) < 1e-10, name
        assert relative_error(golden["start." + name], wanted) > 1e-3, f"{name} hardly moved: nothing was compared"


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
