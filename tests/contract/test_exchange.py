"""L: zips and parameters exchanged with SAC."""

import io
import sys
import zipfile

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, sac_settings, small, trained, weights, world_contents
from stable_baselines3 import SAC

from sb3_mismatch import MBPO, MnM


@pytest.fixture(scope="module")
def ours():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_mismatch.mnm.FEWEST_ROWS", 40)
        return trained(BoxEnv(), 70, real_ratio=0.5)


@pytest.fixture(scope="module")
def theirs():
    return SAC("MlpPolicy", BoxEnv(), **sac_settings(seed=7)).learn(70)


def archived(model):
    archive = io.BytesIO()
    model.save(archive)
    return archive


def sac_parts(model):
    return {name: part for name, part in model.get_parameters().items() if not name.startswith("world.")}


def deployed_parts(model):
    """What SAC finds in our zip: the policy that `predict` plays."""
    return {**sac_parts(model), "policy": dict(model.deployed_policy.state_dict())}


@pytest.mark.parametrize("kind", [MnM, MBPO])
def test_l1_a_sac_zip_is_loaded_with_its_critic_and_learns_on(theirs, kind):
    model = kind.load(archived(theirs), env=BoxEnv(), device="cpu")
    assert_same(sac_parts(model), theirs.get_parameters())
    assert_same(model.log_ent_coef, theirs.log_ent_coef)
    assert (model.learning_starts, model.gradient_steps) == (theirs.learning_starts, theirs.gradient_steps)
    assert (model.num_timesteps, model._fitted_at) == (70, None)
    observation = np.ones(3, np.float32)
    assert_same(model.predict(observation, deterministic=True)[0], theirs.predict(observation, deterministic=True)[0])
    assert model.learn(60, reset_num_timesteps=False)._fitted_at is not None


def test_l1_the_untrained_world_is_told_at_verbose_1(theirs, capsys):
    MnM.load(archived(theirs), device="cpu")
    assert capsys.readouterr().out == ""
    MnM.load(archived(theirs), device="cpu", verbose=1)
    assert "No learned world in" in capsys.readouterr().out


def test_l2_sac_loads_our_zip_and_learns_on(ours):
    model = SAC.load(archived(ours), env=BoxEnv(), device="cpu")
    assert type(model) is SAC
    assert_same(model.get_parameters(), deployed_parts(ours))
    model.learn(20, reset_num_timesteps=False)


def test_l2_sac_loads_our_zip_without_this_package(ours, monkeypatch):
    archive = archived(ours)
    for name in [name for name in sys.modules if name.split(".")[0] == "sb3_mismatch"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError):
        import sb3_mismatch  # noqa: F401
    assert_same(SAC.load(archive, device="cpu").get_parameters(), deployed_parts(ours))


def test_l3_sacs_parameters_are_taken_and_the_world_kept(ours, theirs):
    for exact_match in (True, False):
        model = MnM.load(archived(ours), device="cpu")
        model.set_parameters(theirs.get_parameters(), exact_match=exact_match)
        assert_same(sac_parts(model), theirs.get_parameters())
        assert_same(world_contents(model), world_contents(ours))


def test_l3_parameters_are_read_from_zips_of_both(ours, theirs, tmp_path):
    ours.save(tmp_path / "ours")
    theirs.save(tmp_path / "theirs")
    model = MnM("MlpPolicy", BoxEnv(), **small(seed=9))
    model.set_parameters(str(tmp_path / "ours"))
    assert_same(model.get_parameters(), ours.get_parameters())
    model.set_parameters(str(tmp_path / "theirs"))
    assert_same(sac_parts(model), theirs.get_parameters())
    assert_same(model.world.dynamics.state_dict(), ours.world.dynamics.state_dict())


def test_l4_sac_takes_our_parameters_without_the_worlds(ours):
    model = SAC("MlpPolicy", BoxEnv(), **sac_settings(seed=9))
    with pytest.raises(ValueError, match="invalid object name"):
        model.set_parameters(ours.get_parameters(), exact_match=False)
    model.set_parameters(sac_parts(ours))
    assert_same(weights(model), weights(ours))


def test_l5_the_worlds_members_are_none_that_sac_reads(ours):
    names = zipfile.ZipFile(archived(ours)).namelist()
    assert any(name.startswith("world/") for name in names)
    assert not any(name.startswith("world") and name.endswith(".pth") for name in names)


def test_l5_saved_again_by_sac_the_world_is_gone(ours):
    model = MnM.load(archived(SAC.load(archived(ours), device="cpu")), device="cpu")
    assert_same(sac_parts(model), deployed_parts(ours))
    assert model._fitted_at is None
    fresh = MnM("MlpPolicy", BoxEnv(), **small()).world.dynamics.state_dict()
    assert_same(dict(model.world.dynamics.state_dict()), dict(fresh))


def test_l6_a_script_for_sac_runs_with_the_class_changed(tmp_path, monkeypatch):
    """SB3's documentation of SAC, with fewer steps."""
    script = """
import gymnasium as gym

from stable_baselines3 import SAC

env = gym.make("Pendulum-v1", render_mode="rgb_array")

model = SAC("MlpPolicy", env, verbose=1)
model.learn(total_timesteps=110, log_interval=4)
model.save("sac_pendulum")

del model # remove to demonstrate saving and loading

model = SAC.load("sac_pendulum")

obs, info = env.reset()
for _ in range(5):
    action, _states = model.predict(obs, deterministic=True)
    obs, reward, terminated, truncated, info = env.step(action)
    if terminated or truncated:
        obs, info = env.reset()
"""
    monkeypatch.chdir(tmp_path)
    script = script.replace("from stable_baselines3 import SAC", "from sb3_mismatch import MnM")
    scope = {}
    exec(script.replace("SAC", "MnM"), scope)
    assert type(scope["model"]) is MnM
    assert scope["action"].shape == (1,)


def test_l6_a_thread_of_rl_zoo3_trains_our_zip_as_sac(ours):
    """ParallelTrainCallback reads what it saved with SAC.load and trains on the replay buffer that it is given."""
    copied = SAC.load(archived(ours), device="cpu")
    copied.replay_buffer, copied._logger = ours.replay_buffer, ours.logger
    copied.train(gradient_steps=2)
    assert not th.equal(weights(copied), weights(ours))
