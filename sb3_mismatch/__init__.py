"""MnM, VMBPO and MBPO: model-based reinforcement learning in the place of Stable-Baselines3's SAC."""

from sb3_mismatch.mnm import MBPO, VMBPO, MnM
from sb3_mismatch.objectives import OBJECTIVES, Objective

__all__ = ["MBPO", "OBJECTIVES", "VMBPO", "MnM", "Objective"]
