"""Observations as flat rows: what the learned world sees of Box and Dict spaces, and of VecNormalize."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize

Observations = np.ndarray | dict[str, np.ndarray]
TensorObservations = th.Tensor | TensorDict


class FlatObservations:
    """
    The flat form of an observation space: ``(n, *shape)`` or a dict of such  <->  ``(n, dim)`` float32.

    :param space: a Box of any shape (no image), or a Dict of such Boxes
    :raises ValueError: for any other space
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.is_dict = isinstance(space, spaces.Dict)
        parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for key, part in parts.items():
            where = f"observation_space[{key!r}]" if self.is_dict else "observation_space"
            if is_image_space(part):
                raise ValueError(
                    f"{where} = {part} is an image, whose dynamics are not learned here: "
                    "use stable_baselines3.SAC, or an environment with vector observations"
                )
            if not isinstance(part, spaces.Box):
                raise ValueError(
                    f"{where} = {part} is no Box: wrap the environment in gymnasium.wrappers.FlattenObservation, "
                    "which turns it into a vector"
                )
            self.shapes[key] = part.shape
        self.sizes = {key: int(np.prod(shape)) for key, shape in self.shapes.items()}
        self.dim = sum(self.sizes.values())

    def flatten(self, observations: Observations, n: int) -> np.ndarray:
        """``n`` observations of any leading shape -> (n, dim) float32."""
        parts = [observations[key] for key in self.shapes] if isinstance(observations, dict) else [observations]
        return np.concatenate([np.asarray(part, dtype=np.float32).reshape(n, -1) for part in parts], axis=1)

    def unflatten(self, flat: th.Tensor) -> TensorObservations:
        """(n, dim) -> (n, *shape), or a dict of such."""
        parts = {
            key: part.reshape(-1, *self.shapes[key])
            for key, part in zip(self.shapes, flat.split(list(self.sizes.values()), dim=1), strict=True)
        }
        return parts if self.is_dict else parts["observation"]

    def spread(self, values: dict[str, np.ndarray], default: float) -> np.ndarray:
        """One value per flat dimension, from values per key; ``default`` where a key has none."""
        return np.concatenate(
            [
                np.ravel(values[key]).astype(np.float32) if key in values else np.full(size, default, np.float32)
                for key, size in self.sizes.items()
            ]
        )


@dataclass(frozen=True)
class Normalization:
    """
    Today's statistics of VecNormalize as tensors, so that imagined rows are normalised on the device as
    ``VecNormalize.normalize_obs`` and ``normalize_reward`` normalise real ones.

    :param mean, std, clip: (dim,) of the flat observation
    :param reward_std, clip_reward: of the reward
    """

    mean: th.Tensor
    std: th.Tensor
    clip: th.Tensor
    reward_std: float
    clip_reward: float

    @classmethod
    def of(cls, env: VecNormalize, observations: FlatObservations, device: th.device) -> "Normalization":
        """The statistics of ``env`` as they stand now."""
        means: dict[str, np.ndarray] = {}
        variances: dict[str, np.ndarray] = {}
        if env.norm_obs:
            statistics = env.obs_rms if isinstance(env.obs_rms, dict) else {"observation": env.obs_rms}
            means = {key: rms.mean for key, rms in statistics.items()}
            variances = {key: rms.var + env.epsilon for key, rms in statistics.items()}
        clips = {key: np.full_like(mean, env.clip_obs) for key, mean in means.items()}

        def tensor(values: dict[str, np.ndarray], default: float) -> th.Tensor:
            return th.as_tensor(observations.spread(values, default), device=device)

        return cls(
            mean=tensor(means, 0.0),
            std=tensor(variances, 1.0).sqrt(),
            clip=tensor(clips, np.inf),
            reward_std=float(np.sqrt(env.ret_rms.var + env.epsilon)) if env.norm_reward else 1.0,
            clip_reward=env.clip_reward if env.norm_reward else np.inf,
        )

    def observation(self, flat: th.Tensor) -> th.Tensor:
        """(n, dim) raw -> (n, dim) normalised."""
        return ((flat - self.mean) / self.std).clamp(-self.clip, self.clip)

    def reward(self, reward: th.Tensor) -> th.Tensor:
        """(n, 1) raw -> (n, 1) normalised."""
        return (reward / self.reward_std).clamp(-self.clip_reward, self.clip_reward)
