"""Write `format_v1.safetensors`: a checkpoint of format version 1, by a second writer that shares no code with the first.

It follows docs/checkpoints.md with json, hashlib, struct, NumPy and ml_dtypes alone. The file is never to be written again:
every later version of the package must read it, and as long as it writes version 1 must write these bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "U32": np.uint32,
    "U8": np.uint8,
}
CHUNK = 4 * 1024 * 1024
STEP, CURSOR, WINDOWS_AN_EPOCH, SEQUENCE = 12, 96, 40, 8


def tensors() -> dict[str, np.ndarray]:
    """One or more of every dtype: no axis, an axis of 0 and of 1, NaNs, infinities, -0, denormals; names that sort oddly."""
    nan_with_payload = np.array([0x7FF8_0000_0000_0001, 0xFFF0_0000_0000_0001], dtype=np.uint64).view(np.float64)
    special = np.array([np.inf, -np.inf, -0.0, 5e-324, 1.7976931348623157e308], dtype=np.float64)
    return {
        "embed_tokens.weight": (np.arange(12, dtype=np.float32).reshape(3, 4) - 5.5) / np.float32(3),
        "norm.weight": np.array([1, 0.5, -2, 65504], dtype=np.float16),
        "layers.10.scale": np.array([1, -1, 0.0078125, 3e38], dtype=np.float32).astype(ml_dtypes.bfloat16),
        "layers.9.scale": np.arange(0x7F7E, 0x7F84, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(1, 6),
        "optimizer.exp_avg.embed_tokens.weight": np.full((3, 4), 2.0**-149, dtype=np.float32),
        "optimizer.exp_avg_sq.embed_tokens.weight": np.zeros((3, 4), dtype=np.float32),
        "special": np.concatenate([special, nan_with_payload]),
        "scalar": np.array(-0.1),
        "Z": np.array([-(2**63), 2**63 - 1, -1], dtype=np.int64),
        "counts": np.array([[0], [2**32 - 1]], dtype=np.uint32),
        "bytes": np.arange(251, 256, dtype=np.uint8),
        "no_rows": np.zeros((0, 3), dtype=np.uint8),
        "no_columns": np.zeros((2, 0, 5), dtype=np.float64),
        "0": np.array(7, dtype=np.uint8),  # sorts before __metadata__, as Z does
        "a_b": np.array([1], dtype=np.uint8),
        "a.b": np.array([2], dtype=np.uint8),
        "a-b": np.array([3], dtype=np.uint8),
        "a": np.array([4], dtype=np.uint8),
        "-": np.array([5], dtype=np.uint8),
        "x" * 256: np.array([6], dtype=np.uint8),  # as long as a name may be
    }


def metadata() -> dict[str, str]:
    """What a training state says of itself, and some strings that need care."""
    progress = {
        "step": STEP,
        "cursor": CURSOR,
        "windows_an_epoch": WINDOWS_AN_EPOCH,
        "epoch": CURSOR // WINDOWS_AN_EPOCH,
        "tokens_seen": CURSOR * SEQUENCE,
    }
    model = {"dtype": "f32", "hidden_size": 4, "max_seq_len": SEQUENCE, "num_heads": 1, "num_layers": 0, "vocab_size": 3}
    trainer = {
        "batch_size": 4,
        "betas": [0.9, 0.999],
        "eps": 1e-08,
        "gradient_accumulation": 2,
        "learning_rate": 0.0003,
        "seed": 1,
    }
    return {
        "format": "pt",
        "format_version": "1",
        "numerics_version": "1",
        "progress": compact(progress),
        "config": compact({"data": {"tokenizer": "char"}, "device": "cpu", "model": model, "trainer": trainer}),
        "data": compact({"digest": "ab" * 32, "tokens": 321}),
        "tokenizer": compact({"digest": "cd" * 32, "name": "char", "vocabulary": "aé🦀"}),
        "fingerprint": compact({"blas": ["openblas 0.3.31 Haswell"], "device": "cpu", "numerics": 1, "numpy": "2.3.5"}),
        "lineage": compact([{"step": 4, "config": "01" * 32, "data": "ab" * 32, "fingerprint": "23" * 32}]),
        "": "the empty key",
        "empty value": "",
        "length": "so that the header needs more than 32 spaces of padding",
        "note": 'line\nnext\r\ttab "quoted" \\ / \b\f \x00\x1f\x7f é \u2028 🦀',
        'quote " backslash \\ slash / tab \t': "a key that needs escapes",
        "größe": "a key beyond ASCII",
        "\uffee": "sorts before the next one by code point, after it in UTF-16",
        "🦀": "a key outside the basic plane",
    }


def compact(value: object) -> str:
    """JSON with sorted keys, no spaces, and nothing but printable ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(data: bytes) -> str:
    """The SHA-256 of the (binary) SHA-256s of the 4 MiB chunks; of nothing, where there are none."""
    chunks = (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))
    return hashlib.sha256(b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)).hexdigest()


def file_bytes(arrays: dict[str, np.ndarray], words: dict[str, str]) -> bytes:
    """The whole file, as docs/checkpoints.md describes it."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {}
    payload = b""
    for name in sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name)):
        data = arrays[name].tobytes()
        offsets = [len(payload), len(payload) + len(data)]
        header[name] = {"dtype": names[arrays[name].dtype], "shape": list(arrays[name].shape), "data_offsets": offsets}
        payload += data
    digests = compact({name: digest(array.tobytes()) for name, array in arrays.items()})
    zeros = "0" * 64
    header["__metadata__"] = {**words, "digests": digests, "header_digest": zeros}
    text = compact(header)
    text += " " * (-(8 + len(text)) % 64)
    prefix = struct.pack("<Q", len(text))
    own = hashlib.sha256(prefix + text.encode("ascii")).hexdigest()
    before, field, after = text.partition(f',"header_digest":"{zeros}"')
    return prefix + (before + field.replace(zeros, own) + after).encode("ascii") + payload


if __name__ == "__main__":
    Path(__file__).with_name("format_v1.safetensors").write_bytes(file_bytes(tensors(), metadata()))
