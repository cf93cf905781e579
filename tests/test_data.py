"""data.py: answers read as a person reads them, questions, the built-in task, tokens, padded batches."""

import json
import random
import re
from itertools import islice
from pathlib import Path

import pytest
import torch

import arith
import data
from arith import SPLITS, arith_problems
from data import (
    Question,
    batches,
    collate,
    extract_answer,
    load_questions,
    read_jsonl,
    write_jsonl,
)

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
