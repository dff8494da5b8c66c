"""What is said of an agent: python -m sb3_mismatch inspect, its numbers beside known ones, and SB3's table."""

import re

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, small, soon, trained
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mismatch import VMBPO, MnM, inspection
from sb3_mismatch.__main__ import main
from sb3_mismatch.buffers import RealTransitions
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC
from sb3_mismatch.healthy_range import NO_BOUND


def short(**kwargs):
    return BoxEnv(length=25, **kwargs)


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        soon(patch)
        return trained(short(), 120)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A folder with the zip and the replay buffer beside it."""
    folder = tmp_path_factory.mktemp("saved")
    model.save(folder / "agent.zip")
    model.save_replay_buffer(folder / "agent_replay_buffer.pkl")
    return folder


# -- the command --


def test_it_says_what_there_is(saved, capsys):
    assert main(["inspect", str(saved / "agent.zip")]) == 0
    text = capsys.readouterr().out
    for line in (
        r"class +MnM over SAC",
        r"observations +Box\(-inf, inf, \(3,\), float32\)",
        r"objective +mnm-approx",
        r"environment steps +120",
        r"updates +70",
        r"world fitted +at step 60",
        r"model_train_freq +\d+ +default 50",
        r"n_elites +2 +default 3",
        r"World: 2 of 3 members imagine",
        r"One step, \d+ transitions of agent_replay_buffer.pkl, held out",
        r"s\[2\] +\S+ +\S+ +\S+%",
        r"reward +\S+ +\S+ +\S+%",
        r"0 of 0 true ends are told",
        r"classifier +tells \S+% of real and imagined next states right",
        r"20 +\S+ +\S+ +100%",
    ):
        assert re.search(line, text), line
    assert "learning_rate" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_environments_that_do_not_fit(saved, capsys):
    """Pendulum-v1 shows three numbers, too, but in other bounds."""
    assert main(["inspect", str(saved / "agent.zip"), "--env", "Pendulum-v1"]) == 2
    assert "spaces do not match" in capsys.readouterr().err
    assert main(["inspect", str(saved / "agent.zip"), "--env", "Nothing-v0"]) == 2


def test_bad_input_is_told_in_a_sentence(saved, tmp_path, capsys):
    (tmp_path / "text.zip").write_text("nothing")
    SAC("MlpPolicy", short(high=2.0), buffer_size=10).save_replay_buffer(tmp_path / "other.pkl")
    agent = str(saved / "agent.zip")
    for arguments, sentence in (
        (["nowhere.zip"], "nowhere.zip does not exist: pass the zip that model.save() wrote"),
        ([str(tmp_path / "text.zip")], "wasn't a zip-file"),
        ([agent, "--buffer", str(tmp_path / "text.zip")], "cannot be read as a replay buffer"),
        ([agent, "--buffer", str(tmp_path / "none.pkl")], "cannot be read as a replay buffer"),
        ([agent, "--buffer", str(tmp_path / "other.pkl")], "pass the buffer of its own environment"),
        ([agent, "--steps", "0"], "--steps=0 must be a whole number"),
    ):
        assert main(["inspect", *arguments]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert sentence in told.err
        assert len(told.err.splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["inspect"])


def test_agents_without_world_or_transitions(model, tmp_path, capsys):
    SAC("MlpPolicy", short(), policy_kwargs={"net_arch": [4]}).save(tmp_path / "sac.zip")
    assert main(["inspect", str(tmp_path / "sac.zip")]) == 0
    text = capsys.readouterr().out
    assert "There is no learned world in it." in text
    assert re.search(r"world fitted +never", text)
    model.save(tmp_path / "agent.zip")
    assert main(["inspect", str(tmp_path / "agent.zip")]) == 0
    assert "pass --buffer replay_buffer.pkl or --env ID" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [MnMTQC, MnMCrossQ], ids=lambda kind: kind.__name__)
def test_class_is_told_from_the_zip(kind, tmp_path):
    kind("MlpPolicy", short(), **small()).save(tmp_path / "agent.zip")
    model = inspection.load(tmp_path / "agent.zip")
    assert type(model) is kind
    assert f"{kind.__name__} over {kind.__name__.removeprefix('MnM')}" in inspection.about_agent(
        model, tmp_path / "agent.zip"
    )


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("best.zip", "replay_buffer.pkl"),
        ("best.zip", "best_replay_buffer.pkl"),
        ("rl_model_500_steps.zip", "rl_model_replay_buffer_500_steps.pkl"),
    ],
)
def test_buffers_beside_a_zip(name, beside, tmp_path):
    assert inspection.buffer_beside(tmp_path / name) is None
    (tmp_path / beside).touch()
    assert inspection.buffer_beside(tmp_path / name) == tmp_path / beside


# -- numbers --


def test_settings_that_are_not_their_defaults():
    assert inspection.changed_settings(MnM("MlpPolicy", short())) == {}
    model = VMBPO(
        "MlpPolicy", short(), gamma=0.9, train_freq=(2, "episode"), policy_kwargs={"net_arch": [4]}, horizon=3
    )
    changed = inspection.changed_settings(model)
    assert {name: value for name, (value, _) in changed.items()} == {
        "gamma": 0.9,
        "train_freq": model.train_freq,
        "policy_kwargs": {"net_arch": [4], "use_sde": False},
        "horizon": 3,
    }
    assert changed["horizon"][1] == 20


def rows_that_the_world_foretells(model, n: int = 50):
    """Transitions of the world's own mean, and their rewards."""
    dynamics = model.world.dynamics
    s, a = th.randn(n, 3) * 0.1, 2 * th.rand(n, 2) - 1
    elites = dynamics.elites
    with th.no_grad():
        stacked = (s.expand(len(elites), n, 3), a.expand(len(elites), n, 2))
        following, rewards = dynamics.decode(stacked[0], dynamics(*stacked, elites).mean)
    return s, a, following.mean(dim=0), rewards.mean(dim=0)


def test_errors_are_those_that_were_put_in(model):
    s, a, following, rewards = rows_that_the_world_foretells(model)
    off = th.tensor([0.0, 0.5, -2.0])
    sign = th.where(th.arange(50) % 2 == 0, 1.0, -1.0)[:, None]
    batch = ReplayBufferSamples(s, a, following + sign * off, th.zeros(50, 1), rewards + 3)
    told = inspection.prediction(model, RealTransitions(batch, th.arange(50)), fresh=True)
    assert told.n == 50
    assert told.names == ["s[0]", "s[1]", "s[2]", "reward"]
    np.testing.assert_allclose(told.error, [0.0, 0.5, 2.0, 3.0], atol=1e-5)
    changes = (batch.next_observations - s).numpy()
    expected = [*np.sqrt(np.square(changes).mean(axis=0)), batch.rewards.numpy().std()]
    np.testing.assert_allclose(told.unchanged, expected, rtol=1e-4)
    held = inspection.prediction(model, RealTransitions(batch, th.arange(50)), fresh=False)
    assert 5 <= held.n <= 15


def test_ends_are_counted(model, monkeypatch):
    s, a, following, rewards = rows_that_the_world_foretells(model)
    following[:, 0] = th.arange(50)
    dones = (th.arange(50) >= 40).float()[:, None]
    monkeypatch.setattr(model.world.outcomes, "termination_fn", lambda s, a, following: following[:, 0] % 5 == 0)
    batch = ReplayBufferSamples(s, a, following, dones, rewards)
    assert inspection.prediction(model, RealTransitions(batch, th.arange(50)), fresh=True).ends == (10, 2, 8)


def test_bounds_of_the_episodes_are_told(model, monkeypatch):
    s, a, following, rewards = rows_that_the_world_foretells(model)
    batch = ReplayBufferSamples(s, a, following, th.zeros(50, 1), rewards)
    data = RealTransitions(batch, th.arange(50))
    told = inspection.prediction(model, data, fresh=True)
    assert told.bounds == []
    assert "bounds" not in inspection.about_prediction(told, "of a test")
    healthy = model.world.dynamics.healthy_range
    monkeypatch.setitem(healthy._buffers, "low", th.tensor([0.7, -NO_BOUND, -NO_BOUND]))
    monkeypatch.setitem(healthy._buffers, "high", th.tensor([NO_BOUND, NO_BOUND, 0.2]))
    text = inspection.about_prediction(inspection.prediction(model, data, fresh=True), "of a test")
    assert "an episode ends where s[0] < 0.7, s[2] > 0.2" in text


def test_classifier_accuracy(model, monkeypatch):
    rows = list(rows_that_the_world_foretells(model))
    rows[2][:20] += 100.0
    far = lambda s, a, following: following[:, :1] - 50.0  # noqa: E731
    monkeypatch.setattr(model.world.classifier, "forward", far)
    batch = ReplayBufferSamples(*rows[:3], th.zeros(50, 1), rows[3])
    # Of the real ones it knows the 20 that are far, of the imagined ones all.
    told = inspection.prediction(model, RealTransitions(batch, th.arange(50)), fresh=True)
    assert told.accuracy == pytest.approx(0.7)


@pytest.mark.parametrize("as_dict", [False, True], ids=["Box", "Dict"])
def test_played_transitions_are_the_environments(as_dict, monkeypatch):
    space = spaces.Dict({"a": spaces.Box(-9, 9, (3,))}) if as_dict else None
    made = []

    def make(_):
        made.append(BoxEnv(space, high=2.0, length=7, terminates=True))
        return made[0]

    monkeypatch.setattr(inspection.gym, "make", make)
    model = MnM("MultiInputPolicy" if as_dict else "MlpPolicy", BoxEnv(space, high=2.0), **small())
    inspection.play(model, "Box-v0", 30)
    buffer = model.replay_buffer
    assert buffer.size() == 30
    actions = np.array(made[0].asked)
    np.testing.assert_allclose(buffer.actions[:, 0], actions / 2, rtol=1e-5)
    s, following = (x["a"] if as_dict else x for x in (buffer.observations, buffer.next_observations))
    steps = 0.9 * s[:, 0] + 0.1 * actions.mean(axis=1, keepdims=True)
    assert np.abs(following[:, 0] - steps).max() < 0.06
    assert np.flatnonzero(buffer.dones[:, 0]).tolist() == [6, 13, 20, 27]
    assert isinstance(buffer, ReplayBuffer)


# -- SB3's table --


def test_table_tells_of_the_world_in_every_dump(capsys, monkeypatch):
    soon(monkeypatch)
    MnM("MlpPolicy", short(), **small(verbose=1)).learn(200, log_interval=1)
    tables = [_table(text) for text in re.findall(r"(?s)-{20,}\n\|(.*?)\n-{20,}", capsys.readouterr().out)]
    assert [int(table["time/total_timesteps"]) for table in tables] == [25, 50, 75, 100, 125, 150, 175, 200]
    wanted = {
        "dynamics/": {"state_error", "reward_error", "end_error", "nll"},
        "classifier/": {"accuracy", "log_ratio_real", "log_ratio_imagined"},
        "imagination/": {"horizon", "real_ratio", "rows"},
    }
    for table in tables[2:]:
        for group, keys in wanted.items():
            assert keys <= {name.removeprefix(group) for name in table if name.startswith(group)}
        assert float(table["imagination/horizon"]) == 20
        assert float(table["imagination/real_ratio"]) in (0.1, 0.5, 1.0)
        assert 0 <= float(table["classifier/accuracy"]) <= 1
        assert float(table["dynamics/state_error"]) > 0


def _table(text: str) -> dict[str, str]:
    """SB3's table as a reader sees it: group/key -> value; cut keys keep their dots."""
    values, group = {}, ""
    for line in text.splitlines():
        key, value = (cell.strip() for cell in line.strip("|").split("|"))
        if key.endswith("/"):
            group = key
        else:
            assert not key.endswith("..."), key
            values[group + key] = value
    return values
