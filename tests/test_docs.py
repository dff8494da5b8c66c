"""Shown code runs, shown commands are tested elsewhere by name, each class has its page, and links lead somewhere."""

import importlib.util
import inspect
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch as th
from agents import BoxEnv, soon, trained

import sb3_mismatch
from sb3_mismatch.fast_sac import FastSAC
from sb3_mismatch.zoo import ALGORITHMS

th.set_num_threads(1)

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

#: what a fenced block may be; a new kind is to be thought about here
KINDS = {"", "bash", "console", "python", "diff", "yaml", "bibtex", "text", "json"}
#: those that hold commands
SHELL = {"", "bash", "console"}
DIRECTIVES = {"toctree", "eval-rst", "include", "figure", "image", "note", "warning", "tip", "list-table", "math"}

#: the beginning of each shown command, and the file that runs it too (or a sentence for what no test can)
COMMANDS = {
    "make quickstart": "tests/test_docs.py",
    "make test": ".ci/run",
    "make docs": ".ci/run",
    "pip install": "Makefile",
    "PIP_EXTRA_INDEX_URL=": "Makefile",
    "git clone": "needs a network",
    "python -m venv": "Makefile",
    "python -c": "tests/test_docs.py",
    "python -m sb3_mismatch.zoo": "tests/contract/test_zoo.py",
    "python -m sb3_mismatch.benchmarks": "tests/test_benchmarks.py",
    "python -m sb3_mismatch inspect": "tests/test_inspect.py",
    "python examples/gridworld.py": "tests/test_tabular_example.py",
    "python examples/watch.py": "tests/test_watch.py",
    "python examples/pictures.py": "tests/test_plots.py",
    "python docs/check_links.py": "Makefile",
    "jupyter lab": "tests/test_notebooks.py",
    "tensorboard --logdir": "opens a browser",
}


class Block(NamedTuple):
    """
    A fenced block of a page.

    :param kind: what follows the fence
    :param line: of the page on which its code begins, counted from one
    :param remark: the comment on the line before the fence
    """

    kind: str
    code: str
    line: int
    remark: str


def blocks(page: Path) -> list[Block]:
    """A page's fenced blocks, in their order."""
    text = page.read_text(encoding="utf-8")
    fenced = re.compile(r"(?:^ *<!-- ([^\n]*) -->\n)?^( *)(```|:::)([^\n]*)\n(.*?)^\2\3$", re.MULTILINE | re.DOTALL)
    return [
        Block(m[4].strip(), textwrap.dedent(m[5]), text[: m.start(5)].count("\n") + 1, m[1] or "")
        for m in fenced.finditer(text)
    ]


def python(page: Path) -> list[Block]:
    """The Python that runs: all but what says why it does not."""
    return [b for b in blocks(page) if b.kind == "python" and not b.remark.startswith("not executed: ")]


def shown_commands() -> list[str]:
    """The lines of all blocks of commands, without prompts and without the folder of a virtual environment."""
    lines = [line for page in PAGES for b in blocks(page) if b.kind in SHELL for line in b.code.splitlines()]
    return [line.removeprefix("$ ").replace(".venv/bin/", "") for line in lines if line.strip()]


@pytest.mark.parametrize("page", [page for page in PAGES if python(page)], ids=lambda page: page.name)
def test_shown_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in python(page):
        code = block.code
        if shorter := re.fullmatch(r"executed with (\w+)=([\d_]+)", block.remark):
            code, n = re.subn(rf"\b{shorter[1]}=[\d_]+", f"{shorter[1]}={shorter[2]}", code)
            assert n > 0, f"{page.name}:{block.line}: {shorter[1]} is not in the code"
        # Empty lines before it: a traceback names the page's own line.
        exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)


def test_only_the_readme_is_run_with_fewer_steps_than_it_shows():
    assert any(block.remark.startswith("executed with ") for block in blocks(README))
    for page in PAGES[1:]:
        assert not any(block.remark.startswith("executed with ") for block in blocks(page)), page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_looked_after(page):
    for block in blocks(page):
        directive = re.match(r"\{([\w-]+)\}", block.kind)
        assert block.kind in KINDS or (directive and directive[1] in DIRECTIVES), f"{page.name}:{block.line}"
        unmarked = block.kind == "" and re.search(r"^(import|from|def|class) ", block.code, re.MULTILINE)
        assert not unmarked, f"{page.name}:{block.line}: Python not marked as such"


def test_every_shown_command_is_covered():
    assert "make quickstart" in shown_commands()
    for command in shown_commands():
        where = next((file for beginning, file in COMMANDS.items() if command.startswith(beginning)), None)
        assert where is not None, f"{command!r} is shown and covered by nothing"
        assert " " in where or (ROOT / where).exists(), f"{command!r} is covered by {where}, which does not exist"


def test_shown_one_liners_run():
    lines = [re.fullmatch(r'python -c "(.*)"', command) for command in shown_commands()]
    assert any(lines)
    for line in filter(None, lines):
        exec(line[1], {})


def test_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["quickstart.py", "--steps", "130"])
    code = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    exec(compile(code, "quickstart.py", "exec"), {"__name__": "__main__", "__doc__": ""})
    assert (tmp_path / "quickstart" / "learning_curve.png").stat().st_size > 1000
    assert "mean return over 10 episodes" in capsys.readouterr().out


def test_readme_shows_code():
    assert "MnM(" in python(README)[0].code


@pytest.mark.parametrize("kind", [*ALGORITHMS.values(), FastSAC], ids=lambda kind: kind.__name__)
def test_each_algorithm_has_a_page_of_sb3s_template(kind):
    file = {"FastSAC": "fast_sac"}.get(kind.__name__, kind.__name__.lower())
    page = (ROOT / "docs" / f"{file}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    template = ["Notes", "Can I use?", "Example", "Results", "Parameters"]
    assert [heading for heading in headings if heading in template] == template
    assert page.startswith(f"# {kind.__name__}\n")
    assert re.search(rf"^\.\. autoclass:: sb3_mismatch\.\S*{kind.__name__}$", page, re.MULTILINE)
    assert file in (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()


def test_every_public_name_is_documented():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in sb3_mismatch.__all__:
        value = getattr(sb3_mismatch, name)
        automodule = f"automodule:: {getattr(value, '__module__', 'sb3_mismatch.objectives')}\n"
        assert f"autoclass:: sb3_mismatch.{name}\n" in pages or automodule in pages, name


def test_every_setting_is_documented():
    from sb3_mismatch.mnm import ModelBased

    documented = inspect.getdoc(ModelBased)
    for name, parameter in inspect.signature(ModelBased.__init__).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name != "_init_setup_model":
            assert f":param {name}:" in documented, name


def test_every_logged_value_is_documented(monkeypatch):
    soon(monkeypatch)
    logged = trained(BoxEnv(), objective="mnm", reward_shift="auto")._world_log
    page = (ROOT / "docs" / "mnm.md").read_text(encoding="utf-8")
    assert {key.partition("/")[0] for key in logged} >= {"dynamics", "classifier", "imagination", "objective"}
    assert [key for key in logged if f"`{key}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+://|#|mailto:", link):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.fixture
def check_links():
    spec = importlib.util.spec_from_file_location("check_links", ROOT / "docs" / "check_links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_link_check_finds_what_is_broken(check_links, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h1 id="top">b</h1><a href="../a.html#there">a</a>')
    (tmp_path / "a.html").write_text(
        '<p id="there"></p><a href="sub/b.html#top">b</a><a href="#there">here</a><a href="https://example.org/no">x</a>'
        '<a href="sub/b.html#gone">b</a><a href="#gone">here</a><img src="gone.png"><a href="sub/c.html">c</a>'
    )
    assert check_links.broken_links(tmp_path) == [
        "a.html: sub/b.html#gone: no such anchor",
        "a.html: #gone: no such anchor",
        "a.html: gone.png: no such file",
        "a.html: sub/c.html: no such file",
    ]
