"""Learning on a finite MDP from sampled trajectories, as in Figure 2a (left), for many seeds at once."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import rel_entr, softmax

from sb3_mismatch.tabular.mdp import Array, FiniteMDP
from sb3_mismatch.tabular.planning import Method, find_method


def learn(
    mdp: FiniteMDP,
    method: str | Method = "mnm",
    *,
    notebook: bool = True,
    seeds: Sequence[int] = (0,),
    initial: float = 0.0,
    learning_rate: float = 1e-2,
    epsilon: float = 0.5,
    steps: int = 200,
    largest_step: float = math.inf,
) -> Iterator[Array]:
    """Q of each seed, (seeds, S, A), after each iteration, for ever; the same whatever the other seeds are.

    V = max_a Q tilts q ∝ p exp(x V). One trajectory of `steps` steps, ε-greedy, takes its next states from q, and
    stores pay - c KL(q‖p) as its rewards. One update runs over all n transitions stored so far:
    Q(s,a) += (learning_rate / steps) Σ_i [ r_i + γ V(s'_i) - Q(s,a) ].

    :param method: as in `plan`; "q-learning" takes its next states from p
    :param initial: Q before the first iteration
    :param epsilon: the probability of a random action; the first trajectory is all random
    :param largest_step: the most that N(s,a) · learning_rate / steps may become; above 2 the update diverges
    :raises ValueError: when the rewards are r(s,a,s')
    """
    mdp.require_state_rewards("learn")
    row = find_method(method, notebook)
    price, exponent, pay = row.price(mdp.gamma), row.exponent(mdp.gamma), row.pay(mdp).ravel()
    rngs = [np.random.default_rng(seed) for seed in seeds]
    successors, p = padded(mdp)
    n, rows, actions = len(seeds), len(p), mdp.n_actions
    first_row = np.arange(n) * rows  # of each seed in arrays of n * rows rows
    counts = np.zeros((n, rows, p.shape[1]))
    rewards = np.zeros((n, rows))
    Q = np.full((n, rows), initial)
    explore = 1.0
    while True:
        V = Q.reshape(n, -1, actions).max(axis=-1)
        best = Q.reshape(n, -1, actions).argmax(axis=-1)
        with np.errstate(divide="ignore"):
            q = softmax(np.log(p) + exponent * V[:, successors], axis=-1)  # (n, rows, width)
        paid = pay - price * rel_entr(q, p).sum(axis=-1)
        cumulative = q.cumsum(axis=-1).reshape(n * rows, -1)
        cumulative /= cumulative[:, -1:]

        draws = np.stack([rng.random((steps, 3)) for rng in rngs], axis=1)  # (steps, n, 3)
        visited = np.empty((steps, n), dtype=int)
        states = np.stack([rng.choice(mdp.n_states, p=mdp.start) for rng in rngs])
        seed = np.arange(n)
        for t, (random, action, outcome) in enumerate(np.moveaxis(draws, 2, 1)):
            chosen = np.where(random < explore, (action * actions).astype(int), best[seed, states])
            at = states * actions + chosen
            which = (outcome[:, None] >= cumulative[first_row + at]).sum(axis=-1)
            visited[t] = (first_row + at) * p.shape[1] + which
            states = successors[at, which]
        new = np.bincount(visited.ravel(), minlength=counts.size).reshape(counts.shape)
        counts += new
        rewards += new.sum(axis=-1) * paid

        visits = counts.sum(axis=-1)
        targets = rewards + mdp.gamma * (counts * V[:, successors]).sum(axis=-1)
        rate = np.minimum(learning_rate / steps, largest_step / np.maximum(visits, 1))
        Q = Q + rate * (targets - visits * Q)
        explore = epsilon
        yield Q.reshape(n, -1, actions)


def padded(mdp: FiniteMDP) -> tuple[npt.NDArray[np.int_], Array]:
    """Each row's possible next states and their probabilities, filled up with probability 0. Shapes (S*A, width)."""
    counts = np.diff(mdp.p.indptr)
    filled = np.arange(counts.max()) < counts[:, None]
    successors, p = np.zeros(filled.shape, dtype=int), np.zeros(filled.shape)
    successors[filled], p[filled] = mdp.p.indices, mdp.p.data
    return successors, p
