"""The equations against rows worked by hand, and the optima that they have."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from torch.testing import assert_close

from sb3_mismatch.objectives import (
    OBJECTIVES,
    Payment,
    adversarial_loss,
    discounted_bound_reward,
    discounted_joint_loss,
    joint_loss,
    likelihood_loss,
    lower_bound_reward,
    positive_offset,
    realistic_reward,
    task_reward,
    weighted_loss,
)

GAMMA = 0.9


class ByHand:
    """Terms of two members."""

    nll = th.tensor([1.0, 2.0])
    crps = th.tensor([3.0, 4.0])
    log_ratio = th.tensor([0.5, -0.5])
    value = th.tensor([10.0, 20.0])
    # weights 1/2 and 1/2, 3/4 and 1/4 at γ = 0.9
    value_of_each = th.tensor([[5.0, 5.0], [math.log(3) / 0.9, 0.0]])
    nll_of_each = th.tensor([[0.0, 2.0], [4.0, 8.0]])


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        (task_reward, [2.0, 0.5]),
        (realistic_reward, [2.3, -0.5]),
        # 0.1 log 2 + 0.3 - 0.1 log 0.1, and 0.1 log 0.5 - 1 - 0.1 log 0.1
        (lower_bound_reward, [0.5995732, -0.8390562]),
        # the same with 0.9 * 0.3 and 0.9 * -1
        (discounted_bound_reward, [0.5695732, -0.7390562]),
    ],
)
def test_rewards_by_hand(equation, expected):
    reward, log_ratio = th.tensor([[2.0], [0.5]]), th.tensor([[0.3], [-1.0]])
    assert_close(equation(reward, log_ratio, GAMMA), th.tensor(expected).unsqueeze(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        (likelihood_loss, [1.0, 2.0]),
        (adversarial_loss, [2.5, 4.5]),
        (joint_loss, [1 - 0.5 - 9, 2 + 0.5 - 18]),
        (discounted_joint_loss, [1 - 0.45 - 9, 2 + 0.45 - 18]),
        (weighted_loss, [1.0, 5.0]),
    ],
)
def test_model_losses_by_hand(equation, expected):
    assert_close(equation(ByHand(), GAMMA), th.tensor(expected))


@pytest.mark.parametrize(
    ("equation", "tilt"),
    [(joint_loss, GAMMA), (discounted_joint_loss, 1.0), (adversarial_loss, 0.0)],
)
def test_optimum_over_finite_next_states(equation, tilt):
    """Without the likelihood the best q is p exp(γV), p exp(V) or p itself."""
    generator = th.Generator().manual_seed(0)
    p = th.rand(6, generator=generator, dtype=th.double).softmax(dim=0)
    values = 2 * th.randn(6, generator=generator, dtype=th.double)
    logits = th.zeros(6, dtype=th.double, requires_grad=True)

    class Exact:
        nll = crps = th.zeros(1)

        @property
        def log_ratio(self):
            return (logits.softmax(0) * (p.log() - logits.log_softmax(0))).sum().unsqueeze(0)

        @property
        def value(self):
            return (logits.softmax(0) * values).sum().unsqueeze(0)

    optimizer = th.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = equation(Exact(), GAMMA).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    best = p * (tilt * values).exp()
    assert_close(logits.detach().softmax(0), best / best.sum(), atol=1e-5, rtol=0)


def test_table():
    """Each row asks for what its algorithm is."""
    asked = {
        name: (row.reward, row.model_loss, row.takes_log, row.centred, row.uses_classifier)
        for name, row in OBJECTIVES.items()
    }
    assert asked == {
        "mnm": (lower_bound_reward, joint_loss, True, False, True),
        "mnm-gamma": (discounted_bound_reward, discounted_joint_loss, True, False, True),
        "mnm-weighted": (lower_bound_reward, weighted_loss, True, False, True),
        "mnm-approx": (realistic_reward, adversarial_loss, False, True, True),
        "vmbpo": (realistic_reward, joint_loss, False, False, True),
        "mbpo": (task_reward, likelihood_loss, False, False, False),
    }
    # The bound holds with its log-ratio in full.
    assert all(row.log_ratio_weight == 1 for row in OBJECTIVES.values() if row.takes_log)


REWARDS, LOG_RATIO = th.tensor([[1.0], [2.0]]), th.tensor([[0.5], [-1.5]])
ALIVE = th.ones(2, 1)


def pay(name: str, **changed) -> th.Tensor:
    return Payment(replace(OBJECTIVES[name], **changed), GAMMA).imagined(REWARDS, LOG_RATIO, ALIVE)


def test_imagined_rows_are_paid_the_log_ratio():
    assert_close(pay("vmbpo"), th.tensor([[1.5], [0.5]]))
    assert_close(pay("vmbpo", log_ratio_weight=2.0), th.tensor([[2.0], [-1.0]]))
    assert_close(pay("vmbpo", log_ratio_weight=0.0), REWARDS)
    assert_close(pay("mbpo"), REWARDS)


def test_centred_log_ratio_has_mean_zero():
    """0.5 and -1.5 lie 1 above and below their mean; the weight is 0.1."""
    assert_close(pay("mnm-approx"), th.tensor([[1.1], [1.9]]))


@pytest.mark.parametrize(("objective", "slope"), [("mnm-approx", 0.0), ("vmbpo", 1.0)])
def test_what_is_centred_is_paid_without_a_gradient(objective, slope):
    reward, log_ratio, novelty = (th.tensor([[0.5], [-1.5]], requires_grad=True) for _ in range(3))
    payment = Payment(replace(OBJECTIVES[objective], novelty_weight=1.0), GAMMA)
    paid = payment.imagined(reward, log_ratio, th.ones(2, 1), novelty)
    gradients = th.autograd.grad(paid.sum(), (reward, log_ratio, novelty), allow_unused=True)
    of_reward, *others = (th.zeros(2, 1) if x is None else x for x in gradients)
    assert_close(of_reward, th.ones(2, 1))
    for gradient in others:
        assert_close(gradient, th.full((2, 1), slope))


def test_steps_behind_an_end_are_left_out_of_the_mean():
    """0.5, -1.5 and 4 are alive and have the mean 1; -99 is not."""
    log_ratio, alive = th.tensor([[0.5, -1.5], [4.0, -99.0]]), th.tensor([[1.0, 1.0], [1.0, 0.0]])
    paid = Payment(OBJECTIVES["mnm-approx"], GAMMA).imagined(th.zeros(2, 2), log_ratio, alive)
    assert_close(paid[alive > 0], th.tensor([-0.05, -0.25, 0.3]))
    nobody = Payment(OBJECTIVES["mnm-approx"], GAMMA).imagined(th.zeros(2, 2), log_ratio, th.zeros(2, 2))
    assert nobody.isfinite().all()


def test_novelty_is_paid_beside_any_reward():
    """Up to five nats, 0.25 and 5; centred where the log-ratio is."""
    novelty = th.tensor([[0.25], [7.0]])

    def earned(name: str, weight: float) -> th.Tensor:
        row = replace(OBJECTIVES[name], novelty_weight=weight)
        alone = Payment(row, GAMMA, unit=10.0).imagined(REWARDS, LOG_RATIO, ALIVE)
        return Payment(row, GAMMA, unit=10.0).imagined(REWARDS, LOG_RATIO, ALIVE, novelty) - alone

    for name in ("mbpo", "vmbpo", "mnm"):
        assert_close(earned(name, 2.0), th.tensor([[0.05], [1.0]]))
        assert_close(earned(name, -2.0), th.tensor([[-0.05], [-1.0]]))
        assert_close(earned(name, 0.0), th.zeros(2, 1))
    assert_close(earned("mnm-approx", 2.0), th.tensor([[-0.475], [0.475]]))


def test_slack_by_hand():
    def slack(name: str, unit: float = 1.0, **changed: float) -> float:
        shares = {share: changed.pop(share) for share in ("novelty_share", "log_ratio_share") if share in changed}
        return Payment(replace(OBJECTIVES[name], **changed), GAMMA, unit=unit, **shares).slack(4.0)

    assert slack("vmbpo", log_ratio_weight=0.5) == 2.0
    assert slack("vmbpo", log_ratio_share=0.25) == 1.0
    assert slack("vmbpo", novelty_weight=-3.0) == 19.0
    assert slack("mnm-approx") == slack("mbpo") == 0.0
    assert slack("mnm-approx", novelty_weight=0.5) == 2.5
    assert slack("vmbpo", unit=10.0, novelty_weight=0.5, novelty_share=0.2) == pytest.approx(0.45)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_real_rows_need_no_correction(name):
    paid = Payment(OBJECTIVES[name], GAMMA).real(REWARDS)
    expected = 0.1 * REWARDS.log() - 0.1 * math.log(0.1) if OBJECTIVES[name].takes_log else REWARDS
    assert_close(paid, expected)


def test_log_objective_shifts_and_floors():
    """r = -0.9 and -5 with offset 1: log 0.1, and log 0.05, the lowest that is paid."""
    payment = Payment(OBJECTIVES["mnm"], GAMMA, offset=1.0, lowest=0.05)
    rewards = th.tensor([[-0.9], [-5.0]])
    log_r = th.tensor([[math.log(0.1)], [math.log(0.05)]])
    assert_close(payment.real(rewards), 0.1 * (log_r - math.log(0.1)))
    assert_close(payment.imagined(rewards, LOG_RATIO, ALIVE), 0.1 * (log_r - math.log(0.1)) + LOG_RATIO)


def test_other_objectives_do_not_shift():
    payment = Payment(OBJECTIVES["vmbpo"], GAMMA, offset=1.0, lowest=0.05)
    assert_close(payment.real(th.tensor([[-5.0]])), th.tensor([[-5.0]]))


def test_log_return_by_hand():
    """Episodes 1, 2, 3 and 4 (of one step): ((1 + 1.8 + 2.43) + 4) / 2, each reward one higher by the offset."""
    rewards, steps = np.array([[0.0, 1.0, 2.0], [3.0, 99.0, 99.0]]), np.array([3, 1])
    payment = Payment(OBJECTIVES["mnm"], GAMMA, offset=1.0)
    assert payment.log_return(rewards, steps) == pytest.approx(math.log((5.23 + 4) / 2))


@pytest.mark.parametrize(
    ("lowest", "shift", "offset"), [(0.2, 0.0, 0.0), (-3.0, 4, 4.0), (-3.0, "auto", 3.01), (5.0, "auto", 0.0)]
)
def test_offset(lowest, shift, offset):
    assert positive_offset("mnm", lowest, shift, reward_floor=0.01) == pytest.approx(offset)


@pytest.mark.parametrize(("lowest", "shift"), [(0.0, 0.0), (-3.0, 3.0), (math.nan, "auto")])
def test_reward_without_logarithm_is_refused(lowest, shift):
    with pytest.raises(ValueError, match=r"objective='mnm' takes log r and met r = .*reward_shift='auto'"):
        positive_offset("mnm", lowest, shift, reward_floor=0.01)
