"""bench/controls.py: rewards by length as PPO gets them, and SFT sets chosen by length or by the vote."""

import controls
import pytest
import torch

from runtime.files import read_jsonl, write_jsonl


def test_a_longer_answer_is_worth_more_and_the_scale_is_the_rollouts():
    """Lengths 1, 2, 3, 6: mean 3, deviation sqrt(3.5)."""
    responses = [[5], [5, 5], [5] * 3, [5] * 6]
    want = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.5**0.5
    assert torch.allclose(controls.longer(None, None, responses, None), want)
    assert torch.allclose(controls.shorter(None, None, responses, None), -want)
    assert controls.longer(None, None, [[1]] * 3, None).tolist() == [0, 0, 0]  # equal lengths are no signal, and no NaN


@pytest.mark.parametrize("kind, texts", [("longest", ["abc", "abc", "z"]), ("shortest", ["a", "a", "z"])])
def test_one_winner_stands_for_all_of_its_question(tmp_path, kind, texts):
    rows = [{"id": "1", "prompt": "p", "response": "a"}, {"id": "1", "prompt": "p", "response": "abc"},
            {"id": "2", "prompt": "q", "response": "z"}]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    controls.main(controls.Config(kind, str(tmp_path / "out.jsonl"), sft=str(tmp_path / "sft.jsonl")))
    out = list(read_jsonl(tmp_path / "out.jsonl"))
    assert [row["response"] for row in out] == texts and [row["prompt"] for row in out] == ["p", "p", "q"]


def test_its_own_answers_are_those_of_the_student_that_equal_the_vote(tmp_path):
    said = [("teacher", "t", 1), ("student", "right", 1), ("student", "wrong", -1), ("student", "cut", 0)]
    responses = [{"source": source, "response": text, "answer": "4", "reward": reward} for source, text, reward in said]
    write_jsonl(tmp_path / "rewards.jsonl", [{"id": "1", "vote": "4", "share": 1.0, "responses": responses}])
    write_jsonl(tmp_path / "questions.jsonl", [{"id": "1", "question": "2+2?", "answer": None, "kind": "number",
                                                "instruction": "Briefly."}])
    controls.main(controls.Config("own", str(tmp_path / "out.jsonl"), rewards=str(tmp_path / "rewards.jsonl"),
                                  questions=str(tmp_path / "questions.jsonl")))
    assert list(read_jsonl(tmp_path / "out.jsonl")) == [{"id": "1", "prompt": "2+2?\nBriefly.", "response": "right"}]
