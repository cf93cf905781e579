"""The pictures of report.py: who has how much right, and PPO's curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot there is no window and no global state

BLUE, ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito (2008), which colour-blind readers can tell apart
PALE, GREY = "#8FB4CC", "#7A828C"  # a grey that reads on a light and on a dark page
PANELS = (  # metric, title, unit, its factor, the lowest value that is drawn
    ("objective/scores", "Score of the sampled answers, learned reward", "deviations", 1, -math.inf),
    ("objective/kl", "KL from the reference", "nats per answer", 1, -math.inf),
    ("valid/accuracy", "Held-out accuracy (for the report only)", "% right, greedy", 100, -math.inf),
    ("response_length/mean", "Response length", "tokens, mean", 1, -math.inf),
    ("policy/entropy_avg", "Entropy of the policy", "nats per token", 1, -math.inf),
    ("val/explained_variance", "Explained variance of the critic", "share (a triangle: lower still)", 1, -0.5),
)


def draw_result(path: Path, rows: Mapping[str, Mapping], teacher: Mapping | None, what: str) -> None:
    """Bars with 95 % intervals, label -> {"share", "ci95"}, the last one the method's, and the teacher as a line.

    It has no background, and fits a light and a dark page. `what` is the label of the axis.
    """
    figure = Figure((8, 0.45 * len(rows) + 1.1), dpi=120, layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(rows.values()):
        share, *ends = (100 * value for value in (row["share"], *row["ci95"]))
        axis.barh(y, share, 0.62, color=BLUE if y == len(rows) - 1 else PALE)
        axis.plot(ends, [y, y], color=GREY, linewidth=2.5, solid_capstyle="butt")
        axis.text(max(share, *ends) + 1, y, f"{share:.1f}", va="center", color=GREY, weight="bold")
    if teacher:
        share = 100 * teacher["share"]
        axis.axvline(share, color=ORANGE, linestyle="--", linewidth=2)
        axis.text(share, -0.6, f"teacher {share:.1f}", color=ORANGE, ha="center", va="bottom", weight="bold")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlim=(0, 108), xticks=range(0, 101, 20), ylim=(len(rows) - 0.5, -0.5))
    axis.set_xlabel(what, color=GREY)
    axis.tick_params(colors=GREY, length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(path, transparent=True)


def draw_curves(path: Path, curves: Mapping[str, Sequence[dict]], title: str = "") -> None:
    """A PNG of six panels over PPO's iterations: label -> rows of metrics.jsonl, round after round."""
    figure = Figure((15, 7.5), dpi=120, layout="constrained")
    most = max([1, *map(len, curves.values())])
    for axis, (metric, name, unit, factor, lowest) in zip(figure.subplots(2, 3).flat, PANELS):
        for (label, rows), (colour, line) in zip(curves.items(), ((BLUE, "-"), (ORANGE, "--"))):
            points = [(i, max(lowest, factor * row[metric])) for i, row in enumerate(rows) if metric in row]
            axis.plot([x for x, _ in points], [y for _, y in points], f".{line}", color=colour, label=label)
            lower = [x for x, y in points if y == lowest]
            axis.plot(lower, [lowest] * len(lower), "v", color=colour)
        axis.set(title=name, xlabel="PPO iteration", ylabel=unit, xlim=(-0.5, most - 0.5))
        axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axis.grid(alpha=0.25)
    figure.suptitle(title)
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)
