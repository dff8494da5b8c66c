"""Trials: who plays them, what they earn, and whom predict plays."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, soon, trained
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv
from test_checkpoints import pendulums, resumed_and_not

from sb3_mismatch import MBPO, MnM
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC
from sb3_mismatch.trials import LOST, Trials

STATES = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def actions(policy):
    return policy.predict(STATES, deterministic=True)[0]


def linear(value):
    layer = th.nn.Linear(1, 1)
    with th.no_grad():
        layer.weight.fill_(value)
    return layer


class Watch(BaseCallback):
    """At each step: whether it is on trial, and what the modes of whoever is are beside the actions stored."""

    def __init__(self):
        super().__init__()
        self.on_trial, self.modes, self.stored, self.asked, self.averages = [], [], [], [], []

    def _on_step(self):
        actor = self.model._trials.actor
        self.on_trial.append(actor is not None)
        self.stored.append(self.locals["buffer_actions"].copy())
        self.asked.append(self.locals["actions"].copy())
        if actor is not None:
            policy = self.model._with_actor(actor)
            self.modes.append(policy.predict(self.model._last_obs, deterministic=True)[0])
            self.averages.append(copy.deepcopy(self.model._average.actor.state_dict()))
        return True


def watched(env, steps, kind=MnM, **changed):
    model, watch = trained(env, 1, kind, **{"trial_ratio": 0.2, **changed}), Watch()
    model.learn(steps, callback=watch)
    return model, watch


# -- what they are --


def test_the_best_is_kept():
    trials, actor = Trials(1.0), linear(0.0)
    for episode, earned in enumerate([10, 9, 30, 26]):
        with th.no_grad():
            actor.weight.fill_(float(episode))
        trials.begin(actor)
        with th.no_grad():
            actor.weight.fill_(-1.0)  # It learns on while it is on trial.
        trials.end(earned, 0)
        assert trials.actor is None
    # 26 of 10 to 30: less than a quarter is lost.
    assert trials.fallback is None
    trials.begin(actor)
    trials.end(20, 0)
    assert trials.fallback is trials.best
    trials.end(0, 0)  # Not on trial.
    assert (trials.first_return, trials.best_return, trials.last_return) == (10, 30, 20)
    assert trials.best.weight.item() == 2


@pytest.mark.parametrize(
    ("ratio", "lengths", "expected"),
    [
        (0.2, [10] * 11, [5, 10]),
        (0.5, [10] * 5, [2, 4]),
        (1.0, [10] * 3, [1, 2]),
        # One that outlives those before it is paid for by more of them.
        (0.2, [10, 10, 10, 10, 10, 100, 10, *[50] * 20], [5, 19, 24]),
    ],
)
def test_steps_on_trial_are_so_large_a_share(ratio, lengths, expected):
    trials, tried = Trials(ratio), []
    for episode, length in enumerate(lengths):
        if episode > 0:  # The first one begins before anybody has learned.
            trials.begin(linear(0.0))
        if trials.actor is not None:
            tried.append(episode)
        trials.end(0.0, length)
    assert tried == expected
    assert trials.n_tried == sum(lengths[i] for i in tried)


@pytest.mark.parametrize("returns", [[], [3.0], [-3.0], [-5.0, -3.0, -3.5]])
def test_without_a_loss_nothing_falls_back(returns):
    trials = Trials(1.0)
    for earned in returns:
        trials.begin(linear(0.0))
        trials.end(earned, 0)
    assert trials.fallback is None


def test_the_share_that_may_be_lost():
    trials = Trials(1.0)
    for earned, falls_back in [
        (-100, False),
        (0, False),
        (-100 * LOST + 1, False),
        (-100 * LOST - 1, True),
        (0, False),
    ]:
        trials.begin(linear(0.0))
        trials.end(earned, 0)
        assert (trials.fallback is trials.best) == falls_back


def test_who_explores_may_have_overtaken_the_best():
    trials = Trials(0.5)
    for earned in (-5.0, 40.0, 20.0):
        trials.actor = linear(0.0)
        trials.end(earned, 1)
    for earned, falls_back in [(20.0, True), (50.0, True), (60.0, False), (10.0, True), (0.0, True), (90.0, False)]:
        assert trials.actor is None
        trials.end(earned, 1)
        assert (trials.fallback is trials.best) == falls_back
    # Of the last five, 50, 60, 10, 0 and 90, the mean is 42.


# -- who plays them --


@pytest.mark.parametrize("kind", [MnM, MnMTQC, MnMCrossQ])
def test_the_average_as_it_was_plays_without_noise(kind):
    noise = NormalActionNoise(np.zeros(2), np.ones(2))
    _, watch = watched(BoxEnv(high=2.0), 230, kind, action_noise=noise)
    # Episodes of 20 steps; until learning_starts=50 nobody has learned.
    assert [i // 20 for i in range(0, 230, 20) if watch.on_trial[i]] == [5, 10]
    assert sum(watch.on_trial) == 40
    at = np.flatnonzero(watch.on_trial)
    np.testing.assert_allclose(np.array(watch.asked)[at], watch.modes, rtol=1e-6)
    np.testing.assert_allclose(np.array(watch.stored)[at], np.array(watch.modes) / 2, rtol=1e-6)
    # Meanwhile the average moves on.
    assert any((x != y).any() for x, y in zip(watch.averages[0].values(), watch.averages[19].values(), strict=True))


def test_whoever_has_not_learned_is_not_tried():
    _, watch = watched(BoxEnv(), 140, learning_starts=105)
    assert watch.on_trial == [False] * 120 + [True] * 20


def test_other_environments_explore_meanwhile():
    _, watch = watched(environments(3, lambda: BoxEnv()), 360)
    assert sum(watch.on_trial) == 20
    asked, modes = np.array(watch.asked)[watch.on_trial], np.array(watch.modes)
    np.testing.assert_allclose(asked[:, 0], modes[:, 0], rtol=1e-6)
    for others in (modes[:, 1:], asked[:, :1]):
        assert (np.abs(asked[:, 1:] - others) > 1e-3).mean() > 0.9


def test_dict_observations():
    space = gym.spaces.Dict({"a": gym.spaces.Box(-9, 9, (3,)), "b": gym.spaces.Box(-9, 9, (2,))})
    _, watch = watched(BoxEnv(space), 120)
    assert sum(watch.on_trial) == 20


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (MnM, {}),
        (MnM, {"trial_ratio": 0.2, "average_steps": 0}),
        (MnM, {"trial_ratio": 0.2, "real_ratio": 1.0}),
        (MBPO, {"trial_ratio": 0.2}),
    ],
    ids=["default", "average", "base", "mbpo"],
)
def test_who_has_none(kind, changed):
    assert trained(BoxEnv(), 150, kind, **changed)._trials is None


def test_none_without_a_monitor():
    _, watch = watched(DummyVecEnv([BoxEnv]), 150)
    assert not any(watch.on_trial)


# -- whom predict plays --


def fallen(kind=MnM, **changed):
    """An agent whose second trial earned less than its first two, and the actor that earned most."""
    model = trained(BoxEnv(), 150, kind, trial_ratio=1.0, **changed)
    model._begin_trials()
    for earned in (-30.0, -1.0, -20.0):
        model._trials.begin(model._average.actor)
        model._update_info_buffer([{"episode": {"r": earned, "l": 0}}], np.array([True]))
        if earned == -1.0:
            best = actions(model)
        with th.no_grad():
            th._foreach_add_(list(model._average.actor.parameters()), 0.1)
    return model, best


@pytest.mark.parametrize("kind", [MnM, MnMTQC, MnMCrossQ])
def test_predict_plays_the_best_where_the_last_is_behind(kind, capsys):
    model, best = fallen(kind, verbose=1)
    assert (actions(model) == best).all()
    assert not np.allclose(best, actions(model._with_actor(model._average.actor)))
    assert "The average actor earned -20.0 on trial, where -1.0 was reached before" in capsys.readouterr().out
    model._update_info_buffer([{"episode": {"r": -25.0, "l": 0}}], np.array([True]))
    assert (actions(model) == best).all()
    assert "The average actor" not in capsys.readouterr().out  # Told once.
    model._update_info_buffer([{"episode": {"r": -2.0, "l": 0}}], np.array([True]))
    assert (actions(model) == actions(model._with_actor(model._average.actor))).all()


def test_they_are_logged():
    model, _ = fallen()
    assert model.logger.name_to_value["trials/return"] == -20
    assert model.logger.name_to_value["trials/best_return"] == -1


def test_a_run_that_counts_anew_begins_them_anew():
    model, best = fallen()
    model.learn(1, reset_num_timesteps=False)
    assert (actions(model) == best).all()
    model.learn(1)
    assert model._trials.best is None


# -- saved --


@pytest.mark.parametrize("changed", [{}, {"use_sde": True}], ids=["gauss", "gsde"])
def test_a_zip_holds_them_and_sac_plays_the_best(changed, tmp_path):
    model, best = fallen(**changed)
    model._trials.begin(model._average.actor)
    model._trials.n_last, model._trials.explored = 3, [-4.0, -5.0]
    model.save(tmp_path / "agent")
    assert (actions(SAC.load(tmp_path / "agent")) == best).all()
    loaded = MnM.load(tmp_path / "agent")
    assert (actions(loaded) == best).all()
    assert_same(loaded._trials.state_dict(), model._trials.state_dict())
    assert (loaded._trials.n_last, loaded._trials.explored) == (3, [-4.0, -5.0])
    assert_same(loaded._average.actor.state_dict(), model._average.actor.state_dict())
    assert (actions(loaded.policy) == actions(model.policy)).all()
    without = MnM.load(tmp_path / "agent", trial_ratio=0)
    assert (actions(without) == actions(model._with_actor(model._average.actor))).all()
    model.set_parameters(SAC.load(tmp_path / "agent").get_parameters())
    assert model._trials.best is None


def test_a_run_is_continued_in_the_middle_of_one(tmp_path, monkeypatch):
    soon(monkeypatch)
    settings = {"stop": 500, "more": 250, "trial_ratio": 0.5}
    continued, whole = resumed_and_not(tmp_path, lambda: pendulums(1), **settings)
    assert whole["trials"]["n_tried"] == 200
    assert_same(continued, whole)
