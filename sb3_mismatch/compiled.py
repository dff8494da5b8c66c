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
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import Actor
from stable_baselines3.sac.policies import SACPolicy as Policy
from torch import nn
from torch.nn import functional as F

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
Weights = Sequence[th.Tensor]


class Momenta(NamedTuple):
    """Adam's constants β₁, β₂ and ε."""

    beta1: float
    beta2: float
    eps: float


class Spec(NamedTuple):
    """
    What a program is made for; agents alike share one.

    :param actor: kinds of the actor's layers before its two heads
    :param critic: kinds of a critic's layers
    :param n_critics: critics in the ensemble
    :param momenta: of the temperature's, the critics' and the actor's optimizer
    """

    actor: Layers
    critic: Layers
    n_critics: int
    momenta: tuple[Momenta, Momenta, Momenta]


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


class Rows(NamedTuple):
    """
    A minibatch of n rows, single precision.

    :param discounts: γ, or γ^k of a k-step return, (n, 1)
    :param noise: standard normal, (2, n, action_dim): of the actions at s and at s'
    """

    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor
    noise: th.Tensor


class Numbers(NamedTuple):
    """
    Scalars of a gradient step, as one tensor so that none of them is built into the program.

    ``*_rate`` is lr / (1 - β₁^t) and ``*_scale`` is 1 / √(1 - β₂^t) of an optimizer's t-th step.

    :param tau: Polyak's; 0 where the targets are not due
    :param ent_coef: the temperature where it is given
    :param largest: gradients of this norm and above count for nothing
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


# -- the update --


def mlp(layers: Layers, weights: Weights, x: th.Tensor) -> th.Tensor:
    """(n, in) -> (n, out)."""
    remaining = iter(weights)
    for layer in layers:
        x = F.linear(x, next(remaining), next(remaining)) if layer is nn.Linear else ACTIVATIONS[layer](x)
    return x


def act(spec: Spec, weights: Weights, observations: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """a = tanh(μ + σ ε) and log π(a|s) = Σ log N(ε; 0, 1) - log σ - log(1 - a² + 1e-6). Shapes (n, dim), (n, 1)."""
    *body, w_mean, b_mean, w_std, b_std = weights
    features = mlp(spec.actor, body, observations)
    mean = F.linear(features, w_mean, b_mean)
    log_std = F.linear(features, w_std, b_std).clamp(-20, 2)
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


def update(spec: Spec, state: State, rows: Rows, numbers: Numbers) -> tuple[State, th.Tensor]:
    """
    One gradient step of temperature, critics and actor, in SB3's order, and Polyak averaging of the targets.

    :return: the state after it, and (5,): α, the temperature's, critics' and actor's loss, and the gradients dropped
    """
    s, s_next = rows.observations, rows.next_observations
    (actions, log_prob), policy_gradient = th.func.vjp(  # type: ignore[misc]
        lambda weights: act(spec, weights, s, rows.noise[0]), state.actor.weights
    )
    dropped = th.zeros_like(numbers.tau)

    # The temperature: -E[log α (log π(a|s) + H)].
    temperature, ent_coef, ent_coef_loss = state.log_ent_coef, numbers.ent_coef, th.zeros_like(numbers.tau)
    if temperature.weights:
        (log_ent_coef,) = temperature.weights
        ent_coef, excess = log_ent_coef.exp().squeeze(), -(log_prob + numbers.target_entropy).mean()
        ent_coef_loss = log_ent_coef.squeeze() * excess
        temperature, lost = descend(
            temperature,
            [excess.reshape(1)],
            ent_coef_loss,
            numbers.ent_coef_rate,
            numbers.ent_coef_scale,
            spec.momenta[0],
            numbers.largest,
        )
        dropped = dropped + lost

    # The critics: ½ Σ_i E[(Q_i(s, a) - r - γ (1 - done) (min_i Q_target,i(s', a') - α log π(a'|s')))²].
    next_actions, next_log_prob = act(spec, state.actor.weights, s_next, rows.noise[1])
    next_values = lowest(values(spec, state.target, s_next, next_actions)) - ent_coef * next_log_prob
    targets = rows.rewards + (1 - rows.dones) * rows.discounts * next_values

    def critic_loss(weights: Weights) -> th.Tensor:
        loss: th.Tensor = 0.5 * sum(F.mse_loss(q, targets) for q in values(spec, weights, s, rows.actions))  # type: ignore[assignment]
        return loss

    gradients, loss_of_critic = th.func.grad_and_value(critic_loss)(state.critic.weights)
    critic, lost = descend(
        state.critic,
        gradients,
        loss_of_critic,
        numbers.critic_rate,
        numbers.critic_scale,
        spec.momenta[1],
        numbers.largest,
    )
    dropped = dropped + lost

    # The actor: E[α log π(a|s) - min_i Q_i(s, a)].
    def actor_loss(actions: th.Tensor, log_prob: th.Tensor) -> th.Tensor:
        loss: th.Tensor = (ent_coef * log_prob - lowest(values(spec, critic.weights, s, actions))).mean()
        return loss

    gradient, loss_of_actor = th.func.grad_and_value(actor_loss, argnums=(0, 1))(actions, log_prob)
    actor, lost = descend(
        state.actor,
        policy_gradient(gradient)[0],
        loss_of_actor,
        numbers.actor_rate,
        numbers.actor_scale,
        spec.momenta[2],
        numbers.largest,
    )
    dropped = dropped + lost

    target = [t * (1 - numbers.tau) + numbers.tau * w for t, w in zip(state.target, critic.weights, strict=True)]
    log = th.stack([ent_coef, ent_coef_loss, loss_of_critic, loss_of_actor, dropped])
    return State(temperature, critic, actor, target), log


# -- the program --


def tensors(state: State) -> list[th.Tensor]:
    """All of them in one order."""
    learners = (state.log_ent_coef, state.critic, state.actor)
    return [*(x for learner in learners for part in learner for x in part), *state.target]


@cache
def program(spec: Spec) -> Callable[[State, Rows, th.Tensor], th.Tensor]:
    """:func:`update` in place, compiled: (state, rows, numbers as a tensor) -> the log of the step."""

    def step(state: State, rows: Rows, numbers: th.Tensor) -> th.Tensor:
        after, log = update(spec, state, rows, Numbers(*numbers.unbind()))
        for old, new in zip(tensors(state), tensors(after), strict=True):
            old.copy_(new)
        return log

    compiled: Callable[[State, Rows, th.Tensor], th.Tensor] = th.compile(step, fullgraph=True, dynamic=False)
    return compiled


class CompiledStep:
    """
    Runs the program of ``spec`` on an agent's tensors.

    :param spec: what the program is made for
    :param device: where the tensors live
    """

    def __init__(self, spec: Spec, device: th.device) -> None:
        self.spec, self.device = spec, device
        self._ready: set[Any] = set()
        self._graph: _Graph | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of an agent finds the program compiled; a captured graph belongs to the tensors it was captured with.
        return type(self), (self.spec, self.device)

    @th.no_grad()
    def prepare(self, state: State, rows: Rows, numbers: th.Tensor) -> None:
        """Compile for tensors of these shapes, on copies: no weight moves and nothing is drawn."""
        copy = State(*(_copied(part) for part in state))
        # What torch warns of while it compiles is about its own code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program(self.spec)(copy, rows, numbers)
        self._ready.add(_key(rows))

    def is_ready(self, rows: Rows) -> bool:
        """Whether minibatches of this shape have their program."""
        return _key(rows) in self._ready

    @th.no_grad()
    def __call__(self, state: State, rows: Rows, numbers: th.Tensor) -> th.Tensor:
        """One gradient step in place; the log of :func:`update`."""
        if self.device.type == "cuda":
            if self._graph is None or not self._graph.fits(state, rows):
                self._graph = _Graph(program(self.spec), state, rows, numbers)
            return self._graph(rows, numbers)
        return program(self.spec)(state, rows, numbers)


class _Graph:
    """The program captured as a CUDA graph on the agent's tensors; minibatches are copied to where it reads them."""

    def __init__(
        self, step: Callable[[State, Rows, th.Tensor], th.Tensor], state: State, rows: Rows, numbers: th.Tensor
    ) -> None:
        self._state, self._rows, self._numbers = tensors(state), Rows(*(x.clone() for x in rows)), numbers.clone()
        before = [x.clone() for x in self._state]
        # Capture wants a few runs on a stream of its own beforehand, which must leave no trace.
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            for _ in range(3):
                step(state, self._rows, self._numbers)
        th.cuda.current_stream().wait_stream(stream)
        self._graph = th.cuda.CUDAGraph()
        with th.cuda.graph(self._graph):
            self._log = step(state, self._rows, self._numbers)
        for x, old in zip(self._state, before, strict=True):
            x.copy_(old)

    def fits(self, state: State, rows: Rows) -> bool:
        """Whether it was captured on these tensors, for minibatches of this shape."""
        same = all(x.data_ptr() == y.data_ptr() for x, y in zip(self._state, tensors(state), strict=True))
        return same and _key(rows) == _key(self._rows)

    def __call__(self, rows: Rows, numbers: th.Tensor) -> th.Tensor:
        for place, x in zip((*self._rows, self._numbers), (*rows, numbers), strict=True):
            place.copy_(x)
        self._graph.replay()
        return self._log.clone()


def _copied(part: Any) -> Any:
    """A learner, or a list of tensors, with tensors of its own."""
    if isinstance(part, Learner):
        return Learner(*(_copied(tensors) for tensors in part))
    return [x.clone() for x in part]


def _key(rows: Rows) -> tuple[Any, ...]:
    return (*(tuple(x.shape) for x in rows), th.get_num_threads())


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
            if type(layer) is nn.Linear:
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


def spec_of(policy: Policy, ent_coef_optimizer: th.optim.Optimizer | None) -> Spec:
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
        (momenta(ent_coef_optimizer or critic), momenta(critic), momenta(actor)),
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
