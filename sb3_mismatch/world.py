"""The learned world: dynamics, classifier, their optimizers, and what they have imagined."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch as th
from gymnasium import spaces

from sb3_mismatch.buffers import ImaginedBuffer
from sb3_mismatch.classifier import Classifier
from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.fitting import FitSettings
from sb3_mismatch.observations import FlatObservations
from sb3_mismatch.settings import check_number
from sb3_mismatch.terminations import Outcomes, TransitionFunction

#: Of the dynamics' networks, apart from the gradient (AdamW).
WEIGHT_DECAY = 0.2


class World:
    """
    What an agent has learned of its environment, in the environment's own units.

    :param observation_space: a Box without images, or a Dict of such
    :param action_space: a bounded Box
    :param dynamics_kwargs: arguments of :class:`~sb3_mismatch.dynamics.Dynamics`, and its ``learning_rate``
    :param classifier_kwargs: arguments of :class:`~sb3_mismatch.classifier.Classifier`, and its ``learning_rate``
    :param fit_kwargs: arguments of :class:`~sb3_mismatch.fitting.FitSettings`
    :raises ValueError: for a space or a setting that cannot be served
    """

    dynamics: Dynamics
    classifier: Classifier

    #: the parts with a state dict, by the names under which they are saved
    parts = ("dynamics", "classifier", "dynamics_optimizer", "classifier_optimizer")

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        device: th.device,
        dynamics_kwargs: Mapping[str, Any],
        classifier_kwargs: Mapping[str, Any],
        fit_kwargs: Mapping[str, Any],
        termination_fn: TransitionFunction | None = None,
        reward_fn: TransitionFunction | None = None,
    ) -> None:
        # Another world of this kind can be made of these.
        self.observation_space, self.action_space = observation_space, action_space
        self.dynamics_kwargs, self.classifier_kwargs = dict(dynamics_kwargs), dict(classifier_kwargs)
        self.fit_kwargs = dict(fit_kwargs)
        self.observations = FlatObservations(observation_space)
        sizes = (self.observations.dim, spaces.flatdim(action_space))
        self.dynamics, learning_rate = _network(
            "dynamics_kwargs", Dynamics, sizes, {"learning_rate": 2e-3, **dynamics_kwargs}
        )
        self.dynamics.to(device).eval()
        groups = self.dynamics.parameter_groups(WEIGHT_DECAY)
        self.dynamics_optimizer = th.optim.AdamW(groups, lr=learning_rate, fused=True)
        self.classifier, learning_rate = _network(
            "classifier_kwargs", Classifier, sizes, {"learning_rate": 3e-4, **classifier_kwargs}
        )
        self.classifier.to(device).eval()
        self.classifier_optimizer = th.optim.Adam(self.classifier.parameters(), lr=learning_rate, fused=True)
        self.fit_settings: FitSettings = _build("fit_kwargs", FitSettings, fit_kwargs)
        self.outcomes = Outcomes(self.dynamics, self.observations, action_space, termination_fn, reward_fn)
        self.imagined = ImaginedBuffer()


def _network(name: str, kind: type, sizes: tuple[int, int], kwargs: Mapping[str, Any]) -> tuple[Any, float]:
    """A network and its learning rate."""
    settings = dict(kwargs)
    learning_rate = settings.pop("learning_rate")
    check_number(f"{name}['learning_rate']", learning_rate, 0, 1)
    return _build(name, kind, settings, *sizes), float(learning_rate)


def _build(name: str, kind: type, kwargs: Mapping[str, Any], *args: Any) -> Any:
    """An instance of ``kind``; a setting that it does not know is told by the name of the user's argument."""
    if unknown := set(kwargs) - set(inspect.signature(kind).parameters):
        known = sorted(set(inspect.signature(kind).parameters) - {"obs_dim", "action_dim"})
        raise TypeError(f"{name} holds {sorted(unknown)}, which {kind.__name__} does not take: it takes {known}")
    return kind(*args, **kwargs)
