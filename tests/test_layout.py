"""The shape of the project: which room imports which, imports that do nothing, flags that are all used."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import runtime

pytestmark = pytest.mark.project
ROOT = Path(runtime.__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
ROOM_FILES = sorted(file for room in ROOMS for file in ROOT.glob(f"{room}/*.py"))
BELOW = {"runtime": set(), "hf": {"runtime"}, "tasks": {"runtime", "answers"}}  # what a room may import beside itself
ALONE = {"model", "answers", "quality"}  # these import rooms alone
PLAIN = ["answers", "pseudo_reward", "runtime.preflight", "runtime.ranks", "hf.folder"]  # without torch, which is slow


def tree(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(path):
    """The first names of the project's modules that a file imports at its top."""
    names = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            names.add(node.module.split(".")[0])
    return names & {*SCRIPTS, *ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_no_script_and_no_room_above(room):
    for path in sorted(ROOT.glob(f"{room}/*.py")):
        assert imported(path) <= BELOW.get(room, set(ROOMS)) | {room}, path.name


def test_scripts_build_on_each_other_in_one_direction():
    graph = {script: imported(f"{script}.py") & set(SCRIPTS) for script in SCRIPTS}
    assert not any(graph[script] for script in ALONE)
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names those in a circle


def test_nothing_that_trains_knows_the_experiments():
    """bench/ tells kinds of readings from the texts and compares with gold: no script or room imports any of it."""
    bench = {path.stem for path in ROOT.glob("bench/*.py")}
    assert "readings" in bench
    for path in [*ROOT.glob("*.py"), *ROOM_FILES]:
        for node in ast.walk(tree(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not bench & {part for name in names for part in name.split(".")}, path.name


def test_importing_does_nothing(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for code in (f"import {', '.join(SCRIPTS)}", f"import sys, {', '.join(PLAIN)}; assert 'torch' not in sys.modules"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def configs():
    found = []
    for path in [*ROOT.glob("*.py"), *ROOM_FILES]:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and path.stem != "model":
                found.append(pytest.param(path, node, id=f"{path.stem}-{node.name}"))
    return found


@pytest.mark.parametrize(("path", "config"), configs())
def test_every_field_of_a_config_is_read(path, config):
    """As .field in its file, or in one that it hands its Config to: a room, a script that it imports."""
    scripts = SCRIPTS if path in ROOM_FILES else imported(path) & set(SCRIPTS)
    files = [path, *ROOM_FILES, *(f"{script}.py" for script in scripts)]
    read = {node.attr for file in files for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}
    fields = {line.target.id for line in config.body if isinstance(line, ast.AnnAssign)}
    assert fields - {"out"} <= read, f"{path.name} has flags that change nothing"
