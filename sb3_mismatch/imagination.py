"""Imagined trajectories, branched from real states."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.terminations import Outcomes

#: (n, obs_dim) raw flat observations -> (n, action_dim) actions in [-1, 1]
Act = Callable[[th.Tensor], th.Tensor]
#: raw flat rows -> r̃, (n, 1)
Pay = Callable[[ReplayBufferSamples], th.Tensor]


def horizon_at(horizon: int | Sequence[int], timesteps: int) -> int:
    """
    Imagined steps per trajectory after ``timesteps`` environment steps.

    :param horizon: a number, or a schedule ``[first_step, last_step, first_horizon, last_horizon]`` that rises
        linearly and is rounded down (mbpo/algorithms/mbpo.py, ``_set_rollout_length``, there in epochs)
    """
    if isinstance(horizon, int):
        return horizon
    first_step, last_step, first, last = horizon
    steps, span = min(max(timesteps - first_step, 0), last_step - first_step), max(last_step - first_step, 1)
    return int(first + steps * (last - first) // span)


@th.no_grad()
def imagine(act: Act, dynamics: Dynamics, outcomes: Outcomes, starts: th.Tensor, horizon: int) -> ReplayBufferSamples:
    """
    Trajectories of up to ``horizon`` steps from ``starts``, one elite per row and step.

    :param act: the policy, called with raw flat observations, giving actions in [-1, 1]
    :param starts: (n, obs_dim) raw flat observations
    :return: the rows of all trajectories, step by step; ``dones`` marks true ends only, never the horizon
    """
    steps = list(_steps(act, dynamics, outcomes, starts, horizon))
    # Finished rows are dropped, so that no imagined state follows an end: once, for one wait on the device.
    keep = th.cat([alive for _, alive in steps])
    columns = zip(*(rows[:5] for rows, _ in steps), strict=True)
    return ReplayBufferSamples(*(th.cat(column)[keep] for column in columns))


def discounting_horizon(gamma: float, remainder: float = 0.01) -> int:
    """Steps after which γ^t falls below ``remainder``; 1000 without discounting."""
    return math.ceil(math.log(remainder) / math.log(gamma)) if 0 < gamma < 1 else 1000


class BoundEstimate(NamedTuple):
    """A mean over imagined trajectories and its standard error, scalars."""

    mean: th.Tensor
    standard_error: th.Tensor


@th.no_grad()
def lower_bound(
    act: Act, dynamics: Dynamics, outcomes: Outcomes, pay: Pay, starts: th.Tensor, gamma: float, horizon: int
) -> BoundEstimate:
    """
    E_q[Σ_t γ^t r̃_t] by imagined trajectories: the lower bound on the log of the expected return.

    :param pay: r̃ of raw flat rows
    :param starts: (n, obs_dim) raw flat first observations of episodes
    :param horizon: steps after which the sum is cut
    """
    total = th.zeros_like(starts[:, :1])
    for t, (rows, alive) in enumerate(_steps(act, dynamics, outcomes, starts, horizon)):
        total += gamma**t * alive.unsqueeze(1) * pay(rows)
    return BoundEstimate(total.mean(), total.std() / math.sqrt(len(total)))


def _steps(
    act: Act, dynamics: Dynamics, outcomes: Outcomes, starts: th.Tensor, horizon: int
) -> Iterator[tuple[ReplayBufferSamples, th.Tensor]]:
    """Step after step, the rows of all trajectories and which of them, (n,), had not ended before."""
    observations = starts
    alive = th.ones_like(starts[:, 0], dtype=th.bool)
    for _ in range(horizon):
        actions = act(observations)
        next_observations, learned = dynamics.sample(observations, actions)
        rewards = outcomes.rewards(observations, actions, next_observations, learned)
        ends = outcomes.ends(observations, actions, next_observations)
        yield ReplayBufferSamples(observations, actions, next_observations, ends.float(), rewards), alive
        alive = alive & ~ends.squeeze(1)
        observations = next_observations
