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
        (MnM, {}, PLAIN),
        (MnM, {"critic_layer_norm": True, "expansion": 0}, PLAIN),
        (MnM, {"critic_layer_norm": True, "real_ratio": 1.0}, PLAIN),
        (MBPO, {"critic_layer_norm": True}, PLAIN),
    ],
    ids=["MnM", "VMBPO", "default", "no expansion", "no imagination", "MBPO"],
)
def test_critics_that_look_ahead_are_normalised(kind, settings, layers, name):
    model = kind("MlpPolicy", BoxEnv(), **small(policy_kwargs={"net_arch": [8, 8]}, **settings))
    assert kinds(model, name) == [layers, layers]


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
    assert farthest(critic_layer_norm=True) < 5 < 1e4 < farthest()


def test_a_zip_keeps_normalised_critics_and_sac_finds_their_weights(monkeypatch, tmp_path):
    soon(monkeypatch)
    model = trained(BoxEnv(), 100, critic_layer_norm=True)
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
