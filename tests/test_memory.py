"""memory.py: its bytes against what PyTorch really holds; what scripts say before they load; out of memory."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    LLAMA_SPECIAL,  # noqa: F401  the fixtures of a tiny model
)

import decode
import eval as evaluation
import generate
import ppo
import reward
import runtime
import sft
from data import write_jsonl
from model import KVCache, Llama, ModelConfig, ScalarModel
from runtime import checkpoint, memory

ROOT = Path(memory.__file__).resolve().parent.parent
SMALL = ModelConfig(100, 48, 80, 3, 6, 2, 10, tie_word_embeddings=True)


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": False}, {"attention_bias": True}, {"attention_bias": True, "model_type": "qwen2"},
    {"mlp_bias": True}, {"num_hidden_layers": 7, "vocab_size": 31}, {"head_dim": 8, "num_key_value_heads": 6},
])
def test_parameters_are_counted(changes):
    config = replace(SMALL, **changes)
    for scalar, kind in ((False, Llama), (True, ScalarModel)):
        with torch.device("meta"):
            model = kind(config)
        assert memory.parameters(config, scalar) == sum(weight.numel() for weight in model.parameters())


def kept_by_a_block(config, bf16, gradient_checkpointing):
    """Bytes that autograd keeps for one more block, a token: all storages that it packs, but for the weights."""
    def bytes_kept(layers):
        model, storages = Llama(replace(config, num_hidden_layers=layers)), {}
        model.model.gradient_checkpointing = gradient_checkpointing
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            shapes = {weight.shape for weight in model.parameters()} | {weight.T.shape for weight in model.parameters()
                                                                        if weight.dim() == 2}
            if storage.data_ptr() not in weights and not (tensor.dtype == torch.bfloat16 and tensor.shape in shapes):
                storages[storage.data_ptr()] = storage.nbytes(), tensor  # which keeps the address taken
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            model.model(torch.zeros(5, 13, dtype=torch.long))
        return sum(size for size, _ in storages.values())

    return (bytes_kept(3) - bytes_kept(2)) / (5 * 13)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6}, {"intermediate_size": 33, "head_dim": 6}])
def test_what_a_block_keeps_is_what_autograd_keeps(bf16, changes):
    """Counted in autograd's saved tensors; and with checkpointing the input of a block alone, in fp32."""
    config = replace(SMALL, **changes)
    assert kept_by_a_block(config, bf16, False) == memory.kept(config, bf16)
    assert kept_by_a_block(config, bf16, True) == 4 * config.hidden_size


def test_the_cache_is_as_large_as_it_is_said_to_be():
    cache = KVCache(SMALL, 7, 12 + 9, torch.bfloat16, torch.device("cpu"))
    assert memory.sampling(SMALL, 7, 7, 12, 9, True, 2)["cache"] == cache.keys.nbytes + cache.values.nbytes
    assert {False: decode.READ_AT_ONCE["cpu"], True: decode.READ_AT_ONCE["cuda"]} == memory.READ_AT_ONCE
    assert memory.LOGITS_AT_ONCE == __import__("model").LOGITS_AT_ONCE


def test_a_step_by_hand():
    """Llama-3.2-1B: 1,235,814,400 parameters; 16 bytes of state each, and what 1024 tokens keep in 16 blocks."""
    config = ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True)
    N = 1_235_814_400
    parts = memory.training(config, 1024, False, False)
    assert [parts[name] for name in ("weights", "gradients", "moments")] == [4 * N, 4 * N, 8 * N]
    of_block = 1024 * 4 * (6 * 2048 + 2 * 2048 + 2 * 512 + 4 * 8192 + 32 + 2)
    assert parts["activations"] == 16 * of_block + 1024 * 4 * (3 * 8192 + 2 * 2048)
    assert parts["logits"] == 8 * 2**24 + 2 * 4 * 128256 * 2048  # two chunks, and the head's gradient with a part of it
    assert parts["holes"] == 0.6 * 16 * of_block
    less = memory.training(config, 1024, True, False)
    assert parts["activations"] - less["activations"] == 15 * of_block - 1024 * 16 * 4 * 2048
    assert memory.training(config, 1024, False, True)["weights"] == 4 * N + 2 * (N - 128256 * 2048)
    assert memory.training(config, 1024, False, False, scalar=True)["logits"] == 0


def test_offload_leaves_the_network_at_work_alone_on_a_gpu():
    config = replace(SMALL, tie_word_embeddings=False)
    arguments = (config, config, config, config, 2, 5, 6, 30, False)
    N, C = memory.parameters(config), memory.parameters(config, scalar=True)
    alone = memory.training(config, 30, False, True)
    assert memory.ppo(*arguments, True, True) == alone
    together = memory.ppo(*arguments, False, True)
    assert together["weights"] == alone["weights"] + 4 * C and together["moments"] == 8 * (N + C)
    assert together["frozen"] == 4 * (N + C)
    assert memory.ppo(*arguments, True, False)["moments"] == 8 * (N + C)  # a CPU has no other place
    many = memory.ppo(*arguments[:4], 10**4, *arguments[5:], True, True)  # then sampling takes the most
    assert many["cache"] == 2 * 3 * 10**4 * 11 * 20 * 4 and many["weights"] == 4 * N


def test_a_pass_has_at_most_so_many_tokens_or_one_text():
    assert [memory.pass_size(100, 8, micro) for micro in (300, 50, 4096)] == [300, 100, 800]


def test_the_sentence_has_the_parts_and_their_sum():
    parts = memory.with_process({"weights": 0.54e9, "cache": 1e9, "logits": 1e6}, False)
    assert memory.sentence(parts, "memory", 23.14e9) == (
        "needs about 1.8 GB of memory: weights 0.54, cache 1.00, process 0.27; 23.1 GB are free")


# ---- the scripts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("memory")
    write_jsonl(folder / "questions.jsonl", [
        {"id": f"q{i}", "question": f"Ava has {i} pens?", "answer": str(i)} for i in range(8)])
    write_jsonl(folder / "sft.jsonl", [{"prompt": f"{i}?", "response": "abc " * (i % 3 + 1)} for i in range(16)])
    write_jsonl(folder / "pairs.jsonl", [
        {"id": f"q{i % 8}", "prompt": f"{i}?", "chosen": f"#### {i}", "rejected": "no"} for i in range(16)])
    write_jsonl(folder / "samples.jsonl", [
        {"id": f"q{i}", "response": f"#### {i}", "finish": "stop"} for i in range(8)])
    write_jsonl(folder / "votes.jsonl", [{"id": f"q{i}", "vote": "1"} for i in range(8)])
    questions = f"--questions={folder}/questions.jsonl"
    return {
        sft: f"--model={model_folder} --data={folder}/sft.jsonl --epochs=3 --batch_size=4 --micro_tokens=1024",
        reward: f"--model={model_folder} --pairs={folder}/pairs.jsonl --calibrate={folder}/samples.jsonl {questions}",
        ppo: f"--policy={model_folder} --votes={folder}/votes.jsonl {questions} --iterations=2 --rollout_size=4 "
             "--max_new_tokens=4 --minibatches=2",
        generate: f"--model={model_folder} {questions} --max_new_tokens=4 --samples=2",
        evaluation: f"--model={model_folder} {questions} --max_new_tokens=4",
    }


@pytest.mark.parametrize("script", [sft, reward, ppo, generate, evaluation], ids=lambda script: script.__name__)
def test_a_script_says_what_it_needs_before_it_loads_a_weight(script, world, tmp_path, monkeypatch, capsys):
    def load(*args, **more):
        raise KeyError("loading")

    for name in ("load_model", "load_scalar_model"):
        if hasattr(script, name):
            monkeypatch.setattr(script, name, load)
    with pytest.raises(KeyError, match="loading"):
        script.main(runtime.cli(script.Config, [*world[script].split(), f"--out={tmp_path}/out"]))
    assert re.search(r"^needs about 0\.\d GB of memory: .*process 0\.27; [\d.]+ GB are free$", capsys.readouterr().out,
                     re.MULTILINE)


def test_the_bytes_are_those_of_the_flags(world, tmp_path, monkeypatch):
    """What the scripts ask memory.py: tokens and passes of a step, rows, prompts and answers."""
    asked = []
    for name in ("training", "sampling", "ppo"):
        monkeypatch.setattr(memory, name, lambda *args, **more: asked.append(args) or {"weights": 1.0})
    for script, changes in ((sft, "--micro_tokens=100 --gradient_checkpointing"), (generate, "--batch_size=6"),
                            (ppo, "--micro_tokens=40 --batch_size=3 --offload")):
        flags = [*world[script].split(), *changes.split(), f"--out={tmp_path}/{script.__name__}"]
        script.main(runtime.cli(script.Config, flags))
    (_, *training), (_, *sampled), (*_, judge, rows, prompt, new, tokens, checkpointing, offload, cuda) = asked
    assert training == [100, True, False]
    assert sampled[:2] == [6, 3] and sampled[3:] == [4, False, 4]
    assert judge is None and (rows, prompt, new) == (3, sampled[2], 4)  # questions as they were for generate.py
    assert tokens == max(40, prompt + 4) and (checkpointing, offload, cuda) == (False, True, False)


# ---- out of memory -------------------------------------------------------------------------------------------------


def launch(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.launch(script.main, script.Config, flags)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
])
def test_out_of_memory_names_one_flag_and_goes_on_from_what_is_saved(
        error, world, tmp_path, monkeypatch, capsys):
    """After two steps of SFT; with that flag it goes on after them, and ends as a run does that was not stopped."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0)
    real, calls = sft.masked_logprobs, []

    def fail(*args, **more):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return real(*args, **more)

    flags = [*world[sft].split(), f"--out={tmp_path}/out"]
    monkeypatch.setattr(sft, "masked_logprobs", fail)
    code, text = launch(sft, flags, capsys)
    assert code == 2 and len(text.strip().splitlines()) == 1 and "Traceback" not in text
    assert "error: out of memory" in text and "is kept" in text and text.strip().endswith("--micro_tokens 512")
    monkeypatch.setattr(sft, "masked_logprobs", real)
    runtime.launch(sft.main, sft.Config, [*flags, "--micro_tokens=512"])
    assert "goes on after step 2" in capsys.readouterr().out and not list(tmp_path.glob("*.old*"))
    runtime.launch(sft.main, sft.Config, [*world[sft].split(), f"--out={tmp_path}/whole"])
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    capsys.readouterr()
    sft.main(sft.Config(**vars(runtime.cli(sft.Config, flags))))  # and a finished stage is not done again for a flag
    assert "skipped" in capsys.readouterr().out


def raised_in(*names):
    """An error with these functions in its traceback."""
    def call(rest):
        if not rest:
            raise MemoryError
        exec(f"def {rest[0]}(): call(rest[1:])\n{rest[0]}()", {"call": call, "rest": rest})

    with pytest.raises(MemoryError) as caught:
        call(list(names))
    return caught.value


@pytest.mark.parametrize(("changes", "where", "flag"), [
    ({}, ["update"], "--micro_tokens 2048"), ({"micro_tokens": 1023}, ["update"], "--gradient_checkpointing"),
    ({"micro_tokens": 256, "gradient_checkpointing": True}, ["update"], "--offload"),
    ({"micro_tokens": 256, "gradient_checkpointing": True, "offload": True}, ["update"], ""),
    ({}, ["rollout", "generate"], "--batch_size 128"), ({"batch_size": 1}, ["generate"], "--micro_tokens 2048"),
    ({}, ["load_model"], "--offload"), ({}, ["step"], "--offload"), ({"offload": True}, ["step"], ""),
])
def test_the_flag_is_the_one_of_the_place(changes, where, flag, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.smaller(replace(ppo.Config("p", "q", "o"), **changes), raised_in(*where)) == flag


def test_on_a_cpu_nothing_is_offloaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.smaller(ppo.Config("p", "q", "o"), raised_in("step")) == ""


def test_a_shell_scripts_command_has_the_flag_in_capitals(monkeypatch, capsys):
    """Behind what was asked already, which it replaces."""
    monkeypatch.setenv("CONTINUE", "SEED=1 MICRO_TOKENS=2048 bash train_all.sh")

    def main(cfg):
        raise MemoryError

    code, text = launch(type("script", (), {"main": main, "Config": ppo.Config}),
                        ["--policy=p", "--questions=q", "--out=o", "--micro_tokens=2048"], capsys)
    assert code == 2 and text.endswith("SEED=1 MICRO_TOKENS=2048 MICRO_TOKENS=1024 bash train_all.sh\n")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space as Linux has them")
def test_out_of_memory_for_real(world, tmp_path):
    """SFT with room for its libraries and little more: one sentence, code 2."""
    code = ("import resource, sys, sft, runtime, torch; torch.set_num_threads(1)\n"
            "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + 10**7,) * 2)\n"
            "sys.argv[0] = 'sft.py'; runtime.launch(sft.main, sft.Config)")
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a?", "response": "b" * 200} for _ in range(64)])
    flags = world[sft].split() + [f"--data={tmp_path}/long.jsonl", "--batch_size=64", "--micro_tokens=8192"]
    done = subprocess.run([sys.executable, "-c", code, *flags, f"--out={tmp_path}/out"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^error: out of memory; what is finished or saved is kept.* --micro_tokens 4096$", done.stderr,
                     re.MULTILINE)


# ---- docs/scale.md -------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def test_the_computed_tables_of_the_page_are_computed(bench):
    import scale

    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for table in (scale.one_gpu, scale.several, scale.teacher):
        assert "\n".join(table()) in page, f"docs/scale.md: python bench/scale.py prints another {table.__name__}"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft 512", "ppo 512"])
def test_estimates_are_within_a_tenth_of_the_peak(bench, tmp_path, case):
    """SmolLM2-135M's shape: 4 and 8 GB, minutes."""
    import peaks
    import sides

    sides.files(sides.Job("sft", "smollm2", str(tmp_path)))
    estimate, peak, _ = peaks.measure(tmp_path, case, sides.SHAPES["smollm2"].model.vocab_size)
    assert abs(estimate / peak - 1) < 0.1
