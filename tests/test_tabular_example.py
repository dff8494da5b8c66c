"""examples/gridworld.py runs, quickly, and its tables say what docs/tabular.md says of them."""

import csv
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """All tables of a short run, by name."""
    spec = importlib.util.spec_from_file_location("gridworld", ROOT / "examples" / "gridworld.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["gridworld"] = gridworld = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gridworld)
    gridworld.SWITCHES.pop("B_hor")  # the slow one
    out = tmp_path_factory.mktemp("tabular")
    gridworld.main(f"--out {out} --seeds 2 --iterations 21 --long-iterations 21".split())
    assert {path.stem for path in out.glob("*.png")} == {
        *("fig_2a_right", "fig_2b", "fig_3a", "fig_3b", "bounds", "pairs", "fig_2a_left", "fig_2a_divergence")
    }
    return {
        path.stem: list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) for path in out.glob("*.csv")
    }


def test_figure_3b_is_ordered_and_rises(tables: dict[str, list[dict[str, str]]]) -> None:
    columns = ["B_1", "B_γ", "B_hor", "log return", "log VMBPO at its own q"]
    rows = [[float(row[column]) for column in columns] for row in tables["fig_3b"]]
    for row in rows:
        assert row == sorted(row)
    assert all(late > early for early, late in zip(rows[0], rows[-1], strict=True))
    assert all(float(row["log VMBPO at MnM's q"]) >= float(row["log return"]) for row in tables["fig_3b"])


def test_each_bound_is_tighter_than_the_one_before(tables: dict[str, list[dict[str, str]]]) -> None:
    for name in ("2a left", "3a", "3b"):
        rows = [row for row in tables["bounds"] if row["MDP"] == name]
        values = [float(row["value"]) for row in rows]
        assert len(values) == 5
        assert values == sorted(values)
        assert values[-1] == pytest.approx(float(rows[-1]["log return"]), abs=1e-6)


def test_figure_2b_reaches_the_goal_but_for_the_classifier(tables: dict[str, list[dict[str, str]]]) -> None:
    ends = {row["method"]: (row["i"], row["j"]) for row in tables["fig_2b_paths"]}
    reached = {method: end == ("2", "12") for method, end in ends.items()}
    assert list(reached.values()) == [True, True, False]
    for row in tables["fig_2b_bounds"]:
        assert float(row["B_1 unclipped"]) <= float(row["log return"])


def test_the_matched_pair_never_decreases(tables: dict[str, list[dict[str, str]]]) -> None:
    falls = {"matched": 0, "mismatched": 0}
    for row in tables["pairs"]:
        values = [float(row[f"B_1 at {i}"]) for i in range(10)]
        falls[row["pair"].split(":")[0]] += any(b < a - 1e-6 for a, b in itertools.pairwise(values))
    assert falls["matched"] == 0
    assert falls["mismatched"] > 50


def test_the_committed_tables_have_the_same_columns(tables: dict[str, list[dict[str, str]]]) -> None:
    for name, rows in tables.items():
        with (ROOT / "docs" / "results" / "tabular" / f"{name}.csv").open(encoding="utf-8") as file:
            header = next(csv.reader(file))
        assert {column for column in rows[0] if not column.startswith("seed_")} <= set(header)
