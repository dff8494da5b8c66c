"""
The classifier C(s, a, s'), which tells real from imagined next states.

It sees real s' and s' ~ q(.|s, a) at the same (s, a) and equally often, so that its logit estimates
log p(s'|s, a) / q(s'|s, a) and nothing of how often (s, a) is met.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mismatch.dynamics import Standardizer


class Classifier(nn.Module):
    """
    A binary classifier of transitions, real as one. Dimensions of the state that the dynamics do not foretell it does
    not see: it would know imagined noise at once, and learn nothing else.

    :param obs_dim: size of the flat observation
    :param action_dim: size of the flat action
    :param net_arch: hidden layers
    :param label_smoothing: α, labels are 1 - α/2 and α/2
    :param input_noise: standard deviation of the noise on the standardised inputs while training (DARC: 1)
    :param max_log_ratio: the log-ratio is clipped to this many nats on either side
    """

    seen: th.Tensor

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        net_arch: Sequence[int] = (256, 256),
        label_smoothing: float = 0.01,
        input_noise: float = 0.1,
        max_log_ratio: float = 5.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        if not max_log_ratio > 0:
            raise ValueError(f"max_log_ratio={max_log_ratio} must be above 0")
        self.label_smoothing, self.input_noise, self.max_log_ratio = label_smoothing, input_noise, max_log_ratio
        # The change of state is an input of its own scale: beside s and s' alone it would drown.
        self.inputs = Standardizer(2 * obs_dim + action_dim)
        self.register_buffer("seen", th.ones(2 * obs_dim + action_dim))
        sizes = [2 * obs_dim + action_dim, *net_arch]
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [nn.Linear(i, o), nn.LayerNorm(o), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    @staticmethod
    def features(observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """[s, a, s' - s], (..., 2 obs_dim + action_dim)."""
        return th.cat([observations, actions, next_observations - observations], dim=-1)

    def forward(self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """Logit of being real, (..., 1)."""
        x = self.inputs.transform(self.features(observations, actions, next_observations))
        if self.training and self.input_noise > 0:
            x = x + self.input_noise * th.randn_like(x)
        logits: th.Tensor = self.net(self.seen * x)
        return logits

    def see(self, foretold: th.Tensor) -> None:
        """Look at these dimensions of the state, ones, and at no others, zeros: (obs_dim,)."""
        self.seen[: len(foretold)] = self.seen[-len(foretold) :] = foretold

    def loss(self, logits: th.Tensor, labels_real_is_one: th.Tensor) -> th.Tensor:
        """Cross-entropy with smoothed labels: a scalar."""
        labels = labels_real_is_one * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        return F.binary_cross_entropy_with_logits(logits, labels)

    def log_ratio(self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """log C/(1-C), the estimate of log p/q, clipped: (..., 1). Positive where the transition looks real."""
        limit = self.max_log_ratio
        logits: th.Tensor = self(observations, actions, next_observations)
        return logits.clamp(-limit, limit)
