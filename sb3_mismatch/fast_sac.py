"""SB3's SAC update in small functions; knows nothing of models."""

from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update
from torch.nn import functional as F


class Losses(NamedTuple):
    """What one gradient step leaves for the log: scalars that stay on the device."""

    ent_coef: th.Tensor
    ent_coef_loss: th.Tensor | None
    critic_loss: th.Tensor
    actor_loss: th.Tensor


class FastSAC(SAC):
    """
    Soft actor-critic, bit for bit SB3's (stable_baselines3/sac/sac.py): the same draws, the same weights after every
    step. It waits for the device once per :meth:`train` instead of three times per gradient step, and the actor's
    loss computes no gradient for the critic.

    Takes SAC's arguments and nothing else. Subclasses override the part that differs: :meth:`_critic_targets`,
    :meth:`_critic_loss`, :meth:`_actor_loss`, :meth:`_soft_value`.
    """

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Update critics, actor and temperature ``gradient_steps`` times, each on a minibatch of ``batch_size`` rows.

        :raises ValueError: when a loss is not finite
        """
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        optimizers = [self.actor.optimizer, self.critic.optimizer, self.ent_coef_optimizer]
        self._update_learning_rate([optimizer for optimizer in optimizers if optimizer is not None])

        losses: list[Losses] = []
        for gradient_step in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            losses.append(self._update(batch))
            if gradient_step % self.target_update_interval == 0:
                self._update_target()

        self._n_updates += gradient_steps
        self._record_losses(losses)

    def _update(self, batch: ReplayBufferSamples) -> Losses:
        """One gradient step of the temperature, the critics and the actor, in SB3's order."""
        # The noise matrix depends on log_std, which the last step may have changed.
        if self.use_sde:
            self.actor.reset_noise()
        actions, log_prob = self.actor.action_log_prob(batch.observations)
        log_prob = log_prob.reshape(-1, 1)

        ent_coef = self._ent_coef()
        ent_coef_loss = None
        if self.ent_coef_optimizer is not None:
            ent_coef_loss = self._ent_coef_loss(log_prob)
            descend(self.ent_coef_optimizer, ent_coef_loss)

        critic_loss = self._critic_loss(batch, self._critic_targets(batch, ent_coef))
        descend(self.critic.optimizer, critic_loss)

        actor_loss = self._actor_loss(batch, actions, log_prob, ent_coef)
        descend(self.actor.optimizer, actor_loss)
        return Losses(ent_coef, ent_coef_loss, critic_loss.detach(), actor_loss.detach())

    def _ent_coef(self) -> th.Tensor:
        """The temperature α, without gradient."""
        if self.log_ent_coef is None:
            return self.ent_coef_tensor
        return th.exp(self.log_ent_coef.detach())

    def _ent_coef_loss(self, log_prob: th.Tensor) -> th.Tensor:
        """-E[log α (log π(a|s) + H)], with H the target entropy."""
        assert self.log_ent_coef is not None
        return -(self.log_ent_coef * (log_prob + self.target_entropy).detach()).mean()  # type: ignore[operator]

    def _soft_value(self, observations: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
        """V(s) = min_i Q_target,i(s, a) - α log π(a|s), with a ~ π. Shape (batch, 1)."""
        actions, log_prob = self.actor.action_log_prob(observations)
        q_values, _ = th.min(th.cat(self.critic_target(observations, actions), dim=1), dim=1, keepdim=True)
        return q_values - ent_coef * log_prob.reshape(-1, 1)

    def _critic_targets(self, batch: ReplayBufferSamples, ent_coef: th.Tensor) -> th.Tensor:
        """r + γ (1 - done) V(s'). Shape (batch, 1)."""
        discounts = self.gamma if batch.discounts is None else batch.discounts
        with th.no_grad():
            next_values = self._soft_value(batch.next_observations, ent_coef)
            return batch.rewards + (1 - batch.dones) * discounts * next_values

    def _critic_loss(self, batch: ReplayBufferSamples, targets: th.Tensor) -> th.Tensor:
        """½ Σ_i E[(Q_i(s, a) - target)²]."""
        q_values = self.critic(batch.observations, batch.actions)
        return 0.5 * sum(F.mse_loss(q_value, targets) for q_value in q_values)  # type: ignore[return-value]

    def _actor_loss(
        self, batch: ReplayBufferSamples, actions: th.Tensor, log_prob: th.Tensor, ent_coef: th.Tensor
    ) -> th.Tensor:
        """E[α log π(a|s) - min_i Q_i(s, a)]."""
        q_values, _ = th.min(th.cat(self.critic(batch.observations, actions), dim=1), dim=1, keepdim=True)
        return (ent_coef * log_prob - q_values).mean()

    def _update_target(self) -> None:
        """Polyak averaging of the weights; the running statistics of BatchNorm are copied."""
        polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _record_losses(self, losses: Sequence[Losses]) -> None:
        """Means over the gradient steps under SB3's keys: the one wait for the device."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        # Without gradient steps there are no columns.
        for name, values in zip(Losses._fields, zip(*losses, strict=True), strict=bool(losses)):
            if any(value is None for value in values):
                continue
            mean = th.stack([value.reshape(()) for value in values]).double().mean().item()
            if not abs(mean) < float("inf"):
                raise ValueError(
                    f"train/{name} is {mean} after {self._n_updates} gradient steps: the update diverged; lower "
                    "learning_rate, scale the rewards, or wrap the environment in VecNormalize"
                )
            self.logger.record(f"train/{name}", mean)


def descend(optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
    """
    One step down ``loss`` for the parameters of ``optimizer`` alone; no other gradient is computed.

    A loss that is not finite counts for nothing: the weights stay finite, and the log tells of it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    # A mask and no branch, which would wait for the device.
    useless = ~loss.detach().isfinite()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(useless, 0.0)
    optimizer.step()
