"""What can be told from real rewards alone: which stand out, and whether they tell anything of states."""

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

#: A reward of more than so many times the median stands out.
OUTSTANDING = 30
#: Where as large a share of rewards as this stands out, they are not rare.
RARE = 0.25


def least_outstanding(rewards: th.Tensor) -> float:
    """What rewards that stand out from these, of any shape, are larger than, without their sign."""
    return OUTSTANDING * rewards.abs().median().item()


def rare(rewards: th.Tensor) -> th.Tensor:
    """Which of these rewards, of any shape, stand out where few do: bool, of that shape."""
    outstanding = rewards.abs() > least_outstanding(rewards)
    return outstanding & (outstanding.float().mean() < RARE)


def count_telling(batch: ReplayBufferSamples, enough: int) -> int:
    """
    How many rewards tell something of states, up to ``enough``, which a tenth of all is as well: those that are neither
    the same as the others nor what actions cost, a sum over their numbers of each and its square.
    """
    actions, rewards = batch.actions.double(), batch.rewards.double()
    costs = th.cat((th.ones_like(rewards), actions, actions**2), dim=1)
    telling, error, most = 0, 1e-4 * rewards.abs().max(), min(enough, len(rewards) / 10)
    while telling < most:
        # The normal equations, on a device that has them: a constant action makes them singular.
        found = th.linalg.pinv(costs.T @ costs, hermitian=True) @ (costs.T @ rewards)
        left = (rewards - costs @ found).abs().squeeze(1)
        if left.max() <= error:
            return telling
        # A few that stand out move the fit of all.
        kept = left <= left.max() / 2
        telling += len(kept) - int(kept.sum())
        costs, rewards = costs[kept], rewards[kept]
    return enough
