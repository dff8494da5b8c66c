"""G: save and load."""

import base64
import io
import json
import pickle
import sys
import tempfile
import zipfile

import numpy as np
import pytest
import torch as th
from agents import (
    BoxEnv,
    all_finite,
    assert_same,
    environments,
    small,
    trained,
    weights,
    world_contents,
)
from stable_baselines3 import SAC
from stable_baselines3.common.utils import LinearSchedule

from sb3_mismatch import MBPO, VMBPO, MnM, Objective
from sb3_mismatch.objectives import likelihood_loss, task_reward


@pytest.fixture(scope="module")
def agent():
    """A trained agent; tests leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_mismatch.mnm.FEWEST_ROWS", 40)
        return trained(BoxEnv(), 70, real_ratio=0.5)


def archived(model, **kwargs):
    archive = io.BytesIO()
    model.save(archive, **kwargs)
    return archive


def copied(model, **kwargs):
    return type(model).load(archived(model), device="cpu", **kwargs)


def data_of(archive):
    return json.loads(zipfile.ZipFile(archive).read("data"))


def test_g1_the_zip_is_sacs_with_a_world_beside(agent):
    names = set(zipfile.ZipFile(archived(agent)).namelist())
    theirs = io.BytesIO()
    SAC("MlpPolicy", BoxEnv(), device="cpu", buffer_size=10).save(theirs)
    besides = {name for name in names if name.startswith("world/")} | {"learner.pt"}
    assert names - besides == set(zipfile.ZipFile(theirs).namelist())
    parts = ("dynamics", "classifier", "dynamics_optimizer", "classifier_optimizer", "state")
    assert {name for name in names if name.startswith("world/")} == {f"world/{part}.pt" for part in parts}
    assert all(isinstance(name, str) for name in data_of(archived(agent)))


def test_g2_trained_networks_return(agent):
    copy = copied(agent)
    fresh = MnM("MlpPolicy", BoxEnv(), **small())
    assert_same(world_contents(copy), world_contents(agent))
    assert_same(copy.get_parameters(), agent.get_parameters())
    assert_same(copy.log_ent_coef, agent.log_ent_coef)
    assert not th.equal(fresh.world.dynamics.body.layers[0].weight, copy.world.dynamics.body.layers[0].weight)
    assert copy.world.dynamics.inputs.mean.abs().sum() > 0


def test_g3_networks_are_declared_and_nothing_else_of_the_world_is_in_data(agent):
    declared = [name for name in agent.get_parameters() if name.startswith("world.")]
    parts = {f"world.{part}" for part in ("dynamics", "classifier", "dynamics_optimizer", "classifier_optimizer")}
    assert set(declared) == parts
    data = data_of(archived(agent))
    assert not {"world", "_streams", "policy", "replay_buffer"} & set(data)
    assert {"objective", "real_ratio", "n_members", "dynamics_kwargs", "_fitted_at"} <= set(data)


def test_g4_every_tensor_member_is_read_with_weights_only(agent):
    archive = zipfile.ZipFile(archived(agent))
    tensors = [name for name in archive.namelist() if name.endswith((".pt", ".pth"))]
    assert len(tensors) == 11
    for name in tensors:
        th.load(io.BytesIO(archive.read(name)), weights_only=True)


def test_g5_random_parameters_round_trip(agent):
    """SB3's own test of saving: all but the optimizers are overwritten with random numbers."""
    model = copied(agent, env=BoxEnv())
    before = copied(agent).get_parameters()
    random = {
        name: part if "optim" in name else {key: th.rand_like(value) for key, value in part.items()}
        for name, part in before.items()
    }
    model.set_parameters(random)
    for name, part in model.get_parameters().items():
        if "optim" in name:
            assert_same(part, before[name])
        else:
            assert part
            assert_same(dict(part), random[name])
            assert not any(th.equal(value, before[name][key]) for key, value in part.items()), name
    copy = copied(model, env=BoxEnv())
    assert_same(copy.get_parameters(), model.get_parameters())
    copy.learn(128)
    assert copy._fitted_at is not None
    assert all_finite(copy)


def test_g5_every_tensor_of_a_network_is_floating_point(agent):
    for name, part in agent.get_parameters().items():
        if name.startswith("world.") and "optim" not in name:
            assert part
            assert all(value.is_floating_point() for value in part.values()), name


def test_g6_missing_and_unknown_names_are_told(agent):
    model, parameters = copied(agent), agent.get_parameters()
    for name in parameters:
        with pytest.raises(ValueError, match="do not match"):
            model.set_parameters({key: value for key, value in parameters.items() if key != name})
    for exact_match in (True, False):
        with pytest.raises(ValueError, match="invalid object name"):
            model.set_parameters({**parameters, "other": {}}, exact_match=exact_match)
    model.set_parameters({"policy": parameters["policy"]}, exact_match=False)


@pytest.mark.parametrize("kind", ["str", "Path", "suffix", "BytesIO", "file", "TemporaryFile"])
def test_g7_paths_and_file_objects(agent, kind, tmp_path):
    if kind in ("str", "Path", "suffix"):
        path = tmp_path / ("model.zip" if kind == "suffix" else "model")
        agent.save(path if kind == "Path" else str(path))
        assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]
        model = MnM.load(path if kind == "Path" else str(path), device="cpu")
    else:
        opened = {
            "BytesIO": io.BytesIO,
            "TemporaryFile": tempfile.TemporaryFile,
            "file": lambda: (tmp_path / "model").open("wb+"),
        }
        with opened[kind]() as file:
            agent.save(file)
            assert not file.closed
            file.seek(0)
            model = MnM.load(file, device="cpu")
            assert not file.closed
    assert_same(world_contents(model), world_contents(agent))


def test_g7_missing_folders_are_made_with_sb3s_warning(agent, tmp_path):
    with pytest.warns(UserWarning, match="does not exist. Will create it"):
        agent.save(tmp_path / "folder" / "model")
    assert (tmp_path / "folder" / "model.zip").exists()


def test_g7_files_that_are_no_zip_are_told(tmp_path):
    (tmp_path / "model.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="wasn't a zip-file"):
        MnM.load(tmp_path / "model.zip")
    with pytest.raises(FileNotFoundError):
        MnM.load(tmp_path / "none")


def test_g7_exclude_include_custom_objects_and_system_info(agent, capsys):
    archive = archived(agent, exclude=["tau", "horizon"], include=["_custom_logger"])
    assert not {"tau", "horizon"} & set(data_of(archive))
    assert "_custom_logger" in data_of(archive)
    model = MnM.load(
        archive,
        device="cpu",
        custom_objects={"learning_rate": 0.5, "real_ratio": 0.25},
        print_system_info=True,
        tau=0.1,
    )
    assert (model.learning_rate, model.real_ratio, model.tau) == (0.5, 0.25, 0.1)
    assert "SAVED MODEL SYSTEM INFO" in capsys.readouterr().out


def test_g8_nothing_in_data_drags_the_agent_along(agent):
    ours = data_of(archived(agent))
    theirs = io.BytesIO()
    SAC("MlpPolicy", BoxEnv(), device="cpu", buffer_size=10, policy_kwargs={"net_arch": [8]}).learn(20).save(theirs)
    theirs = data_of(theirs)
    assert set(theirs) <= set(ours)
    for name in set(ours) - set(theirs):
        assert len(json.dumps(ours[name])) < 2000, name


def test_g9_no_tensor_is_pickled_into_data(agent):
    for name, item in data_of(archived(agent)).items():
        if isinstance(item, dict) and ":serialized:" in item:
            contents = base64.b64decode(item[":serialized:"])
            assert b"torch._utils" not in contents, name
            assert b"sb3_mismatch" not in contents, name


@pytest.mark.parametrize(
    "changed",
    [
        {"n_members": 4},
        {"dynamics_kwargs": {"net_arch": [9]}},
        {"classifier_kwargs": {"net_arch": [9]}},
        {"ent_coef": 0.1},
    ],
    ids=str,
)
def test_g10_other_networks_are_told_by_the_name_of_the_argument(agent, changed):
    name, value = next(iter(changed.items()))
    with pytest.raises(ValueError, match=r"MnM\.load got .*does not fit the networks in the zip") as failure:
        copied(agent, **changed)
    assert f"{name}={value!r}" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_g10_automatic_entropy_for_a_fixed_one_is_told():
    model = MnM("MlpPolicy", BoxEnv(), **small(ent_coef=0.1))
    with pytest.raises(ValueError, match=r"MnM\.load got ent_coef='auto'"):
        copied(model, ent_coef="auto")


def test_g10_settings_that_fit_are_taken(agent):
    model = copied(agent, n_elites=1, real_ratio=1.0, learning_rate=0.1, horizon=[0, 10, 1, 3])
    assert model.world.dynamics.n_elites == 1
    assert (model.real_ratio, model.horizon) == (1.0, [0, 10, 1, 3])
    with pytest.raises(ValueError, match=r"^n_elites=9 is more than n_members=3"):
        copied(agent, n_elites=9)


def test_g11_without_an_environment_it_predicts(agent):
    model = copied(agent)
    assert (model.env, model.n_envs) == (None, 1)
    observation = np.ones(3, np.float32)
    assert_same(model.predict(observation, deterministic=True)[0], agent.predict(observation, deterministic=True)[0])


def test_g12_seeding_seeds_the_world(agent):
    first, second = copied(agent), copied(agent)
    assert_same(first._streams.state_dict(), agent._streams.state_dict())
    for model in (first, second):
        model.set_random_seed(5)
    assert_same(first._streams.state_dict(), second._streams.state_dict())
    assert first._streams.state_dict()["torch"].ne(agent._streams.state_dict()["torch"]).any()


def test_g13_the_policy_alone_is_saved_and_loaded(agent, tmp_path):
    agent.deployed_policy.save(str(tmp_path / "policy.pkl"))
    policy = type(agent.policy).load(str(tmp_path / "policy.pkl"), device="cpu")
    observation = np.ones(3, np.float32)
    assert_same(policy.predict(observation, deterministic=True)[0], agent.predict(observation, deterministic=True)[0])
    agent.actor.save(str(tmp_path / "actor.pkl"))
    assert_same(dict(type(agent.actor).load(str(tmp_path / "actor.pkl")).state_dict()), dict(agent.actor.state_dict()))
    assert (tmp_path / "policy.pkl").stat().st_size < 60_000


@pytest.mark.parametrize("schedule", [lambda progress: 0.01 * progress, LinearSchedule(0.01, 0.0, 1.0)])
def test_g14_learning_rate_schedules_return(schedule):
    model = MnM("MlpPolicy", BoxEnv(), **small(learning_rate=schedule))
    assert copied(model).lr_schedule(0.5) == pytest.approx(0.005)


def test_g15_the_world_can_be_left_out(agent):
    archive = archived(agent, exclude=["world"])
    assert not any(name.startswith("world") for name in zipfile.ZipFile(archive).namelist())
    assert len(archive.getvalue()) < 0.7 * len(archived(agent).getvalue())
    model = MnM.load(archive, env=BoxEnv(), device="cpu")
    assert_same(weights(model), weights(agent))
    assert model._fitted_at is None
    model.learn(60, reset_num_timesteps=False)
    assert model._fitted_at is not None


def test_g16_a_loaded_world_neither_refits_nor_serves_stale_rows(agent, monkeypatch):
    model = copied(agent, env=BoxEnv())
    model.replay_buffer = agent.replay_buffer
    fitted = []
    monkeypatch.setattr(MnM, "_fit_dynamics", lambda self, data: fitted.append(self.num_timesteps))
    assert (model._fitted_at, len(model.world.imagined)) == (51, 0)
    model.set_logger(agent.logger)
    model.train(gradient_steps=1)
    assert not fitted
    assert len(model.world.imagined) == 200


@pytest.mark.parametrize("kind", [MnM, VMBPO, MBPO])
def test_g1_each_class_returns_as_itself(kind):
    model = kind("MlpPolicy", BoxEnv(), **small())
    copy = copied(model)
    assert type(copy) is kind
    assert copy.objective == model.objective


def without_the_plugin(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sb3_mismatch"]:
        monkeypatch.setitem(sys.modules, name, None)


def own_model():
    reward = lambda reward, log_ratio, gamma: reward - 1  # noqa: E731
    functions = {"termination_fn": lambda s, a, t: a[:, 0] > 2, "reward_fn": lambda s, a, t: a[:, 0]}
    return MnM("MlpPolicy", BoxEnv(), **small(objective=Objective(reward, likelihood_loss), **functions))


def test_g2_objectives_and_functions_of_the_users_return(monkeypatch):
    archive = archived(own_model())
    assert not {"objective", "termination_fn", "reward_fn"} & set(data_of(archive))
    model = MnM.load(archive, device="cpu", env=BoxEnv())
    assert model.objective.reward(th.ones(1), th.ones(1), 0.9) == 0
    assert model.world.outcomes.termination_fn is model.termination_fn
    model.learn(60)
    # Others may take their place.
    other = Objective(task_reward, likelihood_loss)
    for given in ({"objective": other}, {"custom_objects": {"objective": other}}):
        assert MnM.load(archive, device="cpu", **given).objective is other
    # SAC needs neither them nor this package.
    without_the_plugin(monkeypatch)
    SAC.load(archive, env=BoxEnv(), device="cpu").learn(60)


class Here:
    """Pickled by reference: gone where this module is gone."""

    def __call__(self, observations, actions, next_observations):
        return actions[:, 0]


def test_g7_functions_that_cannot_be_read_are_told_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "gone", type(sys)("gone"))
    monkeypatch.setattr(Here, "__module__", "gone")
    sys.modules["gone"].Here = Here
    archive = archived(MnM("MlpPolicy", BoxEnv(), **small(reward_fn=Here())))
    monkeypatch.setitem(sys.modules, "gone", None)
    with pytest.raises(
        ValueError, match=r"^reward_fn of the zip cannot be read \(.*\): pass reward_fn=... to load\(\)"
    ):
        MnM.load(archive, device="cpu")
    assert MnM.load(archive, device="cpu", reward_fn=None).reward_fn is None
    assert MnM.load(archive, device="cpu", custom_objects={"reward_fn": None}).reward_fn is None


def test_c1_replay_buffers_are_saved_beside(agent, tmp_path):
    agent.save_replay_buffer(tmp_path / "buffer")
    model = copied(agent, env=environments(1, BoxEnv))
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert_same(model.replay_buffer.observations, agent.replay_buffer.observations)
    assert pickle.loads((tmp_path / "buffer.pkl").read_bytes()).size() == 70
