"""preflight.py: what a run will take, and what cannot succeed, before anything is loaded or written."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import memory, preflight


@pytest.fixture
def plan(tmp_path):
    """A student of 1,000 parameters and a recorded teacher."""
    student = tmp_path / "student"
    student.mkdir()
    (student / "config.json").write_text('{"torch_dtype": "float32"}')
    (student / "tokenizer.json").write_text("{}")
    (student / "model.safetensors").write_bytes(bytes(4000))
    (tmp_path / "teacher.jsonl").write_text("{}\n")
    return preflight.Config(run=str(tmp_path / "runs" / "new"), preset="tiny", seed=3, student=str(student),
                          teacher=str(tmp_path / "teacher.jsonl"), questions="arith", needs="a laptop and 7 min",
                          micro_tokens=1)


def test_preflight_says_what_the_run_will_take_and_writes_nothing(plan, capsys, monkeypatch):
    preflight.main(plan)
    captured = capsys.readouterr()
    for part in ("preset tiny", "seed 3", "torch", "a laptop and 7 min", "0.3 GB of memory", "up to 0.1 GB of disk"):
        assert part in captured.out
    assert captured.err == "" and not Path(plan.run).exists()
    monkeypatch.setattr("memory.available_memory", lambda: 0.1e9)
    preflight.main(plan)
    assert "warning: that is more memory than is free" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "value", "message"), [
    ("teacher", "nowhere", "TEACHER=nowhere: there is no such file or folder"),
    ("student", "nowhere", "STUDENT=nowhere: there is no such folder"),
    ("questions", "nowhere", "QUESTIONS=nowhere"),
    ("teacher_test", "nowhere.jsonl", "TEACHER_TEST=nowhere.jsonl: there is no such file"),
])
def test_preflight_refuses_what_cannot_succeed(plan, field, value, message):
    with pytest.raises(ValueError, match=message):
        preflight.main(replace(plan, **{field: value}))


@pytest.mark.parametrize(("visible", "gpus"), [("0,1,2", 3), ("1", 1)])
def test_there_are_no_more_ranks_than_gpus(plan, visible, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    preflight.main(replace(plan, nproc=max(gpus, 1)))
    with pytest.raises(ValueError, match=f"NPROC=4: a GPU for each rank is needed, and there are {gpus}"):
        preflight.main(replace(plan, nproc=4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # then they share the processor
    preflight.main(replace(plan, nproc=4))
    with pytest.raises(ValueError, match="--nproc 0: must be greater than 0"):
        preflight.main(replace(plan, nproc=0))


def test_ranks_need_a_torch_that_shards(plan, monkeypatch):
    monkeypatch.setattr(preflight.importlib.metadata, "version", lambda package: "2.5.1+cpu")
    preflight.main(plan)
    with pytest.raises(ValueError, match=r"NPROC=2: fully_shard came with torch 2.6, this is 2.5.1"):
        preflight.main(replace(plan, nproc=2))


def test_preflight_names_the_file_that_a_model_folder_lacks(plan):
    (Path(plan.student) / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"STUDENT=.* without tokenizer\.json"):
        preflight.main(plan)


@pytest.mark.parametrize(("hub", "words", "others"), [
    ("meta-llama", ["accept the licence on huggingface.co/meta-llama/Llama-3.1-8B", "hf auth login"], []),
    ("Qwen", ["hf download Qwen/Llama-3.1-8B --local-dir models/Llama-3.1-8B`"], ["licence", "login"]),
    ("", ["there is no such file or folder"], ["hf download"]),
])
def test_preflight_tells_how_to_get_a_presets_weights_after_what_it_takes(plan, hub, words, others, capsys):
    with pytest.raises(ValueError, match=r"TEACHER=models/Llama-3\.1-8B") as error:
        preflight.main(replace(plan, teacher="models/Llama-3.1-8B", hub=hub))
    assert all(word in str(error.value) for word in words) and not any(word in str(error.value) for word in others)
    assert "a laptop and 7 min" in capsys.readouterr().out


SIZES = {"vocab_size": 50000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10,
         "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True}
PARAMETERS = 50000 * 1024 + 10 * (2 * 1024 * (1024 + 256) + 3 * 1024 * 4096 + 2 * 1024) + 1024  # 203 million


def test_preflight_counts_the_student_in_ppo_with_the_flags_of_the_run(plan, capsys):
    """Policy and critic with moments, two frozen models, gradients of one; and what a pass of 576 tokens keeps."""
    (Path(plan.student) / "config.json").write_text(json.dumps(SIZES))
    for changes in ({}, {"gradient_checkpointing": True}, {"micro_tokens": 2000}, {"batch_size": 2000}):
        cfg = replace(plan, new_tokens=320, **changes)
        preflight.main(cfg)
        config = memory.read_config(plan.student)
        parts = memory.ppo(*[config] * 4, cfg.batch_size, 256, 320, max(cfg.micro_tokens, 576),
                           cfg.gradient_checkpointing, False, False)
        needed = sum(memory.with_process(parts, False).values()) / 1e9
        assert f"needs about {needed:.1f} GB of memory" in capsys.readouterr().out and needed > 40 * PARAMETERS / 1e9


def test_preflight_counts_the_states_of_a_run_that_can_go_on_as_disk(plan, capsys, monkeypatch):
    """At the second PPO: four stages' weights, its checkpoint twice, and two states of six times the weights each."""
    (Path(plan.student) / "config.json").write_text(json.dumps(SIZES))
    disk = (4 + 2 + 12) * 4 * PARAMETERS + 50e6
    preflight.main(plan)
    assert f"up to {disk / 1e9:.1f} GB of disk" in capsys.readouterr().out
    for free in (disk + 1, disk - 1):
        monkeypatch.setattr("shutil.disk_usage", lambda place, free=free: SimpleNamespace(free=free))
        if free > disk:
            preflight.main(plan)
        else:
            with pytest.raises(ValueError, match="GB are needed there"):
                preflight.main(plan)


def test_preflight_counts_a_teacher_that_is_larger(plan, tmp_path, capsys):
    """At rest, in fp32 on a CPU."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(SIZES | {"num_hidden_layers": 100}))
    preflight.main(replace(plan, teacher=str(tmp_path / "teacher"), batch_size=1))
    weights = 4 * (PARAMETERS + 90 * (2 * 1024 * (1024 + 256) + 3 * 1024 * 4096 + 2 * 1024)) / 1e9
    assert f"weights {weights:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [
    (b"{", r"config\.json is not JSON"), (b"\xff", r"config\.json is not JSON"),
    (b"[]", r"config\.json must hold a JSON object"),
])
def test_preflight_refuses_a_broken_config(plan, text, message):
    path = Path(plan.student) / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        preflight.main(plan)


def test_preflight_asks_the_gpu_where_there_is_one(plan, tmp_path, capsys, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 21000'\necho 'NVIDIA L4, 3'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    preflight.main(plan)
    assert "needs about 0.6 GB of memory on NVIDIA L4: process 0.60; 22.0 GB are free" in capsys.readouterr().out
