"""
What ``python -m sb3_mismatch.benchmarks speed`` measures: one contestant a process, run by the parent in turns.

This file is run as a script, by any interpreter that holds the contestant's library: ``contestants.py NAME SETTINGS``
with the settings as JSON. It prints one line of JSON when it is ready, its first unit of work done, and one for each
line on its standard input, which says how many units of work to do.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

#: does so many units of work
Work = Callable[[int], object]

#: HalfCheetah's sizes, SB3's networks and batch, MBPO's ensemble, which as mbrl-lib's has no LayerNorm
DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "obs_dim": 17,
    "action_dim": 6,
    "batch_size": 256,
    "hidden": 256,
    "members": 7,
    "elites": 5,
    "layers": 4,
    "width": 200,
    "layer_norm": False,
    "rows": 10_000,
    "gradient_steps": 20,
    "n_envs": 1,
    "env": None,
    "buffer_size": 10_000,
    "arguments": {},
}


def sized_env(s: dict[str, Any]) -> Any:
    """An environment of the given sizes whose steps cost next to nothing."""
    import gymnasium as gym
    import numpy as np

    class Sized(gym.Env[np.ndarray, np.ndarray]):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (s["obs_dim"],), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (s["action_dim"],), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
            super().reset(seed=seed)
            return self._state(), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            return self._state(), float(action.sum()), False, False, {}

        def _state(self) -> np.ndarray:
            state: np.ndarray = self.np_random.standard_normal(s["obs_dim"], dtype=np.float32)
            return state

    return Sized()


def environment(s: dict[str, Any]) -> Any:
    """``n_envs`` of the environment that is named, or of :func:`sized_env`."""
    from stable_baselines3.common.env_util import make_vec_env

    return make_vec_env(s["env"] or (lambda: sized_env(s)), n_envs=s["n_envs"], seed=0)


def agent(kind: Any, s: dict[str, Any], **arguments: Any) -> Any:
    """An agent that has filled its replay buffer by chance and is ready to train."""
    model = kind(
        "MlpPolicy",
        environment(s),
        batch_size=s["batch_size"],
        buffer_size=s["buffer_size"],
        learning_starts=10**9,
        seed=0,
        **{"device": s["device"], **arguments, **s["arguments"]},
    )
    model.learn(min(s["buffer_size"], 2000))
    buffer = model.replay_buffer
    if s["env"] is None:
        buffer.full = True  # What is not collected is zeros, which cost the same.
    model.learning_starts = 0
    return model


# -- gradient steps --


def sac(s: dict[str, Any]) -> Work:
    from stable_baselines3 import SAC

    model = agent(SAC, s)
    return lambda n: model.train(n, s["batch_size"])


def tqc(s: dict[str, Any]) -> Work:
    from sb3_contrib import TQC

    model = agent(TQC, s)
    return lambda n: model.train(n, s["batch_size"])


def crossq(s: dict[str, Any]) -> Work:
    from sb3_contrib import CrossQ

    model = agent(CrossQ, s)
    return lambda n: model.train(n, s["batch_size"])


def sbx(s: dict[str, Any]) -> Work:
    model = agent(import_module("sbx").SAC, {**s, "arguments": {}}, policy_kwargs={"net_arch": [s["hidden"]] * 2})
    return lambda n: model.train(n, s["batch_size"])


def fast(s: dict[str, Any]) -> Work:
    from sb3_mismatch.fast_sac import FastSAC

    model = agent(FastSAC, s, compile=False)
    return lambda n: model.train(n, s["batch_size"])


def compiled(s: dict[str, Any]) -> Work:
    from sb3_mismatch.fast_sac import FastSAC

    model = agent(FastSAC, s, compile=True)
    return lambda n: model.train(n, s["batch_size"])


def products(s: dict[str, Any]) -> Work:
    """The matrix products of one gradient step of SAC alone: what no program on this machine goes below."""
    import torch as th

    n, h, o, a = s["batch_size"], s["hidden"], s["obs_dim"], s["action_dim"]

    def layer(i: int, j: int, forward: int, inputs: int, weights: int) -> list[Any]:
        """How often each product of a layer of i inputs and j outputs is needed."""
        x, w, g, b = th.randn(n, i), th.randn(j, i), th.randn(n, j), th.randn(j)
        y, gx, gw = th.empty(n, j), th.empty(n, i), th.empty(j, i)
        return [
            *[lambda: th.addmm(b, x, w.t(), out=y)] * forward,
            *[lambda: th.mm(g, w, out=gx)] * inputs,
            *[lambda: th.mm(g.t(), x, out=gw)] * weights,
        ]

    with th.device(s["device"]):
        actor = [*layer(o, h, 2, 0, 1), *layer(h, h, 2, 1, 1), *layer(h, a, 4, 2, 2)]
        critics = [*layer(o + a, h, 6, 2, 2), *layer(h, h, 6, 4, 2), *layer(h, 1, 6, 4, 2)]

    def work(steps: int) -> None:
        for _ in range(steps):
            for product in (*actor, *critics):
                product()

    return work


# -- the ensemble --


def _dynamics(s: dict[str, Any]) -> Any:
    from sb3_mismatch.dynamics import Dynamics

    net_arch = [s["width"]] * s["layers"]
    return Dynamics(s["obs_dim"], s["action_dim"], s["members"], s["elites"], net_arch, s["layer_norm"])


def ensemble(s: dict[str, Any]) -> Work:
    """Training steps of the dynamics, minibatches drawn from 10,000 rows."""
    import torch as th
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    from sb3_mismatch.fitting import training_step
    from sb3_mismatch.world import WEIGHT_DECAY

    n, members = s["rows"], s["members"]
    with th.device(s["device"]):
        dynamics = _dynamics(s)
        optimizer = th.optim.AdamW(dynamics.parameter_groups(WEIGHT_DECAY), lr=1e-3, fused=True)
        states, actions, rewards = (th.randn(n, dim) for dim in (s["obs_dim"], s["action_dim"], 1))
        next_states = states + 0.1 * th.randn_like(states)
        batch = ReplayBufferSamples(states, actions, next_states, th.zeros(n, 1), rewards)
        bootstrap = th.randint(n, (members, n))

    def loss(rows: Any) -> th.Tensor:
        nll: th.Tensor = dynamics.nll(rows.observations, rows.actions, rows.next_observations, rows.rewards)
        return nll.mean(dim=1)

    step = training_step(dynamics, optimizer, batch, bootstrap, loss)

    def work(steps: int) -> None:
        for column in th.randint(n, (steps, members, s["batch_size"]), device=s["device"]):
            step(column)

    return work


def imagination(s: dict[str, Any]) -> Work:
    """Imagined transitions, ``rows`` of them a unit, the actions given."""
    import torch as th

    with th.device(s["device"]):
        dynamics = _dynamics(s).eval()
        states, actions = (th.randn(s["rows"], dim) for dim in (s["obs_dim"], s["action_dim"]))

    def work(steps: int) -> None:
        for _ in range(steps):
            dynamics.sample(states, actions)

    return work


def _mbrl_model(s: dict[str, Any]) -> Any:
    models = import_module("mbrl.models")
    network = models.GaussianMLP(
        s["obs_dim"] + s["action_dim"],
        s["obs_dim"] + 1,
        s["device"],
        num_layers=s["layers"],
        ensemble_size=s["members"],
        hid_size=s["width"],
        propagation_method="random_model",
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )
    return models.OneDTransitionRewardModel(network, normalize=True, num_elites=s["elites"])


def mbrl_ensemble(s: dict[str, Any]) -> Work:
    """mbrl-lib's training steps, minibatches from its own iterator, as its ModelTrainer takes them."""
    import numpy as np

    n, draw = s["rows"], np.random.default_rng(0).standard_normal
    model = _mbrl_model(s)
    states = draw((n, s["obs_dim"])).astype(np.float32)
    actions = draw((n, s["action_dim"])).astype(np.float32)
    rewards, never = draw(n).astype(np.float32), np.zeros(n, bool)
    batch = import_module("mbrl.types").TransitionBatch(states, actions, states + 0.1, rewards, never, never)
    model.update_normalizer(batch)
    model.set_elite(range(s["elites"]))
    trainer = import_module("mbrl.models").ModelTrainer(model, optim_lr=1e-3, weight_decay=5e-5)
    iterator = import_module("mbrl.util.replay_buffer").BootstrapIterator(
        batch, s["batch_size"], s["members"], shuffle_each_epoch=True
    )
    batches = iter(iterator)

    def work(steps: int) -> None:
        nonlocal batches
        for _ in range(steps):
            minibatch = next(batches, None)
            if minibatch is None:
                batches = iter(iterator)
                minibatch = next(batches)
            model.update(minibatch, trainer.optimizer)

    return work


def mbrl_imagination(s: dict[str, Any]) -> Work:
    """mbrl-lib's imagined transitions, as its MBPO draws them."""
    import numpy as np
    import torch as th

    model = _mbrl_model(s)
    model.set_elite(range(s["elites"]))
    draw = np.random.default_rng(0).standard_normal
    states = draw((s["rows"], s["obs_dim"])).astype(np.float32)
    actions = draw((s["rows"], s["action_dim"])).astype(np.float32)
    model.update_normalizer(type("Batch", (), {"obs": states, "act": actions})())
    world = import_module("mbrl.models").ModelEnv(
        sized_env(s),
        model,
        lambda _, states: th.zeros(len(states), 1, dtype=th.bool),
        None,
        th.Generator(s["device"]).manual_seed(0),
    )

    def work(steps: int) -> None:
        for _ in range(steps):
            world.step(actions, world.reset(states), sample=True)

    return work


def ensemble_products(s: dict[str, Any]) -> Work:
    """The matrix products of one training step of the ensemble alone."""
    import torch as th

    sizes = [s["obs_dim"] + s["action_dim"], *[s["width"]] * s["layers"], 2 * (s["obs_dim"] + 1)]
    e, n = s["members"], s["batch_size"]
    calls: list[Any] = []
    for k, (i, j) in enumerate(pairwise(sizes)):
        x, w, g = (th.randn(e, *shape, device=s["device"]) for shape in ((n, i), (i, j), (n, j)))
        calls += [lambda x=x, w=w: th.bmm(x, w), lambda x=x, g=g: th.bmm(x.mT, g)]
        if k > 0:
            calls.append(lambda g=g, w=w: th.bmm(g, w.mT))

    def work(steps: int) -> None:
        for _ in range(steps):
            for call in calls:
                call()

    return work


# -- whole runs --

#: seconds by phase of the work so far
PHASES: dict[str, float] = {}


def _whole(kind: Any, s: dict[str, Any], **arguments: Any) -> Work:
    """Environment steps in each environment, every one of them with its gradient steps."""
    model = agent(kind, s, gradient_steps=s["gradient_steps"], **arguments)

    def work(steps: int) -> None:
        model.learn(steps * s["n_envs"], reset_num_timesteps=False, log_interval=None)

    return work


def sac_run(s: dict[str, Any]) -> Work:
    from stable_baselines3 import SAC

    return _whole(SAC, s)


def mnm_run(s: dict[str, Any], **arguments: Any) -> Work:
    from sb3_mismatch import MnM
    from sb3_mismatch.fast_sac import FastSAC

    for owner, name, phase in (
        (FastSAC, "train", "update"),
        (MnM, "_fit_dynamics", "dynamics"),
        (MnM, "_fit_classifier", "classifier"),
        (MnM, "_imagine", "imagination"),
        (MnM, "collect_rollouts", "environment"),
    ):
        setattr(owner, name, _timed(getattr(owner, name), phase))
    # As in a run that is long enough for compile="auto".
    return _whole(MnM, s, **{"compile": True, **arguments})


def rows_run(s: dict[str, Any]) -> Work:
    return mnm_run(s, expansion=0, horizon=5, imagine_freq=None, imagined_per_step=50)


def _timed(function: Any, phase: str) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            PHASES[phase] = PHASES.get(phase, 0.0) + time.perf_counter() - start

    return timed


CONTESTANTS: dict[str, Callable[[dict[str, Any]], Work]] = {
    "sac": sac,
    "tqc": tqc,
    "crossq": crossq,
    "sbx": sbx,
    "fast": fast,
    "compiled": compiled,
    "products": products,
    "ensemble": ensemble,
    "mbrl_ensemble": mbrl_ensemble,
    "ensemble_products": ensemble_products,
    "imagination": imagination,
    "mbrl_imagination": mbrl_imagination,
    "sac_run": sac_run,
    "mnm_run": mnm_run,
    "rows_run": rows_run,
}


def peak_mb() -> float:
    """The most memory that this process has held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measured(work: Work, n: int) -> dict[str, Any]:
    """Seconds of the wall and of the processor for ``n`` units, memory, and seconds by phase."""
    before = dict(PHASES)
    wall, cpu = time.perf_counter(), time.process_time()
    work(n)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    phases = {name: seconds - before.get(name, 0.0) for name, seconds in PHASES.items()}
    return {"seconds": wall, "cpu_seconds": cpu, "peak_mb": peak_mb(), "phases": phases}


def main() -> None:
    """Be one contestant until standard input ends."""
    name, settings = sys.argv[1], {**DEFAULTS, **json.loads(sys.argv[2])}
    answers, sys.stdout = sys.stdout, sys.stderr  # What libraries print is no answer.
    if name != "sbx":
        import torch as th

        th.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    work = CONTESTANTS[name](settings)
    print(json.dumps(measured(work, 1)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(measured(work, int(line))), file=answers, flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # The folder of this file holds modules of common names.
    main()
