"""A loop's whole state on the disk, so that a run that was killed goes on where it was, with the same bits.

    at = {"seen": 0}                                     # numbers and lists that the loop carries along
    checkpoint = Checkpoint(stage, {"model": model, "optimizer": optimizer, "rng": rng}, at)
    for step in checkpoint.steps(total):                 # from where an earlier attempt was
        ...

The same bits: on one machine, with as many threads and ranks. A state holds whole tensors, so that any number of ranks
can go on from it: all read it, rank 0 writes it. No pickle: tensors go to a safetensors file, the rest to JSON.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from runtime import SIGNALS, Stage, ranks, require, sha256, sync, write_json

PAUSE = 20  # the next save waits so many times as long as the last one took: they take 5 % of the time at most
GROWING = ("metrics.jsonl", "samples.txt")  # files of a stage that a loop appends to


class Checkpoint:
    """What a loop needs to go on, loaded when made and saved now and then.

    `parts`: modules, optimisers and generators by name; `at`: what else the loop carries along, updated in place. With
    them go the random states of python, numpy and torch, and the lengths of the files that grow, so that no line
    stands there twice. The order of the data is the loop's own affair: it must follow from the step and from these.

    The folder resume/ holds the newest two states, each a safetensors file and, written after it, a JSON file with the
    SHA-256 of both. One that is damaged gives way to the one before. The first save follows the first step: that the
    disk is too small is better known at once.
    """

    def __init__(self, stage: Stage, parts: dict[str, object], at: dict[str, object]):
        self.stage, self.parts, self.at, self.step = stage, parts, at, 0
        self.folder, self.cost, self.saved = stage.out / "resume", 0.0, time.monotonic()
        ranks.of_first()  # has made the folder, or pushed another run's aside
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                state = self._read(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                print(f"{path} is damaged ({error}): the state before it counts", flush=True)
                continue
            self._restore(state, load_file(path.with_suffix(".safetensors")))
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
                if _signal() or ranks.of_first(time.monotonic() - self.saved >= PAUSE * self.cost):
                    self.save()
                if came := _signal():
                    raise KeyboardInterrupt(came)
        finally:
            SIGNALS.wait = False

    def save(self) -> None:
        """Write the tensors under a temporary name, to the disk, read them back, rename; then the JSON that vouches."""
        start = time.monotonic()
        tensors: dict[str, Tensor] = {}
        state = {
            "settings": self.stage.record["settings"],
            "inputs": self.stage.record["inputs"],
            "step": self.step,
            "at": self.at,
            "seconds": start - self.stage.start,
            "lengths": {name: _length(self.stage.out / name) for name in GROWING},
            "random": _pack(_random_states(), "random", tensors),
            "parts": {name: _pack(_state_of(part), name, tensors) for name, part in self.parts.items()},
        }
        if ranks.RANK:
            return
        self.folder.mkdir(exist_ok=True)
        newest = max((path.stem for path in self.folder.glob("*.json")), default="")
        for path in self.folder.iterdir():  # first, so that three never need room
            if path.stem != newest:
                path.unlink()
        for name in GROWING:
            if (self.stage.out / name).exists():
                sync(self.stage.out / name)
        path = self.folder / f"{self.step:09}.safetensors"
        temporary = path.with_name(path.name + ".tmp")
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{path}: {error}") from None
        sync(temporary)
        for name, tensor in tensors.items():
            with safe_open(temporary, framework="pt") as file:  # anew: what was read leaves memory with its tensor
                if not _bytes(file.get_tensor(name)).equal(_bytes(tensor)):
                    raise OSError(f"{path}: read back, it is not what was written; the disk may be broken")
        temporary.replace(path)
        write_json(path.with_suffix(".json"), {"sha256": _digest(path, state)} | state)
        self.saved = time.monotonic()
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
            if isinstance(part, torch.Generator):
                part.set_state(saved)
            elif isinstance(part, nn.Module):
                for key, tensor in _tensors_of(part).items():
                    tensor.copy_(ranks.part_of(saved[key], tensor))
            else:
                parameters = [parameter for group in part.param_groups for parameter in group["params"]]
                for index, values in saved["state"].items():
                    for key in [key for key in values if key != "step"]:  # in the same order on all ranks
                        values[key] = ranks.part_of(values[key], parameters[index])
                part.load_state_dict(saved)
        _set_random_states(_unpack(state["random"], tensors))
        for name, length in state["lengths"].items():
            if ranks.RANK == 0 and (self.stage.out / name).exists():
                os.truncate(self.stage.out / name, length)
        self.step = state["step"]
        self.at.update(state["at"])
        self.stage.start -= state["seconds"]
        ranks.of_first()  # has cut the files


def _signal() -> int:
    """A signal to stop that has reached any rank; 0: none."""
    return max(ranks.everyones(SIGNALS.came or 0))


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # NaN does not equal itself, its bytes do


def _digest(path: Path, state: dict) -> str:
    return hashlib.sha256((sha256(path) + json.dumps(state, sort_keys=True)).encode()).hexdigest()


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once."""
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _state_of(part: nn.Module | torch.optim.Optimizer | torch.Generator) -> object:
    if isinstance(part, torch.Generator):
        return part.get_state()
    return _tensors_of(part) if isinstance(part, nn.Module) else part.state_dict()


def _random_states() -> dict:
    python, numpy = random.getstate(), np.random.get_state()
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []  # other GPUs are other ranks'
    return {"python": python, "numpy": numpy, "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_states(states: dict) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """A nest of dicts, lists, numbers and tensors as JSON can hold it; tensors go to `tensors` under their place."""
    if isinstance(value, Tensor):
        value = ranks.whole(value.detach())
        if ranks.RANK == 0:
            tensors[name] = value.cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # pairs: JSON would turn the keys of an optimiser's state, numbers, into texts
        return {"pairs": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _unpack(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    return tensors[value["tensor"]] if "tensor" in value else {k: _unpack(v, tensors) for k, v in value["pairs"]}
