"""The classifier's log-ratio against the closed form of two Gaussians."""

import math

import pytest
import torch as th
from torch.testing import assert_close
from toys import rows_of

from sb3_mismatch.classifier import Classifier
from sb3_mismatch.fitting import FitSettings, fit_classifier


class TwoGaussians:
    """Real s' ~ N(s + m1(a), S1), imagined s' ~ N(s + m2(a), S2), S diagonal, in two dimensions."""

    std_real, std_imagined = th.tensor([0.5, 0.3]), th.tensor([0.7, 0.25])

    def draw(self, s: th.Tensor, a: th.Tensor, real: bool) -> th.Tensor:
        mean, std = (self.real(s, a), self.std_real) if real else (self.imagined(s, a), self.std_imagined)
        return mean + std * th.randn_like(s)

    def real(self, s: th.Tensor, a: th.Tensor) -> th.Tensor:
        return s + 0.2 * a

    def imagined(self, s: th.Tensor, a: th.Tensor) -> th.Tensor:
        return s + th.tensor([0.3, -0.1])

    def log_ratio(self, s: th.Tensor, a: th.Tensor, s2: th.Tensor) -> th.Tensor:
        """log p/q, row by row: (n, 1)."""
        p = th.distributions.Normal(self.real(s, a), self.std_real).log_prob(s2)
        q = th.distributions.Normal(self.imagined(s, a), self.std_imagined).log_prob(s2)
        return (p - q).sum(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def fitted():
    th.manual_seed(0)
    system = TwoGaussians()
    s, a = th.randn(40_000, 2), 2 * th.rand(40_000, 1) - 1
    data = rows_of(s, a, system.draw(s, a, real=True))
    classifier = Classifier(2, 1, net_arch=(64, 64), label_smoothing=0, input_noise=0)
    optimizer = th.optim.Adam(classifier.parameters(), lr=3e-3)
    schedule = (3e-3, 1e-3, 2e-4)
    settings = FitSettings(classifier_steps=400, batch_size=1024)
    for lr in schedule:
        optimizer.param_groups[0]["lr"] = lr
        log = fit_classifier(classifier, optimizer, data, lambda s, a: system.draw(s, a, real=False), settings)
    return system, classifier, log


def bulk(system: TwoGaussians, n: int = 5000) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Fresh rows, half real and half imagined, within 90 % of both Gaussians' mass and of the states'."""
    s, a = th.randn(n, 2), 2 * th.rand(n, 1) - 1
    s2 = th.cat([system.draw(s, a, True)[: n // 2], system.draw(s, a, False)[n // 2 :]])
    far = [((s2 - system.real(s, a)) / system.std_real), (s2 - system.imagined(s, a)) / system.std_imagined, s]
    inside = th.stack([x.square().sum(dim=1) < 4.6 for x in far]).all(dim=0)
    return s[inside], a[inside], s2[inside]


def test_log_ratio_of_two_gaussians(fitted):
    system, classifier, _ = fitted
    th.manual_seed(1)
    rows = bulk(system)
    with th.no_grad():
        ours = classifier.log_ratio(*rows)
    theirs = system.log_ratio(*rows)
    error = (ours - theirs).abs().mean().item()
    print(f"\nmean absolute error {error:.3f} nats over {len(ours)} rows; log p/q has std {theirs.std().item():.2f}")
    assert theirs.std() > 0.5
    assert error < 0.1


def test_fit_reports_held_out_figures(fitted):
    """E_p log p/q = KL(p|q), E_q log p/q = -KL(q|p), and the accuracy of the best classifier, by sampling."""
    system, _, log = fitted
    s, a = th.randn(50_000, 2), 2 * th.rand(50_000, 1) - 1
    real, imagined = (system.log_ratio(s, a, system.draw(s, a, kind)) for kind in (True, False))
    limit = 5.0
    assert log["classifier/log_ratio_real"] == pytest.approx(real.clamp(-limit, limit).mean().item(), abs=0.1)
    assert log["classifier/log_ratio_imagined"] == pytest.approx(imagined.clamp(-limit, limit).mean().item(), abs=0.1)
    best = ((real > 0).float().mean() + (imagined <= 0).float().mean()).item() / 2
    assert log["classifier/accuracy"] == pytest.approx(best, abs=0.02)


def test_how_often_a_state_is_met_does_not_matter():
    """Where q = p at every (s, a) the log-ratio is near zero everywhere, whatever the states' density."""
    th.manual_seed(0)
    s = th.cat([th.randn(3000, 1) - 2, th.randn(100, 1) + 2])
    a = th.zeros(len(s), 1)
    data = rows_of(s, a, s + th.randn_like(s))
    classifier = Classifier(1, 1, net_arch=(32,), label_smoothing=0, input_noise=0)
    optimizer = th.optim.Adam(classifier.parameters(), lr=1e-3)
    log = fit_classifier(
        classifier, optimizer, data, lambda s, a: s + th.randn_like(s), FitSettings(classifier_steps=100)
    )
    with th.no_grad():
        assert classifier.log_ratio(*data.batch[:3]).abs().mean() < 0.1
    assert log["classifier/accuracy"] == pytest.approx(0.5, abs=0.05)


def test_loss_by_hand():
    """α = 0.2: labels 0.9 and 0.1."""
    classifier = Classifier(1, 1, label_smoothing=0.2)
    loss = classifier.loss(th.tensor([[2.0], [-1.0]]), labels_real_is_one=th.tensor([[1.0], [0.0]]))
    first = -0.9 * math.log(1 / (1 + math.exp(-2))) - 0.1 * math.log(1 / (1 + math.exp(2)))
    second = -0.1 * math.log(1 / (1 + math.exp(1))) - 0.9 * math.log(1 / (1 + math.exp(-1)))
    assert loss.item() == pytest.approx((first + second) / 2)


def test_smoothing_bounds_the_optimal_logit():
    """Of one real row the best logit is log((1 - α/2) / (α/2)) = log 19."""
    classifier = Classifier(1, 1, label_smoothing=0.1)
    logit = th.zeros(1, 1, requires_grad=True)
    optimizer = th.optim.LBFGS([logit], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = classifier.loss(logit, th.ones(1, 1))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert logit.item() == pytest.approx(math.log(19), abs=1e-3)


def test_log_ratio_is_the_clipped_logit():
    classifier = Classifier(2, 1, net_arch=(4,), max_log_ratio=0.7).eval()
    rows = 3 * th.randn(50, 2), th.randn(50, 1), 3 * th.randn(50, 2)
    with th.no_grad():
        classifier.net[-1].weight.mul_(20)
        logits, log_ratio = classifier(*rows), classifier.log_ratio(*rows)
    assert logits.abs().max() > 0.7
    assert_close(log_ratio, logits.clamp(-0.7, 0.7))


def test_noise_is_for_training_alone():
    classifier = Classifier(2, 1, input_noise=0.5)
    rows = th.randn(5, 2), th.randn(5, 1), th.randn(5, 2)
    assert not th.equal(classifier.train()(*rows), classifier(*rows))
    assert th.equal(classifier.eval()(*rows), classifier(*rows))


def test_change_of_state_is_an_input_of_its_own_scale():
    s, a, s2 = th.tensor([[1.0, 2.0]]), th.tensor([[3.0]]), th.tensor([[1.5, 4.0]])
    assert_close(Classifier.features(s, a, s2), th.tensor([[1.0, 2.0, 3.0, 0.5, 2.0]]))


@pytest.mark.parametrize("settings", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"max_log_ratio": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Classifier(2, 1, **settings)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows(n):
    data = rows_of(th.randn(n, 2), th.randn(n, 1), th.randn(n, 2))
    classifier = Classifier(2, 1, net_arch=(4,))
    settings = FitSettings(classifier_steps=2, batch_size=7)
    log = fit_classifier(classifier, th.optim.Adam(classifier.parameters()), data, lambda s, a: s, settings)
    assert all(math.isfinite(value) for value in log.values())


def test_loss_that_is_not_finite_is_told():
    data = rows_of(th.randn(50, 2), th.randn(50, 1), th.randn(50, 2))
    classifier = Classifier(2, 1, net_arch=(4,))
    with th.no_grad():
        classifier.net[0].bias.fill_(math.nan)
    optimizer = th.optim.Adam(classifier.parameters())
    with pytest.raises(ValueError, match="the classifier's loss is not finite: lower classifier_kwargs"):
        fit_classifier(classifier, optimizer, data, lambda s, a: s, FitSettings(classifier_steps=3))


def test_what_is_not_foretold_is_not_seen():
    th.manual_seed(0)
    classifier = Classifier(2, 1).eval()
    s, a, s2 = th.randn(5, 2), th.randn(5, 1), th.randn(5, 2)
    before = classifier.log_ratio(s, a, s2)
    classifier.see(th.tensor([1.0, 0.0]))
    noise = th.tensor([0.0, 7.0])
    assert not classifier.log_ratio(s, a, s2).equal(before)
    assert classifier.log_ratio(s, a, s2).equal(classifier.log_ratio(s + noise, a, s2 - noise))
    classifier.see(th.ones(2))
    assert classifier.log_ratio(s, a, s2).equal(before)
