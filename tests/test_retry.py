"""
How long is waited between two questions to a source.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kserve_pvc._source.retry import ATTEMPTS, delays


def test_pauses_double():
    """
    Without scatter each pause is twice the one before, and there is one fewer than there are attempts.
    """
    pauses = list(delays(0.5))

    assert (pauses, ATTEMPTS) == (pytest.approx([0.2, 0.4, 0.8, 1.6]), 5)


def test_pauses_reach_a_ceiling():
    """
    Pauses stop growing at the ceiling, however many attempts there are.
    """
    pauses = list(delays(0.5, attempts=8, first=1.0, ceiling=5.0))

    assert pauses == [1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize("attempts", [0, 1])
def test_a_single_attempt_has_no_pause(attempts):
    """
    Where nothing is tried again nothing is waited for.
    """
    assert list(delays(0.5, attempts=attempts)) == []


@given(st.floats(0, 1, exclude_max=True))
def test_pauses_scatter_by_half_either_way(random):
    """
    The same step differs between processes by up to half, so those who failed together do not return together.
    """
    even = list(delays(0.5, attempts=10))

    scattered = list(delays(random, attempts=10))

    assert scattered == pytest.approx([pause * (0.5 + random) for pause in even])
