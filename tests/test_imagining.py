"""imagine(): what it tells beside what the networks and the environment's functions say, and what it leaves alone."""

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, policy_contents, small, soon, trained, world_contents
from gymnasium import spaces
from stable_baselines3.common.utils import set_random_seed
from torch.testing import assert_close

from sb3_mismatch import MBPO, MnM


def high_point(observations, actions, next_observations):
    return next_observations[:, 0] > 0.3


def sum_of_all(observations, actions, next_observations):
    return observations.sum(dim=1) + 10 * actions.sum(dim=1) + 100 * next_observations.sum(dim=1)


@pytest.fixture(scope="module")
def model():
    """An agent in an environment with actions between -2 and 2, told where episodes end and what they earn."""
    with pytest.MonkeyPatch.context() as patch:
        soon(patch)
        return trained(BoxEnv(high=2.0), termination_fn=high_point, reward_fn=sum_of_all)


def starts(model, n: int = 40):
    return model.replay_buffer.observations[:n, 0]


def test_rows_are_transitions_in_the_environments_units(model):
    imagined = model.imagine(starts(model), 6)
    s, a, following = imagined.observations[:-1], imagined.actions, imagined.observations[1:]
    assert s.shape == (6, 40, 3)
    assert a.shape == (6, 40, 2)
    assert_same(imagined.observations[0], starts(model))
    assert 1 < np.abs(a).max() <= 2
    rewards = s.sum(axis=2) + 10 * a.sum(axis=2) + 100 * following.sum(axis=2)
    np.testing.assert_allclose(imagined.rewards, np.where(imagined.alive, rewards, 0), rtol=1e-4, atol=1e-3)


def test_ends_and_what_is_behind_them(model):
    imagined = model.imagine(starts(model), 8)
    alive, terminated = imagined.alive, imagined.terminated
    assert 0 < terminated.sum() < 40
    np.testing.assert_array_equal(terminated, alive & (imagined.observations[1:, :, 0] > 0.3))
    np.testing.assert_array_equal(alive[1:], alive[:-1] & ~terminated[:-1])
    still = ~alive
    np.testing.assert_array_equal(imagined.observations[1:][still], imagined.observations[:-1][still])
    np.testing.assert_array_equal(
        imagined.member_observations[:, 1:][:, still], imagined.member_observations[:, :-1][:, still]
    )
    for column in (imagined.actions, imagined.rewards, imagined.log_ratio, imagined.disagreement):
        assert (column[still] == 0).all()
        assert (column[alive] != 0).any()
    assert (imagined.member_rewards[:, still] == 0).all()


def test_classifier_and_members_are_asked_about_the_rows(model):
    imagined = model.imagine(starts(model), 3)
    alive = imagined.alive[2]
    s, a, following = (
        th.as_tensor(x[alive]) for x in (imagined.observations[2], imagined.actions[2], imagined.observations[3])
    )
    world = model.world
    with th.no_grad():
        ratio, disagreement = world.classifier.log_ratio(s, a / 2, following), world.dynamics.disagreement(s, a / 2)
    assert_close(th.as_tensor(imagined.log_ratio[2][alive]), ratio[:, 0])
    assert_close(th.as_tensor(imagined.disagreement[2][alive]), disagreement[:, 0])


def test_members_go_their_own_ways_by_their_means(model):
    imagined = model.imagine(starts(model, 5), 4)
    dynamics = model.world.dynamics
    assert imagined.member_observations.shape == (3, 5, 5, 3)
    for member in range(3):
        s = th.as_tensor(imagined.observations[0])
        for step in range(4):
            a = th.as_tensor(imagined.actions[step]) / 2
            with th.no_grad():
                mean = dynamics(s[None], a[None], members=th.tensor([member])).mean
                following = dynamics.decode(s[None], mean)[0][0]
            alive = th.as_tensor(imagined.alive[step])
            rewards = sum_of_all(s, 2 * a, following)
            s = th.where(alive[:, None], following, s)
            assert_close(th.as_tensor(imagined.member_observations[member, step + 1]), s)
            assert_close(th.as_tensor(imagined.member_rewards[member, step]), alive * rewards, rtol=1e-4, atol=1e-3)


def test_given_actions_are_played_and_clipped(model):
    actions = np.random.default_rng(0).uniform(-1.0, 3.0, (4, 5, 2))
    imagined = model.imagine(starts(model, 5), 4, actions=actions)
    clipped = np.where(imagined.alive[..., None], actions.clip(-2, 2), 0)
    np.testing.assert_allclose(imagined.actions, clipped, rtol=1e-5, atol=1e-6)
    other = model.imagine(starts(model, 5), 4, actions=-actions)
    assert np.abs(imagined.observations[1] - other.observations[1]).max() > 1e-4


def test_mode_is_that_of_the_policy_under_vec_normalize(monkeypatch):
    soon(monkeypatch)
    model = trained(environments(1, BoxEnv, normalize=True))
    raw = starts(model, 6)
    imagined = model.imagine(raw, 1, deterministic=True)
    expected, _ = model.policy.predict(model.get_vec_normalize_env().normalize_obs(raw), deterministic=True)
    np.testing.assert_allclose(imagined.actions[0], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(model.imagine(raw, 1).actions[0] - expected).max() > 0.01


def test_dicts_and_single_observations(monkeypatch):
    soon(monkeypatch)
    space = spaces.Dict({"b": spaces.Box(-9, 9, (2, 1)), "a": spaces.Box(-9, 9, (1,))})
    model = trained(BoxEnv(space))
    several, _ = BoxEnv(space).reset(seed=0)
    one = model.imagine(several, 2)
    assert one.observations.shape == (3, 1, 3)
    assert_same(one.observations[0], model.world.observations.flatten(several, 1))
    two = model.imagine({key: np.stack([part, part]) for key, part in several.items()}, 2)
    assert two.rewards.shape == (2, 2)


def test_without_a_classifier_the_log_ratio_is_zero(monkeypatch):
    soon(monkeypatch)
    imagined = trained(BoxEnv(), kind=MBPO).imagine(np.zeros((4, 3)), 3)
    assert (imagined.log_ratio == 0).all()
    assert (imagined.disagreement > 0).all()


@pytest.mark.parametrize("settings", [{}, {"use_sde": True}], ids=["plain", "gSDE"])
def test_the_run_goes_on_as_if_nobody_had_looked(settings, monkeypatch):
    soon(monkeypatch)
    model, other = (trained(BoxEnv(), steps=80, **settings) for _ in range(2))
    before = th.get_rng_state(), np.random.get_state()[1]
    first, again = (model.imagine(starts(model), 3) for _ in range(2))
    assert_same(before, (th.get_rng_state(), np.random.get_state()[1]))
    assert_same(first._asdict(), again._asdict())
    model.world_env(2, max_episode_steps=3).step(np.zeros((2, 2)))
    for agent in (model, other):
        set_random_seed(1)
        agent.learn(60, reset_num_timesteps=False)
    assert_same(policy_contents(model), policy_contents(other))
    assert_same(world_contents(model), world_contents(other))


def test_training_mode_is_left_as_it_was(model):
    model.policy.set_training_mode(True)
    model.imagine(starts(model), 1)
    assert model.policy.training
    model.policy.set_training_mode(False)


def test_refusals(model):
    with pytest.raises(ValueError, match=r"imagine\(\) needs a learned world and none has been fitted yet"):
        MnM("MlpPolicy", BoxEnv(), **small()).imagine(np.zeros(3), 1)
    with pytest.raises(ValueError, match="horizon=0 must be a whole number"):
        model.imagine(starts(model), 0)
    with pytest.raises(ValueError, match=r"actions has shape \(2, 40\): pass \(3, 40, 2\)"):
        model.imagine(starts(model), 3, actions=np.zeros((2, 40)))
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        model.imagine(np.zeros((4, 5)), 1)
