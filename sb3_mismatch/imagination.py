"""Imagined trajectories, branched from real states."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mismatch.dynamics import Dynamics, Gaussian
from sb3_mismatch.terminations import Outcomes

#: (n, obs_dim) raw flat observations -> (n, action_dim) actions in [-1, 1]
Act = Callable[[th.Tensor], th.Tensor]


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


class Trajectories(NamedTuple):
    """
    Imagined trajectories side by side, step first: raw flat rows of shape (horizon, n, .).

    :param dones: one where the episode ends at s'; the horizon is no end
    :param alive: one where no end came before the step, (horizon, n, 1); other rows count for nothing
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    alive: th.Tensor

    def rows(self) -> ReplayBufferSamples:
        """All steps in one batch, without those behind an end."""
        keep = self.alive.flatten() > 0
        return ReplayBufferSamples(*(column.flatten(0, 1)[keep] for column in self[:5]))


@th.no_grad()
def imagine(act: Act, dynamics: Dynamics, outcomes: Outcomes, starts: th.Tensor, horizon: int) -> Trajectories:
    """
    Trajectories of ``horizon`` steps from ``starts``, one elite per row and step.

    :param act: the policy, called with raw flat observations, giving actions in [-1, 1]
    :param starts: (n, obs_dim) raw flat observations
    """
    observations, alive = starts, th.ones_like(starts[:, :1])
    steps: list[tuple[th.Tensor, ...]] = []
    for _ in range(horizon):
        actions = act(observations)
        next_observations, learned = dynamics.sample(observations, actions)
        ends = outcomes.ends(observations, actions, next_observations).float()
        rewards = outcomes.rewards(observations, actions, next_observations, learned, ends)
        steps.append((observations, actions, next_observations, ends, rewards, alive))
        # A row whose episode has ended stays before its end: no step waits for the device, and neither the networks nor
        # the user's functions are asked about states in which nobody lives.
        observations, alive = th.where(ends > 0, observations, next_observations), alive * (1 - ends)
    return Trajectories(*(th.stack(column) for column in zip(*steps, strict=True)))


class Imagined(NamedTuple):
    """
    Imagined trajectories to look at: NumPy arrays in the environment's own units, step first.

    Behind an end observations stand still at the last one, and all else is zero.

    :param observations: (horizon + 1, n, obs_dim) flat, the start among them
    :param actions: (horizon, n, action_dim), between the bounds of the action space
    :param rewards: (horizon, n)
    :param terminated: (horizon, n) bool, true where the episode ends with the step; the horizon is no end
    :param alive: (horizon, n) bool, true where no end came before the step
    :param log_ratio: (horizon, n) the classifier's log p/q in nats; zero under an objective without a classifier
    :param disagreement: (horizon, n) standard deviation of the members' means in standardised units, over all targets
    :param member_observations: (n_members, horizon + 1, n, obs_dim), where each member alone goes by its mean, from the
        same start under the same actions: their spread is what the members do not agree upon
    :param member_rewards: (n_members, horizon, n), each member's along its own way
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    alive: np.ndarray
    log_ratio: np.ndarray
    disagreement: np.ndarray
    member_observations: np.ndarray
    member_rewards: np.ndarray


def visited(trajectories: Trajectories) -> th.Tensor:
    """All states met, start and end among them, (horizon + 1, n, obs_dim): behind an end they stand still."""
    states = [trajectories.observations[0]]
    for next_observations, alive in zip(trajectories.next_observations, trajectories.alive, strict=True):
        states.append(th.where(alive > 0, next_observations, states[-1]))
    return th.stack(states)


@th.no_grad()
def members_ways(dynamics: Dynamics, outcomes: Outcomes, trajectories: Trajectories) -> tuple[th.Tensor, th.Tensor]:
    """
    Where each member alone goes by its mean, from the starts of ``trajectories`` under their actions, E members.

    :return: states (horizon + 1, E, n, obs_dim) and rewards (horizon, E, n, 1); behind an end of ``trajectories``
        states stand still and rewards are zero
    """
    n_members, (n, obs_dim) = dynamics.n_members, trajectories.observations[0].shape
    observations = trajectories.observations[0].expand(n_members, n, obs_dim)
    states, rewards = [observations], []
    for step_actions, alive in zip(trajectories.actions, trajectories.alive, strict=True):
        actions = step_actions.expand(n_members, *step_actions.shape)
        predicted: Gaussian = dynamics(observations, actions)
        next_observations, learned = dynamics.decode(observations, predicted.mean)
        s, a, next_s = (x.flatten(0, 1) for x in (observations, actions, next_observations))
        earned = outcomes.rewards(s, a, next_s, learned.flatten(0, 1), outcomes.ends(s, a, next_s).float())
        rewards.append(alive * earned.view(n_members, n, 1))
        observations = th.where(alive > 0, next_observations, observations)
        states.append(observations)
    return th.stack(states), th.stack(rewards)


class ImaginedRows(NamedTuple):
    """
    n-step transitions within imagined trajectories: raw flat rows, (rows, .).

    :param next_observations: the state n steps on
    :param dones: one where the episode ends within the n steps
    :param rewards: of each of the n steps, (rows, n)
    :param log_ratio: the classifier's, of each of the n steps, (rows, n)
    :param novelty: what there is to learn, in nats, of each of the n steps, (rows, n)
    :param alive: one for each step that comes before or with the end, (rows, n)
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    log_ratio: th.Tensor
    novelty: th.Tensor
    alive: th.Tensor


def n_step_rows(trajectories: Trajectories, log_ratio: th.Tensor, novelty: th.Tensor, n_steps: int) -> ImaginedRows:
    """
    Every n-step transition that lies within the trajectories and does not start behind an end.

    :param log_ratio, novelty: of each step, (horizon, n, 1)
    """
    t = trajectories
    starts = range(len(t.rewards) - n_steps + 1)

    def windows(column: th.Tensor) -> th.Tensor:
        # (horizon, n, 1) -> (starts * n, n_steps)
        return th.cat([column[k : k + n_steps].squeeze(2).T for k in starts])

    alive = windows(t.alive)
    keep = alive[:, 0] > 0
    first, last = slice(0, len(starts)), slice(n_steps - 1, None)
    rows = ImaginedRows(
        t.observations[first].flatten(0, 1),
        t.actions[first].flatten(0, 1),
        t.next_observations[last].flatten(0, 1),
        (windows(t.dones) * alive).amax(dim=1, keepdim=True),
        windows(t.rewards),
        windows(log_ratio),
        windows(novelty),
        alive,
    )
    return ImaginedRows(*(column[keep] for column in rows))


def discounting_horizon(gamma: float, remainder: float = 0.01) -> int:
    """Steps after which γ^t falls below ``remainder``; 1000 without discounting."""
    return math.ceil(math.log(remainder) / math.log(gamma)) if 0 < gamma < 1 else 1000


class BoundEstimate(NamedTuple):
    """A mean over imagined trajectories and its standard error, scalars."""

    mean: th.Tensor
    standard_error: th.Tensor


def lower_bound(trajectories: Trajectories, paid: th.Tensor, gamma: float) -> BoundEstimate:
    """
    E_q[Σ_t γ^t r̃_t]: the lower bound on the log of the expected return, cut at the horizon.

    :param trajectories: imagined from first observations of episodes
    :param paid: r̃ of each step, (horizon, n, 1)
    """
    discounts = gamma ** th.arange(len(paid), device=paid.device).view(-1, 1, 1)
    totals = (discounts * trajectories.alive * paid).sum(dim=0)
    return BoundEstimate(totals.mean(), totals.std() / math.sqrt(len(totals)))
