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
# # 01 · From a derivative to a tape
#
# Training a model means asking one question again and again: *if I move this number a little, how does the loss move?* A
# small model has a million such numbers. This notebook builds the machine that answers for all of them at once, first for
# single numbers, then for arrays, and then opens the one that `oxidizr_ref` uses: it is the same machine.
#
# After this you can
#
# - say how exact a derivative by finite differences can be, and use one as a test;
# - write reverse-mode automatic differentiation in thirty lines, and say why it adds and in which order it walks;
# - say why training uses reverse mode and not forward mode, and what that costs;
# - derive the backward rule of an array operation, broadcasting included, and read `oxidizr_ref/autograd.py` and `ops.py`.
#
# **Needs**: derivatives and the chain rule; Python with NumPy. **Time**: an hour, exercises included.

# %%
import inspect
import math

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import Tensor, autograd, ops

# %% [markdown]
# ## 1. A derivative is a limit, and a computer has none
#
# $$f'(x) = \lim_{h \to 0} \frac{f(x+h) - f(x)}{h}$$
#
# Take $f(x) = \sin(x^2)$, whose derivative is $2x\cos(x^2)$, and simply choose a small $h$. Two errors fight each other.
# The **truncation error** comes from the formula: by Taylor's theorem the forward difference is wrong by about
# $\tfrac{h}{2}|f''|$, and the central difference $\frac{f(x+h)-f(x-h)}{2h}$ by about $\tfrac{h^2}{6}|f'''|$. The **rounding
# error** comes from the numbers: $f$ is known to a relative $\varepsilon \approx 10^{-16}$ only, and dividing by $h$ makes
# $\varepsilon |f| / h$ of it.


# %%
def f(x):
    return np.sin(x * x)


x0 = 1.3
exact = 2 * x0 * math.cos(x0 * x0)
h = 10.0 ** np.arange(-15, 0.1, 0.25)
forward = abs((f(x0 + h) - f(x0)) / h - exact)
central = abs((f(x0 + h) - f(x0 - h)) / (2 * h) - exact)

plt.loglog(h, forward, label="forward difference")
plt.loglog(h, central, label="central difference")
plt.loglog(h, np.finfo(float).eps / h, "--", color="0.5", linewidth=1, label="rounding, $\\varepsilon/h$")
plt.xlabel("step $h$")
plt.ylabel("absolute error of $f'(1.3)$")
plt.title("Smaller steps help, until rounding takes over")
plt.ylim(1e-13, 10)
plt.legend()
plt.show()

# %% [markdown]
# Read the figure from the right. Both lines fall, with slopes 1 and 2, until they meet the rounding error, which rises to
# the left with slope −1. The best $h$ is where the two errors are equal: near $\varepsilon^{1/2} \approx 10^{-8}$ for the
# forward difference and near $\varepsilon^{1/3} \approx 6\cdot10^{-6}$ for the central one.

# %% tags=["varies"]
for name, errors in (("forward", forward), ("central", central)):
    best = errors.argmin()
    print(f"{name}: best h about 10^{math.log10(h[best]):.0f}, error below 10^{math.ceil(math.log10(errors[best]))}")

# %% [markdown]
# So a finite difference can give ten digits, which is a fine **test**. As a **method** it is hopeless: it needs at least one
# evaluation of $f$ for every input, and a model has a million inputs and takes a second.
#
# ## 2. The chain rule, along a graph
#
# A program computes its result in small steps, each of which we can differentiate. Take one neuron with one input, and the
# square of its error:
#
# $$L = (\tanh(wx + b) - y)^2$$
#
# Give every intermediate result a name: $p = wx$, $s = p + b$, $t = \tanh s$, $d = t - y$, $L = d^2$. Write
# $\bar v = \partial L/\partial v$ for what we want to know about any of them (the *adjoint* of $v$). Starting from
# $\bar L = 1$ and going backward, each line needs only the line before it and one small derivative:
#
# $$\bar d = \bar L \cdot 2d \qquad \bar t = \bar d \cdot 1 \qquad \bar s = \bar t\,(1 - t^2) \qquad
# \bar p = \bar s \cdot 1 \quad \bar b = \bar s \cdot 1 \qquad \bar w = \bar p \cdot x$$

# %%
w, x, b, y = 0.7, 1.5, -0.2, 0.3
p = w * x  # forward: every intermediate result is kept
s = p + b
t = math.tanh(s)
d = t - y
L = d * d

d_bar = 1.0 * 2 * d  # backward: the same lines, last first
t_bar = d_bar * 1
s_bar = t_bar * (1 - t * t)
p_bar, b_bar = s_bar * 1, s_bar * 1
w_bar = p_bar * x

step = 1e-6
by_difference = ((math.tanh((w + step) * x + b) - y) ** 2 - (math.tanh((w - step) * x + b) - y) ** 2) / (2 * step)
print(f"L = {L:.6f}   dL/dw = {w_bar:.8f}   by central difference {by_difference:.8f}")
assert abs(w_bar - by_difference) < 1e-8

# %% [markdown]
# ## 3. A number that remembers
#
# Doing this by hand for a model is out of the question, and there is no need: while the program runs forward, every result
# can remember *from which values it came, and how fast it changes with each of them*. The list of these memories is called
# the **tape**. Walking it backward is the chain rule:
#
# $$\bar u \mathrel{+}= \bar v \cdot \frac{\partial v}{\partial u} \qquad \text{for every } v \text{ computed from } u.$$


# %%
class Value:
    """A number; ``parents`` are the values it was computed from, each with the slope d(self)/d(parent)."""

    def __init__(self, data, parents=(), op=""):
        self.data, self.parents, self.op, self.grad = data, parents, op, 0.0

    def __add__(self, other):
        return Value(self.data + other.data, ((self, 1.0), (other, 1.0)), "+")

    def __sub__(self, other):
        return Value(self.data - other.data, ((self, 1.0), (other, -1.0)), "−")

    def __mul__(self, other):
        return Value(self.data * other.data, ((self, other.data), (other, self.data)), "×")

    def tanh(self):
        t = math.tanh(self.data)
        return Value(t, ((self, 1 - t * t),), "tanh")

    def backward(self):
        self.grad = 1.0
        for value in consumers_first(self):
            for parent, slope in value.parents:
                parent.grad += value.grad * slope


def consumers_first(root):
    """All values that ``root`` was computed from, each before the ones it was computed from."""
    finished, seen = [], set()

    def visit(value):
        if id(value) in seen:
            return
        seen.add(id(value))
        for parent, _ in value.parents:
            visit(parent)
        finished.append(value)  # all that it needs is in the list already

    visit(root)
    return finished[::-1]


# %% [markdown]
# Thirty lines, and the neuron needs no derivation any more. With two inputs, as a graph: each box holds a value above its
# gradient.

# %%
given = {"w1": 0.7, "x1": 1.5, "w2": -0.4, "x2": 2.0, "b": -0.2, "y": 0.3}
v = {name: Value(number) for name, number in given.items()}
error = (v["w1"] * v["x1"] + v["w2"] * v["x2"] + v["b"]).tanh() - v["y"]
loss = error * error
loss.backward()


# %%
def draw(root, names):
    """The graph behind a value, leaves on the left."""
    values, column = consumers_first(root)[::-1], {}
    arrow = {"arrowstyle": "->", "color": "0.5", "shrinkB": 20}
    for value in values:
        column[id(value)] = 1 + max((column[id(parent)] for parent, _ in value.parents), default=-1)
    place, used = {}, {}
    for value in values:
        row = used[column[id(value)]] = used.get(column[id(value)], -1) + 1
        place[id(value)] = (column[id(value)], -row)
    for value in values:
        for parent, _ in value.parents:
            plt.annotate("", place[id(value)], place[id(parent)], arrowprops=arrow)
    for value in values:
        label = f"{names.get(id(value), value.op)}\n{value.data:.2f}\n{value.grad:+.2f}"
        face = "white" if value.op else "#d6e6f2"
        plt.text(*place[id(value)], label, ha="center", va="center", fontsize=9, bbox={"fc": face, "ec": "0.5"})
    plt.xlim(-0.4, max(column.values()) + 0.4)
    plt.ylim(-max(used.values()) - 0.6, 0.6)
    plt.axis("off")


plt.figure(figsize=(9, 4.6))
draw(loss, {id(value): name for name, value in v.items()} | {id(loss): "loss"})
plt.title("One neuron and its squared error: name or operation, value, gradient (blue: what is given)")
plt.show()

# %% [markdown]
# ### Why it adds
#
# `loss = error * error` uses `error` twice, and both arrows count (they lie on top of each other in the figure):
# $L = d \cdot d$ gives $\bar d = d + d$. In general, if $u$ reaches the loss along several paths, the derivative is the
# **sum over all paths** of the products along them. That is the whole reason for the `+=`. With `=` we would get half of it.
#
# ### Why it walks consumers first
#
# A value may hand its gradient on only when that gradient is complete, that is after everything computed from it has had its
# say. Walking in the order in which one happens to meet the values is a classic mistake. It goes unnoticed as long as the
# graph is a chain or a tree:


# %%
def backward_as_they_come(root):
    """Wrong: hands gradients on before they are complete."""
    root.grad, waiting = 1.0, [root]
    while waiting:
        value = waiting.pop(0)
        for parent, slope in value.parents:
            parent.grad += value.grad * slope
            if parent not in waiting:
                waiting.append(parent)


def example():
    a = Value(3.0)
    square = a * a
    return a, square + square * square  # a² + a⁴: square is used near the end, and further from it


a, result = example()
result.backward()
right = a.grad
a, result = example()
backward_as_they_come(result)
print(f"d(a² + a⁴)/da at 3: by hand {2 * 3 + 4 * 3**3}, consumers first {right:.0f}, as they come {a.grad:.0f}")
assert right == 2 * 3 + 4 * 3**3 and a.grad != right

# %% [markdown]
# ## 4. Why backward, and not forward
#
# There is a second way to apply the chain rule: carry the derivative along while going *forward*. A **dual number**
# $(v, \dot v)$ holds a value and its derivative in one chosen direction:


# %%
class Dual:
    """A value and how fast it changes, in one direction of the inputs. Every operation is counted."""

    operations = 0

    def __init__(self, data, dot):
        self.data, self.dot = data, dot

    def __add__(self, other):
        Dual.operations += 2  # one for the value, one for its change
        return Dual(self.data + other.data, self.dot + other.dot)

    def __mul__(self, other):
        Dual.operations += 4
        return Dual(self.data * other.data, self.dot * other.data + self.data * other.dot)


# %% [markdown]
# No tape, no order to worry about, no memory. But one pass answers for **one direction of the inputs** only: a gradient with
# $n$ entries takes $n$ passes. Reverse mode answers for **one output**, and a loss is one. Count operations for
# $L = \left(\sum_i w_i x_i\right)^2$, whose gradient has $n$ entries:


# %%
def square_of_dot(ws, xs):
    total = ws[0] * xs[0]
    for w, x in zip(ws[1:], xs[1:], strict=True):
        total = total + w * x
    return total * total


def count_forward(n):
    Dual.operations = 0
    for direction in range(n):  # one pass an input
        ws = [Dual(0.5, float(i == direction)) for i in range(n)]
        square_of_dot(ws, [Dual(1.0, 0.0)] * n)
    return Dual.operations


def count_reverse(n):
    loss = square_of_dot([Value(0.5) for _ in range(n)], [Value(1.0) for _ in range(n)])
    values = consumers_first(loss)  # forward: one operation a value; backward: two (× and +=) an arrow
    return sum(1 for value in values if value.op) + 2 * sum(len(value.parents) for value in values), len(values)


inputs = [1, 3, 10, 30, 100, 300]
counts = np.array([(2 * n, count_forward(n), *count_reverse(n)) for n in inputs])
plt.loglog(inputs, counts[:, 1], "o-", label="gradient, forward mode")
plt.loglog(inputs, counts[:, 2], "s-", label="gradient, reverse mode")
plt.loglog(inputs, counts[:, 0], "--", color="0.4", label="the function alone")
plt.xlabel("number of inputs $n$")
plt.ylabel("arithmetic operations")
plt.title("Reverse mode costs a fixed multiple of the function, whatever $n$")
plt.legend()
plt.show()
for n, function, forward_mode, reverse_mode, kept in zip(inputs, *counts.T, strict=True):
    ratios = f"forward mode {forward_mode / function:6.1f} times the function, reverse {reverse_mode / function:.1f} times"
    print(f"n = {n:3}: {ratios}; values kept on the tape {kept}")

# %% [markdown]
# Seen with matrices: a program is a chain of functions, and its Jacobian is a product $J_k \cdots J_2 J_1$, whose leftmost
# factor is a *row*, because the loss is one number. Reverse mode multiplies from that end, so it only ever handles
# (row) × (matrix). Forward mode starts at the other end and handles (matrix) × (matrix), or one column at a time.
#
# The price is in the last column of the printed table: every intermediate value must be **kept** until the backward pass has
# used it. Memory is what training large models runs out of, and the reason for most of the cleverness in later notebooks.
#
# ## 5. From numbers to arrays
#
# A tape with an entry for every single number would be far too slow. So let the entries be arrays. The rule stays: an
# operation $y = f(x)$ is handed $\bar y$, an array of the shape of $y$, and must return $\bar x$, of the shape of $x$:
#
# $$\bar x_i = \sum_j \bar y_j \, \frac{\partial y_j}{\partial x_i} \qquad\text{(a vector–Jacobian product, VJP)}$$
#
# The Jacobian itself is never formed. Three derivations are enough for most of a language model.
#
# **Element by element**, $y_i = \tanh x_i$: the Jacobian is diagonal, so $\bar x = \bar y \circ (1 - y^2)$.
#
# **Matrix product**, $Y = AB$, that is $Y_{ij} = \sum_k A_{ik}B_{kj}$. Then $\partial Y_{ij}/\partial A_{ik} = B_{kj}$, so
# $\bar A_{ik} = \sum_j \bar Y_{ij} B_{kj}$: in matrices $\bar A = \bar Y B^\top$, and in the same way
# $\bar B = A^\top \bar Y$. The shapes alone forbid any other order.
#
# **Broadcasting**, $Y = X + b$ with $X$ of shape `[4, 3]` and $b$ of shape `[3]`, repeated for each row. Each $b_j$ is used
# four times, and section 3 says what happens then: the gradients are **added**. Repeating forward is summing backward.


# %%
def unbroadcast(dy, shape):
    """Sum over every axis along which an array of ``shape`` was repeated."""
    while dy.ndim > len(shape):
        dy = dy.sum(axis=0)  # axes that broadcasting put in front
    for axis, length in enumerate(shape):
        if length == 1 and dy.shape[axis] != 1:
            dy = dy.sum(axis=axis, keepdims=True)
    return dy


class Array:
    """The same as `Value` for arrays: instead of a slope, each parent comes with its VJP, a function from ȳ to x̄."""

    def __init__(self, data, parents=()):
        self.data, self.parents, self.grad = np.asarray(data, dtype=float), parents, 0.0

    def __add__(self, other):
        a, b = self.data, other.data
        vjps = (lambda dy: unbroadcast(dy, a.shape)), (lambda dy: unbroadcast(dy, b.shape))
        return Array(a + b, ((self, vjps[0]), (other, vjps[1])))

    def __mul__(self, other):
        a, b = self.data, other.data
        vjps = (lambda dy: unbroadcast(dy * b, a.shape)), (lambda dy: unbroadcast(dy * a, b.shape))
        return Array(a * b, ((self, vjps[0]), (other, vjps[1])))

    def __matmul__(self, other):
        a, b = self.data, other.data
        return Array(a @ b, ((self, lambda dy: dy @ b.T), (other, lambda dy: a.T @ dy)))

    def tanh(self):
        y = np.tanh(self.data)
        return Array(y, ((self, lambda dy: dy * (1 - y * y)),))

    def sum(self):
        return Array(self.data.sum(), ((self, lambda dy: np.broadcast_to(dy, self.data.shape)),))

    def backward(self):
        self.grad = np.ones_like(self.data)
        for node in consumers_first(self):
            for parent, vjp in node.parents:
                parent.grad = parent.grad + vjp(node.grad)


# %% [markdown]
# `consumers_first` did not change. A network of two layers, the sum of whose squared outputs is the loss:

# %%
random = np.random.default_rng(0)
X = random.normal(size=(4, 3))  # [examples, inputs]
W1, b1 = random.normal(size=(3, 5)), random.normal(size=5)  # [inputs, hidden], [hidden]
W2 = random.normal(size=(5, 2))  # [hidden, outputs]


def network(kind, X, W1, b1, W2):
    """The loss, and the parameters as arrays of this kind."""
    parameters = [kind(W1), kind(b1), kind(W2)]
    hidden = kind(X) @ parameters[0] + parameters[1]  # [4, 5]: b1 is repeated for each example
    out = (hidden.tanh() if kind is Array else ops.tanh(hidden)) @ parameters[2]  # [4, 2]
    return (out * out).sum(), parameters


loss, ours = network(Array, X, W1, b1, W2)
loss.backward()
for name, parameter in zip(("W1", "b1", "W2"), ours, strict=True):
    print(f"d loss / d {name}: shape {parameter.grad.shape}, largest {abs(parameter.grad).max():.4f}")

# %% [markdown]
# ### A test that needs one number
#
# Checking every entry by a finite difference takes two evaluations an entry. Along a random direction $V$ two are enough:
# $\langle \bar W, V\rangle$ must equal $\frac{L(W + hV) - L(W - hV)}{2h}$. Errors of several entries would have to cancel in
# a random direction, which has probability zero. This is how every operation of `oxidizr_ref` is tested.

# %%
V = random.normal(size=W1.shape)
h = 1e-6
along = (ours[0].grad * V).sum()
difference = (network(Array, X, W1 + h * V, b1, W2)[0].data - network(Array, X, W1 - h * V, b1, W2)[0].data) / (2 * h)
print(f"along V: gradient {along:.8f}, difference {difference:.8f}")
assert abs(along - difference) < 1e-7 * abs(along)

# %% [markdown]
# ## 6. The same machine in the package
#
# `oxidizr_ref.Tensor` is `Array`, and its operations are small classes: `forward` directly above `backward`. What the VJPs
# above remembered in a closure is kept on `self` here.

# %%
print(inspect.getsource(ops.Mul))
print(inspect.getsource(ops.Tanh))
print(inspect.getsource(ops.unbroadcast))


# %% tags=["varies"]
def parameter(array):
    """A leaf that receives a gradient."""
    return Tensor(array, requires_grad=True)


package_loss, theirs = network(parameter, X, W1, b1, W2)
package_loss.backward()
for name, mine, their in zip(("W1", "b1", "W2"), ours, theirs, strict=True):
    difference = abs(mine.grad - their.grad).max()
    print(f"{name}: largest difference between this page and the package {difference:.0e}")
    assert difference <= 1e-13 * abs(their.grad).max()

# %% [markdown]
# And the walk. Compare it with the three lines of `Array.backward`: `waiting` holds the gradients that are not complete yet,
# and a node that was handled is freed at once.

# %%
body = inspect.getsource(autograd.Tensor.backward)
print(body[body.index("        waiting, watcher") :])

# %% [markdown]
# What the package does beyond this page, each for a reason that can be seen:
#
# | | why |
# |---|---|
# | a node points at nodes, not at tensors | an intermediate array lives exactly as long as some backward formula needs it |
# | the order is found without recursion (`consumers_first`) | graphs are deep, as the chain below |
# | `differentiate` asserts that each gradient has its input's shape | a forgotten `unbroadcast` is found where it happens |
# | a walked graph is freed, and a second walk is an error | the memory goes back while the walk is still under way |
# | leaves *add* to `grad` until `zero_grad` | several small batches add up to one large one |

# %%
chain, link = Value(0.0), Tensor(np.zeros(()), requires_grad=True)
deep, deep_tensor = chain, link
for _ in range(20_000):
    deep = deep + Value(1.0)
    deep_tensor = deep_tensor + 1.0
try:
    deep.backward()
except RecursionError:
    print("this page's Value, 20,000 additions: RecursionError")
deep_tensor.backward()
print(f"the package, 20,000 additions: gradient {link.grad}")

try:
    deep_tensor.backward()
except RuntimeError as error:
    print(f"walked twice: {error}")

# %% [markdown]
# ## 7. What it is for
#
# With gradients, learning is one line: move every parameter a little against its gradient. Here a network with one hidden
# layer of 16 learns a curve from 60 noisy points.

# %%
points = np.linspace(-3, 3, 60)[:, None]  # [60, 1]
heights = np.sin(2 * points) * np.exp(-0.2 * points**2) + 0.05 * random.normal(size=points.shape)
sizes = ((1, 16), (16,), (16, 1))
weights = [Tensor(random.normal(size=size), requires_grad=True) for size in sizes]


def predict(points):
    return ops.tanh(Tensor(points) @ weights[0] + weights[1]) @ weights[2]  # [n, 1]


losses = []
for _ in range(4000):
    errors = predict(points) - Tensor(heights)
    loss = (errors * errors).mean()
    loss.backward()
    for tensor in weights:
        tensor.data -= 0.05 * tensor.grad
        tensor.grad = None
    losses.append(loss.item())

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.semilogy(losses)
left.axhline(0.05**2, color=COLORS["black"], linestyle="--", linewidth=1, label="variance of the noise")
left.set(xlabel="step", ylabel="mean squared error", title="The loss falls to the noise …")
left.legend()
grid = np.linspace(-3.5, 3.5, 200)[:, None]
right.plot(points, heights, ".", color="0.6", label="what is given")
right.plot(grid, predict(grid).data, label="the network")
right.set(xlabel="$x$", ylabel="$y$", title="… and the curve is found, where there were points")
right.legend()
plt.show()
print(f"mean squared error: first {losses[0]:.2f}, last {losses[-1]:.4f}; the noise has {0.05**2:.4f}")
assert losses[-1] < 2 * 0.05**2

# %% [markdown]
# A language model is trained in the same way: another `predict`, another loss (notebook 2), and a better rule than "a
# constant times the gradient" (notebook 11).
#
# ## Exercises
#
# ### Exercise 1: a division
# Give `Value` a division, from a derivation: what are $\partial(a/b)/\partial a$ and $\partial(a/b)/\partial b$? Your method
# must satisfy
#
# ```python
# a, b = Value(3.0), Value(2.0)
# (a / b).backward()
# assert a.grad == 0.5 and b.grad == -0.75
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def divide(self, other):
    """a/b: the slopes are 1/b and -a/b²."""
    quotient = self.data / other.data
    return Value(quotient, ((self, 1 / other.data), (other, -quotient / other.data)), "÷")


Value.__truediv__ = divide
a, b = Value(3.0), Value(2.0)
(a / b).backward()
assert a.grad == 0.5 and b.grad == -0.75
print("d(a/b)/da = 1/b, d(a/b)/db = -a/b²")

# %% [markdown]
# ### Exercise 2: a gradient without a tape
# $\operatorname{lse}(x) = \log \sum_i e^{x_i}$ stands in the loss of every language model. Derive its gradient by hand (the
# answer has a name), and write `lse_gradient(x)` for a vector. It must satisfy
#
# ```python
# x = Tensor(np.array([1.0, -2.0, 0.5]), requires_grad=True)
# ops.log(ops.exp(x).sum()).backward()
# assert np.allclose(lse_gradient(x.data), x.grad, rtol=1e-14)
# assert np.isclose(lse_gradient(x.data).sum(), 1)
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def lse_gradient(x):
    """d/dx_i log Σ e^x = e^{x_i} / Σ e^x: the softmax. Subtracting the maximum changes nothing but avoids overflow."""
    e = np.exp(x - x.max())
    return e / e.sum()


x = Tensor(np.array([1.0, -2.0, 0.5]), requires_grad=True)
ops.log(ops.exp(x).sum()).backward()
assert np.allclose(lse_gradient(x.data), x.grad, rtol=1e-14)
assert np.isclose(lse_gradient(x.data).sum(), 1)
print("the gradient of log-sum-exp is the softmax:", np.round(x.grad, 4))

# %% [markdown]
# ### Exercise 3: an operation of your own
# Write `Cube`, an `autograd.Function` for $y = x^3$, `forward` above `backward` as in `ops.py`, and a function
# `slope_error(op, x)` that returns the relative difference between two derivatives of `op(x).sum()` along a random
# direction: by the tape, and by a central difference. They must satisfy
#
# ```python
# x = np.random.default_rng(1).normal(size=(3, 4))
# assert slope_error(Cube.apply, x) < 1e-7
# assert slope_error(ops.sigmoid, x) < 1e-7
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
class Cube(autograd.Function):
    def forward(self, x):
        self.x = x
        return x**3

    def backward(self, dy):
        return (3 * dy * self.x**2,)


def slope_error(op, x, h=1e-5):
    """Relative difference of the derivative along a random direction, by the tape and by a central difference."""
    direction = np.random.default_rng(7).normal(size=x.shape)
    leaf = Tensor(x, requires_grad=True)
    op(leaf).sum().backward()
    by_tape = (leaf.grad * direction).sum()
    by_difference = (op(Tensor(x + h * direction)).sum().item() - op(Tensor(x - h * direction)).sum().item()) / (2 * h)
    return abs(by_tape - by_difference) / abs(by_difference)


x = np.random.default_rng(1).normal(size=(3, 4))
assert slope_error(Cube.apply, x) < 1e-7
assert slope_error(ops.sigmoid, x) < 1e-7
print("both operations agree with their difference quotients")

# %% [markdown]
# ### Exercise 4: the forgotten sum
# In `Array.__add__`, leave `unbroadcast` out. Which of the three gradients of section 5 changes, and what is its shape then?
# Set `wrong_shape` to it. It must satisfy
#
# ```python
# assert wrong_shape != b1.shape
# assert wrong_shape == (X @ W1).shape
# ```
#
# (NumPy would not complain: `b1 - 0.1 * gradient` broadcasts silently to a matrix. That is why `differentiate` asserts.)

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
right_add = Array.__add__
Array.__add__ = lambda self, other: Array(self.data + other.data, ((self, lambda dy: dy), (other, lambda dy: dy)))
loss, wrong = network(Array, X, W1, b1, W2)
loss.backward()
Array.__add__ = right_add
wrong_shape = wrong[1].grad.shape
assert wrong_shape != b1.shape
assert wrong_shape == (X @ W1).shape
assert np.allclose(wrong[1].grad.sum(axis=0), ours[1].grad)  # summed over the examples it is right again
print(f"b1 has shape {b1.shape}; without the sum its gradient has shape {wrong_shape}")

# %% [markdown]
# ## Where to read on
#
# - Griewank & Walther (2008), *Evaluating Derivatives*, 2nd edition: chapter 3, forward and reverse mode; 4, their cost.
# - Baydin, Pearlmutter, Radul & Siskind (2018), *Automatic Differentiation in Machine Learning: a Survey*, JMLR 18.
# - Linnainmaa (1976), *Taylor expansion of the accumulated rounding error*, BIT 16: reverse accumulation.
# - Two more small machines to read: *micrograd* (Karpathy, 2020) and *Autodidax* (in JAX's documentation).
# - Here: `oxidizr_ref/autograd.py` (the walk), `oxidizr_ref/ops.py` (all operations), and
#   [the decision for a tape of nodes](../docs/decisions/2026-11-23-tape-of-nodes.md).
# - Next: [02 · From text to tokens to loss](02_text_to_tokens_to_loss.ipynb).
