"""train_all.sh and two experiments with a stub for Python: which command gets what, signals, paths, bad settings."""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runtime

ROOT = Path(runtime.__file__).resolve().parent.parent
SWITCHES = {"lenient", "keep_duplicates", "zero_values", "gradient_checkpointing", "gold", "sft_filter", "quick",
            "only_teacher"}
STUB = f"""#!/usr/bin/env bash
# stands for python: write the command down, and leave what later stages and the shell look for
[ "$1" != -c ] || exec {shlex.quote(sys.executable)} "$@"
printf '%s\\n' "$@" --- >>"$COMMANDS"
while [ "$1" != --out ]; do shift || exit 0; done
case $2 in *.jsonl) printf '%s\\n' a b >"$2"; exit ;; esac # bench/controls.py: half as many rows as 1_vote has
mkdir -p "$2"
case $2 in
*/0_questions) [ -n "${{NO_HARD:-}}" ] || touch "$2/hard.jsonl" ;;
*/1_vote) [ -s "$2/sft.jsonl" ] || printf '%s\\n' a b c d >"$2/sft.jsonl" ;;
*/2_sft) echo '{{"flops": 100}}' >"$2/done.json" ;;
*/6_ppo) echo '{{"flops": 250}}' >"$2/done.json" ;;
esac
"""


@pytest.fixture
def shell(tmp_path):
    """shell(script, **environment): run it in a copy of the shell files; the finished process, and its commands.

    A file that $MUTANT holds takes the place of the project's: so tests/mutants.py seeds its bugs.
    """
    place = tmp_path / "the clone"
    presets = [f"presets/{path.name}" for path in ROOT.glob("presets/*.sh")]
    for file in ["train_all.sh", "runtime/stages.sh", "bench/ablate.sh", "bench/pays.sh", *presets]:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        mutated = Path(os.environ.get("MUTANT", "nowhere"), file)
        shutil.copy(mutated if mutated.is_file() else ROOT / file, place / file)
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    for folder in ("a teacher", "a student"):
        (tmp_path / folder).mkdir()
    defaults = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "COMMANDS": str(tmp_path / "commands"),
                "OUT": str(tmp_path / "a run"), "TEACHER": str(tmp_path / "a teacher"),
                "STUDENT": str(tmp_path / "a student")}

    def start(script="train_all.sh", *arguments, sh="bash", cwd=tmp_path, **environment):
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "commands").unlink()
        done = subprocess.run([sh, str(place / script), *arguments], env=defaults | environment, cwd=cwd,
                              capture_output=True, text=True)
        log = tmp_path / "commands"
        commands = log.read_text().removesuffix("\n---\n").split("\n---\n") if log.exists() else []
        return done, [parsed(command.split("\n"), tmp_path) for command in commands]

    return start


def parsed(words, folder):
    """(stage, script, flags): a path of the run without its folder, a model as teacher or student, models by name."""
    for place in ("a run/", "the clone/", "a ", ""):
        words = [word.replace(f"{folder}/{place}", "") for word in words]
    flags, nproc = {}, {}
    if words[0].endswith("runtime/ranks.py"):
        nproc, words = {"ranks": words[1]}, words[2:]
    script, words = ("preflight", words[2:]) if words[0] == "-m" else (Path(words[0]).stem, words[1:])
    while words:
        word = words.pop(0)
        name = word.removeprefix("--").removeprefix("no-")
        if not word.startswith("--"):
            key, _, value = word.partition("=")
            flags[f"={key}"] = value
        elif name in SWITCHES:
            flags[name] = not word.startswith("--no-")
        else:
            flags[name] = words.pop(0)
    return flags.pop("out", ""), script, flags | nproc


NUMBERS = dict(  # each another one, so that none can take the place of another
    train="11", valid="12", test="13", instruction="say so", lenient="1", teacher_samples="14", temperatures="0.5,0.9",
    student_samples="15", temperature="0.6", max_new_tokens="16", best_of="17", keep_duplicates="0", sft_epochs="18",
    sft_per_question="29", pairs_per_question="31", train_batch="32",
    sft_lr="1e-1", min_share="0.21", held_out="0.22", reward_epochs="19", reward_lr="1e-2", iterations="20",
    rollout_size="23", minibatches="24", eval_every="25", ppo_lr="1e-3", critic_lr="1e-4", kl_coef="0.26",
    zero_values="1", batch_size="27", micro_tokens="28", gradient_checkpointing="1", lora="30")
TRAINS = {"seed": "7", "lora": "30", "micro_tokens": "28", "gradient_checkpointing": True}
ALWAYS = {  # flags that every command of a script gets
    "data": {"questions": "mine.jsonl", "train": "11", "valid": "12", "test": "13", "instruction": "say so"},
    "generate": {"seed": "7", "max_new_tokens": "16", "batch_size": "27", "lenient": True,
                 "questions": "0_questions/train.jsonl"},
    "pseudo_reward": {"seed": "7", "lenient": True, "teacher": "1_teacher/samples.jsonl",
                      "pairs_per_question": "31", "questions": "0_questions/train.jsonl"},
    "sft": TRAINS | {"lr": "1e-1", "epochs": "18", "batch_size": "32"},
    "reward": TRAINS | {"lr": "1e-2", "epochs": "19", "held_out": "0.22", "batch_size": "32",
                        "calibrate": "3_student/samples.jsonl", "questions": "0_questions/train.jsonl"},
    "ppo": TRAINS | {"lr": "1e-3", "critic_lr": "1e-4", "kl_coef": "0.26", "iterations": "20", "rollout_size": "23",
                     "minibatches": "24", "eval_every": "25", "temperature": "0.6", "max_new_tokens": "16",
                     "batch_size": "27", "zero_values": True, "questions": "0_questions/train.jsonl",
                     "valid": "0_questions/valid.jsonl"},
    "eval": {"max_new_tokens": "16", "batch_size": "27", "questions": "0_questions/test.jsonl"},
}
WIRES = """\
0_questions         data
1_teacher           generate       model=teacher source=teacher samples=14 temperatures=0.5,0.9
1_vote              pseudo_reward  keep_duplicates=no sft_per_question=29
2_sft               sft            model=student data=1_vote/sft.jsonl
3_student           generate       model=2_sft source=student samples=15 temperatures=0.6
4_pseudo_reward     pseudo_reward  student=3_student/samples.jsonl voters=teacher min_share=0.21
5_reward            reward         model=2_sft pairs=4_pseudo_reward/pairs.jsonl
6_ppo               ppo            policy=2_sft reward_model=5_reward
3_student_r2        generate       model=6_ppo source=student samples=15 temperatures=0.6 seed=4294967303
4_pseudo_reward_r2  pseudo_reward  student=3_student_r2/samples.jsonl voters=both min_share=0.21 seed=4294967303
5_reward_r2         reward         model=2_sft pairs=4_pseudo_reward_r2/pairs.jsonl seed=4294967303
6_ppo_r2            ppo            policy=6_ppo reward_model=5_reward_r2 seed=4294967303
6_ppo_raw           ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes
7_eval/test         eval           =teacher=teacher =base=student =sft=2_sft =ppo=6_ppo_r2 =ppo_raw=6_ppo_raw =ppo_r1=6_ppo
7_eval/best_of_n    eval           =sft=2_sft =ppo=6_ppo_r2 reward_model=5_reward samples=17 temperature=0.6 seed=7
7_eval/hard         eval           =teacher=teacher =sft=2_sft =ppo=6_ppo_r2 questions=0_questions/hard.jsonl
"""  # noqa: E501
ARMS = """
1_vote+all                 pseudo_reward  keep_duplicates=no sft_filter=no sft_per_question=29
2_sft+all                  sft            model=student data=1_vote+all/sft.jsonl
2_sft+tenth                sft            model=student data=1_vote+tenth.jsonl
2_sft+half                 sft            model=student data=1_vote/sft.jsonl epochs=9
2_sft+twice                sft            model=student data=1_vote/sft.jsonl epochs=36
2_sft+longer               sft            model=2_sft data=1_vote/sft.jsonl epochs=45
2_sft+own                  sft            model=2_sft data=1_vote+own.jsonl epochs=90
2_sft+longest              sft            model=student data=1_vote+longest.jsonl
2_sft+shortest             sft            model=student data=1_vote+shortest.jsonl
6_ppo+longer               ppo            policy=2_sft reward=bench/controls.py:longer
6_ppo+shorter              ppo            policy=2_sft reward=bench/controls.py:shorter
6_ppo+gold                 ppo            policy=2_sft gold=yes lenient=yes
6_ppo+kl0                    ppo            policy=2_sft reward_model=5_reward kl_coef=0
6_ppo+raw_kl0                ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes kl_coef=0
6_ppo+kl0.25                 ppo            policy=2_sft reward_model=5_reward kl_coef=0.065
6_ppo+raw_kl0.25             ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes kl_coef=0.065
6_ppo+kl0.5                  ppo            policy=2_sft reward_model=5_reward kl_coef=0.13
6_ppo+raw_kl0.5              ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes kl_coef=0.13
6_ppo+kl2                    ppo            policy=2_sft reward_model=5_reward kl_coef=0.52
6_ppo+raw_kl2                ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes kl_coef=0.52
6_ppo+kl4                    ppo            policy=2_sft reward_model=5_reward kl_coef=1.04
6_ppo+raw_kl4                ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes kl_coef=1.04
4_pseudo_reward+both       pseudo_reward  student=3_student/samples.jsonl voters=both min_share=0.21
5_reward+both              reward         model=2_sft pairs=4_pseudo_reward+both/pairs.jsonl
6_ppo+both                 ppo            policy=2_sft reward_model=5_reward+both
5_reward+teacher           reward         model=teacher pairs=4_pseudo_reward/pairs.jsonl
6_ppo+teacher              ppo            policy=2_sft reward_model=5_reward+teacher critic=5_reward
3_student+r2               generate       model=6_ppo source=student samples=15 temperatures=0.6 seed=4294967303
4_pseudo_reward+r2         pseudo_reward  student=3_student+r2/samples.jsonl voters=both min_share=0.21 seed=4294967303
5_reward+r2                reward         model=2_sft pairs=4_pseudo_reward+r2/pairs.jsonl seed=4294967303
6_ppo+r2                   ppo            policy=6_ppo reward_model=5_reward+r2 seed=4294967303
4_pseudo_reward+r2teacher  pseudo_reward  student=3_student+r2/samples.jsonl voters=teacher min_share=0.21 seed=4294967303
5_reward+r2teacher         reward         model=2_sft pairs=4_pseudo_reward+r2teacher/pairs.jsonl seed=4294967303
6_ppo+r2teacher            ppo            policy=6_ppo reward_model=5_reward+r2teacher seed=4294967303
7_eval/arms                eval           =sft+all=2_sft+all =sft+tenth=2_sft+tenth =sft+half=2_sft+half =sft+twice=2_sft+twice =sft+longer=2_sft+longer =sft+own=2_sft+own =sft+longest=2_sft+longest =sft+shortest=2_sft+shortest =ppo+longer=6_ppo+longer =ppo+shorter=6_ppo+shorter =ppo+gold=6_ppo+gold =ppo+kl0=6_ppo+kl0 =ppo+raw_kl0=6_ppo+raw_kl0 =ppo+kl0.25=6_ppo+kl0.25 =ppo+raw_kl0.25=6_ppo+raw_kl0.25 =ppo+kl0.5=6_ppo+kl0.5 =ppo+raw_kl0.5=6_ppo+raw_kl0.5 =ppo+kl2=6_ppo+kl2 =ppo+raw_kl2=6_ppo+raw_kl2 =ppo+kl4=6_ppo+kl4 =ppo+raw_kl4=6_ppo+raw_kl4 =ppo+both=6_ppo+both =ppo+teacher=6_ppo+teacher =ppo+r2=6_ppo+r2 =ppo+r2teacher=6_ppo+r2teacher
"""  # noqa: E501

FEWER = """
6_ppo+kl0            ppo            policy=2_sft reward_model=5_reward kl_coef=0
6_ppo+raw_kl0        ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes kl_coef=0
6_ppo+kl0.25         ppo            policy=2_sft reward_model=5_reward kl_coef=0.065
6_ppo+raw_kl0.25     ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes kl_coef=0.065
6_ppo+kl0.5          ppo            policy=2_sft reward_model=5_reward kl_coef=0.13
6_ppo+raw_kl0.5      ppo            policy=2_sft votes=4_pseudo_reward/rewards.jsonl lenient=yes kl_coef=0.13
5_reward+votes2      reward         model=2_sft pairs=4_pseudo_reward+votes2/pairs.jsonl epochs=190
6_ppo+votes2         ppo            policy=2_sft reward_model=5_reward+votes2
6_ppo+raw_votes2     ppo            policy=2_sft votes=4_pseudo_reward+votes2/rewards.jsonl lenient=yes
5_reward+votes9      reward         model=2_sft pairs=4_pseudo_reward+votes9/pairs.jsonl epochs=57
6_ppo+votes9         ppo            policy=2_sft reward_model=5_reward+votes9
6_ppo+raw_votes9     ppo            policy=2_sft votes=4_pseudo_reward+votes9/rewards.jsonl lenient=yes
4_pseudo_reward+one  pseudo_reward  teacher=1_teacher+one/samples.jsonl student=3_student/samples.jsonl min_share=0.21
5_reward+one         reward         model=2_sft pairs=4_pseudo_reward+one/pairs.jsonl
6_ppo+one            ppo            policy=2_sft reward_model=5_reward+one
6_ppo+raw_one        ppo            policy=2_sft votes=4_pseudo_reward+one/rewards.jsonl lenient=yes
7_eval/arms          eval           =ppo+kl0=6_ppo+kl0 =ppo+raw_kl0=6_ppo+raw_kl0 =ppo+kl0.25=6_ppo+kl0.25 =ppo+raw_kl0.25=6_ppo+raw_kl0.25 =ppo+kl0.5=6_ppo+kl0.5 =ppo+raw_kl0.5=6_ppo+raw_kl0.5 =ppo+votes2=6_ppo+votes2 =ppo+raw_votes2=6_ppo+raw_votes2 =ppo+votes9=6_ppo+votes9 =ppo+raw_votes9=6_ppo+raw_votes9 =ppo+one=6_ppo+one =ppo+raw_one=6_ppo+raw_one
"""  # noqa: E501


def wired(table):
    """What a table says: [(stage, script, flags)]."""
    rows = []
    for stage, script, *wires in (line.split() for line in table.strip().splitlines()):
        own = {key: {"yes": True, "no": False}.get(value, value) for key, value in (w.rsplit("=", 1) for w in wires)}
        rows.append((stage, script, ALWAYS[script] | own))
    return rows


def stages(commands):
    return [command for command in commands if command[0]]


def test_every_stage_gets_what_it_should(shell):
    """Models, data, seeds and numbers of a run of two rounds, flag by flag; all paths hold a space."""
    done, commands = shell(SEED="7", ROUNDS="2", QUESTIONS="mine.jsonl", **NUMBERS)
    assert done.returncode == 0, done.stderr
    for command, expected in zip(stages(commands), wired(WIRES)):
        assert command == expected
    assert len(stages(commands)) == len(wired(WIRES))
    preflight, look, report = commands[0], commands[4], commands[-1]
    asked = {"run": "run", "seed": "7", "teacher": "teacher", "student": "student", "questions": "mine.jsonl",
             "batch_size": "27", "micro_tokens": "28", "max_new_tokens": "16", "lora": "30",
             "gradient_checkpointing": True, "preset": "tiny", "nproc": "1", "teacher_test": ""}
    assert asked.items() <= preflight[2].items() and "kl_coef=0.26" in preflight[2]["changed"]
    common = {"=run": "", "preset": "tiny", "seed": "7"}
    assert report[1:] == ("report", common)
    assert commands[3][0] == "1_vote" and look[1:] == ("report", common | {"only_teacher": True, "min_share": "0.21"})


def test_the_arms_of_the_ablation_differ_from_the_run_in_one_thing(shell, tmp_path):
    done, commands = shell("bench/ablate.sh", "arms", SEED="7", QUESTIONS="mine.jsonl", **NUMBERS | {"train": "5"})
    assert done.returncode == 0, done.stderr
    arms = [command for command in stages(commands) if "+" in command[0] or command[0] == "7_eval/arms"]
    controls = {flags["kind"]: flags for _, script, flags in arms if script == "controls"}
    arms = [command for command in arms if command[1] != "controls"]
    assert controls == {
        "own": {"kind": "own", "rewards": "4_pseudo_reward/rewards.jsonl", "questions": "0_questions/train.jsonl"},
        "longest": {"kind": "longest", "sft": "1_vote/sft.jsonl"},
        "shortest": {"kind": "shortest", "sft": "1_vote/sft.jsonl"}}
    for command, expected in zip(arms, wired(ARMS)):
        assert command == expected
    assert len(arms) == len(wired(ARMS))
    (tmp_path / "a run/1_vote/sft.jsonl").write_text("".join(f"{i}\n" for i in range(25)))
    shell("bench/ablate.sh", "arms", SEED="7", QUESTIONS="mine.jsonl", **NUMBERS | {"train": "5"})
    assert (tmp_path / "a run/1_vote+tenth.jsonl").read_text() == "0\n10\n20\n"  # from the first to the last question


def test_the_ablation_runs_every_seed_and_compares_them(shell):
    done, commands = shell("bench/ablate.sh", SEEDS="0 12", JOBS="1")
    assert done.returncode == 0, done.stderr
    seeds = {stage: flags["seed"] for stage, _, flags in commands if stage.endswith("/2_sft")}
    assert seeds == {"0/2_sft": "0", "12/2_sft": "12"}
    assert commands[-1] == ("run", "ablation", {"=0": "", "=12": ""})


def test_fewer_votes_change_the_reward_alone(shell, tmp_path):
    """Thirty questions have a vote, more cannot be asked for; a judge of few reads them at most ten times as often."""
    (tmp_path / "a run/4_pseudo_reward").mkdir(parents=True)
    (tmp_path / "a run/4_pseudo_reward/rewards.jsonl").write_text("{}\n" * 30)
    done, commands = shell("bench/pays.sh", "arms", SEED="7", QUESTIONS="mine.jsonl", VOTES="2 9 30", **NUMBERS)
    assert done.returncode == 0, done.stderr
    arms = [command for command in stages(commands) if "+" in command[0] or command[0] == "7_eval/arms"]
    cuts = {stage: flags for stage, script, flags in arms if script == "pays"}
    votes = {"=cut": "", "votes": "4_pseudo_reward", "seed": "7"}
    assert cuts == {"4_pseudo_reward+votes2": votes | {"questions": "2"},
                    "4_pseudo_reward+votes9": votes | {"questions": "9"},
                    "1_teacher+one": {"=cut": "", "samples": "1_teacher/samples.jsonl"}}
    assert [command for command in arms if command[1] != "pays"] == wired(FEWER)


def test_every_teacher_has_runs_of_its_own(shell, tmp_path):
    """The preset's with fewer votes, the others without."""
    (tmp_path / "weak one").mkdir()
    for run in ("3", "WEAK-3"):
        (tmp_path / f"a run/{run}/4_pseudo_reward").mkdir(parents=True)
        (tmp_path / f"a run/{run}/4_pseudo_reward/rewards.jsonl").write_text("{}\n" * 30)
    done, commands = shell("bench/pays.sh", SEEDS="3", JOBS="1", VOTES="5", WEAK=str(tmp_path / "weak one"))
    assert done.returncode == 0, done.stderr
    asked = {stage: flags for stage, _, flags in commands}
    assert (asked["3/1_teacher"]["model"], asked["WEAK-3/1_teacher"]["model"]) == ("teacher", "weak one")
    assert asked["3/2_sft"]["seed"] == asked["WEAK-3/2_sft"]["seed"] == "3"
    assert {"3/6_ppo+votes5", "3/6_ppo+one", "3/6_ppo+kl0.5", "WEAK-3/6_ppo+kl0.5"} < set(asked)
    assert not {"WEAK-3/6_ppo+votes5", "WEAK-3/6_ppo+one"} & set(asked)
    assert commands[-1][1:] == ("pays", {"=default": "3", "=WEAK": "WEAK-3"})


def test_a_recorded_teacher_is_not_asked(shell):
    """Its answers vote; it has a row where its answers to the test questions are recorded too."""
    for test in ("", "test.jsonl"):
        _, commands = shell(TEACHER="answers.jsonl", TEACHER_TEST=test)
        by_stage = {stage: flags for stage, _, flags in commands}
        assert "1_teacher" not in by_stage and by_stage["1_vote"]["teacher"] == "answers.jsonl"
        assert by_stage["7_eval/test"].get("=teacher", "") == test and "=teacher" not in by_stage["7_eval/hard"]


def test_the_environment_comes_before_quick_and_quick_before_the_preset(shell):
    _, commands = shell(QUICK="1", train="77")
    data, teacher, report = commands[1][2], commands[2][2], commands[-1][2]
    assert (data["train"], data["valid"], teacher["samples"]) == ("77", "10", "8") and report["quick"]


@pytest.mark.parametrize(("questions", "lenient"), [("gsm8k", True), ("folder/mmlu_pro.jsonl", False)])
def test_a_lone_letter_is_no_answer_to_a_choice(shell, questions, lenient):
    _, commands = shell(PRESET="qwen", QUESTIONS=questions)
    assert {flags["lenient"] for _, script, flags in commands if script in ("generate", "pseudo_reward")} == {lenient}


PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("[a-z]*.sh"))


@pytest.mark.parametrize("environment", [
    {"NPROC": "2"}, {"TEACHER": "recorded.jsonl", "QUICK": "1"}, {"ROUNDS": "3"}, {"arms": "1"},
    *({"PRESET": preset} for preset in PRESETS),
], ids=lambda environment: " ".join(f"{k}={v}" for k, v in environment.items()))
def test_every_command_parses_and_reads_what_was_written_before(shell, environment, capsys):
    done, commands = shell(*["bench/ablate.sh", "arms"] * ("arms" in environment), **environment)
    assert done.returncode == 0, done.stderr
    made = {"1_vote+tenth.jsonl"}
    for stage, script, flags in commands:
        assert flags.pop("ranks", "1") == environment.get("NPROC", "1") or not stage
        argv = [f"--out={stage}"] * bool(stage)
        for name, value in flags.items():
            if name in SWITCHES:
                argv.append(f"--{name}" if value else f"--no-{name}")
                continue
            argv.append(f"{name[1:]}={value}" if name[0] == "=" else f"--{name}={value}")
            read = value.split("/")[0]
            assert read in made or not re.match(r"\d_", read), f"{stage} reads {read} before it is written"
        try:
            module = importlib.import_module("runtime.preflight" if script == "preflight" else script)
            runtime.cli(module.Config, argv)
        except SystemExit:
            pytest.fail(f"{script}.py: {capsys.readouterr().err}")
        made.add(stage.split("/")[0])
    assert {"2_sft", "6_ppo_raw", "7_eval"} <= made and ("6_ppo_r3" in made) == (environment.get("ROUNDS") == "3")


@pytest.mark.parametrize("environment", [
    {}, {"ROUNDS": "3"}, {"TEACHER": "recorded.jsonl"}, {"QUESTIONS": "mawps"}, {"PRESET": "qwen", "NO_HARD": "1"},
    {"QUESTIONS": "q.jsonl", "NO_HARD": "1"}], ids=str)
def test_a_heading_says_what_a_stage_does_and_which_of_how_many_it_is(shell, environment):
    """In 80 letters. An experiment has more stages than that."""
    done, commands = shell(**environment)
    headings = re.findall(r"(?m)^(\[(\d+)/(\d+)\] (\S+): \S.+ \(\d+:\d\d\))$", done.stdout)
    assert [stage for *_, stage in headings] == [stage for stage, *_ in stages(commands)]
    assert [(int(place), int(of)) for _, place, of, _ in headings] == [
        (i + 1, len(headings)) for i in range(len(headings))]
    assert max(len(line) for line, *_ in headings) <= 80
    if not environment:
        done, commands = shell("bench/ablate.sh", "arms")
        assert re.search(r"(?m)^\[13\] 1_vote\+all: ", done.stdout)


def test_from_redoes_a_stage_and_all_after_it(shell, tmp_path):
    shell()
    run = tmp_path / "a run"
    done, _ = shell(FROM="5_reward")
    aside = {path.name for path in run.glob("*.old1")} | {f"7_eval/{path.name}" for path in run.glob("7_eval/*.old1")}
    assert done.returncode == 0 and aside == {f"{stage}.old1" for stage in (
        "5_reward", "6_ppo", "6_ppo_raw", "7_eval/test", "7_eval/best_of_n", "7_eval/hard")}
    shell(FROM="7_eval/hard")
    assert {path.name for path in run.rglob("*.old2")} == {"hard.old2"}
    done, commands = shell(FROM="5_rewards")
    assert done.returncode == 2 and "FROM=5_rewards" in done.stderr and not stages(commands)


@pytest.mark.parametrize("environment", [
    {"PRESET": "huge"}, {"PRESET": "../presets/tiny"}, {"ROUNDS": "0"}, {"SEED": "-1"}, {"train": "1.5"},
    {"iterations": "0"}, {"ppo_lr": "fast"}, {"lenient": "yes"}], ids=str)
def test_a_bad_setting_is_one_sentence_before_any_command(shell, environment):
    done, commands = shell(**environment)
    [(name, value)] = environment.items()
    assert done.returncode == 2 and not commands
    assert done.stderr.startswith(f"error: {name}={value}: ") and done.stderr.count("\n") == 1
    assert name != "PRESET" or all(preset in done.stderr for preset in PRESETS)


def test_another_shell_is_told_to_be_bash(shell):
    """As sh is on many systems; where sh is bash, it runs."""
    done, commands = shell(sh="sh")
    assert (done.returncode == 0 and commands) or (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_windows_line_ends_are_called_so(shell, tmp_path):
    shell()  # puts the files there
    for path in (tmp_path / "the clone").rglob("*.sh"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    for sh in ("bash", "sh"):
        done = subprocess.run([sh, "the clone/train_all.sh"], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "CRLF" in done.stderr


def test_relative_paths_are_those_of_the_caller_whatever_cdpath_says(shell, tmp_path):
    """Also as the script itself is called: from the folder above, with a CDPATH that has a folder of its name."""
    (tmp_path / "elsewhere" / "the clone").mkdir(parents=True)
    paths = {"OUT": "some run", "TEACHER": "a teacher", "STUDENT": "a student", "QUESTIONS": "my questions.jsonl"}
    done = subprocess.run(
        ["bash", "the clone/train_all.sh"], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "COMMANDS": str(tmp_path / "commands"),
             "CDPATH": str(tmp_path / "elsewhere"), **paths})
    assert done.returncode == 0, done.stderr
    words = {f"{tmp_path}/the clone/data.py", "a teacher", "my questions.jsonl", "some run/2_sft"}
    assert words <= set((tmp_path / "commands").read_text().splitlines())


# ---- signals -------------------------------------------------------------------------------------------------------

SLOW_STUB = """#!/usr/bin/env bash
# stands for python: the second stage works until it is told to stop, and takes a moment for that
case $1 in */generate.py) ;; *) exit 0 ;; esac
save() { echo "$1" >> "$OUT/signals"; sleep 0.3; echo saved >> "$OUT/signals"; exit 9; }
trap 'save INT' INT; trap 'save TERM' TERM
echo "$$ $CONTINUE" > "$OUT/starting" && mv "$OUT/starting" "$OUT/started"
while true; do sleep 0.05; done
"""


@pytest.fixture
def at_work(shell, tmp_path):
    """train_all.sh at its second stage, in a process group of its own, as a terminal starts it."""
    (tmp_path / "python").write_text(SLOW_STUB)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "a run"), "SEED": "3",
           "PRECISION": "bf16", "TEACHER": str(tmp_path / "a teacher"), "STUDENT": str(tmp_path / "a student"),
           "train": "50"}
    start = lambda: subprocess.Popen(["bash", str(tmp_path / "the clone/train_all.sh")], env=env, text=True,
                                     start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = start()
    while not (tmp_path / "a run" / "started").exists() and process.poll() is None:
        time.sleep(0.02)
    yield process, start
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((tmp_path / "a run" / "started").read_text().split()[0]), signal.SIGKILL)
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("number", "code", "whom"), [
    (signal.SIGINT, 130, os.killpg), (signal.SIGTERM, 143, os.kill)])
def test_a_signal_is_passed_on_once_and_the_stage_waited_for(at_work, tmp_path, number, code, whom):
    """Ctrl-C goes to all processes of a terminal, kill to the shell alone: the stage hears of it once in both cases,
    and the shell says how to go on, whatever the stage was at."""
    process, _ = at_work
    whom(process.pid, number)
    process.wait()
    assert (tmp_path / "a run" / "signals").read_text().split() == ["TERM", "saved"]
    output, error = process.communicate()
    command = (tmp_path / "a run" / "started").read_text().strip().partition(" ")[2]
    assert process.returncode == code and f"this goes on from there: {command}\n" in error
    assert "1_teacher" in output.splitlines()[-1]  # and no later stage
    assert command.startswith("SEED=3 PRECISION=bf16 TEACHER=") and command.endswith("the\\ clone/train_all.sh")
    assert f"OUT={tmp_path}/a\\ run " in command and "train=50 " in command
    assert "train=50 bash train_all.sh" in (tmp_path / "a run" / "command.txt").read_text()


def test_a_second_run_in_the_same_folder_is_refused(at_work, tmp_path):
    first, start = at_work
    second = start()
    assert "a run: another train_all.sh is at work there" in second.communicate()[1]
    assert second.returncode == 2 and first.poll() is None
