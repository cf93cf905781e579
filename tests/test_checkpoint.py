"""runtime/checkpoint.py: a loop that was cut off goes on with the same bits; a damaged state gives way to the one
before."""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from runtime import Stage, launch, seed_of, stage, steps
from runtime import checkpoint as module
from runtime.checkpoint import Checkpoint
from runtime.flags import SIGNALS, AtOnce

STEPS = 7


@dataclass(frozen=True)
class Config:
    """A small training stage."""

    out: str
    lr: float = 0.1
    micro_tokens: AtOnce = 9


class Cut(Exception):
    """As kill -9 would: nothing is cleaned up."""


def train(cfg, cut=None, tied=False):
    """Steps of an optimiser with moments on a model with buffers; cut off within step `cut`. What came out."""
    found = []

    @stage
    def main(cfg, stage):
        torch.manual_seed(seed_of(3))
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        if tied:
            model[2].weight = model[0].weight
        adam = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
        for step in stage.steps(STEPS, "loss {loss:.2f}", model=model, adam=adam):
            found.append(step)
            for group in adam.param_groups:
                group["lr"] = cfg.lr * (1 - step / STEPS)
            x = torch.rand(3, 4, generator=steps.generator(3, "x", step))
            loss = (model(x) - x.flip(0)).square().mean()
            loss.backward()
            stage.append("samples.txt", f"{step}\n")
            if cut == step:
                raise Cut
            adam.step()
            adam.zero_grad()
            stage.log(step, {"loss": loss.item(), "lr": adam.param_groups[0]["lr"]})
        weights = [tensor.clone() for tensor in model.state_dict().values()]
        assert not tied or model[0].weight is model[2].weight
        files = [(stage.out / name).read_bytes() for name in ("metrics.jsonl", "samples.txt")]
        found[1:] = [weights, files, [row["step"] for row in stage.logged()]]
        stage.finish()

    main(cfg)
    return found


def same(one, other):
    (_, weights, *rest), (_, others, *more) = one, other
    return rest == more and all(map(torch.equal, weights, others))


@pytest.fixture(autouse=True)
def save_always(monkeypatch):
    """Whatever a save took, the next follows the next step; and nothing waits for the disk."""
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def whole(tmp_path):
    return train(Config(str(tmp_path / "whole")))


@pytest.fixture
def cut_off(tmp_path):
    """A run that was cut off within step 5: states 4 and 5 are saved."""
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, 5)
    return cfg


def states(cfg):
    return sorted(path.name for path in (Path(cfg.out) / "resume").iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_a_loop_that_was_cut_off_again_and_again_goes_on_bit_for_bit(tmp_path, tied):
    """Weights, moments, buffers, the files: nothing differs, no line twice. With less memory too."""
    whole = train(Config(str(tmp_path / "whole")), tied=tied)
    assert whole[3] == list(range(STEPS)) and not same(whole, train(Config(str(tmp_path / "another"), 0.2), tied=tied))
    for cuts in ((0,), (5,), (1, 1, 2, 3, 6)):
        cfg = Config(str(tmp_path / f"run{cuts}"))
        for cut in cuts:
            with pytest.raises(Cut):
                train(cfg, cut, tied)
        again = train(replace(cfg, micro_tokens=3), tied=tied)
        assert again[0] == cuts[-1] and same(again, whole)
        assert not (Path(cfg.out) / "resume").exists() and train(cfg) == []


def test_the_newest_two_states_are_kept_and_hold_no_pickle(cut_off):
    assert states(cut_off) == [f"{step:09}.{kind}" for step in (4, 5) for kind in ("json", "safetensors")]
    for path in (Path(cut_off.out) / "resume").iterdir():
        assert b"\x80\x02" not in path.read_bytes()[:4] and not path.read_bytes().startswith(b"PK")


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, path.stat().st_size // 2), Path.unlink,
    *(lambda path, place=place: flip(path, place) for place in (0.03, 0.9))], ids=["half", "gone", "start", "end"])
def test_a_damaged_state_gives_way_to_the_one_before(cut_off, whole, kind, damage):
    damage(Path(cut_off.out) / "resume" / f"{5:09}.{kind}")
    again = train(cut_off)
    assert again[0] == 4 and same(again, whole)


@pytest.mark.parametrize("saves", [0, 1])
def test_the_state_that_counts_outlives_a_save_that_is_killed(cut_off, whole, monkeypatch, saves):
    """Gone back from state 5 to 4: the first save that follows is killed half way, or the one after it."""
    flip(Path(cut_off.out) / "resume" / f"{5:09}.safetensors", 0.9)
    save, left = module.write_tensors, [saves]

    def killed(path, tensors):
        if not left[0]:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise Cut
        left[0] -= 1
        save(path, tensors)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(module, "write_tensors", killed)
        train(cut_off)
    again = train(cut_off)
    assert again[0] == 4 + saves and same(again, whole)


def test_a_file_that_lost_its_end_is_not_continued_and_half_a_line_is_cut_off(cut_off, whole):
    """As after a power cut on a disk that lied about fsync: the state before, whose lines are all there."""
    path = Path(cut_off.out) / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Cut):
        train(cut_off, 4)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    again = train(cut_off)
    assert again[0] == 4 and same(again, whole)


def test_another_setting_does_not_go_on_from_it_and_does_not_destroy_it(cut_off, capsys):
    assert train(replace(cut_off, lr=0.2))[0] == 0
    assert "lr 0.1 -> 0.2" in capsys.readouterr().out
    assert len(list(Path(f"{cut_off.out}.old1").glob("resume/*"))) == 4


def test_no_file_gets_its_name_before_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    """Or a power cut could leave a name without its bytes, or a JSON file that vouches for nothing."""
    synced, named, replace = set(), [], Path.replace

    def known(stat):  # what was added later is not
        return stat.st_ino, stat.st_size

    def look_and_replace(self, to):
        folder = Path(to).parent
        assert known(self.stat()) in synced
        if Path(to).name == "done.json":
            assert all(known(path.stat()) in synced for path in folder.iterdir() if path.is_file())
        if folder.name == "resume" and Path(to).suffix == ".json":
            assert Path(to).with_suffix(".safetensors").exists()
            assert known((folder.parent / "metrics.jsonl").stat()) in synced
        named.append(Path(to).name)
        return replace(self, to)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(known(os.fstat(handle))))
    monkeypatch.setattr(Path, "replace", look_and_replace)
    train(Config(str(tmp_path / "run")))
    assert len(named) == 2 * STEPS + 1
    monkeypatch.setattr(module, "PAUSE", 1e9)  # lines that came after the last state
    train(Config(str(tmp_path / "run"), 0.2))


def test_saving_costs_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    monkeypatch.undo()
    now, saves = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def save(self):
        saves.append(self.step)
        now[0] += 2
        self.saved, self.cost = now[0], 2

    monkeypatch.setattr(Checkpoint, "save", save)
    for _ in Checkpoint(Stage(Config(str(tmp_path / "run"))), {}).steps(100):
        now[0] += 1
    assert saves == [1, 41, 81]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_with_the_state_saved(tmp_path, whole, capfd, number, code, monkeypatch):
    cfg, log, sent = Config(str(tmp_path / "run")), Stage.log, []
    monkeypatch.setattr(module, "PAUSE", 1e9)  # after the first step it saves only as it stops

    def log_and_send(self, step, metrics):
        log(self, step, metrics)
        if step == 4 and not sent:
            sent.append(os.kill(os.getpid(), number))

    monkeypatch.setattr(Stage, "log", log_and_send)
    with pytest.raises(SystemExit) as stop:
        launch(train, Config, ["--out", cfg.out])
    assert stop.value.code == code and f"--out {cfg.out}" in capfd.readouterr().err
    assert f"{5:09}.json" in states(cfg) and not SIGNALS.wait
    again = train(cfg)
    assert again[0] == 5 and same(again, whole)


def test_the_same_signal_twice_stops_at_once(tmp_path):
    def main(cfg):
        for _ in Checkpoint(Stage(cfg), {}).steps(3):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    with pytest.raises(SystemExit) as stop:
        launch(main, Config, ["--out", str(tmp_path / "run")])
    assert stop.value.code == 143 and not (tmp_path / "run" / "resume").exists()
