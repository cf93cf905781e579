"""eval.py: intervals, summaries, the reward model's scores, and transcripts that agree with the numbers."""

import json

import pytest
import torch
from test_sft import on_the_cpu, tiny_folder  # noqa: F401 (a fixture)

import eval as evaluation
import generate
import ppo
import quality
from data import Question, Tokenizer, write_jsonl
from model import load_model, load_scalar_model, save_model
from reward import score_responses
from runtime.files import read_jsonl


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("eval") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model."""
    return tiny_folder(tmp_path_factory.mktemp("eval") / "other", seed=5)


@pytest.fixture(scope="module")
def scorer(tiny, tmp_path_factory):
    """A random reward model's folder."""
    folder = tmp_path_factory.mktemp("eval") / "scorer"
    torch.manual_seed(1)
    model = load_scalar_model(tiny, new_head="normal")
    model.score_mean = 0.3
    save_model(model, folder)
    Tokenizer(tiny).save(folder)
    return str(folder)


# ---- what is counted -----------------------------------------------------------------------------------------------


def test_wilson_interval_examples():
    assert evaluation.wilson_interval(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)
    assert evaluation.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-4)


def test_every_answer_is_graded_strictly_and_leniently():
    questions = [Question("a", "3+4?", "7"), Question("b", "1+1?", "2"), Question("c", "2*3?", "6"),
                 Question("d", "9?", "9"), Question("e", "Which?", "B", "choice", ("x", "y"))]
    texts = ["#### 7", "so 2", "#### 8", "no idea", "The answer is (B)."]  # right, if lenient, wrong, none, right
    finishes = ["stop", "stop", "stop", "length", "stop"]
    graded = [evaluation.grade(*row) for row in zip(questions, texts, finishes, (8, 6, 7, 7, 19), strict=True)]
    assert evaluation.summarise(graded) == {
        "strict": 0.4, "lenient": 0.6, "n": 5, "ci95": list(evaluation.wilson_interval(2, 5)), "no_answer": 0.4,
        "truncated": 0.2, "mean_tokens": (8 + 6 + 7 + 7 + 19) / 5}
    for key, column in {"id": list("abcde"), "gold": list("7269B"), "answer": ["7", None, "8", None, "B"],
                        "answer_lenient": ["7", "2", "8", None, "B"], "response": texts, "finish": finishes,
                        "correct": [True, False, False, False, True],
                        "correct_lenient": [True, True, False, False, True]}.items():
        assert [transcript[key] for transcript in graded] == column


def test_a_judge_is_compared_with_gold():
    rows = [{"scores": [2.0, 1.0], "correct": [True, False], "tokens": [7, 7]},
            {"scores": [-2.0, -1.5], "correct": [True, False], "tokens": [7, 7]},
            {"scores": [0.5, 0.0], "correct": [False, False], "tokens": [7, 7]}]
    assert quality.against_gold(rows, 1.0) == {
        "auc_gold": 0.5,  # right: 2, -2; wrong: 1, -1.5, .5, 0: the first outscores all four, the second none
        # two questions have a right and a wrong answer, all of one length: one is in order. sigmoid(1) = .7311, of
        # 0.5 it is .6225: the judge is too careful by .2689 and then too sure by .6225
        "pairs_gold": 2, "pair_accuracy_gold": 0.5, "ties_gold": 0.0, "margin_gold": 0.25, "longer_wins_gold": 0.5,
        "equal_length_accuracy_gold": 0.5, "equal_length_pairs_gold": 2,
        "ece_gold": pytest.approx((0.268941 + 0.622459) / 2),
        "length_correlation_gold": 0.0, "single_sample_accuracy": pytest.approx(2 / 6),
        "any_right": pytest.approx(2 / 3)}


def test_confidence_is_that_of_the_margin_that_was_trained(tmp_path):
    """The saved scores were divided by score_std: two such margins of 1 were margins of 2, whose sigmoid is .881."""
    judge = quality.against_gold([{"scores": [0.5, -0.5], "correct": [True, False], "tokens": [3, 9]}], 2.0)
    assert judge["ece_gold"] == pytest.approx(1 - 0.880797)
    assert (judge["margin_gold"], judge["longer_wins_gold"], judge["equal_length_accuracy_gold"]) == (1.0, 0.0, None)
    assert judge["length_correlation_gold"] == pytest.approx(-1.0)
    assert quality.trained_scale(str(tmp_path)) == 1.0  # a reward model of someone else
    (tmp_path / "done.json").write_text('{"results": {"score_std": 2.5}}')
    assert quality.trained_scale(str(tmp_path)) == 2.5


# ---- the script ----------------------------------------------------------------------------------------------------


def sums(n):
    """n questions 'i+1?' with their gold answers."""
    return [{"id": str(i), "question": f"{i}+1?", "answer": str(i + 1)} for i in range(n)]


def run(tmp_path, *models, questions=sums(6), max_new_tokens=8, **flags):  # noqa: B008
    """What is written for each model: transcripts, done.json, scores."""
    write_jsonl(tmp_path / "questions.jsonl", questions)
    evaluation.main(evaluation.Config(models, str(tmp_path / "questions.jsonl"), str(tmp_path / "out"),
                                      max_new_tokens=max_new_tokens, **flags))
    for folder in (tmp_path / "out" / model.partition("=")[0] for model in models):
        scores = list(read_jsonl(folder / "scores.jsonl")) if (folder / "scores.jsonl").exists() else []
        yield list(read_jsonl(folder / "transcripts.jsonl")), json.loads((folder / "done.json").read_text()), scores


def test_each_model_answers_by_itself_into_its_own_folder(tiny, other, tmp_path):
    """Each transcript is the model's own greedy continuation, token by token; the summary agrees with them."""
    found = list(run(tmp_path, f"a={tiny}", f"b={other}"))
    assert found[0][0] != found[1][0]
    for name, folder, (transcripts, done, _) in zip("ab", (tiny, other), found):
        assert done["results"]["name"] == name and done["results"]["accuracy"] == evaluation.summarise(transcripts)
        assert done["results"]["accuracy"]["n"] == 6 and done["tokens"] == sum(t["tokens"] for t in transcripts)
        tokenizer, model = Tokenizer(folder), load_model(folder)
        for row, transcript in zip(sums(6), transcripts, strict=True):
            ids = tokenizer.chat(row["question"])
            start = len(ids)
            while len(ids) < start + 8 and tokenizer.end_id not in ids:
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
            assert (transcript["id"], transcript["response"]) == (row["id"], tokenizer.decode(ids[start:]))
            assert transcript["tokens"] == len(ids) - start
            assert transcript["finish"] == ("stop" if ids[-1] == tokenizer.end_id else "length")
    summary, transcripts = evaluation.accuracy(
        model, tokenizer, [Question(**row) for row in sums(6)], max_new_tokens=8, batch_size=4)
    assert (summary, transcripts) == (found[1][1]["results"]["accuracy"], found[1][0])


def test_a_model_that_was_answered_is_skipped_and_a_new_one_is_not(tiny, other, tmp_path, capsys):
    def dones():
        return {path.parent.name: path.read_bytes() for path in (tmp_path / "out").glob("*/done.json")}

    list(run(tmp_path, f"a={tiny}"))
    before = dones()
    list(run(tmp_path, f"a={tiny}", f"b={other}"))
    assert dones().keys() == {"a", "b"} and dones()["a"] == before["a"] and "skipped" in capsys.readouterr().out
    list(run(tmp_path, f"a={other}", f"b={other}"))  # another model under the same name
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "a.old1", "b"} and dones()["a"] != before["a"]


@torch.no_grad()
def test_best_of_n_keeps_the_answer_that_its_reward_model_likes_best(tiny, scorer, tmp_path, monkeypatch):
    """All samples' scores are kept, the best one's transcript; the same for any --batch_size and in parts."""
    found = []
    for part, batch_size in ((512, 256), (16, 8)):
        monkeypatch.setattr(generate, "PART", part)
        found += run(tmp_path / f"{part} {batch_size}", f"n={tiny}", reward_model=scorer, samples=8,
                     batch_size=batch_size, max_new_tokens=20)
    (transcripts, done, scored), *others = found
    for again, _, scores in others:
        assert again == [row | {"score": pytest.approx(row["score"], abs=1e-4)} for row in transcripts]
        assert scores == [row | {"scores": pytest.approx(row["scores"], abs=1e-4)} for row in scored]
    tokenizer, model = Tokenizer(tiny), load_scalar_model(scorer)
    compared = 0
    for row, transcript, question in zip(scored, transcripts, sums(6), strict=True):
        response = tokenizer.response(transcript["response"])
        if transcript["finish"] == "stop" and transcript["tokens"] == len(response):  # no <s> was sampled within
            ids = tokenizer.chat(transcript["question"]) + response
            assert model(torch.tensor([ids]))[0, -1].item() == pytest.approx(transcript["score"], abs=1e-4)
            compared += 1
        best = row["scores"].index(max(row["scores"]))
        assert row["id"] == transcript["id"] == question["id"]
        assert row["scores"][best] == pytest.approx(transcript["score"], abs=1e-4) and len(set(row["scores"])) > 3
        assert (row["tokens"][best], row["correct"][best]) == (transcript["tokens"], transcript["correct"])
        assert row["answers"][best] == transcript["answer"] and len(row["scores"]) == 8
    assert compared
    assert done["tokens"] == sum(sum(row["tokens"]) for row in scored)
    prompts = 8 * sum(len(tokenizer.chat(row["question"])) for row in sums(6))
    both = sum(p.numel() for p in load_model(tiny).parameters()) + sum(p.numel() for p in model.parameters())
    assert done["flops"] == 2 * both * (done["tokens"] + prompts)


@pytest.mark.parametrize("unfinished", [None, -0.5])
def test_best_of_n_never_chooses_what_was_cut_off_for_its_score(tiny, scorer, tmp_path, monkeypatch, unfinished):
    """Of four answers the one that the reward model likes best was cut off: it has PPO's score for that, in the choice
    and in every quality of the judge. The default is that of ppo.py."""
    tokenizer, judge = Tokenizer(tiny), load_scalar_model(scorer)
    said = [tokenizer.encode(f"{'1 ' * k}#### {k}") for k in range(1, 5)]  # right for question k - 1
    prompts = [tokenizer.chat(row["question"]) for row in sums(6)]
    with torch.no_grad():
        raw = [[judge(torch.tensor([prompt + tokens]))[0, -1].item() + 5 for tokens in said] for prompt in prompts]
    cut = [row.index(max(row)) for row in raw]
    instead = ppo.Config.unfinished_score if unfinished is None else unfinished
    counts = [[instead if k == cut[i] else score for k, score in enumerate(row)] for i, row in enumerate(raw)]

    def sample(model, prompts, *_, **options):
        return [generate.Response(tokens, [], "length" if k == worst else "stop")
                for worst in cut for k, tokens in enumerate(said)]

    monkeypatch.setattr(generate, "generate", sample)
    monkeypatch.setattr(evaluation, "score_responses", lambda *args: score_responses(*args) + 5)  # well above -0.5
    flags = {} if unfinished is None else {"unfinished_score": unfinished}
    [(transcripts, done, scored)] = run(tmp_path, f"n={tiny}", reward_model=scorer, samples=4, **flags)
    assert [row["scores"] for row in scored] == [pytest.approx(row, abs=1e-4) for row in counts]
    assert [row["answer"] for row in transcripts] == [str(row.index(max(row)) + 1) for row in counts]
    assert not done["results"]["accuracy"]["truncated"]

    def qualities(scores):
        same = {"tokens": [len(tokens) for tokens in said]}
        rows = [{"scores": row, "correct": [k == i for k in range(4)]} for i, row in enumerate(scores)]
        return quality.against_gold([row | same for row in rows], 1.0)

    found = {name: done["results"][name] for name in qualities(counts)}
    assert found == pytest.approx(qualities(counts), abs=1e-4)
    differ = {name for name, value in qualities(raw).items() if value != pytest.approx(found[name], abs=1e-3)}
    assert differ >= {"auc_gold", "margin_gold", "ece_gold", "length_correlation_gold"}


def test_best_of_n_that_was_cut_off_between_two_lines_has_each_once(tiny, scorer, tmp_path, monkeypatch):
    calls, grade = [], evaluation.grade

    def grade_or_cut(*row):
        calls.append(row)
        if len(calls) == 28:  # in the second part, whose first question is written already
            raise KeyboardInterrupt
        return grade(*row)

    monkeypatch.setattr(generate, "PART", 16)
    flags = {"reward_model": scorer, "samples": 8}
    [whole] = run(tmp_path / "whole", f"n={tiny}", **flags)
    monkeypatch.setattr(evaluation, "grade", grade_or_cut)
    with pytest.raises(KeyboardInterrupt):
        list(run(tmp_path / "cut", f"n={tiny}", **flags))
    [again] = run(tmp_path / "cut", f"n={tiny}", **flags)
    assert (again[0], again[2]) == (whole[0], whole[2]) and len(calls) == 28 + 32


def test_answers_are_not_lost_or_doubled_by_a_kill_after_the_last(tiny, tmp_path, monkeypatch):
    def cut(transcripts):
        raise KeyboardInterrupt

    write_jsonl(tmp_path / "recorded.jsonl", [{"id": str(i), "responses": ["7"]} for i in range(6)])
    for name, folder in (("model", tiny), ("recorded", tmp_path / "recorded.jsonl")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluation, "summarise", cut)
            list(run(tmp_path, f"{name}={folder}"))
        with monkeypatch.context() as patch:
            patch.setattr(generate, "generate", None)  # is not asked again
            [(transcripts, _, _)] = run(tmp_path, f"{name}={folder}")
        assert [transcript["id"] for transcript in transcripts] == list("012345")


def test_recorded_answers_are_graded_without_a_model(tmp_path):
    """The first answer to each question counts; what nobody recorded is an error and not a wrong answer."""
    rows = [{"id": str(i), "responses": [f"#### {i + 1 + (i == 2)}", "#### 0"]} for i in range(6)]
    rows[4] = {"custom_id": "4", "choices": [{"message": {"content": "5 is"}, "finish_reason": "length"}]}
    write_jsonl(tmp_path / "recorded.jsonl", rows)
    [(transcripts, done, _)] = run(tmp_path, f"api={tmp_path}/recorded.jsonl")
    assert [t["correct"] for t in transcripts] == [True, True, False, True, False, True]
    assert done["results"]["accuracy"] == {
        "strict": 4 / 6, "lenient": 5 / 6, "n": 6, "ci95": list(evaluation.wilson_interval(4, 6)), "no_answer": 1 / 6,
        "truncated": 1 / 6, "mean_tokens": None}
    write_jsonl(tmp_path / "recorded.jsonl", rows[:5])
    with pytest.raises(ValueError, match="1 of 6 questions"):
        list(run(tmp_path, f"api={tmp_path}/recorded.jsonl"))


def test_a_model_may_be_asked_with_shots(tiny, tmp_path, monkeypatch):
    """It completes the examples, until it asks itself; done.json says how many there were."""
    monkeypatch.setattr(generate, "few_shot_prompt", lambda question, shots: "=" * shots + question.question)
    monkeypatch.setattr(evaluation, "STOP_TEXT", {"number": "#"})
    tokenizer, model = Tokenizer(tiny), load_model(tiny)
    [(transcripts, done, _)] = run(tmp_path, f"m={tiny}", shots=5)
    assert done["config"]["shots"] == done["settings"]["shots"] == 5
    for transcript in transcripts:
        ids = tokenizer.text("=====" + transcript["question"])
        said = generate.generate(model, [ids], 8, 0, tokenizer.stop_ids)[0].tokens
        assert transcript["response"] == tokenizer.decode(said).split("#")[0]


@pytest.mark.parametrize(("models", "flags", "named"), [
    ("m=m", {"samples": 2}, "--samples"), ("m=m", {"reward_model": "x"}, "--reward_model"),
    ("m=m", {"reward_model": "r", "samples": 2, "shots": 5}, "--shots"), ("m=FILE", {"shots": 5}, "FILE"),
    ("m", {}, "'m'"), ("=m", {}, "'=m'"), ("a/b=m", {}, "'a/b=m'"), ("..=m", {}, "'..=m'"), (".=m", {}, "'.=m'"),
    ("a=m a=n", {}, "'a=m'"), ("seed=m", {}, "'seed=m'"), ("m=nowhere", {}, "nowhere"),
    ("m=FILE", {"questions": []}, "questions.jsonl holds no question"),
    ("m=FILE", {"questions": sums(9)}, "3 of 9 questions"),
    ("m=FILE", {"questions": [{"question": "1+1?"}]}, "1 questions have no gold answer"),
])
def test_words_and_flags_that_make_no_sense_are_named(models, flags, named, tmp_path):
    file = tmp_path / "recorded.jsonl"
    write_jsonl(file, [{"id": str(i), "responses": ["#### 1"]} for i in range(6)])
    with pytest.raises((ValueError, OSError), match=named.replace("FILE", str(file))):
        list(run(tmp_path, *models.replace("FILE", str(file)).split(), **flags))
    assert not (tmp_path / "out").exists()
