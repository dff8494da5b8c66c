"""The agent: its round beside SAC's, its objectives, its seeds, its zip, its logs, and what it refuses."""

import io
import re
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import (
    BoxEnv,
    NormalizedExtractor,
    all_finite,
    assert_same,
    environments,
    policy_contents,
    sac_settings,
    small,
    soon,
    trained,
    weights,
    world_contents,
    world_settings,
)
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import set_random_seed
from torch.testing import assert_close

from sb3_mismatch import MBPO, OBJECTIVES, VMBPO, MnM, Objective

# -- the base algorithm's equal --


def beside_sac(steps, kind=MBPO, n_envs=1, normalize=False, policy="MlpPolicy", world=None, **settings):
    """SAC, and ours with real rows alone: the same steps, a world learning beside the second."""
    reference = SAC(policy, environments(n_envs, normalize=normalize), **sac_settings(**settings)).learn(steps)
    worldly = world_settings(real_ratio=1.0, model_train_freq=30 * n_envs, **(world or {}))
    ours = kind(policy, environments(n_envs, normalize=normalize), **sac_settings(**settings), **worldly).learn(steps)
    assert ours.num_timesteps - ours._fitted_at < 30 * n_envs
    assert len(ours.world.imagined) > 40
    return reference, ours


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("ent_coef", ["auto", 0.2])
def test_mbpo_with_real_rows_alone_equals_sac_over_300_gradient_steps(ent_coef, n_envs, monkeypatch):
    soon(monkeypatch)
    reference, ours = beside_sac(
        150 * n_envs, n_envs=n_envs, ent_coef=ent_coef, learning_starts=50 * n_envs, gradient_steps=3
    )
    assert reference._n_updates == 300
    assert_same(policy_contents(ours), policy_contents(reference))


@pytest.mark.parametrize("objective", ["mnm-approx", "vmbpo"])
def test_every_objective_without_logarithm_equals_sac_on_real_rows(objective, monkeypatch):
    soon(monkeypatch)
    reference, ours = beside_sac(130, MnM, world={"objective": objective}, learning_rate=3e-4, tau=0.005, gamma=0.99)
    assert_same(policy_contents(ours), policy_contents(reference))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_sde": True, "sde_sample_freq": 4, "n_envs": 2},
        {"n_steps": 3},
        {"normalize": True, "n_envs": 2},
        {
            "policy_kwargs": {
                "net_arch": [8],
                "features_extractor_class": NormalizedExtractor,
                "features_extractor_kwargs": {"dropout": 0.2},
            }
        },
        {"seed": 3, "world": {"horizon": 4, "objective": "mnm-approx"}},
        {
            "gradient_steps": -1,
            "train_freq": 4,
            "optimize_memory_usage": True,
            "replay_buffer_kwargs": {"handle_timeout_termination": False},
        },
    ],
    ids=["gSDE", "n_steps", "VecNormalize", "BatchNorm_and_Dropout", "horizon", "optimize_memory_usage"],
)
def test_mbpo_with_real_rows_alone_equals_sac_with(settings, monkeypatch):
    soon(monkeypatch)
    reference, ours = beside_sac(130 * settings.get("n_envs", 1), **settings)
    assert_same(policy_contents(ours), policy_contents(reference))


def test_imagined_rows_change_the_policy(monkeypatch):
    soon(monkeypatch)
    reference = SAC("MlpPolicy", environments(1), **sac_settings()).learn(100)
    ours = MBPO("MlpPolicy", environments(1), **small(real_ratio=0.5)).learn(100)
    assert not th.equal(weights(ours), weights(reference))


@pytest.mark.parametrize("objective", ["mnm-approx", "mbpo"])
def test_imagined_rows_hold_the_log_ratio_of_the_classifier_that_judged_them(objective, monkeypatch):
    """Fitted at step 60, it judges the rows of step 90 too; without a classifier nothing is judged."""
    soon(monkeypatch)
    model = trained(steps=90, objective=objective, horizon=1)
    rows = model.world.imagined.sample(50)
    judged = model.world.classifier.log_ratio(*rows[:3]).detach()
    assert_close(rows.log_ratio, judged if objective == "mnm-approx" else th.zeros(50, 1))
    assert len(judged.unique()) > 10


# -- objectives, seeds --


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v5"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_500_steps_of_each_objective(objective, env_id):
    model = trained(
        env_id, 500, objective=objective, learning_starts=440, reward_shift="auto", model_train_freq=50, horizon=2
    )
    assert model._fitted_at == 491
    # Behind an imagined end there is no row.
    assert 80 <= len(model.world.imagined) <= 100
    assert all_finite(model)


def test_same_seed_same_weights(monkeypatch):
    soon(monkeypatch)
    first, second, other = (trained(steps=90, seed=seed, objective="vmbpo") for seed in (1, 1, 2))
    assert_same(policy_contents(first), policy_contents(second))
    assert_same(world_contents(first), world_contents(second))
    assert not th.equal(weights(first), weights(other))
    assert not th.equal(first.world.dynamics.body.layers[0].weight, other.world.dynamics.body.layers[0].weight)


def test_without_a_seed_two_agents_differ():
    first, second = (MnM("MlpPolicy", "Pendulum-v1", **small(seed=None)) for _ in range(2))
    assert not th.equal(weights(first), weights(second))
    assert not th.equal(first.world.dynamics.body.layers[0].weight, second.world.dynamics.body.layers[0].weight)
    assert first._streams.state_dict()["torch"].ne(second._streams.state_dict()["torch"]).any()


def test_presets_are_rows_of_the_table():
    for kind, name in ((MnM, "mnm-approx"), (VMBPO, "vmbpo"), (MBPO, "mbpo")):
        model = kind("MlpPolicy", "Pendulum-v1", **small())
        assert model.objective == name
        # No reward has told anything yet.
        assert model._seeks == (kind is not MBPO)
        assert replace(model._row, novelty_weight=0.0) == OBJECTIVES[name]


def test_weights_given_replace_the_objectives_own():
    model = MnM("MlpPolicy", "Pendulum-v1", **small(log_ratio_weight=0.3, likelihood_weight=0.0))
    assert model._row.log_ratio_weight == 0.3
    assert model._row.likelihood_weight == 0.0
    assert model._row.adversarial_weight == OBJECTIVES["mnm-approx"].adversarial_weight


def test_an_objective_of_ones_own(monkeypatch):
    soon(monkeypatch)
    paid, fitted = [], []

    def reward(reward, log_ratio, gamma):
        paid.append(reward)
        return -reward

    def model_loss(terms, gamma):
        fitted.append(gamma)
        return terms.nll

    objective = Objective(reward, model_loss, uses_classifier=False)
    model = trained(steps=70, objective=objective, real_ratio=0.5, expansion=0)
    assert len(fitted) >= 5
    assert set(fitted) == {model.gamma}
    assert paid[-1].shape == (8, 1)


# -- the user's functions --


def test_functions_for_reward_and_end_take_the_place_of_learned_ones(monkeypatch):
    soon(monkeypatch)
    env, met = BoxEnv(spaces.Box(-9, 9, (2, 3), np.float64), action_shape=(2, 2), high=3.0), []

    def reward_fn(observations, actions, next_observations):
        met.append((observations, actions, next_observations))
        return actions.sum(dim=(1, 2))

    def termination_fn(observations, actions, next_observations):
        return next_observations[:, 0, 0] > observations[:, 0, 0]

    model = trained(env, 70, horizon=1, reward_fn=reward_fn, termination_fn=termination_fn)
    imagined = model.world.imagined.sample(50)
    observations, actions, next_observations = met[0]
    assert observations.shape == next_observations.shape == (200, 2, 3)
    assert actions.shape == (200, 2, 2)
    assert 1 < actions.abs().max() <= 3
    assert_close(imagined.rewards, 3 * imagined.actions.sum(dim=1, keepdim=True))
    assert_same(imagined.dones.bool(), imagined.next_observations[:, :1] > imagined.observations[:, :1])


@pytest.mark.parametrize("name", ["termination_fn", "reward_fn"])
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda s, a, t: a.flatten()[:3], r"must return a tensor of shape \(10,\).*returned a tensor of shape \(3,\)"),
        (lambda s, a, t: 1.0, "must return a tensor .* returned float"),
        (lambda s, a, t: a[:, 0] / 0, "returned NaN or infinity"),
    ],
    ids=["shape", "type", "infinite"],
)
def test_a_function_that_answers_wrongly_is_told_at_its_first_call(name, function, told, monkeypatch):
    soon(monkeypatch)
    with pytest.raises(ValueError, match=f"^{name} {told}"):
        trained(steps=70, **{name: function})


# -- save and load --


def imagined_columns(model):
    """What the model imagines next, from the replay buffer it holds."""
    with model._streams.active():
        model._imagine(model._real_transitions())
    return model.world.imagined._rows


@pytest.fixture(scope="module")
def saved():
    """A trained agent whose world is due, its zip and its replay buffer."""
    with pytest.MonkeyPatch.context() as patch:
        soon(patch)
        model = trained(
            steps=165,
            objective="vmbpo",
            learning_starts=59,
            model_train_freq=50,
            train_freq=5,
        )
    assert (model._fitted_at, model.num_timesteps) == (160, 165)
    archive, buffer = io.BytesIO(), io.BytesIO()
    model.num_timesteps += 50
    model.save(archive)
    model.save_replay_buffer(buffer)
    return model, archive, buffer


def loaded(saved, env=None):
    _, archive, buffer = saved
    model = MnM.load(archive, env=env, device="cpu")
    buffer.seek(0)
    model.load_replay_buffer(buffer)
    return model


def test_a_loaded_model_holds_what_was_saved(saved):
    copy = loaded(saved)
    assert_same(policy_contents(copy), policy_contents(saved[0]))
    assert_same(world_contents(copy), world_contents(saved[0]))
    assert copy._fitted_at == 160


def test_a_loaded_model_predicts_identically(saved):
    copy, observations = loaded(saved), np.random.default_rng(0).normal(size=(20, 3))
    assert_same(
        copy.predict(observations, deterministic=True)[0], saved[0].predict(observations, deterministic=True)[0]
    )
    sampled = []
    for model in (copy, saved[0]):
        set_random_seed(5)
        sampled.append(model.predict(observations)[0])
    assert_same(sampled[0], sampled[1])


def test_loaded_models_imagine_and_continue_identically(saved, monkeypatch):
    soon(monkeypatch)
    original = saved[0]
    first, second = loaded(saved, environments(1)), loaded(saved, environments(1))
    first.set_logger(original.logger)
    for model in (original, first):
        set_random_seed(3)
        model.train(gradient_steps=20, batch_size=16)
        assert model._fitted_at == 215
    assert_same(policy_contents(first), policy_contents(original))
    assert_same(world_contents(first), world_contents(original))
    assert_same(imagined_columns(first), imagined_columns(original))
    # In a run of its own too.
    first = loaded(saved, environments(1))
    for model in (first, second):
        model.set_random_seed(4)
        model.learn(60, reset_num_timesteps=False)
        assert model.num_timesteps == 275
        assert model._fitted_at > 215
    assert_same(policy_contents(first), policy_contents(second))
    assert_same(world_contents(first), world_contents(second))


# -- what is refused --


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"objective": "mnn"}, "objective='mnn' is unknown: use one of 'mnm'"),
        ({"objective": 3}, "objective=3 must be a name or an Objective"),
        ({"real_ratio": 1.5}, "real_ratio=1.5 must be 'auto', or a finite number between 0 and 1"),
        ({"real_ratio": -0.1}, "real_ratio=-0.1"),
        ({"adversarial_weight": float("inf")}, "adversarial_weight=inf must be None, or a finite number"),
        ({"real_ratio": float("nan")}, "real_ratio=nan"),
        ({"real_ratio": "0.1"}, "real_ratio='0.1' must be 'auto', or a number"),
        ({"actor_rate": "slow"}, "actor_rate='slow' must be a number"),
        ({"critic_layer_norm": "yes"}, "critic_layer_norm='yes' must be 'auto', True or False"),
        ({"actor_rate": -0.1}, "actor_rate=-0.1 must be a finite number between 0 and 1"),
        ({"novelty_weight": "much"}, "novelty_weight='much' must be 'auto', None, or a number"),
        ({"log_ratio_weight": "auto"}, "log_ratio_weight='auto' must be None, or a number"),
        ({"horizon": 0}, "horizon=0 must be a whole number of at least 1"),
        ({"horizon": 1.5}, "horizon=1.5"),
        ({"horizon": [0, 10, 1]}, "horizon=[0, 10, 1] must be a number of at least 1, or a schedule"),
        ({"horizon": [10, 0, 1, 5]}, "horizon=[10, 0, 1, 5]"),
        ({"horizon": [0, 10, 0, 5]}, "horizon=[0, 10, 0, 5]"),
        ({"horizon": [0, 10, "1", 5]}, "horizon=[0, 10, '1', 5]"),
        ({"horizon": "lin_5"}, "horizon='lin_5'"),
        ({"n_members": 2, "n_elites": 3}, "n_elites=3 is more than n_members=2: choose fewer elites or more members"),
        ({"n_members": 0}, "n_members=0"),
        ({"n_elites": 0}, "n_elites=0"),
        ({"model_train_freq": 0}, "model_train_freq=0"),
        ({"imagined_per_step": -1}, "imagined_per_step=-1"),
        ({"imagined_n_steps": 0}, "imagined_n_steps=0"),
        ({"random_steps": -1}, "random_steps=-1 must be 'auto', 0 for none, or a whole number of at least 1"),
        ({"log_ratio_weight": -1.0}, "log_ratio_weight=-1.0 must be None, or a finite number between 0 and inf"),
        ({"reward_shift": "automatic"}, "reward_shift='automatic' must be 'auto', or a number"),
        ({"reward_floor": 0.0}, "reward_floor=0.0"),
        ({"objective": "mnm", "n_steps": 3}, "n_steps=3 sums rewards before objective='mnm' can take their logarithm"),
        ({"termination_fn": True}, "termination_fn=True must be a function of batched tensors, or None"),
        ({"reward_fn": "r"}, "reward_fn='r'"),
        ({"dynamics_kwargs": [200]}, "dynamics_kwargs=[200] must be a dict, or None"),
        ({"dynamics_kwargs": {"width": 3}}, "dynamics_kwargs holds ['width'], which Dynamics does not take"),
        ({"dynamics_kwargs": {"learning_rate": "1e-3"}}, "dynamics_kwargs['learning_rate']='1e-3' must be a number"),
        ({"dynamics_kwargs": {"temperature": -1}}, "dynamics_kwargs['temperature']=-1 must be a finite number"),
        ({"classifier_kwargs": {"width": 3}}, "classifier_kwargs holds ['width']"),
        ({"classifier_kwargs": {"label_smoothing": 1.0}}, "label_smoothing=1.0"),
        ({"fit_kwargs": {"steps": 3}}, "fit_kwargs holds ['steps'], which FitSettings does not take"),
        ({"fit_kwargs": {"dynamics_steps": 0}}, "fit_kwargs['dynamics_steps']=0"),
        ({"replay_buffer_class": HerReplayBuffer}, "replay_buffer_class=HerReplayBuffer relabels goals"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_told_in_one_sentence_at_construction(settings, told):
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(told)) as failure:
        MnM("MlpPolicy", "Pendulum-v1", **small(**settings))
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 300


class AnyObservation(gym.Env):
    """An environment of which only the spaces are asked."""

    def __init__(self, observation_space):
        self.observation_space = observation_space
        self.action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("space", "policy", "told"),
    [
        (spaces.Box(0, 255, (36, 36, 3), np.uint8), "CnnPolicy", "observation_space = .* is an image"),
        (spaces.Discrete(4), "MlpPolicy", r"observation_space = Discrete\(4\) is no Box: .*FlattenObservation"),
        (spaces.MultiDiscrete([3, 4]), "MlpPolicy", "observation_space = MultiDiscrete.*FlattenObservation"),
        (spaces.MultiBinary(3), "MlpPolicy", "observation_space = MultiBinary.*FlattenObservation"),
        (
            spaces.Dict({"at": spaces.Box(-1, 1, (2,)), "phase": spaces.Discrete(3)}),
            "MultiInputPolicy",
            r"observation_space\['phase'\] = Discrete\(3\) is no Box",
        ),
        (
            spaces.Dict({"at": spaces.Box(-1, 1, (2,)), "camera": spaces.Box(0, 255, (36, 36, 3), np.uint8)}),
            "MultiInputPolicy",
            r"observation_space\['camera'\] = .* is an image",
        ),
    ],
    ids=["image", "Discrete", "MultiDiscrete", "MultiBinary", "Dict_with_Discrete", "Dict_with_image"],
)
def test_observations_without_vector_dynamics_are_refused(space, policy, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        MnM(policy, AnyObservation(space), device="cpu", buffer_size=100)


def test_actions_without_bounds_or_order_are_refused_as_by_sac():
    with pytest.raises(AssertionError, match=r"only supports .*Box"):
        MnM("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(AssertionError, match="finite lower and upper bound"):
        MnM("MlpPolicy", BoxEnv(high=np.inf), device="cpu")


def test_a_log_objective_that_meets_no_logarithm_says_so():
    with pytest.raises(
        ValueError, match=r"^objective='mnm' takes log r and met r = -.*reward_shift='auto'.*mnm-approx"
    ):
        trained(steps=60, objective="mnm")


class Spoiled(BoxEnv):
    """Returns something that is not finite after so many steps."""

    def __init__(self, what, value, after, **kwargs):
        super().__init__(**kwargs)
        self.what, self.value, self.after, self.steps = what, value, after, 0

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        if self.what == "first observation" and self.steps >= self.after:
            observation[1] = self.value
        return observation, info

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if self.steps >= self.after:
            if self.what == "reward":
                reward = self.value
            if self.what == "observation" or (self.what == "last observation" and (terminated or truncated)):
                observation[1] = self.value
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "VecNormalize"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    ("what", "after", "told"),
    [
        ("first observation", 0, "observation"),
        ("first observation", 60, "observation"),
        ("observation", 70, "observation"),
        ("last observation", 60, "terminal_observation"),
        ("reward", 70, "reward"),
    ],
)
def test_what_is_not_finite_is_told_before_a_network_holds_it(what, after, told, value, normalize, monkeypatch):
    if what == "last observation" and normalize and np.isinf(value):
        pytest.skip("VecNormalize clips it")
    soon(monkeypatch)
    env = environments(2, lambda: Spoiled(what, value, after), normalize=normalize)
    model = MnM("MlpPolicy", env, **small(learning_starts=60))
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(ValueError, match=rf"^the environment returned {told} = (nan|-inf)"),
    ):
        model.learn(200)
    assert np.isfinite(model.replay_buffer.observations).all()
    assert np.isfinite(model.replay_buffer.next_observations).all()
    assert np.isfinite(model.replay_buffer.rewards).all()
    assert all_finite(model)


@pytest.mark.parametrize("column", ["observations", "next_observations", "rewards"])
def test_a_buffer_that_is_not_finite_is_told(column):
    model = trained(steps=60)
    getattr(model.replay_buffer, column)[30, 0] = np.nan
    model.num_timesteps += 300
    model.replay_buffer.pos = 60
    with pytest.MonkeyPatch.context() as patch:
        soon(patch)
        with pytest.raises(ValueError, match=f"the replay buffer's {column.replace('_', ' ')} hold nan"):
            model.train(gradient_steps=1)
    assert all_finite(model)


# -- noise --


class Noisy(gym.ObservationWrapper):
    """Pendulum-v1 and a number that nothing foretells."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,))

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.append(observation, self.np_random.standard_normal()).astype(np.float32)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_noise_is_ignored_unless_the_dynamics_lean_towards_value(objective):
    shift = "auto" if OBJECTIVES[objective].takes_log else 0.0
    model = trained(Noisy(), 300, objective=objective, reward_shift=shift, fit_kwargs={"dynamics_steps": 100})
    ignores = objective == "mnm-approx"
    world = model.world
    assert world.dynamics.foretold.tolist() == [1, 1, 1, 1 - ignores]
    assert world.classifier.seen.tolist() == [1, 1, 1, 1 - ignores, 1, 1, 1, 1, 1 - ignores]


# -- logs --

WORLD_KEYS = {
    "dynamics/nll",
    "dynamics/state_error",
    "dynamics/reward_error",
    "dynamics/unexplained",
    "dynamics/foretold",
    "dynamics/end_error",
    "dynamics/seconds",
    "imagination/horizon",
    "imagination/rows",
    "imagination/finished",
    "imagination/reward",
    "imagination/novelty",
    "imagination/real_ratio",
    "imagination/seconds",
}
CLASSIFIER_KEYS = {
    "classifier/loss",
    "classifier/accuracy",
    "classifier/log_ratio_real",
    "classifier/log_ratio_imagined",
    "classifier/seconds",
}


def read_back(folder, format_):
    """Names and finite values of a log written by SB3."""
    if format_ == "csv":
        names, *rows = [line.split(",") for line in (folder / "progress.csv").read_text().splitlines()]
        return {name: float(value) for name, value in zip(names, rows[-1], strict=True)}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}


@pytest.mark.parametrize("format_", ["csv", "tensorboard"])
@pytest.mark.parametrize(
    ("objective", "keys"),
    [("mbpo", WORLD_KEYS), ("mnm", WORLD_KEYS | CLASSIFIER_KEYS | {"objective/lower_bound", "objective/log_return"})],
)
def test_logs_read_back(objective, keys, format_, tmp_path, monkeypatch):
    soon(monkeypatch)
    model = MnM("MlpPolicy", BoxEnv(), **small(objective=objective, reward_shift="auto"))
    model.set_logger(configure(str(tmp_path), [format_]))
    model.learn(100)
    model.logger.close()
    logged = read_back(tmp_path, format_)
    assert keys <= set(logged)
    assert all(np.isfinite(logged[name]) for name in keys)
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "train/critic_loss"} <= set(logged)
    if objective == "mbpo":
        assert not any(name.startswith(("classifier/", "objective/")) for name in logged)
    assert logged["rollout/ep_len_mean"] == 20
    assert logged["imagination/horizon"] == 20
    assert logged["imagination/rows"] == 200


def test_the_bound_is_logged_beside_the_log_return(monkeypatch):
    """Rewards all 2, γ = 0.5: log Σ_t γ^t 2 over 20 steps is known, and the bound without log-ratio is its like."""
    soon(monkeypatch)

    class Twos(BoxEnv):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, 2.0, *rest

    env = Twos()
    model = trained(
        env, 70, objective="mnm", gamma=0.5, log_ratio_weight=0.0, termination_fn=lambda s, a, t: a[:, 0] > 2
    )
    expected = np.log(2 * (1 - 0.5**20) / (1 - 0.5))
    assert model._world_log["objective/log_return"] == pytest.approx(expected, rel=1e-5)
    # Σ_{t<7} γ^t (1 - γ) (log 2 - log(1 - γ)), cut where γ^t falls below 0.01.
    assert model._world_log["objective/lower_bound"] == pytest.approx((1 - 0.5**7) * np.log(4), rel=1e-3)
