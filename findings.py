"""From a run's files to its numbers: what the stages left, what is more than luck, how good the signal was.

report.py and ablation.py make pages of these. All models answer the same test questions, so two of them are compared
question by question: only a question that one gets right and the other wrong says anything (McNemar, 1947, in its
exact binomial form). The gold answers of the *training* questions are read here, for reports only: how often was the
vote of arXiv 2502.19557 right?
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

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
ROUND_STAGES = ("3_student", "4_pseudo_reward", "5_reward", "6_ppo")

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


# ---- one run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What the stages of a run left. One without done.json was not finished and counts as missing."""

    stages: dict[str, dict]  # folder, such as '2_sft' or '7_eval/ppo' -> its done.json and the 'rows' of its JSONL
    questions: dict[str, Question]  # of training and test, by id
    command: str = ""  # how train_all.sh was called
    stopped: dict[str, list[dict]] = field(default_factory=dict)  # PPO that has not ended: rows of its metrics.jsonl

    def get(self, stage: str, key: str) -> dict | list:
        return self.stages.get(stage, {}).get(key, {})

    def transcripts(self, name: str) -> dict[str, dict]:
        return {row["id"]: row for row in self.get(f"7_eval/{name}", "rows")}

    def metrics(self, kind: str) -> list[dict]:
        """Of PPO with the 'learned' reward, round after round (6_ppo, 6_ppo_r2, ...), or with the 'raw' vote.

        A stage that was stopped counts as far as it came.
        """
        names = ("6_ppo_raw",) if kind == "raw" else ("6_ppo", "6_ppo_r")
        rows = {stage: self.get(stage, "rows") for stage in self.stages} | self.stopped
        return [row for stage in sorted(rows) if stage.rstrip("23456789") in names for row in rows[stage]]


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
            rows = list(read_jsonl(file, ["id"] if stage[0] in "47" else [])) if file.is_file() else []
            whole = stage[0] != "7" or all("correct" in row for row in rows)
            runtime.require(whole, f"{file}: a line has no 'correct': remove {path} and run the stage again")
            stages[stage] = record | {"rows": rows}
    stopped = {
        path.parent.name: list(read_jsonl(path))
        for path in folder.glob("6_ppo*/metrics.jsonl")
        if path.parent.name not in stages and not {".", "+"} & set(path.parent.name)
    }
    runtime.require(any(s.startswith("7_eval/") for s in stages), f"{folder}: no finished evaluation in 7_eval yet")
    paths = [path for name in ("train", "test") if (path := folder / "0_questions" / f"{name}.jsonl").is_file()]
    command = (folder / "command.txt").read_text(encoding="utf-8") if (folder / "command.txt").is_file() else ""
    return Run(stages, {question.id: question for path in paths for question in load_questions(path)}, command, stopped)


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


def _close(one: float, other: float) -> bool:
    return (
        one == other
        or (math.isnan(one) and math.isnan(other))
        or abs(one - other) <= 1e-6 * max(1.0, abs(one), abs(other))
    )


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
