"""One page about a run, from its files: who answers how well, what is more than luck, how good the signal was.

    python report.py runs/tiny-0 --preset tiny --seed 0           # report.md, report.json, two pictures, in the run
    python report.py runs/tiny-0 runs/tiny-1 --out results/tiny   # comparison.md and .json: what differs, from where on

All models answer the same test questions, so two of them are compared question by question: only a question that one
gets right and the other wrong says anything (McNemar, 1947, in its exact binomial form). The gold answers of the
*training* questions are read here, for reports only: how often was the vote of arXiv 2502.19557 right? Which ablations,
signals and costs are shown is our choice.
"""

import datetime
import json
import math
import os
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import figures
import runtime
from answers import is_correct
from data import Question, load_questions, read_jsonl

MODELS = {  # folder in 7_eval -> row of the table, in this order
    "teacher": "teacher",
    "base": "student base",
    "sft": "SFT",
    "best_of_n": "SFT + best-of-n",
    "ppo_raw": "SFT + PPO, raw vote",
    **{f"ppo_r{n}": f"SFT + PPO, learned reward, after round {n}" for n in range(1, 9)},
    "ppo": "SFT + PPO, learned reward",
    "hard_teacher": "teacher, hard",
    "hard_sft": "SFT, hard",
    "hard_ppo": "SFT + PPO, learned reward, hard",
}
COMPARISONS = {  # key in report.json -> question, the one, the other
    "student_vs_teacher": ("Does the student beat its teacher?", "ppo", "teacher"),
    "student_vs_sft": ("Does PPO beat SFT alone?", "ppo", "sft"),
    "student_vs_raw": ("Does PPO gain more from the learned reward than from the raw vote?", "ppo", "ppo_raw"),
    "hard_vs_teacher": ("On the held-out difficulty, does the student beat its teacher?", "hard_ppo", "hard_teacher"),
    "hard_vs_sft": ("On the held-out difficulty, does PPO beat SFT alone?", "hard_ppo", "hard_sft"),
}
SIGNALS = {  # part and key of report.json -> what the number is; those with % are shares
    ("pseudo_reward", "share_kept"): "% of the training questions have a vote",
    ("pseudo_reward", "teacher_single_answer_accuracy"): "% of the teacher's single answers to those are right",
    ("pseudo_reward", "vote_accuracy"): "% of the votes are right",
    ("pseudo_reward", "label_accuracy"): "% of the responses have the 0/1 reward that gold would give",
    ("reward_model", "pair_accuracy"): "% of held-out pairs: reward model agrees with the vote (a tie is wrong)",
    ("reward_model", "auc_gold"): "AUC of the reward model against gold on test questions (chance 0.5)",
    ("reward_model", "accuracy_gold"): "% of those answers it tells right from wrong, at the best threshold",
    ("reward_model", "pair_accuracy_gold"): "% of pairs of a right and a wrong answer to one question in order ...",
    ("reward_model", "longer_wins_gold"): "% ... and if the longer answer were taken to be the right one",
    ("reward_model", "equal_length_accuracy_gold"): "% ... and of the pairs of about equal length",
    ("reward_model", "ece"): "calibration error of the reward model on held-out pairs (perfect 0)",
    ("reward_model", "ece_gold"): "calibration error against gold",
    ("reward_model", "length_correlation"): "correlation of its score with the length of the answer",
    ("reward_model", "single_sample_accuracy"): "% of the test answers that it chose from (best-of-n) are right ...",
    ("reward_model", "any_right"): "% ... and would be if a perfect judge chose",
}
COSTS = ("seconds", "tokens", "flops", "peak_memory_mb")
ROUND = {  # columns of the table of rounds
    "strict": "right, %",
    "share_kept": "votes, %",
    "vote_accuracy": "votes right, %",
    "label_accuracy": "rewards right, %",
    "pair_accuracy": "judge: pairs, %",
    "score": "score",
    "kl": "KL, nats",
}
ROUND_STAGES = ("3_student", "4_pseudo_reward", "5_reward", "6_ppo")


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value: how often are `wins + losses` fair coins at least as uneven?

    Twice the lower tail of Binomial(n, 1/2), at most 1. Example: (10, 2) -> 2 * (1 + 12 + 66) / 4096 = 0.0386.
    """
    n, tail, ways = wins + losses, 0, 1  # ways: n over k, made from the one before; integers, so no n is too large
    for k in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def compare(one: Mapping, other: Mapping) -> dict:
    """Transcripts of two models by question id; difference: share right of `one` - of `other` where both answered.

    verdict: 'yes', `one` is better, 'no', worse, 'within noise' (p at least 0.05), 'not known' (no common question).
    Example: right T T F against T F F -> difference 1/3, p_value 1, wins 1, losses 0, n 3, 'within noise'.
    """
    gain = Counter(one[key]["correct"] - other[key]["correct"] for key in one.keys() & other.keys())
    wins, losses, n = gain[1], gain[-1], gain.total()
    p = mcnemar(wins, losses) if n else None
    return {
        "difference": (wins - losses) / n if n else None,
        "p_value": p,
        "wins": wins,
        "losses": losses,
        "n": n,
        "verdict": "not known" if not n else "within noise" if p >= 0.05 else "yes" if wins > losses else "no",
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there, or None of nothing. Example: [True, False, None] -> 0.5."""
    return sum(known) / len(known) if (known := [value for value in values if value is not None]) else None


def label_quality(rows: Iterable[dict], questions: Mapping[str, Question]) -> dict:
    """How often vote and 0/1 reward of rewards.jsonl agree with gold; None where no question has a gold answer.

    Example: gold 7, vote 7, the teacher says 7 (reward 1), 8 (0) and 7 (0: it was cut off) -> vote 1, label 2/3.
    """
    known = [(row, questions[row["id"]]) for row in rows if row["id"] in questions and questions[row["id"]].answer]
    graded = [(r, is_correct(r["answer"], q.answer, q.kind)) for row, q in known for r in row["responses"]]
    return {
        "vote_accuracy": mean(is_correct(row["vote"], q.answer, q.kind) for row, q in known),
        "label_accuracy": mean((r["reward"] == 1) == right for r, right in graded),
        "teacher_single_answer_accuracy": mean(right for r, right in graded if r["source"] == "teacher"),
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


# ---- from the files to the numbers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What the stages of a run left. One without done.json was not finished and counts as missing."""

    stages: dict[str, dict]  # folder, such as '2_sft' or '7_eval/ppo' -> its done.json and the 'rows' of its JSONL
    questions: dict[str, Question]  # of training and test, by id
    command: str = ""  # how train_all.sh was called

    def get(self, stage: str, key: str) -> dict | list:
        return self.stages.get(stage, {}).get(key, {})

    def transcripts(self, name: str) -> dict[str, dict]:
        return {row["id"]: row for row in self.get(f"7_eval/{name}", "rows")}

    def metrics(self, kind: str) -> list[dict]:
        """Of PPO with the 'learned' reward, round after round (6_ppo, 6_ppo_r2, ...), or with the 'raw' vote."""
        names = ("6_ppo_raw",) if kind == "raw" else ("6_ppo", "6_ppo_r")
        return [row for stage in self.stages if stage.rstrip("23456789") in names for row in self.get(stage, "rows")]


def read_run(folder: Path, arms: bool = False) -> Run:
    """What is finished in a run folder; with `arms` also the stages of an ablation, which have a + in their names."""
    stages, files = {}, {"4": "rewards.jsonl", "7": "transcripts.jsonl", **dict.fromkeys("256", "metrics.jsonl")}
    for path in sorted(folder.glob("**/done.json")):
        stage = path.parent.relative_to(folder).as_posix()
        if ".old" not in stage and (arms or "+" not in stage):  # a stage that was redone is kept aside as .old1
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                missing = {"results", "settings", "inputs", "versions", "threads", *COSTS} - record.keys()
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path} is damaged ({error}): remove it and run the stage again") from None
            runtime.require(not missing, f"{path} has no {', '.join(missing)}: remove it and run the stage again")
            file = path.parent / files.get(stage[0], "")
            stages[stage] = record | {"rows": list(read_jsonl(file)) if file.is_file() else []}
    runtime.require(any(s.startswith("7_eval/") for s in stages), f"{folder}: no finished evaluation in 7_eval yet")
    paths = [path for name in ("train", "test") if (path := folder / "0_questions" / f"{name}.jsonl").is_file()]
    command = (folder / "command.txt").read_text(encoding="utf-8") if (folder / "command.txt").is_file() else ""
    return Run(stages, {question.id: question for path in paths for question in load_questions(path)}, command)


def build_report(run: Run) -> dict:
    """The numbers of report.json: shares between 0 and 1, null for what is not there. The signals are of round 1."""
    accuracy = {name: row for name in MODELS if (row := run.get(f"7_eval/{name}", "results").get("accuracy"))}
    vote, reward, best = (run.get(stage, "results") for stage in ("4_pseudo_reward", "5_reward", "7_eval/best_of_n"))
    ppo, easy = run.metrics("learned") or [{}], [name for name in MODELS if not name.startswith("hard")]
    judge = ("accuracy", "name", "parameters", "scorer_parameters")  # of best-of-n, and not about the reward model
    needed = (
        "4_pseudo_reward",
        "5_reward",
        "6_ppo",
        "6_ppo_raw",
        *(f"7_eval/{name}" for name in easy if "_r" not in name or name == "ppo_raw"),
    )
    report = {
        "accuracy": {name: row for name, row in accuracy.items() if name in easy},
        "hard": {name: row for name, row in accuracy.items() if name not in easy},
        **{key: compare(run.transcripts(one), run.transcripts(other)) for key, (_, one, other) in COMPARISONS.items()},
        "pseudo_reward": {"share_kept": None} | vote | label_quality(run.get("4_pseudo_reward", "rows"), run.questions),
        "reward_model": {key: None for part, key in SIGNALS if part == "reward_model"}
        | reward
        | {key: value for key, value in best.items() if key not in judge},
        "ppo": {
            "first_score": ppo[0].get("objective/scores"),
            "last_score": ppo[-1].get("objective/scores"),
            "mean_kl": mean(row["objective/kl"] for row in ppo if row),
            "last_kl": ppo[-1].get("objective/kl"),
        },
        "rounds": rounds(run),
        "cost": {stage: {key: record[key] for key in COSTS} for stage, record in run.stages.items()},
        "missing": [stage for stage in needed if stage not in run.stages],
    }
    return json.loads(json.dumps(report), parse_constant=lambda name: None)  # NaN is not JSON: null


def rounds(run: Run) -> list[dict]:
    """Each round's signal and what came of it, for runs with ROUNDS=2 or more; else nothing."""
    found = []
    while all(f"{stage}{suffix}" in run.stages for stage in ROUND_STAGES[1:] for suffix in [_suffix(len(found))]):
        suffix, n = _suffix(len(found)), len(found) + 1
        vote, reward, ppo = (run.get(f"{stage}{suffix}", "results") for stage in ROUND_STAGES[1:])
        last = f"6_ppo{_suffix(n)}" not in run.stages
        accuracy = run.get(f"7_eval/{'ppo' if last else f'ppo_r{n}'}", "results").get("accuracy", {})
        found.append(
            {"round": n, "share_kept": vote["share_kept"], "pair_accuracy": reward["pair_accuracy"]}
            | label_quality(run.get(f"4_pseudo_reward{suffix}", "rows"), run.questions)
            | {"score": ppo["score"], "kl": ppo["kl"], "strict": accuracy.get("strict")}
        )
    return found if len(found) > 1 else []


def _suffix(rounds_before: int) -> str:
    return f"_r{rounds_before + 1}" if rounds_before else ""


def partings(one: Run, other: Run) -> list[str]:
    """Where two runs part, stage by stage: other settings, other inputs, the first step that logs another number."""
    seeds = [
        sorted({str(r["settings"]["seed"]) for r in run.stages.values() if "seed" in r["settings"]})
        for run in (one, other)
    ]
    found = [f"seed {' and '.join(seeds[0])} against {' and '.join(seeds[1])}"] if seeds[0] != seeds[1] else []
    for stage in [*one.stages, *(stage for stage in other.stages if stage not in one.stages)]:
        if stage not in one.stages or stage not in other.stages:
            found.append(f"{stage}: only in the {'first' if stage in one.stages else 'second'} run")
            continue
        a, b = one.stages[stage], other.stages[stage]
        for part in ("settings", "inputs"):
            keys = [key for key in {**a[part], **b[part]} if a[part].get(key) != b[part].get(key) and key != "seed"]
            if keys and part == "settings":
                found += [f"{stage}: --{key} {a[part].get(key)} against {b[part].get(key)}" for key in keys]
            elif keys:
                found.append(f"{stage}: other {', '.join(keys)}")
        for row, twin in zip(a["rows"], b["rows"]) if "step" in (a["rows"] or [{}])[0] else ():
            apart = [key for key in row.keys() & twin.keys() if not _close(row[key], twin[key])]
            if apart:
                key = min(apart)
                rest = f" and {len(apart) - 1} more" * (len(apart) > 1)
                found.append(f"{stage}: from step {row['step']} on: {key} {row[key]:.6g} against {twin[key]:.6g}{rest}")
                break
    return found


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


def _close(one: float, other: float) -> bool:
    return (
        one == other
        or (math.isnan(one) and math.isnan(other))
        or abs(one - other) <= 1e-6 * max(1.0, abs(one), abs(other))
    )


def matmul_rate(threads: int, seconds: float = 0.2) -> float:
    """FLOPs a second of a large fp32 matrix product on this machine, now: what it can do at best."""
    import torch

    torch.set_num_threads(threads)
    x, count = torch.randn(1024, 1024, device=runtime.default_device()), 0
    (x @ x)[0, 0].item()  # the first product also loads the library
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        (x @ x)[0, 0].item()  # reading a number waits for the GPU
        count += 1
    return 2 * 1024**3 * count / (time.perf_counter() - start)


def build_comparison(runs: Mapping[str, Run]) -> dict:
    """The numbers of comparison.json: means over the runs, pooled n and tests, each run's signals.

    The pooled p is too small, as seeds are not independent on the same question: p_by_question counts every question
    once, for the model that is right in more runs, and by_run is the difference in each run.
    """
    reports, accuracy, tests = {folder: build_report(run) for folder, run in runs.items()}, {}, {}
    for name in MODELS:
        if rows := [row for r in reports.values() if (row := (r["accuracy"] | r["hard"]).get(name))]:
            accuracy[name] = {key: mean(row[key] for row in rows) for key in rows[0] if key != "ci95"} | {
                "min–max": [f(row["strict"] for row in rows) for f in (min, max)],
                "n": sum(row["n"] for row in rows),
            }
    for key, (_, one, other) in COMPARISONS.items():
        ours, theirs = (
            {(folder, i): row for folder, run in runs.items() for i, row in run.transcripts(name).items()}
            for name in (one, other)
        )
        gain = Counter()
        for folder, i in ours.keys() & theirs.keys():
            gain[i] += ours[folder, i]["correct"] - theirs[folder, i]["correct"]
        p = mcnemar(sum(value > 0 for value in gain.values()), sum(value < 0 for value in gain.values()))
        tests[key] = (
            compare(ours, theirs)
            | ({"verdict": "within noise"} if gain and p >= 0.05 else {})
            | {
                "p_by_question": p if gain else None,
                "by_run": [report[key]["difference"] for report in reports.values()],
            }
        )
    settings = [
        {
            f"{stage}.{key}={value}"
            for stage, record in run.stages.items()
            for key, value in record["settings"].items()
            if key != "seed"
        }
        for run in runs.values()
    ]
    return {
        "accuracy": accuracy,
        **tests,
        "runs": reports,
        "settings_that_differ": sorted(set.union(*settings) - set.intersection(*settings)),
    }


# ---- from the numbers to the page ----------------------------------------------------------------------------------


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
                textwrap.fill(line.replace("\n", " | "), 110, initial_indent=" " * 4, subsequent_indent=" " * 10)
                for line in lines
            )
        )
    return "\n\n".join(text)


def cost_table(cost: Mapping[str, dict], rate: float) -> str:
    total = {key: (max if key == "peak_memory_mb" else sum)(row[key] for row in cost.values()) for key in COSTS}
    return table(
        ["stage", "seconds", "% of time", "tokens", "TFLOPs", "% of peak FLOP/s", "peak MB"],
        [
            [
                stage,
                f"{row['seconds']:.1f}",
                number(row["seconds"] / max(total["seconds"], 0.01)),
                f"{row['tokens']:,}",
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
        "TFLOPs: estimated, 2 (read) or 6 (trained) per parameter and token. Peak: a matrix product of 1024 x 1024 in "
        f"fp32, measured when this report was written, {rate / 1e9:,.0f} GFLOP/s.",
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
