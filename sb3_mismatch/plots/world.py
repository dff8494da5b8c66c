"""Pictures of a learned world, held against the real transitions in the model's replay buffer."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sb3_mismatch.plots.numbers import (
    Array,
    Calibration,
    Fan,
    HorizonErrors,
    LogRatios,
    calibration_of,
    fan_of,
    horizon_errors_of,
    log_ratios_of,
)
from sb3_mismatch.plots.real import real_data
from sb3_mismatch.plots.style import BASELINE, IMAGINED, MARK, REAL, finish, new_figure, panels
from sb3_mismatch.settings import check_count

if TYPE_CHECKING:
    from sb3_mismatch.mnm import ModelBased

#: panels of a figure at most
MOST_PANELS = 12


def trajectories(model: "ModelBased", horizon: int = 50, start: int = -1, first: int = 0) -> Figure:
    """
    Real against imagined, one panel for each state dimension: from one start, under the actions that were played.

    Most of the real steps were trained on: of five, one is held out.

    :param model: trained, with its real replay buffer
    :param horizon: steps, or as many as the longest real stretch without an end has
    :param start: which of the real stretches of that length, in the order they were played
    :param first: the first of at most 12 dimensions that are shown
    :raises TypeError: for a model without a learned world
    :raises ValueError: when no world has been fitted, or the replay buffer is empty
    :raises IndexError: when there is no such stretch or dimension
    """
    check_count("horizon", horizon)
    data = real_data(model, "plots.trajectories()")
    if not 0 <= first < model.world.observations.dim:
        raise IndexError(f"first={first}: the dimensions go from 0 to {model.world.observations.dim - 1}")
    return draw_fan(fan_of(model, data, horizon, start), first)


def log_ratio(model: "ModelBased", horizon: int = 50, starts: int = 200) -> Figure:
    """
    Where the classifier believes the dynamics: its log p/q of real and imagined next states, on held-out transitions
    and along trajectories of the same starts and actions.

    :param model: trained under an objective with a classifier, with its real replay buffer
    :param horizon: steps, or as many as the longest real stretch without an end has
    :param starts: real stretches at most
    :raises TypeError: for a model without a learned world
    :raises ValueError: when no world has been fitted, the replay buffer is empty, or there is no classifier
    """
    check_count("horizon", horizon)
    check_count("starts", starts)
    data = real_data(model, "plots.log_ratio()")
    return draw_log_ratios(log_ratios_of(model, data, horizon, starts))


def calibration(model: "ModelBased") -> Figure:
    """
    Whether the predicted variances are true: the share of held-out targets within the intervals that the dynamics
    predict, against the share that should lie there.

    :param model: trained, with its real replay buffer
    :raises TypeError: for a model without a learned world
    :raises ValueError: when no world has been fitted, or the replay buffer is empty
    """
    return draw_calibration(calibration_of(model, real_data(model, "plots.calibration()")))


def horizon_error(model: "ModelBased", horizon: int = 50, starts: int = 200) -> Figure:
    """
    How the error of imagined states grows with the step, beside the guess that nothing changes.

    Most of the real steps were trained on: of five, one is held out.

    :param model: trained, with its real replay buffer
    :param horizon: steps, or as many as the longest real stretch without an end has
    :param starts: real stretches at most, spread over the replay buffer
    :raises TypeError: for a model without a learned world
    :raises ValueError: when no world has been fitted, or the replay buffer is empty
    """
    check_count("horizon", horizon)
    check_count("starts", starts)
    data = real_data(model, "plots.horizon_error()")
    return draw_horizon_errors(horizon_errors_of(model, data, horizon, starts))


def draw_fan(fan: Fan, first: int = 0) -> Figure:
    """Up to 12 dimensions from ``first`` on, at most four beside each other."""
    shown = list(range(first, min(first + MOST_PANELS, len(fan.names))))
    figure, grid = panels(len(shown))
    steps = np.arange(len(fan.real))
    # Behind an imagined end nothing is imagined.
    lived, ends = steps[: fan.alive + 1], fan.alive < len(steps) - 1
    for axes, d in zip(grid, shown, strict=True):
        axes.plot(lived, fan.members[:, : len(lived), d].T, color=IMAGINED, linewidth=0.8, alpha=0.45)
        axes.plot(lived, fan.imagined[: len(lived), d], color=BASELINE, linewidth=1.2, linestyle="--")
        axes.plot(steps, fan.real[:, d], color=REAL, linewidth=1.6)
        if ends:
            axes.axvline(fan.alive, color=MARK, linestyle=":")
        axes.set_title(fan.names[d], fontsize="small", pad=3)
    labels = ["each member's mean", "imagined, drawn", "real", "imagined episode ends"][: 3 + ends]
    figure.legend(grid[0].lines[-len(labels) :], labels, loc="upper center", ncols=4, fontsize="small", frameon=False)
    of_all = "" if len(shown) == len(fan.names) else f" ({len(shown)} of {len(fan.names)} dimensions are shown)"
    figure.supxlabel(f"step{of_all}", fontsize="medium", y=0.01)
    figure.supylabel("state, environment's units", fontsize="medium", x=0.005)
    return figure


def draw_log_ratios(ratios: LogRatios) -> Figure:
    """The histogram on the left, bands along trajectories on the right."""
    figure = new_figure(3.4)
    left, right = figure.subplots(1, 2)
    lowest, highest = np.quantile([ratios.real, ratios.imagined], [0.002, 0.998])
    bins = np.linspace(lowest - 0.1, highest + 0.1, 41)
    for values, color, label in ((ratios.real, REAL, "real"), (ratios.imagined, IMAGINED, "imagined")):
        share = np.full(len(values), 1 / len(values))
        edges, inside = bins.tolist(), values.clip(bins[0], bins[-1])
        left.hist(inside, bins=edges, weights=share, color=color, alpha=0.25)
        left.hist(inside, bins=edges, weights=share, color=color, histtype="step", linewidth=1.5, label=label)
        left.axvline(values.mean(), color=color, linestyle="--", linewidth=1.2)
    title = f"{len(ratios.real):,} held-out transitions; dashed: means"
    finish(left, "log p/q of the classifier, nats", "share", title)
    left.legend(fontsize="small")
    steps = np.arange(1, len(ratios.along_real) + 1)
    draw_band(right, steps, ratios.along_real, REAL, "real")
    draw_band(right, steps, ratios.along_imagined, IMAGINED, "imagined")
    finish(right, "step", "log p/q of the classifier, nats", "along trajectories: median, 50 % and 90 %")
    right.legend(fontsize="small")
    return figure


def draw_calibration(numbers: Calibration) -> Figure:
    """One thin line for each target, and their mean."""
    figure = new_figure(4.4, width=5.6)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MARK, linestyle=":", label="calibrated")
    lines = axes.plot(numbers.levels, numbers.observed[:, :-1], color=IMAGINED, linewidth=0.8, alpha=0.4)
    lines[0].set_label("each state dimension")
    axes.plot(numbers.levels, numbers.observed[:, -1], color=BASELINE, linestyle="--", linewidth=1.4, label="reward")
    axes.plot(numbers.levels, numbers.observed.mean(axis=1), color=REAL, linewidth=2.2, label="mean of all")
    finish(axes, "share that the interval should hold", "share of targets in it", f"{numbers.n:,} held-out transitions")
    axes.text(0.03, 0.93, "variances too large", fontsize="small", color="#555555")
    axes.text(0.97, 0.34, "variances too small", fontsize="small", color="#555555", ha="right")
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.legend(loc="lower right", fontsize="small")
    return figure


def draw_horizon_errors(numbers: HorizonErrors) -> Figure:
    """Bands of the errors, and the share of imagined episodes still alive."""
    figure = new_figure(3.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps = np.arange(len(numbers.alive))
    draw_band(upper, steps, numbers.unchanged, BASELINE, "nothing changes", linestyle="--")
    draw_band(upper, steps, numbers.imagined, IMAGINED, "imagined")
    title = f"median, 50 % and 90 % of {numbers.n:,} real starts, under the actions that were played"
    finish(upper, "", "error of the state, standard\ndeviations (root mean square)", title)
    upper.set_ylim(bottom=0)
    upper.legend(loc="upper left", fontsize="small")
    lower.plot(steps, numbers.alive, color=IMAGINED)
    finish(lower, "step", "share\nalive")
    lower.set_ylim(-0.05, 1.05)
    return figure


def draw_band(axes: Axes, x: NDArray[np.int64], quantiles: Array, color: str, label: str, linestyle: str = "-") -> None:
    """The median as a line within two bands: quantiles of shape (points, 5)."""
    lowest, low, median, high, highest = quantiles.T
    axes.fill_between(x, lowest, highest, color=color, alpha=0.12, linewidth=0)
    axes.fill_between(x, low, high, color=color, alpha=0.22, linewidth=0)
    axes.plot(x, median, color=color, linewidth=1.8, linestyle=linestyle, label=label)
