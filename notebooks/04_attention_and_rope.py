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
# # 04 · Attention and RoPE
#
# Attention is the one place in a transformer where tokens see each other. Rotary positions (RoPE) are how it knows who
# stands where. Both fit into a few lines; then we train a small model and look at what its heads have learned to look at.
#
# After this you can
#
# - write causal softmax attention and its backward pass from scratch, and say why scores are divided by $\sqrt P$;
# - derive RoPE as a rotation, and show that scores then depend on distances alone;
# - say what grouped-query attention (GQA) shares, and rebuild the package's layer from its weights;
# - read attention maps, and recognize the two heads that together copy ("induction").
#
# **Needs**: matrix products, softmax (notebook 2), vector–Jacobian products (notebook 1). **Time**: an hour.

# %%
import inspect

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import AdamW, LanguageModel, Tensor, load_config, no_grad, reference
from oxidizr_ref.fused.attention import attention, attention_ref
from oxidizr_ref.fused.rope import rope
from oxidizr_ref.layers.attention import GroupedQueryAttention
from oxidizr_ref.watch import Watcher, watched

random = np.random.default_rng(4)

# %% [markdown]
# ## 1. A soft dictionary
#
# A Python dictionary compares a *query* with its *keys* and returns the *value* of the one that is equal. Attention is a
# dictionary one can differentiate. The comparison is a dot product, a **score** $s_i = q \cdot k_i$; instead of picking the
# largest score, the softmax gives every key a weight, and the answer is the weighted mean of the values:
#
# $$p_i = \frac{e^{s_i}}{\sum_j e^{s_j}}, \qquad y = \sum_i p_i v_i$$


# %%
def softmax(z):
    """Over the last axis."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


keys = np.eye(3)  # [keys, P]: three keys at right angles
values = np.array([10.0, 20.0, 30.0])
for sharpness in (0, 1, 3, 10):
    p = softmax(keys @ (sharpness * keys[2]))  # ask for the third one
    print(f"query of length {sharpness:2}: weights {np.round(p, 3)}, answer {p @ values:.2f}")

# %% [markdown]
# A query of length 0 gets the mean of everything; a long one gets what a dictionary would give. In between the answer
# changes smoothly, which is what learning by gradients needs.
#
# ## 2. A sequence asks itself, and only its past
#
# In self-attention each of the $T$ tokens has a query, a key and a value, each a linear function of the token's vector. All
# scores at once are a matrix $S = QK^\top$, `[T, T]`: row $t$ holds what token $t$ asks. A language model predicts the next
# token, so token $t$ may not see later ones: their scores become $-\infty$ and get the weight $e^{-\infty} = 0$.


# %%
def one_head(q, k, v, scale):
    """q, k: ``[T, P]``, v: ``[T, V]``. Returns ``[T, V]`` and the weights ``[T, T]``."""
    scores = q @ k.T * scale  # [T, T]
    future = np.triu(np.ones(scores.shape, dtype=bool), 1)  # key s > query t
    probs = softmax(np.where(future, -np.inf, scores))
    return probs @ v, probs


T, P = 6, 4
q, k, v = random.normal(size=(3, T, P))
y, probs = one_head(q, k, v, P**-0.5)
print(np.round(probs, 2))
assert np.allclose(probs.sum(axis=1), 1)

# %% [markdown]
# The test of a causal mask is an experiment: change one token, and nothing before it may change.

# %%
moved = k.copy(), v.copy()
for array in moved:
    array[3] += 5.0
y2, _ = one_head(q, *moved, P**-0.5)
print("outputs that changed:", [t for t in range(T) if not np.array_equal(y[t], y2[t])])
assert np.array_equal(y[:3], y2[:3])

# %% [markdown]
# ## 3. Why divide by $\sqrt P$
#
# Let the entries of $q$ and $k$ be independent with mean 0 and variance 1. Each product $q_i k_i$ then has mean 0 and
# variance 1, and the score is a sum of $P$ of them: its variance is $P$, its standard deviation $\sqrt P$. With $P = 64$
# typical scores differ by 8 and more, and the softmax is nearly a hard maximum. What is wrong with that? Its derivative,
# $\frac{\partial p_i}{\partial s_j} = p_i(\delta_{ij} - p_j)$, vanishes when one weight is 1 and the others 0: nothing can
# be learned through it. Below, 64 keys, random queries, with the division and without.

# %%
widths = [4, 16, 64, 256, 1024]
size, slope = {}, {}
for name, power in (("$q \\cdot k$", 0.0), ("$q \\cdot k / \\sqrt{P}$", -0.5)):
    size[name], slope[name] = [], []
    for width in widths:
        queries, keys = random.normal(size=(150, width)), random.normal(size=(150, 64, width))
        scores = np.einsum("np,nkp->nk", queries, keys) * width**power  # [150, 64]
        p = softmax(scores)
        jacobian = p[:, :, None] * (np.eye(64) - p[:, None, :])
        size[name].append(scores.std())
        slope[name].append(np.sqrt((jacobian**2).sum(axis=(1, 2))).mean())

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
for name, marker in zip(size, "os", strict=True):
    left.loglog(widths, size[name], marker + "-", label=name)
    right.semilogx(widths, slope[name], marker + "-", label=name)
left.loglog(widths, np.sqrt(widths), ":", color=COLORS["black"], label="$\\sqrt{P}$")
left.set(xlabel="head width $P$", ylabel="standard deviation of a score", title="Scores grow with $\\sqrt{P}$ …")
right.set(xlabel="head width $P$", ylabel="mean size of $\\partial p/\\partial s$", title="… and so slopes depend on $P$")
left.legend()
right.set_ylim(bottom=0)
right.legend()
plt.show()

# %% [markdown]
# Without the division the slopes depend on the width of a head: largest where attention is neither even (an even
# distribution has small slopes, too) nor hard, and falling ever further for wide heads. Divided, nothing depends on $P$ any
# more: how sharp attention is, is decided by training, not by a choice of the architecture.
#
# ## 4. Heads, and heads that share
#
# One set of weights can look at one kind of thing. So the model's width is cut into $H$ **heads**, each with queries, keys
# and values of its own, $P$ wide, and each with its own weights. In **grouped-query attention** (Ainslie et al. 2023) there
# are $H$ query heads but only $K$ heads of keys and values, each serving $G = H/K$ query heads. While text is generated,
# the keys and values of the whole past must be kept, so this divides that memory by $G$ (notebook 6).


# %%
def attention_by_hand(q, k, v, scale):
    """q: ``[B,T,H,P]``, k: ``[B,T,K,P]``, v: ``[B,T,K,V]``. Returns ``[B,T,H,V]`` and the weights ``[B,H,T,T]``."""
    G = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)  # query heads 0 … G-1 share head 0, and so on
    scores = np.einsum("bthp,bshp->bhts", q, k) * scale
    future = np.triu(np.ones(scores.shape[-2:], dtype=bool), 1)
    probs = softmax(np.where(future, -np.inf, scores))
    return np.einsum("bhts,bshv->bthv", probs, v), probs


B, T, H, K, P = 2, 10, 4, 2, 8
q, k, v = (random.normal(size=(B, T, heads, P)) for heads in (H, K, K))
y, probs = attention_by_hand(q, k, v, P**-0.5)

# %% [markdown]
# In the package this is `fused.attention.attention`, with the plain composition beside it:

# %% tags=["varies"]
print(inspect.getsource(attention_ref))
for name, operation in (("reference", attention_ref), ("fused", attention)):
    error = abs(operation(Tensor(q), Tensor(k), Tensor(v), P**-0.5).data - y).max()
    print(f"{name} against this page: {error:.0e}")
    assert error < 1e-14

# %% [markdown]
# ### Backward by hand
#
# With $\bar y$ given, and the rule of notebook 1 for products. From $Y = PV$: $\bar P = \bar Y V^\top$ and
# $\bar V = P^\top \bar Y$. Through the softmax, row by row, with its derivative from above:
#
# $$\bar s_j = \sum_i \bar p_i\, p_i (\delta_{ij} - p_j) = p_j \Big(\bar p_j - \sum_i p_i \bar p_i\Big)$$
#
# And from $S = \text{scale}\cdot QK^\top$: $\bar Q = \text{scale}\cdot \bar S K$, $\bar K = \text{scale}\cdot \bar S^\top
# Q$. Masked places have $p = 0$, so their gradient is 0 without further ado. A head of keys that serves several query heads
# was *repeated*, so its gradient is *summed* over them.


# %%
def attention_backward(dy, q, k, v, probs, scale):
    """Returns dq ``[B,T,H,P]``, dk ``[B,T,K,P]``, dv ``[B,T,K,V]``."""
    K = k.shape[2]
    G = q.shape[2] // K
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    dv = np.einsum("bhts,bthv->bshv", probs, dy)
    dprobs = np.einsum("bthv,bshv->bhts", dy, v)
    dscores = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True)) * scale
    dq = np.einsum("bhts,bshp->bthp", dscores, k)
    dk = np.einsum("bhts,bthp->bshp", dscores, q)
    return dq, *(d.reshape(*d.shape[:2], K, G, -1).sum(axis=3) for d in (dk, dv))


dy = random.normal(size=y.shape)
by_hand = attention_backward(dy, q, k, v, probs, P**-0.5)
leaves = [Tensor(array, requires_grad=True) for array in (q, k, v)]
attention(*leaves, P**-0.5).backward(dy)
for mine, leaf in zip(by_hand, leaves, strict=True):
    assert abs(mine - leaf.grad).max() < 1e-13
print("dq, dk and dv: this page and the fused backward pass agree to 1e-13")

# %% [markdown]
# The fused version never keeps the `[T, T]` weights, which for long texts would be its largest array by far. It goes through
# the queries block by block, keeps one number a row (the logarithm of the softmax's denominator), and computes the weights
# again on the way back (Dao et al. 2022). One line of it uses an identity worth checking:
# $\sum_s p_s \bar p_s = \sum_c y_c \bar y_c$, so the long sum over keys is a short one over channels.

# %%
_, k4, v4 = q, np.repeat(k, H // K, axis=2), np.repeat(v, H // K, axis=2)
dprobs = np.einsum("bthv,bshv->bhts", dy, v4)
over_keys = (probs * dprobs).sum(axis=-1)  # [B,H,T]
over_channels = (y * dy).sum(axis=-1).swapaxes(1, 2)  # [B,H,T]
print(f"{T} keys or {P} channels: {'the same sums' if np.allclose(over_keys, over_channels, rtol=1e-12) else 'different'}")
assert np.allclose(over_keys, over_channels, rtol=1e-12)

# %% [markdown]
# ## 5. Attention does not know the order
#
# Shuffle the past of the last token, keys together with their values: its output stays as it was. A sum has no order.

# %%
shuffled = np.append(random.permutation(T - 1), T - 1)
last, _ = attention_by_hand(q, k[:, shuffled], v[:, shuffled], P**-0.5)
difference = abs(last[:, -1] - y[:, -1]).max()
print(f"past in the order {shuffled[:-1].tolist()}: the last output changes by less than 1e-14: {difference < 1e-14}")
assert difference < 1e-14

# %% [markdown]
# For attention alone, *dog bites man* and *man bites dog* are the same. So queries and keys must say where they stand.
#
# ## 6. RoPE: turn by the position
#
# What we want: a score that depends on *how far apart* two tokens are, not on where they are. Take $P = 2$ and turn the
# query at position $t$ by the angle $t\omega$ and the key at position $s$ by $s\omega$. A rotation $R(\alpha)$ is
# orthogonal, $R(\alpha)^\top R(\beta) = R(\beta - \alpha)$, so
#
# $$\big(R(t\omega)\,q\big) \cdot \big(R(s\omega)\,k\big) = q^\top R\big((s-t)\,\omega\big)\, k .$$
#
# Only the difference $s - t$ is left. That is all of it. For larger $P$, channels are taken in pairs, and pair $i$ turns at
# a speed of its own, $\omega_i = \theta^{-2i/P}$ for $i = 0, 1, \dots$ (Su et al. 2021, section 3.4; $\theta = 10000$). In
# the layout that Llama and this package use, channel $i$ of the first half is paired with channel $i$ of the second half.


# %%
def rope_by_hand(x, theta, start=0):
    """x: ``[B, T, heads, P]``, at positions start, start+1, …: the same shape."""
    half = x.shape[-1] // 2
    omega = theta ** (-np.arange(half) / half)  # [P/2]: θ^(-2i/P)
    angles = (start + np.arange(x.shape[1]))[:, None, None] * omega  # [T, 1, P/2]
    cos, sin = np.cos(angles), np.sin(angles)
    x1, x2 = x[..., :half], x[..., half:]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


x = random.normal(size=(2, 7, 3, 16))
for start in (0, 5):
    assert np.allclose(rope_by_hand(x, 1e4, start), rope(Tensor(x), 1e4, start).data, rtol=0, atol=1e-14)
print(
    "this page and fused.rope agree to 1e-14; lengths are kept:",
    np.allclose((rope_by_hand(x, 1e4) ** 2).sum(), (x**2).sum()),
)

# %% [markdown]
# Now the claim. Put the *same* query and the *same* key at all of 48 positions: without RoPE all scores would be equal;
# with it they may depend on $t - s$ only, so the matrix must be constant along its diagonals.

# %%
length, width = 48, 32
same_q, same_k = (np.tile(random.normal(size=width), (1, length, 1, 1)) for _ in range(2))
scores = np.einsum("bthp,bshp->ts", rope_by_hand(same_q, 1e4), rope_by_hand(same_k, 1e4))
later = np.einsum("bthp,bshp->ts", rope_by_hand(same_q, 1e4, 1000), rope_by_hand(same_k, 1e4, 1000))
for distance in range(-length + 1, length):
    assert np.ptp(np.diagonal(scores, distance)) < 1e-11
assert abs(scores - later).max() < 1e-10

distances = np.arange(0, 300)
omega = 1e4 ** (-np.arange(32) / 32)  # P = 64
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
image = left.imshow(scores)
left.grid(False)
left.set(xlabel="position of the key", ylabel="position of the query", title="Scores: distance is all")
figure.colorbar(image, ax=left, shrink=0.8, label="score")
middle.plot(distances, np.cos(np.outer(distances, omega)).mean(axis=1))
middle.set(
    xlabel="distance $t-s$ (tokens)", ylabel="score, as a part of its largest", title="Equal $q$ and $k$: near ones first"
)
for theta, marker in ((1e4, "o"), (5e5, "s")):
    pairs = np.arange(32)
    right.semilogy(pairs, 2 * np.pi * theta ** (pairs / 32), marker, markersize=4, label=f"θ = {theta:,.0f}")
right.set(xlabel="pair $i$ of $P = 64$", ylabel="tokens for a full turn", title="From a clock's seconds to its years")
right.legend()
plt.show()

# %% [markdown]
# Read the three pictures. *Left*: the claim, and moving everything by 1,000 positions changes nothing either (asserted
# above). *Middle*: if a query equals a key in all channels, the score is largest at distance 0 and falls off, with ripples:
# the fast pairs agree only nearby. *Right*: the fast pairs tell neighbors apart, the slow ones have hardly moved over
# thousands of tokens, and carry *what* rather than *where*. Models for longer texts use a larger θ, as Llama 3 does
# (500,000).
#
# ### Angles need their digits
#
# At position 100,000 the fast pairs have turned by tens of thousands of radians. A float32 number of that size has steps of
# 0.004 to 0.008, so an angle computed in float32 is wrong by thousandths, and the promise *distance is all* breaks. The
# package computes its tables of cosines in float64, and rounds only those:

# %%
far = 100_000
angle32 = (np.float32(far) + np.arange(64, dtype=np.float32)) * np.float32(0.1) ** np.float32(0.25)  # a pair of P = 32
angle64 = (far + np.arange(64)) * 0.1**0.25
print(f"steps of float32 near {far:,}: {np.spacing(np.float32(far)):.4f}")
print(f"largest error of the cosine, float32 angles: {abs(np.cos(angle32.astype(float)) - np.cos(angle64)).max():.3f}")
ones = Tensor(np.tile(np.float32([1.0, 0.0]), (1, 64, 1, 1)))  # P = 2: cos(t), sin(t)
table_error = abs(rope(ones, 1e4, far).data[0, :, 0, 0] - np.cos(far + np.arange(64))).max()
print(f"largest error of the cosine, this package: {table_error:.0e}")
assert table_error < 1e-7

# %% [markdown]
# ## 7. The layer
#
# Everything together is Llama's attention layer, and the package's. We take the weights of an untrained one and rebuild it:

# %%
config = load_config("tiny-llama", ["model.dtype=f64"]).model
layer = LanguageModel(config, seed=0).layers[0].self_attn
assert isinstance(layer, GroupedQueryAttention)
B, T, D, H, K, P = 2, 12, config.hidden_size, config.num_heads, config.kv_heads, config.head_dim
x = random.normal(size=(B, T, D))
W = {name: getattr(layer, name).weight.data for name in ("q_proj", "k_proj", "v_proj", "o_proj")}  # [out, in] each

q = rope_by_hand((x @ W["q_proj"].T).reshape(B, T, H, P), config.rope_theta)
k = rope_by_hand((x @ W["k_proj"].T).reshape(B, T, K, P), config.rope_theta)
v = (x @ W["v_proj"].T).reshape(B, T, K, P)  # values are not turned: they say what, not where
y, _ = attention_by_hand(q, k, v, P**-0.5)
out = y.reshape(B, T, H * P) @ W["o_proj"].T

print({name: list(weight.shape) for name, weight in W.items()})
assert abs(out - layer(Tensor(x)).data).max() < 1e-14
print("rebuilt from its weights, the layer agrees to 1e-14")

# %% [markdown]
# ## 8. What do heads look at?
#
# Give a model a task that only attention can solve. A text is a random word of 4 to 16 letters (of 32), repeated until it
# has 32 letters. Once a letter comes back, everything is known: *find where this letter stood before, and say what followed
# it there.* No statistics of letters help, and no fixed distance does either, since each text has another period.

# %%
LETTERS, LENGTH = 32, 32


def texts(count, generator, periods=(4, 16)):
    """Tokens and targets, int64 ``[count, LENGTH]``, and each text's period, ``[count]``."""
    period = generator.integers(periods[0], periods[1] + 1, count)
    word = generator.integers(0, LETTERS, (count, 16))
    place = np.arange(LENGTH + 1) % period[:, None]
    text = np.take_along_axis(word, place, axis=1)
    return text[:, :-1], text[:, 1:], period


def known(period):
    """Where the next letter follows from what was seen: bool ``[count, LENGTH]``."""
    return np.arange(LENGTH) >= period[:, None]


sizes = ["hidden_size=64", "intermediate_size=64", f"vocab_size={LETTERS}", f"max_seq_len={LENGTH}"]
copier_config = load_config("tiny-llama", sizes).model  # two layers, 4 heads of queries, 2 of keys and values
print(texts(1, np.random.default_rng(0), (6, 6))[0][0])


# %%
def train(periods, steps):
    """A model trained on such texts, and its loss after each step (nats a letter, of those that can be known)."""
    model, generator, losses = LanguageModel(copier_config, seed=0), np.random.default_rng(1), []
    for name, p in model.named_parameters():  # larger first weights than usual, see below
        p.data *= 20 if "embed" in name else 5 if "self_attn" in name else 1
    optimizer = AdamW(model.state_dict(), lr=3e-3)
    for _ in range(steps):
        tokens, targets, period = texts(32, generator, periods)
        loss = model.loss(tokens, np.where(known(period), targets, -100))  # -100: not a target
        loss.backward()
        optimizer.step({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
        losses.append(loss.item())
    return model, losses


def accuracy(model, periods):
    """How often the likeliest letter is the right one, where it can be known, on new texts."""
    tokens, targets, period = texts(200, np.random.default_rng(2), periods)
    with no_grad():
        right = model(tokens).data.argmax(axis=-1) == targets
    return right[known(period)].mean()


copier, losses = train((4, 16), 300)

# %% tags=["varies"]
plt.plot(losses)
plt.axhline(np.log(LETTERS), linestyle="--", linewidth=1, color=COLORS["black"])
plt.text(300, np.log(LETTERS) + 0.06, "guessing, ln 32", ha="right", fontsize=9)
plt.xlabel("optimizer step")
plt.ylabel("loss (nats a letter)")
plt.title("A plateau, then it finds out how to copy")
plt.show()
print(f"accuracy on new texts: {accuracy(copier, (4, 16)):.0%}; by guessing {1 / LETTERS:.0%}")
assert accuracy(copier, (4, 16)) > 0.8

# %% [markdown]
# To see the weights of attention, we watch the model while it computes. The package's reference names every quantity of the
# literature, and `probs` is one of them:


# %%
class Look(Watcher):
    """Keeps the attention weights of each layer, ``[B,H,T,T]``."""

    def __init__(self):
        self.maps = []

    def named(self, name, x, *_):
        if name == "probs":
            self.maps.append(x.data)
        return x


def attention_maps(model, tokens):
    look = Look()
    with no_grad(), reference(), watched(look):
        model(tokens)
    return look.maps


# %% [markdown]
# First a look *before* training, which explains the line "larger first weights than usual". The usual standard deviation of
# 0.02 is meant for wider models. At width 64 it makes all scores nearly 0, so every head spreads its weights evenly and all
# heads begin alike; the plateau is then longer than we want to wait here.

# %%
tokens, _, _ = texts(100, np.random.default_rng(5))
for name, model in (("usual", LanguageModel(copier_config, seed=0)), ("larger", train((4, 16), 0)[0])):
    largest = attention_maps(model, tokens)[0][:, :, -1].max(axis=-1).mean()  # of the last letter's weights, layer 0
    print(f"{name:6} first weights: the largest of 32 attention weights is {largest:.3f} (evenly spread: {1 / 32:.3f})")

# %% [markdown]
# And now the trained model, on one text.

# %%
PERIOD = 9
tokens, targets, _ = texts(1, np.random.default_rng(5), (PERIOD, PERIOD))
maps = attention_maps(copier, tokens)

# %%
figure, grid = plt.subplots(2, 4, figsize=(11, 5.6), sharex=True, sharey=True)
for layer, row in enumerate(grid):
    for head, axes in enumerate(row):
        axes.imshow(maps[layer][0, head], vmin=0, vmax=1)
        axes.grid(False)
        axes.set_title(f"layer {layer}, head {head} (keys {head // 2})", fontsize=10)
for axes in grid[1]:
    axes.set_xlabel("looked at (position)")
for row in grid:
    row[0].set_ylabel("looking (position)")
figure.suptitle(f"Attention weights (yellow: 1, blue: 0) on a text of period {PERIOD}", x=0.01, ha="left", fontsize=11)
plt.show()

# %% [markdown]
# The whole algorithm is in these pictures, and it takes two layers:
#
# - **Layer 0** has a head that looks one position back (the line just below the diagonal). It writes into each token *which
#   letter stood before me*.
# - **Layer 1** looks at the tokens whose note *equals my own letter*: those right after an earlier occurrence of it, 8, 17,
#   26 positions back (period 9, minus 1, and multiples). What stands there is the answer.
#
# Olsson et al. (2022) found such pairs in all transformers of two or more layers that they examined, and called the second
# head an **induction head**. Measured over 200 texts of all periods:

# %% tags=["varies"]
tokens, targets, period = texts(200, np.random.default_rng(2), (4, 16))
t, s = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
one_back = s == t - 1  # [T, T]
after_same = (s <= t) & ((t - s + 1) % period[:, None, None] == 0)  # [200, T, T]
print("weight on …       one back   right after the same letter")
for layer, probs in enumerate(attention_maps(copier, tokens)):
    for head in range(4):
        back = (probs[:, head] * one_back).sum(axis=-1)[known(period)].mean()
        after = (probs[:, head] * after_same).sum(axis=-1)[known(period)].mean()
        print(f"layer {layer}, head {head}:  {back:8.0%}      {after:5.0%}")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1: what softmax cannot see
# Add the same vector $c$ to all keys. Say what happens to the scores of one query, and to the output. Then write
# `output_change(use_rope)`, which returns the largest change of the output of `attention_by_hand` when $c$ (all ones) is
# added to the keys before RoPE, with and without RoPE. It must satisfy
#
# ```python
# assert output_change(use_rope=False) < 1e-12
# assert output_change(use_rope=True) > 1e-3
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def output_change(use_rope):
    """Without RoPE every score of a query grows by the same q·c: the softmax does not see it. Turned, c differs by place."""
    generator = np.random.default_rng(6)
    q, k, v = (generator.normal(size=(1, 10, 2, 8)) for _ in range(3))
    turn = (lambda x: rope_by_hand(x, 1e4)) if use_rope else (lambda x: x)
    before, _ = attention_by_hand(turn(q), turn(k), v, 8**-0.5)
    after, _ = attention_by_hand(turn(q), turn(k + 1.0), v, 8**-0.5)
    return abs(after - before).max()


assert output_change(use_rope=False) < 1e-12
assert output_change(use_rope=True) > 1e-3
print("a vector common to all keys is invisible without RoPE, and visible with it")

# %% [markdown]
# ### Exercise 2: block by block
# Compute the attention of one query without ever holding all scores: take the keys in blocks, keep the largest score so far,
# the sum of exponentials and the weighted sum of values relative to it, and correct both when a larger score comes. Write
# `in_blocks(q, k, v, block)` for q `[P]`, k `[S, P]`, v `[S, V]`, with scale $P^{-1/2}$. It must satisfy
#
# ```python
# g = np.random.default_rng(8)
# q1, k1, v1 = g.normal(size=16) * 30, g.normal(size=(50, 16)), g.normal(size=(50, 3))
# for block in (1, 7, 50):
#     assert np.allclose(in_blocks(q1, k1, v1, block), softmax(k1 @ q1 / 4) @ v1, rtol=1e-12)
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def in_blocks(q, k, v, block):
    """The idea of Milakov & Gimelshein (2018) and of FlashAttention."""
    top, total, weighted = -np.inf, 0.0, np.zeros(v.shape[1])
    for i in range(0, len(k), block):
        scores = k[i : i + block] @ q * len(q) ** -0.5
        new_top = max(top, scores.max())
        e, correction = np.exp(scores - new_top), np.exp(top - new_top)
        total = total * correction + e.sum()
        weighted = weighted * correction + e @ v[i : i + block]
        top = new_top
    return weighted / total


g = np.random.default_rng(8)
q1, k1, v1 = g.normal(size=16) * 30, g.normal(size=(50, 16)), g.normal(size=(50, 3))
for block in (1, 7, 50):
    assert np.allclose(in_blocks(q1, k1, v1, block), softmax(k1 @ q1 / 4) @ v1, rtol=1e-12)
print("one pass over the keys is enough, whatever the block")

# %% [markdown]
# ### Exercise 3: the gradient of a rotation
# What must `rope` do to a gradient? Write `rope_backward(dy, theta)` in one line, using `rope_by_hand` or not. It must
# satisfy
#
# ```python
# x = np.random.default_rng(9).normal(size=(2, 7, 3, 8))
# dy, t = np.random.default_rng(10).normal(size=x.shape), Tensor(x, requires_grad=True)
# rope(t, 1e4).backward(dy)
# assert np.allclose(rope_backward(dy, 1e4), t.grad, rtol=0, atol=1e-14)
# assert np.allclose(rope_backward(rope_by_hand(x, 1e4), 1e4), x, rtol=0, atol=1e-14)
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def rope_backward(dy, theta):
    """The transpose of a rotation turns back: swap the halves, turn, swap again (a mirror turns the other way)."""
    half = dy.shape[-1] // 2
    return np.roll(rope_by_hand(np.roll(dy, half, axis=-1), theta), half, axis=-1)


x = np.random.default_rng(9).normal(size=(2, 7, 3, 8))
dy, t = np.random.default_rng(10).normal(size=x.shape), Tensor(x, requires_grad=True)
rope(t, 1e4).backward(dy)
assert np.allclose(rope_backward(dy, 1e4), t.grad, rtol=0, atol=1e-14)
assert np.allclose(rope_backward(rope_by_hand(x, 1e4), 1e4), x, rtol=0, atol=1e-14)
print("the backward pass is the rotation by the opposite angle")

# %% [markdown]
# ### Exercise 4: the shortcut
# Train the same model on texts of one fixed period, 12 (100 steps are enough). Is it as good on period 12 as the copier,
# and how good is it on period 9? Explain it by its attention maps. Your `shortcut` must satisfy
#
# ```python
# assert accuracy(shortcut, (12, 12)) > 0.9
# assert accuracy(shortcut, (9, 9)) < 0.5 < accuracy(copier, (9, 9))
# ```

# %% tags=["solution", "hide-cell", "varies"] jupyter={"source_hidden": true}
shortcut, _ = train((12, 12), 100)
assert accuracy(shortcut, (12, 12)) > 0.9
assert accuracy(shortcut, (9, 9)) < 0.5 < accuracy(copier, (9, 9))
tokens, _, period = texts(200, np.random.default_rng(2), (12, 12))
late = np.arange(12, LENGTH)
looks = max(probs[:, h, late, late - 11].mean() for probs in attention_maps(shortcut, tokens) for h in range(4))
print(f"period 12: {accuracy(shortcut, (12, 12)):.0%}, period 9: {accuracy(shortcut, (9, 9)):.0%}")
print(f"it learned a distance, not a rule: one of its heads gives {looks:.0%} of its weight to the token 11 back")

# %% [markdown]
# ## Where to read on
#
# - Vaswani et al. (2017), *Attention Is All You Need*, section 3.2.
# - Su et al. (2021), *RoFormer: Enhanced Transformer with Rotary Position Embedding*, section 3.
# - Ainslie et al. (2023), *GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints*, section 2.
# - Milakov & Gimelshein (2018), *Online normalizer calculation for softmax*; Dao et al. (2022), *FlashAttention*, section 3.
# - Olsson et al. (2022), *In-context Learning and Induction Heads*; Elhage et al. (2021), *A Mathematical Framework for
#   Transformer Circuits*.
# - Here: `oxidizr_ref/fused/attention.py`, `oxidizr_ref/fused/rope.py`, `oxidizr_ref/layers/attention.py`, and
#   [the architectures](../docs/architectures.md).
# - Next: [05 · A whole transformer on one page](05_a_transformer_on_one_page.ipynb); what the cache costs in notebook 6.
