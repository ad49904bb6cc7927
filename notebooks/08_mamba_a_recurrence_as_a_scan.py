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
# # 08 · Mamba: a recurrence as a scan
#
# After this you can
#
# - turn a differential equation into a recurrence, and say what Mamba keeps of the exact solution;
# - show that a recurrence with fixed numbers is a convolution, and that a *selective* one is not;
# - compute a recurrence of $T$ steps in about $\log_2 T$ rounds, with one associative operator;
# - write a whole Mamba layer in NumPy, and read from its time steps what it remembers and for how long.
#
# **Needs** notebooks 01 and [05](05_a_transformer_on_one_page.ipynb). No attention. **Time:** 45 minutes to read; it runs
# in about 15 seconds.

# %%
import inspect
import math
import time

import numpy as np
from figures import around_zero, plt

from oxidizr_ref import AdamW, LanguageModel, Tensor, no_grad
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.data import bundled_corpus
from oxidizr_ref.fused.selective_scan import selective_scan
from oxidizr_ref.layers.mamba1 import Mamba1
from oxidizr_ref.optim import clip_factor, global_norm, learning_rate
from oxidizr_ref.tokenizers import ByteTokenizer
from oxidizr_ref.watch import Watcher, watched

generator = np.random.default_rng(0)


def difference(a, b):
    """The largest difference, as a part of the largest number."""
    return np.abs(a - b).max() / np.abs(b).max()


# %% [markdown]
# ## 1 · A state that decays
#
# Attention keeps every token. A **state space model** keeps a state of fixed size, and lets each token change it. It
# begins as a differential equation. A signal $x(t)$ drives a state $h(t)$ of $N$ numbers, and the output is a mixture of
# them:
#
# $$ h'(t) = A\, h(t) + B\, x(t), \qquad y(t) = C \cdot h(t) + D\, x(t). $$
#
# In Mamba $A$ is diagonal with negative entries: each number $h_n$ by itself decays like $e^{A_n t}$, and forgets within
# a time of about $1/|A_n|$. $B\ [N]$ says how the input enters, $C\ [N]$ how the state is read, and $D$ passes the input
# by. Every channel of the model has such a state of its own.
#
# Tokens come one by one, so time goes in steps of length $\Delta$. If $x$ stays $x_t$ during a step, the equation can be
# solved exactly. Multiply $h' - A h = B x_t$ by $e^{-A\tau}$; the left side becomes the derivative of $e^{-A\tau} h$;
# integrate from 0 to $\Delta$:
#
# $$ h_t = \underbrace{e^{\Delta A}}_{\bar A}\, h_{t-1} + \underbrace{\frac{e^{\Delta A} - 1}{A}\, B}_{\bar B}\, x_t
# \qquad\text{("zero-order hold")}. $$
#
# Mamba's code, and the package, keep $\bar A = e^{\Delta A}$ and replace $\bar B$ by its first term, $\Delta B$:
# $(e^{z} - 1)/z \to 1$ for small $z = \Delta A$. Why may $\bar B$ be simplified and not $\bar A$? A factor in $\bar B$
# only scales what enters, and $B$ is learned. An error in $\bar A$ is multiplied with itself at every step: with its
# first terms, $1 + \Delta A$ (Euler's method), the state explodes as soon as $\Delta |A| > 2$.

# %%
steps, signal = np.arange(9), np.ones(9)  # the input is switched on and stays
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for axis, z in zip(axes, (-0.5, -2.2), strict=True):  # z = dt A, with A = -1 and B = 1
    fine = np.linspace(0, 8, 200)
    axis.plot(fine, 1 - np.exp(z * fine), color="0.5", label="the differential equation")
    kept = {"exact": (np.exp(z), 1 - np.exp(z)), "Mamba": (np.exp(z), -z), "Euler": (1 + z, -z)}
    for (name, (a, b)), mark in zip(kept.items(), "os^", strict=True):
        h = [0.0]
        for x in signal[1:]:
            h.append(a * h[-1] + b * x)
        axis.plot(steps, h, mark, markersize=5, label=name)
    axis.set(xlabel="step", ylabel="state", title=f"dt |A| = {-z}", ylim=(-1.5, 3.5))
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# "Exact" sits on the curve. "Mamba" decays at the right speed to another level: a different scale, which $B$ can make
# good. Euler's method overshoots and grows.
#
# ## 2 · With fixed numbers it is a convolution
#
# Unroll $h_t = \bar A h_{t-1} + \bar B x_t$ from $h = 0$:
#
# $$ y_t = C \cdot h_t = \sum_{j=0}^{t} \underbrace{(C \cdot \bar A^{\,j} \bar B)}_{K_j} \, x_{t-j}, $$
#
# a convolution of the input with a kernel $K$ that is a sum of $N$ decaying exponentials. How far back it reads is fixed
# once and for all. By hand:

# %% tags=["varies"]
T, N = 200, 4
A, B, C = -np.arange(1.0, N + 1), generator.standard_normal(N), generator.standard_normal(N)
dt, x = 0.05, generator.standard_normal(T)
decay, entering = np.exp(dt * A), dt * B

h, recurrent = np.zeros(N), []
for x_t in x:
    h = decay * h + entering * x_t
    recurrent.append(C @ h)

kernel = (C * entering) @ decay[:, None] ** np.arange(T)  # [T]
convolved = np.convolve(x, kernel)[:T]
print(f"recurrence and convolution differ by {difference(np.array(recurrent), convolved):.0e}")
assert difference(np.array(recurrent), convolved) < 1e-13

# %% [markdown]
# This is how models before Mamba were trained fast (S4, Gu et al. 2022): as one long convolution. And it is what they
# could not do: the kernel is the same for every text. Such a model cannot decide, on seeing a token, that *this* one is
# worth keeping.
#
# ## 3 · Selection
#
# Mamba (Gu & Dao 2023) lets three of the numbers depend on the token: the time step $\Delta_t$, and $B_t$ and $C_t$. For
# one channel
#
# $$ h_t = e^{\Delta_t A} \odot h_{t-1} + \Delta_t\, x_t\, B_t, \qquad y_t = C_t \cdot h_t + D x_t. $$
#
# $\Delta_t$ is the important one. It is a gate: a large step lets the old state decay and takes the new token in; a step
# near zero leaves the state as it was, and the token passes unseen. Exactly so: with one state, $A=-1$, $B=1$, and
# $\Delta = \mathrm{softplus}(z) = \ln(1 + e^z)$, the exact solution of section 1 has
#
# $$ \bar A = e^{-\ln(1+e^z)} = \frac{1}{1+e^z} = 1 - \sigma(z), \qquad \bar B = 1 - \bar A = \sigma(z), $$
#
# so $h_t = (1 - \sigma(z_t))\, h_{t-1} + \sigma(z_t)\, x_t$: the gate of a recurrent network (theorem 1 there).

# %%
z = np.linspace(-6, 6, 7)
dt = np.log1p(np.exp(z))
for name, row in [("z", z), ("dt", dt), ("kept", np.exp(-dt)), ("taken", 1 - np.exp(-dt))]:
    print(f"{name:6}" + "".join(f"{value:8.3f}" for value in row))
assert np.allclose(1 - np.exp(-dt), 1 / (1 + np.exp(-z)))

# %% [markdown]
# Unrolled, a selective model is still linear in $x$ once the gates are known, $y = M x$ with a lower triangular matrix
#
# $$ M_{ts} = C_t \cdot \Big( \prod_{r=s+1}^{t} e^{\Delta_r A} \Big) \odot \Delta_s B_s \qquad (s \le t). $$
#
# With fixed numbers its diagonals are constant: a convolution. With chosen ones they are not.


# %%
def as_matrix(dt, B, C):  # dt: [T], B and C: [T,N]
    past = np.cumsum(dt)  # the product of exponentials is the exponential of a sum
    decay = np.exp((past[:, None] - past)[..., None] * A)  # [T,T,N], meant for s <= t only
    return np.tril(np.einsum("tn,tsn,sn->ts", C, decay, dt[:, None] * B))


length = 24
fixed = as_matrix(np.full(length, 0.2), np.ones((length, N)), np.ones((length, N)))
chosen = np.where(np.arange(length) % 8 == 0, 1.0, 0.03)  # every eighth token opens the gate
selective = as_matrix(chosen, np.ones((length, N)), np.ones((length, N)))
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
for axis, M, title in [(axes[0], fixed, "fixed: every diagonal constant"), (axes[1], selective, "selective")]:
    image = around_zero(axis, M)
    axis.set(xlabel="token that entered, s", ylabel="token that reads, t", title=title)
    figure.colorbar(image, label="weight")
plt.show()

# %% [markdown]
# On the right the tokens with an open gate are remembered until the next such token comes; the others hardly leave a
# trace. The price: no convolution any more, so no fast Fourier transform. How then to train fast?
#
# ## 4 · A scan
#
# Written with $a_t = e^{\Delta_t A}$ and $b_t = \Delta_t x_t B_t$, everything is $h_t = a_t h_{t-1} + b_t$, number by
# number. One step is the function $h \mapsto a h + b$. Two steps after each other are such a function again:
#
# $$ a_2 (a_1 h + b_1) + b_2 = (a_2 a_1)\, h + (a_2 b_1 + b_2), \qquad
# (a_1, b_1) \circ (a_2, b_2) = (a_2 a_1,\; a_2 b_1 + b_2). $$
#
# Composing functions is **associative**: it does not matter which neighbours are combined first. So all prefixes
# $h_1, \dots, h_T$ can be found like running sums, in parallel: in round $i$ every element is combined with the one $2^i$
# before it (Hillis & Steele 1986).


# %%
def combined(first, second):
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2 * b1 + b2


def one_by_one(a, b):  # [T,...]
    h, out = np.zeros_like(b[0]), []
    for a_t, b_t in zip(a, b, strict=True):
        h = a_t * h + b_t
        out.append(h)
    return np.array(out)


def in_rounds(a, b):
    a, b, reach, rounds = a.copy(), b.copy(), 1, 0
    while reach < len(b):
        a[reach:], b[reach:] = combined((a[:-reach], b[:-reach]), (a[reach:], b[reach:]))
        reach, rounds = 2 * reach, rounds + 1
    return b, rounds


p, q, r = generator.standard_normal((3, 2))
left, right = combined(combined(p, q), r), combined(p, combined(q, r))
print("associative:", np.allclose(left, right), "  commutative:", np.allclose(combined(p, q), combined(q, p)))
a, b = generator.uniform(0.5, 1, (1000, 64)), generator.standard_normal((1000, 64))
h, rounds = in_rounds(a, b)
print(f"1000 steps in {rounds} rounds; the same as one by one: {np.allclose(h, one_by_one(a, b), rtol=0, atol=1e-12)}")
assert rounds == math.ceil(math.log2(1000)) and np.allclose(h, one_by_one(a, b), rtol=0, atol=1e-12)

# %% [markdown]
# Rounds are few, but each touches all $T$ elements: $T \log_2 T$ combinations instead of $T$. (Blelloch 1990 needs $2T$,
# in twice as many rounds.) On a GPU, with thousands of cores that would otherwise wait, that is a bargain. On a CPU it is
# not: there are thousands of channels and states, all independent, so a loop over time already has long rows to work on.
# That is what the package does: block by block it computes all that does not depend on the last state, and the recurrence
# itself is two operations a token.

# %% tags=["varies"]
length, channels, states = 256, 256, 16
x, raw = generator.standard_normal((2, 1, length, channels)).astype(np.float32)
B, C = generator.standard_normal((2, 1, length, states)).astype(np.float32)
A_32, zero = -np.tile(np.arange(1, states + 1, dtype=np.float32), (channels, 1)), np.zeros(channels, dtype=np.float32)
steps = np.log1p(np.exp(raw[0]))  # [T,E]
a = np.exp(steps[..., None] * A_32)  # [T,E,N]
b = (steps * x[0])[..., None] * B[0][:, None]


def milliseconds(f, tries=5):
    taken = []
    for _ in range(tries):
        began = time.perf_counter()
        f()
        taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


operands = [Tensor(v) for v in (x, raw, zero, A_32, B, C, zero)]
print(f"{a.size:,} numbers, {length} steps, float32:")
print(f"in rounds            {milliseconds(lambda: in_rounds(a, b)):7.1f} ms")
print(f"one by one           {milliseconds(lambda: one_by_one(a, b)):7.1f} ms")
print(f"oxidizr_ref          {milliseconds(lambda: selective_scan(*operands)):7.1f} ms, with exponentials, inputs, outputs")

# %% [markdown]
# **A shortcut that fails.** With $\pi_t = a_1 a_2 \cdots a_t$ the recurrence has a closed form,
# $h_t = \pi_t \sum_{s \le t} b_s / \pi_s$: a running product and a running sum, two lines of NumPy. But $\pi_t$ falls
# towards zero:

# %%
a32, b32 = np.full(400, 0.3, dtype=np.float32), np.ones(400, dtype=np.float32)
product = np.cumprod(a32)
with np.errstate(all="ignore"):
    closed_form = product * np.cumsum(b32 / product)
print(f"true value {1 / (1 - 0.3):.4f}; closed form after 50 steps {closed_form[49]:.4f}, after 400 {closed_form[-1]}")
print(f"the product after 50 steps {product[49]:.0e}, after 400 {product[-1]}")
assert np.isnan(closed_form[-1]) and np.isclose(in_rounds(a32, b32)[0][-1], 1 / (1 - 0.3))

# %% [markdown]
# The operator never divides, so nothing of the kind can happen to a scan.
#
# ## 5 · The whole layer
#
# Around the scan Mamba puts a gate and a short convolution. With $u\ [T,D]$ from the residual stream and $E$ channels:
#
# $$
# \begin{aligned}
# x, z &= W_{in}\, u & & [T,E] \text{ each} \\
# x &= \mathrm{silu}(\mathrm{conv}(x)) & & \text{each channel over its last 4 tokens} \\
# \delta, B, C &= W_x\, x & & [T,r], [T,N], [T,N];\ r \text{ is small} \\
# \Delta &= \mathrm{softplus}(W_\Delta\, \delta + b_\Delta) & & [T,E] \\
# h_t &= e^{\Delta_t A} \odot h_{t-1} + (\Delta_t x_t) B_t^\top & & [E,N],\ A = -e^{A_{log}} \\
# y_t &= h_t C_t + D \odot x_t & & [E] \\
# \mathrm{out} &= W_{out}\,(y \odot \mathrm{silu}(z)) & & [T,D]
# \end{aligned}
# $$
#
# $A$ is stored as a logarithm, so that it is negative whatever training does to it.

# %%
config = ModelConfig(hidden_size=32, num_layers=1, mamba_layers=[0], vocab_size=260, max_seq_len=64, dtype="f64")
layer = Mamba1(config, std=0.2, output_std=0.2)
layer.initialize(0, np.dtype(np.float64))
w = layer.state_dict()
for name, array in w.items():
    print(f"{name:16} {array.shape}")


# %%
def silu(v):
    return v / (1 + np.exp(-v))


def convolved(x, weight, bias):  # x: [T,E], weight: [E,1,K]
    K = weight.shape[2]
    padded = np.concatenate([np.zeros((K - 1, x.shape[1])), x])
    return sum(padded[k : k + len(x)] * weight[:, 0, k] for k in range(K)) + bias


def mamba(u, w):  # [T,D]
    N = w["A_log"].shape[1]
    x, z = np.split(u @ w["in_proj.weight"].T, 2, axis=1)  # [T,E] each
    x = silu(convolved(x, w["conv1d.weight"], w["conv1d.bias"]))
    delta, B, C = np.split(x @ w["x_proj.weight"].T, [-2 * N, -N], axis=1)
    dt = np.log1p(np.exp(delta @ w["dt_proj.weight"].T + w["dt_proj.bias"]))  # [T,E]
    a = np.exp(dt[:, :, None] * -np.exp(w["A_log"]))  # [T,E,N]
    h, _ = in_rounds(a, (dt * x)[:, :, None] * B[:, None, :])
    y = np.einsum("ten,tn->te", h, C) + w["D"] * x
    return (y * silu(z)) @ w["out_proj.weight"].T


# %% tags=["varies"]
u = generator.standard_normal((1, 50, 32))
ours, theirs = mamba(u[0], w), layer(Tensor(u)).data[0]
cache = layer.new_cache(batch=1)
stepped = np.concatenate([layer.step(Tensor(u[:, t : t + 1]), cache).data[0] for t in range(50)])
print(f"our layer and the package's differ by {difference(ours, theirs):.0e}")
print(f"its steps, token by token, and its whole form by {difference(stepped, theirs):.0e}")
print(f"cache: {cache.state.shape} and {cache.tail.shape}, {cache.state.size + cache.tail.size} numbers at any length")
assert difference(ours, theirs) < 1e-12 and difference(stepped, theirs) < 1e-12

# %% [markdown]
# Decoding needs no scan: the recurrence is already token by token. These are the lines:

# %%
print(inspect.getsource(Mamba1.step))

# %% [markdown]
# ## 6 · How long it remembers
#
# Before training, $A_n = -n$ in every channel, and $\Delta$ is spread evenly in its logarithm from 0.001 to 0.1. A number
# in the state loses half of itself in $\ln 2 / (\Delta\, n)$ tokens. So the layer is born with memories of all lengths:

# %%
model = LanguageModel(
    ModelConfig(hidden_size=48, num_layers=1, mamba_layers=[0], mamba_d_state=8, vocab_size=260, max_seq_len=64), seed=0
)
mixer = model.layers[0].mixer


def half_lives():
    dt = np.log1p(np.exp(mixer.dt_proj.bias.data))  # [E], when the token says nothing about it
    return (math.log(2) / (dt[:, None] * np.exp(mixer.A_log.data))).reshape(-1)  # tokens


born = half_lives()
print(f"half-lives at birth: {born.min():.1f} to {born.max():.0f} tokens, median {np.median(born):.0f}")

# %% [markdown]
# Those are its memories while a token says nothing. What does it make of a text? The package has names for its
# intermediate values, and lets us watch them pass (`oxidizr_ref.watch`). `dt_proj.output` is $W_\Delta \delta$, before
# bias and softplus.

# %%
tokenizer, sentence = ByteTokenizer(), "A bee visits a flower to drink. What is ice? It is cold."


class TimeSteps(Watcher):
    def named(self, name, x, *_):
        if name == "dt_proj.output":
            self.raw = x.data
        return x


def time_steps(text):
    watcher = TimeSteps()
    with watched(watcher), no_grad():
        model(tokenizer.encode(text)[None].astype(np.int64))
    return np.log1p(np.exp(watcher.raw[0] + mixer.dt_proj.bias.data))  # [T,E]


def selectivity(dt):
    """By which factor a channel's time step typically differs from its median, [E]."""
    return 2 ** np.abs(np.log2(dt / np.median(dt, axis=0))).mean(axis=0)


at_birth = selectivity(time_steps(sentence))
print(f"before training a time step differs from its channel's median by a factor of {at_birth.mean():.2f}")

# %% [markdown]
# Hardly at all: it is born as a fixed model. We train it on the bundled text: one layer, nothing else between embedding
# and output.

# %% tags=["varies"]
T, STEPS, PEAK = 64, 300, 1e-2
text = tokenizer.encode(bundled_corpus().read_text()).astype(np.int64)
train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
optimizer = AdamW(model.state_dict(), lr=PEAK)
for step in range(1, STEPS + 1):
    begin = np.random.default_rng([0, step]).integers(0, len(train) - T, 8)
    window = train[begin[:, None] + np.arange(T + 1)]
    model.loss(window[:, :-1], window[:, 1:]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    rate = learning_rate(step, peak=PEAK, schedule="cosine", warmup_steps=20, total_steps=STEPS, min_lr_ratio=0.05)
    optimizer.step(gradients, lr=rate, gradient_scale=clip_factor(global_norm(gradients), 1.0))
    model.zero_grad()
windows = held_out[: (len(held_out) - 1) // T * T + 1]
with no_grad():
    loss = model.loss(windows[:-1].reshape(-1, T), windows[1:].reshape(-1, T)).item()
trained = selectivity(time_steps(sentence))
print(f"held-out loss {loss:.3f} nats a token (notebook 05: about 1.8, with two layers and more updates)")
print(f"a time step now differs from its channel's median by a factor of {trained.mean():.2f}, in the most")
print(f"selective channel of {trained.max():.2f}")
assert loss < 2.0 and trained.mean() > 1.2 > at_birth.mean()

# %%
dt = time_steps(sentence)
order = np.argsort(-trained, kind="stable")[:40]
figure, axes = plt.subplots(figsize=(10, 3.8))
image = around_zero(axes, np.log2(dt / np.median(dt, axis=0))[:, order].T, largest=3, aspect="auto")
axes.set(xlabel="token", ylabel="channel, the most selective first", title="Red: the gate opens. Blue: it shuts")
axes.set_xticks(range(len(sentence)), ["␣" if c == " " else c for c in sentence], fontsize=8)
figure.colorbar(image, label="time step / median, log2")
plt.show()

# %% [markdown]
# That is selection: the same channel takes one token in with a step many times its usual one, and lets another pass. A
# fixed model (section 2) would be white all over. Different channels open at different characters. For some channels,
# those at which they open widest:

# %% tags=["varies"]
sample = tokenizer.decode(held_out[:4000])
ids, steps = tokenizer.encode(sample), time_steps(sample)
common = [byte for byte in range(256) if (ids == byte).sum() >= 30]
ratio = np.array([(steps[ids == byte] / np.median(steps, axis=0)).mean(axis=0) for byte in common])  # [bytes,E]
for channel in order[:8]:
    widest = np.argsort(-ratio[:, channel], kind="stable")[:5]
    told = ", ".join(f"{chr(common[i])!r} x{ratio[i, channel]:.1f}" for i in widest)
    print(f"channel {channel:2}: {told}")

# %% [markdown]
# ## Exercises
#
# **1 · Fourier.** Compute the convolution of section 2 with `np.fft.rfft` and `np.fft.irfft` for $T = 5000$ in
# $O(T \log T)$: `assert difference(by_fourier, np.convolve(x, kernel)[:5000]) < 1e-10`. (Why must the arrays be twice as
# long?)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
x = generator.standard_normal(5000)
kernel = (np.ones(N) * entering) @ decay[:, None] ** np.arange(5000)
spectrum = np.fft.rfft(x, 10000) * np.fft.rfft(kernel, 10000)  # zeros behind, or the end would wrap around to the start
by_fourier = np.fft.irfft(spectrum, 10000)[:5000]
assert difference(by_fourier, np.convolve(x, kernel)[:5000]) < 1e-10

# %% [markdown]
# **2 · The last marked one.** Tokens are numbers $x_t$; some are marked. Choose $z_t$ for the gate of section 3 so that
# $h_t$ is always the last marked number, however long ago that was. With `x` and `marked` below your `h` must satisfy
# `assert np.abs(h - last).max() < 1e-6`. (This is selective copying in small; no fixed kernel can do it.)

# %%
x = np.random.default_rng(7).standard_normal(300)
marked = np.random.default_rng(8).random(300) < 0.05
marked[0] = True
last = x[np.maximum.accumulate(np.where(marked, np.arange(300), 0))]

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
z = np.where(marked, 30.0, -30.0)  # open, or shut
gate = 1 / (1 + np.exp(-z))
h, _ = in_rounds(1 - gate, gate * x)
assert np.abs(h - last).max() < 1e-6

# %% [markdown]
# **3 · Backward is a scan, too.** For a loss with $\partial \mathrm{loss}/\partial h_t = w_t$ from outside, the whole
# gradient $g_t$ of $h_t$ also has what comes back through $h_{t+1}$: $g_t = w_t + a_{t+1} g_{t+1}$. Get $g$ for all $t$
# from *one call* of `in_rounds`, then the gradients of $b$ ($g_t$) and of $a$ ($g_t h_{t-1}$). With
# `a, b, w = generator.uniform(0.5, 1, (40, 3)), *generator.standard_normal((2, 40, 3))` compare with the tape:
# `assert difference(da, a_tensor.grad) < 1e-12`, and the same for `b`.

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
a, (b, w_out) = generator.uniform(0.5, 1, (40, 3)), generator.standard_normal((2, 40, 3))
next_a = np.concatenate([a[1:], np.ones((1, 3))])  # what stands behind the last one meets nothing
g = in_rounds(next_a[::-1], w_out[::-1])[0][::-1]
h, _ = in_rounds(a, b)
da = g * np.concatenate([np.zeros((1, 3)), h[:-1]])

a_tensor, b_tensor, state, total = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True), None, 0.0
for t in range(40):
    state = b_tensor[t] if state is None else a_tensor[t] * state + b_tensor[t]
    total = (state * Tensor(w_out[t])).sum() + total
total.backward()
assert difference(g, b_tensor.grad) < 1e-12
assert difference(da, a_tensor.grad) < 1e-12

# %% [markdown]
# **4 · A better rule.** For $h' = -h + \sin t$ from $h(0) = 0$ the true solution is
# $h(t) = \frac12(\sin t - \cos t + e^{-t})$. Step to $t = 4$ with $\Delta = 0.2, 0.1, 0.05$, by Mamba's rule
# $h_t = e^{-\Delta} h_{t-1} + \Delta x_t$, and by the trapezoidal rule
# $h_t = e^{-\Delta} h_{t-1} + \frac\Delta2 (e^{-\Delta} x_{t-1} + x_t)$. Write `errors(trapezoidal)`, three numbers, and
# show that halving $\Delta$ halves the error of the first and quarters that of the second:
# `assert np.all(np.abs(ratios / wanted - 1) < 0.1)` for the ratios of neighbours and `wanted` 2 and 4. The second is what
# Mamba3 does (notebook 10).


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def errors(trapezoidal):
    out = []
    for dt in (0.2, 0.1, 0.05):
        h, alpha = 0.0, math.exp(-dt)
        for i in range(1, round(4 / dt) + 1):
            now, before = math.sin(i * dt), math.sin((i - 1) * dt)
            h = alpha * h + (dt / 2 * (alpha * before + now) if trapezoidal else dt * now)
        out.append(abs(h - 0.5 * (math.sin(4) - math.cos(4) + math.exp(-4))))
    return np.array(out)


for name, trapezoidal, wanted in [("Mamba's rule", False, 2), ("trapezoidal", True, 4)]:
    ratios = errors(trapezoidal)[:-1] / errors(trapezoidal)[1:]
    print(f"{name:13} errors {errors(trapezoidal).round(6)}, ratios {ratios.round(2)}")
    assert np.all(np.abs(ratios / wanted - 1) < 0.1)

# %% [markdown]
# ## Where to read on
#
# - Gu & Dao 2023, *Mamba*: section 3 (selection, theorem 1, the scan), 3.6 (first values). Gu et al. 2022, *S4*, and *On
#   the Parameterization and Initialization of Diagonal State Space Models* (S4D).
# - Blelloch 1990, *Prefix Sums and Their Applications*. Hillis & Steele 1986, *Data Parallel Algorithms*. Martin & Cundy
#   2018: linear recurrences by scans.
# - In the project: [`layers/mamba1.py`](../oxidizr_ref/layers/mamba1.py),
#   [`fused/selective_scan.py`](../oxidizr_ref/fused/selective_scan.py) (its plain form, and the backward pass in blocks),
#   [the scans](../docs/architectures.md).
# - Next: notebook 09, [the same thing as a matrix](09_state_space_duality.ipynb).
