"""What each part contributes, and how sure that is: the runs of bench/ablate.sh compared, one per seed.

    python bench/ablation.py runs/tiny-ablation/0 runs/tiny-ablation/1 --out results/tiny     # a page, two pictures

Every arm differs from the method in one thing and answers the same test questions in every seed. An interval must
therefore hold for other questions *and* for other seeds: both are drawn anew, with replacement, thousands of times (the
two-way or 'pigeonhole' bootstrap of Owen, arXiv 0709.4106), and a difference is taken question by question, seed by
seed. For few seeds Student's t over their differences stands beside it, and the larger p counts; the p-values of all
comparisons are corrected together (Holm, 1979). Which arms and which comparisons is our choice: arXiv 2502.19557 leaves
open what each part contributes.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from judge import majority_curve

import runtime
from pictures import draw_result
from report import MODELS, Run, evaluation, how_answered, mean, number, read_run, table

TIMES = ("0", "0.25", "0.5", "2", "4")  # bench/ablate.sh's KL coefficients, as multiples of the preset's
ARMS = {  # name -> row, in the order of the table
    "teacher": "teacher",
    "base": "student before",
    "sft": "SFT on the vote's winners",
    "sft+all": "SFT on all of the teacher's answers",
    "sft+tenth": "SFT on a tenth of the vote's winners",
    "sft+half": "SFT half as long",
    "sft+twice": "SFT twice as long",
    "sft+longer": "SFT, then SFT for the FLOPs of PPO",
    "sft+own": "SFT, then on its own winners, FLOPs of PPO",
    "sft+longest": "SFT on each question's longest winner",
    "sft+shortest": "SFT on each question's shortest winner",
    "majority_of_n": "SFT, the commonest of n answers",
    "best_of_n": "SFT, best of n by the reward model",
    "ppo": "SFT + PPO, learned reward: the method",
    "ppo_raw": "reward: the raw 0/1 vote",
    "ppo+gold": "reward: gold (an upper bound, not the method)",
    "ppo+longer": "reward: the number of tokens",
    "ppo+shorter": "reward: minus the number of tokens",
    **{f"ppo+kl{times}": f"KL coefficient x {times}" for times in TIMES},
    **{f"ppo+raw_kl{times}": f"raw vote, KL coefficient x {times}" for times in TIMES},
    "ppo+both": "votes of teacher and student",
    "ppo+teacher": "reward model from the teacher",
    "ppo+r2": "two rounds (in the second the student votes too)",
    "ppo+r2teacher": "two rounds, the teacher's votes alone",
}
PAIRS = (  # the one, the other: is the one better?
    ("ppo", "sft"),
    ("ppo", "teacher"),
    ("ppo", "sft+longer"),
    ("ppo", "sft+tenth"),
    ("ppo", "sft+own"),
    ("ppo", "sft+longest"),
    ("ppo", "sft+shortest"),
    ("ppo", "majority_of_n"),
    ("ppo", "best_of_n"),
    ("ppo", "ppo_raw"),
    ("ppo", "ppo+gold"),
    ("ppo", "ppo+longer"),
    ("ppo", "ppo+shorter"),
    ("ppo", "ppo+kl0"),
    ("ppo", "ppo+kl4"),
    ("ppo+both", "ppo"),
    ("ppo+teacher", "ppo"),
    ("ppo+r2", "ppo"),
    ("ppo+r2teacher", "ppo"),
    ("sft", "sft+all"),
    ("sft+longer", "sft"),
)
# of the others: 5_reward+ARM, or none
JUDGES = dict.fromkeys(("best_of_n", "ppo", *(f"ppo+kl{times}" for times in TIMES)), "5_reward")
RESAMPLES = 20_000


def two_way_bootstrap(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of (seeds, questions) values with both axes drawn anew: (RESAMPLES,).

    A question is drawn for all seeds at once and a seed for all questions, so what a hard question or a lucky seed does
    to many cells stays together. Where every cell has luck of its own this is cautious: that luck is counted up to
    three times. Where seeds differ much it is too sure of few (`gain`).
    """
    seeds, questions = values.shape
    means = []
    for _ in range(0, RESAMPLES, 1000):
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=1000)  # (1000, seeds) times drawn
        of_questions = rng.multinomial(questions, np.full(questions, 1 / questions), size=1000)  # (1000, questions)
        means.append(((of_seeds @ values) * of_questions).sum(1) / values.size)
    return np.concatenate(means)


def p_value(means: np.ndarray) -> float:
    """Two-sided: twice the share of bootstrap means on the far side of 0, never below 2 / (RESAMPLES + 1)."""
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(means) + 1)))


def student_p(t: float, freedom: int) -> float:
    """Two-sided p of Student's t (Abramowitz and Stegun, 26.7.3 and 4). Example: 2.776, 4 degrees -> 0.05."""
    angle, odd, inside = math.atan(abs(t) / math.sqrt(freedom)), freedom % 2, 0.0
    term = math.cos(angle) ** odd
    for k in range(odd, freedom, 2):
        inside += math.sin(angle) * term
        term *= math.cos(angle) ** 2 * (k + 1) / (k + 2)
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if odd else inside))


def student_bound(freedom: int) -> float:
    """The t whose two-sided p is 0.05, by bisection. Example: 4 degrees -> 2.776."""
    low, high = 0.0, 13.0  # it is 12.7 for one degree, and less for more
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > 0.05 else (low, middle)
    return high


def gain(values: np.ndarray, rng: np.random.Generator) -> dict:
    """Mean of (seeds, questions) differences, its 95 % interval, the mean of each seed, and p: is the true mean 0?

    Of two tests the one that is less sure counts, for p and for each end of the interval. The bootstrap takes few seeds
    for many: of five that differ by 3 to 10 points it errs 1 to 4 times in 100 at a level of 0.0033. Student's t over
    the seeds' means does not, but knows these questions alone. Together they err at most 7 times in 100 at 0.05.
    One seed says nothing of others: p is None, and the interval is for other questions alone.
    """
    by_seed, means, p = values.mean(1), two_way_bootstrap(values, rng), None
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    if (seeds := len(by_seed)) > 1:
        mean, error = by_seed.mean().item(), by_seed.std(ddof=1).item() / math.sqrt(seeds)
        half = student_bound(seeds - 1) * error
        low, high = min(low, mean - half), max(high, mean + half)
        p = max(p_value(means), student_p(mean / max(error, 1e-99), seeds - 1))
    return {"mean": float(values.mean()), "ci95": [low, high], "by_seed": by_seed.tolist(), "p": p}


def interval(values: np.ndarray, rng: np.random.Generator) -> dict:
    """Of shares and not of differences, (seeds, questions) of 0 to 1: no p, and the interval stays between 0 and 1."""
    found = gain(values, rng)
    return {"mean": found["mean"], "ci95": np.clip(found["ci95"], 0, 1).tolist(), "by_seed": found["by_seed"]}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the smallest p times n, the next times n - 1, ..., never falling, at most 1.

    Example: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06].
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def answered(run: Run, arm: str) -> dict[str, float]:
    """Test question -> 1 if the arm has it right, else 0; between answers of equally many votes a coin is tossed."""
    if arm == "majority_of_n":
        rows = run.rows(evaluation("best_of_n"), "scores.jsonl", ["id"])
        return {row["id"]: majority_curve([row["answers"]], [row["correct"]])[-1] for row in rows}
    return {key: float(row["correct"]) for key, row in run.transcripts(arm).items()}


def right(runs: Mapping[str, Run], arm: str) -> np.ndarray:
    """What an arm has right: (seeds, questions) of 0 to 1; all arms have the same columns."""
    rows = [answered(run, arm) for run in runs.values()]
    questions = sorted(rows[0])
    for folder, row in zip(runs, rows):
        runtime.require(
            sorted(row) == questions, f"{folder}: other questions in {evaluation(arm)} than in the first run"
        )
    return np.array([[row[key] for key in questions] for row in rows])


def build(runs: Mapping[str, Run]) -> dict:
    """The numbers of ablation.json: of every arm that all runs have, and of every comparison of two of those."""
    rng = np.random.default_rng(0)
    arms = [arm for arm in ARMS if all(answered(run, arm) for run in runs.values())]
    runtime.require(
        "sft" in arms and "ppo" in arms,
        f"{', '.join(runs)}: {evaluation('sft')} and {evaluation('ppo')} are needed in all",
    )
    answers = {arm: right(runs, arm) for arm in arms}
    accuracy = {}
    for arm, values in answers.items():
        policy, judge = f"6_{arm}", JUDGES.get(arm, arm.replace("ppo+", "5_reward+"))
        accuracy[arm] = interval(values, rng) | {
            "mean_tokens": mean(run.results(evaluation(arm))["accuracy"]["mean_tokens"] for run in runs.values()),
            "kl": mean(run.results(policy).get("kl") for run in runs.values()),
            "judge_pair_accuracy": mean(run.results(judge).get("pair_accuracy") for run in runs.values()),
        }
    tests = []
    for one, other in PAIRS:
        if one in arms and other in arms:
            found = gain(answers[one] - answers[other], rng)  # of (seeds, questions)
            tests.append({"one": one, "other": other, "difference": found.pop("mean")} | found)
    for test, corrected in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = corrected
        better = "better" if test["difference"] > 0 else "worse"
        test["verdict"] = better if corrected < 0.05 else "within noise"
    seconds = {folder: sum(record["seconds"] for record in run.stages.values()) for folder, run in runs.items()}
    return {
        "runs": list(runs),
        "questions": answers["ppo"].shape[1],
        "accuracy": accuracy,
        "comparisons": tests,
        "seconds": seconds,
        "missing": [arm for arm in ARMS if arm not in arms],
    }


# ---- from the numbers to the page ----------------------------------------------------------------------------------


def draw(path: Path, accuracy: Mapping[str, dict]) -> None:
    """Every arm: its seeds as dots, its mean and 95 % interval as a diamond and a bar."""
    figure = Figure(figsize=(9, 0.42 * len(accuracy) + 1.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    for y, (arm, row) in enumerate(accuracy.items()):
        colour = "#0072B2" if arm == "ppo" else "#555555" if arm in ("teacher", "base") else "#E69F00"  # Okabe and Ito
        axis.plot([100 * x for x in row["ci95"]], [y, y], color=colour, linewidth=3, alpha=0.5, solid_capstyle="butt")
        axis.plot([100 * x for x in row["by_seed"]], [y] * len(row["by_seed"]), "o", color=colour, markersize=4)
        axis.plot([100 * row["mean"]], [y], "D", color=colour, markersize=8, markerfacecolor="white")
    axis.set_yticks(range(len(accuracy)), [ARMS[arm] for arm in accuracy])
    axis.invert_yaxis()
    axis.set_xlabel("right, % (seeds; mean, 95 %)")
    axis.grid(axis="x", alpha=0.25)
    with runtime.replacing(path, "wb") as file:
        figure.savefig(file)


def draw_headline(path: Path, numbers: Mapping) -> None:
    """The picture of the README: the stages of the method as bars, the teacher as a line."""
    found = {arm: row | {"share": row["mean"]} for arm, row in numbers["accuracy"].items()}
    rows = {MODELS[arm]: found[arm] for arm in ("base", "sft", "best_of_n", "ppo_raw", "ppo") if arm in found}
    what = f"% right of {numbers['questions']:,} held-out questions, mean of {len(numbers['runs'])} seeds and 95 %"
    draw_result(path, rows, found.get("teacher"), what)


def page(numbers: Mapping) -> str:
    """ablation.md: what every arm reaches, what is more than noise."""
    signed = lambda share: f"{100 * share:+.1f}"
    arms = []
    for arm, row in numbers["accuracy"].items():
        interval, seeds = "–".join(map(number, row["ci95"])), " ".join(map(number, row["by_seed"]))
        measured = [number(row["mean_tokens"], percent=False), number(row["kl"], percent=False)]
        arms.append([ARMS[arm], number(row["mean"]), interval, seeds, *measured, number(row["judge_pair_accuracy"])])
    names, tests = ARMS | {"teacher": "the teacher", "sft": "SFT alone", "ppo": "the method"}, []
    for test in numbers["comparisons"]:
        interval, seeds = " to ".join(map(signed, test["ci95"])), " ".join(map(signed, test["by_seed"]))
        sure = [f"{test['p']:.2g}", f"{test['p_holm']:.2g}", test["verdict"]]
        label = f"{names[test['one']]} against {names[test['other']]}"
        tests.append([label, signed(test["difference"]), interval, seeds, *sure])
    seconds = ", ".join(f"{folder} {spent:,.0f}" for folder, spent in numbers["seconds"].items())
    parts = [
        "# What each part contributes",
        f"{len(numbers['runs'])} seeds, {numbers['questions']:,} test questions each. "
        f"{how_answered(numbers['accuracy'], ARMS)} "
        "Each arm differs from the method in one thing; those below the method are PPO from the same student.",
        table(["arm", "right, %", "95 %", "by seed", "tokens", "KL, nats", "judge: pairs, %"], arms),
        "![arms](ablation.png)",
        "KL: at the last iteration, from the policy that PPO started from. Judge: held-out pairs that its reward model "
        "orders as the vote does.",
        "## What is more than noise",
        table(["the one against the other", "points", "95 %", "by seed", "p", "p, Holm", "the one is"], tests),
        "p: the larger of two, of Student's t over the seeds' differences and of a paired two-way bootstrap over seeds "
        f"and questions ({RESAMPLES:,} resamples, so never below {2 / (RESAMPLES + 1):.1g}); 95 %: the wider of both. "
        f"The verdict rests on Holm's correction over all {len(tests)}; within noise: corrected, 0.05 or more.",
        f"Missing: {', '.join(numbers['missing']) or 'nothing'}. Seconds of computing, all stages: {seconds}.",
    ]
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Config:
    """Compare the arms of an ablation over seeds: RUN RUN ... --out FOLDER."""

    runs: tuple[str, ...]  # run folders, one per seed
    out: str  # folder for ablation.md, ablation.json, ablation.png and result.png


def main(cfg: Config) -> None:
    runtime.require(len(set(cfg.runs)) > 1, "two or more different run folders are needed, one per seed")
    numbers = build({folder: read_run(Path(folder), arms=True) for folder in cfg.runs})
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    draw(out / "ablation.png", numbers["accuracy"])
    draw_headline(out / "result.png", numbers)
    runtime.write_json(out / "ablation.json", numbers)
    with runtime.replacing(out / "ablation.md") as file:
        file.write(page(numbers))
    print(page(numbers), f"ablation: {out / 'ablation.md'}", sep="\n")


if __name__ == "__main__":
    runtime.launch(main, Config)
