"""``python -m sb3_mismatch inspect model.zip``: what is in a saved agent, and how well its world predicts."""

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence

import gymnasium as gym

from sb3_mismatch import inspection
from sb3_mismatch.settings import check_count


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command of the package.

    :param arguments: ``None``: those of the command line
    :return: 0, or 2 where the input does not serve
    """
    parser = argparse.ArgumentParser(prog="python -m sb3_mismatch")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "inspect",
        help="what is in a saved agent, and how well its world predicts",
        description="Prints what is in a saved agent and how well its world predicts, on transitions of a replay "
        "buffer or of fresh episodes. Loading a zip or a buffer executes the pickles in it: open only files that you "
        "trust.",
    )
    command.add_argument("zip", type=pathlib.Path, help="what model.save() wrote")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--buffer", type=pathlib.Path, help="replay buffer; default: the one beside the zip, if any")
    source.add_argument("--env", help="Gymnasium id of an environment to play fresh episodes in")
    command.add_argument("--steps", type=int, default=1000, help="environment steps to play (default: 1000)")
    asked = parser.parse_args(arguments)
    try:
        texts = list(_inspected(asked.zip, asked.buffer, asked.env, asked.steps))
    except (OSError, TypeError, ValueError, gym.error.Error) as error:
        print(f"{parser.prog} inspect: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(texts))
    return 0


def _inspected(path: pathlib.Path, buffer: pathlib.Path | None, env_id: str | None, steps: int) -> Iterator[str]:
    """What there is to say, part by part."""
    model = inspection.load(path)
    check_count("--steps", steps)
    yield inspection.about_agent(model, path)
    yield inspection.about_settings(model)
    if model._fitted_at is None:
        yield "There is no learned world in it."
        return
    yield inspection.about_members(model)
    buffer = buffer or inspection.buffer_beside(path)
    if env_id is not None:
        inspection.play(model, env_id, steps)
        source = f"of fresh episodes in {env_id}"
    elif buffer is not None:
        inspection.take_buffer(model, buffer)
        source = f"of {buffer.name}, held out"
    else:
        yield "How well the world predicts needs real transitions: pass --buffer replay_buffer.pkl or --env ID."
        return
    data = model._real_transitions()
    yield inspection.about_prediction(inspection.prediction(model, data, fresh=env_id is not None), source)
    yield inspection.about_horizon(model, data)


if __name__ == "__main__":
    sys.exit(main())
