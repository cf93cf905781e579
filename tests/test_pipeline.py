"""train_all.sh at QUICK scale with the bundled models, and proof that gold answers train nothing."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import real_data, real_model

import data
import eval as eval_script
import generate
import ppo
import pseudo_reward
import reward
import runtime
import sft

ROOT = Path(__file__).resolve().parent.parent
TEACHER, STUDENT = ROOT / "weights" / "tiny-teacher", ROOT / "weights" / "tiny-student-base"
STAGES = ["0_questions", "1_teacher", "1_vote", "2_sft", "3_student", "4_pseudo_reward", "5_reward", "6_ppo",
          "6_ppo_raw", *(f"7_eval/{name}" for name in ("teacher", "base", "sft", "ppo", "ppo_raw", "best_of_n"))]


def train_all(out, **environment):
    """Run train_all.sh as a user does; the finished process, with its output."""
    env = os.environ | {"QUICK": "1", "OUT": str(out), "PYTHON": sys.executable} | environment
    return subprocess.run(["bash", str(ROOT / "train_all.sh")], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "quick"
    start = time.monotonic()
    process = train_all(out)
    assert process.returncode == 0, process.stdout + process.stderr
    print(f"QUICK=1 took {time.monotonic() - start:.0f} s")
    return out, process


def test_quick_finishes_every_stage_and_reports(quick):
    out, process = quick
    for stage in STAGES:
        done = json.loads((out / stage / "done.json").read_text())
        assert done["seconds"] >= 0 and done["peak_memory_mb"] > 50, stage
    report = json.loads((out / "report.json").read_text())
    assert set(report["accuracy"]) >= {"teacher", "base", "sft", "ppo", "ppo_raw", "best_of_n"}
    for row in report["accuracy"].values():
        assert row["n"] == 100 and row["ci95"][0] <= row["strict"] <= row["ci95"][1] and row["strict"] <= row["lenient"]
    assert (out / "report.md").is_file() and (out / "curves.png").stat().st_size > 10_000
    assert "report.md" in process.stdout


def test_bundled_models_have_their_habits(quick):
    """Even 100 questions tell: the teacher is far above the student, PPO lifts it, nobody fails to end, the reward
    model ranks. Of SFT nothing is asked: two dozen steps are too few to take over the teacher's habits."""
    report = json.loads((quick[0] / "report.json").read_text())
    accuracy = {name: row["strict"] for name, row in report["accuracy"].items()}
    assert 0.5 < accuracy["teacher"] < 0.95
    assert accuracy["base"] < accuracy["teacher"] - 0.3 and accuracy["ppo"] > accuracy["base"] + 0.2
    assert all(row["truncated"] <= 0.02 for row in report["accuracy"].values())
    assert report["reward_model"]["auc_gold"] > 0.6


def test_metrics_follow_the_iterations(quick):
    rows = [json.loads(line) for line in (quick[0] / "6_ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert abs(rows[0]["objective/kl"]) < 1e-4 and rows[-1]["objective/kl"] != rows[0]["objective/kl"]
    assert all(abs(row["val/ratio_first"] - 1) < 1e-4 for row in rows)


def test_piped_output_is_plain_lines(quick):
    _, process = quick
    assert "\r" not in process.stdout and "\x1b" not in process.stdout + process.stderr
    assert re.findall(r"^\[\S+\]$", process.stdout, re.MULTILINE)[0] == "[0_questions]"


def test_second_run_skips_and_changes_nothing(quick):
    out, _ = quick
    before = {stage: (out / stage / "done.json").stat().st_mtime_ns for stage in STAGES}
    process = train_all(out)
    assert process.returncode == 0 and process.stdout.count("skipped") >= len(STAGES)
    assert before == {stage: (out / stage / "done.json").stat().st_mtime_ns for stage in STAGES}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"PRESET": "huge"}, ["PRESET=huge", "tiny"]),
        ({"STUDENT": "no/such/folder"}, ["STUDENT=no/such/folder"]),
        ({"TEACHER": "no/such/answers.jsonl"}, ["TEACHER=no/such/answers.jsonl"]),
        ({"QUESTIONS": "no/such/file.jsonl"}, ["QUESTIONS=no/such/file.jsonl"]),
        ({"SEED": "-1"}, ["SEED=-1"]),
        ({"ROUNDS": "many"}, ["ROUNDS=many"]),
    ],
)
def test_bad_environment_is_one_sentence_and_code_2(tmp_path, environment, words):
    process = train_all(tmp_path / "run", **environment)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1 and all(word in process.stderr for word in words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "1+1?", "answer": "2"}\n{"question": oops}\n', ["line 2"]),
        ("\n\n", ["no question"]),
        ('{"text": "1+1?"}\n', ["line 1", "question"]),
    ],
)
def test_bad_question_file_is_one_sentence_and_code_2(tmp_path, content, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    process = train_all(tmp_path / "run", QUESTIONS=str(path))
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert all(word in process.stderr for word in ["mine.jsonl", *words])


def bad_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: bad_config(folder, model_type="mixtral"), ["config.json", "model_type", "mixtral"]),
    (lambda folder: bad_config(folder, vocab_size=20), ["tokenizer.json", "vocab_size", "20"]),
    (lambda folder: bad_config(folder, rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["rope_scaling", "yarn"]),
    (truncate, ["model.safetensors", "damaged"]),
    (pickled, ["pytorch_model.bin", "pickle"]),
    (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json", "not found"]),
    (lambda folder: (folder / "config.json").unlink(), ["config.json", "not found"]),
    (lambda folder: (folder / "generation_config.json").write_text("{"), ["generation_config.json", "JSON"]),
])
@pytest.mark.parametrize("script", [generate, sft, ppo, eval_script], ids=lambda script: script.__name__)
def test_a_bad_model_folder_is_one_sentence_and_code_2(tmp_path, model_folder, capsys, script, damage, words):
    shutil.copytree(model_folder, tmp_path / "model")
    damage(tmp_path / "model")
    (tmp_path / "sft.jsonl").write_text('{"prompt": "1+1?", "response": "#### 2"}\n')
    (tmp_path / "votes.jsonl").write_text('{"id": "arith-valid-0", "vote": "2"}\n')
    flags = {generate: ["--model", "--questions=arith:valid", "--limit=2"], sft: ["--model", "--data=sft.jsonl"],
             eval_script: ["--model", "--questions=arith:valid"],
             ppo: ["--policy", "--questions=arith:valid", "--votes=votes.jsonl"]}[script]
    argv = [flag.replace("=", f"={tmp_path}/") if ".jsonl" in flag else flag for flag in flags[1:]]
    with pytest.raises(SystemExit) as stop:
        runtime.launch(script.main, script.Config, [flags[0], str(tmp_path / "model"), f"--out={tmp_path}/out", *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize(("questions", "responses", "words"), [
    ('{"id": "a", "question": "1+1?"}\n', '{"id": "b", "responses": ["2"]}\n', ["teacher.jsonl", "do the ids match"]),
    ('{"id": "a", "question": "1+1?"}\n', '{"id": "a", "responses": "2"}\n', ["teacher.jsonl", "line 1"]),
    ('{"id": "a", "question": "1+1?"}\n', "", ["teacher.jsonl", "do the ids match"]),
    ('{"id": "a", "question": "1?"}\n', '{"id": "a", "responses": ["2"]}\n{bad\n', ["teacher.jsonl", "line 2", "JSON"]),
    ("", '{"id": "a", "responses": ["2"]}\n', ["questions.jsonl", "no question"]),
    ('{"question": "1?"}\n{"question": "2?", "kind": "choice"}\n', "", ["questions.jsonl", "line 2", "'choice'"]),
    ('{"question": "1?"}\n{"question": 2}\n', "", ["questions.jsonl", "line 2", "question"]),
])
def test_bad_questions_and_responses_are_one_sentence_and_code_2(tmp_path, capsys, questions, responses, words):
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "teacher.jsonl").write_text(responses)
    argv = [f"--{name}={tmp_path / name}.jsonl" for name in ("questions", "teacher")] + [f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stop:
        runtime.launch(pseudo_reward.main, pseudo_reward.Config, argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["qwen", "llama3"])
def test_real_presets_run_end_to_end_at_toy_scale(tmp_path, preset):
    """SmolLM2-135M learns from itself on GSM8K, and from the recorded Llama-3.1-8B on MMLU-Pro: every stage, a report.

    Eight minutes on two cores, so `slow`; the numbers mean nothing at this size, only that nothing is missing.
    """
    student, record = real_model("SmolLM2-135M-Instruct"), real_data("mmlu_pro/llama-3.1-8b-instruct.jsonl.gz")
    teacher = {"qwen": {"TEACHER": str(student), "QUESTIONS": "gsm8k"},
               "llama3": {"TEACHER": str(record), "TEACHER_TEST": str(record), "QUESTIONS": str(record)}}[preset]
    process = train_all(tmp_path / "run", PRESET=preset, STUDENT=str(student), **teacher)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["accuracy"]) >= {"teacher", "base", "sft", "ppo", "ppo_raw", "best_of_n"}
    assert all(row["n"] == 4 for row in report["accuracy"].values())
    kinds = {row["kind"] for row in data.read_jsonl(tmp_path / "run" / "0_questions" / "train.jsonl")}
    assert kinds == {"number" if preset == "qwen" else "choice"}
    assert ("1_teacher" in process.stdout) == (preset == "qwen")


def train(out, gold):
    """All training stages at the smallest scale, every question's gold answer replaced by `gold(question)`."""
    for split, n in (("train", 24), ("valid", 4)):
        questions = [replace(question, answer=gold(question)) for question in data.load_questions(f"arith:{split}", n)]
        data.write_jsonl(out / f"{split}.jsonl", [vars(question) for question in questions])
    questions, teacher, student = str(out / "train.jsonl"), str(out / "teacher"), str(out / "student")
    sampling = {"questions": questions, "samples": 4, "max_new_tokens": 64}
    generate.main(generate.Config(model=str(TEACHER), out=teacher, **sampling))
    vote = pseudo_reward.Config(questions=questions, teacher=teacher + "/samples.jsonl", out=str(out / "vote"))
    pseudo_reward.main(vote)
    sft.main(sft.Config(model=str(STUDENT), data=vote.out + "/sft.jsonl", out=str(out / "sft"), batch_size=16))
    generate.main(generate.Config(model=str(out / "sft"), out=student, source="student", **sampling))
    signal = replace(vote, student=student + "/samples.jsonl", out=str(out / "signal"))
    pseudo_reward.main(signal)
    reward.main(reward.Config(model=str(out / "sft"), pairs=signal.out + "/pairs.jsonl", questions=questions,
                              calibrate=student + "/samples.jsonl", out=str(out / "reward"), held_out=0.3))
    learn = ppo.Config(policy=str(out / "sft"), reward_model=str(out / "reward"), questions=questions, iterations=2,
                       rollout_size=16, max_new_tokens=64, valid=str(out / "valid.jsonl"), eval_every=1,
                       out=str(out / "ppo"))
    ppo.main(learn)
    ppo.main(replace(learn, reward_model="", votes=signal.out + "/rewards.jsonl", out=str(out / "raw")))
    return {name: hashlib.sha256((out / name / "model.safetensors").read_bytes()).hexdigest()
            for name in ("sft", "reward", "ppo", "raw")}


def test_gold_answers_train_nothing(tmp_path):
    """The same run with every gold answer replaced by nonsense, or missing, gives the same weights, bit for bit."""
    right = train(tmp_path / "gold", lambda question: question.answer)
    assert right == train(tmp_path / "nonsense", lambda question: str(int(question.answer) + 1000))
    assert right["ppo"] != right["raw"] != right["sft"]  # they did learn
