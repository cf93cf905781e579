"""data.py check: what is wrong with question files, and what is in them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime import flags
from tasks.question import Question, numbered_questions


@dataclass(frozen=True)
class CheckConfig:
    """Check question files: every line, ids, copies within a file, copies in two files (leaks), lengths."""

    files: tuple[str, ...]  # question files; a question that is in two of them is a leak
    tokenizer: str = ""  # model folder: lengths in tokens of the chat prompt too
    max_tokens: flags.Natural = 0  # count the prompts that are longer


def check(cfg: CheckConfig, chat: Callable[[str], list[int]] | None = None) -> None:
    """Print a report; `chat` turns a prompt into tokens.

    Faults and leaks are errors, raised as one ValueError at the end; copies and clashes of ids are notes.
    """
    flags.check(cfg)
    flags.require(not cfg.max_tokens or chat is not None, "--max_tokens counts tokens of a --tokenizer FOLDER")
    seen, ids, errors = {}, {}, []  # seen: question -> (file, line); ids: id -> (file, line, question)
    for path in map(Path, cfg.files):
        faults: list[str] = []
        rows = list(numbered_questions(path, faults=faults))
        if not rows and not faults:
            faults.append(f"{path} holds no question")
        leaks, notes = _copies(path, rows, seen, ids)
        _describe(path, [question for _, question in rows], chat, cfg.max_tokens)
        for label, found in (("error", faults), ("leak", leaks), ("note", notes)):
            for text in found[:10]:
                print(f"  {label}: {text}")
            if len(found) > 10:
                print(f"  {label}: and {len(found) - 10} more")
        errors += faults + leaks
    if errors:
        raise ValueError(f"{len(errors)} error{'s' * (len(errors) > 1)} in the files; the first: {errors[0]}")
    print("fine: no error, no leak")


def _copies(path: Path, rows: list[tuple[int, Question]], seen: dict, ids: dict) -> tuple[list[str], list[str]]:
    """Questions of another file, and what is met twice in this one; `seen` and `ids` are added to."""
    leaks, notes = [], []
    for number, question in rows:
        here = path, number
        there = seen.setdefault(question.key, here)
        if there[0] != path:
            leaks.append(f"{path}, line {number}: the same question as {there[0]}, line {there[1]}")
        elif there != here:
            notes.append(f"line {number} repeats the question of line {there[1]}")
        other, line, key = ids.setdefault(question.id, (*here, question.key))
        if other != path and key != question.key:
            notes.append(f"line {number}: id '{question.id}' is another question's in {other}, line {line}")
    return leaks, notes


def _describe(path: Path, questions: list[Question], chat: Callable | None, max_tokens: int) -> None:
    kinds = Counter(question.kind for question in questions)
    golds = sum(question.answer is not None for question in questions)
    print(f"{path}: {len(questions)} questions ({', '.join(kinds) or 'none'}), {golds} with a gold answer")
    lengths = {"characters": [len(question.prompt) for question in questions]}
    if chat:
        lengths["tokens of the chat prompt"] = [len(chat(question.prompt)) for question in questions]
    for unit, of in lengths.items():
        if of:
            print(f"  {unit}: min {min(of)}, median {statistics.median(of):g}, max {max(of)}")
    if max_tokens:
        print(f"  {sum(n > max_tokens for n in of)} are longer than {max_tokens} tokens")
