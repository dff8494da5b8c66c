"""Learning curves."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Curves = Mapping[str, Sequence[NDArray[np.float64]]]


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
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return")
    axes.grid(alpha=0.3)


def plot_curves(panels: Mapping[str, Curves]) -> Figure:
    """One panel per environment, at most three beside each other; each label has one colour in all of them."""
    labels = sorted({label for curves in panels.values() for label in curves})
    colors = {label: f"C{index % 10}" for index, label in enumerate(labels)}
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        draw_curves(axes, curves, colors)
        axes.set_title(title)
        axes.legend()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return figure
