"""Write docs/correctness.md: how far every architecture is from another implementation of it, measured anew.

``python docs/scripts/correctness.py`` needs the extra ``oracle`` and takes a few minutes; it runs the cases that the tests
in ``tests/oracle`` bound, and counts the tests that name an architecture.
"""

from __future__ import annotations

import collections
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "correctness.md"

TWIN = "plain PyTorch, token by token"
#: Case -> (architecture, what it is compared with). A case that is missing here stops the script.
ORACLES = {
    "llama": ("GQA + SwiGLU", "`LlamaForCausalLM`"),
    "llama_tied": ("GQA + SwiGLU, tied embeddings", "`LlamaForCausalLM`"),
    "mla": ("MLA + SwiGLU", "`DeepseekV3ForCausalLM`, latent norms taken out"),
    "mla_latent_norm": ("MLA + SwiGLU, `mla_latent_norm`", "`DeepseekV3ForCausalLM`"),
    "moe": ("GQA + MoE, 2 of 4", "`GraniteMoeSharedForCausalLM`, no shared expert; Mixtral's balance loss"),
    "moe_shared": ("GQA + MoE, 2 of 4 and a shared one", "`GraniteMoeSharedForCausalLM`; Mixtral's balance loss"),
    "moe_top1": ("GQA + MoE, 1 of 4", "the same with the Switch Transformer's weight"),
    "mamba1": ("Mamba1", "`MambaForCausalLM`"),
    "mamba2": ("Mamba2, 1 group", "`Mamba2ForCausalLM`"),
    "mamba2_groups": ("Mamba2, 3 groups", "`Mamba2ForCausalLM` with the norm by groups"),
    "mamba2_recurrence": ("Mamba2, 3 groups", TWIN),
    "mamba3": ("Mamba3, SISO, 2 groups", TWIN),
    "mamba3 all channels turn": ("…, rotating the whole state", TWIN),
    "mamba3 nothing turns": ("…, no rotation", TWIN),
    "mamba3 convolution": ("…, convolution", TWIN),
    "mamba3 mimo": ("Mamba3, MIMO of rank 3", TWIN),
    "mamba3 mimo convolution": ("Mamba3, MIMO of rank 2, convolution", TWIN),
    "hybrid": ("Mamba2 + MLA + MoE", TWIN),
    "hybrid mamba3": ("Mamba3 + MLA + MoE", TWIN),
    "hybrid mamba3 mimo": ("Mamba3 MIMO + MLA + MoE", TWIN),
}
#: Architecture -> what the names of tests that concern it contain.
NAMES = {
    "GQA + SwiGLU": r"llama|gqa|attention|swiglu",
    "MLA": r"mla|latent|absorbed",
    "MoE": r"moe|expert|router|routing|balance",
    "Mamba1": r"mamba1|selective_scan",
    "Mamba2": r"mamba2|ssd",
    "Mamba3": r"mamba3|mimo|siso|parity",
    "hybrids": r"hybrid|nano",
}
TEXT = """# Correctness

How far each architecture is from another implementation of it, run on the same weights and tokens. Written by
[`docs/scripts/correctness.py`](scripts/correctness.py) from a run with {versions}; what it measures is bounded by the tests
in `tests/oracle` (`pytest -m oracle`).

A number is the largest relative error, max|a − b| / max|b| of a tensor, over all tensors and over our two sides, the fused
operations and the plain compositions beside them. *forward*: logits and loss. *gradients*: of every parameter. *losses*: of
ten steps of AdamW with clipping. *parameters*: after those steps (in float64 only: Adam amplifies the rounding of gradients
that are nearly zero). The bounds are 1e-10, 1e-7, 1e-10 and 1e-10 in float64, and 1e-5 in float32.

{table}

Where the other implementation computes something in float32 whatever its dtype (norms, rotary angles, routers, scans), that
and nothing else is replaced by float64 in the float64 comparison; the tests say what.

## What needs no other implementation

* **Finite differences.** Every operation and layer, with respect to its input and all parameters, in float64: below 1e-7.
* **Two sides.** Every fused operation equals its plain composition, output and gradients, at any tile and chunk size.
* **Golden files.** `tests/golden/*.safetensors` hold inputs, weights, logits, gradients and the losses of five optimizer
  steps of every architecture, written by scripts that do not import this package. The default tests compare with them.
* **Mamba3.** The numbers of the official step functions (state-spaces/mamba, commit e9594ce: three SISO and two MIMO
  cases) are met within 1e-10; an independent recurrence likewise. R = 1 with ones is SISO, rank R is the sum of R² SISO
  runs, and λ = 1 without rotation and biases is Mamba2. A hand-made model computes parity without a mistake at length 4,096.
* **Decoding.** Token by token with the cache gives the logits of the full forward pass, for every architecture.
* **Causality.** Changing a token changes no logit before it, for every architecture, at every position.
* **Training.** Every parameter receives a gradient within two steps, and none stands still over twenty.

## Tests by architecture

Tests (cases of parametrized ones counted singly) whose names or parameters concern an architecture; some concern several.

{counts}
"""


def main() -> None:
    """Measure, count, write."""
    command = [sys.executable, str(REPOSITORY / "tests" / "oracle" / "measuring.py")]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = [json.loads(line) for line in printed.splitlines()]
    packages = ("numpy", "torch", "transformers")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    page = TEXT.format(versions=versions, table=_table(measured), counts=_counts())
    PAGE.write_text(page, encoding="utf-8")


def _table(measured: list[dict[str, Any]]) -> str:
    worst: dict[tuple[str, str], dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for errors in measured:
        of_model = worst[errors["model"], errors["dtype"]]
        for what in ("forward", "gradients", "losses", "parameters"):
            of_model[what] = max(of_model[what], errors[what])
    lines = [
        "| architecture | against | f64 forward | gradients | losses | parameters | f32 forward | gradients | losses |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in sorted({case for case, _ in worst}, key=list(ORACLES).index):
        double, single = worst[case, "f64"], worst[case, "f32"]
        numbers = [double[what] for what in ("forward", "gradients", "losses", "parameters")]
        numbers += [single[what] for what in ("forward", "gradients", "losses")]
        lines.append(f"| {' | '.join((*ORACLES[case], *(f'{number:.1e}' for number in numbers)))} |")
    return "\n".join(lines)


def _counts() -> str:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-m", "not gpu"]
    collected = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    tests = [line for line in collected.splitlines() if "::" in line]
    lines = ["| architecture | tests |", "|---|---|"]
    for architecture, pattern in NAMES.items():
        lines.append(f"| {architecture} | {sum(bool(re.search(pattern, test)) for test in tests):,} |")
    return "\n".join([*lines, f"| all | {len(tests):,} |"])


if __name__ == "__main__":
    main()
