"""eval.py: intervals, summaries, the reward model's scores, and transcripts that agree with the numbers."""

import json

import numpy as np
import pytest
import torch
from test_sft import on_the_cpu, tiny_folder  # noqa: F401 (a fixture)

import eval as evaluation
import generate
from data import Question, Tokenizer, write_jsonl
from generate import Response
from model import load_model, load_scalar_model, save_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("eval") / "tiny")


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


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_wilson_interval_examples():
    assert evaluation.wilson_interval(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)
    assert evaluation.wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-4)
    assert evaluation.wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=5e-4)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (1, 3), (5, 10), (8, 10), (83, 100), (999, 1000)])
def test_wilson_interval_is_where_the_score_test_just_rejects(right, n):
    """Independent: the two p with (share - p)^2 = z^2 p (1 - p) / n, as roots of that quadratic."""
    share, z = right / n, 1.96
    roots = sorted(np.roots([1 + z * z / n, -(2 * share + z * z / n), share * share]).real)
    assert evaluation.wilson_interval(right, n) == pytest.approx(roots, abs=1e-6)
    low, high = evaluation.wilson_interval(right, n)
    assert 0 <= low <= share <= high <= 1


# ---- grading -------------------------------------------------------------------------------------------------------

QUESTIONS = [Question("a", "3+4?", "7"), Question("b", "1+1?", "2"), Question("c", "2*3?", "6"),
             Question("d", "9?", "9"), Question("e", "Which?", "B", "choice", ("x", "y"))]
ANSWERS = ["#### 7", "so 2", "#### 8", "no idea", "The answer is (B)."]  # right, right if lenient, wrong, none, right


class Characters:
    """A tokenizer of code points."""

    stop_ids = frozenset([0])

    def chat(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i)


def said(text, finish="stop"):
    tokens = [ord(character) for character in text] + [0] * (finish == "stop")
    return Response(tokens, [0.0] * len(tokens), finish, text)


def test_accuracy_grades_every_answer_strictly_and_leniently(monkeypatch):
    finishes = ["stop", "stop", "stop", "length", "stop"]
    calls = []

    def answer_questions(model, tokenizer, questions, max_new_tokens, temperature, *rest):
        calls.append((max_new_tokens, temperature, rest[-2]))
        return [[said(text, finish)] for text, finish in zip(ANSWERS, finishes)]

    monkeypatch.setattr(evaluation, "answer_questions", answer_questions)
    summary, transcripts = evaluation.accuracy(None, Characters(), QUESTIONS, 9)
    assert calls == [(9, 0.0, 0)]  # greedy
    assert summary == {"strict": 0.4, "lenient": 0.6, "n": 5, "ci95": list(evaluation.wilson_interval(2, 5)),
                       "no_answer": 0.4, "truncated": 0.2, "mean_tokens": (7 + 5 + 7 + 7 + 19) / 5}
    assert [t["id"] for t in transcripts] == list("abcde")
    assert [t["response"] for t in transcripts] == ANSWERS
    assert [t["answer"] for t in transcripts] == ["7", None, "8", None, "B"]
    assert [t["answer_lenient"] for t in transcripts] == ["7", "2", "8", None, "B"]
    assert [t["gold"] for t in transcripts] == ["7", "2", "6", "9", "B"]
    assert [t["correct"] for t in transcripts] == [True, False, False, False, True]
    assert [t["correct_lenient"] for t in transcripts] == [True, True, False, False, True]


def test_best_of_n_keeps_the_answer_that_the_reward_model_likes_best(monkeypatch):
    answers = [[said("#### 7"), said("#### 8")], [said("#### 2"), said("#### 3")], [said("#### 5"), said("#### 4")]]
    scores = {"#### 7": 2.0, "#### 8": 1.0, "#### 2": -2.0, "#### 3": -1.0, "#### 5": 0.5, "#### 4": 0.0}
    monkeypatch.setattr(evaluation, "answer_stage", lambda *_: [answers])
    monkeypatch.setattr(evaluation, "load_scalar_model", lambda *_: torch.nn.Linear(2, 1))

    def score_responses(scorer, prompts, responses, micro_tokens):
        assert [Characters().decode(p) for p in prompts] == ["3+4?", "3+4?", "1+1?", "1+1?", "2*3?", "2*3?"]
        return torch.tensor([scores[Characters().decode(r)] for r in responses])

    monkeypatch.setattr(evaluation, "score_responses", score_responses)
    cfg = evaluation.Config("m", "q", "o", reward_model="r", samples=2)
    transcripts, scored, judge = evaluation.best_of_n(cfg, None, None, Characters(), QUESTIONS[:3])
    assert [(t["answer"], t["correct"], t["score"]) for t in transcripts] == [
        ("7", True, 2.0), ("3", False, -1.0), ("5", False, 0.5)]
    assert scored[1] == {"id": "b", "scores": [-2.0, -1.0], "correct": [True, False], "answers": ["2", "3"],
                         "tokens": [7, 7]}
    assert [row["id"] for row in scored] == ["a", "b", "c"]
    assert judge == {
        # right: 2, -2; wrong: 1, -1, .5, 0 -> the first outscores all four, the second none
        "auc_gold": 0.5, "accuracy_gold": pytest.approx(5 / 6), "threshold_gold": 2.0,
        # two questions have a right and a wrong answer, all of one length: one is in order; sigmoid(1) = .731
        "pairs_gold": 2, "pair_accuracy_gold": 0.5, "ties_gold": 0.0, "margin_gold": 0.0, "longer_wins_gold": 0.5,
        "equal_length_accuracy_gold": 0.5, "equal_length_pairs_gold": 2, "ece_gold": pytest.approx(0.231059, abs=1e-6),
        "reliability_gold": [{"confidence": pytest.approx(0.731059, abs=1e-6), "accuracy": 0.5, "count": 2}],
        "length_correlation_gold": 0.0, "single_sample_accuracy": pytest.approx(2 / 6),
        "any_right": pytest.approx(2 / 3), "scorer_parameters": 3,
        "best_of_n": {"judge": pytest.approx([1 / 3, 1 / 3]), "oracle": pytest.approx([1 / 3, 2 / 3]),
                      "majority": pytest.approx([1 / 3, 1 / 3])}}


def test_confidence_is_that_of_the_margin_that_was_trained(tmp_path):
    """The saved scores were divided by score_std: two such margins of 1 were margins of 2."""
    scored = [{"correct": [True, False], "answers": ["7", "8"], "tokens": [3, 9]}]
    judge = evaluation.judge_quality(torch.tensor([[0.5, -0.5]]), scored, 2.0)
    assert judge["reliability_gold"] == [{"confidence": pytest.approx(0.880797), "accuracy": 1.0, "count": 1}]
    assert (judge["margin_gold"], judge["longer_wins_gold"], judge["equal_length_accuracy_gold"]) == (1.0, 0.0, None)
    assert judge["length_correlation_gold"] == pytest.approx(-1.0)
    assert evaluation.trained_scale(str(tmp_path)) == 1.0  # a reward model of someone else
    (tmp_path / "done.json").write_text('{"results": {"score_std": 2.5}}')
    assert evaluation.trained_scale(str(tmp_path)) == 2.5


# ---- with real models ----------------------------------------------------------------------------------------------


def test_scores_are_read_at_the_last_token_in_the_order_of_the_rows(scorer):
    """Against one unpadded row at a time; any micro-batch; a row's score does not depend on its neighbours."""
    model = load_scalar_model(scorer)
    prompts = [[0, 5, 6], [0, 7], [0, 2, 3, 4, 5], [0, 9]]
    responses = [[3, 1], [8, 8, 8, 8, 1], [1], [4, 1]]
    alone = torch.stack([model(torch.tensor([p + r]))[0, -1] for p, r in zip(prompts, responses)]).detach()
    assert alone.std() > 0.1
    for micro_tokens in (1, 18, 99):
        scores = evaluation.score_responses(model, prompts, responses, micro_tokens)
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    assert not scores.requires_grad


def sums(n):
    """n questions 'i+1?' with their gold answers."""
    return [{"id": str(i), "question": f"{i}+1?", "answer": str(i + 1)} for i in range(n)]


def run(tmp_path, model, **flags):
    write_jsonl(tmp_path / "questions.jsonl", sums(6))
    evaluation.main(evaluation.Config(model, str(tmp_path / "questions.jsonl"), str(tmp_path / "out"),
                                      max_new_tokens=8, **flags))
    transcripts = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    return transcripts, json.loads((tmp_path / "out" / "done.json").read_text())


def test_the_summary_agrees_with_the_transcripts_and_they_with_the_model(tiny, tmp_path):
    """Each transcript is the model's own greedy continuation, token by token."""
    transcripts, done = run(tmp_path, tiny)
    assert done["results"]["accuracy"] == evaluation.summarise(transcripts)
    assert done["results"]["accuracy"]["n"] == 6 and done["tokens"] == sum(t["tokens"] for t in transcripts)
    tokenizer, model = Tokenizer(tiny), load_model(tiny)
    for row, transcript in zip(sums(6), transcripts):
        ids = tokenizer.chat(row["question"])
        start = len(ids)
        while len(ids) < start + 8 and tokenizer.end_id not in ids:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert (transcript["id"], transcript["response"]) == (row["id"], tokenizer.decode(ids[start:]))
        assert transcript["tokens"] == len(ids) - start
        assert transcript["finish"] == ("stop" if ids[-1] == tokenizer.end_id else "length")


def test_best_of_n_reports_the_score_that_its_reward_model_gives(tiny, scorer, tmp_path):
    transcripts, done = run(tmp_path, tiny, reward_model=scorer, samples=8, batch_size=4)
    tokenizer, model = Tokenizer(tiny), load_scalar_model(scorer)
    assert len(transcripts) == 6
    compared = 0
    for transcript in transcripts:
        response = tokenizer.response(transcript["response"])
        if transcript["finish"] == "stop" and transcript["tokens"] == len(response):  # no <s> was sampled within
            ids = tokenizer.chat(transcript["question"]) + response
            assert model(torch.tensor([ids]))[0, -1].item() == pytest.approx(transcript["score"], abs=1e-4)
            compared += 1
    assert compared
    # every sample's score is kept, the best one is the transcript's
    scored = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    results = done["results"]
    for row, transcript in zip(scored, transcripts, strict=True):
        best = row["scores"].index(max(row["scores"]))
        assert row["id"] == transcript["id"] and row["scores"][best] == pytest.approx(transcript["score"], abs=1e-4)
        assert (row["tokens"][best], row["correct"][best]) == (transcript["tokens"], transcript["correct"])
        assert row["answers"][best] == transcript["answer"] and len(row["scores"]) == 8
    assert results["best_of_n"]["judge"][2] == pytest.approx(results["accuracy"]["strict"])
    assert done["tokens"] == sum(sum(row["tokens"]) for row in scored)
    prompts = 8 * sum(len(tokenizer.chat(row["question"])) for row in sums(6))
    both = sum(p.numel() for p in load_model(tiny).parameters()) + sum(p.numel() for p in model.parameters())
    assert done["flops"] == 2 * both * (done["tokens"] + prompts)


def test_recorded_answers_are_graded_without_a_model(tmp_path):
    """The first answer to each question counts; what nobody recorded is an error and not a wrong answer."""
    rows = [{"id": str(i), "responses": [f"#### {i + 1 + (i == 2)}", "#### 0"]} for i in range(6)]
    rows[4] = {"custom_id": "4", "choices": [{"message": {"content": "5 is"}, "finish_reason": "length"}]}
    write_jsonl(tmp_path / "recorded.jsonl", rows)
    transcripts, done = run(tmp_path, str(tmp_path / "recorded.jsonl"))
    assert [t["correct"] for t in transcripts] == [True, True, False, True, False, True]
    assert done["results"]["accuracy"] == {
        "strict": 4 / 6, "lenient": 5 / 6, "n": 6, "ci95": list(evaluation.wilson_interval(4, 6)), "no_answer": 1 / 6,
        "truncated": 1 / 6, "mean_tokens": None}
    write_jsonl(tmp_path / "recorded.jsonl", rows[:5])
    with pytest.raises(ValueError, match="1 of 6 questions have no recorded answer, the first is '5'"):
        run(tmp_path, str(tmp_path / "recorded.jsonl"))


def test_a_question_set_may_be_named_instead_of_being_a_file(tiny, tmp_path, monkeypatch):
    """'arith:test' is a question set to every script, as load_questions says."""
    monkeypatch.setattr(evaluation, "load_questions", lambda spec, limit: QUESTIONS[:4][:limit])
    for limit, n in ((0, 4), (3, 3)):  # 0: all
        evaluation.main(evaluation.Config(tiny, "arith:test", str(tmp_path / "out"), max_new_tokens=1, limit=limit))
        assert json.loads((tmp_path / "out" / "done.json").read_text())["results"]["accuracy"]["n"] == n


def test_a_question_without_a_gold_answer_is_an_error(tiny, tmp_path):
    write_jsonl(tmp_path / "questions.jsonl", [{"question": "3+4?", "answer": "7"}, {"question": "1+1?"}])
    with pytest.raises(ValueError, match="1 questions have no gold answer"):
        evaluation.main(evaluation.Config(tiny, str(tmp_path / "questions.jsonl"), str(tmp_path / "out")))


def test_shots_are_asked_for_and_written_down(tiny, tmp_path, monkeypatch):
    """--shots reaches answer_questions as it is; done.json says it."""
    asked = []
    real = generate.answer_questions
    monkeypatch.setattr(generate, "answer_questions",
                        lambda *args: asked.append(args[-2]) or real(*args[:-2], 0, args[-1]))
    _, done = run(tmp_path, tiny, shots=5)
    assert asked == [5] and done["config"]["shots"] == done["settings"]["shots"] == 5


def test_shots_go_with_a_model_alone(tiny, tmp_path):
    write_jsonl(tmp_path / "recorded.jsonl", [{"id": str(i), "responses": ["7"]} for i in range(6)])
    for model, flags in ((str(tmp_path / "recorded.jsonl"), {}), (tiny, {"reward_model": "r", "samples": 2})):
        with pytest.raises(ValueError, match="--shots"):
            run(tmp_path, model, shots=5, **flags)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rows", "recorded", "words"), [
    ([], [{"id": "0", "responses": ["#### 1"]}], "questions.jsonl holds no question"),
    (sums(2), [{"id": "other", "responses": ["#### 1"]}], "recorded.jsonl: no response to any of the 2 questions"),
])
def test_an_empty_set_and_answers_to_other_questions_are_errors(rows, recorded, words, tmp_path):
    write_jsonl(tmp_path / "questions.jsonl", rows)
    write_jsonl(tmp_path / "recorded.jsonl", recorded)
    with pytest.raises(ValueError, match=words):
        evaluation.main(evaluation.Config(
            str(tmp_path / "recorded.jsonl"), str(tmp_path / "questions.jsonl"), str(tmp_path / "out")))


def test_a_question_longer_than_the_context_is_an_error(tiny, tmp_path):
    write_jsonl(tmp_path / "questions.jsonl", [*sums(2), {"id": "long", "question": "1+" * 30 + "1", "answer": "31"}])
    with pytest.raises(ValueError, match=r"question 'long': a prompt of 63 tokens .* context of 64: lower"):
        evaluation.main(evaluation.Config(tiny, str(tmp_path / "questions.jsonl"), str(tmp_path / "out"),
                                          max_new_tokens=8))


@pytest.mark.parametrize("flags", [
    {"shots": -1}, {"limit": -1}, {"samples": 2}, {"reward_model": "x"}, {"samples": 0}, {"max_new_tokens": 0}])
def test_flags_that_make_no_sense_are_named(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))}"):
        evaluation.main(evaluation.Config("m", "q", "o", **flags))
