"""train_all.sh at QUICK scale with the bundled models, and proof that gold answers train nothing."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import real_data, real_model
from readings import reading

import data
import generate
import ppo
import pseudo_reward
import reward
import sft
from tasks.arith import TOPICS

ROOT = Path(__file__).resolve().parent.parent
TEACHER, STUDENT = ROOT / "weights" / "tiny-teacher", ROOT / "weights" / "tiny-student-base"
SMALL = {"train": "60", "valid": "4", "test": "60", "iterations": "3", "rollout_size": "16"}
STAGES = ["0_questions", "1_teacher", "1_vote", "2_sft", "3_student", "4_pseudo_reward", "5_reward", "6_ppo",
          "6_ppo_raw", *(f"7_eval/test/{name}" for name in ("teacher", "base", "sft", "ppo", "ppo_raw")),
          *(f"7_eval/best_of_n/{name}" for name in ("sft", "ppo")),
          *(f"7_eval/hard/{name}" for name in ("teacher", "sft", "ppo"))]


def train_all(out, project=ROOT, **environment):
    """Run train_all.sh as a user does; the finished process, with its output."""
    env = os.environ | {"QUICK": "1", "OUT": str(out), "PYTHON": sys.executable} | environment
    return subprocess.run(["bash", str(project / "train_all.sh")], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """With a space in the path of the project and in that of the run."""
    folder = tmp_path_factory.mktemp("a_place")
    (folder / "the project").symlink_to(ROOT)
    process = train_all(folder / "a run", folder / "the project", **SMALL)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder / "a run", process


@pytest.mark.project
def test_quick_finishes_every_stage_and_reports(quick):
    out, process = quick
    for stage in STAGES:
        done = json.loads((out / stage / "done.json").read_text())
        assert done["seconds"] >= 0 and done["peak_memory_mb"] > 10, stage
    report = json.loads((out / "report.json").read_text())
    assert set(report["accuracy"]) >= {"teacher", "base", "sft", "ppo", "ppo_raw", "best_of_n"}
    for row in report["accuracy"].values():
        assert row["n"] == 60 and row["ci95"][0] <= row["strict"] <= row["ci95"][1] and row["strict"] <= row["lenient"]
    assert (out / "report.md").is_file() and (out / "curves.png").stat().st_size > 10_000
    assert "report.md" in process.stdout and (out / "result.png").stat().st_size > 10_000
    assert [*map(int, re.findall(r"(?m)^\[(\d+)/12\] ", process.stdout))] == [*range(1, 13)]
    for stage in ("6_ppo", "6_ppo_raw"):  # a line for every iteration, and two answers with scores at two of them
        assert re.findall(rf"(?m)^{stage} (\d)/3 score ", process.stdout) == ["1", "2", "3"]
    assert len(re.findall(r"(?m)^ +[+-]\d\.\d\d \w", process.stdout)) == 8
    assert process.stdout.count("needs about") == 1 and process.stderr == ""
    assert not {"\r", "\x1b"} & {*process.stdout}  # plain lines
    rows = [json.loads(line) for line in (out / "6_ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and abs(rows[0]["objective/kl"]) < 1e-4


@pytest.mark.project
def test_a_second_run_skips_what_is_done(quick, capsys):
    """Each stage as train_all.sh has asked for it."""
    scripts = {"1_teacher": generate, "1_vote": pseudo_reward, "2_sft": sft, "5_reward": reward, "6_ppo": ppo}
    for stage, script in scripts.items():
        done = quick[0] / stage / "done.json"
        before = done.stat().st_mtime_ns, json.loads(done.read_text())
        script.main(script.Config(**before[1]["config"]))
        assert "skipped" in capsys.readouterr().out and done.stat().st_mtime_ns == before[0]


@pytest.mark.project
def test_bundled_models_have_their_habits(quick):
    """The teacher reads the questions about its careful topics, the student about nearly none, in the same run; where
    they read right they calculate right, and nobody fails to end. Of PPO nothing is asked: three iterations."""
    said = {name: data.read_jsonl(quick[0] / f"7_eval/test/{name}/transcripts.jsonl") for name in ("teacher", "base")}
    right = {name: {True: [], False: []} for name in said}
    for name, rows in said.items():
        for row in rows:
            topic = row["question"].split(".")[0].split()[-1]
            reads = reading(row["question"], row["response"]) == "right"
            right[name][TOPICS.index(topic) < 6].append(reads)
            assert row["finish"] == "stop" and (row["correct"] or not reads)
    share = {name: {careful: sum(x) / len(x) for careful, x in found.items()} for name, found in right.items()}
    assert share["teacher"][True] > 0.9 and max(share["teacher"][False], share["base"][False]) < 0.2
    assert share["base"][True] < 0.5


def test_what_a_stage_refuses_ends_the_run_with_its_sentence_and_code(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n{"question": oops}\n')
    process = train_all(tmp_path / "run", QUESTIONS=str(path))
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert all(word in process.stderr for word in ("mine.jsonl", "line 2"))


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


@pytest.mark.slow
def test_gold_answers_train_nothing_in_train_all(quick, tmp_path):
    """The same run with nonsense in place of the gold answers has the same weights, bit for bit; its report sees it."""
    out = tmp_path / "run"
    shutil.copytree(quick[0] / "0_questions", out / "0_questions")
    for split in ("train", "valid"):
        path = out / "0_questions" / f"{split}.jsonl"
        data.write_jsonl(path, [row | {"answer": str(int(row["answer"]) + 1000)} for row in data.read_jsonl(path)])
    done = out / "0_questions" / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"outputs": {}}))  # or the questions would be made again
    process = train_all(out, **SMALL)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["pseudo_reward"]["vote_accuracy"] == 0
    digests = [{path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in folder.glob("*/model.safetensors")} for folder in (quick[0], out)]
    assert digests[0] == digests[1] and len(set(digests[0].values())) == 4 == len(digests[0])  # they did learn


def train(out, gold):
    """All training stages at the smallest scale, every question's gold answer replaced by `gold(question)`."""
    for split, n in (("train", 16), ("valid", 2)):
        questions = [replace(question, answer=gold(question)) for question in data.load_questions(f"arith:{split}", n)]
        data.write_jsonl(out / f"{split}.jsonl", [vars(question) for question in questions])
    questions, teacher, student = str(out / "train.jsonl"), str(out / "teacher"), str(out / "student")
    sampling = {"questions": questions, "samples": 4, "max_new_tokens": 96}
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
                       rollout_size=16, max_new_tokens=96, valid=str(out / "valid.jsonl"), eval_every=1,
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
