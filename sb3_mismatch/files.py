"""
Files that are whole or absent, and zips whose every bit is vouched for.

A file is written beside its place, flushed to the disk, and renamed: whoever is killed leaves the one before whole. A
zip carries in its comment the format's number, this package's version and a digest of all that stands before it, so
that what was cut short or changed is told before anything in it is read.
"""

import hashlib
import io
import json
import os
import pathlib
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from stable_baselines3.common.save_util import open_path

#: number of the format of zips and checkpoints; a higher one is a newer version's
FORMAT = 1

#: seconds after which what a killed process has left half-written is removed
LEFTOVER = 3600.0

#: how the names of what is half-written end
PART = ".sb3part"

_KEY = "sb3_mismatch"


@contextmanager
def written(path: Any, suffix: str, verbose: int = 0) -> Iterator[Any]:
    """
    A file to write to, which stands at ``path`` once all is written and not before.

    :param path: as SB3 takes it: a path, or a file object, which is written to directly
    :param suffix: added to a path that has none
    :param verbose: from 2 on, a file that is replaced is told
    """
    if not isinstance(path, str | pathlib.Path):
        yield open_path(path, "w")
        return
    target = _target(pathlib.Path(path), suffix, verbose)
    if target.exists() and not target.is_file():
        # A device or a pipe: nothing to replace.
        with target.open("wb") as file:
            yield file
        return
    _remove_leftovers(target.parent)
    part = target.with_name(f".{target.name}.{os.getpid()}{PART}")
    try:
        with part.open("wb") as file:
            yield file
            flush(file)
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush_folder(target.parent)


def _target(path: pathlib.Path, suffix: str, verbose: int) -> pathlib.Path:
    """Where SB3 writes what is saved to ``path``, told in its words."""
    if path.suffix == "":
        path = pathlib.Path(f"{path}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=4)
        return _target(pathlib.Path(f"{path}_2"), suffix, verbose)
    if verbose >= 2 and path.is_file():
        warnings.warn(f"Path '{path}' exists, will overwrite it.", stacklevel=4)
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=4)
        path.parent.mkdir(exist_ok=True, parents=True)
    # A link stays one: what it names is replaced.
    return pathlib.Path(os.path.realpath(path))


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Remove what processes that were killed have left half-written in ``folder``."""
    for part in folder.glob(f".*{PART}"):
        try:
            if part.is_file() and time.time() - part.stat().st_mtime > LEFTOVER:
                part.unlink()
        except OSError:  # Somebody else's, or already gone.
            continue


def flush(file: Any) -> None:
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: pathlib.Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def digest(*parts: bytes) -> str:
    """SHA-256 of all parts behind each other."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def seal() -> dict[str, Any]:
    """What tells of a file's version: this package's and the format's."""
    return {_KEY: version("sb3-mismatch"), "format": FORMAT}


def sealed(archive: bytes) -> bytes:
    """A zip without a comment -> the same zip, vouched for in its comment."""
    # The last two bytes are the length of the comment, which follows them.
    body = archive[:-2]
    comment = _comment({**seal(), "bytes": len(body)}, body)
    return body + struct.pack("<H", len(comment)) + comment


def _comment(about: Mapping[str, Any], body: bytes) -> bytes:
    """What vouches for itself and for ``body``."""
    text = json.dumps(about)
    return json.dumps({**about, "sha256": digest(text.encode(), body)}).encode()


def check_zip(contents: bytes, name: Any) -> bool:
    """
    Read a zip and unpickle nothing of it.

    :param contents: of the file
    :param name: what the file is called, for messages
    :return: whether the zip is sealed: one that :func:`sealed` made, without a bit changed since
    :raises ValueError: for what is no zip, is damaged, or was written by a newer version
    """
    if not zipfile.is_zipfile(io.BytesIO(contents)):
        raise ValueError(f"the file {name} wasn't a zip-file, or is cut short: pass one that save() wrote")
    try:
        with zipfile.ZipFile(io.BytesIO(contents)) as archive:
            comment = archive.comment
            damaged = None if comment else archive.testzip()
    # Whatever a changed header may ask zipfile for.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"the zip {name} is damaged ({error}): pass one that is whole") from error
    if damaged is not None:
        raise ValueError(f"the zip {name} is damaged ({damaged} is not what was written): pass one that is whole")
    if not comment:
        return False
    about = read_seal(comment, name)
    about.pop("sha256", None)
    body, end = contents[: -len(comment) - 2], contents[-len(comment) - 2 :]
    n_bytes = about.get("bytes")
    archive_itself = body[-n_bytes:] if isinstance(n_bytes, int) else b""
    if end != struct.pack("<H", len(comment)) + comment or comment != _comment(about, archive_itself):
        raise ValueError(f"the zip {name} is damaged, or was changed after it was saved: pass one that is whole")
    return True


def read_seal(text: bytes | str, name: Any) -> dict[str, Any]:
    """
    Read what tells of a file's version.

    :param text: JSON, an object that holds at least what :func:`seal` gives
    :param name: what the file is called, for messages
    :raises ValueError: when it is not ours, or a newer version's
    """
    try:
        read: dict[str, Any] = json.loads(text)
        number, writer = int(read["format"]), read[_KEY]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is damaged, or no file of this package: pass one that is whole") from error
    if number > FORMAT:
        raise ValueError(
            f"{name} was written by sb3_mismatch {writer} in format {number}, and this version reads up to {FORMAT}: "
            "update sb3_mismatch"
        )
    return read
