"""How time and memory grow: with the answers sampled at once, their length, the length of texts, the questions.

    python bench/growth.py                              # writes results/growth-MACHINE.json and a picture, four minutes
    python bench/growth.py --only questions --quick     # only whether everything runs

Each point is a process of its own on one thread, with random weights in the shape `tiny` of speed.py. Time is that of
its processor, which a busy machine changes little (on a GPU: of the clock), the median of several turns; memory is the
most that it held beyond what its imports take. The slope is that of a straight line through the last three points where
both axes are logarithmic: 1 says twice as much takes twice as long, 0 that more costs nothing.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from sides import CUDA, DTYPE, SHAPES, clock, peak_mb  # which puts the project's folder on the path
from speed import machine_name

import pseudo_reward
import runtime
from generate import generate
from model import Llama, masked_logprobs
from runtime.files import write_jsonl

ANSWERS = 8  # to each question of the vote


@dataclass(frozen=True)
class Config:
    """Measure how time and memory grow; write growth-MACHINE.json and a picture."""

    only: str = ""  # curves that begin with one of these, comma-separated; none: all
    quick: bool = False  # the first two points of each
    out: str = "results"  # folder for growth-MACHINE.json and .png
    point: str = ""  # a process's own: measure this point, CURVE=SIZE, and print it


# ---- the work: each returns what one turn does ---------------------------------------------------------------------


def tiny() -> Llama:
    torch.manual_seed(0)
    config = replace(SHAPES["tiny"].model, max_position_embeddings=4096)
    return Llama(config).to(runtime.default_device(), DTYPE)


def texts(rows: int, length: int) -> torch.Tensor:
    return torch.randint(400, (rows, length), generator=torch.Generator().manual_seed(0))


def sampling(rows: int, new: int) -> Callable:
    model, prompts = tiny(), texts(rows, 24).tolist()
    return lambda: generate(model, prompts, new, batch_size=rows)


def training(rows: int, length: int) -> Callable:
    """The passes of an optimiser step, the loss on the second half of each text."""
    model, tokens = tiny().float(), texts(rows, length).to(runtime.default_device())
    mask = (torch.arange(1, length, device=tokens.device) >= length // 2).expand(rows, -1)  # (B, T-1)

    def step() -> None:
        model.zero_grad()
        with runtime.mixed_precision():
            logprobs, _ = masked_logprobs(model, tokens, mask)  # (B, T-1)
        logprobs.sum().backward()

    return step


def voting(questions: int) -> Callable:
    """The stage pseudo_reward.py, from files to files; three of four answers agree."""
    folder = Path(tempfile.mkdtemp(prefix="growth"))
    asked = ({"id": f"q{i}", "question": f"Ava has {i} pens. How many are they?"} for i in range(questions))
    said = (
        {"id": f"q{i}", "response": f"Monday {i}+{k}={i + k} #### {i + k % 4 // 3}", "finish": "stop", "logprob": -k}
        for i in range(questions)
        for k in range(ANSWERS)
    )
    write_jsonl(folder / "questions.jsonl", asked)
    write_jsonl(folder / "samples.jsonl", said)
    files = {"questions": str(folder / "questions.jsonl"), "teacher": str(folder / "samples.jsonl")}
    outs = (str(folder / f"out{turn}") for turn in range(10**6))
    return lambda: pseudo_reward.main(pseudo_reward.Config(**files, out=next(outs)))


CURVES = {  # name: what the sizes count, the work of a size, the sizes
    "rows": ("answers sampled at once, 32 tokens each", lambda n: sampling(n, 32), (1, 4, 16, 64, 256, 1024)),
    "answers": ("tokens of an answer, 32 answers", lambda n: sampling(32, n), (32, 64, 128, 256, 512, 1024)),
    "texts": ("tokens of a text, training on 16 texts", lambda n: training(16, n), (32, 64, 128, 256, 512, 1024)),
    "questions": (f"questions with {ANSWERS} answers each, vote", voting, (1000, 4000, 14000, 56000)),
}


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(curve: str, size: int) -> dict[str, float]:
    """A point: seconds of a turn and MB. The first turn counts for the memory alone, unless it takes long."""
    torch.set_num_threads(1)
    now, before = (clock if CUDA else time.process_time), peak_mb()
    with redirect_stdout(StringIO()):
        turn, seconds = CURVES[curve][1](size), []
        while len(seconds) < 4 and sum(seconds) < 5:
            start = now()
            turn()
            seconds.append(now() - start)
    return {"size": size, "seconds": float(np.median(seconds[1:] or seconds)), "mb": max(peak_mb() - before, 0.1)}


def slope(points: list[dict], key: str) -> float:
    last = points[-3:]
    return float(np.polyfit(np.log([p["size"] for p in last]), np.log([p[key] for p in last]), 1)[0])


def points_of(curve: str, quick: bool) -> Iterator[dict[str, float]]:
    """Point after point of a curve, each in a process of its own."""
    for size in CURVES[curve][2][: 2 if quick else None]:
        with tempfile.TemporaryDirectory() as folder:  # for its files
            command = [sys.executable, __file__, "--point", f"{curve}={size}"]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": folder})
        runtime.require(done.returncode == 0, f"{curve} {size}: its process ended early:\n{done.stderr[-2000:]}")
        yield json.loads(done.stdout)


def draw(result: dict, path: Path) -> None:
    """A column a curve: seconds above, MB below, both axes logarithmic."""
    from matplotlib.figure import Figure

    curves = result["curves"]
    figure = Figure(figsize=(4.6 * len(curves), 7.5), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False)
    for column, curve in enumerate(curves.values()):
        for axis, key, label, colour in zip(panels[:, column], ("seconds", "mb"), ("s", "MB"), ("#0072B2", "#E69F00")):
            sizes, values = zip(*((point["size"], point[key]) for point in curve["points"]))
            axis.loglog(sizes, values, "o-", color=colour, linewidth=2)
            axis.set_title(f"slope {curve['slopes'][key]:.2f}", fontsize=15)
            axis.set_ylabel(label, fontsize=15)
            axis.tick_params(labelsize=13)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        panels[1, column].set_xlabel(curve["counts"], fontsize=14)
    figure.suptitle(f"{result['machine']}, one thread, 0.44M parameters: time and memory", fontsize=17)
    figure.savefig(path, dpi=80)


def main(cfg: Config) -> None:
    if cfg.point:
        curve, _, size = cfg.point.partition("=")
        print(json.dumps(measure(curve, int(size))))
        return
    names = [name for name in CURVES if not cfg.only or name.startswith(tuple(cfg.only.split(",")))]
    runtime.require(bool(names), f"--only {cfg.only}: choose from {', '.join(CURVES)}, comma-separated")
    result = {"machine": machine_name(), "torch": torch.__version__, "curves": {}}
    for name in names:
        points = []
        for point in points_of(name, cfg.quick):
            points.append(point)
            print(f"{name:10}{point['size']:8,}{point['seconds']:10.3f} s{point['mb']:9.1f} MB", flush=True)
        slopes = {key: round(slope(points, key), 2) for key in ("seconds", "mb")}
        print(f"{name:10}   slope{slopes['seconds']:10.2f}{slopes['mb']:11.2f}", flush=True)
        result["curves"][name] = {"counts": CURVES[name][0], "points": points, "slopes": slopes}
    slug = re.sub(r"[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
    path = Path(cfg.out, f"growth-{slug}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_json(path, result)
    draw(result, path.with_suffix(".png"))
    print(f"{path} and its .png")


if __name__ == "__main__":
    runtime.launch(main, Config)
