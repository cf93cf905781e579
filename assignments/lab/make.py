"""Make the runs of the lab 'which run is broken?': bench/sick.py's seeded bugs, under letters instead of names.

    SEED=1 bash train_all.sh                                             # a finished run: its student and reward model
    python assignments/lab/make.py --run runs/tiny-1                     # ten minutes on one core

Writes assignments/lab/runs.jsonl: a line per run, with what ppo.py logged and showed. The letters and what they stand
for are RUNS below; lab/KEY.md explains them, and neither file is in the handout.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sick

import runtime

LAB = Path(__file__).resolve().parent
RUNS = {"healthy": "healthy", "A": "reference_alias", "B": "advantage_sign", "C": "whitened_returns"}
RUNS |= {"D": "shift", "E": "kl_sign", "F": "score_late"}


@dataclass(frozen=True)
class Config:
    """Six broken runs of ppo.py and a healthy one, for the lab."""

    run: str  # a folder of train_all.sh: 0_questions, 2_sft, 5_reward; the work is kept in its folder lab/
    seed: int = 1  # of PPO; docs/healthy.md shows seed 0
    iterations: int = 20
    rollout_size: int = 128


def rounded(row: dict) -> dict:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}


def main(cfg: Config) -> None:
    work, lines = Path(cfg.run, "lab"), []
    sick.BUGS = {name: bug._replace(flags=f"{bug.flags} --seed {cfg.seed}") for name, bug in sick.BUGS.items()}
    settings = sick.Config(run=cfg.run, out="", iterations=cfg.iterations, rollout_size=cfg.rollout_size)
    for letter, name in RUNS.items():
        if not (work / name / "log.txt").is_file():
            sick.run(settings, name, work / name)
        rows = [rounded(row) for row in sick.metrics(work / name)]
        samples = re.split(r"==== iteration (\d+)\n", (work / name / "ppo" / "samples.txt").read_text("utf-8"))
        shown = dict(zip(samples[1::2], samples[2::2]))  # iteration -> text
        lines.append(json.dumps({"run": letter, "rows": rows, "samples": shown}) + "\n")
    (LAB / "runs.jsonl").write_text("".join(lines), "utf-8")
    print(sick.summary(list(RUNS.values()), work, cfg.rollout_size))


if __name__ == "__main__":
    runtime.launch(main, Config)
