"""What a student of another size gains: runs of train_all.sh with different STUDENTs, seeds of one size taken together.

    for width in 32 48 64; do
      python weights/make.py --out models --only student-base --width $width
      for seed in 0 1; do
        STUDENT=models/tiny-student-base-$width SEED=$seed OUT=runs/sizes/$width-$seed bash train_all.sh
      done
    done
    python bench/sizes.py runs/sizes/* runs/tiny-0 runs/tiny-1 --out results/tiny-sizes    # sizes.md, .json, .png

All runs must have answered the same test questions. Intervals are for other questions and other seeds (`gain` of
bench/ablation.py); a size with one seed has an interval for other questions alone.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablation import gain, interval, right

import runtime
from report import Run, evaluation, number, read_run, table

ROWS = {
    "base": ("student before", "#777777", "s"),
    "sft": ("SFT", "#E69F00", "o"),
    "ppo": ("SFT + PPO", "#0072B2", "D"),
}
GAINS = {"sft": ("over SFT alone", "#E69F00"), "teacher": ("over the teacher", "#009E73")}


def build(runs: Mapping[str, Run]) -> dict:
    """The numbers of sizes.json: the teacher, and by the student's parameters what it reaches and gains."""
    sizes: dict[int, dict[str, Run]] = {}
    for folder, run in runs.items():
        for name in ("teacher", *ROWS):
            runtime.require(evaluation(name) in run.stages, f"{folder}: {evaluation(name)} is not finished")
        sizes.setdefault(run.results(evaluation("base"))["parameters"], {})[folder] = run
    rng, teacher = np.random.default_rng(0), right(runs, "teacher")
    right(runs, "ppo")  # all runs have the same questions, or this says which has not
    students = []
    for parameters, group in sorted(sizes.items()):
        answers = {name: right(group, name) for name in ("teacher", *ROWS)}  # (seeds, questions) each
        students.append(
            {
                "parameters": parameters,
                "runs": list(group),
                **{name: interval(answers[name], rng) for name in ROWS},
                **{f"gain_{name}": gain(answers["ppo"] - answers[name], rng) for name in GAINS},
            }
        )
    parameters = next(iter(runs.values())).results(evaluation("teacher")).get("parameters")
    return {
        "questions": teacher.shape[1],
        "teacher": {"parameters": parameters, **interval(teacher[:1], rng)},
        "students": students,
    }


def draw(path: Path, numbers: Mapping) -> None:
    """Left what each size reaches, right what PPO adds, over the student's parameters; bars are 95 % intervals."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right_axis = figure.subplots(1, 2)
    students, teacher = numbers["students"], numbers["teacher"]

    def curve(axis, key: str, colour: str, marker: str, label: str) -> None:
        points = [(row["parameters"], 100 * row[key]["mean"], row[key]["ci95"]) for row in students]
        x, y, bounds = zip(*points)
        bars = [[max(0.0, mean - 100 * low) for mean, (low, _) in zip(y, bounds)]]
        bars += [[max(0.0, 100 * high - mean) for mean, (_, high) in zip(y, bounds)]]
        axis.errorbar(x, y, bars, color=colour, marker=marker, label=label, linewidth=2, capsize=4)

    for key, (label, colour, marker) in ROWS.items():
        curve(left, key, colour, marker, label)
    left.axhline(100 * teacher["mean"], color="#009E73", linestyle="--", label="teacher")
    for key, (label, colour) in GAINS.items():
        curve(right_axis, f"gain_{key}", colour, "D", label)
    right_axis.axhline(0, color="#777777", linewidth=1)
    left.set(title="Accuracy", ylabel="test questions right, %")
    right_axis.set(title="Gain of SFT + PPO", ylabel="points")
    for axis in (left, right_axis):
        axis.set_xscale("log")
        axis.set_xticks([row["parameters"] for row in students], minor=False)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:.2g}"))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axis.set_xlabel("parameters of the student, million")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, columnspacing=1.2)
    figure.savefig(path)


def page(numbers: Mapping) -> str:
    """sizes.md: a row for each size."""
    span = lambda row, sign="": f"{100 * row['mean']:{sign}.1f} [{', '.join(map(number, row['ci95']))}]"
    rows = table(
        ["parameters", "seeds", "before", "SFT", "SFT + PPO", "over SFT, points", "over the teacher, points"],
        [
            [
                f"{row['parameters']:,}",
                len(row["runs"]),
                *(span(row[name]) for name in ROWS),
                *(span(row[f"gain_{name}"], "+") for name in ("sft", "teacher")),
            ]
            for row in numbers["students"]
        ],
    )
    teacher = numbers["teacher"]
    return "\n\n".join(
        [
            "# Students of other sizes",
            f"The teacher, {teacher['parameters'] or 0:,} parameters, is right on {number(teacher['mean'])} % of "
            f"{numbers['questions']:,} test questions, the same for all. Students answer greedily; in brackets 95 % "
            "intervals, of one seed for other questions alone.",
            rows,
            "![accuracy and gain over size](sizes.png)\n",
        ]
    )


@dataclass(frozen=True)
class Config:
    """Compare students of different sizes: RUN RUN ... --out FOLDER."""

    runs: tuple[str, ...]  # run folders of train_all.sh
    out: str  # folder for sizes.md, sizes.json and sizes.png


def main(cfg: Config) -> None:
    numbers = build({folder: read_run(Path(folder)) for folder in cfg.runs})
    runtime.require(len(numbers["students"]) > 1, "the runs have students of one size: a curve needs two or more")
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    draw(out / "sizes.png", numbers)
    runtime.write_json(out / "sizes.json", numbers)
    (out / "sizes.md").write_text(page(numbers), encoding="utf-8")
    print(page(numbers))


if __name__ == "__main__":
    runtime.launch(main, Config)
