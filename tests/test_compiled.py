"""The compiled update is the plain one: the same draws, weights that are close after tens of steps."""

import copy
import io
import shutil
import warnings

import numpy as np
import pytest
import torch as th
from agents import (
    BoxEnv,
    NormalizedExtractor,
    assert_same,
    environments,
    policy_contents,
    sac_settings,
    small,
    trained,
)
from gymnasium import spaces
from stable_baselines3 import SAC
from torch import nn
from torch.testing import assert_close

from sb3_mismatch import MnM
from sb3_mismatch import compiled as compiled_module
from sb3_mismatch.compiled import (
    ACTIVATIONS,
    Learner,
    Momenta,
    Numbers,
    Rows,
    State,
    act,
    descend,
    program,
    tensors,
    update,
)
from sb3_mismatch.fast_sac import LONG_RUN, FastSAC

needs_compiler = pytest.mark.skipif(compiled_module.lacking(th.device("cpu")) is not None, reason="no C++ compiler")


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile leaves functions as they are: the program's equations, run by torch's own interpreter."""
    program.cache_clear()
    monkeypatch.setattr(th, "compile", lambda function, **_: function)
    yield
    program.cache_clear()


def agent(kind=FastSAC, env="Pendulum-v1", steps=60, **settings):
    return kind("MlpPolicy", env, **{**sac_settings(), **settings}).learn(steps)


def trained_both_ways(model, gradient_steps=30, batch_size=16):
    """The agent after the same draws: plain and compiled."""
    pair = []
    for compile in (False, True):
        twin = copy.deepcopy(model)
        twin.compile = compile
        np.random.seed(1)
        th.manual_seed(1)
        twin.train(gradient_steps, batch_size)
        twin.drawn_next = (np.random.rand(), th.rand(()).item())
        pair.append(twin)
    return pair


def assert_close_agents(plain, fast, rtol=1e-4, atol=1e-5):
    assert fast._compiled is not None
    assert not fast._refused
    assert plain._compiled is None
    assert plain.drawn_next == fast.drawn_next
    assert_close(policy_contents(fast), policy_contents(plain), rtol=rtol, atol=atol)
    keys = [name for name in plain.logger.name_to_value if name.startswith("train/")]
    for name in keys:
        assert fast.logger.name_to_value[name] == pytest.approx(plain.logger.name_to_value[name], rel=1e-3, abs=1e-5)


SETTINGS = {
    "default": {},
    "ent_coef": {"ent_coef": 0.2},
    "n_steps": {"n_steps": 3},
    "target_update_interval": {"target_update_interval": 3, "tau": 0.5},
    "target_entropy": {"target_entropy": -3.0, "gamma": 0.9, "learning_rate": 3e-3},
    "networks": {
        "policy_kwargs": {"net_arch": {"pi": [], "qf": [8, 4]}, "n_critics": 3, "activation_fn": nn.Tanh},
    },
    "Adam": {"policy_kwargs": {"net_arch": [8], "optimizer_kwargs": {"betas": (0.5, 0.9), "eps": 1e-3}}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equations_equal_the_plain_form(uncompiled, settings):
    assert_close_agents(*trained_both_ways(agent(**settings)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_compute_what_their_modules_do(activation):
    x = th.linspace(-3, 3, 13)
    assert_close(ACTIVATIONS[activation](x), activation()(x))


def test_observations_are_what_the_networks_see(uncompiled):
    for space in (spaces.Box(-np.inf, np.inf, (2, 3), np.float64), spaces.Box(-1, 1, (4,), np.float32)):
        assert_close_agents(*trained_both_ways(agent(env=BoxEnv(space)), 5))


def test_several_environments_and_vec_normalize(uncompiled):
    assert_close_agents(*trained_both_ways(agent(env=environments(2, normalize=True), steps=120), 5))


def test_mixed_minibatches(uncompiled, monkeypatch):
    from agents import soon

    soon(monkeypatch)
    model = trained(steps=120, model_train_freq=50, expansion=0, real_ratio=0.1)
    assert len(model.world.imagined) > 0
    assert_close_agents(*trained_both_ways(model))


@needs_compiler
def test_compiled_equals_plain():
    model = agent(verbose=0)
    plain, fast = trained_both_ways(model, 40)
    assert_close_agents(plain, fast)
    for twin in (plain, fast):
        np.random.seed(2)
        th.manual_seed(2)
        twin.train(10, 16)
        twin.drawn_next = (np.random.rand(), th.rand(()).item())
    assert_close_agents(plain, fast)


@needs_compiler
def test_agents_alike_share_a_program_and_others_do_not():
    program.cache_clear()
    models = [agent(policy_kwargs={"net_arch": [width]}) for width in (8, 8, 12)]
    pairs = [trained_both_ways(model, 3, batch_size=n) for model in models for n in (16, 24)]
    assert program.cache_info().currsize == 4
    for pair in pairs:
        assert_close_agents(*pair)


def test_a_step_worked_by_hand():
    """One weight of Adam: g = 2, first step: m = 0.2, v = 0.004, w = 1 - lr 1 / (1 + ε)."""
    learner = Learner([th.tensor([1.0])], [th.zeros(1)], [th.zeros(1)])
    numbers = {"rate": th.tensor(0.5 / (1 - 0.9)), "scale": th.tensor((1 - 0.999) ** -0.5)}
    momenta, largest = Momenta(0.9, 0.999, 1e-8), th.tensor(10.0)
    after, dropped = descend(learner, [th.tensor([2.0])], th.tensor(3.0), **numbers, momenta=momenta, largest=largest)
    assert_close([part[0].item() for part in after], [0.5, 0.2, 0.004], rtol=1e-5, atol=1e-7)
    assert dropped == 0
    for gradient, loss, lost in ((th.inf, 3.0, 1), (10.0, 3.0, 1), (th.nan, 3.0, 1), (2.0, th.nan, 0)):
        after, dropped = descend(
            learner, [th.tensor([gradient])], th.tensor(loss), **numbers, momenta=momenta, largest=largest
        )
        assert_close([part[0].item() for part in after], [1.0, 0.0, 0.0])
        assert dropped == lost


def test_log_prob_is_the_squashed_gaussians():
    model = agent()
    spec = compiled_module.spec_of(model.policy, model.ent_coef_optimizer)
    state = compiled_module.state_of(model.policy, model.ent_coef_optimizer)
    observations = th.randn(7, 3)
    th.manual_seed(0)
    expected = model.actor.action_log_prob(observations)
    th.manual_seed(0)
    actions, log_prob = act(spec, state.actor.weights, observations, th.randn(7, 1))
    assert_close(actions, expected[0].detach())
    assert_close(log_prob.flatten(), expected[1].detach())


def test_update_is_pure():
    model = agent()
    spec = compiled_module.spec_of(model.policy, model.ent_coef_optimizer)
    state = compiled_module.state_of(model.policy, model.ent_coef_optimizer)
    before = [x.clone() for x in tensors(state)]
    rows = model._rows(model.replay_buffer.sample(16))
    after, log = update(spec, state, rows, Numbers(*model._numbers(1)[0].unbind()))
    assert_same(tensors(state), before)
    assert isinstance(after, State)
    assert isinstance(rows, Rows)
    assert log.shape == (5,)
    assert not any(th.equal(x, y) for x, y in zip(after.critic.weights, state.critic.weights, strict=True))


# -- when --


def test_auto_is_plain_in_short_runs_and_compiles_long_ones(uncompiled, capsys):
    model = agent(verbose=1)
    assert (model.compile, model._compiled) == ("auto", None)
    model._setup_learn(LONG_RUN["cpu"] - 1)
    model.train(1, 16)
    assert model._compiled is None
    # What is left of a long run is compiled as its beginning was.
    model.num_timesteps = LONG_RUN["cpu"] - 1
    model._setup_learn(1, reset_num_timesteps=False)
    capsys.readouterr()
    model.train(1, 16)
    model.train(1, 16)
    assert model._compiled is not None
    assert capsys.readouterr().out.count("The update was compiled in") == 1


@pytest.mark.parametrize(
    ("settings", "n_envs", "expected"),
    [
        ({"gradient_steps": 5}, 1, 5000),
        ({"gradient_steps": -1}, 2, 1000),
        ({"train_freq": 4, "gradient_steps": 2}, 2, 250),
        ({"train_freq": (1, "episode"), "gradient_steps": 8}, 1, 1000),
    ],
)
def test_gradient_steps_of_a_run(settings, n_envs, expected):
    model = FastSAC("MlpPolicy", environments(n_envs), **{**sac_settings(), **settings})
    assert model._gradient_steps_of(1000) == expected


def test_nothing_is_said_without_verbose(uncompiled, capsys):
    agent(compile=True)
    assert capsys.readouterr().out == ""


def test_unknown_value():
    with pytest.raises(ValueError, match="compile='always' is unknown: use 'auto', True or False"):
        agent(compile="always")


class OwnLoss(FastSAC):
    def _critic_loss(self, batch, targets):
        return 2 * super()._critic_loss(batch, targets)


class Slowly(nn.ReLU):
    pass


REFUSED = {
    "gSDE": ({"use_sde": True}, FastSAC, "use_sde=True draws its noise from the weights"),
    "extractor": (
        {"policy_kwargs": {"net_arch": [8], "features_extractor_class": NormalizedExtractor}},
        FastSAC,
        "features extractor NormalizedExtractor is not covered",
    ),
    "optimizer": (
        {"policy_kwargs": {"net_arch": [8], "optimizer_class": th.optim.AdamW}},
        FastSAC,
        "optimizer AdamW is not covered",
    ),
    "weight_decay": (
        {"policy_kwargs": {"net_arch": [8], "optimizer_kwargs": {"weight_decay": 0.1}}},
        FastSAC,
        "Adam's weight_decay, amsgrad and maximize are not covered",
    ),
    "activation": (
        {"policy_kwargs": {"net_arch": [8], "activation_fn": Slowly}},
        FastSAC,
        r"layer Slowly\(\) is not covered",
    ),
    "subclass": ({}, OwnLoss, "OwnLoss has a _critic_loss of its own"),
}


@pytest.mark.parametrize(("settings", "kind", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_covered_runs_plain_and_says_why(settings, kind, reason, capsys):
    settings = {**sac_settings(), **settings}
    with pytest.warns(UserWarning, match=rf"compile=True: the update runs in its plain form, for {reason}"):
        fast = agent(kind, compile=True, **settings)
    plain = agent(kind, compile=False, **settings)
    assert_same(policy_contents(fast), policy_contents(plain))


def test_hooks_and_frozen_weights_are_not_covered():
    model = agent()
    model.actor.optimizer.register_step_pre_hook(lambda *_: None)
    assert model._uncovered() == "hooks of optimizers are not covered"
    model = agent()
    next(model.critic.parameters()).requires_grad_(False)
    assert model._uncovered() == "weights that are frozen or not of single precision are not covered"
    assert trained()._uncovered() is None


def test_without_a_compiler_the_plain_form_runs(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.warns(UserWarning, match=r"there is no C\+\+ compiler"):
        fast = agent(compile=True)
    assert_same(policy_contents(fast), policy_contents(agent(compile=False)))


def test_where_compiling_fails_the_plain_form_runs(monkeypatch, capsys):
    def broken(function, **_):
        raise RuntimeError("ld returned 1")

    program.cache_clear()
    monkeypatch.setattr(th, "compile", broken)
    with pytest.warns(UserWarning, match="RuntimeError: ld returned 1") as caught:
        fast = agent(compile=True)
    assert len(caught) == 1
    assert_same(policy_contents(fast), policy_contents(agent(compile=False)))
    model = agent(verbose=1)
    model._is_long = True
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train(1, 16)
        model.train(1, 16)
    assert capsys.readouterr().out.count("RuntimeError: ld returned 1") == 1


# -- what a user keeps --


def test_zip_copy_and_optimizers_are_as_without(uncompiled):
    fast, plain = agent(compile=True), agent(compile=False)
    assert {k: list(v) for k, v in fast.get_parameters().items()} == {
        k: list(v) for k, v in plain.get_parameters().items()
    }
    archive = io.BytesIO()
    fast.save(archive)
    for kind in (FastSAC, SAC):
        archive.seek(0)
        loaded = kind.load(archive, env=environments(1))
        assert loaded.compile is True
        assert "_compiled" not in vars(loaded) or loaded._compiled is None
        # SB3's own Adam goes on from where the program stopped.
        assert_same(loaded.get_parameters(), fast.get_parameters())
        loaded.learn(60)
    archive.seek(0)
    again = FastSAC.load(archive, env=environments(1), compile=False)
    again.replay_buffer = fast.replay_buffer
    again.set_logger(fast.logger)
    again.train(3, 16)
    assert again._compiled is None
    steps = {float(kept["step"]) for kept in fast.critic.optimizer.state.values()}
    assert steps == {float(fast._n_updates)}


def test_new_parameters_are_those_that_are_trained(uncompiled):
    model = agent(compile=True)
    model.set_parameters(agent(seed=1).get_parameters())
    before = copy.deepcopy(policy_contents(model)["policy"])
    model.train(1, 16)
    after = policy_contents(model)["policy"]
    moved = [th.equal(before[name], after[name]) for name in before]
    assert not any(moved)


def test_learning_rate_zero_freezes_the_critic(uncompiled):
    model = agent(compile=True)
    model.lr_schedule = lambda _: 0.0
    before, target = [[p.clone() for p in net.parameters()] for net in (model.critic, model.critic_target)]
    model.train(gradient_steps=1, batch_size=16)
    assert_same(list(model.critic.parameters()), before)
    assert not th.equal(next(model.critic_target.parameters()), target[0])


@pytest.mark.parametrize("reward", [np.nan, 1e30])
@pytest.mark.parametrize("kind", [FastSAC, MnM])
def test_a_loss_that_is_not_finite_is_told_and_reaches_no_weight(uncompiled, kind, reward):
    settings = small() if kind is MnM else sac_settings()
    model = kind("MlpPolicy", environments(1), compile=True, **settings).learn(60)
    model.replay_buffer.rewards[:] = reward
    with pytest.raises(ValueError, match="diverged; lower learning_rate"):
        model.train(gradient_steps=3)
    assert all(weights.isfinite().all() for weights in model.policy.state_dict().values())


def test_gradients_of_no_use_are_counted(uncompiled):
    agents = []
    for compile in (False, True):
        model = MnM("MlpPolicy", environments(1), compile=compile, **small()).learn(60)
        model.replay_buffer.rewards[:] = 1e21
        with pytest.raises(ValueError, match="3 gradients of the last 3 gradient steps were not finite or beyond"):
            model.train(gradient_steps=3)
        agents.append(model)
    plain, fast = (dict(model.critic.named_parameters()) for model in agents)
    assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_captured_on_cuda_equals_plain():
    model = agent(device="cuda")
    assert_close_agents(*trained_both_ways(model, 40), rtol=1e-3, atol=1e-4)
