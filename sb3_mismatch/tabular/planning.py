"""Planning on a finite MDP: each algorithm is an iterator over its states, so that one can stop, plot and go on.

    for step in until(plan(mdp, "mnm")):
        print(bound_1(mdp, step.policy, step.q).value)

The backup Q = pay + E_q[ c log p/q + γ V ] is maximised by q* ∝ p exp(γ V / c). So a price of c = 1 nat per nat of
mismatch (B_1) goes with exp(γV), and c = γ (B_γ) with exp(V); the paper's code pairs c = 1 with exp(V).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import entr, logsumexp, rel_entr

from sb3_mismatch.tabular.bounds import ClosedLoop, Step, default_horizons, evaluate, horizon_terms, kl, tilt
from sb3_mismatch.tabular.mdp import Array, Dynamics, FiniteMDP, entries


def task_reward(mdp: FiniteMDP) -> Any:
    """r."""
    return mdp.reward


def log_reward(mdp: FiniteMDP) -> Any:
    """(1-γ) log r."""
    return (1 - mdp.gamma) * mdp.log_reward


def bound_reward(mdp: FiniteMDP) -> Any:
    """(1-γ) log r - (1-γ) log(1-γ), what B_1 pays besides log p/q."""
    reward = log_reward(mdp)
    values = reward.data if mdp.on_transitions else reward
    values -= (1 - mdp.gamma) * math.log(1 - mdp.gamma)
    return reward


def nothing(gamma: float) -> float:
    return 0.0


def one(gamma: float) -> float:
    return 1.0


def discount(gamma: float) -> float:
    return gamma


@dataclass(frozen=True)
class Method:
    """pay - c KL(q‖p) is earned under q, and the next q ∝ p exp(x V)."""

    pay: Callable[[FiniteMDP], Any]
    price: Callable[[float], float]
    """c, a function of γ."""
    exponent: Callable[[float], float]
    """x, a function of γ; 0 keeps q = p."""
    looks_ahead: bool = False
    """Whether V = max_a Q tilts, and not V = π · Q, whose tilt is the proven ascent."""
    smoothing: float = 0.0
    """The share of the old π and q that stays; V = max_a Q needs some (any >= 0.2 will do)."""


METHODS = {
    "mnm": Method(bound_reward, one, discount),
    "mnm-gamma": Method(bound_reward, discount, one),
    "vmbpo": Method(task_reward, one, discount),
    "log-reward": Method(log_reward, nothing, nothing),
    "q-learning": Method(task_reward, nothing, nothing),
}
"""The matched pairs, which ascend at each step."""

NOTEBOOK = {
    "mnm": Method(log_reward, one, one, looks_ahead=True, smoothing=0.5),
    "no-classifier": Method(log_reward, nothing, one, looks_ahead=True, smoothing=0.5),
    "vmbpo": Method(task_reward, one, one, looks_ahead=True, smoothing=0.5),
    "log-reward": Method(log_reward, nothing, nothing, looks_ahead=True, smoothing=0.5),
    "q-learning": Method(task_reward, nothing, nothing, looks_ahead=True, smoothing=0.5),
}
"""The pairs of the paper's code: they reproduce its figures, and ascend no bound."""


def find_method(name: str | Method, notebook: bool) -> Method:
    """The row of METHODS, or of NOTEBOOK; a row is its own.

    :raises ValueError: when there is none
    """
    if isinstance(name, Method):
        return name
    table = NOTEBOOK if notebook else METHODS
    if name not in table:
        raise ValueError(f"method={name!r} with notebook={notebook} is unknown: choose from {', '.join(table)}")
    return table[name]


class Plan(NamedTuple):
    """A state of `plan`."""

    policy: Array
    """π, (S, A)."""
    q: Dynamics
    """The dynamics, (S*A, S)."""
    Q: Array
    """The exact values of π under q, (S, A)."""
    change: float
    """How much is left to do: the larger of max |q_new - q| and the relative gap between max_a Q and π · Q."""


def identity(q: Dynamics) -> Dynamics:
    return q


def greedy(Q: Array) -> Array:
    """π(a|s) = 1 for the first best action. Shapes (..., S, A)."""
    return np.asarray(np.eye(Q.shape[-1])[Q.argmax(axis=-1)])


def plan(
    mdp: FiniteMDP,
    method: str | Method = "mnm",
    *,
    notebook: bool = False,
    policy: npt.ArrayLike | None = None,
    smoothing: float | None = None,
    kl_clip: float = math.inf,
    approximate: Callable[[Dynamics], Dynamics] = identity,
) -> Iterator[Plan]:
    """Evaluate π under q exactly, make π greedy, tilt q by the value; repeat. Starts at the uniform π and q = p.

    Without clip or approximation the rows of METHODS ascend their own objective at each step, whatever the smoothing.

    :param method: the name of a row of METHODS, or with `notebook` of NOTEBOOK; or a row of your own
    :param policy: held fixed when given, so that only q improves
    :param smoothing: the share of the old π and q that stays; None: the method's own
    :param kl_clip: no step is charged more nats than this
    :param approximate: what the learned dynamics can represent, such as `block_average`
    :raises ValueError: when KL(q‖p) is infinite and not clipped, or the method does not fit r(s,a,s')
    """
    row = find_method(method, notebook)
    price, exponent = row.price(mdp.gamma), row.exponent(mdp.gamma)
    if mdp.on_transitions and 0 < price < 1:
        raise ValueError(f"method={method!r} is no bound for r(s,a,s'): use 'mnm', or mdp.averaged()")
    keep = row.smoothing if smoothing is None else smoothing
    pay, base, q = row.pay(mdp), approximate(mdp.p), mdp.p
    # r(s,a,s') tilts as V does: q ∝ p exp(x (pay/γ + V)).
    earned = exponent / mdp.gamma * entries(pay, base) if mdp.on_transitions else 0.0
    fixed = policy is not None
    pi = mdp.checked_policy(policy) if policy is not None else mdp.uniform()
    while True:
        cost = price * np.minimum(kl(q, mdp.p), kl_clip) if price else np.zeros_like(pi)
        if not np.isfinite(cost).all():
            raise ValueError("KL(q‖p) is infinite, for q goes where p does not: set kl_clip")
        Q = evaluate(pi, q, mdp.expect(pay, q) - cost, mdp.gamma)
        best = pi if fixed else greedy(Q)
        v = ((best if row.looks_ahead else pi) * Q).sum(axis=1)
        better, _ = tilt(base, exponent * v[base.indices] + earned)
        gap = ((best - pi) * Q).sum(axis=1).max() / max(1.0, abs(Q).max())
        yield Plan(pi, q, Q, float(max(abs(better - q).max(), gap)))
        pi = (1 - keep) * best + keep * pi
        q = approximate((1 - keep) * better + keep * q)


class _State(Protocol):
    @property
    def change(self) -> float: ...


State = TypeVar("State", bound=_State)


def until(states: Iterator[State], tolerance: float = 1e-10, limit: int = 10_000) -> Iterator[State]:
    """The states up to the first whose change is below the tolerance.

    :raises RuntimeError: when none of the first `limit` is
    """
    for _, state in zip(range(limit), states, strict=False):
        yield state
        if state.change < tolerance:
            return
    raise RuntimeError(f"no change below {tolerance:g} in {limit} iterations: raise limit, or set smoothing=0.5")


class Values(NamedTuple):
    """A state of `value_iteration`: Q, (S, A), and max |Q_new - Q|."""

    Q: Array
    change: float


def value_iteration(mdp: FiniteMDP) -> Iterator[Values]:
    """Q <- r + γ E_p max_a Q, from 0."""
    reward = mdp.expect(mdp.reward, mdp.p)
    Q = np.zeros_like(reward)
    while True:
        new = reward + mdp.gamma * (mdp.p @ Q.max(axis=1)).reshape(Q.shape)
        yield Values(Q, float(abs(new - Q).max()))
        Q = new


class HorizonPlan(NamedTuple):
    """A state of `plan_horizon`."""

    policies: Array
    """π_t, (horizons, S, A)."""
    dynamics: list[Dynamics]
    """q_t, one of each step."""
    weights: Array
    """The learned discount w, for which π_t and q_t are optimal, (horizons,)."""
    value: float
    """B_hor of π_t and q_t."""
    change: float
    """How much B_hor has risen."""


def plan_horizon(
    mdp: FiniteMDP, policy: npt.ArrayLike | None = None, horizons: int | None = None
) -> Iterator[HorizonPlan]:
    """MnM with a learned discount, for r(s,a): coordinate ascent on B_hor over w and the non-stationary π_t, q_t.

    With β_t = w_t / Σ_{T>=t} w_T, the probability to stop at t,
    W_t = E_π[ β_t log r + (1-β_t) log E_p e^{W_{t+1}} ] and q_t ∝ p e^{W_{t+1}}; then w = softmax of B_hor's exponents.

    :param policy: held fixed when given; None: π_t is greedy
    :param horizons: how many horizons to sum; None: as in `bound_horizon`
    """
    mdp.require_state_rewards("plan_horizon")
    pi = None if policy is None else mdp.checked_policy(policy)
    discounts = np.arange(horizons or default_horizons(mdp)) * math.log(mdp.gamma)
    log_r, logits, value = mdp.log_reward, discounts, -math.inf
    while True:
        log_left = np.logaddexp.accumulate(logits[::-1])[::-1]  # log Σ_{T>=t} w_T
        W, steps = np.zeros(mdp.n_states), []
        for stop in np.exp(logits - log_left)[::-1]:
            q, looked_ahead = tilt(mdp.p, W)
            Q = stop * log_r + (1 - stop) * looked_ahead
            policy_t = greedy(Q) if pi is None else pi
            steps.append(Step(policy_t, q, (q @ W).reshape(Q.shape) - looked_ahead))  # log q/p = W - log E_p e^W
            W = (policy_t * Q).sum(axis=1)
        steps.reverse()
        weights = np.exp(logits - log_left[0])
        log_reward, spent = horizon_terms(mdp, steps)
        logits = discounts + log_reward - spent
        before, value = value, float(np.logaddexp.reduce(logits))
        yield HorizonPlan(np.array([s.policy for s in steps]), [s.q for s in steps], weights, value, value - before)


class ClosedPlan(NamedTuple):
    """A state of `plan_closed_loop`."""

    policy: Array
    """π, (S, A)."""
    loop: ClosedLoop
    """The tilted start, policy, stop and dynamics."""
    V: Array
    """The exact value of the closed-loop bound from each state; log of the real value at the end, (S,)."""
    change: float
    """How much the next step would raise V."""


def plan_closed_loop(mdp: FiniteMDP, policy: npt.ArrayLike | None = None) -> Iterator[ClosedPlan]:
    """MnM with a state-dependent stop, for r(s,a): monotone, and its optimum is log R itself.

    Evaluate V, then q ∝ p e^V, Q = log(r + γ E_p e^V), β = r / e^Q, and π is greedy.

    :param policy: held fixed when given; the loop's actions are then tilted, π̃ ∝ π e^Q
    """
    fixed = policy is not None
    pi = mdp.checked_policy(policy) if policy is not None else mdp.uniform()
    mdp.require_state_rewards("plan_closed_loop")
    log_r, log_gamma = mdp.log_reward, math.log(mdp.gamma)
    loop = ClosedLoop(mdp.start, pi, np.full_like(pi, 1 - mdp.gamma), mdp.p)
    while True:
        go = 1 - loop.stop
        pay = loop.stop * log_r + entr(loop.stop) + entr(go) + go * (log_gamma - kl(loop.q, mdp.p))
        pay -= rel_entr(loop.actions, pi).sum(axis=1, keepdims=True)
        V = (loop.actions * evaluate(loop.actions, loop.q, pay, go)).sum(axis=1)
        q, looked_ahead = tilt(mdp.p, V)
        Q = np.logaddexp(log_r, log_gamma + looked_ahead)
        best = logsumexp(Q, b=pi, axis=1) if fixed else Q.max(axis=1)
        yield ClosedPlan(pi, loop, V, float((best - V).max()))
        pi = pi if fixed else greedy(Q)
        actions = pi * np.exp(Q - best[:, None])
        start = mdp.start * np.exp(best - best.max())
        loop = ClosedLoop(start / start.sum(), actions, np.exp(log_r - Q), q)
