"""bench/gpu_run.sh: the order of its stages, its limits, what it does at them; bench/gpu_plan.py's arithmetic."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runtime

ROOT = Path(runtime.__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu_run.sh"

# ---- the arithmetic ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_plan():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield importlib.import_module("gpu_plan")


def write_done(folder, **record):
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps(record))


@pytest.fixture
def measured(tmp_path):
    """The docstrings' examples: 64,000 tokens by 64 rows in 50 s; SFT of 25 examples, 2 epochs, in 30 s."""
    write_done(tmp_path / "2_sft", seconds=30.0, settings={"epochs": 2}, results={"examples": 25})
    write_done(tmp_path / "3_student", seconds=50.0, tokens=64_000, settings={"batch_size": 64, "max_new_tokens": 100})
    for name, seconds in (("sft", 30.0), ("teacher", 40.0), ("base", 20.0)):
        write_done(tmp_path / "7_eval" / name, seconds=seconds)
    return tmp_path


def test_ppo_is_foreseen_from_what_sampling_and_sft_took(gpu_plan, measured):
    start, each = gpu_plan.ppo_seconds(measured, rollout=8)
    assert start == 2 * gpu_plan.START and each == pytest.approx(5 + 16)
    done = json.loads((measured / "3_student" / "done.json").read_text())
    done["tokens"] = 640  # one batch that was not full: as many steps as the longest answer has tokens
    (measured / "3_student" / "done.json").write_text(json.dumps(done))
    assert gpu_plan.ppo_seconds(measured, rollout=8)[1] == pytest.approx(50 + 16)


@pytest.mark.parametrize(("seconds", "expected"), [
    (140, 10), (139, 9), (0, 1), (-50, 1), (1e6, 150)])
def test_iterations_fill_four_fifths_of_the_time(gpu_plan, seconds, expected):
    assert gpu_plan.iterations(seconds, start=12, each=10) == expected


def test_time_is_reserved_for_the_evaluations_after_ppo(gpu_plan, measured):
    assert gpu_plan.reserve(measured, 900) == pytest.approx(144)
    (measured / "7_eval" / "teacher" / "done.json").unlink()  # no teacher to ask: its student and the base student
    assert gpu_plan.reserve(measured, 900) == pytest.approx(72)
    (measured / "7_eval" / "sft" / "done.json").unlink()
    assert gpu_plan.reserve(measured, 900) == 150


def test_a_run_gets_its_iterations_and_its_reserve(gpu_plan, measured, capsys):
    """1,000 s less 144, four fifths of it less the start, at 21 s each."""
    gpu_plan.main(gpu_plan.Config(run=str(measured), seconds=1000, rollout=8))
    assert capsys.readouterr().out.split() == [str(int((0.8 * 856 - 2 * gpu_plan.START) / 21)), "144"]


def test_the_plan_fits_into_its_time_and_costs_what_the_models_cost(gpu_plan, capsys):
    cfg = gpu_plan.Config()
    rows = {name: numbers for name, *numbers in gpu_plan.plan(cfg, "1.5B", "0.5B")}
    text = gpu_plan.PROMPT + gpu_plan.ANSWER
    tokens, flops, least, assumed = rows["2 teacher samples"]
    assert (tokens, flops) == (8000 * gpu_plan.ANSWER, pytest.approx(2 * 1.54e9 * 8000 * text))
    tokens, flops, least, assumed = rows["3 vote, SFT, 2 epochs"]
    assert (tokens, flops) == (8000 * text, pytest.approx(6 * 0.494e9 * 8000 * text))
    assert least == pytest.approx(flops / 989e12) and assumed == pytest.approx(20 + 12 * 0.494e9 / 4e8 + least / 0.15)
    assert all(row[2] < row[3] for row in rows.values())  # nobody beats the card
    assert 0.8 * cfg.seconds < sum(row[3] for row in rows.values()) <= cfg.seconds
    gpu_plan.main(cfg)
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(tables) == 2 * 14
    page = (ROOT / "docs" / "gpu_run.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line in tables] == tables  # as printed


# ---- the script, with a stub for python ----------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
# stands for python: write down the command and finish the stage; at ppo.py, if told so, work until a signal comes
script=${1##*/}
case $script in
  preflight.py) exit 0 ;;
  report.py) touch "$2"/report.md "$2"/report.json "$2"/curves.png "$2"/reward.png; exit 0 ;;
  gpu_plan.py) while [ "$1" != --seconds ]; do shift; done; echo "7 $(($2 - LASTS))"; exit 0 ;;
esac
printf '%s\\n' "$@" --- >>"$COMMANDS"
while [ "$1" != --out ]; do shift; done
mkdir -p "$2"
if [ "$script" = ppo.py ]; then
  touch "$2/metrics.jsonl"
  heard() { echo TERM >>"$OUT/signals"; }
  save() { trap heard TERM; heard; mkdir -p "$2/checkpoint"; sleep 0.5 & wait $!; exit 143; }
  if [ "$LASTS" -lt 60 ]; then trap 'save "$@"' TERM; echo $$ >"$OUT/started"; while true; do sleep 0.05; done; fi
fi
touch "$2/samples.jsonl"
echo '{}' >"$2/done.json"
"""


@pytest.fixture
def start(tmp_path):
    """start(lasts): gpu_run.sh on 100 s, at most `lasts` of them for PPO, which below 60 never ends by itself."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
    env = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "COMMANDS": str(tmp_path / "commands"),
           "TEACHER": str(tmp_path / "teacher"), "STUDENT": str(tmp_path / "student"), "OUT": str(tmp_path / "run"),
           "RESULTS": str(tmp_path / "results"), "BUDGET": "100", "FIRST": "30", "SET": "train=40;batch=16"}
    return lambda lasts, **more: subprocess.Popen(
        ["bash", str(SCRIPT)], env=env | {"LASTS": str(lasts)} | more, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def stages(tmp_path):
    """Stage -> the Config that its script parsed, in the order of the commands; of two runs of a stage both."""
    found = []
    for command in (tmp_path / "commands").read_text().removesuffix("\n---\n").split("\n---\n"):
        path, *argv = command.split("\n")
        cfg = runtime.cli(importlib.import_module(Path(path).stem).Config, argv)
        found.append((cfg.out.removeprefix(f"{tmp_path}/run/"), cfg))
    return found


def test_the_stages_come_in_the_order_of_their_worth(start, tmp_path):
    process = start(90)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0 and output.endswith(f"all done: {tmp_path}/results/report.md\n"), output + error
    found = stages(tmp_path)
    evaluations = [f"7_eval/{name}" for name in ("teacher", "base", "sft", "best_of_n", "ppo", "teacher", "base")]
    assert [stage for stage, _ in found] == [
        "0_questions", *evaluations[:2], "1_teacher", "1_vote", "2_sft", evaluations[2], "3_student",
        "4_pseudo_reward", "5_reward", evaluations[3], "6_ppo", *evaluations[4:]]
    assert [cfg.limit for stage, cfg in found if stage in evaluations] == [30, 30, 0, 30, 0, 0, 0]
    cfg = dict(found)
    assert (cfg["0_questions"].train, cfg["0_questions"].test) == (40, 1319)  # SET comes last
    assert (cfg["1_teacher"].samples, cfg["1_teacher"].batch_size, cfg["2_sft"].micro_tokens) == (4, 16, 8192)
    assert (cfg["6_ppo"].iterations, cfg["6_ppo"].rollout_size, cfg["6_ppo"].eval_every) == (7, 256, 1)
    assert cfg["7_eval/ppo"].model == f"{tmp_path}/run/6_ppo"
    commands = (tmp_path / "results" / "commands.txt").read_text().splitlines()
    assert len(commands) == len((tmp_path / "results" / "times.txt").read_text().splitlines()) == 9
    assert (tmp_path / "results" / "teacher.jsonl.gz").is_file()


@pytest.mark.parametrize("how", ["limit", "signal"])
def test_ppo_is_stopped_once_and_its_checkpoint_is_evaluated_if_there_is_time(start, tmp_path, how):
    """At its limit the rest goes on; at a signal nothing does. Both end with 143 and the command that continues."""
    process = start(3 if how == "limit" else 50, FIRST="20")
    if how == "signal":
        while not (tmp_path / "run" / "started").exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, error = process.communicate(timeout=120)
    assert process.returncode == 143, output + error
    assert (tmp_path / "run" / "signals").read_text() == "TERM\n"
    found = stages(tmp_path)
    assert [stage for stage, _ in found][-3:] == (
        ["7_eval/ppo", "7_eval/teacher", "7_eval/base"] if how == "limit" else
        ["5_reward", "7_eval/best_of_n", "6_ppo"])
    if how == "limit":
        assert dict(found)["7_eval/ppo"].model == f"{tmp_path}/run/6_ppo/checkpoint"
        assert "its checkpoint" in (tmp_path / "results" / "times.txt").read_text()
    assert f"not finished: 6_ppo{' 7_eval/ppo' * (how == 'signal')}; " in error
    assert error.rstrip().endswith(f"FIRST=20 BUDGET=100 bash {SCRIPT}")
    # again, with time for PPO: as many iterations, though the plan would now say otherwise, and all the rest is asked
    (tmp_path / "run" / "iterations").write_text("6\n")
    process = start(90)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, output + error
    rest = stages(tmp_path)[len(found):]
    again = dict(rest)
    assert again["6_ppo"].iterations == 6 and again["7_eval/ppo"].model == f"{tmp_path}/run/6_ppo"
    asked = [cfg.limit for stage, cfg in rest if stage == "7_eval/teacher"]
    assert asked == ([0, 0] if how == "limit" else [30, 0])  # not few again, once all were begun


def test_an_error_ends_it_with_its_code(start, tmp_path):
    process = start(90, SET="train")
    assert process.communicate(timeout=120)[1].startswith("error: SET: 'train' is not NAME=VALUE")
    assert process.returncode == 2 and not (tmp_path / "commands").exists()
    process = start(90, BUDGET="1.5")
    assert process.communicate(timeout=120)[1] == "error: BUDGET=1.5: a number above 0\n" and process.returncode == 2


# ---- the script, for real ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_runs_with_the_tiny_models_and_goes_on_where_it_was_stopped(tmp_path):
    env = os.environ | {
        "PYTHON": sys.executable, "PRESET": "tiny", "QUESTIONS": "arith", "TEACHER": str(ROOT / "weights/tiny-teacher"),
        "STUDENT": str(ROOT / "weights/tiny-student-base"), "OUT": str(tmp_path / "run"), "BUDGET": "600",
        "RESULTS": str(tmp_path / "results"), "FIRST": "50", "ROLLOUT": "64",
        "SET": "train=200;valid=20;test=100;batch=256;micro=4096;best_of=2;held_out=0.3;temperatures=1.0"}
    process = subprocess.Popen(["bash", str(SCRIPT)], env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    while process.poll() is None and not (tmp_path / "run" / "6_ppo" / "metrics.jsonl").is_file():
        time.sleep(0.2)
    process.terminate()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143 and "not finished: 6_ppo 7_eval/ppo;" in output, output
    done = subprocess.run(["bash", str(SCRIPT)], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6_ppo: goes on after step" in done.stdout
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    n = {name: row["n"] for name, row in report["accuracy"].items()}
    assert n == {"teacher": 100, "base": 100, "sft": 100, "best_of_n": 50, "ppo": 100}
    assert report["student_vs_teacher"]["n"] == 100 and 0.5 < report["reward_model"]["auc_gold"] <= 1
    kept = {path.relative_to(tmp_path / "results").as_posix() for path in (tmp_path / "results").rglob("*.*")}
    assert kept >= {"report.md", "curves.png", "reward.png", "teacher.jsonl.gz", "metrics/2_sft.jsonl",
                    "metrics/5_reward.jsonl", "metrics/6_ppo.jsonl", "samples.txt", "commands.txt", "times.txt"}
