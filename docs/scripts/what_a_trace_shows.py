"""Write docs/what_a_trace_shows.md: oxidizr's Mamba2, written from the description of its code, held against a trace.

``python docs/scripts/what_a_trace_shows.py``, with the extra ``oracle``. The twin is the plain PyTorch one of the tests, in
float32, with both mistakes in every layer; then with one of them put right; then with none. A test makes the page again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

PAGE = Path(__file__).parent.parent / "what_a_trace_shows.md"

TEXT = """# What a trace shows: two mistakes in a Mamba2

Made by [docs/scripts/what_a_trace_shows.py](scripts/what_a_trace_shows.py).

oxidizr's Mamba2 trains, its loss falls, and nothing ever crashes. Two lines of its chunked scan are wrong all the same
([differences_from_oxidizr.md](differences_from_oxidizr.md)):

* inside a chunk, token s weighs `(Σ_n C_t)(Σ_n B_t)` for token t, where `C_t · B_s` belongs: B is read at the query's place;
* between chunks, the table of decays is reshaped with heads and chunks mixed, so that later chunks leak into earlier tokens.

Here is how somebody who wrote such a program would find that. It was written anew for this page, in PyTorch, from the
description of the code, with both mistakes in both layers of `tiny-mamba2`. Its author records the reference once,

```
oxidizr-ref trace record -f tiny-mamba2 --dtype f64 --weights lively -o reference.safetensors
```

(here with 2 sequences of 40 tokens: two chunks and a half), lets the program do the same step, with the weights and the
batch of the reference, under a [`TorchRecorder`](../oxidizr_ref/trace/torch_recorder.py), in float32, and compares.

## The first comparison

```text
$ oxidizr-ref trace compare reference.safetensors theirs.safetensors
{both}
```

Not the loss, not a gradient: one op of layer 0. The convolution before it, the time steps, the decay and D are right; what
is made of them is not. A token of the first chunk needs nothing but that chunk, so the author looks there first, finds B at
the query's place, and puts it right.

## With that put right

```text
$ oxidizr-ref trace compare reference.safetensors theirs.safetensors
{one}
```

The same op; its error is {times} times smaller, and most numbers are right now. The first that is not is at token 0, though,
and of the first chunk of 16 tokens {wrong} of {all} numbers are wrong. No token there has a past beyond its chunk, so what
reaches it comes from later ones: the scan is not causal. Only the decay *between* chunks can do that.

## With both put right

```text
$ oxidizr-ref trace compare reference.safetensors theirs.safetensors
{none}
```

The {missing} tensors that were not compared are the decays of single tokens and the states after them, which a chunked scan
does not have. Had the scan been right forwards and wrong backwards, the first gradient that is off would have been named
in the same way.
"""


def reports() -> dict[str, str]:
    """The three reports, and the numbers that the text quotes."""
    import numpy as np
    import torch
    from oracle.planted_faults import ChunkedMamba2, DecayBetweenChunksScrambled, SumsAtTheQuery
    from oracle.traced_twins import write_trace

    from oxidizr_ref.config import load_config
    from oxidizr_ref.model import LanguageModel
    from oxidizr_ref.trace.compare import compare
    from oxidizr_ref.trace.file import Trace
    from oxidizr_ref.trace.golden_set import lively_weights
    from oxidizr_ref.trace.record import record, recorded
    from oxidizr_ref.trace.report import report

    class Right(ChunkedMamba2):
        here = True  # type: ignore[assignment]

    class Scrambled(DecayBetweenChunksScrambled):
        here = True  # type: ignore[assignment]

    class Both(Scrambled, SumsAtTheQuery):
        pass

    changes = ["max_seq_len=40", "batch_size=2", "model.dtype=f64", "lr_schedule=constant", "warmup_steps=0"]
    config = load_config("tiny-mamba2", changes)
    found: dict[str, str] = {}
    largest: dict[str, float] = {}
    at = "layers.0.mamba2.mixer.y"
    with tempfile.TemporaryDirectory() as name:
        reference, theirs = Path(name, "reference.safetensors"), Path(name, "theirs.safetensors")
        record(config, reference, weights=lively_weights(LanguageModel(config.model, seed=None)))
        source = recorded(Trace(reference))
        for key, twin in (("both", Both), ("one", Scrambled), ("none", Right)):
            write_trace(twin(config.model, source.weights, torch.float32), config.trainer, source.batches, theirs, "f32")
            comparison = compare(reference, theirs)
            found[key] = report(comparison).replace(f"{name}/", "")
            tensor = comparison.tensors[at]
            largest[key] = tensor.distance.max_abs
            if key == "one":
                first_chunk = [Trace(path).array(at)[:, :16] for path in (reference, theirs)]
                assert tensor.budget is not None
                found["wrong"] = str(int(np.sum(np.abs(first_chunk[0] - first_chunk[1]) > tensor.budget.largest)))
                found["all"] = str(first_chunk[0].size)
    found |= {"times": f"{largest['both'] / largest['one']:.0f}", "missing": str(len(comparison.missing))}
    return found


def page() -> str:
    """The whole page."""
    return TEXT.format(**reports())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
