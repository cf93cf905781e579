"""bench/speed.py: what it writes, that both sides are given the same work, and the limit it measures against."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data import load_questions
from generate import generate
from hf.tokenizer import Tokenizer
from model import Llama, load_model
from runtime.files import read_jsonl

BENCH = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bench():
    """The modules bench/sides.py and bench/speed.py."""
    import sides
    import speed

    return SimpleNamespace(sides=sides, speed=speed)


@pytest.fixture(scope="module")
def job(bench, tmp_path_factory):
    """Tiny's files, written once."""
    job = bench.sides.Job("files", "tiny", str(tmp_path_factory.mktemp("tiny")))
    bench.sides.files(job)
    return job


def test_every_side_reads_the_same_tokens(job):
    """As text for ours, as ids for the peers."""
    shape, tokenizer, folder = job.shape, Tokenizer(f"{job.folder}/model"), Path(job.folder)
    prompts, _ = replace(job, row="ppo").texts()
    assert [tokenizer.chat(question.prompt) for question in load_questions(folder / "questions.jsonl")] == prompts
    assert (len(prompts), {len(prompt) for prompt in prompts}) == (shape.ppo[0], {shape.prompt})
    assert len(set(map(tuple, prompts))) == len(prompts)  # an equal prompt could be read once for several rows
    prompts, responses = replace(job, row="sft").texts()
    rows = list(read_jsonl(folder / "sft.jsonl"))
    assert [tokenizer.chat(row["prompt"]) for row in rows] == prompts
    assert [tokenizer.response(row["response"]) for row in rows] == responses
    assert (len(rows), {len(p) + len(r) for p, r in zip(prompts, responses)}) == (shape.sft[0], {shape.sft[1]})


def test_one_draw_in_sixteen_is_the_end_token(bench, job):
    """Cut at 32 tokens, a geometric length has a mean of 16 * (1 - (15/16)^32) = 13.97; 256 rows: give or take 0.7."""
    model, prompts = load_model(f"{job.folder}/model"), replace(job, row="ppo").texts()[0]
    answers = generate(model, prompts, 32, 1.0, [job.shape.model.eos_token_id])
    share = bench.sides.END_SHARE
    expected = (1 - (1 - share) ** 32) / share
    assert sum(len(answer.tokens) for answer in answers) / len(answers) == pytest.approx(expected, abs=2)
    assert len({answer.tokens[0] for answer in answers}) > 50  # the other tokens are random


def limit(bench, job, lengths, flops=math.inf, bytes=math.inf):
    return bench.speed.limit(job, lengths, {"flops": flops, "bytes": bytes})


def test_the_limit_counts_the_flops_that_pytorch_counts(bench, job):
    """PyTorch's counter runs the model on whole squares of attention and all logits; what is not needed comes off."""
    config = job.shape.model
    with torch.device("meta"):
        model = Llama(config)

    def counted(tokens, heads):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
        unseen = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens * (tokens - 1) / 2
        return counter.get_total_flops() - unseen - 2 * config.vocab_size * config.hidden_size * (tokens - heads)

    assert limit(bench, replace(job, row="score"), [56] * 64, flops=1) == 64 * counted(56, 32)
    assert limit(bench, replace(job, row="sft"), [48] * 64, flops=1) == 3 * 64 * counted(48, 24)
    prefill, five_more = counted(24, 1), counted(29, 6) - counted(24, 1)
    assert limit(bench, replace(job, row="generate 1"), [6], flops=1) == prefill + five_more
    assert limit(bench, replace(job, row="generate 3 ragged"), [1, 6, 6], flops=1) == 3 * prefill + 2 * five_more
    iterations = [limit(bench, replace(job, row=row), [6] * 256, flops=1) for row in ("ppo", "ppo lora")]
    reading = counted(30, 6) + counted(30, 0)  # by policy and critic; with the reference and the judge twice
    assert iterations == [256 * (prefill + five_more + passes * reading) for passes in (2 + 3, 2 + 2)]


def test_the_limit_counts_bytes(bench, job):
    """Decoding reads all weights at every step and what is cached; a step of AdamW moves 28 bytes a parameter."""
    config = job.shape.model
    model = load_model(f"{job.folder}/model")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) * 4
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert limit(bench, replace(job, row="generate 2"), [3, 3], bytes=1) == 3 * matrices + cached * 2 * (25 + 26)
    parameters = sum(p.numel() for p in model.parameters())
    assert limit(bench, replace(job, row="sft"), [48] * 64, bytes=1) == 3 * matrices + 28 * parameters
    assert limit(bench, replace(job, row="sft lora"), [48] * 64, bytes=1) == 2 * matrices


def test_sides_that_do_different_work_are_refused(bench, job):
    """Another loss, other counts of tokens or sequences; equal counts, and random ones of about one mean, pass."""

    def agree(row="generate 32", check=2.0, ours=(32, 32), peer=(32, 32)):
        turns = [[{"lengths": list(lengths)}] * 3 for lengths in (ours, peer)]
        bench.speed.agree(replace(job, row=row), [{"check": 2.0}, {"check": check}, {}], turns)

    agree()
    for row in ("generate 32 ragged", "ppo"):
        agree(row, ours=[10, 14], peer=[5, 20])
        with pytest.raises(RuntimeError, match=r"6 of 12\.0 tokens, the peer 6 of 5\.5"):
            agree(row, ours=[10, 14], peer=[5, 6])
    for wrong in ({"check": 2.01}, {"peer": [32, 31]}, {"peer": [32]}):
        with pytest.raises(RuntimeError, match="generate 32: "):
            agree(**wrong)


def speed(*flags):
    command = [sys.executable, str(BENCH / "speed.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(find_spec("transformers") is None, reason="the peer is not installed")
def test_what_a_quick_run_writes(tmp_path):
    """From anywhere, without TRL: both sides did the same, and the ratios are those of the medians beside them."""
    done = speed("--quick", "--shape", "tiny", "--only", "sft,generate", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    [path], [picture] = tmp_path.glob("speed-*.json"), tmp_path.glob("speed-*.png")
    assert picture.read_bytes()[:4] == b"\x89PNG" and path.stem == picture.stem
    rows = json.loads(path.read_text(encoding="utf-8"))["shapes"]["tiny"]
    assert list(rows) == ["sft", "sft lora", "generate 1", "generate 8 ragged"]
    assert "peer" not in rows.pop("sft lora")
    for name, row in rows.items():
        ours, peer = row["ours"], row["peer"]
        assert row["rounds"] == 2
        for ratio, key in (("ratio", "tokens_per_second"), ("cpu_ratio", "tokens_per_cpu_second")):
            assert row[ratio] == pytest.approx(ours[key][0] / peer[key][0], rel=1e-3)
        low, high = row["ratio_quartiles"]
        assert 0 < low <= high
        assert 0 < row["share_of_limit"][0] < 1
        for side in (ours, peer):
            middle, low, high = side["tokens_per_second"]
            assert 0 < low <= middle <= high
            assert side["tokens"] / 2 / side["seconds"][0] == pytest.approx(middle, rel=0.5)
            assert 0 < side["imports_mb"] < side["peak_mb"]
        assert name.endswith("ragged") or ours["tokens"] == peer["tokens"]
        assert name in done.stdout
    assert rows["sft"]["ours"]["tokens"] == 2 * 64 * 48
    assert rows["generate 1"]["ours"]["tokens"] == 2 * 32
    assert 2 * 8 <= rows["generate 8 ragged"]["ours"]["tokens"] < 2 * 8 * 32


def test_a_ppo_iteration_without_a_peer(tmp_path):
    done = speed("--quick", "--shape", "tiny", "--only", "ppo", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("speed-*.json")
    row = json.loads(path.read_text(encoding="utf-8"))["shapes"]["tiny"]["ppo"]
    assert "peer" not in row and "ratio" not in row
    split = {name: seconds for name, (seconds, _, _) in row["ours"]["split"].items()}
    assert 0 < split["generate"] < split["rollout"]
    assert all(split[part] > 0 for part in ("values", "policy", "critic"))
    assert sum(split.values()) - split["generate"] < row["ours"]["seconds"][0]


@pytest.mark.parametrize("flags, said", [
    ({"shape": "huge"}, "--shape huge: choose from tiny"),
    ({"only": "sft,train"}, "--only train: choose from sft"),
    ({"trl_python": "nowhere/python"}, "--trl_python nowhere/python: no such file"),
])
def test_a_wrong_flag_is_named(bench, flags, said):
    with pytest.raises(ValueError, match=said):
        bench.speed.main(bench.speed.Config(**flags))


def test_a_worker_that_dies_tells_why(bench, job):
    worker = bench.speed.Worker("ours", replace(job, row="score", shape_name="huge"), bench.speed.Config())
    with pytest.raises(ValueError, match=r"ours score: its process ended early(.|\n)*KeyError: 'huge'"):
        worker.turn()
