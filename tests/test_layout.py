"""The shape of the project: who imports whom, scripts that do nothing when imported, flags that are all used."""

import ast
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runtime

ROOT = Path(runtime.__file__).resolve().parent.parent
MAY_IMPORT = {
    "model": set(),
    "ranks": set(),
    "runtime": {"ranks"},
    "memory": {"ranks", "runtime"},
    "preflight": {"memory", "runtime"},
    "checkpoint": {"ranks", "runtime"},
    "health": set(),
    "arith": set(),
    "answers": set(),
    "chat": set(),
    "quality": set(),
    "data": {"answers", "arith", "chat", "ranks", "runtime"},
    "decode": {"model", "ranks"},
    "generate": {"answers", "chat", "checkpoint", "data", "decode", "memory", "model", "ranks", "runtime"},
    "sft": {"chat", "checkpoint", "data", "memory", "model", "ranks", "runtime"},
    "pseudo_reward": {"answers", "data", "runtime"},
    "eval": {"answers", "chat", "data", "generate", "memory", "model", "pseudo_reward", "quality", "ranks", "runtime"},
    "reward": {"chat", "checkpoint", "data", "eval", "memory", "model", "quality", "ranks", "runtime"},
    "ppo": {"answers", "chat", "checkpoint", "data", "eval", "generate", "health", "memory", "model", "ranks",
            "runtime"},
    "report": {"answers", "data", "runtime"},
}
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))


def tree(script):
    return ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))


def test_no_file_stands_outside_the_table():
    assert set(SCRIPTS) <= set(MAY_IMPORT)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_only_what_the_design_allows(script):
    imported = set()
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{script}.py, line {node.lineno}: a relative import in a flat script"
            imported.add(node.module.split(".")[0])
    assert imported & set(MAY_IMPORT) <= MAY_IMPORT[script]
    if script == "pseudo_reward":
        assert "torch" not in imported  # plain Python


def test_importing_the_scripts_does_nothing(tmp_path):
    code = f"import {', '.join(SCRIPTS)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_function_exists_once():
    """main, Config and private names apart, no two scripts define the same name."""
    owner = {}
    for script in SCRIPTS:
        for node in tree(script).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "Config") \
                    and not node.name.startswith("_"):
                assert node.name not in owner, f"{node.name} is in {owner[node.name]}.py and in {script}.py"
                owner[node.name] = script
    assert len(owner) > 40


def config_fields(script):
    fields = []
    for node in tree(script).body:
        if isinstance(node, ast.ClassDef) and node.name in ("Config", "CheckConfig", "FetchConfig"):
            fields += [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
    return fields


@pytest.mark.parametrize("script", [script for script in SCRIPTS if config_fields(script)])
def test_every_field_of_a_config_is_read(script):
    """As cfg.field somewhere in a function, `out` by Stage(cfg): a check of its range alone is no use of a flag."""
    read = set()
    for function in (node for node in tree(script).body if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cfg":
                read.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Stage", "runtime.Stage"):
                read.add("out")
            if isinstance(node, ast.For) and "getattr(cfg, name)" in ast.unparse(node):
                checked = set(ast.literal_eval(node.iter))
                assert checked <= set(config_fields(script)), f"{script}.py checks a flag that does not exist"
    assert set(config_fields(script)) - read == set(), f"{script}.py has flags that change nothing"
    assert read <= set(config_fields(script)), f"{script}.py reads fields that Config does not have"


# ---- train_all.sh --------------------------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
# stands for python: write down the command, and leave the file that the shell script looks for
printf '%s\\n' "$@" --- >> "$COMMANDS"
case $1$3 in */data.py*) mkdir -p "$OUT/0_questions" && touch "$OUT/0_questions/hard.jsonl" ;; esac
"""


def commands_of(tmp_path, **environment):
    """The commands of train_all.sh, each a list of words, without running any of them."""
    stub, log = tmp_path / "python", tmp_path / "commands"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(stub), "COMMANDS": str(log),
                   "OUT": str(tmp_path / "run"), **environment}
    done = subprocess.run(["bash", str(ROOT / "train_all.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [command.split("\n") for command in log.read_text().removesuffix("\n---\n").split("\n---\n")]


@pytest.mark.skipif(not (ROOT / "train_all.sh").is_file(), reason="there is no train_all.sh yet")
@pytest.mark.parametrize("environment", [
    {}, {"QUICK": "1"}, {"ROUNDS": "3", "SEED": "7"}, {"ROUNDS": "2", "REFERENCE": "kept"},
    {"ABLATE": "arms"}, {"NPROC": "2"}, {"TEACHER": "recorded.jsonl"},
    {"TEACHER": "recorded.jsonl", "TEACHER_TEST": "test.jsonl"},
    *({"PRESET": preset, "QUICK": quick} for preset in ("smollm2", "qwen", "llama3") for quick in ("0", "1")),
], ids=lambda environment: " ".join(f"{k}={v}" for k, v in environment.items()) or "default")
def test_every_flag_of_train_all_exists_and_parses(environment, tmp_path, capsys):
    """Each command goes through the real parser of the script it calls, and every path it reads was written before."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    teacher.mkdir()
    student.mkdir()
    defaults = {"TEACHER": str(teacher), "STUDENT": str(student)}
    made, run = [], str(tmp_path / "run")
    for path, *argv in commands_of(tmp_path, **defaults | environment):
        if Path(path).name == "ranks.py":
            nproc, path, *argv = argv
            assert nproc == environment["NPROC"]
        else:
            assert "NPROC" not in environment or Path(path).stem in ("preflight", "report")
        script = Path(path).stem
        assert Path(path).parent == ROOT
        if script == "report" and not Path(path).is_file():
            continue
        try:
            cfg = runtime.cli(importlib.import_module(script).Config, argv)
        except SystemExit:
            pytest.fail(f"{script}.py: {capsys.readouterr().err}")
        for name, value in vars(cfg).items():
            if name not in ("out", "run") and isinstance(value, str) and value.startswith(run + "/"):
                stage = value.removeprefix(run + "/").split("/")[0]
                assert stage in made, f"{script}.py --{name} reads {stage} before it is written"
        if getattr(cfg, "out", ""):
            made.append(str(cfg.out).removeprefix(run + "/").split("/")[0])
    for stage in ("0_questions", "2_sft", "3_student", "4_pseudo_reward", "5_reward", "6_ppo", "6_ppo_raw", "7_eval"):
        assert stage in made
    assert ("1_teacher" in made) == ("TEACHER" not in environment)
    assert ("6_ppo_r3" in made) == (environment.get("ROUNDS") == "3")


def test_set_replaces_and_extends_the_presets_numbers_and_only_chooses_stages(tmp_path):
    """Of all 22 or so stages three, in train_all's order; a flag given twice counts as it was given last."""
    change = "train=500; few=30;new_tokens=99;ppo+=--iterations 7 --rollout_size 32"
    chosen = commands_of(tmp_path, SET=change, ONLY="7_eval/teacher 0_questions 6_ppo 7_eval/sft")
    parsed = {Path(path).stem: runtime.cli(importlib.import_module(Path(path).stem).Config, argv)
              for path, *argv in reversed(chosen)}  # of two evaluations the teacher's, which comes first
    assert [Path(path).stem for path, *_ in chosen] == ["preflight", "data", "ppo", "eval", "eval"]  # and no report
    assert (parsed["data"].train, parsed["data"].test, parsed["preflight"].new_tokens) == (500, 1000, 99)
    asked = parsed["ppo"]
    assert (asked.iterations, asked.rollout_size, asked.lr, asked.max_new_tokens) == (7, 32, 2e-4, 99)
    assert (parsed["eval"].name, parsed["eval"].limit) == ("teacher", 30)
    assert "--limit" not in chosen[-1]  # those who were trained answer all
    assert "SET=" in (tmp_path / "run" / "command.txt").read_text()


@pytest.mark.parametrize("environment", [
    {"PRESET": "huge"}, {"NPROC": "0"}, {"ROUNDS": "0"}, {"SEED": "x"}, {"REFERENCE": "x"}, {"ABLATE": "2"},
    {"SET": "here=/"}, {"SET": "train=1;few"}, {"SET": "ppo+--lr 1"}])
def test_train_all_refuses_a_bad_environment_before_any_command(environment, tmp_path):
    said = r"huge|NPROC|ROUNDS|SEED|REFERENCE|ABLATE|SET: '(here=/|few|ppo\+--lr 1)'"
    with pytest.raises(AssertionError, match=said):
        commands_of(tmp_path, **environment)
    assert not (tmp_path / "commands").exists()


def test_train_all_refuses_a_stage_that_the_run_does_not_have(tmp_path):
    with pytest.raises(AssertionError, match="ONLY: this run has no stage '7_eval/tacher'; it has 0_questions "):
        commands_of(tmp_path, ONLY="7_eval/tacher")


SLOW_STUB = """#!/usr/bin/env bash
# stands for python: the second stage works until it is told to stop, and takes a moment for that
case $1 in */generate.py) ;; *) exit 0 ;; esac
save() { echo "$1" >> "$OUT/signals"; sleep 0.5; echo saved >> "$OUT/signals"; exit 9; }
trap 'save INT' INT; trap 'save TERM' TERM
echo "$$ $CONTINUE" > "$OUT/started"
while true; do sleep 0.05; done
"""


@pytest.fixture
def at_work(tmp_path):
    """train_all.sh at its second stage, in a process group of its own, as a terminal starts it."""
    stub = tmp_path / "python"
    stub.write_text(SLOW_STUB)
    stub.chmod(0o755)
    for folder in ("teacher", "student"):
        (tmp_path / folder).mkdir()
    env = {"PATH": os.environ["PATH"], "PYTHON": str(stub), "OUT": str(tmp_path / "a run"), "SEED": "3",
           "TEACHER": str(tmp_path / "teacher"), "STUDENT": str(tmp_path / "student")}
    start = lambda: subprocess.Popen(["bash", str(ROOT / "train_all.sh")], env=env, text=True, start_new_session=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = start()
    while not (tmp_path / "a run" / "started").exists() and process.poll() is None:
        time.sleep(0.02)
    yield process, start
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((tmp_path / "a run" / "started").read_text().split()[0]), signal.SIGKILL)
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.parametrize(("number", "name", "code", "whom"), [
    (signal.SIGINT, "INT", 130, os.killpg), (signal.SIGTERM, "TERM", 143, os.kill),
    (signal.SIGTERM, "TERM", 143, os.killpg)])
def test_train_all_passes_a_signal_on_once_and_waits_for_the_stage(at_work, tmp_path, number, name, code, whom):
    """Ctrl-C goes to all processes of a terminal, kill to the shell alone: the stage hears of it once in both cases."""
    process, _ = at_work
    whom(process.pid, number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == code and error.strip() in ("", "Terminated")  # says the stub of its sleep
    assert (tmp_path / "a run" / "signals").read_text().split() == [name, "saved"]
    assert output.split()[-1] == "[1_teacher]"  # and no later stage
    command = (tmp_path / "a run" / "started").read_text().strip().partition(" ")[2]
    assert command.startswith("SEED=3 TEACHER=") and command.endswith(f"bash {ROOT}/train_all.sh")
    assert f"OUT={tmp_path}/a\\ run " in command


def test_a_second_train_all_in_the_same_run_folder_is_refused(at_work, tmp_path):
    first, start = at_work
    second = start()
    assert second.communicate(timeout=60)[1] == (
        f"error: OUT={tmp_path}/a run: another train_all.sh is at work there; wait for it, or choose another OUT\n")
    assert second.returncode == 2 and first.poll() is None
