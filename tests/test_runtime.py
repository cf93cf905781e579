"""runtime/: flags, error sentences, signals, the learning rate, progress, whole files, stages that finish once."""

import dataclasses
import fcntl
import io
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import runtime
from runtime import Stage, flags, steps

# ---- flags ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    """A few flags."""

    model: str
    steps: flags.Count = 3
    lr: flags.Positive = 0.5
    fast: bool = False
    safe: bool = True
    seed: int = 0
    limit: flags.Natural = 0
    coef: flags.NotNegative = 0.0
    share: flags.Share = 0.1


def test_cli_makes_a_typed_flag_of_every_field():
    assert runtime.cli(Flags, ["--model", "m"]) == Flags("m", 3, 0.5, False, True)
    argv = ["--model", "m", "--steps", "-7", "--lr", "1e-3", "--fast", "--no-safe", "--seed", str(2**63 - 1)]
    assert runtime.cli(Flags, argv) == Flags("m", -7, 1e-3, True, False, 2**63 - 1)
    assert runtime.cli(Flags, ["--model", "m", "--no-fast", "--safe"]) == Flags("m")


@pytest.mark.parametrize(("encoding", "seen"), [
    ("ascii", "7 ? ?? m?"), ("latin-1", "7 ? ?? m?"),
    ("cp1252", "7 \u2014 ?? m?"), ("utf-8", "7 \u2014 \u6771\u4eac m?")])
def test_a_terminal_of_another_encoding_does_not_end_a_script(encoding, seen, monkeypatch):
    """Nor does a path that is no text, a lone surrogate in Python."""
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding, write_through=True))
    runtime.launch(lambda cfg: print("7 \u2014 \u6771\u4eac", cfg.model), Flags, ["--model", "m\udcff"])
    assert screen.getvalue().decode(encoding) == f"{seen}\n"


@pytest.mark.parametrize(("argv", "named"), [
    ([], "--model"),  # required
    (["--model", "m", "--stepz", "3"], "--stepz"),
    (["--model", "m", "--step", "3"], "--step"),  # no abbreviations: a later field must not change their meaning
    (["--model", "m", "--steps", "3.5"], "--steps"),
    (["--model", "m", "--lr", "nan"], "--lr"),
    (["--model", "m", "--lr=-inf"], "--lr"),
    (["--model", "m", "--seed", "-1"], "--seed"),
    (["--model", "m", "--seed", str(2**63)], "--seed"),
    (["--model", "m", "extra"], "extra"),
])
def test_cli_refuses_a_bad_command_line_with_code_2_and_names_the_flag(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.cli(Flags, argv)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_a_flag_outside_its_range_is_named():
    flags.check(Flags("m", steps=1, lr=1e-300, limit=0, coef=0.0, share=1.0))
    for bad in ({"steps": 0}, {"lr": 0.0}, {"limit": -1}, {"coef": -1e-9}, {"share": 1.001}, {"share": -0.1}):
        with pytest.raises(ValueError, match=f"--{next(iter(bad))}"):
            flags.check(replace(Flags("m"), **bad))


@dataclass(frozen=True)
class Words:
    files: flags.Inputs
    data: flags.Input = ""
    questions: flags.Questions = ""
    micro_tokens: flags.AtOnce = 8
    sparing: flags.Saving = False


def test_words_without_a_flag_fill_a_field_of_texts(capsys):
    cfg = runtime.cli(Words, ["a=x", "b=y=z", "--data", "d", "--questions", "arith:test"])
    assert list(cfg.files) == ["a=x", "b=y=z"]
    assert flags.inputs(cfg) == {"a": "x", "b": "y=z", "data": "d"}  # a set with a name is no file
    assert flags.inputs(replace(cfg, questions="x/arith.jsonl"))["questions"] == "x/arith.jsonl"
    with pytest.raises(SystemExit):
        runtime.cli(Words, ["--data", "2"])
    assert "files" in capsys.readouterr().err
    seen = []
    runtime.launch(seen.append, Words, ["c"])  # the given words, not those of sys.argv
    assert list(seen[0].files) == ["c"]


# ---- how a script ends ---------------------------------------------------------------------------------------------


def fails(error):
    def main(cfg):
        raise error

    return main


@pytest.mark.parametrize(("main", "told"), [
    (lambda cfg: runtime.require(False, "--how: not so"), "--how: not so"),
    (fails(ValueError("data.jsonl, line 3:\n not so")), "data.jsonl, line 3: not so"),
    (fails(FloatingPointError("NaN")), "NaN"),
    (fails(FileNotFoundError("data.jsonl not found")), "data.jsonl not found"),
    (lambda cfg: Path("nowhere/data.jsonl").write_text(""), "nowhere/data.jsonl: No such file or directory"),
])
def test_a_mistake_of_the_user_is_one_sentence(main, told, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        runtime.launch(main, Flags, ["--model=m"])
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {told}\n")
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises((ValueError, OSError, FloatingPointError)):
        runtime.launch(main, Flags, ["--model=m"])


@pytest.mark.parametrize(("main", "error"), [
    (fails(KeyError("a bug")), KeyError), (fails(RuntimeError("shapes differ")), RuntimeError),
    (lambda cfg: json.loads("{"), ValueError),  # raised in json: a bug of ours, not a mistake of the user
])
def test_a_bug_keeps_its_traceback(main, error):
    with pytest.raises(error):
        runtime.launch(main, Flags, ["--model=m"])


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_names_the_command_and_every_flag_that_needs_less(error, capsys):
    with pytest.raises(SystemExit) as stop:
        runtime.launch(fails(error), Words, ["c=d"])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and " c=d " in told and "--micro_tokens 4 " in told and "--sparing " in told
    assert flags.smaller(Words(("c",), micro_tokens=1, sparing=True)) == flags.smaller(Flags("m")) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_script_with_its_code_and_the_command_to_go_on(number, code, capsys):
    """Outside of a loop that saves its state at once."""
    with pytest.raises(SystemExit) as stop:
        runtime.launch(lambda cfg: signal.raise_signal(number), Flags, ["--model=a b"])
    error = capsys.readouterr().err
    assert stop.value.code == code and error.endswith(" '--model=a b'\n") and "Traceback" not in error


# ---- seeds, learning rate, progress --------------------------------------------------------------------------------


def test_a_seed_follows_from_the_whole_purpose():
    """Numbers and texts, their order and where one ends and the next begins; always the same, and one for torch."""
    purposes = [(0,), (1,), ("0",), (0, "sft"), ("sft", 0), (0, 1), (1, 0), (0, 1, 1), (0, 11), (0, "1", "1"),
                (0, "11"), (2**62, 0), (0, 2**62)]
    seeds = [steps.seed_of(*purpose) for purpose in purposes]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**16 for seed in seeds}) == len(seeds)
    assert steps.seed_of(0, "sft", 3) == 8910626388193366761
    draws = [torch.rand(3, generator=steps.generator(0, purpose)) for purpose in ("sft", "sft", "reward")]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_learning_rate_warms_up_and_falls_linearly_to_zero():
    """Without warm-up four updates have 1, .75, .5, .25 of the peak; with it the peak is reached and not passed."""
    assert [runtime.lr_at(step, 4, 0) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    up, down = [0.25, 0.5, 0.75, 1], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert [runtime.lr_at(step, 10, 4) for step in range(11)] == pytest.approx(up + down)
    short = [runtime.lr_at(step, 8, 20) for step in range(9)]  # a run shorter than its warm-up has a peak too
    assert short == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0])
    assert runtime.lr_at(0, 1, 20) == 1
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 3.0}], lr=1.0)
    runtime.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(("parameters", "variable", "threads"), [
    (100_000, "", [1]), (100_000, "3", []), (6_000_000, "", [])])
def test_threads_by_the_size_of_the_model(monkeypatch, parameters, variable, threads):
    """One for a small model; the variable decides where it is set, PyTorch reads it itself."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    runtime.set_threads(torch.nn.Linear(parameters, 1, bias=False, device="meta"))
    assert asked == threads


@pytest.mark.parametrize("precision", ["", "bf16", "fp32"])
def test_products_are_in_the_precision_that_is_set_else_bf16_on_a_gpu_alone(precision, monkeypatch):
    """Without a copy of every weight in bf16. What only answers stays as its file is, or is fp32."""
    monkeypatch.setenv("PRECISION", precision)
    device = steps.default_device()
    half = precision == "bf16" or (not precision and device.type == "cuda")
    a = torch.ones(2, 2, device=device)
    with steps.mixed_precision():
        assert (a @ a).dtype == (torch.bfloat16 if half else torch.float32)
        assert not torch.is_autocast_cache_enabled()
    assert runtime.inference_dtype() == (None if half else torch.float32)
    assert steps.bf16(cuda=True) == (precision != "fp32") and steps.bf16(cuda=False) == (precision == "bf16")


def test_a_precision_that_is_neither_is_refused(monkeypatch):
    monkeypatch.setenv("PRECISION", "fp16")
    with pytest.raises(ValueError, match="PRECISION=fp16"):
        steps.bf16()


def test_progress_prints_a_line_that_stays_now_and_then(monkeypatch, capsys):
    """With what is left of the time, from where this attempt began."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = runtime.Progress("sft", 14, 10)
    for loss in ("3", "2", "1", "0"):
        now[0] += 5
        progress.update(1, f"loss {loss}", at_once=loss == "1")
    assert capsys.readouterr().out == "sft 12/14 loss 2 left 0:10\nsft 13/14 loss 1 left 0:05\n"


def test_a_long_loop_prints_at_most_fifty_lines(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = runtime.Progress("sft", 1000)
    for _ in range(1000):
        now[0] += 11
        progress.update()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 50 and lines[0].startswith("sft   20/1000 left") and lines[-1] == "sft 1000/1000 left 0:00"


# ---- whole files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, OSError])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, error, monkeypatch):
    path = tmp_path / "file.txt"
    with runtime.replacing(path, "wb") as file:
        file.write(b"old\r\n")
    with pytest.raises(error) as told, runtime.replacing(path) as file:
        file.write("new")
        file.flush()
        assert path.read_bytes() == b"old\r\n"
        raise error
    assert error is not OSError or told.value.filename == str(path)  # a full disk does not say it
    assert path.read_bytes() == b"old\r\n" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(Path, "replace", lambda self, target: fails(error)(None))
    with pytest.raises(error):
        runtime.write_json(path, {"name": "Ava"})
    assert path.read_bytes() == b"old\r\n" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    runtime.write_json(path, {"name": "Zoë"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Zoë"} and list(tmp_path.iterdir()) == [path]


# ---- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    data: flags.Input
    out: str
    lr: float = 0.1
    batch_size: flags.Count = 8
    micro_tokens: flags.AtOnce = 8


def run(cfg, text="result"):
    """One pass of a stage; True if it had to be done."""
    did = []

    @runtime.stage
    def main(cfg, stage):
        did.append(True)
        (stage.out / "result.txt").write_text(text, encoding="utf-8")
        for step in stage.steps(1):
            stage.log(step, {"loss": 1.5})
        stage.finish(tokens=7, loss=1.5)

    main(cfg)
    return bool(did)


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "data.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    return Work(str(tmp_path / "a run" / "data.jsonl"), str(tmp_path / "a run" / "stage"))


def aside(cfg):
    return sorted(path.name for path in Path(cfg.out).parent.glob("stage.old*"))


def contents(cfg):
    return {path.name: path.read_bytes() for path in Path(cfg.out).iterdir()}


def test_a_finished_stage_is_skipped_and_left_as_it_is(cfg, tmp_path):
    """Also with less memory, and where its run folder was moved or an input file renamed."""
    assert run(cfg)
    before = contents(cfg)
    (Path(cfg.out) / "resume").mkdir()  # a kill right after done.json leaves it
    assert not run(cfg, "another") and not run(replace(cfg, micro_tokens=4), "another")
    renamed = Path(cfg.data).rename(Path(cfg.data).with_name("renamed.jsonl"))
    assert not run(replace(cfg, data=str(renamed)))
    assert contents(cfg) == before and aside(cfg) == []
    (tmp_path / "a run").rename(tmp_path / "moved")
    assert not run(Work(str(tmp_path / "moved" / "renamed.jsonl"), str(tmp_path / "moved" / "stage")))


def test_done_json_says_what_was_asked_what_it_cost_and_what_came_out(cfg):
    run(cfg)
    done = json.loads((Path(cfg.out) / "done.json").read_text())
    assert done["config"] == dataclasses.asdict(cfg)
    assert done["tokens"] == 7 and done["results"] == {"loss": 1.5} and done["seconds"] >= 0
    assert 10 < done["peak_memory_mb"] < 1e6
    metrics = Path(cfg.out) / "metrics.jsonl"
    assert json.loads(metrics.read_text()) == {"step": 0, "loss": 1.5}
    assert done["outputs"] == {"metrics.jsonl": metrics.stat().st_size, "result.txt": len("result")}


def test_a_changed_setting_or_input_redoes_the_stage_and_keeps_the_old_one_aside(cfg, capsys):
    run(cfg, "first")
    assert run(replace(cfg, lr=0.2), "second")
    assert "lr 0.1 -> 0.2" in capsys.readouterr().out
    assert aside(cfg) == ["stage.old1"]
    assert (Path(cfg.out).parent / "stage.old1" / "result.txt").read_text() == "first"
    assert (Path(cfg.out) / "result.txt").read_text() == "second"
    assert run(cfg, "third") and aside(cfg) == ["stage.old1", "stage.old2"]
    Path(cfg.data).write_text('{"a": 2}\n', encoding="utf-8")  # same size, same name
    assert run(cfg, "fourth") and aside(cfg) == ["stage.old1", "stage.old2", "stage.old3"]
    assert run(replace(cfg, batch_size=4))  # of an optimiser's step: it changes the result


def test_another_precision_redoes_a_stage_that_has_a_network(cfg, monkeypatch):
    """Which one it was stands in done.json; where nobody has set one the device decides, and the stage stays."""
    @dataclass(frozen=True)
    class Plain:
        out: str

    plain = Plain(cfg.out + " without a network")
    for precision, done in (("", True), ("bf16", True), ("bf16", False), ("fp32", True)):
        monkeypatch.setenv("PRECISION", precision)
        assert run(cfg) == done and run(plain) == (precision == "")
        settings = json.loads((Path(cfg.out) / "done.json").read_text())["settings"]
        assert settings.get("precision", "") == precision


def test_an_input_folder_counts_by_its_models_files_not_by_its_own_done_json(cfg):
    folder = Path(cfg.data).with_name("model")
    folder.mkdir()
    cfg = replace(cfg, data=str(folder))
    own, read = ["done.json", "metrics.jsonl"], [
        "config.json", "model.safetensors", "model.safetensors.index.json", "model-00001.safetensors", "tokenizer.json",
        "tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"]
    for name in [*own, *read]:
        (folder / name).write_text("{}", encoding="utf-8")
    assert run(cfg)
    for name in [*own, *read]:
        (folder / name).write_text("[]", encoding="utf-8")
        assert run(cfg) == (name in read), name
    (folder / "tokenizer.json").unlink()
    assert run(cfg)
    (folder / "config.json").rename(folder / "tokenizer.json")
    assert run(cfg)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"outputs": []}', None])
def test_a_done_json_that_is_something_else_does_not_count(cfg, text):
    run(cfg)
    done = Path(cfg.out) / "done.json"
    done.write_text(done.read_text()[:-20] if text is None else text)
    assert run(cfg) and not run(cfg)


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_text("resul"), lambda path: path.write_text("rezult")])
def test_a_missing_truncated_or_changed_output_is_made_again(cfg, damage):
    run(cfg)
    damage(Path(cfg.out) / "result.txt")
    assert run(cfg)
    assert (Path(cfg.out) / "result.txt").read_text() == "result" and not run(cfg)


def test_a_finished_stage_stands_until_the_inputs_of_the_next_one_were_read(cfg):
    """A script that refuses its input has not asked for its folder yet: the old one is neither moved nor written to."""
    run(cfg, "first")
    before = contents(cfg)
    assert not Stage(replace(cfg, lr=0.3)).finished
    assert contents(cfg) == before and aside(cfg) == []
    with pytest.raises(FileNotFoundError, match=r"--data .*nothing\.jsonl"):
        Stage(replace(cfg, data="nothing.jsonl"))
    with pytest.raises(ValueError, match="--lr"):
        runtime.stage(fails(AssertionError))(dataclasses.make_dataclass("Bad", [("out", str), ("lr", flags.Positive)])(
            cfg.out, 0.0))
    assert not Stage(Work("", str(Path(cfg.out) / "new"))).finished  # an empty path is an input that is not used
    assert contents(cfg) == before


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work_unless_it_is_done(cfg, monkeypatch):
    run(cfg)
    with pytest.raises(ValueError, match="--out "):
        run(replace(cfg, out=cfg.data + "/out"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for out in (cfg.out, cfg.out + "/new"):
        with pytest.raises(ValueError, match=f"--out {out}"):
            run(replace(cfg, out=out, lr=0.2))
    assert not run(cfg)


def test_a_folder_in_which_another_process_works_is_refused(cfg):
    Path(cfg.out).mkdir()
    another = os.open(cfg.out, os.O_RDONLY)
    fcntl.flock(another, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match=f"--out {cfg.out}: another process"):
        run(cfg)
    os.close(another)  # as when it dies
    assert run(cfg)


def test_what_an_attempt_left_goes(cfg):
    """Half-written files, and lines of a loop that had saved no state."""
    stage = Stage(cfg)
    (stage.out / "model.safetensors.tmp").write_bytes(b"half")
    stage.append("metrics.jsonl", '{"step": 7}\n')
    assert run(cfg)
    assert sorted(contents(cfg)) == ["done.json", "metrics.jsonl", "result.txt"]
    assert [row["step"] for row in Stage(cfg).logged()] == [0]


def test_numbers_that_are_not_finite_end_a_stage_with_its_step(cfg, capsys):
    """No step was taken; what was kept stays, and the next attempt does it again."""

    @runtime.stage
    def main(cfg, stage):
        for step in stage.steps(3):
            steps.require_finite({"loss": 1.0, "grad_norm": float("nan") if step == 2 else 1.0})
            stage.log(step, {"loss": 1.0})

    with pytest.raises(ValueError, match="step 2: grad_norm is nan"):
        main(cfg)
    assert not Stage(cfg).finished
