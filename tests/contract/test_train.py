"""E: train()."""

import inspect
import io
from threading import Thread

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, all_finite, assert_same, small, trained
from stable_baselines3 import SAC

from sb3_mismatch import MnM
from sb3_mismatch.buffers import MixedReplayBuffer


def due(model):
    """The same agent when its world is due."""
    model.num_timesteps = model._fitted_at + model.model_train_freq
    return model


def test_e1_the_signature_is_sacs():
    assert inspect.signature(MnM.train) == inspect.signature(SAC.train).replace(return_annotation=None)
    trained(BoxEnv(), 60).train(gradient_steps=1)


def test_e1_a_copy_trains_in_a_thread_without_an_environment():
    model = trained(BoxEnv(), 90, real_ratio=0.5)
    archive = io.BytesIO()
    model.save(archive)
    twin = MnM.load(archive, device="cpu")
    twin.replay_buffer = model.replay_buffer
    twin.set_logger(model.logger)
    before = twin._n_updates
    thread = Thread(target=due(twin).train, kwargs={"gradient_steps": 3, "batch_size": 8})
    thread.start()
    thread.join()
    assert twin._n_updates == before + 3
    assert twin._fitted_at == twin.num_timesteps


def test_e2_what_else_sac_does_in_training():
    model = trained(BoxEnv(), 60, learning_rate=lambda progress: 1e-3 * progress)
    model.policy.set_training_mode(False)
    model._current_progress_remaining = 0.5
    before = model._n_updates
    rates = [group["lr"] for group in model.world.dynamics_optimizer.param_groups]
    due(model).train(gradient_steps=4)
    assert model._n_updates == before + 4
    assert model.policy.training
    for optimizer in (model.critic.optimizer, model.ent_coef_optimizer):
        assert optimizer.param_groups[0]["lr"] == 5e-4
    assert model.actor.optimizer.param_groups[0]["lr"] == model.actor_rate**0.5 * 5e-4
    assert [group["lr"] for group in model.world.dynamics_optimizer.param_groups] == rates


def test_e2_targets_follow_at_their_interval(monkeypatch):
    model, updates = trained(BoxEnv(), 60, target_update_interval=3), []
    monkeypatch.setattr(MnM, "_update_target", lambda self: updates.append(1))
    model.train(gradient_steps=7)
    assert len(updates) == 3


def test_e3_a_learning_rate_of_zero_freezes_the_critic_but_not_its_target():
    model = trained(BoxEnv(), 60, real_ratio=0.5)
    model.lr_schedule = lambda _: 0.0
    critic, target = ([p.clone() for p in net.parameters()] for net in (model.critic, model.critic_target))
    model.train(gradient_steps=1)
    assert_same(list(model.critic.parameters()), critic)
    assert not th.equal(next(model.critic_target.parameters()), target[0])


def test_e4_the_worlds_time_is_logged():
    model = trained(BoxEnv(), 60)
    for name in ("dynamics/seconds", "classifier/seconds", "imagination/seconds"):
        assert 0 < model.logger.name_to_value[name] < 60, name


@pytest.mark.parametrize(("network", "objective"), [("dynamics", "mbpo"), ("classifier", "mnm-approx")])
def test_e5_a_world_that_is_not_finite_is_told_and_the_policy_kept(network, objective):
    model = trained(BoxEnv(), 60, real_ratio=0.0, objective=objective)
    with th.no_grad():
        for parameter in getattr(model.world, network).parameters():
            parameter.fill_(np.nan)
    with pytest.raises(ValueError, match=r"the (dynamics|classifier)'.* is not finite: lower"):
        due(model).train(gradient_steps=3)
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())


def test_e5_rewards_without_logarithm_are_told_and_the_policy_kept():
    model = MnM("MlpPolicy", BoxEnv(), **small(objective="mnm"))
    with pytest.raises(ValueError, match="takes log r"):
        model.learn(60)
    assert all_finite(model)


@pytest.mark.parametrize(("expansion", "rows"), [(0, 8), (5, 4)])
def test_e6_the_base_algorithm_is_fed_and_not_copied(expansion, rows, monkeypatch):
    """What it asks for is a minibatch for each gradient step, and nothing else; who looks ahead takes half himself."""
    model, asked = trained(BoxEnv(), 60, real_ratio=0.5, expansion=expansion), []
    sample = MixedReplayBuffer.sample

    def watched(self, *args, **kwargs):
        asked.append((args, kwargs))
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(MixedReplayBuffer, "sample", watched)
    model.train(gradient_steps=3, batch_size=8)
    assert asked == [((rows,), {"env": None})] * 3
