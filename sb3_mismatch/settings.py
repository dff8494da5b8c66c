"""Checks of the settings, one sentence each, and the signature that joins the base algorithm's with ours."""

import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_mismatch.objectives import OBJECTIVES, Objective

COUNTS = ("model_train_freq", "imagined_per_step", "imagined_n_steps", "n_members", "n_elites")
WEIGHTS = ("log_ratio_weight", "novelty_weight", "adversarial_weight", "likelihood_weight")
FUNCTIONS = ("termination_fn", "reward_fn")
DICTS = ("dynamics_kwargs", "classifier_kwargs", "fit_kwargs")

#: Beyond it sums of squares overflow in single precision: no observation, reward or gradient is larger.
LARGEST = 1e15


def check_settings(settings: Mapping[str, Any]) -> None:
    """
    One sentence for each setting of :class:`~sb3_mismatch.mnm.ModelBased` that cannot be served.

    :param settings: their values by name
    :raises TypeError: for a value of the wrong kind
    :raises ValueError: for a value out of range
    """
    objective, horizon = settings["objective"], settings["horizon"]
    if isinstance(objective, str) and objective not in OBJECTIVES:
        names = ", ".join(repr(name) for name in OBJECTIVES)
        raise ValueError(f"objective={objective!r} is unknown: use one of {names}, or an Objective")
    if not isinstance(objective, str | Objective):
        raise TypeError(f"objective={objective!r} must be a name or an Objective")
    row = OBJECTIVES[objective] if isinstance(objective, str) else objective
    if row.takes_log and settings["n_steps"] > 1:
        raise ValueError(
            f"n_steps={settings['n_steps']} sums rewards before objective={objective!r} can take their logarithm: "
            "use n_steps=1, or objective='mnm-approx'"
        )
    if row.takes_log and settings["gamma"] == 1:
        raise ValueError(
            f"gamma=1 leaves objective={objective!r} without a bound, whose log(1 - gamma) is infinite: "
            "use gamma below 1, or objective='mnm-approx'"
        )
    for name in ("gamma", "tau"):
        check_number(name, settings[name], 0, 1)
    if settings["real_ratio"] != "auto":
        check_number("real_ratio", settings["real_ratio"], 0, 1, "'auto', or ")
    if settings.get("expansion", 0) != 0:
        check_count("expansion", settings["expansion"], "0 for none, or ")
        check_number("actor_rate", settings["actor_rate"], 0, 1)
        if settings["critic_layer_norm"] not in ("auto", True, False):
            raise ValueError(f"critic_layer_norm={settings['critic_layer_norm']!r} must be 'auto', True or False")
    if settings["random_steps"] not in (0, "auto"):
        check_count("random_steps", settings["random_steps"], "'auto', 0 for none, or ")
    if settings["average_steps"] != 0:
        check_count("average_steps", settings["average_steps"], "0 for none, or ")
    for name in COUNTS:
        check_count(name, settings[name])
    if settings["imagine_freq"] is not None:
        check_count("imagine_freq", settings["imagine_freq"], "None, or ")
    if settings["figures_every"] != 0:
        check_count("figures_every", settings["figures_every"], "0 for none, or ")
    if settings["n_elites"] > settings["n_members"]:
        raise ValueError(
            f"n_elites={settings['n_elites']} is more than n_members={settings['n_members']}: "
            "choose fewer elites or more members"
        )
    if not isinstance(horizon, list | tuple):
        check_count("horizon", horizon)
    elif len(horizon) != 4 or not all(map(is_number, horizon)) or min(horizon[2:]) < 1 or not horizon[0] <= horizon[1]:
        raise ValueError(
            f"horizon={horizon!r} must be a number of at least 1, or a schedule "
            "[first_step, last_step, first_horizon, last_horizon] with rising steps and horizons of at least 1"
        )
    for name in WEIGHTS:
        if settings[name] is not None and not (name == "novelty_weight" and settings[name] == "auto"):
            low, otherwise = (-math.inf, "'auto', None, or ") if name == "novelty_weight" else (0, "None, or ")
            check_number(name, settings[name], low, math.inf, otherwise)
    if settings["reward_shift"] != "auto":
        check_number("reward_shift", settings["reward_shift"], -math.inf, math.inf, "'auto', or ")
    check_number("reward_floor", settings["reward_floor"], 1e-30, math.inf)
    for name in FUNCTIONS:
        if settings[name] is not None and not callable(settings[name]):
            raise TypeError(f"{name}={settings[name]!r} must be a function of batched tensors, or None")
    for name in DICTS:
        if settings[name] is not None and not isinstance(settings[name], dict):
            raise TypeError(f"{name}={settings[name]!r} must be a dict, or None")


def check_replay_buffer_class(kind: type | None) -> None:
    """:raises ValueError: for a replay buffer whose rows imagined ones cannot join"""
    if kind is not None and issubclass(kind, HerReplayBuffer):
        raise ValueError(
            "replay_buffer_class=HerReplayBuffer relabels goals with the environment's own reward, which imagined "
            "transitions have not: use stable_baselines3.SAC with it, or the default buffer"
        )


def check_rows(buffer: ReplayBuffer) -> None:
    """:raises ValueError: for a replay buffer that does not keep its rows as SB3's do"""
    for name in ("observations", "actions", "rewards", "dones", "timeouts"):
        if not hasattr(buffer, name):
            raise ValueError(
                f"replay_buffer_class={type(buffer).__name__} has no array {name}, from which the world is learned: "
                "derive it from stable_baselines3.common.buffers.ReplayBuffer and keep its arrays"
            )


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """A whole number of at least 1; ``otherwise`` says before it what else may be."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be {otherwise}a whole number of at least 1")


def check_number(name: str, value: Any, low: float, high: float, otherwise: str = "") -> None:
    """A finite number from ``low`` to ``high``; ``otherwise`` as for :func:`check_count`."""
    if not is_number(value):
        raise TypeError(f"{name}={value!r} must be {otherwise}a number")
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"{name}={value!r} must be {otherwise}a finite number between {low} and {high}")


def is_number(value: Any) -> bool:
    """Whether it is a real number; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def joined_signature(cls: type, mixin: type, base_defaults: Mapping[str, Any]) -> inspect.Signature:
    """
    The signature of a class made of ``mixin`` and an algorithm: the algorithm's arguments in their order, with
    ``base_defaults``, then by keyword those of the mixin and of what is derived from it.
    """
    base = inspect.signature(super(mixin, cls).__init__)  # type: ignore[arg-type]
    parameters = {
        name: parameter.replace(default=base_defaults.get(name, parameter.default))
        for name, parameter in base.parameters.items()
        if name != "self"
    }
    for kind in reversed(cls.__mro__):
        if issubclass(kind, mixin) and "__init__" in vars(kind):
            for name, parameter in inspect.signature(kind.__init__).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY and name != "_init_setup_model":
                    parameters[name] = parameter
    return inspect.Signature(list(parameters.values()))
