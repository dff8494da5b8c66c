"""
The learned world as an environment: n episodes side by side, on the device.

:class:`ImaginedEpisodes` is the world's side of it and knows no agent; :class:`WorldVecEnv`, :class:`WorldVectorEnv`
and :class:`WorldEnv` show it in the forms of Stable-Baselines3 and Gymnasium.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_mismatch.observations import Observations
from sb3_mismatch.randomness import RandomStreams
from sb3_mismatch.settings import check_count, check_number
from sb3_mismatch.world import World


class Step(NamedTuple):
    """
    What one step of n episodes brought, NumPy in the environment's units.

    :param observations: (n, obs_dim) flat: the states reached, ends among them
    :param rewards: (n,)
    :param terminated: (n,) bool, true ends
    :param truncated: (n,) bool, cut by the time limit and no true end
    :param infos: for each episode ``disagreement`` of the members, in standardised units, and the classifier's
        ``log_ratio``, in nats
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    infos: list[dict[str, Any]]


class ImaginedEpisodes:
    """
    n episodes side by side in a learned world, which is copied as it stands.

    States stay within the bounds of the observation space; actions are clipped to those of the action space.

    :param world: a fitted world
    :param observation_space: the real environment's
    :param action_space: the real environment's
    :param starts: (m, obs_dim) raw flat states, from which each episode draws its first
    :param n_envs: episodes side by side
    :param max_episode_steps: time limit
    :param max_disagreement: an episode ends, as a true end, with a step about which the members disagree by more, in
        standardised units: who learns here is kept to what the world knows (Kidambi et al., "MOReL", 2020); ``None``:
        never
    :param seed: of the draws; ``None`` derives one from torch's global generator without advancing it
    :param judges: whether the classifier has been fitted; without it ``log_ratio`` is zero
    :raises ValueError: when there is no start, or a count is below 1
    """

    def __init__(
        self,
        world: World,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        starts: th.Tensor,
        n_envs: int = 1,
        max_episode_steps: int = 1000,
        max_disagreement: float | None = None,
        seed: int | None = None,
        judges: bool = True,
    ) -> None:
        check_count("n_envs", n_envs)
        check_count("max_episode_steps", max_episode_steps)
        if max_disagreement is not None:
            check_number("max_disagreement", max_disagreement, 0, np.inf, "None, or ")
        if len(starts) == 0:
            raise ValueError("starts holds no state to start from: pass at least one")
        self.observation_space, self.action_space = observation_space, action_space
        self.n_envs, self.max_episode_steps, self.max_disagreement = n_envs, max_episode_steps, max_disagreement
        # In one go: the outcomes ask the same dynamics.
        self._dynamics, self._outcomes, self._classifier = deepcopy((world.dynamics, world.outcomes, world.classifier))
        self._judges = judges
        self._flat = world.observations
        self._starts = starts.clone()
        device = starts.device
        parts = dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {}
        self._parts: dict[str, Any] = parts or {"observation": observation_space}
        self._low, self._high = (
            th.as_tensor(self._flat.spread({key: getattr(part, side) for key, part in self._parts.items()}, 0.0)).to(
                device
            )
            for side in ("low", "high")
        )
        self.seed(seed)
        self.reset()

    def seed(self, seed: int | None) -> None:
        """Begin the world's random streams anew."""
        self._streams = RandomStreams(self._starts.device, seed)

    def reset(self) -> np.ndarray:
        """Start all episodes: (n, obs_dim) flat."""
        self._states = self._starts[:1].expand(self.n_envs, -1)
        self._steps = np.zeros(self.n_envs, dtype=np.int64)
        return self.restart(np.ones(self.n_envs, dtype=bool))

    def restart(self, over: np.ndarray) -> np.ndarray:
        """Start those episodes anew that are ``over``, bool (n,): all states, (n, obs_dim) flat."""
        with self._streams.active():
            index = th.randint(len(self._starts), (self.n_envs,), device=self._starts.device)
        chosen = th.as_tensor(over, device=self._starts.device).unsqueeze(1)
        self._states = th.where(chosen, self._starts[index], self._states)
        self._steps[over] = 0
        return self._states.cpu().numpy()

    @th.no_grad()
    def step(self, actions: np.ndarray) -> Step:
        """
        One step of each episode; those that are over wait for :meth:`restart`.

        :param actions: (n, action_dim...) in the environment's units
        :raises ValueError: when one of them is not finite
        """
        states, scaled = self._states, self._scaled(actions)
        with self._streams.active():
            drawn, learned = self._dynamics.sample(states, scaled)
            next_states = th.clamp(drawn, self._low, self._high)
            ends = self._outcomes.ends(states, scaled, next_states)
            rewards = self._outcomes.rewards(states, scaled, next_states, learned, ends.float())
        log_ratio = self._classifier.log_ratio(states, scaled, next_states) if self._judges else 0 * rewards
        disagreement = self._dynamics.disagreement(states, scaled)
        if self.max_disagreement is not None:
            ends = ends | (disagreement > self.max_disagreement)
        self._states = next_states
        self._steps += 1
        # All in one block, so that the device is waited for once.
        told = th.cat([rewards, ends.float(), disagreement, log_ratio, next_states], dim=1).cpu().numpy()
        terminated = told[:, 1] > 0
        infos = [{"disagreement": float(row[2]), "log_ratio": float(row[3])} for row in told]
        truncated = (self._steps >= self.max_episode_steps) & ~terminated
        return Step(told[:, 4:], told[:, 0].copy(), terminated, truncated, infos)

    def shown(self, flat: np.ndarray) -> Observations:
        """(n, obs_dim) flat -> n observations of the space, in new arrays."""
        tensors = self._flat.unflatten(th.as_tensor(flat))
        arrays = {key: _within(part.numpy(), self._parts[key]) for key, part in _by_name(tensors).items()}
        return arrays if self._flat.is_dict else arrays["observation"]

    def _scaled(self, actions: np.ndarray) -> th.Tensor:
        """The environment's actions -> (n, action_dim) in [-1, 1]."""
        low, high = self.action_space.low, self.action_space.high
        given = np.asarray(actions, dtype=np.float32).reshape(self.n_envs, *self.action_space.shape)
        if not np.isfinite(given).all():
            raise ValueError("actions holds NaN or infinity: every action must be finite")
        scaled = 2.0 * (given.clip(low, high) - low) / (high - low) - 1.0
        return th.as_tensor(scaled.reshape(self.n_envs, -1), dtype=th.float32, device=self._starts.device)


class WorldVecEnv(VecEnv):
    """
    Imagined episodes as a vectorised environment of Stable-Baselines3.

    As there, an episode that is over starts anew within the step, and ``info`` holds its ``terminal_observation``.
    The episodes are one object: the seed of the first counts for all, and attributes are shared.
    """

    render_mode = None

    def __init__(self, episodes: ImaginedEpisodes) -> None:
        self.episodes = episodes
        super().__init__(episodes.n_envs, episodes.observation_space, episodes.action_space)
        self._actions = np.zeros((self.num_envs, *episodes.action_space.shape), np.float32)

    def reset(self) -> VecEnvObs:
        """Start all episodes; a seed that was set counts from here."""
        if self._seeds[0] is not None:
            self.episodes.seed(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return self.episodes.shown(self.episodes.reset())

    def step_async(self, actions: np.ndarray) -> None:
        """Take the actions, (n_envs, ...)."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Observations, rewards, dones and infos of the step."""
        step = self.episodes.step(self._actions)
        over = step.terminated | step.truncated
        for info, truncated in zip(step.infos, step.truncated, strict=True):
            info["TimeLimit.truncated"] = bool(truncated)
        observations = step.observations
        if over.any():
            reached = self.episodes.shown(step.observations)
            for i in over.nonzero()[0]:
                step.infos[i]["terminal_observation"] = _row(reached, i)
            observations = self.episodes.restart(over)
        return self.episodes.shown(observations), step.rewards, over, step.infos

    def close(self) -> None:
        """There is nothing to close."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute, once for each index."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set the attribute for all."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Call the method once; its answer, once for each index."""
        answer = getattr(self, method_name)(*method_args, **kwargs)
        return [answer for _ in self._get_indices(indices)]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """No episode is wrapped."""
        return [False for _ in self._get_indices(indices)]


class WorldVectorEnv(VectorEnv[Any, Any, Any]):
    """
    Imagined episodes as a vector environment of Gymnasium, which starts episodes anew within the step
    (``AutoresetMode.SAME_STEP``): ``info`` then holds ``final_obs`` and ``final_info``.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, episodes: ImaginedEpisodes) -> None:
        self.episodes, self.num_envs = episodes, episodes.n_envs
        self.single_observation_space, self.single_action_space = episodes.observation_space, episodes.action_space
        self.observation_space = batch_space(episodes.observation_space, self.num_envs)
        self.action_space = batch_space(episodes.action_space, self.num_envs)

    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None) -> Any:
        """Start all episodes: observations and an empty info. One seed, or several taken together, seeds them all."""
        if seed is not None:
            self.episodes.seed(
                seed if isinstance(seed, int) else int(np.random.SeedSequence(seed).generate_state(1)[0])
            )
        return self.episodes.shown(self.episodes.reset()), {}

    def step(self, actions: np.ndarray) -> Any:
        """Observations, rewards, terminated, truncated and infos of the step."""
        step = self.episodes.step(actions)
        over = step.terminated | step.truncated
        reached = self.episodes.shown(step.observations)
        infos: dict[str, Any] = {}
        for i, info in enumerate(step.infos):
            told = {"final_obs": _row(reached, i), "final_info": info} if over[i] else info
            infos = self._add_info(infos, told, i)
        observations = self.episodes.shown(self.episodes.restart(over)) if over.any() else reached
        return observations, step.rewards.astype(np.float64), step.terminated, step.truncated, infos


class WorldEnv(gym.Env[Any, np.ndarray]):
    """An imagined episode as a plain environment of Gymnasium; ``gymnasium.make(env.spec)`` makes a copy of it."""

    def __init__(self, episodes: ImaginedEpisodes) -> None:
        if episodes.n_envs != 1:
            raise ValueError(f"n_envs={episodes.n_envs} episodes do not fit a single environment: use n_envs=1")
        self.episodes = episodes
        self.observation_space, self.action_space = episodes.observation_space, episodes.action_space
        self.spec = EnvSpec("LearnedWorld-v0", entry_point=type(self), kwargs={"episodes": episodes})  # type: ignore[arg-type]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start the episode: its first observation and an empty info."""
        super().reset(seed=seed)
        if seed is not None:
            self.episodes.seed(seed)
        return _row(self.episodes.shown(self.episodes.reset()), 0), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated and info of the step."""
        step = self.episodes.step(action)
        observation = _row(self.episodes.shown(step.observations), 0)
        return observation, float(step.rewards[0]), bool(step.terminated[0]), bool(step.truncated[0]), step.infos[0]


#: the forms of a learned world by name
FORMS = {"sb3": WorldVecEnv, "gymnasium": WorldVectorEnv, "single": WorldEnv}


def _by_name(parts: Any) -> dict[str, Any]:
    """A dict as it is, all else as the part ``observation``."""
    return parts if isinstance(parts, dict) else {"observation": parts}


def _row(observations: Observations, i: int) -> Any:
    """Observation ``i`` of several, in arrays of its own."""
    if isinstance(observations, dict):
        return {key: part[i].copy() for key, part in observations.items()}
    return observations[i].copy()


def _within(values: np.ndarray, space: spaces.Box) -> np.ndarray:
    """float32 values in the dtype of ``space`` and within its bounds, which float32 may miss by a rounding."""
    dtype = space.dtype
    if np.issubdtype(dtype, np.integer):
        values = np.rint(values)
    return np.clip(values.astype(dtype), space.low, space.high)
