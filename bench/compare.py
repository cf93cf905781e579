"""Two runs side by side: from which step on they part, who answers better, the curves of PPO.

python bench/compare.py runs/tiny-0 runs/tiny-1 --out results/mine    # comparison.md and comparison.png
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from pictures import draw_curves
from report import LEARNED, MODELS, SIGNALS, Run, build_report, compare, comparison, mean, number, read_run, table


def same(x: float, y: float) -> bool:
    """Equal but for rounding; NaN equals NaN."""
    return math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-6) or (math.isnan(x) and math.isnan(y))


def differences(a: dict, b: dict, rows: list[dict], others: list[dict]) -> list[str]:
    """How a stage of two runs differs: settings, inputs, the first step that logs another number.

    a and b are its done.json in the two runs, `rows` and `others` its metrics.jsonl.
    """
    found = []
    for part, what in (("settings", "--{} {} against {}"), ("inputs", "other {}")):
        pairs = {key: (a[part].get(key), b[part].get(key)) for key in a[part] | b[part]}
        found += [what.format(key, *pair) for key, pair in pairs.items() if pair[0] != pair[1]]
    for row, other in zip(rows, others):
        keys = sorted(key for key in row.keys() & other.keys() if not same(row[key], other[key]))
        if keys:
            numbers = f"{keys[0]} {row[keys[0]]:.6g} against {other[keys[0]]:.6g}"
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            return [*found, f"from step {row['step']} on {numbers}{more}"]
    return found


def partings(one: Run, other: Run) -> dict[str, list[str]]:
    """What differs between two runs -> in which stages."""
    found = {}
    for stage in sorted(one.stages.keys() | other.stages.keys()):
        if stage in one.stages and stage in other.stages:
            rows = (run.rows(stage, "metrics.jsonl") for run in (one, other))
            apart = differences(one.stages[stage], other.stages[stage], *rows)
        else:
            apart = [f"only in the {'first' if stage in one.stages else 'second'} run"]
        for difference in apart:
            found.setdefault(difference, []).append(stage)
    return found


def model_by_model(one: Run, other: Run) -> list[list[object]]:
    """Rows of a table: each model of the second run against the same of the first, on what both answered."""
    rows = []
    for name, label in MODELS.items():
        first, second = one.transcripts(name), other.transcripts(name)
        if both := first.keys() & second.keys():
            shares = [number(mean(answers[key]["correct"] for key in both)) for answers in (first, second)]
            rows.append([label, *shares, *comparison(label, compare(second, first))[1:]])
    return rows


def page_of(one: Run, other: Run) -> str:
    """comparison.md."""
    apart = [f"- {what}: {', '.join(stages)}" for what, stages in partings(one, other).items()]
    reports = build_report(one), build_report(other)
    signals = [
        [label, *(number(report[part][key], "%" in label) for report in reports)]
        for (part, key), label in SIGNALS.items()
    ]
    parts = [
        f"# {one.folder} against {other.folder}",
        "## Where they part",
        "\n".join(apart) or "Nowhere.",
        "## Accuracy on the test questions",
        table(["right, %", "first", "second", "better", "points", "won : lost", "p", "n"], model_by_model(one, other)),
        "The second run against the first on the questions that both answered; exact McNemar tests, two-sided. "
        "A p is about other questions; one seed of each gives none about other seeds.",
        "## Quality of the signal",
        table(["signal", "first", "second"], signals),
        "## Curves of PPO",
        "![curves of PPO](comparison.png)",
    ]
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Config:
    """Compare two runs: RUN RUN."""

    runs: tuple[str, ...]  # two run folders
    out: str = ""  # folder for comparison.md and comparison.png; without it the second run


def main(cfg: Config) -> None:
    runtime.require(len(set(map(Path, cfg.runs))) == len(cfg.runs) == 2, "two different run folders are needed")
    one, other = (read_run(Path(folder)) for folder in cfg.runs)
    page, out = page_of(one, other), Path(cfg.out or cfg.runs[1])
    out.mkdir(parents=True, exist_ok=True)
    with runtime.replacing(out / "comparison.md") as file:
        file.write(page)
    draw_curves(out / "comparison.png", {str(run.folder): run.metrics(LEARNED) for run in (one, other)})
    print(page.split("\n\n## Quality")[0], f"comparison: {out / 'comparison.md'}", sep="\n\n")


if __name__ == "__main__":
    runtime.launch(main, Config)
