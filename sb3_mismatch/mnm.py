"""The round: fit, imagine, mix, update. The mixin :class:`ModelBased`, and :class:`MnM` over SAC."""

import inspect
import io
import math
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.type_aliases import MaybeCallback, ReplayBufferSamples, TensorDict
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mismatch.buffers import MixedReplayBuffer, RealTransitions, latest_episodes, real_transitions
from sb3_mismatch.fast_sac import FastSAC
from sb3_mismatch.fitting import fit_classifier, fit_dynamics
from sb3_mismatch.imagination import horizon_at, imagine, lower_bound
from sb3_mismatch.objectives import OBJECTIVES, Objective
from sb3_mismatch.observations import Normalization, TensorObservations
from sb3_mismatch.randomness import RandomStreams
from sb3_mismatch.saving import WORLD, read_world, split_world
from sb3_mismatch.terminations import TransitionFunction
from sb3_mismatch.world import World

SelfModelBased = TypeVar("SelfModelBased", bound="ModelBased")

#: The world waits until the replay buffer holds this many transitions; until then the base algorithm learns alone.
FEWEST_ROWS = 256


#: Arguments of :func:`fit_dynamics` that a user may set.
_FIT_SETTINGS = tuple(
    name for name, parameter in inspect.signature(fit_dynamics).parameters.items() if parameter.default is not parameter.empty
)


def _signature(cls: "type[ModelBased]") -> inspect.Signature:
    """The base algorithm's arguments in their order, then the world's by keyword, with the defaults of ``cls``."""
    base = inspect.signature(super(ModelBased, cls).__init__)
    parameters = {
        name: p.replace(default=cls.base_defaults.get(name, p.default))
        for name, p in base.parameters.items()
        if name != "self"
    }
    for kind in reversed(cls.__mro__):
        if issubclass(kind, ModelBased) and "__init__" in vars(kind):
            for name, p in inspect.signature(kind.__init__).parameters.items():
                if p.kind is p.KEYWORD_ONLY and name != "_init_setup_model":
                    parameters[name] = p
    return inspect.Signature(list(parameters.values()))


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a number")
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r} must lie between {low} and {high}")


class ModelBased(OffPolicyAlgorithm):
    """
    Gives an off-policy actor-critic of SB3 a learned world. Mixed in before the algorithm:
    ``class MnM(ModelBased, FastSAC)``.

    Every ``model_train_freq`` environment steps the dynamics and the classifier are fitted to the replay buffer and
    trajectories are imagined; every minibatch then holds real and imagined rows, whose reward is the objective's.
    All else is the base algorithm's, whose arguments come first and in their order.

    :param objective: a row of :data:`~sb3_mismatch.objectives.OBJECTIVES` by name, or an
        :class:`~sb3_mismatch.objectives.Objective`
    :param real_ratio: share of real rows in a minibatch, rounded to whole rows (MBPO: 0.05); 1 is the base algorithm
    :param horizon: imagined steps per trajectory: a number, or a schedule over environment steps
        ``[first_step, last_step, first_horizon, last_horizon]``
    :param model_train_freq: environment steps between two fits of the world (MBPO: 250)
    :param imagined_per_step: imagined transitions per environment step (MBPO: 400)
    :param imagined_buffer_size: imagined transitions kept, the oldest overwritten first
    :param n_members: networks in the ensemble (MBPO: 7)
    :param n_elites: how many of them imagine (MBPO: 5)
    :param log_ratio_weight: weight of the classifier's term in the policy's reward; ``None``: the objective's own
    :param adversarial_weight: weight of realism and value in the dynamics' loss; ``None``: the objective's own
    :param likelihood_weight: weight of the likelihood in the dynamics' loss; ``None``: the objective's own
    :param reward_shift: added to every reward before its logarithm is taken: a number, or "auto" for as much as
        lifts the lowest reward met so far to ``reward_floor``
    :param reward_floor: lowest shifted reward under ``reward_shift="auto"``, in the reward's units
    :param termination_fn: ``(observations, actions, next_observations) -> (n,)``, true where an episode ends, on
        batched tensors in the environment's own scale; ``None``: learned
    :param reward_fn: the same for the reward; ``None``: learned
    :param dynamics_kwargs: further arguments of :class:`~sb3_mismatch.dynamics.Dynamics`, and its ``learning_rate``
    :param classifier_kwargs: arguments of :class:`~sb3_mismatch.classifier.Classifier`, and its ``learning_rate``
    :param fit_kwargs: arguments of :func:`~sb3_mismatch.fitting.fit_dynamics`: ``max_steps``, ``batch_size``,
        ``holdout_ratio``, ``max_holdout``, ``patience``, ``threshold``; and ``classifier_steps``
    """

    #: Defaults of the base algorithm's arguments that suit a model-based learner better.
    base_defaults: ClassVar[dict[str, Any]] = {"learning_starts": 500, "gradient_steps": 10}

    def __init__(
        self,
        *args: Any,
        objective: str | Objective = "mnm-approx",
        real_ratio: float = 0.1,
        horizon: int | Sequence[int] = 1,
        model_train_freq: int = 250,
        imagined_per_step: int = 200,
        imagined_buffer_size: int = 100_000,
        n_members: int = 7,
        n_elites: int = 5,
        log_ratio_weight: float | None = None,
        adversarial_weight: float | None = None,
        likelihood_weight: float | None = None,
        reward_shift: float | str = 0.0,
        reward_floor: float = 0.01,
        termination_fn: TransitionFunction | None = None,
        reward_fn: TransitionFunction | None = None,
        dynamics_kwargs: dict[str, Any] | None = None,
        classifier_kwargs: dict[str, Any] | None = None,
        fit_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        base = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        _init_setup_model = base.pop("_init_setup_model", _init_setup_model)
        super().__init__(**{**self.base_defaults, **base}, _init_setup_model=False)
        self.objective = objective
        self.real_ratio = real_ratio
        self.horizon = horizon
        self.model_train_freq = model_train_freq
        self.imagined_per_step = imagined_per_step
        self.imagined_buffer_size = imagined_buffer_size
        self.n_members = n_members
        self.n_elites = n_elites
        self.log_ratio_weight = log_ratio_weight
        self.adversarial_weight = adversarial_weight
        self.likelihood_weight = likelihood_weight
        self.reward_shift = reward_shift
        self.reward_floor = reward_floor
        self.termination_fn = termination_fn
        self.reward_fn = reward_fn
        self.dynamics_kwargs = dynamics_kwargs
        self.classifier_kwargs = classifier_kwargs
        self.fit_kwargs = fit_kwargs
        self._fitted_at: int | None = None
        self._world_log: dict[str, float] = {}
        if _init_setup_model:
            self._setup_model()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = _signature(cls)  # type: ignore[attr-defined]

    # -- setting up --

    def _setup_model(self) -> None:
        self._check_settings()
        super()._setup_model()
        # The world's networks are drawn from its own streams: the policy's weights are the base algorithm's.
        with self._streams.active():
            self.world = World(
                self.observation_space,
                self.action_space,  # type: ignore[arg-type]
                self.device,
                {"n_members": self.n_members, "n_elites": self.n_elites, **(self.dynamics_kwargs or {})},
                self.classifier_kwargs or {},
                self.imagined_buffer_size,
                self.termination_fn,
                self.reward_fn,
            )

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed SB3's generators and the world's own; ``None`` leaves the former alone."""
        super().set_random_seed(seed)
        self._streams = RandomStreams(self.device, seed)

    def _check_settings(self) -> None:
        """One sentence for each setting that cannot be served."""
        if isinstance(self.objective, str) and self.objective not in OBJECTIVES:
            names = ", ".join(repr(name) for name in OBJECTIVES)
            raise ValueError(f"objective={self.objective!r} is unknown: use one of {names}, or an Objective")
        if not isinstance(self.objective, str | Objective):
            raise TypeError(f"objective={self.objective!r} must be a name or an Objective")
        _check_number("real_ratio", self.real_ratio, 0, 1)
        for name in ("model_train_freq", "imagined_per_step", "imagined_buffer_size", "n_members", "n_elites"):
            _check_count(name, getattr(self, name))
        if self.n_elites > self.n_members:
            raise ValueError(
                f"n_elites={self.n_elites} is more than n_members={self.n_members}: choose fewer elites or more members"
            )
        if isinstance(self.horizon, int):
            _check_count("horizon", self.horizon)
        elif len(self.horizon) != 4 or min(self.horizon[2:]) < 1 or self.horizon[0] > self.horizon[1]:
            raise ValueError(
                f"horizon={self.horizon!r} must be a number of at least 1, or a schedule "
                "[first_step, last_step, first_horizon, last_horizon] with rising steps and horizons of at least 1"
            )
        for name in ("log_ratio_weight", "adversarial_weight", "likelihood_weight"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0, math.inf)
        if self.reward_shift != "auto":
            _check_number("reward_shift", self.reward_shift, -math.inf, math.inf)
        _check_number("reward_floor", self.reward_floor, 1e-30, math.inf)
        for name in ("termination_fn", "reward_fn"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a function of batched tensors, or None")
        allowed = {*_FIT_SETTINGS, "classifier_steps"}
        if unknown := set(self.fit_kwargs or {}) - allowed:
            raise TypeError(f"fit_kwargs holds {sorted(unknown)}: it takes {sorted(allowed)}")
        if self.replay_buffer_class is not None and issubclass(self.replay_buffer_class, HerReplayBuffer):
            raise ValueError(
                "replay_buffer_class=HerReplayBuffer relabels goals with the environment's own reward, which imagined "
                "transitions have not: use stable_baselines3.SAC with it, or the default buffer"
            )

    @property
    def _row(self) -> Objective:
        """The objective, with the weights that were given in place of its own."""
        row = OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective
        names = ("log_ratio_weight", "adversarial_weight", "likelihood_weight")
        return replace(row, **{name: getattr(self, name) for name in names if getattr(self, name) is not None})

    # -- the round --

    def learn(
        self: SelfModelBased,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfModelBased:
        """SB3's ``learn``; ``tb_log_name`` defaults to the class's name."""
        tb_log_name = tb_log_name or type(self).__name__
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        One round: fit the world and imagine if it is due, then let the base algorithm update on mixed minibatches.

        :raises ValueError: when data, a fit or the update is not finite, or a reward has no logarithm
        """
        self.policy.set_training_mode(False)
        if self._row.takes_log:
            self._offset, self._floor = self._reward_range()
        with self._streams.active():
            if self._world_is_due():
                data = self._real_transitions()
                self._fit_dynamics(data)
                self._fit_classifier(data)
                self._imagine(data)
                self._estimate_bound()
                self._fitted_at = self.num_timesteps
            elif self._fitted_at is not None and len(self.world.imagined) == 0 and self._n_rows > 0:
                # A loaded world is fitted and has imagined nothing yet.
                self._imagine(self._real_transitions())
        with self._serving(gradient_steps):
            super().train(gradient_steps, batch_size)
        for name, value in self._world_log.items():
            self.logger.record(name, value)

    @property
    def _n_rows(self) -> int:
        """Transitions in the replay buffer."""
        assert self.replay_buffer is not None
        return self.replay_buffer.size() * self.replay_buffer.n_envs

    def _world_is_due(self) -> bool:
        if self._n_rows < FEWEST_ROWS:
            return False
        # Steps are counted from the last fit: with several environments no multiple need ever be met.
        since = math.inf if self._fitted_at is None else self.num_timesteps - self._fitted_at
        return since < 0 or since >= self.model_train_freq

    def _real_transitions(self) -> RealTransitions:
        assert self.replay_buffer is not None
        return real_transitions(self.replay_buffer, self.world.observations, self.device, self._vec_normalize_env)

    def _fit_dynamics(self, data: RealTransitions) -> None:
        """Minimise the objective's loss for the dynamics."""
        row, settings = self._row, {k: v for k, v in (self.fit_kwargs or {}).items() if k in _FIT_SETTINGS}
        with self._timed("dynamics/seconds"):
            log = fit_dynamics(
                self.world.dynamics,
                self.world.dynamics_optimizer,
                data,
                lambda rows: row.model_loss(_Terms(self, row, rows), self.gamma),
                **settings,
            )
        self._world_log.update(log)

    def _fit_classifier(self, data: RealTransitions) -> None:
        """Tell real from imagined next states at the same states and actions."""
        if not self._row.uses_classifier:
            return
        settings = {k: v for k, v in (self.fit_kwargs or {}).items() if k in ("holdout_ratio", "max_holdout")}
        if "classifier_steps" in (self.fit_kwargs or {}):
            settings["steps"] = self.fit_kwargs["classifier_steps"]  # type: ignore[index]
        dynamics = self.world.dynamics
        with self._timed("classifier/seconds"):
            log = fit_classifier(
                self.world.classifier,
                self.world.classifier_optimizer,
                data,
                lambda observations, actions: dynamics.sample(observations, actions)[0],
                **settings,
            )
        self._world_log.update(log)

    def _imagine(self, data: RealTransitions) -> None:
        """Branch trajectories from real states and keep their rows."""
        horizon = horizon_at(self.horizon, self.num_timesteps)
        # No more than the buffer keeps, and as many rows at any horizon.
        rows = min(self.imagined_per_step * self.model_train_freq, self.imagined_buffer_size)
        index = th.randint(len(data), (max(rows // horizon, 1),), device=self.device)
        world = self.world
        with self._timed("imagination/seconds"), self._acting():
            batch = imagine(self._act, world.dynamics, world.outcomes, data.batch.observations[index], horizon)
            world.imagined.add(batch)
        self._world_log.update(
            {
                "imagination/horizon": horizon,
                "imagination/rows": len(batch.rewards),
                "imagination/finished": batch.dones.mean().item(),
                "imagination/reward": batch.rewards.mean().item(),
                "imagination/real_ratio": self.real_ratio,
            }
        )

    @contextmanager
    def _serving(self, gradient_steps: int) -> Iterator[None]:
        """While it lasts, minibatches are mixed; the real replay buffer comes back whatever happens."""
        real = self.replay_buffer
        assert real is not None
        self.replay_buffer = MixedReplayBuffer(
            real,
            self.world.imagined,
            self.real_ratio,
            gradient_steps,
            self._streams,
            self.world.observations,
            self.gamma,
            self._pay_real,
            self._pay_imagined,
        )
        try:
            yield
        finally:
            self.replay_buffer = real

    # -- what the policy is paid --

    def _pay_real(self, rewards: th.Tensor) -> th.Tensor:
        """r̃ of real rows, which need no correction: (n, 1)."""
        row = self._row
        if row.takes_log:
            rewards = self._positive(rewards)
        return row.reward(rewards, th.zeros_like(rewards), self.gamma)

    @th.no_grad()
    def _pay_imagined(self, raw: ReplayBufferSamples, rewards: th.Tensor) -> th.Tensor:
        """r̃ of imagined rows by today's classifier: raw flat rows, and their rewards as the critics see them."""
        row = self._row
        if row.takes_log:
            rewards = self._positive(rewards)
        log_ratio = th.zeros_like(rewards)
        if row.uses_classifier and row.log_ratio_weight > 0:
            log_ratio = self.world.classifier.log_ratio(raw.observations, raw.actions, raw.next_observations)
            if row.centred:
                log_ratio = log_ratio - log_ratio.mean()
        return row.reward(rewards, row.log_ratio_weight * log_ratio, self.gamma)

    def _reward_range(self) -> tuple[float, float]:
        """What is added to every raw reward before its logarithm, and the lowest sum met so far."""
        assert self.replay_buffer is not None
        lowest = float(self.replay_buffer.rewards[: self.replay_buffer.size()].min())
        if self.reward_shift == "auto":
            offset = max(0.0, self.reward_floor - lowest)
        else:
            offset = float(self.reward_shift)
        if not lowest + offset > 0:
            raise ValueError(
                f"objective={self.objective!r} takes log r and met r = {lowest:g} (reward_shift={self.reward_shift!r}): "
                "pass reward_shift='auto' or a larger number, or use objective='mnm-approx'"
            )
        return offset, lowest + offset

    def _positive(self, rewards: th.Tensor) -> th.Tensor:
        """Shifted rewards, not below the lowest real one: (n, 1), in the units that the critics see."""
        env = self._vec_normalize_env
        scale = float(np.sqrt(env.ret_rms.var + env.epsilon)) if env is not None and env.norm_reward else 1.0
        return (rewards + self._offset / scale).clamp(min=self._floor / scale)

    # -- the agent in its world --

    def _policy_observations(self, flat: th.Tensor) -> TensorObservations:
        """Raw flat observations (n, dim) as the policy takes them: normalised, in the space's shape."""
        env = self._vec_normalize_env
        if env is not None:
            flat = Normalization.of(env, self.world.observations, self.device).observation(flat)
        return self.world.observations.unflatten(flat)

    def _act(self, flat: th.Tensor) -> th.Tensor:
        """The current stochastic policy's scaled actions at raw flat observations."""
        if self.use_sde:
            # One noise matrix a row: a batch of another size would share a single one.
            self.actor.reset_noise(len(flat))  # type: ignore[operator]
        actions: th.Tensor = self.actor(self._policy_observations(flat))
        return actions

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """Keeps the exploration matrices of gSDE, which belong to the environment's rollout."""
        distribution = getattr(self.actor, "action_dist", None)
        names = [name for name in ("exploration_mat", "exploration_matrices") if hasattr(distribution, name)]
        kept = {name: getattr(distribution, name) for name in names}
        try:
            yield
        finally:
            for name, matrix in kept.items():
                setattr(distribution, name, matrix)

    def _value(self, flat: th.Tensor) -> th.Tensor:
        """V at raw flat observations, (n, 1), differentiable in them."""
        value: th.Tensor = self._soft_value(self._policy_observations(flat), self._ent_coef())  # type: ignore[attr-defined]
        return value

    def _estimate_bound(self) -> None:
        """The lower bound by imagination beside the log of the real return, cut at the longest real episode."""
        if not self._row.takes_log:
            return
        assert self.replay_buffer is not None
        world = self.world
        episodes = latest_episodes(self.replay_buffer, world.observations, self.gamma, self._offset, most=20)
        if episodes.longest == 0:
            return
        starts = th.as_tensor(episodes.first_observations, device=self.device)
        starts = starts[th.randint(len(starts), (100,), device=self.device)]

        def pay(rewards: th.Tensor, *transition: th.Tensor) -> th.Tensor:
            observations, actions, next_observations = transition
            raw = ReplayBufferSamples(observations, actions, next_observations, th.zeros_like(rewards), rewards)
            return self._pay_imagined(raw, rewards)

        steps = min(episodes.longest, math.ceil(math.log(0.01) / math.log(self.gamma)) if self.gamma < 1 else 1000)
        with self._acting():
            estimate = lower_bound(self._act, world.dynamics, world.outcomes, pay, starts, self.gamma, steps)
        self._world_log["objective/lower_bound"] = estimate.mean.item()
        self._world_log["objective/log_return"] = math.log(episodes.discounted_returns.mean())

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._world_log[name] = time.perf_counter() - start

    # -- saving --

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*(f"{WORLD}.{part}" for part in World.parts), *state_dicts], variables

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_streams"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        SB3's ``save``. ``SAC.load`` opens the zip too and ignores the world in it.

        :param exclude: as in SB3; ``["world"]`` leaves the world out
        """
        exclude = list(exclude or [])
        archive = io.BytesIO()
        super().save(archive, exclude, include)
        state = {"streams": self._streams.state_dict()}
        contents = split_world(archive.getvalue(), state, keep_world=WORLD not in exclude)
        file = open_path(path, "w", verbose=0, suffix="zip")
        file.write(contents)
        if isinstance(path, str | pathlib.Path):
            file.close()

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfModelBased],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: Any = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfModelBased:
        """SB3's ``load``. A zip without a world, SAC's for instance, leaves the world untrained."""
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        file = open_path(path, "r", verbose=0, suffix="zip")
        world = read_world(file, model.device)
        if isinstance(path, str | pathlib.Path):
            file.close()
        if world is None:
            model._fitted_at = None
            if model.verbose >= 1:
                print(f"No learned world in {path}: it starts untrained")
            return model
        parameters, state = world
        model.set_parameters(parameters, exact_match=False)
        model._streams.load_state_dict(state["streams"])
        return model

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """SB3's ``set_parameters``. Parameters without any of the world's leave the world as it is."""
        if isinstance(load_path_or_dict, dict) and not any(name.startswith(WORLD) for name in load_path_or_dict):
            own = {name: value for name, value in self.get_parameters().items() if name.startswith(WORLD)}
            load_path_or_dict = {**own, **load_path_or_dict}
        super().set_parameters(load_path_or_dict, exact_match, device)


class _Terms:
    """The terms of the dynamics' loss on one minibatch (E, N, .), each computed when asked for and weighted."""

    def __init__(self, agent: ModelBased, row: Objective, rows: ReplayBufferSamples) -> None:
        self._agent, self._row, self._rows = agent, row, rows

    @cached_property
    def nll(self) -> th.Tensor:
        rows = self._rows
        nll = self._agent.world.dynamics.nll(rows.observations, rows.actions, rows.next_observations, rows.rewards)
        return self._row.likelihood_weight * nll.mean(dim=1)

    @cached_property
    def _drawn(self) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """s, a and s' ~ q by reparameterisation; over all members as many rows as one member's minibatch has."""
        n_members, n_rows = self._rows.rewards.shape[:2]
        few = max(n_rows // n_members, 1)
        observations, actions = self._rows.observations[:, :few], self._rows.actions[:, :few]
        return observations, actions, self._agent.world.dynamics.rsample(observations, actions)[0]

    @cached_property
    def log_ratio(self) -> th.Tensor:
        # Not clipped: where the classifier is sure, the dynamics need its gradient most.
        return self._row.adversarial_weight * self._agent.world.classifier(*self._drawn).mean(dim=(1, 2))

    @cached_property
    def value(self) -> th.Tensor:
        next_observations = self._drawn[2]
        value = self._agent._value(next_observations.flatten(0, 1)).view(next_observations.shape[:2])
        return self._row.adversarial_weight * value.mean(dim=1)


class MnM(ModelBased, FastSAC):
    """
    Mismatched no more: SAC with a learned world, policy and dynamics trained on one objective.

    Takes the place of :class:`stable_baselines3.SAC`: the same arguments first and in order, those of
    :class:`ModelBased` by keyword behind them.

    Source: Eysenbach, Khazatsky, Levine, Salakhutdinov, "Mismatched No More: Joint Model-Policy Optimization for
    Model-Based RL", NeurIPS 2022.
    """


class VMBPO(MnM):
    """Variational model-based policy optimization (Chow et al., 2021): the objective without the logarithm."""

    def __init__(self, *args: Any, objective: str | Objective = "vmbpo", **kwargs: Any) -> None:
        super().__init__(*args, objective=objective, **kwargs)


class MBPO(MnM):
    """Model-based policy optimization (Janner et al., 2019): dynamics by likelihood, the task's own reward."""

    def __init__(self, *args: Any, objective: str | Objective = "mbpo", real_ratio: float = 0.05, **kwargs: Any) -> None:
        super().__init__(*args, objective=objective, real_ratio=real_ratio, **kwargs)
