"""Lower bounds on the log of the return, exactly.

For weights w over horizons T, dynamics q and K_t = E_{π,q} KL(q‖p)(s_t, a_t), Jensen's inequality gives

    log R(π) >= J(w, q) = Σ_T w_T ( T log γ - log w_T + E_q log r_T - Σ_{t<T} K_t ),

and its gap is KL( w_T q(τ_{0:T}) ‖ γ^T p(τ_{0:T}) r_T / R ). Each bound is a choice of w. All are expectations under
occupancies, found by sparse linear solves, and all read value = reward - mismatch + horizon.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve
from scipy.special import entr, rel_entr, softmax

from sb3_mismatch.tabular.mdp import Array, Dynamics, FiniteMDP, entries


def kl(q: Dynamics, p: Dynamics) -> Array:
    """KL(q‖p)(s,a) = Σ_s' q log q/p, infinite where q goes and p does not. Shape (S, A)."""
    rows = np.repeat(np.arange(q.shape[0]), np.diff(q.indptr))
    nats = np.bincount(rows, rel_entr(q.data, entries(p, q)), minlength=q.shape[0])
    return np.maximum(nats, 0.0).reshape(q.shape[1], -1)


def tilt(p: Dynamics, exponent: Array) -> tuple[Dynamics, Array]:
    """q ∝ p e^x, which maximises E_q[x - log q/p], and that maximum log E_p e^x.

    :param exponent: x(s'), shape (S,), or x of each stored transition, shape (p.nnz,)
    :return: q, and log E_p e^x of shape (S, A)
    """
    exponent = exponent[p.indices] if exponent.shape == (p.shape[1],) else exponent
    top, counts = np.maximum.reduceat(exponent, p.indptr[:-1]), np.diff(p.indptr)
    weights = p.data * np.exp(exponent - np.repeat(top, counts))
    total = np.add.reduceat(weights, p.indptr[:-1])
    q = sp.csr_array((weights / np.repeat(total, counts), p.indices, p.indptr), shape=p.shape)
    return q, (top + np.log(total)).reshape(p.shape[1], -1)


def chain(policy: Array, q: Dynamics, discount: float | Array) -> Dynamics:
    """The matrix M(s,s') = Σ_a π(a|s) d(s,a) q(s'|s,a), sparse (S, S), for a discount d."""
    states, actions = policy.shape
    weights = (policy * discount).ravel()
    picks = np.arange(states * actions), np.arange(0, states * actions + 1, actions)
    return sp.csr_array((weights, *picks), shape=(states, states * actions)) @ q


def evaluate(policy: Array, q: Dynamics, pay: Array, discount: float | Array) -> Array:
    """Q = pay + d · q (π · Q), the value of each action. Shape (S, A)."""
    system = sp.eye_array(len(policy)) - chain(policy, q, discount)
    v = spsolve(system.tocsc(), (policy * pay).sum(axis=1))
    return np.asarray(pay + discount * (q @ v).reshape(policy.shape))


def occupancy(start: Array, policy: Array, q: Dynamics, discount: float | Array) -> Array:
    """Σ_t γ^t Pr(s_t = s, a_t = a), or Σ_t E[ d_0 ... d_{t-1} 1{s_t = s, a_t = a} ] for a discount d(s,a). (S, A)."""
    system = sp.eye_array(len(policy)) - chain(policy, q, discount).T
    visits = np.maximum(spsolve(system.tocsc(), start), 0.0)  # rounding leaves -1e-20 where nobody goes
    return np.asarray(visits[:, None] * policy)


def expectation(weights: Array, x: Array) -> float:
    """Σ w x, where 0 · ∞ = 0: what cannot happen costs nothing."""
    possible = weights > 0
    return float(weights[possible] @ x[possible])


@dataclass(frozen=True)
class Bound:
    """value = reward - mismatch + horizon, all in nats (VMBPO: in rewards)."""

    reward: float
    """What the rewards contribute: Σ_T w_T E_q log r_T."""
    mismatch: float
    """What q costs: Σ_T w_T Σ_{t<T} K_t."""
    horizon: float
    """What the horizon contributes: Σ_T w_T (T log γ - log w_T)."""

    @property
    def value(self) -> float:
        return self.reward - self.mismatch + self.horizon


@dataclass(frozen=True)
class HorizonBound(Bound):
    """A bound with its own distribution over horizons."""

    weights: Array
    """w_T, shape (horizons,)."""


def log_return(mdp: FiniteMDP, policy: npt.ArrayLike) -> float:
    """log R(π) = log E_{π,p} Σ_t γ^t r_t."""
    d = occupancy(mdp.start, mdp.checked_policy(policy), mdp.p, mdp.gamma)
    total = expectation(d, mdp.expect(mdp.reward, mdp.p))
    if total <= 0:
        raise ValueError(f"log R needs a positive return and met R = {total:g}: use mdp.shifted(constant)")
    return math.log(total)


def bound_1(mdp: FiniteMDP, policy: npt.ArrayLike, q: npt.ArrayLike | Dynamics) -> Bound:
    """B_1 = Σ_t γ^t [ (1-γ) E_q log r_t - K_t ] - log(1-γ): the paper's r̃ = (1-γ) log r + log p/q - (1-γ) log(1-γ)."""
    q = mdp.checked_dynamics(q)
    d = occupancy(mdp.start, mdp.checked_policy(policy), q, mdp.gamma)
    reward = (1 - mdp.gamma) * expectation(d, mdp.expect(mdp.log_reward, q))
    return Bound(reward, expectation(d, kl(q, mdp.p)), -math.log(1 - mdp.gamma))


def bound_gamma(mdp: FiniteMDP, policy: npt.ArrayLike, q: npt.ArrayLike | Dynamics) -> Bound:
    """B_γ = Σ_t γ^t [ (1-γ) E_q log r_t - γ K_t ] - log(1-γ): J at w_T = (1-γ) γ^T. For r(s,a)."""
    mdp.require_state_rewards("bound_gamma")
    b = bound_1(mdp, policy, q)
    return Bound(b.reward, mdp.gamma * b.mismatch, b.horizon)


def bound_weighted(
    mdp: FiniteMDP, policy: npt.ArrayLike, q: npt.ArrayLike | Dynamics | Sequence[Dynamics], weights: npt.ArrayLike
) -> HorizonBound:
    """J(w, q) = Σ_T w_T ( T log γ - log w_T + E_q log r_T - Σ_{t<T} K_t ). For r(s,a).

    :param policy: π, (S, A), or with a list of dynamics π_t of each step, (horizons, S, A)
    :param q: q, or a list with q_t of each step
    :param weights: w, a distribution over the horizons 0, 1, ..., shape (horizons,)
    :raises ValueError: when weights is no distribution, or longer than the list of dynamics
    """
    w = np.asarray(weights, dtype=float)
    if w.ndim != 1 or not (w >= 0).all() or not np.isclose(w.sum(), 1):
        raise ValueError("weights is a distribution over the horizons 0, 1, ...: divide it by its sum")
    log_reward, spent = horizon_terms(mdp, itertools.islice(steps(mdp, policy, q), len(w)))
    if len(spent) < len(w):
        raise ValueError(f"weights has {len(w)} horizons and q has {len(spent)} steps: give q_t for each of them")
    return _weighted(mdp.gamma, log_reward, spent, w)


def bound_horizon(
    mdp: FiniteMDP,
    policy: npt.ArrayLike,
    q: npt.ArrayLike | Dynamics | Sequence[Dynamics],
    horizons: int | None = None,
) -> HorizonBound:
    """B_hor = max_w J(w, q) = logsumexp_T [ T log γ + E_q log r_T - Σ_{t<T} K_t ], at w* = softmax. For r(s,a).

    :param policy: π, (S, A), or with a list of dynamics π_t of each step, (horizons, S, A)
    :param q: q, or a list with q_t of each step
    :param horizons: how many horizons to sum; None: so many that the rest is below 1e-12 of the whole
    """
    log_reward, spent = horizon_terms(mdp, itertools.islice(steps(mdp, policy, q), horizons or default_horizons(mdp)))
    w = softmax(np.arange(len(spent)) * math.log(mdp.gamma) + log_reward - spent)
    return _weighted(mdp.gamma, log_reward, spent, w)


def _weighted(gamma: float, log_reward: Array, spent: Array, w: Array) -> HorizonBound:
    horizon = math.log(gamma) * float(w @ np.arange(len(w))) + float(entr(w).sum())
    return HorizonBound(expectation(w, log_reward), expectation(w, spent), horizon, w)


def default_horizons(mdp: FiniteMDP) -> int:
    """The least N with γ^N r_max / (1-γ) <= 1e-12 r_min: what lies beyond is lost in the whole."""
    log_reward = mdp.log_reward
    tail = math.log(1e-12 * (1 - mdp.gamma)) + float(log_reward.min() - log_reward.max())
    return math.ceil(tail / math.log(mdp.gamma))


class Step(NamedTuple):
    """One step of imagination: π (S, A), q (S*A, S), and KL(q‖p) (S, A)."""

    policy: Array
    q: Dynamics
    kl: Array


def steps(mdp: FiniteMDP, policy: Any, q: Any) -> Iterator[Step]:
    """π_t and q_t step by step; for ever, when q is not a list."""
    if not isinstance(q, list):
        q = mdp.checked_dynamics(q)
        yield from itertools.repeat(Step(mdp.checked_policy(policy), q, kl(q, mdp.p)))
    policies = policy if np.ndim(policy) == 3 else itertools.repeat(policy)
    for policy_t, q_t in zip(policies, q, strict=False):
        yield next(steps(mdp, policy_t, q_t))


def horizon_terms(mdp: FiniteMDP, steps: Iterable[Step]) -> tuple[Array, Array]:
    """E_q log r_T and Σ_{t<T} K_t at each step T. Shapes (horizons,)."""
    mdp.require_state_rewards("a bound over horizons")
    log_r, here = mdp.log_reward, mdp.start
    log_reward, paid = [], [0.0]
    for step in steps:
        pairs = here[:, None] * step.policy
        log_reward.append(expectation(pairs, log_r))
        paid.append(expectation(pairs, step.kl))
        here = pairs.ravel() @ step.q
    return np.array(log_reward), np.cumsum(paid[:-1])


class ClosedLoop(NamedTuple):
    """A distribution over trajectories that stops where it likes: it may tilt all that is random in the real one."""

    start: Array
    """The start distribution, (S,)."""
    actions: Array
    """The policy, (S, A)."""
    stop: Array
    """β(s,a), the probability that the trajectory ends with this reward, (S, A)."""
    q: Dynamics
    """The dynamics, (S*A, S)."""


def bound_closed_loop(mdp: FiniteMDP, policy: npt.ArrayLike, loop: ClosedLoop) -> Bound:
    """The bound with a state-dependent stop, for r(s,a); its maximum is log R itself, at `doob`.

    V(s) = E_a[ -log π̃/π + β (log r - log β) + (1-β) (log γ - log(1-β) - KL(q‖p) + E_q V) ],
    value = E_{s_0}[ V - log μ̃/μ ] for the tilted start μ̃ and actions π̃.
    """
    mdp.require_state_rewards("bound_closed_loop")
    policy, actions, stop = mdp.checked_policy(policy), mdp.checked_policy(loop.actions), np.asarray(loop.stop)
    if stop.shape != policy.shape or not ((stop > 0) & (stop <= 1)).all():
        raise ValueError(f"loop.stop holds probabilities in (0, 1], shape {policy.shape}: none may be 0")
    q = mdp.checked_dynamics(loop.q)
    d = occupancy(loop.start, actions, q, 1 - stop)
    tilted = float(rel_entr(loop.start, mdp.start).sum()) + expectation(
        d.sum(axis=1), rel_entr(actions, policy).sum(axis=1)
    )
    return Bound(
        reward=expectation(d, stop * mdp.log_reward),
        mismatch=expectation(d, (1 - stop) * kl(q, mdp.p)) + tilted,
        horizon=expectation(d, (1 - stop) * math.log(mdp.gamma) + entr(stop) + entr(1 - stop)),
    )


def doob(mdp: FiniteMDP, policy: npt.ArrayLike) -> ClosedLoop:
    """Doob's transform by the real values V, Q: μ̃ ∝ μ V, π̃ ∝ π Q, q ∝ p V and β = r/Q, for which the bound is tight."""
    mdp.require_state_rewards("doob")
    policy = mdp.checked_policy(policy)
    action_values = evaluate(policy, mdp.p, np.exp(mdp.log_reward), mdp.gamma)
    values = (policy * action_values).sum(axis=1)
    q, _ = tilt(mdp.p, np.log(values))
    start = mdp.start * values
    return ClosedLoop(start / start.sum(), policy * action_values / values[:, None], mdp.reward / action_values, q)


def vmbpo_objective(mdp: FiniteMDP, policy: npt.ArrayLike, q: npt.ArrayLike | Dynamics) -> Bound:
    """E_q Σ_t γ^t (r_t - K_t), in rewards: at its own argmax over q no less than R, and at another q neither bound."""
    q = mdp.checked_dynamics(q)
    d = occupancy(mdp.start, mdp.checked_policy(policy), q, mdp.gamma)
    return Bound(expectation(d, mdp.expect(mdp.reward, q)), expectation(d, kl(q, mdp.p)), 0.0)
