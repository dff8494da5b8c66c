"""What a run has left on disk: SB3's progress.csv and TensorBoard files, evaluations.npz, monitor.csv, benchmarks."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

STEPS = "time/total_timesteps"


def read_scalars(log: str | Path, keys: tuple[str, ...]) -> dict[str, Array]:
    """
    Values that SB3's logger has written.

    :param log: a ``progress.csv``, a TensorBoard event file, or a folder that holds one or the other
    :param keys: of the values
    :return: for each key (points, 2): environment steps, value
    :raises FileNotFoundError: when there is no log
    :raises ValueError: when it has none of a key's values
    """
    path = Path(log)
    progress = path / "progress.csv" if path.is_dir() else path
    if progress.suffix == ".csv" and progress.is_file():
        found = _of_csv(progress, keys)
    elif path.is_file() or any(path.glob("events.out.tfevents.*")):
        found = _of_events(path, keys)
    else:
        raise FileNotFoundError(
            f"log={str(log)!r} is no progress.csv, no TensorBoard event file and no folder with one in it: "
            "train with tensorboard_log=..., or with model.set_logger(configure(folder, ['csv']))"
        )
    for key in keys:
        if not len(found[key]):
            raise ValueError(f"log={str(log)!r} holds no {key}: let it run until a world is fitted and logged")
    return found


def _of_csv(path: Path, keys: tuple[str, ...]) -> dict[str, Array]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # A row is blank where nothing was recorded.
    return {key: _points([(row[STEPS], row[key]) for row in rows if row.get(key) and row.get(STEPS)]) for key in keys}


def _of_events(path: Path, keys: tuple[str, ...]) -> dict[str, Array]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 1, "histograms": 1})
    events.Reload()
    there = events.Tags()["scalars"]
    return {key: _points([(e.step, e.value) for e in events.Scalars(key)] if key in there else []) for key in keys}


def _points(pairs: list[tuple[Any, Any]]) -> Array:
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def read_returns(run: str | Path, window: int = 10) -> Array:
    """
    The returns of one run.

    :param run: ``evaluations.npz`` of SB3's EvalCallback, ``monitor.csv`` of its Monitor, a CSV of this package's
        benchmarks, or a folder that holds one of the first two
    :param window: episodes of a ``monitor.csv`` that are averaged
    :return: (points, 2): environment steps, mean return
    :raises FileNotFoundError: when there is no such file
    :raises ValueError: when it is none of these, or empty
    """
    path = Path(run)
    if path.is_dir():
        path = next((path / name for name in ("evaluations.npz", "monitor.csv") if (path / name).is_file()), path)
    if not path.is_file():
        raise FileNotFoundError(
            f"run={str(run)!r} is no evaluations.npz, monitor.csv or CSV of the benchmarks, and no folder with one"
        )
    if path.suffix == ".npz":
        with np.load(path) as held:
            points = np.column_stack([held["timesteps"], held["results"].mean(axis=1)]).astype(np.float64)
    else:
        points = _returns_of_csv(path, window)
    if not len(points):
        raise ValueError(f"run={str(run)!r} holds no episode yet: let it run on")
    return points


def _returns_of_csv(path: Path, window: int) -> Array:
    with path.open(newline="") as file:
        lines = [line for line in file if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    head = set(rows[0]) if rows else {"r", "l"}
    if {"r", "l"} <= head:
        episodes = _points([(row["l"], row["r"]) for row in rows])
        window = min(window, max(len(episodes), 1))
        steps, returns = np.cumsum(episodes[:, 0]), episodes[:, 1]
        means = np.convolve(returns, np.full(window, 1 / window), mode="valid") if len(returns) else returns
        return np.column_stack([steps[len(steps) - len(means) :], means])
    if {"steps", "mean"} <= head:
        return _points([(row["steps"], row["mean"]) for row in rows])
    raise ValueError(f"run={str(path)!r} has columns {sorted(head)}: neither monitor.csv's nor the benchmarks'")


def on_common_steps(runs: list[Array], points: int = 200) -> tuple[Array, Array]:
    """
    Runs on the same environment steps: as they are where they share them, otherwise interpolated where all have values.

    :param runs: each (points, 2): steps, value
    :return: steps (m,), values (runs, m)
    :raises ValueError: when no step is within all runs
    """
    steps = runs[0][:, 0]
    if all(len(run) == len(steps) and (run[:, 0] == steps).all() for run in runs):
        return steps, np.stack([run[:, 1] for run in runs])
    low, high = max(run[0, 0] for run in runs), min(run[-1, 0] for run in runs)
    if low > high:
        raise ValueError(f"the runs share no environment step: one begins at {low:,.0f} and one ends at {high:,.0f}")
    steps = np.linspace(low, high, points)
    return steps, np.stack([np.interp(steps, *run.T) for run in runs])
