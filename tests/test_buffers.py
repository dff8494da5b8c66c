"""Real transitions against an environment that tells its place, and mixed minibatches row by row."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.testing import assert_close
from toys import CPU, collected, counters

from sb3_mismatch.buffers import (
    STEPS_AHEAD,
    ImaginedBuffer,
    MixedReplayBuffer,
    RealTransitions,
    latest_episodes,
    real_transitions,
    start_states,
)
from sb3_mismatch.imagination import ImaginedRows
from sb3_mismatch.objectives import OBJECTIVES, Payment
from sb3_mismatch.observations import FlatObservations, Normalization
from sb3_mismatch.randomness import RandomStreams


def read(buffer: ReplayBuffer, normalize: VecNormalize | None = None) -> RealTransitions:
    return real_transitions(buffer, FlatObservations(buffer.observation_space), CPU, normalize)


def assert_counted(data: RealTransitions, as_dict: bool = False) -> None:
    """Every row is one of the counters': its name, episode and t tell all else."""
    batch = data.batch
    # "when", (episode, t), comes before "who" in a Dict.
    name, episode, t = batch.observations[:, [2, 0, 1] if as_dict else [0, 1, 2]].unbind(1)
    expected = batch.observations.clone()
    expected[:, 1 if as_dict else 2] += 1
    assert_close(batch.next_observations, expected)
    assert_close(batch.rewards.squeeze(1), 100 * episode + t)
    assert_close(batch.dones.squeeze(1).bool(), (episode % 2 == 0) & (t == 2))
    assert (name == name.round()).all()


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("steps", [10, 25])
def test_real_rows(n_envs, as_dict, steps):
    """All rows, once each, of a buffer part full (10 of 20 steps) and overwritten (25); time limits are no ends."""
    buffer = collected(counters(n_envs, as_dict), steps, size=20 * n_envs)
    data = read(buffer)
    kept = min(steps, 20)
    assert len(data) == kept * n_envs
    assert len(data.position.unique()) == len(data)
    assert_counted(data, as_dict)
    names = data.batch.observations[:, 2 if as_dict else 0]
    assert [(names == i).sum().item() for i in range(n_envs)] == [kept] * n_envs
    # Oldest first, in each environment.
    episode, t = data.batch.observations[:, [0, 1] if as_dict else [1, 2]].unbind(1)
    for i in range(n_envs):
        assert ((10 * episode + t)[names == i].diff() > 0).all()
    # Seven steps hold one end of an even and one limit of an odd episode.
    assert data.batch.dones.sum() == n_envs * {10: 2, 25: 3}[steps]


def test_position_is_the_place_in_the_buffer():
    buffer = collected(counters(3), 10, size=60)
    data = read(buffer)
    assert_close(data.position, th.arange(30))
    place = data.position.numpy()
    np.testing.assert_array_equal(data.batch.observations.numpy(), buffer.observations[place // 3, place % 3])
    np.testing.assert_array_equal(data.batch.actions.numpy(), buffer.actions[place // 3, place % 3])


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("steps", [10, 25, 39])
def test_compact_buffer_gives_true_next_observations_only(n_envs, steps):
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    buffer = collected(counters(n_envs), steps, size=20 * n_envs, **kwargs)
    data = read(buffer)
    batch = data.batch
    assert_close(batch.next_observations, batch.observations + th.tensor([0.0, 0.0, 1.0]))
    assert_close(batch.rewards.squeeze(1), 100 * batch.observations[:, 1] + batch.observations[:, 2])
    assert not batch.dones.any()
    valid = [row for row in range(buffer.size()) if not (buffer.full and row == buffer.pos)]
    assert len(data) == (buffer.dones[valid] == 0).sum()


def test_ends_stored_at_the_clip_of_vec_normalize_are_left_out():
    env = VecNormalize(counters(), clip_obs=1.5, training=False)
    env.obs_rms.mean, env.obs_rms.var = np.array([0.0, 5.0, 1.5]), np.array([1.0, 4.0, 1.0])
    buffer = collected(env, 70)
    data = read(buffer, env)
    assert_counted(data)
    # The last t, 3 or 4, stands at 1.5 or more: no row with an end is told apart from a clipped one.
    assert len(data) == 70 - 20
    stored = buffer.next_observations[:70, 0] - buffer.observations[:70, 0]
    wrong = (np.abs(stored - [0, 0, 1]) > 1e-3).any(axis=1)
    assert wrong.sum() >= 10
    assert not wrong[data.position].any()
    assert len(read(buffer)) == 70


def test_ends_stored_within_the_clip_stay():
    env = VecNormalize(counters())
    data = read(collected(env, 70), env)
    assert len(data) == 70
    assert data.batch.dones.sum() == 10


@pytest.mark.parametrize("column", ["observations", "next_observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_refused_by_name(column, value):
    buffer = collected(counters(2), 10)
    array = getattr(buffer, column)
    array[7, 1] = value
    with pytest.raises(ValueError, match=f"replay buffer's {column.replace('_', ' ')} hold .*row 7, environment 1"):
        read(buffer)


def test_refused_row_of_a_compact_buffer_is_named_by_its_place():
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    buffer = collected(counters(), 25, size=20, **kwargs)
    buffer.rewards[12] = np.nan
    assert buffer.pos == 5
    with pytest.raises(ValueError, match=r"rewards hold nan \(row 12, environment 0"):
        read(buffer)


# -- imagined rows --


def numbered(first: int, n: int) -> ImaginedRows:
    """Rows of two steps that carry their number, in each column another way; observations have two dimensions."""
    x = th.arange(first, first + n, dtype=th.float32).unsqueeze(1)
    return ImaginedRows(
        x.repeat(1, 2), -x, x.repeat(1, 2) + 0.5, x % 2, x * th.tensor([10.0, 20.0]), x.repeat(1, 2), x.repeat(1, 2), x
    )


def test_rows_are_drawn_whole_and_all():
    buffer = ImaginedBuffer()
    assert len(buffer) == 0
    buffer.replace(numbered(0, 7))
    assert len(buffer) == 7
    drawn = buffer.sample(500)
    numbers = drawn.observations[:, 0].long()
    assert set(numbers.tolist()) == set(range(7))
    for column, expected in zip(drawn, numbered(0, 7), strict=True):
        assert_close(column, expected[numbers])


def test_rows_last_until_the_next_fit():
    buffer = ImaginedBuffer()
    buffer.replace(numbered(0, 7))
    buffer.replace(numbered(20, 2))
    assert len(buffer) == 2
    assert set(buffer.sample(50).observations[:, 0].tolist()) == {20.0, 21.0}


# -- mixed minibatches --

MARK = 1e4


def marked(flat: FlatObservations, n_steps: int = 1, n: int = 50) -> ImaginedRows:
    """
    Imagined rows that end, whose observations are far from every real one, and whose action a tells the rest: of
    1 + floor(a n_steps) living steps, step j earns 100 a + j and has the log-ratio j - a. What follows is huge.
    """
    action, step = th.linspace(0.01, 0.99, n).unsqueeze(1), th.arange(n_steps)
    alive = (step <= action * n_steps).float()
    behind = 1e6 * (1 - alive)
    observations = th.full((n, flat.dim), MARK)
    rewards, log_ratio = 100 * action + step + behind, step - action + behind
    return ImaginedRows(observations, action, observations + 1, th.ones(n, 1), rewards, log_ratio, -log_ratio, alive)


def mixed(real: ReplayBuffer, ratio: float, objective: str = "vmbpo", steps: int = 10, n_steps: int = 1) -> Any:
    flat = FlatObservations(real.observation_space)
    imagined = ImaginedBuffer()
    imagined.replace(marked(flat, n_steps))
    payment = Payment(OBJECTIVES[objective], 0.9)
    return MixedReplayBuffer(real, imagined, ratio, steps, payment, RandomStreams(CPU, 0), flat)


@pytest.fixture(scope="module")
def real():
    return collected(counters(2), 30)


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_every_minibatch_holds_the_exact_ratio(real, ratio, batch_size):
    buffer = mixed(real, ratio)
    for _ in range(10):
        batch = buffer.sample(batch_size)
        assert all(len(column) == batch_size for column in batch[:5])
        assert (batch.observations[:, 0] != MARK).sum() == round(ratio * batch_size)


@pytest.mark.parametrize("promised", [1, 5, STEPS_AHEAD + 3])
def test_minibatches_never_run_out(real, promised):
    buffer = mixed(real, 0.5, steps=promised)
    for _ in range(promised + 2):
        assert (buffer.sample(8).observations[:, 0] == MARK).sum() == 4


def test_rows_stay_whole(real):
    """Columns of one row belong together, and what it earns is r or r + log p/q, here 100 a - a."""
    batch = mixed(real, 0.5).sample(200)
    imagined = batch.observations[:, 0] == MARK
    assert_close(batch.rewards[imagined], 99 * batch.actions[imagined])
    assert_close(batch.next_observations[imagined], batch.observations[imagined] + 1)
    assert batch.dones[imagined].all()
    ours = RealTransitions(ReplayBufferSamples(*(column[~imagined] for column in batch[:5])), th.arange(100))
    assert_counted(ours)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(
    ("objective", "paid"),
    [
        ("mbpo", lambda r, c, mean: r),
        ("vmbpo", lambda r, c, mean: r + c),
        ("mnm-approx", lambda r, c, mean: r + 0.1 * (c - mean)),
        ("mnm", lambda r, c, mean: 0.1 * math.log(r) + c - 0.1 * math.log(0.1)),
    ],
)
def test_imagined_rows_earn_the_discounted_sum_of_their_living_steps(real, objective, paid, n_steps):
    """Σ_j γ^j r̃_j; the mean is over all living steps of what is made at once."""
    batch = mixed(real, 0.5, objective, steps=1, n_steps=n_steps).sample(40)
    lives = [[(100 * a + j, j - a) for j in range(1 + int(a * n_steps))] for a in batch.actions[20:, 0].tolist()]
    mean = float(np.mean([c for life in lives for _, c in life]))
    expected = [sum(0.9**j * paid(r, c, mean) for j, (r, c) in enumerate(life)) for life in lives]
    assert_close(batch.rewards[20:, 0], th.tensor(expected), atol=1e-4, rtol=1e-5)
    assert_close(batch.discounts, th.tensor([0.9] * 20 + [0.9**n_steps] * 20).unsqueeze(1))
    assert len({len(life) for life in lives}) == n_steps


def test_real_rows_are_paid_by_the_objective(real):
    """Under a log objective (1 - γ) log r - (1 - γ) log(1 - γ); the shift is 1, for the counters' first reward is 0."""
    buffer = mixed(real, 1.0, "mnm")
    buffer.payment = replace(buffer.payment, offset=1.0, lowest=1.0)
    batch = buffer.sample(50)
    raw = 100 * batch.observations[:, 1:2] + batch.observations[:, 2:]
    assert_close(batch.rewards, 0.1 * (raw + 1).log() - 0.1 * np.log(0.1))


@pytest.mark.parametrize("objective", ["mbpo", "vmbpo"])
def test_real_rows_alone_are_the_real_buffers_own(real, objective):
    np.random.seed(0)
    th.manual_seed(0)
    expected = [real.sample(32) for _ in range(3)]
    after = np.random.rand(), th.rand(1)
    buffer = mixed(real, 1.0, objective)
    np.random.seed(0)
    th.manual_seed(0)
    for batch in expected:
        for ours, theirs in zip(buffer.sample(32)[:5], batch[:5], strict=True):
            assert th.equal(ours, theirs)
    assert (np.random.rand(), th.rand(1)) == after


def test_imagined_rows_come_from_the_worlds_streams(real):
    """torch's global generator does not move, NumPy's only by the real rows' draws."""
    buffer = mixed(real, 0.5, steps=1)
    th.manual_seed(0)
    np.random.seed(0)
    buffer.sample(20)
    after = np.random.rand(), th.rand(1)
    th.manual_seed(0)
    np.random.seed(0)
    real.sample(10)
    assert (np.random.rand(), th.rand(1)) == after


def test_without_imagined_rows_all_are_real(real):
    buffer = mixed(real, 0.1)
    buffer.imagined = ImaginedBuffer()
    assert (buffer.sample(20).observations[:, 0] != MARK).all()


def test_size_and_add_are_the_real_buffers():
    real = collected(counters(), 5)
    buffer = mixed(real, 0.5)
    row = np.full((1, 3), 7.0)
    buffer.add(row, row, np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{}])
    assert buffer.size() == real.size() == 6
    assert (real.observations[5] == 7).all()


def test_n_step_rows_beside_imagined_ones():
    """Imagined rows are discounted by γ to the number of their steps, real ones by γ to their own."""
    real = collected(counters(), 40, n_steps=3, gamma=0.9)
    batch = mixed(real, 0.5, n_steps=2).sample(200)
    imagined = batch.observations[:, 0] == MARK
    assert_close(batch.discounts[imagined], th.full((100, 1), 0.81))
    t, even = batch.observations[~imagined][:, 2], batch.observations[~imagined][:, 1] % 2 == 0
    left = th.where(even, 3 - t, 4 - t).clamp(max=3)
    # The newest row of an unfinished episode is cut as well.
    whole = batch.observations[~imagined][:, 1] < batch.observations[~imagined][:, 1].max()
    assert_close(batch.discounts[~imagined].squeeze(1)[whole], (0.9**left)[whole])
    assert_close(mixed(real, 0.0).sample(4).discounts, th.full((4, 1), 0.9))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_dict_rows(ratio):
    real = collected(counters(2, as_dict=True), 30)
    assert isinstance(real, DictReplayBuffer)
    batch = mixed(real, ratio).sample(20)
    assert isinstance(batch, DictReplayBufferSamples)
    assert {key: part.shape for key, part in batch.observations.items()} == {"when": (20, 2, 1), "who": (20, 1)}
    imagined = batch.observations["who"][:, 0] == MARK
    assert imagined.sum() == round((1 - ratio) * 20)
    assert (batch.observations["when"][imagined] == MARK).all()
    when, then = (x["when"][~imagined].squeeze(2) for x in (batch.observations, batch.next_observations))
    assert_close(then, when + th.tensor([0.0, 1.0]))
    assert all(part.dtype == th.float32 for part in (*batch.observations.values(), batch.rewards, batch.dones))


def test_vec_normalize_serves_both_alike():
    env = VecNormalize(counters(2), clip_obs=3.0, clip_reward=0.1)
    real = collected(env, 30)
    buffer = mixed(real, 0.5, n_steps=3)
    batch = buffer.sample(100, env=env)
    scale = Normalization.of(env, buffer.flat, CPU)
    imagined = batch.dones.squeeze(1).bool() & (batch.observations[:, 0] == 3)
    assert imagined.sum() == 50
    # MARK is far beyond the clip.
    assert (batch.observations[imagined] == 3).all()
    # The reward of each step is normalised and clipped; the log-ratio comes on top, in its own unit.
    actions, expected = batch.actions[imagined], th.zeros(50, 1)
    for j in range(3):
        paid = scale.reward(100 * actions + j) + j - actions
        expected += 0.9**j * paid * (j <= 3 * actions)
    assert_close(batch.rewards[imagined], expected)
    clipped = scale.reward(100 * actions) == np.float32(0.1)
    assert clipped.any()
    assert not clipped.all()
    assert batch.observations[~imagined].abs().max() <= 3
    assert batch.rewards[~imagined].max() <= np.float32(0.1)


# -- states to imagine from --


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize(
    ("rows", "reward", "share"),
    [((4, 5), 0.0, 0.02), ((4, 5), 1.0, 0.265), ((4, 5), -1.0, 0.265), ((2, 3), 1.0, 0.02), ((0, 20), 1.0, 0.4)],
    ids=["nothing", "a reward", "a loss", "an end's", "many"],
)
def test_a_quarter_are_states_in_which_rewards_stood_out(rows, reward, share, as_dict):
    """Of 2 x 25 rows; with row 2 an episode ends."""
    buffer = collected(counters(2, as_dict), 25)
    # What a counter earns tells its row.
    earned, paid = buffer.rewards[:25, 1].copy(), slice(*rows)
    buffer.rewards[:] = 0
    buffer.rewards[paid, 1] = reward
    states = start_states(buffer, FlatObservations(buffer.observation_space), 4000, CPU)
    name, episode, t = states[:, [2, 0, 1] if as_dict else [0, 1, 2]].unbind(1)
    drawn = (name == 1) & th.isin(100 * episode + t, th.as_tensor(earned[paid]))
    assert drawn.float().mean().item() == pytest.approx(share, abs=0.03)
    assert len(states.unique(dim=0)) == 50


# -- episodes --


def test_latest_episodes():
    """The counters' whole episodes: 0 of rewards 0 1 2, 1 of 100 to 103, 2 of 200 to 202; 3 has not ended."""
    buffer = collected(counters(), 12)
    episodes = latest_episodes(buffer, FlatObservations(buffer.observation_space), most=20)
    np.testing.assert_array_equal(episodes.steps, [3, 4, 3])
    np.testing.assert_array_equal(episodes.rewards, [[0, 1, 2, 0], [100, 101, 102, 103], [200, 201, 202, 0]])
    np.testing.assert_array_equal(episodes.first_observations, [[0, 0, 0], [0, 1, 0], [0, 2, 0]])


@pytest.mark.parametrize("as_dict", [False, True])
def test_latest_episodes_of_a_full_buffer(as_dict):
    """Of 25 steps in each of two environments 13 are left: half of episode 3, then 4, 5, 6 and the first row of 7."""
    buffer = collected(counters(2, as_dict), 25, size=26)
    flat = FlatObservations(buffer.observation_space)
    episodes = latest_episodes(buffer, flat, most=2)
    np.testing.assert_array_equal(episodes.steps, [4, 3, 4, 3])
    np.testing.assert_array_equal(episodes.rewards[:, 0], [500, 600, 500, 600])
    names = episodes.first_observations[:, 2 if as_dict else 0]
    np.testing.assert_array_equal(names, [0, 0, 1, 1])
    assert len(latest_episodes(buffer, flat, most=9).steps) == 6


@pytest.mark.parametrize("size", [100, 2])
def test_no_episode_has_ended(size):
    buffer = collected(counters(), 2, size=size)
    episodes = latest_episodes(buffer, FlatObservations(buffer.observation_space), most=20)
    assert len(episodes.steps) == len(episodes.rewards) == len(episodes.first_observations) == 0
