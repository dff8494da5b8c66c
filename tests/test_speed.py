"""The speed command: contestants do what they are asked, and the page says what was measured."""

import json
import subprocess
import sys

import pytest

from sb3_mismatch.benchmarks import contestants, speed
from sb3_mismatch.benchmarks.__main__ import main, make_parser
from sb3_mismatch.benchmarks.contestants import CONTESTANTS, DEFAULTS, PHASES, measured
from sb3_mismatch.benchmarks.speed import TITLES, Contestant, Plan, Speed, add_ratios, comparison, report

SMALL = {
    "obs_dim": 3,
    "action_dim": 1,
    "batch_size": 8,
    "hidden": 8,
    "members": 3,
    "elites": 2,
    "layers": 1,
    "width": 8,
    "rows": 50,
    "buffer_size": 300,
    "gradient_steps": 1,
}
PEERS = {"sbx", "mbrl_ensemble", "mbrl_imagination"}


@pytest.mark.parametrize("name", sorted(set(CONTESTANTS) - PEERS - {"compiled"}))
def test_contestants_work(name, monkeypatch):
    from sb3_mismatch import MnM
    from sb3_mismatch.fast_sac import FastSAC

    # What mnm_run times is put back.
    for owner, method in (
        (FastSAC, "train"),
        *((MnM, m) for m in ("_fit_dynamics", "_fit_classifier", "_imagine", "collect_rollouts")),
    ):
        monkeypatch.setattr(owner, method, getattr(owner, method))
    answer = measured(CONTESTANTS[name]({**DEFAULTS, **SMALL}), 2)
    assert answer["seconds"] > 0
    assert answer["cpu_seconds"] > 0
    assert answer["peak_mb"] > 10


@pytest.mark.parametrize("name", sorted(PEERS))
def test_peers_work_where_they_are_installed(name):
    pytest.importorskip({"sbx": "sbx"}.get(name, "mbrl"))
    assert measured(CONTESTANTS[name]({**DEFAULTS, **SMALL}), 2)["seconds"] > 0


def test_phases_are_those_of_the_measured_work(monkeypatch):
    monkeypatch.setitem(PHASES, "update", 5.0)
    timed = contestants._timed(lambda: None, "update")
    answer = measured(lambda n: [timed() for _ in range(n)], 3)
    assert 0 < answer["phases"]["update"] < 1


def test_a_contestant_is_a_process_that_takes_turns():
    contestant = Contestant("products", sys.executable, 1, SMALL)
    assert contestant.start_seconds > contestant.first["seconds"] > 0
    rows = speed.taking_turns([contestant], 3, 4)
    contestant.close()
    assert len(rows["products"]["ms"]) == 3
    assert rows["products"]["median_ms"] == sorted(rows["products"]["ms"])[1]
    assert contestant._process.returncode == 0


def test_what_ends_a_contestant_is_told():
    with pytest.raises(RuntimeError, match="nobody ended: KeyError: 'nobody'"):
        Contestant("nobody", sys.executable, 1)


def test_ratios_are_medians_of_turns():
    rows = {
        "sac": {"ms": [10.0, 20.0, 30.0], "median_cpu_ms": 8.0},
        "fast": {"ms": [9.0, 10.0, 3.0], "median_cpu_ms": 2.0},
    }
    add_ratios(rows, "sac")
    assert rows["fast"]["ratio"] == pytest.approx(0.5)
    assert rows["fast"]["cpu_ratio"] == pytest.approx(0.25)
    assert rows["sac"]["ratio"] == 1


def test_peers_that_are_nowhere_are_named(monkeypatch):
    monkeypatch.setitem(speed.LIBRARIES, "tqc", "no_such_library")
    measure = Speed(Plan(), 1, (sys.executable,))
    assert measure.start(["tqc"]) == []
    assert measure.results["absent"] == ["sb3-contrib TQC"]


def test_a_peer_is_found_in_another_interpreter(monkeypatch):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda _: None)
    measure = Speed(Plan(), 1, ("first", "second", sys.executable))
    asked = []

    def run(command, check):
        asked.append(command[0])
        return subprocess.CompletedProcess(command, 0 if command[0] == sys.executable else 1)

    monkeypatch.setattr(speed.subprocess, "run", run)
    assert measure._python("torch") == sys.executable
    assert asked == ["second", sys.executable]


def row(ms, **more):
    return {"ms": [ms], "median_ms": ms, "median_cpu_ms": 2 * ms, "peak_mb": 300.0, **more}


def results():
    steps = {
        "sac": row(16.0, ratio=1.0, cpu_ratio=1.0),
        "compiled": row(8.0, ratio=0.5, cpu_ratio=0.6),
        "products": row(4.0),
    }
    return {
        "machine": {"cpus": 2, "processor": "x", "threads": 1, "load": 0.5, "gpu": None}
        | dict.fromkeys(("python", "torch", "stable-baselines3"), "1"),
        "gradient step": steps,
        "training step of the ensemble": {"ensemble": row(20.0), "ensemble_products": row(10.0)},
        "10,000 imagined transitions": {"imagination": row(50.0)},
        "absent": ["SBX SAC (JAX)"],
        "start": {"SB3 SAC": {"seconds": 2.0, "first_step_seconds": 0.1}},
        "memory": {"MnM": 500.0},
        "whole runs": {
            "rows_run": {
                "env_steps": 250,
                "gradient_steps": 20,
                "seconds": {"sac_run": 80.0, "rows_run": 40.0},
                "ratio": 0.5,
                "outside the update": 0.2,
                "phases": {"update": 32.0, "other": 8.0},
            }
        },
        "growth": {"obs_dim 4": {"ms": 12.0, "phases": {"update": 9.0}}},
    }


def test_page():
    page = report(results(), "python -m sb3_mismatch.benchmarks speed")
    assert "| FastSAC, compiled | 8.0 | 16.0 | 0.50 | 0.60 | 50% | 300 |" in page
    assert "| Dynamics, layer_norm=False | 20.0 | 40.0 |  |  | 50% | 300 |" in page
    assert "Not measured: SBX SAC (JAX)." in page
    assert "gradient_steps=20: 40 s, SB3's SAC 80 s, ratio 0.50; 20% of MnM's seconds lie outside the update." in page
    assert "| update | 32.0 | 80% |" in page
    assert "| obs_dim 4 | 12.0 | 9.0 | 0.0 | 0.0 | 0.0 | 0.0 |" in page
    assert page.count("; on the CPU.") == 1
    on_gpu = results()
    on_gpu["machine"]["gpu"] = "NVIDIA H100"
    assert "; on NVIDIA H100." in report(on_gpu, "python -m sb3_mismatch.benchmarks speed")


def test_comparison_without_a_floor():
    page = comparison({"imagination": row(50.0)}, None)
    assert "| Dynamics.sample, layer_norm=False | 50.0 | 100.0 |  |  |  | 300 |" in page


def test_every_contestant_has_a_title():
    assert set(TITLES) == set(CONTESTANTS)


def test_command(monkeypatch, tmp_path, capsys):
    asked = []
    out = tmp_path / "results" / "speed"

    def parts(self):
        asked.append((self.plan, self.threads, self.pythons, self.device))
        for name in ("gradient step", "growth"):
            yield lambda name=name: self.results.update({name: results()[name]})
        assert "| obs_dim 4 |" in out.with_suffix(".md").read_text(encoding="utf-8")

    monkeypatch.setattr(Speed, "parts", parts)
    assert main(["speed", "--quick", "--threads", "1", "--peer-python", "there", "--out", str(out)]) == 0
    assert asked == [(speed.QUICK, 1, (sys.executable, "there"), "cpu")]
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert "Written by `python -m sb3_mismatch.benchmarks speed --quick --env-steps 0 --threads 1 --device cpu`" in page
    assert "peer-python" not in page
    assert json.loads(out.with_suffix(".json").read_text())["gradient step"]["sac"]["ms"] == [16.0]
    assert make_parser().parse_args(["speed"]).threads >= 1


@pytest.mark.parametrize(
    "options",
    ["--quick --env-steps 0", "--quick --env-steps 250", "--env-steps 9", "--env-steps 9 --skip growth starts"],
)
def test_a_plan_tells_the_options_that_make_it(options, monkeypatch):
    asked = []
    monkeypatch.setattr(Speed, "parts", lambda self: [lambda: asked.append(self.plan.options)])
    monkeypatch.setattr(speed, "report", lambda results, command: command)
    assert main(["speed", *options.split()]) == 0
    assert asked == [options]


def test_contestants_are_on_the_device(monkeypatch):
    settings = []
    monkeypatch.setattr(speed, "Contestant", lambda *args: settings.append(args[3]))
    Speed(Plan(), 1, device="cuda").start(["sac"], {"env": "HalfCheetah-v5"})
    assert settings == [{"device": "cuda", "env": "HalfCheetah-v5"}]


def test_the_processor_is_named():
    told = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
    assert speed.processor_name(told) == "AMD EPYC, family 25, model 17"
    assert speed.processor_name("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD") == (
        "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD"
    )
    assert speed.processor_name(" ") == ""
