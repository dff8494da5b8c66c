"""rl-baselines3-zoo itself, in processes of its own: it changes Gymnasium where it is imported."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from optuna.trial import FixedTrial
from stable_baselines3.common.save_util import load_from_pkl

from sb3_mismatch import MnM, zoo
from sb3_mismatch.contrib import MnMTQC

#: a world that is fitted in milliseconds, as `-params` takes it
SMALL = [
    "learning_starts:40",
    "random_steps:0",
    "gradient_steps:1",
    "batch_size:16",
    "buffer_size:1000",
    "policy_kwargs:dict(net_arch=[8])",
    "model_train_freq:20",
    "imagined_per_step:2",
    "dynamics_kwargs:dict(net_arch=[8],end_arch=[8])",
    "classifier_kwargs:dict(net_arch=[8])",
    "fit_kwargs:dict(dynamics_steps=5,classifier_steps=2)",
]
AGENT = "logs/mnm/Pendulum-v1_1/Pendulum-v1.zip"


def run(folder: Path, command: str, *arguments: str, algo: str = "mnm", fails: bool = False) -> str:
    """``python -m sb3_mismatch.zoo`` in a folder, without network; what it prints."""
    fixed = ["--algo", algo, "--env", "Pendulum-v1", "-f", "logs", "--seed", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "sb3_mismatch.zoo", command, *fixed, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(folder: Path, *arguments: str, params: list[str] | None = None, **kwargs) -> str:
    return run(folder, "train", "--eval-freq", "-1", *arguments, "-params", *SMALL, *(params or []), **kwargs)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder in which an agent was trained for 270 steps, and what was printed."""
    folder = tmp_path_factory.mktemp("zoo")
    return folder, train(folder, "-n", "270", "--save-replay-buffer", params=["normalize:True"])


def test_j2_train_reads_the_packages_settings_and_saves_a_trained_agent(logs):
    folder, printed = logs
    assert f"Loading hyperparameters from: {zoo.HYPERPARAMS / 'mnm.yml'}" in printed
    model = MnM.load(folder / AGENT, device="cpu")
    assert (model.num_timesteps, model._n_updates) == (270, 230)
    assert model._fitted_at is not None
    assert load_from_pkl(folder / "logs/mnm/Pendulum-v1_1/replay_buffer.pkl").size() == 270


def test_j4_enjoy_plays_an_episode(logs):
    printed = run(logs[0], "enjoy", "-n", "200", "--no-render", "--exp-id", "1")
    assert re.search(r"1 Episodes\nMean reward: -\d+\.\d+", printed)
    assert "Mean episode length: 200.00" in printed


def test_j6_continued_training_starts_from_the_agent_its_world_and_its_replay_buffer(logs):
    folder = logs[0]
    printed = train(
        folder, "-n", "50", "-i", AGENT, "--save-replay-buffer", params=["normalize:True", "real_ratio:0.5"]
    )
    assert "Loading pretrained agent" in printed
    assert "Loading replay buffer" in printed
    model = MnM.load(folder / "logs/mnm/Pendulum-v1_2/Pendulum-v1.zip", device="cpu")
    assert model.real_ratio == 0.5
    assert (model.num_timesteps, model._n_updates) == (50, 240)
    # Fitted anew in this run, for it had the buffer's 270 rows.
    assert 40 < model._fitted_at <= 50
    assert load_from_pkl(folder / "logs/mnm/Pendulum-v1_2/replay_buffer.pkl").size() == 320


def test_j5_optimize_tries_our_settings_and_a_trial_is_trained_by_its_number(tmp_path):
    study = ["--storage", "study.log", "--study-name", "study"]
    printed = train(
        tmp_path,
        *("-n", "42", "-optimize", "--n-trials", "2", "--eval-episodes", "1", "--n-evaluations", "1"),
        *("--no-optim-plots", *study),
        algo="mnmtqc",
    )
    trials = re.findall(r"Trial \d finished with value: -\d.* parameters: (\{.*?\})", printed)
    assert len(set(trials)) == 2
    settings = ast.literal_eval(trials[1])
    assert {"real_ratio", "horizon", "log_ratio_weight"} <= set(settings)
    train(tmp_path, "-n", "1", "--trial-id", "1", *study, algo="mnmtqc", params=["gradient_steps:2"])
    model = MnMTQC.load(tmp_path / "logs/mnmtqc/Pendulum-v1_2/Pendulum-v1.zip", device="cpu")
    # What `-params` names goes before what the trial had.
    assert model.gradient_steps == 2
    for name in ("real_ratio", "horizon", "log_ratio_weight"):
        assert getattr(model, name) == settings[name]


def test_j8_a_callback_that_trains_the_base_algorithm_is_refused(logs):
    printed = train(logs[0], "-n", "50", params=["callback:'rl_zoo3.callbacks.ParallelTrainCallback'"], fails=True)
    assert "ValueError: a callback has put its own train() in the place of this class's" in printed


def test_j7_the_runs_own_settings_name_nothing_of_this_package(logs):
    folder, _ = logs
    written = [path.read_text(encoding="utf-8") for path in (folder / "logs").rglob("config.yml")]
    assert written
    assert all("gradient_steps" in text and "sb3_mismatch" not in text for text in written)


# -- without rl_zoo3 --

VALUES = {
    "learning_rate": 1e-3,
    "batch_size": 128,
    "gradient_steps": 20,
    "real_ratio": 0.2,
    "horizon": 3,
    "imagined_n_steps": 2,
    "model_train_freq": 100,
    "imagined_per_step": 200,
    "log_ratio_weight": 0.5,
    "adversarial_weight": 0.02,
}


def test_j5_what_is_sampled_is_what_the_constructor_takes():
    sampled = zoo.sample_mnm(FixedTrial(VALUES), 1, 1, {})
    assert sampled == VALUES
    model = MnM("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=1000, **sampled)
    assert {name: getattr(model, name) for name in VALUES} == VALUES
    # MBPO has no classifier to weigh, and its rows are single steps.
    ours = {"imagined_n_steps", "log_ratio_weight", "adversarial_weight"}
    assert set(VALUES) - set(zoo.sample_mbpo(FixedTrial(VALUES), 1, 1, {})) == ours


@pytest.mark.parametrize("algo", zoo.ALGORITHMS)
def test_j3_settings_of_the_package_are_plain_and_constructible(algo):
    entries = yaml.safe_load(zoo.config_file(algo).read_text(encoding="utf-8"))
    assert set(entries) == {"default", "InvertedPendulum-v5", "Pendulum-v1"}
    for env, settings in entries.items():
        assert settings.pop("n_timesteps") >= 3000
        model = zoo.ALGORITHMS[algo](
            env="Pendulum-v1" if env == "default" else env, device="cpu", buffer_size=1000, **settings
        )
        assert type(model) is zoo.ALGORITHMS[algo]


def test_j1_another_command_is_told_how_it_is_used(monkeypatch):
    for arguments in ([], ["plot"]):
        monkeypatch.setattr(sys, "argv", ["zoo", *arguments])
        with pytest.raises(SystemExit, match=r"^usage: python -m sb3_mismatch.zoo \{train,enjoy\}"):
            zoo.main()


def test_j9_the_extra_brings_what_rl_zoo3_forgets_to_name():
    assert any(re.match(r"requests\b.*zoo", wanted) for wanted in requires("sb3-mismatch"))


def test_j10_settings_are_the_constructors_own_but_for_the_number_of_steps():
    for path in zoo.HYPERPARAMS.glob("*.yml"):
        for settings in yaml.safe_load(path.read_text(encoding="utf-8")).values():
            assert set(settings) == {"n_timesteps", "policy"}
