"""How the pictures look: colours that the colour-blind tell apart (Okabe and Ito), widths that fit a page."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

REAL, IMAGINED, BASELINE, MARK = "#000000", "#0072B2", "#D55E00", "#999999"
#: of the lines of a legend, one after the other
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

WIDTH = 8.0  # inches, as wide as a page of the documentation at 100 dots an inch


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of its own, which pyplot knows nothing of; sizes in inches."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def panels(n: int) -> tuple[Figure, list[Axes]]:
    """
    A figure of ``n`` small panels over one x axis, at most four beside each other.

    Its margins are set by hand: Matplotlib's layout engine takes half a second to find them for a dozen panels.
    """
    columns = min(4, n)
    rows = -(-n // columns)
    width, height = max(2.0 * columns, 5.0), 1.1 + 1.45 * rows
    figure = Figure(figsize=(width, height), dpi=100)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    margins = {"left": 0.75 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.6 / height}
    figure.subplots_adjust(**margins, wspace=0.42, hspace=0.4)
    for axes in grid.flat:
        axes.tick_params(labelsize="small")
        axes.locator_params(nbins=4)
        axes.grid(alpha=0.25)
    for axes in grid.flat[n:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:n])


def finish(axes: Axes, xlabel: str, ylabel: str, title: str = "") -> None:
    """Labels and a faint grid."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
