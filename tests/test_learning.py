"""Learning curves: minutes each. ``pytest -m expensive tests/test_learning.py``"""

import pytest
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_mismatch import MnM


@pytest.mark.expensive
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("env", "least"), [("InvertedPendulum-v5", 950), ("Pendulum-v1", -250)])
def test_defaults_learn_in_3000_steps(env, least, seed):
    model = MnM("MlpPolicy", env, seed=seed, device="cpu").learn(3_000)
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    assert mean >= least
