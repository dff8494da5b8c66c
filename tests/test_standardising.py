"""Networks that learn in standardised inputs: units do not matter, and SB3 finds the networks that it knows."""

import copy

import gymnasium as gym
import pytest
import torch as th
from agents import BoxEnv, NormalizedExtractor, all_finite, environments, small, soon, trained
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn
from torch.testing import assert_close

from sb3_mismatch import MnM, standardising
from sb3_mismatch.standardising import (
    LEAST_STD,
    Scale,
    first_layers,
    least,
    raw,
    standard,
    standard_gradient,
    standardised,
)

MEAN, STD = th.tensor([3.0, -20.0, 0.0]), th.tensor([0.1, 5.0, 1.0])
SCALE = Scale(MEAN, STD)


def of_standardised(layer, scale=SCALE):
    """A layer that says of z what ``layer`` says of x."""
    other = nn.Linear(layer.in_features, layer.out_features)
    for mine, its in zip(other.parameters(), standard(layer.weight, layer.bias, scale), strict=True):
        mine.data.copy_(its.detach())
    return other


def batch():
    x = MEAN + STD * th.randn(50, 3)
    return x, (x - MEAN) / STD


def test_layers_say_of_z_what_they_say_of_x():
    layer, (x, z) = nn.Linear(3, 8), batch()
    assert_close(of_standardised(layer)(z), layer(x), rtol=1e-4, atol=1e-4)
    assert_close(raw(*standard(layer.weight, layer.bias, SCALE), SCALE), (layer.weight, layer.bias))


def test_gradients_are_those_of_the_other_layer():
    layer, (x, z) = nn.Linear(3, 8), batch()
    other = of_standardised(layer)
    layer(x).square().sum().backward()
    other(z).square().sum().backward()
    mine = standard_gradient(layer.weight.grad, layer.bias.grad, SCALE)
    assert_close(mine, (other.weight.grad, other.bias.grad), rtol=1e-3, atol=1e-1)


def test_learns_as_a_network_of_standardised_inputs():
    network = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    other = copy.deepcopy(network)
    other[0] = of_standardised(network[0])
    unlike, untrained = copy.deepcopy(network), copy.deepcopy(network)
    optimizer, its, plain = (th.optim.Adam(x.parameters(), lr=1e-2) for x in (network, other, unlike))
    x, z = batch()
    for _ in range(20):
        with standardised(optimizer, [network[0]], SCALE):
            for learner, inputs, each in ((network, x, optimizer), (other, z, its), (unlike, x, plain)):
                each.zero_grad()
                (learner(inputs) - z[:, :1]).square().mean().backward()
                each.step()
    assert_close(network(x), other(z), rtol=1e-3, atol=1e-3)
    assert (network(x) - untrained(x)).abs().max() > 0.1
    assert (network(x) - unlike(x)).abs().max() > 0.05


def test_the_optimizer_is_its_own_again_after_an_error():
    layer = nn.Linear(3, 8)
    optimizer = th.optim.Adam(layer.parameters())
    with standardised(optimizer, [layer], SCALE):
        assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    with pytest.raises(KeyError), standardised(optimizer, [layer], SCALE):
        raise KeyError
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 0


def test_a_constant_is_not_divided_by_its_noise():
    assert_close(least(th.tensor([99.0, 0.0, 0.0]), th.tensor([1e-9, 0.0, 2.0])), th.tensor([0.1, LEAST_STD, 2.0]))


#: from the first gradient step on there is a world
LATER = {"learning_starts": 70, "learning_rate": 1e-2, "real_ratio": 0.1}


class OtherUnits(gym.ObservationWrapper):
    """What is observed, in other units."""

    def observation(self, observation):
        return (observation - MEAN.numpy()) / STD.numpy()


def networks(model):
    return model.actor, model.critic, model.critic_target


def in_other_units(model):
    """A copy that has learned nothing, for :class:`OtherUnits`, and says there what ``model`` says."""
    settings = {**LATER, "policy_kwargs": model.policy_kwargs}
    other = MnM("MlpPolicy", OtherUnits(BoxEnv()), **small(**settings))
    other.policy.load_state_dict(model.policy.state_dict())
    with th.no_grad():
        for layer in (layer for network in networks(other) for layer in first_layers(network)):
            layer.bias += layer.weight[:, :3] @ MEAN
            layer.weight[:, :3] *= STD
    return other


def told(model, observations):
    """What all networks say of observations."""
    with th.no_grad():
        actions = model.actor(observations, deterministic=True)
        values = (x for critic in networks(model)[1:] for x in critic(observations, actions))
        return actions, model.actor.get_action_dist_params(observations)[1], *values


@pytest.mark.parametrize("net_arch", [[8], [], {"pi": [], "qf": [8]}], ids=["default", "none", "apart"])
def test_units_do_not_matter(net_arch, monkeypatch):
    """Metres or millimetres: the same actions, met by the same states, and in the end the same policy."""
    soon(monkeypatch)
    model = MnM("MlpPolicy", BoxEnv(), **small(**LATER, policy_kwargs={"net_arch": net_arch}))
    other, untrained = in_other_units(model), copy.deepcopy(model)
    for agent in (model, other):
        agent.set_random_seed(0)
        agent.learn(150)
    x = th.as_tensor(model.replay_buffer.observations[:150, 0])
    learned = told(model, x)
    assert_close(told(other, (x - MEAN) / STD), learned, rtol=1e-2, atol=1e-2)
    assert all((now - before).abs().max() > 0.05 for now, before in zip(learned, told(untrained, x), strict=True))


DICT = spaces.Dict({"b": spaces.Box(-9, 9, (2, 1)), "a": spaces.Box(-9, 9, (1,))})


@pytest.mark.parametrize(
    ("env", "settings", "expected"),
    [
        (lambda: environments(1), {}, True),
        (lambda: environments(2), {}, True),
        (lambda: BoxEnv(DICT), {}, True),
        (lambda: VecNormalize(environments(1), norm_obs=False), {}, True),
        (lambda: VecNormalize(environments(1), norm_reward=False), {}, False),
        (lambda: environments(1), {"expansion": 0}, False),
        (lambda: environments(1), {"real_ratio": 1.0}, False),
        (lambda: environments(1), {"policy_kwargs": {"features_extractor_class": NormalizedExtractor}}, False),
    ],
    ids=["one", "two", "Dict", "rewards", "observations", "rows", "SAC", "extractor"],
)
def test_who_standardises(env, settings, expected, monkeypatch):
    soon(monkeypatch)
    taken = []
    monkeypatch.setattr(standardising, "standard", lambda *layer: (taken.append(layer[-1]), standard(*layer))[1])
    model = trained(env(), **{"real_ratio": 0.1, **settings})
    assert all_finite(model)
    assert any((scale.std != 1).any() for scale in taken) == expected
