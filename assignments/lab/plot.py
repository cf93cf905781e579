"""Draw nine numbers of a run of the lab, the healthy run in grey: `python lab/plot.py A` writes lab/A.png."""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

LAB = Path(__file__).resolve().parent
PANELS = "objective/scores valid/accuracy objective/kl policy/entropy_avg policy/clipfrac_avg val/ratio "
PANELS += "val/explained_variance val/explained_variance_mse response_length/mean"


def main(name: str) -> None:
    runs = {run["run"]: run["rows"] for run in map(json.loads, (LAB / "runs.jsonl").open(encoding="utf-8"))}
    figure = Figure(figsize=(9, 7), dpi=80, layout="constrained")
    for axis, metric in zip(figure.subplots(3, 3).flat, PANELS.split()):
        for rows, colour, width in ((runs["healthy"], "0.7", 1.5), (runs[name], "#0072B2", 2)):
            points = {row["step"]: row[metric] for row in rows if metric in row}
            axis.plot(points.keys(), points.values(), color=colour, linewidth=width)
        axis.set_title(metric, fontsize=10)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    figure.suptitle(f"run {name} (blue) and the healthy run (grey), by iteration")
    figure.savefig(LAB / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1])
