"""The learned world alone, in a file of which nothing is unpickled."""

import json
import pickle
import random

import numpy as np
import pytest
import safetensors.torch
import torch as th
from agents import BoxEnv, assert_same, small, soon, trained
from gymnasium import spaces

from sb3_mismatch import MnM, files
from sb3_mismatch.sharing import load_world, save_world


@pytest.fixture(autouse=True)
def _worlds_are_fitted_soon(monkeypatch):
    soon(monkeypatch, 40)


@pytest.fixture(scope="module")
def agent():
    """A trained agent; tests leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_mismatch.mnm.FEWEST_ROWS", 40)
        return trained(BoxEnv(), 70, real_ratio=0.5)


def networks(world):
    return {"dynamics": dict(world.dynamics.state_dict()), "classifier": dict(world.classifier.state_dict())}


def test_a_world_alone_answers_as_the_agents(agent, tmp_path):
    agent.save_world(tmp_path / "world")
    assert [file.name for file in tmp_path.iterdir()] == ["world.safetensors"]
    for path in (tmp_path / "world", str(tmp_path / "world.safetensors")):
        world = load_world(path, device="cpu")
        assert_same(networks(world), networks(agent.world))
    s, a = th.randn(50, 3), 2 * th.rand(50, 2) - 1
    answers = []
    for each in (world, agent.world):
        th.manual_seed(0)
        answers.append([*each.dynamics.sample(s, a), each.outcomes.ends(s, a, s), each.classifier.log_ratio(s, a, s)])
    assert_same(*answers)
    assert (world.fit_settings, world.dynamics.n_elites) == (agent.world.fit_settings, 2)
    world = load_world(tmp_path / "world", "cpu", reward_fn=lambda s, a, t: a[:, 0])
    assert_same(world.outcomes.rewards(s, a, s, s[:, :1], 0 * a[:, :1]), a[:, :1])


def test_an_agent_takes_a_world_and_learns_on(agent, tmp_path):
    agent.save_world(tmp_path / "world")
    model = MnM("MlpPolicy", BoxEnv(), **small(seed=9)).learn(70)
    assert model.world.dynamics_optimizer.state
    policy = dict(model.policy.state_dict())
    model.load_world(tmp_path / "world")
    assert_same(networks(model.world), networks(agent.world))
    assert_same(dict(model.policy.state_dict()), policy)
    assert not model.world.dynamics_optimizer.state
    assert not model.world.classifier_optimizer.state
    assert (len(model.world.imagined), model._fitted_at) == (0, 70)
    # The world is not fitted anew before its time, and imagines for the policy at once.
    model.learn(1, reset_num_timesteps=False)
    assert_same(networks(model.world), networks(agent.world))
    assert len(model.world.imagined) == 200
    model.learn(100, reset_num_timesteps=False)
    assert model._fitted_at == 170


class Spaces(BoxEnv):
    def __init__(self):
        inf = np.inf
        parts = {
            "b": spaces.Box(np.array([-1.5, -inf]), np.array([inf, 0.1]), (2,), np.float64),
            "a": spaces.Box(-inf, inf, (2, 2), np.float32),
            "n": spaces.Box(-3, 9, (1,), np.int32),
        }
        super().__init__(spaces.Dict(parts), (2, 1), high=0.3)


def test_spaces_return(tmp_path):
    model = MnM("MultiInputPolicy", Spaces(), **small())
    model.save_world(tmp_path / "world")
    world = load_world(tmp_path / "world")
    assert world.observation_space == model.observation_space
    assert list(world.observation_space) == list(model.observation_space)
    assert world.action_space == model.action_space
    for key, space in model.observation_space.items():
        assert world.observation_space[key].dtype == space.dtype
        assert_same(world.observation_space[key].low, space.low)
    assert world.observations.sizes == model.world.observations.sizes
    MnM("MultiInputPolicy", Spaces(), **small(seed=3)).load_world(tmp_path / "world")


def test_nothing_is_unpickled(agent, tmp_path, monkeypatch):
    agent.save_world(tmp_path / "world")
    contents = (tmp_path / "world.safetensors").read_bytes()
    length = int.from_bytes(contents[:8], "little")
    settings = json.loads(json.loads(contents[8 : 8 + length])["__metadata__"]["world"])
    assert settings["dynamics_kwargs"] == {"n_members": 3, "n_elites": 2, "net_arch": [8], "end_arch": [8]}

    def stop(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_loads"):
        monkeypatch.setattr(pickle, name, stop)
    monkeypatch.setattr(th, "load", stop)
    load_world(tmp_path / "world", device="cpu")
    MnM("MlpPolicy", BoxEnv(), **small()).load_world(tmp_path / "world")


def test_files_with_a_bit_changed_are_refused_and_the_world_stays(agent, tmp_path):
    agent.save_world(tmp_path / "world")
    contents = (tmp_path / "world.safetensors").read_bytes()
    model = MnM("MlpPolicy", BoxEnv(), **small(seed=9))
    before = {name: {key: value.clone() for key, value in part.items()} for name, part in networks(model.world).items()}
    rng = random.Random(0)
    header = int.from_bytes(contents[:8], "little") + 8
    places = [rng.randrange(header) for _ in range(150)] + [rng.randrange(header, len(contents)) for _ in range(50)]
    for place in places:
        changed = bytearray(contents)
        changed[place] ^= 1 << rng.randrange(8)
        (tmp_path / "changed.safetensors").write_bytes(changed)
        with pytest.raises(ValueError, match=r"changed is damaged, or .*: pass one that is whole$"):
            model.load_world(tmp_path / "changed")
    for n in (0, 5, 100, header, len(contents) - 1):
        (tmp_path / "changed.safetensors").write_bytes(contents[:n])
        with pytest.raises(ValueError, match="changed is damaged"):
            load_world(tmp_path / "changed")
    (tmp_path / "changed.safetensors").write_bytes(rng.randbytes(1000))
    with pytest.raises(ValueError, match="changed is damaged"):
        load_world(tmp_path / "changed")
    assert_same(networks(model.world), before)


def test_what_does_not_fit_is_told_and_the_world_stays(agent, tmp_path, monkeypatch):
    agent.save_world(tmp_path / "world")
    others = [
        (MnM("MlpPolicy", BoxEnv(action_shape=(1,)), **small()), r"is a world of action_space=Box.*\(2,\)"),
        (MnM("MlpPolicy", BoxEnv(), **small(n_members=4)), r"holds other networks .* dynamics_kwargs=\{'n_members': 3"),
    ]
    for model, words in others:
        before = model.world.classifier.net[0].weight.clone()
        with pytest.raises(ValueError, match=words):
            model.load_world(tmp_path / "world")
        assert_same(model.world.classifier.net[0].weight, before)
    with pytest.raises(FileNotFoundError):
        load_world(tmp_path / "none")
    safetensors.torch.save_file({"a": th.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="foreign is damaged, or no file of save_world"):
        load_world(tmp_path / "foreign")
    monkeypatch.setattr(files, "FORMAT", 2)
    agent.save_world(tmp_path / "newer")
    monkeypatch.setattr(files, "FORMAT", 1)
    with pytest.raises(ValueError, match=r"in format 2, .*: update sb3_mismatch"):
        load_world(tmp_path / "newer")


def test_settings_that_json_cannot_hold_are_told(agent, tmp_path, monkeypatch):
    monkeypatch.setattr(agent.world, "fit_kwargs", {"dynamics_steps": np.int64(5)})
    with pytest.raises(ValueError, match=r"cannot be written as JSON \(.*\): use plain numbers and lists"):
        save_world(agent.world, tmp_path / "world")
    assert not list(tmp_path.iterdir())
