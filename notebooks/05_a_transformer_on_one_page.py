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
# # 05 · A whole transformer on one page
#
# After this you can
#
# - write the forward pass of a Llama-like language model, from token ids to a loss, in about forty lines;
# - say the shape of every array on the way, and count the parameters without a computer;
# - check one implementation against another: logits, loss, every gradient, and several updates;
# - train it on a text, know which numbers to compare its loss with, and let it write.
#
# **Needs** notebooks [01](01_derivative_to_tape.ipynb) to [04](04_attention_and_rope.ipynb): the tape, cross-entropy,
# RMSNorm, attention with rotary positions. **Time:** 40 minutes to read; it runs in about 20 seconds.

# %%
import inspect
import math
import time

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import AdamW, LanguageModel, Tensor, no_grad, ops
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.data import bundled_corpus
from oxidizr_ref.generation import generate
from oxidizr_ref.optim import clip_factor, global_norm, learning_rate
from oxidizr_ref.sampling import Sampling
from oxidizr_ref.tokenizers import ByteTokenizer

# %% [markdown]
# ## 1 · The map
#
# A language model reads token ids $t_1 \dots t_T$ and says, at every position, how likely each token of the vocabulary is
# to come next. A decoder-only transformer does it with one running array, the **residual stream** $h$, of shape
# `[B,T,D]`: for each of $B$ sequences and $T$ positions a vector of $D$ numbers. Every layer reads it through a norm and
# adds to it:
#
# $$
# \begin{aligned}
# h &= E[t] & &\text{rows of the embedding } E\ [V, D] \\
# h &\leftarrow h + \mathrm{attention}(\mathrm{norm}(h)) & &\text{mixes positions} \\
# h &\leftarrow h + \mathrm{feedforward}(\mathrm{norm}(h)) & &\text{mixes channels, at each position alone} \\
# \mathrm{logits} &= \mathrm{norm}(h)\, W^\top & & W\ [V, D] \\
# \mathrm{loss} &= -\tfrac{1}{BT} \textstyle\sum_{b,i} \log \mathrm{softmax}(\mathrm{logits}_{b,i})[t_{b,i+1}] &&
# \end{aligned}
# $$
#
# The two middle lines are repeated for each of the layers. That the norm stands *inside* the sum ("pre-norm") keeps a
# path from the last $h$ to the embedding on which nothing is ever multiplied: the gradient of $h$ passes through all
# layers unharmed.
#
# Letters, here and in the package: $B$ sequences, $T$ time (positions), $D$ width of the stream, $H$ heads of queries,
# $K$ heads of keys and values, $P = D/H$ width of a head, $F$ width inside the feed-forward, $V$ vocabulary.

# %%
config = ModelConfig(
    hidden_size=64,  # D
    num_layers=2,
    num_heads=4,  # H, so P = 16
    kv_heads=2,  # K: each serves two heads of queries
    intermediate_size=176,  # F
    vocab_size=260,  # V: 256 bytes and 4 special tokens
    max_seq_len=64,  # T
    dtype="f64",  # for comparing; training below is in float32
)
model = LanguageModel(config, seed=0)
for name, p in model.named_parameters():
    print(f"{name:45} {p.shape!s:>10} {p.data.size:7,}")
print(f"{model.num_parameters():65,}")

# %% [markdown]
# A matrix of weights is stored `[out, in]`, so a product with it is $x W^\top$. There are no biases.
#
# ## 2 · The page
#
# We write it with the primitive operations of notebook 01 (`oxidizr_ref.ops`), so that the tape brings the gradients
# along. Four small functions, then the model. First the norm (notebook 03) and rotary positions (notebook 04):
#
# $$ \mathrm{norm}(x) = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \varepsilon}} \odot w, \qquad
# \mathrm{rope}(x)_t = x \odot \cos\varphi_t + [-x_2; x_1] \odot \sin\varphi_t, \quad \varphi_{t,i} = t\,\theta^{-2i/P} $$
#
# where $x_1, x_2$ are the halves of a head and the $P/2$ angles stand twice in a row.


# %%
def linear(x, weight):
    return x @ weight.swapaxes(0, 1)  # [...,in] times [out,in] transposed


def rms_norm(x, weight, eps):
    return x * ((x * x).mean(axis=-1, keepdims=True) + eps) ** -0.5 * weight


def rope(x, theta):
    T, P = x.shape[1], x.shape[3]  # x: [B,T,heads,P]
    angle = np.arange(T)[:, None] * theta ** (-np.arange(0, P, 2) / P)  # [T,P/2]
    angle = np.concatenate([angle, angle], axis=-1)[:, None]  # [T,1,P]
    turned = ops.concatenate(-x[..., P // 2 :], x[..., : P // 2], axis=-1)
    return x * Tensor(np.cos(angle)) + turned * Tensor(np.sin(angle))


# %% [markdown]
# Attention. Each of the $K$ heads of keys and values serves $H/K$ heads of queries, so they are repeated; then
#
# $$ \mathrm{probs} = \mathrm{softmax}\!\left(\frac{q k^\top}{\sqrt P} + \text{mask}\right), \qquad
# \text{context} = \mathrm{probs}\; v $$
#
# where the mask is $-\infty$ for keys in the future. It is the only line in the whole model where one position sees
# another.


# %%
def attention(x, w, c):
    (B, T, D), H, K, P = x.shape, c.num_heads, c.kv_heads, c.head_dim
    q = rope(linear(x, w["q_proj.weight"]).reshape(B, T, H, P), c.rope_theta)
    k = rope(linear(x, w["k_proj.weight"]).reshape(B, T, K, P), c.rope_theta)
    v = linear(x, w["v_proj.weight"]).reshape(B, T, K, P)
    k, v = (repeat(a, H // K) for a in (k, v))  # [B,T,H,P]
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # [B,H,T,P]
    scores = q @ k.swapaxes(2, 3) * P**-0.5  # [B,H,T,T]
    past = np.tril(np.ones((T, T), dtype=bool))
    probs = ops.softmax(ops.where(scores, Tensor(np.array(-np.inf)), condition=past))
    context = (probs @ v).swapaxes(1, 2).reshape(B, T, D)
    return linear(context, w["o_proj.weight"])


def repeat(x, times):
    B, T, K, P = x.shape
    return ops.broadcast_to(x.reshape(B, T, K, 1, P), shape=(B, T, K, times, P)).reshape(B, T, K * times, P)


# %% [markdown]
# The feed-forward is SwiGLU (Shazeer 2020): one projection gates another, with $\mathrm{silu}(x) = x\,\sigma(x)$. And the
# model:


# %%
def swiglu(x, w):
    gate, up = linear(x, w["gate_proj.weight"]), linear(x, w["up_proj.weight"])  # [B,T,F]
    return linear(gate * ops.sigmoid(gate) * up, w["down_proj.weight"])


def below(weights, prefix):
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def transformer(tokens, weights, c):
    h = ops.lookup(weights["embed_tokens.weight"], ids=tokens)  # [B,T,D]
    for i in range(c.num_layers):
        w = below(weights, f"layers.{i}.")
        x = rms_norm(h, w["input_layernorm.weight"], c.rms_norm_eps)
        h = h + attention(x, below(w, "self_attn."), c)
        x = rms_norm(h, w["post_attention_layernorm.weight"], c.rms_norm_eps)
        h = h + swiglu(x, below(w, "mlp."))
    return linear(rms_norm(h, weights["norm.weight"], c.rms_norm_eps), weights["lm_head.weight"])  # [B,T,V]


def cross_entropy(logits, targets):
    return -ops.take_along(ops.log_softmax(logits), ids=targets[..., None]).mean()


# %%
page = linear, rms_norm, rope, attention, repeat, swiglu, below, transformer, cross_entropy
lines = sum(1 for f in page for line in inspect.getsource(f).splitlines() if line.strip())
print(f"a transformer and its loss: {lines} lines in {len(page)} functions")
assert lines <= 60

# %% [markdown]
# ## 3 · Is it right?
#
# The package's `LanguageModel` computes the same with fused operations: attention without the `[T,T]` array, a
# cross-entropy that never forms all the logits, blocks of rows on threads. Its weights have names, and our page reads
# them under these names. So we can ask for agreement, in float64, of everything: logits, loss, and the gradient of every
# parameter.
#
# How much disagreement is rounding? A float64 has a unit roundoff of $1.1\cdot10^{-16}$; sums of some hundred terms in
# another order differ by a few of these. A wrong sign or a missing factor gives 0.1 or 1, never $10^{-15}$. In float32,
# where the unit is $6\cdot10^{-8}$, a subtle fault can hide in the noise: compare in float64.

# %%
generator = np.random.default_rng(0)
window = generator.integers(0, config.vocab_size, (3, 49))
tokens, targets = window[:, :-1], window[:, 1:]  # [3,48] each: every position's target is the next token
weights = {name: Tensor(p.data, requires_grad=True) for name, p in model.named_parameters()}


def difference(a, b):
    """The largest difference, as a part of the largest number."""
    return np.abs(a - b).max() / np.abs(b).max()


# %% tags=["varies"]
logits = transformer(tokens, weights, config)
loss = cross_entropy(logits, targets)
loss.backward()
model.zero_grad()
package_loss = model.loss(tokens, targets)
package_loss.backward()

worst = {name: difference(weights[name].grad, p.grad) for name, p in model.named_parameters()}
print(f"logits {logits.shape}: {difference(logits.data, model(tokens).data):.1e}")
print(f"loss {loss.item():.6f}: {abs(loss.item() - package_loss.item()):.1e}")
print(f"{len(worst)} gradients, the worst in {max(worst, key=worst.get)}: {max(worst.values()):.1e}")
assert difference(logits.data, model(tokens).data) < 1e-13 and abs(loss.item() - package_loss.item()) < 1e-13
assert max(worst.values()) < 1e-12

# %% [markdown]
# (The last digits depend on the matrix products of your CPU; that is why they may differ from those printed here.)
#
# **A first sanity check of any language model:** its loss before training. Logits are then nearly zero, every token is
# nearly as likely as every other, and the loss is close to $\ln V$. If yours begins much above it, the first weights are
# too large.

# %%
print(f"loss before training {loss.item():.3f}, ln V = {math.log(config.vocab_size):.3f}")
assert abs(loss.item() - math.log(config.vocab_size)) < 0.05

# %% [markdown]
# These are the lines of the package that do what our `transformer` does. (`documents` keeps documents of a batch apart,
# and `routings` collects what mixtures of experts did: notebook 07.)

# %%
print(inspect.getsource(LanguageModel.hidden))
print(inspect.getsource(type(model.layers[0]).__call__))

# %% [markdown]
# ## 4 · Training
#
# The text that comes with the package: questions, answers and short facts, in bytes. The last tenth is held out. A step
# takes windows of $T+1$ bytes, the first $T$ to read and the last $T$ to predict, computes the gradient, and lets AdamW
# (notebook 11) change the weights.

# %%
tokenizer = ByteTokenizer()
text = tokenizer.encode(bundled_corpus().read_text()).astype(np.int64)
train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
T = config.max_seq_len
print(f"{len(train):,} tokens to train on, {len(held_out):,} held out")
print(tokenizer.decode(train[:180]))


def batch(step, size, of=train):
    begin = np.random.default_rng([0, step]).integers(0, len(of) - T, size)
    window = of[begin[:, None] + np.arange(T + 1)]
    return window[:, :-1], window[:, 1:]


# %% [markdown]
# First the page against the package once more, over several updates: every loss after the first depends on all gradients
# before it. Both get the same AdamW and the same batches.


# %%
def losses_of(weights, loss_of, steps):
    optimizer = AdamW({name: w.data for name, w in weights.items()}, lr=3e-3)  # changes the arrays in place
    losses = []
    for step in range(steps):
        for w in weights.values():
            w.grad = None
        loss = loss_of(*batch(step, 4))
        loss.backward()
        optimizer.step({name: w.grad for name, w in weights.items()}, lr=3e-3)
        losses.append(loss.item())
    return np.array(losses)


# %% tags=["varies"]
weights = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in model.named_parameters()}
ours = losses_of(weights, lambda x, y: cross_entropy(transformer(x, weights, config), y), steps=8)
theirs = losses_of(dict(model.named_parameters()), model.loss, steps=8)
print("page   ", ours.round(6))
print("package", theirs.round(6))
print(f"largest difference {np.abs(ours - theirs).max():.0e}")
assert np.abs(ours - theirs).max() < 1e-9

# %% [markdown]
# They are the same model. From here on the package does the work, in float32 and with fused operations. What do they
# bring?

# %% tags=["varies"]
small = LanguageModel(ModelConfig(**{**config.model_dump(), "dtype": "f32"}), seed=0)
weights32 = {name: Tensor(p.data, requires_grad=True) for name, p in small.named_parameters()}


def milliseconds(loss_of, tries=7):
    taken = []
    for step in range(tries):
        began = time.perf_counter()
        loss_of(*batch(step, 16)).backward()
        taken.append(time.perf_counter() - began)
    return 1e3 * sorted(taken)[tries // 2]


print(f"page, float64:    {milliseconds(lambda x, y: cross_entropy(transformer(x, weights, config), y)):6.1f} ms")
print(f"package, float32: {milliseconds(small.loss):6.1f} ms for {16 * T} tokens, forward and backward")

# %% [markdown]
# What should the loss be compared with? With models that need no training, counted on the same text: every byte as often
# as it occurs (unigram), and every byte given the one before (bigram, 0.1 added to every count). A language model that
# does not beat the bigram has not learned to use its context.

# %%
V = config.vocab_size
pairs = np.bincount(train[:-1] * V + train[1:], minlength=V * V).reshape(V, V) + 0.1  # row: the byte before
bigram = -np.log(pairs / pairs.sum(axis=1, keepdims=True))[held_out[:-1], held_out[1:]].mean()
unigram = -np.log(pairs.sum(axis=0) / pairs.sum())[held_out[1:]].mean()
print(f"nats a token on held-out text: uniform {math.log(V):.3f}, unigram {unigram:.3f}, bigram {bigram:.3f}")

# %%
STEPS, PEAK = 500, 4e-3


def held_out_losses(stride):
    """Of every position of windows that begin `stride` tokens apart, [windows,T]."""
    begins, losses = np.arange(0, len(held_out) - T, stride), []
    for some in np.array_split(begins, len(begins) // 64):
        window = held_out[some[:, None] + np.arange(T + 1)]
        with no_grad():
            log_p = ops.log_softmax(small(window[:, :-1]))
            losses.append(-ops.take_along(log_p, ids=window[:, 1:, None]).data[..., 0])
    return np.concatenate(losses)


# %% tags=["varies"]
small.zero_grad()
optimizer, curve, checks = AdamW(small.state_dict(), lr=PEAK), [], {0: held_out_losses(T).mean()}
for step in range(1, STEPS + 1):
    loss = small.loss(*batch(step, 8))
    loss.backward()
    gradients = {name: p.grad for name, p in small.named_parameters()}
    rate = learning_rate(step, peak=PEAK, schedule="cosine", warmup_steps=20, total_steps=STEPS, min_lr_ratio=0.05)
    optimizer.step(gradients, lr=rate, gradient_scale=clip_factor(global_norm(gradients), 1.0))
    small.zero_grad()
    curve.append(loss.item())
    if step % 50 == 0:
        checks[step] = held_out_losses(T).mean()
final = checks[STEPS]
print(f"held-out loss {checks[0]:.3f} -> {final:.3f} nats a token; perplexity {math.exp(final):.1f}")
assert final < bigram

# %%
figure, axes = plt.subplots()
axes.plot(range(1, STEPS + 1), curve, color="0.6", linewidth=1, label="training batch")
axes.plot(checks.keys(), checks.values(), marker="o", markersize=4, color=COLORS["blue"], label="held-out text")
for name, level, color in [("unigram", unigram, "orange"), ("bigram", bigram, "red")]:
    axes.axhline(level, linestyle="--", color=COLORS[color], label=name)
axes.set(xlabel="update", ylabel="loss (nats a token)", title="A few seconds of training pass the bigram")
axes.legend()
plt.show()

# %% [markdown]
# Does it use its context, and how much of it? Within a window the first position has seen one byte, the last one 64. The
# bigram sees one byte everywhere; a model that reads further does better later in the window.

# %%
by_position = held_out_losses(1).mean(axis=0)  # [T]; so nearly every token is scored at every position
figure, axes = plt.subplots()
axes.plot(np.arange(1, T + 1), by_position, color=COLORS["blue"], label="the model")
axes.axhline(bigram, linestyle="--", color=COLORS["red"], label="bigram")
axes.set(xlabel="bytes seen", ylabel="held-out loss (nats a token)", title="More context, lower loss")
axes.set_xscale("log", base=2)
axes.xaxis.set_major_formatter("{x:g}")
axes.legend()
plt.show()
assert by_position[32:].mean() < by_position[:4].mean() - 0.3

# %% [markdown]
# It falls for some ten bytes and then stays: so far this model knows how words are spelled, and little of what a sentence
# is about. (With one byte seen it is worse than the bigram: windows begin there in one target of 64 only, so that is
# hardly trained for.)
#
# ## 5 · Writing
#
# A text is continued by drawing the next token from $\mathrm{softmax}(\mathrm{logits}/\tau)$, appending it, and asking
# again. The temperature $\tau$ sharpens the distribution below 1; at 0 the likeliest token is taken. Our page can do
# that, slowly: it reads the whole text again for every token.


# %%
def continued(prompt, count):
    ids = list(tokenizer.encode(prompt))
    weights = {name: Tensor(p.data) for name, p in small.named_parameters()}
    for _ in range(count):
        logits = transformer(np.array([ids]), weights, config).data[0, -1]  # of the last position, [V]
        ids.append(int(logits.argmax()))
    return tokenizer.decode(ids)


# %% [markdown]
# The package keeps the keys and values of the past, so that a token costs one position (notebook 06). Same text:

# %% tags=["varies"]
prompt = "<|user|>What is the "
(greedy,) = generate(small, [tokenizer.encode(prompt)], Sampling(max_tokens=40, temperature=0))
assert continued(prompt, 40) == prompt + tokenizer.decode(greedy.tokens)
print(prompt + tokenizer.decode(greedy.tokens))

# %% tags=["varies"]
for temperature in (0.5, 0.8, 1.2):
    (sample,) = generate(small, [tokenizer.encode("The ")], Sampling(max_tokens=150, temperature=temperature, top_k=0))
    print(f"temperature {temperature}: The {tokenizer.decode(sample.tokens)}\n")

# %% [markdown]
# Syllables, words, the shape of questions and answers, no sense: a hundred thousand parameters after some seconds. Low
# temperatures repeat the commonest phrases, high ones spell badly. `oxidizr-ref train -f nano-start` trains a larger
# model on the same text.
#
# ## Exercises
#
# **1 · Count.** Write `count(c)`, the number of parameters of such a model, from `c.hidden_size`, `c.num_layers`,
# `c.num_heads`, `c.kv_heads`, `c.intermediate_size` and `c.vocab_size` alone. It must satisfy
# `assert count(config) == model.num_parameters()`. Then: how many has a Llama with $D=4096$, 32 layers, 32 heads, 8 of
# keys, $F=14336$, $V=128256$?


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def count(c):
    D, P = c.hidden_size, c.hidden_size // c.num_heads
    attention = D * c.num_heads * P * 2 + D * c.kv_heads * P * 2  # q and o; k and v
    layer = attention + 3 * D * c.intermediate_size + 2 * D  # three matrices of SwiGLU, two norms
    return 2 * c.vocab_size * D + c.num_layers * layer + D


assert count(config) == model.num_parameters()
shape = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "kv_heads": 8, "intermediate_size": 14336}
llama = ModelConfig(**shape, vocab_size=128256, max_seq_len=8192)
assert count(llama) == LanguageModel(llama, seed=None).num_parameters()  # seed=None: shapes alone, no memory
print(f"{count(llama):,}")

# %% [markdown]
# **2 · No peeking.** A model that sees the future during training has a wonderful loss and is worthless. Change the token
# at position 20 of `tokens` and show that no logit before it changes, not by a bit, and that some logit at or after it
# does: `assert np.array_equal(before[:, :20], after[:, :20])`. Then say what the loss would become if the mask were left
# out in training. (No training needed.)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
frozen = {name: Tensor(p.data) for name, p in model.named_parameters()}
other = tokens.copy()
other[:, 20] = (other[:, 20] + 1) % config.vocab_size
before, after = (transformer(ids, frozen, config).data for ids in (tokens, other))
assert np.array_equal(before[:, :20], after[:, :20])
assert not np.array_equal(before[:, 20:], after[:, 20:])
# Without the mask position i sees token i+1, which is its target: it only has to copy it, and the loss falls towards 0,
# but for the last position of a window, whose target is not among the tokens.
print("nothing before position 20 changed; from there on", int((before != after).any(axis=(0, 2)).sum()), "positions did")

# %% [markdown]
# **3 · One matrix for both ends.** Many models use the embedding $E$ as output matrix too (Press & Wolf 2017): logits are
# $\mathrm{norm}(h) E^\top$. Make the page do that *without changing it*, and show that the loss and the gradient of $E$
# equal those of `LanguageModel` with `tie_word_embeddings=True`:
# `assert difference(E.grad, tied.embed_tokens.weight.grad) < 1e-12`.

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
tied = LanguageModel(ModelConfig(**{**config.model_dump(), "tie_word_embeddings": True}), seed=3)
shared = {name: Tensor(p.data, requires_grad=True) for name, p in tied.named_parameters()}
E = shared["embed_tokens.weight"]
shared["lm_head.weight"] = E  # one tensor under two names: its gradient is the sum of both uses
loss = cross_entropy(transformer(tokens, shared, config), targets)
loss.backward()
tied.loss(tokens, targets).backward()
assert abs(loss.item() - tied.loss(tokens, targets).item()) < 1e-13
assert difference(E.grad, tied.embed_tokens.weight.grad) < 1e-12
print(f"{model.num_parameters() - tied.num_parameters():,} parameters fewer")

# %% [markdown]
# **4 · Why output projections begin small.** Each layer adds two vectors to the stream. If each has variance $s^2$, after
# $L$ layers that is $2L s^2$. The package therefore draws `o_proj` and `down_proj` with a standard deviation of
# $0.02/\sqrt{2L}$ instead of 0.02 (Radford et al. 2019). Build models of 2, 8 and 32 layers, with and without this
# factor, and measure the root mean square of what the layers have added to the stream. With two lists of three numbers:
# `assert max(with_factor) < 2 * min(with_factor) and without[2] > 3 * without[0]`.


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def added(layers, scaled):
    deep = LanguageModel(ModelConfig(**{**config.model_dump(), "num_layers": layers}), seed=0)
    for name, p in deep.named_parameters():
        if not scaled and name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data *= (2 * layers) ** 0.5
    first = h = deep.embed_tokens(tokens)
    for layer in deep.layers:
        h = layer(h, [], None)
    return float(np.sqrt(((h - first).data ** 2).mean()))


with_factor, without = ([added(layers, scaled) for layers in (2, 8, 32)] for scaled in (True, False))
print("with   ", [f"{v:.4f}" for v in with_factor])
print("without", [f"{v:.4f}" for v in without])
assert max(with_factor) < 2 * min(with_factor) and without[2] > 3 * without[0]

# %% [markdown]
# ## Where to read on
#
# - Vaswani et al. 2017, *Attention Is All You Need*, section 3: the transformer, then with an encoder.
# - Radford et al. 2019, *Language Models are Unsupervised Multitask Learners* (GPT-2), section 2.3: the norm before each
#   part, first weights.
# - Xiong et al. 2020, *On Layer Normalization in the Transformer Architecture*: what pre-norm does to gradients.
# - Shazeer 2020, *GLU Variants Improve Transformer*. Touvron et al. 2023, *LLaMA*, section 2.2: the combination built
#   here.
# - In the project: [`oxidizr_ref/model.py`](../oxidizr_ref/model.py),
#   [`layers/attention.py`](../oxidizr_ref/layers/attention.py),
#   [`layers/feed_forward.py`](../oxidizr_ref/layers/feed_forward.py); [the architectures](../docs/architectures.md).
# - Next: notebook 06, [what the cache costs](06_what_the_cache_costs.ipynb).
