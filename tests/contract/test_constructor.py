"""A: the constructor."""

import inspect

import gymnasium as gym
import numpy as np
import pytest
from agents import BoxEnv, all_finite, assert_same, environments, sac_settings, small, trained, weights, world_settings
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnvBox
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.utils import ConstantSchedule, LinearSchedule

from sb3_mismatch import MBPO, VMBPO, MnM

OURS = list(world_settings(objective="mbpo", real_ratio=0.5, horizon=2, imagined_n_steps=2))
OURS += ["log_ratio_weight", "novelty_weight", "adversarial_weight", "likelihood_weight"]
OURS += ["reward_shift", "reward_floor"]
OURS += ["termination_fn", "reward_fn", "figures_every", "average_steps"]
OURS += ["expansion", "actor_rate", "critic_layer_norm", "imagine_freq", "random_steps"]


@pytest.mark.parametrize("kind", [MnM, VMBPO, MBPO])
def test_a1_sacs_arguments_come_first_and_in_order(kind):
    theirs = inspect.signature(SAC).parameters
    ours = inspect.signature(kind).parameters
    assert len(theirs) == 28
    assert list(ours)[:28] == list(theirs)
    changed = {name for name in theirs if ours[name].default != theirs[name].default}
    assert changed == ({"gradient_steps"} if kind is MBPO else {"learning_rate", "tau", "gamma"})
    behind = list(ours.values())[28:]
    assert {parameter.name for parameter in behind} == {*OURS, "compile"}
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in behind)


def test_a1_positional_arguments_mean_what_they_mean_to_sac():
    given = ["MlpPolicy", gym.make("Pendulum-v1"), 1e-3, 500, 20, 32, 0.01, 0.9, (2, "step"), 3, None, None, None]
    given += [False, 1, 0.3, 2, -2.0, True, 4, True, 10, None, {"net_arch": [8]}, 0, 7, "cpu", True]
    theirs, ours = SAC(*given), MnM(*given)
    for name in inspect.signature(SAC).parameters:
        if name not in ("policy", "env", "policy_kwargs", "_init_setup_model"):
            name = "_stats_window_size" if name == "stats_window_size" else name
            assert getattr(ours, name) == getattr(theirs, name), name
    assert_same(weights(ours), weights(theirs))


def test_a1_defaults_reach_the_attributes():
    model = MnM("MlpPolicy", None, _init_setup_model=False)
    for name, parameter in inspect.signature(MnM).parameters.items():
        if name not in ("policy", "env", "device", "_init_setup_model", "policy_kwargs", "replay_buffer_kwargs"):
            name = "_stats_window_size" if name == "stats_window_size" else name
            assert getattr(model, name) == parameter.default, name


def test_a2_arguments_are_stored_raw_and_derived_at_set_up():
    given = {
        **world_settings(objective="mnm", horizon=[0, 100, 1, 5], reward_shift="auto", log_ratio_weight=0.5),
        "termination_fn": lambda s, a, t: a[:, 0] > 2,
    }
    model = MnM("MlpPolicy", None, _init_setup_model=False, **given)
    assert not hasattr(model, "world")
    for name, value in given.items():
        assert getattr(model, name) is value, name
    # What set-up derives follows what is changed in between, as load() changes it.
    model = MnM("MlpPolicy", BoxEnv(), _init_setup_model=False, **small())
    model.n_members, model.n_elites = 4, 3
    model._setup_model()
    assert model.world.dynamics.n_members == 4
    assert model.world.dynamics.n_elites == 3


def test_a2_bad_values_are_told_at_set_up_not_before():
    model = MnM("MlpPolicy", None, _init_setup_model=False, n_elites=9)
    with pytest.raises(ValueError, match=r"^n_elites=9 is more than n_members=5"):
        model._setup_model()


def test_a3_set_up_may_run_twice():
    model = MnM("MlpPolicy", BoxEnv(), **small(horizon=[0, 100, 1, 5], train_freq=(2, "step")))
    before = {name: getattr(model, name) for name in [*OURS, "train_freq", "target_entropy", "replay_buffer_class"]}
    model._setup_model()
    assert {name: getattr(model, name) for name in before} == before
    model.learn(60)


def test_a4_policy_kwargs_go_to_the_policy_alone():
    policy_kwargs = {"net_arch": [8]}
    model = MnM("MlpPolicy", BoxEnv(), **small(policy_kwargs=policy_kwargs))
    assert model.policy_kwargs is policy_kwargs
    assert set(policy_kwargs) == {"net_arch", "use_sde"}
    with pytest.raises(TypeError, match="n_members"):
        MnM("MlpPolicy", BoxEnv(), **small(policy_kwargs={"n_members": 3}))


@pytest.mark.parametrize(
    ("policy", "env", "settings", "error"),
    [
        ("MlpPolicy", "CartPole-v1", {}, AssertionError),
        ("CnnPolicy", FakeImageEnv(discrete=False), {"buffer_size": 10}, ValueError),
        ("MlpPolicy", BoxEnv(), {"replay_buffer_class": HerReplayBuffer}, ValueError),
        ("MlpPolicy", BoxEnv(), {"objective": "unknown"}, ValueError),
        ("NoPolicy", BoxEnv(), {}, ValueError),
    ],
    ids=["actions", "images", "HER", "objective", "policy"],
)
def test_a5_what_is_not_supported_is_told_at_construction(policy, env, settings, error):
    with pytest.raises(error):
        MnM(policy, env, device="cpu", **settings)


@pytest.mark.parametrize("env", [IdentityEnvBox(), BoxEnv()], ids=["rewards_of_zero", "negative_rewards"])
def test_a6_defaults_learn_whatever_the_rewards(env):
    # The first fit of the world, and one round after it.
    model = MnM(
        "MlpPolicy", env, policy_kwargs={"net_arch": [8]}, fit_kwargs={"dynamics_steps": 5, "classifier_steps": 2}
    )
    model.learn(model.learning_starts + 2)
    assert model._fitted_at == model.learning_starts + 1
    assert all_finite(model)


def test_a7_no_warnings_with_a_buffer_smaller_than_a_batch(recwarn):
    trained(steps=200, buffer_size=100, batch_size=256, learning_starts=100)
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    ("train_freq", "expected"),
    [(4, (4, "step")), ((5, "step"), (5, "step")), ((1, "episode"), (1, "episode"))],
)
def test_a8_train_freq(train_freq, expected):
    model = trained(BoxEnv(length=10), 70, train_freq=train_freq)
    assert isinstance(model.train_freq, TrainFreq)
    assert (model.train_freq.frequency, model.train_freq.unit.value) == expected
    frequency = 10 if expected[1] == "episode" else expected[0]
    assert model._n_updates == (70 + frequency - 1) // frequency - 50 // frequency
    assert model._fitted_at is not None


@pytest.mark.parametrize("train_freq", ["episode", (1, "seconds"), (1.5, "step")])
def test_a8_bad_train_freq_is_told(train_freq):
    with pytest.raises(ValueError, match="train_freq"):
        MnM("MlpPolicy", BoxEnv(), **small(train_freq=train_freq))


def test_a8_episodes_need_a_single_environment():
    with pytest.raises(AssertionError, match="only one env"):
        trained(environments(2), 60, train_freq=(1, "episode"))


@pytest.mark.parametrize(
    "learning_rate", [0.0, lambda progress: 1e-3 * progress, ConstantSchedule(1e-3), LinearSchedule(1e-3, 1e-4, 1.0)]
)
def test_a9_learning_rate_may_be_a_schedule(learning_rate):
    model = trained(steps=60, learning_rate=learning_rate, actor_rate=1.0)
    assert model.learning_rate is learning_rate
    expected = model.lr_schedule(model._current_progress_remaining)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=2e-5)
    # The world's own.
    assert model.world.dynamics_optimizer.param_groups[0]["lr"] == 2e-3


def test_a9_the_world_learns_at_rates_of_its_own():
    model = trained(
        steps=60,
        learning_rate=0.0,
        dynamics_kwargs={"net_arch": [8], "learning_rate": 0.01},
        classifier_kwargs={"net_arch": [8], "learning_rate": 0.02},
    )
    assert {group["lr"] for group in model.world.dynamics_optimizer.param_groups} == {0.01}
    assert {group["lr"] for group in model.world.classifier_optimizer.param_groups} == {0.02}


def test_a1_action_noise_and_every_form_of_ent_coef_construct():
    for ent_coef in ("auto", "auto_0.1", 0.1):
        noise = NormalActionNoise(np.zeros(2), np.ones(2))
        model = MnM("MlpPolicy", BoxEnv(), action_noise=noise, **sac_settings(ent_coef=ent_coef))
        assert (model.ent_coef_optimizer is None) == (ent_coef == 0.1)
