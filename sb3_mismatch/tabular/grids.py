"""The gridworlds of the paper: Eysenbach, Khazatsky, Levine, Salakhutdinov, "Mismatched No More: Joint Model-Policy
Optimization for Model-Based RL", NeurIPS 2022, Figures 2 and 3, as its code builds them."""

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from sb3_mismatch.tabular.mdp import Dynamics, FiniteMDP

MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)])
"""Actions: up, right, down, left, and in some grids stay; rows (di, dj)."""

UP, RIGHT, DOWN, LEFT, STAY = range(5)


def gridworld(
    walls: npt.ArrayLike,
    goal: tuple[int, int],
    low: float,
    high: float,
    noise: float,
    start: tuple[int, int] = (0, 0),
    stay: bool = False,
    gamma: float = 0.9,
) -> FiniteMDP:
    """p(·|s,a) = (1 - ε) δ[next(s,a)] + (ε/A) Σ_b δ[next(s,b)]; a move into a wall or off the grid stays.

    State (i, j) has index i * width + j; walls keep theirs, and are never entered.

    :param walls: True where a wall stands, shape (height, width)
    :param low: reward of an action in any state but the goal
    :param high: reward of an action in the goal, which is not absorbing
    :param noise: ε, the probability of a random action
    :param stay: whether there is a fifth action, which stays
    """
    walls = np.asarray(walls, dtype=bool)
    if walls.ndim != 2:
        raise ValueError(f"walls has shape {walls.shape}: give a (height, width) array, True where a wall stands")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise={noise} is a probability: choose it between 0 and 1")
    moves = MOVES if stay else MOVES[:STAY]
    cells = np.indices(walls.shape).reshape(2, -1).T  # (S, 2)
    target = np.clip(cells[:, None] + moves, 0, np.subtract(walls.shape, 1))  # (S, A, 2)
    blocked = walls[target[..., 0], target[..., 1]]
    following = np.where(blocked, np.arange(len(cells))[:, None], np.ravel_multi_index(tuple(target.T), walls.shape).T)

    states, actions = following.shape
    rows = np.arange(states * actions)
    intended = sp.csr_array((np.ones(rows.size), (rows, following.ravel())), shape=(rows.size, states))
    slipped = (np.repeat(rows, actions), np.repeat(following, actions, axis=0).ravel())
    random = sp.csr_array((np.full(slipped[0].size, 1 / actions), slipped), shape=intended.shape)

    reward = np.full((states, actions), low)
    reward[np.ravel_multi_index(goal, walls.shape)] = high
    p = (1 - noise) * intended + noise * random
    return FiniteMDP(p, reward, gamma, int(np.ravel_multi_index(start, walls.shape)))


def _walls(size: int, rows: slice, columns: slice) -> npt.NDArray[np.bool_]:
    walls = np.zeros((size, size), dtype=bool)
    walls[rows, columns] = True
    return walls


WALLS_2A = _walls(10, slice(0, 6), slice(4, 6))
"""The walls of Figures 2a and 3b, (10, 10)."""

WALLS_2B = _walls(15, slice(0, 8), slice(7, 8))
"""The walls of Figure 2b, (15, 15)."""


def figure_2a_left() -> FiniteMDP:
    """A stochastic grid with a sparse reward, in which MnM, VMBPO and Q-learning learn."""
    return gridworld(WALLS_2A, goal=(0, 9), low=1e-3, high=10.0, noise=0.5)


def figure_2a_right() -> FiniteMDP:
    """The same grid with a huge goal, whose optimistic dynamics are drawn."""
    return gridworld(WALLS_2A, goal=(0, 9), low=1e-5, high=1e9, noise=0.5)


def figure_2b() -> FiniteMDP:
    """A deterministic grid with a thin wall, which an inaccurate model does not see."""
    return gridworld(WALLS_2B, goal=(2, 12), low=1.0, high=100.0, noise=0.0, stay=True)


def figure_3a(risky: float = 51.0) -> FiniteMDP:
    """Three cells in a row: a safe one pays 50, the start 1, and a risky one, which throws back, `risky`."""
    p = np.zeros((3, 4, 3))
    for state, action in np.ndindex(2, 4):
        p[state, action, np.clip(state + MOVES[action, 1], 0, 2)] = 1
    for action in range(4):
        p[2, action, min(2 + MOVES[action, 1], 2)] += 0.5
        p[2, action, 1] += 0.5
    return FiniteMDP(p, np.repeat([[50.0], [1.0], [risky]], 4, axis=1), gamma=0.9, start=1)


def figure_3b() -> FiniteMDP:
    """The grid of Figure 2a with rewards 1 and 10, in which the bounds are compared."""
    return gridworld(WALLS_2A, goal=(0, 9), low=1.0, high=10.0, noise=0.5)


def block_average(q: Dynamics, shape: tuple[int, int], block: int = 3) -> Dynamics:
    """The inaccurate model: each action's displacements, averaged over blocks of block x block cells.

    Targets are clipped to the grid, and walls are ignored.

    :param shape: height and width of the grid whose states q describes
    :raises ValueError: when the blocks do not divide the grid
    """
    height, width = shape
    if height % block or width % block:
        raise ValueError(f"block={block} does not divide the grid's sides {shape}: choose a common divisor")
    states, actions = q.shape[1], q.shape[0] // q.shape[1]
    q = q.tocoo()
    state, action = np.divmod(q.row, actions)
    (i, j), (next_i, next_j) = np.divmod(state, width), np.divmod(q.col, width)
    moves = np.stack([i // block, j // block, action, next_i - i, next_j - j])
    moves, which = np.unique(moves, axis=1, return_inverse=True)  # each block's distinct moves, (5, n)
    mean = np.bincount(which.ravel(), q.data) / block**2

    within = np.indices((block, block)).reshape(2, -1, 1)  # the cells of a block, (2, block², 1)
    i, j = moves[0] * block + within[0], moves[1] * block + within[1]  # (block², n)
    targets = np.clip(i + moves[3], 0, height - 1) * width + np.clip(j + moves[4], 0, width - 1)
    rows = (i * width + j) * actions + moves[2]
    weights = np.broadcast_to(mean, rows.shape)
    return sp.csr_array((weights.ravel(), (rows.ravel(), targets.ravel())), shape=(states * actions, states))
