"""
The zip: SAC's members, and the learned world beside them.

``SAC.load`` reads every ``*.pth`` member as a part of SAC and stops at one that it does not know, so the world's
members are named ``world/*.pt``. Nothing of this package is pickled into ``data``.
"""

import io
import pathlib
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import TensorDict

from sb3_mismatch.randomness import RandomStreams
from sb3_mismatch.world import World

SelfSavedWithWorld = TypeVar("SelfSavedWithWorld", bound="SavedWithWorld")

_STATE = "world/state.pt"


class SavedWithWorld(OffPolicyAlgorithm):
    """Saves and loads ``world`` with the base algorithm, whose own class can open the zip too."""

    world: World
    _streams: RandomStreams
    _fitted_at: int | None

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        SB3's ``save``. The base algorithm's ``load`` opens the zip too and ignores the world in it.

        :param exclude: as in SB3; ``["world"]`` leaves the world out
        """
        exclude = list(exclude or [])
        archive = io.BytesIO()
        super().save(archive, exclude, include)
        state = None if "world" in exclude else {"streams": self._streams.state_dict()}
        contents = _set_world_apart(archive, state)
        file = open_path(path, "w", verbose=0, suffix="zip")
        file.write(contents)
        if isinstance(path, str | pathlib.Path):
            file.close()

    @classmethod
    def load(
        cls: type[SelfSavedWithWorld],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: Any = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSavedWithWorld:
        """SB3's ``load``. From a zip without a world, SAC's for instance, the world starts untrained."""
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        file = open_path(path, "r", verbose=0, suffix="zip")
        file.seek(0)
        parameters, state = _read_world(file, model.device)
        if isinstance(path, str | pathlib.Path):
            file.close()
        if state is None:
            model._fitted_at = None
            if model.verbose >= 1:
                print(f"No learned world in {path}: it starts untrained")
        else:
            model.set_parameters(parameters, exact_match=False)
            model._streams.load_state_dict(state["streams"])
        return model

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """SB3's ``set_parameters``. Parameters that hold nothing of the world leave it as it is."""
        if isinstance(load_path_or_dict, dict) and not any(name.startswith("world.") for name in load_path_or_dict):
            world = {name: value for name, value in self.get_parameters().items() if name.startswith("world.")}
            load_path_or_dict = {**world, **load_path_or_dict}  # type: ignore[dict-item]
        super().set_parameters(load_path_or_dict, exact_match, device)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*(f"world.{part}" for part in World.parts), *state_dicts], variables

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_streams"]


def _set_world_apart(archive: io.BytesIO, state: Mapping[str, Any] | None) -> bytes:
    """
    Turn a zip in which the world's state dicts are members like SAC's (``world.dynamics.pth``) into one in which
    they stand apart (``world/dynamics.pt``) beside ``state``; without ``state`` they are left out.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            if not name.startswith("world."):
                target.writestr(name, source.read(name))
            elif state is not None:
                target.writestr(name.replace("world.", "world/").removesuffix("h"), source.read(name))
        if state is not None:
            buffer = io.BytesIO()
            th.save(dict(state), buffer)
            target.writestr(_STATE, buffer.getvalue())
    return out.getvalue()


def _read_world(file: Any, device: th.device) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The world's state dicts by the names of ``get_parameters``, and its state, ``None`` where there is no world."""
    with zipfile.ZipFile(file) as archive:
        members = {
            name: th.load(io.BytesIO(archive.read(name)), map_location=device, weights_only=True)
            for name in archive.namelist()
            if name.startswith("world/")
        }
    state = members.pop(_STATE, None)
    return {name.replace("world/", "world.").removesuffix(".pt"): value for name, value in members.items()}, state
