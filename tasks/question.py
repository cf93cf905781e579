"""A question: its prompt, what makes two of them the same, and how one is read from a line of a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from answers import canonical, extract_answer
from runtime.files import numbered_jsonl
from runtime.flags import require


@dataclass(frozen=True)
class Question:
    """One question. `answer` is the gold answer, for reports only: no training stage may look at it."""

    id: str
    question: str
    answer: str | None = None
    kind: str = "number"  # how its answer is read (answers.py): 'number', 'choice' or 'calculation'
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


def numbered_questions(path: Path, fillers: bool = False) -> Iterator[tuple[int, Question]]:
    """The questions of a file with their line numbers; a file without one is an error.

    `fillers`: some releases of MMLU-Pro fill up to ten options with 'N/A'; these go, from the end alone, since one
    before a real option holds a letter's place. Raises ValueError, naming file and line.
    """
    lines, kind = {}, None
    stem = Path(path.name.removesuffix(".gz")).stem
    for number, row in numbered_jsonl(path, ["question"]):
        try:
            question = _question(row, f"{stem}-{number}", fillers)
            first, kind = lines.setdefault(question.id, number), kind or question.kind
            require(first == number, f"lines {first} and {number} have the same id '{question.id}'")
            require(question.kind == kind, f"a '{question.kind}' question after '{kind}' ones; a file holds one kind")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        yield number, question
    if not lines:
        raise ValueError(f"{path} holds no question")


KINDS = ("number", "choice", "calculation")
READ = "id question_id question answer answerKey kind options choices instruction subject category".split()
CONTEXT = re.compile("passage|context|article|paragraph|story|premise|documents?|images?|figure|table")
OPTION = re.compile(  # and GOLD: names of other data sets, by their letters and digits
    "[a-j]|(options?|choices?|opt|op|sol|ending|distractor|candidate|alternative|answer)([a-j]|[0-9]{1,2})|mc[12]targets"
    "|options|choices|endings|distractors|candidates|alternatives|(incorrect|wrong)(answer|option|choice)s?[0-9]?"
)
GOLD = re.compile(
    "answer(s|id|idx|index|key|text|letter)?|(correct|right|final|expected)(answer|option|choice|index|idx)?s?"
    "|gold(en|answer|label)?|labels?|targets?|cop|solution|groundtruth|references?"
)


def _question(row: dict, default_id: str, fillers: bool) -> Question:
    def given(*keys: str, default: object = None) -> object:
        return next((row[key] for key in keys if row.get(key) is not None), default)

    options, answer = _choices(row, given("options", "choices", default=[]))
    kind = given("kind", default="choice" if options else "number")
    instruction, subject = given("instruction", default=""), given("subject", "category", default="")
    require(row["question"].strip() != "", "'question' is empty")
    require(kind in KINDS, f"kind '{kind}' is neither {', '.join(KINDS[:-1])} nor {KINDS[-1]}")
    require(isinstance(instruction, str) and isinstance(subject, str), "'instruction' and 'subject' must be texts")
    for key in [key for key in row if key not in READ and row[key] not in (None, "", [], {})]:
        name = re.sub(r"[\W_]", "", key).casefold()
        needed = CONTEXT.fullmatch(name) or (not options and OPTION.fullmatch(name))
        needed = needed or (answer is None and GOLD.fullmatch(name))
        require(not needed, f"'{key}' is not read, and the question may need it; what is read: {', '.join(READ)}")
    while fillers and options and options[-1] == "N/A":
        options = options[:-1]
    require(len(options) <= 10, f"{len(options)} options; answers are read as A to J, so ten are the most")
    key, gold = str(given("id", "question_id", default=default_id)), _gold(answer, kind, len(options))
    return Question(key, row["question"], gold, kind, tuple(options), instruction, subject)


def _choices(row: dict, options: object) -> tuple[list[str], object]:
    """The texts of a row's options, and its answer: a letter where the row has a label (ARC) or an index (MMLU)."""
    name = "options" if row.get("options") else "choices"
    answer, key = row.get("answer"), None if row.get("answerKey") == "" else row.get("answerKey")
    labels = [chr(65 + i) for i in range(len(options))] if isinstance(options, list) else []
    if isinstance(options, dict) and options.keys() == {"text", "label"}:  # ARC
        options, labels, key = options["text"], options["label"], answer if key is None else key
    require(isinstance(options, list) and all(isinstance(x, str) for x in options), f"'{name}' must be a list of texts")
    require(not (row.get("options") and row.get("choices")), "'options' and 'choices' are two sets of options")
    if key is not None:
        known = isinstance(labels, list) and len(labels) == len(options) and labels.count(str(key)) == 1
        require(known, f"the answer {key!r} is not one of the labels {labels}")
        return options, chr(65 + labels.index(str(key)))
    if type(answer) is int and name == "choices" and options:
        require(0 <= answer < len(options), f"the index {answer} is beyond the {len(options)} choices: 0 is the first")
        return options, chr(65 + answer)
    return options, answer


def _gold(answer: object, kind: str, options: int) -> str | None:
    """The gold answer in canonical form, None if the row has none."""
    if answer is None:
        return None
    last = str(answer).rpartition("####")[2]  # GSM8K's gold is a worked solution
    gold = canonical(last, kind) or extract_answer(str(answer), kind)
    require(gold is not None, f"the gold answer {str(answer)[:60]!r} holds no {kind}")
    beyond = kind == "choice" and options and ord(gold) - 65 >= options
    require(not beyond, f"the gold answer {gold} is beyond the {options} options")
    return gold
