"""I: device, determinism, compilation, versions."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, small, trained, weights
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import set_random_seed

from sb3_mismatch import MnM

cuda = pytest.param("cuda", marks=pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU"))


def test_i1_auto_is_cuda_where_there_is_one():
    model = MnM("MlpPolicy", BoxEnv(), **small(device="auto"))
    assert model.device.type == ("cuda" if th.cuda.is_available() else "cpu")
    assert next(model.world.dynamics.parameters()).device.type == model.device.type


def test_i1_no_tensor_has_double_precision():
    model = trained(environments(2, BoxEnv), 120)
    for network in (model.world.dynamics, model.world.classifier):
        assert {value.dtype for value in network.state_dict().values()} == {th.float32}
    assert {column.dtype for column in model.world.imagined.sample(5)[:5]} == {th.float32}
    assert {column.dtype for column in model._real_transitions().batch[:5]} == {th.float32}


@pytest.mark.parametrize("device", ["cpu", "auto", cuda])
def test_i2_everything_moves_to_the_device_it_is_loaded_to(device):
    archive = io.BytesIO()
    trained(BoxEnv(), 60, real_ratio=0.5).save(archive)
    model = MnM.load(archive, env=BoxEnv(), device=device)
    kind = model.device.type
    model.learn(60, reset_num_timesteps=False)
    optimizers = model.world.dynamics_optimizer.state, model.world.classifier_optimizer.state
    moments = [state["exp_avg"] for optimizer in optimizers for state in optimizer.values()]
    tensors = [*model.world.dynamics.state_dict().values(), *model.world.classifier.state_dict().values(), *moments]
    assert moments
    assert {tensor.device.type for tensor in [*tensors, *model.world.imagined.sample(3)[:5]]} == {kind}
    back = io.BytesIO()
    model.save(back)
    assert_same(weights(MnM.load(back, device="cpu")), weights(model).cpu())


def test_i3_runs_with_one_seed_are_identical():
    """SB3's own test of determinism."""
    rewards, actions = [], []
    for _ in range(2):
        noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
        model = trained(IdentityEnvBox(), 120, action_noise=noise, real_ratio=0.5)
        env = model.get_env()
        observation, total, chosen = env.reset(), 0.0, 0.0
        for _ in range(50):
            action, _ = model.predict(observation, deterministic=False)
            observation, reward, _, _ = env.step(action)
            total, chosen = total + reward.sum(), chosen + action.sum()
        rewards.append(total)
        actions.append(chosen)
    assert rewards[0] == rewards[1]
    assert actions[0] == actions[1]


def test_i4_without_a_seed_nothing_is_seeded():
    set_random_seed(0)
    numpy, torch = np.random.get_state()[1].copy(), th.get_rng_state()
    model = MnM("MlpPolicy", None, _init_setup_model=False)
    model.set_random_seed(None)
    assert_same(np.random.get_state()[1], numpy)
    assert_same(th.get_rng_state(), torch)
    first, second = (trained(BoxEnv(), 60, seed=None) for _ in range(2))
    assert not th.equal(weights(first), weights(second))
    assert first._streams.state_dict()["torch"].ne(second._streams.state_dict()["torch"]).any()
    # But what the user seeded counts.
    pair = []
    for _ in range(2):
        set_random_seed(3)
        pair.append(MnM("MlpPolicy", BoxEnv(), **small(seed=None)))
    assert_same(pair[0]._streams.state_dict(), pair[1]._streams.state_dict())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # by torch itself
def test_i5_a_compiled_policy_is_saved_and_loaded():
    model = trained(BoxEnv(), 60)
    archive = io.BytesIO()
    plain = weights(model)
    model.policy = th.compile(model.policy)
    model.save(archive)
    assert not any(name.startswith("_orig_mod") for name in model.get_parameters()["policy"])
    assert_same(weights(MnM.load(archive, device="cpu")), plain)


def test_i6_versions_are_told():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in project
    assert '"stable-baselines3>=2.9,<3"' in project
    assert '"torch>=2.8"' in project
