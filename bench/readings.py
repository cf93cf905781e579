"""How an answer to a question of tasks/arith.py reads the question, and whether it calculates right: for reports alone.

    python bench/readings.py runs/tiny-0 runs/tiny-1 --out results/tiny-readings       # readings.md, readings.json

Nothing that trains imports this. Both are told from the texts: which days and operations the lines take from the
question, whatever numbers come out of them, and whether each line follows from the one before. The page says how often
the reward model prefers a right reading to each kind of misreading, and how much of each kind the greedy answers are.
"""

import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablation import ARMS

import generate
import runtime
from data import Tokenizer, read_jsonl
from eval import SCORED_AT_ONCE, grade
from model import load_scalar_model
from quality import against_gold
from report import Run, evaluation, mean, number, read_run, table
from reward import UNFINISHED_SCORE, replace_unfinished, score_responses
from runtime.flags import Count

Event = tuple[str, str, str]  # day, operation, amount

KINDS = {
    "right": "every event once",
    "in place": "an invented event in the place of a real one",
    "added": "an invented event beside the real ones",
    "left out": "one event left out",
    "twice": "one event counted twice",
    "other": "anything else",
}
START = re.compile(r"\w+ has (\d+) ")
EVENT = re.compile(r"On (\w+) \w+ (?:(doubles|triples|loses half)|(gives|buys|loses|sells)\D* (\d+))")
TIMES = {"doubles": ("*", "2"), "triples": ("*", "3"), "loses half": ("/", "2")}
SIGN = {"gives": "+", "buys": "+", "loses": "-", "sells": "-"}
LINE = re.compile(r"(\w+) (\d+)([-+*/])(\d+)=(\d+)")
LAST = re.compile(r"#### (\d+)")


def events_asked(question: str) -> list[Event]:
    """Example: 'Ava has 3 pens. On Monday Ava buys 4 more. On Friday Ava loses half. ...' -> [('Monday', '+', '4'),
    ('Friday', '/', '2')]."""
    return [(day, *(TIMES[word] if word else (SIGN[verb], n))) for day, word, verb, n in EVENT.findall(question)]


def events_said(answer: str) -> list[Event] | None:
    """What the lines take, in their order; None of an answer in another form. Example: 'Monday 3+4=7\\n#### 7' ->
    [('Monday', '+', '4')]."""
    *lines, last = answer.split("\n")
    found = [LINE.fullmatch(line) for line in lines]
    return [(m[1], m[3], m[4]) for m in found] if all(found) and LAST.fullmatch(last) else None


def reading(question: str, answer: str) -> str:
    """One of KINDS. An invented event is on a day that the question does not name."""
    asked, said = events_asked(question), events_said(answer)
    if said is None:
        return "other"
    if said == asked:
        return "right"
    named = {day for day, _, _ in asked}
    if len(said) == len(asked):
        [(day, _, _), *more] = [one for one, other in zip(said, asked) if one != other]
        return "in place" if day not in named and not more else "other"
    if any(asked[:i] + asked[i + 1 :] == said for i in range(len(asked))):
        return "left out"
    for i, event in enumerate(said):
        if said[:i] + said[i + 1 :] == asked and (event in asked or event[0] not in named):
            return "twice" if event in asked else "added"
    return "other"


def calculated(question: str, answer: str) -> bool:
    """Whether the lines start from the question's number, each from the result before, and all results are right."""
    if events_said(answer) is None:
        return False
    now = int(START.match(question)[1])
    for _, before, op, amount, after in LINE.findall(answer):
        a, n = int(before), int(amount)
        right = {"+": a + n, "-": a - n, "*": a * n, "/": a / (n or math.nan)}[op]
        if a != now or int(after) != right:
            return False
        now = right
    return int(LAST.search(answer)[1]) == now


# ---- what the judge makes of them ----------------------------------------------------------------------------------

OPPONENTS: dict[str, Callable[[dict], bool]] = {  # of a right reading that is calculated right
    "misread, any kind": lambda row: row["kind"] != "right",
    **{f"misread: {KINDS[kind]}": lambda row, kind=kind: row["kind"] == kind for kind in KINDS if kind != "right"},
    "misread, and right by luck": lambda row: row["kind"] != "right" and row["correct"],
    "read right, calculated wrong": lambda row: row["kind"] == "right" and not row["calculated"],
}
POLICIES = {"teacher": "teacher", "sft": "SFT student", "ppo": "PPO student"}
PAIRS = ("same question", "same question, as many lines", "any two questions, as many lines")
QUALITY = {
    "auc_gold": "AUC, right against wrong",
    "pair_accuracy_gold": "right against wrong, same question",
    "equal_length_accuracy_gold": "the same, of about equal length",
    "longer_wins_gold": "the same, had the longer answer won",
    "length_correlation_gold": "correlation of score and length",
    "single_sample_accuracy": "right samples",
}


def told(question: str, answer: str) -> dict:
    """What the texts say: the kind of reading, whether it is calculated right, the number of lines."""
    return {"kind": reading(question, answer), "calculated": calculated(question, answer), "lines": answer.count("\n")}


def in_order(rows: Sequence[dict], opponent: Callable[[dict], bool]) -> dict[str, list]:
    """How often a right reading, calculated right, outscores an opponent: {name of PAIRS: [share, pairs]}.

    Rows have id, kind, calculated, lines, score. Both answer one question; and have as many lines; or have as many
    lines, whatever they answer.
    """
    good = [row for row in rows if row["kind"] == "right" and row["calculated"]]
    sides = good, [row for row in rows if opponent(row)]
    (asked, other), (lines, others), (scores, lower) = (
        [np.array([row[key] for row in side], kind) for side in sides]
        for key, kind in (("id", str), ("lines", int), ("score", float))
    )
    won = scores[:, None] > lower  # (good, bad)
    same, equal = asked[:, None] == other, lines[:, None] == others  # (good, bad) each
    return {
        name: [float(won[pairs].mean()) if pairs.any() else None, int(pairs.sum())]
        for name, pairs in zip(PAIRS, (same, same & equal, equal))
    }


@dataclass(frozen=True)
class Config:
    """What the reward models of runs read, and how their policies read: RUN RUN ... --out FOLDER."""

    runs: tuple[str, ...]  # finished run folders of train_all.sh, one per seed
    out: str  # folder for readings.md and readings.json
    samples: Count = 8  # answers of each model to each test question


def sampled(cfg: Config, run: Run, name: str) -> list[dict]:
    """Several answers of a model to each test question, and what gold, the texts and the reward model say of them."""
    [model], asked = run.stages[evaluation(name)]["config"]["models"], run.stages["3_student"]["config"]
    questions, out = run.folder / "0_questions" / "test.jsonl", run.folder / "7_eval" / f"readings+{name}"
    settings = {key: asked[key] for key in ("temperatures", "max_new_tokens", "batch_size", "lenient")}
    settings |= {"samples": cfg.samples, "seed": runtime.seed_of(asked["seed"], "readings")}
    model = model.partition("=")[2]
    generate.main(generate.Config(model=model, questions=str(questions), out=str(out), source="student", **settings))
    said = list(read_jsonl(out / "samples.jsonl"))
    judge = load_scalar_model(run.folder / "5_reward", torch.float32, runtime.default_device())
    tokenizer = Tokenizer(run.folder / "5_reward")
    prompts = [tokenizer.chat(run.questions[row["id"]].prompt) for row in said]
    responses = [tokenizer.response(row["response"]) for row in said]
    scores = score_responses(judge, prompts, responses, SCORED_AT_ONCE)  # (samples of all questions,)
    scores = replace_unfinished(scores, [row["finish"] for row in said], UNFINISHED_SCORE).tolist()
    rows = []
    for row, score in zip(said, scores):
        question = run.questions[row["id"]]
        graded = grade(question, row["response"], row["finish"], row["tokens"]) | {"score": score}
        rows.append(graded | told(question.question, row["response"]))
    return rows


def judged(rows: Sequence[dict], samples: int) -> dict:
    """The reward model against gold over all samples, and against each opponent over different texts."""
    fields = {"scores": "score", "correct": "correct", "tokens": "tokens"}
    parts = [rows[i : i + samples] for i in range(0, len(rows), samples)]  # a question's samples stand together
    quality = against_gold([{key: [row[name] for row in part] for key, name in fields.items()} for part in parts], 1.0)
    different = list({(row["id"], row["response"]): row for row in rows if row["finish"] == "stop"}.values())
    return {
        "quality": {name: quality[name] for name in QUALITY},
        "in_order": {name: in_order(different, opponent) for name, opponent in OPPONENTS.items()},
    }


# ---- what the policies do ------------------------------------------------------------------------------------------


def rewarded(run: Run) -> list[dict]:
    """The training answers that the vote calls right, as transcripts."""
    voted = run.rows("4_pseudo_reward", "rewards.jsonl")
    winners = [(row["id"], said["response"]) for row in voted for said in row["responses"] if said["reward"] == 1]
    return [grade(run.questions[key], response, "stop", None) for key, response in winners]


def kinds_of(transcripts: Iterable[dict]) -> dict:
    """By kind the share of the answers and how many of these are right; 'calculated': of the right readings."""
    rows = [row | told(row["question"], row["response"]) for row in transcripts]
    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    return {
        "share": {kind: len(found) / len(rows) for kind, found in of_kind.items()},
        "right": {kind: mean(row["correct"] for row in found) for kind, found in of_kind.items()},
        "calculated": mean(row["calculated"] for row in of_kind["right"]),
    }


# ---- over seeds, and the page --------------------------------------------------------------------------------------


def over_seeds(found: Sequence) -> object:
    """Numbers of every seed, in dicts and lists of one form, to {"mean", "low", "high"} of those that are known."""
    if isinstance(found[0], Mapping):
        return {key: over_seeds([one[key] for one in found]) for key in found[0]}
    if isinstance(found[0], list):
        return [over_seeds(values) for values in zip(*found)]
    known = [value for value in found if value is not None]
    return {"mean": mean(known), "low": min(known, default=None), "high": max(known, default=None)}


def span(row: Mapping, percent: bool = True) -> str:
    """Example: {"mean": 0.95, "low": 0.94, "high": 0.96} -> '95.0 (94.0–96.0)'."""
    middle, *ends = (number(row[key], percent) for key in ("mean", "low", "high"))
    return middle if ends[0] == ends[1] else f"{middle} ({'–'.join(ends)})"


def page(numbers: Mapping) -> str:
    """readings.md: what the judge prefers, and how the policies read."""
    policies, arms = numbers["judge"], {"vote": "training answers that the vote rewards", **ARMS}
    quality = [
        [text, *(span(row["quality"][key], False) for row in policies.values())] for key, text in QUALITY.items()
    ]
    pairs = lambda cell: f"{span(cell[0])} of {cell[1]['mean']:,.0f}"
    order = [
        table(
            [f"samples of the {POLICIES[name]}: right reading against", *PAIRS],
            [[against, *map(pairs, cells.values())] for against, cells in row["in_order"].items()],
        )
        for name, row in policies.items()
    ]
    kinds = [
        [arms[name], *(f"{span(row['share'][kind])}; {number(row['right'][kind]['mean'])}" for kind in KINDS)]
        + [span(row["calculated"])]
        for name, row in numbers["kinds"].items()
    ]
    parts = [
        "# What the reward model reads, and how the policies read",
        f"Means of {len(numbers['runs'])} runs, in brackets the lowest and the highest. Kinds of readings are told "
        "from the texts of answers to test questions; nothing that trains knows them. Each model was sampled "
        f"{numbers['samples']} times at each question.",
        "## The reward model on samples of three models",
        table(["", *(POLICIES[name] for name in policies)], quality),
        "A right reading that is calculated right should score above what is in the row. % of the pairs in that order, "
        "of how many pairs in a run. No text counts twice for one question.",
        *order,
        "## How the answers read the question",
        "% of the answers; then how many of these are right, %. Greedy, but for those of n samples. The last column: "
        "right readings that are calculated right, %.",
        table(["", *KINDS.values(), "calculated"], kinds),
    ]
    return "\n\n".join(parts) + "\n"


def main(cfg: Config) -> None:
    judges, policies = defaultdict(list), defaultdict(list)
    for folder in cfg.runs:
        run = read_run(Path(folder), arms=True)
        for name in POLICIES:
            runtime.require(evaluation(name) in run.stages, f"{folder}: {evaluation(name)} is not finished")
            if run.results(evaluation(name))["parameters"]:  # recorded answers are not sampled anew
                judges[name].append(judged(sampled(cfg, run, name), cfg.samples))
        answers = {arm: run.rows(evaluation(arm), "transcripts.jsonl") for arm in ARMS if arm != "majority_of_n"}
        for name, transcripts in {"vote": rewarded(run), **answers}.items():
            if transcripts:
                policies[name].append(kinds_of(transcripts))
    numbers = {"runs": list(cfg.runs), "samples": cfg.samples}
    numbers["judge"] = {name: over_seeds(found) for name, found in judges.items()}
    numbers["kinds"] = {name: over_seeds(found) for name, found in policies.items() if len(found) == len(cfg.runs)}
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    runtime.write_json(out / "readings.json", numbers)
    with runtime.replacing(out / "readings.md") as file:
        file.write(page(numbers))
    print(page(numbers), f"readings: {out / 'readings.md'}", sep="\n")


if __name__ == "__main__":
    runtime.launch(main, Config)
