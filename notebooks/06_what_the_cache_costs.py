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
# # 06 · What the cache costs: GQA and MLA
#
# After this you can
#
# - say why decoding needs a cache, and what it holds for each kind of attention, in bytes a token;
# - derive the *absorbed* form of multi-head latent attention, and say why rotary positions need a key of their own;
# - count how often each cached number is used, and predict from that which kind decodes faster on which machine;
# - check all of it against the caches that `LanguageModel.new_cache` really makes.
#
# **Needs** notebooks [04](04_attention_and_rope.ipynb) (attention, rotary positions) and
# [05](05_a_transformer_on_one_page.ipynb). **Time:** 35 minutes to read; it runs in about 15 seconds.

# %%
import inspect
import time

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import LanguageModel, Tensor, no_grad
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.attention import attention
from oxidizr_ref.layers.attention import LatentAttention

generator = np.random.default_rng(0)


def difference(a, b):
    """The largest difference, as a part of the largest number."""
    return np.abs(a - b).max() / np.abs(b).max()


# %% [markdown]
# ## 1 · Why a cache
#
# A text is written token by token. To write token $T+1$ the model needs the logits of position $T$ only; and in a layer
# of attention that is
#
# $$ y_T = \sum_{s \le T} p_{Ts}\, v_s, \qquad
# p_{T\cdot} = \mathrm{softmax}_s\!\left(\frac{q_T \cdot k_s}{\sqrt P}\right). $$
#
# It wants the query of the new token alone, but the keys and values of *all* tokens. Those of old tokens never change:
# causality means that position $s$ does not see what comes after it. So they are kept. Without them every token costs a
# forward pass over the whole text, $1 + 2 + \dots + T = T(T+1)/2$ positions for a text of $T$ tokens instead of $T$.
#
# By hand, for one head: $P$ is its width.

# %%
T, P = 12, 8
q, k, v = generator.standard_normal((3, T, P))  # [T,P] each


def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


scores = np.where(np.tril(np.ones((T, T), dtype=bool)), q @ k.T / np.sqrt(P), -np.inf)
at_once = softmax(scores) @ v  # [T,P], all positions

keys, values, one_by_one = [], [], []
for t in range(T):
    keys.append(k[t])  # the cache grows by one row a token
    values.append(v[t])
    one_by_one.append(softmax(q[t] @ np.array(keys).T / np.sqrt(P)) @ np.array(values))
assert difference(np.array(one_by_one), at_once) < 1e-14
print("token by token with a cache = all at once;", len(keys), "rows of", 2 * P, "numbers are kept")

# %% [markdown]
# ## 2 · Fewer heads of keys: GQA
#
# With $H$ heads of queries, ordinary multi-head attention (MHA) keeps $H$ keys and $H$ values of $P$ numbers a token and
# layer. Multi-query attention (MQA, Shazeer 2019) lets all heads share one key and one value; grouped-query attention
# (GQA, Ainslie et al. 2023) has $K$ of them, each for $H/K$ heads of queries:
#
# $$ \text{numbers a token and layer} = 2 K P, \qquad
# K = H \text{ (MHA)}, \quad 1 < K < H \text{ (GQA)}, \quad K = 1 \text{ (MQA)}. $$
#
# Nothing else changes. By hand, repeat each head of keys and values for its group:

# %% tags=["varies"]
B, T, H, K, P = 2, 10, 6, 2, 8
q = generator.standard_normal((B, T, H, P))
k, v = generator.standard_normal((2, B, T, K, P))


def grouped(q, k, v):
    k, v = (np.repeat(a, H // K, axis=2) for a in (k, v))  # [B,T,H,P]: head h reads key h // (H/K)
    scores = np.einsum("bthp,bshp->bhts", q, k) / np.sqrt(P)
    scores = np.where(np.tril(np.ones((T, T), dtype=bool)), scores, -np.inf)
    return np.einsum("bhts,bshp->bthp", softmax(scores), v)


ours, theirs = grouped(q, k, v), attention(Tensor(q), Tensor(k), Tensor(v), P**-0.5).data
print(f"difference from oxidizr_ref.fused.attention: {difference(ours, theirs):.0e}")
assert difference(ours, theirs) < 1e-14

# %% [markdown]
# ## 3 · One latent for all heads: MLA
#
# Fewer heads of keys say less. Multi-head latent attention (DeepSeek-V2, 2024) gives every head a key and a value of its
# own, but has them all read from one short vector a token, the **latent** $c_s$ of $L$ numbers:
#
# $$ c_s = W_{dkv}\, x_s, \qquad k_{h,s} = W_{uk,h}\, c_s, \qquad v_{h,s} = W_{uv,h}\, c_s, $$
#
# with $W_{dkv}\ [L,D]$ ("down") and $W_{uk,h}, W_{uv,h}\ [P,L]$ ("up") for each head $h$. Only $c_s$ need be kept: $L$
# numbers instead of $2HP$.
#
# But then each new token would have to form the keys and values of all heads and all old tokens again. It does not have
# to, because a product of matrices may be bracketed as we like. For the scores and the output of one head:
#
# $$
# \begin{aligned}
# q_h \cdot k_{h,s} &= q_h^\top (W_{uk,h}\, c_s) = (W_{uk,h}^\top q_h)^\top c_s = \tilde q_h \cdot c_s,
# & \tilde q_h &= W_{uk,h}^\top q_h \ \ [L] \\
# y_h = \sum_s p_{hs}\, v_{h,s} &= \sum_s p_{hs}\, W_{uv,h}\, c_s
# = W_{uv,h} \Big( \sum_s p_{hs}\, c_s \Big). &&
# \end{aligned}
# $$
#
# The up-projections are *absorbed*, one into the query, one into the output: they act on the new token alone, and the
# past is only ever read as $c_s$. What is left is multi-query attention, in which the one shared key, and the one shared
# value, is the latent.
#
# **Where the positions go.** Rotary positions turn queries and keys by an angle that depends on the place:
# $q_h \to R_t q_h$, $k \to R_s k$. Then $ (R_t q_h)^\top R_s W_{uk,h} c_s = q_h^\top R_{s-t} W_{uk,h}\, c_s $, and the
# matrix between $q_h$ and $c_s$ is another one for every distance: it cannot be folded into the query once. (Exercise 3
# shows it.) So MLA leaves these keys unrotated and adds a second, short part to each score that only carries positions: a
# rotated query $q^r_h$ for each head and *one* rotated key $k^r$ for all heads, of $R$ numbers,
#
# $$ \mathrm{score}_{h,ts} = \frac{q_{h,t} \cdot k_{h,s} + q^r_{h,t} \cdot k^r_s}{\sqrt{P + R}}, \qquad
# \text{cache: } c_s \text{ and } k^r_s \text{, } L + R \text{ numbers a token and layer.} $$
#
# By hand, both forms, for the last token of a sequence:

# %% tags=["varies"]
T, D, H, P, L, R = 10, 32, 4, 8, 12, 4
x = generator.standard_normal((T, D))
W_uq, W_uk, W_uv = generator.standard_normal((H, P, D)), *generator.standard_normal((2, H, P, L))
W_dkv = generator.standard_normal((L, D)) / np.sqrt(D)
q_r, k_r = generator.standard_normal((H, R)), generator.standard_normal((T, R))  # as if rotated already
q, c = W_uq @ x[-1] / np.sqrt(D), x @ W_dkv.T  # [H,P], [T,L]
scale = (P + R) ** -0.5

# expanded: form all keys and values
k, v = np.einsum("hpl,sl->hsp", W_uk, c), np.einsum("hpl,sl->hsp", W_uv, c)  # [H,T,P]
p = softmax((np.einsum("hp,hsp->hs", q, k) + q_r @ k_r.T) * scale)  # [H,T]
expanded = np.einsum("hs,hsp->hp", p, v)

# absorbed: the past is only read as c and k_r
q_tilde = np.einsum("hpl,hp->hl", W_uk, q)  # [H,L]
p = softmax((q_tilde @ c.T + q_r @ k_r.T) * scale)
absorbed = np.einsum("hpl,hl->hp", W_uv, p @ c)

print(f"expanded and absorbed differ by {difference(absorbed, expanded):.0e}")
assert difference(absorbed, expanded) < 1e-13

# %% [markdown]
# The package trains with the expanded form and decodes with the absorbed one. These lines are `LatentAttention.step`;
# compare them with the four lines above.

# %%
print(inspect.getsource(LatentAttention.step))

# %% [markdown]
# And the whole layer: `layer(x)` over a sequence against `layer.step` token by token, for all four kinds.

# %% tags=["varies"]
KINDS = {
    "MHA": {"kv_heads": 16},
    "GQA": {"kv_heads": 4},
    "MQA": {"kv_heads": 1},
    "MLA": {"kv_latent_dim": 64, "q_latent_dim": 0, "d_rope": 16},
}


def config_of(kind, layers=2, dtype="f64", tokens=64, hidden=256):
    sizes = {"hidden_size": hidden, "num_layers": layers, "num_heads": 16, "intermediate_size": 64}
    return ModelConfig(**{**sizes, **KINDS[kind], "vocab_size": 260, "max_seq_len": tokens, "dtype": dtype})


tokens = generator.integers(0, 260, (2, 40))
for kind in KINDS:
    model = LanguageModel(config_of(kind), seed=0)
    cache = model.new_cache(batch=2)
    steps = np.stack([model.step(tokens[:, t], cache).data for t in range(40)], axis=1)  # [2,40,V]
    error = difference(steps, model(tokens).data)
    print(f"{kind}: 40 steps against one forward pass, logits differ by {error:.0e}")
    assert error < 1e-12

# %% [markdown]
# ## 4 · Bytes, by formula and in the real caches
#
# $H = 16$ heads of width $P = 16$ here, in float64: 8 bytes a number.


# %%
def numbers_a_token(c):
    """Of one layer, by formula."""
    return c.kv_latent_dim + c.d_rope if c.uses_mla else 2 * c.kv_heads * c.head_dim


def bytes_a_token(model):
    """Of all layers, from the arrays that decoding really keeps for one sequence."""
    cache = model.new_cache(batch=1)
    return sum(array.nbytes for layer in cache for array in layer.arrays) // model.config.max_seq_len


for kind in KINDS:
    model = LanguageModel(config_of(kind), seed=0)
    formula = numbers_a_token(model.config) * model.config.num_layers * 8
    print(f"{kind}: formula {formula:5,} bytes a token, arrays {bytes_a_token(model):5,}")
    assert formula == bytes_a_token(model)

# %% [markdown]
# The same formulas for published models, 2 bytes a number (bfloat16). Shapes are from the papers: Llama 2 (Touvron et al.
# 2023), Llama 3 (Grattafiori et al. 2024, table 3), DeepSeek-V2 (2024, section 3.1.2). The last line is not a model: it
# is what DeepSeek-V2 would keep as plain MHA.

# %%
published = [  # name, layers, numbers a token and layer
    ("Llama 2 7B, MHA, 32 heads", 32, 2 * 32 * 128),
    ("Llama 3 8B, GQA, 8 of 32", 32, 2 * 8 * 128),
    ("Llama 3 405B, GQA, 8 of 128", 126, 2 * 8 * 128),
    ("DeepSeek-V2 236B, MLA", 60, 512 + 64),
    ("DeepSeek-V2 as MHA, 128 heads", 60, 2 * 128 * 128),
]
print(f"{'':32}{'KiB a token':>12}{'GiB at 32,768 tokens':>24}")
for name, layers, numbers in published:
    size = layers * numbers * 2
    print(f"{name:32}{size / 1024:12.1f}{size * 32768 / 2**30:24.1f}")

# %% [markdown]
# And by length. A state space layer (notebooks 08 to 10) keeps a state of fixed size whatever the length: it loses to no
# one in a long text, and below some length it keeps *more* than attention. Here for layers of the same hidden size, 1024,
# in bfloat16.

# %%
lengths = np.array([2**i for i in range(3, 17)])
wide = {"hidden_size": 1024, "num_layers": 1, "num_heads": 16, "vocab_size": 260, "max_seq_len": 8}
mamba = {"mamba_layers": [0], "mamba2_num_heads": 32, "mamba2_state_size": 128}
kinds = {
    "MHA, 16 heads": {"kv_heads": 16},
    "GQA, 4": {"kv_heads": 4},
    "MQA": {"kv_heads": 1},
    "MLA, 256 + 32": {"kv_latent_dim": 256, "d_rope": 32},
}
figure, axes = plt.subplots()
for name, keys in kinds.items():
    axes.plot(lengths, 2 * numbers_a_token(ModelConfig(**{**wide, **keys})) * lengths / 1024, label=name)
state = LanguageModel(ModelConfig(**{**wide, **mamba}), seed=0).new_cache(batch=1)[0]
fixed = 2 * (state.state.size + state.tail.size)
axes.axhline(fixed / 1024, linestyle="--", color=COLORS["black"], label="Mamba2, state 128")
axes.set(xlabel="tokens of context", ylabel="cache of a layer (KiB)", title="Attention's cache grows, a state does not")
axes.set_xscale("log", base=2)
axes.set_yscale("log", base=2)
for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter("{x:,.0f}")
axes.legend(fontsize=8)
plt.show()
for name, keys in kinds.items():
    crossing = fixed / (2 * numbers_a_token(ModelConfig(**{**wide, **keys})))
    print(f"{name:14} keeps less than Mamba2 below {crossing:5.0f} tokens")

# %% [markdown]
# ## 5 · What a byte is worth: arithmetic a number read
#
# For each new token every cached number is read once. Reading is slow, arithmetic is fast: a processor does tens of
# multiplications in the time that one number takes to arrive from memory. So it matters how often a number is used once
# it is here. For one token and layer with $S$ tokens in the cache, multiplications with cached numbers, and numbers read:
#
# | | multiplications | numbers read | uses of each number |
# |---|---|---|---|
# | MHA | $2 S H P$ | $2 S H P$ | 1 |
# | GQA | $2 S H P$ | $2 S K P$ | $H/K$ |
# | MQA | $2 S H P$ | $2 S P$ | $H$ |
# | MLA, absorbed | $S H (2L + R)$ | $S (L + R)$ | $H (2L+R)/(L+R)$, about $2H$ |
# | MLA, expanded each time | $2 S H P L + S H (2P + R)$ | $S (L + R)$ | |
#
# MLA's latent is key *and* value, for all heads. It does more arithmetic than MHA ($2L + R$ is larger than $2P$) and
# reads much less. Training is the other way round: there all positions are computed at once, arithmetic counts, and the
# expanded form is the cheaper one.

# %%
H, P, L, R = 128, 128, 512, 64  # DeepSeek-V2
forms = {"MHA": (2 * H * P, 2 * H * P), "MQA": (2 * H * P, 2 * P), "MLA, absorbed": (H * (2 * L + R), L + R)}
forms["MLA, expanded"] = 2 * H * P * L + H * (2 * P + R), L + R
print("of each token in the cache:")
for name, (products, read) in forms.items():
    print(f"{name:14} {products:12,} multiplications, {read:6,} numbers read, {products / read:10,.0f} a number")

# %% [markdown]
# How long that takes depends on the machine: at least the time of its multiplications, and at least the time of its
# reading, whichever is longer (the *roofline*, Williams et al. 2009). An H100 does $989\cdot10^{12}$ operations a second
# in bfloat16 and reads $3.35\cdot10^{12}$ bytes (its data sheet): some 300 operations in the time of one byte. For a
# layer of DeepSeek-V2 and one sequence of 32,768 tokens:

# %%
OPERATIONS, BYTES, S = 989e12, 3.35e12, 32768
for name, (products, read) in forms.items():
    arithmetic, reading = 2 * products * S / OPERATIONS, 2 * read * S / BYTES  # a product and a sum; 2 bytes a number
    print(f"{name:14} arithmetic {1e6 * arithmetic:8.1f} us, reading {1e6 * reading:8.1f} us", end="")
    print(f" -> at least {1e6 * max(arithmetic, reading):8.1f} us")

# %% [markdown]
# MHA waits for memory nearly all the time. Absorbed MLA keeps both sides of such a machine busy about equally; that it
# reads sixty times less than MHA is why it was invented. MQA would be the fastest, and says the least.
#
# ## 6 · Measured
#
# One layer each, hidden size 1024, 16 heads of 64, float32: milliseconds for one step of the attention layer (the fastest
# of 15), by the number of tokens in the cache. For MLA $L = 256$, $R = 32$: it reads a seventh of what MHA reads, and
# multiplies four times as much. What will a CPU say, which does some ten operations in the time of a byte?


# %%
def layer_of(kind, tokens):
    keys = {"MLA": {"kv_latent_dim": 256, "d_rope": 32}}.get(kind, KINDS[kind])
    model = LanguageModel(ModelConfig(**{**wide, **keys, "max_seq_len": tokens, "intermediate_size": 8}), seed=0)
    return model.layers[0].self_attn


def milliseconds(kind, tokens, tries=15):
    layer, x = layer_of(kind, tokens), Tensor(generator.standard_normal((1, 1, 1024)).astype(np.float32))
    cache, taken = layer.new_cache(batch=1), []
    for array in cache.arrays:
        array[...] = generator.standard_normal(array.shape)  # whatever was said before
    with no_grad():
        for _ in range(tries):
            cache.length = tokens - 1
            began = time.perf_counter()
            layer.step(x, cache)
            taken.append(time.perf_counter() - began)
    return 1e3 * min(taken)


# %% tags=["varies"]
lengths = [512, 1024, 2048, 4096, 8192]
measured = {kind: [milliseconds(kind, tokens) for tokens in lengths] for kind in KINDS}
print("tokens " + "".join(f"{tokens:8}" for tokens in lengths))
for kind, taken in measured.items():
    print(f"{kind:7}" + "".join(f"{value:8.2f}" for value in taken) + "  ms a token")

# %%
figure, axes = plt.subplots()
for kind, taken in measured.items():
    axes.plot(lengths, taken, marker="o", markersize=4, label=kind)
axes.set(xlabel="tokens in the cache", ylabel="one step of attention (ms)", title="Fewer heads of keys decode faster")
axes.legend()
plt.show()

# %% [markdown]
# The first three do the same arithmetic and differ in what they read, and in that order they come. MLA on a CPU is about
# as slow as MHA although it reads so much less: each number is used thirty times, and there arithmetic is what takes the
# time. On a machine that is thirty times better at arithmetic than at reading, it is the other way round. What MLA saves
# everywhere is *room*: seven times as many sequences fit into the same memory.

# %% [markdown]
# ## Exercises
#
# **1 · As small as MLA.** Heads have $P = 128$. With $L = 512$ and $R = 64$, MLA keeps $L + R$ numbers. How many heads of
# keys $K$ would GQA have to make do with to keep no more? Write `heads_for(P, L, R)`, the largest such $K$ (a fraction is
# fine), with `assert heads_for(128, 512, 64) == 2.25`: DeepSeek-V2's cache is that of GQA with 2.25 heads.


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def heads_for(P, L, R):
    return (L + R) / (2 * P)  # 2 K P = L + R


assert heads_for(128, 512, 64) == 2.25

# %% [markdown]
# **2 · One step further.** $W_{uv,h}$ is followed by the output projection $W_{o,h}\ [D,P]$ of its head. Their product
# could be formed once: $M_h = W_{o,h} W_{uv,h}\ [D,L]$. Show with the arrays of section 3 and a random `W_o` of shape
# `[H,D,P]` that the output is the same: `assert difference(merged, separate) < 1e-12`. Then say why nobody does it: how
# many numbers has $M$, and how many have $W_o$ and $W_{uv}$ together, for DeepSeek-V2 with $D = 5120$?

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
W_o = generator.standard_normal((W_uv.shape[0], D, W_uv.shape[1]))  # [H,D,P]
attended = p @ c  # [H,L]
separate = np.einsum("hdp,hp->d", W_o, np.einsum("hpl,hl->hp", W_uv, attended))
M = np.einsum("hdp,hpl->hdl", W_o, W_uv)
merged = np.einsum("hdl,hl->d", M, attended)
assert difference(merged, separate) < 1e-12
H, P, L, width = 128, 128, 512, 5120
print(f"M: {H * width * L:,} numbers; W_o and W_uv: {H * width * P + H * P * L:,}")
assert H * width * L > 3 * (H * width * P + H * P * L)  # each of them is read for every token

# %% [markdown]
# **3 · Why the positions go elsewhere.** Let $R(\varphi)$ turn the pairs $(i, i + P/2)$ of a head by
# $\varphi\,\theta^{-2i/P}$, as rotary positions do. With a rotated key, the absorbed query for a token $d$ places back is
# $\tilde q = W_{uk}^\top R(d)\, q$ up to the sign of $d$. Compute it for $d = 0 \dots 63$ for one head of $P = 8$ and
# random $W_{uk}\ [8, 12]$, and show that the 64 queries span a space of 8 dimensions:
# `assert np.linalg.matrix_rank(queries) == 8`. A cache of latents would need up to $P$ absorbed queries for a head
# instead of one.

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
W, q_one = generator.standard_normal((8, 12)), generator.standard_normal(8)


def turned(v, place, theta=10000.0):
    angle = np.tile(place * theta ** (-np.arange(0, 8, 2) / 8), 2)
    return v * np.cos(angle) + np.concatenate([-v[4:], v[:4]]) * np.sin(angle)


queries = np.array([W.T @ turned(q_one, d) for d in range(64)])  # [64,12]
assert np.linalg.matrix_rank(queries) == 8
assert np.linalg.matrix_rank(queries[:1]) == 1
print("64 distances need", np.linalg.matrix_rank(queries), "absorbed queries")

# %% [markdown]
# **4 · A window.** The package keeps the last `max_seq_len` tokens and overwrites the oldest. Take a model of *one* layer
# of GQA with `max_seq_len=16` in float64, let it step through 40 tokens, and show that its last logits are those of a
# forward pass over the last 16 tokens alone: `assert difference(...) < 1e-12`. (Two things make it so: keys carry rotary
# positions, and there only distances count.) Why is it not true with two layers?

# %% tags=["solution", "hide-cell", "varies"] jupyter={"source_hidden": true}
errors = {}
for layers in (1, 2):
    model = LanguageModel(config_of("GQA", layers, tokens=16), seed=0)
    cache = model.new_cache(batch=2)
    for t in range(40):
        logits = model.step(tokens[:, t], cache).data
    errors[layers] = difference(logits, model(tokens[:, -16:]).data[:, -1])
print(f"difference with one layer {errors[1]:.0e}, with two {errors[2]:.0e}")
assert errors[1] < 1e-12 < errors[2]
# With two layers the keys of the second are made from what the first one saw, and that was more than the last 16 tokens.

# %% [markdown]
# ## Where to read on
#
# - Shazeer 2019, *Fast Transformer Decoding: One Write-Head is All You Need*: MQA, and the count of section 5.
# - Ainslie et al. 2023, *GQA*. DeepSeek-AI 2024, *DeepSeek-V2*, section 2.1: MLA; 2.1.3: the rotated key; appendix D:
#   comparisons.
# - Pope et al. 2022, *Efficiently Scaling Transformer Inference*: where the time goes when decoding.
# - In the project: [`layers/attention.py`](../oxidizr_ref/layers/attention.py); [training form and decoding
#   form](../docs/architectures.md).
# - Next: notebook 07, [mixtures of experts](07_mixture_of_experts.ipynb).
