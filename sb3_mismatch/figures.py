"""The learned world in TensorBoard: pictures and histograms every so many fits."""

from typing import TYPE_CHECKING, Any

import torch as th
from stable_baselines3.common.logger import TensorBoardOutputFormat

from sb3_mismatch.buffers import RealTransitions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sb3_mismatch.mnm import ModelBased

#: imagined steps of a picture, real stretches, and state dimensions with a histogram, at most
HORIZON, STARTS, DIMENSIONS = 30, 100, 12


def show_world(model: "ModelBased", data: RealTransitions) -> None:
    """
    Write pictures and histograms of a fitted world to TensorBoard, where the logger has one.

    What is random about them comes from the world's streams, which are then put back to where they were.

    :param data: the rows that the world was fitted to
    """
    writers = [output.writer for output in model.logger.output_formats if isinstance(output, TensorBoardOutputFormat)]
    if not writers:
        return
    with model._at_rest():
        pictures, histograms = world_pictures(model, data), world_histograms(model, data)
    for writer in writers:
        for name, figure in pictures.items():
            writer.add_figure(f"figures/{name}", figure, model.num_timesteps, close=False)
        for name, values in histograms.items():
            writer.add_histogram(name, values, model.num_timesteps)


def world_pictures(model: "ModelBased", data: RealTransitions) -> "dict[str, Figure]":
    """The pictures by name."""
    # Matplotlib takes a while to import: only those who look pay for it.
    from sb3_mismatch.plots import numbers, world

    pictures = {
        "trajectories": world.draw_fan(numbers.fan_of(model, data, HORIZON)),
        "calibration": world.draw_calibration(numbers.calibration_of(model, data)),
        "horizon_error": world.draw_horizon_errors(numbers.horizon_errors_of(model, data, HORIZON, STARTS)),
    }
    if model._row.uses_classifier:
        pictures["log_ratio"] = world.draw_log_ratios(numbers.log_ratios_of(model, data, HORIZON, STARTS))
    return pictures


@th.no_grad()
def world_histograms(model: "ModelBased", data: RealTransitions) -> dict[str, Any]:
    """Values by name, on held-out rows: errors in standard deviations, log-ratios in nats, values of the states."""
    from sb3_mismatch.plots.numbers import held_out_log_ratios, prediction_errors
    from sb3_mismatch.plots.real import held_out

    names, errors = prediction_errors(model, data)
    shown = [*range(min(DIMENSIONS, len(names) - 1)), len(names) - 1]
    histograms: dict[str, Any] = {f"errors/{names[d]}": errors[:, d] for d in shown}
    histograms["values/held_out"] = model._value(held_out(model, data).observations)
    if model._row.uses_classifier:
        histograms["log_ratio/real"], histograms["log_ratio/imagined"] = held_out_log_ratios(model, data)
    return histograms
