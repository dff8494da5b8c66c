"""Learning on finite MDPs, against its definition step by step."""

import itertools

import numpy as np
import pytest

from sb3_mismatch.tabular import FiniteMDP, figure_3a, learn, until, value_iteration


def small_mdp() -> FiniteMDP:
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(5), (5, 3)) * (rng.random((5, 3, 5)) < 0.7) + 0.01 * np.eye(5)[:, None]
    return FiniteMDP(p / p.sum(axis=-1, keepdims=True), rng.uniform(0.1, 3, (5, 3)), 0.9, start=2)


def naive(mdp: FiniteMDP, method: str, seed: int, iterations: int, steps: int, rate: float) -> np.ndarray:
    """The definition: lists of all transitions, one seed, from the paper's code; with the draws of `learn`."""
    rng = np.random.default_rng(seed)
    p = mdp.p.toarray().reshape(mdp.n_states, mdp.n_actions, -1)
    Q = np.zeros(mdp.reward.shape)
    history: list[tuple[int, int, float, int]] = []
    epsilon = 1.0
    for _ in range(iterations):
        V = Q.max(axis=1)
        q = p * np.exp(V) if method in ("mnm", "vmbpo", "no-classifier") else p.copy()
        q /= q.sum(axis=-1, keepdims=True)
        cost = np.where(p > 0, q * np.log(np.where(p > 0, q / np.where(p > 0, p, 1), 1)), 0).sum(axis=-1)
        pay = mdp.reward if method in ("vmbpo", "q-learning") else (1 - mdp.gamma) * np.log(mdp.reward)
        pay = pay - cost if method in ("mnm", "vmbpo") else pay
        draws = rng.random((steps, 3))
        s = rng.choice(mdp.n_states, p=mdp.start)
        for random, action, outcome in draws:
            a = int(action * mdp.n_actions) if random < epsilon else int(Q[s].argmax())
            s2 = int(np.argmax(np.cumsum(q[s, a]) > outcome))
            history.append((s, a, pay[s, a], s2))
            s = s2
        new = Q.copy()
        for s, a, r, s2 in history:
            new[s, a] += rate / steps * (r + mdp.gamma * V[s2] - Q[s, a])
        Q, epsilon = new, 0.5
    return Q


@pytest.mark.parametrize("method", ["mnm", "vmbpo", "q-learning", "no-classifier", "log-reward"])
def test_learning_is_its_definition(method: str) -> None:
    mdp = small_mdp()
    states = learn(mdp, method, seeds=(7, 8), steps=30, learning_rate=0.3)
    Q = next(itertools.islice(states, 19, None))
    for got, seed in zip(Q, (7, 8), strict=True):
        assert got == pytest.approx(naive(mdp, method, seed, 20, 30, 0.3), abs=1e-9)


def test_a_seed_is_the_same_in_any_company() -> None:
    alone = next(itertools.islice(learn(figure_3a(), seeds=[3]), 9, None))
    among = next(itertools.islice(learn(figure_3a(), seeds=[1, 3, 2]), 9, None))
    np.testing.assert_array_equal(alone[0], among[1])
    assert not np.array_equal(among[0], among[1])


def test_the_step_diverges_unless_it_is_capped() -> None:
    mdp = small_mdp()
    highest = mdp.reward.max() / (1 - mdp.gamma)
    free = next(itertools.islice(learn(mdp, "q-learning", learning_rate=1.0), 100, None))
    capped = next(itertools.islice(learn(mdp, "q-learning", learning_rate=1.0, largest_step=1.0), 400, None))
    assert abs(free).max() > 100 * highest
    *_, best = until(value_iteration(mdp))
    assert capped[0] == pytest.approx(best.Q, rel=0.02)


def test_rewards_on_transitions_are_refused() -> None:
    mdp = FiniteMDP(np.ones((1, 1, 1)), np.ones((1, 1, 1)), 0.9)
    with pytest.raises(ValueError, match=r"learn takes r\(s,a\) and met r\(s,a,s'\): use mdp.averaged\(\)"):
        next(learn(mdp))
