"""
The average actor: what :meth:`predict` plays is the mean of the actor over its last gradient steps.

While it learns, a policy that walks falls a hundred gradient steps on, and walks again after as many. Its weights
wander about what they tend to, and their mean wanders less. The average learns nothing and explores nothing: training
is the same with and without.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992). The weights of the mean
decrease exponentially into the past, so that what was learned first is forgotten.
"""

import copy
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import TensorDict
from torch import nn

from sb3_mismatch.observations import Observations

#: The mean goes back over this share of all gradient steps at most: at first an actor learns much in few of them.
MOST_OF_ALL = 0.2


class Average:
    """
    A mean of an actor that learns.

    :param actor: whose mean it is, and which it equals at first
    :param n_steps: gradient steps that it goes back, the time constant of its weights
    """

    def __init__(self, actor: nn.Module, n_steps: int) -> None:
        self.actor, self.n_steps = _still(actor), n_steps
        #: gradient steps of the actor so far
        self.n_taken = 0

    @th.no_grad()
    def follow(self, actor: nn.Module, gradient_steps: int) -> None:
        """Take in what an actor has become by so many gradient steps."""
        self.n_taken += gradient_steps
        reach = max(min(self.n_steps, MOST_OF_ALL * self.n_taken), 1.0)
        weight = 1 - (1 - 1 / reach) ** gradient_steps
        mine, its = (list(x.state_dict().values()) for x in (self.actor, actor))
        floats = [i for i, x in enumerate(mine) if x.is_floating_point()]
        th._foreach_lerp_([mine[i] for i in floats], [its[i] for i in floats], weight)


class Averaged(OffPolicyAlgorithm):
    """An algorithm whose :meth:`predict` is its average actor's under ``average_steps`` above 0."""

    average_steps: int
    _average: Average | None = None
    #: whether it is a rollout that asks for actions
    _is_rolling: bool = False

    def _setup_model(self) -> None:
        super()._setup_model()
        self._begin_average()

    def _begin_average(self) -> None:
        self._average = Average(self.policy.actor, self.average_steps) if self.average_steps > 0 else None  # type: ignore[arg-type]

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """SB3's ``train``; the average follows."""
        super().train(gradient_steps, batch_size)
        if self._average is not None:
            self._average.follow(self.policy.actor, gradient_steps)  # type: ignore[arg-type]

    def predict(
        self,
        observation: Observations,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """SB3's ``predict``, of :attr:`deployed_policy`; ``policy.predict`` is that of the policy that learns."""
        policy = self.policy if self._is_rolling else self.deployed_policy
        return policy.predict(observation, state, episode_start, deterministic)

    @property
    def deployed_policy(self) -> BasePolicy:
        """What :meth:`predict` plays: ``policy`` with the average actor, not compiled; all else is shared."""
        if self._average is None:
            return self.policy
        policy = copy.copy(getattr(self.policy, "_orig_mod", self.policy))
        policy._modules = {**policy._modules, "actor": self._average.actor}
        return policy

    def _sample_action(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        self._is_rolling = True
        try:
            return super()._sample_action(*args, **kwargs)
        finally:
            self._is_rolling = False

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """SB3's ``set_parameters``. The average begins anew."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._begin_average()

    def _learner(self) -> dict[str, Any]:
        """What a saved :attr:`deployed_policy` lacks."""
        assert self._average is not None
        return {"actor": self.policy.actor.state_dict(), "n_taken": self._average.n_taken}  # type: ignore[union-attr]

    def _go_on_from(self, learner: dict[str, Any] | None) -> None:
        """With the parameters of a deployed policy set, put its learner back; ``None``: it is the learner's own."""
        if learner is not None:
            self.policy.actor.load_state_dict(learner["actor"])  # type: ignore[union-attr]
            if self._average is not None:
                self._average.n_taken = learner["n_taken"]

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_average", "_is_rolling"]


def _still(actor: nn.Module) -> nn.Module:
    """A copy of an actor that does not learn. It shares the distribution, and so the matrices of gSDE's noise."""
    distribution = getattr(actor, "action_dist", None)
    copied: Any = copy.deepcopy(actor, {id(distribution): distribution})
    copied.optimizer = None
    still: nn.Module = copied.eval().requires_grad_(False)
    return still
