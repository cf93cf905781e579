"""bench/ablation.py and bench/sizes.py: numbers against other formulas and by hand, and the pages from run folders."""

import json
import math
from types import SimpleNamespace

import ablation
import numpy as np
import pytest
import sizes
from ablation import gain, holm, p_value, student_bound, student_p, two_way_bootstrap

from report import evaluation
from runtime.files import write_jsonl


def test_the_bootstrap_varies_over_seeds_and_over_questions():
    """For values a_s + b_q the variance of the mean is var(a)/S + var(b)/Q, and the mean stays."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 0.2, 4), rng.normal(0.3, 1.0, 60)
    values = a[:, None] + b
    means = two_way_bootstrap(values, np.random.default_rng(1))
    assert means.shape == (ablation.RESAMPLES,)
    assert means.mean() == pytest.approx(values.mean(), abs=0.005)
    assert means.var() == pytest.approx(a.var() / 4 + b.var() / 60, rel=0.05)
    only_seeds = two_way_bootstrap(np.repeat(a[:, None], 60, 1), np.random.default_rng(1))
    assert only_seeds.var() == pytest.approx(a.var() / 4, rel=0.05)
    only_questions = two_way_bootstrap(np.repeat(b[None], 4, 0), np.random.default_rng(1))
    assert only_questions.var() == pytest.approx(b.var() / 60, rel=0.05)


def test_the_p_value_is_two_sided_and_never_zero():
    means = np.array([-1.0] * 2 + [1.0] * 97)
    assert p_value(means) == pytest.approx(2 * 3 / 100) == p_value(-means)
    assert p_value(np.ones(99)) == pytest.approx(2 / 100)
    assert p_value(np.zeros(99)) == 1


def test_student_is_that_of_the_tables_and_of_the_integral():
    table = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032),
             9: (2.262, 3.250), 30: (2.042, 2.750)}  # two-sided 0.05 and 0.01
    for freedom, (five, one) in table.items():
        assert student_p(five, freedom) == pytest.approx(0.05, rel=1e-3)
        assert student_p(-one, freedom) == pytest.approx(0.01, rel=1e-3)
        assert student_bound(freedom) == pytest.approx(five, abs=6e-4)
    assert student_p(0, 4) == 1 and student_p(1e99, 4) == student_p(1e99, 1) == 0
    for freedom in range(1, 9):
        x = np.linspace(-1.7, 1.7, 20001)
        density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2) / math.sqrt(freedom * math.pi)
        density *= math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        inside = ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
        assert student_p(1.7, freedom) == pytest.approx(1 - inside, abs=1e-6)


def test_of_bootstrap_and_student_the_less_sure_one_counts():
    rng = np.random.default_rng(0)
    apart = np.repeat([[0.1], [0.2], [0.6]], 50, 1)  # seeds differ, questions do not: mean .3, deviation .2646
    found = gain(apart, rng)
    assert p_value(two_way_bootstrap(apart, rng)) < 0.01 < found["p"]
    assert found["p"] == pytest.approx(student_p(0.3 / 0.264575 * 3**0.5, 2), rel=1e-4)
    assert found["ci95"] == pytest.approx([0.3 - 4.3027 * 0.152753, 0.3 + 4.3027 * 0.152753], abs=1e-4)
    assert (found["mean"], found["by_seed"]) == (pytest.approx(0.3), pytest.approx([0.1, 0.2, 0.6]))
    alike = np.repeat(rng.choice([-1.0, 1.0], 50, p=[0.4, 0.6])[None], 3, 0)  # the other way round
    found, means = gain(alike, np.random.default_rng(1)), two_way_bootstrap(alike, np.random.default_rng(1))
    assert found["p"] == p_value(means) > 0.02
    assert found["ci95"] == np.quantile(means, [0.025, 0.975]).tolist()
    one_seed = gain(alike[:1], rng)
    assert one_seed["p"] is None and one_seed["ci95"] == pytest.approx(found["ci95"], abs=0.03)
    assert gain(np.zeros((3, 9)), rng) == {"mean": 0, "ci95": [0, 0], "by_seed": [0, 0, 0], "p": 1}
    share = ablation.interval(np.repeat([[1.0] * 9 + [0.0], [0.8] * 10], 5, 1), rng)  # t alone would go above 1
    assert share["ci95"][1] == 1.0 and "p" not in share


@pytest.mark.parametrize("points", [0, 2.8, 10])
def test_the_p_value_holds_its_level_whatever_the_seeds_differ_by(points, monkeypatch):
    """Five seeds and as much noise as in 1,000 questions, of which a fifth differ: equals are below 0.05 in about 5 of
    100 comparisons, below a fifteenth of that, which Holm asks for first, in hardly any; better ones are found."""
    monkeypatch.setattr(ablation, "RESAMPLES", 1000)  # p is a multiple of .002
    rng, equal, bootstrap, better = np.random.default_rng(7), [], [], []
    for i in range(400):
        values = rng.normal(0, points / 100, (5, 1)) + rng.normal(0, 0.45 * (10 / 1000) ** 0.5, (5, 10))
        equal.append(gain(values, rng)["p"])
        if points == 10:
            bootstrap.append(p_value(two_way_bootstrap(values, rng)))
        if i % 10 == 0:
            better.append(gain(values + 4 * 0.45 / 1000**0.5 + 3 * points / 100, rng)["p"])
    below = lambda found, level: sum(p < level for p in found) / len(found)
    assert below(equal, 0.05) <= 0.065 and below(equal, 0.05 / 15) <= 0.0075
    assert below(better, 0.05) > 0.9
    if points == 10:  # the bootstrap alone takes five seeds for many
        assert below(bootstrap, 0.05) > 0.1 and below(bootstrap, 0.05 / 15) > 0.02


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9, 0.001]) == pytest.approx([1.0, 1.0, 0.003])
    assert holm([0.2]) == [0.2] and holm([]) == []


def run_folder(folder, right, kl=1.0, ids="abcdefghij"):
    """A run with these evaluations: arm -> how many of the ten questions, from the first on, are right."""
    for arm, count in right.items():
        rows = [{"id": key, "correct": i < count} for i, key in enumerate(ids)]
        write_jsonl(folder / evaluation(arm) / "transcripts.jsonl", rows[::-1] if arm == "sft" else rows)
        done(folder / evaluation(arm), {"accuracy": {"strict": count / 10, "mean_tokens": 10.0 + count}})
    for stage, results in (("5_reward", {"pair_accuracy": 0.75}), ("6_ppo", {"kl": kl}), ("6_ppo+kl0", {"kl": 9.0})):
        write_jsonl(folder / stage / "metrics.jsonl", [])
        done(folder / stage, results)
    return str(folder)


def done(folder, results):
    record = {"results": results, "settings": {}, "inputs": {}, "seconds": 2.0, "tokens": 1, "flops": 1.0,
              "peak_memory_mb": 1, "versions": {"torch": "2"}}
    (folder / "done.json").write_text(json.dumps(record))


def test_the_numbers_of_a_small_ablation_by_hand(tmp_path):
    """Two seeds, ten questions; the rows of one arm are in another order than those of the others."""
    folders = (run_folder(tmp_path / "0", {"teacher": 7, "sft": 5, "ppo": 9, "ppo+kl0": 8}),
               run_folder(tmp_path / "1", {"teacher": 7, "sft": 6, "ppo": 10, "ppo+kl0": 8}, kl=3.0))
    ablation.main(ablation.Config(folders, str(tmp_path / "out")))
    numbers = json.loads((tmp_path / "out" / "ablation.json").read_text())
    method = numbers["accuracy"]["ppo"]
    assert method["mean"] == 0.95 and method["by_seed"] == [0.9, 1.0] and method["mean_tokens"] == 19.5
    assert method["kl"] == 2.0 and method["judge_pair_accuracy"] == 0.75
    assert numbers["accuracy"]["ppo+kl0"]["kl"] == 9.0 and numbers["accuracy"]["sft"]["judge_pair_accuracy"] is None
    assert method["ci95"][0] < 0.95 < method["ci95"][1] or method["ci95"][1] == 1.0
    tests = {(test["one"], test["other"]): test for test in numbers["comparisons"]}
    assert set(tests) == {("ppo", "sft"), ("ppo", "teacher"), ("ppo", "ppo+kl0")}
    assert (tmp_path / "0" / "7_eval" / "arms" / "ppo+kl0").is_dir()
    gain = tests["ppo", "sft"]
    assert gain["difference"] == pytest.approx(0.4) and gain["by_seed"] == pytest.approx([0.4, 0.4])
    assert gain["p"] < gain["p_holm"] < 0.05 and gain["verdict"] == "better"
    assert tests["ppo", "ppo+kl0"]["verdict"] == "within noise"
    assert [test["p_holm"] for test in tests.values()] == holm([test["p"] for test in tests.values()])
    assert {"ppo+gold", "base"} <= set(numbers["missing"]) and numbers["questions"] == 10
    assert numbers["seconds"] == dict.fromkeys(folders, 14.0)
    page = (tmp_path / "out" / "ablation.md").read_text()
    assert " +40.0 |" in page and " 95.0 |" in page
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 10_000


def test_the_verdict_rests_on_the_corrected_p_and_the_page_shows_it(tmp_path):
    """The method has 1 to 16 questions of 60 more right than two others: p .038, corrected .076."""
    ids, more = [f"q{i:02}" for i in range(60)], (1, 8, 16, 4, 14)
    folders = tuple(run_folder(tmp_path / str(seed), {"teacher": 20, "sft": 20, "ppo": 20 + n}, ids=ids)
                    for seed, n in enumerate(more))
    ablation.main(ablation.Config(folders, str(tmp_path / "out")))
    found = json.loads((tmp_path / "out" / "ablation.json").read_text())["comparisons"]
    expected = student_p(np.mean(more) / np.std(more, ddof=1) * 5**0.5, 4)
    assert [test["p"] for test in found] == pytest.approx([expected] * 2) and 0.025 < expected < 0.05
    assert [(test["p_holm"], test["verdict"]) for test in found] == [(pytest.approx(2 * expected), "within noise")] * 2
    page = (tmp_path / "out" / "ablation.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.split("\n") if "against" in line and line.startswith("|")][1:]
    assert [float(row[-2]) for row in rows] == pytest.approx([2 * expected] * 2, rel=0.02)


def test_runs_on_other_questions_are_refused(tmp_path):
    right = {"sft": 5, "ppo": 9}
    folders = run_folder(tmp_path / "0", right), run_folder(tmp_path / "1", right, ids="abcdefghiJ")
    with pytest.raises(ValueError, match=r"1: other questions in 7_eval/test/sft"):
        ablation.main(ablation.Config(folders, str(tmp_path / "out")))
    with pytest.raises(ValueError, match="two or more"):
        ablation.main(ablation.Config(folders[:1], str(tmp_path / "out")))


def test_an_ablation_without_the_method_is_refused():
    run = SimpleNamespace(transcripts=lambda arm: {"a": {"correct": True}} if arm == "sft" else {},
                          rows=lambda *_: [])
    with pytest.raises(ValueError, match="7_eval/test/ppo"):
        ablation.build({"x": run, "y": run})


# ---- bench/sizes.py ------------------------------------------------------------------------------------------------


def sized(folder, right, student):
    """A run folder whose models say how large they are."""
    run_folder(folder, right)
    for arm in right:
        path = folder / evaluation(arm) / "done.json"
        record = json.loads(path.read_text())
        record["results"]["parameters"] = 5000 if arm == "teacher" else student
        path.write_text(json.dumps(record))
    return str(folder)


def test_the_gain_of_each_size_by_hand(tmp_path):
    """Three runs, two sizes: the seeds of one size are one row, the smaller student comes first."""
    folders = (sized(tmp_path / "a", {"teacher": 7, "base": 2, "sft": 6, "ppo": 9}, 1000),
               sized(tmp_path / "b", {"teacher": 7, "base": 3, "sft": 5, "ppo": 10}, 1000),
               sized(tmp_path / "c", {"teacher": 7, "base": 1, "sft": 4, "ppo": 5}, 200))
    sizes.main(sizes.Config(folders, str(tmp_path / "out")))
    numbers = json.loads((tmp_path / "out" / "sizes.json").read_text())
    small, large = numbers["students"]
    assert (small["parameters"], large["parameters"]) == (200, 1000) and large["runs"] == list(folders[:2])
    assert numbers["teacher"]["mean"] == 0.7 and numbers["teacher"]["parameters"] == 5000
    assert large["base"]["mean"] == pytest.approx(0.25) and large["ppo"]["by_seed"] == [0.9, 1.0]
    assert large["gain_sft"]["mean"] == pytest.approx(0.4) and large["gain_teacher"]["mean"] == pytest.approx(0.25)
    assert small["gain_sft"]["mean"] == pytest.approx(0.1) and small["gain_teacher"]["mean"] == pytest.approx(-0.2)
    assert large["gain_sft"]["ci95"][0] < 0.4 < large["gain_sft"]["ci95"][1]
    page = (tmp_path / "out" / "sizes.md").read_text()
    assert "+40.0 [" in page and "-20.0 [" in page and page.index("| 200 ") < page.index("| 1,000 ")
    assert (tmp_path / "out" / "sizes.png").stat().st_size > 10_000


def test_sizes_that_cannot_be_compared_are_refused(tmp_path):
    right = {"teacher": 7, "base": 2, "sft": 6, "ppo": 9}
    one, other = sized(tmp_path / "a", right, 1000), sized(tmp_path / "b", right, 1000)
    with pytest.raises(ValueError, match="one size"):
        sizes.main(sizes.Config((one, other), str(tmp_path / "out")))
    (tmp_path / "b" / evaluation("base") / "done.json").unlink()
    with pytest.raises(ValueError, match="b: 7_eval/test/base is not finished"):
        sizes.main(sizes.Config((one, other), str(tmp_path / "out")))


def test_the_majority_of_n_answers_is_an_arm_of_its_own(tmp_path):
    """Two of three agree; a tie of three is a coin with three sides; no answer never wins."""
    scored = [(["7", "7", "8"], [True, True, False]), (["8", "7", "8"], [False, True, False]),
              (["6", "7", "8"], [False, True, False]), (["7", None, None], [True, False, False])]
    folders = []
    for seed in "01":
        folder = tmp_path / seed
        run_folder(folder, {"sft": 5, "ppo": 9, "best_of_n": 2}, ids="abcd")
        rows = [{"id": key, "answers": answers, "correct": right, "scores": [1.0, 2.0, 3.0], "tokens": [1, 1, 1]}
                for key, (answers, right) in zip("abcd", scored)]
        write_jsonl(folder / evaluation("best_of_n") / "scores.jsonl", rows)
        folders.append(str(folder))
    ablation.main(ablation.Config(tuple(folders), str(tmp_path / "out")))
    numbers = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert numbers["accuracy"]["majority_of_n"]["mean"] == pytest.approx((1 + 0 + 1 / 3 + 1) / 4)
    assert any((test["one"], test["other"]) == ("ppo", "majority_of_n") for test in numbers["comparisons"])
