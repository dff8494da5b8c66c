"""Tables and curves from the files that the runs left."""

import csv
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sb3_mismatch.benchmarks.cells import Cell
from sb3_mismatch.benchmarks.curves import plot_curves

EXPLANATION = """\
Each evaluation plays 10 episodes with the deterministic policy. *final* is the last evaluation, *best* the highest one,
*area* the mean height of the learning curve (area under it by trapezoids, divided by its steps), *seconds* the training
without its evaluations. Over seeds: means, ± the standard deviation; *median* and *IQM* are of *final*, IQM being
the mean without the lowest and the highest quarter of the seeds, rounded down."""


class Run(NamedTuple):
    """A cell and its evaluations, (points, 4): environment steps, seconds, mean, standard deviation."""

    cell: Cell
    record: dict[str, Any]
    rows: NDArray[np.float64]
    finished: bool

    @property
    def curve(self) -> NDArray[np.float64]:
        """(points, 2): environment steps, mean return."""
        return self.rows[:, [0, 2]]

    @property
    def scores(self) -> tuple[float, float, float, float]:
        """final, best, area, seconds."""
        steps, returns = self.curve.T
        area = np.average((returns[1:] + returns[:-1]) / 2, weights=np.diff(steps)) if len(steps) > 1 else returns[0]
        return float(returns[-1]), float(returns.max()), float(area), float(self.rows[-1, 1])


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean without the lowest and the highest n // 4 of n values."""
    cut = len(values) // 4
    return float(np.mean(np.sort(values)[cut : len(values) - cut]))


def read_runs(out: Path) -> list[Run]:
    """Every run that was asked for, finished or not. Raises ValueError where there is none."""
    runs = []
    for path in sorted(out.rglob("seed*.json")):
        record = json.loads(path.read_text())
        cell = Cell.of(record)
        final, partial = cell.file(out, ".csv"), cell.file(out, ".partial.csv")
        rows: list[list[float]] = []
        if final.exists() or partial.exists():
            with (final if final.exists() else partial).open(newline="") as file:
                rows = [[float(value) for value in row] for row in list(csv.reader(file))[1:]]
        runs.append(Run(cell, record, np.array(rows).reshape(-1, 4), final.exists()))
    if not runs:
        raise ValueError(f"--out {out} holds no runs: name the folder that `learn` was given")
    return sorted(runs, key=lambda run: (run.cell.env, run.cell.label, run.cell.seed))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def number(value: float) -> str:
    return f"{value:,.1f}"


def environment_section(runs: Sequence[Run]) -> str:
    """The tables of one environment: over seeds, and for each seed."""
    cell = runs[0].cell
    over_seeds, each_seed = [], []
    for label in dict.fromkeys(run.cell.label for run in runs):
        mine = [run for run in runs if run.cell.label == label]
        final, best, area, seconds = np.array([run.scores for run in mine]).T
        spread = f"{number(final.mean())} ± {number(final.std())}"
        summary = [np.median(final), interquartile_mean(final), best.mean(), area.mean(), seconds.mean()]
        over_seeds.append([label, str(len(mine)), spread, *map(number, summary)])
        each_seed += [[label, str(run.cell.seed), *map(number, run.scores)] for run in mine]
    return "\n\n".join(
        [
            f"## {cell.env}",
            f"{cell.steps:,} environment steps, evaluated every {cell.eval_every:,}.",
            table(["algorithm", "seeds", "final", "median", "IQM", "best", "area", "seconds"], over_seeds),
            "Each seed:",
            table(["algorithm", "seed", "final", "best", "area", "seconds"], each_seed),
        ]
    )


def missing_section(runs: Sequence[Run]) -> str:
    """What was asked for and is not finished."""
    lines = [
        f"- {run.cell}: stands at {run.rows[:, 0].max(initial=0):,.0f} of {run.cell.steps:,} steps"
        for run in runs
        if not run.finished
    ]
    return "## Missing\n\n" + ("\n".join(lines) or "Nothing: every run that was asked for is finished.")


def write_report(out: Path) -> list[Path]:
    """Write ``report.md`` and, where a run is finished, ``curves.png`` into ``out``; return their paths."""
    runs = read_runs(out)
    finished = [run for run in runs if run.finished]
    commands = [run.record["command"] for run in runs]
    commands.append(f"python -m sb3_mismatch.benchmarks report --out {shlex.quote(str(out))}")
    machines = [", ".join(f"{name} {value}" for name, value in run.record["ran_on"].items()) for run in finished]
    parts = [
        "# Benchmark results",
        "```\n" + "\n".join(dict.fromkeys(commands)) + "\n```",
        *(f"Ran on {machine}." for machine in dict.fromkeys(machines)),
        EXPLANATION,
    ]
    paths = [out / "report.md"]
    panels: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for run in finished:
        panels.setdefault(run.cell.env, {}).setdefault(run.cell.label, []).append(run.curve)
    if panels:
        paths.append(out / "curves.png")
        plot_curves(panels).savefig(paths[-1], dpi=120)
        parts.append("![Learning curves: mean over seeds, and every seed thin](curves.png)")
    parts += [environment_section([run for run in finished if run.cell.env == env]) for env in panels]
    parts.append(missing_section(runs))
    paths[0].write_text("\n\n".join(parts) + "\n")
    return paths
