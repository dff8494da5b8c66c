"""
Critics whose hidden layers are normalised.

What such a critic says far from what it has learned is bounded by the weights of its last layer, and its slope along
an action falls as the activations grow. Values that an actor climbs through several steps of a learned world, and that
are learned from one another, do not run away there.

Source: Ba et al., "Layer Normalization" (2016); for critics, Ball et al., "Efficient Online Reinforcement Learning with
Offline Data", ICML 2023, and DHMBPO (Kubo et al., TMLR 2025).
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


def normalise_hidden_layers(critic: Any) -> None:
    """
    Normalise the hidden layers of SB3's critics, in place: the same layers, parameters and all, of another class.

    :param critic: a :class:`~stable_baselines3.common.policies.ContinuousCritic`
    """
    for network in critic.q_networks:
        for layer in network[:-1]:
            if type(layer) is nn.Linear:
                layer.__class__ = NormalisedLinear
