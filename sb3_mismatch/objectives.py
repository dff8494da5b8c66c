"""
What the policy is paid and what the dynamics are trained for: one function per equation, one row per variant.

``log_ratio`` is log p(s'|s,a) / q(s'|s,a), real over learned, as the classifier estimates it: log C/(1-C). It is
positive where a transition looks real. A real transition needs no correction: its ``log_ratio`` is zero.

Source: Eysenbach, Khazatsky, Levine, Salakhutdinov, "Mismatched No More: Joint Model-Policy Optimization for
Model-Based RL", NeurIPS 2022; VMBPO: Chow et al., "Variational Model-based Policy Optimization", IJCAI 2021;
MBPO: Janner et al., "When to Trust Your Model", NeurIPS 2019.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch as th

#: Nats of novelty beyond which nothing is newer.
MOST_NOVEL = 5.0


class ModelTerms(Protocol):
    """
    What the dynamics' loss may ask of a minibatch: means over its rows for each member, shape (n_members,), or what
    each row has, (n_members, batch). Computed only when asked for, and already times their weights: the fit to real
    transitions (``nll``, ``nll_of_each``, ``crps``) times ``likelihood_weight``, the others times
    ``adversarial_weight``.
    """

    @property
    def nll(self) -> th.Tensor:
        """-log q(s', r | s, a) of the real transition, in nats."""

    @property
    def nll_of_each(self) -> th.Tensor:
        """The same of each row, (n_members, batch)."""

    @property
    def crps(self) -> th.Tensor:
        """Continuous ranked probability score of q(s', r | s, a) at the real transition, in 1/200 of a deviation."""

    @property
    def log_ratio(self) -> th.Tensor:
        """log C/(1-C) of a next state drawn from the dynamics by reparameterisation."""

    @property
    def value(self) -> th.Tensor:
        """V of that same next state."""

    @property
    def value_of_each(self) -> th.Tensor:
        """V of each row's real next state, 0 where the episode ends, without a gradient, (n_members, batch)."""


# -- what the policy is paid: shapes (batch, 1), `log_ratio` already times `log_ratio_weight` --


def task_reward(reward: th.Tensor, log_ratio: th.Tensor, gamma: float) -> th.Tensor:
    """r̃ = r."""
    return reward


def realistic_reward(reward: th.Tensor, log_ratio: th.Tensor, gamma: float) -> th.Tensor:
    """r̃ = r + log p/q."""
    return reward + log_ratio


def lower_bound_reward(reward: th.Tensor, log_ratio: th.Tensor, gamma: float) -> th.Tensor:
    """r̃ = (1 - γ) log r + log p/q - (1 - γ) log(1 - γ), for r > 0: the bound B_1, the paper's."""
    return (1 - gamma) * (reward.log() - math.log(1 - gamma)) + log_ratio


def discounted_bound_reward(reward: th.Tensor, log_ratio: th.Tensor, gamma: float) -> th.Tensor:
    """r̃ = (1 - γ) log r + γ log p/q - (1 - γ) log(1 - γ), for r > 0: the bound B_γ, tighter where r = r(s, a)."""
    return lower_bound_reward(reward, gamma * log_ratio, gamma)


# -- what the dynamics minimise: shapes (n_members,) --


def likelihood_loss(terms: ModelTerms, gamma: float) -> th.Tensor:
    """L = -log q."""
    return terms.nll


def adversarial_loss(terms: ModelTerms, gamma: float) -> th.Tensor:
    """L = CRPS(q) - log C/(1-C)."""
    return terms.crps - terms.log_ratio


def joint_loss(terms: ModelTerms, gamma: float) -> th.Tensor:
    """L = -log q - (log C/(1-C) + γ V), whose last two terms alone have the optimum q ∝ p exp(γ V)."""
    return terms.nll - (terms.log_ratio + gamma * terms.value)


def discounted_joint_loss(terms: ModelTerms, gamma: float) -> th.Tensor:
    """L = -log q - γ (log C/(1-C) + V), whose last two terms alone have the optimum q ∝ p exp(V)."""
    return terms.nll - gamma * (terms.log_ratio + terms.value)


def weighted_loss(terms: ModelTerms, gamma: float) -> th.Tensor:
    """L = -Σ w log q of real transitions, w ∝ exp(γ V) over a minibatch: q ∝ p exp(γ V) again, with no draw from q."""
    weights = (gamma * terms.value_of_each).softmax(dim=1)
    return (weights * terms.nll_of_each).sum(dim=1)


@dataclass(frozen=True)
class Objective:
    """
    A row of the table of objectives.

    :param reward: what the policy is paid for an imagined transition: ``(reward, log_ratio, gamma) -> r̃``,
        shapes (batch, 1); real transitions are paid the same with ``log_ratio`` zero
    :param model_loss: what the dynamics minimise: ``(terms, gamma) -> loss``, shape (n_members,)
    :param log_ratio_weight: weight of the log-ratio in the policy's reward
    :param adversarial_weight: weight of what a drawn next state earns in the dynamics' loss, and of value in the
        exponent under :func:`weighted_loss`
    :param likelihood_weight: weight of the fit to real transitions in the dynamics' loss
    :param takes_log: whether ``reward`` takes the logarithm of the environment's reward, so that the policy's
        objective is a lower bound on the log of the expected return
    :param centred: whether the log-ratio has its mean over the imagined rows subtracted before it is paid: a
        constant part would pay or punish staying alive. It is paid without a gradient then: policies follow it by the
        critics' values alone. Who looks ahead is paid it in units of the largest common reward, where that lies below 1
    :param uses_classifier: whether a classifier is trained at all
    :param ignores_noise: whether dimensions of the state that cannot be foretold are left out of the dynamics'
        networks, losses and the classifier; what is to lean towards value has to keep its noise
    :param novelty_weight: weight of what there is to learn from a transition, in the policy's reward beside r̃: above 0
        the policy seeks what the world does not know (MaxInfoRL, Sukhija et al., 2024), below 0 it keeps off, much as
        in MOPO (Yu et al., 2020); centred where the log-ratio is. :class:`Payment` pays a share of it
    """

    reward: Callable[[th.Tensor, th.Tensor, float], th.Tensor]
    model_loss: Callable[[ModelTerms, float], th.Tensor]
    log_ratio_weight: float = 1.0
    adversarial_weight: float = 1.0
    likelihood_weight: float = 1.0
    takes_log: bool = False
    centred: bool = False
    uses_classifier: bool = True
    ignores_noise: bool = False
    novelty_weight: float = 0.0


OBJECTIVES: dict[str, Objective] = {
    "mnm": Objective(reward=lower_bound_reward, model_loss=joint_loss, takes_log=True),
    "mnm-gamma": Objective(reward=discounted_bound_reward, model_loss=discounted_joint_loss, takes_log=True),
    "mnm-weighted": Objective(reward=lower_bound_reward, model_loss=weighted_loss, takes_log=True),
    "mnm-approx": Objective(
        reward=realistic_reward,
        model_loss=adversarial_loss,
        log_ratio_weight=0.1,
        adversarial_weight=0.1,
        centred=True,
        ignores_noise=True,
    ),
    "vmbpo": Objective(reward=realistic_reward, model_loss=joint_loss),
    "mbpo": Objective(reward=task_reward, model_loss=likelihood_loss, uses_classifier=False),
}


def positive_offset(name: str, lowest: float, reward_shift: float | str, reward_floor: float) -> float:
    """
    What is added to every raw reward before its logarithm is taken.

    :param name: of the objective, for the message
    :param lowest: the lowest real reward met so far
    :param reward_shift: a number, or "auto" for as much as lifts ``lowest`` to ``reward_floor``
    :raises ValueError: when the shifted reward is not above 0
    """
    offset = max(0.0, reward_floor - lowest) if reward_shift == "auto" else float(reward_shift)
    if not lowest + offset > 0:
        raise ValueError(
            f"objective={name!r} takes log r and met r = {lowest:g} (reward_shift={reward_shift!r}): "
            "pass reward_shift='auto' or a larger number, or use objective='mnm-approx'"
        )
    return offset


@dataclass(frozen=True)
class Payment:
    """
    What a row of the table pays.

    :param row: the objective
    :param gamma: discount
    :param offset: added to rewards before their logarithm, in the units that the critics see
    :param lowest: the lowest reward that has a logarithm, shifted, in the same units
    :param unit: what is paid is divided by it
    :param novelty_share: of the row's ``novelty_weight``, what is paid today
    :param log_ratio_share: of its ``log_ratio_weight``, the same
    """

    row: Objective
    gamma: float
    offset: float = 0.0
    lowest: float = 0.0
    unit: float = 1.0
    novelty_share: float = 1.0
    log_ratio_share: float = 1.0

    def real(self, rewards: th.Tensor) -> th.Tensor:
        """r̃ of real rows, which need no correction: (n, 1)."""
        return self._tilde(rewards, th.zeros_like(rewards)) / self.unit

    def imagined(
        self, rewards: th.Tensor, log_ratio: th.Tensor, alive: th.Tensor, novelty: th.Tensor | None = None
    ) -> th.Tensor:
        """
        r̃ of imagined steps, and what their novelty earns beside it, all of one shape.

        :param rewards: as the critics see them
        :param log_ratio: the classifier's
        :param alive: one for each step that counts; the others are left out of the mean
        :param novelty: of :meth:`~sb3_mismatch.dynamics.Dynamics.novelty`; ``None``: nothing is new
        """

        def centred(x: th.Tensor) -> th.Tensor:
            if not self.row.centred:
                return x
            # What all rows would gain alike the mean takes away, and so nearly all of a gradient.
            x = x.detach()
            return x - (x * alive).sum() / alive.sum().clamp(min=1)

        paid = self._tilde(rewards, self._log_ratio_weight * centred(log_ratio))
        if novelty is not None:
            paid = paid + self._novelty_weight * centred(novelty.clamp(max=MOST_NOVEL))
        return paid / self.unit

    def slack(self, max_log_ratio: float) -> float:
        """By how much more or less than its reward an imagined step may be paid; what is centred adds up to nothing."""
        bounds_ratio = self.row.uses_classifier and not self.row.centred
        of_ratio = self._log_ratio_weight * max_log_ratio if bounds_ratio else 0.0
        return (of_ratio + abs(self._novelty_weight) * MOST_NOVEL) / self.unit

    @property
    def _log_ratio_weight(self) -> float:
        return self.row.log_ratio_weight * self.log_ratio_share

    @property
    def _novelty_weight(self) -> float:
        return self.row.novelty_weight * self.novelty_share

    def _tilde(self, rewards: th.Tensor, log_ratio: th.Tensor) -> th.Tensor:
        """r̃, ``log_ratio`` already times its weight."""
        if self.row.takes_log:
            # Learned rewards may fall below every real one.
            rewards = (rewards + self.offset).clamp(min=self.lowest)
        return self.row.reward(rewards, log_ratio, self.gamma)

    def log_return(self, rewards: np.ndarray, steps: np.ndarray) -> float:
        """
        log of the mean of Σ_t γ^t r_t over episodes, the rewards shifted as their logarithm is.

        :param rewards: (episodes, longest), in the units that the critics see
        :param steps: (episodes,) how many of each count
        """
        t = np.arange(rewards.shape[1])
        discounted = self.gamma**t * (rewards.astype(np.float64) + self.offset)
        return math.log(np.where(t < steps[:, None], discounted, 0.0).sum(axis=1).mean())
