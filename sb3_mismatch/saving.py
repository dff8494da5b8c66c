"""
The zip: SAC's members, and the learned world beside them.

``SAC.load`` reads every ``*.pth`` member as a part of SAC and stops at one that it does not know, so the world's
members are named ``world/*.pt``. Nothing of this package is pickled into ``data``.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import torch as th

WORLD = "world"
PTH = f"{WORLD}."
STATE = f"{WORLD}/state.pt"


def split_world(archive: bytes, state: Mapping[str, Any], keep_world: bool) -> bytes:
    """
    Turn a zip in which the world's state dicts are members like SAC's (``world.dynamics.pth``) into one in which
    they stand apart (``world/dynamics.pt``), beside ``state``; or are left out.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            if not name.startswith(PTH):
                target.writestr(name, source.read(name))
            elif keep_world:
                target.writestr(_member(name.removesuffix(".pth")), source.read(name))
        if keep_world:
            buffer = io.BytesIO()
            th.save(dict(state), buffer)
            target.writestr(STATE, buffer.getvalue())
    return out.getvalue()


def read_world(file: Any, device: th.device) -> tuple[dict[str, dict[str, Any]], dict[str, Any]] | None:
    """
    The world's state dicts by the names of ``get_parameters``, and its state; ``None`` where a zip holds no world.

    :param file: a path to a zip or an open binary file, which is read from its beginning
    """
    if hasattr(file, "seek"):
        file.seek(0)
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{WORLD}/")]
        if STATE not in names:
            return None
        loaded = {
            name: th.load(io.BytesIO(archive.read(name)), map_location=device, weights_only=True) for name in names
        }
    state = loaded.pop(STATE)
    return {name.removesuffix(".pt").replace("/", "."): value for name, value in loaded.items()}, state


def _member(name: str) -> str:
    return name.replace(PTH, f"{WORLD}/") + ".pt"
