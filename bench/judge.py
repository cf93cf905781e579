"""The reward model as a judge of the student's samples: the best threshold, best of any n, calibration against gold.

    python bench/judge.py runs/tiny-0        # reads 7_eval/best_of_n/sft/scores.jsonl; judge.json and .png, in the run

Sources: the mean over all subsets as in arXiv 2107.03374 (an oracle) and 2112.09332 (a judge), by our own derivation;
bins of confidence as in arXiv 1706.04599.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from quality import right_wrong_pairs
from report import evaluation, number, read_run, table

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#777777"  # Okabe and Ito (2008)


def best_threshold(scores: ArrayLike, right: ArrayLike) -> tuple[float, float]:
    """Best share of labels that 'right if the score is at least t' can reproduce, and the lowest such t.

    scores (N,), right (N,) -> accuracy, t (infinity: call all wrong). t was chosen on these very labels, so that the
    accuracy flatters a little. Example: scores [1, 2, 3, 4], right [F, T, F, T] -> 3/4 at t = 2.
    """
    order = np.argsort(scores)
    scores, right = np.asarray(scores, float)[order], np.asarray(right, bool)[order]
    wrong_below, right_below = (np.append(0, np.cumsum(labels)) for labels in (~right, right))  # (N+1,) each
    hits = wrong_below + right.sum() - right_below  # (N+1,) where the i lowest are called wrong
    between = np.concatenate([[True], scores[1:] > scores[:-1], [True]])  # (N+1,) no cut goes through a tie
    best = int(np.where(between, hits, -1).argmax())
    return hits[best] / len(right), float(np.append(scores, math.inf)[best])


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


def judge(scored: Sequence[dict], scale: float) -> dict:
    """The numbers of judge.json from rows of scores.jsonl; `scale` times a difference of scores was trained."""
    scores, right = (np.array([row[key] for row in scored]) for key in ("scores", "correct"))  # (Q, N) each
    good, bad = right_wrong_pairs(right)  # (P,), (P,)
    accuracy, threshold = best_threshold(scores.flatten(), right.flatten())
    curves = best_of_n_curve(scores, right) | {"majority": majority_curve([row["answers"] for row in scored], right)}
    bins = reliability_bins(scale * (scores.flatten()[good] - scores.flatten()[bad]))
    return {
        "accuracy": accuracy,
        "threshold": threshold if math.isfinite(threshold) else None,
        "best_of_n": curves,
        "reliability": bins,
    }


def draw_scores(histogram, by_length, scored: Sequence[dict]) -> None:
    """The scores of right and of wrong samples, and over their lengths."""
    samples = [sample for row in scored for sample in zip(row["scores"], row["tokens"], row["correct"])]
    scores = [score for score, _, _ in samples]
    for wanted, name, colour in ((True, "right", BLUE), (False, "wrong", ORANGE)):
        found = [(score, length) for score, length, right in samples if right == wanted]
        style = {"color": colour, "alpha": 0.5, "label": f"{name} ({len(found):,})"}
        histogram.hist([score for score, _ in found], 30, range=(min(scores), max(scores)), **style)
        by_length.scatter([length for _, length in found], [score for score, _ in found], 12, **style)
    histogram.set(title="Does it tell right from wrong?", xlabel="score of the reward model", ylabel="samples")
    by_length.set(title="Or does it judge by length?", xlabel="tokens of the sample", ylabel="score")


def draw(path: Path, numbers: dict, scored: Sequence[dict]) -> None:
    """Above the scores; below calibration of pairs, the area of a dot counts them, and the best of n samples."""
    figure = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    (histogram, by_length), (calibration, best) = figure.subplots(2, 2)
    draw_scores(histogram, by_length, scored)
    bins = numbers["reliability"]
    x, y = ([100 * row[key] for row in bins] for key in ("confidence", "accuracy"))
    pairs = sum(row["count"] for row in bins)
    calibration.plot([50, 100], [50, 100], "--", color=GREY, label="perfect")
    calibration.plot(x, y, color=BLUE, alpha=0.5)
    calibration.scatter(x, y, [300 * row["count"] / pairs for row in bins], BLUE, label=f"{pairs:,} pairs", zorder=3)
    calibration.set(title="Calibration against gold", xlabel="confidence of the reward model, %", ylabel="in order, %")
    for key, label, colour in (
        ("oracle", "a perfect judge", GREY),
        ("judge", "the reward model", BLUE),
        ("majority", "the majority of the n", ORANGE),
    ):
        curve = numbers["best_of_n"][key]
        best.plot(range(1, len(curve) + 1), [100 * share for share in curve], "o-", color=colour, label=label)
    best.set(title="Best of n samples of the SFT student", xlabel="n", ylabel="test questions right, %")
    best.xaxis.get_major_locator().set_params(integer=True)
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, markerscale=0.6)
    with runtime.replacing(path, "wb") as file:
        figure.savefig(file)


@dataclass(frozen=True)
class Config:
    """Study the reward models of runs: RUN ..."""

    runs: tuple[str, ...]  # run folders


def main(cfg: Config) -> None:
    for folder in map(Path, cfg.runs):
        run = read_run(folder)
        scored = run.rows(evaluation("best_of_n"), "scores.jsonl")
        runtime.require(scored, f"{folder}: {evaluation('best_of_n')} is not finished")
        numbers = judge(scored, run.results("5_reward").get("score_std", 1.0))
        runtime.write_json(folder / "judge.json", numbers)
        draw(folder / "judge.png", numbers, scored)
        curves = numbers["best_of_n"]
        rows = [[n, *(number(curves[key][n - 1]) for key in curves)] for n in range(1, len(curves["judge"]) + 1)]
        print(table(["right, %: best of n", *curves], rows))
        print(
            f"{number(numbers['accuracy'])} % of the samples are told right from wrong at the best threshold, "
            f"{number(numbers['threshold'], percent=False)}: {folder / 'judge.json'}, {folder / 'judge.png'}"
        )


if __name__ == "__main__":
    runtime.launch(main, Config)
