"""Several ranks give what one gives, on the CPU with gloo: forked from this process, or under torchrun.

Of torchrun most is `slow`, for every rank imports torch first. DRIVER runs a script in which a rank dies.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import world  # noqa: F401  a fixture

import runtime
from model import load_model, load_scalar_model, masked_logprobs
from runtime import ranks, steps
from runtime.files import read_jsonl

ROOT = Path(ranks.__file__).resolve().parent.parent

DRIVER = """
import importlib, os, signal, sys, time
sys.path.insert(0, {root!r})
import runtime; from runtime import checkpoint, ranks
checkpoint.PAUSE = 0  # save after every step
script, what, rank, step = sys.argv[1:5]
log = runtime.Stage.log
def log_or_die(self, now, metrics):
    if (ranks.RANK, now) == (int(rank), int(step)):
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise": raise RuntimeError("a broken rank")
        if what == "refuse": raise OSError("a full disk")
        if what == "wait": print("waiting", flush=True); time.sleep(2)
    log(self, now, metrics)
runtime.Stage.log = log_or_die
module = importlib.import_module(script)
runtime.launch(module.main, module.Config, sys.argv[5:], every_rank=True)
"""


def commands(world, model):  # noqa: F811
    """Five steps each, of unequal texts. The last batch does not divide: it has fewer rows than there are ranks."""
    questions = f"--questions={world}/questions.jsonl"
    return {
        "sft": f"--model={model} --data={world}/sft.jsonl --epochs=1 --batch_size=15 --micro_tokens=96 "
               "--weight_decay=0.1 --warmup=2",
        "reward": f"--model={model} --pairs={world}/pairs.jsonl --calibrate={world}/samples.jsonl {questions} "
                  "--batch_size=21 --micro_tokens=128 --warmup=2 --calibration_samples=31 --gradient_checkpointing",
        "ppo": f"--policy={model} --reward_model={world}/scorer {questions} --valid={world}/questions.jsonl "
               "--iterations=5 --rollout_size=5 --minibatches=2 --epochs=2 --max_new_tokens=8 --micro_tokens=96 "
               "--eval_every=3",
        "generate": f"--model={model} {questions} --limit=7 --samples=3 --temperatures=0.7,1.0 --max_new_tokens=12 "
                    "--batch_size=2",
        "eval": f"n={model} {questions} --reward_model={world}/scorer --samples=3 --max_new_tokens=12 --batch_size=5",
    }


def forked(n, folder, work):
    """Call work() in n ranks, children of this process, which has imported everything; what they print."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children, log = [], folder / "log"
    for rank in range(n):
        if child := os.fork():
            children.append(child)
            continue
        signal.alarm(300)  # nobody waits for ever
        code = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1), os.dup2(handle, 2)
            sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = os.fdopen(handle, "w")
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    text = log.read_text()
    log.unlink()
    assert codes == [0] * n, text
    return without_times(text)


def forked_script(n, script, flags, out):
    module = importlib.import_module(script)
    return forked(n, out.parent, lambda: runtime.launch(
        module.main, module.Config, [*flags.split(), f"--out={out}"], every_rank=True))


def without_times(output):
    """But for the progress every ten seconds, and an estimate for one process."""
    return re.sub(r"(?m)^(.* left \d+:\d\d|needs about .*)\n", "", output)


def start(n, script, flags, out, driver=()):
    """A script on n ranks, or, for 1, as it is run without any; the process."""
    driver = driver and [str(out.parent / "driver.py"), script, *map(str, driver)]
    if driver:
        Path(driver[0]).write_text(DRIVER.format(root=str(ROOT)))
    command = [str(ROOT / "runtime/ranks.py"), str(n)] if n > 1 else []
    command += driver or [str(ROOT / f"{script}.py")]
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen([sys.executable, *command, *flags.split(), f"--out={out}"], text=True,
                            env=env | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(n, script, flags, out, driver=(), code=0):
    """What a script prints, and its errors; it must end with an exit code."""
    process = start(n, script, flags, out, driver)
    output, error = process.communicate(timeout=300)
    assert process.returncode == code, output + error
    return without_times(output), error


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def numbers(value):
    """All numbers of a nest of dicts and lists."""
    if isinstance(value, (dict, list)):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in numbers(item)]
    return [value]


def assert_same_training(out, one):
    """Every loss within 1e-5, every weight within 1e-4, and both did learn."""
    assert [row["step"] for row in rows(out)] == [row["step"] for row in rows(one)] == [0, 1, 2, 3, 4]
    for row, expected in zip(rows(out), rows(one)):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            close = 1e-5 if "loss" in name else 1e-4 * max(1, abs(value))
            assert row[name] == pytest.approx(value, abs=close), (row["step"], name)
    assert len({row.get("loss", row.get("loss/value_avg")) for row in rows(one)}) == 5
    weights, expected = load_file(out / "model.safetensors"), load_file(one / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-4)
    done, other = (json.loads((folder / "done.json").read_text()) for folder in (out, one))
    assert done["settings"] == other["settings"]
    assert [done["tokens"], done["flops"]] == [other["tokens"], other["flops"]]
    assert numbers(done["results"]) == pytest.approx(numbers(other["results"]), abs=1e-4)
    assert {path.name for path in out.iterdir()} == {path.name for path in one.iterdir()}


@pytest.fixture(scope="module")
def alone(world, model_folder, tmp_path_factory):  # noqa: F811
    """alone(script): its folder and what it prints in this process, without ranks; run once."""
    made = {}

    def get(script):
        if script not in made:
            out, output = tmp_path_factory.mktemp("alone") / script, io.StringIO()
            module, flags = importlib.import_module(script), commands(world, model_folder)[script].split()
            with contextlib.redirect_stdout(output):
                runtime.launch(module.main, module.Config, [*flags, f"--out={out}"], every_rank=True)
            made[script] = out, without_times(output.getvalue())
        return made[script]

    return get


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", ["sft", "reward", "ppo"])
def test_ranks_train_as_one_and_only_one_prints(world, model_folder, alone, tmp_path, script, n):  # noqa: F811
    out, (one, printed) = tmp_path / script, alone(script)
    flags = commands(world, model_folder)[script]
    assert forked_script(n, script, flags, out).count("\n") == printed.count("\n")
    assert_same_training(out, one)
    assert json.loads((out / "done.json").read_text())["ranks"] == n
    if script == "ppo":
        assert (out / "samples.txt").read_text() == (one / "samples.txt").read_text()
    if script == "sft":
        assert "done already" in forked_script(n, script, flags, out)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft", "reward", "ppo"])
def test_two_and_three_ranks_train_adapters_as_one(world, model_folder, tmp_path, script):  # noqa: F811
    module, flags = importlib.import_module(script), f"{commands(world, model_folder)[script]} --lora=4"
    runtime.launch(module.main, module.Config, [*flags.split(), f"--out={tmp_path}/one"], every_rank=True)
    for n in (2, 3):
        forked_script(n, script, flags, tmp_path / str(n))
        assert_same_training(tmp_path / str(n), tmp_path / "one")


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", ["generate", "eval"])
def test_ranks_answer_as_one(world, model_folder, alone, tmp_path, script, n):  # noqa: F811
    """The same texts in the same order, whoever sampled them; the same scores."""
    out, (one, printed) = tmp_path / script, alone(script)
    assert forked_script(n, script, commands(world, model_folder)[script], out) == printed
    for path in sorted(one.rglob("*.jsonl")):
        found, expected = list(read_jsonl(out / path.relative_to(one))), list(read_jsonl(path))
        assert len(found) == len(expected) > 40
        for row, other in zip(found, expected):
            near = other.keys() & {"logprob", "score", "scores"}
            assert row == other | {name: pytest.approx(other[name], abs=2e-4) for name in near}


def test_two_ranks_of_torchrun_train_as_one(world, model_folder, alone, tmp_path):  # noqa: F811
    out, (one, printed), flags = tmp_path / "sft", alone("sft"), commands(world, model_folder)["sft"]
    assert run(2, "sft", flags, out) == (printed, "") and printed.count("\n") >= 2
    assert_same_training(out, one)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_a_rank_that_is_killed_ends_all_and_any_number_goes_on(world, model_folder, alone, tmp_path, script):  # noqa: F811
    """Rank 1 of 2 is killed in its fourth step; 1 and 3 ranks go on after the third."""
    out, flags = tmp_path / "killed", commands(world, model_folder)[script]
    output, error = run(2, script, flags, out, ("kill", 1, 3), code=128 + signal.SIGKILL)
    assert error.count("error: rank 1 was ended by SIGKILL") == 1 and "goes on" not in output
    for n in (1, 3):
        shutil.copytree(out, tmp_path / str(n) / script)
        assert forked_script(n, script, flags, tmp_path / str(n) / script).count("goes on after step 3") == 1
        assert_same_training(tmp_path / str(n) / script, alone(script)[0])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_or_all_meet_ends_all_and_is_told_once(world, model_folder, tmp_path, rank):  # noqa: F811
    flags = commands(world, model_folder)["sft"]
    _, error = run(2, "sft", flags, tmp_path / "out", ("raise", rank, 2), code=1)
    assert error.count("Traceback") == 1 and error.endswith("RuntimeError: a broken rank\n")
    assert run(2, "sft", flags, tmp_path / "out", ("refuse", rank, 2), code=2)[1] == "error: a full disk\n"
    _, error = run(2, "sft", flags.replace("sft.jsonl", "none.jsonl"), tmp_path / "out", code=2)
    assert error == f"error: --data {world}/none.jsonl: there is no such file or folder\n"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_all_after_the_same_step_with_the_state_saved(
        world, model_folder, alone, tmp_path, number, code):  # noqa: F811
    flags = commands(world, model_folder)["sft"]
    process = start(2, "sft", flags, tmp_path / "out", ("wait", 0, 2))
    while process.stdout.readline() not in ("waiting\n", ""):
        pass
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert error.count("stopping after this step") == 1 and error.count("this goes on from there") == 1
    assert "Traceback" not in error
    assert "goes on after step 3" in forked_script(2, "sft", flags, tmp_path / "out")
    assert_same_training(tmp_path / "out", alone("sft")[0])


# ---- ranks forked from this process --------------------------------------------------------------------------------


def test_collectives_by_hand(tmp_path):
    def work():
        ranks.join()
        x = torch.tensor([1.0, -2.0]) * (ranks.RANK + 1)
        assert ranks.SIZE == 3 and ranks.all_reduce(x).tolist() == [6, -12]
        assert ranks.all_reduce(x, largest=True).tolist() == [3, -2] and x[0] == ranks.RANK + 1
        assert ranks.gather({"rank": ranks.RANK}) == [{"rank": rank} for rank in range(3)]
        assert ranks.broadcast(f"of {ranks.RANK}") == "of 0"

    assert forked(3, tmp_path, work) == ""


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_rank_holds_more_than_its_share(model_folder, world, tmp_path, n):  # noqa: F811
    """Of weights and of Adam's moments, before and after a pass; gradients and the full copy are those of one."""

    def sizes(model):
        return [getattr(parameter, "_local_tensor", parameter).numel() for parameter in model.parameters()]

    def work():
        ranks.join()
        one, model = load_model(model_folder, torch.float32), ranks.shard(load_model(model_folder, torch.float32))
        adam, before = torch.optim.AdamW(model.parameters()), sizes(model)
        tokens, mask = torch.arange(12).view(2, 6), torch.ones(2, 5, dtype=torch.bool)
        for network in (one, model):
            (-masked_logprobs(network, tokens, mask)[0].sum()).backward()
        for whole, part in zip(one.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ranks.full_tensor(part.grad), whole.grad)
            assert ranks.full_tensor(ranks.shard_like(whole.detach(), part)).equal(whole)
        adam.step()
        moments = [state[name] for state in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
        copy = ranks.full_model(model)
        assert sizes(model) == before and type(copy) is type(one)
        assert copy.lm_head.weight is copy.model.embed_tokens.weight
        assert all(ranks.full_tensor(p).equal(q) for p, q in zip(model.parameters(), copy.parameters(), strict=True))
        assert not next(copy.parameters()).equal(next(one.parameters()))
        total, shares = sum(sizes(one)), ranks.gather(sum(before))
        assert sum(shares) == total and max(shares) < 1.1 * total / n  # rows that do not divide are few
        assert sum(moment.to_local().numel() for moment in moments) == 2 * sum(before)
        scorer = load_scalar_model(world / "scorer", torch.float32)
        scorer.score_mean = 0.25
        expected = scorer(tokens)
        assert ranks.full_model(ranks.shard(scorer))(tokens).equal(expected)

    assert forked(n, tmp_path, work) == ""


# ---- one process, as if it were one of several ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rows_are_dealt_once_and_all_ranks_make_as_many_passes(monkeypatch, size):
    lengths = [9, 2, 7, 7, 3, 30, 5, 1, 4, 4, 8]
    for rows in (range(11), range(3), [6], []):
        hands = []
        for rank in range(size):
            monkeypatch.setattr(ranks, "RANK", rank)
            monkeypatch.setattr(ranks, "SIZE", size)
            hands.append(list(steps.shares(rows, lengths, 14)))
        assert len({len(hand) for hand in hands}) == 1
        real = [row for hand in hands for micro, counts in hand if counts for row in micro]
        assert sorted(real) == list(rows)
        for hand in hands:
            own = {row for micro, counts in hand if counts for row in micro}
            for micro, counts in hand:
                assert len(micro) * lengths[micro[0]] <= 14 or len(micro) == 1
                assert lengths[micro[0]] == max(lengths[row] for row in micro)
                assert counts or (len(micro) == 1 and micro[0] in rows and not own & set(micro))
    assert [micro for micro, _ in steps.shares(range(11), lengths, 14)] == list(
        steps.micro_batches(range(11), lengths, 14)) or size > 1


def test_one_of_several_ends_at_once_with_its_code(monkeypatch):
    """For gloo's threads may abort a process that ends as usual. A process alone ends as usual."""
    Config = dataclasses.make_dataclass("Config", [("file", str, "")])

    def main(cfg):
        open(cfg.file or os.devnull).close()

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for size, codes in ((1, []), (2, [0, 2])):
        monkeypatch.setattr(ranks, "SIZE", size)
        runtime.launch(main, Config, [])
        with pytest.raises(SystemExit) as end:  # os._exit would not have come back
            runtime.launch(main, Config, ["--file=nowhere"])
        assert (ended, end.value.code) == (codes, 2)
