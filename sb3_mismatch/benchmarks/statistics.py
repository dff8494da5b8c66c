"""Interquartile means over seeds and their bootstrap intervals, by rliable (Agarwal et al., NeurIPS 2021)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rliable import library, metrics
from scipy.stats import trim_mean

Array = NDArray[np.float64]
REPETITIONS = 1_000


class Interval(NamedTuple):
    """
    :param point: interquartile means, (points,)
    :param low: lower ends of their 95 % intervals, (points,)
    :param high: upper ends
    """

    point: Array
    low: Array
    high: Array

    def part(self, index: int | slice) -> "Interval":
        """Some of the points; one of them as numbers."""
        return Interval(self.point[index], self.low[index], self.high[index])


def over_seeds(scores: Array) -> Interval:
    """For scores of one environment, (seeds, points): each point's interquartile mean over the seeds.

    The mean without the lowest and the highest quarter of the seeds, rounded down.
    """
    return _interval(scores[:, None, :], lambda drawn: trim_mean(drawn, 0.25, axis=0)[0])


def over_seeds_and_environments(scores: Array) -> Interval:
    """For normalised scores, (seeds, environments): their interquartile mean, a number.

    Each draw of the bootstrap takes other seeds in every environment.
    """
    return _interval(scores, lambda drawn: np.array([metrics.aggregate_iqm(drawn)])).part(0)


def _interval(scores: Array, statistic: Callable[[Array], Array]) -> Interval:
    # rliable 1.2 draws from NumPy's global generator, whatever random_state it is given.
    state = np.random.get_state()
    np.random.seed(0)
    try:
        points, intervals = library.get_interval_estimates({"": scores}, statistic, reps=REPETITIONS)
    finally:
        np.random.set_state(state)
    return Interval(np.asarray(points[""]), *np.asarray(intervals[""]))
