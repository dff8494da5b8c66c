"""What comes in from outside is checked before any network sees it."""

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_mismatch.observations import Observations


class Guarded(OffPolicyAlgorithm):
    """Stops at what the environment returns that is not finite, and at callbacks that would train without a world."""

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        trains = self.train
        prepared = super()._setup_learn(*args, **kwargs)
        if self.train != trains:
            raise ValueError(
                "a callback has put its own train() in the place of this class's, so that no world would be learned "
                "(rl_zoo3's ParallelTrainCallback trains the base algorithm): leave it out, or use the base algorithm"
            )
        check_finite("observation", self._last_obs)  # type: ignore[arg-type]
        return prepared

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Observations,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """SB3's; what is not finite stops here, before any network sees it."""
        normalize = self._vec_normalize_env
        check_finite("observation", new_obs if normalize is None else normalize.get_original_obs())
        check_finite("reward", reward if normalize is None else normalize.get_original_reward())
        for info, done in zip(infos, dones, strict=True):
            if done and info.get("terminal_observation") is not None:
                check_finite("terminal_observation", info["terminal_observation"])
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)


def check_finite(name: str, values: Observations) -> None:
    """
    Stop at what no network may see.

    :param name: of the values, for the message
    :param values: (n_envs, ...), or a dict of such
    :raises ValueError: when one of them is NaN or infinite
    """
    for key, part in values.items() if isinstance(values, dict) else [("", values)]:
        if not np.isfinite(part).all():
            place = tuple(np.argwhere(~np.isfinite(part))[0])
            raise ValueError(
                f"the environment returned {name}{key and f'[{key!r}]'} = {part[place]} at index {[*map(int, place)]}: "
                "it must be finite; wrap the environment in stable_baselines3.common.vec_env.VecCheckNan to see why"
            )
