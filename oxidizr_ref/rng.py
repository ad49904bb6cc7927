"""Random numbers by address, not by draw order.

Word i of the stream (seed, stream, name, step) is a pure function of that address, computed by the counter-based
generator Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Nothing is carried from one
draw to the next, so there is no generator state to save, and a resumed run draws what an uninterrupted one would have.

What is drawn here is drawn on the host, so that NumPy and CuPy runs see the same numbers. (The optimizer's kernel computes
the words of an address itself, `optim.py`: as many as a model has parameters, every step, are better not sent.)
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_LANES = 4  # 64-bit words in one Philox4x64 block
_NORMALS_PER_TILE = 65536  # keeps the float64 temporaries of Box-Muller inside the cache


def key(seed: int, stream: str, name: str) -> NDArray[np.uint64]:
    """The Philox key of a stream: the first 128 bits of SHA-256 over seed, stream and name. Returns uint64 ``[2]``."""
    return np.frombuffer(hashlib.sha256(f"{seed}\0{stream}\0{name}".encode()).digest()[:16], dtype="<u8")


def words(seed: int, stream: str, name: str, step: int, count: int, start: int = 0) -> NDArray[np.uint64]:
    """Raw 64-bit words ``start … start+count`` of the stream addressed by (seed, stream, name, step).

    The key is `key`; the 256-bit counter holds the step in its top limb and the block number plus one (NumPy steps it
    before it draws) in its bottom one. Returns uint64 ``[count]``.
    """
    block, lane = divmod(start, _LANES)
    generator = np.random.Philox(key=key(seed, stream, name), counter=[block, 0, 0, step])
    drawn: NDArray[np.uint64] = generator.random_raw(lane + count)
    return drawn[lane:]


def uniform(seed: int, stream: str, name: str, step: int, count: int) -> NDArray[np.float64]:
    """Float64 numbers in [0, 1): the top 53 bits of each word. Returns ``[count]``."""
    return np.right_shift(words(seed, stream, name, step, count), 11) * 2.0**-53


def normal(seed: int, stream: str, name: str, shape: tuple[int, ...], std: float = 1.0) -> NDArray[np.float32]:
    """Float32 normal numbers of standard deviation ``std``, by Box and Muller (1958).

    Word j gives elements 2j and 2j+1: its high 32 bits the radius, its low 32 bits the angle. The arithmetic is float64,
    done over tiles so that a large array needs no large temporaries.
    """
    out = np.empty(shape, dtype=np.float32)
    flat = out.reshape(-1)
    for begin in range(0, flat.size, _NORMALS_PER_TILE):
        tile = flat[begin : begin + _NORMALS_PER_TILE]
        word = words(seed, stream, name, 0, (tile.size + 1) // 2, begin // 2)
        # +0.5 keeps the logarithm's argument strictly between 0 and 1.
        radius = np.sqrt(-2.0 * np.log(((word >> 32) + 0.5) * 2.0**-32)) * std
        angle = (word & 0xFFFFFFFF) * (2.0**-32 * 2.0 * np.pi)
        tile[0::2] = radius * np.cos(angle)
        tile[1::2] = (radius * np.sin(angle))[: tile.size // 2]
    return out


def permutation(seed: int, stream: str, step: int, count: int) -> NDArray[np.int64]:
    """A permutation of ``0 … count-1``: the stable order of ``count`` random words. Returns int64 ``[count]``."""
    return np.argsort(words(seed, stream, "permutation", step, count), kind="stable")
