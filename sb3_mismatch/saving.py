"""
The zip: SAC's members, and the learned world beside them.

``SAC.load`` reads every ``*.pth`` member as a part of SAC and stops at one that it does not know, and it unpickles all
of ``data``. So the world's members are named ``world/*.pt``, and a user's objective and functions, which may need this
package or the user's, are pickled as ``world/*.pkl``. The policy in ``policy.pth`` is the deployed one, which SAC is to
play as well; the actor that learns stands in ``learner.pt``. Nothing is unpickled before the whole zip is known to be
what was written (:mod:`sb3_mismatch.files`).
"""

import io
import json
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import cloudpickle
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file, open_path
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.utils import get_device

from sb3_mismatch import sharing
from sb3_mismatch.averaging import Averaged
from sb3_mismatch.checkpoints import Checkpointed
from sb3_mismatch.files import check_zip, sealed, written
from sb3_mismatch.randomness import RandomStreams
from sb3_mismatch.world import World

SelfSavedWithWorld = TypeVar("SelfSavedWithWorld", bound="SavedWithWorld")

Path = str | pathlib.Path | io.BufferedIOBase

#: settings that may be objects of the user's; names and numbers among them stay in ``data``
PICKLED = ("objective", "termination_fn", "reward_fn")

_STATE = "world/state.pt"
_POLICY, _LEARNER = "policy.pth", "learner.pt"


class SavedWithWorld(Averaged, Checkpointed):
    """Saves and loads ``world`` with the base algorithm, whose own class can open the zip too."""

    world: World
    _streams: RandomStreams
    _fitted_at: int | None

    def save(self, path: Path, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """
        SB3's ``save``. The base algorithm's ``load`` opens the zip too and ignores the world in it.

        Whoever is killed meanwhile leaves the file before whole (:mod:`sb3_mismatch.files`).

        :param exclude: as in SB3; ``["world"]`` leaves the world out, not the average actor
        """
        exclude = list(exclude or [])
        settings = {name: getattr(self, name) for name in PICKLED if name not in exclude}
        pickled = {name: value for name, value in settings.items() if not isinstance(value, str | None)}
        members = {f"world/{name}.pkl": cloudpickle.dumps(value) for name, value in pickled.items()}
        if "world" not in exclude:
            members[_STATE] = _tensors({"streams": self._streams.state_dict()})
        if self._average is not None:
            members[_POLICY] = _tensors(self.deployed_policy.state_dict())
            members[_LEARNER] = _tensors(self._learner())
        archive = io.BytesIO()
        super().save(archive, [*exclude, *pickled], include)
        contents = sealed(_set_world_apart(archive, members))
        with written(path, "zip") as file:
            file.write(contents)

    def save_replay_buffer(self, path: Path) -> None:
        """SB3's ``save_replay_buffer``. Whoever is killed meanwhile leaves the file before whole."""
        with written(path, "pkl", self.verbose) as file:
            super().save_replay_buffer(file)

    def save_world(self, path: str | pathlib.Path) -> None:
        """
        Save the learned world alone, to be read by :meth:`load_world` or :func:`~sb3_mismatch.sharing.load_world`
        without unpickling anything. A user's functions are not in it.

        :param path: of the file; ``.safetensors`` is added to one without suffix
        :raises ValueError: for settings that are no plain numbers, strings and lists
        """
        sharing.save_world(self.world, path)

    def load_world(self, path: str | pathlib.Path) -> None:
        """
        Take the networks of a learned world that :meth:`save_world` saved, in place of this agent's. Its optimizers
        start anew, and what was imagined is imagined again. Nothing is unpickled.

        :param path: of the file
        :raises ValueError: for a damaged or foreign file, other spaces or other networks; the world stays as it is
        """
        sharing.take_world(self.world, path)
        self._fitted_at = self.num_timesteps

    @classmethod
    def load(
        cls: type[SelfSavedWithWorld],
        path: Path,
        env: Any = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSavedWithWorld:
        """
        SB3's ``load``. From a zip without a world, SAC's for instance, the world starts untrained.

        :raises ValueError: for a damaged, foreign or newer zip, before anything in it is unpickled, and when a setting
            in ``kwargs`` asks for other networks than those in the zip
        """
        archive = _checked(path, cls)
        saved = _read_world(archive, get_device(device))
        replaced = {name: value for name, value in (custom_objects or {}).items() if name in PICKLED}
        settings = saved.settings(skip={*replaced, *kwargs})
        try:
            model = super().load(
                archive,
                env,
                device,
                custom_objects,
                print_system_info,
                force_reset,
                **{**settings, **replaced, **kwargs},
            )
            model.set_parameters({**model.get_parameters(), **saved.parameters})  # type: ignore[dict-item]
            model._go_on_from(saved.learner)
        except (AttributeError, KeyError, RuntimeError) as error:
            if not kwargs:
                raise ValueError(
                    f"what {path} holds does not fit {cls.__name__} ({str(error).splitlines()[0]}): load it with the "
                    "class that saved it"
                ) from error
            changed = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
            raise ValueError(
                f"{cls.__name__}.load got {changed}, of which something does not fit the networks in the zip: leave it "
                f"out, or start a new {cls.__name__} and pass get_parameters() of the old one to set_parameters()"
            ) from error
        if saved.state is None:
            model._fitted_at = None
            if model.verbose >= 1:
                print(f"No learned world in {path}: it starts untrained")
        else:
            model._streams.load_state_dict(saved.state["streams"])
        return model

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """SB3's ``set_parameters``. Parameters that hold nothing of the world leave it as it is."""
        learner = None
        if isinstance(load_path_or_dict, dict):
            parameters: dict[str, Any] = load_path_or_dict
        else:
            archive = _checked(load_path_or_dict, type(self))
            saved = _read_world(archive, get_device(device))
            parameters = {**saved.parameters, **load_from_zip_file(archive, load_data=False, device=device)[1]}
            learner = saved.learner
        if not any(name.startswith("world.") for name in parameters):
            world = {name: value for name, value in self.get_parameters().items() if name.startswith("world.")}
            parameters = {**world, **parameters}
        super().set_parameters(parameters, exact_match, device)
        self._go_on_from(learner)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*(f"world.{part}" for part in World.parts), *state_dicts], variables

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_streams"]


class _SavedWorld(NamedTuple):
    """
    What a zip holds beside the base algorithm.

    :param parameters: the world's state dicts by the names of ``get_parameters``
    :param state: where its streams stood; ``None`` where there is no world
    :param learner: the actor that learns (:class:`~sb3_mismatch.averaging.Averaged`); ``None``: that of the policy
    :param pickles: settings, pickled, by name
    """

    parameters: dict[str, Any]
    state: dict[str, Any] | None
    learner: dict[str, Any] | None
    pickles: dict[str, bytes]

    def settings(self, skip: Iterable[str]) -> dict[str, Any]:
        """The pickled settings but those to ``skip``."""
        settings = {}
        for name in self.pickles.keys() - set(skip):
            try:
                settings[name] = cloudpickle.loads(self.pickles[name])
            except Exception as error:
                raise ValueError(f"{name} of the zip cannot be read ({error}): pass {name}=... to load()") from error
        return settings


def _tensors(state: dict[str, Any]) -> bytes:
    """A member of the zip that can be read without unpickling anything else."""
    buffer = io.BytesIO()
    th.save(state, buffer)
    return buffer.getvalue()


def _set_world_apart(archive: io.BytesIO, members: Mapping[str, bytes]) -> bytes:
    """
    Turn a zip in which the world's state dicts are members like SAC's (``world.dynamics.pth``) into one in which
    they stand apart (``world/dynamics.pt``) beside ``members``, which go before its own; where these hold no state,
    they are left out.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            if name in members:
                continue
            if not name.startswith("world."):
                target.writestr(name, source.read(name))
            elif _STATE in members:
                target.writestr(name.replace("world.", "world/").removesuffix("h"), source.read(name))
        for name, contents in members.items():
            target.writestr(name, contents)
    return out.getvalue()


def _checked(path: Any, kind: type[OffPolicyAlgorithm]) -> io.BytesIO:
    """
    The whole of a zip, which nothing was unpickled of yet.

    :raises ValueError: when it is damaged, a newer version's, or saved by another algorithm than ``kind`` builds on
    """
    with _opened(path) as file:
        if file.seekable():
            file.seek(0)
        contents = file.read()
    check_zip(contents, path)
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        members = set(archive.namelist())
        policy = _described(archive.read("data"), "policy_class") if "data" in members else {}
    wrong = [f"no {name}" for name in ("data", "actor.optimizer.pth", "critic.optimizer.pth") if name not in members]
    # Of a class SB3 writes the module in plain. A policy of the user's own is the user's own concern.
    theirs, ours = str(policy.get("__module__", "")), kind.policy_aliases["MlpPolicy"].__module__
    if theirs != ours and theirs.startswith(("stable_baselines3.", "sb3_contrib.")):
        wrong.append(f"a policy of {theirs}")
    if wrong:
        raise ValueError(
            f"{path} holds no agent that {kind.__name__} could load ({', '.join(wrong)}): load it with the class that "
            "saved it"
        )
    return io.BytesIO(contents)


def _described(data: bytes, name: str) -> dict[str, Any]:
    """What SB3's JSON tells in plain of an object that it holds pickled; nothing where it is none."""
    try:
        description = json.loads(data)[name]
    except (ValueError, KeyError, TypeError):
        return {}
    return description if isinstance(description, dict) else {}


def _read_world(file: io.BytesIO, device: th.device) -> _SavedWorld:
    """What a zip holds beside the base algorithm."""
    with zipfile.ZipFile(file) as archive:
        members = {
            name: archive.read(name) for name in archive.namelist() if name.startswith("world/") or name == _LEARNER
        }
    pickles = {pathlib.PurePath(name).stem: members.pop(name) for name in list(members) if name.endswith(".pkl")}
    tensors = {
        name: th.load(io.BytesIO(contents), map_location=device, weights_only=True)
        for name, contents in members.items()
    }
    state, learner = tensors.pop(_STATE, None), tensors.pop(_LEARNER, None)
    parameters = {name.replace("world/", "world.").removesuffix(".pt"): value for name, value in tensors.items()}
    return _SavedWorld(parameters, state, learner, pickles)


@contextmanager
def _opened(path: Any) -> Iterator[Any]:
    """A path opened for reading as SB3 opens it, and closed where SB3 closes it: a file object stays open."""
    file = open_path(path, "r", verbose=0, suffix="zip")
    try:
        yield file
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()
