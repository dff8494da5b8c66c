"""The learned world: dynamics, classifier, their optimizers, and what they have imagined."""

from collections.abc import Mapping
from typing import Any

import torch as th
from gymnasium import spaces

from sb3_mismatch.buffers import ImaginedBuffer
from sb3_mismatch.classifier import Classifier
from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.observations import FlatObservations
from sb3_mismatch.terminations import Outcomes, TransitionFunction

#: weight decay of the hidden layers and of the output layer (mbpo/models/constructor.py)
WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)


class World:
    """
    What an agent has learned of its environment, in the environment's own units.

    :param observation_space: a Box without images, or a Dict of such
    :param action_space: a bounded Box
    :param dynamics_kwargs: arguments of :class:`~sb3_mismatch.dynamics.Dynamics`, and its ``learning_rate``
    :param classifier_kwargs: arguments of :class:`~sb3_mismatch.classifier.Classifier`, and its ``learning_rate``
    :param imagined_buffer_size: imagined transitions kept
    :raises ValueError: for a space or a setting that cannot be served
    """

    #: the parts with a state dict, by the names under which they are saved
    parts = ("dynamics", "classifier", "dynamics_optimizer", "classifier_optimizer")

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        device: th.device,
        dynamics_kwargs: Mapping[str, Any],
        classifier_kwargs: Mapping[str, Any],
        imagined_buffer_size: int,
        termination_fn: TransitionFunction | None = None,
        reward_fn: TransitionFunction | None = None,
    ) -> None:
        self.observations = FlatObservations(observation_space)
        sizes = (self.observations.dim, spaces.flatdim(action_space))
        self.dynamics, learning_rate = _build("dynamics_kwargs", Dynamics, sizes, dynamics_kwargs)
        self.dynamics.to(device).eval()
        groups = self.dynamics.parameter_groups(WEIGHT_DECAY)
        self.dynamics_optimizer = th.optim.Adam(groups, lr=learning_rate, fused=True)
        self.classifier, learning_rate = _build("classifier_kwargs", Classifier, sizes, classifier_kwargs)
        self.classifier.to(device).eval()
        self.classifier_optimizer = th.optim.Adam(self.classifier.parameters(), lr=learning_rate, fused=True)
        self.outcomes = Outcomes(self.dynamics, self.observations, action_space, termination_fn, reward_fn)
        self.imagined = ImaginedBuffer(imagined_buffer_size)


def _build(name: str, kind: type, sizes: tuple[int, int], kwargs: Mapping[str, Any]) -> tuple[Any, float]:
    """An instance of ``kind`` and its learning rate; an unknown or ill-typed setting is told by its name."""
    settings = {"learning_rate": 1e-3 if kind is Dynamics else 3e-4, **kwargs}
    learning_rate = settings.pop("learning_rate")
    if not isinstance(learning_rate, int | float) or not learning_rate >= 0:
        raise ValueError(f"{name}['learning_rate'] = {learning_rate!r} must be a number of at least 0")
    try:
        return kind(*sizes, **settings), float(learning_rate)
    except TypeError as error:
        raise TypeError(f"{name}={dict(kwargs)!r} does not fit {kind.__name__}: {error}") from error
