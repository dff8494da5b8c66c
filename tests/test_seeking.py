"""``novelty_weight="auto"``: novelty is paid for until rewards tell anything of states."""

import copy

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, soon, trained
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.testing import assert_close

from sb3_mismatch import MBPO, MnM
from sb3_mismatch.rewards import count_telling


def batch(actions, rewards):
    nothing = th.zeros(len(actions), 1)
    return ReplayBufferSamples(nothing, actions, nothing, nothing, rewards)


ACTIONS = th.rand(300, 2, generator=th.Generator().manual_seed(0)) * 2 - 1
COSTS = 0.3 - 0.1 * ACTIONS[:, :1] ** 2 - 2 * ACTIONS[:, 1:] ** 2 + ACTIONS[:, 1:]


@pytest.mark.parametrize("rewards", [th.zeros(300, 1), th.full((300, 1), -1.0), COSTS, 1e-6 * COSTS])
def test_constants_and_costs_of_actions_tell_nothing(rewards):
    assert count_telling(batch(ACTIONS, rewards), 100) == 0
    assert count_telling(batch(th.ones(300, 2), th.full((300, 1), 3.0)), 100) == 0


@pytest.mark.parametrize("rewards", [th.zeros(300, 1), th.full((300, 1), -1.0), COSTS])
def test_rewards_that_stand_out_tell_something(rewards):
    found = rewards.clone()
    found[17] += 1.0
    assert count_telling(batch(ACTIONS, found), 100) == 1
    found[100:120] += 100.0
    assert count_telling(batch(ACTIONS, found), 100) == 21
    assert count_telling(batch(ACTIONS, found), 10) == 10


def test_where_rewards_are_of_states_there_are_soon_enough():
    states = th.randn(300, 1, generator=th.Generator().manual_seed(1))
    assert count_telling(batch(ACTIONS, COSTS - states**2), 100) == 100


class SparseEnv(BoxEnv):
    """Actions cost; from step ``found`` on there is something to earn."""

    def __init__(self, found=10**9, cost=0.2, **kwargs):
        super().__init__(**kwargs)
        self.found, self.cost, self.n_steps = found, cost, 0

    def step(self, action):
        observation, _, *rest = super().step(action)
        self.n_steps += 1
        earned = float(self.n_steps > self.found) * np.abs(self.point).mean()
        return observation, earned - self.cost * float(np.square(action).sum()), *rest


def paid_each_nat(model, remaining):
    """In the units of the rewards: the same path with novelty and without."""
    ways = []
    for weight in ("auto", None):
        again = copy.deepcopy(model)
        again.novelty_weight, again._current_progress_remaining, again._starts_each = weight, remaining, 8
        ways.append(again._path_from(8))
    assert_close(ways[0].states, ways[1].states)
    pairs = ways[0].states[:-1].flatten(0, 1), ways[0].actions[:-1].flatten(0, 1)
    novelty = model.world.dynamics.novelty(*pairs).clamp(max=5.0).view_as(ways[0].rewards)
    assert novelty.max() > novelty.min()
    paid = (ways[0].rewards - ways[1].rewards) * model._unit
    return (paid / novelty).mean().item()


@pytest.mark.parametrize(("cost", "each"), [(0.2, 4.0), (0.0, 0.05)])
def test_novelty_is_paid_as_ten_times_the_largest_reward(cost, each, monkeypatch):
    """The largest is about 2 x 0.2; where none has been met the critics' unit is 1, that of 200 rewards of 0.005."""
    soon(monkeypatch)
    model = trained(SparseEnv(cost=cost), 100, objective="mbpo", real_ratio=0.5)
    assert model._world_log["imagination/novelty"] > 0
    for remaining in (1.0, 0.1):
        assert paid_each_nat(model, remaining) == pytest.approx(each, rel=0.15)


def test_rewards_that_are_found_take_noveltys_place(monkeypatch, tmp_path):
    """Fits come after 60, 160 and 260 steps, the last with more than a hundred rewards that tell something."""
    soon(monkeypatch)
    model = trained(SparseEnv(found=150, cost=0.0), 80, real_ratio=0.5)
    first = model._novelty_share / model._unit
    model.learn(80, reset_num_timesteps=False)
    assert model._n_telling == 10
    assert model._novelty_share / model._unit == pytest.approx(first / 11)
    model.save(tmp_path / "seeking")
    assert MnM.load(tmp_path / "seeking", device="cpu")._novelty_share == model._novelty_share
    model.learn(120, reset_num_timesteps=False)
    assert model._world_log["imagination/novelty"] == 0
    model.save(tmp_path / "found")
    assert not MnM.load(tmp_path / "found", device="cpu")._seeks
    # Nor where there is nothing to earn again.
    model.set_env(SparseEnv())
    model.replay_buffer.reset()
    model.learn(100, reset_num_timesteps=False)
    assert model._world_log["imagination/novelty"] == 0


@pytest.mark.parametrize(
    ("kind", "env", "settings"),
    [
        (MnM, BoxEnv(), {}),
        (MnM, SparseEnv(terminates=True), {}),
        (MnM, SparseEnv(), {"novelty_weight": None}),
        (MnM, SparseEnv(), {"expansion": 0}),
        (MnM, SparseEnv(), {"real_ratio": 1.0}),
        (MBPO, SparseEnv(), {}),
    ],
    ids=["rewards tell", "episodes end", "not asked for", "no expansion", "no imagination", "MBPO"],
)
def test_elsewhere_novelty_is_not_paid_for(kind, env, settings, monkeypatch):
    soon(monkeypatch)
    model = trained(env, 100, kind, **{"real_ratio": 0.5, **settings})
    assert model._world_log["imagination/novelty"] == 0
    assert not model._seeks
