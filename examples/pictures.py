"""Remake the pictures of the documentation: ``python examples/pictures.py --out docs/images --runs runs``.

Trains two agents on Hopper-v5 into RUNS, which takes a quarter of an hour each on one core, unless they are there
already, and draws the world of the first and the logs of both.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
from PIL import Image
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor

from sb3_mismatch import MnM, plots

ENV = "Hopper-v5"
#: constructor arguments of the runs by their name; the defaults where there are none
RUNS: dict[str, dict[str, Any]] = {
    "defaults": {"seed": 0},
    "mnm": {"seed": 0, "objective": "mnm", "reward_shift": "auto", "horizon": [1_000, 5_000, 1, 10]},
}
#: of the benchmarks, with several seeds
RESULTS = Path(__file__).parent.parent / "docs" / "results" / "gym-20k" / "InvertedDoublePendulum-v5"


def train(folder: Path, env_id: str, steps: int, **settings: Any) -> None:
    """Train an agent, and keep it, its replay buffer and its logs."""
    folder.mkdir(parents=True, exist_ok=True)
    env = Monitor(gym.make(env_id), str(folder / "monitor.csv"))
    model = MnM("MlpPolicy", env, device="cpu", **settings)
    model.set_logger(configure(str(folder), ["csv", "tensorboard"]))
    every = max(steps // 12, 1)
    evaluations = EvalCallback(Monitor(gym.make(env_id)), eval_freq=every, log_path=str(folder), verbose=0)
    model.learn(steps, callback=evaluations)
    model.save(folder / "model.zip")
    model.save_replay_buffer(folder / "replay_buffer.pkl")
    env.close()
    model.logger.close()


def draw(runs: Path, out: Path) -> None:
    """Write every picture into ``out``."""
    model = MnM.load(runs / "defaults" / "model.zip", device="cpu")
    model.load_replay_buffer(runs / "defaults" / "replay_buffer.pkl")
    seeds = {label: sorted((RESULTS / folder).glob("seed*.csv")) for label, folder in (("MnM", "mnm"), ("SAC", "sac"))}
    figures = {
        "trajectories": plots.trajectories(model),
        "log_ratio": plots.log_ratio(model),
        "calibration": plots.calibration(model),
        "horizon_error": plots.horizon_error(model),
        "schedules": plots.schedules(runs / "mnm"),
        "bound": plots.bound(runs / "mnm"),
        "learning_curves": plots.learning_curves(seeds),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file)
        # A hundred colours are enough, and make for small files.
        Image.open(file).convert("RGB").quantize(100).save(out / f"{name}.png", optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="what was trained, or will be")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    parser.add_argument("--env", default=ENV)
    parser.add_argument("--steps", type=int, default=6_000, help="environment steps of each run")
    args = parser.parse_args(arguments)
    for name, settings in RUNS.items():
        if not (args.runs / name / "model.zip").exists():
            print(f"Training {name}")
            train(args.runs / name, args.env, args.steps, **settings)
    draw(args.runs, args.out)
    print(f"pictures: {args.out.resolve()}")


if __name__ == "__main__":
    main()
