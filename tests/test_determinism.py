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

ROOT = Path(__file__).resolve().parent.parent
STAGE = """
import importlib, json, sys
sys.path.insert(0, {root!r})
import runtime
for name, (script, flags) in json.loads({commands!r}).items():
    script = importlib.import_module(script)
    runtime.launch(script.main, script.Config, [*flags, "--out=" + {out!r} + "/" + name])
"""


def test_a_stage_gives_the_same_bytes_again(world, model_folder, tmp_path):  # noqa: F811
    """All files: weights, metrics.jsonl, samples, transcripts; done.json but for times and memory."""
    stages = commands(world, model_folder)
    lists = json.dumps({name: (script.__name__, flags) for name, (script, flags) in stages.items()})
    for seed in ("0", "4242"):
        code = STAGE.format(root=str(ROOT), commands=lists, out=str(tmp_path / seed))
        env = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in stages:
        one, other = (outputs(tmp_path / seed / name) for seed in ("0", "4242"))
        assert one == other and len(one) > 1


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
