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


def finish(axes: Axes, xlabel: str, ylabel: str, title: str = "") -> None:
    """Labels and a faint grid."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
