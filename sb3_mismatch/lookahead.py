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
    :param shifts: what was added to the actions, (h + 1, n, action_dim): zeros, for the gradient in them
    """

    states: th.Tensor
    actions: th.Tensor
    log_prob: th.Tensor
    rewards: th.Tensor
    continuation: th.Tensor
    shifts: th.Tensor


def look_ahead(
    act: Callable[[th.Tensor], tuple[th.Tensor, th.Tensor]],
    draw: Callable[[th.Tensor, th.Tensor, int], tuple[th.Tensor, th.Tensor]],
    earned: Callable[[th.Tensor, th.Tensor, th.Tensor, th.Tensor], tuple[th.Tensor, th.Tensor]],
    states: th.Tensor,
    shifts: th.Tensor,
) -> Path:
    """
    A path from ``states``, (n, obs_dim), of as many actions as ``shifts`` has, each moved by its shift.

    :param act: states -> actions and their log-probabilities, (n, 1)
    :param draw: states, actions, t -> next states and learned rewards, drawn
    :param earned: states, actions, next states, learned rewards of all steps -> r̃ and the probability to go on
    """
    visited, learned = [states], []
    acted: list[th.Tensor] = []
    log_probs = []
    for t, shift in enumerate(shifts):
        if t > 0:
            states, rewards = draw(states, acted[-1], t - 1)
            visited.append(states)
            learned.append(rewards)
        actions, log_prob = act(states)
        acted.append(actions + shift)
        log_probs.append(log_prob)
    transitions = (th.cat(column) for column in (visited[:-1], acted[:-1], visited[1:], learned))
    rewards, continuation = (x.view(len(learned), -1, 1) for x in earned(*transitions))
    return Path(th.stack(visited), th.stack(acted), th.stack(log_probs), rewards, continuation, shifts)


def expanded_value(path: Path, last_value: th.Tensor, ent_coef: th.Tensor, gamma: float) -> th.Tensor:
    """
    J of each start, (n, 1): what is earned along the path, each step by the chance to live to see it.

    :param last_value: V(s_h), (n, 1)
    """
    value = last_value
    for t in reversed(range(len(path.rewards))):
        value = path.rewards[t] - ent_coef * path.log_prob[t] + gamma * path.continuation[t] * value
    return value


def evened(pull: th.Tensor) -> th.Tensor:
    """
    Weights of the rows in the policy's gradient, (n, 1), by which none pulls harder at its actions than the median row.

    Where the world is steep, before a fall say, gradients through several of its steps are larger by orders of
    magnitude than elsewhere, and a tenth of the rows would rule.

    :param pull: gradient of each row's J in its actions, (h + 1, n, action_dim)
    """
    norm = pull.square().sum(dim=(0, 2)).sqrt().unsqueeze(1)
    middle = norm.median().clamp(min=1e-30)
    return middle / norm.clamp(min=middle)
