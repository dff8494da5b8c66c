"""examples/watch.py: poses from observations, and a film of a small agent, real beside imagined."""

import importlib.util
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
from agents import soon, trained
from PIL import Image

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def watch():
    spec = importlib.util.spec_from_file_location("watch", ROOT / "examples" / "watch.py")
    sys.modules["watch"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["Hopper", "Walker2d", "HalfCheetah", "Swimmer", "Ant", "InvertedPendulum", "InvertedDoublePendulum"]
)
def test_pose_follows_from_the_observation(name, watch):
    env = gym.make(f"{name}-v5")
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(5):
        observation, *_ = env.step(env.action_space.sample())
    data = env.unwrapped.data
    pose, n_skipped = watch.pose_of(env.unwrapped)
    qpos, qvel = pose(observation, data.qpos[:n_skipped])
    np.testing.assert_allclose(qpos, data.qpos, atol=1e-12)
    # Some environments clip velocities to 10 in what they observe.
    np.testing.assert_allclose(qvel.clip(-10, 10), data.qvel.clip(-10, 10), atol=1e-12)
    env.close()


def test_environments_whose_pose_is_not_told_are_refused(watch):
    env = gym.make("Reacher-v5")
    with pytest.raises(ValueError, match="--env Reacher-v5: its observations do not tell its pose; choose one"):
        watch.pose_of(env.unwrapped)
    env.close()


def test_the_side_that_is_over_first_stands_still(watch):
    def side(n):
        return [watch.Shown(np.full((200, 200, 3), step, np.uint8), 2.0, None, step == n - 1) for step in range(n)]

    frames = watch.side_by_side(side(2), side(4))
    assert [frame[0, 0, 0] for frame in frames] == [0, 1, 1, 1]
    assert [frame[0, 200, 0] for frame in frames] == [0, 1, 2, 3]
    np.testing.assert_array_equal(frames[1][:, :200], frames[3][:, :200])
    assert (frames[1][200:, :200] != frames[0][200:, :200]).any()  # the caption has gone on with the step
    assert all(frame.shape[0] % 2 == 0 for frame in frames)


@pytest.fixture(scope="module")
def screen():
    """Whether MuJoCo can draw here."""
    env = gym.make("InvertedPendulum-v5", render_mode="rgb_array", width=64, height=64)
    try:
        env.reset()
        env.render()
    except Exception as error:
        pytest.skip(f"MuJoCo cannot draw here: {error}")
    finally:
        env.close()


def test_a_film_of_a_small_agent(watch, screen, monkeypatch, tmp_path):
    soon(monkeypatch)
    model = trained("InvertedPendulum-v5", 100)
    model.save(tmp_path / "model.zip")
    film, still = tmp_path / "film.gif", tmp_path / "still.png"
    given = [
        str(tmp_path / "model.zip"),
        "--env",
        "InvertedPendulum-v5",
        "--steps",
        "8",
        "--size",
        "64",
        "--speed",
        "1",
    ]
    watch.main([*given, "--out", str(film), "--still", str(still), "--still-step", "0"])
    frames = iio.imread(film)
    assert 3 <= len(frames) <= 9
    assert frames.shape[2] == 128
    # At the start both sides show the same.
    first = np.asarray(Image.open(still))
    np.testing.assert_array_equal(first[:64, :64], first[:64, 64:])
    # It is the pendulum: as MuJoCo draws it from the same start.
    env = gym.make("InvertedPendulum-v5", render_mode="rgb_array", width=64, height=64)
    env.reset(seed=0)
    np.testing.assert_array_equal(first[:64, :64], env.render())
    # Later the imagined pendulum stands where the model imagines it, and MuJoCo has not moved it.
    observation, _ = env.reset(seed=0)
    imagined = model.imagine(observation, 3, deterministic=True)
    assert imagined.alive.all()
    shown = watch.imagined_episode(model, env, observation, np.zeros(0), 3)
    state = imagined.observations[3, 0].astype(np.float64)
    np.testing.assert_allclose(env.unwrapped.data.qpos, state[:2])
    env.unwrapped.set_state(state[:2], state[2:])
    np.testing.assert_array_equal(shown[3].frame, env.render())
    assert [step.reward for step in shown[1:]] == pytest.approx(imagined.rewards[:, 0])
    env.close()


# What imageio's reader of videos leaves open when it is done.
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_films_are_gifs_or_videos(watch, tmp_path):
    frames = [np.full((32, 64, 3), 10 * step, np.uint8) for step in range(6)]
    for name in ("film.gif", "film.mp4"):
        watch.write(tmp_path / name, frames, rate=10.0)
        found = iio.imread(tmp_path / name)
        assert found.shape == (6, 32, 64, 3)
        np.testing.assert_allclose(found.mean(axis=(1, 2, 3)), 10 * np.arange(6), atol=3)
