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
from sb3_mismatch.benchmarks.curves import plot_bands
from sb3_mismatch.benchmarks.evaluation import kept
from sb3_mismatch.benchmarks.statistics import Interval, over_seeds, over_seeds_and_environments
from sb3_mismatch.benchmarks.tables import SOLVED

COLUMNS = ("steps", "seconds", "mean", "std")

EXPLANATION = """\
Each evaluation plays 10 episodes with the deterministic policy. *final* is the last evaluation, *best* the highest one,
*area* the mean height of the learning curve (area under it by trapezoids, divided by its steps), *seconds* the training
without its evaluations and checkpoints. *drop* is the share of the best evaluation so far that the worst evaluation in
the last fifth of a run has lost; over seeds it is the largest. Over seeds: interquartile means (the mean without the
lowest and the highest quarter of the seeds, rounded down), in brackets their 95 % intervals by stratified bootstrap
(rliable)."""


class Run(NamedTuple):
    """A cell and its evaluations, (points, 4): environment steps, seconds, mean, standard deviation."""

    cell: Cell
    record: dict[str, Any]
    rows: NDArray[np.float64]
    finished: bool

    @property
    def scores(self) -> tuple[float, float, float, float, float]:
        """final, best, area, drop, seconds."""
        steps, returns = self.rows[:, [0, 2]].T
        area = np.average((returns[1:] + returns[:-1]) / 2, weights=np.diff(steps)) if len(steps) > 1 else returns[0]
        return float(returns[-1]), float(returns.max()), float(area), self.drop, float(self.rows[-1, 1])

    @property
    def drop(self) -> float:
        """The share of the best evaluation so far that the worst one of the last fifth of the steps has lost."""
        steps, returns = self.rows[:, [0, 2]].T
        bests = np.maximum.accumulate(returns)
        late = steps > 0.8 * steps[-1]
        return 1 - min(kept(*pair) for pair in zip(returns[late], bests[late], strict=True))

    def reaches(self, height: float) -> tuple[float, float] | None:
        """Environment steps and seconds up to the first evaluation of at least this height; None without one."""
        reached = np.flatnonzero(self.rows[:, 2] >= height)
        return (float(self.rows[reached[0], 0]), float(self.rows[reached[0], 1])) if len(reached) else None


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
                rows = [[float(row[name]) for name in COLUMNS] for row in csv.DictReader(file)]
        runs.append(Run(cell, record, np.array(rows).reshape(-1, len(COLUMNS)), final.exists()))
    if not runs:
        raise ValueError(f"--out {out} holds no runs: name the folder that `learn` was given")
    return sorted(runs, key=lambda run: (run.cell.env, run.cell.label, run.cell.seed))


class Group(NamedTuple):
    """
    The finished runs of one label in one environment.

    :param runs: one per seed, evaluated at the same steps
    :param curve: returns at these steps, over seeds
    :param area: the runs' areas over seeds, a number
    :param best: their best evaluations over seeds, a number
    """

    runs: list[Run]
    curve: Interval
    area: Interval
    best: Interval

    @property
    def final(self) -> Interval:
        """The last evaluation over seeds, a number."""
        return self.curve.part(-1)

    @classmethod
    def of(cls, runs: list[Run]) -> "Group":
        _, bests, areas, *_ = np.array([run.scores for run in runs]).T
        returns = np.stack([run.rows[:, 2] for run in runs])  # (seeds, points)
        interval = over_seeds(np.column_stack([returns, areas, bests]))  # One bootstrap serves all.
        return cls(runs, interval.part(slice(-2)), interval.part(-2), interval.part(-1))


Groups = dict[str, dict[str, Group]]


def grouped(runs: Sequence[Run]) -> Groups:
    """Finished runs by environment and label."""
    lists: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        if run.finished:
            lists.setdefault(run.cell.env, {}).setdefault(run.cell.label, []).append(run)
    return {env: {label: Group.of(mine) for label, mine in labels.items()} for env, labels in lists.items()}


def write_report(out: Path, baseline: str = "sac") -> list[Path]:
    """Write ``report.md`` and, where a run is finished, ``curves.png`` into ``out``; return their paths.

    :param baseline: label whose mean final return the others are to reach
    """
    runs = read_runs(out)
    groups = grouped(runs)
    parts = ["# Benchmark results", *provenance(runs, out), EXPLANATION]
    paths = [out / "report.md"]
    if groups:
        paths.append(out / "curves.png")
        bands = {
            env: {label: (group.runs[0].rows[:, 0], group.curve) for label, group in labels.items()}
            for env, labels in groups.items()
        }
        plot_bands(bands).savefig(paths[-1], dpi=100)
        parts.append("![Learning curves: interquartile means over seeds in their intervals](curves.png)")
        parts.append(overview_section(groups))
    parts += [environment_section(labels, baseline) for labels in groups.values()]
    parts.append(missing_section(runs))
    paths[0].write_text("\n\n".join(parts) + "\n")
    return paths


def provenance(runs: Sequence[Run], out: Path) -> list[str]:
    """The commands, the machines and versions, and which runs were interrupted."""
    commands = [run.record["command"] for run in runs]
    commands.append(f"python -m sb3_mismatch.benchmarks report --out {shlex.quote(str(out))}")
    starts = [start for run in runs for start in (run.record, *run.record.get("resumed", ())) if "ran_on" in start]
    machines = [", ".join(f"{name} {value}" for name, value in start["ran_on"].items()) for start in starts]
    resumed = [
        f"{run.cell} at {', '.join(format(again['steps'], ',') for again in run.record['resumed'])}"
        for run in runs
        if run.record.get("resumed")
    ]
    parts = ["```\n" + "\n".join(dict.fromkeys(commands)) + "\n```"]
    parts += [f"Ran on {machine}." for machine in dict.fromkeys(machines)]
    if resumed:
        parts.append(f"Interrupted, and continued from a checkpoint: {'; '.join(resumed)} steps.")
    return parts


def overview_section(groups: Groups) -> str:
    """Every label in a row: what it is, how it ends in each environment, and over all of them."""
    several = len(groups) > 1
    cells = {label: group.runs[0].cell for labels in groups.values() for label, group in labels.items()}
    rows = []
    for label in sorted(cells):
        row = [label, described(cells[label])]
        row += [told(labels[label].final) if label in labels else "–" for labels in groups.values()]
        if several:
            scores = normalised(groups, label)
            row.append(told(over_seeds_and_environments(scores), digits=2) if len(scores) else "–")
        rows.append(row)
    words = "*final* in each environment."
    if several:
        words += (
            " *all*: over environments and the seeds that are finished in all of them, with 0 for the lowest *final* "
            "of any run in an environment and 1 for the highest."
        )
    head = ["algorithm", "is", *groups, *(["all"] if several else [])]
    return "\n\n".join(["## All environments", words, table(head, rows)])


def described(cell: Cell) -> str:
    """The algorithm, and the arguments it was given."""
    return f"`{cell.algorithm}`" + "".join(f", `{setting}`" for setting in cell.settings)


def normalised(groups: Groups, label: str) -> NDArray[np.float64]:
    """(seeds, environments): final returns between the lowest (0) and the highest (1) of any run in the environment.

    Only of seeds that are finished in all environments, which may be none.
    """
    finals = [
        {run.cell.seed: run.scores[0] for run in labels[label].runs} if label in labels else {}
        for labels in groups.values()
    ]
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in finals)))
    columns = []
    for labels, of_seed in zip(groups.values(), finals, strict=True):
        everyones = [run.scores[0] for group in labels.values() for run in group.runs]
        low, high = min(everyones), max(everyones)
        columns.append([(of_seed[seed] - low) / (high - low or 1.0) for seed in seeds])
    return np.array(columns).T


def environment_section(labels: dict[str, Group], baseline: str) -> str:
    """The tables of one environment: over seeds, and for each seed."""
    cell = next(iter(labels.values())).runs[0].cell
    standard = labels.get(baseline)
    solved = SOLVED.get(cell.env)
    head = ["algorithm", "seeds", "final", "area", "best", "drop", "seconds"]
    over_all, each_seed = [], []
    for label, group in labels.items():
        finals, _, _, drops, seconds = np.array([run.scores for run in group.runs]).T
        row = [label, str(len(group.runs)), *map(told, (group.final, group.area, group.best))]
        row += [share(drops.max()), number(seconds.mean())]
        if standard is not None:
            row += reached_cells(group.runs, standard.runs)
        if solved is not None:
            row.append(f"{sum(finals >= solved)} of {len(finals)}")
        over_all.append(row)
        for run in group.runs:
            final, best, area, drop, time = run.scores
            values = [number(final), number(best), number(area), share(drop), number(time)]
            each_seed.append([label, str(run.cell.seed), *values])
    if standard is not None:
        head += [f"steps to {baseline}'s final", "seconds to it"]
    if solved is not None:
        head.append(f"ends at {solved:,.0f} or more")
    return "\n\n".join(
        [
            f"## {cell.env}",
            f"{cell.steps:,} environment steps, evaluated every {cell.eval_every:,}.",
            table(head, over_all),
            "Each seed:",
            table(["algorithm", "seed", "final", "best", "area", "drop", "seconds"], each_seed),
        ]
    )


def reached_cells(runs: Sequence[Run], standards: Sequence[Run]) -> list[str]:
    """Steps and seconds up to the mean final return of the ``standards``: means of the seeds that reach it.

    Behind the seconds: their share of the seconds of the standards' whole runs.
    """
    height = float(np.mean([run.scores[0] for run in standards]))
    reached = [point for run in runs if (point := run.reaches(height)) is not None]
    if not reached:
        return ["never", "never"]
    steps, seconds = np.mean(reached, axis=0)
    among = "" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)} seeds)"
    whole = np.mean([run.rows[-1, 1] for run in standards])
    return [f"{steps:,.0f}{among}", f"{number(seconds)} (x {seconds / whole:.2f}){among}"]


def missing_section(runs: Sequence[Run]) -> str:
    """What was asked for and is not finished."""
    lines = [
        f"- {run.cell}: stands at {run.rows[:, 0].max(initial=0):,.0f} of {run.cell.steps:,} steps"
        for run in runs
        if not run.finished
    ]
    return "## Missing\n\n" + ("\n".join(lines) or "Nothing: every run that was asked for is finished.")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def told(interval: Interval, digits: int = 1) -> str:
    """A number, and its interval where it has an extent."""
    point, low, high = map(float, interval)
    return number(point, digits) + (f" [{number(low, digits)}, {number(high, digits)}]" if low < high else "")


def number(value: float, digits: int = 1) -> str:
    return f"{value:,.{digits}f}"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"
