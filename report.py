"""One page about a run, from its files: who answers how well, what is more than luck, how good the signal was.

    python report.py --run runs/tiny-0 --preset tiny --seed 0            # report.md, report.json, curves.png in the run
    python report.py --runs runs/tiny-0,runs/tiny-1 --out results/tiny   # comparison.md, .json and .png over the seeds

All models answer the same test questions, so two of them are compared question by question: only a question that one
gets right and the other wrong says anything (McNemar, 1947, in its exact binomial form). The gold answers of the
*training* questions are read here, for reports only: they tell afterwards how often the vote of arXiv 2502.19557 was
right. Which ablations, signals and costs are shown is our choice: the ones that a reader of the paper misses.
"""

import datetime
import itertools
import json
import os
import textwrap
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure  # without pyplot: no window, no global state; a PNG goes through Agg
from matplotlib.lines import Line2D

import runtime
from data import Question, is_correct, load_questions, read_jsonl

MODELS = {  # folder in 7_eval -> row of the table, in this order
    "teacher": "teacher", "base": "student base", "sft": "SFT", "best_of_n": "SFT + best-of-n",
    "ppo_raw": "SFT + PPO, raw vote", "ppo": "SFT + PPO, learned reward",
    "hard_teacher": "teacher, hard", "hard_sft": "SFT, hard", "hard_ppo": "SFT + PPO, learned reward, hard",
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
    ("pseudo_reward", "teacher_single_answer_accuracy"): "% of the teacher's answers to those are right, one by one",
    ("pseudo_reward", "vote_accuracy"): "% of the votes are right",
    ("pseudo_reward", "label_accuracy"): "% of the responses have the 0/1 reward that gold would give",
    ("reward_model", "pair_accuracy"): "% of held-out pairs: reward model agrees with the vote (a tie is wrong)",
    ("reward_model", "auc_gold"): "AUC of the reward model against gold on test questions (chance 0.5)",
    ("reward_model", "ece"): "calibration error of the reward model (perfect 0)",
    ("reward_model", "length_correlation"): "correlation of its score with the length of the answer",
    ("best_of_n", "single_sample_accuracy"): "% of the sampled test answers are right ...",
    ("best_of_n", "any_right"): "% ... and if a perfect judge chose among the n of each question",
}
REWARDS = {"learned": ("PPO, learned reward", "#0072B2"), "raw": ("PPO, raw vote", "#E69F00")}  # Okabe and Ito, 2008
PANELS = (  # metrics (a second one is dotted), title, unit
    (["objective/scores"], "Score of the sampled answers", "learned: standard deviations, raw: ±1"),
    (["objective/kl"], "KL from the starting policy", "nats per answer"),
    (["valid/accuracy"], "Validation accuracy (for the report only)", "share right, greedy"),
    (["response_length/mean"], "Response length", "tokens, mean"),
    (["policy/entropy_avg"], "Entropy of the policy", "nats per token"),
    (["val/explained_variance", "policy/clipfrac_avg"], "Explained variance, clip fraction (dotted)", "share"),
)

# ---- pure functions ------------------------------------------------------------------------------------------------


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses`: how often are fair coins at least as uneven?

    Twice the lower tail of Binomial(wins + losses, 1/2), at most 1, in exact integers: no count is too large.
    Example: (10, 2) -> 2 * (1 + 12 + 66) / 4096 = 0.0386; (0, 0) -> 1.
    """
    n, tail, ways = wins + losses, 0, 1  # ways: n over k, made from the one before (math.comb each time is slow)
    for k in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def compare(one: Mapping[Hashable, dict], other: Mapping[Hashable, dict]) -> dict:
    """Two models' transcripts by question id; difference: share right of `one` - of `other`, where both answered.

    verdict, is the one better: 'yes', 'no' (it is worse), 'within noise' (p at least 0.05), 'not known' (no question).
    Example: right T T F against T F F -> difference 1/3, p_value 1, wins 1, losses 0, n 3, 'within noise'.
    """
    ids = one.keys() & other.keys()
    wins = sum(one[i]["correct"] and not other[i]["correct"] for i in ids)
    losses = sum(other[i]["correct"] and not one[i]["correct"] for i in ids)
    p = mcnemar(wins, losses) if ids else None
    return {"difference": (wins - losses) / len(ids) if ids else None, "p_value": p, "wins": wins, "losses": losses,
            "n": len(ids), "verdict": "not known" if p is None else "within noise" if p >= 0.05
            else "yes" if wins > losses else "no"}


def spread(values: Iterable[float | None]) -> dict:
    """Mean, least and greatest of the numbers that are there. Example: [1, 3, None] -> mean 2, min 1, max 3."""
    known = [value for value in values if value is not None]
    return {"mean": sum(known) / len(known) if known else None, "min": min(known, default=None),
            "max": max(known, default=None)}


def label_quality(rows: Sequence[dict], questions: Mapping[str, Question]) -> dict:
    """How often vote and 0/1 reward of rewards.jsonl agree with gold; None where no question has a gold answer.

    Example: gold 7, vote 7, the teacher says 7 (reward 1), 8 (0) and 7 (0: it was cut off) -> vote_accuracy 1,
    label_accuracy 2/3, teacher_single_answer_accuracy 2/3.
    """
    known = [(row, questions[row["id"]]) for row in rows if row["id"] in questions and questions[row["id"]].answer]
    graded = [(r, is_correct(r["answer"], q.answer, q.kind)) for row, q in known for r in row["responses"]]
    return {
        "vote_accuracy": spread(is_correct(row["vote"], q.answer, q.kind) for row, q in known)["mean"],
        "label_accuracy": spread((r["reward"] == 1) == right for r, right in graded)["mean"],
        "teacher_single_answer_accuracy": spread(right for r, right in graded if r["source"] == "teacher")["mean"],
    }


def number(value: float | None, percent: bool = True) -> str:
    """0.613 -> '61.3' (percent) or '0.61'; '–' for None."""
    return "–" if value is None else f"{100 * value:.1f}" if percent else f"{value:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table that also reads well in a terminal: first column to the left, the others to the right."""
    cells = [[*header], *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {row[0].ljust(widths[0])} | {' | '.join(map(str.rjust, row[1:], widths[1:]))} |" for row in cells)


# ---- reading a run -------------------------------------------------------------------------------------------------


def read_done(run: Path) -> dict[str, dict]:
    """The finished stages: folder, such as '2_sft' or '7_eval/ppo' -> its done.json. All others count as missing."""
    runtime.require(run.is_dir(), f"{run}: there is no such run folder")
    paths = {path.parent.relative_to(run).as_posix(): path for path in run.glob("**/done.json")}
    runtime.require(any(stage.startswith("7_eval/") for stage in paths),
                    f"{run}: no finished evaluation in 7_eval, so there is nothing to report yet")
    return {stage: json.loads(path.read_text(encoding="utf-8")) for stage, path in sorted(paths.items())
            if ".old" not in stage}  # what was redone is kept under that name


def read_transcripts(run: Path, name: str) -> dict[str, dict]:
    """Question id -> transcript of an evaluation; empty if it was not finished."""
    folder = run / "7_eval" / name
    rows = read_jsonl(folder / "transcripts.jsonl", ["id", "question", "gold", "response", "correct"])
    return {row["id"]: row for row in rows} if (folder / "done.json").is_file() else {}


def read_rounds(run: Path, kind: str) -> list[list[dict]]:
    """metrics.jsonl of each round of PPO with the 'learned' reward, or of the only one with the 'raw' vote."""
    stages = ["6_ppo_raw"] if kind == "raw" else ["6_ppo", *(f"6_ppo_r{i}" for i in range(2, 10))]
    return [list(read_jsonl(run / stage / "metrics.jsonl")) for stage in stages if (run / stage / "done.json").is_file()]


def read_signal(run: Path, results: Mapping[str, dict], suffix: str, metrics: Sequence[dict]) -> dict:
    """Quality of the pseudo-rewards, the reward model and PPO of one round; None for what is not there."""
    labels, reward = results.get(f"4_pseudo_reward{suffix}"), results.get(f"5_reward{suffix}", {})
    best = {} if suffix else results.get("7_eval/best_of_n", {})  # which judges the first reward model
    path = run / "0_questions" / "train.jsonl"
    questions = {question.id: question for question in load_questions(path)} if path.is_file() else {}
    rows = list(read_jsonl(run / f"4_pseudo_reward{suffix}" / "rewards.jsonl")) if labels else []
    scores, kl = ([row[f"objective/{key}"] for row in metrics] or [None] for key in ("scores", "kl"))
    keys = ("pair_accuracy", "ece", "length_correlation", "held_out_pairs", "ties", "margin")
    return {
        "pseudo_reward": label_quality(rows, questions) | {"share_kept": (labels or {}).get("share_kept")},
        "reward_model": {key: reward.get(key) for key in keys} | {"auc_gold": best.get("auc_gold")},
        "best_of_n": {key: best.get(key) for key in ("single_sample_accuracy", "any_right")},
        "ppo": {"first_score": scores[0], "last_score": scores[-1], "mean_kl": spread(kl)["mean"], "last_kl": kl[-1]},
    }


def build_report(run: Path, preset: str, seed: int) -> dict:
    """All numbers of report.json: shares between 0 and 1, null for what is not there."""
    done = read_done(run)
    results = {stage: record["results"] for stage, record in done.items()}
    accuracy = {name: results[f"7_eval/{name}"]["accuracy"] for name in MODELS if f"7_eval/{name}" in done}
    rounds = [read_signal(run, results, f"_r{index}" if index > 1 else "", metrics)
              for index, metrics in enumerate(read_rounds(run, "learned") or [[]], 1)]
    needed = ["4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw", *(f"7_eval/{name}" for name in MODELS)]
    report = {
        "preset": preset, "seed": seed,
        "accuracy": {name: row for name, row in accuracy.items() if not name.startswith("hard")},
        "hard": {name: row for name, row in accuracy.items() if name.startswith("hard")},
        **{key: compare(*(read_transcripts(run, name) for name in pair)) for key, (_, *pair) in COMPARISONS.items()},
        **rounds[0], "later_rounds": rounds[1:],
        "cost": {stage: {key: record[key] for key in ("seconds", "tokens", "flops", "peak_memory_mb")}
                 for stage, record in done.items()},
        "missing": [stage for stage in needed if stage not in done],
    }
    return json.loads(json.dumps(report), parse_constant=lambda name: None)  # NaN is not JSON: null


# ---- the picture and the page --------------------------------------------------------------------------------------


def draw_curves(path: Path, runs: Sequence[Path]) -> None:
    """Six panels over PPO iterations, one line per run; a further round starts a new line behind a dashed border."""
    figure = Figure(figsize=(12, 6.6), dpi=150, layout="constrained")
    for axis, (metrics, title, unit) in zip(figure.subplots(2, 3).flat, PANELS):
        for run, kind, (metric, style) in itertools.product(runs, REWARDS, zip(metrics, "-:")):
            start = 0
            for rows in read_rounds(run, kind):
                x = [i for i, row in enumerate(rows) if metric in row]
                axis.plot([start + 1 + i for i in x], [rows[i][metric] for i in x], style, color=REWARDS[kind][1],
                          marker="o" * (len(x) < 20), markersize=4, linewidth=1.8 if len(runs) == 1 else 1.0)
                if start:
                    axis.axvline(start + 0.5, color="0.6", linewidth=0.8, linestyle="--")
                start += len(rows)
        if len(metrics) > 1:
            axis.set_ylim(max(axis.get_ylim()[0], -1.05), 1.05)  # a critic may start far below 0
        axis.set(title=title, xlabel="PPO iteration", ylabel=unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend([Line2D([], [], color=colour, linewidth=2.5) for _, colour in REWARDS.values()],
                  [label for label, _ in REWARDS.values()], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def accuracy_table(accuracy: Mapping[str, dict]) -> str:
    return table(["%", "right", "95 % interval", "lenient", "no answer", "truncated", "mean tokens", "n"], [
        [MODELS[name], number(row["strict"]), "–".join(map(number, row["ci95"])), number(row["lenient"]),
         number(row["no_answer"]), number(row["truncated"]), f"{row['mean_tokens']:.1f}", row["n"]]
        for name, row in accuracy.items()])


def sentences(results: Mapping) -> str:
    """One line per question of COMPARISONS: its answer in one run, or in several pooled."""
    lines = []
    for key, (question, one, other) in COMPARISONS.items():
        r = results[key]
        line = f"- {question} **{r['verdict'].capitalize()}**: "
        if r["n"]:
            line += (f"{100 * r['difference']:+.1f} points on {r['n']} answers, {r['wins']} won : {r['losses']} lost, "
                     f"p = {r['p_value']:.3g}.")
        else:
            line += f"7_eval/{one} and 7_eval/{other} are not both here."
        if r.get("by_run"):
            line += (f" Run by run: {', '.join(f'{100 * d:+.1f}' for d in r['by_run'])}. Each question once: "
                     f"p = {r['p_by_question']:.3g}.")
        lines += [line] * (r["n"] > 0 or not key.startswith("hard"))  # not every task has a hard split
    return "\n".join(lines)


def examples(run: Path, fixed: bool, most: int = 5) -> str:
    """The first questions that PPO answers right and SFT wrong (fixed), or the other way round, in full."""
    sft, ppo, path = read_transcripts(run, "sft"), read_transcripts(run, "ppo"), run / "0_questions" / "test.jsonl"
    keys = [key for key in sft if key in ppo and (sft[key]["correct"], ppo[key]["correct"]) == (not fixed, fixed)]
    # a transcript does not hold the options of a multiple choice
    asked = {q.id: replace(q, instruction="").prompt for q in load_questions(path)} if path.is_file() else {}
    text = [f"PPO {'fixed' if fixed else 'broke'} {len(keys)} questions relative to SFT; the first {len(keys[:most])}:"]
    for key in keys[:most]:
        lines = (f"{key}: {asked.get(key, sft[key]['question'])}", f"gold: {sft[key]['gold']}",
                 f"SFT:  {sft[key]['response']}", f"PPO:  {ppo[key]['response']}")
        text.append("\n".join(textwrap.fill(line.replace("\n", " | "), 110, initial_indent=" " * 4,
                                            subsequent_indent=" " * 10) for line in lines))
    return "\n\n".join(text)


def cost_table(cost: Mapping[str, dict]) -> str:
    """Seconds, share of the time, tokens, TFLOPs and peak memory per stage, all evaluations in one row."""
    groups = {name: [row for stage, row in cost.items() if stage.split("/")[0] == name]
              for name in dict.fromkeys(stage.split("/")[0] for stage in cost)} | {"total": list(cost.values())}
    total = sum(row["seconds"] for row in cost.values()) or 1.0
    return table(["stage", "seconds", "% of time", "tokens", "TFLOPs", "peak MB"], [
        [name, f"{sum(row['seconds'] for row in rows):.1f}", number(sum(row["seconds"] for row in rows) / total),
         f"{sum(row['tokens'] for row in rows):,}", f"{sum(row['flops'] for row in rows) / 1e12:,.2f}",
         f"{max(row['peak_memory_mb'] for row in rows):,}"] for name, rows in groups.items()])


def markdown(run: Path, report: Mapping) -> str:
    """report.md."""
    done, rounds = read_done(run), [report, *report["later_rounds"]]
    last = list(done.values())[-1]
    signals = [[label, *(number(r[part][key], "%" in label) for r in rounds)] for (part, key), label in SIGNALS.items()]
    settings = [" ".join([stage, *(f"{key}={value}" for key, value in record["settings"].items() if value != ""),
                          *(f"{key}:{digest[:8]}" for key, digest in record["inputs"].items())])
                for stage, record in done.items()]
    return "\n\n".join([
        f"# Preset {report['preset']}, seed {report['seed']}",
        f"{datetime.date.today()} · {os.cpu_count()} CPU cores, {last['threads']} torch thread(s), "
        f"{runtime.default_device().type} · torch {last['versions']['torch']}, python {last['versions']['python']}",
        "## Accuracy on the test questions", accuracy_table(report["accuracy"]),
        "Greedy answers, except best-of-n. Right: the stated answer is gold (Wilson interval). Lenient: where none is "
        "stated, the last number or letter counts.", sentences(report),
        "Exact McNemar test on the same questions, two-sided, uncorrected; within noise: p ≥ 0.05.",
        "## Quality of the signal", table(["signal", *(f"round {i}" for i in range(1, len(rounds) + 1))], signals),
        "## Curves", "![PPO curves](curves.png)",
        "## What PPO changed", examples(run, fixed=True), examples(run, fixed=False),
        "## Cost", cost_table(report["cost"]), "TFLOPs: estimated as 2 (reading) or 6 (training) per parameter and token.",
        *(["## Held-out difficulty", accuracy_table(report["hard"])] if report["hard"] else []),
        "## To reproduce", "Settings, and the first digits of the SHA-256 of the inputs:",
        "\n".join(textwrap.fill(line, 116, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in settings),
        f"Missing in this run: {', '.join(report['missing']) or 'nothing'}. Not shown: other seeds (--runs), other tasks.",
    ]) + "\n"


# ---- several runs --------------------------------------------------------------------------------------------------


def pool(pairs: Sequence[Sequence[Mapping[str, dict]]]) -> dict:
    """`compare` over the answers of all runs together, and two checks of it; pairs: each run's two transcripts.

    Seeds are not independent on the same question, so the pooled p is too small. p_by_question counts every question
    once, for the model that is right in more of the runs; by_run is the difference in each of them.
    """
    pairs, margin = [pair for pair in pairs if all(pair)], Counter()
    for one, other in pairs:
        margin.update({key: one[key]["correct"] - other[key]["correct"] for key in one.keys() & other.keys()})
    pooled = ({(i, key): row for i, pair in enumerate(pairs) for key, row in pair[side].items()} for side in (0, 1))
    p = mcnemar(sum(value > 0 for value in margin.values()), sum(value < 0 for value in margin.values()))
    return compare(*pooled) | {"p_by_question": p, "by_run": [compare(*pair)["difference"] for pair in pairs]}


def build_comparison(runs: Sequence[Path], reports: Sequence[Mapping]) -> dict:
    """All numbers of comparison.json: mean, least and greatest over the runs, pooled paired tests."""
    rows = {name: [row for r in reports if (row := (r["accuracy"] | r["hard"]).get(name))] for name in MODELS}
    return {
        "preset": reports[0]["preset"], "seeds": [r["seed"] for r in reports], "runs": [str(run) for run in runs],
        "accuracy": {name: {key: spread(row[key] for row in found) for key in ("strict", "lenient", "mean_tokens")} | {
            "n": sum(row["n"] for row in found), "runs": len(found)} for name, found in rows.items() if found},
        **{key: pool([[read_transcripts(run, name) for name in pair] for run in runs])
           for key, (_, *pair) in COMPARISONS.items()},
        "signal": {f"{part}.{key}": spread(r[part][key] for r in reports) for part, key in SIGNALS},
        "seconds": spread(sum(row["seconds"] for row in r["cost"].values()) for r in reports),
    }


def comparison_markdown(c: Mapping) -> str:
    """comparison.md."""
    def cells(value: Mapping, percent: bool = True) -> list[str]:
        return [number(value["mean"], percent), "..".join(number(value[key], percent) for key in ("min", "max"))]

    return "\n\n".join([
        f"# Preset {c['preset']}, seeds {', '.join(map(str, c['seeds']))}",
        table(["%", "right", "min..max", "lenient", "min..max", "mean tokens", "min..max", "runs", "pooled n"], [
            [MODELS[name], *cells(row["strict"]), *cells(row["lenient"]), *cells(row["mean_tokens"], False), row["runs"],
             row["n"]] for name, row in c["accuracy"].items()]), sentences(c),
        "The first p pools all answers as if runs were independent on the same question, so it is too small; the second "
        "counts every question once, for the model that is right in more of the runs.",
        table(["signal", "mean", "min..max"], [[label, *cells(c["signal"][f"{part}.{key}"], "%" in label)]
                                               for (part, key), label in SIGNALS.items()]),
        "![PPO curves of all runs](comparison.png)", f"Seconds per run: {', '.join(cells(c['seconds'], False))}.",
    ]) + "\n"


# ---- the script ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Write the report of one run, or compare several runs."""

    run: str = ""  # run folder; the report is written into it
    runs: str = ""  # instead: run folders to compare, comma-separated, each with its report.json
    out: str = ""  # folder for the comparison
    preset: str = "custom"  # named in the title
    seed: int = 0  # named in the title


def main(cfg: Config) -> None:
    runtime.require(bool(cfg.run) != bool(cfg.runs), "give one of --run (a report) and --runs (a comparison)")
    runtime.require(bool(cfg.runs) == bool(cfg.out), "--runs and --out, the folder for the comparison, go together")
    if cfg.run:
        run = Path(cfg.run)
        report = build_report(run, cfg.preset, cfg.seed)
        draw_curves(run / "curves.png", [run])
        runtime.write_json(run / "report.json", report)
        (run / "report.md").write_text(markdown(run, report), encoding="utf-8")
        print(accuracy_table(report["accuracy"]), sentences(report), f"report: {run / 'report.md'}", sep="\n\n")
        return
    runs, out, reports = [Path(folder) for folder in cfg.runs.split(",")], Path(cfg.out), []
    runtime.require(len({run.resolve() for run in runs}) == len(runs) > 1, f"--runs {cfg.runs}: name different folders")
    for run in runs:  # numbers are made anew from the files, only the names come from report.json
        runtime.require((run / "report.json").is_file(), f"{run}: no report.json, first make its report (--run)")
        named = json.loads((run / "report.json").read_text(encoding="utf-8"))
        reports.append(build_report(run, named["preset"], named["seed"]))
    presets = sorted({report["preset"] for report in reports})
    runtime.require(len(presets) == 1, f"--runs {cfg.runs}: different presets do not pool ({', '.join(presets)})")
    comparison = build_comparison(runs, reports)
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(out / "comparison.png", runs)
    runtime.write_json(out / "comparison.json", comparison)
    (out / "comparison.md").write_text(comparison_markdown(comparison), encoding="utf-8")
    print(comparison_markdown(comparison), f"comparison: {out / 'comparison.md'}", sep="\n")


if __name__ == "__main__":
    runtime.launch(main, Config)
