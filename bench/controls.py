"""Controls that learn nothing about right and wrong: rewards by length, and SFT on answers chosen by length.

    python ppo.py --reward bench/controls.py:longer ...             # or :shorter
    python bench/controls.py --kind longest --sft runs/tiny-0/1_vote/sft.jsonl --out longest.jsonl

If one of them does what the method does, the task could be won by a rule of one line.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime
from data import load_questions, read_jsonl, write_jsonl
from runtime.flags import Input


def longer(questions, prompts, responses, texts) -> Tensor:
    """The number of tokens, with mean 0 and deviation 1 over the rollout so that the KL weighs as usual: (B,)."""
    lengths = torch.tensor([float(len(response)) for response in responses])  # (B,)
    return (lengths - lengths.mean()) / lengths.std(correction=0).clamp(min=1.0)


def shorter(questions, prompts, responses, texts) -> Tensor:
    return -longer(questions, prompts, responses, texts)


@dataclass(frozen=True)
class Config:
    """Another SFT set: each question's longest or shortest winner, or the student's own answers that equal the vote."""

    kind: str  # longest, shortest or own
    out: str  # JSONL to write
    sft: Input = ""  # sft.jsonl of the vote: for longest and shortest, each in the place of all of its question's rows
    rewards: Input = ""  # rewards.jsonl: for own
    questions: Input = ""  # the question set: for own


def main(cfg: Config) -> None:
    runtime.require(cfg.kind in ("longest", "shortest", "own"), f"--kind {cfg.kind}: longest, shortest or own")
    if cfg.kind == "own":
        prompts = {question.id: question.prompt for question in load_questions(cfg.questions)}
        rows = [
            {"id": row["id"], "prompt": prompts[row["id"]], "response": said["response"]}
            for row in read_jsonl(cfg.rewards)
            for said in row["responses"]
            if said["source"] == "student" and said["reward"] > 0
        ]
    else:
        of_question = defaultdict(list)
        for row in read_jsonl(cfg.sft):
            of_question[row["id"]].append(row)
        best = {"longest": max, "shortest": min}[cfg.kind]
        chosen = {key: best(rows, key=lambda row: len(row["response"])) for key, rows in of_question.items()}
        rows = [chosen[key] for key, rows in of_question.items() for _ in rows]
    write_jsonl(cfg.out, rows)
    print(f"{len(rows)} examples")


if __name__ == "__main__":
    runtime.launch(main, Config)
