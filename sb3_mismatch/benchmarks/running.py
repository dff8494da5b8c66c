"""One run, from the start or from its checkpoint to the end of its budget."""

import csv
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch as th

from sb3_mismatch.benchmarks.cells import Cell, parse_setting, write_record
from sb3_mismatch.benchmarks.checkpoints import Checkpoints, read_checkpoint
from sb3_mismatch.benchmarks.environments import make_environment
from sb3_mismatch.benchmarks.evaluation import Evaluation, EvaluationCallback, Stopwatch
from sb3_mismatch.benchmarks.tables import ALGORITHMS

EVALUATION_SEED = 10_000  # Added to the run's seed, so that no evaluation starts where training does.
CHECKPOINT_EVERY = 2_000  # Environment steps.
PACKAGES = ("sb3-mismatch", "torch", "stable-baselines3", "sb3-contrib", "gymnasium", "mujoco", "numpy")
SUITE_PACKAGES = ("dm_control", "shimmy", "gymnasium-robotics")


def run(cell: Cell, out: Path, threads: int, checkpoint_every: int | None = None) -> None:
    """Train to the end of the budget in this process, from the cell's checkpoint if there is one.

    Expects the cell prepared.

    :param threads: torch threads
    :param checkpoint_every: environment steps between two checkpoints; ``None``: 2,000, or a twentieth of the budget
    """
    th.set_num_threads(threads)
    model, seconds = start_or_resume(cell, out)
    note_start(cell, out, model, threads)
    partial = cell.file(out, ".partial.csv")
    # What was evaluated behind the checkpoint is evaluated again.
    rows = [row for row in read_evaluations(partial) if row.steps <= model.num_timesteps]
    write_evaluations(partial, rows)
    stopwatch = Stopwatch(seconds)

    def make() -> Any:
        return make_environment(cell.env)

    def record(row: Evaluation) -> None:
        with partial.open("a", newline="") as file:  # Closed after each row: an interruption loses no evaluation.
            csv.writer(file).writerow(row)

    seed = EVALUATION_SEED + cell.seed
    evaluations = EvaluationCallback(make, cell.eval_every, seed=seed, record=record, stopwatch=stopwatch, rows=rows)
    # Long runs in large environments have gigabytes to write: at most twenty times.
    every = checkpoint_every or max(CHECKPOINT_EVERY, cell.steps // 20)
    # An evaluation at the step of a checkpoint must be there before it.
    callbacks = [evaluations, Checkpoints(cell.file(out, ".checkpoint"), every, stopwatch)]
    model.learn(cell.steps - model.num_timesteps, callback=callbacks, reset_num_timesteps=False)
    partial.replace(cell.file(out, ".csv"))
    shutil.rmtree(cell.file(out, ".checkpoint"), ignore_errors=True)


def start_or_resume(cell: Cell, out: Path) -> tuple[Any, float]:
    """The model, new or as its checkpoint holds it, and its seconds of training so far."""
    algorithm, settings = ALGORITHMS[cell.algorithm].load()
    settings.update(map(parse_setting, cell.settings))
    env = make_environment(cell.env)
    resumed = read_checkpoint(algorithm, env, cell.file(out, ".checkpoint"), settings.get("device", "auto"))
    return resumed or (algorithm("MlpPolicy", env, seed=cell.seed, **settings), 0.0)


def note_start(cell: Cell, out: Path, model: Any, threads: int) -> None:
    """Add to the cell's JSON file what it runs on, and the step it goes on from where that is not the first."""
    record = json.loads(cell.file(out, ".json").read_text())
    ran_on = {"python": platform.python_version(), **versions(), **machine(threads, model.device)}
    if model.num_timesteps > 0:
        record.setdefault("resumed", []).append({"steps": model.num_timesteps, "ran_on": ran_on})
    else:
        record["ran_on"] = ran_on
        record.pop("resumed", None)
    write_record(cell, out, record)


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    installed = {package.metadata["Name"].lower().replace("_", "-") for package in importlib.metadata.distributions()}
    optional = [package for package in SUITE_PACKAGES if package.replace("_", "-") in installed]
    return {package: importlib.metadata.version(package) for package in (*PACKAGES, *optional)}


def machine(threads: int, device: th.device) -> dict[str, Any]:
    """What it runs on."""
    name = th.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": threads,
        "device": name,
    }


def read_evaluations(path: Path) -> list[Evaluation]:
    """The whole rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(Evaluation._fields)]
    return [Evaluation(int(row[0]), *map(float, row[1:])) for row in rows[1:]]


def write_evaluations(path: Path, rows: Sequence[Evaluation]) -> None:
    """Write the CSV file whole."""
    beside = path.with_suffix(".tmp")
    with beside.open("w", newline="") as file:
        csv.writer(file).writerows([Evaluation._fields, *rows])
    beside.replace(path)
