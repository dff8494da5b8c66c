"""The learned world's own random streams, and where the global ones stand."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch as th


class StreamState(NamedTuple):
    """Where NumPy's, torch's and the device's global generators stand."""

    numpy: Any
    torch: th.Tensor
    device: th.Tensor | None


class RandomStreams:
    """
    Random streams that stand in for NumPy's and torch's global generators while the learned world is at work,
    so that a seed gives the policy and the environment the same draws with a learned world beside them or without.

    :param device: where the world's tensors live
    :param seed: seed of the streams; ``None`` derives one from torch's global generator without advancing it
    """

    def __init__(self, device: th.device, seed: int | None = None) -> None:
        self.device = device
        if seed is None:
            seed = _peek_seed()
        # The world's streams must differ from the policy's, which start from the bare seed.
        child = int(np.random.SeedSequence([seed, len("world")]).generate_state(1)[0])
        self._state = StreamState(
            numpy=np.random.RandomState(child).get_state(),
            torch=th.Generator().manual_seed(child).get_state(),
            device=th.Generator(device).manual_seed(child).get_state() if device.type == "cuda" else None,
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Everything drawn from the global generators inside comes from these streams. Not reentrant."""
        outside = self._swap(self._state)
        try:
            yield
        finally:
            self._state = self._swap(outside)

    def _swap(self, state: StreamState) -> StreamState:
        """Set the global generators to ``state``; return where they stood."""
        on_cuda = self.device.type == "cuda"
        before = StreamState(
            np.random.get_state(), th.get_rng_state(), th.cuda.get_rng_state(self.device) if on_cuda else None
        )
        np.random.set_state(state.numpy)
        th.set_rng_state(state.torch)
        if state.device is not None:
            th.cuda.set_rng_state(state.device, self.device)
        return before

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers, which ``torch.load(weights_only=True)`` reads."""
        _, keys, position, has_gauss, gauss = self._state.numpy
        state: dict[str, Any] = {
            "torch": self._state.torch,
            "numpy_keys": th.from_numpy(keys.astype(np.int64)),
            "numpy_rest": [int(position), int(has_gauss), float(gauss)],
        }
        return state if self._state.device is None else {**state, "device": self._state.device}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken; a stream of another kind of device keeps its own place."""
        keys = state["numpy_keys"].cpu().numpy().astype(np.uint32)
        self._state = StreamState(
            numpy=("MT19937", keys, *state["numpy_rest"]),
            torch=state["torch"].cpu(),
            device=state["device"].cpu()
            if "device" in state and self._state.device is not None
            else self._state.device,
        )


def _peek_seed() -> int:
    """A number that follows from where torch's global generator stands, which it leaves there."""
    twin = th.Generator()
    twin.set_state(th.get_rng_state())
    return int(th.randint(2**31, (), generator=twin))


def global_states(device: th.device) -> dict[str, Any]:
    """
    Where Python's, NumPy's, torch's and the device's global generators stand: tensors and plain numbers, which
    ``torch.load(weights_only=True)`` reads.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    kind, words, python_gauss = random.getstate()
    states: dict[str, Any] = {
        "python": [kind, list(words), python_gauss],
        "numpy_keys": th.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": [int(position), int(has_gauss), float(gauss)],
        "torch": th.get_rng_state(),
    }
    return {**states, "device": th.cuda.get_rng_state(device)} if device.type == "cuda" else states


def set_global_states(states: dict[str, Any], device: th.device) -> None:
    """Let the global generators continue where ``states`` were taken; those of another device keep their place."""
    kind, words, python_gauss = states["python"]
    random.setstate((kind, tuple(words), python_gauss))
    np.random.set_state(("MT19937", states["numpy_keys"].cpu().numpy().astype(np.uint32), *states["numpy_rest"]))
    th.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "device" in states:
        th.cuda.set_rng_state(states["device"].cpu(), device)
