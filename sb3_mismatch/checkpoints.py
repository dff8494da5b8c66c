"""
Checkpoints: folders that hold all of a run, so that it goes on as if it had never stopped.

A checkpoint is written into a folder beside its place, its manifest last, and then renamed. The manifest holds the size
and the digest of every file; a folder without one, or whose files have other sizes, is no checkpoint.
"""

import copy
import hashlib
import io
import json
import pathlib
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn
from stable_baselines3.common.vec_env import VecEnv

from sb3_mismatch.env_state import put_back, standing
from sb3_mismatch.files import PART, digest, flush, flush_folder, read_seal, seal
from sb3_mismatch.imagination import ImaginedRows
from sb3_mismatch.randomness import global_states, set_global_states
from sb3_mismatch.settings import check_count
from sb3_mismatch.world import World

SelfCheckpointed = TypeVar("SelfCheckpointed", bound="Checkpointed")

Folder = str | pathlib.Path

_MANIFEST = "checkpoint.json"
_MODEL, _TENSORS, _BUFFER, _RUN = "model.zip", "tensors.pt", "buffer.pkl", "run.pkl"


class Log(NamedTuple):
    """What was recorded and not yet written: values, how many each is the mean of, and what each is kept from."""

    values: dict[str, Any]
    counts: dict[str, int]
    excluded: dict[str, Any]


class Checkpointed(OffPolicyAlgorithm):
    """Writes and reads checkpoints, and lets callbacks write them between two rounds of ``learn``."""

    world: World
    #: called before every rollout, when nothing is under way
    _between_rounds: tuple[Callable[[], None], ...] = ()
    #: of the run that was continued, until ``learn`` takes it up
    _resumed_log: Log | None = None

    def save_checkpoint(self, folder: Folder) -> None:
        """
        Write all that this run consists of into ``folder``: networks, optimizers, real and imagined rows, counters,
        all random states, VecNormalize, and where the environment stands if that is known
        (:mod:`sb3_mismatch.env_state`). What a process that is killed leaves is the checkpoint before, whole.

        To be called between two calls of ``learn``; during one, :class:`ResumeCallback` writes them.

        :param folder: made if need be; a checkpoint in it is replaced
        :raises ValueError: when the folder holds anything else than a checkpoint
        """
        archive, tensors = io.BytesIO(), io.BytesIO()
        self.save(archive)
        rows = self.world.imagined.rows
        th.save(
            {"random": global_states(self.device), "imagined": None if rows is None else rows._asdict()},
            tensors,
        )
        log = _pending(self._logger) if hasattr(self, "_logger") else Log({}, {}, {})
        run = {
            "env": None if self.env is None else standing(self.env),
            "action_space": self.action_space.np_random.bit_generator.state,
            "log": log if self._resumed_log is None else self._resumed_log,
        }
        assert self.replay_buffer is not None
        buffer = _filled(self.replay_buffer)
        files: dict[str, Callable[[Any], Any]] = {
            _MODEL: lambda file: file.write(archive.getvalue()),
            _TENSORS: lambda file: file.write(tensors.getvalue()),
            _BUFFER: lambda file: pickle.dump(buffer, file, protocol=pickle.HIGHEST_PROTOCOL),
            _RUN: lambda file: pickle.dump(run, file),
        }
        about = {"class": type(self).__name__, "step": self.num_timesteps, "n_envs": self.n_envs}
        _write(pathlib.Path(folder), files, about)

    @classmethod
    def load_checkpoint(
        cls: type[SelfCheckpointed], folder: Folder, env: Any, device: th.device | str = "auto", **kwargs: Any
    ) -> SelfCheckpointed:
        """
        Read a checkpoint and put everything back, the global random generators and ``env`` included.
        ``learn(remaining, reset_num_timesteps=False)`` then continues the run: bit for bit on the same machine if the
        environment's state is known (:mod:`sb3_mismatch.env_state`), otherwise with a new episode.

        As ``load`` does, this unpickles: read no checkpoint of somebody whom you do not trust.

        :param folder: a checkpoint, or a folder of checkpoints, of which the newest whole one is read
        :param env: a new environment like the one of the run, in the same wrappers (VecNormalize included)
        :param device: as in ``load``
        :param kwargs: further arguments of ``load``
        :raises FileNotFoundError: when there is no whole checkpoint
        :raises ValueError: for a damaged or newer checkpoint, another class, or an environment of another kind
        """
        found = newest_checkpoint(folder)
        if found is None:
            raise FileNotFoundError(f"{folder} holds no whole checkpoint: start the run anew, or name its folder")
        about = _verified(found)
        if about["class"] != cls.__name__:
            raise ValueError(f"{found} is a checkpoint of {about['class']}: use {about['class']}.load_checkpoint")
        if env is None:
            raise ValueError("env=None cannot continue a run: make an environment as the run's was made and pass it")
        n_envs = env.num_envs if isinstance(env, VecEnv) else 1
        if about["n_envs"] != n_envs:
            raise ValueError(
                f"{found} was written with {about['n_envs']} environments and env has {n_envs}: pass as many, or load "
                f"its {_MODEL} with load() to learn with another number"
            )
        model = cls.load(found / _MODEL, env, device, force_reset=False, **kwargs)
        assert model.replay_buffer is not None
        assert model.env is not None
        _fill(model.replay_buffer, pickle.loads((found / _BUFFER).read_bytes()))
        run = pickle.loads((found / _RUN).read_bytes())
        if not (run["env"] is not None and put_back(model.env, run["env"])):
            model._start_episodes_anew()
        model.action_space.np_random.bit_generator.state = run["action_space"]
        model._resumed_log = run["log"]
        tensors = th.load(found / _TENSORS, map_location="cpu", weights_only=True)
        if tensors["imagined"] is not None:
            rows = {name: column.to(model.device) for name, column in tensors["imagined"].items()}
            model.world.imagined.replace(ImaginedRows(**rows))
        # Last of all: whatever is made above may draw.
        set_global_states(tensors["random"], model.device)
        return model

    def _start_episodes_anew(self) -> None:
        """Let ``learn`` reset the environment, to other episodes than the run's first."""
        assert self.env is not None
        self._last_obs = None
        if self.seed is not None:
            self.env.seed(self.seed + self.num_timesteps)
        if self.verbose >= 1:
            print("The environment's state is not known to the checkpoint: its episodes start anew")

    def _setup_learn(
        self, total_timesteps: int, callback: Any = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        self._between_rounds = ()
        log, self._resumed_log = self._resumed_log, None
        noise = None if log is None else copy.deepcopy(self.action_noise)
        prepared = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        if log is not None and not reset_num_timesteps:
            # SB3 resets the noise, and the logger is a new one: here the episode goes on.
            self.action_noise = noise
            self.logger.name_to_value.update(log.values)
            self.logger.name_to_count.update(log.counts)
            self.logger.name_to_excluded.update(log.excluded)
        return prepared

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """SB3's. What waits for the end of a round comes first."""
        for action in self._between_rounds:
            action()
        return super().collect_rollouts(*args, **kwargs)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_between_rounds", "_resumed_log"]


class ResumeCallback(BaseCallback):
    """
    Writes checkpoints into ``folder/step_000001000`` and so on, from which ``load_checkpoint(folder, env)`` continues.

    They are written between two rounds (rollout and training), the first time that the next multiple of ``every`` is
    reached, and at the end of ``learn``.

    :param folder: of one run and no other
    :param every: environment steps between two checkpoints
    :param keep: the last so many are kept
    :param verbose: from 1 on, each is told
    """

    model: Checkpointed

    def __init__(self, folder: Folder, every: int = 1000, keep: int = 3, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_count("every", every)
        check_count("keep", keep)
        self.folder, self.every, self.keep = pathlib.Path(folder), every, keep
        self._last, self._in_round = 0, False

    def _on_training_start(self) -> None:
        """
        :raises TypeError: when the agent is none of this package
        :raises ValueError: when the folder holds a later checkpoint, of another run
        """
        if not hasattr(self.model, "save_checkpoint"):
            raise TypeError(
                f"ResumeCallback needs an agent of this package and met {type(self.model).__name__}: use "
                "stable_baselines3.common.callbacks.CheckpointCallback with it"
            )
        newest = newest_checkpoint(self.folder)
        if newest is not None and _step(newest) > self.model.num_timesteps:
            raise ValueError(
                f"folder={str(self.folder)!r} holds {newest.name}, later than this run's step "
                f"{self.model.num_timesteps}: continue from it with load_checkpoint, or choose another folder"
            )
        if self.folder.is_dir():
            _prune(self.folder, self.keep)
        self._last = self.model.num_timesteps
        self.model._between_rounds += (self._write_if_due,)

    def _on_rollout_start(self) -> None:
        self._in_round = True

    def _on_rollout_end(self) -> None:
        self._in_round = False

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        # A run that was stopped amid a round has made a step that it has not stored.
        if not self._in_round and self.model.num_timesteps > self._last:
            self.write()

    def _write_if_due(self) -> None:
        if self.model.num_timesteps // self.every > self._last // self.every:
            self.write()

    def write(self) -> None:
        """Write a checkpoint of now, and remove those that are too many."""
        path = self.folder / f"step_{self.model.num_timesteps:09d}"
        self.model.save_checkpoint(path)
        self._last = self.model.num_timesteps
        _prune(self.folder, self.keep)
        if self.verbose >= 1:
            print(f"Checkpoint written to {path}")


def newest_checkpoint(folder: Folder) -> pathlib.Path | None:
    """
    The folder itself if it is a checkpoint, or else the newest in it; ``None`` where there is none.

    What a killed process had written and not yet renamed counts too.
    """
    folder = pathlib.Path(folder)
    if _is_whole(folder):
        return folder
    if _is_whole(_part_of(folder)):
        return _part_of(folder)
    whole = [path for path in folder.iterdir() if _is_whole(path)] if folder.is_dir() else []
    return max(whole, key=lambda path: (_step(path), path.name.endswith(PART)), default=None)


def _write(target: pathlib.Path, files: Mapping[str, Callable[[Any], Any]], about: Mapping[str, Any]) -> None:
    """A checkpoint of ``files``, each written by its function, in the place of the one at ``target``."""
    if target.exists() and not _is_whole(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"folder={str(target)!r} exists and is no checkpoint: choose another, or remove it")
    part = _part_of(target)
    _settle(part, target)
    part.mkdir(parents=True)
    entries = {}
    for name, write in files.items():
        with (part / name).open("wb") as file:
            write(file)
            flush(file)
        entries[name] = {"bytes": (part / name).stat().st_size, "sha256": _digest_of(part / name)}
    contents = {**seal(), **about, "files": entries}
    with (part / _MANIFEST).open("w") as manifest:
        json.dump({**contents, "sha256": _digest_of_manifest(contents)}, manifest, indent=1)
        flush(manifest)
    flush_folder(part)
    _settle(part, target)


def _settle(part: pathlib.Path, target: pathlib.Path) -> None:
    """Give what was written its place if it is whole, and remove it otherwise."""
    if _is_whole(part):
        _remove(target)
        part.rename(target)
        flush_folder(target.parent)
    else:
        _remove(part)


def _prune(folder: pathlib.Path, keep: int) -> None:
    """Keep the ``keep`` newest checkpoints in ``folder``, each at its place, and nothing that is half there."""
    name = re.compile(rf"\.(step_\d{{9,}}){re.escape(PART)}")
    for path in list(folder.iterdir()):
        if path.is_dir() and (of_part := name.fullmatch(path.name)):
            _settle(path, folder / of_part[1])
    paths = [path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"step_\d{9,}", path.name)]
    whole = sorted((path for path in paths if _is_whole(path)), key=_step)
    for path in paths:
        if path not in whole[-keep:]:
            _remove(path)


def _remove(folder: pathlib.Path) -> None:
    # Without its manifest it is no checkpoint, whatever else is left when the process is killed here.
    (folder / _MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _part_of(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f".{folder.name}{PART}")


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether its manifest is there, and all files have the size that is told in it."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _step(folder: pathlib.Path) -> int:
    return int(json.loads((folder / _MANIFEST).read_text())["step"])


def _verified(folder: pathlib.Path) -> dict[str, Any]:
    """
    The manifest of a checkpoint whose every file is what was written.

    :raises ValueError: when one is not, or the checkpoint is a newer version's
    """
    manifest = read_seal((folder / _MANIFEST).read_text(), folder)
    intact = {_MANIFEST: manifest.pop("sha256", None) == _digest_of_manifest(manifest)}
    if intact[_MANIFEST]:
        intact |= {name: _digest_of(folder / name) == entry["sha256"] for name, entry in manifest["files"].items()}
    for name, is_intact in intact.items():
        if not is_intact:
            raise ValueError(f"{folder / name} is damaged: remove this checkpoint to continue from the one before")
    return manifest


def _digest_of_manifest(contents: Mapping[str, Any]) -> str:
    return digest(json.dumps(contents, sort_keys=True).encode())


def _digest_of(path: pathlib.Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _pending(logger: Logger) -> Log:
    """What was recorded and not yet written; figures and videos are left out."""
    values = {k: v for k, v in logger.name_to_value.items() if isinstance(v, bool | int | float | str | np.generic)}
    return Log(values, dict(logger.name_to_count), dict(logger.name_to_excluded))


def _filled(buffer: ReplayBuffer) -> dict[str, Any]:
    """All that a replay buffer holds, its arrays cut to the rows that were written to."""
    # Where observations serve as next observations too, one row more holds the newest one's successor.
    n = buffer.buffer_size if buffer.full else min(buffer.pos + 1, buffer.buffer_size)

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(part) for key, part in value.items()}
        is_column = isinstance(value, np.ndarray) and value.shape[:1] == (buffer.buffer_size,)
        return value[:n] if is_column else value

    return {name: cut(value) for name, value in vars(buffer).items() if name != "device"}


def _fill(buffer: ReplayBuffer, state: Mapping[str, Any]) -> None:
    """Put what :func:`_filled` took into a buffer of the same size."""

    def put(into: Any, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(into, dict) and into.keys() == value.keys():
            return {key: put(into[key], part) for key, part in value.items()}
        if isinstance(value, np.ndarray) and isinstance(into, np.ndarray) and len(into) > len(value):
            into[: len(value)] = value
            return into
        return value

    vars(buffer).update({name: put(vars(buffer).get(name), value) for name, value in state.items()})
