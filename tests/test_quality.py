"""quality.py: every number against a formula of its own: brute force over pairs and subsets, numpy, examples by hand"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

import quality


def random_case(seed, questions=7, samples=5, levels=4):
    """Scores with many ties and labels, (questions, samples) each."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, (questions, samples)).astype(float), rng.random((questions, samples)) < 0.4


# ---- scores and labels ---------------------------------------------------------------------------------------------


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


def test_auc_of_labels_that_are_all_alike_is_not_a_number():
    assert math.isnan(quality.auc([1, 2], [True, True]))
    assert math.isnan(quality.auc([1, 2], [False, False]))


def test_the_best_threshold_is_the_best_of_all_that_there_are():
    assert quality.best_threshold([1, 2, 3, 4], [False, True, False, True]) == (0.75, 2.0)
    assert quality.best_threshold([4, 1, 3, 2], [True, False, False, True]) == (0.75, 2.0)  # any order
    assert quality.best_threshold([1, 2], [True, False]) == (0.5, 1.0)  # a judge who is always wrong: all right
    assert quality.best_threshold([1, 1], [False, False]) == (1.0, math.inf)  # all wrong
    for seed in range(20):
        scores, right = (cells.flatten() for cells in random_case(seed))
        accuracy, threshold = quality.best_threshold(scores, right)
        assert accuracy == pytest.approx(((scores >= threshold) == right).mean())
        assert accuracy == max(((scores >= t) == right).mean() for t in [*scores, math.inf])


def test_correlation_is_that_of_numpy_and_0_of_a_constant():
    assert quality.correlation([1, 2, 3], [2, 2, 5]) == pytest.approx(0.8660254)
    lengths = np.array([3.0, 9.0, 4.0])
    assert quality.correlation(lengths, lengths) == pytest.approx(1.0)
    assert quality.correlation(-2 * lengths + 7, lengths) == pytest.approx(-1.0)
    assert quality.correlation([5, 5, 5], lengths) == quality.correlation(lengths, [1, 1, 1]) == 0.0
    x, y = np.random.default_rng(0).normal(size=(2, 30)) + 1e3
    assert quality.correlation(torch.tensor(x), y) == pytest.approx(np.corrcoef(x, y)[0, 1])


# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_pairs_are_of_one_right_and_one_wrong_sample_of_the_same_question():
    good, bad = quality.right_wrong_pairs([[True, False, False], [True, True, True]])
    assert (good.tolist(), bad.tolist()) == ([0, 0], [1, 2])
    _, right = random_case(1)
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
    assert quality.expected_calibration_error([30.0, 30.0]) == pytest.approx(0, abs=1e-6)
    assert quality.expected_calibration_error([-30.0, -30.0]) == pytest.approx(1, abs=1e-6)
    assert quality.expected_calibration_error([0.0, -1e-6]) == pytest.approx(0.5)  # a tie is wrong
    assert math.isnan(quality.expected_calibration_error([]))


def test_reliability_bins_are_the_table_behind_it():
    rows = quality.reliability_bins([logit(0.9)] * 3 + [-logit(0.9), logit(0.62), -logit(0.64), 30.0])
    assert [row["count"] for row in rows] == [2, 4, 1]  # .6 to .65, .9 to .95 (the fifth bin of ten begins at .7)
    assert [row["confidence"] for row in rows] == pytest.approx([0.63, 0.9, 1.0])
    assert [row["accuracy"] for row in rows] == [0.5, 0.75, 1.0]
    assert quality.reliability_bins([]) == []
    margin = np.random.default_rng(0).normal(size=200) * 2
    rows, edges = quality.reliability_bins(margin, bins=4), [0.5, 0.625, 0.75, 0.875, 1.0]
    confidence = 1 / (1 + np.exp(-abs(margin)))
    for row, low, high in zip(rows, edges, edges[1:], strict=False):
        inside = (low <= confidence) & (confidence < high)
        assert row == {"confidence": pytest.approx(confidence[inside].mean()), "count": inside.sum(),
                       "accuracy": pytest.approx((margin[inside] > 0).mean())}
    assert sum(row["count"] for row in rows) == 200


def test_the_quality_of_pairs_by_hand():
    assert quality.pair_quality([1, -1], [20, 9], [10, 9], scale=logit(0.9)) == {
        "pair_accuracy": 0.5, "ties": 0.0, "margin": 0.0, "longer_wins": 0.75, "equal_length_accuracy": 0.0,
        "equal_length_pairs": 1, "ece": pytest.approx(0.4),
        "reliability": [{"confidence": pytest.approx(0.9), "accuracy": 0.5, "count": 2}]}
    numbers = quality.pair_quality([3, 0, 1], [5, 30, 40], [9, 90, 50])
    assert numbers["longer_wins"] == 0 and numbers["ties"] == pytest.approx(1 / 3) and numbers["margin"] == 4 / 3
    assert numbers["equal_length_accuracy"] is None and numbers["equal_length_pairs"] == 0  # 40 and 50 are not
    nothing = quality.pair_quality([], [], [])
    assert nothing == dict.fromkeys(nothing) | {"equal_length_pairs": 0, "reliability": []}


# ---- the best of several answers -----------------------------------------------------------------------------------


def best_by_brute_force(scores, right, n):
    """Mean over all subsets: the share that is right among the samples that share the best score."""
    means = []
    for row, labels in zip(scores, right):
        for subset in itertools.combinations(range(len(row)), n):
            best = max(row[i] for i in subset)
            means.append(np.mean([labels[i] for i in subset if row[i] == best]))
    return np.mean(means)


def test_best_of_n_by_hand():
    curve = quality.best_of_n_curve([[1, 2, 3]], [[True, False, True]])
    assert curve == {"judge": pytest.approx([2 / 3, 2 / 3, 1]), "oracle": pytest.approx([2 / 3, 1, 1])}
    # the best one is wrong, the worst is right; the second question is right throughout
    curve = quality.best_of_n_curve([[1, 2], [7, 7]], [[True, False], [True, True]])
    assert curve == {"judge": [0.75, 0.5], "oracle": [0.75, 1.0]}


@pytest.mark.parametrize("seed", range(4))
def test_best_of_n_is_the_mean_over_all_subsets(seed):
    scores, right = random_case(seed)  # with ties
    if seed % 2:
        scores = scores + np.random.default_rng(seed).random(scores.shape)  # without
    curve = quality.best_of_n_curve(torch.tensor(scores), right.tolist())
    for n in range(1, 6):
        assert curve["judge"][n - 1] == pytest.approx(best_by_brute_force(scores, right, n))
        subsets = [any(labels[list(s)]) for labels in right for s in itertools.combinations(range(5), n)]
        assert curve["oracle"][n - 1] == pytest.approx(np.mean(subsets))
    assert [curve["judge"][0], curve["oracle"][0]] == pytest.approx([right.mean()] * 2)


def test_a_judge_that_says_nothing_gains_nothing_and_one_that_knows_is_the_oracle():
    _, right = random_case(0)
    nothing = quality.best_of_n_curve(np.zeros(right.shape), right)
    assert nothing["judge"] == pytest.approx([right.mean()] * 5)
    known = quality.best_of_n_curve(right, right)
    assert known["judge"] == pytest.approx(known["oracle"])
    assert known["oracle"][-1] == right.any(1).mean() > known["oracle"][0] + 0.1


def test_majority_by_hand():
    assert quality.majority_curve([["7", "8", "7"]], [[True, False, True]]) == pytest.approx([2 / 3, 2 / 3, 1])
    # no answer never wins, not even against a single wrong one; without any answer nothing is right
    assert quality.majority_curve([[None, None, "8"]], [[False, False, False]]) == [0, 0, 0]
    assert quality.majority_curve([[None, None, "7"]], [[False, False, True]]) == pytest.approx([1 / 3, 2 / 3, 1])
    # the mean over questions
    assert quality.majority_curve([["7", "7"], ["7", "8"]], [[True, True], [True, False]]) == [0.75, 0.75]


def test_majority_of_all_samples_is_the_vote_with_a_coin_between_ties():
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 4, (50, 6)).astype(str).tolist()
    right = [[answer == "0" for answer in row] for row in answers]
    curve = quality.majority_curve(answers, right)
    last, first = [], []
    for row in answers:
        votes = Counter(row)
        winners = [answer for answer in votes if votes[answer] == max(votes.values())]
        last.append(("0" in winners) / len(winners))
        first.append(row.count("0") / 6)
    assert curve[-1] == pytest.approx(np.mean(last)) and curve[0] == pytest.approx(np.mean(first))
    # an independent estimate of the middle: all subsets; the circle's is the same but for chance
    subsets = []
    for row in answers:
        for subset in itertools.combinations(row, 3):
            votes = Counter(subset)
            winners = [answer for answer in votes if votes[answer] == max(votes.values())]
            subsets.append(("0" in winners) / len(winners))
    assert curve[2] == pytest.approx(np.mean(subsets), abs=0.02)
