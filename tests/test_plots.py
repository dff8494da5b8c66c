"""The pictures: their numbers beside known ones, what they refuse, and what TensorBoard's files hold of them."""

import importlib.util
import io
import re
import sys
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch as th
from agents import BoxEnv, assert_same, environments, policy_contents, small, soon, trained, world_contents
from gymnasium import spaces
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import norm
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import collected, counters, rows_of

from sb3_mismatch import MBPO, MnM, figures, plots
from sb3_mismatch.buffers import real_transitions
from sb3_mismatch.observations import FlatObservations
from sb3_mismatch.plots import logs, numbers, real, world

ROOT = Path(__file__).parent.parent
OF_A_WORLD = {"trajectories", "log_ratio", "calibration", "horizon_error"}


# -- numbers --


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0], ids=lambda factor: f"std times {factor}")
def test_coverage_of_a_gaussian(factor):
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(1, 20_000, 2)), np.array([0.1, 3.0]) * np.ones((1, 20_000, 2))
    targets = mean[0] + std[0] * rng.normal(size=mean[0].shape)
    observed = numbers.coverage(mean, factor * std, targets, numbers.LEVELS)
    # P(|z| < factor q) where q is the normal's quantile of the level.
    expected = 2 * norm.cdf(factor * norm.ppf(0.5 + numbers.LEVELS / 2)) - 1
    np.testing.assert_allclose(observed, np.repeat(expected[:, None], 2, axis=1), atol=0.015)


def test_coverage_of_a_mixture():
    # Two members far apart: half of the mass is below what lies between them, and its central share is nothing.
    mean = np.array([-10.0, 10.0]).reshape(2, 1, 1)
    between, at_the_lower = (
        numbers.coverage(mean, np.ones_like(mean), np.full((1, 1), target), np.array([0.0, 0.4, 0.6]))[:, 0]
        for target in (0.0, -10.0)
    )
    np.testing.assert_array_equal(between, [1, 1, 1])
    np.testing.assert_array_equal(at_the_lower, [0, 0, 1])  # F = 1/4, in intervals of a half and more


def test_errors_are_root_mean_squares_in_units_of_the_scale():
    imagined, truth = np.zeros((2, 1, 2)), np.array([[[0.0, 0.0]], [[3.0, 8.0]]])
    np.testing.assert_allclose(numbers.errors(imagined, truth, np.array([1.0, 2.0])), [[0.0], [np.sqrt(12.5)]])


def test_bands_leave_out_what_does_not_count():
    values = np.array([[0.0, 1.0, 2.0, 100.0], [5.0, 6.0, 7.0, 8.0]])
    found = numbers.bands(values, np.array([[True, True, True, False], [False] * 4]))
    np.testing.assert_allclose(found[0], [0.1, 0.5, 1.0, 1.5, 1.9])
    assert np.isnan(found[1]).all()


def test_interval_of_the_mean_is_students():
    mean, half = numbers.mean_and_interval(np.array([[1.0, 0.0], [3.0, 0.0]]))
    np.testing.assert_allclose(mean, [2.0, 0.0])
    np.testing.assert_allclose(half, [12.7062, 0.0], atol=1e-4)  # t of one degree of freedom
    mean, half = numbers.mean_and_interval(np.array([[4.0]]))
    assert mean == 4
    assert np.isnan(half)


@pytest.mark.parametrize("size", [1000, 50], ids=["partly filled", "wrapped round"])
def test_stretches_follow_each_other_in_one_episode(size):
    # The counter observes its name, its episode and its step; episodes have 3 or 4 steps.
    env = counters(2)
    buffer = collected(env, 60, size=size)
    data = real_transitions(buffer, FlatObservations(env.observation_space), th.device("cpu"))
    for steps in (1, 3, 4):
        observations = real.stretches(buffer, data, steps).observations.numpy()
        assert observations.shape[1] > 5
        assert (observations[:, :, :2] == observations[0, :, :2]).all()
        assert (observations[:, :, 2] - observations[0, :, 2] == np.arange(steps + 1)[:, None]).all()
        # In the order they were played.
        assert all((np.diff(observations[0, observations[0, :, 0] == name, 1]) >= 0).all() for name in (0, 1))
    # No longer than the longest, and as many as asked for, the first and the last among them.
    assert len(real.stretches(buffer, data, 50).actions) == 4
    everything, few = (real.stretches(buffer, data, 3, most).observations for most in (None, 4))
    assert few.shape[1] == 4
    assert_same(few[:, [0, 3]], everything[:, [0, -1]])


def test_names_of_dimensions():
    assert real.names(FlatObservations(spaces.Box(-1, 1, (2,)))) == ["s[0]", "s[1]"]
    assert real.names(FlatObservations(spaces.Box(-1, 1, (1, 2)))) == ["s[0, 0]", "s[0, 1]"]
    both = spaces.Dict({"a": spaces.Box(-1, 1, (1,)), "b": spaces.Box(-1, 1, (2,))})
    assert real.names(FlatObservations(both)) == ["a[0]", "b[0]", "b[1]"]


class Drift(BoxEnv):
    """s' = s + 0.1, whatever is done."""

    def step(self, action):
        *_, terminated, truncated, info = super().step(action)
        self.at = (self.at + np.float32(0.1)).astype(np.float32)
        return self.at, 0.0, terminated, truncated, info

    def reset(self, **kwargs):
        _, info = super().reset(**kwargs)
        self.at = np.zeros(3, np.float32)
        return self.at, info


def perfect(monkeypatch, drift=0.1, **settings):
    """A model whose dynamics say s' = s + drift and are sure of it; the true drift is 0.1."""
    soon(monkeypatch)
    model = trained(Drift(), **settings)
    dynamics = model.world.dynamics
    with th.no_grad():
        for parameter in dynamics.body.parameters():
            parameter.zero_()
        dynamics.min_log_var.fill_(-60)
        dynamics.max_log_var.fill_(-60)
        dynamics.targets.mean[:3] = drift
    return model


def test_a_perfect_model_has_no_error(monkeypatch):
    model = perfect(monkeypatch)
    data = real.real_data(model, "")
    found = numbers.horizon_errors_of(model, data, 10, 5)
    np.testing.assert_allclose(found.imagined, 0, atol=1e-5)
    assert (found.alive == 1).all()
    # All dimensions are alike: the guess that nothing changes is wrong by the drift.
    scale = model.world.dynamics.next_observations.std[0].item()
    np.testing.assert_allclose(found.unchanged, np.repeat(0.1 * np.arange(11.0)[:, None] / scale, 5, axis=1), rtol=1e-4)
    fan = numbers.fan_of(model, data, 10)
    np.testing.assert_allclose(fan.imagined, fan.real, atol=1e-4)
    np.testing.assert_allclose(fan.members, np.broadcast_to(fan.real, fan.members.shape), atol=1e-4)
    assert fan.alive == 10


def test_an_imperfect_model_errs_by_as_much_as_it_drifts(monkeypatch):
    model = perfect(monkeypatch, drift=0.13)
    found = numbers.horizon_errors_of(model, real.real_data(model, ""), 5, 5)
    scale = model.world.dynamics.next_observations.std[0].item()
    np.testing.assert_allclose(found.imagined[:, 2], 0.03 * np.arange(6) / scale, rtol=1e-3, atol=1e-5)


def test_states_behind_an_imagined_end_do_not_count(monkeypatch):
    # Imagined episodes end on the way, and stand still behind their end: there they would be wrong.
    model = perfect(monkeypatch, termination_fn=lambda s, a, t: t[:, 0] > 0.75)
    found = numbers.horizon_errors_of(model, real.real_data(model, ""), 6, 30)
    assert (found.alive[0], found.alive[-1]) == (1, pytest.approx(1 / 6, abs=0.15))
    np.testing.assert_allclose(found.imagined[found.alive > 0], 0, atol=1e-5)
    assert model.imagine(np.full(3, 0.7, np.float32), 3).alive[:, 0].tolist() == [True, False, False]


def test_sides_of_the_log_ratio(monkeypatch):
    # A classifier whose log p/q is the change of the first dimension: 0.1 where real, 0.13 where imagined.
    model = perfect(monkeypatch, drift=0.13)
    monkeypatch.setattr(model.world.classifier, "log_ratio", lambda s, a, t: (t - s)[..., :1])
    found = numbers.log_ratios_of(model, real.real_data(model, ""), 5, 7)
    for values, expected in ((found.real, 0.1), (found.imagined, 0.13)):
        np.testing.assert_allclose(values, expected, atol=1e-3)
    for quantiles, expected in ((found.along_real, 0.1), (found.along_imagined, 0.13)):
        np.testing.assert_allclose(quantiles, np.full((5, 5), expected), atol=1e-3)


@pytest.mark.parametrize("factor", [1.0, 0.5], ids=["as they are", "too small by half"])
def test_calibration_of_known_noise(factor, monkeypatch):
    model = perfect(monkeypatch, fit_kwargs={"dynamics_steps": 5, "classifier_steps": 2, "max_holdout": 4000})
    dynamics, noise = model.world.dynamics, th.tensor([0.05, 0.2, 0.4, 0.1])
    targets = th.tensor([0.1, 0.1, 0.1, 0.0]) + noise * th.randn(20_000, 4, generator=th.Generator().manual_seed(0))
    with th.no_grad():
        dynamics.min_log_var.fill_(-30)
        dynamics.max_log_var.fill_(30)
        dynamics.targets.mean[3] = 0
        dynamics.body.layers[-1].bias[..., 4:] = 2 * (factor * noise / dynamics.targets.std).log() / 5
    states = th.zeros(20_000, 3)
    data = rows_of(states, th.zeros(20_000, 2), targets[:, :3], targets[:, 3:])
    found = numbers.calibration_of(model, data)
    expected = 2 * norm.cdf(factor * norm.ppf(0.5 + found.levels / 2)) - 1
    np.testing.assert_allclose(found.observed, np.repeat(expected[:, None], 4, axis=1), atol=0.04)
    assert found.n == pytest.approx(4000, abs=1)
    assert found.names == ["s[0]", "s[1]", "s[2]", "reward"]


def test_held_out_rows_are_those_of_the_fit(monkeypatch):
    soon(monkeypatch)
    seen = []
    fit = MnM._fit_dynamics
    monkeypatch.setattr(MnM, "_fit_dynamics", lambda self, data: seen.append(data) or fit(self, data))
    model = trained(steps=100)
    held = real.held_out(model, seen[-1])
    everything = seen[-1].batch.observations
    assert 0 < len(held.observations) < 0.3 * len(everything)
    # The scales of the inputs are those of the other rows.
    others = everything[~(everything[:, None] == held.observations).all(-1).any(1)]
    th.testing.assert_close(model.world.dynamics.inputs.mean[:3], others.mean(0))


# -- pictures of a world --


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as monkeypatch:
        soon(monkeypatch)
        return trained(BoxEnv(length=30, high=2.0), 150)


@pytest.mark.parametrize("name", sorted(OF_A_WORLD))
def test_pictures_of_a_world(model, name):
    before = [world_contents(model), policy_contents(model), th.get_rng_state(), np.random.get_state()[1].copy()]
    figure = getattr(plots, name)(model)
    assert isinstance(figure, Figure)
    assert_labelled(figure)
    # Neither the model nor any random stream is another, and the next picture is the same.
    after = [world_contents(model), policy_contents(model), th.get_rng_state(), np.random.get_state()[1]]
    assert_same(after, before)
    assert png(figure) == png(getattr(plots, name)(model))
    assert plt.get_fignums() == []


def assert_labelled(figure: Figure) -> None:
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes if axes.get_visible()]
    assert figure.get_supxlabel() or any(x for x, _ in labels)
    assert figure.get_supylabel() or all(y for _, y in labels)


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file)
    assert len(file.getvalue()) < 200_000
    return file.getvalue()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (3, 5), np.float64),
        spaces.Dict({"a": spaces.Box(-np.inf, np.inf, (2,)), "b": spaces.Box(-np.inf, np.inf, (1,))}),
    ],
    ids=["a matrix", "a dict"],
)
def test_spaces_of_other_forms(space, monkeypatch):
    soon(monkeypatch)
    model = trained(environments(2, lambda: BoxEnv(space, (2, 1)), normalize=True), 80)
    for name in OF_A_WORLD:
        getattr(plots, name)(model, **({} if name == "calibration" else {"horizon": 5}))
    panels = [axes for axes in plots.trajectories(model, first=1).axes if axes.get_visible()]
    assert len(panels) == min(12, model.world.observations.dim - 1)


def test_pictures_show_their_numbers():
    fan = numbers.Fan(["s[0]"], np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]]), np.zeros((2, 2, 1)), 0)
    lines = world.draw_fan(fan).axes[0].lines
    assert [tuple(line.get_ydata()) for line in lines[:4]] == [(0,), (0,), (0,), (0, 1)]
    assert lines[4].get_xdata()[0] == 0  # where the imagined episode ends
    observed = np.array([[0.2, 0.4], [0.8, 1.0]])
    lines = world.draw_calibration(numbers.Calibration(["s[0]", "reward"], np.array([0.3, 0.9]), observed, 7)).axes[0]
    np.testing.assert_allclose(lines.lines[-1].get_ydata(), [0.3, 0.9])  # the mean over targets


def test_a_figure_of_what_is_missing_is_refused_with_a_sentence(monkeypatch, model):
    soon(monkeypatch)
    untrained = MnM("MlpPolicy", BoxEnv(), **small())
    with pytest.raises(ValueError, match=r"plots\.calibration\(\) needs a learned world and none has been fitted"):
        plots.calibration(untrained)
    with pytest.raises(TypeError, match=r"plots\.horizon_error\(\) was given SAC, which learns no world"):
        plots.horizon_error(SAC("MlpPolicy", BoxEnv(), buffer_size=10))
    file = io.BytesIO()
    model.save(file)
    with pytest.raises(ValueError, match=r"model\.replay_buffer is empty .* model\.load_replay_buffer\(path\)"):
        plots.trajectories(MnM.load(file))
    with pytest.raises(ValueError, match="objective='mbpo' trains no classifier"):
        plots.log_ratio(trained(BoxEnv(), 80, kind=MBPO))
    with pytest.raises(IndexError, match=r"start=999: there are \d+ real stretches of 4 steps"):
        plots.trajectories(model, horizon=4, start=999)
    with pytest.raises(IndexError, match="first=3: the dimensions go from 0 to 2"):
        plots.trajectories(model, first=3)
    with pytest.raises(ValueError, match="horizon=0 must be a whole number"):
        plots.horizon_error(model, horizon=0)


# -- pictures of a run --


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What examples/pictures.py leaves of two short runs of small agents: the runs' folder and the pictures'."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "examples" / "pictures.py")
    sys.modules["pictures"] = pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    gym.register("Box-v0", lambda: BoxEnv(length=20), disable_env_checker=True)
    out = tmp_path_factory.mktemp("pictures")
    settings = {name: value for name, value in small(model_train_freq=50).items() if name != "device"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        soon(monkeypatch)
        for name, given in pictures.RUNS.items():
            monkeypatch.setitem(pictures.RUNS, name, {**settings, **given, "horizon": [60, 200, 1, 4]})
        pictures.main(["--runs", str(out / "runs"), "--out", str(out / "images"), "--env", "Box-v0", "--steps", "240"])
    yield out
    gym.registry.pop("Box-v0")


def test_example_draws_every_picture(runs):
    names = {path.stem for path in (runs / "images").glob("*.png")}
    assert names == set(plots.__all__)
    shown = (ROOT / "docs" / "plots.md").read_text(encoding="utf-8")
    for name in plots.__all__:
        assert f"](images/{name}.png)" in shown
        assert f"autofunction:: sb3_mismatch.plots.{name}\n" in shown
        assert (ROOT / "docs" / "images" / f"{name}.png").stat().st_size < 100_000


def test_logs_in_both_forms_hold_the_same(runs):
    keys = ("imagination/horizon", "objective/lower_bound", "rollout/ep_rew_mean")
    events = next((runs / "runs" / "mnm").glob("events*"))
    of_csv, of_events = (logs.read_scalars(path, keys) for path in (runs / "runs" / "mnm", events))
    for key in keys:
        np.testing.assert_allclose(of_csv[key], of_events[key], rtol=1e-6)
    horizon = of_csv["imagination/horizon"]
    assert (horizon[0, 1], horizon[-1, 1]) == (1, 4)
    axes = plots.schedules(runs / "runs" / "mnm").axes
    np.testing.assert_array_equal(axes[1].lines[0].get_xydata(), horizon)
    assert set(axes[0].lines[0].get_ydata()) <= {0.1, 0.5, 1.0}
    lines = plots.bound(events).axes[0].lines
    np.testing.assert_allclose(lines[1].get_xydata(), of_csv["objective/lower_bound"], rtol=1e-6)
    np.testing.assert_array_less(lines[1].get_ydata()[-1], lines[0].get_ydata()[-1])


def test_logs_that_do_not_serve_are_refused(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log='nowhere' is no progress\.csv"):
        plots.schedules("nowhere")
    with pytest.raises(ValueError, match=r"holds no objective/lower_bound.*only objectives .* objective='mnm'"):
        plots.bound(runs / "runs" / "defaults")
    with pytest.raises(FileNotFoundError, match=r"run='nowhere' is no evaluations\.npz"):
        plots.learning_curves({"MnM": ["nowhere"]})
    with pytest.raises(ValueError, match="names no run"):
        plots.learning_curves({"MnM": []})
    with pytest.raises(ValueError, match=r"level=95 must lie between 0 and 1"):
        plots.learning_curves({"MnM": [runs / "runs" / "mnm"]}, level=95)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has columns \['a', 'b'\]"):
        logs.read_returns(tmp_path / "other.csv")
    (tmp_path / "monitor.csv").write_text("#{}\nr,l,t\n")
    with pytest.raises(ValueError, match="holds no episode yet"):
        logs.read_returns(tmp_path)


def test_returns_of_every_kind_of_file(runs):
    folder = runs / "runs" / "defaults"
    with np.load(folder / "evaluations.npz") as held:
        expected = np.column_stack([held["timesteps"], held["results"].mean(1)])
    np.testing.assert_allclose(logs.read_returns(folder), expected)
    lines = (folder / "monitor.csv").read_text().splitlines()[2:]
    returns = [float(line.split(",")[0]) for line in lines]
    monitored = logs.read_returns(folder / "monitor.csv", window=3)
    np.testing.assert_allclose(monitored[:, 0], 20.0 * np.arange(3, len(lines) + 1))
    np.testing.assert_allclose(monitored[-1, 1], np.mean(returns[-3:]))
    benchmark = ROOT / "docs/results/pendulums/InvertedPendulum-v5/mnm-rows/seed0.csv"
    assert tuple(logs.read_returns(benchmark)[0]) == (250, 107.9)


def test_learning_curves_are_means_over_seeds_on_common_steps(tmp_path):
    # Two lines, seen at different steps: between 20 and 40 both are known.
    for name, steps, slope in (("a", [0, 20, 40], 1.0), ("b", [20, 30, 50], 3.0)):
        np.savez(tmp_path / name, timesteps=steps, results=np.outer(steps, [slope, slope]))
    figure = plots.learning_curves({"ours": [tmp_path / "a.npz", tmp_path / "b.npz"], "one": tmp_path / "a.npz"})
    axes = figure.axes[0]
    mean = next(line for line in axes.lines if line.get_label() == "ours, 2 seeds")
    np.testing.assert_allclose(mean.get_xdata()[[0, -1]], [20, 40])
    np.testing.assert_allclose(mean.get_ydata(), 2 * mean.get_xdata())
    edge = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    np.testing.assert_allclose(edge, 40 * (2 + 12.7062), rtol=1e-5)
    assert len(axes.collections) == 1  # none about a single seed
    np.savez(tmp_path / "c.npz", timesteps=[90], results=[[1.0]])
    with pytest.raises(ValueError, match="share no environment step: one begins at 90 and one ends at 40"):
        plots.learning_curves({"ours": [tmp_path / "a.npz", tmp_path / "c.npz"]})


# -- TensorBoard --


def events(folder) -> EventAccumulator:
    found = EventAccumulator(str(next(Path(folder).glob("**/events*"))), {"images": 0, "histograms": 0, "scalars": 0})
    return found.Reload()


def test_tensorboard_holds_pictures_and_histograms(monkeypatch, tmp_path):
    soon(monkeypatch)
    model = trained(BoxEnv(length=30), 140, model_train_freq=25, figures_every=2, tensorboard_log=str(tmp_path))
    assert model._n_fits == 4
    found = events(tmp_path)
    tags = found.Tags()
    assert set(tags["images"]) == {f"figures/{name}" for name in OF_A_WORLD}
    for tag in tags["images"]:
        pictures = found.Images(tag)
        assert [picture.step for picture in pictures] == [85, 135]  # of every second fit, the first at 60 rows
        pixels = np.asarray(Image.open(io.BytesIO(pictures[-1].encoded_image_string)))
        assert pixels.shape == (pictures[-1].height, pictures[-1].width, 3)
        assert 0.5 < (pixels == 255).mean() < 0.99  # white paper, and something on it
    errors = {"errors/s[0]", "errors/s[1]", "errors/s[2]", "errors/reward"}
    assert set(tags["histograms"]) == {*errors, "log_ratio/real", "log_ratio/imagined", "values/held_out"}
    data = real.real_data(model, "")
    held = len(real.held_out(model, data).observations)
    for tag in tags["histograms"]:
        histogram = found.Histograms(tag)[-1]
        assert 0 < histogram.histogram_value.num <= held
        assert np.isfinite([histogram.histogram_value.min, histogram.histogram_value.max]).all()


def test_imagination_plays_the_actions_that_were_played(model):
    stretches = real.stretches(model.replay_buffer, model._real_transitions(), 5, 3)
    imagined = numbers.follow(model, stretches)
    assert imagined.alive.all()
    np.testing.assert_allclose(imagined.actions, 2 * stretches.actions, rtol=1e-5)  # the space goes from -2 to 2
    assert np.abs(imagined.actions).min() > 0
    np.testing.assert_array_equal(imagined.observations[0], stretches.observations[0])


def test_histograms_hold_the_errors_of_the_elites(model):
    data = model._real_transitions()
    names, found = numbers.prediction_errors(model, data)
    held, dynamics = real.held_out(model, data), model.world.dynamics
    stacked = (column.expand(dynamics.n_members, -1, -1) for column in held[:3])
    observations, actions, next_observations = stacked
    with th.no_grad():
        mean = dynamics(observations, actions).mean[dynamics.elites].mean(0) * dynamics.targets.std
    predicted = held.observations + mean[:, :3] + dynamics.targets.mean[:3]
    error = (predicted - next_observations[0]) / dynamics.targets.std[:3]
    np.testing.assert_allclose(found[:, :3], error, atol=1e-4)
    assert names == ["s[0]", "s[1]", "s[2]", "reward"]


@pytest.mark.parametrize("settings", [{}, {"kind": MBPO, "use_sde": True, "sde_sample_freq": 4}], ids=str)
def test_pictures_change_no_draw(settings, monkeypatch, tmp_path):
    soon(monkeypatch)
    drawn = []
    pictures = figures.world_pictures
    monkeypatch.setattr(figures, "world_pictures", lambda *given: drawn.append(1) or pictures(*given))
    with_them = trained(steps=130, model_train_freq=30, figures_every=2, tensorboard_log=str(tmp_path), **settings)
    assert (len(drawn), with_them._n_fits) == (1, 3)
    without = trained(steps=130, model_train_freq=30, figures_every=0, tensorboard_log=str(tmp_path), **settings)
    no_writer = trained(steps=130, model_train_freq=30, figures_every=2, **settings)
    assert len(drawn) == 1
    for other in (without, no_writer):
        assert_same(policy_contents(with_them), policy_contents(other))
        assert_same(world_contents(with_them), world_contents(other))


def test_fits_are_counted_over_a_zip(monkeypatch, tmp_path):
    soon(monkeypatch)
    model = trained(steps=100, figures_every=2)
    assert model._n_fits == 1
    file = io.BytesIO()
    model.save(file)
    loaded = MnM.load(file, env=gym.make("Pendulum-v1"), figures_every=2)
    loaded.replay_buffer = model.replay_buffer
    loaded.set_logger(configure(str(tmp_path), ["tensorboard"]))
    loaded._fitted_at = None
    loaded.learn(1, reset_num_timesteps=False)
    assert loaded._n_fits == 2
    assert len(events(tmp_path).Tags()["images"]) == len(OF_A_WORLD)


@pytest.mark.parametrize("value", [-1, 2.5, True, "often", None])
def test_figures_every_is_checked(value):
    message = re.escape(f"figures_every={value!r} must be 0 for none, or a whole number of at least 1")
    with pytest.raises(ValueError, match=message):
        MnM("MlpPolicy", BoxEnv(), **small(figures_every=value))
