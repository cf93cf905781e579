"""data.py check: what is wrong with question files, and what is in them."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tasks.question import Question, numbered_questions


@dataclass(frozen=True)
class CheckConfig:
    """Check question files: lines, ids, copies within a file, copies in two files (leaks), lengths."""

    files: tuple[str, ...]  # question files; a question that is in two of them is a leak


def check(cfg: CheckConfig) -> None:
    """Print a report. The first fault of each file and every leak are errors: one ValueError at the end."""
    seen, errors = {}, []  # seen: question -> (file, line)
    for path in map(Path, cfg.files):
        try:
            rows = list(numbered_questions(path))
        except ValueError as error:
            errors.append(str(error))
            continue
        _describe(path, [question for _, question in rows])
        for number, question in rows:
            other, line = seen.setdefault(question.key, (path, number))
            copy = f"{path}, line {number}: the same question as {other}, line {line}"
            if other != path:
                errors.append(f"{copy}, a leak")
            elif line != number:
                print(f"  note: {copy}")
    for error in errors:
        print(f"  error: {error}")
    if errors:
        raise ValueError(f"{len(errors)} error{'s' * (len(errors) > 1)} in the files; the first: {errors[0]}")
    print("fine: no error, no leak")


def _describe(path: Path, questions: list[Question]) -> None:
    kinds = Counter(question.kind for question in questions)
    golds = sum(question.answer is not None for question in questions)
    print(f"{path}: {len(questions)} questions ({', '.join(kinds)}), {golds} with a gold answer")
    lengths = [len(question.prompt) for question in questions]
    print(f"  characters: min {min(lengths)}, median {statistics.median(lengths):g}, max {max(lengths)}")
