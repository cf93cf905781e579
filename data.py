"""Questions, cut into disjoint splits, and batches of them, padded on the right.

    python data.py --questions gsm8k --out runs/mine/0_questions --train 2000   # one folder of disjoint splits
    python data.py fetch gsm8k                                                  # the published files, into $DATA_DIR
    python data.py check my/train.jsonl my/test.jsonl                           # faults, duplicates, leaks, lengths

Every stage reads the question files that this script writes, so all of them ask the same text.

Shapes: B sequences, T tokens. Padding is on the right and is known from masks, never from token ids.
"""

import random
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import runtime
from hf.tokenizer import Tokenizer  # noqa: F401  the other scripts have it from here
from runtime.files import read_jsonl, write_jsonl  # noqa: F401
from runtime.flags import Count, Questions
from tasks import load_questions
from tasks.check import CheckConfig, check
from tasks.published import FetchConfig, fetch
from tasks.question import Question

# ---- batches ---------------------------------------------------------------------------------------------------------


def collate(
    prompts: Sequence[list[int]], responses: Sequence[list[int]], device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad prompt + response rows: tokens (B, T), mask (B, T-1), lengths (B,), on `device`.

    mask[b, t] is True where tokens[b, t+1] belongs to the response (its end token included): the (B, T-1) frame of
    token_logprobs. Padding holds 0, which nothing reads. Example: prompt [5, 6], response [7, 8] -> mask [F, T, T].
    """
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])  # (B,)
    starts = torch.tensor([len(p) for p in prompts])  # (B,)
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)  # (B, T)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        tokens[row, : lengths[row]] = torch.tensor(prompt + response)
    positions = torch.arange(1, tokens.shape[1])  # (T-1,): entry t is about token t + 1
    mask = (positions >= starts[:, None]) & (positions < lengths[:, None])  # (B, T-1)
    return tokens.to(device), mask.to(device), lengths.to(device)


# ---- the script: one folder of disjoint splits ---------------------------------------------------------------------

INSTRUCTIONS = {  # forms that the strict reading knows, asked for in words that instruction-tuned models follow
    "number": "Think step by step. On the last line write #### and the final number.",
    "choice": 'Think step by step and then finish your answer with "the answer is (X)" where X is the correct letter.',
    "calculation": "Write only the calculation.",
}


@dataclass(frozen=True)
class Config:
    """Write disjoint splits of a question set. Two more commands: 'data.py check FILE ...', 'data.py fetch gsm8k'."""

    questions: Questions  # arith, gsm8k, mmlu_pro, mawps, or a JSONL file to be split
    out: str  # folder to write
    train: Count = 2000  # questions the student may learn from (their gold answers are for reports only)
    valid: Count = 200  # held out of training, for choosing and stopping
    test: Count = 1000  # held out of everything
    instruction: str = ""  # follows every question that has none of its own; auto: what suits its kind
    seed: int = 0  # shuffles a set before its first questions are taken


@runtime.stage
def main(cfg: Config, stage: runtime.Stage) -> None:
    counts = {"train": cfg.train, "valid": cfg.valid, "test": cfg.test}
    splits = disjoint_splits(cfg.questions, counts, cfg.seed)
    without = sum(q.answer is None for name in ("valid", "test") for q in splits[name])
    runtime.require(
        not without,
        f"{cfg.questions}: accuracy is measured on --valid {len(splits['valid'])} and --test {len(splits['test'])} "
        f"questions, and {without} of them would have no gold answer: give more answers, or measure on fewer",
    )
    for name, questions in splits.items():
        asked = [INSTRUCTIONS[q.kind] if cfg.instruction == "auto" else cfg.instruction for q in questions]
        rows = [asdict(q) | {"instruction": q.instruction or text} for q, text in zip(questions, asked)]
        write_jsonl(stage.out / f"{name}.jsonl", rows)
    summary = ", ".join(f"{len(questions)} {name}" for name, questions in splits.items())
    print(f"{summary} questions; the first:")
    print(textwrap.fill(f"'{runtime.shown(splits['train'][0].question)}'", 80))
    stage.finish()


def disjoint_splits(name: str, counts: dict[str, int], seed: int) -> dict[str, list[Question]]:
    """So many questions of a set for train, valid and test; hard for some sets. ValueError: too few, or a leak."""
    if name == "arith":
        splits = {split: load_questions(f"arith:{split}", count) for split, count in counts.items()}
        splits["hard"] = load_questions("arith:hard", counts["test"])
    elif name == "gsm8k":  # the published test set in its own order
        splits = _cut(name, load_questions("gsm8k:train"), {"train": counts["train"], "valid": counts["valid"]}, seed)
        wanted = counts["test"]
        splits["test"] = test = load_questions("gsm8k:test", wanted)
        runtime.require(len(test) == wanted, f"gsm8k:test holds {len(test)} questions, fewer than --test {wanted}")
    elif name in ("mmlu_pro", "mawps"):
        splits = {}
        for split, count in counts.items():
            splits |= _cut(f"{name}:{split}", load_questions(f"{name}:{split}"), {split: count}, seed)
        if name == "mawps":
            splits["hard"] = load_questions("svamp:test")
    else:
        pool = load_questions(name)
        splits = _cut(name, pool, fitting(counts, len({question.key for question in pool})), seed)
    owner = {}
    for split, questions in splits.items():
        for question in questions:
            if (other := owner.setdefault(question.key, split)) != split:
                where = f"is in {split} and in {other}: {question.question[:60]!r}"
                raise ValueError(f"{name}: the question '{question.id}' {where}")
    return splits


def fitting(counts: dict[str, int], n: int) -> dict[str, int]:
    """How n questions are split: as asked for, or, where they are fewer, in the same proportions, with one at least.

    Example: train 20, valid 2, test 10 of 16 -> 10, 1, 5.
    """
    if n < sum(counts.values()) and n >= len(counts):
        rest = {name: max(1, counts[name] * n // sum(counts.values())) for name in counts if name != "train"}
        print(f"{n} questions, fewer than {' + '.join(map(str, counts.values()))}: split in these proportions")
        counts = {"train": n - sum(rest.values())} | rest
    return counts


def _cut(name: str, pool: list[Question], counts: dict[str, int], seed: int) -> dict[str, list[Question]]:
    """Deal the different questions of a pool to splits, in an order drawn by the seed: files are sorted by subject."""
    unique = list({question.key: question for question in pool}.values())
    random.Random(seed).shuffle(unique)
    if sum(counts.values()) > len(unique):
        wanted = " + ".join(f"--{split} {count}" for split, count in counts.items())
        raise ValueError(f"{name} holds {len(unique)} different questions, fewer than {wanted}")
    splits = {}
    for split, count in counts.items():  # a question without a gold answer can be trained on, and measures nothing
        unique.sort(key=lambda question, train=split == "train": (question.answer is None) != train)
        splits[split], unique = unique[:count], unique[count:]
    return splits


if __name__ == "__main__":
    commands = {"check": (check, CheckConfig), "fetch": (fetch, FetchConfig)}
    if sys.argv[1:] and sys.argv[1] in commands:
        runtime.launch(*commands[sys.argv[1]], sys.argv[2:])
    else:
        runtime.launch(main, Config)
