"""Learning curves."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

if TYPE_CHECKING:  # rliable is for reports alone.
    from sb3_mismatch.benchmarks.statistics import Interval

Curves = Mapping[str, Sequence[NDArray[np.float64]]]
Bands = Mapping[str, tuple[NDArray[np.float64], "Interval"]]


def draw_curves(axes: Axes, curves: Curves, colors: Mapping[str, str] | None = None) -> None:
    """Draw the mean over seeds as a line and every seed as a thin one.

    :param curves: for each label one array (points, 2 or more) per seed: environment steps, returns, at common steps
    :param colors: for each label its colour; by default C0, C1, ...
    """
    for index, (label, seeds) in enumerate(curves.items()):
        color = colors[label] if colors else f"C{index}"
        steps, returns = seeds[0][:, 0], np.stack([seed[:, 1] for seed in seeds])  # returns: (seeds, points)
        if len(seeds) > 1:
            axes.plot(steps, returns.T, color=color, linewidth=0.8, alpha=0.4)
        axes.plot(steps, returns.mean(0), color=color, linewidth=2.5, label=label)
    _name_axes(axes)


def draw_bands(axes: Axes, bands: Bands, colors: Mapping[str, str]) -> None:
    """Draw the interquartile mean over seeds as a line, in the band of its 95 % interval.

    :param bands: for each label environment steps and returns
    :param colors: for each label its colour
    """
    for label, (steps, returns) in bands.items():
        axes.fill_between(steps, returns.low, returns.high, color=colors[label], alpha=0.2, linewidth=0)
        axes.plot(steps, returns.point, color=colors[label], linewidth=1.8, label=label)
    _name_axes(axes)


def plot_bands(panels: Mapping[str, Bands]) -> Figure:
    """One panel per environment, at most three beside each other; each label has one colour in all of them."""
    labels = sorted({label for bands in panels.values() for label in bands})
    colors = {label: f"C{index % 10}" for index, label in enumerate(labels)}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, bands) in zip(grid, panels.items(), strict=False):
        draw_bands(axes, bands, colors)
        axes.set_title(title)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend([lines[label] for label in labels], labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _name_axes(axes: Axes) -> None:
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return")
    axes.grid(alpha=0.3)
