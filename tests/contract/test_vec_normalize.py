"""F: VecNormalize."""

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, small, trained
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from torch.testing import assert_close

from sb3_mismatch import MnM
from sb3_mismatch.imagination import ImaginedRows

N = 6


class Large(BoxEnv):
    """Observations around 100 with a spread of 10, rewards by the ten."""

    def _observe(self, space):
        return (
            {key: self._observe(part) for key, part in space.items()}
            if isinstance(space, spaces.Dict)
            else (100 + 10 * super()._observe(space)).astype(space.dtype)
        )

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, 10 * reward, *rest


def normalized(**settings):
    """An agent under VecNormalize that serves nothing but one imagined row, and that row."""
    env = VecNormalize(environments(2, Large), **settings.pop("normalize", {}))
    model = trained(env, 120, **{"real_ratio": 0.0, "expansion": 0, "objective": "mbpo", **settings})
    data = model._real_transitions().batch
    row = ImaginedRows(
        *(column[7:8] for column in data[:5]),
        log_ratio=th.full((1, 1), 3.0),
        novelty=th.zeros(1, 1),
        alive=th.ones(1, 1),
    )
    model.world.imagined.replace(row)
    return model, row


def served(model):
    with model._serving(1):
        return model.replay_buffer.sample(N, env=model._vec_normalize_env)


def test_f1_rows_are_kept_raw_real_and_imagined():
    env = VecNormalize(environments(2, Large))
    model = trained(env, 120, horizon=1)
    for observations in (model.replay_buffer.observations, model.world.imagined.sample(100).observations.numpy()):
        assert 80 < observations[: model.replay_buffer.size()].mean() < 120
    for rewards in (model.replay_buffer.rewards[: model.replay_buffer.size()], model.world.imagined.sample(50).rewards):
        assert rewards.mean() < -1
    assert 80 < model.world.dynamics.inputs.mean[:3].mean() < 120


def test_f2_served_rows_are_normalised_as_sb3_normalises():
    model, row = normalized()
    env, batch = model.get_vec_normalize_env(), served(model)
    for name in ("observations", "next_observations"):
        expected = env.normalize_obs(getattr(row, name).numpy()).astype(np.float32)
        assert_close(getattr(batch, name).numpy(), np.repeat(expected, N, axis=0), rtol=1e-4, atol=1e-4)
    expected = env.normalize_reward(row.rewards.numpy()).astype(np.float32)
    assert_close(batch.rewards.numpy(), np.repeat(expected, N, axis=0), rtol=1e-5, atol=1e-5)


def test_f2_both_clips_hold_and_statistics_are_todays():
    model, row = normalized(normalize={"clip_obs": 0.5, "clip_reward": 0.01})
    env = model.get_vec_normalize_env()
    assert_close(served(model).rewards, th.full((N, 1), -0.01))
    assert served(model).observations.abs().max() <= 0.5
    env.obs_rms.mean[:] = row.observations[0].numpy()
    assert_close(served(model).observations, th.zeros(N, 3), atol=1e-4, rtol=0)
    # Imagining too, the actor sees what the environment's rollout would show it.
    assert_close(model._seen(row.observations), th.zeros(1, 3), atol=1e-4, rtol=0)


def test_f3_the_log_ratio_is_added_behind_reward_normalisation():
    model, row = normalized(objective="vmbpo", log_ratio_weight=0.5)
    env = model.get_vec_normalize_env()
    expected = env.normalize_reward(row.rewards.numpy()).astype(np.float32) + 1.5
    assert_close(served(model).rewards.numpy(), np.repeat(expected, N, axis=0), rtol=1e-5, atol=1e-5)


def test_f4_last_observations_at_the_clip_teach_nothing():
    class Crash(BoxEnv):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            return observation + 520.0 * (terminated or truncated), reward, terminated, truncated, info

    env = VecNormalize(environments(1, lambda: Crash(terminates=True)), clip_obs=9.0, training=False)
    model = trained(env, 100)
    # SB3 stored what the clip has left of 520.
    assert model.replay_buffer.next_observations[:100].max() == pytest.approx(9.0, rel=1e-3)
    assert model.replay_buffer.dones.sum() == 5
    assert len(model._real_transitions()) == 95
    # Ends elsewhere are kept.
    model = trained(VecNormalize(environments(1, lambda: BoxEnv(terminates=True))), 100)
    assert len(model._real_transitions()) == 100


def test_f5_evaluation_synchronises_and_freezes_statistics():
    env = VecNormalize(environments(1, Large))
    evaluation = VecNormalize(environments(1, Large), training=False, norm_reward=False)
    model = MnM("MlpPolicy", env, **small())
    assert model.get_vec_normalize_env() is env
    model.learn(80, EvalCallback(evaluation, n_eval_episodes=1, eval_freq=40, verbose=0))
    assert_same(evaluation.obs_rms.mean != 0, np.ones(3, dtype=bool))
    before = evaluation.obs_rms.mean.copy()
    evaluate_policy(model, evaluation, n_eval_episodes=2)
    assert_same(evaluation.obs_rms.mean, before)
    model.set_env(evaluation)
    assert model.get_vec_normalize_env() is evaluation


def test_f6_norm_obs_keys():
    space = spaces.Dict({"raw": spaces.Box(-999, 999, (2,)), "scaled": spaces.Box(-999, 999, (1,))})
    env = VecNormalize(environments(2, lambda: Large(space)), norm_obs_keys=["scaled"])
    model = trained(env, 120, real_ratio=0.5)
    batch = served(model)
    assert (batch.observations["raw"] > 20).all()
    assert (batch.observations["scaled"].abs() < 10).all()


def test_f5_statistics_and_agent_are_saved_and_loaded_together(tmp_path):
    env = VecNormalize(environments(2, Large))
    model = trained(env, 120)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics.pkl"))
    model.save_replay_buffer(tmp_path / "buffer")
    env = VecNormalize.load(str(tmp_path / "statistics.pkl"), environments(2, Large))
    copied = MnM.load(tmp_path / "model", env=env, device="cpu")
    copied.load_replay_buffer(tmp_path / "buffer")
    assert_same(vars(copied._normalization()), vars(model._normalization()))
    copied.learn(120, reset_num_timesteps=False)
    assert copied._fitted_at > 120


def test_f3_rewards_below_zero_have_logarithms_in_normalised_units():
    env = VecNormalize(environments(2, Large))
    model = trained(env, 120, objective="mnm", reward_shift="auto")
    assert model._fitted_at is not None
    with model._serving(1):
        rewards = model.replay_buffer.sample(50, env=env).rewards
    assert rewards.isfinite().all()
    assert {"objective/lower_bound", "objective/log_return"} <= set(model._world_log)


@pytest.mark.parametrize("statistics", [{"norm_obs": False}, {"norm_reward": False}], ids=["rewards", "observations"])
def test_f2_either_may_be_left_raw(statistics):
    model, row = normalized(normalize=statistics)
    env, batch = model.get_vec_normalize_env(), served(model)
    assert_close(batch.observations[:1].numpy(), env.normalize_obs(row.observations.numpy()), rtol=1e-4, atol=1e-4)
    assert_close(batch.rewards[:1].numpy(), env.normalize_reward(row.rewards.numpy()), rtol=1e-4, atol=1e-4)
