"""H: callbacks, logger, TensorBoard."""

import numpy as np
import pytest
import torch as th
from agents import BoxEnv, environments, small, trained
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_mismatch import OBJECTIVES, MnM

SAC_KEYS = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/fps",
    "train/actor_loss",
    "train/critic_loss",
    "train/ent_coef",
    "train/ent_coef_loss",
    "train/learning_rate",
}


def agent(env=None, **settings):
    return MnM("MlpPolicy", env or BoxEnv(), **small(**settings))


class Kept(Logger):
    """Keeps what is dumped."""

    def __init__(self):
        super().__init__(folder=None, output_formats=[])
        self.dumped = []

    def dump(self, step=0):
        self.dumped.append((step, dict(self.name_to_value)))
        super().dump(step)


def test_h1_sacs_keys_keep_their_names_and_meaning(tmp_path):
    model = agent(tensorboard_log=str(tmp_path), use_sde=True)
    model.learn(100, log_interval=1)
    model.logger.close()
    events = EventAccumulator(str(tmp_path / "MnM_1"))
    events.Reload()
    assert SAC_KEYS | {"train/std"} <= set(events.Tags()["scalars"])
    # Real episodes alone, at real steps.
    assert [event.step for event in events.Scalars("rollout/ep_len_mean")] == [20, 40, 60, 80, 100]
    assert {event.value for event in events.Scalars("rollout/ep_len_mean")} == {20}
    ours = {name.split("/")[0] for name in set(events.Tags()["scalars"]) - SAC_KEYS}
    assert ours == {"dynamics", "classifier", "imagination", "train"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_h2_no_keys_collide_on_the_console(objective, capsys):
    agent(objective=objective, verbose=1, reward_shift="auto").learn(80, log_interval=1)
    printed = capsys.readouterr().out
    for key in ("state_error", "unexplained", "horizon", "critic_loss", "ep_rew_mean"):
        assert key in printed


def test_h2_the_console_stays_empty_otherwise(capsys):
    agent().learn(80, log_interval=1)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_h3_rare_events_stand_in_every_dump():
    model, logger = agent(model_train_freq=1000), Kept()
    model.set_logger(logger)
    model.learn(140, log_interval=1)
    assert [step for step, values in logger.dumped if "dynamics/nll" in values] == [60, 80, 100, 120, 140]
    assert [step for step, values in logger.dumped if "train/critic_loss" in values] == [60, 80, 100, 120, 140]


def test_h4_logging_by_steps_and_no_interval():
    model, logger = agent(), Kept()
    model.set_logger(logger)
    model.learn(90, LogEveryNTimesteps(n_steps=30), log_interval=None)
    assert [step for step, _ in logger.dumped] == [30, 60, 90]


def test_h5_logs_are_named_after_the_class(tmp_path):
    class Own(MnM):
        pass

    model = Own("MlpPolicy", BoxEnv(), **small(tensorboard_log=str(tmp_path)))
    model.learn(10).logger.close()
    model.learn(10).logger.close()
    assert {path.name for path in tmp_path.iterdir()} == {"Own_1", "Own_2"}


@pytest.mark.parametrize("stop", [False, np.bool_(0), th.tensor(False)])
def test_h6_a_callback_that_returns_false_stops_at_once(stop):
    model = agent(buffer_size=1, batch_size=1)
    model.learn(100, callback=lambda local, glob: stop)
    assert model.num_timesteps == 1


def test_h6_the_smallest_buffer_and_batch():
    model = agent(buffer_size=1, batch_size=1, learning_starts=0).learn(10)
    assert model._n_updates == 10


def test_h7_every_way_to_stop():
    evaluation = environments(1, BoxEnv)
    none_better = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    stops = {
        StopTrainingOnMaxEpisodes(max_episodes=3): 60,
        EvalCallback(
            evaluation,
            callback_on_new_best=StopTrainingOnRewardThreshold(reward_threshold=-1000),
            eval_freq=30,
            n_eval_episodes=1,
            verbose=0,
        ): 30,
    }
    for callback, steps in stops.items():
        assert agent().learn(200, callback).num_timesteps == steps
    # The policy stands still, and so does its return: of three evaluations two are no better.
    model = agent(learning_rate=0.0, learning_starts=1000)
    still = EvalCallback(
        environments(1, Still), callback_after_eval=none_better, eval_freq=10, n_eval_episodes=1, verbose=0
    )
    assert model.learn(200, still).num_timesteps == 30


class Still(BoxEnv):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, -1.0, *rest


def test_h8_attributes_are_told_in_few_words():
    model = trained(BoxEnv(), 100)
    for name, value in vars(model).items():
        if name not in ("policy", "actor", "critic", "critic_target", "ep_info_buffer", "batch_norm_stats"):
            assert len(str(value)) < 2000, name


def test_g15_checkpoints_with_buffer_and_statistics(tmp_path):
    model = agent(VecNormalize(environments(2, BoxEnv)))
    callback = CheckpointCallback(30, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True)
    model.learn(120, callback)
    names = {path.name for path in tmp_path.iterdir()}
    for steps in (60, 120):
        assert f"rl_model_{steps}_steps.zip" in names
        assert f"rl_model_replay_buffer_{steps}_steps.pkl" in names
        assert f"rl_model_vecnormalize_{steps}_steps.pkl" in names
    statistics = VecNormalize.load(str(tmp_path / "rl_model_vecnormalize_60_steps.pkl"), environments(2, BoxEnv))
    model = MnM.load(tmp_path / "rl_model_60_steps", env=statistics, device="cpu")
    model.load_replay_buffer(tmp_path / "rl_model_replay_buffer_60_steps")
    # A step is stored behind the callback.
    assert (model.num_timesteps, model.replay_buffer.size()) == (60, 29)
    assert model.learn(60, reset_num_timesteps=False).num_timesteps == 120


def test_g15_evaluation_keeps_the_best_model(tmp_path):
    callback = EvalCallback(
        environments(1, BoxEnv),
        eval_freq=40,
        n_eval_episodes=2,
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        verbose=0,
    )
    logger = Kept()
    model = agent()
    model.set_logger(logger)
    model.learn(100, CallbackList([callback, LogEveryNTimesteps(n_steps=45)]))
    assert {"eval/mean_reward", "eval/mean_ep_length"} <= set(logger.dumped[0][1])
    assert MnM.load(tmp_path / "best_model", device="cpu").num_timesteps in (40, 80)
    assert np.load(tmp_path / "evaluations.npz")["timesteps"].tolist() == [40, 80]


def test_d2_progress_bar(capsys):
    model = agent().learn(60, progress_bar=True)
    assert model.num_timesteps == 60
    assert "60/60" in capsys.readouterr().out.replace(" ", "")


def test_h1_logs_are_read_back_from_every_format(tmp_path):
    model = agent()
    model.set_logger(configure(str(tmp_path), ["csv", "json", "log"]))
    model.learn(80, log_interval=1)
    model.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    assert "dynamics/nll" in header
    assert '"dynamics/nll"' in (tmp_path / "progress.json").read_text().splitlines()[-1]
    assert (tmp_path / "log.txt").read_text().count("state_error") == 2
