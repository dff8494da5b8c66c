"""Minibatches that are made together: the same rows as one by one."""

import warnings

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, soon, trained
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer

from sb3_mismatch.fast_sac import FastSAC
from sb3_mismatch.minibatches import STEPS_AHEAD, drawn_on_host, minibatches, sent

DICT = spaces.Dict({key: spaces.Box(-1, 1, (n,), np.float32) for key, n in (("a", 2), ("b", 3))})


def agent(kind, n_envs=2):
    env = environments(n_envs, (lambda: BoxEnv(DICT)) if kind == "dict" else BoxEnv, normalize=kind == "normalized")
    n_steps = {"n_steps": 3} if kind == "n-step" else {}
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    return FastSAC(policy, env, learning_starts=10**6, buffer_size=500, seed=0, device="cpu", **n_steps).learn(100)


def rows(batch):
    """All that a minibatch holds, in one row of tensors."""
    parts = [list(x.values()) if isinstance(x, dict) else [x] for x in batch]
    return [x for part in parts for x in part if x is not None]


@pytest.mark.parametrize("kind", ["plain", "dict", "n-step", "normalized"])
def test_the_same_rows_as_one_by_one(kind):
    model = agent(kind)
    buffer, env = model.replay_buffer, model._vec_normalize_env
    assert isinstance(buffer, NStepReplayBuffer) == (kind == "n-step")
    np.random.seed(0)
    expected = [buffer.sample(8, env=env) for _ in range(3)]
    np.random.seed(0)
    drawn = drawn_on_host(buffer, 3, 8, env)
    together = list(sent(drawn, th.device("cpu")))
    assert len(together) == 3
    assert type(together[0]) is type(expected[0])
    assert (together[0].discounts is None) == (kind != "n-step")
    for actual, wanted in zip(together, expected, strict=True):
        assert_same(rows(actual), rows(wanted))


def test_minibatches_without_rows():
    served = list(minibatches(agent("plain", 1).replay_buffer, 3, 0))
    assert [batch.observations.shape for batch in served] == [(0, 3)] * 3


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "dict", "n-step", "normalized"])
def test_what_is_served_is_what_as_many_calls_of_sample_draw(kind, n_envs, monkeypatch):
    model = agent(kind, n_envs)
    buffer, env = model.replay_buffer, model._vec_normalize_env
    np.random.seed(0)
    expected = [buffer.sample(8, env=env) for _ in range(STEPS_AHEAD + 2)]
    next_draw = np.random.rand()
    calls = []
    sample = buffer.sample
    monkeypatch.setattr(buffer, "sample", lambda n, env: (calls.append(n), sample(n, env=env))[1])
    np.random.seed(0)
    served = list(minibatches(buffer, STEPS_AHEAD + 2, 8, env))
    assert np.random.rand() == next_draw
    assert len(served) == len(expected)
    assert type(served[0]) is type(expected[0])
    for actual, wanted in zip(served, expected, strict=True):
        assert_same(rows(actual), rows(wanted))
    # Two environments are drawn beside the rows, and other buffers draw as they like.
    at_once = n_envs == 1 and kind in ("plain", "normalized")
    assert calls == ([8 * STEPS_AHEAD, 16] if at_once else [8] * (STEPS_AHEAD + 2))


def test_many_are_sent_in_parts_and_the_buffer_stays_on_its_device():
    buffer = agent("plain").replay_buffer
    buffer.device = th.device("meta")  # No host memory: as on a GPU nothing can be drawn there.
    served = list(minibatches(buffer, STEPS_AHEAD + 1, 8))
    assert len(served) == STEPS_AHEAD + 1
    assert {x.device.type for batch in served for x in rows(batch)} == {"meta"}
    assert {batch.observations.shape for batch in served} == {(8, 3)}
    assert buffer.device.type == "meta"
    buffer.pos = 0  # Nothing to draw from.
    with pytest.raises(ValueError, match="high"):
        drawn_on_host(buffer, 1, 8, None)
    assert buffer.device.type == "meta"


def waits(work):
    """How often the host waits for the device."""
    th.cuda.synchronize()
    th.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        th.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in told)


@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changed", [{"real_ratio": 0.5}, {"expansion": 0, "real_ratio": 0.5}, {"real_ratio": 1.0}])
def test_no_gradient_step_waits_for_the_device(changed, monkeypatch):
    soon(monkeypatch)
    model = trained(BoxEnv(), 120, compile=True, device="cuda", **changed)
    model.train(8, 16)  # Graphs are captured.
    assert waits(lambda: model.train(5, 16)) == waits(lambda: model.train(40, 16)) > 0


@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_no_step_of_a_fit_waits_for_the_device(monkeypatch):
    soon(monkeypatch)

    def waited(steps):
        fit_kwargs = {"dynamics_steps": steps, "classifier_steps": steps, "batch_size": 32}
        model = trained(BoxEnv(), 120, device="cuda", fit_kwargs=fit_kwargs)
        data = model._real_transitions()
        with model._streams.active():
            return waits(lambda: [model._fit_dynamics(data), model._fit_classifier(data)])

    assert waited(10) == waited(40) > 0
