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
# # 09 · State space duality: the same thing as a matrix, in chunks
#
# After this you can
#
# - write Mamba2's recurrence as one matrix, and say what is special about that matrix;
# - derive the chunked algorithm, and check it for *every* chunk size, those that do not divide the length included;
# - count its cost as a function of the chunk size, and say why the count alone does not choose it;
# - say in which sense attention and a state space are the same thing.
#
# **Needs** notebooks [04](04_attention_and_rope.ipynb) (attention) and [08](08_mamba_a_recurrence_as_a_scan.ipynb).
# **Time:** 40 minutes to read; it runs in about 15 seconds.

# %%
import inspect
import time

import numpy as np
from figures import COLORS, around_zero, plt

from oxidizr_ref import LanguageModel, Tensor, reference
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.ssd import ssd, ssd_ref

generator = np.random.default_rng(0)


def difference(a, b):
    """The largest difference, as a part of the largest number."""
    return np.abs(a - b).max() / np.abs(b).max()


# %% [markdown]
# ## 1 · One decay a head
#
# Mamba1 lets every channel and every number of its state decay at a rate of its own. Mamba2 (Dao & Gu 2024) gives that
# up: a **head** of $P$ channels shares one time step $\Delta_t$ and one decay $A < 0$, a single number. In return its
# recurrence becomes matrix products, which is what hardware is fast at. For one head, with $x_t\ [P]$, $B_t, C_t\ [N]$
# and a state $h\ [P,N]$:
#
# $$ h_t = e^{a_t}\, h_{t-1} + \Delta_t\, x_t B_t^\top, \qquad y_t = h_t\, C_t + D\, x_t, \qquad a_t = \Delta_t A \le 0. $$
#
# By hand, from $h = 0$. ($D x_t$ concerns single tokens only; it is left out until the package joins.)

# %%
T, P, N = 20, 3, 4
x, B, C = generator.standard_normal((T, P)), *generator.standard_normal((2, T, N))
dt, A = generator.uniform(0.05, 0.6, T), -1.0
a = dt * A


def recurrence(x, dt, a, B, C):
    h, y = np.zeros((x.shape[1], B.shape[1])), []
    for t in range(len(x)):
        h = np.exp(a[t]) * h + dt[t] * np.outer(x[t], B[t])
        y.append(h @ C[t])
    return np.array(y)  # [T,P]


y = recurrence(x, dt, a, B, C)
print(y.shape)

# %% [markdown]
# ## 2 · The matrix
#
# Unroll it. What token $s$ put into the state has decayed by $e^{a_{s+1} + \dots + a_t}$ when token $t$ reads it:
#
# $$ y_t = \sum_{s \le t} \underbrace{e^{a_{s+1} + \dots + a_t}}_{L_{ts}}\; (C_t \cdot B_s)\; \Delta_s\, x_s,
# \qquad\text{that is}\qquad Y = \big( L \circ (C B^\top) \big)\, (\Delta \odot X). $$
#
# Compare attention: $Y = \mathrm{softmax}(\text{mask} + Q K^\top)\, V$. Here $C$ asks as the queries do, $B$ answers as
# the keys do, $\Delta x$ is the value; and in the place of mask and softmax stands $L$, a mask of numbers between 0 and 1
# that the tokens chose by their $\Delta$. That is the **duality**: the same function is a recurrence, linear in $T$ with
# a state of fixed size, and an attention without softmax, quadratic in $T$ and made of matrix products.
#
# With the running sum $\mathrm{cum}_t = a_1 + \dots + a_t$ we have $L_{ts} = e^{\mathrm{cum}_t - \mathrm{cum}_s}$.


# %%
def decays(a):
    """L, [T,T]: 1 on the diagonal, smaller to the left, 0 above."""
    cum = np.cumsum(a)
    return np.exp(np.where(np.tri(len(a), dtype=bool), cum[:, None] - cum, -np.inf))


def quadratic(x, dt, a, B, C):
    return (decays(a) * (C @ B.T)) @ (dt[:, None] * x)


# %% tags=["varies"]
print(f"recurrence and matrix differ by {difference(quadratic(x, dt, a, B, C), y):.0e}")
assert difference(quadratic(x, dt, a, B, C), y) < 1e-13

# %% [markdown]
# $L$ for three choices of the time steps. Without decay ($a = 0$) it is the causal mask, and the model is *linear
# attention* (Katharopoulos et al. 2020); with equal steps its diagonals are constant (as in RetNet, Sun et al. 2023);
# with chosen ones it has blocks: at a token with a large step the past is forgotten.

# %%
length = 32
chosen = np.where(np.isin(np.arange(length), [9, 16, 25]), -4.0, -0.03)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
for axis, some, title in zip(
    axes,
    (np.zeros(length), np.full(length, -0.15), chosen),
    ("no decay: linear attention", "equal steps", "chosen steps"),
    strict=True,
):
    image = axis.imshow(decays(some), vmin=0, vmax=1)
    axis.grid(False)
    axis.set(xlabel="token that entered, s", ylabel="token that reads, t", title=title)
figure.colorbar(image, label="L")
plt.show()

# %% [markdown]
# ## 3 · What is special about it: low rank off the diagonal
#
# $M = L \circ (C B^\top)$ has $T^2/2$ numbers and is full rank. But take any block below the diagonal, rows $t \ge m$ and
# columns $s < m$. There $L_{ts} = e^{\mathrm{cum}_t - \mathrm{cum}_m} \, e^{\mathrm{cum}_m - \mathrm{cum}_s}$ comes apart
# into a factor of the row and one of the column, so that
#
# $$ M_{ts} = \big( e^{\mathrm{cum}_t - \mathrm{cum}_m} C_t \big) \cdot
# \big( e^{\mathrm{cum}_m - \mathrm{cum}_s} B_s \big): $$
#
# a product of a matrix with $N$ columns and one with $N$ rows. Its rank is at most $N$, however large it is. Of course:
# all that the tokens before $m$ can tell those after it has to pass through the state. Matrices all of whose blocks below
# the diagonal have rank at most $N$ are called $N$-**semiseparable**.

# %%
M = decays(a) * (C @ B.T)
print(f"M: {T} x {T}, rank {np.linalg.matrix_rank(M)}; N = {N}")
ranks = [int(np.linalg.matrix_rank(M[m:, :m])) for m in range(1, T)]
print("ranks of M[m:, :m] for m = 1, 2, …:", ranks)
assert max(ranks) == N

# %% [markdown]
# ## 4 · Chunks
#
# So: near the diagonal, where blocks are small, multiply by the matrix; far from it, go through the state. Cut the
# sequence into chunks of $Q$ tokens. Let $\mathrm{cum}$ start anew in each chunk, and let $S_c\ [N,P]$ be the state
# before chunk $c$. For token $i$ of the chunk:
#
# 1. **inside** the chunk, the quadratic form: $\ Y = \big( L \circ (C B^\top) \big) (\Delta \odot X)$;
# 2. what the chunk **adds** to the state, seen from its end:
#    $\ \sum_j e^{\mathrm{cum}_Q - \mathrm{cum}_j}\, B_j\, (\Delta_j x_j)^\top$;
# 3. the state is **carried** on: $\ S_{c+1} = e^{\mathrm{cum}_Q}\, S_c + \text{what chunk } c \text{ adds}$;
# 4. what the **past** adds to the outputs: $\ y_i \mathrel{+}= e^{\mathrm{cum}_i}\, C_i\, S_c$.
#
# Steps 1, 2 and 4 are matrix products, and those of all chunks are independent. Only step 3 goes from chunk to chunk:
# $T/Q$ steps instead of $T$. A last chunk that is shorter needs nothing special.


# %%
def chunked(x, dt, a, B, C, Q, S=None):
    """y, [T,P], and the state after the last token, [N,P]. S: the state before the first (None: zero)."""
    S, y = np.zeros((B.shape[1], x.shape[1])) if S is None else S, np.empty_like(x)
    for start in range(0, len(x), Q):
        i = slice(start, start + Q)
        cum, entering = np.cumsum(a[i]), dt[i, None] * x[i]
        y[i] = (decays(a[i]) * (C[i] @ B[i].T)) @ entering  # 1
        added = (np.exp(cum[-1] - cum)[:, None] * B[i]).T @ entering  # 2
        y[i] += np.exp(cum)[:, None] * (C[i] @ S)  # 4
        S = np.exp(cum[-1]) * S + added  # 3
    return y, S


# %% tags=["varies"]
errors = {Q: difference(chunked(x, dt, a, B, C, Q)[0], y) for Q in range(1, T + 4)}
print(f"chunks of 1 to {T + 3} tokens, {T} tokens in all: the largest difference is {max(errors.values()):.0e}")
assert max(errors.values()) < 1e-13

# %% [markdown]
# $Q = 1$ is the recurrence, $Q \ge T$ the quadratic form; all between are right, too. In a picture, for $T = 20$ and
# $Q = 6$ (the last chunk has two tokens): the blocks on the diagonal are formed; those below never are.

# %%
Q = 6
edges = list(range(0, T, Q))
figure, axes = plt.subplots(figsize=(5.2, 4.2))
image = around_zero(axes, M)
for row in edges:
    for column in edges:
        if column <= row:
            color, line = ("black", "-") if row == column else (COLORS["green"], "--")
            corner, height, width = (column - 0.5, row - 0.5), min(Q, T - row), min(Q, T - column)
            axes.add_patch(plt.Rectangle(corner, width, height, fill=False, edgecolor=color, linestyle=line))
axes.set(xlabel="token that entered, s", ylabel="token that reads, t", title="black: formed; green: through the state")
axes.set_xticks(range(0, T, 2))
axes.set_yticks(range(0, T, 2))
figure.colorbar(image, label="M")
plt.show()

# %% [markdown]
# ## 5 · The package
#
# `oxidizr_ref.fused.ssd` does these four steps for all sequences, heads and chunks side by side, with the backward pass
# by hand. $B$ and $C$ are shared by groups of heads, as keys are in GQA. Beside it stands its plain form, the recurrence:

# %%
print(inspect.getsource(ssd_ref))

# %% tags=["varies"]
batch, length, heads, groups = 2, 37, 4, 2
operands = {
    "x": generator.standard_normal((batch, length, heads, P)),
    "dt": generator.uniform(0.05, 0.6, (batch, length, heads)),
    "A": -generator.uniform(0.5, 2, heads),
    "B": generator.standard_normal((batch, length, groups, N)),
    "C": generator.standard_normal((batch, length, groups, N)),
    "D": generator.standard_normal(heads),
}


def by_hand(x, dt, A, B, C, D, Q):
    y = np.empty_like(x)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)  # the group of this head
            y[b, :, h], _ = chunked(x[b, :, h], dt[b, :, h], dt[b, :, h] * A[h], B[b, :, g], C[b, :, g], Q)
    return y + x * D[:, None]


for Q in (1, 5, 16, 37, 64):
    package = ssd(*(Tensor(v) for v in operands.values()), Q).data
    error = difference(by_hand(**operands, Q=Q), package)
    print(f"chunk {Q:2}: ours and the package's differ by {error:.0e}")
    assert error < 1e-13

# %% [markdown]
# Its gradients, against those that the tape finds for the plain recurrence (inside `reference()` every fused operation
# runs as its plain form):


# %%
def gradients(Q):
    tensors = [Tensor(v, requires_grad=True) for v in operands.values()]
    y = ssd(*tensors, Q)
    (y * y).sum().backward()
    return {name: tensor.grad for name, tensor in zip(operands, tensors, strict=True)}


# %% tags=["varies"]
with reference():
    plain = gradients(Q=1)
for Q in (5, 16, 64):
    worst = {name: difference(gradient, plain[name]) for name, gradient in gradients(Q).items()}
    print(f"chunk {Q:2}:", ", ".join(f"d{name} {error:.0e}" for name, error in worst.items()))
    assert max(worst.values()) < 1e-12

# %% [markdown]
# And the whole layer in a model, `model(tokens)` in chunks against `model.step` token by token:

# %% tags=["varies"]
keys = {"hidden_size": 32, "num_layers": 2, "mamba_layers": [0, 1], "vocab_size": 260, "max_seq_len": 64, "dtype": "f64"}
model = LanguageModel(ModelConfig(**keys, mamba2_num_heads=4, mamba2_state_size=8, mamba2_chunk_size=16), seed=0)
tokens = generator.integers(0, 260, (2, 45))  # 45 is no multiple of 16
cache = model.new_cache(batch=2)
stepped = np.stack([model.step(tokens[:, t], cache).data for t in range(45)], axis=1)
print(f"logits differ by {difference(stepped, model(tokens).data):.0e}")
assert difference(stepped, model(tokens).data) < 1e-12

# %% [markdown]
# ## 6 · What it costs
#
# Multiplications of one head for one chunk of $Q$ tokens, with the square products formed whole (half of them is masked
# away, and computed all the same):
#
# | step | product | multiplications |
# |---|---|---|
# | 1 | $C B^\top$: $[Q,N]\,[N,Q]$ | $Q^2 N$ |
# | 1 | times $\Delta X$: $[Q,Q]\,[Q,P]$ | $Q^2 P$ |
# | 2 | $B^\top (\Delta X)$: $[N,Q]\,[Q,P]$ | $Q N P$ |
# | 4 | $C S$: $[Q,N]\,[N,P]$ | $Q N P$ |
#
# (The first is shared by all heads of a group.) For a token that is $Q\,(N + P) + 2 N P$: the second part does not depend
# on $Q$, the first grows with it. By the count, $Q = 1$ is best! But then there are no matrix products, only $T$ tiny
# steps after each other, and the hardware waits. As long as $Q\,(N+P)$ is small beside $2NP$, larger chunks cost little
# and make products larger and steps fewer; with $N = P$ the two are equal at $Q = N$. So $Q$ is chosen about as large as
# $N$ and $P$, and measured:

# %% tags=["varies"]
length, heads, N_, P_ = 2048, 8, 64, 64
large = [
    generator.standard_normal((1, length, heads, P_)),
    generator.uniform(0.01, 0.1, (1, length, heads)),
    -generator.uniform(1, 16, heads),
    *generator.standard_normal((2, 1, length, 1, N_)),
    np.ones(heads),
]
large = [Tensor(v.astype(np.float32)) for v in large]
sizes = [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


def milliseconds(Q, tries=5):
    taken = []
    for _ in range(tries):
        began = time.perf_counter()
        ssd(*large, Q)
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


counted = [Q * (N_ + P_) + 2 * N_ * P_ for Q in sizes]
measured = [milliseconds(Q) for Q in sizes]
print("chunk  multiplications a token and head     ms")
for Q, count, taken in zip(sizes, counted, measured, strict=True):
    print(f"{Q:5}  {count:32,}  {taken:5.1f}")

# %%
figure, axes = plt.subplots()
axes.plot(sizes, measured, marker="o", markersize=4, label="measured")
scale = measured[-1] / counted[-1]
axes.plot(sizes, np.array(counted) * scale, linestyle="--", label="multiplications, scaled to meet the last point")
axes.set(xlabel="chunk size Q (tokens)", ylabel="forward pass (ms)", title="Neither a recurrence nor a matrix: chunks")
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter("{x:g}")
axes.legend()
plt.show()
assert min(measured) < measured[0] and min(measured) < measured[-1]

# %% [markdown]
# ## 7 · Two traps
#
# **Split the exponential and it overflows.** $L_{ts} = e^{\mathrm{cum}_t - \mathrm{cum}_s}$ is at most 1. As
# $e^{\mathrm{cum}_t} \cdot e^{-\mathrm{cum}_s}$, a row times a column, it would be one product without any $[Q,Q]$ array
# of exponentials, and $e^{-\mathrm{cum}_s}$ is infinite as soon as a chunk decays by more than $e^{88}$ in float32.
# Subtract first, then take the exponential.
#
# **A running sum loses digits.** Behind a strong decay $|\mathrm{cum}|$ is large, and a difference of two large float32
# numbers has few digits left. That is why the package sums in float64 and subtracts before it goes back.

# %% tags=["varies"]
strong = np.full(64, -0.01, dtype=np.float32)
strong[:12] = -8.0  # a decay of e^-96, then a slow one
cum32, cum64 = np.cumsum(strong), np.cumsum(strong.astype(np.float64))
with np.errstate(over="ignore", invalid="ignore"):
    split = np.exp(cum32)[:, None] * np.exp(-cum32)[None, :]
print(f"split: L[63,62] = {split[63, 62]}, should be {np.exp(-0.01):.6f}")
late = np.tri(64, dtype=bool) & (np.arange(64) >= 12)
exact = np.exp(np.where(late, cum64[:, None] - cum64, 0))
for name, cum in [("float32", cum32), ("float64", cum64)]:
    L = np.exp(np.where(late, (cum[:, None] - cum).astype(np.float32), 0))
    print(f"sums in {name}: largest relative error of L behind the decay {np.abs(L / exact - 1).max():.0e}")
assert not np.isfinite(split[63, 62])

# %% [markdown]
# ## Exercises
#
# **1 · A text in two parts.** `chunked` takes a state and returns one. Show that 20 tokens at once equal the first 13 and
# then, from the state they leave, the other 7, with any two chunk sizes:
# `assert difference(np.concatenate([first, second]), y) < 1e-13`. That is how a prompt is read in chunks and continued
# token by token.

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
first, S = chunked(x[:13], dt[:13], a[:13], B[:13], C[:13], Q=5)
second, _ = chunked(x[13:], dt[13:], a[13:], B[13:], C[13:], Q=1, S=S)
assert difference(np.concatenate([first, second]), y) < 1e-13

# %% [markdown]
# **2 · Attention without softmax.** Let $a = 0$ and $\Delta = 1$. Write causal linear attention,
# $y_t = \sum_{s \le t} (q_t \cdot k_s)\, v_s$, with a mask and two products, and show that `chunked` computes it when it
# is given the right arguments: `assert difference(attended, ours) < 1e-13`. How many numbers must it keep to go on, and
# how many must softmax attention?

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
q, k, v = generator.standard_normal((T, N)), generator.standard_normal((T, N)), generator.standard_normal((T, P))
attended = (np.tri(T) * (q @ k.T)) @ v
ours, S = chunked(v, np.ones(T), np.zeros(T), k, q, Q=6)
assert difference(attended, ours) < 1e-13
print(f"it keeps {S.size} numbers at any length; softmax attention {N + P} a token, {T * (N + P)} here")

# %% [markdown]
# **3 · Backward is another SSD.** Since $Y = M (\Delta \odot X)$, the gradient of $\Delta \odot X$ is $M^\top\, dy$, and
# $M^\top$ is upper triangular: tokens are visited from the end, and $B$ and $C$ change places. Get `d_entering`
# $= M^\top dy$ from *one call* of `chunked` on reversed arrays. With `dy = generator.standard_normal((T, P))`:
# `assert difference(d_entering, M.T @ dy) < 1e-13`. (Mind which token's decay stands between two neighbours once the
# order is reversed.)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
dy = generator.standard_normal((T, P))
# Between s and t lies a_{s+1} + … + a_t. Reversed, the step into token s decays by a_{s+1}: shift by one.
shifted = np.concatenate([a[1:], [0.0]])
d_entering = chunked(dy[::-1], np.ones(T), shifted[::-1], C[::-1], B[::-1], Q=6)[0][::-1]
assert difference(d_entering, M.T @ dy) < 1e-13

# %% [markdown]
# **4 · How much a state can say.** Train nothing; only count. For a sequence of $T$ tokens, softmax attention with
# $P = 64$ keeps $2P$ numbers a token and head, Mamba2 $N P$ a head. From which length on does attention keep more, for
# $N = 16, 64, 128$? Write `crossing(N)` with `assert [crossing(n) for n in (16, 64, 128)] == [9, 33, 65]`, the first
# length at which it keeps strictly more. So why are such models used? (Think of 100,000 tokens; and of what notebook 06
# counted.)


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def crossing(N):
    return N // 2 + 1  # 2 P T > N P


assert [crossing(n) for n in (16, 64, 128)] == [9, 33, 65]
print(f"at 100,000 tokens attention keeps {2 * 100_000 / 128:,.0f} times as much as a state of N = 128")
# A state is large from the beginning, and never grows. What does not fit into it is forgotten: notebook 10 and the contrasts
# in docs/architectures.md show both sides.

# %% [markdown]
# ## Where to read on
#
# - Dao & Gu 2024, *Transformers are SSMs*: section 3 (semiseparable matrices), 5 (duality), 6 (the chunked algorithm), 7
#   (the Mamba2 layer).
# - Katharopoulos et al. 2020, *Transformers are RNNs*: linear attention. Sun et al. 2023, *RetNet*; Yang et al. 2024,
#   *Gated Linear Attention*: relatives with the same chunks.
# - Vandebril, Van Barel & Mastronardi 2008, *Matrix Computations and Semiseparable Matrices*.
# - In the project: [`fused/ssd.py`](../oxidizr_ref/fused/ssd.py),
#   [`fused/chunked_scan.py`](../oxidizr_ref/fused/chunked_scan.py),
#   [`layers/mamba2.py`](../oxidizr_ref/layers/mamba2.py); [the scans](../docs/architectures.md).
# - Next: notebook 10, [Mamba3: a state that turns](10_mamba3_rotation.ipynb).
