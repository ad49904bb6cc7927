"""What docs/scripts/errors.py writes around the messages: the head of the page, the areas of the package, and advice."""

from __future__ import annotations

HEAD = """# Troubleshooting

An error is one line: what is wrong, where (file, line, offset), and what to do. It begins with `error:` and goes to stderr.
Find yours with the search of this site, or of this page: every message of the package is on it, with `…` for what is filled
in. Under some stands what to do beyond what they say. The page is made from the source by
[docs/scripts/errors.py](../scripts/errors.py).

| exit code | |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | asked for something that cannot be done as asked: wrong usage, config, data or file |
| 130, 143 | stopped by Ctrl-C or SIGTERM, after saving |

In Python the types are in [`oxidizr_ref.errors`](../api/errors.md); `OxidizrError` is the base of all. Where a command has
`--debug`, that shows the traceback as well, which a bug report needs. An error of Python itself (`ValueError`, `IndexError`)
tells that a function was called wrongly; if you only used the command line it is a bug.

## Something is wrong, and there is no message

**The loss does not fall.** Compare it with ln(vocabulary size), which is what guessing costs: a first loss far above it
means that tokens and model do not belong together. Then try a smaller learning rate: `--set trainer.learning_rate=3e-4`.

**The loss falls, the text is poor.** See the held-out loss (`trainer.eval_fraction`): if it rises while the other falls, the
data are too few for the model. `generate --temperature 0.5` shows what the model is surest of.

**It is slow.** `oxidizr-ref bench -f CONFIG` shows where a step spends its time, and its floor. The first step of a run is
slower than the others. BLAS uses one thread on purpose; the work is spread by `--threads`.

**Two runs differ.** `oxidizr-ref diff A B` names the first key and the first tensor;
[the promise](../checkpoints.md#the-promise) says what may differ. `oxidizr-ref selftest` proves that this machine keeps it.

**My own implementation differs.** [Traces](../traces.md) name the first number that is wrong.

**`oxidizr-ref: command not found`.** The environment it was installed into is not active.
`python -m oxidizr_ref` is the same.
"""

#: Areas of the package: the files (the beginnings of their paths) and where to read about it. The first that fits counts.
AREAS: dict[str, tuple[tuple[str, ...], str]] = {
    "Configs": (("config",), "Every key is in [Configuration](../configuration.md)."),
    "Training": (
        ("cli/train", "cli/selftest", "cli/bench", "trainer", "memory", "backend", "optim"),
        "See [Configure and train](configure.md) and [Training on a GPU](../gpu.md).",
    ),
    "Checkpoints": (
        ("checkpoint/", "cli/verify", "cli/inspect", "cli/diff"),
        "See [Checkpoints](../checkpoints.md) and [Resume](resume.md).",
    ),
    "Data": (("data", "token_files", "batch_loader"), "See [Data](../data.md)."),
    "Tokenizers": (("tokenizer",), "See [Data](../data.md#tokenizers)."),
    "`prepare`": (("prepare/",), "See [Data](../data.md)."),
    "Generating and evaluating": (
        ("cli/generate", "cli/evaluate", "generation", "evaluation", "sampling", "interop/opened"),
        "See [Generating and evaluating](../generation.md).",
    ),
    "Models from elsewhere": (
        ("interop/conversion", "interop/families", "interop/hugging_face", "interop/weight_files", "cli/convert"),
        "See [Converting](../convert.md).",
    ),
    "Packing and pushing": (("interop/", "cli/pack", "cli/push"), "See [Publishing](../publishing.md)."),
    "Traces": (("trace/", "cli/trace"), "See [Traces](../traces.md)."),
    "Reports": (("report/", "cli/run_report"), "See [Report](../report.md)."),
    "From Python": (("",), "See the [API reference](../api/index.md)."),
}

#: What to do, by a part of the message that it is for.
ADVICE: dict[str, str] = {
    # configs
    "unknown key": "If a valid key is near, it is named. Keys belong to a section: `trainer.learning_rate`.",
    "given twice…;": "YAML keeps the last of two equal keys; here that is an error, because the first was meant as well.",
    "num_heads … is not divisible by kv_heads": "Each key/value head serves equally many query heads.",
    "is odd; RoPE rotates pairs": "Change `hidden_size` or `num_heads`, so that their quotient is even.",
    "must equal mamba2_num_heads": "Leave `mamba2_head_dim` out: it is then filled in.",
    "bundled models:": "`-f` takes a path or the name of a bundled model, and names the one that is nearest.",
    # training
    "train on the CPU without it": "Leave `--target-device gpu` out. CuPy, the driver or a device is missing, as it says.",
    "out of memory on the": "The message says what the run needs and for what. `inspect -f CONFIG` tells it before a run.",
    "this state is not saved": "Go on from the last good file with a smaller learning rate, or with `f32` for `f16`.",
    "this version trains on one device": "Several devices are not built yet.",
    "selftest: step_… differs": "From equal numbers came different ones: faulty memory, overclocking, or a bug of ours.",
    # checkpoints
    "determinism was broken": (
        "On an equal fingerprint that is a bug: please report it, with both files. Faulty memory does it, too."
    ),
    "damaged at or after byte …: …": "The file is not as it was written. `--resume auto` takes the newest whole one.",
    "named after step …": "Somebody renamed or copied it. A backup may have any name that is not `step_N.safetensors`.",
    "no step file in … is whole": "Restore a backup into the directory, or start over with `--overwrite`.",
    "cannot be written (…); earlier files": (
        "A run goes on and tries again at the next save. Free some space, save less often (a larger "
        "`save_interval`), or keep fewer files (`max_checkpoints`)."
    ),
    "the disk gave back other bytes": "The file did not get its name. Look at the disk's own report (`smartctl`).",
    "continue with --resume auto": "A fresh start where a run already is would mix two runs.",
    "let it end, or choose another --checkpoint-dir": "Two runs would overwrite each other's files.",
    "is damaged; if no run": "It is written while later files move to `superseded/`, and removed when they have.",
    "use a newer oxidizr_ref": "A newer release wrote the file. Files of older releases always load.",
    "it holds no digests": "To import weights of another program, see [Converting](../convert.md).",
    "the checkpoint holds another model": "Keys that shape the model must match. `inspect FILE` shows those of the file.",
    "; … --allow-mismatch …": "Another seed, other data or another dtype make another run: say that you mean it.",
    "--strict: …": "Without `--strict` the difference is told in one line and kept in the file's lineage.",
    # data and tokenizers
    "is not below the vocabulary size": "`prepare --check CONFIG` finds this before anything is encoded.",
    "was made with another tokenizer": "Ids mean nothing without the tokenizer that made them.",
    "is not what ….meta.json tells of": "The files beside a `.bin` belong to it: copy, move and replace them together.",
    "but one window needs": "A window is `max_seq_len` + 1 tokens, in the training part and in the held-out part.",
    "does not match its digest": "The file was changed by hand or is damaged; its ids could mean other text.",
    "looks binary": "With `--errors replace` single wrong bytes are replaced, but not in a file that is mostly no text.",
    "standard input can be read only once": "`char` and `--train-bpe` look at all of the text before they encode it.",
    # generation, interop, publishing
    "the model's logits are not finite": "`inspect FILE` shows the norms of all tensors; take an earlier step.",
    "losses of different tokens do not compare": "Bits per byte do: both models predict the same text.",
    "cannot be imported exactly": "All reasons are named at once: see [what is refused](../convert.md#what-is-refused).",
    "its weights are pickles": "Reading a pickle can run any program. Save them as safetensors where they were made.",
    "…: no connection to": "What was uploaded is kept: the same command goes on where it stopped.",
    "may not do this (403": "Make a token with the right to write to that user or organization.",
    "remove it, and revoke that token": "Whoever saw the file could publish in your name.",
    # traces
    "is a sample, to which the map": "A sample is some numbers of an array; a reshaping needs all of them.",
}
