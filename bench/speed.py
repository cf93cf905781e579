"""How fast we are: against transformers and TRL, in turns, on the same weights; and against what the machine can do.

    python bench/speed.py                                           # shapes tiny and smollm2, no TRL
    python bench/speed.py --make_trl_venv trl                       # once: a virtual environment with TRL 1.11, then
    python bench/speed.py --trl_python trl/bin/python --threads 1
    python bench/speed.py --shape tiny --only sft,generate --profile                   # where our time goes

Rows. `sft`: an optimiser step of sft.py, the loss on the half behind the prompts; the peer is LlamaForCausalLM with
fused AdamW. `sft lora`, `ppo lora`: adapters of rank 16 learn, there is no peer. `score`: log-probs of given
responses; the peer computes logits for the responses only. `generate B`: B prompts, every answer of full length.
`generate B ragged`: one draw in 16 or so is the end token, so that answers end at different times. The peer is
`generate` with a dynamic or a static cache, whichever is faster. Only real new tokens count, the end included; of
`ppo` a sequence's tokens are the mean over all turns. `ppo`: a whole iteration of ppo.py (ragged sampling, scores,
four readings, update, its log line); the peer is TRL's PPOTrainer with as many sequences, minibatches and epochs,
without gradient checkpointing, sample generations and saving.

Fair play. Weights are random, in the real shape, in files that both sides load; prompts are all of one length, so that
nobody pads. Each side runs in a process of its own, started anew for every row: the peak of its memory is that row's.
The sides take turns (one step, one call, one iteration each) after a turn that does not count. A third process takes
turns with them and measures the machine: a matrix product, and a read of as many bytes as the weights have. All numbers
are medians over the rounds; a spread is the middle half of the rounds. Losses and log-probs must agree between the
sides, and so must the counts of tokens, or the run stops. `CPU` is the ratio of tokens per processor second: on one
thread it is about the ratio that a quiet machine would give.

The limit adds, over forward, backward and decoding passes, the larger of FLOPs / rate of the matrix product and bytes /
rate of the read, and AdamW's bytes. Bytes are weights, and the cache when decoding; activations are free. It counts all
positions in all layers, and for `ppo` a reading by each of the four models before the update.

On CUDA the same happens in bf16, for --shape llama-1b, llama-3b and llama-8b too. Nobody has run that yet. How time
and memory grow: growth.py.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sides import CUDA, DTYPE, SHAPES, Job  # which puts the project's folder on the path

import runtime
from model import Llama

ROWS = ("sft", "score", "generate", "ppo")


@dataclass(frozen=True)
class Config:
    """Measure ours in turns with transformers, TRL and the machine; write speed-MACHINE.json and a picture."""

    shape: str = "tiny,smollm2"  # comma-separated: tiny, smollm2, llama-1b, llama-3b, llama-8b
    only: str = ""  # rows that begin with one of these, comma-separated: sft, score, generate, ppo; none: all
    threads: int = 0  # of every side; 0: what each side takes by itself
    seconds: int = 40  # a row begins no further round after these, but has three at least
    peer: bool = True  # --no-peer: ours alone, against the machine
    trl_python: str = ""  # the python of an environment with TRL; none: the row `ppo` has no peer
    make_trl_venv: str = ""  # make such an environment in this folder, and do nothing else
    profile: bool = False  # instead: print which operations our time goes to, row by row
    quick: bool = False  # two rounds of small batches: only whether everything runs
    out: str = "results"  # folder for speed-MACHINE.json and .png


# ---- the machine's limit -------------------------------------------------------------------------------------------


def limit(job: Job, lengths: list[int], rate: dict[str, float]) -> float:
    """Seconds that a turn would take at the machine's rates: FLOP/s `flops` and byte/s `bytes`.

    lengths: the tokens of each row, of its response where it was sampled.
    """
    shape, c, B, size = job.shape, job.shape.model, job.size, DTYPE.itemsize
    with torch.device("meta"):
        model = Llama(c)
    blocks = sum(weight.numel() for weight in model.model.layers.parameters() if weight.dim() == 2)
    head, parameters = model.lm_head.weight.numel(), sum(weight.numel() for weight in model.parameters())
    pair = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim  # FLOPs of one query looking at one key
    cell = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size  # bytes of one cached position

    def forward(tokens: int, heads: int, passes: int = 1) -> float:
        """B rows of `tokens` each, logits of `heads` positions in all; a backward pass counts as two more."""
        flops = 2 * blocks * B * tokens + 2 * head * heads + pair * B * tokens * (tokens + 1) / 2
        return passes * max(flops / rate["flops"], (blocks + head) * size / rate["bytes"])

    def decode() -> float:
        total = 0.0
        for t in range(1, max(lengths)):
            alive = sum(length > t for length in lengths)
            seen = alive * (shape.prompt + t)
            flops = 2 * (blocks + head) * alive + pair * seen
            total += max(flops / rate["flops"], ((blocks + head) * size + seen * cell) / rate["bytes"])
        return forward(shape.prompt, B) + total

    step = 7 * 4 * parameters / rate["bytes"]  # AdamW in fp32: reads weight, gradient and moments, writes all but one
    passes, step = (2, 0.0) if job.lora else (3, step)  # frozen weights have no gradients, adapters hardly any weight
    kind = job.row.split()[0]
    if kind == "sft":
        return forward(shape.sft[1], B * (shape.sft[1] - shape.prompt), passes) + step
    if kind == "score":
        return forward(shape.prompt + shape.new, B * shape.new)
    if kind == "generate":
        return decode()
    tokens = shape.prompt + sum(lengths) / B  # policy and reference with logits, critic and reward model without
    reads = 2 * forward(tokens, sum(lengths)) + 2 * forward(tokens, 0)
    updates = forward(tokens, sum(lengths), passes) + forward(tokens, 0, passes) + 2 * shape.ppo[1] * step
    return decode() + reads + updates


# ---- the one who asks ----------------------------------------------------------------------------------------------


class Worker:
    """A side at work in a process of its own."""

    def __init__(self, side: str, job: Job, cfg: Config):
        self.name, self.log = f"{side} {job.row}", Path(job.folder, f"{side}.log")
        script, python = ("trl_ppo.py", cfg.trl_python) if side == "trl" else ("sides.py", sys.executable)
        command = [python, str(Path(__file__).with_name(script)), side, json.dumps(asdict(job))]
        threads = {"OMP_NUM_THREADS": str(cfg.threads), "MKL_NUM_THREADS": str(cfg.threads)} if cfg.threads else {}
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, text=True, env=os.environ | threads, stderr=log, **pipes)

    def turn(self) -> dict:
        with suppress(BrokenPipeError):  # of a process that has ended: then nothing is heard
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self.hear()

    def end(self) -> dict:
        self.process.stdin.close()
        return self.hear()

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        log = self.log.read_text(encoding="utf-8")[-4000:]
        runtime.require(bool(line), f"{self.name}: its process ended early; the last that it said:\n{log}")
        return json.loads(line)


def measure(cfg: Config, job: Job, sides: list[str]) -> dict:
    """One row: rounds of one turn each, ours first, the machine last."""
    workers = [Worker(side, job, cfg) for side in (*sides, "machine")]
    first, rounds, start = [worker.turn() for worker in workers], [], time.monotonic()
    while len(rounds) < (2 if cfg.quick else 3) or (time.monotonic() - start < cfg.seconds and not cfg.quick):
        rounds.append([worker.turn() for worker in workers])
    ends = [worker.end() for worker in workers]

    *turns, rates = zip(*rounds)  # of each side, of the machine
    lengths = [length for of in turns for turn in of for length in turn["lengths"]]

    def tokens(turn: dict) -> float:
        """Of `ppo` as many as its sequences have on average: a few long answers by chance are not speed."""
        return len(turn["lengths"]) * np.mean(lengths) if job.row.startswith("ppo") else sum(turn["lengths"])

    shares = [limit(job, turn["lengths"], rate) / turn["seconds"] for turn, rate in zip(turns[0], rates)]
    row = {"rounds": len(rounds), "share_of_limit": middle(shares)}
    row |= {f"machine_{key}_per_second": middle(rate[key] for rate in rates) for key in ("flops", "bytes")}
    for side, of, end in zip(("ours", "peer"), turns, ends):
        row[side] = {"tokens": sum(sum(turn["lengths"]) for turn in of)}
        for name, key in (("tokens_per_second", "seconds"), ("tokens_per_cpu_second", "cpu_seconds")):
            row[side] |= {name: middle(tokens(turn) / turn[key] for turn in of)}
        row[side] |= {"seconds": middle(turn["seconds"] for turn in of)} | {k: round(v) for k, v in end.items()}
        if "split" in of[0]:
            row[side]["split"] = {part: middle(turn["split"][part] for turn in of) for part in of[0]["split"]}
    if len(sides) > 1:
        agree(job, first, turns)
        row["peer"]["name"] = " ".join((sides[1], turns[1][0].get("setting", ""))).strip()
        each = (tokens(a) / a["seconds"] * b["seconds"] / tokens(b) for a, b in zip(*turns))
        _, *quartiles = middle(each)
        for name, key in (("ratio", "tokens_per_second"), ("cpu_ratio", "tokens_per_cpu_second")):
            row[name] = float(f"{row['ours'][key][0] / row['peer'][key][0]:.4g}")
        row["ratio_quartiles"] = quartiles
    return row


def middle(values) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(f"{x:.4g}") for x in np.percentile(list(values), [50, 25, 75])]


def agree(job: Job, first: list[dict], turns: list[list[dict]]) -> None:
    """Raises RuntimeError if the two sides did not do the same work."""
    if "check" in first[0]:  # a loss or a mean log-prob, before any update
        ours, peer = (turn["check"] for turn in first[:2])
        if not math.isclose(ours, peer, rel_tol=2e-2 if CUDA else 1e-4):
            raise RuntimeError(f"{job.row}: ours computes {ours}, the peer {peer}")
    ours, peer = (np.concatenate([turn["lengths"] for turn in side]) for side in turns)
    random = "ragged" in job.row or job.row == "ppo"
    error = math.sqrt(ours.var() / len(ours) + peer.var() / len(peer)) if random else 0.0
    if len(ours) != len(peer) or abs(ours.mean() - peer.mean()) > 5 * error:
        counts = f"ours {len(ours)} of {ours.mean():.1f} tokens, the peer {len(peer)} of {peer.mean():.1f}"
        raise RuntimeError(f"{job.row}: the numbers of sequences or tokens differ: {counts}")


def profile(cfg: Config, job: Job) -> None:
    worker = Worker("ours", job, cfg)
    _, turn = worker.turn(), worker.turn()
    worker.end()
    print(f"{job.shape_name} {job.row}: {turn['seconds']:.3f} s, profiler included {turn.get('split', '')}")
    print(turn["profile"], flush=True)


# ---- table and picture ---------------------------------------------------------------------------------------------


HEADER = f"{'':25}{'tokens/s':>9}{'peer':>9}{'ratio':>7} {'spread':12}{'CPU':>6}{'of limit':>9}{'MB':>7}{'peer':>7}"


def line(name: str, row: dict) -> str:
    """A row of the table."""
    ours, peer = row["ours"], row.get("peer")
    text = f"{name:25}{ours['tokens_per_second'][0]:9,.0f}"
    if peer:
        spread = "{:.2f}-{:.2f}".format(*row["ratio_quartiles"])
        text += f"{peer['tokens_per_second'][0]:9,.0f}{row['ratio']:7.2f} {spread:12}{row['cpu_ratio']:6.2f}"
    else:
        text += f"{'-':>9}{'-':>7} {'-':12}{'-':>6}"
    text += f"{row['share_of_limit'][0]:9.1%}{ours['peak_mb']:7,}"
    return text + (f"{peer['peak_mb']:7,}  {peer['name']}" if peer else f"{'-':>7}")


def draw(result: dict, path: Path) -> None:
    """Two panels, a bar per row, a black line over its spread: the ratio to the peer, and the share of the limit."""
    from matplotlib.figure import Figure

    rows = {f"{name}  {kind}": row for name, kinds in result["shapes"].items() for kind, row in kinds.items()}
    figure = Figure(figsize=(12, 1.6 + 0.45 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows.values()):
        bars = [(right, "#E69F00", 100, " {:.0f} %", *row["share_of_limit"])]  # colours of Okabe and Ito
        if "ratio" in row:
            bars += [(left, "#0072B2", 1, " {:.2f} ×", row["ratio"], *row["ratio_quartiles"])]
        for axis, colour, scale, text, *values in bars:
            value, low, high = (scale * x for x in values)
            axis.barh(place, value, color=colour)
            axis.plot([low, high], [place, place], color="black", linewidth=2.5)
            axis.text(max(value, high), place, text.format(value), va="center", fontsize=16)
    for axis, mark, label in ((left, 1, "speed (tokens/s), × the peer's"), (right, 100, "share of the limit, %")):
        axis.set_xlabel(label, fontsize=16)
        axis.axvline(mark, color="black", linestyle="--", linewidth=1)
        axis.set_xlim(0, 1.2 * max(axis.get_xlim()[1], mark))
        axis.tick_params(labelsize=16)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    figure.suptitle(f"{result['machine']}, threads: {result['threads']}, {result['dtype']}", fontsize=17)
    figure.savefig(path, dpi=100)


def machine_name() -> str:
    """The processor that computes, without the name of the host."""
    if CUDA:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def make_trl_venv(folder: str) -> None:
    venv.create(folder, with_pip=True)
    python = str(Path(folder, "bin", "python"))
    for package in (f"torch=={torch.__version__.split('+')[0]}", "trl==1.11.*"):  # torch first: the same on both sides
        subprocess.run([python, "-m", "pip", "install", package], check=True)
    print(f"now: python bench/speed.py --trl_python {python}")


def save(cfg: Config, result: dict) -> Path:
    """Write what there is so far."""
    result["threads"] = max(row["ours"]["threads"] for rows in result["shapes"].values() for row in rows.values())
    slug = re.sub(r"[^a-z0-9]+", "-", f"{result['machine']} {result['threads']}t".lower()).strip("-")
    path = Path(cfg.out, f"speed-{slug}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_json(path, result)
    draw(result, path.with_suffix(".png"))
    return path


def main(cfg: Config) -> None:
    if cfg.make_trl_venv:
        return make_trl_venv(cfg.make_trl_venv)
    names, kinds = cfg.shape.split(","), cfg.only.split(",") if cfg.only else ROWS
    for flag, values, known in (("shape", names, SHAPES), ("only", kinds, ROWS)):
        for value in values:
            runtime.require(value in known, f"--{flag} {value}: choose from {', '.join(known)}, comma-separated")
    runtime.require(not cfg.trl_python or Path(cfg.trl_python).exists(), f"--trl_python {cfg.trl_python}: no such file")
    result = {"machine": machine_name(), "dtype": str(DTYPE).removeprefix("torch."), "torch": torch.__version__}
    result |= {"lists_of_three": "median, lower and upper quartile over the rounds", "threads": 0, "shapes": {}}
    for name in names:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            job, rows = Job("files", name, folder, cfg.quick, cfg.profile), result["shapes"].setdefault(name, {})
            Worker("files", job, cfg).end()
            print(HEADER * (not cfg.profile))
            for row in job.shape.rows:
                kind, job = row.split()[0], replace(job, row=row)
                peer = {"ppo": "trl" if cfg.trl_python else ""}.get(kind, "transformers")
                peer = peer if cfg.peer and not job.lora else ""
                if kind in kinds and cfg.profile:
                    profile(cfg, job)
                elif kind in kinds:
                    rows[row] = measure(cfg, job, ["ours", peer] if peer else ["ours"])
                    print(line(f"{name} {row}", rows[row]), flush=True)
                    path = save(cfg, result)
    if not cfg.profile:
        print(f"{result['machine']}, threads: {result['threads']}, {result['dtype']}: {path} and its .png")


if __name__ == "__main__":
    runtime.launch(main, Config)
