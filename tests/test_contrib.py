"""The learned world over sb3-contrib's algorithms: their equals on real rows, their zips, their values."""

import inspect
import io
import json
import zipfile

import numpy as np
import pytest
import torch as th
from agents import (
    all_finite,
    assert_same,
    environments,
    policy_contents,
    sac_settings,
    soon,
    trained,
    world_contents,
    world_settings,
)
from sb3_contrib import TQC, CrossQ
from torch.testing import assert_close

from sb3_mismatch import OBJECTIVES
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC
from sb3_mismatch.mnm import ModelBased

BASES = pytest.mark.parametrize(("kind", "base"), [(MnMTQC, TQC), (MnMCrossQ, CrossQ)], ids=["TQC", "CrossQ"])
KINDS = pytest.mark.parametrize("kind", [MnMTQC, MnMCrossQ])


# -- the base algorithm's equal --


@pytest.mark.parametrize(
    ("objective", "n_envs", "settings"),
    [
        ("mbpo", 1, {}),
        ("vmbpo", 2, {"gradient_steps": 4}),
        ("mbpo", 1, {"use_sde": True, "sde_sample_freq": 4}),
        ("mnm-approx", 1, {"n_steps": 3, "ent_coef": 0.2}),
    ],
    ids=["default", "VecNormalize", "gSDE", "n_steps"],
)
@BASES
def test_real_rows_alone_equal_the_base_over_100_gradient_steps(kind, base, objective, n_envs, settings, monkeypatch):
    soon(monkeypatch)
    settings = sac_settings(**{"gradient_steps": 2, "learning_starts": 60 * n_envs, **settings})
    world = world_settings(real_ratio=1.0, objective=objective, model_train_freq=25 * n_envs, imagined_per_step=4)
    models = []
    for make, arguments in ((base, settings), (kind, {**settings, **world})):
        model = make("MlpPolicy", environments(n_envs, normalize=n_envs > 1), **arguments)
        models.append(model.learn(110 * n_envs))
    reference, ours = models
    assert reference._n_updates == 100 * n_envs
    assert ours._fitted_at > 85 * n_envs
    assert len(ours.world.imagined) > 50 * n_envs
    assert_same(policy_contents(ours), policy_contents(reference))


@KINDS
def test_training_is_the_bases_own(kind):
    assert "train" not in vars(kind)
    assert kind.__mro__[1] is ModelBased


@BASES
def test_the_bases_arguments_come_first_and_in_order(kind, base):
    theirs, ours = (list(inspect.signature(k).parameters.values()) for k in (base, kind))
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    defaults = {p.name: p.default for p in theirs} | kind.base_defaults
    assert {p.name: p.default for p in ours[: len(theirs)]} == defaults
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    model = kind("MlpPolicy", "Pendulum-v1", 2e-3, 500, device="cpu")
    assert (model.learning_rate, model.buffer_size) == (2e-3, 500)


# -- objectives --


@pytest.mark.parametrize("objective", OBJECTIVES)
@KINDS
def test_300_steps_of_each_objective(kind, objective):
    model = trained(
        "Pendulum-v1", 300, kind, objective=objective, learning_starts=280, reward_shift="auto", model_train_freq=10
    )
    assert model._fitted_at > 280
    assert len(model.world.imagined) >= 20
    assert all_finite(model)


def test_the_value_under_tqc_is_the_mean_of_the_kept_quantiles(monkeypatch):
    model = MnMTQC(
        "MlpPolicy",
        "Pendulum-v1",
        top_quantiles_to_drop_per_net=1,
        policy_kwargs={"n_quantiles": 3, "n_critics": 2, "net_arch": [8]},
        device="cpu",
    )
    # Of six quantiles the two highest are dropped: (1 + 2 + 3 + 4) / 4 = 2.5.
    quantiles = th.tensor([[[6.0, 1.0, 3.0], [2.0, 5.0, 4.0]]])
    monkeypatch.setattr(model.critic_target, "forward", lambda observations, actions: quantiles)
    monkeypatch.setattr(model.actor, "action_log_prob", lambda observations: (th.zeros(1, 1), th.tensor([-2.0])))
    assert_close(model._soft_value(th.zeros(1, 3), th.tensor(0.5)), th.tensor([[3.5]]))


def test_the_value_under_crossq_is_the_lowest_critics(monkeypatch):
    model = MnMCrossQ("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8]}, device="cpu")
    values = (th.tensor([[4.0], [1.0]]), th.tensor([[2.0], [3.0]]))
    monkeypatch.setattr(model.critic, "forward", lambda observations, actions: values)
    monkeypatch.setattr(model.actor, "action_log_prob", lambda observations: (th.zeros(2, 1), th.tensor([-2.0, 4.0])))
    assert_close(model._soft_value(th.zeros(2, 3), th.tensor(0.5)), th.tensor([[3.0], [-1.0]]))


@KINDS
def test_the_value_is_differentiable_and_leaves_running_statistics_alone(kind):
    model = trained("Pendulum-v1", 80, kind)
    model.policy.set_training_mode(False)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    flat = th.randn(6, 3, requires_grad=True)
    values = model._value(flat)
    assert values.shape == (6, 1)
    (gradient,) = th.autograd.grad(values.sum(), flat)
    assert gradient.abs().sum(dim=1).min() > 0
    assert_same(dict(model.policy.state_dict()), before)


# -- save and load --


@pytest.fixture(params=[(MnMTQC, TQC), (MnMCrossQ, CrossQ)], ids=["TQC", "CrossQ"])
def saved(request, monkeypatch):
    """A trained agent, its zip, its class and its base's."""
    soon(monkeypatch)
    kind, base = request.param
    model, archive = trained("Pendulum-v1", 120, kind, objective="vmbpo"), io.BytesIO()
    model.save(archive)
    return model, archive, kind, base


def test_a_loaded_model_holds_what_was_saved_and_continues(saved):
    model, archive, kind, _ = saved
    copy = kind.load(archive, env=environments(1), device="cpu")
    copy.replay_buffer = model.replay_buffer
    assert_same(policy_contents(copy), policy_contents(model))
    assert_same(world_contents(copy), world_contents(model))
    copy.learn(120, reset_num_timesteps=False)
    assert copy.num_timesteps == 240
    assert copy._fitted_at > 120
    assert copy._n_updates > model._n_updates
    assert all_finite(copy)


def test_the_base_opens_our_zip(saved):
    model, archive, _, base = saved
    assert json.loads(zipfile.ZipFile(archive).read("data"))["policy_class"]["__module__"].startswith("sb3_contrib.")
    theirs = base.load(archive, env=environments(1), device="cpu")
    assert type(theirs) is base
    observations = np.random.default_rng(0).normal(size=(5, 3))
    assert_same(theirs.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0])
    theirs.learn(80)
    assert theirs._n_updates > model._n_updates


def test_our_class_opens_the_bases_zip(saved):
    _, _, kind, base = saved
    theirs, archive = base("MlpPolicy", environments(1), **sac_settings()).learn(80), io.BytesIO()
    theirs.save(archive)
    ours = kind.load(archive, env=environments(1), device="cpu", **world_settings())
    assert_same(dict(ours.policy.state_dict()), dict(theirs.policy.state_dict()))
    assert ours._fitted_at is None
    ours.learn(120)
    assert ours._fitted_at is not None
