"""
Actor and critics that learn on standardised observations and are kept for raw ones.

The layer W x + b of an observation x is the layer (W σ) z + (b + W μ) of z = (x - μ) / σ. While an agent trains, the
first layers of its networks are of the latter form: a step of Adam changes each weight by about as much, and what a
weight of a raw angle and one of a raw velocity are worth may be a hundred to one. Before and after, they are those
that SB3 knows: they say the same of the same observation, whatever μ and σ have become meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import nn

from sb3_mismatch.normalising import LINEAR

#: The least deviation, over one and the mean's size: a layer of raw observations cancels what lies beyond in rounding.
LEAST_STD = 1e-3


def first_layers(networks: Sequence[Any]) -> list[nn.Linear]:
    """
    Layers of SAC's actor and critics that see observations as they are, and actions behind them.

    None where there are others, as behind a features extractor of the user's own.
    """
    layers: list[Any] = []
    for network in networks:
        if type(network.features_extractor) not in (FlattenExtractor, CombinedExtractor):
            return []
        bodies = network.q_networks if hasattr(network, "q_networks") else [network.latent_pi]
        layers += [body[0] for body in bodies if len(body) > 0]
        if hasattr(network, "latent_pi") and len(network.latent_pi) == 0:
            layers += [network.mu, network.log_std]
    covered = all(type(layer) in LINEAR and layer.bias is not None for layer in layers)
    return layers if covered else []


def least(mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """``std`` where it is large enough to divide by, (dim,)."""
    return std.maximum(LEAST_STD * (1 + mean.abs()))


@contextmanager
def standardised(layers: Sequence[nn.Linear], mean: th.Tensor, std: th.Tensor) -> Iterator[None]:
    """
    While it lasts, ``layers`` are those of standardised observations.

    :param mean, std: of observations, (dim,)
    """
    weights = [layer.weight.detach()[:, : len(mean)] for layer in layers]
    biases = [layer.bias.detach() for layer in layers]
    for weight, bias in zip(weights, biases, strict=True):
        bias += weight @ mean
        weight *= std
    try:
        yield
    finally:
        for weight, bias in zip(weights, biases, strict=True):
            weight /= std
            bias -= weight @ mean
