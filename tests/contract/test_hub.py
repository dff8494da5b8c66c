"""An agent as a folder for the Hugging Face hub, without network, and back."""

import json
import re
import shutil
import sys

import gymnasium as gym
import huggingface_sb3
import numpy as np
import pytest
from agents import assert_same, environments, small, soon, world_contents
from huggingface_hub import ModelCard
from huggingface_sb3 import EnvironmentName, ModelName
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mismatch import MnM
from sb3_mismatch.contrib import MnMTQC
from sb3_mismatch.hub import model_card, model_name, package

ENV = "Pendulum-v1"
OBSERVATIONS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def agent(kind=MnM, normalize=False):
    """One with a trained world."""
    with pytest.MonkeyPatch.context() as patch:
        soon(patch)
        return kind("MlpPolicy", environments(1, normalize=normalize), **small()).learn(120)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """An agent and the folder that it was packaged into."""
    model, folder = agent(normalize=True), tmp_path_factory.mktemp("hub") / "new"
    model.get_env().seed(7)
    path = package(model, folder, ENV, model.get_env(), "someone/mnm-Pendulum-v1", n_eval_episodes=2)
    return model, folder, path


def test_k5_the_packaged_agent_is_loaded_with_its_world_and_by_sac(packaged):
    model, folder, path = packaged
    assert path == folder / "mnm-Pendulum-v1.zip"
    loaded = MnM.load(path, device="cpu")
    assert_same(world_contents(loaded), world_contents(model))
    assert_same(loaded.predict(OBSERVATIONS, deterministic=True)[0], model.predict(OBSERVATIONS, deterministic=True)[0])
    theirs = SAC.load(path, device="cpu")
    assert_same(theirs.predict(OBSERVATIONS, deterministic=True)[0], model.predict(OBSERVATIONS, deterministic=True)[0])


def test_k1_the_folder_holds_what_the_hub_shows(packaged):
    model, folder, _ = packaged
    config = json.loads((folder / "config.json").read_text())
    assert config["objective"] == model.objective
    assert "Stable-Baselines3" in config["system_info"]
    assert (folder / "mnm-Pendulum-v1" / "policy.pth").is_file()


def test_k1_the_agent_is_evaluated_in_real_rewards_by_frozen_statistics(packaged):
    model, folder, path = packaged
    results = json.loads((folder / "results.json").read_text())
    assert results["n_eval_episodes"] == 2
    env = VecNormalize.load(str(folder / "vec_normalize.pkl"), environments(1))
    # 120 steps of training and its first observation, none of the evaluation.
    assert env.obs_rms.count == pytest.approx(121)
    assert_same(env.obs_rms.mean, model.get_env().obs_rms.mean)
    assert not model.get_env().norm_reward
    env.training = env.norm_reward = False
    env.seed(7)
    again, _ = evaluate_policy(MnM.load(path, device="cpu"), env, 2)
    assert again == pytest.approx(results["mean_reward"])
    # An episode of 200 steps, each paid -16.3 to 0.
    assert -3260 < again < -200


def test_k3_the_card_names_this_package(packaged):
    _, folder, _ = packaged
    card, results = ModelCard.load(folder / "README.md"), json.loads((folder / "results.json").read_text())
    assert card.data.library_name == "stable-baselines3"
    assert {"sb3-mismatch", "stable-baselines3", "reinforcement-learning", ENV} <= set(card.data.tags)
    (told,) = card.data.eval_results
    assert (told.dataset_name, told.metric_type) == (ENV, "mean_reward")
    assert told.metric_value == f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"
    assert "pip install sb3-mismatch" in card.text
    assert "from stable_baselines3 import SAC" in card.text


def test_k2_the_cards_code_loads_the_agent(packaged, monkeypatch):
    model, folder, _ = packaged
    asked = []

    def load_from_hub(repo_id, filename):
        asked.append(repo_id)
        return str(folder / filename)

    monkeypatch.setattr(huggingface_sb3, "load_from_hub", load_from_hub)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    scope = {}
    exec(code, scope)
    assert asked == ["someone/mnm-Pendulum-v1"]
    assert type(scope["model"]) is MnM
    assert_same(dict(scope["model"].policy.state_dict()), dict(model.policy.state_dict()))


def test_k4_names_are_those_of_the_hub_and_cards_those_of_the_class():
    model = MnMTQC("MlpPolicy", ENV, **small())
    for env_id in (ENV, "ALE/Pong-v5", "some_module:Box/Env-v0"):
        assert model_name(model, env_id) == ModelName("mnmtqc", EnvironmentName(env_id))
    text = model_card(model, ENV, "a/b", -1.0, 0.0, 1).text
    assert "from sb3_mismatch.contrib import MnMTQC\n" in text
    assert 'MnMTQC.load(load_from_hub("a/b", "mnmtqc-Pendulum-v1.zip"))' in text
    assert "from sb3_contrib import TQC" in text


def test_k1_a_plain_environment_is_evaluated_too(tmp_path):
    package(MnM("MlpPolicy", ENV, **small()), tmp_path, ENV, gym.make(ENV), "a/b", n_eval_episodes=1)
    assert json.loads((tmp_path / "results.json").read_text())["std_reward"] == 0
    assert not (tmp_path / "vec_normalize.pkl").exists()


def test_k1_package_to_hub_takes_our_agents(tmp_path, monkeypatch):
    """huggingface_sb3's own function, up to where it uploads."""
    uploaded = tmp_path / "uploaded"

    class Offline:
        def __init__(self, token=None):
            self.repo_id = "someone/agent"

        def create_repo(self, **kwargs):
            return self

        def upload_folder(self, folder_path, **kwargs):
            shutil.copytree(folder_path, uploaded)

    module = sys.modules["huggingface_sb3.push_to_hub"]
    monkeypatch.setattr(module, "HfApi", Offline)
    # No screen, no video.
    monkeypatch.setattr(module, "_generate_replay", lambda *args: None)
    model = agent()
    env = Monitor(gym.make(ENV))
    huggingface_sb3.package_to_hub(model, "mnm-Pendulum-v1", "MnM", ENV, env, "someone/agent", n_eval_episodes=1)
    assert json.loads((uploaded / "config.json").read_text())["real_ratio"] == model.real_ratio
    assert_same(
        MnM.load(uploaded / "mnm-Pendulum-v1.zip", device="cpu").predict(OBSERVATIONS, deterministic=True)[0],
        model.predict(OBSERVATIONS, deterministic=True)[0],
    )
