"""
SAC's gradient step as one pure function of explicit state, which ``torch.compile`` turns into one program.

:func:`update` reads as the equations of :class:`~sb3_mismatch.fast_sac.FastSAC` and takes all that changes as
arguments: no autograd tape, no optimizer object, no loop over parameters in Python. :class:`CompiledStep` runs it on
the agent's own tensors, in place, so that weights and optimizers stay where SB3 keeps them. On CUDA the same program
is captured as a graph.
"""

import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import Actor
from stable_baselines3.sac.policies import SACPolicy as Policy
from torch import nn
from torch.nn import functional as F

from sb3_mismatch.classifier import Classifier
from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.lookahead import Path, expanded_value, look_ahead
from sb3_mismatch.normalising import LINEAR, NormalisedLinear, layer_norm
from sb3_mismatch.objectives import Objective, Payment
from sb3_mismatch.products import faster_products
from sb3_mismatch.replaying import Replayed

#: what an activation without parameters computes
ACTIVATIONS: dict[type[nn.Module], Callable[[th.Tensor], th.Tensor]] = {
    nn.ReLU: th.relu,
    nn.Tanh: th.tanh,
    nn.Sigmoid: th.sigmoid,
    nn.ELU: F.elu,
    nn.SiLU: F.silu,
    nn.GELU: F.gelu,
    nn.Mish: F.mish,
    nn.LeakyReLU: F.leaky_relu,
    nn.Softplus: F.softplus,
}

Layers = tuple[type[nn.Module], ...]
#: dynamics and classifier, or nothing
World = tuple[nn.Module, ...]
Weights = Sequence[th.Tensor]
#: of a minibatch: its real rows and its imagined states
Sizes = tuple[int, int]


class Momenta(NamedTuple):
    """Adam's constants β₁, β₂ and ε."""

    beta1: float
    beta2: float
    eps: float


class Ahead(NamedTuple):
    """How far an agent looks ahead in its learned world, and what it is paid there."""

    steps: int
    objective: Objective
    gamma: float


class Spec(NamedTuple):
    """
    What a program is made for; agents alike share one.

    :param actor: kinds of the actor's layers before its two heads
    :param critic: kinds of a critic's layers
    :param n_critics: critics in the ensemble
    :param shapes: of the actor's weights, and of the critics'
    :param momenta: of the temperature's, the critics' and the actor's optimizer
    :param ahead: how a learned world is looked into; ``None`` where there is none
    """

    actor: Layers
    critic: Layers
    n_critics: int
    shapes: tuple[th.Size, ...]
    momenta: tuple[Momenta, Momenta, Momenta]
    ahead: Ahead | None = None


class Learner(NamedTuple):
    """A network's weights and biases in turn, and Adam's means of their gradients, m, and of the squares, v."""

    weights: list[th.Tensor]
    mean: list[th.Tensor]
    square: list[th.Tensor]


class State(NamedTuple):
    """All that a gradient step changes; ``log_ent_coef`` is empty where the temperature is given."""

    log_ent_coef: Learner
    critic: Learner
    actor: Learner
    target: list[th.Tensor]


class Starts(NamedTuple):
    """
    m imagined states, what is drawn over h steps from there, and how VecNormalize scales what is met.

    :param states: raw flat, (m, obs_dim), a multiple of the K elites
    :param noise: standard normal, (h + 1, m, action_dim): of the actions
    :param world_noise: standard normal, (h, K, m / K, obs_dim + 1): of the dynamics
    :param mean, std, clip: of observations, (obs_dim,)
    :param reward_std, clip_reward: of rewards, scalars
    """

    states: th.Tensor
    noise: th.Tensor
    world_noise: th.Tensor
    mean: th.Tensor
    std: th.Tensor
    clip: th.Tensor
    reward_std: th.Tensor
    clip_reward: th.Tensor


class Rows(NamedTuple):
    """
    A minibatch of n rows, single precision.

    :param discounts: γ, or γ^k of a k-step return, (n, 1)
    :param noise: standard normal, of the actions at s and at s', (2, n, action_dim); who looks ahead needs the latter
    :param starts: of those who look ahead
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor
    noise: th.Tensor
    starts: Starts | None = None


class Numbers(NamedTuple):
    """
    Scalars of a gradient step, as one tensor so that none of them is built into the program.

    ``*_rate`` is lr / (1 - β₁^t) and ``*_scale`` is 1 / √(1 - β₂^t) of an optimizer's t-th step.

    :param tau: Polyak's; 0 where the targets are not due
    :param ent_coef: the temperature where it is given
    :param largest: gradients of this norm and above count for nothing
    :param unit: what the critics call one
    :param lowest_value, highest_value: bounds of what they learn by looking ahead, in their unit
    :param offset, lowest, novelty_share, log_ratio_share: of the :class:`~sb3_mismatch.objectives.Payment`
    """

    ent_coef_rate: Any
    ent_coef_scale: Any
    critic_rate: Any
    critic_scale: Any
    actor_rate: Any
    actor_scale: Any
    tau: Any
    target_entropy: Any
    ent_coef: Any
    largest: Any
    unit: Any
    lowest_value: Any
    highest_value: Any
    offset: Any
    lowest: Any
    novelty_share: Any
    log_ratio_share: Any


# -- the update --


def mlp(layers: Layers, weights: Weights, x: th.Tensor) -> th.Tensor:
    """(n, in) -> (n, out)."""
    remaining = iter(weights)
    for layer in layers:
        x = F.linear(x, next(remaining), next(remaining)) if layer in LINEAR else ACTIVATIONS[layer](x)
        if layer is NormalisedLinear:
            x = layer_norm(x)
    return x


def act(spec: Spec, weights: Weights, observations: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """a = tanh(μ + σ ε) and log π(a|s) = Σ log N(ε; 0, 1) - log σ - log(1 - a² + 1e-6). Shapes (n, dim), (n, 1)."""
    *body, w_mean, b_mean, w_std, b_std = weights
    features = mlp(spec.actor, body, observations)
    mean, log_std = F.linear(features, th.cat([w_mean, w_std]), th.cat([b_mean, b_std])).chunk(2, dim=1)
    log_std = log_std.clamp(-20, 2)
    actions = th.tanh(mean + log_std.exp() * noise)
    log_normal = -0.5 * noise.square() - 0.5 * math.log(2 * math.pi)
    return actions, (log_normal - log_std - th.log(1 - actions.square() + 1e-6)).sum(dim=1, keepdim=True)


def values(spec: Spec, weights: Weights, observations: th.Tensor, actions: th.Tensor) -> list[th.Tensor]:
    """Q_i(s, a): ``n_critics`` times (n, 1)."""
    x = th.cat([observations, actions], dim=1)
    each = len(weights) // spec.n_critics
    return [mlp(spec.critic, weights[i * each : (i + 1) * each], x) for i in range(spec.n_critics)]


def lowest(q_values: Sequence[th.Tensor]) -> th.Tensor:
    """min_i Q_i: (n, 1)."""
    return th.cat(list(q_values), dim=1).min(dim=1, keepdim=True).values


def descend(
    learner: Learner,
    gradients: Weights,
    loss: th.Tensor,
    rate: th.Tensor,
    scale: th.Tensor,
    momenta: Momenta,
    largest: th.Tensor,
) -> tuple[Learner, th.Tensor]:
    """
    w - lr m̂ / (√v̂ + ε): Adam, and whether the gradient was dropped for its norm.

    As in the plain form a loss or a gradient that is not finite counts for a gradient of zero.
    """
    beta1, beta2, eps = momenta
    # NaN is below nothing.
    sound = sum(g.square().sum() for g in gradients) < largest.square()
    useful = sound & loss.isfinite()
    after = Learner([], [], [])
    for weight, mean, square, gradient in zip(*learner, gradients, strict=True):
        gradient = th.where(useful, gradient, 0.0)
        mean = mean + (1 - beta1) * (gradient - mean)
        square = beta2 * square + (1 - beta2) * gradient.square()
        after.weights.append(weight - rate * mean / (square.sqrt() * scale + eps))
        after.mean.append(mean)
        after.square.append(square)
    return after, (~sound & loss.isfinite()).float()


def temperature_step(
    spec: Spec, temperature: Learner, log_prob: th.Tensor, numbers: Numbers
) -> tuple[Learner, th.Tensor, th.Tensor, th.Tensor]:
    """Descend -E[log α (log π(a|s) + H)]: the temperature after it, α before it, the loss, the gradients dropped."""
    zero = th.zeros_like(numbers.tau)
    if not temperature.weights:
        return temperature, numbers.ent_coef, zero, zero
    (log_ent_coef,) = temperature.weights
    excess = -(log_prob + numbers.target_entropy).mean()
    loss = log_ent_coef.squeeze() * excess
    rate, scale = numbers.ent_coef_rate, numbers.ent_coef_scale
    after, dropped = descend(temperature, [excess.reshape(1)], loss, rate, scale, spec.momenta[0], numbers.largest)
    return after, log_ent_coef.exp().squeeze(), loss, dropped


def critic_step(
    spec: Spec, critic: Learner, loss: Callable[[Weights], th.Tensor], numbers: Numbers
) -> tuple[Learner, th.Tensor, th.Tensor]:
    """Descend ``loss``: the critics after it, the loss, the gradients dropped."""
    gradients, value = th.func.grad_and_value(loss)(critic.weights)
    rate, scale = numbers.critic_rate, numbers.critic_scale
    after, dropped = descend(critic, gradients, value, rate, scale, spec.momenta[1], numbers.largest)
    return after, value, dropped


def actor_step(
    spec: Spec, actor: Learner, gradients: Weights, loss: th.Tensor, numbers: Numbers
) -> tuple[Learner, th.Tensor]:
    """Descend by ``gradients``: the actor after it, the gradients dropped."""
    rate, scale = numbers.actor_rate, numbers.actor_scale
    return descend(actor, gradients, loss, rate, scale, spec.momenta[2], numbers.largest)


def one_step_targets(spec: Spec, state: State, rows: Rows, ent_coef: th.Tensor) -> th.Tensor:
    """r + γ (1 - done) (min_i Q_target,i(s', a') - α log π(a'|s')): (n, 1)."""
    actions, log_prob = act(spec, state.actor.weights, rows.next_observations, rows.noise[-1])
    next_values = lowest(values(spec, state.target, rows.next_observations, actions)) - ent_coef * log_prob
    return rows.rewards + (1 - rows.dones) * rows.discounts * next_values


def squared_error(q_values: Sequence[th.Tensor], targets: th.Tensor) -> th.Tensor:
    """½ Σ_i E[(Q_i - target)²]."""
    loss: th.Tensor = 0.5 * sum(F.mse_loss(q, targets) for q in q_values)  # type: ignore[assignment]
    return loss


def polyak(target: Weights, weights: Weights, tau: th.Tensor) -> list[th.Tensor]:
    """(1 - τ) target + τ weights."""
    return [t * (1 - tau) + tau * w for t, w in zip(target, weights, strict=True)]


def update(spec: Spec, state: State, rows: Rows, numbers: Numbers) -> tuple[State, th.Tensor]:
    """
    One gradient step of temperature, critics and actor, in SB3's order, and Polyak averaging of the targets.

    :return: the state after it, and (5,): α, the temperature's, critics' and actor's loss, and the gradients dropped
    """
    s = rows.observations
    (actions, log_prob), policy_gradient = th.func.vjp(  # type: ignore[misc]
        lambda weights: act(spec, weights, s, rows.noise[0]), state.actor.weights
    )
    temperature, ent_coef, ent_coef_loss, dropped_0 = temperature_step(spec, state.log_ent_coef, log_prob, numbers)
    # In the critics' unit.
    alpha = ent_coef / numbers.unit
    targets = one_step_targets(spec, state, rows, alpha)
    critic, critic_loss, dropped_1 = critic_step(
        spec, state.critic, lambda weights: squared_error(values(spec, weights, s, rows.actions), targets), numbers
    )

    # E[α log π(a|s) - min_i Q_i(s, a)].
    def climb(actions: th.Tensor, log_prob: th.Tensor) -> th.Tensor:
        loss: th.Tensor = (alpha * log_prob - lowest(values(spec, critic.weights, s, actions))).mean()
        return loss

    gradient, actor_loss = th.func.grad_and_value(climb, argnums=(0, 1))(actions, log_prob)
    actor, dropped_2 = actor_step(spec, state.actor, policy_gradient(gradient)[0], actor_loss, numbers)

    after = State(temperature, critic, actor, polyak(state.target, critic.weights, numbers.tau))
    return after, th.stack([ent_coef, ent_coef_loss, critic_loss, actor_loss, dropped_0 + dropped_1 + dropped_2])


def update_ahead(
    spec: Spec, state: State, rows: Rows, numbers: Numbers, dynamics: Dynamics, classifier: Classifier
) -> tuple[State, th.Tensor]:
    """As :func:`update`, beside real rows by looking ahead from imagined states (:mod:`sb3_mismatch.expansion`)."""
    ahead, starts = spec.ahead, rows.starts
    assert ahead is not None
    assert starts is not None
    given = (numbers.offset, numbers.lowest, numbers.unit, numbers.novelty_share, numbers.log_ratio_share)
    payment = Payment(ahead.objective, ahead.gamma, *given)

    def seen(states: th.Tensor) -> th.Tensor:
        return ((states - starts.mean) / starts.std).clamp(-starts.clip, starts.clip)

    def earned(*transitions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        *transition, rewards = transitions
        ends = dynamics.end_probability(transition[2])
        rewards = rewards + ends * dynamics.end_reward
        rewards = (rewards / starts.reward_std).clamp(-starts.clip_reward, starts.clip_reward)
        log_ratio = classifier.log_ratio(*transition) if ahead.objective.uses_classifier else th.zeros_like(rewards)
        novelty = dynamics.novelty(*transition[:2]) if ahead.objective.novelty_weight != 0 else None
        paid = payment.imagined(rewards, log_ratio, th.ones_like(rewards), novelty)
        return paid, 1 - ends

    def path(weights: Weights) -> Path:
        noise = iter(starts.noise)
        return look_ahead(
            lambda states: act(spec, weights, seen(states), next(noise)),
            lambda states, actions, t: dynamics.rsample_parts(states, actions, t, starts.world_noise[t]),
            earned,
            starts.states,
            ahead.steps,
        )

    climbed, policy_gradient = th.func.vjp(path, state.actor.weights)  # type: ignore[misc]
    temperature, ent_coef, ent_coef_loss, dropped_0 = temperature_step(
        spec, state.log_ent_coef, climbed.log_prob[0], numbers
    )
    # In the critics' unit.
    alpha = ent_coef / numbers.unit

    def value(critics: Weights, path: Path) -> th.Tensor:
        last = lowest(values(spec, critics, seen(path.states[-1]), path.actions[-1])) - alpha * path.log_prob[-1]
        return expanded_value(path, last, alpha, ahead.gamma)

    targets = (value(state.target, climbed) + alpha * climbed.log_prob[0]).clamp(
        numbers.lowest_value, numbers.highest_value
    )
    n_real, n = len(rows.rewards), len(starts.states)
    real_targets = one_step_targets(spec, state, rows, alpha) if n_real > 0 else None

    def critic_loss(weights: Weights) -> th.Tensor:
        imagined = squared_error(values(spec, weights, seen(climbed.states[0]), climbed.actions[0]), targets)
        if real_targets is None:
            return imagined
        real = squared_error(values(spec, weights, rows.observations, rows.actions), real_targets)
        return (n * imagined + n_real * real) / (n + n_real)

    critic, loss_of_critic, dropped_1 = critic_step(spec, state.critic, critic_loss, numbers)
    gradient, actor_loss = th.func.grad_and_value(lambda path: -value(critic.weights, path).mean())(climbed)
    actor, dropped_2 = actor_step(spec, state.actor, policy_gradient(gradient)[0], actor_loss, numbers)

    after = State(temperature, critic, actor, polyak(state.target, critic.weights, numbers.tau))
    return after, th.stack([ent_coef, ent_coef_loss, loss_of_critic, actor_loss, dropped_0 + dropped_1 + dropped_2])


# -- the program --


def tensors(state: State) -> list[th.Tensor]:
    """All of them in one order."""
    learners = (state.log_ent_coef, state.critic, state.actor)
    return [*(x for learner in learners for part in learner for x in part), *state.target]


@cache
def program(spec: Spec, sizes: Sizes, threads: int) -> Callable[[State, Rows, th.Tensor, World], th.Tensor]:
    """
    :func:`update`, or :func:`update_ahead`, in place and compiled: (state, rows, numbers as a tensor, dynamics and
    classifier of those who look ahead) -> the log of the step.

    :param sizes: of the minibatches
    :param threads: that torch has
    """

    def step(state: State, rows: Rows, numbers: th.Tensor, world: World) -> th.Tensor:
        form: Callable[..., tuple[State, th.Tensor]] = update if spec.ahead is None else update_ahead
        after, log = form(spec, state, rows, Numbers(*numbers.unbind()), *world)
        for old, new in zip(tensors(state), tensors(after), strict=True):
            old.copy_(new)
        return log

    options: dict[str, Any] = {"post_grad_custom_post_pass": faster_products(), "size_asserts": False}
    if spec.ahead is None:
        # Spec and sizes tell all that a program depends on but for a world: nothing is left to look at in each step.
        options["guard_filter_fn"] = lambda guards: [False] * len(guards)
    # The compiler keeps its programs with the code of their function, so that each has a code of its own.
    own = FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
    compiled: Callable[[State, Rows, th.Tensor, World], th.Tensor] = th.compile(
        own, fullgraph=True, dynamic=False, options=options
    )
    return compiled


class CompiledStep:
    """
    Runs the program of ``spec`` on an agent's tensors.

    :param spec: what the program is made for
    :param device: where the tensors live
    """

    def __init__(self, spec: Spec, device: th.device) -> None:
        self.spec, self.device = spec, device
        self._ready: set[tuple[Sizes, int]] = set()
        self._graphs: dict[Sizes, Replayed] = {}
        self._captured: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of an agent finds the program compiled; a captured graph belongs to the tensors it was captured with.
        return type(self), (self.spec, self.device)

    @th.no_grad()
    def prepare(self, sizes: Sizes, state: State, rows: Rows, numbers: th.Tensor, world: World = ()) -> None:
        """Compile for minibatches like ``rows``, on copies: no weight moves and nothing is drawn."""
        copy = State(*(_copied(part) for part in state))
        # What torch warns of while it compiles is about its own code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._program(sizes)(copy, rows, numbers, world)
        self._ready.add((sizes, th.get_num_threads()))

    def _program(self, sizes: Sizes) -> Callable[[State, Rows, th.Tensor, World], th.Tensor]:
        return program(self.spec, sizes, th.get_num_threads())

    def is_ready(self, sizes: Sizes) -> bool:
        """Whether minibatches of these sizes have their program."""
        return (sizes, th.get_num_threads()) in self._ready

    def on(self, sizes: Sizes, state: State, world: World = ()) -> Callable[[Rows, th.Tensor], th.Tensor]:
        """What takes gradient steps on these tensors, in place: rows and numbers -> the log of :func:`update`."""
        run = self._program(sizes)

        @th.no_grad()
        def step(rows: Rows, numbers: th.Tensor) -> th.Tensor:
            return run(state, rows, numbers, world)

        if self.device.type != "cuda":
            return step
        # A graph reads and changes what it was captured with.
        places = (*(x.data_ptr() for x in tensors(state)), *map(id, world))
        if self._captured != places:
            self._captured, self._graphs = places, {}

        return self._graphs.setdefault(sizes, Replayed(step))


def _copied(part: Any) -> Any:
    """A learner, or a list of tensors, with tensors of its own."""
    if isinstance(part, Learner):
        return Learner(*(_copied(tensors) for tensors in part))
    return [x.clone() for x in part]


# -- from SB3's agent to the program and back --


def lacking(device: th.device) -> str | None:
    """What this machine lacks to compile for ``device``; ``None`` where nothing is."""
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"device {device.type} has no compiled form"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler}"


def uncovered(policy: Policy, optimizers: Sequence[th.optim.Optimizer], n_hooks: int = 0) -> str | None:
    """
    What of an agent :func:`update` does not know; ``None`` where it knows all.

    :param n_hooks: hooks that an optimizer may have, whose work :func:`descend` does
    """
    if policy.actor.use_sde:
        return "use_sde=True draws its noise from the weights"
    actor, critic = policy.actor, policy.critic
    for part in (actor, critic):
        if type(part.features_extractor) is not FlattenExtractor:
            return f"features extractor {type(part.features_extractor).__name__} is not covered"
    if type(actor) is not Actor or len(list(critic.children())) != 1 + len(critic.q_networks):
        return f"networks of {type(policy).__name__} are not covered"
    networks: list[Any] = [actor.latent_pi, *critic.q_networks]
    for network in networks:
        for layer in network:
            if type(layer) in LINEAR:
                if "bias" not in dict(layer.named_parameters()):
                    return "layers without bias are not covered"
            elif type(layer) not in ACTIVATIONS or repr(layer) != repr(type(layer)()):
                return f"layer {layer} is not covered"
    for optimizer in optimizers:
        options = optimizer.param_groups[0]
        if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
            return f"optimizer {type(optimizer).__name__} is not covered"
        if options["weight_decay"] or options["amsgrad"] or options["maximize"]:
            return "Adam's weight_decay, amsgrad and maximize are not covered"
        if len(optimizer._optimizer_step_pre_hooks) > n_hooks or optimizer._optimizer_step_post_hooks:
            return "hooks of optimizers are not covered"
        if not all(p.requires_grad and p.dtype == th.float32 for p in options["params"]):
            return "weights that are frozen or not of single precision are not covered"
    return None


def spec_of(policy: Policy, ent_coef_optimizer: th.optim.Optimizer | None, ahead: Ahead | None = None) -> Spec:
    """What the program of an agent is made for."""

    def momenta(optimizer: th.optim.Optimizer) -> Momenta:
        options = optimizer.param_groups[0]
        beta1, beta2 = options["betas"]
        return Momenta(beta1, beta2, options["eps"])

    def kinds(layers: Any) -> Layers:
        return tuple(type(layer) for layer in layers)

    critic, actor = policy.critic.optimizer, policy.actor.optimizer
    return Spec(
        kinds(policy.actor.latent_pi),
        kinds(policy.critic.q_networks[0]),
        len(policy.critic.q_networks),
        tuple(x.shape for optimizer in (actor, critic) for x in optimizer.param_groups[0]["params"]),
        (momenta(ent_coef_optimizer or critic), momenta(critic), momenta(actor)),
        ahead,
    )


def state_of(policy: Policy, ent_coef_optimizer: th.optim.Optimizer | None) -> State:
    """The agent's own tensors, not copies."""
    actor = policy.actor
    actor_weights = [p for part in (actor.latent_pi, actor.mu, actor.log_std) for p in part.parameters()]  # type: ignore[union-attr]
    critic_weights = [p for network in policy.critic.q_networks for p in network.parameters()]
    return State(
        Learner([], [], []) if ent_coef_optimizer is None else _learner(ent_coef_optimizer),
        _learner(policy.critic.optimizer, critic_weights),
        _learner(policy.actor.optimizer, actor_weights),
        [p.detach() for network in policy.critic_target.q_networks for p in network.parameters()],
    )


def _learner(optimizer: th.optim.Optimizer, weights: Sequence[nn.Parameter] | None = None) -> Learner:
    """Weights in the order given, or in the optimizer's, and what Adam keeps of them, as it would after no step."""
    options = optimizer.param_groups[0]
    weights = options["params"] if weights is None else weights
    for weight in weights:
        if not optimizer.state[weight]:
            on_device = options["capturable"] or options["fused"]
            optimizer.state[weight] = {
                "step": th.zeros((), device=weight.device if on_device else "cpu"),
                "exp_avg": th.zeros_like(weight, memory_format=th.preserve_format),
                "exp_avg_sq": th.zeros_like(weight, memory_format=th.preserve_format),
            }
    kept = [optimizer.state[weight] for weight in weights]
    return Learner(
        [weight.detach() for weight in weights], [x["exp_avg"] for x in kept], [x["exp_avg_sq"] for x in kept]
    )


def bias_corrections(optimizer: th.optim.Optimizer, gradient_steps: int) -> np.ndarray:
    """lr / (1 - β₁^t) and 1 / √(1 - β₂^t) of the next steps t of Adam: (gradient_steps, 2)."""
    options = optimizer.param_groups[0]
    taken = next(iter(optimizer.state.values()))["step"].item() if optimizer.state else 0
    t = taken + np.arange(1, gradient_steps + 1)
    beta1, beta2 = options["betas"]
    return np.stack([float(options["lr"]) / (1 - beta1**t), 1 / np.sqrt(1 - beta2**t)], axis=1)


def count_steps(optimizer: th.optim.Optimizer, steps: int) -> None:
    """Tell Adam how many steps were taken in its place."""
    for kept in optimizer.state.values():
        kept["step"] += steps
