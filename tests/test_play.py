"""play.py: who answers, what stands beside whom, a run that is not over; and the same from Python, as documented."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import data
import play
from generate import Response
from model import load_scalar_model, save_model

ROOT = Path(play.__file__).resolve().parent
TESTS = [{"question": f"Is it {i}?", "answer": str(i), "instruction": "Say it."} for i in (7, 8)]


@pytest.fixture
def run(tmp_path, model_folder):
    """A run of two rounds of one tiny model, with a reward model that likes every answer alike."""
    folder = tmp_path / "a run"
    data.write_jsonl(folder / "0_questions" / "test.jsonl", TESTS)
    for stage in ("2_sft", "5_reward", "6_ppo", "6_ppo_raw", "6_ppo_r2", "6_ppo_r2.old1"):
        shutil.copytree(model_folder, folder / stage)
    save_model(load_scalar_model(model_folder, new_head="zero"), folder / "5_reward")
    (folder / "1_teacher").mkdir()
    for stage in ("1_teacher", "2_sft"):
        (folder / stage / "done.json").write_text(json.dumps({"config": {"model": str(model_folder)}}))
    return folder


def played(monkeypatch, capsys, run, typed, columns=80):
    """What play.py prints for some lines of input, read from a pipe."""
    reader, writer = os.pipe()
    os.write(writer, typed.encode())
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        monkeypatch.setenv("COLUMNS", str(columns))
        play.main(play.Config((str(run),), max_new_tokens=8))
    return capsys.readouterr().out


def test_who_answers(run, model_folder):
    assert play.folders_of(run) == {"teacher": model_folder, "base": model_folder, "SFT": run / "2_sft",
                                    "PPO": run / "6_ppo_r2", "reward model": run / "5_reward"}


def test_all_answer_the_next_test_question_and_what_is_typed(run, monkeypatch, capsys):
    """The test questions come around; what is typed is asked with their instruction, and has no gold answer."""
    asked = []
    real = play.answer
    monkeypatch.setattr(play, "answer", lambda *a: asked.append(a[2]) or real(*a))
    out = played(monkeypatch, capsys, run, "\n\n\nMine?\n")
    assert [question.question for question in asked[::4]] == ["Is it 7?", "Is it 8?", "Is it 7?", "Mine?"]
    assert len(asked) == 16 and asked[-1].prompt == "Mine?\nSay it." and asked[-1].answer is None
    assert out.count("teacher             base                SFT                 PPO\n") == 4
    scores = re.findall(r"(?m)^([+-]\d\.\d\d.*cut)$", out)
    assert len(scores) == 4 and [line.count("-2.00") for line in scores] == [4] * 4  # none ends within 8 tokens
    assert [line.count("wrong") for line in scores] == [4, 4, 4, 0]
    assert re.findall(r"right: (\d)", out) == ["7", "8", "7"] and max(map(len, out.splitlines())) <= 80


def test_what_is_missing_is_named_and_the_others_answer(run, monkeypatch, capsys):
    for stage in ("5_reward", "6_ppo", "6_ppo_r2"):
        shutil.rmtree(run / stage)
    (run / "1_teacher" / "done.json").unlink()
    out = played(monkeypatch, capsys, run, "\n")
    for name, stage in (("teacher", "1_teacher"), ("PPO", "6_ppo"), ("reward model", "5_reward")):
        assert re.search(rf"(?m)^no {name}: .*a run/{stage}$", out)
    assert re.search(r"(?m)^base +SFT$", out) and "wrong" in out
    shutil.rmtree(run / "2_sft")
    with pytest.raises(ValueError, match="a run"):
        played(monkeypatch, capsys, run, "\n")


def test_a_question_that_is_too_long_is_said_to_be_and_the_next_is_asked(run, monkeypatch, capsys):
    out = played(monkeypatch, capsys, run, "long " * 300 + "\n\n")
    assert "the model's context of 256" in out and "right: 7" in out


def test_a_column_says_what_is_known(run):
    """A score, whether it is right, whether it was cut off; a model's text is on the screen and does not obey it."""
    question = data.load_questions(str(run / "0_questions" / "test.jsonl"))[0]
    said = Response([1], [0.0], "stop", "it\x1b[2J is\n#### 7")
    assert play.column_of("PPO", said, 0.5, question) == ["PPO", "+0.50, right", "it\\x1b[2J is", "#### 7"]
    cut = Response([1], [0.0], "length", "8")
    assert play.column_of("PPO", cut, None, question) == ["PPO", "wrong, cut", "8"]


def test_columns_by_hand():
    assert play.side_by_side([["a b", "", "cc"], ["abcdef"]], 8) == "a b  abc\n     def\ncc"


def test_the_documented_lines_do_the_same(tmp_path, monkeypatch, capsys):
    """docs/modify.md, 'From Python': at most ten lines beside imports, as they stand, in a folder with a run."""
    section = (ROOT / "docs" / "modify.md").read_text(encoding="utf-8").split("## From Python")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in code.splitlines() if line and not re.match("from|import|#", line)]) <= 10
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    student, run = ROOT / "weights" / "tiny-student-base", tmp_path / "runs" / "tiny-0"
    for stage in ("2_sft", "5_reward", "6_ppo"):
        shutil.copytree(student, run / stage)
    save_model(load_scalar_model(student, new_head="zero"), run / "5_reward")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    names, *said = zip(*re.findall(r"(?m)^(\S+) [+-]\d+\.\d\d\n((?:.+\n)+)", capsys.readouterr().out))
    assert names == ("weights/tiny-teacher", "weights/tiny-student-base", "runs/tiny-0/2_sft", "runs/tiny-0/6_ppo")
    assert all(re.search(r"#### \d+\n$", text) for text in said[0])
