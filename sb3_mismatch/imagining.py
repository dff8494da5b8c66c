"""The agent in its learned world: what it does there, what it is paid, and what it is worth."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import is_vectorized_observation
from torch.utils._pytree import tree_map

from sb3_mismatch.buffers import MixedReplayBuffer, latest_episodes, real_transitions
from sb3_mismatch.compiled import Ahead, Starts
from sb3_mismatch.imagination import (
    Act,
    Imagined,
    Trajectories,
    discounting_horizon,
    imagine,
    lower_bound,
    members_ways,
    visited,
)
from sb3_mismatch.lookahead import Path, look_ahead
from sb3_mismatch.objectives import OBJECTIVES, Objective, Payment, positive_offset
from sb3_mismatch.observations import Normalization, Observations, TensorObservations
from sb3_mismatch.randomness import RandomStreams
from sb3_mismatch.settings import WEIGHTS, check_count
from sb3_mismatch.standardising import first_layers, least, standardised
from sb3_mismatch.world import World
from sb3_mismatch.world_env import FORMS, ImaginedEpisodes

#: Under ``real_ratio="auto"``: up to so large a share of what happens that the dynamics leave unexplained, the share of
#: real rows; beyond, all are real. There are few, since the compiled update is made for each.
REAL_SHARES = ((0.25, 0.1), (0.75, 0.5))
#: Under ``novelty_weight="auto"``, while rewards tell nothing: a nat that there is to learn, in largest rewards.
NAT_IN_REWARDS = 10
#: So many rewards that tell something of states are enough to go by.
ENOUGH_TELLING = 100


class Imagining(OffPolicyAlgorithm):
    """Lets the policy of an actor-critic act in ``world``, under its objective."""

    world: World
    objective: str | Objective
    reward_shift: float | str
    reward_floor: float
    _world_log: dict[str, float]
    _streams: RandomStreams
    _fitted_at: int | None
    _unexplained: float
    real_ratio: float | str
    n_elites: int
    #: Steps that the update itself looks ahead; none under algorithms that know nothing of it.
    expansion: int = 0
    novelty_weight: float | str | None
    #: Rewards so far that have told something of states.
    _n_telling: int = 0
    _unit: float | None = None
    _lowest_value: float
    _highest_value: float
    _starts_each: int = 0
    _kept_normalization: Normalization | None = None
    #: while the networks take standardised observations, by what
    _scale: Normalization | None = None

    # -- for people --

    def imagine(
        self,
        observations: Observations,
        horizon: int,
        actions: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> Imagined:
        """
        Trajectories in the learned world from given observations, to look at.

        The policy, the world and their random draws stay as they are: the same call gives the same trajectories until
        the agent learns on.

        :param observations: in the environment's own form and units, n of them or a single one (n = 1)
        :param horizon: steps
        :param actions: (horizon, n, action_dim) in the environment's units, clipped to the bounds of the action space;
            ``None``: the policy acts
        :param deterministic: as in ``predict``: the policy acts by its mode; the world is drawn from all the same
        :raises ValueError: when no world has been fitted, or a shape does not fit
        """
        self._check_fitted("imagine()")
        check_count("horizon", horizon)
        n = _count(observations, self.observation_space)
        starts = th.as_tensor(self.world.observations.flatten(observations, n), device=self.device)
        act: Act = self._mode if deterministic else self._act
        if actions is not None:
            act = _given(self._scaled(actions, horizon, n))
        with self._at_rest():
            trajectories = self._imagined_from(starts, horizon, act)
            return self._told(trajectories)

    def world_env(
        self,
        n_envs: int = 1,
        max_episode_steps: int | None = None,
        starts: str | Observations = "episodes",
        kind: str = "sb3",
        max_disagreement: float | None = None,
        seed: int | None = None,
    ) -> Any:
        """
        The learned world as it stands, a copy, as an environment in raw units: what VecNormalize would wrap.

        :param n_envs: episodes side by side
        :param max_episode_steps: time limit; ``None``: the real environment's, or 1000 where it tells none
        :param starts: where episodes start: "episodes", where those in the replay buffer did; "states", at any real
            state in it; or observations in the environment's own form
        :param kind: "sb3", a ``VecEnv`` of Stable-Baselines3; "gymnasium", a ``gymnasium.vector.VectorEnv``; "single",
            a ``gymnasium.Env``
        :param max_disagreement: an episode ends with a step about which the members disagree by more, in standardised
            units, so that who learns here keeps to what the world knows; ``None``: never
        :param seed: of the imagined episodes; ``None`` derives one from torch's global generator
        :raises ValueError: when no world has been fitted, there is no start, or an argument is unknown
        """
        self._check_fitted("world_env()")
        if kind not in FORMS:
            raise ValueError(f"kind={kind!r} is unknown: use one of {', '.join(map(repr, FORMS))}")
        assert isinstance(self.action_space, spaces.Box)
        episodes = ImaginedEpisodes(
            self.world,
            self.observation_space,
            self.action_space,
            th.as_tensor(self._starts(starts), device=self.device),
            n_envs,
            self._time_limit() if max_episode_steps is None else max_episode_steps,
            max_disagreement,
            seed,
            judges=self._row.uses_classifier,
        )
        return FORMS[kind](episodes)

    def _starts(self, starts: str | Observations) -> np.ndarray:
        """Raw flat states to start from, (m, obs_dim)."""
        flat = self.world.observations
        if not isinstance(starts, str):
            return flat.flatten(starts, _count(starts, self.observation_space))
        if starts not in ("episodes", "states"):
            raise ValueError(f"starts={starts!r} is unknown: use 'episodes', 'states', or observations")
        buffer = self.replay_buffer
        if buffer is None or buffer.size() == 0:
            raise ValueError(
                f"starts={starts!r} draws from the replay buffer, which is empty: call load_replay_buffer() first, or "
                "pass observations"
            )
        firsts = latest_episodes(buffer, flat, most=1000).first_observations
        if starts == "episodes" and len(firsts) > 0:
            return firsts
        # In the first episode any state stands for its start.
        return real_transitions(buffer, flat, th.device("cpu")).batch.observations.numpy()

    def _time_limit(self) -> int:
        """The real environment's time limit in steps."""
        env = self.get_env()
        spec = env.get_attr("spec")[0] if env is not None and env.has_attr("spec") else None
        return getattr(spec, "max_episode_steps", None) or 1000

    def _check_fitted(self, who: str) -> None:
        """:raises ValueError: when no world has been fitted"""
        if self._fitted_at is None:
            raise ValueError(
                f"{who} needs a learned world and none has been fitted yet: call learn() first, for as many steps as "
                "learning_starts and a first fit take"
            )

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Evaluation mode and draws from the world's streams; afterwards both are as before."""
        training, state = self.policy.training, self._streams.state_dict()
        self.policy.set_training_mode(False)
        try:
            with self._streams.active():
                yield
        finally:
            self._streams.load_state_dict(state)
            self.policy.set_training_mode(training)

    def _scaled(self, actions: np.ndarray, horizon: int, n: int) -> th.Tensor:
        """The environment's actions (horizon, n, ...) -> (horizon, n, action_dim) in [-1, 1]."""
        space = self.action_space
        assert isinstance(space, spaces.Box)
        given = np.asarray(actions, dtype=np.float32)
        if given.size != horizon * n * spaces.flatdim(space):
            wanted = (horizon, n, *space.shape)
            raise ValueError(f"actions has shape {given.shape}: pass {wanted}, or None to let the policy act")
        given = given.reshape(horizon, n, *space.shape).clip(space.low, space.high)
        scaled = self.policy.scale_action(given).astype(np.float32)
        return th.as_tensor(scaled.reshape(horizon, n, -1), device=self.device)

    @th.no_grad()
    def _told(self, trajectories: Trajectories) -> Imagined:
        """Trajectories with all that there is to say of them."""
        alive, (horizon, n) = trajectories.alive, trajectories.rewards.shape[:2]
        pairs = (trajectories.observations.flatten(0, 1), trajectories.actions.flatten(0, 1))
        disagreement = self.world.dynamics.disagreement(*pairs).view(horizon, n, 1)
        ways, member_rewards = members_ways(self.world.dynamics, self.world.outcomes, trajectories)

        def array(column: th.Tensor) -> np.ndarray:
            return (alive * column).squeeze(-1).cpu().numpy()

        actions = trajectories.actions.cpu().numpy().reshape(horizon, n, *self.action_space.shape)  # type: ignore[misc]
        actions = self.policy.unscale_action(actions).reshape(horizon, n, -1)
        return Imagined(
            observations=visited(trajectories).cpu().numpy(),
            actions=actions * alive.cpu().numpy(),
            rewards=array(trajectories.rewards),
            terminated=array(trajectories.dones) > 0,
            alive=array(alive) > 0,
            log_ratio=array(self._log_ratio(*trajectories[:3])),
            disagreement=array(disagreement),
            member_observations=ways.transpose(0, 1).cpu().numpy(),
            member_rewards=member_rewards.transpose(0, 1).squeeze(-1).cpu().numpy(),
        )

    # -- for the round --

    @property
    def _row(self) -> Objective:
        """The objective, with the weights that were given in place of its own."""
        row = OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective
        given = {name: getattr(self, name) for name in WEIGHTS if getattr(self, name) not in (None, "auto")}
        row = replace(row, **given)
        return replace(row, novelty_weight=1.0) if self._seeks else row

    @property
    def _seeks(self) -> bool:
        """Whether novelty is paid for since rewards tell little so far."""
        return self.novelty_weight == "auto" and self._expands and self._n_telling < ENOUGH_TELLING

    @property
    def _expands(self) -> bool:
        """Whether the update itself looks ahead."""
        return self.expansion > 0 and self.real_ratio != 1

    @property
    def _real_share(self) -> float:
        """The share of real rows in a minibatch."""
        if not isinstance(self.real_ratio, str):
            return self.real_ratio
        return next((share for most, share in REAL_SHARES if self._unexplained <= most), 1.0)

    def _payment(self) -> Payment:
        """What the objective pays today, in the units that the critics see."""
        if isinstance(self.replay_buffer, MixedReplayBuffer):
            return self.replay_buffer.payment
        row = self._row
        payment = Payment(
            row,
            self.gamma,
            unit=self._unit or 1.0,
            novelty_share=self._novelty_share,
            log_ratio_share=self._log_ratio_share,
        )
        if not row.takes_log:
            return payment
        assert self.replay_buffer is not None
        lowest = float(self.replay_buffer.rewards[: self.replay_buffer.size()].min())
        offset = positive_offset(str(self.objective), lowest, self.reward_shift, self.reward_floor)
        normalize = self._normalization()
        scale = 1.0 if normalize is None else normalize.reward_std
        return replace(payment, offset=offset / scale, lowest=(lowest + offset) / scale)

    @property
    def _log_ratio_share(self) -> float:
        """Where it is no part of a bound, looking real is worth no more than rewards are: they may be tiny."""
        return min(self._payment_size, 1.0) if self._expands and self._row.centred else 1.0  # type: ignore[attr-defined]

    @property
    def _novelty_share(self) -> float:
        """Who seeks what is new comes back to the task by the end of ``learn``; who keeps off it does so throughout."""
        if self._seeks:
            return NAT_IN_REWARDS / (1 + self._n_telling) * self._payment_size  # type: ignore[attr-defined, no-any-return]
        return max(self._current_progress_remaining, 0.0) if self._row.novelty_weight > 0 else 1.0

    def _normalization(self) -> Normalization | None:
        """VecNormalize's statistics as they stand now."""
        if self._kept_normalization is not None:
            return self._kept_normalization
        env = self._vec_normalize_env
        return None if env is None else Normalization.of(env, self.world.observations, self.device)

    @contextmanager
    def _keeping_normalization(self) -> Iterator[None]:
        """While it lasts no step of the environment moves VecNormalize's statistics, which go to the device once."""
        self._kept_normalization = self._normalization()
        try:
            yield
        finally:
            self._kept_normalization = None

    @contextmanager
    def _standardising(self) -> Iterator[None]:
        """While it lasts, actor and critics take standardised observations, unless VecNormalize sees to that."""
        env, before = self._vec_normalize_env, self._normalization()
        knows = self._expands and self._fitted_at is not None and (env is None or not env.norm_obs)
        layers = first_layers((self.actor, self.critic, self.critic_target)) if knows else []  # type: ignore[attr-defined]
        if not layers:
            yield
            return
        inputs, dim = self.world.dynamics.inputs, self.world.observations.dim
        mean = inputs.mean[:dim]
        std = least(mean, inputs.std[:dim])
        scale = before or Normalization(mean, std, th.full_like(mean, math.inf), 1.0, math.inf)
        self._kept_normalization = self._scale = replace(scale, mean=mean, std=std)
        try:
            with standardised(layers, mean, std):
                yield
        finally:
            self._kept_normalization, self._scale = before, None

    def _standard_rows(self, batch: ReplayBufferSamples) -> ReplayBufferSamples:
        """Real rows as the networks take them while they train."""
        scale, flat = self._scale, self.world.observations
        if scale is None:
            return batch
        mean, std = (flat.unflatten(x.unsqueeze(0)) for x in (scale.mean, scale.std))

        def standard(observations: Any) -> Any:
            return tree_map(lambda x, mean, std: (x - mean) / std, observations, mean, std)

        return batch._replace(
            observations=standard(batch.observations), next_observations=standard(batch.next_observations)
        )

    def _seen(self, flat: th.Tensor) -> TensorObservations:
        """Raw flat observations (n, dim) as the policy takes them: normalised, in the space's shape."""
        normalize = self._normalization()
        return self.world.observations.unflatten(flat if normalize is None else normalize.observation(flat))

    def _act(self, flat: th.Tensor) -> th.Tensor:
        """The current stochastic policy's scaled actions at raw flat observations."""
        if self.use_sde:
            # One noise matrix a row: a batch of another size would share a single one.
            self.actor.reset_noise(len(flat))  # type: ignore[operator]
        actions: th.Tensor = self.actor(self._seen(flat))
        return actions

    def _mode(self, flat: th.Tensor) -> th.Tensor:
        """The mode of the current policy, scaled, at raw flat observations."""
        actions: th.Tensor = self.actor(self._seen(flat), deterministic=True)
        return actions

    def _imagined_from(self, starts: th.Tensor, horizon: int, act: Act | None = None) -> Trajectories:
        """Trajectories in the learned world, of the current policy unless others act."""
        with self._keeping_exploration():
            return imagine(act or self._act, self.world.dynamics, self.world.outcomes, starts, horizon)

    @contextmanager
    def _keeping_exploration(self) -> Iterator[None]:
        """Put gSDE's exploration matrices back, which belong to the environment's rollout."""
        distribution = getattr(self.actor, "action_dist", None)
        names = [name for name in ("exploration_mat", "exploration_matrices") if hasattr(distribution, name)]
        kept = {name: getattr(distribution, name) for name in names}
        try:
            yield
        finally:
            for name, matrix in kept.items():
                setattr(distribution, name, matrix)

    def _log_ratio(self, observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor) -> th.Tensor:
        """Today's classifier's log p/q of each transition, (..., 1); zero where the objective has no classifier."""
        if not self._row.uses_classifier:
            return th.zeros_like(actions[..., :1])
        return self.world.classifier.log_ratio(observations, actions, next_observations)

    def _novelty(self, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """What there is to learn at each pair, (..., 1); zero where the objective does not pay for it."""
        if self._row.novelty_weight == 0:
            return th.zeros_like(actions[..., :1])
        return self.world.dynamics.novelty(observations, actions)

    def _n_starts(self, batch_size: int) -> int:
        """The imagined share of a minibatch."""
        return 0 if len(self.world.imagined) == 0 else batch_size - round(self._real_share * batch_size)

    def _path_from(self, n: int) -> Path:
        """The current policy's next ``expansion`` steps from ``n`` imagined states, each elite taking as many."""
        world, normalize, payment = self.world, self._normalization(), self._payment()

        def act(flat: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
            actions, log_prob = self.actor.action_log_prob(self._seen(flat))  # type: ignore[operator]
            return actions, log_prob.reshape(-1, 1)

        def earned(
            observations: th.Tensor, actions: th.Tensor, next_observations: th.Tensor, learned: th.Tensor
        ) -> tuple[th.Tensor, th.Tensor]:
            transitions = (observations, actions, next_observations)
            continuation = world.outcomes.continuation(*transitions)
            rewards = world.outcomes.rewards(*transitions, learned, 1 - continuation)
            rewards = rewards if normalize is None else normalize.reward(rewards)
            judged = self._log_ratio(*transitions), th.ones_like(rewards), self._novelty(observations, actions)
            paid = payment.imagined(rewards, *judged)
            return paid, continuation

        with self._streams.active(), self._keeping_exploration():
            states = world.imagined.sample_states(-(-n // self.n_elites) * self.n_elites)
            if self.use_sde:
                self.actor.reset_noise(len(states))  # type: ignore[operator]
            return look_ahead(act, world.dynamics.rsample_parts, earned, states, self.expansion)

    def _ahead(self) -> Ahead | None:
        if self._starts_each == 0:
            return None
        return Ahead(self.expansion, self._row, self.gamma)

    def _looked_into(self) -> tuple[th.nn.Module, ...]:
        return () if self._starts_each == 0 else (self.world.dynamics, self.world.classifier)

    def _drawn_starts(self, n: int, drawn: bool = True) -> Starts:
        """What the compiled form takes in place of :meth:`_path_from`, drawn in the same order."""
        world, normalize = self.world, self._normalization()
        n, dim = -(-n // self.n_elites) * self.n_elites, world.observations.dim
        noise = th.zeros(self.expansion + 1, n, spaces.flatdim(self.action_space), device=self.device)
        world_noise = th.zeros(self.expansion, self.n_elites, n // self.n_elites, dim + 1, device=self.device)
        states = th.zeros(n, dim, device=self.device)
        if drawn:
            with self._streams.active():
                states = world.imagined.sample_states(n)
                noise[0].normal_()
                for t in range(self.expansion):
                    world_noise[t].normal_()
                    noise[t + 1].normal_()
        column = th.zeros(dim, device=self.device)
        scale = normalize or Normalization(column, column + 1, column + math.inf, 1.0, math.inf)
        # A tensor made of a number on the host would wait for the device.
        rewards = (th.full((), x, device=self.device) for x in (scale.reward_std, scale.clip_reward))
        return Starts(states, noise, world_noise, scale.mean, scale.std, scale.clip, *rewards)

    def _bounds(self) -> tuple[float, ...]:
        unit, payment = self._unit or 1.0, self._payment()
        bounds = self._lowest_value / unit, self._highest_value / unit
        return unit, *bounds, payment.offset, payment.lowest, payment.novelty_share, payment.log_ratio_share

    def _value(self, flat: th.Tensor) -> th.Tensor:
        """V at raw flat observations, (n, 1), in the units of r̃, differentiable in them."""
        value: th.Tensor = self._soft_value(self._seen(flat), self._ent_coef())  # type: ignore[attr-defined]
        return (self._unit or 1.0) * value

    @th.no_grad()
    def _estimate_bound(self) -> None:
        """Under a log objective: the bound by imagination beside the log of the real return, over equal horizons."""
        if not self._row.takes_log:
            return
        assert self.replay_buffer is not None
        payment, normalize = replace(self._payment(), unit=1.0), self._normalization()
        episodes = latest_episodes(self.replay_buffer, self.world.observations, most=20)
        if len(episodes.steps) == 0:
            return
        starts = th.as_tensor(episodes.first_observations, device=self.device)
        starts = starts[th.randint(len(starts), (100,), device=self.device)]
        trajectories = self._imagined_from(starts, min(int(episodes.steps.max()), discounting_horizon(self.gamma)))
        rewards = trajectories.rewards if normalize is None else normalize.reward(trajectories.rewards)
        paid = payment.imagined(rewards, self._log_ratio(*trajectories[:3]), trajectories.alive)
        self._world_log["objective/lower_bound"] = lower_bound(trajectories, paid, self.gamma).mean.item()
        self._world_log["objective/log_return"] = payment.log_return(
            episodes.rewards / (1.0 if normalize is None else normalize.reward_std), episodes.steps
        )


def _count(observations: Observations, space: spaces.Space[Any]) -> int:
    """
    How many observations there are; a single one without a leading axis is one.

    :raises ValueError: when they do not fit the space
    """
    parts = observations if isinstance(observations, dict) else {"": observations}
    if not is_vectorized_observation(observations, space):  # type: ignore[arg-type]
        return 1
    return len(next(iter(parts.values())))


def _given(actions: th.Tensor) -> Act:
    """A policy that plays ``actions``, (horizon, n, action_dim), one after the other."""
    steps = iter(actions)
    return lambda _: next(steps)
