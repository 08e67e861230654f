"""The documentation site: `make docs` makes it of the Markdown of this repository and of the docstrings.

The root of the sources is the repository's, so that every link between two pages is the one that GitHub follows.
"""

from __future__ import annotations

from sphinx.application import Sphinx

from dataflex import __version__
from docs import docstrings, pages

project = "DataFlex"
version = release = __version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "examples/**.md", "benchmarks/*.md"]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "saves",
    "dataflex",
    "pipelines",
    "stores",
    "tests",
    "docs/_build",
    "*.egg-info",
]
extensions = ["myst_parser", "sphinx.ext.autodoc"]
nitpicky = True
nitpick_ignore_regex = [  # other packages' names, whose inventories lie on the network
    ("py:.*", r"(abc|collections|enum|numpy|os|pathlib|pd|pyarrow|pydantic|types|typing)\..*"),
    ("py:.*", r"(Dataset|FieldInfo|NoneType|Tensor)"),
    ("py:.*", r"dataflex\.(.*\._.*|components\.registry\.C|stores\.files\.Files)"),  # nobody else's business
]
smartquotes = False  # two hyphens begin an option
myst_heading_anchors = 4  # as GitHub makes them

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "model_config"}
autodoc_typehints_format = "short"
default_role = "code"  # docstrings have code between single backticks, as Markdown does

highlight_language = "none"  # of blocks that name no language
html_theme = "furo"
html_title = f"DataFlex {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_copyright = False
html_copy_source = False
html_additional_pages = {"index": "to_contents.html"}
templates_path = ["_templates"]


def setup(app: Sphinx) -> None:
    """Have pages and docstrings prepared before they are read."""
    pages.connect(app)
    docstrings.connect(app)
