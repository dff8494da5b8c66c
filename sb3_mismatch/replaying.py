"""Steps that repeat themselves on tensors of the same shapes, launched at once on CUDA as a captured graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves, tree_map_only

#: Capture wants a few runs beforehand: libraries set themselves up, optimizers make their moments.
WARM_UP = 3


class Replayed:
    """
    A step as its first calls run it, then as a graph captured on its tensors.

    What a step reads and changes beside its inputs must stay where it is in memory, and it must not wait for the
    device. Random draws go on from the default generator's state at each call.

    :param step: of tensors, or trees of them, to tensors, a tree of them, or ``None``
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step
        self._calls = 0
        self._graph: th.cuda.CUDAGraph | None = None
        self._places: list[th.Tensor] = []
        self._outputs: Any = None

    def __call__(self, *inputs: Any) -> Any:
        """The step on ``inputs``, whose shapes are those of the first call; what it returns is the caller's."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._aside(inputs)
        if self._graph is None:
            kept = tree_map_only(th.Tensor, th.clone, inputs)
            self._places = _tensors(kept)
            self._graph = th.cuda.CUDAGraph()
            with _unchecked_distributions(), th.cuda.graph(self._graph):
                self._outputs = self._step(*kept)
        th._foreach_copy_(self._places, _tensors(inputs))
        self._graph.replay()
        return tree_map_only(th.Tensor, th.clone, self._outputs)

    def _aside(self, inputs: Any) -> Any:
        """As it is, on a stream of its own, where capture wants to find what the first runs set up."""
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            outputs = self._step(*inputs)
        th.cuda.current_stream().wait_stream(stream)
        return outputs


def replayed(step: Callable[..., Any], optimizer: th.optim.Optimizer, device: th.device) -> Callable[..., Any]:
    """A training step of ``optimizer`` as it is, and on CUDA as a graph."""
    if device.type != "cuda":
        return step
    for group in optimizer.param_groups:
        group["capturable"] = True
    return Replayed(step)


def _tensors(tree: Any) -> list[th.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, th.Tensor)]


@contextmanager
def _unchecked_distributions() -> Iterator[None]:
    """While it lasts, torch's distributions do not look at their arguments, for which they would wait."""
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)
