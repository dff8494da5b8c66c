"""Finite MDPs and their bounds, against iteration, enumeration of all trajectories, and the mathematics."""

import itertools
import math
import time
import tracemalloc
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_mismatch.tabular import (
    WALLS_2A,
    WALLS_2B,
    Bound,
    ClosedLoop,
    FiniteMDP,
    as_dynamics,
    block_average,
    bound_1,
    bound_closed_loop,
    bound_gamma,
    bound_horizon,
    bound_weighted,
    doob,
    figure_2a_left,
    figure_2a_right,
    figure_2b,
    figure_3a,
    figure_3b,
    from_gymnasium,
    greedy,
    gridworld,
    kl,
    log_return,
    tilt,
    vmbpo_objective,
)

checked = settings(derandomize=True, deadline=None, max_examples=60)
seeds = st.integers(0, 10**6)


def random_dynamics(rng: np.random.Generator, support: np.ndarray) -> np.ndarray:
    """A random q, (S, A, S), that goes only where the support is True."""
    q = rng.gamma(0.7, size=support.shape) * support + 1e-6 * support
    return q / q.sum(axis=-1, keepdims=True)


class Case:
    """A random MDP with a sparse p, a policy, and dynamics q << p."""

    def __init__(self, seed: int, states: int | None = None, actions: int | None = None, gamma: float | None = None):
        self.rng = rng = np.random.default_rng(seed)
        states, actions = states or rng.integers(1, 6), actions or rng.integers(1, 4)
        support = rng.random((states, actions, states)) < 0.6
        support[..., 0] |= ~support.any(axis=-1)
        self.p, self.q = random_dynamics(rng, support), random_dynamics(rng, support)
        self.reward = np.exp(rng.normal(scale=rng.choice([0.1, 1.0, 3.0]), size=(states, actions)))
        self.transition_reward = np.exp(rng.normal(size=support.shape))
        self.gamma = gamma or rng.uniform(0.05, 0.95)
        self.start = rng.dirichlet(np.ones(states))
        self.mdp = FiniteMDP(self.p, self.reward, self.gamma, self.start)
        self.stochastic = rng.dirichlet(np.ones(actions), states)
        self.deterministic = greedy(self.stochastic)

    def discounted(self, policy: np.ndarray, dynamics: np.ndarray, pay: np.ndarray) -> float:
        """Σ_t γ^t E pay(s_t, a_t), forward step by step."""
        here, total = self.start, 0.0
        for t in range(int(-40 / math.log(self.gamma)) + 1):
            joint = here[:, None] * policy
            total += self.gamma**t * (joint * pay).sum()
            here = np.einsum("sa,sat->t", joint, dynamics)
        return total

    def kl(self) -> np.ndarray:
        return np.where(
            self.p > 0, self.q * np.log(np.where(self.p > 0, self.q / np.maximum(self.p, 1e-300), 1)), 0
        ).sum(-1)


@checked
@given(seeds)
def test_each_bound_is_below_the_next_and_the_last_is_the_return(seed: int) -> None:
    case = Case(seed)
    for policy in (case.deterministic, case.stochastic):
        chain = [f(case.mdp, policy, case.q).value for f in (bound_1, bound_gamma, bound_horizon)]
        tight = bound_closed_loop(case.mdp, policy, doob(case.mdp, policy)).value
        exact = log_return(case.mdp, policy)
        for lower, upper in itertools.pairwise([*chain, tight]):
            assert lower <= upper + 1e-9
        assert tight == pytest.approx(exact, abs=1e-9)


@checked
@given(seeds)
def test_linear_solves_agree_with_iteration(seed: int) -> None:
    case = Case(seed)
    policy, gamma = case.stochastic, case.gamma
    spent = case.discounted(policy, case.q, case.kl())
    earned = (1 - gamma) * case.discounted(policy, case.q, np.log(case.reward))

    b = bound_1(case.mdp, policy, case.q)
    assert (b.reward, b.mismatch, b.horizon) == pytest.approx((earned, spent, -math.log(1 - gamma)), abs=1e-9)
    assert b.value == pytest.approx(earned - spent - math.log(1 - gamma), abs=1e-9)
    assert bound_gamma(case.mdp, policy, case.q).value == pytest.approx(b.value + (1 - gamma) * spent, abs=1e-9)
    assert log_return(case.mdp, policy) == pytest.approx(
        math.log(case.discounted(policy, case.p, case.reward)), abs=1e-9
    )
    vmbpo = vmbpo_objective(case.mdp, policy, case.q)
    assert vmbpo.value == pytest.approx(case.discounted(policy, case.q, case.reward) - spent, abs=1e-8)
    assert vmbpo_objective(case.mdp, policy, case.p).value == pytest.approx(math.exp(log_return(case.mdp, policy)))


@checked
@given(seeds)
def test_rewards_on_transitions(seed: int) -> None:
    case = Case(seed)
    policy, gamma = case.stochastic, case.gamma
    mdp = FiniteMDP(case.p, case.transition_reward, gamma, case.start)
    log_reward = (case.q * np.log(case.transition_reward)).sum(axis=-1)
    expected = (1 - gamma) * case.discounted(policy, case.q, log_reward) - case.discounted(policy, case.q, case.kl())
    b = bound_1(mdp, policy, case.q)
    assert b.value == pytest.approx(expected - math.log(1 - gamma), abs=1e-9)
    assert b.value <= log_return(mdp, policy) + 1e-9
    lifted = math.exp(log_return(mdp, policy)) + 2 / (1 - gamma)
    assert math.exp(log_return(mdp.shifted(2.0), policy)) == pytest.approx(lifted)
    earned = case.discounted(policy, case.q, (case.q * case.transition_reward).sum(axis=-1))
    assert vmbpo_objective(mdp, policy, case.q).reward == pytest.approx(earned)
    assert log_return(mdp.averaged(), policy) == pytest.approx(log_return(mdp, policy), abs=1e-12)
    reward = np.broadcast_to(case.reward[..., None], case.p.shape)
    same = FiniteMDP(case.p, as_sparse(reward), gamma, case.start)
    assert bound_1(same, policy, case.q).value == pytest.approx(bound_1(case.mdp, policy, case.q).value, abs=1e-9)


def as_sparse(dense: np.ndarray) -> sp.csr_array:
    return sp.csr_array(dense.reshape(-1, dense.shape[-1]))


@checked
@given(seeds, st.floats(1e-6, 1e6))
def test_scaled_rewards_add_their_log(seed: int, scale: float) -> None:
    case = Case(seed)
    scaled = FiniteMDP(case.p, scale * case.reward, case.gamma, case.start)
    policy = case.stochastic
    for f in (bound_1, bound_gamma, bound_horizon):
        assert f(scaled, policy, case.q).value == pytest.approx(f(case.mdp, policy, case.q).value + math.log(scale))
    tight = bound_closed_loop(scaled, policy, doob(case.mdp, policy)).value
    assert tight == pytest.approx(log_return(case.mdp, policy) + math.log(scale), abs=1e-8)


@checked
@given(seeds)
def test_without_mismatch_a_constant_reward_leaves_no_gap_and_another_does(seed: int) -> None:
    case = Case(seed, states=4)
    flat = FiniteMDP(case.p, np.full_like(case.reward, 2.5), case.gamma, case.start)
    for f in (bound_1, bound_gamma, bound_horizon):
        assert f(flat, case.stochastic, case.p).value == pytest.approx(log_return(flat, case.stochastic), abs=1e-9)
        assert f(case.mdp, case.stochastic, case.p).value < log_return(case.mdp, case.stochastic) - 1e-9


@checked
@given(seeds)
def test_geometric_weights_give_bound_gamma_and_no_weights_beat_bound_horizon(seed: int) -> None:
    case = Case(seed)
    best = bound_horizon(case.mdp, case.stochastic, case.q)
    geometric = (1 - case.gamma) * case.gamma ** np.arange(int(-40 / math.log(case.gamma)) + 2)
    b = bound_weighted(case.mdp, case.stochastic, case.q, geometric / geometric.sum())
    expected = bound_gamma(case.mdp, case.stochastic, case.q)
    terms = [(x.reward, x.mismatch, x.horizon) for x in (b, expected)]
    assert terms[0] == pytest.approx(terms[1], abs=1e-8)
    assert best.weights.sum() == pytest.approx(1)
    for weights in case.rng.dirichlet(np.ones(len(best.weights)), 5):
        mixed = 0.9 * best.weights + 0.1 * weights
        assert bound_weighted(case.mdp, case.stochastic, case.q, mixed).value <= best.value + 1e-10


def trajectories(case: Case, horizon: int) -> list[tuple[float, float, float]]:
    """π q(τ), π p(τ) and r of the last step, for all s_0, a_0, ..., s_T, a_T."""
    states, actions = case.reward.shape
    rows = []
    for path in itertools.product(itertools.product(range(states), range(actions)), repeat=horizon + 1):
        learned = real = case.start[path[0][0]] * case.stochastic[path[0]]
        for (s, a), following in itertools.pairwise(path):
            learned *= case.q[s, a, following[0]] * case.stochastic[following]
            real *= case.p[s, a, following[0]] * case.stochastic[following]
        rows.append((learned, real, case.reward[path[-1]]))
    return rows


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seeds)
def test_the_gap_is_a_kl_over_all_trajectories(seed: int) -> None:
    case = Case(seed, states=2, actions=2)
    weights = case.rng.dirichlet(np.ones(4))
    every = [trajectories(case, horizon) for horizon in range(4)]
    total = sum(case.gamma**T * real * r for T, rows in enumerate(every) for _, real, r in rows)
    gap = sum(
        w * learned * math.log(w * learned / (case.gamma**T * real * r / total))
        for T, (w, rows) in enumerate(zip(weights, every, strict=True))
        for learned, real, r in rows
        if learned > 0
    )
    assert math.log(total) - bound_weighted(case.mdp, case.stochastic, case.q, weights).value == pytest.approx(
        gap, abs=1e-9
    )


@checked
@given(seeds)
def test_any_closed_loop_is_a_lower_bound_and_agrees_with_its_recursion(seed: int) -> None:
    case = Case(seed)
    shape = case.reward.shape
    stop = case.rng.uniform(0.1, 1, shape)
    actions, start = case.rng.dirichlet(np.ones(shape[1]), shape[0]), case.rng.dirichlet(np.ones(shape[0]))
    b = bound_closed_loop(case.mdp, case.stochastic, ClosedLoop(start, actions, stop, as_dynamics(case.q)))

    go, values = 1 - stop, np.zeros(shape[0])
    for _ in range(500):
        stopped = stop * (np.log(case.reward) - np.log(stop))
        went = go * (math.log(case.gamma) - np.log(np.where(go > 0, go, 1)) - case.kl() + case.q @ values)
        values = (actions * (stopped + went - np.log(actions / case.stochastic))).sum(axis=1)
    assert b.value == pytest.approx(start @ (values - np.log(start / case.start)), abs=1e-8)
    assert b.value <= log_return(case.mdp, case.stochastic) + 1e-9


@checked
@given(seeds)
def test_the_tilt_maximises_what_it_says(seed: int) -> None:
    case = Case(seed)
    p, x = as_dynamics(case.p), case.rng.normal(scale=3, size=len(case.start))
    q, best = tilt(p, x)
    achieved = (q @ x).reshape(best.shape) - kl(q, p)
    assert achieved == pytest.approx(best, abs=1e-9)
    assert ((case.q @ x) - case.kl() <= best + 1e-9).all()
    assert tilt(p, x[p.indices])[0].toarray() == pytest.approx(q.toarray())
    assert tilt(p, 1e6 * x)[0].sum(axis=1) == pytest.approx(1)  # no overflow


def test_a_model_that_goes_where_the_world_does_not_bounds_nothing() -> None:
    p, q = np.eye(2)[[0, 1]].reshape(2, 1, 2), np.full((2, 1, 2), 0.5)
    mdp = FiniteMDP(p, np.ones((2, 1)), 0.9)
    assert bound_1(mdp, mdp.uniform(), q).value == -math.inf
    assert bound_horizon(mdp, mdp.uniform(), q).value == pytest.approx(0.0)  # all of its weight is on T = 0
    assert kl(as_dynamics(q), mdp.p) == pytest.approx(np.full((2, 1), math.inf))


def test_terms_of_a_bound() -> None:
    assert Bound(reward=3.0, mismatch=1.0, horizon=0.5).value == 2.5


good = np.full((2, 3, 2), 0.5), np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FiniteMDP(good[0] * 2, good[1], 0.9), "each row of p is a distribution"),
        (lambda: FiniteMDP(good[0][0], good[1], 0.9), r"p has shape \(3, 2\): give a dense"),
        (lambda: FiniteMDP(sp.csr_array(np.eye(3)[:, :2]), good[1], 0.9), r"p has shape \(3, 2\): a sparse one"),
        (lambda: FiniteMDP(good[0], np.ones(2), 0.9), r"reward has shape \(2,\)"),
        (lambda: FiniteMDP(good[0], sp.csr_array(np.ones((2, 3))), 0.9), r"reward has shape \(2, 3\)"),
        (lambda: FiniteMDP(good[0], good[1] * np.nan, 0.9), "not finite"),
        (lambda: FiniteMDP(*good, gamma=1.0), r"gamma=1.0 lies outside \(0, 1\)"),
        (lambda: FiniteMDP(*good, gamma=0.9, start=2), "start=2 is no state: the states are 0 to 1"),
        (lambda: FiniteMDP(*good, gamma=0.9, start=[0.5, 0.6]), "start is a distribution over the 2 states"),
        (lambda: FiniteMDP(good[0], -good[1], 0.9).log_reward, r"met r = -1: use mdp.shifted\(2\)"),
        (lambda: log_return(FiniteMDP(good[0], -good[1], 0.9), np.full((2, 3), 1 / 3)), "met R = -10: use mdp.shifted"),
        (lambda: bound_1(FiniteMDP(*good, 0.9), np.ones((2, 3)), good[0]), r"policy is π\(a\|s\)"),
        (lambda: bound_1(FiniteMDP(*good, 0.9), np.ones((2, 3)) / 3, np.ones((1, 6, 1))), r"q has shape \(6, 1\)"),
        (lambda: bound_gamma(FiniteMDP(good[0], good[0], 0.9), np.ones((2, 3)) / 3, good[0]), r"use mdp.averaged\(\)"),
        (lambda: bound_weighted(FiniteMDP(*good, 0.9), np.ones((2, 3)) / 3, good[0], [1.0, 1.0]), "weights is a"),
        (lambda: bound_weighted(FiniteMDP(*good, 0.9), np.ones((2, 3)) / 3, [good[0]], [0.5, 0.5]), "q has 1 steps"),
        (lambda: gridworld(np.zeros(3), (0, 0), 1, 2, 0.5), r"walls has shape \(3,\)"),
        (lambda: gridworld(np.zeros((3, 3)), (0, 0), 1, 2, 1.5), "noise=1.5 is a probability"),
        (lambda: block_average(figure_2b().p, (15, 15), 4), "block=4 does not divide"),
        (lambda: from_gymnasium(gym.make("CartPole-v1"), 0.9), "has no transition table"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("data", "columns", "ends", "possible"),
    [
        ([0.0, 1.0, 1.0], [0, 1, 1], [0, 2, 3], 2),  # a stored zero
        ([0.5, 0.25, 0.25, 1.0], [1, 0, 1, 0], [0, 3, 4], 3),  # a transition in two parts
    ],
)
def test_an_mdp_leaves_the_callers_arrays_alone(
    data: list[float], columns: list[int], ends: list[int], possible: int
) -> None:
    p = sp.csr_array((np.array(data), np.array(columns), np.array(ends)), shape=(2, 2))
    mdp = FiniteMDP(p, np.ones((2, 1)), 0.9)
    assert mdp.p.nnz == possible
    for now, before in ((p.data, data), (p.indices, columns), (p.indptr, ends)):
        np.testing.assert_array_equal(now, before)


def naive_grid(walls: np.ndarray, noise: float, moves: list[tuple[int, int]]) -> np.ndarray:
    """p of a gridworld, cell by cell."""
    height, width = walls.shape
    following = np.empty((height * width, len(moves)), dtype=int)
    for (i, j), (a, (di, dj)) in itertools.product(np.ndindex(height, width), enumerate(moves)):
        free = 0 <= i + di < height and 0 <= j + dj < width and not walls[i + di, j + dj]
        following[i * width + j, a] = (i + di) * width + j + dj if free else i * width + j
    p = np.zeros((*following.shape, height * width))
    for s, a in np.ndindex(*following.shape):
        p[s, a, following[s, a]] += 1 - noise
        for b in range(len(moves)):
            p[s, a, following[s, b]] += noise / len(moves)
    return p


MOVES = [(-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)]


@pytest.mark.parametrize(
    ("mdp", "walls", "noise", "moves", "goal", "low", "high"),
    [
        (figure_2a_left(), WALLS_2A, 0.5, MOVES[:4], 9, 1e-3, 10),
        (figure_2a_right(), WALLS_2A, 0.5, MOVES[:4], 9, 1e-5, 1e9),
        (figure_2b(), WALLS_2B, 0.0, MOVES, 2 * 15 + 12, 1, 100),
        (figure_3b(), WALLS_2A, 0.5, MOVES[:4], 9, 1, 10),
        (gridworld(np.eye(4, 6)[::-1], (3, 4), 1, 2, 0.2), np.eye(4, 6)[::-1], 0.2, MOVES[:4], 22, 1, 2),
    ],
)
def test_grids_cell_by_cell(
    mdp: FiniteMDP, walls: np.ndarray, noise: float, moves: list, goal: int, low: float, high: float
) -> None:
    expected = naive_grid(walls.astype(bool), noise, moves)
    assert mdp.p.toarray().reshape(expected.shape) == pytest.approx(expected)
    assert (np.delete(mdp.reward, goal, axis=0) == low).all()
    assert (mdp.reward[goal] == high).all()
    assert mdp.start[0] == 1
    assert mdp.gamma == 0.9


def test_walls_of_the_paper() -> None:
    assert {(i, j) for i, j in np.argwhere(WALLS_2A)} == set(itertools.product(range(6), (4, 5)))
    assert {(i, j) for i, j in np.argwhere(WALLS_2B)} == {(i, 7) for i in range(8)}


def test_three_cells() -> None:
    p = figure_3a().p.toarray().reshape(3, 4, 3)
    up, right, down, left = range(4)
    np.testing.assert_array_equal(p[0], np.eye(3)[[0, 1, 0, 0]])
    np.testing.assert_array_equal(p[1], np.eye(3)[[1, 2, 1, 0]])
    for stays in (up, right, down):
        np.testing.assert_array_equal(p[2, stays], [0, 0.5, 0.5])
    np.testing.assert_array_equal(p[2, left], [0, 1, 0])
    np.testing.assert_array_equal(figure_3a(60.0).reward, np.repeat([[50], [1], [60]], 4, axis=1))
    assert figure_3a().start.argmax() == 1


def test_block_average_move_by_move() -> None:
    rng = np.random.default_rng(0)
    height, width, block = 4, 6, 2
    q = random_dynamics(rng, rng.random((24, 3, 24)) < 0.1 + np.eye(24)[:, None])
    expected = np.zeros_like(q)
    for s, a, t in np.argwhere(q):
        (i, j), (i2, j2) = divmod(s, width), divmod(t, width)
        for x, y in np.ndindex(block, block):
            i3, j3 = i // block * block + x, j // block * block + y
            target = np.clip(i3 + i2 - i, 0, height - 1) * width + np.clip(j3 + j2 - j, 0, width - 1)
            expected[i3 * width + j3, a, target] += q[s, a, t] / block**2
    averaged = block_average(as_dynamics(q), (height, width), block)
    assert averaged.toarray().reshape(q.shape) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "shift"),
    [("FrozenLake", 0.0), ("FrozenLake8x8", 0.5), ("CliffWalking", 101.0), ("Taxi", 11.0)],
)
def test_a_toy_text_environment_keeps_its_return(name: str, shift: float) -> None:
    env, gamma = gym.make(max(known for known in gym.registry if known.startswith(f"{name}-"))), 0.9
    mdp = from_gymnasium(env, gamma, shift)
    table = env.unwrapped.P
    policy = np.random.default_rng(0).dirichlet(np.ones(mdp.n_actions), mdp.n_states)
    values = np.zeros(len(table))
    for _ in range(300):  # the environment's own return, which ends with its episodes
        values = np.array([
            sum(
                policy[s, a] * chance * (reward + gamma * (not end) * values[after])
                for a in table[s]
                for chance, after, reward, end in table[s][a]
            )
            for s in table
        ])  # fmt: skip
    exact = vmbpo_objective(mdp, policy, mdp.p).value  # at q = p it is the return
    assert exact == pytest.approx(env.unwrapped.initial_state_distrib @ values + shift / (1 - gamma), abs=1e-8)
    if shift:
        assert bound_horizon(mdp, policy, mdp.p).value <= log_return(mdp, policy) == pytest.approx(math.log(exact))


def big_grid(size: int) -> FiniteMDP:
    walls = np.random.default_rng(0).random((size, size)) < 0.2
    walls[0, 0] = walls[-1, -1] = False
    return gridworld(walls, (size - 1, size - 1), low=1.0, high=10.0, noise=0.3)


def test_a_60x60_grid_takes_seconds() -> None:
    mdp = big_grid(60)
    q, _ = tilt(mdp.p, np.arange(mdp.n_states) / mdp.n_states)
    policy = mdp.uniform()
    began = time.process_time()
    chain = [f(mdp, policy, q).value for f in (bound_1, bound_gamma, bound_horizon)]
    chain += [bound_closed_loop(mdp, policy, doob(mdp, policy)).value]
    assert vmbpo_objective(mdp, policy, q).value < math.exp(chain[-1]) * 2
    assert time.process_time() - began < 5
    assert chain == sorted(chain)
    assert chain[-1] == pytest.approx(log_return(mdp, policy), abs=1e-9)


def test_memory_grows_with_the_possible_transitions() -> None:
    def peak(size: int) -> tuple[int, int]:
        tracemalloc.start()
        try:
            mdp = big_grid(size)
            bound_horizon(mdp, mdp.uniform(), mdp.p)
            bound_closed_loop(mdp, mdp.uniform(), doob(mdp, mdp.uniform()))
            return tracemalloc.get_traced_memory()[1], mdp.p.nnz
        finally:
            tracemalloc.stop()

    (small, few), (large, many) = peak(30), peak(60)
    assert large / small < 1.5 * many / few  # a dense (S, S) would grow with the square
