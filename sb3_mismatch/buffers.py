"""Real transitions as the learned world sees them, imagined ones, and minibatches of both."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mismatch.imagination import ImaginedRows
from sb3_mismatch.minibatches import STEPS_AHEAD, minibatches
from sb3_mismatch.objectives import Payment
from sb3_mismatch.observations import FlatObservations, Normalization
from sb3_mismatch.randomness import RandomStreams
from sb3_mismatch.rewards import rare

#: So large a share of the states to imagine from are some in which rewards stood out, where there are few of these.
PAID_STARTS = 0.25


@dataclass(frozen=True)
class RealTransitions:
    """
    Real one-step transitions in raw units: a batch of flat rows on the device.

    :param batch: ``dones`` are true ends; a time limit is none
    :param position: (n,) each row's place in the replay buffer, the same at every reading
    """

    batch: ReplayBufferSamples
    position: th.Tensor

    def __len__(self) -> int:
        return len(self.position)


def real_transitions(
    buffer: ReplayBuffer, observations: FlatObservations, device: th.device, normalize: VecNormalize | None = None
) -> RealTransitions:
    """
    All rows of a replay buffer whose stored next observation is the true one, over all its environments, oldest first.

    Left out are ends under ``optimize_memory_usage`` (the next observation there is the next episode's first) and,
    with VecNormalize, rows whose last observation stands at its clip (SB3 stores it clipped).

    :raises ValueError: when an observation, action or reward is not finite
    """
    n_envs = buffer.n_envs
    rows = _by_age(buffer)
    compact = buffer.optimize_memory_usage
    if compact and buffer.full:
        # The row to be written next holds the newest row's successor and nothing else.
        rows = rows[rows != buffer.pos]
    next_rows = (rows + 1) % buffer.buffer_size

    def flat(array: Any, index: np.ndarray) -> np.ndarray:
        chosen = {key: part[index] for key, part in array.items()} if isinstance(array, dict) else array[index]
        return observations.flatten(chosen, len(index) * n_envs)

    def column(array: np.ndarray) -> np.ndarray:
        return array[rows].astype(np.float32, copy=False).reshape(len(rows) * n_envs, -1)

    obs = flat(buffer.observations, rows)
    next_obs = flat(buffer.observations, next_rows) if compact else flat(buffer.next_observations, rows)
    actions, rewards, dones, timeouts = map(column, (buffer.actions, buffer.rewards, buffer.dones, buffer.timeouts))
    for name, values in (
        ("observations", obs),
        ("next observations", next_obs),
        ("actions", actions),
        ("rewards", rewards),
    ):
        if not np.isfinite(values).all():
            row, dim = np.argwhere(~np.isfinite(values))[0]
            raise ValueError(
                f"the replay buffer's {name} hold {values[row, dim]} "
                f"(row {rows[row // n_envs]}, environment {row % n_envs}, "
                f"dimension {dim}): remove such rows, or wrap the environment in VecCheckNan to find their source"
            )
    keep = np.ones(len(rows) * n_envs, dtype=bool)
    if compact:
        keep &= dones[:, 0] == 0
    if normalize is not None and normalize.norm_obs:
        scale = Normalization.of(normalize, observations, th.device("cpu"))
        clipped = scale.observation(th.from_numpy(next_obs)).abs() >= 0.999 * scale.clip
        keep &= ~(clipped.any(dim=1).numpy() & (dones[:, 0] > 0))
    position = (rows[:, None] * n_envs + np.arange(n_envs)).reshape(-1)
    ends = dones * (1 - timeouts)
    tensors = [th.as_tensor(x[keep], device=device) for x in (obs, actions, next_obs, ends, rewards)]
    return RealTransitions(ReplayBufferSamples(*tensors), th.as_tensor(position[keep], device=device))


def has_terminated(buffer: ReplayBuffer) -> bool:
    """Whether an episode of a replay buffer has ended before its time limit."""
    rows = slice(buffer.size())
    return bool((buffer.dones[rows] > buffer.timeouts[rows]).any())


def _by_age(buffer: ReplayBuffer) -> NDArray[np.int64]:
    """Rows of a replay buffer, oldest first."""
    return (np.arange(buffer.size()) + (buffer.pos if buffer.full else 0)) % buffer.buffer_size


def start_states(buffer: ReplayBuffer, observations: FlatObservations, n: int, device: th.device) -> th.Tensor:
    """
    ``n`` observations of a replay buffer to imagine from, drawn with replacement: raw flat rows on the device.

    Where few rewards stand out, a quarter is drawn among the states in which they were earned and life went on.
    """
    rows, envs = np.random.randint(buffer.size(), size=n), np.random.randint(buffer.n_envs, size=n)
    rewards, dones = buffer.rewards[: buffer.size()], buffer.dones[: buffer.size()]
    paid = np.argwhere(rare(th.as_tensor(rewards)).numpy() & (dones == 0))
    if len(paid) > 0:
        n_paid = round(PAID_STARTS * n)
        rows[:n_paid], envs[:n_paid] = paid[np.random.randint(len(paid), size=n_paid)].T
    stored = buffer.observations
    chosen = {k: part[rows, envs] for k, part in stored.items()} if isinstance(stored, dict) else stored[rows, envs]
    return th.as_tensor(observations.flatten(chosen, n), device=device)


class ImaginedBuffer:
    """What was imagined last, on the device: as long as it is here, today's classifier is the one that judged it."""

    def __init__(self) -> None:
        self._rows: ImaginedRows | None = None

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows.rewards)

    @property
    def rows(self) -> ImaginedRows | None:
        """All of them; ``None`` before the first."""
        return self._rows

    def replace(self, rows: ImaginedRows) -> None:
        """Take these rows in place of those before."""
        self._rows = rows

    def renew(self, rows: ImaginedRows) -> None:
        """Take these rows in place of as many of the oldest."""
        assert self._rows is not None
        n = len(rows.rewards)
        self._rows = ImaginedRows(*(th.cat([old[n:], new]) for old, new in zip(self._rows, rows, strict=True)))

    def sample(self, n: int) -> ImaginedRows:
        """``n`` rows drawn uniformly with replacement."""
        assert self._rows is not None
        index = self._drawn(n)
        return ImaginedRows(*(column[index] for column in self._rows))

    def sample_states(self, n: int) -> th.Tensor:
        """The observations of such rows, (n, obs_dim)."""
        assert self._rows is not None
        return self._rows.observations[self._drawn(n)]

    def _drawn(self, n: int) -> th.Tensor:
        assert self._rows is not None
        return th.randint(len(self), (n,), device=self._rows.rewards.device)


class MixedReplayBuffer(ReplayBuffer):
    """
    Serves minibatches of real and imagined rows in place of the real replay buffer, while an agent trains.

    Each minibatch holds ``round(real_ratio * batch_size)`` real rows, drawn by the real buffer itself, and then
    imagined ones. Minibatches are made many gradient steps at a time; with real rows alone, the real buffer serves
    them directly and nothing differs from SB3.

    :param real: the agent's replay buffer
    :param imagined: imagined rows
    :param real_ratio: share of real rows
    :param gradient_steps: minibatches that will be asked for
    :param payment: what real and imagined rows earn
    :param streams: the world's random streams, from which imagined rows are drawn
    :param observations: the observation space's flat form
    """

    def __init__(
        self,
        real: ReplayBuffer,
        imagined: ImaginedBuffer,
        real_ratio: float,
        gradient_steps: int,
        payment: Payment,
        streams: RandomStreams,
        observations: FlatObservations,
    ) -> None:
        # No super().__init__(): this buffer stores nothing of its own.
        self.real, self.imagined, self.real_ratio = real, imagined, real_ratio
        self.payment, self.streams, self.flat = payment, streams, observations
        self._to_come = gradient_steps
        self._ready: Iterator[ReplayBufferSamples] = iter(())

    def size(self) -> int:
        """Rows of the real buffer."""
        return self.real.size()

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Store a real transition in the real buffer."""
        self.real.add(*args, **kwargs)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """The next minibatch, normalised by ``env``."""
        batch = next(self._ready, None)
        if batch is None:
            n_steps = max(min(self._to_come, STEPS_AHEAD), 1)
            self._to_come -= n_steps
            n_real = round(self.real_ratio * batch_size)
            if n_real == batch_size or len(self.imagined) == 0:
                self._ready = map(self._paid, minibatches(self.real, n_steps, batch_size, env))
            else:
                self._ready = iter(self._mix(n_steps, n_real, batch_size - n_real, env))
            batch = next(self._ready)
        return batch

    def _paid(self, batch: ReplayBufferSamples) -> ReplayBufferSamples:
        return batch._replace(rewards=self.payment.real(batch.rewards))

    def _imagined(self, n: int, env: VecNormalize | None) -> ReplayBufferSamples:
        with self.streams.active():
            raw = self.imagined.sample(n)
        observations, next_observations, rewards = raw.observations, raw.next_observations, raw.rewards
        if env is not None:
            scale = Normalization.of(env, self.flat, raw.rewards.device)
            observations, next_observations = scale.observation(observations), scale.observation(next_observations)
            rewards = scale.reward(rewards)
        gamma, n_steps = self.payment.gamma, rewards.shape[1]
        paid = raw.alive * self.payment.imagined(rewards, raw.log_ratio, raw.alive, raw.novelty)
        returns = (gamma ** th.arange(n_steps, device=paid.device) * paid).sum(dim=1, keepdim=True)
        discounts = th.full_like(returns, gamma**n_steps)
        return ReplayBufferSamples(observations, raw.actions, next_observations, raw.dones, returns, discounts)

    def _mix(self, n_steps: int, n_real: int, n_imagined: int, env: VecNormalize | None) -> list[ReplayBufferSamples]:
        """``n_steps`` minibatches, each of ``n_real`` and ``n_imagined`` rows."""
        imagined = self._imagined(n_steps * n_imagined, env)
        columns = {name: getattr(imagined, name) for name in ("actions", "dones", "rewards", "discounts")}
        columns["observations"] = self.flat.unflatten(imagined.observations)
        columns["next_observations"] = self.flat.unflatten(imagined.next_observations)
        kind: type[Any] = DictReplayBufferSamples if self.flat.is_dict else ReplayBufferSamples
        if n_real > 0:
            real = self._paid(self.real.sample(n_steps * n_real, env=env))
            if real.discounts is None:
                real = real._replace(discounts=th.full_like(real.rewards, self.payment.gamma))
            columns = {name: _interleave(getattr(real, name), column, n_steps) for name, column in columns.items()}
        steps = {name: _split(column, n_steps) for name, column in columns.items()}
        return [kind(**{name: column[i] for name, column in steps.items()}) for i in range(n_steps)]


def _interleave(real: Any, imagined: Any, n_steps: int) -> Any:
    """(n_steps * a, ...), (n_steps * b, ...) -> (n_steps * (a + b), ...), step by step; dicts part by part."""
    if isinstance(real, dict):
        return {key: _interleave(part, imagined[key], n_steps) for key, part in real.items()}
    steps = [x.reshape(n_steps, -1, *x.shape[1:]) for x in (real.to(imagined.dtype), imagined)]
    return th.cat(steps, dim=1).flatten(0, 1)


def _split(column: Any, n_steps: int) -> Any:
    """(n_steps * n, ...) -> n_steps views of (n, ...); dicts part by part."""
    if isinstance(column, dict):
        parts = {key: _split(part, n_steps) for key, part in column.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(n_steps)]
    return column.chunk(n_steps)


class Episodes(NamedTuple):
    """
    Whole episodes of a replay buffer.

    :param first_observations: (n, obs_dim) raw flat
    :param rewards: (n, longest) raw, zero behind the end
    :param steps: (n,) how many
    """

    first_observations: np.ndarray
    rewards: np.ndarray
    steps: np.ndarray


def latest_episodes(buffer: ReplayBuffer, observations: FlatObservations, most: int) -> Episodes:
    """Up to ``most`` of the latest whole episodes of each environment, ended or cut by a time limit."""
    order = _by_age(buffer)
    firsts: list[np.ndarray] = []
    rewards: list[np.ndarray] = []
    for env in range(buffer.n_envs):
        ends = np.flatnonzero(buffer.dones[order, env]) + 1
        # The oldest episode of a full buffer may have lost its beginning.
        whole = list(pairwise([0, *ends]))[int(buffer.full) :]
        for start, end in whole[-most:]:
            rewards.append(buffer.rewards[order[start:end], env])
            stored, at = buffer.observations, order[start]
            first = {k: part[at, env] for k, part in stored.items()} if isinstance(stored, dict) else stored[at, env]
            firsts.append(observations.flatten(first, 1))
    steps = np.array([len(episode) for episode in rewards], dtype=np.int64)
    padded = np.zeros((len(rewards), steps.max(initial=0)), dtype=np.float32)
    for row, episode in zip(padded, rewards, strict=True):
        row[: len(episode)] = episode
    return Episodes(np.concatenate([np.empty((0, observations.dim), np.float32), *firsts]), padded, steps)
