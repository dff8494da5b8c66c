"""Planning on finite MDPs: ascent, fixed points, and where each method takes the risk."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import TypeVar

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import brentq

from sb3_mismatch.tabular import (
    METHODS,
    FiniteMDP,
    Method,
    as_dynamics,
    block_average,
    bound_1,
    bound_closed_loop,
    bound_gamma,
    bound_horizon,
    bound_weighted,
    figure_2b,
    figure_3a,
    figure_3b,
    greedy,
    kl,
    log_return,
    plan,
    plan_closed_loop,
    plan_horizon,
    tilt,
    until,
    value_iteration,
    vmbpo_objective,
)
from sb3_mismatch.tabular.planning import bound_reward, one

T = TypeVar("T")
PAIRS = {"mnm": bound_1, "mnm-gamma": bound_gamma, "vmbpo": vmbpo_objective}
MISMATCHED = Method(bound_reward, one, one)  # the price of B_1 with the exponent of B_γ


def last(states: Iterator[T]) -> T:
    *_, state = states
    return state


def random_mdp(seed: int, gamma: float = 0.3, spread: float = 3.0, transitions: bool = False) -> FiniteMDP:
    rng = np.random.default_rng(seed)
    states, actions = rng.integers(2, 7), rng.integers(1, 4)
    p = rng.dirichlet(np.full(states, 0.5), (states, actions)) + 1e-9
    reward = np.exp(spread * rng.normal(size=(states, actions, states) if transitions else (states, actions)))
    return FiniteMDP(p / p.sum(axis=-1, keepdims=True), reward, gamma, rng.dirichlet(np.ones(states)))


def contraction(mdp: FiniteMDP, price: float, pay: np.ndarray, policy: np.ndarray | None = None) -> np.ndarray:
    """Q = c log E_p exp((pay + γ V) / c), iterated from 0, dense; pay is (S, A, S) or (S, A, 1)."""
    p = mdp.p.toarray().reshape(mdp.n_states, mdp.n_actions, mdp.n_states)
    Q = np.zeros(p.shape[:2])
    for _ in range(int(-40 / math.log(mdp.gamma))):
        V = Q.max(axis=1) if policy is None else (policy * Q).sum(axis=1)
        x = (pay + mdp.gamma * V) / price
        top = x.max(axis=-1, keepdims=True)
        Q = price * (top[..., 0] + np.log((p * np.exp(x - top)).sum(axis=-1)))
    return Q


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("method", PAIRS)
def test_matched_pairs_ascend_their_own_bound(method: str, smoothing: float) -> None:
    for seed in range(60):
        mdp = random_mdp(seed)
        steps = itertools.islice(plan(mdp, method, smoothing=smoothing), 12)
        values = [PAIRS[method](mdp, step.policy, step.q).value for step in steps]
        assert min(np.diff(values)) >= -1e-10 * max(1, abs(values[-1]))
        assert values[-1] > values[0]


def test_the_mismatched_pair_decreases_on_most() -> None:
    falls = 0
    for seed in range(60):
        mdp = random_mdp(seed)
        values = [bound_1(mdp, s.policy, s.q).value for s in itertools.islice(plan(mdp, MISMATCHED), 12)]
        falls += min(np.diff(values)) < -1e-6
    assert falls > 30


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("method", PAIRS)
def test_matched_pairs_end_at_the_fixed_point_of_the_contraction(method: str, fixed: bool) -> None:
    for seed, gamma in itertools.product(range(8), (0.3, 0.9)):
        mdp = random_mdp(seed, gamma, spread=1.0)
        policy = greedy(np.random.default_rng(seed).random(mdp.reward.shape)) if fixed else None
        pay = mdp.reward if method == "vmbpo" else (1 - gamma) * (np.log(mdp.reward) - math.log(1 - gamma))
        price = METHODS[method].price(gamma)
        expected = contraction(mdp, price, pay[..., None], policy)
        end = last(until(plan(mdp, method, policy=policy), 1e-13))
        np.testing.assert_allclose(end.Q, expected, rtol=0, atol=1e-9)
        best = (policy * expected).sum(axis=1) if fixed else expected.max(axis=1)
        assert PAIRS[method](mdp, end.policy, end.q).value == pytest.approx(mdp.start @ best, abs=1e-9)


def test_rewards_on_transitions_tilt_too() -> None:
    for seed in range(20):
        mdp = random_mdp(seed, transitions=True)
        steps = list(until(plan(mdp, "mnm"), 1e-13))
        values = [bound_1(mdp, step.policy, step.q).value for step in steps]
        assert min(np.diff(values)) >= -1e-10
        assert values[-1] <= log_return(mdp, steps[-1].policy) + 1e-9
        reward = mdp.reward.toarray().reshape(mdp.n_states, mdp.n_actions, -1)
        pay = (1 - mdp.gamma) * (np.log(reward) - math.log(1 - mdp.gamma))
        np.testing.assert_allclose(steps[-1].Q, contraction(mdp, 1.0, pay), rtol=0, atol=1e-9)


def test_vmbpo_at_its_own_dynamics_is_above_the_return_and_elsewhere_neither() -> None:
    sides = set()
    for seed in range(30):
        mdp = random_mdp(seed, gamma=0.8, spread=1.0)
        policy = greedy(np.random.default_rng(seed).random(mdp.reward.shape))
        exact = math.exp(log_return(mdp, policy))
        own = last(until(plan(mdp, "vmbpo", policy=policy)))
        assert vmbpo_objective(mdp, policy, own.q).value >= exact - 1e-9
        for scale in (-2.0, 0.1):
            q, _ = tilt(mdp.p, scale * own.Q.max(axis=1))
            sides.add(vmbpo_objective(mdp, policy, q).value > exact)
    assert sides == {True, False}


def test_value_iteration_and_policy_iteration_agree_with_q_learnings_plan() -> None:
    mdp = figure_3b()
    best = last(until(value_iteration(mdp), 1e-12)).Q
    for notebook in (False, True):
        end = last(until(plan(mdp, "q-learning", notebook=notebook), 1e-12))
        np.testing.assert_allclose(end.Q, best, rtol=0, atol=1e-9)
        assert kl(end.q, mdp.p).max() == pytest.approx(0, abs=1e-12)
    v = best.max(axis=1)
    assert (mdp.p @ v).reshape(best.shape) * mdp.gamma + mdp.reward == pytest.approx(best, abs=1e-9)


def test_the_closed_loop_ends_at_the_return_itself() -> None:
    for seed in range(20):
        mdp = random_mdp(seed, gamma=0.8)
        steps = list(until(plan_closed_loop(mdp), 1e-12))
        values = [bound_closed_loop(mdp, step.policy, step.loop).value for step in steps]
        assert min(np.diff(values)) >= -1e-10
        best = last(until(value_iteration(mdp), 1e-12)).Q.max(axis=1)
        np.testing.assert_allclose(steps[-1].V, np.log(best), rtol=0, atol=1e-9)
        assert values[-1] == pytest.approx(math.log(mdp.start @ best), abs=1e-9)

        policy = np.random.default_rng(seed).dirichlet(np.ones(mdp.n_actions), mdp.n_states)
        end = last(until(plan_closed_loop(mdp, policy), 1e-12))
        np.testing.assert_array_equal(end.policy, policy)
        exact = log_return(mdp, policy)
        assert bound_closed_loop(mdp, policy, end.loop).value == pytest.approx(exact, abs=1e-9)


def test_the_learned_discount_ascends_to_what_no_other_dynamics_beat() -> None:
    for seed in range(4):
        mdp, rng = random_mdp(seed, gamma=0.5, spread=1.5), np.random.default_rng(seed)
        policy = rng.dirichlet(np.ones(mdp.n_actions), mdp.n_states)
        for fixed in (policy, None):
            steps = list(itertools.islice(plan_horizon(mdp, fixed), 6))
            assert min(np.diff([step.value for step in steps])) >= -1e-10
            end = steps[-1]
            assert end.value == pytest.approx(bound_horizon(mdp, end.policies, end.dynamics).value, abs=1e-12)
            assert end.value <= real_log_return(mdp, end.policies) + 1e-9
            assert bound_horizon(mdp, end.policies[0], mdp.p).value <= end.value + 1e-9 or fixed is None

            # For its own w, no mixture with other dynamics is better at any step.
            best = bound_weighted(mdp, end.policies, end.dynamics, end.weights).value
            for t in range(4):
                other = list(end.dynamics)
                random = as_dynamics(rng.dirichlet(np.ones(mdp.n_states), (mdp.n_states, mdp.n_actions)))
                other[t] = 0.99 * other[t] + 0.01 * random
                assert bound_weighted(mdp, end.policies, other, end.weights).value <= best + 1e-12


def real_log_return(mdp: FiniteMDP, policies: np.ndarray) -> float:
    """log of Σ_t γ^t E_p r_t under a policy that changes from step to step, up to its last step."""
    here, total = mdp.start, 0.0
    for t, policy in enumerate(policies):
        joint = here[:, None] * policy
        total += mdp.gamma**t * (joint * mdp.reward).sum()
        here = joint.ravel() @ mdp.p
    return math.log(total)


def test_the_learned_discount_beats_the_fixed_one() -> None:
    mdp = figure_3b()
    fixed = last(until(plan(mdp, "mnm-gamma")))
    step = last(itertools.islice(plan_horizon(mdp, fixed.policy), 4))
    chain = [
        bound_gamma(mdp, fixed.policy, fixed.q).value,
        bound_horizon(mdp, fixed.policy, fixed.q).value,
        step.value,
        log_return(mdp, fixed.policy),
    ]
    assert chain == sorted(chain)
    assert min(np.diff(chain)) > 1e-4


def risk(method: str, risky: float) -> float:
    """By how much going to the risky cell is better than the safe one, in the method's own units."""
    Q = last(until(plan(figure_3a(risky), method))).Q
    return float(Q[1, 1] - Q[1, 3])


def test_mnm_takes_the_risk_later_than_the_return_would() -> None:
    # Going right for ever: V2 = r + γ (V2 + V1) / 2 and V1 = 1 + γ V2. Staying left: 50 / (1-γ) = 500 = V2.
    switch = 500 - 0.9 * (500 + 1 + 0.9 * 500) / 2
    assert brentq(partial(risk, "q-learning"), 1, 1e4) == pytest.approx(switch, abs=1e-6)
    for method in ("mnm", "mnm-gamma"):
        later = brentq(partial(risk, method), 1, 1e4)
        assert risk(method, later - 0.1) < 0 < risk(method, later + 0.1)
        assert later > 2 * switch
    assert brentq(partial(risk, "vmbpo"), 1, 1e4) < switch


@pytest.mark.parametrize(("method", "cell"), [("q-learning", 0), ("mnm", 0), ("vmbpo", 2)])
def test_figure_3a(method: str, cell: int) -> None:
    mdp = figure_3a()
    chosen = greedy(last(until(plan(mdp, method, notebook=True), 1e-6)).Q)
    right = 51 + 0.9 * 0.5  # V2 = 51 + γ (V2 + 1 + γ V2) / 2
    values = {0: 1 + 0.9 * 500, 2: 1 + 0.9 * right / (1 - 0.45 - 0.405)}
    assert math.exp(log_return(mdp, chosen)) == pytest.approx(values[cell])


def test_figure_2b_needs_the_clip_and_the_classifier() -> None:
    mdp = figure_2b()
    blurred = partial(block_average, shape=(15, 15))
    assert np.isinf(kl(blurred(mdp.p), mdp.p)).any()
    with pytest.raises(ValueError, match="set kl_clip"):
        list(itertools.islice(plan(mdp, notebook=True, approximate=blurred), 3))

    def reaches_the_goal(method: str, **how: object) -> bool:
        chosen = last(itertools.islice(plan(mdp, method, notebook=True, **how), 20))  # type: ignore[arg-type]
        here = mdp.start
        for _ in range(100):
            here = (here[:, None] * greedy(chosen.Q)).ravel() @ mdp.p
        return bool(here[2 * 15 + 12] > 0.99)

    assert reaches_the_goal("mnm")
    assert reaches_the_goal("mnm", approximate=blurred, kl_clip=5.0)
    assert not reaches_the_goal("no-classifier", approximate=blurred)


@pytest.mark.parametrize(
    ("notebook", "smoothing", "keep"), [(False, 0.25, 0.25), (False, None, 0.0), (True, None, 0.5)]
)
def test_a_step_mixes_the_old_with_the_tilted(notebook: bool, smoothing: float | None, keep: float) -> None:
    mdp = figure_3b()
    blurred = partial(block_average, shape=(10, 10), block=5)
    states = plan(mdp, notebook=notebook, smoothing=smoothing, approximate=blurred, kl_clip=5.0)
    old, new = itertools.islice(states, 2)
    v = old.Q.max(axis=1) if notebook else old.Q.mean(axis=1)  # the first policy is uniform
    weights = blurred(mdp.p).toarray() * np.exp(v if notebook else mdp.gamma * v)
    tilted = weights / weights.sum(axis=1, keepdims=True)
    expected = blurred(as_dynamics(sp.csr_array((1 - keep) * tilted + keep * mdp.p.toarray())))
    np.testing.assert_allclose(new.q.toarray(), expected.toarray(), atol=1e-12)
    np.testing.assert_allclose(new.policy, (1 - keep) * greedy(old.Q) + keep / 4, atol=1e-12)


def test_what_plan_refuses() -> None:
    with pytest.raises(ValueError, match="method='mbpo' with notebook=False is unknown: choose from mnm, mnm-gamma"):
        next(plan(figure_3a(), "mbpo"))
    with pytest.raises(ValueError, match=r"no bound for r\(s,a,s'\)"):
        next(plan(random_mdp(0, transitions=True), "mnm-gamma"))
    for iterator in (plan_horizon, plan_closed_loop):
        with pytest.raises(ValueError, match=r"use mdp.averaged\(\)"):
            next(iterator(random_mdp(0, transitions=True)))
    with pytest.raises(RuntimeError, match="no change below 1e-10 in 2 iterations"):
        list(until(plan(figure_3b()), limit=2))
