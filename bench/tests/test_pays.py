"""bench/pays.py and bench/overoptimise.py: which votes are kept, and the numbers of small runs by hand."""

import json

import ablation
import numpy as np
import overoptimise
import pays
import pytest

from report import evaluation
from runtime.files import read_jsonl, write_jsonl


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ablation, "RESAMPLES", 1000)


def finish(folder, results):
    costs = dict.fromkeys(("seconds", "tokens", "flops", "peak_memory_mb"), 1.0)
    (folder / "done.json").write_text(json.dumps(costs | {"results": results}))


def run_folder(folder, right, looks):
    """`right`: arm -> how many of ten test questions; `looks`: arm -> (KL, score, accuracy) at iterations 0, 4 ..."""
    for arm, count in right.items():
        rows = [{"id": f"{i}", "correct": i < count} for i in range(10)]
        write_jsonl(folder / evaluation(arm) / "transcripts.jsonl", rows)
        finish(folder / evaluation(arm), {})
    for arm, rows in looks.items():
        metrics = [{"step": 4 * i, "objective/kl": kl, "valid/accuracy": share, "valid/score": score}
                   for i, (kl, score, share) in enumerate(rows)]
        write_jsonl(folder / f"6_{arm}" / "metrics.jsonl", metrics + [{"step": 99, "objective/kl": 7.0}])
        finish(folder / f"6_{arm}", {})
    for i, stage in enumerate(("4_pseudo_reward", "4_pseudo_reward+one")):
        write_jsonl(folder / stage / "rewards.jsonl", [])
        finish(folder / stage, {"kept": 100 + 900 * i})
    return str(folder)


RIGHT = {"teacher": 4, "sft": 5, "ppo": 9, "ppo_raw": 8, "ppo+kl0.5": 7, "ppo+votes20": 8, "ppo+raw_votes20": 6,
         "ppo+one": 3, "ppo+raw_one": 7, "ppo+raw_kl0.5": 10}
LOOKS = {"ppo": [(0, 0.0, 0.5), (4, 0.5, 0.9)], "ppo+kl0.5": [(0, 0.0, 0.5), (9, 0.7, 0.8)],
         "ppo_raw": [(0, 0.0, 0.5), (1, 0.0, 0.6)], "ppo+raw_kl0.5": [(0, 0.0, 0.5), (1, 0.0, 0.7)],
         "ppo+votes20": [], "ppo+one": []}


def test_the_rewards_are_compared_by_hand(tmp_path):
    """Two seeds; the raw vote does better with half the KL coefficient, the learned reward without."""
    folders = [run_folder(tmp_path / "0", RIGHT, LOOKS),
               run_folder(tmp_path / "1", RIGHT | {"ppo": 10}, LOOKS | {"ppo": [(0, 0.0, 0.4), (5, 0.7, 1.0)]})]
    pays.main(pays.Config(tuple(f"default={folder}" for folder in folders), str(tmp_path / "out")))
    numbers = json.loads((tmp_path / "out" / "pays.json").read_text())
    row = numbers["teachers"]["default"]
    assert row["kl_times"] == {"learned": "1", "raw": "0.5"} and row["iterations"] == [0, 4]
    assert row["learned"] == [[0.5, 0.4], [0.9, 1.0]] and row["raw"] == [[0.5, 0.5], [0.7, 0.7]]
    assert row["ahead"][1]["by_seed"] == pytest.approx([0.2, 0.3]) and row["ahead"][0]["mean"] == pytest.approx(-0.05)
    assert row["test"]["learned"]["mean"] == 0.95 and row["test"]["raw"]["mean"] == 1.0
    assert row["test_ahead"]["mean"] == pytest.approx(-0.05) and row["test"]["sft"]["mean"] == 0.5
    found = [(row["votes"], row["questions"], row["learned"]["mean"], row["raw"]["mean"]) for row in numbers["votes"]]
    assert found == [("votes20", 20, 0.8, 0.6), ("all", 100, 0.95, 0.8), ("one", 1000, 0.3, 0.7)]
    assert [row["ahead"]["mean"] for row in numbers["votes"]] == pytest.approx([0.2, 0.15, -0.4])
    assert "+20.0" in (tmp_path / "out" / "pays.md").read_text()
    assert (tmp_path / "out" / "pays.png").stat().st_size > 10_000


def test_looks_at_other_iterations_are_refused(tmp_path):
    folders = [run_folder(tmp_path / name, RIGHT, LOOKS | {"ppo": looks})
               for name, looks in (("0", LOOKS["ppo"]), ("1", LOOKS["ppo"][:1]))]
    with pytest.raises(ValueError, match="other iterations"):
        pays.main(pays.Config(tuple(f"default={folder}" for folder in folders), str(tmp_path / "out")))


def test_the_climb_is_the_root_of_the_mean_kl(tmp_path):
    folders = [run_folder(tmp_path / "0", RIGHT, LOOKS),
               run_folder(tmp_path / "1", RIGHT, LOOKS | {"ppo": [(-1, 0.2, 0.4), (5, 0.7, 1.0)]})]
    overoptimise.main(overoptimise.Config(tuple(folders), str(tmp_path / "out")))
    numbers = json.loads((tmp_path / "out" / "kl.json").read_text())
    assert set(numbers["learned"]) == {"0.5", "1"} == set(numbers["raw"]) and "score" not in numbers["raw"]["1"]
    method = numbers["learned"]["1"]
    assert method["score"] == [[0.0, 0.5], [0.2, 0.7]] and method["accuracy"] == [[0.5, 0.9], [0.4, 1.0]]
    assert overoptimise.distance(method).tolist() == pytest.approx([0, np.sqrt(4.5)])  # an estimate below 0 is 0
    assert " 2.12 |" in (tmp_path / "out" / "kl.md").read_text()
    assert (tmp_path / "out" / "kl.png").stat().st_size > 10_000


def cut(folder, **flags):
    pays.cut(pays.CutConfig(str(folder / "cut"), **flags))
    return {path.name: list(read_jsonl(path)) for path in (folder / "cut").iterdir()}


def test_fewer_votes_are_whole_questions_drawn_by_the_seed_and_nested(tmp_path):
    """Thirty voted questions, the odd ones with two pairs each."""
    write_jsonl(tmp_path / "rewards.jsonl", [{"id": f"{i}", "vote": "7"} for i in range(30)])
    write_jsonl(tmp_path / "pairs.jsonl", [{"id": f"{i}", "chosen": f"{n}"} for i in range(1, 30, 2) for n in range(2)])
    kept = {}
    for n, seed in ((8, 0), (16, 0), (8, 1), (99, 0)):
        found = cut(tmp_path, votes=str(tmp_path), questions=n, seed=seed)
        kept[n, seed] = ids = [row["id"] for row in found["rewards.jsonl"]]
        assert len(ids) == min(n, 30) and ids == sorted(ids, key=int)
        assert [row["id"] for row in found["pairs.jsonl"]] == [key for key in ids if int(key) % 2 for _ in range(2)]
    assert set(kept[8, 0]) < set(kept[16, 0]) and kept[8, 0] != kept[8, 1] and kept[8, 0] != [f"{i}" for i in range(8)]


def test_one_answer_of_each_question_is_its_first(tmp_path):
    rows = [{"id": key, "response": text} for key, text in (("a", "1"), ("b", "2"), ("a", "3"), ("b", "4"))]
    write_jsonl(tmp_path / "said.jsonl", rows)
    assert cut(tmp_path, samples=str(tmp_path / "said.jsonl")) == {"samples.jsonl": rows[:2]}
    with pytest.raises(ValueError, match="--votes or --samples"):
        cut(tmp_path)
