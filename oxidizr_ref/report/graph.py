"""The tape behind a value as a graph: what was computed from what, and the gradients' way back."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

from oxidizr_ref.autograd import Function, Tensor, consumers_first
from oxidizr_ref.nn import Module
from oxidizr_ref.report.text import shape_of

_BOX, _ROW, _CHARACTER = 26, 56, 7.2  # pixels: height of a box, from row to row, width of a character


@dataclass(frozen=True)
class Graph:
    """Nodes (label, and whether it is a leaf: a tensor that receives a gradient) and edges (from, to, shape of the value).

    Node 0 is the value that was drawn; every node comes before those that it was computed from.
    """

    nodes: tuple[tuple[str, bool], ...]
    edges: tuple[tuple[int, int, str], ...]

    @property
    def mermaid(self) -> str:
        """As a Mermaid flowchart. Its renderer refuses more than 500 edges unless told otherwise."""
        lines = ["flowchart BT"]
        for number, (label, leaf) in enumerate(self.nodes):
            text = html.escape(label.replace("#", "#35;"), quote=False).replace("&", "#").replace('"', "#quot;")
            text = text.replace("\n", "<br>")
            lines.append(f'  n{number}(["{text}"])' if leaf else f'  n{number}["{text}"]')
        lines += [f'  n{source} -- "{shape}" --> n{target}' for source, target, shape in self.edges]
        return "\n".join(lines) + "\n"

    @property
    def dot(self) -> str:
        """In the language of Graphviz."""
        lines = ["digraph tape {", "  rankdir=BT; node [shape=box, fontname=monospace];"]
        for number, (label, leaf) in enumerate(self.nodes):
            text = label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            lines.append(f'  n{number} [label="{text}"{", style=rounded" if leaf else ""}];')
        lines += [f'  n{source} -> n{target} [label="{shape}"];' for source, target, shape in self.edges]
        return "\n".join([*lines, "}"]) + "\n"

    def _repr_mermaid_(self) -> str:
        return self.mermaid

    def _repr_html_(self) -> str:
        """An SVG: the value on top, each node in the row below the last one that uses it."""
        rows = self._rows()
        widths = [len(label) * _CHARACTER + 16 for label, _ in self.nodes]
        wide = max(sum(widths[n] + 14 for n in row) for row in rows)
        places: dict[int, tuple[float, float]] = {}
        for depth, row in enumerate(rows):
            left = (wide - sum(widths[n] + 14 for n in row)) / 2
            for n in row:
                places[n] = left + widths[n] / 2 + 7, depth * _ROW + 20
                left += widths[n] + 14
        tall = len(rows) * _ROW
        parts = [
            f'<div style="overflow:auto"><svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{tall}" '
            'role="img" fill="none" stroke="currentColor" font-family="monospace" font-size="12">'
        ]
        for source, target, shape in self.edges:
            (x, y), (to_x, to_y) = places[source], places[target]
            parts.append(f'<path opacity=".5" d="M{x:.1f} {y - 13}L{to_x:.1f} {to_y + 13}"><title>{shape}</title></path>')
        for n, (label, leaf) in enumerate(self.nodes):
            x, y = places[n]
            text = html.escape(label.replace("\n", " "))
            corner = f'rx="{13 if leaf else 3}" x="{x - widths[n] / 2:.1f}" y="{y - 13}"'
            parts.append(f'<rect width="{widths[n]:.1f}" height="{_BOX}" {corner}/>')
            parts.append(
                f'<text x="{x:.1f}" y="{y + 4}" text-anchor="middle" stroke="none" fill="currentColor">{text}</text>'
            )
        return "\n".join([*parts, "</svg></div>"])

    def _rows(self) -> list[list[int]]:
        """The nodes by their distance from the value along the longest way, each row in the order of the tape."""
        depth = [0] * len(self.nodes)
        for source, target, _ in sorted(self.edges, key=lambda edge: edge[1]):
            depth[source] = max(depth[source], depth[target] + 1)
        rows: list[list[int]] = [[] for _ in range(max(depth) + 1)]
        for n, row in enumerate(depth):
            rows[row].append(n)
        return rows


def draw_graph(loss: Tensor, names: Module | Mapping[str, Tensor] | None = None) -> Graph:
    """The tape behind a tensor, before its `backward`, which frees it (RuntimeError then).

    names: the model whose parameters, or the tensors by name, that leaves are to be called after; others are called by
    their shapes. The graph shows in a notebook; ``graph.mermaid`` and ``graph.dot`` are texts for other programs.
    """
    named = dict(names.named_parameters()) if isinstance(names, Module) else dict(names or {})
    called = {id(tensor): name for name, tensor in named.items()}
    if loss.node is None:
        return Graph(((_leaf(loss, called), True),), ())
    order: list[Function | Tensor] = list(consumers_first(loss.node))
    numbers = {id(node): number for number, node in enumerate(order)}
    edges = []
    for node in tuple(order):
        assert isinstance(node, Function)
        for parent, shape in zip(node.parents, node.input_shapes, strict=True):
            if parent is None:
                continue
            if id(parent) not in numbers:
                numbers[id(parent)] = len(order)
                order.append(parent)
            edges.append((numbers[id(parent)], numbers[id(node)], shape_of(shape)))
    labels = (_leaf(node, called) if isinstance(node, Tensor) else type(node).__name__ for node in order)
    nodes = tuple((label, isinstance(node, Tensor)) for label, node in zip(labels, order, strict=True))
    return Graph(nodes, tuple(edges))


def _leaf(tensor: Tensor, called: Mapping[int, str]) -> str:
    shape = shape_of(tensor.shape)
    return f"{called[id(tensor)]}\n{shape}" if id(tensor) in called else shape
