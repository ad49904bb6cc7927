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
# # 03 · RMSNorm by hand, from composed to fused
#
# The smallest layer of a modern language model is a good place to learn how every layer of this package is made: an equation
# with its source, the same in five plain lines, a derivative by hand, a fast version, and a proof that all of them agree.
#
# After this you can
#
# - say what RMSNorm does to a vector, and what it makes its gradient forget;
# - derive the backward pass of a layer by hand, and check it in three independent ways;
# - say why an operation is *fused*: what it no longer stores, and what it computes twice instead;
# - read a file of `oxidizr_ref/fused/` from top to bottom, tiles included.
#
# **Needs**: notebook 1 (vector–Jacobian products, broadcasting, the directional test). **Time**: 45 minutes.

# %%
import inspect
import time
from functools import partial

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import Tensor, ops, parallel, reference
from oxidizr_ref.fused.rms_norm import RMSNorm, rms_norm, rms_norm_ref

# %% [markdown]
# ## 1. What it computes
#
# For one token, a vector $x$ of width $n$, with a learned weight $w$ of the same width (Zhang & Sennrich 2019, eq. 4):
#
# $$y_i = w_i \, \hat x_i, \qquad \hat x = \frac{x}{r}, \qquad r = \sqrt{\tfrac1n \sum_j x_j^2 + \varepsilon}$$
#
# $r$ is the root mean square of the vector, its typical entry. After the division the typical entry is 1, whatever it was
# before; then each channel gets a scale of its own. The small $\varepsilon$ (here $10^{-5}$) keeps a vector of zeros from
# being divided by zero.


# %%
def rms_norm_by_hand(x, w, eps=1e-5):
    """x: ``[..., n]``, w: ``[n]``. Returns ``[..., n]``."""
    r = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)  # [..., 1]
    return x / r * w


random = np.random.default_rng(3)
x = random.normal(size=(4, 6)) * np.array([[0.01], [1.0], [10.0], [1000.0]])  # four tokens of very different size
y = rms_norm_by_hand(x, np.ones(6))
for before, after in zip(x, y, strict=True):
    print(f"root mean square {np.sqrt((before**2).mean()):8.3f} -> {np.sqrt((after**2).mean()):.5f}")

# %% [markdown]
# The first row shows $\varepsilon$ at work: where the vector itself is small, it counts.
#
# Geometrically, RMSNorm projects every vector onto a sphere of radius $\sqrt n$. What is lost is the length, and only the
# length. In two dimensions:

# %%
angle = np.linspace(0, 2 * np.pi, 200)
points = random.normal(size=(40, 2)) * random.uniform(0.2, 1.8, size=(40, 1))
normed = rms_norm_by_hand(points, np.ones(2))
plt.figure(figsize=(4.2, 4))
plt.plot(np.sqrt(2) * np.cos(angle), np.sqrt(2) * np.sin(angle), color="0.7", linewidth=1)
for a, b in zip(points, normed, strict=True):
    plt.plot(*zip(a, b, strict=True), color="0.85", linewidth=1)
plt.plot(*points.T, "o", markersize=4, label="$x$")
plt.plot(*normed.T, "s", markersize=4, label="RMSNorm($x$)")
plt.xlabel("channel 1")
plt.ylabel("channel 2")
plt.title("Onto the circle of radius $\\sqrt{2}$")
plt.axis("equal")
plt.legend()
plt.show()

# %% [markdown]
# ## 2. Composed
#
# Written with the operations of notebook 1, autodiff gives the gradient for nothing. This is what the package calls the
# **reference** of an operation:

# %%
print(inspect.getsource(rms_norm_ref))

# %% [markdown]
# (`groups` cuts the last axis into parts that are normalized separately, which Mamba2 wants; here it is 1. `named` tells
# whoever watches what a value is called, notebook 16.)
#
# Count what it costs. Most of these operations make a new array, and the tape keeps what their backward passes will need:

# %%
B, n, eps = 6, 8, 1e-5
x, w = random.normal(size=(B, n)), random.normal(size=n)
y = rms_norm_ref(Tensor(x, requires_grad=True), Tensor(w, requires_grad=True), eps)


def nodes(node):
    """The operations behind a node, last first (here they form a chain with one fork)."""
    found, waiting = [], [node]
    while waiting:
        node = waiting.pop(0)
        if node not in found:
            found.append(node)
            waiting += [parent for parent in node.parents if parent is not None and not isinstance(parent, Tensor)]
    return found


def kept(node):
    """The arrays a node keeps for its backward pass."""
    return [value for value in vars(node).values() if isinstance(value, np.ndarray)]


for node in nodes(y.node):
    print(f"{type(node).__name__:8} keeps {', '.join(str(list(array.shape)) for array in kept(node)) or 'no array'}")

# %% [markdown]
# ## 3. The derivative by hand
#
# Let $\bar y$ be the gradient of the loss with respect to $y$. Two results are wanted, $\bar w$ and $\bar x$.
#
# **The weight.** $y_{ti} = w_i \hat x_{ti}$ for every token $t$, so $w_i$ is used once a token, and its gradient is a sum:
#
# $$\bar w_i = \sum_t \bar y_{ti}\, \hat x_{ti}$$
#
# **The input**, for one token. First through the weight: $\bar{\hat x}_i = \bar y_i w_i$. Then through $\hat x_i = x_i / r$,
# where $x_j$ acts twice: directly, and through $r$. From $r^2 = \frac1n\sum_j x_j^2 + \varepsilon$ follows
# $2r\,\frac{\partial r}{\partial x_j} = \frac{2}{n} x_j$, that is $\frac{\partial r}{\partial x_j} = \frac{x_j}{nr}$, and so
#
# $$\frac{\partial \hat x_i}{\partial x_j} = \frac{\delta_{ij}}{r} - \frac{x_i}{r^2}\cdot\frac{x_j}{nr}
# = \frac1r\left(\delta_{ij} - \tfrac1n \hat x_i \hat x_j\right).$$
#
# Multiply by $\bar{\hat x}_i$ and sum over $i$:
#
# $$\boxed{\;\bar x_j = \frac1r\left(\bar{\hat x}_j - \hat x_j \cdot \tfrac1n \sum_i \bar{\hat x}_i \hat x_i\right)\;}$$
#
# Read it: the sum is the part of the gradient that points along $\hat x$. It is *taken out*. Making $x$ longer does not
# change $y$, so the loss cannot ask for it.


# %%
def backward_by_hand(dy, x, w, eps=1e-5):
    """Returns dx ``[..., n]`` and dw ``[n]``."""
    r = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    xhat = x / r
    dxhat = dy * w
    dx = (dxhat - xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)) / r
    return dx, (dy * xhat).reshape(-1, x.shape[-1]).sum(axis=0)


dy = random.normal(size=(B, n))
dx, dw = backward_by_hand(dy, x, w)
print("gradient along x, a token each:", np.round((dx * x).sum(axis=1), 6))

# %% [markdown]
# Nearly zero, not zero: $\varepsilon$ is not scaled along with $x$, and what remains is $\varepsilon/r^2$ of what was there.
#
# ## 4. Three checks
#
# A derivation is a text, and texts have typing errors. First check: autodiff on the reference knows nothing of our
# derivation.

# %% tags=["varies"]
tx, tw = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
rms_norm_ref(tx, tw, eps).backward(dy)
print(f"against autodiff: dx {abs(dx - tx.grad).max():.0e}, dw {abs(dw - tw.grad).max():.0e}")
assert abs(dx - tx.grad).max() < 1e-14 and abs(dw - tw.grad).max() < 1e-14

# %% [markdown]
# Second check: differences know nothing of either. Along random directions, for the scalar $\langle \bar y, y\rangle$:

# %%
h = 1e-6
for name, gradient, moved in (
    ("x", dx, lambda v: rms_norm_by_hand(x + v, w)),
    ("w", dw, lambda v: rms_norm_by_hand(x, w + v)),
):
    direction = random.normal(size=gradient.shape)
    by_difference = ((moved(h * direction) - moved(-h * direction)) * dy).sum() / (2 * h)
    by_formula = (gradient * direction).sum()
    print(f"along a random direction of {name}: formula {by_formula:+.9f}, difference {by_difference:+.9f}")
    assert abs(by_formula - by_difference) < 1e-7 * abs(by_difference)

# %% [markdown]
# How good is such a test? Plant errors and see. Each line below is a mistake someone has made:

# %%
r = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
xhat, dxhat = x / r, dy * w
mistakes = {
    "none": dx,
    "the part along x is kept": dxhat / r,
    "weight forgotten in the mean": (dxhat - xhat * (dy * xhat).mean(axis=-1, keepdims=True)) / r,
    "sum instead of mean": (dxhat - xhat * (dxhat * xhat).sum(axis=-1, keepdims=True)) / r,
    "divided by r² once too often": (dxhat - xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)) / r**2,
}
direction = random.normal(size=x.shape)
change = rms_norm_by_hand(x + h * direction, w) - rms_norm_by_hand(x - h * direction, w)
by_difference = (change * dy).sum() / (2 * h)
for name, wrong in mistakes.items():
    error = abs((wrong * direction).sum() - by_difference) / abs(by_difference)
    print(f"{name:30} relative error {'below 1e-7' if error < 1e-7 else f'{error:.2f}'}")
    assert (error < 1e-7) == (name == "none")

# %% [markdown]
# The third check comes with the fast version.
#
# ## 5. Why fuse
#
# On a CPU, arithmetic is cheap and moving memory is not: an array that does not fit into a core's cache (a few hundred
# thousand numbers) must come from main memory, and for each of its numbers a core could have done many additions meanwhile.
# The composed version passes over $x$ again and again. A **fused** version does everything to a piece of $x$ while it is in
# the cache, and goes on to the next piece.
#
# It also keeps less. The backward formula needs $x$, $w$ and $r$, and from these $\hat x = x/r$ can be computed again. So:
# keep $x$ (which the tape has anyway) and **one number a token**, $1/r$. That is the most common trade in this package:
# *keep the small statistics, recompute the rest*.

# %%
fused_y = rms_norm(Tensor(x, requires_grad=True), Tensor(w, requires_grad=True), eps)
composed_y = rms_norm_ref(Tensor(x, requires_grad=True), Tensor(w, requires_grad=True), eps)
print(f"for x of {x.size} numbers and w of {w.size}:")
for name, y in (("composed", composed_y), ("fused", fused_y)):
    arrays = {id(array): array.size for node in nodes(y.node) for array in kept(node)}
    print(f"{name:8} operations: {len(nodes(y.node))}, numbers kept: {sum(arrays.values())}")

# %% [markdown]
# ## 6. The fused file, line by line
#
# The forward pass. Its steps are numbered, as every file in `fused/` does it:

# %%
print(inspect.getsource(RMSNorm.forward))

# %% [markdown]
# - `x.reshape(-1, groups, width)`: all tokens of all sequences become rows. With one group this is `[tokens, 1, n]`.
# - `vecdot(x, x) / width`: the mean of squares in one pass, without an array of squares.
# - (1) keeps `rstd`, our $1/r$. (2) writes $\hat x$ into the memory of the result, and (3) scales it there: no array is made
#   that is not returned or kept.
# - `parallel.for_tiles(self.tiles, rows)`: `rows(i, j)` does rows $i$ to $j-1$. Which tiles there are is the subject of the
#   next section.
#
# The backward pass undoes the steps in reverse, and says which:

# %%
print(inspect.getsource(RMSNorm.backward))

# %% [markdown]
# Held against the boxed formula:
#
# | code | formula |
# |---|---|
# | `along = dy * x` | $\bar y_i x_i$, needed by both results |
# | `dweights[...] = rstd · along`, a matrix product | $\sum_t \bar y_{ti} x_{ti} / r_t = \bar w_i$, of the tile's tokens |
# | `lost = vecdot(along, weight)` | $\sum_i \bar y_i x_i w_i = r \sum_i \bar{\hat x}_i \hat x_i$ |
# | `lost *= rstd**3 / width` | $\frac{1}{r^2} \cdot \frac1n \sum_i \bar{\hat x}_i \hat x_i$ |
# | `tile = dy * weight * rstd` | $\bar{\hat x}_j / r$ |
# | `tile -= x * lost` | $-\, x_j \cdot \frac{1}{r^2} \cdot \frac1n \sum_i \bar{\hat x}_i \hat x_i$, and $x_j = r \hat x_j$ |
#
# And the third check: the fused operation against its reference and against our formula.

# %% tags=["varies"]
fx, fw = Tensor(x, requires_grad=True), Tensor(w, requires_grad=True)
rms_norm(fx, fw, eps).backward(dy)
print(f"fused against our formula: dx {abs(fx.grad - dx).max():.0e}, dw {abs(fw.grad - dw).max():.0e}")
assert abs(fx.grad - dx).max() < 1e-14 and abs(fw.grad - dw).max() < 1e-14

with reference():  # the switch for a whole model: here rms_norm *is* rms_norm_ref
    print("inside reference():", type(rms_norm(fx, fw, eps).node).__name__, "is the last operation, a product of arrays")
print("outside:           ", type(rms_norm(fx, fw, eps).node).__name__)

# %% [markdown]
# ## 7. Tiles
#
# `row_tiles` cuts the rows into pieces of about `parallel.ELEMENTS` numbers, and threads take one piece after the other.
# The number of pieces depends on the **shape alone**, never on how many threads there are. That matters for one line:
# `dweight` is a sum over all tokens, so each tile makes a partial sum, and the partial sums are added in one fixed order
# (`tree_sum`). Which thread computed what changes nothing, so the bits do not depend on the threads.

# %%
x_large = random.normal(size=(4096, 256)).astype(np.float32)
w_large = random.normal(size=256).astype(np.float32)
dy_large = random.normal(size=x_large.shape).astype(np.float32)
tiles = parallel.row_tiles(*x_large.shape)
print(f"{x_large.shape[0]} rows of {x_large.shape[1]}: {len(tiles)} tiles, the first {tiles[0]}, the last {tiles[-1]}")


def gradients(threads):
    before = parallel.get_threads()
    parallel.set_threads(threads)
    try:
        leaves = Tensor(x_large, requires_grad=True), Tensor(w_large, requires_grad=True)
        rms_norm(*leaves, eps).backward(dy_large)
    finally:
        parallel.set_threads(before)
    return [leaf.grad for leaf in leaves]


alone = gradients(1)
for threads in (2, 3, 8):
    same = all(a.tobytes() == b.tobytes() for a, b in zip(alone, gradients(threads), strict=True))
    print(f"{threads} threads: {'the same bits' if same else 'OTHER BITS'} as one thread")
    assert same

# %% [markdown]
# But do cut the tiles differently, and the last digits of `dweight` move, because another order of additions rounds
# differently. (`dx` cannot move: no sum of it crosses a tile.) So the size of a tile is part of what a checkpoint's bits
# mean.

# %% tags=["varies"]
default = parallel.ELEMENTS
parallel.ELEMENTS = default // 8
other = gradients(1)
parallel.ELEMENTS = default
for name, a, b in zip(("dx", "dweight"), alone, other, strict=True):
    moved = abs(a - b).max() / abs(a).max()
    print(f"{name:7} with smaller tiles: {'the same bits' if a.tobytes() == b.tobytes() else f'differs by {moved:.0e}'}")

# %% [markdown]
# ## 8. Faster?
#
# On this machine, forward and backward together, the best of several runs. (Yours will differ, so the numbers of this
# section are not compared when the notebooks are checked.)

# %% tags=["varies"]
cases = {"composed": rms_norm_ref, "fused": rms_norm}
sizes = [2**k for k in range(6, 15, 2)]


def seconds(operation, rows, repeats=7):
    """The best time of a forward and a backward pass over ``[rows, 256]``."""
    x, dy = (random.normal(size=(rows, 256)).astype(np.float32) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        leaves = Tensor(x, requires_grad=True), Tensor(w_large, requires_grad=True)
        began = time.perf_counter()
        operation(*leaves, eps).backward(dy)
        best = min(best, time.perf_counter() - began)
    return best


measured = {name: [seconds(operation, rows) / rows * 1e9 / 256 for rows in sizes] for name, operation in cases.items()}
for (name, values), marker in zip(measured.items(), "os", strict=True):
    plt.loglog(sizes, values, marker + "-", label=name, base=2)
plt.xlabel("tokens of width 256")
plt.ylabel("time (ns a number)")
plt.title("RMSNorm, forward and backward")
plt.legend()
plt.show()
print(f"at {sizes[-1]:,} tokens fused takes {measured['fused'][-1] / measured['composed'][-1]:.2f} of the time of composed")

# %% [markdown]
# For few tokens both curves rise to the left: what costs then is calling Python and NumPy, which the fused version does less
# often. For many, the composed version pays for memory.
#
# ## 9. What it does for a model
#
# A residual stream grows: every layer adds to it. A norm in front of each layer means that a layer always sees inputs of
# the same size, however large the stream has become. Stack 60 random linear layers, $x \leftarrow x + f(x)$, so made that
# the entries of $f(x)$ are 0.675 times as large as those of what goes into $f$. Without a norm, $x$ and $f(x)$ being
# independent, the mean square of the stream grows by the *factor* $1 + 0.675^2$ a layer. With it, by the *term* $0.675^2$:
# a random walk.

# %%
width, depth, gain = 64, 60, 0.675
start = random.normal(size=(128, width))
matrices = random.normal(size=(depth, width, width)) * gain / np.sqrt(width)
layers = np.arange(depth + 1)
expected = {"without norm": (1 + gain**2) ** (layers / 2), "with RMSNorm": np.sqrt(1 + layers * gain**2)}
plt.figure(figsize=(7, 3))
for (label, theory), norm in zip(expected.items(), (lambda x: x, partial(rms_norm_by_hand, w=np.ones(width))), strict=True):
    stream, size = start, [np.sqrt((start**2).mean())]
    for W in matrices:
        stream = stream + norm(stream) @ W
        size.append(np.sqrt((stream**2).mean()))
    plt.semilogy(layers, size, label=label)
    plt.semilogy(layers, theory, ":", color=COLORS["black"], linewidth=1)
    print(f"{label}: after {depth} layers {size[-1]:,.1f}, expected about {theory[-1]:,.1f}")
plt.xlabel("layers passed")
plt.ylabel("root mean square of the stream")
plt.title("Exponential growth, or a random walk (dotted: expected)")
plt.legend()
plt.show()

# %% [markdown]
# Exponential growth over 60 layers is four or five orders of magnitude, and gradients do the same on the way back. That is
# what a norm prevents.
#
# ## Exercises
#
# ### Exercise 1: LayerNorm
# LayerNorm (Ba, Kiros & Hinton 2016) also subtracts the mean: $\hat x = (x - \mu)/\sqrt{\mathrm{var}(x) + \varepsilon}$.
# Derive its backward pass (without weight and bias) and write `layer_norm_backward(dy, x, eps)`. One more direction is
# lost: which? It must satisfy
#
# ```python
# t = Tensor(x, requires_grad=True)
# c = t - t.mean(axis=-1, keepdims=True)
# (c / ops.sqrt((c * c).mean(axis=-1, keepdims=True) + 1e-5)).backward(dy)
# assert np.allclose(layer_norm_backward(dy, x, 1e-5), t.grad, rtol=0, atol=1e-13)
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def layer_norm_backward(dy, x, eps):
    """Centering is a projection (its own transpose), so: the RMSNorm formula on centered x, then center the result."""
    c = x - x.mean(axis=-1, keepdims=True)
    r = np.sqrt((c * c).mean(axis=-1, keepdims=True) + eps)
    xhat = c / r
    dc = (dy - xhat * (dy * xhat).mean(axis=-1, keepdims=True)) / r
    return dc - dc.mean(axis=-1, keepdims=True)


t = Tensor(x, requires_grad=True)
c = t - t.mean(axis=-1, keepdims=True)
(c / ops.sqrt((c * c).mean(axis=-1, keepdims=True) + 1e-5)).backward(dy)
assert np.allclose(layer_norm_backward(dy, x, 1e-5), t.grad, rtol=0, atol=1e-13)
print("lost besides the length: the direction (1, 1, …, 1); sums of dx:", np.round(t.grad.sum(axis=1), 12) + 0.0)

# %% [markdown]
# ### Exercise 2: the Jacobian, once
# For one token, form the whole Jacobian of RMSNorm with $w = 1$, as `jacobian(x, eps)`, an array `[n, n]`. With
# $\varepsilon = 0$ it is $\frac1r$ times a projection. Its rank must say what section 3 says:
#
# ```python
# J = jacobian(x[0], 0.0)
# dx0, _ = backward_by_hand(dy[:1], x[:1], np.ones(n), eps=0.0)
# assert np.allclose(J.T @ dy[0], dx0[0])
# assert np.linalg.matrix_rank(J) == n - 1
# assert np.allclose(J @ x[0], 0)
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def jacobian(x, eps):
    """d xhat_i / d x_j = (δ_ij - xhat_i xhat_j / n) / r."""
    r = np.sqrt((x * x).mean() + eps)
    xhat = x / r
    return (np.eye(len(x)) - np.outer(xhat, xhat) / len(x)) / r


J = jacobian(x[0], 0.0)
dx0, _ = backward_by_hand(dy[:1], x[:1], np.ones(n), eps=0.0)
assert np.allclose(J.T @ dy[0], dx0[0])
assert np.linalg.matrix_rank(J) == n - 1
assert np.allclose(J @ x[0], 0)
print(f"{n} channels, rank {np.linalg.matrix_rank(J)}")

# %% [markdown]
# ### Exercise 3: by groups
# Write `grouped(x, w, eps, groups)` with your own NumPy, which normalizes each of `groups` equal parts of the last axis. It
# must satisfy
#
# ```python
# assert np.allclose(grouped(x, w, 1e-5, 4), rms_norm(Tensor(x), Tensor(w), 1e-5, 4).data, rtol=1e-14)
# assert np.allclose(grouped(x, w, 1e-5, 1), rms_norm_by_hand(x, w), rtol=1e-14)
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def grouped(x, w, eps, groups):
    """RMSNorm of each part, ``[..., n]`` to ``[..., n]``."""
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return rms_norm_by_hand(parts, np.ones(parts.shape[-1]), eps).reshape(x.shape) * w


assert np.allclose(grouped(x, w, 1e-5, 4), rms_norm(Tensor(x), Tensor(w), 1e-5, 4).data, rtol=1e-14)
assert np.allclose(grouped(x, w, 1e-5, 1), rms_norm_by_hand(x, w), rtol=1e-14)
print(
    "each part has root mean square", np.round(np.sqrt((grouped(x, np.ones(n), 0.0, 4).reshape(-1, 2) ** 2).mean(1))[:4], 6)
)

# %% [markdown]
# ### Exercise 4: why float32 inside
# In float16 the largest number is 65,504. For which root mean square of $x$ does $\sum_j x_j^2$ over $n = 4096$ channels
# overflow? Set `limit` to it (a formula, not a trial), and see. It must satisfy
#
# ```python
# def sum_of_squares(size):
#     x = np.full(4096, size, dtype=np.float16)
#     with np.errstate(over="ignore"):
#         return (x * x).sum(dtype=np.float16)
# assert np.isfinite(sum_of_squares(0.95 * limit)) and np.isinf(sum_of_squares(1.05 * limit))
# ```

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
limit = np.sqrt(65504 / 4096)


def sum_of_squares(size):
    x = np.full(4096, size, dtype=np.float16)
    with np.errstate(over="ignore"):
        return (x * x).sum(dtype=np.float16)


assert np.isfinite(sum_of_squares(0.95 * limit)) and np.isinf(sum_of_squares(1.05 * limit))
print(f"a root mean square of {limit:.1f} is already too much; the package computes in float32 what it stores in float16")

# %% [markdown]
# ## Where to read on
#
# - Zhang & Sennrich (2019), *Root Mean Square Layer Normalization*, sections 3 and 4: the equation, and what is left out
#   compared with Ba, Kiros & Hinton (2016), *Layer Normalization*.
# - Xiong et al. (2020), *On Layer Normalization in the Transformer Architecture*: why the norm stands in front.
# - Dao et al. (2022), *FlashAttention*, section 2: memory traffic as the cost that counts.
# - Here: `oxidizr_ref/fused/rms_norm.py` (with its CUDA kernels below), `oxidizr_ref/parallel.py`, the decision on
#   [tiles and threads](../docs/decisions/2026-11-23-tiles-and-threads.md), and [performance](../docs/performance.md).
# - Next: [04 · Attention and RoPE](04_attention_and_rope.ipynb); tiles and sums again in notebook 15.
