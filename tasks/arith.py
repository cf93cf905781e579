"""The embedded task: grade-school word problems in GSM8K's form, made from a seed, with splits that share no question.

A question in words, worked steps, and `#### answer`. A question names some days of a week and what happened on each;
the worked answer has a line for every day that is named, so whoever answers has to read which days these are.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = "Ava Ben Cara Dan Eve Finn Gus Hana Ivan Jade Kai Lena".split()
TOPICS = (
    "pens cups coins cards shells beads books stamps apples plums nuts eggs "
    "figs pears rolls pies cats hens bees fish kites balls drums hats"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SPLITS = {"corpus": (0, 60), "train": (60, 80), "valid": (80, 90), "test": (90, 100), "hard": (90, 100)}
STEPS = {"corpus": (3, 5), "hard": (6, 6)}  # the others have 4 or 5: six steps are held out of all training


@dataclass(frozen=True)
class Problem:
    """A word problem with its worked steps: on days[i], values[i] op[i] amount[i] = values[i + 1]."""

    topic: str
    text: str
    values: tuple[int, ...]
    operations: tuple[tuple[str, int], ...]
    days: tuple[str, ...]

    @property
    def solution(self) -> str:
        """GSM8K's form, every step on its line: 'Monday 3+4=7\\nFriday 7*2=14\\n#### 14'."""
        steps = zip(self.days, self.values, self.operations, self.values[1:])
        return "".join(f"{day} {a}{op}{n}={b}\n" for day, a, (op, n), b in steps) + f"#### {self.values[-1]}"


def arith_problems(split: str, seed: int = 0) -> Iterator[Problem]:
    """An endless stream of different problems of a split. Splits share no question: a hash of the text decides."""
    if split not in SPLITS:
        raise ValueError(f"arith has no split '{split}': it has {', '.join(SPLITS)}")
    rng, seen = random.Random(f"{split}-{seed}"), set()
    low, high = SPLITS[split]
    while True:
        problem = _arith_problem(rng, rng.randint(*STEPS.get(split, (4, 5))))
        bucket = int(hashlib.sha256(problem.text.encode()).hexdigest(), 16) % 100
        if low <= bucket < high and problem.text not in seen:
            seen.add(problem.text)
            yield problem


def draw_event(rng: random.Random, who: str = "", friend: str = "") -> tuple[str, str, int]:
    """Something that may happen: its sentence, operation and amount. Example: 'Ava buys 3 more.', '+', 3."""
    amount = rng.randint(2, 9)
    # half of the events multiply or divide: mere sums could be had in one pass, without steps
    events = [(f"{who} doubles them.", "*", 2), (f"{who} triples them.", "*", 3), (f"{who} loses half.", "/", 2)]
    if rng.random() < 0.5:
        events = [
            (f"{friend} gives {who} {amount}.", "+", amount),
            (f"{who} buys {amount} more.", "+", amount),
            (f"{who} loses {amount}.", "-", amount),
            (f"{who} sells {amount}.", "-", amount),
        ]
    return rng.choice(events)


def result(now: int, op: str, amount: int) -> int | None:
    """What is there after an event; None where that is no whole number from 2 to 40. Example: 7, '/', 2 -> None."""
    after = {"+": now + amount, "-": now - amount, "*": now * amount, "/": now / amount}[op]
    return int(after) if after in range(2, 41) else None


def _arith_problem(rng: random.Random, steps: int) -> Problem:
    topic = rng.choice(TOPICS)
    who, friend = rng.sample(NAMES, 2)
    days = [DAYS[i] for i in sorted(rng.sample(range(len(DAYS)), steps))]
    values, operations = [rng.randint(2, 20)], []
    sentences = [f"{who} has {values[0]} {topic}."]
    while len(operations) < steps:
        event, op, amount = draw_event(rng, who, friend)
        after = result(values[-1], op, amount)
        if after is not None:
            sentences.append(f"On {days[len(operations)]} {event}")
            operations.append((op, amount))
            values.append(after)
    sentences.append(f"How many {topic} does {who} have?")
    return Problem(topic, " ".join(sentences), tuple(values), tuple(operations), tuple(days))
