"""
The objective that policy and dynamics climb together, over h steps of the learned world:

J(π, q) = E_q[Σ_{t<h} γ^t (r̃_t - α log π(a_t|s_t)) + γ^h V(s_h)].

Source: model-based value expansion (Feinberg et al., 2018), stochastic value gradients (Heess et al., 2015; Amos et
al., 2021), DHMBPO (Kubo et al., TMLR 2025), here with the rewards of the objective and ends that are probabilities.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th


class Path(NamedTuple):
    """
    h steps of the current policy in the learned world from n states, differentiable in the policy's weights.

    :param states: raw flat s_0 to s_h, (h + 1, n, obs_dim)
    :param actions: a_0 to a_h, (h + 1, n, action_dim)
    :param log_prob: log π(a_t|s_t), (h + 1, n, 1)
    :param rewards: r̃_t, (h, n, 1)
    :param continuation: probability that the episode goes on at s_t+1, (h, n, 1)
    """

    states: th.Tensor
    actions: th.Tensor
    log_prob: th.Tensor
    rewards: th.Tensor
    continuation: th.Tensor


def look_ahead(
    act: Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]],
    draw: Callable[[th.Tensor, th.Tensor, int], tuple[th.Tensor, th.Tensor]],
    earned: Callable[[th.Tensor, th.Tensor, th.Tensor, th.Tensor], tuple[th.Tensor, th.Tensor]],
    states: th.Tensor,
    steps: int,
) -> Path:
    """
    A path from ``states``, (n, obs_dim).

    :param act: states -> actions and their log-probabilities, (n, 1)
    :param draw: states, actions, t -> next states and learned rewards, drawn
    :param earned: states, actions, next states, learned rewards of all steps -> r̃ and the probability to go on
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
    return Path(th.stack(visited), th.stack(acted), th.stack(log_probs), rewards, continuation)


def expanded_value(path: Path, last_value: th.Tensor, ent_coef: th.Tensor, gamma: float) -> th.Tensor:
    """
    J of each start, (n, 1): what is earned along the path, each step by the chance to live to see it.

    :param last_value: V(s_h), (n, 1)
    """
    value = last_value
    for t in reversed(range(len(path.rewards))):
        value = path.rewards[t] - ent_coef * path.log_prob[t] + gamma * path.continuation[t] * value
    return value
