"""The final answer in a text, in one spelling: one function for the vote, the reward and the score alike.

`extract_answer` reads it, strictly (an answer that is stated) or leniently (else the last one mentioned); `is_correct`
compares. Two kinds: 'number' (GSM8K) and 'choice' (a letter, MMLU-Pro).
"""

import re
from decimal import Decimal

NUMBER = r"(?:(?<![\w)])-|(?<![\w)]\s)-\s)?(?:\\?\$\s?-?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?"
STATED = {  # an answer that is announced; the first announcement counts, for a model may run on to a new question
    "number": re.compile(rf"(?:####|\\boxed\{{|^[ *]*A:|(?i:answer(?: is:?|:)))[\s*]*({NUMBER})", re.MULTILINE),
    "choice": re.compile(  # a small letter only in brackets: 'the answer is a guess' states nothing
        r"(?:####|\\boxed\{|^[ *]*A:|(?i:answer(?: is:?|:)))[\s*]*(?:\\text\{)?\(?([A-J]\b|(?<=\()[a-j](?=\)))",
        re.MULTILINE,
    ),
}
MENTIONED = {"number": re.compile(NUMBER), "choice": re.compile(r"\b([A-J])\b")}


def extract_answer(text: str, kind: str, lenient: bool = False) -> str | None:
    """The final answer of a response in canonical form, or None.

    Strict: an answer that is stated ('#### 7', 'A: 7', 'the answer is (C)', '\\boxed{7}'). Lenient: that, else the
    last number or the last lone capital letter. Example: ('3+4=7\\n#### 1,007.', 'number') -> '1007'.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    stated = STATED[kind].search(text)
    if stated:
        return canonical(stated.group(1), kind)
    mentioned = MENTIONED[kind].findall(text) if lenient else []
    return canonical(mentioned[-1], kind) if mentioned else None


def canonical(text: str, kind: str) -> str | None:
    """One spelling per answer: ' $1,234.50' -> '1234.5', '(c)' -> 'C'. None if the text is not such an answer."""
    text = text.strip()
    if kind == "choice":
        letter = text.strip("(). ").upper()
        return letter if re.fullmatch("[A-J]", letter) else None
    text = re.sub(r"[\s,$\\]", "", text.replace("\N{MINUS SIGN}", "-")).rstrip(".")
    if not re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)(/\d+)?", text):
        return None
    whole, slash, part = text.partition("/")
    number = format(Decimal(whole), "f")  # exact: normalize() would round to 28 digits
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return ("0" if number == "-0" else number) + slash + part


def is_correct(answer: str | None, gold: str | None, kind: str) -> bool:
    """Whether an extracted answer equals the gold one. No answer is never correct."""
    if answer is None or gold is None:
        return False
    answer = canonical(answer, kind)
    return answer is not None and answer == canonical(gold, kind)
