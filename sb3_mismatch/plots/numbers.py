"""What the pictures show, as numbers."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import t as student
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_mismatch.buffers import RealTransitions
from sb3_mismatch.imagination import Imagined
from sb3_mismatch.plots.real import Stretches, held_out, names, stretches, unflattened

if TYPE_CHECKING:
    from sb3_mismatch.mnm import ModelBased

Array = NDArray[np.float64]

#: nominal shares of the central intervals
LEVELS = np.linspace(0.05, 0.95, 19)
#: the quantiles of a band: outer, inner, median, inner, outer
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def coverage(mean: Array, std: Array, targets: Array, levels: Array) -> Array:
    """
    Share of targets within the central intervals of an even mixture of K Gaussians, for each nominal share.

    A target lies within the interval of share c where |2 F(target) - 1| <= c, F being the mixture's distribution.

    :param mean: (K, n, d)
    :param std: (K, n, d)
    :param targets: (n, d)
    :param levels: (m,) nominal shares
    :return: (m, d)
    """
    centred = np.abs(2 * ndtr((targets - mean) / std).mean(axis=0) - 1)  # (n, d)
    return np.stack([(centred <= level).mean(axis=0) for level in levels])


def errors(imagined: Array, real: Array, scale: Array) -> Array:
    """Root mean square over dimensions of (imagined - real) / scale: (steps, n, d), (d,) -> (steps, n)."""
    return np.sqrt(np.square((imagined - real) / scale).mean(axis=-1))  # type: ignore[no-any-return]


def bands(values: Array, counts: NDArray[np.bool_]) -> Array:
    """Quantiles over starts of those values that count, step by step: (steps, n) -> (steps, 5); NaN where none does."""
    rows = [row[keep] for row, keep in zip(values, counts, strict=True)]
    return np.array([np.quantile(row, QUANTILES) if len(row) else np.full(len(QUANTILES), np.nan) for row in rows])


def mean_and_interval(values: Array, level: float = 0.95) -> tuple[Array, Array]:
    """
    Mean over seeds and the half width of Student's interval about it: (seeds, points) -> (points,), (points,).

    With a single seed there is no interval: NaN.
    """
    n = len(values)
    if n < 2:
        return values.mean(axis=0), np.full(values.shape[1], np.nan)
    return values.mean(axis=0), student.ppf(0.5 + level / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)


def _buffer(model: "ModelBased") -> ReplayBuffer:
    assert model.replay_buffer is not None
    return model.replay_buffer


def follow(model: "ModelBased", real: Stretches) -> Imagined:
    """What the model imagines from the same starts under the same actions."""
    scaled = real.actions.cpu().numpy().reshape(*real.actions.shape[:2], *model.action_space.shape)  # type: ignore[misc]
    starts = unflattened(model.world.observations, real.observations[0])
    return model.imagine(starts, len(scaled), model.policy.unscale_action(scaled))


class Fan(NamedTuple):
    """
    One real stretch, and what is imagined from its start under its actions.

    :param names: of the d dimensions
    :param real: (steps + 1, d)
    :param imagined: (steps + 1, d), drawn as the policy's imagined rows are
    :param members: (n_members, steps + 1, d), each member's mean alone
    :param alive: how many steps the imagined episode lived
    """

    names: list[str]
    real: Array
    imagined: Array
    members: Array
    alive: int


def fan_of(model: "ModelBased", data: RealTransitions, horizon: int, start: int = -1) -> Fan:
    """:raises IndexError: when there is no such stretch"""
    real = stretches(_buffer(model), data, horizon)
    n = real.observations.shape[1]
    if not -n <= start < n:
        raise IndexError(f"start={start}: there are {n} real stretches of {len(real.actions)} steps, from 0 to {n - 1}")
    one = Stretches(*(column[:, [start]] for column in real))
    imagined = follow(model, one)
    return Fan(
        names(model.world.observations),
        one.observations[:, 0].double().cpu().numpy(),
        imagined.observations[:, 0].astype(np.float64),
        imagined.member_observations[:, :, 0].astype(np.float64),
        int(imagined.alive.sum()),
    )


class LogRatios(NamedTuple):
    """
    The classifier's log p/q in nats.

    :param real: (n,) of held-out transitions
    :param imagined: (n,) of next states drawn from the dynamics at the same states and actions
    :param along_real: (steps, 5) quantiles along real stretches
    :param along_imagined: (steps, 5) along what is imagined from their starts under their actions
    """

    real: Array
    imagined: Array
    along_real: Array
    along_imagined: Array


@th.no_grad()
def held_out_log_ratios(model: "ModelBased", data: RealTransitions) -> tuple[Array, Array]:
    """
    The classifier's log p/q of held-out next states, and of states drawn from the dynamics in their place: (n,) each.

    :raises ValueError: under an objective without a classifier
    """
    if not model._row.uses_classifier:
        raise ValueError(
            f"objective={model.objective!r} trains no classifier, so that there is no log-ratio to show: "
            "train with objective='mnm-approx', or look at plots.calibration()"
        )
    world, held = model.world, held_out(model, data)
    with model._at_rest():
        drawn = world.dynamics.sample(held.observations, held.actions)[0]
    real, imagined = (
        world.classifier.log_ratio(held.observations, held.actions, next_observations).double().cpu().numpy()[:, 0]
        for next_observations in (held.next_observations, drawn)
    )
    return real, imagined


@th.no_grad()
def log_ratios_of(model: "ModelBased", data: RealTransitions, horizon: int, starts: int) -> LogRatios:
    """:raises ValueError: under an objective without a classifier"""
    of_real, of_drawn = held_out_log_ratios(model, data)
    real = stretches(_buffer(model), data, horizon, starts)
    imagined = follow(model, real)
    along = model.world.classifier.log_ratio(real.observations[:-1], real.actions, real.observations[1:])
    return LogRatios(
        of_real,
        of_drawn,
        bands(along.double().cpu().numpy()[..., 0], np.ones_like(imagined.alive)),
        bands(imagined.log_ratio.astype(np.float64), imagined.alive),
    )


class Calibration(NamedTuple):
    """
    How often held-out targets lie within the intervals that the dynamics predict.

    :param names: of the d targets, the reward last
    :param levels: (m,) nominal shares
    :param observed: (m, d)
    :param n: held-out transitions
    """

    names: list[str]
    levels: Array
    observed: Array
    n: int


@th.no_grad()
def calibration_of(model: "ModelBased", data: RealTransitions) -> Calibration:
    """The elites' even mixture, which is what imagination draws from."""
    dynamics, held = model.world.dynamics, held_out(model, data)
    elites = dynamics.elites
    stacked = (x.expand(len(elites), *x.shape) for x in (held.observations, held.actions))
    mean, log_var = (x.double().cpu().numpy() for x in dynamics(*stacked, elites))
    targets = dynamics.standard_targets(held.observations, held.next_observations, held.rewards).double().cpu().numpy()
    observed = coverage(mean, np.exp(0.5 * log_var), targets, LEVELS)
    return Calibration([*names(model.world.observations), "reward"], LEVELS, observed, len(targets))


class HorizonErrors(NamedTuple):
    """
    Error of imagined states, root mean square over dimensions in standard deviations of the real states.

    :param imagined: (steps + 1, 5) quantiles over starts of those still alive
    :param unchanged: (steps + 1, 5) of the guess that nothing changes
    :param alive: (steps + 1,) share of imagined episodes still alive
    :param n: starts
    """

    imagined: Array
    unchanged: Array
    alive: Array
    n: int


def horizon_errors_of(model: "ModelBased", data: RealTransitions, horizon: int, starts: int) -> HorizonErrors:
    """Errors of what is imagined from the starts of real stretches under their actions."""
    stretch = stretches(_buffer(model), data, horizon, starts)
    imagined = follow(model, stretch)
    real = stretch.observations.double().cpu().numpy()
    scale = model.world.dynamics.next_observations.std.double().cpu().numpy()
    # A state counts as long as no end came before the step that leads to it.
    counts = np.concatenate([np.ones_like(imagined.alive[:1]), imagined.alive])
    return HorizonErrors(
        bands(errors(imagined.observations.astype(np.float64), real, scale), counts),
        bands(errors(np.broadcast_to(real[0], real.shape), real, scale), np.ones_like(counts)),
        counts.mean(axis=1),
        real.shape[1],
    )


@th.no_grad()
def prediction_errors(model: "ModelBased", data: RealTransitions) -> tuple[list[str], Array]:
    """Error of the elites' mean on held-out rows in standard deviations of the target: names, (n, obs_dim + 1)."""
    dynamics, held = model.world.dynamics, held_out(model, data)
    elites = dynamics.elites
    stacked = (x.expand(len(elites), *x.shape) for x in (held.observations, held.actions))
    targets = dynamics.standard_targets(held.observations, held.next_observations, held.rewards)
    error = dynamics(*stacked, elites)[0].mean(dim=0) - targets
    return [*names(model.world.observations), "reward"], error.double().cpu().numpy()
