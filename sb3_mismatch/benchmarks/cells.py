"""A cell is one run: a task, an algorithm with its settings, a seed; its files are its only memory.

``OUT/ENV/LABEL/seed0.json`` tells what was asked and what it ran on, ``seed0.partial.csv`` grows while it runs,
``seed0.checkpoint/`` is where it goes on after an interruption, and ``seed0.csv`` is there when it is finished.
"""

import ast
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


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
        """Its file in ``out``, with suffix ``.csv``, ``.partial.csv``, ``.checkpoint`` or ``.json``."""
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
    unfinished = []
    for cell in cells:
        checkpoint = cell.file(out, ".checkpoint")
        if cell.file(out, ".csv").exists():
            shutil.rmtree(checkpoint, ignore_errors=True)  # A run that ended right then left it behind.
            continue
        unfinished.append(cell)
        if not (checkpoint.exists() and cell.file(out, ".json").exists()):
            write_record(cell, out, {"cell": asdict(cell), "command": command})
    return unfinished


def write_record(cell: Cell, out: Path, record: dict[str, Any]) -> None:
    """Write the cell's JSON file whole."""
    path = cell.file(out, ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=2) + "\n")
    beside.replace(path)
