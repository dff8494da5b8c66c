"""Evaluate a learner while it trains, without touching what it learns or the clock of its training."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy


class Evaluation(NamedTuple):
    """One evaluation of the deterministic policy.

    :param steps: environment steps of training so far
    :param seconds: seconds of training so far, evaluations excluded
    :param mean: mean of the episodes' undiscounted returns
    :param std: their standard deviation
    :param kept: what is :func:`kept` of the best mean so far: 1 at the best, near 0 in a collapse
    """

    steps: int
    seconds: float
    mean: float
    std: float
    kept: float


def kept(current: float, best: float) -> float:
    """current / best where best > 0, best / current where both are below 0, 0 where the sign was lost: in [0, 1]."""
    if current >= best:
        return 1.0
    return max(current / best, 0.0) if best > 0 else abs(best / current)


class Stopwatch:
    """
    Seconds of training, those of evaluations and checkpoints excluded.

    :param seconds: where it starts
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @contextmanager
    def paused(self, device: th.device) -> Iterator[float]:
        """Stands still while it lasts; yields where."""
        if device.type == "cuda":
            th.cuda.synchronize(device)  # Updates still under way belong to the training's seconds.
        seconds = self.seconds
        try:
            yield seconds
        finally:
            self._started = time.perf_counter() - seconds


@contextmanager
def global_randomness_kept(device: th.device) -> Iterator[None]:
    """Puts the global streams of Python, NumPy and PyTorch (on the CPU and ``device``) back to where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with th.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class EvaluationCallback(BaseCallback):
    """Evaluates every ``every`` environment steps, and once more after the last update of ``learn``.

    Each evaluation plays the same starts, side by side in environments of its own, so it depends on the policy alone.
    The evaluations stand in ``rows``.

    :param env: Gymnasium id, or a function that makes the environment
    :param every: environment steps between two evaluations, at least 1
    :param n_episodes: episodes per evaluation, at least 1
    :param seed: seed of the evaluation environments: ``seed``, ``seed + 1``, ... for the episodes
    :param record: called with each evaluation as soon as it is made
    :param stopwatch: the training's; ``None``: one that starts with ``learn``
    :param rows: evaluations of the same run before, where it was interrupted
    """

    def __init__(
        self,
        env: str | Callable[..., gym.Env[Any, Any]],
        every: int,
        *,
        n_episodes: int = 10,
        seed: int = 10_000,
        record: Callable[[Evaluation], None] | None = None,
        stopwatch: Stopwatch | None = None,
        rows: Sequence[Evaluation] = (),
    ) -> None:
        super().__init__()
        for name, value in (("every", every), ("n_episodes", n_episodes)):
            if value < 1:
                raise ValueError(f"{name}={value} cannot be: give 1 or more, or leave the callback out of learn()")
        self.env, self.every, self.n_episodes, self.seed, self.record = env, every, n_episodes, seed, record
        self.rows = list(rows)
        self.stopwatch = stopwatch

    def _on_training_start(self) -> None:
        with global_randomness_kept(self.model.device):
            self._eval_env = make_vec_env(self.env, n_envs=self.n_episodes)
        self._plan_next()
        self._clock = self.stopwatch or Stopwatch()

    def _on_step(self) -> bool:
        # The evaluation at the end of the budget waits for the updates that follow the last step.
        if self._next <= self.num_timesteps < self.model._total_timesteps:
            self._evaluate()
            self._plan_next()
        return True

    def _on_training_end(self) -> None:
        self._evaluate()
        self._eval_env.close()

    def _plan_next(self) -> None:
        self._next = (self.num_timesteps // self.every + 1) * self.every

    def _evaluate(self) -> None:
        device = self.model.device
        with self._clock.paused(device) as seconds, global_randomness_kept(device):
            self._eval_env.seed(self.seed)
            returns, _ = evaluate_policy(self.model, self._eval_env, self.n_episodes, return_episode_rewards=True)
        mean = float(np.mean(returns))
        best = max([mean, *(row.mean for row in self.rows)])
        row = Evaluation(self.num_timesteps, round(seconds, 3), mean, float(np.std(returns)), kept(mean, best))
        self.rows.append(row)
        if self.record is not None:
            self.record(row)
