"""How good is a reward model? Pure functions of the scores that it gave and of the labels that say what is right.

A margin is the score of the better answer minus that of the worse one to the same question: chosen and rejected where
a vote says which is which, right and wrong where the gold answer does. A margin above 0 is right.
Everything is numpy in double precision and takes whatever numpy can read; nothing of ours is imported.

Sources: AUC as the U statistic of Mann and Whitney (1947); calibration error as in arXiv 1706.04599; length as the
rival explanation, arXiv 2310.03716; that equal means 10 % of the longer answer is our choice.
"""

import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray


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


def correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's r of two rows of numbers (N,); 0 if one of them is constant. Example: [1, 2, 3], [2, 2, 5] -> 0.866."""
    x, y = (np.asarray(values, float) - np.mean(np.asarray(values, float)) for values in (x, y))  # (N,) each
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else 0.0


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

    A tie is wrong by default: then a model that says nothing has 0. 1/2 is a coin, for a model of few levels.
    """
    margin = np.asarray(margin, float)
    return float(((margin > 0) + tie * (margin == 0)).mean()) if len(margin) else math.nan


def equal_length(one: ArrayLike, other: ArrayLike, tolerance: float = 0.1) -> NDArray:
    """Which pairs differ in length by at most a share of the longer one: lengths (P,), (P,) -> (P,) boolean.

    Within them length explains nothing, or little. Example: lengths 20 and 18 -> True, 20 and 17 -> False.
    """
    one, other = np.asarray(one), np.asarray(other)
    return np.abs(one - other) <= tolerance * np.maximum(one, other)


def expected_calibration_error(margin: ArrayLike, bins: int = 10) -> float:
    """Gap between confidence and accuracy, averaged over bins of confidence by their counts; NaN of no pair.

    margin (P,) at the scale of the Bradley-Terry loss; confidence is sigmoid(|margin|), in equal bins from 1/2 to 1.
    A tie is wrong, 0 is perfect. Example: four pairs at confidence 0.9, three right -> 0.15.
    """
    margin = np.asarray(margin, float)
    confidence, right = 1 / (1 + np.exp(-np.abs(margin))), margin > 0  # (P,), (P,)
    index = np.minimum((confidence - 0.5) * 2 * bins, bins - 1).astype(int)  # (P,)
    gaps = np.bincount(index, confidence - right)  # (bins,) each the gap times the count
    return float(np.abs(gaps).sum() / len(margin)) if len(margin) else math.nan


def pair_quality(margin: ArrayLike, better: ArrayLike, worse: ArrayLike, scale: float = 1.0) -> dict:
    """How well a reward model orders pairs: margins (P,), lengths of the better and the worse answer (P,), (P,).

    `scale` times a margin is the margin that was trained, whose sigmoid is a confidence. None: there is no such pair.
    'longer_wins' is the rival to beat, a model that prefers the longer answer and tosses a coin between equal ones.
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
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def trained_scale(folder: str) -> float:
    """What a reward model's scores were divided by after training (reward.py); 1 where its done.json does not say."""
    try:
        return float(json.loads((Path(folder) / "done.json").read_text(encoding="utf-8"))["results"]["score_std"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1.0


def against_gold(scored: list[dict], scale: float) -> dict:
    """A reward model against gold: from the rows of scores.jsonl, one per question with all of its samples.

    auc_gold takes all samples of all questions together; the other *_gold numbers take the pairs of a right and a
    wrong sample of one question. None: undefined.
    """
    scores, right, tokens = (np.array([row[key] for row in scored], float) for key in ("scores", "correct", "tokens"))
    good, bad = right_wrong_pairs(right)  # (P,), (P,)
    flat, lengths = scores.flatten(), tokens.flatten()  # (Q * n,) each
    pairs = pair_quality(flat[good] - flat[bad], lengths[good], lengths[bad], scale)
    area = auc(flat, right.flatten())
    return {
        "auc_gold": None if math.isnan(area) else area,
        "pairs_gold": len(good),
        **{f"{name}_gold": value for name, value in pairs.items()},
        "length_correlation_gold": correlation(flat, lengths),
        "single_sample_accuracy": float(right.mean()),
        "any_right": float(right.any(1).mean()),  # what a perfect reward model would reach
    }
