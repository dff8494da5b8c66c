"""
Trials: now and then an episode is played by a copy of the actor that stays as it is and does not explore. The copy that
earned most on average is deployed, until the actor that learns has earned as much on average in some episodes since.

While it learns, a policy that walks falls a hundred gradient steps on, and walks again after as many. What a copy
earns is known from training itself: trials cost no step of the environment beside those. It plays as it will when it is
deployed, for what a policy earns while it explores tells little of that. One episode may have been luck, so that the
copy to beat is tried again every so often.

Source: the checkpoints of TD7 (Fujimoto et al., "For SALE: State-Action Representation Learning for Deep Reinforcement
Learning", NeurIPS 2023). There every episode is a trial and the policy waits with its updates meanwhile; here it learns
on, and plays most of the episodes itself, for a world is to be learned where the policy goes now, and rewards are to be
found. Towards the end of a run, where what has been learned is all that counts, trials are more.
"""

import copy
import math
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import TensorDict
from torch import nn

from sb3_mismatch.observations import Observations

#: at first every so many episodes one is a trial, at last each; every so many trials one is of the proven actor
TRIAL_EVERY, RETRIAL_EVERY = 4, 3
#: so many episodes tell what the actor that learns earns: one that walked may fall in the next
N_RECENT = 3


class Trials:
    """
    Who plays, who is proven, and who is to be deployed.

    :param actor: what both are copies of at first
    """

    def __init__(self, actor: nn.Module) -> None:
        #: who plays the trial under way
        self.player = _still(actor)
        #: who has earned most, and the mean of what it earned in so many trials
        self.proven, self.earned, self.n_proven = _still(actor), -math.inf, 0
        #: earned so far in the episode under way; ``None`` where there is none that counts
        self.under_way: float | None = None
        #: whether that is a trial, and one of the proven actor
        self.is_trial = self.is_retrial = False
        #: trials so far, and episodes since the last one
        self.n_trials = self.n_since = 0
        #: earned in the last episodes since somebody was proven, the proven actor's own apart
        self.recent: list[float] = []

    @property
    def deploys_proven(self) -> bool:
        """Whether the actor that learns has not earned as much since as the proven one."""
        return self.n_proven > 0 and (len(self.recent) < N_RECENT or sum(self.recent) < N_RECENT * self.earned)

    def begin(self, actor: nn.Module, remaining: float) -> None:
        """
        Begin an episode; if it is a trial, of ``actor`` or of the proven one.

        :param remaining: what is left of the run, from 1 to 0
        """
        self.under_way, self.is_retrial, self.n_since = 0.0, False, self.n_since + 1
        self.is_trial = self.n_since >= TRIAL_EVERY * remaining
        if self.is_trial:
            self.n_since, self.n_trials = 0, self.n_trials + 1
            self.is_retrial = self.n_proven > 0 and self.n_trials % RETRIAL_EVERY == 0
            self.player.load_state_dict((self.proven if self.is_retrial else actor).state_dict())

    def end(self) -> None:
        """Judge the episode under way: in a trial, who earns no less than the proven actor takes its place."""
        assert self.under_way is not None
        if self.is_retrial:
            self.n_proven += 1
            self.earned += (self.under_way - self.earned) / self.n_proven
        elif self.is_trial and self.under_way >= self.earned:
            self.proven.load_state_dict(self.player.state_dict())
            self.earned, self.n_proven, self.recent = self.under_way, 1, []
        else:
            self.recent = [*self.recent, self.under_way][-N_RECENT:]
        self.abandon()

    def abandon(self) -> None:
        """Judge nobody by the episode under way."""
        self.under_way, self.is_trial = None, False

    def state_dict(self) -> dict[str, Any]:
        rest = {name: x for name, x in vars(self).items() if name not in ("player", "proven")}
        return {"player": self.player.state_dict(), "proven": self.proven.state_dict(), "rest": rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.player.load_state_dict(state["player"])
        self.proven.load_state_dict(state["proven"])
        vars(self).update(state["rest"])


class Tried(OffPolicyAlgorithm):
    """
    An algorithm whose first environment has trials under ``trials``, and whose :meth:`predict` is the better actor's.
    """

    trials: bool
    _trials: Trials | None = None
    #: whether it is a rollout that asks for actions
    _is_rolling: bool = False

    def _setup_model(self) -> None:
        super()._setup_model()
        self._forget_trials()

    def _forget_trials(self) -> None:
        self._trials = Trials(self._learner) if self.trials else None

    @property
    def _learner(self) -> Any:
        """The actor that learns."""
        return self.policy.actor

    # -- who plays --

    def predict(
        self,
        observation: Observations,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """SB3's ``predict``, of :attr:`deployed_policy`; ``policy.predict`` is that of the policy that learns."""
        if not self._is_rolling:
            return self.deployed_policy.predict(observation, state, episode_start, deterministic)
        if self._trials is None or not self._trials.is_trial:
            return self.policy.predict(observation, state, episode_start, deterministic)
        played, state = self._with(self._trials.player).predict(observation, state, episode_start, deterministic=True)
        if len(played) > 1:
            played[1:] = self.policy.predict(observation, None, None, deterministic)[0][1:]
        return played, state

    @property
    def deployed_policy(self) -> BasePolicy:
        """What :meth:`predict` plays: ``policy``, with the proven actor where that has earned more."""
        trials = self._trials
        return self._with(trials.proven) if trials is not None and trials.deploys_proven else self.policy

    def _with(self, actor: nn.Module) -> BasePolicy:
        """``policy`` with another actor, and not compiled. What it does not hold itself is shared."""
        policy = copy.copy(getattr(self.policy, "_orig_mod", self.policy))
        policy._modules = {**policy._modules, "actor": actor}
        return policy

    def _sample_action(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        self._is_rolling = True
        try:
            return super()._sample_action(*args, **kwargs)
        finally:
            self._is_rolling = False

    # -- when, and what it earned --

    def _setup_learn(
        self, total_timesteps: int, callback: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        before = self._last_obs
        prepared = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        if self._trials is not None and (before is None or self._last_obs is not before):
            # The environment was reset: the episode is another.
            self._trials.abandon()
        return prepared

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Observations,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        trials, env = self._trials, self._vec_normalize_env
        if trials is None:
            return
        if trials.under_way is not None:
            trials.under_way += float((reward if env is None else env.get_original_reward())[0])
            if dones[0]:
                if trials.is_trial:
                    self.logger.record("trials/return", trials.under_way)
                trials.end()
                if trials.n_proven > 0:
                    self.logger.record("trials/proven", trials.earned)
        # A policy that has learned nothing yet has nothing to show.
        if dones[0] and self._n_updates > 0:
            trials.begin(self._learner, self._current_progress_remaining)

    # -- saved and loaded --

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """SB3's ``set_parameters``. What was proven with other parameters is forgotten."""
        super().set_parameters(load_path_or_dict, exact_match, device)
        self._forget_trials()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_trials", "_is_rolling"]


def _still(actor: nn.Module) -> nn.Module:
    """A copy of an actor that does not learn. It shares the distribution, and so the matrices of gSDE's noise."""
    distribution = getattr(actor, "action_dist", None)
    copied: Any = copy.deepcopy(actor, {id(distribution): distribution})
    copied.optimizer = None
    still: nn.Module = copied.eval().requires_grad_(False)
    return still
