"""How the figures of the course look: ``from figures import plt``.

Colors are those of Okabe and Ito (2008), which people with any common color blindness can tell apart; arrays are drawn in
``cividis`` (sequential) or ``RdBu_r`` (around zero, `around_zero`), for the same reason. Pictures carry no version of
matplotlib, so that the same figure is the same bytes.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

__all__ = ["COLORS", "around_zero", "plt"]

#: Okabe and Ito (2008), the yellow left out: it does not stand out on white.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
}

mpl.rcParams.update(
    {
        "figure.figsize": (7.0, 3.2),
        "figure.dpi": 80,
        "savefig.dpi": 80,
        "figure.constrained_layout.use": True,
        "figure.facecolor": "white",
        "axes.prop_cycle": mpl.cycler(color=list(COLORS.values())),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "grid.color": "0.9",
        "image.cmap": "cividis",
        "image.interpolation": "nearest",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
)

if "ipykernel" in sys.modules:
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    set_matplotlib_formats("png", metadata={"Software": None})


def around_zero(axes: Any, array: Any, largest: float | None = None, **options: Any) -> Any:
    """Draw a matrix so that white is zero, red positive and blue negative, without grid lines. Returns the image.

    largest: the value of full color; default: the largest absolute value of ``array``.
    """
    largest = float(abs(array).max()) if largest is None else largest
    axes.grid(False)
    return axes.imshow(array, cmap="RdBu_r", vmin=-largest, vmax=largest, **options)
