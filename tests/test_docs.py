"""What the documents name exists, their commands run, and the seeded bugs of mutants.py still fit the code."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys

import pytest
from mutants import MUTANTS, ROOT

pytestmark = pytest.mark.project
PAGES = ["README.md", "bench/README.md", "weights/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DETAILS = (ROOT / "docs" / "ppo_details.md").read_text(encoding="utf-8")


@functools.cache
def names(path):
    """Functions and classes of a file."""
    return {node.name for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_detail_is_decided_and_every_name_exists():
    """40 rows of PPO and 16 of the reward model, each with a place in the code and a test that are there."""
    rows = [line for line in DETAILS.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(line.split("|")[1]) for line in rows] == [*range(1, 41), *range(1, 17)]
    for line in rows:
        assert len(line.split("|")) == 7, line
        assert re.search(r"`[\w/]+\.py: \w+`", line.split("|")[4]) and "`tests/" in line.split("|")[5], line
    for path, name in re.findall(r"`([\w/]+\.py): (\w+)`", DETAILS) + re.findall(r"`(tests/\w+\.py)::(\w+)`", DETAILS):
        assert name in names(path), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110 and len(text.split()) <= 1200


# ---- commands ------------------------------------------------------------------------------------------------------

RUNS = {  # in this order, one after the other: command -> what makes it small
    "pip install -r requirements.txt && bash train_all.sh": "",
    "python play.py runs/tiny-0": "",
    "python data.py check my.jsonl": "",
    "python ppo.py --policy runs/tiny-0/2_sft --reward days.py:days --questions runs/tiny-0/0_questions/train.jsonl "
    "--valid runs/tiny-0/0_questions/valid.jsonl --max_new_tokens 96 --temperature 0.7 --iterations 20 "
    "--rollout_size 128 --eval_every 4 --kl_coef 0.1 --out runs/days": "--iterations 2 --rollout_size 8",
    "git apply docs/patches/grpo.patch": "",
    "cp -r runs/tiny-0 runs/grpo": "",
    "OUT=runs/grpo FROM=6_ppo bash train_all.sh": "",
    "python bench/compare.py runs/tiny-0 runs/grpo": "",
    "git apply -R docs/patches/grpo.patch": "",
}
SMALL = dict(train="24", valid="2", test="4", teacher_samples="2", student_samples="2", best_of="2", sft_epochs="1",
             reward_epochs="1", held_out="0.3", iterations="2", rollout_size="8", minibatches="2")
ELSEWHERE = {  # command -> why not here
    "pip install -r requirements-dev.txt && python -m pytest -q": ".ci/run takes it word for word",
    "python -m pytest -q": "the suite itself",
    "QUICK=1 bash train_all.sh": "tests/test_pipeline.py",
    "kl_coef=0 bash train_all.sh": "tests/test_train_all.py: every number of a preset",
    "QUESTIONS=my.jsonl bash train_all.sh": "tests/test_data.py splits such a file",
    "NPROC=8 bash train_all.sh": "tests/test_ranks.py, with 2 and 3",
    "bash bench/ablate.sh": "tests/test_train_all.py; hours",
    "python assignments/handout.py ../handout": "tests/test_assignments.py",
    "python bench/compare.py runs/a runs/b": "as the one of docs/modify.md",
    "python bench/sick.py --run runs/tiny-0 --out docs/healthy": "half an hour; bench/tests/test_sick.py",
    "bash train_all.sh": "as the one of the README",
    "python bench/speed.py": "needs transformers and an hour; bench/tests/test_speed.py",
    "python bench/growth.py": "some minutes; bench/tests/test_growth.py",
    "python bench/tests/soak.py": "kills runs for as long as one lets it; tests/test_resume.py",
    "python -m pytest -q bench/tests": "a suite of its own",
    "python tests/mutants.py": "some minutes, and CI knows that no entry is stale",
    'MODELS_DIR=folder DATA_DIR=folder python -m pytest -q -m "slow or not slow"': "needs real weights",
    "micro_tokens=512 PRESET=qwen bash train_all.sh": "needs real weights",
    "python data.py fetch gsm8k && PRESET=qwen DATA_DIR=data bash train_all.sh": "needs the network and real weights",
    "python data.py fetch svamp && PRESET=laptop DATA_DIR=data bash train_all.sh": "needs the network and real weights",
    "python data.py fetch gsm8k": "needs the network",
    "python data.py fetch svamp": "needs the network",
    "python eval.py --questions gsm8k:test --shots 8 --max_new_tokens 512 --out runs/gsm8k llama=models/Llama-3.1-8B":
        "needs real weights; tests/test_eval.py: shots",
    "python weights/make.py --out weights": "25 minutes",
}


def commands_of(page):
    """The shell lines of a page's bash blocks, and commands within its text; those with '...' are sketches."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks, prose = re.findall(r"```bash\n(.*?)```", text, re.DOTALL), re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line.partition("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"git apply -R \S+", text)
    lines += re.findall(r"`((?:\w+=\S+ )*(?:bash|python|pip|git) [^`]+)`", prose)
    return {" ".join(line.split()) for line in lines if "..." not in line}


def test_every_command_runs_or_says_why_not():
    found = set().union(*map(commands_of, PAGES))
    assert found == RUNS.keys() | ELSEWHERE.keys()


def test_the_commands_run(tmp_path):
    """In a copy of the project, with the bundled models and few questions."""
    place = tmp_path / "the project"
    for name in ("bench", "docs/patches", "hf", "presets", "runtime", "tasks", "weights"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "train_all.sh"]:
        shutil.copy(path, place)
    page = (ROOT / "docs" / "modify.md").read_text(encoding="utf-8")
    (place / "days.py").write_text(re.search(r"```python\n(import re\n.*?)```", page, re.DOTALL)[1])
    (place / "my.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | SMALL | {"PATH": path}
    for command, smaller in RUNS.items():
        shell = f"{command.removeprefix('pip install -r requirements.txt && ')} {smaller}"
        done = subprocess.run(["bash", "-c", shell], cwd=place, env=env, input="\n", capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "critic" in (place / "runs/tiny-0/6_ppo/metrics.jsonl").read_text()
    assert "critic" not in (place / "runs/grpo/6_ppo/metrics.jsonl").read_text()


# ---- seeded bugs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_no_seeded_bug_is_stale(file):
    """Each still fits the code once and names tests that exist."""
    seen = set()
    for mutant in (mutant for mutant in MUTANTS if mutant.file == file):
        mutant.source()
        assert mutant.name not in seen
        seen.add(mutant.name)
        for node_id in mutant.node_ids:
            path, name = node_id.removeprefix(f"{ROOT}/").split("[")[0].split("::")
            assert name in names(path), f"{path} has no {name}"
