"""Equations as MathML, which browsers draw by themselves: no script, no font and no network is needed to read them."""

from __future__ import annotations

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator


def _mathml(latex: str, display: str = "inline") -> str:
    converted: str = convert(latex.replace("{aligned}", "{align*}"), display=display)  # the only name that it does not know
    assert "&amp;" not in converted and "\\" not in converted and "<mi>&</mi>" not in converted, f"not understood: {latex}"
    return converted


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext()))
    raise nodes.SkipNode


def _display(translator: HTML5Translator, node: nodes.math_block) -> None:
    number = get_node_equation_number(translator, node) if node["number"] else ""
    translator.body.append(f'<div class="equation" tabindex="0">{_mathml(node.astext(), "block")}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
