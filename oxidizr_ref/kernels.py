"""CUDA kernels: C++ source beside the reference of its op, compiled when it is first used.

A source is one ``__global__`` function. Before it stand (`_PRELUDE`):

* ``T``: the dtype of the kernel's numbers, float or double; that of the first float32 or float64 array among the arguments;
* ``BLOCK``: threads a block, a power of two; ``THREAD``: the number of this thread among all;
* ``block_sum(v)`` and ``block_max(v)``: over the threads of a block, in a fixed tree, told to all of them. Every thread of
  the block must call them.

Arguments: arrays as pointers, Python integers as ``long long``, Python numbers as ``T``, NumPy's as they are. Sums run in an
order that shapes alone decide: no atomics, nothing that depends on which block comes first.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from oxidizr_ref.backend import Array, on_device, xp_of

_PRELUDE = """
typedef {type} T;
#define BLOCK {block}
#define THREAD ((long long)blockIdx.x * BLOCK + threadIdx.x)

template <typename V> __device__ inline V block_sum(V v) {{
    __shared__ V parts[BLOCK];
    parts[threadIdx.x] = v;
    for (int half = BLOCK / 2; half > 0; half /= 2) {{
        __syncthreads();
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }}
    __syncthreads();
    v = parts[0];
    __syncthreads();
    return v;
}}

template <typename V> __device__ inline V block_max(V v) {{
    __shared__ V parts[BLOCK];
    parts[threadIdx.x] = v;
    for (int half = BLOCK / 2; half > 0; half /= 2) {{
        __syncthreads();
        if (threadIdx.x < half && parts[threadIdx.x + half] > parts[threadIdx.x])
            parts[threadIdx.x] = parts[threadIdx.x + half];
    }}
    __syncthreads();
    v = parts[0];
    __syncthreads();
    return v;
}}
"""

_TYPES = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}


class Kernel:
    """One kernel. ``block``: threads a block; ``before``: functions and types that it uses."""

    def __init__(self, source: str, block: int = 256, before: str = "") -> None:
        (self.name,) = re.findall(r"__global__ void (\w+)\(", source)
        self.source, self.block, self.before = source, block, before

    def code(self, type_: str) -> str:
        """The whole source for ``T`` = float or double."""
        return _PRELUDE.format(type=type_, block=self.block) + f'{self.before}\nextern "C" {self.source.strip()}\n'

    def threads(self, count: int, *arguments: Any) -> None:
        """Run with at least ``count`` threads: those above it must do nothing."""
        self.blocks(-(-count // self.block), *arguments)

    def blocks(self, count: int, *arguments: Any) -> None:
        """Run with ``count`` blocks. Arrays must be C-contiguous: a kernel sees memory, not views."""
        if count == 0:
            return
        arrays = [x for x in arguments if hasattr(x, "dtype") and on_device(x)]
        assert all(x.flags.c_contiguous for x in arrays), f"{self.name}: an argument is not C-contiguous"
        number = next((x.dtype for x in arrays if x.dtype in _TYPES), np.dtype(np.float32))
        compiled = _compiled(self, xp_of(arrays[0]), _TYPES[number])
        compiled((count,), (self.block,), tuple(_passed(x, number) for x in arguments))


@functools.cache
def _compiled(kernel: Kernel, xp: Any, type_: str) -> Any:
    return xp.RawKernel(kernel.code(type_), kernel.name)


def _passed(x: Any, number: np.dtype[Any]) -> Array:
    if isinstance(x, int):
        return np.int64(x)
    return number.type(x) if isinstance(x, float) else x
