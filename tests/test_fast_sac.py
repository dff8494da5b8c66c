"""FastSAC is SB3's SAC: the same draws, the same weights after every step."""

import numpy as np
import pytest
import torch as th
from agents import NormalizedExtractor, assert_same, environments, policy_contents, sac_settings
from stable_baselines3 import SAC
from stable_baselines3.common.logger import Logger

from sb3_mismatch.fast_sac import FastSAC


def pair(steps, n_envs=1, normalize=False, **settings):
    """SB3's SAC and ours after the same steps."""
    models = []
    for kind in (SAC, FastSAC):
        model = kind("MlpPolicy", environments(n_envs, normalize=normalize), **sac_settings(**settings))
        models.append(model.learn(steps))
    return models


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("ent_coef", ["auto", 0.2])
def test_equals_sac_over_300_gradient_steps(ent_coef, n_envs):
    learning_starts = 50 * n_envs
    reference, ours = pair(
        learning_starts + 100 * n_envs, n_envs, ent_coef=ent_coef, learning_starts=learning_starts, gradient_steps=3
    )
    assert reference._n_updates == 300
    assert_same(policy_contents(ours), policy_contents(reference))


@pytest.mark.parametrize(
    "settings",
    [
        {"ent_coef": "auto_0.1"},
        {"use_sde": True, "sde_sample_freq": 4, "n_envs": 2},
        {"n_steps": 3},
        {"normalize": True, "n_envs": 2},
        {"target_update_interval": 2, "gradient_steps": 3, "train_freq": 3},
        {"policy_kwargs": {"net_arch": [8], "share_features_extractor": True}},
        {"policy_kwargs": {"net_arch": [8], "features_extractor_class": NormalizedExtractor}},
        {
            "policy_kwargs": {
                "net_arch": {"pi": [], "qf": [8]},
                "n_critics": 3,
                "features_extractor_class": NormalizedExtractor,
                "features_extractor_kwargs": {"dropout": 0.2},
                "share_features_extractor": True,
            }
        },
        {"learning_rate": lambda progress: 1e-3 * progress},
    ],
    ids=[
        "auto_0.1",
        "gSDE",
        "n_steps",
        "VecNormalize",
        "target_update_interval",
        "shared_extractor",
        "BatchNorm",
        "n_critics_and_Dropout",
        "schedule",
    ],
)
def test_equals_sac_with(settings):
    reference, ours = pair(110, **settings)
    assert reference._n_updates >= 29
    assert_same(policy_contents(ours), policy_contents(reference))


def test_logs_what_sac_logs():
    logged = []
    for kind in (SAC, FastSAC):
        model = kind("MlpPolicy", environments(1), **sac_settings(learning_starts=20, gradient_steps=3))
        model.set_logger(Logger(folder=None, output_formats=[]))
        model.learn(60)
        logged.append({name: value for name, value in model.logger.name_to_value.items() if name.startswith("train/")})
    reference, ours = logged
    assert set(ours) == set(reference)
    assert len(ours) == 6
    for name, value in reference.items():
        assert ours[name] == pytest.approx(value, rel=1e-5), name


def test_learning_rate_zero_freezes_the_critic():
    model = FastSAC("MlpPolicy", environments(1), **sac_settings()).learn(60)
    model.lr_schedule = lambda _: 0.0
    before, target = [[p.clone() for p in net.parameters()] for net in (model.critic, model.critic_target)]
    model.train(gradient_steps=1)
    assert_same(list(model.critic.parameters()), before)
    assert not th.equal(next(model.critic_target.parameters()), target[0])


@pytest.mark.parametrize("reward", [np.nan, 1e30])
def test_a_loss_that_is_not_finite_is_told_and_reaches_no_weight(reward):
    model = FastSAC("MlpPolicy", environments(1), **sac_settings()).learn(60)
    model.replay_buffer.rewards[:] = reward
    with pytest.raises(ValueError, match=r"train/critic_loss is (nan|inf) .* diverged; lower learning_rate"):
        model.train(gradient_steps=3)
    assert all(weights.isfinite().all() for weights in model.policy.state_dict().values())
