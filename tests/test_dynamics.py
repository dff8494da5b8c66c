"""The ensemble as one batched network, against member by member evaluation and worked rows."""

import math

import pytest
import torch as th
from torch.nn import functional as F
from torch.testing import assert_close

from sb3_mismatch.dynamics import Dynamics, EnsembleLinear, Standardizer
from sb3_mismatch.world import WEIGHT_DECAY


def ensemble(n_members: int = 5, n_elites: int = 3, **kwargs) -> Dynamics:
    """Members that differ visibly, on targets of different scales."""
    th.manual_seed(0)
    dynamics = Dynamics(3, 2, n_members, n_elites, **{"net_arch": [8, 8], **kwargs})
    with th.no_grad():
        for layer in (*dynamics.body.layers, *dynamics.end.layers):
            layer.weight.normal_()
            layer.bias.normal_()
    dynamics.inputs.fit(3 * th.randn(50, 5) + 1)
    dynamics.next_observations.fit(2 * th.randn(50, 3) - 1)
    dynamics.targets.fit(th.tensor([0.1, 1.0, 10.0, 100.0]) * th.randn(50, 4) + 5)
    dynamics.holdout_loss.copy_(th.tensor([0.5, 0.1, 0.4, 0.2, 0.3])[:n_members])
    return dynamics


def certain(dynamics: Dynamics) -> Dynamics:
    """The same members without noise."""
    with th.no_grad():
        dynamics.max_log_var.fill_(-60)
        dynamics.min_log_var.fill_(-90)
    return dynamics


def by_hand(dynamics: Dynamics, member: int, s: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """One member's mean and log-variance by ordinary linear layers: (N, obs_dim + 1) each."""
    x = (th.cat([s, a], dim=1) - dynamics.inputs.mean) / dynamics.inputs.std
    *hidden, last = dynamics.body.layers
    for layer in hidden:
        x = x @ layer.weight[member] + layer.bias[member]
        if dynamics.body.layer_norm:
            x = (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = x * x.sigmoid()
    out = x @ last.weight[member] + last.bias[member]
    mean, log_var = out[:, :4], 5 * out[:, 4:]
    log_var = dynamics.max_log_var[member] - F.softplus(dynamics.max_log_var[member] - log_var)
    return mean, dynamics.min_log_var[member] + F.softplus(log_var - dynamics.min_log_var[member])


@pytest.mark.parametrize("layer_norm", [False, True])
def test_batched_members_are_the_members(layer_norm):
    dynamics = ensemble(layer_norm=layer_norm)
    s, a = th.randn(5, 7, 3), th.randn(5, 7, 2)
    everyone = dynamics(s, a)
    some = dynamics(s[:2], a[:2], th.tensor([4, 1]))
    for member in range(5):
        mean, log_var = by_hand(dynamics, member, s[member], a[member])
        assert_close(everyone.mean[member], mean)
        assert_close(everyone.log_var[member], log_var)
    for block, member in enumerate([4, 1]):
        mean, log_var = by_hand(dynamics, member, s[block], a[block])
        assert_close(some.mean[block], mean)
        assert_close(some.log_var[block], log_var)


def test_log_variances_keep_their_bounds():
    dynamics = ensemble()
    log_var = dynamics(1e3 * th.randn(5, 50, 3), 1e3 * th.randn(5, 50, 2)).log_var
    assert log_var.max() <= 0.5 + 1e-3
    assert log_var.min() >= -10
    # Both ends are reached: softplus has let go.
    assert log_var.max() > 0.4
    assert log_var.min() < -9.9


def test_certain_sample_is_the_members_mean():
    dynamics = certain(ensemble())
    s, a = th.randn(5, 4, 3), th.randn(5, 4, 2)
    next_s, reward = dynamics.rsample(s, a)
    for member in range(5):
        mean, _ = by_hand(dynamics, member, s[member], a[member])
        raw = mean * dynamics.targets.std + dynamics.targets.mean
        assert_close(next_s[member], raw[:, :3] + s[member], rtol=1e-4, atol=1e-4)
        assert_close(reward[member], raw[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 300, 301])
def test_every_row_is_sampled_from_one_elite(n):
    """Members 1, 3, 4 have the lowest losses on held-out rows; rows keep their order."""
    dynamics = certain(ensemble())
    assert sorted(dynamics.elites.tolist()) == [1, 3, 4]
    s, a = th.randn(n, 3), th.randn(n, 2)
    next_s, reward = dynamics.sample(s, a)
    assert next_s.shape == (n, 3)
    assert reward.shape == (n, 1)
    drawn = th.cat([next_s, reward], dim=1)
    each = th.stack([th.cat(dynamics.rsample(s[None], a[None], th.tensor([k])), dim=2)[0] for k in (1, 3, 4)])
    distance = (each - drawn).abs().amax(dim=2)
    assert (distance.amin(dim=0) < 1e-3).all()
    assert ((distance < 1e-3).sum(dim=0) == 1).all()
    shares = distance.argmin(dim=0).bincount(minlength=3)
    assert shares.max() <= -(-n // 3)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_elite_may_serve_every_row(n):
    """Of 600 draws each elite serves about a third of any row: 200 ± 5 standard deviations."""
    dynamics = certain(ensemble())
    s, a = th.randn(n, 3), th.randn(n, 2)
    each = th.stack([dynamics.rsample(s[None], a[None], th.tensor([k]))[0][0] for k in (1, 3, 4)])
    served = th.stack([(each - dynamics.sample(s, a)[0]).abs().amax(dim=2).argmin(dim=0) for _ in range(600)])
    for row in range(n):
        assert ((served[:, row].bincount(minlength=3) - 200).abs() < 5 * 12).all()


@pytest.mark.parametrize("temperature", [0.0, 0.25, 1.0])
def test_samples_have_the_predicted_spread_at_a_temperature(temperature):
    dynamics = ensemble(1, 1, temperature=temperature)
    s, a = th.randn(1, 3), th.randn(1, 2)
    _, log_var = by_hand(dynamics, 0, s, a)
    next_s, reward = dynamics.sample(s.expand(20_000, 3), a.expand(20_000, 2))
    std = th.cat([next_s, reward], dim=1).std(dim=0)
    assert_close(std, (temperature * log_var[0].exp()).sqrt() * dynamics.targets.std, rtol=0.03, atol=1e-5)


def test_sample_carries_no_gradient_and_rsample_does():
    dynamics = ensemble()
    assert not dynamics.sample(th.randn(4, 3), th.randn(4, 2))[0].requires_grad
    assert dynamics.rsample(th.randn(5, 4, 3), th.randn(5, 4, 2))[0].requires_grad


def test_imagination_stays_near_the_data():
    """s' and r leave the range of the data by half of it at most."""
    dynamics = ensemble()
    dynamics.low.copy_(th.tensor([0.0, -1.0, -10.0, 2.0]))
    dynamics.high.copy_(th.tensor([1.0, 1.0, 10.0, 2.0]))
    next_s, reward = dynamics.decode(th.zeros(200, 3), 1e3 * th.randn(200, 4))
    assert_close(next_s.amin(dim=0), th.tensor([-0.5, -2.0, -20.0]))
    assert_close(next_s.amax(dim=0), th.tensor([1.5, 2.0, 20.0]))
    assert_close(reward, th.full((200, 1), 2.0))


def test_nll_is_the_gaussians():
    dynamics = ensemble()
    s, a, s2, r = th.randn(5, 7, 3), th.randn(5, 7, 2), th.randn(5, 7, 3), 100 * th.randn(5, 7, 1)
    nll = dynamics.nll(s, a, s2, r)
    for member in range(5):
        mean, log_var = by_hand(dynamics, member, s[member], a[member])
        target = (th.cat([s2 - s, r], dim=2)[member] - dynamics.targets.mean) / dynamics.targets.std
        expected = -th.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(target).sum(dim=1)
        # Up to a constant, half a log 2π for each of four dimensions.
        assert_close(nll[member], expected - 2 * math.log(2 * math.pi), rtol=1e-4, atol=1e-4)


def test_crps_is_the_integral_of_its_definition():
    """∫ (F(y) - 1[y >= target])² dy over a grid."""
    dynamics = ensemble()
    s, a, s2, r = th.randn(5, 7, 3), th.randn(5, 7, 2), th.randn(5, 7, 3), 100 * th.randn(5, 7, 1)
    predicted = dynamics(s, a)
    crps = dynamics.crps_of(predicted, s, s2, r)
    assert crps.shape == (5, 7)
    targets = dynamics.targets.transform(dynamics.raw_targets(s, s2, r)).double()
    y = th.linspace(-60, 60, 120_001, dtype=th.double)
    for member, row in ((0, 0), (4, 6)):
        total = 0.0
        for k in range(4):
            normal = th.distributions.Normal(
                predicted.mean[member, row, k].double(), (0.5 * predicted.log_var[member, row, k].double()).exp()
            )
            square = (normal.cdf(y) - (y >= targets[member, row, k]).double()).square()
            total += th.trapezoid(square, y).item()
        assert crps[member, row].item() == pytest.approx(total, rel=2e-3)


def test_squared_error_is_per_target():
    dynamics = ensemble()
    s, a = th.randn(5, 7, 3), th.randn(5, 7, 2)
    mean = dynamics(s, a).mean
    wrong = mean + th.tensor([0.0, 1.0, 2.0, 3.0])
    raw = dynamics.targets.inverse(wrong)
    error = dynamics.squared_error(s, a, s + raw[..., :3], raw[..., 3:])
    assert_close(error, th.tensor([0.0, 1.0, 4.0, 9.0]).repeat(5, 1), rtol=1e-3, atol=1e-4)


def test_end_probability_is_the_members_mean():
    dynamics = ensemble(end_arch=[])
    s2 = th.randn(6, 3)
    x = (s2 - dynamics.next_observations.mean) / dynamics.next_observations.std
    (layer,) = dynamics.end.layers
    each = [(x @ layer.weight[k] + layer.bias[k]).sigmoid() for k in range(5)]
    assert_close(dynamics.end_probability(s2), sum(each) / 5)
    assert_close(1 - dynamics.log_survival(s2.expand(5, -1, -1)).exp(), th.stack(each))
    # Beyond a bound all members see the end; within it they think as before.
    dynamics.healthy_range.low[1] = 0.0
    dynamics.healthy_range.width[1] = 1e-3
    beyond, within = (s2[:, 1] < -0.1), (s2[:, 1] > 0.1)
    assert_close(dynamics.end_probability(s2)[beyond], th.ones(int(beyond.sum()), 1))
    assert_close(dynamics.end_probability(s2)[within], (sum(each) / 5)[within])


def test_heads_that_have_learned_nothing_see_no_end():
    assert Dynamics(3, 2).end_probability(th.randn(100, 3)).max() < 0.05


def test_novelty_by_hand():
    """½ log(1 + variance of the elites' means / their error), over targets; alike members have nothing to learn."""
    dynamics = Dynamics(2, 1, 4, 3, (8,))
    dynamics.holdout_loss.copy_(th.tensor([3.0, 9.0, 1.0, 2.0]))
    s, a = th.randn(6, 2), th.randn(6, 1)
    dynamics.holdout_error.copy_(th.tensor([0.5, 0.1, 0.02]))
    means = th.stack([dynamics(s[None], a[None], th.tensor([i])).mean[0] for i in (0, 2, 3)])
    expected = 0.5 * (1 + means.var(dim=0) / dynamics.holdout_error).log()
    assert_close(dynamics.novelty(s, a), expected.mean(dim=1, keepdim=True))
    with th.no_grad():
        for parameter in dynamics.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    assert (dynamics.novelty(s, a) < 1e-6).all()
    assert (Dynamics(2, 1, 4, 1, (8,)).novelty(s, a) == 0).all()


def test_disagreement_is_the_spread_of_the_means():
    dynamics = ensemble()
    s, a = th.randn(6, 3), th.randn(6, 2)
    means = th.stack([by_hand(dynamics, k, s, a)[0] for k in range(5)])
    assert_close(dynamics.disagreement(s, a), means.std(dim=0).mean(dim=1, keepdim=True))


def test_new_members_differ():
    th.manual_seed(0)
    layer = EnsembleLinear(4, 100, 30)
    assert len({member.sum().item() for member in layer.weight}) == 4
    # mbpo/models/bnn.py: a normal of 1 / (2 √100), cut at twice that.
    assert layer.weight.abs().max() <= 0.1
    assert layer.weight.std().item() == pytest.approx(0.88 * 0.05, rel=0.02)


def test_standardizer_by_hand():
    scale = Standardizer(2)
    scale.fit(th.tensor([[1.0, 7.0], [3.0, 7.0]]))
    assert_close(scale.transform(th.tensor([[4.0, 9.0]])), th.tensor([[2.0, 2.0]]))
    assert_close(scale.inverse(th.tensor([[2.0, 2.0]])), th.tensor([[4.0, 9.0]]))


def test_weights_of_the_networks_decay_and_nothing_else():
    dynamics = Dynamics(3, 2, net_arch=[4, 4])
    decayed, rest = dynamics.parameter_groups(WEIGHT_DECAY)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (WEIGHT_DECAY, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(layer.weight) for layer in dynamics.body.layers]
    assert len(decayed["params"]) + len(rest["params"]) == len(list(dynamics.parameters()))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_members": 2, "n_elites": 3}, "n_elites=3 must lie between 1 and n_members=2"),
        ({"n_elites": 0}, "n_elites=0 must lie between 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Dynamics(3, 2, **settings)
