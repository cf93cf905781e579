"""The published sets: where their files are, our splits, the worked examples of published scores, fetching."""

from __future__ import annotations

import csv
import hashlib
import http.client
import json
import os
import re
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from runtime.files import read_jsonl, replacing, sha256, write_jsonl
from runtime.flags import require
from tasks.question import Question, lettered, numbered_questions

HASHED = ("train", "valid", "test", "all")  # a set without a split of its own: `hash_split` makes one
SPLITS = {"gsm8k": ("train", "test"), "mmlu_pro": HASHED, "mawps": HASHED, "svamp": ("test",)}
HOW_TO_GET = {
    "gsm8k": "'python data.py fetch gsm8k' gets it",
    "svamp": "'python data.py fetch svamp' gets it",
    "mmlu_pro": "download test and validation of the data set TIGER-Lab/MMLU-Pro (Hugging Face) and turn each into "
    "JSONL with pandas.read_parquet('test-00000-of-00001.parquet').to_json('test.jsonl', orient='records', lines=True)",
}


def path_of(name: str, split: str) -> Path:
    """The file of a published set: $DATA_DIR/gsm8k/test.jsonl or .jsonl.gz. FileNotFoundError says how to get it.

    MAWPS is SVAMP's training set, and SVAMP's authors publish it.
    """
    if name == "mawps":
        name, split = "svamp", "train"
    elif SPLITS[name] == HASHED and split in HASHED:
        split = "test"
    folder = Path(os.environ.get("DATA_DIR", "data")) / name
    for path in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder / split}.jsonl not found: set DATA_DIR to the folder that holds {name}/; {HOW_TO_GET[name]}"
    )


def hash_split(question: Question, template: bool = False) -> str:
    """'train' (70 %), 'valid' (5 %) or 'test' (25 %): SHA-256 of the question's key modulo 100.

    Neither id nor place in the file counts, so a question keeps its split in every release, and so does a copy of it.
    `template`: only which words there are that begin with a small letter counts, so that 'Sam has 3 dogs.' and 'Joan
    has 5 dogs.' are in one split. MAWPS asks a third of its questions several times, with other numbers and names.
    """
    words = sorted(set(re.findall(r"\b[a-z]+", question.question))) if template else question.key
    number = int(hashlib.sha256("\n".join(words).encode()).hexdigest(), 16) % 100
    return "train" if number < 70 else "valid" if number < 75 else "test"


# ---- worked examples: the completion prompts of published scores ---------------------------------------------------

STOP_TEXT = {"number": "Q:", "calculation": "Q:", "choice": "Question:"}  # here a model begins a question of its own
GSM8K_EXAMPLES = Path(__file__).with_name("gsm8k_cot_8shot.txt")
MMLU_PRO_INTRO = (
    "The following are multiple choice questions (with answers) about {subject}. Think step by step and then finish "
    'your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n'
)


def few_shot_prompt(question: Question, shots: int) -> str:
    """A completion prompt of `shots` worked examples and the question, word for word that of published scores.

    Numbers: the chain-of-thought examples of Wei et al. 2022 as lm-evaluation-harness asks them (gsm8k_cot, 8 shots).
    Choices: the first examples of the same subject in MMLU-Pro's validation set, in the format of its authors' script.
    The question's instruction is left out. ValueError: fewer examples. An answer ends before STOP_TEXT[question.kind].
    """
    if question.kind != "choice":
        blocks = GSM8K_EXAMPLES.read_text(encoding="utf-8").strip().split("\n\n")
        source, intro, ask = GSM8K_EXAMPLES.name, "", f"Q: {question.question}\nA:"
        examples = [block + "\n\n" for block in blocks if block.startswith("Q: ")]
    else:
        path = path_of("mmlu_pro", "validation")
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
        thought = row["cot_content"].removeprefix("A: Let's think step by step.")
        examples.setdefault(question.subject, []).append(_mmlu_pro_block(question) + thought + "\n\n")
    return examples


def _mmlu_pro_block(question: Question) -> str:
    lines = ["Question:", question.question, "Options:", *lettered(question.options)]
    return "\n".join([*lines, "Answer: Let's think step by step."])


# ---- data.py fetch -------------------------------------------------------------------------------------------------

GITHUB = "https://raw.githubusercontent.com"
PUBLISHED = {  # set: (where its files are, {file: its SHA-256})
    "gsm8k": (
        f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data",
        {
            "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        },
    ),
    "svamp": (
        f"{GITHUB}/arkilpatel/SVAMP/main",
        {
            "SVAMP.json": "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
            "data/cv_mawps/fold0/train.csv": "0674253e6099813cefbb1d6eae3d2dc784ab6ebfdaf8755f6ebb4b99fc1f6ebe",
            "data/cv_mawps/fold0/dev.csv": "bad59cff796b01a87363ea970f1fa80c15f56ff5f4388143aadbdc3feaf5f990",
        },
    ),
}
TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class FetchConfig:
    """Download published question sets: gsm8k, svamp (with MAWPS)."""

    sets: tuple[str, ...]  # gsm8k, svamp; into folders of $DATA_DIR, else of data


def fetch(cfg: FetchConfig) -> None:
    """Every file of a set into its folder, checked by SHA-256; what is there and whole is left alone."""
    known = set(cfg.sets) <= set(PUBLISHED)
    require(known, f"fetch {' '.join(cfg.sets)}: only {' and '.join(PUBLISHED)}; {HOW_TO_GET['mmlu_pro']}")
    folder = Path(os.environ.get("DATA_DIR", "data"))
    for name in cfg.sets:
        url, files = PUBLISHED[name]
        for file, digest in files.items():
            path = folder / name / file
            if not path.is_file() or sha256(path) != digest:
                _download(f"{url}/{file}", path, digest)
            print(f"{path}: {path.stat().st_size:,} bytes, checksum right")
        if name == "svamp":
            _convert_svamp(folder / name)
    sets = {"gsm8k": "'gsm8k'", "svamp": "'mawps' and 'svamp:test'"}
    print(f"DATA_DIR={folder} is the setting for {', '.join(sets[name] for name in cfg.sets)}")


def _convert_svamp(folder: Path) -> None:
    """SVAMP's and MAWPS's published files to test.jsonl and train.jsonl, the numbers of MAWPS in their places."""
    rows = []
    for row in json.loads((folder / "SVAMP.json").read_text(encoding="utf-8")):
        body = row["Body"].strip()
        text = f"{body if body.endswith('.') else body + '.'} {row['Question'].strip()}"
        rows.append({"id": row["ID"], "question": text, "answer": _whole(str(row["Answer"]))})
    write_jsonl(folder / "test.jsonl", rows)
    golds = {}  # question -> answer: a text may be there twice
    for name in ("train", "dev"):  # one of five ways to cut the whole set in two
        with (folder / f"data/cv_mawps/fold0/{name}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers = [_whole(number) for number in row["Numbers"].split()]
                text = re.sub(r"number(\d+)", lambda place, numbers=numbers: numbers[int(place[1])], row["Question"])
                text = re.sub(r" (?=[.,?!;:]|'s)|(?<=\$) ", "", text).strip()  # its words and signs stand apart
                golds.setdefault(text, _whole(row["Answer"]))
    rows = [{"id": f"mawps-{i}", "question": text, "answer": gold} for i, (text, gold) in enumerate(golds.items())]
    write_jsonl(folder / "train.jsonl", rows)


def _whole(number: str) -> str:
    return number.removesuffix(".0")


def _download(url: str, path: Path, digest: str) -> None:
    """url to path, all of it or nothing. OSError or ValueError (not the published file) says what to do."""
    by_hand = f"try again, or fetch {url} by hand and put it at {path}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # no network, no answer, an error, cut off
        raise OSError(f"{url}: {error}; {by_hand}") from None
    found = hashlib.sha256(content).hexdigest()
    require(found == digest, f"{url}: SHA-256 is {found} and not {digest}, that of the published file; {by_hand}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        file.write(content)
