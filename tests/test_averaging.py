"""The average actor: what it is the mean of, and who plays it."""

import copy

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, soon, trained
from stable_baselines3 import SAC
from test_checkpoints import pendulums, resumed_and_not
from torch.testing import assert_close

from sb3_mismatch import MnM
from sb3_mismatch.averaging import MOST_OF_ALL, Average
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC

STATES = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def actions(policy, deterministic=True):
    th.manual_seed(0)
    return policy.predict(STATES, deterministic=deterministic)[0]


# -- what it is the mean of --


def test_a_step_of_many_is_that_many_of_an_actor_that_stays():
    actor = th.nn.Linear(3, 2)
    one, many = Average(th.nn.Linear(3, 2), 10), Average(th.nn.Linear(3, 2), 10)
    many.actor.load_state_dict(one.actor.state_dict())
    # From the fiftieth on, a fifth of all steps is no less than ten.
    one.n_taken = many.n_taken = 100
    for _ in range(7):
        one.follow(actor, 1)
    many.follow(actor, 7)
    assert_close(many.actor.state_dict(), one.actor.state_dict())
    assert one.n_taken == many.n_taken == 107
    far = Average(th.nn.Linear(3, 2), 10)
    far.follow(actor, 10_000)
    assert_close(far.actor.state_dict(), actor.state_dict())


def test_its_weights_decrease_exponentially_over_n_steps():
    actor, average = th.nn.Linear(1, 1), Average(th.nn.Linear(1, 1), 20)
    average.n_taken = 1000
    values = [0.3, -1.0, 2.0, 0.5] * 30
    for value in values:
        with th.no_grad():
            actor.weight.fill_(value)
        average.follow(actor, 1)
    weights = 1 / 20 * (1 - 1 / 20) ** np.arange(len(values))
    expected = np.dot(weights, values[::-1])
    assert average.actor.weight.item() == pytest.approx(expected, abs=0.005)


def test_at_first_it_goes_back_over_a_share_of_all_steps():
    actor, average = th.nn.Linear(1, 1), Average(th.nn.Linear(1, 1), 1000)
    for step in range(1, 101):
        before = average.actor.weight.item()
        with th.no_grad():
            actor.weight.fill_(float(step))
        average.follow(actor, 1)
        moved = (average.actor.weight.item() - before) / (step - before)
        assert moved == pytest.approx(1 / max(MOST_OF_ALL * step, 1), rel=1e-3)


def test_running_statistics_are_averaged_too():
    norm = th.nn.BatchNorm1d(2)
    average = Average(norm, 10)
    average.n_taken = 1000
    norm(th.randn(8, 2) + 5)
    average.follow(norm, 1)
    assert_close(average.actor.running_mean, 0.1 * norm.running_mean)


@pytest.mark.parametrize("kind", [MnM, MnMTQC, MnMCrossQ])
def test_it_follows_each_gradient_step_and_changes_nothing_of_training(kind):
    followed = trained(BoxEnv(), 150, kind, gradient_steps=3)
    alone = trained(BoxEnv(), 150, kind, gradient_steps=3, average_steps=0)
    assert alone._average is None
    assert_same(followed.get_parameters(), alone.get_parameters())
    assert followed._average.n_taken == followed._n_updates > 0
    assert (actions(followed.policy) == actions(alone.policy)).all()
    assert (actions(alone) == actions(alone.policy)).all()


# -- who plays it --


@pytest.mark.parametrize("kind", [MnM, MnMTQC, MnMCrossQ])
def test_predict_plays_the_average(kind):
    model = trained(BoxEnv(), 150, kind)
    average = copy.deepcopy(model)
    average.actor.load_state_dict(model._average.actor.state_dict())
    assert not np.allclose(actions(model), actions(model.policy))
    for deterministic in (True, False):
        assert (actions(model, deterministic) == actions(average.policy, deterministic)).all()
        assert (actions(model, deterministic) == actions(model.deployed_policy, deterministic)).all()
    assert model.policy.actor is model.actor


def test_what_learns_explores(monkeypatch):
    model = trained(BoxEnv(), 150)
    th.manual_seed(0)
    rolled = model._sample_action(0, None, 1)[0]
    th.manual_seed(0)
    assert (rolled == model.policy.predict(model._last_obs, deterministic=False)[0]).all()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_compiled_policy_gives_way_too():
    model = trained(BoxEnv(), 150)
    before = actions(model)
    model.policy = th.compile(model.policy)
    assert (actions(model) == before).all()


# -- saved --


def test_a_zip_holds_it_and_sac_opens_it(tmp_path):
    model = trained(BoxEnv(), 150)
    model.save(tmp_path / "agent")
    loaded = MnM.load(tmp_path / "agent")
    assert (actions(loaded) == actions(model)).all()
    assert (actions(loaded.policy) == actions(model.policy)).all()
    assert_same(loaded.get_parameters(), model.get_parameters())
    assert loaded._average.n_taken == model._average.n_taken
    assert (actions(SAC.load(tmp_path / "agent")) == actions(model)).all()
    anew = trained(BoxEnv(), 60)
    anew.set_parameters(tmp_path / "agent")
    assert_same(anew.get_parameters(), model.get_parameters())
    assert (actions(anew) == actions(model)).all()
    without = MnM.load(tmp_path / "agent", average_steps=0)
    assert (actions(without) == actions(model.policy)).all()
    model.save(tmp_path / "no_world", exclude=["world"])
    assert (actions(MnM.load(tmp_path / "no_world")) == actions(model)).all()
    trained(BoxEnv(), 60, average_steps=0).save(tmp_path / "none")
    begun = MnM.load(tmp_path / "none", average_steps=10)
    assert (actions(begun) == actions(begun.policy)).all()


def test_with_other_parameters_it_begins_anew():
    model, other = trained(BoxEnv(), 150), SAC("MlpPolicy", BoxEnv(), policy_kwargs={"net_arch": [8]})
    model.set_parameters(other.get_parameters())
    assert (actions(model) == actions(other)).all()
    assert model._average.n_taken == 0


@pytest.mark.parametrize("changed", [{}, {"use_sde": True}], ids=["gauss", "gsde"])
def test_a_run_is_continued(changed, tmp_path, monkeypatch):
    soon(monkeypatch)
    continued, whole = resumed_and_not(tmp_path, lambda: pendulums(1), stop=500, more=300, **changed)
    assert whole["averaged"] > 300
    assert_same(continued, whole)
