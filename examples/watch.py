"""Watch what is real and what a model imagines: ``python examples/watch.py model.zip --env Hopper-v5 --out watch.gif``.

Left the real MuJoCo episode, right the same start imagined: MuJoCo draws the imagined states, and simulates nothing.
Without a model one is trained for a short while. Needs MuJoCo's offscreen rendering (``MUJOCO_GL=egl`` or ``osmesa``).
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sb3_mismatch import MnM

#: observation, root position (skipped by the observation) -> qpos, qvel
Pose = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Shown(NamedTuple):
    """One side's step: the picture, and what its caption says."""

    frame: np.ndarray
    reward: float
    disagreement: float | None
    over: bool


def pose_of(env: Any) -> tuple[Pose, int]:
    """
    How a MuJoCo environment's observations tell its pose, and how many root positions they skip.

    Raises ValueError where they do not tell it.
    """
    structure = getattr(env, "observation_structure", None)
    if type(env).__name__ == "InvertedDoublePendulumEnv":
        return pose_of_double_pendulum, 0
    if not structure or "qpos" not in structure or "qvel" not in structure:
        raise ValueError(
            f"--env {env.spec.id}: its observations do not tell its pose; choose one whose observations hold qpos and "
            "qvel, such as Hopper-v5, Walker2d-v5, HalfCheetah-v5, Ant-v5 or InvertedPendulum-v5"
        )
    n_qpos, n_qvel = structure["qpos"], structure["qvel"]

    def pose(observation: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        qpos = np.concatenate([root, observation[:n_qpos]])
        return qpos, observation[n_qpos : n_qpos + n_qvel]

    return pose, structure.get("skipped_qpos", 0)


def pose_of_double_pendulum(observation: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its observation is [x, sin θ1, sin θ2, cos θ1, cos θ2, x', θ1', θ2', force]."""
    angles = np.arctan2(observation[1:3], observation[3:5])
    return np.concatenate([observation[:1], angles]), observation[5:8]


def real_episode(model: MnM, env: Any, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray, list[Shown]]:
    """First observation, first root position, and the frames of the model's real episode."""
    first, _ = env.reset(seed=seed)
    root = env.unwrapped.data.qpos[: pose_of(env.unwrapped)[1]].copy()
    shown = [Shown(env.render(), 0.0, None, False)]
    observation, over = first, False
    while not over and len(shown) <= steps:
        action, _ = model.predict(observation, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        shown.append(Shown(env.render(), float(reward), None, over))
    return first, root, shown


def imagined_episode(model: MnM, env: Any, first: np.ndarray, root: np.ndarray, steps: int) -> list[Shown]:
    """The frames of the same start imagined: ``env`` is set to each state and drawn, and never steps."""
    imagined = model.imagine(first, steps, deterministic=True)
    pose, n_skipped = pose_of(env.unwrapped)
    env.reset()
    shown = []
    for step, observation in enumerate(imagined.observations[: 1 + int(imagined.alive.sum())]):
        qpos, qvel = pose(observation[0].astype(np.float64), root)
        env.unwrapped.set_state(qpos, qvel)
        # The observation does not tell where the root is: it goes on with the imagined velocity.
        root = root + env.unwrapped.dt * qvel[:n_skipped]
        last = max(step - 1, 0)
        reward = float(imagined.rewards[last, 0]) if step else 0.0
        over = step > 0 and bool(imagined.terminated[last, 0])
        shown.append(Shown(env.render(), reward, float(imagined.disagreement[last, 0]), over))
    return shown


def side_by_side(real: Sequence[Shown], imagined: Sequence[Shown]) -> list[np.ndarray]:
    """Frames with captions; the side that is over first stands still."""
    frames = []
    for step in range(max(len(real), len(imagined))):
        sides = []
        for title, side in (("real", real), ("imagined", imagined)):
            at = min(step, len(side) - 1)
            total = sum(shown.reward for shown in side[: at + 1])
            sides.append(captioned(side[at], title, at, total))
        frames.append(np.concatenate(sides, axis=1))
    return frames


def captioned(shown: Shown, title: str, step: int, total: float) -> np.ndarray:
    """A frame over its caption: step, reward, return, and the members' disagreement where there is one."""
    size = shown.frame.shape[1]
    font = ImageFont.load_default(max(size // 20, 8))
    line = int(1.4 * font.size)
    lines = [f"{title}, step {step}{', over' if shown.over else ''}", f"reward {shown.reward:.2f}, return {total:.1f}"]
    lines.append("" if shown.disagreement is None else f"disagreement {shown.disagreement:.3f}")
    height = shown.frame.shape[0] + len(lines) * line + line // 2
    picture = Image.new("RGB", (size, height + height % 2), "white")
    picture.paste(Image.fromarray(shown.frame), (0, 0))
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(lines):
        draw.text((line // 2, shown.frame.shape[0] + number * line + line // 4), text, fill="black", font=font)
    return np.asarray(picture)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="zip of an MnM; without it one is trained")
    parser.add_argument("--env", default="Hopper-v5", help="Gymnasium id of a MuJoCo environment")
    parser.add_argument("--out", type=Path, default=Path("watch.gif"), help="a .gif or an .mp4")
    parser.add_argument("--still", type=Path, help="a .png of one frame, beside it")
    parser.add_argument("--still-step", type=int, help="which step it shows; the middle one unless told")
    parser.add_argument("--steps", type=int, default=150, help="of the episodes, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the environment, and of the training")
    parser.add_argument("--size", type=int, default=320, help="width and height of each side, in pixels, even")
    parser.add_argument("--speed", type=float, default=0.5, help="1 is that of the real world")
    parser.add_argument("--train-steps", type=int, default=5_000, help="environment steps where no model is given")
    args = parser.parse_args(arguments)

    env = gym.make(args.env, render_mode="rgb_array", width=args.size, height=args.size)
    try:
        pose_of(env.unwrapped)
    except ValueError as error:
        env.close()
        parser.error(str(error))
    if args.model:
        model = MnM.load(args.model, device="cpu")
    else:
        print(f"No model given: training one for {args.train_steps:,} steps of {args.env}")
        model = MnM("MlpPolicy", gym.make(args.env), seed=args.seed, device="cpu").learn(args.train_steps)

    first, root, real = real_episode(model, env, args.seed, args.steps)
    imagined = imagined_episode(model, env, first, root, args.steps)
    rate = args.speed / env.unwrapped.dt
    env.close()
    frames = side_by_side(real, imagined)
    # A GIF counts hundredths of a second, and few viewers show more than 50 frames in one.
    stride = math.ceil(rate / (25 if args.out.suffix == ".gif" else 60))
    write(args.out, frames[::stride], rate / stride)
    if args.still:
        iio.imwrite(args.still, frames[len(frames) // 2 if args.still_step is None else args.still_step])
    print(f"real: {len(real) - 1} steps, imagined: {len(imagined) - 1} steps; {args.out.resolve()}")


def write(path: Path, frames: Sequence[np.ndarray], rate: float) -> None:
    """A GIF that repeats, or a video; ``rate`` in frames a second."""
    if path.suffix == ".gif":
        iio.imwrite(path, frames, duration=1000 / rate, loop=0)
    else:
        iio.imwrite(path, frames, fps=rate, macro_block_size=2)


if __name__ == "__main__":
    main()
