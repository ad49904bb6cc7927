"""Sums along rows as products with a vector: where rows are short, BLAS is three to ten times faster than a reduction."""

from __future__ import annotations

from oxidizr_ref.backend import Array, xp_of


def row_sums(v: Array) -> Array:
    """Sums over the last axis: ``[..., n]`` to ``[...]``."""
    xp = xp_of(v)
    return xp.matmul(v, xp.ones((v.shape[-1], 1), dtype=v.dtype))[..., 0]


def column_sums(v: Array) -> Array:
    """Sums over the last axis but one, which stays: ``[..., n, m]`` to ``[..., 1, m]``."""
    xp = xp_of(v)
    return xp.matmul(xp.ones((1, v.shape[-2]), dtype=v.dtype), v)
