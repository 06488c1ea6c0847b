"""What becomes of pictures that resemble each other."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs.data.decisions import connected


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_connected_pictures_share_their_least_member(num: int, pairs: list[tuple[int, int]]) -> None:
    edges = [(one % num, other % num) for one, other in pairs]
    found = connected(num, np.array(edges, np.int64).reshape(-1, 2))
    expected = list(range(num))
    for _ in range(num):
        for one, other in edges:
            expected[one] = expected[other] = min(expected[one], expected[other])
    assert found.tolist() == expected
