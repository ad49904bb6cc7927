"""Mamba1's selective scan (Gu & Dao 2023, eq. 2 and algorithm 2), for every channel e and state n of its own::

    dt_t = softplus(raw_t + bias)
    h_t = exp(dt_t A) ∘ h_{t-1} + (dt_t x_t) B_tᵀ,      y_t = h_t C_t + D ∘ x_t

A tile is some channels of one sequence. Time goes block by block: what does not depend on the last state (the exponentials,
the products) is computed for a block at once; the recurrence itself is two operations a token. The backward pass runs the
blocks in reverse, each from the state before it, which was kept; what is inside is computed again (section 3.3.2 there).

Shapes: B batch, T time, E channels, N states a channel. Inside a tile states come first, ``[N,e]``, so that rows are long.
"""

from __future__ import annotations

from typing import NamedTuple

from oxidizr_ref import ops, parallel
from oxidizr_ref.autograd import Function, Tensor
from oxidizr_ref.backend import Array, xp_of
from oxidizr_ref.fused.register import fused
from oxidizr_ref.kernels import Kernel
from oxidizr_ref.watch import Part, named

#: Numbers of one tile's state: the recurrence runs over so many at a time.
STATES = 1 << 14
#: Tokens of one block.
BLOCK = 16


def selective_scan_ref(x: Tensor, raw: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The same, token by token, composed from primitives."""
    (batch, T, E), N = x.shape, A.shape[1]
    dt = named("dt", ops.softplus(raw + bias))
    decay = ops.exp(dt.reshape(batch, T, E, 1) * A)
    entering = (dt * x).reshape(batch, T, E, 1) * B.reshape(batch, T, 1, N)
    h, y = entering[:, 0], []
    for t in range(T):
        h = named("state", h * decay[:, t] + entering[:, t] if t else h, Part(t, T))
        y.append(ops.matmul(h, C[:, t].reshape(batch, N, 1)).reshape(batch, 1, E))
    return ops.concatenate(*y, axis=1) + x * D


class _Block(NamedTuple):
    """The numbers of one block that both directions need."""

    at: tuple[int, slice, slice]  # sequence, tokens, channels
    pre: Array  # [t,e] raw + bias
    dt: Array  # [t,e]
    decay: Array  # [t,N,e]
    entering: Array  # [t,e]
    h: Array  # [t,N,e], the state after each token


class SelectiveScan(Function):
    def forward(self, x: Array, raw: Array, bias: Array, A: Array, B: Array, C: Array, D: Array) -> Array:
        xp, (batch, T, E), N = xp_of(x), x.shape, A.shape[1]
        self.inputs, self.A = (x, raw, bias, B, C, D), xp.ascontiguousarray(A.T)  # [N,E]
        self.places = [(b, slice(*e)) for b in range(batch) for e in parallel.tiles(E, max(1, STATES // N))]
        self.blocks = [slice(*t) for t in parallel.tiles(T, BLOCK)]
        self.states = xp.empty((len(self.blocks), batch, N, E), dtype=x.dtype)
        y = xp.empty(x.shape, dtype=x.dtype)

        def channels(index: int) -> None:
            b, e = self.places[index]
            h = xp.zeros((N, e.stop - e.start), dtype=x.dtype)
            for number, t in enumerate(self.blocks):
                self.states[number, b, :, e] = h
                block = self._run(number, (b, t, e))
                h = block.h[-1]
                out = xp.matmul(C[b, t, None, :], block.h)[:, 0]
                out += D[e] * x[b, t, e]
                y[b, t, e] = out

        parallel.for_each(len(self.places), channels)
        return y

    def _run(self, number: int, at: tuple[int, slice, slice]) -> _Block:
        """Block ``number`` of a tile, from the state kept before it."""
        (x, raw, bias, B, _, _), (b, t, e) = self.inputs, at
        xp = xp_of(x)
        pre = raw[at] + bias[e]
        dt = xp.maximum(pre, 0) + xp.log1p(xp.exp(-xp.abs(pre)))
        decay = dt[:, None, :] * self.A[:, e]
        xp.exp(decay, out=decay)
        entering = dt * x[at]
        h = B[b, t, :, None] * entering[:, None, :]
        last = self.states[number, b, :, e]
        for now, left in zip(h, decay, strict=True):
            now += left * last
            last = now
        return _Block(at, pre, dt, decay, entering, h)

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, (x, raw, _, B, C, D), (N, E) = xp_of(dy), self.inputs, self.A.shape
        batch, cuts = x.shape[0], -(-E // max(1, STATES // N))
        dx, draw = xp.empty(x.shape, dtype=dy.dtype), xp.empty(raw.shape, dtype=dy.dtype)
        dB, dC = (xp.zeros((max(1, cuts), *B.shape), dtype=dy.dtype) for _ in range(2))  # of each cut of the channels
        dA, dbias, dD = (xp.zeros((batch, *shape), dtype=dy.dtype) for shape in ((N, E), (E,), (E,)))  # of each sequence

        def channels(index: int) -> None:
            (b, e), cut = self.places[index], index % cuts
            carried = xp.zeros((N, e.stop - e.start), dtype=dy.dtype)
            for number, t in reversed(list(enumerate(self.blocks))):
                block, down = self._run(number, (b, t, e)), dy[b, t, e]
                # y = h C + D x
                dh = C[b, t, :, None] * down[:, None, :]
                dC[cut, b, t] = xp.matmul(block.h, down[:, :, None])[:, :, 0]
                dD[b, e] += (down * x[block.at]).sum(axis=0)
                # h_t = decay_t h_{t-1} + B_t entering_t: dh_t also receives what h_{t+1} passes back
                for now, left in zip(dh[::-1], block.decay[::-1], strict=True):
                    now += carried
                    carried = left * now
                dB[cut, b, t] = xp.matmul(dh, block.entering[:, :, None])[:, :, 0]
                dentering = xp.matmul(B[b, t, None, :], dh)[:, 0]
                # decay = exp(dt A)
                dh[0] *= self.states[number, b, :, e]
                dh[1:] *= block.h[:-1]
                dh *= block.decay
                dA[b, :, e] += (dh * block.dt[:, None, :]).sum(axis=0)
                dh *= self.A[:, e]
                ddt = dh.sum(axis=1)
                # entering = dt x
                dx[block.at] = dentering * block.dt + down * D[e]
                ddt += dentering * x[block.at]
                # dt = softplus(pre), pre = raw + bias
                ddt *= 0.5 * xp.tanh(0.5 * block.pre) + 0.5
                draw[block.at] = ddt
                dbias[b, e] += ddt.sum(axis=0)

        parallel.for_each(len(self.places), channels)
        of_sequences = (parallel.tree_sum([xp.zeros(v.shape[1:], dtype=dy.dtype), *v]) for v in (dbias, dA, dD))
        dbias_, dA_, dD_ = of_sequences
        return dx, draw, dbias_, dA_.T, parallel.tree_sum(list(dB)), parallel.tree_sum(list(dC)), dD_


@SelectiveScan.on_device
class SelectiveScanKernels(Function):
    """The same as kernels. One thread does one channel of one block of tokens, state by state.

    So that all blocks can be done at once, first each gives what it adds to the state, then the states are carried through
    the blocks, then each is done from the state before it; as `chunked_scan.py` does, and backward likewise.
    """

    def forward(self, x: Array, raw: Array, bias: Array, A: Array, B: Array, C: Array, D: Array) -> Array:
        xp, (batch, T, E), N = xp_of(x), x.shape, A.shape[1]
        self.inputs = x, raw, bias, B, C, D = tuple(xp.ascontiguousarray(v) for v in (x, raw, bias, B, C, D))
        self.A, self.sizes = xp.ascontiguousarray(A.T), (-(-T // _STEPS), batch, T, E, N)  # [N,E]
        self.states = xp.empty((self.sizes[0], batch, N, E), dtype=x.dtype)
        total_dt = xp.empty((self.sizes[0], batch, E), dtype=x.dtype)  # of each block
        y = xp.empty(x.shape, dtype=x.dtype)
        _ADDS.threads(total_dt.size, x, raw, bias, self.A, B, self.states, total_dt, *self.sizes)
        _CARRY.threads(batch * N * E, self.A, total_dt, self.states, *self.sizes, 0)
        _FORWARD.threads(total_dt.size, x, raw, bias, self.A, B, C, D, self.states, y, *self.sizes)
        return y

    def backward(self, dy: Array) -> tuple[Array, ...]:
        xp, dy, A, states = xp_of(dy), xp_of(dy).ascontiguousarray(dy), self.A, self.states
        x, raw, bias, B, C, D = self.inputs
        blocks, batch, T, E, N = self.sizes
        dstates, total_dt = xp.empty_like(states), xp.empty((blocks, batch, E), dtype=dy.dtype)
        _ADDS_BACKWARD.threads(total_dt.size, dy, raw, bias, A, C, dstates, total_dt, *self.sizes)
        _CARRY.threads(batch * N * E, A, total_dt, dstates, *self.sizes, 1)
        dx, draw, cuts = xp.empty_like(x), xp.empty_like(raw), -(-E // _BACKWARD.block)
        dBC = xp.empty((cuts, 2, batch, T, N), dtype=dy.dtype)  # of each cut of the channels
        dbias, dD = (xp.empty((blocks * batch, E), dtype=dy.dtype) for _ in range(2))  # of each block
        inputs, gradients = (dy, x, raw, bias, A, B, C, D, states), (dx, draw, dstates, dBC, dbias, dD)
        _BACKWARD.blocks(blocks * batch * cuts, *inputs, *gradients, *self.sizes, cuts)
        dA = dstates.reshape(blocks * batch, N, E)  # what it left there, of each block
        dB, dC = dBC.sum(axis=0)
        return dx, draw, dbias.sum(axis=0), dA.sum(axis=0).T, dB, dC, dD.sum(axis=0)


_STEPS = BLOCK
_BEFORE = (
    f"#define STEPS {_STEPS}"
    + """
// A channel of a block of tokens: `row` is its number among the blocks of all sequences, `token` its first of all tokens.
struct Lane { long long channel, row, token; int steps; };
__device__ inline Lane lane(long long row, long long channel, long long batch, long long time) {
    long long first = row / batch * STEPS, left = time - first;
    return {channel, row, row % batch * time + first, left < STEPS ? (int)left : STEPS};
}
__device__ inline T softplus(T v) { return (v > 0 ? v : 0) + log1p(exp(-fabs(v))); }
"""
)

_ADDS = Kernel(
    """
__global__ void selective_scan_adds(const T* x, const T* raw, const T* bias, const T* A, const T* B, T* states, T* total_dt,
                                    long long blocks, long long batch, long long time, long long channels, long long size) {
    if (THREAD >= blocks * batch * channels) return;
    Lane at = lane(THREAD / channels, THREAD % channels, batch, time);
    T dt[STEPS], entering[STEPS], total = 0;
    #pragma unroll
    for (int t = 0; t < STEPS; t++) {
        if (t >= at.steps) break;
        long long i = (at.token + t) * channels + at.channel;
        dt[t] = softplus(raw[i] + bias[at.channel]);
        entering[t] = dt[t] * x[i];
        total += dt[t];
    }
    total_dt[THREAD] = total;
    for (long long n = 0; n < size; n++) {
        T rate = A[n * channels + at.channel], h = 0;
        #pragma unroll
        for (int t = 0; t < STEPS; t++)
            if (t < at.steps) h = exp(dt[t] * rate) * h + B[(at.token + t) * size + n] * entering[t];
        states[(at.row * size + n) * channels + at.channel] = h;
    }
}
""",
    before=_BEFORE,
)

_CARRY = Kernel("""
__global__ void selective_scan_carry(const T* A, const T* total_dt, T* states, long long blocks, long long batch,
                                     long long time, long long channels, long long size, long long backward) {
    if (THREAD >= batch * size * channels) return;
    long long channel = THREAD % channels, sequence = THREAD / (size * channels);
    T rate = A[THREAD % (size * channels)], h = 0;
    for (long long i = 0; i < blocks; i++) {
        long long row = (backward ? blocks - 1 - i : i) * batch + sequence;
        T* state = states + row * size * channels + THREAD % (size * channels);
        T added = *state;
        *state = h;
        h = exp(total_dt[row * channels + channel] * rate) * h + added;
    }
}
""")

_FORWARD = Kernel(
    """
__global__ void selective_scan(const T* x, const T* raw, const T* bias, const T* A, const T* B, const T* C, const T* D,
                               const T* states, T* y, long long blocks, long long batch, long long time,
                               long long channels, long long size) {
    if (THREAD >= blocks * batch * channels) return;
    Lane at = lane(THREAD / channels, THREAD % channels, batch, time);
    T dt[STEPS], entering[STEPS], out[STEPS];
    #pragma unroll
    for (int t = 0; t < STEPS; t++) {
        if (t >= at.steps) break;
        long long i = (at.token + t) * channels + at.channel;
        dt[t] = softplus(raw[i] + bias[at.channel]);
        entering[t] = dt[t] * x[i];
        out[t] = D[at.channel] * x[i];
    }
    for (long long n = 0; n < size; n++) {
        T rate = A[n * channels + at.channel], h = states[(at.row * size + n) * channels + at.channel];
        #pragma unroll
        for (int t = 0; t < STEPS; t++) {
            if (t >= at.steps) break;
            long long i = (at.token + t) * size + n;
            h = exp(dt[t] * rate) * h + B[i] * entering[t];
            out[t] += C[i] * h;
        }
    }
    #pragma unroll
    for (int t = 0; t < STEPS; t++)
        if (t < at.steps) y[(at.token + t) * channels + at.channel] = out[t];
}
""",
    before=_BEFORE,
)

_ADDS_BACKWARD = Kernel(
    """
__global__ void selective_scan_adds_backward(const T* dy, const T* raw, const T* bias, const T* A, const T* C, T* dstates,
                                             T* total_dt, long long blocks, long long batch, long long time,
                                             long long channels, long long size) {
    if (THREAD >= blocks * batch * channels) return;
    Lane at = lane(THREAD / channels, THREAD % channels, batch, time);
    T dt[STEPS], down[STEPS], total = 0;
    #pragma unroll
    for (int t = 0; t < STEPS; t++) {
        if (t >= at.steps) break;
        long long i = (at.token + t) * channels + at.channel;
        dt[t] = softplus(raw[i] + bias[at.channel]);
        down[t] = dy[i];
        total += dt[t];
    }
    total_dt[THREAD] = total;
    for (long long n = 0; n < size; n++) {
        T rate = A[n * channels + at.channel], carried = 0;
        #pragma unroll
        for (int t = STEPS - 1; t >= 0; t--)
            if (t < at.steps) carried = exp(dt[t] * rate) * (carried + C[(at.token + t) * size + n] * down[t]);
        dstates[(at.row * size + n) * channels + at.channel] = carried;
    }
}
""",
    before=_BEFORE,
)

#: dB and dC are sums over channels: of a block's, here, which all threads add up together, one state at a time.
_BACKWARD = Kernel(
    """
__global__ void selective_scan_backward(const T* dy, const T* x, const T* raw, const T* bias, const T* A, const T* B,
                                        const T* C, const T* D, const T* states, T* dx, T* draw, T* dstates, T* dBC,
                                        T* dbias, T* dD, long long blocks, long long batch, long long time,
                                        long long channels, long long size, long long cuts) {
    __shared__ T terms[2 * STEPS][BLOCK + SHARE], sums[BLOCK];
    long long cut = blockIdx.x % cuts;
    Lane at = lane(blockIdx.x / cuts, cut * BLOCK + threadIdx.x, batch, time);
    int of_block = at.steps;
    if (at.channel >= channels) at.steps = 0;  // it only helps to add up
    T dt[STEPS], input[STEPS], down[STEPS], dentering[STEPS], ddt[STEPS], h[STEPS];
    #pragma unroll
    for (int t = 0; t < STEPS; t++) {
        terms[t][threadIdx.x] = terms[STEPS + t][threadIdx.x] = dentering[t] = ddt[t] = 0;
        if (t >= at.steps) continue;
        long long i = (at.token + t) * channels + at.channel;
        dt[t] = softplus(raw[i] + bias[at.channel]);
        input[t] = x[i];
        down[t] = dy[i];
    }
    for (long long n = 0; n < size; n++) {
        long long state = (at.row * size + n) * channels + at.channel;
        T rate = 0, before = 0, carried = 0, drate = 0;
        if (at.steps > 0) rate = A[n * channels + at.channel], before = states[state], carried = dstates[state];
        #pragma unroll
        for (int t = 0; t < STEPS; t++) {
            if (t >= at.steps) break;
            h[t] = exp(dt[t] * rate) * (t > 0 ? h[t - 1] : before) + B[(at.token + t) * size + n] * (dt[t] * input[t]);
        }
        #pragma unroll
        for (int t = STEPS - 1; t >= 0; t--) {
            if (t >= at.steps) continue;
            long long i = (at.token + t) * size + n;
            // y = h C + D x;  h_t = decay_t h_{t-1} + B_t entering_t: dh_t also receives what h_{t+1} passes back
            T dh = C[i] * down[t] + carried;
            terms[t][threadIdx.x] = dh * (dt[t] * input[t]);
            terms[STEPS + t][threadIdx.x] = h[t] * down[t];
            dentering[t] += B[i] * dh;
            carried = exp(dt[t] * rate) * dh;
            // decay = exp(dt A)
            T dexponent = carried * (t > 0 ? h[t - 1] : before);
            drate += dexponent * dt[t];
            ddt[t] += dexponent * rate;
        }
        if (at.steps > 0) dstates[state] = drate;  // what it held is not needed any more
        __syncthreads();
        T sum = 0;
        for (int k = threadIdx.x % SHARE; k < BLOCK; k += SHARE) sum += terms[threadIdx.x / SHARE][k];
        sums[threadIdx.x] = sum;
        __syncthreads();
        int t = threadIdx.x % STEPS, which = threadIdx.x / STEPS;
        if (which > 1 || t >= of_block) continue;
        sum = 0;
        for (int k = 0; k < SHARE; k++) sum += sums[threadIdx.x * SHARE + k];
        dBC[((cut * 2 + which) * batch * time + at.token + t) * size + n] = sum;
    }
    if (at.steps == 0) return;
    T of_bias = 0, of_D = 0;
    #pragma unroll
    for (int t = 0; t < STEPS; t++) {
        if (t >= at.steps) break;
        long long i = (at.token + t) * channels + at.channel;
        // entering = dt x
        dx[i] = dentering[t] * dt[t] + down[t] * D[at.channel];
        // dt = softplus(pre), whose slope is 1 - exp(-dt);  pre = raw + bias
        draw[i] = (ddt[t] + dentering[t] * input[t]) * -expm1(-dt[t]);
        of_bias += draw[i];
        of_D += down[t] * input[t];
    }
    dbias[at.row * channels + at.channel] = of_bias;
    dD[at.row * channels + at.channel] = of_D;
}
""",
    block=128,
    before=_BEFORE + "#define SHARE (BLOCK / (2 * STEPS))  // threads that add up the terms of one token\n",
)


@fused(selective_scan_ref)
def selective_scan(x: Tensor, raw: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The scan from a zero state. x, raw: ``[B,T,E]``; bias, D: ``[E]``; A < 0: ``[E,N]``; B, C: ``[B,T,N]``.

    ``raw + bias`` is dt before its softplus. Returns ``[B,T,E]``.
    """
    return SelectiveScan.apply(x, raw, bias, A, B, C, D)
