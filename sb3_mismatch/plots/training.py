"""Pictures of a training run, from its logs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from sb3_mismatch.plots.logs import on_common_steps, read_returns, read_scalars
from sb3_mismatch.plots.numbers import mean_and_interval
from sb3_mismatch.plots.style import BASELINE, CYCLE, IMAGINED, finish, new_figure
from sb3_mismatch.settings import check_count

REAL_RATIO, HORIZON = "imagination/real_ratio", "imagination/horizon"
LOWER_BOUND, LOG_RETURN = "objective/lower_bound", "objective/log_return"


def schedules(log: str | Path) -> Figure:
    """
    What minibatches were made of over training: the share of real rows, and the horizon of the imagined ones.

    :param log: a ``progress.csv``, a TensorBoard event file, or a folder that holds one
    :raises FileNotFoundError: when there is no log
    :raises ValueError: when no world was fitted in it
    """
    values = read_scalars(log, (REAL_RATIO, HORIZON))
    figure = new_figure(3.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(*values[REAL_RATIO].T, color=IMAGINED, drawstyle="steps-post")
    upper.set_ylim(0, 1)
    finish(upper, "", "share of real rows\nin a minibatch")
    lower.plot(*values[HORIZON].T, color=IMAGINED, drawstyle="steps-post")
    lower.locator_params(axis="y", integer=True)
    lower.set_ylim(bottom=0)
    finish(lower, "environment steps", "horizon,\nimagined steps")
    return figure


def bound(log: str | Path) -> Figure:
    """
    The lower bound on the log of the return, by imagination, beside the log of the real return; only under an
    objective that takes the logarithm is there a bound.

    :param log: a ``progress.csv``, a TensorBoard event file, or a folder that holds one
    :raises FileNotFoundError: when there is no log
    :raises ValueError: when there is no bound in it
    """
    try:
        values = read_scalars(log, (LOWER_BOUND, LOG_RETURN))
    except ValueError as error:
        raise ValueError(
            f"{error}; only objectives that take the logarithm of the reward, such as objective='mnm', tell it"
        ) from None
    figure = new_figure(3.4)
    axes = figure.subplots()
    axes.plot(*values[LOG_RETURN].T, color=BASELINE, linestyle="--", label="log of the real discounted return")
    axes.plot(*values[LOWER_BOUND].T, color=IMAGINED, label="lower bound, estimated by imagination")
    finish(axes, "environment steps", "nats")
    figure.legend(loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    return figure


def learning_curves(
    runs: Mapping[str, str | Path | Sequence[str | Path]], level: float = 0.95, window: int = 10, seeds: bool = True
) -> Figure:
    """
    Return against environment steps: mean over seeds within Student's interval for it.

    :param runs: for each label a file or folder, or one per seed: ``evaluations.npz`` of EvalCallback,
        ``monitor.csv``, or a CSV of this package's benchmarks
    :param level: confidence of the interval, between 0 and 1; a single seed has none
    :param window: episodes of a ``monitor.csv`` that are averaged
    :param seeds: whether every seed is drawn too, thin
    :raises FileNotFoundError: when there is no such file
    :raises ValueError: when there is no run, or it holds nothing to draw
    """
    check_count("window", window)
    if not runs or not all(runs.values()):
        raise ValueError(f"runs={runs!r} names no run for some label: pass at least one file for each")
    if not 0 < level < 1:
        raise ValueError(f"level={level!r} must lie between 0 and 1: 0.95 is usual")
    figure = new_figure(3.8)
    axes = figure.subplots()
    for index, (label, files) in enumerate(runs.items()):
        color = CYCLE[index % len(CYCLE)]
        each = [files] if isinstance(files, str | Path) else files
        steps, values = on_common_steps([read_returns(file, window) for file in each])
        mean, half = mean_and_interval(values, level)
        if len(values) > 1:
            axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
            if seeds:
                axes.plot(steps, values.T, color=color, linewidth=0.7, alpha=0.45)
        plural = "s" if len(values) > 1 else ""
        axes.plot(steps, mean, color=color, linewidth=2.2, label=f"{label}, {len(values)} seed{plural}")
    finish(axes, "environment steps", "return of an episode", f"mean over seeds, and its {level:.0%} interval")
    axes.legend(fontsize="small")
    return figure
