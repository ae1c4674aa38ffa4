"""Which prompts grid.png shows: those at quantiles of their scores."""

import numpy as np
import pytest

from spin.eval.report import rows_at_quantiles


@pytest.mark.parametrize(
    "count, rows",
    [
        (1, [2]),  # the median, 20
        (3, [4, 2, 0]),  # the quartiles: 10, 20, 30
        (5, [3, 4, 2, 0, 1]),  # all
    ],
)
def test_rows_are_those_nearest_to_the_quantiles_from_the_lowest_on(count, rows):
    scores = np.array([30.0, 40.0, 20.0, 0.0, 10.0])
    assert rows_at_quantiles(scores, count) == rows


def test_scores_need_not_lie_on_a_quantile():
    scores = np.array([0.0, 1.0, 2.0, 100.0])  # quartiles 0.75, 1.5 and 26.5
    assert rows_at_quantiles(scores, 3) == [0, 1, 2]


def test_of_rows_equally_near_the_first_is_taken():
    assert rows_at_quantiles(np.array([7.0, 5.0, 3.0, 5.0]), 1) == [1]


def test_no_row_is_taken_twice():
    assert rows_at_quantiles(np.array([4.0, 4.0, 4.0, 4.0]), 3) == [0, 1, 2]
    nearly_all_equal = np.array([0.0, 5.0, 5.0, 5.0, 9.0])
    assert rows_at_quantiles(nearly_all_equal, 3) == [1, 2, 3]


@pytest.mark.parametrize("count", [3, 4, 100])
def test_there_are_no_more_rows_than_scores(count):
    assert rows_at_quantiles(np.array([3.0, 1.0, 2.0]), count) == [1, 2, 0]


def test_the_scores_are_left_as_they_are():
    scores = np.array([3.0, 1.0, 2.0])
    rows_at_quantiles(scores, 3)
    assert scores.tolist() == [3.0, 1.0, 2.0]
