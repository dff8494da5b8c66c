"""The round: fit, imagine, mix, update. The mixin :class:`ModelBased`, and :class:`MnM` over SAC."""

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import MaybeCallback, ReplayBufferSamples
from stable_baselines3.common.utils import LinearSchedule

from sb3_mismatch.buffers import (
    MixedReplayBuffer,
    RealTransitions,
    has_terminated,
    real_transitions,
    start_states,
)
from sb3_mismatch.expansion import Expanding
from sb3_mismatch.figures import show_world
from sb3_mismatch.fitting import Terms, fit_classifier, fit_dynamics
from sb3_mismatch.guards import Guarded
from sb3_mismatch.imagination import horizon_at, n_step_rows
from sb3_mismatch.imagining import ENOUGH_TELLING, Imagining
from sb3_mismatch.objectives import Objective
from sb3_mismatch.randomness import RandomStreams
from sb3_mismatch.rewards import count_telling
from sb3_mismatch.saving import SavedWithWorld
from sb3_mismatch.settings import check_replay_buffer_class, check_rows, check_settings, joined_signature
from sb3_mismatch.terminations import TransitionFunction
from sb3_mismatch.world import World

SelfModelBased = TypeVar("SelfModelBased", bound="ModelBased")

#: The world waits until the replay buffer holds this many transitions; until then the base algorithm learns alone.
FEWEST_ROWS = 256
#: ``random_steps="auto"``: so many for each number in observation and action, from as many as a world needs on.
RANDOM_STEPS_EACH, MOST_RANDOM_STEPS = 40, 1000


class ModelBased(Guarded, SavedWithWorld, Imagining):
    """
    Gives an off-policy actor-critic of SB3 a learned world. Mixed in before the algorithm:
    ``class MnM(ModelBased, FastSAC)``.

    Every ``model_train_freq`` environment steps the dynamics and the classifier are fitted to the replay buffer and
    trajectories are imagined; every minibatch then holds real and imagined rows, whose reward is the objective's.
    All else is the base algorithm's, whose arguments come first and in their order.

    :param objective: a row of :data:`~sb3_mismatch.objectives.OBJECTIVES` by name, or an
        :class:`~sb3_mismatch.objectives.Objective`
    :param real_ratio: share of real rows in a minibatch, rounded to whole rows (MBPO: 0.05); 1 is the base algorithm.
        "auto": 0.1 where the dynamics explain most of what happens on held-out rows, more where they explain less;
        where the world cannot be learned, 1
    :param horizon: imagined steps per trajectory: a number, or a schedule over environment steps
        ``[first_step, last_step, first_horizon, last_horizon]``
    :param imagined_n_steps: imagined rows hold n-step returns of so many steps, at most the horizon: values travel
        faster than by single steps, and the actions are those of the policy at the last fit (MBPO: 1). As in SB3's
        n-step buffer, the entropy of the steps between is not paid.
    :param random_steps: so many environment steps actions are random and the policy waits, while the world learns
        already: what a policy learns in a poor world it has to unlearn. "auto": 40 for each number in observation and
        action, 256 to 1,000; 0: ``learning_starts`` alone counts
    :param model_train_freq: environment steps between two fits of the world (MBPO: 250)
    :param imagine_freq: environment steps between two refreshments of what is imagined, each of so many steps' rows,
        the oldest giving way (DHMBPO: 20); ``None``: at fits alone
    :param imagined_per_step: imagined rows per environment step (MBPO: 400); they last until the next fit, or until
        renewed
    :param n_members: networks in the ensemble (MBPO: 7)
    :param n_elites: how many of them imagine (MBPO: 5)
    :param log_ratio_weight: weight of the classifier's term in the policy's reward; ``None``: the objective's own
    :param novelty_weight: what the policy earns for each nat that there is to learn, up to five, in the units of the
        rewards that the critics see: above 0 it seeks what the members of the world disagree about, for rewards that
        chance does not find, and is paid less and less for it, in the end nothing, over a call of ``learn``; below 0
        it keeps off; ``None``: the objective's own; "auto": that as well, but in an update that looks ahead, while no
        reward tells anything of states and no episode has ended before its time limit, ten times the largest reward;
        after n rewards that do the (n + 1)-th part, up to a hundred of them or a tenth of all
    :param adversarial_weight: weight of realism and value in the dynamics' loss; ``None``: the objective's own
    :param likelihood_weight: weight of the fit to real transitions in the dynamics' loss; ``None``: the objective's own
    :param reward_shift: added to every reward before its logarithm is taken: a number, or "auto" for as much as
        lifts the lowest reward met so far to ``reward_floor``
    :param reward_floor: lowest shifted reward under ``reward_shift="auto"``, in the reward's units
    :param termination_fn: ``(observations, actions, next_observations) -> (n,)``, true where an episode ends, on
        batched tensors in the environment's own scale; ``None``: learned
    :param reward_fn: the same for the reward; ``None``: learned
    :param dynamics_kwargs: further arguments of :class:`~sb3_mismatch.dynamics.Dynamics`, and its ``learning_rate``
    :param classifier_kwargs: arguments of :class:`~sb3_mismatch.classifier.Classifier`, and its ``learning_rate``
    :param fit_kwargs: arguments of :class:`~sb3_mismatch.fitting.FitSettings`
    :param average_steps: ``predict`` plays the mean of the actor over its last gradient steps, about so many of them
        (:mod:`sb3_mismatch.averaging`); 0: the actor as it is, as in SB3
    :param figures_every: fits of the world between two sets of pictures of it in TensorBoard, where the logger writes
        there; 0: none
    """

    #: Defaults of the base algorithm's arguments that suit a model-based learner better.
    base_defaults: ClassVar[dict[str, Any]] = {"gradient_steps": 5}

    def __init__(
        self,
        *args: Any,
        objective: str | Objective = "mnm-approx",
        real_ratio: float | str = "auto",
        horizon: int | Sequence[int] = 5,
        imagined_n_steps: int = 5,
        random_steps: int | str = 0,
        model_train_freq: int = 50,
        imagine_freq: int | None = None,
        imagined_per_step: int = 50,
        n_members: int = 5,
        n_elites: int = 3,
        log_ratio_weight: float | None = None,
        novelty_weight: float | str | None = None,
        adversarial_weight: float | None = None,
        likelihood_weight: float | None = None,
        reward_shift: float | str = 0.0,
        reward_floor: float = 0.01,
        termination_fn: TransitionFunction | None = None,
        reward_fn: TransitionFunction | None = None,
        dynamics_kwargs: dict[str, Any] | None = None,
        classifier_kwargs: dict[str, Any] | None = None,
        fit_kwargs: dict[str, Any] | None = None,
        average_steps: int = 1000,
        figures_every: int = 50,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        base = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        _init_setup_model = base.pop("_init_setup_model", _init_setup_model)
        super().__init__(**{**self.base_defaults, **base, "_init_setup_model": False})
        self.objective = objective
        self.real_ratio = real_ratio
        self.horizon = horizon
        self.imagined_n_steps = imagined_n_steps
        self.random_steps = random_steps
        self.model_train_freq = model_train_freq
        self.imagine_freq = imagine_freq
        self.imagined_per_step = imagined_per_step
        self.n_members = n_members
        self.n_elites = n_elites
        self.log_ratio_weight = log_ratio_weight
        self.novelty_weight = novelty_weight
        self.adversarial_weight = adversarial_weight
        self.likelihood_weight = likelihood_weight
        self.reward_shift = reward_shift
        self.reward_floor = reward_floor
        self.termination_fn = termination_fn
        self.reward_fn = reward_fn
        self.dynamics_kwargs = dynamics_kwargs
        self.classifier_kwargs = classifier_kwargs
        self.fit_kwargs = fit_kwargs
        self.average_steps = average_steps
        self.figures_every = figures_every
        self._fitted_at: int | None = None
        self._imagined_at = 0
        self._n_fits = 0
        self._unexplained = 1.0
        self._world_log: dict[str, float] = {}
        if _init_setup_model:
            self._setup_model()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = joined_signature(cls, ModelBased, cls.base_defaults)  # type: ignore[attr-defined]

    # -- setting up --

    def _setup_model(self) -> None:
        check_settings(vars(self))
        check_replay_buffer_class(self.replay_buffer_class)
        super()._setup_model()
        assert self.replay_buffer is not None
        check_rows(self.replay_buffer)
        if self.optimize_memory_usage and self.termination_fn is None and self.verbose >= 1:
            print(
                "optimize_memory_usage=True keeps no last observation of an episode, so that ends cannot be learned: "
                "pass termination_fn if episodes end before their time limit"
            )
        # The world's networks are drawn from its own streams: the policy's weights are the base algorithm's.
        with self._streams.active():
            self.world = World(
                self.observation_space,
                self.action_space,  # type: ignore[arg-type]
                self.device,
                {"n_members": self.n_members, "n_elites": self.n_elites, **(self.dynamics_kwargs or {})},
                self.classifier_kwargs or {},
                self.fit_kwargs or {},
                self.termination_fn,
                self.reward_fn,
            )

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed SB3's generators and the world's own; ``None`` leaves the former alone."""
        super().set_random_seed(seed)
        self._streams = RandomStreams(self.device, seed)

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
        with self._keeping_normalization(), self._streams.active():
            if self._world_is_due():
                data = self._real_transitions()
                self._set_unit(data)
                self._fit_dynamics(data)
                self._fit_classifier(data)
                self._imagine()
                self._estimate_bound()
                self._watch_critics(data)
                self._watch_returns()
                self._fitted_at = self.num_timesteps
                self._n_fits += 1
                if self.figures_every and self._n_fits % self.figures_every == 0:
                    show_world(self, data)
            elif self._fitted_at is not None and len(self.world.imagined) == 0 and self._n_rows > 0:
                # A loaded world is fitted and has imagined nothing yet.
                self._imagine()
            elif self._imagination_is_due():
                self._imagine(renews=True)
            elif self._expands and self._unit is None and self._n_rows > 0:
                # Critics that have learned in one unit would err in another.
                self._set_unit(self._real_transitions())
        if not self._waits:
            with self._keeping_normalization(), self._serving(gradient_steps):
                super().train(gradient_steps, batch_size)
        for name, value in self._world_log.items():
            self.logger.record(name, value)

    @property
    def _waits(self) -> bool:
        """Whether actions are still random and the policy waits for its world."""
        return self.real_ratio != 1 and self.num_timesteps < self._n_random_steps

    @property
    def _n_random_steps(self) -> int:
        if not isinstance(self.random_steps, str):
            return self.random_steps
        n_inputs = self.world.observations.dim + spaces.flatdim(self.action_space)
        return min(max(RANDOM_STEPS_EACH * n_inputs, FEWEST_ROWS), MOST_RANDOM_STEPS)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """The base algorithm's; at random for as long as the policy waits."""
        if self._waits:
            learning_starts = max(learning_starts, self._n_random_steps)
        return super()._sample_action(learning_starts, action_noise, n_envs)

    @property
    def _n_rows(self) -> int:
        """Transitions in the replay buffer that a world can learn from."""
        buffer = self.replay_buffer
        assert buffer is not None
        # Where observations serve as next observations too, that of an episode's end is lost.
        lost = int(buffer.dones[: buffer.size()].sum()) if buffer.optimize_memory_usage else 0
        return buffer.size() * buffer.n_envs - lost

    def _world_is_due(self) -> bool:
        if self._n_rows < FEWEST_ROWS:
            return False
        # Steps are counted from the last fit: with several environments no multiple need ever be met.
        since = math.inf if self._fitted_at is None else self.num_timesteps - self._fitted_at
        return since < 0 or since >= self.model_train_freq

    def _imagination_is_due(self) -> bool:
        if self.imagine_freq is None or self._fitted_at is None:
            return False
        return self.num_timesteps - self._imagined_at >= self.imagine_freq

    def _real_transitions(self) -> RealTransitions:
        assert self.replay_buffer is not None
        return real_transitions(self.replay_buffer, self.world.observations, self.device, self._vec_normalize_env)

    def _set_unit(self, data: RealTransitions) -> None:
        """Let the critics' unit follow what real transitions are paid, and what else is chosen by them."""
        if self._expands:
            normalize = self._normalization()
            rewards = data.batch.rewards if normalize is None else normalize.reward(data.batch.rewards)
            assert self.replay_buffer is not None
            if self._seeks:
                over = has_terminated(self.replay_buffer)
                self._n_telling = ENOUGH_TELLING if over else count_telling(data.batch, ENOUGH_TELLING)
            payment = replace(self._payment(), unit=1.0)
            self._scale_to(payment.real(rewards), payment.slack(self.world.classifier.max_log_ratio))  # type: ignore[attr-defined]
            if self._n_updates == 0:
                self._settle_critics(has_terminated(self.replay_buffer))  # type: ignore[attr-defined]

    def _fit_dynamics(self, data: RealTransitions) -> None:
        """Minimise the objective's loss for the dynamics."""
        world, row = self.world, self._row

        def loss(rows: ReplayBufferSamples) -> th.Tensor:
            return row.model_loss(Terms(row, world.dynamics, world.classifier, self._value, rows), self.gamma)

        with self._timed("dynamics/seconds"):
            log = fit_dynamics(
                world.dynamics, world.dynamics_optimizer, data, loss, world.fit_settings, row.ignores_noise
            )
        self._world_log.update(log)
        self._unexplained = log["dynamics/unexplained"]

    def _fit_classifier(self, data: RealTransitions) -> None:
        """Tell real from imagined next states at the same states and actions."""
        if not self._row.uses_classifier:
            return
        world = self.world

        def sample_next(observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
            return world.dynamics.sample(observations, actions)[0]

        with self._timed("classifier/seconds"):
            log = fit_classifier(
                world.classifier,
                world.classifier_optimizer,
                data,
                sample_next,
                world.fit_settings,
                world.dynamics.foretold,
            )
        self._world_log.update(log)

    @th.no_grad()
    def _imagine(self, renews: bool = False) -> None:
        """Branch trajectories from real states; keep their n-step transitions in place of those before, or of some."""
        self._imagined_at = self.num_timesteps
        horizon = horizon_at(self.horizon, self.num_timesteps)
        # Who looks ahead by himself asks for states alone.
        n_steps = 1 if self._expands else min(self.imagined_n_steps, horizon)
        # As many rows at any horizon.
        n_env_steps = self.imagine_freq if renews and self.imagine_freq else self.model_train_freq
        n_starts = max(self.imagined_per_step * n_env_steps // (horizon - n_steps + 1), 1)
        with self._timed("imagination/seconds"):
            assert self.replay_buffer is not None
            starts = start_states(self.replay_buffer, self.world.observations, n_starts, self.device)
            trajectories = self._imagined_from(starts, horizon)
            judged = self._log_ratio(*trajectories[:3]), self._novelty(*trajectories[:2])
            rows = n_step_rows(trajectories, *judged, n_steps)
            (self.world.imagined.renew if renews else self.world.imagined.replace)(rows)
        met = trajectories.rows()
        self._world_log.update(
            {
                "imagination/horizon": horizon,
                "imagination/rows": len(self.world.imagined),
                "imagination/finished": met.dones.mean().item(),
                "imagination/reward": met.rewards.mean().item(),
                "imagination/novelty": rows.novelty.mean().item(),
                "imagination/real_ratio": self._real_share,
            }
        )

    @contextmanager
    def _serving(self, gradient_steps: int) -> Iterator[None]:
        """While it lasts, minibatches are mixed; the real replay buffer comes back whatever happens."""
        real, world = self.replay_buffer, self.world
        assert real is not None
        # Who expands has its share of imagined states already.
        real_share = 1.0 if self._expands else self._real_share
        self.replay_buffer = MixedReplayBuffer(
            real, world.imagined, real_share, gradient_steps, self._payment(), self._streams, world.observations
        )
        try:
            yield
        finally:
            self.replay_buffer = real

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._world_log[name] = time.perf_counter() - start


class MnM(ModelBased, Expanding):
    """
    Mismatched no more: SAC with a learned world, policy and dynamics trained on one objective.

    Takes the place of :class:`stable_baselines3.SAC`: the same arguments first and in order, those of
    :class:`ModelBased` and these by keyword behind them.

    :param expansion: steps that critics and actor look ahead in the learned world, at each gradient step anew, from
        imagined states; 0: minibatches of imagined transitions instead, in SAC's own update
    :param actor_rate: the share of ``learning_rate`` to which the actor's falls, by equal factors at equal steps of a
        call of ``learn``, where it looks ahead; 1: as fast as its critics throughout
    :param critic_layer_norm: whether critics that look ahead have their last hidden layer normalised
        (:mod:`sb3_mismatch.normalising`), with a learned ``ent_coef`` that stays above 0.025 of the largest reward.
        "auto": where no episode has ended before its time limit by the first update, in critics that start anew

    Source: Eysenbach, Khazatsky, Levine, Salakhutdinov, "Mismatched No More: Joint Model-Policy Optimization for
    Model-Based RL", NeurIPS 2022.
    """

    # There is one update for each step, as in SAC: at SAC's own rates values rise too late (CrossQ's are 1e-3 as well).
    # A fall lies a hundred steps off where its cause is, which a gamma of 0.99 hardly sees (DHMBPO: 0.995).
    # What has been learned is lost again where the policy moves on faster than its world follows: the rate falls, and
    # the actor's falls faster than the critics'.
    base_defaults: ClassVar[dict[str, Any]] = {
        "learning_rate": LinearSchedule(1e-3, 1e-4, end_fraction=1.0),
        "tau": 0.02,
        "gamma": 0.995,
    }

    def __init__(
        self,
        *args: Any,
        expansion: int = 5,
        actor_rate: float = 0.3,
        critic_layer_norm: bool | str = "auto",
        random_steps: int | str = "auto",
        horizon: int | Sequence[int] = 20,
        imagine_freq: int | None = 20,
        imagined_per_step: int = 200,
        novelty_weight: float | str | None = "auto",
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        own: dict[str, Any] = {"random_steps": random_steps, "horizon": horizon}
        own |= {"imagine_freq": imagine_freq, "imagined_per_step": imagined_per_step}
        own |= {"novelty_weight": novelty_weight}
        super().__init__(*args, **own, _init_setup_model=False, **kwargs)
        self.expansion = expansion
        self.actor_rate = actor_rate
        self.critic_layer_norm = critic_layer_norm
        if _init_setup_model:
            self._setup_model()


class VMBPO(MnM):
    """Variational model-based policy optimization (Chow et al., 2021): the objective without the logarithm."""

    def __init__(self, *args: Any, objective: str | Objective = "vmbpo", **kwargs: Any) -> None:
        super().__init__(*args, objective=objective, **kwargs)


class MBPO(MnM):
    """Model-based policy optimization (Janner et al., 2019): likelihood, the task's reward, single imagined steps."""

    base_defaults: ClassVar[dict[str, Any]] = ModelBased.base_defaults

    def __init__(
        self,
        *args: Any,
        objective: str | Objective = "mbpo",
        expansion: int = 0,
        real_ratio: float | str = 0.1,
        horizon: int | Sequence[int] = 1,
        imagined_n_steps: int = 1,
        random_steps: int | str = 0,
        imagine_freq: int | None = None,
        imagined_per_step: int = 50,
        novelty_weight: float | str | None = None,
        average_steps: int = 0,
        **kwargs: Any,
    ) -> None:
        own: dict[str, Any] = {"objective": objective, "expansion": expansion, "real_ratio": real_ratio}
        own |= {"horizon": horizon, "imagined_n_steps": imagined_n_steps, "random_steps": random_steps}
        own |= {"imagine_freq": imagine_freq, "imagined_per_step": imagined_per_step, "average_steps": average_steps}
        own |= {"novelty_weight": novelty_weight}
        super().__init__(*args, **own, **kwargs)
