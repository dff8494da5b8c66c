"""Checkpoints of a run: ``FOLDER/step2000/`` holds all that an interrupted run needs to go on from step 2,000."""

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mismatch.benchmarks.evaluation import Stopwatch

ROWS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


class Checkpoints(BaseCallback):
    """Writes a checkpoint every ``every`` environment steps, behind the updates of the last one, and keeps the newest.

    :param folder: where the checkpoints of this run stand, and nothing else
    :param every: environment steps between two checkpoints
    :param stopwatch: the training's
    """

    def __init__(self, folder: Path, every: int, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.folder, self.every, self.stopwatch = folder, every, stopwatch

    def _on_training_start(self) -> None:
        self._next = self.num_timesteps + self.every

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self._next:
            with self.stopwatch.paused(self.model.device) as seconds:
                write_checkpoint(self.model, self.folder, seconds)
            self._next = self.num_timesteps + self.every

    def _on_step(self) -> bool:
        return True


def write_checkpoint(model: Any, folder: Path, seconds: float) -> None:
    """Write a checkpoint of the model, whole or not at all, and remove the older ones.

    :param seconds: seconds of training so far
    """
    beside, target = folder / "unfinished", folder / f"step{model.num_timesteps}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    (beside / "progress.json").write_text(json.dumps({"steps": model.num_timesteps, "seconds": seconds}))
    if hasattr(model, "save_checkpoint"):
        model.save_checkpoint(beside / "model")
    else:
        model.save(beside / "model.zip")
        save_rows(model.replay_buffer, beside / "rows.npz")
    older = list(folder.glob("step*"))
    beside.rename(target)
    for path in older:
        shutil.rmtree(path)


def read_checkpoint(
    algorithm: Any, env: gym.Env[Any, Any], folder: Path, device: str = "auto"
) -> tuple[Any, float] | None:
    """The model of the newest checkpoint in ``folder`` and its seconds of training; None where there is none.

    Our own algorithms go on as if nothing had happened. Stable-Baselines3's begin a new episode, with new draws.
    """
    newest = max(folder.glob("step*"), key=lambda path: int(path.name.removeprefix("step")), default=None)
    if newest is None:
        return None
    progress = json.loads((newest / "progress.json").read_text())
    if hasattr(algorithm, "load_checkpoint"):
        model = algorithm.load_checkpoint(newest / "model", env, device=device)
    else:
        model = algorithm.load(newest / "model.zip", env=env, device=device)
        load_rows(model.replay_buffer, newest / "rows.npz")
        model.set_random_seed(model.seed + progress["steps"])  # Not once more the draws of the run's first steps.
    return model, progress["seconds"]


def save_rows(buffer: ReplayBuffer, path: Path) -> None:
    """Write what a replay buffer holds: its arrays are as long as a million steps from the start."""
    rows = {name: getattr(buffer, name)[: buffer.size()] for name in ROWS}
    np.savez(path, pos=buffer.pos, full=buffer.full, **rows)


def load_rows(buffer: ReplayBuffer, path: Path) -> None:
    """Put back what :func:`save_rows` wrote."""
    with np.load(path) as saved:
        buffer.pos, buffer.full = int(saved["pos"]), bool(saved["full"])
        for name in ROWS:
            getattr(buffer, name)[: buffer.size()] = saved[name]
