"""Imagined trajectories on dynamics made by hand, row by row."""

import math

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sb3_mismatch.imagination import discounting_horizon, horizon_at, imagine, lower_bound


class Sum:
    """s' = s + a and r = 10 s, without noise."""

    def sample(self, observations, actions):
        return observations + actions, 10 * observations


class EndAt:
    """The episode ends where s' >= 3; rewards stand."""

    def ends(self, observations, actions, next_observations):
        return next_observations >= 3

    def rewards(self, observations, actions, next_observations, learned):
        return learned


def one(observations: th.Tensor) -> th.Tensor:
    return th.ones_like(observations)


STARTS = th.tensor([[0.0], [1.0], [2.0]])


def test_trajectories_row_by_row():
    batch = imagine(one, Sum(), EndAt(), STARTS, horizon=3)
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


def test_no_row_follows_an_end():
    batch = imagine(one, Sum(), EndAt(), STARTS, horizon=10)
    assert (batch.observations < 3).all()
    assert len(batch.dones) == 6
    assert batch.dones.sum() == len(STARTS)


def test_horizon_is_no_end():
    batch = imagine(one, Sum(), EndAt(), -100 * one(STARTS), horizon=4)
    assert len(batch.dones) == 12
    assert not batch.dones.any()


def test_actions_follow_from_the_state_reached():
    batch = imagine(lambda s: 0.5 * s, Sum(), EndAt(), th.tensor([[0.8]]), horizon=2)
    assert_close(batch.observations, th.tensor([[0.8], [1.2]]))
    assert_close(batch.actions, th.tensor([[0.4], [0.6]]))


def test_rewards_see_the_whole_transition():
    class Told(EndAt):
        def rewards(self, observations, actions, next_observations, learned):
            return observations + 10 * actions + 100 * next_observations + 1000 * learned

    batch = imagine(lambda s: 2 * one(s), Sum(), Told(), th.tensor([[0.5]]), horizon=1)
    assert batch.rewards.item() == 0.5 + 20 + 250 + 5000


def test_imagined_rows_carry_no_gradient():
    starts = STARTS.clone().requires_grad_()
    assert not any(column.requires_grad for column in imagine(one, Sum(), EndAt(), starts, horizon=2)[:5])


def test_lower_bound_by_hand():
    """From 0: 0 + 0.5 10 + 0.25 20; from 1: 10 + 0.5 20; from 2: 20. What follows an end is not paid."""
    estimate = lower_bound(one, Sum(), EndAt(), lambda rows: rows.rewards, STARTS, gamma=0.5, horizon=5)
    totals = th.tensor([10.0, 20.0, 20.0])
    assert_close(estimate.mean, totals.mean())
    assert_close(estimate.standard_error, totals.std() / math.sqrt(3))


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
