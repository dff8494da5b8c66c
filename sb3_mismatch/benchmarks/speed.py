"""``python -m sb3_mismatch.benchmarks speed``: what ours costs beside its peers, measured in turns."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch as th

from sb3_mismatch.benchmarks import contestants
from sb3_mismatch.products import processor

SCRIPT = Path(contestants.__file__)
#: the library that a peer needs
LIBRARIES = {
    "tqc": "sb3_contrib",
    "crossq": "sb3_contrib",
    "sbx": "sbx",
    "mbrl_ensemble": "mbrl",
    "mbrl_imagination": "mbrl",
}
TITLES = {
    "sac": "SB3 SAC",
    "tqc": "sb3-contrib TQC",
    "crossq": "sb3-contrib CrossQ",
    "sbx": "SBX SAC (JAX)",
    "fast": "FastSAC, plain",
    "compiled": "FastSAC, compiled",
    "products": "matrix products alone",
    "ensemble": "Dynamics, layer_norm=False",
    "mbrl_ensemble": "mbrl-lib",
    "ensemble_products": "matrix products alone",
    "imagination": "Dynamics.sample, layer_norm=False",
    "mbrl_imagination": "mbrl-lib ModelEnv.step",
    "sac_run": "SB3 SAC",
    "mnm_run": "MnM",
    "rows_run": "MnM, expansion=0",
}


@dataclass(frozen=True)
class Plan:
    """
    How much is measured.

    :param rounds: turns of each contestant
    :param units: gradient steps, or training steps of the ensemble, of a turn
    :param env_steps: environment steps of the whole runs; none: they are left out
    :param growth: whether cost over sizes is measured
    :param starts: whether start-up and memory are measured
    """

    rounds: int = 7
    units: int = 50
    env_steps: int = 500
    growth: bool = True
    starts: bool = True

    @property
    def options(self) -> str:
        """The options of the command that make this plan."""
        if replace(self, env_steps=0) == QUICK:
            return f"--quick --env-steps {self.env_steps}"
        skipped = [part for part in ("growth", "starts") if not getattr(self, part)]
        return " ".join([f"--env-steps {self.env_steps}", *(["--skip", *skipped] if skipped else [])])


QUICK = Plan(rounds=3, units=20, env_steps=0, growth=False, starts=False)


class Contestant:
    """A process that does units of work when asked; its first one is done when it is here."""

    def __init__(
        self,
        name: str,
        python: str,
        threads: int,
        settings: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        start = time.perf_counter()
        own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TF_CPP_MIN_LOG_LEVEL": "3"}
        flags = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(SCRIPT), name, json.dumps(dict(settings or {}))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **own, "XLA_FLAGS": flags, **(environ or {})},
        )
        self.name = name
        self.first = self._answer()
        self.start_seconds = time.perf_counter() - start

    def work(self, n: int) -> dict[str, Any]:
        """What ``n`` units took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{n}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            told = self._process.communicate()[1].strip().splitlines()
            raise RuntimeError(f"{self.name} ended: {told[-1] if told else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def taking_turns(contestants: Sequence[Contestant], rounds: int, units: int) -> dict[str, dict[str, Any]]:
    """Each does ``units`` of work, one after the other, ``rounds`` times: what one unit took, in medians."""
    answers: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    # JAX compiles for the number of steps; caches fill.
    for contestant in contestants:
        contestant.work(units)
    for _ in range(rounds):
        for contestant in contestants:
            answers[contestant.name].append(contestant.work(units))
    return {
        name: {
            "ms": [1e3 * answer["seconds"] / units for answer in turns],
            "median_ms": median(1e3 * answer["seconds"] / units for answer in turns),
            "median_cpu_ms": median(1e3 * answer["cpu_seconds"] / units for answer in turns),
            "peak_mb": turns[-1]["peak_mb"],
        }
        for name, turns in answers.items()
    }


def add_ratios(results: dict[str, dict[str, Any]], base: str) -> None:
    """The median of the ratios to ``base`` turn by turn: what loads the machine loads both."""
    for row in results.values():
        row["ratio"] = median(x / y for x, y in zip(row["ms"], results[base]["ms"], strict=True))
        row["cpu_ratio"] = row["median_cpu_ms"] / results[base]["median_cpu_ms"]


@dataclass
class Speed:
    """
    Measures and remembers.

    :param pythons: interpreters in which peers are looked for, this one first
    :param device: of torch, in each contestant
    """

    plan: Plan
    threads: int
    pythons: Sequence[str] = (sys.executable,)
    device: str = "cpu"
    results: dict[str, Any] = field(default_factory=dict)

    def start(self, names: Sequence[str], settings: Mapping[str, Any] | None = None) -> list[Contestant]:
        """Those of the contestants whose library is there."""
        started = []
        for name in names:
            python = self._python(LIBRARIES.get(name))
            if python is None:
                self.results.setdefault("absent", []).append(TITLES[name])
                continue
            try:
                started.append(self.contestant(name, python, settings))
            except RuntimeError as error:
                self.results.setdefault("absent", []).append(str(error))
        return started

    def contestant(
        self,
        name: str,
        python: str,
        settings: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Contestant:
        """One of them, on the device."""
        return Contestant(name, python, self.threads, {"device": self.device, **(settings or {})}, environ)

    def _python(self, library: str | None) -> str | None:
        """The first interpreter that has the library."""
        if library is None or importlib.util.find_spec(library) is not None:
            return self.pythons[0]
        find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({library!r}) is None)"
        others = (p for p in self.pythons[1:] if subprocess.run([p, "-c", find], check=False).returncode == 0)
        return next(others, None)

    def compare(self, title: str, names: Sequence[str], base: str, units: int) -> None:
        """A table of contestants and their ratio to ``base``."""
        print(f"{title} ...", flush=True)
        started = self.start(names)
        try:
            rows = taking_turns(started, self.plan.rounds, units)
        finally:
            for contestant in started:
                contestant.close()
        if base in rows:
            add_ratios(rows, base)
        self.results[title] = rows

    def starts(self) -> None:
        """Seconds from the start of a process to the end of its first gradient step, and peak memory."""
        print("start-up and memory ...", flush=True)
        rows = {}
        with tempfile.TemporaryDirectory() as cache:
            for title, name in (
                ("SB3 SAC", "sac"),
                ("FastSAC, plain", "fast"),
                ("FastSAC, compiled, cold", "compiled"),
                ("FastSAC, compiled, warm cache", "compiled"),
            ):
                environ = {"TORCHINDUCTOR_CACHE_DIR": cache}
                contestant = self.contestant(name, self.pythons[0], environ=environ)
                contestant.close()
                rows[title] = {"seconds": contestant.start_seconds, "first_step_seconds": contestant.first["seconds"]}
        self.results["start"] = rows
        settings = {"env": "HalfCheetah-v5", "buffer_size": 100_000, "gradient_steps": 1}
        memory = {}
        for name in ("sac_run", "mnm_run"):
            contestant = self.contestant(name, self.pythons[0], settings)
            memory[TITLES[name]] = contestant.work(300)["peak_mb"]
            contestant.close()
        self.results["memory"] = memory

    def whole_runs(self, ours: str, gradient_steps: int) -> None:
        """Environment steps with so many gradient steps each, in turns of one fit of the world; MnM's by phase."""
        print(f"whole runs of {TITLES[ours]} ...", flush=True)
        started = self.start(("sac_run", ours), {"env": "HalfCheetah-v5", "gradient_steps": gradient_steps})
        turns = max(self.plan.env_steps // 250, 1)
        answers: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in started}
        for _ in range(turns):
            for contestant in started:
                answers[contestant.name].append(contestant.work(250))
        for contestant in started:
            contestant.close()
        seconds = {name: sum(answer["seconds"] for answer in turns) for name, turns in answers.items()}
        phases = {
            name: sum(answer["phases"].get(name, 0.0) for answer in answers[ours])
            for name in ("update", "dynamics", "classifier", "imagination", "environment")
        }
        phases["other"] = seconds[ours] - sum(phases.values())
        self.results.setdefault("whole runs", {})[ours] = {
            "env_steps": 250 * turns,
            "gradient_steps": gradient_steps,
            "seconds": seconds,
            "ratio": seconds[ours] / seconds["sac_run"],
            "outside the update": 1 - phases["update"] / seconds[ours],
            "phases": phases,
        }

    def growth(self) -> None:
        """Milliseconds of MnM for each environment step, as one size grows and the others stay."""
        print("growth ...", flush=True)
        plain = {"gradient_steps": 1, "arguments": {"compile": False}}
        rows = {}
        for name, sizes in (
            ("obs_dim", (4, 17, 111, 348)),
            ("batch_size", (64, 256, 1024)),
            ("gradient_steps", (1, 5, 20)),
            ("n_envs", (1, 4, 16)),
        ):
            for size in sizes:
                (contestant,) = self.start(("mnm_run",), {**plain, name: size})
                n_envs = size if name == "n_envs" else 1
                # As many as lie between two fits, so that each row holds one.
                steps = -(-250 // n_envs)
                answer = contestant.work(steps)
                contestant.close()
                rows[f"{name} {size}"] = {
                    "ms": 1e3 * answer["seconds"] / (steps * n_envs),
                    "phases": {phase: 1e3 * x / (steps * n_envs) for phase, x in answer["phases"].items()},
                }
        self.results["growth"] = rows

    def parts(self) -> Iterator[Callable[[], None]]:
        """All that is planned, one after the other."""
        steps = ("sac", "fast", "compiled", "tqc", "crossq", "sbx", "products")
        yield lambda: self.compare("gradient step", steps, "sac", self.plan.units)
        ensembles = ("mbrl_ensemble", "ensemble", "ensemble_products")
        yield lambda: self.compare("training step of the ensemble", ensembles, "mbrl_ensemble", self.plan.units)
        imaginations = ("mbrl_imagination", "imagination")
        yield lambda: self.compare("10,000 imagined transitions", imaginations, "mbrl_imagination", 5)
        if self.plan.starts:
            yield self.starts
        if self.plan.env_steps:
            yield lambda: self.whole_runs("rows_run", 20)
            yield lambda: self.whole_runs("mnm_run", 1)
        if self.plan.growth:
            yield self.growth


def machine(threads: int, device: str) -> dict[str, Any]:
    """What it ran on."""
    packages = ("sb3-mismatch", "torch", "stable-baselines3", "numpy")
    return {
        "processor": processor_name(processor()) or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "device": device,
        "gpu": th.cuda.get_device_name(device) if th.device(device).type == "cuda" else None,
        "load": os.getloadavg()[0],
        "compiler": shutil.which(os.environ.get("CXX", "g++")) is not None,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def processor_name(told: str) -> str:
    """Name, family and model as Linux tells them, or what else is told, in one line."""
    lines = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", told, re.MULTILINE))
    words = {"model name": "", "cpu family": "family ", "model": "model "}
    return ", ".join(word + lines[kind] for kind, word in words.items() if kind in lines) or told.strip()


# -- the report --


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def comparison(rows: Mapping[str, Mapping[str, Any]], floor: str | None) -> str:
    """Medians, ratios, share of the floor and memory of one comparison."""

    def line(name: str, row: Mapping[str, Any]) -> list[str]:
        share = f"{rows[floor]['median_ms'] / row['median_ms']:.0%}" if floor is not None and floor in rows else ""
        ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "cpu_ratio")]
        times = [f"{row['median_ms']:.1f}", f"{row['median_cpu_ms']:.1f}"]
        return [TITLES[name], *times, *ratios, share, f"{row['peak_mb']:.0f}"]

    header = ("", "ms", "CPU ms", "ratio", "CPU ratio", "matrix products' share", "peak MB")
    return table(header, [line(name, row) for name, row in rows.items()])


def report(results: Mapping[str, Any], command: str) -> str:
    """The page."""
    on = results["machine"]
    parts = [
        "# Speed\n",
        f"Written by `{command}`. Medians of turns that the contestants took one after the other, each in a process "
        "of its own; a ratio is the median of ratios turn by turn, below 1 is faster. "
        "CPU ms are milliseconds of all threads together.\n",
        f"{on['cpus']} CPUs ({on['processor']}), {on['threads']} threads, load {on['load']:.1f} at the start; "
        f"Python {on['python']}, torch {on['torch']}, stable-baselines3 {on['stable-baselines3']}; "
        f"on {on['gpu'] or 'the CPU'}.\n",
    ]
    for title, floor in (
        ("gradient step", "products"),
        ("training step of the ensemble", "ensemble_products"),
        ("10,000 imagined transitions", None),
    ):
        if title in results:
            parts += [f"## One {title}\n" if floor else f"## {title}\n", comparison(results[title], floor)]
    if "absent" in results:
        parts.append(f"Not measured: {'; '.join(dict.fromkeys(results['absent']))}.\n")
    if "start" in results:
        rows = [
            [title, f"{row['seconds']:.1f}", f"{row['first_step_seconds']:.1f}"]
            for title, row in results["start"].items()
        ]
        parts += ["## Start-up\n", "Seconds from the start of the process to the end of the first gradient step.\n"]
        parts.append(table(("", "s", "of these the first gradient step"), rows))
        memory = [[title, f"{mb:.0f}"] for title, mb in results["memory"].items()]
        parts += ["## Peak memory\n", "HalfCheetah-v5, a replay buffer of 100,000 rows, after a round.\n"]
        parts.append(table(("", "MB"), memory))
    for ours, runs in results.get("whole runs", {}).items():
        total = runs["seconds"][ours]
        parts.append(f"## A whole run of {TITLES[ours]}\n")
        parts.append(
            f"HalfCheetah-v5, {runs['env_steps']} environment steps after warm-up, gradient_steps="
            f"{runs['gradient_steps']}: {total:.0f} s, SB3's SAC {runs['seconds']['sac_run']:.0f} s, "
            f"ratio {runs['ratio']:.2f}; {runs['outside the update']:.0%} of MnM's seconds lie outside the update.\n"
        )
        parts.append(
            table(("phase", "s", "share"), [[n, f"{x:.1f}", f"{x / total:.0%}"] for n, x in runs["phases"].items()])
        )
    if "growth" in results:
        phases = ("update", "dynamics", "classifier", "imagination", "environment")
        rows = [
            [size, f"{row['ms']:.1f}", *(f"{row['phases'].get(phase, 0.0):.1f}" for phase in phases)]
            for size, row in results["growth"].items()
        ]
        parts += ["## Growth\n", "Milliseconds of MnM for each environment step, one gradient step each, plain form.\n"]
        parts.append(table(("", "all", *phases), rows))
    return "\n".join(parts)


def measure(plan: Plan, threads: int, peers: Sequence[str], out: Path | None, device: str = "cpu") -> str:
    """
    Measure, write ``out.md`` and ``out.json`` if asked for, and return the page.

    :param threads: of torch, in each contestant
    :param peers: interpreters in which contestants are looked for that this one lacks
    :param device: of torch, in each contestant
    """
    speed = Speed(plan, threads, (sys.executable, *peers), device)
    speed.results["machine"] = machine(threads, device)
    options = f"{plan.options} --threads {threads} --device {device}"
    page = ""
    start = time.perf_counter()
    for measure_part in speed.parts():
        measure_part()
        speed.results["seconds"] = time.perf_counter() - start
        page = report(speed.results, "python -m sb3_mismatch.benchmarks speed " + options)
        # Part by part: what was measured before an interruption is there.
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.with_suffix(".md").write_text(page, encoding="utf-8")
            out.with_suffix(".json").write_text(json.dumps(speed.results, indent=2) + "\n", encoding="utf-8")
    return page
