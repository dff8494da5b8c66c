"""The real transitions that a model's pictures are held against."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mismatch.buffers import RealTransitions
from sb3_mismatch.fitting import split_holdout
from sb3_mismatch.observations import FlatObservations, Observations

if TYPE_CHECKING:
    from sb3_mismatch.mnm import ModelBased


def real_data(model: "ModelBased", who: str) -> RealTransitions:
    """
    All that the replay buffer of a model holds.

    :param who: asks, for the message
    :raises TypeError: for a model without a learned world
    :raises ValueError: when no world has been fitted, or the replay buffer is empty
    """
    if not hasattr(model, "world"):
        raise TypeError(f"{who} was given {type(model).__name__}, which learns no world: pass an MnM, VMBPO or MBPO")
    model._check_fitted(who)
    if model.replay_buffer is None or model.replay_buffer.size() == 0:
        raise ValueError(
            f"{who} compares with real transitions and model.replay_buffer is empty (a zip holds none): call "
            "model.load_replay_buffer(path), or learn() for a while"
        )
    return model._real_transitions()


def held_out(model: "ModelBased", data: RealTransitions) -> ReplayBufferSamples:
    """The rows that the world was not trained on, (n, .)."""
    index = split_holdout(data, model.world.fit_settings)[1]
    return ReplayBufferSamples(*(column[index] for column in data.batch[:5]))


class Stretches(NamedTuple):
    """
    Real steps that follow each other without an end or a reset between them, step first.

    :param observations: (steps + 1, n, obs_dim) raw flat
    :param actions: (steps, n, action_dim) in [-1, 1]
    """

    observations: th.Tensor
    actions: th.Tensor


def stretches(buffer: ReplayBuffer, data: RealTransitions, steps: int, most: int | None = None) -> Stretches:
    """
    Stretches of ``steps`` real steps, spread evenly over the replay buffer in the order they were played.

    :param data: of the buffer
    :param steps: or as many as the longest stretch has
    :param most: how many of them at most; ``None``: all, overlapping
    """
    order, left = _runs(buffer, data)
    steps = min(steps, int(left.max()))
    first = np.flatnonzero(left >= steps)
    if most is not None and len(first) > most:
        first = first[np.linspace(0, len(first) - 1, most).round().astype(int)]
    index = th.as_tensor(order[first + np.arange(steps)[:, None]], device=data.position.device)
    last = data.batch.next_observations[index[-1:]]
    return Stretches(th.cat([data.batch.observations[index], last]), data.batch.actions[index])


def _runs(buffer: ReplayBuffer, data: RealTransitions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """
    The rows of ``data`` environment by environment and from the oldest to the newest, and how many follow each other
    from each on, itself among them.
    """
    row, env = np.divmod(data.position.cpu().numpy(), buffer.n_envs)
    age = (row - buffer.pos) % buffer.buffer_size if buffer.full else row
    order = np.lexsort((age, env))
    row, env, age = row[order], env[order], age[order]
    goes_on = np.zeros(len(order), dtype=bool)
    goes_on[:-1] = (env[1:] == env[:-1]) & (age[1:] == age[:-1] + 1) & (buffer.dones[row, env][:-1] == 0)
    stops = np.flatnonzero(~goes_on)
    here = np.arange(len(order))
    return order, stops[np.searchsorted(stops, here)] - here + 1


def unflattened(observations: FlatObservations, flat: th.Tensor) -> Observations:
    """Raw flat rows (n, dim) in the environment's own form."""
    own = observations.unflatten(flat)
    if isinstance(own, dict):
        return {key: part.cpu().numpy() for key, part in own.items()}
    return own.cpu().numpy()


def names(observations: FlatObservations) -> list[str]:
    """What the dimensions of the flat observation are called: s[0], s[1], ..., or by their key in a Dict."""
    return [
        f"{key if observations.is_dict else 's'}[{', '.join(map(str, place))}]"
        for key, shape in observations.shapes.items()
        for place in np.ndindex(shape)
    ]
