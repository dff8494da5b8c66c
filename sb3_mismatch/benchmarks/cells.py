"""A cell is one run: a task, an algorithm with its settings, a seed; its files are its only memory.

``OUT/ENV/LABEL/seed0.json`` tells what was asked and what it ran on, ``seed0.partial.csv`` grows while it runs, and
``seed0.csv`` is there when it is finished.
"""

import ast
import csv
import importlib.metadata
import json
import multiprocessing
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from sb3_mismatch.benchmarks.tables import ALGORITHMS

EVALUATION_SEED = 10_000  # Added to the run's seed, so that no evaluation starts where training does.
PACKAGES = ("sb3-mismatch", "torch", "stable-baselines3", "sb3-contrib", "gymnasium", "mujoco", "numpy")


@dataclass(frozen=True)
class Cell:
    """
    :param env: Gymnasium id
    :param steps: environment steps of training
    :param eval_every: environment steps between two evaluations
    :param algorithm: name of a row of ``ALGORITHMS``
    :param label: the algorithm's name in files and tables
    :param seed: seed of the run
    :param settings: constructor arguments as ``"name=literal"``
    """

    env: str
    steps: int
    eval_every: int
    algorithm: str
    label: str
    seed: int
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.env} {self.label} seed {self.seed}"

    def file(self, out: Path, suffix: str) -> Path:
        """Its file in ``out``, with suffix ``.csv``, ``.partial.csv`` or ``.json``."""
        return out / self.env / self.label / f"seed{self.seed}{suffix}"

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Cell":
        """The cell that a JSON file tells of."""
        return cls(**{**record["cell"], "settings": tuple(record["cell"]["settings"])})


def parse_setting(text: str) -> tuple[str, Any]:
    """``"gradient_steps=5"`` -> ``("gradient_steps", 5)``. Raises ValueError for anything but ``name=literal``."""
    name, _, value = text.partition("=")
    try:
        if not name.isidentifier():
            raise ValueError
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"--set {text} is not name=literal: write gradient_steps=5 or \"objective='mnm'\"") from None


def prepare(cells: Sequence[Cell], out: Path, command: str) -> list[Cell]:
    """Write down what is asked, and return the cells that are not finished.

    Raises ValueError where ``out`` holds runs of the same label with other settings.
    """
    for cell in cells:
        for path in cell.file(out, ".json").parent.glob("seed*.json"):
            known = Cell.of(json.loads(path.read_text()))
            if replace(known, seed=cell.seed) != cell:
                raise ValueError(f"{path} was made as {known!r}, now asked as {cell!r}: use another --label or --out")
    unfinished = [cell for cell in cells if not cell.file(out, ".csv").exists()]
    for cell in unfinished:
        write_record(cell, out, {"cell": asdict(cell), "command": command})
    return unfinished


def write_record(cell: Cell, out: Path, record: dict[str, Any]) -> None:
    """Write the cell's JSON file whole."""
    path = cell.file(out, ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=2) + "\n")
    beside.replace(path)


def run(cell: Cell, out: Path, threads: int) -> None:
    """Train from the start to the end of the budget, in this process; expects the cell prepared."""
    import torch as th

    from sb3_mismatch.benchmarks.evaluation import Evaluation, EvaluationCallback

    th.set_num_threads(threads)
    algorithm, settings = ALGORITHMS[cell.algorithm].load()
    settings.update(map(parse_setting, cell.settings))
    model = algorithm("MlpPolicy", cell.env, seed=cell.seed, **settings)

    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    machine = {"platform": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(), "threads": threads}
    ran_on = {"python": platform.python_version(), **versions, **machine, "device": str(model.device)}
    write_record(cell, out, {**json.loads(cell.file(out, ".json").read_text()), "ran_on": ran_on})
    partial = cell.file(out, ".partial.csv")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)

        def write(row: Sequence[Any]) -> None:
            writer.writerow(row)
            file.flush()  # An interruption loses no evaluation.

        write(Evaluation._fields)
        seed = EVALUATION_SEED + cell.seed
        model.learn(cell.steps, callback=EvaluationCallback(cell.env, cell.eval_every, seed=seed, record=write))
    partial.replace(cell.file(out, ".csv"))


def launch(cells: Sequence[Cell], out: Path, jobs: int, threads: int) -> list[Cell]:
    """Run each cell in a process of its own, ``jobs`` at a time, and return the cells that failed."""
    os.environ["OMP_NUM_THREADS"] = str(threads)  # The processes inherit it.
    context = multiprocessing.get_context("spawn")
    waiting, failed = list(cells), []
    running: dict[Any, tuple[Cell, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                process = context.Process(target=run, args=(cell, out, threads), name=str(cell))
                process.start()
                running[process.sentinel] = (cell, process)
            for sentinel in wait(list(running)):
                cell, process = running.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    failed.append(cell)
                state = "done" if process.exitcode == 0 else f"failed with exit status {process.exitcode}"
                print(f"{cell}: {state}, {len(waiting) + len(running)} to go", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return failed
