"""C: replay buffers."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, sac_settings, small, trained
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_mismatch import MnM


class Counter(BoxEnv):
    """Observations count the steps of the environment's life: the true successor of s is s + 1, of a reset not."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.life = 0

    def _observe(self, space):
        self.life += 1
        return np.full(3, self.life, np.float32)


def test_c1_the_replay_buffer_is_sb3s_own_at_every_step():
    kinds = set()

    class Look(BaseCallback):
        def _on_step(self):
            kinds.add(type(self.model.replay_buffer))
            assert self.locals["replay_buffer"] is self.model.replay_buffer
            return True

    model = MnM("MlpPolicy", BoxEnv(), **small(real_ratio=0.5)).learn(60, Look())
    assert model._fitted_at is not None
    assert kinds == {ReplayBuffer}
    assert type(model.replay_buffer) is ReplayBuffer


def test_c1_buffers_are_exchanged_with_sac():
    ours, theirs = trained(BoxEnv(), 70), SAC("MlpPolicy", BoxEnv(), **sac_settings()).learn(70)
    for giver, taker in ((ours, theirs), (theirs, ours)):
        archive = io.BytesIO()
        giver.save_replay_buffer(archive)
        assert b"sb3_mismatch" not in archive.getvalue()
        archive.seek(0)
        taker.load_replay_buffer(archive)
        assert_same(taker.replay_buffer.observations, giver.replay_buffer.observations)
        taker.train(gradient_steps=1)
        taker.learn(10, reset_num_timesteps=False)


def test_c1_a_buffer_filled_before_learning_is_learned_from():
    model = MnM("MlpPolicy", BoxEnv(), **small(learning_starts=0, real_ratio=0.5))
    row = np.ones((1, 3)), np.zeros((1, 3)), np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}]
    for _ in range(50):
        model.replay_buffer.add(*row)
    model.learn(1)
    assert model._fitted_at == 1
    assert len(model._real_transitions()) == 51


def test_c2_the_zip_names_no_replay_buffer_of_this_package():
    model = trained(BoxEnv(), 60)
    assert model.replay_buffer_class is ReplayBuffer
    model = trained(BoxEnv(), 60, n_steps=3)
    assert model.replay_buffer_class is NStepReplayBuffer


def test_c3_rows_are_steps_times_environments():
    model = trained(environments(3, Counter), 150, buffer_size=90)
    assert model.replay_buffer.buffer_size == model.replay_buffer.size() == 30
    data = model._real_transitions()
    assert len(data) == model._n_rows == 90
    assert len(data.position.unique()) == 90


@pytest.mark.parametrize("buffer_size", [200, 45], ids=["not_full", "full"])
def test_c4_optimize_memory_usage_never_teaches_a_reset(buffer_size):
    settings = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = trained(Counter(length=9), 100, buffer_size=buffer_size, **settings)
    data = model._real_transitions()
    assert model._fitted_at is not None
    assert len(data) > 0.8 * model.replay_buffer.size() - 2
    assert_same(data.batch.next_observations, data.batch.observations + 1)
    assert not data.batch.dones.any()


def test_c4_ends_that_cannot_be_learned_are_told(capsys):
    settings = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    for given, told in (({}, True), ({"termination_fn": lambda s, a, t: a[:, 0] > 2}, False)):
        MnM("MlpPolicy", BoxEnv(), **small(verbose=1, **settings, **given))
        assert ("pass termination_fn" in capsys.readouterr().out) == told


def test_c4_optimize_memory_usage_needs_sb3s_own_setting():
    with pytest.raises(ValueError, match="optimize_memory_usage"):
        MnM("MlpPolicy", BoxEnv(), **small(optimize_memory_usage=True))


@pytest.mark.parametrize(("terminates", "handle", "ends"), [(False, True, 0), (True, True, 3), (False, False, 3)])
def test_c5_a_time_limit_is_no_end(terminates, handle, ends):
    env = BoxEnv(terminates=terminates)
    model = trained(env, 60, replay_buffer_kwargs={"handle_timeout_termination": handle})
    assert model.replay_buffer.dones.sum() == 3
    assert model._real_transitions().batch.dones.sum() == ends


def test_c5_the_horizon_is_no_end():
    model = trained(BoxEnv(), 60, horizon=3, termination_fn=lambda s, a, t: a[:, 0] > 2)
    assert not model.world.imagined.sample(100).dones.any()


def test_c6_worlds_learn_single_steps_beside_n_steps():
    model = trained(
        Counter(), 70, n_steps=3, imagined_n_steps=2, real_ratio=0.5, gamma=0.9, expansion=0, objective="mbpo"
    )
    assert type(model.replay_buffer) is NStepReplayBuffer
    batch = model._real_transitions().batch
    assert_same(batch.next_observations, batch.observations + 1)
    assert_same(batch.rewards.numpy(), model.replay_buffer.rewards[:70])
    with model._serving(1):
        discounts = model.replay_buffer.sample(10).discounts
    assert discounts.shape == (10, 1)
    assert_same(discounts[5:], th.full((5, 1), 0.9**2))
    assert discounts[:5].min() < 0.8


class Latest(ReplayBuffer):
    """A user's buffer, which serves its latest rows."""

    asked = 0

    def sample(self, batch_size, env=None):
        type(self).asked += 1
        return self._get_samples(np.arange(self.pos - batch_size, self.pos), env=env)


def test_c7_real_rows_are_drawn_by_a_buffer_of_the_users():
    model = trained(Counter(), 70, replay_buffer_class=Latest, real_ratio=0.5, expansion=0)
    assert Latest.asked > 0
    with model._serving(1):
        served = model.replay_buffer.sample(10)
    assert_same(served.observations[:5].numpy(), model.replay_buffer.observations[65:70, 0])


def test_c7_a_buffer_without_rows_is_refused():
    class Elsewhere(ReplayBuffer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.observations

    with pytest.raises(ValueError, match=r"^replay_buffer_class=Elsewhere has no array observations"):
        MnM("MlpPolicy", BoxEnv(), **small(replay_buffer_class=Elsewhere))


def test_c8_rows_hold_scaled_actions_real_and_imagined():
    model = trained(BoxEnv(high=3.0), 60)
    for actions in (model._real_transitions().batch.actions, model.world.imagined.sample(100).actions):
        assert 0.5 < actions.abs().max() <= 1


def test_c9_the_buffer_refers_to_nothing_of_the_agent():
    ours, theirs = trained(BoxEnv(), 60), SAC("MlpPolicy", BoxEnv(), **sac_settings()).learn(60)
    assert len(pickle.dumps(ours.replay_buffer)) == len(pickle.dumps(theirs.replay_buffer))
    copied = copy.deepcopy(ours.replay_buffer)
    assert vars(copied).keys() == vars(theirs.replay_buffer).keys()


def test_c10_extend_reset_full_and_device():
    model = trained(BoxEnv(), 60, buffer_size=50)
    buffer = model.replay_buffer
    assert buffer.full
    assert len(model._real_transitions()) == 50
    buffer.reset()
    assert buffer.size() == 0
    model.train(gradient_steps=0)
    buffer.extend(
        *[[x] * 50 for x in (np.ones((1, 3)), np.ones((1, 3)), np.ones((1, 2)), np.ones(1), np.zeros(1), [{}])]
    )
    model.num_timesteps += 200
    model.train(gradient_steps=1)
    assert model._fitted_at == model.num_timesteps
    archive = io.BytesIO()
    model.replay_buffer.device = "cuda"
    model.save_replay_buffer(archive)
    archive.seek(0)
    model.load_replay_buffer(archive)
    assert model.replay_buffer.device == model.device


def test_c11_a_buffer_of_other_environments_is_refused_as_by_sac():
    archive = io.BytesIO()
    trained(BoxEnv(), 60).save_replay_buffer(archive)
    for kind, settings in ((SAC, sac_settings()), (MnM, small())):
        model = kind("MlpPolicy", environments(3, BoxEnv), **settings)
        archive.seek(0)
        model.load_replay_buffer(archive)
        with pytest.raises(ValueError, match="reshape"):
            model.learn(60)


def test_c12_imagined_rows_are_lazy_bounded_and_not_saved():
    model = MnM("MlpPolicy", BoxEnv(), **small(imagined_per_step=10**9))
    assert len(model.world.imagined) == 0
    sizes = []
    for steps in (60, 400):
        model = trained(BoxEnv(), steps, imagined_per_step=3)
        archive = io.BytesIO()
        model.save(archive)
        sizes.append(len(archive.getvalue()))
        assert len(model.world.imagined) == 300
    assert abs(sizes[1] - sizes[0]) < 2000
    assert len(MnM.load(archive, device="cpu").world.imagined) == 0


def test_c3_dicts_are_read_by_key():
    space = spaces.Dict({"a": spaces.Box(-9, 9, (2,)), "b": spaces.Box(-9, 9, (1,))})
    model = trained(BoxEnv(space), 60)
    data = model._real_transitions().batch
    assert_same(data.observations[:, :2].numpy(), model.replay_buffer.observations["a"][:60, 0])
    assert_same(data.next_observations[:, 2:].numpy(), model.replay_buffer.next_observations["b"][:60, 0])
