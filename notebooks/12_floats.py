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
# # 12 · Floats: why small updates vanish
#
# After this you can
#
# - take a float32, float16 or bfloat16 apart into its bits, and say its neighbors and its spacing;
# - predict whether `a + b` is `a`, and where a long sum or a long training therefore stops;
# - derive stochastic rounding, prove that it is right on average, write it in one line of integer arithmetic, and show
#   that it is what the package does, bit for bit;
# - say which gradients float16 loses, and what loss scaling does about it.
#
# **Needs** notebook 11 (AdamW). **Time:** 40 minutes to read; it runs in about 20 seconds.

# %%
import inspect
import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
from figures import COLORS, plt

from oxidizr_ref import AdamW, LanguageModel, load_config, optim, parallel, rng
from oxidizr_ref.data import open_data
from oxidizr_ref.evaluation import mean_loss
from oxidizr_ref.optim import clip_factor, global_norm

BF16 = np.dtype(ml_dtypes.bfloat16)  # NumPy has none of its own
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)

# %% [markdown]
# ## 1 · A number in bits
#
# A float has three fields: a sign $s$, an exponent $e$ of $E$ bits, and a fraction $f$ of $p$ bits. With
# $b = 2^{E-1} - 1$ it is
#
# $$
# x = (-1)^s \cdot \begin{cases}
# 2^{\,e-b}\,\left(1 + f / 2^p\right) & 0 < e < 2^E - 1 \quad \text{(normal)} \\
# 2^{\,1-b}\, f / 2^p & e = 0 \quad \text{(zero and subnormal numbers)} \\
# \infty \text{ if } f = 0, \text{ else NaN} & e = 2^E - 1
# \end{cases} \tag{1}
# $$
#
# | | bits | $E$ | $p$ |
# |---|---|---|---|
# | float32 | 32 | 8 | 23 |
# | float16 | 16 | 5 | 10 |
# | bfloat16 | 16 | 8 | 7 |
#
# bfloat16 is the upper half of a float32: the same range, 16 bits of precision fewer. float16 spends its bits the other
# way.

# %%
FORMATS = {"float32": (F32, 8, 23), "float16": (F16, 5, 10), "bfloat16": (BF16, 8, 7)}


def fields(x, dtype, E, p):
    """The sign, exponent and fraction fields of ``x`` (numbers or an array) stored as ``dtype``, as integers."""
    bits = np.asarray(x).astype(dtype).view(f"u{dtype.itemsize}").astype(np.int64)
    return bits >> (E + p), (bits >> p) & ((1 << E) - 1), bits & ((1 << p) - 1)


def value(s, e, f, E, p):
    """Equation (1), in float64, which holds all of these numbers exactly."""
    bias = 2 ** (E - 1) - 1
    size = np.where(e == 0, 2.0 ** (1 - bias) * f / 2**p, 2.0 ** (e - bias) * (1 + f / 2**p))
    special = e == 2**E - 1
    return np.where(special, np.where(f == 0, np.inf, np.nan), size) * (1 - 2 * s)


# %% [markdown]
# Do we have it right? There are only 65,536 numbers of 16 bits. Compare all of them:

# %%
for name in ("float16", "bfloat16"):
    dtype, E, p = FORMATS[name]
    every = np.arange(65536, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # among them are NaNs that warn when they are converted
        every_value = every.astype(np.float64)
    assert np.array_equal(value(*fields(every, dtype, E, p), E, p), every_value, equal_nan=True)
print("all 65,536 numbers of float16 and of bfloat16: equal")

# %%
figure, panels = plt.subplots(3, 1, figsize=(9, 3))
for axes, (name, (dtype, E, p)) in zip(panels, FORMATS.items(), strict=True):
    s, e, f = (int(v) for v in fields(math.pi, dtype, E, p))
    text = f"{s:b}{e:0{E}b}{f:0{p}b}"
    for i, bit in enumerate(text):
        color = COLORS["red"] if i == 0 else COLORS["sky"] if i <= E else COLORS["orange"]
        axes.add_patch(plt.Rectangle((i, 0), 0.92, 1, color=color, alpha=0.5))
        axes.text(i + 0.46, 0.47, bit, ha="center", va="center", fontsize=9)
    stored = float(value(s, e, f, E, p))
    axes.set(xlim=(-0.2, 32.2), ylim=(0, 1.05))
    axes.set_title(f"π as {name}: {stored!r}, off by {stored - math.pi:+.1e}", fontsize=10)
    axes.axis("off")
figure.suptitle("sign, exponent, fraction", fontsize=10)
plt.show()

# %% [markdown]
# ## 2 · Spacing
#
# Between $2^k$ and $2^{k+1}$ the exponent is the same and $f$ counts up by ones: neighbors are
#
# $$
# \mathrm{ulp}(x) = 2^{\,k - p}, \qquad k = \lfloor \log_2 |x| \rfloor, \tag{2}
# $$
#
# apart ("unit in the last place"), and never closer than $2^{1-b-p}$. So the *relative* spacing lies between $2^{-p-1}$
# and $2^{-p}$ everywhere: a float is a ruler whose marks are twice as far apart each time the number doubles.


# %%
def ulp(x, E, p):
    lowest = 1 - (2 ** (E - 1) - 1)
    return 2.0 ** (np.maximum(np.floor(np.log2(np.abs(x))), lowest) - p)


print(f"{'':9} {'largest':>10} {'smallest normal':>16} {'smallest':>9} {'ulp(1)':>9} {'ulp(0.02)':>10}")
for name, (dtype, E, p) in FORMATS.items():
    info, bias = ml_dtypes.finfo(dtype), 2 ** (E - 1) - 1
    largest, normal, smallest = 2.0**bias * (2 - 2.0**-p), 2.0 ** (1 - bias), 2.0 ** (1 - bias - p)
    assert (largest, normal, smallest) == (float(info.max), float(info.smallest_normal), float(info.smallest_subnormal))
    print(f"{name:9} {largest:10.3g} {normal:16.2g} {smallest:9.1e} {ulp(1.0, E, p):9.1e} {ulp(0.02, E, p):10.1e}")

# %%
x = np.logspace(-9, 6, 4000)
figure, axes = plt.subplots(figsize=(7, 3.2))
for (name, (_, E, p)), color in zip(FORMATS.items(), ("blue", "green", "red"), strict=True):
    axes.loglog(x, np.where(x < 65520 if name == "float16" else True, ulp(x, E, p), np.nan), color=COLORS[color], label=name)
axes.set(
    xlabel="|x|", ylabel="distance to the next number", title="Spacing follows size; float16 stops following below 6e-5"
)
axes.legend()
plt.show()

# %% [markdown]
# ## 3 · When is `a + b` equal to `a`?
#
# An operation gives the float nearest to the exact result; of two equally near, the one whose last bit is 0 ("ties to
# even"). So `a + b` is `a` whenever $|b|$ is less than half the distance from $a$ to its neighbor on that side: half an
# ulp, or a quarter when $a$ is a power of two and $b$ leads downwards, because there the ruler gets finer.

# %%
for name, (dtype, _, p) in FORMATS.items():
    one = dtype.type(1)
    up = next(k for k in range(99) if dtype.type(one + dtype.type(2.0**-k)) == one)
    down = next(k for k in range(99) if dtype.type(one - dtype.type(2.0**-k)) == one)
    assert (up, down) == (p + 1, p + 2)
    print(f"{name:9} 1 + 2^-k is 1 from k = {up}, 1 - 2^-k is 1 from k = {down}")
one = BF16.type(1)
print("ties to even, in bfloat16: 1 + 1/256 =", float(BF16.type(1 + 1 / 256)), " 1 + 3/256 =", float(BF16.type(1 + 3 / 256)))

# %% [markdown]
# As the relative half-ulp is at least $2^{-p-2}$: **an update smaller than $2^{-9}$ of a bfloat16 weight, a
# five-hundredth, is always lost.**
#
# ## 4 · A sum that stops
#
# Add up 4,096 ones, one after the other:


# %%
def running_sum(dtype, count=4096):
    total, totals = dtype.type(0), []
    for _ in range(count):
        total = dtype.type(total + dtype.type(1))
        totals.append(float(total))
    return np.array(totals)


figure, axes = plt.subplots(figsize=(6, 3))
for name, color in (("float32", "blue"), ("float16", "green"), ("bfloat16", "red")):
    totals = running_sum(FORMATS[name][0])
    axes.plot(totals, color=COLORS[color], label=f"{name}: {totals[-1]:.0f}")
    print(f"{name:9} stops at {totals[-1]:.0f} = 2^{math.log2(totals[-1]):.0f}")
axes.set(xlabel="ones added", ylabel="sum", title="At 2^(p+1) the spacing is 2, and adding 1 is a tie")
axes.legend()
plt.show()
print("NumPy's sum of 4,096 bfloat16 ones:", float(np.ones(4096, BF16).sum()))

# %% [markdown]
# Nothing warns. This is why nothing is *summed* in 16 bits in the package: what is stored so is read as float32,
# computed and summed in float32, and rounded once when it is stored. (For how float32 sums are kept in order, see
# notebook 15.)
#
# ## 5 · A training that stops
#
# A weight of 1 whose optimizer asks for 1,000 updates of $-5 \cdot 10^{-4}$. In bfloat16 the neighbor below 1 is
# $2^{-8} \approx 3.9 \cdot 10^{-3}$ away; each update is an eighth of that.


# %%
def updated(round_to, copies=1, steps=1000, update=-5e-4):
    """1, updated ``steps`` times in float32 and stored by ``round_to`` each time. Returns the values, [steps, copies]."""
    w, path = np.ones(copies, F32), []
    for n in range(steps):
        w = round_to(w + np.float32(update), n).astype(F32)
        path.append(w)
    return np.array(path)


exact = updated(lambda w, n: w)
nearest = updated(lambda w, n: w.astype(BF16))
print(f"float32 ends at {exact[-1, 0]:.4f}, bfloat16 rounded to nearest at {nearest[-1, 0]:.4f}")
assert nearest[-1, 0] == 1

# %% [markdown]
# Not a small error: all of a thousand updates are lost. Late in a training, when the learning rate is low, this is
# every weight's fate.
#
# ## 6 · Stochastic rounding
#
# Let $x$ lie between two neighbors, $a \le x < a + s$. Round **up with probability $q = (x - a)/s$**, else down. Then
#
# $$
# \mathbb E[\mathrm{sr}(x)] = q\,(a + s) + (1-q)\,a = a + s\,q = x, \qquad \mathrm{Var} = s^2 q (1-q) \le s^2/4 . \tag{3}
# $$
#
# It is never off by as much as a unit, and right on average. Errors of different steps are independent, so after $n$
# updates they have grown to about $\sqrt n\, s/2$ at most, while what rounding to nearest loses grows like $n$.
#
# **In one line.** The bits of positive floats are in the order of the floats, so between $a$ and $a + s$ lie the
# float32 numbers whose upper 16 bits are those of $a$, and whose lower 16 bits are $\ell = 2^{16} q$. Add a random
# integer $r$ from $0 \dots 2^{16}-1$ to the bits and cut the lower half off. The upper half is raised by a carry if
# $\ell + r \ge 2^{16}$, that is for $\ell$ of the $2^{16}$ values of $r$: with probability $q$. (For negative numbers
# the same happens to the size, away from zero or towards it.)


# %%
def stochastic(x, random):
    """Float32 to bfloat16. random: integers 0 … 65535, one for each number."""
    return ((x.view(np.uint32) + random.astype(np.uint32)) >> 16).astype(np.uint16).view(BF16)


# %% [markdown]
# Is it exactly unbiased? Try *all* $2^{16}$ random integers on some numbers, and take the mean in float64:

# %%
every_r = np.arange(65536, dtype=np.uint32)
for x in (math.pi, -0.02, 1e-30, 3e38):
    x = np.float32(x)
    results = stochastic(np.full(65536, x), every_r).astype(np.float64)
    low, high = results.min(), results.max()
    assert results.mean() == np.float64(x)
    print(f"{x:+.7g}: {low:+.7g} or {high:+.7g}, up {np.mean(results == high):.4%}; the mean is x exactly")

# %% [markdown]
# And the weight that would not move? 256 copies, each with random numbers of its own:

# %%
draws = np.random.default_rng(0).integers(0, 65536, (1000, 256), dtype=np.uint32)
rounded = updated(lambda w, n: stochastic(w, draws[n]), copies=256)
mean, spread = rounded[-1].mean(), rounded[-1].std()
print(f"mean {mean:.4f} (exact {exact[-1, 0]:.4f}), standard deviation of a copy {spread:.4f}")
# Between 0.5 and 1 the unit is 2^-8, and an update is q = 0.128 of it: variance q (1-q) units² a step (3).
q = 5e-4 * 2**8
predicted = math.sqrt(1000 * q * (1 - q)) / 2**8
print(f"predicted standard deviation {predicted:.4f}")
assert abs(mean - exact[-1, 0]) < 4 * predicted / 16 and abs(spread / predicted - 1) < 0.2

# %%
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(rounded[:, :12], color=COLORS["sky"], linewidth=0.7)
axes.plot(rounded.mean(axis=1), color=COLORS["blue"], label="stochastic: mean of 256 (thin: 12 of them)")
axes.plot(exact, "--", color=COLORS["black"], label="float32")
axes.plot(nearest, color=COLORS["red"], label="to nearest")
axes.set(xlabel="update", ylabel="weight", title="A bfloat16 weight and 1,000 small updates")
axes.legend()
plt.show()

# %% [markdown]
# ## 7 · The same in the package, bit for bit
#
# `AdamW` reads a stored bfloat16 weight as float32, updates it, and stores it so:

# %%
print(inspect.getsource(optim._round_to_bf16))

# %% [markdown]
# Its random bits come from no generator with a state: they are words of Philox *addressed* by (seed, stream, parameter,
# update, element). So a resumed run rounds as an uninterrupted one would have (notebook 14). With the same address we
# get the same bits, and so the same weights:

# %%
generator = np.random.default_rng(1)
stored = {"some.weight": generator.standard_normal(1000).astype(BF16)}
in_float32 = {"some.weight": stored["some.weight"].astype(F32)}
gradients = {"some.weight": generator.standard_normal(1000).astype(F32)}
AdamW(in_float32, lr=1e-3, seed=7).step(gradients)
AdamW(stored, lr=1e-3, seed=7).step(gradients)
words = rng.words(7, "rounding", "some.weight", step=1, count=250)  # 64 bits each: four integers of 16
by_hand = stochastic(in_float32["some.weight"], words.view("<u2"))
assert by_hand.tobytes() == stored["some.weight"].tobytes()
print("1,000 bfloat16 weights after an update: equal, bit for bit")

# %% [markdown]
# **Moments, too.** With `trainer.optimizer_dtype: bf16` the means $m$ and $v$ of notebook 11 are stored in 16 bits.
# Where gradients have become small, $v \leftarrow \beta_2 v$ should shrink by a thousandth a step. A thousandth is less
# than $2^{-9}$, so to nearest it never shrinks, and all later updates are divided by a memory that does not fade:

# %%
weights = {"some.weight": np.zeros(4096, F32)}
optimizer = AdamW(weights, lr=0.0, slot_dtype=BF16)
v = optimizer.slots["exp_avg_sq"]["some.weight"]
v[...] = np.linspace(1, 1.99, 4096)
before = v.astype(np.float64).mean()
frozen = v.copy()
for _ in range(693):  # 0.999^693 = 0.49994
    optimizer.step({"some.weight": np.zeros(4096, F32)})
    frozen = (frozen.astype(F32) * np.float32(0.999)).astype(BF16)
print(f"after 693 updates without gradient: to nearest {frozen.astype(np.float64).mean() / before:.4f} of v is left,")
print(f"stochastic {v.astype(np.float64).mean() / before:.3f}, exact {0.999**693:.3f}")
assert frozen.astype(np.float64).mean() == before

# %% [markdown]
# ## 8 · On a language model
#
# Train `tiny-llama` for 150 updates in float32. Then go on at a low learning rate from the same weights in three ways:
# float32; bfloat16, rounded stochastically; bfloat16, rounded to nearest (which the package does not offer: its
# rounding is replaced for the moment).

# %%
parallel.set_threads(2)


def go_on(dtype, lr, first, steps=150, weights=None):
    """Returns the model, and its held-out loss."""
    cfg = load_config("tiny-llama", [f"model.dtype={dtype}", "trainer.eval_fraction=0.1"])
    windows, model = open_data(cfg).windows, LanguageModel(cfg.model, seed=0)
    if weights is not None:
        model.load_state_dict(weights)
    optimizer = AdamW(model.state_dict(), lr, weight_decay=0.0)
    for n in range(first, first + steps):
        tokens, targets, _ = windows.batch(n * 8, 8)
        model.zero_grad()
        model.loss(tokens, targets).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step(gradients, gradient_scale=clip_factor(global_norm(gradients), 1.0))
    held_out = (windows.eval_batch(i, 8) for i in range(-(-windows.eval_windows // 8)))
    return model, mean_loss(model, held_out)


# %% tags=["varies"]
model, before = go_on("f32", 4e-3, first=0)
weights, losses = model.state_dict(), {}
by_chance = dict(optim._ROUND)
for name, dtype in (("float32", "f32"), ("stochastic", "bf16"), ("to nearest", "bf16")):
    if name == "to nearest":
        optim._ROUND.update({d: lambda p, random, d=d: p.astype(d) for d in by_chance})
    losses[name] = go_on(dtype, 2e-5, first=150, weights=weights)[1]
optim._ROUND.update(by_chance)
for name, loss in losses.items():
    print(f"{name:11} held-out loss {before:.4f} → {loss:.4f}, gained {before - loss:+.4f}")
gained = {name: before - loss for name, loss in losses.items()}
assert abs(gained["stochastic"] / gained["float32"] - 1) < 0.2 and gained["to nearest"] < 0.5 * gained["float32"]

# %% [markdown]
# The project measured it at more length (`shakespeare-char`, 2,000 updates at a learning rate falling from 1e-4;
# [the page](../docs/precision.md)):

# %%
recorded = json.loads(Path("../docs/precision.json").read_text(encoding="utf-8"))["runs"]
for run in recorded:
    if run["learning_rate"] == "1e-4":
        kind = f"weights {run['dtype']:5} moments {run['moments']:5} rounding {run['rounding']:11}"
        print(f"{kind} held-out loss {run['loss']:.4f}")

# %% [markdown]
# ## 9 · Float16: the other way to lose
#
# float16 has three bits more precision, but ends at 65,504 and below at $2^{-24} \approx 6 \cdot 10^{-8}$; what is less
# than half of that becomes 0. Are gradients so small? At the start a model of vocabulary $V$ gives every token the
# probability $1/V$, and the derivative of the mean loss over $n$ tokens by a logit is
# $(\mathrm{softmax} - \text{target})/n$:

# %%
V, n = 128_354, 2048
gradient = 1 / V / n
print(f"1/(V n) = {gradient:.1e}; as float16: {float(np.float16(gradient))}")
scaled = float(np.float16(gradient * 2**16))
print(f"multiplied by 2^16 first: {scaled:.4g}, and divided again: {scaled / 2**16:.1e}")

# %% [markdown]
# **Loss scaling** (Micikevicius et al. 2018): multiply the loss by $S$; by the chain rule all gradients are $S$ times
# as large; divide by $S$, in float32, before they are used. A power of two for $S$ changes no digit. Too small an $S$
# and gradients vanish, too large and they overflow. For illustration, 100,000 gradients of sizes that spread over many
# powers of ten:

# %%
gradients = np.exp(generator.normal(np.log(1e-7), 2.5, 100_000)) * generator.choice([-1, 1], 100_000)
exponents, lost, overflowed = np.arange(0, 41), [], []
with np.errstate(over="ignore"):
    for k in exponents:
        scaled = (gradients * 2.0**k).astype(F16).astype(np.float64)
        lost.append(np.mean(scaled == 0))
        overflowed.append(np.mean(np.isinf(scaled)))
figure, axes = plt.subplots(figsize=(7, 3))
axes.plot(exponents, lost, color=COLORS["blue"], label="became 0")
axes.plot(exponents, overflowed, color=COLORS["red"], label="became infinite")
axes.set(
    xlabel="log2 of the loss scale S", ylabel="share of the gradients", title="Between vanishing and overflow there is room"
)
axes.legend()
plt.show()

# %% [markdown]
# *Dynamic* loss scaling finds $S$ by itself: on overflow skip the update and halve $S$; after 2,000 good updates in a
# row double it. A single infinity is enough to skip, so $S$ sits just below the largest gradient. In the package
# float16 needs this on a CUDA device only, where products read 16-bit gradients
# ([`loss_scale.py`](../oxidizr_ref/loss_scale.py)); its state is part of the checkpoint. On the CPU everything is
# computed in float32, and nothing can vanish.
#
# ## Exercises
#
# Solutions follow each statement, hidden; they run and check themselves.

# %% [markdown]
# **Exercise 1 · Neighbors without a library.** Write `next_up(x)` for positive float32 `x` with nothing but `struct`
# (pack as float, unpack as integer), and explain why one line does it, even from one power of two to the next and from
# the largest number to infinity:
#
# ```python
# for x in (1.0, 1.9999998807907104, 3.14, 1e-45, 3.4028234663852886e38):
#     assert next_up(x) == float(np.nextafter(np.float32(x), np.float32(np.inf)))
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def next_up(x):
    return struct.unpack("<f", struct.pack("<I", struct.unpack("<I", struct.pack("<f", x))[0] + 1))[0]


# The exponent stands above the fraction: when the fraction overflows, its carry raises the exponent by one.
with np.errstate(over="ignore"):
    for x in (1.0, 1.9999998807907104, 3.14, 1e-45, 3.4028234663852886e38):
        assert next_up(x) == float(np.nextafter(np.float32(x), np.float32(np.inf)))

# %% [markdown]
# **Exercise 2 · Compensation.** Kahan (1965) keeps what a sum has just lost in a second number, and adds it with the
# next term. Write `kahan(terms)` with every intermediate result rounded to bfloat16, and let it add 4,096 ones:
#
# ```python
# assert float(kahan(np.ones(4096, BF16))) == 4096
# ```
#
# Optimizers can use the same idea instead of stochastic rounding (Zamirai et al. 2020). What does it cost?


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def kahan(terms):
    bf16 = BF16.type
    total, lost = bf16(0), bf16(0)
    for term in terms:
        wanted = bf16(term - lost)
        further = bf16(total + wanted)
        lost = bf16(bf16(further - total) - wanted)  # what was added, less what should have been
        total = further
    return total


assert float(kahan(np.ones(4096, BF16))) == 4096
# A second array as large as the weights, and three more operations.

# %% [markdown]
# **Exercise 3 · Stochastic rounding to float16.** Between $2^{-14}$ and 65,504, float16 keeps 10 of float32's 23
# fraction bits. Write `stochastic_f16(x, random)` with `random` from $0 \dots 2^{13}-1$ (add, mask, convert), and prove
# by trying all of them that it is unbiased:
#
# ```python
# for x in (math.pi, -0.02, 1.0, 6e4):
#     results = stochastic_f16(np.full(8192, x, F32), np.arange(8192, dtype=np.uint32))
#     assert results.dtype == F16 and results.astype(np.float64).mean() == np.float64(np.float32(x))
# ```
#
# Why not below $2^{-14}$?


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def stochastic_f16(x, random):
    return ((x.view(np.uint32) + random) & np.uint32(0xFFFFE000)).view(F32).astype(F16)


for x in (math.pi, -0.02, 1.0, 6e4):
    results = stochastic_f16(np.full(8192, x, F32), np.arange(8192, dtype=np.uint32))
    assert results.dtype == F16 and results.astype(np.float64).mean() == np.float64(np.float32(x))
# Below 2^-14 the spacing of float16 stays 2^-24 while float32's gets finer: more than 13 bits have to go.

# %% [markdown]
# **Exercise 4 · The best loss scale.** For the `gradients` above find the largest power of two with which none
# overflows, and show that all gradients that become normal float16 numbers ($\ge 2^{-14}$) come back with a relative
# error of at most $2^{-11}$:
#
# ```python
# assert np.isfinite(back).all() and np.isinf((gradients * 2 * S).astype(F16)).any()
# assert np.max(np.abs(back / gradients - 1)[np.abs(gradients * S) >= 2.0**-14]) <= 2.0**-11
# ```
#
# with `back` the gradients that went through float16, divided by `S`.

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
with np.errstate(over="ignore"):
    S = max(2.0**k for k in range(60) if np.isfinite((gradients * 2.0**k).astype(F16)).all())
    assert np.isinf((gradients * 2 * S).astype(F16)).any()
back = (gradients * S).astype(F16).astype(np.float64) / S
assert np.isfinite(back).all()
assert np.max(np.abs(back / gradients - 1)[np.abs(gradients * S) >= 2.0**-14]) <= 2.0**-11

# %% [markdown]
# ## Where to read on
#
# - Goldberg 1991, *What Every Computer Scientist Should Know About Floating-Point Arithmetic*. Higham, *Accuracy and
#   Stability of Numerical Algorithms* (2nd ed. 2002), chapters 2 and 4.
# - Croci, Fasi, Higham, Mary & Mikaitis 2022, *Stochastic rounding: implementation, error analysis and applications*.
#   Gupta et al. 2015, *Deep Learning with Limited Numerical Precision*.
# - Zamirai et al. 2020, *Revisiting BFloat16 Training*. Micikevicius et al. 2018, *Mixed Precision Training*, section
#   3.2.
# - In the project: [one model, four ways to store it](../docs/precision.md); [`optim.py`](../oxidizr_ref/optim.py),
#   [`rng.py`](../oxidizr_ref/rng.py), [`backend.py`](../oxidizr_ref/backend.py) (the one rule for dtypes).
# - Next: notebook 13, [a checkpoint, byte by byte](13_checkpoint_bytes.ipynb).
