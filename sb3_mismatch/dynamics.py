"""
The learned dynamics q(s', r, end | s, a): a probabilistic ensemble run as one batched network.

Source: PETS (Chua et al., 2018) and MBPO (Janner et al., 2019; mbpo/models/bnn.py, constructor.py), with every target
standardised by itself and an end-of-episode head, which they lack.

Shape letters: E members, K of them in use, N rows each.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mismatch.healthy_range import HealthyRange
from sb3_mismatch.normalising import layer_norm
from sb3_mismatch.products import linear
from sb3_mismatch.rewards import least_outstanding
from sb3_mismatch.settings import check_number

#: More rows than these go through one member after the other on a CPU, so many together: what is between two layers
#: stays in its cache.
ROWS_AT_ONCE = 1000
#: A dimension of the next state of whose variance this share is left unexplained is not foretold: it is noise.
NOISE = 0.9
#: What it weighs in the losses is enough for its own outputs to learn, should there be something to learn after all.
NOISE_WEIGHT = 0.01


class EnsembleLinear(nn.Module):
    """E linear layers as one batched product; weights from a normal truncated at two standard deviations."""

    def __init__(self, n_members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.empty(n_members, in_features, out_features))
        self.bias = nn.Parameter(th.zeros(n_members, 1, out_features))
        std = 0.5 * in_features**-0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: th.Tensor, members: th.Tensor | None = None) -> th.Tensor:
        """(K, N, in) -> (K, N, out), row block k through member ``members[k]``."""
        weight = self.weight if members is None else self.weight[members]
        bias = self.bias if members is None else self.bias[members]
        if len(weight) == 1 and not th.is_grad_enabled():
            return linear(x[0], weight[0], bias[0, 0]).unsqueeze(0)
        return th.baddbmm(bias, x, weight)


class EnsembleMLP(nn.Module):
    """E multilayer perceptrons with SiLU, and LayerNorm without parameters if asked for."""

    def __init__(
        self, n_members: int, in_features: int, net_arch: Sequence[int], out_features: int, layer_norm: bool = False
    ) -> None:
        super().__init__()
        sizes = [in_features, *net_arch, out_features]
        self.layers = nn.ModuleList(EnsembleLinear(n_members, i, o) for i, o in pairwise(sizes))
        self.layer_norm = layer_norm

    def forward(self, x: th.Tensor, members: th.Tensor | None = None) -> th.Tensor:
        """(K, N, in) -> (K, N, out)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x, members)
            if self.layer_norm:
                x = layer_norm(x)
            # What is allocated anew has to be paged in.
            x = F.silu(x, inplace=not th.is_grad_enabled())
        out: th.Tensor = last(x, members)
        return out


class Gaussian(NamedTuple):
    """Mean and log-variance of the standardised targets, each (K, N, obs_dim + 1); the reward comes last."""

    mean: th.Tensor
    log_var: th.Tensor


class Standardizer(nn.Module):
    """x -> (x - mean) / std per dimension; a constant dimension is only shifted."""

    mean: th.Tensor
    std: th.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(dim))
        self.register_buffer("std", th.ones(dim))

    def fit(self, x: th.Tensor) -> None:
        """Take mean and standard deviation over the rows of ``x``, (n, dim)."""
        std, mean = th.std_mean(x, dim=0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(th.where(std > 1e-6 * (1 + mean.abs()), std, th.ones_like(std)))

    def transform(self, x: th.Tensor) -> th.Tensor:
        """(..., dim) -> (..., dim)."""
        return (x - self.mean) / self.std

    def inverse(self, y: th.Tensor) -> th.Tensor:
        """(..., dim) -> (..., dim)."""
        return y * self.std + self.mean


class Dynamics(nn.Module):
    """
    An ensemble of Gaussian networks for next state and reward, and of end-of-episode classifiers.

    Everything outside is in the environment's own units (actions scaled to [-1, 1]); inputs and targets are
    standardised inside. Each learned state dimension and the reward has its own scale.

    Dimensions of the state that cannot be foretold, the contact forces of Ant-v5 say, are drawn as they are spread in
    the data, tell the networks nothing and hardly weigh in their losses, once :meth:`ignore_noise` has been called.

    :param obs_dim: size of the flat observation
    :param action_dim: size of the flat action
    :param n_members: networks in the ensemble (MBPO: 7)
    :param n_elites: how many of them, those with the lowest loss on held-out rows, imagine (MBPO: 5)
    :param net_arch: hidden layers of each member (MBPO: four of 200)
    :param layer_norm: whether hidden layers are normalised (DHMBPO)
    :param end_arch: hidden layers of each end-of-episode head, which sees s' alone: ends are rare, and what else a
        head sees it learns by heart
    :param temperature: what the members' variances are multiplied by where next states and rewards are drawn; 0: each
        member goes by its mean. Source: Ha and Schmidhuber, "World Models", 2018, section 3.2
    :raises ValueError: when there are more elites than members, or the temperature is below zero or not finite
    """

    holdout_loss: th.Tensor
    holdout_error: th.Tensor
    foretold: th.Tensor
    end_reward: th.Tensor
    low: th.Tensor
    high: th.Tensor

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        n_members: int = 5,
        n_elites: int = 3,
        net_arch: Sequence[int] = (200, 200, 200),
        layer_norm: bool = True,
        end_arch: Sequence[int] = (64, 64),
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_number("dynamics_kwargs['temperature']", temperature, 0, 100)
        if not 1 <= n_elites <= n_members:
            raise ValueError(f"n_elites={n_elites} must lie between 1 and n_members={n_members}: choose fewer elites")
        self.n_members, self.n_elites = n_members, n_elites
        self.temperature = float(temperature)
        n_targets = obs_dim + 1
        self.inputs = Standardizer(obs_dim + action_dim)
        self.targets = Standardizer(n_targets)
        self.next_observations = Standardizer(obs_dim)
        self.body = EnsembleMLP(n_members, obs_dim + action_dim, net_arch, 2 * n_targets, layer_norm)
        self.max_log_var = nn.Parameter(th.full((n_members, 1, n_targets), 0.5))
        self.min_log_var = nn.Parameter(th.full((n_members, 1, n_targets), -10.0))
        self.healthy_range = HealthyRange(obs_dim)
        self.end = EnsembleMLP(n_members, obs_dim, end_arch, 1)
        # Ends are rare: heads that have learned little say no.
        nn.init.constant_(self.end.layers[-1].bias, -4.0)  # type: ignore[arg-type]
        # Floats, as every tensor of a state dict here: SB3's own tests overwrite them with random numbers.
        self.register_buffer("holdout_loss", th.zeros(n_members))
        self.register_buffer("holdout_error", th.ones(n_targets))
        self.register_buffer("foretold", th.ones(obs_dim))
        self.register_buffer("end_reward", th.zeros(1))
        # The range of the targets' raw quantities (s', r), which imagination does not leave.
        self.register_buffer("low", th.full((n_targets,), -th.inf))
        self.register_buffer("high", th.full((n_targets,), th.inf))

    @property
    def elites(self) -> th.Tensor:
        """Indices of the ``n_elites`` members with the lowest loss on held-out rows."""
        return self.holdout_loss.topk(self.n_elites, largest=False).indices

    def forward(self, observations: th.Tensor, actions: th.Tensor, members: th.Tensor | None = None) -> Gaussian:
        """(K, N, obs_dim), (K, N, action_dim) -> standardised targets' distribution."""
        x = self.inputs.transform(th.cat([observations, actions], dim=-1))
        x = x * F.pad(self.foretold, (0, actions.shape[-1]), value=1.0)
        mean, log_var = self.body(x, members).chunk(2, dim=-1)
        # From one down to the noise of a simulator is a long way for a log-variance: five times as fast a stride.
        log_var = 5.0 * log_var
        high = self.max_log_var if members is None else self.max_log_var[members]
        low = self.min_log_var if members is None else self.min_log_var[members]
        log_var = high - F.softplus(high - log_var)
        return Gaussian(mean, low + F.softplus(log_var - low))

    def raw_targets(self, observations: th.Tensor, next_observations: th.Tensor, rewards: th.Tensor) -> th.Tensor:
        """[s' - s, r], (..., obs_dim + 1), in the environment's units."""
        return th.cat([next_observations - observations, rewards], dim=-1)

    def standard_targets(self, observations: th.Tensor, next_observations: th.Tensor, rewards: th.Tensor) -> th.Tensor:
        """:meth:`raw_targets`, standardised."""
        return self.targets.transform(self.raw_targets(observations, next_observations, rewards))

    def decode(
        self, observations: th.Tensor, targets: th.Tensor, noise: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Standardised targets -> (s', r) in the environment's units, within the widened range of the data.

        :param noise: standard normal, (K, N, obs_dim + 1): where among the data a dimension lies that is not foretold;
            ``None``: in the middle
        """
        raw = self.targets.inverse(targets)
        spread = th.zeros_like(observations) if noise is None else noise[..., :-1]
        state = th.where(self.foretold > 0, observations + raw[..., :-1], self.next_observations.inverse(spread))
        # Half a range beyond the data: free to go where no data is, never off to infinity.
        margin = 0.5 * (self.high - self.low)
        out = th.cat([state, raw[..., -1:]], dim=-1).clamp(self.low - margin, self.high + margin)
        return out[..., :-1], out[..., -1:]

    @th.no_grad()
    def leave_to_ends(self, rewards: th.Tensor, dones: th.Tensor) -> th.Tensor:
        """
        Leave rewards that stand out to ends, where all of these pay them, a goal's reward say: networks that learned it
        would let the goal be collected in states about it, in which the episode goes on.

        :param rewards: real ones, (n, 1)
        :param dones: one where the episode ended, (n, 1)
        :return: what is left for the networks to learn, (n, 1)
        """
        paid = rewards[dones > 0]
        least = least_outstanding(rewards)
        outstanding = len(paid) > 0 and bool((paid > least).all() | (paid < -least).all())
        self.end_reward.copy_(paid.mean() if outstanding else th.zeros(()))
        return rewards - dones * self.end_reward

    def ignore_noise(self) -> None:
        """Tell the dimensions of the state that are foretold on held-out rows from those that are not."""
        unexplained = self.holdout_error[:-1] * (self.targets.std[:-1] / self.next_observations.std).square()
        self.foretold.copy_(unexplained < NOISE)

    def _weights(self) -> th.Tensor:
        """Of the targets in the losses, (obs_dim + 1,)."""
        return F.pad(self.foretold.clamp(min=NOISE_WEIGHT), (0, 1), value=1.0)

    def nll(
        self,
        observations: th.Tensor,
        actions: th.Tensor,
        next_observations: th.Tensor,
        rewards: th.Tensor,
        members: th.Tensor | None = None,
    ) -> th.Tensor:
        """-log q(s', r | s, a) of the standardised targets in nats, up to ½ log 2π per dimension: (K, N)."""
        return self.nll_of(self(observations, actions, members), observations, next_observations, rewards)

    def nll_of(
        self, predicted: Gaussian, observations: th.Tensor, next_observations: th.Tensor, rewards: th.Tensor
    ) -> th.Tensor:
        """:meth:`nll` under what was predicted already."""
        mean, log_var = predicted
        targets = self.standard_targets(observations, next_observations, rewards)
        return 0.5 * (self._weights() * ((mean - targets).square() * (-log_var).exp() + log_var)).sum(dim=-1)

    def crps_of(
        self, predicted: Gaussian, observations: th.Tensor, next_observations: th.Tensor, rewards: th.Tensor
    ) -> th.Tensor:
        """
        Continuous ranked probability score of the standardised targets, summed over them: (K, N).

        ∫ (F(y) - 1[y >= target])² dy of each Gaussian, lowest for the true distribution as the negative log-likelihood
        is, and no steeper for what is easily foretold: it gives up nothing that is hard, an impact of a foot among
        smooth steps, for noise.

        Source: Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007, equation 21.
        """
        mean, log_var = predicted
        targets = self.standard_targets(observations, next_observations, rewards)
        std = (0.5 * log_var).exp()
        z = (targets - mean) / std
        twice_density = math.sqrt(2 / math.pi) * (-0.5 * z.square()).exp()
        scores = std * (z * th.erf(z / math.sqrt(2)) + twice_density - 1 / math.sqrt(math.pi))
        return (self._weights() * scores).sum(dim=-1)

    def squared_error(
        self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor, rewards: th.Tensor
    ) -> th.Tensor:
        """Mean squared error of each member's mean in standardised units, per target: (E, obs_dim + 1)."""
        targets = self.standard_targets(observations, next_observations, rewards)
        predicted: Gaussian = self(observations, actions)
        return (predicted.mean - targets).square().mean(dim=1)

    def log_var_penalty(self) -> th.Tensor:
        """What draws the learned bounds of the log-variances together (PETS): (E,)."""
        return 0.01 * (self.max_log_var - self.min_log_var).sum(dim=(1, 2))

    def log_survival(self, next_observations: th.Tensor) -> th.Tensor:
        """
        Each member's log-probability that the episode goes on at s': (E, N, obs_dim) -> (E, N, 1).

        It ends where the state leaves the healthy range, or for what the end-of-episode heads have seen beside that.
        """
        logits = self.end(self._seen_by_end(next_observations))
        return self.healthy_range.log_survival(next_observations) + F.logsigmoid(-logits)

    def _seen_by_end(self, next_observations: th.Tensor) -> th.Tensor:
        """s' as the end-of-episode heads take it."""
        return self.foretold * self.next_observations.transform(next_observations)

    def end_probability(self, next_observations: th.Tensor) -> th.Tensor:
        """Mean over the members of the probability that the episode ends at s': (N, obs_dim) -> (N, 1)."""
        logits = self.end(self._seen_by_end(next_observations).expand(self.n_members, -1, -1))
        # The range is every member's.
        return 1 - self.healthy_range.log_survival(next_observations).exp() * th.sigmoid(-logits).mean(dim=0)

    def rsample(
        self,
        observations: th.Tensor,
        actions: th.Tensor,
        members: th.Tensor | None = None,
        noise: th.Tensor | None = None,
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Next states and rewards by reparameterisation, row block k from member k: (K, N, .) -> (K, N, .).

        :param noise: standard normal, (K, N, obs_dim + 1); ``None`` draws it
        """
        return self.rsample_of(self(observations, actions, members), observations, noise)

    def rsample_of(
        self, predicted: Gaussian, observations: th.Tensor, noise: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """:meth:`rsample` from what was predicted already."""
        mean, log_var = predicted
        noise = th.randn_like(mean) if noise is None else noise
        std = math.sqrt(self.temperature) * (0.5 * log_var).exp()
        return self.decode(observations, mean + std * noise, noise)

    def rsample_parts(
        self, observations: th.Tensor, actions: th.Tensor, turn: int, noise: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Next states (n, obs_dim) and rewards (n, 1) by reparameterisation, each elite taking a part of the rows in turn.

        :param observations: (n, obs_dim), a multiple of ``n_elites`` rows
        :param turn: the k-th part goes to elite k - turn
        :param noise: as for :meth:`rsample`
        """
        states, acts = (x.view(self.n_elites, -1, x.shape[1]) for x in (observations, actions))
        next_observations, rewards = self.rsample(states, acts, self.elites.roll(turn), noise)
        return next_observations.flatten(0, 1), rewards.flatten(0, 1)

    @th.no_grad()
    def sample(self, observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        Next states (N, obs_dim) and rewards (N, 1), each row from one elite drawn for it.

        The elites share the rows out evenly, so that each row costs one member's work.
        """
        # In a random order: the last of them is left with fewer rows where they do not divide.
        n, elites = len(observations), self.elites[th.randperm(self.n_elites, device=observations.device)]
        rows_each = -(-n // len(elites))
        # A random order, wrapped round to fill the last block.
        order = th.randperm(n, device=observations.device).repeat(-(-rows_each * len(elites) // n))
        order = order[: rows_each * len(elites)]
        blocks = order.view(len(elites), rows_each)
        shares = [(blocks, elites)]
        if order.device.type == "cpu" and rows_each > ROWS_AT_ONCE:
            each = zip(blocks.split(1), elites.split(1), strict=True)
            shares = [(part, elite) for block, elite in each for part in block.split(ROWS_AT_ONCE, dim=1)]
        parts = [self.rsample(observations[part], actions[part], members) for part, members in shares]
        next_observations, rewards = (th.cat([x.flatten(0, 1) for x in column]) for column in zip(*parts, strict=True))
        # The place of each row among the shuffled ones.
        place = th.empty(n, dtype=th.long, device=order.device)
        place[order[:n]] = th.arange(n, device=order.device)
        return next_observations[place], rewards[place]

    @th.no_grad()
    def disagreement(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        Standard deviation over members of the standardised means, averaged over targets: (N, .) -> (N, 1).

        A single member agrees with itself: zero.
        """
        if self.n_members == 1:
            return th.zeros_like(observations[:, :1])
        stacked = [x.expand(self.n_members, *x.shape) for x in (observations, actions)]
        predicted: Gaussian = self(*stacked)
        return predicted.mean.std(dim=0).mean(dim=-1, keepdim=True)

    def novelty(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        What there is to learn of a transition from here, in nats and on average over targets: (..., .) -> (..., 1).

        ½ log(1 + variance of the elites' means / their squared error on held-out rows): whether they disagree by more
        than they err where the data are, whatever the units. A single elite agrees with itself: zero.

        Source: the information gain of MaxInfoRL (Sukhija et al., 2024), there over the members' own variances, which
        grow off the data as well.
        """
        if self.n_elites == 1:
            return th.zeros_like(observations[..., :1])
        stacked = [x.flatten(0, -2).expand(self.n_elites, -1, -1) for x in (observations, actions)]
        predicted: Gaussian = self(*stacked, self.elites)
        ratio = predicted.mean.var(dim=0) / self.holdout_error.clamp(min=1e-8)
        return 0.5 * ratio.log1p().mean(dim=-1, keepdim=True).view_as(observations[..., :1])

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Parameters for the optimizer: weights of the networks decay, and nothing else does."""
        decayed = [layer.weight for layer in self.body.layers]
        chosen = {id(weight) for weight in decayed}
        rest = [p for p in self.parameters() if id(p) not in chosen]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
