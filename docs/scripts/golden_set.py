"""Publish the golden set: its digests on this machine class, and the numbers that hold on every one.

``python docs/scripts/golden_set.py`` makes the set and writes oxidizr_ref/trace/golden_set.json, where the digests of other
machine classes stay, and the index, docs/golden_traces.md. Other classes on one machine: OPENBLAS_CORETYPE, another NumPy.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from oxidizr_ref.config import load_config
from oxidizr_ref.trace import golden_set
from oxidizr_ref.trace.golden_set import CASES, SIZES, STEPS, make, publish, published

REPOSITORY = Path(__file__).parents[2]

TEXT = """# The golden set

Made by [docs/scripts/golden_set.py](scripts/golden_set.py). One command makes all files:

```bash
oxidizr-ref trace golden -o golden
```

Each is a [trace](trace_format.md) of {steps} clipped AdamW steps of a small model on the bundled text, on the plain side,
begun with weights at which no part of the model is negligible (`--weights lively`), with
{sizes}.
The float64 ones are for judging by; the float32 ones show what a right float32 program gives.

| file | model | parts | precision | tensors | kB |
|---|---|---|---|---|---|
{rows}

## What must come out

The same bits on every machine of a class (BLAS, CPU features, NumPy: what changes the result of a sum or an exponential);
the SHA-256 of every file on {classes} classes are in [golden_set.json](../oxidizr_ref/trace/golden_set.json). On all
machines the losses and gradient norms agree to nine digits in float64 and to four in float32. `trace golden` checks
whichever it can, and ends with exit code 1 if something differs. These are they:

| file | loss, step 1 | gradient norm | loss, step 2 | gradient norm |
|---|---|---|---|---|
{numbers}
"""


def main() -> None:
    """Make, publish, and write the index."""
    with tempfile.TemporaryDirectory() as name:
        made = list(make(Path(name), CASES))
        text = publish(made)
        sizes = {one.name: (len(golden_set.Trace(one.path).records), one.path.stat().st_size // 1000) for one in made}
    Path(golden_set.__file__).with_name("golden_set.json").write_text(text, encoding="utf-8")
    data = published()
    rows, numbers = [], []
    for name, (model, dtype) in CASES.items():
        count, size = sizes[name]
        rows.append(f"| `{name}` | `{model}` | {_parts(model)} | {dtype} | {count} | {size:,} |")
        found = data["numbers"][name]
        keys = ("loss", "grad_norm", "step.2.loss", "step.2.grad_norm")
        digits = 10 if dtype == "f64" else 5
        numbers.append(f"| `{name}` | " + " | ".join(f"{found[key]:.{digits}g}" for key in keys) + " |")
    page = TEXT.format(
        steps=STEPS,
        sizes=", ".join(f"`{size}`" for size in SIZES),
        rows="\n".join(rows),
        numbers="\n".join(numbers),
        classes=len(data["digests"]),
    )
    (REPOSITORY / "docs" / "golden_traces.md").write_text(page, encoding="utf-8")


def _parts(model: str) -> str:
    m = load_config(model).model
    attention = f"{'MLA' if m.uses_mla else 'GQA'} + {'experts' if m.uses_moe else 'SwiGLU'}"
    names = {"attention": attention, "mamba1": "Mamba1", "mamba2": "Mamba2", "mamba3": "Mamba3"}
    mimo = " MIMO" if m.mamba3_enabled and m.mamba3_mimo_rank else ""
    return ", ".join(names[kind] + (mimo if kind == "mamba3" else "") for kind in m.layer_kinds)


if __name__ == "__main__":
    main()
