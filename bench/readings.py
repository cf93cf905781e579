"""How an answer to a question of tasks/arith.py reads the question, and whether it calculates right: for reports alone.

Nothing that trains imports this. Both are told from the texts: which days and operations the lines take from the
question, whatever numbers come out of them, and whether each line follows from the one before.
"""

import math
import re

Event = tuple[str, str, str]  # day, operation, amount

KINDS = {
    "right": "every event once",
    "in place": "an invented event in the place of a real one",
    "added": "an invented event beside the real ones",
    "left out": "one event left out",
    "twice": "one event counted twice",
    "other": "anything else",
}
START = re.compile(r"\w+ has (\d+) ")
EVENT = re.compile(r"On (\w+) \w+ (?:(doubles|triples|loses half)|(gives|buys|loses|sells)\D* (\d+))")
TIMES = {"doubles": ("*", "2"), "triples": ("*", "3"), "loses half": ("/", "2")}
SIGN = {"gives": "+", "buys": "+", "loses": "-", "sells": "-"}
LINE = re.compile(r"(\w+) (\d+)([-+*/])(\d+)=(\d+)")
LAST = re.compile(r"#### (\d+)")


def events_asked(question: str) -> list[Event]:
    """Example: 'Ava has 3 pens. On Monday Ava buys 4 more. On Friday Ava loses half. ...' -> [('Monday', '+', '4'),
    ('Friday', '/', '2')]."""
    return [(day, *(TIMES[word] if word else (SIGN[verb], n))) for day, word, verb, n in EVENT.findall(question)]


def events_said(answer: str) -> list[Event] | None:
    """What the lines take, in their order; None of an answer in another form. Example: 'Monday 3+4=7\\n#### 7' ->
    [('Monday', '+', '4')]."""
    *lines, last = answer.split("\n")
    found = [LINE.fullmatch(line) for line in lines]
    return [(m[1], m[3], m[4]) for m in found] if all(found) and LAST.fullmatch(last) else None


def reading(question: str, answer: str) -> str:
    """One of KINDS. An invented event is on a day that the question does not name."""
    asked, said = events_asked(question), events_said(answer)
    if said is None:
        return "other"
    if said == asked:
        return "right"
    named = {day for day, _, _ in asked}
    if len(said) == len(asked):
        [(day, _, _), *more] = [one for one, other in zip(said, asked) if one != other]
        return "in place" if day not in named and not more else "other"
    if any(asked[:i] + asked[i + 1 :] == said for i in range(len(asked))):
        return "left out"
    for i, event in enumerate(said):
        if said[:i] + said[i + 1 :] == asked and (event in asked or event[0] not in named):
            return "twice" if event in asked else "added"
    return "other"


def calculated(question: str, answer: str) -> bool:
    """Whether the lines start from the question's number, each from the result before, and all results are right."""
    if events_said(answer) is None:
        return False
    now = int(START.match(question)[1])
    for _, before, op, amount, after in LINE.findall(answer):
        a, n = int(before), int(amount)
        right = {"+": a + n, "-": a - n, "*": a * n, "/": a / (n or math.nan)}[op]
        if a != now or int(after) != right:
            return False
        now = right
    return int(LAST.search(answer)[1]) == now
