"""Where the weights of a fit began, to which exploded members go back, and the mean of those that it passed."""

from collections.abc import Iterable

import torch as th
from torch import nn

from sb3_mismatch.averaging import MOST_OF_ALL

#: What learns, in the state of an optimizer, while its mean imagines.
LEARNER = "learner"


class Start:
    """
    Where a fit began: the parameters of each member, and their moments in the optimizer.

    What a member whose fit has exploded holds of that would lead every later step astray.
    """

    def __init__(self, module: nn.Module, optimizer: th.optim.Optimizer) -> None:
        self._parameters, self._optimizer = list(module.parameters()), optimizer
        self._values = [p.detach().clone() for p in self._parameters]
        self._moments = [{name: m.clone() for name, m in self._moments_of(p).items()} for p in self._parameters]

    def _moments_of(self, parameter: nn.Parameter) -> dict[str, th.Tensor]:
        """What the optimizer keeps for each entry of the parameter; nothing before its first step."""
        state = self._optimizer.state.get(parameter, {})
        return {name: x for name, x in state.items() if isinstance(x, th.Tensor) and x.shape == parameter.shape}

    @th.no_grad()
    def restore(self, lost: th.Tensor) -> th.Tensor:
        """Put members back that are ``lost``, bool (E,), or whose moments overflow; which they were, bool (E,)."""
        lost = lost.clone()
        for moment in (m for p in self._parameters for m in self._moments_of(p).values()):
            lost |= ~moment.flatten(1).isfinite().all(dim=1)
        for parameter, value, before in zip(self._parameters, self._values, self._moments, strict=True):
            parameter.copy_(th.where(_each(lost, parameter), value, parameter))
            for name, moment in self._moments_of(parameter).items():
                # There may have been none: the learner began where its mean did.
                start = before.get(name, value if name == LEARNER else th.zeros_like(moment))
                moment.copy_(th.where(_each(lost, moment), start, moment))
        return lost


class Mean:
    """
    The mean of networks over the gradient steps of this fit and of those before. The noise of minibatches, which a
    constant learning rate leaves in the weights, is not in it.

    Between fits the networks are the mean, and what learns stands in the state of the optimizer.

    Source: Polyak and Juditsky (1992), as in :mod:`sb3_mismatch.averaging`; the exchange of weights is that of Defazio
    et al., "The Road Less Scheduled" (2024).

    As a context it puts what learns in the place of the networks, and them back.

    :param parameters: of the networks
    :param optimizer: theirs
    :param n_steps: gradient steps that the mean goes back, the time constant of its weights
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: th.optim.Optimizer, n_steps: int) -> None:
        self._parameters, self._optimizer, self._n_steps = list(parameters), optimizer, n_steps
        self._mean = [p.detach().clone() for p in self._parameters]

    def __enter__(self) -> None:
        states = [self._optimizer.state.get(p, {}) for p in self._parameters]
        self._n_taken = float(states[0].get("step", 0))
        self._put([state.get(LEARNER, mean) for state, mean in zip(states, self._mean, strict=True)])

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters:
            # Before its first step an optimizer takes any state for its own.
            if state := self._optimizer.state.get(parameter):
                state[LEARNER] = parameter.detach().clone()
        self._put(self._mean)

    @th.no_grad()
    def _put(self, weights: list[th.Tensor]) -> None:
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)

    @th.no_grad()
    def follow(self) -> None:
        """Take in what the networks have become by a gradient step."""
        self._n_taken += 1
        reach = min(self._n_steps, 1 + MOST_OF_ALL * self._n_taken)
        th._foreach_lerp_(self._mean, [p.detach() for p in self._parameters], 1 / reach)


def _each(chosen: th.Tensor, parameter: th.Tensor) -> th.Tensor:
    """(E,) -> (E, 1, ...), one for each member of a parameter."""
    return chosen.view(-1, *[1] * (parameter.dim() - 1))
