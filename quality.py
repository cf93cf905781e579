"""How good is a judge? Pure functions of the scores that it gave and of the labels that say what is right.

A margin is the score of the better answer minus that of the worse one to the same question: chosen and rejected where
a vote says which is which, right and wrong where the gold answer does. The judge is right where its margin is above 0.
Everything is numpy in double precision and takes whatever numpy can read; nothing of ours is imported.

Sources: AUC as the U statistic of Mann and Whitney (1947); calibration error as in arXiv 1706.04599; length as the
rival explanation, arXiv 2310.03716; the mean over all subsets as in arXiv 2107.03374 (an oracle) and 2112.09332 (a
judge), by our own derivation; that equal means 10 % of the longer answer is our choice.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# ---- scores and labels of single answers ---------------------------------------------------------------------------


def auc(scores: ArrayLike, right: ArrayLike) -> float:
    """Chance that a right answer outscores a wrong one, ties half: scores (N,), right (N,) boolean.

    NaN if all labels are alike. Example: scores [1, 2, 2], right [F, T, F] -> (1 + 1/2) / 2.
    """
    scores, right = np.asarray(scores, float), np.asarray(right, bool)
    good, bad = scores[right], np.sort(scores[~right])  # (R,), (W,)
    if not len(good) or not len(bad):
        return math.nan
    below = np.searchsorted(bad, good, "left") + np.searchsorted(bad, good, "right")  # (R,) twice the bad ones below
    return float(below.mean() / (2 * len(bad)))


def best_threshold(scores: ArrayLike, right: ArrayLike) -> tuple[float, float]:
    """Best share of labels that 'right if the score is at least t' can reproduce, and the lowest such t.

    scores (N,), right (N,) -> accuracy, t (infinity: call all wrong). t was chosen on these very labels, so that the
    accuracy flatters a little. Example: scores [1, 2, 3, 4], right [F, T, F, T] -> 3/4 at t = 2.
    """
    order = np.argsort(scores)
    scores, right = np.asarray(scores, float)[order], np.asarray(right, bool)[order]
    hits = (
        np.append(0, np.cumsum(~right)) + right.sum() - np.append(0, np.cumsum(right))
    )  # (N+1,) lowest i called wrong
    between = np.concatenate([[True], scores[1:] > scores[:-1], [True]])  # (N+1,) no cut goes through a tie
    best = int(np.where(between, hits, -1).argmax())
    return hits[best] / len(right), float(np.append(scores, math.inf)[best])


def correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r of two rows of numbers (N,); 0 if one of them is constant. Example: [1, 2, 3], [2, 2, 5] -> 0.866."""
    x, y = (np.asarray(values, float) - np.mean(np.asarray(values, float)) for values in (x, y))  # (N,) each
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else 0.0


# ---- pairs ---------------------------------------------------------------------------------------------------------


def right_wrong_pairs(right: ArrayLike) -> tuple[NDArray, NDArray]:
    """Every pair of a right and a wrong sample of one question: right (Q, N) -> indices into Q * N (P,), (P,).

    Each pair counts once, so a question with as many right as wrong samples counts most.
    Example: [[T, F, F], [T, T, T]] -> [0, 0], [1, 2].
    """
    right = np.asarray(right, bool)
    question, i, j = np.nonzero(right[:, :, None] & ~right[:, None, :])  # (P,) each
    return question * right.shape[1] + i, question * right.shape[1] + j


def pair_accuracy(margin: ArrayLike, tie: float = 0.0) -> float:
    """Share of margins (P,) above 0; a tie counts `tie`. NaN of no pair. Example: [1, -1, 0, 2] -> 2/4.

    A tie is wrong by default: then a judge that says nothing scores 0. 1/2 is a coin, for a judge of few levels.
    """
    margin = np.asarray(margin, float)
    return float(((margin > 0) + tie * (margin == 0)).mean()) if len(margin) else math.nan


def equal_length(one: ArrayLike, other: ArrayLike, tolerance: float = 0.1) -> NDArray:
    """Which pairs differ in length by at most a share of the longer one: lengths (P,), (P,) -> (P,) boolean.

    Within them length explains nothing, or little. Example: lengths 20 and 18 -> True, 20 and 17 -> False.
    """
    one, other = np.asarray(one), np.asarray(other)
    return np.abs(one - other) <= tolerance * np.maximum(one, other)


def reliability_bins(margin: ArrayLike, bins: int = 10) -> list[dict[str, float]]:
    """Pairs by confidence, sigmoid(|margin|), in equal bins from 1/2 to 1: mean confidence, accuracy, count.

    margin (P,) at the scale of the Bradley-Terry loss. Empty bins are left out; a tie is wrong.
    Example: three margins of ln 9, one of -ln 9 -> [{"confidence": 0.9, "accuracy": 0.75, "count": 4}].
    """
    margin = np.asarray(margin, float)
    confidence, right = 1 / (1 + np.exp(-np.abs(margin))), margin > 0  # (P,), (P,)
    index = np.minimum((confidence - 0.5) * 2 * bins, bins - 1).astype(int)  # (P,)
    return [
        {"confidence": float(confidence[rows].mean()), "accuracy": float(right[rows].mean()), "count": int(rows.sum())}
        for rows in (index == i for i in np.unique(index))
    ]


def expected_calibration_error(margin: ArrayLike, bins: int = 10) -> float:
    """Gap between confidence and accuracy, averaged over the bins by their counts: margin (P,); NaN of no pair.

    0 is perfect. Example: four pairs at confidence 0.9, three right -> 0.15.
    """
    rows = reliability_bins(margin, bins)
    gaps = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows)
    return gaps / sum(row["count"] for row in rows) if rows else math.nan


def pair_quality(margin: ArrayLike, better: ArrayLike, worse: ArrayLike, scale: float = 1.0) -> dict:
    """All that is said about a judge of pairs: margins (P,), lengths of the better and the worse answer (P,), (P,).

    `scale` times a margin is the margin that was trained, whose sigmoid is a confidence. None: there is no such pair.
    'longer_wins' is the rival to beat, a judge who prefers the longer answer and tosses a coin between equal ones.
    Example: margins [1, -1], lengths [20, 9], [10, 9] -> pair_accuracy 1/2, equal_length 0 (the second), longer 3/4.
    """
    margin, better, worse = (np.asarray(values, float) for values in (margin, better, worse))
    equal = equal_length(better, worse)  # (P,)
    numbers = {
        "pair_accuracy": pair_accuracy(margin),
        "ties": float((margin == 0).mean()) if len(margin) else math.nan,
        "margin": float(margin.mean()) if len(margin) else math.nan,
        "ece": expected_calibration_error(scale * margin),
        "longer_wins": pair_accuracy(better - worse, tie=0.5),
        "equal_length_accuracy": pair_accuracy(margin[equal]),
        "equal_length_pairs": int(equal.sum()),
    }
    return {name: None if math.isnan(value) else value for name, value in numbers.items()} | {
        "reliability": reliability_bins(scale * margin)
    }


# ---- the best of several answers -----------------------------------------------------------------------------------


def best_of_n_curve(scores: ArrayLike, right: ArrayLike) -> dict[str, list[float]]:
    """Accuracy of the best of n samples for n = 1..N: scores, right (Q, N) -> {'judge': N shares, 'oracle': N shares}.

    The exact mean over all subsets of n samples. In ascending order sample i (from 0) is the best one of its subset in
    C(i, n-1) of the C(N, n) subsets; a coin is tossed between tied samples, so each gets their mean. The oracle knows:
    it fails in the C(wrong, n) subsets without a right sample. Example: scores [1, 2, 3], right [T, F, T] ->
    judge 2/3, 2/3 (2 beats 1 and is wrong, 3 beats both), 1; oracle 2/3, 1, 1.
    """
    scores, right = np.asarray(scores, float), np.asarray(right, bool)
    n_samples = scores.shape[1]
    sizes = range(1, n_samples + 1)
    chance = [[math.comb(i, n - 1) / math.comb(n_samples, n) for i in range(n_samples)] for n in sizes]  # (N, N)
    ranked = np.empty(scores.shape)  # (Q, N) right, in ascending order of the score
    for question, (row, labels) in enumerate(zip(scores, right)):
        _, group, counts = np.unique(row, return_inverse=True, return_counts=True)
        ranked[question] = np.repeat(np.bincount(group, labels) / counts, counts)
    wrong = n_samples - right.sum(1)  # (Q,)
    missed = [np.mean([math.comb(w, n) for w in wrong.tolist()]) / math.comb(n_samples, n) for n in sizes]
    return {"judge": (np.array(chance) @ ranked.mean(0)).tolist(), "oracle": [float(1 - share) for share in missed]}


def majority_curve(answers: Sequence[Sequence[str | None]], right: ArrayLike) -> list[float]:
    """Accuracy of the most frequent of n answers for n = 1..N: answers, right (Q, N) -> N shares.

    The mean over the N runs of n neighbours in a circle, since samples are exchangeable and all subsets are too many.
    A coin is tossed between tied answers; None never wins. Example: answers [7, 8, 7], gold 7 -> 2/3, 2/3, 1.
    """
    n_samples = len(answers[0])
    total = [0.0] * n_samples
    for row, labels in zip(answers, np.asarray(right, bool).tolist()):
        correct = dict(zip(row, labels))
        for start in range(n_samples):
            votes = Counter()
            for size, answer in enumerate([*row[start:], *row[:start]]):
                votes[answer] += answer is not None
                most = max(votes.values())
                winners = [correct[vote] for vote, count in votes.items() if count == most and vote is not None]
                total[size] += sum(winners) / max(len(winners), 1)
    return [share / (n_samples * len(answers)) for share in total]
