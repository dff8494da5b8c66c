"""Fits against a linear system, and the rows, members and steps that a fit uses."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.testing import assert_close
from toys import LinearSystem, rows_of

from sb3_mismatch.buffers import RealTransitions
from sb3_mismatch.classifier import Classifier
from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.fitting import (
    FitSettings,
    Terms,
    bootstraps,
    fit_dynamics,
    split_holdout,
    training_step,
)
from sb3_mismatch.objectives import OBJECTIVES, Objective
from sb3_mismatch.observations import FlatObservations
from sb3_mismatch.terminations import Outcomes


def likelihood(dynamics: Dynamics) -> Callable:
    return lambda rows: dynamics.nll(*rows[:3], rows.rewards).mean(dim=1)


def fit(dynamics: Dynamics, data: RealTransitions, lr: float = 1e-3, loss=None, optimizer=None, **changed):
    optimizer = optimizer or th.optim.Adam(dynamics.parameters(), lr=lr)
    return fit_dynamics(dynamics, optimizer, data, loss or likelihood(dynamics), FitSettings(**changed))


def numbered(n: int) -> RealTransitions:
    """Rows whose state is their number: a fit's minibatches tell which rows it uses."""
    number = th.arange(n, dtype=th.float32).unsqueeze(1)
    return rows_of(number, th.zeros(n, 1), number + 1)


def used(data: RealTransitions, dynamics: Dynamics | None = None, **changed) -> list[list[set[int]]]:
    """The rows that each member trained on, minibatch by minibatch: [member][step]."""
    dynamics = dynamics or Dynamics(1, 1, net_arch=[4], end_arch=[4])
    batches = []

    def watch(rows):
        if th.is_grad_enabled():
            batches.append(rows.observations.squeeze(2).long())
        return likelihood(dynamics)(rows)

    fit(dynamics, data, loss=watch, **changed)
    return [[set(batch[member].tolist()) for batch in batches] for member in range(dynamics.n_members)]


# -- what is learned --


@pytest.fixture(scope="module")
def linear():
    """A fitted linear system."""
    th.manual_seed(0)
    system = LinearSystem()
    dynamics = Dynamics(3, 1, n_members=3, n_elites=3, net_arch=[32, 32])
    data = system.draw(5000)
    log = fit(dynamics, data, lr=1e-2, dynamics_steps=800, batch_size=256, average_steps=200)
    return system, dynamics, data, log


def mean_outcome(dynamics: Dynamics, s: th.Tensor, a: th.Tensor) -> th.Tensor:
    """The ensemble's mean [s', r] at (n, .)."""
    k = dynamics.n_members
    mean = dynamics(s.expand(k, -1, -1), a.expand(k, -1, -1)).mean
    return th.cat(dynamics.decode(s, mean), dim=2).mean(dim=0)


def test_linear_system_is_recovered(linear):
    """The matrices by finite differences of the ensemble's mean, averaged over the bulk of the states."""
    system, dynamics, _, _ = linear
    th.manual_seed(1)
    s, a = th.randn(500, 3).clamp(-1.5, 1.5), 1.6 * th.rand(500, 1) - 0.8
    inputs = th.cat([s, a], dim=1)
    slopes = []
    with th.no_grad():
        for i in range(4):
            step = 0.2 * th.eye(4)[i]
            up, down = (mean_outcome(dynamics, x[:, :3], x[:, 3:]) for x in (inputs + step, inputs - step))
            slopes.append(((up - down) / 0.4).mean(dim=0))
        prediction = mean_outcome(dynamics, s, a)
    found = th.stack(slopes, dim=1)
    reward = th.cat([system.w, th.tensor([system.v])])
    truth = th.cat([th.cat([system.A, system.B], dim=1), reward.unsqueeze(0)])
    print(f"\nlargest error of a coefficient: {(found - truth).abs().max().item():.3f}")
    assert_close(found, truth, atol=0.05, rtol=0)
    # Point by point the mean is right to a fraction of the noise.
    error = (prediction - inputs @ truth.T).square().mean(dim=0).sqrt()
    print(f"root mean squared error of the mean over the noise: {(error / system.noise).tolist()}")
    assert (error < 0.4 * system.noise).all()


def test_noise_of_a_linear_system_is_recovered(linear):
    system, dynamics, data, _ = linear
    s, a = (x[:2000].expand(3, -1, -1) for x in data.batch[:2])
    with th.no_grad():
        std = (0.5 * dynamics(s, a).log_var).exp() * dynamics.targets.std
    ratio = std.mean(dim=(0, 1)) / system.noise
    print(f"\npredicted noise over the true: {ratio.tolist()}")
    assert_close(ratio, th.ones(4), atol=0.15, rtol=0)


def test_log_tells_the_errors_that_noise_leaves(linear):
    system, dynamics, _, log = linear
    floor = (system.noise / dynamics.targets.std).square()
    assert log["dynamics/state_error"] == pytest.approx(floor[:3].mean().item(), rel=0.15)
    assert log["dynamics/reward_error"] == pytest.approx(floor[3].item(), rel=0.5)
    # The likelihood's entropy term, log σ + ½ for each target.
    assert log["dynamics/nll"] == pytest.approx((0.5 * floor.log() + 0.5).sum().item(), abs=0.3)


def test_members_disagree_off_the_data():
    th.manual_seed(0)
    s, a = th.randn(1000, 3), th.randn(1000, 1)
    dynamics = Dynamics(3, 1, n_members=3, n_elites=3, net_arch=[32, 32])
    fit(dynamics, rows_of(s, a, s + s.abs() + a), lr=3e-3, dynamics_steps=400, batch_size=256)
    near, far = dynamics.disagreement(s, a).mean(), dynamics.disagreement(s + 8 * s.sign(), a).mean()
    print(f"\ndisagreement on the data {near.item():.4f}, off it {far.item():.4f}")
    assert far > 5 * near
    assert near > 0


def test_scales_of_targets_do_not_matter():
    """A reward of 1e4 beside states of 1e-3: both are learned (one scale for all would leave one of them)."""
    th.manual_seed(0)
    s, a = 1e-3 * th.randn(1000, 2), th.randn(1000, 1)
    data = rows_of(s, a, s + 1e-3 * a.abs(), 1e4 * a.abs())
    log = fit(Dynamics(2, 1, 2, 1, net_arch=[16]), data, lr=1e-2, dynamics_steps=300)
    assert log["dynamics/state_error"] < 0.1
    assert log["dynamics/reward_error"] < 0.1


@pytest.mark.parametrize(
    ("often", "common", "least", "most"),
    [(0.02, 1.0, 0.0, 0.05), (0.02, 0.02, 0.0, 0.05), (0.5, 1.0, 0.0, 0.6), (0.5, -1.0, 0.9, 1.2)],
    ids=["beside a constant", "rare", "often beside a constant", "often"],
)
def test_rewards_that_cannot_be_foretold_leave_unexplained_what_they_are_in_all(often, common, least, most):
    """One less at random: rarely beside a constant is little, as where a pole falls; what is rare tells of few rows."""
    th.manual_seed(0)
    s, a = th.randn(1000, 2), th.randn(1000, 1)
    rewards = common - (1 if common > 0 else -2) * (th.rand(1000, 1) < often).float()
    log = fit(Dynamics(2, 1, 2, 1, net_arch=[16]), rows_of(s, a, s + 0.1 * a, rewards), lr=1e-2, dynamics_steps=100)
    assert log["dynamics/reward_error"] > 0.5
    assert least <= log["dynamics/unexplained"] < most


def goals(n: int = 2000, goal_ends: bool = True) -> RealTransitions:
    """Actions cost a little; s' > 0.95, rarely met, pays 100."""
    s, a = (2 * th.rand(n, 1) - 1 for _ in range(2))
    s = th.where((s.abs() > 0.9) & (th.rand(n, 1) > 0.3), s / 2, s)
    reached = (s + 0.01 * a > 0.95).float()
    data = rows_of(s, a, s + 0.01 * a, 100 * reached - 0.1 * a**2)
    return replace(data, batch=data.batch._replace(dones=reached if goal_ends else 0 * reached))


def crps(dynamics: Dynamics) -> Callable:
    return lambda rows: 200 * dynamics.crps_of(dynamics(*rows[:2]), rows[0], rows[2], rows.rewards).mean(dim=1)


def test_a_goal_that_ends_an_episode_is_collected_once():
    th.manual_seed(0)
    data, dynamics = goals(), Dynamics(1, 1, 3, 2, net_arch=[32])
    assert 2 < data.batch.dones.sum() < 30
    log = fit(dynamics, data, loss=crps(dynamics), lr=2e-3, dynamics_steps=300)
    assert dynamics.end_reward.item() == pytest.approx(100, abs=0.2)
    space, actions = spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,))
    outcomes = Outcomes(dynamics, FlatObservations(space), actions)
    # Slowly over the bound, many steps in states in which the end is neither certain nor out of the question.
    s, a = th.linspace(0.85, 1.05, 40).unsqueeze(1), th.ones(40, 1)
    next_states, learned = dynamics.sample(s, a)
    goes_on = outcomes.continuation(s, a, next_states)
    rewards = outcomes.rewards(s, a, next_states, learned, 1 - goes_on)
    lived = th.cat([th.ones(1, 1), goes_on[:-1]]).cumprod(dim=0)
    assert (lived * rewards).sum().item() == pytest.approx(100, abs=5)
    assert rewards[0].abs() < 5
    # What is left for the networks are the actions' costs.
    assert log["dynamics/unexplained"] < 0.5
    assert dynamics.targets.std[-1] < 0.1


@pytest.mark.parametrize("paid", ["no end", "little", "both ways"])
def test_networks_learn_what_ends_pay_where_that_does_not_stand_out(paid):
    data, dynamics = goals(goal_ends=paid != "no end"), Dynamics(1, 1, 2, 1, net_arch=[8])
    rewards, ends = data.batch.rewards.clone(), data.batch.dones > 0
    if paid == "little":
        rewards[ends] = 20 * rewards.abs().median()
    if paid == "both ways":
        rewards[ends.nonzero()[0]] *= -1
    fit(dynamics, replace(data, batch=data.batch._replace(rewards=rewards)), dynamics_steps=1)
    assert dynamics.end_reward.item() == 0
    train, _ = split_holdout(data, FitSettings())
    assert_close(dynamics.high[-1], rewards[train].max())


def test_rare_rewards_are_learned():
    def told(paid_ratio: float) -> float:
        """Of what is paid at goals, the share that the world tells."""
        th.manual_seed(0)
        data, dynamics = goals(goal_ends=False), Dynamics(1, 1, 3, 2, net_arch=[64, 64])
        fit(dynamics, data, loss=crps(dynamics), lr=2e-3, dynamics_steps=1500, paid_ratio=paid_ratio)
        rewards = dynamics.sample(data.batch.observations, data.batch.actions)[1]
        return ((rewards * (data.batch.rewards > 50)).sum() / data.batch.rewards.clamp(min=0).sum()).item()

    assert told(FitSettings().paid_ratio) > 0.7
    assert told(0.0) < 0.1


def test_constant_targets_are_learned_exactly():
    """A reward of 1 at every step, as InvertedPendulum's."""
    data = rows_of(th.randn(200, 2), th.randn(200, 1), th.randn(200, 2), th.ones(200, 1))
    dynamics = Dynamics(2, 1, 2, 1, net_arch=[8])
    fit(dynamics, data, dynamics_steps=20)
    assert_close(dynamics.sample(th.randn(50, 2), th.randn(50, 1))[1], th.ones(50, 1))


def test_scales_and_range_are_the_training_rows():
    data = numbered(100)
    dynamics = Dynamics(1, 1, net_arch=[4])
    fit(dynamics, data, dynamics_steps=1)
    train, _ = split_holdout(data, FitSettings())
    rows = data.batch.observations[train]
    assert_close(dynamics.inputs.mean[0], rows.mean())
    assert_close(dynamics.inputs.std[0], rows.std(correction=0))
    assert_close(dynamics.low, th.stack([rows.min(), th.tensor(0.0)]))
    assert_close(dynamics.high, th.stack([rows.max() + 1, th.tensor(0.0)]))


# -- which rows are used --


def test_each_member_sees_its_own_bootstrap_for_a_whole_fit():
    """
    With replacement from n rows a member meets 1 - 1/e of them: always the same, for redrawn ones would soon
    be all of them. Of two members' sets 1 - 1/e is shared in the mean.
    """
    th.manual_seed(0)
    data = numbered(500)
    train = set(split_holdout(data, FitSettings())[0].tolist())
    seen = [set().union(*steps) for steps in used(data, dynamics_steps=60, batch_size=256, recent_ratio=0.0)]
    for rows in seen:
        assert rows <= train
        assert len(rows) == pytest.approx((1 - math.exp(-1)) * len(train), rel=0.1)
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert len(one & other) / len(one) == pytest.approx(1 - math.exp(-1), abs=0.1)


def test_a_share_of_the_rows_are_the_newest():
    th.manual_seed(0)
    train = th.arange(1000, 2000)
    none = th.zeros(2000, dtype=th.bool)
    rows = bootstraps(train, 2, FitSettings(recent_ratio=0.6, n_recent=100), none)
    assert rows.shape == (2, 1000)
    # 0.6 of the draws by wish, and a tenth of the others.
    assert (rows >= 1900).float().mean().item() == pytest.approx(0.64, abs=0.03)
    assert rows.min() < 1020
    assert set(bootstraps(train, 2, FitSettings(recent_ratio=1.0, n_recent=2), none).unique().tolist()) == {1998, 1999}


@pytest.mark.parametrize(("n", "size", "share"), [(1, 31, 0.25), (240, -31, 0.43), (260, 31, 0.26), (1, 29, 0.0)])
def test_a_share_of_the_rows_are_those_whose_reward_stands_out(n, size, share):
    th.manual_seed(0)
    data, paid = numbered(1000), slice(1, n + 1)
    rewards, drawn = 0.01 * th.ones(1000, 1), []
    rewards[paid] *= size
    data = replace(data, batch=data.batch._replace(rewards=rewards))
    dynamics = Dynamics(1, 1, 3, 2, net_arch=[4])

    def watch(rows):
        if th.is_grad_enabled():
            drawn.append((rows.observations >= 1) & (rows.observations <= n))
        return likelihood(dynamics)(rows)

    fit(dynamics, data, loss=watch, dynamics_steps=40, recent_ratio=0.0, paid_ratio=0.25)
    assert th.stack(drawn).float().mean().item() == pytest.approx(share, abs=0.03)


def test_members_minibatches_differ():
    steps = used(numbered(500), dynamics_steps=3, batch_size=32)
    for step in range(3):
        assert len({frozenset(member[step]) for member in steps}) == len(steps)


def test_held_out_rows_are_never_trained_on():
    """Over warm-started fits, while the replay buffer grows past the most that is held out."""
    dynamics, trained = Dynamics(1, 1, net_arch=[4], end_arch=[4]), set()
    for n in (60, 100, 101, 350, 800):
        data = numbered(n)
        _, holdout = split_holdout(data, FitSettings(max_holdout=40))
        now = set().union(
            *(rows for member in used(data, dynamics, dynamics_steps=30, max_holdout=40) for rows in member)
        )
        trained |= now
        assert not trained & set(holdout.tolist())
        assert len(holdout) == pytest.approx(min(0.2 * n, 40), abs=2)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(2, 3000), st.floats(0.05, 0.9), st.integers(1, 500), st.integers(1, 7))
def test_split_is_one_and_stands_still(n, ratio, most, stride):
    """Two disjoint sets, all rows between them; a row once trained on is never held out later."""
    config = FitSettings(holdout_ratio=ratio, max_holdout=most)

    def split(rows: int) -> tuple[set[int], set[int]]:
        position = stride * th.arange(rows)
        batch = rows_of(*[th.zeros(rows, 1)] * 3).batch
        train, holdout = split_holdout(RealTransitions(batch, position), config)
        return set(position[train].tolist()), set(position[holdout].tolist())

    train, holdout = split(n)
    if train == holdout:
        assert len(train) == n
        return
    assert train | holdout == set((stride * th.arange(n)).tolist())
    assert not train & holdout
    later_train, later_holdout = split(2 * n)
    assert later_train == later_holdout or not train & later_holdout


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_few_rows_and_any_batch_size(n, batch_size):
    dynamics = Dynamics(1, 1, net_arch=[4])
    log = fit(dynamics, numbered(n), dynamics_steps=3, batch_size=batch_size)
    assert all(math.isfinite(value) for value in log.values())
    assert all(parameter.isfinite().all() for parameter in dynamics.parameters())


def test_nothing_held_out_by_wish():
    train, holdout = split_holdout(numbered(10), FitSettings(holdout_ratio=0.0))
    assert train.tolist() == holdout.tolist() == list(range(10))


# -- which parameters are kept --


def noise(n: int = 400) -> RealTransitions:
    return rows_of(th.randn(n, 2), th.randn(n, 1), th.randn(n, 2), th.randn(n, 1), (th.rand(n, 1) < 0.1).float())


def holdout_losses(dynamics: Dynamics, data: RealTransitions) -> th.Tensor:
    """-log q of the held-out rows, per target: (E,)."""
    _, holdout = split_holdout(data, FitSettings())
    rows = [c[holdout].expand(dynamics.n_members, -1, -1) for c in data.batch[:5]]
    with th.no_grad():
        return dynamics.nll(*rows[:3], rows[4]).mean(dim=1) / 3


def test_elites_have_the_lowest_loss_on_held_out_rows():
    th.manual_seed(0)
    data, dynamics = noise(), Dynamics(2, 1, n_members=6, n_elites=2, net_arch=[16])
    fit(dynamics, data, dynamics_steps=50)
    losses = holdout_losses(dynamics, data)
    assert_close(dynamics.holdout_loss, losses)
    assert len(losses.unique()) == 6
    assert set(dynamics.elites.tolist()) == set(losses.argsort()[:2].tolist())
    held = [c[split_holdout(data, FitSettings())[1]].expand(6, -1, -1) for c in data.batch[:5]]
    errors = dynamics.squared_error(*held[:3], held[4])[dynamics.elites]
    assert_close(dynamics.holdout_error, errors.mean(dim=0))


@pytest.mark.parametrize("average_steps", [0, 50])
def test_members_are_rolled_back_one_by_one(average_steps):
    """Member 0 steps towards the data and member 1 far away: the former keeps its steps, the latter its start."""
    th.manual_seed(0)
    system, dynamics = LinearSystem(), Dynamics(3, 1, 2, 1, net_arch=[16])
    data = system.draw(400)
    start = [layer.weight.detach().clone() for layer in dynamics.body.layers]
    sign = th.tensor([1.0, -1.0])

    def torn(rows):
        return likelihood(dynamics)(rows) * (sign if th.is_grad_enabled() else 1)

    optimizer = th.optim.Adam(dynamics.parameters(), lr=3e-2)
    for _ in range(2):
        log = fit(dynamics, data, loss=torn, optimizer=optimizer, dynamics_steps=100, average_steps=average_steps)
        assert log["dynamics/rolled_back"] == 1
        for layer, old in zip(dynamics.body.layers, start, strict=True):
            for weight in (layer.weight, optimizer.state[layer.weight].get("learner", layer.weight)):
                assert not th.equal(weight[0], old[0])
                assert th.equal(weight[1], old[1])


def test_every_fit_takes_its_steps_and_keeps_the_last():
    """Where held-out rows would have had it stop as well: they are noise, which can only be learned by heart."""
    th.manual_seed(0)
    data, dynamics = noise(100), Dynamics(2, 1, 2, 1, net_arch=[64])
    steps, losses = [], []

    def watch(rows):
        loss = likelihood(dynamics)(rows)
        if th.is_grad_enabled():
            steps.append(loss)
        return loss

    for n in (20, 100):
        fit(dynamics, data, lr=3e-3, loss=watch, dynamics_steps=n)
        losses.append(dynamics.holdout_loss.clone())
        assert_close(dynamics.holdout_loss, holdout_losses(dynamics, data))
    assert len(steps) == 120
    assert (losses[1] > losses[0]).all()


class Watched(th.optim.Adam):
    """Keeps its first parameter after each of its steps; stops in the step that is ``last``."""

    last = math.inf

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n_steps, self.seen = 0, []

    def step(self, closure=None):
        self.n_steps += 1
        if self.n_steps >= self.last:
            raise KeyboardInterrupt
        super().step(closure)
        self.seen.append(self.param_groups[0]["params"][0].detach().clone())


def test_mean_of_the_dynamics_imagines_and_they_learn_as_without():
    ends = []
    for average_steps in (0, 3):
        th.manual_seed(0)
        dynamics = Dynamics(2, 1, 2, 1, net_arch=[8])
        weight = dynamics.body.layers[0].weight
        optimizer = Watched([weight, *(p for p in dynamics.parameters() if p is not weight)], lr=1e-2)
        data, mean = noise(), weight.detach().clone()
        for _ in range(2):
            fit(dynamics, data, optimizer=optimizer, dynamics_steps=10, average_steps=average_steps)
        ends.append(optimizer.seen[-1])
        if average_steps == 0:
            assert th.equal(weight, ends[0])
            continue
        # By hand; the mean goes back over a fifth of all steps at first.
        for n, taken in enumerate(optimizer.seen, 1):
            mean.lerp_(taken, 1 / min(3, 1 + 0.2 * n))
        assert_close(weight, mean)
        assert not th.allclose(weight, ends[1])
        assert th.equal(optimizer.state[weight]["learner"], ends[1])
        assert_close(dynamics.holdout_loss, holdout_losses(dynamics, data))
    assert_close(ends[0], ends[1])


def test_interrupted_fit_leaves_the_mean():
    dynamics = Dynamics(2, 1, 2, 1, net_arch=[8])
    weight = dynamics.body.layers[0].weight
    optimizer = Watched([weight, *(p for p in dynamics.parameters() if p is not weight)], lr=1e-2)
    optimizer.last = 15
    with pytest.raises(KeyboardInterrupt):
        fit(dynamics, noise(), optimizer=optimizer, dynamics_steps=20, average_steps=100)
    assert th.equal(optimizer.state[weight]["learner"], optimizer.seen[-1])
    assert not th.equal(weight, optimizer.seen[-1])


def test_fit_that_ended_before_its_first_step_can_be_taken_up():
    dynamics = Dynamics(2, 1, 2, 1, net_arch=[8])
    optimizer = Watched(dynamics.parameters(), lr=1e-2)
    optimizer.last = 0
    with pytest.raises(KeyboardInterrupt):
        fit(dynamics, noise(), optimizer=optimizer, dynamics_steps=5, average_steps=100)
    optimizer.last = math.inf
    fit(dynamics, noise(), optimizer=optimizer, dynamics_steps=5, average_steps=100)
    assert len(optimizer.seen) == 5


def test_mean_loses_the_noise_of_minibatches():
    errors = {}
    for average_steps in (0, 100):
        th.manual_seed(0)
        system = LinearSystem()
        data, dynamics = system.draw(5000), Dynamics(3, 1, 2, 2, net_arch=[32])
        s, a = (x.expand(2, -1, -1) for x in data.batch[:2])
        following, rewards = s @ system.A.T + a @ system.B.T, s @ system.w.view(3, 1) + system.v * a
        fit(dynamics, data, lr=1e-2, dynamics_steps=1200, recent_ratio=0.0, average_steps=average_steps)
        with th.no_grad():
            errors[average_steps] = dynamics.squared_error(s, a, following, rewards).mean().item()
    assert errors[100] < 0.6 * errors[0], errors


def test_fit_that_is_not_finite_is_told():
    dynamics = Dynamics(2, 1, 2, 1, net_arch=[8])
    with th.no_grad():
        dynamics.body.layers[0].bias.fill_(math.nan)
    with pytest.raises(
        ValueError, match=r"loss on held-out rows is not finite: lower dynamics_kwargs\['learning_rate'\]"
    ):
        fit(dynamics, noise(), dynamics_steps=20)


@pytest.mark.parametrize("name", ["dynamics_steps", "classifier_steps", "batch_size", "n_recent", "max_holdout"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=rf"fit_kwargs\['{name}'\]=0 must be a whole number of at least 1"):
        FitSettings(**{name: 0})
    with pytest.raises(ValueError, match=r"holdout_ratio'\]=0.95 must be a finite number between 0 and 0.9"):
        FitSettings(holdout_ratio=0.95)
    with pytest.raises(ValueError, match=r"average_steps'\]=-1 must be 0 for none, or a whole number of at least 1"):
        FitSettings(average_steps=-1)


# -- what the dynamics are trained for --


def terms(row: Objective, n: int = 30) -> tuple[Terms, Dynamics, SimpleNamespace]:
    th.manual_seed(0)
    dynamics = Dynamics(2, 1, 3, 2, net_arch=[8])
    classifier = Classifier(2, 1, net_arch=(8,)).eval()
    rows = SimpleNamespace(
        observations=th.randn(3, n, 2),
        actions=th.randn(3, n, 1),
        next_observations=th.randn(3, n, 2),
        rewards=th.randn(3, n, 1),
        dones=(th.rand(3, n, 1) < 0.3).float(),
    )
    return Terms(row, dynamics, classifier, lambda s: s.sum(dim=1, keepdim=True), rows), dynamics, rows


def test_terms_are_weighted_means_of_each_member():
    row = Objective(
        reward=OBJECTIVES["vmbpo"].reward,
        model_loss=OBJECTIVES["vmbpo"].model_loss,
        likelihood_weight=2.0,
        adversarial_weight=0.5,
    )
    ours, dynamics, rows = terms(row)
    predicted = dynamics(rows.observations, rows.actions)
    real = (rows.observations, rows.next_observations, rows.rewards)
    nll = dynamics.nll_of(predicted, *real)
    assert_close(ours.nll, 2 * nll.mean(dim=1))
    assert_close(ours.nll_of_each, 2 * nll)
    assert_close(ours.value_of_each, 0.5 * rows.next_observations.sum(dim=2) * (rows.dones[..., 0] == 0))
    assert_close(ours.crps, 400 * dynamics.crps_of(predicted, *real).mean(dim=1))
    s, a, s2 = ours._drawn
    assert s.shape == (3, 10, 2)
    assert_close(s, rows.observations[:, :10])
    assert_close(ours.value, 0.5 * s2.sum(dim=2).mean(dim=1))
    assert_close(ours.log_ratio, 0.5 * ours._classifier(s, a, s2).mean(dim=(1, 2)))


def test_value_and_realism_reach_each_members_own_parameters():
    """Through the reparameterised draw, and one member's loss no other's."""
    for name in ("value", "log_ratio"):
        ours, dynamics, _ = terms(OBJECTIVES["vmbpo"])
        getattr(ours, name)[1].backward()
        gradient = dynamics.body.layers[-1].weight.grad
        assert gradient is not None
        assert gradient[1].abs().sum() > 0
        assert gradient[0].abs().sum() == gradient[2].abs().sum() == 0


def test_crps_learns_what_likelihood_leaves_to_noise():
    """Smooth steps, and one in ten an impact, as of a foot: what likelihood calls noise there has its cause."""
    th.manual_seed(0)
    s, a = 2 * th.rand(3000, 1) - 1, 2 * th.rand(3000, 1) - 1
    impact = s > 0.8
    data = rows_of(s, a, s + 0.05 * s * th.sin(3 * a) + impact * th.sin(4 * a))
    errors = {}
    for name in ("nll_of", "crps_of"):
        th.manual_seed(1)
        dynamics = Dynamics(1, 1, 2, 2, net_arch=[64, 64])
        score = getattr(dynamics, name)

        def loss(rows, dynamics=dynamics, score=score):
            return 10 * score(dynamics(*rows[:2]), rows[0], rows[2], rows.rewards).mean(dim=1)

        fit(dynamics, data, loss=loss, dynamics_steps=600)
        hit = (x[impact[:, 0]].expand(2, -1, -1) for x in data.batch[:5])
        with th.no_grad():
            s1, a1, s2, _, r = hit
            errors[name] = dynamics.squared_error(s1, a1, s2, r)[:, 0].mean().item()
    assert errors["crps_of"] < 0.6 * errors["nll_of"], errors


# -- dimensions that cannot be foretold --


def half_noise(n: int = 2000) -> RealTransitions:
    """s'_0 = 0.8 s_0 + 0.2 a, and s_1 = 3 + 0.5 ε, which nothing foretells."""
    s, a = th.randn(n, 2), th.randn(n, 1)
    s[:, 1] = 3 + 0.5 * s[:, 1]
    following = th.cat([0.8 * s[:, :1] + 0.2 * a, 3 + 0.5 * th.randn(n, 1)], dim=1)
    return rows_of(s, a, following, s[:, :1])


def ignoring(dynamics: Dynamics, data: RealTransitions, steps: int) -> dict[str, float]:
    optimizer = th.optim.Adam(dynamics.parameters(), lr=3e-3)
    return fit_dynamics(
        dynamics, optimizer, data, likelihood(dynamics), FitSettings(dynamics_steps=steps), ignores_noise=True
    )


def test_noise_is_drawn_as_it_is_spread_and_tells_nothing():
    th.manual_seed(0)
    dynamics = Dynamics(2, 1, 3, 3, net_arch=[32, 32])
    log = ignoring(dynamics, half_noise(), steps=200)
    assert dynamics.foretold.tolist() == [1, 0]
    assert log["dynamics/foretold"] == 0.5
    assert log["dynamics/state_error"] < 0.05 < dynamics.holdout_error[1]

    s, a = th.randn(1, 2).expand(4000, -1), th.randn(1, 1).expand(4000, -1)
    drawn, _ = dynamics.sample(s, a)
    assert drawn[:, 1].mean() == pytest.approx(3, abs=0.1)
    assert drawn[:, 1].std() == pytest.approx(0.5, rel=0.1)
    # The rest follows from the rest alone.
    other = s + th.tensor([0.0, 7.0])
    means = [dynamics(x.expand(3, -1, -1), a[:1].expand(3, -1, -1)).mean for x in (s[:1], other[:1])]
    assert_close(*means)
    survival = [dynamics.log_survival(x.expand(3, -1, -1)) for x in (s[:1], other[:1])]
    assert survival[0].equal(survival[1])
    middle = dynamics.decode(s[:1].expand(3, -1, -1), means[0])[0]
    assert_close(middle[:, 0, 1], dynamics.next_observations.mean[1].expand(3))


def test_what_can_be_foretold_after_all_comes_back():
    th.manual_seed(0)
    dynamics = Dynamics(2, 1, 2, 2, net_arch=[32, 32])
    ignoring(dynamics, half_noise(), steps=50)
    assert dynamics.foretold.tolist() == [1, 0]
    # Now s'_1 - s_1 is worth knowing, and what s_0 and a tell of it is enough to see that.
    data = half_noise()
    data.batch.next_observations[:, 1] = 3 + data.batch.observations[:, 0]
    ignoring(dynamics, data, steps=300)
    assert dynamics.foretold.tolist() == [1, 1]


def test_all_noise_is_unexplained_and_a_constant_is_not():
    th.manual_seed(0)
    data = half_noise()
    dynamics = Dynamics(1, 1, 2, 2, net_arch=[32])
    alone = [column[:, 1:] for column in (data.batch.observations, data.batch.next_observations)]
    log = ignoring(dynamics, rows_of(alone[0], data.batch.actions, alone[1]), steps=100)
    assert dynamics.foretold.tolist() == [0]
    assert log["dynamics/unexplained"] == 1
    constant = th.full_like(alone[0], 2.0)
    log = ignoring(dynamics, rows_of(constant, data.batch.actions, constant), steps=100)
    assert log["dynamics/unexplained"] < 1e-4


def test_noise_is_kept_unless_asked():
    th.manual_seed(0)
    dynamics = Dynamics(2, 1, 2, 2, net_arch=[32])
    fit(dynamics, half_noise(), dynamics_steps=50)
    assert dynamics.foretold.tolist() == [1, 1]


def test_few_rows_still_draw():
    ours, *_ = terms(OBJECTIVES["vmbpo"], n=1)
    assert ours.value.shape == ours.log_ratio.shape == (3,)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_fit_leaves_the_classifier_alone(name):
    th.manual_seed(0)
    row, data = OBJECTIVES[name], noise()
    dynamics, classifier = Dynamics(2, 1, 2, 1, net_arch=[8]), Classifier(2, 1, net_arch=(8,)).eval()
    before = [p.clone() for p in classifier.parameters()]

    def loss(rows):
        return row.model_loss(Terms(row, dynamics, classifier, lambda s: s.sum(dim=1, keepdim=True), rows), 0.9)

    fit(dynamics, data, loss=loss, dynamics_steps=5)
    for parameter, old in zip(classifier.parameters(), before, strict=True):
        assert th.equal(parameter, old)
        assert parameter.grad is None


def test_optimistic_dynamics_lean_towards_value():
    """
    On s' = N(0, 1) with V(s') = s' and the exact log-ratio, joint_loss alone moves the mean to γ: q ∝ p exp(γV) is
    N(γ, 1).
    """
    th.manual_seed(0)
    data = rows_of(th.randn(2000, 1), th.randn(2000, 1), th.randn(2000, 1))
    dynamics = Dynamics(1, 1, 2, 2, net_arch=[8])
    fit(dynamics, data, lr=1e-2, dynamics_steps=200)
    row, gamma, optimizer = OBJECTIVES["mnm"], 0.9, th.optim.Adam(dynamics.parameters(), lr=3e-3)

    class Exact(Terms):
        @property
        def nll(self):
            return th.zeros(2)

        @property
        def log_ratio(self):
            s, a, s2 = self._drawn
            mean, log_var = self._dynamics(s, a)
            scale, shift = self._dynamics.targets.std[0], self._dynamics.targets.mean[0]
            q = th.distributions.Normal(s + mean[..., :1] * scale + shift, (0.5 * log_var[..., :1]).exp() * scale)
            return (th.distributions.Normal(0.0, 1.0).log_prob(s2) - q.log_prob(s2)).mean(dim=(1, 2))

    for _ in range(300):
        index = th.randint(2000, (2, 256))
        rows = type(data.batch)(*(c[index] for c in data.batch[:5]))
        loss = row.model_loss(Exact(row, dynamics, None, lambda s: s, rows), gamma).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = dynamics.sample(th.randn(5000, 1), th.randn(5000, 1))[0]
    assert drawn.mean().item() == pytest.approx(gamma, abs=0.1)
    assert drawn.std().item() == pytest.approx(1.0, abs=0.1)


def test_weighted_dynamics_lean_towards_value():
    """On the same noise value-weighted likelihood has the same optimum N(γ, 1), and with half the weight N(γ/2, 1)."""
    for weight in (1.0, 0.5):
        th.manual_seed(0)
        data = rows_of(th.randn(4000, 1), th.randn(4000, 1), th.randn(4000, 1))
        dynamics = Dynamics(1, 1, 2, 2, net_arch=[8])
        row = replace(OBJECTIVES["mnm-weighted"], adversarial_weight=weight)

        def loss(rows, row=row, dynamics=dynamics):
            return row.model_loss(Terms(row, dynamics, None, lambda s: s, rows), 0.9)

        fit(dynamics, data, loss=loss, lr=1e-2, dynamics_steps=400, batch_size=256)
        drawn = dynamics.sample(th.randn(5000, 1), th.randn(5000, 1))[0]
        assert drawn.mean().item() == pytest.approx(weight * 0.9, abs=0.1)
        assert drawn.std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_replayed_on_cuda_equals_plain():
    data = LinearSystem().draw(500)
    rows = [column.cuda() for column in data.batch[:5]]
    plain = Dynamics(3, 1, n_members=3, n_elites=3, net_arch=[32, 32]).cuda()
    twin = deepcopy(plain)
    bootstrap = th.randint(500, (3, 500), device="cuda")
    steps = []
    for dynamics in (plain, twin):
        optimizer = th.optim.Adam(dynamics.parameters(), lr=1e-3, fused=True)
        batch = ReplayBufferSamples(*rows)
        steps.append(training_step(dynamics, optimizer, batch, bootstrap, likelihood(dynamics)))
    for column in th.randint(500, (20, 3, 64), device="cuda"):
        steps[0]._step(column)
        steps[1](column)
    assert_close(twin.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
