"""
What comes in from outside is checked before any network sees it, and what would leave a network without finite
weights counts for nothing.
"""

import math
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutReturn
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from sb3_mismatch.buffers import RealTransitions
from sb3_mismatch.observations import Observations
from sb3_mismatch.settings import LARGEST
from sb3_mismatch.world import World

#: Values so many times beyond what rewards and discount allow have diverged.
DIVERGED = 5.0
#: A policy is judged by the mean return of so many episodes.
EPISODES = 10


class Guarded(OffPolicyAlgorithm):
    """Stops at data, actions, learning rates, gradients and callbacks under which nothing sound can be learned."""

    world: World
    ent_coef_optimizer: th.optim.Adam | None = None
    _gradients: "GradientGuard"
    _first_return: float | None = None
    _best_return: float = -math.inf
    _world_log: dict[str, float]

    # The compiled update, which runs no hooks of optimizers, drops what the guard would.
    largest_gradient: ClassVar[float] = LARGEST
    n_optimizer_hooks: ClassVar[int] = 1

    def _setup_model(self) -> None:
        super()._setup_model()
        self._gradients = GradientGuard(self.device)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_gradients"]

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        trains = self.train
        prepared = super()._setup_learn(*args, **kwargs)
        if self.train != trains:
            raise ValueError(
                "a callback has put its own train() in the place of this class's, so that no world would be learned "
                "(rl_zoo3's ParallelTrainCallback trains the base algorithm): leave it out, or use the base algorithm"
            )
        check_environment("observation", self._last_obs)  # type: ignore[arg-type]
        assert self.replay_buffer is not None
        check_buffer(self.replay_buffer)
        return prepared

    def collect_rollouts(self, env: VecEnv, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        SB3's.

        :raises RuntimeError: when a worker of SubprocVecEnv has died
        """
        try:
            return super().collect_rollouts(env, *args, **kwargs)
        except (EOFError, ConnectionError) as error:
            if dead := dead_workers(env):
                raise RuntimeError(
                    f"the process of environment {dead[0]} has died, and what it printed tells why: what was collected "
                    "is still here for save() and save_replay_buffer(); pass a new SubprocVecEnv to set_env() to go on"
                ) from error
            raise

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """SB3's; noise of another shape and actions that are not finite stop here, before the environment."""
        noise: Any = action_noise
        if action_noise is not None:
            shape = (n_envs, *self.action_space.shape)  # type: ignore[misc]
            noise = checked_noise(action_noise, shape)
        action, buffer_action = super()._sample_action(learning_starts, noise, n_envs)
        check_numbers("the action", buffer_action, "action_noise and the weights given to the policy must be finite")
        return action, buffer_action

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Observations,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """SB3's; what is not finite stops here, before any network sees it."""
        normalize = self._vec_normalize_env
        check_environment("observation", new_obs if normalize is None else normalize.get_original_obs())
        check_environment("reward", reward if normalize is None else normalize.get_original_reward())
        for info, done in zip(infos, dones, strict=True):
            if done and info.get("terminal_observation") is not None:
                check_environment("terminal_observation", info["terminal_observation"])
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        The base algorithm's update.

        :raises ValueError: when a gradient was of no use, so that it counted for nothing
        """
        self._gradients.dropped.zero_()
        policy: Any = self.policy
        for optimizer in (policy.actor.optimizer, policy.critic.optimizer, self.ent_coef_optimizer):
            if optimizer is not None:
                self._gradients.watch(optimizer)
        # sb3-contrib takes means of losses for the log: of infinite ones they warn before the error below tells.
        with np.errstate(invalid="ignore", over="ignore"):
            super().train(gradient_steps, batch_size)
        if dropped := int(self._gradients.dropped.item()):
            raise ValueError(
                f"{dropped} gradients of the last {gradient_steps} gradient steps were not finite or beyond "
                f"{LARGEST:g}: the update diverged; lower learning_rate, scale the rewards, or wrap the environment "
                "in VecNormalize"
            )

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        """SB3's; a schedule that returns no learning rate stops here."""
        rate = self.lr_schedule(self._current_progress_remaining)
        if not 0 <= rate <= LARGEST:
            raise ValueError(
                f"learning_rate returned {rate} at remaining progress {self._current_progress_remaining:g}: a schedule "
                "must return a finite number of at least 0"
            )
        super()._update_learning_rate(optimizers)

    def _count_dropped(self, dropped: th.Tensor) -> None:
        self._gradients.dropped += dropped

    def _watch_returns(self) -> None:
        """Log how much of what the agent once gained over its first episodes it still earns; tell of a collapse."""
        latest = [episode["r"] for episode in self.ep_info_buffer or ()][-EPISODES:]
        if len(latest) < EPISODES:
            return
        mean = float(np.mean(latest))
        if self._first_return is None:
            self._first_return = self._best_return = mean
        self._best_return = max(self._best_return, mean)
        gained = self._best_return - self._first_return
        kept = (mean - self._first_return) / gained if gained > 0 else 1.0
        # Told where it begins; what was gained by chance is no loss.
        if kept < 0.5 <= self._world_log.get("train/kept", 1.0) and gained > 3 * np.std(latest) and self.verbose >= 1:
            print(
                f"The policy has collapsed: the last {EPISODES} episodes earn {mean:.1f}, where "
                f"{self._best_return:.1f} was reached; load an earlier checkpoint, and lower learning_rate or "
                "gradient_steps or raise real_ratio"
            )
        self._world_log["train/kept"] = kept

    @th.no_grad()
    def _watch_critics(self, data: RealTransitions) -> None:
        """Log the largest value at real states over what rewards and discount allow; say so when it has diverged."""
        few = data.batch.observations[:: max(len(data) // 256, 1)]
        payment = self._payment()  # type: ignore[attr-defined]
        values = self._value(few).abs().max() / payment.unit  # type: ignore[attr-defined]
        # A deterministic policy has no entropy.
        with_log_prob = getattr(self.actor, "action_log_prob", lambda observations: (None, values.new_zeros(1)))
        log_prob = with_log_prob(self._seen(few))[1]  # type: ignore[attr-defined]
        entropy = (self._ent_coef() * log_prob).abs().max()  # type: ignore[attr-defined]
        normalize = self._normalization()  # type: ignore[attr-defined]
        rewards = data.batch.rewards if normalize is None else normalize.reward(data.batch.rewards)
        paid = payment.real(rewards).abs().max().item() + payment.slack(self.world.classifier.max_log_ratio)
        ratio = values.item() / value_bound(paid, entropy.item(), self.gamma)
        # Told where it begins, and not at every fit.
        if ratio > DIVERGED >= self._world_log.get("train/value_ratio", 0.0) and self.verbose >= 1:
            print(
                f"The critics' values are {ratio:.1f} times what rewards and gamma allow: lower learning_rate or "
                "gradient_steps, or raise real_ratio"
            )
        self._world_log["train/value_ratio"] = ratio


class GradientGuard:
    """
    Drops gradients that would leave an optimizer or its weights without finite values, and counts them on the device,
    for which nothing waits.

    Under SB3's own update a loss that is not finite would reach the weights at once; squares of gradients beyond
    1e19 overflow in Adam's second moment, where they stay.
    """

    def __init__(self, device: th.device) -> None:
        self.dropped = th.zeros((), device=device)

    def watch(self, optimizer: th.optim.Optimizer) -> None:
        """Look at the gradients before each step of ``optimizer``; a copy of one has lost its hooks."""
        if self._before_step not in optimizer._optimizer_step_pre_hooks.values():
            optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: th.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # NaN is below nothing.
        useless = ~(th.nn.utils.get_total_norm(gradients) < LARGEST)
        # A mask and no branch, which would wait for the device.
        for gradient in gradients:
            gradient.masked_fill_(useless, 0.0)
        self.dropped += useless


def value_bound(paid: float, entropy: float, gamma: float) -> float:
    """
    max |V| = (max |r̃| + max |α log π|) / (1 - γ), and at least 1, below which untrained critics err.

    :param paid: the largest reward, in the units that the critics see
    :param entropy: the largest bonus of entropy
    :param gamma: discount
    """
    return math.inf if gamma == 1 else max((paid + entropy) / (1 - gamma), 1.0)


def check_numbers(name: str, values: Observations, advice: str) -> None:
    """
    Stop at what no network may see: NaN, infinity, and what is beyond ``LARGEST``.

    :param name: of the values, for the message
    :param values: an array, or a dict of such
    :param advice: what the message ends with
    :raises ValueError: when there is such a value
    """
    for key, part in values.items() if isinstance(values, dict) else [("", np.asarray(values))]:
        # NaN passes through minimum and maximum, and is above nothing: no copy of a large array is made.
        if part.size and not (part.min() >= -LARGEST and part.max() <= LARGEST):
            place = tuple(np.argwhere(~(np.abs(part) <= LARGEST))[0])
            raise ValueError(
                f"{name}{key and f'[{key!r}]'} = {part[place]} at index {[*map(int, place)]}: it must be finite, and "
                f"at most {LARGEST:g} in size; {advice}"
            )


def check_environment(name: str, values: Observations) -> None:
    """:func:`check_numbers` of what the environment returned, (n_envs, ...) or a dict of such."""
    check_numbers(
        f"the environment returned {name}",
        values,
        "wrap the environment in stable_baselines3.common.vec_env.VecCheckNan to see why",
    )


def check_buffer(buffer: ReplayBuffer) -> None:
    """
    :func:`check_numbers` of the transitions in a replay buffer, which may have been loaded or filled by hand.

    :raises ValueError: also for a buffer without room for a transition and its successor
    """
    if buffer.optimize_memory_usage and buffer.buffer_size < 2:
        raise ValueError(
            f"buffer_size={buffer.buffer_size} for each environment with optimize_memory_usage=True has no room for a "
            "transition and its successor: use a larger buffer_size"
        )
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts"):
        # Without next_observations under optimize_memory_usage.
        array = getattr(buffer, name, None)
        if array is not None:
            parts = array if isinstance(array, dict) else {"": array}
            stored = {key: part[: buffer.size()] for key, part in parts.items()}
            check_numbers(
                f"the replay buffer's {name}",
                stored if isinstance(array, dict) else stored[""],
                "remove such rows from model.replay_buffer",
            )


def checked_noise(noise: Callable[[], np.ndarray], shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    """
    ``noise``, checked at each call.

    :param shape: of the actions that it is added to
    """

    def checked() -> np.ndarray:
        drawn = np.asarray(noise())
        try:
            fits = np.broadcast_shapes(drawn.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits or drawn.dtype.kind not in "fiu":
            raise ValueError(
                f"action_noise returned {drawn.dtype} of shape {drawn.shape} for actions of shape {shape}: it must "
                "return floating-point numbers of that shape or of a single action's"
            )
        check_numbers("action_noise returned", drawn, "look for what it divides by")
        return drawn

    return checked


def dead_workers(env: VecEnv) -> list[int]:
    """The environments of a SubprocVecEnv, wrapped or not, whose processes have ended."""
    inner = env.unwrapped
    if not isinstance(inner, SubprocVecEnv):
        return []
    # A process closes its pipe a moment before it has ended.
    ended = wait([process.sentinel for process in inner.processes], timeout=5)
    return [i for i, process in enumerate(inner.processes) if process.sentinel in ended]
