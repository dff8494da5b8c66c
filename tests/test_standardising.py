"""Networks that learn on standardised observations: units do not matter, and SB3 finds the networks that it knows."""

import copy

import gymnasium as gym
import pytest
import torch as th
from agents import BoxEnv, NormalizedExtractor, all_finite, environments, small, soon, trained, weights
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch.testing import assert_close

from sb3_mismatch import MnM
from sb3_mismatch.standardising import LEAST_STD, first_layers, least, standardised

MEAN, STD = th.tensor([3.0, -20.0, 0.0]), th.tensor([0.1, 5.0, 1.0])
NET_ARCHS = {"default": [8], "none": [], "apart": {"pi": [], "qf": [8]}}


def networks(model):
    return model.actor, model.critic, model.critic_target


def told(model, observations):
    """What all networks say of observations."""
    with th.no_grad():
        actions = model.actor(observations, deterministic=True)
        values = (x for critic in networks(model)[1:] for x in critic(observations, actions))
        return actions, model.actor.get_action_dist_params(observations)[1], *values


@pytest.mark.parametrize("critic_layer_norm", [False, True])
@pytest.mark.parametrize("net_arch", NET_ARCHS.values(), ids=NET_ARCHS)
def test_layers_say_of_z_what_they_say_of_x(net_arch, critic_layer_norm):
    settings = small(policy_kwargs={"net_arch": net_arch}, critic_layer_norm=critic_layer_norm)
    model = MnM("MlpPolicy", BoxEnv(), **settings)
    x = MEAN + STD * th.randn(50, 3)
    before, kept = told(model, x), weights(model)
    with standardised(first_layers(networks(model)), MEAN, STD):
        assert_close(told(model, (x - MEAN) / STD), before, rtol=1e-4, atol=1e-4)
        assert (weights(model) - kept).abs().max() > 0.1
    assert_close(weights(model), kept, rtol=1e-4, atol=1e-5)


def test_layers_come_back_after_an_error():
    model = MnM("MlpPolicy", BoxEnv(), **small())
    kept = weights(model)
    with pytest.raises(KeyError), standardised(first_layers(networks(model)), MEAN, STD):
        raise KeyError
    assert_close(weights(model), kept, rtol=1e-4, atol=1e-5)


def test_a_constant_is_not_divided_by_its_noise():
    assert_close(least(th.tensor([99.0, 0.0, 0.0]), th.tensor([1e-9, 0.0, 2.0])), th.tensor([0.1, LEAST_STD, 2.0]))


#: from the first gradient step on there is a world
LATER = {"learning_starts": 70, "learning_rate": 1e-2}


class OtherUnits(gym.ObservationWrapper):
    """What is observed, in other units."""

    def observation(self, observation):
        return (observation - MEAN.numpy()) / STD.numpy()


def in_other_units(model):
    """A copy that has learned nothing, for :class:`OtherUnits`, and says there what ``model`` says."""
    other = MnM("MlpPolicy", OtherUnits(BoxEnv()), **small(**LATER))
    other.policy.load_state_dict(model.policy.state_dict())
    with th.no_grad():
        for layer in first_layers(networks(other)):
            layer.bias += layer.weight[:, :3] @ MEAN
            layer.weight[:, :3] *= STD
    return other


def test_units_do_not_matter(monkeypatch):
    """Metres or millimetres: the same actions, met by the same states, and in the end the same policy."""
    soon(monkeypatch)
    model = MnM("MlpPolicy", BoxEnv(), **small(**LATER))
    other, untrained = in_other_units(model), copy.deepcopy(model.policy)
    for agent in (model, other):
        agent.set_random_seed(0)
        agent.learn(150)
    x = th.as_tensor(model.replay_buffer.observations[:150, 0])
    assert_close(told(other, (x - MEAN) / STD), told(model, x), rtol=1e-2, atol=1e-2)
    with th.no_grad():
        assert (model.actor(x, deterministic=True) - untrained.actor(x, deterministic=True)).abs().max() > 0.1


def parameters(model):
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def stretched(model):
    """Whether the networks take standardised observations while they train."""
    taken, before = [], parameters(model)
    update = model._update_target
    model._update_target = lambda: (update(), taken.append(parameters(model)))
    model.lr_schedule = lambda _: 0.0
    model.tau = 0.0
    model.train(1, 16)
    assert_close(parameters(model), before, rtol=1e-4, atol=1e-5)
    return bool((taken[0] - before).abs().max() > 1e-3)


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
    model = trained(env(), **settings)
    assert all_finite(model)
    assert stretched(model) == expected
