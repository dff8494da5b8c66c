"""Sphinx builds the documentation from this file: `make docs`."""

from importlib.metadata import version as installed_version

project = "sb3_mismatch"
author = "The sb3_mismatch contributors"
copyright = "2026, The sb3_mismatch contributors"
version = release = installed_version("sb3-mismatch")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["autodoc", "toc.empty_glob"]

html_theme = "sphinx_rtd_theme"
html_title = f"sb3_mismatch {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
