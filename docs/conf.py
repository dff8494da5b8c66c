"""Sphinx builds the documentation from this file: `make docs`."""

from importlib.metadata import version as installed_version
from typing import Any

project = "sb3_mismatch"
author = "The sb3_mismatch contributors"
copyright = "2026, The sb3_mismatch contributors"
version = release = installed_version("sb3-mismatch")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "sphinx_rtd_theme"
html_title = f"sb3_mismatch {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


def escape_bars(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """p(s'|s,a) in a docstring is a formula, and not the start of a reStructuredText substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape_bars)
