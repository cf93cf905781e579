"""bench/compare.py: where two made-up runs part, and who answers better in which."""

import json

import compare
import pytest
from test_ablation import run_folder

import report
from runtime.files import write_jsonl

RIGHT = {"sft": 3, "ppo": 7, "teacher": 5}


def ppo(folder, **changes):
    """metrics.jsonl of five iterations; in those from the fourth on some numbers are others."""
    rows = [{"step": i, "objective/scores": float(i), "objective/kl": 0.5 * i, "val/x": float("nan")} for i in range(5)]
    rows[3] |= changes
    rows[2]["objective/kl"] *= 1 + 1e-8 * bool(changes)  # rounding
    write_jsonl(folder / "6_ppo" / "metrics.jsonl", rows)


def settings(folder, stage, **values):
    path = folder / stage / "done.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def runs(tmp_path):
    """Seed, an input, the fourth step of PPO and one question differ; in the second run PPO has one more right, SFT
    one less, and there is no teacher."""
    one, other = tmp_path / "a run", tmp_path / "b"
    run_folder(one, RIGHT)
    run_folder(other, {"sft": 2, "ppo": 8}, ids="abcdefghiJ")
    ppo(one)
    ppo(other, **{"objective/kl": 9.0, "objective/scores": 3.5})
    settings(one, "5_reward", settings={"seed": 0, "epochs": 2}, inputs={"pairs": "0123"})
    settings(other, "5_reward", settings={"seed": 1, "epochs": 2}, inputs={"pairs": "4567"})
    return one, other


def test_where_two_runs_part(runs):
    one, other = map(report.read_run, runs)
    apart = compare.partings(one, other)
    assert compare.partings(one, one) == {}
    assert apart.pop("--seed 0 against 1") == apart.pop("other pairs") == ["5_reward"]
    assert sorted(apart.values()) == [["6_ppo"], [report.evaluation("teacher")]]
    [ppo] = [what for what, stages in apart.items() if stages == ["6_ppo"]]
    assert "step 3 " in ppo and "objective/kl 1.5 against 9" in ppo


def test_the_page_of_two_runs(runs, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(compare, "draw_curves", lambda path, curves: drawn.update({path.name: curves}))
    compare.main(compare.Config(tuple(map(str, runs)), str(tmp_path / "out")))
    page = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.split("\n") if line.startswith("|")]
    rows = {row[0]: row[1:] for row in rows}
    assert rows["PPO, reward model"] == ["77.8", "88.9", "within noise", "+11.1", "1 : 0", "1", "9"]
    assert rows["SFT"][3:5] == ["-11.1", "0 : 1"] and "teacher" not in rows
    assert [row[3]["objective/kl"] for row in drawn["comparison.png"].values()] == [1.5, 9.0]
    with pytest.raises(ValueError, match="two different"):
        compare.main(compare.Config((f"{runs[0]}", f"{runs[0]}/"), str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()
