"""data.py: answers read as a person reads them, questions, the built-in task, tokens, padded batches."""

import gzip
import json
import os
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import CHATML_SPECIAL, CHATML_TEMPLATE, LLAMA_SPECIAL

import arith
import data
from arith import SPLITS, arith_problems
from data import (
    Question,
    Tokenizer,
    batches,
    canonical,
    collate,
    extract_answer,
    is_correct,
    load_questions,
    read_jsonl,
    write_jsonl,
)

# ---- answers -------------------------------------------------------------------------------------------------------

NUMBERS = [  # text, strict, lenient
    # the four announcements
    ("3+4=7\n#### 7", "7", "7"),
    ("####7", "7", "7"),
    ("####\n7", "7", "7"),
    ("She has 3+4=7.\nA: 7", "7", "7"),
    ("So the answer is 7.", "7", "7"),
    ("The answer is: 7", "7", "7"),
    ("The final answer is\n\n7", "7", "7"),
    ("THE ANSWER IS 7", "7", "7"),
    ("Answer: 42", "42", "42"),
    ("**Answer:** 42", "42", "42"),
    ("Therefore \\boxed{7}", "7", "7"),
    ("The answer is $\\boxed{7}$.", "7", "7"),
    ("\\boxed{18\\text{ dollars}}", "18", "18"),
    ("The answer is **7**", "7", "7"),
    # how numbers are written
    ("3+4=7\n#### 1,007.", "1007", "1007"),
    ("#### 1,234,567", "1234567", "1234567"),
    ("#### $18", "18", "18"),
    ("The answer is: **$1,234**.", "1234", "1234"),
    ("\\boxed{\\$18}", "18", "18"),
    ("#### -5", "-5", "-5"),
    ("#### - 5", "-5", "-5"),
    ("#### -$5", "-5", "-5"),
    ("#### $-5", "-5", "-5"),
    ("#### −5", "-5", "-5"),  # the minus sign U+2212, which many models write
    ("#### -0", "0", "0"),
    ("#### 2.50", "2.5", "2.5"),
    ("#### 100", "100", "100"),
    ("#### 007", "7", "7"),
    ("#### .5", "0.5", "0.5"),
    ("A: 12.0", "12", "12"),
    ("#### 1/5", "1/5", "1/5"),
    ("#### 10%", "10", "10"),
    ("#### 5 apples", "5", "5"),
    ("A: 7\nThank you!", "7", "7"),
    # several numbers: the first announcement counts, without one the last number, and only if lenient
    ("3+4=7\n#### 7\n\nQ: Tom has 5 more.\n#### 12", "7", "7"),
    ("The answer is 7. Another: the answer is 9.", "7", "7"),
    ("#### 7 or 8", "7", "7"),
    ("3 apples and 4 pears are 7 fruits", None, "7"),
    ("He pays $1,250.75 in all.", None, "1250.75"),
    ("It was -3 degrees.", None, "-3"),
    ("It takes 5-10 days", None, "10"),  # a hyphen between numbers is no minus
    ("(12) ok", None, "12"),
    ("answer = 5", None, "5"),
    ("At job A: 2000 hours * $15 = 30000\n#### 8400", "8400", "8400"),  # a label within a line states nothing
    ("DNA: 7 of 9", None, "9"),
    # no answer
    ("I do not know.", None, None),
    ("", None, None),
    ("####", None, None),
    ("#### seven", None, None),
    ("The answer is five.", None, None),
    ("-,.$", None, None),
]
CHOICES = [
    ("The answer is (C).", "C", "C"),
    ("The answer is C.", "C", "C"),
    ("the answer is: B)", "B", "B"),
    ("the answer is (c)", "C", "C"),
    ("The answer is **(B)**.", "B", "B"),
    ("Answer: B", "B", "B"),
    ("Answer: (J)", "J", "J"),
    ("**Answer:** B", "B", "B"),
    ("A: F", "F", "F"),
    ("#### E", "E", "E"),
    ("\\boxed{D}", "D", "D"),
    ("\\boxed{\\text{D}}", "D", "D"),
    ("The answer is A", "A", "A"),
    ("The answer is I.", "I", "I"),
    ("The answer is (C).\n\nQ: next\nThe answer is (D).", "C", "C"),
    ("A: Apple\nB: Bear\nThe answer is (B).", "B", "B"),
    ("The answer is a bit hard to see. The answer is (C).", "C", "C"),  # 'a' is English, not option A
    ("We can solve for a: a = b^2. The answer is (G).", "G", "G"),
    ("I think it is C.", None, "C"),
    ("Option B is wrong, so D", None, "D"),
    ("D", None, "D"),
    ("The answer is K.", None, None),
    ("The answer is Blue", None, None),
    ("CAB FAD BED", None, None),  # letters inside words
    ("It is a guess", None, None),  # a small letter is a word
    ("", None, None),
]


@pytest.mark.parametrize("text, strict, lenient", NUMBERS)
def test_number_answers(text, strict, lenient):
    assert (extract_answer(text, "number"), extract_answer(text, "number", lenient=True)) == (strict, lenient)


@pytest.mark.parametrize("text, strict, lenient", CHOICES)
def test_choice_answers(text, strict, lenient):
    assert (extract_answer(text, "choice"), extract_answer(text, "choice", lenient=True)) == (strict, lenient)


@pytest.mark.parametrize("text, kind, expected", [
    (" $1,234.50 ", "number", "1234.5"), ("7", "number", "7"), ("7.", "number", "7"), ("-0.0", "number", "0"),
    ("1e6", "number", None), ("seven", "number", None), ("7 apples", "number", None), ("", "number", None),
    ("1.2.3", "number", None), ("--5", "number", None),
    ("(c)", "choice", "C"), ("J.", "choice", "J"), ("K", "choice", None), ("AB", "choice", None), ("", "choice", None),
])
def test_canonical_is_one_spelling_or_none(text, kind, expected):
    assert canonical(text, kind) == expected


def test_every_integer_is_read_from_every_spelling():
    """Commas, dollar, decimals of zero, bold, a final full stop: the same number, never a neighbour of it."""
    rng = random.Random(0)
    for n in [0, *(rng.randint(-(10**digits), 10**digits) for digits in range(1, 41) for _ in range(5))]:
        for text in (f"{n}", f"{n:,}", f"${n:,}", f"{n}.0", f"{n:,}.00.", f"**{n}**", f" {n}\n"):
            assert extract_answer(f"2+2=4\n#### {text}", "number") == str(n)
            answer = extract_answer(f"A: {text}", "number")
            assert is_correct(answer, str(n), "number") and not is_correct(answer, str(n + 1), "number")
            assert n == 0 or not is_correct(answer, str(-n), "number")


@pytest.mark.parametrize("kind", ["number", "choice"])
def test_any_text_gives_a_canonical_answer_or_none(kind):
    """Random texts of the pieces that answers are made of: no crash, and what comes out is its own canonical form."""
    pieces = [*"0123456789.,-$/*() \nABIJaié−٣²", "####", "\\boxed{", "}", "A:", "Answer:", "answer is", "1e9"]
    rng, found = random.Random(0), 0
    for _ in range(4000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        for lenient in (False, True):
            answer = extract_answer(text, kind, lenient)
            assert answer is None or canonical(answer, kind) == answer, text
            found += answer is not None
    assert found > 500


@pytest.mark.parametrize("answer, gold, kind, expected", [
    ("7", "7", "number", True), ("7.0", "7", "number", True), ("$1,000", "1000", "number", True),
    ("7", "8", "number", False), ("-7", "7", "number", False), ("70", "7", "number", False),
    ("c", "C", "choice", True), ("C", "D", "choice", False),
    (None, "7", "number", False), ("7", None, "number", False), (None, None, "number", False),
    ("pear", "plum", "number", False), ("", "", "choice", False),  # what is no answer is never right
])
def test_is_correct(answer, gold, kind, expected):
    assert is_correct(answer, gold, kind) is expected


# ---- answers in real data ------------------------------------------------------------------------------------------


def real_data(name: str) -> Path:
    """A file of $DATA_DIR; the test is skipped where it is not there."""
    if not os.environ.get("DATA_DIR"):
        pytest.skip("DATA_DIR is not set: it names the folder with gsm8k/ and mmlu_pro/")
    path = Path(os.environ["DATA_DIR"]) / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gsm8k_gold_is_what_follows_the_hashes(split):
    path = real_data(f"gsm8k/{split}.jsonl")
    rows = map(json.loads, path.open(encoding="utf-8"))
    golds = [row["answer"].split("####")[1].replace(",", "").strip() for row in rows]
    questions = load_questions(f"gsm8k:{split}")
    assert len(questions) == len(golds) == {"train": 7473, "test": 1319}[split]
    assert [(q.id, q.answer) for q, gold in zip(questions, golds) if q.answer != gold] == []


def test_verdicts_on_gsm8k_solutions_are_the_official_ones():
    """2,640 solutions of four systems: our strict reading judges every one as OpenAI did."""
    rows = [json.loads(line) for line in real_data("gsm8k/judged_solutions.jsonl").open(encoding="utf-8")]
    golds = [row["reference"].rsplit("A:", 1)[1].replace(",", "").strip() for row in rows]
    verdicts = [is_correct(extract_answer(row["response"], "number"), gold, "number") for row, gold in zip(rows, golds)]
    wrong = [i for i, (row, verdict) in enumerate(zip(rows, verdicts)) if verdict != row["is_correct"]]
    assert len(rows) == 2640 and 0.3 < sum(verdicts) / 2640 < 0.7
    assert wrong == []


def test_letters_of_mmlu_pro_answers_are_the_official_ones():
    """12,032 answers of Llama-3.1-8B: at most 5 differ from MMLU-Pro's strict rule, at most 5 from its stored letter
    (which is a random guess where its rules find none: those are not answers)."""
    strict_rule, count, differ = re.compile(r"answer is \(?([A-J])\)?"), 0, Counter()
    with gzip.open(real_data("mmlu_pro/llama-3.1-8b-instruct.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            stated = strict_rule.search(row["generated_text"])
            strict, lenient = (extract_answer(row["generated_text"], "choice", mode) for mode in (False, True))
            count += 1
            differ["strict"] += strict != (stated and stated.group(1))
            differ["lenient"] += lenient not in (None, row["pred"])
            differ["none"] += lenient is None
    assert count == 12032 and differ["none"] == 694
    assert differ["strict"] <= 5 and differ["lenient"] <= 5, differ


# ---- question files ------------------------------------------------------------------------------------------------


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


GOOD = '{"question": "3+4?", "answer": "7"}'


def test_a_users_own_file_loads(tmp_path):
    """question and answer are enough; the rest is kept; the gold becomes canonical; BOM and empty lines do no harm."""
    path = write(tmp_path / "mine.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), "", '{"question": " Große Frage? "}',
                 '{"id": 5, "question": "Which?", "answer": "(b)", "kind": "choice", "options": ["x", "y"], '
                 '"instruction": "Name a letter."}', '{"question": "q", "answer": "5-3=2\\n#### $1,002.0"}',
                 '{"question": "r", "answer": 12, "extra": 1}')
    a, b, c, d, e = load_questions(str(path))
    assert (a.id, a.question, a.answer, a.kind) == ("mine-1", "3+4?", "7", "number")
    assert (b.question, b.answer) == ("Große Frage?", None)
    assert (c.id, c.answer, c.options) == ("5", "B", ("x", "y"))
    assert c.prompt == "Which?\nA. x\nB. y\nName a letter."
    assert (d.answer, e.answer) == ("1002", "12")
    assert load_questions(str(path), limit=2) == [a, b]


@pytest.mark.parametrize("lines, words", [
    ([GOOD, "", "{broken"], ["line 3", "JSON"]),
    ([GOOD, '["a list"]'], ["line 2", "object"]),
    ([GOOD, '{"answer": "7"}'], ["line 2", "question"]),
    ([GOOD, b'{"question": "caf\xe9"}'], ["line 2", "UTF-8"]),
    ([GOOD.encode("utf-16")], ["line 1", "UTF-8"]),
    ([GOOD, "", '{"question": "  "}'], ["line 3", "question"]),
    ([GOOD, "", '{"question": "q", "kind": "essay"}'], ["line 3", "essay"]),
    ([GOOD, "", '{"question": "q", "answer": "seven"}'], ["line 3", "seven"]),
    ([GOOD, "", '{"question": "q", "options": "abc"}'], ["line 3", "options"]),
    (['{"id": "x", "question": "q"}', "", '{"id": "x", "question": "r"}'], ["1 and 3", "'x'"]),
    ([], ["no question"]),
    (["", "  "], ["no question"]),
])
def test_a_bad_question_file_is_refused_with_file_and_line(lines, words, tmp_path):
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(ValueError) as error:
        load_questions(str(path))
    assert all(word in str(error.value) for word in [str(path), *words]), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec, words", [
    ("nowhere.jsonl", ["nowhere.jsonl"]), ("gsm8k:dev", ["gsm8k", "dev.jsonl", "DATA_DIR"]),
])
def test_a_set_that_is_not_there_is_named(spec, words, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load_questions(spec)
    assert all(word in str(error.value) for word in words)


def test_gsm8k_is_read_from_data_dir(tmp_path, monkeypatch):
    """The gold is what follows '####', whatever the worked solution says before."""
    (tmp_path / "gsm8k").mkdir()
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    answer = "Job A: 2000 hours\nA: 3\nso the final answer is 15 gallons * 8\n#### 1,200"
    write(tmp_path / "gsm8k" / "test.jsonl", json.dumps({"question": "How much?", "answer": answer}))
    assert [(q.question, q.answer) for q in load_questions("gsm8k:test")] == [("How much?", "1200")]


def test_jsonl_round_trip(tmp_path):
    """What is written is read again: line breaks, unicode, nesting; no temporary file stays; a missing key is named."""
    rows = [{"a": "x\ny\u2028z"}, {"a": "naïve 😀", "b": [1, None, {"c": 0.1}]}]
    write_jsonl(tmp_path / "deep" / "rows.jsonl", rows)
    assert list(read_jsonl(tmp_path / "deep" / "rows.jsonl", required=["a"])) == rows
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rows.jsonl"]
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: .*'b'"):
        list(read_jsonl(tmp_path / "deep" / "rows.jsonl", required=["b"]))


def test_the_script_cuts_a_file_into_disjoint_splits(tmp_path):
    """Asked sizes, no text twice even where the file repeats one, instruction added, the same again for a seed."""
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(20)]
    write_jsonl(tmp_path / "q.jsonl", [*rows, rows[0]])
    texts = {}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.main(data.Config(str(tmp_path / "q.jsonl"), str(tmp_path / out), 10, 4, 6, "Think.", seed))
        splits = [load_questions(str(tmp_path / out / f"{name}.jsonl")) for name in ("train", "valid", "test")]
        assert [len(split) for split in splits] == [10, 4, 6]
        texts[out] = [q.question for split in splits for q in split]
        assert sorted(texts[out]) == sorted(row["question"] for row in rows)
        assert all(q.instruction == "Think." and q.prompt.endswith("\nThink.") for split in splits for q in split)
    assert texts["a"] == texts["b"] != texts["c"]
    with pytest.raises(ValueError, match="20 different questions"):
        data.main(data.Config(str(tmp_path / "q.jsonl"), str(tmp_path / "d"), 10, 4, 7))


# ---- the built-in task ---------------------------------------------------------------------------------------------


def solve(text: str) -> tuple[int, int]:
    """Answer a word problem by reading its English, sentence by sentence: (answer, number of steps)."""
    first, *events, question = re.findall(r"[^.?]+[.?]", text)
    who, count, things = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", first).groups()
    assert re.fullmatch(f"How many {things} does {who} have( now)?\\?", question.strip())
    count = int(count)
    for event in events:
        actor, verb, *rest = re.sub(r"^On \w+day ", "", event.strip(" .")).split()
        number = next((int(word) for word in rest if word.isdigit()), None)
        if verb == "gives":
            count += number if rest[0] == who and actor != who else -number
        elif rest == ["half"]:
            assert (actor, verb, count % 2) == (who, "loses", 0)  # half a thing is never left over
            count //= 2
        else:
            assert actor == who
            count = {"buys": lambda c, n: c + n, "loses": lambda c, n: c - n, "sells": lambda c, n: c - n,
                     "doubles": lambda c, n: 2 * c, "triples": lambda c, n: 3 * c}[verb](count, number)
        assert count > 0
    return count, len(events)


@pytest.mark.parametrize("split", SPLITS)
def test_word_problems_are_solved_correctly(split):
    """The worked solution is right line by line, each starts from the one before, and the end is the answer that the
    English text has."""
    for problem in islice(arith_problems(split), 200):
        answer, steps = solve(problem.text)
        *lines, last = problem.solution.split("\n")
        assert re.findall(r"On (\w+day) ", problem.text) == re.findall(r"(\w+day) ", problem.solution)
        value = None
        for line in lines:
            a, op, b, c = re.fullmatch(r"(?:\w+day )?(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            assert value is None or int(a) == value
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[op]
            assert value == int(c)
        assert last == f"#### {answer}" and value == answer and len(lines) == steps
        assert extract_answer(problem.solution, "number") == str(answer)


def test_hard_problems_are_longer_than_all_others():
    """One number of steps, held out of every other split; the others each mix at least two lengths."""
    steps = {split: {solve(problem.text)[1] for problem in islice(arith_problems(split), 200)} for split in SPLITS}
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


def test_splits_share_no_question_and_repeat_themselves():
    """800 problems of each split, and of another corpus seed: no text twice; the same call gives the same problems."""
    streams = [(split, 0) for split in SPLITS]
    texts = {key: [p.text for p in islice(arith_problems(*key), 800)] for key in streams}
    assert len(set().union(*texts.values())) == 5 * 800
    other = [p.text for p in islice(arith_problems("corpus", 1), 800)]
    assert other != texts["corpus", 0]
    assert not set(other) & {text for key in streams[1:] for text in texts[key]}
    assert texts["test", 0] == [p.text for p in islice(arith_problems("test"), 800)]


def test_arith_question_sets():
    """Ids, kind and gold; a longer set begins with the shorter one; an unknown split is refused."""
    questions = load_questions("arith:test", 30)
    assert [q.id for q in questions] == [f"arith-test-{i}" for i in range(30)]
    assert all(q.kind == "number" and q.answer == str(solve(q.question)[0]) for q in questions)
    assert all(q.prompt == q.question for q in questions)
    assert load_questions("arith:test", 40)[:30] == questions
    with pytest.raises(ValueError, match="exam"):
        load_questions("arith:exam")


# ---- tokens --------------------------------------------------------------------------------------------------------

WORDS = ["3 pens", "  spaces  around  ", "two\n\nlines\n", "\n\nnewline first", "naïve Größe 東京 😀", "1234-5", "x"]
QWEN_TEMPLATE = (  # the structure of Qwen2.5's: a branch for tools, one for a given system turn, then its own
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {{- 'You have tools.<|im_end|>\\n' }}\n{%- else %}\n"
    "    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nYou are Qwen. You are a helpful assistant.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n{%- endif %}\n" + CHATML_TEMPLATE)
SMOLLM_TEMPLATE = (  # SmolLM2's: the default system turn is written inside the loop
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


@pytest.fixture(params=["llama_folder", "chatml_folder"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


def test_any_text_survives_the_tokens(tokenizer):
    """decode(encode(x)) == x for random unicode, and no id of it is special."""
    rng, special = random.Random(0), {tokenizer.id(name) for name in LLAMA_SPECIAL + CHATML_SPECIAL}
    for limit in (0x7F, 0x2FF, 0xD7FF):  # ASCII with its control characters, Latin, the whole basic plane
        for _ in range(100):
            text = "".join(chr(rng.randint(0, limit)) for _ in range(rng.randint(0, 40))) + "😀"
            tokens = tokenizer.encode(text)
            assert tokenizer.decode(tokens) == text
            assert not special & set(tokens)


def test_text_never_becomes_a_special_token(tokenizer):
    """Special tokens spelled out in a question stay text; only the template's own are special, one BOS among them."""
    names = [name for name in LLAMA_SPECIAL + CHATML_SPECIAL if tokenizer.id(name) is not None]
    attack = "".join(names) + "hi"
    special = {tokenizer.id(name) for name in names}
    assert not special & set(tokenizer.encode(attack))
    assert tokenizer.decode(tokenizer.encode(attack)) == attack
    count = lambda ids: Counter(id for id in ids if id in special)
    assert count(tokenizer.chat(attack)) == count(tokenizer.chat("hi"))
    assert tokenizer.chat(attack).count(tokenizer.id("<|begin_of_text|>")) == (tokenizer.style == "llama3")
    assert tokenizer.decode(tokenizer.chat("hi")).count("hi") == 1


def apply_chat_template(folder: Path, text: str) -> list[int]:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [{"role": "user", "content": text}]
    return theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("text", WORDS)
def test_llama3_chat_equals_transformers(text, llama_folder):
    """Token for token apply_chat_template's, so one BOS, which comes first."""
    ids = Tokenizer(llama_folder).chat(text)
    assert ids == apply_chat_template(llama_folder, text)
    assert ids.index(0) == 0 and ids.count(0) == 1


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, SMOLLM_TEMPLATE, QWEN_TEMPLATE], ids=["own", "smollm2", "qwen"])
def test_chatml_chat_equals_transformers(template, make_chatml):
    """Token for token apply_chat_template's, with the system turn that the template adds by itself, if any."""
    folder = make_chatml(template)
    for text in WORDS:
        assert Tokenizer(folder).chat(text) == apply_chat_template(folder, text)


def test_chat_template_in_its_own_file(make_chatml, tmp_path):
    """transformers 5 saves the template as chat_template.jinja: it is found there, and saved along."""
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast.from_pretrained(make_chatml(SMOLLM_TEMPLATE)).save_pretrained(tmp_path / "a")
    expected = apply_chat_template(tmp_path / "a", "hi")
    assert Tokenizer(tmp_path / "a").chat("hi") == expected
    (tmp_path / "b").mkdir()
    Tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert Tokenizer(tmp_path / "b").chat("hi") == expected


def test_a_response_ends_with_the_end_token(tokenizer):
    ids = tokenizer.response("#### 7")
    assert ids == [*tokenizer.encode("#### 7"), tokenizer.end_id]
    assert tokenizer.end_id == tokenizer.id("<|eot_id|>" if tokenizer.style == "llama3" else "<|im_end|>")
    assert tokenizer.end_id in tokenizer.stop_ids
    assert tokenizer.decode(ids) == "#### 7"


def test_stop_ids_are_the_end_token_and_those_of_the_generation_config(llama_folder, chatml_folder):
    assert Tokenizer(llama_folder).stop_ids == {1, 4}
    assert Tokenizer(chatml_folder).stop_ids == {Tokenizer(chatml_folder).id("<|im_end|>")}


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer(tmp_path)
    assert again.chat("3 pens?") == tokenizer.chat("3 pens?")
    assert (again.stop_ids, again.end_id) == (tokenizer.stop_ids, tokenizer.end_id)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


# ---- batches -------------------------------------------------------------------------------------------------------


def test_collate_by_hand():
    """Entry t of the mask is about token t + 1; token 0 is a word like any other."""
    tokens, mask, lengths = collate([[5, 6], [0], [1, 2, 3]], [[7, 8], [0, 0, 0, 4], [9]])
    assert tokens.tolist() == [[5, 6, 7, 8, 0], [0, 0, 0, 0, 4], [1, 2, 3, 9, 0]]
    assert mask.int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]]
    assert lengths.tolist() == [4, 5, 4]
    assert mask.dtype == torch.bool and tokens.dtype == torch.long
    with pytest.raises(ValueError):
        collate([[1]], [[2], [3]])


def test_the_mask_selects_exactly_the_response():
    """tokens[:, 1:][mask] is every response in full and nothing else; tokens[:length] is prompt + response."""
    rng = random.Random(0)
    for rows in range(1, 40):
        prompts, responses = ([rng.choices(range(6), k=rng.randint(1, 7)) for _ in range(rows)] for _ in range(2))
        tokens, mask, lengths = collate(prompts, responses)
        assert mask.shape == (rows, tokens.shape[1] - 1) and tokens.shape[1] == lengths.max()
        for row in range(rows):
            assert tokens[row, 1:][mask[row]].tolist() == responses[row]
            assert tokens[row, : lengths[row]].tolist() == prompts[row] + responses[row]


@pytest.mark.parametrize("n, size", [(0, 4), (1, 4), (4, 4), (97, 1), (97, 4), (128, 8), (129, 8), (5, 9)])
def test_an_epoch_has_every_index_once(n, size):
    """Each index exactly once, full batches but for one, and the generator alone decides the order."""
    lengths = [1 + i * i % 23 for i in range(n)]
    epoch = list(batches(lengths, size, torch.Generator().manual_seed(0)))
    assert sorted(i for batch in epoch for i in batch) == list(range(n))
    assert sorted(map(len, epoch), reverse=True)[:-1] == [size] * (len(epoch) - 1)
    assert epoch == list(batches(lengths, size, torch.Generator().manual_seed(0)))
    assert n < 90 or epoch != list(batches(lengths, size, torch.Generator().manual_seed(1)))


def test_epochs_differ_and_a_batch_is_a_fair_sample_sorted_by_length():
    """One generator gives another order each epoch; within a batch rows are sorted, so its micro-batches hold little
    padding; a batch's mean length scatters no more than that of rows drawn at random, or the kinds would be parted."""
    rng, lengths = torch.Generator().manual_seed(0), [i % 40 + 1 for i in range(400)]
    epochs = [list(batches(lengths, 16, rng)) for _ in range(20)]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 20
    assert all([lengths[i] for i in b] == sorted(lengths[i] for i in b) for epoch in epochs for b in epoch)
    means = torch.tensor([sum(lengths[i] for i in b) / 16 for epoch in epochs for b in epoch])  # (20 * 25,)
    assert 2.4 < means.std() < 3.4  # 11.5 / 4; some 11 if a batch held one length


def test_question_prompt_without_extras():
    assert Question("i", "3+4?").prompt == "3+4?"
