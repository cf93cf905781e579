"""report.py: the numbers of a made-up run, worked out by hand; missing parts; two runs; the pictures."""

import itertools
import json
import math
import struct
import sys
from fractions import Fraction

import pytest

import report
from data import Question

GOLD = "7"
# right (1) or wrong (0) on twelve test questions
ANSWERS = {
    "teacher": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    "base": [0] * 12,
    "sft": [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    "best_of_n": [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    "ppo_raw": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1],
    "ppo": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0],
    "hard_sft": [0, 0, 0, 1],
    "hard_ppo": [1, 1, 0, 0],
}

draw = report.draw


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_done(folder, seconds=10.0, tokens=1000, flops=2e12, peak=100, settings=None, **results):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps({
        "settings": settings or {"seed": 0}, "inputs": {"model": "0123456789abcdef"}, "seconds": seconds,
        "peak_memory_mb": peak, "tokens": tokens, "flops": flops, "results": results,
        "versions": {"torch": "2.9", "python": "3.12"}}), encoding="utf-8")


def write_evaluation(run, name, right, **results):
    rows = [{"id": f"test-{i}", "question": f"What is number {i}?", "gold": GOLD, "correct": bool(ok),
             "response": f"let me see\n#### {GOLD if ok else 8} said by {name}"} for i, ok in enumerate(right)]
    folder, share = run / report.evaluation(name), sum(right) / len(right)
    write_rows(folder / "transcripts.jsonl", rows)
    rest = {"ci95": [share / 2, (1 + share) / 2], "no_answer": 0.125, "truncated": 0.0625, "mean_tokens": 5.0}
    write_done(folder, seconds=2.0, accuracy={"strict": share, "lenient": share, "n": len(right)} | rest, **results)


def write_ppo(folder, iterations, start=0.0):
    rows = [{"step": i, "objective/scores": start + i, "objective/kl": 0.5 * i} for i in range(iterations)]
    write_rows(folder / "metrics.jsonl", [row | {"val/explained_variance": -5.0, "val/eos_share": 1.0} for row in rows])
    write_done(folder, seconds=30.0, peak=300)


def make_run(folder, answers=ANSWERS):
    """Every stage of train_all.sh that the report reads, with few rows."""
    write_rows(folder / "0_questions" / "train.jsonl",
               [{"id": f"train-{i}", "question": f"What is {i}?", "answer": GOLD} for i in range(4)])
    choice = {"answer": "A", "kind": "choice", "options": ["one", "two"], "instruction": "Think."}
    write_rows(folder / "0_questions" / "test.jsonl",
               [{"id": f"test-{i}", "question": f"What is number {i}?"} | choice for i in range(12)])
    response = lambda *values: dict(zip(("source", "answer", "reward"), values))
    # three votes of four questions, two of them right; of eight responses five have the reward that gold would give
    # (wrong: 8 is rewarded twice, 7 once not); of five answers of the teacher three are right
    write_rows(folder / "4_pseudo_reward" / "rewards.jsonl", [
        {"id": "train-0", "vote": "7", "responses": [
            response("teacher", "7", 1), response("teacher", "7", 1), response("student", "8", 0)]},
        {"id": "train-1", "vote": "7.0", "responses": [response("teacher", "7", 1), response("student", None, 0)]},
        {"id": "train-2", "vote": "8", "responses": [
            response("teacher", "8", 1), response("teacher", "8", 1), response("student", "7", 0)]}])
    write_done(folder / "4_pseudo_reward", share_kept=0.75, kept=3)
    write_done(folder / "2_sft", seconds=7.0, settings={"epochs": 2, "seed": 0})
    write_done(folder / "5_reward", pair_accuracy=0.875, ece=0.0625)
    write_ppo(folder / "6_ppo", 5)
    write_ppo(folder / "6_ppo_raw", 5)
    write_done(folder / "6_ppo.old1", seconds=1e6)  # kept aside: counts for nothing
    for name, right in answers.items():
        judge = {"auc_gold": 0.8125, "any_right": 0.75} if name == "best_of_n" else {}
        write_evaluation(folder, name, right, **judge)
    write_rows(folder / report.evaluation("best_of_n") / "scores.jsonl",
               [{"id": "test-0", "scores": [1.5, -0.5], "correct": [True, False], "tokens": [4, 9]}])
    return folder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """What was to be drawn, by name: a picture takes half a second, and only its own tests need it."""
    drawn = {}
    monkeypatch.setattr(report, "draw", lambda out, pictures: drawn.update(pictures))
    return drawn


def report_of(folder):
    report.main(report.Config((str(folder),), preset="tiny", seed=3))
    return json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def rows_of(page, title):
    """Cells of the table under a heading of the page, by their first."""
    section = page.split(f"## {title}")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.split("\n") if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells}


def test_mcnemar_is_the_share_of_coin_sequences_that_are_at_least_as_uneven():
    for n in range(13):
        uneven = [abs(2 * sum(coins) - n) for coins in itertools.product((0, 1), repeat=n)]
        for wins in range(n + 1):
            assert report.mcnemar(wins, n - wins) == pytest.approx(sum(u >= abs(2 * wins - n) for u in uneven) / 2**n)
    tail = sum(math.comb(700, k) for k in range(301))
    assert report.mcnemar(400, 300) == pytest.approx(float(2 * Fraction(tail, 2**700)), rel=1e-12)
    assert report.mcnemar(4000, 0) == 0.0  # below the smallest float, and no error


def test_compare_counts_only_questions_that_both_answered():
    def right(**answers):
        return {key: {"correct": value} for key, value in answers.items()}

    one, other = right(a=True, b=True, c=False, x=True), right(a=True, b=False, c=False, y=True)
    assert report.compare(one, other) == {"difference": pytest.approx(1 / 3), "p_value": 1.0, "wins": 1, "losses": 0,
                                          "n": 3, "verdict": "within noise"}
    assert report.compare(one, right(y=True)) == {"difference": None, "p_value": None, "wins": 0, "losses": 0, "n": 0,
                                                  "verdict": "not known"}
    better, worse = right(**{f"q{i}": True for i in range(6)}), right(**{f"q{i}": False for i in range(6)})
    assert (report.compare(better, worse)["verdict"], report.compare(worse, better)["verdict"]) == ("yes", "no")


def test_label_quality_by_hand():
    responses = [{"source": "teacher", "answer": answer, "reward": reward}
                 for answer, reward in (("7", 1), ("8", 0), ("7", 0), ("7", 1))]
    rows = [{"id": "a", "vote": "7", "responses": responses}]
    quality = {"vote_accuracy": 1.0, "label_accuracy": 0.75, "teacher_single_answer_accuracy": 0.75}
    assert report.label_quality(rows, {"a": Question("a", "?", "7")}) == quality
    nothing = dict.fromkeys(quality)
    assert report.label_quality(rows, {"a": Question("a", "?", None)}) == nothing  # no gold answer
    assert report.label_quality(rows, {}) == report.label_quality([], {}) == nothing


def test_the_numbers_of_a_run(tmp_path):
    numbers = report_of(make_run(tmp_path))
    assert (numbers["preset"], numbers["seed"], numbers["missing"]) == ("tiny", 3, [])
    assert list(numbers["accuracy"]) == ["teacher", "base", "sft", "best_of_n", "ppo_raw", "ppo"]
    assert numbers["accuracy"]["teacher"] == {"strict": 0.5, "lenient": 0.5, "n": 12, "ci95": [0.25, 0.75],
                                              "no_answer": 0.125, "truncated": 0.0625, "mean_tokens": 5.0}
    assert numbers["student_vs_teacher"] == {"difference": pytest.approx(4 / 12), "p_value": 0.125, "wins": 4,
                                             "losses": 0, "n": 12, "verdict": "within noise"}
    # against SFT: 2 to 8 won (seven), 11 lost: p = 2 * (1 + 8) / 2**8
    assert numbers["student_vs_sft"] == {"difference": 0.5, "p_value": pytest.approx(18 / 256), "wins": 7, "losses": 1,
                                         "n": 12, "verdict": "within noise"}
    assert (numbers["student_vs_raw"]["wins"], numbers["student_vs_raw"]["losses"]) == (4, 1)
    assert list(numbers["hard"]) == ["hard_sft", "hard_ppo"] and numbers["hard_vs_sft"]["wins"] == 2
    assert numbers["pseudo_reward"] == {"vote_accuracy": pytest.approx(2 / 3), "label_accuracy": 5 / 8, "kept": 3,
                                        "share_kept": 0.75, "teacher_single_answer_accuracy": 3 / 5}
    known = {"pair_accuracy": 0.875, "auc_gold": 0.8125, "ece": 0.0625, "any_right": 0.75}
    assert {key: value for key, value in numbers["reward_model"].items() if value is not None} == known
    assert numbers["cost"]["6_ppo"] == {"seconds": 30.0, "tokens": 1000, "flops": 2e12, "peak_memory_mb": 300}
    assert set(numbers["cost"]) == {"2_sft", "4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw",
                                    *map(report.evaluation, ANSWERS)}


def test_the_page_of_a_run(tmp_path, capsys, undrawn):
    assert report.table(["%", "n"], [["a", 4]]).splitlines()[1] == "| -- | -: |"  # a rule that Markdown reads
    run = make_run(tmp_path)
    (run / "command.txt").write_text("PRESET=tiny SEED=3 bash train_all.sh\n")
    report_of(run)
    page, printed = (run / "report.md").read_text(encoding="utf-8"), capsys.readouterr().out
    accuracy = rows_of(page, "Accuracy")
    assert accuracy["PPO, reward model"] == ["83.3", "41.7–91.7", "83.3", "12.5", "6.2", "5.00", "12"]
    assert accuracy["hard: SFT"][0] == "25.0" and accuracy["hard: SFT"][-1] == "4"
    assert "**Within noise**: +33.3 points on 12 answers, 4 won : 0 lost, p = 0.12" in page
    # seconds: 7 + 10 + 10 + 30 + 30 and eight evaluations of 2; tokens: 13 stages of 1000
    cost = rows_of(page, "Cost")
    assert cost["6_ppo"] == ["30.0", "29.1", "1,000", "33", "2.000", "300"]
    assert cost["total"] == ["103.0", "100.0", "13,000", "126", "26.000", "300"]
    # question and options without the instruction, gold, both answers; the five are the first five
    fixed, broke = page.split("## What PPO changed")[1].split("## Cost")[0].split("broken by PPO")
    assert "    test-2: What is number 2? | A. one | B. two\n    gold: 7\n    SFT:  let me see | #### 8 said by sft\n" \
           "    PPO:  let me see | #### 7 said by ppo" in fixed
    assert [f"test-{i}:" in fixed for i in range(12)] == [2 <= i <= 6 for i in range(12)]
    assert [f"test-{i}:" in broke for i in range(12)] == [i == 11 for i in range(12)]
    assert "\n    PRESET=tiny SEED=3 bash train_all.sh\n" in page
    assert "PPO, reward model" in printed and str(run / "report.md") in printed
    assert max(map(len, [line for line in printed.split("\n") if line.startswith("|")])) <= 80
    assert undrawn["reward"][1][0]["scores"] == [1.5, -0.5]


def test_what_is_missing_is_said_and_nothing_else_changes(tmp_path):
    run = make_run(tmp_path, {name: ANSWERS[name] for name in ("sft", "ppo")})
    for stage in ("4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw"):
        (run / stage / "done.json").unlink()  # cut off: the files are there, but the stage is not finished
    (run / "0_questions" / "train.jsonl").unlink()
    write_evaluation(run, "ppo+kl0", ANSWERS["ppo"])  # an arm of an ablation is no part of a report
    numbers = report_of(run)
    missing = [report.evaluation(name) for name in ("teacher", "base", "best_of_n", "ppo_raw")]
    assert numbers["missing"] == ["4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw", *missing]
    assert list(numbers["accuracy"]) == ["sft", "ppo"] and numbers["hard"] == {} and len(numbers["cost"]) == 3
    assert numbers["student_vs_sft"]["p_value"] == pytest.approx(18 / 256)
    assert (numbers["student_vs_teacher"]["p_value"], numbers["student_vs_teacher"]["difference"]) == (None, None)
    assert all(numbers[part][key] is None for part, key in report.SIGNALS)
    assert "**Not known**" in (run / "report.md").read_text(encoding="utf-8")
    assert report.evaluation("ppo+kl0") in report.read_run(run, arms=True).stages
    assert len(report.read_run(run).metrics(report.LEARNED)) == 5  # PPO that was stopped, as far as it came


def test_unknown_numbers_and_a_second_round(tmp_path):
    """NaN is no JSON; a recorded answer has no count of tokens. The curves of the second round follow the first."""
    run = make_run(tmp_path)
    write_evaluation(run, "best_of_n", ANSWERS["best_of_n"], auc_gold=math.nan)
    path = run / report.evaluation("teacher") / "done.json"
    path.write_text(path.read_text().replace('"mean_tokens": 5.0', '"mean_tokens": null'))
    write_ppo(run / "6_ppo_r2", 3, start=10.0)
    write_done(run / "5_reward_r2", pair_accuracy=0.5)
    write_evaluation(run, "ppo_r1", [1] * 6 + [0] * 6)
    numbers = report_of(run)
    assert numbers["reward_model"]["auc_gold"] is numbers["accuracy"]["teacher"]["mean_tokens"] is None
    assert rows_of((run / "report.md").read_text(encoding="utf-8"), "Accuracy")["teacher"][5] == "–"
    assert numbers["accuracy"]["ppo_r1"]["strict"] == 0.5 and numbers["reward_model"]["pair_accuracy"] == 0.875
    metrics = report.read_run(run).metrics
    assert [row["objective/scores"] for row in metrics(report.LEARNED)] == [0, 1, 2, 3, 4, 10, 11, 12]
    assert [row["objective/scores"] for row in metrics(report.RAW)] == [0, 1, 2, 3, 4]


def test_the_pictures_are_png_that_read_well_at_1200_pixels(tmp_path, monkeypatch, undrawn):
    """And so they are where there was neither PPO nor best of n."""
    report_of(make_run(tmp_path))
    for pictures in (undrawn, {"reward": (report.draw_judge, []), "curves": (report.draw_curves, {"learned": []})}):
        draw(tmp_path, pictures)
        for name in ("curves", "reward"):
            data = (tmp_path / f"{name}.png").read_bytes()
            width, height = struct.unpack(">II", data[16:24])
            assert data[:4] == b"\x89PNG" and 1200 <= width <= 2400 and 0.2 < height / width < 0.8
            assert len(data) > 10_000


def test_without_matplotlib_there_is_a_page_and_no_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "draw", draw)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # its import fails
    report_of(make_run(tmp_path))
    assert "matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


def test_two_runs_are_compared_and_where_they_part_is_said(tmp_path, undrawn):
    """Seed, epochs and the fourth step of PPO differ; in the second run PPO has question 9 too, and no teacher is."""
    second = {name: right for name, right in ANSWERS.items() if name != "teacher"} | {"ppo": [1] * 11 + [0]}
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", second)]
    write_done(runs[1] / "2_sft", settings={"epochs": 3, "seed": 1})
    rows = [json.loads(line) for line in (runs[1] / "6_ppo" / "metrics.jsonl").read_text().splitlines()]
    rows[2]["objective/kl"] *= 1 + 1e-8  # rounding
    rows[3] |= {"objective/kl": 9.0, "objective/scores": 3.5}
    write_rows(runs[1] / "6_ppo" / "metrics.jsonl", rows)
    one, other = (report.read_run(run) for run in runs)
    apart = report.partings(one, other)
    assert report.partings(one, one) == {}
    assert sorted(apart.values()) == [["2_sft"], ["2_sft"], ["6_ppo"], [report.evaluation("teacher")]]
    [ppo] = [what for what, stages in apart.items() if stages == ["6_ppo"]]
    assert "step 3 " in ppo and "objective/kl 1.5 against 9" in ppo
    assert {"--epochs 2 against 3", "--seed 0 against 1"} <= set(apart)
    report.main(report.Config(tuple(map(str, runs)), str(tmp_path / "out")))
    table = rows_of((tmp_path / "out" / "comparison.md").read_text(encoding="utf-8"), "Accuracy")
    assert table["PPO, reward model"] == ["83.3", "91.7", "+8.3", "1 : 0", "1"]
    assert table["SFT"][:4] == ["33.3", "33.3", "+0.0", "0 : 0"] and "teacher" not in table
    assert [rows[3]["objective/kl"] for rows in undrawn["comparison"][1].values()] == [1.5, 9.0]
    with pytest.raises(ValueError, match="the same folder twice"):
        report.main(report.Config((f"{runs[0]}", f"{runs[0]}/"), str(tmp_path / "again")))
    assert not (tmp_path / "again").exists()


def test_a_mistake_names_its_file(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path / 'empty'}: "):
        report.main(report.Config((str(tmp_path / "empty"),)))
    assert not (tmp_path / "empty").exists()
    run = make_run(tmp_path / "run")
    with (run / report.evaluation("sft") / "transcripts.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=r"transcripts\.jsonl, line 13: "):
        report_of(run)
    for text in ("{", "[]", "{}"):
        (run / "2_sft" / "done.json").write_text(text)
        with pytest.raises(ValueError, match=r"2_sft/done\.json is damaged"):
            report_of(run)
