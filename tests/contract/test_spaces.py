"""B: spaces, policies and networks."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import (
    BoxEnv,
    NormalizedExtractor,
    all_finite,
    assert_same,
    environments,
    policy_contents,
    sac_settings,
    small,
    trained,
)
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.torch_layers import CombinedExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from stable_baselines3.sac.policies import MlpPolicy, MultiInputPolicy, SACPolicy
from torch import nn

from sb3_mismatch import MBPO, MnM
from sb3_mismatch.objectives import lower_bound_reward

DICT = spaces.Dict({"position": spaces.Box(-np.inf, np.inf, (2, 2)), "speed": spaces.Box(-9, 9, (3,), np.float64)})


def learned(env, steps=60, **settings):
    """An agent whose world was fitted and has imagined rows in the shape of the space."""
    model = trained(env, steps, real_ratio=0.5, **settings)
    assert model._fitted_at is not None
    assert len(model.world.imagined) > 0
    assert all_finite(model)
    return model


@pytest.mark.parametrize("shape", [(1,), (2, 3), (2, 1, 2)])
def test_b1_actions_of_any_shape(shape):
    env = BoxEnv(action_shape=shape, high=3.0)
    model = learned(env)
    assert model.world.imagined.sample(5).actions.shape == (5, np.prod(shape))
    assert model.predict(env.reset()[0])[0].shape == shape
    assert max(np.abs(action).max() for action in env.asked) > 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_b2_observations_of_any_floating_type(dtype):
    model = learned(BoxEnv(spaces.Box(-np.inf, np.inf, (3,), dtype)))
    assert model.replay_buffer.observations.dtype == dtype
    assert model.world.imagined.sample(5).observations.dtype == th.float32
    assert model.world.dynamics.body.layers[0].weight.dtype == th.float32


@pytest.mark.parametrize("shape", [(4, 2), (2, 3, 2)])
def test_b3_observations_of_any_shape(shape):
    model = learned(BoxEnv(spaces.Box(-np.inf, np.inf, shape, np.float64)), objective="vmbpo")
    n = 10
    served = served_minibatch(model, n)
    assert served.observations.shape == served.next_observations.shape == (n, *shape)
    assert model.world.observations.dim == np.prod(shape)


def served_minibatch(model, n):
    """What the base algorithm is given in the round."""
    with model._serving(1):
        return model.replay_buffer.sample(n, env=model._vec_normalize_env)


def test_b3_stacked_frames():
    learned(VecFrameStack(environments(2, BoxEnv), n_stack=3), steps=120)


@pytest.mark.parametrize("policy", ["CnnPolicy", "MlpPolicy"])
def test_b4_images_are_refused_by_the_name_of_the_space(policy):
    with pytest.raises(ValueError, match=r"^observation_space = Box\(0, 255.* is an image"):
        MnM(policy, FakeImageEnv(discrete=False), device="cpu", buffer_size=10)


def test_b5_dicts_of_boxes():
    model = learned(BoxEnv(DICT))
    served = served_minibatch(model, 10)
    assert {key: part.shape for key, part in served.observations.items()} == {"position": (10, 2, 2), "speed": (10, 3)}
    assert model.world.observations.dim == 7


def test_b5_dicts_of_boxes_in_several_environments():
    model = learned(environments(3, lambda: BoxEnv(DICT)), steps=120)
    assert len(model._real_transitions()) == 120


def test_b5_dicts_with_real_rows_alone_equal_sac():
    reference = SAC("MultiInputPolicy", BoxEnv(DICT), **sac_settings()).learn(80)
    ours = trained(BoxEnv(DICT), 80, MBPO, real_ratio=1.0)
    assert ours._fitted_at is not None
    assert_same(policy_contents(ours), policy_contents(reference))


def test_b5_dicts_that_hold_an_image_are_refused():
    with pytest.raises(ValueError, match=r"^observation_space\['img'\] = .* is an image"):
        MnM("MultiInputPolicy", SimpleMultiObsEnv(discrete_actions=False), device="cpu", buffer_size=10)


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(4)])
def test_b6_observations_without_order_are_refused_with_a_way_out(space):
    class Env(BoxEnv):
        def _observe(self, space):
            return space.sample()

    with pytest.raises(ValueError, match=r"is no Box: .*FlattenObservation"):
        MnM("MlpPolicy", Env(space), **small())
    # The way out.
    learned(gym.wrappers.FlattenObservation(Env(spaces.Discrete(3))))


def test_b7_goals_relabelled_in_hindsight_are_refused():
    with pytest.raises(ValueError, match=r"^replay_buffer_class=HerReplayBuffer .*stable_baselines3.SAC"):
        MnM("MultiInputPolicy", BitFlippingEnv(continuous=True), replay_buffer_class=HerReplayBuffer, device="cpu")


def test_b8_mlp_policy_over_dicts_is_refused_as_by_sac():
    with pytest.raises(ValueError, match="You must use `MultiInputPolicy`"):
        MnM("MlpPolicy", BoxEnv(DICT), **small())


class Doubled(CombinedExtractor):
    """A user's extractor of dicts."""


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"net_arch": []},
        {"net_arch": {"pi": [4], "qf": [8, 8]}},
        {"net_arch": [8], "n_critics": 1},
        {"net_arch": [8], "n_critics": 3, "activation_fn": nn.Tanh},
        {"net_arch": [8], "optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}},
        {"net_arch": [8], "features_extractor_class": NormalizedExtractor, "share_features_extractor": True},
        {"net_arch": [8], "use_expln": True, "log_std_init": -2, "clip_mean": 1.0},
    ],
    ids=lambda kwargs: "-".join(f"{name}" for name in kwargs),
)
@pytest.mark.parametrize("use_sde", [False, True], ids=["", "gSDE"])
def test_b9_every_policy_kwarg(policy_kwargs, use_sde):
    learned(BoxEnv(), 60, policy_kwargs=dict(policy_kwargs), use_sde=use_sde, objective="vmbpo")


def test_b9_extractors_of_dicts():
    learned(BoxEnv(DICT), policy_kwargs={"net_arch": [8], "features_extractor_class": Doubled})


def test_b10_imagining_leaves_running_statistics_alone():
    env = BoxEnv()
    policy_kwargs = {
        "net_arch": [8],
        "features_extractor_class": NormalizedExtractor,
        "features_extractor_kwargs": {"dropout": 0.5},
    }
    model = learned(env, 60, policy_kwargs=policy_kwargs, objective="vmbpo")
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    mode = []
    model.actor.register_forward_hook(lambda module, *_: mode.append(module.training))
    model.num_timesteps += 200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_mismatch.fast_sac.FastSAC.train", lambda *_: None)
        model.train(gradient_steps=1)
    assert model._fitted_at == model.num_timesteps
    assert mode
    assert not any(mode)
    assert_same(dict(model.policy.state_dict()), before)


def test_b10_predict_is_deterministic_in_evaluation_mode():
    policy_kwargs = {
        "net_arch": [8],
        "features_extractor_class": NormalizedExtractor,
        "features_extractor_kwargs": {"dropout": 0.5},
    }
    model = learned(BoxEnv(), 60, policy_kwargs=policy_kwargs)
    observation = np.ones((1, 3), np.float32)
    assert_same(model.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0])
    assert not model.deployed_policy.actor.training


def test_b11_a_policy_class_in_place_of_its_name():
    class Own(SACPolicy):
        pass

    model = MnM(Own, BoxEnv(), **small()).learn(60)
    assert type(model.policy) is Own
    assert MnM(MultiInputPolicy, BoxEnv(DICT), **small()).learn(60)._fitted_at is not None


def test_b12_infinite_bounds_and_spaces_of_ones_own():
    class Own(spaces.Box):
        pass

    model = learned(BoxEnv(Own(-np.inf, np.inf, (3,))))
    imagined = model.world.imagined.sample(100)
    assert imagined.next_observations.isfinite().all()


def test_b12_imagined_states_stay_near_what_was_met():
    model = learned(BoxEnv(), 60)
    batch = model._real_transitions().batch
    low, high = batch.next_observations.amin(dim=0), batch.next_observations.amax(dim=0)
    with th.no_grad():
        model.world.dynamics.body.layers[-1].bias.fill_(1000.0)
    imagined, _ = model.world.dynamics.sample(batch.observations, batch.actions)
    assert (imagined >= low - (high - low)).all()
    assert (imagined <= high + (high - low)).all()


def test_b13_critics_see_the_objectives_reward():
    served = {}
    for objective in ("mbpo", "mnm"):
        model = learned(BoxEnv(), objective=objective, reward_shift="auto", log_ratio_weight=0.0)
        payment, rewards = model._payment(), th.tensor([[0.5]])
        served[objective] = replace(payment, unit=1.0).real(rewards)
    assert_same(served["mbpo"], rewards)
    assert_same(served["mnm"], lower_bound_reward(rewards + payment.offset, th.zeros(1, 1), model.gamma))


def test_b14_the_policy_is_sacs_own():
    ours, theirs = MnM("MlpPolicy", BoxEnv(), **small()), SAC("MlpPolicy", BoxEnv(), **sac_settings())
    assert type(ours.policy) is type(theirs.policy) is MlpPolicy
    assert_same(dict(ours.policy.state_dict()), dict(theirs.policy.state_dict()))


@pytest.mark.parametrize("n_envs", [1, 2])
def test_b2_sb3s_environment_of_identity(n_envs):
    env = DummyVecEnv([lambda: IdentityEnvBox(eps=0.5)] * n_envs)
    model = learned(env, 60 * n_envs)
    action, _ = model.predict(env.reset(), deterministic=True)
    assert action.shape == (n_envs, 1)
