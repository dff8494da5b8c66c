"""
Kill a training process again and again: ``python tests/killing.py FOLDER KILLS SEED``.

Prints, as JSON, at which steps each life began and which checkpoints it had completed, and whether every run that
reached its end this way holds what an uninterrupted one holds. Processes are forked from one that has imported all.
"""

import hashlib
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from agents import policy_contents, small, world_contents
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mismatch import MnM, mnm
from sb3_mismatch.checkpoints import ResumeCallback, newest_checkpoint
from sb3_mismatch.randomness import global_states

STEPS, EVERY = 600, 50


class Life(NamedTuple):
    """What a process told before its end: its first step, the checkpoints it had completed, how it ended."""

    began: int | None
    completed: list[int]
    writing: bool
    digest: str | None


class Telling(ResumeCallback):
    """Tells when it begins to write a checkpoint and when it is done."""

    def __init__(self, folder: Path, pipe: int) -> None:
        super().__init__(folder, every=EVERY, keep=2)
        self.pipe = pipe

    def write(self) -> None:
        tell(self.pipe, "writing")
        super().write()
        tell(self.pipe, "done", self.model.num_timesteps)


def tell(pipe: int, *words: object) -> None:
    os.write(pipe, (" ".join(map(str, words)) + "\n").encode())


def live(folder: Path, pipe: int) -> None:
    """Train from the newest checkpoint, or from the beginning, to the end."""
    env = VecNormalize(make_vec_env("Pendulum-v1"))
    if newest_checkpoint(folder) is None:
        model = MnM("MlpPolicy", env, **small())
    else:
        model = MnM.load_checkpoint(folder, env, device="cpu")
    tell(pipe, "began", model.num_timesteps)
    model.learn(
        STEPS - model.num_timesteps, callback=Telling(folder, pipe), reset_num_timesteps=model.num_timesteps == 0
    )
    statistics = [env.obs_rms.mean, env.obs_rms.var, env.ret_rms.var, env.returns, model._last_obs]
    imagined = model.world.imagined.rows._asdict()
    contents = [policy_contents(model), world_contents(model), imagined, statistics, global_states(model.device)]
    tell(pipe, "end", digest_of(contents))


def digest_of(contents: Any) -> str:
    sha = hashlib.sha256()

    def take(part: Any) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                sha.update(str(key).encode())
                take(value)
        elif isinstance(part, list | tuple):
            for value in part:
                take(value)
        elif isinstance(part, th.Tensor):
            sha.update(part.detach().contiguous().numpy().tobytes())
        else:
            sha.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())

    take(contents)
    return sha.hexdigest()


def watch(folder: Path, kill_after: tuple[str, int, float] | None) -> Life:
    """
    One life. It ends by itself, or is killed some seconds after it has told a word for the n-th time.

    :param kill_after: word, n, seconds
    """
    theirs, ours = os.pipe()[::-1]
    pid = os.fork()
    if pid == 0:
        try:
            live(folder, theirs)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(theirs)
    told, buffered, deadline, killed = [], b"", None, False
    while True:
        timeout = None if deadline is None or killed else max(deadline - time.monotonic(), 0)
        if not select.select([ours], [], [], timeout)[0]:
            os.kill(pid, signal.SIGKILL)
            killed = True
            continue
        if not (block := os.read(ours, 4096)):
            break
        *lines, buffered = (buffered + block).split(b"\n")
        told += [line.decode().split() for line in lines]
        if kill_after is not None and deadline is None:
            word, n, seconds = kill_after
            if sum(words[0] == word for words in told) >= n:
                deadline = time.monotonic() + seconds
    os.close(ours)
    status = os.waitpid(pid, 0)[1]
    if status != 0 and not killed:
        raise RuntimeError("a process failed by itself")
    of = {word: [words[-1] for words in told if words[0] == word] for word in ("began", "writing", "done", "end")}
    return Life(
        int(of["began"][0]) if of["began"] else None,
        [int(step) for step in of["done"]],
        len(of["writing"]) > len(of["done"]),
        of["end"][0] if of["end"] else None,
    )


def main(folder: Path, kills: int, seed: int) -> None:
    th.set_num_threads(1)
    mnm.FEWEST_ROWS = 60
    rng = random.Random(seed)
    start = time.monotonic()
    expected = watch(folder / "whole", None).digest
    each = (time.monotonic() - start) / (STEPS // EVERY)
    lives: list[Life] = []
    ends, newest, older, chain = [], 0, 0, 0
    while len(lives) < kills or newest > 0 or not ends:
        # Every other kill falls where a checkpoint is being written or just behind, every fourth at its beginning.
        word, n, seconds = [("began", 1, 2 * each), ("writing", rng.randint(1, 3), 0.1 * each)][len(lives) % 2]
        moment = (word, n, 0.0 if len(lives) % 4 == 1 else rng.uniform(0, seconds))
        life = watch(folder / f"run{chain}", moment if len(lives) < kills else None)
        if life.began is not None and life.began < newest:
            older += 1
        newest = max([newest, *life.completed])
        if life.digest is None:
            lives.append(life)
        else:
            ends.append(life.digest == expected)
            chain, newest = chain + 1, 0
    files = sorted(str(path.relative_to(folder)) for path in folder.glob("run*/*"))
    amid = sum(life.writing for life in lives)
    print(json.dumps({"kills": len(lives), "amid_writing": amid, "older": older, "ends_equal": ends, "files": files}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
