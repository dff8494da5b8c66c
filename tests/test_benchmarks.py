"""The benchmark harness: its callback beside a learner, and its command line on runs of 300 steps."""

import csv
import inspect
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_mismatch import MnM
from sb3_mismatch.benchmarks import evaluation
from sb3_mismatch.benchmarks.__main__ import main
from sb3_mismatch.benchmarks.cells import EVALUATION_SEED, Cell, prepare
from sb3_mismatch.benchmarks.evaluation import EvaluationCallback, global_randomness_kept
from sb3_mismatch.benchmarks.report import Run, interquartile_mean
from sb3_mismatch.benchmarks.tables import ALGORITHMS

COMMAND = [sys.executable, "-m", "sb3_mismatch.benchmarks"]  # Once; after that main(), which starts faster.
LEARN = ["learn", "--suite", "smoke", "--algos", "sac", "--set", "policy_kwargs={'net_arch': [16]}"]


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def small_sac(seed: int = 0, **settings: Any) -> SAC:
    return SAC("MlpPolicy", "Pendulum-v1", seed=seed, policy_kwargs={"net_arch": [16]}, device="cpu", **settings)


def draw_from_global_streams() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), th.rand(1).item()


class GreedyForRandomness(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that draws from every global stream."""

    def step(self, action: Any) -> Any:
        draw_from_global_streams()
        return self.env.step(action)


def test_evaluation_changes_nothing_in_training() -> None:
    def weights(callback: EvaluationCallback | None) -> dict[str, th.Tensor]:
        return small_sac(learning_starts=20).learn(100, callback=callback).policy.state_dict()

    callback = EvaluationCallback(lambda: GreedyForRandomness(gym.make("Pendulum-v1")), every=30, n_episodes=2)
    evaluated, alone = weights(callback), weights(None)
    assert [row.steps for row in callback.rows] == [30, 60, 90, 100]
    assert all(th.equal(evaluated[name], alone[name]) for name in alone)


def test_global_randomness_is_kept() -> None:
    def draws(between: bool) -> list[tuple[float, float, float]]:
        set_random_seed(0)
        first = draw_from_global_streams()
        if between:
            with global_randomness_kept(th.device("cpu")):
                draw_from_global_streams()
        return [first, draw_from_global_streams()]

    assert draws(between=True) == draws(between=False)


def test_evaluations_play_the_same_starts_and_the_last_one_sees_the_last_update() -> None:
    untrained = EvaluationCallback("Pendulum-v1", every=20, n_episodes=2)
    small_sac(learning_starts=100).learn(40, callback=untrained)
    first, second = untrained.rows
    assert (first.mean, first.std) == (second.mean, second.std)  # One policy, one result.

    trained = EvaluationCallback("Pendulum-v1", every=40, n_episodes=2)
    small_sac(learning_starts=39).learn(40, callback=trained)  # The only update follows the last step.
    assert trained.rows[-1].mean != first.mean


def test_seconds_leave_evaluations_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: SAC, env: VecEnv, n_episodes: int, **_: Any) -> tuple[list[float], list[int]]:
        time.sleep(0.5)
        return [1.0, 3.0], [1, 1]

    monkeypatch.setattr(evaluation, "evaluate_policy", slow)
    callback = EvaluationCallback("Pendulum-v1", every=10, n_episodes=2)
    before = time.perf_counter()
    small_sac().learn(40, callback=callback)
    total = time.perf_counter() - before
    assert 0 < callback.rows[-1].seconds < total - 4 * 0.5
    assert callback.rows[-1][2:] == (2.0, 1.0)


def test_learn_twice_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn = [
        *LEARN,
        "learning_starts=250",
        "--label",
        "small",
        "--out",
        str(tmp_path),
        "--seeds",
        "0",
        "1",
        "--jobs",
        "2",
    ]
    subprocess.run([*COMMAND, *learn], check=True)
    folder = tmp_path / "Pendulum-v1" / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["seed0.csv", "seed0.json", "seed1.csv", "seed1.json"]
    head, *rows = read(folder / "seed0.csv")
    assert head == ["steps", "seconds", "mean", "std"]
    assert [int(row[0]) for row in rows] == [100, 200, 300]
    seconds = [float(row[1]) for row in rows]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert all(-2000 < float(row[2]) < 0 < float(row[3]) for row in rows)  # Pendulum's returns.
    by_hand = EvaluationCallback("Pendulum-v1", every=100, seed=EVALUATION_SEED + 1)
    small_sac(seed=1).learn(100, callback=by_hand)
    np.testing.assert_allclose([float(value) for value in read(folder / "seed1.csv")[1][2:]], by_hand.rows[0][2:])
    record = json.loads((folder / "seed0.json").read_text())
    assert record["cell"]["settings"] == ["policy_kwargs={'net_arch': [16]}", "learning_starts=250"]
    assert record["ran_on"]["torch"] == th.__version__

    written = (folder / "seed0.csv").stat().st_mtime_ns
    assert main(learn) == 0
    assert "2 of them finished before" in capsys.readouterr().out
    assert (folder / "seed0.csv").stat().st_mtime_ns == written

    (folder / "seed1.csv").rename(folder / "seed1.partial.csv")
    assert main(["report", "--out", str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text()
    final = f"{float(rows[-1][2]):,.1f}"
    assert f"| small | 1 | {final} ± 0.0 | {final} | {final} |" in report
    assert "- Pendulum-v1 small seed 1: stands at 300 of 300 steps" in report
    assert "--suite smoke --algos sac" in report
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_starts_again(tmp_path: Path) -> None:
    learn = [*LEARN, "--label", "small", "--out", str(tmp_path)]
    folder = tmp_path / "Pendulum-v1" / "small"
    partial, final = folder / "seed0.partial.csv", folder / "seed0.csv"
    process = subprocess.Popen([*COMMAND, *learn])
    deadline = time.monotonic() + 120
    while not (partial.exists() and len(read(partial)) > 1):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    assert process.wait() == 143
    kept = read(partial)
    assert len(kept) >= 2
    time.sleep(0.5)
    assert read(partial) == kept  # Its run ended with it.
    assert not final.exists()

    assert main(learn) == 0
    assert [row[0] for row in read(final)] == ["steps", "100", "200", "300"]
    assert not partial.exists()


def test_a_failed_run_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "smoke", "--algos", "sac", "--set", "no_such=1", "--label", "wrong", "--out", str(tmp_path)]
    assert main(["learn", *arguments]) == 1
    error = capfd.readouterr().err
    assert "unexpected keyword argument 'no_such'" in error
    assert error.endswith("failed: Pendulum-v1 wrong seed 0\n")
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert "wrong seed 0: stands at 0 of 300 steps" in (tmp_path / "report.md").read_text()


def test_a_label_keeps_its_settings(tmp_path: Path) -> None:
    cell = Cell("Pendulum-v1", 300, 100, "sac", "small", seed=0, settings=("gamma=0.9",))
    assert prepare([cell], tmp_path, "first") == [cell]
    other = Cell("Pendulum-v1", 300, 100, "sac", "small", seed=1, settings=("gamma=0.8",))
    with pytest.raises(ValueError, match="use another --label or --out"):
        prepare([other], tmp_path, "second")


def test_scores_by_hand() -> None:
    rows = np.array([[100, 1, 0, 0], [200, 2, 8, 0], [400, 5, 6, 0]], dtype=float)
    run = Run(Cell("Pendulum-v1", 400, 100, "sac", "sac", 0), {}, rows, finished=True)
    np.testing.assert_allclose(run.scores, (6, 8, (100 * 4 + 200 * 7) / 300, 5))  # final, best, area, seconds
    assert interquartile_mean([100, 2, 3, 4, -100]) == 3
    assert interquartile_mean([1, 2, 6]) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--envs", "Hopper-v5"], "--envs Hopper-v5: suite smoke holds Pendulum-v1"),
        (["--set", "gamma=0.9"], "--set and --label go together"),
        (["--set", "gamma=high", "--label", "x"], "--set gamma=high is not name=literal"),
        (["--set", "gamma=0.9", "--label", "a/b"], "--label a/b must be a new name"),
        (["--set", "gamma=0.9", "--label", "tqc"], "--label tqc must be a new name"),
        (["--jobs", "0"], "--jobs: 0 is less than 1"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["learn", "--suite", "smoke", "--algos", "sac", "--out", str(tmp_path), *arguments])
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_values_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="every=0 cannot be"):
        EvaluationCallback("Pendulum-v1", every=0)
    with pytest.raises(SystemExit):
        main(["report", "--out", str(tmp_path)])
    assert "holds no runs" in capsys.readouterr().err


def test_every_algorithm_takes_a_cell() -> None:
    for algorithm in ALGORITHMS.values():
        cls, settings = algorithm.load()
        assert issubclass(cls, OffPolicyAlgorithm)
        inspect.signature(cls).bind("MlpPolicy", "Pendulum-v1", seed=0, **settings)
    assert ALGORITHMS["sac-utd"].load()[1]["gradient_steps"] == MnM("MlpPolicy", "Pendulum-v1").gradient_steps


def test_quickstart_runs(tmp_path: Path) -> None:
    quickstart = Path(__file__).parents[1] / "examples" / "quickstart.py"
    command = [sys.executable, str(quickstart), "--steps", "258"]  # the world learns from step 256 on
    output = subprocess.run(command, check=True, cwd=tmp_path, stdout=subprocess.PIPE, encoding="utf-8").stdout
    assert "mean return over 10 episodes: " in output
    for name in ("mnm.zip", "learning_curve.png"):
        assert (tmp_path / "quickstart" / name).stat().st_size > 0
        assert str(tmp_path / "quickstart" / name) in output
