"""
The learned world alone in a file that nobody needs to trust: safetensors, and its settings as JSON in the header.

Nothing is unpickled. Beside the settings stands a digest of them and of all tensors, so that a file that was changed or
cut short is told.
"""

import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch as th
from gymnasium import spaces
from safetensors import SafetensorError
from stable_baselines3.common.utils import get_device

from sb3_mismatch.buffers import ImaginedBuffer
from sb3_mismatch.files import digest, read_seal, seal, written
from sb3_mismatch.terminations import TransitionFunction
from sb3_mismatch.world import World

Path = str | pathlib.Path

_NETWORKS = ("dynamics", "classifier")
_KWARGS = ("dynamics_kwargs", "classifier_kwargs", "fit_kwargs")


def save_world(world: World, path: Path) -> None:
    """
    Save dynamics and classifier with their scales, and what they were made with. Left out are optimizers, what was
    imagined, and a user's functions.

    :param path: of the file; ``.safetensors`` is added to one without suffix
    :raises ValueError: for settings that are no plain numbers, strings and lists
    """
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name in _NETWORKS
        for key, value in getattr(world, name).state_dict().items()
    }
    settings = {
        **seal(),
        "observation_space": _space_to_json(world.observation_space),
        "action_space": _space_to_json(world.action_space),
        **{name: getattr(world, name) for name in _KWARGS},
    }
    try:
        text = json.dumps(settings)
    except TypeError as error:
        raise ValueError(
            f"the world's settings cannot be written as JSON ({error}): use plain numbers and lists"
        ) from error
    metadata = {"world": text, "sha256": _digest(text, tensors)}
    with written(path, "safetensors") as file:
        file.write(safetensors.torch.save(tensors, metadata))


def load_world(
    path: Path,
    device: th.device | str = "auto",
    termination_fn: TransitionFunction | None = None,
    reward_fn: TransitionFunction | None = None,
) -> World:
    """
    A world from a file that :func:`save_world` has written, without an agent. Nothing is unpickled.

    :param path: of the file, with or without ``.safetensors``
    :param device: where its networks live
    :param termination_fn: as in :class:`~sb3_mismatch.mnm.ModelBased`: functions are not in the file
    :param reward_fn: as ``termination_fn``
    :raises ValueError: for a damaged or foreign file, or a newer version's
    """
    settings, tensors = _read(path)
    try:
        world = World(
            _space_from_json(settings["observation_space"]),
            _space_from_json(settings["action_space"]),  # type: ignore[arg-type]
            get_device(device),
            termination_fn=termination_fn,
            reward_fn=reward_fn,
            **{name: settings[name] for name in _KWARGS},
        )
        _take(world, tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no world that this version can make ({error}): save it anew") from error
    return world


def take_world(world: World, path: Path) -> None:
    """
    Put the networks of a file into ``world``, whose optimizers start anew and whose imagined rows are dropped.

    :raises ValueError: as :func:`load_world`, and for other spaces or networks; ``world`` then stays as it is
    """
    settings, tensors = _read(path)
    for name in ("observation_space", "action_space"):
        saved = _space_from_json(settings[name])
        if saved != getattr(world, name):
            raise ValueError(f"{path} is a world of {name}={saved}, and the agent's is {getattr(world, name)}")
    theirs, ours = {k: v.shape for k, v in tensors.items()}, {k: v.shape for k, v in _state(world).items()}
    if theirs != ours:
        made_with = ", ".join(f"{name}={settings[name]!r}" for name in ("dynamics_kwargs", "classifier_kwargs"))
        raise ValueError(f"{path} holds other networks than the agent: make the agent with those of {made_with}")
    _take(world, tensors)
    for optimizer in (world.dynamics_optimizer, world.classifier_optimizer):
        optimizer.state.clear()
    world.imagined = ImaginedBuffer()


def _state(world: World) -> dict[str, th.Tensor]:
    return {f"{name}.{key}": value for name in _NETWORKS for key, value in getattr(world, name).state_dict().items()}


def _take(world: World, tensors: Mapping[str, th.Tensor]) -> None:
    for name in _NETWORKS:
        part = {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")}
        getattr(world, name).load_state_dict(part)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, th.Tensor]]:
    """Settings and tensors of a file that is what was written."""
    file = pathlib.Path(path)
    if not file.exists() and file.suffix == "":
        file = pathlib.Path(f"{file}.safetensors")
    contents = file.read_bytes()
    try:
        tensors = safetensors.torch.load(contents)
        (length,) = struct.unpack("<Q", contents[:8])
        metadata = json.loads(contents[8 : 8 + length])["__metadata__"]
        text, expected = metadata["world"], metadata["sha256"]
    # Foreign files are refused by whichever comes first.
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or no file of save_world(): pass one that is whole") from error
    if expected != _digest(text, tensors):
        raise ValueError(f"{path} is damaged, or was changed after it was saved: pass one that is whole")
    return read_seal(text, path), tensors


def _digest(text: str, tensors: Mapping[str, th.Tensor]) -> str:
    """Of the settings, and of each tensor's name, type, shape and contents."""
    parts = [text.encode()]
    for name in sorted(tensors):
        tensor = tensors[name]
        parts += [f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), tensor.numpy().tobytes()]
    return digest(*parts)


def _space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """A Box, or a Dict of such; bounds as text, since JSON knows no infinity."""
    if isinstance(space, spaces.Dict):
        return {"spaces": {key: _space_to_json(part) for key, part in space.spaces.items()}}
    assert isinstance(space, spaces.Box)
    bounds = {name: [str(x) for x in getattr(space, name).ravel().tolist()] for name in ("low", "high")}
    return {"shape": list(space.shape), "dtype": str(space.dtype), **bounds}


def _space_from_json(text: Mapping[str, Any]) -> spaces.Space[Any]:
    if "spaces" in text:
        return spaces.Dict({key: _space_from_json(part) for key, part in text["spaces"].items()})
    dtype, shape = np.dtype(text["dtype"]), tuple(text["shape"])
    low, high = (np.array([float(x) for x in text[name]]).astype(dtype).reshape(shape) for name in ("low", "high"))
    return spaces.Box(low, high, shape, dtype.type)
