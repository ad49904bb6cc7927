"""Mamba3 once more, in plain NumPy and float64: one token, one head, one column at a time, as the equations are written.

The judge of `test_mamba3.py` and `test_mamba3_identities.py`; it shares no line with the package.

Shapes: B batch, T time, D hidden, H heads, P head width, R rank, G groups, N state size, S rotated pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def running_phase(dt: Array, angle: Array) -> Array:
    """``φ_t = Σ_{s≤t} dt_s π tanh(angle_s)``, whole turns and all. dt ``[B,T,H]``, angle and result ``[B,T,H,S]``."""
    return np.cumsum(dt[..., None] * math.pi * np.tanh(angle), axis=1)


def turned(v: Array, phi: Array) -> Array:
    """Channels (2i, 2i+1) of v ``[N]`` turned by the angle i of φ ``[S]``."""
    v = v.copy()
    for i, angle in enumerate(phi):
        cos, sin = math.cos(angle), math.sin(angle)
        v[2 * i], v[2 * i + 1] = cos * v[2 * i] - sin * v[2 * i + 1], sin * v[2 * i] + cos * v[2 * i + 1]
    return v


def recurrence(x: Array, dt: Array, A: Array, lam: Array, B: Array, C: Array, phi: Array, D: Array) -> Array:
    """``h_t = α_t h_{t-1} + β_t x_{t-1} B̄_{t-1}ᵀ + γ_t x_t B̄_tᵀ``, ``y_t = h_t C̄_t + D x_t``, every rank summed into h.

    x ``[B,T,R,H,P]``; dt, A, lam ``[B,T,H]``; B, C ``[B,T,R,H,N]``, their biases added; phi ``[B,T,H,S]``; D ``[H]``.
    Returns ``[B,T,R,H,P]``.
    """
    (batch, T, R, H, P), N = x.shape, B.shape[-1]
    y = np.zeros(x.shape)
    for b in range(batch):
        for head in range(H):
            h, before = np.zeros((P, N)), np.zeros((P, N))
            for t in range(T):
                step, rate, weight = dt[b, t, head], A[b, t, head], lam[b, t, head]
                alpha = math.exp(step * rate)
                beta, gamma = (1 - weight) * step * alpha, weight * step
                entering = np.zeros((P, N))
                for r in range(R):
                    entering += np.outer(x[b, t, r, head], turned(B[b, t, r, head], phi[b, t, head]))
                h = alpha * h + beta * before + gamma * entering
                for r in range(R):
                    y[b, t, r, head] = h @ turned(C[b, t, r, head], phi[b, t, head]) + D[head] * x[b, t, r, head]
                before = entering
    return y


def layer(weights: Mapping[str, Array], u: Array, sizes: tuple[int, int, int, int, int, int]) -> Array:
    """The whole layer on u ``[B,T,D]``, from the layer's weights by name. ``sizes``: H, P, R, G, N, S. Returns ``[B,T,D]``.

    With ``mimo_x`` among the weights it is MIMO, with ``conv1d.weight`` the convolution stands before x, B and C.
    """
    (H, P, R, G, N, S), (batch, T, _) = sizes, u.shape
    lengths = {"z": H * P, "x": H * P, "B": R * G * N, "C": R * G * N, "dt": H, "A": H, "trap": H, "angle": S}
    rows = u @ weights["in_proj.weight"].T
    ends = np.cumsum(list(lengths.values()))
    part = {name: rows[..., end - lengths[name] : end] for name, end in zip(lengths, ends, strict=True)}
    if "conv1d.weight" in weights:
        mixed = _convolved(np.concatenate([part["x"], part["B"], part["C"]], axis=-1), weights)
        part["x"], part["B"], part["C"] = np.split(mixed, [H * P, H * P + R * G * N], axis=-1)
    dt = np.log1p(np.exp(part["dt"] + weights["dt_bias"]))
    A = -np.maximum([[[_rate(v) for v in of_token] for of_token in of_batch] for of_batch in part["A"]], 1e-4)
    lam = 1 / (1 + np.exp(-part["trap"]))
    columns = {}
    for name in ("B", "C"):
        normed = part[name].reshape(batch, T, R, G, N)
        normed = normed / np.sqrt((normed**2).mean(axis=-1, keepdims=True) + 1e-5) * weights[f"{name}_norm.weight"]
        by_head = np.stack([normed[:, :, :, head // (H // G)] for head in range(H)], axis=3)
        columns[name] = by_head + weights[f"{name}_bias"].transpose(1, 0, 2)
    phi = running_phase(dt, np.repeat(part["angle"][:, :, None], H, axis=2))
    x, z = (part[name].reshape(batch, T, 1, H, P) for name in ("x", "z"))
    if "mimo_x" in weights:
        x, z = x * weights["mimo_x"].transpose(1, 0, 2), z * weights["mimo_z"].transpose(1, 0, 2)
    y = recurrence(x, dt, A, lam, columns["B"], columns["C"], phi, weights["D"]) * _silu(z)
    y = (y * weights["mimo_o"].transpose(1, 0, 2)).sum(axis=2) if "mimo_o" in weights else y[:, :, 0]
    return y.reshape(batch, T, H * P) @ weights["out_proj.weight"].T


def _rate(v: float) -> float:
    return 1 + v if v >= 0 else 1 / (1 - v)


def _silu(v: Array) -> Array:
    return v / (1 + np.exp(-v))


def _convolved(x: Array, weights: Mapping[str, Array]) -> Array:
    kernel, y = weights["conv1d.weight"][:, 0], np.zeros(x.shape)  # [C,K]
    for t in range(x.shape[1]):
        for k in range(kernel.shape[1]):
            source = t - kernel.shape[1] + 1 + k
            if source >= 0:
                y[:, t] += kernel[:, k] * x[:, source]
    return _silu(y + weights["conv1d.bias"])
