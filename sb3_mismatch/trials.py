"""
Trials: some episodes of training are played by the average actor alone, without exploring. The actor that earned most
on trial is kept, and where the average actor earns clearly less, :meth:`predict` plays the kept one.

A policy climbs a discounted return, over which it may leave one that stands for one that runs and falls. Episodes that
explore hardly tell, since noise makes those fall that would stand.

Source: the checkpoints of TD7 (Fujimoto et al., "For SALE: State-Action Representation Learning for Deep Reinforcement
Learning", NeurIPS 2023), which judges every policy by training episodes. Here most episodes explore.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import nn
from torch.utils._pytree import tree_map

from sb3_mismatch.averaging import Averaged, still

#: The best actor plays where the last one on trial earned less by so large a share of what was gained since the first.
LOST = 0.25
#: So many of the last episodes that explored must earn less on average too, or else the best actor is out of date.
RECENT = 5


class Trials:
    """
    Who was on trial, and what it earned.

    :param ratio: trials' share of all steps
    """

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        #: steps of all episodes so far, of trials among them, and of the last episode
        self.n_steps = self.n_tried = self.n_last = 0
        #: who plays the episode under way; ``None`` where it is no trial
        self.actor: nn.Module | None = None
        #: who earned most; ``None`` before the first trial
        self.best: nn.Module | None = None
        self.first_return = self.best_return = self.last_return = -math.inf
        #: what the last episodes that were no trials earned
        self.explored: list[float] = []

    def begin(self, actor: nn.Module) -> None:
        """An episode begins: where trials' share has room for one like the last, ``actor`` plays it, as it is now."""
        if self.n_tried + self.n_last <= self.ratio * self.n_steps:
            self.actor = still(actor)

    def end(self, earned: float, n_steps: int) -> None:
        """The episode under way ends, over which so much was earned in so many steps."""
        self.n_steps += n_steps
        self.n_last = n_steps
        if self.actor is None:
            self.explored = [*self.explored, earned][-RECENT:]
        else:
            self.n_tried += n_steps
            self.last_return = earned
            if self.best is None:
                self.first_return = earned
            if earned >= self.best_return:
                self.best, self.best_return = self.actor, earned
            self.actor = None

    @property
    def fallback(self) -> nn.Module | None:
        """The best actor, where the last trial earned clearly less than it did, and those that explore do too."""
        gained = self.best_return - self.first_return
        is_behind = self.last_return < self.best_return - LOST * gained
        return self.best if is_behind and np.mean(self.explored or -math.inf) < self.best_return else None

    _plain = ("n_steps", "n_tried", "n_last", "first_return", "best_return", "last_return", "explored")
    _actors = ("actor", "best")

    def state_dict(self) -> dict[str, Any]:
        """What is plain, and the actors' state dicts."""
        actors = {name: getattr(self, name) for name in self._actors}
        weights = {name: None if actor is None else actor.state_dict() for name, actor in actors.items()}
        return {**weights, **{name: getattr(self, name) for name in self._plain}}

    def load_state_dict(self, state: Mapping[str, Any], like: nn.Module) -> None:
        """Become those whose :meth:`state_dict` it was; their actors are built as ``like`` is."""
        for name in self._plain:
            setattr(self, name, state[name])
        for name in self._actors:
            actor = None if state[name] is None else still(like)
            if actor is not None:
                actor.load_state_dict(state[name])
            setattr(self, name, actor)


class Tried(Averaged):
    """An algorithm whose average actor is on trial for ``trial_ratio`` of the first environment's steps."""

    trial_ratio: float
    real_ratio: float | str
    _trials: Trials | None = None

    def _begin_average(self) -> None:
        super()._begin_average()
        self._begin_trials()

    def _begin_trials(self) -> None:
        # With real_ratio=1 this is the base algorithm, bit for bit.
        tries = self._average is not None and self.trial_ratio > 0 and self.real_ratio != 1
        self._trials = Trials(self.trial_ratio) if tries else None

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        """SB3's. A run that counts anew may be in another environment: trials begin anew."""
        if reset_num_timesteps:
            self._begin_trials()
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    def _sample_action(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        """The base algorithm's; on trial the first environment's is the mode, without noise."""
        actions, stored = super()._sample_action(*args, **kwargs)
        if self._trials is not None and self._trials.actor is not None:
            assert self._last_obs is not None
            first = tree_map(lambda rows: rows[:1], self._last_obs)
            mode, _ = self._with_actor(self._trials.actor).predict(first, deterministic=True)
            scaled = self.policy.scale_action(mode)
            actions, stored = (np.concatenate([x, rows[1:]]) for x, rows in ((mode, actions), (scaled, stored)))
        return actions, stored

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        """SB3's. A trial ends with its episode, and the next one begins."""
        super()._update_info_buffer(infos, dones)
        # Without a Monitor nobody tells what was earned, and there are no trials.
        if self._trials is None or dones is None or not dones[0] or "episode" not in infos[0]:
            return
        trials, fell_back, was_trial = self._trials, self._trials.fallback, self._trials.actor
        trials.end(float(infos[0]["episode"]["r"]), int(infos[0]["episode"]["l"]))
        if was_trial is not None:
            self.logger.record("trials/return", trials.last_return)
            self.logger.record("trials/best_return", trials.best_return)
        if trials.fallback is not None and fell_back is None and self.verbose >= 1:
            print(
                f"The average actor earned {trials.last_return:.1f} on trial, where {trials.best_return:.1f} was "
                "reached before: predict() plays the actor that reached it, until a trial comes near to it again"
            )
        if self._average is not None and self._average.n_taken > 0:
            trials.begin(self._average.actor)

    @property
    def _deployed_actor(self) -> nn.Module:
        fallback = None if self._trials is None else self._trials.fallback
        return super()._deployed_actor if fallback is None else fallback

    def _learner(self) -> dict[str, Any]:
        learner = super()._learner()
        if self._trials is not None:
            assert self._average is not None
            learner |= {"average": self._average.actor.state_dict(), "trials": self._trials.state_dict()}
        return learner

    def _go_on_from(self, learner: dict[str, Any] | None) -> None:
        super()._go_on_from(learner)
        if learner is not None and self._average is not None and "trials" in learner:
            self._average.actor.load_state_dict(learner["average"])
            if self._trials is not None:
                self._trials.load_state_dict(learner["trials"], self._average.actor)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_trials"]
