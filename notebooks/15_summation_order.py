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
# # 15 · Summation order: why threads change sums elsewhere, and not here
#
# Run the same training twice on the same machine with another number of threads, and most programs give another loss in the
# last digits, soon in the first ones. This is not noise of the hardware. It is arithmetic, and it can be avoided at little
# cost.
#
# **After this you can**
#
# - give three numbers whose sum depends on the order, and bound the error of a sum of $n$ numbers in two orders;
# - name three ways in which the number of threads gets into a result, and show each in a few lines;
# - cut work into fixed tiles and fold sums in a fixed tree, so that 1, 2 or 3 threads give the same bits;
# - say which properties of a matrix product are *not* guaranteed by BLAS, and what a program has to keep fixed therefore.
#
# **Needs** notebook 12 (floats); 14 says why the bits matter. **Time** 35 minutes.

# %%
import hashlib
import inspect
import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
from figures import COLORS, plt
from threadpoolctl import threadpool_limits

from oxidizr_ref import AdamW, LanguageModel, load_config, optim, parallel, rng
from oxidizr_ref.data import open_data


def digest(*arrays):
    """Eight hexadecimal digits that stand for all the bits of some arrays."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:8]


# %% [markdown]
# ## Addition is not associative
#
# A float has a fixed number of significant bits: 24 in float32, 53 in float64. The exact sum of two floats is rounded to
# the nearest float, which makes a relative error of at most $u$, the unit roundoff (unless it overflows):
#
# $$ \mathrm{fl}(a + b) = (a + b)(1 + \delta), \qquad |\delta| \le u,
# \qquad u = 2^{-24} \text{ (float32)},\ 2^{-53} \text{ (float64)} $$
#
# $a+b$ and $b+a$ are rounded alike, so addition commutes. But the *intermediate* results of $(a+b)+c$ and $a+(b+c)$ are
# other numbers, and are rounded otherwise.

# %%
print((0.1 + 0.2) + 0.3, "and", 0.1 + (0.2 + 0.3))
big, one = np.float32(2**24), np.float32(1)
print((big + one) + one - big, "and", (one + one) + big - big, " (float32)")

# %% [markdown]
# In the second line $2^{24} + 1$ needs 25 bits. It lies halfway between two floats and is rounded to the one with an even
# last bit, $2^{24}$: the 1 is gone, twice. Added to each other first, the ones survive.
#
# How many results can one sum have? Take 1,000 normal numbers, float32, and add them one after the other, in 1,000 orders
# (`np.cumsum` adds strictly from left to right):

# %%
x = rng.normal(0, "summation", "numbers", (1000,))
exact = math.fsum(x.tolist())  # rounded once, at the very end
sums = np.array([np.cumsum(x[rng.permutation(0, "orders", k, 1000)])[-1] for k in range(1000)])
step = np.spacing(np.float32(exact))  # between neighbouring floats there
figure, axes = plt.subplots()
values, counts = np.unique(sums, return_counts=True)
axes.bar((values.astype(np.float64) - exact) / step, counts, width=0.8)
axes.set(
    xlabel="error (units in the last place of the sum)",
    ylabel="orders that give it",
    title="one thousand orders of the same thousand numbers",
)
plt.show()
print(f"{len(values)} different sums; the exact one is {exact:.7f}")

# %% [markdown]
# None of them is "the" sum. A program that does not fix an order draws from this histogram.
#
# ## How wrong may a sum be?
#
# Write out the roundings of the sum from left to right: $\hat s_k = (\hat s_{k-1} + x_k)(1+\delta_k)$. The number $x_1$
# goes through all $n-1$ roundings, $x_k$ through $n-k+1$ of them. To first order in $u$:
#
# $$ |\hat s - s| \le (n-1)\, u \sum_i |x_i| \quad\text{(one after the other)} $$
#
# Now add in pairs, the pairs in pairs, and so on, a binary tree: every number goes through only $\lceil\log_2 n\rceil$
# roundings.
#
# $$ |\hat s - s| \le \lceil \log_2 n \rceil\, u \sum_i |x_i| \quad\text{(in pairs)} $$
#
# (Higham 1993.) These are bounds for the worst case. Roundings go up and down, and typical errors are about the square root
# of the bound's factor.


# %%
def in_pairs(x):
    """The sum of 2^k numbers by a binary tree: neighbours, then neighbouring sums."""
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]


sizes, u = 2 ** np.arange(4, 21, 2), 2.0**-24
errors = {"one after the other": [], "in pairs": []}
for n in sizes:
    found = []
    for draw in range(4):
        x = rng.uniform(1, "sizes", f"{n}", draw, n).astype(np.float32)
        s = math.fsum(x.tolist())
        found.append((abs(float(np.cumsum(x)[-1]) - s) / s, abs(float(in_pairs(x)) - s) / s))
    for name, worst in zip(errors, np.max(found, axis=0), strict=True):
        errors[name].append(max(worst, 1e-9))

figure, axes = plt.subplots()
for (name, error), color in zip(errors.items(), (COLORS["red"], COLORS["blue"]), strict=True):
    axes.loglog(sizes, error, "o-", color=color, label=name)
axes.loglog(sizes, (sizes - 1) * u, ":", color=COLORS["red"], label="bound (n-1) u")
axes.loglog(sizes, np.log2(sizes) * u, ":", color=COLORS["blue"], label="bound log2(n) u")
axes.set(
    xlabel="n, numbers between 0 and 1",
    ylabel="relative error",
    title="a tree is also the better sum (float32, worst of 4 draws)",
)
axes.legend()
plt.show()
print(f"2^20 numbers: {errors['one after the other'][-1]:.0e} one after the other, {errors['in pairs'][-1]:.0e} in pairs")
assert all(e <= max(1, np.log2(n)) * u for e, n in zip(errors["in pairs"], sizes))

# %% [markdown]
# So fixing the order need not cost accuracy: the order that is best for threads, a tree, is also the better one.
#
# ## Three ways for threads to get into a sum
#
# **1. The work is cut by the number of threads.** Each of $k$ threads adds its share, and the shares are added. The cut is
# part of the order, so the result is a function of $k$:

# %%
x = rng.normal(3, "summation", "shares", (10_000,))


def by_thread(x, k):
    """What k threads compute if each takes a k-th of the numbers."""
    return np.cumsum([np.cumsum(share)[-1] for share in np.array_split(x, k)], dtype=np.float32)[-1]


for k in (1, 2, 3, 4, 8):
    print(f"{k} threads: {by_thread(x, k):.7f}  bits {by_thread(x, k).view(np.uint32):08x}")
assert len({by_thread(x, k) for k in (1, 2, 3, 4, 8)}) > 1

# %% [markdown]
# **2. Whoever is ready first adds first.** Shares are fixed, but each thread adds its share to a common total when it is
# done; atomic additions on a GPU do this with every number. Now the result depends on who was faster, and differs from run
# to run on one machine. Simulated, eight shares in ten orders of arrival:

# %%
shares = [np.cumsum(share)[-1] for share in np.array_split(x, 8)]
arrivals = [np.cumsum([shares[i] for i in rng.permutation(0, "arrival", k, 8)], dtype=np.float32)[-1] for k in range(10)]
print("ten runs:", " ".join(f"{total.view(np.uint32) & 0xFFFF:04x}" for total in arrivals), "(last 16 bits)")
print(len(set(arrivals)), "different totals")

# %% [markdown]
# And not simulated. (This cell's output changes with the machine and the moment; with few cores the threads often arrive in
# order.)


# %% tags=["varies"]
def in_order_of_arrival(parts):
    """Threads that add their sums to a common total, under a lock: no race, and no fixed order either."""
    total, lock = [np.float32(0)], threading.Lock()

    def work(part):
        mine = np.cumsum(part)[-1]
        with lock:
            total[0] += mine

    threads = [threading.Thread(target=work, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return total[0]


parts = np.array_split(rng.normal(3, "summation", "long", (2_000_000,)), 16)
print(len({in_order_of_arrival(parts) for _ in range(30)}), "different totals in 30 runs of one program")

# %% [markdown]
# The lock is right: no number is lost. *Data races* and *order* are two questions; sanitizers find only the first.
#
# **3. A library does either for you.** Matrix products are computed by BLAS (here OpenBLAS, inside NumPy), which has
# threads of its own and cuts a product by their number. How many of these shapes have the same bits with one and with two
# of its threads?


# %% tags=["varies"]
def bits(a, b, threads):
    with threadpool_limits(threads, user_api="blas"):
        return digest(a @ b)


for m, k, n in [(64, 64, 64), (512, 512, 512), (1, 4096, 512), (100, 10_000, 100), (1000, 300, 10)]:
    a, b = (rng.normal(4, name, f"{m} {k} {n}", shape) for name, shape in (("a", (m, k)), ("b", (k, n))))
    same = bits(a, b, 1) == bits(a, b, 2)
    print(f"[{m},{k}] @ [{k},{n}]: {'the same bits' if same else 'OTHER bits'} with two threads")

# %% [markdown]
# Which ones differ is a matter of the library's version and of the processor; that some do is enough. Therefore
# `parallel.py` gives BLAS one thread a call, and spreads calls over threads itself. It checks at import that BLAS obeys.
#
# ## Fixed tiles: threads decide who computes, never what
#
# The cure for 1 and 3: cut the work by its *shape* alone, into tiles. Threads take tiles from a common heap, as they are
# free. Each tile is computed by one thread from beginning to end, and written to a place of its own. The whole idea is in
# two functions:

# %%
print(inspect.getsource(parallel.tiles))
print(inspect.getsource(parallel._product_tiles_of))


# %%
def sum_of_tiles(x, threads, size=1000):
    """Fixed tiles, whoever computes them; then their sums in a fixed order."""
    parallel.set_threads(threads)
    borders = parallel.tiles(len(x), size)
    sums = np.empty(len(borders), dtype=np.float32)

    def work(index):
        i, j = borders[index]
        sums[index] = np.cumsum(x[i:j])[-1]

    parallel.for_each(len(borders), work)
    return parallel.tree_sum(list(sums))


usual = parallel.get_threads()
by_tiles = {threads: sum_of_tiles(x, threads) for threads in (1, 2, 3, 8)}
parallel.set_threads(usual)
print({threads: f"{s.view(np.uint32):08x}" for threads, s in by_tiles.items()})
assert len(set(by_tiles.values())) == 1

# %% [markdown]
# In a matrix product $C = AB$ the tiles are blocks of rows (or columns) of $C$: the sum over the inner index is never cut,
# so nothing has to be added up afterwards. For some shapes of a real model:

# %%
a, b = rng.normal(5, "a", "tiles", (2048, 384)), rng.normal(5, "b", "tiles", (384, 512))
print("rows of the tiles:", [j - i for i, j in parallel.product_tiles(2048, 384 * 512)])
products = set()
for threads in (1, 2, 3):
    parallel.set_threads(threads)
    products.add(digest(parallel.matmul(a, b)))
parallel.set_threads(usual)
print("1, 2, 3 threads:", "the same bits" if len(products) == 1 else products)
assert len(products) == 1

# %% [markdown]
# The *borders* do matter (below, under "What BLAS does not promise"). They are a function of the shapes, and so part of
# what is computed, like the learning rate: `NUMERICS_VERSION` in `version.py` is raised when they change.
#
# ## A fixed tree
#
# Some things must be added across tiles: squares for the norm of all gradients, losses and gradients of micro-batches. The
# order must depend on the number of parts $n$ alone. `tree_sum` uses this tree over the parts $i \dots j-1$:
#
# $$ T[i,j) = \begin{cases} x_i & j - i = 1 \\
# T[i, i+p) + T[i+p, j) & p = \text{the largest power of two below } j - i \end{cases} $$
#
# If the "numbers" are strings and addition writes brackets, the order can be read:


# %%
def brackets(a, b):
    return f"({a}{b})"


def tree(parts, add):
    """The definition above, word for word."""
    if len(parts) == 1:
        return parts[0]
    p = 1 << (len(parts) - 1).bit_length() - 1
    return add(tree(parts[:p], add), tree(parts[p:], add))


for n in range(1, 9):
    print(n, tree("abcdefgh"[:n], brackets))

# %% [markdown]
# Why the largest power of two? Because parts that *arrive one by one* can be folded into the same tree by counting in
# binary. Keep a stack of partial sums; a new part is a sum of size 1; while the top of the stack has the same size, add the
# two: the carry of a binary counter. After $n$ parts the stack holds one sum for each bit of $n$ that is 1, so at most
# $\log_2 n + 1$.


# %%
def push(stack, part, add):
    """Add one part to the counter."""
    size = 1
    while stack and stack[-1][0] == size:
        part = add(stack.pop()[1], part)
        size *= 2
    stack.append((size, part))


stack = []
for n, letter in enumerate("abcdefg", 1):
    push(stack, letter, brackets)
    print(f"{n} = {n:03b}:", "  ".join(sums for _, sums in stack))

# %% [markdown]
# At the end the stack is folded from its right end. The same through the package, for every number of parts up to 200:


# %%
def folded(parts, add):
    stack = []
    for part in parts:
        push(stack, part, add)
    total = stack[-1][1]
    for _, partial in reversed(stack[:-1]):
        total = add(partial, total)
    return total


letters = [f"{i}," for i in range(200)]
for n in range(1, 201):
    assert tree(letters[:n], brackets) == folded(letters[:n], brackets) == parallel.tree_sum(letters[:n], brackets)
print("definition, counter and oxidizr_ref.parallel.tree_sum: the same brackets for 1 ... 200 parts")
print(inspect.getsource(parallel.TreeCounter.push))

# %% [markdown]
# ## A training step on 1, 2 and 3 threads
#
# A small Llama, large enough that its products are cut into tiles. All gradients, the norm and the parameters after AdamW:

# %%
config = load_config(
    "tiny-llama", ["hidden_size=128", "intermediate_size=384", "max_seq_len=64", "batch_size=16", "target_device=cpu"]
)
data = open_data(config)


def one_step(threads, micro_batches=1):
    """Digests of the gradients, of their norm and of the parameters after one step on 16 windows."""
    parallel.set_threads(threads)
    model = LanguageModel(config.model, seed=0)
    optimizer, counter = AdamW(model.state_dict(), lr=1e-3), parallel.TreeCounter(optim.add_gradients)
    size = 16 // micro_batches
    for i in range(micro_batches):
        tokens, targets, _ = data.windows.batch(i * size, size)
        model.loss(tokens, targets, token_count=16 * 64).backward()
        counter.push({name: p.grad for name, p in model.named_parameters()})
        for _, p in model.named_parameters():
            p.grad = None
    gradients = counter.total()
    norm = optim.global_norm(gradients)
    optimizer.step(gradients, gradient_scale=optim.clip_factor(norm, 1.0))
    parallel.set_threads(usual)
    return digest(*gradients.values()), norm, digest(*model.state_dict().values())


steps = {threads: one_step(threads) for threads in (1, 2, 3)}
print("gradients, norm, parameters after the step: the same bits on 1, 2, 3 threads:", len(set(steps.values())) == 1)
assert len(set(steps.values())) == 1

# %% [markdown]
# ## Micro-batches
#
# The gradient of a batch is the sum over its windows, so a batch that does not fit into memory is computed in
# micro-batches, and their gradients are added. Is that the same? In exact arithmetic:

# %%
accumulated = {k: one_step(2, k) for k in (1, 2, 4, 8)}
for k, (gradients, norm, _) in accumulated.items():
    print(
        f"{k} micro-batches of {16 // k:2d} windows: norm {norm:.5f}, "
        f"{'the same' if gradients == accumulated[1][0] else 'other'} bits"
    )
    assert abs(norm / accumulated[1][1] - 1) < 1e-6
assert len({gradients for gradients, _, _ in accumulated.values()}) > 1

# %% [markdown]
# In floats it is not: the sum over the rows of a batch happens inside matrix products, and another batch is another
# product. So `gradient_accumulation` is one of the keys that determine the bits; the number of *threads* is not. Within a
# step the micro-batches' gradients are folded by the tree, however many there are, and one after the other so that at most
# $\log_2 n + 1$ sums are in memory:

# %%
held, most = [], []
for n in range(1, 65):
    counter, largest = parallel.TreeCounter(), 0
    for _ in range(n):
        counter.push(1)
        largest = max(largest, len(counter._stack))
    held.append(len(counter._stack)), most.append(largest)
figure, axes = plt.subplots(figsize=(7, 2.6))
axes.step(range(1, 65), held, where="mid", label="held after n parts: the ones in binary n")
axes.step(range(1, 65), most, where="mid", label="the most held on the way")
axes.plot(range(1, 65), np.log2(range(1, 65)) + 1, ":", color="0.4", label="log2(n) + 1")
axes.set(xlabel="n, micro-batches", ylabel="partial sums in memory", title="what a fixed tree costs")
axes.set_ylim(0, 9.5)
axes.legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# ## What BLAS does not promise
#
# With one thread, the same call on the same machine gives the same bits. *The same numbers in another layout, or in another
# call,* need not. Each line is an identity of mathematics; the column says in how many of 40 random shapes it holds to the
# bit here:

# %% tags=["varies"]
identities = {
    "A @ B, B in Fortran order": lambda A, B: (A @ B, A @ np.asfortranarray(B)),
    "A @ B, row by row": lambda A, B: (A @ B, np.concatenate([row[None] @ B for row in A])),
    "A @ B, upper and lower half": lambda A, B: (A @ B, np.concatenate([A[: len(A) // 2] @ B, A[len(A) // 2 :] @ B])),
    "A @ A.T, the transpose copied": lambda A, B: (A @ A.T, A @ A.T.copy()),
    "(B.T @ A.T).T": lambda A, B: (A @ B, (B.T @ A.T).T),
    "A @ B, inner index in two halves": lambda A, B: (
        A @ B,
        A[:, : len(B) // 2] @ B[: len(B) // 2] + A[:, len(B) // 2 :] @ B[len(B) // 2 :],
    ),
    "A @ B, once more": lambda A, B: (A @ B, A @ B),
}
held = dict.fromkeys(identities, 0)
for k in range(40):
    m, inner, n = (2 + rng.uniform(k, "shape", "mkn", 0, 3) * (200, 600, 200)).astype(int)
    A, B = rng.normal(k, "A", "layout", (m, inner)), rng.normal(k, "B", "layout", (inner, n))
    for name, both in identities.items():
        held[name] += int(np.array_equal(*both(A, B)))
for name, count in held.items():
    print(f"{name:36s} {count:2d} of 40")

# %% [markdown]
# "Row by row" is nearly always another routine (a matrix times a vector); "halves" holds for most shapes, as if it could be
# relied on. But BLAS has a kernel of its own for each class of processors. OpenBLAS can be told to use another one, here
# that for processors without AVX-512:

# %% tags=["varies"]
program = """
import numpy as np
same = 0
for k in range(40):
    numbers = np.random.default_rng(k)
    m, inner, n = 2 + (numbers.random(3) * (200, 600, 200)).astype(int)
    A, B = numbers.normal(size=(m, inner)).astype("f4"), numbers.normal(size=(inner, n)).astype("f4")
    same += np.array_equal(A @ B, np.concatenate([A[: m // 2] @ B, A[m // 2 :] @ B]))
print(same)
"""
for name, environment in {"the kernel chosen here": {}, "the one named Haswell": {"OPENBLAS_CORETYPE": "Haswell"}}.items():
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    print(f"{name}: two halves agree with the whole in {ran.stdout.strip() or 'none'} of 40 shapes")

# %% [markdown]
# So a test on one machine does not find who relies on it. What a program must keep fixed: the layout of every operand, the
# borders of every call, and which calls are merged. Three consequences in `oxidizr_ref`:
#
# - parameters lie in C order, always; an optimizer refuses others, and a checkpoint stores no others;
# - tiles depend on shapes alone; a batch of one token is computed by another routine than a batch of many, and decoding is
#   compared with training within a tolerance, not with `==`;
# - the BLAS build and its kernels are part of a checkpoint's *fingerprint*; two machine classes agree to rounding, and the
#   file says which one made it.

# %%
try:
    AdamW({"w": np.asfortranarray(np.zeros((3, 4), dtype=np.float32))}, lr=1e-3)
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# ## What it costs


# %% tags=["varies"]
def milliseconds(work, repeats=7):
    """The fastest of several runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


x = rng.normal(6, "cost", "x", (1 << 22,))
borders = parallel.tiles(len(x), parallel.ELEMENTS)
partial = np.empty(len(borders), dtype=np.float32)


def tiled():
    parallel.for_each(len(borders), lambda t: partial.__setitem__(t, x[slice(*borders[t])].sum()))
    return parallel.tree_sum(partial.tolist())


print(
    f"4 million float32: np.sum {milliseconds(x.sum):.1f} ms, fixed tiles and a tree {milliseconds(tiled):.1f} ms, "
    f"left to right {milliseconds(lambda: np.cumsum(x)):.1f} ms, exact (fsum) {milliseconds(lambda: math.fsum(x), 1):.0f} ms"
)
a, b = rng.normal(6, "cost", "a", (2048, 768)), rng.normal(6, "cost", "b", (768, 768))
with threadpool_limits(parallel.get_threads(), user_api="blas"):
    its_own = milliseconds(lambda: a @ b)
print(
    f"[2048,768] @ [768,768] on {parallel.get_threads()} threads: BLAS's own threads {its_own:.1f} ms, "
    f"fixed tiles {milliseconds(lambda: parallel.matmul(a, b)):.1f} ms; on one thread {milliseconds(lambda: a @ b):.1f} ms"
)

# %% [markdown]
# (Measured while other things may run on this machine.) The tiles' own sums are NumPy's and as fast as those; waking a
# second thread costs some 60 µs, so tiles must be large enough
# ([record](../docs/decisions/2026-11-23-tiles-and-threads.md)). A whole training step with all its orders fixed takes less
# time than that of PyTorch's eager mode on the same cores ([measured](../docs/performance.md)). Not being able to tell a
# bug from a reordered sum costs days.
#
# ## Exercises
#
# **1. Kahan.** Compensated summation keeps the part that a rounding threw away and gives it to the next addition:
# `y = x - c; t = s + y; c = (t - s) - y; s = t`. Write `kahan(x)` for float32. It is far more accurate than left to right;
# does it make the order irrelevant?
#
# ```python
# x = rng.uniform(1, "exercise", "kahan", 0, 20_000).astype(np.float32)
# assert abs(float(kahan(x)) - math.fsum(x.tolist())) <= np.spacing(kahan(x))
# assert kahan(a_few_numbers) != kahan(a_few_numbers[::-1])  # find some
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def kahan(x):
    s = c = np.float32(0)
    for value in x:
        y = value - c
        t = s + y
        c = (t - s) - y
        s = t
    return s


x = rng.uniform(1, "exercise", "kahan", 0, 20_000).astype(np.float32)
assert abs(float(kahan(x)) - math.fsum(x.tolist())) <= np.spacing(kahan(x))
assert abs(float(np.cumsum(x)[-1]) - math.fsum(x.tolist())) > np.spacing(kahan(x))
a_few_numbers = np.array([1, 1e10, 1, -1e10], dtype=np.float32)
assert kahan(a_few_numbers) != kahan(a_few_numbers[::-1])
print(
    f"more exact, but not free of order: {kahan(a_few_numbers)} and {kahan(a_few_numbers[::-1])}, where the sum is 2"
)

# %% [markdown]
# **2. A sum without an order.** Integers are added exactly, whatever the order, as long as they do not overflow. Write
# `fixed(x)`: scale float32 numbers by a power of two that depends on the largest of them and on their number, round to
# int64, add, scale back. All 1,000 orders must give one result, and its error must be no larger than that of a float32 sum
# in pairs:
#
# ```python
# x = rng.normal(0, "summation", "numbers", (1024,))
# assert len({fixed(x[rng.permutation(0, "orders", k, 1024)]) for k in range(1000)}) == 1
# assert abs(fixed(x) - math.fsum(x.tolist())) <= abs(float(in_pairs(x)) - math.fsum(x.tolist()))
# ```
#
# Why is this not used for everything? (Demmel & Nguyen 2015 make it work without knowing the largest number first.)


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def fixed(x):
    _, exponent = math.frexp(float(np.abs(x).max()) * len(x))  # the sum of all is below 2^exponent
    scale = 62 - exponent
    return math.ldexp(int(np.rint(np.ldexp(x.astype(np.float64), scale)).astype(np.int64).sum()), -scale)


x = rng.normal(0, "summation", "numbers", (1024,))
assert len({fixed(x[rng.permutation(0, "orders", k, 1024)]) for k in range(1000)}) == 1
assert abs(fixed(x) - math.fsum(x.tolist())) <= abs(float(in_pairs(x)) - math.fsum(x.tolist()))
print(
    "one result in 1,000 orders. But all numbers are read twice (for the maximum), small ones beside large ones lose bits,"
)
print("and sums inside matrix products belong to BLAS")

# %% [markdown]
# **3. Rings and trees.** In a ring all-reduce of $k$ workers, component $i$ of a vector is added up along the ring from
# worker $i \bmod k$ on. Simulate it: `ring(vectors)` for a list of equal-length vectors. Give every component the same
# numbers, and find that the components of the result differ. Then write `by_tree(parts, workers)`: eight fixed parts lie on
# 1, 2, 4 or 8 workers in consecutive blocks; each worker folds its own parts, then the workers' sums are folded; the result
# must not depend on the workers:
#
# ```python
# parts = [np.full(8, value, dtype=np.float32) for value in rng.normal(9, "ring", "values", (8,))]
# assert len(set(ring(parts).tolist())) > 1
# assert len({digest(by_tree(parts, workers)) for workers in (1, 2, 4, 8)}) == 1
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def ring(vectors):
    k = len(vectors)
    result = np.empty_like(vectors[0])
    for i in range(len(result)):
        total = vectors[i % k][i]
        for hop in range(1, k):
            total = total + vectors[(i + hop) % k][i]
        result[i] = total
    return result


def by_tree(parts, workers):
    each = len(parts) // workers
    return parallel.tree_sum([parallel.tree_sum(parts[w * each : (w + 1) * each]) for w in range(workers)])


parts = [np.full(8, value, dtype=np.float32) for value in rng.normal(9, "ring", "values", (8,))]
assert len(set(ring(parts).tolist())) > 1
assert len({digest(by_tree(parts, workers)) for workers in (1, 2, 4, 8)}) == 1
print("the ring gives", sorted(set(ring(parts).tolist())))
print("blocks of a power of two are whole subtrees of the tree, so it does not matter who folds them")

# %% [markdown]
# **4. Depth.** Let `add = lambda a, b: 1 + max(a, b)` and all parts 0: then `tree_sum` computes the number of additions
# that a part goes through at most. Compare with the bound of the text for 1 … 2,000 parts, and with the sum from left to
# right.
#
# ```python
# assert all(depth(n) == math.ceil(math.log2(n)) for n in range(1, 2001))
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def depth(n):
    return parallel.tree_sum([0] * n, lambda a, b: 1 + max(a, b))


assert all(depth(n) == math.ceil(math.log2(n)) for n in range(1, 2001))
print(f"2,000 parts: {depth(2000)} additions deep, against 1,999 from left to right")

# %% [markdown]
# ## Where to read on
#
# - N. J. Higham, "The accuracy of floating point summation", SIAM J. Sci. Comput. 14(4), 1993; and *Accuracy and Stability
#   of Numerical Algorithms*, SIAM, 2nd edition 2002, chapter 4.
# - W. Kahan, "Further remarks on reducing truncation errors", Comm. ACM 8(1), 1965.
# - J. Demmel, H. D. Nguyen, "Parallel reproducible summation", IEEE Trans. Computers 64(7), 2015.
# - D. Goldberg, "What every computer scientist should know about floating-point arithmetic", ACM Computing Surveys 23(1),
#   1991.
# - `oxidizr_ref/parallel.py`, `sums.py`; [how work is cut into tiles](../docs/decisions/2026-11-23-tiles-and-threads.md);
#   the machine class in [docs/checkpoints.md](../docs/checkpoints.md).
# - Next: [16 · Find the bug in someone else's transformer](16_find_the_bug.ipynb): there the other program may *not* have
#   our bits, and the question is how far apart is still right.
