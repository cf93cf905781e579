"""What PPO's curves look like when something is wrong: ppo.py with one seeded bug at a time, drawn beside healthy runs.

    python bench/sick.py --run runs/tiny-0 --out docs/healthy           # every bug; pictures, and the table of the page
    python bench/sick.py --run runs/tiny-0 --out docs/healthy --only kl_sign             # this one again, all pictures

A bug is one or more exact edits of a copy of the source, or other settings than those of the run's own PPO; the copy
runs in a process of its own. Everything is kept in RUN/sick/NAME: source, log.txt, ppo/metrics.jsonl. A run that is
there is not repeated; RUN itself is made where it is missing (train_all.sh). docs/healthy.md tells what came out.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report
import runtime
from health import RANGES, Health

ROOT = Path(runtime.__file__).resolve().parent.parent
START, END = "<!-- from here to the end mark: bench/sick.py -->", "<!-- end -->"  # in the page


class Bug(NamedTuple):
    what: str  # its name in a picture
    colour: str
    edits: tuple[tuple[str, str, str], ...] = ()  # file, old text (there exactly once), new text
    changes: Callable[[dict], dict] = lambda ppo: {}  # the settings of the run's PPO -> those that differ


# Okabe and Ito, 2008, without the yellow that white paper swallows; grey and brown
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
RED, PURPLE, GREY, BROWN = "#D55E00", "#CC79A7", "#7F7F7F", "#8C510A"

REFERENCE = "ranks.shard(load_model(cfg.policy, dtype, device).requires_grad_(False))"
READ = "logprobs, entropy = masked_logprobs(policy, b.tokens, b.mask, cfg.temperature)"
READ_REFERENCE = "masked_logprobs(reference, b.tokens, b.mask, cfg.temperature)"
READ_AGAIN = "logprobs, _ = masked_logprobs(policy, b.tokens, b.mask, cfg.temperature)"
KEPT = "replace(r, logprobs=logprobs"
VALUES = "values = model(tokens, keep=mask)"
MASK = "Rollout(tokens, mask,"

# fmt: off
BUGS = {
    "healthy": Bug("healthy", "black"),
    "healthy_1": Bug("healthy, another seed", "black", changes=lambda ppo: {"seed": ppo["seed"] + 1}),
    # the curves show these
    "kl_sign": Bug("KL penalty is a bonus", RED, (
        ("ppo.py", "torch.where(mask, -kl_coef *", "torch.where(mask, kl_coef *"),)),
    "no_kl": Bug("no KL penalty, lr x 4", ORANGE, changes=lambda ppo: {"kl_coef": 0, "lr": 4 * ppo["lr"]}),
    "lr_10": Bug("lr x 10", BLUE, changes=lambda ppo: {"lr": 10 * ppo["lr"]}),
    "advantage_sign": Bug("advantages negated", GREEN, (("ppo.py", "advantages=whiten(", "advantages=-whiten("),)),
    "score_late": Bug("score one token late", PURPLE, (
        ("ppo.py", "rewards + last * scores", "rewards + last.roll(1, 1) * scores"),)),
    "shift": Bug("log-probs shifted by one", SKY, (
        ("model.py", "tokens[:, 1:][keep]", "tokens[:, :-1][keep]"),)),
    "reference_alias": Bug("reference is the policy", GREY, (("ppo.py", REFERENCE, "policy"),)),
    "whitened_returns": Bug("returns from whitened advantages", BROWN, (
        ("ppo.py", "returns=returns", "returns=whiten(advantages, r.mask) + r.values"),)),
    # these stop the run
    "old_temperature": Bug("old log-probs without temperature", RED, (
        ("ppo.py", READ, READ.replace("cfg.temperature", "1.0")),)),
    "old_bf16": Bug("old log-probs in bf16", BLUE, (
        ("ppo.py", KEPT, KEPT + ".bfloat16().float()"),)),
    # these no curve shows on the tiny preset
    "temperature": Bug("all log-probs without temperature", PURPLE, tuple(
        ("ppo.py", old, old.replace("cfg.temperature", "1.0")) for old in (READ, READ_REFERENCE, READ_AGAIN))),
    "top_k": Bug("sampled from the top 2", ORANGE, (
        ("generate.py", "below = probs.cumsum(", "below = (probs * (probs >= probs.topk(2)[0][:, 1:])).cumsum("),)),
    "end_masked": Bug("end token not in the mask", RED, (
        ("ppo.py", MASK, MASK.replace("mask", "mask & (mask.flip(1).cumsum(1).flip(1) > 1)")),)),
    "value_next": Bug("value of the next state", BLUE, (("model.py", VALUES, "values = model(tokens)[:, 1:][mask]"),)),
}
SILENT = "temperature top_k end_masked value_next"


class Curve(NamedTuple):
    metric: str
    title: str
    unit: str  # on the vertical axis
    bugs: str  # those that it betrays
    scale: str = "linear"
    limits: tuple[float | None, float | None] = (None, None)


CURVES = {
    "kl": Curve("objective/kl", "KL from the reference", "nats per answer",
                "kl_sign no_kl lr_10 advantage_sign reference_alias shift", "symlog"),
    "ratio": Curve("val/ratio", "Probability ratio, new to old", "mean over tokens", "lr_10 shift no_kl"),
    "clipfrac": Curve("policy/clipfrac_avg", "Clipped tokens", "share of the tokens",
                      "lr_10 no_kl shift advantage_sign"),
    "approxkl": Curve("policy/approxkl_avg", "KL of one update", "nats per token",
                      "lr_10 no_kl shift", "log"),
    "entropy": Curve("policy/entropy_avg", "Entropy of the policy", "nats per token",
                     "lr_10 no_kl kl_sign advantage_sign score_late", "log"),
    "score": Curve("objective/scores", "Score by the reward model", "standard deviations",
                   "kl_sign no_kl lr_10 advantage_sign score_late shift"),
    "accuracy": Curve("valid/accuracy", "Held-out accuracy", "share right, greedy",
                      "kl_sign no_kl lr_10 advantage_sign score_late shift reference_alias"),
    "eos": Curve("val/eos_share", "Answers that end", "share of the answers", "lr_10 advantage_sign"),
    "length": Curve("response_length/mean", "Length of the answers", "tokens",
                    "no_kl lr_10 advantage_sign score_late shift"),
    "explained_variance": Curve("val/explained_variance", "Explained variance of the critic", "1 is perfect",
                                "no_kl lr_10 score_late", limits=(-5, 1.1)),
    "explained_variance_mse": Curve("val/explained_variance_mse", "Explained variance, offset counted",
                                    "1 is perfect", "score_late whitened_returns", limits=(-5, 1.1)),
    "grad_norm": Curve("policy/grad_norm", "Gradient norm of the policy", "before clipping",
                       "no_kl lr_10 kl_sign advantage_sign shift", "log"),
    "silent": Curve("objective/scores", "Score under bugs that hide", "standard deviations",
                    SILENT),
}
# fmt: on


@dataclass(frozen=True)
class Config:
    """Seeded bugs in ppo.py, and how its curves betray them."""

    run: str  # a folder of train_all.sh: its questions, student, reward model, and the settings of its PPO
    out: str  # folder of the pictures; beside it the page, FOLDER.md, whose table is made anew if it is there
    only: str = ""  # run this bug again, and no other


def settings(folder: str) -> dict:
    """The flags of a run's own PPO, without paths."""
    done = json.loads(Path(folder, "6_ppo", "done.json").read_text(encoding="utf-8"))
    return {name: value for name, value in done["settings"].items() if value != ""}


def sources(bug: Bug) -> dict[str, str]:
    """The top-level scripts with the bug in them: name -> text."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    for file, old, new in bug.edits:
        runtime.require(texts[file].count(old) == 1, f"{file} holds '{old}' {texts[file].count(old)} times, not once")
        texts[file] = texts[file].replace(old, new)
    return texts


def run(cfg: Config, name: str, folder: Path) -> None:
    """ppo.py with a bug, to its end or to where it stops by itself."""
    shutil.rmtree(folder, ignore_errors=True)
    for package in ("hf", "runtime", "tasks"):
        shutil.copytree(ROOT / package, folder / "source" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in sources(BUGS[name]).items():
        (folder / "source" / file).write_text(text, encoding="utf-8")
    inputs = {
        "policy": "2_sft",
        "reward_model": "5_reward",
        "questions": "0_questions/train.jsonl",
        "valid": "0_questions/valid.jsonl",
    }
    command = [sys.executable, str(folder / "source" / "ppo.py"), "--out", str(folder / "ppo")]
    command += [word for flag, path in inputs.items() for word in (f"--{flag}", str(Path(cfg.run, path)))]
    ppo = settings(cfg.run)
    for flag, value in (ppo | BUGS[name].changes(ppo)).items():
        command += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    start = time.monotonic()
    log = folder / "log.unfinished"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    log.rename(folder / "log.txt")
    print(f"{name}: exit code {done.returncode}, {time.monotonic() - start:.0f} s", flush=True)


def metrics(folder: Path) -> list[dict]:
    path = folder / "ppo" / "metrics.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.is_file() else []


COLUMNS = {  # what the table shows of the last iteration, and its format
    "objective/scores": ("score", ".2f"),
    "valid/accuracy": ("accuracy", ".1%"),
    "objective/kl": ("KL", ".3g"),
    "policy/entropy_avg": ("entropy", ".2g"),
    "val/eos_share": ("ended", ".0%"),
    "response_length/mean": ("tokens", ".0f"),
    "val/explained_variance_mse": ("explained variance", ".2f"),
}


def summary(names: list[str], work: Path, rollout_size: int) -> str:
    """A table: what each run came to, and which warnings of health.py it raised, with the first iteration of each."""
    table = []
    for name in names:
        rows, watch, warned = metrics(work / name), Health(rollout_size), {}
        for row in rows:
            for warning in watch.update(row["step"], row):
                warned.setdefault(warning.split()[0], row["step"])
        last = {key: row[key] for row in rows for key in COLUMNS if key in row}
        text = ", ".join(f"`{metric}` {step}" for metric, step in warned.items()) or "none"
        if not (work / name / "ppo" / "done.json").is_file():
            why = (work / name / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
            text += f"; stopped in iteration {rows[-1]['step']}" if rows else f"; stopped: {why}"
        shown = [f"{last[key]:{form}}" if key in last else "–" for key, (_, form) in COLUMNS.items()]
        table.append([BUGS[name].what, *shown, text])
    head = ["run", *(label for label, _ in COLUMNS.values()), "warnings, and the first iteration of each"]
    return report.table(head, table)


def write_page(path: Path, text: str) -> None:
    """Put the text between the two marks of a page."""
    before, mark, rest = path.read_text(encoding="utf-8").partition(START)
    runtime.require(bool(mark) and END in rest, f"{path} lacks the lines {START} and {END}")
    with runtime.replacing(path) as file:
        file.write(f"{before}{START}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw(curve: Curve, runs: dict[str, list[dict]], path: Path) -> None:
    """One metric over the iterations: healthy runs in black, sick ones in colour, each named at its right end."""
    figure = Figure(figsize=(7.6, 3.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.set_yscale(curve.scale, **({"linthresh": 1.0} if curve.scale == "symlog" else {}))
    ends = []
    for name, rows in runs.items():
        points = {row["step"]: row[curve.metric] for row in rows if curve.metric in row}
        if points and name in [*curve.bugs.split(), "healthy", "healthy_1"]:
            colour = BUGS[name].colour
            axis.plot(points.keys(), points.values(), color=colour, linewidth=1.4 if colour == "black" else 2.2)
            if name != "healthy_1":  # one name is enough for both black lines
                ends.append((*list(points.items())[-1], BUGS[name].what, colour))
    steps = max(step for step, *_ in ends)
    axis.set_xlim(0, steps)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(*curve.limits)
    if curve.metric in RANGES:
        for bound in RANGES[curve.metric][:2]:
            if axis.get_ylim()[0] < bound < axis.get_ylim()[1]:
                axis.axhline(bound, color="black", linestyle=":", linewidth=1)
    axis.set_title(f"{curve.title} ({curve.metric})", fontsize=12, loc="left")
    axis.set_xlabel("iteration", fontsize=12)
    axis.set_ylabel(curve.unit, fontsize=12)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    # names at the height of their line, but a line of text apart
    to_share = axis.transScale + axis.transLimits  # data -> share of the axis
    names = sorted((to_share.transform((step, value))[1], what, colour) for step, value, what, colour in ends)
    heights = [min(max(height, 0), 0.96) for height, *_ in names]
    for _ in range(100):  # neighbours that are too near push each other away
        for i in range(len(heights) - 1):
            push = max(0.085 - (heights[i + 1] - heights[i]), 0) / 2
            heights[i], heights[i + 1] = max(heights[i] - push, 0), min(heights[i + 1] + push, 0.96)
    for height, (_, what, colour) in zip(heights, names):
        axis.text(1.02, height, what, color=colour, fontsize=12, va="center", transform=axis.transAxes)
    figure.savefig(path)


def main(cfg: Config) -> None:
    work, out = Path(cfg.run, "sick"), Path(cfg.out)
    runtime.require(not cfg.only or cfg.only in BUGS, f"--only {cfg.only}: it is one of {', '.join(BUGS)}")
    for bug in BUGS.values():
        sources(bug)  # all of them fit before the first one runs
    if not Path(cfg.run, "6_ppo", "done.json").is_file():
        subprocess.run(["bash", str(ROOT / "train_all.sh")], env=os.environ | {"OUT": cfg.run}, check=True)
    for name in [cfg.only] if cfg.only else BUGS:
        if cfg.only or not (work / name / "log.txt").is_file():
            run(cfg, name, work / name)
    names = [name for name in BUGS if (work / name / "log.txt").is_file()]
    ppo = settings(cfg.run)
    told = " ".join(f"--{name} {ppo[name]}" for name in ("iterations", "rollout_size", "lr", "critic_lr", "kl_coef"))
    text = f"{summary(names, work, ppo['rollout_size'])}\n\nPPO of the healthy run: `{told}`."
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    if (page := out.with_suffix(".md")).is_file():
        write_page(page, text)
    runs = {name: metrics(work / name) for name in names}
    for name, curve in CURVES.items():
        draw(curve, runs, out / f"{name}.png")


if __name__ == "__main__":
    runtime.launch(main, Config)
