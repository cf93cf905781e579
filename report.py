"""One page about a run, from its files: who answers how well, what is more than luck, how good the signal was.

    python report.py runs/tiny-0 --preset tiny --seed 0           # report.md, report.json, two pictures, in the run
    python report.py runs/tiny-0 runs/tiny-1 --out results/tiny   # comparison.md and .json: what differs, from where on

findings.py has the numbers and how they are compared; here they become a page. Which signals and costs are shown is our
choice.
"""

import datetime
import os
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import figures
import runtime
from findings import (
    COMPARISONS,
    COSTS,
    MODELS,
    SIGNALS,
    Run,
    build_comparison,
    build_report,
    compare,
    mean,
    partings,
    read_run,
)

ROUND = {  # columns of the table of rounds
    "strict": "right, %",
    "share_kept": "votes, %",
    "vote_accuracy": "votes right, %",
    "label_accuracy": "rewards right, %",
    "pair_accuracy": "judge: pairs, %",
    "score": "score",
    "kl": "KL, nats",
}


def number(value: float | None, percent: bool = True) -> str:
    """0.613 -> '61.3' (percent) or '0.61'; '–' for None."""
    return "–" if value is None else f"{100 * value:.1f}" if percent else f"{value:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table that also reads well in a terminal: first column to the left, the others to the right."""
    cells = [[*header], *([str(cell) for cell in row] for row in rows)]
    left, *widths = [max(2, *map(len, column)) for column in zip(*cells)]  # 2: a right-aligned rule is at least -:
    cells.insert(1, ["-" * left, *("-" * (width - 1) + ":" for width in widths)])
    return "\n".join(f"| {row[0].ljust(left)} | {' | '.join(map(str.rjust, row[1:], widths))} |" for row in cells)


def matmul_rate(threads: int, seconds: float = 0.2) -> float:
    """FLOPs a second of a large matrix product on this machine, now: what it can do at best.

    In the type that models train in: fp32 on a CPU, bf16 on a GPU.
    """
    import torch

    torch.set_num_threads(threads)
    size, dtype = (8192, torch.bfloat16) if runtime.default_device().type == "cuda" else (1024, torch.float32)
    x, count = torch.randn(size, size, dtype=dtype, device=runtime.default_device()), 0
    (x @ x)[0, 0].item()  # the first product also loads the library
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        (x @ x)[0, 0].item()  # reading a number waits for the GPU
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def accuracy_table(accuracy: Mapping[str, dict]) -> str:
    interval, key = ("95 % (Wilson)", "ci95") if all("ci95" in row for row in accuracy.values()) else ["min–max"] * 2
    return table(
        ["%", "right", interval, "lenient", "no answer", "truncated", "mean tokens", "n"],
        [
            [
                MODELS[name],
                number(row["strict"]),
                "–".join(map(number, row[key])),
                number(row["lenient"]),
                number(row["no_answer"]),
                number(row["truncated"]),
                number(row["mean_tokens"], percent=False),
                row["n"],
            ]
            for name, row in accuracy.items()
        ],
    )


def model_by_model(one: Run, other: Run) -> list[list[str]]:
    """Rows of a table: each model's accuracy in two runs, and the paired test of the second against the first."""
    rows = []
    for name, label in MODELS.items():
        first, second = one.transcripts(name), other.transcripts(name)
        test = compare(second, first)
        if test["n"]:
            shares = [
                number(mean(run[key]["correct"] for key in first.keys() & second.keys())) for run in (first, second)
            ]
            change = f"{100 * test['difference']:+.1f}"
            rows.append([label, *shares, change, f"{test['wins']} : {test['losses']}", f"{test['p_value']:.3g}"])
    return rows


def sentences(results: Mapping) -> str:
    """One line per question of COMPARISONS: its answer in one run, or in several pooled."""
    lines = []
    for key, (question, one, other) in COMPARISONS.items():
        r, text = results[key], f"7_eval/{one} and 7_eval/{other} are not both here"
        if r["n"]:
            text = (
                f"{100 * r['difference']:+.1f} points on {r['n']} answers, {r['wins']} won : {r['losses']} lost, "
                f"p = {r['p_value']:.3g}"
            )
        if r["n"] and "by_run" in r:
            each = ", ".join("–" if d is None else f"{100 * d:+.1f}" for d in r["by_run"])
            text += f"; each question once: p = {r['p_by_question']:.3g}; run by run: {each} points"
        if r["n"] or not key.startswith("hard"):  # not every task has a hard split
            lines.append(f"- {question} **{r['verdict'].capitalize()}**: {text}.")
    return "\n".join(lines)


def shown(text: str) -> str:
    """What a model said, on one line and harmless: a control character, of an escape sequence say, becomes its code."""
    line = text.replace("\n", " | ")
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in line)


def examples(run: Run, fixed: bool, most: int = 5) -> str:
    """The first questions that PPO has right and SFT wrong (fixed), or the other way round, in full, with options."""
    sft, ppo = run.transcripts("sft"), run.transcripts("ppo")
    keys = [key for key in sft if key in ppo and (sft[key]["correct"], ppo[key]["correct"]) == (not fixed, fixed)]
    text = [f"{len(keys)} questions {'fixed' if fixed else 'broken'} by PPO relative to SFT; the first, up to {most}:"]
    for key in keys[:most]:
        asked = replace(run.questions[key], instruction="").prompt if key in run.questions else sft[key]["question"]
        lines = (
            f"{key}: {asked}",
            f"gold: {sft[key]['gold']}",
            f"SFT:  {sft[key]['response']}",
            f"PPO:  {ppo[key]['response']}",
        )
        text.append(
            "\n".join(
                textwrap.fill(shown(line), 110, initial_indent=" " * 4, subsequent_indent=" " * 10) for line in lines
            )
        )
    return "\n\n".join(text)


def cost_table(cost: Mapping[str, dict], rate: float) -> str:
    total = {key: (max if key == "peak_memory_mb" else sum)(row[key] for row in cost.values()) for key in COSTS}
    return table(
        ["stage", "seconds", "% of time", "tokens", "tokens/s", "TFLOPs", "% of peak FLOP/s", "peak MB"],
        [
            [
                stage,
                f"{row['seconds']:.1f}",
                number(row["seconds"] / max(total["seconds"], 0.01)),
                f"{row['tokens']:,}",
                f"{row['tokens'] / max(row['seconds'], 0.01):,.0f}",
                f"{row['flops'] / 1e12:,.3f}",
                number(row["flops"] / max(row["seconds"], 0.01) / rate),
                row["peak_memory_mb"],
            ]
            for stage, row in [*cost.items(), ("total", total)]
        ],
    )


def verdict(test: Mapping) -> str:
    """The one sentence that a report is for."""
    if not test["n"]:
        return "**Does the student beat its teacher? Not known**: one of the two was not evaluated."
    return (
        f"**Does the student beat its teacher? {test['verdict'].capitalize()}**: {100 * test['difference']:+.1f} "
        f"points, p = {test['p_value']:.2g} (exact McNemar test on {test['n']:,} answers to the same questions)."
    )


def markdown(title: str, numbers: Mapping, columns: Mapping[str, Mapping], details: Iterable[str]) -> str:
    """report.md and comparison.md: what both show, then the details of one of them. columns: name -> report."""
    return (
        "\n\n".join(
            [
                f"# {title}",
                verdict(numbers["student_vs_teacher"]),
                "## Accuracy on the test questions",
                accuracy_table(numbers["accuracy"]),
                "Greedy answers, except best-of-n. Right: the stated answer is gold. Lenient: where none is stated, "
                "the last number or letter counts.",
                sentences(numbers),
                "Exact McNemar test on the same questions, two-sided, uncorrected; within noise: a p of 0.05 or more.",
                "## Quality of the signal",
                table(
                    ["signal", *columns],
                    [
                        [label, *(number(column[part][key], "%" in label) for column in columns.values())]
                        for (part, key), label in SIGNALS.items()
                    ],
                ),
                "## The reward model, and PPO on it",
                "![reward model](reward.png)",
                "Confidence is the sigmoid of the difference of two scores; pairs, calibration and best of n are of "
                "the SFT student's samples to test questions. On the right each dot is one look at the held-out "
                "questions during PPO: where the score still rises and gold falls, PPO exploits the reward model.",
                "## Curves of PPO",
                "![curves](curves.png)",
                *details,
            ]
        )
        + "\n"
    )


def details_of_run(run: Run, report: Mapping) -> list[str]:
    settings = [
        " ".join(
            [
                stage,
                *(f"{key}={value}" for key, value in record["settings"].items() if value != ""),
                *(f"{key}:{digest[:8]}" for key, digest in record["inputs"].items()),
            ]
        )
        for stage, record in run.stages.items()
    ]
    rate = matmul_rate(list(run.stages.values())[-1]["threads"])
    each = [
        [row["round"], *(number(row[key], key not in ("score", "kl")) for key in ROUND)] for row in report["rounds"]
    ]
    return [
        *(["## Round by round", table(["round", *ROUND.values()], each)] if each else []),
        "## What PPO changed",
        examples(run, fixed=True),
        examples(run, fixed=False),
        "## Cost",
        cost_table(report["cost"], rate),
        "TFLOPs: estimated, 2 (read) or 6 (trained) per parameter and token. Tokens: sampled, or trained on; seconds "
        "with loading and saving. Peak: a large matrix product in fp32 (on a GPU bf16), measured when this report was "
        f"written, {rate / 1e9:,.0f} GFLOP/s; sampling is limited by memory, not by that.",
        *(["## Held-out difficulty", accuracy_table(report["hard"])] if report["hard"] else []),
        "## To reproduce",
        *([textwrap.indent(run.command.strip(), "    ")] if run.command else []),
        "Settings, and the first digits of the SHA-256 of the inputs:",
        "\n".join(textwrap.fill(line, 116, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in settings),
        f"Missing in this run: {', '.join(report['missing']) or 'nothing'}. Not shown: other seeds, other tasks.",
    ]


@dataclass(frozen=True)
class Config:
    """Write the report of one run, or compare several runs."""

    runs: tuple[str, ...]  # run folders: one, or several that should differ in their seeds only
    out: str = ""  # folder for a comparison; one run's report is written into the run
    preset: str = "custom"  # named in the title
    seed: int = 0  # named in the title


def main(cfg: Config) -> None:
    runs = {os.path.normpath(folder): read_run(Path(folder)) for folder in cfg.runs}
    alone = len(cfg.runs) == 1
    runtime.require(len(runs) == len(cfg.runs), f"{' '.join(cfg.runs)}: the same folder twice")
    runtime.require(alone != bool(cfg.out), "--out is for the comparison of several runs, and needed there")
    if alone:
        [run], name = runs.values(), "report"
        numbers, last = {"preset": cfg.preset, "seed": cfg.seed} | build_report(run), list(run.stages.values())[-1]
        title = (
            f"Preset {cfg.preset}, seed {cfg.seed}\n\n{datetime.date.today()} · {os.cpu_count()} cores · torch "
            f"{last['versions']['torch']} · python {last['versions']['python']} · {last['threads']} thread(s) on "
            f"{runtime.default_device().type}"
        )
        page = markdown(title, numbers, {"value": numbers}, details_of_run(run, numbers))
    else:
        name, numbers = "comparison", build_comparison(runs)
        title = (
            f"Comparison of {', '.join(runs)}\n\nMeans over runs, n answers in all. The first p takes runs as "
            "independent, so it is too small; 'each question once' counts it for the model right in more runs."
        )
        first, *others = runs
        where = {other: partings(runs[first], runs[other])[:20] for other in others}
        numbers["partings"] = where
        details = [
            f"Settings that differ, seeds aside: {', '.join(numbers['settings_that_differ']) or 'none'}.",
            "## Where the runs part",
            "Seeds, settings and inputs stage by stage, then the first logged step that differs by more than rounding; "
            "answers to the same questions are compared with the exact McNemar test, two-sided.",
        ]
        for other, lines in where.items():
            details += [
                f"### {first} against {other}",
                "\n".join(f"- {line}" for line in lines or ["nowhere"]),
                table(
                    ["right, %", "first", "second", "difference", "won : lost", "p"],
                    model_by_model(runs[first], runs[other]),
                ),
            ]
        page = markdown(title, numbers, numbers["runs"], details)
    (out := Path(cfg.out or cfg.runs[0])).mkdir(parents=True, exist_ok=True)
    with runtime.replacing(out / "curves.png", "wb") as file:
        figures.draw_curves(file, {kind: [run.metrics(kind) for run in runs.values()] for kind in ("learned", "raw")})
    judges = [run.get("7_eval/best_of_n", "results") for run in runs.values() if "7_eval/best_of_n" in run.stages]
    with runtime.replacing(out / "reward.png", "wb") as file:
        figures.draw_judge(file, judges, [run.metrics("learned") for run in runs.values()])
    runtime.write_json(out / f"{name}.json", numbers)
    with runtime.replacing(out / f"{name}.md") as file:
        file.write(page)
    print(page.split("\n\n## Quality")[0], f"{name}: {out / name}.md", sep="\n\n")


if __name__ == "__main__":
    runtime.launch(main, Config)
