"""The bounds that tell where episodes end."""

import pytest
import torch as th
from torch.testing import assert_close

from sb3_mismatch.healthy_range import NO_BOUND, HealthyRange


def fitted(states: th.Tensor, ended: th.Tensor) -> HealthyRange:
    healthy = HealthyRange(states.shape[1])
    healthy.fit(states, ended.float().unsqueeze(1))
    return healthy


def walks(n: int = 2000, dim: int = 11) -> th.Tensor:
    th.manual_seed(0)
    return th.randn(n, dim) * th.logspace(-2, 2, dim)


def test_the_bounds_of_a_hopper_are_found_from_few_ends():
    states = walks()
    # Two per cent end, below in one quantity and on both sides of another.
    ended = (states[:, 0] < -0.025) | (states[:, 3].abs() > 2.6 * 10**-0.8)
    assert 20 < ended.sum() < 60
    healthy = fitted(states, ended)
    assert (healthy.low > -NO_BOUND).nonzero().flatten().tolist() == [0, 3]
    assert (healthy.high < NO_BOUND).nonzero().flatten().tolist() == [3]
    assert healthy.low[0].item() == pytest.approx(-0.025, abs=0.001)
    assert_close(healthy.high[3], -healthy.low[3], rtol=0.1, atol=0)
    unseen = walks(20_000)[10_000:]
    truth = (unseen[:, 0] < -0.025) | (unseen[:, 3].abs() > 2.6 * 10**-0.8)
    told = healthy.log_survival(unseen).exp().squeeze(1) < 0.5
    assert (told == truth).float().mean() > 0.998


def test_ends_that_no_quantity_tells_draw_no_bound():
    states = walks()
    healthy = fitted(states, th.rand(len(states)) < 0.02)
    assert (healthy.low == -NO_BOUND).all()
    assert (healthy.high == NO_BOUND).all()
    assert_close(healthy.log_survival(states), th.zeros(len(states), 1))


@pytest.mark.parametrize("end", [False, True])
def test_where_nothing_or_everything_ends_there_is_no_bound(end):
    states = walks(50)
    assert (fitted(states, th.full((50,), end)).low == -NO_BOUND).all()


def test_a_single_end_draws_no_bound_and_two_do():
    states = walks(100, 2)
    states[0, 0] = states[1, 0] = 9.0
    ended = th.zeros(100, dtype=th.bool)
    ended[0] = True
    assert (fitted(states[[0, *range(2, 100)]], ended[[0, *range(2, 100)]]).high == NO_BOUND).all()
    ended[1] = True
    assert fitted(states, ended).high[0] < NO_BOUND


def test_the_probability_is_smooth_at_a_bound_and_its_gradient_finite():
    states = walks(500, 1)
    healthy = fitted(states, states[:, 0] > 0.015)
    at = healthy.high.clone().unsqueeze(0).requires_grad_()
    survival = healthy.log_survival(at).exp()
    survival.sum().backward()
    assert survival.item() == pytest.approx(0.5)
    assert -1e5 < at.grad.item() < 0
    far = (healthy.high + 1e3).unsqueeze(0).requires_grad_()
    healthy.log_survival(far).exp().sum().backward()
    assert far.grad.item() == 0


def test_bounds_that_no_longer_hold_are_lifted():
    states = walks(500, 2)
    healthy = fitted(states, states[:, 0] > 0.015)
    healthy.fit(states, th.zeros(500, 1))
    assert (healthy.high == NO_BOUND).all()


def test_bounds_travel_with_the_state_dict():
    healthy = fitted(walks(500, 2), walks(500, 2)[:, 0] > 0.015)
    other = HealthyRange(2)
    other.load_state_dict(healthy.state_dict())
    assert_close(other.high, healthy.high)
