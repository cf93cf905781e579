"""How fast answers are extracted (per second of processor time), and how often the reading is the official one.

With DATA_DIR in the environment on recorded outputs: gsm8k/judged_solutions.jsonl (OpenAI's 2,640 judged solutions) and
mmlu_pro/llama-3.1-8b-instruct.jsonl.gz (12,032 outputs published by MMLU-Pro). Without it on built-in solutions.

    DATA_DIR=/path/to/data python bench/extract.py
"""

import gzip
import json
import os
import re
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from answers import extract_answer, is_correct
from tasks.arith import arith_problems

# The rules of TIGER-AI-Lab/MMLU-Pro, evaluate_from_local.py: the sentence, else the label, else the last lone letter.
SENTENCE = re.compile(r"answer is \(?([A-J])\)?")
LABEL = re.compile(r"^.*[aA]nswer:\s*([A-J])", re.MULTILINE)
LONE = re.compile(r"(?s:.*)\b([A-J])\b")


def official(text: str) -> tuple[str | None, str | None]:
    """MMLU-Pro's reading: by its first rule alone, and by all three."""
    stated = SENTENCE.search(text)
    found = stated or LABEL.search(text) or LONE.match(text)
    return stated and stated[1], found and found[1]


def speed(name: str, texts: list[str], kind: str) -> None:
    for lenient in (False, True):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            for text in texts:
                extract_answer(text, kind, lenient)
            seconds.append(time.process_time() - start)
        mode = "lenient" if lenient else "strict"
        print(f"{name:18} {kind:7} {mode:8} {len(texts) / min(seconds):10,.0f} responses/s (best of 3)", flush=True)


def gsm8k(path: Path) -> None:
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    speed("GSM8K solutions", [row["response"] for row in rows], "number")
    golds = [row["reference"].rpartition("A:")[2].strip() for row in rows]
    verdicts = [is_correct(extract_answer(row["response"], "number"), gold, "number") for row, gold in zip(rows, golds)]
    same = sum(verdict == row["is_correct"] for row, verdict in zip(rows, verdicts))
    print(f"  official verdict reproduced on {same} of {len(rows)}\n")


def mmlu_pro(path: Path) -> None:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    speed("MMLU-Pro outputs", [row["generated_text"] for row in rows], "choice")
    ours = [[extract_answer(row["generated_text"], "choice", mode) for mode in (False, True)] for row in rows]
    theirs = [official(row["generated_text"]) for row in rows]
    for i, mode in enumerate(("strict", "lenient")):
        differ = [(row["question_id"], b[i], a[i]) for row, a, b in zip(rows, ours, theirs) if a[i] != b[i]]
        print(f"  {mode}: the official letter on {len(rows) - len(differ)} of {len(rows)}")
        for question, official_letter, letter in differ:
            print(f"    question {question}: official {official_letter}, ours {letter}")
    golds = [row["answer"] for row in rows]
    readings = {
        "as published, guesses included": [row["pred"] for row in rows],
        "lenient, stored guess where it finds none": [b or row["pred"] for row, (_, b) in zip(rows, ours)],
        "lenient, no answer is wrong": [b for _, b in ours],
        "strict, no answer is wrong": [a for a, _ in ours],
    }
    print(f"\n  {'accuracy of Llama-3.1-8B-Instruct':44} {'right':>6} {'none':>6} {'%':>7}")
    for name, letters in readings.items():
        right = sum(is_correct(letter, gold, "choice") for letter, gold in zip(letters, golds))
        print(f"  {name:44} {right:6} {letters.count(None):6} {100 * right / len(rows):7.2f}")


if __name__ == "__main__":
    if os.environ.get("DATA_DIR"):
        folder = Path(os.environ["DATA_DIR"])
        gsm8k(folder / "gsm8k/judged_solutions.jsonl")
        mmlu_pro(folder / "mmlu_pro/llama-3.1-8b-instruct.jsonl.gz")
    else:
        print("DATA_DIR is not set: built-in solutions, no agreement with official graders")
        speed("arith solutions", [problem.solution for problem in islice(arith_problems("train"), 5000)], "number")
