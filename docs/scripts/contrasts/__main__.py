"""Run contrasts, write their curves and pictures: ``PYTHONPATH=docs/scripts python -m contrasts [NAME …]``.

Without names all four run. Curves go to ``notebooks/curves/``, pictures (``--no-pictures``: none) to ``docs/images/``; the
latter need the extra ``docs``. Ends with 1 if a contrast did not come out as its verdict says it must.
"""

from __future__ import annotations

import argparse
import sys
import time

from contrasts import runs
from contrasts.curves import draw, write
from oxidizr_ref import parallel


def main() -> None:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(prog="contrasts", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(runs.CONTRASTS)} (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-pictures", action="store_true")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in runs.CONTRASTS]
    if unknown:
        parser.error(f"no contrast is called {unknown[0]}")
    parallel.set_threads(options.threads)
    failed = []
    for name in options.names or runs.CONTRASTS:
        contrast = runs.CONTRASTS[name]
        began = time.monotonic()
        curves = contrast.run(seed=options.seed)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        write(name, curves)
        if not options.no_pictures:
            draw(name, contrast.drawn, contrast.label, curves)
        for claim, holds in contrast.verdict(curves).items():
            print(f"  {'yes' if holds else 'NO '} {claim}", flush=True)
            failed += [] if holds else [claim]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
