"""A question: its prompt, what makes two of them the same, and how one is read from a line of a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from answers import canonical, extract_answer
from runtime.files import numbered_jsonl, refuse


@dataclass(frozen=True)
class Question:
    """One question. `answer` is the gold answer, for reports only: no training stage may look at it."""

    id: str
    question: str
    answer: str | None = None
    kind: str = "number"  # how its answer is read: 'number' (GSM8K) or 'choice' (a letter, MMLU-Pro)
    options: tuple[str, ...] = ()
    instruction: str = ""  # follows the question in the chat prompt
    subject: str = ""  # MMLU-Pro's category: worked examples are of the same subject

    @property
    def prompt(self) -> str:
        """The user's turn of a chat: question, lettered options, instruction."""
        lines = [self.question.strip(), *lettered(self.options), self.instruction]
        return "\n".join(line for line in lines if line)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two questions the same: text and options, whatever their order, case and spaces."""
        return _plain(self.question), *sorted(map(_plain, self.options))


def lettered(options: Iterable[str]) -> list[str]:
    """Example: ['x', 'y'] -> ['A. x', 'B. y']."""
    return [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def numbered_questions(
    path: Path, fillers: bool = False, faults: list[str] | None = None
) -> Iterator[tuple[int, Question]]:
    """The questions of a file with their line numbers. Given a list of `faults`, note a bad line there and go on.

    `fillers`: some releases of MMLU-Pro fill up to ten options with 'N/A'; these go, from the end alone, since one
    before a real option holds a letter's place. Raises ValueError, naming file and line.
    """
    lines, kind = {}, None
    stem = Path(path.name.removesuffix(".gz")).stem
    for number, row in numbered_jsonl(path, ["question"], faults):
        try:
            question = _question(row, f"{stem}-{number}", fillers)
            first = lines.setdefault(question.id, number)
            if first != number:
                raise ValueError(f"lines {first} and {number} have the same id '{question.id}'")
            kind = kind or question.kind
            if question.kind != kind:
                raise ValueError(f"a '{question.kind}' question after '{kind}' ones; a file holds one kind")
        except ValueError as error:
            refuse(f"{path}, line {number}: {error}", faults)
        else:
            yield number, question


def _question(row: dict, default_id: str, fillers: bool) -> Question:
    def given(*keys: str, default: object = None) -> object:
        return next((row[key] for key in keys if row.get(key) is not None), default)

    text, options = given("question"), given("options", default=[])
    kind = given("kind", default="choice" if options else "number")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("'question' must be a text that is not empty")
    if kind not in ("number", "choice"):
        raise ValueError(f"kind '{kind}' is neither 'number' nor 'choice'")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError("'options' must be a list of texts")
    for key in ("instruction", "subject", "category"):
        if not isinstance(given(key, default=""), str):
            raise ValueError(f"'{key}' must be a text")
    while fillers and options and options[-1] == "N/A":
        options = options[:-1]
    if len(options) > 10:
        raise ValueError(f"{len(options)} options; answers are read as A to J, so ten are the most")
    return Question(
        id=str(given("id", "question_id", default=default_id)),
        question=text,
        answer=_gold(given("answer"), kind, len(options)),
        kind=kind,
        options=tuple(options),
        instruction=given("instruction", default=""),
        subject=given("subject", "category", default=""),
    )


def _gold(answer: object, kind: str, options: int) -> str | None:
    """The gold answer in canonical form, None if the row has none."""
    if answer is None:
        return None
    last = str(answer).rpartition("####")[2]  # GSM8K's gold is a worked solution
    gold = canonical(last, kind) or extract_answer(str(answer), kind)
    if gold is None:
        raise ValueError(f"the gold answer {str(answer)[:60]!r} holds no {kind}")
    if kind == "choice" and options and ord(gold) - 65 >= options:
        raise ValueError(f"the gold answer {gold} is beyond the {options} options")
    return gold
