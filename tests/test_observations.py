"""Flat observations and VecNormalize's statistics, against the space and against VecNormalize."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from toys import CPU

from sb3_mismatch.observations import FlatObservations, Normalization


def box(*shape: int, dtype: type = np.float32) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, dtype)


DICT = spaces.Dict({"b": box(2, 3), "a": box(4, dtype=np.float64), "c": box(1)})


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1,), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_box_round_trip(shape, dtype):
    flat = FlatObservations(box(*shape, dtype=dtype))
    values = np.random.default_rng(0).normal(size=(5, *shape)).astype(dtype)
    rows = flat.flatten(values, 5)
    assert rows.shape == (5, flat.dim)
    assert rows.dtype == np.float32
    back = flat.unflatten(th.from_numpy(rows))
    np.testing.assert_array_equal(back.numpy(), values.astype(np.float32))


def test_rows_and_environments_become_rows():
    """(steps, n_envs, ...) is read row by row, environment by environment."""
    values = np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(FlatObservations(box(4)).flatten(values, 6), np.arange(24.0).reshape(6, 4))


@pytest.mark.parametrize("keys", ["abc", "cab"])
def test_dict_round_trip_in_any_order(keys):
    flat = FlatObservations(DICT)
    generator = np.random.default_rng(0)
    values = {key: generator.normal(size=(5, *DICT[key].shape)) for key in keys}
    rows = flat.flatten(values, 5)
    assert rows.shape == (5, 11)
    back = flat.unflatten(th.from_numpy(rows))
    assert list(back) == list(DICT.spaces)
    for key in keys:
        np.testing.assert_array_equal(back[key].numpy(), values[key].astype(np.float32))


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        (spaces.Discrete(4), r"^observation_space = Discrete\(4\) is no Box: wrap"),
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), "^observation_space = .* is an image.*use stable_baselines3.SAC"),
        (spaces.Dict({"x": box(2), "n": spaces.Discrete(3)}), r"^observation_space\['n'\] = .* is no Box"),
        (spaces.Dict({"eye": spaces.Box(0, 255, (36, 36, 3), np.uint8)}), r"^observation_space\['eye'\] .* an image"),
        (spaces.Dict({"in": spaces.Dict({"x": box(2)})}), r"^observation_space\['in'\] = .* is no Box"),
    ],
)
def test_other_spaces_are_refused(space, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlatObservations(space)


class Noise(gym.Env):
    """Observes normals of many scales."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space = space

    def _observe(self):
        def draw(part):
            return (10 * self.np_random.normal(size=part.shape) + 3).astype(part.dtype)

        space = self.observation_space
        return {key: draw(part) for key, part in space.items()} if isinstance(space, spaces.Dict) else draw(space)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action):
        return self._observe(), 5 * float(self.np_random.normal()), False, False, {}


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        (box(3), {}),
        (box(2, 3, dtype=np.float64), {}),
        (box(3), {"clip_obs": 0.5, "clip_reward": 0.1}),
        (box(3), {"epsilon": 50.0}),
        (box(3), {"norm_obs": False}),
        (box(3), {"norm_reward": False, "clip_reward": 0.1}),
        (DICT, {}),
        (DICT, {"norm_obs_keys": ["b", "c"], "clip_obs": 0.5}),
        (DICT, {"norm_obs": False}),
    ],
)
def test_normalization_is_vec_normalize(space, settings):
    env = VecNormalize(DummyVecEnv([lambda: Noise(space)]), **settings)
    env.seed(0)
    env.reset()
    for _ in range(50):
        env.step(np.zeros((1, 1)))
    flat = FlatObservations(space)
    raw = env.get_original_obs()
    scale = Normalization.of(env, flat, CPU)
    ours = flat.unflatten(scale.observation(th.from_numpy(flat.flatten(raw, 1))))
    theirs = env.normalize_obs(raw)
    if not flat.is_dict:
        ours, theirs = {"all": ours}, {"all": theirs}
    for key in theirs:
        np.testing.assert_allclose(ours[key].numpy(), theirs[key], rtol=1e-5, atol=1e-6)
    rewards = np.array([[-100.0], [-0.3], [0.01], [7.0]], np.float32)
    ours = scale.reward(th.from_numpy(rewards)).numpy()
    np.testing.assert_allclose(ours, env.normalize_reward(rewards), rtol=1e-5)
