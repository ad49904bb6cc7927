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
# # 17 · Train, generate, publish
#
# The whole way, once: a text of one's own becomes tokens, a model is trained on them, judged, made to write, and packed so
# that others can open it. Every stage is done by command, as one does it on a real project, and in Python, to see what the
# command does.
#
# The text is a world so small that everything the model says can be checked: sums of two digits, such as `7+8=15.`
#
# **After this you can**
#
# - prepare a text, write a config, train, evaluate, generate and pack, by command and from Python;
# - say what temperature, top-k and top-p do to a distribution, write them in a few lines, and measure what they do to the
#   truth;
# - compare a loss with the best that is possible, and tell memory from skill;
# - say what belongs into a published model, and check a package before anyone sees it.
#
# **Needs** notebooks 02 (tokens, loss), 05 (a transformer), 14 (what a checkpoint is good for). **Time** 40 minutes.

# %%
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from figures import COLORS, plt

from oxidizr_ref import LanguageModel, Trainer, load_config, rng
from oxidizr_ref.config import DataConfig
from oxidizr_ref.data import open_stream
from oxidizr_ref.evaluation import joined, scores, whole_windows
from oxidizr_ref.generation import generate
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.interop.pack import Wishes, pack
from oxidizr_ref.interop.package_check import check_package
from oxidizr_ref.interop.source import choose
from oxidizr_ref.prepare.pipeline import PrepareOptions, prepare
from oxidizr_ref.sampling import Sampling, candidates
from oxidizr_ref.token_files import read_meta

temporary = tempfile.TemporaryDirectory()
HERE = Path(temporary.name)


def command(line):
    """Run a command of the package in the temporary directory. Returns its output, or else what it told meanwhile."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and k not in ("FORCE_COLOR", "CLICOLOR_FORCE")
    }
    arguments = [sys.executable, "-m", "oxidizr_ref", *shlex.split(line)]
    ran = subprocess.run(arguments, cwd=HERE, env={**environment, "COLUMNS": "100"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout or ran.stderr


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# %% [markdown]
# ## A text
#
# There are 100 sums of two digits. Ten of them are never shown to the model; they will tell whether it *adds* or
# *remembers*. The other 90 stand in the text 120 times each, in an order drawn anew for every round. Documents are
# separated by `<|endoftext|>`.

# %%
FACTS = [f"{a}+{b}={a + b}." for a in range(10) for b in range(10)]
drawn = rng.permutation(0, "left out", 0, 100)
left_out, known = [FACTS[i] for i in sorted(drawn[:10])], [FACTS[i] for i in sorted(drawn[10:])]
rounds = [known[i] for e in range(120) for i in rng.permutation(0, "round", e, len(known))]
(HERE / "sums.txt").write_text("<|endoftext|>".join(rounds))
print("never shown:", " ".join(left_out))
print("the text begins:", (HERE / "sums.txt").read_text()[:67])

# %% [markdown]
# ## Prepare
#
# Text becomes token ids in files ([data](../docs/data.md)). The tokenizer `byte` has 256 bytes and 4 special tokens. One
# document in twenty goes to a second file, for judging.

# %%
print(command("prepare sums.txt -o sums.bin --validation 0.05"))
options = PrepareOptions([str(HERE / "sums.txt")], HERE / "again.bin", validation=0.05)
prepared = prepare(options)  # the same in Python
for name in ("sums.bin", "sums.validation.bin", "sums.documents.u64"):
    assert sha256(HERE / name) == sha256(HERE / name.replace("sums", "again"))
print("in Python: the same files;", {path.name: meta.tokens for path, meta in prepared.metas.items()}, "tokens")

# %% [markdown]
# There is nothing hidden in the files. `sums.bin` holds numbers of 4 bytes, `sums.documents.u64` where documents begin:

# %%
tokens = np.fromfile(HERE / "sums.bin", dtype="<u4")
begins = np.fromfile(HERE / "sums.documents.u64", dtype="<u8")
print("tokens:", *tokens[:20])
print("documents begin at:", *begins[:6])
meta = read_meta(HERE / "sums.bin")
print("from the file beside it:", {key: getattr(meta, key) for key in ("vocab_size", "end_of_text", "documents", "largest")})

# %% [markdown]
# ## A config
#
# A small Llama. Two keys deserve a word. `document_boundaries: reset` keeps documents apart: a token looks at its own
# document only, though a window of 64 tokens holds eight of them. And `eval_fraction` keeps the end of the file away from
# training, so that a held-out loss is known on the way.

# %%
(HERE / "sums.yaml").write_text("""\
model:
  name: sums
  hidden_size: 64
  num_layers: 2
  num_heads: 4
  kv_heads: 2
  intermediate_size: 192
  vocab_size: 260
  max_seq_len: 64
trainer:
  learning_rate: 1e-2
  lr_schedule: cosine
  warmup_steps: 20
  batch_size: 8
  max_steps: 400
  eval_fraction: 0.02
  eval_interval: 25
  save_interval: 100
  log_interval: 10
  target_device: cpu
data:
  path: sums.bin
  document_boundaries: reset
""")
print("\n".join(command("inspect -f sums.yaml").splitlines()[:12]))

# %% [markdown]
# ## Train
#
# By command: `oxidizr-ref train -f sums.yaml`, with a progress bar, Ctrl-C to stop, `--resume auto` to go on. In Python a
# `Trainer`. Is it the same? For 20 steps, both:


# %%
def config(directory, *more):
    return load_config(HERE / "sums.yaml", [f"checkpoint_dir={HERE / directory}", *more])


short = config("short", "max_steps=20")
Trainer(short, LanguageModel(short.model, seed=short.trainer.seed)).fit()
command("train -f sums.yaml --max-steps 20 --checkpoint-dir short-by-command --headless")
same = [sha256(HERE / directory / "step_20.safetensors") for directory in ("short", "short-by-command")]
assert same[0] == same[1]
print("step_20.safetensors of the command and of the Trainer: the same bytes")

# %%
full = config("run")
model = LanguageModel(full.model, seed=full.trainer.seed)
outcome = Trainer(full, model).fit()
lines = [json.loads(line) for line in (HERE / "run" / "metrics.jsonl").read_text().splitlines()]
print("files of the run:", sorted(path.name for path in (HERE / "run").iterdir() if path.name[0] != "."))

# %% [markdown]
# ## How good could it be?
#
# A loss alone says little. What would the best possible predictor get? It knows the 90 sums and nothing else, for there is
# nothing else to know: which sum comes next is chance, and documents are kept apart. So a document costs $\ln 90$ nats,
# whatever its length, and a token
#
# $$ L^* = \frac{\ln 90}{\text{tokens a document}} $$
#
# on average. (At the beginning of a window a document may be cut in two, and the second half has to be guessed without the
# first. That costs a little more than $L^*$; no model can avoid it.)

# %%
floor = math.log(len(known)) / (meta.tokens / meta.documents)
figure, axes = plt.subplots()
axes.plot(
    [r["step"] for r in lines if "loss" in r],
    [r["loss"] for r in lines if "loss" in r],
    color="0.7",
    label="training, one batch",
)
evaluated = [(r["step"], r["eval_loss"]) for r in lines if "eval_loss" in r]
axes.plot(*zip(*evaluated, strict=True), "o-", color=COLORS["blue"], label="held out")
axes.axhline(floor, linestyle=":", color="0.2", label="the best that is possible")
axes.set(
    xlabel="step",
    ylabel="loss (nats a token)",
    title="how sentences look is learned at once, what they say later",
    ylim=(0.5, 1.6),
)
axes.legend()
plt.show()

# %% [markdown]
# Every checkpoint of the run can be opened and asked. How many of 200 sentences that it writes are true?

# %%
end = meta.end_of_text
stream, tokenizer = open_stream([HERE / "sums.validation.bin"], "byte", vocab_size=260, seed=0)


def sentences(model, count=200, **settings):
    """What a model writes after nothing but an end-of-text token."""
    sampling = Sampling(**{"max_tokens": 12, "temperature": 1.0, "top_k": 0, **settings})
    drawn = generate(model, [np.array([end])] * count, sampling, ends={end})
    return [tokenizer.decode(np.array(d.tokens, dtype=np.uint32)) for d in drawn]


# %% tags=["varies"]
for step in (100, 200, 300, 400):
    texts = sentences(open_model(HERE / "run" / f"step_{step}.safetensors").model())
    well_formed = sum(re.fullmatch(r"[0-9]\+[0-9]=[0-9]{1,2}\.", text) is not None for text in texts)
    true = sum(text in FACTS for text in texts)
    print(
        f"step {step}: held-out loss {dict(evaluated)[step]:.3f}, "
        f"{well_formed / 200:.0%} look like a sum, {true / 200:.0%} are true"
    )
print(f"the best possible loss is {floor:.3f}")

# %% [markdown]
# After a quarter of the training nearly everything looks like a sum, and most of it is false. Most of the loss is gone by
# then. The arithmetic is in what is left: **a little loss can be a lot of skill**, and the last tenths of a long training
# are not for nothing.
#
# Where in the sentence the uncertainty sits shows directly. For the known sentences whose sum has two digits, the loss at
# each character, by hand from the logits:


# %%
def losses(model, sentence):
    """-ln p of each character of a sentence, and of the end behind it, nats. Before the first is an end-of-text token."""
    ids = np.array([end, *sentence.encode(), end])
    logits = model(ids[None, :-1]).data[0].astype(np.float64)  # [T,V]
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -log_probs[np.arange(len(ids) - 1), ids[1:]]


by_place = np.mean([losses(model, sentence) for sentence in known if len(sentence) == 7], axis=0)
figure, axes = plt.subplots(figsize=(7, 2.8))
axes.bar(range(8), by_place, color=COLORS["blue"])
axes.axhline(math.log(10), linestyle=":", color="0.4")
axes.text(4, math.log(10) + 0.05, "ln 10: any digit", fontsize=9)
axes.set_xticks(range(8), [*"a+b=1c.", "end"])
axes.set(
    xlabel="character",
    ylabel="mean loss (nats)",
    title="where the uncertainty is: in the two digits that are free",
    ylim=(0, 2.8),
)
axes.grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# The two digits cost about $\ln 10 = 2.3$ each, as they must. Signs cost nothing. What is left at `1` and `c` is arithmetic
# that is not quite certain.
#
# ## Evaluate
#
# `oxidizr-ref eval` reads a file that was not trained on. With `--documents-apart` documents are kept apart as in training;
# without it the model is asked about contexts that it never saw.

# %% tags=["varies"]
print(command("eval run -d sums.validation.bin --documents-apart"))

# %%
opened = open_model(HERE / "run")  # the newest whole checkpoint
APART = DataConfig(document_boundaries="reset")
found = joined(scores(opened.model(), whole_windows(stream, 64, 8, APART), 64))
(told,) = json.loads(command("eval run -d sums.validation.bin --documents-apart --batch-size 8 --json"))["models"]
assert told["loss"] == found.loss()
print("in Python, with the same batches: the same loss to the last bit")

# %% [markdown]
# ## From logits to text
#
# A model gives logits $z_i$, one for each token. The next token is drawn from
#
# $$ p_i = \frac{\exp(z_i / \tau)}{\sum_j \exp(z_j / \tau)} $$
#
# with the **temperature** $\tau$. $\tau = 1$ is the model's own distribution. The ratio of two probabilities is raised to
# the power $1/\tau$: below 1 likely tokens get likelier, in the limit 0 only the likeliest is left; above 1 all come
# closer.
#
# **Top-k** draws only from the $k$ likeliest tokens. **Top-p** (nucleus sampling, Holtzman et al. 2020) draws from the
# smallest set of likeliest tokens whose probabilities add up to at least $p$: few where the model is certain, many where it
# is not.


# %%
def by_hand(z, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities [V] from which the next token is drawn."""
    e = np.exp((z - z.max()) / temperature)
    if top_k:
        e[np.argsort(-z, kind="stable")[top_k:]] = 0
    p = e / e.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]  # what the likelier ones have together
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p


prompt = np.array([end, *b"7+8=1"])
z = model(prompt[None]).data[0, -1].astype(np.float64)
for settings in ({}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"temperature": 1.5, "top_p": 0.9}):
    tokens_left, weights = candidates(
        z, np.array([], dtype=np.int64), Sampling(**{"temperature": 1.0, "top_k": 0, **settings})
    )
    theirs = np.zeros(260)
    theirs[tokens_left] = weights / weights.sum()
    assert np.allclose(theirs, by_hand(z, **settings), rtol=1e-12, atol=1e-15)
print("by hand and oxidizr_ref.sampling.candidates: the same distributions")

# %%
figure, axes = plt.subplots(figsize=(8, 3.4))
for temperature, color in ((0.5, "blue"), (1.0, "green"), (1.5, "orange"), (2.0, "red")):
    p = np.sort(by_hand(z, temperature))[::-1]
    axes.loglog(range(1, 261), np.maximum(p, 1e-12), ".-", color=COLORS[color], label=f"temperature {temperature}")
axes.set(xlabel="rank of the token", ylabel="probability", title='the 260 tokens after "7+8=1"', ylim=(1e-9, 2))
axes.legend()
plt.show()

# %% tags=["varies"]
for temperature in (0.5, 1.0, 1.5, 2.0):
    p = by_hand(z, temperature)
    nucleus = np.count_nonzero(by_hand(z, temperature, top_p=0.9))
    print(
        f"temperature {temperature}: p(5) = {p[ord('5')]:.4f}, all that are no digits {1 - p[48:58].sum():.4f}; "
        f"90% are with {nucleus} of the 260 tokens"
    )

# %% [markdown]
# At temperature 2 each of the 250 tokens that make no sense here is still improbable. But there are 250 of them, and
# together they are not. The tail is what goes wrong at high temperatures, and it is what top-k and top-p cut off.
#
# ### What it does to the truth
#
# In this world truth can be counted. 200 sentences for each setting: how many are true? And how many different true ones
# are there?

# %%
temperatures = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2))
for top_p, color in ((1.0, "red"), (0.9, "blue"), (0.5, "green")):
    texts = [sentences(model, temperature=t, top_p=top_p) for t in temperatures]
    true = [[text for text in some if text in FACTS] for some in texts]
    left.plot(temperatures, [len(some) / 200 for some in true], "o-", color=COLORS[color], label=f"top-p {top_p}")
    right.plot(temperatures, [len(set(some)) for some in true], "o-", color=COLORS[color], label=f"top-p {top_p}")
left.set(xlabel="temperature", ylabel="true sentences (share)", title="truth", ylim=(-0.03, 1.03))
right.set(
    xlabel="temperature", ylabel="different true sentences", title="variety (of 100 sums, in 200 sentences)", ylim=(0, 100)
)
left.legend(), right.legend()
plt.show()

# %% tags=["varies"]
for settings in (
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"temperature": 1.0},
    {"temperature": 2.0},
    {"temperature": 2.0, "top_p": 0.5},
):
    print(f"{settings!s:36s}", "   ".join(ascii(text)[1:-1] for text in sentences(model, 3, **settings)))

# %% [markdown]
# At temperature 0 there is one sentence, for ever. From there on variety grows, at first at no cost; then truth goes, and
# at 2 both do, for only true sentences are counted as variety. What one wants is that the *free* digits are drawn from all
# ten and the *sum* is not drawn at all. A temperature cannot tell these apart. Top-p can: it keeps many tokens where the
# model hesitates between many, and one where it is sure, so with top-p 0.5 nearly everything is true even at temperature
# 1.5. Its price is in the right panel, too: of ten equally likely digits it leaves out half, twice, and $5 \cdot 5 = 25$.
#
# Random numbers are addressed (notebook 14): token $i$ of sentence $b$ is drawn by number $i$ of the stream (seed, $b$). So
# equal seeds give equal text, and adding a prompt changes no other:

# %%
assert sentences(model, 5, seed=3) == sentences(model, 5, seed=3) == sentences(model, 50, seed=3)[:5]
assert sentences(model, 5, seed=3) != sentences(model, 5, seed=4)
line = "generate run -p 7+8= --temperature 0 --max-tokens 8"
print(f"$ oxidizr-ref {line}\n{command(line)}")

# %% [markdown]
# ## Pack
#
# A checkpoint is for going on: it has moments, the position in the data, the machine's fingerprint. A **package** is for
# others: weights, config, tokenizer, and a card that says what it is. `oxidizr-ref pack` makes one
# ([publishing](../docs/publishing.md)):

# %%
command("pack --checkpoint-dir run -c final -u me --license cc0-1.0 --language en")
package = HERE / "hf" / "me" / "sums"
packed = pack(
    choose(HERE / "run", "final"),
    Wishes(name="sums", username="me", output=HERE / "again", license="cc0-1.0", languages=("en",)),
)
assert all(sha256(package / name) == sha256(HERE / "again" / name) for name in packed.sizes)
print(*sorted(packed.sizes), sep="\n")
print("\nlayout:", packed.family, "- which Hugging Face's transformers opens; the same bytes by command and in Python")

# %%
card = (package / "README.md").read_text()
print(card.split("## Training")[0])
print("sections of the card:", [line[3:] for line in card.splitlines() if line.startswith("## ")])

# %% [markdown]
# Every number on the card is from the files. What the files do not say (where the text is from, what the model must not be
# used for) is for you to write.
#
# Others open it like this. It must be the same model, to the bit, and say the same:

# %%
theirs = open_model(package)
assert all(np.array_equal(theirs.weights[name], array) for name, array in model.state_dict().items())
assert sentences(theirs.model(), 20, seed=1) == sentences(model, 20, seed=1)
print(
    "opened:",
    theirs.config.name,
    "-",
    len(theirs.weights),
    "tensors, tokenizer",
    theirs.its_tokenizer().name,
    "- the same 20 sentences",
)

# %% [markdown]
# ## Before anyone sees it
#
# `push` checks a package first: parts that are missing, damaged weights, numbers that are not finite, names and shapes that
# do not belong to the config, files that should not be published, anything that looks like a token of the hub. In Python:

# %%
print("problems:", check_package(package))
(package / ".env").write_text("HF_TOKEN=not-a-real-one\n")
weights = package / "model.safetensors"
good = weights.read_bytes()
weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # one bit
for problem in check_package(package):
    print("-", problem.split(";")[0].replace(f"{HERE}/", ""))
(package / ".env").unlink()
weights.write_bytes(good)
assert check_package(package) == []

# %% [markdown]
# Then, and only with an account of your own (this is not run here):
#
# ```bash
# export HF_TOKEN=hf_...                                  # with the right to write
# oxidizr-ref push -m hf/me/sums --create-repo --private  # shows what it would upload and where to, asks, uploads
# ```
#
# It uploads in one commit: nobody ever sees half a model. Begin with `--private`, look at the page, then open it.
#
# Before publishing, ask: may the text be used in this way, and does the card say where it is from? Is there anything
# private in it that the model could repeat? Does the card say what the model cannot do? For this one: how far it can be
# trusted with sums that it has not seen is measured in the second exercise.
#
# ## Exercises
#
# **1. Min-p.** Draw only from tokens at least `min_p` times as probable as the likeliest (Nguyen et al. 2024). Add it to
# `by_hand` as `with_min_p(z, temperature, min_p)`, check it against the package, and find out which of `top_p=0.9` and
# `min_p=0.1` keeps more truth at temperature 1.5.
#
# ```python
# tokens_left, weights = candidates(z, np.array([], dtype=np.int64), Sampling(temperature=1.5, top_k=0, min_p=0.1))
# assert np.allclose(with_min_p(z, 1.5, 0.1)[tokens_left], weights / weights.sum())
# ```


# %% tags=["solution", "hide-cell", "varies"] jupyter={"source_hidden": true}
def with_min_p(z, temperature, min_p):
    p = by_hand(z, temperature)
    p[p < min_p * p.max()] = 0
    return p / p.sum()


tokens_left, weights = candidates(z, np.array([], dtype=np.int64), Sampling(temperature=1.5, top_k=0, min_p=0.1))
assert np.allclose(with_min_p(z, 1.5, 0.1)[tokens_left], weights / weights.sum())
shares = {}
for settings in ({"top_p": 0.9}, {"min_p": 0.1}):
    texts = sentences(model, temperature=1.5, **settings)
    shares[str(settings)] = sum(text in FACTS for text in texts) / 200, len({text for text in texts if text in FACTS})
for settings, (share, variety) in shares.items():
    print(f"temperature 1.5, {settings}: {share:.0%} true, {variety} different")
kept = np.count_nonzero(by_hand(z, 1.5, top_p=0.9)), np.count_nonzero(with_min_p(z, 1.5, 0.1))
print(
    f'after "7+8=1" top-p 0.9 keeps {kept[0]} tokens, min-p {kept[1]}: '
    "where a few likely tokens have not quite 90%, the nucleus reaches into the tail"
)

# %% [markdown]
# **2. Does it add?** Ask the model, at temperature 0, for the sums of all 100 sentences: the known 90 and the 10 that it
# has never seen. What share of each does it get right, and what does it answer to those it gets wrong?
#
# ```python
# assert right_of_known > 0.95
# assert right_of_left_out > 0.3  # by chance it would be about 0.05
# ```


# %% tags=["solution", "hide-cell", "varies"] jupyter={"source_hidden": true}
def answers(model, some):
    prompts = [np.array([end, *s[: s.index("=") + 1].encode()]) for s in some]
    drawn = generate(model, prompts, Sampling(max_tokens=8, temperature=0), ends={end})
    return [
        s[: s.index("=") + 1] + tokenizer.decode(np.array(d.tokens, dtype=np.uint32))
        for s, d in zip(some, drawn, strict=True)
    ]


right_of_known = np.mean([a == s for a, s in zip(answers(model, known), known, strict=True)])
said = answers(model, left_out)
right_of_left_out = np.mean([a == s for a, s in zip(said, left_out, strict=True)])
assert right_of_known > 0.95 and right_of_left_out > 0.3
print(f"known {right_of_known:.0%}, never seen {right_of_left_out:.0%}")
print("wrong ones:", "  ".join(a for a, s in zip(said, left_out, strict=True) if a != s))
print("far more than chance, so it does not only remember; less than all, so it has no rule either. For nine of the ten the")
print(
    "mirror image b+a is in the text; 2+2 is its own. To know more, leave out both of a pair, and more pairs"
)

# %% [markdown]
# **3. Penalties.** `repetition_penalty=1.3` makes tokens that occurred less likely (Keskar et al. 2019). What does it do to
# the truth at temperature 0.5, and which sums suffer most? Predict before you measure.
#
# ```python
# assert share(repetition_penalty=1.3) < share()
# ```


# %% tags=["solution", "hide-cell", "varies"] jupyter={"source_hidden": true}
def share(**settings):
    return np.mean([text in FACTS for text in sentences(model, temperature=0.5, **settings)])


assert share(repetition_penalty=1.3) < share()
print(f"true: {share():.0%} without, {share(repetition_penalty=1.3):.0%} with a penalty of 1.3")
print("true sums repeat digits (7+7=14, 0+7=7, 1+9=10), and the penalty does not know which repetitions are wanted")
print(*sentences(model, 4, temperature=0.5, repetition_penalty=1.3), sep=" | ")

# %% [markdown]
# **4. Half the size.** Pack the model in bfloat16 (`Wishes(dtype="bf16", …)`), open it, and compare: the size of
# `model.safetensors`, the loss on `sums.validation.bin`, the share of known sums that are right at temperature 0.
#
# ```python
# assert size_bf16 < 0.52 * size_f32
# assert abs(loss_bf16 - loss_f32) < 0.01
# ```

# %% tags=["solution", "hide-cell", "varies"] jupyter={"source_hidden": true}
half = pack(choose(HERE / "run", "final"), Wishes(name="sums-bf16", username="me", output=HERE / "half", dtype="bf16"))
small = open_model(HERE / "half").model()
size_f32, size_bf16 = packed.sizes["model.safetensors"], half.sizes["model.safetensors"]
loss_f32, loss_bf16 = (
    joined(scores(m, whole_windows(stream, 64, 8, APART), 64)).loss() for m in (opened.model(), small)
)
assert size_bf16 < 0.52 * size_f32
assert abs(loss_bf16 - loss_f32) < 0.01
right = np.mean([a == s for a, s in zip(answers(small, known), known, strict=True)])
print(
    f"{size_f32:,} and {size_bf16:,} bytes; loss {loss_f32:.4f} and {loss_bf16:.4f}; "
    f"known sums {right_of_known:.0%} and {right:.0%}"
)

# %% [markdown]
# ## Where to read on
#
# - A. Holtzman et al., "The curious case of neural text degeneration", ICLR 2020, section 3 (top-p); A. Fan, M. Lewis, Y.
#   Dauphin, "Hierarchical neural story generation", ACL 2018, section 5.4 (top-k); N. Nguyen et al., "Turning up the heat:
#   min-p sampling", 2024; N. S. Keskar et al., "CTRL", 2019, section 4.1 (repetition penalty).
# - M. Mitchell et al., "Model cards for model reporting", FAT* 2019.
# - [Data](../docs/data.md), [publishing](../docs/publishing.md), [converting](../docs/convert.md),
#   [configuration](../docs/configuration.md).
# - This was the last notebook. From here: train `oxidizr-ref train -f nano-start`, read the package from `autograd.py`
#   upwards, and hold your own implementation against a golden trace (notebook 16).

# %%
temporary.cleanup()
