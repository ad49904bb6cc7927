"""How the site is built; ``python docs/scripts/build_site.py`` does it.

The repository itself is the source: its pages and notebooks stand where they are, so that their links to each other and to
files work here as on a code host. Nothing is fetched from elsewhere, when it is built or when it is read.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from sphinx.application import Sphinx

from oxidizr_ref.version import __version__

project, author = "oxidizr_ref", "the authors of oxidizr_ref"
version = release = __version__
html_title = f"oxidizr_ref {__version__}"

root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/api/*.md", "docs/decisions/*.md", "docs/guides/*.md", "docs/layers/*.md"]
include_patterns += ["notebooks/*.ipynb", "notebooks/README.md", "CHANGELOG.md"]
exclude_patterns = [
    ".*",
    "build",
    "checkpoints",
    "docs/README.md",
    "docs/_*",
    "docs/scripts",
    "docs/examples",
    "models",
    "oxidizr_ref",
    "tests",
    "venv",
]

extensions = ["myst_nb", "sphinx.ext.autodoc", "repository_files", "mathml"]
myst_enable_extensions = ["attrs_block", "dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
myst_dmath_allow_digits = False
nb_execution_mode = "off"
nb_merge_streams = True
nitpicky = True
# Types in signatures that have no entry of their own: those of other packages, and a few that nobody makes by hand.
_inner = (
    r"(autograd\.F|checkpoint\.header|config_keys|data\.Source|data_facts|layers|signals|token_files|trace\.(budget|m\w+))"
)
nitpick_ignore_regex = [(r"py:.*", r"(?!oxidizr_ref\.).*"), (r"py:class", rf"oxidizr_ref\.{_inner}\b.*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Array", "ArrayLike", "Gradients", "HostArray", "NDArray", "Record")}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
default_role = "code"

html_theme = "furo"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
html_additional_pages = {"index": "to_the_beginning.html"}
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"


def _plain_aliases(_app: object, _what: str, _name: str, _obj: object, _options: object, *signature: str | None) -> object:
    """``Array | None`` as it is written; Sphinx would write down how it keeps the name apart from what it stands for."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in signature)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _plain_aliases)
