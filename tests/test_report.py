"""report.py, pictures.py: the numbers of a made-up run, worked out by hand; missing parts; page and pictures."""

import itertools
import json
import math
import re
import struct

import pytest

import pictures
import report
from runtime.files import write_jsonl as write_rows

ANSWERS = {  # right (1) or wrong (0) on twelve test questions
    "teacher": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    "base": [0] * 12,
    "sft": [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    "best_of_n": [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    "ppo_raw": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1],
    "ppo": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0],
    "hard_sft": [0, 0, 0, 1],
    "hard_ppo": [1, 1, 0, 0],
}

def write_done(folder, seconds=10.0, peak=100, **results):
    folder.mkdir(parents=True, exist_ok=True)
    record = {"seconds": seconds, "peak_memory_mb": peak, "tokens": 1000, "flops": 2e12, "results": results}
    (folder / "done.json").write_text(json.dumps(record))


def write_evaluation(run, name, right, **results):
    rows = [{"id": f"test-{i}", "question": f"What is number {i}?", "gold": "7", "correct": bool(ok),
             "response": f"let me see\n#### {7 if ok else 8} said by {name}"} for i, ok in enumerate(right)]
    folder, share = run / report.evaluation(name), sum(right) / len(right)
    write_rows(folder / "transcripts.jsonl", rows)
    rest = {"ci95": [share / 2, (1 + share) / 2], "no_answer": 0.125, "truncated": 0.0625, "mean_tokens": 5.0}
    write_done(folder, seconds=2.0, accuracy={"strict": share, "lenient": share, "n": len(right)} | rest, **results)


def write_ppo(folder, iterations, start=0.0):
    rows = [{"step": i, "objective/scores": start + i, "val/explained_variance": -5.0} for i in range(iterations)]
    write_rows(folder / "metrics.jsonl", rows)
    write_done(folder, seconds=30.0, peak=300)


def make_run(folder, answers=ANSWERS):
    """Every stage of train_all.sh that the report reads, with few rows."""
    choice = {"answer": "A", "kind": "choice", "options": ["one", "two"], "instruction": "Think."}
    for split, n, rest in (("train", 4, {"answer": "7"}), ("test", 12, choice)):
        rows = [{"id": f"{split}-{i}", "question": f"What is number {i}?"} | rest for i in range(n)]
        write_rows(folder / "0_questions" / f"{split}.jsonl", rows)
    # three votes of four questions, two of them right; of eight responses five have the reward that gold would give
    # (wrong: 8 is rewarded twice, 7 once not); of five answers of the teacher three are right
    said = {"7": "teacher 7 1 | teacher 7 1 | student 8 0", "7.0": "teacher 7 1 | student . 0",
            "8": "teacher 8 1 | teacher 8 1 | student 7 0"}
    write_rows(folder / "4_pseudo_reward" / "rewards.jsonl", [{"id": f"train-{i}", "vote": vote, "responses": [
        {"source": source, "answer": None if answer == "." else answer, "reward": int(reward)}
        for source, answer, reward in map(str.split, text.split("|"))]} for i, (vote, text) in enumerate(said.items())])
    write_done(folder / "4_pseudo_reward", share_kept=0.75)
    write_done(folder / "2_sft", seconds=7.0)
    write_done(folder / "5_reward", pair_accuracy=0.875, ece=0.0625)
    write_ppo(folder / "6_ppo", 5)
    write_ppo(folder / "6_ppo_raw", 5)
    write_done(folder / "6_ppo.old1", seconds=1e6)  # kept aside: counts for nothing
    for name, right in answers.items():
        write_evaluation(folder, name, right, **({"auc_gold": 0.8125} if name == "best_of_n" else {}))
    return folder


@pytest.fixture(autouse=True)
def draw_pictures(monkeypatch):
    """The real one: a picture takes half a second, so the others do without."""
    real = report.draw_pictures
    monkeypatch.setattr(report, "draw_pictures", lambda *_: None)
    return real


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in their order."""
    drawn, real = [], pictures.Figure
    monkeypatch.setattr(pictures, "Figure", lambda *size, **how: drawn.append(real(*size, **how)) or drawn[-1])
    return drawn


def report_of(folder):
    report.main(report.Config((str(folder),), preset="tiny", seed=3))
    return json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def rows_of(page, title, nth=0):
    """Cells of the first or nth table under a heading of the page, by their first."""
    section = page.split(f"## {title}")[1].split("\n## ")[0]
    lines = [part for part in section.split("\n\n") if part.startswith("|")][nth].strip().split("\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if not line.startswith("| --")]
    return {row[0]: row[1:] for row in cells}


def test_mcnemar_is_the_share_of_coin_sequences_that_are_at_least_as_uneven():
    for n in range(9):
        uneven = [abs(2 * sum(coins) - n) for coins in itertools.product((0, 1), repeat=n)]
        for wins in range(n + 1):
            assert report.mcnemar(wins, n - wins) == pytest.approx(sum(u >= abs(2 * wins - n) for u in uneven) / 2**n)
    assert report.mcnemar(1200, 0) == 0 and report.mcnemar(1200, 1199) == 1  # no number is too large, or too small


def test_compare_counts_only_questions_that_both_answered():
    right = lambda **answers: {key: {"correct": value} for key, value in answers.items()}
    one, other = right(a=True, b=True, c=False, x=True), right(a=True, b=False, c=False, y=True)
    assert report.compare(one, other) == {
        "difference": pytest.approx(1 / 3), "p_value": 1.0, "wins": 1, "losses": 0, "n": 3, "verdict": "within noise"}
    assert report.compare(one, right(y=True)) == {
        "difference": None, "p_value": None, "wins": 0, "losses": 0, "n": 0, "verdict": "not known"}
    better, worse = (right(**{f"q{i}": value for i in range(6)}) for value in (True, False))
    assert (report.compare(better, worse)["verdict"], report.compare(worse, better)["verdict"]) == ("yes", "no")


def test_the_numbers_of_a_run(tmp_path):
    numbers = report_of(make_run(tmp_path))
    assert (numbers["preset"], numbers["seed"], numbers["missing"]) == ("tiny", 3, [])
    assert [*numbers["accuracy"], *numbers["hard"]] == list(ANSWERS) and numbers["hard_vs_sft"]["wins"] == 2
    assert numbers["accuracy"]["teacher"]["strict"] == 0.5 and numbers["accuracy"]["teacher"]["ci95"] == [0.25, 0.75]
    # PPO against SFT: 2 to 8 won (seven), 11 lost: p = 2 * (1 + 8) / 2**8
    assert numbers["student_vs_sft"] == {"difference": 0.5, "p_value": pytest.approx(18 / 256), "wins": 7, "losses": 1,
                                         "n": 12, "verdict": "within noise"}
    assert (numbers["student_vs_teacher"]["p_value"], numbers["student_vs_raw"]["p_value"]) == (0.125, 0.375)
    assert numbers["pseudo_reward"] == {"share_kept": 0.75, "vote_accuracy": pytest.approx(2 / 3),
                                        "label_accuracy": 5 / 8, "teacher_single_answer_accuracy": 3 / 5}
    assert numbers["reward_model"] == dict.fromkeys(key for part, key in report.SIGNALS if part == "reward_model") | {
        "pair_accuracy": 0.875, "auc_gold": 0.8125, "ece": 0.0625}
    assert numbers["cost"]["6_ppo"] == {"seconds": 30.0, "tokens": 1000, "flops": 2e12, "peak_memory_mb": 300}
    assert "7_eval/hard/ppo" in numbers["cost"] and len(numbers["cost"]) == 5 + 8  # and none that was kept aside


def test_the_page_of_a_run(tmp_path, capsys):
    assert report.table(["%", "n"], [["a", 4]]).splitlines()[1] == "| -- | -: |"  # a rule that Markdown reads
    report_of(run := make_run(tmp_path / "a run"))
    page, printed = (run / "report.md").read_text(encoding="utf-8"), capsys.readouterr().out
    accuracy = rows_of(page, "Accuracy")
    assert accuracy["PPO, reward model"] == ["83.3", "41.7–91.7", "83.3", "12.5", "6.2", "5.00", "12"]
    compared = rows_of(page, "Accuracy", 1)
    assert list(compared)[1:] == ["teacher", "SFT", "PPO, raw vote", "hard: SFT"]  # there is no hard_teacher
    assert compared["SFT"] == ["within noise", "+50.0", "7 : 1", "0.07", "12"]
    assert list(rows_of(page, "Quality").values())[1:5] == [["75.0"], ["60.0"], ["66.7"], ["62.5"]]
    # seconds: 7 + 10 + 10 + 30 + 30 and eight evaluations of 2; tokens: 13 stages of 1000
    cost = rows_of(page, "Cost")
    assert cost["6_ppo"] == ["30.0", "1,000", "33", "2.000", "300"]
    assert cost["7_eval"] == ["16.0", "8,000", "500", "16.000", "100"]
    assert cost["total"] == ["103.0", "13,000", "126", "26.000", "300"]
    # question and options without the instruction, gold, both answers; the five are the first five
    fixed, broke = page.split("## What PPO changed")[1].split("## Cost")[0].split("broken by PPO")
    assert "    test-2: What is number 2? | A. one | B. two\n    gold: 7\n    SFT:  let me see | #### 8 said by sft\n" \
           "    PPO:  let me see | #### 7 said by ppo" in fixed
    assert [f"test-{i}:" in fixed for i in range(12)] == [2 <= i <= 6 for i in range(12)]
    assert [f"test-{i}:" in broke for i in range(12)] == [i == 11 for i in range(12)]
    six = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.split("\n") if line[:1] == "|"][2:]
    assert {row[0]: row[1:] for row in six} == {name: row[:2] for name, row in accuracy.items()
                                                 if name != "%" and "hard" not in name}
    assert len(six) == 6 and str(run / "report.md") in printed
    assert max(map(len, page.split("\n"))) <= 110 and max(len(x) for x in page.split("\n") if x[:1] != " ") <= 100


def test_the_page_says_the_answer_in_words_and_how_it_was_made(tmp_path):
    """The picture comes first. Nothing is said of a model without a row; a quick run's page says what it is."""
    run = make_run(tmp_path / "run")
    (run / "command.txt").write_text("SEED=3 bash train_all.sh\ngit commit abc1234-dirty\n")
    done = run / "2_sft" / "done.json"
    settings = {"settings": {"lr": 0.5, "data": "</details><b>\x1b[2J"}}
    done.write_text(json.dumps(json.loads(done.read_text()) | settings))
    numbers = report_of(run)
    page = (run / "report.md").read_text(encoding="utf-8")
    picture, words = page.split("\n\n")[1:3]
    assert "result.png" in picture and report.MEANS_NOTHING not in page
    words = " ".join(words.split())
    assert "83.3 % of 12 held-out" in words.replace("\u00a0", " ") and "within noise of SFT (+50.0 points)" in words
    assert "    SEED=3 bash train_all.sh\n    git commit abc1234-dirty\n" in page
    assert "<details>" in page and re.search(r"(?m)^    2_sft: lr 0\.5, data </details>", page) and "\x1b" not in page
    verdicts = [numbers["student_vs_teacher"] | {"verdict": verdict} for verdict in ("yes", "no")]
    for verdict, word in zip(verdicts, ("better than teacher", "worse than teacher")):
        assert word in report.in_words(numbers | {"student_vs_teacher": verdict})
    nothing = {"accuracy": {"base": numbers["accuracy"]["base"]}} | {key: {"n": 0} for key in report.COMPARISONS}
    assert report.in_words(numbers | nothing) == ""
    report.main(report.Config((str(run),), quick=True))
    assert report.MEANS_NOTHING in (run / "report.md").read_text().split("![")[0]


@pytest.mark.parametrize(("votes", "gold", "share", "told"), [
    ("777777", "777778", 0.9, "6 of 6 questions, and 83% are right"),
    ("777", "777", 0.5, "3 of 6 questions, and 100%"),
    ("777777", "888888", 0.9, "warning"),  # it always agrees with itself, and is never right
    ("777777", "", 0.9, "6 of 6 questions\n"),  # without gold nobody knows
    ("777", "777", 0.1, "error"),  # no vote counts
])
def test_after_the_vote_a_run_says_whether_there_is_anything_to_learn(tmp_path, capsys, votes, gold, share, told):
    write_rows(tmp_path / "0_questions" / "train.jsonl", [
        {"id": f"q{i}", "question": f"{i}?"} | ({"answer": gold[i]} if i < len(gold) else {}) for i in range(6)])
    write_rows(tmp_path / "1_vote" / "rewards.jsonl", [
        {"id": f"q{i}", "vote": vote, "share": share, "responses": []} for i, vote in enumerate(votes)])
    config = report.Config((str(tmp_path),), only_teacher=True, min_share=0.3)
    if told == "error":
        with pytest.raises(ValueError, match=r"0 of 6 questions.*nothing to distil.*TEACHER="):
            report.main(config)
        return
    report.main(config)
    out = capsys.readouterr().out
    assert told in out and ("nothing to distil" in out) == (told == "warning") and not (tmp_path / "report.md").exists()


def test_what_is_missing_is_said_and_nothing_else_changes(tmp_path):
    run = make_run(tmp_path, {name: ANSWERS[name] for name in ("sft", "ppo")})
    for stage in ("4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw"):
        (run / stage / "done.json").unlink()  # cut off: the files are there, but the stage is not finished
    (run / "0_questions" / "train.jsonl").unlink()
    write_evaluation(run, "ppo+kl0", ANSWERS["ppo"])  # an arm of an ablation is no part of a report
    numbers = report_of(run)
    assert numbers["missing"] == ["6_ppo", "6_ppo_raw", "7_eval/test/teacher", "7_eval/test/base",
                                  "7_eval/best_of_n/sft", "7_eval/test/ppo_raw"]
    assert list(numbers["accuracy"]) == ["sft", "ppo"] and numbers["hard"] == {} and len(numbers["cost"]) == 3
    assert (numbers["student_vs_sft"]["wins"], numbers["student_vs_teacher"]["verdict"]) == (7, "not known")
    assert all(numbers[part][key] is None for part, key in report.SIGNALS)
    page = (run / "report.md").read_text(encoding="utf-8")
    assert list(rows_of(page, "Accuracy", 1)) == ["PPO against", "SFT"] and "7_eval/test/teacher" in page
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
    page = (run / "report.md").read_text(encoding="utf-8")
    assert rows_of(page, "Accuracy")["teacher"][5] == "–"
    [greedy] = [line for line in page.split("\n") if "Greedy" in line]  # recorded answers are as they are
    known = {"teacher": {"mean_tokens": 5.0}}
    assert "teacher" in greedy and "teacher" not in report.how_answered(known, report.MODELS)
    assert numbers["accuracy"]["ppo_r1"]["strict"] == 0.5 and numbers["reward_model"]["pair_accuracy"] == 0.875
    scores = lambda stages: [row["objective/scores"] for row in report.read_run(run).metrics(stages)]
    assert scores(report.LEARNED) == [0, 1, 2, 3, 4, 10, 11, 12] and scores(report.RAW) == [0, 1, 2, 3, 4]


def test_sampled_answers_are_told_where_both_were_asked(tmp_path):
    run = make_run(tmp_path)
    write_evaluation(run, "best_of_n", ANSWERS["best_of_n"], single_sample_accuracy=0.375)
    said = lambda: (report_of(run)["sampled"], *map((run / "report.md").read_text().__contains__, ("37.5 %", "62.5 %")))
    assert said() == ({"sft": 0.375, "ppo": None}, False, False)
    write_done(run / "7_eval" / "best_of_n" / "ppo", single_sample_accuracy=0.625)
    assert said() == ({"sft": 0.375, "ppo": 0.625}, True, True)
    page = (run / "report.md").read_text()
    assert page.index("37.5 %") < page.index("62.5 %")  # SFT before PPO


def test_the_picture_of_the_result_by_hand(tmp_path, figures):
    """A bar for each student, its interval, the teacher as a line; nothing behind it, for a page of any colour."""
    rows = {"SFT": {"share": 0.5, "ci95": [0.25, 0.75]}, "PPO": {"share": 0.875, "ci95": [0.75, 1.0]}}
    pictures.draw_result(tmp_path / "a.png", rows, {"share": 0.625}, "% right")
    [axis] = figures[0].axes
    assert [bar.get_width() for bar in axis.patches] == [50, 87.5]
    assert [list(line.get_xdata()) for line in axis.lines] == [[25, 75], [75, 100], [62.5, 62.5]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["SFT", "PPO"] and axis.yaxis_inverted()
    assert {"50.0", "87.5", "teacher 62.5"} <= {text.get_text() for text in axis.texts}
    pictures.draw_result(tmp_path / "b.png", rows, None, "% right")
    assert len(figures[1].axes[0].lines) == 2  # a teacher that was not asked


def test_curves_have_one_unit_an_axis_and_nothing_leaves_it(tmp_path, monkeypatch, draw_pictures, figures):
    """The raw vote's score is of another unit than the learned one's. A critic that starts far below 0 is marked."""
    monkeypatch.setattr(report, "draw_pictures", draw_pictures)
    report_of(make_run(tmp_path))
    score, *_, explained = figures[1].axes
    assert [list(line.get_ydata()) for line in score.lines if len(line.get_ydata())] == [[0, 1, 2, 3, 4]]
    low, high = explained.get_ylim()
    assert all(low <= y <= high for line in explained.lines for y in line.get_ydata())
    assert [line.get_marker() for line in explained.lines if len(line.get_ydata())].count("v") == 2
    pictures.draw_curves(tmp_path / "one.png", {"learned": [{"objective/scores": 1.0}]})
    assert all(tick == int(tick) for figure in figures[1:] for axis in figure.axes for tick in axis.get_xticks())
    pictures.draw_curves(tmp_path / "nothing.png", {"learned": []})  # where there was no PPO
    for name in ("result", "curves", "one", "nothing"):
        width, height = struct.unpack(">II", (tmp_path / f"{name}.png").read_bytes()[16:24])
        assert 900 <= width <= 2400 and 0.2 < height / width < 0.8  # a PNG that reads well
