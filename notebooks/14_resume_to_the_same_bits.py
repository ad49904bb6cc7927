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
# # 14 · Resume to the same bits: break it, and find each break
#
# A long training run is stopped and continued: by a crash, a time limit, a reboot. Most trainers continue *roughly*: the
# loss goes on falling, and nobody can tell whether the second half is the one that was meant. Here a run must continue
# *exactly*, and exactness can be tested with `==`.
#
# **After this you can**
#
# - say what the state of a training run is, and why a file that lacks one number of it cannot be continued exactly;
# - write a trainer of some 60 lines that resumes to the same bits from every step, and prove that with SHA-256;
# - recognize six classic mistakes by what they do: which resume shows them, the first step that differs, the first tensor;
# - test your own trainer for them: at every step, through a round trip, with a journal.
#
# **Needs** notebooks 11 (AdamW, schedules) and 13 (a checkpoint, byte by byte). **Time** 40 minutes.

# %%
import functools
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import AdamW, LanguageModel, Trainer, checkpoint, load_config, rng
from oxidizr_ref.checkpoint import difference
from oxidizr_ref.data import bundled_corpus
from oxidizr_ref.errors import OxidizrError
from oxidizr_ref.run import Reporter, RunOptions

temporary = tempfile.TemporaryDirectory()
HERE = Path(temporary.name)

# %% [markdown]
# ## What has to be saved
#
# Let $s_n$ be everything that training step $n+1$ reads and that is not a constant: weights, moments, counters. A step is a
# function
#
# $$ s_{n+1} = F(s_n;\ \text{config},\ \text{seed},\ \text{data}) $$
#
# If $F$ has no other input (no clock, no generator hidden in a library, no order in which threads finish) then a run is the
# sequence $s_0, s_1 = F(s_0), s_2 = F(F(s_0)), \dots$, and it does not matter whether one process computes it or ten. So
# resuming is exact if and only if
#
# 1. the file holds all of $s_n$, or what all of $s_n$ can be computed from, with every bit; and
# 2. $F$ is deterministic.
#
# Notebook 15 is about the second. This one is about the first, and about noticing when it fails.
#
# There are two ways to have random numbers in $F$. *In order*: a generator whose hidden state moves with every draw; that
# state belongs to $s_n$. *By address*: word $i$ of the stream (seed, name, step) is a function of these alone, so that
# nothing belongs to $s_n$ but the step. `oxidizr_ref` draws by address, with the counter-based generator Philox (Salmon et
# al. 2011):

# %%
for step in (1, 2, 1):
    print(f"step {step}:", rng.uniform(seed=0, stream="dropout", name="demo", step=step, count=4).round(4))

# %% [markdown]
# Step 1 gives the same numbers whenever it is asked. The order of the data is made in the same way: the permutation of
# epoch $e$ is a function of (seed, $e$), and the position in it follows from one number, the *cursor*: how many examples
# have been consumed since the beginning of the run.
#
# ## A trainer to break
#
# A model of characters (after Bengio et al. 2003): three characters are looked up in a table $E$, joined to a row $x$, and
# predict the fourth.
#
# $$ h = \tanh(x W_1^\top) \circ m, \qquad \text{logits} = h W_2^\top, \qquad
#    L = -\tfrac1B \sum_b \log \text{softmax}(\text{logits}_b)_{y_b} $$
#
# $m$ is a dropout mask, so that a step needs random numbers. The gradients, by hand:
# $dL/d\,\text{logits} = (\text{softmax} - \text{onehot}(y))/B$, and from there backwards, line by line.

# %%
B, MICRO, STEPS, WARMUP, PEAK = 16, 2, 24, 4, 0.02  # batch, micro-batches a step, steps in all, warm-up steps, rate
TEXT = np.frombuffer(bundled_corpus().read_bytes()[: 320 + 3], dtype=np.uint8).astype(np.int64)
EXAMPLES = len(TEXT) - 3  # 320: an epoch is 10 steps of 2 x 16 examples
SHAPES = {"E": (128, 8), "W1": (32, 24), "W2": (128, 32)}


def loss_and_gradients(w, x, y, mask):
    """x [B,3], y [B] characters; mask [B,32]. Returns the mean loss and dL/dw by name."""
    rows = w["E"][x].reshape(B, 24)
    tanh = np.tanh(rows @ w["W1"].T)  # [B,32]
    h = tanh * mask
    logits = h @ w["W2"].T  # [B,128]
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = e / e.sum(axis=1, keepdims=True)
    dlogits = (probs - np.eye(128)[y]) / B
    dpre = (dlogits @ w["W2"]) * mask * (1 - tanh**2)  # [B,32]
    dE = np.zeros_like(w["E"])
    np.add.at(dE, x, (dpre @ w["W1"]).reshape(B, 3, 8))  # a character that occurs twice gets both gradients
    return -np.log(probs[np.arange(B), y]).mean(), {"E": dE, "W1": dpre.T @ rows, "W2": dlogits.T @ h}


# %% [markdown]
# Before anything is built on them: are they right? Against central differences, in one random direction.

# %%
w = {name: rng.normal(1, "init", name, shape, 0.3).astype(np.float64) for name, shape in SHAPES.items()}
u = {name: rng.normal(1, "direction", name, shape).astype(np.float64) for name, shape in SHAPES.items()}
x, y = TEXT[:48].reshape(16, 3), TEXT[100:116]
mask = np.ones((B, 32))
_, g = loss_and_gradients(w, x, y, mask)
high, low = (loss_and_gradients({n: w[n] + s * 1e-5 * u[n] for n in w}, x, y, mask)[0] for s in (1, -1))
numeric, exact = (high - low) / 2e-5, sum((g[n] * u[n]).sum() for n in w)
print(f"directional derivative: {exact:.8f} by hand, {numeric:.8f} by differences")
assert abs(numeric - exact) < 1e-7 * abs(exact)

# %% [markdown]
# Now the run. Its state is `weights`, the moments `m` and `v`, and three counters. Everything else is recomputed: the batch
# from `cursor`, the mask and the learning rate from the number of the step.
#
# Each step also writes a line into a **journal**: short digests of what it used, in the order in which it used it. It costs
# little and will be worth much.


# %%
def digest(*arrays):
    """Eight hexadecimal digits that stand for all the bits of some arrays."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:8]


class Run:
    """A run of the character model, all in float64."""

    def __init__(self, seed=0):
        self.seed, self.step, self.cursor, self.updates = seed, 0, 0, 0
        self.weights = {n: rng.normal(seed, "init", n, shape, 0.3).astype(np.float64) for n, shape in SHAPES.items()}
        self.m = {n: np.zeros(shape) for n, shape in SHAPES.items()}
        self.v = {n: np.zeros(shape) for n, shape in SHAPES.items()}
        self.journal = []

    def order(self, epoch):  # of the examples
        return rng.permutation(self.seed, "shuffle", epoch, EXAMPLES)

    def batch(self, cursor):
        """Examples cursor … cursor+B-1 of the run: [B,3] and [B]. B divides EXAMPLES, so they are of one epoch."""
        places = self.order(cursor // EXAMPLES)[cursor % EXAMPLES :][:B]
        return TEXT[places[:, None] + np.arange(3)], TEXT[places + 3]

    def mask(self, n, micro):
        """The dropout mask of micro-batch ``micro`` of step ``n``: each unit is kept with probability 0.9."""
        return (rng.uniform(self.seed, "dropout", f"micro {micro}", n, B * 32) < 0.9).reshape(B, 32) / 0.9

    def learning_rate(self, n):
        """Of step n = 1, 2, …: a linear warm-up, then a cosine down to zero."""
        if n <= WARMUP:
            return PEAK * n / WARMUP
        return PEAK * 0.5 * (1 + math.cos(math.pi * (n - 1 - WARMUP) / (STEPS - WARMUP)))


# %% [markdown]
# The step itself, with AdamW (Loshchilov & Hutter 2019) without decay: $m \leftarrow \beta_1 m + (1-\beta_1) g$,
# $v \leftarrow \beta_2 v + (1-\beta_2) g^2$, $w \leftarrow w - \eta\, \hat m / (\sqrt{\hat v} + \varepsilon)$ with
# $\hat m = m/(1-\beta_1^t)$, $\hat v = v/(1-\beta_2^t)$, where $t$ counts updates from 1.


# %%
def train_step(self):
    n = self.step + 1
    parts = [(*self.batch(self.cursor + i * B), self.mask(n, i)) for i in range(MICRO)]
    losses, gradients = zip(*(loss_and_gradients(self.weights, *part) for part in parts))
    g = {name: sum(each[name] for each in gradients) / MICRO for name in SHAPES}
    rate = self.learning_rate(n)
    self.updates += 1
    for name in SHAPES:
        self.m[name] = 0.9 * self.m[name] + 0.1 * g[name]
        self.v[name] = 0.999 * self.v[name] + 0.001 * g[name] ** 2
        m_hat, v_hat = self.m[name] / (1 - 0.9**self.updates), self.v[name] / (1 - 0.999**self.updates)
        self.weights[name] = self.weights[name] - rate * m_hat / (np.sqrt(v_hat) + 1e-8)
    self.step, self.cursor = n, self.cursor + MICRO * B
    self.journal.append(
        {
            "step": n,
            "loss": float(np.mean(losses)),
            "batch": digest(*(a for p in parts for a in p[:2])),
            "mask": digest(*(p[2] for p in parts)),
            "gradient": digest(*g.values()),
            "rate": rate,
            "moments": digest(*self.m.values(), *self.v.values()),
            "weights": digest(*self.weights.values()),
        }
    )


Run.train_step = train_step

# %% [markdown]
# Saving and loading go through the package's `checkpoint`, a safetensors file with a digest of every tensor (notebook 13).
# `cursor` and `updates` follow from the step here; the file has `cursor` because a later config may take another batch
# size.


# %%
def save(self, path):
    tensors = {**self.weights, **{f"optimizer.m.{n}": a for n, a in self.m.items()}}
    tensors |= {f"optimizer.v.{n}": a for n, a in self.v.items()}
    checkpoint.save(path, tensors, {"progress": json.dumps({"cursor": self.cursor, "step": self.step})})


def load(self, path):
    file = checkpoint.load(path)  # verified: raises if a bit has changed
    self.weights = {n: file.tensors[n] for n in SHAPES}
    self.m = {n: file.tensors[f"optimizer.m.{n}"] for n in SHAPES}
    self.v = {n: file.tensors[f"optimizer.v.{n}"] for n in SHAPES}
    progress = json.loads(file.metadata["progress"])
    self.step, self.cursor, self.updates = progress["step"], progress["cursor"], progress["step"]


Run.save, Run.load = save, load


def straight(kind, steps=STEPS):
    """A run without interruption."""
    run = kind()
    for _ in range(steps):
        run.train_step()
    return run


def interrupted(kind, at, steps=STEPS):
    """A run that saves after step ``at``; another object loads that file, knowing nothing else, and goes on to the end."""
    path = HERE / f"{kind.__name__}_{at}.safetensors"
    straight(kind, at).save(path)
    run = kind()
    run.load(path)
    while run.step < steps:
        run.train_step()
    return run


whole = straight(Run)
print(
    f"loss: {whole.journal[0]['loss']:.3f} at step 1 (ln 128 = {math.log(128):.3f}), "
    f"{whole.journal[-1]['loss']:.3f} at step {STEPS}"
)

# %% [markdown]
# **The promise, as a test.** A file after step 24 of the straight run, and one of a run interrupted at each of 0 … 23:


# %%
def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def last_file(run):
    run.save(HERE / "last.safetensors")
    return sha256(HERE / "last.safetensors")


wanted = last_file(whole)
exact = [last_file(interrupted(Run, at)) == wanted for at in range(STEPS)]
print(f"{sum(exact)} of {STEPS} interrupted runs end with the same file, byte for byte")
assert all(exact)

# %% [markdown]
# No tolerance was needed, and none would do: a tolerance that lets rounding pass lets small mistakes pass, too.
#
# ## Six mistakes
#
# Each is the run above with one method changed. All are easily made, and none of them crashes.


# %%
class MomentsLost(Run):
    """The weights are loaded, the optimizer starts afresh."""

    def load(self, path):
        super().load(path)
        self.m = {n: np.zeros(shape) for n, shape in SHAPES.items()}
        self.v = {n: np.zeros(shape) for n, shape in SHAPES.items()}


class CountOffByOne(Run):
    """Updates are counted from 0 in one place and from 1 in another: the bias correction is that of the update before."""

    def load(self, path):
        super().load(path)
        self.updates = max(0, self.step - 1)


class RandomInOrder(Run):
    """The mask comes from a generator that is not in the file."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.generator = np.random.default_rng(seed)

    def mask(self, n, micro):
        return (self.generator.random((B, 32)) < 0.9) / 0.9


# %%
class ShuffledAnew(Run):
    """The cursor is kept, but the order of an epoch is drawn when it begins, from a generator that is not in the file."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.generator, self.orders = np.random.default_rng(seed), {}

    def order(self, epoch):
        if epoch not in self.orders:
            self.orders[epoch] = self.generator.permutation(EXAMPLES)
        return self.orders[epoch]


class ScheduleRestarted(Run):
    """The schedule counts the steps of this process, not those of the run: warm-up again."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.began_at = 0

    def load(self, path):
        super().load(path)
        self.began_at = self.step

    def learning_rate(self, n):
        return super().learning_rate(n - self.began_at)


class RoundedOnTheWay(Run):
    """Computed in float64, stored in float32: "seven digits are enough"."""

    def save(self, path):
        tensors = {**self.weights, **{f"optimizer.m.{n}": a for n, a in self.m.items()}}
        tensors |= {f"optimizer.v.{n}": a for n, a in self.v.items()}
        small = {n: a.astype(np.float32) for n, a in tensors.items()}
        checkpoint.save(path, small, {"progress": json.dumps({"cursor": self.cursor, "step": self.step})})

    def load(self, path):
        super().load(path)
        for arrays in (self.weights, self.m, self.v):
            arrays.update({n: a.astype(np.float64) for n, a in arrays.items()})


MISTAKES = [MomentsLost, CountOffByOne, RandomInOrder, ShuffledAnew, ScheduleRestarted, RoundedOnTheWay]

# %% [markdown]
# ### Would you see it?
#
# Each is interrupted after step 13 and goes on. Left, what everybody looks at. Right, what nobody looks at: the largest
# distance of a weight from the straight run *of the same class*.


# %%
def distance(a, b):
    return max(np.abs(a.weights[n] - b.weights[n]).max() for n in SHAPES)


def distances(kind, at):
    """Largest |weight - weight| after each step from ``at`` on."""
    one, other = straight(kind, at), kind()
    one.save(HERE / "d.safetensors")
    other.load(HERE / "d.safetensors")
    found = [distance(one, other)]
    while one.step < STEPS:
        one.train_step(), other.train_step()
        found.append(distance(one, other))
    return found, one.journal, other.journal


AT = 13
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
straight_losses = [line["loss"] for line in whole.journal]
left.plot(range(1, STEPS + 1), straight_losses, color="0.6", linewidth=5, label="straight")
for kind, color, dash in zip(MISTAKES, COLORS.values(), ["-", "--", "-.", ":", "--", "-"]):
    found, _, journal = distances(kind, AT)
    left.plot([line["step"] for line in journal], [line["loss"] for line in journal], dash, color=color, linewidth=1)
    right.semilogy(range(AT, STEPS + 1), [d or np.nan for d in found], dash, color=color, label=kind.__name__)
left.set(xlabel="step", ylabel="loss (nats a character)", title="the loss: which of these runs would you stop?")
left.legend()
right.set(xlabel="step", ylabel="largest |difference| of a weight", title="the weights", ylim=(1e-13, 10))
right.legend(fontsize=7, loc="lower right")
plt.show()

# %% [markdown]
# All of them go on falling. Five stay within what the loss jumps from batch to batch anyway. The one that stands out is the
# restarted schedule, and it looks *better*: it trains at a high rate where the cosine had come down. Training forgives
# nearly everything, and so such mistakes can live for years. (Grey is the straight run with addressed masks and shuffles;
# `RandomInOrder` and `ShuffledAnew` are other, equally good runs even without interruption, so they are compared with their
# own straight run.)
#
# ### First method: interrupt at *every* step
#
# One test of one resume is not enough. For each mistake and each step: does the interrupted run end with the same bits, and
# if not, which is the first step that differs?


# %%
@functools.cache  # the same for every step at which the other run is interrupted
def straight_journal(kind):
    return straight(kind).journal


def first_difference(kind, at):
    """The first step whose journal lines differ, and in which entries (the loss left out); None if the runs agree."""
    for line, other in zip(straight_journal(kind)[at:], interrupted(kind, at).journal, strict=True):
        differing = [key for key in line if key != "loss" and line[key] != other[key]]
        if differing:
            return line["step"], differing
    return None


seen = {kind: [first_difference(kind, at) for at in range(STEPS)] for kind in MISTAKES}
grid = np.array([[0 if f is None else 1 for f in seen[kind]] for kind in MISTAKES])
figure, axes = plt.subplots(figsize=(8, 2.4))
axes.imshow(grid, cmap="cividis", aspect="auto", vmin=0, vmax=1.3)
axes.set(
    xlabel="interrupted after step",
    ylabel="mistake",
    title="bright: the resumed run differs; dark: it does not, and a test there proves nothing",
)
axes.set_yticks(range(len(MISTAKES)), [kind.__name__ for kind in MISTAKES])
axes.set_xticks(range(0, STEPS, 2))
axes.grid(False)
plt.show()
for kind in MISTAKES:
    print(f"{kind.__name__:18s} not seen when interrupted after step", [at for at, f in enumerate(seen[kind]) if f is None])

# %% [markdown]
# Look at `ShuffledAnew`: while the first epoch is not over (it takes 10 steps here) the fresh generator happens to draw the
# same order again, so that every resume there is exact, also beyond the end of the epoch. Who tests with "train 4, stop,
# resume, compare" ships it. At step 0 none is seen: nothing has happened yet that could be lost. (`RoundedOnTheWay` is not
# either, because the first weights here are float32 numbers. After one step they are not.)
#
# ### Second method: the round trip
#
# Load a file and save at once, without a step between. If the bytes differ, something was lost *on the way in*.


# %%
def round_trip(kind, at):
    """Whether a file that is loaded and saved again is the same file."""
    straight(kind, at).save(HERE / "a.safetensors")
    run = kind()
    run.load(HERE / "a.safetensors")
    run.save(HERE / "b.safetensors")
    return difference.compare(HERE / "a.safetensors", HERE / "b.safetensors")


for kind in [Run, *MISTAKES]:
    back = round_trip(kind, AT)
    names = sorted({t.name.rsplit(".", 1)[0] + ".*" if "." in t.name else t.name for t in back.tensors})
    print(f"{kind.__name__:18s} {'the same file' if back.equal else 'differs in ' + ', '.join(names)}")
assert [kind for kind in MISTAKES if not round_trip(kind, AT).equal] == [MomentsLost]

# %% [markdown]
# Cheap, precise, and blind for five of six. It cannot see what is *not in the file*: a generator's state, a count that is
# derived wrongly. Nor does it see rounding: what was rounded once is rounded to itself the second time. **Compare what the
# processes compute, not what the files say.**
#
# ### Third method: the first step that differs, tensor by tensor
#
# Both runs save after step $N+1$, and `checkpoint.difference.compare` (on the command line `oxidizr-ref diff A B`) says
# where the two files differ. *Which* tensors differ after one step says where the mistake entered.


# %%
def after_one_step(kind, at):
    a = straight(kind, at + 1)
    b = interrupted(kind, at, at + 1)
    a.save(HERE / "a.safetensors"), b.save(HERE / "b.safetensors")
    return difference.compare(HERE / "a.safetensors", HERE / "b.safetensors")


scale = {name: np.abs(array).max() for name, array in checkpoint.load(HERE / "last.safetensors").tensors.items()}
print(f"{'':18s}          m         v   weights")
for kind in MISTAKES:
    largest = {"optimizer.m": 0.0, "optimizer.v": 0.0, "weights": 0.0}
    for t in after_one_step(kind, AT).tensors:
        part = t.name.rsplit(".", 1)[0] if "." in t.name else "weights"
        largest[part] = max(largest[part], t.distance.max_abs / scale[t.name])
    print(f"{kind.__name__:18s}", " ".join(f"{error:9.0e}" if error else "    equal" for error in largest.values()))

# %% [markdown]
# The largest difference in each kind of tensor, in units of the tensor's largest number, one step after the resume. Read it
# as a doctor reads a table:
#
# - **moments equal, weights not**: the gradient was right, for the moments are made of it. The mistake is behind them, in
#   the update: the count $t$ of the bias correction, or the rate. Two candidates, `CountOffByOne` and `ScheduleRestarted`.
# - **everything differs, the moments by a tenth or more**: the gradient was another one (batch, mask), or the moments were
#   gone.
# - **everything differs, by about $10^{-7}$**: a float32 number went through here. $2^{-24} = 6 \cdot 10^{-8}$ is the
#   rounding of float32; $10^{-3}$ would smell of bfloat16, a round power of ten of decimal text.
#
# ### Fourth method: the journal
#
# The tensors say *what* is off, the journal *since when in the step*. Its entries stand in the order in which a step
# computes them: batch, mask, gradient, rate, moments, weights. The first that differs is where the mistake is; what follows
# from it differs, too.

# %%
for kind in MISTAKES:
    step, differing = seen[kind][AT]
    print(f"{kind.__name__:18s} step {step}: first {differing[0]:9s} then {', '.join(differing[1:])}")

# %% [markdown]
# Batch: the data. Mask: the random numbers. Rate: the schedule. Moments first, with gradient and rate as they should be:
# they were wrong before. Weights first: what is left, the count. Gradient first, with batch and mask right: the weights it
# was computed from were not the same. Each of the six has another signature, and nobody had to look at a loss.
#
# `oxidizr_ref` keeps such a journal on demand, with *all* numbers of a step instead of digests: a golden trace, notebook
# 16.

# %%
signatures = {kind: seen[kind][AT][1][0] for kind in MISTAKES}
assert signatures == {
    MomentsLost: "moments",
    CountOffByOne: "weights",
    RandomInOrder: "mask",
    ShuffledAnew: "batch",
    ScheduleRestarted: "rate",
    RoundedOnTheWay: "gradient",
}

# %% [markdown]
# ## Two that need no resume
#
# **The order of a set.** Python's `hash` of a string changes from process to process, and with it the order of a set of
# names. Add gradients, or draw random numbers, in that order, and two runs of the same program differ. In one process you
# will never see it:

# %%
program = 'print(" ".join({"embed", "attn", "mlp", "norm", "head", "bias"}))'
orders = [
    subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": str(seed)}, capture_output=True, text=True).stdout
    for seed in range(8)
]
assert len(set(orders)) > 1
print("8 processes, one program, more than one order")

# %% [markdown]
# The cure is a sorted list, or a dict, which keeps the order of insertion. (In `oxidizr_ref` that is a rule: the order of a
# set may reach no number and no file.)
#
# **Decimal text.** Progress, loss scales and learning rates travel through JSON. Python writes a float64 with as many
# digits as it takes to read the same bits again, so `json` is exact. Formatting is not:

# %%
rate = whole.journal[9]["rate"]
for text in (json.dumps(rate), f"{rate:.6g}", f"{rate:.15g}", f"{rate:.17g}", rate.hex()):
    back = float.fromhex(text) if "x" in text else float(text)
    print(
        f"{text:24s} {'exact' if back == rate else f'off by {abs(back - rate) / math.ulp(rate):,.0f} units of the last bit'}"
    )
assert json.loads(json.dumps(rate)) == rate

# %% [markdown]
# ## The same with the package
#
# `oxidizr_ref.Trainer`, on a small Llama with a cosine schedule and two micro-batches a step. First a run of 8 steps
# without interruption. Then for each step a process that dies there: a reporter that raises, as a kill would end it, after
# the step was logged and *before* it is saved. Nothing of that process survives but its files.


# %%
class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer catches it."""


class KillAfter(Reporter):
    def __init__(self, step):
        self.at = step

    def step(self, record, logged):
        if record["step"] == self.at:
            raise Killed


N = 8
SETTINGS = [f"max_steps={N}", "warmup_steps=2", "gradient_accumulation=2", "max_seq_len=16"]
SETTINGS += ["save_interval=1", "max_checkpoints=0", "target_device=cpu"]


def config(directory):
    return load_config("tiny-llama", [*SETTINGS, f"checkpoint_dir={directory}"])


def fit(directory, reporter=None, **options):
    c = config(directory)
    Trainer(c, LanguageModel(c.model, seed=0), options=RunOptions(**options), reporter=reporter).fit()


def step_files(directory):
    return {n: sha256(directory / f"step_{n}.safetensors") for n in range(1, N + 1)}


fit(HERE / "straight")
wanted = step_files(HERE / "straight")
for at in range(1, N + 1):
    directory = HERE / f"killed at {at}"
    try:
        fit(directory, KillAfter(at))
    except Killed:
        fit(directory, resume="auto")
    assert step_files(directory) == wanted
print(f"killed after each of {N} steps and resumed: {N} x {N} files, all with the sha256sum of the straight run")

# %% [markdown]
# And once in earnest: another process, the real command, the real SIGKILL, at whatever moment it comes.

# %%
command = [sys.executable, "-m", "oxidizr_ref", "train", "-f", "tiny-llama", "--headless"]
command += ["--checkpoint-dir", str(HERE / "real")]
for setting in SETTINGS:
    command += ["--set", setting]
process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while not (HERE / "real" / "step_3.safetensors").exists() and process.poll() is None:
    time.sleep(0.001)
process.kill()  # SIGKILL, which nothing can catch
process.wait()
subprocess.run([*command, "--resume", "auto"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
assert step_files(HERE / "real") == wanted
print(f"killed while it trained, and resumed: the same {N} files")

# %% [markdown]
# ### Planting a mistake in the package
#
# The optimizer's count one too low after loading, as in `CountOffByOne`. A copy of `step_4` goes to a directory of its own,
# is resumed there, and `step_5` is held against the true one.

# %%
right_way = AdamW.load_state_dict


def off_by_one(self, arrays, updates):
    right_way(self, arrays, updates - 1)


def resume_copy(name, at=4):
    """Resume a copy of the straight run's step ``at`` in a directory of its own, and compare the next step's file."""
    directory = HERE / name
    directory.mkdir()
    (directory / f"step_{at}.safetensors").write_bytes((HERE / "straight" / f"step_{at}.safetensors").read_bytes())
    fit(directory, resume="auto")
    next_file = f"step_{at + 1}.safetensors"
    return difference.compare(HERE / "straight" / next_file, directory / next_file)


assert resume_copy("without").equal
with mock.patch.object(AdamW, "load_state_dict", off_by_one):
    found = resume_copy("with")
moments = [t.name for t in found.tensors if t.name.startswith("optimizer")]
print(
    f"{len(found.tensors)} of {found.compared} tensors differ; moments: {len(moments)}; metadata: {len(found.metadata)}"
)
print(f"so the gradients were right and the update was not; first {found.first}")
assert found.tensors and not moments

# %% [markdown]
# ### Is every number needed?
#
# That resuming is exact shows that *enough* is saved. The other half: nothing is saved in vain. Each part of the file is
# changed in turn, with digests that are right again, and resumed. Either the run refuses, or step 5 has other bytes. A part
# whose change does neither would be dead weight, or a sign that it is saved and never read: the moments that are written
# and not loaded.


# %%
def changed(part):
    """Step 4 with one part changed, resumed: a refusal, or what step 5 is like."""
    directory = HERE / f"changed {part}"
    directory.mkdir()
    file = checkpoint.load(HERE / "straight" / "step_4.safetensors")
    tensors, metadata = dict(file.tensors), dict(file.metadata)
    if part in tensors:
        tensors[part] = np.nextafter(tensors[part], np.float32(9))  # every number one unit in its last place up
    else:
        key, _, name = part.partition(".")
        value = json.loads(metadata[key])
        owner = value
        *path, last = name.split(".")
        for step in path:
            owner = owner[step]
        owner[last] = owner[last] + 1 if isinstance(owner[last], int) else "0" * 64
        metadata[key] = json.dumps(value, sort_keys=True, separators=(",", ":"))
    checkpoint.save(directory / "backup.safetensors", tensors, metadata)
    try:
        fit(directory / "run", resume=str(directory / "backup.safetensors"))
    except OxidizrError as error:
        return f"refused: {type(error).__name__}"
    same = (directory / "run" / "step_5.safetensors").exists() and sha256(
        directory / "run" / "step_5.safetensors"
    ) == wanted[5]
    return "NOTHING HAPPENS" if same else "other bytes"


name = "layers.0.mlp.up_proj.weight"
parts = [name, f"optimizer.exp_avg.{name}", f"optimizer.exp_avg_sq.{name}", "progress.step", "progress.cursor"]
parts += ["config.trainer.seed", "config.model.num_heads", "data.digest", "tokenizer.digest"]
results = {part: changed(part) for part in parts}
for part, result in results.items():
    print(f"{part:50s} {result}")
assert "NOTHING HAPPENS" not in results.values()

# %% [markdown]
# The tests do this for every tensor and field of every architecture ([docs/checkpoints.md](../docs/checkpoints.md)).
#
# ## Exercises
#
# **1. Half a step.** A run that is told to stop *between two micro-batches* has added up half a gradient. `oxidizr_ref`
# throws that half away and saves the last whole step. Do the other thing: write `Careful(Run)` with a method `half_step()`
# that computes the first micro-batch only, a `save` that keeps the half gradient, and a `train_step` that finishes what is
# half done. From every step, stopped in the half, it must end with the bits of `Run`:
#
# ```python
# wanted = last_tensors(straight(Run))
# assert all(last_tensors(stopped_in_the_half(at)) == wanted for at in range(STEPS))
# ```
#
# Which costs more: the half step that is thrown away, or the gradient in the file?


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
class Careful(Run):
    """Keeps the gradient of a first micro-batch across a save. The journal is left out."""

    half = None  # the gradient of the first micro-batch of step self.step + 1, by name

    def _micro(self, micro):
        n = self.step + 1
        return loss_and_gradients(self.weights, *self.batch(self.cursor + micro * B), self.mask(n, micro))[1]

    def half_step(self):
        self.half = self._micro(0)

    def train_step(self):
        first = self.half if self.half is not None else self._micro(0)
        second, self.half = self._micro(1), None
        g = {name: sum((first[name], second[name])) / MICRO for name in SHAPES}  # in the same order as in Run
        self.updates += 1
        for name in SHAPES:
            self.m[name] = 0.9 * self.m[name] + 0.1 * g[name]
            self.v[name] = 0.999 * self.v[name] + 0.001 * g[name] ** 2
            m_hat, v_hat = self.m[name] / (1 - 0.9**self.updates), self.v[name] / (1 - 0.999**self.updates)
            rate = self.learning_rate(self.updates)
            self.weights[name] = self.weights[name] - rate * m_hat / (np.sqrt(v_hat) + 1e-8)
        self.step, self.cursor = self.step + 1, self.cursor + MICRO * B

    def save(self, path):
        super().save(path)
        if self.half is not None:
            file = checkpoint.load(path)
            checkpoint.save(path, {**file.tensors, **{f"half.{n}": a for n, a in self.half.items()}}, file.metadata)

    def load(self, path):
        super().load(path)
        tensors = checkpoint.load(path).tensors
        self.half = {n: tensors[f"half.{n}"] for n in SHAPES} if "half.E" in tensors else None


def last_tensors(run):
    return digest(*run.weights.values(), *run.m.values(), *run.v.values())


def stopped_in_the_half(at):
    run = straight(Careful, at)
    run.half_step()
    run.save(HERE / "half.safetensors")
    again = Careful()
    again.load(HERE / "half.safetensors")
    while again.step < STEPS:
        again.train_step()
    return again


wanted_tensors = last_tensors(straight(Run))
assert all(last_tensors(stopped_in_the_half(at)) == wanted_tensors for at in range(STEPS))
print("exact from every half step; the file is a third larger (weights, m, v and now g), to save at most one step of work")

# %% [markdown]
# **2. Find it.** The hidden cell below defines `Mystery(Run)`, with one mistake. Do not look. Use the four methods, and set
# `verdict` to one of `"batch"`, `"mask"`, `"gradient"`, `"rate"`, `"moments"`, `"weights"`: what goes wrong first; and
# `hidden_at` to the list of all steps at which a resume does *not* show it.
#
# ```python
# assert verdict == first_difference(Mystery, AT)[1][0]
# assert hidden_at == [at for at in range(STEPS) if first_difference(Mystery, at) is None]
# ```


# %% tags=["hide-cell"] jupyter={"source_hidden": true}
class Mystery(Run):
    """The position inside an epoch is forgotten: a resumed run begins the epoch it was in once more."""

    def load(self, path):
        super().load(path)
        self.cursor = self.cursor // EXAMPLES * EXAMPLES


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
step, differing = first_difference(Mystery, AT)
verdict = differing[0]
hidden_at = [at for at in range(STEPS) if first_difference(Mystery, at) is None]
changes = [change.key for change in round_trip(Mystery, AT).metadata]
assert (verdict, hidden_at, changes) == ("batch", [0, 10, 20], ["progress.cursor"])
print(f"first {verdict}; a resume after {hidden_at} is exact: these are the ends of epochs. The round trip sees {changes}")

# %% [markdown]
# **3. Put the generator into the file.** Repair `RandomInOrder` without addressed random numbers: save the state of its
# generator (`generator.bit_generator.state` is a dict of integers) and load it. Call it `StateSaved`. It must be exact from
# every step:
#
# ```python
# assert all(first_difference(StateSaved, at) is None for at in range(STEPS))
# ```
#
# Then change it so that it evaluates after every 5 steps and draws 7 random numbers for that, in the straight run only.
# What happens, and why can it not happen with addressed random numbers?


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
class StateSaved(RandomInOrder):
    def save(self, path):
        super().save(path)
        file, state = checkpoint.load(path), self.generator.bit_generator.state
        checkpoint.save(path, file.tensors, {**file.metadata, "generator": json.dumps(state)})

    def load(self, path):
        super().load(path)
        self.generator.bit_generator.state = json.loads(checkpoint.load(path).metadata["generator"])


assert all(first_difference(StateSaved, at) is None for at in range(STEPS))


def with_evaluation(kind):
    """A straight run that draws 7 numbers from whatever generator there is after every 5 steps."""
    run = kind()
    for n in range(1, STEPS + 1):
        run.train_step()
        if n % 5 == 0 and hasattr(run, "generator"):
            run.generator.random(7)
    return run


ordered = with_evaluation(StateSaved).journal[-1]["weights"] == straight(StateSaved).journal[-1]["weights"]
addressed = with_evaluation(Run).journal[-1]["weights"] == straight(Run).journal[-1]["weights"]
assert not ordered and addressed
print("drawn in order, an evaluation changes the training; by address each purpose has a stream of its own")

# %% [markdown]
# **4. How many digits?** Write a float32 as decimal text with $d$ significant digits and read it again. Find by experiment,
# over 100,000 random float32 numbers between 1 and 2, the smallest $d$ with which every one comes back exactly, and explain
# it.
#
# ```python
# assert all_come_back(digits) and not all_come_back(digits - 1)
# ```

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
numbers = (1 + rng.uniform(0, "digits", "float32", 0, 100_000)).astype(np.float32)


def all_come_back(d, x=numbers):
    return all(np.float32(f"{value:.{d - 1}e}") == value for value in x)


digits = next(d for d in range(1, 12) if all_come_back(d))
assert digits == 8 and all_come_back(8) and not all_come_back(7)
print(f"{digits}: between 1 and 2 float32 numbers are 2^-23 = 1.2e-7 apart, and 8 digits are 1e-7 apart, a finer grid")
above_1000 = np.arange(1000, 1024, 2**-14, dtype=np.float64).astype(np.float32)[::40]
assert not all_come_back(8, above_1000) and all_come_back(9, above_1000)
print(
    "not so between 1000 and 1024: there they are 2^-14 = 6e-5 apart, and 8 digits 1e-4. In general it takes 9 (float64: 17)"
)

# %% [markdown]
# ## Where to read on
#
# - J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: random
#   numbers by address.
# - I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.
# - Y. Bengio, R. Ducharme, P. Vincent, C. Jauvin, "A neural probabilistic language model", JMLR 3, 2003.
# - [docs/checkpoints.md](../docs/checkpoints.md): the promise, its limits, and how it is tested.
#   `oxidizr_ref/checkpoint/state.py` lists what is saved and why; `oxidizr_ref/rng.py` is the addressed generator.
# - On your machine: `oxidizr-ref selftest` trains, kills, resumes and compares.
# - Next: [15 · Summation order](15_summation_order.ipynb), the other half of the promise.

# %%
temporary.cleanup()
