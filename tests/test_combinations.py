"""Whatever spaces, episodes and settings come together: finite training or a clear refusal, never anything else."""

import re
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import BoxEnv, soon
from gymnasium import spaces
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_bad_data import tensors

from sb3_mismatch import MBPO, OBJECTIVES, VMBPO, MnM
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC

REFUSALS = (ValueError, TypeError, AssertionError, NotImplementedError)


#: The sentences with which settings are refused that do not go together.
KNOWN = (
    "is no Box: wrap the environment",
    "is an image, whose dynamics are not learned here",
    "Continuous action space must have a finite lower and upper bound",
    "VecNormalize only supports",
    "N-step returns are not supported for Dict",
    "NStepReplayBuffer doesn't support optimize_memory_usage",
    "DictReplayBuffer does not support optimize_memory_usage",
    "sums rewards before objective=.* can take their logarithm",
    "takes log r and met r",
    "leaves objective=.* without a bound",
    "is more than n_members",
    "You must use only one env when doing episodic training",
    # CrossQ has no policy for Dict observations.
    "Policy MultiInputPolicy unknown",
    "batch_size=1 has no variance",
    "buffer_size=.* with optimize_memory_usage=True",
    "the update diverged; lower learning_rate",
)


class AnyEnv(BoxEnv):
    """The point of BoxEnv in any space of observations and bounds of actions, its rewards scaled and shifted."""

    def __init__(self, space, low, high, length, terminates, scale, shift):
        super().__init__(space, length=length, terminates=terminates)
        self.action_space = spaces.Box(low, high, dtype=high.dtype)
        self.scale, self.shift = scale, shift

    def _observe(self, space: spaces.Space) -> Any:
        if isinstance(space, spaces.Discrete):
            return int(self.t % space.n)
        if isinstance(space, spaces.MultiBinary):
            return np.resize(self.point > 0, space.shape).astype(np.int8)
        if isinstance(space, spaces.Box):
            return np.resize(self.point, space.shape).clip(space.low, space.high).astype(space.dtype)
        return super()._observe(space)

    def step(self, action):
        assert self.action_space.contains(action), action
        observation, reward, *rest = super().step(np.asarray(action, np.float64))
        return observation, self.scale * reward + self.shift, *rest


def boxes():
    """Boxes of vectors mostly, of any bounds and floating type; integers among them."""
    shapes = st.sampled_from([(1,), (3,), (5,), (2, 2), (1, 1, 2)])
    bounds = st.sampled_from([(-np.inf, np.inf), (-1.0, 1.0), (0.0, np.inf), (-5.0, 40.0)])
    kinds = st.sampled_from([np.float32, np.float64])
    real = st.builds(lambda shape, bound, kind: spaces.Box(*bound, shape, kind), shapes, bounds, kinds)
    whole = st.builds(lambda shape, kind: spaces.Box(-9, 9, shape, kind), shapes, st.sampled_from([np.int8, np.int64]))
    return st.one_of(real, real, real, whole)


def observation_spaces():
    others = st.sampled_from([spaces.Discrete(3), spaces.MultiBinary(2), spaces.Box(0, 255, (36, 36, 3), np.uint8)])
    dicts = st.dictionaries(st.sampled_from(["a", "b", "c"]), boxes(), min_size=1).map(spaces.Dict)
    return st.one_of(boxes(), boxes(), boxes(), dicts, dicts, others)


def action_bounds():
    """Lowest and highest action."""
    shapes, kinds = st.sampled_from([(1,), (2,), (2, 2)]), st.sampled_from([np.float32, np.float64])
    bounds = st.sampled_from([(-1.0, 1.0), (-2.0, 2.0), (0.0, 1.0), (-1e-3, 5.0)] * 5 + [(-np.inf, np.inf)])
    return st.builds(lambda shape, bound, kind: [np.full(shape, end, kind) for end in bound], shapes, bounds, kinds)


def optional(**strategies):
    """Any of these settings, or the default."""
    return st.fixed_dictionaries({}, optional=strategies)


CASES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from([MnM, MnM, MBPO, VMBPO, MnMTQC, MnMCrossQ]),
        "space": observation_spaces(),
        "actions": action_bounds(),
        "length": st.sampled_from([1, 2, 7, 30, 10**9]),
        "terminates": st.booleans(),
        "scale": st.sampled_from([0.0, 1.0, 1.0, -1.0, 1e4, 1e-6]),
        "shift": st.sampled_from([0.0, 0.0, 1.0, -3.0]),
        "n_envs": st.sampled_from([1, 1, 2, 3]),
        "normalize": st.sampled_from([None, None, {}, {"norm_reward": False}, {"norm_obs": False, "gamma": 0.5}]),
        "base": optional(
            train_freq=st.sampled_from([1, 3, (2, "step"), (1, "episode")]),
            gradient_steps=st.sampled_from([-1, 0, 1, 2]),
            buffer_size=st.sampled_from([1, 7, 100, 1000]),
            batch_size=st.sampled_from([1, 2, 5, 16]),
            learning_starts=st.sampled_from([0, 1, 30]),
            learning_rate=st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
            gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
            tau=st.sampled_from([0.0, 0.1, 1.0]),
            ent_coef=st.sampled_from(["auto", "auto_0.1", 0.0, 0.2]),
            n_steps=st.sampled_from([1, 2, 5]),
            use_sde=st.booleans(),
            sde_sample_freq=st.sampled_from([-1, 4]),
            use_sde_at_warmup=st.booleans(),
            optimize_memory_usage=st.booleans(),
            target_update_interval=st.sampled_from([1, 3]),
            action_noise=st.sampled_from([None, "normal"]),
            share_features_extractor=st.booleans(),
        ),
        "world": optional(
            objective=st.sampled_from(list(OBJECTIVES)),
            real_ratio=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
            horizon=st.sampled_from([1, 3, [0, 100, 1, 4]]),
            imagined_n_steps=st.sampled_from([1, 2, 9]),
            model_train_freq=st.sampled_from([1, 30, 100]),
            imagined_per_step=st.sampled_from([1, 3]),
            n_members=st.sampled_from([1, 2, 2, 4, 4]),
            n_elites=st.sampled_from([1, 1, 2]),
            log_ratio_weight=st.sampled_from([0.0, 1.0]),
            adversarial_weight=st.sampled_from([0.0, 1.0]),
            likelihood_weight=st.sampled_from([0.0, 1.0]),
            reward_shift=st.sampled_from(["auto", 0.0, 50.0]),
            termination_fn=st.sampled_from([None, lambda s, a, t: a.flatten(1)[:, 0] > 0.9]),
            reward_fn=st.sampled_from([None, lambda s, a, t: a.flatten(1).sum(dim=1)]),
        ),
    }
)


def environment(case):
    def make() -> gym.Env:
        names = ("space", "length", "terminates", "scale", "shift")
        low, high = case["actions"]
        return AnyEnv(**{name: case[name] for name in names}, low=low, high=high)

    env = DummyVecEnv([make] * case["n_envs"])
    return env if case["normalize"] is None else VecNormalize(env, **case["normalize"])


def arguments(case):
    """The agent's: tiny networks, short fits."""
    base = {"learning_starts": 20, "gradient_steps": 1, "batch_size": 8, "buffer_size": 200, **case["base"]}
    if case["kind"] is MnMCrossQ:
        # It has no target networks.
        base = {name: value for name, value in base.items() if name not in ("tau", "target_update_interval")}
    base["policy_kwargs"] = {"net_arch": [4], "share_features_extractor": base.pop("share_features_extractor", False)}
    if base.get("optimize_memory_usage"):
        base["replay_buffer_kwargs"] = {"handle_timeout_termination": False}
    if base.get("action_noise") == "normal":
        shape = case["actions"][0].shape
        base["action_noise"] = NormalActionNoise(np.zeros(shape), 0.1 * np.ones(shape))
    fits = {
        "dynamics_kwargs": {"net_arch": [4], "end_arch": [4]},
        "classifier_kwargs": {"net_arch": [4]},
        "fit_kwargs": {"dynamics_steps": 3, "classifier_steps": 2, "batch_size": 8},
    }
    few = {"model_train_freq": 40, "imagined_per_step": 1, "n_members": 2, "n_elites": 1, "reward_shift": "auto"}
    return {**base, **few, **fits, **case["world"], "seed": 0, "device": "cpu"}


def check(case, steps=100):
    """Train; a refusal is a sentence, and whatever happens every weight is finite."""
    model, refusal = None, ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            policy = "MultiInputPolicy" if isinstance(case["space"], spaces.Dict) else "MlpPolicy"
            model = case["kind"](policy, environment(case), **arguments(case))
            model.learn(steps)
            event("learned with a world" if model._fitted_at is not None else "learned")
        except REFUSALS as error:
            refusal = str(error)
            event(f"refused: {refusal[:60]}")
    assert refusal == "" or any(re.search(known, refusal) for known in KNOWN), refusal
    if model is not None:
        unbounded = ("world.dynamics.low", "world.dynamics.high") if model._fitted_at is None else ()
        for name, value in tensors(model).items():
            assert name in unbounded or value.isfinite().all(), name


def examples(n):
    """Hypothesis' settings: the same cases at every run, and no clock."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=checks, print_blob=False
    )


@pytest.fixture(autouse=True)
def _worlds_are_fitted_soon(monkeypatch):
    soon(monkeypatch, rows=30)
    th.set_num_threads(1)


# Episodes that never end are waited for, as by SAC.
CASES = CASES.filter(lambda case: case["length"] < 1000 or case["base"].get("train_freq") != (1, "episode"))


@examples(40)
@given(case=CASES)
def test_combinations(case):
    check(case)


@pytest.mark.expensive
@examples(400)
@given(case=CASES)
def test_many_combinations(case):
    check(case)
