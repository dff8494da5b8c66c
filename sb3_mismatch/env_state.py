"""
Where an environment stands in its episode: taken, and put back into another environment of the same kind.

An environment that offers ``get_state()`` and ``set_state(state)`` is asked; the state is anything that can be pickled
and must hold the environment's random stream. Of others, and of wrappers, all attributes are taken, if each is plain
data (numbers, strings, arrays, random generators, and lists, tuples, dicts and sets of such) or a MuJoCo simulation.
Spaces, functions, MuJoCo models and renderers are taken for unchanging. An environment that holds anything else is not
understood: its episode starts anew.
"""

import pickle
import random
import sys
from collections import deque
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import ResultsWriter
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

#: attributes of these are kept as they are
_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, np.generic, th.Tensor, np.random.Generator),
    *(np.random.RandomState, random.Random, RunningMeanStd, StackedObservations, gym.Space),
)
#: attributes of these do not change from step to step
_UNCHANGING = (
    *(gym.Space, EnvSpec, ResultsWriter, type, ModuleType),
    *(FunctionType, BuiltinFunctionType, MethodType, partial),
)
#: attributes that lead to the next layer, or hold what the constructor was given
_LINKS = ("env", "venv", "class_attributes", "_ezpickle_args", "_ezpickle_kwargs", "_saved_kwargs")


class NotUnderstood(Exception):
    """Somewhere in an environment is what cannot be taken for its state."""


class Layer(NamedTuple):
    """
    A wrapper, or the environment inside.

    :param kind: its class by name
    :param state: its attributes by name, or what its ``get_state`` gave; ``None``: not understood
    :param asked: whether ``get_state`` gave it
    """

    kind: str
    state: Any
    asked: bool = False


class Standing(NamedTuple):
    """
    Where a vectorised environment stands.

    :param wrappers: its layers from the outermost to the one that steps the environments
    :param envs: the layers of each of these; ``None``: not understood
    """

    wrappers: list[Layer]
    envs: list[Any] | None


class Resumable(gym.Wrapper[Any, Any, Any, Any]):
    """
    Lets checkpoints ask environments in other processes where they stand, as in
    ``make_vec_env(..., vec_env_cls=SubprocVecEnv, wrapper_class=Resumable)``; elsewhere it is not needed.
    """

    def get_state(self) -> bytes | None:
        """All layers inside, pickled; ``None``: not understood."""
        try:
            return pickle.dumps(_layers(self.env))
        except NotUnderstood:
            return None

    def set_state(self, state: bytes) -> None:
        """Continue where ``state`` was taken."""
        _put_back(self.env, pickle.loads(state))


def standing(env: VecEnv) -> bytes:
    """Where ``env`` stands: a :class:`Standing`, pickled."""
    wrappers: list[Layer] = []
    layer = env
    while isinstance(layer, VecEnvWrapper):
        wrappers.append(_vec_layer(layer))
        layer = layer.venv
    wrappers.append(Layer(_kind(layer), {"_seeds": layer._seeds, "_options": layer._options}))
    try:
        return pickle.dumps(Standing(wrappers, _envs(layer)))
    # Whatever of a user's own class refuses to be pickled.
    except (TypeError, AttributeError, pickle.PicklingError):
        return pickle.dumps(Standing(wrappers, None))


def put_back(env: VecEnv, state: bytes) -> bool:
    """
    Put ``env`` where another of its kind stood.

    :return: whether its episodes go on; otherwise the wrappers' statistics are back and the episodes must start anew
    :raises ValueError: for an environment of another kind or in other wrappers
    """
    saved: Standing = pickle.loads(state)
    layers = [env]
    while isinstance(layers[-1], VecEnvWrapper):
        layers.append(layers[-1].venv)
    _check_layers(saved.wrappers, layers)
    if saved.envs is not None:
        if isinstance(layers[-1], DummyVecEnv):
            # All are checked before any is changed.
            for one, its in zip(layers[-1].envs, saved.envs, strict=True):
                _check_layers(its, _chain(one))
            for one, its in zip(layers[-1].envs, saved.envs, strict=True):
                _put_back(one, its)
        else:
            for index, its in enumerate(saved.envs):
                layers[-1].env_method("set_state", its, indices=index)
    for layer, its in zip(layers, saved.wrappers, strict=True):
        if its.state is not None:
            vars(layer).update(its.state)
    return saved.envs is not None and all(layer.state is not None for layer in saved.wrappers)


def _envs(env: VecEnv) -> list[Any] | None:
    """The state of each environment inside."""
    if isinstance(env, DummyVecEnv):
        try:
            return [_layers(one) for one in env.envs]
        except NotUnderstood:
            return None
    if not all(env.env_is_wrapped(Resumable)):
        return None
    states = env.env_method("get_state")
    return None if any(state is None for state in states) else states


def _vec_layer(wrapper: VecEnvWrapper) -> Layer:
    try:
        state = _attributes(wrapper)
        pickle.dumps(state)
    except (NotUnderstood, TypeError, AttributeError, pickle.PicklingError):
        state = None
    return Layer(_kind(wrapper), state)


def _chain(env: gym.Env[Any, Any]) -> list[gym.Env[Any, Any]]:
    """The wrappers of an environment, outermost first, and it itself."""
    chain = [env]
    while isinstance(chain[-1], gym.Wrapper):
        chain.append(chain[-1].env)
    return chain


def _layers(env: gym.Env[Any, Any]) -> list[Layer]:
    layers = []
    for layer in _chain(env):
        asked = _is_asked(layer)
        layers.append(Layer(_kind(layer), layer.get_state() if asked else _attributes(layer), asked))  # type: ignore[attr-defined]
        if asked and layers[-1].state is None:
            raise NotUnderstood(_kind(layer))
        if isinstance(layer, Resumable):
            break
    return layers


def _put_back(env: gym.Env[Any, Any], layers: list[Layer]) -> None:
    chain = _chain(env)
    _check_layers(layers, chain)
    for layer, saved in zip(chain, layers, strict=False):
        if saved.asked:
            layer.set_state(saved.state)  # type: ignore[attr-defined]
            continue
        state = dict(saved.state)
        for name, value in state.items():
            if _is_simulation(value):
                # In its place: the renderer looks at the one that is there.
                simulation = vars(layer)[name]
                sys.modules["mujoco"].mj_copyData(simulation, simulation.model, value)
                state[name] = simulation
        vars(layer).update(state)


def _is_asked(layer: gym.Env[Any, Any]) -> bool:
    # By the class: a wrapper's attributes lead to those inside. MuJoCo's environments have a set_state alone.
    return all(callable(getattr(type(layer), name, None)) for name in ("get_state", "set_state"))


def _attributes(layer: Any) -> dict[str, Any]:
    """What changes from step to step among a layer's attributes."""
    state = {}
    for name, value in vars(layer).items():
        if name in _LINKS or isinstance(value, _UNCHANGING) or _is_of_mujoco(value):
            continue
        if not (_is_plain(value) or _is_simulation(value)):
            raise NotUnderstood(f"{_kind(layer)}.{name}")
        state[name] = value
    return state


def _is_plain(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _is_simulation(value: Any) -> bool:
    return type(value).__name__ == "MjData" and type(value).__module__.split(".")[0] == "mujoco"


def _is_of_mujoco(value: Any) -> bool:
    """A model, which gives the simulation its shape, or a renderer, which looks at it."""
    return type(value).__name__ in ("MjModel", "MujocoRenderer")


def _kind(layer: Any) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _check_layers(saved: list[Layer], given: list[Any]) -> None:
    """:raises ValueError: when the layers that a state was taken of are not those that it is given to"""
    was, now = [layer.kind for layer in saved], [_kind(layer) for layer in given[: len(saved)]]
    if was != now:
        raise ValueError(
            f"the checkpoint was taken in {' > '.join(was)} and env is {' > '.join(now)}: make the same environment in "
            "the same wrappers, or load the checkpoint's model.zip with load() to learn in another one"
        )
