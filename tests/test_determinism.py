"""The same command, threads and seed give the same bytes, whatever the hash seed of the process and its folder."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import STAGES, train_all
from test_resume import commands, outputs, world  # noqa: F401  a fixture

TESTS = Path(__file__).resolve().parent
STAGE = "import sys; sys.path.insert(0, {tests!r}); import conftest, test_resume as t; s, f = t.commands({world!r}, " \
    "{model!r})[{name!r}]; t.runtime.launch(s.main, s.Config, [*f.split(), '--out=' + {out!r}])"


def run(files, model, name, out, hash_seed):
    code = STAGE.format(tests=str(TESTS), world=str(files), model=str(model), name=name, out=str(out))
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return outputs(out)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "generate", "best_of_n"])
def test_a_stage_gives_the_same_bytes_again(world, model_folder, tmp_path, name):  # noqa: F811
    """All files: weights, metrics.jsonl, samples, transcripts; done.json but for times and memory."""
    one, other = (run(world, model_folder, name, tmp_path / f"run{seed}" / "out", seed) for seed in ("0", "4242"))
    assert one == other
    assert ("metrics.jsonl" in one[0]) == (name in ("sft", "reward", "ppo")) and len(one[0]) >= 1


def test_another_seed_gives_other_bytes(world, model_folder, tmp_path):  # noqa: F811
    """Or the test above would hold of a program that does nothing."""
    script, flags = commands(world, model_folder)["generate"]
    for seed in (0, 1):
        script.main(script.Config(**{key.lstrip("-"): value for key, value in (f.split("=") for f in flags.split())}
                                  | {"samples": 2, "max_new_tokens": 12, "batch_size": 2, "seed": seed,
                                     "out": str(tmp_path / str(seed))}))
    assert (tmp_path / "0" / "samples.jsonl").read_bytes() != (tmp_path / "1" / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_train_all_gives_the_same_bytes_again(tmp_path):
    """Every file of every stage of two QUICK runs, and report.json but for its costs."""
    found = []
    for seed in ("1", "77"):
        process = train_all(tmp_path / seed, PYTHONHASHSEED=seed, OMP_NUM_THREADS="1")
        assert process.returncode == 0, process.stdout + process.stderr
        files = {
            str(path.relative_to(tmp_path / seed)): hashlib.sha256(path.read_bytes()).hexdigest()
            for stage in STAGES for path in sorted((tmp_path / seed / stage).rglob("*"))
            if path.is_file() and path.name != "done.json"
        }
        report = json.loads((tmp_path / seed / "report.json").read_text())
        del report["cost"]
        found.append((files, report))
    assert len(found[0][0]) > 30 and found[0] == found[1]
