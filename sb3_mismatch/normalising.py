"""
Critics whose last hidden layer is normalised.

What such a critic says far from what it has learned is bounded by the weights behind that layer. Values that an actor
climbs through several steps of a learned world, and that are learned from one another, do not run away there.

Source: Ba et al., "Layer Normalization" (2016); for the last features of a critic, Hussing et al., "Dissecting Deep RL
with High Update Ratios: Combatting Value Divergence", RLC 2024; for all of them, Ball et al., "Efficient Online
Reinforcement Learning with Offline Data", ICML 2023, and DHMBPO (Kubo et al., TMLR 2025).
"""

from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F


def layer_norm(x: th.Tensor) -> th.Tensor:
    """Each row of (..., dim) at mean zero and variance one: LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:])


class NormalisedLinear(nn.Linear):
    """A linear layer whose outputs are normalised; its parameters are those of the linear layer, names included."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        """(..., in) -> (..., out)."""
        return layer_norm(super().forward(x))


#: kinds of layers whose parameters are those of a linear layer
LINEAR = (nn.Linear, NormalisedLinear)


def normalise_last_features(critic: Any, normalised: bool) -> None:
    """
    Normalise the last hidden layer of SB3's critics, in place: the same layer, parameters and all, of another class.

    :param critic: a :class:`~stable_baselines3.common.policies.ContinuousCritic`
    :param normalised: False: it is to be SB3's again
    """
    for network in critic.q_networks:
        hidden = [layer for layer in network if type(layer) in LINEAR][:-1]
        for layer in hidden[-1:]:
            layer.__class__ = NormalisedLinear if normalised else nn.Linear
