"""
The objective that policy and dynamics climb together, over h steps of the learned world:

J(π, q) = E_q[Σ_{t<k} γ^t (r̃_t - α log π(a_t|s_t)) + γ^k V(s_k)],

where k is h, or less where the world is not trusted as far (:mod:`sb3_mismatch.trust`).

Source: model-based value expansion (Feinberg et al., 2018), stochastic value gradients (Heess et al., 2015; Amos et
al., 2021), DHMBPO (Kubo et al., TMLR 2025), here with the rewards of the objective and ends that are probabilities.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th


class Path(NamedTuple):
    """
    h steps of the current policy in the learned world from n states, differentiable in the policy's weights.

    :param states: raw flat s_0 to s_h, (h + 1, n, obs_dim)
    :param actions: a_0 to a_h, (h + 1, n, action_dim)
    :param log_prob: log π(a_t|s_t), (h + 1, n, 1)
    :param rewards: r̃_t, (h, n, 1)
    :param continuation: probability that the episode goes on at s_t+1, (h, n, 1)
    :param trusted: one for the first k steps of each path, zero for the others, (h, n, 1)
    """

    states: th.Tensor
    actions: th.Tensor
    log_prob: th.Tensor
    rewards: th.Tensor
    continuation: th.Tensor
    trusted: th.Tensor

    def reached(self) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Where each path is left for its value: s_k, a_k and log π(a_k|s_k), (n, .) each."""
        k = self.trusted.sum(dim=0, keepdim=True).long()
        states, actions, log_prob = (
            x.gather(0, k.expand(-1, -1, x.shape[2])).squeeze(0) for x in (self.states, self.actions, self.log_prob)
        )
        return states, actions, log_prob


class ClippedRows(th.autograd.Function):
    """
    The identity on (n, .), whose gradient is clipped row by row to ``most`` times the mean norm of all rows.

    Where the gradients of a few rows are many times as large as those of the others, as they may be through several
    steps of a learned world, a minibatch says what these few do.
    """

    @staticmethod
    def forward(rows: th.Tensor, most: float) -> th.Tensor:
        return rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[th.Tensor, float], output: th.Tensor) -> None:
        ctx.most = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor, None]:
        norms = gradient.norm(dim=1, keepdim=True)
        return gradient * (ctx.most * norms.mean() / norms.clamp(min=1e-12)).clamp(max=1), None


def clipped(mean: th.Tensor, log_std: th.Tensor, most: float | None) -> tuple[th.Tensor, th.Tensor]:
    """
    What an actor says of its actions, (n, action_dim) each, with :class:`ClippedRows` over both.

    :param most: ``None``: not clipped
    """
    if most is None:
        return mean, log_std
    mean, log_std = ClippedRows.apply(th.cat([mean, log_std], dim=1), most).chunk(2, dim=1)  # type: ignore[no-untyped-call]
    return mean, log_std


def look_ahead(
    act: Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]],
    draw: Callable[[th.Tensor, th.Tensor, int], tuple[th.Tensor, th.Tensor]],
    earned: Callable[[th.Tensor, th.Tensor, th.Tensor, th.Tensor], tuple[th.Tensor, th.Tensor]],
    states: th.Tensor,
    steps: int,
    trust: Callable[[th.Tensor, th.Tensor], th.Tensor],
) -> Path:
    """
    A path from ``states``, (n, obs_dim).

    :param act: states -> actions and their log-probabilities, (n, 1)
    :param draw: states, actions, t -> next states and learned rewards, drawn
    :param earned: states, actions, next states, learned rewards of all steps -> r̃ and the probability to go on
    :param trust: states and actions, (h, n, .), without their gradients -> :attr:`Path.trusted`
    """
    visited, learned = [states], []
    actions, log_prob = act(states)
    acted, log_probs = [actions], [log_prob]
    for t in range(steps):
        states, rewards = draw(states, actions, t)
        actions, log_prob = act(states)
        visited.append(states)
        learned.append(rewards)
        acted.append(actions)
        log_probs.append(log_prob)
    transitions = (th.cat(column) for column in (visited[:-1], acted[:-1], visited[1:], learned))
    rewards, continuation = (x.view(steps, -1, 1) for x in earned(*transitions))
    paths = th.stack(visited), th.stack(acted), th.stack(log_probs)
    return Path(*paths, rewards, continuation, trust(paths[0][:-1].detach(), paths[1][:-1].detach()))


def expanded_value(path: Path, last_value: th.Tensor, ent_coef: th.Tensor, gamma: float) -> th.Tensor:
    """
    J of each start, (n, 1): what is earned along the path, each step by the chance to live to see it.

    :param last_value: V(s_k), (n, 1)
    """
    value = last_value
    for t in reversed(range(len(path.rewards))):
        ahead = path.rewards[t] - ent_coef * path.log_prob[t] + gamma * path.continuation[t] * value
        value = th.where(path.trusted[t] > 0, ahead, value)
    return value
