"""Environments by their Gymnasium ids, with flat observations."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import FlattenObservation

#: Who registers the environments whose ids begin so.
REGISTERED_BY = {"dm_control/": "shimmy", "PointMaze_": "gymnasium_robotics"}


def make_environment(env_id: str) -> gym.Env[Any, Any]:
    """
    The environment of this id; Dict observations are flattened to one vector.

    :raises ImportError: where the package that registers it is not installed
    """
    with _undrawn():
        for prefix, module in REGISTERED_BY.items():
            if env_id.startswith(prefix):
                importlib.import_module(module)
        env = gym.make(env_id)
    return FlattenObservation(env) if isinstance(env.observation_space, gym.spaces.Dict) else env


@contextmanager
def _undrawn() -> Iterator[None]:
    """Nothing is drawn: dm_control, when it is imported, would look for a display and warn where there is none."""
    if "MUJOCO_GL" in os.environ:
        yield
        return
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]
