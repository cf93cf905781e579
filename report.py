"""One page about a run, from its files: who answers how well, what is more than luck, how good the signal was.

    python report.py runs/tiny-0 --preset tiny --seed 0    # report.md, report.json and two pictures, in the run
    python report.py runs/tiny-0 runs/tiny-1               # two runs: model by model, and where they part

All models answer the same test questions, so two of them are compared question by question: only a question that one
gets right and the other wrong says anything (McNemar, 1947, in its exact binomial form). The gold answers of the
*training* questions are read here, for the report only: how often was the vote of arXiv 2502.19557 right? Which
signals and costs are shown is our choice.
"""

import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import runtime
from answers import is_correct
from data import Question, load_questions
from runtime.files import read_jsonl

MODELS = {  # name in report.json -> row of the table, in this order
    "teacher": "teacher",
    "base": "student before",
    "sft": "SFT",
    "best_of_n": "SFT, best of n",
    "ppo_raw": "PPO, raw vote",
    **{f"ppo_r{n}": f"PPO, after round {n}" for n in range(1, 9)},
    "ppo": "PPO, reward model",
    "hard_teacher": "hard: teacher",
    "hard_sft": "hard: SFT",
    "hard_ppo": "hard: PPO",
}
COMPARISONS = {  # key in report.json -> question, the one, the other
    "student_vs_teacher": ("Does the student beat its teacher?", "ppo", "teacher"),
    "student_vs_sft": ("Does PPO beat SFT alone?", "ppo", "sft"),
    "student_vs_raw": ("Does PPO gain more from the learned reward than from the raw vote?", "ppo", "ppo_raw"),
    "hard_vs_teacher": ("On harder questions, does the student beat its teacher?", "hard_ppo", "hard_teacher"),
    "hard_vs_sft": ("On harder questions, does PPO beat SFT alone?", "hard_ppo", "hard_sft"),
}
SIGNALS = {  # part and key of report.json -> what the number is; those with % are shares
    ("pseudo_reward", "share_kept"): "% of the training questions have a vote",
    ("pseudo_reward", "teacher_single_answer_accuracy"): "% of the teacher's single answers to those are right",
    ("pseudo_reward", "vote_accuracy"): "% of the votes are right",
    ("pseudo_reward", "label_accuracy"): "% of the responses have the 0/1 reward that gold would give",
    ("reward_model", "pair_accuracy"): "% of held-out pairs are in the vote's order (a tie is not)",
    ("reward_model", "auc_gold"): "AUC of its score against gold, test questions (chance 0.5)",
    ("reward_model", "pair_accuracy_gold"): "% of pairs of a right and a wrong answer are in order ...",
    ("reward_model", "longer_wins_gold"): "% ... and if the longer answer were taken to be the right one",
    ("reward_model", "equal_length_accuracy_gold"): "% ... and of the pairs of about equal length",
    ("reward_model", "ece"): "calibration error on held-out pairs (perfect 0)",
    ("reward_model", "ece_gold"): "calibration error against gold",
    ("reward_model", "length_correlation"): "correlation of its score with the length of the answer",
    ("reward_model", "single_sample_accuracy"): "% of the samples that best-of-n chose from are right ...",
    ("reward_model", "any_right"): "% ... and would be if a perfect judge chose",
}
COSTS = ("seconds", "tokens", "flops", "peak_memory_mb")
LEARNED, RAW = r"6_ppo(_r\d)?", "6_ppo_raw"  # PPO's folders, of all rounds

# ---- statistics ----------------------------------------------------------------------------------------------------


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


# ---- runs ----------------------------------------------------------------------------------------------------------


def evaluation(name: str) -> str:
    """Where eval.py left the answers of a model. Example: 'hard_sft' -> '7_eval/hard/sft'."""
    if name == "best_of_n":
        return "7_eval/best_of_n/sft"
    folder = "arms" if "+" in name else "hard" if name.startswith("hard_") else "test"
    return f"7_eval/{folder}/{name.removeprefix('hard_')}"


@dataclass(frozen=True)
class Run:
    """What the stages of a run left. One without done.json was not finished and counts as missing."""

    folder: Path
    stages: dict[str, dict]  # '2_sft' or '7_eval/test/ppo' -> its done.json
    questions: dict[str, Question]  # of training and test, by id

    def results(self, stage: str) -> dict:
        return self.stages.get(stage, {}).get("results", {})

    def rows(self, stage: str, file: str) -> list[dict]:
        path = self.folder / stage / file
        return list(read_jsonl(path)) if stage in self.stages and path.is_file() else []

    def transcripts(self, name: str) -> dict[str, dict]:
        return {row["id"]: row for row in self.rows(evaluation(name), "transcripts.jsonl")}

    def metrics(self, stages: str) -> list[dict]:
        """Rows of PPO's metrics.jsonl, round after round; a stage that was stopped counts as far as it came."""
        paths = sorted(self.folder.glob("6_ppo*/metrics.jsonl"))
        return [row for path in paths if re.fullmatch(stages, path.parent.name) for row in read_jsonl(path)]


def read_run(folder: Path, arms: bool = False) -> Run:
    """What is finished in a run folder; with `arms` also the stages of an ablation, which have a + in their names."""
    stages, needed = {}, {"results", "settings", "inputs", "versions", *COSTS}
    for path in sorted(folder.glob("**/done.json")):
        stage = path.parent.relative_to(folder).as_posix()
        if ".old" in stage or ("+" in stage and not arms):  # a stage that was redone is kept aside as .old1
            continue
        try:
            stages[stage] = json.loads(path.read_text(encoding="utf-8"))
            runtime.require(needed <= stages[stage].keys(), f"no {', '.join(needed - stages[stage].keys())}")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and run the stage again") from None
    runtime.require(any(s.startswith("7_eval/") for s in stages), f"{folder}: no finished evaluation in 7_eval yet")
    paths = [path for name in ("train", "test") if (path := folder / "0_questions" / f"{name}.jsonl").is_file()]
    return Run(folder, stages, {question.id: question for path in paths for question in load_questions(path)})


def build_report(run: Run) -> dict:
    """The numbers of report.json: shares between 0 and 1, null for what is not there. The signals are of round 1."""
    accuracy = {name: row for name in MODELS if (row := run.results(evaluation(name)).get("accuracy"))}
    vote, reward, best = (run.results(s) for s in ("4_pseudo_reward", "5_reward", evaluation("best_of_n")))
    about_answers = ("accuracy", "name", "parameters", "scorer_parameters")  # of best-of-n, not about its judge
    labels = label_quality(run.rows("4_pseudo_reward", "rewards.jsonl"), run.questions)
    wanted = [evaluation(name) for name in ("teacher", "base", "sft", "best_of_n", "ppo_raw", "ppo")]
    report = {
        "accuracy": {name: row for name, row in accuracy.items() if not name.startswith("hard")},
        "hard": {name: row for name, row in accuracy.items() if name.startswith("hard")},
        **{key: compare(run.transcripts(one), run.transcripts(other)) for key, (_, one, other) in COMPARISONS.items()},
        "pseudo_reward": {"share_kept": None} | vote | labels,
        "reward_model": {key: None for part, key in SIGNALS if part == "reward_model"}
        | reward
        | {key: value for key, value in best.items() if key not in about_answers},
        "cost": {stage: {key: record[key] for key in COSTS} for stage, record in run.stages.items()},
        "missing": [s for s in ("4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw", *wanted) if s not in run.stages],
    }
    return json.loads(json.dumps(report), parse_constant=lambda name: None)  # NaN is not JSON: null


def partings(one: Run, other: Run) -> dict[str, list[str]]:
    """What differs between two runs -> in which stages: settings, inputs, the first step that logs another number."""
    same = lambda x, y: math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-6) or (math.isnan(x) and math.isnan(y))
    found = {}
    for stage in sorted(one.stages.keys() | other.stages.keys()):
        a, b = one.stages.get(stage), other.stages.get(stage)
        apart = [] if a and b else [f"only in the {'first' if a else 'second'} run"]
        for part, what in (("settings", "--{} {} against {}"), ("inputs", "other {}")) if a and b else ():
            pairs = {key: (a[part].get(key), b[part].get(key)) for key in {**a[part], **b[part]}}
            apart += [what.format(key, *pair) for key, pair in pairs.items() if pair[0] != pair[1]]
        for row, twin in zip(one.rows(stage, "metrics.jsonl"), other.rows(stage, "metrics.jsonl")):
            keys = sorted(key for key in row.keys() & twin.keys() if not same(row[key], twin[key]))
            if keys:
                numbers = f"{keys[0]} {row[keys[0]]:.6g} against {twin[keys[0]]:.6g}"
                apart.append(f"from step {row['step']} on {numbers}" + f" and {len(keys) - 1} more" * (len(keys) > 1))
                break
        for difference in apart:
            found.setdefault(difference, []).append(stage)
    return found


def model_by_model(one: Run, other: Run) -> list[list[str]]:
    """Rows of a table: each model right in two runs, of what both answered, and the second run against the first."""
    rows = []
    for name, label in MODELS.items():
        first, second = one.transcripts(name), other.transcripts(name)
        if both := first.keys() & second.keys():
            r = compare(second, first)
            shares = [number(mean(answers[key]["correct"] for key in both)) for answers in (first, second)]
            change = f"{100 * r['difference']:+.1f}"
            rows.append([label, *shares, change, f"{r['wins']} : {r['losses']}", f"{r['p_value']:.2g}"])
    return rows


# ---- the page ------------------------------------------------------------------------------------------------------


def number(value: float | None, percent: bool = True) -> str:
    """0.613 -> '61.3' (percent) or '0.61'; '–' for None."""
    return "–" if value is None else f"{100 * value:.1f}" if percent else f"{value:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table that also reads well in a terminal: first column to the left, the others to the right."""
    cells = [[*header], *([str(cell) for cell in row] for row in rows)]
    left, *widths = [max(2, *map(len, column)) for column in zip(*cells)]  # 2: a right-aligned rule is at least -:
    cells.insert(1, ["-" * left, *("-" * (width - 1) + ":" for width in widths)])
    return "\n".join(f"| {row[0].ljust(left)} | {' | '.join(map(str.rjust, row[1:], widths))} |" for row in cells)


def accuracy_table(accuracy: Mapping[str, dict]) -> str:
    rows = []
    for name, row in accuracy.items():
        shares = [number(row[key]) for key in ("lenient", "no_answer", "truncated")]
        tokens, interval = number(row["mean_tokens"], percent=False), "–".join(map(number, row["ci95"]))
        rows.append([MODELS[name], number(row["strict"]), interval, *shares, tokens, row["n"]])
    return table(["%", "right", "95 %", "lenient", "none", "cut", "tokens", "n"], rows)


def verdict(report: Mapping, key: str) -> str:
    """A question of COMPARISONS and its answer. The first one is what a report is for."""
    (question, one, other), r = COMPARISONS[key], report[key]
    if not r["n"]:
        return f"{question} **Not known**: {evaluation(one)} and {evaluation(other)} are not both here."
    points = f"{100 * r['difference']:+.1f} points on {r['n']:,} answers"
    counts = f"{r['wins']} won : {r['losses']} lost, p = {r['p_value']:.2g}"
    return f"{question} **{r['verdict'].capitalize()}**: {points}, {counts}."


def signal_table(**reports: Mapping) -> str:
    value = lambda report, part, key: number(report[part][key], "%" in SIGNALS[part, key])
    rows = [[label, *(value(report, *key) for report in reports.values())] for key, label in SIGNALS.items()]
    return table(["signal", *reports], rows)


def shown(text: str) -> str:
    """What a model said, on one line and harmless: a control character, of an escape sequence say, becomes its code."""
    line = text.replace("\n", " | ")
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in line)


def examples(run: Run, fixed: bool, most: int = 5) -> str:
    """The first questions that PPO has right and SFT wrong, or the other way round, in blocks of code."""
    sft, ppo = run.transcripts("sft"), run.transcripts("ppo")
    keys = [key for key in sft if key in ppo and (sft[key]["correct"], ppo[key]["correct"]) == (not fixed, fixed)]
    text = [f"{len(keys)} questions {'fixed' if fixed else 'broken'} by PPO relative to SFT; the first, up to {most}:"]
    for key in keys[:most]:
        asked = replace(run.questions[key], instruction="").prompt if key in run.questions else sft[key]["question"]
        said = [f"gold: {sft[key]['gold']}", f"SFT:  {sft[key]['response']}", f"PPO:  {ppo[key]['response']}"]
        indent = {"initial_indent": " " * 4, "subsequent_indent": " " * 10}
        text.append("\n".join(textwrap.fill(shown(line), 110, **indent) for line in [f"{key}: {asked}", *said]))
    return "\n\n".join(text)


def cost_table(cost: Mapping[str, dict]) -> str:
    total = {key: (max if key == "peak_memory_mb" else sum)(row[key] for row in cost.values()) for key in COSTS}
    rows = []
    for stage, row in [*cost.items(), ("total", total)]:
        seconds, share = row["seconds"], number(row["seconds"] / max(total["seconds"], 0.01))
        work = [f"{row['tokens']:,}", f"{row['tokens'] / max(seconds, 0.01):,.0f}", f"{row['flops'] / 1e12:,.3f}"]
        rows.append([stage, f"{seconds:.1f}", share, *work, row["peak_memory_mb"]])
    return table(["stage", "seconds", "%", "tokens", "tokens/s", "TFLOPs", "peak MB"], rows)


def page_of_run(run: Run, report: Mapping) -> str:
    last, command = list(run.stages.values())[-1], run.folder / "command.txt"
    known = [key for key in COMPARISONS if report[key]["n"] or not key.startswith("hard")]  # not all tasks have harder
    parts = [
        f"# Preset {report['preset']}, seed {report['seed']}",
        f"torch {last['versions']['torch']} · python {last['versions']['python']}",
        verdict(report, "student_vs_teacher"),
        "## Accuracy on the test questions",
        accuracy_table(report["accuracy"] | report["hard"]),
        "Greedy answers, except best of n. Right: the stated answer is gold, with its 95 % interval (Wilson).\n"
        "Lenient: where none is stated, the last number or letter counts. None: no answer. Cut: did not end in time.",
        "\n".join(f"- {verdict(report, key)}" for key in known),
        "Exact McNemar tests on the same questions, two-sided, uncorrected; within noise: a p of 0.05 or more.",
        "## Quality of the signal",
        signal_table(value=report),
        "![scores of the reward model on samples of the SFT student, drawn where matplotlib is installed](reward.png)",
        "## Curves of PPO",
        "![curves of PPO, drawn where matplotlib is installed](curves.png)",
        "Where the score still rises and held-out accuracy falls, PPO exploits the reward model.",
        "## What PPO changed",
        examples(run, fixed=True),
        examples(run, fixed=False),
        "## Cost",
        cost_table(report["cost"]),
        "TFLOPs: estimated, 2 (read) or 6 (trained) per parameter and token. Tokens: sampled, or trained on. Seconds: "
        "with loading and saving.",
        "## To reproduce",
        textwrap.indent(command.read_text(encoding="utf-8").strip(), "    ") if command.is_file() else "",
        "Settings, and the SHA-256 of all inputs, are in the done.json of every stage.",
        f"Missing in this run: {', '.join(report['missing']) or 'nothing'}. Not shown: other seeds, other tasks.",
    ]
    return "\n\n".join(parts) + "\n"


def page_of_two(one: Run, other: Run) -> str:
    apart = [f"- {what}: {', '.join(stages)}" for what, stages in partings(one, other).items()]
    parts = [
        f"# {one.folder} against {other.folder}",
        "## Where they part",
        "\n".join(apart) or "Nowhere.",
        "## Accuracy on the test questions",
        table(["right, %", "first", "second", "difference", "won : lost", "p"], model_by_model(one, other)),
        "The second run against the first on the questions that both answered; exact McNemar tests, two-sided.",
        "## Quality of the signal",
        signal_table(first=build_report(one), second=build_report(other)),
        "## Curves of PPO",
        "![curves of PPO, drawn where matplotlib is installed](comparison.png)",
    ]
    return "\n\n".join(parts) + "\n"


# ---- pictures ------------------------------------------------------------------------------------------------------

BLUE, ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito (2008), which colour-blind readers can tell apart
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


def draw_curves(figure, curves: Mapping[str, Sequence[dict]]) -> None:
    """Eight panels over PPO's iterations: label -> rows of metrics.jsonl, round after round."""
    figure.set_size_inches(15, 6.5)
    for axis, (metric, title, unit) in zip(figure.subplots(2, 4).flat, PANELS):
        for (label, rows), (colour, line) in zip(curves.items(), ((BLUE, "-"), (ORANGE, "--"))):
            points = [(i, row[metric] * (100 if "%" in unit else 1)) for i, row in enumerate(rows) if metric in row]
            style = {"color": colour, "linestyle": line, "linewidth": 2, "marker": "o" if len(points) < 12 else None}
            axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
        if metric == "val/explained_variance":
            axis.set_ylim(max(axis.get_ylim()[0], -0.55), 1.05)  # a critic may start far below 0
        if metric == "val/eos_share":
            axis.set_ylim(top=100.5)
        axis.set(title=title, xlabel="PPO iteration", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def draw_judge(figure, scored: Sequence[dict]) -> None:
    """The reward model's scores of right and of wrong samples, and over their lengths: rows of scores.jsonl."""
    figure.set_size_inches(12, 4.2)
    histogram, by_length = figure.subplots(1, 2)
    samples = [sample for row in scored for sample in zip(row["scores"], row["tokens"], row["correct"])]
    scores = [score for score, _, _ in samples] or [0.0]
    for wanted, name, colour in ((True, "right", BLUE), (False, "wrong", ORANGE)):
        found = [(score, length) for score, length, right in samples if right == wanted]
        style = {"color": colour, "alpha": 0.5, "label": f"{name} ({len(found):,})"}
        histogram.hist([score for score, _ in found], 30, range=(min(scores), max(scores)), **style)
        by_length.scatter([length for _, length in found], [score for score, _ in found], 12, **style)
    histogram.set(title="Does it tell right from wrong?", xlabel="score of the reward model", ylabel="samples")
    by_length.set(title="Or does it judge by length?", xlabel="tokens of the sample", ylabel="score")
    for axis in (histogram, by_length):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)


def draw(out: Path, pictures: Mapping[str, tuple]) -> None:
    """Write each picture, name -> (how, what), as a PNG; without pyplot there is no window and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: they need matplotlib")
        return
    for name, (paint, what) in pictures.items():
        paint(figure := Figure(dpi=120, layout="constrained"), what)
        with runtime.replacing(out / f"{name}.png", "wb") as file:
            figure.savefig(file)


# ---- the script ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Write the report of one run, or compare two."""

    runs: tuple[str, ...]  # one run folder, or two
    out: str = ""  # folder for what is written; without it the run, of two the second
    preset: str = "custom"  # named in the title
    seed: int = 0  # named in the title


def main(cfg: Config) -> None:
    runtime.require(len(cfg.runs) <= 2, f"{len(cfg.runs)} runs: one for its report, or two to compare")
    runtime.require(len(set(map(Path, cfg.runs))) == len(cfg.runs), f"{' '.join(cfg.runs)}: the same folder twice")
    run, *others = (read_run(Path(folder)) for folder in cfg.runs)
    out = Path(cfg.out or cfg.runs[-1])
    out.mkdir(parents=True, exist_ok=True)
    if others:
        name, page = "comparison", page_of_two(run, *others)
        curves = {str(each.folder): each.metrics(LEARNED) for each in (run, *others)}
        pictures = {"comparison": (draw_curves, curves)}
    else:
        numbers = {"preset": cfg.preset, "seed": cfg.seed} | build_report(run)
        runtime.write_json(out / "report.json", numbers)
        name, page = "report", page_of_run(run, numbers)
        curves = {"PPO, learned reward": run.metrics(LEARNED), "PPO, raw vote": run.metrics(RAW)}
        scored = run.rows(evaluation("best_of_n"), "scores.jsonl")
        pictures = {"reward": (draw_judge, scored), "curves": (draw_curves, curves)}
    with runtime.replacing(out / f"{name}.md") as file:
        file.write(page)
    draw(out, pictures)
    print(page.split("\n\n## Quality")[0], f"{name}: {out / name}.md", sep="\n\n")


if __name__ == "__main__":
    runtime.launch(main, Config)
