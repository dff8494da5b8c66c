"""Sphinx builds the documentation from this file: `make docs`."""

import shutil
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

project = "sb3_mismatch"
author = "The sb3_mismatch contributors"
copyright = "2026, The sb3_mismatch contributors"
version = release = installed_version("sb3-mismatch")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Notebooks are shown with the outputs that they were committed with: tests/test_notebooks.py runs them.
nb_execution_mode = "off"
exclude_patterns = ["_build"]

html_theme = "sphinx_rtd_theme"
html_title = f"sb3_mismatch {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"


def escape_bars(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """p(s'|s,a) in a docstring is a formula, and not the start of a reStructuredText substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def copy_notebooks(_app: Any) -> None:
    """Sphinx reads sources within its own folder alone."""
    here = Path(__file__).parent
    shutil.rmtree(here / "notebooks", ignore_errors=True)
    (here / "notebooks").mkdir()
    for notebook in (here.parent / "examples").glob("*.ipynb"):
        shutil.copy2(notebook, here / "notebooks")


def setup(app: Any) -> None:
    app.connect("builder-inited", copy_notebooks)
    app.connect("autodoc-process-docstring", escape_bars)
