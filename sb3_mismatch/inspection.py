"""What is in a saved agent, and how well its world predicts: the numbers and the words of ``inspect``."""

import inspect
import json
import pathlib
import zipfile
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import check_for_correct_spaces, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_mismatch.buffers import RealTransitions
from sb3_mismatch.contrib import MnMCrossQ, MnMTQC
from sb3_mismatch.healthy_range import NO_BOUND
from sb3_mismatch.mnm import MnM, ModelBased
from sb3_mismatch.plots.numbers import horizon_errors_of
from sb3_mismatch.plots.real import held_out, names

#: the classes whose zips hold these settings beside SAC's
KINDS: dict[str, type[ModelBased]] = {"top_quantiles_to_drop_per_net": MnMTQC, "policy_delay": MnMCrossQ}
#: arguments that are none of the algorithm's settings
NO_SETTINGS = ("policy", "env", "verbose", "tensorboard_log", "device", "_init_setup_model")
#: packages whose versions are told, by SB3's names for them
PACKAGES = ("Stable-Baselines3", "PyTorch", "Gymnasium", "Python")
#: imagined steps after which errors are told
STEPS = (1, 2, 5, 10, 20, 50, 100)
#: as many dimensions are told at most
MOST_DIMENSIONS = 24

Rows = list[tuple[str, ...]]


def load(path: pathlib.Path) -> ModelBased:
    """
    The agent in a zip. Loading executes the pickles in it.

    :raises FileNotFoundError: when there is no such file
    :raises ValueError: when it holds no agent of SAC's kind
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: pass the zip that model.save() wrote")
    settings = json.loads(_member(path, "data") or "{}")
    kind = next((kind for name, kind in KINDS.items() if name in settings), MnM)
    return kind.load(path, device="cpu", custom_objects={"verbose": 0})


def take_buffer(model: ModelBased, path: pathlib.Path) -> None:
    """
    Give the agent a saved replay buffer. Loading executes the pickle.

    :raises ValueError: when it is none, or of other spaces
    """
    try:
        with path.open("rb") as file:
            model.load_replay_buffer(file)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a replay buffer ({_first_line(error)})") from error
    buffer = model.replay_buffer
    assert buffer is not None
    if (buffer.observation_space, buffer.action_space) != (model.observation_space, model.action_space):
        raise ValueError(
            f"{path} holds transitions of {buffer.observation_space} and {buffer.action_space}, the agent's spaces are "
            f"{model.observation_space} and {model.action_space}: pass the buffer of its own environment"
        )


def buffer_beside(path: pathlib.Path) -> pathlib.Path | None:
    """The replay buffer that was saved beside a zip, under the names that SB3's callbacks and rl_zoo3 give it."""
    stem, steps = path.stem, path.stem.split("_")[-2:]
    names = ["replay_buffer.pkl", f"{stem}_replay_buffer.pkl", f"{stem}_buffer.pkl"]
    if len(steps) == 2 and steps[1] == "steps":
        prefix = stem.removesuffix("_".join(steps))
        names.insert(0, f"{prefix}replay_buffer_{steps[0]}_steps.pkl")
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def play(model: ModelBased, env_id: str, steps: int) -> None:
    """
    Let the policy act in a real environment and keep the transitions as the agent's replay buffer.

    :param env_id: of Gymnasium
    :raises ValueError: when its spaces are not the agent's
    """
    env = DummyVecEnv([lambda: gym.make(env_id)])
    check_for_correct_spaces(env, model.observation_space, model.action_space)
    kind: Any = DictReplayBuffer if isinstance(env.observation_space, spaces.Dict) else ReplayBuffer
    buffer = kind(steps, env.observation_space, env.action_space)
    set_random_seed(0)
    env.seed(0)
    observations: Any = env.reset()
    for _ in range(steps):
        actions, _ = model.predict(observations)
        reached, rewards, dones, infos = env.step(actions)
        next_observations: Any = infos[0]["terminal_observation"] if dones[0] else reached
        if dones[0]:
            next_observations = _batch(next_observations)
        scaled = model.policy.scale_action(actions)
        buffer.add(observations, next_observations, scaled, rewards, dones, infos)
        observations = reached
    env.close()
    model.replay_buffer = buffer


class Prediction(NamedTuple):
    """
    One-step predictions by the elites' mean: root mean square errors in the environment's units.

    :param names: of the state dimensions, and the reward
    :param error: (d,)
    :param unchanged: (d,) of the guess that nothing changes; for the reward of the guess that it is the mean
    :param ends: true ends, how many of them are told, and how many ends are told that are none
    :param bounds: beyond which episodes end, as they are written
    :param accuracy: the classifier's, of real and imagined next states; ``None`` without one
    :param n: transitions
    """

    names: list[str]
    error: np.ndarray
    unchanged: np.ndarray
    ends: tuple[int, int, int]
    bounds: list[str]
    accuracy: float | None
    n: int


@th.no_grad()
def prediction(model: ModelBased, data: RealTransitions, fresh: bool) -> Prediction:
    """
    How well the world predicts.

    :param data: real transitions
    :param fresh: whether the world has learned from none of them; otherwise those that it held out are asked
    """
    world, rows = model.world, data.batch if fresh else held_out(model, data)
    observations, actions, next_observations, dones, rewards = rows[:5]
    elites = world.dynamics.elites
    stacked = [x.expand(len(elites), *x.shape) for x in (observations, actions)]
    states, learned = world.dynamics.decode(stacked[0], world.dynamics(*stacked, elites).mean)
    predicted = states.mean(dim=0)
    transitions = (observations, actions, next_observations)
    told_ends = world.outcomes.ends(*transitions)
    over = 1 - world.outcomes.continuation(*transitions)
    told_rewards = world.outcomes.rewards(observations, actions, predicted, learned.mean(dim=0), over)
    ends = dones > 0
    return Prediction(
        names=[*names(world.observations), "reward"],
        error=_rms(th.cat([predicted - next_observations, told_rewards - rewards], dim=1)),
        unchanged=_rms(th.cat([observations - next_observations, rewards.mean() - rewards], dim=1)),
        ends=tuple(int(x.sum()) for x in (ends, ends & told_ends, ~ends & told_ends)),  # type: ignore[arg-type]
        bounds=[] if world.outcomes.termination_fn else _bounds(model),
        accuracy=_accuracy(model, observations, actions, next_observations) if model._row.uses_classifier else None,
        n=len(rewards),
    )


def _bounds(model: ModelBased) -> list[str]:
    """The bounds of the healthy range, by the names of the quantities."""
    healthy, world = model.world.dynamics.healthy_range, model.world
    sides = (("<", healthy.low), (">", healthy.high))
    written = (
        (name, sign, bound)
        for sign, side in sides
        for name, bound in zip(names(world.observations), side.tolist(), strict=True)
    )
    return [f"{name} {sign} {bound:.3g}" for name, sign, bound in written if abs(bound) < NO_BOUND]


def _accuracy(model: ModelBased, observations: th.Tensor, actions: th.Tensor, real: th.Tensor) -> float:
    """Share of next states, real ones and imagined ones, that the classifier tells right."""
    with model._at_rest():
        imagined = model.world.dynamics.sample(observations, actions)[0]
    real_logits, imagined_logits = (model.world.classifier(observations, actions, x) for x in (real, imagined))
    return th.cat([real_logits > 0, imagined_logits <= 0]).float().mean().item()


def _rms(errors: th.Tensor) -> np.ndarray:
    """Over rows: (n, d) -> (d,)."""
    return errors.double().square().mean(dim=0).sqrt().cpu().numpy()


# -- words --


def about_agent(model: ModelBased, path: pathlib.Path) -> str:
    """What the zip holds."""
    base = next(kind.__name__ for kind in type(model).__mro__ if kind.__module__.split(".")[0] != "sb3_mismatch")
    fitted = "never" if model._fitted_at is None else f"at step {model._fitted_at:,}"
    rows: Rows = [
        ("class", f"{type(model).__name__} over {base}"),
        ("saved with", _versions(path)),
        ("observations", str(model.observation_space)),
        ("actions", str(model.action_space)),
        ("objective", str(model.objective)),
        ("environment steps", f"{model.num_timesteps:,}"),
        ("updates", f"{model._n_updates:,}"),
        ("world fitted", fitted),
    ]
    policy: Any = model.policy
    world = {"dynamics": model.world.dynamics, "classifier": model.world.classifier}
    networks: dict[str, nn.Module] = {"actor": policy.actor, "critic": policy.critic, **world}
    rows += [(f"{name} weights", f"{sum(p.numel() for p in net.parameters()):,}") for name, net in networks.items()]
    return _titled(path.name, _columns(rows))


def about_settings(model: ModelBased) -> str:
    """The settings that are not their defaults."""
    changed = changed_settings(model)
    rows: Rows = [(name, _short(value), f"default {_short(default)}") for name, (value, default) in changed.items()]
    return _titled("Settings changed", _columns(rows) if rows else "  none")


def changed_settings(model: ModelBased) -> dict[str, tuple[Any, Any]]:
    """Settings that are not their defaults: name -> (value, default)."""
    changed = {}
    for name, parameter in inspect.signature(type(model)).parameters.items():
        if name not in NO_SETTINGS:
            value = getattr(model, name, getattr(model, f"_{name}", parameter.default))
            if not _is_default(model, name, value, parameter.default):
                changed[name] = (value, parameter.default)
    return changed


def _is_default(model: ModelBased, name: str, value: Any, default: Any) -> bool:
    """Whether a setting is its default, or what the algorithm makes of it."""
    if name == "train_freq":
        return bool(value in (default, TrainFreq(default, TrainFrequencyUnit.STEP)))
    if name == "target_entropy" and default == "auto":
        return bool(value == default or value == -float(np.prod(model.action_space.shape)))  # type: ignore[arg-type]
    if name in ("replay_buffer_class", "replay_buffer_kwargs"):
        # SB3 chooses the class by the observation space and by n_steps, and passes n_steps and gamma on.
        chosen = value.__module__ == ReplayBuffer.__module__ if inspect.isclass(value) else not value
        return bool(chosen or model.n_steps > 1)
    if name == "learning_rate":
        # Schedules that are alike are not equal.
        return repr(value) == repr(default)
    if name == "policy_kwargs" and value:
        # SB3 passes this one on.
        value = {key: kwarg for key, kwarg in value.items() if key != "use_sde"}
    return bool(value == default or (default is None and value == {}))


def about_members(model: ModelBased) -> str:
    """The members of the ensemble and their losses."""
    dynamics = model.world.dynamics
    elites = set(dynamics.elites.tolist())
    head = ("member", "held-out loss", "imagines")
    losses = enumerate(dynamics.holdout_loss.tolist())
    rows: Rows = [head, *((str(i), f"{loss:.4f}", "yes" if i in elites else "no") for i, loss in losses)]
    return _titled(f"World: {len(elites)} of {dynamics.n_members} members imagine (losses in nats)", _columns(rows))


def about_prediction(told: Prediction, source: str) -> str:
    """One-step errors beside those of the naive guess, and the share of them that is left."""
    share = np.divide(told.error, told.unchanged, out=np.full_like(told.error, np.nan), where=told.unchanged > 0)
    worst = np.sort(np.argsort(-np.nan_to_num(share[:-1]), kind="stable")[:MOST_DIMENSIONS])
    rows: Rows = [("", "error", "no change", "share")]
    for i in [*worst, len(share) - 1]:
        rows.append((told.names[i], f"{told.error[i]:.3g}", f"{told.unchanged[i]:.3g}", _share(share[i])))
    text = _titled(f"One step, {told.n:,} transitions {source}", _columns(rows))
    if len(share) - 1 > len(worst):
        text += f"\n  ({len(share) - 1 - len(worst)} dimensions that are predicted better are left out)"
    true, found, false = told.ends
    text += f"\n\n  ends        {found} of {true} true ends are told, and {false} that are none"
    if told.bounds:
        text += f"\n  bounds      an episode ends where {', '.join(told.bounds)}"
    if told.accuracy is not None:
        text += f"\n  classifier  tells {told.accuracy:.1%} of real and imagined next states right (50%: no difference)"
    return text


def about_horizon(model: ModelBased, data: RealTransitions, starts: int = 200) -> str:
    """How errors grow along imagined trajectories."""
    told = horizon_errors_of(model, data, max(STEPS), starts)
    rows: Rows = [("step", "error", "no change", "alive")]
    for step in [step for step in STEPS if step < len(told.imagined)]:
        imagined, unchanged = told.imagined[step, 2], told.unchanged[step, 2]
        rows.append((str(step), _number(imagined), _number(unchanged), f"{told.alive[step]:.0%}"))
    title = f"Along the trajectory, {told.n} starts (median, in standard deviations of the state)"
    return _titled(title, _columns(rows))


def _versions(path: pathlib.Path) -> str:
    """The versions that a zip was saved with."""
    lines = _member(path, "system_info.txt").splitlines()
    told = dict(line.removeprefix("- ").split(": ", 1) for line in lines if ": " in line)
    with zipfile.ZipFile(path) as archive:
        seal = json.loads(archive.comment or "{}")
    found = {"sb3_mismatch": seal.get("sb3_mismatch"), **{name: told.get(name) for name in PACKAGES}}
    return ", ".join(f"{name} {version.split()[0]}" for name, version in found.items() if version) or "unknown"


def _member(path: pathlib.Path, name: str) -> str:
    """The text of a zip's member; empty where there is none."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        return archive.read(name).decode(errors="replace") if name in archive.namelist() else ""


def _batch(observation: Any) -> Any:
    """A single observation as a batch of one."""
    if isinstance(observation, dict):
        return {key: part[None] for key, part in observation.items()}
    return observation[None]


def _titled(title: str, text: str) -> str:
    return f"{title}\n{'-' * len(title)}\n{text}"


def _columns(rows: Rows) -> str:
    """Rows of cells in columns: the first one to the left, numbers below their heads to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    # Where there are more than two columns, and a head, all but the first hold numbers.
    to_right = len(widths) > 3 or (len(widths) == 3 and rows[0][0] == "member")
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if to_right and i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}"


def _share(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1%}"


def _short(value: Any, most: int = 60) -> str:
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
