"""A finite MDP: the real dynamics p, the reward, the discount, and where it starts."""

from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Array: TypeAlias = npt.NDArray[np.float64]
Dynamics: TypeAlias = sp.csr_array
"""q(s'|s,a), sparse (S*A, S): row s*A + a is the distribution of the next state."""


def as_dynamics(q: npt.ArrayLike | Dynamics, name: str = "q") -> Dynamics:
    """q(s'|s,a), dense (S, A, S) or sparse (S*A, S), as a sparse (S*A, S) matrix of distributions.

    :raises ValueError: when the shape is another, or a row is no distribution
    """
    if not sp.issparse(q):
        q = np.asarray(q, dtype=float)
        if q.ndim != 3 or q.shape[0] != q.shape[2]:
            raise ValueError(f"{name} has shape {q.shape}: give a dense (S, A, S) array or a sparse (S*A, S) matrix")
        q = q.reshape(-1, q.shape[2])
    q = sp.csr_array(q)
    if not q.has_canonical_format:
        q = q.copy()  # it may share its entries with the caller's
        q.sum_duplicates()
    if q.shape[1] == 0 or q.shape[0] == 0 or q.shape[0] % q.shape[1]:
        raise ValueError(f"{name} has shape {q.shape}: a sparse one has S*A rows, row s*A + a, and S columns")
    if not (q.data >= 0).all() or not np.allclose(q.sum(axis=1), 1, rtol=0, atol=1e-8):
        raise ValueError(f"each row of {name} is a distribution over next states: divide it by its sum")
    return q


def entries(values: Dynamics, pattern: Dynamics) -> Array:
    """The entries of `values` where `pattern` stores one, in its order. Shape (pattern.nnz,)."""
    rows = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
    return np.asarray(values[rows, pattern.indices])


class FiniteMDP:
    """A discounted MDP with S states and A actions, and without terminal states.

    :param p: the real dynamics p(s'|s,a): dense (S, A, S), or sparse (S*A, S) with row s*A + a; kept sparse
    :param reward: r(s,a), an (S, A) array, or r(s,a,s') in one of p's two forms
    :param gamma: the discount of one step, between 0 and 1
    :param start: the start distribution, (S,), or the index of the only start state
    :raises ValueError: when p or start is no distribution, or a shape or a number does not fit
    """

    def __init__(
        self, p: npt.ArrayLike | Dynamics, reward: npt.ArrayLike | Dynamics, gamma: float, start: npt.ArrayLike = 0
    ) -> None:
        self.p = as_dynamics(p, "p").copy()
        self.p.eliminate_zeros()
        self.n_states = self.p.shape[1]
        self.n_actions = self.p.shape[0] // self.p.shape[1]
        self.reward = self._checked_reward(reward)
        self.on_transitions: bool = sp.issparse(self.reward)
        if not 0 < gamma < 1:
            raise ValueError(f"gamma={gamma} lies outside (0, 1): the sums run over an infinite horizon")
        self.gamma = gamma
        self.start = self._checked_start(start)

    def _checked_reward(self, reward: Any) -> Any:
        if not sp.issparse(reward):
            reward = np.asarray(reward, dtype=float)
        state_action = self.n_states, self.n_actions
        transition = *state_action, self.n_states
        if reward.shape == transition:
            reward = sp.csr_array(reward.reshape(self.p.shape))
        if reward.shape != (self.p.shape if sp.issparse(reward) else state_action):
            raise ValueError(
                f"reward has shape {reward.shape} where p has {self.n_states} states and {self.n_actions} actions: "
                f"give r(s,a) as {state_action}, or r(s,a,s') as {transition} or in the sparse form of p"
            )
        reward = self._on_transitions(entries(sp.csr_array(reward), self.p)) if sp.issparse(reward) else reward
        if not np.isfinite(reward.data).all():
            raise ValueError("reward has an entry that is not finite: replace it by a number")
        return reward

    def _checked_start(self, start: npt.ArrayLike) -> Array:
        start = np.asarray(start, dtype=float)
        if start.ndim == 0:
            if float(start) not in range(self.n_states):
                raise ValueError(f"start={start:g} is no state: the states are 0 to {self.n_states - 1}")
            return np.bincount([int(start)], minlength=self.n_states).astype(float)
        if start.shape != (self.n_states,) or not (start >= 0).all() or not np.isclose(start.sum(), 1):
            raise ValueError(f"start is a distribution over the {self.n_states} states, or the index of one of them")
        return start

    def _on_transitions(self, data: Array) -> Dynamics:
        """The values of all possible transitions, as a matrix of p's form."""
        return sp.csr_array((data, self.p.indices, self.p.indptr), shape=self.p.shape)

    @property
    def log_reward(self) -> Any:
        """log r, in the form of `reward`.

        :raises ValueError: when a reward is not positive
        """
        data = self.reward.data if self.on_transitions else self.reward
        if (low := data.min()) <= 0:
            raise ValueError(f"log r needs positive rewards and met r = {low:g}: use mdp.shifted({1 - low:g}), say")
        return self._on_transitions(np.log(data)) if self.on_transitions else np.log(data)

    def expect(self, x: Array | Dynamics, q: Dynamics) -> Array:
        """E_q x(s,a,s'), or x(s,a) itself. Shape (S, A)."""
        return np.asarray(q.multiply(x).sum(axis=1)).reshape(self.n_states, -1) if sp.issparse(x) else np.asarray(x)

    def averaged(self) -> "FiniteMDP":
        """The same MDP with r(s,a) = E_p r(s,a,s'), which leaves the return of every policy as it is."""
        return FiniteMDP(self.p, self.expect(self.reward, self.p), self.gamma, self.start)

    def shifted(self, constant: float) -> "FiniteMDP":
        """The same MDP with `constant` added to each reward, which adds constant / (1 - γ) to the return."""
        reward = self._on_transitions(self.reward.data + constant) if self.on_transitions else self.reward + constant
        return FiniteMDP(self.p, reward, self.gamma, self.start)

    def require_state_rewards(self, name: str) -> None:
        """Refuse r(s,a,s') in the name of a function that holds for r(s,a).

        :raises ValueError: for r(s,a,s')
        """
        if self.on_transitions:
            raise ValueError(f"{name} takes r(s,a) and met r(s,a,s'): use mdp.averaged(), whose return is the same")

    def uniform(self) -> Array:
        """The policy that picks each action equally often. Shape (S, A)."""
        return np.full((self.n_states, self.n_actions), 1 / self.n_actions)

    def checked_policy(self, policy: npt.ArrayLike) -> Array:
        """π(a|s), an (S, A) array of distributions.

        :raises ValueError: when it is something else
        """
        policy = np.asarray(policy, dtype=float)
        shape = self.n_states, self.n_actions
        if policy.shape != shape or not (policy >= 0).all() or not np.allclose(policy.sum(axis=1), 1, rtol=0):
            raise ValueError(f"policy is π(a|s), an array of shape {shape} whose rows are distributions over actions")
        return policy

    def checked_dynamics(self, q: npt.ArrayLike | Dynamics) -> Dynamics:
        """q(s'|s,a) over this MDP's states and actions, sparse (S*A, S).

        :raises ValueError: when it is something else
        """
        q = as_dynamics(q)
        if q.shape != self.p.shape:
            raise ValueError(f"q has shape {q.shape} where p has {self.p.shape}: give it the same states and actions")
        return q


def from_gymnasium(env: gym.Env[Any, Any], gamma: float, shift: float = 0.0) -> FiniteMDP:
    """A toy-text environment (FrozenLake, CliffWalking, Taxi) from its own transition table.

    Each end of an episode leads to one more state, the last, which is never left and pays `shift` for ever.
    So the return is the environment's discounted return plus shift / (1 - γ). r(s,a) is the mean over outcomes.

    :param shift: added to each reward; the bounds need it where the environment pays nothing, or costs
    :raises ValueError: when the environment has no transition table
    """
    table = getattr(env.unwrapped, "P", None)
    start = getattr(env.unwrapped, "initial_state_distrib", None)
    if table is None or start is None:
        raise ValueError(f"{env} has no transition table P with initial_state_distrib: use a toy-text environment")
    states, actions = len(table), len(table[0])
    outcomes = np.array([
        (s * actions + a, probability, states if terminated else next_state, reward)
        for s in range(states)
        for a in range(actions)
        for probability, next_state, reward, terminated in table[s][a]
    ] + [(states * actions + a, 1.0, states, 0.0) for a in range(actions)])  # fmt: skip
    rows, probabilities, columns, rewards = outcomes.T
    rows = rows.astype(int)
    p = sp.csr_array((probabilities, (rows, columns.astype(int))), shape=((states + 1) * actions, states + 1))
    expected = np.bincount(rows, probabilities * rewards).reshape(states + 1, actions)
    return FiniteMDP(p, expected + shift, gamma, np.append(start, 0.0))
