"""report.py: the numbers of a made-up run, worked out by hand; missing parts; comparing runs; the picture."""

import itertools
import json
import math
import shutil
import struct
import sys
from fractions import Fraction
from pathlib import Path

import pytest

import figures
import findings
import report
import runtime
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


draw_curves, draw_judge = figures.draw_curves, figures.draw_judge


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """What was to be drawn: a picture takes half a second, and only its own tests need it."""
    drawn = {}  # by the name that the file will have once it is whole
    place = lambda file: Path(file.name.removesuffix(".tmp"))
    monkeypatch.setattr(figures, "draw_curves", lambda file, what: drawn.__setitem__(place(file), what))
    monkeypatch.setattr(figures, "draw_judge", lambda file, *what: drawn.__setitem__(place(file), what))
    monkeypatch.setattr(report, "matmul_rate", lambda threads: 1e12 * threads)
    return drawn


# ---- a made-up run -------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_done(folder, seconds=10.0, tokens=1000, flops=2e12, peak=100, settings=None, **results):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps({
        "config": {}, "settings": settings or {"seed": 0}, "inputs": {"model": "0123456789abcdef"}, "seconds": seconds,
        "peak_memory_mb": peak, "tokens": tokens, "flops": flops, "results": results, "outputs": {},
        "versions": {"torch": "2.9", "python": "3.12"}, "threads": 1}), encoding="utf-8")


def write_evaluation(run, name, right, prefix="test", **results):
    rows = [{"id": f"{prefix}-{i}", "question": f"What is number {i}?", "gold": GOLD, "finish": "stop", "tokens": 5,
             "response": f"let me see\n#### {GOLD if ok else 8} said by {name}", "answer": GOLD if ok else "8",
             "correct": bool(ok), "correct_lenient": bool(ok)} for i, ok in enumerate(right)]
    write_rows(run / "7_eval" / name / "transcripts.jsonl", rows)
    share = sum(right) / len(right)
    accuracy = {"strict": share, "lenient": share, "n": len(right), "ci95": [share / 2, (1 + share) / 2],
                "no_answer": 0.125, "truncated": 0.0625, "mean_tokens": 5.0}
    write_done(run / "7_eval" / name, seconds=2.0, accuracy=accuracy, name=name, **results)


def write_ppo(folder, iterations, start=0.0):
    write_rows(folder / "metrics.jsonl", [
        {"step": i, "objective/scores": start + i, "objective/kl": 0.5 * i, "response_length/mean": 20.0,
         "policy/entropy_avg": 0.3, "val/explained_variance": -5.0 if i == 0 else 0.5, "policy/clipfrac_avg": 0.01}
        | ({"valid/accuracy": 0.5} if i % 2 else {}) for i in range(iterations)])
    write_done(folder, seconds=30.0, peak=300, score=start, kl=0.5 * iterations)


def make_run(folder, answers=ANSWERS):
    """Every stage of train_all.sh, with few rows."""
    train = [{"id": f"train-{i}", "question": f"What is {i}?", "answer": GOLD} for i in range(4)]
    test = [{"id": f"test-{i}", "question": f"What is number {i}?", "answer": GOLD, "instruction": "Think."}
            for i in range(12)]
    write_rows(folder / "0_questions" / "train.jsonl", train)
    write_rows(folder / "0_questions" / "test.jsonl", test)
    write_done(folder / "0_questions", seconds=1.0, tokens=0, flops=0.0, peak=50)

    def response(source, answer, reward):
        return {"source": source, "response": f"#### {answer}", "answer": answer, "reward": reward}

    # three votes of four questions, two of them right; of eight responses five have the reward that gold would give
    # (wrong: 8 is rewarded twice, 7 once not); of five answers of the teacher three are right
    write_rows(folder / "4_pseudo_reward" / "rewards.jsonl", [
        {"id": "train-0", "vote": "7", "share": 1.0, "responses": [
            response("teacher", "7", 1), response("teacher", "7", 1), response("student", "8", 0)]},
        {"id": "train-1", "vote": "7.0", "share": 1.0, "responses": [
            response("teacher", "7", 1), response("student", None, 0)]},
        {"id": "train-2", "vote": "8", "share": 0.5, "responses": [
            response("teacher", "8", 1), response("teacher", "8", 1), response("student", "7", 0)]},
    ])
    write_done(folder / "4_pseudo_reward", share_kept=0.75, kept=3, questions=4)
    write_done(folder / "2_sft", seconds=7.0, settings={"epochs": 2, "votes": "", "seed": 0}, loss=0.25)
    write_done(folder / "5_reward", pair_accuracy=0.875, ties=0.0, held_out_pairs=16, ece=0.0625, margin=1.5,
               length_correlation=-0.25)
    write_ppo(folder / "6_ppo", 5)
    write_ppo(folder / "6_ppo_raw", 5)
    write_done(folder / "6_ppo.old1", seconds=1e6)  # kept aside: counts for nothing
    for name, right in answers.items():
        extra = {"auc_gold": 0.8125, "single_sample_accuracy": 0.5, "any_right": 0.75} if name == "best_of_n" else {}
        write_evaluation(folder, name, right, "hard" if name.startswith("hard") else "test", **extra)
    return folder


def report_of(folder, **flags):
    report.main(report.Config((str(folder),), preset="tiny", seed=3, **flags))
    return json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def page_of(folder):
    return (folder / "report.md").read_text(encoding="utf-8")


# ---- the test of McNemar -------------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    assert findings.mcnemar(10, 2) == pytest.approx(158 / 4096)  # 0.0386
    assert findings.mcnemar(2, 10) == findings.mcnemar(10, 2)
    assert findings.mcnemar(0, 0) == findings.mcnemar(1, 0) == findings.mcnemar(5, 5) == 1.0
    assert findings.mcnemar(6, 0) == 2 / 64


@pytest.mark.parametrize("n", range(1, 13))
def test_mcnemar_is_the_share_of_coin_sequences_that_are_at_least_as_uneven(n):
    uneven = [abs(2 * sum(coins) - n) for coins in itertools.product((0, 1), repeat=n)]
    for wins in range(n + 1):
        assert findings.mcnemar(wins, n - wins) == pytest.approx(sum(u >= abs(2 * wins - n) for u in uneven) / 2**n)


@pytest.mark.parametrize(("wins", "losses"), [(400, 300), (5200, 5000), (20000, 20100)])
def test_mcnemar_of_large_counts_is_near_the_normal_approximation(wins, losses):
    z = (abs(wins - losses) - 1) / math.sqrt(wins + losses)  # with the continuity correction
    assert findings.mcnemar(wins, losses) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.03)


def test_mcnemar_of_large_counts_is_exact():
    tail = sum(math.comb(700, k) for k in range(301))
    assert findings.mcnemar(400, 300) == pytest.approx(float(2 * Fraction(tail, 2**700)), rel=1e-12)
    assert findings.mcnemar(900, 0) == 2.0**-899
    assert findings.mcnemar(4000, 0) == 0.0  # below the smallest float, and no error


def test_compare_counts_only_questions_that_both_answered():
    def right(**answers):
        return {key: {"correct": value} for key, value in answers.items()}

    one, other = right(a=True, b=True, c=False, x=True), right(a=True, b=False, c=False, y=True)
    assert findings.compare(one, other) == {"difference": pytest.approx(1 / 3), "p_value": 1.0, "wins": 1, "losses": 0,
                                          "n": 3, "verdict": "within noise"}
    assert findings.compare(one, right(y=True)) == {"difference": None, "p_value": None, "wins": 0, "losses": 0, "n": 0,
                                                  "verdict": "not known"}
    better, worse = right(**{f"q{i}": True for i in range(6)}), right(**{f"q{i}": False for i in range(6)})
    assert findings.compare(better, worse)["verdict"] == "yes"
    assert findings.compare(worse, better)["verdict"] == "no"
    assert findings.compare(better, worse)["difference"] == 1.0


def test_label_quality_by_hand():
    responses = [{"source": "teacher", "answer": answer, "reward": reward}
                 for answer, reward in (("7", 1), ("8", 0), ("7", 0))]
    rows = [{"id": "a", "vote": "7", "responses": responses}]
    quality = {"vote_accuracy": 1.0, "label_accuracy": pytest.approx(2 / 3),
               "teacher_single_answer_accuracy": pytest.approx(2 / 3)}
    assert findings.label_quality(rows, {"a": Question("a", "?", "7")}) == quality
    nothing = dict.fromkeys(quality)
    assert findings.label_quality(rows, {"a": Question("a", "?", None)}) == nothing  # no gold answer
    assert findings.label_quality(rows, {}) == findings.label_quality([], {}) == nothing


# ---- one run -------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_run(tmp_path):
    numbers = report_of(make_run(tmp_path))
    assert (numbers["preset"], numbers["seed"], numbers["missing"]) == ("tiny", 3, [])
    assert list(numbers["accuracy"]) == ["teacher", "base", "sft", "best_of_n", "ppo_raw", "ppo"]
    assert numbers["accuracy"]["teacher"] == {"strict": 0.5, "lenient": 0.5, "n": 12, "ci95": [0.25, 0.75],
                                              "no_answer": 0.125, "truncated": 0.0625, "mean_tokens": 5.0}
    # ppo against teacher: three questions more, one less... 6, 7, 8 and 10 won, none lost: p = 2 / 2**4
    assert numbers["student_vs_teacher"] == {"difference": pytest.approx(4 / 12), "p_value": 0.125, "wins": 4,
                                             "losses": 0, "n": 12, "verdict": "within noise"}
    # against SFT: 2 to 8 won (seven), 11 lost: p = 2 * (1 + 8) / 2**8
    assert numbers["student_vs_sft"] == {"difference": 0.5, "p_value": pytest.approx(18 / 256), "wins": 7, "losses": 1,
                                         "n": 12, "verdict": "within noise"}
    assert (numbers["student_vs_raw"]["wins"], numbers["student_vs_raw"]["losses"]) == (4, 1)
    assert numbers["pseudo_reward"] == {"vote_accuracy": pytest.approx(2 / 3), "label_accuracy": 5 / 8, "kept": 3,
                                        "share_kept": 0.75, "teacher_single_answer_accuracy": 3 / 5, "questions": 4}
    unknown = dict.fromkeys(f"{name}_gold" for name in (
        "accuracy", "pair_accuracy", "longer_wins", "equal_length_accuracy", "ece"))  # this run is from before them
    assert numbers["reward_model"] == unknown | {
        "pair_accuracy": 0.875, "auc_gold": 0.8125, "ece": 0.0625, "length_correlation": -0.25, "ties": 0.0,
        "margin": 1.5, "held_out_pairs": 16, "single_sample_accuracy": 0.5, "any_right": 0.75}
    assert numbers["ppo"] == {"first_score": 0.0, "last_score": 4.0, "mean_kl": 1.0, "last_kl": 2.0}
    assert numbers["cost"]["6_ppo"] == {"seconds": 30.0, "tokens": 1000, "flops": 2e12, "peak_memory_mb": 300}
    assert set(numbers["cost"]) == {"0_questions", "2_sft", "4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw",
                                    *(f"7_eval/{name}" for name in ANSWERS)}
    assert list(numbers["hard"]) == ["hard_sft", "hard_ppo"]
    assert (numbers["hard_vs_sft"]["wins"], numbers["hard_vs_sft"]["losses"]) == (2, 1)


def test_the_page_of_a_run(tmp_path, capsys):
    run = make_run(tmp_path)
    report_of(run)
    page, shown = page_of(run), capsys.readouterr().out
    assert page.startswith("# Preset tiny, seed 3\n")
    for text in ("| SFT + PPO, learned reward |  83.3 |     41.7–91.7 |", "torch 2.9 · python 3.12 · 1 thread(s) on ",
                 "- Does the student beat its teacher? **Within noise**: +33.3 points on 12 answers, 4 won : 0 lost, "
                 "p = 0.125.", "- Does PPO beat SFT alone? **Within noise**: +50.0 points on 12 answers, 7 won : 1 "
                 "lost, p = 0.0703.", "![curves](curves.png)", "## Held-out difficulty", "in this run: nothing.",
                 "7 questions fixed by PPO relative to SFT; ", "1 questions broken by PPO relative to SFT; ",
                 "    2_sft epochs=2 seed=0 model:01234567\n"):
        assert text in page, text
    # seconds: 1 + 7 + 10 + 10 + 30 + 30 and eight evaluations of 2; tokens: all but the questions'
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in page.split("## Cost")[1].split("\n") if line.startswith("|")}
    assert rows["6_ppo"] == ["30.0", "28.8", "1,000", "33", "2.000", "6.7", "300"]
    assert rows["total"] == ["104.0", "100.0", "13,000", "125", "26.000", "25.0", "300"]
    # in full: question, gold, both answers; the five are the first five
    fixed, broke = page.split("## What PPO changed")[1].split("## Cost")[0].split("broken by PPO")
    assert "    test-2: What is number 2?\n    gold: 7\n    SFT:  let me see | #### 8 said by sft\n" \
           "    PPO:  let me see | #### 7 said by ppo" in fixed
    assert [f"test-{i}:" in fixed for i in range(12)] == [2 <= i <= 6 for i in range(12)]
    assert [f"test-{i}:" in broke for i in range(12)] == [i == 11 for i in range(12)]
    assert "Think." not in page
    # the terminal shows the final table and the path
    assert "| SFT + PPO, learned reward |" in shown and shown.endswith(f"report: {run / 'report.md'}\n")
    # tables are tables: every row of one has the same number of columns
    for block in page.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.split("\n")}) == 1


def test_the_options_of_a_multiple_choice_are_part_of_the_question(tmp_path):
    run = make_run(tmp_path)
    write_rows(run / "0_questions" / "test.jsonl", [
        {"id": f"test-{i}", "question": "Which?", "answer": "A", "kind": "choice", "options": ["one", "two"]}
        for i in range(12)])
    report_of(run)
    assert "    test-2: Which? | A. one | B. two\n" in page_of(run)


def test_what_is_missing_is_said_and_nothing_else_changes(tmp_path):
    run = make_run(tmp_path, {name: ANSWERS[name] for name in ("sft", "ppo")})
    for stage in ("4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw"):
        (run / stage / "done.json").unlink()  # cut off: the files are there, but the stage is not finished
    numbers = report_of(run)
    assert numbers["missing"] == ["4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw", "7_eval/teacher", "7_eval/base",
                                  "7_eval/best_of_n", "7_eval/ppo_raw"]
    assert list(numbers["accuracy"]) == ["sft", "ppo"] and numbers["hard"] == {}
    assert numbers["student_vs_sft"]["p_value"] == pytest.approx(18 / 256)
    assert (numbers["student_vs_teacher"]["p_value"], numbers["student_vs_teacher"]["difference"]) == (None, None)
    for part, key in report.SIGNALS:
        assert numbers[part][key] is None
    page = page_of(run)
    assert "Does the student beat its teacher? **Not known**: 7_eval/ppo and 7_eval/teacher are not both here." in page
    assert "Missing in this run: 4_pseudo_reward, 5_reward," in page
    assert "eld-out difficulty" not in page


def test_training_questions_without_gold_are_no_obstacle(tmp_path):
    run = make_run(tmp_path)
    write_rows(run / "0_questions" / "train.jsonl", [{"id": f"train-{i}", "question": "?"} for i in range(4)])
    quality = report_of(run)["pseudo_reward"]
    assert quality == {"vote_accuracy": None, "label_accuracy": None, "share_kept": 0.75, "kept": 3, "questions": 4,
                       "teacher_single_answer_accuracy": None}


def test_a_recorded_teacher_has_a_row_without_tokens(tmp_path):
    run = make_run(tmp_path / "a")
    done = json.loads((run / "7_eval" / "teacher" / "done.json").read_text())
    done["results"]["accuracy"]["mean_tokens"] = None  # eval.py does not know how many a recorded answer had
    (run / "7_eval" / "teacher" / "done.json").write_text(json.dumps(done))
    assert report_of(run)["accuracy"]["teacher"]["mean_tokens"] is None
    for label, tokens in (("teacher", "–"), ("SFT", "5.00")):
        [row] = [line for line in page_of(run).split("\n") if line.startswith(f"| {label}  ")]
        assert [cell.strip() for cell in row.split("|")][6:9] == ["6.2", tokens, "12"]
    runs = {"a": findings.read_run(run), "b": findings.read_run(make_run(tmp_path / "b"))}
    assert findings.build_comparison(runs)["accuracy"]["teacher"]["mean_tokens"] == 5.0


def test_nan_becomes_null(tmp_path):
    run = make_run(tmp_path)
    write_evaluation(run, "best_of_n", ANSWERS["best_of_n"], auc_gold=math.nan)  # all samples right, or all wrong
    assert report_of(run)["reward_model"]["auc_gold"] is None  # report_of fails on NaN in the file


def test_a_run_without_ppo_has_a_picture_too(tmp_path):
    run = make_run(tmp_path)
    for stage in ("6_ppo", "6_ppo_raw"):
        (run / stage / "done.json").unlink()
    metrics = findings.read_run(run).metrics
    draw_curves(tmp_path / "curves.png", {"learned": [metrics("learned")], "raw": [metrics("raw")]})
    draw_judge(tmp_path / "reward.png", [], [metrics("learned")])
    png_size(tmp_path / "curves.png")
    png_size(tmp_path / "reward.png")


def test_a_second_round_follows_the_first(tmp_path):
    run = make_run(tmp_path)
    write_ppo(run / "6_ppo_r2", 3, start=10.0)
    write_done(run / "5_reward_r2", pair_accuracy=0.5)
    write_rows(run / "4_pseudo_reward_r2" / "rewards.jsonl", [{"id": "train-0", "vote": "8", "responses": []}])
    write_done(run / "4_pseudo_reward_r2", share_kept=0.25)
    write_evaluation(run, "ppo_r1", [1] * 6 + [0] * 6)
    numbers = report_of(run)
    first, second = numbers["rounds"]
    assert (first["round"], first["strict"], first["pair_accuracy"], first["share_kept"]) == (1, 0.5, 0.875, 0.75)
    assert (second["round"], second["strict"], second["pair_accuracy"]) == (2, pytest.approx(10 / 12), 0.5)
    assert (first["vote_accuracy"], second["vote_accuracy"]) == (pytest.approx(2 / 3), 0) and second["kl"] == 1.5
    assert "## Round by round" in page_of(run) and "after round 1 |  50.0 |" in page_of(run)
    assert numbers["ppo"] == {"first_score": 0.0, "last_score": 12.0, "mean_kl": pytest.approx(6.5 / 8), "last_kl": 1.0}
    assert numbers["reward_model"]["pair_accuracy"] == 0.875
    curves = findings.read_run(run).metrics
    assert [row["objective/scores"] for row in curves("learned")] == [0, 1, 2, 3, 4, 10, 11, 12]
    assert [row["objective/scores"] for row in curves("raw")] == [0, 1, 2, 3, 4]


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and len(data) > 20_000
    return struct.unpack(">II", data[16:24])


def test_the_picture_is_a_png_that_reads_well_at_1200_pixels(tmp_path, drawn):
    run = make_run(tmp_path)
    report_of(run)
    draw_curves(run / "curves.png", drawn[run / "curves.png"])
    draw_judge(run / "reward.png", *drawn[run / "reward.png"])
    for name in ("curves", "reward"):
        width, height = png_size(run / f"{name}.png")
        assert 1200 <= width <= 2400 and 0.2 < height / width < 0.8


# ---- several runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path):
    """Seed 1 is as above; in seed 2 PPO is right on question 9 too, SFT on none, and there is no teacher."""
    second = {name: right for name, right in ANSWERS.items() if name != "teacher"}
    second["ppo"], second["sft"] = [1] * 11 + [0], [0] * 12
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", second)]
    write_done(runs[1] / "2_sft", settings={"epochs": 3, "votes": "", "seed": 1})
    return runs


def test_two_runs_are_pooled(two_runs, tmp_path, capsys, drawn):
    out = tmp_path / "results" / "tiny"
    report.main(report.Config(tuple(map(str, two_runs)), str(out)))
    numbers = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    ppo = numbers["accuracy"]["ppo"]
    assert (ppo["strict"], ppo["min–max"], ppo["n"]) == (pytest.approx(21 / 24), pytest.approx([10 / 12, 11 / 12]), 24)
    assert numbers["accuracy"]["teacher"]["n"] == 12  # one run has it
    # against SFT: seed 1 has 7 : 1, seed 2 has 11 : 0. Question by question 2 to 9 gain in both or in one, 0, 1 and 10
    # in seed 2; 11 is lost in seed 1 and even in seed 2: 11 : 1
    test = numbers["student_vs_sft"]
    assert (test["wins"], test["losses"], test["n"], test["difference"]) == (18, 1, 24, pytest.approx(17 / 24))
    assert test["p_value"] == pytest.approx(2 * (1 + 19) / 2**19) and test["verdict"] == "yes"
    assert test["p_by_question"] == pytest.approx(2 * (1 + 12) / 2**12)
    assert numbers["student_vs_raw"]["verdict"] == "within noise"  # 9 : 2
    assert test["by_run"] == [0.5, pytest.approx(11 / 12)]
    assert (numbers["student_vs_teacher"]["n"], numbers["student_vs_teacher"]["by_run"][1]) == (12, None)
    assert numbers["runs"][str(two_runs[1])]["missing"] == ["7_eval/teacher"]
    assert numbers["settings_that_differ"] == ["2_sft.epochs=2", "2_sft.epochs=3"]
    page, shown = (out / "comparison.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert page.startswith(f"# Comparison of {two_runs[0]}, {two_runs[1]}\n")
    assert "| SFT + PPO, learned reward       |  87.5 | 83.3–91.7 |" in page and "|  87.5 | 83.3–91.7 |" in shown
    assert "+70.8 points on 24 answers, 18 won : 1 lost, p = 7.63e-05; each question once: p = 0.00635; run by run: " \
           "+50.0, +91.7 points." in page
    assert [len(runs) for runs in drawn[out / "curves.png"].values()] == [2, 2]
    draw_curves(out / "curves.png", drawn[out / "curves.png"])
    assert png_size(out / "curves.png")[0] >= 1200


def test_where_two_runs_part(two_runs):
    """Seed and epochs differ; the third logged step of PPO does; one evaluation is missing in the second run."""
    rows = [json.loads(line) for line in (two_runs[1] / "6_ppo" / "metrics.jsonl").read_text().splitlines()]
    rows[2]["objective/kl"] *= 1 + 1e-8  # rounding
    rows[3] |= {"objective/kl": 9.0, "policy/entropy_avg": 0.31}
    write_rows(two_runs[1] / "6_ppo" / "metrics.jsonl", rows)
    one, other = (findings.read_run(run) for run in two_runs)
    assert findings.partings(one, other) == [
        "seed 0 against 0 and 1", "2_sft: --epochs 2 against 3",
        "6_ppo: from step 3 on: objective/kl 1.5 against 9 and 1 more", "7_eval/teacher: only in the first run"]
    assert findings.partings(one, one) == []
    assert findings._close(math.nan, math.nan) and not findings._close(math.nan, 1.0)


def test_two_runs_are_compared_model_by_model(two_runs):
    """The second against the first, on the questions that both answered; what one of them lacks has no row."""
    one, other = (findings.read_run(run) for run in two_runs)
    other.stages["7_eval/ppo"]["rows"].pop()  # a question that nobody has right: 10 and 11 of 11
    rows = {row[0]: row[1:] for row in report.model_by_model(one, other)}
    assert rows["SFT + PPO, learned reward"] == ["90.9", "100.0", "+9.1", "1 : 0", "1"]
    assert rows["SFT"] == ["33.3", "0.0", "-33.3", "0 : 4", "0.125"]
    assert "teacher" not in rows and report.model_by_model(other, one)[1][3:5] == ["+33.3", "4 : 0"]


def test_the_reliability_of_several_runs_is_that_of_all_their_pairs():
    judges = [{"reliability_gold": [{"confidence": 0.52, "accuracy": 0.5, "count": 10}]}, {},
              {"reliability_gold": [{"confidence": 0.54, "accuracy": 0.8, "count": 30},
                                    {"confidence": 1.0, "accuracy": 1.0, "count": 5}]}]
    assert figures.pooled(judges) == [
        {"confidence": pytest.approx(0.535), "accuracy": pytest.approx(0.725), "count": 40},
        {"confidence": 1.0, "accuracy": 1.0, "count": 5}]
    assert figures.pooled([{}]) == []


def test_the_arms_of_an_ablation_are_not_part_of_a_report(tmp_path):
    run = make_run(tmp_path)
    before = report_of(run)
    write_evaluation(run, "ppo+kl0", ANSWERS["ppo"])
    write_ppo(run / "6_ppo+kl0", 4)
    assert report_of(run) == before
    assert "6_ppo+kl0" in findings.read_run(run, arms=True).stages


def test_ppo_that_was_stopped_draws_its_curve_as_far_as_it_came(tmp_path):
    run = make_run(tmp_path)
    before = findings.read_run(run).metrics("learned")
    (run / "6_ppo" / "done.json").unlink()
    shutil.copytree(run / "6_ppo", run / "6_ppo.old2")  # kept aside: no part of the run
    found = findings.read_run(run)
    assert found.metrics("learned") == before != [] and "6_ppo" in findings.build_report(found)["missing"]
    assert found.metrics("raw") == findings.read_run(run).get("6_ppo_raw", "rows") != []


@pytest.mark.parametrize(("text", "message"), [("{", "is damaged"), ("[]", "is damaged"), ("{}", "has no ")])
def test_a_damaged_record_is_one_sentence(tmp_path, text, message):
    (make_run(tmp_path) / "2_sft" / "done.json").write_text(text)
    with pytest.raises(ValueError, match=rf"2_sft/done\.json {message}.*: remove it and run the stage again"):
        report_of(tmp_path)


def test_the_share_of_the_peak_and_the_command_are_shown(tmp_path):
    run = make_run(tmp_path)  # 2e12 FLOPs in 7 seconds of SFT, at a peak of 1e12 a second
    (run / "command.txt").write_text("PRESET=tiny SEED=3 bash train_all.sh\n")
    report_of(run)
    [row] = [line for line in page_of(run).splitlines() if line.startswith("| 2_sft")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["2_sft", "7.0", "6.7", "1,000", "143", "2.000", "28.6", "100"]
    assert "\n    PRESET=tiny SEED=3 bash train_all.sh\n" in page_of(run)


def test_a_verdict_does_not_rest_on_counting_a_question_twice(tmp_path):
    """The same answers in two runs: 8 : 0 if pooled, p = 2 / 2**8, but it is 4 : 0 questions, p = 2 / 2**4."""
    runs = {name: findings.read_run(make_run(tmp_path / name)) for name in "ab"}
    test = findings.build_comparison(runs)["student_vs_teacher"]
    assert (test["p_value"], test["p_by_question"], test["verdict"]) == (2 / 2**8, 2 / 2**4, "within noise")


def test_comparing_needs_two_different_runs(two_runs, tmp_path):
    with pytest.raises(ValueError, match="the same folder twice"):
        report.main(report.Config((f"{two_runs[0]}", f"{two_runs[0]}/"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# ---- the command line ----------------------------------------------------------------------------------------------


def test_a_folder_without_evaluations_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("DEBUG", raising=False)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--preset", "tiny", "--seed", "0"])
    with pytest.raises(SystemExit) as exit:
        runtime.launch(report.main, report.Config)
    shown = capsys.readouterr()
    assert (exit.value.code, shown.out) == (2, "")
    assert shown.err == f"error: {tmp_path}: no finished evaluation in 7_eval yet\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("runs", "out"), [("a", "x"), ("ab", "")])
def test_several_runs_need_a_folder_and_one_has_its_own(tmp_path, runs, out):
    folders = tuple(str(make_run(tmp_path / run)) for run in runs)
    with pytest.raises(ValueError, match="--out is for the comparison of several runs"):
        report.main(report.Config(folders, out and str(tmp_path / out)))


def test_a_run_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="nothing: no finished evaluation in 7_eval yet"):
        report.main(report.Config((str(tmp_path / "nothing"),)))
    assert not (tmp_path / "nothing").exists()


def test_a_bad_line_of_a_stage_is_named(tmp_path):
    run = make_run(tmp_path)
    with (run / "7_eval" / "sft" / "transcripts.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=r"transcripts\.jsonl, line 13: not JSON"):
        report.main(report.Config((str(run),)))


def test_a_narrow_column_still_has_a_rule_that_markdown_reads():
    assert report.table(["%", "n"], [["a", 4]]).splitlines() == ["| %  |  n |", "| -- | -: |", "| a  |  4 |"]
