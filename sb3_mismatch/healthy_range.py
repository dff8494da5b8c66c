"""The range of states in which episodes go on: most tasks that end do so where some quantity leaves its range."""

import torch as th
from torch import nn
from torch.nn import functional as F

#: Where there is no bound: finite, as all weights are, and beyond any observation.
NO_BOUND = 1e30
#: A bound is drawn where so many ends lie beyond all that lived on: a single one may by chance.
FEWEST_ENDS = 2
#: Width of a bound at least, in standard deviations of what lived on, so that its gradient stays finite.
LEAST_WIDTH = 0.02


class HealthyRange(nn.Module):
    """
    Bounds on single quantities of the state that the episodes' ends are found beyond, as Gymnasium's tasks have them
    (``healthy_z_range``, ``healthy_angle_range``).

    A few ends are enough to find them, where a network would need thousands, and where the policy has never been they
    hold as well.

    :param obs_dim: size of the flat observation
    """

    low: th.Tensor
    high: th.Tensor
    width: th.Tensor

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("low", th.full((obs_dim,), -NO_BOUND))
        self.register_buffer("high", th.full((obs_dim,), NO_BOUND))
        self.register_buffer("width", th.ones(obs_dim))

    @th.no_grad()
    def fit(self, next_observations: th.Tensor, dones: th.Tensor) -> None:
        """
        As few bounds as tell all ends that bounds can tell, each half-way between those who lived on and those ended.

        :param next_observations: (n, obs_dim)
        :param dones: one where the episode ended there, (n, 1)
        """
        self.low.fill_(-NO_BOUND)
        self.high.fill_(NO_BOUND)
        ended = dones.squeeze(1) > 0
        if not ended.any() or ended.all():
            return
        # The upper bounds of x are the lower ones of -x.
        both = th.cat([next_observations, -next_observations], dim=1)
        lived, over = both[~ended], both[ended]
        lowest = lived.amin(dim=0)
        beyond = over < lowest
        bounds, untold = th.full_like(lowest, -NO_BOUND), th.ones_like(ended[ended])
        while True:
            told = beyond[untold].sum(dim=0)
            side = int(told.argmax())
            if told[side] < FEWEST_ENDS:
                break
            bounds[side] = 0.5 * (lowest[side] + over[beyond[:, side], side].max())
            untold &= ~beyond[:, side]
        low, high = bounds.chunk(2)
        self.low.copy_(low)
        self.high.copy_(-high)
        self.width.copy_((LEAST_WIDTH * next_observations[~ended].std(dim=0, correction=0)).clamp(min=1e-8))

    def log_survival(self, next_observations: th.Tensor) -> th.Tensor:
        """Log-probability to live on at s', by the bound that is least kept: (..., obs_dim) -> (..., 1)."""
        inside = th.minimum(next_observations - self.low, self.high - next_observations) / self.width
        return F.logsigmoid(inside.amin(dim=-1, keepdim=True))
