"""answers.py: answers read as a person reads them, and as the official graders read them."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
from conftest import real_data

import answers
from answers import canonical, extract_answer, is_correct
from data import load_questions

NUMBERS = [  # text, strict, lenient
    # the four announcements
    ("3+4=7\n#### 7", "7", "7"), ("####7", "7", "7"), ("She has 3+4=7.\nA: 7", "7", "7"), ("Answer: 42", "42", "42"),
    ("So the answer is 7.", "7", "7"), ("The final answer is\n\n7", "7", "7"), ("Therefore \\boxed{7}", "7", "7"),
    # how numbers are written
    ("3+4=7\n#### 1,007.", "1007", "1007"), ("The answer is: **$1,234**.", "1234", "1234"), ("#### - 5", "-5", "-5"),
    ("#### -$5", "-5", "-5"), ("#### $-5", "-5", "-5"), ("#### −5", "-5", "-5"), ("#### -0", "0", "0"),
    ("#### 2.50", "2.5", "2.5"), ("#### 007", "7", "7"), ("#### .5", "0.5", "0.5"), ("#### 1/5", "0.2", "0.2"),
    ("#### 10%", "10", "10"), ("#### 5 apples", "5", "5"),
    # several numbers: the first announcement counts, without one the last number, and only if lenient
    ("3+4=7\n#### 7\n\nQ: Tom has 5 more.\n#### 12", "7", "7"), ("#### 7 or 8", "7", "7"),
    ("3 apples and 4 pears are 7 fruits", None, "7"), ("He pays $1,250.75 in all.", None, "1250.75"),
    ("It was -3 degrees.", None, "-3"), ("It takes 5-10 days", None, "10"),  # a hyphen between numbers is no minus
    ("answer = 5", None, "5"), ("DNA: 7 of 9", None, "9"),
    ("At job A: 2000 hours * $15 = 30000\n#### 8400", "8400", "8400"),  # a label within a line states nothing
    # what is no number of its own
    ("He comes at 12:30.", None, None), ("It is due on the 5th", None, None), ("Take 2 of H2O", None, "2"),
    ("3 apples\n- 5 pears", None, "5"), ("about 10^6", None, None), ("so -\\frac{3}{4}", None, "-0.75"),
    ("He needs 1 1/2 cups", None, "1.5"), ("It is 1 in 3, or 10 000 in all", None, "10000"),
    # no answer
    ("I do not know.", None, None), ("", None, None), ("#### seven", None, None), ("-,.$", None, None)]
CHOICES = [
    ("The answer is (C).", "C", "C"), ("the answer is: B)", "B", "B"), ("the answer is (c)", "C", "C"),
    ("**Answer:** B", "B", "B"), ("A: F", "F", "F"), ("#### E", "E", "E"), ("\\boxed{\\text{D}}", "D", "D"),
    ("The answer is I.", "I", "I"), ("The answer is (C).\n\nQ: next\nThe answer is (D).", "C", "C"),
    ("A: Apple\nB: Bear\nThe answer is (B).", "B", "B"), ("I think it is C.", None, "C"),
    ("The answer is a bit hard to see. The answer is (C).", "C", "C"),  # 'a' is English, not option A
    ("Option B is wrong, so D", None, "D"), ("The answer is K.", None, None), ("The answer is Blue", None, None),
    ("CAB FAD BED", None, None), ("It is a guess", None, None), ("", None, None)]
CALCULATIONS = [
    ("8 - 4", "4", "4"), ("(3 + 4) * 2.5", "17.5", "17.5"), ("10 / 3", "10/3", "10/3"), ("7", "7", "7"),
    ("-3 + 1", "-2", "-2"), ("42 + (18 - 9)\n", "51", "51"), ("2 - 3 * 4 - 5", "-15", "-15"), ("8 / 4 / 2", "1", "1"),
    (".5 + 0.25.", "0.75", "0.75"), ("9 × 15", "135", "135"), ("9 x 15", "135", "135"), ("8 ÷ 2", "4", "4"),
    ("1,000 + $2.50", "1002.5", "1002.5"), ("0.1 + 0.2", "0.3", "0.3"),
    ("0.33333333333333333333 * 3", "0.99999999999999999999", "0.99999999999999999999"),
    ("<think>3 + 3</think>8 - 4", "4", "4"),
    ("3 + 4 = 8", "7", "7"), ("8 - 4 = 4 marbles. The answer is 4.", "4", "4"),  # what the model makes of it is nothing
    ("Tom has 3 + 4 = 8 pens.", None, "7"), ("First 3 + 4 = 7, then 7 * 2 = 15.", None, "14"),
    ("She has .5 + 4 left.", None, "4.5"), ("7 pens", None, None), ("It takes 8 hours.", None, None),
    ("3 / 0", None, None), ("3 ** 4", None, None), ("7 // 2", None, None), ("3(4)", None, None), ("3 +", None, None),
    ("(3 + 4", None, None), ("2.5.5 + 1", None, None), ("x + 3", None, None), ("", None, None), ("=", None, None)]
NUMBER_STYLES = [  # text, strict
    # GPT-4: prose, LaTeX in \( \) and \[ \], bold
    ("\\[\n\\text{Total} = 9 \\times 2 = 18\n\\]\n\nThe answer is \\( 18 \\).", "18"),
    ("#### 1. Add the eggs\n3 + 4 = 7\n\n#### 2. Double them\n14\n\nThe answer is 14.", "14"),
    ("The answer is \\( -\\frac{1}{2} \\).", "-0.5"), ("The answer is: \\[ 12.5\\% \\]", "12.5"),
    ("**Answer:**\n1. Ava has 3 pens.\n2. She buys 4.\n\nThe answer is 7.", "7"),
    ("Answer:\n\n1. Multiply 3 by 4.\n2. Add 5.\n\n**17**", None), ("The answer to the question is 36.", "36"),
    ("Hence, the final answer is $\\$1{,}234.50$.", "1234.5"), ("The answer is 3 million.", "3000000"),
    ("The answer is \\(2.5 \\times 10^{3}\\) joules.", "2500"), ("The answer is 1.5e3.", "1500"),
    ("It takes 2½ hours. The answer is 2½.", "2.5"), ("The answer is €45.", "45"), ("The answer is 3:4.", None),
    # Llama 3: sentences, 'The final answer is: $\\boxed{}$', GSM8K's hashes from few shots
    ("Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", "18"), ("#### 5 + 3 = 8", "8"), ("#### 1 1/2", "1.5"),
    ("The answer is 18.\n\nQ: A car costs 5 dollars. The answer is 5.", "18"), ("Answer: 18<|eot_id|>", "18"),
    ("A: 14\n\nQ: next\nA: 3", "14"), ("The answer is 1/2 * 8 = 4.", "4"), ("#### 1, 2 and 3", "1"),
    # Qwen: everything in a box
    ("\\boxed{\\tfrac13}", "1/3"), ("\\boxed{1\\frac{1}{2}}", "1.5"), ("\\boxed{x=-5}", "-5"),
    ("\\boxed{\\text{18 dollars}}", "18"), ("\\boxed{18 \\text{ dollars}}", "18"), ("\\boxed{\\$1,234.56}", "1234.56"),
    ("\\boxed{1,\\!234}", "1234"), ("\\boxed{\\mathbf{42}}", "42"), ("\\boxed{2\\sqrt{3}}", None),
    ("\\boxed{2^{10}}", None), ("\\boxed{0.5 \\text{ or } \\frac{1}{2}}", "0.5"), ("因此，答案是 \\boxed{18}。", "18"),
    ("The answer is 5 at first sight, but the box says \\boxed{6}.", "6"), ("The answer is １８.", "18"),
    # Mistral: 'The answer is', often with a unit or an explanation behind it
    ('The answer is "4".', "4"), ("the answer is 1\u202f000\u202f000", "1000000"), ("the answer is 12,34", None),
    ("the answer is 3,5", None), ("the answer is 2024-05-01", None), ("the answer is 1.234.567", None),
    ("Here's how to solve it:\n\n* 3 + 4 = **7**\n\n**Answer:** The total is **7**", None), ("*Answer*: 7", "7"),
    # DeepSeek-R1: thinking first, which is no answer; taking an answer back
    ("<think>\nSo the answer is 5? Wait, \\boxed{5} ignores the tax.\n</think>\n\nThe answer is \\boxed{6}.", "6"),
    ("<think>3+4=7</think><answer>7</answer>", "7"), ("<think>\n#### 5\n</think>\n\nI am not sure.", None),
    ("The answer is 5.\n\nActually, let me correct that: the answer is 6.", "6"),
    ("#### 5\nWait, I made a mistake.\n#### 6", "6"), ("The answer is 5. Wait, that may be wrong.", "5"),
    # phi: 'Answer:' first, then exercises it makes up
    ("Answer: 18\n\nExercise 2:\nTom has 3 pens.\nAnswer: 3", "18"), ("Answer: 9 * 2 = 18", "18"),
    ("Answer: Alice has 7 pens", None), ("Answer: 7 or 8", "7"), ("The answer is 1/0.", None)]
CHOICE_STYLES = [
    ("The correct answer is (C) 12 mV.", "C"), ("The correct answer is **C. 12 mV**.", "C"), ("answer: (c)", "C"),
    ("Answer: C. Paris", "C"), ("Answer:\n\nC", "C"), ("The answer is option C.", "C"), ("The best answer is C.", "C"),
    ("\\boxed{\\textbf{(C)}}", "C"), ("\\boxed{C. 12}", "C"), ("The answer is \\(\\mathbf{C}\\).", "C"),
    ("<think>It could be A. The answer is (A)?</think>\n\nThe answer is (B).", "B"), ("<answer>D</answer>", "D"),
    ("The answer is Apple.", None), ("The answer is Both A and B.", None), ("The answer is not A.", None),
    ("The answer is 12.", None), ("Answer: Because the cell divides", None),
    ("The answer is (B). Wait, B ignores friction. The answer is (D).", "D"),
    ("The answer is (B) or (D). The answer is (D).", "B"),  # the official rule: the first
    ("(A) is wrong.\n(B) is wrong.\nAnswer: (E)", "E")]


KINDS = {  # what people's files hold: a text and what it states; None is right where one cannot be sure
    "letters": {  # no option: a formula, a name, a list
        "The answer is F = ma.": None, "\\boxed{E(X) = 3}": None, "The answer is A_1.": None,
        "The answer is C-14.": None, "The answer is A/B.": None, "The answer is B + C.": None,
        "The answer is $A \\cup B$.": None, "Answer: C++": None, "The answer is D's share.": None,
        "The answer is J. S. Bach.": None, "The answer is G. Hill, who": None, "The answer is B cells.": None,
        "Answer: A bird": None, "Answer: I'm not sure.": None, "The answer is C?": None,
        "The answer is A, C and D.": None, "The answer is B and C.": None, "The answer is (B, D).": None,
        "Answer:\n(A) red\n(B) blue": None, "The answer is (a) 12 and (b) 15.": None,
        "The answer is (i) and (iii).": None, "#### B. Solving\nThe answer is (D).": "D",
        "#### A plan\nThe answer is (D).": "D", "The answer is A₁.": None,
        "The answer is (a) 5 (b) 6. The answer is (D).": "D", "The answer is C is wrong.": None,
        "The answer is A → B.": None, "The answer is A:B = 2.": None, "The answer is B.1.": None,
        "\\boxed{A, B, C}": None, "#### (A) Plan\nThe answer is (D).": "D", "#### **A: Plan**\nThe answer is (D).": "D",
        "#### (C)": "C", "The answer is D 5 m/s": None, "Answer: C.Paris": "C", "The answer is C, as F = ma.": "C",
        "The answer is C (5 mV).": "C", "The answer is C - 5 mV": "C", "The answer is (D) F = ma.": "D",
        "The answer is (C) and (A) is wrong.": "C", "The answer is C, I think.": "C",
        "The answer is A because B is too big.": "A", "Answer: C. Paris, the capital": "C", "The answer is （C）.": "C",
        "Answer: [C]": "C", "Answer: <C>": "C", "Answer: `C`": "C", "\\boxed{\\textsf{(C)}}": "C", "C or so": None},
    "equations": {
        "The answer is $12 \\div 4 = 3$.": "3", "#### 12 ÷ 4 = 3": "3", "#### 5 x 4 = 20": "20",
        "#### 5 x $4 = $20": "20", "The answer is 20 divided by 4 = 5.": "5", "#### 3 times 4 equals 12": "12",
        "The answer is half of 20 = 10.": "10", "#### 50% of 80 = 40": "40",
        "#### 10 square meters * 2 = 20 square meters": "20", "A: 3 boxes of 4 pens = 12": "12",
        "The answer is (3+4)*2 = 14.": "14", "#### 3(4) = 12": "12", "\\boxed{\\sqrt{16} = 4}": "4",
        "\\boxed{x = \\frac{6}{2} = 3}": "3", "\\boxed{\\text{Total cost} = \\$12}": "12",
        "#### 1,000 + 5 = 1,005": "1005", "The answer is 7, since n = 2.": "7", "The answer is 7 if n = 2.": "7",
        "The answer is 7 (n = 2).": "7", "\\boxed{7} for n = 2": "7", "The answer is 7. Here x = 3.": "7",
        "#### 7\nx = 3": "7", "#### 5 + 3 = x": None, "#### 12 = 3 * 4": None, "\\boxed{2x = 10}": None,
        "The answer is x + 3 = 8.": None, "#### 5 + n = 8": None, "3 pens\n#### 3 pens at $2 each = $6": "6",
        "\\boxed{|x| = 5}": None, "\\boxed{\\sin x = 0.5}": None, "The answer is 7 for n = 2": "7",
        "#### 5 feet = x inches": None, "The answer is x = 5 or x = -5.": None, "\\boxed{x = 5, y = 6}": None},
    "digits": {
        "\\boxed{1\\ 000}": "1000", "\\boxed{12~345}": "12345", "\\boxed{1\\,234\\;567}": "1234567",
        "#### 1'234'567": "1234567", "\\boxed{1\\:000}": "1000", "\\boxed{12\\thinspace 345}": "12345",
        "#### 1’000": "1000", "#### 1,00,000": "100000", "#### ₹12,34,567.50": "1234567.5",
        "\\boxed{10\\text{,}000}": "10000", "\\boxed{1,\\,000}": "1000", "\\boxed{5\\,\\text{km}}": "5",
        "#### 1, 000": None, "#### 12,345,67": None, "#### 1,0000": None, "#### 5'10": None},
    "scales": {
        "The answer is 1.5 Million.": "1500000", "The answer is $1.5M.": "1500000", "#### 20K": "20000",
        "#### $4 mn": "4000000", "#### $3bn": "3000000000", "\\boxed{3 \\text{ million}}": "3000000",
        "The answer is **1.5** million.": "1500000", "#### 2 hundred thousand": "200000", "#### 3 millions": "3000000",
        "#### 1.5 crore": "15000000", "#### $5m": "5000000", "#### 5m": "5", "$5 m$\n#### $5 m$": "5",
        "#### 10km": "10", "#### 3 Kings": "3", "The answer is 300 K.": None, "#### 2 thousand 500": None,
        "#### 3 thousandths": None, "#### 3 hundred and five": None, "#### 3 mil": None, "#### 1.5-million": None,
        "#### 2T": None},
    "fractions": {
        "#### 2 ⅓": "7/3", "#### 2½": "2.5", "#### ⅞": "0.875", "#### -¼": "-0.25", "#### 1⁄2": "0.5",
        "#### 3 / 4": "0.75", "#### 3 and 1/2": "3.5", "\\boxed{\\cfrac{3}{4}}": "0.75",
        "\\boxed{\\frac{ 3 }{ 4 }}": "0.75", "\\boxed{\\frac{-3}{4}}": "-0.75", "\\boxed{2 \\frac{1}{2}}": "2.5",
        "\\boxed{\\frac{1,000}{3}}": "1000/3", "\\boxed{\\frac{1.5}{2}}": "0.75",
        "\\boxed{\\left(\\frac 1 2\\right)}": "0.5", "\\boxed{\\frac{3}{4}\\pi}": None, "\\boxed{\\frac{x}{2}}": None,
        "#### 3 and a half": None, "#### 1/2/3": None, "#### 2/3 of 9": None, "#### 5 sixths": None,
        "#### 3/4 of it": "0.75"},
    "signs and powers": {
        "#### +3": "3", "#### +$5": "5", "#### negative 5": "-5", "The answer is minus $5.": "-5", "#### －5": "-5",
        "#### ‑5": "-5", "\\boxed{\\text{-}5}": "-5", "#### ±5": None, "Answer:\n- 5 pens\n- 3 cups": None,
        "#### 2.5×10³": "2500", "#### 2.5 × 10⁻³": "0.0025", "#### 1e+06": "1000000", "#### 6*10**3": "6000",
        "\\boxed{6 \\cdot 10^{+3}}": "6000", "#### 5 cm²": "5", "#### 5²": None, "#### 1e400": None,
        "\\boxed{90^\\circ}": "90"},
    "parts": {  # of an expression, a range, a list, a length
        "\\boxed{5x}": None, "#### 5 + x": None, "#### 2π": None, "\\boxed{5t}": None, "\\boxed{2 + \\sqrt{3}}": None,
        "#### 2^-1": None, "\\boxed{2 : 3}": None, "#### 5 times 4": None, "#### 5 to 7": None, "#### 5 or more": None,
        "#### 5% of 20": None, "\\boxed{(2, 3)}": None, "\\boxed{[1, 5]}": None, "\\boxed{5 \\text{ and } 6}": None,
        "#### 2 hours 30 minutes": None, "#### 5 pens and 6 cups": None, "\\boxed{0.\\overline{3}}": None,
        "\\boxed{11_2}": None, "\\boxed{5 \\le x}": None, "\\boxed{5!}": None, "#### 5 more than 6": None,
        "#### 5?": None, "#### 5 squared": None, "#### 5 in total": "5", "#### 5 and it is late": "5", "#### 5!": "5",
        "#### 5 times": "5", "#### 5, 6 and 7": "5"},
    "taken back": {
        "The answer is 5. No, that's incorrect. The answer is 6.": "6", "The answer is not 5 but 7.": "7",
        "The answer is not 5.": None, "The answer isn't 5, it's 7.": "7", "The answer is no longer 5 but 7.": "7",
        "The answer is 5? No. The answer is 6.": "6", "#### 5\nWait, I made a mistake. The answer is 6.": "6",
        "The answer is 5. Hold on, the answer is 6.": "6",
        "The answer is 5. However, that is not correct. The answer is 6.": "6", "#### 5 is wrong. #### 6": "6",
        "The answer is 5. But he ate 2, so the answer is 3.": "3", "The answer is 5. Wait, 5 + 3 = 8.": None,
        "The answer is 5, no, 7.": None, "The answer is 5, or rather 6.": None, "The answer is 5, not 7.": "5",
        "Answer: 4\n#### 5\nOops!": "5", "The answer is 7. He did not wait 3 hours.": "7"},
    "labels": {
        "Result: 42": "42", "Answer = 42": "42", "Final answer - 42": "42", "**Final Answer**\n\n$42$": "42",
        "## Answer\n42 pens\n": "42", "<ANSWER>42</ANSWER>": "42", "<answer>The total is 42.</answer>": "42",
        "\\boxed{\\text{Answer: } 42}": "42", "\\boxed {42}": "42", "__Answer__: 42": "42",
        "The answer is exactly 42.": "42", "The answer is US$42.": "42", "Final Answer\n2 apples and 3 pears.": None,
        "## Answer\n42 is what she had at first, before she sold some.": None, "The answer is at least 42.": None,
        "Is 42 the result? 7": None}}


@pytest.mark.parametrize("kind, text, strict, lenient", [
    *[("number", *row) for row in NUMBERS], *[("choice", *row) for row in CHOICES],
    *[("calculation", *row) for row in CALCULATIONS]])
def test_answers_as_people_write_them(kind, text, strict, lenient):
    assert (extract_answer(text, kind), extract_answer(text, kind, lenient=True)) == (strict, lenient)


@pytest.mark.parametrize("kind, text, stated", [
    *[("number", *row) for row in NUMBER_STYLES], *[("choice", *row) for row in CHOICE_STYLES]])
def test_answers_as_models_write_them(kind, text, stated):
    assert extract_answer(text, kind) == stated
    assert stated is None or extract_answer(text, kind, lenient=True) == stated


@pytest.mark.parametrize("name", KINDS, ids=lambda name: name.replace(" ", "_"))
def test_answers_of_each_kind(name):
    """Strict is right; lenient says the same where an answer is stated."""
    kind = "choice" if name == "letters" else "number"
    assert {text: extract_answer(text, kind) for text in KINDS[name]} == KINDS[name]
    stated = {text: answer for text, answer in KINDS[name].items() if answer is not None}
    assert {text: extract_answer(text, kind, lenient=True) for text in stated} == stated


@pytest.mark.parametrize("text, lenient", [
    ("They sold 20K", "20000"), ("It costs $1.5M", "1500000"), ("It was negative 5 degrees", "-5"), ("20 minus 5", "5"),
    ("He ate 1¾ pizzas", "1.75"), ("so it is \\cfrac{2}{5}", "0.4"), ("The total is 1'500.", "1500"), ("Add +3", "3")])
def test_numbers_are_read_leniently_in_the_same_forms(text, lenient):
    assert (extract_answer(text, "number"), extract_answer(text, "number", lenient=True)) == (None, lenient)


@pytest.mark.parametrize("text, stated", [
    ("<think>\nSo the answer is 5? No, I forgot", None), ("<think>The answer is 5. Let me check", None),
    ("<think>a</think><think>the answer is 5</think>#### 4", "4"), ("#### 5</think>#### 4", "4"),
    ("#### 4\n<think>or is the answer 5?</think> That is all.", "4"), ("#### 4 <think>#### 5", "4"),
    ("<think>#### 5</think>", None), ("<think>\n<think>#### 5</think>#### 4", "4"),
    ("<think>#### 5 <think>#### 6</think> #### 7</think>#### 4", "4"), ("#### 5</think>#### 4</think>", "4"),
    ("#### 5</think> <think>#### 6</think>#### 4 <think>#### 7</think>", "4"), ("<think >#### 5</think>#### 4", "4"),
    *[(f"{opening}#### 5{closing}#### 4", "4") for opening, closing in [
        ("<thinking>", "</thinking>"), ("<thought>", "</thought>"), ("<Thought>", "</Thought>"),
        ("<reasoning>", "</reasoning>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
        ("◁think▷", "◁/think▷"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|START_THINKING|>", "<|END_THINKING|>"), ("analysisWe add. ", "assistantfinal"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")]],
    *[(f"{opening}#### 5", None) for opening in (
        "<thinking>", "<thought>", "<reasoning>", "<seed:think>", "[THINK]", "◁think▷", "<|begin_of_thought|>",
        "<|channel|>analysis<|message|>", "<|START_THINKING|>")],
    ("<|channel|>final<|message|>#### 4<|return|>", "4"), ("I think: #### 4<|end|>", "4"), ("[think] #### 4", "4")])
def test_what_was_only_thought_is_no_answer(text, stated):
    """Closed or not, one or several, in every family's tags; a template may have opened it."""
    assert extract_answer(text, "number") == stated
    assert extract_answer(text, "number", lenient=True) == stated


@pytest.mark.parametrize("text, kind, expected", [
    (" $1,234.50 ", "number", "1234.5"), ("7.", "number", "7"), ("-0.0", "number", "0"), ("1e6", "number", "1000000"),
    ("7 apples", "number", None), ("1,23", "number", None), ("1.2.3", "number", None), ("5-3", "number", None),
    ("1/0", "number", None), ("9" * 100_000, "number", None), ("9" * 250 + "e99", "number", None),
    # one spelling of equal values: exact, as a decimal where that has an end
    ("4/2", "number", "2"), ("\\frac{1}{2}", "number", "0.5"), ("-4/6", "number", "-2/3"), ("-1 1/2", "number", "-1.5"),
    ("-3/1000", "number", "-0.003"), ("0.1" + "0" * 40 + "1", "number", "0.1" + "0" * 40 + "1"),
    ("1.5e-3", "number", "0.0015"), ("2 \\times 10^{3}", "number", "2000"), ("-1.8 billion", "number", "-1800000000"),
    ("7%", "number", "7"), ("\u2212$5", "number", "-5"), ("(c)", "choice", "C"), ("J.", "choice", "J"),
    ("K", "choice", None), ("AB", "choice", None), ("", "choice", None)])
def test_canonical_is_one_spelling_or_none(text, kind, expected):
    assert canonical(text, kind) == expected


@pytest.mark.parametrize("kind", ["number", "choice", "calculation"])
def test_any_text_has_one_canonical_answer_or_none(kind):
    """No exception; an answer is its own canonical form, is found again where it is stated; strict implies lenient."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    pieces = st.sampled_from([
        "####", "\\boxed{", "\\frac{", "\\frac12", "}{", "}", "A: ", "\nA:", "Answer: ", "answer is ", "Wait, ",
        "x = ", " + ", " = ", "\\times 10^{", "e9", " million", "1/", "1 1/2", "(C)", "B", "</think>", "12", ",345",
        ".5", "-", "(", ")", "*", "$", "%", " ", "\n", "½", "１", "٣"])

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.lists(pieces | st.text(max_size=8), max_size=12).map("".join))
    def check(text):
        strict, lenient = extract_answer(text, kind), extract_answer(text, kind, lenient=True)
        for answer in (strict, lenient, canonical(text, kind)):
            assert answer is None or (canonical(answer, kind) == answer and answer.isascii())
            assert answer is None or re.fullmatch(r"-?\d+(\.\d*[1-9]|/\d+)?" if kind != "choice" else "[A-J]", answer)
        assert strict is None or lenient == strict
        mark = "" if kind == "calculation" else "#### "
        assert lenient is None or extract_answer(f"{mark}{lenient}", kind) == lenient

    check()


def test_fuzzed_numbers_are_read_from_every_spelling():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    marks = ["#### {}", "\\boxed{{{}}}", "The answer is {}.", "**Answer:** {}", "A: {}", "The answer is \\( {} \\).",
             "the answer is **{}** pens\n\nQ: 5", "<answer>{}</answer>", "\\boxed{{x = {}}}", "#### 3 * 4 = {}"]
    commas = [",", "{,}", ",\\!", "\\,", "\\;", "\\:", "\\ ", "~", "'", "’", "_", " ", "\u202f", ""]
    units = {"": 1, "%": 1, "\\%": 1, " dollars": 1, "\\text{ cm}": 1, " km/h": 1, "** pens": 1, "$": 1,
             " Million": 10**6, "\\text{ billion people}": 10**9, " thousand": 1000}

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        st.sampled_from(marks), st.integers(0, 10**15), st.integers(0, 999),
        st.sampled_from(["", "-", "−", "－", "negative ", "+", "$", "-$", "$-"]), st.sampled_from(commas),
        st.sampled_from(sorted(units)))
    def check(mark, whole, thousandths, sign, comma, unit):
        value = Fraction(whole * 1000 + thousandths, 1000) * (-1 if sign.strip("+$") else 1) * units[unit]
        digits = f"{whole:,}".replace(",", comma) + (f".{thousandths:03}" if thousandths else "")
        answer = extract_answer("First 2 + 2 = 4.\n" + mark.format(sign + digits + unit), "number")
        assert answer is not None and Fraction(answer) == value
        assert is_correct(answer, str(value), "number") and not is_correct(answer, str(value + 1), "number")

    check()


def test_a_calculation_is_worth_what_it_is_worth():
    """Random trees of sums, differences, products and quotients, and what they come to step by step."""
    random = Random(0)
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}

    def tree(depth):
        if depth == 0 or random.random() < 0.2:
            number = f"{random.randrange(1, 100)}{random.choice(['', '.5', '.03'])}"
            return number, Fraction(number)
        (left, a), (right, b), sign = tree(depth - 1), tree(depth - 1), random.choice("+-*/")
        return f"({left}{random.choice(['', ' '])}{sign} {right})", operations[sign](a, b) if b or sign != "/" else None

    worths = []
    for _ in range(300):
        try:
            text, worth = tree(3)
        except TypeError:  # a part of it was divided by zero
            continue
        worths.append(worth)
        found = extract_answer(text, "calculation")
        assert (worth is None and found is None) or Fraction(found) == worth, text
        assert worth is None or is_correct(found, str(worth), "calculation")
    assert len(set(worths)) > 250


@pytest.mark.parametrize("unit", [
    "7", "1,", "1,234,", " 111", "111{,}", " ", "\n", "#### ", "answer is ", "answer: ", "answer to ", "\\boxed{",
    "\\frac{1}", "- ", "$", "1/", "1 x ", "answer is 1 + 1 + ", "answer is x = ", "*", "\nA:", "</think>",
    "<think ", "<think>", "answer is 5. Wait, ", "1 * 10^", "1 million ", "#### 1. ", "12:", "answer is not 5 ",
    "answer is (1+", "1 = ", "\nAnswer\n", "<answer>is ", "A, ", "answer is A. ", "½",
    "1'234", "1 hundred ", "5 pens and ", "(", "1 + ", ". ", "1 x 1 ="], ids=repr)
def test_the_time_is_linear_in_the_length_of_garbage(unit):
    """Four times the text takes about four times as long (sixteen if a pattern backtracks), and little in any case."""

    def seconds(length, head, tail):
        best, text = 9.0, head + unit * (length // len(unit)) + tail
        for _ in range(2):
            start = time.process_time()
            for kind in ("number", "choice", "calculation"):
                extract_answer(text, kind, lenient=True)
                canonical(text, kind)
            best = min(best, time.process_time() - start)
        return best

    for head, tail in (("", ""), ("#### ", "^2")):
        small, large = seconds(5_000, head, tail), seconds(20_000, head, tail)
        assert large < max(10 * small, 0.1) and large < 1


@pytest.mark.parametrize("answer, gold, kind, expected", [
    ("7.0", "7", "number", True), ("$1,000", "1000", "number", True), ("1/2", "0.5", "number", True),
    ("0.333", "1/3", "number", False), ("-7", "7", "number", False), ("70", "7", "number", False),
    ("c", "C", "choice", True), ("C", "D", "choice", False), (None, "7", "number", False), ("7", None, "number", False),
    (None, None, "number", False), ("pear", "plum", "number", False), ("", "", "choice", False)])
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


def test_texts_from_the_field_are_read_or_passed_over():
    """75 texts after public bug reports: no answer is wrong, and most are read."""
    rows = [json.loads(line) for line in real_data("field/answers.jsonl").open(encoding="utf-8")]
    strict = [extract_answer(row["text"], row["kind"]) for row in rows]
    wrong = {row["text"]: got for row, got in zip(rows, strict) if got is not None and got != row["want"]}
    assert len(rows) == 75 and wrong == {}
    assert sum(got == row["want"] is not None for row, got in zip(rows, strict)) >= 60


def test_verdicts_on_gsm8k_solutions_are_the_official_ones():
    """2,640 solutions of four systems: our strict reading judges every one as OpenAI did."""
    rows = [json.loads(line) for line in real_data("gsm8k/judged_solutions.jsonl").open(encoding="utf-8")]
    golds = [row["reference"].rsplit("A:", 1)[1].replace(",", "").strip() for row in rows]
    verdicts = [is_correct(extract_answer(row["response"], "number"), gold, "number") for row, gold in zip(rows, golds)]
    wrong = [i for i, (row, verdict) in enumerate(zip(rows, verdicts)) if verdict != row["is_correct"]]
    assert len(rows) == 2640 and 0.3 < sum(verdicts) / 2640 < 0.7
    assert wrong == []


def test_letters_of_mmlu_pro_answers_and_the_accuracy_are_the_official_ones():
    """12,032 answers of Llama-3.1-8B. The three exceptions, by question: 840 says 'the closest answer is A1's share',
    where A1 is a name; 6414 'the correct answer is Elizabeth F. Loftus'; 6915 'the answer is (A, C)'. MMLU-Pro
    counts a random letter where it finds none (694 times, 73 of them right): 44.19 %, and 43.58 % without."""
    with gzip.open(real_data("mmlu_pro/llama-3.1-8b-instruct.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sentence, label = re.compile(r"answer is \(?([A-J])\)?"), re.compile(r"^.*[aA]nswer:\s*([A-J])", re.MULTILINE)
    lone = re.compile(r"(?s:.*)\b([A-J])\b")
    differ, found = {}, []
    for row in rows:
        text = row["generated_text"]
        first = sentence.search(text)
        second = first or label.search(text) or lone.match(text)
        official = tuple(match and match[1] for match in (first, second))
        assert official[1] in (None, row["pred"])  # the rule as written here is the one that made the file
        ours = extract_answer(text, "choice"), extract_answer(text, "choice", lenient=True)
        found.append(ours[1])
        if ours != official:
            differ[row["question_id"]] = (official, ours)
    assert differ == {
        840: (("A", "A"), ("E", "E")), 6414: (("E", "E"), (None, "F")), 6915: (("A", "A"), (None, "D"))}
    published = sum(is_correct(a or row["pred"], row["answer"], "choice") for a, row in zip(found, rows))
    honest = sum(is_correct(a, row["answer"], "choice") for a, row in zip(found, rows))
    assert (len(rows), published, honest, found.count(None)) == (12032, 5317, 5244, 694)


def test_the_bench_runs_from_anywhere_without_data(tmp_path):
    script = Path(answers.__file__).parent / "bench" / "extract.py"
    environment = {name: value for name, value in os.environ.items() if name != "DATA_DIR"}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "responses/s" in done.stdout, done.stderr
