"""What can be run: a suite is a row of tasks, an algorithm a row that says where its class lives."""

import inspect
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Task(NamedTuple):
    """An environment and its budget.

    :param env: Gymnasium id
    :param steps: environment steps of training
    :param eval_every: environment steps between two evaluations
    :param seeds: the only seeds that this task runs with; ``None``: every seed that is asked for
    """

    env: str
    steps: int
    eval_every: int
    seeds: tuple[int, ...] | None = None


SUITES: dict[str, tuple[Task, ...]] = {
    "smoke": (Task("Pendulum-v1", 300, 100),),
    "pendulums": (
        Task("InvertedPendulum-v5", 3_000, 250),
        Task("Pendulum-v1", 3_000, 250, seeds=(0, 1, 2)),
    ),
    "gym-20k": (
        Task("InvertedPendulum-v5", 5_000, 1_000),
        Task("InvertedDoublePendulum-v5", 5_000, 1_000),
        Task("Hopper-v5", 20_000, 1_000),
        Task("Walker2d-v5", 20_000, 1_000),
        Task("HalfCheetah-v5", 20_000, 1_000),
        Task("Ant-v5", 20_000, 1_000),
    ),
    "dmc-30k": (
        Task("dm_control/hopper-stand-v0", 30_000, 1_500),
        Task("dm_control/walker-walk-v0", 30_000, 1_500),
        Task("dm_control/cheetah-run-v0", 30_000, 1_500),
        Task("dm_control/quadruped-walk-v0", 30_000, 1_500),
        Task("dm_control/finger-spin-v0", 30_000, 1_500),
    ),
    "explore": (
        Task("MountainCarContinuous-v0", 10_000, 1_000),
        Task("dm_control/cartpole-swingup_sparse-v0", 20_000, 1_000),
        Task("PointMaze_UMaze-v3", 30_000, 1_500),
    ),
    # The budgets of MBPO (Janner et al., 2019, figure 2) without those of its environments that Gymnasium lacks.
    "full": (
        Task("InvertedPendulum-v5", 5_000, 1_000),
        Task("Hopper-v5", 125_000, 5_000),
        Task("Walker2d-v5", 300_000, 10_000),
        Task("HalfCheetah-v5", 400_000, 10_000),
        Task("Ant-v5", 300_000, 10_000),
        Task("Humanoid-v5", 300_000, 10_000),
    ),
}

#: Returns from which on an environment counts as solved: Gymnasium's own for MountainCarContinuous-v0, (nearly) all of
#: an episode in balance for the pendulums, half an episode at the goal where the reward is 1 there and 0 elsewhere.
SOLVED: dict[str, float] = {
    "InvertedPendulum-v5": 950,
    "InvertedDoublePendulum-v5": 8_000,
    "MountainCarContinuous-v0": 90,
    "dm_control/cartpole-swingup_sparse-v0": 500,
    "PointMaze_UMaze-v3": 150,
}


class Algorithm(NamedTuple):
    """A class with the constructor of Stable-Baselines3's SAC, at its own defaults but for what is said here.

    :param where: ``"module:Class"``, imported only by the run that needs it
    :param like_mnm: settings that take the default of MnM's constructor
    :param settings: settings of this row
    """

    where: str
    like_mnm: tuple[str, ...] = ()
    settings: Mapping[str, Any] = MappingProxyType({})

    def load(self) -> tuple[Any, dict[str, Any]]:
        """The class and its settings. Raises ImportError where the package is not installed."""
        settings: dict[str, Any] = dict(self.settings)
        if self.like_mnm:
            defaults = inspect.signature(pkgutil.resolve_name("sb3_mismatch:MnM")).parameters
            settings |= {name: defaults[name].default for name in self.like_mnm}
        return pkgutil.resolve_name(self.where), settings


ALGORITHMS: dict[str, Algorithm] = {
    "mnm": Algorithm("sb3_mismatch:MnM"),
    # The objective whose bound holds takes logarithms of rewards.
    "mnm-log": Algorithm("sb3_mismatch:MnM", settings={"objective": "mnm", "reward_shift": "auto"}),
    "mnm-crossq": Algorithm("sb3_mismatch.contrib:MnMCrossQ"),
    "mbpo": Algorithm("sb3_mismatch:MBPO"),
    "vmbpo": Algorithm("sb3_mismatch:VMBPO"),
    "sac": Algorithm("stable_baselines3:SAC"),
    "sac-utd": Algorithm("stable_baselines3:SAC", like_mnm=("gradient_steps",)),
    "tqc": Algorithm("sb3_contrib:TQC"),
    "crossq": Algorithm("sb3_contrib:CrossQ"),
}
