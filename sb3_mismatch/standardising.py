"""
Actor and critics that see raw observations and learn as if those were standardised.

The layer W x + b of an observation x is the layer (W σ) z + (b + W μ) of z = (x - μ) / σ, and a step of the optimizer
is taken on the weights of the latter: Adam changes each weight by about as much, and what a weight of a raw angle and
one of a raw velocity are worth may be a hundred to one. Before and after the step the layer is one of raw observations:
it says the same of the same observation, whatever μ and σ have become meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import nn

#: The least deviation, over one and the mean's size: a layer of raw observations cancels what lies beyond in rounding.
LEAST_STD = 1e-3


class Scale(NamedTuple):
    """μ and σ of observations and of the actions behind them, each (obs_dim + action_dim,)."""

    mean: th.Tensor
    std: th.Tensor

    def of(self, weight: th.Tensor) -> "Scale":
        """Of what a layer sees: an actor's no actions. Each (in,), of a weight (out, in)."""
        return Scale(*(x[: weight.shape[1]] for x in self))


def standard(weight: th.Tensor, bias: th.Tensor, scale: Scale) -> tuple[th.Tensor, th.Tensor]:
    """W σ, b + W μ: of a layer of raw inputs, (out, in) and (out,), that of standardised ones."""
    mean, std = scale.of(weight)
    return weight * std, bias + weight @ mean


def raw(weight: th.Tensor, bias: th.Tensor, scale: Scale) -> tuple[th.Tensor, th.Tensor]:
    """The inverse of :func:`standard`."""
    mean, std = scale.of(weight)
    weight = weight / std
    return weight, bias - weight @ mean


def standard_gradient(weight: th.Tensor, bias: th.Tensor, scale: Scale) -> tuple[th.Tensor, th.Tensor]:
    """(∂W - ∂b μ) / σ, ∂b: of gradients in a layer of raw inputs, those in :func:`standard`'s."""
    mean, std = scale.of(weight)
    return (weight - bias.unsqueeze(1) * mean) / std, bias


def least(mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """``std`` where it is large enough to divide by, (in,)."""
    return std.maximum(LEAST_STD * (1 + mean.abs()))


def first_layers(network: Any) -> list[nn.Linear]:
    """
    Layers of SAC's actor or critics that see observations as they are, and actions behind them.

    None where there are others, as behind a features extractor of the user's own.
    """
    if type(network.features_extractor) not in (FlattenExtractor, CombinedExtractor):
        return []
    bodies = network.q_networks if hasattr(network, "q_networks") else [network.latent_pi]
    layers = [body[0] for body in bodies] if all(map(len, bodies)) else [network.mu, network.log_std]
    return layers if all(type(layer) is nn.Linear and layer.bias is not None for layer in layers) else []


@contextmanager
def standardised(optimizer: th.optim.Optimizer, layers: Sequence[nn.Linear], scale: Scale) -> Iterator[None]:
    """While it lasts, ``optimizer`` takes its steps on those forms of ``layers`` whose inputs are standardised."""

    def replace(parts: Sequence[Any], form: Any) -> None:
        with th.no_grad():
            for old, new in zip(parts, form(*parts, scale), strict=True):
                old.copy_(new)

    def before(*_: Any) -> None:
        for layer in layers:
            replace((layer.weight.grad, layer.bias.grad), standard_gradient)
            replace((layer.weight, layer.bias), standard)

    def after(*_: Any) -> None:
        for layer in layers:
            replace((layer.weight, layer.bias), raw)

    hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
