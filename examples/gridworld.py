"""The finite MDPs of the paper: its Figures 2 and 3, and what they do not show, as PNGs and CSVs.

    python examples/gridworld.py --out docs/results/tabular

Eysenbach, Khazatsky, Levine, Salakhutdinov, "Mismatched No More: Joint Model-Policy Optimization for Model-Based RL",
NeurIPS 2022. docs/tabular.md explains each figure.
"""

import argparse
import csv
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import brentq
from tqdm import tqdm

from sb3_mismatch import tabular as tb
from sb3_mismatch.tabular.planning import bound_reward, one

mpl.use("Agg")
mpl.rcParams.update({"figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

T = TypeVar("T")


class Settings(NamedTuple):
    """How much of it to do; the defaults are the paper's, with 20 seeds for its 5."""

    out: Path
    seeds: int = 20
    iterations: int = 1501
    long_iterations: int = 3001


def last(states: Iterable[T]) -> T:
    *_, state = states
    return state


def write(out: Path, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{x:.7g}" if isinstance(x, float) else x for x in row] for row in rows)


def save(out: Path, name: str) -> None:
    plt.tight_layout()
    plt.savefig(out / f"{name}.png", metadata={"Software": None})
    plt.close()


def returns(mdp: tb.FiniteMDP, Q: np.ndarray) -> list[float]:
    """The real return of the greedy policy of each Q. Q has shape (seeds, S, A)."""
    return [math.exp(tb.log_return(mdp, policy)) for policy in tb.greedy(Q)]


# ---------------------------------------------------------------------------------------------------------------------
# Figure 2a (left): learning, and the controls it lacks


class Learner(NamedTuple):
    label: str
    method: str
    initial: float = 0.0


LEARNERS = {
    "q": Learner("Q-learning", "q-learning"),
    "vmbpo": Learner("VMBPO", "vmbpo"),
    "mnm": Learner("MnM", "mnm"),
    # Raw rewards make 1e-3 / (1-γ) = 0.01 the value of never reaching the goal; log rewards make it log 1e-3 = -6.9.
    "q-above": Learner("Q-learning, Q0 = 0.1", "q-learning", 0.1),
    "vmbpo-above": Learner("VMBPO, Q0 = 0.1", "vmbpo", 0.1),
    "log": Learner("log reward, no model", "log-reward"),
    "mnm-below": Learner("MnM, Q0 = -8", "mnm", -8.0),
}


def figure_2a_left(do: Settings) -> None:
    mdp = tb.figure_2a_left()
    best = last(tb.until(tb.value_iteration(mdp))).Q[0].max()
    curves = {}
    for key, learner in LEARNERS.items():
        states = tb.learn(mdp, learner.method, seeds=range(do.seeds), initial=learner.initial)
        states = tqdm(itertools.islice(states, do.iterations), learner.label, do.iterations, leave=False)
        curves[key] = np.array([returns(mdp, Q) for Q in itertools.islice(states, 0, None, 20)])  # (evaluations, seeds)
    iterations = 20 * np.arange(len(curves["mnm"]))
    rows = [
        (key, int(i), *values) for key in curves for i, values in zip(iterations, curves[key].tolist(), strict=True)
    ]
    write(do.out, "fig_2a_left", ["method", "iteration", *(f"seed_{i}" for i in range(do.seeds))], rows)

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(1, 1.25))
    for key in ("q", "mnm", "vmbpo"):
        (line,) = left.plot(iterations, curves[key].mean(axis=1), lw=2, label=LEARNERS[key].label)
        left.plot(iterations, curves[key], lw=0.5, alpha=0.35, color=line.get_color())
    left.set(xlabel="iterations", ylabel="return of the greedy policy", title=f"As in the paper, {do.seeds} seeds")
    left.axhline(best, color="k", lw=0.8, ls=":", label="optimum")
    left.legend(loc="upper left", fontsize=8, framealpha=0.9)
    jitter = np.random.default_rng(0).uniform(-0.25, 0.25, do.seeds)
    for row, key in enumerate(reversed(LEARNERS)):
        right.plot(
            curves[key][-1], row + jitter, "o", ms=3.5, alpha=0.6, color="C7" if "-" in key or key == "log" else "C0"
        )
        right.plot(curves[key][-1].mean(), row, "k|", ms=16)
    right.set_yticks(range(len(LEARNERS)), [learner.label for learner in reversed(LEARNERS.values())])
    right.axvline(best, color="k", lw=0.8, ls=":")
    right.set(xlabel="return after the last iteration, one dot per seed", title="Controls in grey")
    save(do.out, "fig_2a_left")


def figure_2a_divergence(do: Settings) -> None:
    mdp, seeds, rows = tb.figure_2a_left(), range(min(do.seeds, 5)), []
    _, axes = plt.subplots(figsize=(4.8, 3))
    for label, largest_step, color in (("as in the paper", math.inf, "C3"), ("step capped at 1", 1.0, "C0")):
        states = tb.learn(mdp, "mnm", seeds=seeds, largest_step=largest_step)
        states = tqdm(itertools.islice(states, do.long_iterations), label, do.long_iterations, leave=False)
        with np.errstate(all="ignore"):  # a diverging Q leaves the floats, then the figure
            largest = np.array([abs(Q).max(axis=(1, 2)) for Q in itertools.islice(states, 0, None, 20)])
        largest[~(largest < 1e30)] = math.nan
        iterations = 20 * np.arange(len(largest))
        rows += [(label, int(i), *values) for i, values in zip(iterations, largest.tolist(), strict=True)]
        axes.semilogy(iterations, largest, color=color, lw=1, label=[label, *"_" * (len(seeds) - 1)])
    write(do.out, "fig_2a_divergence", ["step", "iteration", *(f"seed_{i}" for i in seeds)], rows)
    axes.axvline(1500, color="k", lw=0.8, ls=":")
    axes.legend()
    axes.set(xlabel="iterations", ylabel="max |Q|, each seed", title="MnM past the end of Figure 2a", ylim=(1e-2, 1e30))
    save(do.out, "fig_2a_divergence")


# ---------------------------------------------------------------------------------------------------------------------
# Figure 2a (right) and 2b: the optimistic and the inaccurate model


def show_grid(axes: plt.Axes, walls: np.ndarray, goal: tuple[int, int]) -> None:
    height, width = walls.shape
    axes.imshow(np.where(walls, 0.45, 1.0), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.plot(goal[1] + 0.5, goal[0] + 0.5, "*", color="C2", ms=14)
    axes.set_xticks(range(width + 1), [])
    axes.set_yticks(range(height + 1), [])
    axes.grid(lw=0.3)
    axes.tick_params(length=0)


def figure_2a_right(do: Settings) -> None:
    mdp = tb.figure_2a_right()
    size, rows = 10, []
    _, panels = plt.subplots(1, 3, figsize=(9, 3.3))
    plans = {
        "real dynamics p": mdp.p,
        "the paper's q: c = 1, exp(V)": last(tb.until(tb.plan(mdp, notebook=True), 1e-6)).q,
        "matched q: c = 1, exp(γV)": last(tb.until(tb.plan(mdp))).q,
    }
    for axes, (title, q) in zip(panels, plans.items(), strict=True):
        show_grid(axes, tb.WALLS_2A, (0, 9))
        axes.set_title(title, fontsize=9)
        chances = q.toarray().reshape(size, size, 4, size, size)
        for i, j, a in np.ndindex(size, size, 4):
            i2, j2 = np.clip(np.add((i, j), tb.MOVES[a]), 0, size - 1)
            if tb.WALLS_2A[i, j] or tb.WALLS_2A[i2, j2] or (i, j) == (i2, j2):
                continue
            chance = float(chances[i, j, a, i2, j2])
            di, dj = 0.4 * chance * tb.MOVES[a]
            rows.append((title, i, j, ["up", "right", "down", "left"][a], chance))
            axes.arrow(j + 0.5, i + 0.5, dj, di, width=0.03, head_width=0.16, color=plt.get_cmap("Blues")(chance))
    write(do.out, "fig_2a_right", ["dynamics", "i", "j", "action", "probability of the intended cell"], rows)
    save(do.out, "fig_2a_right")


def figure_2b(do: Settings) -> None:
    mdp, size = tb.figure_2b(), 15
    blurred = partial(tb.block_average, shape=(size, size))
    plans = {
        "MnM": tb.plan(mdp, "mnm", notebook=True),
        "MnM, inaccurate model": tb.plan(mdp, "mnm", notebook=True, approximate=blurred, kl_clip=5.0),
        "the same without classifier": tb.plan(mdp, "no-classifier", notebook=True, approximate=blurred),
    }
    _, axes = plt.subplots(figsize=(4.6, 4.9))
    show_grid(axes, tb.WALLS_2B, (2, 12))
    axes.set_xticks(range(0, size + 1, 3), [])
    axes.set_yticks(range(0, size + 1, 3), [])
    paths, bounds = [], []
    for (label, states), marker, shift in zip(plans.items(), "so^", (-0.12, 0.0, 0.12), strict=True):
        end = last(itertools.islice(states, 20))
        here, path = int(mdp.start.argmax()), []
        for _ in range(101):
            path.append(divmod(here, size))
            here = int(mdp.p[[here * mdp.n_actions + int(end.Q[here].argmax())]].toarray().argmax())
        paths += [(label, t, i, j) for t, (i, j) in enumerate(path)]
        infinite = float(np.isinf(tb.kl(end.q, mdp.p)).mean())
        for kind, policy in (("iterate", end.policy), ("greedy", tb.greedy(end.Q))):
            at = mdp, policy, end.q
            bounds.append((label, kind, infinite, tb.bound_1(*at).value, tb.log_return(mdp, policy)))
        i, j = np.array(path).T + 0.5 + shift
        axes.plot(j, i, marker=marker, ms=4, lw=1, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), fontsize=8, frameon=False)
    write(do.out, "fig_2b_paths", ["method", "step", "i", "j"], paths)
    header = "method", "policy", "share of (s,a) with infinite KL", "B_1 unclipped", "log return"
    write(do.out, "fig_2b_bounds", header, bounds)
    axes.text(0.2, -0.1, "start", va="bottom", fontsize=8)
    save(do.out, "fig_2b")


# ---------------------------------------------------------------------------------------------------------------------
# Figure 3a: risk


def advantage(method: str, notebook: bool, risky: float) -> float:
    """Q(start, right) - Q(start, left) at the end of planning."""
    Q = last(tb.until(tb.plan(tb.figure_3a(risky), method, notebook=notebook))).Q
    return float(Q[1, 1] - Q[1, 3])


def horizon_advantage(risky: float) -> float:
    """max B_hor of going right for ever, less that of staying left."""
    mdp = tb.figure_3a(risky)
    right, left = np.eye(4)[[1, 1, 1]], np.eye(4)[[3, 3, 3]]
    ends = [last(tb.until(tb.plan_horizon(mdp, policy), 1e-8)) for policy in (right, left)]
    return ends[0].value - ends[1].value


SWITCHES = {
    "VMBPO": partial(advantage, "vmbpo", False),
    "return; closed-loop bound": partial(advantage, "q-learning", False),
    "B_hor": horizon_advantage,
    "MnM, c = γ, exp(V)": partial(advantage, "mnm-gamma", False),
    "MnM, c = 1, exp(γV)": partial(advantage, "mnm", False),
    "MnM, c = 1, exp(V): the paper": partial(advantage, "mnm", True),
    "log reward, q = p": partial(advantage, "log-reward", False),
}


def figure_3a(do: Settings) -> None:
    mdp, labels = tb.figure_3a(), {"q-learning": "Q-learning", "mnm": "MnM", "vmbpo": "VMBPO"}
    ends = [last(tb.until(tb.plan(mdp, method, notebook=True), 1e-6)).Q for method in labels]
    achieved = returns(mdp, np.array(ends))
    switches = {label: brentq(f, 1.0, 1e3, xtol=1e-4) for label, f in tqdm(SWITCHES.items(), "switches", leave=False)}
    write(do.out, "fig_3a", ["method", "return at r = 51"], zip(labels.values(), achieved, strict=True))
    write(do.out, "fig_3a_switches", ["method", "least risky reward at which it goes right"], switches.items())

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=(1, 2))
    left.bar(list(labels.values()), achieved, width=0.6)
    left.set(ylabel="return", title="r = 51, as in the paper")
    right.barh(list(switches), list(switches.values()), height=0.6)
    for row, value in enumerate(switches.values()):
        right.text(value + 3, row, f"{value:.1f}", va="center", fontsize=8)
    right.axvline(50, color="k", lw=0.8, ls=":")
    right.invert_yaxis()
    right.set(xlabel="risky reward from which the method leaves the safe 50", title="Where each method takes the risk")
    save(do.out, "fig_3a")


# ---------------------------------------------------------------------------------------------------------------------
# Figure 3b: the bounds, and which pair ascends


def figure_3b(do: Settings) -> None:
    mdp, rows = tb.figure_3b(), []
    for i, step in enumerate(tb.until(tb.plan(mdp, notebook=True), 1e-6)):
        at = mdp, step.policy, step.q
        own = last(tb.until(tb.plan(mdp, "vmbpo", policy=step.policy), 1e-8))
        rows.append((
            i,
            math.log(tb.vmbpo_objective(mdp, step.policy, own.q).value),
            math.log(tb.vmbpo_objective(*at).value),
            tb.log_return(mdp, step.policy),
            tb.bound_horizon(*at).value,
            tb.bound_gamma(*at).value,
            tb.bound_1(*at).value,
        ))  # fmt: skip
    header = "iteration", "log VMBPO at its own q", "log VMBPO at MnM's q", "log return", "B_hor", "B_γ", "B_1"
    write(do.out, "fig_3b", header, rows)
    plt.figure(figsize=(6.4, 3.4))
    for column, marker, color in zip(range(1, 7), "^vosD*", ("C3", "C1", "k", "C0", "C9", "C2"), strict=True):
        plt.plot([row[column] for row in rows], marker=marker, ms=4, lw=1.2, color=color, label=header[column])
    plt.gca().set(xlabel="iterations of the paper's MnM", ylabel="nats", xticks=range(0, len(rows), 5))
    plt.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    save(do.out, "fig_3b")


def optimal_bounds(mdp: tb.FiniteMDP, policy: np.ndarray) -> Iterator[tuple[str, tb.Bound]]:
    """Each bound of a fixed policy at its own best dynamics."""
    yield "B_1", tb.bound_1(mdp, policy, last(tb.until(tb.plan(mdp, "mnm", policy=policy))).q)
    q = last(tb.until(tb.plan(mdp, "mnm-gamma", policy=policy))).q
    yield "B_γ", tb.bound_gamma(mdp, policy, q)
    yield "B_hor, same q", tb.bound_horizon(mdp, policy, q)
    end = last(tb.until(tb.plan_horizon(mdp, policy)))
    yield "B_hor, best q_t", tb.bound_horizon(mdp, end.policies, end.dynamics)
    yield "closed loop", tb.bound_closed_loop(mdp, policy, last(tb.until(tb.plan_closed_loop(mdp, policy))).loop)


def chain(do: Settings) -> None:
    rows = []
    for name, mdp in {"2a left": tb.figure_2a_left(), "3a": tb.figure_3a(), "3b": tb.figure_3b()}.items():
        policy = tb.greedy(last(tb.until(tb.value_iteration(mdp))).Q)
        exact = tb.log_return(mdp, policy)
        rows += [
            (name, label, b.value, b.reward, -b.mismatch, b.horizon, exact) for label, b in optimal_bounds(mdp, policy)
        ]
    write(do.out, "bounds", ["MDP", "bound", "value", "reward", "-mismatch", "horizon", "log return"], rows)
    _, panels = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True)
    for axes, (name, group) in zip(panels, itertools.groupby(rows, key=lambda row: row[0]), strict=True):
        labels, gaps = zip(*((row[1], row[6] - row[2]) for row in group), strict=True)
        axes.barh(labels, gaps, height=0.6)
        for row, gap in enumerate(gaps):
            axes.text(gap, row, f" {gap:.3g}" if gap > 1e-9 else " 0", va="center", fontsize=8)
        axes.set(title=name, xlabel="log R - bound, nats", xlim=(0, 1.2 * max(gaps)))
    panels[0].invert_yaxis()
    save(do.out, "bounds")


PAIRS = {
    "matched: c = 1, exp(γV)": "mnm",
    "mismatched: c = 1, exp(V)": tb.Method(bound_reward, one, one),
}


def pairs(do: Settings) -> None:
    rows, (_, panels) = [], plt.subplots(1, 2, figsize=(8, 2.9), sharey=True)
    for axes, (label, method) in zip(panels, PAIRS.items(), strict=True):
        falls = 0
        for seed in range(100):
            rng = np.random.default_rng(seed)
            p, reward = rng.dirichlet(np.ones(5), (5, 3)), np.exp(3 * rng.normal(size=(5, 3)))
            mdp = tb.FiniteMDP(p, reward, 0.3, rng.dirichlet(np.ones(5)))
            steps = itertools.islice(tb.plan(mdp, method), 10)
            values = [tb.bound_1(mdp, step.policy, step.q).value for step in steps]
            falls += min(np.diff(values)) < -1e-10
            rows.append((label, seed, *values))
            axes.plot(np.subtract(values[1:], max(values)), lw=0.7, alpha=0.5, color="C0" if method == "mnm" else "C3")
        axes.set(title=f"{label}\ndecreases on {falls} of 100", xlabel="iterations after the first")
        axes.set_yscale("symlog", linthresh=1e-4)
    panels[0].set_ylabel("B_1 - its best, nats")
    write(do.out, "pairs", ["pair", "seed", *(f"B_1 at {i}" for i in range(10))], rows)
    save(do.out, "pairs")


FIGURES = (figure_2a_right, figure_2b, figure_3a, figure_3b, chain, pairs, figure_2a_left, figure_2a_divergence)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tabular"), help="a folder for PNGs and CSVs")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of Figure 2a (left)")
    parser.add_argument("--iterations", type=int, default=1501, help="iterations of Figure 2a (left)")
    parser.add_argument("--long-iterations", type=int, default=3001, help="iterations to show its divergence")
    parser.add_argument("--only", choices=[figure.__name__ for figure in FIGURES], help="draw this one alone")
    options = vars(parser.parse_args(arguments))
    only = options.pop("only")
    do = Settings(**options)
    do.out.mkdir(parents=True, exist_ok=True)
    for figure in (bar := tqdm([figure for figure in FIGURES if only in (None, figure.__name__)])):
        bar.set_description(figure.__name__)
        figure(do)


if __name__ == "__main__":
    main()
