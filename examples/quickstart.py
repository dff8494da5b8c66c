"""Train MnM on a MuJoCo environment, see how it learns, and keep the policy: ``python examples/quickstart.py``."""

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_mismatch import MnM
from sb3_mismatch.benchmarks.curves import draw_curves
from sb3_mismatch.benchmarks.evaluation import EvaluationCallback

ENV = "InvertedPendulum-v5"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=2_000, help="environment steps of training")
steps = parser.parse_args().steps

# Train. The constructor and `learn` are those of Stable-Baselines3's SAC.
env = Monitor(gym.make(ENV))
model = MnM("MlpPolicy", env, seed=0)
evaluations = EvaluationCallback(ENV, every=250)
model.learn(total_timesteps=steps, callback=evaluations, progress_bar=True)

# Keep the policy, and evaluate the kept one in the real environment.
folder = Path("quickstart")
folder.mkdir(exist_ok=True)
model.save(folder / "mnm.zip")
kept = MnM.load(folder / "mnm.zip")
mean, std = evaluate_policy(kept, Monitor(gym.make(ENV)), n_eval_episodes=10)

# Draw the return of every training episode, and the evaluations on the way.
figure = Figure(layout="constrained")
axes = figure.subplots()
axes.plot(np.cumsum(env.get_episode_lengths()), env.get_episode_rewards(), ".", color="C7", label="training episodes")
draw_curves(axes, {"mean of 10 evaluation episodes": [np.array([(row.steps, row.mean) for row in evaluations.rows])]})
axes.set_title(f"MnM on {ENV}")
axes.legend()
figure.savefig(folder / "learning_curve.png", dpi=120)

print(f"mean return over 10 episodes: {mean:.0f} ± {std:.0f}, of 1,000 at most")
print(f"policy: {folder.resolve() / 'mnm.zip'}\nlearning curve: {folder.resolve() / 'learning_curve.png'}")
