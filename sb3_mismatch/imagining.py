"""The agent in its learned world: what it does there, what it is paid, and what it is worth."""

from dataclasses import replace

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_mismatch.buffers import latest_episodes
from sb3_mismatch.imagination import Trajectories, discounting_horizon, imagine, lower_bound
from sb3_mismatch.objectives import OBJECTIVES, Objective, Payment, positive_offset
from sb3_mismatch.observations import Normalization, TensorObservations
from sb3_mismatch.settings import WEIGHTS
from sb3_mismatch.world import World


class Imagining(OffPolicyAlgorithm):
    """Lets the policy of an actor-critic act in ``world``, under its objective."""

    world: World
    objective: str | Objective
    reward_shift: float | str
    reward_floor: float
    _world_log: dict[str, float]

    @property
    def _row(self) -> Objective:
        """The objective, with the weights that were given in place of its own."""
        row = OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective
        return replace(row, **{name: getattr(self, name) for name in WEIGHTS if getattr(self, name) is not None})

    def _payment(self) -> Payment:
        """What the objective pays today, in the units that the critics see."""
        row = self._row
        if not row.takes_log:
            return Payment(row, self.gamma)
        assert self.replay_buffer is not None
        lowest = float(self.replay_buffer.rewards[: self.replay_buffer.size()].min())
        offset = positive_offset(str(self.objective), lowest, self.reward_shift, self.reward_floor)
        normalize = self._normalization()
        scale = 1.0 if normalize is None else normalize.reward_std
        return Payment(row, self.gamma, offset / scale, (lowest + offset) / scale)

    def _normalization(self) -> Normalization | None:
        """VecNormalize's statistics as they stand now."""
        env = self._vec_normalize_env
        return None if env is None else Normalization.of(env, self.world.observations, self.device)

    def _policy_observations(self, flat: th.Tensor) -> TensorObservations:
        """Raw flat observations (n, dim) as the policy takes them: normalised, in the space's shape."""
        normalize = self._normalization()
        return self.world.observations.unflatten(flat if normalize is None else normalize.observation(flat))

    def _act(self, flat: th.Tensor) -> th.Tensor:
        """The current stochastic policy's scaled actions at raw flat observations."""
        if self.use_sde:
            # One noise matrix a row: a batch of another size would share a single one.
            self.actor.reset_noise(len(flat))  # type: ignore[operator]
        actions: th.Tensor = self.actor(self._policy_observations(flat))
        return actions

    def _imagined_from(self, starts: th.Tensor, horizon: int) -> Trajectories:
        """Trajectories of the current policy in the learned world."""
        # gSDE's exploration matrices belong to the environment's rollout.
        distribution = getattr(self.actor, "action_dist", None)
        names = [name for name in ("exploration_mat", "exploration_matrices") if hasattr(distribution, name)]
        kept = {name: getattr(distribution, name) for name in names}
        try:
            return imagine(self._act, self.world.dynamics, self.world.outcomes, starts, horizon)
        finally:
            for name, matrix in kept.items():
                setattr(distribution, name, matrix)

    @th.no_grad()
    def _log_ratio(self, trajectories: Trajectories) -> th.Tensor:
        """Today's classifier's log p/q of each step, (horizon, n, 1); zero where the objective has no classifier."""
        if not self._row.uses_classifier:
            return th.zeros_like(trajectories.rewards)
        return self.world.classifier.log_ratio(*trajectories[:3])

    def _value(self, flat: th.Tensor) -> th.Tensor:
        """V at raw flat observations, (n, 1), differentiable in them."""
        value: th.Tensor = self._soft_value(self._policy_observations(flat), self._ent_coef())  # type: ignore[attr-defined]
        return value

    def _estimate_bound(self, payment: Payment) -> None:
        """Under a log objective: the bound by imagination beside the log of the real return, over equal horizons."""
        if not self._row.takes_log:
            return
        assert self.replay_buffer is not None
        normalize = self._normalization()
        episodes = latest_episodes(self.replay_buffer, self.world.observations, most=20)
        if len(episodes.steps) == 0:
            return
        starts = th.as_tensor(episodes.first_observations, device=self.device)
        starts = starts[th.randint(len(starts), (100,), device=self.device)]
        trajectories = self._imagined_from(starts, min(int(episodes.steps.max()), discounting_horizon(self.gamma)))
        rewards = trajectories.rewards if normalize is None else normalize.reward(trajectories.rewards)
        paid = payment.imagined(rewards, self._log_ratio(trajectories), trajectories.alive)
        self._world_log["objective/lower_bound"] = lower_bound(trajectories, paid, self.gamma).mean.item()
        self._world_log["objective/log_return"] = payment.log_return(
            episodes.rewards / (1.0 if normalize is None else normalize.reward_std), episodes.steps
        )
