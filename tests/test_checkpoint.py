"""checkpoint.py: a loop that was cut off goes on with the same bits; a damaged state gives way to the one before."""

import json
import os
import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import SIGNALS, Stage, launch
from runtime import checkpoint as module
from runtime.checkpoint import Checkpoint

STEPS = 9


@dataclass(frozen=True)
class Config:
    """A small training stage."""

    out: str
    lr: float = 0.1


class Cut(Exception):
    """As kill -9 would: nothing is cleaned up."""


def train(cfg, cut=None, tied=False):
    """Nine steps that use every kind of chance, an optimiser with moments and a list; cut off within step `cut`."""
    stage = Stage(cfg)
    if stage.finished:
        return None
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    rng = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    if tied:
        model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    at = {"order": [], "seen": 0, "loss": 0.1}
    checkpoint = Checkpoint(stage, {"model": model, "optimizer": optimizer, "rng": rng}, at)
    first = checkpoint.step
    for step in checkpoint.steps(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (1 - step / STEPS)
        if not at["order"]:
            at["order"] = torch.randperm(4, generator=rng).tolist()
        x = torch.rand(3, 4) + at["order"].pop() + random.random() + float(np.random.rand())
        loss = (model(x) - torch.rand(3, 4, generator=rng)).square().mean()
        loss.backward()
        if cut == step:
            raise Cut
        optimizer.step()
        optimizer.zero_grad()
        at["seen"] += 3
        at["loss"] = loss.item()
        stage.log(step, loss=at["loss"], lr=optimizer.param_groups[0]["lr"])
        with (stage.out / "samples.txt").open("a") as file:
            file.write(f"{step}\n")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws = random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=rng).item()
    files = [(stage.out / name).read_bytes() for name in ("metrics.jsonl", "samples.txt")]
    stage.finish(tokens=at["seen"])
    return first, weights, at, draws, files


def same(one, other):
    _, weights, *rest = one
    _, others, *more = other
    return rest == more and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture(autouse=True)
def save_always(monkeypatch):
    """Whatever a save took, the next follows the next step; and nothing waits for the disk."""
    monkeypatch.setattr(Checkpoint, "cost", property(lambda self: 0.0, lambda self, value: None), raising=False)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def states(cfg):
    return sorted(path.name for path in (Path(cfg.out) / "resume").iterdir())


@pytest.fixture
def whole(tmp_path):
    return train(Config(str(tmp_path / "whole")))


@pytest.mark.parametrize("cut", range(STEPS))
def test_a_loop_that_was_cut_off_goes_on_bit_for_bit(tmp_path, whole, cut):
    """Weights, moments, buffers, every random stream, the data's order, the files: nothing differs, no line twice."""
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, cut)
    again = train(cfg)
    assert again[0] == cut and same(again, whole)
    assert len(again[4][0].splitlines()) == STEPS and again[2]["seen"] == 3 * STEPS
    assert not (Path(cfg.out) / "resume").exists() and train(cfg) is None


def test_it_may_be_cut_off_again_and_again(tmp_path, whole):
    cfg = Config(str(tmp_path / "run"))
    for cut in (1, 1, 2, 5, 7):
        with pytest.raises(Cut):
            train(cfg, cut)
    assert same(train(cfg), whole)


def test_tied_weights_stay_tied(tmp_path):
    whole = train(Config(str(tmp_path / "whole")), tied=True)
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, 4, tied=True)
    again = train(cfg, tied=True)
    assert same(again, whole) and torch.equal(again[1]["0.weight"], again[1]["2.weight"])


def test_the_newest_two_states_are_kept_and_hold_no_pickle(tmp_path):
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, 5)
    assert states(cfg) == [f"{step:09}.{kind}" for step in (4, 5) for kind in ("json", "safetensors")]
    assert all(b"\x80\x02" not in path.read_bytes()[:4] and not path.read_bytes().startswith(b"PK")
               for path in (Path(cfg.out) / "resume").iterdir())


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    lambda path: path.write_bytes(b""),
    lambda path: path.unlink(),
    *(lambda path, place=place: flip(path, place) for place in (0.0, 0.03, 0.3, 0.5, 0.9)),
], ids=["half", "empty", "gone", "flip0", "flip3", "flip30", "flip50", "flip90"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, whole, kind, damage, capsys):
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, 5)
    damage(path := Path(cfg.out) / "resume" / f"{5:09}.{kind}")
    again = train(cfg)
    assert again[0] == 4 and same(again, whole)
    assert "is damaged" in capsys.readouterr().out or (kind == "json" and not path.exists())


def test_two_damaged_states_begin_anew(tmp_path, whole):
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, 5)
    for step in (4, 5):
        flip(Path(cfg.out) / "resume" / f"{step:09}.safetensors", 0.7)
    again = train(cfg)
    assert again[0] == 0 and same(again, whole)


def test_a_metrics_file_that_lost_its_end_is_not_continued(tmp_path, whole):
    """As after a power cut on a disk that lied about fsync: the state before, whose lines are all there."""
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, 5)
    path = Path(cfg.out) / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 1)
    again = train(cfg)
    assert again[0] == 4 and same(again, whole)


def test_half_a_line_of_metrics_is_cut_off(tmp_path, whole):
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, 5)
    with (Path(cfg.out) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert same(train(cfg), whole)


def test_another_setting_does_not_go_on_from_it_and_does_not_destroy_it(tmp_path, capsys):
    cfg = Config(str(tmp_path / "run"))
    with pytest.raises(Cut):
        train(cfg, 5)
    assert train(replace(cfg, lr=0.2))[0] == 0
    assert "lr 0.1 -> 0.2" in capsys.readouterr().out
    assert len(list((tmp_path / "run.old1" / "resume").iterdir())) == 4


def test_what_is_written_is_read_back(tmp_path, monkeypatch):
    """A disk that swallows a bit is noticed at once, and the state before it stays."""
    cfg = Config(str(tmp_path / "run"))
    real = module.save_file

    def swallow(tensors, path):
        real({name: 1 - tensor if name == "model.0.bias" and path.name[8] == "3" else tensor
              for name, tensor in tensors.items()}, path)

    monkeypatch.setattr(module, "save_file", swallow)
    with pytest.raises(OSError, match="read back"):
        train(cfg)
    assert [name for name in states(cfg) if name.endswith("json")] == [f"{2:09}.json"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux says which file a handle is")
def test_bytes_are_on_the_disk_before_they_get_their_name_and_the_json_comes_last(tmp_path, monkeypatch):
    """Or a power cut could leave a name without its bytes, or a JSON file that vouches for nothing."""
    events = []
    real = Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append(f"-> {Path(to).name}"), real(self, to))[1])
    stage = Stage(Config(str(tmp_path / "run")))
    stage.log(0, loss=1.0)
    checkpoint = Checkpoint(stage, {"rng": torch.Generator()}, {})
    stage.log(0, loss=1.0)
    checkpoint.save()
    tensors, record = "000000000.safetensors", "000000000.json"
    assert events == ["metrics.jsonl", f"{tensors}.tmp", f"-> {tensors}", f"{record}.tmp", f"-> {record}", "resume"]


def test_saving_costs_a_twentieth_of_the_time_at_most(tmp_path, monkeypatch):
    monkeypatch.undo()
    now, saves = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def save(self):
        saves.append(self.step)
        now[0] += 2
        self.saved, self.cost = now[0], 2

    monkeypatch.setattr(Checkpoint, "save", save)
    for _ in Checkpoint(Stage(Config(str(tmp_path / "run"))), {}, {}).steps(100):
        now[0] += 1
    assert saves == [1, 41, 81]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_with_the_state_saved(tmp_path, whole, capfd, number, code, monkeypatch):
    cfg, seen = Config(str(tmp_path / "run")), []
    monkeypatch.setattr(Checkpoint, "cost", property(lambda self: 1e9, lambda self, value: None))  # only as it stops
    real = Stage.log

    def log(self, step, **values):
        real(self, step, **values)
        if step == 4 and not seen:
            seen.append(os.kill(os.getpid(), number))

    monkeypatch.setattr(Stage, "log", log)
    with pytest.raises(SystemExit) as stop:
        launch(train, Config, ["--out", cfg.out])
    error = capfd.readouterr().err
    assert stop.value.code == code and f"--out {cfg.out}" in error and "stopping after this step" in error
    assert [name for name in states(cfg) if name.endswith("json")] == [f"{5:09}.json"]
    assert not SIGNALS.wait and same(train(cfg), whole)


def test_the_same_signal_twice_stops_at_once(tmp_path, capfd):
    cfg = Config(str(tmp_path / "run"))

    def main(cfg):
        for _ in Checkpoint(Stage(cfg), {}, {}).steps(3):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    with pytest.raises(SystemExit) as stop:
        launch(main, Config, ["--out", cfg.out])
    assert stop.value.code == 143 and not (Path(cfg.out) / "resume").exists()


def test_every_value_comes_back_as_it_was():
    """Keys that are numbers, None, infinities, empty nests, tensors of every type and of no dimension."""
    value = {0: [1, -0.0, float("inf"), None, True, "ü\u2028"], "a": {}, "b": [], 7: {"x": torch.tensor(2.5)},
             "half": torch.ones(2, 0, dtype=torch.bfloat16), "bytes": torch.arange(3, dtype=torch.uint8)}
    tensors = {}
    packed = json.loads(json.dumps(module._pack(value, "v", tensors)))
    back = module._unpack(packed, tensors)
    assert list(back) == list(value) and str(back) == str(value)
