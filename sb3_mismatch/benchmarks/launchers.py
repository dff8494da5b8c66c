"""Who runs the cells: processes of this machine, or a Ray cluster.

Either way a worker that dies (killed, out of memory, its machine gone) is replaced up to ``RESTARTS`` times for each
cell, and the cell goes on from its checkpoint. An exception in a run is no such death: the run has failed.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from sb3_mismatch.benchmarks.cells import Cell
from sb3_mismatch.benchmarks.running import run

RESTARTS = 3


class Resources(NamedTuple):
    """
    :param jobs: cells at a time; ``None``: one in processes, as many as there is room for on a cluster
    :param threads: torch threads of each
    :param checkpoint_every: environment steps between two checkpoints; ``None``: as many as suit the cell
    :param gpus: GPUs of each, or a share of one, reserved on a cluster
    """

    jobs: int | None = None
    threads: int = 1
    checkpoint_every: int | None = None
    gpus: float = 0.0


Launcher = Callable[[Sequence[Cell], Path, Resources], list[Cell]]


def launch_processes(cells: Sequence[Cell], out: Path, resources: Resources) -> list[Cell]:
    """Run each cell in a process of its own, and return the cells that failed."""
    os.environ["OMP_NUM_THREADS"] = str(resources.threads)  # The processes inherit it.
    context = multiprocessing.get_context("spawn")
    waiting, failed = list(cells), []
    restarts = dict.fromkeys(cells, 0)
    running: dict[Any, tuple[Cell, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (resources.jobs or 1):
                cell = waiting.pop(0)
                arguments = (cell, out, resources.threads, resources.checkpoint_every)
                process = context.Process(target=run, args=arguments, name=str(cell))
                process.start()
                running[process.sentinel] = (cell, process)
            for sentinel in wait(list(running)):
                cell, process = running.pop(sentinel)
                process.join()
                state = "done" if process.exitcode == 0 else f"failed with exit status {process.exitcode}"
                if process.exitcode < 0 and restarts[cell] < RESTARTS:
                    restarts[cell] += 1
                    waiting.insert(0, cell)
                    state = f"its worker died of signal {-process.exitcode} and is replaced"
                elif process.exitcode != 0:
                    failed.append(cell)
                print(f"{cell}: {state}, {len(waiting) + len(running)} to go", flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return failed


def launch_ray(cells: Sequence[Cell], out: Path, resources: Resources) -> list[Cell]:
    """
    Run each cell as a task of the Ray cluster at ``RAY_ADDRESS``, of one started on this machine where there is none,
    and return the cells that failed. ``out`` must be one folder for all machines: a network file system.
    """
    import ray

    if not ray.is_initialized():
        ray.init()
    task: Any = ray.remote(max_retries=RESTARTS, num_cpus=resources.threads, num_gpus=resources.gpus)(run)
    waiting, failed = list(cells), []
    running: dict[Any, Cell] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (resources.jobs or len(cells)):
                cell = waiting.pop(0)
                arguments = (cell, out.resolve(), resources.threads, resources.checkpoint_every)
                running[task.options(name=str(cell)).remote(*arguments)] = cell
            done, _ = ray.wait(list(running))
            cell = running.pop(done[0])
            state = "done"
            try:
                ray.get(done[0])
            except ray.exceptions.RayError as error:
                failed.append(cell)
                state = f"failed: {error}"
            print(f"{cell}: {state}, {len(waiting) + len(running)} to go", flush=True)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return failed


LAUNCHERS: dict[str, Launcher] = {"processes": launch_processes, "ray": launch_ray}
