"""Over-optimisation: the reward model's score and the accuracy, as PPO leaves the policy that it started from.

    python bench/overoptimise.py runs/tiny-ablation/0 runs/tiny-ablation/1 --out results/tiny-kl   # kl.md, .json, .png

One curve for each KL coefficient of bench/ablate.sh, the mean over the runs; a point is an iteration that answered the
validation questions. The distance is the square root of the KL, as in arXiv 2210.10760.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pays import REWARDS, Runs, arms_of, curve

import runtime
from report import number, read_run, table

# KL coefficient, as a multiple of the preset's -> colour (Okabe and Ito, 2008)
COLOURS = {"0": "#D55E00", "0.25": "#E69F00", "0.5": "#CC79A7", "1": "#0072B2", "2": "#56B4E9", "4": "#009E73"}


def climbs(runs: Runs, reward: str) -> dict[str, dict]:
    """KL multiple -> iterations, and by seed and iteration the KL, the accuracy and, of a learned reward, the score."""
    found, arms = {}, {times: arm for arm, times in arms_of(reward).items()}
    for times in COLOURS:
        if all(f"6_{arms[times]}" in run.stages for run in runs.values()):
            names = ["step", "objective/kl", "valid/accuracy"] + ["valid/score"] * (reward == "learned")
            values = np.moveaxis(curve(runs, arms[times], *names), 2, 0)  # (names, seeds, iterations)
            found[times] = {"iterations": values[0, 0].tolist()}
            found[times] |= {name.split("/")[1]: rows.tolist() for name, rows in zip(names[1:], values[1:])}
    return found


def distance(row: Mapping) -> np.ndarray:
    """Square root of the mean KL over the runs: (iterations,). An estimate below 0 is 0."""
    return np.sqrt(np.maximum(np.mean(row["kl"], 0), 0))


def draw(path: Path, numbers: Mapping[str, dict]) -> None:
    """Left what the reward model says, right how many answers are right; the raw vote dashed."""
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for reward, rows in numbers.items():
        for times, row in rows.items():
            style = {"color": COLOURS[times], "markersize": 4, "marker": "o" if reward == "learned" else "s"}
            style |= {"linestyle": "-" if reward == "learned" else "--"}
            if reward == "learned":
                left.plot(distance(row), np.mean(row["score"], 0), label=f"KL coefficient x {times}", **style)
            right.plot(distance(row), 100 * np.mean(row["accuracy"], 0), **style)
    right.plot([], [], "o-", color="black", label="reward: the reward model")
    right.plot([], [], "s--", color="black", label="reward: the raw vote")
    left.set(title="What the reward model says", ylabel="its score, validation questions")
    right.set(title="What is right", ylabel="validation questions right, %")
    for axis in (left, right):
        axis.set_xlabel("distance from the start: √KL, √nats per answer")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    with runtime.replacing(path, "wb") as file:
        figure.savefig(file)


def page(numbers: Mapping[str, dict], seeds: int) -> str:
    """kl.md: where each coefficient ended, and its best."""
    lines = []
    for reward, rows in numbers.items():
        for times, row in rows.items():
            accuracy = np.array(row["accuracy"])  # (seeds, iterations)
            best, ends = accuracy.mean(0).argmax(), accuracy[:, -1]
            scores = [np.mean(row["score"], 0)[i] if "score" in row else None for i in (best, -1)]
            shown = [f"{row['iterations'][best]:.0f}", number(accuracy[:, best].mean()), number(scores[0], False)]
            shown += [f"{distance(row)[-1]:.2f}", number(ends.mean()), " ".join(map(number, ends))]
            lines.append([f"{reward}, x {times}", *shown, number(scores[1], False)])
    head = ["reward, KL coefficient", "best iteration", "right, %", "score", "end: √KL", "right, %", "by seed", "score"]
    parts = [
        "# Over-optimisation",
        f"Validation questions, greedy answers, means of {seeds} runs. Best is the mean accuracy's best iteration.",
        table(head, lines),
        "![score and accuracy over the distance](kl.png)",
    ]
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Config:
    """Score and accuracy over the KL for several KL coefficients: RUN RUN ... --out FOLDER."""

    runs: tuple[str, ...]  # run folders of bench/ablate.sh, one per seed
    out: str  # folder for kl.md, kl.json and kl.png


def main(cfg: Config) -> None:
    runs = {folder: read_run(Path(folder), arms=True) for folder in cfg.runs}
    numbers = {reward: climbs(runs, reward) for reward in REWARDS}
    runtime.require(all(numbers.values()), f"{', '.join(runs)}: 6_ppo and 6_ppo_raw are needed in all")
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    draw(out / "kl.png", numbers)
    runtime.write_json(out / "kl.json", {"runs": list(runs), **numbers})
    with runtime.replacing(out / "kl.md") as file:
        file.write(page(numbers, len(runs)))
    print(page(numbers, len(runs)), f"over-optimisation: {out / 'kl.md'}", sep="\n")


if __name__ == "__main__":
    runtime.launch(main, Config)
