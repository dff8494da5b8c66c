"""When an imagined trajectory ends and what it earns: learned, or the user's function."""

from collections.abc import Callable

import torch as th
from gymnasium import spaces

from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.observations import FlatObservations, TensorObservations
from sb3_mismatch.settings import LARGEST

#: ``(observations, actions, next_observations) -> (n,) or (n, 1)``, batched tensors in the environment's own scale and
#: shape: actions between the bounds of the action space, observations raw (a dict of tensors for Dict spaces).
TransitionFunction = Callable[[TensorObservations, th.Tensor, TensorObservations], th.Tensor]


class Outcomes:
    """
    End and reward of imagined transitions.

    :param dynamics: the learned dynamics, asked where no function is given
    :param observations: the observation space's flat form
    :param action_space: the environment's, a bounded Box
    :param termination_fn: true where the episode ends at s'
    :param reward_fn: reward of the transition
    """

    def __init__(
        self,
        dynamics: Dynamics,
        observations: FlatObservations,
        action_space: spaces.Box,
        termination_fn: TransitionFunction | None = None,
        reward_fn: TransitionFunction | None = None,
    ) -> None:
        self.dynamics, self.observations = dynamics, observations
        self.termination_fn, self.reward_fn = termination_fn, reward_fn
        self._action_shape = action_space.shape
        self._action_low = th.as_tensor(action_space.low).float().flatten()
        self._action_high = th.as_tensor(action_space.high).float().flatten()

    def ends(self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """Whether the episode ends at s', more likely than not: bool (n, 1)."""
        if self.termination_fn is None:
            # Not drawn: a small probability of an end at every step would shorten every life.
            return self.dynamics.end_probability(next_observations) > 0.5
        return self._ask("termination_fn", self.termination_fn, observations, actions, next_observations) > 0.5

    def continuation(self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """Probability that the episode goes on at s', differentiable where it is learned: (n, 1)."""
        if self.termination_fn is None:
            return 1 - self.dynamics.end_probability(next_observations)
        return 1 - self.ends(observations, actions, next_observations).float()

    def rewards(
        self,
        observations: th.Tensor,
        actions: th.Tensor,
        next_observations: th.Tensor,
        learned: th.Tensor,
        ends: th.Tensor,
    ) -> th.Tensor:
        """
        What the transition earns, (n, 1): unless the user gave a function, the ``learned`` rewards and what ends pay.

        :param ends: one where the episode ends at s', or how likely that is
        """
        if self.reward_fn is None:
            return learned + ends * self.dynamics.end_reward
        return self._ask("reward_fn", self.reward_fn, observations, actions, next_observations)

    def _ask(
        self,
        name: str,
        function: TransitionFunction,
        observations: th.Tensor,
        actions: th.Tensor,
        next_observations: th.Tensor,
    ) -> th.Tensor:
        """Call the user's function in the environment's own scale and check its answer: (n, 1) float32."""
        n = len(actions)
        low, high = self._action_low.to(actions.device), self._action_high.to(actions.device)
        answer = function(
            self.observations.unflatten(observations),
            (low + 0.5 * (actions + 1) * (high - low)).reshape(n, *self._action_shape),
            self.observations.unflatten(next_observations),
        )
        if not isinstance(answer, th.Tensor) or answer.shape not in ((n,), (n, 1)):
            got = f"a tensor of shape {tuple(answer.shape)}" if isinstance(answer, th.Tensor) else type(answer).__name__
            raise ValueError(
                f"{name} must return a tensor of shape ({n},) or ({n}, 1) for {n} transitions and returned {got}: "
                "work on the last dimension of batched tensors"
            )
        if answer.is_complex():
            raise ValueError(f"{name} returned complex numbers: return real numbers or bool")
        answer = answer.reshape(n, 1).float()
        if not answer.isfinite().all():
            raise ValueError(f"{name} returned NaN or infinity: it must be finite on any imagined transition")
        if answer.abs().max() > LARGEST:
            raise ValueError(f"{name} returned a number beyond {LARGEST:g}: scale the rewards")
        return answer
