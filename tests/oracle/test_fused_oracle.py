"""Every fused op, and its plain reference, against PyTorch: forward and gradients, in float64.

The state space operations are written here as one sum over all pairs of tokens, or token by token: neither in chunks nor in
blocks, as this package has them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fused_examples import Example, mamba3_scan_example, running_angle_example, selective_scan_example, ssd_example

from oxidizr_ref.autograd import Tensor
from oxidizr_ref.fused.attention import attention
from oxidizr_ref.fused.register import REGISTER, reference

torch = pytest.importorskip("torch")
from test_ops_oracle import compare, normal  # noqa: E402

F = torch.nn.functional
pytestmark = pytest.mark.oracle

rng = np.random.default_rng(1)


def torch_attention(q: Any, k: Any, v: Any, scale: float) -> Any:
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(1, 2)


def torch_rope(x: Any, theta: float, start: int = 0) -> Any:
    """As Hugging Face's Llama writes it: ``x cos + rotate_half(x) sin``, the frequencies repeated twice."""
    width = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(start, start + x.shape[1], dtype=torch.float64), frequencies)
    angles = torch.cat([angles, angles], -1)[:, None]
    half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
    return x * angles.cos() + half * angles.sin()


def torch_linear_cross_entropy(h: Any, w: Any, targets: Any, divisor: float) -> Any:
    logits = (h @ w.T).reshape(-1, w.shape[0])
    return F.cross_entropy(logits, torch.tensor(targets).reshape(-1), reduction="sum") / divisor


def torch_causal_conv(x: Any, weight: Any, bias: Any) -> Any:
    padded = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    return F.silu(F.conv1d(padded, weight, bias, groups=x.shape[2])).transpose(1, 2)


def torch_rms_norm(x: Any, weight: Any, eps: float, groups: int = 1) -> Any:
    return F.rms_norm(x.unflatten(-1, (groups, -1)), (x.shape[-1] // groups,), None, eps).flatten(-2) * weight


def torch_selective_scan(x: Any, raw: Any, bias: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t``, ``y_t = C_t·h_t + D x_t``."""
    dt = F.softplus(raw + bias, threshold=1e9)
    h, y = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + torch.einsum("be,be,bn->ben", dt[:, t], x[:, t], B[:, t])
        y.append(torch.einsum("ben,bn->be", h, C[:, t]) + D * x[:, t])
    return torch.stack(y, dim=1)


def torch_decays(a: Any) -> Any:
    """``exp(a_{s+1} + … + a_t)`` for s ≤ t, else 0. a: ``[B,T,H]``. Returns ``[B,t,s,H]``."""
    steps = a.shape[1]
    later = [
        [a[:, s + 1 : t + 1].sum(1).exp() if s <= t else torch.zeros_like(a[:, 0]) for s in range(steps)]
        for t in range(steps)
    ]
    return torch.stack([torch.stack(row, dim=1) for row in later], dim=1)


def torch_ssd(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, chunk: int) -> Any:  # noqa: ARG001
    """``y_t = Σ_{s≤t} exp(…) dt_s (C_t·B_s) x_s + D x_t``, head h reading group ``h // (H / G)`` of B and C."""
    B, C = (v.repeat_interleave(x.shape[2] // v.shape[2], dim=2) for v in (B, C))
    return torch.einsum("btsh,bthn,bshn,bsh,bshp->bthp", torch_decays(dt * A), C, B, dt, x) + D[:, None] * x


def torch_turned(v: Any, bias: Any, phi: Any) -> Any:
    """B̄ or C̄: pairs of channels as complex numbers, times ``e^{iφ}``. v: ``[B,T,R,G,N]``. Returns ``[B,T,R,H,N]``."""
    v = v.repeat_interleave(bias.shape[0] // v.shape[3], dim=3) + bias.transpose(0, 1)
    width = 2 * phi.shape[-1]
    pairs = torch.view_as_complex(v[..., :width].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(phi), phi)[:, :, None]).flatten(-2)
    return torch.cat([turned, v[..., width:]], -1)


def torch_mamba3_scan(
    x: Any,
    a: Any,
    inflow: Any,
    diagonal: Any,
    B: Any,
    C: Any,
    B_bias: Any,
    C_bias: Any,
    phi: Any,
    D: Any,
    chunk: int,  # noqa: ARG001
) -> Any:
    """``y_t^r = Σ_q Σ_{s<t} exp(…) inflow_s (C̄_t^r·B̄_s^q) x_s^q + Σ_q diagonal_t (C̄_t^r·B̄_t^q) x_t^q + D x_t^r``."""
    B, C = torch_turned(B, B_bias, phi), torch_turned(C, C_bias, phi)
    here = torch.eye(x.shape[1], dtype=x.dtype)[:, :, None]
    weights = torch_decays(a) * (1 - here) * inflow[:, None] + here * diagonal[:, None]
    return torch.einsum("btsh,btrhn,bsqhn,bsqhp->btrhp", weights, C, B, x) + D[:, None] * x


def torch_running_angle(dt: Any, angle: Any) -> Any:
    return torch.remainder((dt[..., None] * math.pi * torch.tanh(angle)[:, :, None]).cumsum(1), 2 * math.pi)


#: op -> PyTorch's function, and what both are given.
FUSED: dict[str, tuple[Callable[..., Any], Example]] = {
    "attention": (
        torch_attention,
        Example([normal(2, 150, 4, 8), normal(2, 150, 2, 8), normal(2, 150, 2, 6)], {"scale": 0.35}),
    ),
    "causal_conv": (torch_causal_conv, Example([normal(2, 11, 6), normal(6, 1, 4), normal(6)], {})),
    "linear": (F.linear, Example([normal(2, 7, 5), normal(6, 5)], {})),
    "linear_cross_entropy": (
        torch_linear_cross_entropy,
        Example([normal(2, 70, 8), normal(31, 8)], {"targets": rng.integers(0, 31, (2, 70)), "divisor": 140.0}),
    ),
    "mamba3_scan": (torch_mamba3_scan, mamba3_scan_example(rng, B=2, T=11, R=3, H=4, P=3, G=2, N=7, S=3, chunk=12)),
    "rms_norm": (torch_rms_norm, Example([normal(3, 5, 16), normal(16)], {"eps": 1e-5})),
    "rope": (torch_rope, Example([normal(2, 9, 3, 8)], {"theta": 1e4, "start": 5})),
    "running_angle": (torch_running_angle, running_angle_example(rng, B=2, T=12, H=3, S=4, turning=1.0, noise=0.02)),
    "selective_scan": (torch_selective_scan, selective_scan_example(rng, B=2, T=37, E=6, N=5)),
    "silu_gate": (lambda y, z: y * F.silu(z), Example([normal(2, 5, 3, 4), normal(2, 5, 3, 4)], {})),
    "ssd": (torch_ssd, ssd_example(rng, B=2, T=11, H=6, P=3, G=2, N=5, chunk=4)),
    "swiglu": (
        lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),
        Example([normal(2, 7, 5), normal(11, 5), normal(11, 5), normal(5, 11)], {}),
    ),
}


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "reference"])
@pytest.mark.parametrize("name", sorted(REGISTER))
def test_fused_op_and_its_reference_equal_pytorch_in_result_and_gradients(name: str, plain: bool) -> None:
    assert name in FUSED, f"{name} is compared with nothing: write an example"
    theirs, (arrays, options) = FUSED[name]
    ours = getattr(sys.modules[REGISTER[name].fused.__module__], name)  # as models call it

    def run(*tensors: Tensor) -> Any:
        if not plain:
            return ours(*tensors, **options)
        with reference():
            return ours(*tensors, **options)

    compare(run, lambda *x: theirs(*x, **options), arrays)


@pytest.mark.parametrize("queries", [1, 3])
def test_attention_with_more_keys_than_queries_equals_pytorch(queries: int) -> None:
    arrays = [normal(2, queries, 4, 8), normal(2, 9, 2, 8), normal(2, 9, 2, 8)]
    compare(lambda q, k, v: attention(q, k, v, scale=0.3), lambda q, k, v: torch_attention(q, k, v, 0.3), arrays)


#: Further shapes of the same ops.
VARIANTS: dict[str, tuple[str, Example]] = {
    "normalized by groups": ("rms_norm", Example([normal(3, 5, 12), normal(12)], {"eps": 1e-5, "groups": 3})),
    "kernel of one": ("causal_conv", Example([normal(2, 5, 3), normal(3, 1, 1), normal(3)], {})),
    "kernel longer than the sequence": ("causal_conv", Example([normal(2, 4, 3), normal(3, 1, 7), normal(3)], {})),
    "one token, Mamba2": ("ssd", ssd_example(rng, B=1, T=1, H=2, P=3, G=1, N=4, chunk=8)),
    "one chunk": ("ssd", ssd_example(rng, B=2, T=9, H=3, P=2, G=1, N=4, chunk=64)),
    "one token a chunk": ("ssd", ssd_example(rng, B=2, T=6, H=4, P=2, G=4, N=3, chunk=1)),
    "SISO": ("mamba3_scan", mamba3_scan_example(rng, B=2, T=10, R=1, H=4, P=3, G=1, N=6, S=2, chunk=4)),
    "no rotation": ("mamba3_scan", mamba3_scan_example(rng, B=2, T=7, R=2, H=2, P=3, G=1, N=4, S=0, chunk=4)),
    "all states rotated": ("mamba3_scan", mamba3_scan_example(rng, B=1, T=7, R=2, H=2, P=3, G=2, N=6, S=3, chunk=5)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_op_of_another_shape_equals_pytorch_in_result_and_gradients(variant: str) -> None:
    name, (arrays, options) = VARIANTS[variant]
    compare(lambda *x: REGISTER[name].fused(*x, **options), lambda *x: FUSED[name][0](*x, **options), arrays)
