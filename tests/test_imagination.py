"""Imagined trajectories on dynamics made by hand, row by row."""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sb3_mismatch.imagination import (
    Trajectories,
    discounting_horizon,
    horizon_at,
    imagine,
    lower_bound,
    n_step_rows,
)


class Sum:
    """s' = s + a and r = 10 s, without noise."""

    def sample(self, observations, actions):
        return observations + actions, 10 * observations


class EndAt:
    """The episode ends where s' >= 3; rewards stand."""

    def ends(self, observations, actions, next_observations):
        return next_observations >= 3

    def rewards(self, observations, actions, next_observations, learned, ends):
        return learned


def one(observations: th.Tensor) -> th.Tensor:
    return th.ones_like(observations)


STARTS = th.tensor([[0.0], [1.0], [2.0]])


def test_trajectories_row_by_row():
    batch = imagine(one, Sum(), EndAt(), STARTS, horizon=3).rows()
    # From 0: three steps; from 1: two, the second ends; from 2: one, which ends.
    expected = th.tensor(
        [
            # s, a, s', end, r
            [0.0, 1, 1, 0, 0],
            [1.0, 1, 2, 0, 10],
            [2.0, 1, 3, 1, 20],
            [1.0, 1, 2, 0, 10],
            [2.0, 1, 3, 1, 20],
            [2.0, 1, 3, 1, 20],
        ]
    )
    assert_close(th.cat(batch[:5], dim=1), expected)


def test_rewards_know_whether_the_episode_ends():
    class Paid(EndAt):
        def rewards(self, observations, actions, next_observations, learned, ends):
            return learned + 7 * ends

    batch = imagine(one, Sum(), Paid(), STARTS, horizon=3).rows()
    assert_close(batch.rewards, 10 * batch.observations + 7 * (batch.next_observations >= 3))


def test_trajectories_stand_side_by_side():
    trajectories = imagine(one, Sum(), EndAt(), STARTS, horizon=3)
    assert_close(trajectories.alive.squeeze(2), th.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0]]))
    assert_close(trajectories.observations[:, 0], th.tensor([[0.0], [1.0], [2.0]]))
    assert {column.shape for column in trajectories} == {(3, 3, 1)}


def test_no_row_follows_an_end():
    batch = imagine(one, Sum(), EndAt(), STARTS, horizon=10).rows()
    assert (batch.observations < 3).all()
    assert len(batch.dones) == 6
    assert batch.dones.sum() == len(STARTS)


def test_horizon_is_no_end():
    batch = imagine(one, Sum(), EndAt(), -100 * one(STARTS), horizon=4).rows()
    assert len(batch.dones) == 12
    assert not batch.dones.any()


def test_actions_follow_from_the_state_reached():
    batch = imagine(lambda s: 0.5 * s, Sum(), EndAt(), th.tensor([[0.8]]), horizon=2).rows()
    assert_close(batch.observations, th.tensor([[0.8], [1.2]]))
    assert_close(batch.actions, th.tensor([[0.4], [0.6]]))


def test_rewards_see_the_whole_transition():
    class Told(EndAt):
        def rewards(self, observations, actions, next_observations, learned, ends):
            return observations + 10 * actions + 100 * next_observations + 1000 * learned

    batch = imagine(lambda s: 2 * one(s), Sum(), Told(), th.tensor([[0.5]]), horizon=1)
    assert batch.rewards.item() == 0.5 + 20 + 250 + 5000


def test_nothing_is_asked_about_states_behind_an_end():
    class Watched(EndAt):
        def rewards(self, observations, actions, next_observations, learned, ends):
            assert (observations < 3).all()
            return learned

    imagine(one, Sum(), Watched(), STARTS, horizon=10)


def test_imagined_rows_carry_no_gradient():
    starts = STARTS.clone().requires_grad_()
    assert not any(column.requires_grad for column in imagine(one, Sum(), EndAt(), starts, horizon=2))


# -- n steps --


def test_two_step_rows_by_hand():
    trajectories = imagine(one, Sum(), EndAt(), STARTS, horizon=3)
    log_ratio = trajectories.rewards + 1
    rows = n_step_rows(trajectories, log_ratio, -log_ratio, n_steps=2)
    expected = th.tensor(
        [
            # s, a, end, r, alive
            [0.0, 1, 0, 0, 10, 1, 1],
            [1.0, 1, 1, 10, 20, 1, 1],
            [2.0, 1, 1, 20, 20, 1, 0],  # ends at its first step
            [1.0, 1, 1, 10, 20, 1, 1],
            [2.0, 1, 1, 20, 20, 1, 0],
        ]
    )
    columns = rows.observations, rows.actions, rows.dones, rows.rewards, rows.alive
    assert_close(th.cat(columns, dim=1), expected)
    assert_close(rows.log_ratio, rows.rewards + 1)
    assert_close(rows.next_observations[[0, 1, 3]], th.tensor([[2.0], [3.0], [3.0]]))


def drawn(horizon: int, n: int, seed: int) -> tuple[Trajectories, th.Tensor]:
    """Trajectories without rhyme or reason, whose ends come at random and may come again, and a log-ratio."""
    generator = th.Generator().manual_seed(seed)
    observations, next_observations = th.randn(2, horizon, n, 3, generator=generator)
    actions = th.randn(horizon, n, 2, generator=generator)
    rewards, log_ratio = th.randn(2, horizon, n, 1, generator=generator)
    dones = (th.rand(horizon, n, 1, generator=generator) < 0.3).float()
    alive = th.cat([th.ones(1, n, 1), (1 - dones[:-1]).cumprod(dim=0)])
    return Trajectories(observations, actions, next_observations, dones, rewards, alive), log_ratio


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_n_step_rows_against_a_loop(data, horizon, n, seed):
    n_steps = data.draw(st.integers(1, horizon))
    trajectories, log_ratio = drawn(horizon, n, seed)
    t = [column.numpy() for column in trajectories]
    observations, actions, next_observations, dones, rewards, _ = t
    expected = []
    for start in range(horizon - n_steps + 1):
        for i in range(n):
            if dones[:start, i].any():
                continue
            ends = dones[start : start + n_steps, i, 0]
            steps = int(ends.argmax()) + 1 if ends.any() else n_steps
            window = slice(start, start + n_steps)
            row = (
                observations[start, i],
                actions[start, i],
                next_observations[start + n_steps - 1, i],
                [float(ends.any())],
                rewards[window, i, 0],
                log_ratio.numpy()[window, i, 0],
                -log_ratio.numpy()[window, i, 0],
                np.arange(n_steps) < steps,
            )
            expected.append(np.concatenate(row))
    rows = n_step_rows(trajectories, log_ratio, -log_ratio, n_steps)
    width = 3 + 2 + 3 + 1 + 4 * n_steps
    np.testing.assert_allclose(th.cat(rows, dim=1).numpy(), np.reshape(expected, (-1, width)))


def test_rows_of_one_step_are_the_transitions():
    trajectories, log_ratio = drawn(horizon=5, n=20, seed=0)
    rows = n_step_rows(trajectories, log_ratio, -log_ratio, n_steps=1)
    for ours, single in zip(rows[:5], trajectories.rows()[:5], strict=True):
        assert th.equal(ours, single)
    assert th.equal(rows.log_ratio, log_ratio[trajectories.alive > 0].unsqueeze(1))
    assert (rows.alive == 1).all()


def test_rows_of_the_whole_horizon_are_one_for_each_trajectory():
    trajectories, log_ratio = drawn(horizon=5, n=20, seed=0)
    rows = n_step_rows(trajectories, log_ratio, -log_ratio, n_steps=5)
    assert th.equal(rows.observations, trajectories.observations[0])
    assert th.equal(rows.next_observations, trajectories.next_observations[-1])
    assert th.equal(rows.rewards, trajectories.rewards.squeeze(2).T)
    assert th.equal(rows.dones, trajectories.dones.amax(dim=0))


# -- the bound --


def test_lower_bound_by_hand():
    """From 0: 0 + 0.5 10 + 0.25 20; from 1: 10 + 0.5 20; from 2: 20. What follows an end is not paid."""
    trajectories = imagine(one, Sum(), EndAt(), STARTS, horizon=5)
    estimate = lower_bound(trajectories, trajectories.rewards, gamma=0.5)
    totals = th.tensor([10.0, 20.0, 20.0])
    assert_close(estimate.mean, totals.mean())
    assert_close(estimate.standard_error, totals.std() / math.sqrt(3))


# -- horizons --


@pytest.mark.parametrize(
    ("timesteps", "horizon"), [(0, 1), (1999, 1), (2000, 1), (2999, 1), (3000, 2), (5500, 4), (6000, 5), (10**6, 5)]
)
def test_schedule_by_hand(timesteps, horizon):
    """From 1 to 5 over 4000 steps: one more every thousand."""
    assert horizon_at([2000, 6000, 1, 5], timesteps) == horizon


def test_number_and_step_schedules():
    assert horizon_at(7, 123) == 7
    assert [horizon_at([100, 100, 1, 4], t) for t in (99, 100, 101)] == [1, 1, 1]
    assert [horizon_at((0, 4, 5, 1), t) for t in range(6)] == [5, 4, 3, 2, 1, 1]


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 50), st.integers(1, 50), st.integers(0, 3 * 10**6))
def test_schedule_is_rounded_down_exactly(first_step, span, first, rise, timesteps):
    got = horizon_at([first_step, first_step + span, first, first + rise], timesteps)
    steps = min(max(timesteps - first_step, 0), span)
    assert first + rise >= got >= first
    assert (got - first) * span <= steps * rise < (got - first + 1) * span


@pytest.mark.parametrize(("gamma", "steps"), [(0.99, 459), (0.5, 7), (1.0, 1000), (0.0, 1000)])
def test_discounting_horizon(gamma, steps):
    """0.99^458 > 0.01 > 0.99^459 and 0.5^6 > 0.01 > 0.5^7."""
    assert discounting_horizon(gamma) == steps
