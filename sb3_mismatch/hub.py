"""
An agent as a folder for the Hugging Face hub, with the files that ``huggingface_sb3.package_to_hub`` makes.

Nothing here uses the network. Needs the extra ``zoo``.
"""

from __future__ import annotations

import json
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import gymnasium as gym
import stable_baselines3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

import sb3_mismatch
from sb3_mismatch.mnm import ModelBased

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = """---
{metadata}
---

# {agent} on {env_id}

An agent of `{agent}` for {env_id}, trained with [Stable-Baselines3](https://stable-baselines3.readthedocs.io) and
sb3_mismatch. Its return in the real environment is {score} over {episodes} episodes.

## Usage

```
pip install sb3-mismatch huggingface_sb3
```

```python
from huggingface_sb3 import load_from_hub  # TRUST_REMOTE_CODE=True in the environment: a zip of SB3 holds pickles

from {module} import {agent}

model = {agent}.load(load_from_hub("{repo_id}", "{filename}"))
```

The policy works without sb3_mismatch too: `from {base_module} import {base}`, and `{base}.load(...)` in the same way.
"""


def model_name(model: ModelBased, env_id: str) -> str:
    """``mnm-Pendulum-v1``: the names of rl_zoo3 and of the hub."""
    return f"{type(model).__name__.lower()}-{env_id.replace('/', '-').rpartition(':')[2]}"


def model_card(model: ModelBased, env_id: str, repo_id: str, mean: float, std: float, episodes: int) -> ModelCard:
    """
    The card that names this package, with the return as the hub reads it.

    :param repo_id: where the folder will lie, ``"user/name"``
    :param mean: of the episodes' returns
    :param std: of the same
    :param episodes: how many
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    kind, score = type(model), f"{mean:.2f} +/- {std:.2f}"
    base = next(k for k in kind.__mro__ if k.__module__.startswith(("stable_baselines3.", "sb3_contrib.")))
    result = EvalResult(
        task_type="reinforcement-learning",
        task_name="reinforcement-learning",
        dataset_type=env_id,
        dataset_name=env_id,
        metric_type="mean_reward",
        metric_name="mean_reward",
        metric_value=score,
    )
    metadata = ModelCardData(
        library_name="stable-baselines3",
        tags=[env_id, "deep-reinforcement-learning", "reinforcement-learning", "stable-baselines3", "sb3-mismatch"],
        model_name=kind.__name__,
        eval_results=[result],
    )
    return ModelCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            agent=kind.__name__,
            env_id=env_id,
            score=score,
            episodes=episodes,
            module="sb3_mismatch" if kind.__name__ in sb3_mismatch.__all__ else kind.__module__,
            repo_id=repo_id,
            filename=f"{model_name(model, env_id)}.zip",
            base_module=base.__module__.partition(".")[0],
            base=base.__name__,
        )
    )


def package(
    model: ModelBased,
    folder: str | Path,
    env_id: str,
    eval_env: gym.Env | VecEnv,
    repo_id: str,
    n_eval_episodes: int = 10,
) -> Path:
    """
    Save and evaluate an agent, and write what the hub shows of it.

    The folder then holds ``<agent>-<env_id>.zip``, the same unzipped, ``config.json``, ``results.json``, the card
    ``README.md`` and, with VecNormalize, ``vec_normalize.pkl``. A video is the caller's to add, as ``replay.mp4``.

    :param folder: created if needed
    :param eval_env: VecNormalize around it is left with frozen statistics and raw rewards
    :param repo_id: where the folder will lie, ``"user/name"``
    :return: the zip
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = model_name(model, env_id)
    model.save(folder / name)
    with zipfile.ZipFile(folder / f"{name}.zip") as archive:
        archive.extractall(folder / name)
        config = json.loads(archive.read("data"))
    config["system_info"] = stable_baselines3.get_system_info(print_info=False)[0]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    env = eval_env if isinstance(eval_env, VecEnv) else DummyVecEnv([lambda: Monitor(eval_env)])
    normalize = unwrap_vec_normalize(env)
    if normalize is not None:
        normalize.save(str(folder / "vec_normalize.pkl"))
        normalize.training = normalize.norm_reward = False
    mean, std = evaluate_policy(model, env, n_eval_episodes)
    assert isinstance(mean, float)
    assert isinstance(std, float)
    results = {
        "mean_reward": mean,
        "std_reward": std,
        "is_deterministic": True,
        "n_eval_episodes": n_eval_episodes,
        "eval_datetime": datetime.now(timezone.utc).isoformat(),
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    model_card(model, env_id, repo_id, mean, std, n_eval_episodes).save(folder / "README.md")
    return folder / f"{name}.zip"
