"""A loop's whole state on the disk, so that a run that was killed goes on where it was, with the same bits.

    at = {"seen": 0}                                            # numbers and lists that the loop carries along
    checkpoint = Checkpoint(stage, {"model": model, "optimizer": optimizer, "rng": rng}, at)
    for step in checkpoint.steps(total):                        # from where an earlier attempt was
        ...

The bits are the same on one machine with as many threads. No pickle: tensors go to a safetensors file, the rest to JSON.
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

from runtime import SIGNALS, Stage, require, sha256, sync, write_json

GROWING = ("metrics.jsonl", "samples.txt")  # files of a stage that a loop appends to


class Checkpoint:
    """The whole state of a loop, saved now and then: a run that is killed goes on from there, with the same bits.

        at = {"seen": 0}                                            # numbers and lists that the loop carries along
        checkpoint = Checkpoint(stage, {"model": model, "optimizer": optimizer, "rng": rng}, at)
        for step in checkpoint.steps(total):                        # from where an earlier attempt was
            ...

    parts: modules, optimisers and generators by name. With them go the random states of python, numpy and torch, and
    the lengths of the files that grow, so that no line stands there twice. `resume/` holds the newest two states, each
    a safetensors file and, written after it, a JSON file with the SHA-256 of both; a damaged one gives way to the one
    before. A save takes place when 20 times as long as the last one took has passed, so saving costs 5 % of the time
    at most; the first is after the first step: a disk that is too small is better known at once. The data order is the
    loop's own affair: it must follow from the step and what is saved.
    """

    def __init__(self, stage: Stage, parts: dict[str, object], at: dict[str, object]):
        self.stage, self.parts, self.at, self.step = stage, parts, at, 0
        self.folder, self.cost, self.saved = stage.out / "resume", 0.0, time.monotonic()
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                self._load(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"{path} is damaged ({error}); the state before it counts", flush=True)
                continue
            print(f"{stage.out}: goes on after step {self.step}", flush=True)
            return
        for name in GROWING:
            (stage.out / name).unlink(missing_ok=True)

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left, from the first; what a step changed is saved before the next one begins."""
        SIGNALS.wait, SIGNALS.came = True, None
        try:
            while self.step < total:
                yield self.step
                self.step += 1
                if SIGNALS.came or time.monotonic() - self.saved >= 20 * self.cost:
                    self._save()
                if SIGNALS.came:
                    raise KeyboardInterrupt(SIGNALS.came)
        finally:
            SIGNALS.wait = False

    def _save(self) -> None:
        start = time.monotonic()
        self.folder.mkdir(exist_ok=True)
        newest = max((path.stem for path in self.folder.glob("*.json")), default="")
        for path in self.folder.iterdir():  # so that three never need room
            if path.stem != newest:
                path.unlink()
        for name in GROWING:
            if (self.stage.out / name).exists():
                sync(self.stage.out / name)
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
        path = self.folder / f"{self.step:09}.safetensors"
        temporary = path.with_name(path.name + ".tmp")
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{path}: {error}") from None
        sync(temporary)
        temporary.replace(path)
        with safe_open(path, framework="pt") as file:  # read back: what the disk took is what memory holds
            same = all(_bytes(file.get_tensor(name)).equal(_bytes(tensor)) for name, tensor in tensors.items())
        if not same:
            raise OSError(f"{path}: read back, it is not what was written; is the disk broken?")
        write_json(path.with_suffix(".json"), {"sha256": _digest(path, state)} | state)
        self.saved = time.monotonic()
        self.cost = self.saved - start

    def _load(self, path: Path) -> None:
        state = json.loads(path.read_text(encoding="utf-8"))
        tensors_path = path.with_suffix(".safetensors")
        require(state.pop("sha256") == _digest(tensors_path, state), "its checksum is another one")
        for name, length in state["lengths"].items():
            require(_length(self.stage.out / name) >= length, f"{name} is shorter than it was")
        tensors = load_file(tensors_path)
        for name, part in self.parts.items():
            _restore(part, _unpack(state["parts"][name], tensors))
        _set_random_states(_unpack(state["random"], tensors))
        for name, length in state["lengths"].items():
            if (self.stage.out / name).exists():
                os.truncate(self.stage.out / name, length)
        self.step = state["step"]
        self.at.update(state["at"])
        self.stage.start -= state["seconds"]


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # NaN is unequal to itself, its bytes are not


def _digest(path: Path, state: dict) -> str:
    return hashlib.sha256((sha256(path) + json.dumps(state, sort_keys=True)).encode()).hexdigest()


def _random_states() -> dict:
    numbers = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    return {"python": python, "numpy": numpy, "torch": torch.get_rng_state(), "cuda": numbers}


def _set_random_states(states: dict) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _state_of(part) -> object:
    """Of a generator its state; of a module its tensors, tied ones once; of an optimiser its state dict."""
    if hasattr(part, "get_state"):
        return part.get_state()
    return _tensors_of(part) if hasattr(part, "named_parameters") else part.state_dict()


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _restore(part, state) -> None:
    if hasattr(part, "set_state"):
        part.set_state(state)
    elif hasattr(part, "named_parameters"):
        here = _tensors_of(part)
        require(
            {name: tensor.shape for name, tensor in here.items()}
            == {name: tensor.shape for name, tensor in state.items()},
            "it is of another model",
        )
        for name, tensor in here.items():
            tensor.copy_(state[name])
    else:
        part.load_state_dict(state)


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """What JSON can hold of a nest of dicts, lists and numbers; its tensors go to `tensors` by their place."""
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if hasattr(value, "detach"):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    return value


def _unpack(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, dict):
        return (
            tensors[value["tensor"]]
            if "tensor" in value
            else {key: _unpack(item, tensors) for key, item in value["dict"]}
        )
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value
