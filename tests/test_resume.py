"""Every stage that takes long is killed at random moments (kill -9) and gives the same bits as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import generate
import ppo
import reward
import runtime
import sft
from data import write_jsonl
from hf.tokenizer import Tokenizer
from model import load_scalar_model, save_model
from runtime import checkpoint

ROOT = Path(runtime.__file__).resolve().parent.parent
KILLS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_folder):
    """A tiny model, a scorer, questions, pairs and samples."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    save_model(load_scalar_model(model_folder, torch.float32, new_head="normal"), folder / "scorer")
    Tokenizer(model_folder).save(folder / "scorer")
    rng = random.Random(0)
    write_jsonl(folder / "questions.jsonl", [
        {"id": f"q{i}", "question": f"Ava has {i} pens. How many{' more' * (i % 7)}?",
            "answer": str(i)} for i in range(48)])
    write_jsonl(folder / "sft.jsonl", [
        {"prompt": f"{i}?", "response": " ".join(rng.choices("abc#0123", k=i % 9 + 1))} for i in range(61)])
    write_jsonl(folder / "pairs.jsonl", [
        {"id": f"q{i % 48}", "prompt": f"{i}?", "chosen": f"#### {i}", "rejected": "no" * (i % 5 + 1),
            "weight": 0.5 + i % 2}
        for i in range(96)])
    write_jsonl(folder / "samples.jsonl", [
        {"id": f"q{i % 48}", "response": f"#### {i}", "finish": "stop", "answer": str(i)} for i in range(96)])
    return folder


def commands(world, model):
    """Script and flags of each stage, all but --out."""
    questions, scorer = f"--questions={world}/questions.jsonl", f"{world}/scorer"
    return {name: (script, flags.split()) for name, script, flags in (
        ("sft", sft, f"--model={model} --data={world}/sft.jsonl --epochs=5 --batch_size=16 --weight_decay=0.1"),
        ("reward", reward, f"--model={model} --pairs={world}/pairs.jsonl --calibrate={world}/samples.jsonl {questions} "
                           "--epochs=3 --batch_size=16"),
        ("ppo", ppo, f"--policy={model} --reward_model={scorer} {questions} --valid={world}/questions.jsonl "
                     "--iterations=6 --rollout_size=12 --minibatches=2 --epochs=2 --max_new_tokens=8 --eval_every=3"),
        ("generate", generate, f"--model={model} {questions} --samples=2 --temperatures=0.7,1.0 --max_new_tokens=12"),
        ("eval", evaluation, f"one={model} two={model} {questions} --max_new_tokens=16"),
        ("best_of_n", evaluation, f"n={model} {questions} --reward_model={scorer} --samples=3 --max_new_tokens=12"),
    )}


def start(script, flags, log):
    """Run a stage in a child of this process, which has imported everything already; its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        file = open(log, "w")  # noqa: SIM115  until the process ends
        os.dup2(file.fileno(), 2)  # of the signal handler
        sys.stdout = sys.stderr = file
        checkpoint.PAUSE = 0  # save after every step
        generate.PART = 8  # and every few answers
        os.fsync = lambda handle: None  # a killed process leaves the system, and what it has taken, alive
        runtime.launch(script.main, script.Config, flags)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outputs(folder):
    """All files by name; of done.json, which knows the time, what came out."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in files if name.endswith("done.json")]:
        done = json.loads(files[name])
        files[name] = done["results"], done["tokens"], done["flops"], done["sha256"]
    return files


@pytest.fixture(scope="module")
def whole(world, model_folder, tmp_path_factory):
    """whole(name): the outputs of a stage that nothing stopped, and its seconds; run once."""
    made = {}

    def get(name):
        if name not in made:
            (script, flags), folder = commands(world, model_folder)[name], tmp_path_factory.mktemp(name)
            begun = time.monotonic()
            child = start(script, [*flags, f"--out={folder}/out"], folder / "log")
            assert finish(child) == 0, (folder / "log").read_text()
            made[name] = outputs(folder / "out"), time.monotonic() - begun
        return made[name]

    return get


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "generate", "eval", "best_of_n"])
def test_a_stage_that_is_killed_at_any_moment_gives_the_same_bits(world, model_folder, whole, tmp_path, name):
    """Weights, metrics.jsonl (no line twice, none lost), samples, transcripts: equal to an uninterrupted run's."""
    script, flags = commands(world, model_folder)[name]
    expected, seconds = whole(name)
    rng, went_on, out, log = random.Random(name), 0, tmp_path / "killed", tmp_path / "log"
    log.touch()  # a child may be killed before it opens it
    newest = lambda: max((str(path) for path in out.rglob("resume/*.json")), default="")
    for attempt in range(100):
        before, child = newest(), start(script, [*flags, f"--out={out}"], log)
        if attempt < KILLS:  # at any moment, but for the first attempt once a step was saved: so they get somewhere
            over = os.WEXITED | os.WNOWAIT | os.WNOHANG
            while attempt and newest() == before and not os.waitid(os.P_PID, child, over):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, seconds / 8) if attempt != 1 else 0)  # right after a save: one always goes on
            os.kill(child, signal.SIGKILL)
        code = finish(child)
        text = log.read_text()
        went_on += "goes on after step" in text
        assert "damaged" not in text and code in (0, -signal.SIGKILL), text
        if code == 0:
            break
    assert went_on and outputs(out) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "log"]
    assert not list(out.rglob("resume")) and not list(out.rglob("*.tmp"))


def test_another_process_gives_the_same_bits(world, model_folder, whole, tmp_path):
    """Whatever its hash seed and its folder."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import generate, importlib, runtime; generate.PART = 8\n"
    for name, (script, flags) in commands(world, model_folder).items():
        code += f"script = importlib.import_module({script.__name__!r})\n"
        code += f"runtime.launch(script.main, script.Config, {[*flags, f'--out={tmp_path}/{name}']})\n"
    env = os.environ | {"PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in commands(world, model_folder):
        assert outputs(tmp_path / name) == whole(name)[0]
