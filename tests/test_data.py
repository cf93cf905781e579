"""data.py and tasks/: question sets and how they are asked, check and fetch, the built-in task, padded batches."""

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import re
import runpy
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import real_data

import data
import runtime
from data import Question, collate, load_questions, read_jsonl, write_jsonl
from runtime.files import numbered_jsonl
from runtime.steps import micro_batches, rows_of_step
from tasks import arith, published
from tasks.arith import SPLITS, arith_problems
from tasks.check import CheckConfig, check
from tasks.published import FetchConfig, fetch, few_shot_prompt, hash_split

# ---- question files ------------------------------------------------------------------------------------------------


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


GOOD = '{"question": "3+4?", "answer": "7"}'


def test_a_users_own_file_loads(tmp_path):
    """question and answer suffice, the rest is kept, the gold is canonical; BOM, line ends, empty lines do no harm."""
    path = write(tmp_path / "mine.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), "\r", '{"question": " Große Frage? "}',
                 '{"id": 5, "question": "How many?", "kind": "number", "instruction": "Name a number.", '
                 '"subject": "s"}',
                 '{"id": null, "question": "q", "answer": "A: 3\\nso the answer is 15 gallons * 8\\n#### $1,002.0"}',
                 '{"question": "r", "answer": 12, "extra": 1}')
    a, b, c, d, e = load_questions(str(path))
    assert (a.id, a.question, a.answer, a.kind) == ("mine-1", "3+4?", "7", "number")
    assert (b.question, b.prompt, b.answer, b.subject) == (" Große Frage? ", "Große Frage?", None, "")
    assert (c.id, c.answer, c.subject, c.prompt) == ("5", None, "s", "How many?\nName a number.")
    assert (d.id, d.answer, e.answer) == ("mine-5", "1002", "12")
    assert load_questions(str(path), limit=2) == [a, b]


def test_a_users_own_choices_load(tmp_path):
    """Options make a choice; question_id and category count where id and subject are not given; .gz is read too."""
    lines = ['{"question_id": 7, "question": "Which?", "answer": "(b)", "options": ["x", "N/A"], "category": "law"}',
             '{"id": "a", "question_id": 8, "question": "Which?", "options": ["x", "z"], "subject": "art", '
             '"category": "law", "instruction": "Name a letter."}',
             '{"question": "A or B?", "kind": "choice", "answer": "J", "options": null}']
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    a, b, c = load_questions(str(path))
    assert a == Question("7", "Which?", "B", "choice", ("x", "N/A"), "", "law")
    assert (b.id, b.kind, b.subject, b.answer) == ("a", "choice", "art", None)
    assert b.prompt == "Which?\nA. x\nB. z\nName a letter."
    assert (c.id, c.kind, c.answer, c.options) == ("mine-3", "choice", "J", ())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"mine\.jsonl\.gz is not a whole gzip file"):
        load_questions(str(path))


@pytest.mark.parametrize("rows, words", [
    *[([{"question": "fine"}, row], ["line 2", word]) for row, word in [
        ({"answer": "7"}, "question"), ({"question": "\u2003"}, "question"),
        ({"question": "q", "kind": "essay"}, "essay"), ({"question": "q", "answer": "seven"}, "seven"),
        ({"question": "q", "options": [1, 2]}, "options"),
        ({"question": "q", "instruction": {}}, "instruction"), ({"question": "q", "category": 1}, "subject"),
        ({"question": "q", "options": ["x", "y"]}, "a 'choice' question after 'number' ones")]],
    ([{"question": "q", "options": ["x", "y"], "answer": "C"}], ["line 1", "gold answer C", "2 options"]),
    ([{"question": "q", "options": ["o"] * 11}], ["line 1", "11 options"]),
    ([{"question_id": 3, "question": "q"}, {"id": "3", "question": "r"}], ["1 and 2", "'3'"]), ([], ["no question"])])
def test_a_bad_question_file_is_refused_with_file_and_line(rows, words, tmp_path):
    path = write(tmp_path / "bad.jsonl", *map(json.dumps, rows))
    with pytest.raises(ValueError) as error:
        load_questions(str(path))
    assert all(word in str(error.value) for word in [str(path), *words]), error.value
    assert "\n" not in str(error.value)


def arc(texts, labels, **more):
    return {"choices": {"text": texts, "label": labels}, **more}


@pytest.mark.parametrize("row, answer", [
    ({"choices": ["x", "y"], "answer": 0}, "A"), ({"choices": ["x", "y"], "answer": 1, "subject": "art"}, "B"),
    ({"choices": ["x", "y"], "answer": "B"}, "B"), ({"choices": ["x", "y"]}, None),
    (arc(["x", "y"], ["A", "B"], answerKey="B"), "B"), (arc(["x", "y"], ["1", "2"], answerKey="2"), "B"),
    (arc(["x", "y"], ["1", "2"], answerKey=1), "A"), (arc(["x", "y"], ["B", "A"], answerKey="B"), "A"),
    (arc(["x", "y"], ["B", "A"], answer="A"), "B"), (arc(["x", "y"], ["A", "B"], answerKey=""), None)])
def test_choices_of_mmlu_and_arc(row, answer, tmp_path):
    """cais/mmlu has an index from 0; ARC has labels, which may be numbers or stand in another order."""
    [question] = load_questions(str(write(tmp_path / "q.jsonl", json.dumps({"question": "Which?", **row}))))
    assert (question.kind, question.options, question.answer) == ("choice", ("x", "y"), answer)
    assert question.prompt == "Which?\nA. x\nB. y"


@pytest.mark.parametrize("row, word", [
    *[({key: "x", "answer": "7"}, key) for key in ("A", "option_b", "optionC", "choice1", "opa", "distractor1", "image",
                                                   "passage", "context", "endings", "incorrect_answers", "Options")],
    *[({key: "7"}, key) for key in ("solution", "label", "target", "correct_answer", "Answer", "answer_index", "gold")],
    ({"choices": ["x", "y"], "correct": 1}, "correct"), ({"answerKey": "B"}, "'B'"),
    ({"choices": ["x", "y"], "answerKey": 0}, "0"),
    ({"choices": ["x", "y"], "answer": 2}, "index 2"), ({"choices": ["x", "y"], "answer": -1}, "index -1"),
    ({"options": ["x", "y"], "answer": 1}, "'1'"), ({"choices": {"A": "x", "B": "y"}, "answer": "A"}, "'choices'"),
    ({"options": {"A": "x"}, "answer": "A"}, "'options'"), ({"choices": "A) x B) y", "answer": "A"}, "'choices'"),
    (arc(["x", "y"], ["A", "B"], answerKey="E"), "'E'"), (arc(["x", "y"], ["A"], answerKey="A"), "labels"),
    (arc(["x", "y"], ["A", "A"], answerKey="A"), "labels"), (arc([1, 2], ["A", "B"], answerKey="A"), "'choices'"),
    ({"options": ["x", "y"], "choices": ["x", "y"], "answer": "A"}, "'choices'"),
    ({"options": ["x", "y"], "A": "x", "answer_index": 0, "answer": "A"}, None), ({"label": "7", "answer": "7"}, None),
    ({"answer": "7", "A": "", "passage": None, "choices": [], "level": 3, "answer_type": "x"}, None)])
def test_keys_that_a_question_needs_are_read_or_refused(row, word, tmp_path):
    """Other data sets' options, passages and answers do not vanish; what repeats something, or is empty, may."""
    path = write(tmp_path / "q.jsonl", json.dumps({"question": "Which?", **row}))
    if word is None:
        assert load_questions(str(path))[0].answer == row["answer"]
    else:
        with pytest.raises(ValueError, match=r"q\.jsonl, line 1: ") as error:
            load_questions(str(path))
        assert word in str(error.value)


@pytest.mark.parametrize("spec, words", [
    *[(spec, [f"'{spec}'", "gsm8k:train|test"]) for spec in ("nowhere.jsonl", "gsm8k:dev", "mmlu_pro")],
    ("arith:exam", ["exam"]), ("gsm8k:test", ["test.jsonl", "DATA_DIR", "python data.py fetch gsm8k"]),
    ("mmlu_pro:valid", ["test.jsonl", "DATA_DIR", "TIGER-Lab/MMLU-Pro"])])
def test_a_set_that_is_not_there_is_named(spec, words, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        load_questions(spec)
    assert all(word in str(error.value) for word in words), error.value


# ---- MMLU-Pro --------------------------------------------------------------------------------------------------------


def mmlu_rows(n: int) -> list[dict]:
    """Rows as published: sorted by category, the letter and its index."""
    return [{"question_id": 70 + i, "question": f"What is {i}? ", "options": [f"{i}", f"{i + 1}", "none"],
             "answer": "BA"[i % 2], "answer_index": 1 - i % 2, "cot_content": "", "src": "x",
             "category": ["law", "math"][i >= n // 2]} for i in range(n)]


@pytest.fixture
def mmlu(tmp_path, monkeypatch):
    """mmlu(rows, shots): write $DATA_DIR/mmlu_pro/ as it is published."""

    def write_rows(rows: list[dict], shots: list[dict] = ()) -> None:
        write_jsonl(tmp_path / "data" / "mmlu_pro" / "test.jsonl", rows)
        write_jsonl(tmp_path / "data" / "mmlu_pro" / "validation.jsonl", shots)

    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return write_rows


def test_mmlu_pro_is_split_by_what_is_asked(mmlu):
    """70, 5, 25 %; every question in one split, in the file's order; ids, spaces and case do not count."""
    rows = mmlu_rows(2000)
    mmlu(rows)
    splits = {name: load_questions(f"mmlu_pro:{name}") for name in ("train", "valid", "test")}
    assert [q.id for q in load_questions("mmlu_pro:all")] == [str(row["question_id"]) for row in rows]
    assert sorted(int(q.id) for split in splits.values() for q in split) == [row["question_id"] for row in rows]
    for split, share in zip(splits.values(), (0.7, 0.05, 0.25)):
        assert abs(len(split) - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5
        assert [int(q.id) for q in split] == sorted(int(q.id) for q in split)
    assert load_questions("mmlu_pro:valid", limit=3) == splits["valid"][:3]
    mmlu([row | {"question_id": i, "question": "what  IS" + row["question"].strip()[7:]} for i, row in enumerate(rows)])
    for name, split in splits.items():
        assert [int(q.id) + 70 for q in load_questions(f"mmlu_pro:{name}")] == [int(q.id) for q in split]
    mmlu([rows[int(splits["train"][0].id) - rows[0]["question_id"]]])
    with pytest.raises(ValueError, match="mmlu_pro:test"):  # a split may be empty, a question set may not
        load_questions("mmlu_pro:test")


def test_mawps_is_split_by_what_is_said_without_names_and_numbers(tmp_path, monkeypatch):
    """Each question in one split, and all that differ only in numbers, names and the order of words in the same."""
    things = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in ("lls", "ns", "ts", "rds", "gs")]
    starts = ("Sam has 3", "Jo Ann has 4.5")
    texts = [f"{start} {thing}. How many {thing}?" for thing in things for start in starts]
    rows = [{"id": f"m{i}", "question": text, "answer": str(i)} for i, text in enumerate(texts)]
    write_jsonl(tmp_path / "svamp" / "train.jsonl", rows)
    write_jsonl(tmp_path / "svamp" / "test.jsonl", [{"question": "1+1?", "answer": "2"}])
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    splits = {name: load_questions(f"mawps:{name}") for name in ("train", "valid", "test")}
    found = sorted((q for split in splits.values() for q in split), key=lambda q: int(q.id[1:]))
    assert found == load_questions("mawps:all") and [q.question for q in found] == texts
    for split, share in zip(splits.values(), (0.7, 0.05, 0.25)):
        numbers = [int(q.id[1:]) for q in split]
        assert [number // 2 for number in numbers[::2]] == [number // 2 for number in numbers[1::2]]
        assert abs(len(split) - 200 * share) < 8 * (100 * share * (1 - share)) ** 0.5
    data.main(data.Config("mawps", str(tmp_path / "out"), len(splits["train"]), 2, len(splits["test"]), "auto"))
    asked = {name: load_questions(str(tmp_path / "out" / f"{name}.jsonl")) for name in ("train", "test", "hard")}
    assert [q.question for q in asked["hard"]] == ["1+1?"]  # SVAMP
    assert all({q.id for q in asked[name]} == {q.id for q in splits[name]} for name in ("train", "test"))
    assert {q.kind for split in asked.values() for q in split} == {"calculation"}  # a file of one's own: number
    assert {q.instruction for q in asked["test"]} == {data.INSTRUCTIONS["calculation"]}
    shown = [few_shot_prompt(Question("1", "1+1?", kind=kind), 8) for kind in ("number", "calculation")]
    assert shown[0] == shown[1] and published.STOP_TEXT["number"] == published.STOP_TEXT["calculation"]
    assert {q.kind for q in load_questions(str(tmp_path / "svamp" / "train.jsonl"))} == {"number"}


def test_the_recorded_calculations_are_those_of_the_recorded_answers(tmp_path):
    teacher = Path(data.__file__).parent / "results" / "mawps-teacher"
    script = runpy.run_path(str(teacher / "shorten.py"))
    for text, calculation in {
        "Tom starts with 8. So he has 8 - 4 = 5 marbles. The answer is 5.": "8 - 4",  # a slip of his counts for nothing
        "38 - 4 = 34 are left. So 34 + 15 = 49.": "(38 - 4) + 15", "2 x $5 = $10, 10 / 4 = 2.5": "(2 * 5) / 4",
        "9 x 15 pieces = 135 and 3 + 4 = 7": "3 + 4", "The answer is 7.": None, "10/6/2024 is today": None,
    }.items():
        assert script["calculation_of"](text) == calculation
    subprocess.run([sys.executable, str(teacher / "shorten.py"), str(tmp_path)], check=True, stdout=subprocess.DEVNULL)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for file in files:
        assert gzip.decompress(file.read_bytes()) == gzip.decompress((teacher / file.name).read_bytes())


def test_the_sizes_of_mawps_and_svamp():
    real_data("svamp/train.jsonl")
    assert [len(load_questions(f"mawps:{name}")) for name in ("train", "valid", "test", "all")] == [1277, 68, 399, 1744]
    assert len(load_questions("svamp:test")) == 1000


@pytest.mark.parametrize("text, split", [
    ("115?", "train"), ("108?", "train"), ("65?", "valid"), ("16?", "valid"), ("309?", "test"), ("46?", "test")])
def test_the_borders_of_the_hash_split(text, split):
    """In buckets 0, 69, 70, 74, 75 and 99 of 100; a split that moves would leak between runs."""
    assert hash_split(Question("id", text)) == split


def test_the_options_are_part_of_a_question():
    """Other options make another question; the same ones in another order, case and spaces do not."""
    xy = Question("a", "Which?", "A", "choice", ("x", "y")).key
    assert xy == Question("b", " which?", "B", "choice", ("Y", "x")).key
    assert xy != Question("a", "Which?", None, "choice", ("x y",)).key
    assert xy != Question("a", "Which?", "A", "choice", ("x", "z")).key


def test_only_fillers_at_the_end_are_dropped(mmlu):
    row = mmlu_rows(1)[0]
    mmlu([row | {"options": ["x", "N/A", "y", "N/A", "N/A"]}])
    assert [q.options for q in load_questions("mmlu_pro:all")] == [("x", "N/A", "y")]


def test_the_script_splits_mmlu_pro(mmlu, tmp_path):
    """Each part from its own hash split, shuffled over the subjects by the seed."""
    mmlu(mmlu_rows(600))
    data.main(data.Config("mmlu_pro", str(tmp_path / "a"), 200, 10, 50))
    for name, count in (("train", 200), ("valid", 10), ("test", 50)):
        questions = load_questions(str(tmp_path / "a" / f"{name}.jsonl"))
        assert len({q.key for q in questions}) == count and {hash_split(q) for q in questions} == {name}
        assert name == "valid" or 0.3 < sum(q.subject == "law" for q in questions) / count < 0.7


# ---- worked examples -------------------------------------------------------------------------------------------------


def test_gsm8k_examples_word_for_word():
    """Against a checksum of the prompt that lm-evaluation-harness 0.4.13 makes (gsm8k_cot)."""
    prompt = few_shot_prompt(Question("i", "How many?", "7", instruction="Be brief."), 8)
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    assert digest == "6b14c4d235e15899ca784c8336c2a28e008b360e4b21d34391bc0dd1c2da78a2"
    assert prompt.count(published.STOP_TEXT["number"]) == 9  # where a model would go on with a question of its own
    assert few_shot_prompt(Question("i", "How many?"), 1) == prompt[: prompt.index("Q: If")] + "Q: How many?\nA:"
    with pytest.raises(ValueError, match="--shots 9"):
        few_shot_prompt(Question("i", "How many?"), 9)


def test_mmlu_pro_examples_by_hand(mmlu):
    """The first k of the same subject, in order; the question as published, spaces and all, and no instruction."""
    mmlu(mmlu_rows(1), [
        {"question_id": i, "question": f" Worked {i}?", "options": ["x", f"y{i}", "N/A"], "answer": "A",
         "cot_content": f"A: Let's think step by step. Since {i}. The answer is (A).",
         "category": ["law", "math"][i % 2]} for i in range(10)])
    question = Question("q", "Which? ", "B", "choice", ("one", "two"), "Be brief.", "math")
    assert few_shot_prompt(question, 2) == (
        'The following are multiple choice questions (with answers) about math. Think step by step and then finish '
        'your answer with "the answer is (X)" where X is the correct letter choice.\n\n\n'
        "Question:\n Worked 1?\nOptions:\nA. x\nB. y1\nAnswer: Let's think step by step. Since 1. "
        "The answer is (A).\n\n"
        "Question:\n Worked 3?\nOptions:\nA. x\nB. y3\nAnswer: Let's think step by step. Since 3. "
        "The answer is (A).\n\n"
        "Question:\nWhich? \nOptions:\nA. one\nB. two\nAnswer: Let's think step by step.")
    assert few_shot_prompt(question, 2).count(published.STOP_TEXT["choice"]) == 3
    with pytest.raises(ValueError, match="--shots 6"):
        few_shot_prompt(question, 6)


# ---- check -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files, fault", [
    ("a", None), ("xy", None),  # other options: another question
    ("ab", r"^1 error .*: \S*b\.jsonl, line 3: the same question as \S*a\.jsonl, line 2, a leak$"),
    ("xyz", r"z\.jsonl, line 1: the same question as .*x\.jsonl, line 1"),
    ("ade", r"^2 errors in the files; the first: \S*d\.jsonl, line 2: not JSON")])
def test_check_finds_faults_leaks_and_copies(files, fault, tmp_path, capsys):
    """A copy within a file is a note, a question of two files an error with both lines."""
    write(tmp_path / "a.jsonl", GOOD, '{"id": "x", "question": "What is  up?"}', '{"question": "3+4?", "id": "y"}')
    write(tmp_path / "b.jsonl", "", '{"id": "y", "question": "What?"}', '{"id": "x", "question": " what is up? "}')
    write(tmp_path / "d.jsonl", GOOD, "{broken")
    write(tmp_path / "e.jsonl")
    for name, options in (("x", ["x", "y"]), ("y", ["x", "z"]), ("z", ["y", "x"])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": "Which?", "options": options}])
    with pytest.raises(ValueError, match=fault) if fault else contextlib.nullcontext():
        check(CheckConfig(tuple(str(tmp_path / f"{name}.jsonl") for name in files)))
    said = capsys.readouterr().out
    assert ("fine" in said) == (fault is None) and said.count("note:") == ("a" in files)
    assert "a" not in files or "a.jsonl: 3 questions (number), 1 with a gold answer" in said


def test_the_commands_of_the_script(tmp_path, capsys, monkeypatch):
    """check and fetch are words before the flags, questions are split without."""
    good = write(tmp_path / "good.jsonl", GOOD)
    for words, said in ((["check", good], "fine"), (["fetch", "mmlu_pro"], "read_parquet"), (
            ["--questions", "arith", "--out", tmp_path / "out", "--train", 3, "--valid", 1, "--test", 1],
            "3 train, 1 valid, 1 test, 1 hard")):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        with contextlib.suppress(SystemExit):
            runpy.run_path(data.__file__, run_name="__main__")
        assert said in "".join(capsys.readouterr())


# ---- fetch -----------------------------------------------------------------------------------------------------------

FILES = {"train.jsonl": b'{"question": "3+4?", "answer": "#### 7"}\n', "test.jsonl": b'{"question": "1+1?"}\n',
         "SVAMP.json": b'[{"ID": "chal-1", "Body": "Each pack costs $ 76", "Question": "How much?", "Answer": 51.0}]',
         "train.csv": b"Question,Numbers,Equation,Answer\n"
                      b'"Al \'s number1 pens , at $ number0 each ?",5.0 2.0,- number0 number1,3.0\n'
                      b"Is it number0 ?,28.3,number0,28.3\n",
         "dev.csv": b"Question,Numbers,Equation,Answer\n"
                    b"Is it number0 ?,28.3,number0,1\nIs it number0 ?,10.0,number0,10\n"}


@pytest.fixture
def web(monkeypatch):
    """A web of FILES that notes what is asked for; `trouble` is raised or sent instead of a file."""
    web = SimpleNamespace(asked=[], trouble=None)

    def urlopen(url, timeout):
        web.asked.append(Path(url).name)
        if isinstance(web.trouble, Exception):
            raise web.trouble
        return io.BytesIO(web.trouble or FILES[web.asked[-1]])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for name, (url, files) in published.PUBLISHED.items():
        digests = {file: hashlib.sha256(FILES[Path(file).name]).hexdigest() for file in files}
        monkeypatch.setitem(published.PUBLISHED, name, (url, digests))
    return web


def fetched(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "gsm8k").iterdir()}


GSM8K = {name: FILES[name] for name in ("train.jsonl", "test.jsonl")}


def test_fetch_gets_what_is_missing(web, tmp_path, monkeypatch):
    """Both files and nothing else, in $DATA_DIR; whole files are left alone, others fetched again."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    fetch(FetchConfig(("gsm8k",)))
    assert fetched(tmp_path) == GSM8K and web.asked == ["train.jsonl", "test.jsonl"]
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes(b"half")
    fetch(FetchConfig(("gsm8k",)))
    assert web.asked[2:] == ["test.jsonl"] and fetched(tmp_path) == GSM8K
    assert load_questions("gsm8k:test")[0].question == "1+1?"


def test_fetch_puts_the_numbers_of_mawps_into_their_places(web, tmp_path, monkeypatch):
    """Three published files become two question sets: whole numbers without .0, each text once, no stray spaces."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    fetch(FetchConfig(("svamp",)))
    assert [(q.id, q.question, q.answer) for q in load_questions("svamp:test")] == [
        ("chal-1", "Each pack costs $ 76. How much?", "51")]
    found = [(q.question, q.answer) for q in load_questions("mawps:all")]
    assert found == [("Al's 2 pens, at $5 each?", "3"), ("Is it 28.3?", "28.3"), ("Is it 10?", "10")]
    assert web.asked == ["SVAMP.json", "train.csv", "dev.csv"]


@pytest.mark.parametrize(("trouble", "words"), [
    (OSError("no network"), ["no network"]), (http.client.IncompleteRead(b"", 9), ["9 more"]),
    (b"<html>Sign in", [hashlib.sha256(x).hexdigest() for x in (b"<html>Sign in", FILES["train.jsonl"])])])
def test_fetch_gets_a_whole_file_or_says_what_to_do(trouble, words, web, tmp_path, capsys, monkeypatch):
    """The address and the place of the file, in one sentence, exit code 2; nothing half done stands anywhere."""
    web.trouble = trouble
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        runtime.launch(fetch, FetchConfig, ["gsm8k"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and all(word in said for word in words), said
    url, _ = published.PUBLISHED["gsm8k"]
    assert f"fetch {url}/train.jsonl by hand and put it at {tmp_path}/gsm8k/train.jsonl" in said
    assert not list(tmp_path.rglob("*.jsonl*"))


def test_the_published_checksums_are_those_of_the_published_files():
    for name, digest in published.PUBLISHED["gsm8k"][1].items():
        assert hashlib.sha256(real_data(f"gsm8k/{name}").read_bytes()).hexdigest() == digest


# ---- files and splits ------------------------------------------------------------------------------------------------


def test_jsonl_round_trip(tmp_path):
    """What is written is read again: line breaks, unicode, nesting; no temporary file stays; a missing key is named."""
    rows = [{"a": "x\ny\u2028z"}, {"a": "naïve 😀", "b": [1, None, {"c": 0.1}]}]
    write_jsonl(tmp_path / "deep" / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "deep" / "rows.jsonl", required=["a"])) == rows
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rows.jsonl"]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: .*'b'"):
        list(read_jsonl(tmp_path / "deep" / "rows.jsonl", required=["b"]))


ROWS = [{"question": "a, b; [c]?", "answer": "1"}, {"question": "\u00e4\n?", "answer": "2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("content, numbers", [
    (json.dumps(ROWS), [1, 1]), ("\n" + json.dumps(ROWS, indent=2), [3, 7]), ("[]", []),
    ("\ufeff" + json.dumps(ROWS, indent=1), [2, 6]), ("[\n " + LINES.strip().replace("\n", ",\n") + "\n]\n", [2, 3]),
    ("\n".join(json.dumps(row, indent=2) for row in ROWS), [1, 5]),
    (gzip.compress(LINES.encode(), mtime=0), [1, 2]),
    (gzip.compress(json.dumps(ROWS, indent=0).encode(), mtime=0), [2, 6])])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz"])
def test_objects_spread_over_lines_are_read(content, numbers, name, tmp_path):
    """An array, as MMLU-Pro publishes it, or objects that a tool has indented; the line is each object's first.
    gzip is known by its bytes and not by the file's name."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert list(numbered_jsonl(tmp_path / name)) == list(zip(numbers, ROWS))


@pytest.mark.parametrize("content, words", [
    (json.dumps(ROWS, indent=1)[:-1], ["line 9", "array"]), (json.dumps(ROWS, indent=1)[:-9], ["line 6", "JSON"]),
    (json.dumps(ROWS) + "\n" + LINES, ["line 1", "array"]), ('[\n{"a": 1},\n2]', ["line 3", "object"]),
    (b'[\n{"a": "\xff"}]', ["UTF-8"]), ("[" * 9999, ["JSON"])])
def test_a_bad_array_is_refused(content, words, tmp_path):
    (tmp_path / "rows.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"rows\.json") as error:
        list(numbered_jsonl(tmp_path / "rows.json"))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("content, word", [
    *[(LINES.encode(code), "UTF-16") for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")],
    ("question,answer\n3+4?,7\n", "CSV"), ("\ufeffquestion;answer\n3+4?;7\n", "CSV"), ("question\tanswer\n", "TSV"),
    (b"PAR1\x15\x04", "Parquet"), (b"PK\x03\x04\x14", "ZIP"), (b"\x28\xb5\x2f\xfd\x04", "compressed"),
    ("<!DOCTYPE html>\n<html>", "web page"), ("version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
    (gzip.compress(b"question,answer\n", mtime=0), "CSV"), (gzip.compress(LINES.encode(), mtime=0)[:-9], "gzip")])
def test_another_format_is_called_what_it_is(content, word, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"rows\.jsonl") as error:
        load_questions(str(tmp_path / "rows.jsonl"))
    assert word in str(error.value) and "line 1" not in str(error.value)


def test_a_set_that_is_too_small_is_an_error(tmp_path, monkeypatch):
    """GSM8K's test set too, which is taken in its own order."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for split, n in (("train", 9), ("test", 7)):
        write_jsonl(tmp_path / "gsm8k" / f"{split}.jsonl", [{"question": f"{split} {i}?"} for i in range(n)])
    counts = {"train": 6, "valid": 3, "test": 7}
    splits = data.disjoint_splits("gsm8k", counts, seed=0)
    assert [question.question for question in splits["test"]] == [f"test {i}?" for i in range(7)]
    for name in counts:
        with pytest.raises(ValueError, match=f"--{name}"):
            data.disjoint_splits("gsm8k", counts | {name: 50}, seed=0)


def test_the_script_cuts_a_file_into_disjoint_splits(tmp_path):
    """Asked sizes, no text twice even where the file repeats one, instruction added, the same again for a seed."""
    rows = [{"question": "Which?", "options": [f"{i}", "x"], "answer": "A"} for i in range(20)]
    write_jsonl(tmp_path / "q.jsonl", [*rows, rows[0] | {"options": ["x", "0"]}])
    drawn = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.main(data.Config(str(tmp_path / "q.jsonl"), str(tmp_path / out), 10, 4, 6, "Think.", seed))
        splits = [load_questions(str(tmp_path / out / f"{name}.jsonl")) for name in ("train", "valid", "test")]
        assert [len(split) for split in splits] == [10, 4, 6]
        drawn[out] = [q.key for split in splits for q in split]
        assert len(set(drawn[out])) == 20
        assert all(q.instruction == "Think." and q.prompt.endswith("\nThink.") for split in splits for q in split)
    assert drawn["a"] == drawn["b"] != drawn["c"]


def test_questions_without_an_answer_are_trained_on_and_measure_nothing(tmp_path):
    """Wherever they stand in the file, and however large it is; too few with one is an error before anything runs."""
    rows = [{"question": f"{i}?"} | ({"answer": str(i)} if i % 5 == 0 else {}) for i in range(100)]  # 20 with one
    write_jsonl(tmp_path / "q.jsonl", rows)
    for train in (40, 84):
        data.main(data.Config(str(tmp_path / "q.jsonl"), str(tmp_path / f"{train}"), train, 4, 12))
        splits = [load_questions(str(tmp_path / f"{train}" / f"{name}.jsonl")) for name in ("train", "valid", "test")]
        assert [len(split) for split in splits] == [train, 4, 12]
        assert len({q.key for split in splits for q in split}) == train + 16
        assert [sum(q.answer is not None for q in split) for split in splits] == [max(0, train - 80), 4, 12]
    with pytest.raises(ValueError, match=r"q\.jsonl") as error:
        data.main(data.Config(str(tmp_path / "q.jsonl"), str(tmp_path / "none"), 40, 8, 13))
    assert {"8", "13", "1"} <= {*re.findall(r"\d+", str(error.value))}  # asked for, and missing
    assert not (tmp_path / "none" / "test.jsonl").exists()


def test_a_small_file_is_split_in_the_shares_of_the_sizes_asked_for(tmp_path, capsys):
    """Copies do not count; every split gets a question, and none is left over."""
    assert data.fitting({"train": 20, "valid": 2, "test": 10}, 16) == {"train": 10, "valid": 1, "test": 5}
    assert data.fitting({"train": 20, "valid": 2, "test": 10}, 32) == {"train": 20, "valid": 2, "test": 10}
    for n, sizes in ((60, (39, 3, 18)), (3, (1, 1, 1))):
        write_jsonl(tmp_path / "q.jsonl", [{"question": f"{i}?", "answer": "1"} for i in range(n)] * 2)
        capsys.readouterr()
        splits = data.disjoint_splits(str(tmp_path / "q.jsonl"), {"train": 200, "valid": 20, "test": 100}, seed=0)
        assert tuple(map(len, splits.values())) == sizes and tuple(splits) == ("train", "valid", "test")
        assert str(n) in capsys.readouterr().out
    write_jsonl(tmp_path / "q.jsonl", [{"question": f"{i}?"} for i in range(2)])
    with pytest.raises(ValueError, match="2 different questions"):
        data.disjoint_splits(str(tmp_path / "q.jsonl"), {"train": 2, "valid": 1, "test": 1}, seed=0)


@pytest.mark.parametrize("more, form", [({"answer": "#### 1"}, "####"), (
    {"answer": "the answer is (A)", "options": ["x", "y"]}, "the answer is (X)")])
def test_an_instruction_suits_the_kind_and_never_replaces_a_questions_own(more, form, tmp_path):
    """'auto' asks for a form that the strict reading knows; a question that brings its own instruction keeps it."""
    rows = [{"question": f"{i}?", "instruction": "" if i else "Be brief.", **more} for i in range(4)]
    write_jsonl(tmp_path / "q.jsonl", rows)
    data.main(data.Config(str(tmp_path / "q.jsonl"), str(tmp_path / "out"), 2, 1, 1, "auto"))
    asked = [q for part in ("train", "valid", "test") for q in load_questions(str(tmp_path / "out" / f"{part}.jsonl"))]
    assert len(asked) == 4 and all((form in q.prompt) == (q.question != "0?") for q in asked)
    assert {q.instruction for q in asked if q.question == "0?"} == {"Be brief."}


# ---- the built-in task ---------------------------------------------------------------------------------------------


CHANGES = {"gives": 1, "buys": 1, "loses": -1, "sells": -1, "doubles": 2, "triples": 3}


def solve(text: str) -> tuple[int, int]:
    """Answer a word problem by reading its English, sentence by sentence: (answer, number of steps)."""
    first, *events, question = re.findall(r"[^.?]+[.?]", text)
    who, count, things = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", first).groups()
    assert question == f" How many {things} does {who} have?"
    count = int(count)
    for event in events:
        actor, verb, *rest = re.fullmatch(r" On \w+day (.+)\.", event)[1].split()
        number = next((int(word) for word in rest if word.isdigit()), None)
        assert (actor == who) != (verb == "gives") and (verb != "gives" or rest[0] == who)
        if rest == ["half"]:
            assert verb == "loses" and count % 2 == 0  # half a thing is never left over
            count //= 2
        else:
            count = count + CHANGES[verb] * number if number else count * CHANGES[verb]
        assert count > 0
    return count, len(events)


def test_word_problems_are_solved_correctly():
    """The worked solution is right line by line, each starts from the one before, and the end is the answer that the
    English text has. Days are in the order of the week, whose every day is left out now and then. Hard ones have one
    number of steps, above all others."""
    steps, week = {}, "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    missing = set()
    for split in SPLITS:
        for problem in islice(arith_problems(split), 100):
            answer, count = solve(problem.text)
            *lines, last = problem.solution.split("\n")
            days = re.findall(r"On (\w+day) ", problem.text)
            assert days == re.findall(r"(\w+day) ", problem.solution) == sorted(set(days), key=week.index)
            missing |= {*week} - {*days}
            value = None
            for line in lines:
                a, op, b, c = re.fullmatch(r"(?:\w+day )?(\d+)([-+*/])(\d+)=(\d+)", line).groups()
                assert value is None or int(a) == value
                value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op]
                assert value == int(c)
            assert last == f"#### {answer}" and value == answer and len(lines) == count
            steps.setdefault(split, set()).add(count)
    assert missing == {*week}
    [hard] = steps.pop("hard")
    assert all(len(found) >= 2 and max(found) == hard - 1 for found in steps.values())


def test_splits_share_no_question_even_in_a_small_world(monkeypatch):
    """With two names, one topic and one step there are some 700 problems; drawn by chance, splits would share many."""
    monkeypatch.setattr(arith, "NAMES", ["Ava", "Ben"])
    monkeypatch.setattr(arith, "TOPICS", ["pens"])
    monkeypatch.setattr(arith, "STEPS", dict.fromkeys(SPLITS, (1, 1)))
    draws = [("corpus", 0), ("corpus", 1), ("train", 0), ("valid", 0), ("test", 0)]
    corpus, again, *others = ([p.text for p in islice(arith_problems(*draw), 40)] for draw in draws)
    held_out = [text for texts in others for text in texts]
    assert len(set(corpus)) == len(set(again)) == 40 and len(set(held_out)) == 120
    assert not set(corpus + again) & set(held_out)


def test_arith_question_sets():
    """Ids and gold; a longer set begins with the shorter one; no text twice."""
    questions = load_questions("arith:test", 400)
    assert [(q.id, q.answer) for q in questions] == [
        (f"arith-test-{i}", str(solve(q.question)[0])) for i, q in enumerate(questions)]
    assert load_questions("arith:test", 30) == questions[:30] and len({q.key for q in questions}) == 400


# ---- batches -------------------------------------------------------------------------------------------------------


def test_collate_by_hand():
    """Entry t of the mask is about token t + 1; token 0 is a word like any other."""
    tokens, mask, lengths = collate([[5, 6], [0], [1, 2, 3]], [[7, 8], [0, 0, 0, 4], [9]])
    assert tokens.tolist() == [[5, 6, 7, 8, 0], [0, 0, 0, 0, 4], [1, 2, 3, 9, 0]]
    assert mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]
    assert lengths.tolist() == [4, 5, 4]
    assert mask.dtype == torch.bool


@pytest.mark.parametrize("n, size", [(97, 4), (128, 8), (5, 9)])
def test_a_pass_has_every_row_once(n, size):
    """Each row once, full batches but for the last; the order follows from pass, seed and purpose, and differs."""
    steps = -(-n // size)
    draw = lambda epoch, *purpose: [rows_of_step(epoch * steps + i, n, size, *purpose) for i in range(steps)]
    drawn = [draw(0, 0, "sft"), draw(1, 0, "sft"), draw(0, 1, "sft"), draw(0, 0, "reward")]
    for batches in drawn:
        assert sorted(row for batch in batches for row in batch) == list(range(n))
        assert [len(batch) for batch in batches][:-1] == [size] * (steps - 1)
    assert draw(0, 0, "sft") == drawn[0]
    assert n < 90 or len(set(map(str, drawn))) == 4


def test_micro_batches_by_hand():
    assert list(micro_batches([0, 1, 2, 3], [3, 1, 2, 4], 6)) == [[3], [0, 2], [1]]
    assert list(micro_batches([2, 0], [3, 9, 2, 9], 6)) == [[0, 2]]  # the rows that were asked for, 6 fits into 6
    assert list(micro_batches([0, 1], [7, 6], 5)) == [[0], [1]] and not list(micro_batches([], [1], 5))
