"""The command line of the benchmarks."""

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sb3_mismatch.benchmarks.cells import Cell, parse_setting, prepare
from sb3_mismatch.benchmarks.launchers import LAUNCHERS, Resources
from sb3_mismatch.benchmarks.tables import ALGORITHMS, SUITES


def positive(text: str) -> int:
    """A whole number, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1: give 1 or more")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sb3_mismatch.benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("learn", help="train every environment of a suite with every algorithm and seed")
    learn.add_argument("--suite", required=True, choices=SUITES)
    learn.add_argument("--envs", nargs="+", help="only these environments of the suite")
    learn.add_argument("--algos", nargs="+", required=True, choices=ALGORITHMS)
    learn.add_argument("--seeds", nargs="+", type=int, default=[0])
    learn.add_argument("--set", nargs="+", default=[], metavar="NAME=LITERAL", help="constructor arguments")
    learn.add_argument("--label", help="name of the algorithm with these arguments, in files and tables")
    learn.add_argument("--launcher", choices=LAUNCHERS, default="processes", help="processes here, or a Ray cluster")
    learn.add_argument(
        "--jobs", type=positive, help="runs at a time; default: 1, or as many as the cluster has room for"
    )
    learn.add_argument("--threads", type=positive, default=1, help="torch threads of each run")
    learn.add_argument("--gpus", type=float, default=0.0, help="GPUs of each run on a cluster, or a share of one")
    learn.add_argument("--checkpoint-every", type=positive, help="steps; default: 2,000, or a twentieth of the budget")
    learn.add_argument("--out", type=Path, required=True)
    report = commands.add_parser("report", help="write report.md and curves.png into a folder of finished runs")
    report.add_argument("--out", type=Path, required=True)
    report.add_argument("--baseline", default="sac", help="label whose final return is to be reached; default: sac")
    speed = commands.add_parser("speed", help="measure what ours costs beside SB3, SBX and mbrl-lib")
    speed.add_argument("--quick", action="store_true", help="steps, ensemble and imagination alone, in fewer turns")
    speed.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="torch threads; default: all CPUs")
    speed.add_argument("--env-steps", type=int, help="environment steps of the whole runs; default: 500, 0 for none")
    speed.add_argument("--skip", nargs="+", default=[], choices=("growth", "starts"), help="what not to measure")
    speed.add_argument("--device", default="cpu", help="torch device; default: cpu")
    speed.add_argument("--peer-python", nargs="+", default=[], metavar="PATH", help="interpreters that hold peers")
    speed.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    memory = commands.add_parser("memory", help="measure the resident memory of a long run of MnM on Pendulum-v1")
    memory.add_argument("--steps", type=positive, default=30_000)
    memory.add_argument("--every", type=positive, default=1_000, help="steps between two measurements")
    memory.add_argument("--buffer-size", type=positive, default=10_000)
    memory.add_argument("--out", type=Path, default=Path("memory"))
    return parser


def asked_cells(args: argparse.Namespace) -> list[Cell]:
    """The cells of the arguments of ``learn``, seed by seed. Raises ValueError where the arguments do not fit."""
    tasks = SUITES[args.suite]
    names = [task.env for task in tasks]
    unknown = set(args.envs or ()).difference(names)
    if unknown:
        raise ValueError(f"--envs {' '.join(sorted(unknown))}: suite {args.suite} holds {', '.join(names)}")
    if bool(args.set) != bool(args.label) or (args.label and len(args.algos) != 1):
        raise ValueError("--set and --label go together, with one algorithm: the label names its row in the tables")
    if args.label and (args.label in ALGORITHMS or not re.fullmatch(r"\w[\w.+-]*", args.label)):
        raise ValueError(f"--label {args.label} must be a new name of letters, digits, '.', '_', '+' and '-'")
    for setting in args.set:
        parse_setting(setting)
    cells = [
        Cell(task.env, task.steps, task.eval_every, algorithm, args.label or algorithm, seed, tuple(args.set))
        for seed in dict.fromkeys(args.seeds)
        for task in tasks
        for algorithm in dict.fromkeys(args.algos)
        if (args.envs is None or task.env in args.envs) and (task.seeds is None or seed in task.seeds)
    ]
    if not cells:
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))} are none of the seeds of these environments: use 0")
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything asked for is there, 1 when a run failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "report":
            from sb3_mismatch.benchmarks.report import write_report

            print(*write_report(args.out, args.baseline), sep="\n")
            return 0
        if args.command == "speed":
            from sb3_mismatch.benchmarks import speed

            plan = speed.QUICK if args.quick else speed.Plan()
            plan = plan if args.env_steps is None else replace(plan, env_steps=args.env_steps)
            plan = replace(plan, **dict.fromkeys(args.skip, False))
            print(speed.measure(plan, args.threads, args.peer_python, args.out, args.device))
            return 0
        if args.command == "memory":
            from sb3_mismatch.benchmarks import memory

            return 0 if memory.report(memory.measure(args.steps, args.every, args.buffer_size, args.out)) else 1
        cells = asked_cells(args)
        unfinished = prepare(cells, args.out, "python -m sb3_mismatch.benchmarks " + shlex.join(argv))
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(cells)} runs, {len(cells) - len(unfinished)} of them finished before", flush=True)
    resources = Resources(args.jobs, args.threads, args.checkpoint_every, args.gpus)
    failed = LAUNCHERS[args.launcher](unfinished, args.out, resources)
    for cell in failed:
        print(f"failed: {cell}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that the runs end with their parent.
    sys.exit(main())
