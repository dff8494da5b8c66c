"""Shown code runs, each public class has its page, and the version is told alike everywhere."""

import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import sb3_mismatch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown_code(page: Path) -> str:
    """A page's Python blocks, one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", [page for page in PAGES if shown_code(page)], ids=lambda page: page.name)
def test_shown_code_runs(page, tmp_path, monkeypatch):
    # Fewer steps are all that differs from what is shown: two more than `learning_starts`, in the README enough for
    # the world to learn too.
    steps = 258 if page.name == "README.md" else 102
    code = re.sub(r"total_timesteps=[\d_]+", f"total_timesteps={steps}", shown_code(page))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_readme_shows_code():
    assert "MnM(" in shown_code(ROOT / "README.md")


def test_each_public_class_has_a_page():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    classes = [name for name in sb3_mismatch.__all__ if inspect.isclass(getattr(sb3_mismatch, name))]
    assert classes
    for name in classes:
        documented = f"autoclass:: sb3_mismatch.{name}\n" in pages
        assert documented or getattr(sb3_mismatch, name).__module__ == "sb3_mismatch.objectives", name


@pytest.mark.parametrize(
    ("file", "pattern"),
    [("pyproject.toml", r'^version = "(.+)"$'), ("CITATION.cff", r"^version: (.+)$"), ("CHANGELOG.md", r"^## (\S+)")],
)
def test_version_is_one(file, pattern):
    found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert found.group(1) == version("sb3-mismatch")
