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
# # 07 · Mixtures of experts: collapse, and the balance loss
#
# After this you can
#
# - write a router and a sparse layer of experts, and say which parts of it have a gradient;
# - count the parameters that a token uses against those that the model has;
# - derive the balance loss and its gradient, and say when that gradient fails;
# - read a plot of the experts' load, and recognize a collapse.
#
# **Needs** notebook [05](05_a_transformer_on_one_page.ipynb) (the layer around it). **Time:** 35 minutes to read; it runs
# in about 25 seconds.

# %%
import inspect

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import AdamW, LanguageModel, Tensor, no_grad, ops
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.data import bundled_corpus
from oxidizr_ref.layers.feed_forward import MixtureOfExperts, Router
from oxidizr_ref.optim import clip_factor, global_norm
from oxidizr_ref.tokenizers import ByteTokenizer

generator = np.random.default_rng(0)


def difference(a, b):
    """The largest difference, as a part of the largest number."""
    return np.abs(a - b).max() / np.abs(b).max()


# %% [markdown]
# ## 1 · A layer that most tokens use a part of
#
# In a transformer most parameters are in the feed-forward layers, and every token runs through all of them. A mixture of
# experts (Shazeer et al. 2017) has $E$ feed-forwards, the **experts**, and a **router** that picks $k$ of them for each
# token. The model grows, the work for a token does not.
#
# For one token $x\ [D]$:
#
# $$
# \ell = W x \ [E], \qquad p = \mathrm{softmax}(\ell), \qquad S = \text{the } k \text{ experts of largest } \ell, \qquad
# y = \sum_{e \in S} g_e\, \mathrm{expert}_e(x).
# $$
#
# The weights $g$ are the softmax over the $k$ chosen logits alone, so that they add up to 1 (Mixtral, Jiang et al. 2024).
# With $k = 1$ that softmax would be 1 whatever the router says; then $g_e = p_e$, the probability among all experts
# (Switch Transformer, Fedus et al. 2021). Section 2 shows why.
#
# By hand, token by token. Weights have the names of the package's layer; each expert is a SwiGLU.

# %%
shape = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 6, "vocab_size": 260, "max_seq_len": 64}
config = ModelConfig(**shape, num_experts=4, experts_per_tok=2)
layer = MixtureOfExperts(config, 1.0, 1.0)
layer.initialize(0, np.dtype(np.float64))
weights = layer.state_dict()
print({name: w.shape for name, w in weights.items() if "experts.0" in name or "router" in name})


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def expert(e, x):
    gate, up, down = (weights[f"experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


def mixture(x, k):  # x: [D]
    logits = weights["router.gate.weight"] @ x  # [E]
    chosen = np.argsort(-logits, kind="stable")[:k]  # equal logits: the lower index
    g = softmax(logits[chosen]) if k > 1 else softmax(logits)[chosen]
    return sum(g_e * expert(e, x) for g_e, e in zip(g, chosen, strict=True)), chosen


# %% tags=["varies"]
x = generator.standard_normal((12, 8))  # 12 tokens
by_hand = [mixture(token, k=2) for token in x]
y, routing = layer(Tensor(x))
load = np.bincount(np.concatenate([chosen for _, chosen in by_hand]), minlength=4)
error = difference(np.array([y for y, _ in by_hand]), y.data)
print(f"outputs differ by {error:.0e}; tokens given to each expert: {routing.assigned}")
assert error < 1e-14 and np.array_equal(load, routing.assigned)

# %% [markdown]
# The package does not go token by token. It sorts the tokens by expert, gives each expert all of its own at once, and
# puts the results back. Nothing else runs; no token is dropped.

# %%
print(inspect.getsource(MixtureOfExperts.__call__))

# %% [markdown]
# ## 2 · What the router learns from
#
# Picking has no gradient: move a logit a little, and the same experts are chosen. The router learns through the *weights*
# $g$ alone. With $k > 1$, if $d_e = \frac{\partial \mathrm{loss}}{\partial y} \cdot \mathrm{expert}_e(x)$ says how expert
# $e$'s output changes the loss, the softmax over the chosen gives
#
# $$ \frac{\partial\,\mathrm{loss}}{\partial \ell_e} = g_e \Big( d_e - \sum_{j \in S} g_j d_j \Big) \quad (e \in S),
# \qquad 0 \text{ for all others}. $$
#
# An expert that lowers the loss more than the others *chosen* gets a larger logit. Experts that were not chosen are not
# heard of: nobody knows what they would have said. And with $k = 1$ the bracket is $d_e - d_e = 0$: no gradient at all.
# That is why a router that picks one expert weighs it by $p_e$.


# %%
def gradient_of_router(**keys):
    layer = MixtureOfExperts(ModelConfig(**shape, num_experts=4, **keys), 1.0, 1.0)
    layer.initialize(0, np.dtype(np.float64))
    y, _ = layer(Tensor(x))
    (y * y).sum().backward()
    return layer.router.gate.weight.grad


largest = np.abs(gradient_of_router(experts_per_tok=1)).max()
largest_normed = np.abs(gradient_of_router(experts_per_tok=1, norm_topk_prob=True)).max()
print(f"k = 1, weight p_e:                     the router's gradient has numbers up to {largest:.2f}")
print(f"k = 1, softmax over the one chosen:    {largest_normed:.2f}")
assert largest_normed == 0 < largest

# %% [markdown]
# The formula above, for all tokens at once, against the tape:

# %% tags=["varies"]
y, _ = layer(Tensor(x))
(y * y).sum().backward()  # so d loss / d y = 2 y
gradient = np.zeros((4, 8))
for token, dy in zip(x, 2 * y.data, strict=True):
    logits = weights["router.gate.weight"] @ token
    chosen = np.argsort(-logits, kind="stable")[:2]
    g, d = softmax(logits[chosen]), np.array([dy @ expert(e, token) for e in chosen])
    gradient[chosen] += np.outer(g * (d - g @ d), token)
error = difference(gradient, layer.router.gate.weight.grad)
print(f"the router's gradient by hand differs by {error:.0e}")
assert error < 1e-13

# %% [markdown]
# **The rich get richer.** A chosen expert is trained, and so gets better, and so is weighed more and chosen more; one
# that is never chosen stays as it was born. Left alone, most tokens may end with few experts: a **collapse**. The model
# is then as large as before, and works like a small one.
#
# ## 3 · The balance loss
#
# Among $n$ tokens let $f_e$ be the share of all $n k$ assignments that went to expert $e$, and
# $P_e = \frac1n \sum_t p_{te}$ its mean probability. Fedus et al. (2021, eq. 4 to 6) add
#
# $$ \alpha\, \mathcal{B}, \qquad \mathcal{B} = E \sum_{e=1}^{E} f_e P_e $$
#
# to the loss. $f$ is a count and has no gradient; $P$ has one. With
# $\frac{\partial p_{te}}{\partial \ell_{tj}} = p_{te}(\delta_{ej} - p_{tj})$,
#
# $$
# \frac{\partial \mathcal{B}}{\partial \ell_{tj}} = \frac{E}{n} \sum_e f_e\, p_{te} (\delta_{ej} - p_{tj})
# = \frac{E}{n}\; p_{tj} \Big( f_j - \sum_e f_e\, p_{te} \Big).
# $$
#
# Read it: the logit of an expert that has more than its share, compared with what this token expects of its experts, is
# pushed down; of one that has less, up. For *every* token and *every* expert, chosen or not.

# %%
print(inspect.getsource(Router.__call__))

# %% tags=["varies"]
logits = Tensor(x @ weights["router.gate.weight"].T, requires_grad=True)  # [n,E]
p = ops.softmax(logits)
f = routing.assigned / routing.assigned.sum()
balance = (p.mean(axis=0) * Tensor(f)).sum() * 4.0
balance.backward()
by_formula = 4 / 12 * p.data * (f - (p.data * f).sum(axis=1, keepdims=True))
error = difference(by_formula, logits.grad)
print(f"balance loss {balance.item():.4f}, the package's {routing.balance.item():.4f}; gradients differ by {error:.0e}")
assert abs(balance.item() - routing.balance.item()) < 1e-14 and error < 1e-13

# %% [markdown]
# Two things about it are worth knowing.
#
# **1 is even, but 1 is not the minimum.** If shares and mean probabilities agree, $\mathcal{B} = E \sum_e P_e^2 \ge 1$ by
# the inequality of Cauchy and Schwarz, with 1 when all are even. They need not agree: an expert can be the favourite of
# many by a hair, and have little probability. Then $\mathcal{B}$ is below 1, and the load is uneven all the same. So look
# at the load, not at the loss.
#
# **Its gradient dies with certainty.** The factor $p_{tj}$ is tiny for every expert but the favourite, and for the
# favourite the bracket is. A router that is sure of itself hears nothing.

# %%
p = np.array([[0.51, 0.49]] * 3 + [[0.01, 0.99]])  # four tokens, two experts: three prefer the first, by a hair
f, P = np.bincount(p.argmax(axis=1), minlength=2) / 4, p.mean(axis=0)
print(f"load {f}, mean probabilities {P.round(3)}, balance loss {2 * (f * P).sum():.3f}: below 1, and not even\n")

f = np.array([1.0, 0, 0, 0])  # collapsed: all tokens have the first expert
for margin in (0.1, 1, 3, 10):
    p = softmax(np.array([margin, 0, 0, 0]))
    slope = 4 * p[0] * (f[0] - f @ p)
    print(f"its logit {margin:4} above the others: p = {p[0]:.4f}, gradient of the balance loss at this logit {slope:.4f}")

# %% [markdown]
# ## 4 · Trained
#
# A language model of one layer with 8 experts, one for each token, on the bundled text: first with $\alpha = 0$, then
# with $\alpha = 0.1$. We keep the load of every step.

# %%
text = ByteTokenizer().encode(bundled_corpus().read_text()).astype(np.int64)
train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
E, T = 8, 64
sizes = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "intermediate_size": 48, "vocab_size": 260, "max_seq_len": T}
small = ModelConfig(**sizes, num_experts=E, experts_per_tok=1)


def trained(alpha_of, steps=240, rate=4e-3):
    """A model, and the share of its tokens that each expert was given, [steps,E]. alpha_of: step -> alpha."""
    model, load = LanguageModel(small, seed=0), []
    optimizer = AdamW(model.state_dict(), lr=rate)
    for step in range(steps):
        begin = np.random.default_rng([0, step]).integers(0, len(train) - T, 8)
        window, routings = train[begin[:, None] + np.arange(T + 1)], []
        loss = model.loss(window[:, :-1], window[:, 1:], load_balance_alpha=alpha_of(step), routings=routings)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        warm = rate * min(1, (step + 1) / 20)
        optimizer.step(gradients, lr=warm, gradient_scale=clip_factor(global_norm(gradients), 1.0))
        model.zero_grad()
        load.append(routings[0].assigned / routings[0].assigned.sum())
    return model, np.array(load)


# %% [markdown]
# One number for a load: its entropy over that of an even load, $-\sum_e f_e \ln f_e / \ln E$. It is 1 when even and 0
# when one expert has all. (`expert_entropy` in the package's metrics.)


# %%
def evenness(load):
    share = load[load > 0]
    return float(-(share * np.log(share)).sum() / np.log(len(load)))


def held_out_loss(model):
    windows = held_out[: (len(held_out) - 1) // T * T + 1]
    with no_grad():
        return model.loss(windows[:-1].reshape(-1, T), windows[1:].reshape(-1, T)).item()


def draw(axes, load, title):
    smooth = np.array([load[max(0, i - 9) : i + 1].mean(axis=0) for i in range(len(load))])  # over ten steps
    shades = plt.get_cmap("cividis")(np.linspace(0.05, 1, E))
    axes.stackplot(range(1, len(load) + 1), smooth.T, colors=shades, edgecolor="white", linewidth=0.5)
    axes.set(xlabel="update", ylabel="share of the tokens", ylim=(0, 1), title=title)
    axes.grid(False)


# %% tags=["varies"]
left_alone, load_alone = trained(lambda step: 0.0)
balanced, load_balanced = trained(lambda step: 0.1)
for name, model, load in [("0", left_alone, load_alone), ("0.1", balanced, load_balanced)]:
    last = load[-50:].mean(axis=0)  # of the last 50 steps
    print(f"alpha {name:3}: evenness {evenness(last):.2f}, held-out loss {held_out_loss(model):.3f}, ", end="")
    print("load", " ".join(f"{share:.2f}" for share in np.sort(last)[::-1]))
    print(f"           largest share in one of the first 40 steps: {load[:40].max():.2f}")
one_step = np.mean([[evenness(step) for step in load[-50:]] for load in (load_alone, load_balanced)], axis=1)
print(f"evenness of a single step, mean of the last 50: {one_step[0]:.2f} and {one_step[1]:.2f}")
assert one_step[1] > one_step[0] + 0.1

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
draw(axes[0], load_alone, "alpha = 0: some experts starve")
draw(axes[1], load_balanced, "alpha = 0.1: all are used")
plt.show()

# %% [markdown]
# Each band is an expert. In both runs there are early steps in which one of them has everything: the vectors that the
# router reads have a large part in common, whatever the token, and the first updates enlarge it. Later the tokens come
# apart; with the balance loss the bands become even, without it some stay thin. At this size the loss hardly cares: 64
# channels and a few bytes of context do not need eight experts.
#
# ## 5 · A collapse, provoked
#
# To see a real collapse we ask for one: 40 steps with $\alpha = -1$, a *reward* for unevenness. Then three continuations:
# $\alpha = 0$, the usual $0.01$, and $0.1$.

# %% tags=["varies"]
after = {alpha: trained(lambda step, alpha=alpha: -1.0 if step < 40 else alpha) for alpha in (0.0, 0.01, 0.1)}
for alpha, (model, load) in after.items():
    last = load[-50:].mean(axis=0)
    print(f"alpha {alpha:4}: largest share {last.max():.2f}, evenness {evenness(last):.2f}, ", end="")
    print(f"held-out loss {held_out_loss(model):.3f}")
ends = [evenness(load[-50:].mean(axis=0)) for _, load in after.values()]
assert ends[0] < 0.4 and ends[2] > ends[0] + 0.3

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
for axis, (alpha, (_, load)) in zip(axes, after.items(), strict=True):
    draw(axis, load, f"collapsed, then alpha = {alpha:g}")
    axis.axvline(40, color=COLORS["red"], linestyle="--")
plt.show()

# %% [markdown]
# Left alone, the collapsed router does not come back: of the other experts it hears nothing, and they learn nothing that
# would recommend them. The usual $\alpha$ brings it back late or not at all within these steps: section 3 said why, its
# gradient is nearly dead where the router is sure. Ten times as much does it. The lesson: a balance loss is there to
# *prevent* a collapse from the first step on; to undo one is harder.
#
# ## 6 · What the experts specialize in
#
# Which expert does each byte go to, in the balanced model? Rows are experts, columns the commonest characters of the
# held-out text.

# %% tags=["varies"]
windows = held_out[: len(held_out) // T * T].reshape(-1, T)
block = balanced.layers[0]
with no_grad():
    h = balanced.embed_tokens(windows)
    h = h + block.self_attn(block.input_layernorm(h))
    ids, _, _ = block.moe.router(block.post_attention_layernorm(h).reshape(-1, 64))
common = np.argsort(-np.bincount(windows.reshape(-1), minlength=256)[:256], kind="stable")[:28]
common = np.sort(common)
table = np.array([np.bincount(ids[:, 0][windows.reshape(-1) == byte], minlength=E) for byte in common], dtype=float)
table /= table.sum(axis=1, keepdims=True)

figure, axes = plt.subplots(figsize=(9, 2.8))
image = axes.imshow(table.T, aspect="auto", vmin=0, vmax=1)
axes.grid(False)
axes.set(xlabel="byte", ylabel="expert", title="Experts divide the bytes among them")
axes.set_xticks(range(len(common)), ["␣" if b == 32 else "\\n" if b == 10 else chr(b) for b in common], fontsize=8)
figure.colorbar(image, label="share of the byte's tokens")
plt.show()
blind = np.bincount(ids[:, 0], minlength=E).max() / ids.size
print(f"of a byte's tokens {table.max(axis=1).mean():.0%} go to one expert; blind to the byte, at most {blind:.0%} would")

# %% [markdown]
# Nobody told them to: the router reads vectors in which the byte itself is what differs most. Large models show the same,
# mostly by token and hardly by topic (Jiang et al. 2024, section 5).
#
# ## Exercises
#
# **1 · Total and active.** Mixtral 8x7B has $D=4096$, 32 layers, 32 heads, 8 of keys, $F=14336$, 8 experts of which 2 are
# used, $V=32000$. Write `count(c, experts)`: the parameters if each layer had so many experts (the router always has all
# its rows). It must satisfy `assert count(mixtral, 8) == LanguageModel(mixtral, seed=None).num_parameters()`. How many
# does a token use?


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def count(c, experts):
    D, P = c.hidden_size, c.head_dim
    attention = 2 * D * c.num_heads * P + 2 * D * c.kv_heads * P
    layer = attention + experts * 3 * D * c.intermediate_size + c.num_experts * D + 2 * D
    return 2 * c.vocab_size * D + c.num_layers * layer + D


keys = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "kv_heads": 8, "intermediate_size": 14336}
mixtral = ModelConfig(**keys, vocab_size=32000, max_seq_len=8192, num_experts=8, experts_per_tok=2)
assert count(mixtral, 8) == LanguageModel(mixtral, seed=None).num_parameters()
print(f"{count(mixtral, 8) / 1e9:.1f} billion, of which a token uses {count(mixtral, 2) / 1e9:.1f}")

# %% [markdown]
# **2 · Capacity.** On many devices each expert has room for only $c \cdot n k / E$ tokens of a batch, $c$ the *capacity
# factor*; what does not fit is dropped (Fedus et al. 2021, section 2.2). From the loads kept in `load_alone` and
# `load_balanced`, compute the share of tokens that $c = 1.25$ would have dropped over the last 100 steps. Your two
# numbers must satisfy `assert balanced_dropped < alone_dropped`.

# %% tags=["solution", "hide-cell", "varies"] jupyter={"source_hidden": true}
alone_dropped, balanced_dropped = (
    float(np.maximum(load[-100:] - 1.25 / E, 0).sum(axis=1).mean()) for load in (load_alone, load_balanced)
)
print(f"dropped: {alone_dropped:.0%} without the balance loss, {balanced_dropped:.0%} with it (the package drops none)")
assert balanced_dropped < alone_dropped

# %% [markdown]
# **3 · Balance without a loss.** Wang et al. (2024) add a number $b_e$ to each logit *for choosing only*: after every
# batch $b_e$ grows by a small $u$ if expert $e$ had fewer tokens than the mean, and falls by $u$ if it had more. No
# gradient, and the weights $g$ stay as they are. Do it for the skewed logits below with $k = 2$, $u = 0.02$, over 500
# batches, and show `assert load.max() < 1.2 / 8` for the mean load of the last 100.

# %%
skew = np.array([3.0, 2, 1, 0.5, 0, 0, -1, -2])


def skewed_logits(batch):  # [256,8]
    return np.random.default_rng([1, batch]).standard_normal((256, 8)) + skew


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
b, loads = np.zeros(8), []
for number in range(500):
    chosen = np.argsort(-(skewed_logits(number) + b), axis=1, kind="stable")[:, :2]
    loads.append(np.bincount(chosen.reshape(-1), minlength=8) / chosen.size)
    b += 0.02 * np.sign(loads[-1].mean() - loads[-1])
load = np.mean(loads[-100:], axis=0)
print("first batch", loads[0].round(2), "\nlast ones  ", load.round(2), "\nb          ", b.round(1))
assert load.max() < 1.2 / 8

# %% [markdown]
# **4 · Keep logits small.** Routers in low precision suffer from large logits. Zoph et al. (2022) add the *z-loss*
# $\mathcal{Z} = \frac1n \sum_t \big(\ln \sum_e e^{\ell_{te}}\big)^2$. Derive its gradient, write it in NumPy for
# `logits`, and check it: `assert difference(by_formula, logits.grad) < 1e-13` after `z_loss(logits).backward()`, where
# `z_loss` is made of `ops`.


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def z_loss(logits):
    total = ops.log(ops.exp(logits).sum(axis=1))
    return (total * total).mean()


logits = Tensor(x @ weights["router.gate.weight"].T, requires_grad=True)
z_loss(logits).backward()
total = np.log(np.exp(logits.data).sum(axis=1, keepdims=True))
by_formula = 2 / len(x) * total * softmax(logits.data)  # the derivative of ln sum exp is the softmax
assert difference(by_formula, logits.grad) < 1e-13

# %% [markdown]
# ## Where to read on
#
# - Shazeer et al. 2017, *Outrageously Large Neural Networks*: the sparse layer, sections 2 and 4. Fedus et al. 2021,
#   *Switch Transformers*, section 2: one expert, the balance loss.
# - Jiang et al. 2024, *Mixtral of Experts*. Dai et al. 2024, *DeepSeekMoE*: many small experts and shared ones
#   (`shared_expert_enabled`).
# - Zoph et al. 2022, *ST-MoE*: what makes routers unstable. Wang et al. 2024, *Auxiliary-Loss-Free Load Balancing*.
# - In the project: [`layers/feed_forward.py`](../oxidizr_ref/layers/feed_forward.py); [mixture of
#   experts](../docs/architectures.md), with the same contrast in a two-layer model.
# - Next: notebook 08, [Mamba: a recurrence as a scan](08_mamba_a_recurrence_as_a_scan.ipynb).
