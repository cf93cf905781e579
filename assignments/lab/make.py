"""Make the runs of the lab 'which run is broken?': bench/sick.py's seeded bugs, under letters instead of names.

    SEED=1 bash train_all.sh                          # a finished run, not that of docs/healthy.md, whose seed is 0
    python assignments/lab/make.py --run runs/tiny-1                     # half an hour on one core

Writes assignments/lab/LETTER: metrics.jsonl and samples.txt as ppo.py left them, curves.png. The letters and what they
stand for are RUNS below; lab/KEY.md explains them, and neither file is in the handout.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import sick

import runtime

LAB = Path(__file__).resolve().parent
RUNS = {
    "healthy": "healthy",
    "A": "reference_alias",
    "B": "advantage_sign",
    "C": "whitened_returns",
    "D": "shift",
    "E": "kl_sign",
    "F": "score_late",
}
PANELS = (
    "objective/scores",
    "valid/accuracy",
    "objective/kl",
    "policy/entropy_avg",
    "policy/clipfrac_avg",
    "val/ratio",
    "val/explained_variance",
    "val/explained_variance_mse",
    "response_length/mean",
)


@dataclass(frozen=True)
class Config:
    """Six broken runs of ppo.py and a healthy one, for the lab."""

    run: str  # a folder of train_all.sh: 0_questions, 2_sft, 5_reward, 6_ppo; the work is kept in its folder lab/


def draw(rows: list[dict], healthy: list[dict], title: str, path: Path) -> None:
    """Nine numbers of a run over its iterations, a healthy run in grey behind them."""
    figure = Figure(figsize=(9, 7), dpi=80, layout="constrained")
    for axis, name in zip(figure.subplots(3, 3).flat, PANELS):
        for run, style in ((healthy, {"color": "0.7"}), (rows, {"color": "#0072B2", "linewidth": 2})):
            points = {row["step"]: row[name] for row in run if name in row}
            axis.plot(points.keys(), points.values(), **style)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.25)
    figure.suptitle(f"run {title} (blue) and a healthy run (grey), by iteration")
    figure.savefig(path)


def main(cfg: Config) -> None:
    work = Path(cfg.run, "lab")
    for letter, name in RUNS.items():
        if not (work / name / "log.txt").is_file():
            sick.run(sick.Config(cfg.run, out=""), name, work / name)
        (LAB / letter).mkdir(exist_ok=True)
        for file in ("metrics.jsonl", "samples.txt"):
            shutil.copyfile(work / name / "ppo" / file, LAB / letter / file)
        rows, healthy = sick.metrics(work / name), sick.metrics(work / "healthy")
        draw(rows, healthy, letter, LAB / letter / "curves.png")
    print(sick.summary(list(RUNS.values()), work, sick.settings(cfg.run)["rollout_size"]))


if __name__ == "__main__":
    runtime.launch(main, Config)
