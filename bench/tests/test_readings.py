"""bench/readings.py: the reading of an answer, told from the texts, and whether its numbers are right."""

import importlib.util
import json
import random
import re
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
import readings
import torch
from readings import calculated, in_order, reading

from data import Tokenizer
from model import load_scalar_model, save_model
from report import evaluation, read_run
from runtime.files import write_jsonl
from tasks import load_questions
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


def test_what_is_asked_holds_the_text_and_gold_and_nothing_of_how_it_is_made():
    """Training reads questions: kinds, events and worked steps are not in them."""
    for question, problem in zip(load_questions("arith:train", 5), arith_problems("train"), strict=False):
        filled = {name: value for name, value in asdict(question).items() if name not in ("id", "kind") and value}
        assert filled == {"question": problem.text, "answer": str(problem.values[-1])}


# ---- the page ------------------------------------------------------------------------------------------------------


def row(key, kind, lines, score, right=True):
    return {"id": key, "kind": kind, "calculated": right, "lines": lines, "score": score}


def test_pairs_in_order_by_hand():
    """Right readings: a scores 3, b 1 and 5. A slip and misreadings of both, of as many lines or of more."""
    rows = [row("a", "right", 4, 3.0), row("b", "right", 5, 1.0), row("b", "right", 5, 5.0),
            row("a", "right", 4, 9.0, right=False), row("a", "in place", 4, 2.0), row("b", "in place", 5, 1.0),
            row("b", "added", 6, 0.0), row("a", "added", 5, 4.0), row("b", "twice", 6, 0.0, right=False)]
    same, as_long, any_two = readings.PAIRS
    of = lambda kind: in_order(rows, lambda row: row["kind"] == kind)
    assert of("in place") == {same: [2 / 3, 3], as_long: [2 / 3, 3], any_two: [2 / 3, 3]}  # a tie is not in order
    assert of("added") == {same: [2 / 3, 3], as_long: [None, 0], any_two: [1 / 2, 2]}
    slip = readings.OPPONENTS["read right, calculated wrong"]
    assert in_order(rows, slip) == {same: [0.0, 1], as_long: [0.0, 1], any_two: [0.0, 1]}
    assert of("left out") == {pairs: [None, 0] for pairs in readings.PAIRS}


def test_over_seeds_what_is_not_known_does_not_count():
    found = [{"a": [1.0, None], "b": None}, {"a": [3.0, 0.5], "b": None}, {"a": [2.0, None], "b": None}]
    of = lambda mean, low, high: {"mean": mean, "low": low, "high": high}
    assert readings.over_seeds(found) == {"a": [of(2, 1, 3), of(0.5, 0.5, 0.5)], "b": of(None, None, None)}


READ = "Monday 4*3=12\nTuesday 12+8=20\nFriday 20/2=10\nSunday 10-2=8\n#### 8"


def test_a_run_is_sampled_scored_and_read(tmp_path):
    """Two questions; all models of the run are the bundled student, the reward model is a new head on it."""
    student, run = ROOT / "weights" / "tiny-student-base", tmp_path / "run"
    sampling = {"temperatures": "0.7", "max_new_tokens": 48, "batch_size": 8, "lenient": False, "seed": 0}
    stages = {"3_student": sampling, "4_pseudo_reward": {}, "5_reward": {}}
    stages |= {evaluation(name): {"models": [f"{name}={student}"]} for name in readings.POLICIES}
    for stage, config in stages.items():
        costs = dict.fromkeys(("seconds", "tokens", "flops", "peak_memory_mb"), 1)
        (run / stage).mkdir(parents=True)
        (run / stage / "done.json").write_text(json.dumps(costs | {"results": {"parameters": 9}, "config": config}))
    judge = load_scalar_model(student, torch.float32, new_head="normal", seed=3)
    save_model(judge, run / "5_reward")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (run / "5_reward" / file).write_bytes((student / file).read_bytes())
    questions = load_questions("arith:test", 2)
    write_jsonl(run / "0_questions" / "test.jsonl", map(asdict, questions))
    said = [(READ, True), (READ.replace("20/2=10", "20/2=9"), True), (READ.replace("Friday", "Saturday"), False)]
    rows = [{"id": str(i), "question": QUESTION, "response": text, "correct": right}
            for i, (text, right) in enumerate(said)]
    write_jsonl(run / evaluation("ppo") / "transcripts.jsonl", rows)
    voted = [{"response": READ, "reward": 1}, {"response": READ.replace("Friday", "Saturday"), "reward": 1},
             {"response": READ, "reward": 0}]
    write_jsonl(run / "4_pseudo_reward" / "rewards.jsonl", [{"id": questions[0].id, "responses": voted}])

    readings.main(readings.Config((str(run),), str(tmp_path / "out"), samples=3))
    numbers = json.loads((tmp_path / "out" / "readings.json").read_text())
    assert set(numbers["kinds"]) == {"vote", "ppo"}
    found, vote = numbers["kinds"]["ppo"], numbers["kinds"]["vote"]
    mean = lambda row: {key: value["mean"] for key, value in row.items()}
    assert found["calculated"]["mean"] == 0.5  # of the two right readings
    assert mean(found["share"]) == dict.fromkeys(readings.KINDS, 0) | {"right": 2 / 3, "in place": 1 / 3}
    assert mean(found["right"]) == dict.fromkeys(readings.KINDS) | {"right": 1, "in place": 0}
    assert mean(vote["share"]) == dict.fromkeys(readings.KINDS, 0) | {"other": 1}  # of another question; two rewarded
    assert set(numbers["judge"]) == set(readings.POLICIES)

    cfg, tokenizer = readings.Config((), "", samples=3), Tokenizer(student)
    scored, prompts = readings.sampled(cfg, read_run(run, arms=True), "sft"), {q.id: q.prompt for q in questions}
    assert [row["id"] for row in scored] == [q.id for q in questions for _ in range(3)]
    for row in scored:  # one at a time, the end token read last
        text = tokenizer.chat(prompts[row["id"]]) + tokenizer.response(row["response"])
        alone = judge(torch.tensor([text]))[0, -1].item() if row["finish"] == "stop" else -2.0
        assert row["score"] == pytest.approx(alone, abs=1e-4)
        assert row["kind"] == reading(row["question"], row["response"])
    assert len({row["score"] for row in scored}) > 2
