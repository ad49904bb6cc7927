# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 13 · A checkpoint, byte by byte
#
# After this you can
#
# - open a checkpoint with nothing but `struct`, `json` and `hashlib`, and find any number in it by its offset;
# - verify every bit of it by hand, flip one, and say which of three digests catches it;
# - compare two checkpoints number by number, through Python and from the command line;
# - say what is not in the file, and why training continues from it to the same bits all the same.
#
# **Needs** notebooks 11 (the moments of AdamW) and 12 (how floats are stored). **Time:** 35 minutes to read; it runs in
# about 10 seconds.

# %%
import hashlib
import json
import shutil
import struct
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from figures import COLORS, plt
from safetensors.numpy import load_file

from oxidizr_ref import LanguageModel, Trainer, checkpoint, load_config
from oxidizr_ref.checkpoint import difference
from oxidizr_ref.checkpoint.format import predict_size
from oxidizr_ref.errors import DamagedError
from oxidizr_ref.optim import learning_rate
from oxidizr_ref.run import RunOptions

# %% [markdown]
# ## 1 · A file to look at
#
# Four updates of `tiny-llama`, with a checkpoint after each.

# %%
scratch = tempfile.TemporaryDirectory()
root = Path(scratch.name)


def run(directory, resume=None):
    """Train into a directory below ``root``; from the beginning, or from a file."""
    keys = ["max_steps=4", "save_interval=1", "max_checkpoints=0", f"checkpoint_dir={root / directory}"]
    cfg = load_config("tiny-llama", [f"trainer.{key}" for key in keys])
    model = LanguageModel(cfg.model, cfg.trainer.seed)
    trainer = Trainer(cfg, model, options=RunOptions(resume=resume))
    trainer.fit()
    return trainer


trainer = run("first")
print(*sorted(path.name for path in (root / "first").iterdir()), sep="\n")

# %% [markdown]
# `config.json` and `metrics.jsonl` are for people, `.lock` keeps a second process out. To continue,
# `step_N.safetensors` alone is enough. It is a [safetensors](https://github.com/huggingface/safetensors) file, which
# many programs can read, with rules of its own on top ([all of them](../docs/checkpoints.md)). Take `step_3`:

# %%
path = root / "first" / "step_3.safetensors"
data = path.read_bytes()

# %% tags=["varies"]
for begin in range(0, 96, 16):
    row = data[begin : begin + 16]
    text = "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in row)
    print(f"{begin:4d}  {row.hex(' ')}  {text}")

# %% [markdown]
# ## 2 · Eight bytes, and the header
#
# ```text
# 0 … 7        H, the length of the header: an unsigned number, its lowest byte first
# 8 … 7+H      the header: JSON, then spaces so that 8+H is a multiple of 64
# 8+H …        the payload: the tensors, one after the other
# ```

# %%
(H,) = struct.unpack("<Q", data[:8])
text = data[8 : 8 + H]
header = json.loads(text)
metadata = header.pop("__metadata__")
assert (8 + H) % 64 == 0 and len(text) - len(text.rstrip(b" ")) < 64
print("keys of the metadata:", *metadata)
print("some tensors:", *list(header)[:3], "…", len(header), "in all")
print("one of them:", header["norm.weight"])

# %% [markdown]
# The header is written in *one way only*: keys sorted, no spaces, ASCII. So what we have parsed can be written again,
# and must give the same bytes:


# %%
def header_bytes(header, metadata):
    """The length prefix and the header."""
    text = json.dumps({"__metadata__": metadata, **header}, sort_keys=True, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text


assert header_bytes(header, metadata) == data[: 8 + H]
print("written again: the same bytes")

# %% [markdown]
# That is worth something. Two files with equal contents are equal files, so `sha256sum` is a test. And a reader may
# refuse whatever is not written so: a key twice, a nested object, a number with leading zeros, all of which JSON
# parsers treat each in their own way.
#
# ## 3 · The payload
#
# Each entry says where a tensor lies, counted from the beginning of the payload. They are ordered by the size of an
# item, largest first, then by name, without gaps: so every tensor is aligned to its item size.

# %%
start, end = 8 + H, 0
for name in sorted(header):  # all are F32 here
    entry = header[name]
    count = int(np.prod(entry["shape"]))
    begin, expected = entry["data_offsets"][0], end
    end = entry["data_offsets"][1]
    assert entry["dtype"] == "F32" and begin == expected and end - begin == 4 * count
assert start + end == len(data)


def kind(name):
    return ".".join(name.split(".")[:2]) if name.startswith("optimizer.") else "weights"


for which in ("weights", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
    names = [name for name in header if kind(name) == which]
    print(f"{which:21} {len(names)} tensors, {sum(int(np.prod(header[name]['shape'])) for name in names):,} numbers")

# %%
figure, axes = plt.subplots(figsize=(9, 2.4))
rows = ["header", "weights", "optimizer.exp_avg", "optimizer.exp_avg_sq"]
axes.broken_barh([(0, start / 1000)], (-0.4, 0.8), color=COLORS["black"])
for i, name in enumerate(sorted(header)):
    begin, stop = header[name]["data_offsets"]
    shade = (COLORS["blue"], COLORS["sky"])[i % 2]
    axes.broken_barh([((start + begin) / 1000, (stop - begin) / 1000)], (rows.index(kind(name)) - 0.4, 0.8), color=shade)
axes.set_yticks(range(4), rows)
axes.invert_yaxis()
axes.set(xlabel="offset in the file, kB", ylabel="contents", title="A weight and its two moments: 12 bytes a parameter")
plt.show()

# %% [markdown]
# One tensor, number by number, and the same through the package:


# %% tags=["varies"]
def tensor_bytes(data, name):
    (H,) = struct.unpack("<Q", data[:8])
    begin, stop = json.loads(data[8 : 8 + H])[name]["data_offsets"]
    return data[8 + H + begin : 8 + H + stop]


raw = tensor_bytes(data, "norm.weight")
numbers = struct.unpack(f"<{len(raw) // 4}f", raw)
loaded = checkpoint.load(path)
assert numbers == tuple(loaded.tensors["norm.weight"].tolist())
assert all(tensor_bytes(data, name) == array.tobytes() for name, array in loaded.tensors.items())
print("norm.weight after three updates:", *(f"{number:.4f}" for number in numbers[:4]), "…")
print(len(loaded.tensors), "tensors: equal to those of checkpoint.load, bit for bit")

# %% [markdown]
# ## 4 · Three layers of digests
#
# A SHA-256 is 256 bits that change beyond recognition when one bit of the input does.
#
# 1. `digests`, in the metadata, has one for each tensor: the SHA-256 of the SHA-256s of its pieces of 4 MiB, put end to
#    end. (In pieces, so that all cores can hash one large tensor.)
# 2. `header_digest` is the SHA-256 of length prefix and header. It cannot contain itself, so it is computed with its
#    own 64 digits replaced by zeros.
# 3. The `header_digest` covers the `digests`, and they cover the payload: two files with equal headers are equal.

# %%
CHUNK = 4 << 20


def tensor_digest(raw):
    parts = (hashlib.sha256(raw[i : i + CHUNK]).digest() for i in range(0, len(raw), CHUNK))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def header_digest(head):
    """Of length prefix and header, as bytes."""
    before, key, after = head.partition(b'"header_digest":"')
    return hashlib.sha256(before + key + b"0" * 64 + after[64:]).hexdigest()


def verify(data):
    """What is wrong with a checkpoint: the header, or the names of tensors. Empty when all is well."""
    (H,) = struct.unpack("<Q", data[:8])
    head = data[: 8 + H]
    if f'"header_digest":"{header_digest(head)}"'.encode() not in head:
        return ["the header"]  # and nothing in it can be believed
    header = json.loads(head[8:])
    wanted = json.loads(header.pop("__metadata__")["digests"])
    place = {name: [8 + H + offset for offset in header[name]["data_offsets"]] for name in sorted(header)}
    return [name for name, (begin, stop) in place.items() if tensor_digest(data[begin:stop]) != wanted[name]]


assert verify(data) == []
checkpoint.verify(path)  # raises if anything is wrong
print("by hand and by the package: whole")

# %% [markdown]
# ## 5 · Flip one bit
#
# One of the four million bits of this file, somewhere in the payload. A cosmic ray in a memory module, a tired disk, an
# unlucky copy:


# %% tags=["varies"]
def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


begin, stop = header["layers.0.mlp.down_proj.weight"]["data_offsets"]
place = start + begin + 400  # byte 0 of number 100
for bit, what in ((0, "the last of the fraction"), (30, "the first of the exponent"), (31, "the sign")):
    (before,) = struct.unpack("<f", data[place : place + 4])
    (after,) = struct.unpack("<f", flipped(data, 8 * place + bit)[place : place + 4])
    print(f"bit {bit:2d} of number 100, {what:25}: {before:+.9f} becomes {after:+.9g}")
print("found in:", *verify(flipped(data, 8 * place)))

# %% [markdown]
# The first is invisible to every plot. The second would end a training. What do readers say to the first?

# %%
damaged = root / "damaged.safetensors"
damaged.write_bytes(flipped(data, 8 * place))
tensors = load_file(damaged)
print("the stock reader of safetensors:", len(tensors), "tensors, no complaint")


def complaint(file):
    try:
        checkpoint.verify(file)
    except DamagedError as error:
        return str(error).replace(f"{root}/", "")
    return "whole"


# %% tags=["varies"]
print("the package:", complaint(damaged))
for bit, where in ((3, "in the length"), (8 * 2000, "in the header"), (8 * (len(data) - 1), "in the last byte")):
    damaged.write_bytes(flipped(data, bit))
    print(f"{where}: {complaint(damaged)}")

# %% [markdown]
# (That the stock reader is silent is no fault of it: the format has no digests.) Are *all* flips found? The tests of
# the package try every single one of a small file. Here, 1,500 drawn at random, by hand:

# %%
generator = np.random.default_rng(0)
bits = generator.choice(8 * start, 500, replace=False).tolist() + generator.integers(8 * start, 8 * len(data), 1000).tolist()
found = 0
for bit in bits:
    try:
        found += bool(verify(flipped(data, bit)))
    except (ValueError, struct.error):  # a header that is no JSON any more, or a length beyond the file
        found += 1
print(found, "of", len(bits), "found")
assert found == len(bits)

# %% [markdown]
# ## 6 · From the command line, and through Python
#
# ```bash
# oxidizr-ref inspect step_3.safetensors               # what is inside
# oxidizr-ref verify first/                            # every bit of every step file
# oxidizr-ref diff step_2.safetensors step_3.safetensors
# ```
#
# `diff` proves both files, then says where they differ. Through Python:

# %% tags=["varies"]
found = difference.compare(root / "first" / "step_2.safetensors", path)
print("equal:", found.equal, "| metadata that differ:", *(f"{c.key} {c.a} → {c.b}," for c in found.metadata))
for tensor in found.tensors[:4]:
    d = tensor.distance
    print(
        f"{tensor.name:42} {d.differing:5,} of {tensor.elements:5,} differ, by at most {d.max_abs:.1e} or {d.max_ulp:,} ulp"
    )
print("…")
untouched = [name for name in loaded.tensors if name not in {tensor.name for tensor in found.tensors}]
assert not found.equal and not untouched

# %% [markdown]
# An *ulp* is one step from a float to its neighbor (notebook 12). Two thousand million of them look like a mistake, and
# are none: a weight that changes its sign passes all the tiny numbers on the way, and half of all floats are smaller
# than 1. The embedding is special: only bytes that occur in the text get a gradient, but weight decay moves all of its
# rows.
#
# ## 7 · What is in the metadata

# %%
for key in ("format", "format_version", "progress", "tokenizer", "lineage"):
    print(f"{key:15} {metadata[key]}")
stored = json.loads(metadata["config"])
print("config         ", *stored, "| of the trainer:", *stored["trainer"])
print("fingerprint    ", *json.loads(metadata["fingerprint"]), "(names only: the values are this machine's)")

# %% [markdown]
# `progress` counts updates (`step`) and windows of data consumed (`cursor`); `epoch` and `tokens_seen` follow from them
# and are there for readers. `lineage` would tell of a run that was continued with another config, other data or on
# another class of machine. The `fingerprint` says on which bits can be expected to be the same.
#
# ## 8 · What is not in it
#
# | not in the file | because |
# |---|---|
# | the learning rate, the state of a schedule | a function of config and step |
# | the order of the data, the position in an epoch | a permutation computed from seed and epoch; the cursor says how far |
# | the state of random generators | there is none: random bits are addressed by (seed, stream, parameter, step, element) |
# | time, host, user, paths | equal runs would give different files |
# | how often to log or save, how many files to keep, threads | they change no bit, and must not |
#
# What is derived cannot disagree with what it is derived from. The next update's learning rate, from the file alone:

# %%
t, progress = stored["trainer"], json.loads(metadata["progress"])
rate = learning_rate(
    progress["step"] + 1,
    peak=t["learning_rate"],
    schedule=t["lr_schedule"],
    warmup_steps=t["warmup_steps"],
    total_steps=t["max_steps"],
    min_lr_ratio=t["min_lr_ratio"],
)
assert rate == trainer.learning_rate(4)
print("learning rate of update 4:", rate)
absent = set(trainer.config.trainer.model_dump()) - set(t)
print("keys of the trainer that are not stored:", *sorted(absent))

# %% [markdown]
# (`num_epochs` is absent because `max_steps` overrides it, `optimizer_dtype` because it has its default: it came after
# the first files, and leaving it out keeps their bytes.)

# %% [markdown]
# Now the proof. Copy this one file to an empty place, under another name, and go on from it for one update. Is `step_4`
# the same file as that of the run which was never interrupted?

# %%
shutil.copy(path, root / "a backup.safetensors")
run("second", resume=str(root / "a backup.safetensors"))
uninterrupted, resumed = (root / directory / "step_4.safetensors" for directory in ("first", "second"))
assert uninterrupted.read_bytes() == resumed.read_bytes()
digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in (uninterrupted, resumed)}
print("step_4 of both runs: one SHA-256" if len(digests) == 1 else digests)

# %% [markdown]
# How such a promise is broken in practice, and how each break is found, is the next notebook.
#
# ## Exercises
#
# Solutions follow each statement, hidden; they run and check themselves.

# %% [markdown]
# **Exercise 1 · The size of a file, before it is written.** From the number of parameters alone, say how large the
# payload of a checkpoint of `tiny-llama` is; then for weights in bf16, and for weights and moments in bf16. Check the
# first against this file, the others against `predict_size` of
# [`checkpoint/format.py`](../oxidizr_ref/checkpoint/format.py), whose headers differ by less than 512 bytes from this
# one's:
#
# ```python
# assert len(data) == 8 + H + payload("f32", "f32")
# ```

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
parameters = trainer.model.num_parameters()


def payload(weights, moments):
    size = {"f32": 4, "bf16": 2}
    return parameters * (size[weights] + 2 * size[moments])


assert len(data) == 8 + H + payload("f32", "f32")
for w, m in (("bf16", "f32"), ("bf16", "bf16")):
    stored_as = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16)}
    arrays = {n: a.astype(stored_as[m if n.startswith("optimizer.") else w]) for n, a in loaded.tensors.items()}
    assert abs(predict_size(arrays, loaded.metadata) - (8 + H + payload(w, m))) < 512

# %% [markdown]
# **Exercise 2 · A number of 16 bits.** NumPy has no bfloat16, and `struct` neither. Save a tensor of them with the
# package, and read it back with `struct` and shifts alone, given that bfloat16 is the upper half of a float32:
#
# ```python
# values = np.array([3.140625, -0.02, 1e30], ml_dtypes.bfloat16)
# checkpoint.save(root / "small.safetensors", {"some.weight": values}, {})
# assert read_bf16((root / "small.safetensors").read_bytes(), "some.weight") == values.astype(float).tolist()
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def read_bf16(data, name):
    raw = tensor_bytes(data, name)
    halves = struct.unpack(f"<{len(raw) // 2}H", raw)
    return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]


values = np.array([3.140625, -0.02, 1e30], ml_dtypes.bfloat16)
checkpoint.save(root / "small.safetensors", {"some.weight": values}, {})
assert read_bf16((root / "small.safetensors").read_bytes(), "some.weight") == values.astype(float).tolist()

# %% [markdown]
# **Exercise 3 · What digests do not do.** Change one weight of `data`, and then mend the two digests so that everybody
# believes it:
#
# ```python
# (root / "forged.safetensors").write_bytes(forged)
# checkpoint.verify(root / "forged.safetensors")  # does not raise
# assert forged != data and verify(forged) == []
# ```
#
# What follows for a file from a stranger?

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
forged = flipped(data, 8 * place + 30)
name = "layers.0.mlp.down_proj.weight"
digests = json.loads(metadata["digests"]) | {name: tensor_digest(tensor_bytes(forged, name))}
new = metadata | {"digests": json.dumps(digests, sort_keys=True, separators=(",", ":")), "header_digest": "0" * 64}
new["header_digest"] = header_digest(header_bytes(header, new))
forged = header_bytes(header, new) + forged[start:]
(root / "forged.safetensors").write_bytes(forged)
checkpoint.verify(root / "forged.safetensors")  # does not raise
assert forged != data and verify(forged) == []
# Digests find accidents. Against people only a digest that came another way helps: the SHA-256 of the whole file, from
# somebody you trust.

# %% [markdown]
# **Exercise 4 · Repair.** A damaged file should be replaced by a backup. But when a single bit of a known tensor is
# wrong and its digest is right, the bit can be found: try them all. Repair `norm.weight` in
#
# ```python
# broken = flipped(data, 8 * (start + header["norm.weight"]["data_offsets"][0]) + int(generator.integers(1024)))
# assert verify(broken) == ["norm.weight"] and repaired(broken, "norm.weight") == data
# ```
#
# How many hashes would two wrong bits take?


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def repaired(data, name):
    (H,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + H])
    wanted = json.loads(header["__metadata__"]["digests"])[name]
    begin, stop = (8 + H + offset for offset in header[name]["data_offsets"])
    for bit in range(8 * begin, 8 * stop):
        candidate = flipped(data[begin:stop], bit - 8 * begin)
        if tensor_digest(candidate) == wanted:
            return data[:begin] + candidate + data[stop:]
    return None


broken = flipped(data, 8 * (start + header["norm.weight"]["data_offsets"][0]) + int(generator.integers(1024)))
assert verify(broken) == ["norm.weight"] and repaired(broken, "norm.weight") == data
# Two: 1024 · 1023 / 2 = 523,776 hashes; for a tensor of a megabyte already 3.5e13.

# %%
scratch.cleanup()

# %% [markdown]
# ## Where to read on
#
# - The safetensors format: github.com/huggingface/safetensors, section *Format*. NIST, FIPS 180-4: SHA-256. Merkle
#   1987, *A Digital Signature Based on a Conventional Encryption Function*: trees of digests.
# - Pillai et al. 2014, *All File Systems Are Not Created Equal*: what is left of a file after a power cut, and why the
#   package flushes, reads back and renames.
# - In the project: [checkpoints](../docs/checkpoints.md), the promise and its limits;
#   [a reader in C](../docs/read_checkpoint.c) in eighty lines;
#   [`checkpoint/header.py`](../oxidizr_ref/checkpoint/header.py), [`format.py`](../oxidizr_ref/checkpoint/format.py),
#   [`disk.py`](../oxidizr_ref/checkpoint/disk.py).
# - Next: notebook 14, [resume to the same bits](14_resume_to_the_same_bits.ipynb): break it, and find each break.
