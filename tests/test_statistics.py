"""Intervals and tests against published examples and counting by hand."""

import itertools
import random

import pytest

from smollm_trm.evaluation.halting import area_under_roc
from smollm_trm.evaluation.statistics import mcnemar_p, paired_difference, wilson_interval


def paired_grades(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


def test_wilson_interval_is_newcombes_published_one():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998 (single proportion)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (1, 2), (7, 400), (891, 1319), (1319, 1319)])
def test_wilson_interval_is_where_the_score_test_just_does_not_refuse(correct, total):
    z = 1.959963984540054
    for end in wilson_interval(correct, total):
        assert 0 <= end <= 1
        if end not in (0, 1):
            assert abs(correct / total - end) == pytest.approx(z * (end * (1 - end) / total) ** 0.5)


def test_mcnemar_counts_coin_tosses():
    assert mcnemar_p(0, 0) == 1.0 and mcnemar_p(3, 3) == 1.0
    assert mcnemar_p(5, 0) == mcnemar_p(0, 5) == pytest.approx(2 / 2**5)
    by_hand = sum(1 for tosses in itertools.product((0, 1), repeat=14) if sum(tosses) in (0, 1, 2, 12, 13, 14))
    assert mcnemar_p(12, 2) == pytest.approx(by_hand / 2**14)


def test_paired_interval_is_newcombes_published_one():
    found = paired_difference(*paired_grades(36, 12, 2, 0))  # Newcombe 1998 (paired data), method 10
    assert (found.difference, found.low, found.high) == pytest.approx((0.20, 0.0569, 0.3404), abs=5e-5)
    assert (found.only_first, found.only_second, found.p_value) == (12, 2, mcnemar_p(12, 2))


def test_paired_interval_of_independent_grades_is_the_square_and_add_of_wilsons():
    found = paired_difference(*paired_grades(6, 4, 9, 6))  # 6 * 6 = 4 * 9: no correlation
    one, other = wilson_interval(10, 25), wilson_interval(15, 25)
    reach_down = ((0.4 - one[0]) ** 2 + (other[1] - 0.6) ** 2) ** 0.5
    reach_up = ((one[1] - 0.4) ** 2 + (0.6 - other[0]) ** 2) ** 0.5
    assert (found.low, found.high) == pytest.approx((-0.2 - reach_down, -0.2 + reach_up))


def test_paired_interval_corrects_a_positive_correlation_for_continuity():
    found = paired_difference(*paired_grades(20, 9, 4, 7))
    phi = (20 * 7 - 9 * 4 - 40 / 2) / (29 * 11 * 24 * 16) ** 0.5  # Newcombe: the numerator loses n / 2
    first, second = wilson_interval(29, 40), wilson_interval(24, 40)
    down, up = 29 / 40 - first[0], second[1] - 24 / 40
    assert found.low == pytest.approx(5 / 40 - (down**2 - 2 * phi * down * up + up**2) ** 0.5)


def test_swapping_two_models_mirrors_their_difference():
    first, second = paired_grades(20, 9, 4, 7)
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low)) and there.p_value == back.p_value


def test_paired_interval_holds_the_truth_as_often_as_it_says():
    draw, held, rounds = random.Random(0), 0, 400
    for _ in range(rounds):
        first, second = [], []
        for _ in range(120):
            ease = draw.random()  # problems differ in difficulty, so the grades are correlated
            first.append(draw.random() < min(1.0, ease + 0.1))
            second.append(draw.random() < ease)
        found = paired_difference(first, second)
        held += found.low <= 0.095 <= found.high  # E[min(1, u + 0.1)] - E[u]
    assert 0.92 < held / rounds < 0.99


def test_auroc_counts_the_pairs_in_order_and_ties_half():
    draw = random.Random(1)
    chances = [round(draw.random(), 1) for _ in range(80)]
    grades = [draw.random() < chance for chance in chances]
    right = [chance for chance, grade in zip(chances, grades, strict=True) if grade]
    wrong = [chance for chance, grade in zip(chances, grades, strict=True) if not grade]
    by_hand = [(one > other) + (one == other) / 2 for one in right for other in wrong]
    assert area_under_roc(chances, grades) == pytest.approx(sum(by_hand) / len(by_hand))
    assert area_under_roc([0.5, 0.5], [True, False]) == 0.5
    assert area_under_roc([0.1, 0.9, 0.8], [False, True, True]) == 1.0


def test_auroc_of_equal_grades_is_not_invented():
    assert area_under_roc([0.2, 0.9], [True, True]) is None


def test_impossible_input_is_refused_by_its_numbers():
    with pytest.raises(ValueError, match="correct=5 of total=4"):
        wilson_interval(5, 4)
    with pytest.raises(ValueError, match="correct=0 of total=0"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="2 and 3 grades"):
        paired_difference([True] * 2, [True] * 3)
    with pytest.raises(ValueError, match="0 and 0 grades"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        area_under_roc([0.5], [True, False])
