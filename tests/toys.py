"""Environments and systems whose every transition is known: for the tests of the learned world's parts."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_mismatch.buffers import RealTransitions

th.set_num_threads(1)
CPU = th.device("cpu")


class Counter(gym.Env):
    """
    Observes (its name, episode, t) and earns 100 episode + t: a row tells its own place.

    Even episodes end at t = 3, odd ones are cut by a time limit at t = 4.
    """

    action_space = spaces.Box(-2.0, 2.0, (1,))

    def __init__(self, name: float = 0.0, as_dict: bool = False) -> None:
        self.name, self.as_dict, self.episode = name, as_dict, -1
        inf = np.inf
        self.observation_space: spaces.Space[Any] = spaces.Box(-inf, inf, (3,))
        if as_dict:
            self.observation_space = spaces.Dict(
                {"who": spaces.Box(-inf, inf, (1,)), "when": spaces.Box(-inf, inf, (2, 1), np.float64)}
            )

    def _observe(self) -> Any:
        if self.as_dict:
            return {"who": np.array([self.name], np.float32), "when": np.array([[self.episode], [self.t]], np.float64)}
        return np.array([self.name, self.episode, self.t], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Any:
        reward = 100.0 * self.episode + self.t
        self.t += 1
        even = self.episode % 2 == 0
        return self._observe(), reward, even and self.t == 3, not even and self.t == 4, {}


def counters(n_envs: int = 1, as_dict: bool = False) -> VecEnv:
    return DummyVecEnv([lambda i=i: Counter(i, as_dict) for i in range(n_envs)])  # type: ignore[misc]


def collected(env: VecEnv, steps: int, size: int = 1000, **kwargs: Any) -> ReplayBuffer:
    """What SAC stores of ``steps`` random steps in each environment, in a buffer of ``size`` rows over all."""
    policy = "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"
    model = SAC(policy, env, buffer_size=size, learning_starts=10**6, seed=0, policy_kwargs={"net_arch": [2]}, **kwargs)
    model.learn(steps * env.num_envs)
    assert model.replay_buffer is not None
    return model.replay_buffer


def rows_of(
    observations: th.Tensor,
    actions: th.Tensor,
    next_observations: th.Tensor,
    rewards: th.Tensor | None = None,
    dones: th.Tensor | None = None,
) -> RealTransitions:
    """Transitions, (n, .), in the first places of a replay buffer; no rewards and no ends unless given."""
    n = len(observations)
    none = th.zeros(n, 1)
    rewards, dones = (none if x is None else x for x in (rewards, dones))
    return RealTransitions(ReplayBufferSamples(observations, actions, next_observations, dones, rewards), th.arange(n))


class LinearSystem:
    """s' = A s + B a + e with e ~ N(0, diag(noise²)), and r = w·s + v a + e_r, its noise last in ``noise``."""

    A = th.tensor([[0.9, 0.3, 0.0], [-0.2, 0.8, 0.1], [0.0, 0.1, 0.95]])
    B = th.tensor([[0.0], [0.5], [-1.0]])
    w = th.tensor([1.0, -2.0, 0.5])
    v = 0.7
    noise = th.tensor([0.05, 0.2, 0.1, 0.15])

    def draw(self, n: int, spread: float = 1.0) -> RealTransitions:
        """``n`` transitions from s ~ N(0, spread²), a ~ U(-1, 1)."""
        s, a = spread * th.randn(n, 3), 2 * th.rand(n, 1) - 1
        e = self.noise * th.randn(n, 4)
        reward = (s @ self.w).unsqueeze(1) + self.v * a + e[:, 3:]
        return rows_of(s, a, s @ self.A.T + a @ self.B.T + e[:, :3], reward)
