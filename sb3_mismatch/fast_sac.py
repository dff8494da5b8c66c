"""SB3's SAC update in small functions, plain or compiled; knows nothing of models."""

import inspect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update
from torch.nn import functional as F

from sb3_mismatch.compiled import (
    Ahead,
    CompiledStep,
    Numbers,
    Rows,
    Sizes,
    bias_corrections,
    count_steps,
    lacking,
    spec_of,
    state_of,
    uncovered,
)
from sb3_mismatch.minibatches import minibatches

#: Gradient steps from which on ``compile="auto"`` compiles, by the kind of device: on a CPU it saves half of each and
#: takes as long as some thousands, on CUDA it saves nearly all.
LONG_RUN = {"cpu": 20_000, "cuda": 5_000}
#: What the compiled form writes out; where a subclass has its own, the plain form runs.
WRITTEN_OUT = (
    "_update",
    "_ent_coef",
    "_ent_coef_loss",
    "_soft_value",
    "_critic_targets",
    "_critic_loss",
    "_actor_loss",
    "_update_target",
)


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

    Takes SAC's arguments and, by keyword, ``compile``. Subclasses override the part that differs:
    :meth:`_critic_targets`, :meth:`_critic_loss`, :meth:`_actor_loss`, :meth:`_soft_value`.

    :param compile: whether gradient steps run as one program made by ``torch.compile``
        (:mod:`sb3_mismatch.compiled`): the same equations and draws, equal up to rounding, in about half the time,
        after half a minute of compiling. "auto": where a compiler is present and :meth:`learn` is asked for
        at least 20,000 gradient steps, on CUDA 5,000. What cannot be compiled runs plain.
    """

    #: Gradients of this norm and above count for nothing in the compiled form.
    largest_gradient: ClassVar[float] = float("inf")
    #: Hooks of each optimizer whose work the compiled form does itself.
    n_optimizer_hooks: ClassVar[int] = 0
    #: The class whose form of the update the compiled one writes out.
    written_by: ClassVar[type["FastSAC"]]

    def __init__(self, *args: Any, compile: bool | str = "auto", _init_setup_model: bool = True, **kwargs: Any) -> None:
        base = inspect.signature(SAC).bind_partial(*args, **kwargs).arguments
        _init_setup_model = base.pop("_init_setup_model", _init_setup_model)
        super().__init__(**base, _init_setup_model=False)
        self.compile = compile
        if _init_setup_model:
            self._setup_model()

    # -- setting up --

    def _setup_model(self) -> None:
        if self.compile not in ("auto", True, False):
            raise ValueError(f"compile={self.compile!r} is unknown: use 'auto', True or False")
        super()._setup_model()
        self._compiled: CompiledStep | None = None
        self._refused = False
        self._is_long = False

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_compiled", "_refused", "_is_long"]

    def _setup_learn(self, total_timesteps: int, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        prepared = super()._setup_learn(total_timesteps, *args, **kwargs)
        # Of the whole run: one that is continued takes the form that it began with.
        long = LONG_RUN.get(self.device.type, math.inf)
        self._is_long = self._gradient_steps_of(self._total_timesteps) >= long
        return prepared

    def _gradient_steps_of(self, timesteps: int) -> float:
        """How many gradient steps so many environment steps ask for; of episodes, whose lengths differ, one a step."""
        frequency = getattr(self.train_freq, "frequency", self.train_freq)
        per_step = self.gradient_steps / (frequency * self.n_envs)  # type: ignore[operator]
        in_episodes = getattr(getattr(self.train_freq, "unit", None), "value", "step") == "episode"
        return timesteps * (1 if self.gradient_steps < 0 or in_episodes else per_step)

    # -- the update --

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Update critics, actor and temperature ``gradient_steps`` times, each on a minibatch of ``batch_size`` rows.

        :raises ValueError: when a loss is not finite
        """
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        optimizers = [self.actor.optimizer, self.critic.optimizer, self.ent_coef_optimizer]
        self._update_learning_rate([optimizer for optimizer in optimizers if optimizer is not None])

        compiled = self._compiled_step(batch_size) if self._asks_to_compile() and gradient_steps > 0 else None
        if compiled is None:
            losses = self._plain_steps(gradient_steps, batch_size)
        else:
            losses = self._compiled_steps(compiled, gradient_steps, batch_size)

        self._n_updates += gradient_steps
        self._record_losses(losses)

    def _plain_steps(self, gradient_steps: int, batch_size: int) -> list[Losses]:
        assert self.replay_buffer is not None
        losses: list[Losses] = []
        batches = minibatches(self.replay_buffer, gradient_steps, batch_size, self._vec_normalize_env)
        for gradient_step, batch in enumerate(batches):
            losses.append(self._update(batch))
            if gradient_step % self.target_update_interval == 0:
                self._update_target()
        return losses

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

    # -- the compiled form --

    def _asks_to_compile(self) -> bool:
        return not self._refused and (self.compile is True or (self.compile == "auto" and self._is_long))

    def _compiled_step(self, batch_size: int) -> CompiledStep | None:
        """The compiled gradient step for minibatches of this size; ``None`` where the plain form has to do."""
        reason = lacking(self.device) or self._uncovered()
        if reason is None:
            spec = spec_of(self.policy, self.ent_coef_optimizer, self._ahead())
            if self._compiled is None or self._compiled.spec != spec:
                self._compiled = CompiledStep(spec, self.device)
            sizes = self._sizes(batch_size)
            if self._compiled.is_ready(sizes):
                return self._compiled
            start = time.perf_counter()
            try:
                state = state_of(self.policy, self.ent_coef_optimizer)
                rows, number = self._empty_rows(batch_size), self._numbers(1)[0]
                self._compiled.prepare(sizes, state, rows, number, self._looked_into())
            # Whatever a compiler stumbles over, the plain form does the same.
            except Exception as error:
                cause = getattr(error, "inner_exception", error)
                reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
            else:
                if self.verbose >= 1:
                    seconds = time.perf_counter() - start
                    print(f"The update was compiled in {seconds:.0f} s; compile=False keeps the plain form")
                return self._compiled
        self._refused = True
        sentence = f"compile={self.compile!r}: the update runs in its plain form, for {reason}"
        if self.compile is True:
            warnings.warn(sentence, stacklevel=2)
        elif self.verbose >= 1:
            print(sentence)
        return None

    def _uncovered(self) -> str | None:
        """What of this agent the compiled form does not know."""
        for name in WRITTEN_OUT:
            if getattr(type(self), name) is not getattr(self.written_by, name) or name in vars(self):
                return f"{type(self).__name__} has a {name} of its own"
        optimizers = [self.actor.optimizer, self.critic.optimizer, self.ent_coef_optimizer]
        return uncovered(self.policy, [o for o in optimizers if o is not None], self.n_optimizer_hooks)

    def _compiled_steps(self, compiled: CompiledStep, gradient_steps: int, batch_size: int) -> list[Losses]:
        """As :meth:`_plain_steps`, with the same draws."""
        assert self.replay_buffer is not None
        state = state_of(self.policy, self.ent_coef_optimizer)
        step = compiled.on(self._sizes(batch_size), state, self._looked_into())
        numbers = self._numbers(gradient_steps)
        logs: list[th.Tensor] = []
        try:
            batches = minibatches(self.replay_buffer, gradient_steps, batch_size, self._vec_normalize_env)
            for batch, number in zip(batches, numbers, strict=True):
                logs.append(step(self._rows(batch), number))
        finally:
            for optimizer in (self.actor.optimizer, self.critic.optimizer, self.ent_coef_optimizer):
                if optimizer is not None:
                    count_steps(optimizer, len(logs))
        self._count_dropped(th.stack([log[4] for log in logs]).sum())
        losses = [Losses(*log[:4].unbind()) for log in logs]
        return losses if self.ent_coef_optimizer is not None else [x._replace(ent_coef_loss=None) for x in losses]

    def _count_dropped(self, dropped: th.Tensor) -> None:
        """Take note of the gradients, a scalar, that were of ``largest_gradient`` and counted for nothing."""

    def _rows(self, batch: ReplayBufferSamples) -> Rows:
        """A minibatch as the compiled form takes it, with noise drawn as the plain form draws it."""
        # float64 observations and one-hot ones become what the networks' first layers see.
        extract: Callable[[th.Tensor], th.Tensor] = self._features
        noise = th.empty(2 if self._ahead() is None else 1, *batch.actions.shape, device=self.device)
        for part in noise:
            part.normal_()
        discounts = th.full_like(batch.rewards, self.gamma) if batch.discounts is None else batch.discounts
        return Rows(
            extract(batch.observations),
            batch.actions,
            extract(batch.next_observations),
            batch.dones,
            batch.rewards,
            discounts,
            noise,
        )

    def _features(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.actor.extract_features(observations, self.actor.features_extractor)
        return features

    def _sizes(self, n: int) -> Sizes:
        """Of a minibatch of ``n`` rows."""
        return n, 0

    def _empty_rows(self, n: int) -> Rows:
        """A minibatch of zeros."""
        obs_dim, action_dim = self.actor.features_dim, int(np.prod(self.action_space.shape))  # type: ignore[arg-type]
        column = th.zeros(n, 1, device=self.device)
        obs, actions = column.repeat(1, obs_dim), column.repeat(1, action_dim)
        return Rows(obs, actions, obs.clone(), column, column.clone(), column.clone(), actions.repeat(2, 1, 1))

    def _numbers(self, gradient_steps: int) -> th.Tensor:
        """:class:`~sb3_mismatch.compiled.Numbers` of each gradient step, in one go to the device: (steps, fields)."""
        learned = self.ent_coef_optimizer is not None
        ent_coef_optimizer = self.ent_coef_optimizer or self.critic.optimizer
        optimizers = (ent_coef_optimizer, self.critic.optimizer, self.actor.optimizer)
        columns = np.concatenate([bias_corrections(x, gradient_steps) for x in optimizers], axis=1)
        due = np.arange(gradient_steps) % self.target_update_interval == 0
        ent_coef = 0.0 if learned else self.ent_coef_tensor.item()
        rest = (self.target_entropy, ent_coef, self.largest_gradient, *self._bounds())
        table = np.column_stack([columns, np.where(due, self.tau, 0.0), *(np.full(gradient_steps, x) for x in rest)])
        assert table.shape[1] == len(Numbers._fields)
        return th.as_tensor(table, dtype=th.float32, device=self.device)

    # -- for those who look ahead --

    def _ahead(self) -> Ahead | None:
        """How a learned world is looked into at this time."""
        return None

    def _looked_into(self) -> tuple[th.nn.Module, ...]:
        """Its dynamics and its classifier."""
        return ()

    def _bounds(self) -> tuple[float, ...]:
        """The last of :class:`~sb3_mismatch.compiled.Numbers`, from ``unit`` on."""
        return 1.0, -math.inf, math.inf, 0.0, 0.0, 1.0, 1.0

    # -- the log --

    def _record_losses(self, losses: Sequence[Losses]) -> None:
        """Means over the gradient steps under SB3's keys: the one wait for the device."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        # Without gradient steps there are no columns.
        columns = zip(Losses._fields, zip(*losses, strict=True), strict=bool(losses))
        known = {name: values for name, values in columns if not any(value is None for value in values)}
        if not known:
            return
        means = th.stack([th.stack([value.reshape(()) for value in values]) for values in known.values()])
        for name, mean in zip(known, means.double().mean(dim=1).tolist(), strict=True):
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


FastSAC.written_by = FastSAC

# What inspect shows of the constructor: SAC's arguments in their order, and "compile" by keyword.
FastSAC.__init__.__signature__ = (lambda base, own: base.replace(parameters=[*base.parameters.values(), own]))(  # type: ignore[attr-defined]
    inspect.signature(SAC.__init__), inspect.signature(FastSAC.__init__).parameters["compile"]
)
