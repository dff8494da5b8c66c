"""Guards against divergence: fits that explode, classifiers that saturate, critics that leave what rewards allow."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch as th
from agents import all_finite, assert_same, environments, soon, trained
from toys import LinearSystem

from sb3_mismatch import MnM, guards
from sb3_mismatch.classifier import Classifier
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC
from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.fitting import EXPLOSION, FitSettings, exploded, fit_classifier, fit_dynamics
from sb3_mismatch.guards import GradientGuard, value_bound

KINDS = pytest.mark.parametrize("kind", [MnM, MnMTQC, MnMCrossQ])


def moments(optimizer):
    return [x.clone() for state in optimizer.state.values() for x in state.values()]


def is_finite(optimizer):
    return all(x.isfinite().all() for x in moments(optimizer))


# -- fits of the dynamics --


def test_a_loss_has_exploded_when_it_rises_by_so_many_nats_or_is_lost():
    before = th.tensor([0.0, 0.0, 0.0, 0.0, math.inf])
    after = th.tensor([EXPLOSION - 1, EXPLOSION + 1, math.nan, math.inf, 1.0])
    assert exploded(before, after).tolist() == [False, True, True, True, False]


class Likelihood:
    """-log q, which member 0 meets with another sign and far steeper while ``torn``."""

    def __init__(self, dynamics):
        self.dynamics, self.torn = dynamics, False

    def __call__(self, rows):
        nll = self.dynamics.nll(rows.observations, rows.actions, rows.next_observations, rows.rewards).mean(dim=1)
        return nll * th.tensor([-1e6, 1.0]) if self.torn and th.is_grad_enabled() else nll


@pytest.fixture
def fitted():
    """Dynamics of two members after a good fit, and what fits them."""
    th.manual_seed(0)
    data, dynamics = LinearSystem().draw(300), Dynamics(3, 1, 2, 1, net_arch=[8])
    optimizer = th.optim.Adam(dynamics.parameters(), lr=3e-3)
    loss = Likelihood(dynamics)

    def fit():
        return fit_dynamics(dynamics, optimizer, data, loss, FitSettings(dynamics_steps=100, batch_size=32))

    assert fit()["dynamics/rolled_back"] == 0
    return dynamics, optimizer, loss, fit


def test_a_member_that_explodes_is_rolled_back_with_its_moments_and_the_other_keeps_its_steps(fitted):
    dynamics, optimizer, loss, fit = fitted
    weight = dynamics.body.layers[0].weight
    before, first, second = weight.detach().clone(), *(optimizer.state[weight][m].clone() for m in MOMENTS)
    loss.torn = True
    assert fit()["dynamics/rolled_back"] == 1
    state = optimizer.state[weight]
    assert th.equal(weight[0], before[0])
    assert th.equal(state["exp_avg"][0], first[0])
    assert th.equal(state["exp_avg_sq"][0], second[0])
    assert not th.equal(state["exp_avg"][1], first[1])
    # The next fit goes on as if nothing had happened: with the explosion's moments member 0 would stand still.
    loss.torn = False
    assert fit()["dynamics/rolled_back"] == 0
    assert not th.equal(weight[0], before[0])


MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("moment", MOMENTS)
def test_moments_that_overflow_are_rolled_back(fitted, moment, monkeypatch):
    dynamics, optimizer, _, fit = fitted
    weight, step = dynamics.body.layers[0].weight, optimizer.step

    def overflow():
        step()
        optimizer.state[weight][moment][0, 0, 0] = math.inf if moment == "exp_avg_sq" else math.nan

    monkeypatch.setattr(optimizer, "step", overflow)
    assert fit()["dynamics/rolled_back"] == 1
    assert is_finite(optimizer)
    assert all(p.isfinite().all() for p in dynamics.parameters())


def test_a_first_fit_that_explodes_leaves_no_moments():
    th.manual_seed(0)
    data, dynamics = LinearSystem().draw(100), Dynamics(3, 1, 2, 1, net_arch=[8])
    optimizer = th.optim.Adam(dynamics.parameters(), lr=1e4)
    start = [p.detach().clone() for p in dynamics.body.parameters()]
    log = fit_dynamics(dynamics, optimizer, data, Likelihood(dynamics), FitSettings(dynamics_steps=60, batch_size=32))
    assert log["dynamics/rolled_back"] == 2
    assert_same(list(dynamics.body.parameters()), start)
    assert all((optimizer.state[p][m] == 0).all() for p in dynamics.body.parameters() for m in MOMENTS)


def test_training_goes_on_over_fits_that_explode(monkeypatch):
    """A learning rate of 1 for the dynamics: fits explode, are told, and the agent learns on with what was good."""
    soon(monkeypatch)
    # With it not even this rate makes them explode.
    monkeypatch.setattr("sb3_mismatch.world.WEIGHT_DECAY", 0.0)
    fits = {"dynamics_steps": 20, "classifier_steps": 2, "batch_size": 32}
    wild = {"net_arch": [32, 32, 32], "learning_rate": 1.0, "layer_norm": False}
    model = trained(steps=220, dynamics_kwargs=wild, fit_kwargs=fits)
    assert model.logger.name_to_value["dynamics/rolled_back"] >= 1
    assert model._fitted_at > 120
    assert all_finite(model)
    assert is_finite(model.world.dynamics_optimizer)


# -- fits of the classifier --


def fit_of_classifier(classifier, optimizer, shift=0.0, **settings):
    data = LinearSystem().draw(200)
    return fit_classifier(
        classifier, optimizer, data, lambda s, a: s + shift, FitSettings(**{"classifier_steps": 20, **settings})
    )


@pytest.mark.parametrize("lr", [1e6, math.inf])
def test_a_classifier_that_explodes_is_rolled_back_with_its_moments(lr):
    th.manual_seed(0)
    classifier = Classifier(3, 1, net_arch=(8,))
    optimizer = th.optim.Adam(classifier.parameters(), lr=1e-3)
    assert fit_of_classifier(classifier, optimizer)["classifier/rolled_back"] == 0
    weights, kept = [p.detach().clone() for p in classifier.parameters()], moments(optimizer)
    optimizer.param_groups[0]["lr"] = lr
    log = fit_of_classifier(classifier, optimizer)
    assert log["classifier/rolled_back"] == 1
    assert math.isfinite(log["classifier/loss"])
    assert_same(list(classifier.parameters()), weights)
    assert_same(moments(optimizer), kept)


def test_saturation_is_the_share_of_held_out_log_ratios_at_the_clip():
    th.manual_seed(0)
    classifier = Classifier(3, 1, net_arch=(32,), label_smoothing=0.0, max_log_ratio=3.0)
    optimizer = th.optim.Adam(classifier.parameters(), lr=1e-2)
    untrained = fit_of_classifier(classifier, optimizer, classifier_steps=1)
    assert untrained["classifier/saturation"] == 0
    # States a hundred away are told at once.
    told = fit_of_classifier(classifier, optimizer, shift=100.0, classifier_steps=400)
    assert told["classifier/saturation"] > 0.95


# -- the base algorithm's update --


def all_of(model):
    """Every tensor that the agent's networks and optimizers hold."""
    optimizers = [model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer]
    optimizers += [model.world.dynamics_optimizer, model.world.classifier_optimizer]
    tensors = [*model.policy.state_dict().values(), model.log_ent_coef.detach()]
    return [*tensors, *(x for optimizer in optimizers for x in moments(optimizer))]


@pytest.mark.parametrize("rewards", [np.nan, np.inf, 1e30], ids=str)
@KINDS
def test_a_loss_that_is_not_finite_reaches_no_weight_and_no_moment(kind, rewards):
    model = trained(steps=80, kind=kind)
    model.replay_buffer.rewards[:] = rewards
    # TQC's loss grows as errors do, and not as their squares: it learns from 1e30 too.
    learns = kind is MnMTQC and rewards == 1e30
    with nullcontext() if learns else pytest.raises(ValueError, match="lower learning_rate"):
        model.train(gradient_steps=4)
    assert all(x.isfinite().all() for x in all_of(model))
    # What was wrong is gone: the agent learns on.
    model.replay_buffer.rewards[:] = -1.0
    model.train(gradient_steps=4)


@pytest.mark.parametrize("gradient", [math.nan, math.inf, 1e20])
def test_a_gradient_whose_square_overflows_counts_for_nothing(gradient):
    weights, guard = th.nn.Parameter(th.ones(3)), GradientGuard(th.device("cpu"))
    optimizer = th.optim.Adam([weights], lr=0.1)
    guard.watch(optimizer)
    weights.grad = th.tensor([0.0, gradient, 1.0])
    optimizer.step()
    assert th.equal(weights, th.ones(3))
    assert is_finite(optimizer)
    assert guard.dropped == 1


def test_a_gradient_of_use_is_left_alone():
    weights, guard = th.nn.Parameter(th.ones(3)), GradientGuard(th.device("cpu"))
    optimizer = th.optim.SGD([weights], lr=0.5)
    guard.watch(optimizer)
    weights.grad = th.tensor([0.0, 2.0, -1e9])
    optimizer.step()
    assert_same(weights.detach(), th.tensor([1.0, 0.0, 5e8]))
    assert guard.dropped == 0


def test_loaded_and_copied_agents_are_guarded_too(tmp_path):
    trained(steps=80, kind=MnMTQC).save(tmp_path / "agent")
    loaded = MnMTQC.load(tmp_path / "agent", env=environments(1)).learn(60)
    for model in (copy.deepcopy(loaded), loaded):
        model.replay_buffer.rewards[:] = np.nan
        with pytest.raises(ValueError, match="gradients of the last 1 gradient steps"):
            model.train(gradient_steps=1)
        assert all(x.isfinite().all() for x in all_of(model))


# -- critics --


def test_the_bound_of_values_is_a_geometric_series():
    # A reward of at most 2 and a bonus of at most 1 a step, over 1 / (1 - 0.9) = 10 steps.
    assert value_bound(paid=2.0, entropy=1.0, gamma=0.9) == pytest.approx(30.0)
    assert value_bound(paid=0.0, entropy=0.0, gamma=0.9) == 1.0
    assert value_bound(paid=1.0, entropy=0.0, gamma=1.0) == math.inf


@KINDS
def test_critics_that_diverge_are_logged_and_told_once(kind, capsys, monkeypatch):
    soon(monkeypatch)
    model = trained(steps=120, kind=kind, verbose=0)
    assert 0 <= model.logger.name_to_value["train/value_ratio"] < guards.DIVERGED
    model.verbose = 1
    with th.no_grad():
        for network in (model.critic, getattr(model, "critic_target", model.critic)):
            for parameter in [p for p in network.parameters() if p.dim() == 1]:
                parameter.add_(1e6)
    capsys.readouterr()
    for _ in range(3):
        model._fitted_at = -1000
        model.train(gradient_steps=1)
    assert model.logger.name_to_value["train/value_ratio"] > guards.DIVERGED
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "critics" in line]
    assert "lower learning_rate" in line


def test_nothing_is_told_when_silent(capsys, monkeypatch):
    soon(monkeypatch)
    monkeypatch.setattr(guards, "DIVERGED", 0.0)
    trained(steps=120)
    assert capsys.readouterr().out == ""
