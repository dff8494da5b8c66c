"""Bad data ends in a clear error or in finite training; the rows of the table in docs/robustness.md."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, small, soon, trained
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_mismatch import MnM
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC

TABLE = Path(__file__).parents[1] / "docs" / "robustness.md"
KINDS = pytest.mark.parametrize("kind", [MnM, MnMTQC, MnMCrossQ])


def test_the_table_names_every_test_and_no_other():
    rows = re.findall(r"^\| (.+) \| (refused|learns|as with SAC)(.*) \| (.+) \|$", TABLE.read_text(), re.MULTILINE)
    named = [name for *_, tests in rows for name in re.findall(r"`(test_\w+)`", tests)]
    files = [Path(__file__), Path(__file__).with_name("test_guards.py")]
    here, guards = (set(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)) for file in files)
    assert len(rows) >= 17
    assert set(named) - here - guards == set()
    assert here - set(named) == {"test_the_table_names_every_test_and_no_other"}


class Faulty(BoxEnv):
    """Changes what it returns: ``fault(observation, reward, steps) -> (observation, reward)``, also at the reset."""

    def __init__(self, fault, **kwargs):
        super().__init__(**kwargs)
        self.fault, self.steps = fault, 0

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        return self.fault(observation, 0.0, self.steps)[0], info

    def step(self, action):
        assert np.isfinite(action).all()
        observation, reward, *rest = super().step(action)
        self.steps += 1
        return *self.fault(observation, reward, self.steps), *rest


def agent(fault=None, kind=MnM, n_envs=1, normalize=False, **changed):
    """An agent in an environment with a fault, whose world is fitted at 60 transitions and every 100 steps."""
    names = ("length", "terminates")
    kwargs = {name: changed.pop(name) for name in names if name in changed}
    make = (lambda: BoxEnv(**kwargs)) if fault is None else (lambda: Faulty(fault, **kwargs))
    return kind("MlpPolicy", environments(n_envs, make, normalize=normalize), **small(**changed))


def tensors(model):
    """All that networks and optimizers hold, by name."""
    names, variables = model._get_torch_save_params()

    def flat(name, value):
        if isinstance(value, dict):
            return [pair for key, part in value.items() for pair in flat(f"{name}.{key}", part)]
        return [(name, value)] if isinstance(value, th.Tensor) else []

    parameters = model.get_parameters()
    held = [pair for name in names for pair in flat(name, parameters[name])]
    return dict(held) | {name: getattr(model, name).detach() for name in variables}


def assert_sound(model, folder):
    """No network and no optimizer holds a value that is not finite, and all that was collected is saved and loaded."""
    # Until the first fit the range of the data is unbounded.
    unbounded = ("world.dynamics.low", "world.dynamics.high") if model._fitted_at is None else ()
    for name, value in tensors(model).items():
        assert name in unbounded or value.isfinite().all(), name
    model.save(folder / "agent")
    model.save_replay_buffer(folder / "buffer")
    copy = type(model).load(folder / "agent", device="cpu")
    copy.load_replay_buffer(folder / "buffer")
    assert_same(tensors(copy), tensors(model))
    for name in ("observations", "actions", "rewards", "dones"):
        assert_same(getattr(copy.replay_buffer, name), getattr(model.replay_buffer, name))
    assert model.replay_buffer.size() > 0


@pytest.fixture(autouse=True)
def _worlds_are_fitted_soon(monkeypatch):
    soon(monkeypatch)


def spoiled(what, value, after):
    """A fault from a step on."""

    def fault(observation, reward, steps):
        if steps >= after:
            observation = np.where([False, what == "observation", False], value, observation).astype(np.float32)
            reward = value if what == "reward" else reward
        return observation, reward

    return fault


# -- numbers --


@pytest.mark.parametrize(
    ("kind", "what", "value"),
    [
        (MnM, "observation", np.nan),
        (MnM, "reward", -np.inf),
        (MnMTQC, "observation", np.inf),
        (MnMCrossQ, "reward", np.nan),
    ],
)
def test_observations_and_rewards_that_are_not_finite_are_told(kind, what, value, tmp_path):
    model = agent(spoiled(what, value, after=70), kind)
    with pytest.raises(ValueError, match=rf"^the environment returned {what} = {value} .*VecCheckNan"):
        model.learn(200)
    assert model.replay_buffer.size() == 69
    assert_sound(model, tmp_path)


@pytest.mark.parametrize(("what", "value", "normalize"), [("observation", 1e20, False), ("reward", -1e20, True)])
def test_numbers_whose_squares_overflow_are_told(what, value, normalize, tmp_path):
    model = agent(spoiled(what, value, after=70), normalize=normalize)
    with pytest.raises(ValueError, match=rf"^the environment returned {what} = -?1.*e\+20 .*at most 1e\+15"):
        model.learn(200)
    assert_sound(model, tmp_path)


@pytest.mark.parametrize("size", [1e9, 1e-9])
@pytest.mark.parametrize(
    ("kind", "objective"), [(MnM, "mnm-approx"), (MnM, "mnm"), (MnMTQC, "mnm-approx"), (MnMCrossQ, "mnm-approx")]
)
def test_large_and_small_rewards_are_learned_from(kind, objective, size, tmp_path):
    def fault(observation, reward, _):
        # Above 0 for the logarithm.
        return observation, size * (reward + 20.0)

    model = agent(fault, kind, objective=objective, reward_shift="auto").learn(170)
    assert model._fitted_at > 150
    assert model.world.imagined.sample(50).rewards.abs().max() < 1e3 * size
    assert_sound(model, tmp_path)


@pytest.mark.parametrize(("kind", "normalize"), [(MnM, False), (MnM, True), (MnMTQC, False), (MnMCrossQ, False)])
def test_large_observations_are_learned_from(kind, normalize, tmp_path):
    model = agent(lambda observation, reward, _: (1e6 * observation, reward), kind, normalize=normalize).learn(170)
    assert model._fitted_at > 150
    assert_sound(model, tmp_path)


@pytest.mark.parametrize(
    ("kind", "constant", "normalize"),
    [(MnM, 0.0, False), (MnM, 7.0, True), (MnM, -1e6, False), (MnMTQC, 7.0, False), (MnMCrossQ, -1e6, True)],
)
def test_constant_dimensions_are_learned_from(kind, constant, normalize, tmp_path):
    def fault(observation, reward, _):
        return np.array([constant, observation[1], constant], np.float32), reward

    model = agent(fault, kind, normalize=normalize).learn(170)
    imagined = model.world.imagined.sample(50)
    assert (imagined.next_observations[:, [0, 2]] == constant).all()
    assert_sound(model, tmp_path)


def test_environments_in_which_nothing_happens_are_learned_from(tmp_path):
    model = agent(lambda observation, reward, _: (0 * observation, 0.0)).learn(170)
    assert (model.world.imagined.sample(50).rewards == 0).all()
    assert_sound(model, tmp_path)


# -- episodes --


# SB3's own warning when it loads an agent with n_steps, SAC too.
@pytest.mark.filterwarnings("ignore:`n_steps=3` is ignored")
@pytest.mark.parametrize("settings", [{}, {"optimize_memory_usage": True}, {"n_steps": 3}], ids=str)
@pytest.mark.parametrize("terminates", [True, False], ids=["ends", "time limit"])
def test_episodes_of_one_step_are_learned_from(terminates, settings, tmp_path):
    if "optimize_memory_usage" in settings:
        settings = {**settings, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = agent(length=1, terminates=terminates, **settings).learn(170)
    assert model.replay_buffer.dones[:170].all()
    # Without last observations no row tells what follows what: the base algorithm learns alone.
    assert (model._fitted_at is None) == ("optimize_memory_usage" in settings)
    assert_sound(model, tmp_path)


@pytest.mark.parametrize("objective", ["mnm-approx", "mnm"])
def test_episodes_that_never_end_are_learned_from(objective, tmp_path):
    model = agent(length=10**9, objective=objective, reward_shift="auto").learn(170)
    assert not model.replay_buffer.dones.any()
    assert model._fitted_at > 150
    assert_sound(model, tmp_path)


# -- environments that fail --


class Broken(BoxEnv):
    """Raises, or dies, at its 70th step or its fourth reset."""

    def __init__(self, where, dies=False):
        super().__init__()
        self.where, self.dies, self.calls = where, dies, {"step": 0, "reset": 0}

    def fail(self, where, after):
        self.calls[where] += 1
        if where == self.where and self.calls[where] == after:
            if self.dies:
                os._exit(1)
            raise OSError("the robot's cable is out")

    def reset(self, **kwargs):
        self.fail("reset", 4)
        return super().reset(**kwargs)

    def step(self, action):
        self.fail("step", 70)
        return super().step(action)


@pytest.mark.parametrize("where", ["step", "reset"])
def test_an_environment_that_raises_is_heard(where, tmp_path):
    model = MnM("MlpPolicy", Broken(where), **small())
    with pytest.raises(OSError, match="the robot's cable is out"):
        model.learn(200)
    collected = model.replay_buffer.size()
    assert collected == (69 if where == "step" else 59)
    assert_sound(model, tmp_path)
    # Repaired, it goes on.
    model.learn(40, reset_num_timesteps=False)
    assert model.replay_buffer.size() == collected + 40
    assert_sound(model, tmp_path)


def test_a_worker_that_dies_is_told(tmp_path):
    env = SubprocVecEnv([lambda: Broken("nowhere"), lambda: Broken("step", dies=True)])
    model = MnM("MlpPolicy", env, **small())
    try:
        with pytest.raises(RuntimeError, match=r"^the process of environment 1 has died.* save\(\)"):
            model.learn(400)
        assert model.replay_buffer.size() == 69
        assert_sound(model, tmp_path)
        model.set_env(DummyVecEnv([BoxEnv, BoxEnv]))
        model.learn(40, reset_num_timesteps=False)
    finally:
        for process, remote in zip(env.processes, env.remotes, strict=True):
            process.terminate()
            process.join()
            remote.close()


# -- functions of the user's --


def worse(answer):
    """A function for reward or end that answers so."""
    return lambda observations, actions, next_observations: answer(next_observations[:, 0])


@pytest.mark.parametrize(
    ("name", "answer", "told"),
    [
        ("termination_fn", lambda x: x[:, None, None], r"a tensor of shape"),
        ("termination_fn", lambda x: th.log(x - x), "returned NaN or infinity"),
        ("reward_fn", lambda x: x[0], r"a tensor of shape \(\)"),
        ("reward_fn", lambda x: x[:-1], r"a tensor of shape"),
        ("reward_fn", lambda x: x.repeat(2, 1), r"a tensor of shape \(2, "),
        ("reward_fn", lambda x: x.numpy(), "returned ndarray"),
        ("reward_fn", lambda x: None, "returned NoneType"),
        ("reward_fn", lambda x: th.complex(x, x), "returned complex numbers"),
        ("reward_fn", lambda x: th.where(x > x.median(), th.nan, x), "returned NaN or infinity"),
        ("reward_fn", lambda x: x * th.inf, "returned NaN or infinity"),
        ("reward_fn", lambda x: 1e20 + x, r"beyond 1e\+15"),
    ],
    ids=["ends: cube", "ends: infinite", "scalar", "short", "wide", "numpy", "None", "complex", "NaN", "inf", "1e20"],
)
def test_functions_that_answer_wrongly_are_told(name, answer, told, tmp_path):
    model = agent(**{name: worse(answer)})
    with pytest.raises(ValueError, match=rf"^{name} .*{told}"):
        model.learn(200)
    model.termination_fn = model.reward_fn = None  # Those of the test cannot be loaded elsewhere.
    assert_sound(model, tmp_path)


@pytest.mark.parametrize("kind", [th.bool, th.int64, th.float16], ids=str)
def test_functions_may_answer_in_any_real_type(kind, tmp_path):
    answer = worse(lambda x: (x > 0).to(kind))
    model = agent(termination_fn=answer, reward_fn=answer).learn(120)
    imagined = model.world.imagined.sample(50)
    # Behind an end nothing counts.
    rewards = imagined.rewards[imagined.alive > 0]
    assert set(rewards.tolist()) <= {0.0, 1.0}
    assert_sound(model, tmp_path)


class Noise(ActionNoise):
    def __init__(self, drawn):
        super().__init__()
        self.drawn = drawn

    def __call__(self):
        return self.drawn


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize(
    ("drawn", "told"),
    [
        (np.full(2, np.nan), "action_noise returned = nan"),
        (np.array([0.0, np.inf]), "action_noise returned = inf"),
        (np.zeros(3), r"action_noise returned float64 of shape \((2, 3|3,)\)"),
        (np.zeros((4, 2)), r"action_noise returned float64 of shape \((2, )?4, 2\)"),
        (np.zeros(2, complex), "action_noise returned complex128"),
        (np.array(["a", "b"]), "action_noise returned <U1"),
        (None, "action_noise returned object"),
    ],
    ids=["NaN", "inf", "wide", "many", "complex", "text", "None"],
)
def test_noise_that_is_none_is_told_before_the_environment_acts(drawn, told, n_envs):
    model = agent(n_envs=n_envs, action_noise=Noise(drawn))
    with pytest.raises((ValueError, TypeError)) as error:
        model.learn(200)
    assert re.match(told, str(error.value)), error.value
    assert model.replay_buffer.size() == 0


@pytest.mark.parametrize("n_envs", [1, 2])
def test_noise_of_numbers_is_added(n_envs, tmp_path):
    for drawn in (np.full(2, 0.5, np.float32), np.ones(2, np.int64)):
        model = agent(n_envs=n_envs, action_noise=Noise(drawn)).learn(60)
        assert_sound(model, tmp_path)


@KINDS
def test_actions_that_are_not_finite_are_told_before_the_environment_acts(kind, tmp_path):
    model = agent(lambda *args: args[:2], kind).learn(80)
    model.predict = lambda *args, **kwargs: (np.full((1, 2), np.nan, np.float32), None)
    with pytest.raises(ValueError, match=r"^the action = nan at .*weights given to the policy must be finite"):
        model.learn(100, reset_num_timesteps=False)
    del model.predict
    assert_sound(model, tmp_path)


@pytest.mark.parametrize(
    ("kind", "rate"), [(MnM, np.nan), (MnM, np.inf), (MnM, -1e-3), (MnM, 1e20), (MnMTQC, np.nan), (MnMCrossQ, np.nan)]
)
def test_schedules_that_return_no_learning_rate_are_told(kind, rate, tmp_path):
    model = agent(kind=kind, learning_rate=lambda progress: 1e-3 if progress > 0.5 else rate)
    with pytest.raises(ValueError, match=rf"^learning_rate returned {re.escape(str(rate))} at remaining progress 0\.5"):
        model.learn(200)
    assert model.num_timesteps == 100
    model.learning_rate = model.lr_schedule = 1e-3  # The test's own cannot be loaded elsewhere.
    assert_sound(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", np.nan), ("gamma", 1.5), ("tau", np.nan), ("tau", -1.0), ("gamma", "0.9")]
)
def test_settings_of_sac_that_would_ruin_the_targets_are_told(name, value):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}={value!r} must be"):
        agent(**{name: value})


def test_a_batch_of_one_row_has_no_variance_for_crossq():
    with pytest.raises(ValueError, match=r"^batch_size=1 has no variance"):
        agent(kind=MnMCrossQ, batch_size=1)


def test_a_bound_without_discount_is_told():
    with pytest.raises(ValueError, match=r"^gamma=1 leaves objective='mnm' without a bound"):
        agent(gamma=1.0, objective="mnm")
    model = agent(gamma=1.0).learn(120)
    assert model._fitted_at is not None


# -- a replay buffer that was loaded --


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("observations", np.nan),
        ("next_observations", -np.inf),
        ("actions", np.nan),
        ("rewards", np.inf),
        ("dones", np.nan),
        ("timeouts", np.nan),
    ],
)
def test_loaded_rows_that_are_not_finite_are_told(name, value, tmp_path):
    model = trained(BoxEnv(), 60)
    getattr(model.replay_buffer, name)[30] = value
    model.save_replay_buffer(tmp_path / "spoiled")
    other = MnMCrossQ("MlpPolicy", BoxEnv(), **small())
    other.load_replay_buffer(tmp_path / "spoiled")
    with pytest.raises(ValueError, match=rf"^the replay buffer's {name} = {value} at index \[30, 0.* remove such rows"):
        other.learn(100)
    assert other.num_timesteps == 0
    getattr(other.replay_buffer, name)[30] = 0.0
    assert_sound(other.learn(100), tmp_path)


def test_rows_beyond_those_stored_are_not_looked_at():
    model = trained(BoxEnv(), 60)
    model.replay_buffer.rewards[100:] = np.nan
    model.learn(20, reset_num_timesteps=False)
