"""Where a learned reward pays: PPO on it and on the raw vote, over iterations, teachers, and numbers of votes.

    python bench/pays.py default=runs/a/0 default=runs/a/1 WEAK=runs/a/WEAK-0 ... --out results/tiny-pays
    python bench/pays.py cut --votes runs/a/0/4_pseudo_reward --questions 20 --out ...     # the votes of 20 questions

The runs are those of bench/pays.sh; one name is one teacher, and every run of it another seed. Curves are of the
validation questions, where each reward's KL coefficient is chosen; what is said of the end is of the test questions.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ablation import TIMES, gain, interval, right

import runtime
from data import read_jsonl, write_jsonl
from report import Run, evaluation, label_quality, mean, number, read_run, table
from runtime import steps
from runtime.flags import Count, Input, Natural

REWARDS = {  # name -> what the arms of ppo.py are called, and with another KL coefficient
    "learned": ("ppo", "ppo+kl{}"),
    "raw": ("ppo_raw", "ppo+raw_kl{}"),
}
COLOURS = {"default": "#0072B2", "WEAK": "#D55E00", "GOOD": "#009E73"}  # Okabe and Ito (2008)
STYLES = {"learned": {"linestyle": "-", "marker": "o"}, "raw": {"linestyle": "--", "marker": "s"}}
Runs = Mapping[str, Run]


def arms_of(reward: str) -> dict[str, str]:
    """The arms with a reward: name -> multiple of the preset's KL coefficient."""
    plain, other = REWARDS[reward]
    return {plain: "1"} | {other.format(times): times for times in TIMES}


def curve(runs: Runs, arm: str, *names: str) -> np.ndarray:
    """Metrics of an arm at the iterations at which it answered the validation questions: (seeds, iterations, names).

    ValueError if the runs did not answer at the same iterations.
    """
    found = [[row for row in run.metrics(re.escape(f"6_{arm}")) if "valid/accuracy" in row] for run in runs.values()]
    looks = {tuple(row["step"] for row in rows) for rows in found}
    runtime.require(len(looks) == 1, f"{', '.join(runs)}: 6_{arm} looked at other iterations in one than in another")
    return np.array([[[row[name] for name in names] for row in rows] for rows in found])


def best_arm(runs: Runs, reward: str) -> str:
    """Of those that all runs have tested the arm that ended best on the validation questions."""
    there = [arm for arm in arms_of(reward) if all(run.transcripts(arm) for run in runs.values())]
    runtime.require(bool(there), f"{', '.join(runs)}: {evaluation(REWARDS[reward][0])} is not finished in all")
    return max(there, key=lambda arm: curve(runs, arm, "valid/accuracy")[:, -1].mean())


def of_teacher(runs: Runs, rng: np.random.Generator) -> dict:
    """What a teacher is worth, and the two rewards from its votes over the iterations."""
    labels = [label_quality(run.rows("4_pseudo_reward", "rewards.jsonl"), run.questions) for run in runs.values()]
    arms = {reward: best_arm(runs, reward) for reward in REWARDS}
    curves = {reward: curve(runs, arm, "step", "valid/accuracy") for reward, arm in arms.items()}  # (seeds, looks, 2)
    learned, raw = (of_seeds[..., 1].T for of_seeds in curves.values())  # (looks, seeds) each
    test = {name: right(runs, arm) for name, arm in {"teacher": "teacher", "sft": "sft", **arms}.items()}
    return {
        "runs": list(runs),
        "vote_accuracy": mean(row["vote_accuracy"] for row in labels),
        "kl_times": {reward: arms_of(reward)[arm] for reward, arm in arms.items()},
        "iterations": curves["learned"][0, :, 0].tolist(),
        "learned": learned.tolist(),
        "raw": raw.tolist(),
        "ahead": [gain(row[:, None], rng) for row in learned - raw],
        "test": {name: interval(values, rng) for name, values in test.items()},
        "test_ahead": gain(test["learned"] - test["raw"], rng),
    }


def of_votes(runs: Runs, rng: np.random.Generator) -> list[dict]:
    """Both rewards where fewer questions have a vote, as rows by their number; 'one': one answer is the vote."""
    rows = []
    for stage in next(iter(runs.values())).stages:
        if not (found := re.fullmatch(r"6_ppo(\+votes(\d+)|\+one|)", stage)):
            continue
        name, fewer = found[1].removeprefix("+"), found[2]
        arms = {"learned": f"ppo{found[1]}", "raw": f"ppo+raw_{name}" if name else "ppo_raw"}
        if not all(run.transcripts(arm) for run in runs.values() for arm in arms.values()):
            continue
        answers = {reward: right(runs, arm) for reward, arm in arms.items()}
        kept = [run.results(f"4_pseudo_reward{found[1]}").get("kept") for run in runs.values()]
        rows.append(
            {
                "votes": name or "all",
                "questions": int(fewer) if fewer else mean(kept),
                **{reward: interval(values, rng) for reward, values in answers.items()},
                "ahead": gain(answers["learned"] - answers["raw"], rng),
            }
        )
    return sorted(rows, key=lambda row: (row["votes"] == "one", row["questions"]))


def draw(path: Path, teachers: Mapping[str, dict], votes: Sequence[dict]) -> None:
    """Left accuracy over the iterations for each teacher, right accuracy over the number of votes; bars are 95 %."""
    figure = Figure(figsize=(10, 4.4), dpi=150, layout="constrained")
    left, right_axis = figure.subplots(1, 2)
    for name, row in teachers.items():
        for reward, style in STYLES.items():
            label = f"{name.lower()} teacher, {reward}"
            y = 100 * np.mean(row[reward], 1)
            left.plot(row["iterations"], y, color=COLOURS.get(name, "#777777"), label=label, **style)
    left.set(title="Over the iterations", xlabel="iteration", ylabel="validation questions right, %")
    left.xaxis.get_major_locator().set_params(integer=True)
    for (reward, style), beside in zip(STYLES.items(), (0.98, 1.02)):  # so that no bar hides another
        for one, label in ((False, reward), (True, f"{reward}, one answer is the vote")):
            rows = [row for row in votes if (row["votes"] == "one") == one]
            x, y = [beside * row["questions"] for row in rows], [100 * row[reward]["mean"] for row in rows]
            ends = np.array([row[reward]["ci95"] for row in rows]).reshape(-1, 2)  # (points, 2)
            bars = np.abs(100 * ends.T - y)
            shown = style | ({"linestyle": "none", "markersize": 9, "markerfacecolor": "white"} if one else {})
            right_axis.errorbar(x, y, bars, color=COLOURS["default"], label=label, capsize=3, **shown)
    right_axis.set(title="Over the votes, default teacher", xlabel="questions that have a vote", xscale="log")
    ticks = sorted({row["questions"] for row in votes})
    right_axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=45)  # near ones would overlap
    right_axis.set_xticks([], minor=True)
    right_axis.set_ylabel("test questions right, %")
    for axis, corner in ((left, "lower right"), (right_axis, "lower left")):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc=corner)
    with runtime.replacing(path, "wb") as file:
        figure.savefig(file)


def page(teachers: Mapping[str, dict], votes: Sequence[dict]) -> str:
    """pays.md: the two rewards for each teacher, over the iterations, and over the votes."""
    share = lambda row: f"{number(row['mean'])} [{', '.join(map(number, row['ci95']))}]"
    signed = lambda values: " ".join(f"{100 * value:+.1f}" for value in values)
    ahead = lambda row: [signed([row["mean"]]), signed(row["by_seed"]), "–" if row["p"] is None else f"{row['p']:.2g}"]
    ends, curves = [], []
    for name, row in teachers.items():
        times = " and ".join(row["kl_times"].values())
        ends.append(
            [name, number(row["vote_accuracy"]), *map(share, row["test"].values()), *ahead(row["test_ahead"]), times]
        )
        for i, iteration in enumerate(row["iterations"]):
            means = [number(mean(row[reward][i])) for reward in REWARDS]
            curves.append([name, f"{iteration:.0f}", *means, *ahead(row["ahead"][i])])
    label = lambda row: f"{row['questions']:,.0f}{', one answer each' * (row['votes'] == 'one')}"
    few = [[label(row), share(row["learned"]), share(row["raw"]), *ahead(row["ahead"])] for row in votes]
    difference = ["learned - raw", "by seed", "p"]
    parts = [
        "# Where a learned reward pays",
        "Points and % of questions; in brackets 95 % intervals; p as in ablation.md, not corrected. KL coefficients "
        "are multiples of the preset's, for each reward the one that ended best on the validation questions.",
        "## Teachers of different quality",
        table(["teacher", "votes right", "teacher right", "SFT", "learned", "raw", *difference, "KL x"], ends),
        "![curves](pays.png)",
        "On the validation questions, before the update of an iteration:",
        table(["teacher", "iteration", "learned", "raw", *difference], curves),
        "## Fewer votes",
        "So many training questions have a vote; SFT and the KL coefficient are those of the method. The reward model "
        "judges answers to all questions, the raw vote pays those to its own questions alone.",
        table(["questions", "learned", "raw", *difference], few),
    ]
    return "\n\n".join(parts) + "\n"


# ---- fewer votes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CutConfig:
    """Cut what pseudo_reward.py wrote to some questions, or a teacher's samples to the first one of each question."""

    out: str  # folder for rewards.jsonl and pairs.jsonl, or for samples.jsonl
    votes: Input = ""  # folder of pseudo_reward.py
    samples: Input = ""  # the teacher's answers, JSONL
    questions: Count = 20  # how many keep their vote; of two numbers the smaller one's are among the greater one's
    seed: Natural = 0  # which


def cut(cfg: CutConfig) -> None:
    runtime.require(bool(cfg.votes) != bool(cfg.samples), "give --votes or --samples")
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    if cfg.samples:
        first = {}
        for row in read_jsonl(cfg.samples, ["id"]):
            first.setdefault(row["id"], row)
        return write_jsonl(out / "samples.jsonl", first.values())
    voted = [row["id"] for row in read_jsonl(Path(cfg.votes) / "rewards.jsonl")]
    order = steps.permutation(len(voted), cfg.seed, "votes")
    kept = {voted[i] for i in order[: cfg.questions]}
    for name in ("rewards.jsonl", "pairs.jsonl"):
        write_jsonl(out / name, [row for row in read_jsonl(Path(cfg.votes) / name) if row["id"] in kept])


# ---- the script ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Compare learned and raw reward over teachers and votes: NAME=RUN NAME=RUN ... --out FOLDER."""

    runs: tuple[str, ...]  # teacher=run folder; default is the one whose runs have fewer votes as well
    out: str  # folder for pays.md, pays.json and pays.png


def main(cfg: Config) -> None:
    groups: dict[str, dict[str, Run]] = {}
    for word in cfg.runs:
        name, _, folder = word.partition("=")
        runtime.require(bool(name and folder), f"'{word}': TEACHER=FOLDER is expected")
        groups.setdefault(name, {})[folder] = read_run(Path(folder), arms=True)
    rng = np.random.default_rng(0)
    teachers = {name: of_teacher(runs, rng) for name, runs in groups.items()}
    votes = of_votes(groups.get("default", {}), rng) if "default" in groups else []
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    draw(out / "pays.png", teachers, votes)
    runtime.write_json(out / "pays.json", {"teachers": teachers, "votes": votes})
    with runtime.replacing(out / "pays.md") as file:
        file.write(page(teachers, votes))
    print(page(teachers, votes), f"pays: {out / 'pays.md'}", sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["cut"]:
        runtime.launch(cut, CutConfig, sys.argv[2:])
    else:
        runtime.launch(main, Config)
