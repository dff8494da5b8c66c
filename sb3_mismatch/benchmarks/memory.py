"""A long run's resident memory, open files and log lines, once its buffers are full."""

import csv
import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

#: growth of resident memory over the last third of a run that passes, in megabytes
MOST_GROWTH = 5.0


class Usage(NamedTuple):
    """
    What the process holds after ``step`` environment steps.

    :param resident_mb: resident memory, in 2**20 bytes
    :param handles: open file handles; -1 where the system does not tell
    :param log_files: files in the folder of the logs
    :param log_lines: lines of its ``progress.csv``
    """

    step: int
    resident_mb: float
    handles: int
    log_files: int
    log_lines: int


def resident_mb() -> float:
    """Resident memory of this process in 2**20 bytes; where the system has no /proc, the highest so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 2**10
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes, but bytes on macOS.
    return highest / (2**20 if sys.platform == "darwin" else 2**10)


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
            # What waits for the collector is no leak.
            gc.collect()
            progress = self.logs / "progress.csv"
            lines = len(progress.read_text().splitlines()) if progress.exists() else 0
            files = sum(path.is_file() for path in self.logs.rglob("*"))
            self._append(Usage(self.num_timesteps, round(resident_mb(), 3), open_handles(), files, lines), "a")
        return True

    def _append(self, row: Sequence[object], mode: str) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file).writerow(row)


def measure(steps: int, every: int, buffer_size: int, out: Path) -> Path:
    """
    Train MnM on Pendulum-v1 with one gradient step a step, logging to CSV and TensorBoard, in this process.

    :return: the CSV file with a row every ``every`` steps
    """
    from sb3_mismatch import MnM

    out.mkdir(parents=True, exist_ok=True)
    path = out / "pendulum.csv"
    with tempfile.TemporaryDirectory() as logs:
        model = MnM("MlpPolicy", "Pendulum-v1", buffer_size=buffer_size, gradient_steps=1, seed=0)
        model.set_logger(configure(logs, ["csv", "tensorboard"]))
        model.learn(steps, callback=UsageCallback(path, every, Path(logs)))
        model.logger.close()
    return path


def read_usage(path: Path) -> list[Usage]:
    """The rows of a CSV file that :class:`UsageCallback` wrote."""
    with path.open(newline="") as file:
        return [Usage(int(step), float(mb), *map(int, rest)) for step, mb, *rest in list(csv.reader(file))[1:]]


class Growth(NamedTuple):
    """What the last third of a run added: memory in 2**20 bytes, open handles, log files, log lines beyond the rate
    of the third before it."""

    resident_mb: float
    handles: int
    log_files: int
    log_lines: int

    @property
    def passes(self) -> bool:
        """Whether nothing grew: memory by less than ``MOST_GROWTH``, log lines no faster than before."""
        return self.resident_mb < MOST_GROWTH and max(self.handles, self.log_files, self.log_lines - 1) <= 0


def growth(rows: Sequence[Usage]) -> Growth:
    """
    Growth from the end of the second third to the end.

    :raises ValueError: when there are fewer than four rows
    """
    if len(rows) < 4:
        raise ValueError(f"{len(rows)} rows have no last third: take more steps, or measure more often")
    third = (len(rows) - 1) // 3
    early, middle, last = rows[-1 - 2 * third], rows[-1 - third], rows[-1]
    return Growth(
        last.resident_mb - middle.resident_mb,
        last.handles - middle.handles,
        last.log_files - middle.log_files,
        (last.log_lines - middle.log_lines) - (middle.log_lines - early.log_lines),
    )


def report(path: Path) -> bool:
    """Print the growth over the last third of the rows in ``path``; whether it passes."""
    rows = read_usage(path)
    grown = growth(rows)
    print(
        f"{path}: {rows[-1].step} steps, {rows[-1].resident_mb:.1f} MB resident; over the last third "
        f"{grown.resident_mb:+.2f} MB (bar: {MOST_GROWTH:g}), {grown.handles:+d} open files, {grown.log_files:+d} log "
        f"files, {grown.log_lines:+d} log lines beyond the rate before: {'flat' if grown.passes else 'it grows'}"
    )
    return grown.passes
