"""SAC whose critics and actor look ahead in a learned world."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from sb3_mismatch.compiled import Rows, Sizes, Starts
from sb3_mismatch.fast_sac import FastSAC, Losses, descend
from sb3_mismatch.lookahead import Path, expanded_value
from sb3_mismatch.normalising import normalise_last_features
from sb3_mismatch.rewards import least_outstanding
from sb3_mismatch.terminations import TransitionFunction
from sb3_mismatch.world import World

#: Where ``ent_coef="auto"`` starts, over the largest reward of the first rows: from SAC's 1.0 it takes Adam some 7,000
#: gradient steps to come down here, and from a tenth of what it should be as long to go up, while actions saturate.
FIRST_ENT_COEF = 0.1
#: Where it stays above with normalised critics: they are so even far from the data that a policy may keep its target
#: entropy for next to nothing, and settle for the first gait that it finds.
LEAST_ENT_COEF = 0.025
#: Adam's ε for losses in the critics' unit: where all is as good as can be, gradients are noise alone, which 1e-8 would
#: blow up to whole steps, until a policy that does all right has wandered off.
EPS = 1e-6


class Expanding(FastSAC):
    """
    FastSAC that looks ``expansion`` steps ahead from imagined states, beside the real rows of each minibatch: what the
    critics learn there, and what the actor climbs, is J (:func:`~sb3_mismatch.lookahead.expanded_value`).

    Subclasses say how: :meth:`_path_from`. Without imagined states, and at ``expansion=0``, the update is FastSAC's.
    """

    expansion: int
    actor_rate: float
    critic_layer_norm: bool | str
    world: World
    _fitted_at: int | None
    termination_fn: TransitionFunction | None
    reward_fn: TransitionFunction | None
    #: What the critics call one, in the units of what is paid, and the lowest and highest value that there can be.
    _unit: float | None = None
    _lowest_value: float = -math.inf
    _highest_value: float = math.inf
    #: The 0.99 quantile of what has been paid, without its sign; where few steps are paid for at all, less.
    _largest_payment: float = 0.0
    #: Whether critics are normalised.
    _normalised: bool = False
    #: Imagined states in a minibatch.
    _starts_each: int = 0

    def _setup_model(self) -> None:
        super()._setup_model()
        if not self._expands:
            return
        if self.critic_layer_norm != "auto":
            self._normalised = bool(self.critic_layer_norm)
        self._form_critics()
        if "eps" not in self.policy.optimizer_kwargs:
            for optimizer in (self.actor.optimizer, self.critic.optimizer):
                for group in optimizer.param_groups:
                    if "eps" in group:
                        group["eps"] = EPS

    def _form_critics(self) -> None:
        for critic in (self.critic, self.critic_target):
            normalise_last_features(critic, self._normalised)

    def _settle_critics(self, terminated: bool) -> None:
        """
        With ``critic_layer_norm="auto"``, let critics that have learned nothing yet be normalised, or not.

        :param terminated: whether an episode has ended before its time limit
        """
        if self.critic_layer_norm == "auto":
            self._normalised = not terminated
            self._form_critics()

    @property
    def _expands(self) -> bool:
        """Whether it looks ahead at all."""
        raise NotImplementedError

    def _n_starts(self, batch_size: int) -> int:
        """How many rows of a minibatch are imagined states."""
        raise NotImplementedError

    def _path_from(self, n: int) -> Path:
        """The current policy's next ``expansion`` steps from ``n`` imagined states, or some more."""
        raise NotImplementedError

    def _scale_to(self, paid: th.Tensor, slack: float = 0.0) -> None:
        """
        Choose the critics' unit so that values lie about [-1, 1], and bound what they learn; at first, where the
        temperature starts too.

        Adam moves an output by about its learning rate a step: from zero up to a return of hundreds is a long way.

        :param paid: r̃ of real transitions, (n, 1)
        :param slack: by how much imagined ones may be paid more or less
        """
        longest = self._longest
        # An end is worth nothing.
        low = min((paid.min().item() - slack) * longest, 0.0)
        high = max((paid.max().item() + slack) * longest, 0.0)
        # A whole range beyond on either side for the entropy: where all is as good as can be, a bound that is met would
        # leave nothing to tell good from better.
        self._lowest_value, self._highest_value = 2 * low - high, 2 * high - low
        # What is rare is no measure: the goal where other steps cost a little, or nothing.
        sizes = paid.abs()
        common = least_outstanding(paid) or 5 * sizes.mean().item()
        largest = min(sizes.quantile(0.99).item() or sizes.max().item(), common)
        self._largest_payment = largest
        unit = max(largest * longest, 1.0)
        if self._unit is None and self.ent_coef == "auto":
            assert self.log_ent_coef is not None
            self.log_ent_coef.data.fill_(math.log(FIRST_ENT_COEF * unit / longest))
        if self._unit is None:
            self._unit = unit
        elif unit > 2 * self._unit:
            # Rewards that begin to be common may be a hundred times what was earned before.
            self._say_the_same(self._unit / unit)
            self._unit = unit
        else:
            self._unit += 0.1 * (unit - self._unit)

    def _say_the_same(self, factor: float) -> None:
        """
        Let critics say times ``factor`` what they said, and optimizers go on as if they had from the first.

        Source: van Hasselt, Guez, Hessel, Mnih, Silver, "Learning values across many orders of magnitude", 2016.
        """
        ends: list[Any] = [network[-1] for c in (self.critic, self.critic_target) for network in c.q_networks]  # type: ignore[index]
        last = {parameter for end in ends for parameter in end.parameters()}
        for parameter in last:
            parameter.data.mul_(factor)
        # The critics' loss is a square; before their last layer, its weights come in once more.
        for optimizer, power in ((self.actor.optimizer, 1), (self.critic.optimizer, 2)):
            for parameter, state in optimizer.state.items():
                slope = factor if parameter in last else factor**power
                for name, share in (("exp_avg", slope), ("exp_avg_sq", slope**2)):
                    if name in state:
                        state[name].mul_(share)

    @property
    def _payment_size(self) -> float:
        """What a step pays where the critics' values are one, in the units of what is paid."""
        return (self._unit or 1.0) / self._longest

    @property
    def _longest(self) -> float:
        """The steps that count, by the discount."""
        return 1 / max(1 - self.gamma, 1e-3)

    def _ent_coef(self) -> th.Tensor:
        """The temperature α in the critics' unit."""
        return super()._ent_coef() / (self._unit or 1.0)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """FastSAC's, a share of whose minibatches are imagined states."""
        self._starts_each = self._n_starts(batch_size) if self._expands else 0
        if self._expands and self._normalised and self.log_ent_coef is not None and self._largest_payment > 0:
            self.log_ent_coef.data.clamp_(min=math.log(LEAST_ENT_COEF * self._largest_payment))
        with self._standardising():
            super().train(gradient_steps, batch_size - self._starts_each)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        """SB3's, of which the actor's falls to a share by the end of ``learn``."""
        super()._update_learning_rate(optimizers)
        if self._expands:
            for group in self.actor.optimizer.param_groups:
                group["lr"] *= self.actor_rate ** (1 - self._current_progress_remaining)

    def _plain_steps(self, gradient_steps: int, batch_size: int) -> list[Losses]:
        losses = super()._plain_steps(gradient_steps, batch_size)
        if self._starts_each > 0:
            # The actor keeps its last distribution, and with it the path and its gradients.
            self.policy.set_training_mode(False)
            with th.no_grad():
                assert self.world.imagined.rows is not None
                self.actor(self._seen(self.world.imagined.rows.observations[:1]), deterministic=True)
            self.policy.set_training_mode(True)
        return losses

    def _update(self, batch: ReplayBufferSamples) -> Losses:
        batch = self._standard_rows(batch)
        losses = super()._update(batch) if self._starts_each == 0 else self._update_ahead(batch)
        # The log tells the temperature in the units of the rewards.
        return losses._replace(ent_coef=losses.ent_coef * (self._unit or 1.0))

    def _update_ahead(self, batch: ReplayBufferSamples) -> Losses:
        """FastSAC's, in its order, on the real rows of ``batch`` and on paths from imagined states."""
        path = self._path_from(self._starts_each)
        log_prob = path.log_prob[0]
        ent_coef = self._ent_coef()
        ent_coef_loss = None
        if self.ent_coef_optimizer is not None:
            ent_coef_loss = self._ent_coef_loss(log_prob)
            descend(self.ent_coef_optimizer, ent_coef_loss)

        n_real, n = len(batch.rewards), len(log_prob)
        first = batch._replace(observations=self._seen(path.states[0]), actions=path.actions[0].detach())
        critic_loss = self._critic_loss(first, self._expanded_targets(path, ent_coef))
        if n_real > 0:
            real = self._critic_loss(batch, self._critic_targets(batch, ent_coef))
            critic_loss = (n * critic_loss + n_real * real) / (n + n_real)
        descend(self.critic.optimizer, critic_loss)

        actor_loss = -self._expanded_value(path, self.critic, ent_coef).mean()
        descend(self.actor.optimizer, actor_loss)
        return Losses(ent_coef, ent_coef_loss, critic_loss.detach(), actor_loss.detach())

    @th.no_grad()
    def _expanded_targets(self, path: Path, ent_coef: th.Tensor) -> th.Tensor:
        """J + α log π(a_0|s_0) by the target critics: what Q(s_0, a_0) is to be. Shape (n, 1)."""
        assert self._unit is not None
        targets = self._expanded_value(path, self.critic_target, ent_coef) + ent_coef * path.log_prob[0]
        return targets.clamp(self._lowest_value / self._unit, self._highest_value / self._unit)

    def _expanded_value(self, path: Path, critic: Any, ent_coef: th.Tensor) -> th.Tensor:
        """J, with V(s_h) = min_i Q_i(s_h, a_h) - α log π(a_h|s_h): (n, 1)."""
        q_values = th.cat(critic(self._seen(path.states[-1]), path.actions[-1]), dim=1)
        last = q_values.min(dim=1, keepdim=True).values - ent_coef * path.log_prob[-1]
        return expanded_value(path, last, ent_coef, self.gamma)

    def _seen(self, flat: th.Tensor) -> Any:
        """Raw flat states as the policy takes them."""
        raise NotImplementedError

    def _standardising(self) -> AbstractContextManager[None]:
        """While it lasts, actor and critics take standardised observations."""
        raise NotImplementedError

    def _standard_rows(self, batch: ReplayBufferSamples) -> ReplayBufferSamples:
        """Real rows as the networks take them while they train."""
        raise NotImplementedError

    # -- the compiled form --

    def _drawn_starts(self, n: int, drawn: bool = True) -> Starts:
        """``n`` imagined states, or some more, and the draws of :meth:`_path_from`; zeros where nothing is drawn."""
        raise NotImplementedError

    def _asks_to_compile(self) -> bool:
        # For the few steps before there is a world, nothing is compiled.
        return super()._asks_to_compile() and (not self._expands or self._fitted_at is not None)

    def _uncovered(self) -> str | None:
        if self._starts_each > 0 and (self.termination_fn or self.reward_fn):
            return "termination_fn and reward_fn are the user's functions"
        return super()._uncovered()

    def _rows(self, batch: ReplayBufferSamples) -> Rows:
        rows = super()._rows(self._standard_rows(batch))
        return rows if self._starts_each == 0 else rows._replace(starts=self._drawn_starts(self._starts_each))

    def _sizes(self, n: int) -> Sizes:
        return n, self._starts_each

    def _empty_rows(self, n: int) -> Rows:
        rows = super()._empty_rows(n)
        if self._starts_each == 0:
            return rows
        return rows._replace(noise=rows.noise[1:], starts=self._drawn_starts(self._starts_each, drawn=False))


Expanding.written_by = Expanding
