"""One page about a run, from its files: who answers how well, what is more than luck, how good the signal was.

    python report.py runs/tiny-0 --preset tiny --seed 0    # report.md, report.json and two pictures, in the run

Two models are compared on the questions that one gets right and the other wrong, for only those say anything (McNemar,
1947, exact). Gold answers of *training* questions are read for the report alone: how often is the vote of arXiv
2502.19557 right? Which numbers are shown is our choice. bench/compare.py compares two runs.
"""

import json
import math
import re
import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import runtime
from answers import is_correct
from pictures import draw_curves, draw_result
from runtime.files import read_jsonl, read_object
from runtime.flags import Share
from tasks import Question, load_questions

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
COMPARISONS = {  # key in report.json -> is the one better than the other?
    "student_vs_teacher": ("ppo", "teacher"),
    "student_vs_sft": ("ppo", "sft"),
    "student_vs_raw": ("ppo", "ppo_raw"),
    "hard_vs_teacher": ("hard_ppo", "hard_teacher"),
    "hard_vs_sft": ("hard_ppo", "hard_sft"),
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
    ("reward_model", "length_correlation"): "correlation of its score with the length of the answer",
}
FEW = 0.05  # share of the training questions with a right vote: below, there is nothing to learn
NOTHING = (
    "there is nothing to distil. Take a teacher that can answer them: TEACHER=folder, or PRESET=smollm2 "
    "(docs/models.md); the bundled models know the questions of QUESTIONS=arith alone."
)
COSTS = ("seconds", "tokens", "flops", "peak_memory_mb")
LEARNED, RAW = r"6_ppo(_r\d)?", "6_ppo_raw"  # PPO's folders, of all rounds

CODE = "    "  # a line that begins so is shown as it is
MEANS_NOTHING = "QUICK only tries whether every stage works: these numbers mean nothing."


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value: how often are `wins + losses` fair coins at least as uneven?

    Twice the lower tail of Binomial(n, 1/2), at most 1. Example: (10, 2) -> 2 * (1 + 12 + 66) / 4096 = 0.0386.
    """
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))  # whole numbers, so no n is too large
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


def look_at_teacher(run: Path, min_share: float) -> None:
    """Say after the vote whether there is anything to learn; ValueError where no vote counts, for the run would fail.

    A vote counts where `min_share` of the answers agree. Its gold answers are read for this sentence alone.
    """
    questions = {question.id: question for question in load_questions(run / "0_questions" / "train.jsonl")}
    rows = [row for row in read_jsonl(run / "1_vote" / "rewards.jsonl") if row["share"] >= min_share]
    told = f"the teacher agrees with itself on {len(rows)} of {len(questions)} questions"
    runtime.require(bool(rows), f"{told}: {NOTHING}")
    right = label_quality(rows, questions)["vote_accuracy"]
    print(told + ("" if right is None else f", and {right:.0%} are right"))
    if len(rows) / len(questions) * (1 if right is None else right) < FEW:
        print(textwrap.fill(f"warning: {NOTHING}", 80), flush=True)


# ---- from the run to its numbers -----------------------------------------------------------------------------------


def evaluation(name: str) -> str:
    """Where eval.py left the answers of a model. Example: 'hard_sft' -> '7_eval/hard/sft'."""
    folder = "arms" if "+" in name else "hard" if name.startswith("hard_") else "test"
    return "7_eval/best_of_n/sft" if name.endswith("_of_n") else f"7_eval/{folder}/{name.removeprefix('hard_')}"


@dataclass(frozen=True)
class Run:
    """What the stages of a run left. One without done.json was not finished and counts as missing."""

    folder: Path
    stages: dict[str, dict]  # '2_sft' or '7_eval/test/ppo' -> its done.json
    questions: dict[str, Question]  # of training and test, by id

    def results(self, stage: str) -> dict:
        return self.stages.get(stage, {}).get("results", {})

    def rows(self, stage: str, file: str, required: Iterable[str] = ()) -> list[dict]:
        path = self.folder / stage / file
        return list(read_jsonl(path, required)) if stage in self.stages and path.is_file() else []

    def transcripts(self, name: str) -> dict[str, dict]:
        return {row["id"]: row for row in self.rows(evaluation(name), "transcripts.jsonl", ["id"])}

    def metrics(self, stages: str) -> list[dict]:
        """Rows of PPO's metrics.jsonl, round after round; a stage that was stopped counts as far as it came."""
        paths = sorted(self.folder.glob("6_ppo*/metrics.jsonl"))
        return [row for path in paths if re.fullmatch(stages, path.parent.name) for row in read_jsonl(path)]


def read_run(folder: Path, arms: bool = False) -> Run:
    """What is finished in a run folder; with `arms` also the stages of an ablation, which have a + in their names."""
    stages = {}
    for path in sorted(folder.glob("**/done.json")):
        stage = path.parent.relative_to(folder).as_posix()
        if ".old" not in stage and (arms or "+" not in stage):  # a stage that was redone is kept aside as .old1
            stages[stage] = read_object(path)
            runtime.require({"results", *COSTS} <= stages[stage].keys(), f"{path} is not whole: run that stage again")
    runtime.require(any(s.startswith("7_eval/") for s in stages), f"{folder}: no finished evaluation in 7_eval yet")
    paths = [path for name in ("train", "test") if (path := folder / "0_questions" / f"{name}.jsonl").is_file()]
    return Run(folder, stages, {question.id: question for path in paths for question in load_questions(path)})


def build_report(run: Run) -> dict:
    """The numbers of report.json: shares between 0 and 1, null for what is not there. The signals are of round 1."""
    accuracy = {name: row for name in MODELS if (row := run.results(evaluation(name)).get("accuracy"))}
    best = run.results(evaluation("best_of_n"))  # about its answers, and about the reward model
    scorer = {key: best[key] for key in best if key not in ("accuracy", "name", "parameters", "scorer_parameters")}
    labels = label_quality(run.rows("4_pseudo_reward", "rewards.jsonl"), run.questions)
    unknown = {key: None for part, key in SIGNALS if part == "reward_model"}
    wanted = ["6_ppo", "6_ppo_raw", *map(evaluation, ("teacher", "base", "sft", "best_of_n", "ppo_raw", "ppo"))]
    report = {
        "accuracy": {name: row for name, row in accuracy.items() if not name.startswith("hard")},
        "hard": {name: row for name, row in accuracy.items() if name.startswith("hard")},
        **{key: compare(run.transcripts(one), run.transcripts(other)) for key, (one, other) in COMPARISONS.items()},
        "pseudo_reward": {"share_kept": None} | run.results("4_pseudo_reward") | labels,
        "reward_model": unknown | run.results("5_reward") | scorer,
        "sampled": {
            name: run.results(f"7_eval/best_of_n/{name}").get("single_sample_accuracy") for name in ("sft", "ppo")
        },
        "cost": {stage: {key: record[key] for key in COSTS} for stage, record in run.stages.items()},
        "missing": [stage for stage in wanted if stage not in run.stages],
    }
    return json.loads(json.dumps(report), parse_constant=lambda name: None)  # NaN is not JSON: null


# ---- from the numbers to the page ----------------------------------------------------------------------------------


def number(value: float | None, percent: bool = True) -> str:
    """0.613 -> '61.3' (percent) or '0.61'; '–' for None."""
    return "–" if value is None else f"{100 * value:.1f}" if percent else f"{value:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table that also reads well in a terminal: first column to the left, the others to the right."""
    cells = [[*header], *([str(cell) for cell in row] for row in rows)]
    left, *widths = [max(2, *map(len, column)) for column in zip(*cells)]  # 2: a right-aligned rule is at least -:
    cells.insert(1, ["-" * left, *("-" * (width - 1) + ":" for width in widths)])
    return "\n".join(f"| {row[0].ljust(left)} | {' | '.join(map(str.rjust, row[1:], widths))} |" for row in cells)


BETTER = {"yes": "better than", "no": "worse than", "within noise": "within noise of"}


def in_words(report: Mapping) -> str:
    """The answer in a few sentences; of a model that has no row here nothing is said."""
    shares = {name: f"{number(row['strict'])}\u00a0%" for name, row in report["accuracy"].items()}
    said, verdicts = [], []
    if "ppo" in shares:
        n, rest = report["accuracy"]["ppo"]["n"], {"base": "the student began with", "sft": "had after SFT"}
        told = " and ".join(f"{verb} {shares[name]}" for name, verb in rest.items() if name in shares)
        told = f"; {told}" if told else ""
        said.append(f"PPO with the reward model has {shares['ppo']} of {n:,} held-out questions right{told}.")
    for key, (one, other) in COMPARISONS.items():
        if one == "ppo" and (found := report[key])["n"]:
            gain = f"{100 * found['difference']:+.1f} points"
            verdicts.append(f"{BETTER[found['verdict']]} {MODELS[other]} ({gain})")
    said += [f"That is {', '.join(verdicts)}."] * bool(verdicts)
    votes = report["pseudo_reward"]
    if votes["vote_accuracy"] is not None and votes["share_kept"] * votes["vote_accuracy"] < FEW:
        said.append(f"Of the training questions hardly one has a right vote: {NOTHING}")
    return " ".join(said)


def how_answered(accuracy: Mapping[str, Mapping], names: Mapping[str, str]) -> str:
    """Who was not asked for greedy answers; recorded ones are told by their unknown number of tokens."""
    recorded = [f"{names[name]} (recorded)" for name, row in accuracy.items() if row["mean_tokens"] is None]
    return f"Greedy, but for {' and '.join(['those of n samples', *recorded])}."


def how_sampled(sampled: Mapping[str, float | None]) -> str:
    """What PPO has done to sampled answers, which it learns from; the greedy ones can be as good as before."""
    if None in sampled.values():
        return ""
    after = f"{number(sampled['sft'])} % are right after SFT and {number(sampled['ppo'])} % after PPO"
    return f"Of single answers, sampled as in PPO, {after}."


def accuracy_rows(report: Mapping) -> Iterator[list[object]]:
    for name, row in (report["accuracy"] | report["hard"]).items():
        shares = [number(row[key]) for key in ("lenient", "no_answer", "truncated")]
        tokens, interval = number(row["mean_tokens"], percent=False), "–".join(map(number, row["ci95"]))
        yield [MODELS[name], number(row["strict"]), interval, *shares, tokens, row["n"]]


def comparison(label: str, found: Mapping) -> list[object]:
    """What `compare` found, as better, points, won : lost, p and n."""
    points, counts = f"{100 * found['difference']:+.1f}", f"{found['wins']} : {found['losses']}"
    return [label, found["verdict"], points, counts, f"{found['p_value']:.2g}", found["n"]]


def cost_rows(cost: Mapping[str, dict]) -> Iterator[list[object]]:
    """A row for each stage, all evaluations in one, and one for the whole run."""
    groups = {}
    for stage, row in cost.items():
        groups.setdefault(stage.split("/")[0], []).append(row)
    for name, rows in (groups | {"total": list(cost.values())}).items():
        seconds, tokens, flops = (sum(row[key] for row in rows) for key in ("seconds", "tokens", "flops"))
        speed, peak = f"{tokens / max(seconds, 0.01):,.0f}", max(row["peak_memory_mb"] for row in rows)
        yield [name, f"{seconds:.1f}", f"{tokens:,}", speed, f"{flops / 1e12:,.3f}", peak]


def examples(run: Run, fixed: bool, most: int = 5) -> str:
    """The first questions that PPO has right and SFT wrong, or the other way round, in blocks of code."""
    sft, ppo = run.transcripts("sft"), run.transcripts("ppo")
    keys = [key for key in sft if key in ppo and (sft[key]["correct"], ppo[key]["correct"]) == (not fixed, fixed)]
    text = [f"{len(keys)} questions {'fixed' if fixed else 'broken'} by PPO relative to SFT; the first, up to {most}:"]
    for key in keys[:most]:
        asked = replace(run.questions[key], instruction="").prompt if key in run.questions else sft[key]["question"]
        said = [f"gold: {sft[key]['gold']}", f"SFT:  {sft[key]['response']}", f"PPO:  {ppo[key]['response']}"]
        indent = {"initial_indent": CODE, "subsequent_indent": CODE + " " * 6}
        text.append("\n".join(textwrap.fill(runtime.shown(line), 110, **indent) for line in [f"{key}: {asked}", *said]))
    return "\n\n".join(text)


def settings_of(run: Run) -> str:
    """The flags of every stage, in a block of code."""
    lines = []
    for stage, record in run.stages.items():
        flags = ", ".join(f"{name} {value}" for name, value in record.get("settings", {}).items() if value != "")
        lines.append(textwrap.indent(textwrap.fill(runtime.shown(f"{stage}: {flags}"), 96), CODE))
    return "\n".join(lines)


def page_of(run: Run, report: Mapping, title: str) -> str:
    """report.md, in lines that do not wrap at 100 columns."""
    compared = [comparison(MODELS[b], report[key]) for key, (_, b) in COMPARISONS.items() if report[key]["n"]]
    signals = [[label, number(report[part][key], "%" in label)] for (part, key), label in SIGNALS.items()]
    command = run.folder / "command.txt"  # and the commit, a line each
    made_by = command.read_text(encoding="utf-8").splitlines() if command.is_file() else []
    versions = " ".join(" ".join(pair) for pair in next(iter(run.stages.values())).get("versions", {}).items())
    parts = [
        f"# {title}",
        f"**{MEANS_NOTHING}**" * report["quick"],
        "![share of the test questions that each has right](result.png)",
        in_words(report),
        f"Missing in this run: {', '.join(report['missing']) or 'nothing'}. Not shown: other seeds, other tasks.",
        "## Accuracy on the test questions",
        table(["%", "right", "95 %", "lenient", "none", "cut", "tokens", "n"], accuracy_rows(report)),
        how_answered(report["accuracy"], MODELS)
        + " Right: states gold (95 %: Wilson); lenient: or ends in it; cut: had not ended. "
        + how_sampled(report["sampled"]),
        table(["PPO against", "better", "points", "won : lost", "p", "n"], compared),
        "Exact McNemar tests on the same questions, two-sided, uncorrected; within noise: a p of 0.05 or more. A p "
        "is about other questions; one seed gives none about other seeds (bench/ablation.py compares several).",
        "## Quality of the signal",
        table(["signal", "value"], signals),
        "## Curves of PPO",
        "![curves of PPO](curves.png)",
        "Where the score still rises and held-out accuracy falls, PPO exploits the reward model.",
        "## What PPO changed",
        examples(run, fixed=True),
        examples(run, fixed=False),
        "## Cost",
        table(["stage", "seconds", "tokens", "tokens/s", "TFLOPs", "peak MB"], cost_rows(report["cost"])),
        "Tokens: sampled, or trained on. TFLOPs: estimated, 2 (read) or 6 (trained) per parameter and token.",
        "## How it was made",
        "\n".join(CODE + runtime.shown(line) for line in [*made_by, versions]),
        "<details><summary>The settings of every stage</summary>",
        settings_of(run),
        "</details>",
        "SHA-256 of inputs and outputs: in the done.json of each stage.",
    ]
    filled = [textwrap.fill(part, 100) if "\n" not in part and len(part) > 100 else part for part in parts if part]
    return "\n\n".join(filled) + "\n"


def draw_pictures(run: Run, report: Mapping, title: str) -> None:
    """result.png and curves.png; the raw vote's score has another unit than the learned one's, and stays out."""
    rows = {MODELS[name]: {"share": row["strict"], "ci95": row["ci95"]} for name, row in report["accuracy"].items()}
    teacher = rows.pop(MODELS["teacher"], None)
    draw_result(run.folder / "result.png", rows, teacher, "% of the held-out questions right")
    raw = [{name: value for name, value in row.items() if name != "objective/scores"} for row in run.metrics(RAW)]
    draw_curves(run.folder / "curves.png", {"learned reward": run.metrics(LEARNED), "raw vote": raw}, title)


@dataclass(frozen=True)
class Config:
    """Write the report of a run into its folder."""

    run: tuple[str, ...]  # the run folder
    preset: str = "custom"  # named in the title
    seed: int = 0  # named in the title
    quick: bool = False  # a run that only tried every stage: its page says so
    only_teacher: bool = False  # no report, but whether the teacher's votes are worth learning from
    min_share: Share = 0.0  # for that: a vote counts from this share of the answers on


def main(cfg: Config) -> None:
    runtime.require(len(cfg.run) == 1, f"{len(cfg.run)} runs: a report is of one; bench/compare.py compares two")
    if cfg.only_teacher:
        look_at_teacher(Path(cfg.run[0]), cfg.min_share)
        return
    run = read_run(Path(cfg.run[0]))
    numbers = {"preset": cfg.preset, "seed": cfg.seed, "quick": cfg.quick} | build_report(run)
    title = f"Preset {cfg.preset}, seed {cfg.seed}"
    runtime.write_json(run.folder / "report.json", numbers)
    with runtime.replacing(run.folder / "report.md") as file:
        file.write(page_of(run, numbers, title))
    draw_pictures(run, numbers, title)
    shares = [row[:3] for row in accuracy_rows(numbers | {"hard": {}})]
    print(table([f"of {len(run.transcripts('ppo'))} held-out questions", "% right", "95 %"], shares))
    print(f"{MEANS_NOTHING}\n" * cfg.quick + f"report: {run.folder / 'report.md'}")
    print(f"ask its models: python play.py {shlex.quote(str(run.folder))}")


if __name__ == "__main__":
    runtime.launch(main, Config)
