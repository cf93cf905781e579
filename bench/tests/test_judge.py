"""bench/judge.py: thresholds, best-of-n and majority against brute force over cuts and subsets."""

import itertools
import json
import math

import judge
import numpy as np
import pytest

from quality import expected_calibration_error


def random_case(seed, questions=7, samples=5, levels=4):
    """Scores with many ties and labels, (questions, samples) each."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, (questions, samples)).astype(float), rng.random((questions, samples)) < 0.4


def test_the_best_threshold_is_the_best_of_all_that_there_are():
    assert judge.best_threshold([4, 1, 3, 2], [True, False, False, True]) == (0.75, 2.0)  # any order
    assert judge.best_threshold([1, 2], [True, False]) == (0.5, 1.0)  # a judge who is always wrong: all right
    assert judge.best_threshold([1, 1], [False, False]) == (1.0, math.inf)  # all wrong
    for seed in range(20):
        scores, right = (cells.flatten() for cells in random_case(seed))
        accuracy, threshold = judge.best_threshold(scores, right)
        assert accuracy == pytest.approx(((scores >= threshold) == right).mean())
        assert accuracy == max(((scores >= t) == right).mean() for t in [*scores, math.inf])


def best_by_brute_force(scores, right, n):
    """Mean over all subsets: the share that is right among the samples that share the best score."""
    means = []
    for row, labels in zip(scores, right):
        for subset in itertools.combinations(range(len(row)), n):
            best = max(row[i] for i in subset)
            means.append(np.mean([labels[i] for i in subset if row[i] == best]))
    return np.mean(means)


@pytest.mark.parametrize("seed", range(4))
def test_best_of_n_is_the_mean_over_all_subsets(seed):
    scores, right = random_case(seed)  # with ties
    if seed % 2:
        scores = scores + np.random.default_rng(seed).random(scores.shape)  # without
    curve = judge.best_of_n_curve(scores, right.tolist())
    for n in range(1, 6):
        assert curve["judge"][n - 1] == pytest.approx(best_by_brute_force(scores, right, n))
        subsets = [any(labels[list(s)]) for labels in right for s in itertools.combinations(range(5), n)]
        assert curve["oracle"][n - 1] == pytest.approx(np.mean(subsets))


def test_majority_by_hand():
    assert judge.majority_curve([["7", "8", "7"]], [[True, False, True]]) == pytest.approx([2 / 3, 2 / 3, 1])
    # no answer never wins, not even against a single wrong one; without any answer nothing is right
    assert judge.majority_curve([[None, None, "8"]], [[False, False, False]]) == [0, 0, 0]
    assert judge.majority_curve([[None, None, "7"]], [[False, False, True]]) == pytest.approx([1 / 3, 2 / 3, 1])
    # the mean over questions
    assert judge.majority_curve([["7", "7"], ["7", "8"]], [[True, True], [True, False]]) == [0.75, 0.75]


def test_reliability_bins_are_the_table_behind_the_calibration_error():
    margin = np.random.default_rng(0).normal(size=200) * 2
    rows, edges = judge.reliability_bins(margin, bins=4), [0.5, 0.625, 0.75, 0.875, 1.0]
    confidence = 1 / (1 + np.exp(-abs(margin)))
    for row, low, high in zip(rows, edges, edges[1:], strict=False):
        inside = (low <= confidence) & (confidence < high)
        assert row == {"confidence": pytest.approx(confidence[inside].mean()), "count": inside.sum(),
                       "accuracy": pytest.approx((margin[inside] > 0).mean())}
    gaps = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    assert expected_calibration_error(margin, bins=4) == pytest.approx(gaps / 200)
    assert judge.reliability_bins([]) == []


def test_a_run_is_judged_at_the_scale_that_was_trained(tmp_path):
    """Two questions; the right samples outscore the wrong ones by 1 and by -1, at a trained scale of 2."""
    done = {"settings": {}, "inputs": {}, "seconds": 1.0, "tokens": 1, "flops": 1.0, "peak_memory_mb": 1,
            "versions": {}}
    for stage, results in (("5_reward", {"score_std": 2.0}), ("7_eval/best_of_n/sft", {})):
        (tmp_path / stage).mkdir(parents=True)
        (tmp_path / stage / "done.json").write_text(json.dumps(done | {"results": results}))
    rows = [{"id": "a", "scores": [1.5, 0.5], "correct": [True, False], "answers": ["7", "8"], "tokens": [3, 4]},
            {"id": "b", "scores": [0.0, 1.0], "correct": [True, False], "answers": ["7", None], "tokens": [5, 6]}]
    file = tmp_path / "7_eval" / "best_of_n" / "sft" / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge.main(judge.Config((str(tmp_path),)))
    numbers = json.loads((tmp_path / "judge.json").read_text())
    assert numbers["accuracy"] == 0.75 and numbers["threshold"] == 1.5
    assert numbers["best_of_n"] == {"judge": [0.5, 0.5], "oracle": [0.5, 1.0], "majority": [0.5, 0.75]}
    confidence = pytest.approx(1 / (1 + math.exp(-2)))
    assert numbers["reliability"] == [{"confidence": confidence, "accuracy": 0.5, "count": 2}]
    assert (tmp_path / "judge.png").stat().st_size > 10_000
    file.unlink()
    with pytest.raises(ValueError, match="is not finished"):
        judge.main(judge.Config((str(tmp_path),)))
