"""Checkpoints: a run that is continued from one equals the run that never stopped, bit for bit."""

import json
import random
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, policy_contents, sac_settings, small, soon, world_contents
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_mismatch import MBPO, MnM
from sb3_mismatch.checkpoints import ResumeCallback, newest_checkpoint
from sb3_mismatch.contrib import MnMTQC
from sb3_mismatch.env_state import Resumable
from sb3_mismatch.randomness import global_states


@pytest.fixture(autouse=True)
def _worlds_are_fitted_soon(monkeypatch):
    soon(monkeypatch)


def pendulums(n=1, normalize=False, env_id="Pendulum-v1", **kwargs):
    env = make_vec_env(env_id, n_envs=n, **kwargs)
    return VecNormalize(env) if normalize else env


def everything(model):
    """All that a run consists of."""
    statistics = {}
    if (normalize := model.get_vec_normalize_env()) is not None:
        moments = {
            f"{rms} {m}": getattr(getattr(normalize, rms), m) for rms in ("obs_rms", "ret_rms") for m in ("mean", "var")
        }
        statistics = {**moments, "returns": normalize.returns, "original": normalize.get_original_obs()}
    imagined = model.world.imagined.rows
    return {
        **policy_contents(model),
        **world_contents(model),
        **statistics,
        "imagined": None if imagined is None else imagined._asdict(),
        "random": global_states(model.device),
        "warm-up": model.action_space.np_random.bit_generator.state["state"]["state"] % 2**60,
        "observation": model._last_obs,
        "episodes": [(info["r"], info["l"]) for info in model.ep_info_buffer],
        "counters": [model._episode_num, model._fitted_at, model._n_updates, model._current_progress_remaining],
        "place": [model.replay_buffer.pos, model.replay_buffer.full],
        "average": None if model._average is None else model._average.actor.state_dict(),
        "averaged": None if model._average is None else model._average.n_taken,
    }


def resumed_and_not(tmp_path, make_env, kind=MnM, stop=200, more=280, policy="MlpPolicy", **changed):
    """Everything of a run of ``stop + more`` steps, and of one that is continued from its checkpoint near ``stop``."""
    folder, env = tmp_path / "run", make_env()
    whole = kind(policy, env, **small(**changed))
    callback = ResumeCallback(folder, every=stop, keep=100)
    whole.learn(stop + more, callback=callback)
    expected = everything(whole)
    at = sorted(path.name for path in folder.iterdir())[0]
    # Nothing of the first run is left but its files.
    random.seed(1), np.random.seed(1), th.manual_seed(1)
    model = kind.load_checkpoint(folder / at, make_env(), device="cpu")
    assert model.num_timesteps == int(at.removeprefix("step_")) < whole.num_timesteps
    model.learn(whole._total_timesteps - model.num_timesteps, reset_num_timesteps=False)
    assert model._fitted_at > stop + more // 2
    assert model.num_timesteps == whole.num_timesteps
    return everything(model), expected


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kind", [MnM, MBPO, MnMTQC])
def test_a_resumed_run_equals_the_uninterrupted_one(kind, n_envs, normalize, tmp_path):
    steps = {
        "stop": 150 * n_envs,
        "more": 220 * n_envs,
        "model_train_freq": 80 * n_envs,
        "learning_starts": 60 * n_envs,
    }
    assert_same(*resumed_and_not(tmp_path, lambda: pendulums(n_envs, normalize), kind, **steps))


COMPACT = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
NOISE = OrnsteinUhlenbeckActionNoise(np.zeros(1), np.full(1, 0.3))


@pytest.mark.filterwarnings("ignore:.n_steps=3. is ignored because a custom")  # SB3's load() takes it for one.
@pytest.mark.parametrize(
    "changed",
    [
        {"n_steps": 3, "buffer_size": 170},
        {**COMPACT, "buffer_size": 300},
        {**COMPACT, "buffer_size": 120},
        {"use_sde": True, "sde_sample_freq": 7},
        {"action_noise": NOISE, "learning_rate": LinearSchedule(1e-3, 0, 1)},
        {"train_freq": (1, "episode"), "gradient_steps": 20},
        {"train_freq": 9, "seed": None},
        {"fit_kwargs": {"average_steps": 10, "dynamics_steps": 5}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_of_every_setting(changed, tmp_path):
    assert_same(*resumed_and_not(tmp_path, pendulums, stop=150, more=230, **changed))


@pytest.mark.parametrize("changed", [{}, COMPACT, {"buffer_size": 20}], ids=["plain", "compact", "full"])
def test_every_row_of_the_buffer_returns(changed, tmp_path):
    model = MnM("MlpPolicy", pendulums(), **small(**changed)).learn(30)
    model.save_checkpoint(tmp_path / "a")
    copy = MnM.load_checkpoint(tmp_path / "a", pendulums(), device="cpu")
    for name, value in vars(model.replay_buffer).items():
        if isinstance(value, np.ndarray):
            assert_same(getattr(copy.replay_buffer, name), value)


class Dicts(BoxEnv):
    def __init__(self):
        super().__init__(spaces.Dict({"a": spaces.Box(-9, 9, (2,)), "b": spaces.Box(-9, 9, (1, 2))}))


@pytest.mark.parametrize(
    ("make_env", "policy"),
    [
        (lambda: pendulums(2, True, "Ant-v5"), "MlpPolicy"),
        (lambda: pendulums(1, env_id="InvertedPendulum-v5"), "MlpPolicy"),
        (lambda: VecNormalize(make_vec_env(Dicts, n_envs=2)), "MultiInputPolicy"),
        (lambda: VecFrameStack(pendulums(), 2), "MlpPolicy"),
        (lambda: DummyVecEnv([lambda: Resumable(gym.make("Pendulum-v1"))]), "MlpPolicy"),
    ],
    ids=["Ant", "InvertedPendulum", "Dict", "frames", "Resumable"],
)
def test_of_every_environment_whose_state_is_known(make_env, policy, tmp_path, monkeypatch):
    if policy == "MultiInputPolicy":
        monkeypatch.setattr(VecNormalize, "get_original_obs", lambda self: self.old_obs)
        monkeypatch.setitem(everything.__globals__, "everything", of_dicts)
    assert_same(*resumed_and_not(tmp_path, make_env, stop=150, more=130, policy=policy, learning_starts=20))


def of_dicts(model):
    return {**policy_contents(model), **world_contents(model), "random": global_states(model.device)}


def test_in_processes_of_their_own(tmp_path):
    def make():
        return make_vec_env(
            "Pendulum-v1",
            2,
            vec_env_cls=SubprocVecEnv,
            vec_env_kwargs={"start_method": "fork"},
            wrapper_class=Resumable,
        )

    assert_same(*resumed_and_not(tmp_path, make, stop=150, more=130, learning_starts=20))


class Own(BoxEnv):
    """Holds what is not understood, and tells its state itself."""

    def __init__(self):
        super().__init__()
        self.secret = object()

    def get_state(self):
        return self.point, self.t, self.np_random.bit_generator.state

    def set_state(self, state):
        self.point, self.t, self.np_random.bit_generator.state = state


def test_an_environment_may_tell_its_state(tmp_path):
    assert_same(*resumed_and_not(tmp_path, lambda: make_vec_env(Own), stop=150, more=130))


class Opaque(BoxEnv):
    def __init__(self):
        super().__init__()
        self.secret = object()


def test_episodes_of_an_environment_that_is_not_understood_start_anew(tmp_path, capsys):
    model = MnM("MlpPolicy", VecNormalize(make_vec_env(Opaque)), **small(verbose=1)).learn(70)
    first = BoxEnv().reset(seed=0)[0]
    model.save_checkpoint(tmp_path / "a")
    capsys.readouterr()
    model = MnM.load_checkpoint(tmp_path / "a", VecNormalize(make_vec_env(Opaque)), device="cpu")
    assert "its episodes start anew" in capsys.readouterr().out
    assert model.get_vec_normalize_env().obs_rms.count == pytest.approx(71, abs=0.01)
    assert model._last_obs is None
    model.learn(1, reset_num_timesteps=False)
    # Another episode than the run's first.
    assert not np.allclose(model.replay_buffer.observations[70], first)
    assert model.num_timesteps == 71


def test_what_was_recorded_is_written_by_the_run_that_continues(tmp_path):
    """SB3 writes the log at an episode's end, and the values of the round before belong to it."""

    def last_line(model, name):
        model.set_logger(configure(str(tmp_path / name), ["json"]))
        model.learn(400 - model.num_timesteps, reset_num_timesteps=False, log_interval=2, callback=callback)
        model.logger.close()
        last = json.loads((tmp_path / name / "progress.json").read_text().splitlines()[-1])
        return {key: value for key, value in last.items() if key not in ("time/fps", "time/time_elapsed")}

    callback = ResumeCallback(tmp_path / "run", every=399)
    logs = [last_line(MnM("MlpPolicy", pendulums(), **small()), "a")]
    shutil.rmtree(tmp_path / "run" / "step_000000400")
    logs.append(last_line(MnM.load_checkpoint(tmp_path / "run", pendulums(), device="cpu"), "b"))
    assert logs[0] == logs[1]
    assert {"train/critic_loss", "dynamics/nll", "rollout/ep_rew_mean"} <= set(logs[0])


def test_the_last_few_are_kept_and_rewritten_ones_replaced(tmp_path):
    model = MnM("MlpPolicy", pendulums(3), **small(learning_starts=1000))
    model.learn(100, callback=ResumeCallback(tmp_path, every=20, keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000081", "step_000000102"]
    assert newest_checkpoint(tmp_path).name == "step_000000102"
    model.save_checkpoint(tmp_path / "step_000000102")
    assert len(list(tmp_path.iterdir())) == 2
    assert MnM.load_checkpoint(tmp_path, pendulums(3), device="cpu").num_timesteps == 102
    # A thousandth of the memory that the buffer would fill.
    assert (tmp_path / "step_000000102" / "buffer.pkl").stat().st_size < 10_000


class StopTrainingAt31(BaseCallback):
    def _on_step(self):
        return self.num_timesteps < 31


def test_a_run_that_was_stopped_amid_a_round_writes_none_of_it(tmp_path):
    model = MnM("MlpPolicy", pendulums(), **small())
    model.learn(50, callback=[ResumeCallback(tmp_path, every=20), StopTrainingAt31()])
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000020"]


def checkpoint(folder, **changed):
    MnM("MlpPolicy", pendulums(), **small(**changed)).learn(30).save_checkpoint(folder)
    return folder


def test_what_was_whole_before_it_was_renamed_counts(tmp_path):
    checkpoint(tmp_path / "a").rename(tmp_path / ".a.sb3part")
    assert MnM.load_checkpoint(tmp_path / "a", pendulums()).num_timesteps == 30
    assert MnM.load_checkpoint(tmp_path, pendulums()).num_timesteps == 30
    checkpoint(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_run_that_was_killed_before_the_last_name_was_given_is_tidied(tmp_path):
    model = MnM("MlpPolicy", pendulums(), **small()).learn(20, callback=ResumeCallback(tmp_path, every=10))
    (tmp_path / "step_000000020").rename(tmp_path / ".step_000000020.sb3part")
    MnM.load_checkpoint(tmp_path, model.env).learn(0, callback=ResumeCallback(tmp_path), reset_num_timesteps=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000010", "step_000000020"]


def test_unfinished_folders_do_not_count_and_are_removed(tmp_path):
    checkpoint(tmp_path / "step_000000010").rename(tmp_path / ".step_000000010.sb3part")
    (tmp_path / ".step_000000010.sb3part" / "checkpoint.json").unlink()
    (tmp_path / "step_000000099").mkdir()
    (tmp_path / "step_notes").mkdir()
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        MnM.load_checkpoint(tmp_path, pendulums())
    MnM("MlpPolicy", pendulums(), **small()).learn(20, callback=ResumeCallback(tmp_path, every=10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000010", "step_000000020", "step_notes"]


def test_what_does_not_fit_is_told(tmp_path):
    folder = checkpoint(tmp_path / "a")
    with pytest.raises(ValueError, match=r"is a checkpoint of MnM: use MnM\.load_checkpoint"):
        MBPO.load_checkpoint(folder, pendulums())
    with pytest.raises(ValueError, match=r"written with 1 environments and env has 2: pass as many"):
        MnM.load_checkpoint(folder, pendulums(2))
    with pytest.raises(ValueError, match=r"was taken in .*DummyVecEnv and env is .*VecNormalize.*: make the same"):
        MnM.load_checkpoint(folder, pendulums(1, normalize=True))
    with pytest.raises(ValueError, match=r"Monitor > .* and env is .*TimeLimit > .*: make the same"):
        MnM.load_checkpoint(folder, DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    with pytest.raises(ValueError, match="exists and is no checkpoint"):
        MnM("MlpPolicy", pendulums(), **small()).save_checkpoint(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds a, later than this run's step 0: continue from it with load_checkpoint"
    ):
        MnM("MlpPolicy", pendulums(), **small()).learn(1, callback=ResumeCallback(tmp_path))
    with pytest.raises(ValueError, match="env=None cannot continue a run"):
        MnM.load_checkpoint(folder, None)
    with pytest.raises(TypeError, match="ResumeCallback needs an agent of this package and met SAC: use"):
        SAC("MlpPolicy", pendulums(), **sac_settings()).learn(1, callback=ResumeCallback(tmp_path / "b"))
    with pytest.raises(ValueError, match="every=0 must be a whole number of at least 1"):
        ResumeCallback(tmp_path, every=0)


@pytest.mark.parametrize("name", ["model.zip", "tensors.pt", "buffer.pkl", "run.pkl", "checkpoint.json"])
def test_damaged_checkpoints_are_refused(name, tmp_path):
    path = checkpoint(tmp_path / "a") / name
    contents = bytearray(path.read_bytes())
    # In the manifest a digit: it stays JSON.
    place = contents.index(b'"step": 30') + 8 if name == "checkpoint.json" else len(contents) // 2
    contents[place] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ValueError, match="is damaged: remove this checkpoint"):
        MnM.load_checkpoint(tmp_path / "a", pendulums())


def test_of_another_machine_or_version(tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_mismatch.files.FORMAT", 2)
    checkpoint(tmp_path / "a")
    monkeypatch.setattr("sb3_mismatch.files.FORMAT", 1)
    with pytest.raises(ValueError, match=r"written by sb3_mismatch \S+ in format 2, .*: update sb3_mismatch"):
        MnM.load_checkpoint(tmp_path / "a", pendulums())
