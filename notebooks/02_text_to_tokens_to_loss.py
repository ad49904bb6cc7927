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
# # 02 · From text to tokens to loss
#
# A language model is scored on one thing: how much probability it gave to what really came next. This notebook says exactly
# what that number is, how text becomes the integers it is computed from, and what a good or a bad value looks like.
#
# After this you can
#
# - turn text into tokens as bytes, as characters and by byte pairs (BPE), and say what each costs;
# - cut a stream of tokens into windows and say which token is predicted from which;
# - compute cross-entropy, perplexity and bits per byte, convert one into the other, and say which may be compared;
# - judge a training loss: what it must be before the first step, and what counting alone achieves.
#
# **Needs**: logarithms and conditional probability; notebook 1 helps in section 5. **Time**: an hour, exercises included.

# %%
import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import AdamW, LanguageModel, Tensor, evaluation, load_config, ops
from oxidizr_ref.data import Source, TokenStream, Windows, bundled_corpus
from oxidizr_ref.errors import DataError
from oxidizr_ref.prepare import vocabulary
from oxidizr_ref.tokenizers import ByteTokenizer, CharTokenizer

text = bundled_corpus().read_text()
print(f"{len(text):,} characters, {len(text.split()):,} words")
print(text[:300])

# %% [markdown]
# ## 1. Bytes and characters
#
# A model knows only integers below some $V$, the size of its **vocabulary**. The simplest vocabulary is there already: text
# in UTF-8 is a sequence of bytes, so $V = 256$ and every text in every language can be written. The corpus has four marks
# besides, such as `<|endoftext|>`. Each gets one id of its own, above the bytes. (Wherever a text spells such a mark out, it
# becomes that id. Text from strangers should have them taken out first.)

# %%
specials = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"]


def encode_bytes(text):
    """The ids of a text: its bytes, and 256, 257, … for the special tokens."""
    ids = []
    for piece in re.split(f"({'|'.join(map(re.escape, specials))})", text):
        ids += [256 + specials.index(piece)] if piece in specials else piece.encode()
    return np.array(ids)


tokenizer = ByteTokenizer()
for example in ("Moon", "Où? Ω!", "<|user|>Hi"):
    print(f"{example!r:14} {len(example):2} characters -> {encode_bytes(example).tolist()}")

ids = tokenizer.encode(text).astype(np.int64)  # int64 [tokens]
assert np.array_equal(encode_bytes(text), ids) and tokenizer.decode(ids) == text
print(f"the package's ByteTokenizer: the same {len(ids):,} ids, V = {tokenizer.vocab_size}")

# %% [markdown]
# A **character** vocabulary has an id for each character that occurs in the training text. It is smaller here, and helpless
# before any character it has not seen.

# %%
characters = CharTokenizer.from_text(text)
print(f"V = {characters.vocab_size}, the same {len(characters.encode(text)):,} ids long, because this text is all ASCII")
try:
    characters.encode("Ω")
except DataError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## 2. Byte pairs
#
# Bytes make long sequences, and a model works as hard for a `q` as for the `u` behind it. **Byte-pair encoding** (Sennrich,
# Haddow & Birch 2016) lets the text decide: find the pair of neighboring tokens that occurs most often, make it one new
# token, and repeat. Pairs may not cross the border of a word, which is why the text is cut into words (each with the space
# before it) first; then it is enough to count each different word once, with its number of occurrences.

# %%
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")  # GPT-2's rule, for ASCII
# Ids: the special tokens, then all bytes, the printable ones first. The order decides only between equally frequent pairs.
printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
alphabet = printable + [byte for byte in range(256) if byte not in printable]
id_of = {byte: len(specials) + rank for rank, byte in enumerate(alphabet)}


def merge(word, pair, new):
    """A word, a tuple of ids, in which each occurrence of the pair has become one id."""
    merged, i = [], 0
    while i < len(word):
        found = word[i : i + 2] == pair
        merged.append(new if found else word[i])
        i += 2 if found else 1
    return tuple(merged)


def train_bpe(text, vocab_size):
    """The merges in the order in which they were made, {pair: new id}, and how many tokens the text had before each."""
    pieces = re.split("|".join(map(re.escape, specials)), text)
    found = Counter(word for piece in pieces for word in WORD.findall(piece))
    words = {tuple(id_of[byte] for byte in word.encode()): count for word, count in found.items()}
    merges, lengths = {}, []
    for new in range(len(specials) + 256, vocab_size):
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        lengths.append(sum(len(word) * count for word, count in words.items()))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges[best] = new
        words = {merge(word, best, new): count for word, count in words.items()}
    return merges, lengths


merges, lengths = train_bpe(text, 512)

# %% [markdown]
# What it found, in order. A space is shown as `·`.

# %%
octets = {id_of[byte]: bytes([byte]) for byte in range(256)}
for (a, b), new in merges.items():
    octets[new] = octets[a] + octets[b]
learned = [octets[new].decode().replace(" ", "·").replace("\n", "⏎") for new in merges.values()]
print("first:", " ".join(learned[:30]))
print("last: ", " ".join(learned[-16:]))

plt.plot(260 + np.arange(len(lengths)), lengths[0] / np.array(lengths))
plt.xlabel("vocabulary size $V$")
plt.ylabel("bytes a token")
plt.title("The first merges shorten the text most")
plt.show()

# %% [markdown]
# The package leaves this work to a library (`oxidizr-ref prepare --train-bpe 512`), which must find the same merges in the
# same order. Where the library `tokenizers` is not installed, this cell says so.

# %% tags=["varies"]
try:
    library = vocabulary.train_bpe([text], 512)
except DataError as error:
    library = None
    print(f"SKIPPED: {error}")
else:
    differing = [new for new in merges.values() if library.decode([new]).encode() != octets[new]]
    print(f"merges: {len(merges)}, of which the library finds another one at {len(differing)} places")
    assert not differing

# %% [markdown]
# Encoding with a BPE vocabulary applies the merges in the order in which they were learned:


# %%
def encode_bpe(text, merges):
    """The ids of a text, int64 ``[tokens]``."""
    ids, cache = [], {}
    for piece in re.split(f"({'|'.join(map(re.escape, specials))})", text):
        for word in [piece] if piece in specials else WORD.findall(piece):
            if word not in cache:
                symbols = (specials.index(word),) if word in specials else tuple(id_of[byte] for byte in word.encode())
                while pairs := [pair for pair in pairwise(symbols) if pair in merges]:
                    first = min(pairs, key=merges.__getitem__)
                    symbols = merge(symbols, first, merges[first])
                cache[word] = symbols
            ids += cache[word]
    return np.array(ids)


sentence = "The rings are made of many pieces of ice and rock."
bpe_ids = encode_bpe(text, merges)
print("|".join(octets[i].decode() for i in encode_bpe(sentence, merges)))
print(f"the corpus: {len(ids):,} bytes and marks, {len(bpe_ids):,} BPE tokens")

# %% [markdown]
# There is no free lunch. A larger vocabulary makes sequences shorter (less work, and more text within the model's reach),
# and makes the first and the last matrix of the model larger, and each row of them rarer. Today's large models have $V$
# between about 32,000 and 260,000; for the small ones on these pages bytes are enough.
#
# ## 3. Windows: what is predicted from what
#
# Training reads the stream in **windows** of $T+1$ tokens. The first $T$ are the input; the same moved by one are the
# targets. One window thus asks $T$ questions at once: *what follows the first token? the first two? …* Neighboring windows
# share one token, so that every token but the very first is a target once (what is too short for a window, at the end, is
# left out). The last part of the stream is held out and never trained on.

# %%
T, held_out = 64, len(ids) // 10
train, test = ids[:-held_out], ids[-held_out:]


def window(stream, i):
    """Tokens and targets of window i: int64 ``[T]`` each."""
    cut = stream[i * T : i * T + T + 1]
    return cut[:-1], cut[1:]


stream = TokenStream([Source("corpus", ids.astype(np.uint32))])
windows = Windows(stream, seq_len=T, eval_fraction=0.1, seed=0)
tokens, targets, _ = windows.eval_batch(0, 4)  # int64 [4, T] each, held out
for i in range(4):
    assert np.array_equal(window(test, i)[0], tokens[i]) and np.array_equal(window(test, i)[1], targets[i])
print(f"{windows.train_windows} windows to train on, {windows.eval_windows} held out, as by hand")
for t in range(6):
    print(f"after {tokenizer.decode(tokens[0, : t + 1])!r:12} comes {tokenizer.decode(targets[0, t : t + 1])!r}")

# %% [markdown]
# ## 4. The loss
#
# A model turns the tokens so far into a probability for each token that may come next, $p(v \mid x_1 \dots x_t)$. By the
# product rule the probability of a whole text is $\prod_t p(x_{t+1} \mid x_1 \dots x_t)$, an absurdly small number, so one
# takes its negative logarithm, and divides by the number of tokens to be able to compare texts of different length:
#
# $$\text{loss} = -\frac1N \sum_{t} \ln p(x_{t+1} \mid x_1 \dots x_t) \qquad\text{(cross-entropy, in nats a token)}$$
#
# The same number on three scales:
#
# | | | says |
# |---|---|---|
# | cross-entropy | $\ell$ nats, $\ell/\ln 2$ bits a token | the length of a code that uses this model (Shannon 1948) |
# | perplexity | $e^\ell$ | it is as unsure as among so many equally likely tokens |
# | bits per byte | $\frac{\ell}{\ln 2}\cdot\frac{\text{tokens}}{\text{bytes}}$ | comparable across vocabularies |
#
# A model computes real numbers $z_v$, the **logits**, and the **softmax** makes probabilities of them:
# $p_v = e^{z_v} / \sum_u e^{z_u}$. So $-\ln p_v = \ln\sum_u e^{z_u} - z_v$. To keep the exponentials from overflowing, the
# largest logit is subtracted first, which changes nothing in the quotient.


# %%
def cross_entropy(logits, targets):
    """Nats for each target. logits ``[..., V]``, targets ``[...]``."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(axis=-1))
    return log_total - np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]


config = load_config("tiny-llama", ["model.max_seq_len=64", "model.dtype=f64"])
model = LanguageModel(config.model, seed=0)  # untrained
logits = model(tokens).data  # [4, 64, 260]
by_hand = cross_entropy(logits, targets).mean()
by_package = model.loss(tokens, targets).item()
print(f"by hand {by_hand:.6f} nats a token, by the package the same to {abs(by_hand - by_package):.0e}")
assert abs(by_hand - by_package) < 1e-12

# %% [markdown]
# (`model.loss` never forms the array of all logits, which is why it is written differently:
# `oxidizr_ref/fused/linear_cross_entropy.py`.)
#
# ## 5. Before the first step: $\ln V$
#
# 5.56 is no accident. An untrained model knows nothing, its logits are all nearly zero, each of $V = 260$ tokens gets about
# $1/V$, and $-\ln(1/260) = 5.56$. More precisely: if the logits are independent of the target and normal with standard
# deviation $\sigma$, the mean of $e^{z}$ is $e^{\sigma^2/2}$, and so the loss is about
#
# $$\ell \approx \ln V + \tfrac{\sigma^2}{2}.$$
#
# Confident nonsense costs extra. We can see it by making the logits of the untrained model larger:

# %%
logits_std = logits.std()
sigmas = np.linspace(0, 3, 25)
measured = [cross_entropy(logits * sigma / logits_std, targets).mean() for sigma in sigmas]
plt.plot(sigmas, measured, "o", markersize=4, label="measured")
plt.plot(sigmas, math.log(260) + sigmas**2 / 2, "--", color=COLORS["red"], label="$\\ln V + \\sigma^2/2$")
plt.xlabel("standard deviation $\\sigma$ of the logits")
plt.ylabel("loss (nats a token)")
plt.title("Before training: ln V, and more if the logits are large")
plt.legend()
plt.show()
at_targets = np.take_along_axis(logits, targets[..., None], axis=-1).mean() / logits_std
print(f"this model: σ = {logits_std:.2f}, ln 260 + σ²/2 = {math.log(260) + logits_std**2 / 2:.3f}, measured {by_hand:.3f}")
print(f"mean logit at the targets: {at_targets:.2f} σ")

# %% [markdown]
# (Two deviations. The measured values begin above the curve, because the logits at the targets are by chance not 0 on
# average; the printed number times $\sigma$ is what is missing. For large $\sigma$ they bend below it: a sum of 260
# exponentials is then ruled by its largest few, and rarely reaches the mean.)
#
# This makes a test that costs one forward pass. **A first loss far above $\ln V$** means weights that begin too large. **A
# first loss below $\ln V$** means that the model sees its targets: a missing mask, or targets that were not moved by one.
#
# ## 6. What counting achieves
#
# The second number to know is what a model must beat. Count, in the training part, how often each token occurs
# (**unigram**), follows each token (**bigram**), follows each two (**trigram**):
#
# $$\hat p(t) = \frac{c(t)}{N} \quad \hat p(t \mid b) = \frac{c(bt)}{c(b)} \quad \hat p(t \mid a b) = \frac{c(abt)}{c(ab)}$$


# %%
def codes(ids, n, V):
    """Each run of n tokens as one number: int64 ``[len(ids) - n + 1]``."""
    return sum(ids[i : len(ids) - n + 1 + i] * V ** (n - 1 - i) for i in range(n))


def counts(train, n, V, asked):
    """How often each run in ``asked`` (codes) occurs in ``train``."""
    known, number = np.unique(codes(train, n, V), return_counts=True)
    place = np.searchsorted(known, asked).clip(max=len(known) - 1)
    return np.where(known[place] == asked, number[place], 0)


def probabilities(train, text, V):
    """What four models say of each token of ``text`` but the first two, ``[n, 4]``: uniform, uni-, bi-, trigram."""
    one, two, three = (codes(text, n, V) for n in (1, 2, 3))
    c_t, c_b = (counts(train, 1, V, part) for part in (one[2:], one[1:-1]))
    c_bt, c_ab = (counts(train, 2, V, part) for part in (two[1:], two[:-1]))
    c_abt = counts(train, 3, V, three)
    uniform = np.full(len(three), 1 / V)
    return np.stack([uniform, c_t / len(train), c_bt / np.maximum(c_b, 1), c_abt / np.maximum(c_ab, 1)], axis=1)


seen, unseen = probabilities(train, train, 260), probabilities(train, test, 260)
print("                 uniform  unigram  bigram  trigram")
print("training text  ", *(f"{-np.log(p).mean():7.2f} " for p in seen.T))
print("held-out text: probability 0 for", *(f"{np.mean(p == 0):7.2%}" for p in unseen.T))

# %% [markdown]
# On the text that was counted, the trigram seems wonderful. On held-out text it is a disaster: one token in seventy was
# never seen after these two, gets probability zero, and costs $-\ln 0 = \infty$ nats. One number computed on training text
# says little; this is the whole reason for holding something out.
#
# The remedy of Jelinek & Mercer (1980): mix the four models, $p = \sum_k w_k \hat p_k$ with $\sum_k w_k = 1$. The weights
# must not be fitted on counted text either (there the trigram would take all), so the last tenth of the training part is
# set aside for them. Fitting by *expectation maximization* is three lines: to each token, ask which share of its
# probability each model had; the mean shares are the next weights.


# %%
def mixture_loss(train, test, V, models):
    """Nats for each token of ``test`` but its first two, by a mixture of the first ``models`` models; and the weights."""
    cut = len(train) * 9 // 10
    aside = probabilities(train[:cut], train[cut:], V)[:, :models]
    weights = np.full(models, 1 / models)
    for _ in range(200):
        share = weights * aside
        weights = (share / share.sum(axis=1, keepdims=True)).mean(axis=0)
    return -np.log(probabilities(train, test, V)[:, :models] @ weights), weights


# The same targets as those of the held-out windows: the two tokens before them are context.
scored = np.concatenate([train[-1:], test])[: 2 + windows.eval_windows * T]
names = ["uniform", "unigram", "bigram", "trigram"]
baselines = {}
for models, name in enumerate(names, 1):
    losses, weights = mixture_loss(train, scored, 260, models)
    baselines[name] = losses.mean()
    mixed = " + ".join(f"{w:.2f} {n}" for w, n in zip(weights, names, strict=False) if w >= 0.005)
    print(f"{name:8} {losses.mean():.3f} nats a token, perplexity {math.exp(losses.mean()):6.1f}   = {mixed}")

# %% [markdown]
# The last number, 1.80, is the one that the README of this project holds its bundled model against.
#
# ## 7. A model passes them by
#
# Train a small Llama (two layers, 64 wide) on the same text, and watch its held-out loss. It begins at $\ln V$. What does it
# learn first?

# %%
sizes = ["hidden_size=64", "intermediate_size=192", "max_seq_len=64"]
model = LanguageModel(load_config("tiny-llama", sizes).model, seed=0)
optimizer = AdamW(model.state_dict(), lr=3e-3)
curve = []
for step in range(321):
    if step % 20 == 0 or step in (2, 5, 10):
        batches = (windows.eval_batch(i, 32) for i in range(-(-windows.eval_windows // 32)))
        curve.append((step, evaluation.mean_loss(model, batches)))
    loss = model.loss(*windows.batch(step * 16, 16)[:2])
    loss.backward()
    optimizer.step({name: p.grad for name, p in model.named_parameters()})
    model.zero_grad()

# %% tags=["varies"]
plt.figure(figsize=(7, 3.6))
plt.plot(*zip(*curve, strict=True), "o-", markersize=3, label="the model")
for (name, value), color in zip(baselines.items(), ["black", "red", "orange", "green"], strict=True):
    plt.axhline(value, color=COLORS[color], linestyle="--", linewidth=1)
    plt.text(322, value + 0.06, f"{name} {value:.2f}", ha="right", fontsize=9, color=COLORS[color])
plt.xlabel("optimizer step")
plt.ylabel("held-out loss (nats a token)")
plt.title("First how often letters are, then which follow which, then more")
plt.legend(loc="center right")
plt.show()
for name in names[1:]:
    first = next((step for step, value in curve if value < baselines[name]), None)
    print(f"{name}: {'not passed' if first is None else f'passed by step {first}'}")

# %% [markdown]
# It learns in this order: how often tokens are, within the first steps; then which follows which; then what counting cannot
# see. That makes the baselines a tool. A model whose loss stays at the unigram line has no access to its context (look at
# masks and positions); one that stays at the bigram line sees nothing but the last token.
#
# ## 8. Comparing across vocabularies
#
# Now take the same counting models, on BPE tokens. Is the loss better or worse?

# %%
tail = tokenizer.decode(test)  # the held-out text itself, so that both vocabularies are asked about the same
text_bytes = np.count_nonzero(test < 256)  # special tokens are no text


def held_out_losses(encode, V):
    """Nats for each token of the held-out text, by the trigram mixture."""
    counted = encode(text[: -len(tail)])
    return mixture_loss(counted, np.concatenate([counted[-2:], encode(tail)]), V, 4)[0]


def bits_per_byte(losses):
    return losses.sum() / math.log(2) / text_bytes


byte_losses = held_out_losses(encode_bytes, 260)
bpe_losses = held_out_losses(lambda text: encode_bpe(text, merges), 512)
for name, losses in (("bytes", byte_losses), ("BPE, V = 512", bpe_losses)):
    print(f"{name:12} {len(losses):5} tokens, {losses.mean():.2f} nats a token, {bits_per_byte(losses):.2f} bits per byte")
stream = TokenStream([Source("held out", np.concatenate([train[-1:], test]).astype(np.uint32))])
assert evaluation.text_bytes(stream, tokenizer) == text_bytes  # what `oxidizr-ref eval` divides by

# %% [markdown]
# Per token the BPE model looks much worse, and per byte it is better: its tokens are longer, so each is harder, and there
# are fewer of them. Losses *per token* compare only between models with the same tokenizer. Bits per byte compare always.
#
# ## Exercises
#
# ### Exercise 1: tokens that see the future
# Train nothing: build a "model" that cheats, `cheating_logits(tokens, targets, strength)`, zero everywhere but `strength`
# at the target. What strength gives a loss of 1 nat for $V = 260$? Solve the equation by hand and set `strength`. It must
# satisfy
#
# ```python
# z = cheating_logits(tokens, targets, strength)
# assert abs(cross_entropy(z, targets).mean() - 1) < 1e-12
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def cheating_logits(tokens, targets, strength):
    """Zero, but ``strength`` at the target: ``[..., 260]``."""
    z = np.zeros((*tokens.shape, 260))
    np.put_along_axis(z, targets[..., None], strength, axis=-1)
    return z


# ln(e^s + V-1) - s = 1  =>  1 + (V-1) e^-s = e  =>  s = ln((V-1) / (e-1))
strength = math.log((260 - 1) / (math.e - 1))
z = cheating_logits(tokens, targets, strength)
assert abs(cross_entropy(z, targets).mean() - 1) < 1e-12
print(f"a logit of {strength:.2f} above all others is enough for a loss of 1 nat")

# %% [markdown]
# ### Exercise 2: the gradient of the loss
# Derive $\partial \ell/\partial z_v$ for one token with target $y$, and write `logit_gradient(z, y)` for a vector `z`. It
# must satisfy
#
# ```python
# z = Tensor(np.array([0.3, -1.0, 2.0, 0.0]), requires_grad=True)
# (-ops.log_softmax(z)[1]).backward()
# assert np.allclose(logit_gradient(z.data, 1), z.grad, rtol=1e-14)
# assert abs(logit_gradient(z.data, 1).sum()) < 1e-15
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def logit_gradient(z, y):
    """d(ln Σ e^z - z_y)/dz_v = p_v - [v = y]: push the target up, everything else down by its probability."""
    p = np.exp(z - z.max())
    p /= p.sum()
    p[y] -= 1
    return p


z = Tensor(np.array([0.3, -1.0, 2.0, 0.0]), requires_grad=True)
(-ops.log_softmax(z)[1]).backward()
assert np.allclose(logit_gradient(z.data, 1), z.grad, rtol=1e-14)
assert abs(logit_gradient(z.data, 1).sum()) < 1e-15
print("softmax minus one-hot:", np.round(z.grad, 4))

# %% [markdown]
# ### Exercise 3: learn the answers alone
# In a chat only the answers are to be learned, so the other targets are marked −100 and left out of the mean. Compute
# `answers_only`, the mean of your own `cross_entropy` over what the assistant says (everything after `<|assistant|>`, id
# 258, up to and including `<|endoftext|>`, id 256), in the first chat of the corpus. It must satisfy
#
# ```python
# chat = tokenizer.encode(text[text.index("<|user|>") :].split("\n")[0]).astype(np.int64)[None]
# marked = np.where(answers, chat[:, 1:], -100)  # answers: bool, which targets are learned
# assert tokenizer.decode(chat[:, 1:][answers]) == "It becomes a butterfly or a moth.<|endoftext|>"
# assert abs(answers_only - model.loss(chat[:, :-1], marked).item()) < 1e-5
# ```

# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
chat = tokenizer.encode(text[text.index("<|user|>") :].split("\n")[0]).astype(np.int64)[None]
begin = int(np.flatnonzero(chat[0] == 258)[0])  # the target right after this token is the first of the answer
answers = np.arange(1, chat.shape[1])[None] > begin
marked = np.where(answers, chat[:, 1:], -100)
each = cross_entropy(model(chat[:, :-1]).data, chat[:, 1:])
answers_only = each[answers].mean()
assert tokenizer.decode(chat[:, 1:][answers]) == "It becomes a butterfly or a moth.<|endoftext|>"
assert abs(answers_only - model.loss(chat[:, :-1], marked).item()) < 1e-5
print(f"{answers.sum()} of {answers.size} targets are the answer {tokenizer.decode(chat[0, begin + 1 :])!r}")

# %% [markdown]
# ### Exercise 4: how far can BPE go?
# Keep the trigram mixture and let the vocabulary grow: 260, 320, 384, 448, 512. Collect bits per byte in a dict `by_size`.
# (A vocabulary of fewer ids is the first part of the larger one's merges.) At first it helps, because a trigram of longer
# tokens sees further. It must satisfy
#
# ```python
# assert by_size[512] < by_size[260]
# assert by_size[512] == bits_per_byte(bpe_losses)
# ```


# %% tags=["solution", "hide-cell"] jupyter={"source_hidden": true}
def trigram_bits_per_byte(V):
    fewer = {pair: new for pair, new in merges.items() if new < V}
    return bits_per_byte(held_out_losses(lambda text: encode_bpe(text, fewer), V))


by_size = {V: trigram_bits_per_byte(V) for V in (260, 320, 384, 448, 512)}
assert by_size[512] < by_size[260]
assert by_size[512] == bits_per_byte(bpe_losses)
print(", ".join(f"V = {V}: {bits:.3f}" for V, bits in by_size.items()))

# %% [markdown]
# ## Where to read on
#
# - Shannon (1948), *A Mathematical Theory of Communication*, section 3 (n-gram approximations to English) and section 7
#   (entropy); Shannon (1951), *Prediction and Entropy of Printed English*: how good people are.
# - Sennrich, Haddow & Birch (2016), *Neural Machine Translation of Rare Words with Subword Units*, section 3.
# - Radford et al. (2019), *Language Models are Unsupervised Multitask Learners*, section 2.2: BPE on bytes.
# - Jelinek & Mercer (1980), *Interpolated estimation of Markov source parameters from sparse data*; Chen & Goodman (1999),
#   *An empirical study of smoothing techniques for language modeling*.
# - Here: [data](../docs/data.md), `oxidizr_ref/tokenizers.py`, `oxidizr_ref/data.py`, `oxidizr_ref/evaluation.py`,
#   `docs/scripts/trigram.py`.
# - Next: [03 · RMSNorm by hand](03_rmsnorm_by_hand.ipynb).
