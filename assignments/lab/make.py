"""Make the runs of the lab 'which run is broken?': bench/sick.py's seeded bugs, under letters instead of names.

    SEED=1 bash train_all.sh                               # a finished run, not that of docs/healthy.md
    python assignments/lab/make.py runs/tiny-1             # ten minutes on one core; work is kept in runs/tiny-1/lab

Writes assignments/lab/runs.jsonl: a line per run, with what ppo.py logged and showed. The letters stand for RUNS;
lab/KEY.md explains them, and neither file is in the handout.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sick

RUNS = {"healthy": "healthy", "A": "reference_alias", "B": "advantage_sign", "C": "whitened_returns"}
RUNS |= {"D": "shift", "E": "kl_sign", "F": "score_late"}


def main(run: str) -> None:
    work, lines, settings = Path(run, "lab"), [], sick.Config(run=run, out="")
    for letter, name in RUNS.items():
        if not (work / name / "log.txt").is_file():
            sick.run(settings, name, work / name)
        logged = json.loads(json.dumps(sick.metrics(work / name)), parse_float=lambda text: round(float(text), 5))
        samples = re.split(r"==== iteration (\d+)\n", (work / name / "ppo" / "samples.txt").read_text("utf-8"))
        shown = dict(zip(samples[1::2], samples[2::2]))  # iteration -> text
        lines.append(json.dumps({"run": letter, "rows": logged, "samples": shown}) + "\n")
    Path(__file__).with_name("runs.jsonl").write_text("".join(lines), "utf-8")
    print(sick.summary(list(RUNS.values()), work, sick.settings(run)["rollout_size"]))


if __name__ == "__main__":
    main(sys.argv[1])
