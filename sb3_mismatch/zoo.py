"""
rl-baselines3-zoo with this package's algorithms: ``python -m sb3_mismatch.zoo train --algo mnm --env Hopper-v5``.

Needs the extra ``zoo``. rl_zoo3 is imported only when it runs: it replaces Gymnasium's TimeLimit as it is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sb3_mismatch.contrib import MnMCrossQ, MnMTQC
from sb3_mismatch.mnm import MBPO, VMBPO, MnM, ModelBased

if TYPE_CHECKING:
    import optuna

COMMANDS = ("train", "enjoy")

#: what ``--algo`` takes beside rl_zoo3's own
ALGORITHMS: dict[str, type[ModelBased]] = {
    "mnm": MnM,
    "vmbpo": VMBPO,
    "mbpo": MBPO,
    "mnmtqc": MnMTQC,
    "mnmcrossq": MnMCrossQ,
}

#: settings by environment, a file for each algorithm; one without a file takes mnm's
HYPERPARAMS = Path(__file__).parent / "hyperparams"


def config_file(algo: str) -> Path:
    """The package's settings for an algorithm, which rl_zoo3 reads unless ``--conf-file`` names others."""
    own = HYPERPARAMS / f"{algo}.yml"
    return own if own.exists() else HYPERPARAMS / "mnm.yml"


def sample_mbpo(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """A trial's arguments for the constructor: how much is imagined, and how fast the agent learns from it."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [128, 256, 512]),
        "gradient_steps": trial.suggest_categorical("gradient_steps", [1, 5, 10, 20, 40]),
        "real_ratio": trial.suggest_categorical("real_ratio", [0.05, 0.1, 0.2, 0.5]),
        "horizon": trial.suggest_int("horizon", 1, 10, log=True),
        "model_train_freq": trial.suggest_categorical("model_train_freq", [25, 50, 100, 250]),
        "imagined_per_step": trial.suggest_categorical("imagined_per_step", [50, 100, 200, 400]),
    }


def sample_mnm(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """The same, the steps of an imagined row, and the weights of the classifier for the policy and the dynamics."""
    return {
        **sample_mbpo(trial, n_actions, n_envs, additional_args),
        "imagined_n_steps": trial.suggest_int("imagined_n_steps", 1, 10, log=True),
        "log_ratio_weight": trial.suggest_float("log_ratio_weight", 1e-3, 1.0, log=True),
        "adversarial_weight": trial.suggest_float("adversarial_weight", 1e-3, 1.0, log=True),
    }


def register() -> None:
    """Tell rl_zoo3 of the algorithms, and what ``-optimize`` tries and ``--trial-id`` reads back for each."""
    from rl_zoo3 import ALGOS
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    for name, kind in ALGORITHMS.items():
        ALGOS[name] = kind
        HYPERPARAMS_SAMPLER[name] = sample_mbpo if kind is MBPO else sample_mnm
        # What is sampled is what the constructor takes.
        HYPERPARAMS_CONVERTER[name] = lambda sampled_params: sampled_params


def main() -> None:
    """``train`` or ``enjoy`` of rl_zoo3, with its own arguments."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python -m sb3_mismatch.zoo {{{','.join(COMMANDS)}}} ..., with the arguments of rl_zoo3's own")
    command = sys.argv.pop(1)
    sys.argv[0] = f"python -m sb3_mismatch.zoo {command}"
    if command == "train":
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--algo")
        parser.add_argument("-conf", "--conf-file")
        known, _ = parser.parse_known_args()
        if known.algo in ALGORITHMS and known.conf_file is None:
            sys.argv += ["--conf-file", str(config_file(known.algo))]
    register()
    getattr(importlib.import_module(f"rl_zoo3.{command}"), command)()


if __name__ == "__main__":
    main()
