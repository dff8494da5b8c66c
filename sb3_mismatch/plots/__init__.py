"""
Pictures of a learned world and of its training: each function returns a Matplotlib figure, which no screen need show.

Of a trained model, with its real replay buffer: :func:`trajectories`, :func:`log_ratio`, :func:`calibration`,
:func:`horizon_error`. Of its logs: :func:`schedules`, :func:`bound`, :func:`learning_curves`.
"""

from sb3_mismatch.plots.training import bound, learning_curves, schedules
from sb3_mismatch.plots.world import calibration, horizon_error, log_ratio, trajectories

__all__ = ["bound", "calibration", "horizon_error", "learning_curves", "log_ratio", "schedules", "trajectories"]
