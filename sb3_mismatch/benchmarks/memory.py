"""A long run's resident memory, open files and log lines, once its buffers are full."""

import csv
import ctypes
import gc
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

#: growth of resident memory over the last third of a run that passes, in megabytes
MOST_GROWTH = 5.0


INTRODUCTION = """`python -m sb3_mismatch.benchmarks memory`: MnM on Pendulum-v1, one gradient step a step.
Resident memory in 2**20 bytes, after a collection and without what the allocator keeps; growth is of the mean over a
third of the rows."""


class Usage(NamedTuple):
    """
    What the process holds after ``step`` environment steps.

    :param resident_mb: resident memory, in 2**20 bytes, without what is free and not given back to the system yet
    :param highest_mb: the highest resident memory so far
    :param handles: open file handles; -1 where the system does not tell
    :param log_files: files in the folder of the logs
    :param log_lines: lines of its ``progress.csv``
    """

    step: int
    resident_mb: float
    highest_mb: float
    handles: int
    log_files: int
    log_lines: int


def memory_mb() -> tuple[float, float]:
    """Resident memory of this process and its highest so far, in 2**20 bytes; without /proc the latter twice."""
    # What waits for the collector is no leak, and neither is what the allocator keeps for later.
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, but bytes on macOS.
    highest_mb = highest / (2**20 if sys.platform == "darwin" else 2**10)
    status = Path("/proc/self/status")
    if not status.exists():
        return highest_mb, highest_mb
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 2**10, highest_mb


def open_handles() -> int:
    """Open file handles of this process; -1 where the system has no /proc."""
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.exists() else -1


class UsageCallback(BaseCallback):
    """
    Appends a row to ``path`` every ``every`` steps.

    :param path: the CSV file
    :param every: environment steps between two rows
    :param logs: folder of the run's logs
    """

    def __init__(self, path: Path, every: int, logs: Path) -> None:
        super().__init__()
        self.path, self.every, self.logs = path, every, logs

    def _on_training_start(self) -> None:
        self._append(Usage._fields, "w")

    def _on_step(self) -> bool:
        if self.n_calls % self.every == 0:
            progress = self.logs / "progress.csv"
            lines = len(progress.read_text().splitlines()) if progress.exists() else 0
            files = sum(path.is_file() for path in self.logs.rglob("*"))
            resident, highest = (round(mb, 3) for mb in memory_mb())
            self._append(Usage(self.num_timesteps, resident, highest, open_handles(), files, lines), "a")
        return True

    def _append(self, row: Sequence[object], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file).writerow(row)


def measure(steps: int, every: int, buffer_size: int, out: Path) -> Path:
    """
    Train MnM on Pendulum-v1 with one gradient step a step, logging to CSV and TensorBoard, in this process.

    The world is fitted as often as by default, in fewer steps: what leaks leaks at every fit, however long.

    :return: the CSV file with a row every ``every`` steps
    """
    from sb3_mismatch import MnM

    out.mkdir(parents=True, exist_ok=True)
    path = out / "pendulum.csv"
    with tempfile.TemporaryDirectory() as logs:
        fits = {"dynamics_steps": 50, "classifier_steps": 20}
        model = MnM("MlpPolicy", "Pendulum-v1", buffer_size=buffer_size, gradient_steps=1, seed=0, fit_kwargs=fits)
        model.set_logger(configure(logs, ["csv", "tensorboard"]))
        model.learn(steps, callback=UsageCallback(path, every, Path(logs)))
        model.logger.close()
    return path


def read_usage(path: Path) -> list[Usage]:
    """The rows of a CSV file that :class:`UsageCallback` wrote."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Usage(int(step), float(mb), float(highest), *map(int, rest)) for step, mb, highest, *rest in rows]


class Growth(NamedTuple):
    """
    What the last third of a run added.

    :param resident_mb: to the mean resident memory of the third before it
    :param highest_mb: to the highest resident memory
    :param handles, log_files: since the end of the third before it
    :param log_lines: beyond those that the third before it wrote
    """

    resident_mb: float
    highest_mb: float
    handles: int
    log_files: int
    log_lines: int

    @property
    def passes(self) -> bool:
        """Whether memory grew by less than ``MOST_GROWTH`` and nothing else did; a log line may fall either side."""
        memory = max(self.resident_mb, self.highest_mb)
        return memory < MOST_GROWTH and max(self.handles, self.log_files, self.log_lines - 1) <= 0


def growth(rows: Sequence[Usage]) -> Growth:
    """
    Growth over the last third of the rows.

    :raises ValueError: when there are fewer than six rows
    """
    if len(rows) < 6:
        raise ValueError(f"{len(rows)} rows have no last third: take more steps, or measure more often")
    third = len(rows) // 3
    middle, last = rows[-2 * third : -third], rows[-third:]
    before = rows[-2 * third - 1] if len(rows) > 2 * third else rows[0]
    return Growth(
        fmean(row.resident_mb for row in last) - fmean(row.resident_mb for row in middle),
        last[-1].highest_mb - middle[-1].highest_mb,
        last[-1].handles - middle[-1].handles,
        last[-1].log_files - middle[-1].log_files,
        (last[-1].log_lines - middle[-1].log_lines) - (middle[-1].log_lines - before.log_lines),
    )


def report(path: Path) -> bool:
    """Print the growth over the last third of the rows in ``path``, and write it beside them; whether it passes."""
    rows = read_usage(path)
    grown = growth(rows)
    told = (
        f"{rows[-1].step} steps: {rows[-1].resident_mb:.1f} MB resident, {rows[-1].highest_mb:.1f} MB at most.\n"
        f"Over the last third: {grown.resident_mb:+.2f} MB resident, {grown.highest_mb:+.2f} MB at most (bar: "
        f"{MOST_GROWTH:g}), {grown.handles:+d} open files, {grown.log_files:+d} log files, {grown.log_lines:+d} log "
        f"lines beyond those of the third before: {'flat' if grown.passes else 'it grows'}."
    )
    print(told)
    table = ["| " + " | ".join(map(str, row)) + " |" for row in (Usage._fields, ("---",) * len(Usage._fields), *rows)]
    text = ["---", "orphan: true", "---", "", "# Memory of a long run", "", INTRODUCTION, "", told, "", *table, ""]
    path.with_name("report.md").write_text("\n".join(text))
    return grown.passes
