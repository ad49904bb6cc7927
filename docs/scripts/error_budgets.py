"""How much of its error budget a correct program uses up, over many random models: what the margin of budgets rests on.

``python docs/scripts/error_budgets.py [MODELS]``, with the extra ``oracle``. The correct program is the plain PyTorch twin
of the tests, in float64 and in float32. Prints a table; docs/decisions/2026-11-26-error-budgets.md has it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))


def main(models: int) -> None:
    """Measure and print."""
    from oracle.test_trace_faults import of_a_correct_twin

    used: dict[str, list[tuple[float, str]]] = {"f64": [], "f32": []}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(models):
            for precision, found in of_a_correct_twin(seed, Path(name)).items():
                used[precision] += [
                    (one.used, f"`{one.name}` {list(one.record.shape)} of model {seed}") for one in found.tensors.values()
                ]
    print(f"{models} models; the share of its error budget that each tensor of a right program uses up\n")
    print("| precision | tensors | median | 99% | 99.99% | largest | where |\n|---|---|---|---|---|---|---|")
    used |= {f"{precision}, after AdamW": [pair for pair in used[precision] if ".after`" in pair[1]] for precision in used}
    for precision, pairs in used.items():
        shares = np.array([share for share, _ in pairs])
        quantiles = " | ".join(f"{np.quantile(shares, q):.1%}" for q in (0.5, 0.99, 0.9999, 1.0))
        print(f"| {precision} | {len(pairs):,} | {quantiles} | {max(pairs)[1]} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 200)
