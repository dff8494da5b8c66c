"""An environment in which a run dies once: ``mortal:Mortal-v0``, Pendulum in episodes of 20 steps."""

import os
import signal
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

MARKER = "MORTAL_MARKER"  # Names a file that remembers the death; nobody dies where it is not set.
HOME = "MORTAL_HOME"  # Process id of the tests, in which a run is only interrupted.
STEP = 250  # No environment of the evaluations gets there: they play one episode each time.


class Interruption(BaseException):
    """Ends a run in this process, as Ctrl-C does."""


class Mortal(gym.Wrapper[Any, Any, Any, Any]):
    """Its 250th step kills the process, or raises Interruption in the process of the tests themselves."""

    def __init__(self) -> None:
        super().__init__(PendulumEnv())
        self.steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        marker = os.environ.get(MARKER)
        if marker is not None and self.steps == STEP and not os.path.exists(marker):
            with open(marker, "w"):
                pass
            if os.environ.get(HOME) == str(os.getpid()):
                raise Interruption
            os.kill(os.getpid(), signal.SIGKILL)
        return self.env.step(action)


gym.register("Mortal-v0", Mortal, max_episode_steps=20)
