"""Text and tokens: questions and their answers, the tokenizer and its chat template, padded batches, JSONL files.

    python data.py --questions gsm8k --out runs/mine/0_questions --train 2000   # one folder of disjoint splits

Every stage reads the question files that this script writes, so all of them ask the same text. The final answer in a
text is found by one function, `extract_answer`, for the vote, the reward and the score alike.

Shapes: B sequences, T tokens. Padding is on the right and is known from masks, never from token ids.
"""

import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import runtime
from answers import canonical, extract_answer, is_correct  # noqa: F401  all that is about text can be had from here
from arith import arith_problems
from chat import Tokenizer  # noqa: F401

# ---- files ---------------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path, required: Iterable[str] = ()) -> Iterator[dict]:
    """Yield the objects of a JSONL file. Raises ValueError naming file, line and fault; an empty line is skipped."""
    return (row for _, row in numbered_jsonl(path, required))


def numbered_jsonl(path: str | Path, required: Iterable[str] = ()) -> Iterator[tuple[int, dict]]:
    """The same with each object's line number, for faults that only the caller can see."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not text:
                continue
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: an object {{...}} is expected, this is a {type(row).__name__}"
                )
            for key in required:
                if key not in row:
                    raise ValueError(f"{path}, line {number}: the key '{key}' is missing")
            yield number, row


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one object a line under a temporary name, then rename: a reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary.replace(path)


# ---- questions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One question. `answer` is the gold answer, for reports only: no training stage may look at it."""

    id: str
    question: str
    answer: str | None = None
    kind: str = "number"  # how its answer is read: 'number' (GSM8K) or 'choice' (a letter, MMLU-Pro)
    options: tuple[str, ...] = ()
    instruction: str = ""  # follows the question in the prompt

    @property
    def prompt(self) -> str:
        """The user's turn: question, lettered options, instruction."""
        lines = [
            self.question,
            *(f"{chr(65 + i)}. {option}" for i, option in enumerate(self.options)),
            self.instruction,
        ]
        return "\n".join(line for line in lines if line)


def load_questions(spec: str, limit: int | None = None) -> list[Question]:
    """Questions of 'arith:SPLIT' (built in), 'gsm8k:SPLIT' (files in $DATA_DIR/gsm8k), or the path of a JSONL.

    A JSONL row is {"question", "answer"?} and may carry id, kind, options, instruction. Raises ValueError or
    FileNotFoundError with one sentence; an empty set is an error.
    """
    name, _, split = str(spec).partition(":")
    if name == "arith":
        return arith_questions(split, 1000 if limit is None else limit)
    if name == "gsm8k":
        path = Path(os.environ.get("DATA_DIR", "data")) / "gsm8k" / f"{split}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: set DATA_DIR to the folder that holds gsm8k/train.jsonl and "
                "gsm8k/test.jsonl (github.com/openai/grade-school-math)"
            )
    else:
        path = Path(spec)
        if not path.is_file():
            raise FileNotFoundError(
                f"no question set '{spec}': it is neither arith:train|valid|test|hard, "
                "gsm8k:train|test, nor the path of a JSONL file"
            )
    questions, lines = [], {}
    for number, row in numbered_jsonl(path, required=["question"]):
        question = _question(row, f"{path}, line {number}", default_id=f"{path.stem}-{number}")
        if question.id in lines:
            raise ValueError(f"{path}: lines {lines[question.id]} and {number} have the same id '{question.id}'")
        lines[question.id] = number
        questions.append(question)
        if limit is not None and len(questions) == limit:
            break
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def _question(row: dict, where: str, default_id: str) -> Question:
    text, answer, kind = row["question"], row.get("answer"), row.get("kind", "number")
    options = row.get("options") or []
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: 'question' must be a text that is not empty")
    if kind not in ("number", "choice"):
        raise ValueError(f"{where}: kind '{kind}' is neither 'number' nor 'choice'")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"{where}: 'options' must be a list of texts")
    if answer is not None:
        last = str(answer).rpartition("####")[2]  # GSM8K's gold is a worked solution
        gold = canonical(last, kind) or extract_answer(str(answer), kind)
        if gold is None:
            raise ValueError(f"{where}: the gold answer {str(answer)[:60]!r} holds no {kind}")
        answer = gold
    return Question(
        str(row.get("id", default_id)), text.strip(), answer, kind, tuple(options), str(row.get("instruction", ""))
    )


def arith_questions(split: str, n: int) -> list[Question]:
    """The first n built-in word problems of a split (arith.py) as questions with their gold answers."""
    problems = arith_problems(split)
    return [Question(f"arith-{split}-{i}", p.text, str(p.values[-1])) for i, p in zip(range(n), problems)]


# ---- batches ---------------------------------------------------------------------------------------------------------


def collate(prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pad prompt + response rows: tokens (B, T), mask (B, T-1), lengths (B,).

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
    return tokens, mask, lengths


def batches(lengths: list[int], size: int, rng: torch.Generator) -> Iterator[list[int]]:
    """One epoch of random index batches, every index once, each batch sorted by length.

    So the micro-batches that a batch is cut into are of even length and hold little padding, while the optimiser step
    stays a fair sample: batches of one length would each be of one kind of answer, and pull the model to and fro.
    """
    order = torch.randperm(len(lengths), generator=rng).tolist()
    for i in range(0, len(order), size):
        yield sorted(order[i : i + size], key=lengths.__getitem__)


# ---- the script: one folder of disjoint splits ---------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Write train, valid and test questions of a set, disjoint, as every later stage will ask them."""

    questions: str  # arith, gsm8k, or a JSONL file to be split
    out: str  # folder to write
    train: int = 2000  # questions the student may learn from (their gold answers are for reports only)
    valid: int = 200  # held out of training, for choosing and stopping
    test: int = 1000  # held out of everything
    instruction: str = ""  # follows every question
    seed: int = 0  # shuffles a file before it is split


def main(cfg: Config) -> None:
    stage = runtime.Stage(cfg, inputs=["questions"] if Path(cfg.questions).is_file() else [])
    if stage.finished:
        return
    counts = {"train": cfg.train, "valid": cfg.valid, "test": cfg.test}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name} {count}: at least one question is needed")
    if cfg.questions == "arith":
        splits = {name: load_questions(f"arith:{name}", count) for name, count in counts.items()}
        splits["hard"] = load_questions("arith:hard", cfg.test)
    elif cfg.questions == "gsm8k":
        pool = _shuffled(load_questions("gsm8k:train"), cfg.seed)
        splits = _cut(pool, {"train": cfg.train, "valid": cfg.valid}, cfg.questions)
        splits["test"] = load_questions("gsm8k:test", cfg.test)
    else:
        splits = _cut(_shuffled(load_questions(cfg.questions), cfg.seed), counts, cfg.questions)
    owner = {}
    for name, questions in splits.items():
        for question in questions:
            if owner.setdefault(question.question, name) != name:
                raise ValueError(
                    f"{cfg.questions}: the question '{question.id}' is in {name} and in "
                    f"{owner[question.question]}: {question.question[:60]!r}"
                )
        rows = [asdict(question) | {"instruction": cfg.instruction} for question in questions]
        write_jsonl(stage.out / f"{name}.jsonl", rows)
    summary = ", ".join(f"{len(questions)} {name}" for name, questions in splits.items())
    print(f"{summary} questions, e.g. {splits['train'][0].question!r}")
    stage.finish()


def _shuffled(questions: list[Question], seed: int) -> list[Question]:
    unique = list({question.question: question for question in questions}.values())
    random.Random(seed).shuffle(unique)
    return unique


def _cut(pool: list[Question], counts: dict[str, int], name: str) -> dict[str, list[Question]]:
    if sum(counts.values()) > len(pool):
        wanted = " + ".join(f"--{split} {count}" for split, count in counts.items())
        raise ValueError(f"{name} holds {len(pool)} different questions, fewer than {wanted}")
    stream = iter(pool)
    return {split: [next(stream) for _ in range(count)] for split, count in counts.items()}


if __name__ == "__main__":
    runtime.launch(main, Config)
