"""The learned world's random streams leave the global generators where they stood."""

import numpy as np
import pytest
import torch as th

from sb3_mismatch.randomness import RandomStreams

CPU = th.device("cpu")


def draws() -> list[float]:
    """From every global generator."""
    return [*np.random.rand(3), *np.random.randn(1), *th.rand(3).tolist()]


def seed(value: int = 0) -> None:
    np.random.seed(value)
    th.manual_seed(value)


def test_outside_nothing_moves():
    seed()
    expected = draws() + draws()
    seed()
    streams = RandomStreams(CPU, 0)
    first = draws()
    with streams.active():
        draws()
    assert first + draws() == expected


def test_outside_nothing_moves_after_an_exception():
    seed()
    expected = draws()
    seed()
    streams = RandomStreams(CPU, 0)

    def fail() -> None:
        with streams.active():
            raise KeyError(draws())

    with pytest.raises(KeyError):
        fail()
    assert draws() == expected
    # The streams go on from the draws that were made.
    with streams.active():
        after = draws()
    with RandomStreams(CPU, 0).active():
        assert [draws(), draws()][1] == after


def test_own_streams_depend_on_the_seed_alone_and_differ_from_the_outer_ones():
    def inside(streams_seed: int) -> list[float]:
        streams = RandomStreams(CPU, streams_seed)
        draws()
        with streams.active():
            return draws()

    seed(1)
    own = inside(5)
    seed(2)
    assert inside(5) == own
    assert inside(6) != own
    seed(5)
    outer = draws()
    assert not set(outer) & set(own)


def test_streams_continue_where_they_were_left():
    streams = RandomStreams(CPU, 3)
    with streams.active():
        both = draws() + draws()
    streams = RandomStreams(CPU, 3)
    with streams.active():
        first = draws()
    with streams.active():
        assert first + draws() == both


def test_no_seed_derives_one_without_advancing_numpy():
    seed(7)
    expected = draws()
    seed(7)
    one, other = RandomStreams(CPU), RandomStreams(CPU)
    assert draws() == expected
    with one.active():
        own = draws()
    with other.active():
        assert draws() == own
    with RandomStreams(CPU).active():
        assert draws() != own


def test_state_survives_a_file(tmp_path):
    streams = RandomStreams(CPU, 0)
    with streams.active():
        np.random.randn()  # of a pair of normals NumPy keeps the second
        th.randn(3)
    th.save(streams.state_dict(), tmp_path / "streams.pth")
    with streams.active():
        expected = draws()
    restored = RandomStreams(CPU, 99)
    restored.load_state_dict(th.load(tmp_path / "streams.pth", weights_only=True))
    with restored.active():
        assert draws() == expected
