"""A loop's networks and optimisers on the disk, so that a run that was killed goes on where it was, with the same bits.

    state = Checkpoint(stage, {"model": model, "adam": adam})
    for step in state.steps(total):                      # from where an earlier attempt was
        ...

The same bits: on one machine, with as many threads and ranks. A state holds full tensors, so that any number of ranks
can go on from it: all read it, rank 0 writes it. No pickle: tensors go to a safetensors file, the rest to JSON.
Whatever else a loop needs must follow from the step (steps.seed_of), and the files that grow are cut back to it.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime import ranks
from runtime.files import sha256, sync, write_json, write_tensors
from runtime.flags import SIGNALS, require
from runtime.stage import Stage

PAUSE = 20  # the next save waits so many times as long as the last one took: they take 5 % of the time at most
# files of a stage that a loop appends to
GROWING = ("metrics.jsonl", "samples.txt", "samples.jsonl", "transcripts.jsonl", "scores.jsonl")


class Checkpoint:
    """What a loop needs to go on, loaded when made and saved now and then. `parts`: modules and optimisers by name.

    The folder resume/ holds the newest two states, each a safetensors file and, written after it, a JSON file with the
    SHA-256 of both. One that is damaged gives way to the one before. The first save follows the first step: that the
    disk is too small is better known at once.
    """

    def __init__(self, stage: Stage, parts: dict[str, nn.Module | Optimizer]):
        self.stage, self.parts, self.step, self.good = stage, parts, 0, ""  # the name of the newest whole state
        self.folder, self.cost, self.saved = stage.out / "resume", 0.0, time.monotonic()
        ranks.broadcast()  # rank 0 has made the folder, or pushed another run's aside
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                state = self._read(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                print(f"{path} is damaged ({error}): the state before it counts", flush=True)
                continue
            self._restore(state, load_file(path.with_suffix(".safetensors")))
            self.good = path.stem
            print(f"{stage.folder}: goes on after step {self.step}", flush=True)
            return
        for name in GROWING if ranks.RANK == 0 else ():
            (stage.out / name).unlink(missing_ok=True)

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left. A signal to stop is obeyed between two of them, with the state saved."""
        SIGNALS.wait, SIGNALS.came = True, None
        try:
            while self.step < total:
                yield self.step
                self.step += 1
                came = max(ranks.gather(SIGNALS.came or 0))  # a signal that has reached any rank
                if came or ranks.broadcast(time.monotonic() - self.saved >= PAUSE * self.cost):
                    self.save()
                if came:
                    raise KeyboardInterrupt(came)
        finally:
            SIGNALS.wait = False

    def save(self) -> None:
        """Write the tensors, then the JSON that vouches for them."""
        start = time.monotonic()
        tensors: dict[str, Tensor] = {}
        state = {
            "settings": self.stage.record["settings"],
            "inputs": self.stage.record["inputs"],
            "step": self.step,
            "seconds": start - self.stage.start,
            "lengths": {name: _length(self.stage.out / name) for name in GROWING},
            "parts": {name: _pack(_state_of(part), name, tensors) for name, part in self.parts.items()},
        }
        if ranks.RANK:
            return
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():  # first, so that three never need room
            if path.stem != self.good:
                path.unlink()
        for name in GROWING:
            if (self.stage.out / name).exists():
                sync(self.stage.out / name)
        path = self.folder / f"{self.step:09}.safetensors"
        write_tensors(path, tensors)
        write_json(path.with_suffix(".json"), {"sha256": _digest(path, state)} | state)
        self.good, self.saved = path.stem, time.monotonic()
        self.cost = self.saved - start

    def _read(self, path: Path) -> dict:
        """A state that is whole. Raises ValueError or OSError if it is not, or if a file that grew has shrunk since."""
        state = json.loads(path.read_text(encoding="utf-8"))
        digest = state.pop("sha256")
        require(digest == _digest(path.with_suffix(".safetensors"), state), "another checksum")
        for name, length in state["lengths"].items():
            require(_length(self.stage.out / name) >= length, f"{name} has lost its end")
        return state

    def _restore(self, state: dict, tensors: dict[str, Tensor]) -> None:
        for name, part in self.parts.items():
            saved = _unpack(state["parts"][name], tensors)
            if isinstance(part, nn.Module):
                for key, tensor in _state_of(part).items():
                    tensor.copy_(ranks.shard_like(saved[key], tensor))
            else:
                parameters = [parameter for group in part.param_groups for parameter in group["params"]]
                for index, values in saved["state"].items():
                    for key in [key for key in values if key != "step"]:  # in the same order on all ranks
                        values[key] = ranks.shard_like(values[key], parameters[index])
                part.load_state_dict(saved)
        for name, length in state["lengths"].items():
            if ranks.RANK == 0 and (self.stage.out / name).exists():
                os.truncate(self.stage.out / name, length)
        self.step = state["step"]
        self.stage.start -= state["seconds"]
        ranks.broadcast()  # rank 0 has cut the files


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _digest(path: Path, state: dict) -> str:
    return hashlib.sha256((sha256(path) + json.dumps(state, sort_keys=True)).encode()).hexdigest()


def _state_of(part: nn.Module | Optimizer) -> dict:
    """A module's parameters that learn, and buffers, tied ones once; an optimiser's state dict."""
    if isinstance(part, Optimizer):
        return part.state_dict()
    learning = [(name, parameter) for name, parameter in part.named_parameters() if parameter.requires_grad]
    return {name: tensor.detach() for name, tensor in [*learning, *part.named_buffers()]}


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """A nest of dicts, lists, numbers and tensors as JSON can hold it; tensors go to `tensors` under their place."""
    if isinstance(value, Tensor):
        value = ranks.full_tensor(value.detach())
        if ranks.RANK == 0:
            tensors[name] = value.cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # pairs: JSON would turn the keys of an optimiser's state, numbers, into texts
        return {"pairs": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _unpack(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    return tensors[value["tensor"]] if "tensor" in value else {k: _unpack(v, tensors) for k, v in value["pairs"]}
