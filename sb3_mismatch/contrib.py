"""The learned world under the off-policy algorithms of sb3-contrib."""

import torch as th
from sb3_contrib import TQC, CrossQ

from sb3_mismatch.fast_sac import FastSAC
from sb3_mismatch.mnm import ModelBased


class MnMTQC(ModelBased, TQC):
    """
    Mismatched no more over truncated quantile critics: takes the place of :class:`sb3_contrib.TQC`.

    Source of the base: Kuznetsov et al., "Controlling Overestimation Bias with Truncated Mixture of Continuous
    Distributional Quantile Critics", ICML 2020.
    """

    _ent_coef = FastSAC._ent_coef

    def _soft_value(self, observations: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
        """V(s) = mean of the kept quantiles of the target critics at (s, a) - α log π(a|s), a ~ π. Shape (batch, 1)."""
        actions, log_prob = self.actor.action_log_prob(observations)
        quantiles: th.Tensor = self.critic_target(observations, actions).flatten(1).sort(dim=1).values
        n_kept = quantiles.shape[1] - self.top_quantiles_to_drop_per_net * self.critic.n_critics
        return quantiles[:, :n_kept].mean(dim=1, keepdim=True) - ent_coef * log_prob.reshape(-1, 1)


class MnMCrossQ(ModelBased, CrossQ):
    """
    Mismatched no more over CrossQ, whose critics have batch normalisation and no targets: takes the place of
    :class:`sb3_contrib.CrossQ`.

    Source of the base: Bhatt et al., "CrossQ: Batch Normalization in Deep Reinforcement Learning for Greater Sample
    Efficiency and Simplicity", ICLR 2024.
    """

    _ent_coef = FastSAC._ent_coef

    def _setup_model(self) -> None:
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size={self.batch_size} has no variance, by which CrossQ normalises: use at least 2, or MnM"
            )
        super()._setup_model()

    def _soft_value(self, observations: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
        """V(s) = min_i Q_i(s, a) - α log π(a|s), a ~ π, by running statistics: evaluation mode. Shape (batch, 1)."""
        actions, log_prob = self.actor.action_log_prob(observations)
        q_values, _ = th.min(th.cat(self.critic(observations, actions), dim=1), dim=1, keepdim=True)
        return q_values - ent_coef * log_prob.reshape(-1, 1)
