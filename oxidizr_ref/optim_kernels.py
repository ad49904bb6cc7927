"""The gradient norm and AdamW as CUDA kernels: what `optim.py` does on the host, their reference.

Parameters and moments of 16 bits are read, updated in float32 and rounded stochastically in one pass. The random bits are
those of the host: the kernel computes the Philox words of an address itself, since so many are better not sent every step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from oxidizr_ref.backend import STORAGE_DTYPES, Array, xp_of
from oxidizr_ref.kernels import Kernel

#: Elements whose squares one block adds.
_PIECE = 1 << 17


def norm_on_device(gradients: Mapping[str, Array]) -> Array:
    """`optim.global_norm`, float64 ``[]``: a block a piece of a gradient, then one block over the pieces."""
    pieces = {name: -(-gradients[name].size // _PIECE) for name in sorted(gradients)}
    xp, count = xp_of(next(iter(gradients.values()))), sum(pieces.values())
    squares, norm = xp.empty(count, dtype=np.float64), xp.empty((), dtype=np.float64)
    done = 0
    for name, own in pieces.items():
        _SQUARES.blocks(own, gradients[name], squares, done, gradients[name].size, _PIECE)
        done += own
    _ROOT_OF_SUM.blocks(1, squares, norm, count)
    return norm


_SQUARES = Kernel("""
__global__ void squares(const T* x, double* squares, long long first, long long count, long long piece) {
    long long begin = blockIdx.x * piece, end = begin + piece < count ? begin + piece : count;
    double sum = 0;
    for (long long i = begin + threadIdx.x; i < end; i += BLOCK) sum += (double)x[i] * x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) squares[first + blockIdx.x] = sum;
}
""")

_ROOT_OF_SUM = Kernel("""
__global__ void root_of_sum(const double* squares, double* norm, long long count) {
    double sum = 0;
    for (long long i = threadIdx.x; i < count; i += BLOCK) sum += squares[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) norm[0] = sqrt(sum);
}
""")

#: What all parameters share in an update: four numbers, float64.
ADAMW_NUMBERS = Kernel("""
__global__ void adamw_numbers(const T* scale, const long long* skipped, T* shared,
                              long long n, T lr, T beta1, T beta2, T eps) {
    if (THREAD > 0) return;
    T updates = (T)(n - skipped[0]), root = sqrt(1 - pow(beta2, updates));
    shared[0] = (1 - beta1) * scale[0];
    shared[1] = (1 - beta2) / ((1 - beta1) * (1 - beta1));
    shared[2] = eps * root;
    shared[3] = lr * root / (1 - pow(beta1, updates));
}
""")

#: What a kernel needs to read and write 16 bits: decoding, rounding by 16 random bits, and the words of `rng.words`.
_SIXTEEN_BITS = """
union Bits { unsigned int u; float f; };
struct Bf16 { unsigned short b; };
struct F16 { unsigned short b; };

__device__ inline float load(Bf16 x) { Bits v; v.u = (unsigned int)x.b << 16; return v.f; }
__device__ inline float load(F16 x) {
    unsigned int sign = (unsigned int)(x.b & 0x8000) << 16, exponent = (x.b >> 10) & 31, fraction = x.b & 1023;
    Bits v;
    if (exponent == 0) { v.f = fraction * 0x1p-24f; v.u |= sign; }
    else v.u = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
    return v.f;
}
__device__ inline float load(float x) { return x; }
__device__ inline double load(double x) { return x; }

__device__ inline void store(Bf16* at, float x, unsigned int random) {
    Bits v; v.f = x;
    at->b = (unsigned short)((v.u + random) >> 16);
}
__device__ inline void store(F16* at, float x, unsigned int random) {
    Bits v; v.f = x;
    unsigned short sign = (unsigned short)(v.u >> 16 & 0x8000);
    if (fabs(x) < 0x1p-14f) {
        double shaken = fabs((double)x + ((random + 0.5) * 0x1p-16 - 0.5) * 0x1p-24);
        sign = (double)x + ((random + 0.5) * 0x1p-16 - 0.5) * 0x1p-24 < 0 ? 0x8000 : 0;
        at->b = sign | (unsigned short)floor(shaken * 0x1p24 + 0.5);
        return;
    }
    v.u = (v.u + (random >> 3)) & 0x7FFFE000u;
    int exponent = (int)(v.u >> 23) - 112;
    at->b = sign | (unsigned short)(exponent > 30 ? 31 << 10 : exponent << 10 | (v.u >> 13 & 1023));
}
__device__ inline void store(float* at, float x, unsigned int) { *at = x; }
__device__ inline void store(double* at, double x, unsigned int) { *at = x; }
__device__ inline void store(Bf16* at, double x, unsigned int random) { store(at, (float)x, random); }

// Word `at` of a stream at a step: Philox4x64-10 (Salmon et al. 2011) of the counter {block + 1, 0, 0, step}.
__device__ inline unsigned long long philox(unsigned long long at, unsigned long long step,
                                            unsigned long long k0, unsigned long long k1) {
    unsigned long long c[4] = {at / 4 + 1, 0, 0, step};
    for (int round = 0; round < 10; round++) {
        unsigned long long high0 = __umul64hi(0xD2E7470EE14C6C93ULL, c[0]), low0 = 0xD2E7470EE14C6C93ULL * c[0];
        unsigned long long high1 = __umul64hi(0xCA5A826395121157ULL, c[2]), low1 = 0xCA5A826395121157ULL * c[2];
        c[0] = high1 ^ c[1] ^ k0; c[1] = low1; c[2] = high0 ^ c[3] ^ k1; c[3] = low0;
        k0 += 0x9E3779B97F4A7C15ULL; k1 += 0xBB67AE8584CAA73BULL;
    }
    return c[at % 4];
}
"""


@functools.cache
def adamw_kernel(stored: np.dtype[Any], slots: np.dtype[Any]) -> Kernel:
    """`AdamW._update` for parameters and slots of these dtypes. A thread takes four elements, a word of random bits."""
    names = {STORAGE_DTYPES["bf16"]: "Bf16", STORAGE_DTYPES["f16"]: "F16"}
    stored_type, slot_type = (names.get(dtype, "T") for dtype in (stored, slots))
    types = f"#define STORED {stored_type}\n#define SLOT {slot_type}\n"
    return Kernel(_ADAMW, before=_SIXTEEN_BITS + types)


_ADAMW = """
__global__ void adamw(const T* gradient, STORED* p, SLOT* m, SLOT* v, const double* shared, long long count,
                      T beta1, T beta2, T keep, long long n, unsigned long long p0, unsigned long long p1,
                      unsigned long long m0, unsigned long long m1, unsigned long long v0, unsigned long long v1) {
    if (4 * THREAD >= count || isnan(shared[0])) return;
    unsigned long long for_p = sizeof(STORED) == 2 ? philox(THREAD, n, p0, p1) : 0;
    unsigned long long for_m = sizeof(SLOT) == 2 ? philox(THREAD, n, m0, m1) : 0;
    unsigned long long for_v = sizeof(SLOT) == 2 ? philox(THREAD, n, v0, v1) : 0;
    for (int lane = 0; lane < 4 && 4 * THREAD + lane < count; lane++) {
        long long i = 4 * THREAD + lane;
        int shift = 16 * lane;
        // m = β1 m + (1 - β1) g;  v = β2 v + (1 - β2) g²
        T g = gradient[i] * (T)shared[0];
        T m_ = load(m[i]) * beta1 + g;
        T v_ = load(v[i]) * beta2 + g * g * (T)shared[1];
        // p = p - lr wd p - lr m̂ / (sqrt(v̂) + eps)
        T update = m_ / (sqrt(v_) + (T)shared[2]) * (T)shared[3];
        store(&p[i], load(p[i]) * keep - update, (unsigned int)(for_p >> shift & 0xFFFF));
        store(&m[i], m_, (unsigned int)(for_m >> shift & 0xFFFF));
        store(&v[i], v_, (unsigned int)(for_v >> shift & 0xFFFF));
    }
}
"""
