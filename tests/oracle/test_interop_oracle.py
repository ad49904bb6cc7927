"""Checkpoints in other readers: the stock safetensors package, through PyTorch and through NumPy, sees the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from golden import write_format_v1

from oxidizr_ref.checkpoint import format
from oxidizr_ref.errors import CheckpointError

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
safetensors = pytest.importorskip("safetensors")

pytestmark = pytest.mark.oracle

TORCH_DTYPES = {
    np.float64: torch.float64,
    np.float32: torch.float32,
    np.float16: torch.float16,
    ml_dtypes.bfloat16: torch.bfloat16,
    np.int64: torch.int64,
    np.uint32: torch.uint32,
    np.uint8: torch.uint8,
}
GOLDEN = tiny.REPOSITORY / "tests" / "golden" / "format_v1.safetensors"


def bytes_of(tensor: Any) -> bytes:
    """The bytes of a PyTorch tensor, by PyTorch's own means."""
    return bytes(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


@pytest.mark.parametrize("kind", TORCH_DTYPES, ids=lambda kind: np.dtype(kind).name)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (2, 3, 5), (1, 1, 1, 1)], ids=str)
def test_pytorch_reads_equal_bits_of_every_dtype_and_shape(tmp_path: Path, kind: Any, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(kind)
    raw = np.random.default_rng(len(shape)).bytes(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    saved = np.frombuffer(raw, dtype=dtype).reshape(shape)  # any bits: NaNs with payloads and denormals among them
    path = tmp_path / "x.safetensors"
    format.save(path, {"a.b": saved, "other": np.zeros(3, np.uint8)}, {"é": "🦀"})
    found = safetensors_torch.load_file(path)["a.b"]
    assert (found.dtype, tuple(found.shape), bytes_of(found)) == (TORCH_DTYPES[kind], shape, raw)
    assert found.data_ptr() % dtype.itemsize == 0
    with safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["a.b", "other"] and file.metadata()["é"] == "🦀"
        assert bytes_of(file.get_tensor("a.b")) == raw


def test_pytorch_reads_equal_bits_of_the_golden_file() -> None:
    found = safetensors_torch.load_file(GOLDEN)
    wanted = write_format_v1.tensors()
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == TORCH_DTYPES[array.dtype.type]
        assert (tuple(found[name].shape), bytes_of(found[name])) == (array.shape, array.tobytes()), name


def test_the_numbers_are_the_same_numbers_in_pytorch(tmp_path: Path) -> None:
    """Equal bits mean equal values only if both sides mean the same by them: compare a few values by themselves."""
    values = [0.0, 1.0, -2.5, 0.15625, 65504.0, 2.0**-14]
    saved = {np.dtype(kind).name: np.array(values).astype(kind) for kind in list(TORCH_DTYPES)[:4]}
    saved |= {"int64": np.array([-(2**63), 2**63 - 1]), "uint32": np.array([0, 2**32 - 1], np.uint32)}
    format.save(tmp_path / "x", saved, {})
    for name, tensor in safetensors_torch.load_file(tmp_path / "x").items():
        assert tensor.tolist() == saved[name].tolist(), name


def test_weights_of_a_run_are_found_by_pytorch_under_their_plain_names(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, trainer={"max_steps": 1, "save_interval": 1})
    assert run.train() == 0
    found, ours = safetensors_torch.load_file(run.path(1)), format.load(run.path(1)).tensors
    assert {name: bytes_of(tensor) for name, tensor in found.items()} == {n: array.tobytes() for n, array in ours.items()}
    assert {"embed_tokens.weight", "norm.weight", "optimizer.exp_avg.norm.weight"} <= found.keys()


def test_a_file_that_pytorch_wrote_is_told_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        safetensors_torch.save_file({"x": torch.ones(3)}, tmp_path / "x", metadata=metadata)
        with pytest.raises(CheckpointError, match="not a checkpoint of oxidizr_ref") as caught:
            format.load(tmp_path / "x")
        assert type(caught.value) is CheckpointError
