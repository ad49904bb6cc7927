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
# # 10 · Mamba3: a rotation can count
#
# After this you can
#
# - prove that layers whose states only decay cannot keep the parity of a long string of bits, at any depth;
# - solve parity with one complex number, and write the same thing in real numbers by turning $B$ and $C$;
# - derive the trapezoidal rule of Mamba3 and measure its order;
# - set the weights of a Mamba3 language model by hand so that it solves parity, train one that learns it, and say from
#   three numbers in its weights where it will go wrong, and repair it.
#
# **Needs** notebooks 08 and 09: the recurrence of a state space model, and its form in chunks. **Time:** 45 minutes to
# read; it runs in about 20 seconds.

# %%
import inspect
import math
import sys

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import LanguageModel, Tensor, no_grad, parallel
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.mamba3 import mamba3_scan, next_angle, running_angle
from oxidizr_ref.fused.ssd import ssd

sys.path.append("../docs/scripts")  # the trainings behind a page of the documentation
from contrasts import curves, first_weights, tasks
from contrasts.runs import shape
from contrasts.training import TRAINING, Plan, scored_loss, updates
from contrasts.training import generator as drawn_for

# %% [markdown]
# ## 1 · The task
#
# Running parity: read bits $b_1, b_2, \dots$ and say after every one whether there were so far an even or an odd number
# of ones. As a sign,
#
# $$
# \sigma_t = (-1)^{b_1 + \dots + b_t}, \qquad \sigma_t = -\sigma_{t-1} \text{ if } b_t = 1, \text{ else } \sigma_{t-1} .
# $$
#
# It is the smallest example of *state tracking*: one bit of memory, which every 1 flips and nothing wears out. No token
# can be skipped, and the last answer depends on the first bit as much as on the last.


# %%
def parity(bits):
    """Bits [..., T] to signs [..., T]: 1 where the number of ones so far is even, -1 where it is odd."""
    return 1 - 2 * (np.cumsum(bits, axis=-1) % 2)


print("bits ", *(f"{b:2d}" for b in (1, 0, 1, 1, 0, 0, 1)))
print("signs", *(f"{s:2d}" for s in parity([1, 0, 1, 1, 0, 0, 1])))

# %% [markdown]
# ## 2 · Why a positive decay cannot
#
# In Mamba1 and Mamba2 every number of the state obeys
#
# $$
# h_t = \alpha_t\, h_{t-1} + u_t, \qquad 0 < \alpha_t < 1, \tag{1}
# $$
#
# where $\alpha_t = e^{\Delta_t A}$ and $u_t = \Delta_t B_t x_t$ depend on the token at $t$ (and, through the
# convolution, on the few before it). Feed such a layer with nothing but ones. After the width of the convolution all
# inputs are equal, so $\alpha$ and $u$ are constants, and
#
# $$
# h_{t+1} - h_t = \alpha\,(h_t - h_{t-1}) :
# $$
#
# all steps have the same sign, and they shrink. The state creeps towards $u/(1-\alpha)$ and never turns back. In
# floating point, computed token by token as in decoding, that is so too: rounding is monotone, so if $h_t \ge h_{t-1}$,
# then also $\mathrm{fl}(\mathrm{fl}(\alpha h_t) + u) \ge \mathrm{fl}(\mathrm{fl}(\alpha h_{t-1}) + u)$. A monotone
# sequence of finitely many possible numbers ends: **from some token on the state stands still, bit for bit.** Then the
# layer's output is constant, whatever norm, gate and projection follow; then the next layer's input is constant, and
# *its* state comes to stand still; and so on to the last layer. But the parity of `1111…` never stands still. So no
# such stack, of whatever width and depth, has it right for all lengths.
#
# (Sarrof et al. 2024 and Grazzi et al. 2025 prove this and more. That no single layer can do it in *exact* numbers
# either is exercise 1.)


# %%
def standstill(alpha, u):
    """How many ones it takes until a float32 state stands still; and whether it ever turned back on the way."""
    alpha, u, h, tokens, monotone = np.float32(alpha), np.float32(u), np.float32(0), 0, True
    while (new := alpha * h + u) != h:
        monotone &= bool(new > h)
        h, tokens = new, tokens + 1
    return tokens, monotone


for alpha in (0.5, 0.9, 0.99, 0.999):
    tokens, monotone = standstill(alpha, 1 - alpha)
    assert monotone
    print(f"decay {alpha:5}: stands still after {tokens:6,} ones")

# %% [markdown]
# A slow decay takes longer, not forever. What is missing is a way for the state to *swing*: a negative number in place
# of $\alpha$, or a rotation.
#
# ## 3 · A rotation can
#
# Let the state be one complex number, written once and turned by half a circle at every 1:
#
# $$
# h_0 = 1, \qquad h_t = e^{i \pi b_t}\, h_{t-1} \quad\Rightarrow\quad h_t = e^{i\pi(b_1 + \dots + b_t)} = \sigma_t .
# $$
#
# The real part is the answer. Angles add up, and addition modulo $2\pi$ in steps of $\pi$ *is* counting modulo 2.

# %%
generator = np.random.default_rng(0)
bits = generator.integers(0, 2, 100_000)
h, states = 1 + 0j, []
for b in bits:
    h = h * np.exp(1j * np.pi * b)
    states.append(h)
states = np.array(states)
assert np.array_equal(np.sign(states.real), parity(bits))
short_of_pi = math.sin(math.pi)  # sin(π - ε) = ε, so this is what the float64 called π lacks
print(f"{len(bits):,} bits, all right")
print(f"the float64 nearest to π is {short_of_pi:.3g} too small,")
print(f"so the first wrong answer would come after {math.pi / 2 / short_of_pi:.1g} ones")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
t = np.arange(1, 25)
for alpha, color in ((0.5, "sky"), (0.9, "green"), (0.99, "purple")):
    left.plot(t, 1 - 2 * alpha**t, color=COLORS[color], label=f"decay {alpha}")
left.plot(t, parity(np.ones(24, int)), ".", color=COLORS["black"], label="parity")
left.set(xlabel="token (all are 1)", ylabel="state, parity", title="A decaying state creeps one way")
right.step(t, states.real[:24], where="mid", color=COLORS["red"], label="Re h, turned by π at every 1")
right.plot(t, parity(bits[:24]), ".", color=COLORS["black"], label="parity")
right.set(xlabel="token (random bits)", ylabel="state, parity", title="A turning state is the parity")
for axes in (left, right):
    axes.set_ylim(-1.15, 1.9)
    axes.legend(loc="upper right", ncol=2, fontsize=8)

# %% [markdown]
# ## 4 · A complex state in real numbers: turn $B$ and $C$ instead
#
# Read a pair of real state channels as a complex number. Multiplication by $e^{i\theta}$ is the matrix
#
# $$
# R(\theta) = \begin{pmatrix} \cos\theta & -\sin\theta \\ \sin\theta & \cos\theta \end{pmatrix}, \qquad
# R(\theta) R(\theta') = R(\theta + \theta'), \qquad R(\theta)^\top = R(-\theta) .
# $$
#
# A state that decays *and turns*, by an angle $\theta_t$ that depends on the token:
#
# $$
# h_t = \alpha_t\, R(-\theta_t)\, h_{t-1} + B_t x_t, \qquad y_t = C_t^\top h_t . \tag{2}
# $$
#
# Equation (1) has a fast form in chunks because $\alpha_t$ is *one number*. Equation (2) would lose it. But look at the
# state from a frame that turns along: with $\varphi_t = \theta_1 + \dots + \theta_t$ let
# $\bar h_t = R(\varphi_t)\, h_t$. Multiply (2) by $R(\varphi_t)$ and use
# $R(\varphi_t) R(-\theta_t) = R(\varphi_{t-1})$:
#
# $$
# \bar h_t = \alpha_t\, \bar h_{t-1} + \underbrace{R(\varphi_t) B_t}_{\bar B_t}\, x_t, \qquad
# y_t = C_t^\top R(\varphi_t)^\top \bar h_t = (\underbrace{R(\varphi_t) C_t}_{\bar C_t})^\top\, \bar h_t . \tag{3}
# $$
#
# The recurrence has become (1) again, with $\bar B$ and $\bar C$ in place of $B$ and $C$: all of notebook 09 applies as
# it stands. And $\bar C_t^\top \bar B_s = C_t^\top R(\varphi_s - \varphi_t) B_s$ depends on the difference of two
# angles. That is rotary position embedding (notebook 04), except that the angles are not fixed by the position: the
# tokens decide how far to turn.


# %%
def R(theta):
    return np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])


T = 60
alpha, theta = generator.uniform(0.8, 1, T), generator.uniform(-3, 3, T)
B, C, x = generator.standard_normal((T, 2)), generator.standard_normal((T, 2)), generator.standard_normal(T)
complex_state, state, frame = 0j, np.zeros(2), np.zeros(2)
ways, phi = np.empty((3, T)), np.cumsum(theta)
for t in range(T):
    complex_state = alpha[t] * np.exp(-1j * theta[t]) * complex_state + complex(*B[t]) * x[t]
    ways[0, t] = (complex(*C[t]).conjugate() * complex_state).real
    state = alpha[t] * R(-theta[t]) @ state + B[t] * x[t]  # (2)
    ways[1, t] = C[t] @ state
    frame = alpha[t] * frame + R(phi[t]) @ B[t] * x[t]  # (3)
    ways[2, t] = (R(phi[t]) @ C[t]) @ frame
assert np.ptp(ways, axis=0).max() < 1e-13
print("complex state, turning real state, turned B and C: the same", T, "outputs")

# %% [markdown]
# In Mamba3 the angle is $\theta_t = \Delta_t\, \pi \tanh(\mathrm{angle}_t)$, where $\mathrm{angle}_t$ is a projection
# of the token and $\Delta_t$ the head's time step: at most half a turn for each unit of time, either way. The running
# angle is kept modulo $2\pi$ and summed in float64, because a float32 sum that grows with the string would lose its
# digits. Here is how decoding does it:

# %%
print(inspect.getsource(next_angle))

# %% [markdown]
# ## 5 · The trapezoidal rule
#
# Where does (1) come from? A state space model is an equation in continuous time, $h'(s) = A\,h(s) + u(s)$ with
# $u = Bx$. From one token to the next, $\Delta$ later, it has the solution
#
# $$
# h(t) = e^{\Delta A}\, h(t-\Delta) + \int_{t-\Delta}^{t} f(s)\, ds, \qquad f(s) = e^{A(t-s)}\, u(s) . \tag{4}
# $$
#
# The decay is exact; only the integral has to be guessed from what is known, $u$ at the two ends. Weigh them with
# $\lambda$ and $1-\lambda$:
#
# $$
# \int_{t-\Delta}^{t} f(s)\, ds \;\approx\; \Delta\left[(1-\lambda)\, f(t-\Delta) + \lambda\, f(t)\right]
# = (1-\lambda)\, \Delta\, e^{\Delta A} u_{t-1} + \lambda\, \Delta\, u_t .
# $$
#
# Expand both sides around $t-\Delta$ ($f, f', f''$ taken there). Integral:
# $\Delta f + \tfrac{\Delta^2}{2} f' + \tfrac{\Delta^3}{6} f''$. Rule:
# $\Delta f + \lambda \Delta^2 f' + \tfrac{\lambda\Delta^3}{2} f''$. So the error of one step is
#
# $$
# \left(\tfrac12 - \lambda\right) \Delta^2 f' + \left(\tfrac16 - \tfrac\lambda2\right) \Delta^3 f'' + \dots
# $$
#
# With $\lambda = 1$, Mamba2's rule, a step is wrong by $\Delta^2$, and $1/\Delta$ steps by $\Delta$: first order. With
# $\lambda = \tfrac12$, the trapezoid, the first term vanishes: second order. Measured:


# %%
def solve(lam, steps, a=-1.0, end=4.0):
    """h' = a h + cos(3 s), h(0) = 0, from 0 to ``end`` by the rule with weight ``lam``."""
    dt, h = end / steps, 0.0
    s = np.linspace(0, end, steps + 1)
    for before, now in zip(np.cos(3 * s[:-1]), np.cos(3 * s[1:]), strict=True):
        h = np.exp(a * dt) * h + (1 - lam) * dt * np.exp(a * dt) * before + lam * dt * now
    return h


exact = (np.cos(12.0) + 3 * np.sin(12.0) - np.exp(-4.0)) / 10  # check: its derivative is cos(3s) minus itself
steps = np.array([16, 32, 64, 128, 256, 512])
errors = {lam: np.array([abs(solve(lam, n) - exact) for n in steps]) for lam in (1.0, 0.75, 0.5)}
for lam, error in errors.items():
    order = np.log2(error[-2] / error[-1])
    print(f"λ = {lam}: halving the step divides the error by {error[-2] / error[-1]:.2f}, order {order:.2f}")
    assert abs(order - (2 if lam == 0.5 else 1)) < 0.1

# %%
figure, axes = plt.subplots(figsize=(6, 3))
for (lam, error), color in zip(errors.items(), ("blue", "orange", "green"), strict=True):
    axes.loglog(4.0 / steps, error, "o-", color=COLORS[color], markersize=4, label=f"λ = {lam}")
axes.set(xlabel="time step Δ", ylabel="error at s = 4", title="Only λ = 1/2 is of second order")
axes.legend()
plt.show()

# %% [markdown]
# A language has no true $u(s)$ between two tokens, so "second order" is not an end in itself. What it brings is a
# second weight: $u_{t-1}$ enters with $\beta_t = (1-\lambda_t)\Delta_t\alpha_t$ beside $u_t$ with
# $\gamma_t = \lambda_t \Delta_t$, and $\lambda_t = \mathrm{sigmoid}(\mathrm{trap}_t)$ is learned, token by token. That
# is a convolution of width two, on the *state's* input; by default Mamba3 has no other.
#
# ## 6 · The whole recurrence, by hand and through the package
#
# $$
# h_t = \alpha_t h_{t-1} + \beta_t\, x_{t-1} \bar B_{t-1}^\top + \gamma_t\, x_t \bar B_t^\top, \qquad
# y_t = h_t \bar C_t + D x_t . \tag{5}
# $$


# %%
def turned(v, phi):
    """v [N], its pairs (0,1), (2,3), … turned by phi [N/2]."""
    pairs = (v[0::2] + 1j * v[1::2]) * np.exp(1j * phi)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(v.shape)


def mamba3_by_hand(x, dt, A, lam, angle, B, C, D):
    """One head. x [T,P]; dt, A, lam [T]; angle [T,N/2]; B, C [T,N]; D a number. Returns y [T,P]."""
    h = before = np.zeros((x.shape[1], B.shape[1]))
    phi, y = np.zeros(angle.shape[1]), []
    for t in range(len(x)):
        phi = (phi + dt[t] * np.pi * np.tanh(angle[t])) % (2 * np.pi)
        now = np.outer(x[t], turned(B[t], phi))
        alpha = np.exp(dt[t] * A[t])
        h = alpha * h + (1 - lam[t]) * dt[t] * alpha * before + lam[t] * dt[t] * now
        y.append(h @ turned(C[t], phi) + D * x[t])
        before = now
    return np.array(y)


# %% [markdown]
# The package does not walk from token to token. Token $s$ enters twice, with $\gamma_s$ at once and with
# $\beta_{s+1} = (1-\lambda_{s+1})\Delta_{s+1}\alpha_{s+1}$ a step later; by then the first share has decayed by
# $\alpha_{s+1}$ too. So for every *later* token it is as if it had entered once, with
#
# $$
# \mathrm{inflow}_s = \gamma_s + (1-\lambda_{s+1})\,\Delta_{s+1},
# $$
#
# and only to itself it counts with $\gamma_s$: Mamba2's scan in chunks, with another number on the diagonal.

# %%
T, P, N, D = 50, 3, 8, 0.7
x, B, C = (generator.standard_normal((T, size)) for size in (P, N, N))
dt, A, lam = generator.uniform(0.1, 1.5, T), -generator.uniform(0.01, 1, T), generator.uniform(0, 1, T)
angle = generator.standard_normal((T, N // 2))
by_hand = mamba3_by_hand(x, dt, A, lam, angle, B, C, D)

diagonal = lam * dt
inflow = diagonal + np.append((1 - lam[1:]) * dt[1:], 0)


def through_the_package(dt, A, inflow, diagonal, angle, chunk):
    rows = (v.reshape(1, T, 1) for v in (dt * A, inflow, diagonal))  # [B,T,H]
    phi = running_angle(Tensor(dt.reshape(1, T, 1)), Tensor(angle[None]))
    columns = (v.reshape(1, T, 1, 1, -1) for v in (B, C))  # [B,T,R,G,N]
    no_bias = Tensor(np.zeros((1, 1, N)))
    y = mamba3_scan(
        Tensor(x.reshape(1, T, 1, 1, P)), *map(Tensor, (*rows, *columns)), no_bias, no_bias, phi, Tensor([D]), chunk
    )
    return y.data.reshape(T, P)


# %%
for chunk in (1, 7, 16, 64):
    error = abs(through_the_package(dt, A, inflow, diagonal, angle, chunk) - by_hand).max()
    assert error < 1e-12
print("by hand and in chunks of 1, 7, 16 and 64 tokens: equal to", "1e-12")

# %% [markdown]
# ## 7 · A language model that solves parity, without training
#
# Tokens 0 and 1 are the bits, 2 begins a string. One Mamba3 layer, one head, a state of one pair. Set the weights so
# that
#
# - only the first token writes ($x = 0$ for the bits), into a state that forgets as slowly as the package allows
#   ($A = -10^{-4}$);
# - $\Delta = 1$ for every token, and $\tanh(\mathrm{angle})$ is 1 for token 1 and 0 for the others: a turn by $\pi$, or
#   none;
# - $B$ and $C$ are $(1, 0)$ before they are turned, so the answer is $\cos\varphi_t$ times what is left of the state.

# %%
START = 2
config = ModelConfig(
    name="parity by hand",
    hidden_size=4,
    num_layers=1,
    vocab_size=3,
    max_seq_len=64,  # what training would read; a Mamba has no limit of its own
    mamba_layers=[0],
    mamba2_num_heads=1,
    mamba2_head_dim=4,
    mamba2_state_size=2,
    mamba2_expand=1,
    mamba3_enabled=True,
    mamba3_rope_fraction=1.0,
)


# %%
def set_by_hand(model):
    for name, p in model.named_parameters():
        p.data[...] = 1.0 if name.endswith("norm.weight") else 0.0
    mixer = model.layers[0].mixer
    model.embed_tokens.weight.data[:, :3] = np.eye(3)  # a channel for each token; the fourth takes the answer
    z, x, _, _, _, dd_A, trap, *angle = np.split(mixer.in_proj.weight.data, np.cumsum(mixer.sizes)[:-1])
    z[:, :3] = 1.0  # the gate is open for every token
    x[0, START] = 1.0  # only the first token writes
    dd_A[:, :3], trap[:, :3] = -1e6, 50.0  # A at its bound -1e-4; λ = 1: what is written enters at once
    for row in angle:
        row[:, :3] = 0.0, 50.0, 0.0  # tanh(50 · 2) = 1: half a turn at a 1
    mixer.B_bias.data[..., 0] = mixer.C_bias.data[..., 0] = 1.0
    mixer.dt_bias.data[...] = math.log(math.e - 1)  # softplus of it is 1
    mixer.out_proj.weight.data[3, 0] = 1.0
    model.lm_head.weight.data[:2, 3] = 1.0, -1.0  # token 0 answers "even", token 1 "odd"
    return model


# %%
def answers(model, bits):
    """Bits [batch, T] to the signs that the model says after each of them."""
    tokens = np.concatenate([np.full((len(bits), 1), START), bits], axis=1)
    with no_grad():
        logits = model(tokens).data[:, 1:]
    return np.where(logits[..., 0] > logits[..., 1], 1, -1)


machine = set_by_hand(LanguageModel(config, seed=0))
strings = generator.integers(0, 2, (3, 50_000))
strings[0] = 1
without = set_by_hand(LanguageModel(config.model_copy(update={"mamba3_complex_rope": False}), seed=0))
for name, model in (("turning", machine), ("not turning", without)):
    right = (answers(model, strings) == parity(strings)).mean(axis=1)
    print(f"{name:12} right on 50,000 ones: {right[0]:.4f}, on random bits: {right[1]:.4f} {right[2]:.4f}")
assert np.array_equal(answers(machine, strings), parity(strings))

# %% [markdown]
# The rotation is exact enough for any string; what ends it is the decay. The state shrinks by $e^{-10^{-4}}$ at every
# token, the sign stays, and float32 ends at $2^{-149}$: this machine is right for about $149 \ln 2 \cdot 10^4$, a
# million tokens. Without the turn the same weights say "even" for ever.
#
# ## 8 · Trained
#
# The same question to training: one layer, width 16, one head, strings of at most 24 bits, 600 updates, once with
# Mamba2 and once with Mamba3. The task, first weights (slow decay, a time step near one) and the training loop are
# those of `docs/scripts/contrasts`, which does it at more length; label smoothing keeps the model from becoming so sure
# of itself that there is nothing left to learn.

# %%
TRAINED, STEPS = 24, 600
parallel.set_threads(1)  # arrays as small as these are not worth a second thread


def train(kind, seed):
    model = LanguageModel(shape(kind, vocab_size=3, layers=1, hidden=16, heads=1, state=4), seed)
    first_weights.for_parity(model)

    def loss_of(step):
        length = min(TRAINED, int(4 + (TRAINED - 4) * step / (0.4 * STEPS)))  # short strings first
        batch = tasks.parity(drawn_for(seed, TRAINING, step), 32, length, fair=False)
        return scored_loss(model, batch, smoothing=0.2, answers=2)

    losses = [loss for _, loss in updates(model, Plan(STEPS, rate=1e-2, seed=seed), loss_of)]
    return model, losses


# %% tags=["varies"]
trained = {kind: train(kind, seed=2) for kind in ("mamba2", "mamba3")}
test = np.random.default_rng(99).integers(0, 2, (200, 512))
right = {kind: answers(model, test) == parity(test) for kind, (model, _) in trained.items()}
for kind in trained:
    shares = [f"{right[kind][:, i:j].mean():.3f}" for i, j in ((0, 24), (24, 64), (64, 128), (128, 256), (256, 512))]
    print(kind, "right at bits 1-24, 25-64, 65-128, 129-256, 257-512:", *shares)
assert right["mamba3"][:, :64].mean() > 0.99 and right["mamba2"][:, 64:].mean() < 0.6

# %% tags=["varies"]
figure, (left, over) = plt.subplots(1, 2, figsize=(9, 3))
floor = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))  # the entropy of the smoothed targets
left.axhline(floor, color="0.6", linewidth=1, label="lowest possible")
for kind, color in (("mamba2", "blue"), ("mamba3", "red")):
    losses = trained[kind][1]
    left.plot(np.convolve(losses, np.ones(20) / 20, "valid"), color=COLORS[color], label=kind)
    over.plot(np.arange(4, 512, 8), right[kind].reshape(200, 64, 8).mean((0, 2)), color=COLORS[color], label=kind)
over.axvline(TRAINED, color=COLORS["black"], linewidth=1, linestyle=":")
over.text(TRAINED + 6, 0.02, "longest string trained on", fontsize=8)
left.set(xlabel="update", ylabel="smoothed loss, nats a token", title="Strings get longer until update 240")
over.set(xlabel="position in the string", ylabel="right answers", title="Mamba3 goes on, for a while", ylim=(-0.03, 1.03))
left.legend()
over.legend(loc="upper right")
plt.show()

# %% [markdown]
# Mamba2 learns the first few bits and guesses after them. Mamba3 is right far beyond the strings it saw, and then its
# answers become not random but *wrong*: below one half. A memory that had faded would guess. This is a clock that goes
# slightly wrong.
#
# ## 9 · Why it fails where it fails
#
# The start token writes into the state; what a later bit reads of it is
# $\bar C_t^\top \bar B_0 = |C_t| |B_0| \cos(\delta - (\theta_1 + \dots + \theta_t))$, with $\delta$ the angle between
# the pairs $C_t$ and $B_0$ before they are turned. All of it can be read from the trained weights: the turn of each
# bit, $\theta = \Delta\,\pi\tanh(\mathrm{angle})$ with
# $\Delta = \mathrm{softplus}(\mathrm{dd\_dt} + \mathrm{dt\_bias})$, its decay, and $\delta$ (up to half turns, since
# gate and output can change a sign).


# %%
def clock(model):
    """Of a one-layer, one-head model, for the bits 0 and 1: turn in units of π, decay, δ in radians. Float64 [2] each."""
    layer = model.layers[0]
    mixer, u = layer.mixer, layer.norm(model.embed_tokens(np.array([0, 1, START]))).data  # [3, D]
    parts = np.split(u @ mixer.in_proj.weight.data.T, np.cumsum(mixer.sizes)[:-1], axis=1)
    B, C, dd_dt, dd_A, _, angle = (part.astype(np.float64) for part in parts[2:])
    dt = np.log1p(np.exp(dd_dt[:2, 0] + mixer.dt_bias.data[0]))
    A = -np.where(dd_A[:2, 0] >= 0, 1 + dd_A[:2, 0], 1 / (1 - np.minimum(dd_A[:2, 0], 0)))
    B = mixer.B_norm(Tensor(B)).data + mixer.B_bias.data[0, 0]
    C = mixer.C_norm(Tensor(C)).data + mixer.C_bias.data[0, 0]
    delta = np.angle((C[:2, 0] - 1j * C[:2, 1]) * (B[2, 0] + 1j * B[2, 1]))
    return dt * np.tanh(angle[:2, 0]), np.exp(dt * A), (delta + np.pi / 2) % np.pi - np.pi / 2


# %% tags=["varies"]
turn, decay, delta = clock(trained["mamba3"][0])
each = np.pi * (turn - np.round(turn))  # what is missing to a whole number of half turns, radians
drift, phase = each.mean(), delta.mean()  # a token, with as many ones as zeros
print(f"a 0 turns by {turn[0]:+.4f} π, a 1 by {turn[1]:+.4f} π: off by {each[0]:+.4f} and {each[1]:+.4f} radians")
print(f"the read-out begins at {phase:+.2f} radians and drifts by {drift:+.5f} a token")
print(f"so it is a quarter turn off after {(math.pi / 2 + np.sign(drift) * phase) / abs(drift):.0f} tokens")
print(f"decay {decay[0]:.4f} and {decay[1]:.4f} a token")

# %% [markdown]
# Half a turn at a 1 and none at a 0, but for some thousandths. Each token adds the same small error $\varepsilon$, so
# the phase drifts at constant speed. A quarter turn off, the answer is lost; after that it is the opposite of right.
# Strings of 24 bits hardly show it: the error is some degrees by then, whose cosine is close to 1 (and training has
# even set the clock ahead a little, with $\delta$).
#
# Lay beside each other the margin by which the model prefers the right answer, averaged over the test strings, and what
# these numbers predict, $\alpha^t \cos(\varepsilon t - \delta)$, scaled to begin at the same height:

# %% tags=["varies"]
with no_grad():
    logits = trained["mamba3"][0](np.concatenate([np.full((200, 1), START), test], axis=1)).data[:, 1:]
margin = ((logits[..., 0] - logits[..., 1]) * parity(test)).mean(axis=0)
t = np.arange(1, 513)
predicted = margin[0] * np.sqrt(np.prod(decay)) ** t * np.cos(drift * t - phase) / np.cos(phase)
figure, axes = plt.subplots(figsize=(8, 3))
axes.plot(t, margin, color=COLORS["red"], label="margin, mean of 200 strings")
axes.plot(t, predicted, "--", color="0.4", label="predicted from the weights")
axes.axhline(0, color=COLORS["black"], linewidth=1)
axes.set(xlabel="position in the string", ylabel="margin, logits", title="A wrong clock: below zero the answers are wrong")
axes.legend()
plt.show()

# %% [markdown]
# The crossings of zero are where the prediction has them. (Heights are not: the final norm flattens large margins.)
#
# The long training in `docs/scripts/contrasts` (1,600 updates, strings of up to 40 bits, three learning rates) comes
# closer to $\pi$. Its recorded curves:

# %%
print("right after bits 41 to 256, at the end of training")
for curve in curves.read("parity"):
    print(f"  {curve.kind}, learning rate {curve.plan['rate']:<6g} {curve.last('beyond 40'):.3f}")

# %% [markdown]
# ## Exercises
#
# Solutions follow each statement, hidden; they run and check themselves.

# %% [markdown]
# **Exercise 1 · In exact numbers, too.** After a string of ones, $N$ decaying channels and a linear read-out give
# $f(t) = c_0 + \sum_{i=1}^N c_i \alpha_i^t$. Show that $f$ has at most $N$ zeros (divide by the slowest term,
# differentiate: one term is gone; between two zeros there is a zero of the derivative, by Rolle), so that it is right
# about the parity of `111…` at most at $N+1$ successive lengths. Then reach this bound: for the given decays find $c$
# [N+1] so that $f(t) = \sigma_t$ at $t = 1 \dots N+1$, and check that $t = N+2$ is wrong:
#
# ```python
# f = np.stack([decays**t for t in range(1, 12)]) @ c  # decays has 1 in front, for c_0
# assert np.allclose(f[:7], parity(np.ones(7, int))) and np.sign(f[7]) != parity(np.ones(8, int))[7]
# ```

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
decays = np.array([1, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3])  # N = 6 and the constant
c = np.linalg.solve(np.stack([decays**t for t in range(1, 8)]), parity(np.ones(7, int)))
f = np.stack([decays**t for t in range(1, 12)]) @ c
assert np.allclose(f[:7], parity(np.ones(7, int))) and np.sign(f[7]) != parity(np.ones(8, int))[7]
# f has changed its sign six times by t = 7 and cannot do so again: it keeps the sign of t = 7 for ever.
assert (np.sign(f[7:]) == np.sign(f[6])).all()

# %% [markdown]
# **Exercise 2 · Counting modulo 3.** Read digits 0, 1, 2 and say after each the sum so far modulo 3. Which angle turns
# the state at a digit $d$? Write `mod3(digits)` with one complex state (no `cumsum`), reading the answer off the angle:
#
# ```python
# digits = np.random.default_rng(1).integers(0, 3, 20_000)
# assert np.array_equal(mod3(digits), np.cumsum(digits) % 3)
# ```
#
# Could a state with a *negative* real factor, $h_t = \pm h_{t-1}$, do this?


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def mod3(digits):
    h, found = 1 + 0j, []
    for d in digits:
        h *= np.exp(2j * np.pi * d / 3)
        found.append(round(np.angle(h) / (2 * np.pi / 3)) % 3)
    return np.array(found)


digits = np.random.default_rng(1).integers(0, 3, 20_000)
assert np.array_equal(mod3(digits), np.cumsum(digits) % 3)
# No: on 111… its square only decays, so every second state creeps one way; period 3 is not a multiple of period 2.

# %% [markdown]
# **Exercise 3 · Mamba2 inside Mamba3.** For which $\lambda$ and angles is (5) Mamba2's recurrence
# $h_t = \alpha_t h_{t-1} + \Delta_t x_t B_t^\top$? Check it with two operations of the package, `through_the_package`
# above and `ssd(x, dt, A, B, C, D, chunk)`, whose shapes are `[B,T,H,P]`, `[B,T,H]`, `[H]`, `[B,T,G,N]` twice, and
# `[H]`:
#
# ```python
# assert abs(ours - theirs).max() < 1e-12
# ```

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
# λ = 1: everything enters at once, so inflow = diagonal = dt; angles 0: nothing turns. In Mamba2 all tokens share A.
a = -0.3
ours = through_the_package(dt, np.full(T, a), dt, dt, np.zeros((T, N // 2)), chunk=16)
arrays = (x.reshape(1, T, 1, P), dt.reshape(1, T, 1), np.array([a]), B.reshape(1, T, 1, N), C.reshape(1, T, 1, N))
theirs = ssd(*map(Tensor, arrays), Tensor([D]), 16).data.reshape(T, P)
assert abs(ours - theirs).max() < 1e-12

# %% [markdown]
# **Exercise 4 · Repair the clock.** Change one row of the trained model's `in_proj`, the last (it makes `angle`), so
# that a 0 turns by nothing and a 1 by exactly half a turn, and touch nothing else. It is a small linear problem: the
# row times the two normalized embeddings must give two numbers. Of all rows that do, take the nearest to the old one
# (`np.linalg.pinv`).
#
# ```python
# mended = answers(trained["mamba3"][0], test) == parity(test)
# assert mended[:, 128:256].mean() > 0.95
# ```
#
# What limits it now?

# %% tags=["solution", "hide-cell", "varies"] jupyter={"source_hidden": true}
model = trained["mamba3"][0]
layer = model.layers[0]
u = layer.norm(model.embed_tokens(np.array([0, 1]))).data.astype(np.float64)
row = layer.mixer.in_proj.weight.data[-1]
dt_one = turn[1] / np.tanh(u[1] @ row)  # turn = dt tanh(angle), in units of π
wanted = np.array([0.0, np.arctanh(np.round(turn[1]) / dt_one)])
row += np.linalg.pinv(u) @ (wanted - u @ row)
assert np.allclose(clock(model)[0], [0, np.round(turn[1])], atol=1e-6)
mended = answers(model, test) == parity(test)
for i, j in ((128, 256), (256, 512)):
    print(f"bits {i + 1}-{j}: {right['mamba3'][:, i:j].mean():.3f} before, {mended[:, i:j].mean():.3f} now")
assert mended[:, 128:256].mean() > 0.95
# Now it is the decay: after n tokens of random bits this share of the first state is left, and newer tokens write, too.
print(f"left of the state after 512 tokens: {np.prod(decay) ** 256:.3f}")

# %% [markdown]
# ## Where to read on
#
# - Lahoti et al. 2026, *Mamba-3: Improved Sequence Modeling using State Space Principles* (arXiv 2603.15569), section
#   3.1: the trapezoidal rule; 3.2: complex states and turned $B$ and $C$; the table of state tracking.
# - Grazzi et al. 2025, *Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues*; Sarrof, Veitsman & Hahn
#   2024, *The Expressive Capacity of State Space Models: A Formal Language Perspective*; Merrill, Petty & Sabharwal
#   2024, *The Illusion of State in State-Space Models*: what linear recurrences can track.
# - Su et al. 2021, *RoFormer*, section 3: rotary positions. Hairer, Nørsett & Wanner, *Solving Ordinary Differential
#   Equations I*: orders of rules.
# - In the project: [`fused/mamba3.py`](../oxidizr_ref/fused/mamba3.py),
#   [`layers/mamba3.py`](../oxidizr_ref/layers/mamba3.py); [the architectures](../docs/architectures.md), with the
#   contrasts and which channels turn together; `docs/scripts/contrasts`.
# - Next: notebook 11, [AdamW, schedules, clipping](11_adamw.ipynb).
