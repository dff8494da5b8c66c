"""Ends and rewards: the user's functions in the environment's own scale, and learned ends against MuJoCo's own."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from torch.testing import assert_close
from toys import CPU

from sb3_mismatch.buffers import RealTransitions, real_transitions
from sb3_mismatch.dynamics import Dynamics
from sb3_mismatch.fitting import FitSettings, fit_dynamics
from sb3_mismatch.observations import FlatObservations
from sb3_mismatch.terminations import Outcomes
from sb3_mismatch.world import WEIGHT_DECAY

ACTIONS = spaces.Box(np.array([-1.0, 0.0, 10.0]), np.array([1.0, 4.0, 20.0]), dtype=np.float64)
SPACE = spaces.Box(-np.inf, np.inf, (2, 3))
S, A, S2 = 3 * th.ones(4, 6), th.tensor([[-1.0, 0.0, 1.0]]).repeat(4, 1), th.arange(24.0).view(4, 6)


def outcomes(space: spaces.Space = SPACE, actions: spaces.Box = ACTIONS, **functions) -> Outcomes:
    flat = FlatObservations(space)
    return Outcomes(Dynamics(flat.dim, spaces.flatdim(actions), 2, 1, [4]), flat, actions, **functions)


def test_functions_see_the_environments_scale_and_shape():
    seen = []

    def watch(observations, actions, next_observations):
        seen.append((observations, actions, next_observations))
        return actions[:, 0]

    ours = outcomes(termination_fn=watch, reward_fn=watch)
    ours.ends(S, A, S2)
    assert_close(ours.rewards(S, A, S2, th.zeros(4, 1), th.ones(4, 1)), th.full((4, 1), -1.0))
    assert len(seen) == 2
    for observations, actions, next_observations in seen:
        assert_close(observations, S.view(4, 2, 3))
        assert_close(next_observations, S2.view(4, 2, 3))
        # -1, 0 and 1 stand for the lower bound, the middle and the upper bound.
        assert_close(actions, th.tensor([[-1.0, 2.0, 20.0]]).repeat(4, 1))


def test_actions_have_their_spaces_shape():
    wide = spaces.Box(-2.0, 2.0, (3, 1))

    def reward(observations, actions, next_observations):
        assert actions.shape == (4, 3, 1)
        return actions.sum(dim=(1, 2))

    paid = outcomes(actions=wide, reward_fn=reward).rewards(S, A, S2, th.zeros(4, 1), th.zeros(4, 1))
    assert_close(paid, th.zeros(4, 1))


def test_functions_of_dict_observations():
    space = spaces.Dict({"b": spaces.Box(-9, 9, (2, 2)), "a": spaces.Box(-9, 9, (2,))})

    def end(observations, actions, next_observations):
        assert next_observations["b"].shape == (4, 2, 2)
        return next_observations["a"][:, 0] > 7

    # "a" comes first in a Dict: its first column is 0, 6, 12, 18.
    ends = outcomes(space, termination_fn=end).ends(S, A, S2)
    assert_close(ends, th.tensor([[False], [False], [True], [True]]))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [th.bool, th.float64, th.int64])
def test_answers_of_any_kind_of_number(shape, dtype):
    def answer(observations, actions, next_observations):
        return th.tensor([0, 1, 1, 0]).to(dtype).view(shape)

    ours = outcomes(termination_fn=answer, reward_fn=answer)
    assert_close(ours.ends(S, A, S2), th.tensor([[False], [True], [True], [False]]))
    ours.dynamics.end_reward.fill_(9.0)
    assert_close(ours.rewards(S, A, S2, th.zeros(4, 1), th.ones(4, 1)), th.tensor([[0.0], [1.0], [1.0], [0.0]]))


@pytest.mark.parametrize("name", ["termination_fn", "reward_fn"])
@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (th.zeros(3), "must return a tensor of shape (4,) or (4, 1) for 4 transitions and returned a tensor of shape"),
        (th.zeros(()), "returned a tensor of shape ()"),
        (th.zeros(4, 2), "returned a tensor of shape (4, 2): work on the last dimension of batched tensors"),
        (np.zeros(4), "returned ndarray"),
        (True, "returned bool"),
        (None, "returned NoneType"),
        (th.tensor([0, 0, np.nan, 0]), "returned NaN or infinity: it must be finite"),
        (th.tensor([0, -np.inf, 0, 0]), "returned NaN or infinity"),
    ],
)
def test_other_answers_are_refused_by_name(name, answer, sentence):
    ours = outcomes(**{name: lambda *_: answer})
    ask = ours.ends if name == "termination_fn" else lambda *rows: ours.rewards(*rows, th.zeros(4, 1), th.zeros(4, 1))
    with pytest.raises(ValueError, match=f"^{name} .*{re.escape(sentence)}"):
        ask(S, A, S2)


def test_learned_rewards_are_the_dynamics_own_and_what_ends_pay():
    learned, ends = th.randn(4, 1), th.tensor([[0.0], [1.0], [0.25], [0.0]])
    ours = outcomes()
    assert_close(ours.rewards(S, A, S2, learned, ends), learned, rtol=0, atol=0)
    ours.dynamics.end_reward.fill_(8.0)
    assert_close(ours.rewards(S, A, S2, learned, ends) - learned, 8 * ends)


def test_learned_end_is_the_likelier_outcome():
    ours = outcomes()
    ours.dynamics.end_probability = lambda s: s[:, :1] / 24  # type: ignore[method-assign]
    # s' begins with 0, 6, 12, 18: probabilities 0, 1/4, 1/2, 3/4.
    assert_close(ours.ends(S, A, S2), th.tensor([[False], [False], [False], [True]]))


# -- learned ends --


def drive(env_id: str, steps: int, seed: int) -> RealTransitions:
    """Steps of a uniformly random policy in one episode, of one driven by slow noise in the next, and so on."""
    env = gym.make(env_id)
    generator = np.random.default_rng(seed)
    buffer = ReplayBuffer(steps, env.observation_space, env.action_space, device=CPU)
    low, high = env.action_space.low, env.action_space.high
    observation, _ = env.reset(seed=seed)
    episode, slow = 0, np.zeros(low.shape)
    for _ in range(steps):
        slow = 0.9 * slow + 0.3 * generator.normal(size=low.shape)
        action = np.clip(slow, -1, 1) if episode % 2 else generator.uniform(-1, 1, low.shape)
        after, reward, ended, cut, _ = env.step((low + 0.5 * (action + 1) * (high - low)).astype(np.float32))
        info = {"TimeLimit.truncated": cut and not ended}
        buffer.add(observation, after, action, np.array([reward]), np.array([ended or cut]), [info])
        observation = after
        if ended or cut:
            observation, _ = env.reset()
            episode, slow = episode + 1, 0 * slow
    return real_transitions(buffer, FlatObservations(env.observation_space), CPU)


@pytest.mark.parametrize(("env_id", "recall"), [("InvertedPendulum-v5", 0.995), ("Hopper-v5", 0.99)])
def test_learned_ends_agree_with_the_environments_own(env_id, recall):
    th.manual_seed(0)
    env = gym.make(env_id)
    data, held = drive(env_id, 5000, seed=0), drive(env_id, 5000, seed=1)
    flat = FlatObservations(env.observation_space)
    # The heads share nothing with the states' network, which may stay small here.
    dynamics = Dynamics(flat.dim, spaces.flatdim(env.action_space), net_arch=[8])
    optimizer = th.optim.AdamW(dynamics.parameter_groups(WEIGHT_DECAY), lr=1e-3, fused=True)
    # As many gradient steps as the default settings take over 500 steps of the environment.
    settings = FitSettings(dynamics_steps=10 * FitSettings.dynamics_steps)
    fit_dynamics(dynamics, optimizer, data, lambda rows: dynamics.nll(*rows[:3], rows.rewards).mean(dim=1), settings)

    batch = held.batch
    ends = Outcomes(dynamics, flat, env.action_space).ends(batch.observations, batch.actions, batch.next_observations)
    right = ends == batch.dones.bool()
    recalls = [right[batch.dones == end].float().mean().item() for end in (1, 0)]
    agreement, balanced = right.float().mean().item(), sum(recalls) / 2
    print(
        f"\n{env_id}: agreement {agreement:.4f}, balanced recall {balanced:.4f} "
        f"(ends {recalls[0]:.4f} of {int(batch.dones.sum())}, others {recalls[1]:.4f})"
    )
    assert agreement >= 0.998
    assert balanced >= recall
