"""Fit the dynamics (bootstraps, holdout, elites) and the classifier."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_mismatch.buffers import RealTransitions
from sb3_mismatch.classifier import Classifier
from sb3_mismatch.dynamics import Dynamics, Gaussian
from sb3_mismatch.fitted import Mean, Start
from sb3_mismatch.objectives import Objective
from sb3_mismatch.replaying import replayed
from sb3_mismatch.rewards import rare
from sb3_mismatch.settings import check_count, check_number

#: minibatch of rows (E, N, .), one block per member -> what each member minimises, (E,)
ModelLoss = Callable[[ReplayBufferSamples], th.Tensor]
#: (s, a) -> s', each (n, .)
SampleNext = Callable[[th.Tensor, th.Tensor], th.Tensor]
#: raw flat observations (n, obs_dim) -> V, (n, 1), differentiable in them
Value = Callable[[th.Tensor], th.Tensor]

#: A fit that ends so many nats above where it began has exploded; noise and overfitting move it by a few.
EXPLOSION = 10.0
#: Of the continuous ranked probability score: about as steep as the likelihood where noise is 1/200 of a deviation.
CRPS_WEIGHT = 200.0


class Terms:
    """
    The terms of the dynamics' loss on one minibatch (E, N, .), each computed when asked for and weighted
    (:class:`~sb3_mismatch.objectives.ModelTerms`).
    """

    def __init__(
        self, row: Objective, dynamics: Dynamics, classifier: Classifier, value: Value, rows: ReplayBufferSamples
    ) -> None:
        self._row, self._dynamics, self._classifier, self._value, self._rows = row, dynamics, classifier, value, rows

    @cached_property
    def _predicted(self) -> Gaussian:
        """q(s', r | s, a) of all rows."""
        predicted: Gaussian = self._dynamics(self._rows.observations, self._rows.actions)
        return predicted

    @cached_property
    def nll_of_each(self) -> th.Tensor:
        """-log q(s', r | s, a): (E, N)."""
        rows = self._rows
        nll = self._dynamics.nll_of(self._predicted, rows.observations, rows.next_observations, rows.rewards)
        return self._row.likelihood_weight * nll

    @property
    def nll(self) -> th.Tensor:
        """Its mean: (E,)."""
        return self.nll_of_each.mean(dim=1)

    @cached_property
    def crps(self) -> th.Tensor:
        """The continuous ranked probability score of q(s', r | s, a), in 1/200 of a target's deviation: (E,)."""
        rows = self._rows
        crps = self._dynamics.crps_of(self._predicted, rows.observations, rows.next_observations, rows.rewards)
        return self._row.likelihood_weight * CRPS_WEIGHT * crps.mean(dim=1)

    @cached_property
    def _drawn(self) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """s, a and s' ~ q by reparameterisation; over all members as many rows as one member's minibatch has."""
        n_members, n_rows = self._rows.rewards.shape[:2]
        few = max(n_rows // n_members, 1)
        observations, actions = self._rows.observations[:, :few], self._rows.actions[:, :few]
        predicted = Gaussian(*(x[:, :few] for x in self._predicted))
        return observations, actions, self._dynamics.rsample_of(predicted, observations)[0]

    @cached_property
    def log_ratio(self) -> th.Tensor:
        """log C/(1-C): (E,). Not clipped: where the classifier is sure, the dynamics need its gradient most."""
        logits: th.Tensor = self._classifier(*self._drawn)
        return self._row.adversarial_weight * logits.mean(dim=(1, 2))

    @cached_property
    def value(self) -> th.Tensor:
        """V(s') of drawn next states: (E,)."""
        return self._values(self._drawn[2]).mean(dim=1)

    @cached_property
    @th.no_grad()
    def value_of_each(self) -> th.Tensor:
        """V(s') of real next states, 0 at ends: (E, N)."""
        return (1 - self._rows.dones.squeeze(2)) * self._values(self._rows.next_observations)

    def _values(self, states: th.Tensor) -> th.Tensor:
        """V, weighted: (E, n, obs_dim) -> (E, n)."""
        return self._row.adversarial_weight * self._value(states.flatten(0, 1)).view(states.shape[:2])


@dataclass(frozen=True)
class FitSettings:
    """
    How the world is fitted, each time from where it stands.

    :param dynamics_steps: gradient steps of the dynamics
    :param average_steps: the dynamics that imagine are the mean of those that learn over about so many of their last
        gradient steps (:class:`Mean`); 0: those that learn
    :param classifier_steps: gradient steps of the classifier
    :param batch_size: rows of a minibatch, for each member
    :param recent_ratio: share of the dynamics' rows that are drawn among the newest: where the policy went last is
        where it goes next, and what it seeks there may be an error
    :param n_recent: how many rows are the newest
    :param paid_ratio: share of them that are drawn among those whose reward stands out, if there are a few: one row in
        thousands is too few to be learned, and the only one that tells what to seek
    :param holdout_ratio: share of real rows held out
    :param max_holdout: at most so many of them (mbpo/models/bnn.py: 5000)
    """

    dynamics_steps: int = 80
    average_steps: int = 0
    classifier_steps: int = 20
    batch_size: int = 64
    recent_ratio: float = 0.5
    n_recent: int = 250
    paid_ratio: float = 0.05
    holdout_ratio: float = 0.2
    max_holdout: int = 1000

    def __post_init__(self) -> None:
        for name in ("dynamics_steps", "classifier_steps", "batch_size", "n_recent", "max_holdout"):
            check_count(f"fit_kwargs[{name!r}]", getattr(self, name))
        if self.average_steps != 0:
            check_count("fit_kwargs['average_steps']", self.average_steps, "0 for none, or ")
        check_number("fit_kwargs['recent_ratio']", self.recent_ratio, 0, 1)
        check_number("fit_kwargs['paid_ratio']", self.paid_ratio, 0, 1)
        check_number("fit_kwargs['holdout_ratio']", self.holdout_ratio, 0, 0.9)


def split_holdout(data: RealTransitions, settings: FitSettings) -> tuple[th.Tensor, th.Tensor]:
    """
    Row indices of the training and the holdout set.

    Which set a row belongs to follows from its place in the replay buffer, so that no row that was trained on is
    held out later, over warm starts and over sessions.

    :return: two index tensors; of a single row, or where one set would be empty, both hold all
    """
    n = len(data)
    ratio = min(settings.holdout_ratio, settings.max_holdout / max(n, 1))
    # Multiples of the golden ratio, modulo one, are spread evenly whatever rows there are.
    held_out = (data.position.double() * 0.6180339887498949).frac() < ratio
    train, holdout = (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
    if len(train) == 0 or len(holdout) == 0:
        train = holdout = th.arange(n, device=data.position.device)
    return train, holdout


def exploded(before: th.Tensor, after: th.Tensor) -> th.Tensor:
    """Whether a loss on held-out rows, in nats, is no longer finite or has risen by ``EXPLOSION``: bool."""
    return ~(after - before < EXPLOSION)


def fit_dynamics(
    dynamics: Dynamics,
    optimizer: th.optim.Optimizer,
    data: RealTransitions,
    loss: ModelLoss,
    settings: FitSettings,
    ignores_noise: bool = False,
) -> dict[str, float]:
    """
    Fit all members at once, from where they stand.

    Each member draws its minibatches from rows of its own (:func:`bootstraps`). The last parameters are kept, or
    :class:`Mean` of the last: there are few steps between two fits, and what the policy has just met weighs more in
    them than among held-out rows. The end-of-episode heads, which share no parameter with the rest, are judged apart.

    :param loss: what the members minimise on a minibatch, beside the cross-entropy of the end-of-episode heads
    :param ignores_noise: whether dimensions of the state that turn out not to be foretold are ignored from here on
    :return: for the log, on held-out rows: negative log-likelihood, squared error per head (of states over what varies
        and is not ignored), the share of dimensions that are not ignored, the share of next states' variance that is
        left unexplained, or that of rewards' mean square if it is larger and they are not rare, and how many members
        had exploded (:func:`exploded`) and were rolled back with their optimizer's moments
    :raises ValueError: when the loss on held-out rows is finite neither at the start nor at the end
    """
    train, holdout = split_holdout(data, settings)
    batch, n_members, device = data.batch, dynamics.n_members, data.position.device
    batch = batch._replace(rewards=dynamics.leave_to_ends(batch.rewards, batch.dones))
    n_targets = dynamics.low.numel()
    _standardise(dynamics, batch, train)
    held = ReplayBufferSamples(*(c[holdout].expand(n_members, -1, -1) for c in batch[:5]))

    @th.no_grad()
    def judge() -> tuple[th.Tensor, th.Tensor]:
        return loss(held) / n_targets, _end_loss(dynamics, held)

    paid = rare(batch.rewards).squeeze(1)
    rows = bootstraps(train, n_members, settings, paid)
    columns = th.randint(len(train), (settings.dynamics_steps, n_members, settings.batch_size), device=device)
    step = training_step(dynamics, optimizer, batch, rows, loss)
    starts = Start(_Body(dynamics), optimizer), Start(dynamics.end, optimizer)
    before = judge()
    mean = Mean(dynamics.body.parameters(), optimizer, settings.average_steps) if settings.average_steps > 0 else None
    dynamics.train()
    with mean or nullcontext():
        for column in columns:
            step(column)
            if mean is not None:
                mean.follow()
    dynamics.eval()
    after = judge()
    lost = [start.restore(exploded(*errors)) for start, *errors in zip(starts, before, after, strict=True)]
    error, end_error = (th.where(*each) for each in zip(lost, before, after, strict=True))

    if not error.isfinite().all():
        raise ValueError(
            "the dynamics' loss on held-out rows is not finite: lower dynamics_kwargs['learning_rate'], or scale the "
            "observations and rewards"
        )
    dynamics.holdout_loss.copy_(error)
    with th.no_grad():
        squared = dynamics.squared_error(held.observations, held.actions, held.next_observations, held.rewards)
        elite_error = squared[dynamics.elites].mean(dim=0)
        dynamics.holdout_error.copy_(elite_error)
        if ignores_noise:
            dynamics.ignore_noise()
        nll = dynamics.nll(held.observations, held.actions, held.next_observations, held.rewards)
        # What rewards stray from a constant may be next to nothing beside it: that constant is explained as well.
        constant = (dynamics.targets.mean[-1] / dynamics.targets.std[-1]).square()
        varies = (dynamics.high > dynamics.low)[:-1]
        told = varies & (dynamics.foretold > 0)
        state_error = elite_error[:-1][told].mean() if told.any() else varies.any().float()
        unexplained = state_error
        # Where all that is earned lies in a few rows, their error tells of these rows alone.
        if not paid.any():
            unexplained = th.maximum(unexplained, elite_error[-1] / (1 + constant))
    return {
        "dynamics/nll": nll[dynamics.elites].mean().item(),
        "dynamics/state_error": state_error.item(),
        "dynamics/foretold": dynamics.foretold.mean().item(),
        "dynamics/reward_error": elite_error[-1].item(),
        "dynamics/unexplained": unexplained.item(),
        "dynamics/end_error": end_error.mean().item(),
        "dynamics/rolled_back": int((lost[0] | lost[1]).sum()),
    }


def bootstraps(train: th.Tensor, n_members: int, settings: FitSettings, paid: th.Tensor) -> th.Tensor:
    """
    The rows that each member learns from, drawn with replacement, a share of them among the newest and one among those
    whose reward stands out: (E, n).

    :param train: indices of the training rows, oldest first, (n,)
    :param paid: whether a row's reward stands out, for all rows
    """
    shape = (n_members, len(train))
    drawn = th.randint(len(train), shape, device=train.device)
    newest = len(train) - 1 - th.randint(min(settings.n_recent, len(train)), shape, device=train.device)
    is_recent = th.rand(shape, device=train.device) < settings.recent_ratio
    rows = train[th.where(is_recent, newest, drawn)]
    among = train[paid[train]]
    if len(among) == 0:
        return rows
    is_paid = th.rand(shape, device=train.device) < settings.paid_ratio
    return th.where(is_paid, among[th.randint(len(among), shape, device=train.device)], rows)


def training_step(
    dynamics: Dynamics,
    optimizer: th.optim.Optimizer,
    batch: ReplayBufferSamples,
    bootstrap: th.Tensor,
    loss: ModelLoss,
) -> Callable[[th.Tensor], None]:
    """
    A gradient step of all members at once, which does not wait for the device; on CUDA a graph after the first few.

    :param batch: all rows, (n, .)
    :param bootstrap: which of them each member learns from, (E, n)
    :param loss: as for :func:`fit_dynamics`
    :return: takes a step on the rows of the bootstraps that are given, (E, batch_size)
    """
    parameters = list(dynamics.parameters())

    def step(column: th.Tensor) -> None:
        index = bootstrap.gather(1, column)
        rows = ReplayBufferSamples(*(c[index] for c in batch[:5]))
        total = loss(rows) + _end_loss(dynamics, rows) + dynamics.log_var_penalty()
        optimizer.zero_grad()
        total.sum().backward(inputs=parameters)
        optimizer.step()

    return replayed(step, optimizer, bootstrap.device)


class _Body(nn.Module):
    """The parameters of the dynamics without their end-of-episode heads."""

    def __init__(self, dynamics: Dynamics) -> None:
        super().__init__()
        self.body, self.bounds = dynamics.body, nn.ParameterList([dynamics.max_log_var, dynamics.min_log_var])


@th.no_grad()
def _standardise(dynamics: Dynamics, batch: ReplayBufferSamples, train: th.Tensor) -> None:
    """Set the scales of inputs and targets, and the range of the data, from the training rows."""
    observations, actions, next_observations, _, rewards = (c[train] for c in batch[:5])
    dynamics.inputs.fit(th.cat([observations, actions], dim=1))
    dynamics.targets.fit(dynamics.raw_targets(observations, next_observations, rewards))
    dynamics.next_observations.fit(next_observations)
    dynamics.healthy_range.fit(next_observations, batch.dones[train])
    seen = th.cat([th.cat([observations, next_observations]), th.cat([rewards, rewards])], dim=1)
    dynamics.low.copy_(seen.amin(dim=0))
    dynamics.high.copy_(seen.amax(dim=0))


def _end_loss(dynamics: Dynamics, rows: ReplayBufferSamples) -> th.Tensor:
    """Cross-entropy of the ends: (E,)."""
    log_survival = dynamics.log_survival(rows.next_observations)
    # Not quite certain: the logarithm of the other probability stays finite.
    log_end = th.log(-th.expm1(log_survival.clamp(max=-1e-6)))
    return -th.where(rows.dones > 0, log_end, log_survival).mean(dim=(1, 2))


def fit_classifier(
    classifier: Classifier,
    optimizer: th.optim.Optimizer,
    data: RealTransitions,
    sample_next: SampleNext,
    settings: FitSettings,
    foretold: th.Tensor | None = None,
) -> dict[str, float]:
    """
    Train the classifier on real s' against s' ~ q(.|s, a) at the same (s, a).

    A fit that explodes (:func:`exploded`) is rolled back to its start, the optimizer with it.

    :param sample_next: the dynamics' draw of s' at (s, a)
    :param foretold: the dimensions of the state that the classifier sees, ones, and others, (obs_dim,); ``None``: all
    :return: for the log, on held-out rows: loss, accuracy, mean log-ratio of real and of imagined next states, share
        of log-ratios at the clip, and whether the fit was rolled back
    :raises ValueError: when the loss is not finite at the start either
    """
    train, holdout = split_holdout(data, settings)
    batch_size = settings.batch_size
    observations, actions, next_observations = data.batch.observations, data.batch.actions, data.batch.next_observations
    classifier.inputs.fit(classifier.features(observations[train], actions[train], next_observations[train]))
    if foretold is not None:
        classifier.see(foretold)
    judge = _held_out(classifier, data, holdout, sample_next)
    first = judge().loss
    start = deepcopy(classifier.state_dict()), deepcopy(optimizer.state_dict())

    # All imagined next states are drawn in one go.
    index = train[th.randint(len(train), (settings.classifier_steps * batch_size,), device=train.device)]
    imagined = sample_next(observations[index], actions[index])
    labels = th.cat([th.ones(batch_size, 1), th.zeros(batch_size, 1)]).to(train.device)

    def step(rows: th.Tensor, fake: th.Tensor) -> None:
        states, acts = observations[rows].repeat(2, 1), actions[rows].repeat(2, 1)
        logits = classifier(states, acts, th.cat([next_observations[rows], fake]))
        loss = classifier.loss(logits, labels_real_is_one=labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    classifier.train()
    take = replayed(step, optimizer, train.device)
    for minibatch in zip(index.split(batch_size), imagined.split(batch_size), strict=True):
        take(*minibatch)
    classifier.eval()

    verdict = judge()
    rolled_back = bool(exploded(first, verdict.loss)) or not _is_finite(optimizer)
    if rolled_back:
        classifier.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
        verdict = judge()
    if not verdict.loss.isfinite():
        raise ValueError("the classifier's loss is not finite: lower classifier_kwargs['learning_rate']")
    limit = classifier.max_log_ratio
    logits = th.cat([verdict.real, verdict.imagined])
    correct = th.cat([verdict.real > 0, verdict.imagined <= 0])
    return {
        "classifier/loss": verdict.loss.item(),
        "classifier/accuracy": correct.float().mean().item(),
        "classifier/log_ratio_real": verdict.real.clamp(-limit, limit).mean().item(),
        "classifier/log_ratio_imagined": verdict.imagined.clamp(-limit, limit).mean().item(),
        "classifier/saturation": (logits.abs() >= limit).float().mean().item(),
        "classifier/rolled_back": int(rolled_back),
    }


def _is_finite(optimizer: th.optim.Optimizer) -> bool:
    """Whether all that the optimizer keeps is."""
    kept = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, th.Tensor))
    return all(bool(x.isfinite().all()) for x in kept)


class Verdict(NamedTuple):
    """The classifier's logits of real and of imagined next states of held-out rows, (n, 1), and its loss, a scalar."""

    real: th.Tensor
    imagined: th.Tensor
    loss: th.Tensor


def _held_out(
    classifier: Classifier, data: RealTransitions, holdout: th.Tensor, sample_next: SampleNext
) -> Callable[[], Verdict]:
    """What asks the classifier about held-out rows, each time beside the same imagined next states."""
    observations, actions, real = (column[holdout] for column in data.batch[:3])
    imagined = sample_next(observations, actions)

    @th.no_grad()
    def judge() -> Verdict:
        logits = classifier(observations, actions, real), classifier(observations, actions, imagined)
        labels = th.cat([th.ones_like(logits[0]), th.zeros_like(logits[1])])
        return Verdict(*logits, classifier.loss(th.cat(logits), labels_real_is_one=labels))

    return judge
