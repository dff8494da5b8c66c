"""Small agents and what they hold: for the tests of the agents and of the drop-in contract."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn
from torch.testing import assert_close

from sb3_mismatch import MnM, mnm

th.set_num_threads(1)


def sac_settings(**changed: Any) -> dict[str, Any]:
    """SAC's arguments for a few hundred steps."""
    few = {"learning_starts": 50, "gradient_steps": 1, "batch_size": 16, "buffer_size": 1000}
    return {**few, "policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu", **changed}


def world_settings(**changed: Any) -> dict[str, Any]:
    """ModelBased's arguments for a world that is fitted and imagines in milliseconds."""
    few = {"model_train_freq": 100, "imagined_per_step": 2, "n_members": 3, "n_elites": 2}
    kwargs = {
        "dynamics_kwargs": {"net_arch": [8], "end_arch": [8]},
        "classifier_kwargs": {"net_arch": [8]},
        "fit_kwargs": {"dynamics_steps": 5, "classifier_steps": 2, "batch_size": 32},
    }
    return {**few, **kwargs, **changed}


def small(**changed: Any) -> dict[str, Any]:
    """Both, of an agent that learns in whatever world there is."""
    return {**sac_settings(), **world_settings(), "random_steps": 0, **changed}


def soon(monkeypatch, rows: int = 60) -> None:
    """Let worlds be fitted from ``rows`` transitions on."""
    monkeypatch.setattr(mnm, "FEWEST_ROWS", rows)


def trained(env: Any = "Pendulum-v1", steps: int = 120, kind: type = MnM, **changed: Any) -> Any:
    """An agent that has learned for ``steps`` steps."""
    model = kind("MultiInputPolicy" if is_dict(env) else "MlpPolicy", env, **small(**changed))
    return model.learn(steps)


def is_dict(env: Any) -> bool:
    return isinstance(getattr(env, "observation_space", None), spaces.Dict)


def environments(n: int, env_id: Any = "Pendulum-v1", normalize: bool = False, **kwargs: Any) -> VecEnv:
    env = make_vec_env(env_id, n_envs=n, **kwargs)
    return VecNormalize(env) if normalize else env


def policy_contents(model: BaseAlgorithm) -> dict[str, Any]:
    """All that an agent holds but its world: weights, optimizers, temperature, counters, transitions."""
    parameters = {name: value for name, value in model.get_parameters().items() if not name.startswith("world.")}
    buffer = model.replay_buffer
    stored = {name: getattr(buffer, name)[: buffer.size()] for name in ("actions", "rewards", "dones", "timeouts")}
    observations = buffer.observations if isinstance(buffer.observations, dict) else {"": buffer.observations}
    stored |= {f"observations {key}": part[: buffer.size()] for key, part in observations.items()}
    variables = {"log_ent_coef": model.log_ent_coef, "updates": model._n_updates, "steps": model.num_timesteps}
    return {**parameters, **variables, **stored}


def world_contents(model: Any) -> dict[str, Any]:
    """What the world of an agent holds: weights, optimizers, where its random streams stand."""
    parameters = {name: value for name, value in model.get_parameters().items() if name.startswith("world.")}
    return {**parameters, **model._streams.state_dict()}


def assert_same(actual: Any, expected: Any) -> None:
    """Bit for bit."""
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def weights(model: BaseAlgorithm) -> th.Tensor:
    """All weights of the policy in a row."""
    return th.cat([value.flatten() for value in model.policy.state_dict().values()])


def all_finite(model: Any) -> bool:
    """Whether every tensor of the policy is finite, and every weight of the world."""
    modules = [model.world.dynamics, model.world.classifier]
    weights = [*model.policy.state_dict().values(), *(p for module in modules for p in module.parameters())]
    return all(tensor.isfinite().all() for tensor in weights)


class BoxEnv(gym.Env):
    """
    A point pushed about: s' = 0.9 s + 0.1 a + noise, r = -|s|, over after ``length`` steps.

    :param space: observations, a Box or a Dict of Boxes; the point is repeated to fill it
    :param terminates: the end is a true one, not a time limit
    """

    def __init__(
        self,
        space: spaces.Space | None = None,
        action_shape: tuple[int, ...] = (2,),
        length: int = 20,
        terminates: bool = False,
        high: float = 1.0,
    ) -> None:
        self.observation_space = space if space is not None else spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(-high, high, action_shape, np.float32)
        self.length, self.terminates = length, terminates
        self.asked: list[np.ndarray] = []

    def _observe(self, space: spaces.Space) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._observe(part) for key, part in space.items()}
        return np.resize(self.point, space.shape).astype(space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.point, self.t = self.np_random.normal(size=3), 0
        return self._observe(self.observation_space), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.asked.append(action)
        self.point = 0.9 * self.point + 0.1 * float(np.mean(action)) + 0.01 * self.np_random.normal(size=3)
        self.t += 1
        over = self.t >= self.length
        reward = -float(np.abs(self.point).mean())
        return self._observe(self.observation_space), reward, over and self.terminates, over and not self.terminates, {}


class NormalizedExtractor(BaseFeaturesExtractor):
    """BatchNorm and Dropout: what training mode and evaluation mode tell apart."""

    def __init__(self, observation_space: spaces.Box, dropout: float = 0.0) -> None:
        dim = int(np.prod(observation_space.shape))
        super().__init__(observation_space, dim)
        self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(dim), nn.Dropout(dropout))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.net(observations)
