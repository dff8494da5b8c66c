"""The benchmark harness: its callback beside a learner, and its command line on runs of 300 steps."""

import csv
import inspect
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import mortal
import numpy as np
import pytest
import torch as th
from agents import assert_same, soon, world_settings
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_mismatch import MnM
from sb3_mismatch.benchmarks import evaluation
from sb3_mismatch.benchmarks.__main__ import main
from sb3_mismatch.benchmarks.cells import Cell, prepare
from sb3_mismatch.benchmarks.checkpoints import ROWS, read_checkpoint, write_checkpoint
from sb3_mismatch.benchmarks.environments import make_environment
from sb3_mismatch.benchmarks.evaluation import EvaluationCallback, global_randomness_kept, kept
from sb3_mismatch.benchmarks.launchers import LAUNCHERS, Resources
from sb3_mismatch.benchmarks.report import (
    Run,
    environment_section,
    grouped,
    normalised,
    overview_section,
    reached_cells,
)
from sb3_mismatch.benchmarks.running import EVALUATION_SEED, run
from sb3_mismatch.benchmarks.statistics import over_seeds, over_seeds_and_environments
from sb3_mismatch.benchmarks.tables import ALGORITHMS, SOLVED, SUITES

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
    assert callback.rows[-1][2:] == (2.0, 1.0, 1.0)


def test_learn_twice_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = ["learning_starts=250", "--label", "small"]
    learn = [*LEARN, *label, "--out", str(tmp_path), "--seeds", "0", "1", "--jobs", "2"]
    subprocess.run([*COMMAND, *learn], check=True)
    folder = tmp_path / "Pendulum-v1" / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["seed0.csv", "seed0.json", "seed1.csv", "seed1.json"]
    head, *rows = read(folder / "seed0.csv")
    assert head == ["steps", "seconds", "mean", "std", "kept"]
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
    assert main(["report", "--out", str(tmp_path), "--baseline", "small"]) == 0
    report = (tmp_path / "report.md").read_text()
    assert f"| small | 1 | {float(rows[-1][2]):,.1f} | " in report
    assert "| small | `sac`, `policy_kwargs={'net_arch': [16]}`, `learning_starts=250` | " in report
    assert "| steps to small's final | seconds to it |" in report
    assert "- Pendulum-v1 small seed 1: stands at 300 of 300 steps" in report
    assert "--suite smoke --algos sac" in report
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# -- interruptions --


def mortal_cell(algorithm: str = "sac", seed: int = 0, **settings: Any) -> Cell:
    """400 steps of an environment in which the 250th is the last of the run's process."""
    few = {
        "gradient_steps": 1,
        "learning_starts": 60,
        "batch_size": 16,
        "buffer_size": 1000,
        "policy_kwargs": {"net_arch": [8]},
    }
    texts = tuple(f"{name}={value!r}" for name, value in {**few, **settings}.items())
    return Cell("mortal:Mortal-v0", 400, 100, algorithm, algorithm, seed, texts)


def interrupted(cell: Cell, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a cell up to its 250th step in this process, with a checkpoint at the 200th."""
    monkeypatch.setenv(mortal.MARKER, str(out / "died"))
    monkeypatch.setenv(mortal.HOME, str(os.getpid()))
    prepare([cell], out, "command")
    with pytest.raises(mortal.Interruption):
        run(cell, out, 1, checkpoint_every=100)


def evaluations(cell: Cell, out: Path, suffix: str = ".csv") -> list[list[str]]:
    """The cell's rows, without their seconds."""
    return [[value for name, value in row.items() if name != "seconds"] for row in rows_by_name(cell.file(out, suffix))]


def rows_by_name(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = mortal_cell()
    interrupted(cell, tmp_path, monkeypatch)
    before = rows_by_name(cell.file(tmp_path, ".partial.csv"))
    assert [row["steps"] for row in before] == ["100", "200"]
    # A row behind the checkpoint, as of a run that was interrupted later, and one cut short by the interruption.
    with cell.file(tmp_path, ".partial.csv").open("a") as file:
        file.write("300,9.0,-1.0,0.0,1.0\n40")
    assert prepare([cell], tmp_path, "another command") == [cell]
    run(cell, tmp_path, 1)
    rows = rows_by_name(cell.file(tmp_path, ".csv"))
    assert [row["steps"] for row in rows] == ["100", "200", "300", "400"]
    assert rows[:2] == before
    assert float(before[1]["seconds"]) < float(rows[2]["seconds"]) < float(rows[3]["seconds"])
    assert rows[2]["mean"] != "-1.0"
    record = json.loads(cell.file(tmp_path, ".json").read_text())
    assert record["command"] == "command"
    assert [again["steps"] for again in record["resumed"]] == [200]
    assert sorted(path.name for path in cell.file(tmp_path, ".csv").parent.iterdir()) == ["seed0.csv", "seed0.json"]
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert (
        "continued from a checkpoint: mortal:Mortal-v0 sac seed 0 at 200 steps." in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize("algorithm", ["sac", "tqc", "crossq"])
@pytest.mark.parametrize("buffer_size", [1000, 80])
def test_checkpoints_hold_the_baselines(algorithm: str, buffer_size: int, tmp_path: Path) -> None:
    cls, _ = ALGORITHMS[algorithm].load()
    settings = {"buffer_size": buffer_size, "learning_starts": 50, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    model = cls("MlpPolicy", "Pendulum-v1", seed=3, device="cpu", **settings).learn(100)
    (tmp_path / "unfinished").mkdir()  # Left by a run that died while it wrote.
    assert read_checkpoint(cls, gym.make("Pendulum-v1"), tmp_path) is None
    for steps in (9, 100):  # The second takes the place of the first.
        model.num_timesteps = steps
        write_checkpoint(model, tmp_path, 1.5)
    assert [path.name for path in tmp_path.iterdir()] == ["step100"]
    again, seconds = read_checkpoint(cls, gym.make("Pendulum-v1"), tmp_path, "cpu")
    assert (seconds, again.num_timesteps, again._n_updates) == (1.5, 100, model._n_updates)
    assert_same(again.get_parameters(), model.get_parameters())
    for name in ("pos", "full", *ROWS):
        np.testing.assert_array_equal(getattr(again.replay_buffer, name), getattr(model.replay_buffer, name))


def test_our_runs_go_on_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soon(monkeypatch)
    cell = mortal_cell("mnm", **world_settings())
    interrupted(cell, tmp_path, monkeypatch)
    run(cell, tmp_path, 1)
    whole = tmp_path / "whole"
    prepare([cell], whole, "command")  # Nobody dies a second time.
    run(cell, whole, 1)
    assert evaluations(cell, tmp_path) == evaluations(cell, whole)
    assert len({row[1] for row in evaluations(cell, whole)}) == 4
    assert json.loads(cell.file(tmp_path, ".json").read_text())["resumed"][0]["steps"] == 200


@pytest.fixture
def dies_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The first worker that takes 250 steps is killed; the file tells that it was."""
    monkeypatch.setenv(mortal.MARKER, str(tmp_path / "died"))
    return tmp_path / "died"


@pytest.fixture
def ray_node(dies_once: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray node of one processor on this machine, which inherits the environment of now."""
    ray = pytest.importorskip("ray")
    for name, value in {
        "RAY_AUTH_MODE": "disabled",  # It would write a token into the home folder.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Its future default, about which it warns.
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(mortal.__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        try:
            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
            break
        except Exception as error:
            # A part of Ray waits 15 seconds for another to start, whatever else the machine has to do.
            if "timed out during startup" not in str(error):
                raise
    else:
        pytest.skip("this machine is too busy for Ray to start in the time it gives itself")
    yield
    ray.shutdown()


def assert_one_restart(launcher: str, out: Path, jobs: int) -> None:
    """Two cells, of which one loses its worker: it goes on from step 200, and the other knows nothing of it."""
    cells = [mortal_cell(seed=0), mortal_cell(seed=1)]
    prepare(cells, out, "command")
    assert LAUNCHERS[launcher](cells, out, Resources(jobs=jobs, checkpoint_every=100)) == []
    resumed = []
    for cell in cells:
        assert [row[0] for row in evaluations(cell, out)] == ["100", "200", "300", "400"]
        record = json.loads(cell.file(out, ".json").read_text())
        resumed += [again["steps"] for again in record.get("resumed", [])]
    assert resumed == [200]


def test_a_dead_process_costs_its_cell_a_restart_from_its_checkpoint(tmp_path: Path, dies_once: Path) -> None:
    assert_one_restart("processes", tmp_path, jobs=2)
    assert dies_once.exists()


# Of the parts of a node that did not start in time, Python complains when it finds them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("ray_node")
def test_a_dead_worker_of_ray_costs_its_cell_a_restart_from_its_checkpoint(tmp_path: Path, dies_once: Path) -> None:
    assert_one_restart("ray", tmp_path, jobs=1)
    assert dies_once.exists()


def test_runs_end_with_their_parent(tmp_path: Path) -> None:
    learn = [*LEARN, "--label", "small", "--out", str(tmp_path)]
    partial = tmp_path / "Pendulum-v1" / "small" / "seed0.partial.csv"
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
    assert read(partial) == kept
    assert not partial.with_name("seed0.csv").exists()


def test_a_failed_run_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "smoke", "--algos", "sac", "--set", "no_such=1", "--label", "wrong", "--out", str(tmp_path)]
    assert main(["learn", *arguments]) == 1
    error = capfd.readouterr().err
    assert error.count("unexpected keyword argument 'no_such'") == 1  # No worker died: there is no second try.
    assert error.endswith("failed: Pendulum-v1 wrong seed 0\n")
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert "wrong seed 0: stands at 0 of 300 steps" in (tmp_path / "report.md").read_text()


def test_a_label_keeps_its_settings(tmp_path: Path) -> None:
    cell = Cell("Pendulum-v1", 300, 100, "sac", "small", seed=0, settings=("gamma=0.9",))
    assert prepare([cell], tmp_path, "first") == [cell]
    other = Cell("Pendulum-v1", 300, 100, "sac", "small", seed=1, settings=("gamma=0.8",))
    with pytest.raises(ValueError, match="use another --label or --out"):
        prepare([other], tmp_path, "second")


# -- reports --


def run_of(rows: Sequence[Sequence[float]], label: str = "sac", seed: int = 0, env: str = "Pendulum-v1") -> Run:
    """A finished run whose rows are environment steps, seconds and means."""
    array = np.array([[*row, 0.0] for row in rows], dtype=float)
    return Run(Cell(env, 400, 100, "sac", label, seed), {}, array, finished=True)


def test_scores_by_hand() -> None:
    run = run_of([(100, 1, 0), (200, 2, 8), (400, 5, 6)])
    # final, best, area, drop, seconds
    np.testing.assert_allclose(run.scores, (6, 8, (100 * 4 + 200 * 7) / 300, 0.25, 5))
    assert run.reaches(6) == (200, 2)
    assert run.reaches(9) is None
    late = run_of([(100, 1, 8), (790, 2, 0), (810, 3, 4), (1000, 4, 12)])
    assert late.drop == 0.5  # Of what was best then; what was before the last fifth does not count.


def test_kept_by_hand() -> None:
    pairs = [(6, 8), (9, 8), (-1, 8), (-300, -150), (-5, 0), (0, 0), (0, -1)]
    assert [kept(current, best) for current, best in pairs] == [0.75, 1, 0, 0.5, 0, 1, 1]


def test_intervals_by_hand() -> None:
    scores = np.array([[100.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0], [-100.0, 1.0]])
    interval = over_seeds(scores)
    np.testing.assert_allclose(interval.point, (3, 1))  # Without the lowest and the highest of five.
    assert -100 <= interval.low[0] < 3 < interval.high[0] <= 100
    assert interval.low[1] == interval.high[1] == 1
    # Two equal halves: a draw of two seeds holds one half alone in one case of two, so both ends are met.
    half = over_seeds(np.array([[0.0], [1.0]]))
    assert (half.point[0], half.low[0], half.high[0]) == (0.5, 0, 1)
    assert over_seeds_and_environments(np.full((3, 2), 0.5)) == (0.5, 0.5, 0.5)


def test_the_same_scores_have_the_same_intervals() -> None:
    """And what others draw from NumPy's global generator stays as it is."""
    scores = np.random.default_rng(0).normal(size=(5, 2))
    np.random.seed(1)
    expected = np.random.rand(3)
    np.random.seed(1)
    drawn, intervals = [], []
    for _ in range(3):
        drawn.append(np.random.rand())
        intervals.append(over_seeds(scores))
    np.testing.assert_array_equal(drawn, expected)
    for interval in intervals[1:]:
        np.testing.assert_array_equal(interval, intervals[0])


def test_tables_by_hand() -> None:
    slow = [run_of([(100, 10, 0), (400, 40, value)], "sac", seed) for seed, value in enumerate((40, 60))]
    fast = [run_of([(100, 15, 50), (400, 60, 100)], "mnm", 0), run_of([(100, 15, 0), (400, 60, 20)], "mnm", 1)]
    assert reached_cells(fast, slow) == ["100 (1 of 2 seeds)", "15.0 (x 0.38) (1 of 2 seeds)"]
    assert reached_cells(fast[1:], slow) == ["never", "never"]
    other = [run_of([(100, 1, 0), (400, 2, value)], label, 0, "Hopper-v5") for label, value in (("mnm", 9), ("sac", 5))]
    alone = run_of([(100, 1, 0), (400, 2, 7)], "extra", 0, "Hopper-v5")
    groups = grouped([*slow, *fast, *other, alone])
    # Seed 0 alone is in both: 100 of 20 to 100, and 9 of 5 to 9.
    np.testing.assert_allclose(normalised(groups, "mnm"), [[1, 1]])
    np.testing.assert_allclose(normalised(groups, "sac"), [[0.25, 0]])
    overview = overview_section(groups)
    assert "| mnm | `sac` | 60.0 [20.0, 100.0] | 9.0 | 1.00 |" in overview
    assert "| extra | `sac` | – | 7.0 | – |" in overview


def test_solved_seeds_are_counted() -> None:
    runs = [
        run_of([(100, 1, 0), (400, 2, value)], "sac", seed, "MountainCarContinuous-v0")
        for seed, value in enumerate((95, 89))
    ]
    section = environment_section(grouped(runs)["MountainCarContinuous-v0"], "none")
    assert "ends at 90 or more |" in section
    assert "| 1 of 2 |" in section


# -- what can be run --


@pytest.mark.parametrize("suite", SUITES)
def test_every_environment_of_a_suite_steps(suite: str) -> None:
    for task in SUITES[suite]:
        env = make_environment(task.env)
        assert isinstance(env.observation_space, gym.spaces.Box)
        assert len(env.observation_space.shape) == 1
        observation, _ = env.reset(seed=0)
        env.action_space.seed(0)
        for _ in range(3):
            observation, reward, terminated, _, _ = env.step(env.action_space.sample())
            assert env.observation_space.contains(observation)
            assert np.isfinite(float(reward))
            assert not terminated
        env.close()
        assert task.steps % task.eval_every == 0


def test_solved_environments_are_those_of_a_suite() -> None:
    assert SOLVED.keys() <= {task.env for tasks in SUITES.values() for task in tasks}


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
