"""Imagined trajectories, branched from real states."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.terminations import Outcomes

#: (n, obs_dim) raw flat observations -> (n, action_dim) actions in [-1, 1]
Act = Callable[[th.Tensor], th.Tensor]
#: (rewards, observations, actions, next_observations) -> r̃, (n, 1)
Pay = Callable[[th.Tensor, th.Tensor, th.Tensor, th.Tensor], th.Tensor]


def horizon_at(horizon: int | Sequence[int], timesteps: int) -> int:
    """
    Imagined steps per trajectory after ``timesteps`` environment steps.

    :param horizon: a number, or a schedule ``[first_step, last_step, first_horizon, last_horizon]`` that rises
        linearly and is rounded down (mbpo/algorithms/mbpo.py, ``_set_rollout_length``, there in epochs)
    """
    if isinstance(horizon, int):
        return horizon
    first_step, last_step, first, last = horizon
    progress = min(max((timesteps - first_step) / max(last_step - first_step, 1), 0.0), 1.0)
    return int(first + progress * (last - first))


@th.no_grad()
def imagine(act: Act, dynamics: Dynamics, outcomes: Outcomes, starts: th.Tensor, horizon: int) -> ReplayBufferSamples:
    """
    Trajectories of up to ``horizon`` steps from ``starts``, one elite per row and step.

    :param act: the policy, called with raw flat observations, giving actions in [-1, 1]
    :param starts: (n, obs_dim) raw flat observations
    :return: the rows of all trajectories, step by step; ``dones`` marks true ends only, never the horizon
    """
    observations = starts
    alive = th.ones_like(starts[:, 0], dtype=th.bool)
    steps: list[tuple[th.Tensor, ...]] = []
    kept: list[th.Tensor] = []
    for _ in range(horizon):
        actions = act(observations)
        next_observations, learned = dynamics.sample(observations, actions)
        rewards = outcomes.rewards(observations, actions, next_observations, learned)
        ends = outcomes.ends(observations, actions, next_observations)
        steps.append((observations, actions, next_observations, ends.float(), rewards))
        kept.append(alive)
        alive = alive & ~ends.squeeze(1)
        observations = next_observations
    # Finished rows are dropped, so that no imagined state follows an end: once, for one wait on the device.
    keep = th.cat(kept)
    return ReplayBufferSamples(*(th.cat(column)[keep] for column in zip(*steps, strict=True)))


class BoundEstimate(NamedTuple):
    """A mean over imagined trajectories and its standard error, scalars."""

    mean: th.Tensor
    standard_error: th.Tensor


@th.no_grad()
def lower_bound(
    act: Act, dynamics: Dynamics, outcomes: Outcomes, pay: Pay, starts: th.Tensor, gamma: float, horizon: int | None = None
) -> BoundEstimate:
    """
    E_q[Σ_t γ^t r̃_t] by imagined trajectories from ``starts``: the lower bound on the log of the expected return.

    :param pay: r̃ of a transition
    :param starts: (n, obs_dim) raw flat first observations of episodes
    :param horizon: steps after which the sum is cut; default: where γ^t falls below a hundredth
    """
    if horizon is None:
        horizon = math.ceil(math.log(0.01) / math.log(gamma)) if 0 < gamma < 1 else 1000
    observations = starts
    alive = th.ones_like(starts[:, :1])
    total = th.zeros_like(alive)
    for t in range(horizon):
        actions = act(observations)
        next_observations, learned = dynamics.sample(observations, actions)
        rewards = outcomes.rewards(observations, actions, next_observations, learned)
        total += gamma**t * alive * pay(rewards, observations, actions, next_observations)
        alive = alive * ~outcomes.ends(observations, actions, next_observations)
        observations = next_observations
    return BoundEstimate(total.mean(), total.std() / math.sqrt(len(total)))
