"""pseudo_reward.py: the vote, the rewards, the pairs, recorded responses, and that no gold answer is read."""

import json
import random
from collections import Counter, defaultdict
from itertools import permutations
from pathlib import Path

import pytest

import pseudo_reward
from pseudo_reward import Sample, majority_vote, make_pairs, pseudo_rewards, sft_targets, winners
from runtime.files import write_jsonl
from tasks.question import Question
from tasks.recorded import load_samples

# ---- the vote ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answers", "logprobs", "vote", "share"), [
    (["7", "8", "7", None], None, "7", 0.5),  # None counts in the share and never wins
    (["7", None, None], None, "7", 1 / 3), ([None, None], None, None, 0.0), ([], None, None, 0.0),
    (["7", "8"], None, None, 0.0), (["7", "8"], [-1.0, None], None, 0.0),  # a tie that nothing breaks
    (["7", "8"], [-1.0, -2.0], "7", 0.5), (["7", "8"], [-2.0, -1.0], "8", 0.5), (["7", "8"], [-1.0, -1.0], None, 0.0),
    (["7", "7", "8", "8"], [-0.1, -3.0, -1.0, -1.0], "8", 0.5),  # the sum decides, not the best single vote
    (["7", "7", "8"], [-9.0, -9.0, -0.1], "7", 2 / 3),  # log-probs matter in ties only
    (["7", "8", "9", "9", "8"], [0.0, -1.0, -0.5, -0.5, -0.5], "9", 0.4),  # 7 has the best log-prob, but is not tied
    (["7", "8", "7", "8", "7", "8"], [-0.1, -0.3, -0.2, -0.1, -0.3, -0.2], None, 0.0)])  # the sums are the same exactly
def test_majority_vote(answers, logprobs, vote, share):
    """In whatever order the answers come."""
    for order in permutations(range(len(answers))):
        drawn = logprobs and [logprobs[i] for i in order]
        assert majority_vote([answers[i] for i in order], drawn) == (vote, pytest.approx(share))


# ---- rewards, pairs, SFT targets -----------------------------------------------------------------------------------


def sample(answer, source="teacher", response=None, ended=True):
    return Sample("q", source, response or f"#### {answer}", answer, ended)


def test_pseudo_rewards_are_one_for_an_ended_response_that_agrees_with_the_vote():
    responses = [sample("7"), sample("8"), sample(None), sample("7", ended=False), sample("7", "student")]
    assert pseudo_rewards(responses, "7") == [1, 0, 0, 0, 1]
    assert pseudo_rewards(responses, "8") == [0, 1, 0, 0, 0]


def responses():
    """Two right and two wrong of the teacher, one right and two wrong of the student, one of each cut off."""
    return [sample("7", response="t+1"), sample("7", response="t+2"), sample("8", response="t-1"),
            sample("9", response="t-2"), sample("7", "student", "s+1"), sample("8", "student", "s-1"),
            sample(None, "student", "s-2"), sample("7", response="t+cut", ended=False),
            sample("8", "student", "s-cut", ended=False)]


def pairs_of(samples, most=99, seed=0):
    pairs = make_pairs(samples, pseudo_rewards(samples, "7"), most, random.Random(seed))
    return [(chosen.response, rejected.response) for chosen, rejected in pairs]


def test_pairs_are_all_combinations_of_an_ended_winner_and_an_ended_loser():
    pairs = pairs_of(responses())
    assert set(pairs) == {(c, r) for c in ("t+1", "t+2", "s+1") for r in ("t-1", "t-2", "s-1", "s-2")}
    assert len(pairs) == 12 and pairs_of(responses(), 3) == pairs[:3]


def test_pairs_with_a_response_of_the_student_come_first():
    for seed in range(5):
        students = ["s" in chosen + rejected for chosen, rejected in pairs_of(responses(), seed=seed)]
        assert students == [True] * 8 + [False] * 4


def test_no_pair_comes_twice_and_none_without_both_sides():
    assert Counter(pairs_of(responses() + responses())) == Counter(set(pairs_of(responses())))
    assert pairs_of([sample("7"), sample("7", "student")]) == pairs_of([sample("8"), sample("8", "student")]) == []


def test_pairs_repeat_with_the_seed_and_differ_without():
    assert pairs_of(responses(), 4, seed=1) == pairs_of(responses(), 4, seed=1)
    assert len({tuple(pairs_of(responses(), 4, seed=seed)) for seed in range(10)}) > 5


def test_winners_are_the_teachers_different_winning_texts():
    samples = [sample("7", response=text) for text in ("b", "a", "b", "c")]
    samples += [sample("8", response="wrong"), sample("7", "student", "s"), sample("7", response="cut", ended=False)]
    rewards = pseudo_rewards(samples, "7")
    assert winners(samples, rewards, 9) == ["b", "a", "c"]
    assert winners(samples, rewards, 2) == ["b", "a"]
    assert winners(samples, rewards, 3, keep_duplicates=True) == ["b", "a", "b"]


# ---- recorded responses --------------------------------------------------------------------------------------------

QUESTIONS = {"a": Question("a", " What is 3+4?", "7"), "b": Question("b", "Which?", "B", "choice", ("x", "y"))}


def recorded(tmp_path, *rows):
    write_jsonl(tmp_path / "recorded.jsonl", rows)
    return tmp_path / "recorded.jsonl"


def choices(*texts, **more):
    return [{"message": {"content": text}, **more} for text in texts]


@pytest.mark.parametrize("row", [
    {"question": " What is 3+4? ", "id": "idea-9", "responses": ["#### 7", "#### 8"]},
    {"custom_id": "a", "choices": choices("#### 7", "#### 8")},
    {"custom_id": "a", "response": {"body": {"choices": choices("#### 7", "#### 8", finish_reason="stop")}}},
    {"custom_id": "a#5", "error": None, "response": {"status_code": 200, "body": {"choices": [
        {"text": "#### 7"}, {"text": "#### 8", "finish_reason": "stop", "logprobs": None}]}}},
    {"id": 5, "responses": ["#### 7", "#### 8"]}])  # question ids are texts
def test_every_recorded_form_gives_the_same_samples(tmp_path, row):
    key, questions = "5" if row.get("id") == 5 else "a", QUESTIONS | {"5": Question("5", "How many?")}
    assert load_samples(recorded(tmp_path, row), "teacher", questions, False) == [
        Sample(key, "teacher", "#### 7", "7"), Sample(key, "teacher", "#### 8", "8")]


def test_our_own_form_carries_the_end_and_the_log_prob_per_token(tmp_path):
    """MMLU-Pro's published results have the text as generated_text or model_outputs; a stored answer is not read."""
    path = recorded(tmp_path, {"id": "a", "response": "#### 7", "finish": "length", "logprob": -6.0, "tokens": 4,
                               "temperature": 0.7},
                    {"question_id": "b", "generated_text": "The answer is (B).", "finish": "stop", "answer": "stale"},
                    {"question_id": "b", "model_outputs": "No idea.", "pred": "C"})
    assert load_samples(path, "student", QUESTIONS, False) == [
        Sample("a", "student", "#### 7", "7", ended=False, logprob=-1.5, temperature=0.7),
        Sample("b", "student", "The answer is (B).", "B"), Sample("b", "student", "No idea.", None)]


@pytest.mark.parametrize("rows, found", [
    ([{"custom_id": "a", "response": {"status_code": 500, "body": {"error": "busy"}}}, *(
        {"custom_id": "a", "choices": choices(text)} for text in (None, "#### 7"))], [("", None), ("#### 7", "7")]),
    ([{"custom_id": "a", "response": None, "error": {"code": "expired"}}, {"id": "a", "response": "3"}], [("3", None)]),
    ([{"id": "z", "responses": ["1"]}, {"id": "a", "responses": ["2"]}, {"question": "?", "responses": ["3"]}],
     [("2", None)])])
def test_a_failed_request_is_left_out_and_so_is_another_question(tmp_path, rows, found):
    """A refusal, which has no text, is a response without an answer."""
    samples = load_samples(recorded(tmp_path, *rows), "teacher", QUESTIONS, False)
    assert [(s.response, s.answer) for s in samples] == found


def test_recorded_log_probs_are_per_token(tmp_path):
    content = lambda *values: {"content": [{"token": "x", "logprob": value} for value in values]}
    path = recorded(tmp_path, {"custom_id": "a", "choices": [
        choices("#### 7", logprobs=content(-1.0, -3.0))[0], choices("#### 8", logprobs=content(-2.5))[0]]})
    assert [s.logprob for s in load_samples(path, "teacher", QUESTIONS, False)] == [-2.0, -2.5]
    path = recorded(tmp_path, {"custom_id": "a", "choices": [  # of /v1/completions; a prompt's first token has none
        {"text": "#### 7", "logprobs": {"tokens": ["x", "x", "x"], "token_logprobs": values, "top_logprobs": None}}
        for values in ([-1.0, -2.0, -6.0], [None, -1.0, -2.0], [])]})
    assert [s.logprob for s in load_samples(path, "teacher", QUESTIONS, False)] == [-3.0, -1.5, None]


@pytest.mark.parametrize("row", [
    {"id": "batch_req_1", "custom_id": "a"}, {"id": "a", "custom_id": "request-1"}, {"id": 1, "question_id": "a"},
    {"id": 1, "custom_id": "a#2"}, {"key": "a"}, {"qid": "a"}, {"id": "z", "question": "What is 3+4?"},
    {"id": "b", "custom_id": "a", "question": " What is 3+4?"}, {"id": "a#b"}])
def test_an_id_is_the_key_that_is_a_questions(tmp_path, row):
    """Whatever the key's name; the text decides between ids of two questions. 'a#b' is a question of its own."""
    questions = QUESTIONS | {"a#b": Question("a#b", "Another?")}
    [sample] = load_samples(recorded(tmp_path, row | {"responses": ["#### 7"]}), "teacher", questions, False)
    assert sample.id == ("a#b" if row == {"id": "a#b"} else "a") and sample.answer == "7"


def test_ids_of_two_questions_in_a_line_are_an_error(tmp_path):
    row = {"id": "b", "custom_id": "a", "question": "Another?", "responses": ["#### 7"]}
    with pytest.raises(ValueError, match=r"recorded\.jsonl, line 2: .*id 'b'.*custom_id 'a'"):
        load_samples(recorded(tmp_path, {"id": "a", "response": "7"}, row), "teacher", QUESTIONS, False)


def test_lines_that_belong_to_no_question_are_counted(tmp_path, capsys):
    """So many of so many, with an example; where none belongs, examples of both sides, and no guess (3.0 is not 3)."""
    rows = [{"id": key, "responses": ["#### 7"]} for key in ("a", "x1", "x2", "b", "x3")]
    assert len(load_samples(recorded(tmp_path, *rows), "teacher", QUESTIONS, False)) == 2
    said = capsys.readouterr().out
    assert "3 of 5 lines" in said and "'x1'" in said
    assert len(load_samples(recorded(tmp_path, rows[0]), "teacher", QUESTIONS, False)) == 1
    assert capsys.readouterr().out == ""
    for row, questions in (({"custom_id": "req-a"}, QUESTIONS), ({"id": 3.0}, {"3": Question("3", "How many?")})):
        with pytest.raises(ValueError, match="none of its 1 lines") as error:
            load_samples(recorded(tmp_path, row | {"responses": ["7"]}), "teacher", questions, False)
        [(name, value)] = row.items()
        assert all(word in str(error.value) for word in (name, str(value), *map(repr, questions))), error.value
    failed = {"custom_id": "a", "response": None, "error": {"code": "expired"}}
    with pytest.raises(ValueError, match="every request failed"):
        load_samples(recorded(tmp_path, failed, rows[1]), "teacher", QUESTIONS, False)


@pytest.mark.parametrize(("reason", "ended"), [
    *[(reason, False) for reason in ("length", "MAX_TOKENS", "max_tokens", "max_output_tokens", "abort", "SAFETY",
                                     "content_filter", "error", {"type": "length", "length": 16}, {"type": "abort"})],
    *[(reason, True) for reason in ("stop", "STOP", "end_turn", "eos_token", "stop_sequence", "COMPLETE", None,
                                    {"type": "stop", "matched": 2})]])
@pytest.mark.parametrize("name", ["finish_reason", "finishReason", "stop_reason"])
def test_a_response_that_was_cut_is_known_by_any_servers_word(tmp_path, name, reason, ended):
    """In a choice and beside a text; what says nothing ended, and vLLM's stop_reason names only what it stopped at."""
    rows = [{"id": "a", "choices": choices("#### 7", **{name: reason})}, {"id": "a", "response": "7", name: reason},
            {"id": "a", "choices": choices("#### 7", finish_reason="stop", stop_reason="the maximum is")}]
    samples = load_samples(recorded(tmp_path, *rows), "teacher", QUESTIONS, False)
    assert [sample.ended for sample in samples] == [ended, ended, True]


def test_what_a_reasoning_model_thought_in_a_field_of_its_own_is_not_read(tmp_path):
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "#### 5"}]},
             {"type": "thinking", "text": "#### 5"}, *({"type": "text", "text": text} for text in ("so ", "#### 7"))]
    path = recorded(tmp_path, {"id": "a", "choices": [
        {"message": {"content": content, "reasoning_content": "#### 5", "reasoning": "#### 5"}}
        for content in ("#### 7", None, "", parts, "<think>#### 5")]})
    samples = load_samples(path, "teacher", QUESTIONS, True)
    assert [s.answer for s in samples] == ["7", None, None, "7", None] and samples[3].response == "so #### 7"


def test_a_text_that_two_questions_share_identifies_neither(tmp_path):
    questions = {key: Question(key, "Which?", "A", "choice", options) for key, options in
                 (("a", ("x", "y")), ("b", ("y", "x")))}
    path = recorded(tmp_path, {"question": "Which?", "responses": ["The answer is A"]}, {"id": "b", "responses": ["B"]})
    assert [s.id for s in load_samples(path, "teacher", questions, True)] == ["b"]
    path = recorded(tmp_path, *({"id": i, "question": "Which?", "options": options, "responses": ["The answer is A"]}
                                for i, options in enumerate((["x", "y"], ["y", "x"], ["v", "w"]))))
    assert [s.id for s in load_samples(path, "teacher", {"a": questions["a"]}, False)] == ["a"]  # other options, not it


def test_lenient_reads_the_last_number_of_a_response_that_ended(tmp_path):
    """A cut response votes only with an answer that it states; an API says so with each choice."""
    path = recorded(tmp_path, *({"id": "a", "response": text, "finish": finish} for text, finish in
                                (("3+", "length"), ("#### 7\nand 3+", "length"), ("it is 6 or 7", "stop"))),
                    {"id": "a", "choices": choices("6 or 7", finish_reason="length") + choices("6 or 7")})
    read = {lenient: load_samples(path, "teacher", QUESTIONS, lenient) for lenient in (False, True)}
    assert [s.answer for s in read[False]] == [None, "7", None, None, None]
    assert [s.answer for s in read[True]] == [None, "7", "7", None, "7"]
    assert [s.ended for s in read[True]] == [False, False, True, False, True]


@pytest.mark.parametrize("row", [
    {"id": "a"}, {"id": "a", "response": 7}, {"id": "a", "responses": ["text", 7]}, {"responses": ["text"]},
    {"id": "a", "choices": "x"}, {"id": "a", "choices": choices(7)}, {"id": "a", "response": {"body": None}},
    {"id": "a", "response": "text", "tokens": "two", "logprob": -1}, {"id": "a", "response": "7", "temperature": [1]},
    {"id": "a", "choices": [{"text": "1", "logprobs": {"content": [1]}}]}])
def test_a_bad_record_is_named_by_file_and_line(tmp_path, row):
    path = recorded(tmp_path, {"id": "a", "responses": ["fine"]}, row)
    with pytest.raises(ValueError, match=r"recorded\.jsonl, line 2"):
        load_samples(path, "teacher", QUESTIONS, False)


# ---- the script ----------------------------------------------------------------------------------------------------


def write_run(folder, gold=str):
    """Twelve questions 'What is i+1?'; the teacher is right 3 times in 5, the student 1 time in 3."""
    files = {"questions": [], "teacher": [], "student": []}
    for i in range(12):
        right = i + 1
        files["questions"].append({"id": f"q{i}", "question": f"What is {i}+1?", "answer": gold(right)})
        teacher = [f"{i}+1={right}\n#### {right}"] * 2 + [f"#### {right}", f"#### {right + 1}", "no idea"]
        student = [f"#### {right}", f"#### {right + 2}", f"{i}+1={right + 3}\n#### {right + 3}"]
        for source, texts in (("teacher", teacher), ("student", student)):
            files[source] += [{"id": f"q{i}", "response": text, "finish": "stop"} for text in texts]
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return {name: str(folder / f"{name}.jsonl") for name in files} | {"out": str(folder / "out")}


def written(folder):
    return {name: (folder / "out" / f"{name}.jsonl").read_bytes() for name in ("rewards", "sft", "pairs")}


def rows(data):
    return [json.loads(line) for line in data.splitlines()]


def test_main_writes_votes_rewards_targets_and_pairs_of_equal_weight_per_question(tmp_path):
    pseudo_reward.main(pseudo_reward.Config(**write_run(tmp_path / "run")))
    files = written(tmp_path / "run")
    for i, row in enumerate(rows(files["rewards"])):
        assert (row["id"], row["vote"], row["share"]) == (f"q{i}", str(i + 1), 0.6)
        assert [(r["source"][0], r["reward"]) for r in row["responses"]] == [
            ("t", 1), ("t", 1), ("t", 1), ("t", 0), ("t", 0), ("s", 1), ("s", 0), ("s", 0)]
    assert [(row["id"], row["prompt"], row["response"]) for row in rows(files["sft"])][:2] == [
        ("q0", "What is 0+1?", "0+1=1\n#### 1"), ("q0", "What is 0+1?", "#### 1")]
    assert len(rows(files["sft"])) == 24
    weights = defaultdict(list)
    for row in rows(files["pairs"]):
        right = f"#### {int(row['id'][1:]) + 1}"
        assert row["chosen"].endswith(right) and not row["rejected"].endswith(right)
        assert row["prompt"] == f"What is {row['id'][1:]}+1?"
        weights[row["id"]].append(row["weight"])
    assert {key: (len(w), sum(w)) for key, w in weights.items()} == {f"q{i}": (4, 1.0) for i in range(12)}
    done = json.loads((tmp_path / "run" / "out" / "done.json").read_text())
    assert done["results"] == {"questions": 12, "kept": 12, "share_kept": 1.0, "mean_share": pytest.approx(0.6),
                               "sft_examples": 24, "pairs": 48}


def test_gold_answers_are_never_read(tmp_path):
    """With nonsense for gold every output is the same to the byte."""
    pseudo_reward.main(pseudo_reward.Config(**write_run(tmp_path / "gold")))
    pseudo_reward.main(pseudo_reward.Config(**write_run(tmp_path / "nonsense", gold=lambda right: str(1000 - right))))
    assert written(tmp_path / "gold") == written(tmp_path / "nonsense")


def test_voters_both_lets_the_student_vote(tmp_path):
    """The teacher's three votes of five and the student's one of three: four of eight."""
    paths = write_run(tmp_path / "run")
    pseudo_reward.main(pseudo_reward.Config(**paths, voters="both"))
    assert {row["share"] for row in rows(written(tmp_path / "run")["rewards"])} == {0.5}


def test_main_passes_every_flag_and_field_on(tmp_path):
    """A tie that log-probs break, one target and three pairs that share a weight, the prompt with its instruction."""
    paths = write_run(tmp_path / "run")
    teacher = [{"id": "a", "response": text, "finish": "stop", "logprob": logprob, "tokens": 2} for text, logprob in [
        ("so #### 7", -1.0), ("so #### 7", -1.0), ("#### 8", -3.0), ("so #### 8", -3.0)]]
    write_jsonl(paths["questions"], [{"id": "a", "question": "3+4?", "instruction": "Be brief."}])
    write_jsonl(paths["teacher"], teacher)
    write_jsonl(paths["student"], [{"id": "a", "responses": ["#### 9"]}])
    target = {"id": "a", "prompt": "3+4?\nBe brief.", "response": "so #### 7"}
    for most, kept, targets in ((2, False, [target]), (2, True, [target, target]), (1, True, [target])):
        cfg = pseudo_reward.Config(**paths, sft_per_question=most, pairs_per_question=9, keep_duplicates=kept)
        pseudo_reward.main(cfg)
        files = written(tmp_path / "run")
        assert rows(files["sft"]) == targets
    assert [(row["vote"], row["share"]) for row in rows(files["rewards"])] == [("7", 0.5)]
    pairs = rows(files["pairs"])
    assert [(row["prompt"], row["weight"]) for row in pairs] == [("3+4?\nBe brief.", 1 / 3)] * 3
    assert pairs[0]["rejected"] == "#### 9"  # the student's first


@pytest.mark.parametrize(("first", "second", "vote"), [
    ((1.0, "teacher"), (1.0, "teacher"), "8"), ((0.7, "teacher"), (1.0, "teacher"), None),
    ((0.7, "teacher"), (0.7, "student"), None)])
def test_log_probs_of_two_temperatures_or_two_models_decide_no_tie(tmp_path, first, second, vote):
    """A colder sampler is surer of everything, and so may another model be. Votes beside the tie do not matter."""
    paths = write_run(tmp_path / "run")
    write_jsonl(paths["questions"], [{"id": "a", "question": "3+4?"}, {"id": "b", "question": "1+1?"}])
    files = {source: [{"id": "b", "response": "#### 2"}] for source in ("teacher", "student")}
    other = (0.2, "student")
    for answer, logprob, (temperature, source) in [*[("7", -2.0, first), ("8", -1.0, second)] * 2, ("9", 0.0, other)]:
        files[source].append({"id": "a", "response": f"#### {answer}", "logprob": logprob, "tokens": 1,
                              "temperature": temperature})
    for source, content in files.items():
        write_jsonl(paths[source], content)
    pseudo_reward.main(pseudo_reward.Config(**paths, voters="both"))
    votes = {row["id"]: row["vote"] for row in rows(written(tmp_path / "run")["rewards"])}
    assert votes.get("a") == vote and votes["b"] == "2"


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_the_targets_are_of_all_temperatures_alike(tmp_path, most, keep):
    """Samples of the first temperature come first in the file; it says the same text often, and one of the other's."""
    paths = write_run(tmp_path / "run")
    write_jsonl(paths["questions"], [{"id": f"q{i}", "question": f"{i}?"} for i in range(4)])
    write_jsonl(paths["teacher"], [
        {"id": f"q{i}", "response": f"{text} #### 7", "temperature": t}
        for t, texts in ((0.7, "aaaabcd"), (1.0, "defgh")) for text in texts for i in range(4)])
    write_jsonl(paths["student"], [{"id": "q0", "response": "s #### 7", "temperature": 0.2}])
    pseudo_reward.main(pseudo_reward.Config(**paths, sft_per_question=most, keep_duplicates=keep))
    texts = [(row["id"], row["response"][0]) for row in rows(written(tmp_path / "run")["sft"])]
    cold = sum(text in "abc" for _, text in texts)
    assert len(texts) == 4 * most and cold == len(texts) / 2
    assert keep or len(set(texts)) == len(texts)
    assert keep or most < 4 or {text for id, text in texts if id == "q0"} == set("abde")


def test_a_text_of_two_temperatures_is_one_target():
    """As often as it was sampled where duplicates are kept."""
    samples = [Sample("q", "teacher", text, "7", temperature=t) for t, text in (
        (0.7, "x"), (0.7, "y"), (1.0, "x"), (1.0, "z"))]
    for keep, first, expected in ((False, 0, "xyz"), (False, 1, "xzy"), (True, 0, "xxyz"), (True, 3, "xxzy")):
        assert "".join(sft_targets(samples, [1] * 4, 4, keep, first)) == expected
    assert sft_targets([], [], 4, False, 1) == sft_targets(samples, [0] * 4, 4, True, 0) == []


def test_without_the_filter_the_teachers_finished_answers_are_the_targets(tmp_path):
    """Right or wrong, with a vote or without; votes, rewards and pairs stay as they are with it."""
    for name in ("with", "without"):
        paths = write_run(tmp_path / name)
        with Path(paths["questions"]).open("a") as file:
            file.write('{"id": "tie", "question": "A tie?"}\n')
        with Path(paths["teacher"]).open("a") as file:
            file.write('{"id": "tie", "responses": ["#### 1", "#### 2"]}\n')
            file.write('{"id": "tie", "response": "#### 3", "finish": "length"}\n')
        pseudo_reward.main(pseudo_reward.Config(**paths, sft_filter=name == "with"))
    filtered, everything = written(tmp_path / "with"), written(tmp_path / "without")
    assert filtered["pairs"] == everything["pairs"] and filtered["rewards"] == everything["rewards"]
    first, second = ([row["response"] for row in rows(files["sft"]) if row["id"] in ("q0", "tie")]
                     for files in (filtered, everything))
    assert first == ["0+1=1\n#### 1", "#### 1"]
    assert second == [*first, "#### 2", "no idea", "#### 1", "#### 2"]


def test_another_seed_draws_other_pairs_and_nothing_else(tmp_path):
    for seed in (0, 1):
        pseudo_reward.main(pseudo_reward.Config(**write_run(tmp_path / str(seed)), seed=seed))
    first, second = (written(tmp_path / name) for name in "01")
    assert [name for name in first if first[name] != second[name]] == ["pairs"]


def test_questions_under_the_minimum_share_are_dropped_and_none_left_is_an_error(tmp_path):
    paths = write_run(tmp_path / "run")
    with Path(paths["teacher"]).open("a") as file:
        file.write(json.dumps({"id": "q0", "responses": ["#### 1"] * 5}) + "\n")  # q0: share 8/10
    pseudo_reward.main(pseudo_reward.Config(**paths, min_share=0.8))
    assert [row["id"] for row in rows(written(tmp_path / "run")["rewards"])] == ["q0"]
    assert {row["id"] for row in rows(written(tmp_path / "run")["pairs"])} == {"q0"}
    with pytest.raises(ValueError, match=r"--min_share 0\.9"):
        pseudo_reward.main(pseudo_reward.Config(**paths | {"out": str(tmp_path / "none")}, min_share=0.9))
