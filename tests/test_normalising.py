"""Critics with a normalised last hidden layer: what they say far away, and that SAC finds the weights that it knows."""

import pytest
import torch as th
from agents import BoxEnv, assert_same, small, soon, trained
from stable_baselines3 import SAC
from torch import nn
from torch.testing import assert_close

from sb3_mismatch import MBPO, VMBPO, MnM
from sb3_mismatch.normalising import NormalisedLinear, layer_norm


def kinds(model, name="critic"):
    return [[type(layer) for layer in network] for network in getattr(model, name).q_networks]


NORMALISED = [nn.Linear, nn.ReLU, NormalisedLinear, nn.ReLU, nn.Linear]
PLAIN = [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("name", ["critic", "critic_target"])
@pytest.mark.parametrize(
    ("kind", "settings", "layers"),
    [
        (MnM, {"critic_layer_norm": True}, NORMALISED),
        (VMBPO, {"critic_layer_norm": True}, NORMALISED),
        (MnM, {"critic_layer_norm": False}, PLAIN),
        (MnM, {"critic_layer_norm": True, "expansion": 0}, PLAIN),
        (MnM, {"critic_layer_norm": True, "real_ratio": 1.0}, PLAIN),
        (MBPO, {"critic_layer_norm": True}, PLAIN),
    ],
    ids=["MnM", "VMBPO", "off", "no expansion", "no imagination", "MBPO"],
)
def test_critics_that_look_ahead_are_normalised(kind, settings, layers, name):
    model = kind("MlpPolicy", BoxEnv(), **small(policy_kwargs={"net_arch": [8, 8]}, **settings))
    assert kinds(model, name) == [layers, layers]


@pytest.mark.parametrize(("terminates", "layers"), [(True, PLAIN), (False, NORMALISED)])
def test_by_default_critics_are_normalised_where_no_episode_ends_early(terminates, layers, monkeypatch):
    soon(monkeypatch)
    settings = small(policy_kwargs={"net_arch": [8, 8]}, random_steps=60)
    model = MnM("MlpPolicy", BoxEnv(terminates=terminates), **settings)
    assert kinds(model) == [PLAIN, PLAIN]
    model.learn(70)
    assert model._n_updates > 0
    for name in ("critic", "critic_target"):
        assert kinds(model, name) == [layers, layers]
    # An end that comes later, or none any more, leaves critics that have learned as they are.
    model.set_env(BoxEnv(terminates=not terminates))
    model.replay_buffer.reset()
    model.learn(120, reset_num_timesteps=False)
    assert kinds(model) == [layers, layers]


def test_ends_that_are_met_while_actions_are_random_count(monkeypatch):
    """The first rows know of no end; those before the first update do."""
    soon(monkeypatch, rows=10)
    model = MnM("MlpPolicy", BoxEnv(terminates=True), **small(learning_starts=10, random_steps=30, model_train_freq=5))
    model.learn(18)
    assert isinstance(model.critic.q_networks[0][0], NormalisedLinear)
    model.learn(20, reset_num_timesteps=False)
    assert model._n_updates > 0
    assert not isinstance(model.critic.q_networks[0][0], NormalisedLinear)


def test_critics_that_sac_has_trained_stay_as_they_are(monkeypatch, tmp_path):
    soon(monkeypatch)
    SAC("MlpPolicy", BoxEnv(), policy_kwargs={"net_arch": [8, 8]}, learning_starts=10).learn(20).save(tmp_path / "sac")
    model = MnM.load(tmp_path / "sac", env=BoxEnv(), device="cpu").learn(70)
    assert kinds(model) == [PLAIN, PLAIN]


def test_the_policy_is_sacs():
    """The same weights from the same seed, under the same names, in the same optimizers; the actor is as it was."""
    settings = {"policy_kwargs": {"net_arch": [8]}, "seed": 0}
    model = MnM("MlpPolicy", BoxEnv(), critic_layer_norm=True, **settings)
    sac = SAC("MlpPolicy", BoxEnv(), **settings)
    ours, theirs = model.policy.state_dict(), sac.policy.state_dict()
    assert ours.keys() == theirs.keys()
    assert_same(ours, theirs)
    optimized = model.critic.optimizer.param_groups[0]["params"]
    assert [id(p) for p in model.critic.parameters()] == [id(p) for p in optimized]
    assert repr(model.actor) == repr(sac.actor)


def test_rows_have_mean_zero_and_variance_one():
    x = 5 + 3 * th.randn(20, 64)
    normalised = layer_norm(x)
    assert_close(normalised, (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True), rtol=1e-4, atol=1e-4)
    layer = NormalisedLinear(64, 8)
    assert_close(layer(x), layer_norm(nn.functional.linear(x, layer.weight, layer.bias)))


def farthest(**settings):
    """The largest value of states and actions a million deviations off, over the largest of those nearby."""
    model = MnM("MlpPolicy", BoxEnv(), **small(policy_kwargs={"net_arch": [32, 32]}, **settings))
    s, a = th.randn(200, 3), th.rand(200, 2)
    with th.no_grad():
        far, near = (th.cat(model.critic(scale * s, scale * a), dim=1).abs().max().item() for scale in (1e6, 1.0))
    return far / near


def test_far_away_values_do_not_run_away():
    assert farthest(critic_layer_norm=True) < 5 < 1e4 < farthest(critic_layer_norm=False)


@pytest.mark.parametrize("critic_layer_norm", [True, "auto"])
def test_a_zip_keeps_normalised_critics_and_sac_finds_their_weights(critic_layer_norm, monkeypatch, tmp_path):
    soon(monkeypatch)
    model = trained(BoxEnv(), 100, critic_layer_norm=critic_layer_norm)
    assert isinstance(model.critic.q_networks[0][0], NormalisedLinear)
    model.save(tmp_path / "agent")
    loaded, sac = (kind.load(tmp_path / "agent", device="cpu") for kind in (MnM, SAC))
    assert kinds(loaded) == kinds(model)
    s, a = th.randn(20, 3), th.rand(20, 2)
    with th.no_grad():
        assert_same(loaded.critic(s, a), model.critic(s, a))
    assert_same(sac.critic.state_dict(), model.critic.state_dict())
    without = MnM.load(tmp_path / "agent", device="cpu", critic_layer_norm=False)
    assert_same(without.critic.state_dict(), model.critic.state_dict())
    assert kinds(without) == kinds(sac)
