"""A training process is killed at random moments and continued; nothing that was completed is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("kills", [8, pytest.param(40, marks=pytest.mark.expensive)])
def test_killed_at_random_moments_it_continues_and_ends_where_an_uninterrupted_run_ends(kills, tmp_path):
    script = Path(__file__).parent / "killing.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path, str(kills), "0"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["kills"] == kills
    assert told["amid_writing"] > 0
    assert told["older"] == 0
    assert told["ends_equal"]
    assert all(told["ends_equal"])
    # What was half-written is gone.
    assert all(Path(name).name.startswith("step_") for name in told["files"])
    assert len(told["files"]) == 2 * len(told["ends_equal"])
