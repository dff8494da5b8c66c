"""D: learn() and data collection."""

import io

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, policy_contents, small, soon, trained, world_contents
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_mismatch import MnM, mnm


class Watch(BaseCallback):
    """Counts calls and keeps what SB3's callbacks read."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _on_step(self):
        self.seen.append((self.model.num_timesteps, self.model.replay_buffer.size()))
        return True


def test_d1_learn_returns_the_agent_and_takes_positional_arguments(tmp_path):
    model = MnM("MlpPolicy", BoxEnv(), **small(tensorboard_log=str(tmp_path)))
    assert model.learn(10, None, 1, "run", True, False) is model
    model.logger.close()
    model.learn(10).logger.close()
    assert {path.name for path in tmp_path.iterdir()} == {"run_1", "MnM_1"}


def test_d2_only_real_steps_count():
    watch = Watch()
    model = MnM("MlpPolicy", BoxEnv(length=20), **small(real_ratio=0.0, imagined_per_step=10)).learn(100, watch)
    assert len(model.world.imagined) == 1000
    assert model.num_timesteps == watch.n_calls == 100
    assert model._episode_num == len(model.ep_info_buffer) == 5
    assert {info["l"] for info in model.ep_info_buffer} == {20}


def test_d3_callbacks_find_sb3s_locals():
    names = set()

    class Look(BaseCallback):
        def _on_training_start(self):
            names.update(self.locals)

        def _on_step(self):
            names.update(self.locals)
            return True

    MnM("MlpPolicy", BoxEnv(), **small()).learn(60, Look())
    expected = {"total_timesteps", "tb_log_name", "new_obs", "rewards", "dones", "infos", "actions"}
    assert expected | {"buffer_actions", "replay_buffer", "env"} <= names


def test_d4_a_step_is_told_before_it_is_stored():
    watch = Watch()
    MnM("MlpPolicy", BoxEnv(), **small()).learn(3, watch)
    assert watch.seen == [(1, 0), (2, 1), (3, 2)]


def test_d5_training_begins_behind_learning_starts():
    assert trained(steps=50)._n_updates == 0
    model = trained(steps=51)
    assert model._n_updates == 1
    assert model._fitted_at == 51


def test_d5_the_policy_waits_for_its_world(monkeypatch):
    soon(monkeypatch, 50)
    model = trained(steps=80, random_steps=81)
    assert (model._n_updates, model._fitted_at) == (0, 51)
    # Uniform actions reach where those of an untrained policy hardly do.
    assert np.abs(model.replay_buffer.actions[60:80]).mean() == pytest.approx(0.5, abs=0.2)
    assert model.learn(5, reset_num_timesteps=False)._n_updates == 5
    assert trained(steps=80, random_steps=80, real_ratio=1)._n_updates == 30

    # So many for each of three numbers of an observation and one of an action, in bounds.
    monkeypatch.setattr(mnm, "RANDOM_STEPS_EACH", 15)
    assert trained(steps=80, random_steps="auto")._n_updates == 21
    monkeypatch.setattr(mnm, "MOST_RANDOM_STEPS", 70)
    assert trained(steps=80, random_steps="auto", learning_starts=75)._n_updates == 5


def test_d5_without_gradient_steps_nothing_is_trained():
    model = trained(steps=60, gradient_steps=0)
    assert model._n_updates == 0
    assert model._fitted_at is None


def test_d5_fits_are_counted_from_the_last_one(monkeypatch):
    fitted = []
    fit = MnM._fit_dynamics
    monkeypatch.setattr(MnM, "_fit_dynamics", lambda self, data: (fitted.append(self.num_timesteps), fit(self, data)))
    trained(environments(3, BoxEnv), 160, model_train_freq=25)
    assert fitted == [51, 78, 105, 132, 159]


def test_d6_as_many_updates_as_transitions():
    model = trained(environments(2, BoxEnv), 6, learning_starts=0, train_freq=3, gradient_steps=-1)
    assert model._n_updates == 6
    assert model.logger.name_to_value["train/n_updates"] == 6


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_d7_environments_in_processes_of_their_own():
    env = SubprocVecEnv([BoxEnv, BoxEnv], start_method="fork")
    model = trained(env, 80)
    assert model._fitted_at is not None
    assert len(model._real_transitions()) == 80
    env.close()


def test_d8_learning_in_two_parts_equals_learning_at_once():
    settings = {"objective": "vmbpo", "model_train_freq": 20, "learning_rate": 1e-3, "actor_rate": 1.0}
    first = trained(BoxEnv(), 70, **settings).learn(50, reset_num_timesteps=False)
    second = trained(BoxEnv(), 120, **settings)
    assert_same(policy_contents(first), policy_contents(second))
    assert_same(world_contents(first), world_contents(second))


def test_d8_counting_anew_keeps_what_was_learned():
    model = trained(BoxEnv(), 81, model_train_freq=30)
    assert model._fitted_at == 81
    imagined = len(model.world.imagined)
    model.learn(51)
    assert model._fitted_at == model.num_timesteps == 51
    assert model.replay_buffer.size() == 132
    assert len(model.world.imagined) == imagined == 60


@pytest.mark.parametrize("with_buffer", [False, True])
def test_d9_resumes_with_and_without_buffer(with_buffer):
    model = trained(BoxEnv(), 90, real_ratio=0.5)
    archive, buffer = io.BytesIO(), io.BytesIO()
    model.save(archive)
    model.save_replay_buffer(buffer)
    model = MnM.load(archive, env=BoxEnv(), device="cpu")
    if with_buffer:
        buffer.seek(0)
        model.load_replay_buffer(buffer)
    updates = model._n_updates
    # Without the buffer, training goes on with 1, 2, 3 ... transitions.
    model.learn(5, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_updates) == (95, updates + 5)
    assert model.replay_buffer.size() == (95 if with_buffer else 5)
    model.learn(100, reset_num_timesteps=False)
    assert model._fitted_at > 95


@pytest.mark.parametrize("fewest", [1, 2, 3])
@pytest.mark.parametrize("objective", ["mnm", "vmbpo"])
def test_d9_a_world_of_few_transitions(fewest, objective, monkeypatch):
    monkeypatch.setattr(mnm, "FEWEST_ROWS", fewest)
    model = trained(BoxEnv(), 4, learning_starts=0, objective=objective, reward_shift="auto", model_train_freq=1)
    assert model._fitted_at == 4


def test_d9_a_buffer_of_which_nothing_can_be_learned(monkeypatch):
    """Under optimize_memory_usage the last row of an episode is left out."""
    monkeypatch.setattr(mnm, "FEWEST_ROWS", 1)
    settings = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = trained(BoxEnv(length=1), 4, learning_starts=0, model_train_freq=1, **settings)
    assert model._n_updates == 4


def test_d10_another_environment_is_taken_up_and_reset():
    model = trained(VecNormalize(environments(2, BoxEnv)), 80)
    other = VecNormalize(environments(2, BoxEnv), training=False)
    model.set_env(other)
    assert model._last_obs is None
    assert model.get_vec_normalize_env() is other
    assert model._normalization().reward_std == pytest.approx(1.0)
    model.learn(120, reset_num_timesteps=False)
    assert model._fitted_at > 80
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(environments(3, BoxEnv))


def test_d10_loading_may_change_the_number_of_environments():
    archive = io.BytesIO()
    trained(BoxEnv(), 60).save(archive)
    model = MnM.load(archive, env=environments(3, BoxEnv), device="cpu")
    assert model.n_envs == 3
    model.learn(150, reset_num_timesteps=False)
    assert len(model._real_transitions()) == 150


@pytest.mark.parametrize("where", ["_update", "_record_losses"])
def test_d11_an_interrupt_leaves_the_real_buffer_in_place(where, monkeypatch):
    model = trained(BoxEnv(), 60, real_ratio=0.5)
    buffer = model.replay_buffer

    def interrupt(*_):
        assert model.replay_buffer is not buffer
        raise KeyboardInterrupt

    monkeypatch.setattr(MnM, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10, reset_num_timesteps=False)
    assert model.replay_buffer is buffer
    archive = io.BytesIO()
    model.save(archive)
    model.save_replay_buffer(io.BytesIO())
    assert MnM.load(archive, device="cpu").num_timesteps == 61


def test_d11_an_interrupted_fit_leaves_the_policys_random_numbers_in_place(monkeypatch):
    def interrupt(self, data):
        th.rand(100)
        raise KeyboardInterrupt

    model = MnM("MlpPolicy", BoxEnv(), **small()).learn(50)
    monkeypatch.setattr(MnM, "_fit_dynamics", interrupt)
    state = th.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        model.train(gradient_steps=1)
    assert_same(th.get_rng_state(), state)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_d12_action_noise_is_for_real_actions_alone(n_envs):
    class Counted(NormalActionNoise):
        calls = 0

        def __call__(self):
            Counted.calls += 1
            return super().__call__()

    noise = Counted(np.zeros(2), 0.1 * np.ones(2))
    model = trained(environments(n_envs, BoxEnv), 40 * n_envs, learning_starts=30 * n_envs, action_noise=noise)
    assert Counted.calls == 40 * n_envs
    assert len(model.world.imagined) > 0
    assert isinstance(model.action_noise, VectorizedActionNoise) == (n_envs > 1)


def test_d13_gsde_draws_a_noise_for_each_imagined_row_and_leaves_the_rollouts():
    noise = NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))
    model = trained(environments(2, BoxEnv), 80, use_sde=True, sde_sample_freq=4, action_noise=noise)
    assert model._fitted_at is not None
    before = model.actor.action_dist.exploration_matrices.clone()
    assert len(before) in (1, 2)
    actions = model._imagined_from(th.ones(50, 3), horizon=1).actions
    assert len(actions[0].unique(dim=0)) == 50
    assert_same(model.actor.action_dist.exploration_matrices, before)


def test_d13_gsde_at_warm_up():
    assert trained(BoxEnv(), 60, use_sde=True, use_sde_at_warmup=True)._fitted_at is not None
