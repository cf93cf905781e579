"""What bench/gpu_run.sh will take: on paper, before a GPU is there; and in a run, how many iterations of PPO still fit.

    python bench/gpu_plan.py                             # the plan, minute by minute, for two pairs of models
    python bench/gpu_plan.py --run RUN --seconds 900     # iterations, and seconds for what follows them

On paper a stage takes the larger of its FLOPs at the card's peak and, when it samples, the bytes of its weights at the
card's bandwidth, once a step (`least`); and, since nothing comes near that, what the assumptions below make of it
(`assumed`). None of them has been measured on a GPU yet.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from report import table

PEAK, BANDWIDTH = 989e12, 3.35e12  # FLOP/s in bf16, byte/s: an H100 SXM by its data sheet; an H200 reads 4.8e12
LAYER = 5e-4  # seconds a layer and decoding step: some 20 small kernels, each started by Python. An assumption
TRAINS = 0.15  # share of the peak in training, micro-batches of 8,192 tokens. An assumption
START = 20  # seconds until a script has imported torch, loaded its models and found its kernels. An assumption
DISK = 4e8  # byte/s to write a state to the disk, read it back and hash it. An assumption
MODELS = {"1.5B": (1.54e9, 28), "0.5B": (0.494e9, 24), "135M": (0.1345e9, 30)}  # parameters, layers
PROMPT, ANSWER = 104, 211  # tokens, the means of Qwen2.5-Coder-0.5B on 100 test questions (results/gsm8k-cpu)


@dataclass(frozen=True)
class Config:
    """Print the plan of bench/gpu_run.sh; with --run how many iterations fit, and seconds for what follows them."""

    run: str = ""  # a run folder with 2_sft and 3_student
    seconds: float = 1800.0  # of all, or, with --run, what is left for PPO and the evaluations after it
    rollout: int = 256  # PPO's answers per iteration
    batch: int = 512  # rows sampled together
    new_tokens: int = 320  # the longest answer
    train: int = 2000  # questions to learn from, in the plan
    samples: int = 4  # answers to each, of teacher and of student
    few: int = 300  # test questions for teacher, base student and best of 8
    test: int = 1319  # test questions for the others


def _done(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "done.json").read_text(encoding="utf-8"))


def ppo_seconds(run: Path, rollout: int) -> tuple[float, float]:
    """Seconds that PPO takes to start, and for each iteration, from what SFT and sampling took in the same run.

    Sampling costs by the step, however many rows take it, and an iteration takes as many steps as the longest answer
    has tokens. Each token of prompt and answer is then read four times, and two models are trained on it: 20 FLOPs a
    parameter, SFT does 6. Example: 64,000 tokens sampled in 50 s by 64 rows are 1,000 steps of 0.05 s, and SFT on 50
    texts in 30 s is 0.6 s a text, so 2 s in PPO; 100 steps and 8 answers -> 5 + 16 s.
    """
    sft, student = _done(run, "2_sft"), _done(run, "3_student")
    batch, new_tokens = (student["settings"][key] for key in ("batch_size", "max_new_tokens"))
    steps = max(new_tokens, student["tokens"] / batch)
    texts = sft["results"]["examples"] * sft["settings"]["epochs"]
    return 2.0 * START, new_tokens * student["seconds"] / steps + rollout * sft["seconds"] / texts * 20 / 6


def iterations(seconds: float, start: float, each: float, most: int = 150) -> int:
    """Iterations that fit into four fifths of `seconds`, 1 to `most`. Example: 140 s, start 12, each 10 -> 10."""
    return min(most, max(1, int((0.8 * seconds - start) / each + 1e-9)))


def reserve(run: Path, left: float) -> float:
    """Seconds for the evaluations after PPO: its student, teacher and base student, all on every test question.

    The SFT student was asked as many; how much slower a teacher is, its first questions have shown. A fifth is added.
    A sixth of what is `left` where an evaluation before PPO is missing.
    Example: SFT 30 s; the teacher's first questions 40 s, the base student's 20 s -> 1.2 * (30 + 60 + 30) = 144.
    """
    seconds = {path.parent.name: _done(run, f"7_eval/{path.parent.name}") for path in run.glob("7_eval/*/done.json")}
    if not {"base", "sft"} <= seconds.keys():
        return left / 6
    sft, base = seconds["sft"]["seconds"], seconds["base"]["seconds"]
    teacher = seconds["teacher"]["seconds"] if "teacher" in seconds else 0.0  # recorded, or none
    return 1.2 * sft * (2 + teacher / base)


def plan(cfg: Config, teacher: str, student: str) -> Iterator[tuple[str, int, float, float, float]]:
    """Rows of the plan: stage, tokens (sampled or trained on), FLOPs, least and assumed seconds."""

    def sample(name: str, model: str, answers: int, judge: int = 0) -> tuple[str, int, float, float, float]:
        parameters, layers = MODELS[model]
        steps = max(cfg.new_tokens, answers * ANSWER / cfg.batch)
        flops = 2 * parameters * answers * (PROMPT + ANSWER) * (1 + judge)
        least = max(flops / PEAK, 2 * parameters * steps / BANDWIDTH)
        return name, answers * ANSWER, flops, least, START + steps * layers * LAYER + flops / PEAK / TRAINS

    def train(name: str, texts: int) -> tuple[str, int, float, float, float]:
        tokens = texts * (PROMPT + ANSWER)
        flops = 6 * MODELS[student][0] * tokens
        return name, tokens, flops, flops / PEAK, START + 12 * MODELS[student][0] / DISK + flops / PEAK / TRAINS

    answers, won = cfg.train * cfg.samples, cfg.train * cfg.samples // 2  # half of the answers agree with the vote
    rows = [
        sample("1 teacher, first test questions", teacher, cfg.few),
        sample("1 base student, first test questions", student, cfg.few),
        sample("2 teacher samples", teacher, answers),
        train("3 vote, SFT, 2 epochs", 2 * won),
        sample("3 SFT student, test", student, cfg.test),
        sample("4 student samples", student, answers),
        train("4 pseudo-rewards, reward model", 2 * won),
        sample("4 best of 8, first test questions", student, 8 * cfg.few, judge=1),
    ]
    last = [sample("5 PPO student, test", student, cfg.test), sample("5 teacher, test", teacher, cfg.test)]
    last += [sample("5 base student, test", student, cfg.test)]
    parameters, layers = MODELS[student]
    flops = 22 * parameters * cfg.rollout * (PROMPT + ANSWER)  # one iteration
    start = 2 * START + 24 * parameters / DISK  # four models, and the first state: policy, critic and their moments
    each = cfg.new_tokens * layers * LAYER + flops / PEAK / TRAINS
    n = iterations(cfg.seconds - sum(row[-1] for row in rows + last), start, each)
    least = flops / PEAK + 2 * parameters * cfg.new_tokens / BANDWIDTH
    ppo = (f"5 PPO, {n} iterations", n * cfg.rollout * ANSWER, n * flops, n * least, start + n * each)
    yield from [*rows, ppo, *last]


def main(cfg: Config) -> None:
    if cfg.run:
        later = reserve(Path(cfg.run), cfg.seconds)
        print(iterations(cfg.seconds - later, *ppo_seconds(Path(cfg.run), cfg.rollout)), round(later))
        return
    for teacher, student in (("1.5B", "0.5B"), ("0.5B", "135M")):
        rows, clock = [], 0.0
        for name, tokens, flops, least, assumed in plan(cfg, teacher, student):
            begins, share = f"{clock // 60:.0f}:{clock % 60:02.0f}", f"{100 * least / assumed:.1f}"
            numbers = f"{tokens / 1e6:.2f}", f"{flops / 1e15:.2f}", f"{least:.1f}", f"{assumed:.0f}"
            rows.append([name, begins, *numbers, share])
            clock += assumed
        print(f"teacher {teacher}, student {student}, one H100 in bf16, {cfg.seconds:.0f} s in all")
        print(table(["stage", "begins", "M tokens", "PFLOPs", "least, s", "assumed, s", "share, %"], rows))
        print(f"ends at {clock // 60:.0f}:{clock % 60:02.0f}\n")


if __name__ == "__main__":
    runtime.launch(main, Config)
