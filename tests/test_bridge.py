"""The deep code against the tabular one, on a finite MDP whose states are one-hot observations."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mismatch.buffers import RealTransitions
from sb3_mismatch.classifier import Classifier
from sb3_mismatch.fitting import FitSettings, fit_classifier
from sb3_mismatch.imagination import discounting_horizon, imagine, lower_bound
from sb3_mismatch.objectives import (
    OBJECTIVES,
    Payment,
    discounted_joint_loss,
    joint_loss,
    lower_bound_reward,
)
from sb3_mismatch.tabular import FiniteMDP, bound_1, bound_gamma, kl, tilt

S, A, GAMMA = 5, 3, 0.9


class OneHot:
    """A finite MDP, a policy and dynamics q as the deep code sees them: s one-hot, a a third of [-1, 1]."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.p = draw.dirichlet(np.ones(S), (S, A))
        self.q = 0.6 * self.p + 0.4 * draw.dirichlet(np.ones(S), (S, A))
        self.policy, start = draw.dirichlet(np.ones(A), S), draw.dirichlet(np.ones(S))
        self.reward = draw.uniform(0.2, 3.0, (S, A))
        self.mdp = FiniteMDP(self.p, self.reward, GAMMA, start)
        self.start = th.as_tensor(start)

    @staticmethod
    def observation(state: th.Tensor) -> th.Tensor:
        return th.nn.functional.one_hot(state, S).float()

    @staticmethod
    def action(choice: th.Tensor) -> th.Tensor:
        return (2.0 * choice.float() - (A - 1)).unsqueeze(1) / A

    @staticmethod
    def indices(observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return observations.argmax(dim=-1), ((actions[..., 0] * A + (A - 1)) / 2).round().long()

    def draw(self, table: np.ndarray, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """s' ~ table(.|s, a)."""
        rows = th.as_tensor(table)[self.indices(observations, actions)]
        return self.observation(th.multinomial(rows, 1).squeeze(1))

    def act(self, observations: th.Tensor) -> th.Tensor:
        return self.action(th.multinomial(th.as_tensor(self.policy)[observations.argmax(dim=1)], 1).squeeze(1))

    def sample(self, observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """The learned dynamics."""
        rewards = th.as_tensor(self.reward)[self.indices(observations, actions)].float()
        return self.draw(self.q, observations, actions), rewards.unsqueeze(1)

    def log_ratio(self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """log p/q, (..., 1)."""
        s, a = self.indices(observations, actions)
        return th.as_tensor(np.log(self.p / self.q))[s, a, next_observations.argmax(dim=-1)].float().unsqueeze(-1)

    @th.no_grad()
    def estimate(self, objective: str, log_ratio: Callable[..., th.Tensor], n: int) -> tuple[float, float]:
        """The deep code's estimate of the bound, and its standard error."""
        payment = Payment(OBJECTIVES[objective], GAMMA, lowest=float(self.reward.min()))
        outcomes = SimpleNamespace(
            rewards=lambda s, a, s_next, learned, ends: learned,
            ends=lambda s, a, s_next: th.zeros(len(a), 1, dtype=th.bool),
        )
        starts = self.observation(th.multinomial(self.start, n, replacement=True))
        horizon = discounting_horizon(GAMMA, remainder=1e-4)
        trajectories = imagine(self.act, self, outcomes, starts, horizon)  # type: ignore[arg-type]
        paid = payment.imagined(trajectories.rewards, log_ratio(*trajectories[:3]), trajectories.alive)
        mean, error = lower_bound(trajectories, paid, GAMMA)
        return float(mean), float(error)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    th.manual_seed(0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("objective", "exact"), [("mnm", bound_1), ("mnm-gamma", bound_gamma)])
def test_estimate_of_the_bound_agrees_with_the_exact_one(seed: int, objective: str, exact) -> None:
    world = OneHot(seed)
    mean, error = world.estimate(objective, world.log_ratio, n=8000)
    assert error < 0.03
    assert mean == pytest.approx(exact(world.mdp, world.policy, world.q).value, abs=3 * error)


def test_estimate_with_a_trained_classifier() -> None:
    world = OneHot(seed=0)
    n = 30_000
    observations = world.observation(th.randint(S, (n,)))
    actions = world.action(th.randint(A, (n,)))
    real = world.draw(world.p, observations, actions)
    zeros = th.zeros(n, 1)
    data = RealTransitions(ReplayBufferSamples(observations, actions, real, zeros, zeros), th.arange(n))
    classifier = Classifier(S, 1, label_smoothing=0.0, input_noise=0.0)
    optimizer = th.optim.Adam(classifier.parameters(), lr=3e-3)
    settings = FitSettings(classifier_steps=300, batch_size=512)
    fit_classifier(classifier, optimizer, data, partial(world.draw, world.q), settings)

    draws = world.draw(world.q, observations, actions)
    learned, true = classifier.log_ratio(observations, actions, draws), world.log_ratio(observations, actions, draws)
    assert (learned - true).abs().mean() < 0.15
    mean, _ = world.estimate("mnm", classifier.log_ratio, n=2000)
    # Every step's error is paid for 1 / (1 - γ) steps.
    assert mean == pytest.approx(bound_1(world.mdp, world.policy, world.q).value, abs=0.1 / (1 - GAMMA))


def test_expected_reward_of_a_step_is_the_tabular_one() -> None:
    """E_q r̃ = (1 - γ) log r - KL(q‖p) - (1 - γ) log(1 - γ) at every (s, a)."""
    world = OneHot(seed=1)
    r = th.as_tensor(world.reward)[..., None].expand(S, A, S)
    deep = lower_bound_reward(r, th.as_tensor(np.log(world.p / world.q)), GAMMA)
    tabular = (1 - GAMMA) * np.log(world.reward / (1 - GAMMA)) - kl(world.mdp.checked_dynamics(world.q), world.mdp.p)
    assert (world.q * deep.numpy()).sum(axis=2) == pytest.approx(tabular)


@pytest.mark.parametrize(
    ("loss", "coefficient", "exponent"), [(joint_loss, 1.0, GAMMA), (discounted_joint_loss, GAMMA, 1.0)]
)
def test_joint_losses_are_least_at_the_tabular_optimum(loss, coefficient: float, exponent: float) -> None:
    """min_q E_q[-c log p/q - γ V] = -c log E_p exp(γ V / c), at q = tilt(p, γ V / c)."""
    world = OneHot(seed=2)
    v = np.random.default_rng(2).normal(size=S)

    def expected(q: np.ndarray) -> np.ndarray:
        terms = SimpleNamespace(
            nll=th.zeros(S, A, S), log_ratio=th.as_tensor(np.log(world.p / q)), value=th.as_tensor(v).expand(S, A, S)
        )
        return (q * loss(terms, GAMMA).numpy()).sum(axis=2)

    best, log_mean = tilt(world.mdp.p, exponent * v)
    assert expected(best.toarray().reshape(S, A, S)) == pytest.approx(-coefficient * log_mean)
    other = best.toarray().reshape(S, A, S) * np.exp(0.1 * np.random.default_rng(3).normal(size=(S, A, S)))
    assert (expected(other / other.sum(axis=2, keepdims=True)) > -coefficient * log_mean).all()
    assert math.isclose(coefficient * exponent, GAMMA)
