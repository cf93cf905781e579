"""Memory: what a script says that it needs (memory.py), against the peak of its process.

    python bench/peaks.py                    # every case at SmolLM2-135M's shape: half an hour and 9 GB
    python bench/peaks.py --only "ppo 512"

Random weights (sides.py makes them) and texts of 128 tokens, 96 in PPO. Two steps of two passes each: in the second all
moments are there, in its second pass all gradients. The estimate is the line that the script prints before it loads a
weight. On a GPU the peak is what PyTorch has allocated, so CUDA's own share is taken off the estimate.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sides

from runtime.memory import PROCESS

ROOT = Path(__file__).resolve().parent.parent
CASES = {  # name: script, tokens of a pass or rows sampled together, flags
    "sft 512": ("sft", 512, ""),
    "sft 2048": ("sft", 2048, ""),
    "sft 4096": ("sft", 4096, ""),
    "sft 2048 checkpointing": ("sft", 2048, "--gradient_checkpointing"),
    "reward 512": ("reward", 512, ""),
    "reward 2048": ("reward", 2048, ""),
    "ppo 512": ("ppo", 512, ""),
    "ppo 2048": ("ppo", 2048, ""),
    "ppo 2048 checkpointing": ("ppo", 2048, "--gradient_checkpointing"),
    "generate 32": ("generate", 32, ""),
    "generate 256": ("generate", 256, ""),
}
CHILD = """
import atexit, runpy, sys
sys.path[:0] = {paths!r}
sys.argv = {argv!r}
import sides
atexit.register(lambda: print("peak", sides.peak_mb(), flush=True))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def words(rng: random.Random, count: int, vocabulary: int) -> str:
    return " ".join(f"t{rng.randrange(vocabulary - 2)}" for _ in range(count))


def command(folder: Path, script: str, size: int, vocabulary: int) -> list[str]:
    """Flags of a script for two steps of two passes of `size` tokens, and the files that they name."""
    rng, text = random.Random(0), lambda count: words(rng, count, vocabulary)
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, lr = f"--model={folder}/model", "--lr=1e-6"
    if script == "sft":
        rows = 2 * (size // 128)
        write("sft.jsonl", [{"prompt": text(64), "response": text(63)} for _ in range(rows)])
        return [model, f"--data={folder}/sft.jsonl", f"--batch_size={rows}", "--epochs=2", f"--micro_tokens={size}", lr]
    if script == "reward":
        rows = 2 * (size // 2 // 128)
        write("pairs.jsonl", [{"id": f"q{i}", "prompt": text(64), "chosen": text(63), "rejected": text(63)}
                              for i in range(rows + 1)])  # one is held out  # fmt: skip
        questions = [{"id": f"q{i}", "question": text(64), "answer": "1"} for i in range(2)]
        write("asked.jsonl", questions)
        write("samples.jsonl", [{"id": q["id"], "response": text(63), "finish": "stop"} for q in questions])
        files = [
            f"--{n}={folder}/{f}.jsonl"
            for n, f in zip(("pairs", "calibrate", "questions"), ("pairs", "samples", "asked"))
        ]
        return [model, *files, f"--batch_size={rows}", "--epochs=2", f"--micro_tokens={size}", lr, "--held_out=0.01"]
    if script == "ppo":
        rows = 2 * (size // 96)
        write("asked.jsonl", [{"question": text(64), "answer": "1"} for _ in range(rows)])
        return [f"--policy={folder}/model", f"--reward_model={folder}/reward", f"--questions={folder}/asked.jsonl",
                f"--rollout_size={rows}", "--minibatches=1", "--iterations=2", f"--micro_tokens={size}", lr,
                "--critic_lr=1e-6", "--max_new_tokens=32", "--eval_every=9"]  # fmt: skip
    write("asked.jsonl", [{"question": text(64), "answer": "1"} for _ in range(size)])
    return [model, f"--questions={folder}/asked.jsonl", "--samples=1", f"--batch_size={size}", "--max_new_tokens=32"]


def measure(folder: Path, name: str, vocabulary: int) -> tuple[float, float, str]:
    """Estimate and peak of a case in GB, and the line of the estimate."""
    script, size, flags = CASES[name]
    out = tempfile.mkdtemp(dir=folder)
    argv = [f"{ROOT}/{script}.py", *command(folder, script, size, vocabulary), *flags.split(), f"--out={out}"]
    code = CHILD.format(paths=[str(ROOT), str(ROOT / "bench")], argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("needs about"))
    estimate = sum(float(size) for size in re.findall(r"\w (\d+\.\d\d)", line.split(":", 1)[1]))
    peak = float(re.findall(r"^peak (\S+)$", done.stdout, re.MULTILINE)[-1]) * 2**20 / 1e9
    return estimate - (PROCESS[True] / 1e9 if sides.CUDA else 0), peak, line


def main(only: str, folder: Path) -> None:
    config = sides.SHAPES["smollm2"].model
    if not (folder / "model").exists():
        sides.files(sides.Job("sft", "smollm2", str(folder)))
    print("| stage, tokens of a pass or rows | estimate, GB | measured, GB | estimate / measured |\n|---|---|---|---|")
    for name in CASES:
        if only in name:
            estimate, peak, line = measure(folder, name, config.vocab_size)
            print(f"| {name} | {estimate:.2f} | {peak:.2f} | {estimate / peak:.2f} |", flush=True)
            print(line, file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--folder", type=Path, help="keeps the models; left out, a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(args.only, args.folder or Path(temporary))
