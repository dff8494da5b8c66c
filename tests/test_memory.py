"""The measurement of a long run's memory: its growth by hand, and a short run through the command."""

import pytest
import torch as th

from sb3_mismatch.benchmarks.__main__ import main
from sb3_mismatch.benchmarks.memory import Usage, growth, memory_mb, open_handles, read_usage

th.set_num_threads(1)


def rows(megabytes, handles=(7,) * 6, lines=(0, 2, 4, 6, 8, 10)):
    highest = [max(megabytes[: i + 1]) for i in range(len(megabytes))]
    columns = zip(megabytes, highest, handles, lines, strict=False)
    return [Usage(1000 * i, mb, most, handle, 2, line) for i, (mb, most, handle, line) in enumerate(columns)]


def test_growth_is_that_of_the_last_third_over_the_third_before():
    grown = growth(rows([10.0, 90.0, 50.0, 60.0, 70.0, 40.0]))
    # (70 + 40) / 2 - (50 + 60) / 2; 90 stood before both.
    assert grown == (0.0, 0.0, 0, 0, 0)
    assert grown.passes


@pytest.mark.parametrize(
    ("measured", "grown"),
    [
        (rows([10.0, 90.0, 50.0, 50.0, 55.0, 55.0]), (5.0, 0.0, 0, 0, 0)),
        (rows([10.0, 20.0, 50.0, 50.0, 45.0, 55.0]), (0.0, 5.0, 0, 0, 0)),
        (rows([10.0] * 6, handles=(7, 7, 7, 7, 8, 8)), (0.0, 0.0, 1, 0, 0)),
        (rows([10.0] * 6, lines=(0, 2, 4, 6, 9, 12)), (0.0, 0.0, 0, 0, 2)),
    ],
    ids=["memory", "highest memory", "handles", "log lines"],
)
def test_what_grows_does_not_pass(measured, grown):
    assert growth(measured) == grown
    assert not growth(measured).passes


def test_a_third_of_nothing_is_told():
    with pytest.raises(ValueError, match="take more steps"):
        growth(rows([1.0] * 5))


def test_memory_and_handles_are_those_of_the_process(tmp_path):
    before, handles = memory_mb()[0], open_handles()
    held = th.ones(2**24)  # 64 megabytes
    assert 60 < memory_mb()[0] - before < 70
    del held
    assert memory_mb()[0] - before < 5
    with (tmp_path / "file").open("w"):
        assert open_handles() == handles + 1


def test_a_short_run_by_the_command(tmp_path, capsys):
    main(["memory", "--steps", "180", "--every", "30", "--buffer-size", "60", "--out", str(tmp_path / "out")])
    measured = read_usage(tmp_path / "out" / "pendulum.csv")
    assert [usage.step for usage in measured] == [30, 60, 90, 120, 150, 180]
    assert all(usage.highest_mb >= usage.resident_mb > 50 for usage in measured)
    told = capsys.readouterr().out
    assert "180 steps" in told
    assert told.splitlines()[0] in (tmp_path / "out" / "report.md").read_text()
