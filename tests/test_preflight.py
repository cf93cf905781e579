"""preflight.py: what a run will take, and what cannot succeed, before anything is loaded or written."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lora
from generate import KVCache
from model import Llama, ModelConfig, ScalarModel
from runtime import preflight

SMALL = ModelConfig(100, 48, 80, 3, 6, 2, 10, tie_word_embeddings=True)
SIZES = {"model_type": "llama", "vocab_size": 50000, "hidden_size": 1024, "intermediate_size": 4096,
         "num_hidden_layers": 10, "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}
PARAMETERS = 50000 * 1024 + 10 * (2 * 1024 * (1024 + 256) + 3 * 1024 * 4096 + 2 * 1024) + 1024  # 203 million


def model_at(folder, **sizes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES | sizes))
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A student of 203 million parameters, a recorded teacher, no GPU, room enough."""
    (tmp_path / "teacher.jsonl").write_text("{}\n")
    monkeypatch.setattr(preflight, "_gpus", list)
    monkeypatch.setattr(preflight, "_available_memory", lambda: 100e9)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=1e12))
    return preflight.Config(run=str(tmp_path / "runs" / "new"), preset="tiny", seed=3, needs="a laptop and 7 min",
                            student=model_at(tmp_path / "student"), teacher=str(tmp_path / "teacher.jsonl"),
                            questions="arith", max_new_tokens=320, batch_size=1)


def test_it_says_what_the_run_will_take_and_writes_nothing(plan, capsys, monkeypatch):
    preflight.main(replace(plan, changed="train=50"))
    captured = capsys.readouterr()
    for part in ("preset tiny", "seed 3", "torch", "a laptop and 7 min", "train=50", "of 100.0 GB"):
        assert part in captured.out
    assert captured.err == "" and not Path(plan.run).exists()
    monkeypatch.setattr(preflight, "_available_memory", lambda: 0.1e9)
    preflight.main(plan)
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "value", "message"), [
    ("teacher", "nowhere", "TEACHER=nowhere: there is no such file or folder"),
    ("student", "nowhere", "STUDENT=nowhere: there is no such folder"),
    ("questions", "nowhere", "QUESTIONS=nowhere"),
    ("teacher_test", "nowhere.jsonl", "TEACHER_TEST=nowhere.jsonl"),
    ("nproc", 0, "--nproc 0"),
])
def test_it_refuses_what_cannot_succeed(plan, field, value, message):
    with pytest.raises(ValueError, match=message):
        preflight.main(replace(plan, **{field: value}))


def test_an_adapter_is_called_one(plan):
    (Path(plan.student) / "adapter_config.json").write_text("{}")
    (Path(plan.student) / "config.json").unlink()
    with pytest.raises(ValueError, match="an adapter: merge it"):
        preflight.main(plan)


def test_there_are_no_more_ranks_than_gpus(plan, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    preflight.main(replace(plan, nproc=3))
    with pytest.raises(ValueError, match=r"NPROC=4: .* there are 3"):
        preflight.main(replace(plan, nproc=4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # then they share the processor
    preflight.main(replace(plan, nproc=4))


def test_disk_for_weights_and_states(plan, capsys, monkeypatch):
    """At the second PPO: four stages' weights, its checkpoint twice, and two states of six times the weights each."""
    disk = (4 + 2 + 12) * 4 * PARAMETERS + 50e6
    free = [disk + 1]
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free[0]))
    preflight.main(plan)
    assert f"up to {disk / 1e9:.1f} of " in capsys.readouterr().out
    free[0] -= 2
    with pytest.raises(ValueError, match="GB are needed there"):
        preflight.main(plan)
    preflight.main(replace(plan, lora=8))  # whose states are adapters
    free[0] += 2 + 2 * 4 * PARAMETERS  # a second round's reward model and policy
    preflight.main(replace(plan, rounds=2))
    with pytest.raises(ValueError, match="GB are needed there"):
        preflight.main(replace(plan, rounds=3))


# ---- memory --------------------------------------------------------------------------------------------------------


def parts_of(said):
    """The parts of the line that was printed, and their sum, in GB."""
    [(total, parts)] = re.findall(r"needs about (\S+) of .*? \((.*)\)", said)
    return {name: float(size) for name, size in re.findall(r"(\w+) ([\d.]+)", parts)}, float(total)


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": False}, {"attention_bias": True}, {"attention_bias": True, "model_type": "qwen2"},
    {"mlp_bias": True, "head_dim": 8, "num_hidden_layers": 7, "vocab_size": 31},
])
def test_parameters_are_counted(changes):
    config = replace(SMALL, **changes)
    for scalar, kind in ((False, Llama), (True, ScalarModel)):
        with torch.device("meta"):
            model = kind(config)
        assert preflight.parameters(asdict(config), scalar) == sum(weight.numel() for weight in model.parameters())


def test_a_step_by_hand():
    """Llama-3.2-1B: 1,235,814,400 parameters; 16 bytes of state each, and what 1024 tokens keep in 16 blocks."""
    config = asdict(ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True))
    N, of_block = 1_235_814_400, 1024 * 4 * (6 * 2048 + 2 * 2048 + 2 * 512 + 4 * 8192)
    parts = preflight.training(config, 1024, False, False)
    assert [parts[name] for name in ("weights", "gradients", "moments")] == [4 * N, 4 * N, 8 * N]
    assert parts["activations"] == pytest.approx(1.6 * 16 * of_block + 1024 * 4 * (3 * 8192 + 2 * 2048))
    less = preflight.training(config, 1024, True, False)
    assert parts["activations"] - less["activations"] == pytest.approx(15 * of_block - 1024 * 16 * 4 * 2048)
    assert preflight.training(config, 1024, False, True)["weights"] == 4 * N + 2 * (N - 128256 * 2048)
    assert preflight.training(config, 1024, False, False, scalar=True)["logits"] == 0 < parts["logits"]


def test_the_precision_that_is_set_counts(monkeypatch):
    """On a CPU in bf16 as on a GPU, but for what glibc keeps; on a GPU in fp32 as on a CPU without that."""
    config, of_block = asdict(SMALL), 100 * (6 * 48 + 2 * 60 + 2 * 20 + 4 * 80)
    sizes = {}
    for precision in ("fp32", "bf16"):
        monkeypatch.setenv("PRECISION", precision)
        sizes[precision] = [preflight.training(config, 100, False, cuda) for cuda in (False, True)]
    for (cpu, gpu), width in zip(sizes.values(), (4, 2.6)):
        assert cpu["weights"] == gpu["weights"]
        assert cpu["activations"] - gpu["activations"] == pytest.approx(0.6 * 3 * width * of_block)
    (full, _), (half, _) = sizes.values()
    assert half["weights"] - full["weights"] == 2 * (preflight.parameters(config) - 100 * 48)
    assert full["activations"] - half["activations"] == pytest.approx(1.6 * 3 * 1.4 * of_block)


def test_the_cache_is_as_large_as_it_is_said_to_be():
    cache = KVCache(SMALL, 7, preflight.PROMPT + 64, torch.bfloat16, torch.device("cpu"))
    said = preflight.sampling(asdict(SMALL), 7, 64, True, 2)["cache"]
    assert said == sum(layer.nbytes for layer in [*cache.keys, *cache.values])


def test_ppo_holds_four_networks_or_with_adapters_two_frozen_ones(plan, monkeypatch):
    """All weights: policy and critic with moments, and their copies, in fp32. Adapters: two, of 2 bytes in bf16."""
    config, cfg = asdict(replace(SMALL, tie_word_embeddings=False)), replace(plan, micro_tokens=1000)
    N, C = preflight.parameters(config), preflight.parameters(config, scalar=True)
    alone = preflight.training(config, 1000, False, True)
    sample, policy, critic = preflight.ppo_moments(cfg, config, True)
    assert policy["weights"] == alone["weights"] + 4 * C and sample["weights"] == 4 * (N + C)
    assert policy["gradients"] == 4 * N and critic["gradients"] == 4 * C
    assert {sample["moments"], policy["moments"], critic["moments"]} == {8 * (N + C)}
    assert sample["frozen"] == policy["frozen"] == critic["frozen"] == 4 * (N + C)
    with torch.device("meta"):
        A = sum(p.numel() for p in lora.adapt(Llama(SMALL), 3).parameters() if p.requires_grad)
    for cuda, width in ((False, 4), (True, 2)):
        sample, policy, critic = preflight.ppo_moments(replace(cfg, lora=3), config, cuda)
        for parts in (sample, policy, critic):
            assert parts["weights"] == width * (N + C) + 8 * A and parts["moments"] == 16 * A
            assert "frozen" not in parts and parts.get("gradients", 4 * A) == 4 * A
        assert sample["cache"] == 2 * 3 * (preflight.PROMPT + 320) * 20 * width
        full = preflight.training(config, 1000, False, cuda)
        assert full["logits"] - policy["logits"] == 8 * 100 * 48  # a frozen head has no gradient


def test_the_largest_moment_is_said_with_its_parts(plan, capsys):
    """More tokens of a pass, or many more answers at once, take more; checkpointing takes less."""
    totals = []
    for changes in ({}, {"micro_tokens": 100}, {"micro_tokens": 8000}, {"micro_tokens": 8000, "batch_size": 6000},
                    {"micro_tokens": 8000, "gradient_checkpointing": True}):
        preflight.main(replace(plan, **{"micro_tokens": 576} | changes))
        parts, total = parts_of(capsys.readouterr().out)
        assert total == pytest.approx(sum(parts.values()), abs=0.1) and parts["process"] == 0.27
        totals.append(total)
    usual, short, long, many, checkpointed = totals
    assert short == usual < checkpointed < long < many  # a text of 256 + 320 tokens is read alone
    assert usual > 40 * PARAMETERS / 1e9  # policy and critic with moments, two frozen models, gradients of one


def test_bf16_on_a_cpu_keeps_something_of_every_shape(plan, tmp_path, capsys, monkeypatch):
    """16 bytes of a parameter, but at most 2 GB."""
    small = model_at(tmp_path / "small", num_hidden_layers=1)
    kept = []
    for student in (small, plan.student):
        for precision in ("fp32", "bf16"):
            monkeypatch.setenv("PRECISION", precision)
            preflight.main(replace(plan, student=student))
            kept.append(parts_of(capsys.readouterr().out)[0]["process"])
    of_small = 16 * (PARAMETERS - 9 * (2 * 1024 * (1024 + 256) + 3 * 1024 * 4096 + 2 * 1024)) / 1e9
    assert kept == pytest.approx([0.27, 0.27 + of_small, 0.27, 2.27], abs=0.006)


def test_a_teacher_that_is_larger_counts(plan, tmp_path, capsys):
    """At rest, in fp32 on a CPU."""
    preflight.main(replace(plan, teacher=model_at(tmp_path / "teacher", num_hidden_layers=250)))
    weights = 4 * (PARAMETERS + 240 * (2 * 1024 * (1024 + 256) + 3 * 1024 * 4096 + 2 * 1024)) / 1e9
    assert parts_of(capsys.readouterr().out)[0]["weights"] == pytest.approx(weights, abs=0.01)
