"""The learned world as an environment: rows on dynamics made by hand, the forms beside each other, agents in it."""

import pickle
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, soon, trained
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_mismatch import MnM
from sb3_mismatch.observations import FlatObservations
from sb3_mismatch.world_env import ImaginedEpisodes, WorldEnv, WorldVecEnv, WorldVectorEnv


class Sum:
    """s' = s + a and r = 10 s with scaled actions; members disagree by |s|."""

    def sample(self, observations, actions):
        return observations + actions, 10 * observations

    def disagreement(self, observations, actions):
        return observations.abs()


class EndAt:
    """The episode ends where s' >= 3 and pays 7 beside the learned reward."""

    def ends(self, observations, actions, next_observations):
        return next_observations >= 3

    def rewards(self, observations, actions, next_observations, learned, ends):
        return learned + 7 * ends


class Change:
    """log p/q = s' - s."""

    def log_ratio(self, observations, actions, next_observations):
        return next_observations - observations


LINE = spaces.Box(-100.0, 100.0, (1,), np.float64)
#: in the environment's units -2 is no step back and 6 is one step on
ACTIONS = spaces.Box(-10.0, 6.0, (1,))
ON = np.array([[6.0], [6.0]])


def episodes(starts=(0.0,), n_envs=2, space=LINE, **kwargs) -> ImaginedEpisodes:
    world = SimpleNamespace(dynamics=Sum(), outcomes=EndAt(), classifier=Change(), observations=FlatObservations(space))
    return ImaginedEpisodes(world, space, ACTIONS, th.tensor(starts)[:, None], n_envs, **kwargs)  # type: ignore[arg-type]


# -- by hand --


def test_step_by_hand():
    env = WorldVecEnv(episodes())
    observations = env.reset()
    assert observations.dtype == np.float64
    assert_same(observations, np.zeros((2, 1)))
    # Scaled to 1 and 0.5; 6 is the bound, and what lies beyond is clipped.
    observations, rewards, dones, infos = env.step(np.array([[60.0], [2.0]]))
    assert_same(observations, np.array([[1.0], [0.5]]))
    assert_same(rewards, np.zeros(2, np.float32))
    assert not dones.any()
    observations, rewards, dones, infos = env.step(np.array([[6.0], [-10.0]]))
    assert_same(observations, np.array([[2.0], [-0.5]]))
    assert_same(rewards, np.array([10.0, 5.0], np.float32))
    assert infos == [
        {"disagreement": 1.0, "log_ratio": 1.0, "TimeLimit.truncated": False},
        {"disagreement": 0.5, "log_ratio": -1.0, "TimeLimit.truncated": False},
    ]


def test_an_end_is_no_time_limit_and_starts_anew():
    env = WorldVecEnv(episodes(max_episode_steps=3))
    env.reset()
    for _ in range(2):
        *_, dones, _ = env.step(np.array([[6.0], [-2.0]]))
        assert not dones.any()
    # The first ends in the step of the time limit, the second is cut by it.
    observations, rewards, dones, infos = env.step(np.array([[6.0], [-2.0]]))
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [False, True]
    assert_same([info["terminal_observation"] for info in infos], [np.array([3.0]), np.array([0.0])])
    assert_same(rewards, np.array([27.0, 0.0], np.float32))
    assert_same(observations, np.zeros((2, 1)))
    *_, dones, infos = env.step(ON)
    assert not dones.any()
    assert "terminal_observation" not in infos[0]


def test_one_ends_and_the_other_goes_on():
    env = WorldVecEnv(episodes())
    env.reset()
    for _ in range(3):
        observations, _, dones, _ = env.step(np.array([[6.0], [2.0]]))
    assert dones.tolist() == [True, False]
    assert_same(observations, np.array([[0.0], [1.5]]))


def test_gymnasium_vectors_tell_the_same():
    env = WorldVectorEnv(episodes(max_episode_steps=3))
    assert env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    env.reset(seed=0)
    _, _, _, _, infos = env.step(ON)
    assert_same(infos["log_ratio"], np.ones(2))
    env.step(np.array([[6.0], [-2.0]]))
    observations, rewards, terminated, truncated, infos = env.step(np.array([[6.0], [-2.0]]))
    assert terminated.tolist() == [True, False]
    assert truncated.tolist() == [False, True]
    assert_same(list(infos["final_obs"]), [np.array([3.0]), np.array([1.0])])
    assert_same(infos["final_info"]["disagreement"], np.array([2.0, 1.0]))
    assert_same(rewards, np.array([27.0, 10.0]))
    assert_same(observations, np.zeros((2, 1)))
    assert observations in env.observation_space


def test_single_form_by_hand():
    env = WorldEnv(episodes(n_envs=1, max_episode_steps=3))
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space
    assert info == {}
    env.step(np.array([6.0]))
    env.step(np.array([6.0]))
    observation, reward, terminated, truncated, info = env.step(np.array([6.0]))
    assert (observation.item(), reward, terminated, truncated) == (3.0, 27.0, True, False)
    assert info == {"disagreement": 2.0, "log_ratio": 1.0}
    with pytest.raises(ValueError, match="n_envs=2 episodes do not fit a single environment"):
        WorldEnv(episodes())


def test_disagreement_ends_an_episode():
    env = WorldVecEnv(episodes(starts=[0.5], max_disagreement=1.4))
    env.reset()
    *_, dones, _ = env.step(ON)
    assert not dones.any()
    *_, dones, infos = env.step(ON)
    assert dones.all()
    assert not infos[0]["TimeLimit.truncated"]


def test_without_a_classifier_the_log_ratio_is_zero():
    assert episodes(judges=False).step(ON).infos[0]["log_ratio"] == 0


def test_states_stay_within_the_bounds():
    # Single precision rounds 0.1 up.
    space = spaces.Box(-0.1, 0.1, (1,), np.float64)
    env = WorldVecEnv(episodes(space=space))
    env.reset()
    observations, *_ = env.step(ON)
    assert observations[0] in space
    assert_same(observations, np.full((2, 1), 0.1))
    observations, *_ = env.step(np.full((2, 1), -2.0))
    np.testing.assert_allclose(observations, 0.1)


def test_every_start_is_drawn_and_no_other():
    env = WorldVecEnv(episodes(starts=[0.0, 1.0, 2.0], n_envs=60))
    assert set(env.reset()[:, 0]) == {0.0, 1.0, 2.0}
    assert set(env.reset()[:, 0]) == {0.0, 1.0, 2.0}


# -- in an agent's world --


@pytest.fixture(scope="module")
def model():
    """An agent that knows four episodes of at most 20 steps each."""
    space = spaces.Dict({"b": spaces.Box(-1, 1, (2,), np.float64), "a": spaces.Box(-1, 1, (1,))})
    with pytest.MonkeyPatch.context() as patch:
        soon(patch)
        return trained(BoxEnv(space), 80)


def walk(env, seed: int | None, steps: int = 5):
    env.seed(seed)
    path = [env.reset()]
    for _ in range(steps):
        path.append(env.step(np.full((env.num_envs, 2), 0.5))[0])
    return path


def test_seeds(model):
    env, other = model.world_env(3), model.world_env(3)
    before = th.get_rng_state(), np.random.get_state()[1]
    path = walk(env, 1)
    assert_same(path, walk(other, 1))
    assert_same(path, walk(env, 1))
    assert_same(before, (th.get_rng_state(), np.random.get_state()[1]))
    assert np.abs(path[-1]["a"] - walk(env, 2)[-1]["a"]).max() > 0
    single = model.world_env(kind="single")
    assert_same(single.reset(seed=3), single.reset(seed=3))


def test_starts(model):
    flat, buffer = model.world.observations, model.replay_buffer
    rows = flat.flatten({key: part[:80, 0] for key, part in buffer.observations.items()}, 80)
    drawn = {kind: model.world_env(200, starts=kind, seed=0).episodes.reset() for kind in ("episodes", "states")}
    assert {*map(tuple, drawn["episodes"])} == {*map(tuple, rows[::20])}
    assert {*map(tuple, drawn["states"])} <= {*map(tuple, rows)}
    assert len({*map(tuple, drawn["states"])}) > 40
    given = {"a": np.full((1,), 0.25), "b": np.full((2,), 0.5)}
    assert_same(model.world_env(1, starts=given).episodes.reset(), np.array([[0.25, 0.5, 0.5]], np.float32))


def test_both_checkers_pass_without_a_warning(model):
    for checker in (check_env, check_env_for_sb3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checker(model.world_env(kind="single", max_episode_steps=10))
    made = gym.make(model.world_env(kind="single").spec)
    made.reset(seed=0)
    made.step(made.action_space.sample())


def test_copy_of_its_own(model):
    env = model.world_env(2)
    path = walk(env, 0)
    copied = pickle.loads(pickle.dumps(env))
    kept = {name: value.clone() for name, value in model.world.dynamics.state_dict().items()}
    try:
        with th.no_grad():
            model.world.dynamics.body.layers[0].weight.add_(1.0)
        assert_same(path, walk(env, 0))
        assert np.abs(walk(model.world_env(2), 0)[-1]["a"] - path[-1]["a"]).max() > 0
    finally:
        model.world.dynamics.load_state_dict(kept)
    assert_same(path, walk(copied, 0))


def test_agents_learn_in_it(model):
    env = VecNormalize(VecMonitor(model.world_env(4, max_episode_steps=10)))
    agent = PPO("MultiInputPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu").learn(128)
    assert {episode["l"] for episode in agent.ep_info_buffer} == {10}
    assert np.isfinite(evaluate_policy(agent, model.world_env(2, 5), 2, warn=False)[0])


def test_units_are_raw_under_vec_normalize(monkeypatch):
    soon(monkeypatch)
    model = trained(environments(1, lambda: BoxEnv(high=2.0), normalize=True), 80)
    rows = {*map(tuple, model.replay_buffer.observations[:80:20, 0])}
    assert {*map(tuple, model.world_env(50, seed=0).reset())} == rows


def test_time_limit_is_that_of_the_environment(monkeypatch):
    soon(monkeypatch)
    model = trained("Pendulum-v1", 70)
    assert model.world_env().episodes.max_episode_steps == 200
    assert model.world_env(max_episode_steps=7).episodes.max_episode_steps == 7
    # In the first episode any state stands for its start.
    assert len({*map(tuple, model.world_env(200, seed=0).reset())}) > 40


def test_refusals(model):
    for settings, sentence in (
        ({"kind": "gym"}, "kind='gym' is unknown: use one of 'sb3', 'gymnasium', 'single'"),
        ({"starts": "real"}, "starts='real' is unknown"),
        ({"n_envs": 0}, "n_envs=0 must be"),
        ({"max_episode_steps": 1.5}, "max_episode_steps=1.5 must be"),
        ({"max_disagreement": -1.0}, r"max_disagreement=-1.0 must be"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model.world_env(**settings)
    with pytest.raises(ValueError, match="actions holds NaN"):
        model.world_env().step(np.full((1, 2), np.nan))
    loaded = MnM("MultiInputPolicy", model.get_env())
    with pytest.raises(ValueError, match=r"world_env\(\) needs a learned world"):
        loaded.world_env()
    loaded._fitted_at = 0
    with pytest.raises(ValueError, match="draws from the replay buffer, which is empty"):
        loaded.world_env()


# -- shown by --


@pytest.mark.expensive
def test_ppo_learns_in_imagination_to_balance_the_real_pendulum():
    th.set_num_threads(1)
    model = MnM("MlpPolicy", "InvertedPendulum-v5", seed=0, device="cpu").learn(3_000)
    assert model.replay_buffer is not None
    known = model.imagine(model.replay_buffer.observations[:3_000, 0], 1).disagreement
    limit = float(np.quantile(known, 0.99))
    for seed in range(3):
        env = VecMonitor(model.world_env(16, starts="states", max_disagreement=limit, seed=seed))
        agent = PPO("MlpPolicy", env, n_steps=32, learning_rate=1e-3, seed=seed, device="cpu").learn(20_000)
        mean, std = evaluate_policy(agent, gym.make("InvertedPendulum-v5"), 10, warn=False)
        print(f"\nPPO seed {seed}: real return after 20,000 imagined steps {mean:.0f} ± {std:.0f}")
        assert mean >= 500
