"""bench/readings.py: the reading of an answer, told from the texts, and whether its numbers are right."""

import importlib.util
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from readings import calculated, reading

from tasks.arith import arith_problems

ROOT = Path(__file__).resolve().parents[2]
QUESTION = ("Ava has 4 pens. On Monday Ava triples them. On Tuesday Ben gives Ava 8. On Friday Ava loses half. "
            "On Sunday Ava sells 2. How many pens does Ava have?")
KIND = {"reader": "right", "mixer": "in place", "embroiderer": "added", "skipper": "left out", "repeater": "twice"}


def weights_make():
    spec = importlib.util.spec_from_file_location("weights_make", ROOT / "weights" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kind_of_every_source():
    """Answers as weights/make.py writes them: each kind is told from the others, and all of them calculate right."""
    make, rng, found = weights_make(), random.Random(0), Counter()
    for problem in islice(arith_problems("train"), 80):
        for source in make.SOURCES:
            answer = make.answer_like(source, problem, rng)
            if answer is not None:
                assert (reading(problem.text, answer), calculated(problem.text, answer)) == (KIND[source], True)
                found[source] += 1
    assert set(found) == set(KIND) and min(found.values()) > 20


@pytest.mark.parametrize(("lines", "kind", "right"), [
    ("Monday 4*3=12 Tuesday 12+8=20 Friday 20/2=10 Sunday 10-2=8 #### 8", "right", True),
    ("Monday 4*3=12 Tuesday 12+8=21 Friday 21/2=10 Sunday 10-2=8 #### 8", "right", False),  # right by luck
    ("Monday 4*3=12 Tuesday 12+8=21 Friday 20/2=10 Sunday 10-2=8 #### 8", "right", False),  # put right afterwards
    ("Monday 5*3=15 Tuesday 15+8=23 Friday 23/2=11 Sunday 11-2=9 #### 9", "right", False),  # another beginning
    ("Monday 4*3=12 Tuesday 11+8=19 Friday 20/2=10 Sunday 10-2=8 #### 8", "right", False),  # not from the line before
    ("Monday 4*3=12 Tuesday 12+8=20 Friday 20/2=10 Sunday 10-2=8 #### 9", "right", False),  # not the last result
    ("Monday 4*3=12 Wednesday 12+8=20 Friday 20/2=10 Sunday 10-2=8 #### 8", "in place", True),  # lucky, but invented
    ("Monday 4*3=12 Friday 12+8=20 Friday 20/2=10 Sunday 10-2=8 #### 8", "other", True),  # on a day that is named
    ("Monday 4*2=8 Tuesday 8+8=16 Friday 16/2=8 Sunday 8-2=6 #### 6", "other", True),  # miscopied
    ("Tuesday 4+8=12 Monday 12*3=36 Friday 36/2=18 Sunday 18-2=16 #### 16", "other", True),  # in another order
    ("Monday 4*3=12 Tuesday 12+8=20 Thursday 20+0=20 Friday 20/2=10 Sunday 10-2=8 #### 8", "added", True),  # harmless
    ("Monday 4*3=12 Tuesday 12+8=20 Tuesday 20-1=19 Friday 19/2=9 Sunday 9-2=7 #### 7", "other", False),
    ("Monday 4*3=12 Friday 12/2=6 Sunday 6-2=4 #### 4", "left out", True),
    ("Friday 4/2=2 Sunday 2-2=0 #### 0", "other", True),  # two are left out
    ("Monday 4*3=12 Tuesday 12+8=20 Friday 20/2=10 Friday 10/2=5 Sunday 5-2=3 #### 3", "twice", True),
    ("Monday 4*3=12 Tuesday 12+8=20 Friday 20/0=20 Sunday 20-2=18 #### 18", "other", False),
    ("Monday 4*3=12 so #### 12", "other", False),  # in another form
    ("#### 8", "other", False), ("", "other", False),
])
def test_readings_by_hand(lines, kind, right):
    answer = re.sub(r" (?=[A-Z#s])", "\n", lines)
    assert (reading(QUESTION, answer), calculated(QUESTION, answer)) == (kind, right)
