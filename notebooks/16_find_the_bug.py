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
# # 16 · Find the bug in someone else's transformer
#
# A colleague has written the same model in another language, on another framework, or a year ago. It trains. Its loss is
# plausible. Something in it is wrong. Staring at code finds what one expects; comparing numbers finds what is there.
#
# **After this you can**
#
# - record a *golden trace* of a training step, and write one of your own program with ten lines of code;
# - explain why the first number that differs is found by reading two traces in the order of execution, and what makes it an
#   *origin*;
# - name op and layer of five classic mistakes without having read the program;
# - tell a mistake from rounding, with an error budget that is measured and not guessed.
#
# **Needs** notebooks 04 and 05 (a transformer), 12 (floats). **Time** 40 minutes.

# %%
import math
import tempfile
from pathlib import Path

import numpy as np
from figures import plt

from oxidizr_ref import LanguageModel, load_config, trace
from oxidizr_ref.trace import Trace, TraceWriter, compare, report
from oxidizr_ref.trace.budget import budgets
from oxidizr_ref.trace.golden_set import lively_weights

temporary = tempfile.TemporaryDirectory()
HERE = Path(temporary.name)

# %% [markdown]
# ## The reference
#
# One training step of a small Llama (two layers, 4 query heads on 2 key/value heads), in float64, with every value kept
# under its name. The weights are *lively*: normal numbers of deviation 0.25, at which no part is negligible. First weights
# are so small that a wrong attention hardly matters, and a mistake can hide.
#
# ```bash
# oxidizr-ref trace record -f tiny-llama --dtype f64 --weights lively --set gradient_accumulation=1 -o reference.safetensors
# ```

# %%
config = load_config("tiny-llama", ["model.dtype=f64", "batch_size=2", "max_seq_len=24", "gradient_accumulation=1"])
weights = lively_weights(LanguageModel(config.model, seed=None))
trace.record(config, HERE / "reference.safetensors", weights=weights, what=("forward", "backward"))
reference = Trace(HERE / "reference.safetensors")
roles = [record.role for record in reference.records.values()]
print({role: roles.count(role) for role in dict.fromkeys(roles)})
for record in [r for r in reference.records.values() if r.layer == 0 and r.role == "output"][:12]:
    print(
        f"{record.name:38s} {record.shape!s:16s} {record.op:17s} of {', '.join(record.inputs).replace('layers.0.', '')}"
    )

# %% [markdown]
# The records stand in the order of execution, and each knows what it was computed from: together they are the graph of the
# step.
#
# ## Somebody's transformer
#
# Here is the other program: plain NumPy, written from the papers, without a look at our code. It calls `note(name, value)`
# wherever something has a name in the [list of names](../docs/trace_names.md). That is all that a program must add. It
# starts from the weights and tokens of the reference.
#
# Shapes: B sequences, T tokens, D channels, H query heads on K key/value heads of width P.

# %%
sizes = config.model
B, T, D, H, K, P = 2, 24, sizes.hidden_size, sizes.num_heads, sizes.kv_heads, sizes.head_dim


class Theirs:
    """Their Llama: parts that can be wrong are methods of their own."""

    eps, scale = 1e-5, 1 / math.sqrt(P)

    def __init__(self, source, dtype=np.float64):
        self.w = {n: source.array(n).astype(dtype) for n, r in source.records.items() if r.role == "parameter"}
        self.tokens, self.targets = (source.array(n).astype(np.int64) for n in ("tokens", "targets"))
        self.noted = {}

    def note(self, name, value):
        self.noted[name] = value
        return value

    def linear(self, name, x):  # weights are [out, in]
        return self.note(f"{name}.output", x @ self.w[f"{name}.weight"].T)

    def rms_norm(self, name, x):
        rms = self.note(f"{name}.rms", np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps).astype(x.dtype))
        return self.note(f"{name}.output", x / rms * self.w[f"{name}.weight"])

    def rope(self, x):  # [B,T,heads,P]: channels i and i + P/2 are a pair
        cos, sin = self.turns(x.dtype)
        a, b = x[..., : P // 2], x[..., P // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def turns(self, dtype):
        angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, P, 2) / P))[:, None]  # [T,1,P/2]
        return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)

    def allowed(self):  # [T,S]: may token t look at token s?
        return np.tril(np.ones((T, T), dtype=bool))


# %% [markdown]
# $\text{scores} = q k^\top / \sqrt P$, each key head serving $H/K$ query heads; the causal mask; softmax; the mix of
# values; then the SwiGLU feed-forward $\text{down}(\text{silu}(\text{gate}(x)) \circ \text{up}(x))$.


# %%
def attention(self, name, x):
    q = self.note(f"{name}.q", self.rope(self.linear(f"{name}.q_proj", x).reshape(B, T, H, P)))
    k = self.note(f"{name}.k", self.rope(self.linear(f"{name}.k_proj", x).reshape(B, T, K, P)))
    v = self.linear(f"{name}.v_proj", x).reshape(B, T, K, P)
    k, v = self.for_all_heads(k), self.for_all_heads(v)
    scores = self.note(f"{name}.scores", np.einsum("bthp,bshp->bhts", q, k) * q.dtype.type(self.scale))
    masked = self.note(f"{name}.masked_scores", np.where(self.allowed(), scores, -np.inf).astype(x.dtype))
    e = np.exp(masked - masked.max(axis=-1, keepdims=True))
    probs = self.note(f"{name}.probs", e / e.sum(axis=-1, keepdims=True))
    context = self.note(f"{name}.context", np.einsum("bhts,bshp->bthp", probs, v))
    return self.linear(f"{name}.o_proj", context.reshape(B, T, H * P))


def for_all_heads(self, x):  # [B,T,K,P] to [B,T,H,P]: heads 0, 0, 1, 1
    return np.repeat(x, H // K, axis=2)


def mlp(self, name, x):
    gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
    return self.linear(f"{name}.down_proj", self.note(f"{name}.activation", gate / (1 + np.exp(-gate)) * up))


def forward(self):
    h = self.note("embed_tokens.output", self.w["embed_tokens.weight"][self.tokens])
    for i in range(2):
        a = self.attention(f"layers.{i}.self_attn", self.rms_norm(f"layers.{i}.input_layernorm", h))
        h = self.note(f"layers.{i}.after_attention", h + a)
        m = self.mlp(f"layers.{i}.mlp", self.rms_norm(f"layers.{i}.post_attention_layernorm", h))
        h = self.note(f"layers.{i}.output", h + m)
    logits = self.note("logits", self.rms_norm("norm", h) @ self.w["lm_head.weight"].T)
    top = logits.max(axis=-1, keepdims=True)
    log_sum = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]
    losses = self.note("token_losses", log_sum - np.take_along_axis(logits, self.targets[..., None], axis=-1)[..., 0])
    return self.note("loss", losses.mean())


Theirs.attention, Theirs.for_all_heads, Theirs.mlp, Theirs.forward = attention, for_all_heads, mlp, forward

# %% [markdown]
# And five versions of it, each with one mistake that people really make:


# %%
class WrongPairs(Theirs):
    """RoPE turns channels 2i and 2i+1, as in the paper and in GPT-J; these weights were made for pairs i and i + P/2."""

    def rope(self, x):
        cos, sin = self.turns(x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


class NoScale(Theirs):
    """The scores are not divided by sqrt(P)."""

    scale = 1.0


class Transposed(Theirs):
    """One weight is used as [in, out]. It is square, so nothing complains."""

    def linear(self, name, x):
        if name != "layers.1.self_attn.o_proj":
            return super().linear(name, x)
        return self.note(f"{name}.output", x @ self.w[f"{name}.weight"])


class WrongEps(Theirs):
    """The epsilon of another model family."""

    eps = 1e-6


class SeesAhead(Theirs):
    """Off by one: token t may look at token t+1, which it is to predict."""

    def allowed(self):
        return np.tril(np.ones((T, T), dtype=bool), k=1)


MISTAKES = [WrongPairs, NoScale, Transposed, WrongEps, SeesAhead]
print(f"reference   {float(reference.array('loss')):.6f}")
for kind in [Theirs, *MISTAKES]:
    print(f"{kind.__name__:11s} {kind(reference).forward():.6f}")

# %% [markdown]
# The losses say that five programs differ from the reference. Which, had you only one of them and no reference, would you
# call wrong? And from the loss alone, *what* is wrong? (`SeesAhead` is the most dangerous: in training its loss falls
# faster than anybody's, for it reads the answer. Only generation shows it.)
#
# ## By hand: read both in the order of execution
#
# The loss is computed from everything, so it carries every mistake and locates none. But the values in between can be put
# side by side, the first one first. Until the mistake all is equal up to rounding; behind it nearly nothing is.


# %%
def error(name, other):
    """The largest |difference|, in units of the largest number of the reference."""
    ours, theirs = reference.array(name), other[name].reshape(reference.array(name).shape)
    finite = np.isfinite(ours) & np.isfinite(theirs)
    if not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return math.inf
    return np.abs(ours[finite] - theirs[finite]).max() / np.abs(ours[finite]).max()


def first_wrong(other, tolerance):
    for name in reference.records:  # in the order of execution
        if name in other and error(name, other) > tolerance:
            return name
    return None


right = Theirs(reference)
right.forward()
assert all(error(name, right.noted) < 1e-14 for name in right.noted)
print(f"their right version: {len(right.noted)} values, all errors below 1e-14")
for kind in MISTAKES:
    theirs = kind(reference)
    theirs.forward()
    print(f"{kind.__name__:11s} first wrong: {first_wrong(theirs.noted, 1e-12)}")

# %% [markdown]
# Five mistakes, five different places, each the line of code that is wrong. Nothing was trained, nothing was guessed.
#
# Two questions are left. Is the *first* wrong value always the culprit? And where did the $10^{-12}$ come from?
#
# ## Origins
#
# In the order of execution $q$ is computed before $k$ and $v$. If $v$ were wrong as well, for a reason of its own, "the
# first" would hide it. What makes a value a **culprit** is not its place: it is that it is wrong *although everything it
# was computed from is right*. The records have `inputs`, so this can be asked of every value. Inputs that the other program
# did not note are replaced by *their* inputs.


# %%
def nearest_inputs(name, other):
    """What a value was computed from, as far as the other program has it."""
    found = []
    for source in reference.records[name].inputs:
        if source in other or reference.records[source].role in ("parameter", "input"):
            found.append(source)
        else:
            found += nearest_inputs(source, other)
    return found


def origins(other, tolerance):
    wrong = {name for name in reference.records if name in other and error(name, other) > tolerance}
    return [n for n in reference.records if n in wrong and not wrong & set(nearest_inputs(n, other))]


for kind in MISTAKES:
    theirs = kind(reference)
    theirs.forward()
    wrong = sum(error(name, theirs.noted) > 1e-12 for name in theirs.noted)
    print(f"{kind.__name__:11s} {wrong:2d} values wrong; origins: {', '.join(origins(theirs.noted, 1e-12))}")

# %% [markdown]
# `WrongPairs` has two origins, `q` and `k` of layer 0: neither is computed from the other. Those of layer 1 are wrong as
# well, but they are computed from wrong inputs, so nothing can be said of them; nor of the second layer of `NoScale`. Mend
# what was found, and look again. `WrongEps` shows at the very first norm.
#
# ## The same with the package
#
# Their program writes a trace. In Python that is a `TraceWriter`; the [format](../docs/trace_format.md) is a safetensors
# file that any language can write, and there are examples in C, Rust and PyTorch.


# %%
def write(kind, dtype=np.float64, precision="f64"):
    theirs = kind(reference, dtype)
    theirs.forward()
    path = HERE / f"{kind.__name__}.{precision}.safetensors"
    with TraceWriter(path, precision=precision) as writer:
        for name, value in theirs.noted.items():
            writer.add(name, np.asarray(value))
    return path


for kind in [Theirs, *MISTAKES]:
    found = compare(reference, write(kind))
    mine = Trace(HERE / f"{kind.__name__}.f64.safetensors")
    by_hand = origins({name: mine.array(name) for name in mine.records}, 1e-12)
    assert [origin.name for origin in found.origins] == by_hand
    print(f"{kind.__name__:11s} {'agrees' if found.agrees else 'differs at ' + ', '.join(o.name for o in found.origins)}")

# %% [markdown]
# The report adds what helps at once (on the command line:
# `oxidizr-ref trace compare reference.safetensors NoScale.f64.safetensors`):

# %% tags=["varies"]
found = compare(reference, HERE / "NoScale.f64.safetensors")
print("\n".join(line.replace(f"{HERE}/", "") for line in report(found).splitlines()[:16]))

# %% [markdown]
# "The other is 2.828427 times the reference": $\sqrt 8$, and $P = 8$. A constant factor with cosine 1 is a forgotten scale.
# The other reports speak as clearly:
#
# - `WrongPairs`: `q` and `k` differ, and at the first token they agree. Position 0 is not turned, whatever the pairs are.
# - `SeesAhead`: the elements of `masked_scores` that differ are those with $s = t + 1$, one above the diagonal.


# %%
def beyond(kind, name):
    """Where a value is wrong: positions along each axis."""
    theirs = kind(reference)
    theirs.forward()
    ours = reference.array(name)
    with np.errstate(invalid="ignore"):
        return np.argwhere(~np.isclose(ours, theirs.noted[name].reshape(ours.shape), rtol=1e-9, atol=0))


turned = beyond(WrongPairs, "layers.0.self_attn.q")
ahead = beyond(SeesAhead, "layers.0.self_attn.masked_scores")
print("WrongPairs: first token that differs:", turned[:, 1].min())
print("SeesAhead: s - t of all elements that differ:", np.unique(ahead[:, 3] - ahead[:, 2]))
assert turned[:, 1].min() == 1 and set(ahead[:, 3] - ahead[:, 2]) == {1}

# %% [markdown]
# ## What may an error be?
#
# In float64 the question hardly arises: rounding is $10^{-16}$, mistakes are not. But most programs compute in float32 or
# less. How far off may a *right* one be? Nobody can say beforehand what rounding does to each value: some are sums of
# thousands of terms, some are differences of nearly equal ones.
#
# So it is measured. The recorded step is done again in the precision in question, in several ways that are all right
# (plain, fused, every number shaken by a unit in its last place). The largest distance from float64 that a tensor shows
# there, times 16, is its **budget**.

# %% tags=["varies"]
granted = budgets(reference, "f32")


def relative_budget(name):
    """What float32 is granted, in units of the largest number of the tensor."""
    array = reference.array(name)
    return granted[name].largest / np.abs(array[np.isfinite(array)]).max()


computed = sorted((n for n, r in reference.records.items() if r.role in ("output", "gradient")), key=relative_budget)
for name in (computed[0], computed[len(computed) // 2], computed[-1]):
    print(f"float32 budget {relative_budget(name):.0e} of the largest number: {name}")

names = [name for name in reference.records if name in right.noted and name != "embed_tokens.output"]

figure, axes = plt.subplots(figsize=(9, 3.8))
in_f32 = {kind: compare(reference, write(kind, np.float32, "f32"), granted=granted) for kind in [Theirs, *MISTAKES]}
for kind, found in in_f32.items():
    used = [max(found.tensors[name].used, 1e-3) for name in names]
    axes.semilogy(used, "-", linewidth=3 if kind is Theirs else 1.3, label=kind.__name__)
axes.axhline(1, color="0.3", linestyle=":")
marks = [i for i, name in enumerate(names) if name.endswith(("input_layernorm.rms", "after_attention", "logits"))]
axes.set_xticks(
    marks,
    [
        names[i].replace("layers.", "layer ").replace(".input_layernorm.rms", "\nbegins").replace(".after_", "\nafter ")
        for i in marks
    ],
    fontsize=8,
)
axes.set(
    xlabel="values in the order of execution",
    ylabel="error / budget",
    title="their program in float32: until the mistake all is rounding",
    ylim=(1e-3, 1e7),
)
axes.legend(fontsize=8, ncols=3, loc="upper left")
plt.show()

# %% [markdown]
# The right program in float32 (blue, thick) stays below the line everywhere; a mistake is a cliff. Behind it everything is
# wrong, so the height of the curve there says little: **only the cliff's foot counts**. (`WrongPairs` comes down once more
# after `k`: the next value is that of `v`, which has nothing to do with positions.)
#
# Follow `WrongEps`, the smallest mistake, to the end of its curve. Who compares the losses in float32 acquits it:

# %%
for name in ("layers.0.input_layernorm.rms", "logits", "loss"):
    tensor = in_f32[WrongEps].tensors[name]
    print(f"WrongEps in float32, {name:28s} error {tensor.distance.max_rel:.0e}, {tensor.verdict}")
assert in_f32[WrongEps].tensors["loss"].verdict == "agrees" and not in_f32[WrongEps].agrees

# %% [markdown]
# Is there a mistake that float32 cannot show at all? There is, if it is smaller than rounding:


# %%
class EpsOutside(Theirs):
    """sqrt(mean(x²)) + eps, where sqrt(mean(x²) + eps) is meant, with an epsilon that makes the two nearly the same."""

    def rms_norm(self, name, x):
        ms = (x * x).mean(axis=-1, keepdims=True)
        rms = self.note(f"{name}.rms", (np.sqrt(ms) + self.eps / (2 * np.sqrt(ms))).astype(x.dtype))
        return self.note(f"{name}.output", x / rms * self.w[f"{name}.weight"])


for dtype, precision in ((np.float32, "f32"), (np.float64, "f64")):
    found = compare(reference, write(EpsOutside, dtype, precision))
    print(f"EpsOutside in {precision}: {'agrees' if found.agrees else f'differs first at {found.first.name}'}")

# %% [markdown]
# `EpsOutside` replaces $\sqrt{m + \varepsilon}$ by its first-order expansion $\sqrt m + \varepsilon/(2\sqrt m)$. The
# difference is $\varepsilon^2/(8 m^{3/2})$, some $10^{-9}$ of the result: below the rounding of float32, where nobody can
# see it and where it does no harm, and far above that of float64. Hence two rules. Compare in float64 if the program can be
# run in it; and *agrees* means: to within what this precision can show.
#
# ## Backwards
#
# A forward pass can be right and a gradient wrong. The trace has both. Somebody wrote the last part of the backward pass by
# hand, with $dy$ = the gradient of the norm's result:
#
# $$ y = \frac{x}{r} \circ w,\quad r = \sqrt{\overline{x^2} + \varepsilon}
#    \qquad\Longrightarrow\qquad dx = \frac{dy \circ w}{r} - \frac{x}{r^3}\,\overline{(dy \circ w \circ x)} $$
#
# and, in one version, forgot that $r$ depends on $x$: no second term.


# %%
def backward(theirs, second_term=True):
    n, w = theirs.noted, theirs.w
    e = np.exp(n["logits"] - n["logits"].max(axis=-1, keepdims=True))
    dlogits = (e / e.sum(axis=-1, keepdims=True) - np.eye(sizes.vocab_size)[theirs.targets]) / (B * T)
    theirs.note("logits.grad", dlogits)
    theirs.note("lm_head.weight.grad", np.einsum("btv,btd->vd", dlogits, n["norm.output"]))
    dy = theirs.note("norm.output.grad", dlogits @ w["lm_head.weight"])
    x, r = n["layers.1.output"], n["norm.rms"]
    theirs.note("norm.weight.grad", (dy * x / r).sum(axis=(0, 1)))
    dx = dy * w["norm.weight"] / r
    if second_term:
        dx = dx - x / r**3 * (dy * w["norm.weight"] * x).mean(axis=-1, keepdims=True)
    theirs.note("layers.1.output.grad", dx)


for second_term in (True, False):
    theirs = Theirs(reference)
    theirs.forward()
    backward(theirs, second_term)
    found = compare(reference, theirs.noted)  # arrays will do: no file is needed
    where = ", ".join(f"{o.name} ({o.record.op})" for o in found.origins)
    print(
        f"{'whole' if second_term else 'half '} gradient of the norm: {'agrees' if found.agrees else 'differs at ' + where}"
    )
    assert found.agrees == second_term

# %% [markdown]
# Such a model trains, only worse. Finite differences would have found it as well (notebook 03), if somebody had made them.
#
# ## Other names, other layouts
#
# Their names are not ours, and their queries are [B,H,T,P]. A *map* says how theirs becomes ours; maps for Hugging Face's
# models come with the package.

# %%
(HERE / "map.yaml").write_text("""names:
  - ours: layers.{i}.self_attn.q
    theirs: blocks.{i}.attn.q_rot
    do: ["permute(0, 2, 1, 3)"]
  - ours: layers.{i}.self_attn.probs
    theirs: blocks.{i}.attn.weights
""")
theirs = Theirs(reference)
theirs.forward()
renamed = {f"blocks.{i}.attn.q_rot": theirs.noted[f"layers.{i}.self_attn.q"].transpose(0, 2, 1, 3) for i in range(2)}
renamed |= {f"blocks.{i}.attn.weights": theirs.noted[f"layers.{i}.self_attn.probs"] for i in range(2)}
found = compare(reference, renamed, names=HERE / "map.yaml")
print(f"{len(found.tensors)} values compared through the map: {'agrees' if found.agrees else 'differs'}")
assert found.agrees and len(found.tensors) == 4

# %% [markdown]
# ## Exercises
#
# **1. The mystery.** The hidden cell defines `Mystery(Theirs)` with one mistake. Do not look. Find the name of the value
# that is wrong and, from what it was computed from and a few numbers, what the program does instead. Set `culprit` to the
# value's name, and `instead` to an array that you computed from `Mystery`'s own `noted` inputs and that equals what it has:
#
# ```python
# theirs = Mystery(reference); theirs.forward()
# assert culprit == compare(reference, theirs.noted).origins[0].name
# np.testing.assert_allclose(instead, theirs.noted[culprit], rtol=1e-12)
# ```


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
class Mystery(Theirs):
    """Gate and up are exchanged where they are combined."""

    def mlp(self, name, x):
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", self.note(f"{name}.activation", up / (1 + np.exp(-up)) * gate))


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
theirs = Mystery(reference)
theirs.forward()
found = compare(reference, theirs.noted)
culprit = found.origins[0].name
assert culprit == "layers.0.mlp.activation" and len(found.origins) == 1
print("wrong:", culprit, "- computed from", ", ".join(found.origins[0].inputs), "which are right")
gate, up = (theirs.noted[f"layers.0.mlp.{part}_proj.output"] for part in ("gate", "up"))
instead = up / (1 + np.exp(-up)) * gate
np.testing.assert_allclose(instead, theirs.noted[culprit], rtol=1e-12)
print("silu is applied to up instead of gate")

# %% [markdown]
# **2. Groups of heads.** With 4 query heads on 2 key/value heads, query heads 0 and 1 belong to key head 0. Somebody writes
# `np.tile(x, (1, 1, H // K, 1))`: key heads 0, 1, 0, 1. Before you run it: which value will be the origin, and why not `k`?
# Then repair it for the keys and leave it for the values. Which is it now?
#
# ```python
# assert predicted == [o.name for o in compare(reference, run(Tiled)).origins]
# assert predicted_then == [o.name for o in compare(reference, run(TiledValues)).origins]
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def run(kind):
    theirs = kind(reference)
    theirs.forward()
    return theirs.noted


class Tiled(Theirs):
    def for_all_heads(self, x):
        return np.tile(x, (1, 1, H // K, 1))


class TiledValues(Theirs):
    calls = 0

    def for_all_heads(self, x):  # called for keys first, then for values
        self.calls += 1
        return np.tile(x, (1, 1, H // K, 1)) if self.calls % 2 == 0 else super().for_all_heads(x)


predicted = ["layers.0.self_attn.scores"]  # k is noted before it is repeated, and is right
predicted_then = ["layers.0.self_attn.context"]  # scores and probs are right now; values are mixed by the wrong heads
assert predicted == [o.name for o in compare(reference, run(Tiled)).origins]
assert predicted_then == [o.name for o in compare(reference, run(TiledValues)).origins]
heads = np.unique(beyond(Tiled, "layers.0.self_attn.scores")[:, 1])
assert heads.tolist() == [1, 2]
print("query heads whose scores are wrong:", heads.tolist(), "- 0 and 3 got the right key head either way")

# %% [markdown]
# **3. Two at once.** Write `Two(WrongPairs)` in which, besides, the values are computed from the residual stream `h` and
# not from its norm. The first wrong value is one, the origins are three. Why does the second mistake not hide behind the
# first?
#
# ```python
# found = compare(reference, run(Two))
# assert {o.name for o in found.origins} == {f"layers.0.self_attn.{n}" for n in ("q", "k", "v_proj.output")}
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
class Two(WrongPairs):
    def linear(self, name, x):
        if not name.endswith("v_proj"):
            return super().linear(name, x)
        i = int(name.split(".")[1])
        h = self.noted["embed_tokens.output" if i == 0 else f"layers.{i - 1}.output"]
        return super().linear(name, h)


found = compare(reference, run(Two))
assert {o.name for o in found.origins} == {f"layers.0.self_attn.{n}" for n in ("q", "k", "v_proj.output")}
print("origins:", ", ".join(o.name for o in found.origins))
print("v is not computed from q or k: all of its inputs are right, so it has to answer for itself")

# %% [markdown]
# **4. Fewer names.** A framework's hooks often give only the results of modules. Keep of `noted` the names that end in
# `.output`. What is the origin of each of the five mistakes now, and what has it been computed from? Which additional name
# tells `NoScale` from `SeesAhead`?
#
# ```python
# assert coarse[WrongPairs] == coarse[NoScale] == coarse[SeesAhead] == ["layers.0.self_attn.o_proj.output"]
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def only_modules(kind, *more):
    return {name: value for name, value in run(kind).items() if name.endswith((".output", *more))}


coarse = {kind: [o.name for o in compare(reference, only_modules(kind)).origins] for kind in MISTAKES}
assert coarse[WrongPairs] == coarse[NoScale] == coarse[SeesAhead] == ["layers.0.self_attn.o_proj.output"]
assert coarse[Transposed] == ["layers.1.self_attn.o_proj.output"] and coarse[WrongEps] == ["layers.0.input_layernorm.output"]
print("computed from:", ", ".join(compare(reference, only_modules(NoScale)).origins[0].inputs))
for kind in (NoScale, SeesAhead):
    print(kind.__name__, "with the scores as well:", compare(reference, only_modules(kind, ".scores")).origins[0].name)

# %% [markdown]
# ## Where to read on
#
# - [Traces](../docs/traces.md), [what a trace shows](../docs/what_a_trace_shows.md): two real mistakes in a Mamba2 found in
#   this way; [all names](../docs/trace_names.md); [the format](../docs/trace_format.md);
#   [the golden set](../docs/golden_traces.md).
# - [How budgets were chosen](../docs/decisions/2026-11-26-error-budgets.md), and how often right programs were accused
#   (never, in 400 comparisons) and planted mistakes found (all 55).
# - In your tests: the fixture `golden` of the pytest plugin.
# - J. Su et al., "RoFormer", 2021, section 3.4.2 (pairs 2i, 2i+1); H. Touvron et al., "LLaMA", 2023; B. Zhang, R. Sennrich,
#   "Root mean square layer normalization", NeurIPS 2019; J. Ainslie et al., "GQA", 2023.
# - Next: [17 · Train, generate, publish](17_train_generate_publish.ipynb).

# %%
temporary.cleanup()
