"""Minibatches of a replay buffer, one after the other; where they can be, many are made at once."""

from collections.abc import Iterator

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils._pytree import tree_map

#: How many gradient steps' minibatches are made at once: a bound on memory, not on speed.
STEPS_AHEAD = 64


def minibatches(
    buffer: ReplayBuffer, n: int, batch_size: int, env: VecNormalize | None = None
) -> Iterator[ReplayBufferSamples]:
    """
    ``n`` minibatches, as as many calls of ``buffer.sample`` draw them.

    Gathered one by one, each costs a dozen small operations; sent to a GPU one by one, each would wait for the
    gradient step before it.
    """
    # A buffer without a device has its rows where they are needed.
    device = getattr(buffer, "device", None) or th.device("cpu")
    for first in range(0, n, STEPS_AHEAD):
        n_steps = min(n - first, STEPS_AHEAD)
        if device.type != "cpu":
            yield from sent(drawn_on_host(buffer, n_steps, batch_size, env), device)
        elif draws_alike_at_once(buffer):
            drawn = buffer.sample(n_steps * batch_size, env=env)
            for i in range(n_steps):
                rows = slice(i * batch_size, (i + 1) * batch_size)
                yield tree_map(lambda x: None if x is None else x[rows], drawn)  # noqa: B023
        else:
            for _ in range(n_steps):
                yield buffer.sample(batch_size, env=env)


def draws_alike_at_once(buffer: ReplayBuffer) -> bool:
    """Whether many minibatches drawn as one are those drawn one by one: of flat rows of one environment they are."""
    return type(buffer) is ReplayBuffer and buffer.n_envs == 1 and len(buffer.obs_shape) == 1


def drawn_on_host(buffer: ReplayBuffer, n: int, batch_size: int, env: VecNormalize | None) -> list[ReplayBufferSamples]:
    """``n`` minibatches in the host's memory, whatever device the buffer serves."""
    device, buffer.device = buffer.device, th.device("cpu")
    try:
        return [buffer.sample(batch_size, env=env) for _ in range(n)]
    finally:
        buffer.device = device


def sent(drawn: list[ReplayBufferSamples], device: th.device) -> Iterator[ReplayBufferSamples]:
    """Minibatches in the host's memory as views of one tensor a column on ``device``."""

    def together(*column: th.Tensor | None) -> th.Tensor | None:
        if column[0] is None:
            return None
        stacked = th.stack(column)  # type: ignore[arg-type]
        return (stacked.pin_memory() if device.type == "cuda" else stacked).to(device, non_blocking=True)

    columns = tree_map(together, *drawn)
    for i in range(len(drawn)):
        yield tree_map(lambda x: None if x is None else x[i], columns)  # noqa: B023
