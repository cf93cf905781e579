"""runtime.py: flags, error sentences, the learning rate, progress lines, and stages that finish once."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import runtime
from runtime import Stage

ROOT = Path(runtime.__file__).resolve().parent.parent


# ---- flags ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    """A few flags."""

    model: str
    steps: int = 3
    lr: float = 0.5
    fast: bool = False
    safe: bool = True
    seed: int = 0


def test_cli_makes_a_typed_flag_of_every_field():
    assert runtime.cli(Flags, ["--model", "m"]) == Flags("m", 3, 0.5, False, True)
    argv = ["--model", "m", "--steps", "-7", "--lr", "1e-3", "--fast", "--no-safe"]
    assert runtime.cli(Flags, argv) == Flags("m", -7, 1e-3, True, False)
    assert runtime.cli(Flags, ["--model", "m", "--no-fast", "--safe"]) == Flags("m")


@pytest.mark.parametrize(("argv", "named"), [
    ([], "--model"),  # required
    (["--model", "m", "--stepz", "3"], "--stepz"),
    (["--model", "m", "--step", "3"], "--step"),  # no abbreviations: a later field must not change their meaning
    (["--model", "m", "--steps", "3.5"], "--steps"),
    (["--model", "m", "--lr", "fast"], "--lr"),
    (["--model", "m", "--lr", "nan"], "--lr: 'nan' is not a finite number"),
    (["--model", "m", "--lr=-inf"], "--lr: '-inf' is not a finite number"),
    (["--model", "m", "--seed", "-1"], "--seed: -1 is not between 0 and 2^32 - 1"),
    (["--model", "m", "--seed", str(2**32)], "--seed: 4294967296 is not"),
    (["--model", "m", "extra"], "extra"),
])
def test_cli_refuses_a_bad_command_line_with_code_2_and_names_the_flag(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.cli(Flags, argv)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_words_without_a_flag_fill_a_field_of_texts(capsys):
    @dataclass(frozen=True)
    class Words:
        files: tuple[str, ...]
        top: int = 1

    cfg = runtime.cli(Words, ["a", "b", "--top", "2"])
    assert (list(cfg.files), cfg.top) == (["a", "b"], 2)
    with pytest.raises(SystemExit):
        runtime.cli(Words, ["--top", "2"])
    assert "files" in capsys.readouterr().err
    seen = []
    runtime.launch(seen.append, Words, ["c"])  # the given words, not those of sys.argv
    assert list(seen[0].files) == ["c"]


SCRIPT = """
import json, dataclasses, runtime
from pathlib import Path

@dataclasses.dataclass(frozen=True)
class Config:
    "A script."
    how: str

def main(cfg):
    if cfg.how == "require":
        runtime.require(False, "--how require: not so")
    if cfg.how == "ours":
        raise ValueError("data.jsonl, line 3: not so")
    if cfg.how == "file":
        raise FileNotFoundError("data.jsonl not found")
    if cfg.how == "system":
        Path("nowhere/data.jsonl").write_text("")
    if cfg.how == "library":
        json.loads("{")
    if cfg.how == "bug":
        raise KeyError("a bug")
    if cfg.how == "interrupt":
        raise KeyboardInterrupt
    print("fine")

if __name__ == "__main__":
    runtime.launch(main, Config)
"""


@pytest.mark.parametrize(("how", "debug", "code", "last_line"), [
    ("well", "", 0, None),
    ("require", "", 2, "error: --how require: not so"),
    ("ours", "", 2, "error: data.jsonl, line 3: not so"),
    ("file", "", 2, "error: data.jsonl not found"),
    ("library", "", 1, None),  # a ValueError too, but raised in json: a bug of ours, not a mistake of the user
    ("bug", "", 1, "KeyError: 'a bug'"),
    ("ours", "1", 1, "ValueError: data.jsonl, line 3: not so"),
    ("system", "", 2, "error: nowhere/data.jsonl: No such file or directory"),  # whoever met it: the disk is the user's
    ("interrupt", "", 130, None),
])
def test_launch_prints_one_sentence_for_mistakes_and_a_traceback_for_bugs(how, debug, code, last_line, tmp_path):
    for script in ("runtime.py", "ranks.py"):
        shutil.copy(ROOT / script, tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py", "--how", how], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"DEBUG": debug})
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    if code == 2:
        assert done.stderr == last_line + "\n" and done.stdout == ""
    elif code == 130:
        assert done.stderr.rstrip().endswith("script.py --how interrupt")  # the command that goes on
    elif last_line:
        assert done.stderr.splitlines()[-1] == last_line


# ---- seeds and learning rate ---------------------------------------------------------------------------------------


def test_seed_all_repeats_every_kind_of_draw():
    def draw(seed):
        rng = runtime.seed_all(seed)
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=rng).item()

    assert draw(3) == draw(3)
    assert all(a != b for a, b in zip(draw(3), draw(4)))


def test_learning_rate_warms_up_and_falls_linearly_to_zero():
    """Without warm-up four updates have 1, .75, .5, .25 of the peak; with it the peak is reached and not passed."""
    assert [runtime.lr_at(step, 4, 0) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    up, down = [0.25, 0.5, 0.75, 1], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert [runtime.lr_at(step, 10, 4) for step in range(11)] == pytest.approx(up + down)
    assert all(0 < runtime.lr_at(step, 3, 20) <= 1 for step in range(3))  # a run shorter than its warm-up


def test_set_lr_reaches_every_group():
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 3.0}], lr=1.0)
    runtime.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(("parameters", "variable", "threads"), [
    (100_000, None, 1), (100_000, "3", 3), (100_000, "", 1), (6_000_000, None, 3), (6_000_000, "3", 3),
])
def test_threads_by_the_size_of_the_model(monkeypatch, capsys, parameters, variable, threads):
    """One for a small model; the variable decides where it is set, PyTorch reads it itself; what was chosen is said."""
    asked = [3]  # as PyTorch starts
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    runtime.set_threads(torch.nn.Linear(parameters, 1, bias=False, device="meta"))
    assert asked[-1] == threads and f"{threads} thread(s)" in capsys.readouterr().out


def test_products_are_bf16_on_a_gpu_and_fp32_on_a_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: asked.append((*args, more)))
    for name in ("cuda", "cpu"):
        monkeypatch.setattr(runtime, "default_device", lambda name=name: torch.device(name))
        runtime.mixed_precision()
    assert asked == [(name, torch.bfloat16, {"enabled": name == "cuda", "cache_enabled": False})
                     for name in ("cuda", "cpu")]


# ---- progress ------------------------------------------------------------------------------------------------------


def test_progress_prints_a_plain_line_every_ten_seconds_when_piped(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    bar = runtime.Progress("sft", 4)
    for loss in ("3", "2", "1", "0"):
        now[0] += 5
        bar.update(1, f"loss {loss}")
    bar.close()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["sft 2/4 loss 2 left 0:10", "sft 4/4 loss 0 left 0:00"]
    assert "\r" not in captured.out + captured.err


# ---- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    data: str  # an input
    out: str
    lr: float = 0.1


def run(cfg, text="result"):
    """One pass of a stage; True if it had to be done."""
    stage = Stage(cfg, inputs=["data"])
    if stage.finished:
        return False
    (stage.out / "result.txt").write_text(text, encoding="utf-8")
    stage.log(0, loss=1.5)
    stage.finish(tokens=7, loss=1.5)
    return True


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    return Work(str(tmp_path / "run" / "data.jsonl"), str(tmp_path / "run" / "stage"))


def aside(cfg):
    return sorted(path.name for path in Path(cfg.out).parent.glob("stage.old*"))


def test_a_finished_stage_is_skipped_and_left_as_it_is(cfg, capsys):
    assert run(cfg)
    before = {path.name: path.read_bytes() for path in Path(cfg.out).iterdir()}
    assert not run(cfg, "another")
    assert {path.name: path.read_bytes() for path in Path(cfg.out).iterdir()} == before
    assert "skipped" in capsys.readouterr().out and aside(cfg) == []


def test_done_json_says_what_was_asked_what_it_cost_and_what_came_out(cfg):
    run(cfg)
    done = json.loads((Path(cfg.out) / "done.json").read_text())
    assert done["config"] == {"data": cfg.data, "out": cfg.out, "lr": 0.1}
    assert done["tokens"] == 7 and done["results"] == {"loss": 1.5} and done["seconds"] >= 0
    assert 10 < done["peak_memory_mb"] < 1e6
    metrics = Path(cfg.out) / "metrics.jsonl"
    assert done["outputs"] == {"metrics.jsonl": metrics.stat().st_size, "result.txt": len("result")}


def test_a_changed_setting_redoes_the_stage_and_keeps_the_old_one_aside(cfg, capsys):
    run(cfg, "first")
    assert run(replace(cfg, lr=0.2), "second")
    assert "lr 0.1 -> 0.2" in capsys.readouterr().out
    assert aside(cfg) == ["stage.old1"]
    assert (Path(cfg.out).parent / "stage.old1" / "result.txt").read_text() == "first"
    assert (Path(cfg.out) / "result.txt").read_text() == "second"
    assert run(cfg, "third") and aside(cfg) == ["stage.old1", "stage.old2"]


def test_changed_content_of_an_input_redoes_the_stage(cfg):
    run(cfg, "first")
    Path(cfg.data).write_text('{"a": 2}\n', encoding="utf-8")  # same size, same name
    assert run(cfg, "second") and aside(cfg) == ["stage.old1"]


def test_a_renamed_input_file_is_the_same_input(cfg):
    run(cfg)
    renamed = Path(cfg.data).rename(Path(cfg.data).with_name("renamed.jsonl"))
    assert not run(replace(cfg, data=str(renamed)))


def test_an_input_folder_counts_by_its_models_files_not_by_its_own_done_json(cfg, tmp_path):
    folder = tmp_path / "run" / "model"
    folder.mkdir()
    cfg = replace(cfg, data=str(folder))
    for name in ("config.json", "model.safetensors", "done.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    assert run(cfg)
    (folder / "done.json").write_text('{"seconds": 2}', encoding="utf-8")
    assert not run(cfg)
    (folder / "model.safetensors").write_text("[]", encoding="utf-8")
    assert run(cfg)


def test_a_moved_run_folder_is_not_redone(cfg, tmp_path):
    run(cfg)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = Work(str(tmp_path / "moved" / "data.jsonl"), str(tmp_path / "moved" / "stage"))
    assert not run(moved)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_truncated_done_json_does_not_count(cfg, share):
    run(cfg)
    done = Path(cfg.out) / "done.json"
    done.write_text(done.read_text()[: int(share * done.stat().st_size)])
    assert run(cfg) and not run(cfg)


@pytest.mark.parametrize("text", ["null", "[]", "{}", '"x"', '{"outputs": []}'])
def test_a_done_json_that_is_something_else_does_not_count(cfg, text):
    run(cfg)
    (Path(cfg.out) / "done.json").write_text(text)
    assert run(cfg) and not run(cfg)


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_text("resul"), lambda path: path.write_text("rezult")])
def test_a_missing_truncated_or_changed_output_is_made_again(cfg, damage, capsys):
    run(cfg)
    damage(Path(cfg.out) / "result.txt")
    assert run(cfg)
    assert "result.txt is not as it was written" in capsys.readouterr().out
    assert (Path(cfg.out) / "result.txt").read_text() == "result" and not run(cfg)


def test_a_stage_that_was_cut_off_starts_its_metrics_anew(cfg):
    stage = Stage(cfg, inputs=["data"])
    stage.log(0, loss=9.0)
    stage.log(1, loss=8.0)
    assert not (stage.out / "done.json").exists()
    stage = Stage(cfg, inputs=["data"])
    assert not stage.finished and aside(cfg) == []
    stage.log(0, loss=1.5, **{"val/ratio": 1.0})
    stage.log(1, loss=1.25)
    lines = [json.loads(line) for line in (stage.out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 1.5, "val/ratio": 1.0}, {"step": 1, "loss": 1.25}]


def test_a_missing_input_is_named_with_its_flag_before_anything_is_written(cfg):
    with pytest.raises(FileNotFoundError, match=r"--data .*nothing\.jsonl"):
        Stage(replace(cfg, data="nothing.jsonl"), inputs=["data"])
    assert not Path(cfg.out).exists()
    assert not Stage(replace(cfg, data=""), inputs=["data"]).finished  # an empty path is an input that is not used


def test_write_json_leaves_a_whole_file_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    runtime.write_json(path, {"name": "Zoë"})
    with pytest.raises(TypeError):
        runtime.write_json(path, {"name": object()})
    assert list(tmp_path.iterdir()) == [path]

    def cut_off(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        runtime.write_json(path, {"name": "Ava"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Zoë"}


def test_a_finished_stage_stands_until_the_inputs_of_the_next_one_were_read(cfg):
    """A script that refuses its input has not asked for its folder yet: the old one is neither moved nor written to."""
    run(cfg, "first")
    before = {path.name: path.read_bytes() for path in Path(cfg.out).iterdir()}
    assert not Stage(replace(cfg, lr=0.3), inputs=["data"]).finished
    assert {path.name: path.read_bytes() for path in Path(cfg.out).iterdir()} == before and aside(cfg) == []


def test_what_an_attempt_left_half_written_goes(cfg):
    Path(cfg.out).mkdir()
    (Path(cfg.out) / "model.safetensors.tmp").write_bytes(b"half")
    assert run(cfg)
    assert sorted(path.name for path in Path(cfg.out).iterdir()) == ["done.json", "metrics.jsonl", "result.txt"]


# ---- what the system can do to a run -------------------------------------------------------------------------------

STAGE = """
import dataclasses, runtime, time

@dataclasses.dataclass(frozen=True)
class Config:
    "A stage that fills a file."
    out: str
    size: int = 10
    wait: float = 0.0

def main(cfg):
    stage = runtime.Stage(cfg)
    if stage.finished:
        return
    print("at work in", stage.out, flush=True)
    time.sleep(cfg.wait)
    with runtime.replacing(stage.out / "rows.jsonl") as file:
        file.writelines("x" * 1000 + "\\n" for _ in range(cfg.size))
    stage.finish()

if __name__ == "__main__":
    runtime.launch(main, Config)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "stage.py"
    path.write_text(STAGE, encoding="utf-8")
    return path


def start(script, *flags, before=()):
    """The stage in a process of its own, runtime.py beside it as in the project."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*before, sys.executable, str(script), *flags], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_second_process_in_the_same_folder_is_refused_and_a_dead_one_leaves_no_lock(script, tmp_path):
    out = str(tmp_path / "out")
    first = start(script, "--out", out, "--wait", "60")
    assert first.stdout.readline() == f"at work in {out}\n"
    for flags in ((), ("--size", "5")):
        second = start(script, "--out", out, *flags)
        error = second.communicate()[1]
        assert second.returncode == 2 and error == f"error: --out {out}: another process is at work in this folder; " \
            "wait for it\n"
    first.kill()
    first.communicate()
    third = start(script, "--out", out)
    assert third.communicate()[1] == "" and third.returncode == 0
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_stage_with_its_code_and_the_command_to_go_on(script, tmp_path, number, code):
    out = str(tmp_path / "out")
    process = start(script, "--out", out, "--wait", "60")
    process.stdout.readline()
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in error
    assert error.rstrip().endswith(f"{script} --out {out} --wait 60") and not (tmp_path / "out" / "done.json").exists()


def mounted(options, path):
    """A command that runs another one with a file system of its own at `path`, without being root; or skip."""
    before = ["unshare", "-Urm", "sh", "-c", f'mount {options} {path} && exec "$@"', "sh"]
    try:
        subprocess.run([*before, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount here: {error}")
    return before


def test_a_full_disk_is_one_sentence_that_names_the_file(script, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    before = mounted("-t tmpfs -o size=100k none", disk)
    process = start(script, "--out", str(disk / "out"), "--size", "200", before=before)
    error = process.communicate()[1]
    assert process.returncode == 2
    assert error == f"error: {disk}/out/rows.jsonl: No space left on device\n"


def test_a_read_only_folder_is_refused_before_the_work(script, tmp_path):
    disk = tmp_path / "disk"
    (disk / "out").mkdir(parents=True)
    before = mounted(f"--bind -o ro {disk}", disk)
    for out, place in ((disk / "new", disk), (disk / "out", disk / "out")):
        process = start(script, "--out", str(out), before=before)
        output, error = process.communicate()
        assert process.returncode == 2 and output == ""
        assert error == f"error: --out {out}: {place} is no folder to write to\n"
    (disk / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder to write to"):
        Stage(Work("", str(disk / "file" / "out")))


def test_a_skipped_stage_may_be_read_only(script, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    start(script, "--out", str(disk / "out")).communicate()
    process = start(script, "--out", str(disk / "out"), before=mounted(f"--bind -o ro {disk}", disk))
    assert "skipped" in process.communicate()[0] and process.returncode == 0


def test_replacing_leaves_the_old_file_if_anything_goes_wrong(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), runtime.replacing(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with runtime.replacing(path, "wb") as file:
        file.write(b"new\r\n")
    assert path.read_bytes() == b"new\r\n" and list(tmp_path.iterdir()) == [path]


def test_a_stage_is_on_the_disk_before_it_is_called_done(cfg, monkeypatch):
    synced = []
    monkeypatch.setattr(runtime, "sync", lambda path: synced.append(Path(path).name))
    run(cfg)
    assert set(synced[: synced.index("done.json.tmp")]) == {"result.txt", "metrics.jsonl", "stage"}
