"""The question sets: the built-in one (arith), the published ones (published) and files of one's own (question)."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from runtime.flags import require
from tasks.arith import SPLITS as ARITH
from tasks.arith import arith_problems
from tasks.published import HASHED, SPLITS, hash_split, path_of
from tasks.question import Question, numbered_questions


def load_questions(spec: str, limit: int | None = None) -> list[Question]:
    """Questions of 'arith:SPLIT' (built in), of a published set ('gsm8k:SPLIT', in $DATA_DIR), or a file of rows.

    MMLU-Pro has no training set and MAWPS no split, so both are split by a hash of each question's text (`hash_split`);
    'mmlu_pro:all' is the published 12,032, for comparison with published scores. MAWPS and SVAMP ask for a calculation,
    as in their papers. A row of one's own is {"question", "answer"?} and may carry id (or question_id), kind, options
    (kind is then 'choice'), instruction, subject (or category). cais/mmlu's choices with an index from 0 and ARC's with
    answerKey are read too; other keys that a question needs are refused.
    Raises ValueError or FileNotFoundError with one sentence; an empty set is an error, and so is a file of two kinds.
    """
    name, _, split = str(spec).partition(":")
    if name == "arith":
        problems = islice(arith_problems(split), 1000 if limit is None else limit)
        return [Question(f"arith-{split}-{i}", p.text, str(p.values[-1])) for i, p in enumerate(problems)]
    path = Path(spec)
    if name in SPLITS and split in SPLITS[name]:
        path = path_of(name, split)
    elif not path.is_file():
        sets = ", ".join(f"{name}:{'|'.join(splits)}" for name, splits in ({"arith": ARITH} | SPLITS).items())
        raise FileNotFoundError(f"no question set '{spec}': it is neither {sets}, nor the path of a JSONL file")
    found = (question for _, question in numbered_questions(path, fillers=name == "mmlu_pro"))
    if SPLITS.get(name) == HASHED:
        found = (question for question in found if split in ("all", hash_split(question, template=name == "mawps")))
    if name in ("mawps", "svamp") and path != Path(spec):
        found = (replace(question, kind="calculation") for question in found)
    questions = list(islice(found, limit))
    require(bool(questions), f"'{spec}': {path} holds no question of it")
    return questions
