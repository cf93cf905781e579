"""Out of memory: one sentence that names what needs less, and with it a run goes on from what is saved."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runtime
import sft
from data import write_jsonl
from runtime import checkpoint

ROOT = Path(runtime.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def flags(tmp_path_factory, model_folder):
    """Of an SFT of 12 steps."""
    path = tmp_path_factory.mktemp("memory") / "sft.jsonl"
    write_jsonl(path, [{"prompt": f"{i}?", "response": "abc " * (i % 3 + 1)} for i in range(16)])
    return [f"--model={model_folder}", f"--data={path}", "--epochs=3", "--batch_size=4", "--micro_tokens=1024"]


def launch(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.launch(script.main, script.Config, flags)
    return stop.value.code, capsys.readouterr().err


def test_out_of_memory_names_one_flag_and_goes_on_from_what_is_saved(flags, tmp_path, monkeypatch, capsys):
    """After two steps of SFT; with that flag it goes on after them, and ends as a run does that was not stopped."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0)
    real, calls = sft.masked_logprobs, []

    def fail(*args, **more):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return real(*args, **more)

    flags = [*flags, f"--out={tmp_path}/out"]
    monkeypatch.setattr(sft, "masked_logprobs", fail)
    code, text = launch(sft, flags, capsys)
    assert code == 2 and len(text.strip().splitlines()) == 1 and "Traceback" not in text
    assert "error: out of memory" in text and "is kept" in text and "--micro_tokens 512 " in text
    monkeypatch.setattr(sft, "masked_logprobs", real)
    runtime.launch(sft.main, sft.Config, [*flags, "--micro_tokens=512"])
    assert "goes on after step 2" in capsys.readouterr().out and not list(tmp_path.glob("*.old*"))
    runtime.launch(sft.main, sft.Config, [*flags[:-1], f"--out={tmp_path}/whole"])
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    capsys.readouterr()
    sft.main(sft.Config(**vars(runtime.cli(sft.Config, flags))))  # and a finished stage is not done again for a flag
    assert "skipped" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space as Linux has them")
def test_out_of_memory_for_real(flags, tmp_path):
    """SFT with room for its libraries and little more: one sentence, code 2."""
    code = ("import resource, sys, sft, runtime, torch, torch._dynamo; torch.set_num_threads(1)\n"
            "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
            "resource.setrlimit(resource.RLIMIT_AS, (used + 10**7,) * 2)\n"
            "sys.argv[0] = 'sft.py'; runtime.launch(sft.main, sft.Config)")
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a?", "response": "b" * 200} for _ in range(64)])
    flags = flags + [f"--data={tmp_path}/long.jsonl", "--batch_size=64", "--micro_tokens=8192"]
    done = subprocess.run([sys.executable, "-c", code, *flags, f"--out={tmp_path}/out"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"^error: out of memory.*--micro_tokens 4096 ", done.stderr, re.MULTILINE)
