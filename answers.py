r"""The final answer in a text, in one spelling: one function for the vote, the reward and the score alike.

`extract_answer` reads it, strictly (an answer that is stated) or leniently (else the last one mentioned). Two kinds:
'number' (GSM8K) and 'choice' (a letter, MMLU-Pro).

    '... 3+4=7\n#### 7'  stated: 7      '12 of the 20 pens'     lenient: 20
    'The answer is (C)'  stated: C      'The answer is five.'   none

The time is linear in the length of the text: a repetition in these patterns is bounded, or what may follow it cannot
be one more of it.
"""

import re
from collections import deque
from decimal import Decimal
from fractions import Fraction

# ---- how a number and a letter are written ---------------------------------------------------------------------------

PLAIN = {  # LaTeX and typography that only decorate
    **dict.fromkeys(["\N{MINUS SIGN}", "\N{EN DASH}"], "-"),
    **{"{,}": ",", r"\!": "", r"\,": "\N{THIN SPACE}", r"\$": "$", r"\%": "%", r"\(": "(", r"\[": "["},
    **dict.fromkeys([r"\times", r"\cdot", "×", "·"], "*"),
    **dict.fromkeys([r"\textbf", r"\text", r"\mathbf", r"\mathrm", r"\mathbb", r"\displaystyle"], ""),
    **dict.fromkeys([r"\dfrac", r"\tfrac"], r"\frac"),
    **{"½": " 1/2", "¼": " 1/4", "¾": " 3/4"},
}
FANCY = re.compile("|".join(map(re.escape, PLAIN)))
FRAC = re.compile(r"\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))")

COMMA = "[,_ \N{FULLWIDTH COMMA}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}\N{NO-BREAK SPACE}]"
DIGITS = rf"(?:\d{{1,3}}(?:{COMMA}\d{{3}})+(?!\d)|\d+)"
NUMBER = rf"""
    (?P<sign> (?:-\ ?)? (?:[$€£¥₹]\ ?-?)? )                                     # -5, - 5, $5, -$5, $-5
    (?: (?:(?P<mixed>\d+)\ )? (?P<top>{DIGITS})/(?P<bottom>\d+)                 # 3/4, 1 3/4
      | (?P<decimal>{DIGITS}(?:\.\d+)?|\.\d+)                                   # 1,234.50, 0.5, .5
        (?: (?:[eE]\+?|\ ?[x*]\ ?10\^\{{?) (?P<power>-?\d{{1,2}})\b\}}? )? )    # 2.5e3, 2.5 * 10^{{3}}
    (?:\ (?P<scale>thousand|million|billion)\b)?
    (?! [.,:/]?\d | \ ?[-+*^]\ ?[({{]?\d | \ ?\\(?:pi|sqrt) )                   # but no part of 12:30, 3,5, 5+3, 2\pi
"""
WHOLE_NUMBER = re.compile(f"{NUMBER}%?", re.VERBOSE)
SCALE = {None: 1, "thousand": 10**3, "million": 10**6, "billion": 10**9}
LETTER = r"[A-J]\b|[a-j](?=\))"  # a small letter only in brackets: 'the answer is a guess' states nothing
LONGEST = 300  # more digits than that are noise

# ---- what was only thought -------------------------------------------------------------------------------------------

THOUGHT = "(?i:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|scratchpad)"
OPENING_TAG = (  # DeepSeek, Qwen, Seed, Sky-T1, Command A; Kimi; Magistral; gpt-oss, also without its special tokens
    rf"<\|?(?:seed:)?(?i:begin_of_|start_)?{THOUGHT}(?:\s[^<>\n]{{0,99}})?\|?>"
    r"|◁think▷|\[THINK\]|<\|channel\|>(?!final)|\Aanalysis(?=[A-Z])"
)
CLOSING_TAG = (
    rf"</(?:seed:)?{THOUGHT}>|<\|(?i:end_of_|end_|/){THOUGHT}\|>"
    r"|◁/think▷|\[/THINK\]|<\|channel\|>final|assistantfinal"
)
TAG = re.compile(f"(?P<opening>{OPENING_TAG})|{CLOSING_TAG}")


def without_thoughts(text: str) -> str:
    """A response without what a reasoning model only thought, which is no answer, be the thought closed or not.

    Example: '<think>a</think>b' -> 'b', and 'a</think>b' too, for a template may open the thought; '<think>a' -> ''.
    """
    if not any(sign in text for sign in ("<", "[", "◁", "analysis")):  # to save time
        return text
    said, start, depth, thinking = [], 0, 0, False
    for i, tag in enumerate(TAG.finditer(text)):
        opening = bool(tag["opening"])
        if not thinking and (opening or (i > 0 and depth == 0)):  # else the text before a closing tag was thought
            said.append(text[start : tag.start()])
        depth = depth + 1 if opening else max(depth - 1, 0)
        start, thinking = tag.end(), opening
    return "\n".join(said if thinking else [*said, text[start:]])


# ---- how an answer is stated -----------------------------------------------------------------------------------------

ANSWER = "answer|Answer|ANSWER"
LISTED = r"(?!\**\s*\d+[.)]\ +[*\w])"  # '#### 1. Add the eggs' is a heading, 'Answer:\n1. Add' a list
MARKS = (  # the strongest first: a form that was asked for, a sentence, a label
    rf"(?:\#\#\#\#{LISTED}|\\boxed\{{|<answer>)",
    rf"(?:{ANSWER}|correct\ option|correct\ choice)\**(?:\ to\ [^.\n]{{1,80}}?)?\ (?:is|IS)\b",
    rf"(?:{ANSWER}|\n[\ *]*A)\**:{LISTED}",
)
OPENING = r"""[\s*_:$"'(\[{]*"""  # bold, quotes, brackets
LEAD = rf"{OPENING}(?:(?:about|approximately|only|option|choice)\b{OPENING})?"
TERM = r"[$(]{0,2}(?:\d[\d,.]*|[a-zA-Z]+)[%)]?(?:\ [a-zA-Z]+)?"
SUMS = rf"(?: {TERM}(?:\ ?(?:[-+*/^÷]|x(?=\ ?\d))\ ?{TERM}){{0,20}}\s?[=≈]\s?\$? ){{0,3}}"  # 'x = 5 + 3 =' before an 8
STATED = {
    "number": [re.compile(f"{mark}{LEAD}{SUMS}(?P<answer>{NUMBER})", re.VERBOSE) for mark in MARKS],
    "choice": [re.compile(f"{mark}{LEAD}(?P<answer>{LETTER})", re.VERBOSE) for mark in MARKS],
}
TAKEN_BACK = re.compile(r"(?:Wait|wait|Actually|actually|Sorry|sorry|Correction|mistake)\b")
NO_PART = r"(?<![\w)^]) (?<!\d[.,:/]) (?!-\ (?!\d+/))"  # of a word, time or power; no minus in '5-7' and '- 7 pens'
MENTIONED = {
    "number": re.compile(rf"{NO_PART}(?P<answer>{NUMBER})(?!(?:st|nd|rd|th)\b)", re.VERBOSE),
    "choice": re.compile(r"\b(?P<answer>[A-J])\b"),
}


def extract_answer(text: str, kind: str, lenient: bool = False) -> str | None:
    """The final answer of a response in canonical form, or None.

    Strict: an answer that is stated ('#### 7', 'A: 7', 'the answer is (C)', '\\boxed{7}'). Lenient: that, else the
    last number or the last lone capital letter. Example: ('3+4=7\\n#### 1,007.', 'number') -> '1007'.
    Of the strongest mark the first statement counts that is not TAKEN_BACK within 100 characters, else the last.
    """
    text = "\n" + _plain(without_thoughts(text))
    for mark in STATED[kind]:
        stated = None
        for stated in mark.finditer(text):  # the first one counts, for a model may run on to a new question ...
            if not TAKEN_BACK.search(text, stated.end(), stated.end() + 100):  # ... unless it is '7. Wait, ...'
                break
        if stated:
            return canonical(stated["answer"], kind)
    last = deque(MENTIONED[kind].finditer(text) if lenient else (), maxlen=1)
    return canonical(last[0]["answer"], kind) if last else None


def canonical(text: str, kind: str) -> str | None:
    """One spelling per answer: ' $1,234.50' -> '1234.5', '4/8' -> '0.5', '(c)' -> 'C'. None if the text is no answer.

    Numbers are compared exactly: a fraction is reduced, and a decimal if it has an end: '2/6' -> '1/3'.
    """
    text = _plain(text).strip().rstrip(".")
    if kind == "choice":
        letter = text.strip("(). ").upper()
        return letter if re.fullmatch("[A-J]", letter) else None
    number = WHOLE_NUMBER.fullmatch(text)
    if not number or len(text) > LONGEST or (number["bottom"] and not int(number["bottom"])):
        return None
    whole, top = (re.sub(COMMA, "", part or "0") for part in (number["decimal"] or number["mixed"], number["top"]))
    value = Fraction(f"{whole}e{number['power'] or 0}") + Fraction(int(top), int(number["bottom"] or 1))
    value *= SCALE[number["scale"]] * (-1 if "-" in number["sign"] else 1)
    places = value.denominator.bit_length()  # enough: a denominator of only 2s and 5s divides 10**places
    spelled = str(value)
    if value.denominator > 1 and 10**places % value.denominator == 0:
        spelled = format(Decimal(f"{value * 10**places}e-{places}"), "f").rstrip("0")  # Decimal(text) is exact
    return spelled if len(spelled) <= LONGEST else None


def is_correct(answer: str | None, gold: str | None, kind: str) -> bool:
    """Whether an extracted answer equals the gold one. No answer is never correct."""
    if answer is None or gold is None:
        return False
    return canonical(answer, kind) == canonical(gold, kind) is not None


def _plain(text: str) -> str:
    """Without what only decorates: '\\dfrac{3}{4}' -> '3/4', '1{,}000 \\text{ g}' -> '1,000 { g}'."""
    if "\\" not in text and "{,}" not in text and text.isascii():  # to save time
        return text
    return FRAC.sub(r" \1\2/\3\4", FANCY.sub(lambda fancy: PLAIN[fancy[0]], text))
