"""Questions and how they are asked, padded batches, JSONL files.

    python data.py --questions gsm8k --out runs/mine/0_questions --train 2000   # one folder of disjoint splits
    python data.py fetch gsm8k                                                  # the published files, into $DATA_DIR
    python data.py check my/train.jsonl my/test.jsonl                           # faults, duplicates, leaks, lengths

Every stage reads the question files that this script writes, so all of them ask the same text.

Shapes: B sequences, T tokens. Padding is on the right and is known from masks, never from token ids.
"""

import hashlib
import http.client
import os
import random
import statistics
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import runtime
from answers import canonical, extract_answer, is_correct  # noqa: F401  all that is about text can be had from here
from hf.tokenizer import Tokenizer
from runtime.files import numbered_jsonl, read_jsonl, refuse, write_jsonl
from runtime.flags import Count, Input
from tasks.arith import arith_problems

# ---- questions -----------------------------------------------------------------------------------------------------

SPLITS = {"gsm8k": ("train", "test"), "mmlu_pro": ("train", "valid", "test", "all")}
HOW_TO_GET = {
    "gsm8k": "'python data.py fetch gsm8k' gets it",
    "mmlu_pro": "download test and validation of the data set TIGER-Lab/MMLU-Pro (Hugging Face) and turn each into "
    "JSONL with pandas.read_parquet('test-00000-of-00001.parquet').to_json('test.jsonl', orient='records', lines=True)",
}


INSTRUCTIONS = {  # forms that the strict reading knows, asked for in words that instruction-tuned models follow
    "number": "Think step by step. On the last line write #### and the final number.",
    "choice": 'Think step by step and then finish your answer with "the answer is (X)" where X is the correct letter.',
}


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
        lines = [self.question.strip(), *_lettered(self.options), self.instruction]
        return "\n".join(line for line in lines if line)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two questions the same: text and options, whatever their order, case and spaces."""
        return _plain(self.question), *sorted(map(_plain, self.options))


def _lettered(options: Iterable[str]) -> list[str]:
    return [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def load_questions(spec: str, limit: int | None = None) -> list[Question]:
    """Questions of 'arith:SPLIT' (built in), 'gsm8k:SPLIT' or 'mmlu_pro:SPLIT' (in $DATA_DIR), or a .jsonl[.gz] path.

    MMLU-Pro has no training set, so its test set is split by a hash of each question's text (`hash_split`: 70 % train,
    5 % valid, 25 % test); 'mmlu_pro:all' is the published 12,032, for comparison with published scores.
    A row of one's own is {"question", "answer"?} and may carry id (or question_id), kind, options (kind is then
    'choice'), instruction, subject (or category). Raises ValueError or FileNotFoundError with one sentence; an empty
    set is an error, and so is a file of two kinds.
    """
    name, _, split = str(spec).partition(":")
    if name == "arith":
        return arith_questions(split, 1000 if limit is None else limit)
    if name in SPLITS:
        if split not in SPLITS[name]:
            raise ValueError(f"no question set '{spec}': the splits of {name} are {', '.join(SPLITS[name])}")
        path = _published(name, split if name == "gsm8k" else "test")
    else:
        path = Path(spec)
        if not path.is_file():
            raise FileNotFoundError(
                f"no question set '{spec}': it is neither arith:train|valid|test|hard, gsm8k:train|test, "
                "mmlu_pro:train|valid|test|all, nor the path of a JSONL file"
            )
    questions = []
    for _, question in numbered_questions(path, fillers=name == "mmlu_pro"):
        if name == "mmlu_pro" and split not in ("all", hash_split(question)):
            continue
        questions.append(question)
        if limit is not None and len(questions) == limit:
            break
    if not questions:
        raise ValueError(f"{path} holds no question{f' of the split {split}' if name in SPLITS else ''}")
    return questions


def hash_split(question: Question) -> str:
    """'train' (70 %), 'valid' (5 %) or 'test' (25 %): SHA-256 of the question's key modulo 100.

    Neither id nor place in the file counts, so a question keeps its split in every release, and so does a copy of it.
    """
    number = int(hashlib.sha256("\n".join(question.key).encode()).hexdigest(), 16) % 100
    return "train" if number < 70 else "valid" if number < 75 else "test"


def _published(name: str, split: str) -> Path:
    folder = Path(os.environ.get("DATA_DIR", "data")) / name
    for path in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder / split}.jsonl not found: set DATA_DIR to the folder that holds {name}/; {HOW_TO_GET[name]}"
    )


def numbered_questions(
    path: Path, fillers: bool = False, faults: list[str] | None = None
) -> Iterator[tuple[int, Question]]:
    """The questions of a file with their line numbers. Given a list of `faults`, note a bad line there and go on.

    `fillers`: some releases of MMLU-Pro fill up to ten options with 'N/A'; these go, from the end alone, since one
    before a real option holds a letter's place.
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

    text, answer, options = given("question"), given("answer"), given("options", default=[])
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
    if answer is not None:
        last = str(answer).rpartition("####")[2]  # GSM8K's gold is a worked solution
        gold = canonical(last, kind) or extract_answer(str(answer), kind)
        if gold is None:
            raise ValueError(f"the gold answer {str(answer)[:60]!r} holds no {kind}")
        if kind == "choice" and options and ord(gold) - 65 >= len(options):
            raise ValueError(f"the gold answer {gold} is beyond the {len(options)} options")
        answer = gold
    return Question(
        id=str(given("id", "question_id", default=default_id)),
        question=text,
        answer=answer,
        kind=kind,
        options=tuple(options),
        instruction=str(given("instruction", default="")),
        subject=str(given("subject", "category", default="")),
    )


def arith_questions(split: str, n: int) -> list[Question]:
    """The first n built-in word problems of a split (arith.py) as questions with their gold answers."""
    problems = arith_problems(split)
    return [Question(f"arith-{split}-{i}", p.text, str(p.values[-1])) for i, p in zip(range(n), problems)]


# ---- worked examples: the completion prompts of published scores ---------------------------------------------------

STOP_TEXT = {"number": "Q:", "choice": "Question:"}  # here a model begins a question of its own
GSM8K_EXAMPLES = Path(__file__).with_name("prompts") / "gsm8k_cot_8shot.txt"
MMLU_PRO_INTRO = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then finish "
    'your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n'
)


def few_shot_prompt(question: Question, shots: int) -> str:
    """A completion prompt of `shots` worked examples and the question, word for word that of published scores.

    Numbers: the chain-of-thought examples of Wei et al. 2022 as lm-evaluation-harness asks them (gsm8k_cot, 8 shots).
    Choices: the first examples of the same subject in MMLU-Pro's validation set, in the format of its authors' script
    (5 shots; lm-evaluation-harness differs by two empty lines after the introduction). The question's instruction is
    left out. Raises ValueError if there are fewer examples. The answer ends before STOP_TEXT[question.kind].
    """
    if question.kind == "number":
        blocks = GSM8K_EXAMPLES.read_text(encoding="utf-8").strip().split("\n\n")
        source, intro, ask = GSM8K_EXAMPLES.name, "", f"Q: {question.question}\nA:"
        examples = [block + "\n\n" for block in blocks if block.startswith("Q: ")]
    else:
        path = _published("mmlu_pro", "validation")
        source, intro = f"{path}, subject '{question.subject}'", MMLU_PRO_INTRO.format(subject=question.subject)
        examples, ask = _mmlu_pro_examples(path).get(question.subject, []), _mmlu_pro_block(question)
    if shots > len(examples):
        raise ValueError(f"--shots {shots}: question '{question.id}' has only {len(examples)} examples ({source})")
    return "".join([intro, *examples[:shots], ask])


@lru_cache(maxsize=1)
def _mmlu_pro_examples(path: Path) -> dict[str, list[str]]:
    """Worked examples by subject, in the order of the file."""
    examples: dict[str, list[str]] = {}
    rows = read_jsonl(path, required=["cot_content"])
    for (_, question), row in zip(numbered_questions(path, fillers=True), rows):
        thought = str(row["cot_content"]).removeprefix("A: Let's think step by step.")
        examples.setdefault(question.subject, []).append(_mmlu_pro_block(question) + thought + "\n\n")
    return examples


def _mmlu_pro_block(question: Question) -> str:
    lines = ["Question:", question.question, "Options:", *_lettered(question.options)]
    return "\n".join([*lines, "Answer: Let's think step by step."])


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


@dataclass(frozen=True)
class Config:
    """Write train, valid and test questions of a set, disjoint, as every later stage will ask them.

    Two more commands, each with a --help of its own: 'data.py check FILE ...' and 'data.py fetch gsm8k'.
    """

    questions: Input  # arith, gsm8k, mmlu_pro, or a JSONL file to be split
    out: str  # folder to write
    train: Count = 2000  # questions the student may learn from (their gold answers are for reports only)
    valid: Count = 200  # held out of training, for choosing and stopping
    test: Count = 1000  # held out of everything
    instruction: str = ""  # follows every question that has none of its own; auto: what suits its kind
    seed: int = 0  # shuffles a set before its first questions are taken


@runtime.stage
def main(cfg: Config, stage: runtime.Stage) -> None:
    counts = {"train": cfg.train, "valid": cfg.valid, "test": cfg.test}
    if cfg.questions == "arith":
        splits = {name: load_questions(f"arith:{name}", count) for name, count in counts.items()}
        splits["hard"] = load_questions("arith:hard", cfg.test)
    elif cfg.questions == "gsm8k":
        pool = _shuffled(load_questions("gsm8k:train"), cfg.seed)
        splits = _cut(pool, {"train": cfg.train, "valid": cfg.valid}, cfg.questions)
        splits["test"] = load_questions("gsm8k:test", cfg.test)
    elif cfg.questions == "mmlu_pro":  # shuffled, for the file is sorted by subject
        splits = {}
        for name, count in counts.items():
            spec = f"mmlu_pro:{name}"
            splits |= _cut(_shuffled(load_questions(spec), cfg.seed), {name: count}, spec)
    else:
        splits = _cut(_shuffled(load_questions(cfg.questions), cfg.seed), counts, cfg.questions)
    owner = {}
    for name, questions in splits.items():
        for question in questions:
            if owner.setdefault(question.key, name) != name:
                raise ValueError(
                    f"{cfg.questions}: the question '{question.id}' is in {name} and in "
                    f"{owner[question.key]}: {question.question[:60]!r}"
                )
        asked = [INSTRUCTIONS[q.kind] if cfg.instruction == "auto" else cfg.instruction for q in questions]
        rows = [asdict(q) | {"instruction": q.instruction or text} for q, text in zip(questions, asked)]
        write_jsonl(stage.out / f"{name}.jsonl", rows)
    summary = ", ".join(f"{len(questions)} {name}" for name, questions in splits.items())
    print(f"{summary} questions, e.g. {splits['train'][0].question!r}")
    stage.finish()


def _shuffled(questions: list[Question], seed: int) -> list[Question]:
    unique = list({question.key: question for question in questions}.values())
    random.Random(seed).shuffle(unique)
    return unique


def _cut(pool: list[Question], counts: dict[str, int], name: str) -> dict[str, list[Question]]:
    if sum(counts.values()) > len(pool):
        wanted = " + ".join(f"--{split} {count}" for split, count in counts.items())
        raise ValueError(f"{name} holds {len(pool)} different questions, fewer than {wanted}")
    stream = iter(pool)
    return {split: [next(stream) for _ in range(count)] for split, count in counts.items()}


# ---- data.py check: what is wrong with question files, and what is in them -----------------------------------------


@dataclass(frozen=True)
class CheckConfig:
    """Check question files: every line, ids, copies within a file, copies in two files (leaks), lengths."""

    files: tuple[str, ...]  # question files; a question that is in two of them is a leak
    tokenizer: str = ""  # model folder: lengths in tokens of the chat prompt too
    max_tokens: int = 0  # count the prompts that are longer


def check(cfg: CheckConfig) -> None:
    """Print a report. Faults and leaks are errors, raised as one ValueError at the end; copies, clashes are notes."""
    runtime.require(cfg.max_tokens >= 0, f"--max_tokens {cfg.max_tokens}: 0 or more")
    runtime.require(not cfg.max_tokens or bool(cfg.tokenizer), "--max_tokens counts tokens of a --tokenizer FOLDER")
    tokenizer = Tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    first_of_key, first_of_id, errors = {}, {}, []  # question -> (file, line); id -> (file, line, question)
    for path in map(Path, cfg.files):
        faults, leaks, notes = [], [], []
        rows = list(numbered_questions(path, faults=faults))
        if not rows and not faults:
            faults.append(f"{path} holds no question")
        for number, question in rows:
            here = path, number
            there = first_of_key.setdefault(question.key, here)
            if there[0] != path:
                leaks.append(f"{path}, line {number}: the same question as {there[0]}, line {there[1]}")
            elif there != here:
                notes.append(f"line {number} repeats the question of line {there[1]}")
            other, line, key = first_of_id.setdefault(question.id, (*here, question.key))
            if other != path and key != question.key:
                notes.append(f"line {number}: id '{question.id}' is another question's in {other}, line {line}")
        kinds = Counter(question.kind for _, question in rows)
        golds = sum(question.answer is not None for _, question in rows)
        print(f"{path}: {len(rows)} questions ({', '.join(kinds) or 'none'}), {golds} with a gold answer")
        prompts = [question.prompt for _, question in rows]
        _print_lengths("characters", list(map(len, prompts)))
        if tokenizer:
            lengths = [len(tokenizer.chat(prompt)) for prompt in prompts]
            _print_lengths("tokens of the chat prompt", lengths)
            if cfg.max_tokens:
                print(f"  {sum(n > cfg.max_tokens for n in lengths)} are longer than {cfg.max_tokens} tokens")
        for label, found in (("error", faults), ("leak", leaks), ("note", notes)):
            for text in found[:10]:
                print(f"  {label}: {text}")
            if len(found) > 10:
                print(f"  {label}: and {len(found) - 10} more")
        errors += faults + leaks
    if errors:
        raise ValueError(f"{len(errors)} error{'s' * (len(errors) > 1)} in the files; the first: {errors[0]}")
    print("fine: no error, no leak")


def _print_lengths(unit: str, lengths: list[int]) -> None:
    if lengths:
        print(f"  {unit}: min {min(lengths)}, median {statistics.median(lengths):g}, max {max(lengths)}")


# ---- data.py fetch: published files --------------------------------------------------------------------------------

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
GSM8K_SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


@dataclass(frozen=True)
class FetchConfig:
    """Download a published question set: gsm8k. What is cut off continues on the next call."""

    sets: tuple[str, ...]  # gsm8k
    to: str = ""  # folder that will hold gsm8k/; default: $DATA_DIR, else data


def fetch(cfg: FetchConfig) -> None:
    """Every file of a set into its folder, checked by SHA-256; what is there and whole is left alone."""
    for name in cfg.sets:
        runtime.require(name == "gsm8k", f"fetch {name}: only gsm8k can be fetched; {HOW_TO_GET['mmlu_pro']}")
    folder = Path(cfg.to or os.environ.get("DATA_DIR", "data"))
    for file, digest in GSM8K_SHA256.items():
        path = folder / "gsm8k" / file
        if _sha256(path) == digest:
            print(f"{path}: there already")
        else:
            _download(f"{GSM8K_URL}/{file}", path, digest)
            print(f"{path}: fetched, {path.stat().st_size:,} bytes, checksum right")
    print(f"DATA_DIR={folder} is the setting for 'gsm8k:train' and 'gsm8k:test'")


def _download(url: str, path: Path, digest: str, timeout: float = 30) -> None:
    """url to path by way of path.part, which a later call continues; OSError says what to do without a network."""
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    by_hand = f"fetch {url} by hand and put it at {path}"
    if _sha256(part) != digest:
        have = part.stat().st_size if part.is_file() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                have = have if response.status == 206 else 0  # 200: a server that knows no ranges sends all
                total = have + int(response.headers.get("Content-Length") or 0)
                with part.open("ab" if have else "wb") as file:
                    while block := response.read(1 << 16):
                        file.write(block)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing follows what is there, and yet it is not the file
                part.unlink(missing_ok=True)
            raise OSError(f"{url}: HTTP {error.code} {error.reason}; try again, or {by_hand}") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise OSError(f"{url}: no whole answer ({reason}); call again to continue, or {by_hand}") from None
        have = part.stat().st_size
        if have < total:
            raise OSError(f"{url}: cut off at {have} of {total} bytes; call again to continue, or {by_hand}")
        if (found := _sha256(part)) != digest:
            part.unlink()
            raise ValueError(f"{url}: SHA-256 is {found} and not {digest}: not the published file, deleted; {by_hand}")
    part.replace(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


if __name__ == "__main__":
    commands = {"check": (check, CheckConfig), "fetch": (fetch, FetchConfig)}
    if sys.argv[1:] and sys.argv[1] in commands:
        runtime.launch(*commands[sys.argv[1]], sys.argv[2:])
    else:
        runtime.launch(main, Config)
