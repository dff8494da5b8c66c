"""Trials: who plays them, who is proven, and what predict plays."""

import copy

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, small, soon, trained
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from test_checkpoints import pendulums, resumed_and_not
from torch.testing import assert_close

from sb3_mismatch import MnM
from sb3_mismatch import trials as module
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC
from sb3_mismatch.trials import N_RECENT, Trials

STATES = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)


def tried(env=None, steps=300, kind=MnM, **changed):
    env = BoxEnv(terminates=True) if env is None else env
    return trained(env, steps, kind, **{"trials": True, **changed})


def actions(policy, states=STATES, deterministic=True):
    return policy.predict(states, deterministic=deterministic)[0]


def moved(actor, by=0.3):
    with th.no_grad():
        for parameter in actor.parameters():
            parameter.add_(by)


# -- who plays --


def in_a_trial(model):
    model._trials.under_way, model._trials.is_trial = 0.0, True


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_first_environment_alone_is_played_by_the_player(n_envs):
    model = tried(environments(n_envs, BoxEnv), 300)
    moved(model._trials.player)

    def sampled():
        th.manual_seed(0)
        return model._sample_action(0, None, n_envs)

    in_a_trial(model)
    action, scaled = sampled()
    model._trials.abandon()
    plain = sampled()[0]
    # It does not explore, so that it draws nothing, and the others' actions are the learner's.
    expected = model._with(model._trials.player).predict(model._last_obs, deterministic=True)[0]
    assert_close(action[0], expected[0])
    assert_close(scaled[0], model.policy.scale_action(expected)[0])
    assert not np.allclose(action[0], plain[0])
    assert_close(action[1:], plain[1:])


def test_the_player_stays_as_it_is_while_the_actor_learns():
    seen = []

    class Watched(MnM):
        def _store_transition(self, *args, **kwargs):
            super()._store_transition(*args, **kwargs)
            if self._trials.is_trial:
                weights = next(self._trials.player.parameters())
                seen.append((self._trials.n_trials, weights.sum().item(), next(self.actor.parameters()).sum().item()))

    tried(steps=400, kind=Watched)
    trials = sorted({number for number, _, _ in seen})
    assert len(trials) > 3
    for number in trials:
        mine = [row for row in seen if row[0] == number]
        assert len({player for _, player, _ in mine}) == 1
        if len(mine) > 1:
            assert len({learner for _, _, learner in mine}) > 1


def test_an_episode_of_a_policy_that_learns_counts(monkeypatch):
    counted = []
    end = Trials.end
    monkeypatch.setattr(Trials, "end", lambda self: (counted.append(self.under_way), end(self)))
    model = tried(environments(1, BoxEnv, normalize=True), 300, learning_starts=100)
    returns = [episode["r"] for episode in model.ep_info_buffer]
    lengths = np.cumsum([episode["l"] for episode in model.ep_info_buffer])
    first = int(np.argmax(lengths > 101))
    assert len(counted) >= 3
    # In the environment's own rewards, not VecNormalize's.
    assert counted == pytest.approx(returns[first + 1 :], abs=1e-4)


# -- who is proven --


def test_who_earns_no_less_on_average_takes_the_place():
    actor = th.nn.Linear(1, 1).requires_grad_(False)
    trials = Trials(actor)
    proven = []
    # Every fourth is a trial, every third of them one of the proven actor. What others earn counts for nothing.
    for episode, earned in enumerate([9, 9, 9, -5, 9, 9, 9, -7, 9, 9, 9, -4, 9, 9, 9, -4, 9, 9, 9, -4.5], start=1):
        actor.weight.fill_(episode)
        trials.begin(actor, remaining=1.0)
        assert trials.is_trial == (episode % 4 == 0)
        assert trials.is_retrial == (episode % 12 == 0)
        if trials.is_trial:
            assert trials.player.weight.item() == (4 if trials.is_retrial else episode)
        trials.under_way += earned
        trials.end()
        assert (trials.under_way, trials.is_trial) == (None, False)
        if episode % 4 == 0:
            proven.append((trials.proven.weight.item(), trials.earned, trials.n_proven))
    assert proven == [(4, -5, 1), (4, -5, 1), (4, -4.5, 2), (16, -4, 1), (16, -4, 1)]


@pytest.mark.parametrize(
    ("remaining", "expected"),
    [
        (1.0, "...T...T"),
        (0.76, "...T...T"),
        (0.75, "..T..T.."),
        (0.5, ".T.T.T.T"),
        (0.25, "TTTTTTTT"),
        (0.0, "TTTTTTTT"),
    ],
)
def test_trials_are_more_towards_the_end(remaining, expected):
    actor = th.nn.Linear(1, 1)
    trials = Trials(actor)
    happened = ""
    for _ in expected:
        trials.begin(actor, remaining)
        happened += "T" if trials.is_trial else "."
        trials.end()
    assert happened == expected


def test_what_is_left_of_a_run_is_told(monkeypatch):
    told = []
    begin = Trials.begin
    monkeypatch.setattr(Trials, "begin", lambda self, actor, left: (told.append(left), begin(self, actor, left)))
    tried(steps=100)  # Episodes end each 20 steps; the first to count begins behind learning_starts.
    assert told == pytest.approx([0.4, 0.2, 0.0], abs=0.011)


def test_the_proven_actor_is_deployed_while_the_other_earns_less():
    actor = th.nn.Linear(1, 1)
    trials = Trials(actor)
    deployed = []
    for earned in (1, 1, 1, 5, 5, 6, 5, 4, 4, 4, 5, 1):
        trials.begin(actor, remaining=1.0)
        trials.under_way += earned
        trials.end()
        deployed.append((trials.deploys_proven, trials.recent))
    assert deployed == [
        # Who is proven is deployed until three episodes tell of the other.
        *((False, [1]), (False, [1, 1]), (False, [1, 1, 1]), (True, [])),
        *((True, [5]), (True, [5, 6]), (False, [5, 6, 5]), (False, [6, 5, 4])),
        # The twelfth is the proven actor's, who has then earned 3 on average.
        *((True, [5, 4, 4]), (True, [4, 4, 4]), (True, [4, 4, 5]), (False, [4, 4, 5])),
    ]
    assert trials.earned == 3


def proved(model):
    """A model whose proven actor is one that nobody else is."""
    trials = model._trials
    trials.proven.load_state_dict(model.actor.state_dict())
    moved(trials.proven)
    trials.earned, trials.n_proven, trials.recent = 1e6, 1, [0.0]
    return model


@pytest.mark.parametrize("kind", [MnM, MnMTQC, MnMCrossQ])
def test_predict_plays_the_proven_actor(kind):
    model = proved(tried(steps=100, kind=kind))
    assert not np.allclose(actions(model), actions(model.policy))
    proven = copy.deepcopy(model)
    proven.actor.load_state_dict(model._trials.proven.state_dict())
    assert (actions(model) == actions(proven.policy)).all()
    assert (actions(model) == actions(model.deployed_policy)).all()
    assert model.policy.actor is model.actor
    th.manual_seed(0)
    drawn = actions(model, deterministic=False)
    th.manual_seed(0)
    assert (drawn == actions(proven.policy, deterministic=False)).all()
    # Until the one that learns earns as much.
    model._trials.recent = [1e6] * N_RECENT
    assert (actions(model) == actions(model.policy)).all()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_compiled_policy_gives_way_too():
    model = proved(tried(steps=100))
    before = actions(model)
    model.policy = th.compile(model.policy)
    assert (actions(model) == before).all()


def test_what_was_proven_earns_it_again():
    """Without chance in the environment a trial and an evaluation are the same."""

    class Same(BoxEnv):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=0, options=options)

    model = tried(Same(), 800)
    assert model._trials.n_proven > 0
    model._trials.recent = []
    earned = evaluate_policy(model, Same(), n_eval_episodes=1, warn=False)[0]
    assert earned == pytest.approx(model._trials.earned, rel=1e-5)


def test_without_trials_predict_is_sb3s():
    model = trained(BoxEnv(terminates=True), 300)
    assert model._trials is None
    assert (actions(model) == actions(model.policy)).all()
    before = tried(steps=55)
    assert before._trials.n_proven == 0
    assert (actions(before) == actions(before.policy)).all()


# -- saved --


def test_a_zip_holds_them_and_sac_opens_it(tmp_path):
    model = proved(tried(steps=100))
    model.save(tmp_path / "agent")
    loaded = MnM.load(tmp_path / "agent")
    assert (actions(loaded) == actions(model)).all()
    assert_same(loaded._trials.state_dict(), model._trials.state_dict())
    assert (actions(SAC.load(tmp_path / "agent")) == actions(model.policy)).all()
    without = MnM.load(tmp_path / "agent", trials=False)
    assert (actions(without) == actions(model.policy)).all()
    model.save(tmp_path / "no_world", exclude=["world"])
    assert (actions(MnM.load(tmp_path / "no_world")) == actions(model)).all()
    trained(BoxEnv(), 60).save(tmp_path / "none")
    assert MnM.load(tmp_path / "none", trials=True)._trials.n_proven == 0


def test_with_other_parameters_nothing_is_proven():
    model, other = proved(tried(steps=100)), SAC("MlpPolicy", BoxEnv(), policy_kwargs={"net_arch": [8]})
    model.set_parameters(other.get_parameters())
    assert (actions(model) == actions(other)).all()


@pytest.mark.parametrize("changed", [{}, {"use_sde": True}], ids=["gauss", "gsde"])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_run_is_continued_in_the_midst_of_a_trial(n_envs, changed, tmp_path, monkeypatch):
    soon(monkeypatch)
    monkeypatch.setattr(module, "TRIAL_EVERY", 1)
    continued, whole = resumed_and_not(tmp_path, lambda: pendulums(n_envs), stop=500, more=300, trials=True, **changed)
    assert whole["trials"]["rest"]["under_way"] is not None
    assert_same(continued, whole)


def test_another_episode_is_no_trial():
    model = tried(steps=300)
    model._trials.under_way = 1.0
    model._setup_learn(10, reset_num_timesteps=False)
    assert model._trials.under_way == 1.0
    model._setup_learn(10)
    assert model._trials.under_way is None


def test_no_truth_value_is_told():
    with pytest.raises(TypeError, match=r"^trials=3 must be True or False"):
        MnM("MlpPolicy", BoxEnv(), **small(trials=3))
