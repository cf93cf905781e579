"""The two pictures of a report: PPO's curves, and how good the reward model is. Nothing here computes a result.

Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart. Several runs become a mean with a band
from the lowest to the highest; their pairs are one reliability line. A Figure without pyplot: no window, no global
state; a PNG goes through Agg.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#777777"
REWARDS = {"learned": ("PPO, learned reward", BLUE), "raw": ("PPO, raw vote", ORANGE)}
PANELS = (  # metric, title, unit
    ("objective/scores", "Score of the sampled answers", "deviations (learned), ±1 (raw)"),
    ("objective/kl", "KL from the reference", "nats per answer"),
    ("valid/accuracy", "Held-out accuracy (for the report only)", "% right, greedy"),
    ("response_length/mean", "Response length", "tokens, mean"),
    ("policy/entropy_avg", "Entropy of the policy", "nats per token"),
    ("val/explained_variance", "Explained variance of the critic", "share"),
    ("policy/clipfrac_avg", "Tokens beyond the clip", "%"),
    ("val/eos_share", "Answers that ended", "%"),
)
PERCENT = ("valid/accuracy", "policy/clipfrac_avg", "val/eos_share")


def line(axis: Axes, runs: Sequence[Sequence[dict]], x: str, y: str, colour: str, label: str) -> None:
    """y over x of the rows that have both: one run as a line, several as their mean and a band from least to most."""
    factor = 100 if y in PERCENT else 1
    points = [[(row[x], factor * row[y]) for row in rows if x in row and y in row] for rows in runs]
    points = [found for found in points if found]
    if not points:
        return
    length = min(map(len, points))
    xs, ys = np.array([found[:length] for found in points]).transpose(2, 0, 1)  # (runs, length) each
    axis.plot(xs.mean(0), ys.mean(0), color=colour, label=label, linewidth=2, marker="o" if length < 12 else None)
    if len(points) > 1:
        axis.fill_between(xs.mean(0), ys.min(0), ys.max(0), color=colour, alpha=0.2, linewidth=0)


def finish(figure: Figure, file: Path | IO, legend: bool = True) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
    if legend and figure.axes[0].lines:
        handles = figure.axes[0].get_legend_handles_labels()[0]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file)


def draw_curves(file: Path | IO, metrics: Mapping[str, Sequence[Sequence[dict]]]) -> None:
    """Eight panels over PPO's iterations: metrics[kind][run] are rows of metrics.jsonl, round after round."""
    figure = Figure(figsize=(15, 6.5), dpi=120, layout="constrained")
    for axis, (metric, title, unit) in zip(figure.subplots(2, 4).flat, PANELS):
        for kind, runs in metrics.items():
            numbered = [[{"iteration": i, **row} for i, row in enumerate(rows)] for rows in runs]
            line(axis, numbered, "iteration", metric, REWARDS[kind][1], REWARDS[kind][0])
        if metric == "val/explained_variance":
            axis.set_ylim(max(axis.get_ylim()[0], -0.55), 1.05)  # a critic may start far below 0
        if metric == "val/eos_share":
            axis.set_ylim(min(axis.get_ylim()[0], 95), 100.5)
        axis.set(title=title, xlabel="PPO iteration", ylabel=unit)
    finish(figure, file)


def pooled(judges: Sequence[Mapping], bins: int = 10) -> list[dict]:
    """The reliability of several runs as one: bins of quality.reliability_bins, averaged by their counts."""
    found = [row for judge in judges for row in judge.get("reliability_gold", [])]
    index = [min(int((row["confidence"] - 0.5) * 2 * bins), bins - 1) for row in found]
    rows = []
    for i in sorted(set(index)):
        same = [row for row, its in zip(found, index) if its == i]
        count = sum(row["count"] for row in same)
        means = {key: sum(row["count"] * row[key] for row in same) / count for key in ("confidence", "accuracy")}
        rows.append(means | {"count": count})
    return rows


def draw_judge(file: Path | IO, judges: Sequence[Mapping], ppo: Sequence[Sequence[dict]]) -> None:
    """How good the reward model is: calibration, best of n, and its score and gold while PPO climbs it.

    judges: what eval.py's best-of-n found, one per run; ppo: rows of metrics.jsonl under the learned reward.
    """
    figure = Figure(figsize=(15, 3.9), dpi=120, layout="constrained")
    calibration, best, score, gold = figure.subplots(1, 4)
    calibration.plot([50, 100], [50, 100], "--", color=GREY, label="perfect")
    bins = pooled(judges)
    confidence, accuracy, count = ([row[key] for row in bins] for key in ("confidence", "accuracy", "count"))
    x, y = 100 * np.array(confidence), 100 * np.array(accuracy)  # (bins,) each
    calibration.plot(x, y, color=BLUE, alpha=0.5)
    calibration.scatter(
        x, y, [300 * c / sum(count) for c in count], BLUE, label="right against wrong answer,\narea of a dot: pairs"
    )
    calibration.set(
        title="Calibration against gold", xlabel="confidence of the reward model, %", ylabel="pairs in order, %"
    )
    calibration.legend(frameon=False, fontsize=8, markerscale=0.6)
    for key, label, colour in (
        ("oracle", "a perfect judge", GREY),
        ("judge", "the reward model", BLUE),
        ("majority", "the majority of the n", ORANGE),
    ):
        curves = [[100 * y for y in judge["best_of_n"][key]] for judge in judges if judge.get("best_of_n")]
        rows = [[{"n": n, "y": y} for n, y in enumerate(curve, 1)] for curve in curves]
        line(best, rows, "n", "y", colour, label)
    best.set(title="Best of n samples of the SFT student", xlabel="n", ylabel="test questions right, %")
    best.xaxis.get_major_locator().set_params(integer=True)
    if best.lines:
        best.legend(frameon=False, fontsize=8)
    points = [[row | {"root": math.sqrt(max(row["objective/kl"], 0.0))} for row in rows] for rows in ppo]
    for axis, metric, colour, title, unit in (
        (score, "valid/score", BLUE, "What PPO climbs ...", "score of held-out answers, deviations"),
        (gold, "valid/accuracy", GREEN, "... and what is meant", "held-out questions right, %"),
    ):
        line(axis, points, "root", metric, colour, "")
        axis.set(title=title, xlabel="√KL from the reference, √nats per answer", ylabel=unit)
    finish(figure, file, legend=False)
