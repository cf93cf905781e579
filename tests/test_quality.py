"""quality.py: every number against a formula of its own: brute force over pairs, numpy, examples by hand."""

import math

import numpy as np
import pytest
import torch

import quality


def test_auc_is_the_share_of_pairs_in_the_right_order_ties_half():
    assert quality.auc([1, 2, 2], [False, True, False]) == 0.75
    assert quality.auc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, True, True])) == 1.0
    assert quality.auc([3, 2, 1], [False, True, True]) == 0.0
    assert quality.auc(np.zeros(5), [True, False, False, True, True]) == 0.5
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, right = rng.integers(0, 6, 40), rng.random(40) < 0.3  # many ties
        pairs = [(r > w) + 0.5 * (r == w) for r in scores[right] for w in scores[~right]]
        assert quality.auc(scores, right) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(quality.auc([1, 2], [True, True])) and math.isnan(quality.auc([1, 2], [False, False]))


def test_correlation_is_that_of_numpy_and_0_of_a_constant():
    assert quality.correlation([1, 2, 3], [2, 2, 5]) == pytest.approx(0.8660254)
    lengths = np.array([3.0, 9.0, 4.0])
    assert quality.correlation(lengths, lengths) == pytest.approx(1.0)
    assert quality.correlation(-2 * lengths + 7, lengths) == pytest.approx(-1.0)
    assert quality.correlation([5, 5, 5], lengths) == quality.correlation(lengths, [1, 1, 1]) == 0.0
    x, y = np.random.default_rng(0).normal(size=(2, 30)) + 1e3
    assert quality.correlation(torch.tensor(x), y) == pytest.approx(np.corrcoef(x, y)[0, 1])


def test_pairs_are_of_one_right_and_one_wrong_sample_of_the_same_question():
    good, bad = quality.right_wrong_pairs([[True, False, False], [True, True, True]])
    assert (good.tolist(), bad.tolist()) == ([0, 0], [1, 2])
    right = np.random.default_rng(1).random((7, 5)) < 0.4
    expected = {(q * 5 + i, q * 5 + j) for q in range(7) for i in range(5) for j in range(5)
                if right[q, i] and not right[q, j]}
    good, bad = quality.right_wrong_pairs(right)
    assert set(zip(good.tolist(), bad.tolist())) == expected and len(good) == len(expected) > 10


def test_pair_accuracy_by_hand():
    assert quality.pair_accuracy([1, -1, 0, 2]) == 0.5
    assert quality.pair_accuracy([1, -1, 0, 2], tie=0.5) == 0.625
    assert quality.pair_accuracy(torch.zeros(9)) == 0  # a judge that says nothing
    assert math.isnan(quality.pair_accuracy([]))


def test_equal_length_is_a_share_of_the_longer_one():
    one, other = [20, 20, 18, 17, 0, 9, 100], [18, 17, 20, 20, 0, 9, 90]
    assert quality.equal_length(one, other).tolist() == [True, False, True, False, True, True, True]
    assert quality.equal_length(one, other, 0.0).tolist() == [False, False, False, False, True, True, False]


def logit(confidence):
    return math.log(confidence / (1 - confidence))


def test_calibration_error_is_the_gap_of_confidence_and_accuracy_by_bin():
    """Four pairs with confidence .9 and three of them right: .15. Bins are weighted by their number of pairs."""
    margins = [logit(0.9)] * 3 + [-logit(0.9)]
    assert quality.expected_calibration_error(torch.tensor(margins)) == pytest.approx(0.15, abs=1e-6)
    margins += [logit(0.62), -logit(0.62)]  # accuracy .5: the gap is .12
    assert quality.expected_calibration_error(margins) == pytest.approx((4 * 0.15 + 2 * 0.12) / 6)
    assert quality.expected_calibration_error([-logit(0.9), logit(0.61)]) == pytest.approx((0.9 + 0.39) / 2)
    assert quality.expected_calibration_error([30.0, 30.0]) == pytest.approx(0, abs=1e-6)
    assert quality.expected_calibration_error([-30.0, -30.0]) == pytest.approx(1, abs=1e-6)
    assert quality.expected_calibration_error([0.0, -1e-6]) == pytest.approx(0.5)  # a tie is wrong
    assert math.isnan(quality.expected_calibration_error([]))
    margin = np.random.default_rng(0).normal(size=200) * 2
    confidence = 1 / (1 + np.exp(-abs(margin)))
    inside = [(low <= confidence) & (confidence < low + 0.125) for low in (0.5, 0.625, 0.75, 0.875)]
    gaps = [rows.sum() * abs(confidence[rows].mean() - (margin[rows] > 0).mean()) for rows in inside]
    assert quality.expected_calibration_error(margin, bins=4) == pytest.approx(sum(gaps) / 200)


def test_the_quality_of_pairs_by_hand():
    assert quality.pair_quality([1, -1], [20, 9], [10, 9], scale=logit(0.9)) == {
        "pair_accuracy": 0.5, "ties": 0.0, "margin": 0.0, "longer_wins": 0.75, "equal_length_accuracy": 0.0,
        "equal_length_pairs": 1, "ece": pytest.approx(0.4)}
    numbers = quality.pair_quality([3, 0, 1], [5, 30, 40], [9, 90, 50])
    assert numbers["longer_wins"] == 0 and numbers["ties"] == pytest.approx(1 / 3) and numbers["margin"] == 4 / 3
    assert numbers["equal_length_accuracy"] is None and numbers["equal_length_pairs"] == 0  # 40 and 50 are not
    nothing = quality.pair_quality([], [], [])
    assert nothing == dict.fromkeys(nothing) | {"equal_length_pairs": 0}
