"""Looking ahead: J against sums by hand, its gradient against analysis, and the update that climbs it."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from agents import (
    BoxEnv,
    all_finite,
    assert_same,
    environments,
    policy_contents,
    sac_settings,
    small,
    soon,
    trained,
    weights,
)
from stable_baselines3 import SAC
from stable_baselines3.common.utils import LinearSchedule
from test_compiled import assert_close_agents, trained_both_ways, uncompiled  # noqa: F401
from torch import nn
from torch.testing import assert_close

from sb3_mismatch import MBPO, MnM
from sb3_mismatch.expansion import EPS, FIRST_ENT_COEF, LEAST_ENT_COEF
from sb3_mismatch.imagining import ENOUGH_TELLING
from sb3_mismatch.lookahead import Path, expanded_value, look_ahead

GAMMA, ALPHA = 0.9, th.tensor(0.5)


def path(rewards, log_prob, continuation):
    """One start; states and actions do not matter."""

    def column(values):
        return th.tensor(values).view(-1, 1, 1)

    nothing = th.zeros(len(log_prob), 1, 1)
    return Path(nothing, nothing, column(log_prob), column(rewards), column(continuation))


# -- J --


def test_the_value_is_the_sum_by_hand():
    """r̃ - α log π = 2, 1 and V = 10, the first step survived in four of five cases: 2 + 0.9 0.8 (1 + 0.9 10)."""
    steps = path([1.0, 2.0], [-2.0, 2.0, 7.0], [0.8, 1.0])
    assert_close(expanded_value(steps, th.tensor([[10.0]]), ALPHA, GAMMA), th.tensor([[2 + 0.9 * 0.8 * (1 + 9.0)]]))


def test_nothing_is_earned_behind_a_certain_end():
    steps = path([1.0, 100.0], [0.0, 0.0, 0.0], [0.0, 1.0])
    assert_close(expanded_value(steps, th.tensor([[1e6]]), ALPHA, GAMMA), th.tensor([[1.0]]))


def test_no_steps_ahead_are_the_critics_value():
    assert_close(expanded_value(path([], [3.0], []), th.tensor([[4.0]]), ALPHA, GAMMA), th.tensor([[4.0]]))


def test_paths_follow_the_policy_and_the_dynamics():
    """a = k s, s' = s + a, r = s a, never over: all states by hand, and dJ/dk by finite differences."""

    def value(k):
        steps = look_ahead(
            act=lambda s: (k * s, th.zeros_like(s)),
            draw=lambda s, a, t: (s + a, s * a + t),
            earned=lambda s, a, next_s, rewards: (rewards, th.ones_like(rewards)),
            states=th.tensor([[1.0], [2.0]], dtype=th.double),
            steps=3,
        )
        return steps, expanded_value(steps, steps.states[-1], ALPHA, GAMMA)

    steps, _ = value(th.tensor(0.5, dtype=th.double))
    assert_close(steps.states[:, :, 0], th.tensor([[1, 2], [1.5, 3], [2.25, 4.5], [3.375, 6.75]], dtype=th.double))
    # The dynamics know which step it is.
    assert_close(steps.rewards[:, 0, 0], th.tensor([0.5, 1.5**2 / 2 + 1, 2.25**2 / 2 + 2], dtype=th.double))
    k = th.tensor(0.5, dtype=th.double, requires_grad=True)
    assert th.autograd.gradcheck(lambda k: value(k)[1], k)


# -- the update --


@pytest.fixture
def model(monkeypatch):
    soon(monkeypatch)
    return trained(BoxEnv(terminates=True), 100, objective="mbpo", real_ratio=0.5, learning_starts=20)


def test_critics_learn_bounded_values_in_their_unit(model):
    """Rewards in [-1.5, 0]: values lie between all of them and none, a whole range beyond; the unit is that range."""
    rewards = model.replay_buffer.rewards[: model._fitted_at]
    lowest = rewards.min() / (1 - model.gamma)
    assert model._highest_value == pytest.approx(-lowest, rel=1e-4)
    assert model._lowest_value == pytest.approx(2 * lowest, rel=1e-4)
    assert 0.2 < model._unit / -lowest <= 1
    model._starts_each = 8
    paths = model._path_from(8)
    assert paths.rewards.abs().max() < 2 / model._unit
    with th.no_grad():
        for parameter in model.critic_target.parameters():
            parameter.fill_(3.0)
    targets = model._expanded_targets(paths, model._ent_coef())
    assert_close(targets, th.full_like(targets, model._highest_value / model._unit))


def test_the_unit_changes_slowly(model):
    before, longest = model._unit, 1 / (1 - model.gamma)
    model._scale_to(th.full((10, 1), -1.5 * before / longest))
    assert model._unit == pytest.approx(1.05 * before)
    model._scale_to(th.zeros(10, 1))
    assert model._unit == pytest.approx(0.9 * 1.05 * before + 0.1)


def test_where_the_unit_jumps_critics_and_optimizers_go_on_as_they_were(model):
    """Of two agents one jumps to a unit ten times as large: both say the same of states, and take the same step."""
    for part in (model.actor, model.critic):
        part.optimizer.param_groups[0]["eps"] = 1e-20
    jumped = copy.deepcopy(model)
    jumped._scale_to(th.full((10, 1), -10 * model._unit * (1 - model.gamma)))
    jumped._lowest_value, jumped._highest_value = model._lowest_value, model._highest_value
    agents, values, before = (model, jumped), [], copy.deepcopy([model.critic, jumped.critic])
    for agent in agents:
        th.manual_seed(1)
        values.append(agent._value(th.zeros(4, 3)))
    assert jumped._unit == pytest.approx(10 * model._unit)
    assert_close(*values)
    momenta = [agent.actor.optimizer.state[agent.actor.mu.weight] for agent in agents]
    assert_close(10 * momenta[1]["exp_avg"], momenta[0]["exp_avg"])
    assert_close(100 * momenta[1]["exp_avg_sq"], momenta[0]["exp_avg_sq"])
    steps = []
    for agent, critic in zip(agents, before, strict=True):
        np.random.seed(1)
        th.manual_seed(1)
        agent._current_progress_remaining = 1.0
        agent.train(gradient_steps=1)
        pairs = zip(agent.critic.parameters(), critic.parameters(), strict=True)
        steps.append([new.detach() - old.detach() for new, old in pairs])
    assert_close(*steps, rtol=1e-3, atol=1e-6)
    assert all(step.abs().max() > 1e-4 for step in steps[0])


def test_a_rare_reward_is_no_measure_of_the_others():
    """What one step in 200 earns counts for nothing, what one in 50 earns for thirty times the median, 0.1."""

    def largest(earned, others, every):
        model = MnM("MlpPolicy", BoxEnv(), **small())
        paid = th.full((1000, 1), others)
        paid[::every] = earned
        model._scale_to(paid)
        return model._largest_payment

    assert largest(50.0, -0.1, 200) == pytest.approx(0.1)
    assert largest(50.0, -0.1, 50) == pytest.approx(3.0)
    # Where most steps earn nothing, five times the mean.
    assert largest(50.0, 0.0, 200) == pytest.approx(1.25)
    assert largest(50.0, 0.0, 50) == pytest.approx(5.0)
    assert largest(1.0, 0.0, 2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("objective", "scale", "nat"),
    [("mnm-approx", 0.01, 0.1), ("mnm-approx", 100.0, None), ("vmbpo", 0.01, None)],
)
def test_to_look_real_is_worth_no_more_than_rewards_are(objective, scale, nat, monkeypatch):
    """A nat, in largest rewards, where these are small; in what bounds the return it is as it is."""
    soon(monkeypatch)
    env = gym.wrappers.TransformReward(BoxEnv(), lambda reward: scale * reward)
    model = trained(env, 70, objective=objective, real_ratio=0.5)
    ways = []
    for weight in (None, 1e-9):
        again = copy.deepcopy(model)
        again.log_ratio_weight, again._starts_each = weight, 8
        ways.append(again._path_from(8))
    assert_close(ways[0].states, ways[1].states)
    path = ways[0]
    transitions = (x.flatten(0, 1) for x in (path.states[:-1], path.actions[:-1], path.states[1:]))
    log_ratio = model._log_ratio(*transitions).view_as(path.rewards)
    paid = (path.rewards - ways[1].rewards) * model._unit
    each = model._row.log_ratio_weight if nat is None else nat * model._largest_payment
    assert log_ratio.std() > 0
    assert paid.std().item() == pytest.approx(each * log_ratio.std().item(), rel=1e-2)


def test_values_are_told_in_the_units_of_the_rewards(model):
    states = th.zeros(4, 3)
    q_values = th.cat(model.critic_target(states, model.actor(states, deterministic=True)), dim=1)
    assert_close(model._value(states) / model._unit, q_values.amin(dim=1, keepdim=True), atol=0.3, rtol=0.0)


@pytest.mark.parametrize(
    ("objective", "novelty", "slack"), [("mnm-approx", 0.0, 0.0), ("mnm-approx", 0.5, 1.25), ("vmbpo", -0.5, 7.5)]
)
def test_bounds_leave_room_for_what_is_paid_beside_rewards(objective, novelty, slack, monkeypatch):
    soon(monkeypatch)
    model = MnM("MlpPolicy", BoxEnv(), **small(objective=objective, novelty_weight=novelty, real_ratio=0.5))
    # Half of what novelty is paid is left where the world is fitted.
    model.learn(120, callback=lambda names, _: names["self"].num_timesteps < 61)
    rewards = model.replay_buffer.rewards[: model._fitted_at]
    longest = 1 / (1 - model.gamma)
    low, high = min((rewards.min() - slack) * longest, 0), max((rewards.max() + slack) * longest, 0)
    assert model._highest_value == pytest.approx(2 * high - low, rel=1e-4)


def test_the_actors_gradient_flows_through_the_learned_world(model):
    """Each step's reward depends on the actions before: without critics there is a gradient left."""
    model._starts_each = 8
    steps = model._path_from(8)
    (gradient,) = th.autograd.grad(steps.rewards[-1].sum(), model.actor.mu.weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("weight", "remaining", "paid_each"), [(2.0, 1.0, 2.0), (2.0, 0.25, 0.5), (2.0, -0.01, 0.0), (-2.0, 0.25, -2.0)]
)
def test_novelty_is_paid_on_the_way(model, weight, remaining, paid_each):
    """
    The same path with and without: what is earned besides is what there is to learn, less of it late in ``learn``
    where it is sought.
    """
    model._starts_each = 8
    ways = []
    for each in (0.0, weight):
        again = copy.deepcopy(model)
        again.novelty_weight, again._current_progress_remaining = each, remaining
        ways.append(again._path_from(8))
    without, paid = ways
    assert_same(without.states, paid.states)
    pairs = without.states[:-1].flatten(0, 1), without.actions[:-1].flatten(0, 1)
    novelty = model.world.dynamics.novelty(*pairs).clamp(max=5.0).view_as(paid.rewards)
    assert novelty.max() > novelty.min()
    assert_close(paid.rewards - without.rewards, paid_each * novelty / model._unit, atol=1e-5, rtol=1e-3)


def test_temperature_starts_at_a_share_of_the_rewards_unless_it_is_given():
    def first(reward=-30.0, **settings):
        model = MnM("MlpPolicy", BoxEnv(), **small(**settings))
        if model._expands:
            model._scale_to(th.full((10, 1), reward))
            at_first = model.log_ent_coef.exp().item()
            model._scale_to(th.full((10, 1), 2 * reward))
            assert model.log_ent_coef.exp().item() == at_first
        return model.log_ent_coef.exp().item()

    assert first() == pytest.approx(FIRST_ENT_COEF * 30)
    assert first(reward=0.01) == pytest.approx(FIRST_ENT_COEF * 0.01)
    # The critics' unit is at least 1, that of 200 rewards of 0.005.
    assert first(reward=0.0) == first(reward=0.001) == pytest.approx(FIRST_ENT_COEF * 0.005)
    assert first(ent_coef="auto_0.7") == pytest.approx(0.7)
    assert first(expansion=0) == first(real_ratio=1.0) == 1.0


def test_a_learned_temperature_stays_above_a_share_of_the_rewards_where_critics_are_normalised(monkeypatch):
    soon(monkeypatch)

    def lowest(ent_coef="auto", reward=-30.0, critic_layer_norm=True, **settings):
        settings["critic_layer_norm"] = critic_layer_norm
        model = trained(BoxEnv(), 60, ent_coef=ent_coef, **settings)
        if model._expands:
            model._scale_to(th.full((10, 1), reward))
        if model.log_ent_coef is not None:
            model.log_ent_coef.data.fill_(-20.0)
        model.train(gradient_steps=1)
        return model._ent_coef().item() * (model._unit or 1.0)

    assert lowest() == lowest("auto_0.7") == pytest.approx(LEAST_ENT_COEF * 30, rel=0.01)
    assert lowest(0.001) == pytest.approx(0.001)
    for settings in ({"reward": 0.0}, {"critic_layer_norm": False}, {"expansion": 0}, {"real_ratio": 1.0}):
        assert lowest(**settings) < 1e-8


def test_adam_is_calm_where_gradients_are_small_unless_it_is_told_otherwise():
    def epsilons(**settings):
        model = MnM("MlpPolicy", BoxEnv(), **small(**settings))
        return {group["eps"] for part in (model.actor, model.critic) for group in part.optimizer.param_groups}

    assert epsilons() == {EPS}
    assert epsilons(expansion=0) == epsilons(real_ratio=1.0) == {1e-8}
    told = {"net_arch": [8], "optimizer_kwargs": {"eps": 1e-3}}
    assert epsilons(policy_kwargs=told) == {1e-3}
    without = {"net_arch": [8], "optimizer_class": th.optim.SGD}
    assert "eps" not in MnM("MlpPolicy", BoxEnv(), **small(policy_kwargs=without)).actor.optimizer.param_groups[0]


def test_the_actors_rate_falls_further_than_its_critics():
    def rates(**settings):
        model = trained(BoxEnv(), 60, learning_rate=2e-3, **settings)
        pairs = []
        for model._current_progress_remaining in (1.0, 0.5, 0.0):
            model.train(gradient_steps=1)
            pairs.append([part.optimizer.param_groups[0]["lr"] / 2e-3 for part in (model.actor, model.critic)])
        return np.array(pairs)

    np.testing.assert_allclose(rates(), [[1, 1], [0.3**0.5, 1], [0.3, 1]])
    np.testing.assert_allclose(rates(actor_rate=0.25), [[1, 1], [0.5, 1], [0.25, 1]])
    for settings in ({"actor_rate": 1.0}, {"expansion": 0}, {"real_ratio": 1.0}):
        assert (rates(**settings) == 1).all()


@pytest.mark.parametrize("settings", [{"expansion": 5, "real_ratio": 1.0}, {"expansion": 0, "real_ratio": 1.0}])
def test_real_rows_alone_are_sacs(settings, monkeypatch):
    soon(monkeypatch)
    rate = LinearSchedule(1e-3, 1e-4, end_fraction=1.0)
    reference = SAC("MlpPolicy", environments(1), **sac_settings(learning_rate=rate, tau=0.02, gamma=0.995)).learn(130)
    ours = MnM("MlpPolicy", environments(1), **small(**settings)).learn(130)
    assert_same(policy_contents(ours), policy_contents(reference))


def test_rows_and_expansion_of_the_same_seed_differ(monkeypatch):
    soon(monkeypatch)
    a, b = (trained(BoxEnv(), 100, MBPO, expansion=expansion, real_ratio=0.5) for expansion in (0, 2))
    assert not th.equal(weights(a), weights(b))


@pytest.mark.parametrize(
    ("objective", "novelty"),
    [("mbpo", -0.5), ("mnm-approx", 0.0), ("mnm-approx", 0.5), ("mnm", 0.0), ("mnm-approx", "auto")],
)
@pytest.mark.parametrize(("real_ratio", "normalize"), [(0.0, True), (0.5, True), (0.5, False)])
def test_compiled_is_plain(objective, novelty, real_ratio, normalize, uncompiled, monkeypatch):  # noqa: F811
    soon(monkeypatch)
    env = environments(2, BoxEnv, normalize=normalize)
    settings = {"objective": objective, "novelty_weight": novelty, "real_ratio": real_ratio}
    model = trained(env, 160, **settings, reward_shift="auto", compile=False)
    model._current_progress_remaining = 0.25
    if objective == "mbpo":
        model.world.dynamics.foretold[0] = 0
    model._n_telling = 7 if novelty == "auto" else ENOUGH_TELLING
    assert_close_agents(*trained_both_ways(model))


def test_compiled_is_plain_where_the_world_is_cooler(uncompiled, monkeypatch):  # noqa: F811
    soon(monkeypatch)
    cooler = {"net_arch": [8], "end_arch": [8], "temperature": 0.5}
    model = trained(BoxEnv(), 100, real_ratio=0.5, compile=False, dynamics_kwargs=cooler)
    plain, fast = trained_both_ways(model)
    assert_close_agents(plain, fast)
    model.world.dynamics.temperature = 1.0
    without, _ = trained_both_ways(model)
    assert not th.allclose(weights(plain), weights(without))


def test_compiled_is_plain_where_ends_pay(uncompiled, monkeypatch):  # noqa: F811
    soon(monkeypatch)
    model = trained(BoxEnv(), 100, real_ratio=0.5, compile=False)
    without, _ = trained_both_ways(model)
    model.world.dynamics.end_reward.fill_(20.0)
    plain, fast = trained_both_ways(model)
    assert_close_agents(plain, fast)
    assert not th.allclose(weights(plain), weights(without))


def test_compiled_is_plain_where_critics_are_normalised(uncompiled, monkeypatch):  # noqa: F811
    soon(monkeypatch)
    model = trained(BoxEnv(), 100, real_ratio=0.5, compile=False, critic_layer_norm=True)
    plain, fast = trained_both_ways(model)
    assert_close_agents(plain, fast)
    for network in (*model.critic.q_networks, *model.critic_target.q_networks):
        network[0].__class__ = nn.Linear
    without, _ = trained_both_ways(model)
    assert not th.allclose(weights(plain), weights(without))


def test_compiled_is_plain_where_real_rows_alone_are_left(uncompiled, monkeypatch):  # noqa: F811
    soon(monkeypatch)
    model = trained(BoxEnv(), 100, compile=False)
    model._unexplained = 1.0
    plain, fast = trained_both_ways(model)
    assert plain._starts_each == fast._starts_each == 0
    assert plain._unit > 1
    assert_close_agents(plain, fast)


@pytest.mark.parametrize("name", ["termination_fn", "reward_fn"])
def test_the_users_functions_are_asked_on_the_way(name, monkeypatch):
    soon(monkeypatch)
    asked = []

    def function(observations, actions, next_observations):
        asked.append(len(actions))
        return -next_observations.square().sum(dim=1) if name == "reward_fn" else next_observations[:, 0] > 1

    model = trained(BoxEnv(), 70, real_ratio=0.5, expansion=3, **{name: function})
    # 8 starts of a minibatch of 16, three steps each.
    assert asked[-1] == 24
    assert all_finite(model)
    assert "function" in model._uncovered()


# -- what is imagined, and how much of it is used --


def test_what_is_imagined_is_renewed_between_fits(monkeypatch):
    soon(monkeypatch)
    model = trained(BoxEnv(), 100, imagine_freq=20, horizon=4, real_ratio=0.5)
    before = model.world.imagined.rows.observations.clone()
    assert model._fitted_at < 100
    model.learn(25, reset_num_timesteps=False)
    after = model.world.imagined.rows.observations
    # Two rows a step and twenty steps, of the two hundred rows of a hundred steps.
    assert len(after) == len(before) == 200
    assert_same(after[:160], before[40:])


@pytest.mark.parametrize(("unexplained", "share"), [(0.01, 0.1), (0.25, 0.1), (0.3, 0.5), (0.8, 1.0), (3.0, 1.0)])
def test_real_rows_follow_what_is_not_explained(unexplained, share):
    model = MnM("MlpPolicy", BoxEnv(), **small())
    model._unexplained = unexplained
    assert model._real_share == share
    model.real_ratio = 0.2
    assert model._real_share == 0.2


class Noise(BoxEnv):
    """Nothing of what happens can be foreseen."""

    def step(self, action):
        _, _, *rest = super().step(action)
        self.point = self.np_random.normal(size=3)
        return self._observe(self.observation_space), float(self.np_random.normal()), *rest


def test_where_nothing_can_be_learned_real_rows_alone_are_left(monkeypatch):
    soon(monkeypatch)
    model = trained(Noise(), 120)
    assert model._unexplained > 0.75
    assert model._world_log["imagination/real_ratio"] == 1.0
    assert model._starts_each == 0


# -- a collapse --


def test_a_collapse_is_told_once(capsys):
    model = MnM("MlpPolicy", BoxEnv(), **small(verbose=1))
    model._setup_learn(10)
    for mean in (10.0, 100.0, 30.0, 20.0, 100.0):
        model.ep_info_buffer.extend({"r": mean + noise, "l": 1, "t": 0} for noise in np.linspace(-5, 5, 10))
        model._watch_returns()
    told = [line for line in capsys.readouterr().out.splitlines() if "collapsed" in line]
    assert told == [
        "The policy has collapsed: the last 10 episodes earn 30.0, where 100.0 was reached; "
        "load an earlier checkpoint, and lower learning_rate or gradient_steps or raise real_ratio"
    ]
    assert model._world_log["train/kept"] == 1.0


def test_few_episodes_and_chance_are_no_collapse(capsys):
    model = MnM("MlpPolicy", BoxEnv(), **small(verbose=1))
    model._setup_learn(10)
    model.ep_info_buffer.extend({"r": r, "l": 1, "t": 0} for r in range(9))
    model._watch_returns()
    assert "train/kept" not in model._world_log
    for mean in (10.0, 11.0, 10.0):
        model.ep_info_buffer.extend({"r": mean + noise, "l": 1, "t": 0} for noise in np.linspace(-5, 5, 10))
        model._watch_returns()
    assert "collapsed" not in capsys.readouterr().out


@pytest.mark.parametrize("expansion", [-1, 0.5, True, "five"])
def test_a_bad_expansion_is_told(expansion):
    with pytest.raises(ValueError, match=r"^expansion=.* must be 0 for none, or a whole number of at least 1"):
        MnM("MlpPolicy", BoxEnv(), **small(expansion=expansion))


def test_a_saved_agent_keeps_its_unit(model, tmp_path):
    model.save(tmp_path / "agent")
    loaded = MnM.load(tmp_path / "agent")
    assert (loaded._unit, loaded._unexplained) == (model._unit, model._unexplained)
    assert math.isfinite(loaded._lowest_value)
    assert copy.deepcopy(loaded)._unit == model._unit
