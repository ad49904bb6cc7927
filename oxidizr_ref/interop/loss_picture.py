"""A run's losses as a picture: SVG written by hand, the same bytes for the same numbers.

It brings its own background, light or dark as the reader's screen is, so that it can be read on any page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

#: A step and the loss there, in nats a token.
Point: TypeAlias = tuple[int, float]

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 696, 48, 306  # the frame
_MOST_POINTS = 600  # about one a pixel
_FEW = 40  # points that are marked each
_KINDS = {"train": "training", "held": "held out"}

_STYLE = """\
text { font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #24292f }
.page { fill: #ffffff } .grid { stroke: #d8dee4 } .frame { stroke: #6e7781; fill: none }
.train { stroke: #0969da } .held { stroke: #bc4c00 } .train-fill { fill: #0969da } .held-fill { fill: #bc4c00 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #161b22 } .grid { stroke: #30363d } .frame { stroke: #8b949e }
.train { stroke: #58a6ff } .held { stroke: #f0883e } .train-fill { fill: #58a6ff } .held-fill { fill: #f0883e }
}"""


def loss_picture(train: Sequence[Point], held_out: Sequence[Point]) -> str | None:
    """The SVG of training and held-out losses against steps, each in ascending order; None where there is no curve to draw.

    More than 600 points of a kind are drawn as 600 means of neighbours.
    """
    if len(train) < 2 or train[0][0] == train[-1][0]:
        return None
    named = dict(zip(_KINDS, (train, held_out), strict=True))
    curves = {kind: _thinned(points) for kind, points in named.items() if points}
    everything = [point for curve in curves.values() for point in curve]
    losses = [loss for _, loss in everything]
    margin = 0.05 * (max(losses) - min(losses)) or 0.5
    x = _Axis(0.0, max(step for step, _ in everything), _LEFT, _RIGHT)
    y = _Axis(min(losses) - margin, max(losses) + margin, _BOTTOM, _TOP)
    return "\n".join([*_page(named), *_grid(x, y), *_curves(curves, x, y), "</svg>", ""])


class _Axis:
    """Values between ``low`` and ``high`` on their way to pixels between ``begin`` and ``end``."""

    def __init__(self, low: float, high: float, begin: int, end: int) -> None:
        self.low, self.high, self.begin, self.end = low, high, begin, end

    def at(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.begin + share * (self.end - self.begin):.1f}"

    def ticks(self, about: int) -> Iterator[tuple[str, str]]:
        """Round values within the axis, in words, and where they are: 1, 2 or 5 times a power of ten apart."""
        rough = (self.high - self.low) / about
        power = math.floor(math.log10(rough))
        apart = next(factor for factor in (1, 2, 5, 10) if factor * 10.0**power >= rough) * 10.0**power
        for index in range(math.ceil(self.low / apart), math.floor(self.high / apart) + 1):
            value = index * apart
            yield (f"{value:,.{max(0, -math.floor(math.log10(apart) + 1e-9))}f}"), self.at(value)


def _page(named: Mapping[str, Sequence[Point]]) -> Iterator[str]:
    """Everything behind the frame: what the picture is, and the names of the curves."""
    ends = [f"{_KINDS[kind]} {points[-1][1]:.4f} at step {points[-1][0]:,}" for kind, points in named.items() if points]
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title">'
    yield f'<title id="title">Loss in nats a token against steps; at the end: {", ".join(ends)}</title>'
    yield f"<style>\n{_STYLE}\n</style>"
    yield f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>'
    for place, kind in enumerate(kind for kind, points in named.items() if points):
        left = _LEFT + 110 * place
        yield f'<rect class="{kind}-fill" x="{left}" y="24" width="18" height="4"/>'
        yield f'<text x="{left + 26}" y="30">{_KINDS[kind]}</text>'


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    for text, place in y.ticks(about=5):
        yield f'<path class="grid" d="M{_LEFT} {place}H{_RIGHT}"/>'
        yield f'<text x="{_LEFT - 8}" y="{place}" text-anchor="end" dominant-baseline="middle">{text}</text>'
    for text, place in x.ticks(about=6):
        if float(text.replace(",", "")).is_integer():  # of a run of two steps
            yield f'<path class="grid" d="M{place} {_TOP}V{_BOTTOM}"/>'
            yield f'<text x="{place}" y="{_BOTTOM + 20}" text-anchor="middle">{text.partition(".")[0]}</text>'
    yield f'<path class="frame" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/>'
    yield f'<text x="{(_LEFT + _RIGHT) // 2}" y="{_HEIGHT - 12}" text-anchor="middle">step</text>'
    middle = (_TOP + _BOTTOM) // 2
    yield f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">loss, nats a token</text>'


def _curves(curves: Mapping[str, Sequence[Point]], x: _Axis, y: _Axis) -> Iterator[str]:
    for kind, curve in curves.items():
        places = [(x.at(step), y.at(loss)) for step, loss in curve]
        if len(places) > 1:
            yield f'<polyline class="line {kind}" points="{" ".join(",".join(place) for place in places)}"/>'
        if len(places) <= _FEW:
            yield from (f'<circle class="{kind}-fill" cx="{left}" cy="{top}" r="3"/>' for left, top in places)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most `_MOST_POINTS`: means of equally many neighbours, each at the last one's step."""
    count = -(-len(points) // _MOST_POINTS)
    groups = [points[i : i + count] for i in range(0, len(points), count)] if count > 1 else [[p] for p in points]
    return [(group[-1][0], math.fsum(loss for _, loss in group) / len(group)) for group in groups]
