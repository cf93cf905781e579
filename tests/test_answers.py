"""answers.py: answers read as a person reads them, and as the official graders read them."""

import gzip
import json
import random
import re
from collections import Counter

import pytest
from conftest import real_data

from answers import canonical, extract_answer, is_correct
from data import load_questions

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


