"""Files that are whole or absent, and zips that are refused if a bit of them is not what was written."""

import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import time
import zipfile

import gymnasium as gym
import pytest
from agents import BoxEnv, assert_same, sac_settings, small, trained, world_contents
from sb3_contrib import TQC
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.callbacks import CheckpointCallback

from sb3_mismatch import MnM, files


@pytest.fixture(scope="module")
def agent():
    """A trained agent; tests leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_mismatch.mnm.FEWEST_ROWS", 40)
        return trained(BoxEnv(), 70, real_ratio=0.5)


@pytest.fixture(scope="module")
def saved(agent):
    archive = io.BytesIO()
    agent.save(archive)
    return archive.getvalue()


class Interrupt(BaseException):
    """As a signal in the middle of things."""


@pytest.mark.parametrize("save", [MnM.save, MnM.save_replay_buffer, MnM.save_world])
def test_what_is_interrupted_leaves_the_file_before(agent, save, tmp_path, monkeypatch):
    path = tmp_path / "file.zip"
    save(agent, path)
    before = path.read_bytes()

    def interrupted(*args):
        assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == ["file.zip"]
        assert len(list(tmp_path.iterdir())) == 2
        raise Interrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            with pytest.raises(Interrupt):
                save(agent, path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["file.zip"]


KILLED = """
import os, signal, sys
from sb3_mismatch.files import written

with written(sys.argv[1], "zip") as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_is_removed_after_an_hour(tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(b"before")
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert path.read_bytes() == b"before"
    (left,) = (file for file in tmp_path.iterdir() if file != path)
    assert left.read_bytes() == b"half"
    with files.written(tmp_path / "other", "zip") as file:
        file.write(b"whole")
    assert left.exists()
    os.utime(left, (time.time() - 4000,) * 2)
    with files.written(tmp_path / "other", "zip") as file:
        file.write(b"whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.zip", "other.zip"]


def test_paths_mean_what_they_mean_to_sb3(tmp_path):
    def write(path, verbose=0):
        with files.written(path, "zip", verbose) as file:
            file.write(b"new")

    (tmp_path / "a.zip").mkdir()
    with pytest.warns(UserWarning, match=r"a.zip' is a folder. Will save instead to .*a.zip_2"):
        write(tmp_path / "a")
    assert (tmp_path / "a.zip_2").read_bytes() == b"new"
    with pytest.warns(UserWarning, match="exists, will overwrite it"):
        write(str(tmp_path / "a.zip_2"), verbose=2)
    (tmp_path / "there.bin").write_bytes(b"old")
    (tmp_path / "link.zip").symlink_to(tmp_path / "there.bin")
    write(tmp_path / "link")
    assert (tmp_path / "link.zip").is_symlink()
    assert (tmp_path / "there.bin").read_bytes() == b"new"
    write("/dev/null")


def test_sb3s_checkpoints_are_written_so_too(tmp_path, monkeypatch):
    replaced = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(b.name), replace(a, b)))
    callback = CheckpointCallback(20, str(tmp_path), save_replay_buffer=True)
    MnM("MlpPolicy", BoxEnv(), **small()).learn(20, callback=callback)
    assert replaced == ["rl_model_20_steps.zip", "rl_model_replay_buffer_20_steps.pkl"]
    assert pickle.loads((tmp_path / replaced[1]).read_bytes()).size() == 19


def refusal(contents, load=MnM.load):
    """In what words a file is refused; ``None`` where it is not."""
    words = None
    try:
        load(io.BytesIO(contents), device="cpu")
    except ValueError as error:
        words = str(error)
    assert words is None or ("\n" not in words and ": " in words)
    return words


def test_random_bytes_are_refused(tmp_path):
    rng = random.Random(0)
    for n in (0, 1, 21, 22, 23, 100, 5000):
        contents = rng.randbytes(n)
        assert "wasn't a zip-file" in refusal(contents)
        # As much as a zip's end may follow.
        assert refusal(contents + b"PK\5\6" + bytes(18)) is not None
    (tmp_path / "model.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"^the file .*model wasn't a zip-file, or is cut short: pass one that save"):
        MnM.load(tmp_path / "model")


def test_zips_that_are_cut_short_are_refused(saved):
    for n in (*range(0, len(saved), len(saved) // 20), len(saved) - 1, len(saved) - 100):
        assert refusal(saved[:n]) is not None, n


def test_of_zips_with_a_bit_changed_nothing_is_unpickled(agent, saved, monkeypatch):
    unpickled = []
    for module in ("cloudpickle", "torch"):
        monkeypatch.setattr(f"{module}.load", lambda *args, **kwargs: unpickled.append(args))
        monkeypatch.setattr(f"{module}.loads", lambda *args: unpickled.append(args), raising=False)
    rng = random.Random(1)
    # The last kilobytes hold names, places and the seal: most of the cases.
    places = [rng.randrange(len(saved)) for _ in range(100)] + [
        rng.randrange(len(saved) - 2500, len(saved)) for _ in range(120)
    ]
    for place in places:
        changed = bytearray(saved)
        changed[place] ^= 1 << rng.randrange(8)
        words = refusal(bytes(changed))
        if words is None:
            pytest.fail(f"byte {place} of {len(saved)} was changed and nothing told")
        assert re.search("damaged|wasn't a zip-file|newer|update", words), words
    assert not unpickled


def test_the_seal_is_no_hindrance(agent, saved):
    """Whole, behind other bytes, and rewritten without a seal by whatever tool."""
    for contents in (saved, b"prefix" + saved, rewritten(saved)):
        assert_same(world_contents(MnM.load(io.BytesIO(contents), device="cpu")), world_contents(agent))


def rewritten(contents, change=lambda name, member: member):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(contents)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def test_zips_without_a_seal_are_checked_by_their_sums(saved):
    """SAC's, for instance."""
    plain = bytearray(rewritten(saved))
    plain[len(plain) // 3] ^= 1
    assert re.search(r"is damaged \(.* is not what was written\)", refusal(bytes(plain)))


def test_what_was_added_or_taken_away_is_told(saved, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(saved)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", b"")
    assert "was changed after it was saved" in refusal(path.read_bytes())


def test_zips_of_something_else_are_told(tmp_path):
    why = {
        PPO: "no actor.optimizer.pth, no critic.optimizer.pth, a policy of stable_baselines3.common.policies",
        TD3: "a policy of stable_baselines3.td3.policies",
        TQC: "a policy of sb3_contrib.tqc.policies",
    }
    for kind, words in why.items():
        settings = {} if kind is PPO else {"buffer_size": 10}
        kind("MlpPolicy", gym.make("Pendulum-v1"), device="cpu", **settings).save(tmp_path / kind.__name__)
        refused = (
            rf"{kind.__name__} holds no agent that MnM could load \({words}\): load it with the class that saved it$"
        )
        with pytest.raises(ValueError, match=refused):
            MnM.load(tmp_path / kind.__name__, device="cpu")
    with zipfile.ZipFile(tmp_path / "notes.zip", "w") as archive:
        archive.writestr("notes.txt", "no agent")
    with pytest.raises(ValueError, match=r"notes.zip holds no agent that MnM could load \(no data, "):
        MnM.load(tmp_path / "notes.zip")
    model = MnM("MlpPolicy", BoxEnv(), **small())
    with pytest.raises(ValueError, match="holds no agent that MnM"):
        model.set_parameters(str(tmp_path / "notes.zip"))


def test_zips_of_newer_versions_are_told(agent, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", 7)
    agent.save(tmp_path / "model")
    monkeypatch.setattr(files, "FORMAT", 1)
    with pytest.raises(
        ValueError, match=r"was written by sb3_mismatch \S+ in format 7, and this version reads up to 1: update"
    ):
        MnM.load(tmp_path / "model")
    # SAC opens it all the same.
    assert type(SAC.load(tmp_path / "model", device="cpu")) is SAC


def test_the_zip_names_version_and_format(saved):
    comment = json.loads(zipfile.ZipFile(io.BytesIO(saved)).comment)
    assert comment["format"] == files.FORMAT == 1
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", comment["sb3_mismatch"])


def test_sacs_zips_have_no_seal_and_are_loaded(tmp_path):
    SAC("MlpPolicy", BoxEnv(), **sac_settings()).save(tmp_path / "sac")
    assert MnM.load(tmp_path / "sac", device="cpu")._fitted_at is None
